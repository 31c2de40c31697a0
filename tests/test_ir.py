"""Expressions: one object for one value, types and ranks, the sentences for what cannot be, and
what functions mean."""

from __future__ import annotations

import gc
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.interpreter import interpret

from onepass.kernel import Graph, functions
from onepass.kernel.eager import single as eager
from onepass.kernel.functions import numel
from onepass.kernel.graph import ir
from onepass.kernel.graph.ir import (
    Node,
    Rank,
    RuleError,
    const,
    hyper,
    load,
    make,
    topological,
    verify,
    where,
)
from onepass.kernel.graph.trace import bind, trace

NAN, INF = float("nan"), float("inf")
p, g, lr = load("p"), load("g"), hyper("lr")


# One object for one value.


def test_same_expression_is_the_same_object() -> None:
    assert load("p") * 2.0 + lr is load("p") * 2 + hyper("lr")
    assert load("p") is not load("g")
    assert p - g is not g - p
    assert const(1.0) is const(1)
    assert const(1.0, "f32") is not const(1.0)
    assert make("cast", p, type="f32") is not make("cast", p, type="f64")


def test_constants_are_told_apart_by_their_bits() -> None:
    assert const(0.0) is not const(-0.0)
    assert const(NAN) is const(NAN)
    assert const(NAN) is not const(INF)
    assert math.copysign(1.0, const(-0.0).attr) == -1.0
    assert const(0.1) is not const(np.nextafter(0.1, 1.0))


def test_nodes_are_forgotten_with_their_last_user() -> None:
    before = len(ir._interned)
    expression = load("only here") * 3.25 + load("nor there")
    assert len(ir._interned) > before
    del expression
    gc.collect()
    assert len(ir._interned) == before


def test_common_subexpressions_are_shared() -> None:
    x = (p + g) * (p + g) - (p + g)
    assert [n.op for n in topological([x])].count("add") == 1


def test_topological_puts_arguments_first_and_survives_depth() -> None:
    x = p
    for _ in range(5000):
        x = x + g
    order = topological([x, p])
    place = {id(n): i for i, n in enumerate(order)}
    assert len(place) == len(order) == 5002
    assert all(place[id(a)] < place[id(n)] for n in order for a in n.args)


def test_a_long_expression_has_a_short_text() -> None:
    x = p
    for _ in range(100):
        x = x * x + g
    assert len(repr(x)) < 200
    assert repr(p * lr) == "mul(load('p'), hyper('lr'))"


# Ranks and types.


@pytest.mark.parametrize(
    ("node", "rank"),
    [
        (const(1.0), Rank.UNIFORM),
        (lr, Rank.UNIFORM),
        (1 - lr**2, Rank.UNIFORM),
        (numel(), Rank.TENSOR),
        (numel() * lr, Rank.TENSOR),
        (functions.norm(p), Rank.TENSOR),
        (functions.norm(p) / functions.norm(g), Rank.TENSOR),
        (functions.mean(g) > lr, Rank.TENSOR),
        (p, Rank.ELEMENT),
        (p * functions.norm(g), Rank.ELEMENT),
        (where(lr > 0, p, g), Rank.ELEMENT),
        (where(p > 0, lr, 1.0), Rank.ELEMENT),
    ],
    ids=str,
)
def test_ranks(node: Node, rank: Rank) -> None:
    assert node.rank == rank


def test_types() -> None:
    assert (p > g).type == (p == g).type == (~(p < 0)).type == "bool"
    assert where(p > 0, p, 1).type == "real"
    assert (lr + 1).type == "real"
    assert where(p > 0, 1.0, -1.0).args[1].attr == 1.0


