"""Numbers of the parameters' states that the host keeps for a launch, as step counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .. import kernel


class HostNumbers:
    """Reads the numbers of a batch before a launch, and stores them after it.

    They are (names, parameters), in float64. `dtype` is what they are stored as.
    """

    def __init__(
        self, names: Sequence[str], pointers: np.ndarray, examples: Sequence[Tensor]
    ) -> None:
        """`pointers` (names, parameters; uint64) are read in each step.

        `examples` are such numbers: all are of one dtype.
        """
        wide = bool(examples) and examples[0].dtype == torch.float64
        self.dtype = np.dtype(np.float64 if wide else np.float32)
        self._names = tuple(names)
        self._stored = kernel.numbers_at(pointers, self.dtype)

    def read(self, active: np.ndarray) -> np.ndarray:
        """Return the numbers; those that count steps count this one, of parameters that step."""
        numbers = self._stored.read()
        if "step" in self._names:
            step = self._names.index("step")
            # Counted in the precision that the counts have.
            numbers[step] = (numbers[step] + active).astype(self.dtype)
        return numbers

    def store(self, scalars: Mapping[str, np.ndarray], active: np.ndarray) -> None:
        """Store what was read, with the new `scalars` of parameters that have stepped."""
        numbers = self._stored.values
        for name, new in scalars.items():
            index = self._names.index(name)
            numbers[index] = np.where(active, new, numbers[index])
        self._stored.write()
