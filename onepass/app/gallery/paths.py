"""Where optimizers go: their real steps on functions of one or two numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import onepass

from ...optimizer import Optimizer
from ..catalog import Variant, optimizers

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


# --- what is minimized ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A function to minimize, from `start` to `minimum` in this many `steps`.

    `loss` takes points, the last dimension of a tensor, and returns one loss for each. `window` is
    what a picture shows: the lowest and the highest value of each coordinate.
    """

    name: str
    loss: Callable[[Tensor], Tensor]
    start: tuple[float, ...]
    minimum: tuple[float, ...]
    window: tuple[tuple[float, float], ...]
    steps: int


def _parabola(points: Tensor) -> Tensor:
    return 4 * points[..., 0] ** 2


def _ravine(points: Tensor) -> Tensor:
    return 0.5 * points[..., 0] ** 2 + 25 * points[..., 1] ** 2


def _rosenbrock(points: Tensor) -> Tensor:
    return (1 - points[..., 0]) ** 2 + 100 * (points[..., 1] - points[..., 0] ** 2) ** 2


PARABOLA = Problem(
    name="y = 4x²",
    loss=_parabola,
    start=(2.0,),
    minimum=(0.0,),
    window=((-2.4, 2.4),),
    steps=40,
)
RAVINE = Problem(
    name="½x² + 25y²",
    loss=_ravine,
    start=(-4.0, 1.0),
    minimum=(0.0, 0.0),
    window=((-4.6, 1.8), (-1.6, 1.6)),
    steps=100,
)
ROSENBROCK = Problem(
    name="Rosenbrock's (1 − x)² + 100 (y − x²)²",
    loss=_rosenbrock,
    start=(-1.2, 1.0),
    minimum=(1.0, 1.0),
    window=((-1.9, 1.9), (-0.7, 2.3)),
    steps=300,
)


# --- who minimizes it -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """An algorithm under the name that its picture has.

    What `options` leave out is the class's default. With `matrix`, a point is a parameter of one
    column instead of a vector.
    """

    name: str
    cls: type[Optimizer]
    options: dict[str, Any] = field(default_factory=dict)
    matrix: bool = False


# Roughly in the order in which they were invented.
_KNOWN = (
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
    # A column has only one direction: Muon takes it, and the length of each step is about lr.
    Contender("Muon", onepass.Muon, matrix=True),
)


def _list_contenders() -> tuple[Contender, ...]:
    """Return the known contenders, and any other class of the catalog that steps on a gradient."""
    known = {contender.cls for contender in _KNOWN}
    others = [
        Contender(name, cls)
        for name, cls in optimizers().items()
        if cls not in known and not Variant(name, cls).demand
    ]
    return (*_KNOWN, *others)


CONTENDERS = _list_contenders()


# --- their paths ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Track:
    """A run's path: `places`, float64 of shape (steps + 1, coordinates), the start first.

    `losses` has the loss at each place, `options` those of the run.
    """

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
    """Minimize `problem` once for each of `runs`, and return the paths in their order.

    A run is the options of one param group: all runs are groups of one optimizer, so that each of
    its steps is a step of every run. `steps` replaces the problem's own number. With `matrix`, a
    point is a parameter of one column instead of a vector.
    """
    shape = (-1, 1) if matrix else (-1,)
    start = torch.tensor(problem.start, dtype=torch.float64).reshape(shape)
    params = [start.clone().requires_grad_() for _ in runs]
    groups = [{"params": [p], **options} for p, options in zip(params, runs, strict=True)]
    shared = optimizer(groups)

    places = []
    losses = []
    count = problem.steps if steps is None else steps
    for _ in range(count + 1):
        points = torch.stack([p.flatten() for p in params])
        loss = problem.loss(points)
        places.append(points.detach())
        losses.append(loss.detach())
        shared.zero_grad()
        loss.sum().backward()
        shared.step()

    # Of shape (runs, steps + 1, ...).
    all_places = torch.stack(places, 1)
    all_losses = torch.stack(losses, 1)
    return [
        Track(all_places[index], all_losses[index], dict(options))
        for index, options in enumerate(runs)
    ]


RATES = tuple(float(f"{digit}e{power}") for power in range(-4, 2) for digit in (1, 2, 5))


def search(problem: Problem, contender: Contender, rates: Sequence[float] = RATES) -> Track:
    """Return the path with the lowest last loss, of those at each of `rates`.

    Only paths count that never leave the problem's window: one at a rate so large that it leaves
    may end low by chance. Raises ValueError if every path leaves.
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
