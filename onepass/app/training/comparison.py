"""The time of one optimizer step, ours beside torch's, on copies of one model's tensors."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..bench.contenders import Missing, make_torch
from ..bench.machine import time_of
from ..bench.turns import take_turns
from ..catalog import Variant

__all__ = ["StepTime", "compare_steps"]

# Options that choose an implementation, not a result.
_MODES = frozenset({"foreach", "fused", "capturable", "differentiable"})


@dataclass(frozen=True)
class StepTime:
    """The median time of a contender's step, in milliseconds."""

    name: str
    milliseconds: float


def compare_steps(
    optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], budget: float = 2.0
) -> list[StepTime]:
    """Time a step of an optimizer's class, and of torch's class of the same name.

    Every contender steps its own copies of `parameters` with their present gradients, with the
    options of the optimizer's first group; they take turns. `budget` is the time for all, in
    seconds. Ours comes first, then torch's default and fused; these are left out if torch has no
    such class or mode.
    """
    cls = type(optimizer)
    name = cls.__name__
    stepped = [p for p in parameters if p.grad is not None]
    contenders = {f"onepass {name}": cls(_copy(stepped), **_options_for(cls, optimizer))}
    torchs = getattr(torch.optim, name, None)
    options = {} if torchs is None else _options_for(torchs, optimizer)
    variant = Variant(name, cls, options)  # pyright: ignore[reportArgumentType]
    for mode, title in (("default", f"torch {name}"), ("fused", f"torch {name} fused")):
        with suppress(Missing):
            contenders[title] = make_torch(variant, _copy(stepped), mode)

    timers = {title: partial(time_of, made.step) for title, made in contenders.items()}
    times = take_turns(timers, budget)
    return [StepTime(title, found["median_ms"]) for title, found in times.items()]


def _copy(parameters: Sequence[Tensor]) -> list[nn.Parameter]:
    """Return copies of parameters, with copies of their gradients."""
    copies = []
    for p in parameters:
        copied = nn.Parameter(p.detach().clone())
        copied.grad = None if p.grad is None else p.grad.detach().clone()
        copies.append(copied)
    return copies


def _options_for(cls: type[Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the options of the optimizer's first group that a class takes, without modes."""
    known = inspect.signature(cls).parameters
    return {
        key: value
        for key, value in optimizer.param_groups[0].items()
        if key in optimizer.defaults and key in known and key not in _MODES
    }
