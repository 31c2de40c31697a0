"""How the work of a batch is cut, and its launches laid out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import kernel

# How many sets of parameters with gradients are known: some alternate, as experts do.
MOST_WORKS = 8


class Works:
    """What is laid out for each set of parameters without a gradient, and the set of this step.

    `inactive` are the indices of those without a gradient. `active` has 1.0 for each of the others,
    0.0 for these. `work` is how the step is cut, in which these have no elements. `launches` are
    those that have been laid out, by the indices.
    """

    def __init__(
        self, compiled: kernel.Kernel, sizes: np.ndarray, work: Any, let_go: Callable[[Any], None]
    ) -> None:
        """Begin with all parameters active: `work` is how their `sizes` are cut.

        `let_go` is called with each launch that is forgotten.
        """
        self._kernel, self._sizes, self._let_go = compiled, sizes, let_go
        self._works: dict[tuple[int, ...], Any] = {(): work}
        self.launches: dict[tuple[int, ...], Any] = {}
        self._use([])

    def activate(self, inactive: list[int]) -> None:
        """Step all parameters but these."""
        if inactive == self.inactive:
            return
        key = tuple(inactive)
        if key not in self._works:
            if len(self._works) >= MOST_WORKS:
                self._forget(next(iter(self._works)))
            sizes = self._sizes.copy()
            sizes[inactive] = 0
            self._works[key] = self._kernel.split(sizes)
        self._use(inactive)

    def _use(self, inactive: list[int]) -> None:
        self.inactive, self.work = inactive, self._works[tuple(inactive)]
        self.active = np.ones(len(self._sizes))
        self.active[inactive] = 0.0

    def _forget(self, key: tuple[int, ...]) -> None:
        del self._works[key]
        launch = self.launches.pop(key, None)
        if launch is not None:
            self._let_go(launch)

    def launch(self, pointers: np.ndarray, setting_index: np.ndarray, settings: int) -> Any:
        """Return a launch for the parameters that are active, with so many settings.

        The arguments are those of `Kernel.prepare`.
        """
        key = tuple(self.inactive)
        known = self.launches.get(key)
        if known is not None:
            has_room = known.leaves.shape[1] == settings
            if has_room and np.array_equal(known.setting_index, setting_index):
                return known
        laid_out = self._kernel.prepare(pointers, self.work, setting_index, settings)
        self.launches[key] = laid_out
        return laid_out
