"""What takes a process of its own: first steps, peaks of memory, and the time of an import."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..catalog import Variant
from .contenders import OURS, TORCH
from .gpu import Gpu
from .shapes import Model
from .suite import BenchError

__all__ = ["add_fresh", "measure_import", "probe_fresh"]

# The folder of the package: what is measured is this copy of it.
ROOT = Path(__file__).parents[3]


def add_fresh(
    result: dict[str, Any], model: Model, variant: Variant, gpu: Gpu | None = None
) -> None:
    """Add each contender's first step and peak of memory to a result, each from a new process."""
    measured = (OURS, *TORCH) if gpu is None else (OURS, "default", "fused")
    for name, contender in result["contenders"].items():
        if name in measured and "missing" not in contender:
            contender |= probe_fresh(model.name, variant.name, name, gpu)
    if gpu is not None:
        result["summary"] |= summarize_fresh(result["contenders"][OURS], result["parameters"])


def summarize_fresh(probed: dict[str, Any], parameters: int) -> dict[str, float]:
    """Return what goals ask of a first step on a GPU: seconds, and a share of the parameters.

    `probed` is what `probe_fresh` returns; the model has this many float32 `parameters`.
    """
    return {
        "first_s": probed["first_ms"] / 1e3,
        "warm_s": probed["warm_ms"] / 1e3,
        "peak_share": probed["peak_mb"] * 1e6 / (4 * parameters),
    }


def probe_fresh(model: str, variant: str, contender: str, gpu: Gpu | None = None) -> dict[str, Any]:
    """Return what `probe` finds in a new process.

    On a GPU ours is probed in two, of which the second finds Triton's cache filled: `warm_ms`.
    """
    threads = str(torch.get_num_threads())
    arguments = ("-m", "onepass.app.bench.probe", model, variant, contender, threads)
    if gpu is None:
        return json.loads(_python(*arguments))
    arguments = (*arguments, str(gpu))
    with tempfile.TemporaryDirectory() as cache:
        found = json.loads(_python(*arguments, TRITON_CACHE_DIR=cache))
        if contender == OURS:
            again = json.loads(_python(*arguments, TRITON_CACHE_DIR=cache))
            found["warm_ms"] = again["first_ms"]
    return found


def measure_import(repeat: int = 5) -> float:
    """Return the milliseconds of `import onepass` after `import torch`: a median of processes."""
    code = (
        "import time, torch; start = time.perf_counter(); import onepass; "
        "print(time.perf_counter() - start)"
    )
    return 1e3 * statistics.median(float(_python("-c", code)) for _ in range(repeat))


def _python(*arguments: str, **variables: str) -> str:
    """Return what a new interpreter prints, with this copy of the package and these variables."""
    paths = [str(ROOT), os.getcwd(), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **variables}
    # With it, every start would compile the same modules again, which no first step does.
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
