"""A GPU as a place of measurement: times on the device and on the host, its memory's speed, what a
step adds to it.

A step's call returns before the device has worked. So three times are taken, none of which is
another's part:

- **host**: from the call to its return, with an empty queue;
- **wall**: from the call until the device has finished, with an empty queue;
- **device**: between two events around the step, while a spinning kernel holds the queue back until
  the host has queued all of it: work and gaps on the device, and nothing of the host's. Its cache
  has been overwritten before.

In a training loop the host runs ahead of the device: a step takes the longer of host and device.
"""

from __future__ import annotations

import importlib.metadata
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ... import kernel
from .suite import BenchError

__all__ = ["Gpu", "Sample", "condense", "find_gpu"]

# How long the queue is held back: the step's own host time, with this much room, at most this many
# seconds.
ROOM, LONGEST_HOLD = 1.5, 0.2
# What overwrites the cache is several times as large as any cache is, and as the device says that
# its own is.
CACHE_TIMES, FLUSH_BYTES = 4, 1 << 28
COPY_BYTES = 1 << 31


class Sample(NamedTuple):
    """Seconds of one step, see above."""

    device: float
    host: float
    wall: float


def condense(samples: Sequence[Sample]) -> dict[str, Any]:
    """Medians in ms, each of its own; `median_ms` and `min_ms` are the longer of host and
    device."""
    device, host, wall = (
        [1e3 * value for value in values] for values in zip(*samples, strict=True)
    )
    return {
        "median_ms": max(statistics.median(device), statistics.median(host)),
        "min_ms": max(min(device), min(host)),
        "steps": len(samples),
        "device_ms": statistics.median(device),
        "host_ms": statistics.median(host),
        "wall_ms": statistics.median(wall),
    }


def find_gpu(name: str) -> Gpu | None:
    """The GPU of that name, as `cuda` or `cuda:1`; None for the CPU. Raises `BenchError` where
    there is none."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BenchError(
            f"there is no device {name!r}: choose cpu, cuda, or one of several GPUs as cuda:1."
        ) from None
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        raise BenchError(
            f"steps are measured on cpu and cuda devices, not on {device.type}: choose one of them."
        )
    if not torch.cuda.is_available():
        raise BenchError(
            f"--device {name} needs a GPU, and torch {torch.__version__} sees none: leave it out "
            "to measure the CPU."
        )
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise BenchError(
            f"there is no {name}: this machine has {count} GPU{'s' * (count > 1)}, counted from "
            "cuda:0."
        )
    device = torch.device("cuda", device.index or 0)
    why = kernel.why_no_kernels(device)
    if why:
        raise BenchError(f"onepass cannot be measured on {name}: {why}.")
    torch.cuda.set_device(device)
    return Gpu(device)


class Gpu:
    """One device, and the module that speaks to it: `torch.cuda`, or what stands for it where there
    is none."""

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self.device, self.cuda = device, cuda
        self._start, self._end = (cuda.Event(enable_timing=True) for _ in range(2))

    def __str__(self) -> str:
        return str(self.device)

    def synchronize(self) -> None:
        """Wait until the device has nothing to do."""
        self.cuda.synchronize(self.device)

    def free_memory(self) -> int:
        """Bytes that can be allocated."""
        return self.cuda.mem_get_info(self.device)[0]

    def timer(self, step: Callable[[], Any]) -> Callable[[], Sample]:
        """What takes two steps, one for the host's times and one for the device's."""

        def take() -> Sample:
            self.synchronize()
            start = time.perf_counter()
            step()
            host = time.perf_counter() - start
            self.synchronize()
            wall = time.perf_counter() - start
            return Sample(self.time_on_device(step, hold=ROOM * host), host, wall)

        return take

    def time_on_device(self, step: Callable[[], Any], hold: float = 0.0) -> float:
        """Seconds between events before and after a step, in a queue that is held back for `hold`
        seconds."""
        self.synchronize()
        self._flush.zero_()
        if hold:
            self.cuda._sleep(int(min(hold, LONGEST_HOLD) * self._cycles_per_second))
        self._start.record()
        step()
        self._end.record()
        self.synchronize()
        return 1e-3 * self._start.elapsed_time(self._end)

    @cached_property
    def _flush(self) -> torch.Tensor:
        """What is overwritten before a step, so that nothing of the step's memory is in the
        cache."""
        cache = getattr(self.cuda.get_device_properties(self.device), "L2_cache_size", 0)
        return torch.empty(
            max(CACHE_TIMES * cache, self._size(FLUSH_BYTES)), dtype=torch.int8, device=self.device
        )

    def _size(self, most: int) -> int:
        """So many bytes, or fewer where memory is short."""
        return min(most, self.free_memory() // 16)

    @cached_property
    def _cycles_per_second(self) -> float:
        """How fast the kernel spins that holds the queue back."""
        cycles = 1_000_000
        times = []
        for _ in range(5):
            self._start.record()
            self.cuda._sleep(cycles)
            self._end.record()
            self.synchronize()
            times.append(1e-3 * self._start.elapsed_time(self._end))
        return cycles / min(times)

    @cached_property
    def bandwidth(self) -> dict[str, float]:
        """GB/s of torch's copy and of its update in place, read and written bytes counted; the best
        of several."""
        a, b = (torch.ones(self._size(COPY_BYTES) // 4, device=self.device) for _ in range(2))

        def rate(step: Callable[[], Any]) -> float:
            for _ in range(3):
                step()
            return 2 * a.nbytes / min(self.time_on_device(step) for _ in range(10)) / 1e9

        return {
            "copy_gigabytes_per_second": rate(lambda: b.copy_(a)),
            "update_gigabytes_per_second": rate(lambda: a.mul_(1.0)),
        }

    def limit(self, bytes_per_parameter: Sequence[int], parameters: int) -> dict[str, Any]:
        """The time in which a copy moves the bytes that a step reads and writes."""
        rate = self.bandwidth["copy_gigabytes_per_second"]
        ms = sum(bytes_per_parameter) * parameters / rate / 1e6
        return {"median_ms": ms, "min_ms": ms, "steps": 0}

    def allocated(self) -> int:
        """Bytes of all tensors that there are now."""
        return self.cuda.memory_allocated(self.device)

    def peak_of(self, step: Callable[[], Any]) -> int:
        """The most bytes that tensors had at any moment of a step."""
        self.cuda.reset_peak_memory_stats(self.device)
        step()
        self.synchronize()
        return self.cuda.max_memory_allocated(self.device)

    def describe(self) -> dict[str, Any]:
        """The device, its memory, its driver, and the versions of what compiles for it."""
        properties = self.cuda.get_device_properties(self.device)
        return {
            "name": properties.name,
            "capability": list(self.cuda.get_device_capability(self.device)),
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cache_mib": round(getattr(properties, "L2_cache_size", 0) / 2**20, 1),
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "triton": _version("triton") or _version("pytorch-triton-rocm"),
        }


@cache
def _driver() -> str | None:
    """The driver's version, as nvidia-smi or the driver itself says it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True
        ).stdout.splitlines()
        return said[0].strip() or None
    except (OSError, subprocess.SubprocessError, IndexError):
        pass
    try:
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").split()
    except OSError:
        return None
    return next((word for word in words if word.count(".") >= 1 and word[0].isdigit()), None)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
