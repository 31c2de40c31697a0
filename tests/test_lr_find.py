"""The range test finds a rate that is known, stops when it should, and leaves nothing behind, to
the bit."""

from __future__ import annotations

import copy
import inspect
import io
import math
import random
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset

import onepass
from onepass import RangeTest, lr_find
from onepass.app import cli
from onepass.app.commands import lr_find as command
from onepass.range_test import search, snapshot

QUICK = {"steps": 12, "lowest": 1e-6, "highest": 1.0}
BOTH = (onepass, torch.optim)
# Few steps on noise: that no rate can be told from them is no matter in most tests.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:lr_find. the loss did not fall"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- what is there, to the bit --------------------------------------------------------------------


def bits(t: Tensor) -> bytes:
    """A tensor's elements as bytes, NaN and -0.0 too."""
    if t.layout == torch.sparse_coo:
        return bits(t._indices()) + bits(t._values())
    return t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def photograph(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All that a later step depends on, by a name that says where it was: values, places,
    identities."""
    seen: dict[str, Any] = {}

    def look(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            at = value.data_ptr() if value.layout == torch.strided else 0
            seen[name] = id(value), at, value.dtype, bits(value)
        elif isinstance(value, dict):
            seen[name] = id(value), [id(k) if isinstance(k, Tensor) else k for k in value]
            for i, (key, entry) in enumerate(value.items()):
                look(f"{name}.{i if isinstance(key, Tensor) else key}", entry)
        elif isinstance(value, (list, tuple)):
            seen[name] = id(value), len(value)
            for i, entry in enumerate(value):
                look(f"{name}.{i}", entry)
        else:
            seen[name] = repr(value)

    for name, module in model.named_modules():
        look(f"{name} parameters", module._parameters)
        look(f"{name} buffers", module._buffers)
        look(f"{name} mode", module.training)
    for i, p in enumerate(
        [*model.parameters(), *(p for group in optimizer.param_groups for p in group["params"])]
    ):
        look(f"gradient of {i}", p.grad)
    look("state", optimizer.state)
    look("groups", optimizer.param_groups)
    look("defaults", optimizer.defaults)
    look("called", getattr(optimizer, "_opt_called", "never"))
    seen["attributes"] = {key: id(value) for key, value in vars(optimizer).items()}
    seen["torch"], seen["python"] = bits(torch.get_rng_state()), random.getstate()
    legacy = np.random.get_state()  # noqa: NPY002
    seen["numpy"] = [part.tobytes() if isinstance(part, np.ndarray) else part for part in legacy]
    return seen


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return sorted(
        key
        for key in before.keys() | after.keys()
        if before.get(key, "none") != after.get(key, "none")
    )


# --- models and optimizers ------------------------------------------------------------------------


class Normed(nn.Module):
    """Batch normalisation, dropout, a buffer that is replaced, one that is expanded, an average, a
    module in eval()."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.fixed = nn.BatchNorm1d(8).eval()
        self.drop = nn.Dropout(0.2)
        self.last = nn.Linear(8, 3)
        self.average = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.register_buffer("seen", torch.tensor(-0.0))
        self.register_buffer("ones", torch.ones(1).expand(6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + len(x)
        y = self.last(self.drop(self.fixed(self.norm(self.first(x * self.ones)).relu())))
        self.average.data.lerp_(y.detach().mean(0), 0.1)
        return y


class Tied(nn.Module):
    """One matrix in two places, a frozen parameter, and one that the loss never reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(6, 6)
        self.outside = nn.Linear(6, 6)
        self.outside.weight = self.inside.weight
        self.scale = nn.Parameter(torch.full((6,), 0.5), requires_grad=False)
        self.idle = nn.Parameter(torch.full((4, 4), math.nan))

    def forward(self, x: Tensor) -> Tensor:
        return self.outside(self.inside(x).tanh() * self.scale)[:, :3]


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 3, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.table((x[:, 0].abs() * 4).long().clamp(max=9))


def make_data(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(16, 6, generator=generator), torch.arange(16) % 3) for _ in range(count)]


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """A loss that draws from every global source of random numbers, as augmentation does."""
    x, y = batch
    noise = np.random.rand() + random.random()  # noqa: NPY002
    return F.cross_entropy(model(x + 1e-3 * noise * torch.randn_like(x)), y)


DENSE: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    "Adam": {"amsgrad": True},
    "AdamW": {"lr": torch.tensor(1e-3)},
    "Adagrad": {},
    "RMSprop": {"centered": True, "momentum": 0.9},
    "Adadelta": {},
    "Adamax": {},
    "NAdam": {},
    "RAdam": {},
    "ASGD": {"t0": 2.0},
    "Rprop": {},
    "Adafactor": {},
    "LBFGS": {"max_iter": 3, "history_size": 2, "line_search_fn": "strong_wolfe"},
}
CASES: list[tuple[str, Callable[..., torch.optim.Optimizer], dict[str, Any], type[nn.Module]]] = [
    *(
        (f"{of.__name__}.{name}", getattr(of, name), options, Normed)
        for of in BOTH
        for name, options in DENSE.items()
    ),
    *(
        (f"{name}-tied", getattr(onepass, name), DENSE[name], Tied)
        for name in ("SGD", "AdamW", "LBFGS")
    ),
    ("Muon-tied", onepass.Muon, {"use_muon": None}, Tied),
    ("onepass-sparse", onepass.SparseAdam, {"lr": 0.01}, Embedded),
    ("torch-sparse", torch.optim.SparseAdam, {"lr": 0.01}, Embedded),
    ("onepass-eager", onepass.AdamW, {"foreach": False, "fused": False}, Normed),
    ("torch-fused", torch.optim.AdamW, {"fused": True}, Normed),
]
EACH = pytest.mark.parametrize(
    ("build", "options", "kind"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)


def start(
    kind: type[nn.Module],
    build: Callable[..., torch.optim.Optimizer],
    options: dict[str, Any],
    steps: int = 0,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and its optimizer, the same each time, after some steps."""
    torch.manual_seed(1)
    model = kind()
    optimizer = build([p for p in model.parameters() if p.requires_grad], **copy.deepcopy(options))
    train(model, optimizer, steps)
    return model, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for x, y in make_data(steps):

        def closure(x: Tensor = x, y: Tensor = y) -> Any:
            optimizer.zero_grad()
            value = F.cross_entropy(model(x), y)
            value.backward()
            return value

        optimizer.step(closure)


# --- nothing is left behind -----------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 3])
@EACH
def test_all_is_as_before(
    build: Callable[..., Any], options: dict[str, Any], kind: type[nn.Module], steps: int
) -> None:
    """On a fresh optimizer, whose state stays empty, and on one that has stepped; and what follows
    is the same."""
    twin, its_optimizer = start(kind, build, options, steps)
    model, optimizer = start(kind, build, options, steps)
    before = photograph(model, optimizer)
    found = lr_find(model, cross_entropy, make_data(), optimizer, **QUICK)
    assert len(found.losses) > 2
    assert changes(before, photograph(model, optimizer)) == []
    for one, of in ((twin, its_optimizer), (model, optimizer)):
        torch.manual_seed(3)
        train(one, of, 4)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert bits(p) == bits(q)


def test_the_state_of_a_fresh_optimizer_stays_empty() -> None:
    model, optimizer = start(Normed, onepass.AdamW, {})
    lr_find(model, cross_entropy, make_data(), optimizer)
    assert optimizer.state == {}
    assert all(p.grad is None for p in model.parameters())


def in_loss(error: BaseException) -> dict[str, Any]:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        if random.random() < 0.3:
            raise error
        return cross_entropy(model, batch)

    return {"loss": loss}


def in_data(error: BaseException) -> dict[str, Any]:
    def data() -> Iterator[Any]:
        yield from make_data(3)
        raise error

    return {"data": data()}


def in_observer(error: BaseException) -> dict[str, Any]:
    def observe(i: int, lr: float, loss: float) -> None:
        if i == 4:
            raise error

    return {"observe": observe}


def in_step(error: BaseException) -> dict[str, Any]:
    def fail(optimizer: Any, *_: Any) -> None:
        if any(state["step"] > 5 for state in optimizer.state.values()):
            raise error

    return {"hook": fail}


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), ValueError("mine"), StopIteration(), GeneratorExit()], ids=repr
)
@pytest.mark.parametrize("place", [in_loss, in_data, in_observer, in_step])
def test_all_is_as_before_when_something_fails(
    place: Callable[..., dict[str, Any]], error: BaseException
) -> None:
    random.seed(2)
    model, optimizer = start(Normed, onepass.Adam, {"amsgrad": True}, 3)
    arguments = {"loss": cross_entropy, "data": make_data(), "hook": None, **QUICK, **place(error)}
    hook = arguments.pop("hook")
    if hook is not None:
        optimizer.register_step_post_hook(hook)
    before = photograph(model, optimizer)
    # What a generator raises as StopIteration arrives as RuntimeError.
    with pytest.raises((type(error), RuntimeError)) as caught:
        lr_find(model, arguments.pop("loss"), arguments.pop("data"), optimizer, **arguments)
    assert caught.value is error or caught.value.__cause__ is error
    assert changes(before, photograph(model, optimizer)) == []


