"""What only a fresh process can tell about an optimizer: its first step, and the peak of memory of
a later one.

    python -m onepass.app.bench.probe MODEL OPTIMIZER CONTENDER THREADS [DEVICE]

prints one line of JSON. The peak is the kernel's own high-water mark of resident memory (VmHWM, set
back through /proc/self/clear_refs), so that it holds whatever allocates: torch, NumPy, LLVM or
Python. Memory that malloc keeps for later would hide a temporary tensor, so it is given back to the
system before. None where the system has no such mark.

On a GPU the peak is torch's count of the device's memory, above parameters, gradients and state:
what a step takes for a while, and what it keeps.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..catalog import find_variant
from .contenders import OURS, Workload, make_ours, make_torch
from .gpu import Gpu, find_gpu
from .shapes import MODELS

__all__ = ["peak_megabytes", "probe"]

STATUS = Path("/proc/self/status")


def probe(model: str, optimizer: str, contender: str, gpu: Gpu | None = None) -> dict[str, Any]:
    """The first step (optimizer's construction included), what its state alone costs, and a later
    step's peak."""
    workload, variant = (
        Workload(MODELS[model], "cpu" if gpu is None else gpu.device),
        find_variant(optimizer),
    )
    groups = workload.groups()
    wait = (lambda: None) if gpu is None else gpu.synchronize
    wait()
    before = 0 if gpu is None else gpu.allocated()
    start = time.perf_counter()
    made = (
        make_ours(variant, groups) if contender == OURS else make_torch(variant, groups, contender)
    )
    made.step()
    wait()
    first = time.perf_counter() - start
    state = [
        value
        for entry in made.state.values()
        for value in entry.values()
        if isinstance(value, Tensor)
    ]
    if gpu is None:
        peak = peak_megabytes(made.step)
    else:
        there = sum(value.nbytes for value in state if value.device == gpu.device)
        peak = max(0, gpu.peak_of(made.step) - before - there) / 1e6
    allocation = _time_allocation([value for value in state if value.numel() > 1], wait)
    return {
        "first_ms": 1e3 * first,
        "state_ms": 1e3 * allocation,
        "state_bytes": sum(value.nbytes for value in state),
        "peak_mb": peak,
    }


def _time_allocation(like: list[Tensor], wait: Callable[[], Any]) -> float:
    """Seconds to allocate such tensors and to write to them once: the system maps their pages at
    the first write."""
    start = time.perf_counter()
    fresh = [torch.zeros_like(t) for t in like]
    for t in fresh:
        t.zero_()
    wait()
    return time.perf_counter() - start


def peak_megabytes(step: Callable[[], Any]) -> float | None:
    """How far resident memory rises above its level before, at any moment of a step; in 10^6
    bytes."""
    step()
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _status("VmRSS")
        step()
        return (_status("VmHWM") - before) / 1e6
    except (OSError, KeyError):
        return None


def _status(name: str) -> int:
    fields = dict(line.split(":", 1) for line in STATUS.read_text(encoding="ascii").splitlines())
    return 1024 * int(fields[name].split()[0])


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[4]))
    print(json.dumps(probe(*sys.argv[1:4], gpu=find_gpu(*sys.argv[5:] or ["cpu"]))))
