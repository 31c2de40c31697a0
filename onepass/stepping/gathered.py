"""What a batch of kernels has read for one step."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import Tensor


class Gathered:
    """The tensors of one launch. It lives no longer than the step: it keeps them alive meanwhile.

    Adam on two parameters: `tensors` is [g0, g1, p0, p1, exp_avg0, exp_avg1, exp_avg_sq0,
    exp_avg_sq1, step0, step1]. They are compared with what is expected as this one list.
    """

    __slots__ = ("count", "tensors")

    def __init__(self, grads: Sequence[Tensor | None], params: Sequence[Tensor]) -> None:
        """Begin with gradients and parameters; states and numbers follow, column by column."""
        self.count = len(params)
        self.tensors: list[Any] = [*grads, *params]

    def add(self, column: Iterable[Any]) -> None:
        """Add an entry of all states, in the order of the parameters."""
        self.tensors += column

    def gradient(self, i: int) -> Tensor | None:
        """Return a parameter's gradient, or the copy that stands for it."""
        return self.tensors[i]

    def param(self, i: int) -> Tensor:
        """Return a parameter, or the copy that stands for it."""
        return self.tensors[self.count + i]

    def replace_gradient(self, i: int, copy: Tensor) -> None:
        """Let a copy stand for a gradient."""
        self.tensors[i] = copy

    def replace_param(self, i: int, copy: Tensor) -> None:
        """Let a copy stand for a parameter."""
        self.tensors[self.count + i] = copy

    def columns(self, begin: int, end: int, missing: Collection[int]) -> list[Tensor]:
        """Return the tensors of these columns, without those of the `missing` parameters.

        Column 0 has the gradients, 1 the parameters.
        """
        found = self.tensors[begin * self.count : end * self.count]
        if missing:
            found = [t for i, t in enumerate(found) if i % self.count not in missing]
        return found
