"""The time of one update of averaged weights: onepass beside torch, on the same tensors, in turns.

python benchmarks/averaging.py [--seconds 4] [--threads 2] [--model small,tiny]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.optim.swa_utils as theirs
from torch import nn

from onepass import swa_utils as ours
from onepass.app.bench.machine import describe_machine, time_of
from onepass.app.bench.shapes import MODELS
from onepass.app.bench.turns import take_turns
from onepass.swa_utils.averages import Pairing

LIBRARIES = {"torch": theirs, "onepass": ours}
FUNCTIONS = {"EMA": "get_ema_multi_avg_fn", "SWA": "get_swa_multi_avg_fn"}


class Pair(nn.Module):
    """Two parameters: most modules of real models have one or two."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        for index, shape in enumerate(shapes):
            self.register_parameter(f"p{index}", nn.Parameter(torch.randn(shape)))


def make_model(name: str) -> nn.Module:
    """Return a model with a benchmark's shapes: two in a module, ten modules in a block."""
    shapes = MODELS[name].shapes
    pairs = [Pair(shapes[begin : begin + 2]) for begin in range(0, len(shapes), 2)]
    blocks = [nn.Sequential(*pairs[begin : begin + 10]) for begin in range(0, len(pairs), 10)]
    return nn.Sequential(*blocks)


def race(timers: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Return each contender's median, in ms."""
    timed = {name: partial(time_of, timer) for name, timer in timers.items()}
    times = take_turns(timed, seconds)
    return {name: found["median_ms"] for name, found in times.items()}


def race_updates(model: nn.Module, seconds: float) -> dict[str, dict[str, float]]:
    """Return the times of `update_parameters`, all on the tensors of one average."""
    shared = ours.AveragedModel(model)
    shared.update_parameters(model)
    found = {}
    for title, name in {**FUNCTIONS, "default (SWA)": None}.items():
        timers = {}
        for contender, library in LIBRARIES.items():
            function = getattr(library, name)() if name else None
            average = library.AveragedModel(nn.Identity(), multi_avg_fn=function)
            average.module = shared.module
            average.n_averaged = torch.tensor(1)
            timers[contender] = partial(average.update_parameters, model)
        found[f"update_parameters, {title}"] = race(timers, seconds)
    return found


def race_functions(model: nn.Module, seconds: float) -> dict[str, dict[str, float]]:
    """Return the times of the functions of two lists, and of their launch without Python."""
    values = [p.detach() for p in model.parameters()]
    averages = [v.clone() for v in values]
    pairing = Pairing(averages, values)
    pairing.read(averages, values)
    launch = pairing.batches[0].launch
    found = {}
    for title, name in FUNCTIONS.items():
        timers: dict[str, Callable[[], object]] = {
            "limit": partial(launch.run, torch.get_num_threads())
        }
        for contender, library in LIBRARIES.items():
            timers[contender] = partial(getattr(library, name)(), averages, values, 1)
        found[f"the function alone, {title}"] = race(timers, seconds)
    return found


def main() -> None:
    """Print a Markdown table of all times on each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each row of the table")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--model", default="small,tiny,gpt2", help=f"of {', '.join(MODELS)}")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    machine = describe_machine()
    print(f"{machine['cpu']}, {asked.threads} threads, torch {torch.__version__}; medians in ms\n")
    print("| model | what | torch | onepass | times faster | launch alone |")
    print("|---|---|---|---|---|---|")
    for name in asked.model.split(","):
        model = make_model(name)
        times = race_updates(model, asked.seconds) | race_functions(model, asked.seconds)
        for what, ms in times.items():
            limit = f"{ms['limit']:.3f}" if "limit" in ms else ""
            ratio = ms["torch"] / ms["onepass"]
            print(
                f"| {name} | {what} | {ms['torch']:.3f} | {ms['onepass']:.3f} | {ratio:.1f} | "
                f"{limit} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
