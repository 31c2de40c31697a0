"""What a subclass overrides is what happens: on torch's class and on ours it ends up in the same
place."""

from __future__ import annotations

import copy
import pickle
import threading
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support.side_by_side import CLOSE, Side, assert_same, snapshot
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import onepass
from onepass import StepError
from onepass.stepping.turn import Turn

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*steps by torch.optim's slower code.*"),
    pytest.mark.filterwarnings("ignore:.*slower eager backend.*"),
]

OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    "Adam": {"lr": 0.05, "amsgrad": True},
    "AdamW": {"lr": 0.05},
    "Adagrad": {"lr": 0.1, "lr_decay": 0.1},
    "RMSprop": {"lr": 0.01, "momentum": 0.8, "centered": True},
    "Adadelta": {"lr": 1.0, "eps": 1e-3},
    "NAdam": {"lr": 0.05},
    "Rprop": {"lr": 0.05},
    "Adamax": {"lr": 0.05},
    "RAdam": {"lr": 0.05},
    "ASGD": {"lr": 0.1, "lambd": 0.5, "t0": 1},
    "Adafactor": {"lr": 0.1},
    "Muon": {"lr": 0.1},
    "SparseAdam": {"lr": 0.1},
}
OPTIONS = {name: options for name, options in OPTIONS.items() if hasattr(torch.optim, name)}
WITH_GROUPS = [name for name in OPTIONS if hasattr(getattr(torch.optim, name), "_init_group")]
# torch's iteration is in bfloat16, ours is not: there only what both of torch's code compute can be
# compared.
DENSE = [name for name in OPTIONS if name not in ("Muon", "SparseAdam")]
SHAPES = ((4, 3), (2, 2), (3, 5), (2, 1))


def sides_of(
    name: str, subclass: Callable[[Any], type], shapes: Sequence[tuple[int, ...]] = SHAPES
) -> Any:
    sides = []
    for library in (onepass, torch.optim):
        base = getattr(library, name)
        # torch adds its hooks to a class when the first one is made.
        base([nn.Parameter(torch.ones(2, 2))])
        random = torch.Generator().manual_seed(0)
        params: list[Tensor] = [
            nn.Parameter(torch.randn(shape, generator=random)) for shape in shapes
        ]
        sides.append(Side(library, subclass(base)(params, **OPTIONS[name]), params, random))
    return tuple(sides)


def train(side: Side, steps: int = 4) -> None:
    for t in range(steps):
        side.set_gradients(None if t % 2 else [0, 1, 3])
        if type(side.opt).__mro__[1].__name__ == "SparseAdam":
            for p in side.params:
                p.grad = None if p.grad is None else p.grad.to_sparse(1)
        side.opt.step()
        side.opt.zero_grad()


def assert_equal(sides: Any) -> None:
    """All bits."""
    ours, theirs = sides
    for p, q in zip(ours.params, theirs.params, strict=True):
        assert torch.equal(p, q)
    assert_same(sides, rtol=0.0, atol=0.0)


# Subclasses of any class, ours or torch's. Each keeps a list `log` of what has been called.


def plain_step(base: Any) -> type:
    class Sub(base):
        log: list[Any]

        def step(self, closure: Any = None) -> Any:
            self.__dict__.setdefault("log", []).append("step")
            return super().step(closure)

    return Sub


def step_that_clips(base: Any) -> type:
    class Sub(base):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            self.__dict__.setdefault("log", []).append("step")
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None and not p.grad.is_sparse:
                        p.grad.clamp_(-0.5, 0.5)
            return super().step(closure)

    return Sub


def step_that_skips(base: Any) -> type:
    class Sub(base):
        def step(self, closure: Any = None) -> Any:
            log = self.__dict__.setdefault("log", [])
            log.append(len(log))
            return None if len(log) % 2 == 0 else super().step(closure)

    return Sub


def step_twice(base: Any) -> type:
    class Sub(base):
        def step(self, closure: Any = None) -> Any:
            super().step()
            return super().step(closure)

    return Sub


