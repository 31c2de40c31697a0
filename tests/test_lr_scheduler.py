"""Schedulers under torch's names: torch's own classes run beside ours, whatever happens to the
learning rates."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import io
import math
import pickle
import re
import types
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch.optim import lr_scheduler as torch_schedulers
from torch.optim import swa_utils as torch_swa_utils

import onepass
from onepass import lr_scheduler, schedule, swa_utils
from onepass.lr_scheduler import closed, frame

OURS = SimpleNamespace(
    **{name: getattr(lr_scheduler, name) for name in lr_scheduler.__all__}, SWALR=swa_utils.SWALR
)
TORCHS = SimpleNamespace(**{**vars(OURS), **vars(torch_schedulers), "SWALR": torch_swa_utils.SWALR})
Spec = tuple[str, dict[str, Any]]
MOMENTUM = ("CyclicLR", "OneCycleLR")


# One run: an optimizer, its schedulers, and what happens between steps.


@dataclass(frozen=True)
class Case:
    """What a training does to learning rates: its schedulers, and changes by hand."""

    specs: Sequence[Spec]
    steps: int = 12
    optimizer: str = "SGD"
    groups: int = 2
    tensor: torch.dtype | None = None
    hands: dict[int, tuple[str, float]] = field(default_factory=dict)
    cut: int = 5
    order: str = "optimizer last"


def make_optimizer(library: Any, case: Case) -> torch.optim.Optimizer:
    lrs = [0.1 * (index + 1) for index in range(case.groups)]
    tensors = [lr if case.tensor is None else torch.tensor(lr, dtype=case.tensor) for lr in lrs]
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": lr} for lr in tensors]
    return getattr(library, case.optimizer)(
        groups, lr=0.1, **({"momentum": 0.9} if case.optimizer == "SGD" else {})
    )


def build(library: Any, opt: torch.optim.Optimizer, spec: Spec) -> Any:
    name, options = spec
    if "schedulers" not in options:
        return getattr(library, name)(opt, **options)
    members = [build(library, opt, member) for member in options["schedulers"]]
    if name == "ChainedScheduler":
        return library.ChainedScheduler(members)
    return library.SequentialLR(opt, members, options["milestones"])


def through_a_file(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


class Side:
    """One training: an optimizer of one library, with schedulers of one."""

    def __init__(self, case: Case, library: Any = OURS, optimizers: Any = torch.optim) -> None:
        self.case, self.library, self.optimizers, self.t = case, library, optimizers, 0
        self.opt = make_optimizer(optimizers, case)
        self.schedulers = [build(library, self.opt, spec) for spec in case.specs]

    def step(self) -> None:
        self.opt.step()
        kind, number = self.case.hands.get(self.t, ("", 0.0))
        for group in self.opt.param_groups if kind else ():
            value = float(group["lr"]) * number if kind == "scale" else number
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(value)
            else:
                group["lr"] = value
        for scheduler in self.schedulers:
            if isinstance(scheduler, torch_schedulers.ReduceLROnPlateau):
                scheduler.step(math.sin(self.t * self.t))
            else:
                scheduler.step()
        self.t += 1

    def run(self, steps: int) -> list[list[float]]:
        rows = [self.options()]
        for _ in range(steps):
            self.step()
            rows.append(self.options())
        return rows

    def options(self) -> list[float]:
        """What schedulers may write: each group's lr and momentum."""
        momenta = [
            group["betas"][0] if "betas" in group else group["momentum"]
            for group in self.opt.param_groups
        ]
        return [
            float(torch.as_tensor(value, dtype=torch.float64).detach())
            for value in (*lr_of(self.opt), *momenta)
        ]

    def state(self) -> dict[str, Any]:
        """A checkpoint, as a file gives it back."""
        return through_a_file(
            {
                "optimizer": self.opt.state_dict(),
                "schedulers": [s.state_dict() for s in self.schedulers],
                "t": self.t,
            }
        )

    def resumed(self, library: Any = None, order: str | None = None) -> Side:
        """Another process goes on from this one's checkpoint."""
        state, order = self.state(), order or self.case.order
        side = object.__new__(Side)
        side.case, side.library, side.optimizers = (
            self.case,
            library or self.library,
            self.optimizers,
        )
        side.opt, side.t = make_optimizer(self.optimizers, self.case), state["t"]
        if order == "optimizer first":
            side.opt.load_state_dict(state["optimizer"])
        side.schedulers = [build(side.library, side.opt, spec) for spec in self.case.specs]
        if order == "optimizer then scheduler":
            side.opt.load_state_dict(state["optimizer"])
        for scheduler, saved in zip(side.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        if order == "optimizer last":
            side.opt.load_state_dict(state["optimizer"])
        return side


def lr_of(opt: torch.optim.Optimizer) -> list[Any]:
    return [group["lr"] for group in opt.param_groups]


def assert_close(
    ours: list[list[float]], theirs: list[list[float]], case: Any, rtol: float = 1e-9
) -> None:
    """Each number to its relative precision; what torch leaves of a zero is noise beside the
    largest."""
    noise = 1e-3 * rtol * max(abs(number) for row in theirs for number in row)
    assert len(ours) == len(theirs)
    for t, (mine, its) in enumerate(zip(ours, theirs, strict=True)):
        assert mine == pytest.approx(its, rel=rtol, abs=noise), f"step {t} of {case}"


# Random configurations.

FACTOR = st.sampled_from([0.1, 0.25, 1 / 3, 0.5, 0.75, 0.9, 1.0])
COUNT = st.integers(1, 8)
LR = st.sampled_from([0.01, 0.03, 0.1, 0.3])
EITHER = st.one_of(LR, st.lists(LR, min_size=2, max_size=2))


def options(name: str, **strategies: Any) -> st.SearchStrategy[Spec]:
    return st.tuples(st.just(name), st.fixed_dictionaries(strategies))


def decay(t: int) -> float:
    return 1 / (1 + t)


def waves(t: int) -> float:
    return 0.9 + 0.05 * (t % 3)


MULTIPLYING = {
    "StepLR": options("StepLR", step_size=COUNT, gamma=FACTOR),
    "MultiStepLR": options(
        "MultiStepLR", milestones=st.lists(COUNT, max_size=4).map(sorted), gamma=FACTOR
    ),
    "ConstantLR": options("ConstantLR", factor=FACTOR, total_iters=COUNT),
    "LinearLR": options(
        "LinearLR", start_factor=FACTOR, end_factor=FACTOR | st.just(0.0), total_iters=COUNT
    ),
    "ExponentialLR": options("ExponentialLR", gamma=FACTOR),
    "PolynomialLR": options(
        "PolynomialLR", total_iters=COUNT, power=st.sampled_from([0.5, 1.0, 2.0])
    ),
    "CosineAnnealingLR": options(
        "CosineAnnealingLR", T_max=COUNT, eta_min=st.sampled_from([0.0, 0.004])
    ),
    "MultiplicativeLR": options(
        "MultiplicativeLR", lr_lambda=st.sampled_from([decay, waves]) | st.just([decay, waves])
    ),
}
ALONE = MULTIPLYING | {
    "LambdaLR": options(
        "LambdaLR", lr_lambda=st.sampled_from([decay, waves]) | st.just([decay, waves])
    ),
    "CosineAnnealingWarmRestarts": options(
        "CosineAnnealingWarmRestarts",
        T_0=COUNT,
        T_mult=st.integers(1, 3),
        eta_min=st.sampled_from([0.0, 0.004]),
    ),
    "SWALR": options(
        "SWALR",
        swa_lr=EITHER,
        anneal_epochs=st.integers(0, 8),
        anneal_strategy=st.sampled_from(["cos", "linear"]),
    ),
    "CyclicLR": options(
        "CyclicLR",
        base_lr=EITHER,
        max_lr=EITHER,
        step_size_up=COUNT,
        step_size_down=st.none() | st.integers(0, 8),
        mode=st.sampled_from(["triangular", "triangular2", "exp_range"]),
        gamma=FACTOR,
        scale_fn=st.sampled_from([None, None, decay]),
        scale_mode=st.sampled_from(["cycle", "iterations"]),
        cycle_momentum=st.booleans(),
    ),
    "OneCycleLR": options(
        "OneCycleLR",
        max_lr=EITHER,
        total_steps=st.integers(30, 40),
        pct_start=st.sampled_from([0.15, 0.3, 0.45]),
        anneal_strategy=st.sampled_from(["cos", "linear"]),
        three_phase=st.booleans(),
        cycle_momentum=st.booleans(),
        base_momentum=st.sampled_from([0.8, [0.7, 0.75]]),
    ),
}
PLATEAU = options(
    "ReduceLROnPlateau",
    mode=st.sampled_from(["min", "max"]),
    factor=st.sampled_from([0.1, 0.5]),
    patience=st.integers(0, 3),
    threshold=st.sampled_from([1e-4, 0.3]),
    threshold_mode=st.sampled_from(["rel", "abs"]),
    cooldown=st.integers(0, 3),
    min_lr=st.sampled_from([0, 0.01, [0.01, 0.02]]),
)
multiplying, alone = st.one_of(*MULTIPLYING.values()), st.one_of(*ALONE.values())


@st.composite
def chained(draw: Any) -> Spec:
    return "ChainedScheduler", {"schedulers": draw(st.lists(multiplying, min_size=1, max_size=3))}


@st.composite
def sequential(draw: Any) -> Spec:
    members = draw(st.lists(alone, min_size=1, max_size=3))
    count = len(members) - 1
    milestones = draw(
        st.lists(st.integers(1, 12), min_size=count, max_size=count, unique=True).map(sorted)
    )
    return "SequentialLR", {"schedulers": members, "milestones": milestones}


several = st.lists(multiplying | PLATEAU, min_size=2, max_size=3)
mixed = st.tuples(alone, multiplying).map(list)
single = st.one_of(alone, PLATEAU, chained(), sequential()).map(lambda spec: [spec])
cases = st.builds(
    Case,
    specs=st.one_of(single, single, several, mixed),
    steps=st.integers(6, 20),
    optimizer=st.sampled_from(["SGD", "AdamW"]),
    tensor=st.sampled_from([None, torch.float64]),
    hands=st.dictionaries(
        st.integers(0, 12),
        st.tuples(st.just("scale"), st.sampled_from([0.5, 2.0, 3.0]))
        | st.tuples(st.just("set"), LR),
        max_size=2,
    ),
    cut=st.integers(0, 15),
    order=st.sampled_from(["optimizer first", "optimizer then scheduler", "optimizer last"]),
)


def check(case: Case, ours: Any) -> None:
    """Ours is torch's run, and a resumed run is the same run."""
    theirs = Side(case, TORCHS).run(case.steps)
    whole = Side(case, OURS, ours).run(case.steps)
    assert_close(whole, theirs, case)
    cut = min(case.cut, case.steps)
    first = Side(case, OURS, ours)
    head = first.run(cut)
    tail = first.resumed().run(case.steps - cut)
    assert head[:-1] + tail == whole, case


LIBRARIES = st.sampled_from([torch.optim, onepass])
KWARGS = {"suppress_health_check": list(HealthCheck), "deadline": None}


@settings(max_examples=200, **KWARGS)
@given(cases, LIBRARIES)
def test_equals_torch_and_resumes(case: Case, ours: Any) -> None:
    check(case, ours)


@pytest.mark.slow
@settings(max_examples=10_000, **KWARGS)
@given(cases, LIBRARIES)
def test_equals_torch_and_resumes_at_length(case: Case, ours: Any) -> None:
    """Ten thousand examples, in about a minute."""
    check(case, ours)


# Every class once: checkpoints that cross over, runs re-made at a step, copies.

TABLE: dict[str, Spec] = {
    "StepLR": ("StepLR", {"step_size": 3, "gamma": 0.5}),
    "MultiStepLR": ("MultiStepLR", {"milestones": [2, 5, 5, 9], "gamma": 0.3}),
    "ConstantLR": ("ConstantLR", {"factor": 0.25, "total_iters": 4}),
    "LinearLR": ("LinearLR", {"start_factor": 0.2, "end_factor": 0.7, "total_iters": 6}),
    "LinearLR down": ("LinearLR", {"start_factor": 1.0, "end_factor": 0.0, "total_iters": 6}),
    "ExponentialLR": ("ExponentialLR", {"gamma": 0.9}),
    "PolynomialLR": ("PolynomialLR", {"total_iters": 7, "power": 2.0}),
    "CosineAnnealingLR": ("CosineAnnealingLR", {"T_max": 5}),
    "CosineAnnealingLR floor": ("CosineAnnealingLR", {"T_max": 5, "eta_min": 0.01}),
    "MultiplicativeLR": ("MultiplicativeLR", {"lr_lambda": waves}),
    "LambdaLR": ("LambdaLR", {"lr_lambda": [decay, waves]}),
    "CosineAnnealingWarmRestarts": (
        "CosineAnnealingWarmRestarts",
        {"T_0": 3, "T_mult": 2, "eta_min": 0.003},
    ),
    "SWALR": ("SWALR", {"swa_lr": [0.05, 0.2], "anneal_epochs": 6}),
    "SWALR at once": ("SWALR", {"swa_lr": 0.05, "anneal_epochs": 0, "anneal_strategy": "linear"}),
    "CyclicLR": (
        "CyclicLR",
        {"base_lr": 0.01, "max_lr": 0.2, "step_size_up": 3, "mode": "triangular2"},
    ),
    "CyclicLR lr alone": (
        "CyclicLR",
        {"base_lr": 0.01, "max_lr": 0.2, "step_size_up": 3, "cycle_momentum": False},
    ),
    "OneCycleLR": ("OneCycleLR", {"max_lr": 0.3, "total_steps": 20}),
    "OneCycleLR three": (
        "OneCycleLR",
        {"max_lr": [0.3, 0.1], "total_steps": 20, "three_phase": True},
    ),
    "ReduceLROnPlateau": ("ReduceLROnPlateau", {"patience": 1, "factor": 0.5, "cooldown": 1}),
    "ChainedScheduler": (
        "ChainedScheduler",
        {
            "schedulers": [
                ("LinearLR", {"start_factor": 0.2, "total_iters": 4}),
                ("ExponentialLR", {"gamma": 0.9}),
            ]
        },
    ),
    "SequentialLR": (
        "SequentialLR",
        {
            "schedulers": [
                ("LinearLR", {"start_factor": 0.2}),
                ("CosineAnnealingLR", {"T_max": 9}),
            ],
            "milestones": [4],
        },
    ),
}
EACH = pytest.mark.parametrize("name", TABLE)
TENSORS = pytest.mark.parametrize("tensor", [None, torch.float64], ids=["float", "tensor"])
REMADE = [
    name for name in TABLE if name not in ("ReduceLROnPlateau", "ChainedScheduler", "SequentialLR")
]
HANDS = {2: ("scale", 0.5), 7: ("set", 0.07)}


def case_of(*names: str, **options: Any) -> Case:
    return Case([TABLE[name] for name in names], **options)


def test_every_class_is_in_the_table() -> None:
    assert {spec[0] for spec in TABLE.values()} == {*torch_schedulers.__all__, "SWALR"} - {
        "LRScheduler"
    }


@EACH
@TENSORS
@pytest.mark.parametrize("hands", [{}, HANDS], ids=["", "changed by hand"])
@pytest.mark.parametrize("order", ["optimizer first", "optimizer then scheduler", "optimizer last"])
def test_goes_on_from_torchs_checkpoint(name: str, tensor: Any, hands: Any, order: str) -> None:
    case = case_of(name, tensor=tensor, hands=hands)
    whole = Side(case, TORCHS).run(12)
    for cut in (0, 1, 4, 6, 8):
        first = Side(case, TORCHS)
        first.run(cut)
        assert_close(first.resumed(OURS, order).run(12 - cut), whole[cut:], (case, cut))


@EACH
@TENSORS
def test_torch_goes_on_from_our_checkpoint_and_we_from_that(name: str, tensor: Any) -> None:
    case = case_of(name, tensor=tensor, hands=HANDS, order="optimizer last")
    whole = Side(case, TORCHS).run(12)
    for cut in (0, 1, 4, 8):
        first = Side(case, OURS)
        first.run(cut)
        second = first.resumed(TORCHS)
        assert_close(second.run(2), whole[cut : cut + 3], (case, cut))
        for order in ("optimizer first", "optimizer then scheduler", "optimizer last"):
            assert_close(
                second.resumed(OURS, order).run(10 - cut), whole[cut + 2 :], (case, cut, order)
            )


CHAINS = [("StepLR", "CosineAnnealingLR"), ("CosineAnnealingLR floor", "ConstantLR", "StepLR")]
CHAINS += [
    ("LambdaLR", "StepLR"),
    ("OneCycleLR", "PolynomialLR"),
    ("LinearLR", "ReduceLROnPlateau"),
    ("SWALR", "StepLR"),
]


@pytest.mark.parametrize("names", CHAINS)
@TENSORS
def test_chains_go_on_from_torchs_checkpoint(names: Sequence[str], tensor: Any) -> None:
    case = case_of(*names, tensor=tensor)
    whole = Side(case, TORCHS).run(12)
    for cut in range(9):
        first = Side(case, TORCHS)
        first.run(cut)
        for order in ("optimizer then scheduler", "optimizer last"):
            assert_close(first.resumed(OURS, order).run(12 - cut), whole[cut:], (names, cut, order))


@pytest.mark.parametrize("name", REMADE)
@TENSORS
def test_is_made_anew_at_a_step(name: str, tensor: Any) -> None:
    """With last_epoch, at any step, after the optimizer's checkpoint: as if nothing had
    happened."""
    case = case_of(name, tensor=tensor)
    whole = Side(case, OURS).run(14)
    for step in range(1, 14):
        first = Side(case, OURS)
        first.run(step)
        opt = make_optimizer(torch.optim, case)
        opt.load_state_dict(first.opt.state_dict())
        kind, options = TABLE[name]
        again = Side(case, OURS)
        again.opt, again.schedulers = (
            opt,
            [getattr(OURS, kind)(opt, **options, last_epoch=step - 1)],
        )
        assert again.schedulers[0].last_epoch == step
        assert_close(again.run(14 - step), whole[step:], (name, step), rtol=1e-12)


@pytest.mark.parametrize(
    "names", [("StepLR", "LinearLR"), ("PolynomialLR", "MultiplicativeLR", "ExponentialLR")]
)
@TENSORS
def test_chains_are_made_anew_at_a_step(names: Sequence[str], tensor: Any) -> None:
    case = case_of(*names, tensor=tensor)
    whole = Side(case, TORCHS).run(12)
    for step in range(1, 12):
        first = Side(case, OURS)
        first.run(step)
        again = Side(case, OURS)
        again.opt = make_optimizer(torch.optim, case)
        again.opt.load_state_dict(first.opt.state_dict())
        again.schedulers = [
            getattr(OURS, kind)(again.opt, **options, last_epoch=step - 1)
            for kind, options in case.specs
        ]
        assert_close(again.run(12 - step), whole[step:], (names, step))


def test_what_earlier_versions_of_torch_saved() -> None:
    """SWALR's function was in its state dict in torch 2.9."""
    side = Side(case_of("SWALR"))
    side.run(3)
    state = side.schedulers[0].state_dict()
    again = Side(case_of("SWALR"))
    again.schedulers[0].load_state_dict(state | {"anneal_func": len, "verbose": False})
    assert again.schedulers[0].last_epoch == 3
    assert (
        not hasattr(again.schedulers[0], "anneal_func")
        or again.schedulers[0].anneal_func is not len
    )
    assert "anneal_func" not in again.schedulers[0].state_dict()


def test_goes_on_from_torchs_checkpoint_of_a_run_that_has_grown() -> None:
    """torch's schedulers have no initial value of groups that came later, and scale their rates all
    the same."""

    def make(library: Any, groups: int) -> tuple[torch.optim.Optimizer, Any]:
        opt = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        if groups == 2:
            opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.7})
        return opt, library.ExponentialLR(opt, 0.5)

    opt, scheduler = make(TORCHS, 1)
    opt.step()
    scheduler.step()
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.7})
    scheduler.step()
    resumed, again = make(OURS, 2)
    resumed.load_state_dict(opt.state_dict())
    again.load_state_dict(scheduler.state_dict())
    for _ in range(3):
        for o, s in ((opt, scheduler), (resumed, again)):
            o.step()
            s.step()
        assert [g["lr"] for g in resumed.param_groups] == pytest.approx(
            [g["lr"] for g in opt.param_groups]
        )


