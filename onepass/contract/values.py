"""Numbers, flags and entries as options hold them, in all the forms in which people give them."""

from __future__ import annotations

from collections.abc import Mapping, Set
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

Group = dict[str, Any]
State = dict[str, Any]

# Python makes numbers of text, and NumPy makes real numbers of complex ones.
NOT_REAL = (str, bytes, complex, np.complexfloating)
# These have a length, but no order in which numbers could stand.
WITHOUT_ORDER = (str, bytes, bytearray, memoryview, Mapping, Set)
# Values whose own text is shown in messages.
SHOWN = (str, bytes, int, float, complex, tuple, list, type(None))


class StepError(RuntimeError):
    """A step that cannot be taken; nothing has been changed."""


def as_number(value: object) -> float | None:
    """Return a real number as a float, or None for a value that is not one.

    Of a tensor or an array, it is the only element. A number that no float can hold gives None.

    Example: `3` and `torch.tensor([3])` give 3.0, and `True` gives 1.0; `"3"`, `3j`, `10**400`,
    `[3]` and `torch.zeros(2)` give None.
    """
    kind = type(value)
    if kind is float:
        return value  # type: ignore[return-value]
    try:
        if kind is int:
            return float(value)  # type: ignore[arg-type]
        if isinstance(value, np.ndarray) and value.size == 1:
            value = value.item()
            kind = type(value)
        if isinstance(value, Tensor):
            if value.is_complex() or value.numel() != 1:
                return None
            return float(value.detach())
        if isinstance(value, NOT_REAL):
            return None
        if hasattr(kind, "__float__") or hasattr(kind, "__index__"):
            return float(value)  # type: ignore[arg-type]
        return None
    except Exception:
        return None


def as_flag(value: object) -> bool | None:
    """Return True or False, which may be given as 1 or 0; None for anything else."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)) and value in (0, 1):
        return bool(value)
    return None


def has_entries(value: object) -> bool:
    """Whether an option is several values in an order.

    It is a tuple, a list, or anything else that has a length and entries by index.
    """
    if isinstance(value, (tuple, list)):
        return True
    if isinstance(value, np.ndarray):
        return value.ndim > 0 and len(value) != 1
    if isinstance(value, Tensor):
        return value.layout == torch.strided and value.ndim > 0 and len(value) != 1
    kind = type(value)
    is_sized = hasattr(kind, "__getitem__") and hasattr(kind, "__len__")
    return is_sized and not isinstance(value, WITHOUT_ORDER)


def entries_of(value: Any, count: int) -> list[Any] | None:
    """Return the entries of an option that is `count` values in an order, else None.

    Example: for a count of 2, `(0.9, 0.99)` and `np.array([0.9, 0.99])` give two entries each;
    `(0.9,)`, `0.9`, `"ab"` and `{0.9, 0.99}`, which has no order, give None.
    """
    try:
        if not has_entries(value) or len(value) != count:
            return None
        return [value[index] for index in range(count)]
    except Exception:
        return None


def number(value: object, name: str) -> float:
    """Return the option `name` as a float; raise `StepError` if it is not a number."""
    if type(value) is float:
        return value
    found = as_number(value)
    if found is None:
        wanted = number_for(value)
        raise StepError(f"param group option {name!r} must be {wanted}, got {brief(value)}")
    return found


def number_for(value: object) -> str:
    """Say what a message asks for instead of `value`, which `as_number` did not take."""
    return "a number that a float can hold" if isinstance(value, int) else "a number"


def flag(value: object, name: str) -> bool:
    """Return the option `name` as True or False; raise `StepError` if it is neither.

    None is False, as in torch.
    """
    if type(value) is bool:
        return value
    found = False if value is None else as_flag(value)
    if found is None:
        raise StepError(f"param group option {name!r} must be True or False, got {brief(value)}")
    return found


def check_kinds(
    group: Mapping[str, Any],
    examples: Mapping[str, Any],
    owner: str = "",
    error: type[Exception] = StepError,
) -> None:
    """Raise `error` for the first option of a group that is not what its example is.

    An example is one number, True or False, or several numbers in an order; any other allows
    everything. `owner` begins the message: whose param group it is.
    """
    for name, example in examples.items():
        value = group.get(name, example)
        wanted = _wanted(value, example)
        if wanted:
            raise error(f"{owner}param group option {name!r} must be {wanted}, got {brief(value)}")


def _wanted(value: Any, example: Any) -> str:
    """Return what an option should be that is not what its example is; "" if it is."""
    if has_entries(example):
        count = len(example)
        entries = entries_of(value, count)
        return "" if entries and _are_numbers(entries, example) else f"{count} numbers"
    if isinstance(example, bool):
        return "" if value is None or as_flag(value) is not None else "True or False"
    if isinstance(example, (int, float)) and as_number(value) is None:
        return number_for(value)
    return ""


def _are_numbers(entries: list[Any], examples: Any) -> bool:
    """Whether all entries are numbers, or None if their example is None."""
    for entry, example in zip(entries, examples, strict=False):
        is_unset = entry is None and example is None
        if not is_unset and as_number(entry) is None:
            return False
    return True


def pick(group: Mapping[str, Any], key: str, index: int | None) -> Any:
    """Return a group's option, or one of its entries if `index` is not None.

    Raises `StepError` if there is none.

    Example: of `{"lr": 0.1, "betas": (0.9, 0.99)}`, "lr" and None give 0.1; "betas" and 1 give
    0.99; "betas" and None give (0.9, 0.99). "eps" and None raise, as "betas" and 2 do.
    """
    if key not in group:
        raise StepError(f"param group has no option {key!r}, which the rule needs; set it")
    if index is None:
        return group[key]
    try:
        return group[key][index]
    except Exception:
        got = brief(group[key])
        raise StepError(
            f"param group option {key!r} must have an entry {index}, got {got}"
        ) from None


def brief(value: object) -> str:
    """Return a value in a few words, on one line.

    Example: `"a tensor of shape (2, 3) and torch.float32"`, `"(0.9, 0.99)"`, `"a set"`.
    """
    if isinstance(value, Tensor):
        device = " on meta" if value.is_meta else ""
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}{device}"
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape} and {value.dtype}"
    if isinstance(value, SHOWN):
        # An entry of a tuple may have no text, and the largest numbers have none.
        with suppress(Exception):
            return f"{value!r:.60}".replace("\n", " ")
    return f"a {torch.typename(value)}"


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, without the punctuation at its end."""
    message = str(error) or type(error).__name__
    return message.splitlines()[0].rstrip(" .:")
