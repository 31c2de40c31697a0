"""What the options of an optimizer may be. Each failure is one sentence, raised before anything has
changed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import kernel
from .mistakes import arguments_of
from .values import as_flag, as_number, brief, entries_of, flag, is_row, number, number_for, pick

__all__ = [
    "AT_LEAST_0",
    "MODES",
    "as_tuple",
    "brief",
    "check_betas",
    "check_choice",
    "check_count",
    "check_modes",
    "check_number",
    "check_row",
    "check_switches",
    "filled",
    "flag",
    "has_numbers_on_device",
    "is_off",
    "is_positive",
    "is_zero",
    "pick",
    "switches_of",
]

COUNTS = {2: "two", 3: "three"}
# How torch begins its messages about a number; people match on it.
WORDS = {
    "lr": "Invalid learning rate",
    "eps": "Invalid epsilon value",
    "betas[0]": "Invalid beta parameter at index 0",
    "betas[1]": "Invalid beta parameter at index 1",
}
AT_LEAST_0 = "{} should be >= 0 but is"


def check_number(
    owner: str,
    name: str,
    value: Any,
    low: float = 0.0,
    below: float | None = None,
    up_to: float = math.inf,
    words: str = "",
) -> None:
    """Raise ValueError unless a number, or a tensor of one element, lies in [low, up_to], and is
    less than `below`.

    TypeError for what is not a number. `words` are torch's about a number outside, where they are
    unusual.
    """
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(
            f"{owner}: Tensor {name} must be 1-element, got shape {tuple(value.shape)}"
        )
    found = None if isinstance(value, (bool, np.bool_)) else as_number(value)
    if found is None:
        error = ValueError if isinstance(value, int) and not isinstance(value, bool) else TypeError
        wanted = number_for(value) if error is ValueError else "a number"
        raise error(f"{owner}: {name} must be {wanted}, got {brief(value)}")
    if not low <= found <= up_to or (below is not None and found >= below):
        allowed = f"[{low:g}, {up_to:g}]" if below is None else f"[{low:g}, {below:g})"
        got = brief(value) if isinstance(value, (int, float)) else f"{found}"
        words = words or WORDS.get(name, f"Invalid {name} value")
        raise ValueError(f"{owner}: {words}: {got}; {name} must lie in {allowed}")


def check_count(owner: str, name: str, value: Any, low: int = 1, below: int | None = None) -> None:
    """Raise ValueError unless `value` is a whole number, of at least `low` and less than
    `below`."""
    check_number(owner, name, value, low=low, below=below)
    if float(value) % 1 != 0:
        raise ValueError(f"{owner}: {name} must be a whole number, got {brief(value)}")


def check_choice(
    owner: str,
    name: str,
    value: Any,
    choices: Sequence[str],
    error: type[Exception] = ValueError,
    words: str = "",
) -> None:
    """Raise unless `value` is one of these, or None. `words` are torch's about another one."""
    if value is not None and not (isinstance(value, str) and value in choices):
        got = brief(value)
        what = f"{words.format(got[1:-1])}; {name}" if words and isinstance(value, str) else name
        raise error(f"{owner}: {what} must be {', '.join(map(repr, choices))} or None, got {got}")


def check_row(
    owner: str,
    name: str,
    value: Any,
    count: int,
    low: float = -math.inf,
    below: float | None = None,
    first: Any = (),
    error: type[Exception] = TypeError,
    words: Sequence[str] = ("", "", ""),
) -> None:
    """Raise `error` unless `value` has entries in an order, ValueError unless they are `count`
    numbers in a range.

    The first entry may be `first`, which is not a number. `words` has those of `check_number` for
    each entry.
    """
    message = f"{owner}: {name} must be {COUNTS[count]} numbers, got {brief(value)}"
    if not is_row(value):
        raise error(message)
    entries = entries_of(value, count)
    if entries is None:
        raise ValueError(message)
    for i, entry in enumerate(entries):
        if i or entry is not first:
            check_number(owner, f"{name}[{i}]", entry, low, below, words=words[i])


def as_tuple(value: Any) -> Any:
    """Two entries in an order, as of a list of a configuration library, as a tuple; anything else
    as it is."""
    entries = entries_of(value, 2)
    return value if entries is None else tuple(entries)


def check_betas(owner: str, betas: Any) -> None:
    """Raise ValueError unless `betas` are two numbers in [0, 1)."""
    check_row(owner, "betas", betas, 2, 0.0, 1.0)


def check_switches(owner: str, options: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise TypeError for an option that should be True or False (or None, for torch's modes) and
    is neither."""
    for name in names:
        value = options.get(name)
        if value is not None and as_flag(value) is None:
            raise TypeError(f"{owner}: {name} must be True or False, got {brief(value)}")


def filled(like: Tensor, value: Any, name: str) -> Tensor:
    """A tensor like another with one value everywhere, of complex numbers in both parts; `name` is
    the value's option.

    A value that lies on the tensor's device is not read by the host.
    """
    stays = isinstance(value, Tensor) and type(like) in kernel.PLAIN and value.device == like.device
    if stays and not kernel.on_host(value.device) and value.numel() == 1:
        value = value.detach().reshape(())
    else:
        value = number(value, name)
    new = torch.empty_like(like)
    (torch.view_as_real(new) if new.is_complex() else new).fill_(value)
    return new


def has_numbers_on_device(options: Mapping[str, Any], device: torch.device) -> bool:
    """Whether a parameter's numbers, as its step count, lie on its device: as in torch, where a
    step may be captured in a graph, or is fused."""
    return bool(options.get("capturable")) or (
        bool(options.get("fused")) and not kernel.on_host(device)
    )


def is_zero(value: Any) -> bool:
    """Whether an option is 0; not, where it lies on a device, which then need not be asked."""
    if type(value) is float or type(value) is int:
        return value == 0
    return (
        not (isinstance(value, Tensor) and not kernel.on_host(value.device))
        and as_number(value) == 0
    )


def is_off(value: Any) -> bool:
    """Whether a flag is False, or not given; what is not a flag is not off."""
    return value is None or as_flag(value) is False


def is_positive(value: Any, name: str) -> bool:
    """Whether an option is a number above 0; raises `StepError` where it is not a number."""
    if (
        isinstance(value, Tensor)
        and value.numel() == 1
        and not (value.is_meta or kernel.on_host(value.device))
    ):
        return bool(value > 0)
    return number(value, name) > 0


def check_modes(owner: str, options: Mapping[str, Any]) -> None:
    """Raise RuntimeError for torch's modes where they exclude each other."""
    if options.get("fused") and options.get("differentiable"):
        raise RuntimeError(
            f"{owner}: `fused` does not support `differentiable`; leave one of them out"
        )
    if options.get("fused") and options.get("foreach"):
        raise RuntimeError(
            f"{owner}: `fused` and `foreach` cannot be `True` together; neither is needed here"
        )


# The options that choose a program or a backend, whatever the algorithm.
MODES = ("maximize", "foreach", "fused", "differentiable", "capturable")


def switches_of(cls: type) -> tuple[str, ...]:
    """The arguments whose default in a constructor, the class's own or an inherited one, is True or
    False."""
    found: list[str] = []
    for base in cls.__mro__:
        for name, default in arguments_of(base).items() if "__init__" in vars(base) else ():
            if isinstance(default, bool) and name not in MODES:
                found.append(name)
    return tuple(dict.fromkeys(found))
