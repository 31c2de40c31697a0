"""A step happens as a whole or not at all, whatever the memory and the classes of its tensors are
like."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any, ClassVar

import pytest
import torch
import torch.multiprocessing
from support.side_by_side import ALGORITHMS, Side, both, make_side, on_both, snapshot
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

import onepass
from onepass import StepError
from onepass.stepping import eager_members

pytestmark = pytest.mark.filterwarnings("ignore:.*slower eager backend.*")

EAGER = {"foreach": False, "fused": False}
BACKENDS = {"kernel": {}, "eager": EAGER}
# Each has its own state: none, a column, columns and counts, numbers of the rule's, rows and
# columns, matrices.
RULES = {
    "sgd": ("SGD", {"lr": 0.1}),
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "adam": ("Adam", {"lr": 0.05, "weight_decay": 0.1}),
    "amsgrad": ("AdamW", {"lr": 0.05, "amsgrad": True}),
    "nadam": ("NAdam", {"lr": 0.05}),
    "adafactor": ("Adafactor", {"lr": 0.1}),
    "muon": ("Muon", {"lr": 0.1}),
}
on_each_backend = pytest.mark.parametrize("backend", BACKENDS)
by_each_rule = pytest.mark.parametrize("rule", RULES)


def make(library: Any, rule: str, params: Any, backend: str = "kernel") -> Any:
    """An optimizer; the groups of all classes can choose a backend, not all constructors."""
    name, options = RULES[rule] if rule in RULES else ALGORITHMS[rule]
    opt = getattr(library, name)(params, **options)
    for group in opt.param_groups:
        group.update(BACKENDS[backend])
    return opt


def set_gradients(params: Sequence[Tensor], seed: int, only: Sequence[int] | None = None) -> None:
    random = torch.Generator().manual_seed(seed)
    for i, p in enumerate(params):
        g = torch.randn(p.shape, generator=random, dtype=torch.float64)
        p.grad = g.to(p.dtype) if only is None or i in only else None


def whole(t: Any) -> Any:
    """A tensor's values, whatever its class, comparable by ==; NaN does not occur."""
    if not isinstance(t, Tensor):
        return t
    plain = t.content if isinstance(t, Wrapper) else t.detach().as_subclass(Tensor)
    facts = tuple(plain.shape), plain.stride(), plain.dtype, plain.is_neg()
    return (
        *facts,
        bytes(plain.detach().resolve_neg().contiguous().reshape(-1).view(torch.uint8).tolist()),
    )


def contents(opt: Any) -> list[Any]:
    """All parameters, states and numbers, and the versions of plain tensors."""
    found: list[Any] = []
    for p in (p for group in opt.param_groups for p in group["params"]):
        tensors = {"p": p} | dict(opt.state.get(p, {}))
        found += [(name, whole(t)) for name, t in sorted(tensors.items())]
        plain = [t for t in tensors.values() if type(t) in (Tensor, nn.Parameter)]
        found += [(id(t), t._version) for t in plain]
    return found


def values(opt: Any) -> list[Any]:
    """As `contents`, without what belongs to one object only."""
    return [pair for pair in contents(opt) if isinstance(pair[0], str)]


# A parameter's memory becomes something that cannot be stepped.


def expanded(p: Tensor) -> None:
    p.data = torch.zeros(1).expand(p.shape)


def rows_expanded(p: Tensor) -> None:
    p.data = torch.zeros(p.shape[-1]).expand(p.shape)


def integers(p: Tensor) -> None:
    p.requires_grad_(False)
    p.data = torch.zeros(p.shape, dtype=torch.int32)


def freed(p: Tensor) -> None:
    p.data = torch.zeros(*p.shape[:-1], 2 * p.shape[-1])[..., ::2]
    p.untyped_storage().resize_(0)


def shrunk(p: Tensor) -> None:
    p.data = torch.zeros(*p.shape[:-1], 2 * p.shape[-1])[..., ::2]
    p.untyped_storage().resize_(p.untyped_storage().nbytes() - 8)


def another_shape(p: Tensor) -> None:
    p.data = torch.zeros(p.shape[0] + 1, *p.shape[1:])


def inference(p: Tensor) -> None:
    with torch.inference_mode():
        p.data = torch.zeros(*p.shape[:-1], 2 * p.shape[-1])[..., ::2]


DAMAGES = [expanded, rows_expanded, integers, freed, shrunk, another_shape, inference]
SHAPE = (3, 2)


def with_holes(library: Any, rule: str, backend: str, place: int) -> Any:
    random = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(SHAPE, generator=random)) for _ in range(3)]
    params[place] = nn.Parameter(torch.randn(3, 4, generator=random)[:, ::2])
    return make(library, rule, params, backend), params


@on_each_backend
@pytest.mark.parametrize("rule", ["momentum", "adam", "nadam", "adafactor", "muon"])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_parameter_with_holes_is_damaged(
    damage: Callable[[Tensor], None], rule: str, backend: str
) -> None:
    """The step raises, changes nothing, and the next one goes on as if nothing had been."""
    for place in (0, 2):
        (opt, params), (twin, others) = (
            with_holes(onepass, rule, backend, place) for _ in range(2)
        )
        for t in range(3):
            set_gradients(params, t)
            set_gradients(others, t)
            if t == 2:
                kept = params[place].data
                damage(params[place])
                refuses_or_steps(opt, params)
                params[place].data = kept
                params[place].requires_grad_()
                if params[place].grad is None:
                    set_gradients(params, t)
            opt.step()
            twin.step()
        assert values(opt) == values(twin)


