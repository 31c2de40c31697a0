"""Lists of tensors that one launch of a kernel walks, whoever owns them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from .. import kernel


def compile_for(
    graph: kernel.Graph,
    names: Sequence[str],
    columns: Sequence[Sequence[Tensor]],
    resident: tuple[str, ...] | None = None,
    number: Tensor | None = None,
) -> kernel.Kernel:
    """Return the kernel of a graph for columns that are stored like these.

    This compiles, unless the graph has been compiled for such columns before: about 50 ms on a CPU.
    `resident` are the names of the numbers that lie on the device, and `number` is one of them.
    """
    formats = []
    for name, column in zip(names, columns, strict=True):
        formats.append((name, format_name(column[0].dtype)))
    number_format = "float32" if number is None else format_name(number.dtype)
    device = columns[0][0].device
    return kernel.compile(graph, tuple(formats), device, resident, number_format)


class Columns:
    """Dense tensors of one device that one launch walks: a list for each column of a graph.

    All tensors of a column have one dtype. What is kept is only what tensors are compared with when
    `expected` reads them before a launch: neither a tensor nor an address. The launch follows with
    the tensors in hand.

    Example: SGD with momentum on two parameters of shapes (3, 2) and (4,). `columns` are
    [[g0, g1], [p0, p1], [b0, b1]]; `count` is 2; `sizes` are [[1, 1, 6], [1, 1, 4]], in matrices,
    rows and elements; `pointers` are the 3 x 2 addresses that the last comparison has read.
    """

    def __init__(
        self,
        compiled: kernel.Kernel,
        graph: kernel.Graph,
        names: Sequence[str],
        columns: Sequence[Sequence[Tensor]],
        numbers: Sequence[Tensor] = (),
        resident: tuple[str, ...] | None = None,
    ) -> None:
        """Lay out a walk of a kernel over `columns`, lists of equal length, one for each name.

        `numbers` are further tensors whose facts are compared: of one number each, by name and then
        by parameter. `resident` are their names if they lie on the device, and kernels use them.
        """
        params = columns[names.index("p")]
        self.count = len(params)
        self.expected = kernel.expect([*chain.from_iterable(columns), *numbers])
        self.sizes = np.array(_sizes_of(params, graph.has_matrices), dtype=np.int64)
        walked = self.count * len(names)
        addressed = walked + self.count * len(resident or ())
        pointers = self.expected.pointers
        self.pointers = pointers[:walked].reshape(len(names), self.count)
        # Those that a launch needs: of columns, and of numbers on the device.
        self.addressed = pointers[:addressed].reshape(-1, self.count)
        # The addresses of all numbers, by name and parameter.
        self.number_pointers = pointers[walked:].reshape(-1, self.count)
        self.bytes = self.expected.bytes[:walked].reshape(len(names), self.count)
        self.kernel = compiled
        self.work = self.kernel.split(self.sizes)
        self._compared_pointers = b""
        self._overlapping = False

    def overlap(self) -> bool:
        """Whether tensors that were read share memory with one another."""
        pointers = self.pointers
        if pointers.tobytes() != self._compared_pointers:
            owners = np.arange(pointers.size)
            self._overlapping = len(find_clusters(pointers, self.bytes, owners)) > 0
            self._compared_pointers = pointers.tobytes()
        return self._overlapping


def _sizes_of(params: Sequence[Tensor], has_matrices: bool) -> list[tuple[int, int, int]]:
    """Each parameter as matrices, rows and columns; one row if its shape does not matter."""
    if has_matrices:
        return [kernel.sizes(p.shape) for p in params]
    # A complex number is two real ones.
    reals = 2 if params[0].is_complex() else 1
    return [(1, 1, reals * p.numel()) for p in params]


# Owners of memory that overlaps, those of each overlap together.
Clusters = tuple[tuple[int, ...], ...]


def find_clusters(starts: np.ndarray, sizes: np.ndarray, owners: np.ndarray) -> Clusters:
    """Return the owners of stretches of memory that share bytes, those of each overlap together.

    Example: of the stretches (start 0, 8 bytes, owner 0), (4, 8, 1), (10, 8, 2) and (20, 8, 3) it
    is ((0, 1, 2),): each of the first three overlaps with the next.
    """
    starts = starts.reshape(-1)
    sizes = sizes.reshape(-1).astype(np.uint64)
    owners = owners.reshape(-1)
    order = np.argsort(starts, kind="stable")
    order = order[sizes[order] > 0]
    ends = np.maximum.accumulate((starts + sizes)[order])
    apart = ends[:-1] <= starts[order][1:]
    if apart.all():
        return ()
    parts = np.split(owners[order], np.flatnonzero(apart) + 1)
    clusters = (tuple(sorted(set(part.tolist()))) for part in parts if len(part) > 1)
    return tuple(sorted(cluster for cluster in clusters if len(cluster) > 1))


def lies_in_memory(t: object) -> TypeGuard[Tensor]:
    """Whether this is a plain tensor whose elements lie in memory, where its strides say."""
    if not isinstance(t, Tensor) or not kernel.is_plain(t):
        return False
    return t.layout == torch.strided and not t.is_meta


def picker(places: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """Return a function that takes the entries at these places of a list, as fast as possible.

    `picker([2, 0])(["a", "b", "c"])` is `("c", "a")`.
    """
    if len(places) == 1:
        return lambda values: [values[places[0]]]
    return itemgetter(*places) if places else lambda values: []


def format_name(dtype: torch.dtype) -> str:
    """Return the storage format of a dtype; complex numbers are pairs of real ones."""
    real = dtype.to_real() if dtype.is_complex else dtype
    return str(real).removeprefix("torch.")
