"""What PyTorch and its ecosystem demand of an optimizer, row by row; torch.optim is the reference
throughout."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.side_by_side import ALGORITHMS, CLOSE, assert_same, both, make_side, on_both, snapshot
from support.slow_marks import slow_but
from support.subprocess_cases import run_script
from table import on_eager_backend
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import onepass

NAMES = ("SGD", "Adam", "AdamW")
CLASSES = sorted({name for name, _ in ALGORITHMS.values()})
LIBRARIES = pytest.mark.parametrize("library", [torch.optim, onepass], ids=["torch", "onepass"])
EVERY = pytest.mark.parametrize("algorithm", ALGORITHMS)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def make_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def train(
    model: nn.Module, opt: Any, steps: int, seed: int = 1, after: Callable[[], Any] = lambda: None
) -> None:
    random = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        opt.zero_grad()
        model(torch.randn(5, 4, generator=random).to(dtype)).square().mean().backward()
        opt.step()
        after()


def ends(run: Callable[[Any], Any]) -> tuple[Any, Any]:
    """What a run gives with onepass and with torch.optim."""
    return run(onepass), run(torch.optim)


# Arguments.


@pytest.mark.parametrize("name", NAMES)
def test_positional_arguments_and_defaults(name):
    arguments = {"SGD": (0.2, 0.9, 0.1, 0.3, False)}.get(name, (0.2, (0.8, 0.9), 1e-6, 0.1, True))
    ours, theirs = ends(
        lambda library: getattr(library, name)([nn.Parameter(torch.ones(2))], *arguments)
    )
    assert ours.defaults == theirs.defaults
    assert list(ours.param_groups[0]) == list(theirs.param_groups[0])
    assert {k: v for k, v in ours.param_groups[0].items() if k != "params"} == ours.defaults
    ours, theirs = ends(lambda library: getattr(library, name)([nn.Parameter(torch.ones(2))]))
    assert ours.defaults == theirs.defaults
    assert repr(ours) == repr(theirs)


BAD_PARAMETERS = [
    (lambda: torch.ones(2)),
    list,
    (lambda: [3]),
    (lambda: [{"params": {nn.Parameter(torch.ones(2))}}]),
    (lambda: 3),
    (lambda: [torch.ones(2, requires_grad=True) * 2]),
    (lambda: [{}]),
    (lambda: ["weight"]),
    (lambda: [("w", nn.Parameter(torch.ones(2))), nn.Parameter(torch.ones(2))]),
    (lambda: [[nn.Parameter(torch.ones(2))]]),
    (lambda: [{"params": [(p := nn.Parameter(torch.ones(2)))]}, {"params": [p]}]),
]


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("make", BAD_PARAMETERS, ids=range(len(BAD_PARAMETERS)))
def test_errors_for_parameters_are_of_the_types_that_torch_raises(name, make):
    kinds = []
    for library in (onepass, torch.optim):
        with pytest.raises((ValueError, TypeError, RuntimeError, KeyError)) as caught:
            getattr(library, name)(make())
        kinds.append(caught.type)
    assert issubclass(*kinds)


@EVERY
@pytest.mark.parametrize("mode", ["foreach", "fused", "capturable", "maximize"])
@pytest.mark.parametrize("value", [True, False])
def test_modes_are_accepted(algorithm, mode, value):
    if mode not in inspect.signature(getattr(torch.optim, ALGORITHMS[algorithm][0])).parameters:
        pytest.skip("there is no such option in torch")
    plain = make_side(onepass, algorithm, **({"maximize": value} if mode == "maximize" else {}))
    side = make_side(onepass, algorithm, **{mode: value})
    for s in (plain, side):
        s.step()
        s.step()
    assert side.opt.param_groups[0][mode] is value
    assert all(torch.equal(p, q) for p, q in zip(side.params, plain.params, strict=True))


@EVERY
def test_eager_backend_agrees(algorithm):
    sides = both(algorithm)
    on_eager_backend(sides[0].opt)
    on_both(sides, lambda side: [side.step() for _ in range(4)])
    assert_same(sides)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_flags_that_are_ones(name):
    """torch takes anything that is true for a flag."""

    def run(library):
        model = make_model()
        train(model, getattr(library, name)(model.parameters(), lr=0.1, amsgrad=1, maximize=0), 3)
        return weights(model)

    torch.testing.assert_close(*ends(run), **CLOSE)


# Attributes, re-made classes, re-assigned steps.


@EVERY
def test_attributes(algorithm):
    side = make_side(onepass, algorithm)
    for name in (
        "param_groups",
        "defaults",
        "state",
        "step",
        "state_dict",
        "load_state_dict",
        "zero_grad",
    ):
        assert hasattr(side.opt, name)
    side.opt.anything = 3
    assert side.opt.__dict__["anything"] == 3
    side.step()


@LIBRARIES
@pytest.mark.parametrize("attribute", ["name", "flags", "rule", "anything"])
def test_attributes_of_the_users_own(library, attribute):
    """People keep notes on optimizers, under common words."""
    model = make_model()
    opt = library.AdamW(model.parameters())
    setattr(opt, attribute, "mine")
    train(model, opt, 2)
    assert getattr(opt, attribute) == "mine"


@EVERY
def test_class_made_again_around_an_optimizer(algorithm):
    """As lightning's Fabric does."""

    class Wrapper:
        def __init__(self, optimizer):
            self._optimizer = optimizer
            self.__class__ = type(
                "Fabric" + optimizer.__class__.__name__, (self.__class__, optimizer.__class__), {}
            )

        def step(self, closure=None):
            return self._optimizer.step(**({} if closure is None else {"closure": closure}))

        def state_dict(self):
            return self._optimizer.state_dict()

        def __getattr__(self, item):
            return getattr(self._optimizer, item)

    sides = both(algorithm)

    def wrapped(side):
        side.opt = Wrapper(side.opt)
        assert isinstance(side.opt, torch.optim.Optimizer)
        scheduler = lr_scheduler.StepLR(side.opt, 1)
        for _ in range(3):
            side.step()
            scheduler.step()

    on_both(sides, wrapped)
    assert_same(sides)