def refuses_or_steps(opt: Any, params: Sequence[Tensor]) -> None:
    before = snapshot(opt), [p._version for p in params]
    with pytest.raises(StepError):
        opt.step()
    assert (snapshot(opt), [p._version for p in params]) == before


@on_each_backend
@by_each_rule
def test_parameter_with_holes_becomes_wider(rule: str, backend: str) -> None:
    """Another dtype is no damage: all step."""
    for place in range(3):
        opt, params = with_holes(onepass, rule, backend, place)
        for t in range(3):
            set_gradients(params, t)
            if t == 2:
                params[place].data = params[place].data.double()
                params[place].grad = params[place].grad.double()
            before = [p.detach().clone() for p in params]
            opt.step()
            assert not any(torch.equal(p, q) for p, q in zip(params, before, strict=True))
        assert {float(entry["step"]) for entry in opt.state.values() if "step" in entry} <= {3.0}


# Tensors of other classes, which may refuse what is asked of them.


class RefusedError(Exception):
    """What a tensor raises that does not want to be written."""


class Wrapper(Tensor):
    """A tensor around another one; what is in `refusing` refuses to be written."""

    content: Tensor
    refusing: ClassVar[set[int]] = set()

    @staticmethod
    def __new__(cls, content: Tensor, requires_grad: bool = False) -> Wrapper:
        wrapper = Tensor._make_wrapper_subclass(
            cls,
            content.shape,
            content.stride(),
            content.storage_offset(),
            dtype=content.dtype,
            requires_grad=requires_grad,
        )
        wrapper.content = content
        return wrapper

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Wrapper({self.content})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def bare(x: Any) -> Any:
            return x.content if isinstance(x, Wrapper) else x

        in_place = func._schema.name.endswith("_")
        if in_place and isinstance(args[0], Wrapper) and id(args[0].content) in Wrapper.refusing:
            raise RefusedError
        if func is torch.ops.aten.detach.default:
            return Wrapper(args[0].content)
        result = func(*tree_map(bare, args), **tree_map(bare, kwargs or {}))
        return (
            args[0]
            if in_place
            else tree_map(lambda x: Wrapper(x) if isinstance(x, Tensor) else x, result)
        )

    @staticmethod
    def refuse(t: Any) -> None:
        Wrapper.refusing.add(id(t.content))

    @staticmethod
    def yield_() -> None:
        Wrapper.refusing.clear()


class Function(Tensor):
    """The same by `__torch_function__`, with memory of its own."""

    refusing: ClassVar[set[int]] = set()

    @staticmethod
    def __new__(cls, data: Tensor, requires_grad: bool = False) -> Function:
        return Tensor._make_subclass(cls, data, requires_grad)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        # Not by its address, which would be another operation.
        if in_place and id(args[0]) in Function.refusing:
            raise RefusedError
        return super().__torch_function__(func, types, args, kwargs or {})

    @staticmethod
    def refuse(t: Any) -> None:
        Function.refusing.add(id(t))

    @staticmethod
    def yield_() -> None:
        Function.refusing.clear()


@pytest.fixture(autouse=True)
def _nobody_refuses() -> Any:
    yield
    Wrapper.yield_()
    Function.yield_()


CLASSES = {"dispatch": Wrapper, "function": Function}
# Plain parameters, lazily negated ones, good ones of the class, and the bad one.
LISTS = ("bpp", "pbn", "npb", "gbp", "bgp", "pgb")


def of_classes(rule: str, backend: str, kinds: str, cls: Any) -> tuple[Any, list[Any]]:
    random = torch.Generator().manual_seed(0)
    params: list[Any] = []
    for kind in kinds:
        data = torch.randn(SHAPE, generator=random)
        params.append(cls(data, True) if kind in "gb" else nn.Parameter(data))
        if kind == "n":
            params[-1].data = torch._neg_view(-data)
    return make(onepass, rule, params, backend), params


def fails_whole(opt: Any, bad: Any, cls: Any) -> None:
    """The step raises, changes nothing, and again; then nobody refuses any more."""
    cls.refuse(bad)
    before = contents(opt)
    for _ in range(2):
        with pytest.raises(RefusedError):
            opt.step()
        assert contents(opt) == before, "a failed step has changed something"
    cls.yield_()


@on_each_backend
@pytest.mark.parametrize(
    ("cls", "rule"),
    [*(("dispatch", rule) for rule in RULES), ("function", "momentum"), ("function", "nadam")],
)
def test_parameter_refuses(cls: str, rule: str, backend: str) -> None:
    for kinds in LISTS:
        for good_steps in (0, 2):
            (opt, params), (twin, others) = (
                of_classes(rule, backend, kinds, CLASSES[cls]) for _ in range(2)
            )
            for t in range(good_steps + 2):
                set_gradients(params, t)
                set_gradients(others, t)
                if t == good_steps:
                    fails_whole(opt, params[kinds.index("b")], CLASSES[cls])
                opt.step()
                twin.step()
            assert values(opt) == values(twin), kinds


COLUMNS = {
    "momentum": ["momentum_buffer"],
    "adam": ["exp_avg", "exp_avg_sq"],
    "amsgrad": ["max_exp_avg_sq"],
    "nadam": ["exp_avg_sq"],
    "adafactor": ["row_var", "col_var"],
    "muon": ["momentum_buffer"],
}
NUMBERS = {"adam": ["step"], "nadam": ["step", "mu_product"], "adafactor": ["step"]}
STATES = [
    (rule, name) for table in (COLUMNS, NUMBERS) for rule, names in table.items() for name in names
]


