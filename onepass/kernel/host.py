"""Host values: the nodes below element rank, evaluated over rows in float64 by NumPy, once a step.

A row is one setting of the hyper-parameters (a group at a step count); all rows are evaluated in one go, so that 400
groups cost about as much as one. Arrays are used even for a single row: NumPy's scalar and array routines may round
`pow` differently, and a result must not depend on how parameters are grouped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from .ir import REDUCTIONS, Node, topological

OPERATIONS: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "neg": np.negative,
    "abs": np.abs,
    "sqrt": np.sqrt,
    "floor": np.floor,
    "rint": np.rint,
    "pow": np.power,
    "exp": np.exp,
    "log": np.log,
    "lt": np.less,
    "le": np.less_equal,
    "eq": np.equal,
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
    "not": np.logical_not,
    "where": np.where,
    # The rounding to the compute type happens where the table is written.
    "cast": lambda x: x,
}


class HostCode:
    """The roots' computation as a list of NumPy calls over numbered slots."""

    def __init__(self, roots: Sequence[Node], known: Sequence[Node] = ()) -> None:
        """`known` are nodes whose values the caller supplies (reductions of earlier passes)."""
        order = topological(roots)
        stop = set(known)
        needed: set[Node] = set()
        stack = list(roots)
        while stack:
            node = stack.pop()
            if node not in needed:
                needed.add(node)
                stack.extend(() if node in stop else node.args)
        order = [node for node in order if node in needed]
        slot = {node: i for i, node in enumerate(order)}
        self.size = len(order)
        self.constants = [(slot[n], np.float64(n.attr)) for n in order if n.op == "const"]  # type: ignore[arg-type]
        self.leaves = [(slot[n], str(n.attr) if n.op == "hyper" else n.op) for n in order if n.op in ("hyper", "numel")]
        self.known = [slot.get(n) for n in known]
        skipped = (*REDUCTIONS, "const", "hyper", "numel")
        self.calls = [(slot[n], OPERATIONS[n.op], [slot[a] for a in n.args]) for n in order if n.op not in skipped]
        self.roots = [slot[n] for n in roots]

    def run(self, leaves: Mapping[str, np.ndarray], known: Sequence[np.ndarray], table: np.ndarray) -> None:
        """Fill table[row, root], rounding each value once to the table's type."""
        values: list = [None] * self.size
        for i, constant in self.constants:
            values[i] = constant
        for i, name in self.leaves:
            values[i] = leaves[name]
        for i, value in zip(self.known, known, strict=True):
            if i is not None:
                values[i] = value
        with np.errstate(all="ignore"):
            for i, function, args in self.calls:
                values[i] = function(*[values[a] for a in args])
            for column, i in enumerate(self.roots):
                table[:, column] = values[i]
