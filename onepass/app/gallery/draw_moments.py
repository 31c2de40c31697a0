"""Pictures of running means, and of weight decay inside and outside of them."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

import onepass

from ...pictures import COLOURS, GREY, PINK, RED, new_figure, tidy
from .moments import average, average_weights, decay, noisy_series

__all__ = ["draw_averages", "draw_decay"]


def draw_averages() -> Figure:
    """Draw the weights in an exponential average, and what the correction of its start changes."""
    figure = new_figure(740, 330)
    left, right = figure.subplots(1, 2)
    _draw_weights(left)
    _draw_means(right)
    return figure


def _draw_weights(axes: Axes) -> None:
    """Draw the weight of a gradient by its age, and mark the window of each beta."""
    for beta, colour in zip((0.8, 0.9, 0.95, 0.98), COLOURS, strict=False):
        window = round(1 / (1 - beta))
        weights = average_weights(beta, 80)
        axes.plot(weights, color=colour, linewidth=1.5, label=f"β = {beta:g}: {window} steps")
        axes.plot([window], weights[window], "o", color=colour, markersize=5)
    axes.set_ylim(bottom=0)
    axes.legend(title="window 1 / (1 − β), the points", title_fontsize=8, fontsize=8, frameon=False)
    tidy(axes, "weight (1 − β) βᵏ of a gradient", "steps back, k")


def _draw_means(axes: Axes) -> None:
    """Draw a noisy series and its running means, as they are and corrected."""
    series = noisy_series(100)
    axes.plot(series, ".", color=GREY, markersize=3, label="gradients")
    for beta, colour in ((0.9, RED), (0.98, PINK)):
        mean = average(series, beta)
        corrected = [value / (1 - beta**step) for step, value in enumerate(mean.tolist(), 1)]
        axes.plot(mean, "--", color=colour, linewidth=1.2, label=f"β = {beta:g}")
        axes.plot(corrected, color=colour, linewidth=1.5, label=f"β = {beta:g}, corrected")
    axes.set_ylim(-0.05, 3)
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="upper right", columnspacing=1)
    tidy(axes, "mean, without and with division by 1 − βᵗ", "step")


def draw_decay() -> Figure:
    """Draw weights under L2 (Adam) and decoupled decay (AdamW), by the size of their gradients."""
    figure = new_figure(740, 330)
    lr = 0.01
    weight_decay = 0.1
    scales = (0.01, 0.1, 1.0, 10.0)
    # Decoupled, the curves lie on each other: each is thinner than the one below it.
    widths = (4.0, 3.0, 2.0, 1.0)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, optimizer, title in (
        (left, onepass.Adam, "Adam: λθ is part of the gradient (L2)"),
        (right, onepass.AdamW, "AdamW: decoupled, (1 − lr λ) θ"),
    ):
        means = decay(optimizer, scales, 600, lr=lr, weight_decay=weight_decay)
        for mean, scale, colour, width in zip(means, scales, COLOURS, widths, strict=False):
            axes.plot(mean, color=colour, linewidth=width, label=f"size {scale:g}")
        tidy(axes, title, "step")
        axes.set_ylim(-0.05, 1.08)
    left.set_ylabel("mean weight", fontsize=9)
    right.legend(
        title="gradients: noise of", title_fontsize=8, fontsize=8, frameon=False, loc="lower left"
    )
    figure.suptitle(
        f"Decay of weights that nothing else moves on average: lr {lr:g}, λ {weight_decay:g}",
        fontsize=10,
    )
    return figure
