"""Values that are the same for many elements, as LLVM IR: the host computes them, whatever walks
the memory."""

from __future__ import annotations

from ..graph.ir import Node
from ..graph.passes import Program, host_order
from .code import TYPES, Code, literal

# Among the leaves, beside hyper-parameters: no name that a keyword can have.
SIZES = {"numel": "numel()", "rows": "rows()", "columns": "columns()"}


def leaf_names(program: Program) -> list[str]:
    """The rows of the leaves array: hyper-parameters, the tensor's sizes, and each reduction's
    result."""
    reductions = [r for one in program.passes for r in one.reductions]
    return [*program.hypers, *SIZES.values(), *(f"reduction {i}" for i in range(len(reductions)))]


class Host(Code):
    """`host_k`: fill table[setting, input] from leaves[leaf, setting], in float64, rounding once at
    the end."""

    def text(self) -> str:
        self.lines = [
            (
                f"define void @host_{self.pass_index}"
                "(ptr noalias %leaves, i64 %settings, ptr noalias %table) nounwind {"
            ),
            "entry:",
            "  %any = icmp sgt i64 %settings, 0",
            "  br i1 %any, label %setting, label %done",
            "setting:",
            "  %i = phi i64 [ 0, %entry ], [ %next, %setting ]",
        ]
        names = self._emit()
        compute = TYPES[self.program.compute]
        self._line(f"%row = mul i64 %i, {len(self.pass_.inputs)}")
        for column, node in enumerate(self.pass_.inputs):
            value = names[node]
            if node.type == "bool":
                value = self._value(f"uitofp i1 {value} to {compute}")
            place = self._value(f"add i64 %row, {column}")
            place = self._value(f"getelementptr {compute}, ptr %table, i64 {place}")
            self._line(f"store {compute} {value}, ptr {place}")
        self.lines += ["  %next = add i64 %i, 1", "  %more = icmp slt i64 %next, %settings"]
        return "\n".join(
            [*self.lines, "  br i1 %more, label %setting, label %done", "done:", "  ret void", "}"]
        )

    def _emit(self) -> dict[Node, str]:
        leaves = {name: i for i, name in enumerate(leaf_names(self.program))}
        reductions = [r for one in self.program.passes for r in one.reductions]
        leaf_of = {r: leaves[f"reduction {i}"] for i, r in enumerate(reductions)}
        names: dict[Node, str] = {}
        for node in host_order(self.pass_.inputs):
            if node.op == "const":
                names[node] = literal(node.attr, "f64")
            elif node.args and node not in leaf_of:
                names[node] = self._operation(node, [names[a] for a in node.args], 0)
            else:
                leaf = (
                    leaf_of[node] if node in leaf_of else leaves[SIZES.get(node.op, str(node.attr))]
                )
                place = self._value(f"mul i64 %settings, {leaf}")
                place = self._value(f"add i64 {place}, %i")
                place = self._value(f"getelementptr double, ptr %leaves, i64 {place}")
                names[node] = self._value(f"load double, ptr {place}")
        return names
