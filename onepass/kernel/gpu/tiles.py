"""A program's passes as Triton: each program of a launch takes a block of elements, or a tile of a
matrix.

One module holds, for each pass k, `values_k` (the mathematics) and `pass_k` (the walk: which
tensor, which block, whole and aligned or with a mask), and for each stage `uniforms_s`, which
computes on the device what the host does not know: see `stages`. A launch is given tables, and
reads everything else through them:

    addresses (row, tensor)  of columns, numbers and temporaries, in this order
    tensors (fact, tensor)   the tensor's row in the table, its setting, its sizes, and where its
                             partial results lie
    units (unit, field)      the tensor and the place of each program's work
    table (row, input)       the uniform values of all passes, side by side
"""

from __future__ import annotations

from collections.abc import Sequence

from ..graph.ir import Node, Rank
from ..graph.passes import ITEMSIZE, Pass, Program, Reduction
from .expressions import PRELUDE, TYPES, values
from .jit import Function, Source
from .uniforms import fact, input_offsets, stages, uniforms

# Elements of one program; of a reduction, blocks of so many elements, one after the other.
BLOCK, SPAN = 1024, 32
# A tile is so wide, the narrowest into which a line fits; of a sum a program takes so many lines,
# else so many tiles.
WIDTHS = (32, 256)
BAND, TILES = 128, 4
# A block's, and a tile's: of the lines [begin, end), the columns from `column` on; `part` counts a
# matrix's bands.
FLAT_FIELDS = ("tensor", "block")
TILE_FIELDS = ("tensor", "begin", "end", "column", "part")
POINTERS = {"f64": "fp64", "f32": "fp32", "f16": "fp16", "i16": "u16"}

FOLD = """
@triton.jit(do_not_specialize=["first"])
def fold(entries, units, guard, first, GUARDED: tl.constexpr, BLOCK: tl.constexpr):
    # Adds up what several programs have left of one sum, one after the other: an entry is where,
    # how many, parts, op.
    if GUARDED:
        if tl.load(guard) != 0:
            return
    unit = first + tl.program_id(0)
    entry = entries + 4 * tl.load(units + 2 * unit)
    start = tl.load(units + 2 * unit + 1).to(tl.int64) * BLOCK
    values = tl.load(entry).to(tl.pointer_type(tl.float64))
    count = tl.load(entry + 1)
    parts = tl.load(entry + 2)
    is_sum = tl.load(entry + 3) == 0
    at = start + tl.arange(0, BLOCK)
    inside = at < count
    total = tl.load(values + at, inside, other=0.0)
    for part in range(1, parts):
        one = tl.load(values + part * count + at, inside, other=0.0)
        total = tl.where(is_sum, total + one, larger(total, one))
    tl.store(values + at, total, inside)
"""


def lower(
    program: Program, numbers: tuple[str, ...] | None = None, number_type: str = "f32"
) -> Source:
    """The program as the text of one Triton module.

    `numbers` are the state entries that are one number a parameter, where these lie on the device;
    None where the host keeps them. Of hyper-parameters with these names the value is read there,
    and written back, a step's number one higher; and it is the device that knows whose step is the
    first.
    """
    parts, functions = [PRELUDE], []
    known = [
        *(c.name for c in program.columns),
        *(numbers or ()),
        *(t.name for t in program.temporaries),
    ]
    for s, stage in enumerate(stages(program, numbers is not None)):
        text, function = uniforms(program, s, stage, numbers, number_type)
        parts.append(text)
        functions.append(function)
    for k, one in enumerate(program.passes):
        if one.roots:
            writer = (_Tiles if program.by_lines else _Blocks)(program, one, k, known)
            parts += [values(one, k), writer.text()]
            functions.append(writer.function())
    if any(one.sums for one in program.passes):
        parts.append(FOLD.strip())
        arguments = (("entries", "*i64"), ("units", "*i32"), ("guard", "*fp32"), ("first", "i32"))
        # With 4 warps sm_80 has too few registers.
        functions.append(Function("fold", arguments, (("GUARDED", False), ("BLOCK", BLOCK)), 8))
    return Source("\n\n\n".join(part.rstrip() for part in parts) + "\n", tuple(functions))


def warps_of(one: Pass) -> int:
    """So many that where 2-byte and 4-byte columns meet, each thread has four elements of both:
    else Triton would exchange them between threads. Four also where eight would take more registers
    than there are."""
    widths = {ITEMSIZE[n.type] for n in one.loads} | {ITEMSIZE[n.type] for _, n in one.stores}
    return 8 if len(widths) > 1 or 8 in widths or len(one.loads) > 4 else 4