def step_with_a_rate(base: Any) -> type:
    class Sub(base):
        def step(self, closure: Any = None, rate: float = 0.02) -> Any:
            kept = [group["lr"] for group in self.param_groups]
            for group in self.param_groups:
                group["lr"] = rate
            try:
                return super().step(closure)
            finally:
                for group, lr in zip(self.param_groups, kept, strict=True):
                    group["lr"] = lr

    return Sub


def other_zero_grad(base: Any) -> type:
    class Sub(base):
        def zero_grad(self, set_to_none: bool = False) -> None:
            self.__dict__.setdefault("log", []).append(("zero_grad", set_to_none))
            super().zero_grad(set_to_none=set_to_none)

    return Sub


def other_add_param_group(base: Any) -> type:
    class Sub(base):
        def add_param_group(self, param_group: dict[str, Any]) -> None:
            self.__dict__.setdefault("log", []).append(("group", sorted(param_group)))
            param_group["lr"] = param_group.get("lr", 0.07) * 0.5
            param_group["mine"] = len(self.param_groups)
            super().add_param_group(param_group)

    return Sub


def other_constructor(base: Any) -> type:
    class Sub(base):
        def __init__(self, params: Any, lr: float = 0.3, **options: Any) -> None:
            params = list(params)
            super().__init__(
                [{"params": params[:2]}, {"params": params[2:], "lr": lr / 3}], lr=lr, **options
            )
            self.log = [len(self.param_groups)]

    return Sub


def other_state_dict(base: Any) -> type:
    class Sub(base):
        def state_dict(self) -> dict[str, Any]:
            result = super().state_dict()
            result["mine"] = 5
            return result

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            state_dict = dict(state_dict)
            self.log = [state_dict.pop("mine")]
            super().load_state_dict(state_dict)

    return Sub


def other_setstate(base: Any) -> type:
    class Sub(base):
        def __setstate__(self, state: dict[str, Any]) -> None:
            super().__setstate__(state)
            for group in self.param_groups:
                group.setdefault("mine", 3)
                group["lr"] = 0.01
            self.__dict__.setdefault("log", []).append("setstate")

    return Sub


def attributes_of_its_own(base: Any) -> type:
    class Sub(base):
        _step = 0

        def __init__(self, *args: Any, **options: Any) -> None:
            self.plan, self.rows, self.turn, self.kernels = 1, 2, 3, 4
            super().__init__(*args, **options)
            self._step = 0
            self.ready = None

        def step(self, closure: Any = None) -> Any:
            result = super().step(closure)
            self._count = getattr(self, "_count", 0) + 1
            return result

    return Sub


SUBCLASSES = [
    plain_step,
    step_that_clips,
    step_that_skips,
    step_twice,
    step_with_a_rate,
    other_zero_grad,
    other_add_param_group,
    other_constructor,
    other_state_dict,
    other_setstate,
]


def log_of(opt: Any) -> Any:
    return vars(opt).get("log")


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("subclass", SUBCLASSES, ids=lambda f: f.__name__)
def test_overrides(subclass: Callable[[Any], type], name: str) -> None:
    """Steps, a further group, a checkpoint, a copy; then both are in the same place and have called
    the same."""
    sides = sides_of(name, subclass)
    for side in sides:
        train(side)
        side.params.append(nn.Parameter(torch.ones(3, 2)))
        side.opt.add_param_group({"params": side.params[-1:], "lr": 0.02})
        train(side)
    assert_same(sides)
    for side in sides:
        side.opt.load_state_dict(copy.deepcopy(side.opt.state_dict()))
        train(side)
    assert_same(sides)
    assert log_of(sides[0].opt) == log_of(sides[1].opt)
    options = [
        [{k: v for k, v in g.items() if k in ("lr", "mine")} for g in side.opt.param_groups]
        for side in sides
    ]
    assert options[0] == options[1]


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("subclass", SUBCLASSES, ids=lambda f: f.__name__)
def test_overrides_after_a_copy(subclass: Callable[[Any], type], name: str) -> None:
    sides = []
    for side in sides_of(name, subclass):
        train(side)
        other = copy.deepcopy(side.opt)
        params = [p for group in other.param_groups for p in group["params"]]
        sides.append(Side(side.library, other, params, side.random))
        train(sides[-1])
    assert_same((sides[0], sides[1]))
    assert log_of(sides[0].opt) == log_of(sides[1].opt)


