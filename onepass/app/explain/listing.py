"""A pass as text: numbered assignments in the order in which they are computed."""

from __future__ import annotations

from ...kernel.graph.ir import FACTS, LOADS, Node, Rank
from ...kernel.graph.passes import Pass, element_order

INFIX = dict(
    zip(
        ("add", "sub", "mul", "div", "pow", "lt", "le", "eq", "and", "or", "xor", "shl", "shr"),
        ("+", "-", "*", "/", "**", "<", "<=", "==", "&", "|", "^", "<<", ">>"),
        strict=True,
    )
)

PLURAL = {Rank.ROW: "row values", Rank.COLUMN: "column values", Rank.MATRIX: "matrices"}
ALONG: dict[object, str] = {"rows": "row", "columns": "column"}


class Listing:
    """A pass as numbered assignments: `h` for host values, `t` for what is computed for each
    element."""

    def __init__(self, one: Pass, k: int, passes: int) -> None:
        self.one, self.k, self.passes = one, k, passes
        self.names: dict[Node, str] = {node: f"h{i}" for i, node in enumerate(one.inputs)}

    def text(self) -> str:
        """The lines of the listing, with a title."""
        stored = [name for name, _ in self.one.stores]
        order = element_order(self.one.roots)
        count = len(self.one.reductions) + len(self.one.sums)
        ends = [f"ends in {count} reductions"] if count else []
        ends += [f"writes {', '.join(stored)}"] if stored else []
        loads = ", ".join(str(node.attr) for node in self.one.loads)
        over = "" if self.one.domain == Rank.ELEMENT else f" over {PLURAL[self.one.domain]}"
        title = (
            f"Pass {self.k + 1} of {self.passes}{over}: reads {loads}; {'; '.join(ends)}; "
            f"{len(order)} operations"
        )
        lines = [title, "", "    once a step, on the host, in float64:"]
        lines += [
            f"        h{i} = {self.host(node, top=True)}" for i, node in enumerate(self.one.inputs)
        ]
        lines += ["", f"    for each {self.one.domain.name.lower()}:"]
        for i, node in enumerate(order):
            if node.op not in LOADS:
                self.names[node] = f"t{i}"
        lines += [
            f"        {self.names[node]} = {self.spell(node)}"
            for node in order
            if node in self.names
        ]
        lines += [
            f"        partial {node.op} of {self.element(node.args[0])}"
            for node in self.one.reductions
        ]
        lines += [
            f"        {s.into} <- {self.spell(s.node)} over each {ALONG[s.node.attr]}"
            for s in self.one.sums
        ]
        lines += [f"        {name} <- {self.element(root)}" for name, root in self.one.stores]
        return "\n".join(lines)

    def host(self, node: Node, top: bool = False) -> str:
        """A host value in full, in the names of the hyper-parameters."""
        if node.op == "cast":
            return self.host(node.args[0], top)
        if node.op == "hyper" or node.op in FACTS:
            return str(node.attr or node.op)
        if not node.rank.on_host:
            return "..."
        args = [self.host(a) for a in node.args]
        return f"{node.attr:g}" if node.op == "const" else _spell(node.op, args, bare=top)

    def element(self, node: Node) -> str:
        """How an operand is called."""
        if node in self.names:
            return self.names[node]
        return str(node.attr) if node.op in LOADS else f"{node.attr:g}"

    def spell(self, node: Node) -> str:
        """One operation on named operands."""
        args = [self.element(a) for a in node.args]
        return _spell(
            node.op if node.op not in ("cast", "bitcast") else f"{node.op}_{node.type}",
            args,
            bare=True,
        )


def _spell(op: str, args: list[str], bare: bool) -> str:
    if op in INFIX:
        joined = f" {INFIX[op]} ".join(args)
        return joined if bare else f"({joined})"
    return f"{op}({', '.join(args)})"
