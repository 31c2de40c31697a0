"""Where optimizers go: their real steps on functions of one or two numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import onepass

from ...optimizer import Optimizer

__all__ = [
    "CONTENDERS",
    "PARABOLA",
    "RATES",
    "RAVINE",
    "ROSENBROCK",
    "Contender",
    "Problem",
    "Track",
    "follow",
    "search",
]


@dataclass(frozen=True)
class Problem:
    """A function to minimize: `loss` takes places as the last dimension of a tensor and returns one
    loss for each.

    `window` is the part that a picture shows: lowest and highest value for each coordinate.
    """

    name: str
    loss: Callable[[Tensor], Tensor]
    start: tuple[float, ...]
    minimum: tuple[float, ...]
    window: tuple[tuple[float, float], ...]
    steps: int


PARABOLA = Problem("y = 4x²", lambda at: 4 * at[..., 0] ** 2, (2.0,), (0.0,), ((-2.4, 2.4),), 40)
RAVINE = Problem(
    "½x² + 25y²",
    lambda at: 0.5 * at[..., 0] ** 2 + 25 * at[..., 1] ** 2,
    (-4.0, 1.0),
    (0.0, 0.0),
    ((-4.6, 1.8), (-1.6, 1.6)),
    100,
)
ROSENBROCK = Problem(
    "Rosenbrock's (1 − x)² + 100 (y − x²)²",
    lambda at: (1 - at[..., 0]) ** 2 + 100 * (at[..., 1] - at[..., 0] ** 2) ** 2,
    (-1.2, 1.0),
    (1.0, 1.0),
    ((-1.9, 1.9), (-0.7, 2.3)),
    300,
)


@dataclass(frozen=True)
class Track:
    """A run's places, float64 of shape (steps + 1, coordinates), the start first, and the loss at
    each of them."""

    places: Tensor
    losses: Tensor
    options: dict[str, Any]


def follow(
    problem: Problem,
    optimizer: Callable[..., Optimizer],
    runs: Sequence[Mapping[str, Any]],
    steps: int | None = None,
    *,
    matrix: bool = False,
) -> list[Track]:
    """Minimize `problem` once for each of `runs`, the options of one param group, and return their
    paths.

    All runs are groups of one optimizer, so that each of its steps is a step of every run. With
    `matrix`, a place is a parameter of one column instead of a vector.
    """
    shape = (-1, 1) if matrix else (-1,)
    start = torch.tensor(problem.start, dtype=torch.float64).reshape(shape)
    params = [start.clone().requires_grad_() for _ in runs]
    together = optimizer(
        [{"params": [p], **options} for p, options in zip(params, runs, strict=True)]
    )
    places, losses = [], []
    for _ in range((problem.steps if steps is None else steps) + 1):
        at = torch.stack([p.flatten() for p in params])
        loss = problem.loss(at)
        places.append(at.detach())
        losses.append(loss.detach())
        together.zero_grad()
        loss.sum().backward()
        together.step()
    tracks, heights = torch.stack(places, 1), torch.stack(losses, 1)
    return [
        Track(track, loss, dict(options))
        for track, loss, options in zip(tracks, heights, runs, strict=True)
    ]


@dataclass(frozen=True)
class Contender:
    """An algorithm under the name that its picture has; all that `options` leave out is the class's
    default."""

    name: str
    cls: type[Optimizer]
    options: dict[str, Any] = field(default_factory=dict)
    matrix: bool = False


CONTENDERS = (
    Contender("SGD", onepass.SGD),
    Contender("SGD, momentum 0.9", onepass.SGD, {"momentum": 0.9}),
    Contender("SGD, Nesterov 0.9", onepass.SGD, {"momentum": 0.9, "nesterov": True}),
    Contender("ASGD", onepass.ASGD),
    Contender("Rprop", onepass.Rprop),
    Contender("Adagrad", onepass.Adagrad),
    Contender("RMSprop", onepass.RMSprop),
    Contender("Adadelta", onepass.Adadelta),
    Contender("Adam", onepass.Adam),
    Contender("AdamW", onepass.AdamW),
    Contender("Adamax", onepass.Adamax),
    Contender("NAdam", onepass.NAdam),
    Contender("RAdam", onepass.RAdam),
    Contender("Adafactor", onepass.Adafactor),
    # Of a column there is one direction: Muon takes it, and the length of each step is about lr.
    Contender("Muon", onepass.Muon, matrix=True),
)
RATES = tuple(float(f"{digit}e{power}") for power in range(-4, 2) for digit in (1, 2, 5))


def search(problem: Problem, contender: Contender, rates: Sequence[float] = RATES) -> Track:
    """The path with the lowest last loss among those at each of `rates` which never leave the
    problem's window.

    A rate so large that the path leaves it may end low by chance. Raises ValueError where every
    path leaves.
    """
    runs = [{**contender.options, "lr": rate} for rate in rates]
    low, high = torch.tensor(problem.window, dtype=torch.float64).unbind(1)
    paths = follow(problem, contender.cls, runs, matrix=contender.matrix)
    inside = [path for path in paths if bool(((low <= path.places) & (path.places <= high)).all())]
    if not inside:
        raise ValueError(
            f"{contender.name} leaves the window at every rate: give smaller ones than "
            f"{min(rates):g}."
        )
    return min(inside, key=lambda path: float(path.losses[-1]))
