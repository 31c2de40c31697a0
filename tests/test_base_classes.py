"""Optimizers as what people build on: bases of classes of their own, wrappers, look-ups by
class."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import types
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from test_surface import CLASSES
from torch import Tensor, nn

import onepass
from onepass.contract.mistakes import Misplaced

EACH = pytest.mark.parametrize("name", CLASSES)
BOTH = (onepass, torch.optim)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 1, 12).view(shape or (4, 3)).clone())


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file)


# What a class is.


@EACH
def test_is_what_it_replaces(name: str) -> None:
    ours, theirs = getattr(onepass, name), getattr(torch.optim, name)
    assert issubclass(ours, theirs)
    assert issubclass(ours, onepass.Optimizer)
    assert ours.step is not theirs.step
    table = {theirs: "found"}
    assert next(table[cls] for cls in ours.__mro__ if cls in table) == "found"


def test_adamw_is_adam_as_in_torch() -> None:
    assert issubclass(onepass.AdamW, onepass.Adam)
    assert issubclass(onepass.AdamW, torch.optim.AdamW)
    assert onepass.AdamW([parameter()]).defaults["weight_decay"] == 0.01


def test_the_scheduler_of_earlier_torchs() -> None:
    assert onepass.lr_scheduler._LRScheduler is onepass.lr_scheduler.LRScheduler
    assert issubclass(onepass.lr_scheduler.StepLR, onepass.lr_scheduler._LRScheduler)


# A class with a step of its own, and no rule.


def make_own(library: Any) -> Any:
    """Momentum, with all sorts of state beside it."""

    class Own(library.Optimizer):
        def __init__(self, params: Any, lr: float = 0.1, verbose: Any = False) -> None:
            super().__init__(params, {"lr": lr, "verbose": verbose})

        @torch.no_grad()
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is None:
                        continue
                    state = self.state[p]
                    if not state:
                        state.update(
                            v=torch.zeros_like(p),
                            mean=torch.zeros(()),
                            history=[],
                            notes={"steps": 0},
                        )
                    state["v"].mul_(0.9).add_(p.grad)
                    state["mean"] += p.mean()
                    state["history"] = [*state["history"][-2:], p.clone()]
                    state["notes"]["steps"] += 1
                    p.sub_(state["v"], alpha=group["lr"])
            self.state["all"] = {"calls": self.state.get("all", {}).get("calls", 0) + 1}

    return Own


def train(opt: Any, steps: int, seed: int = 0) -> None:
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=random)
        opt.step()
        opt.zero_grad()


WAYS: dict[str, Callable[[Any, Any], Any]] = {
    "state dict": lambda opt, new: new.load_state_dict(opt.state_dict()) or new,
    "file": lambda opt, new: new.load_state_dict(through_a_file(opt.state_dict())) or new,
    "deepcopy": lambda opt, new: copy.deepcopy(opt),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_step_of_its_own(way: str) -> None:
    ends = []
    for library in BOTH:
        cls, params = make_own(library), [parameter(), parameter(12)]
        opt = cls([{"params": [params[0]]}, {"params": [params[1]], "lr": 0.2}], verbose=2)
        scheduler = library.lr_scheduler.StepLR(opt, 2, 0.5)
        calls: list[int] = []
        opt.register_step_post_hook(lambda *_, calls=calls: calls.append(1))
        train(opt, 3)
        scheduler.step()
        others = [nn.Parameter(p.detach().clone()) for p in params]
        new = cls([{"params": [others[0]]}, {"params": [others[1]]}])
        moved = WAYS[way](opt, new)
        train(moved, 2, seed=1)
        ends.append(
            (
                [p.detach() for group in moved.param_groups for p in group["params"]],
                [group["lr"] for group in moved.param_groups],
                through_a_file(moved.state_dict()),
            )
        )
        assert len(calls) >= 3
    (ours, theirs) = ends
    assert ours[1] == theirs[1]
    for p, q in zip(ours[0], theirs[0], strict=True):
        assert torch.equal(p, q)
    assert_alike(ours[2], theirs[2])


def assert_alike(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, Mapping):
        assert list(a) == list(b)
        for key in a:
            assert_alike(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_alike(x, y)
    elif isinstance(a, Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def test_pickles_of_a_class_with_a_step_of_its_own() -> None:
    p = parameter()
    opt = Plain([p], {"lr": 0.5})
    opt.state[p]["seen"] = torch.ones(2)
    again = pickle.loads(pickle.dumps(opt))
    (q,) = again.param_groups[0]["params"]
    q.grad = torch.ones_like(q)
    again.step()
    assert torch.equal(q, parameter() - 0.5)
    assert torch.equal(again.state[q]["seen"], torch.ones(2))


class Plain(onepass.Optimizer):
    """At the module's level, as pickles need it."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"])


