"""Schedules in closed form: the lr is a function of the step, until somebody else changes it.

Example: `StepLR(optimizer, step_size=2, gamma=0.1)` from lr 1.0 gives 1, 1, 0.1, 0.1, 0.01. At step
t this is 0.1 to the power t // 2. If somebody sets the lr to 5 at step 1, the scheduler goes on
from there and multiplies what it finds, as torch's does: 1, 5, 0.5, 0.5, 0.05.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from .frame import LRScheduler
from .overrides import is_altered, update_as_torch
from .values import LR, Value, are_floats, equals, number, rates

__all__ = ["ClosedLR"]


class ClosedLR(LRScheduler):
    r"""Schedules in closed form that go on from whatever the lr has become.

    $$ \eta_t = l + (\eta_0 - l)\, f(t) $$

    While nobody else writes a group's lr, it is this function of the step. Once another scheduler
    or the user has changed it, the change stays, and the distance from $l$ moves on by $f(t) / f(t
    - 1)$, as with torch's. A subclass defines `scale`, $f$, and `floors`, $l$ for each group, if
    they are not 0.
    """

    _own: list[bool]  # whether each group's lr is the closed form
    _known: Any  # what that depended on in the last step
    _known_lrs: list[Value]
    _known_step: int
    _versions: list[tuple[Tensor, int] | None]

    def scale(self, step: int) -> float:
        """Return what the distance from the floor is multiplied by at a step."""
        raise NotImplementedError

    def floors(self) -> Sequence[Value]:
        """Return the floor of each group; nothing if all are 0."""
        return ()

    def _closed(self, lrs: Iterable[Value], step: int) -> list[Value]:
        scale, floors = self.scale(step), self.floors()
        if not floors:
            return [lr * scale for lr in lrs]
        return [floor + (lr - floor) * scale for lr, floor in zip(lrs, floors, strict=True)]

    def ratio(self, step: int) -> float | None:
        """Return what a step multiplies the distance from the floor by; None from the floor
        itself."""
        after, before = self.scale(step), self.scale(step - 1) if step > 0 else 1.0
        if after == before:
            return 1.0
        return after / before if before != 0 else None

    def _carry(self, lrs: list[Value], step: int) -> list[Value]:
        """Where the step to `step` takes learning rates that somebody else has set."""
        ratio = self.ratio(step)
        if ratio == 1.0:
            return lrs
        floors = self.floors() or [0.0] * len(lrs)
        if ratio is None:
            after, triples = self.scale(step), zip(lrs, self.base_lrs, floors, strict=True)
            return [lr + (base - floor) * after for lr, base, floor in triples]
        return [floor + (lr - floor) * ratio for lr, floor in zip(lrs, floors, strict=True)]

    def _inputs(self) -> Any:
        """All that the closed form depends on, beside the step and the initial lrs."""
        return self._onepass.read_options(self)

    def _know(self) -> None:
        self._known, self._known_lrs, self._known_step = (
            self._inputs(),
            list(self.base_lrs),
            self.last_epoch,
        )

    def _is_as_known(self) -> bool:
        same = self.last_epoch == self._known_step and self.base_lrs == self._known_lrs
        return same and self._inputs() == self._known

    def _reset(self) -> None:
        super()._reset()
        self._own = [True] * len(self.base_lrs)
        self._versions = [None] * len(self.base_lrs)
        self._know()

    def _move(self, epoch: int | None) -> None:
        if len(self.optimizer.param_groups) != len(self.base_lrs):
            self._adopt()
            self._know()
        elif not self._is_as_known():
            # Somebody has changed an option or the step: the lr goes on from where it is, as with
            # torch's.
            self._own = [False] * len(self._own)
            self._know()
        if self._is_initial and self._resumed and epoch is None:
            return self._resume(self.last_epoch + 1)
        if self._last_lr is not self._left:
            self._look_again()
        step = self.last_epoch + 1 if epoch is None else epoch
        if epoch is None and all(self._own) and self._is_untouched():
            self._write(self._closed(self.base_lrs, step), plain=True)
            self.last_epoch = self._known_step = step
            return None
        lrs = list(map(LR, self.optimizer.param_groups))
        is_closed = [epoch is not None] * len(lrs)
        if not is_closed[0] and any(self._own):
            is_closed = [self._is_own(index, lr) for index, lr in enumerate(lrs)]
        values = self._closed(list(map(number, self.base_lrs)), step) if any(is_closed) else []
        if not all(is_closed):
            carried = self._carry(lrs, step)
            if values:
                pairs = zip(is_closed, values, carried, strict=True)
                values = [closed if is_own else other for is_own, closed, other in pairs]
            else:
                values = carried
        return self._settle(step, values, is_closed)

    def _look_again(self) -> None:
        """Find out from numbers whether each lr is the closed form.

        Nothing else tells it after another class than this one has kept account of the rates.
        """
        lrs, values = (
            list(map(LR, self.optimizer.param_groups)),
            self._closed(self.base_lrs, self.last_epoch),
        )
        near = [
            not isinstance(lr, Tensor) or lr.is_cpu for lr in lrs
        ]  # to read others would be to wait for a device
        self._own = [
            known and self._is_at(index, values[index]) for index, known in enumerate(near)
        ]
        self._versions = [None] * len(lrs)
        self._last_lr = self._left = rates(self.optimizer)

    def _resume(self, step: int) -> None:
        """Begin at a step, with the closed form; a group whose lr somebody has set goes on from
        there."""
        lrs, bases = list(map(LR, self.optimizer.param_groups)), list(map(number, self.base_lrs))
        before, values = self._closed(bases, step - 1), self._closed(bases, step)
        above = self._closed(lrs, step)
        self._own, self._moved = [], []
        for i, lr in enumerate(lrs):
            fresh = self._is_fresh(i)
            joins = not fresh and self._joins(i, lr, step)
            is_at_a_step = self._is_at(i, values[i]) or self._is_at(i, before[i])
            is_closed = fresh or is_at_a_step or (not joins and self._replaces(i))
            self._own.append(is_closed)
            self._moved.append(fresh or (joins and not is_closed))
            values[i] = values[i] if is_closed else above[i] if joins else lr
        self._settle(step, values, self._own)

    def _settle(self, step: int, values: list[Value], is_closed: list[bool]) -> None:
        self._write(values, plain=False)
        self.last_epoch, self._known_step, self._own = step, step, is_closed
        lrs = list(map(LR, self.optimizer.param_groups))
        self._versions = [None] * len(lrs)
        if not are_floats(lrs):
            self._versions = [
                (lr, lr._version) if isinstance(lr, Tensor) and not lr.is_cpu else None
                for lr in lrs
            ]

    def _enter(self, step: int) -> None:
        if is_altered(self):
            return update_as_torch(self, step)
        self._adopt()
        lrs = list(map(LR, self.optimizer.param_groups))
        return self._settle(step, self._closed(lrs, step), [False] * len(lrs))

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        if is_altered(self):
            return
        if "_known" not in state or "_known_step" not in state:
            self._know()  # else the next step sees whether the state dict has been changed
        elif self._known_lrs == self.base_lrs:
            # The same tensors: to compare others would be to wait for a device, in each step.
            self._known_lrs = list(self.base_lrs)
        del self._last_lr[
            len(self.base_lrs) :
        ]  # torch's has no initial value of groups that came later
        if (
            "_own" not in state
        ):  # torch's: only the numbers tell whether a lr has been changed from outside
            pairs = zip(self._last_lr, self._closed(self.base_lrs, self.last_epoch), strict=True)
            self._own = [math.isclose(lr, value, rel_tol=1e-6) for lr, value in pairs]

    def _is_own(self, index: int, lr: Value) -> bool:
        """Whether a group's lr is the closed form, which this scheduler has left there."""
        if index >= len(self._own) or not self._own[index]:
            return False
        known = self._versions[
            index
        ]  # of a tensor on a device: to read it would be to wait for the device
        return (known is not None and known[0] is lr and known[1] == lr._version) or equals(
            lr, self._last_lr[index]
        )

    def _has_left(self, index: int, lr: Value) -> bool:
        return index < len(self._own) and self._own[index] and super()._has_left(index, lr)

    def _replaces(self, index: int) -> bool:
        # As where a cell of a notebook has run again. What a scheduler that went on has left is the
        # run's lr.
        lr = self.optimizer.param_groups[index]["lr"]
        return any(
            s._has_left(index, lr)
            for s in self._others()
            if type(s) is type(self) and s._step_count == 1
        )

    def _joins(self, index: int, lr: Value, step: int) -> bool:
        """Whether another scheduler has just begun this group's schedule at the same step.

        Then changes add up. One of the same class and options is not another, but what this one
        replaces: a cell of a notebook was run again.
        """
        others = [
            s
            for s in self._others()
            if s._step_count == 1 and s.last_epoch == step and not self._is_twin(s)
        ]
        return any(
            index < len(s._moved) and s._moved[index] and equals(lr, s._last_lr[index])
            for s in others
        )

    def _is_twin(self, other: LRScheduler) -> bool:
        return type(other) is type(self) and all(
            getattr(other, o) == getattr(self, o) for o in self.options
        )
