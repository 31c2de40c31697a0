"""State dicts: what is checked before one is loaded, and which parameter each entry is for.

Example: an optimizer has one group of two parameters, `weight` and `bias`. It saved the state dict

    {"state": {0: {"step": 3, ...}, 1: {"step": 3, ...}},
     "param_groups": [{"lr": 0.1, "params": [0, 1], "param_names": ["weight", "bias"]}]}

- By name: it is loaded into an optimizer whose group has the names `bias` and `weight`, in this
  order. The entry 0 is for the second parameter there, `weight`, and the entry 1 for the first.
- With wrappers: the model there is compiled, so that its names are `_orig_mod.bias` and
  `_orig_mod.weight`. The entries are for the same parameters as before.
- By position: one of the two optimizers was given no names, or the names there are `scale` and
  `bias`. The entry 0 is for the first parameter, the entry 1 for the second. If both have names,
  a warning says which differ.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence, Set
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..kernel import signature
from .matched_names import find_names
from .mistakes import PACKAGE, tell
from .options import has_numbers_on_device
from .state_entries import refused_number, why_no_number, why_no_state, why_not_whole
from .values import Group, as_number, brief, check_kinds

# The largest count of steps that a float64 holds as it is.
MOST_STEPS = 2**53
# The shape of each state that a parameter may have; None for a state that is one number.
Shapes = Mapping[str, tuple[int, ...] | None]
# For a parameter and its group: the states that it must have once it has stepped, and the shapes of
# all that it may have. A class that has no rule gives no shapes: its state may be anything.
StateOf = Callable[[Tensor, Group], tuple[Sequence[str], Shapes | None]]
# Makes a copy of a tensor on a device.
Copy = Callable[[Tensor, Any], Tensor]


def check_state_dict(owner: str, state_dict: object) -> None:
    """Raise ValueError for anything that is not an optimizer's state dict.

    `owner`, the name of the class that it should be loaded into, begins the message.
    """
    if not isinstance(state_dict, Mapping):
        raise _not_a_state_dict(owner, type(state_dict).__name__)
    if not {"state", "param_groups"} <= set(state_dict):
        some_keys = sorted(map(str, state_dict))[:5]
        raise _not_a_state_dict(owner, str(some_keys))

    state = state_dict["state"]
    if not isinstance(state, Mapping):
        raise ValueError(
            f"{owner}: a state dict's 'state' must be a dict, got {type(state).__name__}"
        )
    groups = state_dict["param_groups"]
    if not isinstance(groups, Sequence) or not all(map(_has_params, groups)):
        raise ValueError(
            f"{owner}: a state dict's 'param_groups' must be a list of dicts with 'params'"
        )
    for index, group in enumerate(groups):
        for name in ("params", "param_names"):
            listed = group.get(name, [])
            if not _lists_keys(listed):
                raise ValueError(
                    f"{owner}: group {index} of the state dict must list its {name}, got "
                    f"{brief(listed)}"
                )


def _not_a_state_dict(owner: str, got: str) -> ValueError:
    """Return the error about something that is not a state dict at all."""
    return ValueError(
        f"{owner}: a state dict must have 'state' and 'param_groups', got {got}; pass what an "
        "optimizer's state_dict() returned"
    )


def _has_params(group: object) -> bool:
    """Whether a saved group is a dict with parameters."""
    return isinstance(group, Mapping) and "params" in group


def _lists_keys(listed: object) -> bool:
    """Whether this is a list of what can be a dict's keys."""
    if not isinstance(listed, (list, tuple)):
        return False
    return all(isinstance(key, Hashable) for key in listed)


class _Adoption(NamedTuple):
    """How a parameter's saved state is copied."""

    # The entries that stay on the host.
    numbers: Collection[str]
    copy: Copy


