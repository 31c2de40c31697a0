"""What `onepass train` can train: real data and small models, one file each."""

from __future__ import annotations

from ...contract.spelling import advise
from .cifar10 import CIFAR10
from .digits import DIGITS
from .task import Data, Examples, Metric, Task, TaskError
from .text import TEXT

__all__ = ["TASKS", "Data", "Examples", "Metric", "Task", "TaskError", "find_task"]

TASKS: dict[str, Task] = {task.name: task for task in (DIGITS, TEXT, CIFAR10)}


def find_task(name: str) -> Task:
    """Return the task of this name.

    Raises `TaskError` with the nearest name, or with all names, if there is none.
    """
    if name not in TASKS:
        advice = advise(name, TASKS, most=1, likeness=0.6)
        raise TaskError(f"there is no task {name!r}: {advice}")
    return TASKS[name]
