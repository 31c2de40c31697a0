"""What onepass wants to reach, and whether a result does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["GOALS", "GPU_GOALS", "HOST_US", "Goal", "find_goals", "judge"]

Result = dict[str, Any]

# torch has a fused kernel for these; for the others it walks memory several times.
FUSED = ("Adagrad", "Adam", "AdamW", "SGD")
UNFUSED = ("Adadelta", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop")
ELEMENTWISE = (*FUSED, *UNFUSED, "ASGD")


@dataclass(frozen=True)
class Goal:
    """For each of these classes on each of these models, `what` of a result's summary is at least
    `bound`."""

    models: tuple[str, ...]
    classes: tuple[str, ...]
    what: str
    bound: float
    at_most: bool = False

    def judge(self, value: float) -> dict[str, Any]:
        """The goal beside a value, as plain data."""
        met = value <= self.bound if self.at_most else value >= self.bound
        return {
            "what": self.what,
            "value": value,
            "bound": self.bound,
            "at_most": self.at_most,
            "met": met,
        }


GOALS = (
    Goal(("big", "gpt2"), ELEMENTWISE, "share_of_limit", 0.95),
    Goal(("big", "gpt2"), FUSED, "times_best", 1.0),
    Goal(("big",), UNFUSED, "times_default", 6.0),
    Goal(("gpt2",), UNFUSED, "times_best", 3.0),
    Goal(("big",), ("ASGD",), "times_default", 2.5),
    Goal(("gpt2",), ("ASGD",), "times_best", 2.0),
    Goal(("small",), ("SGD",), "times_best", 3.0),
    Goal(("tiny",), ("SGD",), "times_best", 1.5),
    Goal(("small", "tiny"), ("Adagrad", "Adam", "AdamW", *UNFUSED, "ASGD"), "times_best", 5.0),
    Goal(("big", "gpt2", "small", "tiny"), ("Adafactor",), "times_best", 3.0),
    Goal(("matrices",), ("Muon",), "times_best", 1.0),
    Goal(("tiny", "million"), ("LBFGS",), "times_best", 1.0),
    Goal(("embedding-1m", "embedding-10k"), ("SparseAdam",), "times_best", 2.0),
    # A step costs what its rows cost, however many the table has.
    Goal(("embedding-1m",), ("SparseAdam",), "times_shorter_table", 1.25, at_most=True),
)


# Microseconds on the host that a step may take: for itself, and for each tensor.
HOST_US = (60.0, 0.4)
# On a GPU torch fuses fewer.
FUSED_ON_GPU = ("Adam", "AdamW", "SGD")
WHOLE = ("gpt2", "llama3-1b")
MANY = ("small", "groups100")

GPU_GOALS = (
    Goal(WHOLE, ("AdamW",), "share_of_limit", 0.92),
    Goal(WHOLE, ("AdamW",), "times_fused", 1.0),
    Goal(WHOLE, ("AdamW",), "times_default", 2.5),
    Goal(("gpt2", "big"), ("Adagrad", *UNFUSED, "ASGD", "Adafactor"), "times_foreach", 3.0),
    Goal(("groups100",), FUSED_ON_GPU, "times_fused", 10.0),
    # 1 where a step takes as long on the host as it may.
    Goal((*WHOLE, *MANY), ELEMENTWISE, "host_of_goal", 1.0, at_most=True),
    Goal(("gpt2",), (*ELEMENTWISE, "Adafactor"), "first_s", 3.0, at_most=True),
    Goal(("gpt2",), (*ELEMENTWISE, "Adafactor"), "warm_s", 0.3, at_most=True),
    # Tables alone: next to nothing beside the parameters.
    Goal(WHOLE, ELEMENTWISE, "peak_share", 0.01, at_most=True),
)


def find_goals(model: str, class_name: str, goals: Sequence[Goal] = GOALS) -> Iterator[Goal]:
    """The goals of a class on a model."""
    return (goal for goal in goals if model in goal.models and class_name in goal.classes)


def judge(results: Sequence[Result], goals: Sequence[Goal] = GOALS) -> None:
    """Add to each result its goals, each with the value reached: `what`, `value`, `bound`,
    `at_most` and `met`."""
    times = {(r["model"], r["optimizer"]): r["contenders"]["onepass"]["median_ms"] for r in results}
    for result in results:
        shorter = times.get(("embedding-10k", result["optimizer"]))
        if result["model"] == "embedding-1m" and shorter is not None:
            result["summary"]["times_shorter_table"] = (
                result["contenders"]["onepass"]["median_ms"] / shorter
            )
        reached = result["summary"]
        own = find_goals(result["model"], result["class"], goals)
        result["goals"] = [g.judge(reached[g.what]) for g in own if reached.get(g.what) is not None]