BRANCH = "cannot branch on a value that is known only while stepping: use where"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: bool(g > 0), BRANCH),
        (lambda: g > 0 and p > 0, BRANCH),
        (lambda: not lr, BRANCH),
        (lambda: max(p, g), BRANCH),
        (lambda: 0 < lr < 1, BRANCH),
        (lambda: g**3, "pow of an element is not offered"),
        (lambda: g**0.5, "pow of an element is not offered"),
        (lambda: g**lr, "pow of an element is not offered"),
        (lambda: 2**g, "pow of an element is not offered"),
        (lambda: functions.exp(g), "exp of an element is not offered.*use products"),
        (lambda: functions.log(g), "log of an element is not offered"),
        (
            lambda: functions.sum(lr),
            "sum runs over the elements of a tensor, and this value is the same for all of them",
        ),
        (lambda: functions.norm(functions.norm(g)), "sum runs over the elements"),
        (lambda: p + (g > 0), r"add takes two numbers of one type, got \(real, bool\)"),
        (lambda: (p > 0) == (g > 0), r"eq takes two numbers of one type, got \(bool, bool\)"),
        (lambda: where(p, 1.0, 0.0), "where takes a condition and two values of one type"),
        (lambda: where(p > 0, p, g > 0), "where takes a condition and two values of one type"),
        (lambda: ~p, r"not takes one condition, got \(real\)"),
        (lambda: p & g, "and takes two conditions, or two integers of one type"),
        (lambda: p + "1", r"a rule computes with numbers and columns, got '1' \(str\)"),
        (
            lambda: p * torch.ones(1),
            r"a rule computes with numbers and columns, got tensor\(\[1.\]\) \(Tensor\)",
        ),
        (lambda: p * None, r"a rule computes with numbers and columns, got None \(NoneType\)"),
        (lambda: p * True, r"a rule computes with numbers and columns, got True \(bool\)"),
        (lambda: make("add", p), "add takes two numbers"),
        (lambda: make("load", p), "load takes no arguments"),
        (lambda: make("shl", p, p), "shl takes two conditions, or two integers"),
        (lambda: make("bitcast", p, type="f23"), "bitcast takes one value and a type"),
        (lambda: make("fma", p, p, p), "no operation is called 'fma'; there are abs, add"),
    ],
)
def test_what_cannot_be_raises_a_sentence(build, message: str) -> None:
    with pytest.raises(RuleError, match=message):
        build()


def test_rule_errors_are_type_errors() -> None:
    assert issubclass(RuleError, TypeError)


@pytest.mark.parametrize("field", ["rank", "type", "op", "args"])
def test_verify_finds_what_was_corrupted(field: str) -> None:
    whole = make("mul", load("a"), load("b"))
    broken = Node()
    wrong = {"rank": Rank.UNIFORM, "type": "f64", "op": "lt", "args": (load("a"), load("a") > 0)}
    for name in ("op", "args", "attr", "type", "rank"):
        setattr(broken, name, wrong[name] if name == field else getattr(whole, name))
    verify([whole + 1])
    with pytest.raises((AssertionError, RuleError)):
        verify([make("neg", broken) if field not in ("type", "op") else broken])


def test_verify_holds_a_stage_to_its_types_and_columns() -> None:
    with pytest.raises(AssertionError, match="has type i32; this stage allows f32"):
        verify([make("cast", load("p", "f32"), type="i32")], types=("f32",))
    with pytest.raises(AssertionError, match="loads a column that is not there; there are p, s"):
        verify([load("q")], columns=("p", "s"))


# What functions mean.


def values(expression: Node, **columns: np.ndarray) -> np.ndarray:
    """The expression over float64 columns, by the interpreter."""
    graph = Graph("test", tuple(columns), (("p", expression),))
    program = bind(graph, tuple((name, "float64") for name in columns))
    return interpret(program, columns, {"lr": 0.25})["p"]


