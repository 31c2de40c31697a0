"""Rows of uniform values that the host computes: sent for several steps at once, while these come
as foretold.

Bias corrections change at every step, and with them the rows. But while no option changes, steps
differ in their number alone: so the rows of some steps to come are sent along, each time twice as
many as were right before. Every step computes its own rows all the same, and uses what was foretold
only if that is equal, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from .uploads import Device, Table

MOST = 64
# A row begins at a multiple of so many bytes: Triton compiles a variant for pointers that are at
# none.
ALIGNMENT = 16


class Rows:
    """The rows of a launch, one for each setting."""

    def __init__(
        self,
        device: Device,
        captured: list[Tensor],
        compute: Callable[[np.ndarray], np.ndarray],
        step: int | None,
    ) -> None:
        """`compute` makes rows (settings, inputs) of leaves (leaf, setting); `step` is the leaf
        that counts steps."""
        self.compute, self.step = compute, step
        self.table = Table(device, captured)
        self._told: list[bytes] = []
        self._at = 0
        self._stride = 0

    def on_device(self, leaves: np.ndarray) -> Tensor:
        """The rows for these leaves, sent now unless they are there already."""
        now = self.compute(leaves)
        content = now.tobytes()
        here = next(
            (i for i in (self._at, self._at + 1) if self._told[i : i + 1] == [content]), None
        )
        if here is None:
            # As many again as have been right, and one where the last ones were not.
            used_up = self._at + 1 == len(self._told)
            self._tell(
                leaves,
                now,
                min(2 * len(self._told), MOST) if used_up and self.step is not None else 1,
            )
            here = 0
        self._at = here
        return self.table.on_device(self._rows)[here * self._stride :]

    def _tell(self, leaves: np.ndarray, now: np.ndarray, count: int) -> None:
        """Compute the rows of so many steps, beginning with this one."""
        ahead = np.tile(leaves, count)
        if self.step is not None:
            ahead[self.step] += np.repeat(np.arange(count), leaves.shape[1])
        rows = (self.compute(ahead) if count > 1 else now).reshape(count, -1)
        self._told = [row.tobytes() for row in rows]
        per = ALIGNMENT // rows.itemsize
        self._stride = -(-rows.shape[1] // per) * per
        self._rows = np.zeros((count, self._stride), rows.dtype)
        self._rows[:, : rows.shape[1]] = rows
        self._rows.setflags(write=False)
