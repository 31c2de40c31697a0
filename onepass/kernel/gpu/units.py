"""How a launch on a GPU is cut into programs: blocks of elements, or tiles of matrices.

The work of one program of a launch is a unit. How a tensor is cut depends only on its own sizes, so
that what is summed up in which order does not depend on the other tensors.

Three tensors of 70,000, 10 and 5 elements, in a walk over elements whose programs take 1,024:

    unit  tensor  block
       0       0      0    elements 0 to 1,024
     ...     ...    ...
      68       0     68    elements 69,632 to 70,000
      69       1      0    elements 0 to 10
      70       2      0    elements 0 to 5

so `count` is [69, 1, 1] and `first` is [0, 69, 70].

Two matrices of 300 x 40 and of 2 x 3, in a walk by lines whose pass sums up columns: lines of 40
elements need tiles of width 256, those of 3 elements tiles of width 32, and a program takes up to
128 lines, a band. Tensors of narrow tiles come first:

    unit  tensor  begin  end  column  part
       0       1      0    2       0     0    a launch of tiles of 32 x 32
       1       0      0  128       0     0    a launch of tiles of 4 x 256
       2       0    128  256       0     1
       3       0    256  300       0     2

so `count` is [3, 1] and `first` is [1, 0].
"""

from __future__ import annotations

import numpy as np

from ..graph.passes import Pass, Program, lines_of
from ..tensors.launching import Work
from .blocks import SPAN
from .tiles import BAND, TILES, WIDTHS
from .walk import BLOCK

# Units [begin, end) that one launch takes, with its kernel's constants.
UnitRange = tuple[int, int, dict[str, int]]


class Units:
    """The units of one pass, tensor after tensor.

    `table` (units, fields) has a line for each unit: `blocks.BLOCK_FIELDS`, or `tiles.TILE_FIELDS`.
    Tensor t has `count[t]` units, from `first[t]` on. `launches` are ranges of units with the
    constants of their kernel: one range, or one for each width of tiles. `along` and `down`
    (tensors) say how many units leave a share of each sum that ends in a temporary: of sums along
    the lines, and of sums down the columns.
    """

    table: np.ndarray
    first: np.ndarray
    count: np.ndarray
    launches: list[UnitRange]
    along: np.ndarray
    down: np.ndarray

    def of_tensor(self, tensor_index: int) -> list[UnitRange]:
        """Return the launches that walk one tensor."""
        first = int(self.first[tensor_index])
        last = first + int(self.count[tensor_index])
        return [
            (max(begin, first), min(end, last), constants)
            for begin, end, constants in self.launches
            if begin < last and first < end
        ]


