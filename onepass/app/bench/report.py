"""A benchmark's results as tables in a terminal, and as one picture."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .contenders import LIMIT, MODES, OURS, OURS_CAPTURABLE, TORCH

__all__ = [
    "WIDTH",
    "list_facts",
    "list_goals",
    "make_device_table",
    "make_fresh_table",
    "make_step_table",
    "plot",
]

# Columns of text that the tables need: in a narrower terminal, wrapped lines say more than cut
# numbers.
WIDTH = 124

Report = dict[str, Any]
Result = dict[str, Any]

WORDS = {
    "times_default": "times torch's default",
    "times_best": "times torch's best mode",
    "share_of_limit": "of the memory limit",
    "times_shorter_table": "times as long as in the table of 10,000 rows",
    "times_fused": "times torch's fused",
    "times_foreach": "times torch's foreach",
    "host_of_goal": "of the time on the host that a step may take",
    "first_s": "s to the end of the first step, with an empty cache",
    "warm_s": "s to the end of the first step, with a warm cache",
    "peak_share": "of the parameters' memory above state",
}

SHARES = ("share_of_limit", "host_of_goal", "peak_share")

# Of the models that were measured the picture shows two, the first of these.
PANELS = (
    "gpt2",
    "small",
    "big",
    "resnet50",
    "llama-1b",
    "llama3-1b",
    "tiny",
    "groups",
    "groups100",
)

# Okabe and Ito's colours: told apart by colour-blind readers, and in print by their lightness.
BARS = (("onepass", "#0072b2"), ("torch, best mode", "#e69f00"), ("torch, default", "#d55e00"))


def list_facts(report: Report) -> list[str]:
    """What was measured on what, in lines."""
    machine, bandwidth = report["machine"], report["bandwidth"]
    copy, update = (bandwidth[f"{what}_gigabytes_per_second"] for what in ("copy", "update"))
    load = machine["load_average"]
    lines = [
        (
            f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads; "
            f"{machine['date']}"
        ),
        f"torch {machine['torch']}, numpy {machine['numpy']}, llvmlite {machine['llvmlite']}",
        f"torch's copy moves {copy:.1f} GB/s, its update in place {update:.1f} GB/s",
    ]
    if "gpu" in machine:
        lines[1:1] = _describe_gpu(machine["gpu"])
    if any(result["class"] == "LBFGS" for result in report["results"]):
        lines.append(
            "LBFGS: a step is 20 iterations with a history of 10; the time of its closure is left "
            "out"
        )
    if report["import_ms"] is not None:
        lines.append(f"import onepass: {report['import_ms']:.0f} ms after import torch")
    if load and load[0] > 0.5:
        lines.append(
            f"the machine was not idle (load {load[0]:.1f}): trust the ratios, not the times"
        )
    return lines


def _describe_gpu(gpu: dict[str, Any]) -> list[str]:
    platform = f"ROCm {gpu['hip']}" if gpu["hip"] else f"CUDA {gpu['cuda']}"
    return [
        (
            f"{gpu['name']}, {gpu['memory_gib']:g} GiB, driver {gpu['driver']}, {platform}, triton "
            f"{gpu['triton']}"
        ),
        (
            "a step takes the longer of its time on the device and its time on the host; the limit "
            "is that of torch's copy"
        ),
    ]


def make_step_table(results: Sequence[Result]) -> Table:
    """Milliseconds a step for each contender, and what follows, each beside its goal; above 1 ours
    is faster."""
    modes = [
        mode for mode in MODES if mode in TORCH or any(mode in r["contenders"] for r in results)
    ]
    headings = ("optimizer", OURS, *modes, LIMIT.replace(" ", "\n"))
    table = _table(
        "One step: median ms (torch in each of its modes), and the goals for what follows", headings
    )
    for heading in ("times\ndefault", "times\nbest", "of the\nlimit"):
        table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("goal", justify="left", no_wrap=True)
    for result, following in zip(results, [*results[1:], None], strict=True):
        table.add_row(
            result["model"],
            result["optimizer"],
            *(_milliseconds(result["contenders"][name]) for name in (OURS, *modes, LIMIT)),
            *_beside_goal(result, "times_default"),
            *_beside_goal(result, "times_best"),
            *_beside_goal(result, "share_of_limit"),
            end_section=following is not None and following["model"] != result["model"],
        )
    return table


def _show(what: str, value: float) -> str:
    return f"{100 * value:.1f} %" if what in SHARES else f"{value:.{1 if value >= 10 else 2}f}"


def _beside_goal(result: Result, what: str) -> tuple[str, str]:
    """A ratio, and how it compares with its goal; both empty or the second where there is none."""
    value = result["summary"][what]
    if value is None:
        return "-", ""
    for goal in result["goals"]:
        if goal["what"] == what:
            style = "green" if goal["met"] else "red"
            return f"[{style}]{_show(what, value)}", f"[{style}]{_compare(goal)}"
    return _show(what, value), ""


def _compare(goal: dict[str, Any]) -> str:
    bound = f"{100 * goal['bound']:g} %" if goal["what"] in SHARES else f"{goal['bound']:g}"
    return (
        f"{('<=' if goal['met'] else '>') if goal['at_most'] else ('>=' if goal['met'] else '<')} "
        f"{bound}"
    )


def list_goals(results: Sequence[Result]) -> list[str]:
    """How many goals are met, which are not, and what no table has, in lines."""
    judged = [(result, goal) for result in results for goal in result["goals"]]
    met = [goal for _, goal in judged if goal["met"]]
    lines = [
        (
            f"goals: {len(met)} of {len(judged)} are "
            f"met{'' if len(met) == len(judged) else ', but not'}"
        )
    ]
    told = [
        (r, goal) for r, goal in judged if not goal["met"] or goal["what"] == "times_shorter_table"
    ]
    for result, goal in sorted(told, key=lambda one: one[1]["met"]):
        value = f"{_show(goal['what'], goal['value'])} {WORDS[goal['what']]}"
        lines.append(f"    {result['model']}, {result['optimizer']}: {value} ({_compare(goal)})")
    return lines if judged else []


def make_device_table(results: Sequence[Result]) -> Table:
    """What a step on a GPU takes on the device and on the host, in microseconds; and of the host's,
    what it may."""
    who = {OURS: "onepass", OURS_CAPTURABLE: "capturable", "default": "default", "fused": "fused"}
    headings = [
        "optimizer",
        *(f"{name}\n{part}" for name in who.values() for part in ("device", "host", "wall")),
    ]
    table = _table(
        "One step: median us on the device, on the host, and of both one after the other", headings
    )
    table.add_column("host of\nits goal", justify="right", no_wrap=True)
    for result in results:
        if "host_ms" not in result["contenders"][OURS]:
            continue
        times = [
            _number(None if value is None else 1e3 * value, "{:.0f}")
            for name in who
            for part in ("device_ms", "host_ms", "wall_ms")
            for value in [result["contenders"][name].get(part)]
        ]
        table.add_row(
            result["model"],
            result["optimizer"],
            *times,
            f"{100 * result['summary']['host_of_goal']:.0f} %",
        )
    return table


def make_fresh_table(results: Sequence[Result]) -> Table:
    """First steps in fresh processes, with the part that allocating the state takes, and peaks of
    memory."""
    headings = (
        "optimizer",
        "first step",
        "state alone",
        "rest",
        "torch default",
        "torch fused",
        "peak",
        "default",
        "fused",
    )
    table = _table(
        "First step (ms, construction included) and peak of memory above params, grads and state "
        "(MB)",
        headings,
    )
    for result in results:
        ours, default, fused = (result["contenders"][name] for name in (OURS, "default", "fused"))
        if "first_ms" not in ours:
            continue
        table.add_row(
            result["model"],
            result["optimizer"],
            f"{ours['first_ms']:.0f}",
            f"{ours['state_ms']:.0f}",
            f"{ours['first_ms'] - ours['state_ms']:.0f}",
            *(_number(c.get("first_ms"), "{:.0f}") for c in (default, fused)),
            *(_number(c.get("peak_mb"), "{:.1f}") for c in (ours, default, fused)),
        )
    return table


def _table(title: str, headings: Iterable[str]) -> Table:
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, collapse_padding=True
    )
    table.add_column("model", no_wrap=True)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    return table


def _milliseconds(contender: Result) -> str:
    if "missing" in contender:
        return "-"
    value = contender["median_ms"]
    return (
        f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value < 1000 else f"{value:.0f}"
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


# --- the picture ----------------------------------------------------------------------------------


def plot(report: Report, path: Path) -> None:
    """Draw the times of all algorithms on two models to the PNG file `path`, sorted by our time on
    the first.

    Where one was measured there is one panel; where there are more, tables have the others.
    """
    # Takes a second to import, and only pictures need it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _choose_panels(report["results"])
    names = list(dict.fromkeys(result["optimizer"] for results in panels for result in results))
    figure = Figure(
        figsize=(1.3 + 4.8 * len(panels), 1.3 + 0.44 * len(names)), layout="constrained"
    )
    FigureCanvasAgg(figure)
    for axes, results in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True
    ):
        _draw(axes, results, names)
    figure.axes[0].set_yticks(range(len(names)), [_wrap(name) for name in names])
    figure.axes[0].set_ylim(len(names) - 0.5, -0.5)
    handles: list[Any] = [figure.axes[0].barh(0, 0, color=colour) for _, colour in BARS]
    handles += figure.axes[0].plot([], [], "|", color="black", markersize=10, markeredgewidth=1.5)
    labels = [*(name for name, _ in BARS), LIMIT]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    machine = report["machine"]
    place = (
        machine["gpu"]["name"]
        if "gpu" in machine
        else f"{machine['cpu']}, {machine['threads']} threads"
    )
    title = f"One optimizer step: {place}, torch {machine['torch']}"
    figure.suptitle(title, fontsize=11)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=130)
    os.replace(temporary, path)


def _choose_panels(results: Sequence[Result]) -> list[list[Result]]:
    """The results of at most two models, those with a memory limit first, each sorted by our
    time."""
    of: dict[str, list[Result]] = {}
    for result in results:
        of.setdefault(result["model"], []).append(result)

    def place(model: str) -> tuple[bool, int]:
        limited = any("missing" not in result["contenders"][LIMIT] for result in of[model])
        return not limited, PANELS.index(model) if model in PANELS else len(PANELS)

    chosen = sorted(of, key=place)[:2]
    return [sorted(of[model], key=lambda r: r["contenders"][OURS]["median_ms"]) for model in chosen]


def _draw(axes: Any, results: Sequence[Result], names: Sequence[str]) -> None:
    """One panel: for each algorithm a bar for each contender, on an axis from 0, and a mark at the
    limit."""
    height = 0.86 / len(BARS)
    longest = 0.0
    for result in results:
        y = names.index(result["optimizer"])
        bars = [
            (name, colour, value)
            for name, colour in BARS
            if (value := _pick(result, name)) is not None
        ]
        for i, (name, colour, value) in enumerate(bars):
            at = y + (i - (len(bars) - 1) / 2) * height
            axes.barh(at, value, height=0.92 * height, color=colour)
            place = {
                "xytext": (4, 0),
                "textcoords": "offset points",
                "va": "center_baseline",
                "fontsize": 7,
            }
            axes.annotate(_caption(result, name, value), (value, at), **place)
            longest = max(longest, value)
        limit = result["contenders"][LIMIT].get("median_ms")
        if limit is not None:
            at = y - (len(bars) - 1) / 2 * height
            axes.plot(
                [limit, limit], [at - height / 2, at + height / 2], color="black", linewidth=1.5
            )
    # Room at the end of the longest bar for its caption.
    axes.set_xlim(0, 1.4 * longest)
    axes.set_title(results[0]["title"], fontsize=11)
    axes.set_xlabel("ms a step")
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _wrap(name: str) -> str:
    """A long name in two lines."""
    return name.replace("-", "\n", 1) if len(name) > 16 else name


def _pick(result: Result, bar: str) -> float | None:
    """The time that a bar shows; None where there is none, or where torch's default is its best
    mode."""
    best = result["summary"]["best_mode"]
    if bar == "torch, best mode" and best in (None, "default"):
        return None
    mode = {"onepass": OURS, "torch, default": "default", "torch, best mode": best}[bar]
    return result["contenders"][mode].get("median_ms")


def _caption(result: Result, bar: str, value: float) -> str:
    time = f"{value:.3g} ms" if value < 1000 else f"{value:.0f} ms"
    summary = result["summary"]
    if bar == "onepass":
        share = summary["share_of_limit"]
        return time if share is None else f"{time}, {100 * share:.0f} % of the limit"
    times = value / result["contenders"][OURS]["median_ms"]
    mode = f" ({summary['best_mode']})" if bar == "torch, best mode" else ""
    return f"{time}, {times:.{1 if times < 10 else 0}f}x{mode}"