@pytest.mark.parametrize("name", DENSE)
def test_closures_of_overridden_steps(name: str) -> None:
    for subclass in (plain_step, step_that_clips, step_with_a_rate):
        sides = sides_of(name, subclass)
        losses: list[list[float]] = []
        for side in sides:

            def closure(side: Any = side) -> Tensor:
                side.opt.zero_grad()
                loss = sum(((p - 1) ** 2).sum() for p in side.params)
                assert isinstance(loss, Tensor)
                loss.backward()
                return loss

            losses.append([side.opt.step(closure).item() for _ in range(3)])
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert_same(sides)


class Plain(onepass.AdamW):
    """To be found by pickle."""

    def step(self, closure: Any = None) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        return super().step(closure)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.restored = True


class Filtered(onepass.AdamW):
    def _init_group(self, group: dict[str, Any], *lists: Any, **named: Any) -> Any:
        params = [p for p in group["params"] if p.numel() > 4]
        return super()._init_group(group | {"params": params}, *lists, **named)


class TorchFiltered(torch.optim.AdamW):
    def _init_group(self, group: dict[str, Any], *lists: Any, **named: Any) -> Any:
        params = [p for p in group["params"] if p.numel() > 4]
        return super()._init_group(group | {"params": params}, *lists, **named)


def test_pickled_subclasses() -> None:
    random = torch.Generator().manual_seed(0)
    params: list[Tensor] = [nn.Parameter(torch.randn(4, 3, generator=random))]
    side = Side(onepass, Plain(params, lr=0.1), params, random)
    train(side, 3)
    other = pickle.loads(pickle.dumps(side.opt))
    assert type(other) is Plain
    assert other.restored
    assert not hasattr(side.opt, "restored")
    (p,) = other.param_groups[0]["params"]
    for q, opt in ((params[0], side.opt), (p, other)):
        q.grad = torch.ones(4, 3)
        opt.step()
    assert torch.equal(p, params[0])
    assert (side.opt.calls, other.calls) == (4, 1)


def test_pickled_subclasses_with_init_group() -> None:
    sides = []
    for library, cls in ((onepass, Filtered), (torch.optim, TorchFiltered)):
        random = torch.Generator().manual_seed(0)
        params: list[Tensor] = [
            nn.Parameter(torch.randn(shape, generator=random)) for shape in SHAPES
        ]
        side = Side(library, cls(params, lr=0.1), params, random)
        train(side)
        other = pickle.loads(pickle.dumps(side.opt))
        sides.append(Side(library, other, other.param_groups[0]["params"], random))
        train(sides[-1])
    assert_equal(tuple(sides))
    assert len(sides[0].opt.state) == 2


@pytest.mark.parametrize("name", DENSE)
def test_names_of_attributes_are_free(name: str) -> None:
    sides = sides_of(name, attributes_of_its_own)
    for side in sides:
        train(side)
    assert_same(sides)
    opt = sides[0].opt
    assert (opt.plan, opt.rows, opt.turn, opt.kernels, opt._step, opt._count) == (1, 2, 3, 4, 0, 4)


# `_init_group`, which torch's steps call.


def counted(base: Any) -> type:
    class Sub(base):
        def _init_group(self, group: dict[str, Any], *lists: Any, **named: Any) -> Any:
            self.__dict__.setdefault("log", []).append(len(group["params"]))
            return super()._init_group(group, *lists, **named)

    return Sub


def filtered(base: Any) -> type:
    class Sub(base):
        def _init_group(self, group: dict[str, Any], *lists: Any, **named: Any) -> Any:
            params = [p for p in group["params"] if p.numel() > 4]
            return super()._init_group(group | {"params": params}, *lists, **named)

    return Sub


