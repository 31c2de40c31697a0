"""The time of one optimizer step on real shapes: ours, every mode of torch's, and what the memory
allows.

Contenders take turns in one process; the first step and the peak of memory are measured in fresh
processes. `run` returns plain data, which `save` writes as JSON; `onepass.app.bench.report` makes
tables and a picture of it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from ...kernel.graph.trace import Program
from ..catalog import CLOSURE, Variant
from .contenders import (
    LIMIT,
    MODES,
    OURS,
    OURS_CAPTURABLE,
    TORCH,
    Limit,
    Missing,
    Workload,
    make_capturable,
    make_ours,
    make_torch,
    program_of,
    seat,
)
from .descent import OPTIONS, Descent
from .goals import GOALS, GPU_GOALS, HOST_US, judge
from .gpu import Gpu, condense
from .machine import available_memory, describe_machine, measure_bandwidth, time_of
from .shapes import Model
from .suite import BenchError, Cell

__all__ = ["measure", "run", "save"]

SCHEMA = 2
FEWEST_TURNS, MOST_TURNS = 5, 200
# A contender takes several steps in its turn where they are short, so that the caches are its own
# for most of them.
TURN_SECONDS, TURN_STEPS = 5e-3, 10

Report = dict[str, Any]


def run(
    cells: Sequence[Cell],
    *,
    seconds: float = 8.0,
    fresh: bool = True,
    tell: Callable[[str], None] = lambda _: None,
    gpu: Gpu | None = None,
) -> Report:
    """Measure each optimizer on its model, all contenders together for about so many seconds.

    `fresh` adds what takes a process of its own: first steps, peaks of memory, import time. `tell`
    hears of progress. Without a `gpu` the CPU steps. Raises `BenchError` where a model does not fit
    into memory.
    """
    for cell in cells:
        check_memory(cell.model, cell.variant, gpu)
    report: Report = {"schema": SCHEMA, "machine": describe_machine()}
    if gpu is not None:
        report["machine"]["gpu"] = gpu.describe()
    report["bandwidth"] = measure_bandwidth() if gpu is None else gpu.bandwidth
    report["import_ms"] = measure_import() if fresh else None
    results: list[Report] = []
    report["results"] = results
    for model, together in groupby(cells, key=lambda cell: cell.model):
        row = list(together)
        workload = Workload(model, "cpu" if gpu is None else gpu.device)
        for cell in row:
            tell(f"{len(results) + 1} of {len(cells)}: {model.name}, {cell.variant.name}")
            results.append(measure(workload, cell.variant, seconds, gpu))
            workload.columns.clear()
        del workload
        for cell, result in zip(row, results[-len(row) :], strict=True):
            if fresh and cell.fresh:
                tell(f"{model.name}, {cell.variant.name}: first step and peak of memory")
                add_fresh(result, model, cell.variant, gpu)
    judge(results, GOALS if gpu is None else GPU_GOALS)
    return report


def check_memory(model: Model, variant: Variant, gpu: Gpu | None = None) -> None:
    """Raise `BenchError` where the columns, and two more that torch's foreach=True takes for a
    while, do not fit."""
    # LBFGS: its history, and about six vectors, for each of two.
    columns = (
        4 * (OPTIONS["history_size"] + 3)
        if variant.demand == CLOSURE
        else len(program_of(variant).columns) + 2
    )
    needed = columns * 4 * model.parameters
    free = available_memory() if gpu is None else gpu.free_memory()
    if free is not None and needed > free:
        raise BenchError(
            f"{model.name} with {variant.name} needs {needed / 2**30:.1f} GiB of memory and "
            f"{free / 2**30:.1f} GiB are free: choose a smaller model, or an optimizer with less "
            "state."
        )


def save(report: Report, path: Path) -> None:
    """Write the report as JSON; an interrupted write leaves what was there."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


# --- steps ----------------------------------------------------------------------------------------


def measure(workload: Workload, variant: Variant, seconds: float, gpu: Gpu | None = None) -> Report:
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
    found = race(workload, variant, seconds, gpu)
    contenders = found.pop("contenders")
    result |= found | {"contenders": {name: contenders[name] for name in list_contenders(gpu)}}
    return result | {"summary": summarize(result)}


def list_contenders(gpu: Gpu | None = None) -> tuple[str, ...]:
    """Who takes part, in the report's order."""
    return (OURS, *TORCH, LIMIT) if gpu is None else (OURS, OURS_CAPTURABLE, *MODES, LIMIT)


