"""The curves of a training run as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from ...pictures import BLUE, GREEN, RED, new_figure, save, tidy_frame
from .run import Run

__all__ = ["plot_curves"]

_TRAIN = BLUE
_HELD_OUT = RED
_LR = GREEN


def plot_curves(run: Run, path: Path) -> None:
    """Draw the loss, the metric and the learning rate of a run to the PNG file `path`.

    The x axis counts optimizer steps. The run must have finished at least one epoch.
    """
    figure = new_figure(1125, 1275, dpi=150)
    loss, metric, lr = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1.6))
    epochs = len(run.history.held_out_loss)
    epoch_ends = [run.steps_per_epoch * (epoch + 1) for epoch in range(epochs)]

    _draw_loss(loss, run, epoch_ends)
    _draw_metric(metric, run, epoch_ends)
    _draw_lr(lr, run)
    lr.set_xlim(0, epoch_ends[-1])

    figure.align_ylabels()
    settings = run.settings
    figure.suptitle(
        f"{settings.task}: {settings.optimizer}, lr {settings.lr:g}, batch size "
        f"{settings.batch_size}, seed {settings.seed}"
    )
    save(figure, path)


def _draw_loss(axes: Axes, run: Run, epoch_ends: Sequence[int]) -> None:
    """Draw the losses, on a logarithmic axis if they fall to less than a twentieth."""
    train = run.history.train_loss
    held_out = run.history.held_out_loss
    _draw(axes, train, epoch_ends, held_out)
    _label(axes, "loss")
    is_positive = min(train) > 0 and min(held_out) > 0
    if is_positive and max(train) > 20 * min(train):
        axes.set_yscale("log")
    axes.legend(frameon=False)


def _draw_metric(axes: Axes, run: Run, epoch_ends: Sequence[int]) -> None:
    """Draw the metric as people see it, and write its last value."""
    metric = run.task.metric
    train = [metric.scale * value for value in run.history.train_metric]
    held_out = [metric.scale * value for value in run.history.held_out_metric]
    _draw(axes, train, epoch_ends, held_out)
    _label(axes, f"{metric.name} ({metric.unit})" if metric.unit else metric.name)
    text = metric.show(run.history.held_out_metric[-1])
    # A metric with a unit is a percentage, and rises: there is room below its end.
    _write_last(axes, epoch_ends[-1], held_out[-1], text, below=bool(metric.unit))


def _draw_lr(axes: Axes, run: Run) -> None:
    rates = run.history.lr
    axes.plot(range(1, len(rates) + 1), rates, color=_LR, linewidth=1.5)
    _label(axes, "learning rate")
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"optimizer step ({run.steps_per_epoch} an epoch)")


def _draw(
    axes: Axes, train: Sequence[float], epoch_ends: Sequence[int], held_out: Sequence[float]
) -> None:
    """Draw each training batch faintly, their running mean, and a point after each epoch."""
    steps = range(1, len(train) + 1)
    axes.plot(steps, train, color=_TRAIN, alpha=0.25, linewidth=0.8)
    axes.plot(steps, _smooth(train), color=_TRAIN, linewidth=1.6, label="training")
    (line,) = axes.plot(
        epoch_ends,
        held_out,
        color=_HELD_OUT,
        linewidth=1.6,
        marker="o",
        markersize=4,
        label="held out",
        zorder=3,
    )
    # The last point lies on the edge of the panel.
    line.set_clip_on(False)


def _write_last(axes: Axes, step: int, value: float, text: str, *, below: bool) -> None:
    """Write the last held-out value beside its curve, on the side where there is room."""
    axes.annotate(
        text,
        (step, value),
        xytext=(0, -9 if below else 9),
        textcoords="offset points",
        ha="right",
        va="top" if below else "bottom",
        color=_HELD_OUT,
    )


def _smooth(values: Sequence[float]) -> list[float]:
    """Return the running mean: of each value and those before it, a fortieth of all of them.

    Example: of 80 values, each mean is over 2; the first is over 1.
    """
    width = max(1, len(values) // 40)
    means: list[float] = []
    total = 0.0
    for index, value in enumerate(values):
        total += value
        if index >= width:
            total -= values[index - width]
        means.append(total / min(index + 1, width))
    return means


def _label(axes: Axes, text: str) -> None:
    axes.set_ylabel(text)
    tidy_frame(axes)
