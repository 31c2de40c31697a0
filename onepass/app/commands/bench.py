"""`onepass bench`: time optimizer steps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..bench import measure, report, suite
from ..bench.gpu import find_gpu
from ..bench.shapes import MODELS
from ..training.display import say
from .checks import check_files, require

ModelNames = Annotated[
    str | None,
    typer.Option(
        help=f"Names with commas between them, of {', '.join(MODELS)}; or your own model as "
        "file.py:function, where the function returns a module.",
        show_default="those that suit",
    ),
]
OptimizerNames = Annotated[
    str | None,
    typer.Option(
        help="Names with commas between them, such as adamw, adam-amsgrad, lbfgs-wolfe or "
        "module:Class.",
        show_default=", ".join(suite.SUITE),
    ),
]
Every = Annotated[bool, typer.Option("--all", help="Measure every algorithm, in about 20 minutes.")]
Seconds = Annotated[float, typer.Option(help="Time for the steps of each optimizer on each model.")]
JsonFile = Annotated[Path | None, typer.Option(help="Write all numbers to this file.")]
PlotFile = Annotated[Path | None, typer.Option("--plot", help="Draw a PNG picture to this file.")]
Fresh = Annotated[
    bool, typer.Option(help="Measure first steps and peaks of memory, in fresh processes.")
]
Device = Annotated[
    str, typer.Option(help="Where to step: cpu, cuda, or one of several GPUs, such as cuda:1.")
]


def time_steps(
    model: ModelNames = None,
    optimizer: OptimizerNames = None,
    every: Every = False,
    seconds: Seconds = 8.0,
    json: JsonFile = None,
    plot_file: PlotFile = None,
    fresh: Fresh = True,
    device: Device = "cpu",
) -> None:
    """Time optimizer steps on real shapes: ours, torch's in every mode, and the memory limit.

    Without arguments it measures a suite of typical algorithms, in less than 10 minutes.
    """
    check_files(json, plot_file)
    if plot_file is not None:
        require("matplotlib")
    gpu = find_gpu(device)
    cells = suite.choose(model, optimizer, every, gpu is not None)
    console = Console()
    with console.status("measuring ...") as status:
        measured = measure.run(cells, seconds=seconds, fresh=fresh, tell=status.update, gpu=gpu)
    _print(measured, console, fresh=fresh and any(cell.fresh for cell in cells))
    if json is not None:
        measure.save(measured, json)
        say(console, f"numbers: {json}")
    if plot_file is not None:
        # Only a picture needs matplotlib, which takes a second to import.
        from ..bench.picture import plot

        plot(measured, plot_file)
        say(console, f"picture: {plot_file}")


def _print(measured: dict[str, Any], console: Console, *, fresh: bool) -> None:
    """Print the tables of a report, then the lines below them."""
    results = measured["results"]
    tables = Console(width=max(report.WIDTH, console.width))
    tables.print(report.make_step_table(results))
    if "gpu" in measured["machine"]:
        tables.print(report.make_device_table(results))
    if fresh:
        tables.print(report.make_fresh_table(results))
    for line in [*report.list_goals(results), *report.list_facts(measured)]:
        say(console, line)
