"""Which numbers the parameters of one launch have in common."""

from __future__ import annotations

import numpy as np


class Settings:
    """The distinct settings of a batch's parameters: their group, first step or not, and numbers.

    Example: four parameters, of groups 0, 0, 1 and 1, have stepped 5, 5, 5 and 2 times. That is
    three settings: (0, 0.0, 5), (1, 0.0, 2) and (1, 0.0, 5). Then `index` is [0, 0, 2, 1]: each
    parameter's setting. `groups` is [0, 1, 1], `firsts` [0.0, 0.0, 0.0], `numbers` [[5, 2, 5]].
    """

    def __init__(self, group_index: np.ndarray) -> None:
        """`group_index` says which group each parameter is of, among those of the batch."""
        self._group_index = group_index
        self.index = group_index
        self.groups = np.unique(group_index)
        self.firsts = np.zeros(len(self.groups))
        self.numbers = np.zeros((0, len(self.groups)))
        # One parameter of each setting, and for which work all of this is known.
        self._examples = np.zeros(0, np.int64)
        self._work: object = None

    def are_as_before(self, numbers: np.ndarray, active: np.ndarray, work: object) -> bool:
        """Whether the parameters that have stepped together so far do so now, as in most steps.

        Then only the numbers of the examples are read again. `numbers` are (names, parameters),
        `active` 0.0 for parameters that do not step. `work` is how the step is cut.
        """
        if self._work is not work:
            return False
        found = numbers[:, self._examples]
        same = found[:, self.index] == numbers
        if not (same | (active == 0)).all():
            return False
        self.numbers = found
        return True

    def find(self, numbers: np.ndarray, first: np.ndarray | None, work: object) -> None:
        """Find the settings; `first` has 1.0 for parameters that make their first step.

        In its first step a parameter has settings of its own. None says that none makes it.
        """
        firsts = np.zeros(len(self._group_index)) if first is None else first
        keys = np.stack([self._group_index, firsts, *numbers], axis=1)
        found, examples, index = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        self.index, self._examples = index.reshape(-1), examples
        self.groups = found[:, 0].astype(np.int64)
        self.firsts = found[:, 1].copy()
        self.numbers = found[:, 2:].T
        self._work = work if first is None else None

    def __len__(self) -> int:
        return len(self.groups)