def test_without_a_rule_the_step_says_so() -> None:
    p = parameter()
    p.grad = torch.ones_like(p)
    with pytest.raises(TypeError, match="has no rule"):
        onepass.Optimizer([p], {"lr": 0.1}).step()


# State that a wrapper keeps beside the rule's.


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop", "Adafactor", "SparseAdam", "LBFGS"])
def test_state_of_a_wrapper_is_kept(name: str, steps: int) -> None:
    p, q = parameter(), parameter()
    opt, new = getattr(onepass, name)([p]), getattr(onepass, name)([q])

    def step(optimizer: Any, weights: Tensor) -> None:
        g = torch.ones_like(weights)
        weights.grad = g.to_sparse() if name == "SparseAdam" else g
        optimizer.step(*([lambda: weights.sum()] if name == "LBFGS" else []))

    for _ in range(steps):
        step(opt, p)
    kept = {"z": p.detach().clone(), "lookahead_slow_buff": [torch.ones(2)], "counter": 3}
    opt.state[p].update(kept)
    new.load_state_dict(through_a_file(opt.state_dict()))
    assert {key: new.state[q][key] for key in kept}.keys() == kept.keys()
    assert torch.equal(new.state[q]["z"], kept["z"])
    assert torch.equal(new.state[q]["lookahead_slow_buff"][0], torch.ones(2))
    q.data.copy_(p.detach())
    step(opt, p)
    step(new, q)
    assert torch.equal(p, q)
    assert new.state[q]["counter"] == 3


def test_state_moves_to_the_parameters_device_wherever_it_lies() -> None:
    p, q = parameter(), nn.Parameter(torch.empty(4, 3, device="meta"))
    opt, new = Plain([p], {"lr": 0.1}), Plain([q], {"lr": 0.1})
    opt.state[p] = {"a": [torch.ones(1), {"b": (torch.ones(2),)}]}
    new.load_state_dict(opt.state_dict())
    assert new.state[q]["a"][0].is_meta
    assert new.state[q]["a"][1]["b"][0].is_meta


# Parameters that have no gradients.


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
@EACH
def test_integers_are_never_stepped(name: str, dtype: torch.dtype) -> None:
    """As the weights of a 4-bit base beside those that are trained."""
    ends = []
    for library in BOTH:
        p = parameter()
        base = nn.Parameter(torch.ones(4, 3).to(dtype), requires_grad=False)
        if library is torch.optim and name in ("LBFGS", "Adafactor", "Muon"):
            continue
        opt = getattr(library, name)([p, base])
        for t in range(3):
            g = torch.full((4, 3), t - 0.5)
            p.grad = g.to_sparse() if name == "SparseAdam" else g
            if name == "LBFGS":
                with pytest.raises(RuntimeError, match="parameter 1"):
                    opt.step(lambda: 1.0)
                assert torch.equal(p, parameter())
                return
            opt.step()
        again = getattr(library, name)([p, base])
        again.load_state_dict(opt.state_dict())
        assert torch.equal(base, torch.ones(4, 3).to(dtype))
        ends.append(p.detach())
    for ours in ends[1:]:
        torch.testing.assert_close(ends[0], ours, rtol=2e-5, atol=2e-6)


def test_an_integer_with_a_gradient_is_refused() -> None:
    p, base = parameter(), nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False)
    p.grad, base.grad = torch.ones(4, 3), torch.ones(3, dtype=torch.int64)
    opt = onepass.Adam([p, base])
    with pytest.raises(RuntimeError, match=r"parameter 1 is torch\.int64"):
        opt.step()
    assert torch.equal(p, parameter())
    assert not opt.state


# Names.


