"""Uniform values computed on the device, in float64, a program for each tensor: what no host can
know without waiting.

These are sums over a tensor, step counts and learning rates that lie in the device's memory.
Everything else is computed on the host (`host.py`) and sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from ..graph.ir import REDUCTIONS, Node, Rank, topological
from ..graph.passes import Program, host_order
from ..llvm.uniforms import leaf_names
from .expressions import TYPES, assign
from .jit import Function

POINTERS = {"f32": "*fp32", "f64": "*fp64"}
# What is known of each tensor, beside two facts for each pass: where its partial results begin, and
# of how many units.
FACTS = ("row", "setting", "active", "matrices", "rows", "columns", "numel")


def fact(program: Program, name: str) -> str:
    """The expression for a fact of the tensor at hand."""
    return f"tl.load(tensors + {fact_names(program).index(name)} * count + tensor)"


def fact_names(program: Program) -> list[str]:
    """The rows of the table of tensors' facts."""
    return [
        *FACTS,
        *(f"{what} {k}" for k in range(len(program.passes)) for what in ("partials", "units")),
    ]


def input_offsets(program: Program) -> list[int]:
    """Where each pass's inputs begin in a row of the table, and at the end the row's length."""
    return [0, *accumulate(len(one.inputs) for one in program.passes)]


def depends_on_tensors(program: Program) -> bool:
    """Whether some uniform value differs from tensor to tensor: it needs a sum, or a size."""
    return any(node.rank == Rank.TENSOR for one in program.passes for node in one.inputs)


def stages(program: Program, resident: bool) -> list[tuple[int, list[int]]]:
    """When uniform values are computed on the device: before which pass, and for which passes.

    Each as soon as the reductions that it needs are done. Where the parameters' numbers are
    `resident` on the device, they are written last, after all that may fail.
    """
    if not (resident or depends_on_tensors(program)):
        return []
    made = {node: k for k, one in enumerate(program.passes) for node in one.reductions}
    storing = max((call.after + 1 for call in program.calls), default=0)
    found: dict[int, list[int]] = {}
    for k, one in enumerate(program.passes):
        needed = (made[n] + 1 for n in topological(one.inputs) if n in made)
        found.setdefault(max([storing if k >= storing else 0, *needed]), []).append(k)
    if resident:
        found.setdefault(storing, [])
    return sorted(found.items())


def uniforms(
    program: Program,
    s: int,
    stage: tuple[int, Sequence[int]],
    numbers: tuple[str, ...] | None,
    number_type: str,
) -> tuple[str, Function]:
    """`uniforms_s`: the rows of the table, and in the last stage the numbers of the parameters'
    state."""
    last = s == len(stages(program, numbers is not None)) - 1
    return _Uniforms(program, s, stage[1], numbers, number_type, last).text()


