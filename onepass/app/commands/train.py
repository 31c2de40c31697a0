"""`onepass train`: train a small model on real data."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..tasks import TASKS
from ..training import loop
from ..training.comparison import compare_steps
from ..training.display import TrainDisplay, describe, make_comparison_table, make_time_table, say
from ..training.run import CHECKPOINT, Run
from ..training.settings import Settings, SettingsError, make_settings
from .checks import check_folder, require

TaskName = Annotated[
    str | None, typer.Option(help=f"What to train: {', '.join(TASKS)}.", show_default="digits")
]
OptimizerName = Annotated[
    str | None,
    typer.Option(
        help="An optimizer's name, such as adamw, sgd-momentum or module:Class.",
        show_default="AdamW",
    ),
]
Rate = Annotated[
    float | None, typer.Option(help="The highest learning rate.", show_default="the task's")
]
Epochs = Annotated[int | None, typer.Option(help="Epochs to train.", show_default="the task's")]
BatchSize = Annotated[
    int | None, typer.Option(help="Examples in a step.", show_default="the task's")
]
ScheduleName = Annotated[
    str | None, typer.Option(help="cosine, step or none.", show_default="cosine")
]
OutFolder = Annotated[
    Path | None, typer.Option(help="Folder for the results.", show_default="runs/TASK")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")]
DataFolder = Annotated[
    Path | None, typer.Option(help="Folder of data on disk (cifar10).", show_default="data")
]
Seed = Annotated[int | None, typer.Option(help="The seed of everything random.", show_default="0")]


def train_task(
    task: TaskName = None,
    optimizer: OptimizerName = None,
    lr: Rate = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    schedule: ScheduleName = None,
    out: OutFolder = None,
    resume: Resume = False,
    data: DataFolder = None,
    seed: Seed = None,
) -> int:
    """Train a small model on real data, save it after every epoch, and time the optimizer.

    With --resume, settings that are not given are those of the run that is continued.
    """
    require("matplotlib", "safetensors")
    given: dict[str, Any] = {
        "task": task,
        "optimizer": optimizer,
        "lr": lr,
        "epochs": epochs,
        "batch_size": batch_size,
        "schedule": schedule,
        "seed": seed,
    }
    asked = {key: value for key, value in given.items() if value is not None}
    # Checked before any file is looked at, also if a run is continued.
    settings = make_settings(**asked)
    folder = Path("runs", task or "digits") if out is None else out
    try:
        return _train(settings, asked, folder, data, resume=resume)
    except OSError as error:
        raise SettingsError(
            f"{folder} cannot be used ({error.strerror or error}): choose another --out folder, or "
            "make it writable."
        ) from error


def _train(
    settings: Settings, asked: dict[str, Any], folder: Path, data: Path | None, *, resume: bool
) -> int:
    """Start or continue the run in a folder, train it to its end, and return the exit code."""
    console = Console()
    path = folder / CHECKPOINT
    check_folder(folder)
    if not resume:
        run = Run(settings, Path("data") if data is None else data)
        folder.mkdir(parents=True, exist_ok=True)
        _set_aside(path, console)
    elif path.exists():
        run = Run.load(path, asked, data)
    else:
        raise SettingsError(
            f"there is no run to resume: {path} does not exist; leave out --resume to start one."
        )
    return _run_to_end(run, path, console)


def _set_aside(path: Path, console: Console) -> None:
    """Keep the checkpoint of an earlier run: who forgets --resume must not lose it."""
    if path.exists():
        kept = path.with_name("previous.safetensors")
        os.replace(path, kept)
        say(console, f"{path.parent} held a run already: its checkpoint is now {kept}")


def _run_to_end(run: Run, path: Path, console: Console) -> int:
    """Train a run to its end, report it, and return the exit code."""
    if run.is_finished:
        say(
            console,
            f"{path} is a finished run (epoch {run.epoch} of {run.settings.epochs}, "
            f"{run.task.metric.name} {_last_metric(run)}): nothing to resume.",
        )
        return 0
    say(console, describe(run))
    if run.epoch:
        say(console, f"continuing after epoch {run.epoch} from {path}")
    try:
        with TrainDisplay(console, run) as display:
            loop.fit(run, path, display)
        _report(run, path, console)
    except KeyboardInterrupt:
        say(Console(stderr=True), _describe_interruption(run, path))
        return 130
    return 0


def _last_metric(run: Run) -> str:
    """Return the metric after the last epoch, as people see it."""
    return run.task.metric.show(run.history.held_out_metric[-1])


def _describe_interruption(run: Run, path: Path) -> str:
    """Return what Ctrl-C has left, and the command that continues."""
    if run.is_finished:
        return f"onepass: stopped after the training; the finished run is {path}."
    stopped = f"onepass: stopped in epoch {run.epoch + 1} of {run.settings.epochs}"
    if not path.exists():
        return f"{stopped}; no epoch was finished, so nothing is saved."
    command = f"onepass train --resume --out {shlex.quote(str(path.parent))}"
    if ":" in run.settings.optimizer:
        command += f" --optimizer {shlex.quote(run.settings.optimizer)}"
    return f"{stopped}; the last finished epoch is saved, continue with: {command}"


def _report(run: Run, path: Path, console: Console) -> None:
    """Print where the time went and what was reached, and draw the curves."""
    # Takes a second to import, and only this command needs it.
    from ..training.curves import plot_curves

    console.print(make_time_table(run))
    console.print(make_comparison_table(compare_steps(run.optimizer, run.model.parameters())))
    picture = path.with_name("curves.png")
    plot_curves(run, picture)
    say(console, f"{run.task.metric.name} on held-out examples: {_last_metric(run)}")
    say(console, f"checkpoint: {path}")
    say(console, f"curves: {picture}")