def test_a_builtin_function_is_not_saved() -> None:
    opt = make_optimizer(torch.optim, case_of())
    scheduler = OURS.LambdaLR(opt, math.sqrt)
    state = scheduler.state_dict()
    assert state["lr_lambdas"] == [None] * len(opt.param_groups)
    scheduler.load_state_dict(state)


def test_a_group_that_cannot_be_taken_in_stays_as_it_is() -> None:
    opt = make_optimizer(torch.optim, case_of())
    scheduler = OURS.OneCycleLR(opt, [0.1, 0.2], total_steps=9)
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    before = dict(opt.param_groups[-1])
    opt.step()
    with pytest.raises(ValueError, match="differs from group to group"):
        scheduler.step()
    assert opt.param_groups[-1] == before
    assert scheduler.last_epoch == 0


def test_one_made_anew_twice_is_one() -> None:
    """A cell of a notebook that runs again, while the first scheduler is still alive."""
    opt = make_optimizer(torch.optim, case_of())
    for group in opt.param_groups:
        group["initial_lr"] = group["lr"]
    first = OURS.CosineAnnealingLR(opt, 10, last_epoch=3)
    want = [group["lr"] for group in opt.param_groups]
    second = OURS.CosineAnnealingLR(opt, 10, last_epoch=3)
    assert [group["lr"] for group in opt.param_groups] == want
    OURS.ExponentialLR(opt, 0.5, last_epoch=3)
    assert [group["lr"] for group in opt.param_groups] == pytest.approx(
        [lr * 0.5**4 for lr in want]
    )
    assert first.last_epoch == second.last_epoch == 4


