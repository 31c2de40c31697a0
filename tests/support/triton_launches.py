"""What Triton itself does with our kernels, up to the point where a GPU would begin: run as a
program, it prints JSON.

A driver that only takes notes stands in for CUDA's. Triton binds arguments, chooses a variant for
them, compiles it for sm_90 and launches it, as it would on a GPU; tensors lie in the host's memory,
and nothing computes.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

import onepass
from onepass import kernel
from onepass.kernel.gpu import jit
from onepass.kernel.gpu import launch as gpu
from onepass.kernel.gpu.uploads import Device

LAUNCHED: Counter[str] = Counter()


class Launcher:
    """Takes note of a kernel's launch."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = source.fn.__name__

    def __call__(self, *_: Any, **__: Any) -> None:
        LAUNCHED[self.name] += 1


class Utils:
    """What Triton asks of CUDA when it loads a kernel: registers, spills, and the most threads of a
    program."""

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, 2, 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": 232448,
            "multiprocessor_count": 132,
            "warpSize": 32,
            "max_num_regs": 65536,
        }


class Driver:
    """An H100 or H200, as far as Triton can tell without one."""

    utils, launcher_cls = Utils(), Launcher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Memory(Device):
    """The host's memory in the place of a device's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def stream(self) -> int:
        return 0

    def is_capturing(self) -> bool:
        return False

    def pin(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(count, dtype=dtype)

    def send(self, pinned: torch.Tensor) -> torch.Tensor:
        return pinned.clone()


def variants(batch: Any) -> int:
    """How many kernels Triton has compiled for a batch's program."""
    functions = (batch.kernel._module[one.name] for one in batch.kernel.source.functions)
    return sum(len(caches[0]) for f in functions for caches in f.device_caches.values())


def report(cls: Any, shapes: list[tuple[int, ...]], **options: Any) -> dict[str, Any]:
    """What a first step compiles and launches, and what further ones do after all that may change
    has changed."""
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    opt = cls([{"params": params[::2]}, {"params": params[1::2], "lr": 0.5}], **options)

    def step(missing: int = -1) -> Counter[str]:
        LAUNCHED.clear()
        for i, p in enumerate(params):
            p.grad = None if i == missing else torch.zeros_like(p)
        opt.step()
        return LAUNCHED.copy()

    first = step()
    compiled = sum(variants(batch) for batch in opt._onepass.plan.kernels)
    launches = dict(first)
    second = step()
    for change in range(4):
        for group in opt.param_groups:
            group["lr"] *= 0.5
        step(missing=change)
    opt.add_param_group({"params": [p := torch.nn.Parameter(torch.zeros(shapes[0]))]})
    params.append(p)
    for _ in range(3):
        step()
    later = sum(variants(batch) for batch in opt._onepass.plan.kernels)
    return {"launches": launches, "second": dict(second), "compiled": compiled, "later": later}


def stand_in() -> None:
    """From now on, tensors of the host count as those of a GPU."""
    triton.runtime.driver.set_active(Driver())
    gpu.Device, jit.backend_of = Memory, lambda there: "cuda"
    kernel.on_host, kernel.why_no_kernels = lambda device: False, lambda device: ""


def main() -> None:
    stand_in()
    flat = [(3,), (64, 64), (1025,), (300, 7), (16,)]
    matrices = [(3, 5), (64, 64), (2, 300), (130, 260)]
    cases = {
        "sgd": (onepass.SGD, flat, {}),
        "adamw": (onepass.AdamW, flat, {}),
        "adamw fused": (onepass.AdamW, flat, {"fused": True}),
        "adamw capturable": (onepass.AdamW, flat, {"capturable": True}),
        "nadam capturable": (onepass.NAdam, flat, {"capturable": True}),
        "adafactor": (onepass.Adafactor, matrices, {}),
        "muon": (onepass.Muon, matrices, {}),
    }
    print(
        json.dumps(
            {name: report(cls, shapes, **options) for name, (cls, shapes, options) in cases.items()}
        )
    )


if __name__ == "__main__":
    sys.exit(main())
