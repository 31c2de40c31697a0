"""Measurements on a GPU: times on the device and on the host, its memory's speed, what a step adds.

A step's call returns before the device has worked. So three times are taken. None of them is a part
of another:

- **host**: from the call to its return, with an empty queue;
- **wall**: from the call until the device has finished, with an empty queue;
- **device**: between two events around the step, while a spinning kernel holds the queue back until
  the host has queued all of it. These are work and gaps on the device, and nothing of the host's.
  The device's cache has been overwritten before.

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

# The queue is held back for the step's own host time, with this much room, at most this many
# seconds.
ROOM = 1.5
LONGEST_HOLD = 0.2
# What overwrites the cache has at least this many bytes, and this many times those of the cache.
FLUSH_BYTES = 1 << 28
CACHE_TIMES = 4
# What a copy moves to measure the memory's speed.
COPY_BYTES = 1 << 31


class Sample(NamedTuple):
    """Seconds of one step: on the device, on the host, and of both one after the other."""

    device: float
    host: float
    wall: float


def condense(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return each time's median, in ms; `median_ms` and `min_ms` are the longer of host and device.

    In a training loop the two run at the same time, so that a step takes the longer one.
    """
    device = [1e3 * sample.device for sample in samples]
    host = [1e3 * sample.host for sample in samples]
    wall = [1e3 * sample.wall for sample in samples]
    return {
        "median_ms": max(statistics.median(device), statistics.median(host)),
        "min_ms": max(min(device), min(host)),
        "steps": len(samples),
        "device_ms": statistics.median(device),
        "host_ms": statistics.median(host),
        "wall_ms": statistics.median(wall),
    }


def find_gpu(name: str) -> Gpu | None:
    """Return the GPU of this name, such as `cuda` or `cuda:1`; None for the CPU.

    Raises `BenchError` if there is none, or if onepass has no kernels for it.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BenchError(
            f"there is no device {name!r}: choose cpu, cuda, or one of several GPUs as cuda:1."
        ) from None
    if device.type == "cpu":
        return None
    _check_device(name, device)
    device = torch.device("cuda", device.index or 0)
    reason = kernel.why_no_kernels(device)
    if reason:
        raise BenchError(f"onepass cannot be measured on {name}: {reason}.")
    torch.cuda.set_device(device)
    return Gpu(device)


def _check_device(name: str, device: torch.device) -> None:
    """Raise `BenchError` unless torch has this CUDA device."""
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


class Gpu:
    """One device, and the module that speaks to it: `torch.cuda`, or a stand-in for it in tests."""

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self.device = device
        self.cuda = cuda
        self._start = cuda.Event(enable_timing=True)
        self._end = cuda.Event(enable_timing=True)

    def __str__(self) -> str:
        return str(self.device)

    def synchronize(self) -> None:
        """Wait until the device has nothing to do."""
        self.cuda.synchronize(self.device)

    def free_memory(self) -> int:
        """Return the bytes that can still be allocated."""
        return self.cuda.mem_get_info(self.device)[0]

    def timer(self, step: Callable[[], Any]) -> Callable[[], Sample]:
        """Return a function that takes two steps: one to time the host, one to time the device."""

        def take() -> Sample:
            """Time a step with an empty queue, then one that is held back."""
            self.synchronize()
            start = time.perf_counter()
            step()
            host = time.perf_counter() - start
            self.synchronize()
            wall = time.perf_counter() - start
            return Sample(self.time_on_device(step, hold=ROOM * host), host, wall)

        return take

    def time_on_device(self, step: Callable[[], Any], hold: float = 0.0) -> float:
        """Return the seconds between events before and after a step.

        The queue is held back for `hold` seconds, so that the host can fill it.
        """
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
        """A tensor that is overwritten before a step, to empty the cache of the step's own."""
        properties = self.cuda.get_device_properties(self.device)
        cache_bytes = getattr(properties, "L2_cache_size", 0)
        size = max(CACHE_TIMES * cache_bytes, self._limit_bytes(FLUSH_BYTES))
        return torch.empty(size, dtype=torch.int8, device=self.device)

    def _limit_bytes(self, most: int) -> int:
        """Return `most` bytes, or fewer if memory is short."""
        return min(most, self.free_memory() // 16)

    @cached_property
    def _cycles_per_second(self) -> float:
        """How fast the kernel spins that holds the queue back: cycles a second."""
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
        """GB/s of torch's copy and of its update in place: read and written bytes, best of ten."""
        count = self._limit_bytes(COPY_BYTES) // 4
        a = torch.ones(count, device=self.device)
        b = torch.ones(count, device=self.device)

        def rate(step: Callable[[], Any]) -> float:
            """Return GB/s of a step that reads and writes one of the tensors."""
            for _ in range(3):
                step()
            best = min(self.time_on_device(step) for _ in range(10))
            return 2 * a.nbytes / best / 1e9

        return {
            "copy_gigabytes_per_second": rate(lambda: b.copy_(a)),
            "update_gigabytes_per_second": rate(lambda: a.mul_(1.0)),
        }

    def limit(self, bytes_per_parameter: Sequence[int], parameters: int) -> dict[str, Any]:
        """Return the time in which a copy moves the bytes that a step reads and writes."""
        rate = self.bandwidth["copy_gigabytes_per_second"]
        ms = sum(bytes_per_parameter) * parameters / rate / 1e6
        return {"median_ms": ms, "min_ms": ms, "steps": 0}

    def allocated(self) -> int:
        """Return the bytes of all tensors that there are now."""
        return self.cuda.memory_allocated(self.device)

    def peak_of(self, step: Callable[[], Any]) -> int:
        """Return the most bytes that tensors have at any moment of a step."""
        self.cuda.reset_peak_memory_stats(self.device)
        step()
        self.synchronize()
        return self.cuda.max_memory_allocated(self.device)

    def describe(self) -> dict[str, Any]:
        """Return the device, its memory, its driver, and the versions of what compiles for it."""
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
    """Return the driver's version, as nvidia-smi or the driver itself says it."""
    return _driver_from_tool() or _driver_from_kernel()


def _driver_from_tool() -> str | None:
    """Return what nvidia-smi says; None if it is not installed or fails."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.splitlines()
    return (lines[0].strip() or None) if lines else None


def _driver_from_kernel() -> str | None:
    """Return what Linux's kernel says; None if it does not know the driver."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").split()
    except OSError:
        return None
    # Such as 570.86.15.
    return next((word for word in words if word.count(".") >= 1 and word[0].isdigit()), None)


def _version(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
