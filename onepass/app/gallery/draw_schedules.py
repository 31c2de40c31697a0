"""Pictures of schedules: torch's schedulers, the makers of `onepass.schedule`, and a user's own."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...pictures import BLUE, COLOURS, RED, new_figure, new_grid, save, tidy
from ...schedule import Schedule, parse
from .lr_schedules import EXAMPLES, TEXTS, trace, trace_plateau

__all__ = ["draw_makers", "draw_plateau", "draw_scheduler", "plot_schedule"]

# A line of few different values is drawn as stairs.
_FEW_VALUES = 10
# A schedule's curve has this many points and one more.
_POINTS = 1000


def draw_scheduler(name: str) -> Figure:
    """Draw what the scheduler of `EXAMPLES` with this name sets: the rate, and more if it does."""
    example = EXAMPLES[name]
    figure = new_figure(480, 240)
    arguments = [curve.text.split(", ") for curve in example.curves]
    common = [
        argument for argument in arguments[0] if all(argument in other for other in arguments)
    ]
    panels = figure.subplots(1, len(example.options), squeeze=False)[0]
    for axes, option in zip(panels, example.options, strict=True):
        for curve, colour, all_arguments in zip(example.curves, COLOURS, arguments, strict=False):
            label = ", ".join(argument for argument in all_arguments if argument not in common)
            _draw_values(axes, trace(curve, example.steps, option), colour, label)
        tidy(axes, "", "step", option)
        if option == "lr":
            axes.set_ylim(bottom=0)
    if len(example.curves) > 1:
        _add_legend(figure)
    figure.suptitle(_fold(f"{name}({', '.join(common)})", 61), fontsize=9)
    return figure


def _add_legend(figure: Figure) -> None:
    """Name the curves of the first panel below all panels."""
    lines = figure.axes[0].get_lines()
    look = {"fontsize": 7.5, "frameon": False, "handlelength": 1.2, "columnspacing": 1.2}
    figure.legend(handles=lines, ncols=len(lines), loc="outside lower center", **look)


def _draw_values(axes: Axes, values: Sequence[float], colour: str, label: str = "") -> None:
    """Draw a value for each step."""
    style = "steps-post" if len(set(values)) < _FEW_VALUES else "default"
    axes.plot(values, color=colour, linewidth=1.6, drawstyle=style, label=label)


def draw_plateau() -> Figure:
    """Draw what ReduceLROnPlateau sets, and the loss that it looks at."""
    figure = new_figure(480, 240)
    rates, losses = trace_plateau(200)
    left, right = figure.subplots(1, 2)
    _draw_values(left, rates, BLUE)
    _draw_values(right, losses, RED)
    right.set_yscale("log")
    tidy(left, "", "step", "lr")
    tidy(right, "", "step", "loss")
    left.set_ylim(bottom=0)
    figure.suptitle("ReduceLROnPlateau(factor=0.4, patience=15)", fontsize=9)
    return figure


def draw_makers() -> Figure:
    """Draw every maker of `onepass.schedule`, and what can be composed of them."""
    figure, panels = new_grid(len(TEXTS), 3, 740, 180, sharex=True, sharey=True)
    for axes, text in zip(panels, TEXTS, strict=True):
        _draw_schedule(axes, parse(text), 100)
        tidy(axes)
        axes.set_title(_fold(text, 38), fontsize=7.5)
        axes.set_ylim(-0.04, 1.08)
    figure.supxlabel("step", fontsize=9)
    return figure


def plot_schedule(schedule: Schedule, steps: int, path: Path) -> None:
    """Draw one schedule from step 0 to step `steps`, under its text, to the PNG file `path`."""
    figure = new_figure(700, 320)
    axes = figure.subplots()
    _draw_schedule(axes, schedule, steps)
    tidy(axes, _fold(repr(schedule), 100), "step", "value")
    save(figure, path)


def _draw_schedule(axes: Axes, schedule: Schedule, steps: int) -> None:
    """Draw a schedule at a thousand points from step 0 to `steps`."""
    points = [steps * index / _POINTS for index in range(_POINTS + 1)]
    axes.plot(points, [schedule(step) for step in points], color=BLUE, linewidth=1.6)


def _fold(text: str, width: int) -> str:
    """Return lines of at most about this width; each outer method of a long text begins a line.

    Example: `cosine(1.0, steps=100).times(triangular(...).warmup(5))` becomes two lines, because
    `.warmup` stands inside the brackets of `.times`.
    """
    parts = [""]
    for part in re.split(r"(?=\.(?:then|times|warmup)\()", text):
        is_outer = parts[-1].count("(") == parts[-1].count(")")
        if len(text) > width and parts[-1] and is_outer:
            parts.append(part)
        else:
            parts[-1] += part
    return "\n".join(textwrap.fill(part, width) for part in parts)
