"""Averages of weights: torch's own and a float64 reference beside them, and whatever may happen
between two updates."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import os
import pickle
import re
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.optim.swa_utils as theirs
from support.bare_kernels import assert_same_bits, flat
from support.interpreter import interpret
from support.subprocess_cases import fates, run_script
from torch import Tensor, nn

from onepass import kernel, swa_utils
from onepass.kernel.cpu import launch as cpu
from onepass.swa_utils import averages, models

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
FUNCTIONS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "default": lambda m: {},
    "swa": lambda m: {"multi_avg_fn": m.get_swa_multi_avg_fn()},
    "ema": lambda m: {"multi_avg_fn": m.get_ema_multi_avg_fn(0.9)},
    "ema-low": lambda m: {"multi_avg_fn": m.get_ema_multi_avg_fn(0.3)},
    "swa-one": lambda m: {"avg_fn": m.get_swa_avg_fn()},
    "ema-one": lambda m: {"avg_fn": m.get_ema_avg_fn(0.9)},
    "own-one": lambda m: {"avg_fn": lambda a, v, n: 0.5 * (a + v)},
    "own": lambda m: {"multi_avg_fn": lambda a, v, n: torch._foreach_lerp_(a, v, 0.25)},
}


class Odd(nn.Module):
    """Parameters of unusual kinds: no elements, one, complex, transposed, none at all."""

    def __init__(self) -> None:
        super().__init__()
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.scalar = nn.Parameter(torch.randn(()))
        self.complex = nn.Parameter(torch.randn(3, 2, dtype=torch.complex64))
        self.turned = nn.Parameter(torch.randn(4, 3).t())
        self.wide = nn.Parameter(torch.randn(5, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
        self.register_parameter("none", None)
        self.register_buffer("passing", torch.zeros(3), persistent=False)


def make_tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.ReLU())
    model[1].weight = model[0].weight
    model.append(model[0])
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 3),
    "norms": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(5, 5), nn.BatchNorm1d(5)
    ),
    "channels": lambda: nn.Sequential(nn.Conv2d(4, 3, 3), nn.Conv2d(3, 4, 1)).to(
        memory_format=torch.channels_last
    ),
    "tied": make_tied,
    "odd": Odd,
    "half": lambda: nn.Linear(4, 3).bfloat16(),
    "pair": lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)),
}


def change(model: nn.Module, generator: torch.Generator) -> None:
    """New weights and buffers, as training makes them."""
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            if t.is_floating_point() or t.is_complex():
                t.add_(torch.randn(t.shape, generator=generator, dtype=t.dtype))
            else:
                t.add_(3)


def run(
    module: Any, name: str, function: str, updates: int = 20, use_buffers: bool = False
) -> dict[str, Tensor]:
    """The state of an average after some updates, with the model's weights of the same seed each
    time."""
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(2)
    model = MODELS[name]()
    averaged = module.AveragedModel(model, use_buffers=use_buffers, **FUNCTIONS[function](module))
    for _ in range(updates):
        change(model, generator)
        averaged.update_parameters(model)
    return {**averaged.state_dict(), **dict(averaged.named_buffers())}


# What torch has.


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_twenty_updates_equal_torchs(name: str, function: str, use_buffers: bool) -> None:
    if use_buffers and function in ("swa", "own") and name in ("norms", "pair"):
        pytest.skip("torch's function fails on whole numbers, and so does this user's")
    want, got = (run(m, name, function, use_buffers=use_buffers) for m in (theirs, swa_utils))
    assert list(got) == list(want)
    for key, value in want.items():
        assert got[key].stride() == value.stride()
        close = {"rtol": 2e-2, "atol": 1e-2} if value.dtype == torch.bfloat16 else CLOSE
        torch.testing.assert_close(got[key], value, **close)


def test_whole_numbers_in_equal_averages() -> None:
    """torch's `get_swa_multi_avg_fn` raises for them, and its default cuts their fractions off; so
    do we."""
    want, got = (
        run(theirs, "norms", "default", use_buffers=True),
        run(swa_utils, "norms", "swa", use_buffers=True),
    )
    assert {k: v for k, v in got.items() if "tracked" in k} == {
        k: v for k, v in want.items() if "tracked" in k
    }


@pytest.mark.parametrize("name", swa_utils.__all__)
def test_names_and_signatures(name: str) -> None:
    def parameters(module: Any) -> list[tuple[str, Any, Any]]:
        return [
            (q.name, q.kind, q.default)
            for q in inspect.signature(getattr(module, name)).parameters.values()
        ]

    assert set(swa_utils.__all__) == set(theirs.__all__)
    assert parameters(swa_utils) == parameters(theirs)


@pytest.mark.parametrize("back", [False, True])
def test_checkpoints_go_from_torch_to_here_and_back(back: bool) -> None:
    first, second = (swa_utils, theirs) if back else (theirs, swa_utils)
    generator = torch.Generator().manual_seed(0)
    model = MODELS["norms"]()
    averaged = first.AveragedModel(model)
    for _ in range(3):
        change(model, generator)
        averaged.update_parameters(model)
    other = second.AveragedModel(model)
    other.load_state_dict(averaged.state_dict())
    change(model, generator)
    for one in (averaged, other):
        one.update_parameters(model)
    assert other.n_averaged == 4
    for got, want in zip(other.state_dict().values(), averaged.state_dict().values(), strict=True):
        torch.testing.assert_close(got, want, **CLOSE)


def test_it_is_a_module_of_torchs_class() -> None:
    model = nn.Linear(3, 2)
    averaged = swa_utils.AveragedModel(model)
    assert isinstance(averaged, theirs.AveragedModel)
    assert (averaged.avg_fn, averaged.multi_avg_fn, averaged.use_buffers) == (None, None, False)
    assert averaged.n_averaged.dtype == torch.long
    assert averaged.module is not model
    x = torch.randn(4, 3)
    assert torch.equal(averaged(x), model(x))
    with pytest.raises(AssertionError, match="Only one of avg_fn and multi_avg_fn"):
        swa_utils.AveragedModel(
            model, avg_fn=swa_utils.get_swa_avg_fn(), multi_avg_fn=swa_utils.get_swa_multi_avg_fn()
        )


# The mathematics.


@pytest.mark.parametrize("function", ["default", "swa", "swa-one", "ema", "ema-low", "ema-one"])
def test_a_float64_reference(function: str) -> None:
    rng = np.random.default_rng(0)
    history = [rng.standard_normal(37) for _ in range(20)]
    p = nn.Parameter(torch.empty(37))
    model = nn.ParameterList([p])
    averaged = swa_utils.AveragedModel(model, **FUNCTIONS[function](swa_utils))
    for values in history:
        p.data.copy_(torch.from_numpy(values))
        averaged.update_parameters(model)
    decay = {"ema": 0.9, "ema-one": 0.9, "ema-low": 0.3}.get(function)
    if decay is None:
        want = np.mean(history, axis=0)
    else:
        weights = [decay**19, *((1 - decay) * decay**k for k in range(18, -1, -1))]
        want = sum(w * values for w, values in zip(weights, history, strict=True))
    np.testing.assert_allclose(averaged.module[0].detach().numpy(), want, atol=1e-6, rtol=0)


FORMATS = ("float32", "float64", "bfloat16", "float16")
SPECIAL = (0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, 6e-8, 65504.0, 3e38)


@pytest.mark.parametrize("weight", [0.0, 0.001, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("stored", FORMATS)
def test_every_bit_is_the_interpreters(stored: str, format: str, weight: float) -> None:
    """In every pair of formats, on sizes around a vector's; the arithmetic is float32, or float64
    where one is."""
    made = []
    for like in (stored, format):
        ts = [torch.randn(n, dtype=torch.float64) for n in (0, 1, 15, 16, 33, 1000)]
        for t in ts:
            t[: len(SPECIAL)] = torch.tensor(SPECIAL, dtype=torch.float64)[
                torch.randperm(len(SPECIAL))
            ][: len(t)]
        made.append([t.to(getattr(torch, like)) for t in ts])
    own, values = made
    graph = kernel.finish(kernel.trace(averages.average, (("weight", ("float",)),)))
    program = kernel.bind(graph, (("g", format), ("p", stored)))
    function = swa_utils.get_ema_multi_avg_fn(1 - weight)
    hypers = {"weight": function.weight(1)}
    pairs = list(zip(own, values, strict=True))
    want = [interpret(program, {"p": flat(a), "g": flat(v)}, hypers) for a, v in pairs]
    before = [v.clone() for v in values]
    function(own, values, 1)
    for a, v, b, w in zip(own, values, before, want, strict=True):
        assert_same_bits(flat(a), w["p"], f"{format} into {stored}")
        assert_same_bits(flat(v), flat(b), "the value")


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_wide_averages_of_narrow_weights(wide: torch.dtype) -> None:
    """Steps that are lost in bfloat16 are kept in float32; torch's functions refuse such a pair."""
    model = nn.Linear(8, 8).bfloat16()
    averaged = swa_utils.AveragedModel(
        model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.999)
    ).to(wide)
    assert averaged.n_averaged.dtype == torch.long
    averaged.update_parameters(model)
    want = model.weight.detach().to(wide)
    for _ in range(10):
        with torch.no_grad():
            model.weight.add_(1)
        averaged.update_parameters(model)
        want = want + (1 - 0.999) * (model.weight.detach().to(wide) - want)
    assert averaged.module.weight.dtype == wide
    torch.testing.assert_close(averaged.module.weight.detach(), want, **CLOSE)


