"""What a step changed while it was prepared; it is taken back if the step fails."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

_ABSENT = object()


class Ledger:
    """Entries set in dicts and values copied into tensors, each with what was there before.

    Example: after `set(state, "step", 1)`, where no "step" was, and `copy(t, value)`, where t held
    [1.0, 2.0], the list is [state, "step", ABSENT, t, None, tensor([1.0, 2.0])]: three objects for
    each change. `undo` takes them from the end: t is [1.0, 2.0] again, then "step" is removed.
    """

    def __init__(self) -> None:
        # What was changed, at which key, and what was there: one after another, as objects of their
        # own cost time.
        self._before: list[Any] = []

    def set(self, entries: dict[Any, Any], key: Any, value: Any) -> None:
        """Set an entry of a dict, and remember the old one or that there was none."""
        self._before += entries, key, entries.get(key, _ABSENT)
        entries[key] = value

    def copy(self, tensor: Tensor, value: Tensor) -> None:
        """Copy a value into a tensor, and remember the old one. What `copy_` raises is raised."""
        self._before += tensor, None, tensor.detach().clone()
        tensor.copy_(value)

    def undo(self) -> None:
        """Take everything back, the last first."""
        while self._before:
            before, key, changed = self._before.pop(), self._before.pop(), self._before.pop()
            if isinstance(changed, Tensor):
                # What refused to be written may refuse this, too; the others are taken back all the
                # same.
                with torch.no_grad(), suppress(Exception):
                    changed.copy_(before)
            elif before is _ABSENT:
                changed.pop(key, None)
            else:
                changed[key] = before

    def close(self) -> None:
        """Forget all changes: they are not taken back any more."""
        self._before.clear()
