"""What all walks of a pass have in common: `pass_k`, which every program of a launch runs.

A launch is given tables, and a program reads everything else through them:

    addresses (line, tensor)  of columns, numbers and temporaries, in this order
    tensors   (fact, tensor)  the tensor's line in the table of uniforms, its setting, its sizes,
                              and where its partial results lie: `uniforms.fact_names`
    units     (unit, field)   the tensor and the place of each program's work
    table     (line, input)   the uniforms of all passes, side by side

Program 68 of a launch over tensors of 70,000, 10 and 5 elements, each with p and g, reads

    units[first + 68]  = (0, 68)             block 68 of tensor 0
    tensors[0, 0]      = 0                   its uniforms are line 0 of the table: lr = 0.1
    tensors[6, 0]      = 70000               its elements, of which 70000 - 68 * 1024 = 368 are left
    addresses[0, 0]    = 0x7f...             where its p is; addresses[1, 0] is where its g is

and then loads and stores elements 69,632 to 70,000, with a mask as the block is not full.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..graph.ir import Node
from ..graph.passes import ITEMSIZE, Pass, Program
from .expressions import POINTER_TYPES, TRITON_TYPES
from .jit import Function
from .uniforms import fact, input_offsets

# Elements of one block, and of one tile.
BLOCK = 1024


def warps_of(pass_: Pass) -> int:
    """Return how many warps run one program of a pass.

    When 2-byte and 4-byte columns meet, these are so many that each thread has four elements of
    both: else Triton would exchange them between threads. And four when eight would take more
    registers than there are.
    """
    sizes = {ITEMSIZE[node.type] for node in pass_.loads}
    sizes |= {ITEMSIZE[node.type] for _, node in pass_.stores}
    has_many_loads = len(pass_.loads) > 4
    return 8 if len(sizes) > 1 or 8 in sizes or has_many_loads else 4


class Walk:
    """`pass_k` under construction.

    A subclass says what a program walks: its `fields` of the table of units, of `unit_type`.
    """

    fields: Sequence[str]
    unit_type: str

    def __init__(
        self, program: Program, pass_: Pass, pass_index: int, address_names: Sequence[str]
    ) -> None:
        """`address_names` are the names of the lines of the table of addresses."""
        self.program = program
        self.pass_ = pass_
        self.pass_index = pass_index
        self.lines: list[str] = []
        self.depth = 1
        # What each column and temporary points to.
        types = {str(node.attr): node.type for node in pass_.loads}
        types |= {reduction.into: "f64" for reduction in pass_.sums}
        types |= {name: root.type for name, root in pass_.stores}
        self.types = {name: TRITON_TYPES[type] for name, type in types.items()}
        # Its line in the table of addresses, and how it is called here, whatever its name.
        self.address_index = {name: address_names.index(name) for name in types}
        self.pointer = {name: f"c{index}" for name, index in self.address_index.items()}
        # Those with a value for each element that is walked.
        elements = [node for node in pass_.loads if node.rank == pass_.domain]
        self.elements = {str(node.attr) for node in elements}
        self.elements |= {name for name, _ in pass_.stores}

    def line(self, text: str) -> None:
        """Add a line, as deep as the code is nested."""
        self.lines.append("    " * self.depth + text)

    def function(self) -> Function:
        """Return how it is launched."""
        arguments = tuple(self._arguments().items())
        constants = (("GUARDED", False), *self.shape())
        return Function(f"pass_{self.pass_index}", arguments, constants, warps_of(self.pass_))

    def _arguments(self) -> dict[str, str]:
        """Return the arguments of `pass_k` with their types in Triton's notation."""
        return {
            "addresses": "*i64",
            "tensors": "*i64",
            "units": self.unit_type,
            "table": POINTER_TYPES[self.program.compute],
            "partials": "*fp64",
            "guard": "*fp32",
            "first": "i32",
            "count": "i32",
        }

    def shape(self) -> tuple[tuple[str, int], ...]:
        """Return the compile-time constants that say how much one program walks."""
        raise NotImplementedError

    def text(self) -> str:
        """Return the function."""
        raise NotImplementedError

    def _head(self) -> None:
        """Emit what every walk begins with: its unit, the uniforms, and where the columns are."""
        arguments = ", ".join(self._arguments())
        shape = ", ".join(f"{name}: tl.constexpr" for name, _ in self.shape())
        self.lines += [
            '@triton.jit(do_not_specialize=["first", "count"])',
            f"def pass_{self.pass_index}({arguments}, GUARDED: tl.constexpr, {shape}):",
        ]
        self.line("# If the guard is not 0, the step changes nothing.")
        self.line("if GUARDED:")
        self.line("    if tl.load(guard) != 0:")
        self.line("        return")
        self.line("unit = first + tl.program_id(0)")
        for i, name in enumerate(self.fields):
            self.line(f"{name} = tl.load(units + {len(self.fields)} * unit.to(tl.int64) + {i})")
        self._load_uniforms()
        for name, index in self.address_index.items():
            self.line(f"a{index} = tl.load(addresses + {index} * count + tensor)  # {name}")

    def _load_uniforms(self) -> None:
        """Emit the loads of the pass's inputs; conditions are numbers in the table."""
        offsets = input_offsets(self.program)
        if self.pass_.inputs:
            self.line(f"uniforms = table + {fact(self.program, 'table_line')} * {offsets[-1]}")
        for i, node in enumerate(self.pass_.inputs):
            truth = ".to(tl.int32) != 0" if node.type == "bool" else ""
            self.line(f"u{i} = tl.load(uniforms + {offsets[self.pass_index] + i}){truth}")

    def _make_pointers(self, begin: str = "") -> None:
        """Emit what the columns are called: pointers to their elements from `begin` on."""
        for name, index in self.address_index.items():
            self.line(f"c{index} = a{index}.to(tl.pointer_type({self.types[name]})){begin}")

    def _is_aligned(self) -> str:
        """Return the condition that all columns of elements begin at a multiple of 16 bytes."""
        addresses = " | ".join(f"a{index}" for index in self._of_elements())
        return f"(({addresses}) & 15) == 0"

    def _hint_alignment(self) -> None:
        """Emit the hints that let Triton load and store 16 bytes at a time."""
        for index in self._of_elements():
            self.line(f"c{index} = tl.multiple_of(c{index}, 16)")

    def _of_elements(self) -> list[int]:
        """Return the lines of the table of addresses that are columns of elements."""
        columns = self.address_index.items()
        return [index for name, index in columns if name in self.elements]

    def _values(self, loads: Sequence[str]) -> list[str]:
        """Emit the mathematics on these loads; return what the results are called."""
        results = [f"y{i}" for i in range(len(self.pass_.roots))]
        given = [f"u{i}" for i in range(len(self.pass_.inputs))]
        given += loads
        self.line(f"{', '.join(results)} = values_{self.pass_index}({', '.join(given)})")
        return results

    def _accumulate(self, running: str, reduction: Node, value: str, mask: str | None) -> None:
        """Emit how a block of values is taken into a running one, in float64."""
        value = f"({value}).to(tl.float64)"
        if mask is not None:
            value = f"tl.where({mask}, {value}, 0.0)"
        both = f"{running} + {value}" if reduction.op == "sum" else f"larger({running}, {value})"
        self.line(f"{running} = {both}")

    def _reduced(self, reduction: Node, value: str, axis: int) -> str:
        """Return the expression that reduces a block along an axis."""
        if reduction.op == "sum":
            return f"tl.sum({value}, axis={axis})"
        return f"largest({value}, {axis})"

    def _store_partials(self, axes: int) -> None:
        """Emit the stores of what this program adds to each reduction over the whole tensor."""
        reductions = len(self.pass_.reductions)
        for r, reduction in enumerate(self.pass_.reductions):
            value = f"r{r}"
            for axis in range(axes - 1, -1, -1):
                value = self._reduced(reduction, value, axis)
            self.line(f"tl.store(partials + unit.to(tl.int64) * {reductions} + {r}, {value})")
