"""What a scheduler's step costs on an optimizer of many param groups: torch's and ours, in turn.

    python benchmarks/schedulers.py

Each pair steps alternately in one run, so that both meet the same machine; a ratio is the median of
the ratios of its rounds. The goal is at most a quarter of torch's time.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.optim import lr_scheduler as torch_schedulers
from torch.optim.swa_utils import SWALR

from onepass import Scheduler, lr_scheduler, swa_utils
from onepass.schedule import cosine

GOAL = 0.25
TORCHS = SimpleNamespace(**vars(torch_schedulers), SWALR=SWALR)
OURS = SimpleNamespace(**vars(lr_scheduler), SWALR=swa_utils.SWALR)
Make = Callable[[Any, torch.optim.Optimizer], Any]


def keep(step: int) -> float:
    """Return 1: a function of the user's, as cheap as it can be."""
    return 1.0


def chain(library: Any, optimizer: torch.optim.Optimizer) -> Any:
    """Return a scheduler: a warm-up times a decay."""
    return library.ChainedScheduler(
        [library.LinearLR(optimizer, 0.1), library.ExponentialLR(optimizer, 0.999)]
    )


def sequence(library: Any, optimizer: torch.optim.Optimizer) -> Any:
    """Return a scheduler: a warm-up, then a cosine."""
    return library.SequentialLR(
        optimizer,
        [library.LinearLR(optimizer, 0.1), library.CosineAnnealingLR(optimizer, 10**6)],
        [5],
    )


SCHEDULERS: dict[str, Make] = {
    "StepLR": lambda library, opt: library.StepLR(opt, 100),
    "MultiStepLR": lambda library, opt: library.MultiStepLR(opt, [100, 1000]),
    "ConstantLR": lambda library, opt: library.ConstantLR(opt, total_iters=10**6),
    "LinearLR": lambda library, opt: library.LinearLR(opt, total_iters=10**6),
    "ExponentialLR": lambda library, opt: library.ExponentialLR(opt, 0.9999),
    "PolynomialLR": lambda library, opt: library.PolynomialLR(opt, 10**6),
    "CosineAnnealingLR": lambda library, opt: library.CosineAnnealingLR(opt, 10**6),
    "CosineAnnealingLR, floor": lambda library, opt: library.CosineAnnealingLR(opt, 10**6, 1e-5),
    "CosineAnnealingWarmRestarts": lambda library, opt: library.CosineAnnealingWarmRestarts(
        opt, 100, 2
    ),
    "LambdaLR": lambda library, opt: library.LambdaLR(opt, keep),
    "MultiplicativeLR": lambda library, opt: library.MultiplicativeLR(opt, keep),
    "SWALR": lambda library, opt: library.SWALR(opt, 0.05, 10**6),
    "CyclicLR": lambda library, opt: library.CyclicLR(opt, 0.01, 0.1),
    "CyclicLR, lr alone": lambda library, opt: library.CyclicLR(
        opt, 0.01, 0.1, cycle_momentum=False
    ),
    "OneCycleLR": lambda library, opt: library.OneCycleLR(opt, 0.1, 10**6),
    "OneCycleLR, lr alone": lambda library, opt: library.OneCycleLR(
        opt, 0.1, 10**6, cycle_momentum=False
    ),
    "ChainedScheduler": chain,
    "SequentialLR": sequence,
    "ReduceLROnPlateau": lambda library, opt: library.ReduceLROnPlateau(opt),
}
OURS_ALONE: dict[str, tuple[str, Make]] = {
    "Scheduler beside CosineAnnealingLR": (
        "CosineAnnealingLR",
        lambda library, opt: Scheduler(opt, {"lr": cosine(0.1, steps=10**6)}),
    )
}


@dataclass(frozen=True)
class Result:
    """Medians over the rounds: microseconds a step, and the ratio of ours to torch's in a round."""

    torchs: float
    ours: float
    ratio: float