def named(*names: str) -> tuple[list[nn.Parameter], onepass.Optimizer]:
    params = [parameter() for _ in names]
    return params, onepass.Adam(list(zip(names, params, strict=True)), lr=0.1)


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (("module.a", "module.b.c"), ("a", "b.c")),
        (("a", "b.c"), ("_orig_mod.a", "_orig_mod.b.c")),
        (("module.a", "module.b"), ("_orig_mod.a", "_orig_mod.b")),
        (("b.c", "a"), ("a", "module.b.module.c")),
        (("_fsdp_wrapped_module.a._fsdp_wrapped_module.w", "b"), ("a.w", "b")),
        (("b", "a"), ("a", "b")),
        (("_orig_mod.module.a", "_orig_mod.a"), ("module.a", "a")),
        (("module.a", "a"), ("_orig_mod.module.a", "_orig_mod.a")),
    ],
)
def test_wrappers_prefixes_do_not_matter(saved: tuple[str, str], loaded: tuple[str, str]) -> None:
    params, opt = named(*saved)
    for i, p in enumerate(params):
        p.grad = torch.full_like(p, i + 1.0)
    opt.step()
    others, new = named(*loaded)
    new.check_names(opt.state_dict())
    new.load_state_dict(opt.state_dict())
    first = 1 if saved[0].startswith("b") else 0
    assert torch.equal(new.state[others[0]]["exp_avg"], opt.state[params[first]]["exp_avg"])
    assert torch.equal(new.state[others[1]]["exp_avg"], opt.state[params[1 - first]]["exp_avg"])


@pytest.mark.parametrize("names", [("a.w", "module.a.w"), ("module.b", "b")])
def test_names_that_only_a_wrappers_prefix_tells_apart(names: tuple[str, str]) -> None:
    _, opt = named(*names)
    _, new = named(*reversed(names))
    new.load_state_dict(opt.state_dict())
    _, other = named("a.w", "c")
    with pytest.raises(ValueError, match="has a parameter"):
        other.check_names(opt.state_dict())


def test_other_names_are_told_and_matched_by_position() -> None:
    params, opt = named("encoder.a", "encoder.b")
    for i, p in enumerate(params):
        p.grad = torch.full_like(p, i + 1.0)
    opt.step()
    others, new = named("a", "b")
    with pytest.warns(
        UserWarning, match=r"'encoder\.a' in group 0 where this optimizer has 'a'; .*by position"
    ):
        new.load_state_dict(opt.state_dict())
    for p, q in zip(params, others, strict=True):
        assert torch.equal(opt.state[p]["exp_avg"], new.state[q]["exp_avg"])


def test_names_that_are_the_same_but_for_prefixes_in_all_ways() -> None:
    _, opt = named("module.a", "_orig_mod.a")
    _, new = named("a", "module._orig_mod.a")
    with pytest.raises(ValueError, match=r"'module\.a' in group 0 where this optimizer has 'a'"):
        new.check_names(opt.state_dict())


def test_a_count_of_steps_stays_on_the_host() -> None:
    p, q = parameter(), nn.Parameter(torch.empty(4, 3, device="meta"))
    opt, new = Plain([p], {"lr": 0.1}), Plain([q], {"lr": 0.1})
    opt.state[p] = {"step": torch.tensor(3.0), "v": torch.ones(2)}
    new.load_state_dict(opt.state_dict())
    assert new.state[q]["step"].item() == 3.0
    assert new.state[q]["v"].is_meta


@pytest.mark.filterwarnings("error")
def test_other_names_and_other_shapes_are_refused() -> None:
    params, opt = named("encoder.a", "encoder.b")
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    other = onepass.Adam([("a", parameter()), ("b", parameter(12))])
    with pytest.raises(
        ValueError, match=r"'encoder\.a' in group 0 where .*'a'; by position, .*shape \(4, 3\)"
    ):
        other.load_state_dict(opt.state_dict())
    assert not other.state


# Helpers of torch's classes that public code calls.


