"""The frame of all schedulers: what writes learning rates into an optimizer's param groups.

A step computes the lr of each group (`get_lr`), and only then writes it. `closed.ClosedLR` is the
frame of schedules that are functions of the step.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import update_wrapper
from itertools import count, repeat
from operator import is_, setitem
from typing import Any
from weakref import WeakValueDictionary, ref

import torch
from torch.optim import lr_scheduler as torch_schedulers

from .arguments import check_number, check_optimizer, warn_of_epoch
from .overrides import (
    House,
    check_length,
    has_new_closed_form,
    is_altered,
    is_ours,
    is_same,
    update_as_torch,
)
from .values import (
    LR,
    Value,
    are_floats,
    assign,
    copied,
    copied_lists,
    equals,
    is_near,
    rates,
    shared,
)

__all__ = ["LRScheduler"]
_orders = count()
HOW = "https://pytorch.org/docs/stable/optim.html#how-to-adjust-learning-rate"
EARLY = (
    "Detected call of `lr_scheduler.step()` before `optimizer.step()`. Call `optimizer.step()` "
    "first: otherwise the first value of the schedule is skipped."
)
REPLACED = (
    "Seems like `optimizer.step()` has been overridden after learning rate scheduler "
    "initialization. Please, make sure to call `optimizer.step()` before `lr_scheduler.step()`."
)


@dataclass(frozen=True)
class Met:
    """What a scheduler met when it was made.

    It is not part of the state, and does not count in a comparison.
    """

    order: int = field(compare=False)
    lrs: list[Value] = field(compare=False)
    # Of each group, whether somebody had set another lr than its initial one.
    was_set: list[bool] = field(compare=False)


class Made(WeakValueDictionary):
    """The living schedulers of an optimizer, by the order in which they were made.

    A copy knows of none.
    """

    def __reduce__(self) -> tuple[type[Made], tuple[()]]:
        return Made, ()

    def __deepcopy__(self, memo: Any) -> Made:
        return Made()


class LRScheduler(torch_schedulers.LRScheduler):
    """Base of all schedulers: a subclass defines `get_lr`, which returns an lr for each param
    group.

    `optimizer` is any `torch.optim.Optimizer`. `last_epoch` is the last step that an earlier run
    has done (-1: none); from 0 on, the groups need their "initial_lr", as those of a loaded
    checkpoint have it. Raises TypeError if `optimizer` is not an optimizer, KeyError for a missing
    "initial_lr", ValueError for a negative step. All schedulers here have these two arguments.

    A subclass of any scheduler may replace `get_lr`, `_get_closed_form_lr` or `step`. It then runs
    as with torch's class as its base: `super().get_lr()` goes on from the lr that the group has.

    Example: a group begins with lr 1. `ExponentialLR(optimizer, 0.5)` writes 0.5 at the first
    `step()` and 0.25 at the second. Resumed with `last_epoch=1`, it writes 0.25 at construction.
    """

    options: tuple[str, ...] = ()  # the attributes that tell this class's state dicts from others'
    handed_on: tuple[
        str, ...
    ] = ()  # the options of param groups that a new one takes from the others
    base_lrs: list[Value]
    _last_lr: list[Value]
    _onepass: House
    _foreign = False  # whether people's methods make the learning rates
    _left: list[Value] | None = None  # the `_last_lr` that this scheduler itself has written
    _moved: Sequence[
        bool
    ] = ()  # the groups whose schedule was begun in its middle, from their initial lr

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._onepass = House(cls) if is_ours(cls) else cls._onepass.for_subclass(cls)

    def __init__(self, optimizer: torch.optim.Optimizer, last_epoch: int = -1) -> None:
        check_optimizer(self, optimizer)
        check_number(self, last_epoch=last_epoch)
        if last_epoch < -1:
            raise ValueError(
                f"{type(self).__name__}: last_epoch must be -1 or a step from 0 on, got "
                f"{last_epoch}."
            )
        self.optimizer, self.last_epoch, self._resumed = (
            optimizer,
            last_epoch,
            bool(last_epoch >= 0),
        )
        set_before = [
            "initial_lr" in g and not is_near(g["lr"], g["initial_lr"])
            for g in optimizer.param_groups
        ]
        self._met = Met(next(_orders), rates(optimizer), set_before)
        if not self._resumed:
            self._onepass.home._prepare(self)
        self._onepass.home._adopt(self, is_new=True)
        if "_opt_called" not in vars(optimizer):  # once for all schedulers of an optimizer
            vars(optimizer)["_opt_called"] = False
            note_steps(optimizer)
        is_altered(self)
        self._initial_step()
        vars(optimizer).setdefault("_lr_schedulers", Made())[self._met.order] = self

    def _prepare(self) -> None:
        """Write into the param groups what a class needs at the start of a run; all has been
        checked."""

    def _initial_step(self) -> None:
        self._step_count = 0
        self._is_initial = True
        if not is_altered(self):
            self._reset()
        try:
            self.step()
        finally:
            self._is_initial = False

    def _reset(self) -> None:
        """Know nothing of earlier steps."""
        self._last_lr = self._left = list(self.base_lrs)

    def step(self, epoch: int | None = None) -> None:
        """Go on to the next step; with `epoch`, which torch deprecates, to that one."""
        if torch.compiler.is_compiling():
            return _step_outside_graphs(self, epoch)
        if epoch is not None or self._step_count == 1:
            _check_step(self, epoch)
        self._step_count += 1
        return self._update_lr(epoch)

    def _update_lr(self, epoch: int | None = None) -> None:
        if is_same(self) and (epoch is None or not has_new_closed_form(self)):
            return self._move(epoch)
        return update_as_torch(self, epoch)

    def _move(self, epoch: int | None) -> None:
        """Compute all that the step changes, and only then change it."""
        if len(self.optimizer.param_groups) != len(self.base_lrs):
            self._adopt()
        before = self.last_epoch
        self.last_epoch = before + 1 if epoch is None else epoch
        try:
            values = self._rates()
            if self._is_initial and self._resumed and epoch is None:
                values = self._kept(values)
            self._write(values, plain=self._is_untouched())
        except BaseException:
            self.last_epoch = before
            raise

    def _rates(self) -> list[Value]:
        """The lr of each group at `last_epoch`."""
        return self.get_lr()

    def _rates_before(self) -> list[Value]:
        """The lr of each group one step earlier."""
        self.last_epoch -= 1
        try:
            return self._rates()
        finally:
            self.last_epoch += 1

    def _kept(self, values: list[Value]) -> list[Value]:
        """Return the rates to begin with in the middle of a schedule.

        They are these values, but for groups whose lr somebody has set.
        """
        groups = self.optimizer.param_groups
        strange = [
            not self._is_fresh(i) and not self._is_at(i, value) for i, value in enumerate(values)
        ]
        if any(strange):
            earlier = self._rates_before()
            strange = [
                bad and not self._is_at(i, earlier[i]) and not self._replaces(i)
                for i, bad in enumerate(strange)
            ]
        self._moved = [not bad for bad in strange]
        return [
            group["lr"] if bad else value
            for group, value, bad in zip(groups, values, strange, strict=True)
        ]

    def _is_fresh(self, index: int) -> bool:
        """Whether a group has the lr that it began with."""
        group = self.optimizer.param_groups[index]
        return is_near(group["lr"], group["initial_lr"])

    def _is_at(self, index: int, value: Value) -> bool:
        """Whether a group has the lr that the formula gives."""
        return is_near(self.optimizer.param_groups[index]["lr"], value, self.base_lrs[index])

    def _replaces(self, index: int) -> bool:
        """Whether a group's lr is what a living scheduler of this class has left there.

        That one has got other numbers, and this one takes its place.
        """
        lr = self.optimizer.param_groups[index]["lr"]
        return any(s._has_left(index, lr) for s in self._others() if type(s) is type(self))

    def _others(self) -> list[LRScheduler]:
        return [s for s in vars(self.optimizer).get("_lr_schedulers", {}).values() if s is not self]

    def _has_left(self, index: int, lr: Value) -> bool:
        return index < len(self._last_lr) and equals(lr, self._last_lr[index])

    def _is_untouched(self) -> bool:
        """Whether every lr is the very number that this scheduler has left there, and so not a
        tensor."""
        return all(map(is_, map(LR, self.optimizer.param_groups), self._last_lr))

    def _write(self, values: list[Value], plain: bool) -> None:
        groups = self.optimizer.param_groups
        if len(values) != len(groups):
            check_length(self, values)
        if (plain and type(values[0]) is float) or (
            are_floats(values) and are_floats(map(LR, groups))
        ):
            if not plain or values != self._last_lr:
                deque(map(setitem, groups, repeat("lr"), values), maxlen=0)
                self._last_lr = self._left = list(values)
        else:
            deque(map(assign, groups, repeat("lr"), values), maxlen=0)
            self._last_lr = self._left = rates(self.optimizer)

    def _adopt(self, is_new: bool = False) -> None:
        """Take in param groups that are new, each with the lr that it came with."""
        groups, handed_on = self.optimizer.param_groups, self._onepass.home.handed_on
        known = 0 if is_new else len(self.base_lrs)
        if len(groups) < known:
            raise ValueError(
                f"{type(self).__name__} was made for {known} param groups, and finds {len(groups)}."
            )
        for index, group in enumerate(groups[known:], known):
            if self._resumed and not known and "initial_lr" not in group:
                raise KeyError(
                    f"param_groups[{index}] has no 'initial_lr', from which "
                    f"last_epoch={self.last_epoch} resumes: load the optimizer's checkpoint "
                    "first, or leave last_epoch out."
                )
            missing = [
                name for name in handed_on if known and name in groups[0] and name not in group
            ]
            group.update(
                {name: shared(name, [other[name] for other in groups[:known]]) for name in missing}
            )
            group.setdefault("initial_lr", copied(group["lr"]))
            if known:
                vars(self).get("_last_lr", []).append(None)
        base_lrs = [copied(group["initial_lr"]) for group in groups[known:]]
        if is_new:
            self.base_lrs = base_lrs
        elif base_lrs:
            self.base_lrs.extend(base_lrs)

    def _enter(self, step: int) -> None:
        """Begin at a step, on top of what other schedulers have made of the learning rates."""
        self._update_lr(step)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs, in torch's form: numbers and lists of them, no function."""
        state = {key: value for key, value in vars(self).items() if key not in UNSAVED}
        # Torch's, should it load this, carries both along, and moves only `_last_lr` on.
        state["_found"] = {
            "after": vars(self).get("_last_lr", []),
            "lr": list(map(LR, self.optimizer.param_groups)),
        }
        return copied_lists(state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where a scheduler of this class stood, or torch's.

        A group whose lr is the one that this scheduler has left there gets the lr of the
        checkpoint. So it does not matter whether the optimizer's checkpoint is loaded before or
        after. Raises KeyError for a state dict of another class.
        """
        self._onepass.home._check(self, state_dict)
        state, groups = copied_lists(state_dict), self.optimizer.param_groups
        lrs, found = state.get("_last_lr", []), state.pop("_found", {})
        if found.get("after") == lrs:
            lrs = found["lr"]
        else:  # torch's
            for name in ("_own", "_known", "_known_lrs", "_known_step"):
                state.pop(name, None)
        mine = vars(self).get("_last_lr", [])
        untouched = [equals(group["lr"], left) for group, left in zip(groups, mine, strict=False)]
        self._onepass.home._restore(self, state)
        self._left = None if is_altered(self) else self._last_lr
        for group, still, lr in zip(groups, untouched, lrs, strict=False):
            if still:
                assign(group, "lr", lr)

    def _restore(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def _check(self, state_dict: Mapping[str, Any]) -> None:
        """Refuse another class's state dict, before anything has changed.

        Users' classes save what they like.
        """
        if not is_ours(type(self)):
            return
        known = {
            *vars(self),
            "base_lrs",
            "last_epoch",
            "verbose",
            "anneal_func",
        }  # the last two: of earlier torchs
        missing = [name for name in self.options if name not in state_dict]
        foreign = [
            name
            for name in state_dict
            if self.options and not name.startswith("_") and name not in known
        ]
        if missing or foreign:
            what = f"lacks {', '.join(missing)}" if missing else f"has {', '.join(foreign)}"
            raise KeyError(
                f"the state dict {what}: it is not one of a {type(self).__name__}; load that of "
                "its own class."
            )


LRScheduler._onepass = House(LRScheduler)
UNSAVED = ("optimizer", "_foreign", "_left", "_met", "_moved", "_resumed", "_versions")


def note_steps(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer note that it has stepped: by a hook, or as torch does if its step has no
    hooks."""
    attributes = vars(optimizer)
    hooked = getattr(type(optimizer).step, "hooked", False) and "step" not in attributes
    if hooked and "_optimizer_step_post_hooks" in attributes:
        optimizer.register_step_post_hook(
            lambda stepped, *_: vars(stepped).update(_opt_called=True)
        )
        return
    # Without a circle of references, in which the optimizer would outlive its last user.
    given = optimizer.step
    function, reference = getattr(given, "__func__", None), ref(optimizer)
    bound = given if function is None else None

    def stepped(*args: Any, **kwargs: Any) -> Any:
        known = reference()
        vars(known)["_opt_called"] = True
        return function(known, *args, **kwargs) if bound is None else bound(*args, **kwargs)  # pyright: ignore[reportOptionalCall]

    update_wrapper(stepped, given)
    del vars(stepped)["__wrapped__"], given
    vars(stepped)["_wrapped_by_lr_sched"] = True  # as torch marks it
    optimizer.step = stepped


def _is_replaced(optimizer: torch.optim.Optimizer) -> bool:
    """Whether somebody has put another step into an optimizer after its first scheduler was
    made."""
    return "step" in vars(optimizer) and not hasattr(optimizer.step, "_wrapped_by_lr_sched")


def _check_step(scheduler: LRScheduler, epoch: int | None) -> None:
    altered = is_altered(scheduler)
    if scheduler._step_count == 1 and not vars(scheduler.optimizer).get("_opt_called", True):
        said = REPLACED if _is_replaced(scheduler.optimizer) else EARLY
        warnings.warn(f"{said} See more details at {HOW}", UserWarning, stacklevel=3)
    if epoch is not None:
        warn_of_epoch(stacklevel=4)
        if epoch < 0 and not altered:
            raise ValueError(f"{type(scheduler).__name__}: expected a step from 0 on, got {epoch}.")


def _step_eagerly(scheduler: LRScheduler, epoch: int | None) -> None:
    _check_step(scheduler, epoch)
    scheduler._step_count += 1
    scheduler._update_lr(epoch)


# It imports torch's compiler when first called, which inside a compiled function has happened
# already.
_step_outside_graphs = torch._disable_dynamo(
    lambda scheduler, epoch: _step_eagerly(scheduler, epoch)
)
