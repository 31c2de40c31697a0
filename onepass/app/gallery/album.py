"""All pictures of the gallery, by name, and their files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from ...pictures import save
from .draw_moments import draw_averages, draw_decay
from .draw_paths import draw_all_paths, draw_divergence, draw_momentum, draw_nesterov, draw_rates
from .draw_schedules import draw_makers, draw_plateau, draw_scheduler
from .lr_schedules import EXAMPLES
from .paths import RAVINE, ROSENBROCK

__all__ = ["PICTURES", "Picture", "make"]


@dataclass(frozen=True)
class Picture:
    """A picture: the name of its file without .png, what it shows, and what draws it."""

    name: str
    meaning: str
    draw: Callable[[], Figure]


PICTURES = (
    Picture(
        "no-learning-rate",
        "steps of the whole gradient on a parabola: 2, -14, 98, -686, ...",
        draw_divergence,
    ),
    Picture(
        "learning-rates",
        "the same parabola at six rates: too large, just right, too small",
        draw_rates,
    ),
    Picture(
        "averages",
        "how far back an exponential average looks, and why its start is corrected",
        draw_averages,
    ),
    Picture(
        "momentum",
        "momentum 0.9 makes up for a learning rate that is ten times too small",
        draw_momentum,
    ),
    Picture("nesterov", "Nesterov's momentum overshoots less than plain momentum", draw_nesterov),
    Picture(
        "paths-ravine",
        "all algorithms in an ill-conditioned ravine",
        partial(draw_all_paths, RAVINE),
    ),
    Picture(
        "paths-rosenbrock",
        "all algorithms in Rosenbrock's curved valley",
        partial(draw_all_paths, ROSENBROCK),
    ),
    Picture(
        "weight-decay",
        "L2 spares weights with large gradients; decoupled decay treats all alike",
        draw_decay,
    ),
    Picture("schedules", "what onepass.schedule makes, under the text that makes it", draw_makers),
    *(
        Picture(name, f"what {name} sets over {example.steps} steps", partial(draw_scheduler, name))
        for name, example in EXAMPLES.items()
    ),
    Picture(
        "ReduceLROnPlateau",
        "the rate falls when the loss stops falling, and then the loss falls again",
        draw_plateau,
    ),
)


def make(folder: Path) -> Iterator[tuple[Picture, Path]]:
    """Draw every picture into `folder`, which must exist.

    Yields each picture and its PNG file when that is written.
    """
    for picture in PICTURES:
        path = folder / f"{picture.name}.png"
        save(picture.draw(), path)
        yield picture, path
