"""What schedulers check of their arguments, before anything has changed.

Each error is one sentence.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import EPOCH_DEPRECATION_WARNING

__all__ = [
    "check_count",
    "check_number",
    "check_numbers",
    "check_optimizer",
    "check_steps",
    "check_strategy",
]
__all__ += ["check_word", "increasing", "warn_of_epoch"]


def _is_number(value: object) -> bool:
    """Whether one can calculate with a value: a number, also of NumPy, or a tensor of one
    element."""
    if isinstance(value, Tensor):
        return value.numel() == 1
    if isinstance(value, (str, bytes, bytearray)):
        return False
    if getattr(value, "ndim", 0):
        return getattr(value, "size", 0) == 1
    try:
        float(value)  # pyright: ignore[reportArgumentType]  to be found out
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def _got(value: object) -> str:
    return f"got {value!r:.80} of type {type(value).__name__}"


def check_number(owner: object, error: type[Exception] = TypeError, **values: Any) -> None:
    """Raise TypeError for what is not a number."""
    for name, value in values.items():
        if type(value) is not float and not _is_number(value):
            raise error(f"{type(owner).__name__}: {name} must be a number, {_got(value)}.")


def check_numbers(owner: object, **values: Any) -> None:
    """Raise TypeError unless a value is a number, or a list with one for each param group."""
    for name, value in values.items():
        for number in value if isinstance(value, (list, tuple)) else (value,):
            if not _is_number(number):
                message = "must be a number, or a list with a number for each param group"
                raise TypeError(f"{type(owner).__name__}: {name} {message}, {_got(value)}.")


def check_optimizer(scheduler: object, optimizer: torch.optim.Optimizer) -> None:
    """Raise TypeError for what is not an optimizer."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"{type(scheduler).__name__} drives an Optimizer of torch.optim, got {optimizer!r:.80}."
        )


def check_count(name: str, value: object, error: type[Exception] = TypeError) -> None:
    """Raise ValueError unless a value is a positive integer; `error` if it is not a number."""
    if not isinstance(value, int) or value <= 0:
        raise (ValueError if _is_number(value) else error)(
            f"Expected positive integer {name}, but got {value!r:.80}."
        )


def check_strategy(strategy: str) -> Any:
    """Return a way to anneal, "cos" or "linear"; ValueError for anything else."""
    if strategy not in ("cos", "linear"):
        raise ValueError(
            f"anneal_strategy must be one of 'cos' or 'linear', instead got {strategy!r:.80}."
        )
    return strategy


def check_word(owner: object, **values: Any) -> None:
    """Raise TypeError for what is not a word."""
    for name, value in values.items():
        if not isinstance(value, str):
            raise TypeError(f"{type(owner).__name__}: {name} must be a word, {_got(value)}.")


def check_steps(name: str, milestones: Any) -> list[Any]:
    """Return the milestones as a list; TypeError if they are not numbers of steps."""
    if isinstance(milestones, Counter):
        milestones = milestones.elements()
    if not isinstance(milestones, (str, bytes)) and isinstance(milestones, Iterable):
        listed = list(milestones)
        if all(map(_is_number, listed)):
            return listed
        milestones = listed
    raise TypeError(f"{name}: milestones must be a list of steps, {_got(milestones)}.")


def increasing(name: str, milestones: Iterable[int]) -> list[int]:
    """Return the milestones as a list; ValueError unless they are steps that increase from 0 on."""
    listed = check_steps(name, milestones)
    if listed != sorted(listed) or any(milestone < 0 for milestone in listed):
        raise ValueError(f"{name}: milestones must be increasing steps from 0 on, got {listed}.")
    return listed


def warn_of_epoch(stacklevel: int) -> None:
    """Say, as torch does, that a step takes no number."""
    warnings.warn(EPOCH_DEPRECATION_WARNING, UserWarning, stacklevel=stacklevel)
