"""`onepass schedule` and `onepass gallery`: show what schedules and optimizers do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ...schedule import MAKERS, parse
from ..gallery.summary import choose_steps, summarize
from ..training.display import say
from .checks import UsageError, check_files, check_folder, require


def show_schedule(
    text: Annotated[
        str,
        typer.Argument(help=f"As 'cosine(3e-4, steps=10000).warmup(500)'; of {', '.join(MAKERS)}."),
    ],
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Draw a PNG picture to this file.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Steps to show.", show_default="its length, or 1000 if it has no end"
        ),
    ] = None,
) -> None:
    """Show a schedule: its length, its values at the ends and in between, its shape, and a picture
    on request."""
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
            f"{text} is beyond all numbers within {shown:,} steps: show fewer with --steps."
        ) from error
    for name, value in lines:
        say(console, f"{name:9} {value}")
    if plot_file is not None:
        from ..gallery.draw_schedules import plot_schedule  # as the curves of a training run

        plot_schedule(schedule, shown, plot_file)
        say(console, f"{'picture':9} {plot_file}")


def draw_gallery(
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("gallery"),
) -> None:
    """Draw what optimizers and schedules do: learning rates, momentum, the paths of all algorithms,
    every scheduler."""
    require("matplotlib")
    check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    from ..gallery.album import make  # as the curves of a training run

    console = Console()
    for picture, path in make(out):
        say(console, f"{path}: {picture.meaning}")