def make_optimizer(groups: int, *, equal: bool, tensor: bool) -> torch.optim.Optimizer:
    """Return SGD whose groups have equal rates or each its own, as floats or as tensors."""
    param_groups = []
    for index in range(groups):
        rate = 0.1 if equal else 0.1 + index / groups
        p = torch.nn.Parameter(torch.ones(1))
        param_groups.append({"params": [p], "lr": torch.tensor(rate) if tensor else rate})
    return torch.optim.SGD(param_groups, lr=0.1, momentum=0.9)


def time_steps(step: Callable[..., None], arguments: tuple[float, ...], count: int) -> float:
    """Return the microseconds of a step."""
    start = time.perf_counter()
    for _ in range(count):
        step(*arguments)
    return (time.perf_counter() - start) / count * 1e6


def compare(
    make: tuple[Make, Make], optimizers: tuple[Any, Any], rounds: int, count: int
) -> Result:
    """Time `count` steps of torch's and of ours in each round; pairs have torch's first."""
    steps = []
    arguments: tuple[float, ...] = ()
    for make_scheduler, library, optimizer in zip(make, (TORCHS, OURS), optimizers, strict=True):
        scheduler = make_scheduler(library, optimizer)
        # It takes a loss.
        is_plateau = isinstance(scheduler, torch_schedulers.ReduceLROnPlateau)
        arguments = (1.0,) if is_plateau else ()
        optimizer.step()
        # Past the warm-up of a sequence.
        for _ in range(10):
            scheduler.step(*arguments)
        steps.append(scheduler.step)
    gc.collect()
    torchs = []
    ours = []
    for _ in range(rounds):
        torchs.append(time_steps(steps[0], arguments, count))
        ours.append(time_steps(steps[1], arguments, count))
    ratios = [our_time / torch_time for torch_time, our_time in zip(torchs, ours, strict=True)]
    return Result(statistics.median(torchs), statistics.median(ours), statistics.median(ratios))


def measure(
    groups: int, rounds: int, count: int, *, equal: bool, tensor: bool
) -> dict[str, Result]:
    """Return the results of all classes on one kind of optimizer."""
    pairs = {name: (make, make) for name, make in SCHEDULERS.items()}
    pairs |= {name: (SCHEDULERS[other], make) for name, (other, make) in OURS_ALONE.items()}
    results = {}
    for name, pair in pairs.items():
        torchs = make_optimizer(groups, equal=equal, tensor=tensor)
        ours = make_optimizer(groups, equal=equal, tensor=tensor)
        results[name] = compare(pair, (torchs, ours), rounds, count)
    return results


KINDS = {"each its own rate": False, "all the same rate": True}


def make_table(measured: dict[str, dict[str, Result]], groups: int) -> Table:
    """Return a table with a line for each class, from the results of each of `KINDS`."""
    table = Table(
        title=f"A step on {groups} groups of one rate each, and of the same: "
        "torch's us, ours, the ratio"
    )
    table.add_column("scheduler", no_wrap=True)
    for heading in ("torch", "ours", "ratio") * len(KINDS):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in measured[next(iter(KINDS))]:
        cells = []
        for results in measured.values():
            result = results[name]
            cells += [f"{result.torchs:.1f}", f"{result.ours:.1f}", f"{result.ratio:.3f}"]
        table.add_row(name, *cells)
    return table


def main() -> None:
    """Measure, print a table, and say which class is the slowest beside torch's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20, help="steps of each in a round")
    parser.add_argument("--tensor", action="store_true", help="the rates are tensors")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    measured = {
        kind: measure(asked.groups, asked.rounds, asked.steps, equal=equal, tensor=asked.tensor)
        for kind, equal in KINDS.items()
    }
    console = Console(width=100)
    console.print(make_table(measured, asked.groups))
    ratios = [
        (result.ratio, name, kind)
        for kind, results in measured.items()
        for name, result in results.items()
    ]
    ratio, name, kind = max(ratios)
    console.print(f"The worst ratio is {ratio:.3f}: {name}, {kind}. The goal: at most {GOAL}.")


if __name__ == "__main__":
    main()
