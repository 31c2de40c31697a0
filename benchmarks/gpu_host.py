"""What a step on a GPU takes of the host, without a GPU: all up to where CUDA's driver would begin.

    python benchmarks/gpu_host.py      # half a minute

Triton binds, chooses and launches kernels as on an H200, through the driver of
tests/support/triton_launches.py, which only takes notes; tensors are in the host's memory. What is
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
from onepass.app.bench.goals import HOST_US

# How many tensors, in how many groups.
MODELS = ((10, 1), (148, 1), (1000, 1), (1000, 100))
MODES: dict[str, dict[str, bool]] = {"default": {}, "capturable": {"capturable": True}}
WARM_UP_STEPS = 20


def time_steps(
    tensors: int, groups: int, options: dict[str, bool], steps: int = 300
) -> tuple[float, float]:
    """Return the median microseconds of an AdamW step, and how many tables it sends."""
    params = [torch.nn.Parameter(torch.zeros(16)) for _ in range(tensors)]
    for p in params:
        p.grad = torch.zeros_like(p)
    param_groups = [{"params": params[index::groups]} for index in range(groups)]
    optimizer = onepass.AdamW(param_groups, **options)
    for _ in range(WARM_UP_STEPS):
        optimizer.step()
    assert optimizer._onepass.plan is not None
    launch = optimizer._onepass.plan.kernels[0].launch
    uploads_before = launch.uploads
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - start)
    tables = (launch.uploads - uploads_before) / steps
    return 1e6 * statistics.median(times), tables


def main(models: Sequence[tuple[int, int]] = MODELS) -> None:
    """Print a Markdown table with a line for each model."""
    triton_launches.stand_in()
    headings = " | ".join(f"{mode}, us | tables sent" for mode in MODES)
    print(f"| tensors | groups | goal, us | {headings} |")
    print("|---|---|---|" + "---|---|" * len(MODES))
    least, for_each = HOST_US
    for tensors, groups in models:
        cells = []
        for options in MODES.values():
            microseconds, tables = time_steps(tensors, groups, options)
            cells.append(f"{microseconds:.0f} | {tables:.2f}")
        goal = least + for_each * tensors
        print(f"| {tensors} | {groups} | {goal:.0f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
