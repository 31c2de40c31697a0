"""A model in training, saved after every epoch and continued from there to the same bits.

A run is a pure function of its settings: the same seed, machine and number of threads give the same
weights, whether the run was interrupted or not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ... import checkpoint
from ...contract.values import first_line
from ..tasks import Data, find_task
from . import saved
from .settings import Settings, SettingsError, find_optimizer, make_settings, spell

__all__ = ["CHECKPOINT", "History", "Run", "Seconds"]

# The file in a run's folder that holds its last finished epoch.
CHECKPOINT = "last.safetensors"


@dataclass
class History:
    """What was measured: a number for each training step, or for each epoch if held out."""

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


class Run:
    """A model in training: everything that the next step depends on.

    `Run(settings, data_folder)` starts a new one, `Run.load(checkpoint_path, ...)` continues one.

    Raises `SettingsError` if the optimizer does not accept the settings or cannot train such a
    model, and `TaskError` if there is no data.
    """

    def __init__(self, settings: Settings, data_folder: Path) -> None:
        self.settings = settings
        self.task = find_task(settings.task)
        self.data_folder = data_folder
        self.data: Data = self.task.load(data_folder)
        self.fingerprint = self.data.fingerprint()
        self.shuffle = torch.Generator().manual_seed(settings.seed)
        # Finished epochs.
        self.epoch = 0
        self.history = History()
        self.seconds = Seconds()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.model = self.task.make_model()
            self.rng_state = torch.get_rng_state()
            self.optimizer, self.entries = _make_optimizer(settings, self.model)

    @property
    def examples_per_epoch(self) -> int:
        """How many training examples an epoch takes: all, or as many as the task says."""
        available = len(self.data.train)
        return min(self.task.examples_per_epoch or available, available)

    @property
    def steps_per_epoch(self) -> int:
        """How many optimizer steps an epoch has; the last may have fewer examples."""
        return math.ceil(self.examples_per_epoch / self.settings.batch_size)

    @property
    def total_steps(self) -> int:
        """How many optimizer steps the whole run has."""
        return self.steps_per_epoch * self.settings.epochs

    @property
    def is_finished(self) -> bool:
        """Whether all epochs have been trained."""
        return self.epoch >= self.settings.epochs

    def draw_order(self) -> torch.Tensor:
        """Return the indices of the next epoch's examples, in a new random order."""
        order = torch.randperm(len(self.data.train), generator=self.shuffle)
        return order[: self.examples_per_epoch]

    # --- checkpoints ------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write the run to `path`, whole or not at all.

        Only between epochs is it all that the next step depends on.
        """
        tree = {
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
        }
        checkpoint.save(path, tree)

    @classmethod
    def load(cls, path: Path, asked: Mapping[str, Any], data_folder: Path | None = None) -> Run:
        """Return the run saved at `path`, ready to continue.

        `asked` are settings, by name, that the caller believes the run to have. `data_folder`
        replaces the folder of data that the run names.

        Raises `SettingsError` if an asked setting differs, or if the data is no longer what it was,
        and `CheckpointError` if the file is not a whole training run.
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
        run._check(path, tree)
        run._restore(path, tree)
        return run

    @staticmethod
    def _kinds() -> dict[str, Mapping[str, Any]]:
        """Return the parts of a checkpoint with known keys, each with an example of its values."""
        settings = Settings("digits", "AdamW", 0.1, 1, 1, "cosine", 0)
        return {
            "settings": dataclasses.asdict(settings),
            "history": dataclasses.asdict(History()),
            "seconds": dataclasses.asdict(Seconds()),
            "data": {"folder": "", "fingerprint": ""},
        }

    def _check(self, path: Path, tree: Mapping[str, Any]) -> None:
        """Raise `CheckpointError` unless the saved progress, weights and state fit this run."""
        saved.check_progress(path, tree, self.steps_per_epoch, self.settings.epochs)
        saved.check_model(path, tree["model"], self.model.state_dict())
        # A class of the user's own may change its options and its state as it steps.
        is_ours = ":" not in self.settings.optimizer
        saved.check_optimizer(path, tree["optimizer"], self.optimizer.state_dict(), is_ours)
        if is_ours and tree["epoch"]:
            saved.check_entries(path, tree["optimizer"]["state"], self.entries)

    def _restore(self, path: Path, tree: Mapping[str, Any]) -> None:
        """Take everything over from a checkpoint that was checked."""
        try:
            self.model.load_state_dict(tree["model"])
            self.optimizer.load_state_dict(tree["optimizer"])
            self.rng_state = tree["rng"]["torch"]
            self.shuffle.set_state(tree["rng"]["shuffle"])
            self.epoch = tree["epoch"]
            self.history = History(**tree["history"])
            self.seconds = Seconds(**tree["seconds"])
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            raise saved.misfit(path, first_line(error)) from error


def _make_optimizer(
    settings: Settings, model: nn.Module
) -> tuple[torch.optim.Optimizer, dict[Any, list[str]]]:
    """Return the optimizer of a model, and the names of the state that each parameter will have.

    First it must have shown, on copies, that it can make a step with dense gradients.
    """
    make = find_optimizer(settings.optimizer)
    copies = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    for p in copies:
        p.grad = torch.zeros_like(p)
    try:
        trial = make(copies, lr=settings.lr)
        trial.step()
        states = trial.state_dict()["state"]
        entries = {key: sorted(state) for key, state in states.items()}
        return make(model.parameters(), lr=settings.lr), entries
    except (RuntimeError, TypeError, ValueError) as error:
        raise SettingsError(
            f"the optimizer {settings.optimizer} cannot train the task {settings.task} with lr "
            f"{settings.lr}: {first_line(error)}; choose another optimizer or lr."
        ) from error


def _refuse_conflicts(settings: Settings, asked: Mapping[str, Any], path: Path) -> None:
    """Raise `SettingsError` if a setting of a saved run is not the one that was asked for."""
    for key, value in asked.items():
        wanted = spell(value) if key == "optimizer" else value
        held = getattr(settings, key)
        if held != wanted:
            raise SettingsError(
                f"{path} was trained with {key} {held} and not {wanted}: leave {key} out to "
                "continue that run, or start another one in a folder of its own."
            )


def _refuse_other_data(run: Run, fingerprint: str, path: Path) -> None:
    """Raise `SettingsError` if a run's data is not that with which it was saved."""
    if run.fingerprint != fingerprint:
        raise SettingsError(
            f"the data of task {run.settings.task} is not that with which {path} was trained, so "
            "that run cannot be continued to the same result; give it back its data or start a new "
            "run."
        )
