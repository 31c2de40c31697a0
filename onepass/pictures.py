"""What all pictures share: figures of a size in pixels, their colours, and the files they become.

Importing this loads matplotlib, so the library imports it only when a picture is drawn.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

__all__ = [
    "BLUE",
    "COLOURS",
    "GREEN",
    "GREY",
    "ORANGE",
    "PINK",
    "RED",
    "SKY",
    "new_figure",
    "new_grid",
    "save",
    "tidy",
    "tidy_frame",
]

# Okabe and Ito's colours: colour-blind readers tell them apart, and print does by lightness.
BLUE = "#0072b2"
RED = "#d55e00"
GREEN = "#009e73"
PINK = "#cc79a7"
ORANGE = "#e69f00"
SKY = "#56b4e9"
COLOURS = (BLUE, RED, GREEN, PINK, ORANGE, SKY)
GREY = "#888888"

DPI = 110
# A third of the bytes of a true-colour file, and it looks the same.
PNG_COLOURS = 128


def new_figure(width: int, height: int, dpi: int = DPI) -> Figure:
    """Return an empty figure of `width` x `height` pixels.

    Text has a size in points: with more dots per inch (`dpi`) it takes more of the pixels.
    """
    return Figure(figsize=(width / dpi, height / dpi), dpi=dpi, layout="constrained")


def new_grid(
    count: int, columns: int, width: int, row_height: int, **shared: Any
) -> tuple[Figure, list[Axes]]:
    """Return a figure with `count` panels, `columns` in a row, and the panels in reading order.

    `width` and `row_height` are in pixels; `shared` are options of matplotlib's `subplots`.

    Example: 16 panels in 3 columns need 6 rows. The last row has one panel; its two other places
    stay empty, and the panels above these show the numbers of their own x axes.
    """
    rows = -(-count // columns)
    figure = new_figure(width, rows * row_height)
    grid = figure.subplots(rows, columns, squeeze=False, **shared)
    panels = list(grid.flat)
    for empty in panels[count:]:
        empty.set_visible(False)
    for lowest in panels[max(0, count - columns) : count]:
        lowest.tick_params(labelbottom=True)
    return figure, panels[:count]


def save(figure: Figure, path: Path) -> None:
    """Write a figure to the PNG file `path`, whole or not at all."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())
    image = Image.fromarray(pixels).convert("RGB")
    image = image.quantize(PNG_COLOURS, method=Image.Quantize.FASTOCTREE)

    temporary = path.with_name(f".{path.name}.tmp")
    dots = (figure.dpi, figure.dpi)
    image.save(temporary, format="png", optimize=True, dpi=dots)
    os.replace(temporary, path)


def tidy(axes: Axes, title: str = "", x: str = "", y: str = "") -> None:
    """Give a panel a title and names of its axes in small type, and a quiet frame."""
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    tidy_frame(axes)


def tidy_frame(axes: Axes) -> None:
    """Give a panel a faint grid, and no frame except the two axes."""
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
