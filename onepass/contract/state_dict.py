"""State dicts: what is checked before one is loaded, and which of its entries belongs to which
parameter."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence, Set
from copy import deepcopy
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor, nn

from ..kernel import signature
from .mistakes import PACKAGE, tell
from .options import has_numbers_on_device
from .values import as_number, brief, check_kinds

Group = dict[str, Any]
# The largest count of steps that a float64 holds as it is.
MOST_STEPS = 2**53
# What wrappers put into the names of a model's parameters: torch.compile, DDP, FSDP, activation
# checkpointing.
WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# For a parameter and its group: the state that it must have once it has stepped, and the shapes of
# all that it may have, None for what is one number; no shapes for a class that has no rule, whose
# state may be anything.
StateOf = Callable[
    [Tensor, Group], tuple[Sequence[str], Mapping[str, tuple[int, ...] | None] | None]
]


def check_state_dict(owner: str, state_dict: object) -> None:
    """Whether this is an optimizer's state dict at all."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        keys = (
            sorted(map(str, state_dict))[:5]
            if isinstance(state_dict, Mapping)
            else type(state_dict).__name__
        )
        raise ValueError(
            f"{owner}: a state dict has 'state' and 'param_groups', got {keys}; pass an "
            "optimizer's own"
        )
    state, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(state, Mapping):
        raise ValueError(
            f"{owner}: a state dict's 'state' must be a dict, got {type(state).__name__}"
        )
    if not isinstance(groups, Sequence) or not all(
        isinstance(g, Mapping) and "params" in g for g in groups
    ):
        raise ValueError(
            f"{owner}: a state dict's 'param_groups' must be a list of dicts with 'params'"
        )
    for i, group in enumerate(groups):
        for name in ("params", "param_names"):
            listed = group.get(name, [])
            if not isinstance(listed, (list, tuple)) or not all(
                isinstance(key, Hashable) for key in listed
            ):
                raise ValueError(
                    f"{owner}: group {i} of the state dict must list its {name}, got "
                    f"{brief(listed)}"
                )


@dataclass
class Match:
    """A state dict beside the groups that it is loaded into: pairs of groups, and each saved key's
    parameter."""

    owner: str
    groups: list[Group]
    saved_groups: list[Group]
    saved_state: Mapping[Any, Any]
    parameters: dict[Any, Tensor]
    labels: dict[Any, str]
    # The names of all algorithms' states: what else there is beside ours is the user's.
    states: Set[str]
    # How the names differ, where parameters are matched by position although both sides have names.
    difference: str = ""

    def load(
        self, state_of: StateOf, defaults: Mapping[str, Any], checks_options: bool = True
    ) -> tuple[dict[Any, Any], list[Group]]:
        """The new state and groups, everything verified first; the optimizer itself is not
        touched."""
        groups = self.load_groups(defaults, checks_options)
        state: dict[Any, Any] = defaultdict(dict)
        numbers: dict[Any, set[str]] = {}
        # Whose state is of a class without a rule.
        others: set[Any] = set()
        for group, saved in zip(groups, self.saved_groups, strict=True):
            for key in saved["params"]:
                if key in self.saved_state and self.saved_state[key] != {}:
                    required, shapes = state_of(self.parameters[key], group)
                    if shapes is None:
                        others.add(key)
                        # A count of steps stays where it is, as in torch.
                        on_device = has_numbers_on_device(group, self.parameters[key].device)
                        numbers[key] = set() if on_device else {"step"}
                        continue
                    self._check(key, self.saved_state[key], required, shapes)
                    moved = has_numbers_on_device(group, self.parameters[key].device)
                    numbers[key] = set() if moved else {n for n in shapes if shapes[n] is None}
        self.tell_difference()
        for key, value in self.saved_state.items():
            p = self.parameters.get(key)
            form = _same if key in others else _dense
            state[key if p is None else p] = (
                deepcopy(value) if p is None else _adopt(value, p, numbers.get(key, set()), form)
            )
        return state, groups

    def tell_difference(self) -> None:
        """Warn where parameters are matched by position although both sides have names."""
        if self.difference:
            tell(f"{self.difference}; parameters are matched by position, as in torch")

    def load_groups(self, defaults: Mapping[str, Any], checks_options: bool = True) -> list[Group]:
        """The new groups: the saved options, and this optimizer's parameters and names."""
        groups = []
        for group, saved in zip(self.groups, self.saved_groups, strict=True):
            kept = {k: group[k] for k in ("param_names",) if k in group}
            options = {k: deepcopy(v) for k, v in saved.items() if k not in ("params", *kept)}
            groups.append({**defaults, **options, **kept, "params": group["params"]})
            if checks_options:
                like = {k: group.get(k, default) for k, default in defaults.items()}
                check_kinds(groups[-1], like, f"{self.owner}: the state dict's ", ValueError)
        return groups

    def _check(
        self,
        key: Any,
        value: Any,
        required: Sequence[str],
        shapes: Mapping[str, tuple[int, ...] | None],
    ) -> None:
        p, label = self.parameters[key], self.labels[key]
        if not isinstance(value, Mapping):
            raise ValueError(
                f"{self.owner}: the state of parameter {label} must be a dict, got "
                f"{type(value).__name__}"
            )
        unknown = [name for name in value if name not in shapes and name in self.states]
        if unknown and not any(value.get(name) is not None for name in shapes if name != "step"):
            known = ", ".join(shapes) or "no state"
            raise ValueError(
                f"{self.owner}: the saved state of parameter {label} holds {unknown[0]!r}, which "
                f"belongs to another optimizer; {self.owner} keeps {known}"
            )
        lost = [name for name in required if value.get(name) is None]
        if lost and any(value.get(name) is not None for name in required):
            raise ValueError(
                f"{self.owner}: the saved state of parameter {label} has no {lost[0]!r}; a whole "
                f"state has {', '.join(required)}"
            )
        for name, entry in value.items():
            if entry is None or name not in shapes:
                continue
            shape = shapes[name]
            what = f"{self.owner}: saved state {name!r} of parameter {label}"
            if self.difference:
                what = f"{self.difference}; by position, saved state {name!r} of parameter {label}"
            if shape is None:
                _check_number(what, name, entry)
            else:
                _check_tensor(what, entry, shape, p)