@EACH
def test_copies_are_runs_of_their_own(name: str) -> None:
    side = Side(case_of(name))
    side.run(4)
    state, pair = side.state(), (side.opt, side.schedulers)
    for opt, schedulers in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        again = side.resumed()
        again.opt, again.schedulers = opt, schedulers
        assert schedulers[0].optimizer is opt
        rows = again.run(6)
        assert str(side.state()) == str(state)
        assert rows == side.resumed().run(6)


@EACH
def test_is_torchs_class_with_torchs_signature(name: str) -> None:
    kind = TABLE[name][0]
    ours, theirs = getattr(OURS, kind), getattr(TORCHS, kind)
    assert ours is not theirs
    assert issubclass(ours, theirs)
    assert issubclass(ours, torch_schedulers.LRScheduler)

    def shape(cls: Any) -> list[Any]:
        return [(p.name, p.kind, p.default) for p in inspect.signature(cls).parameters.values()]

    assert shape(ours) == shape(theirs)
    methods = [
        name
        for name in ("step", "get_lr", "get_last_lr", "state_dict", "load_state_dict")
        if hasattr(ours, name)
    ]
    for method in methods:
        assert shape(getattr(ours, method)) == shape(getattr(theirs, method)), method


# Schedulers of schedulers, and both libraries in one.


def flat(*members: str, milestones: list[int]) -> Case:
    return Case(
        [
            (
                "SequentialLR",
                {"schedulers": [TABLE[name] for name in members], "milestones": milestones},
            )
        ]
    )


@pytest.mark.parametrize(
    "tail", ["StepLR", "CosineAnnealingLR floor", "LambdaLR", "CosineAnnealingWarmRestarts"]
)
def test_nested_sequences_are_flat_sequences(tail: str) -> None:
    names = ("LinearLR", "ExponentialLR", tail)
    whole = Side(flat(*names, milestones=[3, 7]), TORCHS).run(12)
    a, b, c = (TABLE[name] for name in names)
    left = (
        "SequentialLR",
        {
            "schedulers": [("SequentialLR", {"schedulers": [a, b], "milestones": [3]}), c],
            "milestones": [7],
        },
    )
    right = (
        "SequentialLR",
        {
            "schedulers": [a, ("SequentialLR", {"schedulers": [b, c], "milestones": [4]})],
            "milestones": [3],
        },
    )
    for spec in (
        left,
        right,
        ("SequentialLR", {"schedulers": [left], "milestones": []}),
        ("ChainedScheduler", {"schedulers": [left]}),
    ):
        side = Side(Case([spec]))
        assert_close(side.run(5), whole[:6], spec)
        for order in ("optimizer first", "optimizer then scheduler", "optimizer last"):
            assert_close(side.resumed(order=order).run(7), whole[5:], spec)


def test_chains_inside_sequences() -> None:
    chain, first = TABLE["ChainedScheduler"], TABLE["StepLR"]
    alone = Side(Case([chain]), TORCHS).run(8)
    before = Side(Case([("SequentialLR", {"schedulers": [chain, first], "milestones": [8]})])).run(
        7
    )
    assert_close(before, alone[:8], chain)
    after = Side(Case([("SequentialLR", {"schedulers": [first, chain], "milestones": [4]})])).run(
        12
    )
    assert_close(after[4:], alone, chain)


@pytest.mark.parametrize("outer", ["SequentialLR", "ChainedScheduler"])
@pytest.mark.parametrize(
    "which", [(OURS, TORCHS), (TORCHS, OURS)], ids=["ours holds torch's", "torch's holds ours"]
)
def test_each_library_holds_the_others(outer: str, which: tuple[Any, Any]) -> None:
    case = case_of(outer)
    whole = Side(case, TORCHS).run(10)
    side = Side(case)
    side.opt = make_optimizer(torch.optim, case)
    holder, held = which
    kind, options = TABLE[outer]
    members = [build(held, side.opt, spec) for spec in options["schedulers"]]
    more = [options["milestones"]] if "milestones" in options else []
    arguments = (side.opt, members, *more) if more else (members,)
    side.schedulers = [getattr(holder, kind)(*arguments)]
    assert_close(side.run(10), whole, case)


def test_a_sequence_begins_with_the_member_whose_milestone_is_zero() -> None:
    """pytorch#185872: torch 2.12 and before let the first member have the first step."""
    case = flat("LinearLR", "ExponentialLR", "StepLR", milestones=[0, 4])
    assert_close(
        Side(case).run(10),
        Side(flat("ExponentialLR", "StepLR", milestones=[4]), TORCHS).run(10),
        case,
    )


# What goes wrong in torch. A test that fails here after an update of torch tells that torch has
# mended it.

TORCH = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
known = pytest.mark.skipif(TORCH != (2, 13), reason="what torch does was seen with 2.13")


def resumed_at(
    library: Any, name: str, step: int, lr: float | None = None
) -> torch.optim.Optimizer:
    """An optimizer as its checkpoint left it, and the scheduler that is made anew with
    last_epoch."""
    case = case_of(name, groups=1)
    first = Side(case, TORCHS)
    first.run(step)
    opt = make_optimizer(torch.optim, case)
    opt.load_state_dict(first.opt.state_dict())
    if lr is not None:
        opt.param_groups[0]["lr"] = lr
    build(library, opt, (TABLE[name][0], TABLE[name][1] | {"last_epoch": step - 1}))
    return opt


TWICE = [
    ("StepLR", 3, 0.05),
    ("MultiStepLR", 5, 0.1 * 0.3**3),
    ("CosineAnnealingWarmRestarts", 10, None),
]


@pytest.mark.parametrize(("name", "step", "right"), TWICE)
def test_made_anew_where_the_rate_changes(name: str, step: int, right: float | None) -> None:
    """gamma applied once more; pytorch#49630, #52236: the cycle's length forgotten beyond the first
    cycle."""
    right = Side(case_of(name, groups=1), TORCHS).run(step)[-1][0] if right is None else right
    assert lr_of(resumed_at(OURS, name, step)) == pytest.approx([right])


@known
@pytest.mark.parametrize(("name", "step", "right"), TWICE)
def test_torch_made_anew_where_the_rate_changes(name: str, step: int, right: float | None) -> None:
    right = Side(case_of(name, groups=1), TORCHS).run(step)[-1][0] if right is None else right
    assert lr_of(resumed_at(TORCHS, name, step)) != pytest.approx([right])


@pytest.mark.parametrize(
    "library", [OURS, pytest.param(TORCHS, marks=known)], ids=["ours", "torch"]
)
def test_cosine_made_anew(library: Any) -> None:
    """pytorch#65342, #60265: right in torch by now."""
    whole = Side(case_of("CosineAnnealingLR", groups=1), TORCHS).run(8)
    for step in range(2, 8):
        assert lr_of(resumed_at(library, "CosineAnnealingLR", step)) == pytest.approx(
            [whole[step][0]]
        )


def sequence_at(library: Any, step: int) -> torch.optim.Optimizer:
    """The example of pytorch#162591."""
    opt = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    members = [library.ConstantLR(opt, 0.1, 20), library.ExponentialLR(opt, 0.9)]
    library.SequentialLR(opt, members, [3], last_epoch=step - 1)
    return opt


