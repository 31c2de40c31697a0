"""The curves of a training run as one picture."""

from __future__ import annotations

import os
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .loop import Run

__all__ = ["plot_curves"]

_TRAIN, _HELD_OUT, _LR = "#4477aa", "#cc3311", "#228833"  # told apart by colour-blind readers too


def plot_curves(run: Run, path: Path) -> None:
    """Draw loss, metric and learning rate over the optimizer steps of `run` to the PNG file
    `path`."""
    figure = Figure(figsize=(7.5, 8.5), layout="constrained")
    FigureCanvasAgg(figure)
    loss, metric, lr = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1.6))
    history, shown = run.history, run.task.metric
    steps = [run.steps_per_epoch * (epoch + 1) for epoch in range(len(history.held_out_loss))]

    _draw(loss, history.train_loss, steps, history.held_out_loss)
    _label(loss, "loss")
    if (
        max(history.train_loss) > 20 * min(history.train_loss) > 0
        and min(history.held_out_loss) > 0
    ):
        loss.set_yscale("log")
    loss.legend(frameon=False)

    scaled = [shown.scale * value for value in history.train_metric]
    held_out = [shown.scale * value for value in history.held_out_metric]
    _draw(metric, scaled, steps, held_out)
    _label(metric, f"{shown.name} ({shown.unit})" if shown.unit else shown.name)
    _write_last(
        metric,
        steps[-1],
        held_out[-1],
        shown.show(history.held_out_metric[-1]),
        below=bool(shown.unit),
    )

    lr.plot(range(1, len(history.lr) + 1), history.lr, color=_LR, linewidth=1.5)
    _label(lr, "learning rate")
    lr.set_ylim(bottom=0)
    lr.set_xlabel(f"optimizer step ({run.steps_per_epoch} an epoch)")
    lr.set_xlim(0, steps[-1])

    figure.align_ylabels()
    settings = run.settings
    figure.suptitle(
        f"{settings.task}: {settings.optimizer}, lr {settings.lr:g}, batch size "
        f"{settings.batch_size}, seed {settings.seed}"
    )
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=150)
    os.replace(temporary, path)


def _draw(axes: Axes, train: list[float], held_out_steps: list[int], held_out: list[float]) -> None:
    """Each training batch faintly, their running mean over it, and the held-out value after each
    epoch."""
    steps = range(1, len(train) + 1)
    axes.plot(steps, train, color=_TRAIN, alpha=0.25, linewidth=0.8)
    axes.plot(steps, _smooth(train), color=_TRAIN, linewidth=1.6, label="training")
    axes.plot(
        held_out_steps,
        held_out,
        color=_HELD_OUT,
        linewidth=1.6,
        marker="o",
        markersize=4,
        label="held out",
        zorder=3,
    )[0].set_clip_on(False)


def _write_last(axes: Axes, step: int, value: float, text: str, *, below: bool) -> None:
    """The last held-out value in figures, on the side of its curve where there is room."""
    axes.annotate(
        text,
        (step, value),
        xytext=(0, -9 if below else 9),
        textcoords="offset points",
        ha="right",
        va="top" if below else "bottom",
        color=_HELD_OUT,
    )


def _smooth(values: list[float]) -> list[float]:
    """The mean over each value and those before it, as many as a fortieth of all."""
    width = max(1, len(values) // 40)
    means: list[float] = []
    total = 0.0
    for index, value in enumerate(values):
        total += value - (values[index - width] if index >= width else 0.0)
        means.append(total / min(index + 1, width))
    return means


def _label(axes: Axes, text: str) -> None:
    axes.set_ylabel(text)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
