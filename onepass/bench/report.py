"""A benchmark's results as tables in a terminal, and as one picture."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from onepass.bench.contenders import LIMIT, OURS, TORCH

__all__ = ["WIDTH", "list_facts", "make_fresh_table", "make_step_table", "plot"]

# Columns of text that the tables need: in a narrower terminal, wrapped lines say more than cut numbers.
WIDTH = 112

Report = dict[str, Any]
Result = dict[str, Any]

# Okabe and Ito's colours: told apart by colour-blind readers, and in print by their lightness.
BARS = (
    ("onepass", "#0072b2"),
    ("memory limit", "#b3b3b3"),
    ("torch, best mode", "#e69f00"),
    ("torch, default", "#d55e00"),
)


def list_facts(report: Report) -> list[str]:
    """What was measured on what, in lines."""
    machine, bandwidth = report["machine"], report["bandwidth"]
    copy, update = (bandwidth[f"{what}_gigabytes_per_second"] for what in ("copy", "update"))
    load = machine["load_average"]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads; {machine['date']}",
        f"torch {machine['torch']}, numpy {machine['numpy']}, llvmlite {machine['llvmlite']}",
        f"torch's copy moves {copy:.1f} GB/s, its update in place {update:.1f} GB/s",
    ]
    if report["import_ms"] is not None:
        lines.append(f"import onepass: {report['import_ms']:.0f} ms after import torch")
    if load and load[0] > 0.5:
        lines.append(f"the machine was not idle (load {load[0]:.1f}): trust the ratios, not the times")
    return lines


def make_step_table(results: Sequence[Result]) -> Table:
    """Milliseconds a step for each contender, and what follows: ratios above 1 mean that ours is faster."""
    ratios = ("times\ndefault", "times\nbest", "of the\nlimit", "GB/s", "us per\ntensor")
    headings = ("optimizer", OURS, *TORCH, LIMIT.replace(" ", "\n"), *ratios)
    table = _table("One step: median ms (torch in each of its modes)", headings)
    for result in results:
        s = result["summary"]
        table.add_row(
            result["model"],
            result["optimizer"],
            *(_milliseconds(result["contenders"][name]) for name in (OURS, *TORCH, LIMIT)),
            _number(s["times_default"], "{:.1f}"),
            _number(s["times_best"], "{:.2f}"),
            f"{100 * s['share_of_limit']:.0f} %",
            f"{s['gigabytes_per_second']:.1f}",
            f"{s['us_per_tensor']:.2f}",
        )
    return table


def make_fresh_table(results: Sequence[Result]) -> Table:
    """First steps in fresh processes, with the part that allocating the state takes, and peaks of memory."""
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
        "First step (ms, construction included) and peak of memory above params, grads and state (MB)", headings
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
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, collapse_padding=True)
    table.add_column("model", no_wrap=True)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    return table


def _milliseconds(contender: Result) -> str:
    if "missing" in contender:
        return "-"
    value = contender["median_ms"]
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value < 1000 else f"{value:.0f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


# --- the picture -----------------------------------------------------------------------------------------------------


def plot(report: Report, path: Path) -> None:
    """Draw a panel for each model to the PNG file `path`: a bar for each contender, times on a logarithmic axis."""
    # Takes a second to import, and only pictures need it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    results = report["results"]
    models = list(dict.fromkeys(result["model"] for result in results))
    columns = min(2, len(models))
    rows = -(-len(models) // columns)
    most = max(sum(result["model"] == model for result in results) for model in models)
    figure = Figure(figsize=(6.4 * columns, 0.9 + rows * (0.9 + 0.92 * most)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, model in zip(panels, models, strict=False):
        _draw(axes, [result for result in results if result["model"] == model])
    for axes in panels[len(models) :]:
        axes.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    if len(models) < len(panels):
        panels[-1].legend(handles, labels, loc="center", frameon=False, fontsize=11)
    else:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(BARS), frameon=False)
    machine = report["machine"]
    figure.suptitle(f"One optimizer step: {machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}")
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=150)
    os.replace(temporary, path)


def _draw(axes: Any, results: Sequence[Result]) -> None:
    height = 0.8 / len(BARS)
    longest = 0.0
    for i, (name, colour) in enumerate(BARS):
        for y, result in enumerate(results):
            value = _pick(result, name)
            if value is None:
                continue
            longest = max(longest, value)
            at = y + (i - (len(BARS) - 1) / 2) * height
            axes.barh(at, value, height=0.9 * height, color=colour, label=name if y == 0 else None)
            axes.annotate(
                _caption(result, name, value),
                (value, at),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
    axes.set_yticks(range(len(results)), [result["optimizer"] for result in results])
    axes.invert_yaxis()
    axes.set_xscale("log")
    shortest = min(c["median_ms"] for result in results for c in result["contenders"].values() if "median_ms" in c)
    # Room at the end of the longest bar for its caption.
    axes.set_xlim(shortest / 2, longest * (longest / shortest) ** 0.3 * 1.6)
    axes.set_title(results[0]["title"], fontsize=11)
    axes.set_xlabel("ms a step")
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _pick(result: Result, bar: str) -> float | None:
    mode = {"onepass": OURS, "memory limit": LIMIT, "torch, default": "default"}.get(
        bar, result["summary"]["best_mode"]
    )
    return None if mode is None else result["contenders"][mode].get("median_ms")


def _caption(result: Result, bar: str, value: float) -> str:
    time = f"{value:.3g} ms" if value < 1000 else f"{value:.0f} ms"
    ours = result["contenders"][OURS]["median_ms"]
    if bar == "onepass":
        return time
    if bar == "memory limit":
        return f"{time}, onepass reaches {100 * value / ours:.0f} %"
    mode = f" ({result['summary']['best_mode']})" if bar == "torch, best mode" else ""
    return f"{time}, {value / ours:.3g}x{mode}"
