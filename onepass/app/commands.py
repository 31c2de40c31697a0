"""The commands of the `onepass` program: each reads its arguments, calls the library and prints."""

from __future__ import annotations

import importlib.util
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..checkpoint import CheckpointError
from ..kernel.graph.ir import RuleError
from ..schedule import MAKERS, ScheduleError, parse
from .bench import measure, suite
from .bench.gpu import find_gpu
from .bench.report import WIDTH, list_facts, list_goals, make_device_table, make_fresh_table, make_step_table, plot
from .bench.shapes import MODELS
from .catalog import UnknownName
from .explain.explanation import explain as explain_optimizer
from .explain.target import TARGETS, TargetError
from .gallery.summary import choose_steps, summarize
from .tasks import TASKS, TaskError
from .training import loop
from .training.comparison import compare_steps
from .training.display import TrainDisplay, describe, make_comparison_table, make_time_table, say
from .training.loop import Diverged, Run, SettingsError
from .training.rate_search import make_rate_table, search_rate, training_command

__all__ = ["USER_ERRORS", "app", "run"]


class UsageError(ValueError):
    """The command line is not one of this program's."""


# Their messages are complete sentences for the user; anything else is a defect and shows its traceback.
USER_ERRORS = (
    suite.BenchError,
    CheckpointError,
    Diverged,
    RuleError,
    ScheduleError,
    SettingsError,
    TargetError,
    TaskError,
    UnknownName,
    UsageError,
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def run(arguments: Sequence[str]) -> int:
    """Run the command that `arguments` name and return the exit code; what it foresees is raised as `USER_ERRORS`."""
    try:
        code = app(list(arguments) or ["--help"], prog_name="onepass", standalone_mode=False)
    except Exception as error:
        # typer's errors have had several base classes, of which this method is the common mark.
        format_message = getattr(error, "format_message", None)
        if format_message is None:
            raise
        raise UsageError(f"{format_message().rstrip('.')}; see onepass --help.") from error
    return code if isinstance(code, int) else 0


@app.callback()
def introduce() -> None:
    """PyTorch optimizers that run in one pass over memory."""


@app.command()
def train(
    task: Annotated[str | None, typer.Option(help=f"What to train: {', '.join(TASKS)}.", show_default="digits")] = None,
    optimizer: Annotated[str | None, typer.Option(help="An optimizer's name.", show_default="AdamW")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.", show_default="the task's")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs to train.", show_default="the task's")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples a step.", show_default="the task's")] = None,
    schedule: Annotated[str | None, typer.Option(help="cosine, step or none.", show_default="cosine")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results.", show_default="runs/TASK")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    data: Annotated[Path | None, typer.Option(help="Folder of data on disk (cifar10).", show_default="data")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.", show_default="0")] = None,
) -> int:
    """Train a small model on real data, save it after every epoch, and time the optimizer.

    With --resume, settings that are not given are those of the run that is continued.
    """
    _require("matplotlib", "safetensors")
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
    return _train(asked, Path("runs", task or "digits") if out is None else out, data, resume=resume)


def _train(asked: dict[str, Any], folder: Path, data: Path | None, *, resume: bool) -> int:
    console = Console()
    path = folder / loop.CHECKPOINT
    settings = loop.make_settings(**asked)  # checked before any file is looked at, resumed or not
    try:
        _check_folder(folder)
        if not resume:
            job = Run(settings, Path("data") if data is None else data)
            folder.mkdir(parents=True, exist_ok=True)
            _set_aside(path, console)
        elif path.exists():
            job = Run.load(path, asked, data)
        else:
            raise SettingsError(f"there is no run to resume: {path} does not exist; leave out --resume to start one.")
        return _run_to_end(job, path, console)
    except OSError as error:
        raise SettingsError(
            f"{folder} cannot be used ({error.strerror or error}): choose another --out folder, or make it writable."
        ) from error


def _require(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"this command needs {' and '.join(missing)}: run pip install 'onepass[train]'.")


