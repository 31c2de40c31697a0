"""Schedulers made of schedulers, one after another or several at once."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

from torch.optim import Optimizer
from torch.optim import lr_scheduler as torch_schedulers

from .arguments import check_number, check_steps, increasing
from .frame import LRScheduler
from .overrides import is_altered, update_as_torch
from .values import assign, copied, is_near, rates

__all__ = ["ChainedScheduler", "SequentialLR"]


class _Composite(LRScheduler):
    """The frame of schedulers made of schedulers."""

    options = ("_schedulers",)
    _schedulers: Sequence[torch_schedulers.LRScheduler]

    def _take(self, optimizer: Any, schedulers: Sequence[Any]) -> None:
        """Check that the members are schedulers of one optimizer, and keep them."""
        name = type(self).__name__
        if isinstance(schedulers, str) or not isinstance(schedulers, Sequence):
            raise TypeError(
                f"{name}: schedulers must be a list of schedulers, got {schedulers!r:.80}."
            )
        if len(schedulers) < 1:
            raise ValueError(f"{name} expects at least one scheduler, but got no scheduler.")
        if optimizer is None and isinstance(self, ChainedScheduler):
            optimizer = getattr(schedulers[0], "optimizer", None)
        for index, member in enumerate(schedulers):
            if not hasattr(member, "optimizer"):
                raise TypeError(
                    f"{name}: what stands at index {index} is not a scheduler, got {member!r:.80}."
                )
            if isinstance(member, torch_schedulers.ReduceLROnPlateau):
                raise ValueError(
                    f"{name} cannot hold the ReduceLROnPlateau at index {index}, whose step needs "
                    "a metric."
                )
            if member.optimizer is not optimizer:
                raise ValueError(
                    f"{name}: the scheduler at index {index} belongs to another optimizer; give "
                    "all the same."
                )
        self.optimizer: Optimizer = schedulers[0].optimizer
        self._schedulers, self._resumed = schedulers, False

    def _note(self) -> None:
        self._last_lr = rates(self.optimizer)

    def _initial_step(self) -> None:
        if self._is_replaced("step"):  # which torch's calls
            torch_schedulers.LRScheduler._initial_step(self)
        else:
            self._begin()

    def _is_replaced(self, method: str) -> bool:
        return method in vars(self) or getattr(type(self), method) is not getattr(
            self._onepass.home, method
        )

    def _begin(self) -> None:
        """Take the members' first step."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "_schedulers": [member.state_dict() for member in self._schedulers]
        }

    def _check(self, state_dict: Mapping[str, Any]) -> None:
        super()._check(state_dict)
        if len(state_dict["_schedulers"]) != len(self._schedulers):
            raise KeyError(
                f"the state dict has {len(state_dict['_schedulers'])} schedulers for "
                f"{len(self._schedulers)}."
            )
        for member, state in zip(self._schedulers, state_dict["_schedulers"], strict=True):
            if isinstance(member, LRScheduler):
                member._onepass.home._check(member, state)

    def _restore(self, state: dict[str, Any]) -> None:
        for member, saved in zip(self._schedulers, state.pop("_schedulers"), strict=True):
            member.load_state_dict(saved)
        super()._restore(state)


