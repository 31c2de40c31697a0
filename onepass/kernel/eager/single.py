"""Graphs by torch's operations, one call for each node: any device, any class of tensor.

It runs a finished `Graph`, not a bound program. Storage formats are torch's own conversions. Every
operation is one that autograd can follow (`differentiable`) and a CUDA graph can capture
(`capturable`): hyper-parameters that are tensors stay tensors, and nothing is read back to the
host. For `p - lr * g` with p in bfloat16, g in bfloat16 and lr = 0.1:

    hyper lr    0.1                     a number
    load g      g.to(float32)           a tensor in the compute type
    mul         0.1 * g                 operator.mul
    load p      p.to(float32)
    sub         p - (0.1 * g)           operator.sub; the caller stores it, rounded to bfloat16

Elementwise graphs have a quicker way, for many tensors together: `foreach`.
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
    # A known condition may stand beside a tensor of conditions: torch's operators take Python's
    # bool on either side.
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": torch.logical_not,
    "where": torch.where,
}

# What a graph may ask about the parameter.
PARAMETER_FACTS: dict[str, Callable[[Tensor], float]] = {
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
    """Return the type of the arithmetic: float64 if one of the columns is, else float32."""
    is_wide = any(t.dtype == torch.float64 for t in tensors)
    return torch.float64 if is_wide else torch.float32


def run(
    graph: Graph, columns: Mapping[str, Tensor], hypers: Mapping[str, Tensor | float]
) -> tuple[dict[str, Tensor], dict[str, Tensor | float]]:
    """Return the new values of the columns, in the compute type, and of the graph's scalars.

    `columns` are those of one parameter, and real (the caller views complex ones as real). `hypers`
    are numbers, or tensors of one element if autograd or a graph capture must see them. Nothing is
    written.
    """
    evaluation = Evaluation(columns, hypers)
    values = evaluation.evaluate(graph)
    p = columns["p"]
    new: dict[str, Tensor] = {}
    for name, root in graph.outputs:
        if p.numel():
            shape = shape_at(graph.rank(name), p.shape)
            new[name] = evaluation.spread(values[root], name, shape)
        else:
            # An empty tensor has no means: it keeps what it has for its rows and columns.
            new[name] = columns[name]
    return new, {name: values[root] for name, root in graph.scalars}


class Evaluation:
    """A graph's values for one parameter, each computed when something needs it.

    `columns` are in the compute type, `dtype`; `p` is the parameter as it is stored.
    """

    def __init__(self, columns: Mapping[str, Tensor], hypers: Mapping[str, Tensor | float]) -> None:
        """Take what `run` takes, and convert the columns."""
        self.hypers = hypers
        self.p = columns["p"]
        self.dtype = compute_dtype(*columns.values())
        self.columns = {
            name: t if t.dtype == self.dtype else t.to(self.dtype) for name, t in columns.items()
        }

    def evaluate(self, graph: Graph) -> dict[Node, Value]:
        """Return the roots' values.

        If a choice does not depend on elements, only what is chosen is computed: with lr = 0.1,
        `where(lr == 0, kept, new)` computes `lr == 0`, finds False, and then computes only `new`.

        A value is dropped when its last user has been computed, so that its memory can be used
        again. For `p - lr * g` the product lives until the difference is known.
        """
        values: dict[Node, Value] = {}
        uses = dict(_uses(graph))
        stack = graph.roots[::-1]
        while stack:
            node = stack[-1]
            if node in values:
                stack.pop()
                continue
            missing = [argument for argument in _needed(node, values) if argument not in values]
            if missing:
                stack += reversed(missing)
                continue
            stack.pop()
            values[node] = self._value(node, values)
            for argument in node.args:
                uses[argument] -= 1
                if not uses[argument]:
                    # Its memory serves the next values.
                    values.pop(argument, None)
        return values

    def _value(self, node: Node, values: Mapping[Node, Value]) -> Value:
        """Return a node's value, from those of its arguments."""
        if node.op in LOADS:
            return self.columns[str(node.attr)]
        if node.op == "hyper":
            value = self.hypers[str(node.attr)]
            if isinstance(value, Tensor):
                return value.reshape(()).to(_widest(value))
            return float(value)
        if node.op == "const":
            return node.attr  # type: ignore[return-value]
        if node.op in PARAMETER_FACTS:
            return float(PARAMETER_FACTS[node.op](self.p))
        if node.op == "where":
            condition = values[node.args[0]]
            if isinstance(condition, Tensor):
                return choose(condition, values[node.args[1]], values[node.args[2]])
            # The other choice has not been computed.
            return values[node.args[1 if condition else 2]]
        args = [values[argument] for argument in node.args]
        if node.op == "call":
            return _call(node.attr, args)  # type: ignore[arg-type]
        if node.op in REDUCTIONS:
            shape = shape_at(node.args[0].rank, self.p.shape)
            return _reduce(node, self.spread(args[0], "", shape))
        return apply(node.op, args)

    def spread(self, value: Value, name: str, shape: Sequence[int]) -> Tensor:
        """Return a value for each place of a column of this shape, in the compute type.

        Storing other columns than the one with this name does not change it.
        """
        if not isinstance(value, Tensor):
            return torch.full(tuple(shape), value, dtype=self.dtype, device=self.p.device)
        if any(value is t for column, t in self.columns.items() if column != name):
            value = value.clone()
        value = value if value.dtype == self.dtype else value.to(self.dtype)
        return value if value.shape == shape else value.expand(tuple(shape))


