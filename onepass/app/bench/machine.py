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
    """The seconds that a call takes."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def measure_bandwidth(megabytes: int = 256, repeat: int = 7) -> dict[str, float]:
    """GB/s of plain torch operations, to check the memory limit against: a copy, and an update in
    place.

    Read and written bytes are counted. A copy also reads, in most machines, the lines that it
    overwrites: its true traffic is then half as much again, while an update in place has read them
    anyway, as an optimizer has.
    """
    a, b = (torch.ones(megabytes * 2**18) for _ in range(2))

    def rate(step: Callable[[], Any]) -> float:
        step()
        return 2 * a.nbytes / min(time_of(step) for _ in range(repeat)) / 1e9

    return {
        "copy_gigabytes_per_second": rate(lambda: b.copy_(a)),
        "update_gigabytes_per_second": rate(lambda: a.mul_(1.0)),
    }


def available_memory() -> int | None:
    """Bytes that can be had without swapping, where the system says so."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next(
        (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None
    )


def describe_machine() -> dict[str, Any]:
    """Processor, memory, load, system and versions, with the date and the command."""
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
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
