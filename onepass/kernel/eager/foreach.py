"""Backend 1 for graphs in which each element goes its own way: many tensors in a row, one call of
torch for all.

    p    [a0 a1 a2 b0 b1]        of two parameters with 3 and 2 elements
    lr   [0.1 0.2]               beside elements: [0.1 0.1 0.1 0.2 0.2]

A graph becomes two Python functions. The first computes what is known on the host: numbers, or
arrays with a number for each parameter where these differ. The second computes tensors. There is
one for each outcome of the choices that do not depend on elements (`lr == 0`, a first step), so
that only what is chosen is computed.
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
FIRST, SECOND, MIXED = 1, 0, 2
# Python's operators are much quicker than NumPy's functions, and do the same with NumPy's numbers
# and arrays.
SYMBOLS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "eq": "=="}
HOST_NAMES = {f"_{op}": function for op, function in ON_NUMBERS.items()}
# `where` of numbers is an array without dimensions.
HOST_NAMES["_where"] = lambda condition, a, b: np.where(condition, a, b)[()]
TENSOR_NAMES = {f"_{op}": function for op, function in ON_TENSORS.items()}
TENSOR_NAMES["_where"] = choose

Host = Any  # a NumPy number or condition, or an array with one for each parameter


def run(
    graph: Graph,
    columns: Mapping[str, Sequence[Tensor]],
    hypers: Mapping[str, Sequence[float] | float],
) -> tuple[dict[str, Sequence[Tensor]], dict[str, Sequence[float]]]:
    """The new values of the columns, in the compute type, and of the scalars that the graph writes.
    Writes nothing.

    `columns` have a real tensor for each parameter, in each column of one dtype and device;
    `hypers` have a number for each, or one for all.
    """
    params = columns["p"]
    shapes = [p.shape for p in params]
    sizes = [shape.numel() for shape in shapes]
    are_flat = all(len(shape) == 1 for shape in shapes)
    rows = {name: _in_a_row(column, are_flat) for name, column in columns.items()}
    dtype = compute_dtype(*rows.values())
    rows = {name: row if row.dtype == dtype else row.to(dtype) for name, row in rows.items()}
    compiled = compile(graph)
    hosts = compiled.host(hypers, sizes, torch.finfo(params[0].dtype).eps)
    new = compiled.tensors(hosts)(rows, Beside(hosts, sizes, rows["p"]))
    outputs: dict[str, Sequence[Tensor]]
    outputs = {
        name: _spread(value, name, rows).split_with_sizes(sizes) for name, value in new.items()
    }
    if not are_flat:
        outputs = {name: list(map(Tensor.view, parts, shapes)) for name, parts in outputs.items()}
    return outputs, {
        name: np.broadcast_to(hosts[i], len(params)).tolist() for name, i in compiled.scalars
    }


def _in_a_row(tensors: Sequence[Tensor], are_flat: bool) -> Tensor:
    """The elements of tensors, one after another."""
    flat = tensors if are_flat else [t.reshape(-1) for t in tensors]
    return flat[0] if len(flat) == 1 else torch.cat(list(flat))


def _spread(value: Any, name: str, rows: Mapping[str, Tensor]) -> Tensor:
    """A column's new values, in memory that storing the other columns leaves alone."""
    if not isinstance(value, Tensor):
        return torch.full_like(rows["p"], value)
    return (
        value.clone()
        if any(value is row for other, row in rows.items() if other != name)
        else value
    )


class Beside:
    """Hosts' values as they stand beside elements: one number for all, or where they differ one for
    each element."""

    def __init__(self, hosts: Sequence[Host], sizes: Sequence[int], like: Tensor) -> None:
        self._hosts, self._sizes, self._like = hosts, sizes, like

    def __getitem__(self, i: int) -> Any:
        value = self._hosts[i]
        if not isinstance(value, np.ndarray):
            return value.item()
        if value.dtype != np.bool_:
            value = value.astype(np.float64 if self._like.dtype == torch.float64 else np.float32)
        return torch.from_numpy(np.repeat(value, self._sizes)).to(self._like.device)


