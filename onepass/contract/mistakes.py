"""Mistakes that would do nothing, or the wrong thing, in every step without a word. Each gets one
warning."""

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
    """Warn, and name the first line that is not of this package or of torch: that of the user."""
    level, frame = 2, sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (
        PACKAGE,
        "torch",
    ):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


class Misplaced:
    """An option as an attribute of the optimizer, which nothing reads: set from outside, it brings
    a warning.

    A subclass may set it for its own use, in its methods.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, optimizer: Any, cls: type) -> Any:
        # The class has none either: dataclasses would take it for a default.
        found = {} if optimizer is None else vars(optimizer)
        if self._name not in found:
            raise AttributeError(f"{cls.__name__!r} object has no attribute {self._name!r}")
        return found[self._name]

    def __set__(self, optimizer: Any, value: object) -> None:
        vars(optimizer)[self._name] = value
        if self._name in vars(optimizer).get("defaults", ()) and not _is_method_of(
            optimizer, sys._getframe(1)
        ):
            name, owner = self._name, type(optimizer).__name__
            optimizer._onepass.warn_once(
                f"{owner}: optimizer.{name} = ... sets an attribute that no step reads; set it in "
                f"the param groups: for group in optimizer.param_groups: group[{name!r}] = ..."
            )

    def __delete__(self, optimizer: Any) -> None:
        if vars(optimizer).pop(self._name, self) is self:
            raise AttributeError(self._name)


def arguments_of(cls: type) -> dict[str, Any]:
    """The arguments of a class's constructor, with their defaults."""
    try:
        parameters = inspect.signature(cls.__init__).parameters.values()
    except (TypeError, ValueError):
        # It is not written in Python.
        return {}
    return {parameter.name: parameter.default for parameter in parameters}


def watch_options(cls: type) -> None:
    """Let the options of a class, arguments of its constructor, be missed where they are set as
    attributes."""
    known = set().union(*map(vars, cls.__mro__))
    for name in arguments_of(cls):
        if name not in known and name not in ("self", "params", "args", "kwargs", "defaults"):
            setattr(cls, name, Misplaced(name))


def _is_method_of(optimizer: Any, frame: Any) -> bool:
    """Whether code runs in a method of the optimizer: a function whose first argument is `self`,
    and is this one."""
    names = frame.f_code.co_varnames[: frame.f_code.co_argcount]
    return names[:1] == ("self",) and frame.f_locals.get("self") is optimizer


class Idle:
    """Counts steps without any gradient, as long as there has never been one."""

    def __init__(self) -> None:
        self._steps = 0
        # Whether gradients have been dropped since the last step, as before a backward pass.
        self.expects_gradients = False

    @property
    def waits(self) -> bool:
        """Whether there is something to say, should it go on like this."""
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

        Schedulers are tried out without any gradients: there none is expected.
        """
        if any(g is not None for g in grads):
            self._steps = -1
            return
        expected = closure or self.expects_gradients or not _is_scheduled(optimizer)
        self.expects_gradients = False
        if not grads or not expected:
            return
        owner = type(optimizer).__name__
        self._steps += 1
        if self._steps < PATIENCE:
            return
        self._steps = -1
        if any(p.requires_grad for p in params):
            warn(
                f"{owner}: no parameter has had a gradient in {PATIENCE} steps, which changed "
                "nothing; call loss.backward() before step(), on a loss that is computed from "
                "these parameters"
            )
        else:
            warn(
                f"{owner}: all parameters are frozen (requires_grad is False): none has had a "
                f"gradient in {PATIENCE} steps, which changed nothing; call requires_grad_() on "
                "those to be trained"
            )


def _is_scheduled(optimizer: Any) -> bool:
    """Whether a scheduler drives an optimizer, one of torch's or of ours."""
    return hasattr(optimizer.step, "_wrapped_by_lr_sched") or bool(
        vars(optimizer).get("_lr_schedulers")
    )


def are_learning_rates(rates: float | np.ndarray) -> bool:
    """Whether a constructor would take these as learning rates."""
    if isinstance(rates, np.ndarray):
        return bool(rates.min() >= 0 and rates.max() < math.inf)
    return 0 <= rates < math.inf


def find_refused(groups: Sequence[int], rates: Sequence[float]) -> tuple[int, float]:
    """The first group whose learning rate the constructor would refuse, and the rate."""
    return next(
        (g, rate) for g, rate in zip(groups, rates, strict=True) if not are_learning_rates(rate)
    )


def refused_rate(owner: str, index: int, value: float) -> str:
    """The warning about a group's learning rate that the constructor would refuse."""
    return (
        f"{owner}: param_groups[{index}]['lr'] is {value:g}; a learning rate lies in [0, inf), "
        "and maximize=True ascends"
    )
