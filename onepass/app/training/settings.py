"""What to train: the settings of a run, checked, and the schedule of its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ...contract.values import as_number, brief
from ...schedule import Schedule, constant, cosine, linear, piecewise
from ..catalog import UnknownName, find_trainable
from ..tasks import Task, find_task

__all__ = [
    "SCHEDULES",
    "Settings",
    "SettingsError",
    "find_optimizer",
    "make_schedule",
    "make_settings",
    "spell",
]

SCHEDULES = ("cosine", "step", "none")
_MOST = 10**9  # epochs, and examples a step


class SettingsError(ValueError):
    """What to train is not well described.

    The message says what was passed, what is allowed and what to do.
    """


@dataclass(frozen=True)
class Settings:
    """All that a run's result depends on, besides the data, the machine and the software."""

    task: str
    optimizer: str
    lr: float
    epochs: int
    batch_size: int
    schedule: str
    seed: int


def make_settings(
    task: str = "digits",
    optimizer: str | None = None,
    lr: float | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    schedule: str = "cosine",
    seed: int = 0,
) -> Settings:
    """Return settings; what is None is the task's own.

    Raises `SettingsError` or `TaskError` for impossible ones.
    """
    _check_names(task, optimizer, schedule)
    found = find_task(task)
    name = spell(found.optimizer if optimizer is None else optimizer)
    settings = Settings(
        task=task,
        optimizer=name,
        lr=_default_lr(found, name) if lr is None else lr,
        epochs=found.epochs if epochs is None else epochs,
        batch_size=found.batch_size if batch_size is None else batch_size,
        schedule=schedule,
        seed=seed,
    )
    _check_numbers(settings)
    if schedule not in SCHEDULES:
        raise SettingsError(
            f"there is no schedule {schedule!r}: choose one of {', '.join(SCHEDULES)}."
        )
    return settings


def _check_names(task: Any, optimizer: Any, schedule: Any) -> None:
    """Raise `SettingsError` unless these are texts; a file may hold anything."""
    for key, value in (("task", task), ("optimizer", optimizer), ("schedule", schedule)):
        is_left_out = key == "optimizer" and value is None
        if not isinstance(value, str) and not is_left_out:
            raise SettingsError(f"{key} must be a name, got {brief(value)}.")


def _check_numbers(settings: Settings) -> None:
    """Raise `SettingsError` unless all numbers are in their ranges."""
    rate = None if isinstance(settings.lr, (bool, torch.Tensor)) else as_number(settings.lr)
    if rate is None or not (math.isfinite(rate) and rate > 0):
        raise SettingsError(f"lr must be a positive finite number, got {brief(settings.lr)}.")
    for key in ("epochs", "batch_size", "seed"):
        value = getattr(settings, key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise SettingsError(f"{key} must be a whole number, got {brief(value)}.")
    for key in ("epochs", "batch_size"):
        value = getattr(settings, key)
        if value < 1:
            raise SettingsError(f"{key} must be at least 1, got {brief(value)}.")
        if value > _MOST:
            raise SettingsError(f"{key} must be at most {_MOST}, got {brief(value)}.")
    if not 0 <= settings.seed < 2**63:
        raise SettingsError(f"seed must lie in [0, 2**63), got {brief(settings.seed)}.")


def find_optimizer(name: str) -> Callable[..., Any]:
    """Return what makes the optimizer of this name: a class, or one with the variant's options.

    The name is that of a class in any case, of a variant (`sgd-momentum`), or `module:Class`.
    Raises `SettingsError` for any other.
    """
    try:
        found = find_trainable(name)
    except UnknownName as error:
        raise SettingsError(str(error)) from None
    return partial(found.cls, **found.options) if found.options else found.cls


def spell(name: str) -> str:
    """Return an optimizer's name as a run remembers it: `AdamW`, `sgd-momentum`, `mine:Lion`."""
    found = find_optimizer(name)
    return name if ":" in name else getattr(found, "__name__", name.lower())


def _default_lr(task: Task, optimizer: str) -> float:
    """Return the task's rate for this optimizer, or the class's default, or the task's usual one.

    The last is the rate of the task's own optimizer: it stands in if a class has no default.
    """
    if optimizer in task.lr:
        return task.lr[optimizer]
    make = find_optimizer(optimizer)
    try:
        default = make([nn.Parameter(torch.zeros(1, 1))]).defaults.get("lr")
    except (TypeError, ValueError):
        default = None
    if isinstance(default, float) and default > 0:
        return default
    return task.lr[task.optimizer]


def make_schedule(name: str, lr: float, total: int, warmup: int = 0) -> Schedule:
    """Return the learning rate as a function of the step, counted from 0.

    `none` is `lr` in all steps. `cosine` falls along half a cosine to about zero; `step` falls to a
    tenth after half of the steps and to a hundredth after three quarters. Both first rise in a line
    over the first `warmup` of the `total` steps.
    """
    if name == "none":
        return constant(lr)
    if name == "step":
        # Counted from the end of the warm-up.
        half = max(0, 0.5 * total - warmup)
        three_quarters = max(0, 0.75 * total - warmup)
        main = piecewise(lr, {half: lr * 0.1, three_quarters: lr * 0.01})
    else:
        main = cosine(lr, steps=max(1, total - warmup))
    if not warmup:
        return main
    return linear(lr / warmup, lr / warmup + lr, steps=warmup).then(main)
