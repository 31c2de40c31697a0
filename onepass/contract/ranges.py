"""What an option may be, as data that stand in an algorithm's class.

`"[0, 1)"` is a number from 0 to less than 1. A tuple of these, as `("[0, 1)", "[0, 1)")`, is as
many numbers in an order. The classes here say what else there is, and how torch words its error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from .values import as_number, brief, entries_of, has_entries, number_for

__all__ = ["Choice", "Entries", "Number", "Whole", "check_ranges"]

# How torch begins its messages about a number; people match on it.
TORCHS_WORDS = {
    "lr": "Invalid learning rate",
    "eps": "Invalid epsilon value",
    "betas[0]": "Invalid beta parameter at index 0",
    "betas[1]": "Invalid beta parameter at index 1",
}
# An end of an interval, as it is written.
END = r"-?inf|-?[\d.]+(?:e-?\d+)?"
# How messages say the number of entries; larger ones are said in digits.
COUNTS = {2: "two", 3: "three"}


class Interval(NamedTuple):
    """The numbers between two ends, and whether each end is one of them."""

    low: float
    high: float
    has_low: bool
    has_high: bool

    def contains(self, value: float) -> bool:
        """Whether a number lies here; NaN lies nowhere."""
        is_above = self.low < value or (self.has_low and value == self.low)
        is_below = value < self.high or (self.has_high and value == self.high)
        return is_above and is_below


@cache
def parse(text: str) -> Interval:
    """Read an interval, as "[0, 1)": a square bracket says that the end belongs to it."""
    found = re.fullmatch(rf"([\[(])({END}), ({END})([\])])", text)
    if found is None:
        raise ValueError(f"{text!r} is not an interval; write one as '[0, 1)' or '(0, inf]'")
    opening, low, high, closing = found.groups()
    return Interval(float(low), float(high), opening == "[", closing == "]")


@dataclass(frozen=True)
class Number:
    """A number, or a tensor of one element, in an interval.

    `words` begin the message about a number outside of it, if torch has unusual ones. With
    `or_none`, None is allowed as well.
    """

    interval: str
    words: str = ""
    or_none: bool = False

    def check(self, owner: str, name: str, value: Any) -> None:
        """Raise TypeError for a value that is not a number, ValueError for one outside."""
        if value is None and self.or_none:
            return
        found = _read(owner, name, value)
        if parse(self.interval).contains(found):
            return
        words = self.words or TORCHS_WORDS.get(name, f"Invalid {name} value")
        shown = brief(value) if isinstance(value, (int, float)) else f"{found}"
        raise ValueError(f"{owner}: {words}: {shown}; {name} must lie in {self.interval}")


class Whole(Number):
    """A whole number in an interval: 3, and 3.0 as well."""

    def check(self, owner: str, name: str, value: Any) -> None:
        """Raise as `Number` does, and ValueError for a fraction."""
        super().check(owner, name, value)
        if float(value) % 1 != 0:
            raise ValueError(f"{owner}: {name} must be a whole number, got {brief(value)}")


class Entries:
    """Several numbers in an order: a tuple, a list, or what has entries as these do.

    Each entry is an interval or a `Number`. `error` is raised for a value that has no entries in an
    order.
    """

    def __init__(self, *entries: str | Number, error: type[Exception] = TypeError) -> None:
        self._entries = [Number(entry) if isinstance(entry, str) else entry for entry in entries]
        self._error = error

    def check(self, owner: str, name: str, value: Any) -> None:
        """Raise `error` for a value without an order, ValueError for a wrong number of entries, and
        what `Number` raises for an entry."""
        count = len(self._entries)
        message = f"{owner}: {name} must be {COUNTS.get(count, count)} numbers, got {brief(value)}"
        if not has_entries(value):
            raise self._error(message)
        found = entries_of(value, count)
        if found is None:
            raise ValueError(message)
        for i, (entry, allowed) in enumerate(zip(found, self._entries, strict=True)):
            allowed.check(owner, f"{name}[{i}]", entry)


class Choice:
    """One of several words, or None.

    `words` are torch's about another word, with {} in its place; `error` is raised for it.
    """

    def __init__(self, *choices: str, error: type[Exception] = ValueError, words: str = "") -> None:
        self._choices = choices
        self._error = error
        self._words = words

    def check(self, owner: str, name: str, value: Any) -> None:
        """Raise `error` for anything else."""
        is_text = isinstance(value, str)
        if value is None or (is_text and value in self._choices):
            return
        shown = brief(value)
        what = name
        if self._words and is_text:
            unquoted = shown[1:-1]
            what = f"{self._words.format(unquoted)}; {name}"
        choices = ", ".join(map(repr, self._choices))
        raise self._error(f"{owner}: {what} must be {choices} or None, got {shown}")


def check_ranges(owner: str, ranges: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raise for the first option that is not what a class's `ranges` say of it."""
    for name, allowed in ranges.items():
        _requirement(owner, name, allowed).check(owner, name, options[name])


def _requirement(owner: str, name: str, allowed: Any) -> Number | Entries | Choice:
    """What an entry of `ranges` says, which may be written as an interval or a tuple of them."""
    if isinstance(allowed, str):
        return Number(allowed)
    if isinstance(allowed, tuple) and all(isinstance(entry, str) for entry in allowed):
        return Entries(*allowed)
    if isinstance(allowed, (Number, Entries, Choice)):
        return allowed
    raise TypeError(
        f"{owner}: ranges[{name!r}] must be an interval such as '[0, 1)', or a tuple of these, got "
        f"{brief(allowed)}"
    )


def _read(owner: str, name: str, value: Any) -> float:
    """Return an option's number; raise ValueError or TypeError for a value that has none."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(
            f"{owner}: Tensor {name} must be 1-element, got shape {tuple(value.shape)}"
        )
    found = None if isinstance(value, (bool, np.bool_)) else as_number(value)
    if found is not None:
        return found
    if isinstance(value, int) and not isinstance(value, bool):
        # It is larger than any float.
        raise ValueError(f"{owner}: {name} must be {number_for(value)}, got {brief(value)}")
    raise TypeError(f"{owner}: {name} must be a number, got {brief(value)}")