@EVERY
def test_step_assigned_on_the_instance(algorithm):
    sides = both(algorithm)

    def patched(side):
        calls = []
        step = side.opt.step

        def counted(self, *args, **kwargs):
            calls.append(args)
            return step(*args, **kwargs)

        side.opt.step = types.MethodType(counted, side.opt)
        side.step()
        side.step()
        side.opt = copy.copy(side.opt)
        side.step()
        assert len(calls) == 2

    on_both(sides, patched)
    assert_same(sides)


def test_subclass_with_its_own_step():
    class Counting(onepass.AdamW):
        count = 0

        def step(self, closure=None):
            self.count += 1
            return super().step(closure)

    seen = []
    model = make_model()
    opt = Counting(model.parameters(), lr=0.1)
    opt.register_step_pre_hook(lambda *a: seen.append("pre"))
    train(model, opt, 2)
    reference = make_model()
    train(reference, onepass.AdamW(reference.parameters(), lr=0.1), 2)
    assert opt.count == 2
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(reference), strict=True))

    class TorchCounting(torch.optim.AdamW):
        def step(self, closure=None):
            return super().step(closure)

    theirs = []
    model = make_model()
    opt = TorchCounting(model.parameters())
    opt.register_step_pre_hook(lambda *a: theirs.append("pre"))
    train(model, opt, 2)
    assert seen == theirs


@LIBRARIES
def test_zero_grad(library):
    model = make_model()
    opt = library.AdamW(model.parameters())
    assert "set_to_none" in inspect.signature(opt.zero_grad).parameters
    train(model, opt, 1)
    held = [p.grad for p in model.parameters()]
    opt.zero_grad(set_to_none=False)
    assert all(p.grad is g and not g.any() for p, g in zip(model.parameters(), held, strict=True))
    model(torch.ones(1, 4)).sum().backward(create_graph=False)
    opt.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    p = next(model.parameters())
    p.grad = torch.ones_like(p).requires_grad_() * 2
    opt.zero_grad(set_to_none=False)
    assert not p.grad.requires_grad
    with torch.autograd.profiler.profile() as profile:
        opt.zero_grad()
    assert "Optimizer.zero_grad#AdamW.zero_grad" in {
        event.name for event in profile.function_events
    }


def test_profiling_range():
    model = make_model()
    opt = onepass.AdamW(model.parameters())
    train(model, opt, 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(model, opt, 2)
    events = [event.name for event in profile.events()]
    assert events.count("Optimizer.step#AdamW.step") == 2


@LIBRARIES
def test_closure(library):
    """It runs with gradients on, and its value is returned, also under no_grad."""
    model = make_model()
    opt = library.SGD(model.parameters(), lr=0.1)

    def closure():
        assert torch.is_grad_enabled()
        opt.zero_grad()
        loss = model(torch.ones(1, 4)).square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = opt.step(closure)
        assert not torch.is_grad_enabled()
    assert opt.step(closure=closure) < loss
    assert opt.step() is None
    assert torch.is_grad_enabled()


# Hooks.


@LIBRARIES
def test_step_hooks(library):
    """In this order; a pre-hook may change the arguments."""
    seen = []
    p = nn.Parameter(torch.ones(2))
    opt = library.SGD([p], lr=0.1)
    handles = [
        register_optimizer_step_pre_hook(lambda o, a, k: seen.append("global pre")),
        register_optimizer_step_post_hook(lambda o, a, k: seen.append("global post")),
        opt.register_step_pre_hook(lambda o, a, k: seen.append(("pre", o is opt, a[1:], k))),
        opt.register_step_post_hook(lambda o, a, k: seen.append(("post", k))),
        opt.register_step_pre_hook(
            lambda o, a, k: (a, {"closure": lambda: seen.append("closure") or 7})
        ),
    ]
    try:
        assert opt.step() == 7
    finally:
        for handle in handles:
            handle.remove()
    names = [s if isinstance(s, str) else s[0] for s in seen]
    assert names == ["global pre", "pre", "closure", "post", "global post"]
    assert seen[1] == ("pre", True, (), {})
    assert list(seen[3][1]) == ["closure"]
    seen.clear()
    opt.step()
    assert not seen
    opt.register_step_pre_hook(lambda o, a, k: 3)
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        opt.step()


@LIBRARIES
def test_state_dict_hooks(library):
    seen = []
    p = nn.Parameter(torch.ones(2))
    opt = library.AdamW([p], lr=0.1)
    opt.register_state_dict_pre_hook(lambda o: seen.append("pre 2"))
    opt.register_state_dict_pre_hook(lambda o: seen.append("pre 1"), prepend=True)
    opt.register_state_dict_post_hook(lambda o, d: seen.append("post 2"))
    opt.register_state_dict_post_hook(
        lambda o, d: (seen.append("post 1"), {**d, "more": 3})[1], prepend=True
    )
    state_dict = opt.state_dict()
    assert seen == ["pre 1", "pre 2", "post 1", "post 2"]
    assert state_dict["more"] == 3
    seen.clear()

    def halve(o, d):
        seen.append("load 2")
        d["param_groups"] = [{**g, "lr": g["lr"] / 2} for g in d["param_groups"]]
        return d

    opt.register_load_state_dict_pre_hook(halve)
    opt.register_load_state_dict_pre_hook(lambda o, d: seen.append("load 1"), prepend=True)
    opt.register_load_state_dict_post_hook(lambda o: seen.append("done 2"))
    opt.register_load_state_dict_post_hook(lambda o: seen.append("done 1"), prepend=True)
    opt.load_state_dict(state_dict)
    assert seen == ["load 1", "load 2", "done 1", "done 2"]
    assert opt.param_groups[0]["lr"] == 0.05
    assert state_dict["param_groups"][0]["lr"] == 0.1


# Schedulers.


def has_momentum(opt: Any) -> bool:
    return bool({"momentum", "betas"} & set(opt.defaults))


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "lambda": lambda opt: lr_scheduler.LambdaLR(opt, lambda k: 0.9**k),
    "step": lambda opt: lr_scheduler.StepLR(opt, 2, 0.5),
    "cosine": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 6),
    "warm": lambda opt: lr_scheduler.SequentialLR(
        opt,
        [lr_scheduler.LinearLR(opt, 0.1, total_iters=2), lr_scheduler.ExponentialLR(opt, 0.8)],
        [2],
    ),
    "one cycle": lambda opt: lr_scheduler.OneCycleLR(
        opt, 0.1, total_steps=10, cycle_momentum=has_momentum(opt)
    ),
    "cyclic": lambda opt: lr_scheduler.CyclicLR(
        opt, 0.01, 0.1, step_size_up=2, cycle_momentum=has_momentum(opt)
    ),
    "plateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, patience=0),
}


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@EVERY
def test_schedulers(algorithm, scheduler, tensor_lr):
    """No warning of the wrong order, and the same weights and options."""

    def run(library):
        model = make_model()
        name, options = ALGORITHMS[algorithm]
        lr = torch.tensor(0.05) if tensor_lr else 0.05
        opt = getattr(library, name)(model.parameters(), **options | {"lr": lr})
        schedule = SCHEDULERS[scheduler](opt)
        losses = iter([3.0, 2.0, 2.5, 2.6, 2.7, 1.0, 1.1])
        train(
            model,
            opt,
            6,
            after=lambda: schedule.step(*([next(losses)] if scheduler == "plateau" else [])),
        )
        group = {
            k: float(v) if isinstance(v, torch.Tensor) else v
            for k, v in opt.param_groups[0].items()
            if k != "params"
        }
        return weights(model), group, isinstance(opt.param_groups[0]["lr"], torch.Tensor)

    with warnings.catch_warnings():
        if scheduler == "warm":
            warnings.filterwarnings("ignore", message="The epoch parameter")
        ours, theirs = ends(run)
    torch.testing.assert_close(ours[0], theirs[0], **CLOSE)
    assert ours[1:] == theirs[1:]


