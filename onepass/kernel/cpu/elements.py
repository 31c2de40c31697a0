"""A program's passes as LLVM IR: plain loops, which LLVM vectorises for the host.

One library holds, for each pass k, `host_k` (the values that are the same for many elements, in
float64, a row for each setting), `body_k` (the mathematics over a range of one tensor) and the walk
over all tensors that calls them. No loop over elements calls anything.
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


def lower(program: Program) -> str:
    """The program as the text of one LLVM module."""
    parts: list[str] = []
    declared: set[str] = set()
    body = LinesBody if program.by_lines else FlatBody
    for k, one in enumerate(program.passes):
        for code in (Host(program, one, k), body(program, one, k)):
            parts.append(code.text())
            declared |= code.declared
        parts.append(walk(program, one, k))
    return "\n".join([*parts, *sorted(declared)])


class FlatBody(Body):
    """`body_k`: one pass over the elements [begin, end) of one tensor."""

    def text(self) -> str:
        head = body_head(self.pass_, self.pass_index, by_lines=False)
        self.lines = [head, "entry:"]
        self._enter_inputs()
        if self.pass_.reductions:
            self._reduce()
        else:
            self._walk()
        return "\n".join([*self.lines, "  ret void", "}"])

    def _walk(self) -> None:
        """Stores alone: scalar loops, which LLVM vectorises; the first whose conditions are all
        false is taken."""
        cases = self._cases()
        for k, absent in enumerate(cases):
            holds = "false"
            for node in absent:
                holds = self._value(f"or i1 {holds}, {self.inputs[node]}")
            self._line(f"br i1 {holds}, label %case{k + 1}, label %loop{k}_head")
            self._loop(f"loop{k}", "%begin", "%end", 1, partial(self._stores, k, absent), "done")
            self.lines.append(f"case{k + 1}:")
        self.lines += ["  unreachable", "done:"]

    def _cases(self) -> list[list[Node]]:
        """Which conditions each loop may take as false, the fastest loop first.

        A select in a loop costs as much as the arithmetic of a small optimizer. So there is a loop
        without what happens seldom (a number is 0; a state is new) and without optional terms (a
        number is not 0), one without what happens seldom, and one for everything.
        """
        conditions = [node for node in self.pass_.inputs if node.type == "bool"]
        seldom = [node for node in conditions if is_zero_test(node) or node is FIRST]
        optional = [node for node in conditions if node.op == "not" and is_zero_test(node.args[0])]
        return [*([[*seldom, *optional]] if optional else []), *([seldom] if seldom else []), []]

    def _stores(self, k: int, absent: list[Node]) -> None:
        known = self.inputs
        self.inputs = {**known, **dict.fromkeys(absent, "false")}
        values = self._elements(f"%loop{k}_i", width=0)
        for name, root in self.pass_.stores:
            self._store(name, root.type, f"%loop{k}_i", values(root), 0)
        self.inputs = known

    def _reduce(self) -> None:
        """Reductions: LANES running values in float64; element j of the range belongs to lane j
        modulo LANES."""
        self._begin_reductions()
        self._line("%length = sub i64 %end, %begin")
        self._line(f"%rest = urem i64 %length, {LANES}")
        self._line("%middle = sub i64 %end, %rest")
        self._line("br label %wide_head")
        self._loop(
            "wide",
            "%begin",
            "%middle",
            LANES,
            lambda: self._accumulate_at("%wide_i", LANES),
            "between",
        )
        self.lines.append("between:")
        self._line("br label %tail_head")
        self._loop("tail", "%middle", "%end", 1, lambda: self._accumulate_at("%tail_i", 0), "done")
        self.lines.append("done:")
        self._finish_reductions()

    def _accumulate_at(self, index: str, width: int) -> None:
        values = self._elements(index, width)
        for r, reduction in enumerate(self.pass_.reductions):
            place = f"%acc{r}"
            if not width:
                lane = self._value(f"sub i64 {index}, %middle")
                place = self._value(f"getelementptr double, ptr %acc{r}, i64 {lane}")
            self._accumulate(place, reduction, values(reduction.args[0]), width)
