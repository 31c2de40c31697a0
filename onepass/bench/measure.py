"""The time of one optimizer step on real shapes: ours, every mode of torch's, and what the memory allows.

Contenders take turns in one process; the first step and the peak of memory are measured in fresh processes. `run`
returns plain data, which `save` writes as JSON; `onepass.bench.report` makes a table and a picture of it.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
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
from onepass.bench.shapes import MODELS, Model
from onepass.catalog import Variant, find_variant, nearest

__all__ = ["SUITE_MODELS", "SUITE_OPTIMIZERS", "BenchError", "choose", "run", "save"]

SUITE_MODELS = ("big", "gpt2", "small", "tiny", "groups")
SUITE_OPTIMIZERS = ("adamw", "adam-amsgrad", "sgd", "sgd-momentum")
SCHEMA = 1
# On CPU torch's default is the for-loop: one of the two is enough where each takes a process of its own.
FRESH = (OURS, "default", "foreach", "fused")
FEWEST_ROUNDS, MOST_ROUNDS = 5, 200
# A contender takes several steps in its turn where they are short, so that the caches are its own for most of them.
TURN_SECONDS, TURN_STEPS = 5e-3, 10

Report = dict[str, Any]


class BenchError(ValueError):
    """A benchmark that cannot be run; the message is a sentence for the user."""


def choose(models: str | None, optimizers: str | None) -> tuple[list[Model], list[Variant]]:
    """What to run, from names with commas between them; the suite where None is given. Raises `UnknownName`."""
    chosen = []
    for name in SUITE_MODELS if models is None else models.split(","):
        if name.strip().lower() not in MODELS:
            raise nearest("model", name.strip(), MODELS)
        chosen.append(MODELS[name.strip().lower()])
    names = SUITE_OPTIMIZERS if optimizers is None else optimizers.split(",")
    return chosen, [find_variant(name.strip()) for name in names]


def run(
    models: Sequence[Model],
    variants: Sequence[Variant],
    *,
    seconds: float = 8.0,
    fresh: bool = True,
    tell: Callable[[str], None] = lambda _: None,
) -> Report:
    """Measure every optimizer on every model, each for about so many seconds of steps.

    `fresh` adds what takes a process of its own: first steps, peaks of memory, import time. `tell` hears of progress.
    Raises `BenchError` where a model does not fit into memory.
    """
    for model in models:
        for variant in variants:
            check_memory(model, variant)
    report: Report = {"schema": SCHEMA, "machine": describe_machine(), "bandwidth": measure_bandwidth()}
    report["import_ms"] = measure_import() if fresh else None
    report["results"] = []
    for model in models:
        workload = Workload(model)
        for variant in variants:
            tell(f"{model.name}: {variant.name}")
            report["results"].append(measure(workload, variant, seconds))
            workload.columns.clear()
        del workload
        if fresh:
            for variant, result in zip(variants, report["results"][-len(variants) :], strict=True):
                tell(f"{model.name}: {variant.name}, first step and peak of memory")
                add_fresh(result, model, variant)
    return report


def check_memory(model: Model, variant: Variant) -> None:
    """Raise `BenchError` where the columns, and two more that torch's foreach=True takes for a while, do not fit."""
    needed = (len(program_of(variant).columns) + 2) * 4 * model.parameters
    free = available_memory()
    if free is not None and needed > free:
        raise BenchError(
            f"{model.name} with {variant.name} needs {needed / 2**30:.1f} GiB of memory and {free / 2**30:.1f} GiB are "
            "free: choose a smaller model, or an optimizer with less state."
        )