@dataclass
class Match:
    """A state dict beside the groups that it is loaded into.

    Group i of `groups` continues from group i of `saved_groups`. For each key of a saved parameter,
    `parameters` has the parameter that it is for, and `labels` what messages call it.
    """

    owner: str
    groups: list[Group]
    saved_groups: list[Group]
    saved_state: Mapping[Any, Any]
    # The names of all algorithms' states: an entry that is called otherwise is the user's.
    states: Set[str]
    parameters: dict[Any, Tensor] = field(default_factory=dict)
    labels: dict[Any, str] = field(default_factory=dict)
    # How the names differ, if parameters are matched by position although both sides have names.
    difference: str = ""

    def load(
        self, state_of: StateOf, defaults: Mapping[str, Any], checks_options: bool = True
    ) -> tuple[dict[Any, Any], list[Group]]:
        """Return the new state and groups, after everything has been verified.

        The optimizer itself is not touched. The state has parameters as keys, and each saved key
        that belongs to no parameter; its tensors are copies. `defaults` are the options that a
        saved group may lack. Raises ValueError for a state dict that does not fit.
        """
        groups = self.load_groups(defaults, checks_options)
        adoptions = self._check_states(groups, state_of)
        self.tell_difference()

        state: dict[Any, Any] = defaultdict(dict)
        for key, value in self.saved_state.items():
            if key in self.parameters:
                p = self.parameters[key]
                adoption = adoptions.get(key, _Adoption((), _copy_dense))
                state[p] = _adopt(value, p, *adoption)
            else:
                state[key] = deepcopy(value)
        return state, groups

    def tell_difference(self) -> None:
        """Warn if parameters are matched by position although both sides have names."""
        if self.difference:
            tell(f"{self.difference}; parameters are matched by position, as in torch")

    def load_groups(self, defaults: Mapping[str, Any], checks_options: bool = True) -> list[Group]:
        """Return the new groups: the saved options, and this optimizer's parameters and names.

        With `checks_options`, ValueError is raised for an option that is not a number, a flag, or
        several numbers, as the optimizer has it now.
        """
        groups = []
        for group, saved in zip(self.groups, self.saved_groups, strict=True):
            kept = [name for name in ("param_names", "params") if name in group]
            loaded = dict(defaults)
            for name, value in saved.items():
                if name not in kept:
                    loaded[name] = deepcopy(value)
            for name in kept:
                loaded[name] = group[name]
            groups.append(loaded)
            if checks_options:
                self._check_options(loaded, group, defaults)
        return groups

    def _check_options(self, loaded: Group, group: Group, defaults: Mapping[str, Any]) -> None:
        """Raise ValueError for a loaded option of another kind than this optimizer has."""
        examples = {}
        for name, default in defaults.items():
            examples[name] = group.get(name, default)
        check_kinds(loaded, examples, f"{self.owner}: the state dict's ", ValueError)

    def _check_states(self, groups: list[Group], state_of: StateOf) -> dict[Any, _Adoption]:
        """Verify the state of each parameter that has one; return how to copy it."""
        adoptions: dict[Any, _Adoption] = {}
        for group, saved in zip(groups, self.saved_groups, strict=True):
            for key in saved["params"]:
                has_state = key in self.saved_state and self.saved_state[key] != {}
                if has_state:
                    adoptions[key] = self._check_parameter(key, group, state_of)
        return adoptions

    def _check_parameter(self, key: Any, group: Group, state_of: StateOf) -> _Adoption:
        """Verify a parameter's saved state; return how to copy it.

        Example: AdamW's step count is copied to the host, and with `capturable` to the parameter's
        device, as everything else is.
        """
        p = self.parameters[key]
        required, shapes = state_of(p, group)
        if shapes is None:
            copy = _copy_as_it_is
            # A count of steps stays where it is, as in torch.
            numbers = ["step"]
        else:
            self._check_state(key, required, shapes)
            copy = _copy_dense
            numbers = [name for name, shape in shapes.items() if shape is None]
        if has_numbers_on_device(group, p.device):
            numbers = []
        return _Adoption(numbers, copy)

    def _check_state(self, key: Any, required: Sequence[str], shapes: Shapes) -> None:
        """Raise ValueError unless a parameter can continue from its saved state."""
        value = self.saved_state[key]
        label = self.labels[key]
        if not isinstance(value, Mapping):
            raise ValueError(
                f"{self.owner}: the state of parameter {label} must be a dict, got "
                f"{type(value).__name__}"
            )
        self._check_owner(label, value, shapes)
        fault = why_not_whole(value, required)
        if fault:
            raise ValueError(
                f"{self.owner}: the saved state of parameter {label} {fault}; a whole state has "
                f"{', '.join(required)}"
            )
        for name, entry in value.items():
            if entry is not None and name in shapes:
                self._check_entry(key, name, entry, shapes[name])

    def _check_owner(self, label: str, value: Mapping[str, Any], shapes: Shapes) -> None:
        """Raise ValueError for a state that another algorithm has made."""
        present = {name for name, entry in value.items() if entry is not None}
        # A step count says nothing: most algorithms have one.
        if present.intersection(shapes) - {"step"}:
            return
        foreign = [name for name in value if name not in shapes and name in self.states]
        if foreign:
            known = ", ".join(shapes) or "no state"
            raise ValueError(
                f"{self.owner}: the saved state of parameter {label} holds {foreign[0]!r}, which "
                f"belongs to another optimizer; {self.owner} keeps {known}"
            )

    def _check_entry(
        self, key: Any, name: str, entry: object, shape: tuple[int, ...] | None
    ) -> None:
        """Raise ValueError for an entry that cannot be loaded."""
        if shape is None:
            fault = _why_no_saved_number(name, entry)
        else:
            fault = _why_no_saved_state(entry, self.parameters[key], shape)
        if fault:
            way = f"{self.difference}; by position," if self.difference else f"{self.owner}:"
            raise ValueError(f"{way} saved state {name!r} of parameter {self.labels[key]} {fault}")


