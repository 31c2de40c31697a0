"""Which recipe each parameter steps by, and which options decide it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .. import kernel
from ..contract.values import Group, check_kinds, has_entries
from .recipe import Algorithm, Arguments, Mode, Recipe, describe, make_recipe, switches


class GroupRecipes:
    """One recipe for each param group and each rule in it; `kind_of` has the number of each
    parameter's."""

    def __init__(self, algorithm: Algorithm, groups: list[Group], scaled: bool) -> None:
        """`scaled` says whether gradients are multiplied by a factor.

        Raises `StepError` for options that make no sense.
        """
        self.recipes: list[Recipe] = []
        self.modes: list[Mode] = []
        self.kind_of: list[int] = []
        self._scaled = scaled
        self.switches: list[tuple[list[str], list[str]]] = []
        flags = [algorithm.flags(group) for group in groups]
        for group, flags_of_group in zip(groups, flags, strict=True):
            mode = Mode.of(group)
            known: dict[kernel.Rule, int] = {}
            keywords: dict[str, kernel.Argument] = {}
            for p in group["params"]:
                rule = algorithm.rule_of(p, group)
                if rule not in known:
                    arguments = describe(algorithm.name, rule, group, flags_of_group)
                    keywords |= dict(arguments)
                    known[rule] = len(self.recipes)
                    self.recipes.append(self._make(algorithm, rule, arguments, mode, group))
                    self.modes.append(mode)
                self.kind_of.append(known[rule])
            self.switches.append(switches(keywords.items()))
        # Equal graphs have one number; it is quicker to compare.
        numbers: dict[kernel.Graph, int] = {}
        self.graph_of = [numbers.setdefault(recipe.graph, len(numbers)) for recipe in self.recipes]
        self._switched = self._read(groups, flags)

    def _make(
        self,
        algorithm: Algorithm,
        rule: kernel.Rule,
        arguments: Arguments,
        mode: Mode,
        group: Group,
    ) -> Recipe:
        how = {"maximize": mode.maximize, "scaled": self._scaled, "exact": not mode.differentiable}
        try:
            recipe = make_recipe(algorithm.name, rule, arguments, **how)
        except Exception:
            # A rule does not know what its options are called, nor what they should be.
            check_kinds(group, algorithm.defaults)
            raise
        recipe.look_at(group)
        return recipe

    def are_as_before(self, groups: Sequence[Group], flags: Sequence[Mapping[str, bool]]) -> bool:
        """Whether the options that select programs and backends are those for which the recipes
        were made."""
        try:
            return self._switched == self._read(groups, flags)
        except Exception:
            # A value that cannot be compared, as an array: new recipes say what is wrong with it.
            return False

    def _read(self, groups: Sequence[Group], flags: Sequence[Mapping[str, bool]]) -> list[object]:
        """The values of options that select a program or a backend; of numbers only whether they
        still are such."""
        return [
            [*map(group.get, keys), flags_of_group, [_kind(group.get(name)) for name in numbers]]
            for group, (keys, numbers), flags_of_group in zip(
                groups, self.switches, flags, strict=True
            )
        ]


def _kind(value: Any) -> int:
    """What a recipe needs to know of an option that is a number, or a row of them: its length, or
    -2."""
    kind = type(value)
    if kind is float or kind is int:
        return -2
    return len(value) if kind is tuple or has_entries(value) else -1 if value is None else -2
