"""What makes no sense is refused in one sentence that says what was passed and what is allowed;
nothing changes."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from support.side_by_side import refuses, snapshot
from torch import nn

import onepass


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape or (3,), dtype=dtype))


def assert_sentence(error: BaseException, *words: str) -> None:
    """One sentence, with all of these words."""
    text = str(error.args[0])
    assert "\n" not in text, text
    assert len(text) < 300, text
    for word in words:
        assert word in text, f"{word!r} is not in {text!r}"


def naming(x: object) -> str:
    return (
        " ".join(x)
        if isinstance(x, tuple) and isinstance(x[0], str)
        else getattr(x, "__name__", "")
    )


NAN = math.nan
TWO = torch.ones(2)
NON_NEGATIVE = {
    "SGD": ("lr", "momentum", "weight_decay"),
    "Adam": ("lr", "eps", "weight_decay"),
    "AdamW": ("lr", "eps", "weight_decay"),
    "Adagrad": ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps"),
    "RMSprop": ("lr", "alpha", "eps", "weight_decay", "momentum"),
    "Adadelta": ("lr", "rho", "eps", "weight_decay"),
    "Adamax": ("lr", "eps", "weight_decay"),
    "NAdam": ("lr", "eps", "weight_decay", "momentum_decay"),
    "RAdam": ("lr", "eps", "weight_decay"),
    "ASGD": ("lr", "weight_decay"),
    "Rprop": ("lr",),
}
# Of either sign, as in torch, but numbers.
ANY_NUMBER = {"SGD": ("dampening",), "ASGD": ("lambd", "alpha", "t0")}
# name, options, the error, words of the sentence: the option's name, and what was passed.
OPTIONS: list[tuple[str, dict[str, Any], type[Exception], tuple[str, ...]]] = [
    *[
        (name, {option: bad}, ValueError, (name, option, str(bad)))
        for name, options in NON_NEGATIVE.items()
        for option in options
        for bad in (-0.5, NAN, -math.inf)
    ],
    *[
        (name, {option: bad}, TypeError, (name, option, repr(bad)))
        for name, options in NON_NEGATIVE.items()
        for option in (*options, *ANY_NUMBER.get(name, ()))
        for bad in ("0.1", None, True, [0.1], 1j)
    ],
    *[
        (name, {option: NAN}, ValueError, (name, option, "nan"))
        for name, options in ANY_NUMBER.items()
        for option in options
    ],
    *[(name, {"lr": TWO}, ValueError, (name, "lr", "1-element", "(2,)")) for name in NON_NEGATIVE],
    ("SGD", {"nesterov": True}, ValueError, ("SGD", "Nesterov", "momentum=0")),
    (
        "SGD",
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        ValueError,
        ("SGD", "dampening=0.1"),
    ),
    ("Adadelta", {"rho": 1.5}, ValueError, ("Adadelta", "rho", "[0, 1]", "1.5")),
    *[
        ("Rprop", {"etas": etas}, ValueError, ("Rprop", "etas", str(etas[0])))
        for etas in ((1.0, 1.2), (0.5, 1.0), (0.0, 1.2), (-0.5, 1.2), (NAN, 1.2))
    ],
    ("Rprop", {"etas": (0.5, NAN)}, ValueError, ("Rprop", "etas[1]", "nan")),
    *[
        ("Rprop", {option: bad}, (ValueError, TypeError), ("Rprop", option))
        for option in ("etas", "step_sizes")
        for bad in (
            0.5,
            (0.5,),
            (0.5, 1.2, 2.0),
            None,
            "ab",
            ("a", 1.2),
            (True, 1.2),
            (TWO, 1.2),
            {0.5, 1.2},
        )
    ],
    *[
        (name, {"betas": betas}, ValueError, (name, "betas[", "[0, 1)"))
        for name in ("AdamW", "Adamax", "NAdam", "RAdam")
        for betas in ((1.0, 0.9), (0.9, 1.0), (0.9, 1.2), (-0.1, 0.9), (NAN, 0.9), (0.9, math.inf))
    ],
    *[
        ("AdamW", {"betas": betas}, (ValueError, TypeError), ("AdamW", "betas"))
        for betas in (
            0.9,
            (0.9,),
            (0.9, 0.99, 0.999),
            "ab",
            None,
            ("a", "b"),
            (0.9, None),
            (True, 0.9),
            (TWO, 0.9),
            {0.9, 0.99},
        )
    ],
    *[
        (name, {"fused": True, other: True}, RuntimeError, (name, "fused", other))
        for name in ("SGD", "AdamW", "Adagrad")
        for other in ("foreach", "differentiable")
    ],
]


@pytest.mark.parametrize(("name", "options", "error", "words"), OPTIONS, ids=lambda x: str(x)[:40])
def test_options(name, options, error, words):
    """In the constructor, in a group given to it, and in a group added later."""
    make = getattr(onepass, name)
    with pytest.raises(error) as caught:
        make([parameter()], **options)
    assert_sentence(caught.value, *words)
    with pytest.raises(error) as caught:
        make([{"params": [parameter()]}, {"params": [parameter()], **options}])
    assert_sentence(caught.value, *words)
    opt = make([parameter()])
    before, group = snapshot(opt), {"params": [parameter()], **options}
    with pytest.raises(error) as caught:
        opt.add_param_group(group)
    assert_sentence(caught.value, *words)
    assert snapshot(opt) == before
    assert list(group) == ["params", *options]


@pytest.mark.parametrize("flag", ["amsgrad", "maximize", "capturable", "differentiable"])
@pytest.mark.parametrize("value", ["yes", 0.5, [1], torch.ones(2)])
def test_flags(flag, value):
    """A flag is a bool, or a number that equals one."""
    with pytest.raises(TypeError) as caught:
        onepass.AdamW([parameter()], **{flag: value})
    assert_sentence(caught.value, "AdamW", flag)


@pytest.mark.parametrize("flag", ["foreach", "fused"])
def test_modes(flag):
    with pytest.raises(TypeError) as caught:
        onepass.AdamW([parameter()], **{flag: "yes"})
    assert_sentence(caught.value, "AdamW", flag)


SAME = parameter()
PARAMETERS: list[tuple[Any, type[Exception], tuple[str, ...]]] = [
    (lambda: torch.ones(3), TypeError, ("iterable", "torch.FloatTensor")),
    (lambda: parameter(), TypeError, ("iterable",)),
    (list, ValueError, ("empty parameter list",)),
    (lambda: (p for p in ()), ValueError, ("empty parameter list",)),
    (lambda: [3], TypeError, ("can only optimize Tensors", "int")),
    (lambda: ["weight"], TypeError, ("can only optimize Tensors", "str")),
    (lambda: {"weight": parameter()}, TypeError, ("can only optimize Tensors", "str")),
    (lambda: [None], TypeError, ("can only optimize Tensors", "None")),
    (
        lambda: [parameter(), [parameter()]],
        TypeError,
        ("can only optimize Tensors", "parameter 1", "list"),
    ),
    (lambda: [{"params": {parameter()}}], TypeError, ("order", "set")),
    (lambda: {parameter(), parameter()}, TypeError, ("order", "set")),
    (lambda: [{"params": 3}], TypeError, ("params", "int")),
    (lambda: [{"params": [parameter()]}, parameter()], TypeError, ("dict", "Parameter")),
    (lambda: [{"lr": 0.1}], KeyError, ("params", "lr")),
    (lambda: [parameter() * 2], ValueError, ("non-leaf", "parameter 0")),
    (
        lambda: [{"params": [SAME]}, {"params": [SAME]}],
        ValueError,
        ("parameter 0", "more than one parameter group"),
    ),
    (lambda: [("w", parameter()), ("w", parameter())], ValueError, ("'w'", "twice")),
    (lambda: [("w", parameter()), parameter()], ValueError, ("names", "1 have none")),
    (lambda: [("w", 3)], TypeError, ("'w'", "int")),
    (lambda: [(parameter(), "w")], TypeError, ("tensor",)),
    (lambda: [(3, parameter())], TypeError, ("name", "3")),
    (lambda: [("w",)], (TypeError, ValueError), ("name",)),
    (lambda: [("w", parameter(), 3)], (TypeError, ValueError), ("name",)),
    (
        lambda: [{"params": [("w", parameter())]}, {"params": [parameter()]}],
        ValueError,
        ("names", "without"),
    ),
    (lambda: 3, TypeError, ("iterable",)),
    (lambda: nn.Linear(2, 2), TypeError, ("iterable",)),
    (lambda: None, TypeError, ("iterable",)),
]


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize(("make", "error", "words"), PARAMETERS, ids=naming)
def test_parameters(name, make, error, words):
    with pytest.raises(error) as caught:
        getattr(onepass, name)(make())
    assert_sentence(caught.value, *words)


@pytest.mark.parametrize(("make", "error", "words"), PARAMETERS[4:14], ids=naming)
def test_parameters_added_later(make, error, words):
    opt = onepass.AdamW([parameter()])
    opt.param_groups[0]["params"][0].grad = torch.ones(3)
    opt.step()
    before, given = snapshot(opt), make()
    if not (isinstance(given, list) and given and isinstance(given[0], dict)):
        given = [{"params": given}]
    with pytest.raises(error):
        opt.add_param_group(given[-1])
    assert snapshot(opt) == before
    opt.step()


def test_a_parameter_that_the_optimizer_has():
    p = parameter()
    opt = onepass.AdamW([p])
    before = snapshot(opt)
    with pytest.raises(ValueError, match="more than one parameter group"):
        opt.add_param_group({"params": [parameter(), p]})
    assert snapshot(opt) == before
    opt = onepass.AdamW([("w", p)])
    with pytest.raises(ValueError, match="'w'"):
        opt.add_param_group({"params": [("w", parameter())]})


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("weight_decya", "weight_decay"),
        ("beta", "betas"),
        ("amsgard", "amsgrad"),
        ("wieght_decay", "weight_decay"),
    ],
)
def test_misspelt_options(misspelt, meant):
    with pytest.raises(TypeError, match=misspelt):
        onepass.AdamW([parameter()], **{misspelt: 0.1})
    words = f"AdamW: a param group has no option {misspelt!r}; did you mean {meant!r}"
    with pytest.warns(UserWarning, match=re.escape(words)):
        opt = onepass.AdamW([{"params": [parameter()], misspelt: 0.1}])
    assert opt.param_groups[0][misspelt] == 0.1
    with pytest.warns(UserWarning, match=re.escape(words)):
        opt.add_param_group({"params": [parameter()], misspelt: 0.1})


@pytest.mark.parametrize(
    "key",
    [
        "initial_lr",
        "max_lr",
        "min_lr",
        "base_lr",
        "lr_scale",
        "name",
        "group_name",
        "base_momentum",
        "max_momentum",
        "wd",
    ],
)
def test_other_keys_are_welcome(key):
    """Schedulers and frameworks keep their own in a group."""
    for name in NON_NEGATIVE:
        opt = getattr(onepass, name)([{"params": [parameter()], key: 0.5}])
        assert opt.param_groups[0][key] == 0.5


@pytest.mark.parametrize("given", [3, None, [], [parameter()], "group", ("params", [])])
def test_groups_that_are_no_dicts(given):
    opt = onepass.SGD([parameter()])
    before = snapshot(opt)
    with pytest.raises(TypeError) as caught:
        opt.add_param_group(given)
    assert_sentence(caught.value, "SGD", "dict", type(given).__name__)
    assert snapshot(opt) == before


def test_a_gradient_on_another_device():
    p, q = parameter(), parameter()
    opt = onepass.AdamW([p, q])
    for t in (p, q):
        t.grad = torch.ones(3)
    opt.step()
    torch.utils.swap_tensors(q, nn.Parameter(torch.ones(3, device="meta")))
    q.grad = torch.ones(3, device="meta")
    refuses(opt, "parameter 1 is on meta, its state .* on cpu")


def test_closures_and_state_dicts_of_the_wrong_kind():
    p = parameter()
    opt = onepass.AdamW([p])
    p.grad = torch.ones(3)
    before = snapshot(opt)
    with pytest.raises(TypeError):
        opt.step(3)
    for wrong in (
        None,
        3,
        [],
        {},
        {"state": {}},
        {"state": {}, "param_groups": 3},
        {"state": 3, "param_groups": []},
    ):
        with pytest.raises((ValueError, TypeError)) as caught:
            opt.load_state_dict(wrong)
        assert_sentence(caught.value, "AdamW")
    assert snapshot(opt) == before


NOT_A_NUMBER: list[Any] = [
    None,
    "0.1",
    "",
    (),
    [1.0],
    {},
    object(),
    1j,
    10**400,
    torch.ones(3),
    torch.ones(()).to("meta"),
]


@pytest.mark.parametrize("name", ["lowest", "highest", "steps", "smoothing", "stop", "lr"])
def test_the_range_test(name):
    """Bounds and rates that are not numbers: a sentence, before a batch is asked for."""
    p = parameter()
    opt = onepass.SGD([p])

    def batches():
        raise AssertionError("a batch was asked for")
        yield

    for bad in NOT_A_NUMBER:
        given = {} if name == "lr" else {name: bad}
        opt.param_groups[0]["lr"] = bad if name == "lr" else 0.1
        with pytest.raises((TypeError, ValueError)) as caught:
            onepass.lr_find(nn.Linear(1, 1), lambda model, batch: batch, batches(), opt, **given)
        assert_sentence(caught.value, "lr_find", name, "got")


class TestRules:
    """A rule of the user's own is checked with the same care."""

    @staticmethod
    def make(rule, **defaults):
        return type("Mine", (onepass.Optimizer,), {"rule": staticmethod(rule)})(
            [parameter()], {"lr": 0.1, **defaults}
        )

    @staticmethod
    def step(opt):
        opt.param_groups[0]["params"][0].grad = torch.ones(3)
        opt.step()

    def test_good(self):
        def rule(p, g, *, lr):
            return {"p": p - lr * g}

        opt = self.make(rule)
        self.step(opt)
        assert torch.equal(opt.param_groups[0]["params"][0], torch.full((3,), 1 - 0.1))

    def test_option_missing(self):
        def rule(p, g, *, lr, decay):
            return {"p": p - lr * decay * g}

        opt = self.make(rule)
        opt.param_groups[0]["params"][0].grad = torch.ones(3)
        refuses(opt, "'decay'")

    @pytest.mark.parametrize(
        ("rule", "words"),
        [
            (lambda p, g, *, lr: {}, "must return a dict"),
            (lambda p, g, *, lr: p - lr * g, "must return a dict"),
            (lambda p, g, *, lr: {"p": p, "g": g}, "'g'"),
            (lambda p, g, *, lr: {"p": p, "m": g}, "'m'"),
            (lambda p, g, *, lr: {"p": p if p > 0 else g}, "where"),
            (lambda p, g, *, lr: {"p": p - "lr" * g}, "lr"),
            (lambda g, p, *, lr: {"p": p - lr * g}, "p and g first"),
            (lambda p, g, lr: {"p": p - lr * g}, "lr|state"),
            (lambda p, g, *args, lr: {"p": p}, "columns by position"),
            (lambda p, g, **options: {"p": p}, "columns by position"),
        ],
    )
    def test_bad(self, rule, words):
        if words == "lr|state":
            pytest.skip("a column called lr is a column")
        with pytest.raises(onepass.RuleError, match=words):
            self.step(self.make(rule))

    def test_no_rule(self):
        class Mine(onepass.Optimizer):
            pass

        with pytest.raises((TypeError, NotImplementedError), match="rule"):
            self.step(Mine([parameter()], {"lr": 0.1}))
