"""The time of one optimizer step on real shapes: ours, every mode of torch's, and what the memory allows.

Contenders take turns in one process; the first step and the peak of memory are measured in fresh processes. `run`
returns plain data, which `save` writes as JSON; `onepass.bench.report` makes tables and a picture of it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from onepass.bench.contenders import (
    LIMIT,
    OURS,
    TORCH,
    Limit,
    Missing,
    Workload,
    make_ours,
    make_torch,
    program_of,
    seat,
)
from onepass.bench.descent import OPTIONS, Descent
from onepass.bench.goals import judge
from onepass.bench.machine import available_memory, describe_machine, measure_bandwidth, time_of
from onepass.bench.shapes import Model
from onepass.bench.suite import BenchError, Cell
from onepass.catalog import CLOSURE, Variant

__all__ = ["measure", "run", "save"]

SCHEMA = 2
FEWEST_TURNS, MOST_TURNS = 5, 200
# A contender takes several steps in its turn where they are short, so that the caches are its own for most of them.
TURN_SECONDS, TURN_STEPS = 5e-3, 10

Report = dict[str, Any]
# Takes a step and returns its seconds.
Timer = Callable[[], float]


def run(
    cells: Sequence[Cell], *, seconds: float = 8.0, fresh: bool = True, tell: Callable[[str], None] = lambda _: None
) -> Report:
    """Measure each optimizer on its model, all contenders together for about so many seconds.

    `fresh` adds what takes a process of its own: first steps, peaks of memory, import time. `tell` hears of progress.
    Raises `BenchError` where a model does not fit into memory.
    """
    for cell in cells:
        check_memory(cell.model, cell.variant)
    report: Report = {"schema": SCHEMA, "machine": describe_machine(), "bandwidth": measure_bandwidth()}
    report["import_ms"] = measure_import() if fresh else None
    results: list[Report] = []
    report["results"] = results
    for model, together in groupby(cells, key=lambda cell: cell.model):
        row = list(together)
        workload = Workload(model)
        for cell in row:
            tell(f"{len(results) + 1} of {len(cells)}: {model.name}, {cell.variant.name}")
            results.append(measure(workload, cell.variant, seconds))
            workload.columns.clear()
        del workload
        for cell, result in zip(row, results[-len(row) :], strict=True):
            if fresh and cell.fresh:
                tell(f"{model.name}, {cell.variant.name}: first step and peak of memory")
                add_fresh(result, model, cell.variant)
    judge(results)
    return report


def check_memory(model: Model, variant: Variant) -> None:
    """Raise `BenchError` where the columns, and two more that torch's foreach=True takes for a while, do not fit."""
    # LBFGS: its history, and about six vectors, for each of two.
    columns = 4 * (OPTIONS["history_size"] + 3) if variant.demand == CLOSURE else len(program_of(variant).columns) + 2
    needed = columns * 4 * model.parameters
    free = available_memory()
    if free is not None and needed > free:
        raise BenchError(
            f"{model.name} with {variant.name} needs {needed / 2**30:.1f} GiB of memory and {free / 2**30:.1f} GiB are "
            "free: choose a smaller model, or an optimizer with less state."
        )


def save(report: Report, path: Path) -> None:
    """Write the report as JSON; an interrupted write leaves what was there."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


# --- steps -----------------------------------------------------------------------------------------------------------


def measure(workload: Workload, variant: Variant, seconds: float) -> Report:
    """One row of the report: all contenders on one model, and what follows from their times."""
    model = workload.model
    result: Report = {
        "model": model.name,
        "title": model.title,
        "optimizer": variant.name,
        "class": variant.cls.__name__,
        "options": variant.options,
        "tensors": len(model.shapes),
        "parameters": model.parameters,
        "groups": model.groups,
    }
    race = race_descents if variant.demand == CLOSURE else race_steps
    found = race(workload, variant, seconds)
    contenders = found.pop("contenders")
    result |= found | {"contenders": {name: contenders[name] for name in (OURS, *TORCH, LIMIT)}}
    return result | {"summary": summarize(result)}


def race_steps(workload: Workload, variant: Variant, seconds: float) -> Report:
    """The times of all who step on the workload's own gradients, and the bytes that ours and the limit move."""
    model = workload.model
    ours = seat(workload, lambda params: make_ours(variant, params))
    timers: dict[str, Timer] = {OURS: partial(time_of, ours.step)}
    contenders: dict[str, Report] = {}
    for mode in TORCH:
        try:
            theirs = seat(workload, lambda params, mode=mode: make_torch(variant, params, mode))
            timers[mode] = partial(time_of, theirs.step)
        except Missing as missing:
            contenders[mode] = {"missing": str(missing)}
    ours.step()
    moved: dict[str, list[int] | None] = {"bytes_per_parameter": None, "limit_bytes_per_parameter": None}
    try:
        if model.rows:
            raise Missing("a step touches a few rows alone")
        program = program_of(variant, max(map(len, model.shapes)))
        limit = Limit(program)
        for name in (c.name for c in limit.program.columns if c.name not in ("p", "g", *workload.columns)):
            workload.columns[name] = [ours.state[p][name] for p in workload.params]
        timers[LIMIT] = partial(time_of, limit.place(workload))
        moved = {"bytes_per_parameter": list(program.bytes_per_parameter)}
        moved["limit_bytes_per_parameter"] = list(limit.program.bytes_per_parameter)
    except Missing as missing:
        contenders[LIMIT] = {"missing": str(missing)}
    return moved | {"contenders": contenders | take_turns(timers, seconds)}


