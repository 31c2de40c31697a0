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
from ..training.loop import Run, SettingsError
from .checks import check_folder, require


def train_task(
    task: Annotated[
        str | None, typer.Option(help=f"What to train: {', '.join(TASKS)}.", show_default="digits")
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="An optimizer's name.", show_default="AdamW")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Highest learning rate.", show_default="the task's")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Epochs to train.", show_default="the task's")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Examples a step.", show_default="the task's")
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(help="cosine, step or none.", show_default="cosine")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results.", show_default="runs/TASK")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    data: Annotated[
        Path | None, typer.Option(help="Folder of data on disk (cifar10).", show_default="data")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of everything random.", show_default="0")
    ] = None,
) -> int:
    """Train a small model on real data, save it after every epoch, and time the optimizer.

    With --resume, settings that are not given are those of the run that is continued.
    """
    require("matplotlib", "safetensors")
    asked: dict[str, Any] = {
        "task": task,
        "optimizer": optimizer,
        "lr": lr,
        "epochs": epochs,
        "batch_size": batch_size,
        "schedule": schedule,
        "seed": seed,
    }
    asked = {key: value for key, value in asked.items() if value is not None}
    return _train(
        asked, Path("runs", task or "digits") if out is None else out, data, resume=resume
    )


def _train(asked: dict[str, Any], folder: Path, data: Path | None, *, resume: bool) -> int:
    console = Console()
    path = folder / loop.CHECKPOINT
    settings = loop.make_settings(**asked)  # checked before any file is looked at, resumed or not
    try:
        check_folder(folder)
        if not resume:
            job = Run(settings, Path("data") if data is None else data)
            folder.mkdir(parents=True, exist_ok=True)
            _set_aside(path, console)
        elif path.exists():
            job = Run.load(path, asked, data)
        else:
            raise SettingsError(
                f"there is no run to resume: {path} does not exist; leave out --resume to start "
                "one."
            )
        return _run_to_end(job, path, console)
    except OSError as error:
        raise SettingsError(
            f"{folder} cannot be used ({error.strerror or error}): choose another --out folder, or "
            "make it writable."
        ) from error


def _set_aside(path: Path, console: Console) -> None:
    """Keep the checkpoint of an earlier run in the same folder: forgetting --resume must not cost
    it."""
    if path.exists():
        kept = path.with_name("previous.safetensors")
        os.replace(path, kept)
        say(console, f"{path.parent} held a run already: its checkpoint is now {kept}")


def _run_to_end(job: Run, path: Path, console: Console) -> int:
    metric = job.task.metric
    if job.is_finished:
        result = f"{metric.name} {metric.show(job.history.held_out_metric[-1])}"
        say(
            console,
            f"{path} is a finished run (epoch {job.epoch} of {job.settings.epochs}, {result}): "
            "nothing to resume.",
        )
        return 0
    say(console, describe(job))
    if job.epoch:
        say(console, f"continuing after epoch {job.epoch} from {path}")
    try:
        with TrainDisplay(console, job) as display:
            loop.fit(job, path, display)
        _report(job, path, console)
    except KeyboardInterrupt:
        say(Console(stderr=True), _describe_interruption(job, path))
        return 130
    return 0


def _describe_interruption(job: Run, path: Path) -> str:
    if job.is_finished:
        return f"onepass: stopped after the training; the finished run is {path}."
    where = f"onepass: stopped in epoch {job.epoch + 1} of {job.settings.epochs}"
    if not path.exists():
        return f"{where}; no epoch was finished, so nothing is saved."
    command = f"onepass train --resume --out {shlex.quote(str(path.parent))}"
    if ":" in job.settings.optimizer:
        command += f" --optimizer {shlex.quote(job.settings.optimizer)}"
    return f"{where}; what came before is saved, continue with: {command}"


def _report(job: Run, path: Path, console: Console) -> None:
    from ..training.curves import (
        plot_curves,
    )  # takes a second to import, and only this command needs it

    console.print(make_time_table(job))
    console.print(make_comparison_table(compare_steps(job.optimizer, job.model.parameters())))
    picture = path.with_name("curves.png")
    plot_curves(job, picture)
    metric = job.task.metric
    say(
        console,
        f"{metric.name} on held-out examples: {metric.show(job.history.held_out_metric[-1])}",
    )
    say(console, f"checkpoint: {path}")
    say(console, f"curves: {picture}")