@LIBRARIES
def test_scheduler_wants_the_momentum_in_the_defaults(library):
    p = nn.Parameter(torch.ones(2))
    assert "betas" in library.AdamW([p]).defaults
    assert "momentum" in library.SGD([p]).defaults
    with pytest.raises(TypeError):
        lr_scheduler.StepLR(object(), 3)
    lr_scheduler.StepLR(library.SGD([p]), 3)


def test_tensor_lr_is_nobody_elses():
    """Neither a loaded one nor a saved one shares memory with another optimizer's, or with
    initial_lr."""
    model = make_model()
    opt = onepass.AdamW(model.parameters(), lr=torch.tensor(0.1))
    lr_scheduler.StepLR(opt, 1)
    group = opt.param_groups[0]
    group["lr"].fill_(0.3)
    assert float(group["initial_lr"]) == pytest.approx(0.1)
    saved = opt.state_dict()
    other = onepass.AdamW(make_model().parameters(), lr=torch.tensor(0.2))
    other.load_state_dict(saved)
    third = onepass.AdamW(make_model().parameters(), lr=torch.tensor(0.2))
    third.load_state_dict(saved)
    other.param_groups[0]["lr"].fill_(0.7)
    assert float(group["lr"]) == pytest.approx(0.3)
    assert float(third.param_groups[0]["lr"]) == pytest.approx(0.3)
    assert float(other.param_groups[0]["initial_lr"]) == pytest.approx(0.1)


@EVERY
def test_tensor_lr_and_in_place_changes(algorithm):
    sides = both(algorithm, lr=torch.tensor(0.05))

    def run(side):
        side.opt.param_groups[0]["lr"] = torch.tensor(0.05)
        for k in range(4):
            side.opt.param_groups[0]["lr"].mul_(0.5 + 0.1 * k)
            side.step()

    on_both(sides, run)
    assert_same(sides)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_tensor_betas(shape):
    def run(library):
        model = make_model()
        betas = (torch.full(shape, 0.8), torch.full(shape, 0.9))
        opt = library.AdamW(model.parameters(), lr=torch.full(shape, 0.1), betas=betas)
        train(model, opt, 3)
        return weights(model)

    torch.testing.assert_close(*ends(run), **CLOSE)


# Parameter groups.


@EVERY
def test_groups_with_options_of_their_own(algorithm):
    name, options = ALGORITHMS[algorithm]

    def run(library):
        model = make_model()
        groups = [
            {"params": model[0].parameters(), "lr": 0.01},
            {"params": [model[2].weight], "weight_decay": 0.3, "maximize": True, "note": "kept"},
            {"params": model[2].bias},
        ]
        opt = getattr(library, name)(groups, **options)
        train(model, opt, 3)
        assert opt.param_groups[1]["note"] == "kept"
        extra = nn.Parameter(torch.ones(3))
        opt.add_param_group({"params": extra, "lr": 0.5})
        for _ in range(2):
            extra.grad = torch.ones(3)
            opt.step()
        return [*weights(model), extra.detach()]

    torch.testing.assert_close(*ends(run), **CLOSE)


@LIBRARIES
@pytest.mark.parametrize("name", CLASSES)
def test_named_parameters(library, name):
    model = make_model()
    opt = getattr(library, name)(model.named_parameters(), lr=0.1)
    names = [name for name, _ in model.named_parameters()]
    assert opt.param_groups[0]["param_names"] == names
    assert opt.param_groups[0]["params"] == list(model.parameters())
    assert opt.state_dict()["param_groups"][0]["param_names"] == names
    extra = nn.Parameter(torch.ones(2))
    opt.add_param_group({"params": [("extra", extra)]})
    assert opt.param_groups[1]["param_names"] == ["extra"]
    with pytest.raises(ValueError, match="names"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    train(model, opt, 1)


def test_parameter_list_replaced_by_the_framework():
    """Sharding frameworks put their own parameters into the groups before the first step, or after
    it."""
    for steps_before in (0, 2):
        model, other = make_model(), make_model(1)
        opt = onepass.AdamW(model.parameters(), lr=0.1)
        train(model, opt, steps_before)
        opt.state.clear()
        opt.param_groups[0]["params"] = list(other.parameters())
        before, reference = weights(model), make_model(1)
        train(other, opt, 2)
        train(reference, onepass.AdamW(reference.parameters(), lr=0.1), 2)
        assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
        assert all(
            torch.equal(a, b) for a, b in zip(weights(other), weights(reference), strict=True)
        )
        assert len(opt.state_dict()["state"]) == 4


# State.


@EVERY
def test_state_has_torchs_names_types_and_places(algorithm):
    sides = both(algorithm)
    on_both(sides, lambda side: side.step())
    ours, theirs = (side.opt.state_dict()["state"] for side in sides)
    assert set(ours) == set(theirs)
    for key in theirs:
        for name, value in theirs[key].items():
            mine = ours[key][name]
            assert (type(mine), mine.dtype, mine.shape, mine.device) == (
                type(value),
                value.dtype,
                value.shape,
                value.device,
            )
            assert mine.stride() == value.stride()
            assert not mine.requires_grad


@pytest.mark.parametrize("name", [name for name in CLASSES if name != "Adagrad"])
def test_state_dict_of_an_empty_state(name):
    model = make_model()
    opt = getattr(onepass, name)(model.parameters(), lr=0.1)
    state_dict = opt.state_dict()
    assert state_dict["state"] == {}
    opt.load_state_dict(state_dict=state_dict)
    assert len(opt.state) == 0
    train(model, opt, 2)
    reference = make_model()
    train(reference, getattr(onepass, name)(reference.parameters(), lr=0.1), 2)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(reference), strict=True))


