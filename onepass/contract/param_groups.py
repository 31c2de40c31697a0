"""What is checked of a param group before an optimizer takes it. Each failure is one sentence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import required

from .mistakes import tell
from .spelling import near_names

UNORDERED = (
    "{}: optimizer parameters need to be organized in ordered collections, but got a set; use a "
    "list"
)


def is_iterable(given: object) -> bool:
    """Whether a list can be made of something: it may have entries by index only."""
    return isinstance(given, Iterable) or hasattr(type(given), "__getitem__")


def check_required(owner: str, group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise ValueError for an option that a group must set, and does not."""
    for name, default in defaults.items():
        if default is required and name not in group:
            raise ValueError(
                f"{owner}: parameter group didn't specify a value of required optimization "
                f"parameter {name}"
            )


def read_params(owner: str, given: Any) -> tuple[list[Tensor], list[str]]:
    """A group's parameters in order, and their names, or no names; raises TypeError or ValueError
    for anything else."""
    if isinstance(given, set):
        raise TypeError(UNORDERED.format(owner))
    if not is_iterable(given):
        raise TypeError(
            f"{owner}: a param group's params must be tensors, got {torch.typename(given)}"
        )
    entries = [given] if isinstance(given, Tensor) else list(given)
    for entry in entries:
        if isinstance(entry, tuple) and (len(entry) != 2 or not isinstance(entry[0], str)):
            kinds = [repr(e) if isinstance(e, (str, int)) else torch.typename(e) for e in entry]
            raise TypeError(
                f"{owner} can only optimize tensors or (name, tensor) pairs, got a tuple of "
                f"({', '.join(kinds)})"
            )
    names = [entry[0] for entry in entries if isinstance(entry, tuple)]
    params = [entry[1] if isinstance(entry, tuple) else entry for entry in entries]
    if names and len(names) != len(params):
        raise ValueError(
            f"{owner}: all optimizer params should be with/without names. Some param names are "
            f"missing: {len(params) - len(names)} have none"
        )
    return params, names


def check_params(
    owner: str, params: Sequence[Any], differentiable: bool, names: Sequence[str]
) -> None:
    """Raise TypeError for parameters that are not tensors, ValueError for those that are not
    leaves."""
    for p, label in zip(params, _labels(params, names), strict=True):
        if not isinstance(p, Tensor):
            raise TypeError(
                f"{owner}: optimizer can only optimize Tensors, but one of the params is "
                f"{torch.typename(p)}: parameter {label}; pass model.parameters()"
            )
        if not differentiable and not (p.is_leaf or p.retains_grad):
            raise ValueError(
                f"{owner} can't optimize a non-leaf Tensor: parameter {label} is computed from "
                "others"
            )


def occur_twice(params: Sequence[Tensor]) -> bool:
    """Whether a parameter is there more than once."""
    return len({*map(id, params)}) < len(params)


class Taken:
    """The parameters and names of an optimizer's groups: a parameter belongs to one group, a name
    to one parameter."""

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self._names = {name for group in groups for name in group.get("param_names", ())}
        self._params = {id(p) for group in groups for p in group["params"]}
        self._named = "param_names" in groups[0] if groups else None

    def add(
        self, owner: str, params: Sequence[Tensor], names: Sequence[str], may_repeat: bool
    ) -> None:
        """Add a group's; raises ValueError for what is there already, and for names in some groups
        only.

        With `may_repeat`, a parameter that the group has twice is only warned of.
        """
        for name, count in Counter(names).items():
            if count > 1 or name in self._names:
                raise ValueError(
                    f"{owner}: the parameter name {name!r} is given twice; give each its own"
                )
        seen: set[int] = set()
        repeated: list[int] = []
        for i, p in enumerate(params):
            if id(p) in self._params:
                what = _describe(params, names, i)
                raise ValueError(
                    f"{owner}: some parameters appear in more than one parameter group: {what}"
                )
            if id(p) in seen:
                repeated.append(i)
            seen.add(id(p))
        if self._named is not None and bool(names) != self._named and params:
            have = "with" if names else "without"
            raise ValueError(
                f"{owner}: all optimizer param groups should be with/without names. cannot add "
                f"param group {have} names to the optimizer"
            )
        if repeated:
            what = _describe(params, names, repeated[0])
            if not may_repeat:
                raise ValueError(
                    f"{owner}: a parameter group with duplicate parameters: {what}; give each once"
                )
            tell(
                f"{owner}: optimizer contains a parameter group with duplicate parameters: "
                f"{what}; each step takes it twice, as in torch; give each once"
            )
        self._names.update(names)
        self._params |= seen
        self._named = bool(names) if self._named is None else self._named


def check_spelling(owner: str, group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Other keys are welcome in a group (schedulers add some); one like an option's, with a letter
    wrong, is told."""
    for key in group:
        if key in defaults or key in ("params", "param_names"):
            continue
        near = near_names(str(key), defaults, most=1, likeness=0.8, any_case=False)
        meant = [name for name in near if abs(len(name) - len(str(key))) < 2]
        if meant:
            tell(f"{owner}: a param group has no option {key!r}; did you mean {meant[0]!r}?")


def _describe(params: Sequence[Tensor], names: Sequence[str], i: int) -> str:
    return f"parameter {_labels(params, names)[i]} of shape {tuple(params[i].shape)}"


def _labels(params: Sequence[Any], names: Sequence[str]) -> list[str]:
    """What messages call the parameters: by name, or by place."""
    return [repr(name) for name in names] or [str(i) for i in range(len(params))]
