"""Steps on a machine with other work: median and 99th percentile, with a busy process and without.

    python benchmarks/loaded.py [--steps 400] [--busy 1] [--threads 1 2]

Each line is one of torch's modes or ours, on copies of the same 40 tensors, in turns within one
process. Threads that spin while they wait take time from the threads that they wait for. With
OMP_WAIT_POLICY=passive in the environment they sleep at once.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

import onepass

SHAPE = (256, 256)
COUNT = 40
WARM_UP_STEPS = 5
# Until a busy process has started.
START_SECONDS = 2.0


def make_contenders() -> dict[str, torch.optim.Optimizer]:
    """Return ours and torch's, each with parameters of its own."""
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


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Let this many processes keep a processor busy each, until the end."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=burn, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    time.sleep(START_SECONDS if processes else 0.0)
    try:
        yield
    finally:
        for process in processes:
            process.kill()


def measure(steps: int) -> dict[str, list[float]]:
    """Return the milliseconds of each step, by contender."""
    optimizers = make_contenders()
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for step in range(steps + WARM_UP_STEPS):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            if step >= WARM_UP_STEPS:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def show(times: dict[str, list[float]], threads: int, busy: int) -> None:
    """Print a line for each contender."""
    fused = statistics.median(times["torch fused"])
    for name, taken in times.items():
        median = statistics.median(taken)
        p99 = statistics.quantiles(taken, n=100)[98]
        print(f"{name:15} {threads:7} {busy:5} {median:8.2f} {p99:8.2f} {median / fused:9.2f}")


def main() -> None:
    """Print the times for each number of threads, without other work and with it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument(
        "--busy", type=int, default=1, help="processes that keep a processor busy each"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    asked = parser.parse_args()
    tensors = f"{COUNT} tensors of {SHAPE[0]}x{SHAPE[1]}"
    print(f"AdamW, {tensors}, torch {torch.__version__}; milliseconds a step")
    print(f"{'':15} {'threads':>7} {'busy':>5} {'median':>8} {'p99':>8} {'of fused':>9}")
    for threads in asked.threads:
        torch.set_num_threads(threads)
        for busy in dict.fromkeys((0, asked.busy)):
            with busy_processes(busy):
                times = measure(asked.steps)
            show(times, threads, busy)


if __name__ == "__main__":
    main()
