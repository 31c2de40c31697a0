"""A benchmark's results as tables and lines in a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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
]

# The tables need this many columns of text: in a narrower terminal, wrapped lines are better than
# numbers that are cut.
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
    "us_per_tensor": "us for a step of one tensor",
    "first_s": "s to the end of the first step, with an empty cache",
    "warm_s": "s to the end of the first step, with a warm cache",
    "peak_share": "of the parameters' memory above state",
}

# Shown in percent.
SHARES = ("share_of_limit", "host_of_goal", "peak_share")
# Shown whether its goal is met or not, because no table has it.
ALWAYS_TOLD = "times_shorter_table"


# --- lines ----------------------------------------------------------------------------------------


def list_facts(report: Report) -> list[str]:
    """Return lines that say what was measured, and on what machine."""
    machine = report["machine"]
    bandwidth = report["bandwidth"]
    copy = bandwidth["copy_gigabytes_per_second"]
    update = bandwidth["update_gigabytes_per_second"]
    processor = f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"
    lines = [f"{processor}; {machine['date']}"]
    if "gpu" in machine:
        lines += _describe_gpu(machine["gpu"])
    lines += [
        f"torch {machine['torch']}, numpy {machine['numpy']}, llvmlite {machine['llvmlite']}",
        f"torch's copy moves {copy:.1f} GB/s, its update in place {update:.1f} GB/s",
    ]
    if any(result["class"] == "LBFGS" for result in report["results"]):
        lines.append(
            "LBFGS: a step is 20 iterations with a history of 10; the time of its closure is left "
            "out"
        )
    if report["import_ms"] is not None:
        lines.append(f"import onepass: {report['import_ms']:.0f} ms after import torch")
    load = machine["load_average"]
    if load and load[0] > 0.5:
        lines.append(
            f"the machine was not idle (load {load[0]:.1f}): trust the ratios, not the times"
        )
    return lines


def _describe_gpu(gpu: dict[str, Any]) -> list[str]:
    """Return what a GPU is, and how its times are to be read."""
    platform = f"ROCm {gpu['hip']}" if gpu["hip"] else f"CUDA {gpu['cuda']}"
    device = (
        f"{gpu['name']}, {gpu['memory_gib']:g} GiB, driver {gpu['driver']}, {platform}, "
        f"triton {gpu['triton']}"
    )
    reading = (
        "a step takes the longer of its time on the device and its time on the host; the limit is "
        "that of torch's copy"
    )
    return [device, reading]


def list_goals(results: Sequence[Result]) -> list[str]:
    """Return lines that say how many goals are met, which are not, and what no table has."""
    judged = [(result, goal) for result in results for goal in result["goals"]]
    if not judged:
        return []
    met = [pair for pair in judged if pair[1]["met"]]
    tail = "" if len(met) == len(judged) else ", but not"
    lines = [f"goals: {len(met)} of {len(judged)} are met{tail}"]
    told = [
        (result, goal) for result, goal in judged if not goal["met"] or goal["what"] == ALWAYS_TOLD
    ]
    told.sort(key=lambda pair: pair[1]["met"])
    for result, goal in told:
        value = f"{_show(goal['what'], goal['value'])} {WORDS[goal['what']]}"
        lines.append(f"    {result['model']}, {result['optimizer']}: {value} ({_compare(goal)})")
    return lines


# --- tables ---------------------------------------------------------------------------------------


def make_step_table(results: Sequence[Result]) -> Table:
    """Return a table of milliseconds a step for each contender, and of ratios beside their goals.

    A ratio above 1 says that ours is faster.
    """
    modes = [
        mode
        for mode in MODES
        if mode in TORCH or any(mode in result["contenders"] for result in results)
    ]
    headings = ("optimizer", OURS, *modes, LIMIT.replace(" ", "\n"))
    table = _new_table(
        "One step: median ms (torch in each of its modes), and the goals for what follows", headings
    )
    for heading in ("times\ndefault", "times\nbest", "of the\nlimit"):
        table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("goal", justify="left", no_wrap=True)
    for result, following in zip(results, [*results[1:], None], strict=True):
        ends_model = following is not None and following["model"] != result["model"]
        table.add_row(
            result["model"],
            result["optimizer"],
            *(_milliseconds(result["contenders"][name]) for name in (OURS, *modes, LIMIT)),
            *_beside_goal(result, "times_default"),
            *_beside_goal(result, "times_best"),
            *_beside_goal(result, "share_of_limit"),
            end_section=ends_model,
        )
    return table


def make_device_table(results: Sequence[Result]) -> Table:
    """Return a table of a step's microseconds on a GPU and on the host, beside the host's goal."""
    names = {OURS: "onepass", OURS_CAPTURABLE: "capturable", "default": "default", "fused": "fused"}
    headings = ["optimizer"]
    for name in names.values():
        headings += [f"{name}\n{part}" for part in ("device", "host", "wall")]
    table = _new_table(
        "One step: median us on the device, on the host, and of both one after the other", headings
    )
    table.add_column("host of\nits goal", justify="right", no_wrap=True)
    for result in results:
        if "host_ms" not in result["contenders"][OURS]:
            continue
        cells = []
        for name in names:
            cells += _microseconds(result["contenders"][name])
        share = f"{100 * result['summary']['host_of_goal']:.0f} %"
        table.add_row(result["model"], result["optimizer"], *cells, share)
    return table


def make_fresh_table(results: Sequence[Result]) -> Table:
    """Return a table of first steps in fresh processes, and of peaks of memory.

    Of our first step, the time to allocate the state has a column of its own.
    """
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
    title = (
        "First step (ms, construction included) and peak of memory above params, grads and state "
        "(MB)"
    )
    table = _new_table(title, headings)
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
            *(_number(contender.get("first_ms"), "{:.0f}") for contender in (default, fused)),
            *(_number(contender.get("peak_mb"), "{:.1f}") for contender in (ours, default, fused)),
        )
    return table


def _new_table(title: str, headings: Iterable[str]) -> Table:
    """Return an empty table whose first columns are the model and these headings."""
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, collapse_padding=True
    )
    table.add_column("model", no_wrap=True)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    return table


# --- cells ----------------------------------------------------------------------------------------


def _show(what: str, value: float) -> str:
    """Return a value as the tables show it: a share in percent, a ratio with two digits or more."""
    if what in SHARES:
        return f"{100 * value:.1f} %"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _beside_goal(result: Result, what: str) -> tuple[str, str]:
    """Return the cells of a ratio and of its goal; the second is empty if there is no goal."""
    value = result["summary"][what]
    if value is None:
        return "-", ""
    shown = _show(what, value)
    for goal in result["goals"]:
        if goal["what"] == what:
            style = "green" if goal["met"] else "red"
            return f"[{style}]{shown}", f"[{style}]{_compare(goal)}"
    return shown, ""


def _compare(goal: dict[str, Any]) -> str:
    """Return how a value compares with its bound, such as `>= 95 %` or `> 1.25`."""
    bound = f"{100 * goal['bound']:g} %" if goal["what"] in SHARES else f"{goal['bound']:g}"
    signs = ("<=", ">") if goal["at_most"] else (">=", "<")
    return f"{signs[0] if goal['met'] else signs[1]} {bound}"


def _milliseconds(contender: Result) -> str:
    """Return a contender's median with three digits, or more before the point."""
    if "missing" in contender:
        return "-"
    value = contender["median_ms"]
    if value >= 1000:
        return f"{value:.0f}"
    decimals = max(0, 2 - math.floor(math.log10(value)))
    return f"{value:.{decimals}f}"


def _microseconds(contender: Result) -> list[str]:
    """Return the cells of a contender's times on the device, on the host and of both."""
    cells = []
    for part in ("device_ms", "host_ms", "wall_ms"):
        value = contender.get(part)
        cells.append("-" if value is None else f"{1e3 * value:.0f}")
    return cells


def _number(value: float | None, form: str) -> str:
    """Return a number in this form, or `-` if there is none."""
    return "-" if value is None else form.format(value)
