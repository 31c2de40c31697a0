"""Training a task: deterministic, saved after every epoch, and continued from there to the
bit-identical result.

A run is a pure function of its settings: the same seed, machine and number of threads give the same
weights, whether or not the run was interrupted on the way. Nothing here prints; what happens is
told to an `Observer`.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ... import checkpoint
from ..tasks import Data, Examples, Task, find_task
from . import saved
from .settings import (
    SCHEDULES,
    Settings,
    SettingsError,
    find_optimizer,
    make_schedule,
    make_settings,
    spell,
)

__all__ = [
    "CHECKPOINT",
    "SCHEDULES",
    "Diverged",
    "History",
    "Observer",
    "Run",
    "Settings",
    "SettingsError",
    "find_optimizer",
    "fit",
    "make_schedule",
    "make_settings",
]

CHECKPOINT = "last.safetensors"  # the file in a run's folder that holds its last finished epoch
_EVALUATION_BATCH = 128


class Diverged(ArithmeticError):
    """The training loss is no longer a finite number."""


# --- a run ----------------------------------------------------------------------------------------


@dataclass
class History:
    """What was measured: one number an optimizer step for training, one an epoch for the held-out
    examples."""

    lr: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    train_metric: list[float] = field(default_factory=list)
    held_out_loss: list[float] = field(default_factory=list)
    held_out_metric: list[float] = field(default_factory=list)


@dataclass
class Seconds:
    """Time spent in each part of all training steps so far, in seconds."""

    forward: float = 0.0
    backward: float = 0.0
    optimizer: float = 0.0
    evaluation: float = 0.0


class Observer(Protocol):
    """Is told how a run goes."""

    def stepped(self, run: Run) -> None:
        """After each optimizer step; `run.history` and `run.seconds` include it."""

    def finished_epoch(self, run: Run) -> None:
        """After each epoch, when its checkpoint is on the disk."""


class Run:
    """A model in training: everything that the next step depends on.

    `Run(settings, data_folder)` starts anew, `Run.load(checkpoint_path, ...)` continues. Errors:
    `SettingsError` when the optimizer does not accept the settings or cannot train such a model,
    `TaskError` when there is no data.
    """

    def __init__(self, settings: Settings, data_folder: Path) -> None:
        self.settings = settings
        self.task = find_task(settings.task)
        self.data_folder = data_folder
        self.data: Data = self.task.load(data_folder)
        self.fingerprint = self.data.fingerprint()
        self.shuffle = torch.Generator().manual_seed(settings.seed)
        self.epoch = 0  # finished ones
        self.history = History()
        self.seconds = Seconds()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.model = self.task.make_model()
            self.rng_state = torch.get_rng_state()
            self.optimizer, self.entries = _make_optimizer(settings, self.model)

    @property
    def examples_per_epoch(self) -> int:
        return min(self.task.examples_per_epoch or len(self.data.train), len(self.data.train))

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.examples_per_epoch / self.settings.batch_size)

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.settings.epochs

    @property
    def is_finished(self) -> bool:
        return self.epoch >= self.settings.epochs

    def save(self, path: Path) -> None:
        """Write the run to `path`, whole or not at all; only between epochs is it all that the next
        step depends on."""
        checkpoint.save(
            path,
            {
                "kind": saved.KIND,
                "settings": dataclasses.asdict(self.settings),
                "epoch": self.epoch,
                "step": len(self.history.train_loss),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "rng": {"torch": self.rng_state, "shuffle": self.shuffle.get_state()},
                "history": dataclasses.asdict(self.history),
                "seconds": dataclasses.asdict(self.seconds),
                "data": {
                    "folder": str(self.data_folder.absolute()),
                    "fingerprint": self.fingerprint,
                },
                "torch": torch.__version__,
            },
        )

    @classmethod
    def load(cls, path: Path, asked: Mapping[str, Any], data_folder: Path | None = None) -> Run:
        """The run saved at `path`, ready to continue; `data_folder` replaces the folder that it
        names.

        `asked` are settings that the caller believes the run to have, by name: `SettingsError` when
        one differs, or when the data is no longer what it was. `CheckpointError` when the file is
        no (whole) training run.
        """
        tree = checkpoint.load(path)
        saved.check(path, tree, cls._kinds())
        saved.refuse_import(path, tree["settings"]["optimizer"], asked.get("optimizer"))
        try:
            settings = make_settings(**tree["settings"])
        except ValueError as error:
            raise checkpoint.CheckpointError(
                f"{path} has settings that make no sense: {error}"
            ) from error
        _refuse_conflicts(settings, asked, path)
        run = cls(settings, data_folder or Path(tree["data"]["folder"]))
        _refuse_other_data(run, tree["data"]["fingerprint"], path)
        saved.check_progress(path, tree, run.steps_per_epoch, settings.epochs)
        saved.check_model(path, tree["model"], run.model.state_dict())
        strict = ":" not in settings.optimizer
        saved.check_optimizer(path, tree["optimizer"], run.optimizer.state_dict(), strict)
        if strict and tree["epoch"]:
            saved.check_entries(path, tree["optimizer"]["state"], run.entries)
        try:
            run._restore(tree)
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            raise _misfit(path, error) from error
        return run

    @staticmethod
    def _kinds() -> dict[str, Mapping[str, Any]]:
        """The entries of a checkpoint that are mappings of known keys, each with an example of its
        values."""
        settings = Settings("digits", "AdamW", 0.1, 1, 1, "cosine", 0)
        folder = {"folder": "", "fingerprint": ""}
        return {
            "settings": dataclasses.asdict(settings),
            "history": dataclasses.asdict(History()),
            "seconds": dataclasses.asdict(Seconds()),
            "data": folder,
        }

    def _restore(self, tree: Mapping[str, Any]) -> None:
        self.model.load_state_dict(tree["model"])
        self.optimizer.load_state_dict(tree["optimizer"])
        self.rng_state = tree["rng"]["torch"]
        self.shuffle.set_state(tree["rng"]["shuffle"])
        self.epoch = tree["epoch"]
        self.history = History(**tree["history"])
        self.seconds = Seconds(**tree["seconds"])


def _misfit(path: Path, error: Exception) -> checkpoint.CheckpointError:
    return checkpoint.CheckpointError(
        f"{path} does not fit this version of the task or of the optimizer: {_first_line(error)}; "
        "start anew."
    )


def _make_optimizer(
    settings: Settings, model: nn.Module
) -> tuple[torch.optim.Optimizer, dict[Any, list[str]]]:
    """The optimizer on the model's parameters, and the state that each has once it has stepped.

    First it must have shown that it can make a step with dense gradients.
    """
    make = find_optimizer(settings.optimizer)
    try:
        trial = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
        for p in trial:
            p.grad = torch.zeros_like(p)
        tried = make(trial, lr=settings.lr)
        tried.step()
        entries = {key: sorted(state) for key, state in tried.state_dict()["state"].items()}
        return make(model.parameters(), lr=settings.lr), entries
    except (RuntimeError, TypeError, ValueError) as error:
        raise SettingsError(
            f"the optimizer {settings.optimizer} cannot train the task {settings.task} with lr "
            f"{settings.lr}: {_first_line(error)}; choose another optimizer or lr."
        ) from error


def _refuse_conflicts(settings: Settings, asked: Mapping[str, Any], path: Path) -> None:
    for key, wanted in asked.items():
        if key == "optimizer":
            wanted = spell(wanted)
        held = getattr(settings, key)
        if held != wanted:
            raise SettingsError(
                f"{path} was trained with {key} {held} and not {wanted}: leave {key} out to "
                "continue that run, or start another one in a folder of its own."
            )


def _refuse_other_data(run: Run, fingerprint: str, path: Path) -> None:
    if run.fingerprint != fingerprint:
        raise SettingsError(
            f"the data of task {run.settings.task} is not that with which {path} was trained, so "
            "that run cannot be continued to the same result; give it back its data or start anew."
        )


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(" .:")


# --- the loop -------------------------------------------------------------------------------------


def fit(run: Run, path: Path, observer: Observer) -> None:
    """Train `run` to its last epoch, saving it to `path` after each one.

    The caller's global random state is left as it was. Errors: `Diverged` when the loss is not
    finite; the checkpoint of the last finished epoch stays, as it does when an exception
    (KeyboardInterrupt too) ends the loop.
    """
    with _own_rng(run):
        while not run.is_finished:
            _train_epoch(run, observer)
            start = time.perf_counter()
            loss, metric = evaluate(run.model, run.data.held_out, run.task)
            run.seconds.evaluation += time.perf_counter() - start
            run.history.held_out_loss.append(loss)
            run.history.held_out_metric.append(metric)
            run.epoch += 1
            run.rng_state = torch.get_rng_state()
            run.save(path)
            observer.finished_epoch(run)


@contextmanager
def _own_rng(run: Run) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(run.rng_state)
        yield


def _train_epoch(run: Run, observer: Observer) -> None:
    run.model.train()
    settings, total = run.settings, run.total_steps
    schedule = make_schedule(settings.schedule, settings.lr, total, round(run.task.warmup * total))
    order = torch.randperm(len(run.data.train), generator=run.shuffle)[: run.examples_per_epoch]
    for indices in order.split(settings.batch_size):
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


def evaluate(model: nn.Module, examples: Examples, task: Task) -> tuple[float, float]:
    """The mean loss and metric over all targets of `examples`; the model is left in evaluation
    mode."""
    model.eval()
    loss = metric = 0.0
    with torch.no_grad():
        for indices in torch.arange(len(examples)).split(_EVALUATION_BATCH):
            inputs, targets = examples.batch(indices)
            outputs = model(inputs)
            loss += task.loss(outputs, targets).item() * len(indices)
            metric += task.metric.measure(outputs, targets).item() * len(indices)
    return loss / len(examples), metric / len(examples)