def test_state_that_is_there_from_the_beginning():
    """Adagrad's: saved and loaded before any step, and made for groups that come later where they
    first step."""
    sides = both("adagrad")
    assert_same(sides)
    assert all(len(side.opt.state) == len(side.params) for side in sides)
    fresh = both("adagrad", initial_accumulator_value=3.0)
    for side, other in zip(sides, fresh, strict=True):
        other.opt.load_state_dict(copy.deepcopy(side.opt.state_dict()))
    assert_same(fresh)

    def grow(side):
        side.step()
        side.params.append(nn.Parameter(side.randn(3)))
        side.opt.add_param_group({"params": side.params[-1]})
        side.step()
        side.step()

    for pair in (sides, fresh):
        on_both(pair, grow)
        assert_same(pair)


@EVERY
def test_state_tensors_moved_but_the_step(algorithm):
    """As lightning does, to any device: here a copy of each."""
    sides = both(algorithm)

    def run(side):
        side.step()
        for entry in side.opt.state.values():
            for name, value in entry.items():
                if isinstance(value, torch.Tensor) and name != "step":
                    entry[name] = value.clone()
        side.step()

    on_both(sides, run)
    assert_same(sides)


@EVERY
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
def test_state_initialised_by_a_step_of_no_effect(algorithm, tensor_lr):
    """torch.distributed.checkpoint makes state by a step with zero gradients and lr 0: weights keep
    their bits."""
    from torch.distributed.checkpoint.state_dict import _init_optim_state

    lr = torch.tensor(0.1) if tensor_lr else 0.1
    side = make_side(onepass, algorithm, lr=lr)
    with torch.no_grad():
        side.params[1].copy_(torch.tensor([-0.0, 0.0, 1e20, 1e-42, -1e10]))
    before = [p.detach().clone().reshape(-1).view(torch.int32) for p in side.params]
    _init_optim_state(side.opt)
    assert all(
        torch.equal(p.detach().reshape(-1).view(torch.int32), b)
        for p, b in zip(side.params, before, strict=True)
    )
    assert side.opt.param_groups[0]["lr"] is lr
    assert all(p.grad is None for p in side.params)
    assert len(side.opt.state) == (0 if algorithm == "sgd" else 4)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@EVERY
@pytest.mark.parametrize("flatten", [False, True])
def test_distributed_checkpoint_state_dicts(algorithm, flatten):
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    name, options = ALGORITHMS[algorithm]
    choice = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = make_model()
    opt = getattr(onepass, name)(model.parameters(), **options)
    train(model, opt, 3)
    saved = copy.deepcopy(get_optimizer_state_dict(model, opt, options=choice))
    resumed = make_model()
    resumed.load_state_dict(model.state_dict())
    fresh = getattr(onepass, name)(resumed.parameters(), **options)
    before = weights(resumed)
    set_optimizer_state_dict(resumed, fresh, saved, options=choice)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(resumed), strict=True))
    train(model, opt, 3, seed=2)
    train(resumed, fresh, 3, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(resumed), strict=True))


def through_a_file(state_dict: dict) -> dict:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@EVERY
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize(
    ("saver", "loader"), [(onepass, onepass), (onepass, torch.optim), (torch.optim, onepass)]
)
def test_checkpoints_in_the_middle_of_a_run(algorithm, saver, loader, tensor_lr):
    """Saved by one library and loaded by another, the run ends where the uninterrupted one does."""
    name, options = ALGORITHMS[algorithm]
    options = options | {"lr": torch.tensor(options["lr"])} if tensor_lr else options
    model = make_model()
    opt = getattr(saver, name)(model.parameters(), **options)
    schedule = lr_scheduler.ExponentialLR(opt, 0.9)
    train(model, opt, 4, after=schedule.step)
    checkpoint = through_a_file({"opt": opt.state_dict(), "schedule": schedule.state_dict()})
    resumed = make_model(5)
    resumed.load_state_dict(model.state_dict())
    other = getattr(loader, name)(resumed.parameters(), **options | {"lr": 123.0})
    again = lr_scheduler.ExponentialLR(other, 0.9)
    other.load_state_dict(checkpoint["opt"])
    again.load_state_dict(checkpoint["schedule"])
    train(model, opt, 4, seed=2, after=schedule.step)
    train(resumed, other, 4, seed=2, after=again.step)
    tolerance = {"rtol": 0, "atol": 0} if saver is loader else CLOSE
    torch.testing.assert_close(weights(resumed), weights(model), **tolerance)
    assert float(other.param_groups[0]["lr"]) == pytest.approx(float(opt.param_groups[0]["lr"]))


