"""Who steps: a class's rule, its own code, or the code of torch's class, which does what only that
can do."""

from __future__ import annotations

import inspect
import sys
from itertools import chain
from typing import Any

from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer as TorchOptimizer

from .mistakes import PACKAGE
from .param_groups import occur_twice
from .values import StepError

# Why a step is taken by torch's code.
OVERRIDES, REPEATS = (
    "it overrides {}, which only that calls",
    "a parameter occurs twice in its param groups",
)


def step_as_torch(optimizer: Any, why: str, *arguments: Any) -> Any:
    """Step by the code of torch's class, for what only that code does."""
    optimizer._onepass.warn_once(
        f"{type(optimizer).__name__} steps by torch.optim's slower code: {why}"
    )
    step = optimizer._onepass_torch_class.step
    # Without torch's hooks, which have been called.
    return (step.__wrapped__ if getattr(step, "hooked", False) else step)(optimizer, *arguments)


def has_own_group_reader(optimizer: Any) -> bool:
    """Whether a subclass overrides `_init_group`, through which torch's steps read a group."""
    torchs = getattr(optimizer._onepass_torch_class, "_init_group", None)
    return torchs is not None and getattr(type(optimizer), "_init_group", None) is not torchs


def steps_as_torch(optimizer: Any) -> bool:
    """Whether the next step is by the code of torch's class, which unscales gradients only where it
    is fused."""
    if has_own_group_reader(optimizer):
        return True
    return occur_twice(
        list(chain.from_iterable(group["params"] for group in optimizer.param_groups))
    )


def is_asked_by_grad_scaler() -> bool:
    """Whether the code that reads the caller's property is that of `torch.amp.GradScaler`.

    Lightning reads `_step_supports_amp_scaling`, too. True tells it that gradients must not be
    unscaled before a step, so it refuses to clip them. But our steps take gradients either way, as
    GradScaler knows which it is: so only GradScaler gets the answer.
    """
    reader = sys._getframe(2)
    return reader.f_globals.get("__name__") == GradScaler.__module__


def has_torchs_step(optimizer: Any) -> bool:
    """Whether a step need not be by a rule: the class has none, or the mathematics of torch's."""
    cls = type(optimizer)
    if optimizer._onepass_torch_class is TorchOptimizer or not hasattr(cls, "rule"):
        return not hasattr(cls, "rule")
    ours = next(base for base in cls.__mro__ if base.__module__.partition(".")[0] == PACKAGE)
    return all(
        getattr(cls, name) is getattr(ours, name)
        for name in ("rule", "rule_of", "flags", "initial_state")
    )


def refuse_repeats(optimizer: Any) -> None:
    """Raise where a parameter is there twice, unless torch's class can step it twice."""
    if not has_torchs_step(optimizer):
        raise StepError(
            f"{type(optimizer).__name__}: a parameter occurs twice in the param groups; list each "
            "once"
        )


def steps_by_rule(cls: type) -> bool:
    """Whether a class steps by its rule, at least in part: not by a step of its own that calls no
    other."""
    for base in cls.__mro__:
        # A class's own attribute may be a wrapper around a step, as torch makes one.
        if "step" not in vars(base):
            continue
        step = inspect.unwrap(vars(base)["step"])
        if (getattr(step, "__module__", None) or "").partition(".")[0] == PACKAGE:
            return hasattr(cls, "rule")
        if "step" not in getattr(getattr(step, "__code__", None), "co_names", ()):
            return False
    return False