def match(
    owner: str, groups: list[Group], state_dict: Mapping[str, Any], states: Set[str] = frozenset()
) -> Match:
    """Find which parameter each saved key is for: by name if possible, else by position.

    It is possible if both sides have the same names in each group, wrappers aside; the example at
    the top of this file shows it. `states` are the names of all algorithms' states.

    Raises ValueError if the saved groups are not as many as `groups`, or not as long.
    """
    saved_groups = list(state_dict["param_groups"])
    if len(groups) != len(saved_groups):
        raise ValueError(
            f"{owner}: the loaded state dict has a different number of parameter groups: "
            f"{len(saved_groups)}, this optimizer has {len(groups)}"
        )
    groups_with_params = [group for group in chain(groups, saved_groups) if group["params"]]
    by_name = all("param_names" in group for group in groups_with_params)
    matched = Match(owner, groups, saved_groups, state_dict["state"], states)

    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        keys = saved["params"]
        _check_size(owner, index, group, keys)
        if by_name:
            _check_names(owner, index, "the state dict", saved)
            _check_names(owner, index, "this optimizer", group)
            labels = [repr(name) for name in saved.get("param_names", [])]
            order = _order_by_name(matched, index)
        else:
            labels = [str(key) for key in keys]
            order = range(len(keys))
        for key, label, position in zip(keys, labels, order, strict=True):
            matched.parameters[key] = group["params"][position]
            matched.labels[key] = label
    return matched


def _check_size(owner: str, index: int, group: Group, keys: Sequence[Any]) -> None:
    """Raise ValueError unless a group has as many parameters as were saved."""
    if len(group["params"]) != len(keys):
        raise ValueError(
            f"{owner}: the loaded state dict contains a parameter group that doesn't match the "
            f"size of optimizer's group: group {index} has {len(keys)} parameters, this "
            f"optimizer's has {len(group['params'])}"
        )


def _check_names(owner: str, index: int, side: str, group: Group) -> None:
    """Raise ValueError unless each parameter of a group has a name of its own."""
    count = len(group["params"])
    different = len(set(group.get("param_names", ())))
    if different != count:
        raise ValueError(
            f"{owner}: group {index} of {side} has {count} parameters and {different} different "
            "names; give each parameter one name"
        )


def _order_by_name(matched: Match, index: int) -> Sequence[int]:
    """Return which parameter of a group each saved one is for.

    If names differ, it is the one at the same position, and the match notes the difference.

    Example: for the saved names `["weight", "bias"]` and the group's `["bias", "weight"]`, it
    returns [1, 0]; for the group's `["scale", "bias"]`, it returns [0, 1].
    """
    saved_names = matched.saved_groups[index].get("param_names", [])
    names = matched.groups[index].get("param_names", [])
    found = find_names(saved_names, names)
    if found is not None:
        return found
    if not matched.difference:
        pairs = zip(saved_names, names, strict=True)
        saved_name, name = next(pair for pair in pairs if pair[0] != pair[1])
        matched.difference = (
            f"{matched.owner}: the state dict has a parameter {saved_name!r} in group {index} "
            f"where this optimizer has {name!r}"
        )
    return range(len(saved_names))