def test_helpers_of_lbfgs() -> None:
    rows = []
    for library in BOTH:
        params = [parameter(), nn.Parameter(torch.ones(2, dtype=torch.complex64)), parameter(12)]
        opt = library.LBFGS(params)
        params[0].grad, params[1].grad = torch.ones(4, 3), torch.ones(2, dtype=torch.complex64)
        with torch.no_grad():
            opt._add_grad(0.5, torch.arange(28.0))
        rows.append(
            (
                opt._numel(),
                opt._gather_flat_grad(),
                [p.detach() for p in opt._params],
                opt._clone_param(),
            )
        )
    assert rows[0][0] == rows[1][0]
    assert torch.equal(rows[0][1], rows[1][1])
    for mine, its in zip(rows[0][2] + rows[0][3], rows[1][2] + rows[1][3], strict=True):
        assert torch.equal(mine, its)
    again = pickle.loads(pickle.dumps(onepass.LBFGS([parameter()])))
    assert again._numel() == 12


@pytest.mark.filterwarnings("ignore:.*steps by torch.optim's slower code")
@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_overridden_helpers_of_lbfgs_are_called(search: str | None) -> None:
    rows = []
    for library in BOTH:
        calls: list[int] = []

        class Half(library.LBFGS):
            def _gather_flat_grad(self, calls: list[int] = calls) -> Tensor:
                calls.append(1)
                return super()._gather_flat_grad() / 2

        p = parameter()
        opt = Half([p], max_iter=4, line_search_fn=search)

        def closure(opt: Any = opt, p: Tensor = p) -> Tensor:
            opt.zero_grad()
            loss = p.square().sum() + p.sum().cos()
            loss.backward()
            return loss

        for _ in range(3):
            opt.step(closure)
        rows.append((len(calls), p.detach()))
    assert rows[0][0] == rows[1][0] > 3
    assert torch.equal(rows[0][1], rows[1][1])


@pytest.mark.filterwarnings("ignore:.*graph_capture_health_check")
def test_helpers_of_the_base() -> None:
    opt = onepass.Adam([parameter()])
    opt._cuda_graph_capture_health_check()
    value = torch.optim.Optimizer._process_value_according_to_param_policy
    assert onepass.Optimizer._process_value_according_to_param_policy is value


# Names that torch's classes leave free, and ours use: a subclass may use each for something else.


def free_names(ours: Any, theirs: Any) -> list[str]:
    """The names of an object of ours, and of its class, that mean nothing to torch's."""
    known = {name for cls in type(theirs).__mro__ for name in vars(cls)} | {*vars(theirs)}
    found = {name for cls in type(ours).__mro__ for name in vars(cls)} | {*vars(ours)}
    return sorted(name for name in found - known if not name.startswith(("__", "_onepass")))


def with_attribute(cls: type, name: str) -> type:
    """A class whose objects have a text of this name, from before they are made until after."""

    class Named(cls):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            setattr(self, name, "mine")
            super().__init__(*arguments, **options)
            setattr(self, name, "mine")

    return Named


# What a rule's author overrides, by these names; they are looked up on the class.
DOORS = {"rule", "rule_of", "flags", "initial_state", "steps_rows", "check_options", "gradients"}
DOORS |= {"make_state", "check_names", "ranges"}


@EACH
def test_names_of_optimizers_are_few(name: str) -> None:
    ours, theirs = (getattr(library, name)([parameter()]) for library in BOTH)
    found = {
        free: inspect.getattr_static(type(ours), free, None) for free in free_names(ours, theirs)
    }
    others = {
        free for free, value in found.items() if not isinstance(value, (Misplaced, staticmethod))
    }
    assert others - DOORS == {"_step_supports_amp_scaling"}


@EACH
def test_names_of_optimizers_may_be_attributes(name: str) -> None:
    ours = getattr(onepass, name)
    for free in DOORS:
        p, q = parameter(), parameter()
        opt, plain = with_attribute(ours, free)([p]), ours([q])
        for optimizer, weights in ((opt, p), (plain, q)):
            for _ in range(2):
                g = torch.ones_like(weights)
                weights.grad = g.to_sparse() if name == "SparseAdam" else g
                closure = lambda weights=weights: weights.square().sum()  # noqa: E731
                optimizer.step(*([closure] if name == "LBFGS" else []))
                optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
        assert getattr(opt, free) == "mine"
        assert torch.equal(p, q), free


