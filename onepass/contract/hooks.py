"""What torch puts around every step: hooks, and a mark in the profiler's records.

Torch's wrapper around `step` takes 9 us, even when there is nothing to call. Ours first looks
whether there is, which takes 0.5 us. The order is torch's:

    global pre-hooks, own pre-hooks, the step, own post-hooks, global post-hooks
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import wraps
from itertools import chain
from typing import Any, ParamSpec, TypeVar

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ..kernel import torch_function

P = ParamSpec("P")
R = TypeVar("R")

# torch keeps the hooks of all optimizers here.
BEFORE, AFTER = _global_optimizer_pre_hooks, _global_optimizer_post_hooks
# An experiment of torch's, which records marks by itself.
MONITOR = "torch.profiler._cupti_monitor"


def with_hooks(step: Callable[P, R]) -> Callable[P, R]:
    """Return a class's `step` with what torch puts around it.

    Torch then leaves the class as it is: `hooked` is its own sign for that.
    """

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        optimizer: Any = args[0]
        cls = type(optimizer)
        if cls.step is not hooked_step and not _is_hooked(cls):
            return step(*args, **kwargs)
        if BEFORE or AFTER or _has_hooks(optimizer) or _is_observed():
            return _step_with_hooks(step, args, kwargs)
        result = step(*args, **kwargs)
        optimizer._optimizer_step_code()
        return result

    # It imports torch's compiler when it is first called: only in a compiled function, which has
    # imported it already.
    run_outside_graphs = torch._disable_dynamo(run)

    @wraps(step)
    def hooked_step(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return run_outside_graphs(*args, **kwargs)
        return run(*args, **kwargs)

    vars(hooked_step)["hooked"] = True
    return hooked_step


def note_hooked(cls: type) -> None:
    """Note that an optimizer of this class has been made: torch now puts hooks around its step."""
    if "_onepass_is_hooked" not in vars(cls):
        cls._onepass_is_hooked = True  # type: ignore[attr-defined]


def _is_hooked(cls: type) -> bool:
    """Whether torch would call hooks here too, when a subclass's own step has called ours.

    The subclass's step has them already. Ours has them, as in torch, if an optimizer of one of the
    classes whose step it is has been made. So hooks may be called twice, as torch does.
    """
    if not getattr(cls.step, "hooked", False):  # type: ignore[attr-defined]
        # Somebody has put another step into the class since, which has none.
        return True
    bases = iter(cls.__mro__)
    next(base for base in bases if "step" in vars(base))
    return any("_onepass_is_hooked" in vars(base) for base in bases)


def _has_hooks(optimizer: Any) -> bool:
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


def _step_with_hooks(step: Callable[..., R], args: Any, kwargs: Any) -> R:
    """Call hooks and the step in torch's order, in a range of the profiler's."""
    optimizer = args[0]
    name = f"Optimizer.step#{type(optimizer).__name__}.step"
    with torch.autograd.profiler.record_function(name):
        before = chain(BEFORE.values(), optimizer._optimizer_step_pre_hooks.values())
        for pre_hook in before:
            changed = pre_hook(optimizer, args, kwargs)
            if changed is None:
                continue
            if not isinstance(changed, tuple) or len(changed) != 2:
                raise RuntimeError(
                    f"{step} must return None or a tuple of (new_args, new_kwargs), but got "
                    f"{changed}."
                )
            args, kwargs = changed
        result = step(*args, **kwargs)
        optimizer._optimizer_step_code()
        after = chain(optimizer._optimizer_step_post_hooks.values(), AFTER.values())
        for post_hook in after:
            post_hook(optimizer, args, kwargs)
    return result


def _always() -> bool:
    return True


def _is_observed() -> bool:
    """Whether a profiler, or anything else, is told of torch's operations in this thread."""
    monitor = sys.modules.get(MONITOR)
    return _has_callbacks() or getattr(monitor, "_monitor_singleton", None) is not None


def _find_has_callbacks() -> Callable[[], bool]:
    """Return torch's function that says so; where it is not found, the answer is always yes."""
    address = torch_function("_ZN2at12hasCallbacksEv")
    return ctypes.PYFUNCTYPE(ctypes.c_bool)(address) if address else _always


_has_callbacks = _find_has_callbacks()