def clipped(base: Any) -> type:
    class Sub(base):
        def _init_group(self, group: dict[str, Any], *lists: Any, **named: Any) -> Any:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad = p.grad.clamp(-0.1, 0.1)
            return super()._init_group(group, *lists, **named)

    return Sub


def doubled(base: Any) -> type:
    """Replaces gradients in the lists."""

    class Sub(base):
        def _init_group(self, group: dict[str, Any], *lists: Any, **named: Any) -> Any:
            result = super()._init_group(group, *lists, **named)
            params, grads = lists[:2]
            grads[:] = [g * 2 + 0.1 * p.detach() for p, g in zip(params, grads, strict=True)]
            return result

    return Sub


def begun_otherwise(base: Any) -> type:
    class Sub(base):
        def _init_group(self, group: dict[str, Any], *lists: Any, **named: Any) -> Any:
            new = [p for p in group["params"] if p.grad is not None and not self.state[p]]
            result = super()._init_group(group, *lists, **named)
            for p in new:
                for value in self.state[p].values():
                    if isinstance(value, Tensor) and value.dim() > 0:
                        value.fill_(0.25)
            return result

    return Sub


def grandchild(base: Any) -> type:
    class Grand(clipped(base)):
        pass

    return Grand


def grandchild_with_both(base: Any) -> type:
    class Grand(counted(base)):
        def _init_group(self, group: dict[str, Any], *lists: Any, **named: Any) -> Any:
            self.__dict__.setdefault("log", []).append("grand")
            return super()._init_group(group, *lists, **named)

        def step(self, closure: Any = None) -> Any:
            self.log.append("step") if "log" in vars(self) else None
            return super().step(closure)

    return Grand


def mixin(base: Any) -> type:
    class Mixin:
        def _init_group(self, group: dict[str, Any], *lists: Any, **named: Any) -> Any:
            self.__dict__.setdefault("log", []).append("mixin")
            return super()._init_group(group, *lists, **named)  # type: ignore[misc]

    return type("Mixed", (Mixin, base), {})


INITS = [
    counted,
    filtered,
    clipped,
    doubled,
    begun_otherwise,
    grandchild,
    grandchild_with_both,
    mixin,
]


# torch's Muon is slow.
INIT_CASES = [(name, f) for name in WITH_GROUPS for f in INITS if name != "Muon" or f is doubled]


@pytest.mark.parametrize(("name", "subclass"), INIT_CASES, ids=lambda x: getattr(x, "__name__", x))
def test_init_group(name: str, subclass: Callable[[Any], type]) -> None:
    """Bit for bit, as it is torch's code that then steps."""
    sides = sides_of(name, subclass)
    for side in sides:
        train(side)
        side.params.append(nn.Parameter(torch.ones(3, 2)))
        side.opt.add_param_group({"params": side.params[-1:], "lr": 0.02})
        train(side)
        side.opt.load_state_dict(copy.deepcopy(side.opt.state_dict()))
        train(side)
    assert_equal(sides)
    assert log_of(sides[0].opt) == log_of(sides[1].opt)


@pytest.mark.parametrize("name", WITH_GROUPS)
def test_init_group_called_by_a_step_of_ones_own(name: str) -> None:
    """As people do who write a step: the lists are filled as torch's are."""

    def subclass(base: Any) -> type:
        class Sub(base):
            @torch.no_grad()
            def step(self, closure: Any = None) -> Any:
                for group in self.param_groups:
                    lists: list[list[Any]] = [[] for _ in range(self.lists)]
                    self._init_group(group, *lists)
                    params, grads = lists[:2]
                    for p, g in zip(params, grads, strict=True):
                        p.add_(g, alpha=-group["lr"])
                    self.seen = [
                        [tuple(t.shape) for t in entries if isinstance(t, Tensor)]
                        for entries in lists
                    ]

        return Sub

    counts = {
        "SGD": 3,
        "Adam": 6,
        "AdamW": 6,
        "Adagrad": 4,
        "RMSprop": 6,
        "Adadelta": 5,
        "NAdam": 6,
        "Rprop": 5,
    }
    counts |= {"Adamax": 5, "RAdam": 5, "ASGD": 6, "Adafactor": 6, "Muon": 3}
    sides = sides_of(name, subclass)
    for side in sides:
        side.opt.lists = counts[name]
        train(side)
    assert_equal(sides)
    assert sides[0].opt.seen == sides[1].opt.seen


