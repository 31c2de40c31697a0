"""Lists of tensors that one launch of a kernel walks, whoever owns them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import kernel


class Columns:
    """Dense tensors of one device, a list for each column of a graph, each list of one dtype: what one launch walks.

    What is kept is only what tensors are compared with when `expected` reads them before a launch: neither a tensor nor
    an address. The launch follows with the tensors in hand.
    """

    def __init__(
        self,
        graph: kernel.Graph,
        names: Sequence[str],
        columns: Sequence[Sequence[Tensor]],
        numbers: Sequence[Tensor] = (),
        resident: tuple[str, ...] | None = None,
    ) -> None:
        """`names` are the graph's columns, each with one of `columns`, lists of equal length. `numbers` are further
        tensors whose facts are compared: of one number each, by name and then by parameter; `resident` are their
        names where they lie on the device, and kernels use them.
        """
        like = columns[names.index("p")]
        self.count = len(like)
        self.expected = kernel.expect([*chain.from_iterable(columns), *numbers])
        if graph.has_matrices:
            self.sizes = np.array([kernel.sizes(p.shape) for p in like], dtype=np.int64)
        else:
            scale = 2 if like[0].is_complex() else 1
            self.sizes = np.array([(1, 1, scale * p.numel()) for p in like], dtype=np.int64)
        walked = self.count * len(names)
        self.pointers = self.expected.pointers[:walked].reshape(len(names), self.count)
        self.addressed = self.expected.pointers[: walked + self.count * len(resident or ())].reshape(-1, self.count)
        self._bytes = self.expected.bytes[:walked].reshape(len(names), self.count)
        formats = tuple((name, format_name(column[0].dtype)) for name, column in zip(names, columns, strict=True))
        number_format = format_name(numbers[0].dtype) if resident else "float32"
        self.kernel = kernel.compile(graph, formats, like[0].device, resident, number_format)
        self.work = self.kernel.split(self.sizes)
        self._placed = b""
        self._overlapping = False

    def overlap(self, first: int = 0) -> bool:
        """Whether tensors that were read, in the columns from `first` on, share memory with one another."""
        placed = self.pointers[first:]
        if placed.tobytes() != self._placed:
            self._overlapping = _overlap(placed.reshape(-1), self._bytes[first:].reshape(-1))
            self._placed = placed.tobytes()
        return self._overlapping


def _overlap(placed: np.ndarray, size: np.ndarray) -> bool:
    """Whether two stretches of memory share a byte."""
    order = np.argsort(placed, kind="stable")
    order = order[size[order] > 0]
    ends = (placed + size.astype(np.uint64))[order]
    return bool((ends[:-1] > placed[order][1:]).any())


def picker(places: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """A function that takes these places of a list; as fast as Python can."""
    if len(places) == 1:
        return lambda values: [values[places[0]]]
    return itemgetter(*places) if places else lambda values: []


def format_name(dtype: torch.dtype) -> str:
    """The storage format of a dtype; complex numbers are pairs of real ones."""
    real = dtype.to_real() if dtype.is_complex else dtype
    return str(real).removeprefix("torch.")


def find_lazy(tensors: Sequence[Tensor]) -> list[int]:
    """Which tensors may become lazy conjugates or negations with the same strides: complex ones, and single elements.

    torch's public functions make no other ones.
    """
    return [i for i, t in enumerate(tensors) if t.numel() == 1 or t.is_complex()]
