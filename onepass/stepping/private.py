"""What an optimizer keeps for itself, under one name: subclasses may call their own attributes
whatever they like."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..contract.mistakes import Idle, tell
from ..contract.param_groups import Taken
from .plan import Plan
from .repeat import Repeats
from .turn import Turn


class Private:
    """`optimizer._onepass`. A copy of it is empty: plans hold machine code and addresses of this
    process."""

    def __init__(self) -> None:
        self.turn, self.idle = Turn(), Idle()
        self.plan: Plan | None = None
        self.repeats = Repeats()
        # The class whose rule the plan follows: an object may get another one.
        self.cls: type | None = None
        # What graphs that hold former plans' steps will read.
        self.captured: list[Tensor] = []
        # Known while groups are added one after another; later the groups may be anything.
        self.taken: Taken | None = None
        # What somebody has set `_step_supports_amp_scaling` to.
        self.supports_scaling: bool | None = None
        # Whether a shallow copy is being made, which has the same state.
        self.is_shared = False
        self._warned: set[str] = set()

    def warn_once(self, message: str, key: str = "") -> None:
        """Warn, once for each message in an optimizer's life."""
        if (key or message) not in self._warned:
            self._warned.add(key or message)
            tell(message)

    def let_go(self, plan: Plan | None) -> None:
        """Take back what a plan has made without a step, and keep what graphs that hold its steps
        will read."""
        if plan is not None:
            plan.undo()
            self.captured += plan.captured
            self.repeats.forget()
        self.plan = None

    def follow(self, cls: type) -> None:
        """Let go what was made for another class."""
        if self.cls is not cls:
            self.let_go(self.plan)
            self.cls = cls

    def __reduce__(self) -> tuple[type[Private], tuple[()]]:
        return Private, ()

    def __deepcopy__(self, memo: Any) -> Private:
        return Private()


class Lazy:
    """Makes an optimizer's `Private` when it is asked for, as in objects that no constructor of
    ours has made."""

    def __get__(self, optimizer: Any, cls: type) -> Any:
        return self if optimizer is None else vars(optimizer).setdefault("_onepass", Private())
