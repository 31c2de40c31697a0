"""Copies of memory that parameters share.

They step there, one after the other, before anything is stored.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .. import kernel
from .columns import lies_in_memory

# The alignment of a copy, in bytes: at least that of every dtype.
ALIGNMENT = 16


class Scratch:
    """The memory that some tensors lie in, copied; `view` gives each tensor's place in the copy.

    Two parameters at bytes 0 to 8 and 4 to 12 get one copy of bytes 0 to 12. What the first writes,
    the second reads.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        """`tensors` are plain and strided, in any order."""
        self._copies: list[tuple[torch.device, int, int, Tensor]] = []
        stretches = sorted(
            ((t.data_ptr(), t.data_ptr() + kernel.extent(t), t) for t in tensors if t.numel()),
            key=lambda s: s[:2],
        )
        together: list[tuple[int, int, Tensor]] = []
        for stretch in stretches:
            if together and stretch[0] >= max(end for _, end, _ in together):
                self._copy(together)
                together = []
            together.append(stretch)
        if together:
            self._copy(together)

    def _copy(self, stretches: list[tuple[int, int, Tensor]]) -> None:
        """Copy stretches of memory that overlap: (first byte, end, tensor), sorted."""
        start = stretches[0][0] // ALIGNMENT * ALIGNMENT
        end = max(end for _, end, _ in stretches)
        device = stretches[0][2].device
        copy = torch.empty(end - start, dtype=torch.uint8, device=device)
        for first, last, t in stretches:
            copy[first - start : last - start] = _as_bytes(t, last - first)
        self._copies.append((device, start, end, copy))

    def holds(self, t: Tensor) -> bool:
        """Whether a tensor's memory has been copied."""
        return self._find(t) is not None

    def view(self, t: Tensor) -> Tensor:
        """Return a tensor's place in the copy, or the tensor itself if it was not copied."""
        found = self._find(t)
        if found is None:
            return t
        _, start, _, copy = found
        offset = (t.data_ptr() - start) // t.itemsize
        view = torch.empty(0, dtype=t.dtype, device=t.device)
        view = view.set_(copy.untyped_storage(), offset, t.shape, t.stride())
        view = view.conj() if t.is_conj() else view
        return torch._neg_view(view) if t.is_neg() else view

    def _find(self, t: Tensor) -> tuple[torch.device, int, int, Tensor] | None:
        """Return the device, start, end and copy of the memory that a tensor lies in, or None."""
        if not self._copies or not lies_in_memory(t) or not t.numel():
            return None
        start, end = t.data_ptr(), t.data_ptr() + kernel.extent(t)
        return next(
            (c for c in self._copies if c[0] == t.device and c[1] <= start and end <= c[2]), None
        )


def _as_bytes(t: Tensor, count: int) -> Tensor:
    """Return a tensor's memory from its first element to its last, as this many bytes."""
    memory = torch.empty(0, dtype=torch.uint8, device=t.device)
    return memory.set_(t.untyped_storage(), t.storage_offset() * t.itemsize, (count,), (1,))
