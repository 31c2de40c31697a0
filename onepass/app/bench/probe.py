"""What only a fresh process can tell about an optimizer: its first step, and a peak of memory.

    python -m onepass.app.bench.probe MODEL OPTIMIZER CONTENDER THREADS [DEVICE]

prints one line of JSON. The peak is that of a later step: the kernel's own high-water mark of
resident memory (VmHWM, set back through /proc/self/clear_refs). It holds whatever allocates: torch,
NumPy, LLVM or Python. Memory that malloc keeps for later would hide a temporary tensor, so it is
given back to the system before. It is None if the system has no such mark.

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
from .models import find_model

__all__ = ["peak_megabytes", "probe"]

STATUS = Path("/proc/self/status")
CLEAR_MARKS = Path("/proc/self/clear_refs")


def probe(model: str, optimizer: str, contender: str, gpu: Gpu | None = None) -> dict[str, Any]:
    """Return the times of the first step and of its state, the state's bytes, and a step's peak.

    `first_ms` includes the construction of the optimizer, `state_ms` is what only allocating such
    state takes, `peak_mb` is in 10^6 bytes.
    """
    workload = Workload(find_model(model), "cpu" if gpu is None else gpu.device)
    variant = find_variant(optimizer)
    groups = workload.groups()
    wait = (lambda: None) if gpu is None else gpu.synchronize
    wait()
    before = 0 if gpu is None else gpu.allocated()

    start = time.perf_counter()
    if contender == OURS:
        made = make_ours(variant, groups)
    else:
        made = make_torch(variant, groups, contender)
    made.step()
    wait()
    first_seconds = time.perf_counter() - start

    state = _tensors_of(made)
    if gpu is None:
        peak = peak_megabytes(made.step)
    else:
        on_device = sum(tensor.nbytes for tensor in state if tensor.device == gpu.device)
        peak = max(0, gpu.peak_of(made.step) - before - on_device) / 1e6
    state_seconds = _time_allocation([tensor for tensor in state if tensor.numel() > 1], wait)
    return {
        "first_ms": 1e3 * first_seconds,
        "state_ms": 1e3 * state_seconds,
        "state_bytes": sum(tensor.nbytes for tensor in state),
        "peak_mb": peak,
    }


def _tensors_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return all tensors in an optimizer's state."""
    return [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]


def _time_allocation(like: list[Tensor], wait: Callable[[], Any]) -> float:
    """Return the seconds to allocate such tensors and to write to them once.

    The system maps their pages at the first write.
    """
    start = time.perf_counter()
    fresh = [torch.zeros_like(tensor) for tensor in like]
    for tensor in fresh:
        tensor.zero_()
    wait()
    return time.perf_counter() - start


def peak_megabytes(step: Callable[[], Any]) -> float | None:
    """Return how far resident memory rises during a step, in 10^6 bytes; None if unknown."""
    step()
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        CLEAR_MARKS.write_text("5", encoding="ascii")
        before = _status("VmRSS")
        step()
        return (_status("VmHWM") - before) / 1e6
    except (OSError, KeyError):
        return None


def _status(name: str) -> int:
    """Return the bytes that the system reports under a name such as VmRSS."""
    fields = dict(line.split(":", 1) for line in STATUS.read_text(encoding="ascii").splitlines())
    return 1024 * int(fields[name].split()[0])


def main() -> None:
    """Probe what the command line names, and print what was found as JSON."""
    model, optimizer, contender, threads, *device = sys.argv[1:]
    torch.set_num_threads(int(threads))
    gpu = find_gpu(device[0] if device else "cpu")
    print(json.dumps(probe(model, optimizer, contender, gpu)))


if __name__ == "__main__":
    main()
