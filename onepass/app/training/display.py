"""How a training run looks in a terminal, and in a file when standard output is not one."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .comparison import StepTime
from .run import Run

__all__ = ["TrainDisplay", "describe", "make_comparison_table", "make_time_table", "say"]

_RECENT_STEPS = 20


class TrainDisplay:
    """An `Observer` of a run: a bar that moves with every step, and a line for every epoch.

    The bar is only in a terminal. Use it as a context manager around the training.
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
        """Move the bar, and show means over the last steps beside it."""
        done = len(run.history.train_loss)
        loss = _mean(run.history.train_loss[-_RECENT_STEPS:])
        metric = run.task.metric
        value = metric.show(_mean(run.history.train_metric[-_RECENT_STEPS:]))
        milliseconds = 1e3 * run.seconds.optimizer / done
        numbers = f"loss {loss:.3g}  {metric.name} {value}  optimizer {milliseconds:.2f} ms/step"
        self._progress.update(
            self._bar, completed=done, epoch=_count_epochs(run, 1), numbers=numbers
        )

    def finished_epoch(self, run: Run) -> None:
        """Print the epoch's losses, its held-out metric and its time."""
        end = time.perf_counter()
        history = run.history
        metric = run.task.metric
        loss = _mean(history.train_loss[-run.steps_per_epoch :])
        value = metric.show(history.held_out_metric[-1])
        seconds = run.seconds.optimizer - self._optimizer_seconds
        milliseconds = 1e3 * seconds / run.steps_per_epoch
        say(
            self._console,
            f"epoch {_count_epochs(run, 0)}  loss {loss:.4f}, held out "
            f"{history.held_out_loss[-1]:.4f}  {metric.name} {value}  optimizer "
            f"{milliseconds:.2f} ms/step  {end - self._epoch_start:.1f} s",
        )
        self._epoch_start = end
        self._optimizer_seconds = run.seconds.optimizer


def say(console: Console, text: str) -> None:
    """Print `text` as it is: names of files must not be wrapped, coloured or read as markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def describe(run: Run) -> str:
    """Return what is trained, in one line."""
    settings = run.settings
    examples = f"{len(run.data.train):,} training and {len(run.data.held_out):,} held-out examples"
    parameters = sum(p.numel() for p in run.model.parameters())
    rate = f"lr {settings.lr:g} ({settings.schedule})"
    epochs = "1 epoch" if settings.epochs == 1 else f"{settings.epochs} epochs"
    return (
        f"{settings.task}: {examples}, {parameters:,} parameters; {settings.optimizer}, {rate}, "
        f"{epochs} of {run.steps_per_epoch} steps"
    )


def make_time_table(run: Run) -> Table:
    """Return a table that says where the time of all training steps went."""
    seconds = run.seconds
    steps = len(run.history.train_loss)
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
        share = 100 * value / total
        milliseconds = 1e3 * value / steps
        table.add_row(name, f"{value:.2f}", f"{share:.1f} %", f"{milliseconds:.3f}")
    return table


def make_comparison_table(times: Sequence[StepTime]) -> Table:
    """Return a table of the same optimizer step by each contender.

    A ratio above 1 says that ours, the first, is faster.
    """
    table = Table(title="The same optimizer step, timed in turns", title_justify="left")
    table.add_column("optimizer")
    table.add_column("ms a step", justify="right")
    table.add_column("times ours", justify="right")
    ours = times[0].milliseconds
    for contender in times:
        ratio = contender.milliseconds / ours
        table.add_row(contender.name, f"{contender.milliseconds:.3f}", f"{ratio:.2f}")
    return table


def _count_epochs(run: Run, ahead: int) -> str:
    """Return an epoch as ` 3/20`: the running one with `ahead` 1, the one just finished with 0."""
    epochs = run.settings.epochs
    shown = min(run.epoch + ahead, epochs)
    return f"{shown:>{len(str(epochs))}}/{epochs}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
