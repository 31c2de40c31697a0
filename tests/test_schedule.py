"""Schedules are pure functions: each against a formula written anew, their compositions, their
text, their errors."""

from __future__ import annotations

import ast
import copy
import inspect
import math
import pickle
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given, settings

from onepass import schedule
from onepass.schedule import MAKERS, Schedule, ScheduleError, formulas, parse

STEPS = np.arange(0, 61)


def half_wave(x: np.ndarray) -> np.ndarray:
    """From 1 to 0, written with the square of another cosine than the package's."""
    return np.cos(np.pi * x / 2) ** 2


def restarts(
    t: np.ndarray, start: float, end: float, lengths: list[int], decay: float = 1.0
) -> np.ndarray:
    edges = np.concatenate([[0], np.cumsum(lengths)])
    cycle = np.searchsorted(edges, t, side="right") - 1
    place = (t - edges[cycle]) / np.array(lengths)[cycle]
    return end + (start * decay**cycle - end) * half_wave(place)


def one_cycle(
    t: np.ndarray, top: float, steps: int, wave: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    up = 0.04 + (1 - 0.04) * (1 - wave(np.minimum(t / top, 1)))
    down = 4e-6 + (1 - 4e-6) * wave(np.clip((t - top) / (steps - top), 0, 1))
    return np.where(t < top, up, down)


def triangle(t: np.ndarray, up: int, down: int) -> np.ndarray:
    return np.interp(t % (up + down), [0, up, up + down], [0, 1, 0])


# Each kind, at every step, the formula of a paper or of the docstring in NumPy's words.
FORMULAS: dict[str, tuple[Schedule, Callable[[np.ndarray], np.ndarray]]] = {
    "constant": (schedule.constant(0.3), lambda t: np.full(t.shape, 0.3)),
    "linear": (schedule.linear(0.1, 0.9, steps=40), lambda t: np.interp(t, [0, 40], [0.1, 0.9])),
    "linear down": (schedule.linear(2, -1, steps=7), lambda t: np.interp(t, [0, 7], [2, -1])),
    "polynomial": (schedule.polynomial(0.5, steps=30), lambda t: np.interp(t, [0, 30], [0.5, 0])),
    "polynomial 2": (
        schedule.polynomial(0.5, 0.1, steps=30, power=2),
        lambda t: 0.1 + 0.4 * np.square(1 - np.minimum(t, 30) / 30),
    ),
    "polynomial root": (
        schedule.polynomial(0.5, steps=30, power=0.5),
        lambda t: 0.5 * np.sqrt(1 - np.minimum(t, 30) / 30),
    ),
    "exponential": (
        schedule.exponential(0.5, gamma=0.9),
        lambda t: 0.5 * np.cumprod(np.r_[1, np.full(60, 0.9)]),
    ),
    "exponential every": (
        schedule.exponential(0.5, gamma=0.5, every=10),
        lambda t: 0.5 * np.exp2(-t / 10),
    ),
    "cosine": (schedule.cosine(0.7, steps=50), lambda t: 0.7 * half_wave(np.minimum(t, 50) / 50)),
    "cosine floor": (schedule.cosine(0.7, 0.1, steps=1), lambda t: np.where(t < 1, 0.7, 0.1)),
    "warm_restarts": (
        schedule.warm_restarts(0.5, 0.01, period=7),
        lambda t: restarts(t, 0.5, 0.01, [7] * 10),
    ),
    "warm_restarts longer": (
        schedule.warm_restarts(0.5, period=3, mult=2, decay=0.8),
        lambda t: restarts(t, 0.5, 0, [3, 6, 12, 24, 48], 0.8),
    ),
    "warm_restarts tripled": (
        schedule.warm_restarts(1, period=1, mult=3),
        lambda t: restarts(t, 1, 0, [1, 3, 9, 27, 81]),
    ),
    "one_cycle": (schedule.one_cycle(1.0, steps=50), lambda t: one_cycle(t, 15, 50, half_wave)),
    "one_cycle lines": (
        schedule.one_cycle(1.0, steps=55, rise=0.4, shape="linear"),
        lambda t: one_cycle(t, 22, 55, lambda x: 1 - x),
    ),
    "triangular": (schedule.triangular(0.1, 0.5, up=4), lambda t: 0.1 + 0.4 * triangle(t, 4, 4)),
    "triangular decays": (
        schedule.triangular(0.1, 0.5, up=4, down=9, decay=0.5),
        lambda t: 0.1 + 0.4 * triangle(t, 4, 9) * 0.5 ** (t // 13),
    ),
    "piecewise": (
        schedule.piecewise(0.4, {0: 0.3, 10: 0.2, 30.5: 0.1}),
        lambda t: np.select([t < 10, t < 30.5], [0.3, 0.2], 0.1),
    ),
    "piecewise alone": (schedule.piecewise(0.4, {}), lambda t: np.full(t.shape, 0.4)),
    "inverse_sqrt": (
        schedule.inverse_sqrt(0.2, timescale=16),
        lambda t: 0.8 / np.sqrt(np.maximum(t, 16)),
    ),
    "warmup_stable_decay": (
        schedule.warmup_stable_decay(0.6, 0.1, steps=50, warmup_steps=10, decay_steps=20),
        lambda t: np.interp(t, [0, 10, 30, 50], [0, 0.6, 0.6, 0.1]),
    ),
    "warmup_stable_decay root": (
        schedule.warmup_stable_decay(0.6, steps=50, warmup_steps=0, decay_steps=50, shape="sqrt"),
        lambda t: 0.6 * (1 - np.sqrt(np.minimum(t, 50) / 50)),
    ),
    "warmup_stable_decay cosine": (
        schedule.warmup_stable_decay(0.6, steps=50, warmup_steps=0, decay_steps=20, shape="cosine"),
        lambda t: 0.6 * half_wave(np.clip((t - 30) / 20, 0, 1)),
    ),
    "then": (
        schedule.linear(0, 1, steps=10).then(schedule.exponential(1, gamma=0.5)),
        lambda t: np.where(t < 10, t / 10, np.exp2(10.0 - t)),
    ),
    "times": (
        schedule.linear(1, 0, steps=20).times(schedule.exponential(3, gamma=0.9)),
        lambda t: np.maximum(0, 1 - t / 20) * 3 * 0.9**t,
    ),
    "times a number": (
        schedule.cosine(1, steps=50).times(0.25),
        lambda t: half_wave(np.minimum(t, 50) / 50) / 4,
    ),
    "warmup": (
        schedule.constant(2).warmup(8, start=0.5),
        lambda t: np.interp(t, [0, 8], [1, 2]),
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_formula(name: str) -> None:
    made, formula = FORMULAS[name]
    np.testing.assert_allclose(
        [made(int(t)) for t in STEPS], formula(STEPS), rtol=1e-13, atol=1e-15
    )


@pytest.mark.parametrize("name", MAKERS)
def test_every_maker_has_a_formula(name: str) -> None:
    assert any(repr(made).startswith(f"{name}(") for made, _ in FORMULAS.values())


@pytest.mark.parametrize(("start", "end"), [(0.1, 0.9), (3e-4, 0.0), (-2.0, 5.0)])
@pytest.mark.parametrize("steps", [1, 2, 7, 1000, 2.5])
def test_ends_are_exact(start: float, end: float, steps: float) -> None:
    for make in (schedule.linear, schedule.polynomial, schedule.cosine):
        made = make(start, end, steps=steps)
        assert made.steps == steps
        assert made(0) == pytest.approx(start, rel=1e-15)
        assert (
            made(steps)
            == made(steps + 1)
            == made(10**9)
            == made(math.inf)
            == pytest.approx(end, abs=1e-15)
        )


def test_lines_are_the_rounded_rational_numbers() -> None:
    for t in range(101):
        exact = Fraction(1, 4) + Fraction(1, 2) * Fraction(t, 100)
        assert schedule.linear(0.25, 0.75, steps=100)(t) == pytest.approx(float(exact), rel=3e-16)


MONOTONE = [
    "cosine",
    "linear down",
    "polynomial",
    "polynomial 2",
    "polynomial root",
    "exponential",
    "piecewise",
]
MONOTONE += ["inverse_sqrt", "times", "times a number", "cosine floor", "warmup_stable_decay root"]


@pytest.mark.parametrize("name", MONOTONE)
def test_decays_never_rise(name: str) -> None:
    values = [FORMULAS[name][0](t / 4) for t in range(300)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    "made",
    [
        schedule.warmup_stable_decay(
            1, 0.1, steps=100, warmup_steps=20, decay_steps=30, shape="linear"
        ),
        schedule.warmup_stable_decay(
            1, 0.1, steps=100, warmup_steps=20, decay_steps=30, shape="cosine"
        ),
        schedule.one_cycle(1, steps=100),
        schedule.one_cycle(1, steps=100, shape="linear"),
        schedule.cosine(1, steps=100).warmup(20),
        schedule.linear(0, 1, steps=20).then(schedule.cosine(1, steps=80)),
        schedule.inverse_sqrt(1, timescale=20).warmup(20),
        schedule.triangular(0, 1, up=20, down=50),
    ],
    ids=repr,
)
def test_pieces_join(made: Schedule) -> None:
    """Near a join, values differ by no more than the steepest slope allows."""
    for join in (20, 30, 70, 100):
        assert abs(made(join + 1e-7) - made(join - 1e-7)) < 1e-7


def test_cycles_begin_where_whole_numbers_say() -> None:
    """A logarithm would be wrong by one rounding at some of them."""
    for mult in (1, 2, 3, 5, 10):
        made, t = schedule.warm_restarts(1.0, period=7, mult=mult), 0
        for cycle in range(8):
            assert made(t) == 1.0, (mult, cycle)
            assert made(t + 7 * mult**cycle - 1) < 0.06
            t += 7 * mult**cycle


# Compositions.

NUMBER = st.floats(-10, 10).map(lambda x: round(x, 3))
RATE = st.floats(0.01, 4).map(lambda x: round(x, 3))
LENGTH = st.one_of(st.integers(1, 30), st.floats(0.5, 30).map(lambda x: round(x, 2)))
SHAPE = st.sampled_from(formulas.SHAPES)


@st.composite
def warmups(draw: Any) -> Schedule:
    up, flat, down = draw(LENGTH), draw(LENGTH), draw(LENGTH)
    lengths = {"steps": up + flat + down, "warmup_steps": up, "decay_steps": down}
    return schedule.warmup_stable_decay(draw(NUMBER), draw(NUMBER), shape=draw(SHAPE), **lengths)


SIMPLE = st.one_of(
    st.builds(schedule.constant, NUMBER),
    st.builds(schedule.linear, NUMBER, NUMBER, steps=LENGTH),
    st.builds(schedule.polynomial, NUMBER, NUMBER, steps=LENGTH, power=RATE),
    st.builds(schedule.exponential, NUMBER, gamma=RATE, every=LENGTH),
    st.builds(schedule.cosine, NUMBER, NUMBER, steps=LENGTH),
    st.builds(
        schedule.warm_restarts, NUMBER, NUMBER, period=LENGTH, mult=st.integers(1, 3), decay=RATE
    ),
    st.builds(
        schedule.one_cycle, NUMBER, steps=LENGTH, rise=st.sampled_from([0.1, 0.3, 0.5]), shape=SHAPE
    ),
    st.builds(schedule.triangular, NUMBER, NUMBER, up=LENGTH, down=st.none() | LENGTH, decay=RATE),
    st.builds(
        schedule.piecewise,
        NUMBER,
        st.dictionaries(LENGTH, NUMBER, max_size=4).map(lambda d: dict(sorted(d.items()))),
    ),
    st.builds(schedule.inverse_sqrt, NUMBER, timescale=LENGTH),
    warmups(),
)


def compose(inner: st.SearchStrategy[Schedule]) -> st.SearchStrategy[Schedule]:
    return st.one_of(
        st.builds(lambda a, b, at: a.then(b, at=at), inner, inner, LENGTH),
        st.builds(lambda a, b: a.times(b), inner, st.one_of(inner, NUMBER)),
        st.builds(lambda a, steps, start: a.warmup(steps, start), inner, LENGTH, NUMBER),
    )


ANY = st.recursive(SIMPLE, compose, max_leaves=4)
STEP = st.one_of(st.integers(0, 70), st.floats(0, 70))


@given(ANY, ANY, STEP, LENGTH, NUMBER)
def test_laws_of_composition(a: Schedule, b: Schedule, t: float, at: float, k: float) -> None:
    assert a.then(b, at=at)(t) == (a(t) if t < at else b(t - at))
    assert a.then(b, at=at).steps == at + b.steps
    assert a.times(b)(t) == b.times(a)(t) == a(t) * b(t)
    assert a.times(b).steps == max(a.steps, b.steps)
    assert a.times(k)(t) == a(t) * k
    assert a.times(k).steps == a.steps
    assert a.times(lambda step: step + 1.0)(t) == a(t) * (t + 1.0)
    assert a.warmup(at)(t) == pytest.approx(a(t) * min(1.0, t / at), rel=1e-12)
    assert a.warmup(at, 1.0)(t) == pytest.approx(a(t), rel=1e-12)
    assert a.warmup(at).steps == max(a.steps, at)
    if a.steps < math.inf:
        assert a.then(b)(a.steps) == b(0)
        assert a.then(b, at=a.steps) == a.then(b)


@given(ANY, ANY, ANY, LENGTH, LENGTH, STEP)
def test_sequences_are_associative(
    a: Schedule, b: Schedule, c: Schedule, m: float, n: float, t: float
) -> None:
    assume(abs(t - m) > 1e-9 and abs(t - m - n) > 1e-9)
    left, right = a.then(b, at=m).then(c, at=m + n), a.then(b.then(c, at=n), at=m)
    assert left(t) == pytest.approx(right(t), rel=1e-6, abs=1e-6)
    assert left.steps == pytest.approx(right.steps)


@settings(max_examples=300)
@given(ANY, STEP)
def test_text_and_copies_are_the_same_schedule(made: Schedule, t: float) -> None:
    for again in (
        parse(repr(made)),
        pickle.loads(pickle.dumps(made)),
        copy.deepcopy(made),
        copy.copy(made),
    ):
        assert again == made
        assert hash(again) == hash(made)
        assert repr(again) == repr(made)
        assert again.steps == made.steps
        assert again(t) == made(t)


@given(ANY)
def test_values_are_numbers(made: Schedule) -> None:
    """Floats, finite, and the last one stays."""
    end = made.steps if made.steps < math.inf else 70
    assert all(math.isfinite(made(t)) for t in (0, 0.5, 1, end / 3, end))
    if made.steps < math.inf:
        assert made(made.steps) == made(made.steps + 0.5) == made(made.steps * 2)


def test_schedules_differ() -> None:
    cosine = schedule.cosine(1.0, steps=10)
    others = [
        schedule.cosine(1.0, steps=11),
        schedule.linear(1.0, 0.0, steps=10),
        cosine.warmup(2),
        cosine.times(1),
    ]
    assert cosine == schedule.cosine(1, 0, steps=10)
    assert all(cosine != other and other != cosine for other in others)
    assert cosine != "cosine(1.0, end=0.0, steps=10)"
    assert len({cosine, schedule.cosine(1.0, steps=10), *others}) == 5


@schedule.schedule
def staircase(t: float, start: float, *, height: float, every: float = 2) -> float:
    """A formula of a user's own."""
    return start + height * (t // every)


def test_own_formula() -> None:
    made = staircase(1.0, height=0.5)
    assert [made(t) for t in range(5)] == [1.0, 1.0, 1.5, 1.5, 2.0]
    assert repr(made) == "staircase(start=1.0, height=0.5, every=2)"
    assert made == staircase(1.0, height=0.5, every=2) == pickle.loads(pickle.dumps(made))
    assert made.warmup(2)(1) == 0.5
    assert made.steps == math.inf
    assert staircase.__doc__ == "A formula of a user's own."
    with pytest.raises(
        ScheduleError, match="staircase: every must be a number greater than 0, got 0"
    ):
        staircase(1.0, height=0.5, every=0)
    with pytest.raises(TypeError, match="staircase: missing a required argument: 'height'"):
        staircase(1.0)  # pyright: ignore[reportCallIssue]


# What is wrong is said in one sentence.

WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "steps 0": (
        lambda: schedule.cosine(1.0, steps=0),
        "cosine: steps must be a number greater than 0, got 0.",
    ),
    "steps nan": (
        lambda: schedule.linear(1, 0, steps=math.nan),
        "linear: steps must be a number greater than 0, got nan",
    ),
    "steps text": (
        lambda: schedule.cosine(1.0, steps="10"),
        "cosine: steps must be a number greater than 0, got '10'.",
    ),
    "start": (lambda: schedule.cosine(None, steps=3), "cosine: start must be a number, got None."),
    "bool": (lambda: schedule.constant(True), "constant: value must be a number, got True."),
    "infinite": (lambda: schedule.constant(math.inf), "constant: value must be a number, got inf."),
    "nan": (
        lambda: schedule.linear(math.nan, 0, steps=2),
        "linear: start must be a number, got nan.",
    ),
    "power": (
        lambda: schedule.polynomial(1, steps=3, power=0),
        "polynomial: power must be a number greater than 0",
    ),
    "gamma": (
        lambda: schedule.exponential(1, gamma=-0.5),
        "exponential: gamma must be a number greater than 0",
    ),
    "every": (
        lambda: schedule.exponential(1, gamma=0.5, every=0),
        "exponential: every must be a number greater than 0",
    ),
    "mult": (
        lambda: schedule.warm_restarts(1, period=3, mult=0.5),
        "warm_restarts: mult must be a number from 1 on",
    ),
    "period": (
        lambda: schedule.warm_restarts(1, period=-3),
        "warm_restarts: period must be a number greater than 0",
    ),
    "rise": (
        lambda: schedule.one_cycle(1, steps=3, rise=1.0),
        "one_cycle: rise must lie between 0 and 1, got 1.0.",
    ),
    "div_factor": (
        lambda: schedule.one_cycle(1, steps=3, div_factor=0),
        "div_factor must be a number greater than 0",
    ),
    "shape": (
        lambda: schedule.one_cycle(1, steps=3, shape="sine"),
        "shape must be one of linear, cosine, sqrt, got 'sine'",
    ),
    "up": (
        lambda: schedule.triangular(0, 1, up=0),
        "triangular: up must be a number greater than 0, got 0.",
    ),
    "down": (
        lambda: schedule.triangular(0, 1, up=1, down=0),
        "triangular: down must be a number greater than 0, got 0.",
    ),
    "changes": (
        lambda: schedule.piecewise(1, {5: 1, 3: 2}),
        "changes must be a dict of increasing steps, from 0 on",
    ),
    "negative change": (
        lambda: schedule.piecewise(1, {-1: 1}),
        "changes must be a dict of increasing steps, from 0 on",
    ),
    "list of changes": (
        lambda: schedule.piecewise(1, [3, 5]),
        "changes must be a dict of increasing steps, from 0 on",
    ),
    "text in changes": (
        lambda: schedule.piecewise(1, {"3": 2}),
        "changes must be a dict of increasing steps, from 0 on",
    ),
    "timescale": (
        lambda: schedule.inverse_sqrt(1, timescale=0),
        "inverse_sqrt: timescale must be a number greater than",
    ),
    "too short": (
        lambda: schedule.warmup_stable_decay(1, steps=10, warmup_steps=6, decay_steps=5),
        "warmup_stable_decay: warmup_steps=6 and decay_steps=5 do not fit into steps=10.",
    ),
    "negative warmup": (
        lambda: schedule.constant(1).warmup(-1),
        "warmup: length must be a number from 0 on, got -1.",
    ),
    "start of warmup": (
        lambda: schedule.constant(1).warmup(2, "0"),
        "warmup: start must be a number, got '0'.",
    ),
    "endless then": (
        lambda: schedule.constant(1).then(schedule.constant(2)),
        "then: at must be a number from 0 on, got inf",
    ),
    "negative then": (
        lambda: schedule.constant(1).then(schedule.constant(2), at=-1),
        "then: at must be a number from 0 on",
    ),
    "then what": (
        lambda: schedule.constant(1).then(3, at=2),
        "then: following must be a schedule, or another function",
    ),
    "times what": (
        lambda: schedule.constant(1).times("2"),
        "times: factor must be a number, got '2'.",
    ),
    "negative step": (
        lambda: schedule.cosine(1, steps=3)(-1),
        "has values at steps from 0 on, and was asked for step -1",
    ),
    "step nan": (
        lambda: schedule.cosine(1, steps=3)(math.nan),
        "has values at steps from 0 on, and was asked for step nan",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_of_makers(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises(ScheduleError, match=re.escape(message)) as caught:
        call()
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is no schedule"),
        ("0.1", "'0.1' is no schedule: begin with one of constant, linear"),
        ("cosine", "'cosine' is no part of a schedule"),
        ("cosine(", "is no schedule ("),
        ("cosine()", "cosine: missing a required argument: 'start'"),
        ("cosine(1, steps=3, stepz=3)", "cosine: got an unexpected keyword argument 'stepz'"),
        ("cosine(1, steps=0)", "cosine: steps must be a number greater than 0, got 0."),
        ("cosine(1, steps=x)", "'x' is no part of a schedule"),
        ("cosine(1, steps=2*3)", "'2 * 3' is no part of a schedule"),
        ("cosine(*[1], steps=3)", "'*[1]' is no part of a schedule"),
        ("cosine(**{'start': 1}, steps=3)", "write its arguments one by one"),
        ("sine(1, steps=3)", "'sine(1, steps=3)' is no part of a schedule"),
        ("cosine(1, steps=3).plus(2)", "is no part of a schedule"),
        ("cosine(1, steps=3).__class__", "is no part of a schedule"),
        ("cosine(1, steps=3)(2)", "is no part of a schedule"),
        ("__import__('os').getcwd()", "is no part of a schedule"),
        ("cosine(-'1', steps=3)", "is no schedule ("),
        ("cosine(True, steps=3)", "cosine: start must be a number, got True."),
        ("cosine(1j, steps=3)", "'1j' is no part of a schedule"),
        ("constant(1e999)", "constant: value must be a number, got inf."),
        ("constant(" + "-" * 10_000 + "1)", "is no schedule ("),
        ("constant(1); constant(2)", "is no schedule ("),
        ("piecewise(1, {**{}})", "is no part of a schedule"),
        ("linear(1, 0, 3)", "linear: too many positional arguments"),
        ("constant(1\0)", "is no schedule ("),
    ],
)
def test_errors_of_text(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=re.escape(message)):
        parse(text)


def test_text_takes_what_one_types() -> None:
    assert parse(" cosine(3e-4, steps=10_000).warmup(500) ") == schedule.cosine(
        3e-4, steps=10_000
    ).warmup(500)
    assert parse("constant(-1)") == schedule.constant(-1)
    assert parse("piecewise(0.1, {30: 0.01, 60: -0.001})")(60) == -0.001


def test_arguments_are_kept_apart() -> None:
    """A dict that is changed later does not change the schedule that it made."""
    changes = {5: 0.1}
    made = schedule.piecewise(1.0, changes)
    changes[2] = 0.5
    assert made(3) == 1.0


# Mutations: every small mistake in a formula is noticed by its row above.

SWAPPED = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
}
FREE_FUNCTIONS = (
    formulas.anneal,
    formulas.half_cosine,
)  # a wrong find_cycle may not come to an end


def places(tree: ast.Module) -> list[ast.BinOp | ast.Constant]:
    """What computes: no docstring, and no check that raises, which the table of errors tests."""
    definition = next(node for node in tree.body if isinstance(node, ast.FunctionDef))
    body = [
        s
        for s in definition.body[1:]
        if not (isinstance(s, ast.If) and isinstance(s.body[0], ast.Raise))
    ]
    return [
        node for s in body for node in ast.walk(s) if isinstance(node, (ast.BinOp, ast.Constant))
    ]


def mistakes(function: Callable[..., Any]) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The function with one operator swapped, or one number changed, in all ways."""
    tree = ast.parse(inspect.getsource(function))
    definition = next(node for node in tree.body if isinstance(node, ast.FunctionDef))
    definition.decorator_list, definition.returns = [], None
    definition.args.defaults, definition.args.kw_defaults = (
        [],
        [None] * len(definition.args.kwonlyargs),
    )
    for index in range(len(places(tree))):
        wrong = copy.deepcopy(tree)
        node = places(wrong)[index]
        before = ast.unparse(node)
        if isinstance(node, ast.BinOp) and type(node.op) in SWAPPED:
            node.op = SWAPPED[type(node.op)]()
        elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            node.value += 1
        else:
            continue
        names: dict[str, Any] = {}
        exec(compile(wrong, "<mistake>", "exec"), vars(formulas), names)
        yield f"{before} -> {ast.unparse(node)}", names[function.__name__]


def still_right(name: str, formula: Callable[..., float]) -> bool:
    """Whether another formula gives the values of a row, which one of its kind must not."""
    made, expected = FORMULAS[name]
    try:
        with np.errstate(all="ignore"):
            values = [formula(min(int(t), made.steps), **made._given) for t in STEPS]
        np.testing.assert_allclose(
            np.array(values, dtype=float), expected(STEPS), rtol=1e-9, atol=1e-12
        )
    except (AssertionError, ArithmeticError, ValueError, TypeError):
        return False
    return True


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "constant"])
def test_wrong_formulas_are_noticed(name: str) -> None:
    formula = inspect.unwrap(MAKERS[name])
    rows = [
        row
        for row, (made, _) in FORMULAS.items()
        if repr(made).startswith(f"{name}(") and "." not in row
    ]
    survivors = [
        what for what, wrong in mistakes(formula) if all(still_right(row, wrong) for row in rows)
    ]
    assert not survivors


@pytest.mark.parametrize("function", FREE_FUNCTIONS, ids=lambda f: f.__name__)
def test_wrong_functions_of_formulas_are_noticed(
    function: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    survivors = []
    for what, wrong in mistakes(function):
        monkeypatch.setattr(formulas, function.__name__, wrong)
        survivors += [what] * all(
            still_right(row, made._formula) for row, (made, _) in FORMULAS.items()
        )
    assert not survivors