def race_steps(
    workload: Workload, variant: Variant, seconds: float, gpu: Gpu | None = None
) -> Report:
    """The times of all who step on the workload's own gradients, and the bytes that ours and the
    limit move."""
    start: Callable[[Callable[[], Any]], Callable[[], Any]]
    start = (lambda step: partial(time_of, step)) if gpu is None else gpu.timer
    ours = seat(workload, lambda params: make_ours(variant, params))
    timers = {OURS: start(ours.step)}
    contenders: dict[str, Report] = {}
    for name in list_contenders(gpu):
        try:
            if name == OURS_CAPTURABLE:
                timers[name] = start(
                    seat(workload, lambda params: make_capturable(variant, params)).step
                )
            elif name in MODES:
                theirs = seat(workload, lambda params, mode=name: make_torch(variant, params, mode))
                timers[name] = start(theirs.step)
        except Missing as missing:
            contenders[name] = {"missing": str(missing)}
    ours.step()
    moved: dict[str, list[int] | None] = {
        "bytes_per_parameter": None,
        "limit_bytes_per_parameter": None,
    }
    try:
        program = _program_of(workload.model, variant)
        if gpu is None:
            limit = Limit(program)
            _complete_columns(workload, ours, limit)
            timers[LIMIT] = start(limit.place(workload))
        else:
            contenders[LIMIT] = gpu.limit(program.bytes_per_parameter, workload.model.parameters)
        moved = {key: list(program.bytes_per_parameter) for key in moved}
    except Missing as missing:
        contenders[LIMIT] = {"missing": str(missing)}
    times = take_turns(timers, seconds) if gpu is None else take_turns(timers, seconds, condense)
    return moved | {"contenders": contenders | times}


def _program_of(model: Model, variant: Variant) -> Program:
    """What bounds a step by memory; raises `Missing` where something else does."""
    if model.rows:
        raise Missing("a step touches a few rows alone")
    program = program_of(variant, max(map(len, model.shapes)))
    if program.calls:
        raise Missing("a step is bound by products of matrices, not by memory")
    return program


def _complete_columns(workload: Workload, ours: torch.optim.Optimizer, limit: Limit) -> None:
    """Add the columns that could not be shared, and that ours has to itself."""
    for name in (
        c.name for c in limit.program.columns if c.name not in ("p", "g", *workload.columns)
    ):
        workload.columns[name] = [ours.state[p][name] for p in workload.params]


def race_descents(
    workload: Workload, variant: Variant, seconds: float, gpu: Gpu | None = None
) -> Report:
    """The times of those who step with a closure; without its own, and only where both have called
    it equally often."""
    descents = {
        OURS: Descent(workload.model, lambda params: make_ours(variant, params, **OPTIONS), gpu)
    }
    contenders: dict[str, Report] = {
        LIMIT: {"missing": "a step is many operations on vectors, not one pass"}
    }
    if gpu is not None:
        contenders[OURS_CAPTURABLE] = {"missing": "a step with a closure cannot be captured"}
    for mode in TORCH if gpu is None else MODES:
        try:
            make = partial(make_torch, variant, mode=mode, **OPTIONS)
            descents[mode] = Descent(workload.model, make, gpu)
        except Missing as missing:
            contenders[mode] = {"missing": str(missing)}
    contenders |= take_turns(
        {name: descent.time_step for name, descent in descents.items()}, seconds
    )
    ours = descents[OURS].evaluations
    for name, descent in descents.items():
        contenders[name]["evaluations"] = descent.evaluations
        if descent.evaluations != ours:
            contenders[name] = {
                "missing": f"it evaluated the closure {descent.evaluations} times, "
                f"onepass {ours} times"
            }
    return {
        "bytes_per_parameter": None,
        "limit_bytes_per_parameter": None,
        "contenders": contenders,
    }


def in_milliseconds(taken: Sequence[float]) -> Report:
    """What is reported of a contender's steps."""
    return {
        "median_ms": 1e3 * statistics.median(taken),
        "min_ms": 1e3 * min(taken),
        "steps": len(taken),
    }


