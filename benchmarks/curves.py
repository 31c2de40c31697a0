"""What docs/how-to-choose.md shows: every first-order algorithm on two tasks, at each rate of a
small grid.

Each run is what `onepass train` does with these settings, on one thread; several run at a time. The
numbers go to benchmarks/curves.json, where new ones replace those of the same task and algorithm;
the pictures go to docs.
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
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from onepass.app.tasks import find_task
from onepass.app.training.loop import Diverged, fit
from onepass.app.training.run import Run
from onepass.app.training.settings import make_settings

ROOT = Path(__file__).parent.parent
RunResult = dict[str, Any]


@dataclass(frozen=True)
class Contender:
    """An algorithm, by the name that `onepass train` knows, the middle of its rates on each task,
    and its looks."""

    label: str
    optimizer: str
    middle: dict[str, float]
    color: str
    line: str = "-"
    epochs: int | None = None  # where the task's plan is not meant
    batch_size: int | None = None

    def rates(self, task: str) -> list[float]:
        """The rates to try, about a factor of three apart: each is 1 or 3 times a power of ten."""
        count = PLANS[task].rates
        middle = round(2 * math.log10(self.middle[task]))
        steps = range(middle - count // 2, middle - count // 2 + count)
        return [float(f"{(1, 3)[step % 2]}e{step // 2}") for step in steps]


@dataclass(frozen=True)
class Plan:
    """How a task is run: cut to what takes minutes, by settings alone."""

    epochs: int
    batch_size: int
    seeds: tuple[int, ...]
    rates: int
    parts: int  # of an epoch, over each of which the training loss is averaged


PLANS = {
    "digits": Plan(epochs=12, batch_size=64, seeds=(0, 1), rates=5, parts=1),
    "text": Plan(epochs=1, batch_size=4, seeds=(0,), rates=3, parts=32),
}

BLUE, CYAN, GREEN, OLIVE = "#0072b2", "#33aadd", "#117733", "#999933"
RED, ORANGE, PINK, WINE, SAND = "#d62728", "#e69f00", "#cc79a7", "#882255", "#c08a5b"
BLACK, VIOLET, GREY, TEAL = "#000000", "#7a3fb0", "#888888", "#44aa99"

CONTENDERS = (
    Contender("SGD, momentum 0.9", "sgd-momentum", {"digits": 0.03, "text": 0.03}, BLUE),
    Contender("ASGD", "asgd", {"digits": 0.3, "text": 0.1}, CYAN),
    Contender("Rprop", "rprop", {"digits": 1e-3, "text": 3e-3}, GREY, "--"),
    Contender(
        "Rprop, all data a step", "rprop", {"digits": 1e-2}, GREY, epochs=24, batch_size=1438
    ),
    Contender("Adagrad", "adagrad", {"digits": 0.1, "text": 0.03}, GREEN),
    Contender("RMSprop", "rmsprop", {"digits": 3e-3, "text": 3e-4}, OLIVE),
    Contender("Adadelta", "adadelta", {"digits": 3.0, "text": 1.0}, TEAL),
    Contender("Adam", "adam", {"digits": 3e-3, "text": 1e-3}, RED),
    Contender("AdamW", "adamw", {"digits": 3e-3, "text": 1e-3}, RED, "--"),
    Contender("Adamax", "adamax", {"digits": 1e-2, "text": 3e-3}, ORANGE),
    Contender("NAdam", "nadam", {"digits": 1e-2, "text": 1e-3}, PINK),
    Contender("RAdam", "radam", {"digits": 1e-2, "text": 1e-2}, WINE),
    Contender("Adafactor", "adafactor", {"digits": 0.1, "text": 0.1}, VIOLET),
    Contender("Muon + AdamW", "muon-adamw", {"digits": 1e-2, "text": 3e-2}, BLACK),
)


# --- measuring ------------------------------------------------------------------------------------


class Silent:
    """An observer of a run that says nothing."""

    def stepped(self, run: Run) -> None:
        pass

    def finished_epoch(self, run: Run) -> None:
        pass


def train(task: str, contender: Contender, lr: float, seed: int, epochs: int) -> RunResult:
    """One run's numbers; where the loss became infinite, those up to there."""
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
    width = max(1, run.steps_per_epoch // PLANS[task].parts)
    losses = run.history.train_loss
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
        "train_steps": [min(i + width, len(losses)) for i in range(0, len(losses), width)],
        "train_loss": [
            _round(statistics.fmean(losses[i : i + width])) for i in range(0, len(losses), width)
        ],
        "held_out_loss": [_round(value) for value in run.history.held_out_loss],
        "held_out_metric": [_round(value) for value in run.history.held_out_metric],
    }


def _round(value: float) -> float:
    return float(f"{value:.5g}")


Job = tuple[str, Contender, float, int, int]  # what `train` takes


