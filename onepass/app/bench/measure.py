"""The report of a benchmark: the time of an optimizer step on real shapes, and what follows.

`run` returns plain data, which `save` writes as JSON; `report` makes tables and `picture` a picture
of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from ..catalog import CLOSURE, Variant
from .contenders import LIMIT, OURS, TORCH, Workload
from .descent import LBFGS_OPTIONS
from .fresh import add_fresh, measure_import
from .goals import HOST_US, cpu_goals, gpu_goals, judge
from .gpu import Gpu
from .limit import program_of
from .machine import available_memory, describe_machine, measure_bandwidth
from .races import race
from .shapes import Model
from .suite import BenchError, Cell

__all__ = ["SCHEMA", "check_memory", "measure", "run", "save", "summarize"]

SCHEMA = 2

Report = dict[str, Any]
Result = dict[str, Any]


def run(
    cells: Sequence[Cell],
    *,
    seconds: float = 8.0,
    fresh: bool = True,
    tell: Callable[[str], None] = lambda _: None,
    gpu: Gpu | None = None,
) -> Report:
    """Measure each optimizer on its model, all contenders together for about `seconds`.

    `fresh` adds what takes a process of its own: first steps, peaks of memory, import time. `tell`
    hears of progress. Without a `gpu` the CPU steps. Raises `BenchError` if a model does not fit
    into memory, before anything is measured.
    """
    for cell in cells:
        check_memory(cell.model, cell.variant, gpu)
    report: Report = {"schema": SCHEMA, "machine": describe_machine()}
    if gpu is not None:
        report["machine"]["gpu"] = gpu.describe()
    report["bandwidth"] = measure_bandwidth() if gpu is None else gpu.bandwidth
    report["import_ms"] = measure_import() if fresh else None

    results: list[Result] = []
    for model, group in groupby(cells, key=lambda cell: cell.model):
        same_model = list(group)
        first = len(results)
        workload = Workload(model, "cpu" if gpu is None else gpu.device)
        for cell in same_model:
            tell(f"{len(results) + 1} of {len(cells)}: {model.name}, {cell.variant.name}")
            results.append(measure(workload, cell.variant, seconds, gpu))
            workload.columns.clear()
        # Fresh processes need its memory.
        del workload
        for cell, result in zip(same_model, results[first:], strict=True):
            if fresh and cell.fresh:
                tell(f"{model.name}, {cell.variant.name}: first step and peak of memory")
                add_fresh(result, model, cell.variant, gpu)
    report["results"] = results
    judge(results, cpu_goals() if gpu is None else gpu_goals())
    return report


def check_memory(model: Model, variant: Variant, gpu: Gpu | None = None) -> None:
    """Raise `BenchError` if a model's tensors do not fit into memory."""
    if variant.demand == CLOSURE:
        # Ours and torch's: two vectors for each entry of the history, and about six more.
        columns = 4 * (LBFGS_OPTIONS["history_size"] + 3)
    else:
        # torch's foreach=True takes two more columns for a while.
        columns = len(program_of(variant).columns) + 2
    needed = columns * 4 * model.parameters
    free = available_memory() if gpu is None else gpu.free_memory()
    if free is not None and needed > free:
        raise BenchError(
            f"{model.name} with {variant.name} needs {needed / 2**30:.1f} GiB of memory and "
            f"{free / 2**30:.1f} GiB are free: choose a smaller model, or an optimizer with less "
            "state."
        )


def save(report: Any, path: Path) -> None:
    """Write plain data as JSON; an interrupted write leaves what was there."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def measure(workload: Workload, variant: Variant, seconds: float, gpu: Gpu | None = None) -> Result:
    """Return one row of the report: all contenders on one model, and what follows from it."""
    model = workload.model
    result: Result = {
        "model": model.name,
        "title": model.title,
        "optimizer": variant.name,
        "class": variant.cls.__name__,
        "options": variant.options,
        "tensors": len(model.shapes),
        "parameters": model.parameters,
        "groups": model.groups,
    }
    result |= race(workload, variant, seconds, gpu)
    return result | {"summary": summarize(result)}


def summarize(result: Result) -> dict[str, Any]:
    """Return ratios of medians, the share of the memory limit, and rates.

    A ratio above 1 says that ours is faster. What cannot be computed is None.
    """
    medians = {
        name: contender["median_ms"]
        for name, contender in result["contenders"].items()
        if "median_ms" in contender
    }
    ours = medians[OURS]
    limit = medians.get(LIMIT)
    theirs = {mode: medians[mode] for mode in TORCH if mode in medians}
    best = min(theirs, key=lambda mode: theirs[mode], default=None)

    def times(mode: str | None) -> float | None:
        """Return how many times as long as ours a mode of torch takes; None if unknown."""
        return theirs[mode] / ours if mode in theirs else None

    summary = {
        "times_default": times("default"),
        "best_mode": best,
        "times_best": times(best),
        "times_fused": times("fused"),
        "share_of_limit": None if limit is None else limit / ours,
        "gigabytes_per_second": None,
        "limit_gigabytes_per_second": None,
        "us_per_tensor": 1e3 * ours / result["tensors"],
    }
    if limit is not None:
        moved = sum(result["bytes_per_parameter"]) * result["parameters"]
        moved_by_limit = sum(result["limit_bytes_per_parameter"]) * result["parameters"]
        summary["gigabytes_per_second"] = moved / ours / 1e6
        summary["limit_gigabytes_per_second"] = moved_by_limit / limit / 1e6
    host_ms = result["contenders"][OURS].get("host_ms")
    if host_ms is not None:
        least, for_each = HOST_US
        summary["times_foreach"] = times("foreach")
        summary["host_of_goal"] = 1e3 * host_ms / (least + for_each * result["tensors"])
    return summary
