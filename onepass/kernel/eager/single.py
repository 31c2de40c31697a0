"""Backend 1: torch's operations, one call a node, on any device and class of tensor, under autograd
where wanted.

It runs a finished `Graph`, not a bound program: storage formats are torch's own conversions, and
every operation is one that autograd can follow (`differentiable`) and a CUDA graph can capture
(`capturable`: hyper-parameters that are tensors stay tensors, and nothing is read back to the
host).

Graphs in which each element goes its own way have a quicker way, for many tensors together:
`elementwise.py`.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..graph.caches import remember
from ..graph.ir import LOADS, REDUCTIONS, Node, Rank, topological
from ..graph.trace import Graph
from ..tensors.memory import call_function, shape_at

ON_TENSORS: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "neg": operator.neg,
    "abs": operator.abs,
    "sqrt": torch.sqrt,
    "floor": torch.floor,
    "rint": torch.round,
    "pow": operator.pow,
    "exp": torch.exp,
    "log": torch.log,
    "lt": operator.lt,
    "le": operator.le,
    "eq": operator.eq,
    # A known condition beside a tensor of them: torch's operators take Python's bool on either
    # side.
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": torch.logical_not,
    "where": torch.where,
}

FACTS: dict[str, Callable[[Tensor], float]] = {
    "numel": Tensor.numel,
    "rows": lambda p: p.shape[-2],
    "columns": lambda p: p.shape[-1],
    "epsilon": lambda p: torch.finfo(p.dtype).eps,
}

ON_NUMBERS: dict[str, Callable[..., np.ndarray]] = {
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
}

Value = Tensor | float | bool


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """The type of the arithmetic for columns stored like these: float64 if one of them is, else
    float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def run(
    graph: Graph, columns: Mapping[str, Tensor], hypers: Mapping[str, Tensor | float]
) -> tuple[dict[str, Tensor], dict[str, Tensor | float]]:
    """The new values of the columns, in the compute type, and of the scalars that the graph writes.
    Writes nothing.

    `columns` are one tensor's, real (complex ones are viewed as real by the caller); `hypers` are
    numbers, or tensors of one element where autograd or a graph capture must see them.
    """
    evaluation = Evaluation(columns, hypers)
    values = evaluation.evaluate(graph)
    p = columns["p"]
    new: dict[str, Tensor] = {}
    for name, root in graph.outputs:
        # The means of an empty tensor do not exist: it keeps what it has for its rows and columns.
        shape = shape_at(graph.rank(name), p.shape)
        new[name] = evaluation.spread(values[root], name, shape) if p.numel() else columns[name]
    return new, {name: values[root] for name, root in graph.scalars}


class Evaluation:
    """Nodes and their values, each computed when something needs it."""

    def __init__(self, columns: Mapping[str, Tensor], hypers: Mapping[str, Tensor | float]) -> None:
        self.hypers, self.p = hypers, columns["p"]
        self.dtype = compute_dtype(*columns.values())
        self.columns = {
            name: t if t.dtype == self.dtype else t.to(self.dtype) for name, t in columns.items()
        }

    def evaluate(self, graph: Graph) -> dict[Node, Value]:
        """The roots' values. Of a choice that does not depend on elements only what is chosen is
        computed."""
        values: dict[Node, Value] = {}
        uses = dict(_uses(graph))
        stack = graph.roots[::-1]
        while stack:
            node = stack[-1]
            wanted = () if node in values else [a for a in _chosen(node, values) if a not in values]
            if wanted:
                stack += reversed(wanted)
                continue
            stack.pop()
            if node not in values:
                values[node] = self._value(node, values)
                for a in node.args:
                    uses[a] -= 1
                    if not uses[a]:
                        # Its memory serves the next values.
                        values.pop(a, None)
        return values

    def _value(self, node: Node, values: Mapping[Node, Value]) -> Value:
        if node.op in LOADS:
            return self.columns[str(node.attr)]
        if node.op == "hyper":
            value = self.hypers[str(node.attr)]
            return (
                value.reshape(()).to(_widest(value)) if isinstance(value, Tensor) else float(value)
            )
        if node.op == "const":
            return node.attr  # type: ignore[return-value]
        if node.op in FACTS:
            return float(FACTS[node.op](self.p))
        if node.op == "where":
            condition = values[node.args[0]]
            if isinstance(condition, Tensor):
                return choose(condition, values[node.args[1]], values[node.args[2]])
            # The other choice has not been computed.
            return values[node.args[1 if condition else 2]]
        args = [values[a] for a in node.args]
        if node.op == "call":
            return _call(node.attr, args)  # type: ignore[arg-type]
        if node.op in REDUCTIONS:
            return _reduce(
                node, self.spread(args[0], "", shape_at(node.args[0].rank, self.p.shape))
            )
        return apply(node.op, args)

    def spread(self, value: Value, name: str, shape: Sequence[int]) -> Tensor:
        """A value for each place of a column of this shape, in the compute type, which storing
        other columns leaves."""
        if not isinstance(value, Tensor):
            return torch.full(tuple(shape), value, dtype=self.dtype, device=self.p.device)
        if any(value is t for column, t in self.columns.items() if column != name):
            value = value.clone()
        value = value if value.dtype == self.dtype else value.to(self.dtype)
        return value if value.shape == shape else value.expand(tuple(shape))


@remember(most=64)
def _uses(graph: Graph) -> Mapping[Node, int]:
    """How often each node's value is used."""
    uses = Counter(a for node in topological(graph.roots) for a in node.args)
    uses.update(graph.roots)
    return uses


def _chosen(node: Node, values: Mapping[Node, Value]) -> Sequence[Node]:
    """The arguments that a node's value depends on, as far as that is known."""
    if node.op != "where":
        return node.args
    condition = values.get(node.args[0])
    if condition is None:
        return node.args[:1]
    if isinstance(condition, Tensor):
        return node.args
    return node.args[1:2] if condition else node.args[2:]


def apply(op: str, args: Sequence[Value]) -> Value:
    """An operation on values. Numbers among themselves follow NumPy, where 0 / 0 is a number."""
    if any(isinstance(a, Tensor) for a in args):
        return ON_TENSORS[op](*args)
    with np.errstate(all="ignore"):
        return ON_NUMBERS[op](*(np.asarray([a]) for a in args))[0].item()


def _call(function: Callable[..., Tensor], args: Sequence[Value]) -> Tensor:
    """A function of whole matrices, of one tensor's; numbers that are tensors stay tensors."""
    x, *numbers = args
    assert isinstance(x, Tensor)
    if not x.numel():
        return x
    return call_function(function, x.reshape(-1, *x.shape[-2:]), *numbers).reshape(x.shape)


def choose(condition: Tensor, a: Value, b: Value) -> Tensor:
    """Where a condition holds the first value, elsewhere the second."""
    if not (isinstance(a, Tensor) or isinstance(b, Tensor)):
        # torch.where of two numbers has the default dtype, which may be too narrow for them.
        a = torch.full_like(condition, a, dtype=_widest(condition))
    return torch.where(condition, a, b)


def _reduce(node: Node, x: Tensor) -> Value:
    if node.rank == Rank.TENSOR:
        if x.numel() == 0:
            return 0.0
        return x.sum(dtype=_widest(x)) if node.op == "sum" else torch.amax(x)
    dim = -1 if node.attr == "rows" else -2
    if node.op == "sum":
        return x.sum(dim, keepdim=True, dtype=_widest(x)).to(x.dtype)
    return torch.amax(x, dim, keepdim=True) if x.shape[dim] else x.sum(dim, keepdim=True)


def _widest(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64
