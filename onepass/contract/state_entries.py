"""What a parameter's state may be, and what is wrong with one that it may not be.

Each function returns a part of a sentence, or "" if nothing is wrong. Its caller adds whose state
it is in front, and what to do at the end: a step has other advice than the loading of a state dict.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from .values import brief


def why_no_state(
    entry: object, p: Tensor, shape: tuple[int, ...], *, any_dtype: bool = False
) -> str:
    """Say why an entry cannot be a state of `p` that has the shape `shape`.

    With `any_dtype`, every dtype is allowed. Without it, the entry must hold real numbers, or
    complex ones if the parameter is complex.

    Example: for a parameter of shape (2, 3), an entry of shape (6,) gives "has shape (6,), the
    parameter has (2, 3)".
    """
    if not isinstance(entry, Tensor):
        return f"must be a tensor, got {brief(entry)}"
    if entry.shape != shape:
        if shape == p.shape:
            expected = f"the parameter has {shape}"
        else:
            expected = f"for a parameter of {tuple(p.shape)} it must have {shape}"
        return f"has shape {tuple(entry.shape)}, {expected}"
    is_of_kind = entry.is_complex() if p.is_complex() else entry.is_floating_point()
    if any_dtype or is_of_kind:
        return ""
    return f"is {entry.dtype}, the parameter {p.dtype}"


def why_no_number(entry: object) -> str:
    """Say why an entry cannot be one number, such as a step count.

    The number itself is not read: that would have to wait for a device.

    Example: 3, `torch.tensor(3.0)` and `torch.ones(1, 1)` give ""; `torch.ones(2)` gives "must be
    one number, got a tensor of shape (2,) and torch.float32".
    """
    if isinstance(entry, Tensor):
        is_single = entry.numel() == 1
    else:
        is_single = isinstance(entry, (int, float))
    return "" if is_single else refused_number(entry)


def refused_number(entry: object) -> str:
    """Return what is said of an entry that should be one number."""
    return f"must be one number, got {brief(entry)}"


def why_not_whole(state: Mapping[str, Any], required: Collection[str]) -> str:
    """Say which of the required entries is missing in a state that has others of them.

    A state may have none of them: then the parameter has not stepped.

    Example: if "step" and "exp_avg" are required, `{"step": 3}` gives "has 'step' but no
    'exp_avg'", and `{}` gives "".
    """
    present = [name for name in required if state.get(name) is not None]
    missing = [name for name in required if name not in present]
    if present and missing:
        return f"has {present[0]!r} but no {missing[0]!r}"
    return ""
