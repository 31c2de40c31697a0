"""What drives any options of an optimizer by schedules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any

import torch

from .frame import LRScheduler
from .values import Group, Value, assign, check_optimizer, equals, per_group, rates

__all__ = ["Scheduler"]

Schedules = Callable[[int], float] | Sequence[Callable[[int], float] | None]


class Scheduler(LRScheduler):
    """Drive any options of an optimizer by schedules, which are functions of the step.

    `schedules` maps options to them: `{"lr": cosine(3e-4, steps=10_000), "betas[0]": linear(0.85, 0.95, steps=500)}`. A
    list has one for each param group, None leaves that group's option alone. Each step writes the schedules' values,
    whatever stood there. The state is the number of the step: another schedule may go on from a checkpoint. Errors:
    KeyError for an option that a group does not have, TypeError for what is no function.
    """

    options = ("last_epoch",)

    def __init__(
        self, optimizer: torch.optim.Optimizer, schedules: Mapping[str, Schedules], last_epoch: int = -1
    ) -> None:
        check_optimizer(self, optimizer)
        self.optimizer, self._schedules = optimizer, dict(schedules)
        for group, option, function in self._targets():
            if not callable(function):
                raise TypeError(f"the schedule of {option!r} must be a function of the step, got {function!r:.80}.")
            try:
                float(_read(group, option))
            except (KeyError, IndexError, TypeError, ValueError):
                names = ", ".join(name for name in group if name not in ("params", "param_names"))
                raise KeyError(f"{option!r} is no number in the optimizer's groups; they have {names}.") from None
        super().__init__(optimizer, last_epoch)
        self._resumed = False  # no company for schedulers that multiply

    def _adopt(self) -> None:
        """Initial values play no part."""

    def _targets(self) -> Iterator[tuple[Group, str, Any]]:
        """Each group with each of its scheduled options and the schedule."""
        groups = self.optimizer.param_groups
        for option, given in self._schedules.items():
            listed = isinstance(given, (list, tuple))
            functions = per_group(f"schedules[{option!r}]", self.optimizer, given) if listed else repeat(given)
            yield from (row for row in zip(groups, repeat(option), functions, strict=False) if row[2] is not None)

    def _values(self, step: int) -> list[tuple[Group, str, float]]:
        """What is written at a step. Many groups share a schedule, which is asked once."""
        targets = list(self._targets())
        functions = {id(function): function for _, _, function in targets}
        values = {key: function(step) for key, function in functions.items()}
        return [(group, option, values[id(function)]) for group, option, function in targets]

    def _update_lr(self, epoch: int | None = None) -> None:
        step = self.last_epoch + 1 if epoch is None else epoch
        for group, option, value in self._values(step):
            _put(group, option, value)
        self.last_epoch = step
        self._last_lr = rates(self.optimizer)

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().state_dict().items() if key != "_schedules"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the step of another Scheduler, with the schedules of this one."""
        left = [equals(_read(group, option), value) for group, option, value in self._values(self.last_epoch)]
        super().load_state_dict(state_dict)
        both = state_dict.get("_group_lrs", [])
        by_hand = both[: len(both) // 2] != both[len(both) // 2 :]
        for (group, option, value), still in zip(self._values(self.last_epoch), left, strict=True):
            if still and not (option == "lr" and by_hand):
                _put(group, option, value)
        self._last_lr = rates(self.optimizer)


@functools.cache
def _parts(option: str) -> tuple[str, int | None]:
    """Of `betas[0]`, the name and the index."""
    name, bracket, index = option.rstrip("]").partition("[")
    return name, int(index) if bracket else None


def _read(group: Group, option: str) -> Value:
    """An option, or with `betas[0]` one of its numbers."""
    name, index = _parts(option)
    return group[name] if index is None else group[name][index]


def _put(group: Group, option: str, value: Value) -> None:
    """Set an option, or with `betas[0]` one of its numbers."""
    name, index = _parts(option)
    if index is None and type(value) is float and type(group[name]) is float:
        group[name] = value
    elif index is None:
        assign(group, name, value)
    else:
        numbers = list(group[name])
        assign(numbers, index, value)
        group[name] = type(group[name])(numbers)
