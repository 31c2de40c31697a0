"""Pictures of running means, and of weight decay inside and outside of them."""

from __future__ import annotations

from matplotlib.figure import Figure

import onepass

from ...pictures import COLOURS, GREY, new_figure, tidy
from .moments import average, average_weights, decay, noisy_series

__all__ = ["draw_averages", "draw_decay"]


def draw_averages() -> Figure:
    """The weights in an exponential average, and what the correction of its start changes."""
    figure = new_figure(740, 330)
    left, right = figure.subplots(1, 2)
    for beta, colour in zip((0.8, 0.9, 0.95, 0.98), COLOURS, strict=False):
        window = round(1 / (1 - beta))
        weights = average_weights(beta, 80)
        left.plot(weights, color=colour, linewidth=1.5, label=f"β = {beta:g}: {window} steps")
        left.plot([window], weights[window], "o", color=colour, markersize=5)
    left.set_ylim(bottom=0)
    left.legend(title="window 1 / (1 − β), the points", title_fontsize=8, fontsize=8, frameon=False)
    tidy(left, "weight (1 − β) βᵏ of a gradient", "steps back, k")

    series = noisy_series(100)
    right.plot(series, ".", color=GREY, markersize=3, label="gradients")
    for beta, colour in ((0.9, COLOURS[1]), (0.98, COLOURS[3])):
        mean = average(series, beta)
        corrected = [value / (1 - beta**step) for step, value in enumerate(mean.tolist(), 1)]
        right.plot(mean, "--", color=colour, linewidth=1.2, label=f"β = {beta:g}")
        right.plot(corrected, color=colour, linewidth=1.5, label=f"β = {beta:g}, corrected")
    right.set_ylim(-0.05, 3)
    right.legend(fontsize=8, frameon=False, ncols=2, loc="upper right", columnspacing=1)
    tidy(right, "mean, without and with division by 1 − βᵗ", "step")
    return figure


def draw_decay() -> Figure:
    """Weights under L2 (Adam) and decoupled decay (AdamW), by the size of their gradients."""
    figure = new_figure(740, 330)
    scales, lr, weight_decay = (0.01, 0.1, 1.0, 10.0), 0.01, 0.1
    for axes, optimizer, title in zip(
        figure.subplots(1, 2, sharey=True),
        (onepass.Adam, onepass.AdamW),
        ("Adam: λθ is part of the gradient (L2)", "AdamW: decoupled, (1 − lr λ) θ"),
        strict=True,
    ):
        means = decay(optimizer, scales, 600, lr=lr, weight_decay=weight_decay)
        for mean, scale, colour, width in zip(
            means, scales, COLOURS, (4.0, 3.0, 2.0, 1.0), strict=False
        ):
            axes.plot(mean, color=colour, linewidth=width, label=f"size {scale:g}")
        tidy(axes, title, "step")
        axes.set_ylim(-0.05, 1.08)
    figure.axes[0].set_ylabel("mean weight", fontsize=9)
    figure.axes[1].legend(
        title="gradients: noise of", title_fontsize=8, fontsize=8, frameon=False, loc="lower left"
    )
    figure.suptitle(
        f"Decay of weights that nothing else moves on average: lr {lr:g}, λ {weight_decay:g}",
        fontsize=10,
    )
    return figure