def pack(
    state: Mapping[Any, Any], param_groups: Sequence[Group]
) -> tuple[dict[Any, Any], list[Group]]:
    """Return state and groups as a state dict has them: positions instead of parameters.

    Groups of 2 and 1 parameters have the positions [0, 1] and [2]. What is in `state` under another
    key than a parameter keeps its key.
    """
    position_of: dict[int, int] = {}
    groups: list[Group] = []
    start = 0
    for group in param_groups:
        ids = [id(p) for p in group["params"]]
        # A parameter that is in the group twice has its last position, as in torch.
        positions = enumerate(ids, start)
        position_of |= {key: i for i, key in positions if key not in position_of}
        start += len(ids)
        packed = dict(group)
        # It is the last entry, as in torch.
        del packed["params"]
        packed["params"] = [position_of[key] for key in ids]
        groups.append(packed)

    packed_state = {}
    for p, entries in state.items():
        key = position_of[id(p)] if isinstance(p, Tensor) else p
        packed_state[key] = entries
    return packed_state, groups


def states_of(cls: Any) -> set[str]:
    """Return the names of the states of a class of this package, and of its subclasses here.

    Example: "exp_avg" and "exp_avg_sq" are among those of `Optimizer`, as Adam's rule has them.
    """
    if cls.__module__.partition(".")[0] != PACKAGE:
        return set()
    names: set[str] = set()
    for value in vars(cls).values():
        if isinstance(value, staticmethod):
            columns = signature(value.__func__).columns
            # After the parameter and its gradient.
            names.update(columns[2:])
    for subclass in cls.__subclasses__():
        names |= states_of(subclass)
    return names


def _why_no_saved_number(name: str, entry: object) -> str:
    """Say why an entry cannot be loaded as one number, or ""."""
    fault = why_no_number(entry)
    if fault:
        return fault
    found = as_number(entry)
    if found is None:
        return refused_number(entry)
    if name == "step" and not (0 <= found <= MOST_STEPS and found % 1 == 0):
        return f"must be a whole number from 0 to 2**53, got {found:g}"
    return ""


def _why_no_saved_state(entry: object, p: Tensor, shape: tuple[int, ...]) -> str:
    """Say why an entry cannot be loaded as a state of `p`, and what to do, or ""."""
    can_step = p.is_floating_point() or p.is_complex()
    fault = why_no_state(entry, p, shape, any_dtype=not can_step)
    if not isinstance(entry, Tensor):
        return fault
    if not fault and entry.is_meta and not p.is_meta:
        fault = "is on meta and has no memory"
    return f"{fault}; load a checkpoint of this model" if fault else ""


def _adopt(value: Any, p: Tensor, numbers: Collection[str], copy: Copy) -> Any:
    """Return a copy of a parameter's state, or of a part of it.

    Tensors are copied by `copy`, to the parameter's device; the entries `numbers` to the host.
    """
    if isinstance(value, Tensor):
        return copy(value, p.device)
    if type(value) in (list, tuple):
        return type(value)(_adopt(entry, p, (), copy) for entry in value)
    if not isinstance(value, Mapping):
        return deepcopy(value)
    adopted = {}
    for name, entry in value.items():
        if name in numbers and isinstance(entry, Tensor):
            adopted[name] = copy(entry, "cpu")
        else:
            adopted[name] = _adopt(entry, p, (), copy)
    return adopted


def _copy_dense(t: Tensor, device: Any) -> Tensor:
    """Return a copy that a kernel can take.

    torch's SGD keeps sparse momentum if gradients are sparse.
    """
    dense = t.to_dense() if t.is_sparse else t
    return dense.detach().to(device=device, copy=True)


def _copy_as_it_is(t: Tensor, device: Any) -> Tensor:
    """Return a copy of the same class and layout."""
    if isinstance(t, nn.Parameter):
        copied = deepcopy(t)
    else:
        copied = t.detach().clone()
    return copied.to(device=device)
