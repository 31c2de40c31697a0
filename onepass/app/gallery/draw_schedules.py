"""Pictures of schedules: torch's schedulers, what `onepass.schedule` makes, and one that a user
writes."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...pictures import COLOURS, new_figure, save, tidy
from ...schedule import Schedule, parse
from .lr_schedules import EXAMPLES, TEXTS, trace, trace_plateau

__all__ = ["draw_makers", "draw_plateau", "draw_scheduler", "plot_schedule"]


def draw_scheduler(name: str) -> Figure:
    """The learning rate, and what else is set, under the scheduler of `EXAMPLES` with that name."""
    example = EXAMPLES[name]
    figure = new_figure(480, 240)
    words = [curve.text.split(", ") for curve in example.curves]
    common = [word for word in words[0] if all(word in others for others in words)]
    for axes, option in zip(
        figure.subplots(1, len(example.options), squeeze=False)[0], example.options, strict=True
    ):
        for curve, colour, own in zip(example.curves, COLOURS, words, strict=False):
            label = ", ".join(word for word in own if word not in common)
            _draw_values(axes, trace(curve, example.steps, option), colour, label)
        tidy(axes, "", "step", option)
        if option == "lr":
            axes.set_ylim(bottom=0)
    if len(words) > 1:
        lines = figure.axes[0].get_lines()
        look = {"fontsize": 7.5, "frameon": False, "handlelength": 1.2, "columnspacing": 1.2}
        figure.legend(handles=lines, ncols=len(words), loc="outside lower center", **look)
    figure.suptitle(_fold(f"{name}({', '.join(common)})", 61), fontsize=9)
    return figure


def _draw_values(axes: Axes, values: Sequence[float], colour: str, label: str = "") -> None:
    """A value for each step: as stairs where there are few different ones."""
    stairs = "steps-post" if len(set(values)) < 10 else "default"
    axes.plot(values, color=colour, linewidth=1.6, drawstyle=stairs, label=label)


def draw_plateau() -> Figure:
    """ReduceLROnPlateau, and the loss that it looks at."""
    figure = new_figure(480, 240)
    rates, losses = trace_plateau(200)
    left, right = figure.subplots(1, 2)
    _draw_values(left, rates, COLOURS[0])
    _draw_values(right, losses, COLOURS[1])
    right.set_yscale("log")
    tidy(left, "", "step", "lr")
    tidy(right, "", "step", "loss")
    left.set_ylim(bottom=0)
    figure.suptitle("ReduceLROnPlateau(factor=0.4, patience=15)", fontsize=9)
    return figure


def draw_makers() -> Figure:
    """Every maker of `onepass.schedule`, and what can be composed of them."""
    figure = new_figure(740, 900)
    for axes, text in zip(figure.subplots(5, 3, sharex=True, sharey=True).flat, TEXTS, strict=True):
        _draw(axes, parse(text), 100)
        tidy(axes)
        axes.set_title(_fold(text, 38), fontsize=7.5)
        axes.set_ylim(-0.04, 1.08)
    figure.supxlabel("step", fontsize=9)
    return figure


def plot_schedule(schedule: Schedule, steps: int, path: Path) -> None:
    """Draw one schedule over its steps 0 to `steps`, under the text that makes it, to the PNG file
    `path`."""
    figure = new_figure(700, 320)
    axes = figure.subplots()
    _draw(axes, schedule, steps)
    tidy(axes, _fold(repr(schedule), 100), "step", "value")
    save(figure, path)


def _draw(axes: Axes, schedule: Schedule, steps: int) -> None:
    """Values at a thousand places from step 0 to `steps`."""
    at = [steps * i / 1000 for i in range(1001)]
    axes.plot(at, [schedule(step) for step in at], color=COLOURS[0], linewidth=1.6)


def _fold(text: str, width: int) -> str:
    """Lines of at most about that width; of a long text, each of the outer methods begins its
    own."""
    parts = [""]
    for part in re.split(r"(?=\.(?:then|times|warmup)\()", text):
        if len(text) > width and parts[-1] and parts[-1].count("(") == parts[-1].count(")"):
            parts.append(part)
        else:
            parts[-1] += part
    return "\n".join(textwrap.fill(part, width) for part in parts)
