"""How walks over tensors are cut into chunks, and chunks gathered into units of work for threads.

Three tensors of 70,000, 10 and 5 elements make five chunks and two units:

    chunk  tensor  start   stop   cost so far   in full chunks   unit
        0       0      0  32768         32896                1      0
        1       0  32768  65536         65792                2      1
        2       0  65536  70000         70384                2      1
        3       1      0     10         70522                2      1
        4       2      0      5         70655                2      1

A chunk costs its elements and OVERHEAD; a full one 32,896. A new unit begins where the cost so far
passes the cost of another full chunk. `unit_begin` is [0, 1, 5]: a thread takes chunk 0, another
one the chunks 1 to 4, see `walk`.
"""

from __future__ import annotations

import numpy as np

from ..graph.ir import Rank
from ..graph.passes import lines_of
from ..tensors.launching import Work
from .walk import CHUNK

# A chunk of a large matrix has at least this many lines, as each chunk keeps its own sums down the
# columns.
FEWEST_LINES = 32
# A tensor's fixed cost in a walk, in elements: it keeps the threads' shares even among very small
# tensors.
OVERHEAD = 128


def address(array: np.ndarray) -> int:
    """Return where an array's memory begins; `array.ctypes` says the same three times slower."""
    return array.__array_interface__["data"][0]


class Chunks:
    """The chunks of one walk: ranges of lines, of about CHUNK elements, and units of these.

    A walk over elements that have no matrices has lines of one element. Chunks begin at multiples
    of a number of lines that follows from the tensor's own sizes. So what a chunk computes depends
    neither on the other tensors nor on the number of threads. A chunk is a part of one matrix, or a
    number of whole ones:

        matrices  rows  columns   chunks of a walk by lines
               1  1000      100   4: a matrix in parts of 327 lines (CHUNK // 100), the last of 19
             500    10       10   2: 327 whole matrices (CHUNK // 100), and the other 173

    For each chunk there are `tensor`, `start` and `stop` (lines), and `offset`: where its own sums
    down the columns begin, in values. For each tensor there are `group_lines` and `length` (lines
    of a matrix, elements of a line) and `parts`: the chunks of one matrix, each of which keeps its
    own sums. `walked` are the tensors that have chunks, and `first` is the first chunk of each of
    these. Unit u is the chunks from `unit_begin[u]` to `unit_begin[u + 1]`.
    """

    def __init__(self, sizes: np.ndarray, domain: Rank, by_lines: bool) -> None:
        """`sizes` (tensors, 3) holds each tensor's numbers of matrices, rows and columns."""
        matrices, rows, columns = sizes.T
        ones = np.ones_like(rows)
        groups, group_lines, length = ones, sizes.prod(axis=1), ones
        if by_lines:
            groups, group_lines, length = lines_of(domain, matrices, rows, columns, ones)
        self.group_lines = np.ascontiguousarray(group_lines)
        self.length = np.ascontiguousarray(length)
        has_elements = sizes.prod(axis=1) > 0
        lines = np.where(has_elements, groups * group_lines, 0)
        self._cut(sizes, lines)
        self._gather()
        self.addresses = {
            "unit_begin": address(self.unit_begin),
            "chunk_tensor": address(self.tensor),
            "chunk_start": address(self.start),
            "chunk_stop": address(self.stop),
            "chunk_offset": address(self.offset),
            "group_lines": address(self.group_lines),
            "length": address(self.length),
        }

    def _cut(self, sizes: np.ndarray, lines: np.ndarray) -> None:
        """Cut each tensor, which has this many `lines`, into chunks."""
        area = np.maximum(self.group_lines * self.length, 1)
        is_whole = area <= CHUNK
        # The lines of a full chunk: of whole matrices, or of a part of one.
        whole_matrices = CHUNK // area * self.group_lines
        length = np.maximum(self.length, 1)
        part_of_matrix = np.maximum(FEWEST_LINES, CHUNK // length)
        block = np.where(is_whole, whole_matrices, part_of_matrix)
        block = np.maximum(block, 1)
        # The lines of what is cut by itself: a tensor, or a matrix.
        span = np.where(is_whole, lines, self.group_lines)
        span = np.maximum(span, 1)
        parts = -(-span // block)
        counts = lines // span * parts
        first = np.cumsum(counts) - counts
        self.parts = np.where(is_whole, 1, parts)
        self.walked = np.flatnonzero(counts)
        self.first = first[self.walked]
        self.tensor = np.repeat(np.arange(len(sizes)), counts)

        # From here on, a value for each chunk. Its number within the tensor says the rest.
        number = np.arange(len(self.tensor)) - first[self.tensor]
        part = number % parts[self.tensor]
        begin = number // parts[self.tensor] * span[self.tensor]
        end = begin + span[self.tensor]
        size = block[self.tensor]
        self.start = begin + part * size
        self.stop = np.minimum(self.start + size, end)
        matrices, _, columns = sizes.T
        column_values = np.where(is_whole, 0, matrices * columns)
        self.offset = column_values[self.tensor] * part

    def _gather(self) -> None:
        """Gather chunks that follow one another into units of about one full chunk's cost."""
        lines = self.stop - self.start
        cost = lines * self.length[self.tensor] + OVERHEAD
        unit = np.cumsum(cost) // (CHUNK + OVERHEAD)
        begins = np.diff(unit, prepend=-1)
        starts = np.flatnonzero(begins)
        unit_begin = np.append(starts, len(self.tensor))
        self.unit_begin = unit_begin.astype(np.int64)
        self.units = len(starts)

    def combine(self, op: str, partials: np.ndarray, count: int) -> np.ndarray:
        """Return one value for each of `count` tensors, from `partials` with one for each chunk.

        The chunks follow one another, from 0 on; a tensor without elements has 0.
        """
        result = np.zeros(count)
        if op == "sum":
            result += np.bincount(self.tensor, partials, count)
        elif len(self.walked):
            result[self.walked] = np.maximum.reduceat(partials, self.first)
        return result


class WorkInChunks(Work):
    """A launch's tensors by their sizes, and the chunks of each kind of walk over them.

    It adds `chunks`: a walk over elements and one over row values are cut differently, and passes
    of one domain are cut alike.
    """

    def __init__(self, sizes: np.ndarray, domains: set[Rank], by_lines: bool) -> None:
        """`domains` are those of the program's passes; `by_lines` if it walks line by line."""
        super().__init__(sizes)
        self.chunks = {domain: Chunks(self.sizes, domain, by_lines) for domain in domains}
