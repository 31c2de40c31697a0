"""LBFGS: torch.optim's values to the last bit, dense BFGS's directions, and what its state goes
through."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import onepass
from onepass import checkpoint
from onepass.algorithms.lbfgs import history, line_search
from onepass.algorithms.lbfgs.flat import FlatParameters
from onepass.algorithms.lbfgs.line_search import Point, strong_wolfe

LIBRARIES = (torch.optim, onepass)
BOTH = [torch.float64, torch.float32]
DTYPES = pytest.mark.parametrize("dtype", BOTH)
SEARCHES = pytest.mark.parametrize("search", [None, "strong_wolfe"])
Loss = Callable[[Sequence[Tensor]], Tensor]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Vectors here are short: more threads would only wait for each other."""
    torch.set_num_threads(1)


# The problems: parameters and a loss.


def rosenbrock(dtype: torch.dtype) -> tuple[list[Tensor], Loss]:
    def loss(p: Sequence[Tensor]) -> Tensor:
        x = p[0]
        return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()

    return [torch.tensor([-1.2, 1.0, -1.2, 1.0], dtype=dtype)], loss


def least_squares(dtype: torch.dtype) -> tuple[list[Tensor], Loss]:
    a, b = torch.randn(30, 8, dtype=dtype), torch.randn(30, dtype=dtype)
    return [torch.zeros(8, dtype=dtype)], lambda p: ((a @ p[0] - b) ** 2).sum()


def logistic_regression(dtype: torch.dtype) -> tuple[list[Tensor], Loss]:
    x, labels = torch.randn(40, 6, dtype=dtype), (torch.rand(40) > 0.5).to(dtype)

    def loss(p: Sequence[Tensor]) -> Tensor:
        logits = x @ p[0] + p[1]
        return (
            nn.functional.binary_cross_entropy_with_logits(logits, labels)
            + 1e-3 * (p[0] ** 2).sum()
        )

    return [torch.zeros(6, dtype=dtype), torch.zeros((), dtype=dtype)], loss


def network(dtype: torch.dtype) -> tuple[list[Tensor], Loss]:
    x, y = torch.randn(20, 3, dtype=dtype), torch.randn(20, 2, dtype=dtype)
    start = [
        torch.randn(3, 4, dtype=dtype) / 2,
        torch.zeros(4, dtype=dtype),
        torch.randn(4, 2, dtype=dtype) / 2,
    ]
    return start, lambda p: (((x @ p[0] + p[1]).tanh() @ p[2] - y) ** 2).mean()


PROBLEMS = (rosenbrock, least_squares, logistic_regression, network)


@dataclass
class Run:
    """An optimizer on its own copy of a problem's parameters, its evaluations, and the losses that
    it returned."""

    library: Any
    start: list[Tensor]
    loss: Loss
    options: dict[str, Any] = field(default_factory=dict)
    evaluations: int = 0
    returned: list[float] = field(default_factory=list)
    fail_at: int = -1

    def __post_init__(self) -> None:
        self.params = [nn.Parameter(p.clone()) for p in self.start]
        self.optimizer = self.library.LBFGS(self.params, **self.options)

    def closure(self) -> Tensor:
        assert torch.is_grad_enabled()
        self.evaluations += 1
        if self.evaluations == self.fail_at:
            raise ArithmeticError("no loss here")
        self.optimizer.zero_grad()
        loss = self.loss(self.params)
        loss.backward()
        return loss

    def step(self, steps: int = 1) -> Run:
        for _ in range(steps):
            self.returned.append(self.optimizer.step(self.closure).item())
        return self

    @property
    def state(self) -> dict[str, Any]:
        return self.optimizer.state.get(self.params[0], {})

    def values(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.params])


def as_tensors(state: dict[str, Any]) -> dict[str, Any]:
    """A state with all numbers as tensors: torch keeps some as tensors or as floats, as it
    comes."""

    def convert(entry: Any) -> Any:
        if isinstance(entry, list):
            return [convert(e) for e in entry if e is not None]
        return (
            entry.double()
            if isinstance(entry, Tensor)
            else torch.tensor(entry, dtype=torch.float64)
        )

    return {name: convert(entry) for name, entry in state.items()}


def assert_same(ours: Run, torchs: Run, *, state: bool = True) -> None:
    """To the last bit: what was returned, how often the loss was evaluated, parameters and
    state."""
    assert ours.returned == pytest.approx(torchs.returned, rel=0, abs=0, nan_ok=True)
    assert ours.evaluations == torchs.evaluations
    assert torch.equal(ours.values().nan_to_num(7.5), torchs.values().nan_to_num(7.5))
    if state:
        assert ours.state.keys() == torchs.state.keys()
        torch.testing.assert_close(
            as_tensors(ours.state), as_tensors(torchs.state), rtol=0, atol=0, equal_nan=True
        )


def both(problem: Callable, dtype: torch.dtype, **options: Any) -> tuple[Run, Run]:
    start, loss = problem(dtype)
    return Run(onepass, start, loss, options), Run(torch.optim, start, loss, options)


# Against torch.optim.

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "short history": {"lr": 0.5, "history_size": 2, "max_iter": 9},
    "small lr": {"lr": 0.1},
    "tensor lr": {"lr": torch.tensor([0.3])},
    "one iteration": {"max_iter": 1},
    "few evaluations": {"max_eval": 6},
    "one evaluation": {"max_eval": 1},
    "loose gradient": {"tolerance_grad": 0.05},
    "loose change": {"tolerance_change": 1e-3},
    "no tolerance": {"tolerance_grad": 0, "tolerance_change": 0, "max_iter": 12},
    "converged before": {"tolerance_grad": 1e9},
    "no descent is enough": {"tolerance_change": 1e9},
}