class _Uniforms:
    def __init__(
        self,
        program: Program,
        s: int,
        passes: Sequence[int],
        numbers: tuple[str, ...] | None,
        number_type: str,
        last: bool,
    ) -> None:
        self.program, self.s, self.passes = program, s, passes
        self.numbers, self.number_type = numbers or (), number_type
        self.resident, self.writes = numbers is not None, last and numbers is not None
        self.lines: list[str] = []
        self.count = 0

    def line(self, text: str) -> None:
        self.lines.append("    " + text)

    def text(self) -> tuple[str, Function]:
        inputs = [node for k in self.passes for node in self.program.passes[k].inputs]
        scalars = [node for _, node in self.program.scalars] if self.writes else []
        arguments = "addresses, tensors, leaves, table, partials, fresh, guard, settings, count"
        head = [
            '@triton.jit(do_not_specialize=["settings", "count"])',
            f"def uniforms_{self.s}({arguments}, GUARDED: tl.constexpr):",
        ]
        self.line("tensor = tl.program_id(0)")
        self.line(f"setting = {fact(self.program, 'setting')}")
        names = self._emit([*inputs, *scalars])
        offsets = input_offsets(self.program)
        for k in self.passes:
            for i, node in enumerate(self.program.passes[k].inputs):
                place = f"table + tensor.to(tl.int64) * {offsets[-1]} + {offsets[k] + i}"
                self.line(f"tl.store({place}, {names[node]}.to({TYPES[self.program.compute]}))")
        if self.writes:
            self._write_numbers(names)
        compute = POINTERS[self.program.compute]
        types = ("*i64", "*i64", "*fp64", compute, "*fp64", "*i32", "*fp32", "i32", "i32")
        named = tuple(zip(arguments.split(", "), types, strict=True))
        return "\n".join([*head, *self.lines]), Function(
            f"uniforms_{self.s}", named, (("GUARDED", False),), 1
        )

    def _emit(self, roots: Sequence[Node]) -> dict[Node, str]:
        """A line for each host value; what is rounded to the compute type stays in it."""
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

    def _leaf(self, node: Node) -> str:
        """A hyper-parameter, from the leaves or from the parameter's own state, or a size."""
        name = f"l{self.count}"
        self.count += 1
        if node.op != "hyper":
            self.line(f"{name} = {fact(self.program, node.op)}.to(tl.float64)  # {node.op}")
        elif node.attr in self.numbers:
            self.line(f"{name} = {self._number(str(node.attr))}  # {node.attr}")
        elif node.attr == "first" and self.resident:
            self.line(f"{name} = tl.load(fresh + tensor).to(tl.float64)  # first")
        else:
            leaf = leaf_names(self.program).index(str(node.attr))
            self.line(f"{name} = tl.load(leaves + {leaf} * settings + setting)  # {node.attr}")
        return name

    def _address(self, name: str) -> str:
        row = len(self.program.columns) + self.numbers.index(name)
        return (
            f"tl.load(addresses + {row} * count + "
            f"tensor).to(tl.pointer_type({TYPES[self.number_type]}))"
        )

    def _number(self, name: str) -> str:
        """A number of the parameter's state; of steps, that of the step that is being taken."""
        stored = f"tl.load({self._address(name)})"
        number = f"{stored} + 1" if name == "step" else stored
        return f"({number}).to(tl.float64)"

    def _reduction(self, node: Node) -> str:
        """A tensor's value from those of its programs, in an order that depends on their number
        alone."""
        made = {
            n: (k, r)
            for k, one in enumerate(self.program.passes)
            for r, n in enumerate(one.reductions)
        }
        k, r = made[node]
        name, each = f"l{self.count}", len(self.program.passes[k].reductions)
        self.count += 1
        self.line(f"begin{name} = {fact(self.program, f'partials {k}')}")
        self.line(f"units{name} = {fact(self.program, f'units {k}')}")
        self.line(f"{name} = tl.zeros([256], tl.float64)")
        self.line(f"for i in range(0, units{name}, 256):")
        self.line("    at = i + tl.arange(0, 256)")
        place = f"partials + begin{name} + at * {each} + {r}"
        self.line(f"    one = tl.load({place}, at < units{name}, other=0.0)")
        self.line(
            f"    {name} = {name} + one"
            if node.op == "sum"
            else f"    {name} = larger({name}, one)"
        )
        self.line(
            f"{name} = tl.sum({name}, axis=0)"
            if node.op == "sum"
            else f"{name} = largest({name}, 0)"
        )
        return name

    def _write_numbers(self, names: dict[Node, str]) -> None:
        """New numbers, for parameters that step; `fresh` is over once a step has been taken."""
        self.line(f"steps = {fact(self.program, 'active')} != 0")
        self.line("if GUARDED:")
        self.line("    steps = steps & (tl.load(guard) == 0)")
        self.line("if steps:")
        new = {name: names[node] for name, node in self.program.scalars}
        for name in self.numbers:
            # Rounded as it is kept, and for a scalar to the compute type before.
            value = new.get(name, self._number(name))
            rounded = (
                f"({value}).to({TYPES[self.program.compute]})" if name in new else f"({value})"
            )
            self.line(
                f"    tl.store({self._address(name)}, {rounded}.to({TYPES[self.number_type]}))"
            )
        self.line("    tl.store(fresh + tensor, 0)")
