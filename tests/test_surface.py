"""What `import onepass as optim` offers: torch.optim's names, signatures, attributes, errors, and
no warnings."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import re
import types
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.side_by_side import CLOSE
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import onepass

TORCH = {name: getattr(torch.optim, name) for name in torch.optim.__all__}
CLASSES = sorted(
    name for name, value in TORCH.items() if inspect.isclass(value) and name != "Optimizer"
)
EACH = pytest.mark.parametrize("name", CLASSES)
BOTH = (onepass, torch.optim)
# Arguments that torch does not have.
FURTHER = {
    "Adafactor": ["capturable"],
    "Adagrad": ["capturable"],
    "Muon": ["use_muon", "betas", "adam_eps", "capturable"],
    "SGD": ["capturable"],
}


def parameters_of(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    """A signature without its annotations."""
    return [(q.name, q.kind, q.default) for q in inspect.signature(function).parameters.values()]


# Names.


def test_every_name_of_torch_is_here() -> None:
    assert set(torch.optim.__all__) <= set(onepass.__all__)
    assert len(onepass.__all__) == len(set(onepass.__all__))


def test_star_import() -> None:
    """What `from torch.optim import *` gives has its counterpart, and every name exists."""
    space: dict[str, Any] = {}
    exec("from onepass import *", space)
    assert set(space) - {"__builtins__"} == set(onepass.__all__)
    for name in CLASSES:
        assert space[name].__name__ == name


def test_nothing_of_torch_that_is_imported_from_a_submodule_is_missing() -> None:
    """`from torch.optim.lr_scheduler import StepLR` and the like."""
    for module in ("lr_scheduler", "swa_utils"):
        ours, theirs = (
            importlib.import_module(f"onepass.{module}"),
            importlib.import_module(f"torch.optim.{module}"),
        )
        assert getattr(onepass, module) is ours
        assert set(ours.__all__) == set(theirs.__all__)
        for name in theirs.__all__:
            mine, other = getattr(ours, name), getattr(theirs, name)
            assert mine is not other
            assert issubclass(mine, other) if isinstance(other, type) else callable(mine)
            there, here = (inspect.signature(f).parameters.values() for f in (other, mine))
            assert [(p.name, p.default, p.kind) for p in here] == [
                (p.name, p.default, p.kind) for p in there
            ], name


@EACH
def test_classes_are_found_where_they_are_said_to_be(name: str) -> None:
    """Pickles hold a class's module and name."""
    cls = getattr(onepass, name)
    assert getattr(importlib.import_module(cls.__module__), cls.__qualname__) is cls


@EACH
def test_classes_inherit_as_torchs_do(name: str) -> None:
    cls = getattr(onepass, name)
    assert issubclass(cls, onepass.Optimizer)
    assert issubclass(cls, torch.optim.Optimizer)
    for other in CLASSES:
        assert issubclass(cls, getattr(onepass, other)) == issubclass(TORCH[name], TORCH[other]), (
            other
        )


# Signatures and attributes.


@EACH
def test_signature(name: str) -> None:
    """torch's arguments: names, kinds, order and defaults. Further ones come last, by keyword
    alone."""
    ours, theirs = parameters_of(getattr(onepass, name)), parameters_of(TORCH[name])
    assert ours[: len(theirs)] == theirs
    further = ours[len(theirs) :]
    assert all(kind == inspect.Parameter.KEYWORD_ONLY for _, kind, _ in further)
    assert [name for name, _, _ in further] == FURTHER.get(name, [])


@EACH
def test_public_attributes(name: str) -> None:
    """Everything that a script may call on torch's class, with the same arguments."""
    cls = getattr(onepass, name)
    for attribute in (a for a in dir(TORCH[name]) if not a.startswith("_")):
        assert hasattr(cls, attribute), attribute
        theirs = getattr(TORCH[name], attribute)
        if inspect.isfunction(theirs):
            pairs = zip(parameters_of(getattr(cls, attribute)), parameters_of(theirs), strict=True)
            for (mine, kind, default), (yours, expected, theirs_default) in pairs:
                assert (mine, kind) == (yours, expected), attribute
                # What torch demands may have a default here, so that its absence is told in a
                # sentence.
                assert theirs_default in (default, inspect.Parameter.empty), attribute


def make(library: Any, name: str, params: Any, **options: Any) -> Any:
    return getattr(library, name)(params, **options)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape or (3, 2)))