CASES = [
    (name, problem, dtype) for name in list(OPTIONS)[:2] for problem in PROBLEMS for dtype in BOTH
]
CASES += [
    (name, problem, dtype)
    for name in list(OPTIONS)[2:]
    for problem, dtype in zip(PROBLEMS, BOTH * 2, strict=True)
]


@SEARCHES
@pytest.mark.parametrize(("name", "problem", "dtype"), CASES)
def test_equals_torch(name: str, problem: Callable, search: str | None, dtype: torch.dtype) -> None:
    ours, torchs = both(problem, dtype, line_search_fn=search, **OPTIONS[name])
    assert_same(ours.step(3), torchs.step(3))
    assert ours.evaluations == ours.state["func_evals"]


@DTYPES
@SEARCHES
def test_options_that_change_between_steps(search: str | None, dtype: torch.dtype) -> None:
    sides = both(network, dtype, line_search_fn=search, max_iter=3)
    for changes in (
        {"lr": 0.5},
        {"lr": torch.tensor(0.1)},
        {"max_iter": 5, "max_eval": 4},
        {"tolerance_grad": 0.1},
    ):
        for side in sides:
            side.optimizer.param_groups[0].update(changes)
            side.step()
        assert_same(*sides)


def test_signature_and_layout() -> None:
    ours, torchs = (
        inspect.signature(library.LBFGS).parameters for library in (onepass, torch.optim)
    )
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in torchs.values()
    ]
    first, second = both(network, torch.float32)
    assert_same(first.step(), second.step())
    mine, theirs = first.optimizer.state_dict(), second.optimizer.state_dict()
    assert list(mine["state"]) == list(theirs["state"]) == [0]
    differentiable = {"differentiable"}
    assert (
        mine["param_groups"][0].keys() - differentiable
        == theirs["param_groups"][0].keys() - differentiable
    )


@SEARCHES
def test_divergence_goes_where_it_goes_in_torch(search: str | None) -> None:
    """Infinite and missing losses and gradients: no exception, no warning, the same numbers."""
    start, options = [torch.tensor([3.0, -2.0, 0.5])], {"line_search_fn": search, "max_iter": 6}
    endless: list[Loss] = [
        lambda p: -(p[0] ** 2).sum(),
        lambda p: (p[0] ** 4).sum().exp(),
        lambda p: (p[0] ** 2).sum() * math.inf,
        lambda p: p[0].log().sum(),
    ]
    for loss in endless[: 1 if search else 4]:
        assert_same(
            *(Run(library, start, loss, options).step(3) for library in (onepass, torch.optim))
        )
    # With a search, torch raises an IndexError on some of these.
    for loss in endless:
        assert Run(onepass, start, loss, options).step(3).evaluations <= 3 * 8


@DTYPES
def test_a_search_stays_where_the_loss_is_defined(dtype: torch.dtype) -> None:
    """A trial beyond, where the logarithm is no number, ends the run in torch; its neighbour, an
    infinite loss, too."""
    start = [torch.tensor([5.0, 0.1, 30.0], dtype=dtype)]

    def barrier(p: Sequence[Tensor]) -> Tensor:
        return (p[0] - p[0].log()).sum()

    def wall(p: Sequence[Tensor]) -> Tensor:
        return barrier(p) if bool((p[0] > 0).all()) else p[0].sum() * math.inf

    for loss in (barrier, wall):
        run = Run(onepass, start, loss, {"line_search_fn": "strong_wolfe", "max_iter": 60}).step()
        torch.testing.assert_close(run.values(), torch.ones(3, dtype=dtype), rtol=1e-3, atol=0)


def test_a_step_longer_than_the_dtype_s_largest_number() -> None:
    """It leads to infinity; torch fails to convert the length."""
    p = nn.Parameter(torch.zeros(2, dtype=torch.float16))
    with torch.no_grad(), np.errstate(over="ignore"):
        FlatParameters("LBFGS", [p]).move(
            None, 1e5, [torch.tensor([1.0, -1.0], dtype=torch.float16)]
        )
    assert p.tolist() == [math.inf, -math.inf]


def test_searches_that_end_before_their_last_trial() -> None:
    """At a kink no slope is flat: a bracket shrinks to nothing, and the gradient of an earlier
    trial is needed."""
    weights = torch.linspace(1, 3, 5, dtype=torch.float64)

    def loss(p: Sequence[Tensor]) -> Tensor:
        return (weights * p[0].abs()).sum() + ((p[0] - 0.1 * weights) ** 2).sum()

    for seed in range(6):
        torch.manual_seed(seed)
        start = [torch.randn(5, dtype=torch.float64)]
        options = {"line_search_fn": "strong_wolfe", "max_iter": 12, "max_eval": 300}
        assert_same(
            *(Run(library, start, loss, options).step(2) for library in (onepass, torch.optim))
        )