def plan_jobs(
    tasks: Sequence[str], contenders: Sequence[Contender], epochs: int | None
) -> list[Job]:
    """All runs that are wanted, every algorithm once before the next seed."""
    return [
        (task, contender, lr, seed, epochs or contender.epochs or PLANS[task].epochs)
        for task in tasks
        for seed in PLANS[task].seeds
        for contender in contenders
        if task in contender.middle
        for lr in contender.rates(task)
    ]


def measure(jobs: Sequence[Job]) -> Iterator[RunResult]:
    """The results as the runs end, a process for each core; a line for each."""
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
    """A run in one line."""
    metric = find_task(result["task"]).metric
    end = (
        "diverged"
        if result["diverged"]
        else f"{metric.name} {metric.show(result['held_out_metric'][-1])}"
    )
    return (
        f"{result['task']:7} {result['name']:22} lr {result['lr']:<7g} seed {result['seed']}  {end}"
    )


# --- what the runs say ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """An algorithm on a task: its runs by lr, the final held-out loss of each, and the best lr."""

    contender: Contender
    runs: dict[float, list[RunResult]]
    final: dict[float, float]  # the mean over seeds; infinite where one diverged
    best: float


def summarize(results: Sequence[RunResult], task: str) -> list[Summary]:
    """The algorithms measured on a task, the lowest held-out loss first."""
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
    """The held-out loss at the end."""
    return math.inf if result["diverged"] else result["held_out_loss"][-1]


def tabulate(summaries: Sequence[Summary], task: str) -> str:
    """The table of the page, in Markdown."""
    metric = find_task(task).metric
    lines = [
        f"| algorithm | rates tried | best | held-out loss | {metric.name} |",
        "|---|---|---|---|---|",
    ]
    for one in summaries:
        best = one.runs[one.best]
        values = [metric.scale * run["held_out_metric"][-1] for run in best if not run["diverged"]]
        shown = (
            f"{statistics.fmean(values):.{metric.decimals}f}{metric.unit and ' ' + metric.unit}"
            if values
            else "-"
        )
        rates = ", ".join(f"{lr:g}" for lr in one.final)
        lines.append(
            f"| {one.contender.label} | {rates} | {one.best:g} | {one.final[one.best]:.4f} | "
            f"{shown} |"
        )
    return "\n".join(lines)


def tabulate_sensitivity(results: Sequence[RunResult]) -> str:
    """What a rate costs that is about three times too small or too large: the rise of the held-out
    loss, in percent."""
    found = {task: {one.contender.label: one for one in summarize(results, task)} for task in PLANS}
    titles = [f"{task}, lr {side}" for task in PLANS for side in ("/ 3", "x 3")]
    lines = [f"| algorithm | {' | '.join(titles)} |", "|---|" + "---|" * len(titles)]
    for contender in CONTENDERS:
        cells = []
        for task in PLANS:
            one = found[task].get(contender.label)
            rates = list(one.final) if one else []
            for side in (-1, 1):
                place = rates.index(one.best) + side if one else -1
                loss = one.final[rates[place]] if one and 0 <= place < len(rates) else math.nan
                rise = loss / one.final[one.best] - 1 if one else math.nan
                cells.append(
                    ""
                    if math.isnan(rise)
                    else "diverged"
                    if math.isinf(rise)
                    else f"+{100 * rise:.0f} %"
                )
        if any(cells):
            lines.append(f"| {contender.label} | {' | '.join(cells)} |")
    return "\n".join(lines)


# --- drawing --------------------------------------------------------------------------------------


