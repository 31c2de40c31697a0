"""A schedule in a few lines of text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...schedule import Schedule

__all__ = ["choose_steps", "draw_line", "summarize"]

# Steps that are shown of a schedule without an end.
ENDLESS = 1000
# At most this many values are looked at.
MOST = 100_000
# Eight heights, and what stands for them in plain ASCII.
BLOCKS = "▁▂▃▄▅▆▇█"
SIGNS = "_.:-=+*#"


def choose_steps(schedule: Schedule, steps: int | None = None) -> int:
    """Return how many steps to show: those that were asked for, or the schedule's length.

    A schedule without an end is shown for 1000 steps.
    """
    if steps is not None:
        return steps
    return math.ceil(schedule.steps) if math.isfinite(schedule.steps) else ENDLESS


def summarize(schedule: Schedule, steps: int, *, plain: bool = False) -> list[tuple[str, str]]:
    """Return pairs of a name and a text: the length, four values, and the shape as a line.

    The values are those at step 0, at the highest and the lowest of the first `steps` steps, and at
    the end. Every whole step is looked at; of more than 100,000 steps, this many that are evenly
    spread. The shape is drawn with blocks, or in ASCII if it is to be `plain`. Raises OverflowError
    if a value is too large for a number.
    """
    count = min(steps, MOST)
    looked_at = (round(steps * index / count) for index in range(count + 1))
    values = {step: schedule(step) for step in looked_at}
    named_steps = {
        "first": 0,
        "highest": max(values, key=values.__getitem__),
        "lowest": min(values, key=values.__getitem__),
        "last": steps,
    }
    length = f"{schedule.steps:,.10g} steps" if math.isfinite(schedule.steps) else "no end"
    lines = [("schedule", repr(schedule)), ("length", length)]
    for name, step in named_steps.items():
        lines.append((name, f"{values[step]:.6g} at step {step:,.10g}"))
    lines.append(("shape", draw_line(list(values.values()), SIGNS if plain else BLOCKS)))
    return lines


def draw_line(values: Sequence[float], signs: str = BLOCKS, width: int = 60) -> str:
    """Return the values as at most `width` signs in a line.

    The first of `signs` stands for the lowest value, the last for the highest. Example: of
    [0, 1, 2, 3] and the signs `_-=`, it makes `_--=`.
    """
    low = min(values)
    high = max(values)
    if not high > low:
        return signs[0] * min(width, len(values))
    count = min(width, len(values))
    last = len(values) - 1
    line = ""
    for index in range(count):
        value = values[round(index * last / max(1, count - 1))]
        height = (value - low) / (high - low)
        line += signs[round((len(signs) - 1) * height)]
    return line