def crossing(
    algorithm: str, library_at: Callable[[int], Any]
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Twenty steps with a changing lr and parameters that freeze and thaw; libraries hand on their
    state."""
    name, options = ALGORITHMS[algorithm]
    model, random = make_model(), torch.Generator().manual_seed(1)
    opt = library = None
    for k in range(20):
        if library_at(k) is not library:
            saved = None if opt is None else through_a_file(opt.state_dict())
            library = library_at(k)
            opt = getattr(library, name)(model.parameters(), **options)
            if saved is not None:
                opt.load_state_dict(saved)
        model[0].requires_grad_(k >= 4)
        model[2].bias.requires_grad_(k not in (9, 10, 15))
        opt.param_groups[0]["lr"] = options["lr"] * (0.5 + 0.1 * (k % 7))
        opt.zero_grad()
        model(torch.randn(5, 4, generator=random)).square().mean().backward()
        opt.step()
    return weights(model), opt.state_dict()


@EVERY
@pytest.mark.parametrize("inner", [onepass, torch.optim], ids=["onepass inside", "torch inside"])
def test_runs_that_cross_between_the_libraries(algorithm, inner):
    """The state dict goes over after seven steps and back after thirteen, and the run is torch's
    own."""
    outer = torch.optim if inner is onepass else onepass
    crossed, state_dict = crossing(algorithm, lambda k: inner if 7 <= k < 13 else outer)
    alone, expected = crossing(algorithm, lambda k: torch.optim)
    torch.testing.assert_close(crossed, alone, **CLOSE)
    assert [list(group) for group in state_dict["param_groups"]] == [
        list(group) for group in expected["param_groups"]
    ]
    assert list(state_dict["state"]) == list(expected["state"])
    for key, entry in expected["state"].items():
        assert set(state_dict["state"][key]) == set(entry)
        for name, value in entry.items():
            mine = state_dict["state"][key][name]
            assert (mine.dtype, mine.shape) == (value.dtype, value.shape)
            torch.testing.assert_close(
                mine, value, msg=lambda m, at=(key, name): f"{at}: {m}", **CLOSE
            )


def test_old_checkpoints():
    """Steps that are numbers, a momentum that is None, options that did not exist yet."""
    model = make_model()
    opt = onepass.AdamW(model.parameters(), lr=0.1)
    train(model, opt, 3)
    old = copy.deepcopy(opt.state_dict())
    for entry in old["state"].values():
        entry["step"] = int(entry["step"])
    for key in (
        "foreach",
        "fused",
        "capturable",
        "differentiable",
        "maximize",
        "decoupled_weight_decay",
    ):
        del old["param_groups"][0][key]
    resumed = make_model()
    resumed.load_state_dict(model.state_dict())
    fresh = onepass.AdamW(resumed.parameters())
    fresh.load_state_dict(old)
    train(model, opt, 2, seed=2)
    train(resumed, fresh, 2, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(resumed), strict=True))

    def with_none(library):
        model = make_model()
        opt = library.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5)
        state_dict = opt.state_dict()
        state_dict["state"] = {i: {"momentum_buffer": None} for i in range(4)}
        opt.load_state_dict(state_dict)
        model[0].requires_grad_(False)
        train(model, opt, 2)
        model[0].requires_grad_(True)
        train(model, opt, 2)
        return weights(model)

    torch.testing.assert_close(*ends(with_none), **CLOSE)


def test_parameters_that_never_had_a_gradient():
    def run(library):
        model = make_model()
        model[0].requires_grad_(False)
        opt = library.AdamW(model.parameters(), lr=0.1)
        train(model, opt, 2)
        fresh = library.AdamW(model.parameters())
        fresh.load_state_dict(through_a_file(opt.state_dict()))
        assert sorted(fresh.state_dict()["state"]) == [2, 3]
        model[0].requires_grad_(True)
        train(model, fresh, 2)
        assert [float(e["step"]) for _, e in sorted(fresh.state_dict()["state"].items())] == [
            2.0,
            2.0,
            4.0,
            4.0,
        ]
        return weights(model)

    torch.testing.assert_close(*ends(run), **CLOSE)


def named_run(order: list[str], model: nn.Module, **options: Any) -> onepass.AdamW:
    parameters = dict(model.named_parameters())
    return onepass.AdamW([(name, parameters[name]) for name in order], lr=0.1, **options)


def test_names_match_parameters_in_another_order():
    model = make_model()
    names = [name for name, _ in model.named_parameters()]
    opt = named_run(names, model)
    train(model, opt, 3)
    resumed = make_model()
    resumed.load_state_dict(model.state_dict())
    fresh = named_run(names[::-1], resumed)
    fresh.load_state_dict(through_a_file(opt.state_dict()))
    assert fresh.param_groups[0]["param_names"] == names[::-1]
    train(model, opt, 3, seed=2)
    train(resumed, fresh, 3, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(resumed), strict=True))


def test_positions_match_where_one_side_has_no_names():
    for named_first in (True, False):
        model, resumed = make_model(), make_model()
        makers = [lambda m: m.named_parameters(), lambda m: m.parameters()]
        first, second = makers if named_first else makers[::-1]
        opt = onepass.AdamW(first(model), lr=0.1)
        train(model, opt, 3)
        resumed.load_state_dict(model.state_dict())
        fresh = onepass.AdamW(second(resumed))
        fresh.load_state_dict(opt.state_dict())
        train(model, opt, 2, seed=2)
        train(resumed, fresh, 2, seed=2)
        assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(resumed), strict=True))


def test_names_that_are_missing():
    model = make_model()
    opt = onepass.AdamW(model.named_parameters())
    other = onepass.AdamW([(f"encoder.{name}", p) for name, p in make_model().named_parameters()])
    before = snapshot(other)
    words = r"has a parameter '0\.weight' in group 0 where this optimizer has 'encoder\.0\.weight'"
    with pytest.raises(ValueError, match=words):
        other.check_names(opt.state_dict())
    with pytest.raises(UserWarning, match=words):
        other.load_state_dict(opt.state_dict())
    assert snapshot(other) == before


SPOILED = {
    "shape": (
        lambda d: d["state"][1].update(exp_avg=torch.zeros(9)),
        r"'exp_avg' of parameter '0\.bias' .*\(9,\).*\(8,\)",
    ),
    "step": (lambda d: d["state"][1].update(step=torch.zeros(3)), r"'step' of parameter '0\.bias'"),
    "lost": (lambda d: d["state"][1].pop("exp_avg_sq"), r"parameter '0\.bias' .*'exp_avg_sq'"),
    "none": (
        lambda d: d["state"][1].update(exp_avg_sq=None),
        r"parameter '0\.bias' .*'exp_avg_sq'",
    ),
    "no step": (lambda d: d["state"][1].pop("step"), r"parameter '0\.bias' .*'step'"),
    "no tensor": (lambda d: d["state"][1].update(exp_avg=3.0), r"'exp_avg' of parameter '0\.bias'"),
    "integers": (
        lambda d: d["state"][1].update(exp_avg=torch.zeros(8).int()),
        r"'exp_avg' of parameter '0\.bias'",
    ),
    "foreign": (
        lambda d: d["state"].update({1: {"momentum_buffer": torch.zeros(8)}}),
        r"parameter '0\.bias' .*'momentum_buffer'",
    ),
    "no dict": (lambda d: d["state"].update({1: [1, 2]}), r"parameter '0\.bias'"),
    "groups": (
        lambda d: d["param_groups"].append(d["param_groups"][0]),
        "number of parameter groups",
    ),
    "size": (lambda d: d["param_groups"][0]["params"].pop(), "size"),
    "empty": (dict.clear, "'state' and 'param_groups'"),
    "no params": (lambda d: d["param_groups"][0].pop("params"), "params"),
    "names": (lambda d: d["param_groups"][0]["param_names"].pop(), "names"),
    "twice": (lambda d: d["param_groups"][0]["param_names"].__setitem__(0, "0.bias"), "names"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_state_dicts_that_do_not_fit(what):
    """A ValueError that names the parameter, and nothing has changed."""
    model = make_model()
    opt = onepass.AdamW(model.named_parameters(), lr=0.1)
    train(model, opt, 2)
    state_dict = copy.deepcopy(opt.state_dict())
    spoil, words = SPOILED[what]
    spoil(state_dict)
    target = onepass.AdamW(make_model().named_parameters(), lr=0.3)
    for subject in (target, opt):
        before = snapshot(subject)
        with pytest.raises(ValueError, match=words) as caught:
            subject.load_state_dict(state_dict)
        assert "\n" not in str(caught.value)
        assert snapshot(subject) == before
    train(model, opt, 1)


def test_another_optimizers_state():
    model = make_model()
    sgd = onepass.SGD(model.parameters(), lr=0.1, momentum=0.9)
    adam = onepass.Adam(model.parameters())
    foreign = torch.optim.Adagrad(model.parameters()), torch.optim.RMSprop(model.parameters())
    for opt in (sgd, adam, *foreign):
        train(model, opt, 1)
    for source, target in (
        (sgd, adam),
        (adam, sgd),
        (foreign[0], adam),
        (foreign[0], sgd),
        (foreign[1], adam),
    ):
        before = snapshot(target)
        with pytest.raises(ValueError, match="belongs to another optimizer"):
            target.load_state_dict(source.state_dict())
        assert snapshot(target) == before


def test_float32_state_of_bfloat16_parameters():
    """It stays as it was saved, where torch would round it to the parameter's dtype."""
    model = make_model(dtype=torch.bfloat16)
    opt = onepass.AdamW(model.parameters(), lr=0.1)
    train(model, opt, 2)
    for entry in opt.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            entry[name] = entry[name].float() * 1.001
    train(model, opt, 1)
    fresh_model = make_model(dtype=torch.bfloat16)
    fresh_model.load_state_dict(model.state_dict())
    fresh = onepass.AdamW(fresh_model.parameters())
    fresh.load_state_dict(through_a_file(opt.state_dict()))
    for entry, other in zip(opt.state.values(), fresh.state.values(), strict=True):
        assert other["exp_avg"].dtype == torch.float32
        assert torch.equal(entry["exp_avg"], other["exp_avg"])
        assert entry["exp_avg"].data_ptr() != other["exp_avg"].data_ptr()
    train(model, opt, 2, seed=2)
    train(fresh_model, fresh, 2, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(fresh_model), strict=True))