@on_each_backend
@pytest.mark.parametrize(("rule", "name"), STATES)
@pytest.mark.parametrize("cls", CLASSES)
def test_state_refuses(cls: str, rule: str, name: str, backend: str) -> None:
    """A state that is of such a class: the step fails as a whole, unless it replaces what refuses,
    as a number."""
    for place in range(3):
        (opt, params), (twin, others) = (of_classes(rule, backend, "ppp", Tensor) for _ in range(2))
        for t in range(4):
            set_gradients(params, t)
            set_gradients(others, t)
            if t == 2:
                for some_opt, some in ((opt, params), (twin, others)):
                    entry = some_opt.state[some[place]]
                    entry[name] = CLASSES[cls](entry[name].clone())
                CLASSES[cls].refuse(opt.state[params[place]][name])
                before = contents(opt)
                try:
                    opt.step()
                except RefusedError:
                    assert contents(opt) == before, "a failed step has changed something"
                    CLASSES[cls].yield_()
                    opt.step()
                CLASSES[cls].yield_()
            else:
                opt.step()
            twin.step()
        assert values(opt) == values(twin)


@on_each_backend
@pytest.mark.parametrize("library", ["SGD", "Adagrad", "SparseAdam"])
def test_parameter_with_a_sparse_gradient_refuses(library: str, backend: str) -> None:
    """Rows, too, are all stored or none."""
    for kinds in LISTS:
        for good_steps in (0, 2):
            runs = []
            for _ in range(2):
                random = torch.Generator().manual_seed(0)
                data = [torch.randn(4, 2, generator=random) for _ in kinds]
                params = [
                    Wrapper(d, True) if c in "gb" else nn.Parameter(d)
                    for d, c in zip(data, kinds, strict=True)
                ]
                opt = getattr(onepass, library)(params, lr=0.1)
                opt.param_groups[0].update(BACKENDS[backend])
                runs.append((opt, params))
            (opt, params), (twin, others) = runs
            for t in range(good_steps + 2):
                for p in (*params, *others):
                    p.grad = torch.sparse_coo_tensor(
                        torch.tensor([[1, 3]]),
                        torch.full((2, 2), 1.0 + t),
                        (4, 2),
                        check_invariants=False,
                    )
                if t == good_steps:
                    fails_whole(opt, params[kinds.index("b")], Wrapper)
                opt.step()
                twin.step()
            assert values(opt) == values(twin), kinds


def make_inference(entry: Tensor) -> Tensor:
    with torch.inference_mode():
        return entry.clone()


def expand_first_row(entry: Tensor) -> Tensor:
    return (
        entry.flatten()[:1].expand(entry.numel()).view(entry.shape)
        if entry.numel() > 1
        else entry.expand(())
    )


@on_each_backend
@pytest.mark.parametrize(
    ("rule", "name"), [s for s in STATES if s[1] not in ("step", "mu_product")]
)
@pytest.mark.parametrize("place", range(3))
def test_state_made_in_inference_mode(place: int, rule: str, name: str, backend: str) -> None:
    (opt, params), (twin, others) = (of_classes(rule, backend, "ppp", Tensor) for _ in range(2))
    for t in range(4):
        set_gradients(params, t)
        set_gradients(others, t)
        if t == 2:
            entry = opt.state[params[place]]
            kept, entry[name] = entry[name], make_inference(entry[name])
            before = snapshot(opt), [p._version for p in params]
            with pytest.raises(StepError, match="inference"):
                opt.step()
            assert (snapshot(opt), [p._version for p in params]) == before
            entry[name] = kept
        opt.step()
        twin.step()
    assert values(opt) == values(twin)


@on_each_backend
@pytest.mark.parametrize(("rule", "name"), [(r, n) for r, names in NUMBERS.items() for n in names])
def test_number_made_in_inference_mode(rule: str, name: str, backend: str) -> None:
    (opt, params), (twin, others) = (of_classes(rule, backend, "ppp", Tensor) for _ in range(2))
    for t in range(4):
        set_gradients(params, t)
        set_gradients(others, t)
        if t == 2:
            entry = opt.state[params[1]]
            entry[name] = make_inference(entry[name])
        opt.step()
        twin.step()
    assert values(opt) == values(twin)


@on_each_backend
@pytest.mark.parametrize(
    ("rule", "name"), [s for s in STATES if s[1] not in ("step", "mu_product")]
)
@pytest.mark.parametrize("place", range(3))
def test_expanded_state(place: int, rule: str, name: str, backend: str) -> None:
    """It steps as a dense copy of it does."""
    (opt, params), (twin, others) = (of_classes(rule, backend, "ppp", Tensor) for _ in range(2))
    for t in range(4):
        set_gradients(params, t)
        set_gradients(others, t)
        if t == 2:
            state = opt.state[params[place]]
            state[name] = expand_first_row(state[name])
            twin.state[others[place]][name] = state[name].clone(
                memory_format=torch.contiguous_format
            )
        opt.step()
        twin.step()
    assert [v[-1] for _, v in values(opt) if isinstance(v, tuple)] == [
        v[-1] for _, v in values(twin) if isinstance(v, tuple)
    ]


@on_each_backend
@by_each_rule
def test_undo_of_a_first_step(rule: str, backend: str) -> None:
    """State that a failed first step has made is gone, also that of parameters that have stepped
    before."""
    opt, params = of_classes(rule, backend, "pbpg", Wrapper)
    set_gradients(params, 0, only=[0])
    opt.step()
    set_gradients(params, 1)
    fails_whole(opt, params[1], Wrapper)
    assert len(opt.state) <= 1