def test_a_mutation_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number of the method, a little wrong, changes some run that is compared above."""
    mutations = [
        (line_search, "DECREASE", 0.3),
        (line_search, "CURVATURE", 0.5),
        (line_search, "SHORTEST", 1.0),
        (history, "LEAST_CURVATURE", 1e-2),
    ]
    for module, name, value in mutations:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            for problem, lr in ((rosenbrock, 1), (network, 1), (rosenbrock, 0.2), (network, 0.2)):
                ours, torchs = both(problem, torch.float64, line_search_fn="strong_wolfe", lr=lr)
                if not torch.equal(ours.step(3).values(), torchs.step(3).values()):
                    break
            else:
                pytest.fail(f"{name} = {value} changes nothing")


# Against the paper.


@pytest.mark.parametrize("problem", PROBLEMS)
def test_directions_are_those_of_dense_bfgs(problem: Callable) -> None:
    """With every pair in the history, H is gamma I after all updates in turn: Nocedal and Wright,
    (6.17) and (7.20)."""
    start, loss = problem(torch.float64)
    run = Run(onepass, start, loss, {"lr": 0.1, "max_iter": 1, "tolerance_change": 0})
    places, gradients = [], []

    def note() -> None:
        run.closure()
        places.append(run.values())
        gradients.append(torch.cat([p.grad.reshape(-1) for p in run.params]))

    for _ in range(12):
        note()
        run.step()
        pairs = [
            (places[i + 1] - places[i], gradients[i + 1] - gradients[i])
            for i in range(len(places) - 1)
            if (places[i + 1] - places[i]) @ (gradients[i + 1] - gradients[i]) > 1e-10
        ]
        identity = torch.eye(len(places[0]), dtype=torch.float64)
        s, y = pairs[-1] if pairs else (torch.ones(1), torch.ones(1))
        h = identity * (s @ y / (y @ y))
        for s, y in pairs:
            v = identity - torch.outer(y, s) / (y @ s)
            h = v.T @ h @ v + torch.outer(s, s) / (y @ s)
        torch.testing.assert_close(run.state["d"], -(h @ gradients[-1]), rtol=1e-7, atol=1e-9)
        assert len(run.state["old_dirs"]) == len(pairs)
    assert len(run.state["old_dirs"]) > 8


def test_a_quadratic_takes_little_more_steps_than_it_has_dimensions() -> None:
    """As many with exact searches; with inexact ones, soon after."""
    a = torch.randn(6, 6, dtype=torch.float64)
    a = a @ a.T + torch.eye(6, dtype=torch.float64)
    start = [torch.randn(6, dtype=torch.float64)]
    run = Run(
        onepass,
        start,
        lambda p: p[0] @ a @ p[0] / 2,
        {"line_search_fn": "strong_wolfe", "max_iter": 18},
    )
    run.optimizer.param_groups[0]["tolerance_change"] = 0
    run.step()
    assert run.values().abs().max() < 1e-6


FUNCTIONS: dict[str, Callable[[float], tuple[float, float]]] = {
    "parabola": lambda t: ((t - 3) ** 2, 2 * (t - 3)),
    "steep": lambda t: ((t - 1e-3) ** 2 * 1e6, 2e6 * (t - 1e-3)),
    "flat": lambda t: (-t / (t * t + 2), (t * t - 2) / (t * t + 2) ** 2),
    "kink": lambda t: (abs(t - 0.7) + 0.01 * t * t, math.copysign(1, t - 0.7) + 0.02 * t),
    "waves": lambda t: (math.sin(5 * t) - t + 0.1 * t * t, 5 * math.cos(5 * t) - 1 + 0.2 * t),
    "wall": lambda t: (-t if t < 2 else math.inf, -1.0 if t < 2 else math.inf),
    "hole": lambda t: (-t if t < 2 else math.nan, -1.0 if t < 2 else math.nan),
}


@pytest.mark.parametrize("first", [1e-6, 0.1, 1.0, 50.0])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_search_satisfies_the_strong_wolfe_conditions(name: str, first: float) -> None:
    function, trials = FUNCTIONS[name], []
    overwritten: set[int] = set()

    def evaluate(t: Any, kept: Point) -> Point:
        assert kept.gradient not in overwritten
        overwritten.update({*range(len(trials))} - {kept.gradient})
        loss, slope = function(float(t))
        trials.append(float(t))
        return Point(t, loss, np.float64(slope), len(trials) - 1)

    loss, slope = function(0.0)
    if slope >= 0:
        function = lambda t: (FUNCTIONS[name](-t)[0], -FUNCTIONS[name](-t)[1])  # noqa: E731
        loss, slope = function(0.0)
    start = Point(0, loss, np.float64(slope), -1)
    with np.errstate(all="ignore"):
        found = strong_wolfe(evaluate, start, first, reach=1.0, limit=25)
    assert len(trials) <= 26
    assert found.gradient not in overwritten
    assert found is start or float(found.t) in trials
    if name in ("parabola", "steep", "flat", "waves"):
        assert found.loss <= start.loss + 1e-4 * found.t * start.slope
        assert abs(found.slope) <= 0.9 * abs(start.slope)
    elif name in ("kink", "wall"):
        assert found.loss < start.loss


def test_a_search_of_no_length_evaluates_nothing() -> None:
    run = Run(onepass, *network(torch.float32), {"lr": 0.0, "line_search_fn": "strong_wolfe"})
    before = run.values()
    run.step(2)
    assert run.evaluations == 2
    assert torch.equal(run.values(), before)


def test_the_cubic_s_minimum() -> None:
    def point(t: float) -> Point:
        return Point(t, t**3 - 3 * t, np.float64(3 * t * t - 3), None)

    for a, b in ((0.5, 3.0), (3.0, 0.5), (-0.9, 0.3)):
        found = line_search.minimum_of_cubic(point(a), point(b), -5.0, 5.0)
        assert found == pytest.approx(1.0, abs=1e-12)
    assert line_search.minimum_of_cubic(point(0.5), point(3.0), 1.5, 5.0) == 1.5
    assert line_search.minimum_of_cubic(point(0.5), point(3.0), -5.0, 0.5) == 0.5
    assert line_search.minimum_of_cubic(point(0.5), point(0.5), 1.0, 2.0) == 1.5
    rising = Point(0.0, 0.0, np.float64(1.0), None), Point(1.0, 1.0, np.float64(1.0), None)
    with np.errstate(all="ignore"):
        assert line_search.minimum_of_cubic(*rising, 0.0, 1.0) in (0.0, 0.5, 1.0)


# State dicts.


def through_file(state_dict: Any) -> Any:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@DTYPES
@SEARCHES
@pytest.mark.parametrize(
    "direction", ["torch to onepass", "onepass to torch", "onepass to onepass"]
)
def test_a_run_continues_from_a_state_dict(
    direction: str, search: str | None, dtype: torch.dtype
) -> None:
    """In the middle of a run, with the history full: the same bits as without a stop."""
    options = {"line_search_fn": search, "max_iter": 4, "history_size": 5, "lr": 0.5}
    start, loss = network(dtype)
    source, target = (
        {"torch": torch.optim, "onepass": onepass}[word] for word in direction.split(" to ")
    )
    whole, first = (
        Run(torch.optim, start, loss, options).step(6),
        Run(source, start, loss, options).step(3),
    )
    second = Run(target, [p.detach() for p in first.params], loss)
    second.optimizer.load_state_dict(through_file(first.optimizer.state_dict()))
    second.step(3)
    assert torch.equal(second.values(), whole.values())
    assert second.returned == whole.returned[3:]
    assert second.state["func_evals"] == whole.state["func_evals"]
    assert len(second.state["old_dirs"]) == 5
    assert {v.dtype for name in ("old_dirs", "old_stps") for v in second.state[name]} == {dtype}


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "checkpoint"])
def test_a_run_continues_from_a_copy(how: str, tmp_path: Any) -> None:
    options = {"line_search_fn": "strong_wolfe", "max_iter": 3}
    whole, run = (Run(onepass, *rosenbrock(torch.float64), options).step(2) for _ in range(2))
    whole.step(2)
    if how == "checkpoint":
        checkpoint.save(tmp_path / "run.safetensors", {"optimizer": run.optimizer.state_dict()})
        run.optimizer = onepass.LBFGS(run.params)
        run.optimizer.load_state_dict(checkpoint.load(tmp_path / "run.safetensors")["optimizer"])
    else:
        run.optimizer = (
            copy.deepcopy(run.optimizer)
            if how == "deepcopy"
            else pickle.loads(pickle.dumps(run.optimizer))
        )
        run.params = run.optimizer.param_groups[0]["params"]
    run.step(2)
    assert torch.equal(run.values(), whole.values())
    assert run.returned == whole.returned
    assert repr(run.optimizer).startswith("LBFGS (")


def test_an_empty_state_and_one_of_counts_alone_load() -> None:
    ours, torchs = both(network, torch.float32, tolerance_grad=1e9)
    for library in LIBRARIES:
        fresh = library.LBFGS(ours.params)
        ours.optimizer.load_state_dict(fresh.state_dict())
        assert not ours.state
    torchs.step()
    ours.optimizer.load_state_dict(torchs.optimizer.state_dict())
    assert ours.state == {"func_evals": 1, "n_iter": 0}
    ours.step()
    assert ours.state == {"func_evals": 2, "n_iter": 0}


def test_loaded_state_is_a_copy_and_keeps_its_dtype() -> None:
    """float32 history of parameters that are bfloat16 now; where the parameters are wider, the
    history follows."""
    run = Run(
        onepass, *network(torch.float32), {"line_search_fn": "strong_wolfe", "max_iter": 4}
    ).step()
    saved = run.optimizer.state_dict()
    kept = copy.deepcopy(saved)
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        other = Run(onepass, [p.detach().to(dtype) for p in run.params], network(dtype)[1])
        other.optimizer.load_state_dict(saved)
        vectors = [
            other.state["d"],
            other.state["prev_flat_grad"],
            *other.state["old_dirs"],
            *other.state["old_stps"],
        ]
        assert {v.dtype for v in vectors} == {expected}
        before = other.loss(other.params)
        other.step(2)
        assert other.loss(other.params) < before
        assert other.state["d"].dtype == other.state["old_dirs"][-1].dtype == expected
    torch.testing.assert_close(saved["state"], kept["state"], rtol=0, atol=0)


def test_history_follows_names() -> None:
    """The same parameters in another order: the flat vectors' parts change places, and the run goes
    on as before."""
    start, loss = network(torch.float64)
    names, order = ["first", "bias", "second"], [2, 0, 1]
    options: dict[str, Any] = {"line_search_fn": "strong_wolfe", "max_iter": 3}
    run = Run(onepass, start, loss, options)
    run.optimizer = onepass.LBFGS(zip(names, run.params, strict=True), **options)
    run.step(3)
    moved = Run(onepass, [p.detach() for p in run.params], loss, options)
    moved.optimizer = onepass.LBFGS([(names[i], moved.params[i]) for i in order], **options)
    moved.optimizer.load_state_dict(run.optimizer.state_dict())
    run.step(2)
    moved.step(2)
    torch.testing.assert_close(moved.values(), run.values(), rtol=1e-9, atol=1e-12)
    assert list(moved.optimizer.state) == [moved.params[2]]


def change(**entries: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda state: state[0].update(entries)


SAVED: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (change(d=torch.zeros(3)), "vectors of 24 numbers.*shape"),
    (change(d=torch.zeros(24, dtype=torch.int64)), "vectors of 24 numbers"),
    (change(old_dirs=[torch.zeros(24)] * 9), "lists of one length"),
    (change(old_dirs=torch.zeros(24)), "lists of one length"),
    (
        change(old_dirs=[None], old_stps=[torch.zeros(24)], ro=[1.0]),
        "vectors of 24 numbers, but 'old_dirs' has None",
    ),
    (change(prev_flat_grad=None), "has no 'prev_flat_grad'; a whole state has"),
    (change(prev_loss="low"), "numbers for t, H_diag, prev_loss and in ro, got 'low'"),
    (
        lambda state: state.update({0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3, 4)}}),
        "another optimizer",
    ),
    (lambda state: state.update({0: [1, 2]}), "another optimizer.*list"),
    (lambda state: state.update({1: state.pop(0)}), "beside the first parameter"),
]


@pytest.mark.parametrize("case", range(len(SAVED)))
def test_a_state_that_does_not_fit_is_refused(case: int) -> None:
    spoil, words = SAVED[case]
    run = Run(onepass, *network(torch.float32), {"max_iter": 3, "lr": 0.1}).step()
    saved = copy.deepcopy(run.optimizer.state_dict())
    spoil(saved["state"])
    before = copy.deepcopy(run.optimizer.state_dict())
    with pytest.raises(ValueError, match=words) as caught:
        run.optimizer.load_state_dict(saved)
    assert "LBFGS" in str(caught.value)
    torch.testing.assert_close(run.optimizer.state_dict()["state"], before["state"], rtol=0, atol=0)


# Parameters and gradients of every kind.


def kinds() -> dict[str, tuple[list[Tensor], Loss]]:
    target = torch.tensor([1 + 2j, 3 - 1j, -2j])
    sides = torch.randn(4, 3)
    return {
        "complex": (
            [torch.zeros(3, dtype=torch.complex64), torch.zeros(2)],
            lambda p: (
                (p[0] - target).abs().square().sum()
                + (p[1] - 1).square().sum() * p[0][0].abs().square()
            ),
        ),
        "mixed precision": (
            [torch.zeros(3), torch.zeros(2, dtype=torch.float64)],
            lambda p: (p[0] - 1).square().sum().double() + (p[1] * p[0].sum() + 2).square().sum(),
        ),
        "no gradient": (
            [torch.zeros(3), torch.ones(2)],
            lambda p: (p[0].cosh() * (p[0] - 1) ** 2).sum(),
        ),
        "none at all": ([torch.zeros(3)], lambda p: torch.tensor(1.0, requires_grad=True) * 2),
        "empty beside others": (
            [torch.zeros(0), torch.zeros(3)],
            lambda p: (p[1] - 1).pow(4).sum(),
        ),
        "sparse": (
            [torch.zeros(4, 3), torch.zeros(3)],
            lambda p: (
                (nn.functional.embedding(torch.tensor([1, 3, 1]), p[0], sparse=True) - sides[0])
                .square()
                .sum()
                + (p[1] - 2).square().sum()
            ),
        ),
        "float16": ([torch.zeros(3, dtype=torch.float16)], lambda p: (p[0] - 1).square().sum()),
    }


# torch's search fails on float16, whose largest number it exceeds.
@pytest.mark.parametrize(
    ("name", "search"),
    [
        (name, search)
        for name in kinds()
        for search in (None, "strong_wolfe")
        if (name, search) != ("float16", "strong_wolfe")
    ],
)
def test_kinds_of_parameters(name: str, search: str | None) -> None:
    options = {"line_search_fn": search, "max_iter": 7, "lr": 0.5}
    torchs, ours = (Run(library, *kinds()[name], options) for library in LIBRARIES)
    torch.manual_seed(0)
    for side in (torchs, ours):
        side.loss = kinds()[name][1] if name != "sparse" else torchs.loss
        side.step(3)
    assert_same(ours, torchs)


def test_complex_is_what_its_parts_are() -> None:
    """The descent of complex parameters is that of their real and imaginary parts."""
    start, loss = kinds()["complex"]
    whole = Run(onepass, start, loss, {"line_search_fn": "strong_wolfe"}).step(2)
    parts = Run(
        onepass,
        [torch.view_as_real(start[0]), start[1]],
        lambda p: loss([torch.view_as_complex(p[0]), p[1]]),
        {"line_search_fn": "strong_wolfe"},
    ).step(2)
    assert torch.equal(torch.view_as_real(whole.params[0].detach()), parts.params[0].detach())


def test_parameters_in_any_layout() -> None:
    """Transposed, channels last, a part of a larger tensor: torch can flatten none of their
    gradients."""
    start, loss = network(torch.float64)
    layouts = [
        start[0].t().contiguous().t(),
        torch.zeros(8, dtype=torch.float64)[::2],
        start[2].t().clone().t(),
    ]
    options = {"line_search_fn": "strong_wolfe"}
    run, other = Run(onepass, start, loss, options), Run(onepass, start, loss, options)
    other.params = [nn.Parameter(p) for p in layouts]
    other.optimizer = onepass.LBFGS(other.params, **options)
    assert not other.params[0].is_contiguous()
    torch.testing.assert_close(other.step(2).values(), run.step(2).values(), rtol=1e-9, atol=1e-12)
    assert torch.equal(run.step().values(), Run(onepass, start, loss, options).step(3).values())


def test_a_gradient_that_is_lazily_conjugate() -> None:
    ends = []
    for lazy in (False, True):
        p = nn.Parameter(torch.tensor([1 + 1j, 2 - 3j]))
        optimizer = onepass.LBFGS([p], lr=0.1, max_iter=3)

        def closure(p: Tensor = p, lazy: bool = lazy) -> float:
            p.grad = p.detach().conj() if lazy else p.detach().conj().resolve_conj()
            return p.detach().abs().square().sum().item()

        optimizer.step(closure)
        ends.append(p.detach())
    assert torch.equal(*ends)


def test_a_model_that_changes_its_precision() -> None:
    """The history follows."""
    run = Run(
        onepass, *network(torch.float32), {"line_search_fn": "strong_wolfe", "max_iter": 3}
    ).step(2)
    loss = network(torch.float64)[1]
    run.loss = loss
    for p in run.params:
        p.grad = None
        p.data = p.data.double()
    run.step(2)
    assert {v.dtype for name in ("old_dirs", "old_stps") for v in run.state[name]} == {
        torch.float64
    }
    assert run.returned[-1] < run.returned[-2]


def test_bfloat16_descends() -> None:
    start, loss = network(torch.float32)
    run = Run(onepass, [p.bfloat16() for p in start], lambda p: loss([q.float() for q in p]))
    run.optimizer = onepass.LBFGS(run.params, line_search_fn="strong_wolfe")
    run.step(3)
    assert run.returned[-1] < 0.9 * run.returned[0]
    assert run.state["d"].dtype == torch.bfloat16


# Memory.


def test_memory_of_the_history() -> None:
    """Two vectors a pair, each of its own memory, and none beyond `history_size`; fewer once it is
    lowered."""
    run = Run(onepass, *network(torch.float32), {"lr": 0.1, "history_size": 4, "max_iter": 10})
    for size in (4, 2):
        run.optimizer.param_groups[0]["history_size"] = size
        run.step(2)
        rows = [*run.state["old_dirs"], *run.state["old_stps"]]
        assert len(rows) == 2 * size == 2 * len(run.state["ro"])
        assert all(row.untyped_storage().nbytes() == 4 * 24 for row in rows)
        assert len({row.data_ptr() for row in rows}) == 2 * size


def test_a_lowered_history_is_short_also_where_no_pair_enters() -> None:
    """As on a plane, which has no curvature."""
    run = Run(onepass, *network(torch.float32), {"lr": 0.1, "history_size": 4, "max_iter": 10})
    run.step(2)
    run.loss = lambda params: params[0].sum()
    run.optimizer.param_groups[0]["max_iter"] = 1
    run.step()
    assert len(run.state["old_dirs"]) == 4
    newest = run.state["old_stps"][-2:]
    run.optimizer.param_groups[0]["history_size"] = 2
    run.step()
    assert len(run.state["old_dirs"]) == len(run.state["ro"]) == 2
    assert all(s is kept for s, kept in zip(run.state["old_stps"], newest, strict=True))


@SEARCHES
@pytest.mark.parametrize("name", ["d", "prev_flat_grad"])
def test_a_vector_with_holes_becomes_torchs(name: str, search: str | None) -> None:
    """Its memory is not used again: sums over it would add in another order."""
    curvatures = torch.logspace(0, 3, 1001)

    def loss(params: list[torch.Tensor]) -> torch.Tensor:
        return (curvatures * params[0] ** 2).sum() + (params[0] ** 4).sum()

    options = {"lr": 0.5, "max_iter": 3, "line_search_fn": search}
    start = [torch.sin(torch.arange(1001.0))]
    run, other = Run(onepass, start, loss, options), Run(torch.optim, start, loss, options)
    for _ in range(4):
        run.step()
        other.step()
        run.state[name] = torch.stack([run.state[name]] * 2, -1)[:, 0]
    assert_same(run, other, state=False)


# What a closure does.


@SEARCHES
@pytest.mark.parametrize("fail_at", [*range(1, 10), 13, 17, 24])
def test_a_closure_that_raises(fail_at: int, search: str | None) -> None:
    """Wherever it raises: parameters and state are those after some whole iteration, and the run
    can go on."""
    options = {
        "line_search_fn": search,
        "lr": 0.6,
        "max_iter": 5,
        "max_eval": 100,
        "history_size": 3,
    }
    start, loss = rosenbrock(torch.float64)
    # Where each iteration ends, by a run that stops after each.
    single = Run(onepass, start, loss, options | {"max_iter": 1})
    whole = [single.values()]
    whole += [single.step().values() for _ in range(24)]
    run = Run(onepass, start, loss, options, fail_at=fail_at)
    with pytest.raises(ArithmeticError, match="no loss here"):
        run.step(24)
    assert any(torch.equal(run.values(), place) for place in whole)
    assert run.state.get("func_evals", 0) == fail_at - 1
    if run.state.get("d") is None:
        assert torch.equal(run.values(), whole[0])
    # From here on torch goes where we go, and both get to the end.
    other = Run(torch.optim, [p.detach() for p in run.params], loss)
    other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    run.returned.clear()
    run.evaluations = other.evaluations = 0
    run.fail_at = -1
    for side in (run, other):
        side.optimizer.param_groups[0].update(lr=1, line_search_fn="strong_wolfe")
        side.step(15)
    assert_same(run, other, state=False)
    assert run.returned[-1] < 1e-6


def test_an_interrupted_step_does_not_enter_the_history() -> None:
    """Not even where the gradient has changed meanwhile, as with other data."""
    start, loss = rosenbrock(torch.float64)
    run = Run(onepass, start, loss, {"line_search_fn": "strong_wolfe", "max_iter": 5}, fail_at=6)
    with pytest.raises(ArithmeticError):
        run.step()
    pairs = [v.clone() for v in run.state["old_stps"]]
    assert pairs
    direction = run.state["d"].clone()
    run.loss, run.fail_at = lambda p: loss(p) + 1000 * direction @ p[0], -1
    run.optimizer.param_groups[0]["max_iter"] = 1
    run.step()
    assert len(run.state["old_stps"]) == len(pairs)
    assert all(torch.equal(s, pair) for s, pair in zip(run.state["old_stps"], pairs, strict=True))


def test_an_interruption_in_the_first_iteration_leaves_no_trace() -> None:
    options = {"line_search_fn": "strong_wolfe", "max_iter": 5}
    start, loss = rosenbrock(torch.float64)
    run, whole = (
        Run(onepass, start, loss, options, fail_at=2),
        Run(onepass, start, loss, options).step(3),
    )
    with pytest.raises(ArithmeticError):
        run.step()
    assert run.state == {"func_evals": 1, "n_iter": 0}
    run.fail_at = -1
    assert torch.equal(run.step(3).values(), whole.values())


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (None, TypeError),
        ("low", TypeError),
        ([1.0], TypeError),
        (torch.ones(2), RuntimeError),
        (torch.ones(0), RuntimeError),
    ],
)
def test_a_closure_that_returns_no_loss(value: Any, error: type[Exception]) -> None:
    run = Run(onepass, *network(torch.float32), {"line_search_fn": "strong_wolfe"})
    before, calls = run.values(), []

    def closure() -> Any:
        calls.append(0)
        loss = run.closure()
        return loss if len(calls) > late else value

    for late in (1, 0):
        with pytest.raises(
            error, match=r"LBFGS: the closure must return the loss, one real number, got "
        ) as caught:
            run.optimizer.step(closure if late else lambda: value)
        assert type(value).__name__ != "Tensor" or str(tuple(value.shape)) in str(caught.value)
        assert torch.equal(run.values(), before)
        assert not run.state


def test_any_number_is_a_loss() -> None:
    start, loss = least_squares(torch.float32)
    for convert in (float, lambda x: x, lambda x: x.reshape(1, 1), lambda x: np.float32(x.item())):
        run = Run(onepass, start, loss, {"max_iter": 2, "lr": 0.01})
        returned = run.optimizer.step(
            lambda run=run, convert=convert: convert(run.closure().detach())
        )
        assert float(returned) > loss(run.params).item()


def test_a_closure_sees_the_caller_s_settings() -> None:
    """Gradients are on within, and off or on outside as they were; NumPy's error handling is the
    caller's."""
    run = Run(onepass, *network(torch.float32), {"line_search_fn": "strong_wolfe"})
    seen = []

    def closure() -> Tensor:
        seen.append((torch.is_grad_enabled(), np.geterr()["over"]))
        return run.closure()

    for grad in (True, False):
        with np.errstate(over="raise"), torch.set_grad_enabled(grad):
            run.optimizer.step(closure)
            assert torch.is_grad_enabled() == grad
    assert set(seen) == {(True, "raise")}
    assert all(p.is_leaf and p.requires_grad for p in run.params)