@pytest.mark.parametrize("sampled", [False, True])
def test_the_generators_of_a_loader_are_as_before(sampled: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    x, y = (torch.cat(parts) for parts in zip(*make_data(), strict=True))
    dataset = TensorDataset(x, y)
    random_order = torch.utils.data.RandomSampler(dataset, generator=generator)
    own = {"batch_sampler": torch.utils.data.BatchSampler(random_order, 8, False)}
    loader: DataLoader[Any] = DataLoader(
        dataset, **(own if sampled else {"shuffle": True, "generator": generator})
    )
    before = generator.get_state()
    model, optimizer = start(Normed, onepass.SGD, {}) if sampled else start(Tied, onepass.SGD, {})
    lr_find(model, cross_entropy, loader, optimizer)
    assert torch.equal(generator.get_state(), before)
    assert next(iter(loader))[0].shape[1] == 6


def test_the_generators_of_gpus_are_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    states, put_back = [torch.ones(3)], []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", put_back.append)
    with snapshot.undone_afterwards(*start(Tied, onepass.SGD, {})):
        assert put_back == []
    assert put_back == [states]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    torch.manual_seed(0)
    model = Normed().cuda()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    data = [(x.cuda(), y.cuda()) for x, y in make_data()]
    before, rng = [t.clone() for t in model.state_dict().values()], torch.cuda.get_rng_state()
    lr_find(model, cross_entropy, data, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert torch.equal(rng, torch.cuda.get_rng_state())
    assert not optimizer.state


def test_torch_still_warns_of_a_scheduler_that_steps_too_early() -> None:
    model, optimizer = start(Normed, onepass.SGD, {"lr": 0.1})
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5, 1)
    lr_find(model, cross_entropy, make_data(), optimizer)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


def test_a_scheduler_goes_on_where_it_was() -> None:
    model, optimizer = start(Normed, onepass.SGD, {"lr": 0.1})
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5, 1)
    lr_find(model, cross_entropy, make_data(), optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.05
    train(model, optimizer, 1)
    scheduler.step()  # without a warning
    assert optimizer.param_groups[0]["lr"] == 0.1


# --- a restore that forgets something is noticed --------------------------------------------------

FORGOTTEN = [
    ("self._keep(module._parameters)", "pass"),
    ("self._keep(module._buffers)", "pass"),
    ("self._keep(optimizer.param_groups)", "pass"),
    ("self._keep(optimizer.state)", "pass"),
    ("self._keep_entries(vars(optimizer))", "pass"),
    ("self._keep(p.grad)", "pass"),
    ("p.grad = grad", "pass"),
    ("self._keep_entries(value)", "pass"),
    ("self._keep(entry)", "pass"),
    ("_refill(container, entries)", "pass"),
    ("container.clear()", "pass"),
    ("container.update(entries)", "pass"),
    ("container[:] = entries", "pass"),
    ("tensor.data = memory", "pass"),
    ("tensor = tensor.narrow(dim, 0, min(1, tensor.shape[dim]))", "pass"),
    ("_distinct(tensor).copy_(copy)", "pass"),
    ("_distinct(memory).clone()", "_distinct(memory)"),
    ("module.training = mode", "pass"),
    ("generator.set_state(state)", "pass"),
    ("torch.set_rng_state(self.torch)", "pass"),
    ("np.random.set_state(self.numpy)", "pass"),
    ("random.setstate(self.python)", "pass"),
    ("finally:", "except ZeroDivisionError:"),
]


class Rehearsal:
    """A trial in which everything changes that is to be undone: what each mutant is measured by."""

    def __init__(
        self, build: Callable[..., torch.optim.Optimizer], options: dict[str, Any], steps: int
    ) -> None:
        self.model, self.optimizer = start(Normed, build, options, steps)
        self.model.eval()
        self.optimizer.step = self.optimizer.step  # as schedulers and accelerate do
        self.first = self.model.get_parameter("first.weight")
        self.held = self.first.grad
        self.generator = torch.Generator().manual_seed(0)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        torch.rand(3, generator=self.generator)
        if self.held is not None:
            self.held.add_(1.0)  # as buckets of gradients are written
        self.first.data = self.first.data.clone()
        self.optimizer.note = "changed"  # type: ignore[attr-defined]
        return cross_entropy(model, batch)

    def changes(self) -> list[str]:
        before, state = photograph(self.model, self.optimizer), self.generator.get_state()
        loader: Any = DataLoader(Batches(make_data()), batch_size=None, generator=self.generator)
        lr_find(self.model, self.loss, loader, self.optimizer, **QUICK)
        moved = [] if torch.equal(state, self.generator.get_state()) else ["generator"]
        return changes(before, photograph(self.model, self.optimizer)) + moved


class Batches(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def rehearse() -> list[str]:
    """What is changed after each of three trials, or the error that one ends with."""
    found = []
    for build, name, steps in (
        (onepass.AdamW, "AdamW", 3),
        (torch.optim.LBFGS, "LBFGS", 3),
        (onepass.SGD, "SGD", 0),
    ):
        try:
            found += Rehearsal(build, DENSE[name], steps).changes()
        except Exception as error:
            found.append(repr(error))
    return found


def test_in_the_rehearsal_all_is_undone() -> None:
    assert rehearse() == []


@pytest.mark.parametrize(("line", "instead"), FORGOTTEN, ids=[line for line, _ in FORGOTTEN])
def test_what_is_forgotten_is_noticed(
    line: str, instead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = inspect.getsource(snapshot)
    assert source.count(line) == 1
    mutant: dict[str, Any] = {"__name__": "mutant"}
    exec(source.replace(line, instead), mutant)
    monkeypatch.setattr(search, "undone_afterwards", mutant["undone_afterwards"])
    assert rehearse()


# --- what it measures -----------------------------------------------------------------------------


class Scripted(nn.Module):
    """A model whose loss is a curve written beforehand, one number a call."""

    def __init__(self, curve: Any) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.curve = [float(value) for value in curve]
        self.calls = 0

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls += 1
        return self.curve[self.calls - 1] + 0.0 * self.p.sum()

    def find(self, **arguments: Any) -> RangeTest:
        optimizer = onepass.SGD(self.parameters(), lr=1.0)
        return lr_find(self, self.loss, [None], optimizer, steps=len(self.curve), **arguments)


def logistic(x: np.ndarray, middle: float, width: float = 0.2) -> np.ndarray:
    return 1 / (1 + np.exp((x - middle) / width))


X = np.linspace(-7, 1, 100)  # the logarithms of the rates


@pytest.mark.parametrize("of", BOTH)
@pytest.mark.parametrize("curvature", [0.1, 1.0, 25.0])
def test_the_limit_of_stability_is_found(of: Any, curvature: float) -> None:
    """SGD on c w^2 / 2 multiplies w by 1 - lr c: the loss falls below lr = 2 / c and rises above
    it."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.ones_(model.weight)
    optimizer = of.SGD(model.parameters(), lr=1.0)
    bounds = {"lowest": 1e-4, "highest": 1e3, "steps": 140}
    found = lr_find(
        model,
        lambda m, _: curvature * m.weight.square().sum() / 2,
        [None],
        optimizer,
        **bounds,
        smoothing=0,
    )
    limit = 2 / curvature
    assert found.exploded
    assert limit < found.lrs[-1] < 10 * limit
    for lr, before, after in zip(found.lrs, found.losses, found.losses[1:], strict=False):
        assert (after < before) == (lr < limit), lr
    # All losses as the recurrence has them.
    factors = np.cumprod([1.0, *(1 - np.array(found.lrs[:-1]) * curvature)])
    np.testing.assert_allclose(found.losses, curvature * factors**2 / 2, rtol=1e-9)
    # Well below the limit w decays as exp(-c sum lr). The sum of rates that grow by a factor q is
    # about lr / log q, so the loss goes as exp(-2 c lr / log q), and falls fastest over log lr
    # where this exponent is 1.
    assert found.suggestion == pytest.approx(math.log(1e7) / 139 / (2 * curvature), rel=0.25)


def test_rates_grow_by_the_same_factor() -> None:
    model, optimizer = start(Tied, onepass.SGD, {})
    seen: list[float] = []
    optimizer.register_step_post_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
    found = lr_find(
        model, cross_entropy, make_data(), optimizer, lowest=1e-5, highest=1e-2, steps=31
    )
    np.testing.assert_allclose(seen, np.geomspace(1e-5, 1e-2, 31), rtol=1e-12)
    assert list(found.lrs) == seen
    assert not found.exploded


def test_the_average_is_that_of_the_formula(rng: np.random.Generator) -> None:
    curve = 5 + rng.standard_normal(30) - np.linspace(0, 4, 30)
    found = Scripted(curve).find(smoothing=0.8)
    for i in range(30):
        weights = 0.8 ** np.arange(i, -1, -1.0)
        assert found.smoothed[i] == pytest.approx(
            (weights * curve[: i + 1]).sum() / weights.sum(), rel=1e-12
        )
    assert Scripted(curve).find(smoothing=0.0).smoothed == pytest.approx(curve)


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("middle", [-5.0, -3.0, -1.0])
def test_the_steepest_descent_is_suggested(
    middle: float, noise: float, rng: np.random.Generator
) -> None:
    curve = 1 + 2 * logistic(X, middle) + noise * rng.standard_normal(100)
    unsmoothed, smoothed = (Scripted(curve).find(smoothing=s) for s in (0.0, 0.9))
    assert abs(math.log10(unsmoothed.suggestion) - middle) < (0.1 if not noise else 0.5)
    assert (
        0 <= math.log10(smoothed.suggestion) - middle + (0.3 if noise else 0) < 1.1
    )  # an average lags behind
    assert "falls fastest" in smoothed.note


def test_in_a_narrow_range_the_descent_is_sought_more_closely() -> None:
    for middle in (-2.7, -2.3):
        curve = 1 + logistic(np.linspace(-3, -2, 100), middle, 0.02)
        found = Scripted(curve).find(lowest=1e-3, highest=1e-2, smoothing=0.0)
        assert math.log10(found.suggestion) == pytest.approx(middle, abs=0.02)
        assert found.suggestion == float(
            f"{found.suggestion:.1e}"
        )  # two digits are more than it is worth


@pytest.mark.parametrize(("scale", "shift"), [(1e-3, 0.0), (1e3, 0.0), (1.0, -50.0), (1.0, 1.5)])
def test_the_unit_of_the_loss_is_no_matter(scale: float, shift: float) -> None:
    curve = 1 + 2 * logistic(X, -3.0) + 0.05 * np.sin(7 * X)
    assert Scripted(scale * curve + shift).find().suggestion == Scripted(curve).find().suggestion


def test_the_recovery_from_a_leap_is_no_descent() -> None:
    leap = 3 * np.exp(-(((X + 0.5) / 0.3) ** 2))
    calm = 2 + logistic(X, -4.0)
    for smoothing in (0.0, 0.9):
        assert (
            Scripted(calm + leap).find(smoothing=smoothing).suggestion
            == Scripted(calm).find(smoothing=smoothing).suggestion
        )


def test_a_leap_within_the_decade_of_the_descent_keeps_the_rate_below_it() -> None:
    """A single high loss is the first sign of instability; one elsewhere is not the descent's
    business."""
    calm = 2 + logistic(X, -3.0) + 0.01 * np.sin(40 * X)
    rates = 10.0**X
    found = {}
    for at in (20, 52, 75):
        curve = calm.copy()
        curve[at] += 0.5
        found[at] = Scripted(curve).find(smoothing=0.0)
    assert found[52].suggestion == pytest.approx(rates[52] / 10**0.5, rel=0.05)
    assert f"at {rates[52]:.2g}, the loss leaps" in found[52].note
    for at in (20, 75):
        assert found[at].suggestion == Scripted(calm).find(smoothing=0.0).suggestion
        assert "falls fastest" in found[at].note


@pytest.mark.parametrize(
    "curve", [np.full(100, 2.0), 2 + 10.0 ** (X - 1), "noise"], ids=["flat", "rising", "noise"]
)
def test_where_nothing_falls_a_tenth_of_the_last_rate_is_suggested(
    curve: Any, rng: np.random.Generator
) -> None:
    curve = 2 + 0.3 * rng.standard_normal(100) if isinstance(curve, str) else curve
    with pytest.warns(
        UserWarning, match=r"lr_find: the loss did not fall .*: the highest rate tried was 10;"
    ) as caught:
        found = Scripted(curve).find()
    assert found.suggestion == 1.0
    assert found.note in str(caught[0].message)
    assert caught[0].filename == __file__


def test_noise_is_not_taken_for_learning() -> None:
    """Of a hundred tests without any learning, hardly one finds a rate."""
    generator = np.random.default_rng(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [Scripted(2 + generator.standard_normal(40) * 0.2).find() for _ in range(100)]
    assert sum("falls fastest" in one.note for one in found) <= 5


@pytest.mark.parametrize("last", [math.nan, math.inf, -math.inf, 1e9])
def test_an_explosion_ends_it_before_another_step(last: float) -> None:
    model = Scripted([3.0, 2.9, 2.5, 2.0, last, 1.0, 1.0])
    steps: list[int] = []
    hook = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    try:
        found = model.find(smoothing=0.0, stop=1e6)
    finally:
        hook.remove()
    assert found.exploded
    assert len(found.losses) == len(found.lrs) == len(found.smoothed) == model.calls == 5
    assert len(steps) == 4
    assert math.isfinite(found.suggestion)


@pytest.mark.parametrize(
    ("curve", "stop", "ends"),
    [
        ([4.0, 4.0, 15.9, 16.1, 1.0], 4.0, 4),  # four times a loss that never fell
        ([4.0, 1.0, 9.9, 10.1, 1.0], 4.0, 4),  # three times the fall above the best
        ([4.0, 4.0, 7.9, 8.1, 1.0], 2.0, 4),
        ([-4.0, -4.0, 7.9, 8.1, 1.0], 4.0, 4),  # losses may be negative
        ([4.0, 1.0, 1e30, 1.0, 1.0], math.inf, 5),
    ],
)
def test_when_a_loss_has_exploded(curve: list[float], stop: float, ends: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = Scripted(curve).find(smoothing=0.0, stop=stop)
    assert len(found.losses) == ends
    assert found.exploded == (ends < len(curve))


def test_a_result_is_printed_in_a_line() -> None:
    assert re.fullmatch(
        r"RangeTest\(suggestion=.*, ratios=\(1\.0,\)\)",
        repr(Scripted(1 + logistic(X, -3.0)).find()),
    )


@pytest.mark.parametrize(
    "curve", [[3.0, 2.0, 1.0, math.nan], [3.0, math.inf], [0.0, 0.0], [-1.0, -2.0, 1e30]], ids=str
)
def test_every_result_can_be_drawn(curve: list[float], tmp_path: Path) -> None:
    Scripted(curve).find(smoothing=0.0).plot(str(tmp_path / "a.png"), title="a loss of $ and _")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


# --- optimizers of every kind ---------------------------------------------------------------------


@pytest.mark.parametrize("of", BOTH)
def test_groups_keep_their_ratios(of: Any) -> None:
    model = Tied()
    groups: list[dict[str, Any]] = [
        {"params": [model.inside.weight], "lr": torch.tensor(0.02, dtype=torch.float64)},
        {"params": [model.inside.bias], "lr": 0.1},
        {"params": [model.outside.bias], "lr": 0},
    ]
    optimizer = of.AdamW(groups, foreach=False)
    tensor, seen = groups[0]["lr"], []
    optimizer.register_step_post_hook(
        lambda o, *_: seen.append([float(group["lr"]) for group in o.param_groups])
    )
    bias = model.outside.bias.detach().clone()
    optimizer.register_step_post_hook(
        lambda *_: seen[-1].append(torch.equal(bias, model.outside.bias))
    )
    optimizer.register_step_post_hook(
        lambda o, *_: seen[-1].append(o.param_groups[0]["lr"] is tensor)
    )
    found = lr_find(model, cross_entropy, make_data(), optimizer, highest=1e-2)
    assert found.ratios == pytest.approx((0.2, 1.0, 0.0))
    for lr, rates in zip(found.lrs, seen, strict=True):
        assert rates == pytest.approx([0.2 * lr, lr, 0.0, True, True])
    assert optimizer.param_groups[0]["lr"] is tensor
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.02, 0.1, 0]


def test_the_rates_before_a_warm_up_count() -> None:
    model = Tied()
    groups = [
        {"params": [model.inside.weight], "lr": 0.3},
        {"params": [model.inside.bias], "lr": 0.1},
    ]
    optimizer = onepass.SGD(groups)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    assert [group["lr"] for group in optimizer.param_groups] == [0, 0]
    found = lr_find(model, cross_entropy, make_data(), optimizer, highest=1.0)
    assert found.ratios == pytest.approx((1.0, 1 / 3))
    assert [group["lr"] for group in optimizer.param_groups] == [0, 0]
    assert search._read_ratios(onepass.SGD(model.inside.parameters(), lr=0.0)) == [1.0]


def test_hooks_before_a_step_see_its_gradients() -> None:
    """So that one which clips them works as it does in training."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.ones_(model.weight)
    optimizer = onepass.SGD(model.parameters(), lr=1.0)
    optimizer.register_step_pre_hook(
        lambda *_: nn.utils.clip_grad_norm_(model.parameters(), 0.5) and None
    )
    found = lr_find(
        model,
        lambda m, _: 5 * m.weight.sum(),
        [None],
        optimizer,
        smoothing=0.0,
        highest=1e-3,
        steps=20,
    )
    np.testing.assert_allclose(
        np.diff(found.losses), -5 * 0.5 * np.array(found.lrs[:-1]), rtol=1e-6
    )


@pytest.mark.parametrize("of", BOTH)
def test_lbfgs_evaluates_as_often_as_it_wants(of: Any) -> None:
    model = nn.Linear(3, 1, bias=False)
    optimizer = of.LBFGS(model.parameters(), max_iter=5)
    calls = []

    def loss(m: nn.Module, batch: Tensor) -> Tensor:
        calls.append(1)
        return (m(batch) - 1).square().mean()

    found = lr_find(model, loss, [torch.randn(20, 3)], optimizer, highest=1.0)
    assert not found.exploded
    assert len(found.losses) == 100 < len(calls)
    assert found.losses[-1] < 1.01 * min(found.losses)


def test_modes_in_the_trial() -> None:
    model, optimizer = start(Normed, onepass.SGD, {})
    seen: set[tuple[bool, ...]] = set()

    def loss(m: nn.Module, batch: Any) -> Tensor:
        seen.add((model.training, model.norm.training, model.fixed.training))
        return cross_entropy(m, batch)

    assert isinstance(model, Normed)
    lr_find(model, loss, make_data(), optimizer)
    assert seen == {(True, True, False)}  # what was frozen stays frozen
    model.eval()
    seen.clear()
    lr_find(model, loss, make_data(), optimizer)
    assert seen == {(True, True, True)}
    assert not model.norm.training


def test_gradients_are_computed_where_they_are_switched_off() -> None:
    model, optimizer = start(Tied, onepass.SGD, {})
    with torch.no_grad():
        assert lr_find(model, cross_entropy, make_data(), optimizer).losses[0] > 0
        assert not torch.is_grad_enabled()


def test_all_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer = start(Tied, onepass.SGD, {})
    told: list[tuple[int, float, float]] = []
    found = lr_find(
        model, cross_entropy, make_data(), optimizer, observe=lambda *seen: told.append(seen)
    )
    assert told == list(zip(range(100), found.lrs, found.losses, strict=False))[: len(told)]
    assert len(told) == len(found.losses) - found.exploded
    assert capsys.readouterr().out == ""


# --- data -----------------------------------------------------------------------------------------


class Rows:
    """A data set of the old protocol, without `__iter__`."""

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return make_data()[i]


def counting(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    yield from make_data(count)


@pytest.mark.parametrize(
    "data",
    [make_data(1), make_data(20), tuple(make_data()), Rows(), counting(12), iter(make_data(13))],
    ids=["one", "list", "tuple", "rows", "generator", "iterator"],
)
def test_data_of_every_kind(data: Any) -> None:
    model, optimizer = start(Tied, onepass.SGD, {})
    assert len(lr_find(model, cross_entropy, data, optimizer, **QUICK).losses) == 12


def test_batches_come_in_their_order_and_again() -> None:
    model, optimizer = start(Tied, onepass.SGD, {})
    data, seen = make_data(3), []
    with closing(search._repeat(data, 7)) as batches:
        assert [next(batches) for _ in range(7)] == [data[i % 3] for i in range(7)]
    taken = counting(13)
    lr_find(
        model,
        lambda m, b: seen.append(b) or cross_entropy(m, b),
        taken,
        optimizer,
        steps=12,
        highest=1e-3,
    )
    assert len(seen) == 12
    assert torch.equal(next(taken)[0], make_data(13)[12][0])  # no batch is taken that is not used


# --- bad input ------------------------------------------------------------------------------------


def good() -> dict[str, Any]:
    model, optimizer = start(Tied, onepass.SGD, {"lr": 0.1})
    return {"model": model, "loss": cross_entropy, "data": make_data(), "optimizer": optimizer}


def zero_rate_of_text() -> onepass.SGD:
    optimizer = onepass.SGD(Tied().parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = "0.1"
    return optimizer


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"model": torch.sin}, TypeError, "model must be a torch.nn.Module, got a "),
    ({"optimizer": "adam"}, TypeError, "optimizer must be a torch.optim.Optimizer, got a str"),
    ({"loss": 3}, TypeError, r"loss must be a function of \(model, batch\), got a int"),
    ({"data": 3}, TypeError, "data must give batches when iterated, got a int"),
    (
        {"data": []},
        ValueError,
        "data has no batches; pass a list of batches or a DataLoader with some",
    ),
    ({"data": iter(())}, ValueError, "data has no batches"),
    ({"data": 7}, TypeError, "data must give batches"),
    ({"model": nn.LazyLinear(3)}, ValueError, "parameter 'weight' has no shape yet; run one batch"),
    ({"lowest": 0.0}, ValueError, "must be 0 < lowest < highest, got 0.0 and 10.0"),
    ({"lowest": 20.0}, ValueError, "must be 0 < lowest < highest, got 20.0"),
    ({"highest": math.inf}, ValueError, "must be 0 < lowest < highest"),
    ({"highest": math.nan}, ValueError, "must be 0 < lowest < highest"),
    ({"steps": 1}, ValueError, "steps must be a whole number of at least 2, got 1"),
    ({"steps": 10.0}, ValueError, "steps must be a whole number of at least 2, got 10.0"),
    ({"smoothing": 1.0}, ValueError, r"smoothing must lie in \[0, 1\), got 1.0"),
    ({"smoothing": -0.1}, ValueError, r"smoothing must lie in \[0, 1\), got -0.1"),
    ({"stop": 1.0}, ValueError, "stop must be more than 1, got 1.0"),
    ({"stop": math.nan}, ValueError, "stop must be more than 1, got nan"),
    (
        {"optimizer": zero_rate_of_text()},
        ValueError,
        "lr of param group 0 must be a finite number .* got '0.1'",
    ),
    ({"loss": lambda m, b: 3.0}, TypeError, "must return a tensor of one real number, got 3.0"),
    (
        {"loss": lambda m, b: m(b[0])},
        TypeError,
        r"must return .* got one of shape \(16, 3\), torch.float32",
    ),
    (
        {"loss": lambda m, b: m(b[0]).mean().detach()},
        ValueError,
        "loss does not depend on any parameter",
    ),
    (
        {"loss": lambda m, b: m(b[0]).mean() * math.nan},
        ValueError,
        "loss is nan before the first step",
    ),
]


@pytest.mark.parametrize(("wrong", "error", "words"), BAD, ids=[words for _, _, words in BAD])
def test_bad_input_is_refused_in_a_sentence(
    wrong: dict[str, Any], error: type[Exception], words: str
) -> None:
    arguments = good() | wrong
    watched = good() | {
        key: value for key, value in arguments.items() if key in ("model", "optimizer")
    }
    watchable = isinstance(watched["model"], nn.Module) and not isinstance(
        watched["model"], nn.LazyLinear
    )
    watchable = watchable and isinstance(watched["optimizer"], torch.optim.Optimizer)
    before = photograph(watched["model"], watched["optimizer"]) if watchable else {}
    with pytest.raises(error, match=f"^lr_find: .*{words}") as caught:
        lr_find(**arguments)
    assert "\n" not in str(caught.value)
    assert (
        changes(before, photograph(watched["model"], watched["optimizer"]) if watchable else {})
        == []
    )


def test_an_iterator_that_runs_dry_says_so() -> None:
    arguments = good() | {"data": counting(7)}
    before = photograph(arguments["model"], arguments["optimizer"])
    with pytest.raises(
        ValueError,
        match=r"data gave 7 batches for 100 steps and cannot be begun again, .* or steps=7$",
    ):
        lr_find(**arguments)
    assert changes(before, photograph(arguments["model"], arguments["optimizer"])) == []


# --- the page -------------------------------------------------------------------------------------

PAGE = (Path(__file__).parent.parent / "docs" / "lr-find.md").read_text(encoding="utf-8")


def test_the_page_runs(folder: Path) -> None:
    first, clip = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(first, names)
    assert (folder / "lr-find.png").read_bytes().startswith(b"\x89PNG")
    found, optimizer = names["found"], names["optimizer"]
    assert 1e-4 < found.suggestion < 0.1
    assert optimizer.param_groups[0]["lr"] == found.suggestion
    names["batches"] = [names["batches"][0]]
    exec(clip, names)
    assert (
        lr_find(names["model"], names["loss"], names["batches"], optimizer).losses[0]
        == found.losses[0]
    )


# --- the command ----------------------------------------------------------------------------------


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "lr-find",
        "--optimizer",
        "sgd-momentum",
        "--steps",
        "25",
        "--lowest",
        "1e-5",
        "--batch-size",
        "32",
    ]
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0] == "digits: sgd-momentum, batch size 32, 25 steps"
    found = re.search(
        r"^suggested learning rate: (\S+); the smoothed loss falls fastest around it$", out, re.M
    )
    assert found
    rate = found[1]
    assert 1e-4 < float(rate) < 1
    assert (
        f"train with it: onepass train --task digits --optimizer sgd-momentum --lr {rate} "
        "--batch-size 32" in lines
    )
    assert lines[-1] == "picture: runs/digits/lr-find.png"
    assert (folder / "runs/digits/lr-find.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (folder / "runs/digits").iterdir()) == ["lr-find.png"]
    # The same again, and into another place.
    assert cli.main([*arguments, "--plot", "here.png"]) == 0
    assert capsys.readouterr().out.replace("here.png", "runs/digits/lr-find.png") == out
    assert (folder / "here.png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "digit"], "digit"),
        (["--optimizer", "lbfgs"], "LBFGS needs a closure"),
        (["--lowest", "2", "--highest", "1"], "must be 0 < lowest < highest, got 2.0 and 1.0"),
        (["--steps", "1"], "steps must be a whole number of at least 2"),
        (["--plot", "nowhere/lr.png"], "no folder"),
        (["--batch-size", "0"], "batch_size must be at least 1"),
    ],
)
def test_the_command_refuses_in_a_sentence(
    arguments: list[str], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["lr-find", *arguments]) != 0
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert not (folder / "runs").exists()


def test_the_command_where_no_rate_is_found(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cli.main(["lr-find", "--highest", "2e-7", "--steps", "8"]) == 0
    out, err = capfd.readouterr()
    assert (
        "suggested learning rate: 2e-08; the loss did not fall by more than its noise, so this is "
        "a tenth of" in out
    )
    assert err == ""


def test_in_a_terminal_there_is_a_bar(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(
        command, "Console", lambda **_: Console(file=screen, force_terminal=True, width=100)
    )
    assert cli.main(["lr-find", "--steps", "8", "--batch-size", "16"]) == 0
    for words in ("8/8", "lr 1.00e+01", "loss", "suggested learning rate"):
        assert words in screen.getvalue()


@pytest.mark.slow
def test_digits_are_learned_at_the_rate_that_is_found(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["lr-find", "--optimizer", "adamw"]) == 0
    command = re.search(r"train with it: onepass (.*)", capsys.readouterr().out)
    assert command
    assert cli.main([*command[1].split(), "--epochs", "10"]) == 0
    accuracy = re.search(r"accuracy on held-out examples: (\S+) %", capsys.readouterr().out)
    assert accuracy
    assert float(accuracy[1]) > 97
