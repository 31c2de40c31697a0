"""Elementwise graphs by torch's operations: many tensors one after another, one call for all.

    p    [a0 a1 a2 b0 b1]        of two parameters with 3 and 2 elements
    lr   [0.1 0.2]               beside elements: [0.1 0.1 0.1 0.2 0.2]

A graph becomes two Python functions. The first computes what is known on the host: numbers, or
arrays with a number for each parameter if these differ. The second computes tensors. There is one
for each outcome of the choices that do not depend on elements (`lr == 0`, a first step), so that
only what is chosen is computed. For `p - lr * g`, with p's bits kept when lr is 0:

    def compute(hypers, sizes, epsilon):         def compute(columns, hosts):   # lr is not 0
        h0 = hypers[0]                               t0 = columns['p']
        h1 = c1                                      t1 = hosts[0]
        h2 = h0 == h1                                t2 = columns['g']
        return [h0, h1, h2]                          t3 = t1 * t2
                                                     t4 = t0 - t3
                                                     return {'p': t4}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..graph.caches import remember
from ..graph.ir import LOADS, Node, topological
from ..graph.trace import Graph
from .single import ON_NUMBERS, ON_TENSORS, choose, compute_dtype

# How a choice came out: for all tensors the first, for all the second, or not the same for all.
FIRST = 1
SECOND = 0
MIXED = 2
# Python's operators are much quicker than NumPy's functions, and do the same with NumPy's numbers
# and arrays.
SYMBOLS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "eq": "=="}
HOST_NAMES = {f"_{op}": function for op, function in ON_NUMBERS.items()}
# `where` of numbers is an array without dimensions.
HOST_NAMES["_where"] = lambda condition, a, b: np.where(condition, a, b)[()]
TENSOR_NAMES = {f"_{op}": function for op, function in ON_TENSORS.items()}
TENSOR_NAMES["_where"] = choose

# A NumPy number or condition, or an array with one for each parameter.
Host = Any


def run(
    graph: Graph,
    columns: Mapping[str, Sequence[Tensor]],
    hypers: Mapping[str, Sequence[float] | float],
) -> tuple[dict[str, Sequence[Tensor]], dict[str, Sequence[float]]]:
    """Return the new values of the columns, in the compute type, and of the graph's scalars.

    `columns` have a real tensor for each parameter, and each column's are of one dtype and device.
    `hypers` have a number for each parameter, or one for all. Nothing is written.
    """
    params = columns["p"]
    shapes = [p.shape for p in params]
    sizes = [shape.numel() for shape in shapes]
    are_flat = all(len(shape) == 1 for shape in shapes)
    flat = {name: _concatenated(column, are_flat) for name, column in columns.items()}
    dtype = compute_dtype(*flat.values())
    flat = {name: t if t.dtype == dtype else t.to(dtype) for name, t in flat.items()}
    functions = make_functions(graph)
    hosts = functions.host(hypers, sizes, torch.finfo(params[0].dtype).eps)
    new = functions.tensors(hosts)(flat, Beside(hosts, sizes, flat["p"]))
    outputs: dict[str, Sequence[Tensor]] = {}
    for name, value in new.items():
        parts = _spread(value, name, flat).split_with_sizes(sizes)
        outputs[name] = parts if are_flat else list(map(Tensor.view, parts, shapes))
    scalars = {
        name: np.broadcast_to(hosts[i], len(params)).tolist() for name, i in functions.scalars
    }
    return outputs, scalars


def _concatenated(tensors: Sequence[Tensor], are_flat: bool) -> Tensor:
    """Return the elements of tensors, one after another."""
    vectors = tensors if are_flat else [t.reshape(-1) for t in tensors]
    return vectors[0] if len(vectors) == 1 else torch.cat(list(vectors))


def _spread(value: Any, name: str, columns: Mapping[str, Tensor]) -> Tensor:
    """Return a column's new values, in memory that storing the other columns does not change."""
    if not isinstance(value, Tensor):
        return torch.full_like(columns["p"], value)
    if any(value is column for other, column in columns.items() if other != name):
        return value.clone()
    return value


class Beside:
    """The host's values as they stand beside elements, by their index.

    Each is one number for all elements, or a tensor with one for each element if the parameters'
    numbers differ.
    """

    def __init__(self, hosts: Sequence[Host], sizes: Sequence[int], like: Tensor) -> None:
        self._hosts = hosts
        self._sizes = sizes
        self._like = like

    def __getitem__(self, i: int) -> Any:
        """Return a host's value, in the type and on the device of the elements."""
        value = self._hosts[i]
        if not isinstance(value, np.ndarray):
            return value.item()
        if value.dtype != np.bool_:
            is_wide = self._like.dtype == torch.float64
            value = value.astype(np.float64 if is_wide else np.float32)
        repeated = np.repeat(value, self._sizes)
        return torch.from_numpy(repeated).to(self._like.device)


