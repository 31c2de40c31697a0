"""Every option of every algorithm, given values that make no sense: one sentence each, and nothing
has changed.

Which options there are is read from the constructors. Whether the ends of a range belong to it
follows torch.
"""

from __future__ import annotations

import inspect
from collections import UserList, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from support.side_by_side import bits, quietly
from torch import Tensor

import onepass
from onepass.app.catalog import optimizers

CHOICES = {"adjust_lr_fn": "original", "line_search_fn": "strong_wolfe"}
COUNTS = ("ns_steps", "max_iter", "max_eval", "history_size")
MODES = ("foreach", "fused")


class Unreadable:
    """A number that cannot be read, and has no text either."""

    def __float__(self) -> float:
        raise ZeroDivisionError("nothing\nto read")

    def __repr__(self) -> str:
        raise ZeroDivisionError("nothing\nto show")


class Unlisted:
    """Has a length, and entries that cannot be had."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> float:
        raise LookupError("nothing there")


class Entries(Sequence):
    """A sequence that is neither a tuple nor a list, as configuration libraries have them."""

    def __init__(self, values: Sequence[Any]) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, i: Any) -> Any:
        return self.values[i]


class Indexed:
    """No declared sequence, but its entries can be counted and had."""

    def __init__(self, values: Sequence[Any]) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, i: int) -> Any:
        return self.values[i]


@dataclass(frozen=True)
class Bad:
    """A value that options of these kinds refuse in a constructor and a new group, and of those
    between two steps."""

    make: Callable[[], Any]
    kinds: str = "number count flag mode choice pair triple"
    at_steps: str | None = None

    def is_for(self, kind: str, at_steps: bool) -> bool:
        kinds = self.kinds if self.at_steps is None or not at_steps else self.at_steps
        return kind in kinds.split()


NOT_FLAGS = "number count choice pair triple"
IN_ROWS = "pair triple"
VALUES: dict[str, Bad] = {
    "None": Bad(lambda: None, "number count pair triple"),
    "text": Bad(lambda: "0.1"),
    "empty text": Bad(lambda: ""),
    "two letters": Bad(lambda: "ab"),
    "long text": Bad(lambda: "long\n" * 999),
    "empty tuple": Bad(lambda: ()),
    "empty list": Bad(list),
    "one in a tuple": Bad(lambda: (1,)),
    "one in a list": Bad(lambda: [0.5]),
    "three in a tuple": Bad(lambda: (1, 2, 3), "number count flag mode choice pair"),
    "four in a list": Bad(lambda: [0.1, 0.2, 0.3, 0.4]),
    "empty dict": Bad(dict),
    "dict of two": Bad(lambda: {0: 0.5, 1: 0.9}),
    "dict of three": Bad(lambda: {0: 0.5, 1: 0.9, 2: 0.9}),
    "set": Bad(lambda: {0.5, 0.9}),
    "frozenset": Bad(lambda: frozenset({0.5, 0.9, 0.8})),
    "nested": Bad(lambda: ((0.5, 0.9), (0.5, 0.9))),
    "nested three": Bad(lambda: ([0.5], [0.9], [0.9])),
    "generator": Bad(lambda: (x for x in (0.5, 0.9))),
    "iterator": Bad(lambda: iter([0.5, 0.9, 0.1])),
    "texts": Bad(lambda: ("0.5", "0.9")),
    "three texts": Bad(lambda: ["0.5", "0.9", "1"]),
    "nothing in a tuple": Bad(lambda: (0.5, None)),
    "flags in a tuple": Bad(lambda: (True, 0.9), at_steps="number count flag mode choice triple"),
    "nan in a tuple": Bad(lambda: (0.5, np.nan), at_steps="number count flag mode choice triple"),
    "complex in a tuple": Bad(lambda: (0.5, 1j)),
    "huge in a tuple": Bad(lambda: (0.5, 10**400)),
    "tensors in a tuple": Bad(lambda: (torch.ones(2), 0.9)),
    "unreadable in a tuple": Bad(lambda: (Unreadable(), 0.9)),
    "object": Bad(object),
    "class": Bad(lambda: float),
    "function": Bad(lambda: len),
    "nan": Bad(lambda: np.nan, at_steps="count flag mode choice pair triple"),
    "numpy nan": Bad(lambda: np.float32(np.nan), at_steps="count flag mode choice pair triple"),
    "inf": Bad(lambda: np.inf, "count flag mode choice pair triple"),
    "-inf": Bad(lambda: -np.inf, "count flag mode choice pair triple"),
    "-1": Bad(lambda: -1, "count flag mode choice pair triple"),
    "half": Bad(lambda: 0.5, "count flag mode choice pair triple"),
    "two": Bad(lambda: 2, "flag mode choice pair triple"),
    "huge": Bad(lambda: 10**400),
    "more than huge": Bad(lambda: 10**5000),
    "huge fraction": Bad(lambda: Fraction(10**400)),
    "complex": Bad(lambda: 1j),
    "real complex": Bad(lambda: 1 + 0j),
    "numpy complex": Bad(lambda: np.complex64(1)),
    "numpy text": Bad(lambda: np.str_("0.1")),
    "bytes": Bad(lambda: b"0.1"),
    "two bytes": Bad(lambda: b"\0\0"),
    "three bytes": Bad(lambda: bytearray(3)),
    "tensor of three": Bad(
        lambda: torch.tensor([0.1, 0.2, 0.3]), "number count flag mode choice pair"
    ),
    "empty tensor": Bad(lambda: torch.tensor([])),
    "matrix": Bad(lambda: torch.ones(2, 2)),
    "complex tensor": Bad(lambda: torch.tensor(0.5 + 1j)),
    "real complex tensor": Bad(lambda: torch.tensor(0.5 + 0j)),
    "bool tensor of three": Bad(
        lambda: torch.ones(3, dtype=torch.bool), "number count flag mode choice pair"
    ),
    "nan tensor": Bad(lambda: torch.tensor(np.nan), at_steps="count flag mode choice pair triple"),
    "meta tensor": Bad(lambda: torch.ones((), device="meta")),
    "sparse tensor": Bad(lambda: torch.tensor([0.5, 0.1]).to_sparse()),
    "array of none": Bad(lambda: np.array([])),
    "array of two": Bad(lambda: np.array([0.5, 2.0]), "number count flag mode choice triple"),
    "array of three": Bad(lambda: np.array([0.1, 0.2, 0.3]), "number count flag mode choice pair"),
    "array of text": Bad(lambda: np.array("0.1")),
    "array of objects": Bad(lambda: np.array([None, 1.0, "x"], dtype=object)),
    "array of complex": Bad(lambda: np.array(1 + 1j)),
    "unreadable": Bad(Unreadable),
    "unlisted": Bad(Unlisted),
    "True": Bad(lambda: True, NOT_FLAGS, at_steps="choice pair triple"),
}


# Those that a first step is tried with, too: one of each kind of value.
AT_FIRST = (
    "None",
    "text",
    "one in a tuple",
    "dict of two",
    "object",
    "huge",
    "tensor of three",
    "array of none",
    "half",
)


@dataclass(frozen=True)
class Option:
    """An option as its constructor has it."""

    algorithm: str
    name: str
    default: Any

    @property
    def kind(self) -> str:
        if isinstance(self.default, tuple):
            return {2: "pair", 3: "triple"}[len(self.default)]
        if self.name in CHOICES or self.name in COUNTS or self.name in MODES:
            return "choice" if self.name in CHOICES else "count" if self.name in COUNTS else "mode"
        return "flag" if isinstance(self.default, bool) else "number"

    @property
    def is_torch(self) -> bool:
        return self.name in inspect.signature(getattr(torch.optim, self.algorithm)).parameters

    @property
    def is_read_at_steps(self) -> bool:
        """Whether a step of matrices that have stepped before depends on it."""
        return (self.algorithm, self.name) not in {
            ("Rprop", "lr"),  # how long the first step is
            ("Adagrad", "initial_accumulator_value"),
            ("Muon", "betas"),  # what AdamW takes, for what is not a matrix
            ("Muon", "adam_eps"),
        }


def read_options(name: str) -> list[Option]:
    parameters = list(inspect.signature(getattr(onepass, name)).parameters.values())[1:]
    return [Option(name, parameter.name, parameter.default) for parameter in parameters]


NAMES = sorted(optimizers())
OPTIONS = [option for name in NAMES for option in read_options(name)]
each_option = pytest.mark.parametrize("option", OPTIONS, ids=lambda o: f"{o.algorithm}-{o.name}")


def test_all_algorithms_are_here() -> None:
    assert len(NAMES) == 15
    assert {option.kind for option in OPTIONS} == {
        "number",
        "count",
        "flag",
        "mode",
        "choice",
        "pair",
        "triple",
    }
    assert {option.name for option in OPTIONS if option.kind == "choice"} == set(CHOICES)


def parameter() -> Tensor:
    """A matrix, which every algorithm takes; a leaf without a gradient, which `differentiable` can
    write."""
    return torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.25, -1.0]])


def snapshot(opt: Any) -> Any:
    """All bits of parameters, gradients and state, and the very objects that are options."""
    params = [p for group in opt.param_groups for p in group["params"]]
    state = {
        id(p): {name: bits(v) for name, v in entries.items()}
        for p, entries in opt.state.items()
        if entries
    }
    options = [[(name, id(v), bits(v)) for name, v in group.items()] for group in opt.param_groups]
    return [(bits(p), bits(p.grad)) for p in params], state, options


def set_gradient(opt: Any, p: Tensor) -> None:
    g = torch.tensor([[0.5, 1.0, -1.0], [2.0, -0.5, 0.25]])
    p.grad = g.to_sparse(1) if opt.gradients == "sparse" else g


def step(opt: Any) -> None:
    params = [p for group in opt.param_groups for p in group["params"]]
    for p in params:
        set_gradient(opt, p)
    opt.step((lambda: 1.0) if isinstance(opt, onepass.LBFGS) else None)


def attempt(function: Callable[[], Any]) -> Exception | None:
    try:
        function()
    except Exception as error:
        return error
    return None


def fault(error: Exception | None, option: Option, *, got: bool = True) -> str:
    """What is wrong with the answer to a bad value; an empty string where it is one good
    sentence."""
    if error is None:
        return "accepted"
    text = str(error.args[0]) if error.args else ""
    own = type(error) in (ValueError, TypeError, RuntimeError, KeyError, onepass.StepError)
    shown = any(word in text for word in ("got", "Invalid", "but is", "is not supported"))
    good = (
        own and option.name in text and "\n" not in text and len(text) < 300 and (shown or not got)
    )
    return "" if good else f"{type(error).__name__}: {text!r:.200}"


def report(faults: dict[str, str]) -> None:
    faults = {name: words for name, words in faults.items() if words}
    assert not faults, f"{len(faults)}: " + "\n".join(
        f"{name}: {words}" for name, words in faults.items()
    )


@each_option
def test_in_a_constructor_and_in_a_group(option: Option) -> None:
    """Refused by the constructor, in a group given to it, and in a group added later, which stays
    as it was."""
    make = getattr(onepass, option.algorithm)
    faults: dict[str, str] = {}
    opt = make([parameter()])
    before = snapshot(opt)
    for name, bad in VALUES.items():
        if not bad.is_for(option.kind, at_steps=False) or (
            name == "None" and option.name == "max_eval"
        ):
            continue
        value = bad.make()
        faults[name] = fault(
            attempt(lambda v=value: make([parameter()], **{option.name: v})), option
        )
        group = {"params": [parameter()], option.name: value}
        faults[f"{name} in a group"] = fault(attempt(lambda g=group: make([g])), option)
        if option.algorithm != "LBFGS":
            given = dict(group)
            faults[f"{name} added"] = fault(attempt(lambda g=group: opt.add_param_group(g)), option)
            if (
                snapshot(opt) != before
                or group.keys() != given.keys()
                or group[option.name] is not value
            ):
                faults[f"{name} added"] += " and changed something"
    report(faults)


def decline(opt: Any, option: Option, *, got: bool = True, may_step: bool = False) -> str:
    """What is wrong with how a step answers a bad value."""
    params = [p for group in opt.param_groups for p in group["params"]]
    for p in params:
        set_gradient(opt, p)
    before = snapshot(opt)
    error = attempt(lambda: opt.step((lambda: 1.0) if isinstance(opt, onepass.LBFGS) else None))
    if error is None and may_step:
        return ""
    changed = "" if snapshot(opt) == before or error is None else " and changed something"
    return fault(error, option, got=got) + changed


def backends(option: Option) -> Iterator[dict[str, Any]]:
    """Further options, each of which chooses a way to step, for a class that has them."""
    yield {"momentum": 0.9} if option.name == "dampening" else {}
    known = {o.name for o in OPTIONS if o.algorithm == option.algorithm}
    if {*MODES} <= known and option.kind in ("number", "pair") and option.name != "dampening":
        yield dict.fromkeys(MODES, False)
    if option.name in ("lr", "betas", "momentum") and "differentiable" in known:
        yield {"differentiable": True}


@each_option
def test_between_two_steps(option: Option) -> None:
    """Refused by the step, whichever way it goes, the first one too; and when all is well again it
    steps."""
    make = getattr(onepass, option.algorithm)
    faults: dict[str, str] = {}
    for ways in backends(option):
        opt, new = make([parameter()], **ways), make([parameter()], **ways)
        step(opt)
        group = opt.param_groups[0]
        good = group.get(option.name, False)
        for name, bad in VALUES.items():
            if bad.is_for(option.kind, at_steps=True):
                group[option.name] = new.param_groups[0][option.name] = bad.make()
                unread = not option.is_read_at_steps
                faults[f"{name} {ways}"] = decline(opt, option, may_step=unread)
                if name in AT_FIRST:
                    unread = unread and option.algorithm != "Rprop"
                    faults[f"{name} {ways} at first"] = decline(new, option, may_step=unread)
        group[option.name] = new.param_groups[0][option.name] = good
        step(opt)
        step(new)
    report(faults)


@each_option
def test_deleted_between_two_steps(option: Option) -> None:
    """What a rule needs is missed; a mode that is not there is off."""
    opt = getattr(onepass, option.algorithm)([parameter()])
    step(opt)
    good = opt.param_groups[0].pop(option.name, False)
    may_step = option.kind in ("mode", "flag") or not option.is_read_at_steps
    report({"deleted": decline(opt, option, got=False, may_step=may_step)})
    opt.param_groups[0][option.name] = good
    step(opt)


# In a state dict.


def stepped(name: str) -> Any:
    opt = getattr(onepass, name)([parameter()])
    step(opt)
    return opt


@each_option
def test_in_a_state_dict(option: Option) -> None:
    """Refused when it is loaded, or by the next step, and nothing has changed; what is missing is a
    default."""
    faults: dict[str, str] = {}
    opt = stepped(option.algorithm)
    for name, bad in VALUES.items():
        if not bad.is_for(option.kind, at_steps=True) or option.kind in ("mode", "choice"):
            continue
        saved = copied(opt.state_dict())
        saved["param_groups"][0][option.name] = bad.make()
        if option.name == "capturable" and option.name not in opt.param_groups[0]:
            continue
        if "generator" in name or "iterator" in name:
            continue  # which torch cannot copy either
        before = snapshot(opt)
        error = attempt(lambda o=opt, s=saved: o.load_state_dict(s))
        faults[name] = fault(error, option) if error else decline(opt, option)
        if error is None:
            opt = stepped(option.algorithm)
        elif snapshot(opt) != before:
            faults[name] += " and changed something"
    step(opt)
    report(faults)


def copied(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict whose groups and states can be changed; tensors are the same."""
    return {
        "state": {key: dict(entries) for key, entries in state_dict["state"].items()},
        "param_groups": [dict(group) for group in state_dict["param_groups"]],
    }


