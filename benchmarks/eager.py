"""The eager backend beside torch's default loop and our kernels: microseconds a step, in turns.

python benchmarks/eager.py [--steps 300] [--counts 200 6]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import onepass
from onepass.app.bench.suite import list_elementwise_classes

SIZE = 64


def make(library: object, name: str, count: int) -> torch.optim.Optimizer:
    """Return an optimizer on parameters of its own, which have gradients."""
    params = [torch.nn.Parameter(torch.randn(SIZE)) for _ in range(count)]
    for p in params:
        p.grad = torch.randn(SIZE)
    return getattr(library, name)(params)


def measure(name: str, count: int, steps: int) -> dict[str, float]:
    """Return the median of each contender's steps, in microseconds."""
    eager = make(onepass, name, count)
    torchs = make(torch.optim, name, count)
    kernel = make(onepass, name, count)
    for optimizer in (eager, torchs):
        for group in optimizer.param_groups:
            group["foreach"] = False
    for group in eager.param_groups:
        group["fused"] = False

    optimizers = {"eager": eager, "torch": torchs, "kernel": kernel}
    times: dict[str, list[float]] = {contender: [] for contender in optimizers}
    for _ in range(steps):
        for contender, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            times[contender].append(1e6 * (time.perf_counter() - start))
    return {contender: statistics.median(taken) for contender, taken in times.items()}


def main() -> None:
    """Print a line for each elementwise algorithm that torch has too, and each count of tensors."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--counts", type=int, nargs="+", default=[200, 6], help="how many tensors")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    names = [name for name in list_elementwise_classes() if hasattr(torch.optim, name)]
    print(f"tensors of {SIZE}, torch {torch.__version__}, one thread; microseconds a step")
    print(f"{'':10} {'tensors':>7} {'kernel':>8} {'eager':>8} {'torch':>8} {'torch/eager':>12}")
    for count in asked.counts:
        for name in names:
            found = measure(name, count, asked.steps)
            ratio = found["torch"] / found["eager"]
            print(
                f"{name:10} {count:7} {found['kernel']:8.0f} {found['eager']:8.0f} "
                f"{found['torch']:8.0f} {ratio:12.2f}"
            )


if __name__ == "__main__":
    main()