@EACH
def test_instances_have_torchs_attributes_and_groups(name: str) -> None:
    ours, theirs = (make(library, name, [parameter()]) for library in BOTH)
    assert {a for a in vars(theirs) if not a.startswith("_")} <= set(vars(ours))
    further = {n for n, _, _ in parameters_of(getattr(onepass, name))} - {
        n for n, _, _ in parameters_of(TORCH[name])
    }
    assert {k: v for k, v in ours.defaults.items() if k not in further} == theirs.defaults
    mine, yours = (list(opt.param_groups[0]) for opt in (ours, theirs))
    assert [key for key in mine if key not in further] == yours
    assert repr(ours).splitlines()[0] == repr(theirs).splitlines()[0]
    assert further or repr(ours) == repr(theirs)


# Docstrings.


def test_everything_public_has_a_docstring() -> None:
    for name in onepass.__all__:
        value = getattr(onepass, name)
        if inspect.isclass(value) or inspect.isfunction(value) or inspect.ismodule(value):
            assert inspect.getdoc(value), name
    for info in pkgutil.walk_packages(onepass.__path__, "onepass."):
        if info.name != "onepass.__main__":
            assert importlib.import_module(info.name).__doc__, info.name


@EACH
def test_docstrings_have_the_mathematics_the_reference_and_the_state(name: str) -> None:
    cls = getattr(onepass, name)
    text = cls.__doc__
    first, _, rest = text.partition("\n")
    assert first.endswith("."), first
    assert len(first) < 120
    assert text.count("$$") >= 2
    assert text.count("$$") % 2 == 0
    assert any(str(year) in rest for year in range(1950, 2030)), "no reference"
    assert "State" in rest, "what a parameter's state is called"


def test_what_all_algorithms_share_is_said_once() -> None:
    text = inspect.getdoc(onepass.Optimizer) or ""
    for word in ("ValueError", "TypeError", "`foreach`", "`capturable=True`", "torch's keys"):
        assert word in text, word


# Options: what is refused, and what is not.


NON_NEGATIVE = {
    "Adadelta": ("lr", "rho", "eps", "weight_decay"),
    "Adafactor": ("lr", "weight_decay", "d"),
    "Adagrad": ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps"),
    "Adam": ("lr", "eps", "weight_decay"),
    "AdamW": ("lr", "eps", "weight_decay"),
    "Adamax": ("lr", "eps", "weight_decay"),
    "ASGD": ("lr", "weight_decay"),
    "LBFGS": ("lr",),
    "Muon": ("lr", "momentum", "weight_decay"),
    "NAdam": ("lr", "eps", "weight_decay", "momentum_decay"),
    "RAdam": ("lr", "eps", "weight_decay"),
    "RMSprop": ("lr", "alpha", "eps", "weight_decay", "momentum"),
    "Rprop": ("lr",),
    "SGD": ("lr", "momentum", "weight_decay"),
    "SparseAdam": ("lr", "eps"),
}
WITH_BETAS = ("Adam", "AdamW", "Adamax", "NAdam", "RAdam", "SparseAdam")
WITH_FUSED = ("Adagrad", "Adam", "AdamW", "SGD")
TWO = torch.ones(2)
NAN = float("nan")
BAD: list[tuple[str, dict[str, Any]]] = [
    *[
        (name, {option: bad})
        for name, of in NON_NEGATIVE.items()
        for option in of
        for bad in (-0.1, NAN, "0.1", None)
        # torch's SGD takes a NaN for a number that is not negative.
        if name != "SGD" or bad is not NAN
    ],
    *[(name, {"lr": TWO}) for name in NON_NEGATIVE],
    *[
        (name, {"betas": betas})
        for name in WITH_BETAS
        for betas in (
            (1.0, 0.9),
            (0.9, 1.0),
            (-0.1, 0.9),
            (0.9, -0.1),
            (0.9, NAN),
            (NAN, 0.9),
            ("a", 0.9),
            None,
        )
    ],
    *[
        (name, {"fused": True, other: True})
        for name in WITH_FUSED
        for other in ("foreach", "differentiable")
    ],
    *[(name, {"learning_rate": 0.1}) for name in NON_NEGATIVE],
    ("SGD", {"nesterov": True}),
    ("SGD", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}),
    ("Adadelta", {"rho": 1.1}),
    *[
        ("Rprop", {"etas": etas})
        for etas in ((0.0, 1.2), (-0.5, 1.2), (1.0, 1.2), (0.5, 1.0), (0.5, 0.9), (NAN, 1.2))
    ],
    ("SparseAdam", {"lr": 0.0}),
    ("SparseAdam", {"eps": 0.0}),
    ("Adafactor", {"d": 0.5}),
    ("Adafactor", {"beta2_decay": 0.1}),
    ("Adafactor", {"eps": (-1.0, 1e-3)}),
    ("Adafactor", {"eps": (None, -1.0)}),
    ("Muon", {"adjust_lr_fn": "other"}),
]


