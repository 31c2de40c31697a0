"""Advice for a name that is not known: the known names that look like it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["advise", "near_names"]


def near_names(
    name: str, known: Iterable[str], most: int = 3, likeness: float = 0.5, *, any_case: bool = True
) -> list[str]:
    """Return at most `most` of the known names that look like `name`, the nearest first.

    `likeness` is the least ratio of common letters, from 0 (all names are near) to 1 (only `name`
    itself). With `any_case`, capital and small letters are the same.

    Example: `near_names("adamv", ["adam", "adamw", "sgd"])` returns `["adam", "adamw"]`.
    """
    # From the form in which names are compared to the names.
    compared: dict[str, str] = {}
    for known_name in known:
        form = known_name.lower() if any_case else known_name
        compared[form] = known_name
    wanted = name.lower() if any_case else name
    found = difflib.get_close_matches(wanted, compared, n=most, cutoff=likeness)
    return [compared[form] for form in found]


def advise(name: str, known: Iterable[str], most: int = 3, likeness: float = 0.5) -> str:
    """Return the end of a message about an unknown name: near names, or all if none is near."""
    known = list(known)
    near = near_names(name, known, most, likeness)
    if near:
        meant = " or ".join(near)
        return f"did you mean {meant}?"
    choices = ", ".join(known)
    return f"choose one of {choices}."
