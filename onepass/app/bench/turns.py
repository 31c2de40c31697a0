"""Contenders in turns, so that whatever else the machine does meets all of them alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .machine import time_of

__all__ = ["in_milliseconds", "take_turns"]

FEWEST_TURNS = 5
MOST_TURNS = 200
# A contender whose steps are short takes several in its turn: at most this many, for this long. So
# the caches are its own in most of them.
TURN_STEPS = 10
TURN_SECONDS = 5e-3


def in_milliseconds(taken: Sequence[float]) -> dict[str, Any]:
    """Return what is reported of a contender's steps, from their seconds."""
    return {
        "median_ms": 1e3 * statistics.median(taken),
        "min_ms": 1e3 * min(taken),
        "steps": len(taken),
    }


def take_turns(
    timers: Mapping[str, Callable[[], Any]],
    seconds: float,
    report: Callable[[list[Any]], dict[str, Any]] = in_milliseconds,
) -> dict[str, dict[str, Any]]:
    """Return the times of each contender's steps, measured in turns, as `report` makes them.

    A timer takes a step and returns its time. Each contender has an equal share of the `seconds`:
    a slow one takes fewer turns, at least five, spread evenly over the rounds.

    Example: in 3 seconds, A takes 0.1 s a step, B 0.02 s and C 0.1 ms. A has 10 turns of one step,
    B 50 turns of one step, C 200 turns of ten steps. There are 200 rounds: C steps in all of them,
    B in every fourth, A in every twentieth.
    """
    steps: dict[str, int] = {}
    turns: dict[str, int] = {}
    for name, timer in timers.items():
        timer()
        cost = time_of(timer)
        steps[name] = max(1, min(TURN_STEPS, int(TURN_SECONDS / cost)))
        affordable = int(seconds / len(timers) / (steps[name] * cost))
        turns[name] = max(FEWEST_TURNS, min(MOST_TURNS, affordable))

    times: dict[str, list[Any]] = {name: [] for name in timers}
    rounds = max(turns.values())
    for round_ in range(rounds):
        for name, timer in timers.items():
            turns_before = round_ * turns[name] // rounds
            turns_after = (round_ + 1) * turns[name] // rounds
            if turns_after > turns_before:
                taken = [timer() for _ in range(steps[name])]
                # The first of several finds the caches as another contender left them.
                times[name] += taken[1:] or taken
    return {name: report(taken) for name, taken in times.items()}
