"""Many parameters in many groups, each with its own learning rate: making the optimizer, its first
step, later ones.

python benchmarks/first_step.py [--groups 1000] [--params 10]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import onepass


def seconds(function: object, *arguments: object) -> tuple[float, object]:
    """How long a call takes, and what it returns."""
    begin = time.perf_counter()
    result = function(*arguments)  # type: ignore[operator]
    return time.perf_counter() - begin, result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", type=int, default=1000)
    parser.add_argument(
        "--params", type=int, default=10, help="parameters of 16 numbers in each group"
    )
    arguments = parser.parse_args()
    print(f"AdamW, {arguments.groups} groups of {arguments.params} parameters of 16; milliseconds")
    for name, library in (("onepass", onepass), ("torch", torch.optim)):
        warm = torch.nn.Parameter(torch.ones(16))
        warm.grad = torch.ones(16)
        library.AdamW([warm]).step()
        groups = []
        for i in range(arguments.groups):
            params = [torch.nn.Parameter(torch.randn(16)) for _ in range(arguments.params)]
            for p in params:
                p.grad = torch.randn(16)
            groups.append({"params": params, "lr": 1e-3 * (i + 1)})
        made, optimizer = seconds(library.AdamW, groups)
        first, _ = seconds(optimizer.step)
        later = statistics.median(seconds(optimizer.step)[0] for _ in range(20))
        print(
            f"{name:8} constructor {1e3 * made:7.1f}   first step {1e3 * first:7.1f}   later steps "
            f"{1e3 * later:7.1f}"
        )


if __name__ == "__main__":
    main()
