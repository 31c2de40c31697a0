"""Schedulers made of schedulers: one after another (SequentialLR), or several at once (ChainedScheduler)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim import lr_scheduler as torch_schedulers

from .frame import LRScheduler
from .values import assign, increasing, rates

__all__ = ["ChainedScheduler", "SequentialLR"]


class _Composite(LRScheduler):
    """The frame of schedulers made of schedulers."""

    options = ("_schedulers",)
    _schedulers: Sequence[torch_schedulers.LRScheduler]

    def _take(self, optimizer: Optimizer | None, schedulers: Sequence[Any]) -> None:
        """Check that the members are schedulers of one optimizer, and keep them."""
        name = type(self).__name__
        if len(schedulers) < 1:
            raise ValueError(f"{name} expects at least one scheduler, but got no scheduler.")
        optimizer = optimizer or getattr(schedulers[0], "optimizer", None)
        for index, member in enumerate(schedulers):
            if not hasattr(member, "optimizer"):
                raise TypeError(f"{name}: what stands at index {index} is no scheduler, got {member!r:.80}.")
            if isinstance(member, torch_schedulers.ReduceLROnPlateau):
                raise ValueError(
                    f"{name} cannot hold the ReduceLROnPlateau at index {index}, whose step needs a metric."
                )
            if member.optimizer is not optimizer:
                raise ValueError(
                    f"{name}: the scheduler at index {index} belongs to another optimizer; give all the same."
                )
        self.optimizer: Optimizer = schedulers[0].optimizer
        self._schedulers, self._resumed = schedulers, False

    def _note(self) -> None:
        self._last_lr = rates(self.optimizer)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"_schedulers": [member.state_dict() for member in self._schedulers]}

    def _check(self, state_dict: Mapping[str, Any]) -> None:
        super()._check(state_dict)
        if len(state_dict["_schedulers"]) != len(self._schedulers):
            raise KeyError(
                f"the state dict has {len(state_dict['_schedulers'])} schedulers for {len(self._schedulers)}."
            )
        for member, state in zip(self._schedulers, state_dict["_schedulers"], strict=True):
            if isinstance(member, LRScheduler):
                member._check(state)

    def _restore(self, state: dict[str, Any]) -> None:
        for member, saved in zip(self._schedulers, state.pop("_schedulers"), strict=True):
            member.load_state_dict(saved)
        super()._restore(state)


class SequentialLR(_Composite, torch_schedulers.SequentialLR):
    """One scheduler after another: each of `milestones` is the step at which the next one begins, from its step 0."""

    def __init__(
        self, optimizer: Optimizer, schedulers: list[Any], milestones: list[int], last_epoch: int = -1
    ) -> None:
        self._take(optimizer, schedulers)
        if len(milestones) != len(schedulers) - 1:
            raise ValueError(f"SequentialLR: {len(schedulers)} schedulers do not go with {len(milestones)} milestones.")
        increasing("SequentialLR", milestones)
        self._milestones, self.last_epoch = milestones, last_epoch + 1
        for group in optimizer.param_groups:
            assign(group, "lr", group["initial_lr"])
        self._initial_step() if last_epoch < 0 else self._update_lr(last_epoch + 1)

    def _initial_step(self) -> None:
        _rewind(self._schedulers)
        self.last_epoch = 0
        self._schedulers[bisect_right(self._milestones, 0)]._initial_step()
        self._note()

    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  as torch's
        step = self.last_epoch + 1
        index = bisect_right(self._milestones, step)
        if index and self._milestones[index - 1] == step:
            self._schedulers[index]._update_lr(0)
        else:
            self._schedulers[index].step()
        self.last_epoch = step
        self._note()

    def _update_lr(self, epoch: int | None = None) -> None:
        if epoch is None:
            return self.step()
        index = bisect_right(self._milestones, epoch)
        self._schedulers[index]._update_lr(epoch - (self._milestones[index - 1] if index else 0))
        self.last_epoch = epoch
        self._note()


def _rewind(members: Iterable[Any]) -> None:
    """Undo the first step, which schedulers make when they are constructed."""
    for member in members:
        if hasattr(member, "_schedulers"):
            _rewind(member._schedulers)
        elif getattr(member, "last_epoch", -1) >= 0:  # a sequence within a sequence has done so already
            member.last_epoch -= 1


class ChainedScheduler(_Composite, torch_schedulers.ChainedScheduler):
    """Several schedulers at once: each step is a step of all, in their order, and their changes of the lr add up."""

    def __init__(self, schedulers: Sequence[Any], optimizer: Optimizer | None = None) -> None:
        self._take(optimizer, schedulers)
        self._note()

    def _initial_step(self) -> None:
        for member in self._schedulers:
            member._initial_step()
        self._note()

    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  as torch's
        for member in self._schedulers:
            member.step()
        self._note()

    def _update_lr(self, epoch: int | None = None) -> None:
        if epoch is None:
            return self.step()
        for index, member in enumerate(self._schedulers):
            (member._enter if index and isinstance(member, LRScheduler) else member._update_lr)(epoch)
        self._note()
