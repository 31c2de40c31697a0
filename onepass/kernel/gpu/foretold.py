"""Tables of uniforms that the host computes, sent for several steps at once.

Bias corrections change at every step, and with them the uniforms. But while no option changes,
steps differ only in their number: so the tables of some steps to come are sent along, each time
twice as many as have been right before. Every step computes its own table all the same, and uses
what was foretold only if that is equal, bit for bit. Adam from its first step on:

    step                  1   2   3   4   5   6   7   8   9 ...  15  16 ...  31  32 ...
    tables sent along     1   2   -   4   -   -   -   8   - ...   -  16 ...   -  32 ...

Step 8 finds that the last of the 4 tables sent at step 4, for steps 4 to 7, is used up; it sends
those of steps 8 to 15, and then 7 steps send nothing. It goes on with 64 tables at a time. If the
user sets lr at step 20, the table of step 20 is not the one foretold: 1 table is sent, and step 21
begins with 2 again.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from .uploads import Device, Table

# Tables sent at once, at most.
MOST = 64
# A table begins at a multiple of this many bytes: Triton compiles a variant for pointers that do
# not.
ALIGNMENT = 16


class ForetoldUniforms:
    """The table of uniforms of a launch (settings, inputs), as each step needs it."""

    def __init__(
        self,
        device: Device,
        captured: list[Tensor],
        compute: Callable[[np.ndarray], np.ndarray],
        step: int | None,
    ) -> None:
        """Begin with nothing sent.

        `compute` makes uniforms (settings, inputs) of leaves (leaf, setting); `step` is the index
        of the leaf that counts steps, None if there is none; `captured` is that of `Table`.
        """
        self.compute = compute
        self.step = step
        self.table = Table(device, captured)
        # The tables that have been sent, and which of them the last step used.
        self._told: list[bytes] = []
        self._current = 0
        # The same for the device: (steps, values of a table, with room up to ALIGNMENT).
        self._sent: np.ndarray
        self._stride = 0

    def on_device(self, leaves: np.ndarray) -> Tensor:
        """Return the uniforms for these leaves, flat; they are sent now unless they are there."""
        uniforms = self.compute(leaves)
        index = self._find(uniforms.tobytes())
        if index is None:
            # As many again as have been right; one if the last ones were not.
            steps = 1
            if self.step is not None and self._current + 1 == len(self._told):
                steps = min(2 * len(self._told), MOST)
            self._tell(leaves, uniforms, steps)
            index = 0
        self._current = index
        return self.table.on_device(self._sent)[index * self._stride :]

    def _find(self, content: bytes) -> int | None:
        """Return which table has this content: the last step's, or the one after it."""
        for index in (self._current, self._current + 1):
            if index < len(self._told) and self._told[index] == content:
                return index
        return None

    def _tell(self, leaves: np.ndarray, uniforms: np.ndarray, steps: int) -> None:
        """Compute the tables of this many steps, of which the first is `uniforms`."""
        if steps > 1:
            settings = leaves.shape[1]
            ahead = np.tile(leaves, steps)
            ahead[self.step] += np.repeat(np.arange(steps), settings)
            uniforms = self.compute(ahead)
        tables = uniforms.reshape(steps, -1)
        self._told = [table.tobytes() for table in tables]
        values = tables.shape[1]
        multiple = ALIGNMENT // tables.itemsize
        self._stride = -(-values // multiple) * multiple
        self._sent = np.zeros((steps, self._stride), tables.dtype)
        self._sent[:, :values] = tables
        self._sent.setflags(write=False)
