"""Whose code takes a step: the class's rule, a step of its own, or that of torch's class.

Torch's code steps, slower, if only it can do what is asked.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer as TorchOptimizer

from .mistakes import PACKAGE
from .param_groups import occur_twice
from .values import StepError

# Why a step is taken by torch's code.
OVERRIDES = "it overrides {}, which only that calls"
REPEATS = "a parameter occurs twice in its param groups"


def step_as_torch(optimizer: Any, reason: str, *arguments: Any) -> Any:
    """Step by the code of torch's class, and warn of it once; return what that code returns.

    `reason` ends the warning. `arguments` are those of torch's `step`, as a closure.
    """
    optimizer._onepass.warn_once(
        f"{type(optimizer).__name__} steps by torch.optim's slower code: {reason}"
    )
    step = optimizer._onepass_torch_class.step
    if getattr(step, "hooked", False):
        # Torch's hooks have been called.
        step = step.__wrapped__
    return step(optimizer, *arguments)


def has_own_group_reader(optimizer: Any) -> bool:
    """Whether a subclass overrides `_init_group`, through which torch's steps read a group."""
    torchs = getattr(optimizer._onepass_torch_class, "_init_group", None)
    return torchs is not None and getattr(type(optimizer), "_init_group", None) is not torchs


def steps_as_torch(optimizer: Any) -> bool:
    """Whether the next step is by the code of torch's class.

    That code unscales gradients only if it is fused.
    """
    if has_own_group_reader(optimizer):
        return True
    params: list[Tensor] = []
    for group in optimizer.param_groups:
        params += group["params"]
    return occur_twice(params)


def takes_scaled_gradients(optimizer: Any) -> bool:
    """Whether a step unscales gradients itself: in a fused group, as in torch, or a capturable
    one."""
    if any(group.get("fused") for group in optimizer.param_groups):
        return True
    capturable = any(group.get("capturable") for group in optimizer.param_groups)
    return capturable and not steps_as_torch(optimizer)


def is_asked_by_grad_scaler() -> bool:
    """Whether the code that reads the caller's property is that of `torch.amp.GradScaler`.

    Lightning reads `_step_supports_amp_scaling`, too. True tells it that gradients must not be
    unscaled before a step, so it refuses to clip them. But our steps take scaled and unscaled
    gradients, and GradScaler knows which they are: so only GradScaler gets the answer.
    """
    reader = sys._getframe(2)
    return reader.f_globals.get("__name__") == GradScaler.__module__


def has_torchs_step(optimizer: Any) -> bool:
    """Whether torch's code may take a step.

    It may if the class has no rule, or if its mathematics is that of torch's class.
    """
    cls = type(optimizer)
    if optimizer._onepass_torch_class is TorchOptimizer or not hasattr(cls, "rule"):
        return not hasattr(cls, "rule")
    our_class = next(base for base in cls.__mro__ if base.__module__.partition(".")[0] == PACKAGE)
    return all(
        getattr(cls, name) is getattr(our_class, name)
        for name in ("rule", "rule_of", "flags", "initial_state")
    )


def refuse_repeats(optimizer: Any) -> None:
    """Raise `StepError` for a parameter in the groups twice, unless torch's code may step it."""
    if not has_torchs_step(optimizer):
        raise StepError(
            f"{type(optimizer).__name__}: a parameter occurs twice in the param groups; list each "
            "parameter once"
        )


def steps_by_rule(cls: type) -> bool:
    """Whether a class steps by its rule, at least in part.

    It does not if it has a step of its own that calls no other.
    """
    for base in cls.__mro__:
        # A class's own attribute may be a wrapper around a step, as torch makes one.
        if "step" not in vars(base):
            continue
        step = inspect.unwrap(vars(base)["step"])
        module = getattr(step, "__module__", None) or ""
        if module.partition(".")[0] == PACKAGE:
            return hasattr(cls, "rule")
        code = getattr(step, "__code__", None)
        if "step" not in getattr(code, "co_names", ()):
            return False
    return False