# What does not make sense.

BAD: list[tuple[dict[str, Any], type[Exception]]] = [
    *[({"lr": bad}, ValueError) for bad in (-1.0, math.nan, -math.inf, torch.ones(2))],
    *[
        ({name: bad}, ValueError)
        for name in ("max_iter", "max_eval", "history_size")
        for bad in (0, -3, 2.5, math.nan)
    ],
    *[
        ({name: "5"}, TypeError)
        for name in ("lr", "max_iter", "max_eval", "history_size", "tolerance_grad")
    ],
    *[({name: None}, TypeError) for name in ("lr", "max_iter", "history_size", "tolerance_change")],
    *[({name: math.nan}, ValueError) for name in ("tolerance_grad", "tolerance_change")],
    *[({"line_search_fn": bad}, RuntimeError) for bad in ("wolfe", True, strong_wolfe)],
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_options(case: int) -> None:
    """At construction, and at a step where a param group has been changed since."""
    ((name, value),), error = BAD[case][0].items(), BAD[case][1]
    run = Run(onepass, *network(torch.float32))
    with pytest.raises(error, match=f"LBFGS: (Tensor |.*; )?{name} must "):
        onepass.LBFGS(run.params, **{name: value})
    if (name, value) == ("max_eval", None):
        return
    run.optimizer.param_groups[0][name] = value
    before = run.values()
    with pytest.raises(error, match=f"LBFGS: (Tensor |.*; )?{name} must "):
        run.step()
    assert run.evaluations == 0
    assert torch.equal(run.values(), before)
    assert not run.state


def test_one_group_of_parameters() -> None:
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="LBFGS doesn't support per-parameter options"):
        onepass.LBFGS([{"params": [p]}, {"params": [q], "lr": 0.1}])
    optimizer = onepass.LBFGS([{"params": [p], "lr": 0.1}])
    with pytest.raises(ValueError, match="in one group"):
        optimizer.add_param_group({"params": [q]})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="empty"):
        onepass.LBFGS([])
    with pytest.raises(onepass.StepError, match="no parameters to optimize"):
        onepass.LBFGS([{"params": []}]).step(lambda: 1.0)