class Functions:
    """A graph as Python functions: one of numbers, and one of tensors for each outcome of choices.

    `scalars` are the graph's scalars with the index of their values among the hosts' values.
    """

    def __init__(self, graph: Graph) -> None:
        nodes = topological(graph.roots)
        on_host = [node for node in nodes if node.rank.on_host]
        self._outputs = graph.outputs
        self._index = {node: i for i, node in enumerate(on_host)}
        self._choices = [node for node in nodes if _is_choice_of_tensors(node)]
        self._conditions = [self._index[node.args[0]] for node in self._choices]
        self.scalars = [(name, self._index[node]) for name, node in graph.scalars]
        self._names = [str(node.attr) for node in on_host if node.op == "hyper"]
        constants = {
            f"c{i}": np.asarray(node.attr)[()]
            for node, i in self._index.items()
            if node.op == "const"
        }
        self._host = _define(_host_source(self._index), HOST_NAMES | constants)
        self._tensors: dict[tuple[int, ...], Callable[..., dict[str, Any]]] = {}

    def host(
        self, hypers: Mapping[str, Sequence[float] | float], sizes: Sequence[int], epsilon: float
    ) -> list[Host]:
        """Return the values of all nodes that are known on the host.

        `epsilon` is that of the parameters' own dtype.
        """
        with np.errstate(all="ignore"):
            return self._host(
                [_as_host(hypers[name]) for name in self._names],
                _as_host(sizes),
                np.float64(epsilon),
            )

    def tensors(self, hosts: Sequence[Host]) -> Callable[..., dict[str, Any]]:
        """Return the function of columns and `Beside`, for choices that come out as they do now."""
        outcomes = tuple(_outcome(hosts[i]) for i in self._conditions)
        function = self._tensors.get(outcomes)
        if function is None:
            known = dict(zip(self._choices, outcomes, strict=True))
            source = _tensor_source(self._outputs, self._index, known)
            function = _define(source, TENSOR_NAMES)
            self._tensors[outcomes] = function
        return function


def _is_choice_of_tensors(node: Node) -> bool:
    """Whether a node chooses between tensors, by a condition that is known on the host."""
    return node.op == "where" and not node.rank.on_host and node.args[0].rank.on_host


@remember(most=64)
def make_functions(graph: Graph) -> Functions:
    """Return an elementwise graph's functions."""
    return Functions(graph)


def _as_host(numbers: Sequence[float] | float) -> Host:
    """Return one number for all parameters, or an array if they have different ones."""
    if not isinstance(numbers, Sequence):
        return np.float64(numbers)
    if numbers.count(numbers[0]) == len(numbers):
        return np.float64(numbers[0])
    return np.asarray(numbers, np.float64)


def _outcome(condition: Host) -> int:
    """Return what a condition chooses."""
    if not isinstance(condition, np.ndarray):
        return FIRST if condition else SECOND
    if condition.all():
        return FIRST
    return MIXED if condition.any() else SECOND


def _define(source: str, names: Mapping[str, Any]) -> Callable[..., Any]:
    """Return the function `compute` of this text, which may use these names."""
    scope = dict(names)
    exec(source, scope)
    return scope["compute"]


def _host_source(index: Mapping[Node, int]) -> str:
    """Return `compute(hypers, sizes, epsilon)`, which returns the values of all nodes in order."""
    lines = ["def compute(hypers, sizes, epsilon):"]
    hypers = 0
    for node, i in index.items():
        if node.op == "hyper":
            value = f"hypers[{hypers}]"
            hypers += 1
        elif node.op == "const":
            value = f"c{i}"
        elif node.op == "numel":
            value = "sizes"
        elif node.op == "epsilon":
            value = "epsilon"
        else:
            value = _operation(node.op, [f"h{index[argument]}" for argument in node.args])
        lines.append(f"    h{i} = {value}")
    values = ", ".join(f"h{i}" for i in index.values())
    return "\n".join([*lines, f"    return [{values}]"])


def _tensor_source(
    outputs: Sequence[tuple[str, Node]], index: Mapping[Node, int], outcomes: Mapping[Node, int]
) -> str:
    """Return `compute(columns, hosts)`, which returns the new columns.

    If a choice is known, what is chosen stands for it.
    """
    lines = ["def compute(columns, hosts):"]
    names: dict[Node, str] = {}
    stack = [root for _, root in reversed(outputs)]
    while stack:
        node = _chosen(stack[-1], outcomes)
        args: list[Node] = []
        if node not in index:
            args = [_chosen(argument, outcomes) for argument in node.args]
        if node not in names:
            missing = [argument for argument in args if argument not in names]
            if missing:
                stack += reversed(missing)
                continue
            if node in index:
                value = f"hosts[{index[node]}]"
            elif node.op in LOADS:
                value = f"columns[{node.attr!r}]"
            else:
                value = _operation(node.op, [names[argument] for argument in args])
            names[node] = f"t{len(names)}"
            lines.append(f"    {names[node]} = {value}")
        stack.pop()
    entries = [f"{name!r}: {names[_chosen(root, outcomes)]}" for name, root in outputs]
    return "\n".join([*lines, f"    return {{{', '.join(entries)}}}"])


def _chosen(node: Node, outcomes: Mapping[Node, int]) -> Node:
    """Return what stands for a node when choices have come out the same for all tensors."""
    while outcomes.get(node, MIXED) != MIXED:
        node = node.args[1] if outcomes[node] == FIRST else node.args[2]
    return node


def _operation(op: str, args: Sequence[str]) -> str:
    """Return an operation as Python text."""
    if op in SYMBOLS:
        return f"{args[0]} {SYMBOLS[op]} {args[1]}"
    return f"_{op}({', '.join(args)})"
