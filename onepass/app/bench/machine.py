"""What a time depends on besides the code: the machine, its memory's speed, the versions."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["available_memory", "describe_machine", "measure_bandwidth", "time_of"]


def time_of(step: Callable[[], Any]) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def measure_bandwidth(megabytes: int = 256, repeat: int = 7) -> dict[str, float]:
    """Return GB/s of two plain torch operations, to check the memory limit against.

    They are a copy and an update in place, of tensors of this many MiB; the best of `repeat` tries
    counts. Read and written bytes are counted. In most machines a copy also reads the lines that it
    overwrites: its true traffic is then half as much again. An update in place has read them
    anyway, as an optimizer has.
    """
    a = torch.ones(megabytes * 2**18)
    b = torch.ones(megabytes * 2**18)

    def rate(step: Callable[[], Any]) -> float:
        """Return GB/s of a step that reads and writes one of the tensors."""
        step()
        best = min(time_of(step) for _ in range(repeat))
        return 2 * a.nbytes / best / 1e9

    return {
        "copy_gigabytes_per_second": rate(lambda: b.copy_(a)),
        "update_gigabytes_per_second": rate(lambda: a.mul_(1.0)),
    }


def available_memory() -> int | None:
    """Return the bytes that can be had without swapping; None if the system does not say so."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable"):
            return 1024 * int(line.split()[1])
    return None


def describe_machine() -> dict[str, Any]:
    """Return the processor, memory, load, system and versions, with the date and the command."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "llvmlite")}
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        **versions,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _memory_gib() -> float | None:
    """Return the memory of the machine; None if the system does not say it."""
    if not hasattr(os, "sysconf"):
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _cpu_model() -> str:
    """Return the name of the processor, as Linux or Python knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    for line in lines:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()
