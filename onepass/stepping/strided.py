"""Parameters whose memory has holes, as that of every second column of a matrix."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from torch import Tensor

from .. import kernel
from .gathered import Gathered
from .recipe import Recipe


class Strided:
    """Those of a batch's parameters that are stepped as dense copies, which are then put back.

    `facts` has what each of them must be, by its index among the parameters.
    """

    def __init__(self, params: Sequence[Tensor], recipe: Recipe) -> None:
        """Find the parameters that a recipe's kernel cannot walk as they are."""
        self.facts = {i: kernel.facts_of(p) for i, p in enumerate(params) if not recipe.fits(p)}
        # Where each begins in this step, and how many bytes there are to the end of its last
        # element.
        self._places: dict[int, tuple[int, int]] = {}

    def __bool__(self) -> bool:
        return bool(self.facts)

    def copy(self, gathered: Gathered) -> bool:
        """Let dense copies stand for them; False if one is not what it was."""
        for i, facts in self.facts.items():
            p = gathered.param(i)
            if not kernel.is_as(p, facts):
                return False
            self._places[i] = p.data_ptr(), kernel.extent(p)
            gathered.replace_param(i, p.detach().contiguous())
        return True

    def correct(self, values: np.ndarray, which: int) -> np.ndarray:
        """Return the parameters' addresses (0) or bytes (1) with their own, not those of copies."""
        if not self.facts:
            return values
        values = values.copy()
        for i in self.facts:
            values[i] = self._places[i][which]
        return values

    def are_as_read(self, params: Sequence[Tensor]) -> bool:
        """Whether they are still what they were, and where."""
        for i, facts in self.facts.items():
            if not kernel.is_as(params[i], facts) or params[i].data_ptr() != self._places[i][0]:
                return False
        return True

    def put_back(
        self, params: Sequence[Tensor], gathered: Gathered, inactive: Collection[int]
    ) -> None:
        """Copy what has stepped into the parameters."""
        for i in set(self.facts).difference(inactive):
            params[i].detach().copy_(gathered.param(i))
