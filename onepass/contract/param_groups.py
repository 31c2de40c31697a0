"""What is checked of a param group before an optimizer takes it.

Each failure is one sentence. `owner`, the name of the optimizer's class, begins it.
"""

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
    """Whether a list can be made of something, which may have entries by index only."""
    return isinstance(given, Iterable) or hasattr(type(given), "__getitem__")


def check_required(owner: str, group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise ValueError if a group does not set an option that has no default.

    `defaults` have torch's mark `required` for such an option.
    """
    for name, default in defaults.items():
        if default is required and name not in group:
            raise ValueError(
                f"{owner}: parameter group didn't specify a value of required optimization "
                f"parameter {name}"
            )


def read_params(owner: str, given: Any) -> tuple[list[Tensor], list[str]]:
    """Return a group's parameters in order, and their names, which may be none.

    `given` is a tensor, or an iterable of tensors or of (name, tensor) pairs. Raises TypeError for
    anything else, and ValueError if only some have names.

    Example: `[("weight", w), ("bias", b)]` gives `([w, b], ["weight", "bias"])`.
    """
    if isinstance(given, set):
        raise TypeError(UNORDERED.format(owner))
    if not is_iterable(given):
        raise TypeError(
            f"{owner}: a param group's params must be tensors, got {torch.typename(given)}"
        )
    entries = [given] if isinstance(given, Tensor) else list(given)
    params = []
    names = []
    for entry in entries:
        if isinstance(entry, tuple):
            _check_pair(owner, entry)
            names.append(entry[0])
            params.append(entry[1])
        else:
            params.append(entry)
    if names and len(names) != len(params):
        raise ValueError(
            f"{owner}: all optimizer params should be with/without names. Some param names are "
            f"missing: {len(params) - len(names)} have none"
        )
    return params, names


def _check_pair(owner: str, entry: tuple[Any, ...]) -> None:
    """Raise TypeError for a tuple that is not a name and something else."""
    if len(entry) == 2 and isinstance(entry[0], str):
        return
    kinds = [repr(part) if isinstance(part, (str, int)) else torch.typename(part) for part in entry]
    raise TypeError(
        f"{owner} can only optimize tensors or (name, tensor) pairs, got a tuple of "
        f"({', '.join(kinds)})"
    )


def check_params(
    owner: str, params: Sequence[Any], differentiable: bool, names: Sequence[str]
) -> None:
    """Raise TypeError for a parameter that is not a tensor, ValueError for one that is not a leaf.

    With `differentiable`, parameters may be computed from others.
    """
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
    """Whether a parameter is in a list more than once."""
    return len({*map(id, params)}) < len(params)


class Taken:
    """The parameters and names that an optimizer's groups have.

    A parameter belongs to one group, a name to one parameter, and either all groups have names or
    none.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self._names = {name for group in groups for name in group.get("param_names", ())}
        self._params = {id(p) for group in groups for p in group["params"]}
        # Whether the groups have names; None before there is one.
        self._are_named = "param_names" in groups[0] if groups else None

    def add(
        self, owner: str, params: Sequence[Tensor], names: Sequence[str], may_repeat: bool
    ) -> None:
        """Add a group's parameters and names.

        Raises ValueError for one that is there already, or twice in the group, and for names if
        other groups have none. With `may_repeat`, a parameter that the group has twice only brings
        a warning.
        """
        self._check_names(owner, names)
        self._check_params(owner, params, names)
        if self._are_named is not None and bool(names) != self._are_named and params:
            with_or_without = "with" if names else "without"
            raise ValueError(
                f"{owner}: all optimizer param groups should be with/without names. cannot add "
                f"param group {with_or_without} names to the optimizer"
            )
        _check_repeats(owner, params, names, may_repeat)

        self._names.update(names)
        self._params.update(map(id, params))
        if self._are_named is None:
            self._are_named = bool(names)

    def _check_names(self, owner: str, names: Sequence[str]) -> None:
        """Raise ValueError for a name that belongs to another parameter."""
        for name, count in Counter(names).items():
            if count > 1 or name in self._names:
                raise ValueError(
                    f"{owner}: the parameter name {name!r} is given twice; give each parameter its "
                    "own"
                )

    def _check_params(self, owner: str, params: Sequence[Tensor], names: Sequence[str]) -> None:
        """Raise ValueError for a parameter that belongs to another group."""
        for index, p in enumerate(params):
            if id(p) in self._params:
                repeated = _describe(params, names, index)
                raise ValueError(
                    f"{owner}: some parameters appear in more than one parameter group: {repeated}"
                )


def _check_repeats(
    owner: str, params: Sequence[Tensor], names: Sequence[str], may_repeat: bool
) -> None:
    """Raise ValueError for a parameter that a group has twice; with `may_repeat`, warn of it."""
    index = _find_repeated(params)
    if index is None:
        return
    repeated = _describe(params, names, index)
    if not may_repeat:
        raise ValueError(
            f"{owner}: a parameter group with duplicate parameters: {repeated}; give each "
            "parameter once"
        )
    tell(
        f"{owner}: optimizer contains a parameter group with duplicate parameters: {repeated}; "
        "each step changes it twice, as in torch; give each parameter once"
    )


def _find_repeated(params: Sequence[Tensor]) -> int | None:
    """Return the index of the first parameter that has occurred before, or None."""
    seen: set[int] = set()
    for index, p in enumerate(params):
        if id(p) in seen:
            return index
        seen.add(id(p))
    return None


def check_spelling(owner: str, group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Warn of a key of a group that is an option's name with a letter wrong.

    Other keys are welcome: schedulers add some.

    Example: `weight_decy` brings the question "did you mean 'weight_decay'?", `initial_lr` nothing.
    """
    for key in group:
        if key in defaults or key in ("params", "param_names"):
            continue
        near = near_names(str(key), defaults, most=1, likeness=0.8, any_case=False)
        meant = [name for name in near if abs(len(name) - len(str(key))) < 2]
        if meant:
            tell(f"{owner}: a param group has no option {key!r}; did you mean {meant[0]!r}?")


def _describe(params: Sequence[Tensor], names: Sequence[str], index: int) -> str:
    """Return what a message calls a parameter, with its shape."""
    return f"parameter {_labels(params, names)[index]} of shape {tuple(params[index].shape)}"


def _labels(params: Sequence[Any], names: Sequence[str]) -> list[str]:
    """Return what messages call the parameters: their names, or their indices."""
    if names:
        return [repr(name) for name in names]
    return [str(index) for index in range(len(params))]