def test_sequence_made_anew() -> None:
    """pytorch#162591: at step 4 the second member has stepped once."""
    for step in range(1, 9):
        assert lr_of(sequence_at(OURS, step)) == pytest.approx(
            [0.1 if step < 3 else 0.9 ** (step - 3)]
        )


@known
def test_torchs_sequence_made_anew() -> None:
    assert lr_of(sequence_at(TORCHS, 4)) == pytest.approx([0.1])


SEQUENCES = [
    ["LinearLR", "CosineAnnealingLR floor"],
    ["StepLR", "LambdaLR"],
    ["ConstantLR", "CosineAnnealingWarmRestarts"],
]
SEQUENCES += [["CosineAnnealingLR", "CyclicLR lr alone"], ["ExponentialLR", "PolynomialLR"]]


@pytest.mark.parametrize("names", SEQUENCES)
@TENSORS
def test_sequences_made_anew(names: list[str], tensor: Any) -> None:
    case = dataclasses.replace(flat(*names, milestones=[4]), tensor=tensor)
    whole = Side(case, TORCHS).run(12)
    for step in range(1, 12):
        side = Side(case)
        side.opt = make_optimizer(torch.optim, case)
        members = [build(OURS, side.opt, TABLE[name]) for name in names]
        side.schedulers = [OURS.SequentialLR(side.opt, members, [4], last_epoch=step - 1)]
        assert_close(side.run(12 - step), whole[step:], (names, step))


def made_after_loading(library: Any) -> list[float]:
    """pytorch#119168, #17913: the scheduler is made after the optimizer's checkpoint was loaded,
    and before its own."""
    case = Case([TABLE["LinearLR"]], groups=1, order="optimizer first")
    first = Side(case, library)
    first.run(4)
    assert lr_of(first.opt) == pytest.approx([0.1 * (0.2 + 0.5 * 4 / 6)])
    return lr_of(first.resumed().opt)


def test_order_of_making_and_loading() -> None:
    assert made_after_loading(OURS) == pytest.approx([0.1 * (0.2 + 0.5 * 4 / 6)])


@known
def test_torchs_order_of_making_and_loading() -> None:
    assert made_after_loading(TORCHS) == pytest.approx([0.1 * (0.2 + 0.5 * 4 / 6) * 0.2])


@pytest.mark.parametrize("group_lr", [0.1, 0.3])
def test_hand_set_rate_survives_loading(group_lr: float) -> None:
    """A rate that was set after the scheduler was made is the user's, and loading leaves it
    alone."""
    first = Side(case_of("StepLR", groups=1))
    first.run(5)
    opt = make_optimizer(torch.optim, first.case)
    scheduler = OURS.StepLR(opt, 3, 0.5)
    opt.param_groups[0]["lr"] = group_lr
    scheduler.load_state_dict(first.schedulers[0].state_dict())
    assert lr_of(opt) == ([0.05] if group_lr == 0.1 else [0.3])


DIVISIONS = {
    "OneCycleLR": lambda library, opt: library.OneCycleLR(opt, 0.1, total_steps=10, pct_start=0.1),
    "OneCycleLR of one step": lambda library, opt: library.OneCycleLR(
        opt, 0.1, total_steps=1, pct_start=1.0
    ),
    "OneCycleLR all up": lambda library, opt: library.OneCycleLR(
        opt, 0.1, total_steps=10, pct_start=1.0
    ),
    "ConstantLR": lambda library, opt: library.ConstantLR(opt, factor=0.0, total_iters=3),
}


@pytest.mark.parametrize("name", DIVISIONS)
def test_nothing_is_divided_by_zero(name: str) -> None:
    opt = make_optimizer(torch.optim, Case((), groups=1))
    scheduler = DIVISIONS[name](OURS, opt)
    rates = [*lr_of(opt)]
    for _ in range(getattr(scheduler, "total_steps", 10) - 1):
        opt.step()
        scheduler.step()
        rates += lr_of(opt)
    expected = {
        "OneCycleLR": [
            0.1 * (4e-6 + (1 - 4e-6) * (1 + math.cos(math.pi * t / 9)) / 2) for t in range(10)
        ],
        "OneCycleLR of one step": [0.1],
        "OneCycleLR all up": [
            0.1 * (1 - 0.96 * (1 + math.cos(math.pi * t / 9)) / 2) for t in range(10)
        ],
        "ConstantLR": [0.0] * 3 + [0.1] * 7,
    }
    assert rates == pytest.approx(expected[name], rel=1e-9)


@known
@pytest.mark.parametrize("name", DIVISIONS)
def test_torch_divides_by_zero(name: str) -> None:
    opt = make_optimizer(torch.optim, Case((), groups=1))
    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        scheduler = DIVISIONS[name](TORCHS, opt)
        for _ in range(10):
            opt.step()
            scheduler.step()


@pytest.mark.parametrize("period", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("mult", [2, 3, 5, 10])
def test_cycles_begin_at_exact_powers(period: int, mult: int) -> None:
    opt = make_optimizer(torch.optim, Case((), groups=1))
    scheduler = OURS.CosineAnnealingWarmRestarts(opt, period, mult)
    start = 0
    for cycle in range(9):
        scheduler.step(start)
        assert (scheduler.T_cur, scheduler.T_i, *lr_of(opt)) == (0, period * mult**cycle, 0.1)
        start += period * mult**cycle


@known
def test_torchs_cycles_begin_one_step_late_at_some_powers() -> None:
    late = 0
    for mult in (2, 3, 5, 10):
        opt = make_optimizer(torch.optim, Case((), groups=1))
        scheduler = TORCHS.CosineAnnealingWarmRestarts(opt, 1, mult)
        starts = [(mult**cycle - 1) // (mult - 1) for cycle in range(9)]
        for start in starts:
            scheduler.step(start)
            late += lr_of(opt) != [0.1]
    assert late


@pytest.mark.parametrize("step", [0.25, 2.5, 3.0, 8.75, 20.1])
def test_fractions_of_an_epoch(step: float) -> None:
    rows = []
    for library in (OURS, TORCHS):
        opt = make_optimizer(torch.optim, Case((), groups=1))
        scheduler = library.CosineAnnealingWarmRestarts(opt, 3, 2, 0.01)
        row = [*lr_of(opt)]
        for epoch in (step, step + 0.5, None, None, None):
            scheduler.step(epoch)
            row += [scheduler.T_cur, scheduler.T_i, scheduler.last_epoch, *lr_of(opt)]
        rows.append(row)
    assert rows[0] == pytest.approx(rows[1], rel=1e-9)


@EACH
def test_steps_by_number_as_torch(name: str) -> None:
    if name in ("ChainedScheduler", "SequentialLR", "ReduceLROnPlateau") or "SWALR" in name:
        return  # they take no number of the step; torch's SWALR ignores it
    rows = []
    for library in (OURS, TORCHS):
        side = Side(case_of(name), library)
        deprecated = pytest.warns(UserWarning, match="The epoch parameter in `scheduler.step")
        with deprecated if "Warm" not in name else contextlib.nullcontext():
            for step in (3, 4, None, 9, 0, 2):
                side.opt.step()
                side.schedulers[0].step(*([] if step is None else [step]))
                rows.append(side.options())
    assert_close(rows[:6], rows[6:], name)


def test_no_steps_at_all() -> None:
    for name, lrs in (
        ("PolynomialLR", [0.1] * 3),
        ("LinearLR", [0.1 / 3] * 3),
        ("ConstantLR", [0.1] * 3),
    ):
        side = Side(Case([(name, {"total_iters": 0})], groups=1))
        assert [row[0] for row in side.run(2)] == pytest.approx(lrs)
        if name != "ConstantLR":  # torch's never ends
            assert_close(side.run(2), Side(side.case, TORCHS).run(4)[2:], name)


ADDED = [
    name
    for name in TABLE
    if not isinstance(next(iter(TABLE[name][1].values())), list) and "three" not in name
]


@pytest.mark.parametrize("name", ADDED)
@TENSORS
def test_groups_may_join(name: str, tensor: Any) -> None:
    """A group that is added later goes along from the step at which it came."""
    side = Side(case_of(name, tensor=tensor, groups=1))
    side.run(3)
    lr = 0.4 if tensor is None else torch.tensor(0.4, dtype=tensor)
    side.opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr})
    rows = side.run(8)
    assert_close(
        [row[:1] for row in rows],
        [row[:1] for row in Side(case_of(name, groups=1)).run(11)[3:]],
        name,
    )
    assert rows[-1][1] != rows[0][1]
    assert all(math.isfinite(number) for row in rows for number in row)
    again = make_optimizer(torch.optim, case_of(name, groups=2, tensor=tensor))
    scheduler = build(OURS, again, TABLE[name])
    again.load_state_dict(side.opt.state_dict())
    scheduler.load_state_dict(side.state()["schedulers"][0])
    assert [float(v) for v in lr_of(again)] == [float(v) for v in lr_of(side.opt)]


@known
def test_torchs_closed_forms_do_not_take_groups() -> None:
    side = Side(case_of("LambdaLR", groups=2), TORCHS)
    side.opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.4})
    side.opt.step()
    with pytest.raises(ValueError, match="zip"):
        side.schedulers[0].step()


@EACH
def test_refuses_the_state_of_another_class(name: str) -> None:
    for other in TABLE:
        kinds = {TABLE[other][0], TABLE[name][0]}
        if len(kinds) == 1 or kinds in (
            {"ChainedScheduler", "SequentialLR"},
            {"LambdaLR", "MultiplicativeLR"},
        ):
            continue  # torch's state dicts of these are alike
        for library in (OURS, TORCHS):
            side = Side(case_of(name))
            side.run(2)
            before = side.state()
            foreign = build(library, make_optimizer(torch.optim, side.case), TABLE[other])
            with pytest.raises(
                KeyError, match=f"it is not one of a {type(side.schedulers[0]).__name__}"
            ):
                side.schedulers[0].load_state_dict(foreign.state_dict())
            assert side.state() == before