class SequentialLR(_Composite, torch_schedulers.SequentialLR):
    """One scheduler after another: each of `milestones` is the step at which the next one begins.

    The next one begins with its step 0, from the lr that the groups began with.

    Example: `[ConstantLR(optimizer, 0.1, 2), ExponentialLR(optimizer, 0.5)]` with `milestones=[2]`
    from lr 1 gives 0.1, 0.1, 1, 0.5, 0.25.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedulers: list[Any],
        milestones: list[int],
        last_epoch: int = -1,
    ) -> None:
        check_number(self, last_epoch=last_epoch)
        self._take(optimizer, schedulers)
        milestones = (
            milestones if isinstance(milestones, list) else check_steps("SequentialLR", milestones)
        )
        if len(milestones) != len(schedulers) - 1:
            raise ValueError(
                f"SequentialLR: {len(schedulers)} schedulers do not go with {len(milestones)} "
                "milestones."
            )
        increasing("SequentialLR", milestones)
        self._milestones, self.last_epoch = milestones, last_epoch + 1
        if last_epoch >= 0:
            self._onepass.home._resume(self, last_epoch + 1)
        else:
            self._put([group["initial_lr"] for group in optimizer.param_groups])
            self._onepass.home._begin(self)

    def _resume(self, step: int) -> None:
        """Begin at a step, with the members' learning rates unless somebody has set others before
        they were made."""
        values = self._begun_at(step)
        met = [member._met for member in _leaves(self) if hasattr(member, "_met")]
        found = min(met, key=attrgetter("order"), default=None)
        if found is None or not any(found.was_set):
            return
        lrs, strange = found.lrs, found.was_set
        for formula in (values, self._begun_at(step - 1)):
            strange = [
                bad and not is_near(lr, value)
                for lr, value, bad in zip(lrs, formula, strange, strict=True)
            ]
        self._begun_at(step)
        self._put(
            [lr if bad else value for lr, value, bad in zip(lrs, values, strange, strict=True)]
        )
        self._note()

    def _begun_at(self, step: int) -> list[Any]:
        self._put([group["initial_lr"] for group in self.optimizer.param_groups])
        self._update_lr(step)
        return rates(self.optimizer)

    def _put(self, lrs: list[Any]) -> None:
        for group, lr in zip(self.optimizer.param_groups, lrs, strict=True):
            assign(group, "lr", lr)

    def _begin(self) -> None:
        self.recursive_undo()
        self.last_epoch = 0
        member = self._schedulers[bisect_right(self._milestones, 0)]
        member._initial_step()
        self._note_of(member)

    def _note_of(self, member: Any) -> None:
        self._last_lr = (
            list(map(copied, member.get_last_lr()))
            if hasattr(member, "get_last_lr")
            else rates(self.optimizer)
        )

    def recursive_undo(self, sched: Any = None) -> None:
        """Undo the first step, which schedulers make when they are constructed."""
        scheduler = self if sched is None else sched
        if hasattr(scheduler, "_schedulers"):
            for member in scheduler._schedulers:
                self.recursive_undo(member)
        elif (
            getattr(scheduler, "last_epoch", -1) >= 0
        ):  # a sequence within a sequence has done so already
            scheduler.last_epoch -= 1

    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  as torch's
        step = self.last_epoch + 1
        index = bisect_right(self._milestones, step)
        member = self._schedulers[index]
        if index and self._milestones[index - 1] == step:
            member._update_lr(0)
        else:
            member.step()
        self.last_epoch = step
        self._note_of(member)

    def _update_lr(self, epoch: int | None = None) -> None:
        if is_altered(self):
            return update_as_torch(self, epoch)
        if epoch is None:
            return self.step()
        index = bisect_right(self._milestones, epoch)
        self._schedulers[index]._update_lr(epoch - (self._milestones[index - 1] if index else 0))
        self.last_epoch = epoch
        return self._note_of(self._schedulers[index])


def _leaves(scheduler: Any) -> list[Any]:
    """The schedulers that are not made of others."""
    if not hasattr(scheduler, "_schedulers"):
        return [scheduler]
    return [leaf for member in scheduler._schedulers for leaf in _leaves(member)]


class ChainedScheduler(_Composite, torch_schedulers.ChainedScheduler):
    """Several schedulers at once: each step is a step of all, in their order, and their changes of
    the lr add up."""

    def __init__(self, schedulers: Sequence[Any], optimizer: Optimizer | None = None) -> None:
        self._take(optimizer, schedulers)
        self._note()

    def _begin(self) -> None:
        for member in self._schedulers:
            member._initial_step()
        self._note()

    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  as torch's
        for member in self._schedulers:
            member.step()
        self._note()

    def _update_lr(self, epoch: int | None = None) -> None:
        if is_altered(self):
            return update_as_torch(self, epoch)
        if epoch is None:
            return self.step()
        for index, member in enumerate(self._schedulers):
            (member._enter if index and isinstance(member, LRScheduler) else member._update_lr)(
                epoch
            )
        return self._note()