class Compiled:
    """A graph as Python functions: one of numbers, and one of tensors for each outcome of its
    choices."""

    def __init__(self, graph: Graph) -> None:
        self._outputs = graph.outputs
        nodes = topological(graph.roots)
        on_host = [node for node in nodes if node.rank.on_host]
        self._place = {node: i for i, node in enumerate(on_host)}
        self._choices = [
            n
            for n in nodes
            if n.op == "where" and n not in self._place and n.args[0] in self._place
        ]
        self._conditions = [self._place[node.args[0]] for node in self._choices]
        self.scalars = [(name, self._place[node]) for name, node in graph.scalars]
        self._names = [str(node.attr) for node in on_host if node.op == "hyper"]
        constants = {
            f"c{i}": np.asarray(node.attr)[()]
            for node, i in self._place.items()
            if node.op == "const"
        }
        self._host = _define(_host_source(self._place), HOST_NAMES | constants)
        self._tensors: dict[tuple[int, ...], Callable[..., dict[str, Any]]] = {}

    def host(
        self, hypers: Mapping[str, Sequence[float] | float], sizes: Sequence[int], epsilon: float
    ) -> list[Host]:
        """The values of all nodes that are known on the host; `epsilon` is that of the parameters'
        own dtype."""
        with np.errstate(all="ignore"):
            return self._host(
                [_as_host(hypers[name]) for name in self._names],
                _as_host(sizes),
                np.float64(epsilon),
            )

    def tensors(self, hosts: Sequence[Host]) -> Callable[..., dict[str, Any]]:
        """The function of columns and of hosts' values beside them, for choices that come out as
        they do now."""
        outcomes = tuple(_outcome(hosts[i]) for i in self._conditions)
        function = self._tensors.get(outcomes)
        if function is None:
            source = _tensor_source(
                self._outputs, self._place, dict(zip(self._choices, outcomes, strict=True))
            )
            function = self._tensors[outcomes] = _define(source, TENSOR_NAMES)
        return function


@remember(most=64)
def compile(graph: Graph) -> Compiled:
    """An elementwise graph's functions."""
    return Compiled(graph)


def _as_host(numbers: Sequence[float] | float) -> Host:
    """One number for all parameters, or an array where they have different ones."""
    if not isinstance(numbers, Sequence):
        return np.float64(numbers)
    if numbers.count(numbers[0]) == len(numbers):
        return np.float64(numbers[0])
    return np.asarray(numbers, np.float64)


def _outcome(condition: Host) -> int:
    if isinstance(condition, np.ndarray):
        return FIRST if condition.all() else MIXED if condition.any() else SECOND
    return FIRST if condition else SECOND


def _define(source: str, names: Mapping[str, Any]) -> Callable[..., Any]:
    scope = dict(names)
    exec(source, scope)
    return scope["compute"]


def _host_source(place: Mapping[Node, int]) -> str:
    """`compute(hypers, sizes, epsilon)`, which returns the values of all nodes in order."""
    lines = ["def compute(hypers, sizes, epsilon):"]
    hypers = 0
    for node, i in place.items():
        if node.op == "hyper":
            value, hypers = f"hypers[{hypers}]", hypers + 1
        elif node.op == "const":
            value = f"c{i}"
        elif node.op in ("numel", "epsilon"):
            value = "sizes" if node.op == "numel" else "epsilon"
        else:
            value = _operation(node.op, [f"h{place[a]}" for a in node.args])
        lines.append(f"    h{i} = {value}")
    return "\n".join([*lines, f"    return [{', '.join(f'h{i}' for i in place.values())}]"])


def _tensor_source(
    outputs: Sequence[tuple[str, Node]], place: Mapping[Node, int], outcomes: Mapping[Node, int]
) -> str:
    """`compute(columns, hosts)`, which returns the new columns. What is chosen stands for a choice
    that is known."""
    lines = ["def compute(columns, hosts):"]
    names: dict[Node, str] = {}
    stack = [root for _, root in reversed(outputs)]
    while stack:
        node = _chosen(stack[-1], outcomes)
        args = [] if node in place else [_chosen(a, outcomes) for a in node.args]
        wanted = [] if node in names else [a for a in args if a not in names]
        if wanted:
            stack += reversed(wanted)
            continue
        stack.pop()
        if node in names:
            continue
        if node in place:
            value = f"hosts[{place[node]}]"
        elif node.op in LOADS:
            value = f"columns[{node.attr!r}]"
        else:
            value = _operation(node.op, [names[a] for a in args])
        names[node] = f"t{len(names)}"
        lines.append(f"    {names[node]} = {value}")
    new = ", ".join(f"{name!r}: {names[_chosen(root, outcomes)]}" for name, root in outputs)
    return "\n".join([*lines, f"    return {{{new}}}"])


def _chosen(node: Node, outcomes: Mapping[Node, int]) -> Node:
    """What stands for a node, where choices have come out for all tensors alike."""
    while outcomes.get(node, MIXED) != MIXED:
        node = node.args[1] if outcomes[node] == FIRST else node.args[2]
    return node


def _operation(op: str, args: Sequence[str]) -> str:
    return f"{args[0]} {SYMBOLS[op]} {args[1]}" if op in SYMBOLS else f"_{op}({', '.join(args)})"
