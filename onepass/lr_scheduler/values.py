"""Numbers in param groups, floats or tensors: copied, compared and written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from ..schedule.formulas import Schedule

__all__ = [
    "LR",
    "Group",
    "Value",
    "are_floats",
    "assign",
    "copied",
    "copied_lists",
    "equals",
    "is_near",
    "number",
]
__all__ += ["per_group", "rates", "saved_attributes", "shared"]

Group = dict[str, Any]
Value = Any  # a float, or a tensor with one element
LR = itemgetter("lr")


def copied(value: Value) -> Value:
    """Return the same number in memory of its own."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone() if value.requires_grad else value.clone()


def copied_lists(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict whose lists of numbers, also those in dicts, are in memory of their
    own."""
    copies: dict[str, Any] = {}
    for key, value in state.items():
        copies[key] = list(map(copied, value)) if isinstance(value, list) else value
        if type(value) is dict:
            copies[key] = copied_lists(value)
    return copies


def number(value: Value) -> Value:
    """Return the number of a tensor, unless to read it would be to wait for a device."""
    return value.item() if isinstance(value, Tensor) and value.is_cpu else value


def assign(options: Any, key: Any, value: Value) -> None:
    """Set an option. A tensor stays the tensor that it is, and is filled.

    Steps that are compiled, or captured in a graph, read that tensor.
    """
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
    """Return the learning rates as they are now, in memory of their own."""
    lrs = list(map(LR, optimizer.param_groups))
    return lrs if are_floats(lrs) else list(map(copied, lrs))


def equals(lr: Value, value: Value) -> bool:
    """Whether a group's lr is a number, in the precision in which the group holds it."""
    if not isinstance(lr, Tensor):
        return bool(lr == value)
    if not isinstance(value, Tensor) or value.dtype != lr.dtype:
        value = torch.as_tensor(value, dtype=lr.dtype)
    return lr.item() == value.item()


def is_near(lr: Value, value: Value, scale: Value = 0.0) -> bool:
    """Whether a group's lr is a number but for rounding; what is tiny beside `scale` is 0."""
    if isinstance(lr, Tensor) and lr.is_meta:
        return True
    precision = (
        4 * torch.finfo(lr.dtype).eps if isinstance(lr, Tensor) and lr.is_floating_point() else 0.0
    )
    first, second, scale = (v.item() if isinstance(v, Tensor) else v for v in (lr, value, scale))
    return math.isclose(first, second, rel_tol=max(1e-9, precision), abs_tol=1e-12 * abs(scale))


def per_group(name: str, optimizer: torch.optim.Optimizer, value: Any) -> list[Any]:
    """Return one value for each param group: those of a list, anything else for all of them.

    `per_group("gamma", optimizer, 0.1)` of two groups is [0.1, 0.1]. Raises ValueError for a list
    of another length.
    """
    count = len(optimizer.param_groups)
    if not isinstance(value, (list, tuple)):
        return [copied(value) for _ in range(count)]
    if len(value) != count:
        raise ValueError(
            f"{name} must have the same length as optimizer.param_groups. {name} has {len(value)} "
            f"values, param_groups has {count}: give one for each, or one for all."
        )
    return list(map(copied, value))


def shared(name: str, values: Sequence[Value]) -> Value:
    """Return the value that all param groups have, for one that is new; ValueError if they
    differ."""
    if any(value != values[0] for value in values):
        raise ValueError(
            f"{name} differs from group to group: the new param group needs its own, under "
            f"{name!r}."
        )
    return copied(values[0])


def saved_attributes(function: Callable[..., Any] | None) -> dict[str, Any] | None:
    """Return the attributes of a callable object, which are saved with a scheduler's state.

    None stands for functions and schedules, which are the program's and not the run's.
    """
    plain = (
        function is None
        or isinstance(function, (FunctionType, Schedule))
        or not hasattr(function, "__dict__")
    )
    return None if plain else dict(vars(function))
