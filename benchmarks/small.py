"""The host's part of a step: small models, many small tensors, and what one tensor more costs.

    python benchmarks/small.py                      # 1 and 2 threads, about 4 minutes
    python benchmarks/small.py --rows "1000|EMA"    # only what this pattern is found in

Each row is one run in which onepass and torch take turns; its number is a ratio of medians, or the
microseconds of a median. `benchmarks/small.json` gets all of them, with the machine and the date.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.optim.swa_utils as theirs
from torch import Tensor, nn

import onepass
from onepass import swa_utils as ours
from onepass.app.bench import measure, turns
from onepass.app.bench.contenders import Workload
from onepass.app.bench.goals import ADAM
from onepass.app.bench.machine import describe_machine, time_of
from onepass.app.bench.shapes import MODELS
from onepass.app.catalog import find_variant

SMALL = ("one", "mlp", "lenet")
FUSED = ("sgd", "sgd-momentum", "adam", "adamw", "adagrad")
UNFUSED = ("rmsprop", "nadam", "radam", "adamax", "adadelta", "asgd", "rprop", "adafactor")
HERE = Path(__file__).parent


class Row(NamedTuple):
    """What is measured, and what it should be: at least `goal`, or with `at_most` at most."""

    title: str
    goal: float
    take: Callable[[], float]
    at_most: bool = False
    unit: str = "x"


def take_turns(steps: dict[str, Callable[[], object]], seconds: float = 1.5) -> dict[str, float]:
    """Return the median microseconds of each, one step after the other: none finds its caches
    warm."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(3):
        for step in steps.values():
            step()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(times))]) < 15:
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return {name: 1e6 * statistics.median(taken) for name, taken in times.items()}


def warm_median(step: Callable[[], object], blocks: int = 15) -> float:
    """Return the microseconds of a step among its like: the median of blocks."""
    taken = []
    for _ in range(blocks):
        start = time.perf_counter()
        for _ in range(200):
            step()
        taken.append((time.perf_counter() - start) / 200)
    return 1e6 * statistics.median(taken)


def make_params(count: int, *shape: int) -> list[nn.Parameter]:
    """Return parameters that have gradients."""
    params = [nn.Parameter(torch.randn(shape)) for _ in range(count)]
    for p in params:
        p.grad = 1e-3 * torch.randn(shape)
    return params


def beside_fused(name: str, count: int, *shape: int, **options: Any) -> float:
    """Return how many times as long torch's fused step takes as ours."""
    mine, yours = make_params(count, *shape), make_params(count, *shape)
    steps = {
        "onepass": getattr(onepass, name)(mine, lr=1e-3, **options).step,
        "torch": getattr(torch.optim, name)(yours, lr=1e-3, fused=True, **options).step,
    }
    found = take_turns(steps)
    return found["torch"] / found["onepass"]


def beside_one_group(name: str) -> float:
    """Return how many times as long a step takes in 400 groups as in one."""
    mine, yours = make_params(1000, 64, 64), make_params(1000, 64, 64)
    cls = getattr(onepass, name)
    groups = [{"params": mine[i::400], "lr": 1e-3 * (1 + i / 400)} for i in range(400)]
    found = take_turns({"400 groups": cls(groups).step, "one": cls(yours).step})
    return found["400 groups"] / found["one"]


def beside_torchs_average() -> float:
    """Return how many times as long torch's EMA of 1000 tensors of 16 takes as ours."""
    lists: list[list[Tensor]] = [[torch.randn(16) for _ in range(1000)] for _ in range(4)]
    steps = {
        "onepass": partial(ours.get_ema_multi_avg_fn(0.99), lists[0], lists[1], 1),
        "torch": partial(theirs.get_ema_multi_avg_fn(0.99), lists[2], lists[3], 1),
    }
    timed = {name: partial(time_of, step) for name, step in steps.items()}
    found = turns.take_turns(timed, 2.0)
    return found["torch"]["median_ms"] / found["onepass"]["median_ms"]


