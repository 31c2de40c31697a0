"""What a step has read of an optimizer, each thing once: another thread may change it at any
moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, repeat
from operator import attrgetter
from typing import Any

from torch import Tensor

from ..contract.values import Group, State

GRADIENT = attrgetter("grad")


class Reading:
    """The parameters of all groups in order, the gradient of each, and the state.

    It lives no longer than the step. Its tensors stay alive during the step, whatever becomes of
    them elsewhere.
    """

    def __init__(self, groups: list[Group], state: dict[Any, State]) -> None:
        self.groups, self.state = groups, state
        self.params: list[Tensor] = list(chain.from_iterable(group["params"] for group in groups))
        self.grads: list[Tensor | None] = [p.grad for p in self.params]
        self.read_state()

    def read_state(self) -> None:
        """Read which parameters have state, and each one's dict."""
        self.keys, self.entries = list(self.state), list(self.state.values())

    def has_state_of(self, count: int) -> bool:
        """Whether so many parameters had state, and none was cleared between two looks."""
        return len(self.keys) == len(self.entries) == count

    def state_of(self, p: Tensor) -> Any:
        """A parameter's state, an empty dict if it has none."""
        return self.state.get(p, {})

    def places(self) -> Mapping[int, int]:
        """Where in the state a parameter's entry is, by the parameter's id."""
        return {id(p): i for i, p in enumerate(self.keys)}


def fill_gradients_with_zeros(params: Sequence[Tensor]) -> None:
    """Set each parameter's gradient to zeros, detached from the graph that has computed it."""
    for p in params:
        if p.grad is None:
            continue
        if p.grad.grad_fn is not None:
            p.grad.detach_()
        else:
            p.grad.requires_grad_(False)
        p.grad.zero_()


def drop_gradients(params: Sequence[Tensor]) -> None:
    """Set each parameter's gradient to None, while other threads may read it or set another.

    When torch lets the last reference go, it frees the tensor in the middle of that, without the
    interpreter lock: a thread that reads `p.grad` meanwhile finds freed memory. So each gradient is
    held until its parameter has none. It is read and dropped within one C function, between whose
    parts no other thread runs.
    """
    dropped = zip(
        map(GRADIENT, params), map(setattr, params, repeat("grad"), repeat(None)), strict=False
    )
    held = list(dropped)
    held.clear()
