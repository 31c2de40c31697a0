"""Parameters and their gradients as one real vector, for an algorithm that sees the whole problem.

A matrix of 2 x 3, a complex vector of 4 and a single number become a vector of 15 numbers:

    0 ... 5    the matrix, row by row
    6 ... 13   the complex vector: real part, imaginary part, real part, ...
    14         the number
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import kernel
from ...contract.values import StepError, brief
from ...stepping.checks import Member, check_member

# NumPy's scalars round after each operation in their own precision, as one-element tensors do, in a
# tenth of the time.
_SCALARS: dict[torch.dtype, type[np.floating]] = {
    torch.float64: np.float64,
    torch.float16: np.float16,
}


def precision(dtype: torch.dtype) -> type[np.floating]:
    """Return the NumPy scalar that rounds as a dtype does: float32 for bfloat16, which NumPy
    lacks."""
    return _SCALARS.get(dtype, np.float32)


def scalar(x: Tensor) -> np.floating:
    """Return a tensor of one element as a NumPy scalar of its precision."""
    return precision(x.dtype)(x.item())


def largest(vector: Tensor) -> np.floating:
    """Return the largest absolute value of a vector: NaN if it has one, 0 if it is empty."""
    if not vector.numel():
        return np.float32(0.0)
    low, high = torch.aminmax(vector)
    return max(-scalar(low), scalar(high))


class FlatParameters:
    """Parameters, one after the other, as one vector of `size` real numbers.

    A complex number counts as two. The vector's dtype is the one that all parameters promote to.
    Raises `StepError` if they lie on different devices.
    """

    def __init__(self, owner: str, params: Sequence[Tensor], names: Sequence[str] = ()) -> None:
        self._owner = owner
        self._params = params
        self._labels = [repr(name) for name in names] or [str(i) for i in range(len(params))]
        self._sizes = [_real_size(p) for p in params]
        self.size = sum(self._sizes)
        self.device = params[0].device
        self.dtype = reduce(torch.promote_types, (p.dtype.to_real() for p in params))
        for p, label in zip(params, self._labels, strict=True):
            if p.device != self.device:
                raise StepError(
                    f"{owner}: all parameters must lie on one device, and parameter {label} is on "
                    f"{p.device}, parameter {self._labels[0]} on {self.device}; move them together"
                )

    def check(self) -> None:
        """Raise `StepError` for parameters that cannot be written, and gradients that do not
        fit."""
        for i, (p, label) in enumerate(zip(self._params, self._labels, strict=True)):
            if not (p.is_floating_point() or p.is_complex()):
                raise StepError(
                    f"{self._owner} moves all parameters as one vector, and parameter {label} is "
                    f"{p.dtype}; leave it out of the list"
                )
            if p.grad is None or p.grad.layout in (torch.strided, torch.sparse_coo):
                member = Member(i, 0, 0, label)
                check_member(self._owner, member, p, p.grad, {}, (), ())

    def new(self) -> Tensor:
        """Return a vector of this size, with any content."""
        return torch.empty(self.size, dtype=self.dtype, device=self.device)

    def read(self, out: Tensor) -> None:
        """Copy the parameters into a vector."""
        torch.cat([_real(p).reshape(-1) for p in self._params], out=out)

    def read_gradient(self, out: Tensor) -> None:
        """Copy the gradients into a vector: zeros for a missing one, sparse ones as dense ones."""
        sizes = zip(self._params, self._sizes, strict=True)
        torch.cat([_flat_gradient(p, size) for p, size in sizes], out=out)

    def write(self, vector: Tensor) -> None:
        """Set the parameters to a vector."""
        for p, part in zip(self._params, self.split(vector), strict=True):
            _real(p).copy_(part)

    def split(self, vector: Tensor) -> list[Tensor]:
        """Return a vector's parts, each a view in its parameter's shape.

        A complex parameter of shape (4,) has the shape (4, 2) here.
        """
        parts = vector.split(self._sizes)
        return [part.view(_real(p).shape) for p, part in zip(self._params, parts, strict=True)]

    def move(self, origin: Sequence[Tensor] | None, t: float, direction: Sequence[Tensor]) -> None:
        """Set the parameters to origin + t * direction, both as `split` gives them.

        Without an origin, add to the parameters.
        """
        # Rounded first: torch refuses a t that is too large for the dtype, and it should become
        # infinite.
        t = float(precision(self.dtype)(t))
        for i, (p, part) in enumerate(zip(self._params, direction, strict=True)):
            values = _real(p)
            begin = values if origin is None else origin[i]
            torch.add(begin, part, alpha=t, out=values)

    def adopt(self, value: Any, order: Sequence[Tensor] | None = None) -> Any:
        """Return a copy of a vector, or of a list of vectors, on the parameters' device.

        Its dtype is the wider one of both. With `order`, which lists the same parameters in another
        order, the vector's parts are put in that order.
        """
        if not isinstance(value, Tensor):
            return [self.adopt(vector, order) for vector in value]
        if order is not None:
            value = self._reordered(value, order)
        dtype = torch.promote_types(value.dtype, self.dtype)
        return value.detach().to(device=self.device, dtype=dtype, copy=True)

    def _reordered(self, vector: Tensor, order: Sequence[Tensor]) -> Tensor:
        if all(p is q for p, q in zip(order, self._params, strict=True)):
            return vector
        parts: dict[int, Tensor] = {}
        for p, part in zip(self._params, self.split(vector), strict=True):
            parts[id(p)] = part.reshape(-1)
        return torch.cat([parts[id(p)] for p in order])


def why_no_vector(entry: object, size: int) -> str:
    """Say why something is not a vector of `size` numbers that can be read and written.

    An empty string says that it is one.
    """
    if not isinstance(entry, Tensor):
        return f"has {brief(entry)}"
    if not entry.is_floating_point() or entry.shape != (size,) or entry.layout != torch.strided:
        return f"has {brief(entry)} of layout {entry.layout}"
    if kernel.is_plain(entry) and (entry.is_meta or not kernel.has_storage(entry)):
        return "has one without memory"
    if entry.is_inference() and not torch.is_inference_mode_enabled():
        return "has one made in inference mode, which cannot be written outside of it"
    if size > 1 and entry.stride(0) == 0:
        return "has one whose elements share memory"
    return ""


def _real_size(p: Tensor) -> int:
    return p.numel() * (2 if p.is_complex() else 1)


def _real(p: Tensor) -> Tensor:
    return torch.view_as_real(p) if p.is_complex() else p


def _flat_gradient(p: Tensor, size: int) -> Tensor:
    """Return a parameter's gradient as a vector; zeros, which take no memory, for a missing one."""
    g = p.grad
    if g is None:
        return p.new_zeros((), dtype=p.dtype.to_real()).expand(size)
    if g.layout != torch.strided:
        g = g.to_dense()
    if g.is_complex():
        g = _real(g.resolve_conj())
    return g.reshape(-1)
