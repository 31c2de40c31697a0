"""What an option may be, as data in an algorithm's class.

`"[0, 1)"` is a number from 0 to less than 1. A tuple of intervals, as `("[0, 1)", "[0, 1)")`, is
this many numbers in an order. The classes here say what else there is, and how torch words its
error.

Example: with `ranges = {"lr": "[0, inf]"}`, an `lr` of 0 or 0.1 passes, and -1 raises "SGD: Invalid
learning rate: -1; lr must lie in [0, inf]".
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
    pattern = rf"([\[(])({END}), ({END})([\])])"
    found = re.fullmatch(pattern, text)
    if found is None:
        raise ValueError(f"{text!r} is not an interval; write one as '[0, 1)' or '(0, inf]'")
    opening, low, high, closing = found.groups()
    return Interval(
        low=float(low),
        high=float(high),
        has_low=opening == "[",
        has_high=closing == "]",
    )


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
        self._entries: list[Number] = []
        for entry in entries:
            allowed = Number(entry) if isinstance(entry, str) else entry
            self._entries.append(allowed)
        self._error = error

    def check(self, owner: str, name: str, value: Any) -> None:
        """Raise `error` for a value without an order, ValueError for a wrong number of entries.

        For an entry it raises what `Number` does.
        """
        count = len(self._entries)
        count_in_words = COUNTS.get(count, count)
        message = f"{owner}: {name} must be {count_in_words} numbers, got {brief(value)}"
        if not has_entries(value):
            raise self._error(message)
        found = entries_of(value, count)
        if found is None:
            raise ValueError(message)
        for index, allowed in enumerate(self._entries):
            allowed.check(owner, f"{name}[{index}]", found[index])


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
        subject = name
        if self._words and is_text:
            unquoted = shown[1:-1]
            subject = f"{self._words.format(unquoted)}; {name}"
        choices = ", ".join(map(repr, self._choices))
        raise self._error(f"{owner}: {subject} must be {choices} or None, got {shown}")


def check_ranges(owner: str, ranges: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raise ValueError or TypeError for the first option that is not what `ranges` says of it.

    `ranges` are those of a class, see `Optimizer.ranges`; `owner` is the class's name.
    """
    for name, allowed in ranges.items():
        _requirement(owner, name, allowed).check(owner, name, options[name])


def _requirement(owner: str, name: str, allowed: Any) -> Number | Entries | Choice:
    """Return what an entry of `ranges` says, which may be one interval or a tuple of them."""
    if isinstance(allowed, str):
        return Number(allowed)
    if isinstance(allowed, tuple):
        are_intervals = all(isinstance(entry, str) for entry in allowed)
        if are_intervals:
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
    is_flag = isinstance(value, (bool, np.bool_))
    found = None if is_flag else as_number(value)
    if found is not None:
        return found
    if isinstance(value, int) and not is_flag:
        # It is larger than any float.
        raise ValueError(f"{owner}: {name} must be {number_for(value)}, got {brief(value)}")
    raise TypeError(f"{owner}: {name} must be a number, got {brief(value)}")
