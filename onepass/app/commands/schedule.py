"""`onepass schedule`: show what a schedule does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ...schedule import MAKERS, parse
from ..gallery.summary import choose_steps, summarize
from ..training.display import say
from .checks import UsageError, check_files, require

ScheduleText = Annotated[
    str,
    typer.Argument(
        help=f"Such as 'cosine(3e-4, steps=10000).warmup(500)'; makers are {', '.join(MAKERS)}."
    ),
]
PlotFile = Annotated[Path | None, typer.Option("--plot", help="Draw a PNG picture to this file.")]
Steps = Annotated[
    int | None,
    typer.Option(min=1, help="Steps to show.", show_default="its length, or 1000 if it has no end"),
]


def show_schedule(text: ScheduleText, plot_file: PlotFile = None, steps: Steps = None) -> None:
    """Show a schedule: its length, some of its values, its shape, and a picture on request."""
    check_files(plot_file)
    if plot_file is not None:
        require("matplotlib")
    schedule = parse(text)
    shown = choose_steps(schedule, steps)
    console = Console()
    try:
        lines = summarize(schedule, shown, plain=console.options.ascii_only)
    except OverflowError as error:
        raise UsageError(
            f"{text} has a value that is too large for a number within {shown:,} steps: show fewer "
            "with --steps."
        ) from error
    for name, value in lines:
        say(console, f"{name:9} {value}")
    if plot_file is not None:
        # Only a picture needs matplotlib, which takes a second to import.
        from ..gallery.draw_schedules import plot_schedule

        plot_schedule(schedule, shown, plot_file)
        say(console, f"{'picture':9} {plot_file}")
