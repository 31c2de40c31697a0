"""The frame of all schedulers: what writes the values of schedules into an optimizer's options."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from operator import is_, setitem
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim import lr_scheduler as torch_schedulers

from .values import LR, Value, are_floats, assign, check_optimizer, copied, copied_lists, equals, number, rates, shared

__all__ = ["ClosedLR", "LRScheduler", "warn_of_epoch"]


def warn_of_epoch(stacklevel: int) -> None:
    """Say, as torch does, that a step takes no number."""
    message = "The epoch parameter in `scheduler.step()` was not necessary and is being deprecated where possible. "
    warnings.warn(message + "Please use `scheduler.step()` to step the scheduler.", UserWarning, stacklevel=stacklevel)


class LRScheduler(torch_schedulers.LRScheduler):
    """Base of all schedulers: a subclass defines `get_lr`, which returns an lr for each param group.

    `optimizer` is any `torch.optim.Optimizer`. `last_epoch` is the last step that an earlier run has done (-1: none);
    from 0 on, the groups need their "initial_lr", as those of a loaded checkpoint have it. Errors: TypeError for what
    is no optimizer, KeyError for a missing "initial_lr", ValueError for a negative step.
    """

    options: tuple[str, ...] = ()  # the attributes that tell this class's state dicts from others'
    handed_on: tuple[str, ...] = ()  # the options of param groups that a new one takes from the others
    _last_lr: list[Value]

    def __init__(self, optimizer: torch.optim.Optimizer, last_epoch: int = -1) -> None:
        check_optimizer(self, optimizer)
        if last_epoch < -1:
            raise ValueError(f"{type(self).__name__}: last_epoch must be -1 or a step from 0 on, got {last_epoch}.")
        self.optimizer, self.last_epoch, self._resumed = optimizer, last_epoch, last_epoch >= 0
        self.base_lrs: list[Value] = []
        if not self._resumed:
            self._prepare()
        self._adopt()
        if "_opt_called" not in vars(optimizer):  # one hook serves all schedulers of an optimizer
            vars(optimizer)["_opt_called"] = False
            optimizer.register_step_post_hook(lambda stepped, *_: vars(stepped).update(_opt_called=True))
        self._initial_step()
        vars(optimizer).setdefault("_lr_schedulers", WeakSet()).add(self)

    def _prepare(self) -> None:
        """What a class writes into the param groups at the start of a run, when all has been checked."""

    def _initial_step(self) -> None:
        self._step_count = 0
        self._is_initial = True
        self._last_lr = list(self.base_lrs)
        try:
            self.step()
        finally:
            self._is_initial = False

    def step(self, epoch: int | None = None) -> None:
        """Go on to the next step; with `epoch`, which torch deprecates, to that one."""
        if torch.compiler.is_compiling():
            return _step_outside_graphs(self, epoch)
        return self._step(epoch)

    def _step(self, epoch: int | None = None) -> None:
        if self._step_count == 1 and not vars(self.optimizer).get("_opt_called", True):
            warnings.warn(
                "Detected call of `lr_scheduler.step()` before `optimizer.step()`. Call `optimizer.step()` first: "
                "otherwise the first value of the schedule is skipped.",
                UserWarning,
                stacklevel=3,
            )
        if epoch is not None:
            warn_of_epoch(stacklevel=4)
            if epoch < 0:
                raise ValueError(f"{type(self).__name__}: expected a step from 0 on, got {epoch}.")
        self._step_count += 1
        self._update_lr(epoch)

    def _update_lr(self, epoch: int | None = None) -> None:
        """Compute all that the step changes, and only then change it."""
        self._adopt()
        before = self.last_epoch
        self.last_epoch = before + 1 if epoch is None else epoch
        self._get_lr_called_within_step = True
        try:
            self._write(self.get_lr(), plain=self._is_untouched())
        except BaseException:
            self.last_epoch = before
            raise
        finally:
            self._get_lr_called_within_step = False

    def _is_untouched(self) -> bool:
        """Whether every lr is the very number that this scheduler has left there, and so no tensor."""
        return all(map(is_, map(LR, self.optimizer.param_groups), self._last_lr))

    def _write(self, values: list[Value], plain: bool) -> None:
        groups = self.optimizer.param_groups
        if len(values) != len(groups):
            raise ValueError(f"{type(self).__name__} has {len(values)} learning rates for {len(groups)} param groups.")
        if (plain and type(values[0]) is float) or (are_floats(values) and are_floats(map(LR, groups))):
            if not plain or values != self._last_lr:
                deque(map(setitem, groups, repeat("lr"), values), maxlen=0)
                self._last_lr = list(values)
        else:
            deque(map(assign, groups, repeat("lr"), values), maxlen=0)
            self._last_lr = rates(self.optimizer)

    def _adopt(self) -> None:
        """Take in param groups that are new, each with the lr that it came with."""
        groups, known = self.optimizer.param_groups, len(self.base_lrs)
        if len(groups) < known:
            raise ValueError(f"{type(self).__name__} was made for {known} param groups, and finds {len(groups)}.")
        for index, group in enumerate(groups[known:], known):
            if self._resumed and not known and "initial_lr" not in group:
                raise KeyError(
                    f"param_groups[{index}] has no 'initial_lr', from which last_epoch={self.last_epoch} resumes: load "
                    "the optimizer's checkpoint first, or leave last_epoch out."
                )
            missing = [name for name in self.handed_on if known and name in groups[0] and name not in group]
            group.update({name: shared(name, [other[name] for other in groups[:known]]) for name in missing})
            self.base_lrs.append(copied(group.setdefault("initial_lr", copied(group["lr"]))))
            if known:
                self._last_lr.append(None)

    def _enter(self, step: int) -> None:
        """Begin at a step, on top of what other schedulers have made of the learning rates."""
        self._update_lr(step)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs, in torch's form: numbers and lists of them, no function."""
        state = {key: value for key, value in vars(self).items() if key not in ("optimizer", "_resumed", "_versions")}
        # Torch's, should it load this, carries both along, and moves only `_last_lr` on.
        state["_found"] = {"after": self._last_lr, "lr": list(map(LR, self.optimizer.param_groups))}
        return copied_lists(state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where a scheduler of this class stood, or torch's; KeyError for a state dict of another class.

        A group whose lr is the one that this scheduler has left there gets the lr of the checkpoint: whether the
        optimizer's checkpoint is loaded before or after does not matter.
        """
        self._check(state_dict)
        state, groups = copied_lists(state_dict), self.optimizer.param_groups
        lrs, found = state.get("_last_lr", []), state.pop("_found", {})
        if found.get("after") == lrs:
            lrs = found["lr"]
        else:  # torch's
            state.pop("_own", None)
        untouched = [equals(group["lr"], mine) for group, mine in zip(groups, self._last_lr, strict=False)]
        self._restore(state)
        for group, still, lr in zip(groups, untouched, lrs, strict=False):
            if still:
                assign(group, "lr", lr)

    def _restore(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def _check(self, state_dict: Mapping[str, Any]) -> None:
        """Refuse another class's state dict, before anything has changed."""
        known = {*vars(self), "base_lrs", "last_epoch", "verbose", "anneal_func"}  # the last two: of earlier torchs
        missing = [name for name in self.options if name not in state_dict]
        foreign = [name for name in state_dict if self.options and not name.startswith("_") and name not in known]
        if missing or foreign:
            what = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(foreign)}"
            raise KeyError(f"the state dict {what}: it is none of a {type(self).__name__}; load that of its own class.")


