"""Uniforms computed on the device, in float64, a program for each tensor.

These are what no host can know without waiting: sums over a tensor, and step counts and learning
rates that lie in the device's memory. Everything else is computed on the host (`llvm.uniforms`) and
sent.

A rule like LAMB has two passes: the first sums up the squares of p and of its update; the second
stores p, and needs the ratio of the two sums, which differs from tensor to tensor. So there are two
stages:

    uniforms_0  before pass 0, for the inputs of pass 0
    pass_0      leaves partial sums, one for each of its programs
    uniforms_1  before pass 1, for the inputs of pass 1: adds up each tensor's partial sums
    pass_1      stores
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from ..graph.ir import REDUCTIONS, Node, Rank, topological
from ..graph.passes import Program, host_order
from ..llvm.uniforms import leaf_names
from .expressions import POINTER_TYPES, TRITON_TYPES, assign
from .jit import Function

# What is known of each tensor, beside two facts for each pass: where its partial results begin, and
# of how many units. `table_line` is the tensor's line in the table of uniforms; `active` is 0 if it
# does not step.
TENSOR_FACTS = ("table_line", "setting", "active", "matrices", "rows", "columns", "numel")
# The arguments of `uniforms_s` with their types in Triton's notation; that of `table` is the
# compute type's.
ARGUMENTS = {
    "addresses": "*i64",
    "tensors": "*i64",
    "leaves": "*fp64",
    "table": "",
    "partials": "*fp64",
    "fresh": "*i32",
    "guard": "*fp32",
    "settings": "i32",
    "count": "i32",
}


def fact(program: Program, name: str) -> str:
    """Return the expression for a fact of the tensor at hand."""
    return f"tl.load(tensors + {fact_names(program).index(name)} * count + tensor)"


def fact_names(program: Program) -> list[str]:
    """Return the names of the lines of the table of tensors' facts."""
    names: list[str] = [*TENSOR_FACTS]
    for pass_index in range(len(program.passes)):
        names += [f"partials {pass_index}", f"units {pass_index}"]
    return names


def input_offsets(program: Program) -> list[int]:
    """Return where each pass's inputs begin in a line of the table of uniforms.

    At the end stands the line's length: passes of 3 and of 2 inputs give [0, 3, 5].
    """
    return [0, *accumulate(len(pass_.inputs) for pass_ in program.passes)]


def depends_on_tensors(program: Program) -> bool:
    """Whether some uniform value differs from tensor to tensor: it needs a sum, or a size."""
    return any(node.rank == Rank.TENSOR for pass_ in program.passes for node in pass_.inputs)


def stages(program: Program, resident: bool) -> list[tuple[int, list[int]]]:
    """Return when uniforms are computed on the device: before which pass, and for which passes.

    Each is computed as soon as the reductions that it needs are done. If the parameters' numbers
    are `resident` on the device, they are written last, after all that may fail. LAMB has
    [(0, [0]), (1, [1])].
    """
    if not (resident or depends_on_tensors(program)):
        return []
    storing = program.first_to_store
    # For each reduction, the first pass before which its result is there.
    known_from: dict[Node, int] = {}
    for pass_index, pass_ in enumerate(program.passes):
        known_from |= dict.fromkeys(pass_.reductions, pass_index + 1)
    found: dict[int, list[int]] = {}
    for pass_index, pass_ in enumerate(program.passes):
        before = storing if pass_index >= storing else 0
        for node in topological(pass_.inputs):
            before = max(before, known_from.get(node, 0))
        found.setdefault(before, []).append(pass_index)
    if resident:
        found.setdefault(storing, [])
    return sorted(found.items())


def uniforms(
    program: Program,
    stage_index: int,
    stage: tuple[int, Sequence[int]],
    numbers: tuple[str, ...] | None,
    number_type: str,
) -> tuple[str, Function]:
    """Return `uniforms_s` for stage s: its text, and how it is launched.

    It fills the tensors' lines of the table of uniforms, and in the last stage stores the
    `numbers` of the parameters' state, if these lie on the device; they have `number_type`.
    """
    is_last = stage_index == len(stages(program, numbers is not None)) - 1
    writer = _Uniforms(program, stage_index, stage[1], numbers, number_type, is_last)
    text = writer.text()
    types = ARGUMENTS | {"table": POINTER_TYPES[program.compute]}
    arguments = tuple(types.items())
    return text, Function(f"uniforms_{stage_index}", arguments, (("GUARDED", False),), warps=1)


