"""A pass as text: numbered assignments in the order in which they are computed."""

from __future__ import annotations

from ...kernel.graph.ir import FACTS, LOADS, Node, Rank
from ...kernel.graph.passes import Pass, element_order

__all__ = ["Listing"]

INFIX = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "div": "/",
    "pow": "**",
    "lt": "<",
    "le": "<=",
    "eq": "==",
    "and": "&",
    "or": "|",
    "xor": "^",
    "shl": "<<",
    "shr": ">>",
}

PLURAL = {Rank.ROW: "row values", Rank.COLUMN: "column values", Rank.MATRIX: "matrices"}
ALONG: dict[object, str] = {"rows": "row", "columns": "column"}


class Listing:
    """A pass as numbered assignments.

    `h0`, `h1`, ... are values that the host computes once a step, `t0`, `t1`, ... those that the
    pass computes for each element.

    Example: of SGD with momentum, the host has `h2 = momentum` and `h3 = 1 - dampening`. Each
    element has `t6 = h2 * momentum_buffer`, `t7 = h3 * t4` and `t8 = t6 + t7`, and the last line is
    `momentum_buffer <- t9`.
    """

    def __init__(self, pass_: Pass, index: int, passes: int) -> None:
        """List the pass of this `index` (from 0) of a program with this many `passes`."""
        self.pass_ = pass_
        self.index = index
        self.passes = passes
        self._order = element_order(pass_.roots)
        self._names: dict[Node, str] = {node: f"h{i}" for i, node in enumerate(pass_.inputs)}
        for i, node in enumerate(self._order):
            if node.op not in LOADS:
                self._names[node] = f"t{i}"

    def text(self) -> str:
        """Return the lines of the listing, with a title."""
        indent = "\n        "
        hosts = [f"h{i} = {self.host(node, top=True)}" for i, node in enumerate(self.pass_.inputs)]
        host_part = indent.join(["    once a step, on the host, in float64:", *hosts])
        domain = self.pass_.domain.name.lower()
        element_part = indent.join([f"    for each {domain}:", *self._element_lines()])
        return f"{self._title()}\n\n{host_part}\n\n{element_part}"

    def _title(self) -> str:
        """Return what the pass reads and what it leaves."""
        pass_ = self.pass_
        reductions = len(pass_.reductions) + len(pass_.sums)
        written = [name for name, _ in pass_.stores]
        loads = ", ".join(str(node.attr) for node in pass_.loads)
        parts = [f"reads {loads}"]
        if reductions:
            parts.append(f"ends in {reductions} reduction{'s' if reductions > 1 else ''}")
        if written:
            parts.append(f"writes {', '.join(written)}")
        parts.append(f"{len(self._order)} operations")
        over = "" if pass_.domain == Rank.ELEMENT else f" over {PLURAL[pass_.domain]}"
        return f"Pass {self.index + 1} of {self.passes}{over}: {'; '.join(parts)}"

    def _element_lines(self) -> list[str]:
        """Return the assignments for each element, and what becomes of their results."""
        named = (node for node in self._order if node in self._names)
        lines = [f"{self._names[node]} = {self._operation(node)}" for node in named]
        lines += [
            f"partial {node.op} of {self._operand(node.args[0])}" for node in self.pass_.reductions
        ]
        for sum_ in self.pass_.sums:
            along = ALONG[sum_.node.attr]
            lines.append(f"{sum_.into} <- {self._operation(sum_.node)} over each {along}")
        for name, root in self.pass_.stores:
            lines.append(f"{name} <- {self._operand(root)}")
        return lines

    def host(self, node: Node, top: bool = False) -> str:
        """Return a host value in full, in the names of the hyper-parameters.

        It is in brackets if it is a sum or the like, unless it stands at the `top` of a line.
        """
        if node.op == "cast":
            return self.host(node.args[0], top)
        if node.op == "hyper" or node.op in FACTS:
            return str(node.attr or node.op)
        if not node.rank.on_host:
            return "..."
        if node.op == "const":
            return f"{node.attr:g}"
        return _spell(node.op, [self.host(arg) for arg in node.args], bare=top)

    def _operand(self, node: Node) -> str:
        """Return what an operand is called: a value's name, a column's, or a constant."""
        if node in self._names:
            return self._names[node]
        return str(node.attr) if node.op in LOADS else f"{node.attr:g}"

    def _operation(self, node: Node) -> str:
        """Return one operation on operands by name."""
        op = f"{node.op}_{node.type}" if node.op in ("cast", "bitcast") else node.op
        return _spell(op, [self._operand(arg) for arg in node.args], bare=True)


def _spell(op: str, args: list[str], bare: bool) -> str:
    """Return an operation as Python would write it; a sum or the like in brackets unless `bare`."""
    if op not in INFIX:
        return f"{op}({', '.join(args)})"
    joined = f" {INFIX[op]} ".join(args)
    return joined if bare else f"({joined})"
