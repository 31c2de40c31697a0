"""Pictures of paths: learning rates, momentum, and all algorithms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import onepass

from ...pictures import BLUE, GREY, RED, new_figure, new_grid, tidy
from .paths import CONTENDERS, PARABOLA, RATES, RAVINE, Problem, Track, follow, search

__all__ = ["draw_all_paths", "draw_divergence", "draw_momentum", "draw_nesterov", "draw_rates"]


# --- the parabola ---------------------------------------------------------------------------------


def draw_divergence() -> Figure:
    """Draw the parabola with steps of the gradient itself, lr = 1, and the distances they reach."""
    figure = new_figure(700, 320)
    (path,) = follow(PARABOLA, onepass.SGD, [{"lr": 1.0}], 8)
    left, right = figure.subplots(1, 2)
    _draw_parabola(left, path, 120, 3)
    offsets = ((12, 12), (-8, 14), (-26, -4))
    for x, offset in zip(path.places[:3, 0].tolist(), offsets, strict=True):
        left.annotate(
            _list_numbers([x], "g"),
            (x, 4 * x**2),
            xytext=offset,
            textcoords="offset points",
            fontsize=9,
            ha="center",
        )
    tidy(left, "the first two steps", "x", "y = 4x²")
    left.set_ylim(-3500, 46000)

    right.semilogy(path.places[:, 0].abs(), color=RED, marker="o", markersize=4)
    tidy(right, "every step multiplies x by −7", "step", "distance from the minimum")
    first = _list_numbers(path.places[:6, 0].tolist(), ".0f")
    figure.suptitle(f"No learning rate (lr = 1): x = {first}, …", fontsize=10)
    return figure


def draw_rates() -> Figure:
    """Draw the same descent at six learning rates, from the edge of divergence to far too slow."""
    rates = (0.25, 0.2, 0.125, 0.1, 0.05, 0.01)
    figure, panels = new_grid(len(rates), 3, 700, 260, sharex=True, sharey=True)
    paths = follow(PARABOLA, onepass.SGD, [{"lr": rate} for rate in rates], 20)
    for axes, rate, path in zip(panels, rates, paths, strict=True):
        _draw_parabola(axes, path, 2.5, 21)
        factor = f"{1 - 8 * rate:.3g}".replace("-", "−")
        tidy(axes, f"lr = {rate:g}: each step × {factor}")
        first = _list_numbers(path.places[:5, 0].tolist(), ".3g")
        axes.text(0.5, 0.91, f"{first}, …", transform=axes.transAxes, fontsize=8, ha="center")
        axes.set_ylim(-1.5, 30)
    figure.suptitle(
        "Gradient descent on y = 4x² from x = 2: 20 steps at six learning rates", fontsize=10
    )
    return figure


def _draw_parabola(axes: Axes, path: Track, width: float, count: int) -> None:
    """Draw the parabola from -width to width, and the first `count` places of a path on it."""
    x = torch.linspace(-width, width, 201, dtype=torch.float64)
    axes.plot(x, PARABOLA.loss(x[:, None]), color=GREY, linewidth=1)
    places = path.places[:count, 0]
    losses = path.losses[:count]
    axes.plot(places, losses, color=RED, linewidth=0.9, marker="o", markersize=4)
    axes.plot(places[:1], losses[:1], "o", color="black", markersize=5)


def _list_numbers(values: Sequence[float], form: str) -> str:
    """Return numbers with commas between them, and with real minus signs."""
    return ", ".join(f"{value:{form}}".replace("-", "−") for value in values)


# --- momentum -------------------------------------------------------------------------------------


def draw_momentum() -> Figure:
    """Draw loss over steps in the ravine, with and without momentum, at small learning rates."""
    figure = new_figure(700, 300)
    rates = (0.01, 0.005, 0.001)
    colours = {0.0: GREY, 0.9: BLUE}
    runs = [{"lr": rate, "momentum": momentum} for rate in rates for momentum in colours]
    panels = dict(zip(rates, figure.subplots(1, 3, sharey=True), strict=True))
    for path in follow(RAVINE, onepass.SGD, runs, 200):
        momentum = path.options["momentum"]
        panels[path.options["lr"]].semilogy(
            path.losses,
            color=colours[momentum],
            label=f"momentum {momentum:g}",
            linewidth=1.5,
        )
    for rate, axes in panels.items():
        tidy(axes, f"lr = {rate:g}", "step")
    figure.axes[0].set_ylabel("loss", fontsize=9)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"Momentum at small learning rates, on the ravine {RAVINE.name}", fontsize=10)
    return figure


def draw_nesterov() -> Figure:
    """Draw how far momentum carries beyond the minimum, plain and Nesterov's."""
    figure = new_figure(700, 330)
    left, right = figure.subplots(1, 2)
    names = {False: "plain", True: "Nesterov"}
    colours = {False: GREY, True: BLUE}

    runs = [{"lr": 0.02, "momentum": 0.9, "nesterov": nesterov} for nesterov in names]
    for path in follow(PARABOLA, onepass.SGD, runs, 50):
        nesterov = path.options["nesterov"]
        lowest = f"{float(path.places.min()):.2f}".replace("-", "−")
        label = f"{names[nesterov]}: down to {lowest}"
        left.plot(path.places[:, 0], color=colours[nesterov], label=label)
    left.axhline(0, color="black", linewidth=0.6)
    left.legend(frameon=False, fontsize=8)
    tidy(left, "y = 4x², lr = 0.02", "step", "x")

    _draw_contours(right, RAVINE)
    runs = [{**run, "lr": 0.01} for run in runs]
    for path in follow(RAVINE, onepass.SGD, runs, 60):
        nesterov = path.options["nesterov"]
        look = {"linewidth": 1.2, "marker": ".", "markersize": 4}
        right.plot(*path.places.T, color=colours[nesterov], label=names[nesterov], **look)
    _mark_ends(right, RAVINE)
    right.legend(frameon=False, fontsize=8, loc="upper right")
    tidy(right, f"{RAVINE.name}, lr = 0.01", "x", "y")
    right.grid(False)
    figure.suptitle("Overshooting with momentum 0.9", fontsize=10)
    return figure