def test_narrow_averages_of_wide_weights() -> None:
    model = nn.Linear(8, 8)
    averaged = swa_utils.AveragedModel(model).bfloat16()
    averaged.update_parameters(model)
    first = model.weight.detach().bfloat16().float()
    nn.init.ones_(model.weight)
    averaged.update_parameters(model)
    assert torch.equal(averaged.module.weight, ((first + 1) / 2).bfloat16())


def test_nothing_moves_where_nothing_changes() -> None:
    """An average of one constant is that constant, to the bit, and -0.0 stays -0.0."""
    values = [torch.tensor([-0.0, 0.7, -3e38, 1e-45])]
    own = [torch.tensor([-0.0, 0.1, 3.0, 1.0])]
    for number in range(1, 30):
        swa_utils.get_swa_multi_avg_fn()(own, [torch.tensor([0.0, 0.1, 3.0, 1.0])], number)
    assert_same_bits(flat(own[0]), flat(torch.tensor([-0.0, 0.1, 3.0, 1.0])), "the average")
    swa_utils.get_ema_multi_avg_fn(0.0)(own, values, 1)
    assert torch.equal(own[0], values[0])


MUTATIONS: dict[str, Callable[[Any], Any]] = {
    "sign": lambda patch: patch.setattr(
        averages, "average", lambda p, g, *, weight: {"p": p - (g - p) * weight}
    ),
    "other way": lambda patch: patch.setattr(
        averages, "average", lambda p, g, *, weight: {"p": g + (p - g) * weight}
    ),
    "count": lambda patch: patch.setattr(averages.Equal, "weight", lambda self, n: 1 / float(n)),
    "decay": lambda patch: patch.setattr(
        averages.Exponential, "weight", lambda self, n: self.decay
    ),
    "no bump": lambda patch: patch.setattr(
        averages.kernel, "count_as_changed", lambda changed: None
    ),
    "no copy": lambda patch: patch.setattr(models, "_copy", lambda into, sources: None),
    "once": lambda patch: patch.setattr(models, "_once", list),
    "by torch": lambda patch: patch.setattr(averages.Average, "_by_torch", lambda *_: None),
    "unchecked": lambda patch: patch.setattr(averages, "check_pairs", lambda *_: None),
    "overlap": lambda patch: patch.setattr(averages.PairBatch, "overlap", lambda self: False),
    "strides": lambda patch: patch.setattr(
        averages, "_is_served", lambda a, v: a.is_floating_point()
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_average_is_noticed(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        test_twenty_updates_equal_torchs("norms", "ema", True)
        test_twenty_updates_equal_torchs("norms", "default", False)
        test_twenty_updates_equal_torchs("tied", "ema", False)
        test_saved_tensors_are_protected("ema")
        test_errors_of_others_come_before_anything_changes()
        test_values_laid_otherwise()
        test_values_that_are_averages_too()
        test_what_users_do_between_updates("swap_data", "ema")

    check()
    MUTATIONS[mutation](monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception, RuntimeError)):
        check()


# One launch.


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors each launch walks."""
    counted: list[int] = []
    plain = cpu.Launch.run

    def counting(self: cpu.Launch, threads: int) -> None:
        counted.append(len(self.setting_index))
        plain(self, threads)

    monkeypatch.setattr(cpu.Launch, "run", counting)
    return counted


@pytest.mark.parametrize("function", ["default", "swa", "ema", "swa-one", "ema-one"])
def test_a_thousand_tensors_are_one_launch(function: str, launches: list[int]) -> None:
    model = nn.ParameterList([nn.Parameter(torch.randn(16)) for _ in range(1000)])
    averaged = swa_utils.AveragedModel(model, **FUNCTIONS[function](swa_utils))
    averaged.update_parameters(model)
    assert not launches
    averaged.update_parameters(model)
    averaged.update_parameters(model)
    assert launches == [1000, 1000]


def test_the_second_update_prepares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where lists of two dtypes take turns, where torch's class calls, and where numbers
    change."""
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3).double()])
    function = swa_utils.get_ema_multi_avg_fn(0.9)
    both = [module.AveragedModel(model, multi_avg_fn=function) for module in (theirs, swa_utils)]
    for averaged in both:
        averaged.update_parameters(model)
        averaged.update_parameters(model)
    monkeypatch.setattr(averages, "Pairing", None)
    function.decay = 0.5
    nn.init.ones_(model[0].weight)
    for averaged in both:
        averaged.update_parameters(model)
    torch.testing.assert_close(both[0].module[0].weight, both[1].module[0].weight, rtol=0, atol=0)


