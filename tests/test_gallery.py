"""The gallery: the numbers behind its pictures, and the pictures themselves."""

from __future__ import annotations

import contextlib
import io
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

import onepass
from onepass import pictures
from onepass.app import cli
from onepass.app.catalog import optimizers
from onepass.app.gallery.album import PICTURES, make
from onepass.app.gallery.lr_schedules import (
    EXAMPLES,
    LR,
    TEXTS,
    SchedulerCurve,
    trace,
    trace_plateau,
)
from onepass.app.gallery.moments import average, average_weights, decay, noisy_series
from onepass.app.gallery.paths import (
    CONTENDERS,
    PARABOLA,
    RATES,
    RAVINE,
    ROSENBROCK,
    Contender,
    Problem,
    Track,
    follow,
    search,
)
from onepass.schedule import MAKERS, parse

pytestmark = pytest.mark.usefixtures("one_thread")
PICTURED = Path(__file__).parent.parent / "docs" / "pictures"


# --- descents -------------------------------------------------------------------------------------


def descend(lr: float, steps: int, **options: object) -> list[float]:
    (path,) = follow(PARABOLA, onepass.SGD, [{"lr": lr, **options}], steps)
    return path.places[:, 0].tolist()


def test_without_a_learning_rate_the_descent_explodes() -> None:
    assert descend(1.0, 5) == [2, -14, 98, -686, 4802, -33614]


@pytest.mark.parametrize(
    ("lr", "expected"),
    [(0.25, [2, -2, 2, -2]), (0.125, [2, 0, 0, 0]), (0.0625, [2, 1, 0.5, 0.25])],
)
def test_rates_whose_places_are_exact(lr: float, expected: list[float]) -> None:
    assert descend(lr, 3) == expected


@pytest.mark.parametrize("lr", [0.2, 0.1, 0.05, 0.01])
def test_every_step_multiplies_by_the_same_factor(lr: float) -> None:
    assert descend(lr, 20) == pytest.approx(
        [2 * (1 - 8 * lr) ** step for step in range(21)], rel=1e-12
    )


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_follows_its_recurrence(nesterov: bool) -> None:
    x, velocity, expected = 2.0, 0.0, [2.0]
    for _ in range(30):
        g = 8 * x
        velocity = 0.9 * velocity + g
        x -= 0.02 * (g + 0.9 * velocity if nesterov else velocity)
        expected.append(x)
    assert descend(0.02, 30, momentum=0.9, nesterov=nesterov) == pytest.approx(expected, rel=1e-9)


def test_momentum_makes_up_for_small_rates() -> None:
    plain, helped = follow(RAVINE, onepass.SGD, [{"lr": 0.01}, {"lr": 0.001, "momentum": 0.9}], 200)
    assert 0.1 < float(plain.losses[-1] / helped.losses[-1]) < 10


def test_nesterov_overshoots_less() -> None:
    assert (
        min(descend(0.02, 50, momentum=0.9))
        < min(descend(0.02, 50, momentum=0.9, nesterov=True))
        < 0
    )


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.name)
def test_runs_that_share_an_optimizer_do_not_meet(contender: Contender) -> None:
    """Each path of a search is, bit for bit, that of a run of its own."""
    runs = [{**contender.options, "lr": lr} for lr in (0.001, 0.1, 50.0)]
    together = follow(ROSENBROCK, contender.cls, runs, 12, matrix=contender.matrix)
    for path, run in zip(together, runs, strict=True):
        (alone,) = follow(ROSENBROCK, contender.cls, [run], 12, matrix=contender.matrix)
        torch.testing.assert_close(path.places, alone.places, rtol=0, atol=0, equal_nan=True)
        assert path.options == run


@pytest.mark.parametrize(
    "problem", [PARABOLA, RAVINE, ROSENBROCK], ids=lambda problem: problem.name
)
def test_problems_are_lowest_where_they_say(problem: Problem) -> None:
    minimum = torch.tensor(problem.minimum, dtype=torch.float64, requires_grad=True)
    loss = problem.loss(minimum)
    loss.backward()
    assert loss == 0
    assert minimum.grad is not None
    assert not minimum.grad.any()
    around = minimum.detach() + 0.1 * torch.randn(100, len(problem.start), dtype=torch.float64)
    assert bool((problem.loss(around) > 0).all())
    for value, (low, high) in zip(problem.start, problem.window, strict=True):
        assert low < value < high