def _check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be written to, before the work and without making it."""
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise SettingsError(f"--out {folder} is no folder: {existing} is a file; choose another folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise SettingsError(f"--out {folder} cannot be written to: choose another folder, or make it writable.")


def _check_files(*paths: Path | None) -> None:
    """Refuse a file in a folder that does not exist, and a folder."""
    for path in paths:
        if path is not None and path.is_dir():
            raise UsageError(f"{path} is a folder: name a file in it, as {path / 'picture.png'}.")
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError(f"{path} cannot be written: there is no folder {path.absolute().parent}; make it first.")


def _set_aside(path: Path, console: Console) -> None:
    """Keep the checkpoint of an earlier run in the same folder: forgetting --resume must not cost it."""
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
            f"{path} is a finished run (epoch {job.epoch} of {job.settings.epochs}, {result}): nothing to resume.",
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
    from .training.curves import plot_curves  # takes a second to import, and only this command needs it

    console.print(make_time_table(job))
    console.print(make_comparison_table(compare_steps(job.optimizer, job.model.parameters())))
    picture = path.with_name("curves.png")
    plot_curves(job, picture)
    metric = job.task.metric
    say(console, f"{metric.name} on held-out examples: {metric.show(job.history.held_out_metric[-1])}")
    say(console, f"checkpoint: {path}")
    say(console, f"curves: {picture}")


@app.command()
def bench(
    model: Annotated[
        str | None, typer.Option(help=f"Among {', '.join(MODELS)}; commas between.", show_default="those that suit")
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            help="As adamw, adam-amsgrad, lbfgs-wolfe or module:Class; commas between.",
            show_default=", ".join(suite.SUITE),
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Measure every algorithm, in about 20 minutes.")] = False,
    seconds: Annotated[float, typer.Option(help="Time for the steps of each optimizer on each model.")] = 8.0,
    json: Annotated[Path | None, typer.Option(help="Write all numbers to this file.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw a PNG picture to this file.")] = None,
    fresh: Annotated[bool, typer.Option(help="Measure first steps and peaks of memory, in fresh processes.")] = True,
    device: Annotated[str, typer.Option(help="Where to step: cpu, cuda, or one of several GPUs as cuda:1.")] = "cpu",
) -> None:
    """Time an optimizer step on real shapes: ours, every mode of torch's, and what the memory allows.

    Without arguments a suite of typical algorithms is measured, in less than 10 minutes.
    """
    _check_files(json, plot_file)
    if plot_file is not None:
        _require("matplotlib")
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


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def explain(
    context: typer.Context,
    optimizer: Annotated[str, typer.Argument(help="An optimizer's name, or module:Class.")],
    dtype: Annotated[str, typer.Option(help="How all columns are stored.")] = "float32",
    llvm: Annotated[bool, typer.Option("--llvm", help="Show the LLVM IR, as emitted and optimized.")] = False,
    assembly: Annotated[bool, typer.Option("--asm", help="Show the machine code, its hot loop marked.")] = False,
    target: Annotated[
        str | None, typer.Option(help=f"Show Triton's code for a GPU, which is not needed: {', '.join(TARGETS)}.")
    ] = None,
) -> None:
    """Show an optimizer's rule, the bytes that it moves, and the program that it becomes.

    Further options are the optimizer's own: onepass explain adamw --amsgrad --weight-decay 0.1
    """
    try:
        explanation = explain_optimizer(optimizer, context.args, dtype)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    print(explanation.text(llvm, assembly, target), end="")


@app.command("schedule")
def show_schedule(
    text: Annotated[str, typer.Argument(help=f"As 'cosine(3e-4, steps=10000).warmup(500)'; of {', '.join(MAKERS)}.")],
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw a PNG picture to this file.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps to show.", show_default="its length, or 1000 if it has no end")
    ] = None,
) -> None:
    """Show a schedule: its length, its values at the ends and in between, its shape, and a picture on request."""
    _check_files(plot_file)
    if plot_file is not None:
        _require("matplotlib")
    schedule = parse(text)
    shown = choose_steps(schedule, steps)
    console = Console()
    try:
        lines = summarize(schedule, shown, plain=console.options.ascii_only)
    except OverflowError as error:
        raise UsageError(f"{text} is beyond all numbers within {shown:,} steps: show fewer with --steps.") from error
    for name, value in lines:
        say(console, f"{name:9} {value}")
    if plot_file is not None:
        from .gallery.draw_schedules import plot_schedule  # as the curves of a training run

        plot_schedule(schedule, shown, plot_file)
        say(console, f"{'picture':9} {plot_file}")


@app.command()
def gallery(
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("gallery"),
) -> None:
    """Draw what optimizers and schedules do: learning rates, momentum, the paths of all algorithms, every scheduler."""
    _require("matplotlib")
    _check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    from .gallery.album import make  # as the curves of a training run

    console = Console()
    for picture, path in make(out):
        say(console, f"{path}: {picture.meaning}")


@app.command("lr-find")
def find_lr(
    task: Annotated[str, typer.Option(help=f"What to train: {', '.join(TASKS)}.")] = "digits",
    optimizer: Annotated[str | None, typer.Option(help="An optimizer's name.", show_default="AdamW")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples a step.", show_default="the task's")] = None,
    lowest: Annotated[float, typer.Option(help="Rate of the first step.")] = 1e-7,
    highest: Annotated[float, typer.Option(help="Rate of the last step.")] = 10.0,
    steps: Annotated[int, typer.Option(help="Steps from the lowest rate to the highest.")] = 100,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="PNG picture to draw.", show_default="runs/TASK/lr-find.png")
    ] = None,
    data: Annotated[Path, typer.Option(help="Folder of data on disk (cifar10).")] = Path("data"),
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
) -> None:
    """Find a learning rate: try rates that grow from step to step, and see where the loss falls fastest."""
    _require("matplotlib", "safetensors")
    settings = loop.make_settings(task, optimizer, batch_size=batch_size, seed=seed)
    picture = Path("runs", task, "lr-find.png") if plot_file is None else plot_file
    if plot_file is None:
        _check_folder(picture.parent)
    else:
        _check_files(plot_file)
    console = Console()
    job = Run(settings, data)
    say(console, f"{task}: {settings.optimizer}, batch size {settings.batch_size}, {steps} steps")
    found = search_rate(job, console, lowest, highest, steps)
    picture.parent.mkdir(parents=True, exist_ok=True)
    found.plot(picture, f"{task}: {settings.optimizer}, batch size {settings.batch_size}, seed {seed}")
    console.print(make_rate_table(found))
    say(console, f"suggested learning rate: {found.suggestion:g}; {found.note}")
    say(console, f"train with it: {training_command(settings, found.suggestion)}")
    say(console, f"picture: {picture}")