def test_plans_do_not_pile_up() -> None:
    function = swa_utils.get_swa_multi_avg_fn()
    for n in range(1, 40):
        function([torch.zeros(2)] * n, [torch.ones(2)] * n, 1)
    assert len(function._pairings) <= averages.MOST_PAIRINGS


def test_nothing_is_kept_alive() -> None:
    model = nn.Linear(3, 3)
    averaged = swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    averaged.update_parameters(model)
    gone = [weakref.ref(t) for t in (model.weight, averaged.module.weight)]
    averaged.module.weight = nn.Parameter(torch.zeros(3, 3))
    del model
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_no_bit(threads: int) -> None:
    own, values = ([torch.randn(n) for n in (70001, 5, 32768 * 5)] for _ in range(2))
    want = [
        torch.lerp(a.double(), v.double(), 0.1).float() for a, v in zip(own, values, strict=True)
    ]
    results = []
    for n in (1, threads):
        torch.set_num_threads(n)
        moved = [a.clone() for a in own]
        swa_utils.get_ema_multi_avg_fn(0.9)(moved, values, 1)
        results.append(moved)
    for a, b, w in zip(*results, want, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, w, **CLOSE)


def test_one_function_in_many_threads() -> None:
    """Of the same model's shapes, so that all would have the same pairing."""
    function = swa_utils.get_ema_multi_avg_fn(0.5)
    wrong = []

    def work(seed: float) -> None:
        own, values = (
            [torch.zeros(1000) for _ in range(20)],
            [torch.full((1000,), seed) for _ in range(20)],
        )
        for _ in range(60):
            function(own, values, 1)
        if not all(torch.equal(a, v) for a, v in zip(own, values, strict=True)):
            wrong.append(seed)

    workers = [threading.Thread(target=work, args=(float(seed),)) for seed in range(1, 9)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


# What no kernel serves.


class Subclass(Tensor):
    """A tensor of another class."""


PAIRS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "subclass": lambda: (
        torch.randn(3).as_subclass(Subclass),
        torch.randn(3).as_subclass(Subclass),
    ),
    "subclass value": lambda: (torch.randn(3), torch.randn(3).as_subclass(Subclass)),
    "average with holes": lambda: (torch.randn(3, 8)[:, ::2], torch.randn(3, 4)),
    "value with holes": lambda: (torch.randn(3, 4), torch.randn(3, 8)[:, ::2]),
    "expanded value": lambda: (torch.randn(3, 4), torch.randn(1, 4).expand(3, 4)),
    "transposed value": lambda: (torch.randn(3, 4), torch.randn(4, 3).t()),
    "conjugated value": lambda: (
        torch.randn(3, dtype=torch.complex64),
        torch.randn(3, dtype=torch.complex64).conj(),
    ),
    "negated": lambda: (torch.randn(1), torch.randn(1, dtype=torch.complex64).conj().imag),
    "odd strides": lambda: (torch.randn(1, 5, 1), torch.randn(5).as_strided((1, 5, 1), (7, 1, 3))),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("decay", [0.9, 0.2])
def test_values_of_other_kinds(pair: str, decay: float) -> None:
    """Alone and beside ordinary ones; torch's function is given copies."""
    a, v = PAIRS[pair]()
    plain, plain_value = torch.randn(6), torch.randn(6)
    want = [a.clone(), plain.clone()]
    theirs.get_ema_multi_avg_fn(decay)(want, [v, plain_value], 1)
    swa_utils.get_ema_multi_avg_fn(decay)([plain, a], [plain_value, v], 1)
    torch.testing.assert_close(a.resolve_conj(), want[0].resolve_conj(), **CLOSE)
    torch.testing.assert_close(plain, want[1], **CLOSE)


def test_values_laid_otherwise() -> None:
    test_values_of_other_kinds("transposed value", 0.9)


@pytest.mark.parametrize(
    "of",
    [swa_utils.get_ema_multi_avg_fn(0.5), swa_utils.get_swa_multi_avg_fn()],
    ids=["ema", "swa"],
)
@pytest.mark.filterwarnings("ignore:.*Casting complex values")
def test_dtypes_that_torch_promotes(of: averages.Average) -> None:
    """Beside kernels: 16-bit formats that have none together, whole numbers, complex averages of
    real values."""
    own = [
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, dtype=torch.uint8),
    ]
    of(
        own,
        [
            torch.tensor([4.0, 7.0]),
            torch.tensor([2.0, 4.0]),
            torch.tensor([4, 7], dtype=torch.uint8),
        ],
        1,
    )
    assert [t.tolist() for t in own] == [[2, 3], [1 + 0j, 2 + 0j], [2, 3]]


