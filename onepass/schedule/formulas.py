r"""Schedules as formulas in the step $t$, any real number from 0 on; after the last of `steps` the
last value stays."""

from __future__ import annotations

import functools
import inspect
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, ParamSpec

__all__ = [
    "Schedule",
    "ScheduleError",
    "anneal",
    "constant",
    "cosine",
    "exponential",
    "find_cycle",
    "half_cosine",
]
__all__ += [
    "inverse_sqrt",
    "linear",
    "one_cycle",
    "piecewise",
    "polynomial",
    "schedule",
    "triangular",
]
__all__ += ["warm_restarts", "warmup_stable_decay"]

Parameters = ParamSpec("Parameters")
POSITIVE = {
    "decay",
    "decay_steps",
    "div_factor",
    "down",
    "every",
    "final_div_factor",
    "gamma",
    "period",
    "power",
}
POSITIVE |= {"steps", "timescale", "up"}
LEAST = {"at": 0, "length": 0, "mult": 1, "warmup_steps": 0}
SHAPES = ("linear", "cosine", "sqrt")


class ScheduleError(ValueError):
    """A schedule's numbers, or the text that should make one, are not valid."""


class Schedule:
    """A number for every step, made by a function of this module."""

    def __init__(
        self, maker: Callable[..., Schedule], formula: Callable[..., float], given: dict[str, Any]
    ) -> None:
        given = {
            name: dict(value) if isinstance(value, Mapping) else value
            for name, value in given.items()
        }
        self._maker, self._formula, self._given = maker, formula, given
        self.steps: float = given.get("steps", math.inf)
        """The length, after which the value stays; infinite where there is none."""
        for name, value in given.items():
            if rule := _broken_rule(name, value):
                raise ScheduleError(
                    f"{maker.__name__.strip('_')}: {name} must be {rule}, got {value!r}."
                )
        formula(0, **given)  # what does not suit shows now

    def __call__(self, step: float) -> float:
        """The value at a step."""
        if not step >= 0:
            raise ScheduleError(
                f"{self!r} has values at steps from 0 on, and was asked for step {step}."
            )
        return self._formula(min(step, self.steps), **self._given)

    def then(self, following: Callable[[float], float], *, at: float | None = None) -> Schedule:
        """Return this schedule up to step `at`, and from there on another one, from its step 0.

        By default `at` is the last step of this one.
        """
        at = self.steps if at is None else at
        return _then(self, following, at=at, steps=at + getattr(following, "steps", math.inf))

    def times(self, factor: Callable[[float], float] | float) -> Schedule:
        """The product of two schedules, or of a schedule and a number, at every step."""
        return _times(
            self,
            factor,
            steps=max(self.steps, getattr(factor, "steps", math.inf if callable(factor) else 0)),
        )

    def warmup(self, steps: float, start: float = 0.0) -> Schedule:
        """Multiply the first `steps` steps by a line from `start` to 1, and at least last so
        long."""
        return _warmup(
            self, steps, start=start, steps=max(self.steps, steps if _is_number(steps) else 0)
        )

    def __repr__(self) -> str:
        name, given = self._maker.__name__, dict(self._given)
        if name[0] != "_":
            words = [f"{key}={value!r}" for key, value in given.items() if value is not None]
            return f"{name}({', '.join(words)})"
        base, _, argument, *others = given.pop("base"), given.pop("steps"), *given
        words = [repr(given[argument]), *(f"{key}={given[key]!r}" for key in others)]
        return f"{base!r}.{name[1:]}({', '.join(words)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and (self._maker, self._given) == (
            other._maker,
            other._given,
        )

    def __hash__(self) -> int:
        return hash(repr(self))

    def __reduce__(self) -> tuple[Callable[..., Schedule], tuple[()]]:
        return functools.partial(self._maker, **self._given), ()