def test_loading_shares_nothing_with_the_dict():
    model = make_model()
    opt = onepass.AdamW(model.parameters(), lr=0.1)
    train(model, opt, 2)
    state_dict = opt.state_dict()
    other_model = make_model()
    other = onepass.AdamW(other_model.parameters())
    other.load_state_dict(state_dict)
    before = snapshot(opt)
    train(other_model, other, 2)
    assert snapshot(opt) == before


# Pickles, copies.


@EVERY
@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save"])
def test_pickles_and_copies(algorithm, how):
    def through(x):
        if how == "torch.save":
            file = io.BytesIO()
            torch.save(x, file)
            file.seek(0)
            return torch.load(file, weights_only=False)
        return copy.deepcopy(x) if how == "deepcopy" else pickle.loads(pickle.dumps(x))

    name, options = ALGORITHMS[algorithm]
    model = make_model()
    opt = getattr(onepass, name)(model.parameters(), **options)
    train(model, opt, 2)
    other_model, other = through((model, opt))
    assert type(other) is type(opt)
    before = snapshot(opt)
    train(other_model, other, 2, seed=2)
    assert snapshot(opt) == before
    train(model, opt, 2, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(other_model), strict=True))
    schedule = lr_scheduler.StepLR(other, 1)
    train(other_model, other, 1, after=schedule.step)


# Mixed precision.


@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize("unscale_first", [False, True])
@EVERY
def test_grad_scaler(algorithm, fused, unscale_first):
    """A step with an infinite gradient changes nothing at all; others divide by the scale, once."""
    name, options = ALGORITHMS[algorithm]
    if fused and "fused" not in inspect.signature(getattr(torch.optim, name)).parameters:
        pytest.skip("there is no such option in torch")

    def run(library):
        model = make_model()
        # torch's fused SGD forgets to make its momentum where the first step is skipped.
        mode = {"fused": True} if fused and library is onepass else {}
        opt = getattr(library, name)(model.parameters(), **options, **mode)
        scaler = torch.amp.GradScaler("cpu", init_scale=1000.0, growth_interval=2)
        random = torch.Generator().manual_seed(1)
        scales = []
        for k in range(6):
            opt.zero_grad()
            loss = model(torch.randn(5, 4, generator=random)).square().mean()
            scaler.scale(loss).backward()
            if k in (0, 3):
                model[0].weight.grad[0, 0] = float("inf")
            before = snapshot(opt)
            grads = [p.grad.clone() for p in model.parameters()]
            if unscale_first:
                scaler.unscale_(opt)
            scaler.step(opt)
            if k in (0, 3) and library is onepass:
                after = snapshot(opt)
                assert (after[0], after[2], after[3]) == (before[0], before[2], before[3])
            if fused and not unscale_first and library is onepass:
                assert all(
                    torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True)
                )
            scaler.update()
            scales.append(scaler.get_scale())
        assert not hasattr(opt, "found_inf")
        assert not hasattr(opt, "grad_scale")
        return weights(model), scales, [float(e["step"]) for e in opt.state.values() if "step" in e]

    ours, theirs = ends(run)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5)
    assert ours[1] == theirs[1]
    assert set(ours[2]) <= {4.0}