def take_turns(
    timers: Mapping[str, Callable[[], Any]],
    seconds: float,
    report: Callable[[list[Any]], Report] = in_milliseconds,
) -> dict[str, Report]:
    """The times of each contender's steps, in turns, so that whatever else the machine does meets
    all alike.

    Each has an equal share of the time: a slow one takes fewer turns, at least five, spread evenly
    over the rounds.
    """
    steps, turns = {}, {}
    for name, timer in timers.items():
        timer()
        cost = time_of(timer)
        steps[name] = max(1, min(TURN_STEPS, int(TURN_SECONDS / cost)))
        turns[name] = int(seconds / len(timers) / (steps[name] * cost))
        turns[name] = max(FEWEST_TURNS, min(MOST_TURNS, turns[name]))
    times: dict[str, list[Any]] = {name: [] for name in timers}
    rounds = max(turns.values())
    for round_ in range(rounds):
        for name, timer in timers.items():
            if (round_ + 1) * turns[name] // rounds > round_ * turns[name] // rounds:
                taken = [timer() for _ in range(steps[name])]
                # The first of several finds the caches as another contender left them.
                times[name] += taken[1:] or taken
    return {name: report(taken) for name, taken in times.items()}


def summarize(result: Report) -> Report:
    """Ratios of medians (above 1: ours is faster), the share of the memory limit, and rates; None
    what cannot be."""
    median = {name: c["median_ms"] for name, c in result["contenders"].items() if "median_ms" in c}
    theirs = {mode: median[mode] for mode in TORCH if mode in median}
    best = min(theirs, key=lambda mode: theirs[mode], default=None)
    ours = median[OURS]
    rates = {
        name: sum(result[key]) * result["parameters"] / median[of] / 1e6
        if LIMIT in median
        else None
        for name, key, of in (
            ("gigabytes_per_second", "bytes_per_parameter", OURS),
            ("limit_gigabytes_per_second", "limit_bytes_per_parameter", LIMIT),
        )
    }
    summary = {
        "times_default": theirs["default"] / ours if "default" in theirs else None,
        "best_mode": best,
        "times_best": None if best is None else theirs[best] / ours,
        "times_fused": theirs["fused"] / ours if "fused" in theirs else None,
        "share_of_limit": median[LIMIT] / ours if LIMIT in median else None,
        **rates,
        "us_per_tensor": 1e3 * ours / result["tensors"],
    }
    if "host_ms" in result["contenders"][OURS]:
        summary["times_foreach"] = theirs["foreach"] / ours if "foreach" in theirs else None
        least, each = HOST_US
        summary["host_of_goal"] = (
            1e3 * result["contenders"][OURS]["host_ms"] / (least + each * result["tensors"])
        )
    return summary


# --- fresh processes ------------------------------------------------------------------------------


def add_fresh(result: Report, model: Model, variant: Variant, gpu: Gpu | None = None) -> None:
    """Add each contender's first step and peak of memory, from a process of its own."""
    known = (OURS, *TORCH) if gpu is None else (OURS, "default", "fused")
    for name, contender in result["contenders"].items():
        if name in known and "missing" not in contender:
            contender |= probe_fresh(model.name, variant.name, name, gpu)
    ours = result["contenders"][OURS]
    if gpu is not None:
        result["summary"] |= {"first_s": ours["first_ms"] / 1e3, "warm_s": ours["warm_ms"] / 1e3}
        result["summary"]["peak_share"] = ours["peak_mb"] * 1e6 / (4 * result["parameters"])


def probe_fresh(model: str, variant: str, contender: str, gpu: Gpu | None = None) -> Report:
    """What `probe` finds in a fresh process; on a GPU in two, of which the second has Triton's
    cache."""
    arguments = (
        "-m",
        "onepass.app.bench.probe",
        model,
        variant,
        contender,
        str(torch.get_num_threads()),
    )
    if gpu is None:
        return json.loads(_python(*arguments))
    with tempfile.TemporaryDirectory() as cache:
        arguments = *arguments, str(gpu)
        found = json.loads(_python(*arguments, TRITON_CACHE_DIR=cache))
        if contender == OURS:
            found["warm_ms"] = json.loads(_python(*arguments, TRITON_CACHE_DIR=cache))["first_ms"]
    return found


def measure_import(repeat: int = 5) -> float:
    """Milliseconds that `import onepass` takes where torch is imported already; the median of fresh
    processes."""
    code = (
        "import time, torch; start = time.perf_counter(); import onepass; "
        "print(time.perf_counter() - start)"
    )
    return 1e3 * statistics.median(float(_python("-c", code)) for _ in range(repeat))


def _python(*arguments: str, **variables: str) -> str:
    paths = [str(Path(__file__).parents[3]), os.getcwd(), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **variables}
    # With it, every start would compile the same modules anew, which is no part of a first step.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BenchError(
            f"a measurement in a fresh process ended with code {done.returncode}: {last}."
        )
    return done.stdout
