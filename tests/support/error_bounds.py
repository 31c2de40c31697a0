"""Numbers that know how far arithmetic of a given precision may be off: a float64 value, and a
bound of its error.

A reference of the table, run on them instead of on arrays, gives for each element the tolerance
that its own operations explain. Cancellation counts: of `a - b` the errors add up, however small
the difference is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


class Rounded(np.lib.mixins.NDArrayOperatorsMixin):
    """An array of values, with the error that each may have where `unit` is half of the distance of
    1 to the next.

    `inexact` is how many units of float64 plain numbers may err that meet these, as they come out
    of some operations.
    """

    def __init__(self, value: Any, error: Any, unit: float, inexact: float = 0.0) -> None:
        self.value, self.unit, self.inexact = np.asarray(value, np.float64), unit, inexact
        self.error = np.broadcast_to(np.asarray(error, np.float64), self.value.shape)

    @property
    def ndim(self) -> int:
        return self.value.ndim

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def mean(self, axis: int | None = None, keepdims: bool = False) -> Rounded:
        """The mean; a sum of some terms errs by a few units of their sizes."""
        value = self.value.mean(axis=axis, keepdims=keepdims)
        size = np.abs(self.value).mean(axis=axis, keepdims=keepdims)
        error = self.error.mean(axis=axis, keepdims=keepdims) + 4 * self.unit * size
        return Rounded(value, error, self.unit, self.inexact)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if method != "__call__" or kwargs:
            return NotImplemented
        self.inexact = max(x.inexact for x in inputs if isinstance(x, Rounded))
        operands = [self._lift(x) for x in inputs]
        if ufunc in COMPARISONS:
            return ufunc(*(x.value for x in operands))
        if ufunc is np.sign:
            return np.sign(operands[0].value)
        if ufunc not in ERRORS:
            return NotImplemented
        with np.errstate(all="ignore"):
            value = ufunc(*(x.value for x in operands))
            error, rounds = ERRORS[ufunc](*operands)
            error = error + rounds * (self.unit * np.abs(value) + self._least)
            return Rounded(value, error, self.unit, self.inexact)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if function is np.zeros_like:
            return np.zeros(self.shape)
        if function is np.where:
            condition, a, b = args
            a, b = self._lift(a), self._lift(b)
            error = np.where(condition, a.error, b.error)
            return Rounded(np.where(condition, a.value, b.value), error, self.unit, self.inexact)
        if function is np.clip:
            x, low, high = args
            return np.minimum(np.maximum(x, low), high)
        return NotImplemented

    @property
    def _least(self) -> float:
        """The smallest number that the precision can tell from zero."""
        return 5e-324 if self.unit < 2.0**-50 else 2.0**-149

    def _lift(self, x: Any) -> Rounded:
        """A number among these: it is rounded where the precision does not hold it."""
        if isinstance(x, Rounded):
            return x
        x = np.asarray(x, np.float64)
        with np.errstate(all="ignore"):
            exact = (
                x.astype(np.float64 if self.unit < 2.0**-50 else np.float32).astype(np.float64) == x
            )
        inexact = np.where(x == np.rint(x), 0.0, self.inexact * 2.0**-53)
        return Rounded(
            x, (np.where(exact, 0.0, self.unit) + inexact) * np.abs(x), self.unit, self.inexact
        )


def _add(a: Rounded, b: Rounded) -> tuple[Any, int]:
    return a.error + b.error, 1


def _multiply(a: Rounded, b: Rounded) -> tuple[Any, int]:
    return np.abs(a.value) * b.error + np.abs(b.value) * a.error + a.error * b.error, 1


def _divide(a: Rounded, b: Rounded) -> tuple[Any, int]:
    least = np.abs(b.value) - b.error
    error = (a.error + np.abs(a.value / b.value) * b.error) / np.where(least > 0, least, 0.0)
    # Nothing divided by what is surely not zero is nothing.
    return np.where((a.error == 0) & (a.value == 0) & (least > 0), 0.0, error), 2


def _root(a: Rounded) -> tuple[Any, int]:
    # The difference of the roots of v and of v - e, without its cancellation.
    low = np.sqrt(np.maximum(a.value - a.error, 0.0))
    return np.where(a.error == 0, 0.0, a.error / (np.sqrt(a.value) + low)), 1


def _power(a: Rounded, b: Rounded) -> tuple[Any, int]:
    # Of the exponents only 2 occurs.
    return 2 * np.abs(a.value) * a.error + a.error**2, 1


def _same(a: Rounded) -> tuple[Any, int]:
    return a.error, 0


def _larger(a: Rounded, b: Rounded) -> tuple[Any, int]:
    return np.maximum(a.error, b.error), 0


ERRORS: dict[np.ufunc, Callable[..., tuple[Any, int]]] = {
    np.add: _add,
    np.subtract: _add,
    np.multiply: _multiply,
    np.true_divide: _divide,
    np.sqrt: _root,
    np.power: _power,
    np.negative: _same,
    np.absolute: _same,
    np.maximum: _larger,
    np.minimum: _larger,
}
COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)
