"""How walks over tensors are cut into chunks, and chunks gathered into units of work that threads
take."""

from __future__ import annotations

import numpy as np

from ..graph.ir import Rank
from .walk import CHUNK

# A chunk of a large matrix has at least so many lines: each chunk keeps its own sums down the
# columns.
FEWEST_LINES = 32
# A tensor's fixed cost in a walk, in elements: keeps the threads' shares even among very small
# tensors.
OVERHEAD = 128


def address(array: np.ndarray) -> int:
    """Where an array's memory begins; `array.ctypes` says the same three times slower."""
    return array.__array_interface__["data"][0]


class Chunks:
    """The chunks of one walk: ranges of lines, of about CHUNK elements, and the units that they are
    gathered into.

    A walk over elements that have no matrices has lines of one element. Chunks begin at multiples
    of a number of lines that follows from the tensor's own sizes, so that what a chunk computes
    does not depend on the other tensors or on the number of threads. A chunk is a part of one
    matrix, or a number of whole ones.
    """

    def __init__(self, sizes: np.ndarray, domain: Rank, by_lines: bool) -> None:
        """`sizes` (tensors, 3) are each tensor's numbers of matrices, rows and columns."""
        groups, per, length = _lines(sizes, domain, by_lines)
        lines = np.where(sizes.prod(axis=1) > 0, groups * per, 0)
        area = np.maximum(per * length, 1)
        whole = area <= CHUNK
        block = np.where(
            whole, CHUNK // area * per, np.maximum(FEWEST_LINES, CHUNK // np.maximum(length, 1))
        )
        span = np.maximum(np.where(whole, lines, per), 1)
        parts = -(-span // np.maximum(block, 1))
        counts = lines // span * parts
        self.length, self.per = np.ascontiguousarray(length), np.ascontiguousarray(per)
        # Chunks of one matrix, each of which keeps its own sums down the columns.
        self.parts = np.where(whole, 1, parts)
        self.walked = np.flatnonzero(counts)
        self.first = (np.cumsum(counts) - counts)[self.walked]
        self.tensor = np.repeat(np.arange(len(sizes)), counts)
        own = np.arange(len(self.tensor)) - np.repeat(self.first, counts[self.walked])
        begin = own // parts[self.tensor] * span[self.tensor]
        part = own % parts[self.tensor]
        self.start = begin + part * block[self.tensor]
        self.stop = np.minimum(self.start + block[self.tensor], begin + span[self.tensor])
        self.offset = np.where(whole, 0, sizes[:, 0] * sizes[:, 2])[self.tensor] * part
        cost = np.cumsum((self.stop - self.start) * length[self.tensor] + OVERHEAD)
        unit = cost // (CHUNK + OVERHEAD)
        starts = np.flatnonzero(np.diff(unit, prepend=-1))
        self.unit_begin = np.append(starts, len(self.tensor)).astype(np.int64)
        self.units = len(starts)
        self.addresses = {
            "unit_begin": address(self.unit_begin),
            "chunk_tensor": address(self.tensor),
            "chunk_start": address(self.start),
            "chunk_stop": address(self.stop),
            "chunk_offset": address(self.offset),
            "per": address(self.per),
            "length": address(self.length),
        }

    def combine(self, op: str, partials: np.ndarray, count: int) -> np.ndarray:
        """One value for each of `count` tensors from one a chunk: chunk after chunk, from 0; 0
        without elements."""
        result = np.zeros(count)
        if op == "sum":
            result += np.bincount(self.tensor, partials, count)
        elif len(self.walked):
            result[self.walked] = np.maximum.reduceat(partials, self.first)
        return result


def _lines(
    sizes: np.ndarray, domain: Rank, by_lines: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each tensor the number of groups of lines, the lines of a group, and the length of a
    line."""
    matrices, rows, columns = sizes.T
    one = np.ones_like(rows)
    if not by_lines:
        return one, sizes.prod(axis=1), one
    return {
        Rank.ELEMENT: (matrices, rows, columns),
        Rank.ROW: (matrices, one, rows),
        Rank.COLUMN: (matrices, one, columns),
        Rank.MATRIX: (one, one, matrices),
    }[domain]


class Work:
    """A launch's tensors by their sizes, and the chunks of each kind of walk over them."""

    def __init__(self, sizes: np.ndarray, domains: set[Rank], by_lines: bool) -> None:
        """`sizes` (tensors, 3), or (tensors,) where only the numbers of elements matter; 0 leaves a
        tensor as it is."""
        sizes = np.asarray(sizes, np.int64)
        if sizes.ndim == 1:
            sizes = np.stack([np.ones_like(sizes), np.ones_like(sizes), sizes], axis=1)
        self.sizes = sizes
        self.numel = sizes.prod(axis=1)
        self.chunks = {domain: Chunks(sizes, domain, by_lines) for domain in domains}
