"""What rules are written with: functions of nodes, beside Python's operators. Standard library
only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from .graph.ir import Node, Rank, RuleError, const, make, where

__all__ = [
    "PerColumn",
    "PerRow",
    "Scalar",
    "amax",
    "call",
    "column_mean",
    "columns",
    "epsilon",
    "exp",
    "floor",
    "lerp",
    "log",
    "maximum",
    "mean",
    "minimum",
    "norm",
    "numel",
    "rint",
    "row_mean",
    "rows",
    "sign",
    "sqrt",
    "square",
    "sum",
    "where",
]

# How a rule's signature says that a state is no tensor like the parameter.
Scalar = Annotated[Node, Rank.UNIFORM]
PerRow = Annotated[Node, Rank.ROW]
PerColumn = Annotated[Node, Rank.COLUMN]


def sqrt(x: object) -> Node:
    """The square root, correctly rounded."""
    return make("sqrt", x)


def square(x: Node) -> Node:
    """x * x."""
    return make("mul", x, x)


def exp(x: object) -> Node:
    """The exponential of a host value."""
    return make("exp", x)


def log(x: object) -> Node:
    """The natural logarithm of a host value."""
    return make("log", x)


def floor(x: Node) -> Node:
    """The largest whole number that is not above x."""
    return make("floor", x)


def rint(x: Node) -> Node:
    """The nearest whole number, halves to even."""
    return make("rint", x)


def lerp(a: Node, b: Node, weight: object) -> Node:
    """a + weight * (b - a), as torch.lerp has it: exact at weight 0 and, taken from b's side above
    one half, at 1."""
    weight = weight if isinstance(weight, Node) else const(weight)
    near = weight < 0.5
    return where(near, a, b) + where(near, weight, weight - 1.0) * (b - a)


def maximum(a: object, b: object) -> Node:
    """The larger of two values; NaN if one of them is, as in torch."""
    a, b = (x if isinstance(x, Node) else const(x) for x in (a, b))
    return where((a > b) | (a != a), a, b)


def minimum(a: object, b: object) -> Node:
    """The smaller of two values; NaN if one of them is, as in torch."""
    a, b = (x if isinstance(x, Node) else const(x) for x in (a, b))
    return where((a < b) | (a != a), a, b)


def sign(x: Node) -> Node:
    """-1, 0 or 1. NaN stays NaN, where torch.sign makes it 0 and hides it."""
    return where(x > 0, 1.0, where(x < 0, -1.0, x))


def sum(x: Node) -> Node:
    """The sum over a tensor, accumulated in float64 in an order that depends on the tensor's size
    alone."""
    return make("sum", x)


def amax(x: Node) -> Node:
    """The largest absolute value in a tensor; NaN if one element is."""
    return make("amax", abs(x))


def mean(x: Node) -> Node:
    """The mean over a tensor."""
    return sum(x) / numel()


def norm(x: Node) -> Node:
    """The Euclidean norm of a tensor."""
    return sqrt(sum(square(x)))


def row_mean(x: Node) -> Node:
    """The mean of each row, over a tensor's last dimension: one value a row; of one value a column,
    one a matrix."""
    return make("sum", x, attr="rows") / columns()


def column_mean(x: Node) -> Node:
    """The mean of each column, over a tensor's last dimension but one; of one value a row, one a
    matrix."""
    return make("sum", x, attr="columns") / rows()


def call(function: Callable[..., object], x: Node, *numbers: object) -> Node:
    """What `function(matrices, *numbers)` makes of whole matrices, between two passes.

    `matrices` is a tensor (k, rows, columns) of k matrices of one shape, of one or of several
    parameters, and must stay as it is; so is what the function returns, of the same type. Numbers
    are host values. `function` must be the same object at each trace.
    """
    if not callable(function):
        raise RuleError(f"call takes a function of whole matrices first, got {function!r:.60}")
    return make("call", x, *numbers, attr=function)


def numel() -> Node:
    """The number of elements of the tensor."""
    return make("numel")


def rows() -> Node:
    """The number of rows of the tensor's matrices: its last size but one."""
    return make("rows")


def columns() -> Node:
    """The number of columns of the tensor's matrices: its last size."""
    return make("columns")


def epsilon() -> Node:
    """The machine epsilon of the type in which the parameter is stored."""
    return make("epsilon")