def label(x: Any) -> str:
    return (
        ",".join(f"{k}={v}" for k, v in x.items()).replace("\n", "")
        if isinstance(x, dict)
        else str(x)
    )


@pytest.mark.parametrize(("name", "bad"), BAD, ids=label)
def test_errors_are_of_the_types_that_torch_raises(name: str, bad: dict[str, Any]) -> None:
    kinds = []
    for library in BOTH:
        with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
            make(library, name, [parameter()], **bad)
        kinds.append(caught.type)
    assert issubclass(*kinds), kinds


# At the edge of what makes sense, and beyond: torch accepts them, and what they compute is checked
# against it.
EDGES: list[tuple[str, dict[str, Any]]] = [
    *[(name, {"lr": 0.0}) for name in NON_NEGATIVE if name != "SparseAdam"],
    *[(name, {"lr": torch.tensor(0.1)}) for name in NON_NEGATIVE],
    *[(name, {"lr": torch.tensor([0.1])}) for name in ("Adam", "SGD", "Adagrad", "RMSprop")],
    *[(name, {"betas": (0.0, 0.0)}) for name in WITH_BETAS],
    *[(name, {"betas": [0.8, 0.9]}) for name in WITH_BETAS],
    ("SGD", {"momentum": 1.5}),
    ("SGD", {"momentum": 0.9, "dampening": -0.5}),
    ("SGD", {"momentum": 0.9, "dampening": 1.0}),
    ("Adadelta", {"rho": 0.0}),
    ("Adadelta", {"rho": 1.0}),
    ("RMSprop", {"alpha": 0.0}),
    ("RMSprop", {"alpha": 1.5}),
    ("RMSprop", {"momentum": 1.5}),
    ("Adagrad", {"lr_decay": 3.0, "initial_accumulator_value": 100.0}),
    ("NAdam", {"momentum_decay": 0.0}),
    ("NAdam", {"momentum_decay": 300.0}),
    ("ASGD", {"lambd": 0.0}),
    ("ASGD", {"lambd": -0.5, "alpha": -1.0}),
    ("ASGD", {"t0": -3.0}),
    ("ASGD", {"t0": 1.5, "lambd": 1.0}),
    ("Rprop", {"step_sizes": (0.0, 0.0)}),
    ("Rprop", {"step_sizes": (0.02, 0.02)}),
    ("Rprop", {"lr": 100.0}),
    ("Rprop", {"etas": [0.5, 1.2], "step_sizes": [1e-6, 50]}),
    ("LBFGS", {"max_iter": 3, "history_size": 1}),
    ("Adafactor", {"beta2_decay": 0.0}),
    ("Adafactor", {"eps": (1e-30, 0.0)}),
    ("Muon", {"ns_steps": 1, "nesterov": False}),
]


def drive(opt: Any, params: Sequence[Tensor], steps: int = 3, seed: int = 1) -> list[Tensor]:
    """Steps with random gradients: sparse ones where only those will do, those of a loss where the
    loss is needed."""
    name = type(opt).__name__
    for k in range(steps):
        random = torch.Generator().manual_seed(100 * seed + k)
        gradients = [torch.randn(p.shape, generator=random).to(p.dtype) for p in params]

        def closure(gradients: Sequence[Tensor] = gradients) -> Tensor:
            opt.zero_grad()
            pairs = zip(params, gradients, strict=True)
            loss = torch.stack([((p - g).square() * (1 + g.abs())).sum() for p, g in pairs]).sum()
            loss.backward()
            return loss

        for p, g in zip(params, gradients, strict=True):
            p.grad = g.to_sparse() if name == "SparseAdam" else g
        opt.step(*([closure] if name == "LBFGS" else []))
    return [p.detach() for p in params]