def _broken_rule(name: str, value: Any) -> str | None:
    """What the argument of this name must be, if the value is not."""
    if name == "shape":
        return None if value in SHAPES else f"one of {', '.join(SHAPES)}"
    if name in ("base", "following") or (name == "factor" and callable(value)):
        return None if callable(value) else "a schedule, or another function of the step"
    if name == "changes":
        valid = isinstance(value, Mapping) and all(map(_is_number, (*value, *value.values())))
        valid = valid and list(value) == sorted(value) and min(value, default=0) >= 0
        return None if valid else "a dict of increasing steps, from 0 on, to numbers"
    if (name == "down" and value is None) or (name == "steps" and value == math.inf):
        return None
    if name in POSITIVE:
        return None if _is_number(value) and value > 0 else "a number greater than 0"
    least = LEAST.get(name, -math.inf)
    return (
        None
        if _is_number(value) and value >= least
        else "a number" + f" from {least} on" * (name in LEAST)
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def schedule(
    formula: Callable[Concatenate[float, Parameters], float],
) -> Callable[Parameters, Schedule]:
    """Turn a formula, whose first argument is the step, into a function that makes schedules of its
    other arguments."""
    signature = inspect.Signature(list(inspect.signature(formula).parameters.values())[1:])

    @functools.wraps(formula)
    def make(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Schedule:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{formula.__name__.strip('_')}: {error}") from None
        bound.apply_defaults()
        return Schedule(make, formula, bound.arguments)

    vars(make)["__signature__"] = signature
    return make


def half_cosine(t: float, steps: float) -> float:
    """Half a wave of the cosine, from 1 at step 0 to 0 at step `steps`."""
    return (1 + math.cos(math.pi * t / steps)) / 2


def anneal(start: Any, end: Any, fraction: float, shape: str) -> Any:
    """The number at a fraction of the way from `start` to `end`: on a line, half a cosine wave, or
    the root's curve."""
    if shape == "cosine":
        return end + (start - end) * half_cosine(fraction, 1)
    return start + (end - start) * (math.sqrt(fraction) if shape == "sqrt" else fraction)


def find_cycle(t: float, period: float, mult: float) -> tuple[int, float, float]:
    """The cycle that a step falls into, from 0; the step within it; and its length, `mult` times
    that of the last."""
    if mult == 1:
        return int(t // period), t % period, period
    cycle = 0
    while t >= period:
        cycle, t, period = cycle + 1, t - period, period * mult
    return cycle, t, period


@schedule
def constant(t: float, value: float) -> float:
    r"""The same value at every step: $s(t) = v$."""
    return value


@schedule
def linear(t: float, start: float, end: float, *, steps: float) -> float:
    r"""A line: $s(t) = a + (b - a)\, t / T$ for `start` $a$, `end` $b$ and `steps` $T$."""
    return anneal(start, end, t / steps, "linear")


@schedule
def polynomial(
    t: float, start: float, end: float = 0.0, *, steps: float, power: float = 1.0
) -> float:
    r"""A power of what is left: $s(t) = b + (a - b)\,(1 - t/T)^k$, from `start` $a$ to `end` $b$,
    with `power` $k$."""
    return end + (start - end) * (1 - t / steps) ** power


@schedule
def exponential(t: float, start: float, *, gamma: float, every: float = 1) -> float:
    r"""A constant factor every $n$ steps: $s(t) = a\,\gamma^{t/n}$ for `start` $a$, `gamma` and
    `every` $n$."""
    return start * gamma ** (t / every)


@schedule
def cosine(t: float, start: float, end: float = 0.0, *, steps: float) -> float:
    r"""Half a cosine wave: $s(t) = b + (a - b)\,(1 + \cos(\pi t/T)) / 2$ for `start` $a$, `end` $b$
    and `steps` $T$.

    Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017,
    arXiv:1608.03983.
    """
    return end + (start - end) * half_cosine(t, steps)


@schedule
def warm_restarts(
    t: float, start: float, end: float = 0.0, *, period: float, mult: float = 1, decay: float = 1.0
) -> float:
    r"""Cosines one after another, the first of `period` steps, each `mult` times as long as the one
    before.

    At step $c$ of cycle $i$, whose length is $T_i = T_0 m^i$: $s = b + (a d^i - b)\,(1 + \cos(\pi
    c/T_i)) / 2$, where `decay` $d$ lowers the peaks. Loshchilov and Hutter, 2017, arXiv:1608.03983.
    """
    cycle, step, length = find_cycle(t, period, mult)
    return end + (start * decay**cycle - end) * half_cosine(step, length)


@schedule
def one_cycle(
    t: float,
    peak: float,
    *,
    steps: float,
    rise: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
    shape: str = "cosine",
) -> float:
    r"""Up to `peak` in the fraction `rise` of the steps, and down to far below where it began.

    From $p / d$ (`div_factor` $d$) up to `peak` $p$ and down to $p / (d f)$ (`final_div_factor`
    $f$), both in one `shape`: "cosine" or "linear". Smith and Topin, "Super-Convergence: Very Fast
    Training of Neural Networks Using Large Learning Rates", 2018, arXiv:1708.07120.
    """
    first, top = peak / div_factor, rise * steps
    if not 0 < rise < 1:
        raise ScheduleError(f"one_cycle: rise must lie between 0 and 1, got {rise!r}.")
    if t < top:
        return anneal(first, peak, t / top, shape)
    return anneal(peak, first / final_div_factor, (t - top) / (steps - top), shape)


@schedule
def triangular(
    t: float, low: float, high: float, *, up: float, down: float | None = None, decay: float = 1.0
) -> float:
    r"""Up from `low` to `high` in `up` steps and down in `down` (default: as many), again and
    again.

    In cycle $i$, from 0, the peak is $l + (h - l)\, d^i$ (`decay` $d$; 0.5 halves the height each
    time). Smith, "Cyclical Learning Rates for Training Neural Networks", 2017, arXiv:1506.01186.
    """
    down = up if down is None else down
    cycle, step = divmod(t, up + down)
    return low + (high - low) * min(step / up, (up + down - step) / down) * decay**cycle


@schedule
def piecewise(t: float, start: float, changes: Mapping[float, float]) -> float:
    """Constant pieces: `piecewise(0.1, {30: 0.01, 60: 0.001})` is 0.1 before step 30 and 0.001 from
    step 60 on."""
    return (start, *changes.values())[bisect_right(list(changes), t)]


@schedule
def inverse_sqrt(t: float, peak: float, *, timescale: float) -> float:
    r"""Constant, then falling with the root of the step: $s(t) = p \sqrt{\tau / \max(t, \tau)}$,
    `timescale` $\tau$.

    With `.warmup(timescale)` it is the schedule of Vaswani et al., "Attention Is All You Need",
    2017, arXiv:1706.03762.
    """
    return peak * math.sqrt(timescale / max(t, timescale))


@schedule
def warmup_stable_decay(
    t: float,
    peak: float,
    end: float = 0.0,
    *,
    steps: float,
    warmup_steps: float,
    decay_steps: float,
    shape: str = "linear",
) -> float:
    r"""A line from 0 to `peak` in `warmup_steps`, the peak, and in the last `decay_steps` down to
    `end`.

    The decay has the `shape` "linear", "cosine" or "sqrt" ($1 - \sqrt{x}$). The middle can be as
    long as one likes: train on from any checkpoint in it. Hu et al., "MiniCPM", 2024,
    arXiv:2404.06395; shapes: Hägele et al., "Scaling Laws and Compute-Optimal Training Beyond Fixed
    Training Durations", 2024, arXiv:2405.18392.
    """
    if warmup_steps + decay_steps > steps:
        raise ScheduleError(
            f"warmup_stable_decay: {warmup_steps=} and {decay_steps=} do not fit into {steps=}."
        )
    if t < warmup_steps:
        return peak * t / warmup_steps
    return anneal(peak, end, max(0, t - (steps - decay_steps)) / decay_steps, shape)


@schedule
def _then(
    t: float, base: Schedule, following: Callable[[float], float], *, at: float, steps: float
) -> float:
    return base(t) if t < at else following(t - at)


@schedule
def _times(
    t: float, base: Schedule, factor: Callable[[float], float] | float, *, steps: float
) -> float:
    return base(t) * (factor(t) if callable(factor) else factor)


@schedule
def _warmup(t: float, base: Schedule, length: float, *, start: float, steps: float) -> float:
    return base(t) * (1 if t >= length else anneal(start, 1, t / length, "linear"))