SCHEDULERS: dict[str, tuple[Any, ...]] = {
    "StepLR": (3,),
    "MultiStepLR": ([2, 4],),
    "ConstantLR": (),
    "LinearLR": (),
    "ExponentialLR": (0.9,),
    "PolynomialLR": (),
    "CosineAnnealingLR": (5,),
    "CosineAnnealingWarmRestarts": (3,),
    "LambdaLR": (lambda t: 0.9**t,),
    "MultiplicativeLR": (lambda t: 0.9,),
    "CyclicLR": (0.01, 0.2),
    "OneCycleLR": (0.2, 20),
    "ReduceLROnPlateau": (),
}


def rates_of(cls: type, arguments: tuple[Any, ...]) -> list[float]:
    opt = torch.optim.SGD([parameter()], lr=0.1, momentum=0.9)
    scheduler: Any = cls(opt, *arguments)
    rates = []
    for _ in range(6):
        opt.step()
        scheduler.step(
            *([1.0] if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else [])
        )
        rates.append(opt.param_groups[0]["lr"])
    scheduler.load_state_dict(scheduler.state_dict())
    return rates


@pytest.mark.parametrize("name", SCHEDULERS)
def test_names_of_schedulers_are_free(name: str) -> None:
    ours, theirs = getattr(onepass.lr_scheduler, name), getattr(torch.optim.lr_scheduler, name)
    arguments = SCHEDULERS[name]
    made = [
        cls(torch.optim.SGD([parameter()], lr=0.1, momentum=0.9), *arguments)
        for cls in (ours, theirs)
    ]
    expected = rates_of(theirs, arguments)
    for free in free_names(*made):
        assert rates_of(with_attribute(ours, free), arguments) == pytest.approx(
            expected, rel=1e-12
        ), free
        method = type("Method", (ours,), {free: lambda self, *_: "mine"})
        assert rates_of(method, arguments) == pytest.approx(expected, rel=1e-12), free


def test_torchs_names_may_be_pointed_at_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """As people do who cannot change the line that imports them."""
    for name in ("Optimizer", "AdamW"):
        monkeypatch.setattr(torch.optim, name, getattr(onepass, name))
    opt = torch.optim.AdamW([parameter()])
    assert type(opt) is onepass.AdamW
    train(opt, 2)
    train(pickle.loads(pickle.dumps(opt)), 1)
    torch.optim.AdamW([parameter()]).load_state_dict(opt.state_dict())


# Objects that no constructor of ours has made, and classes that change.


def test_a_mixin_after_our_class() -> None:
    rows = []
    for library in BOTH:

        class Mixin(torch.optim.Optimizer):
            def __init__(self, params: Any, defaults: Any) -> None:
                super().__init__(params, defaults)
                self.mixed = 1

            def __setstate__(self, state: Any) -> None:
                super().__setstate__(state)
                self.mixed = 2

        for base in (library.Adam, library.AdamW, library.LBFGS):
            opt: Any = type("Mixed", (base, Mixin), {})([parameter()])
            rows.append((opt.mixed, copy.deepcopy(opt).mixed))
    assert rows == [(1, 2)] * 6


@pytest.mark.parametrize(
    "make", [torch.optim.Optimizer.__init__, torch.optim.Adam.__init__], ids=["base", "Adam"]
)
def test_constructors_of_torch(make: Any) -> None:
    class Own(onepass.Adam):
        def __init__(self, params: Any) -> None:
            make(
                self,
                params,
                *(
                    [onepass.Adam([parameter()]).defaults]
                    if "lr" not in make.__annotations__
                    else []
                ),
            )

    p, q = parameter(), parameter()
    opt, twin = Own([p]), onepass.Adam([q])
    for optimizer in (opt, twin):
        train(optimizer, 2)
    assert torch.equal(p, q)


