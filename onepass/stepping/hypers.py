"""The numbers of param groups that a batch's rule reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .. import kernel
from ..contract.mistakes import are_learning_rates, find_refused
from ..contract.values import Group
from .recipe import Recipe
from .settings import Settings


class Hypers:
    """Reads the groups' numbers in each step, and writes them into a launch.

    `groups` are the indices of the groups that take part. `leaves` says where each of the recipe's
    sources is among a launch's leaves, and `values` has a row of numbers for each group.
    """

    def __init__(self, recipe: Recipe, compiled: kernel.Kernel, groups: Sequence[int]) -> None:
        self.groups = list(groups)
        self.leaves = [compiled.leaves[name] for name, _, _ in recipe.sources]
        self.values: list[Sequence[Any]] = []
        # The group with a learning rate that the constructor would refuse, and the rate.
        self.refused_rate: tuple[int, float] | None = None
        self._rate = compiled.leaves.get("lr")
        self._supplied, self._leaf_of = recipe.numbers, compiled.leaves

    def read(self, groups: Sequence[Group], read: Callable[[Group], Sequence[Any]]) -> None:
        """Read each group's numbers, in the order of the recipe's sources."""
        self.values = [read(groups[index]) for index in self.groups]

    def columns(self) -> zip[tuple[int, tuple[Any, ...]]]:
        """Return each source's leaf, and its numbers: one for each group."""
        return zip(self.leaves, zip(*self.values, strict=True), strict=True)

    def write(self, leaves: np.ndarray, settings: Settings, factor: float) -> None:
        """Write the numbers of each setting, for gradients that are multiplied by a factor."""
        for leaf, values in self.columns():
            each = np.array(values)
            leaves[leaf] = each[settings.groups]
            if leaf == self._rate and not are_learning_rates(each):
                self.refused_rate = find_refused(self.groups, values)
        supplied: dict[str, Any] = dict(zip(self._supplied, settings.numbers, strict=False))
        supplied["first"] = settings.firsts
        supplied[kernel.GRADIENT_FACTOR] = factor
        for name, values in supplied.items():
            if name in self._leaf_of:
                leaves[self._leaf_of[name]] = values