STEPS: dict[str, Any] = {
    **{
        f"{v!r:.20}": v
        for v in (-1, -1.0, np.nan, np.inf, -np.inf, 1e30, 2**62, 1.5, "3", [], {}, (), 10**400, 1j)
    },
    **{f"tensor {v}": torch.tensor(v) for v in (-1.0, np.nan, np.inf, 1.5, 1e30, 1j)},
    "three": torch.ones(3),
    "none": torch.ones(0),
    "meta": torch.ones((), device="meta"),
    "object": object(),
}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "LBFGS"])
def test_step_counts_in_a_state_dict(name: str) -> None:
    """A count of steps is a whole number, small enough to be counted on from."""
    faults = {}
    opt = stepped(name)
    if "step" not in opt.state_dict()["state"].get(0, {}):
        return
    before = snapshot(opt)
    for label, bad in STEPS.items():
        saved = copied(opt.state_dict())
        saved["state"][0]["step"] = bad
        error = attempt(lambda s=saved: opt.load_state_dict(s))
        faults[label] = fault(error, Option(name, "step", 0))
        if snapshot(opt) != before:
            faults[label] += " and changed something"
    report(faults)
    for good in (0, 7, 3.0, torch.tensor(5.0), torch.tensor([2.0]), torch.tensor(4)):
        saved = copied(opt.state_dict())
        saved["state"][0]["step"] = good
        opt.load_state_dict(saved)
        step(opt)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["params", "param_names"])