# What a rule returns may be what it was given.


class Previous(onepass.Optimizer):
    """Keeps the parameter as it was before the step."""

    def __init__(self, params: Any, lr: float = 0.1, **modes: Any) -> None:
        super().__init__(params, {"lr": lr} | modes)

    @staticmethod
    def rule(p: Any, g: Any, prev: Any, *, lr: Any) -> dict[str, Any]:
        return {"p": p - lr * g, "prev": p}


class Exchange(Previous):
    """Two states that change places, with the gradient in between."""

    @staticmethod
    def rule(p: Any, g: Any, a: Any, b: Any, *, lr: Any) -> dict[str, Any]:  # type: ignore[override]
        return {"p": p - lr * a, "a": b, "b": g}


@on_each_backend
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("cls", [Tensor, Function], ids=["plain", "class"])
def test_old_value_as_a_state(cls: Any, dtype: torch.dtype, count: int, backend: str) -> None:
    start = [torch.arange(1.0, 4.0 + i).to(dtype) for i in range(count)]
    params: list[Any] = [
        nn.Parameter(t.clone()) if cls is Tensor else cls(t.clone(), True) for t in start
    ]
    opt = Previous(params, lr=0.5, **BACKENDS[backend])
    for t in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
        for p, first in zip(params, start, strict=True):
            assert (p.detach() == first - 0.5 * (t + 1)).all()
            assert (opt.state[p]["prev"] == first - 0.5 * t).all()


@on_each_backend
@pytest.mark.parametrize("count", [1, 3])
def test_states_change_places(count: int, backend: str) -> None:
    params = [nn.Parameter(torch.zeros(3)) for _ in range(count)]
    opt = Exchange(params, lr=1.0, **BACKENDS[backend])
    # p has moved by what was the gradient two steps ago.
    for t, moved in enumerate([0.0, 0.0, -1.0, -3.0, -6.0]):
        for p in params:
            p.grad = torch.full((3,), t + 1.0)
        opt.step()
        for p in params:
            assert (p.detach() == moved).all()
            assert (opt.state[p]["b"] == t + 1).all()
            assert (opt.state[p]["a"] == t).all()


# Parameters that share memory step one after the other.

LAYOUTS: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "equal": lambda b: [b[:16].view(4, 4), b[:16].view(4, 4), b[32:48].view(4, 4)],
    "three equal": lambda b: [b[:16].view(4, 4) for _ in range(3)],
    "overlapping": lambda b: [b[:16].view(4, 4), b[6:22].view(4, 4)],
    "backwards": lambda b: [b[6:22].view(4, 4), b[:16].view(4, 4)],
    "chained": lambda b: [
        b[:16].view(4, 4),
        b[10:22].view(4, 3),
        b[20:40].view(5, 4),
        b[50:56].view(2, 3),
    ],
    "transposed": lambda b: [b[:16].view(4, 4), b[:16].view(4, 4).t()],
    "transposed first": lambda b: [b[:12].view(3, 4).t(), b[:12].view(3, 4)],
    "both transposed": lambda b: [b[:16].view(4, 4).t(), b[8:24].view(4, 4).t()],
    "holes": lambda b: [b[:24].view(4, 6)[:, ::2], b[:24].view(4, 6)[:, 1:4]],
    "interleaved": lambda b: [b[:24].view(4, 6)[:, ::2], b[:24].view(4, 6)[:, 1::2]],
    "whole and holes": lambda b: [b[:24].view(4, 6), b[:24].view(4, 6)[1:3, ::2]],
    "holes and whole": lambda b: [
        b[:24].view(4, 6)[1:3, ::2],
        b[:24].view(4, 6),
        b[30:36].view(2, 3),
    ],
    "another apart": lambda b: [
        b[40:52].view(3, 4),
        b[:16].view(4, 4),
        b[8:20].view(3, 4),
        b[60:72].view(4, 3),
    ],
}
SHARING = ("momentum", "adam", "amsgrad", "nadam", "adafactor", "muon")
# One walk over memory, and several; the other rules with some of the layouts.
LAID_OUT = [(layout, rule) for layout in LAYOUTS for rule in ("momentum", "adafactor")]
LAID_OUT += [
    (n, rule)
    for n in ("equal", "transposed", "holes and whole")
    for rule in SHARING
    if (n, rule) not in LAID_OUT
]
STRICT = {"rtol": 1e-11, "atol": 1e-13}


def sequential(rule: str, params: Sequence[Tensor], lrs: Sequence[float]) -> list[Any]:
    """An oracle: torch's loop over parameters; for Muon, which torch computes in bfloat16, one
    optimizer for each."""
    if rule != "muon":
        opt = getattr(torch.optim, RULES[rule][0])(
            [{"params": [p], "lr": lr} for p, lr in zip(params, lrs, strict=True)],
            **RULES[rule][1],
            foreach=False,
        )
        return [opt]
    return [onepass.Muon([p], lr=lr) for p, lr in zip(params, lrs, strict=True)]


