"""Options of an optimizer: torch's modes, switches, and what an option becomes in a state.

Each failure is one sentence, raised before anything has changed. What numbers may be: `ranges`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import kernel
from .mistakes import arguments_of
from .values import as_flag, as_number, brief, entries_of, number

__all__ = [
    "MODES",
    "as_tuple",
    "check_modes",
    "check_switches",
    "filled",
    "has_numbers_on_device",
    "is_positive",
    "is_zero",
    "switches_of",
    "unless_off",
]

# The options that choose a program or a backend, whatever the algorithm.
MODES = ("maximize", "foreach", "fused", "differentiable", "capturable")


def switches_of(cls: type) -> tuple[str, ...]:
    """Return the names of the arguments whose default is True or False, modes left out.

    They are those of the class's own constructor and of inherited ones.
    """
    # The keys of a dict: each name once, in the order in which it was found.
    found: dict[str, None] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        for name, default in arguments_of(base).items():
            if isinstance(default, bool) and name not in MODES:
                found[name] = None
    return tuple(found)


def check_switches(owner: str, options: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise TypeError for an option that should be True or False, and is neither.

    None is allowed, as for torch's modes.
    """
    for name in names:
        value = options.get(name)
        if value is not None and as_flag(value) is None:
            raise TypeError(f"{owner}: {name} must be True or False, got {brief(value)}")


def check_modes(owner: str, options: Mapping[str, Any]) -> None:
    """Raise RuntimeError for two of torch's modes that exclude each other."""
    if not options.get("fused"):
        return
    if options.get("differentiable"):
        raise RuntimeError(
            f"{owner}: `fused` does not support `differentiable`; leave one of them out"
        )
    if options.get("foreach"):
        raise RuntimeError(
            f"{owner}: `fused` and `foreach` cannot be `True` together; neither is needed here"
        )


def has_numbers_on_device(options: Mapping[str, Any], device: torch.device) -> bool:
    """Whether a parameter's numbers, such as its step count, lie on its device.

    As in torch, they do for a step that a graph may capture, and for a fused one on a device.
    """
    if options.get("capturable"):
        return True
    return bool(options.get("fused")) and not kernel.on_host(device)


def as_tuple(value: Any) -> Any:
    """Return two entries in an order as a tuple, for example those of a configuration's list.

    Anything else is returned as it is: `[0.9, 0.99]` gives `(0.9, 0.99)`, and 0.9 gives 0.9.
    """
    entries = entries_of(value, 2)
    return value if entries is None else tuple(entries)


def unless_off(**switches: Any) -> dict[str, Any]:
    """Return the switches that are not off: for options that torch does not have.

    While they are off, param groups have torch's keys and no others: `capturable=False` gives `{}`,
    `capturable=True` gives `{"capturable": True}`.
    """
    return {
        name: value
        for name, value in switches.items()
        if value is not None and as_flag(value) is not False
    }


def is_zero(value: Any) -> bool:
    """Whether an option is 0. A value on a device is not read, and does not count as 0."""
    if type(value) is float or type(value) is int:
        return value == 0
    if isinstance(value, Tensor) and not kernel.on_host(value.device):
        return False
    return as_number(value) == 0


def is_positive(value: Any, name: str) -> bool:
    """Whether an option is above 0. Raises `StepError` for a value that is not a number."""
    if isinstance(value, Tensor) and value.numel() == 1:
        is_on_device = not (value.is_meta or kernel.on_host(value.device))
        if is_on_device:
            return bool(value > 0)
    return number(value, name) > 0


def filled(like: Tensor, value: Any, name: str) -> Tensor:
    """Return a tensor like `like` with one value everywhere, in both parts if it is complex.

    `name` is the option that `value` comes from. A value that lies on the tensor's device is not
    read by the host.
    """
    is_there = (
        isinstance(value, Tensor)
        and kernel.is_plain(like)
        and value.device == like.device
        and value.numel() == 1
    )
    if is_there and not kernel.on_host(value.device):
        value = value.detach().reshape(())
    else:
        value = number(value, name)
    result = torch.empty_like(like)
    parts = torch.view_as_real(result) if result.is_complex() else result
    parts.fill_(value)
    return result
