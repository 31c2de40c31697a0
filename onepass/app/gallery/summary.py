"""A schedule in a few lines of text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...schedule import Schedule

__all__ = ["choose_steps", "draw_line", "summarize"]

ENDLESS = 1000  # steps that are shown of a schedule without an end
MOST = 100_000  # values that are looked at
BLOCKS, SIGNS = "▁▂▃▄▅▆▇█", "_.:-=+*#"  # eight heights, and what stands for them in plain ASCII


def choose_steps(schedule: Schedule, steps: int | None = None) -> int:
    """How many steps to show: those that were asked for, else the schedule's length, and 1000 where
    it has no end."""
    if steps is not None:
        return steps
    return math.ceil(schedule.steps) if math.isfinite(schedule.steps) else ENDLESS


def summarize(schedule: Schedule, steps: int, *, plain: bool = False) -> list[tuple[str, str]]:
    """Names and texts: the length; the values at step 0, at the highest and the lowest of `steps`
    steps, at the end.

    Every whole step is looked at, and of more than 100,000 as many, evenly spread. The shape is
    drawn with blocks, or in ASCII where it is to be `plain`. Raises OverflowError where a value is
    too large for a number.
    """
    count = min(steps, MOST)
    values = {step: schedule(step) for step in (round(steps * i / count) for i in range(count + 1))}
    places = {
        "first": 0,
        "highest": max(values, key=values.__getitem__),
        "lowest": min(values, key=values.__getitem__),
        "last": steps,
    }
    return [
        ("schedule", repr(schedule)),
        ("length", f"{schedule.steps:,.10g} steps" if math.isfinite(schedule.steps) else "no end"),
        *((name, f"{values[step]:.6g} at step {step:,.10g}") for name, step in places.items()),
        ("shape", draw_line(list(values.values()), SIGNS if plain else BLOCKS)),
    ]


def draw_line(values: Sequence[float], signs: str = BLOCKS, width: int = 60) -> str:
    """The values as at most `width` signs in a line, the first of `signs` for the lowest, the last
    for the highest."""
    low, high = min(values), max(values)
    count = min(width, len(values))
    chosen = [values[round(i * (len(values) - 1) / max(1, count - 1))] for i in range(count)]
    top = len(signs) - 1
    return "".join(
        signs[round(top * (value - low) / (high - low)) if high > low else 0] for value in chosen
    )
