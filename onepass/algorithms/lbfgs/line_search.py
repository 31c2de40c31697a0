"""A step length that satisfies the strong Wolfe conditions, for a function of one number."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

# Of the decrease that the slope at 0 promises, this part must come true; of the slope, at most that
# part may be left.
DECREASE, CURVATURE = 1e-4, 0.9
# A bracket in which no parameter changes by more is not searched further.
SHORTEST = 1e-9


class Point(NamedTuple):
    """A place on the line: its distance t from the start, the loss there, its derivative by t, and
    the gradient.

    `gradient` belongs to the caller and is passed through.
    """

    t: Any
    loss: float
    slope: Any
    gradient: Any


# Called with a distance, and with the one trial whose gradient is still needed beside the start's.
Evaluate = Callable[[Any, Point], Point]


def strong_wolfe(evaluate: Evaluate, start: Point, t: Any, *, reach: Any, limit: int) -> Point:
    r"""Search along a line for the strong Wolfe conditions, from the trial distance t on.

    $$ \phi(t) \le \phi(0) + c_1 t\, \phi'(0), \quad |\phi'(t)| \le c_2 |\phi'(0)| $$

    with $c_1 = 10^{-4}$, $c_2 = 0.9$. Trials grow until two of them enclose such a t; the bracket
    then shrinks around it. Each trial lies at the minimum of the cubic that has the two points'
    losses and slopes. It ends when the conditions hold, when no parameter differs by $10^{-9}$
    between the bracket's ends (`reach` is the direction's largest entry), or after `limit` further
    trials.

    Nocedal and Wright, "Numerical Optimization", 2nd edition, 2006, algorithms 3.5 and 3.6, with
    the safeguards of torch.optim.LBFGS: the same trials in the same order. Slopes are NumPy
    scalars: they round in their own precision, as one-element tensors do in torch, and a division
    by zero is infinite. Unlike in torch, a trial whose loss or slope is no number counts as
    infinitely high, and the search turns back from it: there the function is not defined.

    Returns the best point found, which is `start` where nothing is lower.
    """

    def attempt(t: Any, kept: Point) -> Point:
        trial = evaluate(t, kept)
        return (
            trial._replace(loss=math.inf)
            if math.isnan(trial.loss) or math.isnan(trial.slope)
            else trial
        )

    ends, found, trials = _bracket(attempt, start, attempt(t, start), limit)
    low = _lower(ends)
    near_end = False
    while not found and trials < limit:
        if abs(ends[1].t - ends[0].t) * reach < SHORTEST:
            break
        t, near_end = _inside(ends, near_end)
        trial = attempt(t, ends[low])
        trials += 1
        if _too_high(start, trial) or trial.loss >= ends[low].loss:
            ends[1 - low] = trial
            low = _lower(ends)
            continue
        found = _flat_enough(start, trial)
        if not found and trial.slope * (ends[1 - low].t - ends[low].t) >= 0:
            ends[1 - low] = ends[low]
        ends[low] = trial
    return ends[low]


def _bracket(
    attempt: Evaluate, start: Point, trial: Point, limit: int
) -> tuple[list[Point], bool, int]:
    """Two points that enclose an acceptable one, or such a point itself (then True), and the trials
    that it took."""
    previous = start
    for trials in range(limit):
        if _too_high(start, trial) or (trials > 1 and trial.loss >= previous.loss):
            return [previous, trial], False, trials
        if _flat_enough(start, trial):
            return [trial, trial], True, trials
        if trial.slope >= 0:
            return [previous, trial], False, trials
        t = minimum_of_cubic(previous, trial, trial.t + 0.01 * (trial.t - previous.t), trial.t * 10)
        previous, trial = trial, attempt(t, trial)
    return [start, trial], False, limit


def _too_high(start: Point, trial: Point) -> bool:
    return bool(trial.loss > start.loss + DECREASE * trial.t * start.slope)


def _flat_enough(start: Point, trial: Point) -> bool:
    return bool(abs(trial.slope) <= -CURVATURE * start.slope)


def _lower(ends: list[Point]) -> int:
    return 0 if ends[0].loss <= ends[1].loss else 1


def _inside(ends: list[Point], near_end: bool) -> tuple[Any, bool]:
    """The next trial in a bracket, and whether it lies near an end: the second such trial in a row
    is moved away."""
    left, right = min(ends[0].t, ends[1].t), max(ends[0].t, ends[1].t)
    t = minimum_of_cubic(ends[0], ends[1], left, right)
    margin = 0.1 * (right - left)
    if not min(right - t, t - left) < margin:
        return t, False
    if not (near_end or t >= right or t <= left):
        return t, True
    return (right - margin if abs(t - right) < abs(t - left) else left + margin), False


def minimum_of_cubic(a: Point, b: Point, low: Any, high: Any) -> Any:
    """Where the cubic through two points with their slopes has its minimum, held within [low,
    high].

    The middle of [low, high] where it has none, or where a loss is infinite.
    """
    width, rise = a.t - b.t, 3 * (a.loss - b.loss)
    if width == 0:
        return (low + high) / 2.0
    first, second = (a, b) if a.t <= b.t else (b, a)
    # torch's own root and quotient, for steps that equal torch.optim's to the last bit: its root is
    # not always the nearest number, and it divides a number by a tensor by way of the tensor's
    # reciprocal.
    d1 = (
        a.slope + b.slope - (rise * (1 / width) if isinstance(width, np.floating) else rise / width)
    )
    square = d1 * d1 - a.slope * b.slope
    if not 0 <= square < math.inf:
        return (low + high) / 2.0
    d2 = type(square)(torch.tensor(square).sqrt().item())
    fraction = (second.slope + d2 - d1) / (second.slope - first.slope + 2 * d2)
    return min(max(second.t - (second.t - first.t) * fraction, low), high)
