"""Pictures of descents: learning rates, momentum, and the paths of all algorithms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import onepass

from ...pictures import COLOURS, GREY, new_figure, tidy
from .paths import CONTENDERS, PARABOLA, RATES, RAVINE, Problem, Track, follow, search

__all__ = ["draw_all_paths", "draw_divergence", "draw_momentum", "draw_nesterov", "draw_rates"]

BLUE, RED, GREEN = COLOURS[:3]


def draw_divergence() -> Figure:
    """The parabola with steps of the gradient itself: lr = 1."""
    figure = new_figure(700, 320)
    (path,) = follow(PARABOLA, onepass.SGD, [{"lr": 1.0}], 8)
    left, right = figure.subplots(1, 2)
    _draw_parabola(left, path, 120, 3)
    for place, aside in zip(
        path.places[:3, 0].tolist(), ((12, 12), (-8, 14), (-26, -4)), strict=True
    ):
        at = (place, 4 * place**2)
        left.annotate(
            _tell([place], "g"),
            at,
            xytext=aside,
            textcoords="offset points",
            fontsize=9,
            ha="center",
        )
    tidy(left, "the first two steps", "x", "y = 4x²")
    left.set_ylim(-3500, 46000)
    distance = path.places[:, 0].abs()
    right.semilogy(distance, color=RED, marker="o", markersize=4)
    tidy(right, "every step multiplies x by −7", "step", "distance from the minimum")
    figure.suptitle(
        f"No learning rate (lr = 1): x = {_tell(path.places[:6, 0].tolist(), '.0f')}, …",
        fontsize=10,
    )
    return figure


def draw_rates() -> Figure:
    """The same descent at six learning rates, from the edge of divergence to far too slow."""
    figure = new_figure(700, 520)
    rates = (0.25, 0.2, 0.125, 0.1, 0.05, 0.01)
    paths = follow(PARABOLA, onepass.SGD, [{"lr": rate} for rate in rates], 20)
    for axes, rate, path in zip(
        figure.subplots(2, 3, sharex=True, sharey=True).flat, rates, paths, strict=True
    ):
        _draw_parabola(axes, path, 2.5, 21)
        tidy(axes, f"lr = {rate:g}: each step × {1 - 8 * rate:.3g}".replace("-", "−"))
        axes.text(
            0.5,
            0.91,
            f"{_tell(path.places[:5, 0].tolist(), '.3g')}, …",
            transform=axes.transAxes,
            fontsize=8,
            ha="center",
        )
        axes.set_ylim(-1.5, 30)
    figure.suptitle(
        "Gradient descent on y = 4x² from x = 2: 20 steps at six learning rates", fontsize=10
    )
    return figure


def _draw_parabola(axes: Axes, path: Track, width: float, count: int) -> None:
    """The parabola from -width to width, and the first places of the path on it."""
    at = torch.linspace(-width, width, 201, dtype=torch.float64)
    axes.plot(at, PARABOLA.loss(at[:, None]), color=GREY, linewidth=1)
    places, losses = path.places[:count, 0], path.losses[:count]
    axes.plot(places, losses, color=RED, linewidth=0.9, marker="o", markersize=4)
    axes.plot(places[:1], losses[:1], "o", color="black", markersize=5)


def _tell(values: Sequence[float], form: str) -> str:
    return ", ".join(f"{value:{form}}".replace("-", "−") for value in values)


def draw_momentum() -> Figure:
    """Loss over steps in the ravine, with and without momentum, at small learning rates."""
    figure = new_figure(700, 300)
    rates = (0.01, 0.005, 0.001)
    runs = [{"lr": rate, "momentum": momentum} for rate in rates for momentum in (0.0, 0.9)]
    paths = follow(RAVINE, onepass.SGD, runs, 200)
    for axes, rate in zip(figure.subplots(1, 3, sharey=True), rates, strict=True):
        for path, colour in zip(
            [path for path in paths if path.options["lr"] == rate], (GREY, BLUE), strict=True
        ):
            momentum = path.options["momentum"]
            axes.semilogy(path.losses, color=colour, label=f"momentum {momentum:g}", linewidth=1.5)
        tidy(axes, f"lr = {rate:g}", "step")
    figure.axes[0].set_ylabel("loss", fontsize=9)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"Momentum at small learning rates, on the ravine {RAVINE.name}", fontsize=10)
    return figure


def draw_nesterov() -> Figure:
    """How far momentum carries beyond the minimum, plain and Nesterov's."""
    figure = new_figure(700, 330)
    looks = ((False, "plain", GREY), (True, "Nesterov", BLUE))
    left, right = figure.subplots(1, 2)
    runs = [{"lr": 0.02, "momentum": 0.9, "nesterov": nesterov} for nesterov, _, _ in looks]
    for path, (_, name, colour) in zip(follow(PARABOLA, onepass.SGD, runs, 50), looks, strict=True):
        lowest = float(path.places.min())
        left.plot(
            path.places[:, 0], color=colour, label=f"{name}: down to {lowest:.2f}".replace("-", "−")
        )
    left.axhline(0, color="black", linewidth=0.6)
    left.legend(frameon=False, fontsize=8)
    tidy(left, "y = 4x², lr = 0.02", "step", "x")
    _draw_contours(right, RAVINE)
    runs = [{**run, "lr": 0.01} for run in runs]
    for path, (_, name, colour) in zip(follow(RAVINE, onepass.SGD, runs, 60), looks, strict=True):
        right.plot(
            *path.places.T, color=colour, linewidth=1.2, marker=".", markersize=4, label=name
        )
    _mark(right, RAVINE)
    right.legend(frameon=False, fontsize=8, loc="upper right")
    tidy(right, f"{RAVINE.name}, lr = 0.01", "x", "y")
    right.grid(False)
    figure.suptitle("Overshooting with momentum 0.9", fontsize=10)
    return figure


def draw_all_paths(problem: Problem) -> Figure:
    """The path of every algorithm over the contours of `problem`, each at the best rate of one
    grid."""
    figure = new_figure(740, 1080)
    grid = figure.subplots(5, 3, sharex=True, sharey=True)
    for axes, contender in zip(grid.flat, CONTENDERS, strict=True):
        path = search(problem, contender)
        _draw_contours(axes, problem)
        axes.plot(*path.places.T, color=BLUE, linewidth=0.9, marker=".", markersize=2.5)
        _mark(axes, problem)
        tidy(
            axes,
            f"{contender.name}\nlr {path.options['lr']:g}, last loss {float(path.losses[-1]):.2g}",
        )
        axes.grid(False)
    figure.suptitle(
        f"{problem.steps} steps on {problem.name}, from the black point to the star;\n"
        f"lr: the best of {len(RATES)} from {min(RATES):g} to {max(RATES):g}",
        fontsize=10,
    )
    return figure


def _draw_contours(axes: Axes, problem: Problem) -> None:
    """Lines of equal loss, five times as high from each to the next."""
    lines = [torch.linspace(low, high, 241, dtype=torch.float64) for low, high in problem.window]
    x, y = torch.meshgrid(*lines, indexing="xy")
    levels = [0.3 * 5.0**power for power in range(5)]
    axes.contour(
        x, y, problem.loss(torch.stack([x, y], -1)), levels, colors="#bbbbbb", linewidths=0.6
    )


def _mark(axes: Axes, problem: Problem) -> None:
    axes.plot(*problem.start, "o", color="black", markersize=5, zorder=4)
    axes.plot(*problem.minimum, "*", color=RED, markersize=10, zorder=4)
