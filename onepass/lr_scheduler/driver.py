"""`Scheduler`: any options of an optimizer, driven by schedules."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import compress, repeat
from operator import itemgetter, setitem
from typing import Any

import torch

from .arguments import check_optimizer
from .frame import LRScheduler
from .values import Group, Value, are_floats, assign, equals, per_group, rates

__all__ = ["Scheduler"]

Schedules = Callable[[int], float] | Sequence[Callable[[int], float] | None]


class Scheduler(LRScheduler):
    """Drive any options of an optimizer by schedules, which are functions of the step.

    `schedules` maps options to them: `{"lr": cosine(3e-4, steps=10_000), "betas[0]": linear(0.85,
    0.95, steps=500)}`. A list has one for each param group, and None leaves that group's option
    alone. Each step writes the schedules' values, whatever stood there. The state is the number of
    the step: another schedule may go on from a checkpoint.

    Raises KeyError for an option that a group does not have, TypeError for what is not a function.

    Example: `{"lr": linear(1.0, 0.0, steps=4)}` gives 1, 0.75, 0.5, 0.25, 0.
    """

    options = ("last_epoch",)

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        schedules: Mapping[str, Schedules],
        last_epoch: int = -1,
    ) -> None:
        check_optimizer(self, optimizer)
        if not isinstance(schedules, Mapping):
            raise TypeError(
                "Scheduler: schedules must be a dict of options to schedules, got "
                f"{schedules!r:.80}."
            )
        self.optimizer, self._schedules = optimizer, dict(schedules)
        for option, groups, functions in self._targets():
            for group, function in zip(groups, functions, strict=True):
                _check(option, group, function)
        super().__init__(optimizer, last_epoch)
        self._resumed = False  # no company for schedulers that multiply

    def _adopt(self, is_new: bool = False) -> None:
        """Initial values play no part."""
        self.base_lrs = []

    def _targets(self) -> Iterator[tuple[str, list[Group], list[Any]]]:
        """Each option with the groups in which it is scheduled, and their schedules."""
        everyone = self.optimizer.param_groups
        for option, given in self._schedules.items():
            if isinstance(given, (list, tuple)):
                functions = per_group(f"schedules[{option!r}]", self.optimizer, given)
                pairs = [
                    pair for pair in zip(everyone, functions, strict=True) if pair[1] is not None
                ]
                yield option, [group for group, _ in pairs], [function for _, function in pairs]
            else:
                yield option, everyone, [given] * len(everyone)

    def _values(self, step: int) -> list[tuple[str, list[Group], list[float]]]:
        """What is written at a step. Many groups share a schedule, which is asked once."""
        targets = list(self._targets())
        once = {id(f): f for _, _, functions in targets for f in functions}
        values = {key: f(step) for key, f in once.items()}
        return [
            (option, groups, [values[id(f)] for f in functions])
            for option, groups, functions in targets
        ]

    def _move(self, epoch: int | None) -> None:
        step = self.last_epoch + 1 if epoch is None else epoch
        for option, groups, values in self._values(step):
            _put(option, groups, values)
        self.last_epoch = step
        self._last_lr = rates(self.optimizer)

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().state_dict().items() if key != "_schedules"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the step of another Scheduler, with the schedules of this one."""
        left = [
            list(map(equals, _read(option, groups), values))
            for option, groups, values in self._values(self.last_epoch)
        ]
        super().load_state_dict(state_dict)
        found = state_dict.get("_found", {})
        by_hand = found.get("after") != found.get("lr")
        for (option, groups, values), still in zip(
            self._values(self.last_epoch), left, strict=True
        ):
            if option != "lr" or not by_hand:
                _put(option, list(compress(groups, still)), list(compress(values, still)))
        self._last_lr = rates(self.optimizer)


def _check(option: str, group: Group, function: object) -> None:
    if not callable(function):
        raise TypeError(
            f"the schedule of {option!r} must be a function of the step, got {function!r:.80}."
        )
    try:
        float(_read(option, [group])[0])
    except (KeyError, IndexError, TypeError, ValueError):
        names = ", ".join(name for name in group if name not in ("params", "param_names"))
        raise KeyError(
            f"{option!r} is not a number in the optimizer's groups; they have {names}."
        ) from None


@functools.cache
def _parts(option: str) -> tuple[str, int | None]:
    """Of `betas[0]`, the name and the index."""
    name, bracket, index = option.rstrip("]").partition("[")
    return name, int(index) if bracket else None


def _read(option: str, groups: Sequence[Group]) -> list[Value]:
    """An option of each group, or with `betas[0]` one of its numbers."""
    name, index = _parts(option)
    return [group[name] if index is None else group[name][index] for group in groups]


def _put(option: str, groups: Sequence[Group], values: Sequence[Value]) -> None:
    """Set an option of each group, or with `betas[0]` one of its numbers."""
    name, index = _parts(option)
    if index is None:
        plain = are_floats(values) and are_floats(map(itemgetter(name), groups))
        deque(map(setitem if plain else assign, groups, repeat(name), values), maxlen=0)
        return
    for group, value in zip(groups, values, strict=True):
        numbers = list(group[name])
        assign(numbers, index, value)
        group[name] = type(group[name])(numbers)
