"""Mistakes that do nothing, or the wrong thing, in every step: each is said once, and what is none
is not said."""

from __future__ import annotations

import copy
import math
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import onepass
from onepass.contract.mistakes import PATIENCE

EAGER = {"foreach": False, "fused": False}
BACKENDS = {"kernel": {}, "eager": EAGER}
on_each_backend = pytest.mark.parametrize("backend", BACKENDS)
CLASSES = [
    *(
        "SGD",
        "Adam",
        "AdamW",
        "Adagrad",
        "RMSprop",
        "Adadelta",
        "Adamax",
        "NAdam",
        "RAdam",
        "ASGD",
        "Rprop",
    ),
    *("Adafactor", "Muon", "SparseAdam"),
]


def make(name: str = "SGD", backend: str = "kernel", count: int = 2, **options: Any) -> Any:
    params = [nn.Parameter(torch.ones(3, 2)) for _ in range(count)]
    opt = getattr(onepass, name)(params, **options)
    opt.param_groups[0].update(BACKENDS[backend])
    return opt


def params_of(opt: Any) -> list[Tensor]:
    return [p for group in opt.param_groups for p in group["params"]]


def give_gradients(opt: Any) -> None:
    for p in params_of(opt):
        p.grad = torch.ones_like(p)
        if opt.gradients == "sparse":
            p.grad = p.grad.to_sparse(1)


