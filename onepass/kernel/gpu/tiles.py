"""A walk over matrices, in tiles of lines.

What a line has once is loaded once; sums run along or down the lines. A line is a row if the pass
runs over elements, and a matrix's whole column of row values, or row of column values, if it runs
over those.

A program has the lines [begin, end) and, of these, the columns of one tile. A matrix of 300 x 40,
summed up down its columns, has three programs with tiles of 4 x 256, each a loop over its lines:

    program  begin  end  column  part
          0      0  128       0     0    32 tiles, of which 216 columns are masked
          1    128  256       0     1
          2    256  300       0     2    11 tiles

and each leaves 40 sums down, at (part * groups + matrix) * 40; `fold` adds up the three shares. A
matrix of 2 x 600 has three programs side by side (columns 0 to 255, 256 to 511, 512 to 599). A sum
along its lines has then three shares, at column * (2 lines) + line.
"""

from __future__ import annotations

from ..graph.ir import Node, Rank
from ..graph.passes import Reduction, lines_of
from .uniforms import fact
from .walk import BLOCK, Walk

# How wide a tile is: the narrowest into which a line fits.
WIDTHS = (32, 256)
# Lines that a program of a pass with reductions takes; without, it takes this many tiles.
BAND, TILES = 128, 4
# The fields of a unit: of tensor `tensor`, of its lines [begin, end), the columns of tile `column`;
# `part` counts a matrix's bands.
TILE_FIELDS = ("tensor", "begin", "end", "column", "part")


class TileWalk(Walk):
    """`pass_k` as a walk over matrices."""

    fields = TILE_FIELDS
    unit_type = "*i64"

    def shape(self) -> tuple[tuple[str, int], ...]:
        """Return the compile-time constants that say how much one program walks."""
        return ("LINES", BLOCK // WIDTHS[-1]), ("COLUMNS", WIDTHS[-1])

    def text(self) -> str:
        """Return the function."""
        self._head()
        self._measure_lines()
        self._make_pointers()
        self.line("lines = tl.arange(0, LINES)")
        self.line("columns = column * COLUMNS + tl.arange(0, COLUMNS)")
        running = [f"r{r}" for r in range(len(self.pass_.reductions))]
        running += [f"d{d}" for d in range(len(self.pass_.down))]
        for name in running:
            self.line(f"{name} = tl.zeros([LINES, COLUMNS], tl.float64)")
        are_whole = "((end - begin) % LINES == 0) & ((column + 1) * COLUMNS <= length)"
        self.line(f"if {are_whole} & (length % 16 == 0) & ({self._is_aligned()}):")
        self.depth += 1
        self._hint_alignment()
        # No hint here: Triton believes one wherever its value is used, in the branch for all other
        # lengths too.
        self.line("length = length // 16 * 16")
        self._walk_tiles(is_masked=False)
        self.depth -= 1
        self.line("else:")
        self.depth += 1
        self._walk_tiles(is_masked=True)
        self.depth -= 1
        self._store_down()
        self._store_partials(axes=2)
        return "\n".join(self.lines)

    def _measure_lines(self) -> None:
        """Emit the tensor's groups of lines, lines of a group, and length of a line."""
        matrices = fact(self.program, "matrices")
        rows = fact(self.program, "rows")
        columns = fact(self.program, "columns")
        groups, group_lines, length = lines_of(self.pass_.domain, matrices, rows, columns, "1")
        self.line(f"group_lines = {group_lines}")
        self.line(f"length = {length}")
        self.line(f"groups = {groups}")

    def _walk_tiles(self, is_masked: bool) -> None:
        """Emit the loop over a program's tiles, whole and aligned or with a mask."""
        self.line("for start in range(begin, end, LINES):")
        self.depth += 1
        self.line("line = start + lines")
        self.line("group = line // group_lines")
        # Line by line; the elements of a line follow one another.
        self.line("offset = (line * length)[:, None] + columns[None, :]")
        if is_masked:
            self.line("is_line = line < end")
            self.line("mask = is_line[:, None] & (columns < length)[None, :]")
        loads = [self._load(i, node, is_masked) for i, node in enumerate(self.pass_.loads)]
        self._use(self._values(loads), is_masked)
        self.depth -= 1

    def _use(self, results: list[str], is_masked: bool) -> None:
        """Emit what becomes of a tile's results: reductions, sums, stores, in this order."""
        pass_ = self.pass_
        mask = "mask" if is_masked else None
        for r, reduction in enumerate(pass_.reductions):
            self._accumulate(f"r{r}", reduction, results[r], mask)
        first_sum = len(pass_.reductions)
        first_store = first_sum + len(pass_.sums)
        summed = dict(zip(pass_.sums, results[first_sum:first_store], strict=True))
        for d, reduction in enumerate(pass_.down):
            self._accumulate(f"d{d}", reduction.node, summed[reduction], mask)
        for reduction in pass_.along:
            self._store_along(reduction, summed[reduction], is_masked)
        masked = ", mask" if is_masked else ""
        for (name, _), result in zip(pass_.stores, results[first_store:], strict=True):
            self.line(f"tl.store({self.pointer[name]} + offset, {result}{masked})")

    def _load(self, i: int, node: Node, is_masked: bool) -> str:
        """Emit the load of a value for each element of the tile, or for each of its lines."""
        offset, mask = "offset", "mask"
        if node.rank != self.pass_.domain:
            offset, mask = {
                Rank.COLUMN: ("((group * length)[:, None] + columns[None, :])", "mask"),
                Rank.ROW: ("line", "is_line"),
                Rank.MATRIX: ("group", "is_line"),
            }[node.rank]
        masked = f", {mask}" if is_masked else ""
        self.line(f"x{i} = tl.load({self.pointer[str(node.attr)]} + {offset}{masked})")
        return f"x{i}" if mask == "mask" else f"x{i}[:, None]"

    def _store_along(self, reduction: Reduction, value: str, is_masked: bool) -> None:
        """Emit the store of the sums along a tile's lines, beside those of the tiles beside it."""
        value = f"({value}).to(tl.float64)"
        if is_masked:
            value = f"tl.where(mask, {value}, 0.0)"
        # Zeros, so that a value which is the same for the whole line counts once for each element.
        value = f"{value} + tl.zeros([LINES, COLUMNS], tl.float64)"
        reduced = self._reduced(reduction.node, value, 1)
        address = f"{self.pointer[reduction.into]} + (column * (groups * group_lines) + line)"
        masked = ", is_line" if is_masked else ""
        self.line(f"tl.store({address}, {reduced}{masked})")

    def _store_down(self) -> None:
        """Emit the stores of the sums down a band of one matrix, beside those of its bands."""
        offset = "(part * groups + begin // group_lines) * length + columns"
        for d, reduction in enumerate(self.pass_.down):
            value = self._reduced(reduction.node, f"d{d}", 0)
            address = f"{self.pointer[reduction.into]} + ({offset})"
            self.line(f"tl.store({address}, {value}, columns < length)")