def test_what_a_state_dict_lists(name: str, key: str) -> None:
    opt = stepped(name)
    before, faults = snapshot(opt), {}
    for label, bad in {
        "3": 3,
        "nested": [[0]],
        "text": "0",
        "None": None,
        "dicts": [{}],
        "tensor": torch.ones(1),
    }.items():
        saved = copied(opt.state_dict())
        saved["param_groups"][0][key] = bad
        faults[label] = fault(attempt(lambda s=saved: opt.load_state_dict(s)), Option(name, key, 0))
        if snapshot(opt) != before:
            faults[label] += " and changed something"
    report(faults)


# The ends of ranges, by torch's constructors.


def construct(library: Any, option: Option, value: float) -> Exception | None:
    make = getattr(library, option.algorithm)
    return attempt(lambda: quietly(lambda: make([parameter()], **{option.name: value})))


@pytest.mark.parametrize(
    "option",
    [o for o in OPTIONS if o.kind == "number" and o.is_torch],
    ids=lambda o: f"{o.algorithm}-{o.name}",
)
def test_the_ends_of_a_range_are_those_of_torch(option: Option) -> None:
    for value in (0, 0.0, np.inf, -np.inf, -1):
        theirs, ours = construct(torch.optim, option, value), construct(onepass, option, value)
        if value >= 0:
            assert (ours is None) == (theirs is None), (value, ours, theirs)
        elif theirs is not None:
            assert fault(ours, option) == ""