def match(
    owner: str, groups: list[Group], state_dict: Mapping[str, Any], states: Set[str] = frozenset()
) -> Match:
    """Find each saved entry's parameter: by name where both sides have the same names, else by
    position."""
    saved_groups = list(state_dict["param_groups"])
    if len(groups) != len(saved_groups):
        raise ValueError(
            f"{owner}: the loaded state dict has a different number of parameter groups: "
            f"{len(saved_groups)}, this optimizer has {len(groups)}"
        )
    named = all("param_names" in g for g in chain(groups, saved_groups) if g["params"])
    parameters: dict[Any, Tensor] = {}
    labels: dict[Any, str] = {}
    difference = ""
    for i, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        if len(group["params"]) != len(saved["params"]):
            raise ValueError(
                f"{owner}: the loaded state dict contains a parameter group that doesn't match "
                f"the size of optimizer's group: group {i} has {len(saved['params'])} parameters, "
                f"this optimizer's has {len(group['params'])}"
            )
        names = saved.get("param_names", []) if named else saved["params"]
        for side, of in (("the state dict", saved), ("this optimizer", group)):
            if named and len(names_of := set(of.get("param_names", ()))) != len(of["params"]):
                raise ValueError(
                    f"{owner}: group {i} of {side} has {len(of['params'])} parameters and "
                    f"{len(names_of)} different names; name each once"
                )
        places = _places(names, group.get("param_names", [])) if named else range(len(names))
        if places is None:
            pairs = zip(names, group["param_names"], strict=True)
            theirs, ours = next((a, b) for a, b in pairs if a != b)
            difference = difference or (
                f"{owner}: the state dict has a parameter {theirs!r} in group {i} where this "
                f"optimizer has {ours!r}"
            )
            places = range(len(names))
        for key, name, place in zip(saved["params"], names, places, strict=True):
            parameters[key], labels[key] = group["params"][place], repr(name) if named else str(key)
    return Match(
        owner, groups, saved_groups, state_dict["state"], parameters, labels, states, difference
    )