@remember(most=64)
def _uses(graph: Graph) -> Mapping[Node, int]:
    """Return how often each node's value is used."""
    nodes = topological(graph.roots)
    uses = Counter(argument for node in nodes for argument in node.args)
    uses.update(graph.roots)
    return uses


def _needed(node: Node, values: Mapping[Node, Value]) -> Sequence[Node]:
    """Return the arguments that a node's value depends on, as far as that is known."""
    if node.op != "where":
        return node.args
    condition = values.get(node.args[0])
    if condition is None:
        return node.args[:1]
    if isinstance(condition, Tensor):
        return node.args
    return node.args[1:2] if condition else node.args[2:]


def apply(op: str, args: Sequence[Value]) -> Value:
    """Return what an operation makes of values: a tensor if one of them is a tensor.

    Between numbers it follows NumPy, where 0 / 0 is NaN and not an error.
    """
    if any(isinstance(argument, Tensor) for argument in args):
        return ON_TENSORS[op](*args)
    with np.errstate(all="ignore"):
        arrays = (np.asarray([argument]) for argument in args)
        return ON_NUMBERS[op](*arrays)[0].item()


def _call(function: Callable[..., Tensor], args: Sequence[Value]) -> Tensor:
    """Return what a function makes of one tensor's matrices; numbers may be tensors."""
    x, *numbers = args
    assert isinstance(x, Tensor)
    if not x.numel():
        return x
    matrices = x.reshape(-1, *x.shape[-2:])
    return call_function(function, matrices, *numbers).reshape(x.shape)


def choose(condition: Tensor, a: Value, b: Value) -> Tensor:
    """Return the first value if the condition holds, else the second, for each element."""
    if not (isinstance(a, Tensor) or isinstance(b, Tensor)):
        # torch.where of two numbers has the default dtype, which may be too narrow for them.
        a = torch.full_like(condition, a, dtype=_widest(condition))
    return torch.where(condition, a, b)


def _reduce(node: Node, x: Tensor) -> Value:
    """Return a sum or a largest value, over a tensor or along a dimension that becomes 1.

    Of a tensor (2, 3, 5), `attr` "rows" makes (2, 3, 1), "columns" (2, 1, 5), and none ().
    """
    if node.rank == Rank.TENSOR:
        if x.numel() == 0:
            return 0.0
        return x.sum(dtype=_widest(x)) if node.op == "sum" else torch.amax(x)
    dim = -1 if node.attr == "rows" else -2
    if node.op == "sum":
        total = x.sum(dim, keepdim=True, dtype=_widest(x))
        return total.to(x.dtype)
    if not x.shape[dim]:
        # Zeros: torch.amax of nothing raises.
        return x.sum(dim, keepdim=True)
    return torch.amax(x, dim, keepdim=True)


def _widest(x: Tensor) -> torch.dtype:
    """Return the widest type of a tensor's device; Apple's GPUs have no float64."""
    return torch.float32 if x.device.type == "mps" else torch.float64