# What makes sense, and is accepted as torch accepts it.


def spellings(option: Option) -> dict[str, Any]:
    """Other ways to write an option's default, or for a choice the word."""
    value = option.default
    if option.kind in ("flag", "mode"):
        found = {
            f"{kind.__name__}({on})": kind(on)
            for kind in (bool, int, np.bool_, np.int64)
            for on in (0, 1)
        }
        return found | (
            {"None": None} if option.kind == "mode" or option.name == "use_muon" else {}
        )
    if option.kind == "choice":
        return {"None": None, "word": CHOICES[option.name], "numpy": np.str_(CHOICES[option.name])}
    if option.kind == "count":
        value = 7 if value is None else value
        return {
            "int": value,
            "float": float(value),
            "numpy": np.int32(value),
            "tensor": torch.tensor(value),
        }
    if option.kind == "number":
        exact = {"int": 1} if value in (0, 1) and option.name != "nesterov" else {}
        arrays = {
            "0-d array": np.array(value),
            "float64": np.float64(value),
            "float32": np.float32(value),
        }
        tensors = {
            "0-d": torch.tensor(value),
            "1-element": torch.tensor([float(value)]),
            "Fraction": Fraction(value),
        }
        return exact | arrays | tensors
    lists = {
        "list": list,
        "deque": deque,
        "UserList": UserList,
        "Entries": Entries,
        "Indexed": Indexed,
    }
    found = {name: kind(value) for name, kind in lists.items()}
    found["NumPy scalars"] = tuple(v if v is None else np.float64(v) for v in value)
    found["tensors"] = tuple(
        v if v is None else torch.tensor(v, dtype=torch.float64) for v in value
    )
    if None not in value:
        found |= {"array": np.array(value), "tensor": torch.tensor(value, dtype=torch.float64)}
    return found