def test_the_schedulers_of_options_refuse_the_state_of_another_class() -> None:
    opt = make_optimizer(torch.optim, Case(()))
    scheduler, step = onepass.Scheduler(opt, {"lr": decay}), OURS.StepLR(opt, 2)
    for one, other in ((scheduler, step), (step, scheduler)):
        with pytest.raises(KeyError, match=f"it is not one of a {type(one).__name__}"):
            one.load_state_dict(other.state_dict())


@known
def test_torch_takes_the_state_of_another_class() -> None:
    side, other = Side(case_of("StepLR"), TORCHS), Side(case_of("ExponentialLR"), TORCHS)
    side.schedulers[0].load_state_dict(other.schedulers[0].state_dict())
    assert side.schedulers[0].gamma == 0.9


# Another number of steps, in the middle of a run.

LONGER = {
    "CosineAnnealingLR": ("T_max", 5, 12),
    "PolynomialLR": ("total_iters", 7, 12),
    "LinearLR": ("total_iters", 6, 12),
    "StepLR": ("step_size", 2, 3),
    "MultiStepLR": ("milestones", [2, 6], Counter([2, 5])),
    "ExponentialLR": ("gamma", 0.5, 0.9),
    "ConstantLR": ("total_iters", 5, 9),
    "MultiplicativeLR": ("lr_lambdas", [lambda t: 0.5], [lambda t: 0.9]),
    "LambdaLR": ("lr_lambdas", [lambda t: 0.5**t], [lambda t: 0.9**t]),
}


@pytest.mark.parametrize("name", LONGER)
@pytest.mark.parametrize("way", ["in mid-run", "resumed", "made anew", "other base_lrs"])
def test_other_options_go_on_from_the_rate_as_with_torch(name: str, way: str) -> None:
    attribute, short, long = LONGER[name]
    argument = {"lr_lambdas": "lr_lambda"}.get(attribute, attribute)
    rows = []
    for library in (OURS, TORCHS):
        side = Side(Case([(name, {argument: short})], groups=1), library)
        side.run(4)
        if way == "resumed":
            side = side.resumed(order="optimizer last")
        if way == "made anew":
            given = sorted(long.elements()) if isinstance(long, Counter) else long
            side.schedulers = [getattr(library, name)(side.opt, **{argument: given}, last_epoch=3)]
        elif way == "other base_lrs":
            side.schedulers[0].base_lrs = [1.0]
        else:
            setattr(side.schedulers[0], attribute, long)
        rows.append([lr_of(side.opt), *side.run(10)])
    assert rows[0] == [pytest.approx(row) for row in rows[1]]


# What is set in mid-run, after so many steps; and how many follow.
SET = {
    "a power that has become 0": ("ExponentialLR", (0.9999,), 10_000, {"gamma": 0.9}, 10),
    "a power of steps": ("StepLR", (10, 0.999), 4000, {"gamma": 0.1}, 20),
    "to 0": ("ExponentialLR", (0.9,), 3, {"gamma": 0.0}, 2),
    "up, after many steps": ("ExponentialLR", (1.0,), 2000, {"gamma": 1.5}, 2),
    "to infinity": ("ExponentialLR", (1.5,), 10, {"gamma": math.inf}, 1),
    "the step, of a power": ("ExponentialLR", (0.9,), 1, {"last_epoch": 9}, 2),
    "the step, of a cosine": ("CosineAnnealingLR", (20,), 3, {"last_epoch": 9}, 4),
    "a restart": ("CosineAnnealingWarmRestarts", (4, 2, 0.01), 5, {"T_cur": 0}, 9),
    "a cycle": ("CosineAnnealingWarmRestarts", (4, 2, 0.01), 5, {"T_i": 20}, 9),
    "later cycles": ("CosineAnnealingWarmRestarts", (4, 2, 0.01), 5, {"T_0": 3, "T_mult": 1}, 20),
}


@pytest.mark.parametrize("case", SET)
def test_what_is_set_in_mid_run(case: str) -> None:
    name, arguments, before, values, after = SET[case]
    rows = []
    for library in (OURS, TORCHS):
        opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        scheduler, row = getattr(library, name)(opt, *arguments), []
        for t in range(before + after):
            if t == before:
                vars(scheduler).update(values)
            opt.step()
            scheduler.step()
            row += lr_of(opt)
        rows.append(row[before:])
    assert rows[0] == pytest.approx(rows[1])


@pytest.mark.parametrize("way", ["then saved", "in the checkpoint"])
@pytest.mark.parametrize(
    "name", ["ExponentialLR", "StepLR", "LinearLR", "PolynomialLR", "CosineAnnealingLR"]
)
def test_an_option_is_set_and_the_run_resumed(name: str, way: str) -> None:
    attribute, short, long = LONGER[name]
    rows = []
    for library in (OURS, TORCHS):
        side = Side(Case([(name, {attribute: short})], groups=1), library)
        side.run(4)
        if way == "then saved":
            setattr(side.schedulers[0], attribute, long)
        state = side.state()
        state["schedulers"][0][attribute] = long
        opt = make_optimizer(torch.optim, side.case)
        scheduler = build(library, opt, side.case.specs[0])
        scheduler.load_state_dict(state["schedulers"][0])
        opt.load_state_dict(state["optimizer"])
        row = []
        for _ in range(6):
            opt.step()
            scheduler.step()
            row += lr_of(opt)
        rows.append(row)
    assert rows[0] == pytest.approx(rows[1])


def test_goes_on_with_another_schedule() -> None:
    case = Case((), groups=2)
    opt = make_optimizer(torch.optim, case)
    scheduler = onepass.Scheduler(
        opt, {"lr": schedule.cosine(0.3, steps=10), "momentum": schedule.constant(0.8)}
    )
    for _ in range(5):
        opt.step()
        scheduler.step()
    longer = {"lr": schedule.cosine(0.3, steps=30), "momentum": schedule.linear(0.8, 0.9, steps=30)}
    for order in ("first", "last"):
        other = make_optimizer(torch.optim, case)
        if order == "first":
            other.load_state_dict(opt.state_dict())
        again = onepass.Scheduler(other, longer)
        again.load_state_dict(through_a_file(scheduler.state_dict()))
        if order == "last":
            other.load_state_dict(opt.state_dict())
        for t in range(6, 20):
            other.step()
            again.step()
            assert lr_of(other) == [longer["lr"](t)] * 2
            assert [group["momentum"] for group in other.param_groups] == [
                longer["momentum"](t)
            ] * 2


# A tensor as the rate: it stays the tensor that it is, and nothing shares its memory.


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    inside = (
        value.values()
        if isinstance(value, dict)
        else value
        if isinstance(value, (list, tuple))
        else ()
    )
    return [tensor for item in inside for tensor in tensors_in(item)]


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("shape", [(), (1,)], ids=["scalar", "one element"])
def test_tensor_rates_stay_and_are_nobody_elses(
    name: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """pytorch#126854, #163103, #162359, #163093."""
    case = case_of(name)
    opt = make_optimizer(torch.optim, case)
    rates = [torch.full(shape, group["lr"], dtype=dtype) for group in opt.param_groups]
    for group, rate in zip(opt.param_groups, rates, strict=True):
        group["lr"] = rate
    side = Side(case)
    side.opt, side.schedulers = opt, [build(OURS, opt, TABLE[name])]
    rows = side.run(12)
    assert_close(rows, Side(case).run(12), name, rtol=1e-5 if dtype == torch.float32 else 1e-9)
    side.schedulers[0].load_state_dict(side.schedulers[0].state_dict())
    side.run(2)
    assert all(
        group["lr"] is rate and rate.shape == shape
        for group, rate in zip(opt.param_groups, rates, strict=True)
    )
    everything = [*rates, *tensors_in([group.get("initial_lr") for group in opt.param_groups])]
    for scheduler in (side.schedulers[0], *getattr(side.schedulers[0], "_schedulers", ())):
        everything += tensors_in([getattr(scheduler, "base_lrs", []), scheduler.get_last_lr()])
        everything += tensors_in([scheduler.state_dict(), scheduler.state_dict()])
    assert len({tensor.data_ptr() for tensor in everything}) == len(everything)


@known
def test_torch_fills_nothing_but_the_rate() -> None:
    """What the four reports asked for is so in torch by now, where one tensor is not the rate of
    two groups."""
    side = Side(case_of("LambdaLR", tensor=torch.float64), TORCHS)
    rates = lr_of(side.opt)
    side.run(3)
    assert all(rate is now for rate, now in zip(rates, lr_of(side.opt), strict=True))
    assert lr_of(side.opt) == [0.1 * decay(3), 0.2 * waves(3)]


SHARED = [
    name
    for name in TABLE
    if not isinstance(next(iter(TABLE[name][1].values())), list) and "three" not in name
]


@pytest.mark.parametrize("name", SHARED)
def test_groups_may_share_one_tensor(name: str) -> None:
    params = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    hands = {2: ("set", 0.03), 7: ("set", 0.07)}
    side, alone = Side(case_of(name, hands=hands)), Side(case_of(name, groups=1, hands=hands))
    groups = [{"params": [p]} for p in params]
    side.opt = torch.optim.SGD(groups, lr=torch.tensor(0.1, dtype=torch.float64), momentum=0.9)
    assert side.opt.param_groups[0]["lr"] is side.opt.param_groups[1]["lr"]
    side.schedulers = [build(OURS, side.opt, TABLE[name])]
    assert_close([row[::2] for row in side.run(12)], alone.run(12), name)


@EACH
def test_rates_may_require_gradients(name: str) -> None:
    """As with `differentiable=True`; torch's schedulers raise."""
    side = Side(case_of(name))
    side.opt = make_optimizer(torch.optim, side.case)
    for group in side.opt.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64, requires_grad=True)
    side.schedulers = [build(OURS, side.opt, TABLE[name])]
    assert_close(side.run(8), Side(case_of(name)).run(8), name)
    side.schedulers[0].load_state_dict(side.schedulers[0].state_dict())
    assert all(rate.requires_grad and rate.grad_fn is None for rate in lr_of(side.opt))