class _Uniforms:
    """`uniforms_s` under construction."""

    def __init__(
        self,
        program: Program,
        stage_index: int,
        passes: Sequence[int],
        numbers: tuple[str, ...] | None,
        number_type: str,
        is_last: bool,
    ) -> None:
        """`passes` are the indices of those whose inputs this stage computes."""
        self.program = program
        self.stage_index = stage_index
        self.passes = passes
        self.numbers = numbers or ()
        self.number_type = TRITON_TYPES[number_type]
        self.is_resident = numbers is not None
        self.is_writing = is_last and self.is_resident
        self.lines: list[str] = []
        self.count = 0

    def line(self, text: str) -> None:
        """Add a line to the function's body."""
        self.lines.append("    " + text)

    def text(self) -> str:
        """Return the function."""
        head = [
            '@triton.jit(do_not_specialize=["settings", "count"])',
            f"def uniforms_{self.stage_index}({', '.join(ARGUMENTS)}, GUARDED: tl.constexpr):",
        ]
        self.line("tensor = tl.program_id(0)")
        self.line(f"setting = {fact(self.program, 'setting')}")
        roots: list[Node] = []
        for pass_index in self.passes:
            roots += self.program.passes[pass_index].inputs
        if self.is_writing:
            roots += [node for _, node in self.program.scalars]
        names = self._emit(roots)
        self._fill_table(names)
        if self.is_writing:
            self._write_numbers(names)
        return "\n".join([*head, *self.lines])

    def _fill_table(self, names: dict[Node, str]) -> None:
        """Store the inputs of the stage's passes into the tensor's line."""
        offsets = input_offsets(self.program)
        compute = TRITON_TYPES[self.program.compute]
        for pass_index in self.passes:
            for i, node in enumerate(self.program.passes[pass_index].inputs):
                column = offsets[pass_index] + i
                address = f"table + tensor.to(tl.int64) * {offsets[-1]} + {column}"
                self.line(f"tl.store({address}, {names[node]}.to({compute}))")

    def _emit(self, roots: Sequence[Node]) -> dict[Node, str]:
        """Emit a line for each host value; what is rounded to the compute type stays in it."""
        names: dict[Node, str] = {}

        def known(node: Node) -> str | None:
            if node.op in REDUCTIONS:
                return self._reduction(node)
            return None if node.args or node.op == "const" else self._leaf(node)

        order = [node for node in host_order(roots) if node.op != "const"]
        for node in order:
            self.lines += [f"    {line}" for line in assign([node], names, known, prefix="h")]
        for node in roots:
            if node.op == "const":
                names[node] = f"tl.full((), {float(node.attr)!r}, tl.float64)"  # type: ignore[arg-type]
        return names

    def _new_name(self) -> str:
        """Return a name for a value that comes from memory."""
        name = f"l{self.count}"
        self.count += 1
        return name

    def _leaf(self, node: Node) -> str:
        """Emit a hyper, from the leaves or from the parameter's own state, or a size."""
        name = self._new_name()
        if node.op != "hyper":
            self.line(f"{name} = {fact(self.program, node.op)}.to(tl.float64)  # {node.op}")
        elif node.attr in self.numbers:
            self.line(f"{name} = {self._number(str(node.attr))}  # {node.attr}")
        elif node.attr == "first" and self.is_resident:
            self.line(f"{name} = tl.load(fresh + tensor).to(tl.float64)  # first")
        else:
            leaf = leaf_names(self.program).index(str(node.attr))
            self.line(f"{name} = tl.load(leaves + {leaf} * settings + setting)  # {node.attr}")
        return name

    def _address(self, name: str) -> str:
        """Return the expression for where a number of the parameter's state is."""
        table_line = len(self.program.columns) + self.numbers.index(name)
        address = f"tl.load(addresses + {table_line} * count + tensor)"
        return f"{address}.to(tl.pointer_type({self.number_type}))"

    def _number(self, name: str) -> str:
        """Return a number of the parameter's state; `step` is that of the step being taken."""
        stored = f"tl.load({self._address(name)})"
        number = f"{stored} + 1" if name == "step" else stored
        return f"({number}).to(tl.float64)"

    def _reduction(self, node: Node) -> str:
        """Emit a tensor's value from those of its programs.

        Their order of addition depends only on how many there are: 256 running values, and program
        i goes to value i modulo 256.
        """
        pass_index, r = self._find_reduction(node)
        reductions = len(self.program.passes[pass_index].reductions)
        is_sum = node.op == "sum"
        name = self._new_name()
        self.line(f"begin{name} = {fact(self.program, f'partials {pass_index}')}")
        self.line(f"units{name} = {fact(self.program, f'units {pass_index}')}")
        self.line(f"{name} = tl.zeros([256], tl.float64)")
        self.line(f"for i in range(0, units{name}, 256):")
        self.line("    unit = i + tl.arange(0, 256)")
        address = f"partials + begin{name} + unit * {reductions} + {r}"
        self.line(f"    partial = tl.load({address}, unit < units{name}, other=0.0)")
        both = f"{name} + partial" if is_sum else f"larger({name}, partial)"
        self.line(f"    {name} = {both}")
        total = f"tl.sum({name}, axis=0)" if is_sum else f"largest({name}, 0)"
        self.line(f"{name} = {total}")
        return name

    def _find_reduction(self, node: Node) -> tuple[int, int]:
        """Return which pass ends in a reduction, and where it stands among that pass's."""
        found = {}
        for pass_index, pass_ in enumerate(self.program.passes):
            for r, reduction in enumerate(pass_.reductions):
                found[reduction] = pass_index, r
        return found[node]

    def _write_numbers(self, names: dict[Node, str]) -> None:
        """Emit the stores of new numbers, for parameters that step, which then have stepped."""
        self.line(f"steps = {fact(self.program, 'active')} != 0")
        self.line("if GUARDED:")
        self.line("    steps = steps & (tl.load(guard) == 0)")
        self.line("if steps:")
        scalars = {name: names[node] for name, node in self.program.scalars}
        compute = TRITON_TYPES[self.program.compute]
        for name in self.numbers:
            # A scalar is rounded to the compute type first, and then as it is kept.
            value = f"({self._number(name)})"
            if name in scalars:
                value = f"({scalars[name]}).to({compute})"
            self.line(f"    tl.store({self._address(name)}, {value}.to({self.number_type}))")
        self.line("    tl.store(fresh + tensor, 0)")