@on_each_backend
@pytest.mark.parametrize(("layout", "rule"), LAID_OUT)
@pytest.mark.parametrize("groups", [False, True], ids=["one group", "groups"])
def test_shared_memory_of_parameters(groups: bool, layout: str, rule: str, backend: str) -> None:
    # So that the rules' numbers are strict, too.
    torch.set_default_dtype(torch.float64)
    ends = []
    for ours in (True, False):
        buffer = torch.randn(80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        params = [nn.Parameter(t) for t in LAYOUTS[layout](buffer)]
        lrs = [0.1 * (1 + i) if groups else 0.1 for i in range(len(params))]
        if ours:
            pairs = [{"params": [p], "lr": lr} for p, lr in zip(params, lrs, strict=True)]
            given = pairs if groups else [{"params": params, "lr": 0.1}]
            opts = [make(onepass, rule, given, backend)]
        else:
            opts = sequential(rule, params, lrs)
        for t in range(4):
            set_gradients(params, t, only=None if t != 2 else [0, len(params) - 1])
            for opt in opts:
                opt.step()
        ends.append(buffer)
    torch.testing.assert_close(*ends, **STRICT)


@on_each_backend
@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam", "amsgrad"])
def test_shared_memory_of_groups_that_compute_differently(rule: str, backend: str) -> None:
    """The order is that of the parameters, also where one before both steps together with the
    second of them."""
    ends = []
    for library in (onepass, torch.optim):
        buffer = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        params = [
            nn.Parameter(torch.ones(3, dtype=torch.float64)),
            nn.Parameter(buffer[:8]),
            nn.Parameter(buffer[4:]),
        ]
        opt = make(library, rule, [{"params": [p], "lr": 0.1, "weight_decay": 0.3} for p in params])
        opt.param_groups[1]["maximize"] = True
        for group in opt.param_groups:
            group.update(BACKENDS[backend] if library is onepass else {"foreach": False})
        for t in range(3):
            set_gradients(params, t)
            opt.step()
        ends.append(buffer)
    torch.testing.assert_close(*ends, **STRICT)


@on_each_backend
@pytest.mark.parametrize(("layout", "rule"), LAID_OUT)
def test_memory_becomes_shared(layout: str, rule: str, backend: str) -> None:
    """By `.data =` after two steps, and after two others it is shared no more."""
    # So that the rules' numbers are strict, too.
    torch.set_default_dtype(torch.float64)
    ends = []
    for ours in (True, False):
        buffer = torch.randn(80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        views = LAYOUTS[layout](buffer)
        params = [nn.Parameter(t.clone()) for t in views]
        opts = (
            [make(onepass, rule, [{"params": params, "lr": 0.1}], backend)]
            if ours
            else sequential(rule, params, [0.1] * len(params))
        )
        for t in range(6):
            if t in (2, 4):
                for p, view in zip(params, views, strict=True):
                    p.data = view if t == 2 else view.clone()
            set_gradients(params, t)
            for opt in opts:
                opt.step()
        ends.append([buffer, *(p.detach() for p in params)])
    torch.testing.assert_close(*ends, **STRICT)


@on_each_backend
@pytest.mark.parametrize(
    ("rule", "name"), [(r, n) for r in SHARING if r != "muon" for n in COLUMNS[r]]
)
@pytest.mark.parametrize("place", [(0, 1), (0, 2), (2, 1)])
def test_shared_states(place: tuple[int, int], rule: str, name: str, backend: str) -> None:
    """Two parameters have one state tensor: the second goes on with what the first has made of
    it."""
    # So that the rules' numbers are strict, too.
    torch.set_default_dtype(torch.float64)
    ends = []
    for ours in (True, False):
        random = torch.Generator().manual_seed(0)
        params = [
            nn.Parameter(torch.randn(3, 2, generator=random, dtype=torch.float64)) for _ in range(3)
        ]
        opt = make(onepass, rule, params, backend) if ours else make(torch.optim, rule, params)
        if not ours:
            opt.param_groups[0].update(foreach=False)
        for t in range(5):
            if t == 2:
                first, second = place
                opt.state[params[second]][name] = opt.state[params[first]][name]
            set_gradients(params, t)
            opt.step()
        assert opt.state[params[place[0]]][name] is opt.state[params[place[1]]][name]
        ends.append([p.detach() for p in params])
    torch.testing.assert_close(*ends, **STRICT)


@on_each_backend
@pytest.mark.parametrize("rule", ["sgd", "momentum"])
@pytest.mark.parametrize("bit", ["negated", "conjugated", "both"])
@pytest.mark.parametrize("first", [False, True], ids=["second", "first"])
def test_shared_memory_of_a_lazy_view(first: bool, bit: str, rule: str, backend: str) -> None:
    """A parameter that is the lazy negative, or the conjugate, of another one."""
    ends = []
    for library in (onepass, torch.optim):
        random = torch.Generator().manual_seed(0)
        buffer = torch.randn(6, generator=random, dtype=torch.complex128)
        params = [nn.Parameter(buffer.clone()) for _ in range(3)]
        params[0].data = buffer
        view = buffer if bit == "negated" else buffer.conj()
        params[1].data = view if bit == "conjugated" else torch._neg_view(view)
        if first:
            params.reverse()
        opt = make(library, rule, params, backend if library is onepass else "kernel")
        for _ in range(4):
            for p in params:
                p.grad = torch.randn(6, generator=random, dtype=torch.complex128)
            opt.step()
        ends.append(buffer)
    torch.testing.assert_close(*ends, **STRICT)


@on_each_backend
@pytest.mark.parametrize("rule", ["momentum", "adam", "adafactor"])
@pytest.mark.parametrize("later", ["no gradient", "refuses"])
def test_shared_memory_and_a_failing_step(later: str, rule: str, backend: str) -> None:
    """What shares memory is not half stored either."""
    runs = []
    for _ in range(2):
        buffer = torch.randn(40, generator=torch.Generator().manual_seed(0))
        params: list[Any] = [
            nn.Parameter(buffer[:12].view(3, 4)),
            nn.Parameter(buffer[6:18].view(3, 4)),
        ]
        params.append(Wrapper(torch.ones(3, 4), True))
        runs.append((make(onepass, rule, params, backend), params))
    (opt, params), (twin, others) = runs
    for t in range(4):
        only = [0, 1, 2] if t >= 2 or later == "refuses" else [0, 1]
        set_gradients(params, t, only)
        set_gradients(others, t, only)
        if t == 2:
            fails_whole(opt, params[2], Wrapper)
        opt.step()
        twin.step()
    assert values(opt) == values(twin)


@on_each_backend
@pytest.mark.parametrize("good_steps", [0, 2])
def test_state_that_no_rule_reads_may_be_anything(good_steps: int, backend: str) -> None:
    """As in torch: without momentum SGD does not look for any."""
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt, twin = make(onepass, "sgd", [p], backend), make(onepass, "sgd", [q], backend)
    for t in range(4):
        if t == good_steps:
            opt.state[p] = "text"
        set_gradients([p], t)
        set_gradients([q], t)
        opt.step()
        twin.step()
    assert torch.equal(p, q)
    assert opt.state[p] == "text"


# The bits that say "negated" and "conjugated".


def negative(t: Tensor) -> Tensor:
    return torch._neg_view(-t)


def imaginary(t: Tensor) -> Tensor:
    """The same numbers as the imaginary part of a conjugate, with holes."""
    return torch.complex(torch.zeros_like(t), -t).conj().imag


def imaginary_and_dense(t: Tensor) -> Tensor:
    """With dense strides: every second number of twice as many would be the real part."""
    flat = -t.reshape(-1)
    pairs = torch.cat(
        [torch.zeros(1, dtype=t.dtype), flat, torch.zeros((flat.numel() + 1) % 2, dtype=t.dtype)]
    )
    conjugate = torch.view_as_complex(pairs.view(-1, 2)).conj()
    return conjugate.imag.as_strided(t.shape, t.contiguous().stride(), 1)


NEGATED = [negative, imaginary, imaginary_and_dense]


@on_each_backend
@by_each_rule
@pytest.mark.parametrize("view", NEGATED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(3, 2), (1, 1), (4, 1)])
def test_negated_gradients(
    shape: tuple[int, int], view: Callable[[Tensor], Tensor], rule: str, backend: str
) -> None:
    sides = [[nn.Parameter(torch.ones(shape)) for _ in range(3)] for _ in range(2)]
    opts = [make(onepass, rule, params, backend) for params in sides]
    for t in range(3):
        for params in sides:
            set_gradients(params, t)
        for i in {0: (), 1: (1,), 2: (0, 2)}[t]:
            odd = sides[0][i]
            odd.grad = view(odd.grad)
            assert odd.grad.is_neg()
            assert torch.equal(odd.grad, sides[1][i].grad)
        for opt in opts:
            opt.step()
    assert values(opts[0]) == values(opts[1])


@on_each_backend
@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam", "nadam"])
@pytest.mark.parametrize("view", NEGATED, ids=lambda f: f.__name__)
def test_negated_parameters_and_states(
    view: Callable[[Tensor], Tensor], rule: str, backend: str
) -> None:
    """They may step on another backend, and agree to rounding."""
    for columns in (["p"], COLUMNS.get(rule, []), ["p", *COLUMNS.get(rule, [])]):
        sides = [[nn.Parameter(torch.randn(3, 2).double()) for _ in range(3)] for _ in range(2)]
        for p, q in zip(*sides, strict=True):
            q.data = p.data.clone()
        opts = [make(onepass, rule, params, backend) for params in sides]
        for t in range(4):
            for params in sides:
                set_gradients(params, t)
            if t == 1:
                p = sides[0][1]
                for name in columns:
                    if name == "p":
                        p.data = view(p.data)
                    else:
                        opts[0].state[p][name] = view(opts[0].state[p][name])
                        assert opts[0].state[p][name].is_neg()
            for opt in opts:
                opt.step()
        torch.testing.assert_close(
            *([p.detach().resolve_neg() for p in params] for params in sides), **STRICT
        )


@on_each_backend
@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("what", ["g", "p", "state", "g with strides", "g negated"])
def test_conjugated(what: str, rule: str, backend: str) -> None:
    sides = [
        [nn.Parameter(torch.randn(3, 2, dtype=torch.complex128)) for _ in range(3)]
        for _ in range(2)
    ]
    for p, q in zip(*sides, strict=True):
        q.data = p.data.clone()
    opts = [make(onepass, rule, params, backend) for params in sides]
    for t in range(4):
        for params in sides:
            random = torch.Generator().manual_seed(t)
            for p in params:
                p.grad = torch.randn(3, 2, dtype=torch.complex128, generator=random)
        if t:
            p = sides[0][1]
            g: Any = p.grad
            if what == "g":
                p.grad = g.conj_physical().conj()
            elif what == "g with strides":
                p.grad = g.conj_physical().conj().as_strided((3, 2), (2, 1))
            elif what == "g negated":
                p.grad = torch._neg_view(-g)
            elif what == "p" and t == 1:
                p.data = p.data.conj_physical().conj()
            elif what == "state" and t == 1:
                for name in COLUMNS.get(rule, []):
                    opts[0].state[p][name] = opts[0].state[p][name].conj_physical().conj()
        for opt in opts:
            opt.step()
    torch.testing.assert_close(
        *([p.detach().resolve_conj().resolve_neg() for p in params] for params in sides), **STRICT
    )


# A parameter's numbers are its own.


def saved_size(thing: Any) -> int:
    file = io.BytesIO()
    torch.save(thing, file)
    return len(file.getvalue())


@on_each_backend
@pytest.mark.parametrize(
    "rule", ["sgd", "momentum", "amsgrad", "adagrad", "nadam", "asgd", "adafactor"]
)
def test_sizes_of_saved_state(rule: str, backend: str) -> None:
    """Within a fifth of torch's."""
    sizes = []
    for library in (onepass, torch.optim):
        params = [nn.Parameter(torch.ones(4, 2)) for _ in range(60)]
        opt = make(library, rule, params, backend if library is onepass else "kernel")
        for t in range(2):
            set_gradients(params, t)
            opt.step()
        entry = dict(opt.state.get(params[0], {}))
        sizes.append(
            [
                len(pickle.dumps(opt.state_dict()["state"])),
                len(pickle.dumps(entry)),
                saved_size(entry),
            ]
        )
    for ours, theirs in zip(*sizes, strict=True):
        assert ours <= 1.2 * theirs + 64


def is_number(t: Any) -> bool:
    return isinstance(t, Tensor) and t.dim() == 0


def check_numbers(opt: Any) -> int:
    """Each number lies in a storage of its own, of its size; returns how many there are."""
    numbers = [t for entry in opt.state.values() for t in entry.values() if is_number(t)]
    assert all(
        t.untyped_storage().nbytes() == t.itemsize and t.storage_offset() == 0 for t in numbers
    )
    assert len({t.data_ptr() for t in numbers}) == len(numbers)
    return len(numbers)


WITH_NUMBERS = [name for name in ALGORITHMS if name not in ("sgd", "momentum", "nesterov")]


@on_each_backend
@pytest.mark.parametrize("algorithm", WITH_NUMBERS)
def test_numbers_lie_in_tensors_of_their_own(algorithm: str, backend: str) -> None:
    side = make_side(onepass, algorithm)
    side.opt.param_groups[0].update(BACKENDS[backend])
    side.step()
    assert check_numbers(side.opt) >= 4
    side.opt.load_state_dict(side.opt.state_dict())
    check_numbers(side.opt)
    side.step()
    check_numbers(side.opt)
    for other in (copy.deepcopy(side.opt), pickle.loads(pickle.dumps(side.opt))):
        check_numbers(other)
        params = [p for group in other.param_groups for p in group["params"]]
        set_gradients(params, 0)
        other.step()
        check_numbers(other)
    extra = nn.Parameter(torch.ones(3, 2))
    side.opt.add_param_group({"params": [extra], **BACKENDS[backend]})
    side.params.append(extra)
    side.step()
    assert check_numbers(side.opt) >= 5


@on_each_backend
@pytest.mark.parametrize("algorithm", WITH_NUMBERS)
@pytest.mark.parametrize("how", ["one tensor", "one vector", "expanded", "python"])
def test_shared_numbers_become_their_own(how: str, algorithm: str, backend: str) -> None:
    """One tensor as the step count of several parameters counts once for each, not for all."""
    sides = both(algorithm)
    sides[0].opt.param_groups[0].update(BACKENDS[backend])
    on_both(sides, Side.step)
    for side, ours in zip(sides, (True, False), strict=True):
        for name in [name for name, t in side.opt.state[side.params[0]].items() if is_number(t)]:
            value = side.opt.state[side.params[0]][name].clone()
            vector = torch.full((4,), float(value))
            views = {
                "one tensor": [value] * 4,
                "one vector": list(vector),
                "expanded": list(value.expand(4)),
            }
            views["python"] = [int(value) if name == "step" else float(value)] * 4
            for p, view in zip(side.params, views[how], strict=True):
                side.opt.state[p][name] = view if ours else value.clone()
    for _ in range(2):
        on_both(sides, Side.step)
    for p, q in zip(sides[0].params, sides[1].params, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=2e-5, atol=2e-6)
        assert float(sides[0].opt.state[p]["step"]) == 3
    if how in ("one tensor", "expanded"):
        numbers = [
            t for entry in sides[0].opt.state.values() for t in entry.values() if is_number(t)
        ]
        assert len({t.data_ptr() for t in numbers}) == len(numbers)


@on_each_backend
@pytest.mark.parametrize("algorithm", WITH_NUMBERS)
def test_aliases_of_numbers_follow(algorithm: str, backend: str) -> None:
    side = make_side(onepass, algorithm)
    side.opt.param_groups[0].update(BACKENDS[backend])
    side.step()
    state = side.opt.state
    held = {(i, name): state[p][name] for i, p in enumerate(side.params) for name in state[p]}
    side.step()
    side.step(only=[1, 2])
    for (i, name), tensor in held.items():
        assert state[side.params[i]][name] is tensor, name
    assert [float(held[i, "step"]) for i in range(4)] == [2, 3, 3, 2]


def share_all(opt: Any) -> None:
    for entry in opt.state.values():
        for t in entry.values():
            t.share_memory_()


def share_by_pickling(opt: Any) -> None:
    """As a queue between processes does, in place."""
    ForkingPickler.dumps(opt.state_dict())


def share_by_a_queue(opt: Any) -> None:
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    queue.put(opt.state_dict()["state"])
    queue.get()


@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
@pytest.mark.parametrize(
    "share", [share_all, share_by_pickling, share_by_a_queue], ids=lambda f: f.__name__
)
def test_state_in_shared_memory(share: Callable[[Any], None], algorithm: str) -> None:
    """A kernel steps it, where it lies."""
    ours, twin = make_side(onepass, algorithm), make_side(onepass, algorithm)
    on_both((ours, twin), Side.step)
    share(ours.opt)
    held = [t for entry in ours.opt.state.values() for t in entry.values()]
    for _ in range(2):
        on_both((ours, twin), Side.step)
    assert ours.opt._onepass.plan.kernels
    assert not ours.opt._onepass.plan.others
    assert values(ours.opt) == values(twin.opt)
    after = [t for entry in ours.opt.state.values() for t in entry.values()]
    assert all(a is b and a.is_shared() for a, b in zip(after, held, strict=True))


# Tensors without values.


def fake_steps(
    library: Any, name: str, options: dict[str, Any], backend: str
) -> dict[Any, Any] | str:
    """The kinds of all states after two steps of fake tensors, or what went wrong."""
    with FakeTensorMode():
        params = [nn.Parameter(torch.randn(shape)) for shape in ((4, 3), (5, 2))]
        opt = getattr(library, name)(params, **options)
        opt.param_groups[0].update(BACKENDS[backend])
        try:
            for _ in range(2):
                for p in params:
                    p.grad = torch.randn(p.shape)
                opt.step()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return {
            (i, key): (tuple(t.shape), t.dtype) if isinstance(t, Tensor) else type(t)
            for i, p in enumerate(params)
            for key, t in opt.state.get(p, {}).items()
            if t is not None
        }


@on_each_backend
@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "adafactor", "muon"])
def test_fake_tensors(algorithm: str, backend: str) -> None:
    name, options = ALGORITHMS.get(algorithm) or RULES[algorithm]
    theirs = fake_steps(torch.optim, name, options, "kernel")
    ours = fake_steps(onepass, name, options, backend)
    if isinstance(theirs, dict):
        assert ours == theirs