@pytest.mark.parametrize(
    "name", [name for name in TABLE if name not in ("ReduceLROnPlateau", "ChainedScheduler")]
)
def test_no_step_reads_a_device(name: str) -> None:
    """A tensor without values takes every step: what a device would compute is never waited for."""
    side = Side(case_of(name))
    side.opt = make_optimizer(torch.optim, side.case)
    side.schedulers = [build(OURS, side.opt, TABLE[name])]
    for group in side.opt.param_groups:
        group["lr"] = torch.tensor(0.1, device="meta")
    for scheduler in (*side.schedulers, *getattr(side.schedulers[0], "_schedulers", ())):
        scheduler._versions = [
            (lr, lr._version) for lr in lr_of(side.opt)
        ]  # as after a step on a device
    for _ in range(12):
        side.opt.step()
        side.schedulers[0].step()
    assert all(rate.is_meta for rate in lr_of(side.opt))


# Warnings.

EARLY = r"Detected call of `lr_scheduler.step\(\)` before `optimizer.step\(\)`"
STEPPING = [
    name for name in TABLE if name not in ("ReduceLROnPlateau", "CosineAnnealingWarmRestarts")
]


@pytest.mark.parametrize("name", STEPPING)
@pytest.mark.parametrize("library", [OURS, TORCHS], ids=["ours", "torch"])
def test_warns_of_steps_in_the_wrong_order(name: str, library: Any) -> None:
    side = Side(case_of(name), library)
    with pytest.warns(UserWarning, match=EARLY):
        side.schedulers[0].step()
    side.schedulers[0].step()  # once


@EACH
def test_the_right_order_is_silent(name: str) -> None:
    """Other schedulers, a step that is assigned anew as accelerate does, and a scheduler that is
    made late."""
    side = Side(case_of(name, "ExponentialLR"))
    side.run(2)
    late = OURS.StepLR(side.opt, 2)
    late.step()
    wrapped = Side(case_of(name))
    original = wrapped.opt.step
    wrapped.opt.step = types.MethodType(lambda self, closure=None: original(closure), wrapped.opt)
    wrapped.run(2)


def test_the_warning_points_at_the_caller() -> None:
    for name, arguments in (("StepLR", ()), ("SequentialLR", ()), ("ChainedScheduler", ())):
        side = Side(case_of(name))
        with pytest.warns(UserWarning, match=EARLY) as caught:
            side.schedulers[0].step(*arguments)
        if name == "StepLR":
            assert caught[0].filename == __file__