def test_averages_that_share_memory() -> None:
    """One after the other, as torch takes them."""
    for make in (lambda t: [t, t], lambda t: [t[:6], t[2:]], lambda t: [t[:4], t[4:]]):
        results = []
        for module in (theirs, swa_utils):
            t = torch.arange(8.0)
            own = make(t)
            values = [torch.full(a.shape, 10.0 * (i + 1)) for i, a in enumerate(own)]
            module.get_ema_multi_avg_fn(0.5)(own, values, 1)
            results.append(t)
        assert torch.equal(*results)


def test_values_that_are_averages_too() -> None:
    for make in (
        lambda t: ([t[:4], t[4:]], [t[4:], t[:4]]),
        lambda t: ([t], [t]),
        lambda t: ([t[:4]], [t[:4]]),
    ):
        results = []
        for module in (theirs, swa_utils):
            t = torch.arange(8.0)
            module.get_ema_multi_avg_fn(0.5)(*make(t), 1)
            results.append(t)
        assert torch.equal(*results)
    t = torch.arange(8.0)
    for module in (theirs, swa_utils):
        with pytest.raises(RuntimeError, match="single memory location"):
            module.get_ema_multi_avg_fn(0.5)([t[:6]], [t[2:]], 1)


def test_meta_tensors() -> None:
    with torch.device("meta"):
        model = nn.Linear(3, 2)
    averaged = swa_utils.AveragedModel(model)
    for _ in range(3):
        averaged.update_parameters(model)
    assert averaged.module.weight.is_meta
    assert averaged.n_averaged == 3