def test_slower_steps_are_said_once() -> None:
    (ours, _) = sides_of("Adam", counted)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(ours, 4)
    found = [str(w.message) for w in caught]
    assert found == [
        "Sub steps by torch.optim's slower code: it overrides _init_group, which only that calls"
    ]


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Rprop", "Adafactor"])
@pytest.mark.parametrize("subclass", [counted, plain_step, step_twice], ids=lambda f: f.__name__)
def test_hooks_are_called_as_often(subclass: Callable[[Any], type], name: str) -> None:
    counts = []
    for side in sides_of(name, subclass):
        calls: list[str] = []
        side.opt.register_step_pre_hook(lambda *_, calls=calls: calls.append("pre"))
        side.opt.register_step_post_hook(lambda *_, calls=calls: calls.append("post"))
        train(side, 3)
        counts.append(calls)
    assert counts[0] == counts[1]
    if subclass is counted:
        assert counts[0] == ["pre", "post"] * 3


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adafactor"])
def test_hooks_that_change_arguments(name: str) -> None:
    sides = sides_of(name, counted)
    for side in sides:
        side.opt.register_step_pre_hook(
            lambda opt, args, kwargs: (args[:1], {"closure": lambda: 7.0})
        )
        side.set_gradients()
        assert side.opt.step() == 7.0
    assert_equal(sides)


@pytest.mark.parametrize("name", DENSE)
def test_step_assigned_to_an_instance(name: str) -> None:
    sides = sides_of(name, lambda base: base)
    for side in sides:
        original = side.opt.step
        calls: list[int] = []

        def step(
            self: Any, closure: Any = None, original: Any = original, calls: Any = calls
        ) -> Any:
            calls.append(1)
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.mul_(0.5)
            return original(closure)

        side.opt.step = types.MethodType(step, side.opt)
        train(side)
        assert len(calls) == 4
    assert_same(sides)


@pytest.mark.parametrize("name", ["SGD", "Adam", "Adafactor"])
@pytest.mark.parametrize(
    "library", [onepass.lr_scheduler, torch.optim.lr_scheduler], ids=["onepass", "torch"]
)
def test_overridden_steps_under_a_scheduler(library: Any, name: str) -> None:
    for subclass in (plain_step, counted):
        sides = sides_of(name, subclass)
        for side in sides:
            schedules = library if side.library is onepass else torch.optim.lr_scheduler
            scheduler = schedules.StepLR(side.opt, 2, 0.5)
            for _ in range(4):
                train(side, 1)
                scheduler.step()
        assert_same(sides)
        assert [g["lr"] for g in sides[0].opt.param_groups] == [
            g["lr"] for g in sides[1].opt.param_groups
        ]


def test_sparse_adam_overrides() -> None:
    for subclass in (
        plain_step,
        other_zero_grad,
        other_add_param_group,
        other_constructor,
        other_state_dict,
    ):
        sides = sides_of("SparseAdam", subclass)
        for side in sides:
            train(side)
            side.opt.load_state_dict(copy.deepcopy(side.opt.state_dict()))
            train(side)
        for p, q in zip(sides[0].params, sides[1].params, strict=True):
            torch.testing.assert_close(
                p.detach(), q.detach(), rtol=CLOSE["rtol"], atol=CLOSE["atol"]
            )
        assert log_of(sides[0].opt) == log_of(sides[1].opt)


def test_init_group_without_a_class_of_torch() -> None:
    class Rule(onepass.Optimizer):
        @staticmethod
        def rule(p: Any, g: Any, *, lr: Any) -> dict[str, Any]:
            return {"p": p - lr * g}

    p = nn.Parameter(torch.ones(2))
    opt = Rule([p], {"lr": 0.1})
    with pytest.raises(AttributeError, match="has no attribute '_init_group'"):
        opt._init_group(opt.param_groups[0], [])

    class Grouped(Rule):
        def _init_group(self, group: Any, *lists: Any, **named: Any) -> Any:
            return False

    p.grad = torch.ones(2)
    grouped = Grouped([p], {"lr": 0.1})
    grouped.step()
    assert (p == 0.9).all()