class _Walk:
    """`pass_k` under construction."""

    fields: Sequence[str]
    unit_type: str

    def __init__(self, program: Program, one: Pass, k: int, known: Sequence[str]) -> None:
        """`known` names the rows of the table of addresses."""
        self.program, self.one, self.k = program, one, k
        self.lines: list[str] = []
        self.depth = 1
        named = (
            [str(n.attr) for n in one.loads]
            + [s.into for s in one.sums]
            + [name for name, _ in one.stores]
        )
        types = {str(n.attr): n.type for n in one.loads} | dict.fromkeys(
            (s.into for s in one.sums), "f64"
        )
        types |= {name: root.type for name, root in one.stores}
        # How a column is called here, whatever its name: its row in the table of addresses, and
        # what it points to.
        self.rows = {name: known.index(name) for name in dict.fromkeys(named)}
        self.types = {name: types[name] for name in self.rows}
        self.pointer = {name: f"c{row}" for name, row in self.rows.items()}
        self.elements = {str(n.attr) for n in one.loads if n.rank == one.domain} | {
            name for name, _ in one.stores
        }

    def line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    def function(self) -> Function:
        """How it is launched."""
        compute = POINTERS[self.program.compute]
        arguments = [
            ("addresses", "*i64"),
            ("tensors", "*i64"),
            ("units", self.unit_type),
            ("table", f"*{compute}"),
        ]
        arguments += [("partials", "*fp64"), ("guard", "*fp32"), ("first", "i32"), ("count", "i32")]
        return Function(
            f"pass_{self.k}",
            tuple(arguments),
            (("GUARDED", False), *self.shape()),
            warps_of(self.one),
        )

    def shape(self) -> tuple[tuple[str, int], ...]:
        """The compile-time constants that say how much one program walks."""
        raise NotImplementedError

    def _head(self) -> None:
        """What every walk begins with: its tensor, the uniform values, and where the columns
        are."""
        arguments = "addresses, tensors, units, table, partials, guard, first, count"
        shape = ", ".join(f"{name}: tl.constexpr" for name, _ in self.shape())
        self.lines += [
            '@triton.jit(do_not_specialize=["first", "count"])',
            f"def pass_{self.k}({arguments}, GUARDED: tl.constexpr, {shape}):",
        ]
        self.line("# The guard holds where a step is to change nothing.")
        self.line("if GUARDED:")
        self.line("    if tl.load(guard) != 0:")
        self.line("        return")
        self.line("unit = first + tl.program_id(0)")
        for i, name in enumerate(self.fields):
            self.line(f"{name} = tl.load(units + {len(self.fields)} * unit.to(tl.int64) + {i})")
        total = input_offsets(self.program)[-1]
        if self.one.inputs:
            self.line(f"row = table + {fact(self.program, 'row')} * {total}")
        for i, node in enumerate(self.one.inputs):
            truth = ".to(tl.int32) != 0" if node.type == "bool" else ""
            self.line(f"u{i} = tl.load(row + {input_offsets(self.program)[self.k] + i}){truth}")
        for name, row in self.rows.items():
            self.line(f"a{row} = tl.load(addresses + {row} * count + tensor)  # {name}")

    def _aligned(self) -> str:
        """Whether all columns of elements begin at a multiple of 16 bytes."""
        together = " | ".join(f"a{self.rows[name]}" for name in self.rows if name in self.elements)
        return f"(({together}) & 15) == 0"

    def _values(self, loads: Sequence[str]) -> list[str]:
        """Emit the mathematics; returns what the results are called."""
        results = [f"y{i}" for i in range(len(self.one.roots))]
        given = [*(f"u{i}" for i in range(len(self.one.inputs))), *loads]
        self.line(f"{', '.join(results)} = values_{self.k}({', '.join(given)})")
        return results

    def _accumulate(self, place: str, reduction: Node, value: str, mask: str | None) -> None:
        """Take a block of values into a running one, in float64."""
        wide = f"({value}).to(tl.float64)"
        wide = wide if mask is None else f"tl.where({mask}, {wide}, 0.0)"
        self.line(
            f"{place} = {place} + {wide}"
            if reduction.op == "sum"
            else f"{place} = larger({place}, {wide})"
        )

    def _reduced(self, reduction: Node, value: str, axis: int | None) -> str:
        return (
            f"tl.sum({value}, axis={axis})"
            if reduction.op == "sum"
            else f"largest({value}, {axis})"
        )

    def _store_partials(self, axes: int) -> None:
        """What this program adds to each reduction over the whole tensor."""
        for r, reduction in enumerate(self.one.reductions):
            value = f"r{r}"
            for axis in range(axes - 1, -1, -1):
                value = self._reduced(reduction, value, axis)
            self.line(
                f"tl.store(partials + unit.to(tl.int64) * {len(self.one.reductions)} + {r}, "
                f"{value})"
            )