def test_problems_are_the_functions_that_they_name() -> None:
    at = torch.tensor([-1.0, 0.5], dtype=torch.float64)
    assert [float(problem.loss(at)) for problem in (PARABOLA, RAVINE, ROSENBROCK)] == [
        4.0,
        6.75,
        29.0,
    ]
    starts = [
        float(p.loss(torch.tensor(p.start, dtype=torch.float64)))
        for p in (PARABOLA, RAVINE, ROSENBROCK)
    ]
    assert starts == pytest.approx([16.0, 33.0, 24.2])


@pytest.fixture(scope="module")
def paths() -> dict[tuple[str, str], Track]:
    return {(p.name, c.name): search(p, c) for p in (RAVINE, ROSENBROCK) for c in CONTENDERS}


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.name)
@pytest.mark.parametrize("problem", [RAVINE, ROSENBROCK], ids=["ravine", "rosenbrock"])
def test_every_path_goes_down_inside_the_picture(
    problem: Problem, contender: Contender, paths: dict[tuple[str, str], Track]
) -> None:
    path = paths[problem.name, contender.name]
    assert path.places.shape == (problem.steps + 1, 2)
    assert path.places.dtype == torch.float64
    assert path.places[0].tolist() == list(problem.start)
    torch.testing.assert_close(path.losses, problem.loss(path.places), rtol=0, atol=0)
    assert path.losses[-1] < 0.3 * path.losses[0]
    low, high = torch.tensor(problem.window, dtype=torch.float64).unbind(1)
    assert bool(((low <= path.places) & (path.places <= high)).all())
    # The best rate lies within the grid, so that the grid is wide enough.
    assert RATES[0] < path.options["lr"] < RATES[-1]


def test_the_search_takes_the_best_rate() -> None:
    sgd = CONTENDERS[0]
    best = search(RAVINE, sgd, (0.005, 0.02, 0.01))
    assert best.options == {
        "lr": 0.02
    }  # the largest below 2 / 50, where the steep direction diverges
    with pytest.raises(
        ValueError, match=r"SGD leaves the window at every rate: give smaller ones than 1\."
    ):
        search(RAVINE, sgd, (1.0, 10.0))
    # In a window that everything leaves but the slowest, that one is taken.
    narrow = replace(RAVINE, window=((-4.1, -3.0), (-1.6, 1.6)), steps=20)
    assert search(narrow, sgd, (0.005, 0.02, 0.01)).options == {"lr": 0.01}


def test_every_first_order_algorithm_has_a_path() -> None:
    known = {contender.cls.__name__ for contender in CONTENDERS}
    assert known == set(optimizers()) - {"LBFGS", "SparseAdam"}
    assert len({contender.name for contender in CONTENDERS}) == len(CONTENDERS)


# --- running means, and decay ---------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.8, 0.9, 0.95, 0.98])
def test_weights_of_an_average(beta: float) -> None:
    weights = average_weights(beta, 2000)
    assert weights.tolist() == pytest.approx(
        [(1 - beta) * beta**k for k in range(2000)], rel=1e-9, abs=1e-15
    )
    assert float(weights.sum()) == pytest.approx(1, rel=1e-12)
    window = round(1 / (1 - beta))
    assert float(weights[:window].sum()) == pytest.approx(1 - 1 / math.e, abs=0.05)


def test_an_average_is_the_weighted_sum_of_what_came_before() -> None:
    series, weights = noisy_series(50), average_weights(0.9, 50)
    expected = [float((series[: t + 1].flip(0) * weights[: t + 1]).sum()) for t in range(50)]
    assert average(series, 0.9).tolist() == pytest.approx(expected, rel=1e-9)


def test_a_constant_is_its_own_corrected_average() -> None:
    means = average(torch.full((40,), 3.0), 0.95)
    assert [m / (1 - 0.95**t) for t, m in enumerate(means.tolist(), 1)] == pytest.approx([3.0] * 40)


def test_decay_is_alike_only_when_decoupled() -> None:
    scales, steps = (0.01, 1.0, 10.0), 300
    l2 = decay(onepass.Adam, scales, steps, lr=0.01, weight_decay=0.1)
    decoupled = decay(onepass.AdamW, scales, steps, lr=0.01, weight_decay=0.1)
    assert l2.shape == decoupled.shape == (3, steps + 1)
    assert decoupled[:, -1].tolist() == pytest.approx([(1 - 0.01 * 0.1) ** steps] * 3, abs=0.03)
    small, middle, large = l2[:, -1].tolist()
    assert small < 0.01 < 0.6 < middle < 0.85 < 0.95 < large


