"""A step length that satisfies the strong Wolfe conditions, for a function of one number.

For example phi(t) = (t - 1)^2, whose loss and slope at the start, t = 0, are 1 and -2. From a first
trial t = 10:

    t = 10     loss 81: too high, so the bracket is [0, 10]
    t = 1      the minimum of the cubic through both ends: slope 0, both conditions hold

and from t = 0.04:

    t = 0.04   loss 0.92, slope -1.92: steeper than 0.9 * 2, so the trial grows
    t = 0.4    the cubic's minimum is 1, but a trial grows by 10 at most: slope -1.2, both hold
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

# Of the decrease that the slope at 0 promises, this part must come true.
DECREASE = 1e-4
# At most this part of the slope may be left.
CURVATURE = 0.9
# A bracket in which no parameter changes by more is not searched further.
SHORTEST = 1e-9


class Point(NamedTuple):
    """A point on the line: its distance t from the start, the loss, its derivative by t, and the
    gradient.

    `gradient` belongs to the caller and is passed through.
    """

    t: Any
    loss: float
    slope: Any
    gradient: Any


class Bracket(NamedTuple):
    """Two ends between which an acceptable point lies, or that point as both.

    `trials` is how many the search has made after the first one.
    """

    ends: list[Point]
    is_found: bool
    trials: int


# Called with a distance, and with the one trial whose gradient is still needed beside the start's.
Evaluate = Callable[[Any, Point], Point]


def strong_wolfe(evaluate: Evaluate, start: Point, t: Any, *, reach: Any, limit: int) -> Point:
    r"""Search along a line for the strong Wolfe conditions, from the trial distance t on.

    $$ \phi(t) \le \phi(0) + c_1 t\, \phi'(0), \quad |\phi'(t)| \le c_2 |\phi'(0)| $$

    with $c_1 = 10^{-4}$, $c_2 = 0.9$. Trials grow until two of them enclose such a t; the bracket
    then shrinks around it. Each trial lies at the minimum of the cubic that has the two points'
    losses and slopes. The search ends when the conditions hold, when no parameter differs by
    $10^{-9}$ between the bracket's ends (`reach` is the direction's largest entry), or after
    `limit` further trials.

    Nocedal and Wright, "Numerical Optimization", 2nd edition, 2006, algorithms 3.5 and 3.6, with
    the safeguards of torch.optim.LBFGS: the same trials in the same order. Slopes are NumPy
    scalars: they round in their own precision, as one-element tensors do in torch, and a division
    by zero is infinite. Unlike in torch, a trial whose loss or slope is NaN counts as infinitely
    high, and the search turns back from it: the function is not defined there.

    Returns the best point found, which is `start` if nothing is lower.
    """

    def attempt(t: Any, kept: Point) -> Point:
        trial = evaluate(t, kept)
        if math.isnan(trial.loss) or math.isnan(trial.slope):
            return trial._replace(loss=math.inf)
        return trial

    bracket = _enclose(attempt, start, attempt(t, start), limit)
    return _shrink(attempt, start, bracket, reach, limit)


def _enclose(attempt: Evaluate, start: Point, trial: Point, limit: int) -> Bracket:
    """Let trials grow until one is acceptable, or until two enclose an acceptable one."""
    previous = start
    for trials in range(limit):
        if _too_high(start, trial) or (trials > 1 and trial.loss >= previous.loss):
            return Bracket([previous, trial], False, trials)
        if _flat_enough(start, trial):
            return Bracket([trial, trial], True, trials)
        if trial.slope >= 0:
            return Bracket([previous, trial], False, trials)
        nearest = trial.t + 0.01 * (trial.t - previous.t)
        farthest = trial.t * 10
        t = minimum_of_cubic(previous, trial, nearest, farthest)
        previous, trial = trial, attempt(t, trial)
    return Bracket([start, trial], False, limit)


def _shrink(attempt: Evaluate, start: Point, bracket: Bracket, reach: Any, limit: int) -> Point:
    """Replace a bracket's ends by points between them until one is acceptable; return the lower
    end."""
    ends, is_found, trials = bracket
    low = _lower(ends)
    was_near_end = False
    while not is_found and trials < limit:
        if abs(ends[1].t - ends[0].t) * reach < SHORTEST:
            break
        t, was_near_end = _inside(ends, was_near_end)
        trial = attempt(t, ends[low])
        trials += 1
        if _too_high(start, trial) or trial.loss >= ends[low].loss:
            ends[1 - low] = trial
            low = _lower(ends)
            continue
        is_found = _flat_enough(start, trial)
        if not is_found and trial.slope * (ends[1 - low].t - ends[low].t) >= 0:
            ends[1 - low] = ends[low]
        ends[low] = trial
    return ends[low]


def _too_high(start: Point, trial: Point) -> bool:
    """Whether the first condition does not hold."""
    return bool(trial.loss > start.loss + DECREASE * trial.t * start.slope)


def _flat_enough(start: Point, trial: Point) -> bool:
    """Whether the second condition holds."""
    return bool(abs(trial.slope) <= -CURVATURE * start.slope)


def _lower(ends: list[Point]) -> int:
    """Return the index of the end with the lower loss."""
    return 0 if ends[0].loss <= ends[1].loss else 1


def _inside(ends: list[Point], was_near_end: bool) -> tuple[Any, bool]:
    """Return the next trial in a bracket, and whether it lies near an end.

    If the one before was near an end as well, it is moved away by a tenth of the bracket.
    """
    left = min(ends[0].t, ends[1].t)
    right = max(ends[0].t, ends[1].t)
    t = minimum_of_cubic(ends[0], ends[1], left, right)
    margin = 0.1 * (right - left)
    is_near_end = min(right - t, t - left) < margin
    if not is_near_end:
        return t, False
    is_at_end = t >= right or t <= left
    if not (was_near_end or is_at_end):
        return t, True
    if abs(t - right) < abs(t - left):
        return right - margin, False
    return left + margin, False


def minimum_of_cubic(a: Point, b: Point, low: Any, high: Any) -> Any:
    """Return where the cubic through two points with their slopes has its minimum.

    The result is held within [low, high]. If there is no minimum, or a loss is infinite, it is the
    middle of [low, high]. For the points (0, 1) with slope -2 and (3, 4) with slope 4, the cubic is
    (t - 1)^2: d1 = -1, d2 = 3, fraction = 2/3, and the minimum lies at 3 - 3 * 2/3 = 1.
    """
    width = a.t - b.t
    if width == 0:
        return (low + high) / 2.0
    rise = 3 * (a.loss - b.loss)
    # torch's own root and quotient, for steps that equal torch.optim's to the last bit: its root is
    # not always the nearest number, and it divides a number by a tensor by way of the tensor's
    # reciprocal.
    steepness = rise * (1 / width) if isinstance(width, np.floating) else rise / width
    d1 = a.slope + b.slope - steepness
    square = d1 * d1 - a.slope * b.slope
    if not 0 <= square < math.inf:
        return (low + high) / 2.0
    d2 = type(square)(torch.tensor(square).sqrt().item())
    left, right = (a, b) if a.t <= b.t else (b, a)
    fraction = (right.slope + d2 - d1) / (right.slope - left.slope + 2 * d2)
    t = right.t - (right.t - left.t) * fraction
    return min(max(t, low), high)