def test_what_torch_refuses_is_refused() -> None:
    expanded = torch.zeros(1).expand(3)
    with torch.inference_mode():
        inference = torch.zeros(3)
    for own in (expanded, inference, torch.eye(3).to_sparse()):
        plain = torch.zeros(2)
        for module in (theirs, swa_utils):
            with pytest.raises((RuntimeError, NotImplementedError)):
                module.get_ema_multi_avg_fn(0.5)(
                    [own, plain], [torch.ones(own.shape), torch.ones(2)], 1
                )


def test_values_on_another_device() -> None:
    """They are moved to their averages."""
    own, value = torch.zeros(3, device="meta"), torch.ones(3)
    function = swa_utils.get_ema_multi_avg_fn(0.5)
    plain = torch.zeros(3)
    for _ in range(2):
        function([own, plain], [value, value], 1)
    assert (plain == 0.75).all()


def test_a_model_without_parameters() -> None:
    averaged = swa_utils.AveragedModel(nn.ReLU())
    for _ in range(3):
        averaged.update_parameters(nn.ReLU())
    assert averaged.n_averaged == 3


# Bad input.


def test_errors_of_lists() -> None:
    function = swa_utils.get_ema_multi_avg_fn(0.9)
    own = [torch.zeros(2), torch.zeros(3)]
    freed = torch.ones(3)
    freed.untyped_storage().resize_(0)
    cases: list[tuple[Sequence[Any], type[Exception], str]] = [
        ([torch.ones(2)], RuntimeError, "2 averages cannot follow 1 tensors"),
        (
            [torch.ones(2), torch.ones(1)],
            RuntimeError,
            r"average 1 has shape \(3,\), its present value \(1,\)",
        ),
        (
            [torch.ones(2), None],
            TypeError,
            "average 1: averages and values must be tensors, got NoneType",
        ),
        (
            [torch.ones(2), freed],
            RuntimeError,
            "average 1 or its present value, of shape .* has no storage",
        ),
    ]
    for values, error, message in cases:
        for _ in range(2):
            with pytest.raises(error, match=message):
                function(own, values, 1)
            assert not own[0].any()
            assert own[0]._version == 0
        function(own, [torch.zeros(2), torch.zeros(3)], 1)
        own = [t.clone() for t in own]
    function([], [], 1)
    function((torch.zeros(2),), (torch.ones(2),), torch.tensor(1))


def test_errors_of_others_come_before_anything_changes() -> None:
    """A pair that no kernel serves is checked at every call, too."""
    function = swa_utils.get_ema_multi_avg_fn(0.5)
    own = [torch.zeros(2), torch.zeros(3, dtype=torch.int64)]
    function(own, [torch.ones(2), torch.ones(3, dtype=torch.int64)], 1)
    before = copy.deepcopy(own)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="average 1 has shape"):
            function(own, [torch.ones(2), torch.ones(1, dtype=torch.int64)], 1)
        assert all(map(torch.equal, own, before))


@pytest.mark.parametrize("make", [swa_utils.get_ema_multi_avg_fn, swa_utils.get_ema_avg_fn])
def test_decays(make: Callable[[Any], Any]) -> None:
    for decay in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\]"):
            make(decay)
    with pytest.raises(TypeError, match="decay must be a number"):
        make("0.9")
    for decay in (0, 1, 0.5, torch.tensor(0.5)):
        make(decay)


STRUCTURES: dict[str, tuple[Callable[[], nn.Module], type[Exception], str]] = {
    "shape": (
        lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)),
        RuntimeError,
        "parameter '0.weight' has shape",
    ),
    "more": (
        lambda: nn.Sequential(MODELS["pair"](), nn.Linear(1, 1)),
        ValueError,
        "has 6 parameters, its average 4",
    ),
    "fewer": (
        lambda: nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2)),
        ValueError,
        "has 3 parameters",
    ),
    "buffers": (
        lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)),
        ValueError,
        "has 0 buffers, its average 3",
    ),
    "buffer's shape": (
        lambda: with_buffer(torch.zeros(1)),
        RuntimeError,
        "buffer '1.running_mean' has shape",
    ),
}