# --- all algorithms -------------------------------------------------------------------------------


def draw_all_paths(problem: Problem) -> Figure:
    """Draw every algorithm's path over the contours of `problem`, each at its best rate."""
    figure, panels = new_grid(len(CONTENDERS), 3, 740, 216, sharex=True, sharey=True)
    for axes, contender in zip(panels, CONTENDERS, strict=True):
        path = search(problem, contender)
        _draw_contours(axes, problem)
        axes.plot(*path.places.T, color=BLUE, linewidth=0.9, marker=".", markersize=2.5)
        _mark_ends(axes, problem)
        last = float(path.losses[-1])
        tidy(axes, f"{contender.name}\nlr {path.options['lr']:g}, last loss {last:.2g}")
        axes.grid(False)
    figure.suptitle(
        f"{problem.steps} steps on {problem.name}, from the black point to the star;\n"
        f"lr: the best of {len(RATES)} from {min(RATES):g} to {max(RATES):g}",
        fontsize=10,
    )
    return figure


def _draw_contours(axes: Axes, problem: Problem) -> None:
    """Draw lines of equal loss: 0.3, and five times as much from each line to the next."""
    lines = [torch.linspace(low, high, 241, dtype=torch.float64) for low, high in problem.window]
    x, y = torch.meshgrid(*lines, indexing="xy")
    losses = problem.loss(torch.stack([x, y], -1))
    levels = [0.3 * 5.0**power for power in range(5)]
    axes.contour(x, y, losses, levels, colors="#bbbbbb", linewidths=0.6)


def _mark_ends(axes: Axes, problem: Problem) -> None:
    """Mark where paths start, and where they should end."""
    axes.plot(*problem.start, "o", color="black", markersize=5, zorder=4)
    axes.plot(*problem.minimum, "*", color=RED, markersize=10, zorder=4)