def available_memory() -> int | None:
    """Bytes that can be had without swapping, where the system says so."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


# --- steps -----------------------------------------------------------------------------------------------------------


def measure(workload: Workload, variant: Variant, seconds: float) -> Report:
    """One row of the report: all contenders on one model, and what follows from their times."""
    program = program_of(variant)
    ours = seat(workload, lambda params: make_ours(variant, params))
    steps: dict[str, Callable[[], Any]] = {OURS: ours.step}
    contenders: dict[str, Report] = {}
    for mode in TORCH:
        try:
            steps[mode] = seat(workload, lambda params, mode=mode: make_torch(variant, params, mode)).step
        except Missing as missing:
            contenders[mode] = {"missing": str(missing)}
    ours.step()
    limit = Limit(program)
    for name in (c.name for c in program.columns if c.name not in ("p", "g", *workload.columns)):
        workload.columns[name] = [ours.state[p][name] for p in workload.params]
    steps[LIMIT] = limit.place(workload)
    for name, times in take_turns(steps, seconds).items():
        contenders[name] = {
            "median_ms": 1e3 * statistics.median(times),
            "min_ms": 1e3 * min(times),
            "steps": len(times),
        }
    model = workload.model
    result: Report = {
        "model": model.name,
        "title": model.title,
        "optimizer": variant.name,
        "options": variant.options,
        "tensors": len(model.shapes),
        "parameters": model.parameters,
        "groups": model.groups,
        "bytes_per_parameter": list(program.bytes_per_parameter),
        "limit_bytes_per_parameter": list(limit.program.bytes_per_parameter),
        "contenders": {name: contenders[name] for name in (OURS, *TORCH, LIMIT)},
    }
    return result | {"summary": summarize(result)}


def take_turns(steps: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """The times of each contender's steps, in turns, so that whatever else the machine does meets all alike."""
    turn = {}
    for name, step in steps.items():
        step()
        step()
        turn[name] = max(1, min(TURN_STEPS, int(TURN_SECONDS / _time(step))))
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    for round_ in range(MOST_ROUNDS):
        if round_ >= FEWEST_ROUNDS and time.perf_counter() > end:
            break
        for name, step in steps.items():
            taken = [_time(step) for _ in range(turn[name])]
            # The first of several finds the caches as another contender left them.
            times[name] += taken[1:] or taken
    return times


def _time(step: Callable[[], Any]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def summarize(result: Report) -> Report:
    """Ratios of medians (above 1: ours is faster), the share of the memory limit, and rates."""
    median = {name: c["median_ms"] for name, c in result["contenders"].items() if "median_ms" in c}
    theirs = {mode: median[mode] for mode in TORCH if mode in median}
    best = min(theirs, key=lambda mode: theirs[mode], default=None)
    ours = median[OURS]
    moved, streamed = (
        sum(result[key]) * result["parameters"] for key in ("bytes_per_parameter", "limit_bytes_per_parameter")
    )
    return {
        "times_default": theirs["default"] / ours if "default" in theirs else None,
        "best_mode": best,
        "times_best": None if best is None else theirs[best] / ours,
        "times_fused": theirs["fused"] / ours if "fused" in theirs else None,
        "share_of_limit": median[LIMIT] / ours,
        "gigabytes_per_second": moved / ours / 1e6,
        "limit_gigabytes_per_second": streamed / median[LIMIT] / 1e6,
        "us_per_tensor": 1e3 * ours / result["tensors"],
    }


# --- fresh processes -------------------------------------------------------------------------------------------------


def add_fresh(result: Report, model: Model, variant: Variant) -> None:
    """Add each contender's first step and peak of memory, from a process of its own."""
    for name, contender in result["contenders"].items():
        if name not in FRESH or "missing" in contender:
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


# --- the machine -----------------------------------------------------------------------------------------------------


def measure_bandwidth(megabytes: int = 256, repeat: int = 7) -> Report:
    """GB/s of plain torch operations, to check the memory limit against: a copy, and an update in place.

    Read and written bytes are counted. A copy also reads, in most machines, the lines that it overwrites: its true
    traffic is then half as much again, while an update in place has read them anyway, as an optimizer has.
    """
    a, b = (torch.ones(megabytes * 2**18) for _ in range(2))

    def rate(step: Callable[[], Any]) -> float:
        step()
        return 2 * a.nbytes / min(_time(step) for _ in range(repeat)) / 1e9

    return {
        "copy_gigabytes_per_second": rate(lambda: b.copy_(a)),
        "update_gigabytes_per_second": rate(lambda: a.mul_(1.0)),
    }


def describe_machine() -> Report:
    """What a time depends on, besides the code."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "llvmlite")}
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
        if hasattr(os, "sysconf")
        else None,
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        **versions,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def save(report: Report, path: Path) -> None:
    """Write the report as JSON; an interrupted write leaves what was there."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
