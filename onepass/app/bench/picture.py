"""The picture of a benchmark: a bar for each contender, and a mark at the memory limit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...pictures import BLUE, ORANGE, RED, new_figure, save
from .contenders import LIMIT, OURS

__all__ = ["plot"]

Result = dict[str, Any]

# The names of the bars, and their colours.
OUR_BAR = "onepass"
BEST_BAR = "torch, best mode"
DEFAULT_BAR = "torch, default"
BARS = {OUR_BAR: BLUE, BEST_BAR: ORANGE, DEFAULT_BAR: RED}

# The picture shows at most two of the models that were measured: the first ones of these.
PANELS = (
    "gpt2",
    "lenet",
    "small",
    "mlp",
    "one",
    "resnet18",
    "big",
    "resnet50",
    "llama-1b",
    "llama3-1b",
    "tiny",
    "groups",
    "groups100",
)

# The share of the memory limit from which on a caption names it.
LEAST_SHARE = 0.2

DPI = 130
# Sizes in pixels: the names and the legend around the panels, a panel, and an algorithm in it.
MARGIN = 169
PANEL_WIDTH = 624
ROW_HEIGHT = 57


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw the times of all algorithms on at most two models to the PNG file `path`.

    `report` is what `measure.run` returns. The algorithms are sorted by our time on the first
    model. If more models were measured, only the tables have the others.
    """
    panels = _choose_panels(report["results"])
    names = list(dict.fromkeys(result["optimizer"] for results in panels for result in results))
    width = MARGIN + PANEL_WIDTH * len(panels)
    figure = new_figure(width, MARGIN + ROW_HEIGHT * len(names), dpi=DPI)
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for axes, results in zip(grid[0], panels, strict=True):
        _draw_panel(axes, results, names)

    first = figure.axes[0]
    first.set_yticks(range(len(names)), [_wrap(name) for name in names])
    first.set_ylim(len(names) - 0.5, -0.5)
    _add_legend(figure, first)
    figure.suptitle(_title(report["machine"]), fontsize=11)
    save(figure, path)


def _title(machine: dict[str, Any]) -> str:
    """Return what was measured, and on what device."""
    if "gpu" in machine:
        device = machine["gpu"]["name"]
    else:
        device = f"{machine['cpu']}, {machine['threads']} threads"
    return f"One optimizer step: {device}, torch {machine['torch']}"


def _add_legend(figure: Figure, axes: Axes) -> None:
    """Name the bars and the mark of the limit below the panels."""
    handles: list[Any] = [axes.barh(0, 0, color=colour) for colour in BARS.values()]
    handles += axes.plot([], [], "|", color="black", markersize=10, markeredgewidth=1.5)
    labels = [*BARS, LIMIT]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)


def _choose_panels(results: Sequence[Result]) -> list[list[Result]]:
    """Return the results of at most two models, each sorted by our time.

    Models whose memory limit was measured come first, then those that `PANELS` has first.
    """
    by_model: dict[str, list[Result]] = {}
    for result in results:
        by_model.setdefault(result["model"], []).append(result)

    def priority(model: str) -> tuple[bool, int]:
        """Return a key to sort models by: the smallest comes first."""
        limits = [result["contenders"][LIMIT] for result in by_model[model]]
        is_limited = any("missing" not in limit for limit in limits)
        position = PANELS.index(model) if model in PANELS else len(PANELS)
        return not is_limited, position

    def our_time(result: Result) -> float:
        return result["contenders"][OURS]["median_ms"]

    chosen = sorted(by_model, key=priority)[:2]
    return [sorted(by_model[model], key=our_time) for model in chosen]


def _draw_panel(axes: Axes, results: Sequence[Result], names: Sequence[str]) -> None:
    """Draw the bars of every algorithm on one model, on an axis that begins at 0."""
    longest = 0.0
    for result in results:
        row = names.index(result["optimizer"])
        longest = max(longest, _draw_bars(axes, result, row))
    # Room at the end of the longest bar for its caption.
    axes.set_xlim(0, 1.4 * longest)
    axes.set_title(results[0]["title"], fontsize=11)
    factor, unit = _unit(longest)
    axes.xaxis.set_major_formatter(lambda value, _: f"{factor * value:g}")
    axes.set_xlabel(f"{unit} a step")
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_bars(axes: Axes, result: Result, row: int) -> float:
    """Draw one algorithm's bars around the height `row`, and return the longest time, in ms."""
    height = 0.86 / len(BARS)
    times = {bar: _time_of_bar(result, bar) for bar in BARS}
    shown = {bar: value for bar, value in times.items() if value is not None}
    top = row - (len(shown) - 1) / 2 * height
    for index, (bar, value) in enumerate(shown.items()):
        y = top + index * height
        axes.barh(y, value, height=0.92 * height, color=BARS[bar])
        axes.annotate(
            _caption(result, bar, value),
            (value, y),
            xytext=(4, 0),
            textcoords="offset points",
            va="center_baseline",
            fontsize=7,
        )
    limit = result["contenders"][LIMIT].get("median_ms")
    if limit is not None:
        ends = [top - height / 2, top + height / 2]
        axes.plot([limit, limit], ends, color="black", linewidth=1.5)
    return max(shown.values())


def _unit(milliseconds: float) -> tuple[float, str]:
    """Return by what milliseconds are multiplied for the unit that suits them, and the unit."""
    return (1.0, "ms") if milliseconds >= 1 else (1e3, "us")


def _wrap(name: str) -> str:
    """Return a long name in two lines."""
    return name.replace("-", "\n", 1) if len(name) > 16 else name


def _time_of_bar(result: Result, bar: str) -> float | None:
    """Return the time that a bar shows, in ms.

    None if it was not measured, or if torch's best mode is its default, which has a bar already.
    """
    best = result["summary"]["best_mode"]
    if bar == BEST_BAR and best in (None, "default"):
        return None
    contender = {OUR_BAR: OURS, DEFAULT_BAR: "default", BEST_BAR: best}[bar]
    return result["contenders"][contender].get("median_ms")


def _caption(result: Result, bar: str, value: float) -> str:
    """Return a bar's text, such as `3.2 ms, 97 % of the limit` or `9.1 ms, 2.8x (foreach)`."""
    factor, unit = _unit(value)
    time = f"{factor * value:.3g} {unit}" if value < 1000 else f"{value:.0f} ms"
    summary = result["summary"]
    if bar == OUR_BAR:
        share = summary["share_of_limit"]
        # Memory does not bound a step of a few small tensors.
        if share is None or share < LEAST_SHARE:
            return time
        return f"{time}, {100 * share:.0f} % of the limit"
    times = value / result["contenders"][OURS]["median_ms"]
    digits = 1 if times < 10 else 0
    mode = f" ({summary['best_mode']})" if bar == BEST_BAR else ""
    return f"{time}, {times:.{digits}f}x{mode}"
