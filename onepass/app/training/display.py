"""How a training run looks in a terminal, and in a file when standard output is not one."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .comparison import StepTime
from .loop import Run

__all__ = ["TrainDisplay"]

_RECENT_STEPS = 20


class TrainDisplay:
    """An `Observer` of a run: a bar that moves with every step (in a terminal only) and a line for
    every epoch.

    Use it as a context manager around the training.
    """

    def __init__(self, console: Console, run: Run) -> None:
        self._console = console
        self._epoch_start = time.perf_counter()
        self._optimizer_seconds = run.seconds.optimizer
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._bar = self._progress.add_task(
            "",
            total=run.total_steps,
            completed=len(run.history.train_loss),
            epoch=_count_epochs(run, 1),
            numbers="",
        )

    def __enter__(self) -> TrainDisplay:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def stepped(self, run: Run) -> None:
        history = run.history
        done = len(history.train_loss)
        loss, metric = (
            _mean(history.train_loss[-_RECENT_STEPS:]),
            _mean(history.train_metric[-_RECENT_STEPS:]),
        )
        milliseconds = 1e3 * run.seconds.optimizer / done
        shown = f"{run.task.metric.name} {run.task.metric.show(metric)}"
        numbers = f"loss {loss:.3g}  {shown}  optimizer {milliseconds:.2f} ms/step"
        self._progress.update(
            self._bar, completed=done, epoch=_count_epochs(run, 1), numbers=numbers
        )

    def finished_epoch(self, run: Run) -> None:
        now, history, metric = time.perf_counter(), run.history, run.task.metric
        milliseconds = 1e3 * (run.seconds.optimizer - self._optimizer_seconds) / run.steps_per_epoch
        say(
            self._console,
            f"epoch {_count_epochs(run, 0)}  loss "
            f"{_mean(history.train_loss[-run.steps_per_epoch :]):.4f}, held out "
            f"{history.held_out_loss[-1]:.4f}  {metric.name} "
            f"{metric.show(history.held_out_metric[-1])}  optimizer {milliseconds:.2f} ms/step  "
            f"{now - self._epoch_start:.1f} s",
        )
        self._epoch_start, self._optimizer_seconds = now, run.seconds.optimizer


def say(console: Console, text: str) -> None:
    """Print `text` as it is: file names are not to be wrapped, coloured or read as markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def describe(run: Run) -> str:
    """What is trained, in one line."""
    data, settings = run.data, run.settings
    parameters = sum(p.numel() for p in run.model.parameters())
    return (
        f"{settings.task}: {len(data.train):,} training and {len(data.held_out):,} held-out "
        f"examples, {parameters:,} parameters; {settings.optimizer}, lr {settings.lr:g} "
        f"({settings.schedule}), {settings.epochs} epoch{'s' if settings.epochs > 1 else ''} of "
        f"{run.steps_per_epoch} steps"
    )


def make_time_table(run: Run) -> Table:
    """Where the time of all training steps went."""
    seconds, steps = run.seconds, len(run.history.train_loss)
    parts = {
        "forward": seconds.forward,
        "backward": seconds.backward,
        "optimizer step": seconds.optimizer,
    }
    total = sum(parts.values())
    table = Table(title="Time in training", title_justify="left")
    table.add_column("part")
    for heading in ("seconds", "share", "ms a step"):
        table.add_column(heading, justify="right")
    for name, value in parts.items():
        table.add_row(
            name, f"{value:.2f}", f"{100 * value / total:.1f} %", f"{1e3 * value / steps:.3f}"
        )
    return table


def make_comparison_table(times: Sequence[StepTime]) -> Table:
    """The same optimizer step by each contender; a ratio above 1 is slower than ours."""
    table = Table(title="The same optimizer step, timed in turns", title_justify="left")
    table.add_column("optimizer")
    table.add_column("ms a step", justify="right")
    table.add_column("times ours", justify="right")
    for time_ in times:
        table.add_row(
            time_.name,
            f"{time_.milliseconds:.3f}",
            f"{time_.milliseconds / times[0].milliseconds:.2f}",
        )
    return table


def _count_epochs(run: Run, ahead: int) -> str:
    """The epoch as `3/20`; `ahead` is 1 for the one now running and 0 for the one just finished."""
    most = str(run.settings.epochs)
    return f"{min(run.epoch + ahead, run.settings.epochs):>{len(most)}}/{most}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
