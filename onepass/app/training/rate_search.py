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
from .loop import Run, Settings, SettingsError

__all__ = ["make_rate_table", "search_rate", "training_command"]

_ROWS = 12


class _Batches:
    """A run's training examples, shuffled anew at each iteration as in its epochs."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        run = self._run
        order = torch.randperm(len(run.data.train), generator=run.shuffle)[: run.examples_per_epoch]
        return map(run.data.train.batch, order.split(run.settings.batch_size))


def search_rate(run: Run, console: Console, lowest: float, highest: float, steps: int) -> RangeTest:
    """Find a learning rate for a run that has not begun, with a bar in a terminal; the same seed
    finds the same.

    Raises `SettingsError` for bounds that make no sense, and where the run cannot be tried at all.
    """

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        return run.task.loss(model(inputs), targets)

    columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("{task.description}"))
    bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
    shown = bar.add_task("", total=steps)

    def observe(step: int, lr: float, loss: float) -> None:
        bar.update(shown, completed=step + 1, description=f"lr {lr:.2e}  loss {loss:.4g}")

    bounds: dict[str, Any] = {"lowest": lowest, "highest": highest, "steps": steps}
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), bar:
            warnings.filterwarnings("ignore", "lr_find: ")  # the note says the same
            torch.set_rng_state(run.rng_state)
            return lr_find(run.model, loss, _Batches(run), run.optimizer, observe=observe, **bounds)
    except ValueError as error:
        raise SettingsError(f"{error}.") from error


def training_command(settings: Settings, lr: float) -> str:
    """The command line that trains with this rate, and with the batch size for which it was
    found."""
    name = settings.optimizer
    words = [
        "onepass",
        "train",
        "--task",
        settings.task,
        "--optimizer",
        name if ":" in name else name.lower(),
    ]
    words += ["--lr", f"{lr:g}"]
    if settings.batch_size != find_task(settings.task).batch_size:
        words += ["--batch-size", str(settings.batch_size)]
    return shlex.join(words)


def make_rate_table(found: RangeTest) -> Table:
    """The losses at some of the rates, evenly spaced in their logarithm."""
    table = Table(title="Loss by learning rate", title_justify="left")
    for heading in ("learning rate", "loss", "smoothed"):
        table.add_column(heading, justify="right")
    last = len(found.lrs) - 1
    for i in sorted({round(last * row / (_ROWS - 1)) for row in range(_ROWS)}):
        table.add_row(f"{found.lrs[i]:.1e}", f"{found.losses[i]:.4g}", f"{found.smoothed[i]:.4g}")
    return table
