"""What of an optimizer goes into checkpoints, pickles and copies, and comes back from them.

Plans stay behind: they hold machine code and addresses of this process.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

from .state_dict import check_state_dict, match, pack, states_of


def save(optimizer: Any) -> dict[str, Any]:
    """Return a state dict, and call the hooks around it."""
    for pre_hook in optimizer._optimizer_state_dict_pre_hooks.values():
        pre_hook(optimizer)
    with optimizer._onepass.turn:
        state, groups = pack(optimizer.state, optimizer.param_groups)
    result: dict[str, Any] = {"state": state, "param_groups": groups}
    for post_hook in optimizer._optimizer_state_dict_post_hooks.values():
        changed = post_hook(optimizer, result)
        result = result if changed is None else changed
    return result


def load(optimizer: Any, state_dict: Any, base: type) -> None:
    """Continue from a state dict, and call the hooks around it; `base` is our base class.

    Raises ValueError if it does not fit; nothing is changed then.
    """
    owner = type(optimizer).__name__
    if not isinstance(state_dict, Mapping):
        check_state_dict(owner, state_dict)
    state_dict = dict(state_dict)
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        changed = pre_hook(optimizer, state_dict)
        state_dict = state_dict if changed is None else changed
    check_state_dict(owner, state_dict)
    with optimizer._onepass.turn:
        matched = match(owner, optimizer.param_groups, state_dict, states_of(base))
        state, groups = optimizer._onepass_load(matched)
        optimizer.__setstate__({"state": state, "param_groups": groups})
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def check_names(optimizer: Any, state_dict: Mapping[str, Any]) -> None:
    """Raise ValueError if a state dict's parameters have other names, or are in other groups."""
    owner = type(optimizer).__name__
    check_state_dict(owner, state_dict)
    difference = match(owner, optimizer.param_groups, state_dict).difference
    if difference:
        raise ValueError(f"{difference}; load a checkpoint of this model")


def pickled(optimizer: Any) -> dict[str, Any]:
    """Return what a pickle of an optimizer holds."""
    inherited = super(optimizer._onepass_last, optimizer)
    with optimizer._onepass.turn:
        # These dicts are read long after the turn. Their readers must not meet a state that another
        # thread begins.
        if optimizer._onepass.is_shared:
            return inherited.__getstate__()
        state = copy(optimizer.state)
        for p, entries in optimizer.state.items():
            if type(entries) is dict:
                state[p] = dict(entries)
        return {**inherited.__getstate__(), "state": state}


def shallow_copy(optimizer: Any) -> Any:
    """Return a copy that has the same state, as in torch, made as Python copies any object."""
    with optimizer._onepass.turn:
        # A thread that pickles at the same time does not see this: it waits for its turn.
        optimizer._onepass.is_shared = True
        try:
            reduced = optimizer.__reduce_ex__(4)
        finally:
            optimizer._onepass.is_shared = False
    if isinstance(reduced, str):
        return optimizer
    make, arguments, *rest = reduced
    other = make(*arguments)
    if rest and rest[0] is not None:
        other.__setstate__(rest[0])
    return other


def restore(optimizer: Any, state: dict[str, Any]) -> None:
    """Take over what a pickle or a state dict holds."""
    optimizer._onepass.let_go(optimizer._onepass.plan)
    defaults = state.get("defaults", vars(optimizer).get("defaults", {}))
    is_option = "differentiable" in defaults
    super(optimizer._onepass_last, optimizer).__setstate__(state)
    if not is_option:
        # torch adds it; a class that has no such option would find it in its checkpoints.
        optimizer.defaults.pop("differentiable", None)
    for group in optimizer.param_groups:
        for key, default in optimizer.defaults.items():
            group.setdefault(key, default)