def run(option: Option, **options: Any) -> Tensor:
    """A parameter after three steps, with options of a group; the second time with those of the
    constructor."""
    p, q = parameter(), parameter()
    cls = getattr(onepass, option.algorithm)
    by_constructor, by_group = cls([p], **options), cls([{"params": [q], **options}])
    for _ in range(3):
        step(by_constructor)
        step(by_group)
    assert bits(p.detach()) == bits(q.detach())
    for name, value in options.items():
        kept = by_constructor.param_groups[0].get(name, value)
        if (option.algorithm, name) in (("Adam", "betas"), ("AdamW", "betas")):
            # As in torch: a checkpoint must not hold the list of a configuration library.
            assert type(kept) is tuple
            assert [float(beta) for beta in kept] == [float(value[i]) for i in range(2)]
        else:
            assert kept is value
    return p.detach()


@each_option
def test_other_spellings_are_accepted(option: Option) -> None:
    """And step as Python's own numbers, tuples and bools do."""
    faults: dict[str, str] = {}
    for name, value in spellings(option).items():
        plain: Any = value
        if option.kind in ("flag", "mode"):
            plain = value if value is None else bool(value)
        elif option.kind == "choice":
            plain = value if value is None else str(value)
        elif option.kind in ("number", "count"):
            plain = float(value)
        else:
            plain = tuple(
                v if v is None else float(v) for v in (value[i] for i in range(len(value)))
            )
        extra = {"momentum": 0.9} if option.name == "nesterov" else {}
        try:
            if not torch.equal(
                run(option, **{option.name: value}, **extra),
                run(option, **{option.name: plain}, **extra),
            ):
                faults[name] = "steps otherwise"
        except Exception as error:
            faults[name] = f"{type(error).__name__}: {error}"
    report(faults)