def asked_by(module: str, opt: Any) -> bool:
    """What a module of this name is told when it asks, as GradScaler and frameworks do."""
    question = "answer = getattr(opt, '_step_supports_amp_scaling', False)"
    space = {"__name__": module, "opt": opt}
    exec(question, space)
    return space["answer"]


def test_grad_scaler_alone_is_told_that_steps_unscale() -> None:
    """Lightning takes the same answer for a refusal of gradients that are unscaled already, and
    does not clip them."""

    def make(**options: Any) -> Any:
        return onepass.AdamW([nn.Parameter(torch.ones(1))], **options)

    for opt in (
        make(fused=True),
        make(capturable=True),
        pickle.loads(pickle.dumps(make(fused=True))),
    ):
        assert asked_by("torch.amp.grad_scaler", opt)
        assert not asked_by("lightning.pytorch.plugins.precision.amp", opt)
    assert not asked_by("torch.amp.grad_scaler", make())
    told = make()
    told._step_supports_amp_scaling = True
    assert asked_by("anybody", told)


# Autograd through the step.


def unrolled(
    algorithm: str, options: dict[str, Any], gradient: Callable, p: torch.Tensor, steps: int
) -> torch.Tensor:
    """The textbook's lines, out of place. torch.optim detaches the first momentum and rounds step
    counts to float32."""
    lr, decay = options["lr"], options["weight_decay"]
    m, v = None, torch.zeros_like(p)
    for k in range(1, steps + 1):
        g = gradient(p)
        if algorithm in ("momentum", "nesterov"):
            g = g + decay * p
            m = g if m is None else options["momentum"] * m + (1 - options.get("dampening", 0)) * g
            p = p - lr * (g + options["momentum"] * m if options.get("nesterov") else m)
            continue
        if algorithm == "adamw":
            p = p * (1 - lr * decay)
        else:
            g = g + decay * p
        m = 0.1 * g if m is None else 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g * g
        p = p - lr * (m / (1 - 0.9**k)) / ((v / (1 - 0.999**k)).sqrt() + 1e-8)
    return p


@pytest.mark.parametrize("algorithm", ["momentum", "nesterov", "adam", "adamw"])
def test_differentiable(algorithm):
    """Three steps: the derivative of a later loss by lr, by weight_decay, and by the first
    weights."""
    name, options = ALGORITHMS[algorithm]

    def run(optimizer):
        torch.manual_seed(0)
        first = torch.randn(4, 3, requires_grad=True, dtype=torch.float64)
        lr = torch.tensor(0.05, requires_grad=True, dtype=torch.float64)
        decay = torch.tensor(0.1, requires_grad=True, dtype=torch.float64)
        x = torch.randn(7, 4, dtype=torch.float64)

        def gradient(p):
            return torch.autograd.grad((x @ p).tanh().square().sum(), p, create_graph=True)[0]

        p = first.clone()
        if optimizer is None:
            p = unrolled(algorithm, options | {"lr": lr, "weight_decay": decay}, gradient, p, 3)
        else:
            opt = optimizer(
                [p], **options | {"lr": lr, "weight_decay": decay, "differentiable": True}
            )
            for _ in range(3):
                p.grad = gradient(p)
                opt.step()
        loss = (x @ p).square().sum()
        return loss.detach(), *torch.autograd.grad(loss, (lr, decay, first))

    ours, textbook = run(getattr(onepass, name)), run(None)
    torch.testing.assert_close(ours, textbook, rtol=1e-9, atol=1e-11)
    if algorithm in ("adam", "adamw"):
        torch.testing.assert_close(ours, run(getattr(torch.optim, name)), rtol=1e-4, atol=1e-4)


@EVERY
@pytest.mark.parametrize("by", ["weights", "lr"])
def test_derivatives_are_slopes(algorithm, by):
    """Through three steps, by lr and along a direction in the first weights: autograd says what
    differences say."""
    name, options = ALGORITHMS[algorithm]
    if by == "lr" and name in ("ASGD", "Rprop"):
        pytest.skip("the state holds lr, as a number")
    x, first, direction = (
        torch.randn(shape, dtype=torch.float64) for shape in ((7, 4), (4, 3), (4, 3))
    )

    def loss(t):
        p = first + (t * direction if by == "weights" else 0.0 * t)
        lr = torch.tensor(options["lr"], dtype=torch.float64) + (t if by == "lr" else 0.0)
        opt = getattr(onepass, name)([p], **options | {"lr": lr}, differentiable=True)
        for _ in range(3):
            p.grad = torch.autograd.grad((x @ p).tanh().square().sum(), p, create_graph=True)[0]
            opt.step()
        return (x @ p).square().sum()

    def at(t):
        return torch.tensor(t, dtype=torch.float64, requires_grad=True)

    t = at(0.0)
    slope = torch.autograd.grad(loss(t), t)[0]
    # The error of a central difference: h^2 from the curve, 2^-52 / h from rounding.
    h = 1e-5
    difference = loss(at(h)).detach() - loss(at(-h)).detach()
    torch.testing.assert_close(slope, difference / (2 * h), rtol=1e-6, atol=1e-6)


@LIBRARIES
def test_not_differentiable_makes_no_graph(library):
    p = nn.Parameter(torch.ones(3))
    opt = library.AdamW([p], lr=0.1)
    p.grad = torch.ones(3, requires_grad=True) * 2
    opt.step()
    assert p.is_leaf
    assert not any(t.requires_grad for t in opt.state[p].values())


# Odd tensors.


@EVERY
def test_complex_parameters(algorithm):
    for dtype in (torch.complex64, torch.complex128):
        sides = both(algorithm, ((4, 3), (), (5,)), dtype)
        on_both(sides, lambda side: [side.step() for _ in range(4)])
        assert_same(sides)


@pytest.mark.parametrize("name", NAMES[1:])
def test_sparse_gradients(name):
    messages = []
    for library in (onepass, torch.optim):
        embedding = nn.Embedding(5, 3, sparse=True)
        opt = getattr(library, name)(embedding.parameters())
        embedding(torch.tensor([1, 2])).sum().backward()
        before = embedding.weight.detach().clone()
        with pytest.raises(RuntimeError) as caught:
            opt.step()
        assert torch.equal(embedding.weight, before)
        messages.append(str(caught.value))
    assert "does not support sparse gradients" in messages[0]
    assert messages[1].split(" ", 1)[1] in messages[0]


class Tagged(torch.Tensor):
    """A tensor subclass that keeps its class through all operations."""


