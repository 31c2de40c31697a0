"""The time of one optimizer step, ours beside torch.optim's, on copies of one model's parameters
and gradients."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["StepTime", "compare_steps"]

_WARM_UP_STEPS = 3
_MOST_ROUNDS = 300
# What chooses an implementation, not a result.
_MODES = frozenset({"foreach", "fused", "capturable", "differentiable"})


@dataclass(frozen=True)
class StepTime:
    """The median time of a contender's step, in milliseconds."""

    name: str
    milliseconds: float


def compare_steps(
    optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], budget: float = 2.0
) -> list[StepTime]:
    """Time a step of `optimizer`'s class and of torch.optim's class of the same name, default and
    `fused=True`.

    Every contender gets its own copies of `parameters` with their present gradients, and the
    hyper-parameters of `optimizer`'s first group; they take turns, so that other load on the
    machine meets all alike. `budget` is the time for all, in seconds. Ours comes first; torch's are
    left out where torch has no such class or mode.
    """
    contenders = _make_contenders(optimizer, [p for p in parameters if p.grad is not None])
    times: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + budget
    for round_ in range(_MOST_ROUNDS + _WARM_UP_STEPS):
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender.step()
            if round_ >= _WARM_UP_STEPS:
                times[name].append(time.perf_counter() - start)
        if round_ > _WARM_UP_STEPS and time.perf_counter() > end:
            break
    return [StepTime(name, 1e3 * statistics.median(taken)) for name, taken in times.items()]


def _make_contenders(optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> dict[str, Any]:
    name = type(optimizer).__name__
    hyper = {
        key: value for key, value in optimizer.param_groups[0].items() if key in optimizer.defaults
    }
    contenders = {f"onepass {name}": _make(type(optimizer), parameters, hyper)}
    theirs = getattr(torch.optim, name, None)
    if theirs is None:
        return contenders
    with suppress(ValueError):  # torch's answer where it does not take such parameters
        contenders[f"torch {name}"] = _make(theirs, parameters, hyper)
    if "fused" in inspect.signature(theirs).parameters:
        with suppress(
            RuntimeError
        ):  # torch's answer where it has no fused kernel for this device or dtype
            contenders[f"torch {name} fused"] = _make(theirs, parameters, hyper, fused=True)
    return contenders


def _make(
    cls: type[Any], parameters: list[Tensor], hyper: dict[str, Any], **modes: bool
) -> torch.optim.Optimizer:
    copies = [nn.Parameter(p.detach().clone()) for p in parameters]
    for copy, p in zip(copies, parameters, strict=True):
        copy.grad = None if p.grad is None else p.grad.detach().clone()
    known = inspect.signature(cls).parameters
    accepted = {key: value for key, value in hyper.items() if key in known and key not in _MODES}
    return cls(copies, **accepted, **modes)
