"""Lists of tensors that one launch of a kernel walks, whoever owns them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import kernel


class Columns:
    """Dense tensors of one device, a list for each column of a graph, each list of one dtype: what
    one launch walks.

    What is kept is only what tensors are compared with when `expected` reads them before a launch:
    neither a tensor nor an address. The launch follows with the tensors in hand.
    """

    def __init__(
        self,
        graph: kernel.Graph,
        names: Sequence[str],
        columns: Sequence[Sequence[Tensor]],
        numbers: Sequence[Tensor] = (),
        resident: tuple[str, ...] | None = None,
    ) -> None:
        """`names` are the graph's columns, each with one of `columns`, lists of equal length.
        `numbers` are further tensors whose facts are compared: of one number each, by name and then
        by parameter; `resident` are their names where they lie on the device, and kernels use them.
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
        self.addressed = self.expected.pointers[
            : walked + self.count * len(resident or ())
        ].reshape(-1, self.count)
        self.bytes = self.expected.bytes[:walked].reshape(len(names), self.count)
        # The addresses of the numbers, a row for each name.
        self.number_pointers = self.expected.pointers[walked:].reshape(-1, self.count)
        formats = tuple(
            (name, format_name(column[0].dtype))
            for name, column in zip(names, columns, strict=True)
        )
        number_format = format_name(numbers[0].dtype) if resident else "float32"
        self.kernel = kernel.compile(graph, formats, like[0].device, resident, number_format)
        self.work = self.kernel.split(self.sizes)
        self._placed = b""
        self._overlapping = False

    def overlap(self) -> bool:
        """Whether tensors that were read share memory with one another."""
        placed = self.pointers
        if placed.tobytes() != self._placed:
            self._overlapping = len(find_clusters(placed, self.bytes, np.arange(placed.size))) > 0
            self._placed = placed.tobytes()
        return self._overlapping


Clusters = tuple[tuple[int, ...], ...]


def find_clusters(starts: np.ndarray, sizes: np.ndarray, owners: np.ndarray) -> Clusters:
    """The owners of stretches of memory that share bytes with those of others, together and in
    order.

    Of (0, 8 bytes, owner 0), (4, 8, 1), (10, 8, 2), (20, 8, 3) it is ((0, 1, 2),): each overlaps
    with the next.
    """
    starts, sizes, owners = (
        starts.reshape(-1),
        sizes.reshape(-1).astype(np.uint64),
        owners.reshape(-1),
    )
    order = np.argsort(starts, kind="stable")
    order = order[sizes[order] > 0]
    ends = np.maximum.accumulate((starts + sizes)[order])
    apart = ends[:-1] <= starts[order][1:]
    if apart.all():
        return ()
    parts = np.split(owners[order], np.flatnonzero(apart) + 1)
    clusters = (tuple(sorted(set(part.tolist()))) for part in parts if len(part) > 1)
    return tuple(sorted(cluster for cluster in clusters if len(cluster) > 1))


def lies_in_memory(t: object) -> bool:
    """Whether this is a plain tensor whose elements lie in memory, where its strides say."""
    if not isinstance(t, Tensor) or not kernel.is_plain(t):
        return False
    return t.layout == torch.strided and not t.is_meta


def picker(places: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """A function that takes these places of a list; as fast as Python can."""
    if len(places) == 1:
        return lambda values: [values[places[0]]]
    return itemgetter(*places) if places else lambda values: []


def format_name(dtype: torch.dtype) -> str:
    """The storage format of a dtype; complex numbers are pairs of real ones."""
    real = dtype.to_real() if dtype.is_complex else dtype
    return str(real).removeprefix("torch.")
