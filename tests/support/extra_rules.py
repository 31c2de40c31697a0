"""Rules beyond the table, as users may write them: all operations, columns that are only copied,
norms within norms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from onepass import kernel
from onepass.kernel import bind, finish, trace
from onepass.kernel.functions import (
    PerColumn,
    PerRow,
    amax,
    call,
    column_mean,
    columns,
    exp,
    floor,
    lerp,
    log,
    maximum,
    mean,
    norm,
    numel,
    rint,
    row_mean,
    rows,
    sqrt,
    square,
    where,
)
from onepass.kernel.functions import sum as total
from onepass.kernel.graph.ir import make
from onepass.kernel.graph.trace import Program

Rule = Callable[..., Mapping[str, Any]]
ONE_NUMBER = (("lr", ("float",)),)


def program(rule: Rule, format: str = "float32", state: str | None = None) -> Program:
    """A rule whose keyword is lr, as it would be stepped."""
    graph = finish(trace(rule, ONE_NUMBER))
    formats = {"p": format, "g": format} | dict.fromkeys(graph.state, state or format)
    return bind(graph, tuple(formats.items()))


def host_values_stored(p, g, a, b, c, d, *, lr):
    return {"p": p - lr * g, "a": lr, "b": 0.1, "c": norm(g), "d": numel() + 0.0}


def everything(p, g, s, t, *, lr):
    turned = where((g < 0) ^ (p >= s), rint(p * 4), floor(s * 3))
    kept = where(~(p == g) & (lr > 0.3) | (s != s), abs(turned), -p)
    told = (
        where(g < 0, 8.0, 0.0)
        + where(p >= s, 4.0, 0.0)
        + where(p == g, 2.0, 0.0)
        + where(s != s, 1.0, 0.0)
    )
    root = sqrt(abs(s)) * exp(-lr) + log(1 + lr) ** 2
    return {
        "p": kept / (1 + lr) + 2 / s - g / (1 + abs(p)),
        "s": root,
        "t": told + where(lr > 0.3, 16.0, t * 0 + 32),
    }


def copies(p, g, prev, zero, *, lr):
    return {"p": p - lr * g, "prev": g, "zero": 0.0}


def lars(p, g, momentum, *, lr):
    """You, Gitman and Ginsburg, 2017: two passes."""
    ratio = where(norm(g) > 0, 0.1 * norm(p) / (norm(g) + 1e-3), 1.0)
    m = 0.9 * momentum + lr * ratio * g
    return {"p": p - m, "momentum": m}


def lamb(p, g, m, v, *, lr):
    """You et al., 2019, without bias correction: the norm of an update that is not stored is
    computed twice."""
    m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
    update = m / (sqrt(v) + 1e-6) + 0.01 * p
    return {"p": p - lr * norm(p) / (norm(update) + 1e-12) * update, "m": m, "v": v}


def centred(p, g, *, lr):
    """Three passes: the largest deviation from a mean, then the norm of what that scales."""
    around = g - mean(g)
    scaled = around / (amax(around) + 1e-8)
    return {"p": p - lr * scaled * norm(p) / (norm(scaled) + numel())}


def only_reductions(p, g, s, *, lr):
    return {"p": p * 0 + total(g) - amax(p), "s": mean(s * s)}


RULES = (host_values_stored, everything, copies, lars, lamb, centred, only_reductions)


# Rules for which a tensor is a stack of matrices.


def backwards(matrices: Tensor) -> Tensor:
    """Rows and columns from the last to the first."""
    return matrices.flip(-2, -1)


def rolled(matrices: Tensor, a: float, b: float) -> Tensor:
    """Each matrix beside itself, one column further; elementwise, so that company cannot matter."""
    return matrices * a + matrices.roll(1, -1) * b


def factored(p, g, row: PerRow, column: PerColumn, *, lr):
    """Adafactor's way: values of rows, columns and matrices together make one of elements, whose
    mean is taken."""
    row = lerp(row, row_mean(square(g)), lr)
    column = lerp(column, column_mean(square(g)), lr)
    u = g / sqrt(maximum(row / maximum(column_mean(row), 1e-3) * column, 1e-6))
    return {"p": p - lr / maximum(1.0, sqrt(mean(square(u)))) * u, "row": row, "column": column}


def edges(p, g, row: PerRow, column: PerColumn, *, lr):
    """Old values of rows and columns, each used more than once and then overwritten; conditions and
    means of them."""
    u = p * row + g * row - where(row > 0, column * p, p - column) * lr
    u = where((column < row) & (row_mean(column) > 0.1), u, -u) * (1 + column_mean(row))
    return {
        "p": p - lr * u,
        "row": row_mean(g),
        "column": column * 0.5 + column_mean(row) * column_mean(g),
    }


def largest(p, g, row: PerRow, column: PerColumn, *, lr):
    """Largest numbers of rows, of columns and of matrices; a value of matrices kept for each row, a
    host value for each column."""
    tall, flat = (make("amax", abs(g), attr=over) for over in ("rows", "columns"))
    whole = make("amax", tall * row, attr="columns") + make("amax", flat, attr="rows") * 0.25
    return {
        "p": p - lr * (g / (tall + 1) + p / (flat + 1)),
        "row": whole,
        "column": amax(p) + rows() / columns(),
    }


def nested(p, g, *, lr):
    """Means of what is left of means, three deep, and norms between them."""
    x = g - row_mean(g)
    x = x - column_mean(x)
    y = x * norm(x) + column_mean(row_mean(square(x))) - row_mean(x * norm(g))
    return {"p": p - lr * y + row_mean(column_mean(p * y))}


def turned(p, g, row: PerRow, momentum, *, lr):
    """A function of matrices in the middle, with numbers of all kinds, of which one is a norm of a
    later pass."""
    m = lerp(momentum, g, lr)
    u = call(rolled, m / (row_mean(abs(m)) + 1), lr, 1 / columns())
    v = call(rolled, m, norm(u - mean(u)), 0.5)
    return {"p": p - u * v + row, "row": lerp(row, row_mean(u), 0.25), "momentum": m}


def in_a_row(p, g, *, lr):
    """Functions of what other functions return, and of the same matrices."""
    u = call(backwards, call(rolled, g, lr, 3.0))
    return {
        "p": p - lr * call(backwards, u) + call(rolled, u, 0.5, lr) * u + call(rolled, u, lr, 0.5)
    }


def only_a_call(p, g, s, *, lr):
    """No value of rows or columns: walked element after element."""
    return {"p": p - lr * call(backwards, g + s) * norm(g), "s": g}


MATRIX_RULES = (factored, edges, largest, nested, turned, in_a_row, only_a_call)


def evaluate(
    graph: kernel.Graph, columns: Mapping[str, Tensor], hypers: Mapping[str, float]
) -> dict[str, Tensor]:
    """A graph's outputs for one tensor by the eager backend, which gives the same for each of
    several in a row."""
    new, scalars = kernel.evaluate(graph, columns, hypers)
    if graph.is_elementwise:
        lists = {name: [t + 1, t, t + 1] for name, t in columns.items()}
        for numbers in (
            {name: [value + 1, value, value + 1] for name, value in hypers.items()},
            {name: [value] * 3 for name, value in hypers.items()},
        ):
            together, _ = kernel.evaluate_together(graph, lists, numbers)
            for name, (_, t, _) in together.items():
                torch.testing.assert_close(
                    t, new[name], rtol=0, atol=0, equal_nan=True, check_dtype=False
                )
    return new | {
        name: torch.as_tensor(value, dtype=torch.float64).reshape(())
        for name, value in scalars.items()
    }