class _Blocks(_Walk):
    """A walk over elements, whatever the tensor's shape: each program takes one block, or of
    reductions several."""

    fields = FLAT_FIELDS
    unit_type = "*i32"

    def shape(self) -> tuple[tuple[str, int], ...]:
        return (("BLOCK", BLOCK), ("SPAN", SPAN)) if self.one.reductions else (("BLOCK", BLOCK),)

    def text(self) -> str:
        self._head()
        blocks = "BLOCK * SPAN" if self.one.reductions else "BLOCK"
        self.line(f"start = block.to(tl.int64) * {blocks}")
        self.line(f"left = {fact(self.program, 'numel')} - start")
        for name, row in self.rows.items():
            self.line(f"c{row} = a{row}.to(tl.pointer_type({TYPES[self.types[name]]})) + start")
        self.line("at = tl.arange(0, BLOCK)")
        for r in range(len(self.one.reductions)):
            self.line(f"r{r} = tl.zeros([BLOCK], tl.float64)")
        self.line(f"if (left >= {blocks}) & ({self._aligned()}):")
        self._branch(masked=False)
        self.line("else:")
        self._branch(masked=True)
        self._store_partials(axes=1)
        return "\n".join(self.lines)

    def _branch(self, masked: bool) -> None:
        """All blocks of a program, whole and aligned or with a mask."""
        self.depth += 1
        if not masked:
            for name, row in self.rows.items():
                if name in self.elements:
                    self.line(f"c{row} = tl.multiple_of(c{row}, 16)")
        if self.one.reductions:
            # So many as there are, and no more than a program takes.
            bound = "tl.minimum(tl.cdiv(left, BLOCK), SPAN).to(tl.int32)" if masked else "SPAN"
            self.line(f"for i in range(0, {bound}):")
            self.depth += 1
            self.line("at = i * BLOCK + tl.arange(0, BLOCK)")
        if masked:
            self.line(
                f"mask = at < tl.minimum(left, BLOCK{' * SPAN' if self.one.reductions else ''})"
            )
        mask = ", mask" if masked else ""
        loads = []
        for i, node in enumerate(self.one.loads):
            self.line(f"x{i} = tl.load({self.pointer[str(node.attr)]} + at{mask})")
            loads.append(f"x{i}")
        results = self._values(loads)
        for r, reduction in enumerate(self.one.reductions):
            self._accumulate(f"r{r}", reduction, results[r], "mask" if masked else None)
        for (name, _), result in zip(
            self.one.stores, results[len(self.one.reductions) :], strict=True
        ):
            self.line(f"tl.store({self.pointer[name]} + at, {result}{mask})")
        self.depth -= 2 if self.one.reductions else 1


