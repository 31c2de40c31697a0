"""Training a run to its end: deterministic, and saved after every epoch.

Nothing here prints; an `Observer` is told what happens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ..tasks import Examples, Task
from .run import Run
from .settings import make_schedule

__all__ = ["Diverged", "Observer", "evaluate", "fit"]

_EVALUATION_BATCH = 128


class Diverged(ArithmeticError):
    """The training loss is no longer a finite number."""


class Observer(Protocol):
    """Is told how a run goes."""

    def stepped(self, run: Run) -> None:
        """Called after each optimizer step; `run.history` and `run.seconds` include it."""

    def finished_epoch(self, run: Run) -> None:
        """Called after each epoch, when its checkpoint is on the disk."""


def fit(run: Run, path: Path, observer: Observer) -> None:
    """Train `run` to its last epoch, and save it to `path` after each one.

    The caller's global random state stays as it was. Raises `Diverged` if the loss is not finite.
    The checkpoint of the last finished epoch stays then, and after any other exception
    (KeyboardInterrupt too).
    """
    with _random_state_of(run):
        while not run.is_finished:
            _train_epoch(run, observer)
            _evaluate_epoch(run)
            run.epoch += 1
            run.rng_state = torch.get_rng_state()
            run.save(path)
            observer.finished_epoch(run)


@contextmanager
def _random_state_of(run: Run) -> Iterator[None]:
    """Use the run's random state inside, and give the caller's back."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(run.rng_state)
        yield


def _train_epoch(run: Run, observer: Observer) -> None:
    """Make all steps of an epoch; raises `Diverged` if a loss is not finite."""
    run.model.train()
    settings = run.settings
    total = run.total_steps
    warmup = round(run.task.warmup * total)
    schedule = make_schedule(settings.schedule, settings.lr, total, warmup)
    for indices in run.draw_order().split(settings.batch_size):
        step = len(run.history.train_loss)
        lr = schedule(step)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        inputs, targets = run.data.train.batch(indices)
        loss, metric = _train_step(run, inputs, targets)
        if not math.isfinite(loss):
            raise Diverged(
                f"the loss became {loss} in epoch {run.epoch + 1}, step {step + 1} of {total}: "
                f"try a smaller lr than {settings.lr:g}."
            )
        run.history.lr.append(lr)
        run.history.train_loss.append(loss)
        run.history.train_metric.append(metric)
        observer.stepped(run)


def _train_step(run: Run, inputs: Tensor, targets: Tensor) -> tuple[float, float]:
    """Make one step, add its time to `run.seconds`, and return its loss and metric."""
    run.optimizer.zero_grad()
    start = time.perf_counter()
    outputs = run.model(inputs)
    loss = run.task.loss(outputs, targets)
    forward_end = time.perf_counter()
    loss.backward()
    backward_end = time.perf_counter()
    run.optimizer.step()
    end = time.perf_counter()
    run.seconds.forward += forward_end - start
    run.seconds.backward += backward_end - forward_end
    run.seconds.optimizer += end - backward_end
    with torch.no_grad():
        return loss.item(), run.task.metric.measure(outputs, targets).item()


def _evaluate_epoch(run: Run) -> None:
    """Add the loss and the metric of the held-out examples to the run's history."""
    start = time.perf_counter()
    loss, metric = evaluate(run.model, run.data.held_out, run.task)
    run.seconds.evaluation += time.perf_counter() - start
    run.history.held_out_loss.append(loss)
    run.history.held_out_metric.append(metric)


def evaluate(model: nn.Module, examples: Examples, task: Task) -> tuple[float, float]:
    """Return the mean loss and metric over all targets of `examples`.

    The model is left in evaluation mode.
    """
    model.eval()
    loss = 0.0
    metric = 0.0
    with torch.no_grad():
        for indices in torch.arange(len(examples)).split(_EVALUATION_BATCH):
            inputs, targets = examples.batch(indices)
            outputs = model(inputs)
            loss += task.loss(outputs, targets).item() * len(indices)
            metric += task.metric.measure(outputs, targets).item() * len(indices)
    return loss / len(examples), metric / len(examples)
