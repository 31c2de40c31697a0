"""Backend 1: one torch call a node, on any device and tensor type, under autograd where wanted.

It runs a finished `Graph`, not a bound program: storage formats are torch's own conversions, and every operation is one
that autograd can follow (`differentiable`) and a CUDA graph can capture (`capturable`: hyper-parameters that are
tensors stay tensors, and nothing is read back to the host).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .ir import LOADS, Node, Rank, topological
from .memory import call_function, shape_at
from .program import Graph

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
    """The type of the arithmetic for columns stored like these: float64 if one of them is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def run(graph: Graph, columns: Mapping[str, Tensor], hypers: Mapping[str, Value]) -> dict[str, Tensor]:
    """The new values of the columns and scalars that the graph writes, in the compute type. Writes nothing.

    `columns` are one tensor's, real (complex ones are viewed as real by the caller); `hypers` are numbers, or tensors
    of one element where autograd or a graph capture must see them.
    """
    dtype = compute_dtype(*columns.values())
    values: dict[Node, Value] = {}
    for node in topological(graph.roots):
        if node.op in LOADS:
            values[node] = columns[str(node.attr)].to(dtype)
        elif node.op == "hyper":
            value = hypers[str(node.attr)]
            values[node] = value.reshape(()).to(_widest(value)) if isinstance(value, Tensor) else float(value)
        elif node.op == "const":
            values[node] = node.attr  # type: ignore[assignment]
        elif node.op in FACTS:
            values[node] = float(FACTS[node.op](columns["p"]))
        elif node.op == "call":
            values[node] = _call(node.attr, [values[a] for a in node.args])  # type: ignore[arg-type]
        else:
            values[node] = _apply(node, [values[a] for a in node.args])
    p = columns["p"]
    new = {name: _at(values[root], shape_at(graph.rank(name), p.shape), p, dtype) for name, root in graph.outputs}
    # The means of no elements are no news: a tensor without any keeps what it has for its rows and columns.
    new = new if p.numel() else {name: columns[name] for name in new}
    return new | {name: torch.as_tensor(values[root], dtype=torch.float64) for name, root in graph.scalars}


def _call(function: Callable[..., Tensor], args: list[Value]) -> Tensor:
    """A function of whole matrices, of one tensor's; numbers that are tensors stay tensors."""
    x, *numbers = args
    assert isinstance(x, Tensor)
    if not x.numel():
        return x
    return call_function(function, x.reshape(-1, *x.shape[-2:]), *numbers).reshape(x.shape)


def _apply(node: Node, args: list[Value]) -> Value:
    if not any(isinstance(a, Tensor) for a in args):
        with np.errstate(all="ignore"):
            value = ON_NUMBERS[node.op](*(np.asarray([a]) for a in args))[0]
        return bool(value) if node.type == "bool" else float(value)
    if node.op == "where" and not isinstance(args[0], Tensor):
        return args[1] if args[0] else args[2]
    if node.op in ("and", "or", "xor"):
        # A known condition beside a tensor of them: torch's operators take Python's bool on either side.
        return ON_TENSORS[node.op](*args)
    if node.op in ("sum", "amax") and isinstance(args[0], Tensor):
        return _reduce(node, args[0])
    if node.op == "where" and not any(isinstance(a, Tensor) for a in args[1:]):
        # torch.where of two numbers has the default dtype, which may be too narrow for them.
        args[1] = torch.full_like(args[0], args[1], dtype=_widest(args[0]))  # type: ignore[arg-type]
        return torch.where(args[0], args[1], args[2])  # type: ignore[arg-type]
    return ON_TENSORS[node.op](*args)


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


def _at(value: Value, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    """A value for each place of a column of this shape."""
    if isinstance(value, Tensor):
        return value.to(dtype).expand(shape)
    return torch.full(shape, value, dtype=dtype, device=like.device)
