"""Steps on a machine that has other work: the median and the 99th percentile, with and without a
busy process beside.

    python benchmarks/loaded.py [--steps 400] [--busy 1] [--threads 1 2]

Each line is one of torch's modes or ours, on copies of the same 40 tensors, in turns within one
process. Where waiting threads spin, they take time from the threads that they wait for. With
OMP_WAIT_POLICY=passive in the environment they sleep at once.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time

import torch

import onepass

SHAPE, COUNT = (256, 256), 40


def contenders() -> dict[str, torch.optim.Optimizer]:
    """Ours and torch's, each with parameters of its own."""
    made = {}
    for name, library, modes in (
        ("onepass", onepass, {}),
        ("torch fused", torch.optim, {"fused": True}),
        ("torch foreach", torch.optim, {"foreach": True}),
    ):
        params = [torch.nn.Parameter(torch.randn(SHAPE)) for _ in range(COUNT)]
        for p in params:
            p.grad = torch.randn(SHAPE)
        made[name] = library.AdamW(params, **modes)
    return made


def burn() -> None:
    """Keep a processor busy."""
    x = 0
    while True:
        x += 1


def measure(steps: int) -> dict[str, list[float]]:
    """Milliseconds of each step."""
    optimizers = contenders()
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for step in range(steps + 5):
        for name, optimizer in optimizers.items():
            begin = time.perf_counter()
            optimizer.step()
            if step >= 5:
                times[name].append(1e3 * (time.perf_counter() - begin))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument(
        "--busy", type=int, default=1, help="processes that keep a processor busy each"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    print(
        f"AdamW, {COUNT} tensors of {SHAPE[0]}x{SHAPE[1]}, torch {torch.__version__}; milliseconds "
        "a step"
    )
    print(f"{'':15} {'threads':>7} {'busy':>5} {'median':>8} {'p99':>8} {'of fused':>9}")
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for busy in dict.fromkeys((0, arguments.busy)):
            others = [
                multiprocessing.get_context("spawn").Process(target=burn, daemon=True)
                for _ in range(busy)
            ]
            for other in others:
                other.start()
            time.sleep(2 if others else 0)
            times = measure(arguments.steps)
            for other in others:
                other.kill()
            fused = statistics.median(times["torch fused"])
            for name, of_steps in times.items():
                median, p99 = statistics.median(of_steps), statistics.quantiles(of_steps, n=100)[98]
                print(
                    f"{name:15} {threads:7} {busy:5} {median:8.2f} {p99:8.2f} {median / fused:9.2f}"
                )


if __name__ == "__main__":
    main()