def test_a_step_needs_a_closure() -> None:
    optimizer = onepass.LBFGS([nn.Parameter(torch.ones(2))])
    for arguments in ((), (None,), (1.0,)):
        with pytest.raises(TypeError, match="LBFGS: step needs a closure that computes the loss"):
            optimizer.step(*arguments)


def test_parameters_that_cannot_step() -> None:
    def refused(params: list[Tensor], words: str, calls: int) -> None:
        run = Run(onepass, [torch.ones(2)], lambda p: (p[0] ** 2).sum())
        run.optimizer, seen = onepass.LBFGS(params), []
        with pytest.raises(onepass.StepError, match=words):
            run.optimizer.step(lambda: seen.append(0) or run.closure())
        assert len(seen) == calls

    plain = nn.Parameter(torch.ones(2))
    refused(
        [plain, nn.Parameter(torch.ones(2, device="meta"))],
        "must lie on one device.*parameter 1 is on meta",
        0,
    )
    refused([plain, nn.Parameter(torch.ones(1).expand(3))], "parameter 1 is expanded", 1)


def test_parameters_that_grew() -> None:
    run = Run(onepass, *least_squares(torch.float32), {"max_iter": 3, "lr": 0.01}).step()
    run.params[0].data = torch.zeros(9)
    with pytest.raises(
        onepass.StepError, match=r"vectors of 9 numbers, but 'd' has a tensor of shape \(8,\)"
    ):
        run.step()


