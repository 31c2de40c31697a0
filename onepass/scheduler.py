"""The frame of all schedulers: what writes the values of schedules into an optimizer's options."""

from __future__ import annotations

import functools
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from operator import is_, itemgetter, setitem
from types import FunctionType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim import lr_scheduler as torch_schedulers

from .schedule import Schedule

__all__ = ["LR", "ClosedLR", "Group", "LRScheduler", "Scheduler", "assign", "check_optimizer", "copied", "per_group"]
__all__ += ["rates", "saved_attributes", "shared"]

Group = dict[str, Any]
Value = Any  # a float, or a tensor with one element
LR = itemgetter("lr")


def check_optimizer(scheduler: object, optimizer: torch.optim.Optimizer) -> None:
    """Raise TypeError for what is no optimizer."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"{type(scheduler).__name__} drives an Optimizer of torch.optim, got {optimizer!r:.80}.")


def copied(value: Value) -> Value:
    """The same number, in memory of its own."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone() if value.requires_grad else value.clone()


def number(value: Value) -> Value:
    """The number of a tensor, unless to read it would be to wait for a device."""
    return value.item() if isinstance(value, Tensor) and value.is_cpu else value


def assign(options: Any, key: Any, value: Value) -> None:
    """Set an option. A tensor is filled and stays the tensor that it is, as compiled and captured steps demand."""
    old = options[key]
    if not isinstance(old, Tensor):
        options[key] = value.item() if isinstance(value, Tensor) else value
        return
    old = old.detach() if old.requires_grad else old
    if isinstance(value, Tensor):
        old.copy_(value if value.dim() <= old.dim() else value.reshape(old.shape))
    else:
        old.fill_(value)


def are_floats(values: Iterable[Value]) -> bool:
    """Whether all are plain numbers, which need no care."""
    return set(map(type, values)) == {float}


def rates(optimizer: torch.optim.Optimizer) -> list[Value]:
    """The learning rates as they are now, in memory of their own."""
    lrs = list(map(LR, optimizer.param_groups))
    return lrs if are_floats(lrs) else list(map(copied, lrs))


def equals(lr: Value, value: Value) -> bool:
    """Whether a group's lr is a number, in the precision in which the group holds it."""
    if not isinstance(lr, Tensor):
        return bool(lr == value)
    if not isinstance(value, Tensor) or value.dtype != lr.dtype:
        value = torch.as_tensor(value, dtype=lr.dtype)
    return lr.item() == value.item()


def per_group(name: str, optimizer: torch.optim.Optimizer, value: Any) -> list[Any]:
    """One value for each param group: those of a list, anything else for all of them."""
    count = len(optimizer.param_groups)
    if not isinstance(value, (list, tuple)):
        return [copied(value) for _ in range(count)]
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} values for {count} param groups: give one for each, or one for all.")
    return list(map(copied, value))


def shared(name: str, values: Sequence[Value]) -> Value:
    """The value that all param groups have, for one that is new."""
    if any(value != values[0] for value in values):
        raise ValueError(f"{name} differs from group to group: the new param group needs its own, under {name!r}.")
    return copied(values[0])


def saved_attributes(function: Callable[..., Any] | None) -> dict[str, Any] | None:
    """The attributes of a callable object; None for functions and schedules, which are the program's, not the run's."""
    plain = function is None or isinstance(function, (FunctionType, Schedule)) or not hasattr(function, "__dict__")
    return None if plain else dict(vars(function))


class LRScheduler(torch_schedulers.LRScheduler):
    """Base of all schedulers: a subclass defines `get_lr`, which returns an lr for each param group.

    `optimizer` is any `torch.optim.Optimizer`. `last_epoch` is the last step that an earlier run has done (-1: none);
    from 0 on, the groups need their "initial_lr", as those of a loaded checkpoint have it. Errors: TypeError for what
    is no optimizer, KeyError for a missing "initial_lr", ValueError for a negative step.
    """

    options: tuple[str, ...] = ()  # the attributes that tell this class's state dicts from others'
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
            warnings.warn(
                "The epoch parameter in `scheduler.step()` was not necessary and is being deprecated where possible. "
                "Please use `scheduler.step()` to step the scheduler.",
                UserWarning,
                stacklevel=3,
            )
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
            self.base_lrs.append(copied(group.setdefault("initial_lr", copied(group["lr"]))))
            if known:
                self._last_lr.append(None)

    def _enter(self, step: int) -> None:
        """Begin at a step, on top of what other schedulers have made of the learning rates."""
        self._update_lr(step)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs, in torch's form: numbers and lists of them, no function."""
        state = {key: value for key, value in vars(self).items() if key not in ("optimizer", "_resumed", "_versions")}
        # Beside what this scheduler has left: torch's carries both along, and moves only the other on.
        state["_group_lrs"] = [*self._last_lr, *map(LR, self.optimizer.param_groups)]
        return {key: list(map(copied, value)) if isinstance(value, list) else value for key, value in state.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where a scheduler of this class stood, or torch's; KeyError for a state dict of another class.

        A group whose lr is the one that this scheduler has left there gets the lr of the checkpoint: whether the
        optimizer's checkpoint is loaded before or after does not matter.
        """
        self._check(state_dict)
        state = {key: list(map(copied, v)) if isinstance(v, list) else v for key, v in state_dict.items()}
        lrs, both, groups = state.get("_last_lr", []), state.pop("_group_lrs", []), self.optimizer.param_groups
        if lrs and both[: len(lrs)] == lrs:
            lrs = both[len(lrs) :]
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
        known = {*vars(self), "base_lrs", "last_epoch", "verbose"}
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
        """Whether other schedulers of the optimizer resume together with this one, so that their changes add up."""
        others = vars(self.optimizer).get("_lr_schedulers", ())
        return any(other is not self and other._resumed and other._step_count == 1 for other in others)


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
