"""In the place of `torch.cuda`, where there is no GPU: tensors lie on the CPU, and the device's
clock is the host's."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import torch

from onepass.app.bench.gpu import Gpu


class StandIn:
    """What `onepass.app.bench.gpu` asks of `torch.cuda`. Its device does all work at once, and
    spins a cycle a ns."""

    memory = 1 << 27

    def clock(self) -> float:
        """Seconds."""
        return time.perf_counter()

    def Event(self, enable_timing: bool = False) -> Any:
        """An event with a time."""
        assert enable_timing
        event = SimpleNamespace(at=0.0)
        event.record = lambda: setattr(event, "at", self.clock())
        event.elapsed_time = lambda end: 1e3 * (end.at - event.at)
        return event

    def _sleep(self, cycles: int) -> None:
        time.sleep(1e-9 * cycles)

    def synchronize(self, device: torch.device) -> None:
        """Nothing is ever waiting."""

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return self.memory, self.memory

    def memory_allocated(self, device: torch.device) -> int:
        return 0

    def max_memory_allocated(self, device: torch.device) -> int:
        return 0

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        pass

    def get_device_capability(self, device: torch.device) -> tuple[int, int]:
        return 0, 0

    def get_device_properties(self, device: torch.device) -> Any:
        return SimpleNamespace(
            name="a stand-in",
            multi_processor_count=1,
            total_memory=self.memory,
            L2_cache_size=1 << 20,
        )


def stand_in(cuda: Any = None) -> Gpu:
    """A GPU that is the CPU."""
    return Gpu(torch.device("cpu"), StandIn() if cuda is None else cuda)
