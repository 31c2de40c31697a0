"""How a launch on a GPU is cut into programs: blocks of elements, or tiles of matrices, tensor
after tensor.

How a tensor is cut follows from its own sizes alone, so that what is summed up in which order does
not depend on the other tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..graph.ir import Rank
from ..graph.passes import Pass, Program
from .tiles import BAND, BLOCK, SPAN, TILES, WIDTHS


class Units:
    """The programs of one pass: a row of `table` for each, tensor after tensor; `first[t]` is
    tensor t's first.

    `launches` are ranges of units with the constants of their kernel: one, or one for each width of
    tiles. `parts` are, for sums that end in temporaries, how many programs have a share of each
    value: of those along the lines, and down.
    """

    table: np.ndarray
    first: np.ndarray
    count: np.ndarray
    launches: list[tuple[int, int, dict[str, int]]]
    along: np.ndarray
    down: np.ndarray

    def of_tensor(self, t: int) -> list[tuple[int, int, dict[str, int]]]:
        """The launches that walk one tensor."""
        begin, end = int(self.first[t]), int(self.first[t] + self.count[t])
        return [
            (max(a, begin), min(b, end), shape)
            for a, b, shape in self.launches
            if a < end and begin < b
        ]


class Blocks(Units):
    """The programs of a walk over elements."""

    def __init__(self, numel: np.ndarray, one: Pass) -> None:
        size = BLOCK * SPAN if one.reductions else BLOCK
        self.count = -(-numel // size)
        self.first = np.cumsum(self.count) - self.count
        tensor = np.repeat(np.arange(len(numel), dtype=np.int32), self.count)
        block = np.arange(len(tensor)) - np.repeat(self.first, self.count)
        self.table = np.stack([tensor, block.astype(np.int32)], axis=1)
        self.launches = [(0, len(tensor), {})]
        self.along = self.down = np.ones_like(numel)


class Tiles(Units):
    """The programs of a walk over matrices, see `tiles`.

    Where columns are summed up, a program has lines of one matrix; else lines of several may share
    a tile.
    """

    def __init__(self, sizes: np.ndarray, one: Pass) -> None:
        matrices, rows, columns = sizes.T
        ones = np.ones_like(rows)
        groups, per, length = {
            Rank.ELEMENT: (matrices, rows, columns),
            Rank.ROW: (matrices, ones, rows),
            Rank.COLUMN: (matrices, ones, columns),
            Rank.MATRIX: (ones, ones, matrices),
        }[one.domain]
        down = one.domain == Rank.ELEMENT and any(s.node.rank == Rank.COLUMN for s in one.sums)
        width = np.array(WIDTHS)[np.searchsorted(WIDTHS[:-1], length)]
        spans = groups if down else ones
        lines = per if down else groups * per
        band = np.full_like(lines, BAND) if one.sums or one.reductions else TILES * (BLOCK // width)
        parts, across = -(-lines // band), -(-length // width)
        self.count = np.where(sizes.prod(axis=1) > 0, spans * parts * across, 0)
        order = np.argsort(width, kind="stable")
        self.first = np.empty_like(self.count)
        self.first[order] = np.cumsum(self.count[order]) - self.count[order]
        tensor = np.repeat(order, self.count[order])
        own = np.arange(len(tensor)) - self.first[tensor]
        column, own = own % across[tensor], own // across[tensor]
        part, span = own % parts[tensor], own // parts[tensor]
        begin = span * lines[tensor] + part * band[tensor]
        end = np.minimum(begin + band[tensor], (span + 1) * lines[tensor])
        self.table = np.stack([tensor, begin, end, column, part], axis=1).astype(np.int64)
        self.launches = []
        for w in WIDTHS:
            units = np.flatnonzero(width[tensor] == w)
            if len(units):
                self.launches.append(
                    (int(units[0]), int(units[-1]) + 1, {"LINES": BLOCK // w, "COLUMNS": w})
                )
        self.along, self.down = across, parts if down else ones


class Work:
    """A launch's tensors by their sizes, and the programs of each pass over them."""

    def __init__(self, sizes: np.ndarray, program: Program) -> None:
        """`sizes` (tensors, 3), or (tensors,) where only the numbers of elements matter; 0 leaves a
        tensor as it is."""
        sizes = np.asarray(sizes, np.int64)
        if sizes.ndim == 1:
            sizes = np.stack([np.ones_like(sizes), np.ones_like(sizes), sizes], axis=1)
        self.sizes = sizes
        self.numel = sizes.prod(axis=1)
        self.units = [
            Tiles(sizes, one) if program.by_lines else Blocks(self.numel, one)
            for one in program.passes
        ]
        # Of each temporary that a sum ends in, for each tensor: how many programs leave a share of
        # each of its values.
        self.parts: Mapping[str, np.ndarray] = {
            s.into: units.down
            if one.domain == Rank.ELEMENT and s.node.rank == Rank.COLUMN
            else units.along
            for one, units in zip(program.passes, self.units, strict=True)
            for s in one.sums
        }