class BlockUnits(Units):
    """The units of a walk over elements: blocks; of a reduction, SPAN blocks at a time."""

    def __init__(self, numel: np.ndarray, pass_: Pass) -> None:
        """`numel` (tensors) is how many elements each has."""
        size = BLOCK * SPAN if pass_.reductions else BLOCK
        self.count = -(-numel // size)
        self.first = np.cumsum(self.count) - self.count
        tensors = np.arange(len(numel), dtype=np.int32)
        # Arrays (units).
        tensor = np.repeat(tensors, self.count)
        block = np.arange(len(tensor)) - self.first[tensor]
        block = block.astype(np.int32)
        self.table = np.stack([tensor, block], axis=1)
        self.launches = [(0, len(tensor), {})]
        self.along = np.ones_like(numel)
        self.down = np.ones_like(numel)


class TileUnits(Units):
    """The units of a walk over matrices, see `tiles`.

    If columns are summed up, a unit has lines of one matrix; else lines of several may share a
    tile.
    """

    def __init__(self, sizes: np.ndarray, pass_: Pass) -> None:
        """`sizes` (tensors, 3) holds each tensor's numbers of matrices, rows and columns."""
        self._cut(sizes, pass_)
        tensor = self._order()
        self._fill_table(tensor)
        self._find_launches(tensor)

    def _cut(self, sizes: np.ndarray, pass_: Pass) -> None:
        """Cut each tensor by itself; these are arrays (tensors), here of 300 x 40 and 2 x 3.

        _width   how wide its tiles are                               [256, 32]
        _lines   lines of a span: of a matrix if columns are summed
                 up, else of the whole tensor                         [300, 2]
        _band    lines that a unit takes                              [128, 128]
        _bands   units of a span, one below the other                 [3, 1]
        along    units of a span, side by side                        [1, 1]
        down     units that have a share of a sum down a column       [3, 1]
        count    all units: spans, times bands, times units along     [3, 1]
        """
        matrices, rows, columns = sizes.T
        ones = np.ones_like(rows)
        groups, group_lines, length = lines_of(pass_.domain, matrices, rows, columns, ones)
        spans = groups if pass_.down else ones
        self._lines = group_lines if pass_.down else groups * group_lines
        narrowest = np.searchsorted(WIDTHS[:-1], length)
        self._width = np.array(WIDTHS)[narrowest]
        if pass_.sums or pass_.reductions:
            self._band = np.full_like(self._lines, BAND)
        else:
            self._band = TILES * (BLOCK // self._width)
        self._bands = -(-self._lines // self._band)
        self.along = -(-length // self._width)
        self.down = self._bands if pass_.down else ones
        units = spans * self._bands * self.along
        self.count = np.where(sizes.prod(axis=1) > 0, units, 0)

    def _order(self) -> np.ndarray:
        """Put tensors of one width side by side, as each width is a launch of its own.

        Return each unit's tensor (units): [1, 0, 0, 0] for the example of `_cut`.
        """
        order = np.argsort(self._width, kind="stable")
        count = self.count[order]
        self.first = np.empty_like(self.count)
        self.first[order] = np.cumsum(count) - count
        return np.repeat(order, count)

    def _fill_table(self, tensor: np.ndarray) -> None:
        """Make the table; all arrays here are (units).

        A unit's number within its tensor says its column (fastest), its band, and its span.
        """
        number = np.arange(len(tensor)) - self.first[tensor]
        column = number % self.along[tensor]
        row_of_units = number // self.along[tensor]
        part = row_of_units % self._bands[tensor]
        span = row_of_units // self._bands[tensor]
        lines = self._lines[tensor]
        band = self._band[tensor]
        begin = span * lines + part * band
        end_of_span = (span + 1) * lines
        end = np.minimum(begin + band, end_of_span)
        fields = [tensor, begin, end, column, part]
        self.table = np.stack(fields, axis=1).astype(np.int64)

    def _find_launches(self, tensor: np.ndarray) -> None:
        """Find the range of units of each width."""
        self.launches = []
        for width in WIDTHS:
            units = np.flatnonzero(self._width[tensor] == width)
            if len(units):
                begin = int(units[0])
                end = int(units[-1]) + 1
                constants = {"LINES": BLOCK // width, "COLUMNS": width}
                self.launches.append((begin, end, constants))


class WorkInUnits(Work):
    """A launch's tensors by their sizes, and the units of each pass over them.

    It adds `units`, one for each pass, and `parts`: of each temporary that a sum ends in, how many
    units leave a share of each of its values, for each tensor.
    """

    def __init__(self, sizes: np.ndarray, program: Program) -> None:
        """Cut every pass of `program`."""
        super().__init__(sizes)
        self.units: list[Units] = []
        self.parts: dict[str, np.ndarray] = {}
        for pass_ in program.passes:
            if program.by_lines:
                units: Units = TileUnits(self.sizes, pass_)
            else:
                units = BlockUnits(self.numel, pass_)
            self.units.append(units)
            self.parts |= {reduction.into: units.along for reduction in pass_.along}
            self.parts |= {reduction.into: units.down for reduction in pass_.down}