ANY = np.array([0.0, -0.0, 1.0, -2.0, 0.5, 2.5, 3.5, -2.5, INF, -INF, NAN, 1e300, 5e-324])
A, B = (m.ravel() for m in np.meshgrid(ANY, ANY))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (functions.maximum, torch.maximum),
        (functions.minimum, torch.minimum),
        # Of NaN, torch's sign is 0: a gradient that is none would stop showing.
        (lambda a, b: functions.sign(a), lambda a, b: torch.where(a.isnan(), a, torch.sign(a))),
        (lambda a, b: abs(a), lambda a, b: torch.abs(a)),
        (lambda a, b: functions.floor(a), lambda a, b: torch.floor(a)),
        (lambda a, b: functions.rint(a), lambda a, b: torch.round(a)),
        (lambda a, b: functions.square(a), lambda a, b: torch.square(a)),
        (lambda a, b: a**2, lambda a, b: a**2),
        (lambda a, b: -a, lambda a, b: -a),
        (lambda a, b: where(a > b, a, b), lambda a, b: torch.where(a > b, a, b)),
        (lambda a, b: where(a >= b, a, 1.0), lambda a, b: torch.where(a >= b, a, 1.0)),
        (lambda a, b: where(a != b, a, b), lambda a, b: torch.where(a != b, a, b)),
        (
            lambda a, b: where((a < b) ^ (b <= 0), a, b),
            lambda a, b: torch.where((a < b) ^ (b <= 0), a, b),
        ),
        (
            lambda a, b: where(~(a == b) & (b < 1), a, b),
            lambda a, b: torch.where(~(a == b) & (b < 1), a, b),
        ),
        (lambda a, b: functions.maximum(a, 0.5), lambda a, b: torch.clamp(a, min=0.5)),
        (lambda a, b: functions.minimum(0.5, a), lambda a, b: torch.clamp(a, max=0.5)),
        (lambda a, b: a / b, lambda a, b: a / b),
        (lambda a, b: 1 - a, lambda a, b: 1 - a),
        (lambda a, b: 1 / a, lambda a, b: 1 / a),
    ],
)
def test_functions_mean_what_torch_means(ours, theirs) -> None:
    got = values(ours(load("p"), load("g")), p=A, g=B)
    want = theirs(torch.from_numpy(A), torch.from_numpy(B)).numpy()
    np.testing.assert_array_equal(got, want)


@given(
    a=st.floats(-1e6, 1e6),
    b=st.floats(-1e6, 1e6),
    weight=st.sampled_from([0.0, 1.0, 0.5]) | st.floats(0.0, 1.0),
)
def test_lerp_is_torch_lerp(a: float, b: float, weight: float) -> None:
    """Exact at both ends; between, each of the three roundings errs by half a unit of at most twice
    the larger end."""
    got = values(functions.lerp(load("p"), load("g"), weight), p=np.array([a]), g=np.array([b]))[0]
    want = torch.lerp(
        torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64), weight
    ).item()
    assert abs(got - want) <= 2 * 3 * 2.0**-53 * 2 * max(abs(a), abs(b))
    if weight in (0.0, 1.0):
        assert got == (a if weight == 0 else b)


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.9, 1.0])
def test_lerp_spreads_what_is_no_number_as_torch(weight: float) -> None:
    got = values(functions.lerp(load("p"), load("g"), weight), p=A, g=B)
    want = torch.lerp(torch.from_numpy(A), torch.from_numpy(B), weight).numpy()
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    np.testing.assert_array_equal(np.isinf(got), np.isinf(want))


def test_division_by_a_host_value_is_a_product_with_its_reciprocal() -> None:
    ops = [n.op for n in topological([p / (1 - lr)])]
    assert ops.count("div") == 1
    quotient = p / (1 - lr)
    assert quotient.op == "mul"
    assert quotient.args[1].op == "div"
    assert quotient.args[1].rank == Rank.UNIFORM
    assert (p / g).op == "div"
    assert (1 / p).op == "div"
    assert (p / 4).args[1].args[1].attr == 4.0
    assert (lr / 3).op == "div"


def test_the_square_of_an_element_is_a_product_of_host_values_a_power() -> None:
    assert g**2 is g * g
    assert g**2.0 is g * g
    assert (lr**2).op == "pow"
    assert (lr**lr).op == "pow"


def test_constants_beside_elements_round_once() -> None:
    """0.1 in a float32 kernel is the float32 next to 0.1; hyper-parameters alike, after float64
    arithmetic."""
    graph = Graph("test", ("p", "g"), (("p", load("p") * 0.1 + (lr + 1.0) / 3.0),))
    program = bind(graph, (("p", "float32"), ("g", "float32")))
    got = interpret(
        program, {"p": np.ones(1, np.float32), "g": np.ones(1, np.float32)}, {"lr": 1e-9}
    )["p"]
    assert got[0] == np.float32(0.1) + np.float32((1e-9 + 1.0) / 3.0)


def test_eager_and_oracle_know_every_operation() -> None:
    """What a rule can say, both can run."""
    spoken = ir.OPERATIONS - ir.LEAVES - {"cast", "bitcast", "shl", "shr", "spread"}
    assert spoken == set(eager.ON_TENSORS) | ir.REDUCTIONS | {"call"}


def test_tracing_is_cached() -> None:
    def rule(p, g, *, lr):
        return {"p": p - lr * g}

    assert trace(rule, (("lr", ("float",)),)) is trace(rule, (("lr", ("float",)),))