def freed(n: int) -> Tensor:
    t = torch.zeros(n)
    t.untyped_storage().resize_(0)
    return t


def made_in_inference(n: int) -> Tensor:
    with torch.inference_mode():
        return torch.zeros(n)


NOT_VECTORS: list[Callable[[], Any]] = [
    *(
        lambda: 3,
        lambda: "d",
        lambda: [0.0] * 24,
        lambda: np.zeros(24),
        object,
        lambda: torch.zeros(()),
    ),
    *(
        lambda: torch.zeros(23),
        lambda: torch.zeros(25),
        lambda: torch.zeros(24, 1),
        lambda: torch.zeros(2, 12),
    ),
    *(lambda: torch.zeros(24, dtype=torch.int64), lambda: torch.zeros(24, dtype=torch.complex64)),
    *(
        lambda: torch.zeros(24, device="meta"),
        lambda: torch.zeros(24).to_sparse(),
        lambda: torch.zeros(1).expand(24),
    ),
    *(lambda: freed(24), lambda: made_in_inference(24)),
]
NOT_NUMBERS: list[Any] = [
    "x",
    [],
    {},
    object(),
    torch.zeros(2),
    torch.zeros(()).to("meta"),
    1j,
    True,
    10**400,
]
NOT_LISTS: list[Any] = [3, "x", {}, (), torch.zeros(24), None, object()]


