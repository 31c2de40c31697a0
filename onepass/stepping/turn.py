"""Threads that use one optimizer take turns."""

from __future__ import annotations

import os
import threading
from types import TracebackType
from typing import Any

from ..contract.values import StepError


class Turn:
    """A lock that a thread may take again while it holds it. A forked child finds it free; copies
    are free, too."""

    __slots__ = ("_depth", "_lock", "_process")

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._lock, self._depth, self._process = threading.RLock(), 0, os.getpid()

    def __enter__(self) -> Turn:
        if self._process != os.getpid():
            # A thread of the parent's held it, which does not exist here.
            self._begin()
        self._lock.acquire()
        self._depth += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._depth -= 1
        self._lock.release()

    def refuse_another(self, owner: str) -> None:
        """Raise `StepError` where the thread was in its turn already, in the middle of a step."""
        if self._depth > 1:
            raise StepError(
                f"{owner}: step() was called while this thread was within a step of the same "
                "optimizer, as from a rule or from an operation of a tensor's class; step when it "
                "is over"
            )

    def __reduce__(self) -> tuple[type[Turn], tuple[()]]:
        return Turn, ()

    def __deepcopy__(self, memo: Any) -> Turn:
        return Turn()