# --- schedules ------------------------------------------------------------------------------------

FORMULAS = {
    "StepLR": lambda t: LR * 0.3 ** (t // 30),
    "MultiStepLR": lambda t: LR * 0.3 ** ((t >= 30) + (t >= 80)),
    "ConstantLR": lambda t: LR * (0.5 if t < 40 else 1),
    "LinearLR": lambda t: LR * (0.1 + 0.9 * min(t, 40) / 40),
    "ExponentialLR": lambda t: LR * 0.97**t,
    "PolynomialLR": lambda t: LR * (1 - min(t, 80) / 80),
    "CosineAnnealingLR": lambda t: 0.01 + (LR - 0.01) * (1 + math.cos(math.pi * t / 100)) / 2,
    "CosineAnnealingWarmRestarts": lambda t: LR * (1 + math.cos(math.pi * (t % 20) / 20)) / 2,
    "CyclicLR": lambda t: 0.01 + (LR - 0.01) * (1 - abs(t % 30 - 15) / 15),
    "SequentialLR": lambda t: (
        LR * (0.1 + 0.9 * t / 20) if t < 20 else LR * (1 + math.cos(math.pi * (t - 20) / 80)) / 2
    ),
    "ChainedScheduler": lambda t: LR * (0.1 + 0.9 * min(t, 20) / 20) * 0.97**t,
    "LambdaLR": lambda t: LR / (1 + t / 20),
    "MultiplicativeLR": lambda t: LR * 0.5 ** (t // 25),
    "SWALR": lambda t: 0.02 + (LR - 0.02) * (1 + math.cos(math.pi * min(t, 40) / 40)) / 2,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_schedulers_set_what_their_formulas_say(name: str) -> None:
    example = EXAMPLES[name]
    values = trace(example.curves[0], example.steps)
    assert values == pytest.approx(
        [FORMULAS[name](t) for t in range(example.steps)], rel=1e-6, abs=1e-12
    )


def test_one_cycle_moves_momentum_against_the_rate() -> None:
    (curve,), steps = EXAMPLES["OneCycleLR"].curves, EXAMPLES["OneCycleLR"].steps
    rates, momenta = trace(curve, steps), trace(curve, steps, "momentum")
    assert max(rates) == pytest.approx(LR)
    assert rates.index(max(rates)) == momenta.index(min(momenta))
    assert min(momenta) == pytest.approx(0.85)


def test_the_loss_falls_on_where_the_plateau_lowers_the_rate() -> None:
    rates, losses = trace_plateau(200)
    changes = [step for step in range(1, 200) if rates[step] < rates[step - 1]]
    assert len(changes) >= 3
    assert all(rates[step] == pytest.approx(0.4 * rates[step - 1]) for step in changes)
    ends = [sum(losses[step - 10 : step]) for step in (*changes, 200)]
    assert ends == sorted(ends, reverse=True)


def test_all_of_torchs_schedulers_are_drawn() -> None:
    assert {*EXAMPLES, "ReduceLROnPlateau"} == {*onepass.lr_scheduler.__all__, "SWALR"} - {
        "LRScheduler"
    }


@pytest.mark.parametrize("text", TEXTS)
def test_texts_make_schedules_within_the_sheet(text: str) -> None:
    made = parse(text)
    assert all(0 <= made(step) <= 1 for step in range(101))
    assert made.steps in (100, math.inf)


def test_the_sheet_has_every_maker() -> None:
    assert {re.match(r"\w+", text)[0] for text in TEXTS} >= set(MAKERS)
    assert {
        method for method in ("then", "times", "warmup") if f".{method}(" in "".join(TEXTS)
    } == {
        "then",
        "times",
        "warmup",
    }


def test_a_curve_is_named_by_what_makes_it() -> None:
    for example in EXAMPLES.values():
        texts = [curve.text for curve in example.curves]
        assert len(set(texts)) == len(texts)
        assert all(isinstance(curve, SchedulerCurve) for curve in example.curves)


# --- pictures -------------------------------------------------------------------------------------


def size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG file in pixels."""
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", head[16:])


@pytest.mark.parametrize("page", ["gallery", "schedules"])
def test_the_code_on_the_pages_prints_what_they_say(page: str) -> None:
    text = (PICTURED.parent / f"{page}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", text, re.DOTALL)
    assert len(blocks) > 4
    names: dict[str, object] = {}
    for code, said in blocks:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, names)
        assert printed.getvalue() == said


def test_every_picture_is_on_a_page() -> None:
    pages = [
        (PICTURED.parent / f"{page}.md").read_text(encoding="utf-8")
        for page in ("gallery", "schedules")
    ]
    shown = re.findall(r"!\[[^\]]{20,}\]\(pictures/(\w[\w-]*)\.png\)", "".join(pages))
    assert sorted(shown) == sorted(picture.name for picture in PICTURES)


@pytest.mark.parametrize("name", [*EXAMPLES, "ReduceLROnPlateau"])
def test_every_scheduler_has_its_formula_and_its_picture(name: str) -> None:
    text = (PICTURED.parent / "schedules.md").read_text(encoding="utf-8")
    section = text.split(f"\n### {name}\n")[1].split("\n##")[0]
    assert section.count("$$") == 2
    assert f"(pictures/{name}.png)" in section


def illegible(figure: Figure) -> Iterator[str]:
    """Titles, labels and legends that do not fit into the picture, or are less than 11 pixels
    high."""
    inside = figure.bbox.padded(1)
    texts = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for axes in figure.axes:
        texts += [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        texts += axes.get_legend().get_texts() if axes.get_legend() else []
    for text in texts:
        box, height = text.get_window_extent(), text.get_fontsize() * figure.dpi / 72
        fits = inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1)
        if text.get_text() and not (fits and height >= 11):
            yield text.get_text()


def test_names_are_unique_and_meanings_are_sentences() -> None:
    names = [picture.name for picture in PICTURES]
    assert len(set(names)) == len(names)
    assert all(20 < len(picture.meaning) < 90 for picture in PICTURES)


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.name)
def test_committed_pictures_are_small_and_legible(picture: object) -> None:
    path = PICTURED / f"{picture.name}.png"
    width, height = size(path)
    assert 400 < width < 800
    assert 200 < height < 1200
    assert 2_000 < path.stat().st_size < 80_000


@pytest.mark.parametrize(
    "picture",
    [picture for picture in PICTURES if not picture.name.startswith("paths-")],
    ids=lambda picture: picture.name,
)
def test_pictures_are_drawn_anew_as_they_are(picture: object, tmp_path: Path) -> None:
    path = tmp_path / f"{picture.name}.png"
    figure = picture.draw()
    pictures.save(figure, path)
    assert size(path) == size(PICTURED / path.name)
    assert not list(tmp_path.glob(".*"))
    assert figure.axes
    assert all(axes.lines for axes in figure.axes)
    assert not list(illegible(figure))


@pytest.mark.slow
def test_the_command_makes_all_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "pictures"
    assert cli.main(["gallery", "--out", str(out)]) == 0
    lines, err = capsys.readouterr()
    assert err == ""
    assert lines.splitlines() == [
        f"{out / picture.name}.png: {picture.meaning}" for picture in PICTURES
    ]
    for picture in PICTURES:
        assert size(out / f"{picture.name}.png") == size(PICTURED / f"{picture.name}.png")


def test_pictures_come_one_by_one(tmp_path: Path) -> None:
    picture, path = next(make(tmp_path))
    assert picture is PICTURES[0]
    assert size(path) == size(PICTURED / path.name)
    assert [path] == list(tmp_path.iterdir())


def test_a_grid_follows_the_number_of_panels(tmp_path: Path) -> None:
    figure, panels = pictures.new_grid(16, 3, 740, 100, sharex=True, sharey=True)
    assert len(panels) == 16
    assert [axes.get_visible() for axes in figure.axes] == [True] * 16 + [False] * 2
    assert figure.bbox.height == pytest.approx(600)
    shown = [axes.xaxis.get_tick_params()["labelbottom"] for axes in panels]
    assert shown == [False] * 13 + [True] * 3


def test_a_folder_that_is_a_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["gallery", "--out", str(tmp_path / "file")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"onepass: --out {tmp_path / 'file'} is not a folder")
    assert err.count("\n") == 1