class _Tiles(_Walk):
    """A walk over matrices, in tiles of lines: what a line has once is loaded once, sums run along
    or down the lines.

    A line is a row where the pass runs over elements, and a matrix's whole column of row values, or
    row of column values, where it runs over those.
    """

    fields = TILE_FIELDS
    unit_type = "*i64"

    def shape(self) -> tuple[tuple[str, int], ...]:
        return ("LINES", BLOCK // WIDTHS[-1]), ("COLUMNS", WIDTHS[-1])

    def text(self) -> str:
        down = self.one.domain == Rank.ELEMENT
        self.along = [s for s in self.one.sums if not (down and s.node.rank == Rank.COLUMN)]
        self.down = [s for s in self.one.sums if down and s.node.rank == Rank.COLUMN]
        self._head()
        per, length = {
            Rank.ELEMENT: (fact(self.program, "rows"), fact(self.program, "columns")),
            Rank.ROW: ("1", fact(self.program, "rows")),
            Rank.COLUMN: ("1", fact(self.program, "columns")),
            Rank.MATRIX: ("1", fact(self.program, "matrices")),
        }[self.one.domain]
        self.line(f"per = {per}")
        self.line(f"length = {length}")
        groups = "1" if self.one.domain == Rank.MATRIX else fact(self.program, "matrices")
        self.line(f"groups = {groups}")
        for name, row in self.rows.items():
            self.line(f"c{row} = a{row}.to(tl.pointer_type({TYPES[self.types[name]]}))")
        self.line("lines = tl.arange(0, LINES)")
        self.line("columns = column * COLUMNS + tl.arange(0, COLUMNS)")
        for r in range(len(self.one.reductions)):
            self.line(f"r{r} = tl.zeros([LINES, COLUMNS], tl.float64)")
        for d in range(len(self.down)):
            self.line(f"d{d} = tl.zeros([LINES, COLUMNS], tl.float64)")
        whole = (
            "((end - begin) % LINES == 0) & ((column + 1) * COLUMNS <= length) & (length % 16 == 0)"
        )
        self.line(f"if {whole} & ({self._aligned()}):")
        self._branch(masked=False)
        self.line("else:")
        self._branch(masked=True)
        self._store_down()
        self._store_partials(axes=2)
        return "\n".join(self.lines)

    def _branch(self, masked: bool) -> None:
        self.depth += 1
        if not masked:
            for name, row in self.rows.items():
                if name in self.elements:
                    self.line(f"c{row} = tl.multiple_of(c{row}, 16)")
            # No hint: Triton believes one wherever its value is used, in the branch for all other
            # lengths too.
            self.line("length = length // 16 * 16")
        self.line("for start in range(begin, end, LINES):")
        self.depth += 1
        self.line("line = start + lines")
        self.line("group = line // per")
        # Row by row; the places within a line follow one another.
        self.line("at = (line * length)[:, None] + columns[None, :]")
        if masked:
            self.line("is_line = line < end")
            self.line("mask = is_line[:, None] & (columns < length)[None, :]")
        results = self._values(
            [self._load(i, node, masked) for i, node in enumerate(self.one.loads)]
        )
        mask = "mask" if masked else None
        for r, reduction in enumerate(self.one.reductions):
            self._accumulate(f"r{r}", reduction, results[r], mask)
        of_sums = dict(zip(self.one.sums, results[len(self.one.reductions) :], strict=False))
        for d, one in enumerate(self.down):
            self._accumulate(f"d{d}", one.node, of_sums[one], mask)
        for one in self.along:
            self._store_along(one, of_sums[one], masked)
        stored = results[len(self.one.reductions) + len(self.one.sums) :]
        for (name, _), result in zip(self.one.stores, stored, strict=True):
            self.line(f"tl.store({self.pointer[name]} + at, {result}{', mask' if masked else ''})")
        self.depth -= 2

    def _load(self, i: int, node: Node, masked: bool) -> str:
        """A value for each element of the tile, or for each of its lines."""
        pointer = self.pointer[str(node.attr)]
        if node.rank == self.one.domain:
            self.line(f"x{i} = tl.load({pointer} + at{', mask' if masked else ''})")
            return f"x{i}"
        if node.rank == Rank.COLUMN:
            at = "(group * length)[:, None] + columns[None, :]"
            self.line(f"x{i} = tl.load({pointer} + ({at}){', mask' if masked else ''})")
            return f"x{i}"
        at = "line" if node.rank == Rank.ROW else "group"
        self.line(f"x{i} = tl.load({pointer} + {at}{', is_line' if masked else ''})")
        return f"x{i}[:, None]"

    def _store_along(self, one: Reduction, value: str, masked: bool) -> None:
        """The sum along each line of the tile, beside those of the other tiles of the same
        lines."""
        wide = f"({value}).to(tl.float64)"
        wide = f"tl.where(mask, {wide}, 0.0)" if masked else wide
        # Zeros, so that a value which is the same for the whole line counts for each of its places.
        wide = f"{wide} + tl.zeros([LINES, COLUMNS], tl.float64)"
        mask = ", is_line" if masked else ""
        reduced = self._reduced(one.node, wide, 1)
        self.line(
            f"tl.store({self.pointer[one.into]} + (column * (groups * per) + line), "
            f"{reduced}{mask})"
        )

    def _store_down(self) -> None:
        """The sums down the columns of a band of one matrix, beside those of its other bands."""
        for d, one in enumerate(self.down):
            place = "(part * groups + begin // per) * length + columns"
            value = self._reduced(one.node, f"d{d}", 0)
            self.line(f"tl.store({self.pointer[one.into]} + ({place}), {value}, columns < length)")
