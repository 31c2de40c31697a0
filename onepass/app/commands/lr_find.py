"""`onepass lr-find`: find a learning rate for a task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..tasks import TASKS
from ..training.display import say
from ..training.loop import Run, make_settings
from ..training.rate_search import make_rate_table, search_rate, training_command
from .checks import check_files, check_folder, require


def find_lr(
    task: Annotated[str, typer.Option(help=f"What to train: {', '.join(TASKS)}.")] = "digits",
    optimizer: Annotated[
        str | None, typer.Option(help="An optimizer's name.", show_default="AdamW")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Examples a step.", show_default="the task's")
    ] = None,
    lowest: Annotated[float, typer.Option(help="Rate of the first step.")] = 1e-7,
    highest: Annotated[float, typer.Option(help="Rate of the last step.")] = 10.0,
    steps: Annotated[int, typer.Option(help="Steps from the lowest rate to the highest.")] = 100,
    plot_file: Annotated[
        Path | None,
        typer.Option("--plot", help="PNG picture to draw.", show_default="runs/TASK/lr-find.png"),
    ] = None,
    data: Annotated[Path, typer.Option(help="Folder of data on disk (cifar10).")] = Path("data"),
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
) -> None:
    """Find a learning rate: try rates that grow from step to step, and see where the loss falls
    fastest."""
    require("matplotlib", "safetensors")
    settings = make_settings(task, optimizer, batch_size=batch_size, seed=seed)
    picture = Path("runs", task, "lr-find.png") if plot_file is None else plot_file
    if plot_file is None:
        check_folder(picture.parent)
    else:
        check_files(plot_file)
    console = Console()
    job = Run(settings, data)
    say(console, f"{task}: {settings.optimizer}, batch size {settings.batch_size}, {steps} steps")
    found = search_rate(job, console, lowest, highest, steps)
    picture.parent.mkdir(parents=True, exist_ok=True)
    found.plot(
        picture, f"{task}: {settings.optimizer}, batch size {settings.batch_size}, seed {seed}"
    )
    console.print(make_rate_table(found))
    say(console, f"suggested learning rate: {found.suggestion:g}; {found.note}")
    say(console, f"train with it: {training_command(settings, found.suggestion)}")
    say(console, f"picture: {picture}")
