"""How the names of a saved model's parameters correspond to those of a model in this process."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

# Leaves out a part of a name.
Shorten = Callable[[str], str]
# What wrappers put into the names of a model's parameters: torch.compile, DDP, FSDP, activation
# checkpointing.
WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


def find_names(saved: Sequence[str], names: Sequence[str]) -> list[int] | None:
    """Return where each saved name stands in `names`, or None if both are not the same names.

    What wrappers put into names does not count.

    Example: among `names` of `["weight", "bias"]`, the saved `["bias", "weight"]` stand at [1, 0],
    and so do `["module.bias", "module.weight"]`, which DDP has wrapped. `["bias", "scale"]` give
    None.
    """
    # The first way that tells all names apart is taken: a model's own part may be called `module`.
    ways: list[tuple[Shorten, Shorten]] = [
        (str, str),
        (_without_outermost, str),
        (str, _without_outermost),
        (_without_wrappers, _without_wrappers),
    ]
    for shorten_saved, shorten in ways:
        short_saved = [shorten_saved(name) for name in saved]
        short_names = [shorten(name) for name in names]
        found = _find(short_saved, short_names)
        if found is not None:
            return found
    return None


def _find(saved: list[str], names: list[str]) -> list[int] | None:
    """Return where each saved name stands in `names`, or None if both are not the same names."""
    index_of = {name: index for index, name in enumerate(names)}
    found = [index_of[name] for name in saved if name in index_of]
    is_complete = len(set(found)) == len(saved)
    if is_complete and len(saved) == len(index_of):
        return found
    return None


def _without_wrappers(name: str) -> str:
    """Return a parameter's name without what wrappers put into it."""
    return WRAPPERS.sub("", str(name))


def _without_outermost(name: str) -> str:
    """Return a parameter's name without what the outermost wrapper has put before it."""
    found = WRAPPERS.match(name)
    return name if found is None else name[found.end() :]
