"""Steps that repeat, switched on and off: two runs that must agree to the last bit."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from onepass import kernel
from onepass.stepping import repeat


@contextmanager
def careful_only() -> Iterator[None]:
    """Let every step take the careful way."""
    with patch.object(repeat, "ENABLED", False):
        yield


@contextmanager
def learning_at_once() -> Iterator[None]:
    """Let steps be learned as soon as they can be, however seldom they repeat."""
    with patch.object(repeat, "LONGEST_WAIT", 0):
        yield


def count_repeats(optimizer: Any) -> int:
    """How many of an optimizer's steps machine code has taken."""
    return optimizer._onepass.repeats.count


def elements(t: Any) -> Any:
    """A tensor's elements, to the last bit, and how often it was written; other values as text."""
    if not isinstance(t, Tensor):
        return repr(t)
    if t.is_meta or (t.layout == torch.strided and not kernel.has_storage(t)):
        return tuple(t.shape), t.is_meta
    version = None if t.is_inference() else t._version
    dense = t.detach().to_dense().resolve_neg().resolve_conj().contiguous()
    return version, dense.dtype, ctypes.string_at(dense.data_ptr(), dense.nbytes)


def everything(optimizer: Any) -> list[Any]:
    """Parameters, gradients, state and options of an optimizer, in order."""
    seen: list[Any] = []
    for group in optimizer.param_groups:
        seen.append({key: repr(value) for key, value in group.items() if key != "params"})
        for p in group["params"]:
            entry = optimizer.state.get(p, {})
            state = {name: elements(value) for name, value in entry.items()}
            seen += elements(p), elements(p.grad), state
    return seen