@pytest.mark.parametrize("name", WITH_GROUPS)
def test_a_failing_init_group(name: str) -> None:
    """The error is the subclass's own, and the next step goes on."""

    def subclass(base: Any) -> type:
        class Sub(base):
            def _init_group(self, group: dict[str, Any], *lists: Any, **named: Any) -> Any:
                if getattr(self, "fails", False):
                    raise KeyError("mine")
                return super()._init_group(group, *lists, **named)

        return Sub

    sides = sides_of(name, subclass)
    for side in sides:
        train(side)
        side.opt.fails = True
        side.set_gradients()
        with pytest.raises(KeyError, match="mine"):
            side.opt.step()
        side.opt.fails = False
        train(side)
    assert_equal(sides)


# Steps within steps.


class Stepping(Tensor):
    """A tensor some of whose operations step an optimizer."""

    content: Tensor

    @staticmethod
    def __new__(cls, content: Tensor, requires_grad: bool = False) -> Stepping:
        wrapper = Tensor._make_wrapper_subclass(
            cls, content.shape, dtype=content.dtype, requires_grad=requires_grad
        )
        wrapper.content = content
        return wrapper

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Stepping({self.content})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if RE_ENTRY and name in RE_ENTRY[0]:
            RE_ENTRY[1]()
        result = func(*tree_map(bare, args), **tree_map(bare, kwargs or {}))
        if name.endswith("_"):
            return args[0]
        return tree_map(lambda x: cls(x) if isinstance(x, Tensor) else x, result)


def bare(x: Any) -> Any:
    return x.content if isinstance(x, Stepping) else x


# The names of operations, and what they do first.
RE_ENTRY: list[Any] = []


@pytest.fixture(autouse=True)
def _no_re_entry() -> Any:
    RE_ENTRY.clear()
    yield
    RE_ENTRY.clear()


MODES = {"kernel": {}, "eager": {"foreach": False, "fused": False}}


def look(opt: Any) -> Any:
    """All values."""
    params = [p for group in opt.param_groups for p in group["params"]]
    state = [
        (name, bare(t).tolist() if isinstance(t, Tensor) else t)
        for p in params
        for name, t in sorted(opt.state.get(p, {}).items())
    ]
    return (
        [bare(p).tolist() for p in params],
        state,
        [p._version for p in params if type(p) is nn.Parameter],
    )


@pytest.mark.parametrize("backend", MODES)
@pytest.mark.parametrize("name", ["SGD", "Adam", "NAdam", "Adafactor", "Adagrad"])
@pytest.mark.parametrize(
    "operations", [("mul", "div", "add", "sub"), ("copy_",)], ids=["computes", "stores"]
)
@pytest.mark.parametrize("before", [0, 2])
def test_step_within_a_step(
    before: int, operations: tuple[str, ...], name: str, backend: str
) -> None:
    for place in range(3):
        runs = []
        for _ in range(2):
            random = torch.Generator().manual_seed(0)
            data = [torch.randn(3, 2, generator=random) for _ in range(3)]
            params: list[Any] = [nn.Parameter(d) for d in data]
            params[place] = Stepping(data[place], True)
            opt = getattr(onepass, name)(params, **OPTIONS[name])
            opt.param_groups[0].update(MODES[backend])
            runs.append((opt, params))
        (opt, params), (twin, others) = runs
        for t in range(before + 2):
            for p in (*params, *others):
                p.grad = torch.full((3, 2), 0.5 + t)
            if t == before:
                kept = look(opt)
                RE_ENTRY[:] = [operations, opt.step]
                with pytest.raises(StepError, match="within a step of the same optimizer"):
                    opt.step()
                RE_ENTRY.clear()
                assert look(opt) == kept
            opt.step()
            twin.step()
        assert look(opt) == look(twin)