@EVERY
def test_tensor_subclasses_step_on_the_eager_backend(algorithm):
    name, options = ALGORITHMS[algorithm]
    results = []
    for library in (onepass, torch.optim):
        torch.manual_seed(0)
        params = [
            torch.randn(4, 3).as_subclass(Tagged).requires_grad_(),
            torch.randn(5).as_subclass(Tagged).requires_grad_(),
        ]
        opt = getattr(library, name)(params, **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                for p in params:
                    p.grad = torch.randn(p.shape).as_subclass(Tagged)
                opt.step()
        ours = [w for w in caught if "eager backend" in str(w.message)]
        assert len(ours) == (library is onepass)
        results.append([p.detach().as_subclass(torch.Tensor) for p in params])
    torch.testing.assert_close(*results, **CLOSE)


def test_capturable():
    sides = (make_side(onepass, "adamw", capturable=True), make_side(torch.optim, "adamw"))
    on_both(sides, lambda side: [side.step() for _ in range(3)])
    assert_same(sides)


# torch.compile.

COMPILED = """
import warnings, torch, onepass
from torch._dynamo.utils import counters
warnings.simplefilter("ignore")

def model(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))

def run(backend, inside, error):
    net = model()
    opt = onepass.AdamW(net.parameters(), lr=0.1)
    def forward(x):
        loss = net(x).square().mean()
        if inside:
            loss.backward()
            opt.step()
            opt.zero_grad()
        return loss
    step = torch.compile(forward, backend=backend) if backend else forward
    random = torch.Generator().manual_seed(1)
    compiled = []
    for k in range(10):
        opt.param_groups[0]["lr"] = 0.1 / (k + 1)
        x = torch.randn(5, 4, generator=random)
        if k == 3 and error:
            torch._dynamo.config.error_on_recompile = True
        loss = step(x)
        if not inside:
            loss.backward()
            opt.step()
            opt.zero_grad()
        compiled.append(counters["stats"]["unique_graphs"])
    torch._dynamo.config.error_on_recompile = False
    assert compiled[-1] == compiled[3], compiled
    return [p.detach().clone() for p in net.parameters()]

for inside in (False, True):
    want = run(None, inside, False)
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        counters.clear()
        got = run(backend, inside, True)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        print("ok", inside, backend)

# The step alone.
net = model()
opt = onepass.AdamW(net.parameters(), lr=0.1)
reference = model()
other = onepass.AdamW(reference.parameters(), lr=0.1)
torch._dynamo.reset()
counters.clear()
step = torch.compile(lambda: opt.step(), backend="eager")
for k in range(5):
    for p, q in zip(net.parameters(), reference.parameters()):
        p.grad = torch.full_like(p, k + 1.0)
        q.grad = torch.full_like(p, k + 1.0)
    step()
    other.step()
assert all(torch.equal(p, q) for p, q in zip(net.parameters(), reference.parameters()))
print("ok step")
"""


def test_compile():
    assert run_script(COMPILED).count("ok") == 5


# Shards.

SHARDED = """
import os, sys, warnings, torch, torch.distributed as dist
rank, size, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
warnings.simplefilter("ignore")
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict
import onepass

mesh = init_device_mesh("cpu", (size,))

def run(library, name, options, reload=False):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    fully_shard(net[0], mesh=mesh)
    fully_shard(net, mesh=mesh)
    opt = getattr(library, name)(net.parameters(), **options)
    random = torch.Generator().manual_seed(rank)
    for k in range(4):
        net(torch.randn(5, 4, generator=random)).square().mean().backward()
        opt.step()
        opt.zero_grad()
        if reload and k == 1:
            saved = get_optimizer_state_dict(net, opt)
            opt = getattr(library, name)(net.parameters(), **options)
            set_optimizer_state_dict(net, opt, saved)
    return net, opt

CASES = (
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("AdamW", {"lr": 0.1, "amsgrad": True}),
    ("Adam", {"lr": 0.1}),
    ("Adagrad", {"lr": 0.1, "initial_accumulator_value": 0.1}),
    ("NAdam", {"lr": 0.1}),
    ("ASGD", {"lr": 0.1, "t0": 1}),
)
for name, options in CASES:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net, opt = run(onepass, name, options)
    told = [w for w in caught if "eager backend" in str(w.message)]
    assert len(told) <= 1, [str(w.message) for w in told]
    reference, other = run(torch.optim, name, options)
    for p, q in zip(net.parameters(), reference.parameters()):
        assert isinstance(p, DTensor)
        torch.testing.assert_close(p.full_tensor(), q.full_tensor(), rtol=2e-5, atol=2e-6)
        for key, value in other.state[q].items():
            mine = opt.state[p][key]
            assert type(mine) is type(value), (key, type(mine), type(value))
            if isinstance(value, DTensor):
                assert mine.placements == p.placements and mine.device_mesh == p.device_mesh
                both = mine.full_tensor(), value.full_tensor()
                torch.testing.assert_close(*both, rtol=2e-5, atol=2e-6)
            else:
                torch.testing.assert_close(mine, value)
    again, _ = run(onepass, name, options, reload=True)
    for p, q in zip(net.parameters(), again.parameters()):
        assert torch.equal(p.full_tensor(), q.full_tensor())

# DTensors beside plain tensors.
from torch.distributed.tensor import distribute_tensor, Shard
ends = []
for library in (onepass, torch.optim):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(5))
    q = torch.nn.Parameter(distribute_tensor(torch.randn(4, 3), mesh, [Shard(0)]))
    opt = library.AdamW([p, q], lr=0.1, foreach=False)
    for _ in range(3):
        p.grad, q.grad = torch.randn(5), distribute_tensor(torch.randn(4, 3), mesh, [Shard(0)])
        opt.step()
    ends.append((p.detach(), q.detach().full_tensor()))
torch.testing.assert_close(*ends, rtol=2e-5, atol=2e-6)
dist.destroy_process_group()
print("ok")
"""


@pytest.mark.parametrize("size", slow_but([2], [1, 2]))
def test_sharded_parameters(tmp_path, size):
    import concurrent.futures

    with concurrent.futures.ThreadPoolExecutor(size) as pool:
        runs = [
            pool.submit(run_script, SHARDED, str(rank), str(size), str(tmp_path / "store"))
            for rank in range(size)
        ]
        assert all("ok" in run.result() for run in runs)
