"""Uniform values, as LLVM IR: the host computes them for both backends, the CPU's and the GPU's.

They are the same for many elements. So they are computed once for each setting, in float64,
whatever walks the memory. Leaves are what they are computed from. SGD without momentum needs `lr`
and `lr == 0`; for two learning rates, 0.1 and 0.0:

    leaves     lr      0.1  0.0                 a column for each setting; the sizes are not needed
    table            0.1  0.0                   a line for setting 0: lr, and whether it is 0
                     0.0  1.0                   a line for setting 1

`host_k` fills the table of pass k, which has the type of the program's arithmetic; a condition is
1.0 or 0.0 in it.
"""

from __future__ import annotations

from ..graph.ir import Node
from ..graph.passes import Program, host_order
from .code import TYPES, Code, literal

# Among the leaves, beside hyper-parameters: no keyword can have such a name.
SIZES = {"numel": "numel()", "rows": "rows()", "columns": "columns()"}

ARGUMENTS = "ptr noalias %leaves, i64 %settings, ptr noalias %table"


def leaf_names(program: Program) -> list[str]:
    """Return the names of the leaves, in order.

    These are hyper-parameters, the tensor's sizes, and each reduction's result: `["lr", "numel()",
    "rows()", "columns()", "reduction 0"]`.
    """
    reductions = [f"reduction {i}" for i in range(len(_reductions(program)))]
    return [*program.hypers, *SIZES.values(), *reductions]


def _reductions(program: Program) -> list[Node]:
    """Return the reductions of all passes, in the order of the passes."""
    return [reduction for pass_ in program.passes for reduction in pass_.reductions]


class Host(Code):
    """`host_k`, for pass k: fill table[setting, input] from leaves[leaf, setting].

    It computes in float64 and rounds once, at the end.
    """

    def text(self) -> str:
        """Return the function's text: one loop over the settings."""
        self.lines = [
            f"define void @host_{self.pass_index}({ARGUMENTS}) nounwind {{",
            "entry:",
            "  %any = icmp sgt i64 %settings, 0",
            "  br i1 %any, label %setting, label %done",
            "setting:",
            "  %i = phi i64 [ 0, %entry ], [ %next, %setting ]",
        ]
        values = self._emit()
        self._line(f"%begin = mul i64 %i, {len(self.pass_.inputs)}")
        for index, node in enumerate(self.pass_.inputs):
            self._store(index, node, values[node])
        self.lines += [
            "  %next = add i64 %i, 1",
            "  %more = icmp slt i64 %next, %settings",
            "  br i1 %more, label %setting, label %done",
            "done:",
            "  ret void",
            "}",
        ]
        return "\n".join(self.lines)

    def _store(self, index: int, node: Node, value: str) -> None:
        """Store an input of the pass in the setting's line of the table."""
        compute = TYPES[self.program.compute]
        if node.type == "bool":
            value = self._value(f"uitofp i1 {value} to {compute}")
        offset = self._value(f"add i64 %begin, {index}")
        address = self._value(f"getelementptr {compute}, ptr %table, i64 {offset}")
        self._line(f"store {compute} {value}, ptr {address}")

    def _emit(self) -> dict[Node, str]:
        """Add every host value that the pass's inputs need; return the values' names."""
        leaves = {name: leaf for leaf, name in enumerate(leaf_names(self.program))}
        reductions = {
            reduction: leaves[f"reduction {i}"]
            for i, reduction in enumerate(_reductions(self.program))
        }
        values: dict[Node, str] = {}
        for node in host_order(self.pass_.inputs):
            if node.op == "const":
                values[node] = literal(node.attr, "f64")
            elif node in reductions:
                values[node] = self._load(reductions[node])
            elif node.args:
                values[node] = self._operation(node, [values[a] for a in node.args], 0)
            else:
                values[node] = self._load(leaves[SIZES.get(node.op, str(node.attr))])
        return values

    def _load(self, leaf: int) -> str:
        """Load a leaf's value in the setting at hand."""
        begin = self._value(f"mul i64 %settings, {leaf}")
        offset = self._value(f"add i64 {begin}, %i")
        address = self._value(f"getelementptr double, ptr %leaves, i64 {offset}")
        return self._value(f"load double, ptr {address}")
