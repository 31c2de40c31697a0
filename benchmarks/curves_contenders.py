"""Who takes part in `curves.py`, at which rates and in which colours, and how tasks are run."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass

from onepass.app.catalog import find_variant, optimizers
from onepass.pictures import BLUE, GREY, ORANGE, PINK

__all__ = ["CONTENDERS", "PLANS", "Contender"]


@dataclass(frozen=True)
class Contender:
    """An algorithm, by the name that `onepass train` knows, and the looks of its curve.

    `middle` has the middle of the rates to try, by task. `epochs` and `batch_size` replace those
    of the task's plan.
    """

    label: str
    optimizer: str
    middle: dict[str, float]
    color: str
    line: str = "-"
    epochs: int | None = None
    batch_size: int | None = None

    def rates(self, task: str) -> list[float]:
        """Return the rates to try: each is 1 or 3 times a power of ten.

        Example: three rates around 3e-3 are 1e-3, 3e-3 and 1e-2.
        """
        count = PLANS[task].rates
        # Half powers of ten: 1e-3 is -6, 3e-3 is -5.
        middle = round(2 * math.log10(self.middle[task]))
        first = middle - count // 2
        return [float(f"{(1, 3)[step % 2]}e{step // 2}") for step in range(first, first + count)]


@dataclass(frozen=True)
class Plan:
    """How a task is run: its settings are such that it takes minutes.

    An epoch has this many `parts`, over each of which the training loss is averaged.
    """

    epochs: int
    batch_size: int
    seeds: tuple[int, ...]
    rates: int
    parts: int


PLANS = {
    "digits": Plan(epochs=12, batch_size=64, seeds=(0, 1), rates=5, parts=1),
    "text": Plan(epochs=1, batch_size=4, seeds=(0,), rates=3, parts=32),
}

# More curves than the package's palette has colours.
BLACK = "#000000"
CYAN = "#33aadd"
FOREST = "#117733"
OLIVE = "#999933"
SAND = "#c08a5b"
SCARLET = "#d62728"
TEAL = "#44aa99"
VIOLET = "#7a3fb0"
WINE = "#882255"

PLACED_BY_HAND = (
    Contender("SGD, momentum 0.9", "sgd-momentum", {"digits": 0.03, "text": 0.03}, BLUE),
    Contender("ASGD", "asgd", {"digits": 0.3, "text": 0.1}, CYAN),
    Contender("Rprop", "rprop", {"digits": 1e-3, "text": 3e-3}, GREY, "--"),
    Contender(
        "Rprop, all data a step", "rprop", {"digits": 1e-2}, GREY, epochs=24, batch_size=1438
    ),
    Contender("Adagrad", "adagrad", {"digits": 0.1, "text": 0.03}, FOREST),
    Contender("RMSprop", "rmsprop", {"digits": 3e-3, "text": 3e-4}, OLIVE),
    Contender("Adadelta", "adadelta", {"digits": 3.0, "text": 1.0}, TEAL),
    Contender("Adam", "adam", {"digits": 3e-3, "text": 1e-3}, SCARLET),
    Contender("AdamW", "adamw", {"digits": 3e-3, "text": 1e-3}, SCARLET, "--"),
    Contender("Adamax", "adamax", {"digits": 1e-2, "text": 3e-3}, ORANGE),
    Contender("NAdam", "nadam", {"digits": 1e-2, "text": 1e-3}, PINK),
    Contender("RAdam", "radam", {"digits": 1e-2, "text": 1e-2}, WINE),
    Contender("Adafactor", "adafactor", {"digits": 0.1, "text": 0.1}, VIOLET),
    Contender("Muon + AdamW", "muon-adamw", {"digits": 1e-2, "text": 3e-2}, BLACK),
)


def further_contenders() -> Iterator[Contender]:
    """Yield the algorithms that nobody has placed by hand, at rates around the class's own."""
    placed = {find_variant(contender.optimizer).cls for contender in PLACED_BY_HAND}
    for name, cls in optimizers().items():
        if cls not in placed and not find_variant(name).demand:
            rate = float(inspect.signature(cls).parameters["lr"].default)
            yield Contender(name, name.lower(), dict.fromkeys(PLANS, rate), SAND)


CONTENDERS = (*PLACED_BY_HAND, *further_contenders())