def damages() -> dict[str, Callable[[dict[str, Any]], Any]]:
    """What can be done to a state of 24 numbers between two steps, after which it is not whole."""
    done: dict[str, Callable[[dict[str, Any]], Any]] = {}
    for name in ("d", "prev_flat_grad", "old_dirs", "old_stps", "ro", "t", "H_diag", "prev_loss"):
        done[f"{name} deleted"] = lambda s, n=name: s.pop(n)
        done[f"{name} None"] = lambda s, n=name: s.update({n: None})
    for i, make in enumerate(NOT_VECTORS):
        for name in ("d", "prev_flat_grad"):
            done[f"{name} no vector {i}"] = lambda s, n=name, m=make: s.update({n: m()})
        for name in ("old_dirs", "old_stps"):
            done[f"{name} no vector {i}"] = lambda s, n=name, m=make: s.update(
                {n: [*s[n][:-1], m()]}
            )
    for name in ("old_dirs", "old_stps", "ro"):
        done |= {
            f"{name} no list {i}": lambda s, n=name, v=v: s.update({n: v})
            for i, v in enumerate(NOT_LISTS)
        }
        done[f"{name} shorter"] = lambda s, n=name: s.update({n: s[n][1:]})
        done[f"{name} longer"] = lambda s, n=name: s.update({n: [*s[n], s[n][0]]})
        done[f"{name} empty"] = lambda s, n=name: s.update({n: []})
    for i, bad in enumerate(NOT_NUMBERS):
        done |= {
            f"{n} no number {i}": lambda s, n=n, b=bad: s.update({n: b})
            for n in ("t", "H_diag", "prev_loss")
        }
        done[f"ro no number {i}"] = lambda s, b=bad: s.update(ro=[*s["ro"][:-1], b])
    for i, bad in enumerate([*NOT_NUMBERS[:7], -1, 1.5, math.nan, math.inf, torch.tensor(-1.0)]):
        done |= {
            f"{n} no count {i}": lambda s, n=n, b=bad: s.update({n: b})
            for n in ("func_evals", "n_iter")
        }
    return done


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_a_damaged_state_is_refused_by_the_step(search: str | None) -> None:
    """One sentence, before the closure is called, and all is as it was; undamaged, it steps on."""
    run = Run(
        onepass, *network(torch.float32), {"max_iter": 4, "lr": 0.1, "line_search_fn": search}
    ).step(3)
    state, calls, faults = run.optimizer.state[run.params[0]], [], []
    assert len(state["old_dirs"]) > 1
    whole = dict(state)
    for name, damage in damages().items():
        damage(state)
        before, values = dict(state), [p.detach().clone() for p in run.params]
        try:
            run.optimizer.step(lambda: calls.append(0) or run.closure())
            faults.append(f"{name}: accepted")
        except Exception as error:
            text = str(error)
            if (
                type(error) is not onepass.StepError
                or "\n" in text
                or len(text) > 300
                or "LBFGS" not in text
            ):
                faults.append(f"{name}: {type(error).__name__} {text!r:.150}")
        same = all(torch.equal(p, q) for p, q in zip(run.params, values, strict=True))
        if (
            not same
            or before.keys() != state.keys()
            or any(state[n] is not v for n, v in before.items())
        ):
            faults.append(f"{name}: changed something")
        state.clear()
        state.update(whole)
    assert not faults, "\n".join(faults)
    assert not calls
    for wrong in (3, None, [], "state"):
        run.optimizer.state[run.params[0]] = wrong
        with pytest.raises(
            onepass.StepError, match="LBFGS: the state of parameter 0 must be a dict"
        ):
            run.step()
    run.optimizer.state[run.params[0]] = state
    run.step()


