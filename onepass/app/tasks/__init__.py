"""What `onepass train` trains: real data, small models, one file each."""

from __future__ import annotations

import difflib

from .cifar10 import CIFAR10
from .digits import DIGITS
from .task import Data, Examples, Metric, Task, TaskError
from .text import TEXT

__all__ = ["TASKS", "Data", "Examples", "Metric", "Task", "TaskError", "find_task"]

TASKS: dict[str, Task] = {task.name: task for task in (DIGITS, TEXT, CIFAR10)}


def find_task(name: str) -> Task:
    """The task called `name`; `TaskError` with the nearest names when there is none."""
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name.lower(), TASKS, n=1)
    advice = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(TASKS)}."
    raise TaskError(f"there is no task {name!r}: {advice}")
