"""Parameters that torch's operations step together, as lists of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..contract.values import State
from .checks import Member
from .columns import picker

# How many elements are computed together: it bounds the memory of all that lies between a rule's
# first value and its last.
MOST_ELEMENTS = 1 << 18
# Beside the columns of tensors, the states that they were found in.
STATES = "states of all"
# The numbers of each group, by its index.
Options = Mapping[int, Mapping[str, Any]]


class Stepping:
    """Parameters that step now: with lists of plain tensors computed `together`, or only one.

    Example: two parameters whose groups have the rates 0.1 and 0.2 and 0.9 as their momentum.
    `columns` are {"g": [g0, g1], "p": [p0, p1], ...}, `options` are {"lr": [0.1, 0.2], "momentum":
    0.9}, `states` their dicts in the optimizer's state.
    """

    def __init__(
        self,
        members: Sequence[Member],
        columns: dict[str, Sequence[Any]],
        states: Sequence[State],
        options: dict[str, Any],
        together: bool,
    ) -> None:
        """`columns` are lists of tensors; `options` are one number for all, or a list."""
        self.members, self.columns, self.states = members, columns, states
        self.options, self.together = options, together


class Part:
    """Parameters of a batch that are computed together.

    `places` are theirs among the parameters whose tensors are known, `indices` theirs among all.
    """

    def __init__(self, places: list[int], known: Sequence[int], members: Sequence[Member]) -> None:
        self.pick = picker(places)
        self.indices = [known[i] for i in places]
        self.members = [members[i] for i in self.indices]
        self.groups = [member.group for member in self.members]
        self.one_group = len(set(self.groups)) == 1

    def stepping(self, columns: Mapping[str, Sequence[Any]], options: Options) -> Stepping:
        """Return what they step with, of all that is known."""
        picked = {name: self.pick(column) for name, column in columns.items()}
        numbers = dict(options[self.groups[0]])
        if not self.one_group:
            numbers = {name: [options[group][name] for group in self.groups] for name in numbers}
        return Stepping(self.members, picked, picked.pop(STATES), numbers, together=True)