# Computed together or one at a time.

SHAPES = ((0,), (1,), (), (7,), (64,), (8, 8), (2, 3, 4), (0, 3), (1, 1), (7, 1))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64)


def eager_runs(algorithm: str, dtype: torch.dtype, together: bool, steps: int = 4) -> list[Any]:
    random = torch.Generator().manual_seed(0)
    params = [
        nn.Parameter(torch.randn(shape, generator=random, dtype=torch.float64).to(dtype))
        for shape in SHAPES
    ]
    lrs = [0.1, 0.03, 0.0]
    name, options = ALGORITHMS[algorithm]
    modes = {
        k: v
        for k, v in EAGER.items()
        if k in getattr(onepass, name)([nn.Parameter(torch.ones(1))]).defaults
    }
    groups = [[{"params": [p], "lr": lrs[i % 3]}] for i, p in enumerate(params)]
    given = [[{"params": params[i::3], "lr": lrs[i]} for i in range(3)]] if together else groups
    opts = [getattr(onepass, name)(g, **(options | modes)) for g in given]
    for opt in opts:
        for group in opt.param_groups:
            group.update(EAGER)
    for t in range(steps):
        for i, p in enumerate(params):
            g = torch.randn(p.shape, generator=random, dtype=torch.float64).to(dtype)
            # First steps come at different times, and some parameters pause.
            p.grad = g if t >= i % 3 and (t + i) % 4 else None
        for opt in opts:
            if any(p.grad is not None for group in opt.param_groups for p in group["params"]):
                opt.step()
    of = {p: opt for opt in opts for group in opt.param_groups for p in group["params"]}
    return [
        [("p", bits_of(p)), *((k, bits_of(t)) for k, t in sorted(of[p].state[p].items()))]
        for p in params
    ]