# As a torch optimizer.


def test_hooks_and_schedulers() -> None:
    run = Run(onepass, *network(torch.float32), {"max_iter": 2})
    schedule = torch.optim.lr_scheduler.StepLR(run.optimizer, 1, 0.5)
    calls = []
    run.optimizer.register_step_pre_hook(lambda opt, args, kwargs: calls.append("before"))
    run.optimizer.register_step_post_hook(lambda opt, args, kwargs: calls.append("after"))
    for _ in range(2):
        run.step()
        schedule.step()
    assert calls == ["before", "after"] * 2
    assert run.optimizer.param_groups[0]["lr"] == 0.25
    run.optimizer.zero_grad()
    assert all(p.grad is None for p in run.params)
    with torch.profiler.profile() as profile:
        run.step()
    assert "Optimizer.step#LBFGS.step" in {event.key for event in profile.key_averages()}


def test_a_subclass_may_be_made() -> None:
    class Mine(onepass.LBFGS):
        """With another name, and a step of its own."""

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            return super().step(closure), "mine"

    run = Run(onepass, *network(torch.float32))
    run.optimizer = Mine(run.params, line_search_fn="strong_wolfe")
    loss, note = run.optimizer.step(run.closure)
    assert note == "mine"
    assert loss.item() > run.loss(run.params).item()
    with pytest.raises(ValueError, match="Mine: Invalid learning rate"):
        Mine(run.params, lr=-1)