# It imports torch's compiler when first called, which inside a compiled function has happened already.
_step_outside_graphs = torch._disable_dynamo(lambda scheduler, epoch: scheduler._step(epoch))


class ClosedLR(LRScheduler):
    r"""Schedules in closed form that go on from whatever the lr has become: $\eta_t = l + (\eta_0 - l)\, f(t)$.

    While nobody else writes a group's lr, it is this function of the step. Once another scheduler or the user has
    changed it, the change stays, and the distance from $l$ moves on by $f(t) / f(t - 1)$, as with torch's. A subclass
    defines `scale`, $f$, and `floors`, $l$ for each group, where they are not 0.
    """

    _own: list[bool]  # whether each group's lr is the closed form
    _versions: list[tuple[Tensor, int] | None]

    def scale(self, step: int) -> float:
        """What the distance from the floor is multiplied by at a step."""
        raise NotImplementedError

    def floors(self) -> Sequence[Value]:
        """The floor of each group; empty when all are 0."""
        return ()

    def get_lr(self) -> list[Value]:
        """The closed form at `last_epoch`."""
        return self._closed(self.base_lrs, self.last_epoch)

    def _closed(self, lrs: Iterable[Value], step: int) -> list[Value]:
        scale, floors = self.scale(step), self.floors()
        if not floors:
            return [lr * scale for lr in lrs]
        return [floor + (lr - floor) * scale for lr, floor in zip(lrs, floors, strict=True)]

    def _carry(self, lrs: list[Value], step: int) -> list[Value]:
        """Where the step to `step` takes learning rates that somebody else has set."""
        after, before = self.scale(step), self.scale(step - 1) if step > 0 else 1.0
        if after == before:
            return lrs
        floors = self.floors() or [0.0] * len(lrs)
        if before == 0:
            triples = zip(lrs, self.base_lrs, floors, strict=True)
            return [lr + (base - floor) * after for lr, base, floor in triples]
        ratio = after / before
        return [floor + (lr - floor) * ratio for lr, floor in zip(lrs, floors, strict=True)]

    def _initial_step(self) -> None:
        self._own = [True] * len(self.base_lrs)
        self._versions = [None] * len(self.base_lrs)
        super()._initial_step()

    def _update_lr(self, epoch: int | None = None) -> None:
        self._adopt()
        step = self.last_epoch + 1 if epoch is None else epoch
        resumes = self._is_initial and self._resumed
        if epoch is None and not resumes and all(self._own) and self._is_untouched():
            self._write(self._closed(self.base_lrs, step), plain=True)
            self.last_epoch = step
        elif resumes and self._has_company():
            self._enter(step)
        else:
            lrs = list(map(LR, self.optimizer.param_groups))
            own = [epoch is not None or resumes] * len(lrs)
            if not own[0] and any(self._own):
                own = [self._is_own(index, lr) for index, lr in enumerate(lrs)]
            values = self._closed(list(map(number, self.base_lrs)), step) if any(own) else []
            if not all(own):
                carried = self._carry(lrs, step)
                values = [values[i] if own[i] else value for i, value in enumerate(carried)] if values else carried
            self._settle(step, values, own)

    def _settle(self, step: int, values: list[Value], own: list[bool]) -> None:
        self._write(values, plain=False)
        self.last_epoch, self._own = step, own
        lrs = list(map(LR, self.optimizer.param_groups))
        self._versions = [None] * len(lrs)
        if not are_floats(lrs):
            self._versions = [(lr, lr._version) if isinstance(lr, Tensor) and not lr.is_cpu else None for lr in lrs]

    def _enter(self, step: int) -> None:
        self._adopt()
        lrs = list(map(LR, self.optimizer.param_groups))
        self._settle(step, self._closed(lrs, step), [False] * len(lrs))

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        del self._last_lr[len(self.base_lrs) :]  # torch's has no initial value of groups that came later
        if "_own" not in state:  # torch's: only the numbers tell whether a lr has been changed from outside
            pairs = zip(self._last_lr, self._closed(self.base_lrs, self.last_epoch), strict=True)
            self._own = [math.isclose(lr, value, rel_tol=1e-6) for lr, value in pairs]

    def _is_own(self, index: int, lr: Value) -> bool:
        """Whether a group's lr is the closed form, which this scheduler has left there."""
        if index >= len(self._own) or not self._own[index]:
            return False
        known = self._versions[index]  # of a tensor on a device: to read it would be to wait for the device
        return (known is not None and known[0] is lr and known[1] == lr._version) or equals(lr, self._last_lr[index])

    def _has_company(self) -> bool:
        """Whether other schedulers of the optimizer resume together with this one, so that their changes add up.

        One of the same class and options is not another, but what this one replaces: a cell of a notebook run again.
        """
        others = [s for s in vars(self.optimizer).get("_lr_schedulers", ()) if s._resumed and s._step_count == 1]
        return any(other is not self and not self._is_twin(other) for other in others)

    def _is_twin(self, other: LRScheduler) -> bool:
        return type(other) is type(self) and all(getattr(other, o) == getattr(self, o) for o in self.options)