def step_of(name: str, count: int) -> Callable[[], object]:
    step = getattr(onepass, name)(make_params(count, 16), lr=1e-3).step
    for _ in range(5):
        step()
    return step


def cost_of_a_tensor(name: str) -> float:
    """Return the microseconds of one tensor more, from 10 to 100 tensors, in warm caches."""
    few, many = (warm_median(step_of(name, count)) for count in (10, 100))
    return (many - few) / 90


def beside_best(model: str, name: str) -> float:
    """Return how many times as long the best mode of torch takes as ours."""
    result = measure.measure(Workload(MODELS[model]), find_variant(name), seconds=1.5)
    return result["summary"]["times_best"]


def list_rows() -> Iterator[Row]:
    """Yield all rows."""
    for model in SMALL:
        for name in FUSED:
            is_adam = find_variant(name).cls.__name__ in ADAM and model != "one"
            goal = 1.5 if is_adam else 1.0
            yield Row(
                f"{model}, {name}: torch's best mode", goal, partial(beside_best, model, name)
            )
        for name in UNFUSED:
            yield Row(f"{model}, {name}: torch's best mode", 2.0, partial(beside_best, model, name))
    for name in ("SGD", "AdamW"):
        yield Row(
            f"a step of 1 tensor of 16, {name}",
            15.0,
            lambda name=name: warm_median(step_of(name, 1)),
            at_most=True,
            unit="us",
        )
        take = partial(cost_of_a_tensor, name)
        yield Row(f"a tensor more, {name}", 0.12, take, at_most=True, unit="us")
    yield Row(
        "1000 tensors of 16, AdamW: torch's fused", 12.0, partial(beside_fused, "AdamW", 1000, 16)
    )
    for name, goal in (("AdamW", 4.0), ("SGD", 3.0)):
        yield Row(
            f"1000 tensors of 64x64, {name}: torch's fused",
            goal,
            partial(beside_fused, name, 1000, 64, 64),
        )
        yield Row(
            f"1000 tensors of 64x64 in 400 groups, {name}: one group",
            1.25,
            partial(beside_one_group, name),
            at_most=True,
        )
    yield Row("EMA of 1000 tensors of 16: torch's", 6.0, beside_torchs_average)
    for title, options in (("SGD", {}), ("SGD with momentum", {"momentum": 0.9})):
        yield Row(
            f"10 tensors of 4 M, {title}: torch's fused",
            1.0,
            partial(beside_fused, "SGD", 10, 2000, 2000, **options),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="", help="a pattern of titles")
    parser.add_argument("--threads", default="1,2")
    arguments = parser.parse_args()
    threads = [int(count) for count in arguments.threads.split(",")]
    rows = [row for row in list_rows() if re.search(arguments.rows, row.title)]
    found: dict[str, Any] = {"machine": describe_machine(), "rows": []}
    print("| | goal | " + " | ".join(f"{count} threads" for count in threads) + " |")
    print("|---|---|" + "---|" * len(threads))
    for row in rows:
        values = []
        for count in threads:
            torch.set_num_threads(count)
            values.append(row.take())
        sign = "<=" if row.at_most else ">="
        cells = []
        for value in values:
            met = value <= row.goal if row.at_most else value >= row.goal
            cells.append(f"{value:.2f} {row.unit}" + ("" if met else " (not met)"))
        print(f"| {row.title} | {sign} {row.goal:g} {row.unit} | {' | '.join(cells)} |", flush=True)
        found["rows"].append(
            {"title": row.title, "goal": row.goal, "at_most": row.at_most, "unit": row.unit}
            | {"by_threads": dict(zip(map(str, threads), values, strict=True))}
        )
    if not arguments.rows:
        measure.save(found, HERE / "small.json")


if __name__ == "__main__":
    main()