# Values that torch refuses as well, in words that people match on.

NUMBERS = [
    option for option in OPTIONS if option.is_torch and option.kind in ("number", "pair", "choice")
]
OUTSIDE = {
    "number": [-0.5, 1.5],
    "pair": [(-0.5, 0.5), (0.5, -0.5), (1.0, 0.5), (0.5, 1.0)],
    "choice": ["arbitrary"],
}


@pytest.mark.parametrize("option", NUMBERS, ids=lambda o: f"{o.algorithm}-{o.name}")
def test_torchs_words(option: Option) -> None:
    """Whatever torch says of a value is in what is said here."""
    faults: dict[str, str] = {}
    for value in OUTSIDE[option.kind]:
        ours, theirs = (
            attempt(
                lambda v=value, m=library: getattr(m, option.algorithm)(
                    [parameter()], **{option.name: v}
                )
            )
            for library in (onepass, torch.optim)
        )
        if theirs is not None and (type(ours) is not type(theirs) or str(theirs) not in str(ours)):
            faults[str(value)] = f"{ours!r} and torch {theirs!r}"
    report(faults)


@pytest.mark.parametrize(
    "p",
    [torch.zeros(2, 2).to_sparse(), torch.zeros(2, dtype=torch.complex64)],
    ids=["sparse", "complex"],
)
def test_torchs_words_about_parameters_of_sparse_adam(p: Tensor) -> None:
    ours, theirs = (attempt(lambda m=m: m.SparseAdam([p])) for m in (onepass, torch.optim))
    assert type(ours) is type(theirs) is ValueError
    assert str(theirs).rpartition(": ")[2] in str(ours)


