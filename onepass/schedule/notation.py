"""Schedules as text: what `repr` of a schedule writes, and a command line takes."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from . import formulas
from .formulas import Schedule, ScheduleError

__all__ = ["MAKERS", "parse"]

_NAMES = (
    "constant",
    "linear",
    "polynomial",
    "exponential",
    "cosine",
    "warm_restarts",
    "one_cycle",
    "triangular",
)
_NAMES += ("piecewise", "inverse_sqrt", "warmup_stable_decay")
MAKERS: dict[str, Callable[..., Schedule]] = {name: getattr(formulas, name) for name in _NAMES}


def parse(text: str) -> Schedule:
    """Read a schedule: `parse("cosine(3e-4, steps=10000).warmup(500)")`.

    The makers of `onepass.schedule`, their arguments and the methods `then`, `times` and `warmup`
    are read, and no other code is run: anything else raises `ScheduleError`.
    """
    try:
        made = _read(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, TypeError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise ScheduleError(
            f"{text!r} is no schedule ({reason}); write, say, cosine(3e-4, steps=10000)."
        ) from error
    if not isinstance(made, Schedule):
        raise ScheduleError(f"{text!r} is no schedule: begin with one of {', '.join(MAKERS)}.")
    return made


def _read(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=int() | float() | str() as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_read(operand)
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {
                _read(key): _read(value)
                for key, value in zip(keys, values, strict=True)
                if key is not None
            }
        case ast.Call(func=ast.Name(id=name)) if name in MAKERS:
            return _call(MAKERS[name], node)
        case ast.Call(
            func=ast.Attribute(value=value, attr=("then" | "times" | "warmup") as method)
        ):
            made = _read(value)
            if isinstance(made, Schedule):
                return _call(getattr(made, method), node)
    raise ScheduleError(
        f"{ast.unparse(node)!r} is no part of a schedule: write numbers, one of "
        f"{', '.join(MAKERS)}, and .then(...), .times(...) or .warmup(...)."
    )


def _call(function: Callable[..., Schedule], node: ast.Call) -> Schedule:
    if any(word.arg is None for word in node.keywords):
        raise ScheduleError(
            f"{ast.unparse(node)!r} is no part of a schedule: write its arguments one by one."
        )
    return function(
        *map(_read, node.args), **{str(word.arg): _read(word.value) for word in node.keywords}
    )
