"""A program's passes as LLVM IR: plain loops, which LLVM vectorises for the host.

One library holds, for each pass k, `host_k` (the uniforms, in float64, a line for each setting),
`body_k` (the mathematics over a range of one tensor) and the walk over all tensors that calls them.
No loop over elements calls anything.
"""

from __future__ import annotations

from functools import partial

from ..graph.ir import Node
from ..graph.passes import Program
from ..graph.trace import FIRST
from ..llvm.code import LANES, Body, is_zero_test
from ..llvm.uniforms import Host
from .lines import LinesBody
from .walk import body_head, walk


def llvm_text(program: Program) -> str:
    """Return the program as the text of one LLVM module."""
    parts: list[str] = []
    declared: set[str] = set()
    body = LinesBody if program.by_lines else FlatBody
    for pass_index, pass_ in enumerate(program.passes):
        for code in (Host(program, pass_, pass_index), body(program, pass_, pass_index)):
            parts.append(code.text())
            declared |= code.declared
        parts.append(walk(program, pass_, pass_index))
    return "\n".join([*parts, *sorted(declared)])


class FlatBody(Body):
    """`body_k`: one pass over the elements [begin, end) of one tensor."""

    def text(self) -> str:
        """Return the function."""
        head = body_head(self.pass_, self.pass_index, by_lines=False)
        self.lines = [head, "entry:"]
        self._enter_inputs()
        if self.pass_.reductions:
            self._reduce()
        else:
            self._walk()
        return "\n".join([*self.lines, "  ret void", "}"])

    def _walk(self) -> None:
        """Emit a pass that only stores: scalar loops, one for each case, which LLVM vectorises.

        The first loop whose conditions are all false is taken.
        """
        for i, absent in enumerate(self._cases()):
            holds = "false"
            for node in absent:
                holds = self._value(f"or i1 {holds}, {self.inputs[node]}")
            self._line(f"br i1 {holds}, label %case{i + 1}, label %loop{i}_head")
            body = partial(self._store_all, f"%loop{i}_i", absent)
            self._loop(f"loop{i}", "%begin", "%end", 1, body, "done")
            self.lines.append(f"case{i + 1}:")
        self.lines += ["  unreachable", "done:"]

    def _cases(self) -> list[list[Node]]:
        """Return which conditions each loop may take as false, the fastest loop first.

        A select in a loop costs as much as the arithmetic of a small optimizer. So there is a loop
        without what happens seldom (a number is 0; a state is new) and without optional terms (a
        number is not 0), one without what happens seldom, and one for everything. Adam, with the
        conditions lr == 0 and weight_decay != 0, has

            [[lr == 0, weight_decay != 0], [lr == 0], []]
        """
        conditions = [node for node in self.pass_.inputs if node.type == "bool"]
        seldom = [node for node in conditions if is_zero_test(node) or node is FIRST]
        optional = [node for node in conditions if node.op == "not" and is_zero_test(node.args[0])]
        cases: list[list[Node]] = []
        if optional:
            cases.append([*seldom, *optional])
        if seldom:
            cases.append(seldom)
        return [*cases, []]

    def _store_all(self, index: str, absent: list[Node]) -> None:
        """Emit the stores at an index, with the conditions in `absent` taken as false."""
        inputs = self.inputs
        self.inputs = inputs | dict.fromkeys(absent, "false")
        values = self._elements(index, width=0)
        for name, root in self.pass_.stores:
            self._store(name, root.type, index, values(root), 0)
        self.inputs = inputs

    def _reduce(self) -> None:
        """Emit a pass that reduces: LANES running values in float64 for each reduction.

        Element j of the range belongs to lane j modulo LANES.
        """
        self._begin_reductions()
        self._line("%length = sub i64 %end, %begin")
        self._line(f"%rest = urem i64 %length, {LANES}")
        self._line("%middle = sub i64 %end, %rest")
        wide = partial(self._accumulate_at, "%wide_i", LANES)
        tail = partial(self._accumulate_at, "%tail_i", 0)
        self._line("br label %wide_head")
        self._loop("wide", "%begin", "%middle", LANES, wide, "between")
        self.lines.append("between:")
        self._line("br label %tail_head")
        self._loop("tail", "%middle", "%end", 1, tail, "done")
        self.lines.append("done:")
        self._finish_reductions()

    def _accumulate_at(self, index: str, width: int) -> None:
        """Emit how the values at an index, or LANES of them, are taken into running ones."""
        values = self._elements(index, width)
        for r, reduction in enumerate(self.pass_.reductions):
            address = f"%acc{r}"
            if not width:
                lane = self._value(f"sub i64 {index}, %middle")
                address = self._value(f"getelementptr double, ptr %acc{r}, i64 {lane}")
            self._accumulate(address, reduction, values(reduction.args[0]), width)
