"""What onepass wants to reach, and whether a result does.

Which classes a goal is for follows from the catalog and from torch, so that a new algorithm has
goals when it is there.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from .suite import list_elementwise_classes

__all__ = ["HOST_US", "Goal", "cpu_goals", "find_goals", "gpu_goals", "judge"]

Result = dict[str, Any]

# Its step reads the average, too, so that it is less faster than the others are.
AVERAGED = "ASGD"
# Torch's fused step has most to do for each of their tensors.
ADAM = ("Adam", "AdamW")
# On a GPU torch has fused kernels for fewer classes than on CPU.
FUSED_ON_GPU = ("Adam", "AdamW", "SGD")
# Models whose memory bounds a step on a GPU, and models whose many tensors do.
WHOLE = ("gpt2", "llama3-1b")
MANY = ("small", "groups100")
# Microseconds on the host that a step on a GPU may take: for itself, and for each tensor.
HOST_US = (30.0, 0.1)


@dataclass(frozen=True)
class Goal:
    """A bound of `what` in a result's summary, for each of these classes on each of these models.

    The value should be at least `bound`, or with `at_most` at most.
    """

    models: tuple[str, ...]
    classes: tuple[str, ...]
    what: str
    bound: float
    at_most: bool = False

    def judge(self, value: float) -> dict[str, Any]:
        """Return the goal beside a value, as plain data."""
        met = value <= self.bound if self.at_most else value >= self.bound
        return {
            "what": self.what,
            "value": value,
            "bound": self.bound,
            "at_most": self.at_most,
            "met": met,
        }


def _has_fused_kernel(class_name: str) -> bool:
    """Whether torch has such a class with a fused kernel, so that it walks over memory once."""
    cls = getattr(torch.optim, class_name, None)
    return cls is not None and "fused" in inspect.signature(cls).parameters


def _split_by_torch() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the elementwise classes that torch has fused kernels for, and the other ones.

    `AVERAGED` is in neither, because its goals are its own.
    """
    fused = []
    unfused = []
    for name in list_elementwise_classes():
        if _has_fused_kernel(name):
            fused.append(name)
        elif name != AVERAGED:
            unfused.append(name)
    return tuple(fused), tuple(unfused)


@cache
def cpu_goals() -> tuple[Goal, ...]:
    """Return the goals on a CPU."""
    elementwise = list_elementwise_classes()
    fused, unfused = _split_by_torch()
    fused_without_adam = tuple(name for name in fused if name not in ADAM)
    not_sgd = tuple(name for name in elementwise if name != "SGD")
    return (
        Goal(("big", "gpt2"), elementwise, "share_of_limit", 0.95),
        Goal(("big", "gpt2"), fused, "times_best", 1.0),
        Goal(("big",), unfused, "times_default", 6.0),
        Goal(("gpt2",), unfused, "times_best", 3.0),
        Goal(("big",), (AVERAGED,), "times_default", 2.5),
        Goal(("gpt2",), (AVERAGED,), "times_best", 2.0),
        Goal(("one",), elementwise, "us_per_tensor", 15.0, at_most=True),
        Goal(("one",), fused, "times_best", 1.0),
        Goal(("mlp", "lenet"), fused_without_adam, "times_best", 1.0),
        Goal(("mlp", "lenet"), ADAM, "times_best", 1.5),
        Goal(("one", "mlp", "lenet"), (*unfused, AVERAGED, "Adafactor"), "times_best", 2.0),
        Goal(("small",), ("SGD",), "times_best", 3.0),
        Goal(("tiny",), ("SGD",), "times_best", 1.5),
        Goal(("small", "tiny"), not_sgd, "times_best", 5.0),
        Goal(("big", "gpt2", "small", "tiny"), ("Adafactor",), "times_best", 3.0),
        Goal(("matrices",), ("Muon",), "times_best", 1.0),
        Goal(("tiny", "million"), ("LBFGS",), "times_best", 1.0),
        Goal(("embedding-1m", "embedding-10k"), ("SparseAdam",), "times_best", 2.0),
        # The time of a step depends on its rows, not on how many the table has.
        Goal(("embedding-1m",), ("SparseAdam",), "times_shorter_table", 1.25, at_most=True),
    )


@cache
def gpu_goals() -> tuple[Goal, ...]:
    """Return the goals on a GPU."""
    elementwise = list_elementwise_classes()
    with_adafactor = (*elementwise, "Adafactor")
    beside_foreach = tuple(name for name in with_adafactor if name not in FUSED_ON_GPU)
    return (
        Goal(WHOLE, ("AdamW",), "share_of_limit", 0.92),
        Goal(WHOLE, ("AdamW",), "times_fused", 1.0),
        Goal(WHOLE, ("AdamW",), "times_default", 2.5),
        Goal(("gpt2", "big"), beside_foreach, "times_foreach", 3.0),
        Goal(("groups100",), FUSED_ON_GPU, "times_fused", 10.0),
        # 1 if a step takes as long on the host as it may.
        Goal((*WHOLE, *MANY), elementwise, "host_of_goal", 1.0, at_most=True),
        Goal(("gpt2",), with_adafactor, "first_s", 3.0, at_most=True),
        Goal(("gpt2",), with_adafactor, "warm_s", 0.3, at_most=True),
        # Only tables: next to nothing beside the parameters.
        Goal(WHOLE, elementwise, "peak_share", 0.01, at_most=True),
    )


def find_goals(model: str, class_name: str, goals: Sequence[Goal]) -> Iterator[Goal]:
    """Yield the goals of a class on a model."""
    for goal in goals:
        if model in goal.models and class_name in goal.classes:
            yield goal


def judge(results: Sequence[Result], goals: Sequence[Goal]) -> None:
    """Add to each result its goals, each with the value that it reached.

    A result's `goals` is a list of mappings: `what`, `value`, `bound`, `at_most` and `met`. Goals
    for what was not measured are left out.
    """
    our_times = {
        (result["model"], result["optimizer"]): result["contenders"]["onepass"]["median_ms"]
        for result in results
    }
    for result in results:
        summary = result["summary"]
        optimizer = result["optimizer"]
        shorter = our_times.get(("embedding-10k", optimizer))
        if result["model"] == "embedding-1m" and shorter is not None:
            summary["times_shorter_table"] = our_times["embedding-1m", optimizer] / shorter
        result["goals"] = [
            goal.judge(summary[goal.what])
            for goal in find_goals(result["model"], result["class"], goals)
            if summary.get(goal.what) is not None
        ]