def bits_of(t: Any) -> Any:
    if not isinstance(t, Tensor):
        return t
    t = torch.view_as_real(t.detach()) if t.is_complex() else t.detach()
    return tuple(t.shape), t.dtype, t.contiguous().reshape(-1).view(torch.uint8).tolist()


@pytest.mark.parametrize(("dtype", "most"), [*((d, None) for d in DTYPES), (torch.float32, 8)])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_together_equals_one_at_a_time(
    most: int | None, algorithm: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if most is not None:
        monkeypatch.setattr(eager_members, "MOST_ELEMENTS", most)
    assert eager_runs(algorithm, dtype, together=True) == eager_runs(
        algorithm, dtype, together=False
    )


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [(torch.float32, "kernel"), (torch.float32, "eager"), (torch.bfloat16, "eager")],
    ids=str,
)
@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name != "rprop"])
def test_rate_zero_keeps_every_bit(algorithm: str, dtype: torch.dtype, backend: str) -> None:
    """Also a zero's sign, with other parameters in the same batch that do step. Rprop's lr is only
    a first size."""
    name, options = ALGORITHMS[algorithm]
    start = torch.tensor([-0.0, 0.0, 1.0, -3.0, 1e-4]).to(dtype)
    params = [nn.Parameter(start.clone()) for _ in range(4)]
    groups = [{"params": params[:2], "lr": 0.0}, {"params": params[2:]}]
    opt = getattr(onepass, name)(groups, **options)
    for group in opt.param_groups:
        group.update(BACKENDS[backend])
    for t in range(3):
        set_gradients(params, t)
        opt.step()
    for p in params[:2]:
        assert bits_of(p) == bits_of(start)
    assert not any(torch.equal(p, start) for p in params[2:])
