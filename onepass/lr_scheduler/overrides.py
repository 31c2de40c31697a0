"""Methods that people put in the place of torch's.

A scheduler that has such a method runs as torch's class does.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from types import MethodDescriptorType, WrapperDescriptorType
from typing import Any

from torch import Tensor
from torch.optim import lr_scheduler as torch_schedulers

from .values import Value, assign, rates

__all__ = [
    "House",
    "check_length",
    "has_new_closed_form",
    "is_altered",
    "is_ours",
    "is_same",
    "update_as_torch",
]

PACKAGE = __name__.rpartition(".")[0] + "."
ANYWHERE = {
    "get_last_lr",
    "load_state_dict",
    "print_lr",
    "state_dict",
}  # are called where torch calls them
PYTHONS = (MethodDescriptorType, WrapperDescriptorType)


def is_ours(cls: type) -> bool:
    """Whether a class is of this package."""
    return cls.__module__.startswith(PACKAGE)


def _methods(classes: list[type]) -> set[str]:
    """The methods, properties and functions that classes define."""
    found = {name for cls in classes for name, value in vars(cls).items() if _is_method(value)}
    return {name for name in found if not name.startswith("__")}


def _is_method(value: Any) -> bool:
    if isinstance(value, PYTHONS):
        return False
    return callable(value) or isinstance(value, (property, staticmethod, classmethod))


def _nothing(scheduler: Any) -> tuple[()]:
    return ()


class House:
    """A class of this package, and what its methods are when nobody has replaced any.

    `names` are the methods of torch's class that make the learning rates. `taken` are the names of
    ours. If somebody uses such a name for something else, their scheduler runs as torch's class,
    which does not know the name.
    """

    def __init__(self, cls: type) -> None:
        classes = [c for c in cls.__mro__ if c.__module__.startswith("torch.")]
        names = _methods(classes) - ANYWHERE
        if (
            getattr(cls, "get_lr", None) is torch_schedulers.LRScheduler.get_lr
        ):  # no formula of torch's to fall back to
            names = {"get_lr"}
        self.home: Any = cls
        self.names = names
        self.look = attrgetter("get_lr", *sorted(names))
        self.found: tuple[Any, ...] | None = self.look(cls)
        self.formula = self.found[0]
        self.read_options = attrgetter(*cls.options) if cls.options else _nothing
        ours = [c for c in cls.__mro__ if is_ours(c)]
        self.taken = (_methods(ours) - _methods(classes)) | {"handed_on", "options"}
        self.watched = sorted(
            name for name in names | self.taken if not isinstance(getattr(cls, name), property)
        )

    def for_subclass(self, cls: type) -> House:
        """Return the house of a user's subclass: another one if a name of ours has a meaning of its
        own there."""
        owners = {
            name: next((c for c in cls.__mro__ if name in vars(c)), None) for name in self.taken
        }
        if all(owner is None or is_ours(owner) for owner in owners.values()):
            return self
        other = object.__new__(House)
        vars(other).update(vars(self), found=None, formula=None)
        return other


def is_altered(scheduler: Any) -> bool:
    """Whether a method that makes the learning rates is not ours, but a user's.

    It may be of a subclass, of a mixin or of this one object. All are looked up at construction and
    at the first step. Later steps look only whether `get_lr` is the same.
    """
    house, cls = scheduler._onepass, type(scheduler)
    altered = house.look(cls) != house.found or any(
        _is_hidden(scheduler, cls, name) for name in house.watched
    )
    scheduler._foreign = altered
    return altered


def _is_hidden(scheduler: Any, cls: type, name: str) -> bool:
    """Whether an attribute of the object stands before the one of its class.

    `vars(scheduler)` would tell, too, and would make all other attributes slower.
    """
    seen, known = getattr(scheduler, name), getattr(cls, name)
    return getattr(seen, "__func__", seen) is not getattr(known, "__func__", known)


def is_same(scheduler: Any) -> bool:
    """As `not is_altered`, for every step."""
    try:
        if not scheduler._foreign and scheduler.get_lr.__func__ is scheduler._onepass.formula:
            return True
    except AttributeError:  # no method, but another function
        pass
    return not is_altered(scheduler)


def has_new_closed_form(scheduler: Any) -> bool:
    """Whether people's class has a closed form where torch's has none."""
    return "_get_closed_form_lr" not in scheduler._onepass.names and hasattr(
        scheduler, "_get_closed_form_lr"
    )


def update_as_torch(scheduler: Any, epoch: int | None) -> None:
    """Take a step as torch's base class does.

    It asks `get_lr`, or for a step by its number `_get_closed_form_lr`, if there is such a method.
    """
    if isinstance(vars(scheduler).get("base_lrs"), list):
        scheduler._onepass.home._adopt(scheduler)
    before = scheduler.last_epoch
    scheduler.last_epoch = before + 1 if epoch is None else epoch
    scheduler._get_lr_called_within_step = True
    try:
        closed = epoch is not None and hasattr(scheduler, "_get_closed_form_lr")
        values = list(scheduler._get_closed_form_lr() if closed else scheduler.get_lr())
        check_length(scheduler, values)
    except BaseException:
        scheduler.last_epoch = before
        raise
    finally:
        scheduler._get_lr_called_within_step = False
    for group, value in zip(scheduler.optimizer.param_groups, values, strict=True):
        if isinstance(group["lr"], Tensor):
            assign(group, "lr", value)
        else:
            group["lr"] = value
    scheduler._last_lr = rates(scheduler.optimizer)


def check_length(scheduler: Any, values: Sequence[Value]) -> None:
    """Raise ValueError unless there is a value for each param group."""
    name, count = type(scheduler).__name__, len(scheduler.optimizer.param_groups)
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} learning rates for {count} param groups.")