def draw(summaries: Sequence[Summary], task: str, path: Path) -> None:
    """Left the losses at the best rates, right the final loss at every rate."""
    figure = Figure(figsize=(12.5, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    curves, rates = figure.subplots(1, 2, width_ratios=(1.35, 1))
    plan = PLANS[task]
    seeds = f", mean of {len(plan.seeds)} seeds" if len(plan.seeds) > 1 else ""
    _draw_curves(curves, summaries, by_step=plan.parts > 1)
    _draw_rates(rates, summaries)
    for axes in (curves, rates):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6, axis="both" if axes is curves else "x")
    what = "training" if plan.parts > 1 else "held-out"
    curves.set_title(f"{task}: {what} loss at the best rate of each{seeds}", fontsize=11)
    rates.set_title("held-out loss at the end, for every rate tried", fontsize=11)
    figure.savefig(path, format="png", dpi=110)


def _draw_curves(axes: Axes, summaries: Sequence[Summary], *, by_step: bool) -> None:
    ends = []
    for one in summaries:
        runs = [run for run in one.runs[one.best] if not run["diverged"]]
        if not runs or one.contender.epochs:
            continue
        key = "train_loss" if by_step else "held_out_loss"
        y = [statistics.fmean(values) for values in zip(*(run[key] for run in runs), strict=True)]
        x = runs[0]["train_steps"] if by_step else list(range(1, len(y) + 1))
        style = {"color": one.contender.color, "linestyle": one.contender.line}
        axes.plot(x, y, linewidth=1.7, **style)
        ends.append((y[-1], x[-1], one.contender))
    axes.set_yscale("log")
    _plain_numbers(axes.yaxis, *axes.get_ylim())
    axes.set_xlabel("optimizer step" if by_step else "epoch")
    axes.set_xlim(left=0)
    _label_ends(axes, ends)


def _label_ends(axes: Axes, ends: list[tuple[float, float, Contender]]) -> None:
    """Each curve's name beside its end, moved up or down where names would lie on each other."""
    gap = 1 / 24
    low, high = (math.log(value) for value in axes.get_ylim())
    ends = sorted(ends, key=lambda end: end[0])
    wanted = [(math.log(y) - low) / (high - low) for y, _, _ in ends]
    places: list[float] = []
    for want in wanted:
        places.append(max(want, places[-1] + gap if places else 0.0))
    # Names that were pushed up as a block come half of the way down again.
    shift = statistics.fmean(p - w for p, w in zip(places, wanted, strict=True)) if places else 0.0
    places = [place - min(shift, places[0] + 0.02) for place in places]
    for (y, x, contender), place in zip(ends, places, strict=True):
        axes.annotate(
            contender.label,
            (x, y),
            xytext=(1.06, place),
            textcoords="axes fraction",
            color=contender.color,
            fontsize=9,
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": contender.color,
                "linewidth": 0.7,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 0,
            },
            annotation_clip=False,
        )


def _draw_rates(axes: Axes, summaries: Sequence[Summary]) -> None:
    finite = [loss for one in summaries for loss in one.final.values() if math.isfinite(loss)]
    worst = min(max(finite), 40 * min(finite))
    for row, one in enumerate(summaries):
        color = one.contender.color
        for lr, loss in one.final.items():
            marker = (
                "x"
                if not loss <= worst
                else "o"
                if lr == one.best
                else "<"
                if lr < one.best
                else ">"
            )
            fill = color if lr == one.best else "white"
            axes.plot(
                min(loss, worst * 1.2), row, marker, markersize=6, color=color, markerfacecolor=fill
            )
        spread = [min(last_loss(run), worst) for run in one.runs[one.best]]
        axes.plot([min(spread), max(spread)], [row, row], color=color, linewidth=1.2)
    axes.set_yticks(
        range(len(summaries)),
        [f"{one.contender.label}  {one.best:g}" for one in summaries],
        fontsize=9,
    )
    axes.set_ylim(len(summaries) - 0.5, -0.5)
    axes.set_xscale("log")
    _plain_numbers(axes.xaxis, *axes.get_xlim())
    axes.set_xlabel(
        "filled: the best rate, beside the name; hollow: lower\nand higher rates; cross: diverged "
        "or off the scale"
    )


def _plain_numbers(axis: Any, low: float, high: float) -> None:
    axis.set_major_locator(
        LogLocator(subs=(1, 2, 5) if high > 10 * low else (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8))
    )
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


# --- the program ----------------------------------------------------------------------------------


def write(results: list[RunResult], path: Path) -> None:
    """All numbers, a line for each run."""
    order = {contender.label: place for place, contender in enumerate(CONTENDERS)}
    results.sort(key=lambda run: (run["task"], order[run["name"]], run["lr"], run["seed"]))
    lines = ",\n".join(json.dumps(run) for run in results)
    path.write_text(
        f'{{"torch": "{torch.__version__}", "runs": [\n{lines}\n]}}\n', encoding="utf-8"
    )


def main() -> None:
    """Measure what is asked for, merge it into the numbers that are there, and draw."""
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
    asked = parser.parse_args()
    tasks = asked.tasks.split(",")
    chosen = [
        contender for contender in CONTENDERS if contender.optimizer in asked.optimizers.split(",")
    ]

    results = (
        json.loads(asked.json.read_text(encoding="utf-8"))["runs"] if asked.json.exists() else []
    )
    if not asked.draw:
        jobs = plan_jobs(tasks, chosen, asked.epochs)
        if asked.resume:
            done = {
                (run["task"], run["name"], run["lr"], run["seed"], run["epochs"]) for run in results
            }
            jobs = [job for job in jobs if (job[0], job[1].label, *job[2:]) not in done]
        else:
            replaced = {(task, contender.label) for task, contender, *_ in jobs}
            results = [run for run in results if (run["task"], run["name"]) not in replaced]
        for result in measure(jobs):
            results.append(result)
            write(results, asked.json)
    for task in tasks:
        if summaries := summarize(results, task):
            draw(summaries, task, asked.pictures / f"curves-{task}.png")
            print(f"\n{task}\n\n{tabulate(summaries, task)}")
    print(f"\nsensitivity\n\n{tabulate_sensitivity(results)}")


if __name__ == "__main__":
    main()