def pack(
    state: Mapping[Any, Any], param_groups: Sequence[Group]
) -> tuple[dict[Any, Any], list[Group]]:
    """Return state and groups as a state dict has them: positions instead of parameters.

    Groups of 2 and 1 parameters have the positions [0, 1] and [2].
    """
    position: dict[int, int] = {}
    groups: list[Group] = []
    start = 0
    for group in param_groups:
        params = group["params"]
        # One that is there twice has its last position, as in torch.
        new = {id(p): i for i, p in enumerate(params, start) if id(p) not in position}
        position.update(new)
        start += len(params)
        packed = {key: value for key, value in group.items() if key != "params"}
        groups.append(packed | {"params": [position[id(p)] for p in params]})
    packed_state = {}
    for p, entries in state.items():
        packed_state[position[id(p)] if isinstance(p, Tensor) else p] = entries
    return packed_state, groups


def states_of(cls: Any) -> set[str]:
    """Return the names of the states of a class of this package, and of its subclasses here."""
    if cls.__module__.partition(".")[0] != PACKAGE:
        return set()
    names: set[str] = set()
    for value in vars(cls).values():
        if isinstance(value, staticmethod):
            names.update(signature(value.__func__).columns[2:])
    return names.union(*map(states_of, cls.__subclasses__()))


def _unwrapped(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    return WRAPPERS.sub("", str(name))


def _without_first(name: str) -> str:
    """A parameter's name without what the outermost wrapper has put before it."""
    found = WRAPPERS.match(name)
    return name if found is None else name[found.end() :]


def _places(names: Sequence[str], among: Sequence[str]) -> list[int] | None:
    """Where each name stands among the others, with or without what wrappers put in; None where
    names differ."""
    for theirs, ours in (
        (str, str),
        (_without_first, str),
        (str, _without_first),
        (_unwrapped, _unwrapped),
    ):
        place = {ours(name): i for i, name in enumerate(among)}
        found = [place[theirs(name)] for name in names if theirs(name) in place]
        if len({*found}) == len(names) == len(place):
            return found
    return None


def _check_number(what: str, name: str, entry: object) -> None:
    found = as_number(entry)
    if found is None or not isinstance(entry, (int, float, Tensor)):
        raise ValueError(f"{what} must be one number, got {_describe(entry)}")
    if name == "step" and not (0 <= found <= MOST_STEPS and found % 1 == 0):
        raise ValueError(f"{what} must be a whole number from 0 to 2**53, got {found:g}")


def _check_tensor(what: str, entry: object, shape: tuple[int, ...], p: Tensor) -> None:
    if not isinstance(entry, Tensor):
        raise ValueError(f"{what} must be a tensor, got {_describe(entry)}")
    if entry.shape != shape:
        belongs = (
            "the parameter has"
            if shape == p.shape
            else f"for a parameter of {tuple(p.shape)} it must have"
        )
        raise ValueError(
            f"{what} has shape {tuple(entry.shape)}, {belongs} {shape}; load a checkpoint of this "
            "model"
        )
    if entry.is_meta and not p.is_meta:
        raise ValueError(f"{what} has no memory, it is on meta; load a checkpoint of this model")
    if not (p.is_floating_point() or p.is_complex()):
        # It never steps.
        return
    if entry.is_complex() != p.is_complex() or not (
        entry.is_floating_point() or entry.is_complex()
    ):
        raise ValueError(
            f"{what} is {entry.dtype}, the parameter {p.dtype}; load a checkpoint of this model"
        )


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return brief(value) if isinstance(value, (int, float, str)) else f"a {type(value).__name__}"


def _adopt(
    value: Any, p: Tensor, numbers: Collection[str], form: Callable[[Tensor, Any], Tensor]
) -> Any:
    """A copy of a parameter's state: in its own dtype, on the parameter's device but for `numbers`.

    `form` makes the copy of a tensor.
    """
    if isinstance(value, Tensor):
        return form(value, p.device)
    if type(value) in (list, tuple):
        return type(value)(_adopt(entry, p, (), form) for entry in value)
    if not isinstance(value, Mapping):
        return deepcopy(value)
    copied = {}
    for name, entry in value.items():
        on_host = name in numbers and isinstance(entry, Tensor)
        copied[name] = form(entry, "cpu") if on_host else _adopt(entry, p, (), form)
    return copied


def _dense(t: Tensor, device: Any) -> Tensor:
    """A copy that a kernel can take: torch's SGD keeps sparse momentum where gradients are
    sparse."""
    return (t.to_dense() if t.is_sparse else t).detach().to(device=device, copy=True)


def _same(t: Tensor, device: Any) -> Tensor:
    """A copy of the same class and layout."""
    copied = deepcopy(t) if isinstance(t, nn.Parameter) else t.detach().clone()
    return copied.to(device=device)