@pytest.mark.parametrize("ours", [False, True])
def test_a_first_step_that_the_scaler_skips(ours: bool) -> None:
    """GradScaler does not call a step with infinite gradients, and schedulers say so; ours it
    calls, and we skip."""
    p = torch.nn.Parameter(torch.ones(3))
    opt = onepass.AdamW([p], lr=0.1, fused=True) if ours else torch.optim.SGD([p], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scheduler = OURS.StepLR(opt, 2)
    scaler.scale((p * math.inf).sum()).backward()
    scaler.step(opt)
    scaler.update()
    assert p.tolist() == [1.0] * 3
    with contextlib.nullcontext() if ours else pytest.warns(UserWarning, match=EARLY):
        scheduler.step()


# onepass.Scheduler: any option of any optimizer.

OPTIMIZERS = [
    "SGD",
    "Adam",
    "AdamW",
    "Adagrad",
    "Adadelta",
    "Adamax",
    "ASGD",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
]
OPTIMIZERS += ["Adafactor", "SparseAdam", "LBFGS", "Muon"]
KIND = {
    "betas[0]": 0.9,
    "betas[1]": 0.99,
    "momentum": 0.5,
    "alpha": 0.9,
    "rho": 0.9,
    "etas[0]": 0.5,
    "lr": 0.1,
}
KIND |= {
    "weight_decay": 0.01,
    "eps": 1e-8,
    "tolerance_grad": 1e-7,
    "lambd": 1e-4,
    "beta2_decay": -0.8,
}


def is_number(value: Any, indexed: bool) -> bool:
    return isinstance(value, tuple) if indexed else isinstance(value, float)


def read(group: dict[str, Any], option: str) -> float:
    name, _, index = option.rstrip("]").partition("[")
    return float(group[name][int(index)] if index else group[name])


@pytest.mark.parametrize("library", [torch.optim, onepass], ids=["torch", "onepass"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_drives_every_number_of_every_optimizer(library: Any, name: str) -> None:
    p = torch.nn.Parameter(torch.ones(3, 2))
    opt = getattr(library, name)([p], lr=0.1)
    found = [
        option
        for option in KIND
        if is_number(opt.param_groups[0].get(option.partition("[")[0]), "[" in option)
    ]
    schedules = {
        option: schedule.linear(KIND[option], KIND[option] / 2, steps=4) for option in found
    }
    scheduler = onepass.Scheduler(opt, schedules)
    for t in range(6):
        assert {option: read(opt.param_groups[0], option) for option in found} == {
            o: schedules[o](t) for o in found
        }
        p.grad = torch.ones(3, 2) if name != "SparseAdam" else torch.ones(3, 2).to_sparse()
        opt.step(*([lambda: (p * p).sum()] if name == "LBFGS" else []))
        scheduler.step()
    assert type(opt.param_groups[0].get("betas", ())) is tuple


def test_lists_give_each_group_its_own() -> None:
    opt = make_optimizer(torch.optim, Case((), groups=3))
    scheduler = onepass.Scheduler(
        opt, {"lr": [schedule.linear(1, 0, steps=4), None, lambda t: 0.5 + t]}
    )
    opt.param_groups[1]["lr"] = 0.9
    for t in range(1, 6):
        opt.step()
        opt.param_groups[0]["lr"] = 77.0  # whatever stands there is written over
        scheduler.step()
        assert lr_of(opt) == [max(0, 1 - t / 4), 0.9, 0.5 + t]
        assert scheduler.get_last_lr() == lr_of(opt)
    assert scheduler.last_epoch == 5


def test_one_schedule_is_asked_once_for_all_groups() -> None:
    asked: list[int] = []
    opt = make_optimizer(torch.optim, Case((), groups=50))
    onepass.Scheduler(opt, {"lr": lambda t: asked.append(t) or 0.1, "momentum": lambda t: 0.9})
    assert asked == [0]


def test_tensors_are_filled_where_they_stand() -> None:
    opt = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    group = opt.param_groups[0]
    tensors = [torch.tensor(0.9), torch.tensor(0.99), torch.tensor([0.1])]
    group["betas"], group["lr"] = (tensors[0], tensors[1]), tensors[2]
    scheduler = onepass.Scheduler(
        opt, {"betas[0]": schedule.linear(0.5, 1.0, steps=2), "lr": schedule.linear(1, 0, steps=4)}
    )
    opt.step()
    scheduler.step()
    assert [*group["betas"], group["lr"]] == [0.75, tensors[1], 0.75]
    assert all(
        now is then for now, then in zip((*group["betas"], group["lr"]), tensors, strict=True)
    )


@pytest.mark.parametrize(
    "order", ["optimizer first", "optimizer then scheduler", "optimizer last", "made anew"]
)
@TENSORS
def test_scheduler_resumes(order: str, tensor: Any) -> None:
    """At every step, in every order, also with last_epoch; a change by hand lasts until the next
    step."""
    schedules = {
        "lr": schedule.cosine(0.3, steps=8).warmup(2),
        "momentum": [schedule.linear(0.8, 0.9, steps=9), None],
    }
    for cut in range(8):
        case = Case((), tensor=tensor)
        opt = make_optimizer(torch.optim, case)
        scheduler = onepass.Scheduler(opt, schedules)
        for _ in range(cut):
            opt.step()
            scheduler.step()
        opt.param_groups[0]["momentum"] = 0.123 if cut == 5 else opt.param_groups[0]["momentum"]
        state, saved = through_a_file(opt.state_dict()), through_a_file(scheduler.state_dict())
        other = make_optimizer(torch.optim, case)
        if order in ("optimizer first", "made anew"):
            other.load_state_dict(state)
        again = onepass.Scheduler(other, schedules, cut - 1 if order == "made anew" else -1)
        if order == "optimizer then scheduler":
            other.load_state_dict(state)
        if order != "made anew":
            again.load_state_dict(saved)
        if order == "optimizer last":
            other.load_state_dict(state)
        sides = [(opt, scheduler), (other, again)]
        for _ in range(4):
            rows = [[(float(g["lr"]), g["momentum"]) for g in o.param_groups] for o, _ in sides]
            assert rows[0] == rows[1] or (cut == 5 and rows[0][0][0] == rows[1][0][0])
            for one, its in sides:
                one.step()
                its.step()


# Bad input: one sentence, torch's exception where torch has one, and nothing has changed.


@dataclass(frozen=True)
class Bad:
    """A call that must fail, and whether torch's class fails in the same way."""

    call: Callable[[Any, torch.optim.Optimizer], Any]
    error: type[Exception]
    message: str
    torchs: bool = True
    optimizer: str = "SGD"


def other_optimizer() -> torch.optim.Optimizer:
    return make_optimizer(torch.optim, Case((), groups=1))


BAD: dict[str, Bad] = {
    **{
        f"{name} of no optimizer": Bad(
            lambda library, opt, spec=spec: getattr(library, spec[0])(object(), **spec[1]),
            TypeError,
            f"{spec[0]} drives an Optimizer of torch.optim, got <object object",
            torchs=spec[0]
            not in ("SWALR", "LambdaLR", "MultiplicativeLR"),  # AttributeError of something else
        )
        for name, spec in TABLE.items()
        if spec[0] not in ("SequentialLR", "ChainedScheduler", "ReduceLROnPlateau")
    },
    **{
        f"{name} without initial_lr": Bad(
            lambda library, opt, spec=spec: getattr(library, spec[0])(opt, **spec[1], last_epoch=2),
            KeyError,
            "param_groups[0] has no 'initial_lr', from which last_epoch=2 resumes: load the "
            "optimizer's checkpoint",
            torchs=True,
        )
        for name, spec in TABLE.items()
        if spec[0] not in ("SequentialLR", "ChainedScheduler", "ReduceLROnPlateau")
    },
    **{
        f"{name} before the start": Bad(
            lambda library, opt, spec=spec: getattr(library, spec[0])(
                opt, **spec[1], last_epoch=-2
            ),
            ValueError,
            f"{spec[0]}: last_epoch must be -1 or a step from 0 on, got -2.",
            torchs=False,
        )
        for name, spec in TABLE.items()
        if spec[0] not in ("SequentialLR", "ChainedScheduler", "ReduceLROnPlateau")
    },
    "plateau of no optimizer": Bad(
        lambda m, o: m.ReduceLROnPlateau(object()), TypeError, "is not an Optimizer"
    ),
    "plateau factor": Bad(
        lambda m, o: m.ReduceLROnPlateau(o, factor=1.0), ValueError, "Factor should be < 1.0"
    ),
    "plateau mode": Bad(lambda m, o: m.ReduceLROnPlateau(o, mode="low"), ValueError, "low"),
    "plateau threshold": Bad(
        lambda m, o: m.ReduceLROnPlateau(o, threshold_mode="no"), ValueError, "no"
    ),
    "plateau min_lr": Bad(lambda m, o: m.ReduceLROnPlateau(o, min_lr=[0.1]), ValueError, "1"),
    "lambdas": Bad(
        lambda m, o: m.LambdaLR(o, [decay]),
        ValueError,
        "lr_lambda has 1 values, param_groups has 2",
    ),
    "more lambdas": Bad(
        lambda m, o: m.MultiplicativeLR(o, (decay,) * 3),
        ValueError,
        "has 3 values, param_groups has 2",
    ),
    "no function": Bad(
        lambda m, o: m.LambdaLR(o, 0.5),
        TypeError,
        "lr_lambda should be a function of the step, got 0.5",
    ),
    "no function again": Bad(
        lambda m, o: m.MultiplicativeLR(o, [decay, 2]), TypeError, "a function of the step, got 2"
    ),
    "step_size": Bad(
        lambda m, o: m.StepLR(o, 0), ValueError, "step_size must be a positive number", False
    ),
    "milestones": Bad(
        lambda m, o: m.MultiStepLR(o, [3, 2]),
        ValueError,
        "must be increasing steps from 0 on",
        False,
    ),
    "negative milestone": Bad(
        lambda m, o: m.MultiStepLR(o, [-1]), ValueError, "increasing steps from 0 on", False
    ),
    "constant factor": Bad(
        lambda m, o: m.ConstantLR(o, 1.5), ValueError, "factor expected to be between 0 and 1"
    ),
    "negative factor": Bad(
        lambda m, o: m.ConstantLR(o, -0.1), ValueError, "expected to be between 0 and 1, got -0.1"
    ),
    "start_factor 0": Bad(
        lambda m, o: m.LinearLR(o, 0.0), ValueError, "start_factor must be greater than 0"
    ),
    "start_factor": Bad(
        lambda m, o: m.LinearLR(o, 1.1), ValueError, "start_factor expected to be between 0 and 1"
    ),
    "end_factor": Bad(
        lambda m, o: m.LinearLR(o, 0.5, -0.1),
        ValueError,
        "end_factor expected to be between 0 and 1",
    ),
    "T_max": Bad(
        lambda m, o: m.CosineAnnealingLR(o, 0),
        ValueError,
        "T_max must be a positive number of steps",
        False,
    ),
    "T_0": Bad(
        lambda m, o: m.CosineAnnealingWarmRestarts(o, 0),
        ValueError,
        "positive integer T_0, but got 0",
    ),
    "T_0 float": Bad(
        lambda m, o: m.CosineAnnealingWarmRestarts(o, 2.5), ValueError, "integer T_0, but got 2.5"
    ),
    "T_mult": Bad(
        lambda m, o: m.CosineAnnealingWarmRestarts(o, 2, 0), ValueError, "integer T_mult, but got 0"
    ),
    "eta_min": Bad(
        lambda m, o: m.CosineAnnealingWarmRestarts(o, 2, 1, "0"), ValueError, "float or int eta_min"
    ),
    "no momentum": Bad(
        lambda m, o: m.CyclicLR(o, 0.1, 0.2),
        ValueError,
        "must support momentum",
        optimizer="Adagrad",
    ),
    "no beta": Bad(
        lambda m, o: m.OneCycleLR(o, 0.1, 9),
        ValueError,
        "must support momentum",
        optimizer="Adagrad",
    ),
    "base_lr": Bad(
        lambda m, o: m.CyclicLR(o, [0.1], 0.2),
        ValueError,
        "base_lr has 1 values, param_groups has 2",
    ),
    "max_lr": Bad(
        lambda m, o: m.CyclicLR(o, 0.1, [0.2] * 3),
        ValueError,
        "max_lr has 3 values, param_groups has 2",
    ),
    "momenta": Bad(
        lambda m, o: m.OneCycleLR(o, 0.1, 9, base_momentum=[0.8]),
        ValueError,
        "base_momentum has 1 values",
    ),
    "mode": Bad(
        lambda m, o: m.CyclicLR(o, 0.1, 0.2, mode="square"),
        ValueError,
        "mode is invalid and scale_fn is None",
    ),
    "step_size_up": Bad(
        lambda m, o: m.CyclicLR(o, 0.1, 0.2, 0), ValueError, "step_size_up must be positive", False
    ),
    "no total": Bad(
        lambda m, o: m.OneCycleLR(o, 0.1), ValueError, "You must define either total_steps OR"
    ),
    "half a total": Bad(
        lambda m, o: m.OneCycleLR(o, 0.1, epochs=3),
        ValueError,
        "You must define either total_steps OR",
    ),
    "total 0": Bad(
        lambda m, o: m.OneCycleLR(o, 0.1, 0), ValueError, "positive integer total_steps, but got 0"
    ),
    "total float": Bad(
        lambda m, o: m.OneCycleLR(o, 0.1, 9.5),
        ValueError,
        "positive integer total_steps, but got 9.5",
    ),
    "epochs": Bad(
        lambda m, o: m.OneCycleLR(o, 0.1, epochs=-3, steps_per_epoch=2),
        ValueError,
        "positive integer epochs, but got -3",
    ),
    "steps_per_epoch": Bad(
        lambda m, o: m.OneCycleLR(o, 0.1, epochs=3, steps_per_epoch=0.5),
        ValueError,
        "integer steps_per_epoch, but got 0.5",
    ),
    "pct_start": Bad(
        lambda m, o: m.OneCycleLR(o, 0.1, 9, pct_start=1.5), ValueError, "between 0 and 1 pct_start"
    ),
    "pct_start int": Bad(
        lambda m, o: m.OneCycleLR(o, 0.1, 9, pct_start=1), ValueError, "between 0 and 1 pct_start"
    ),
    "one cycle's way": Bad(
        lambda m, o: m.OneCycleLR(o, 0.1, 9, anneal_strategy="root"),
        ValueError,
        "must be one of 'cos' or 'linear'",
    ),
    "swa's way": Bad(
        lambda m, o: m.SWALR(o, 0.1, 3, "root"), ValueError, "must be one of 'cos' or 'linear'"
    ),
    "swa epochs": Bad(
        lambda m, o: m.SWALR(o, 0.1, -1),
        ValueError,
        "anneal_epochs must be equal or greater than 0",
    ),
    "swa epochs float": Bad(
        lambda m, o: m.SWALR(o, 0.1, 2.5),
        ValueError,
        "anneal_epochs must be equal or greater than 0",
    ),
    "swa_lr": Bad(
        lambda m, o: m.SWALR(o, [0.1]), ValueError, "swa_lr has 1 values, param_groups has 2"
    ),
    "no members": Bad(
        lambda m, o: m.SequentialLR(o, [], []),
        ValueError,
        "SequentialLR expects at least one scheduler",
    ),
    "no chain": Bad(
        lambda m, o: m.ChainedScheduler([]),
        ValueError,
        "ChainedScheduler expects at least one scheduler",
    ),
    "number of milestones": Bad(
        lambda m, o: m.SequentialLR(o, [m.StepLR(o, 2)], [3]),
        ValueError,
        "1 schedulers do not go with 1 milestones",
    ),
    "milestones in a sequence": Bad(
        lambda m, o: m.SequentialLR(o, [m.StepLR(o, 2) for _ in range(3)], [3, 1]),
        ValueError,
        "got [3, 1]",
        False,
    ),
    "no scheduler": Bad(
        lambda m, o: m.SequentialLR(o, [m.StepLR(o, 2), 3], [3]),
        TypeError,
        "at index 1 is not a scheduler",
    ),
    "no link": Bad(
        lambda m, o: m.ChainedScheduler([m.StepLR(o, 2), 3]),
        TypeError,
        "at index 1 is not a scheduler",
    ),
    "a plateau in a sequence": Bad(
        lambda m, o: m.SequentialLR(o, [m.ReduceLROnPlateau(o)], []),
        ValueError,
        "the ReduceLROnPlateau at index 0",
    ),
    "a plateau in a chain": Bad(
        lambda m, o: m.ChainedScheduler([m.ReduceLROnPlateau(o)]),
        ValueError,
        "the ReduceLROnPlateau at index 0",
    ),
    "another optimizer": Bad(
        lambda m, o: m.SequentialLR(o, [m.StepLR(other_optimizer(), 2)], []),
        ValueError,
        "belongs to another optimizer",
    ),
    "another optimizer in a chain": Bad(
        lambda m, o: m.ChainedScheduler([m.StepLR(o, 2), m.StepLR(other_optimizer(), 2)]),
        ValueError,
        "the scheduler at index 1 belongs to another optimizer",
    ),
    "option": Bad(
        lambda m, o: onepass.Scheduler(o, {"beta": decay}),
        KeyError,
        "'beta' is not a number in the optimizer's groups",
        False,
    ),
    "index": Bad(
        lambda m, o: onepass.Scheduler(o, {"lr[0]": decay}),
        KeyError,
        "'lr[0]' is not a number",
        False,
    ),
    "word": Bad(
        lambda m, o: onepass.Scheduler(o, {"betas[one]": decay}),
        KeyError,
        "'betas[one]' is not a number",
        False,
    ),
    "schedule": Bad(
        lambda m, o: onepass.Scheduler(o, {"lr": 0.1}),
        TypeError,
        "the schedule of 'lr' must be a func",
        False,
    ),
    "schedules": Bad(
        lambda m, o: onepass.Scheduler(o, {"lr": [decay]}),
        ValueError,
        "schedules['lr'] has 1 values, param_groups has 2",
        False,
    ),
    "no optimizer": Bad(
        lambda m, o: onepass.Scheduler([], {"lr": decay}),
        TypeError,
        "Scheduler drives an Opt",
        False,
    ),
    "early": Bad(
        lambda m, o: onepass.Scheduler(o, {"lr": decay}, -3),
        ValueError,
        "last_epoch must be -1 or a",
        False,
    ),
}


def snapshot(opt: torch.optim.Optimizer) -> str:
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in opt.param_groups
    ]
    return repr(groups)


MAKES_MEMBERS = ("milestones", "scheduler", "link", "plateau", "optimizer in a chain")


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    bad = BAD[name]
    opt = make_optimizer(torch.optim, Case((), optimizer=bad.optimizer))
    before = snapshot(opt)
    with pytest.raises(bad.error, match=re.escape(bad.message)) as caught:
        bad.call(OURS, opt)
    assert caught.type is bad.error
    assert "\n" not in str(caught.value)
    if not any(
        part in name for part in MAKES_MEMBERS
    ):  # of which the members themselves have begun
        assert snapshot(opt) == before
    if bad.torchs:
        with pytest.raises(bad.error):
            bad.call(TORCHS, make_optimizer(torch.optim, Case((), optimizer=bad.optimizer)))


def break_formula(t: float) -> float:
    """Fails at step 3."""
    return 1 / (3 - t)


STEPS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], type[Exception], str]] = {
    "past the end": (
        lambda o: OURS.OneCycleLR(o, 0.1, 2),
        lambda s: s.step(),
        ValueError,
        "Tried to step 3 times",
    ),
    "back": (
        lambda o: OURS.StepLR(o, 2),
        lambda s: s.step(-1),
        ValueError,
        "StepLR: expected a step from 0 on, got -1",
    ),
    "back in a cycle": (
        lambda o: OURS.CosineAnnealingWarmRestarts(o, 2),
        lambda s: s.step(-0.5),
        ValueError,
        "Expected non-negative epoch, but got -0.5",
    ),
    "lambda": (
        lambda o: OURS.LambdaLR(o, break_formula),
        lambda s: s.step(),
        ZeroDivisionError,
        "division by zero",
    ),
    "factor": (
        lambda o: OURS.MultiplicativeLR(o, break_formula),
        lambda s: s.step(),
        ZeroDivisionError,
        "division",
    ),
    "schedule": (
        lambda o: onepass.Scheduler(o, {"momentum": decay, "lr": break_formula}),
        lambda s: s.step(),
        ZeroDivisionError,
        "division",
    ),
    "metric": (lambda o: OURS.ReduceLROnPlateau(o), lambda s: s.step(None), TypeError, "None"),
    "no state": (
        lambda o: OURS.StepLR(o, 2),
        lambda s: s.load_state_dict({}),
        KeyError,
        "lacks step_size, gamma",
    ),
    "members": (
        lambda o: build(OURS, o, TABLE["SequentialLR"]),
        lambda s: s.load_state_dict(s.state_dict() | {"_schedulers": []}),
        KeyError,
        "the state dict has 0 schedulers for 2",
    ),
    "member": (
        lambda o: build(OURS, o, TABLE["SequentialLR"]),
        lambda s: s.load_state_dict(
            s.state_dict() | {"_schedulers": s.state_dict()["_schedulers"][::-1]}
        ),
        KeyError,
        "it is not one of a LinearLR",
    ),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.filterwarnings("ignore:The epoch parameter")
def test_a_step_that_fails_has_changed_nothing(name: str) -> None:
    make, call, error, message = STEPS[name]
    opt = make_optimizer(torch.optim, Case(()))
    scheduler = make(opt)
    for _ in range(2):
        opt.step()
        scheduler.step(*([0.5] if name == "metric" else []))
    before, state = snapshot(opt), without_count(scheduler)
    for _ in range(2):
        with pytest.raises(error, match=re.escape(message)):
            call(scheduler)
        assert (snapshot(opt), without_count(scheduler)) == (before, state)


def without_count(scheduler: Any) -> str:
    """The state but for the number of calls, which tells nothing but whether to warn."""
    return repr(
        {
            key: value
            for key, value in scheduler.state_dict().items()
            if key not in ("_step_count", "_onepass_products")
        }
    )


# Mutations: a wrong formula, a forgotten change, a bad resume are noticed.


def wrong(cls: Any, method: str, change: Callable[..., Any]) -> Any:
    """Replace a method by one that is given the right one, too."""
    right = getattr(cls, method)
    return cls, method, lambda self, *args, **kwargs: change(right, self, *args, **kwargs)


def late(right: Any, self: Any, step: int) -> float:
    return right(self, step + 1)


def forgets(right: Any, self: Any, *args: Any) -> None:
    pass


MUTATIONS = {
    **{
        f"{name} one step late": wrong(getattr(OURS, name), "scale", late)
        for name in (
            "StepLR",
            "MultiStepLR",
            "ConstantLR",
            "LinearLR",
            "ExponentialLR",
            "PolynomialLR",
            "SWALR",
        )
    },
    "cosine one step late": wrong(OURS.CosineAnnealingLR, "scale", late),
    "cosine without a floor": wrong(OURS.CosineAnnealingLR, "floors", lambda right, self: ()),
    "restarts never": wrong(
        OURS.CosineAnnealingWarmRestarts,
        "get_lr",
        lambda right, self: [base * 0.5 for base in self.base_lrs],
    ),
    "momentum not moved": wrong(OURS.OneCycleLR, "_put_momenta", forgets),
    "momentum not resumed": wrong(
        OURS.OneCycleLR, "_restore", lambda right, self, state: vars(self).update(state)
    ),
    "height of triangles": wrong(OURS.CyclicLR, "height", lambda right, self: right(self) * 0.99),
    "hand changes lost": wrong(closed.ClosedLR, "_is_own", lambda right, self, index, lr: True),
    "hand changes carried wrongly": wrong(
        closed.ClosedLR,
        "_carry",
        lambda right, self, lrs, step: [lr * self.scale(step) for lr in lrs],
    ),
    "hand changes taken for the formula": wrong(
        closed.ClosedLR,
        "_restore",
        lambda right, self, state: vars(self).update(state, _own=[True] * 2),
    ),
    "rate not resumed": wrong(
        frame.LRScheduler,
        "load_state_dict",
        lambda right, self, state: self._restore(dict(state)),
    ),
    "sequence one step late": wrong(
        OURS.SequentialLR, "_update_lr", lambda right, self, epoch=None: right(self, 1)
    ),
    "chain broken": wrong(
        OURS.ChainedScheduler, "step", lambda right, self: self._schedulers[0].step()
    ),
    "plateau reduces at once": wrong(
        OURS.ReduceLROnPlateau,
        "step",
        lambda right, self, metrics: self._reduce_lr(0) or right(self, metrics),
    ),
}


def check_all() -> None:
    for name in TABLE:
        for hands in ({}, HANDS):
            case = case_of(name, hands=hands, order="optimizer first", steps=12)
            check(case, torch.optim)
    check(flat("StepLR", "LinearLR", milestones=[3]), torch.optim)
    test_sequences_made_anew(SEQUENCES[0], None)
    test_goes_on_from_torchs_checkpoint("StepLR", None, HANDS, "optimizer last")


def test_all_is_well_without_a_mutation() -> None:
    check_all()


@pytest.mark.parametrize("name", MUTATIONS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_mutations_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*MUTATIONS[name])
    with pytest.raises(AssertionError):
        check_all()


@EACH
def test_a_state_that_is_loaded_is_saved_as_it_was(name: str) -> None:
    side, other = Side(case_of(name)), Side(case_of(name))
    for steps in (0, 3):
        side.run(steps)
        state = side.schedulers[0].state_dict()
        other.schedulers[0].load_state_dict(copy.deepcopy(state))
        assert other.schedulers[0].state_dict() == state


def test_no_step_compares_tensors_after_a_state_was_loaded() -> None:
    """On a device that would be to wait for it. Objects that are the same are not compared."""
    side = Side(Case([("ExponentialLR", {"gamma": 0.5})], groups=2, tensor=torch.float64))
    side.run(2)
    again = side.resumed().schedulers[0]
    assert all(known is lr for known, lr in zip(again._known_lrs, again.base_lrs, strict=True))