def words(action: Callable[[], Any]) -> list[str]:
    """All warnings of an action."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    found = [str(w.message) for w in caught if "slower eager" not in str(w.message)]
    assert all("\n" not in text for text in found)
    return found


def said(steps: Sequence[Callable[[], Any]]) -> list[int]:
    """How many warnings each action brings."""
    return [len(words(step)) for step in steps]


# Steps without gradients.


@on_each_backend
@pytest.mark.parametrize("name", CLASSES)
def test_steps_without_gradients(name: str, backend: str) -> None:
    opt = make(name, backend)
    assert said([opt.step] * 6) == [0, 0, 1, 0, 0, 0]
    assert PATIENCE == 3
    again = make(name, backend)
    text = words(lambda: [again.step() for _ in range(4)])
    assert re.match(rf"{name}: no parameter has had a gradient in 3 steps", text[0])
    assert "loss.backward()" in text[0]


@pytest.mark.parametrize("name", ["SGD", "Adam", "Muon"])
def test_steps_with_a_gradient_once(name: str) -> None:
    for before in range(3):
        opt = make(name)
        steps: list[Callable[[], Any]] = [opt.step] * before
        give_gradients(opt)
        params_of(opt)[1].grad = None
        kept = params_of(opt)[0].grad
        opt.zero_grad()

        def with_gradient(opt: Any = opt, kept: Any = kept) -> None:
            params_of(opt)[0].grad = kept
            opt.step()
            opt.zero_grad()

        assert not any(said([*steps, with_gradient, *[opt.step] * 5]))


def test_gradients_of_zeros_are_gradients() -> None:
    opt = make()
    give_gradients(opt)
    opt.zero_grad(set_to_none=False)
    assert not any(said([opt.step] * 5))


def test_frozen_parameters() -> None:
    opt = make("Adam")
    for p in params_of(opt):
        p.requires_grad_(False)
    (text,) = words(lambda: [opt.step() for _ in range(5)])
    assert re.match(r"Adam: all parameters are frozen \(requires_grad is False\)", text)
    assert "requires_grad_()" in text


def test_some_frozen_parameters() -> None:
    opt = make("Adam")
    params_of(opt)[0].requires_grad_(False)
    (text,) = words(lambda: [opt.step() for _ in range(5)])
    assert "no parameter has had a gradient" in text


def test_a_detached_loss_in_a_training_loop() -> None:
    model = nn.Linear(3, 2)
    opt = onepass.AdamW(model.parameters())

    def train() -> None:
        opt.zero_grad()
        loss = model(torch.ones(1, 3)).sum().detach().requires_grad_()
        loss.backward()
        opt.step()

    assert said([train] * 5) == [0, 0, 1, 0, 0]


@pytest.mark.parametrize(
    "library", [onepass.lr_scheduler, torch.optim.lr_scheduler], ids=["onepass", "torch"]
)
def test_scheduler_without_training(library: Any) -> None:
    """Schedules are tried out without any gradient."""
    opt = make()
    scheduler = library.StepLR(opt, 2)

    def turn() -> None:
        opt.step()
        scheduler.step()

    assert not any(said([turn] * 8))


@pytest.mark.parametrize(
    "library", [onepass.lr_scheduler, torch.optim.lr_scheduler], ids=["onepass", "torch"]
)
def test_scheduler_in_a_training_loop(library: Any) -> None:
    opt = make()
    scheduler = library.StepLR(opt, 2)

    def turn() -> None:
        opt.zero_grad()
        opt.step()
        scheduler.step()

    assert said([turn] * 5) == [0, 0, 1, 0, 0]
    opt = make()
    scheduler = library.StepLR(opt, 2)
    assert said([lambda: opt.step(lambda: 0.0)] * 5) == [0, 0, 1, 0, 0]


def test_scheduler_tried_out_before_training() -> None:
    """Steps in which no gradient was expected do not count."""
    opt = make()
    scheduler = onepass.lr_scheduler.StepLR(opt, 2)

    def trial() -> None:
        opt.step()
        scheduler.step()

    def turn() -> None:
        opt.zero_grad()
        trial()

    assert said([trial, trial, turn, trial, turn, turn, turn]) == [0, 0, 0, 0, 0, 1, 0]


def test_no_parameters_at_all() -> None:
    class Base(onepass.SGD):
        pass

    opt = Base([nn.Parameter(torch.ones(1))])
    opt.param_groups.clear()
    assert not any(said([opt.step] * 5))


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda o: pickle.loads(pickle.dumps(o))],
    ids=["deep", "shallow", "pickle"],
)
def test_copies_have_their_own_patience(copied: Callable[[Any], Any]) -> None:
    opt = make()
    assert said([opt.step] * 2) == [0, 0]
    other = copied(opt)
    assert said([other.step] * 4) == [0, 0, 1, 0] or copied is copy.copy
    assert sum(said([opt.step] * 3)) <= 1


# Learning rates that the constructor would refuse.

# Rprop's is the first size of its steps, and means nothing later.
REFUSALS = [
    (name, rate)
    for name in CLASSES
    if name not in ("SparseAdam", "Rprop")
    for rate in (-0.1, math.nan)
]
REFUSALS += [("SGD", rate) for rate in (-math.inf, math.inf, -1e-300)]


@on_each_backend
@pytest.mark.parametrize(("name", "rate"), REFUSALS)
def test_refused_rates(name: str, rate: float, backend: str) -> None:
    try:
        make(name, lr=rate)
    except ValueError:
        refuses = True
    else:
        refuses = False
    opt = make(name, backend)
    give_gradients(opt)
    assert not words(opt.step)
    opt.param_groups[0]["lr"] = rate
    (text,) = words(lambda: [opt.step() for _ in range(3)])
    assert text.startswith(f"{name}: param_groups[0]['lr'] is {rate:g}")
    assert "[0, inf)" in text
    assert refuses or "constructor would refuse" not in text, "it would not"
    opt.param_groups[0]["lr"] = 0.1
    assert not words(opt.step)


@on_each_backend
@pytest.mark.parametrize("rate", [torch.tensor(-0.5), torch.tensor([math.nan]), -1])
def test_refused_rates_of_other_kinds(rate: Any, backend: str) -> None:
    opt = make("Adam", backend)
    give_gradients(opt)
    opt.param_groups[0]["lr"] = rate
    assert said([opt.step] * 3) == [1, 0, 0]


@on_each_backend
def test_refused_rate_names_the_group(backend: str) -> None:
    for bad in range(3):
        groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": 0.1} for _ in range(3)]
        opt = onepass.Adam(groups)
        for group in opt.param_groups:
            group.update(BACKENDS[backend])
        give_gradients(opt)
        opt.param_groups[bad]["lr"] = -1.0
        (text,) = words(lambda opt=opt: [opt.step() for _ in range(3)])
        assert f"param_groups[{bad}]" in text


@on_each_backend
@pytest.mark.parametrize("rate", [0, 0.0, -0.0, 1e300, torch.tensor(0.5)])
def test_rates_that_are_taken(rate: Any, backend: str) -> None:
    opt = make("SGD", backend)
    give_gradients(opt)
    opt.param_groups[0]["lr"] = rate
    assert not words(opt.step)


@on_each_backend
def test_rate_that_falls_below_zero(backend: str) -> None:
    """A schedule that goes on too long says so once, not with each new number."""
    opt = make("SGD", backend)
    give_gradients(opt)
    found = []
    for t in range(6):
        opt.param_groups[0]["lr"] = 0.25 - 0.1 * t
        found.append(len(words(opt.step)))
    assert found == [0, 0, 0, 1, 0, 0]


def test_rate_of_a_group_without_gradients() -> None:
    """It is wrong as well, and is said when the group is read, or not at all, but never twice."""
    groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": 0.1} for _ in range(2)]
    opt = onepass.SGD(groups)
    params_of(opt)[0].grad = torch.ones(2)
    opt.param_groups[1]["lr"] = -1.0
    assert sum(said([opt.step] * 3)) <= 1


def test_values_follow_a_refused_rate() -> None:
    """The step is taken all the same: torch takes it, too."""
    opt = make("SGD")
    give_gradients(opt)
    opt.param_groups[0]["lr"] = -0.5
    words(opt.step)
    assert (params_of(opt)[0] == 1.5).all()


# Options as attributes.

ATTRIBUTES = [
    ("SGD", "lr", 0.5),
    ("SGD", "momentum", 0.9),
    ("SGD", "nesterov", True),
    ("SGD", "weight_decay", 0.1),
    ("Adam", "betas", (0.5, 0.9)),
    ("Adam", "eps", 1e-3),
    ("Adam", "amsgrad", True),
    ("AdamW", "weight_decay", 0.0),
    ("AdamW", "maximize", True),
    ("RMSprop", "alpha", 0.5),
    ("Rprop", "etas", (0.5, 1.1)),
    ("ASGD", "lambd", 0.1),
    ("NAdam", "momentum_decay", 0.1),
    ("Adafactor", "d", 2.0),
    ("Muon", "ns_steps", 3),
    ("LBFGS", "max_iter", 3),
]


@pytest.mark.parametrize(("name", "option", "value"), ATTRIBUTES)
def test_options_as_attributes(name: str, option: str, value: Any) -> None:
    opt = getattr(onepass, name)([nn.Parameter(torch.ones(2, 2))])
    assert not hasattr(opt, option)
    assert option not in vars(opt)
    before = opt.param_groups[0][option]
    with pytest.raises(AttributeError, match=option):
        getattr(opt, option)
    (text,) = words(lambda: setattr(opt, option, value))
    assert text.startswith(f"{name}: optimizer.{option} = ... sets an attribute that no step reads")
    assert f"group['{option}'] = ..." in text
    assert getattr(opt, option) == value
    assert hasattr(opt, option)
    assert vars(opt)[option] == value
    assert opt.param_groups[0][option] == before
    assert not words(lambda: setattr(opt, option, value)), "it is said once"
    delattr(opt, option)
    assert not hasattr(opt, option)
    assert option not in vars(opt)
    with pytest.raises(AttributeError):
        delattr(opt, option)


def test_each_option_is_said() -> None:
    opt = make("Adam")
    assert [
        len(words(partial(setattr, opt, n, 0.1))) for n in ("lr", "eps", "lr", "weight_decay")
    ] == [1, 1, 0, 1]


def test_each_optimizer_is_told() -> None:
    for _ in range(2):
        opt = make("Adam")
        assert len(words(partial(setattr, opt, "lr", 0.1))) == 1


def test_other_attributes_are_free() -> None:
    opt = make("SGD")

    def notes() -> None:
        opt.name, opt.betas, opt.total, opt._step, opt.params, opt.args = "a", 1, 2, 3, 4, 5

    assert not words(notes)
    assert (opt.name, opt.betas, opt.total, opt._step, opt.params, opt.args) == ("a", 1, 2, 3, 4, 5)


def test_the_attributes_that_are_an_optimizers_own() -> None:
    opt = make("SGD")

    def own() -> None:
        opt.defaults = dict(opt.defaults)
        opt.state = opt.state
        opt.param_groups = list(opt.param_groups)

    assert not words(own)


def set_rate(optimizer: Any, value: float) -> None:
    optimizer.lr = value


def warm_up(opt: Any, epoch: int, base: float = 0.1) -> None:
    """As old training scripts have it."""
    opt.lr = base * epoch


def set_by_name(optimizer: Any, name: str, value: Any) -> None:
    setattr(optimizer, name, value)


class Trainer:
    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def adjust(self) -> None:
        self.optimizer.lr = 0.1


OUTSIDE: dict[str, Callable[[Any], Any]] = {
    "function": lambda opt: set_rate(opt, 0.1),
    "with an epoch": lambda opt: warm_up(opt, 3),
    "by name": lambda opt: set_by_name(opt, "lr", 0.1),
    "trainer": lambda opt: Trainer(opt).adjust(),
    "setattr": lambda opt: setattr(opt, "lr", 0.1),
}


@pytest.mark.parametrize("how", OUTSIDE)
def test_functions_that_are_given_an_optimizer(how: str) -> None:
    opt = make("SGD")
    assert len(words(lambda: OUTSIDE[how](opt))) == 1
    assert opt.lr == 0.1 or how == "with an epoch"


class Own(onepass.SGD):
    """Keeps its rate as an attribute, before and after the base class's constructor."""

    def __init__(self, params: Any, lr: float = 0.1, momentum: float = 0.9) -> None:
        self.lr = lr
        super().__init__(params, lr=lr, momentum=momentum)
        self.momentum = momentum

    def halve(self) -> None:
        self.lr /= 2
        for group in self.param_groups:
            group["lr"] = self.lr

    def forget(self) -> None:
        del self.momentum

    def by_a_function(self) -> None:
        for name in ("lr", "momentum"):
            setattr(self, name, 0.5)


