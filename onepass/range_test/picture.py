"""The picture of a learning-rate range test."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from ..pictures import BLUE, RED, new_figure, save, tidy_frame

__all__ = ["draw"]


def draw(
    path: str | os.PathLike[str],
    title: str,
    lrs: Sequence[float],
    losses: Sequence[float],
    smoothed: Sequence[float],
    suggestion: float,
) -> None:
    """Draw losses, raw and smoothed, against the learning rate, and the suggested one, to the PNG
    file `path`."""
    figure = new_figure(1125, 675, dpi=150)
    axes = figure.subplots()
    axes.plot(lrs, losses, color=BLUE, alpha=0.3, linewidth=1.0, label="loss of each batch")
    axes.plot(lrs, smoothed, color=BLUE, linewidth=2.0, label="smoothed")
    axes.axvline(
        suggestion,
        color=RED,
        linewidth=1.2,
        linestyle="--",
        label=f"suggested: {suggestion:g}",
    )
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss")
    axes.set_ylim(*_limits(losses, smoothed))
    tidy_frame(axes)
    axes.legend(frameon=False, loc="best")
    axes.set_title(title)
    save(figure, Path(path))


def _limits(losses: Sequence[float], smoothed: Sequence[float]) -> tuple[float, float]:
    """Bounds of the loss in which its fall is seen: an explosion may leave at the top."""
    low = min(value for value in losses if math.isfinite(value))
    best = smoothed.index(min(value for value in smoothed if math.isfinite(value)))
    high = max(losses[: best + 1])
    margin = (high - low) or abs(high) or 1.0
    return low - 0.05 * margin, high + 0.25 * margin
