"""What rules are written with: functions of nodes, beside Python's operators.

    def rule(p, g, *, lr):
        return {"p": p - lr * sign(g) * sqrt(mean(square(p)))}

Each takes nodes, or numbers beside nodes, and returns a node. Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from .graph.ir import Node, Rank, RuleError, as_node, make, where

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

# How a rule's signature says that a state is not shaped as the parameter: one number, one value for
# each row, one for each column.
Scalar = Annotated[Node, Rank.UNIFORM]
PerRow = Annotated[Node, Rank.ROW]
PerColumn = Annotated[Node, Rank.COLUMN]


def sqrt(x: object) -> Node:
    """Return the square root, correctly rounded."""
    return make("sqrt", x)


def square(x: Node) -> Node:
    """Return x * x."""
    return make("mul", x, x)


def exp(x: object) -> Node:
    """Return the exponential of a host value."""
    return make("exp", x)


def log(x: object) -> Node:
    """Return the natural logarithm of a host value."""
    return make("log", x)


def floor(x: Node) -> Node:
    """Return the largest whole number that is not above x."""
    return make("floor", x)


def rint(x: Node) -> Node:
    """Return the nearest whole number, halves to even: 2.5 becomes 2.0."""
    return make("rint", x)


def lerp(a: Node, b: Node, weight: object) -> Node:
    """Return a + weight * (b - a), as torch.lerp computes it: exact at weight 0 and at weight 1.

    From a weight of one half on it is computed from b's side: b - (1 - weight) * (b - a).
    """
    weight = as_node(weight)
    near = weight < 0.5
    return where(near, a, b) + where(near, weight, weight - 1.0) * (b - a)


def maximum(a: object, b: object) -> Node:
    """Return the larger of two values; NaN if one of them is, as in torch."""
    a = as_node(a)
    b = as_node(b)
    return where((a > b) | (a != a), a, b)


def minimum(a: object, b: object) -> Node:
    """Return the smaller of two values; NaN if one of them is, as in torch."""
    a = as_node(a)
    b = as_node(b)
    return where((a < b) | (a != a), a, b)


def sign(x: Node) -> Node:
    """Return -1, 0 or 1. NaN stays NaN; torch.sign would make it 0 and hide it."""
    return where(x > 0, 1.0, where(x < 0, -1.0, x))


def sum(x: Node) -> Node:
    """Return the sum over a tensor.

    It is accumulated in float64, in an order that depends only on the tensor's size.
    """
    return make("sum", x)


def amax(x: Node) -> Node:
    """Return the largest absolute value in a tensor; NaN if one element is."""
    return make("amax", abs(x))


def mean(x: Node) -> Node:
    """Return the mean over a tensor."""
    return sum(x) / numel()


def norm(x: Node) -> Node:
    """Return the Euclidean norm of a tensor."""
    return sqrt(sum(square(x)))


def row_mean(x: Node) -> Node:
    """Return the mean of each row, over a tensor's last dimension: one value for each row.

    Of values that exist once for each column it makes one for each matrix.
    """
    return make("sum", x, attr="rows") / columns()


def column_mean(x: Node) -> Node:
    """Return the mean of each column, over the last dimension but one: one value for each column.

    Of values that exist once for each row it makes one for each matrix.
    """
    return make("sum", x, attr="columns") / rows()


def call(function: Callable[..., object], x: Node, *numbers: object) -> Node:
    """Return what `function(matrices, *numbers)` makes of whole matrices, between two passes.

    `matrices` is a tensor (k, rows, columns): k matrices of one shape, of one or of several
    parameters. The function must not change it, and must return a tensor of the same shape and
    type. Numbers are host values. `function` must be the same object at each trace.

    Raises `RuleError` if `function` cannot be called.
    """
    if not callable(function):
        raise RuleError(f"call takes a function of whole matrices first, got {function!r:.60}")
    return make("call", x, *numbers, attr=function)


def numel() -> Node:
    """Return the number of elements of the tensor."""
    return make("numel")


def rows() -> Node:
    """Return the number of rows of the tensor's matrices: its last size but one."""
    return make("rows")


def columns() -> Node:
    """Return the number of columns of the tensor's matrices: its last size."""
    return make("columns")


def epsilon() -> Node:
    """Return the machine epsilon of the type in which the parameter is stored."""
    return make("epsilon")
