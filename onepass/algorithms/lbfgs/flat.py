"""Parameters and their gradients as one real vector, for algorithms that see the whole problem at
once."""

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
    """The NumPy scalar that rounds as a dtype does; float32 for bfloat16, which NumPy lacks."""
    return _SCALARS.get(dtype, np.float32)


def scalar(x: Tensor) -> np.floating:
    """A tensor of one element as a NumPy scalar of its precision."""
    return precision(x.dtype)(x.item())


def largest(vector: Tensor) -> np.floating:
    """The largest absolute value; NaN where there is one, 0 of no elements."""
    if not vector.numel():
        return np.float32(0.0)
    low, high = torch.aminmax(vector)
    return max(-scalar(low), scalar(high))


class Flat:
    """Parameters, one after the other, as one vector of `size` real numbers: complex ones count
    twice.

    Its dtype is the one that all of them promote to. Raises `StepError` where they lie on different
    devices.
    """

    def __init__(self, owner: str, params: Sequence[Tensor], names: Sequence[str] = ()) -> None:
        self._owner = owner
        self._params = params
        self._labels = [repr(name) for name in names] or [str(i) for i in range(len(params))]
        self._sizes = [p.numel() * (2 if p.is_complex() else 1) for p in params]
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
                check_member(self._owner, Member(i, 0, 0, label), p, p.grad, {}, (), ())

    def new(self) -> Tensor:
        """A vector of this size, with any content."""
        return torch.empty(self.size, dtype=self.dtype, device=self.device)

    def read(self, out: Tensor) -> None:
        """Copy the parameters into a vector."""
        torch.cat([_real(p).reshape(-1) for p in self._params], out=out)

    def read_gradient(self, out: Tensor) -> None:
        """Copy the gradients into a vector: zeros where there is none, sparse ones filled up."""
        torch.cat(
            [_flat_gradient(p, n) for p, n in zip(self._params, self._sizes, strict=True)], out=out
        )

    def write(self, vector: Tensor) -> None:
        """Set the parameters to a vector."""
        for p, values in zip(self._params, self.split(vector), strict=True):
            _real(p).copy_(values)

    def split(self, vector: Tensor) -> list[Tensor]:
        """A vector's parts, each a view in its parameter's shape."""
        parts = vector.split(self._sizes)
        return [part.view(_real(p).shape) for p, part in zip(self._params, parts, strict=True)]

    def move(self, origin: Sequence[Tensor] | None, t: float, direction: Sequence[Tensor]) -> None:
        """Set the parameters to origin + t * direction, both as `split` gives them; without an
        origin, add to them."""
        # Rounded first: torch refuses a t that is too large for the dtype, where it should be
        # infinite.
        t = float(precision(self.dtype)(t))
        for i, (p, part) in enumerate(zip(self._params, direction, strict=True)):
            p = _real(p)
            torch.add(p if origin is None else origin[i], part, alpha=t, out=p)

    def place(self, value: Any, params: Sequence[Tensor] | None = None) -> Any:
        """A copy of a vector, or of each of a list, on the parameters' device, in the wider of both
        dtypes.

        Its parts are put in the order of `params`, where given: the same parameters.
        """
        if not isinstance(value, Tensor):
            return [self.place(vector, params) for vector in value]
        if params is not None and any(
            p is not q for p, q in zip(params, self._params, strict=True)
        ):
            parts = {
                id(p): part.reshape(-1)
                for p, part in zip(self._params, self.split(value), strict=True)
            }
            value = torch.cat([parts[id(p)] for p in params])
        dtype = torch.promote_types(value.dtype, self.dtype)
        return value.detach().to(device=self.device, dtype=dtype, copy=True)


def why_no_vector(entry: object, size: int) -> str:
    """Why something is not a vector of `size` numbers that can be read and written; an empty string
    where it is."""
    if not isinstance(entry, Tensor):
        return f"has {brief(entry)}"
    if not entry.is_floating_point() or entry.shape != (size,) or entry.layout != torch.strided:
        return f"has {brief(entry)} of layout {entry.layout}"
    if kernel.is_plain(entry) and (entry.is_meta or not kernel.has_storage(entry)):
        return "has one without memory"
    if entry.is_inference() and not torch.is_inference_mode_enabled():
        return "has one made in inference mode, which cannot be written outside of it"
    return "has one whose elements share memory" if size > 1 and entry.stride(0) == 0 else ""


def _real(p: Tensor) -> Tensor:
    return torch.view_as_real(p) if p.is_complex() else p


def _flat_gradient(p: Tensor, size: int) -> Tensor:
    g = p.grad
    if g is None:
        return p.new_zeros((), dtype=p.dtype.to_real()).expand(size)
    if g.layout != torch.strided:
        g = g.to_dense()
    return (_real(g.resolve_conj()) if g.is_complex() else g).reshape(-1)