def test_step_of_another_optimizer_within_a_step() -> None:
    q = nn.Parameter(torch.ones(2))
    q.grad = torch.ones(2)
    other = onepass.SGD([q], lr=0.5)
    p = Stepping(torch.ones(3), True)
    p.grad = torch.ones(3)
    opt = onepass.SGD([p], lr=0.5)
    RE_ENTRY[:] = [("copy_",), other.step]
    opt.step()
    assert (q == 0.5).all()
    assert (bare(p) == 0.5).all()


class Curious(onepass.SGD):
    """Steps where it is asked something."""

    asked = ""

    def flags(self, group: Any) -> dict[str, bool]:
        self.answer("flags")
        return super().flags(group)

    def initial_state(self, name: str, like: Tensor, group: Any) -> Tensor:
        self.answer("initial_state")
        return super().initial_state(name, like, group)

    def rule_of(self, p: Tensor, group: Any) -> Any:
        self.answer("rule_of")
        return super().rule_of(p, group)

    def answer(self, question: str) -> None:
        if self.asked == question:
            self.step()


@pytest.mark.parametrize("backend", MODES)
@pytest.mark.parametrize("question", ["flags", "initial_state", "rule_of"])
def test_step_from_what_a_class_refines(question: str, backend: str) -> None:
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    opt = Curious(params, lr=0.1, momentum=0.9)
    opt.param_groups[0].update(MODES[backend])
    for p in params:
        p.grad = torch.ones(3)
    opt.asked = question
    before = snapshot(opt)
    with pytest.raises(StepError, match="within a step"):
        opt.step()
    assert snapshot(opt) == before
    opt.asked = ""
    opt.step()
    assert torch.allclose(params[1], torch.tensor(0.9))


@pytest.mark.parametrize("name", ["Adam", "Adafactor"])
def test_step_from_init_group(name: str) -> None:
    def subclass(base: Any) -> type:
        class Sub(base):
            def _init_group(self, group: dict[str, Any], *lists: Any, **named: Any) -> Any:
                self.step()

        return Sub

    (ours, _) = sides_of(name, subclass)
    ours.set_gradients()
    before = snapshot(ours.opt)
    with pytest.raises(StepError, match="within a step"):
        ours.opt.step()
    assert snapshot(ours.opt) == before


def test_steps_that_are_not_within_one() -> None:
    """Closures and hooks may step, as with torch."""
    ends = []
    for library in (onepass, torch.optim):
        p = nn.Parameter(torch.ones(3))
        opt = library.SGD([p], lr=0.1)
        p.grad = torch.ones(3)

        def closure(opt: Any = opt) -> float:
            opt.step()
            return 3.0

        assert opt.step(closure) == 3.0
        handles: list[Any] = []

        def step_again(opt: Any, args: Any, kwargs: Any, handles: list[Any] = handles) -> None:
            handles.pop().remove()
            opt.step()

        handles.append(opt.register_step_post_hook(step_again))
        opt.step()
        ends.append(p.detach())
    torch.testing.assert_close(*ends)
    assert torch.allclose(ends[0], torch.tensor(0.6))


def test_others_may_step_after_a_refusal() -> None:
    """The turn is given up, also where a step has failed within a step."""
    p = Stepping(torch.ones(3), True)
    opt = onepass.SGD([p], lr=0.5)
    p.grad = torch.ones(3)
    RE_ENTRY[:] = [("copy_",), opt.step]
    with pytest.raises(StepError):
        opt.step()
    RE_ENTRY.clear()
    thread = threading.Thread(target=opt.step)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    assert (bare(p) == 0.5).all()


def test_turns() -> None:
    turn = Turn()
    with turn, turn:
        with pytest.raises(StepError):
            turn.refuse_another("X")
        for other in (copy.deepcopy(turn), copy.copy(turn), pickle.loads(pickle.dumps(turn))):
            assert other is not turn
            with other:
                other.refuse_another("X")
            thread = threading.Thread(target=other.__enter__)
            thread.start()
            thread.join(30)
            assert not thread.is_alive()
    with turn:
        turn.refuse_another("X")