def with_buffer(value: Tensor) -> nn.Module:
    model = MODELS["pair"]()
    model[1].running_mean = value
    return model


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("function", ["default", "ema", "ema-one", "own", "own-one"])
@pytest.mark.parametrize("case", STRUCTURES)
def test_a_model_of_another_structure(case: str, function: str, use_buffers: bool) -> None:
    """Is refused at the first update and at later ones, and nothing has changed."""
    make, error, message = STRUCTURES[case]
    averaged = swa_utils.AveragedModel(
        MODELS["pair"](),
        use_buffers=use_buffers,
        **FUNCTIONS[function if function != "own" else "own-one"](swa_utils),
    )
    for _ in range(3):
        before = copy.deepcopy(averaged.state_dict())
        with pytest.raises(error, match=message):
            averaged.update_parameters(make())
        assert all(map(torch.equal, averaged.state_dict().values(), before.values()))
        averaged.update_parameters(MODELS["pair"]())


# Autograd.


@pytest.mark.parametrize("function", ["default", "ema"])
def test_saved_tensors_are_protected(function: str) -> None:
    """An update is seen by autograd, as torch's is."""
    model = nn.Linear(3, 1)
    averaged = swa_utils.AveragedModel(model, **FUNCTIONS[function](swa_utils))
    averaged.update_parameters(model)
    averaged.update_parameters(model)
    versions = [t._version for t in (averaged.module.weight, model.weight)]
    out = averaged(torch.ones(2, 3, requires_grad=True)).sum()
    averaged.update_parameters(model)
    assert [t._version for t in (averaged.module.weight, model.weight)] == [
        versions[0] + 1,
        versions[1],
    ]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()
    model(torch.ones(2, 3)).sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("made", [torch.no_grad, torch.inference_mode])
def test_modes(mode: Any, made: Any) -> None:
    """Made in one mode and updated in another; what was made for inference is written in that mode
    alone."""
    model = MODELS["norms"]()
    with made():
        averaged = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
    refused = made is torch.inference_mode and mode is not torch.inference_mode
    for _ in range(3):
        nn.init.ones_(model[0].weight)
        with mode():
            if refused:
                with pytest.raises(RuntimeError, match=r"[Ii]nference"):
                    averaged.update_parameters(model)
            else:
                averaged.update_parameters(model)
    if not refused:
        assert torch.equal(averaged.module[0].weight, model[0].weight)
        assert averaged.module[0].weight.requires_grad
    assert model[0].weight.grad_fn is None


# Copies.


@pytest.mark.parametrize("function", ["default", "swa", "ema", "swa-one", "ema-one"])
def test_copies_and_pickles_go_on(function: str) -> None:
    model = MODELS["norms"]()
    averaged = swa_utils.AveragedModel(model, **FUNCTIONS[function](swa_utils))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        change(model, generator)
        averaged.update_parameters(model)
    saved = io.BytesIO()
    torch.save(averaged, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    others = [copy.deepcopy(averaged), pickle.loads(pickle.dumps(averaged)), loaded]
    change(model, generator)
    for one in (averaged, *others):
        one.update_parameters(model)
    for one in others:
        assert one.module[0].weight is not averaged.module[0].weight
        for got, want in zip(
            one.state_dict().values(), averaged.state_dict().values(), strict=True
        ):
            assert torch.equal(got, want)


# How a model's tensors are found.


class Renamed(nn.Linear):
    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        yield from (("only", self.bias),)


class Hidden(nn.Sequential):
    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        yield "", self


def found(model: nn.Module) -> None:
    got = models._tensors(model)
    want = list(model.parameters()), list(model.buffers())
    for one, other in zip(got, want, strict=True):
        assert list(map(id, one)) == list(map(id, other))


@pytest.mark.parametrize(
    "name", [*MODELS, "renamed", "hidden", "own function", "shared", "scripted"]
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_tensors_are_those_that_torch_finds(name: str) -> None:
    if name == "renamed":
        model: nn.Module = Renamed(3, 3)
    elif name == "hidden":
        model = nn.Sequential(nn.Linear(2, 2), Hidden(nn.Linear(2, 2)))
    elif name == "own function":
        model = nn.Linear(3, 3)
        model.parameters = lambda recurse=True: iter([model.bias])  # type: ignore[method-assign]
    elif name == "shared":
        block = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        model = nn.Sequential(block, nn.Sequential(block, nn.Linear(2, 2)), block[1])
    elif name == "scripted":
        model = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
        got = models._tensors(model)
        assert [len(tensors) for tensors in got] == [4, 3]
        return
    else:
        model = MODELS[name]()
    found(model)


# What users do between two updates.


def swap_data(averaged: Any, model: nn.Module) -> None:
    for t in (averaged.module[0].weight, model[0].weight):
        t.data = t.data.clone() * 2


def replace_parameters(averaged: Any, model: nn.Module) -> None:
    model[0].weight = nn.Parameter(torch.ones_like(model[0].weight))
    averaged.module[2] = copy.deepcopy(averaged.module[2])


def move_storage(averaged: Any, model: nn.Module) -> None:
    for t in (averaged.module[0].weight, model[0].weight):
        content = t.detach().clone()
        t.untyped_storage().resize_(1 << 16)
        t.data.copy_(content)


def set_memory(averaged: Any, model: nn.Module) -> None:
    for t in (averaged.module[2].weight, model[2].weight):
        with torch.no_grad():
            t.set_(torch.full((5, 5), 0.5))


def swap_tensors(averaged: Any, model: nn.Module) -> None:
    torch.utils.swap_tensors(model[2].weight, nn.Parameter(torch.ones(5, 5)))


def load_states(averaged: Any, model: nn.Module) -> None:
    averaged.load_state_dict({k: v.clone() for k, v in averaged.state_dict().items()}, assign=True)
    model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()}, assign=True)


