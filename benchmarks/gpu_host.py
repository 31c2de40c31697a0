"""What a step on a GPU takes of the host, without a GPU: everything up to the point where CUDA's
driver would begin.

    python benchmarks/gpu_host.py      # half a minute

Triton binds, chooses and launches kernels as on an H200, through the driver of
tests/support/triton_launches.py, which only takes notes; tensors lie in the host's memory. What is
missing is the time of CUDA's driver: a launch, and a copy for a table.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from support import triton_launches  # of the tests

import onepass

MODELS = ((10, 1), (148, 1), (1000, 1), (1000, 100))
MODES: tuple[tuple[str, dict[str, bool]], ...] = (
    ("default", {}),
    ("capturable", {"capturable": True}),
)


def time_steps(
    tensors: int, groups: int, options: dict[str, bool], steps: int = 300
) -> tuple[float, float]:
    """The median microseconds of an AdamW step, and how many tables it sends."""
    params = [torch.nn.Parameter(torch.zeros(16)) for _ in range(tensors)]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = onepass.AdamW([{"params": params[i::groups]} for i in range(groups)], **options)
    for _ in range(20):
        optimizer.step()
    assert optimizer._onepass.plan is not None
    launch = optimizer._onepass.plan.kernels[0].launch
    before, times = launch.uploads, []
    for _ in range(steps):
        start = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times), (launch.uploads - before) / steps


def main(models: Sequence[tuple[int, int]] = MODELS) -> None:
    triton_launches.stand_in()
    print(
        "| tensors | groups | goal, us | "
        + " | ".join(f"{mode}, us | tables sent" for mode, _ in MODES)
        + " |"
    )
    print("|---|---|---|" + "---|---|" * len(MODES))
    for tensors, groups in models:
        cells = (time_steps(tensors, groups, options) for _, options in MODES)
        shown = " | ".join(f"{taken:.0f} | {sent:.2f}" for taken, sent in cells)
        print(f"| {tensors} | {groups} | {60 + 0.4 * tensors:.0f} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
