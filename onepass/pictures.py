"""What all pictures share: a figure of a size in pixels, its colours, and the file that it
becomes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

__all__ = ["COLOURS", "GREY", "new_figure", "save", "tidy"]

# Okabe and Ito's colours: told apart by colour-blind readers, and in print by their lightness.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
GREY = "#888888"
DPI = 110


def new_figure(width: int, height: int) -> Figure:
    """An empty figure of that many pixels."""
    return Figure(figsize=(width / DPI, height / DPI), dpi=DPI, layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Write the PNG file `path`, whole or not at all; in 128 colours, a third of the bytes look the
    same."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    temporary = path.with_name(f".{path.name}.tmp")
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    image = image.quantize(128, method=Image.Quantize.FASTOCTREE)
    image.save(temporary, format="png", optimize=True, dpi=(DPI, DPI))
    os.replace(temporary, path)


def tidy(axes: Axes, title: str = "", x: str = "", y: str = "") -> None:
    """Small type, a faint grid, and no frame but the two axes."""
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
