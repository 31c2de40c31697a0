"""`onepass bench`: time optimizer steps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..bench import measure, suite
from ..bench.gpu import find_gpu
from ..bench.report import (
    WIDTH,
    list_facts,
    list_goals,
    make_device_table,
    make_fresh_table,
    make_step_table,
    plot,
)
from ..bench.shapes import MODELS
from ..training.display import say
from .checks import check_files, require


def time_steps(
    model: Annotated[
        str | None,
        typer.Option(
            help=f"Among {', '.join(MODELS)}; commas between.", show_default="those that suit"
        ),
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            help="As adamw, adam-amsgrad, lbfgs-wolfe or module:Class; commas between.",
            show_default=", ".join(suite.SUITE),
        ),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Measure every algorithm, in about 20 minutes.")
    ] = False,
    seconds: Annotated[
        float, typer.Option(help="Time for the steps of each optimizer on each model.")
    ] = 8.0,
    json: Annotated[Path | None, typer.Option(help="Write all numbers to this file.")] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Draw a PNG picture to this file.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option(help="Measure first steps and peaks of memory, in fresh processes.")
    ] = True,
    device: Annotated[
        str, typer.Option(help="Where to step: cpu, cuda, or one of several GPUs as cuda:1.")
    ] = "cpu",
) -> None:
    """Time an optimizer step on real shapes: ours, every mode of torch's, and what the memory
    allows.

    Without arguments a suite of typical algorithms is measured, in less than 10 minutes.
    """
    check_files(json, plot_file)
    if plot_file is not None:
        require("matplotlib")
    gpu = find_gpu(device)
    cells = suite.choose(model, optimizer, every, gpu is not None)
    console = Console()
    with console.status("measuring ...") as status:
        report = measure.run(cells, seconds=seconds, fresh=fresh, tell=status.update, gpu=gpu)
    tables = Console(width=max(WIDTH, console.width))
    tables.print(make_step_table(report["results"]))
    if gpu is not None:
        tables.print(make_device_table(report["results"]))
    if fresh and any(cell.fresh for cell in cells):
        tables.print(make_fresh_table(report["results"]))
    for line in [*list_goals(report["results"]), *list_facts(report)]:
        say(console, line)
    if json is not None:
        measure.save(report, json)
        say(console, f"numbers: {json}")
    if plot_file is not None:
        plot(report, plot_file)
        say(console, f"picture: {plot_file}")
