"""The learning-rate range test of a task, and how it looks in a terminal."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from torch import Tensor, nn

from ...range_test.search import RangeTest, lr_find
from ..tasks import find_task
from .run import Run
from .settings import Settings, SettingsError

__all__ = ["make_rate_table", "search_rate", "training_command"]

# Lines of the table.
_ROWS = 12


class _Batches:
    """A run's batches, shuffled again at each iteration, as in each of its epochs."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        run = self._run
        batches = run.draw_order().split(run.settings.batch_size)
        return map(run.data.train.batch, batches)


def search_rate(run: Run, console: Console, lowest: float, highest: float, steps: int) -> RangeTest:
    """Find a learning rate for a run that has not begun, between `lowest` and `highest`.

    In a terminal it shows a bar. The same seed finds the same rate. Raises `SettingsError` for
    bounds that make no sense, and if the run cannot be tried at all.
    """

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        return run.task.loss(model(inputs), targets)

    columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("{task.description}"))
    bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
    shown = bar.add_task("", total=steps)

    def observe(step: int, lr: float, loss: float) -> None:
        """Move the bar."""
        bar.update(shown, completed=step + 1, description=f"lr {lr:.2e}  loss {loss:.4g}")

    bounds: dict[str, Any] = {"lowest": lowest, "highest": highest, "steps": steps}
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), bar:
            # The note in the result says the same.
            warnings.filterwarnings("ignore", "lr_find: ")
            torch.set_rng_state(run.rng_state)
            return lr_find(run.model, loss, _Batches(run), run.optimizer, observe=observe, **bounds)
    except ValueError as error:
        raise SettingsError(f"{error}.") from error


def training_command(settings: Settings, lr: float) -> str:
    """Return the command that trains with this rate, and with the batch size that it is for."""
    name = settings.optimizer
    words = ["onepass", "train", "--task", settings.task]
    words += ["--optimizer", name if ":" in name else name.lower()]
    words += ["--lr", f"{lr:g}"]
    if settings.batch_size != find_task(settings.task).batch_size:
        words += ["--batch-size", str(settings.batch_size)]
    return shlex.join(words)


def make_rate_table(found: RangeTest) -> Table:
    """Return a table of the losses at some of the rates, evenly spaced in their logarithm."""
    table = Table(title="Loss by learning rate", title_justify="left")
    for heading in ("learning rate", "loss", "smoothed"):
        table.add_column(heading, justify="right")
    last = len(found.lrs) - 1
    steps = {round(last * line / (_ROWS - 1)) for line in range(_ROWS)}
    for step in sorted(steps):
        loss = f"{found.losses[step]:.4g}"
        smoothed = f"{found.smoothed[step]:.4g}"
        table.add_row(f"{found.lrs[step]:.1e}", loss, smoothed)
    return table
