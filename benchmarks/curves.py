"""What docs/how-to-choose.md shows: every first-order algorithm on two tasks, at a grid of rates.

Each run is what `onepass train` does with these settings, on one thread; several run at a time. The
numbers go to benchmarks/curves.json, where new ones replace those of the same task and algorithm.
The pictures go to docs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from curves_contenders import CONTENDERS, PLANS, Contender
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from onepass.app.tasks import find_task
from onepass.app.training.loop import Diverged, fit
from onepass.app.training.run import Run
from onepass.app.training.settings import make_settings
from onepass.pictures import new_figure, save

ROOT = Path(__file__).parent.parent
RunResult = dict[str, Any]


# --- measuring ------------------------------------------------------------------------------------


class Silent:
    """An observer of a run that says nothing."""

    def stepped(self, run: Run) -> None:
        pass

    def finished_epoch(self, run: Run) -> None:
        pass


def train(task: str, contender: Contender, lr: float, seed: int, epochs: int) -> RunResult:
    """Return one run's numbers; if the loss became infinite, those up to there."""
    batch_size = contender.batch_size or PLANS[task].batch_size
    settings = make_settings(
        task=task,
        optimizer=contender.optimizer,
        lr=lr,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
    )
    run = Run(settings, ROOT / "data")
    diverged = False
    with tempfile.TemporaryDirectory() as folder:
        try:
            fit(run, Path(folder) / "last.safetensors", Silent())
        except Diverged:
            diverged = True
    losses = run.history.train_loss
    width = max(1, run.steps_per_epoch // PLANS[task].parts)
    begins = range(0, len(losses), width)
    history = run.history
    return {
        "task": task,
        "name": contender.label,
        "optimizer": contender.optimizer,
        "lr": lr,
        "seed": seed,
        "epochs": epochs,
        "batch_size": batch_size,
        "steps_per_epoch": run.steps_per_epoch,
        "diverged": diverged,
        "train_steps": [min(begin + width, len(losses)) for begin in begins],
        "train_loss": [_round(statistics.fmean(losses[begin : begin + width])) for begin in begins],
        "held_out_loss": [_round(value) for value in history.held_out_loss],
        "held_out_metric": [_round(value) for value in history.held_out_metric],
    }


def _round(value: float) -> float:
    return float(f"{value:.5g}")


# What `train` takes.
Job = tuple[str, Contender, float, int, int]


def plan_jobs(
    tasks: Sequence[str], contenders: Sequence[Contender], epochs: int | None
) -> list[Job]:
    """Return all runs that are wanted: every algorithm once, then again with the next seed."""
    return [
        (task, contender, lr, seed, epochs or contender.epochs or PLANS[task].epochs)
        for task in tasks
        for seed in PLANS[task].seeds
        for contender in contenders
        if task in contender.middle
        for lr in contender.rates(task)
    ]


def measure(jobs: Sequence[Job]) -> Iterator[RunResult]:
    """Yield the results as the runs end, and print a line for each; a process for each core."""
    context = get_context("spawn")
    with ProcessPoolExecutor(
        os.cpu_count(), context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        futures = [pool.submit(train, *job) for job in jobs]
        try:
            for count, future in enumerate(as_completed(futures), 1):
                print(f"{count:3} of {len(jobs)}  {describe(future.result())}", flush=True)
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def describe(result: RunResult) -> str:
    """Return a run in one line."""
    if result["diverged"]:
        end = "diverged"
    else:
        metric = find_task(result["task"]).metric
        end = f"{metric.name} {metric.show(result['held_out_metric'][-1])}"
    start = f"{result['task']:7} {result['name']:22} lr {result['lr']:<7g} seed {result['seed']}"
    return f"{start}  {end}"


# --- what the runs say ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """An algorithm on a task: its runs by lr, and the lr that is `best`.

    `final` has the held-out loss at the end for each lr: the mean over seeds, infinite if one of
    them diverged.
    """

    contender: Contender
    runs: dict[float, list[RunResult]]
    final: dict[float, float]
    best: float


def summarize(results: Sequence[RunResult], task: str) -> list[Summary]:
    """Return the algorithms measured on a task, the lowest held-out loss first."""
    found = []
    for contender in CONTENDERS:
        runs: dict[float, list[RunResult]] = {}
        for result in results:
            if (result["task"], result["name"]) == (task, contender.label):
                runs.setdefault(result["lr"], []).append(result)
        if runs:
            final = {
                lr: statistics.fmean(map(last_loss, several))
                for lr, several in sorted(runs.items())
            }
            found.append(Summary(contender, runs, final, min(final, key=lambda lr: final[lr])))
    return sorted(found, key=lambda summary: summary.final[summary.best])


def last_loss(result: RunResult) -> float:
    """Return the held-out loss at the end; infinite if the run diverged."""
    return math.inf if result["diverged"] else result["held_out_loss"][-1]


def tabulate(summaries: Sequence[Summary], task: str) -> str:
    """Return the table of the page, in Markdown."""
    metric = find_task(task).metric
    lines = [
        f"| algorithm | rates tried | best | held-out loss | {metric.name} |",
        "|---|---|---|---|---|",
    ]
    for summary in summaries:
        best = summary.runs[summary.best]
        values = [run["held_out_metric"][-1] for run in best if not run["diverged"]]
        shown = metric.show(statistics.fmean(values)) if values else "-"
        rates = ", ".join(f"{lr:g}" for lr in summary.final)
        loss = f"{summary.final[summary.best]:.4f}"
        lines.append(
            f"| {summary.contender.label} | {rates} | {summary.best:g} | {loss} | {shown} |"
        )
    return "\n".join(lines)


def tabulate_sensitivity(results: Sequence[RunResult]) -> str:
    """Return a table of what a rate costs that is about three times too small or too large.

    A cell is the rise of the held-out loss, in percent.
    """
    found = {
        task: {summary.contender.label: summary for summary in summarize(results, task)}
        for task in PLANS
    }
    titles = [f"{task}, lr {side}" for task in PLANS for side in ("/ 3", "x 3")]
    lines = [f"| algorithm | {' | '.join(titles)} |", "|---|" + "---|" * len(titles)]
    for contender in CONTENDERS:
        cells = []
        for task in PLANS:
            summary = found[task].get(contender.label)
            cells += [_rise(summary, -1), _rise(summary, 1)]
        if any(cells):
            lines.append(f"| {contender.label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _rise(summary: Summary | None, side: int) -> str:
    """Return the rise of the loss at the next lower (-1) or higher (1) rate; empty if unknown."""
    if summary is None:
        return ""
    rates = list(summary.final)
    index = rates.index(summary.best) + side
    if not 0 <= index < len(rates):
        return ""
    rise = summary.final[rates[index]] / summary.final[summary.best] - 1
    if math.isnan(rise):
        return ""
    return "diverged" if math.isinf(rise) else f"+{100 * rise:.0f} %"


# --- drawing --------------------------------------------------------------------------------------


def draw(summaries: Sequence[Summary], task: str, path: Path) -> None:
    """Draw the losses at the best rates (left), and the final loss at every rate (right)."""
    figure = new_figure(1375, 682)
    curves, rates = figure.subplots(1, 2, width_ratios=(1.35, 1))
    plan = PLANS[task]
    _draw_curves(curves, summaries, by_step=plan.parts > 1)
    _draw_rates(rates, summaries)
    curves.grid(alpha=0.25, linewidth=0.6)
    rates.grid(alpha=0.25, linewidth=0.6, axis="x")
    for axes in (curves, rates):
        axes.spines[["top", "right"]].set_visible(False)
    what = "training" if plan.parts > 1 else "held-out"
    seeds = f", mean of {len(plan.seeds)} seeds" if len(plan.seeds) > 1 else ""
    curves.set_title(f"{task}: {what} loss at the best rate of each{seeds}", fontsize=11)
    rates.set_title("held-out loss at the end, for every rate tried", fontsize=11)
    save(figure, path)


def _draw_curves(axes: Axes, summaries: Sequence[Summary], *, by_step: bool) -> None:
    ends = []
    key = "train_loss" if by_step else "held_out_loss"
    for summary in summaries:
        contender = summary.contender
        runs = [run for run in summary.runs[summary.best] if not run["diverged"]]
        # Other epochs than the plan's do not fit the x axis.
        if not runs or contender.epochs:
            continue
        histories = zip(*(run[key] for run in runs), strict=True)
        y = [statistics.fmean(values) for values in histories]
        x = runs[0]["train_steps"] if by_step else list(range(1, len(y) + 1))
        axes.plot(x, y, linewidth=1.7, color=contender.color, linestyle=contender.line)
        ends.append((y[-1], x[-1], contender))
    axes.set_yscale("log")
    _plain_numbers(axes.yaxis, *axes.get_ylim())
    axes.set_xlabel("optimizer step" if by_step else "epoch")
    axes.set_xlim(left=0)
    _label_ends(axes, ends)


def _label_ends(axes: Axes, ends: list[tuple[float, float, Contender]]) -> None:
    """Write each curve's name beside its end (y, x)."""
    low, high = (math.log(value) for value in axes.get_ylim())
    ends = sorted(ends, key=lambda end: end[0])
    heights = _spread([(math.log(y) - low) / (high - low) for y, _, _ in ends], gap=1 / 24)
    for (y, x, contender), height in zip(ends, heights, strict=True):
        arrow = {
            "arrowstyle": "-",
            "color": contender.color,
            "linewidth": 0.7,
            "relpos": (0, 0.5),
            "shrinkA": 1,
            "shrinkB": 0,
        }
        axes.annotate(
            contender.label,
            (x, y),
            xytext=(1.06, height),
            textcoords="axes fraction",
            color=contender.color,
            fontsize=9,
            va="center",
            arrowprops=arrow,
            annotation_clip=False,
        )


def _spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Return heights near those `wanted` (rising), at least `gap` apart.

    Example: 0.5, 0.5 and 0.9 with a gap of 0.1 become 0.5, 0.6 and 0.9, minus a third of 0.1.
    """
    heights: list[float] = []
    for want in wanted:
        lowest = heights[-1] + gap if heights else 0.0
        heights.append(max(want, lowest))
    if not heights:
        return heights
    # Names that were pushed up as a block come down again by what they rose on average.
    rises = [height - want for height, want in zip(heights, wanted, strict=True)]
    shift = min(statistics.fmean(rises), heights[0] + 0.02)
    return [height - shift for height in heights]


def _draw_rates(axes: Axes, summaries: Sequence[Summary]) -> None:
    losses = [loss for summary in summaries for loss in summary.final.values()]
    finite = [loss for loss in losses if math.isfinite(loss)]
    worst = min(max(finite), 40 * min(finite))
    for line, summary in enumerate(summaries):
        color = summary.contender.color
        for lr, loss in summary.final.items():
            marker = _marker(lr, loss, summary.best, worst)
            fill = color if lr == summary.best else "white"
            x = min(loss, worst * 1.2)
            axes.plot(x, line, marker, markersize=6, color=color, markerfacecolor=fill)
        seeds = [min(last_loss(run), worst) for run in summary.runs[summary.best]]
        axes.plot([min(seeds), max(seeds)], [line, line], color=color, linewidth=1.2)
    names = [f"{summary.contender.label}  {summary.best:g}" for summary in summaries]
    axes.set_yticks(range(len(summaries)), names, fontsize=9)
    axes.set_ylim(len(summaries) - 0.5, -0.5)
    axes.set_xscale("log")
    _plain_numbers(axes.xaxis, *axes.get_xlim())
    axes.set_xlabel(
        "filled: the best rate, beside the name; hollow: lower\nand higher rates; cross: diverged "
        "or off the scale"
    )


def _marker(lr: float, loss: float, best: float, worst: float) -> str:
    """Return a cross for a loss off the scale, else what says on which side of the best lr is."""
    if not loss <= worst:
        return "x"
    if lr == best:
        return "o"
    return "<" if lr < best else ">"


def _plain_numbers(axis: Any, low: float, high: float) -> None:
    axis.set_major_locator(
        LogLocator(subs=(1, 2, 5) if high > 10 * low else (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8))
    )
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


# --- the program ----------------------------------------------------------------------------------


def write(results: list[RunResult], path: Path) -> None:
    """Write all numbers, a line for each run."""
    order = {contender.label: index for index, contender in enumerate(CONTENDERS)}
    results.sort(key=lambda run: (run["task"], order[run["name"]], run["lr"], run["seed"]))
    lines = ",\n".join(json.dumps(run) for run in results)
    path.write_text(
        f'{{"torch": "{torch.__version__}", "runs": [\n{lines}\n]}}\n', encoding="utf-8"
    )


def read_arguments() -> argparse.Namespace:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = list(dict.fromkeys(contender.optimizer for contender in CONTENDERS))
    parser.add_argument(
        "--tasks", default=",".join(PLANS), help="of these, joined by commas (default: all)"
    )
    parser.add_argument(
        "--optimizers", default=",".join(names), help="of these, joined by commas (default: all)"
    )
    parser.add_argument(
        "--epochs", type=int, help="epochs of every run (default: 12 for digits, 1 for text)"
    )
    parser.add_argument(
        "--json", type=Path, default=ROOT / "benchmarks/curves.json", help="file of the numbers"
    )
    parser.add_argument(
        "--pictures", type=Path, default=ROOT / "docs", help="folder of the pictures"
    )
    parser.add_argument(
        "--resume", action="store_true", help="measure only what is not among the numbers"
    )
    parser.add_argument(
        "--draw", action="store_true", help="measure nothing, draw the numbers that are there"
    )
    return parser.parse_args()


def update(results: list[RunResult], asked: argparse.Namespace) -> list[RunResult]:
    """Measure what is asked for, and return its results with those that it does not replace.

    The file of the numbers is written after each run.
    """
    chosen = [
        contender for contender in CONTENDERS if contender.optimizer in asked.optimizers.split(",")
    ]
    jobs = plan_jobs(asked.tasks.split(","), chosen, asked.epochs)
    if asked.resume:
        keys = ("task", "name", "lr", "seed", "epochs")
        done = {tuple(run[key] for key in keys) for run in results}
        jobs = [job for job in jobs if (job[0], job[1].label, *job[2:]) not in done]
    else:
        replaced = {(task, contender.label) for task, contender, *_ in jobs}
        results = [run for run in results if (run["task"], run["name"]) not in replaced]
    for result in measure(jobs):
        results.append(result)
        write(results, asked.json)
    return results


def main() -> None:
    """Measure what is asked for, merge it into the numbers that are there, and draw."""
    asked = read_arguments()
    results: list[RunResult] = []
    if asked.json.exists():
        results = json.loads(asked.json.read_text(encoding="utf-8"))["runs"]
    if not asked.draw:
        results = update(results, asked)
    for task in asked.tasks.split(","):
        if summaries := summarize(results, task):
            draw(summaries, task, asked.pictures / f"curves-{task}.png")
            print(f"\n{task}\n\n{tabulate(summaries, task)}")
    print(f"\nsensitivity\n\n{tabulate_sensitivity(results)}")


if __name__ == "__main__":
    main()