def test_an_object_of_another_class() -> None:
    p, q = parameter(), parameter()
    opt, twin = onepass.Adam([p], lr=0.1), onepass.Adam([q], lr=0.1)
    theirs: Any = torch.optim.Adam([p], lr=0.1)
    for optimizer in (opt, twin):
        train(optimizer, 1)
    other = type(
        "Other", (onepass.Adam,), {"rule": staticmethod(lambda p, g, *, lr: {"p": p - lr * g})}
    )
    opt.__class__ = other
    train(opt, 1, seed=5)
    g = torch.randn(q.shape, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(p.detach(), q.detach() - 0.1 * g)
    theirs.__class__ = onepass.Adam
    train(theirs, 1)


def test_an_empty_group_without_names() -> None:
    x, y = parameter(), parameter(12)
    opt = onepass.Adam([{"params": [("x", x), ("y", y)]}, {"params": []}])
    train(opt, 1)
    new = onepass.Adam([{"params": [("y", y), ("x", x)]}, {"params": []}])
    new.load_state_dict(opt.state_dict())
    assert torch.equal(new.state[x]["exp_avg"], opt.state[x]["exp_avg"])


# A parameter that is twice in a group.


def closure_of(opt: Any, name: str, p: Tensor, q: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        opt.zero_grad()
        loss = (p @ q).square().sum() + p.sum()
        loss.backward()
        for t in (p, q) if name == "SparseAdam" else ():
            t.grad = t.grad.to_sparse()
        return loss

    return closure


def run_with_repeats(library: Any, name: str) -> list[Tensor]:
    p, q = parameter(4, 3), parameter(3, 4)
    opt = getattr(library, name)([p, q, p], lr=0.01)
    for step in range(4):
        closure = closure_of(opt, name, p, q)
        if name == "LBFGS":
            opt.step(closure)
        else:
            closure()
            opt.step()
        if step == 1:
            saved = through_a_file(opt.state_dict())
            opt = getattr(library, name)([p, q, p], lr=0.01)
            opt.load_state_dict(saved)
    return [p.detach(), q.detach(), torch.tensor(float(opt.state[p].get("step", 0)))]


@EACH
def test_a_parameter_twice_in_a_group_steps_twice_as_in_torch(name: str) -> None:
    p = parameter(4, 3)
    with pytest.warns(
        UserWarning,
        match=r"a parameter group with duplicate parameters: parameter 2 of shape \(4, 3\)",
    ):
        getattr(onepass, name)([p, parameter(), p])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = (run_with_repeats(library, name) for library in BOTH)
    for mine, its in zip(ours, theirs, strict=True):
        assert torch.equal(mine, its)


def test_a_group_that_gets_a_parameter_twice() -> None:
    """Groups are lists, which people change; and are put right again."""
    p, q = parameter(), parameter()
    opts = [
        library.AdamW([p.detach().clone().requires_grad_(), q.detach().clone()]) for library in BOTH
    ]
    for step in range(6):
        for opt in opts:
            params = opt.param_groups[0]["params"]
            if step in (2, 4):
                params[1:] = params[:1] * 2 if step == 2 else [q.detach().clone()]
            for t in params:
                t.grad = torch.full_like(t, step + 1.0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                opt.step()
    for mine, its in zip(*(opt.param_groups[0]["params"] for opt in opts), strict=True):
        torch.testing.assert_close(mine, its)


def test_a_rule_of_ones_own_takes_each_parameter_once() -> None:
    class Plain(onepass.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 0.1})

        @staticmethod
        def rule(p: Any, g: Any, *, lr: Any) -> dict[str, Any]:
            return {"p": p - lr * g}

    class Other(onepass.Adam):
        rule = Plain.rule

    p = parameter()
    p.grad = torch.ones_like(p)
    for cls in (Plain, Other):
        with pytest.raises(
            ValueError,
            match=r"duplicate parameters: parameter 1 of shape \(4, 3\); give each parameter once",
        ):
            cls([p, p])
        opt = cls([p])
        opt.param_groups[0]["params"].append(p)
        before = p.detach().clone()
        with pytest.raises(onepass.StepError, match="occurs twice"):
            opt.step()
        assert torch.equal(p, before)


@pytest.mark.filterwarnings("ignore:.*duplicate parameters")
def test_grad_scaler_unscales_where_torchs_code_steps() -> None:
    """That code unscales only where it is fused."""
    p, q = parameter(), parameter()
    asks = {"__name__": torch.amp.GradScaler.__module__}
    for params, expected in (([p, q], True), ([p, p], False)):
        opt = onepass.Adamax(params, capturable=True)
        assert eval("opt._step_supports_amp_scaling", asks | {"opt": opt}) is expected


# What only differentiable steps, meta tensors and old checkpoints meet.


def test_autograd_sees_all_of_nadams_state() -> None:
    def step(p: Tensor, g: Tensor, m: Tensor, v: Tensor, product: Tensor) -> tuple[Tensor, ...]:
        p = p.clone()
        p.grad = g
        opt = onepass.NAdam([p], lr=0.9, differentiable=True)
        state = {"exp_avg": m.clone(), "exp_avg_sq": v.clone(), "mu_product": product.clone()}
        opt.state[p] = {"step": torch.tensor(10.0), **state}
        opt.step()
        return p, *(opt.state[p][name] for name in state)

    values = [torch.rand(5, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    assert torch.autograd.gradcheck(
        step, (*values, torch.tensor(0.8, dtype=torch.float64, requires_grad=True))
    )


@pytest.mark.parametrize("name", ["p", "exp_avg", "mu_product"])
def test_a_leaf_that_a_differentiable_step_cannot_write(name: str) -> None:
    p = torch.ones(3)
    opt = onepass.NAdam([p], differentiable=True)
    p.grad = torch.ones(3)
    opt.step()
    leaf = p if name == "p" else opt.state[p][name]
    before = [t.clone() for t in (p, *opt.state[p].values())]
    leaf.requires_grad_()
    with pytest.raises(
        onepass.StepError, match=r"a leaf Variable that requires grad.*clone\(\) in the place of"
    ):
        opt.step()
    for t, kept in zip((p, *opt.state[p].values()), before, strict=True):
        assert torch.equal(t, kept)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_fused_needs_memory(name: str) -> None:
    model = nn.Linear(2, 2, device="meta")
    opt = getattr(onepass, name)(model.parameters(), fused=True)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(
        RuntimeError, match="`fused=True` requires all the params to be floating point Tensors"
    ):
        opt.step()
    opt.zero_grad()
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()


# Copies and warnings.


@pytest.mark.parametrize("library", BOTH, ids=["ours", "torch"])
def test_a_shallow_copy_shares_the_state(library: Any) -> None:
    p = parameter()
    p.grad = torch.ones_like(p)
    opt = library.Adam([p])
    other = copy.copy(opt)
    assert other.state is opt.state
    other.step()
    opt.step()
    assert opt.state[p]["step"] == 2


def test_state_of_a_class_with_a_step_of_its_own_keeps_its_kind() -> None:
    class Keeper(onepass.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 0.1})

    p = parameter()
    opt = Keeper([p])
    rows = torch.eye(3).to_sparse()
    opt.state[p] = {
        "kept": nn.Parameter(torch.ones(2)),
        "rows": rows,
        "both": [rows, {"more": rows * 2}],
    }
    other = Keeper([p])
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    kept, found = other.state[p]["kept"], other.state[p]
    assert isinstance(kept, nn.Parameter)
    assert kept is not opt.state[p]["kept"]
    for t in (found["rows"], found["both"][0], found["both"][1]["more"]):
        assert t.layout == torch.sparse_coo
    assert torch.equal(found["both"][1]["more"].to_dense(), 2 * torch.eye(3))


def test_warnings_name_the_users_line() -> None:
    def load_other_names() -> None:
        opt, other = (onepass.Adam([(name, parameter())]) for name in ("a", "b"))
        other.load_state_dict(opt.state_dict())

    p = parameter()
    p.grad = torch.ones_like(p)
    ways: list[Callable[[], Any]] = [
        lambda: onepass.SGD([{"params": [p], "momentun": 0.9}]),
        lambda: onepass.SGD([parameter()]).add_param_group({"params": [p], "momentun": 0.9}),
        lambda: onepass.AdamW([p, p]),
        load_other_names,
        lambda: OwnReader([p]).step(),
    ]
    for way in ways:
        with pytest.warns(UserWarning, match=": ") as found:
            way()
        assert {w.filename for w in found} == {__file__}


class OwnReader(onepass.SGD):
    """Overrides what only torch's step calls."""

    def _init_group(self, *args: Any) -> Any:
        return super()._init_group(*args)


# A step of one's own that calls ours: what it loads is checked as for ours, whatever was made
# before.


def steps_that_call_ours() -> list[type[onepass.Adam]]:
    class Plain(onepass.Adam):
        pass

    class Around(onepass.Adam):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    class ByName(Plain):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            return onepass.Adam.step(self, closure)

    return [Plain, Around, ByName]


@pytest.mark.parametrize("i", range(3))
def test_half_right_state_is_refused_where_our_step_runs(i: int) -> None:
    cls, p = steps_that_call_ours()[i], parameter()
    p.grad = torch.ones_like(p)
    opt = cls([p])
    opt.step()
    ones = torch.ones_like(p)
    for bad in (
        {"momentum_buffer": ones},
        {"step": torch.tensor(3.0)},
        {"exp_avg": ones, "exp_avg_sq": ones},
        {"step": torch.tensor(-5.0), "exp_avg": ones, "exp_avg_sq": ones},
    ):
        saved = copy.deepcopy(opt.state_dict())
        saved["state"][0] = bad
        with pytest.raises(ValueError, match="parameter 0"):
            cls([parameter()]).load_state_dict(saved)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_begins_again_where_its_count_is_0(search: str | None) -> None:
    rows = []
    for library in BOTH:
        p = parameter()
        opt = library.LBFGS([p], lr=0.3, max_iter=4, history_size=5, line_search_fn=search)
        closure = closure_of(opt, "LBFGS", p, torch.ones(3, 2))
        for step in range(5):
            if step == 3:
                opt.state[p]["n_iter"] = 0
            opt.step(closure)
        rows.append(p.detach())
    assert torch.equal(*rows)


# Python's protocol of copies.


def test_shallow_copies_go_as_a_class_says() -> None:
    class Pair(onepass.Adam):
        def __getstate__(self) -> Any:
            return super().__getstate__(), 1

        def __setstate__(self, state: Any) -> None:
            super().__setstate__(state[0])

    class Made(onepass.Adam):
        def __reduce__(self) -> Any:
            return Made, (self.param_groups[0]["params"], 0.5)

    p = parameter()
    opt = Pair([p])
    assert copy.copy(opt).state is opt.state
    assert copy.copy(Made([p])).defaults["lr"] == 0.5
    assert pickle.loads(pickle.dumps(onepass.Adam([p]))).state == {}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_state_of_any_kind_is_loaded() -> None:
    class Kind(Tensor):
        pass

    class Keeper(onepass.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 0.1})

    p = parameter()
    opt, other = Keeper([p]), Keeper([p])
    opt.state[p] = {"kind": torch.ones(2).as_subclass(Kind), "rows": torch.eye(3).to_sparse_csr()}
    other.load_state_dict(opt.state_dict())
    assert type(other.state[p]["kind"]) is Kind
    assert other.state[p]["rows"].layout == torch.sparse_csr


def test_classes_can_be_looked_through() -> None:
    assert dict(inspect.getmembers(onepass.Adam))["step"]


# Schedulers of optimizers that no constructor has made.


class Around(onepass.Optimizer):
    def __init__(self, inner: Any) -> None:
        self.inner, self.param_groups, self.defaults, self.state = (
            inner,
            inner.param_groups,
            inner.defaults,
            inner.state,
        )

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


def test_a_wrapper_with_a_scheduler_is_saved_and_freed() -> None:
    wrapper = Around(torch.optim.SGD([parameter()], lr=0.1))
    scheduler = onepass.lr_scheduler.ExponentialLR(wrapper, 0.5)
    wrapper.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()
    pickle.dumps({name: value for name, value in vars(wrapper).items() if name != "step"})
    known = weakref.ref(wrapper)
    gc.disable()
    try:
        del wrapper, scheduler
        assert known() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("library", BOTH, ids=["ours", "torch"])
def test_a_step_that_is_replaced_and_never_calls_the_first(library: Any) -> None:
    schedulers = library.lr_scheduler
    opt = torch.optim.SGD([parameter()], lr=0.1)
    scheduler = schedulers.StepLR(opt, 1)
    opt.step = types.MethodType(lambda self: None, opt)
    opt.step()
    with pytest.warns(UserWarning, match="has been overridden"):
        scheduler.step()
    other = torch.optim.SGD([parameter()], lr=0.1)
    other.step = types.MethodType(lambda self: None, other)
    scheduler = schedulers.StepLR(other, 1)
    other.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()