# What classes say of their options.


@each_option
def test_every_number_and_choice_has_a_range(option: Option) -> None:
    has_range = option.name in getattr(onepass, option.algorithm).ranges
    assert has_range == (option.kind not in ("flag", "mode"))


class Ranged(onepass.Optimizer):
    """A class of a user's own, with ranges and no `check_options`."""

    ranges = {"lr": "(0, 1]", "weights": ("[0, 1)", "[-inf, 0]"), "decay": "[0, inf]"}

    def __init__(self, params: Any, lr: Any = 0.1, weights: Any = (0.5, -1.0), decay: Any = 0.0):
        super().__init__(params, {"lr": lr, "weights": weights, "decay": decay})

    @staticmethod
    def rule(p, g, *, lr, weights, decay):
        return {"p": p - lr * (weights[0] * g + decay * p)}


class Refined(Ranged):
    """And one that checks further, as classes did before there were ranges."""

    ranges = {**Ranged.ranges, "decay": "[0, 0.5]"}

    def check_options(self, options: Any) -> None:
        super().check_options(options)
        if options["decay"] > options["lr"]:
            raise ValueError("decay is above lr")


@pytest.mark.parametrize("cls", [Ranged, Refined])
def test_ranges_of_a_users_class(cls: type) -> None:
    for options, error, words in (
        ({"lr": 0.0}, ValueError, r"Invalid learning rate: 0\.0; lr must lie in \(0, 1\]"),
        ({"lr": "x"}, TypeError, "lr must be a number, got 'x'"),
        ({"weights": (1.0, 0.0)}, ValueError, r"weights\[0\] must lie in \[0, 1\)"),
        ({"weights": (0.5, 0.1)}, ValueError, r"weights\[1\] must lie in \[-inf, 0\]"),
        ({"weights": (0.5,)}, ValueError, "weights must be two numbers"),
        ({"weights": 0.5}, TypeError, "weights must be two numbers"),
        ({"decay": -1}, ValueError, r"Invalid decay value: -1; decay must lie in \[0, "),
        ({"decay": np.nan}, ValueError, "decay must lie in"),
    ):
        with pytest.raises(error, match=rf"^{cls.__name__}: .*{words}"):
            cls([parameter()], **options)
    opt = cls([parameter()], lr=1.0, weights=(0, -np.inf), decay=0.5)
    with pytest.raises(ValueError, match=r"lr must lie in \(0, 1\]"):
        opt.add_param_group({"params": [parameter()], "lr": 1.5})
    assert len(opt.param_groups) == 1
    step(opt)


def test_a_class_may_check_further() -> None:
    with pytest.raises(ValueError, match="decay is above lr"):
        Refined([parameter()], decay=0.2)
    Ranged([parameter()], decay=0.2)
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 0\.5\]"):
        Refined([parameter()], lr=0.9, decay=0.7)


@pytest.mark.parametrize("allowed", ["0 to 1", "[0,1]", "[0, 1", "", "[a, b]", "> 0"])
def test_what_is_not_an_interval(allowed: str) -> None:
    cls = type("Own", (Ranged,), {"ranges": {"lr": allowed}})
    with pytest.raises(ValueError, match="is not an interval; write one as"):
        cls([parameter()])


@pytest.mark.parametrize("allowed", [0, (0, 1), None, ["[0, 1]"]])
def test_what_is_not_a_range(allowed: object) -> None:
    cls = type("Own", (Ranged,), {"ranges": {"lr": allowed}})
    with pytest.raises(TypeError, match=r"Own: ranges\['lr'\] must be an interval such as"):
        cls([parameter()])
