"""The eager backend beside torch's default loop and our kernels: microseconds a step, in turns
within one process.

python benchmarks/eager.py [--steps 300] [--counts 200 6]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import onepass

SIZE = 64
NAMES = (
    "SGD",
    "Adam",
    "AdamW",
    "RMSprop",
    "Adagrad",
    "Adadelta",
    "Adamax",
    "NAdam",
    "RAdam",
    "ASGD",
    "Rprop",
)


def make(library: object, name: str, count: int) -> torch.optim.Optimizer:
    """An optimizer on parameters of its own, which have gradients."""
    params = [torch.nn.Parameter(torch.randn(SIZE)) for _ in range(count)]
    for p in params:
        p.grad = torch.randn(SIZE)
    return getattr(library, name)(params)


def measure(name: str, count: int, steps: int) -> dict[str, float]:
    """The median of each contender's steps, in microseconds."""
    optimizers = {"eager": make(onepass, name, count), "torch": make(torch.optim, name, count)}
    optimizers["kernel"] = make(onepass, name, count)
    for contender in ("eager", "torch"):
        for group in optimizers[contender].param_groups:
            group["foreach"] = False
    for group in optimizers["eager"].param_groups:
        group["fused"] = False
    times: dict[str, list[float]] = {contender: [] for contender in optimizers}
    for _ in range(steps):
        for contender, optimizer in optimizers.items():
            begin = time.perf_counter()
            optimizer.step()
            times[contender].append(1e6 * (time.perf_counter() - begin))
    return {contender: statistics.median(of_steps) for contender, of_steps in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--counts", type=int, nargs="+", default=[200, 6], help="how many tensors")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"tensors of {SIZE}, torch {torch.__version__}, one thread; microseconds a step")
    print(f"{'':10} {'tensors':>7} {'kernel':>8} {'eager':>8} {'torch':>8} {'torch/eager':>12}")
    for count in arguments.counts:
        for name in NAMES:
            found = measure(name, count, arguments.steps)
            ratio = found["torch"] / found["eager"]
            print(
                f"{name:10} {count:7} {found['kernel']:8.0f} {found['eager']:8.0f} "
                f"{found['torch']:8.0f} {ratio:12.2f}"
            )


if __name__ == "__main__":
    main()