class Heir(Own):
    def step(self, closure: Any = None) -> Any:
        self.lr = self.lr * 0.5
        return super().step(closure)


class Property(onepass.SGD):
    """Has a rate that is read from the groups."""

    @property
    def lr(self) -> float:
        return self.param_groups[0]["lr"]

    @lr.setter
    def lr(self, value: float) -> None:
        for group in self.param_groups:
            group["lr"] = value


class Constant(onepass.SGD):
    lr = 0.5
    momentum: float = 0.25


class Annotated(onepass.SGD):
    lr: float
    weight_decay: float


class WithGetattr(onepass.SGD):
    """Asks its first group for what it does not have."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("param_groups", "defaults", "state"):
            raise AttributeError(name)
        if name not in self.param_groups[0]:
            raise AttributeError(name)
        return self.param_groups[0][name]


def test_a_subclass_may_keep_its_own() -> None:
    def use() -> None:
        opt = Own([nn.Parameter(torch.ones(2))], lr=0.2)
        assert (opt.lr, opt.momentum) == (0.2, 0.9)
        opt.halve()
        assert opt.lr == 0.1 == opt.param_groups[0]["lr"]
        opt.forget()
        assert not hasattr(opt, "momentum")
        opt.by_a_function()
        heir = Heir([nn.Parameter(torch.ones(2))], lr=0.2)
        heir.param_groups[0]["params"][0].grad = torch.ones(2)
        heir.step()
        assert heir.lr == 0.1

    assert not words(use)


def test_a_subclass_with_a_property() -> None:
    opt = Property([nn.Parameter(torch.ones(2))], lr=0.2)

    def use() -> None:
        assert opt.lr == 0.2
        opt.lr = 0.4

    assert not words(use)
    assert opt.param_groups[0]["lr"] == 0.4
    assert "lr" not in vars(opt)


def test_class_attributes() -> None:
    opt = Constant([nn.Parameter(torch.ones(2))], lr=0.2)
    assert (opt.lr, opt.momentum, Constant.lr) == (0.5, 0.25, 0.5)
    assert opt.param_groups[0]["lr"] == 0.2
    annotated = Annotated([nn.Parameter(torch.ones(2))], lr=0.2)
    assert not hasattr(annotated, "lr")
    assert len(words(lambda: setattr(annotated, "weight_decay", 0.1))) == 1


def test_a_subclass_with_getattr() -> None:
    opt = WithGetattr([nn.Parameter(torch.ones(2))], lr=0.2)
    assert (opt.lr, opt.momentum) == (0.2, 0)
    assert hasattr(opt, "lr")


class Rule(onepass.Optimizer):
    """A class with options that no other one has."""

    def __init__(
        self, params: Any, lr: float = 0.1, sharpness: float = 1.0, history: int = 3
    ) -> None:
        # The last one is not an option.
        self.history = history
        super().__init__(params, {"lr": lr, "sharpness": sharpness})

    @staticmethod
    def rule(p: Any, g: Any, *, lr: Any, sharpness: Any) -> dict[str, Any]:
        return {"p": p - lr * sharpness * g}


def test_options_of_a_new_class() -> None:
    opt = Rule([nn.Parameter(torch.ones(2))])
    assert opt.history == 3
    assert not words(lambda: setattr(opt, "history", 4))
    assert len(words(lambda: setattr(opt, "sharpness", 2.0))) == 1
    opt.param_groups[0]["params"][0].grad = torch.ones(2)
    opt.step()
    assert torch.allclose(opt.param_groups[0]["params"][0], torch.tensor(0.9))


@pytest.mark.parametrize("cls", [Own, Heir, Property, Constant, Annotated, WithGetattr, Rule])
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda o: pickle.loads(pickle.dumps(o))],
    ids=["deep", "shallow", "pickle"],
)
def test_copies_of_optimizers_with_attributes(copied: Callable[[Any], Any], cls: type) -> None:
    """They keep what torch's keep: param groups, state and defaults, and attributes only as torch
    does."""

    def use() -> None:
        opt = cls([nn.Parameter(torch.ones(2))])
        other = copied(opt)
        params_of(other)[0].grad = torch.ones(2)
        # Heir's step needs an attribute that torch's copies lose, too.
        onepass.Optimizer.step(other)
        assert params_of(other)[0][0] < 1

    assert not words(use)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda o: pickle.loads(pickle.dumps(o))],
    ids=["deep", "shallow", "pickle"],
)
def test_copies_have_the_attributes_that_torchs_have(copied: Callable[[Any], Any]) -> None:
    found = []
    for library in (onepass, torch.optim):
        opt = library.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opt.lr = 0.5
        opt.name = "mine"
        other = copied(opt)
        found.append([getattr(other, name, "not there") for name in ("lr", "name", "momentum")])
    assert found[0] == found[1]


@pytest.fixture(autouse=True)
def _fresh_filters() -> Iterator[None]:
    with warnings.catch_warnings():
        yield