def race_descents(workload: Workload, variant: Variant, seconds: float) -> Report:
    """The times of those who step with a closure; without its own, and only where both have called it equally often."""
    descents = {OURS: Descent(workload.model, lambda params: make_ours(variant, params, **OPTIONS))}
    contenders: dict[str, Report] = {LIMIT: {"missing": "a step is many operations on vectors, not one pass"}}
    for mode in TORCH:
        try:
            make = partial(make_torch, variant, mode=mode, **OPTIONS)
            descents[mode] = Descent(workload.model, make)
        except Missing as missing:
            contenders[mode] = {"missing": str(missing)}
    contenders |= take_turns({name: descent.time_step for name, descent in descents.items()}, seconds)
    ours = descents[OURS].evaluations
    for name, descent in descents.items():
        contenders[name]["evaluations"] = descent.evaluations
        if descent.evaluations != ours:
            contenders[name] = {
                "missing": f"it evaluated the closure {descent.evaluations} times, onepass {ours} times"
            }
    return {"bytes_per_parameter": None, "limit_bytes_per_parameter": None, "contenders": contenders}


def take_turns(timers: Mapping[str, Timer], seconds: float) -> dict[str, Report]:
    """The times of each contender's steps, in turns, so that whatever else the machine does meets all alike.

    Each has an equal share of the time: a slow one takes fewer turns, at least five, spread evenly over the rounds.
    """
    steps, turns = {}, {}
    for name, timer in timers.items():
        timer()
        cost = time_of(timer)
        steps[name] = max(1, min(TURN_STEPS, int(TURN_SECONDS / cost)))
        turns[name] = int(seconds / len(timers) / (steps[name] * cost))
        turns[name] = max(FEWEST_TURNS, min(MOST_TURNS, turns[name]))
    times: dict[str, list[float]] = {name: [] for name in timers}
    rounds = max(turns.values())
    for round_ in range(rounds):
        for name, timer in timers.items():
            if (round_ + 1) * turns[name] // rounds > round_ * turns[name] // rounds:
                taken = [timer() for _ in range(steps[name])]
                # The first of several finds the caches as another contender left them.
                times[name] += taken[1:] or taken
    return {
        name: {"median_ms": 1e3 * statistics.median(taken), "min_ms": 1e3 * min(taken), "steps": len(taken)}
        for name, taken in times.items()
    }


def summarize(result: Report) -> Report:
    """Ratios of medians (above 1: ours is faster), the share of the memory limit, and rates; None what cannot be."""
    median = {name: c["median_ms"] for name, c in result["contenders"].items() if "median_ms" in c}
    theirs = {mode: median[mode] for mode in TORCH if mode in median}
    best = min(theirs, key=lambda mode: theirs[mode], default=None)
    ours = median[OURS]
    rates = {
        name: sum(result[key]) * result["parameters"] / median[of] / 1e6 if LIMIT in median else None
        for name, key, of in (
            ("gigabytes_per_second", "bytes_per_parameter", OURS),
            ("limit_gigabytes_per_second", "limit_bytes_per_parameter", LIMIT),
        )
    }
    return {
        "times_default": theirs["default"] / ours if "default" in theirs else None,
        "best_mode": best,
        "times_best": None if best is None else theirs[best] / ours,
        "times_fused": theirs["fused"] / ours if "fused" in theirs else None,
        "share_of_limit": median[LIMIT] / ours if LIMIT in median else None,
        **rates,
        "us_per_tensor": 1e3 * ours / result["tensors"],
    }


# --- fresh processes -------------------------------------------------------------------------------------------------


def add_fresh(result: Report, model: Model, variant: Variant) -> None:
    """Add each contender's first step and peak of memory, from a process of its own."""
    for name, contender in result["contenders"].items():
        if name == LIMIT or "missing" in contender:
            continue
        found = _python("-m", "onepass.bench.probe", model.name, variant.name, name, str(torch.get_num_threads()))
        contender |= json.loads(found)


def measure_import(repeat: int = 5) -> float:
    """Milliseconds that `import onepass` takes where torch is imported already; the median of fresh processes."""
    code = "import time, torch; start = time.perf_counter(); import onepass; print(time.perf_counter() - start)"
    return 1e3 * statistics.median(float(_python("-c", code)) for _ in range(repeat))


def _python(*arguments: str) -> str:
    paths = [str(Path(__file__).parents[1]), os.getcwd(), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    # With it, every start would compile the same modules anew, which is no part of a first step.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BenchError(f"a measurement in a fresh process ended with code {done.returncode}: {last}.")
    return done.stdout
