"""The state of LBFGS, under torch's names: what it must hold, and how it is loaded.

All of it lies beside the first parameter, in vectors as long as all parameters together. With 15
numbers in three parameters, after an iteration that has entered two pairs:

    d, prev_flat_grad            15 numbers each
    old_dirs, old_stps           lists of two vectors, each of 15 numbers
    ro                           a list of two numbers
    t, H_diag, prev_loss         a number each
    func_evals, n_iter           whole numbers
    al                           factors of the last direction; nothing reads them
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from copy import deepcopy
from typing import Any

from torch import Tensor

from ...contract.state_dict import Match
from ...contract.values import as_number, brief
from .flat import FlatParameters, why_no_vector

# What one iteration leaves to the next, beside the counts.
VECTORS = ("d", "prev_flat_grad")
HISTORY = ("old_dirs", "old_stps")
NUMBERS = ("t", "H_diag", "prev_loss")
MEMORY = (*VECTORS, *HISTORY, "ro", *NUMBERS)
COUNTS = ("func_evals", "n_iter")
REMEDY = "load a state that fits, or clear the optimizer's state to begin again"


def check_memory(
    what: str, state: Mapping[str, Any], size: int, error: type[Exception] = ValueError
) -> bool:
    """Whether a state holds the memory of an iteration; one of a new optimizer holds none.

    `size` is the number of elements of each vector, `what` names the state in messages. Raises
    `error` for a memory that is not whole, or that belongs to other parameters.
    """
    _check_counts(what, state, error)
    lost = [name for name in MEMORY if state.get(name) is None]
    if len(lost) == len(MEMORY):
        return False
    if lost:
        raise error(f"{what} has no {lost[0]!r}; a whole state has {', '.join(MEMORY)}; {REMEDY}")
    _check_lists(what, state, error)
    _check_numbers(what, state, error)
    _check_vectors(what, state, size, error)
    return True


def load_state(matched: Match, params: Sequence[Tensor]) -> dict[Any, Any]:
    """Return the state that a state dict holds for `params`, with the vectors in their order.

    Raises ValueError for one that does not fit.
    """
    owner = matched.owner
    keys = matched.saved_groups[0]["params"]
    saved_params = FlatParameters(owner, [matched.parameters[key] for key in keys])
    state: dict[Any, Any] = defaultdict(dict)
    for key, value in matched.saved_state.items():
        if key not in matched.parameters:
            state[key] = deepcopy(value)
        elif value != {}:
            what = f"{owner}: the saved state of parameter {matched.labels[key]}"
            _check_owner(what, value, matched.states)
            entries = {name: _without_tuples(entry) for name, entry in value.items()}
            check_memory(what, entries, saved_params.size)
            if key != keys[0]:
                raise ValueError(
                    f"{owner} keeps all state beside the first parameter, not beside {key!r}"
                )
            state[params[0]] = _adopt(entries, saved_params, params)
    return state


def _check_owner(what: str, value: Any, names_of_states: Set[str]) -> None:
    """Raise ValueError for the state of another optimizer, whose states have these names."""
    if not isinstance(value, Mapping):
        got = f"a {type(value).__name__}"
    elif {*MEMORY, *COUNTS} & value.keys() or not names_of_states & value.keys():
        return
    else:
        got = ", ".join(map(str, value))
    raise ValueError(
        f"{what} belongs to another optimizer: it must have 'd', 'n_iter' and others, got {got:.60}"
    )


def _without_tuples(entry: Any) -> Any:
    """Lists are written to; some formats of checkpoints have made tuples of them."""
    return list(entry) if isinstance(entry, tuple) else entry


def _adopt(
    entries: Mapping[str, Any], saved_params: FlatParameters, params: Sequence[Tensor]
) -> dict[str, Any]:
    """Return copies of a state's entries, with the vectors on the device of the parameters."""
    adopted: dict[str, Any] = {}
    for name, entry in entries.items():
        if name in VECTORS or name in HISTORY:
            adopted[name] = saved_params.adopt(entry, params)
        else:
            adopted[name] = deepcopy(entry)
    return adopted


def _check_counts(what: str, state: Mapping[str, Any], error: type[Exception]) -> None:
    """Raise unless the counts are whole numbers; a missing one is 0."""
    for name in COUNTS:
        count = as_number(state.get(name, 0))
        if count is None or count < 0 or count % 1 != 0:
            raise error(
                f"{what} must have a whole number for {name!r}, got {brief(state[name])}; {REMEDY}"
            )


def _check_lists(what: str, state: Mapping[str, Any], error: type[Exception]) -> None:
    """Raise unless the history is three lists with an entry for each pair."""
    lists = [state[name] for name in (*HISTORY, "ro")]
    are_lists = all(isinstance(entry, list) for entry in lists)
    if not are_lists or len({len(entry) for entry in lists}) != 1:
        raise error(f"{what} must have old_dirs, old_stps and ro as lists of one length; {REMEDY}")


def _check_numbers(what: str, state: Mapping[str, Any], error: type[Exception]) -> None:
    """Raise unless everything that should be one number is one."""
    for entry in (*(state[name] for name in NUMBERS), *state["ro"]):
        if isinstance(entry, bool) or as_number(entry) is None:
            raise error(
                f"{what} must have numbers for {', '.join(NUMBERS)} and in ro, got {brief(entry)}; "
                f"{REMEDY}"
            )


def _check_vectors(what: str, state: Mapping[str, Any], size: int, error: type[Exception]) -> None:
    """Raise unless all vectors have `size` elements that can be read and written."""
    vectors = [(name, state[name]) for name in VECTORS]
    for name in HISTORY:
        vectors += [(name, vector) for vector in state[name]]
    for name, vector in vectors:
        why = why_no_vector(vector, size)
        if why:
            raise error(
                f"{what} must consist of vectors of {size} numbers, but {name!r} {why}; {REMEDY}"
            )
