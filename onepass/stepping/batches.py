"""What every batch can do, whatever steps its parameters: kernels, a device, torch's operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .gradient_factor import GradientFactor
from .ledger import Ledger
from .reading import Reading
from .scratch import Scratch

# What computes a parameter's new values later, after the position of the parameter.
Delayed = tuple[int, Callable[[], None]]


@dataclass
class Step:
    """One step, as all batches of a plan take it.

    `fresh` are the positions of the parameters whose state has just been made; those that step are
    not fresh any more. In `scratch` parameters that share memory see one another's new values.
    """

    reading: Reading
    fresh: set[int]
    gradient_factor: GradientFactor
    scratch: Scratch | None = None


class Batch(Protocol):
    """Parameters that step together: `gather`, `begin`, `finish`; or `cancel`, and nothing changes.

    What `gather` has returned is given back to the others. It is the batch's own.
    """

    @property
    def refused_rate(self) -> tuple[int, float] | None:
        """A group with a learning rate that the constructor would refuse, and the rate, if any."""
        ...

    @property
    def demand(self) -> int:
        """How many elements of memory `begin` takes: who takes most begins first."""
        ...

    def gather(self, reading: Reading) -> Any | None:
        """Read all that the step depends on, and change nothing.

        Returns None if the batch does not fit what is there now. Raises `StepError` if none could.
        """
        ...

    def starts(self) -> np.ndarray:
        """Return where what the step writes begins in memory, as addresses."""
        ...

    def stretches(self) -> tuple[np.ndarray, np.ndarray]:
        """Return how many bytes begin at each of `starts`, and the position of their parameter."""
        ...

    def begin(self, gathered: Any, step: Step) -> Sequence[Delayed]:
        """Do what may fail, and store nothing.

        Returns what must be computed in the order of the whole optimizer, across its batches.
        """
        ...

    def is_as_read(self, gathered: Any, reading: Reading) -> bool:
        """Whether what was gathered is still what it was: others have computed meanwhile."""
        ...

    def store_refusing(self, ledger: Ledger) -> bool:
        """Store what may refuse to be stored, so that it can be taken back.

        Returns whether there was any.
        """
        ...

    def finish(self, gathered: Any, step: Step) -> None:
        """Store what was begun. Nothing here may fail."""
        ...

    def cancel(self) -> None:
        """Let go what has begun and will not be finished."""
        ...
