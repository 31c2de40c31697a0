"""Many parameters in many groups of different lr: making an optimizer, its first and later steps.

python benchmarks/first_step.py [--groups 1000] [--params 10]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import onepass

SIZE = 16
LATER_STEPS = 20


def time_call(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Return the milliseconds that a call takes, and what it returns."""
    start = time.perf_counter()
    result = function(*arguments)
    return 1e3 * (time.perf_counter() - start), result


def make_parameter() -> torch.nn.Parameter:
    """Return a parameter of 16 numbers with a gradient."""
    p = torch.nn.Parameter(torch.randn(SIZE))
    p.grad = torch.randn(SIZE)
    return p


def make_groups(groups: int, params: int) -> list[dict[str, Any]]:
    """Return param groups, each with its own lr."""
    return [
        {"params": [make_parameter() for _ in range(params)], "lr": 1e-3 * (index + 1)}
        for index in range(groups)
    ]


def main() -> None:
    """Print a line of times for ours and one for torch's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", type=int, default=1000)
    parser.add_argument(
        "--params", type=int, default=10, help="parameters of 16 numbers in each group"
    )
    asked = parser.parse_args()
    print(f"AdamW, {asked.groups} groups of {asked.params} parameters of {SIZE}; milliseconds")
    for name, library in (("onepass", onepass), ("torch", torch.optim)):
        # What is compiled once for a process is not timed.
        library.AdamW([make_parameter()]).step()
        made, optimizer = time_call(library.AdamW, make_groups(asked.groups, asked.params))
        first, _ = time_call(optimizer.step)
        later = statistics.median(time_call(optimizer.step)[0] for _ in range(LATER_STEPS))
        print(
            f"{name:8} constructor {made:7.1f}   first step {first:7.1f}   later steps {later:7.1f}"
        )


if __name__ == "__main__":
    main()