def lay_otherwise(averaged: Any, model: nn.Module) -> None:
    model[2].weight.data = model[2].weight.data.t().contiguous().t()
    averaged.module[0].to(memory_format=torch.channels_last)


def make_holes(averaged: Any, model: nn.Module) -> None:
    averaged.module[2].weight.data = torch.ones(5, 10)[:, ::2]


def widen(averaged: Any, model: nn.Module) -> None:
    """torch's functions take no pair of two dtypes, so both are widened."""
    averaged.double()
    model.double()


def tie(averaged: Any, model: nn.Module) -> None:
    for one in (averaged.module, model):
        one[3].weight = one[2].bias


def share_with_the_model(averaged: Any, model: nn.Module) -> None:
    averaged.module[2].weight = model[2].weight


def freeze(averaged: Any, model: nn.Module) -> None:
    averaged.requires_grad_(False)
    model[0].requires_grad_(False)


BETWEEN = {
    f.__name__: f
    for f in (
        swap_data,
        replace_parameters,
        move_storage,
        set_memory,
        swap_tensors,
        load_states,
        lay_otherwise,
    )
} | {f.__name__: f for f in (make_holes, widen, tie, share_with_the_model, freeze)}


@pytest.mark.parametrize("operation", BETWEEN)
@pytest.mark.parametrize("function", ["ema", "default"])
def test_what_users_do_between_updates(operation: str, function: str) -> None:
    results = []
    for module in (theirs, swa_utils):
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(2)
        model = MODELS["norms"]()
        averaged = module.AveragedModel(model, **FUNCTIONS[function](module))
        for i in range(6):
            change(model, generator)
            averaged.update_parameters(model)
            if i in (2, 4):
                BETWEEN[operation](averaged, model)
        results.append(averaged.state_dict())
    want, got = results
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, **CLOSE, msg=key)


def crash_freed_average() -> None:
    _refuses(lambda averaged, model: averaged.module[0].weight.untyped_storage().resize_(0))


def crash_freed_value() -> None:
    _refuses(lambda averaged, model: model[0].weight.untyped_storage().resize_(0))


def crash_shrunk_value() -> None:
    _refuses(lambda averaged, model: model[2].weight.untyped_storage().resize_(8))


def crash_freed_buffer() -> None:
    _refuses(lambda averaged, model: model[1].num_batches_tracked.untyped_storage().resize_(0))


def crash_freed_copy() -> None:
    """Of buffers that are copied, not averaged."""
    _refuses(
        lambda averaged, model: model[1].running_mean.untyped_storage().resize_(0),
        use_buffers=False,
    )


def crash_freed_in_a_tied_model() -> None:
    """Where averages share memory and torch's operations take over."""
    averaged = swa_utils.AveragedModel(model := nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    averaged.module[1].weight.data = averaged.module[0].weight.data
    averaged.update_parameters(model)
    averaged.update_parameters(model)
    averaged.module[0].weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="no storage"):
        averaged.update_parameters(model)


def crash_tensors_that_come_and_go() -> None:
    """The addresses of what is gone are used for other things."""
    function = swa_utils.get_ema_multi_avg_fn(0.5)
    for i in range(200):
        n = 1000 + i % 3
        own, values = [torch.zeros(n) for _ in range(20)], [torch.ones(n) for _ in range(20)]
        function(own, values, 1)
        assert all((a == 0.5).all() for a in own)


def crash_in_a_forked_child() -> None:
    """With a pairing that the parent has made."""
    own, values = [torch.zeros(100)], [torch.ones(100)]
    function = swa_utils.get_ema_multi_avg_fn(0.5)
    function(own, values, 1)
    child = os.fork()
    function(own, values, 1)
    if child == 0:
        os._exit(0 if (own[0] == 0.75).all() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (own[0] == 0.75).all()


def _refuses(damage: Callable[[Any, nn.Module], object], use_buffers: bool = True) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64))
    averaged = swa_utils.AveragedModel(model, use_buffers=use_buffers)
    averaged.update_parameters(model)
    averaged.update_parameters(model)
    damage(averaged, model)
    before = averaged.module[0].bias.detach().clone()
    nn.init.ones_(model[0].bias)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no storage"):
            averaged.update_parameters(model)
    assert torch.equal(averaged.module[0].bias, before)
    assert averaged.n_averaged == 2


CRASHES = [name for name in globals() if name.startswith("crash_")]


@pytest.fixture(scope="module")
def ends() -> dict[str, str]:
    return fates(__file__, CRASHES)


