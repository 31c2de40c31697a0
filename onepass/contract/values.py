"""Numbers, flags and rows as options hold them, in all the forms in which people give them."""

from __future__ import annotations

from collections.abc import Mapping, Set
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

Group = dict[str, Any]
State = dict[str, Any]


class StepError(RuntimeError):
    """A step that cannot be taken; nothing has been changed."""


def as_number(value: object) -> float | None:
    """A real number as a float, of a tensor or an array its only element; None for all else, what
    is too large too."""
    kind = type(value)
    if kind is float:
        return value  # type: ignore[return-value]
    try:
        if kind is int:
            return float(value)  # type: ignore[arg-type]
        if isinstance(value, np.ndarray) and value.size == 1:
            value, kind = value.item(), type(value.item())
        if isinstance(value, Tensor):
            return None if value.is_complex() or value.numel() != 1 else float(value.detach())
        # Python makes numbers of text, and NumPy real ones of complex ones.
        if isinstance(value, (str, bytes, complex, np.complexfloating)):
            return None
        return float(value) if hasattr(kind, "__float__") or hasattr(kind, "__index__") else None  # type: ignore[arg-type]
    except Exception:
        return None


def as_flag(value: object) -> bool | None:
    """True or False, also given as 1 or 0; None for all else."""
    if isinstance(value, (bool, np.bool_)) or (
        isinstance(value, (int, np.integer)) and value in (0, 1)
    ):
        return bool(value)
    return None


def has_entries(value: object) -> bool:
    """Whether an option is several values in an order: a tuple, a list, or what has entries as
    these do."""
    if isinstance(value, (tuple, list)):
        return True
    if isinstance(value, np.ndarray):
        return value.ndim > 0 and len(value) != 1
    if isinstance(value, Tensor):
        return value.layout == torch.strided and value.ndim > 0 and len(value) != 1
    kind = type(value)
    unordered = isinstance(value, (str, bytes, bytearray, memoryview, Mapping, Set))
    return hasattr(kind, "__getitem__") and hasattr(kind, "__len__") and not unordered


def entries_of(value: Any, count: int) -> list[Any] | None:
    """The entries of an option that is so many values in an order; None where it is not."""
    try:
        return (
            [value[i] for i in range(count)] if has_entries(value) and len(value) == count else None
        )
    except Exception:
        return None


def number(value: object, name: str) -> float:
    """A hyper-parameter as a float; tensors of one element are read."""
    if type(value) is float:
        return value
    found = as_number(value)
    if found is None:
        raise StepError(
            f"param group option {name!r} must be {number_for(value)}, got {brief(value)}"
        )
    return found


def number_for(value: object) -> str:
    """What should have been there in the place of a value that is not a number."""
    return "a number that a float can hold" if isinstance(value, int) else "a number"


def flag(value: object, name: str) -> bool:
    """An option that is True or False; None, as in torch, is False."""
    if type(value) is bool:
        return value
    found = False if value is None else as_flag(value)
    if found is None:
        raise StepError(f"param group option {name!r} must be True or False, got {brief(value)}")
    return found


def check_kinds(
    group: Mapping[str, Any],
    like: Mapping[str, Any],
    what: str = "",
    error: type[Exception] = StepError,
) -> None:
    """Raise for an option that is not a number, not a flag, or not so many numbers, where an
    example of it is."""
    for name, example in like.items():
        value, wanted = group.get(name, example), ""
        if has_entries(example):
            pairs = zip(entries_of(value, len(example)) or (), example, strict=False)
            fits = [
                as_number(entry) is not None or (entry is None and e is None) for entry, e in pairs
            ]
            wanted = "" if fits and all(fits) else f"{len(example)} numbers"
        elif isinstance(example, bool):
            wanted = "" if value is None or as_flag(value) is not None else "True or False"
        elif isinstance(example, (int, float)) and as_number(value) is None:
            wanted = number_for(value)
        if wanted:
            raise error(f"{what}param group option {name!r} must be {wanted}, got {brief(value)}")


def pick(group: Mapping[str, Any], key: str, i: int | None) -> Any:
    """A group's option, or its entry i where it is a tuple."""
    if key not in group:
        raise StepError(f"param group has no option {key!r}, which the rule needs; set it")
    if i is None:
        return group[key]
    try:
        return group[key][i]
    except Exception:
        raise StepError(
            f"param group option {key!r} must have an entry {i}, got {brief(group[key])}"
        ) from None


def brief(value: object) -> str:
    """A value in a few words and one line."""
    if isinstance(value, Tensor):
        place = " on meta" if value.is_meta else ""
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}{place}"
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape} and {value.dtype}"
    if isinstance(value, (str, bytes, int, float, complex, tuple, list, type(None))):
        # What lies in a tuple may not have a text, and the largest numbers have none.
        with suppress(Exception):
            return f"{value!r:.60}".replace("\n", " ")
    return f"a {torch.typename(value)}"