@pytest.mark.parametrize(("name", "edge"), EDGES, ids=label)
def test_what_torch_accepts_computes_what_it_does_there(name: str, edge: dict[str, Any]) -> None:
    ends = []
    for library in BOTH:
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(2, 5))]
        ends.append(drive(make(library, name, params, **edge), params))
    torch.testing.assert_close(*ends, equal_nan=True, **CLOSE)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_what_torch_refuses_for_want_of_an_implementation_works(name: str) -> None:
    """A tensor lr beside foreach=True: here it is a number like any other."""
    ends = []
    for options in ({"lr": torch.tensor(0.1), "foreach": True}, {"lr": 0.1}):
        params = [parameter()]
        ends.append(drive(make(onepass, name, params, **options), params))
    torch.testing.assert_close(*ends, **CLOSE)


def test_a_closure_that_is_needed() -> None:
    for library in BOTH:
        with pytest.raises(TypeError, match="closure"):
            make(library, "LBFGS", [parameter()]).step()


@pytest.mark.skipif(
    "swap_in_optimizer_params_and_state" not in TORCH, reason="this torch does not have it"
)
@pytest.mark.parametrize(
    "name", ["AdamW", "Adagrad", "RMSprop", "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD", "Rprop"]
)
def test_steps_on_other_parameters_and_state(name: str) -> None:
    """They change what was given, in place, and nothing of the optimizer's own."""
    ends = []
    for library in BOTH:
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5))]
        opt = make(library, name, params)
        drive(opt, params, 2)
        own = copy.deepcopy([p.detach() for p in params]), copy.deepcopy(opt.state_dict()["state"])
        others = {str(i): nn.Parameter(p.detach() + 1) for i, p in enumerate(params)}
        state_dict = copy.deepcopy(opt.state_dict())
        with library.swap_in_optimizer_params_and_state(opt, others, state_dict):
            drive(opt, list(others.values()), 2, seed=2)
        ends.append(([p.detach() for p in others.values()], state_dict["state"]))
        torch.testing.assert_close(
            ([p.detach() for p in params], opt.state_dict()["state"]), own, rtol=0, atol=0
        )
        drive(opt, params, 1)
    torch.testing.assert_close(*ends, **CLOSE)


# Hooks.


@EACH
def test_global_and_own_step_hooks(name: str) -> None:
    for library in BOTH:
        seen: list[str] = []
        params = [parameter()]
        opt = make(library, name, params)
        handles = [
            register_optimizer_step_pre_hook(lambda o, a, k, seen=seen: seen.append("global pre")),
            register_optimizer_step_post_hook(
                lambda o, a, k, seen=seen: seen.append("global post")
            ),
            opt.register_step_pre_hook(
                lambda o, a, k, seen=seen, opt=opt: seen.append(f"pre {o is opt}")
            ),
            opt.register_step_post_hook(
                lambda o, a, k, seen=seen, opt=opt: seen.append(f"post {o is opt}")
            ),
        ]
        try:
            drive(opt, params, 1)
        finally:
            for handle in handles:
                handle.remove()
        assert seen == ["global pre", "pre True", "post True", "global post"], library


@EACH
def test_hooks_of_state_dicts(name: str) -> None:
    for library in BOTH:
        seen: list[str] = []
        opt = make(library, name, [parameter()])
        opt.register_state_dict_pre_hook(lambda o, seen=seen: seen.append("save"))
        opt.register_state_dict_post_hook(lambda o, d, seen=seen: seen.append("saved"))
        opt.register_load_state_dict_pre_hook(lambda o, d, seen=seen: seen.append("load"))
        opt.register_load_state_dict_post_hook(lambda o, seen=seen: seen.append("loaded"))
        opt.load_state_dict(opt.state_dict())
        assert seen == ["save", "saved", "load", "loaded"], library


# Tensors of all dense shapes and layouts.

LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "matrix": lambda: torch.randn(4, 3),
    "no elements": lambda: torch.randn(0, 3),
    "scalar": lambda: torch.randn(()),
    "one": lambda: torch.randn(1),
    "vector": lambda: torch.randn(7),
    "transposed": lambda: torch.randn(5, 4).t(),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "channels_last_3d": lambda: torch.randn(2, 3, 2, 2, 3).contiguous(
        memory_format=torch.channels_last_3d
    ),
    "permuted": lambda: torch.randn(2, 3, 4).permute(2, 0, 1),
    "offset": lambda: torch.randn(20)[3:15].view(4, 3),
}
MATRICES = ("matrix", "no elements", "transposed", "offset")
# torch's own flatten gradients by `view`, or lay out sparse ones anew, and refuse what is not
# contiguous.
CONTIGUOUS_IN_TORCH = ("LBFGS", "SparseAdam")


@EACH
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_step_as_in_torch(name: str, layout: str) -> None:
    if name == "Muon" and layout not in MATRICES:
        pytest.skip("Muon is for matrices")
    if name in ("LBFGS", "Adafactor") and layout == "no elements":
        pytest.skip("torch raises")
    ends = []
    for library in BOTH:
        torch.manual_seed(0)
        start = LAYOUTS[layout]()
        if library is torch.optim and name in CONTIGUOUS_IN_TORCH:
            start = start.contiguous()
        if name == "LBFGS":
            # It divides by differences of gradients: sums that add in another order soon lead
            # elsewhere.
            start = start.double()
        p = nn.Parameter(start)
        opt = make(library, name, [p])
        after = drive(opt, [p])
        assert p.stride() == start.stride()
        ends.append(
            (
                after,
                {k: v for e in opt.state.values() for k, v in e.items() if isinstance(v, Tensor)},
            )
        )
    (ours, mine), (theirs, yours) = ends
    torch.testing.assert_close(ours, theirs, **CLOSE)
    assert set(mine) == set(yours)
    for key, value in yours.items():
        assert (mine[key].dtype, mine[key].shape, mine[key].device) == (
            value.dtype,
            value.shape,
            value.device,
        ), key
        torch.testing.assert_close(mine[key], value, msg=lambda m, key=key: f"{key}: {m}", **CLOSE)


# Warnings: the whole suite takes them for errors.


def choices(name: str) -> list[dict[str, Any]]:
    """Each option of a class that is a flag, on and off, and all of its own flags at once."""
    defaults = {
        n: default for n, _, default in parameters_of(getattr(onepass, name)) if n != "params"
    }
    flags = [
        n
        for n, default in defaults.items()
        if isinstance(default, bool) or n in ("foreach", "fused")
    ]
    needs = {"nesterov": {"momentum": 0.9}, "differentiable": {}}
    single = [{flag: value, **needs.get(flag, {})} for flag in flags for value in (True, False)]
    own = [
        flag
        for flag in flags
        if flag not in ("foreach", "fused", "differentiable", "capturable", "nesterov")
    ]
    return [
        {},
        *({k: v for k, v in one.items() if k in defaults} for one in single),
        dict.fromkeys(own, True),
    ]


@EACH
def test_no_option_of_any_class_warns(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in choices(name):
            leaves = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(2, 5))]
            # What is differentiated through must not be a leaf.
            params: list[Any] = (
                [p.clone() for p in leaves] if options.get("differentiable") else leaves
            )
            opt = make(onepass, name, params, **options)
            for p in params:
                p.retain_grad()
            drive(opt, params)
            opt.load_state_dict(opt.state_dict())


@EACH
def test_no_deprecated_name_is_used(name: str) -> None:
    """torch deprecates by typing.deprecated, which warns when called: nothing here calls such a
    function."""
    cls = getattr(onepass, name)
    deprecated = {
        n for n, f in inspect.getmembers(torch.optim.Optimizer) if hasattr(f, "__deprecated__")
    }
    for base in cls.__mro__:
        if base.__module__.startswith("onepass"):
            functions = [f for f in vars(base).values() if isinstance(f, types.FunctionType)]
            assert not deprecated & {n for f in functions for n in f.__code__.co_names}


def test_the_version_is_that_of_the_package() -> None:
    assert importlib.metadata.version("onepass") == onepass.__version__


def test_what_messages_recommend_is_there() -> None:
    """Every `onepass.name` in the package's texts."""
    folder = Path(onepass.__file__).parent
    names = {
        name
        for file in folder.rglob("*.py")
        for name in re.findall(r"\bonepass\.([a-z_]\w*)\b", file.read_text())
    }
    missing = [
        n
        for n in names
        if not hasattr(onepass, n) and importlib.util.find_spec(f"onepass.{n}") is None
    ]
    assert not missing
