"""Mistakes that would do nothing, or the wrong thing, in every step without a word.

Each of them gets one warning.
"""

from __future__ import annotations

import inspect
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

# The name of this whole package.
PACKAGE = __name__.partition(".")[0]
# In how many steps in a row, from the first on, there may be no gradient before it is said.
PATIENCE = 3


def tell(message: str) -> None:
    """Warn, and name the user's line: the innermost that is not of this package or of torch.

    Example: a script calls `scheduler.step()` of torch, which calls us. The warning names the
    script's line, and Python shows it once for each such line.
    """
    level = 2
    frame = sys._getframe(1)
    while frame is not None and _package_of(frame) in (PACKAGE, "torch"):
        level += 1
        frame = frame.f_back
    warnings.warn(message, stacklevel=level)


def _package_of(frame: Any) -> str:
    """Return the name of the package whose code runs in a frame."""
    return frame.f_globals.get("__name__", "").partition(".")[0]


class Misplaced:
    """An option as an attribute of the optimizer, which no step reads.

    Setting it from outside brings a warning. A subclass may set it for its own use, in its methods.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, optimizer: Any, cls: type) -> Any:
        # The class does not have it either: dataclasses would take it for a default.
        attributes = {} if optimizer is None else vars(optimizer)
        if self._name not in attributes:
            raise AttributeError(f"{cls.__name__!r} object has no attribute {self._name!r}")
        return attributes[self._name]

    def __set__(self, optimizer: Any, value: object) -> None:
        attributes = vars(optimizer)
        attributes[self._name] = value
        is_option = self._name in attributes.get("defaults", ())
        if is_option and not _is_method_of(optimizer, sys._getframe(1)):
            name = self._name
            optimizer._onepass.warn_once(
                f"{type(optimizer).__name__}: optimizer.{name} = ... sets an attribute that no "
                "step reads; set it in the param groups: for group in optimizer.param_groups: "
                f"group[{name!r}] = ..."
            )

    def __delete__(self, optimizer: Any) -> None:
        attributes = vars(optimizer)
        if self._name not in attributes:
            raise AttributeError(self._name)
        del attributes[self._name]


def arguments_of(cls: type) -> dict[str, Any]:
    """Return the arguments of a class's constructor, with their defaults."""
    try:
        parameters = inspect.signature(cls.__init__).parameters.values()
    except (TypeError, ValueError):
        # It is not written in Python.
        return {}
    return {parameter.name: parameter.default for parameter in parameters}


def watch_options(cls: type) -> None:
    """Put a `Misplaced` into a class for each of its options: arguments of its constructor.

    An attribute that the class has already is left alone.
    """
    known = set().union(*map(vars, cls.__mro__))
    for name in arguments_of(cls):
        if name not in known and name not in ("self", "params", "args", "kwargs", "defaults"):
            setattr(cls, name, Misplaced(name))


def _is_method_of(optimizer: Any, frame: Any) -> bool:
    """Whether code runs in a method of the optimizer: its first argument is `self`, and is it."""
    names = frame.f_code.co_varnames[: frame.f_code.co_argcount]
    return names[:1] == ("self",) and frame.f_locals.get("self") is optimizer


class Idle:
    """Counts steps without any gradient, as long as there has never been one."""

    def __init__(self) -> None:
        # -1 when there is nothing to count any more.
        self._steps = 0
        # Whether gradients have been dropped since the last step, as before a backward pass.
        self.expects_gradients = False

    @property
    def waits(self) -> bool:
        """Whether steps are still counted: none has had a gradient, and nothing has been said."""
        return self._steps >= 0

    def look(
        self,
        optimizer: Any,
        params: Sequence[Tensor],
        grads: Sequence[Any],
        closure: bool,
        warn: Callable[[str], None],
    ) -> None:
        """Note a step, with a `closure` or without, and warn if it is one too many.

        `params` and `grads` are those of all groups, in order; `warn` takes the message. Schedulers
        are tried out without gradients: no gradient is expected there.
        """
        if any(g is not None for g in grads):
            self._steps = -1
            return
        expected = closure or self.expects_gradients or not _is_scheduled(optimizer)
        self.expects_gradients = False
        if not grads or not expected:
            return
        self._steps += 1
        if self._steps < PATIENCE:
            return
        self._steps = -1
        warn(_no_gradients(type(optimizer).__name__, params))


def _no_gradients(owner: str, params: Sequence[Tensor]) -> str:
    """Return the warning that no step so far has had a gradient."""
    if any(p.requires_grad for p in params):
        return (
            f"{owner}: no parameter has had a gradient in {PATIENCE} steps, which changed nothing; "
            "call loss.backward() before step(), on a loss that is computed from these parameters"
        )
    return (
        f"{owner}: all parameters are frozen (requires_grad is False): none has had a gradient in "
        f"{PATIENCE} steps, which changed nothing; call requires_grad_() on those to be trained"
    )


def _is_scheduled(optimizer: Any) -> bool:
    """Whether a scheduler drives an optimizer, one of torch's or of ours."""
    if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        return True
    return bool(vars(optimizer).get("_lr_schedulers"))


def are_learning_rates(rates: float | np.ndarray) -> bool:
    """Whether a constructor would take these as learning rates: NaN it would not."""
    if isinstance(rates, np.ndarray):
        return bool(rates.min() >= 0 and rates.max() < math.inf)
    return 0 <= rates < math.inf


def find_refused(groups: Sequence[int], rates: Sequence[float]) -> tuple[int, float]:
    """Return the first group whose learning rate the constructor would refuse, and the rate.

    Example: groups 0 and 2 with the rates 0.1 and -1.0 give (2, -1.0).
    """
    pairs = zip(groups, rates, strict=True)
    return next((index, rate) for index, rate in pairs if not are_learning_rates(rate))


def refused_rate(owner: str, index: int, rate: float) -> str:
    """Return the warning about a group's learning rate that the constructor would refuse."""
    return (
        f"{owner}: param_groups[{index}]['lr'] is {rate:g}; a learning rate lies in [0, inf), and "
        "maximize=True ascends"
    )