@pytest.mark.parametrize("case", CRASHES)
def test_no_memory_that_is_gone_is_touched(case: str, ends: dict[str, str]) -> None:
    assert ends[case] == "ok", ends[case]


# Batch norms.


def batches(kind: str) -> Iterable[Any]:
    generator = torch.Generator().manual_seed(0)
    for n in (8, 8, 3):
        x = torch.randn(n, 4, generator=generator) * 3 + 1
        yield {"tensor": x, "list": [x, torch.zeros(n)], "tuple": (x, torch.zeros(n))}[kind]


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=0.3), nn.Dropout(0.1), nn.BatchNorm1d(4)
    )


@pytest.mark.parametrize("kind", ["tensor", "list", "tuple"])
@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_update_bn_is_torchs(kind: str, device: torch.device | None) -> None:
    states = []
    for module in (theirs, swa_utils):
        model = normed().eval()
        module.update_bn(batches(kind), model, device)
        assert not any(m.training for m in model.modules())
        assert [model[1].momentum, model[3].momentum] == [0.3, 0.1]
        states.append(model.state_dict())
    for want, got in zip(*(s.values() for s in states), strict=True):
        assert torch.equal(got, want)
    x = torch.cat([b[0] if kind != "tensor" else b for b in batches(kind)])
    assert states[1]["1.num_batches_tracked"] == 3
    assert x.shape == (19, 4)


def test_update_bn_leaves_modes_and_momenta_as_they_were() -> None:
    """Also after an error, and where a part of the model is frozen."""
    model = normed()
    model[3].eval()
    swa_utils.update_bn(batches("tensor"), model)
    assert [m.training for m in model] == [True, True, True, False]

    def failing() -> Iterable[Tensor]:
        yield torch.ones(2, 4)
        raise OSError("no more data")

    with pytest.raises(OSError, match="no more data"):
        swa_utils.update_bn(failing(), model)
    assert [m.training for m in model] == [True, True, True, False]
    assert [model[1].momentum, model[3].momentum] == [0.3, 0.1]


def test_update_bn_of_a_model_without_batch_norm_reads_nothing() -> None:
    swa_utils.update_bn(iter(lambda: 1 / 0, None), nn.Linear(2, 2))


SHARDED = """
import os, sys, torch, torch.distributed as dist, onepass.swa_utils, torch.optim.swa_utils
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
results = []
for library in (torch.optim.swa_utils, onepass.swa_utils):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    averaged = library.AveragedModel(model, multi_avg_fn=library.get_ema_multi_avg_fn(0.5))
    for one in (model, averaged.module):
        fully_shard(one, mesh=init_device_mesh("cpu", (1,)))
    for step in range(4):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(step)
        averaged.update_parameters(model)
    assert type(averaged.module[0].weight).__name__ == "DTensor"
    results.append([p.full_tensor() for p in averaged.module.parameters()])
torch.testing.assert_close(*results)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_sharded_models(tmp_path: Path) -> None:
    """DTensors are averaged as torch averages them."""
    run_script(SHARDED, str(tmp_path / "store"))


@pytest.mark.slow
def test_compiled_functions_average_outside_of_their_graphs() -> None:
    model = nn.Linear(3, 2)
    averaged = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
    function = swa_utils.get_ema_multi_avg_fn(0.5)
    own, values = [torch.zeros(4)], [torch.ones(4)]

    @torch.compile(backend="eager")
    def both(x: Tensor) -> Tensor:
        function(own, values, 1)
        return x + 1

    both(torch.ones(2))
    assert (own[0] == 0.5).all()
    for _ in range(2):
        torch.compile(averaged.update_parameters, backend="eager")(model)
    assert averaged.n_averaged == 2


BLOCKS = re.findall(
    r"```python\n(.*?)```",
    (Path(__file__).parent.parent / "docs/averaging.md").read_text(),
    re.DOTALL,
)


@pytest.mark.parametrize("block", BLOCKS, ids=["ema", "swa"])
def test_the_page_runs(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what it trains is better than a constant."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    exec(block, {})
    assert float(capsys.readouterr().out) < 0.2


class Meddler(torch.Tensor):
    """A tensor whose operations take the memory of another one away."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "lerp" in getattr(func, "__name__", ""):
            VICTIMS[0].untyped_storage().resize_(0)
        return super().__torch_function__(func, types, args, kwargs or {})


VICTIMS: list[Tensor] = []


def test_memory_that_goes_while_torchs_part_of_an_update_runs() -> None:
    """The kernel, which comes after it, must not write to where the memory was."""
    averages_of, values = (
        [torch.ones(8), torch.ones(8).as_subclass(Meddler)],
        [torch.zeros(8), torch.zeros(8)],
    )
    VICTIMS[:] = averages_of[:1]
    with pytest.raises(RuntimeError, match="averages changed while they were being updated"):
        swa_utils.get_ema_multi_avg_fn(0.5)(averages_of, values, 1)
