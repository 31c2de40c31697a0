"""`onepass lr-find`: find a learning rate for a task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..tasks import TASKS
from ..training.display import say
from ..training.rate_search import make_rate_table, search_rate, training_command
from ..training.run import Run
from ..training.settings import make_settings
from .checks import check_files, check_folder, require

TaskName = Annotated[str, typer.Option(help=f"What to train: {', '.join(TASKS)}.")]
OptimizerName = Annotated[
    str | None,
    typer.Option(
        help="An optimizer's name, such as adamw, sgd-momentum or module:Class.",
        show_default="AdamW",
    ),
]
BatchSize = Annotated[
    int | None, typer.Option(help="Examples in a step.", show_default="the task's")
]
Lowest = Annotated[float, typer.Option(help="The rate of the first step.")]
Highest = Annotated[float, typer.Option(help="The rate of the last step.")]
Steps = Annotated[int, typer.Option(help="Steps from the lowest rate to the highest.")]
PlotFile = Annotated[
    Path | None,
    typer.Option("--plot", help="PNG picture to draw.", show_default="runs/TASK/lr-find.png"),
]
DataFolder = Annotated[Path, typer.Option(help="Folder of data on disk (cifar10).")]
Seed = Annotated[int, typer.Option(help="The seed of everything random.")]


def find_lr(
    task: TaskName = "digits",
    optimizer: OptimizerName = None,
    batch_size: BatchSize = None,
    lowest: Lowest = 1e-7,
    highest: Highest = 10.0,
    steps: Steps = 100,
    plot_file: PlotFile = None,
    data: DataFolder = Path("data"),
    seed: Seed = 0,
) -> None:
    """Find a learning rate: raise it from step to step, and see where the loss falls fastest."""
    require("matplotlib", "safetensors")
    settings = make_settings(task, optimizer, batch_size=batch_size, seed=seed)
    picture = Path("runs", task, "lr-find.png") if plot_file is None else plot_file
    if plot_file is None:
        check_folder(picture.parent)
    else:
        check_files(plot_file)
    console = Console()
    run = Run(settings, data)
    title = f"{task}: {settings.optimizer}, batch size {settings.batch_size}"
    say(console, f"{title}, {steps} steps")
    found = search_rate(run, console, lowest, highest, steps)
    picture.parent.mkdir(parents=True, exist_ok=True)
    found.plot(picture, f"{title}, seed {seed}")
    console.print(make_rate_table(found))
    say(console, f"suggested learning rate: {found.suggestion:g}; {found.note}")
    say(console, f"train with it: {training_command(settings, found.suggestion)}")
    say(console, f"picture: {picture}")
