"""From rules to programs: what a rule may say, how it is cut at reductions, and that all backends
compute the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support.bare_kernels import (
    INF,
    NAN,
    assert_same_bits,
    check_oracle,
    compiled,
    graph_of,
    launch,
    program_of,
    random_columns,
)
from support.extra_rules import (
    ONE_NUMBER,
    RULES,
    Rule,
    centred,
    evaluate,
    factored,
    in_a_row,
    lamb,
    lars,
    nested,
    program,
    turned,
)
from support.interpreter import interpret
from table import TABLE, UNIT, Row

import onepass
from onepass.kernel import bind, finish, signature, trace
from onepass.kernel.cpu import launch as cpu
from onepass.kernel.cpu.elements import LANES
from onepass.kernel.cpu.walk import CHUNK
from onepass.kernel.functions import amax, mean, norm
from onepass.kernel.functions import sum as total
from onepass.kernel.graph.ir import Rank, RuleError, const
from onepass.kernel.graph.passes import lines_of

# What a rule may say.


def no_gradient(p, x, *, lr):
    return {"p": p}


def any_columns(p, g, *states, lr):
    return {"p": p}


def any_keywords(p, g, *, lr, **further):
    return {"p": p}


def swapped(g, p, *, lr):
    return {"p": p}


@pytest.mark.parametrize("rule", [no_gradient, any_columns, any_keywords, swapped])
def test_signatures_must_say_it_all(rule: Rule) -> None:
    with pytest.raises(
        RuleError, match=rf"{rule.__name__} must be written `def rule\(p, g, \*states"
    ):
        signature(rule)


def branches(p, g, *, lr):
    return {"p": p - lr * g if g > 0 else p}


def unknown_column(p, g, momentum, *, lr):
    return {"p": p, "momentun": g}


def writes_gradient(p, g, *, lr):
    return {"p": p, "g": g * 0}


def forgets_p(p, g, s, *, lr):
    return {"s": g}


def returns_tensor(p, g, *, lr):
    return p - lr * g


def returns_condition(p, g, s, *, lr):
    return {"p": p, "s": g > 0}


def returns_text(p, g, *, lr):
    return {"p": "p"}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (branches, r"use where\(condition, a, b\) instead of `if`"),
        (
            unknown_column,
            (
                "unknown_column.rule returns 'momentun'; it may write its columns other than g: p, "
                "momentum"
            ),
        ),
        (writes_gradient, "returns 'g'; it may write its columns other than g: p"),
        (forgets_p, "must return a dict with the new value of 'p'"),
        (returns_tensor, "must return a dict with the new value of 'p', got sub"),
        (
            returns_condition,
            r"returns a condition for 's'; columns hold numbers: where\(s, 1.0, 0.0\)",
        ),
        (returns_text, "a rule computes with numbers and columns, got 'p'"),
    ],
)
def test_rules_that_cannot_be_raise_a_sentence(rule: Rule, message: str) -> None:
    with pytest.raises(RuleError, match=message):
        trace(rule, ONE_NUMBER)


def test_a_wrong_rule_raises_in_the_first_step_and_changes_nothing() -> None:
    class Branching(onepass.Optimizer):
        rule = staticmethod(branches)

        def __init__(self, params: Any, lr: float = 0.1) -> None:
            super().__init__(params, {"lr": lr})

    p = torch.ones(3, requires_grad=True)
    p.grad = torch.ones(3)
    with pytest.raises(RuleError, match="use where"):
        Branching([p]).step()
    assert torch.equal(p.detach(), torch.ones(3))


def test_flags_are_resolved_while_tracing() -> None:
    for row in TABLE:
        if row.name == "Adam":
            assert ("max_exp_avg_sq" in graph_of(row).state) == bool(row.options.get("amsgrad"))
        if row.name == "SGD":
            assert graph_of(row).state == (
                ("momentum_buffer",) if row.options.get("momentum") else ()
            )


BYTES = {
    "SGD": (8, 4),
    "SGD-momentum=0.9": (12, 8),
    "Adam": (16, 12),
    "AdamW": (16, 12),
    "Adam-amsgrad=True-betas=(0.9, 0.7)": (20, 16),
    "Adagrad": (12, 8),
    "RMSprop": (12, 8),
    "Adadelta": (16, 12),
    "Adamax": (16, 12),
    "NAdam": (16, 12),
    "RAdam": (16, 12),
    "ASGD": (12, 8),
    "Rprop": (16, 12),
}


@pytest.mark.parametrize("row", [row for row in TABLE if str(row) in BYTES], ids=str)
def test_each_column_is_read_and_written_once(row: Row) -> None:
    graph = graph_of(row)
    for format, size in (("float32", 4), ("float64", 8), ("bfloat16", 2)):
        one = program_of(graph, format, format, format)
        read, written = BYTES[str(row)]
        assert one.bytes_per_parameter == (read * size // 4, written * size // 4)
        assert len(one.passes) == 1


def test_any_identifier_may_name_a_column() -> None:
    """Names that the generated code uses itself, and letters that it does not."""
    names = (
        "row",
        "begin",
        "end",
        "partial",
        "v0",
        "v1",
        "input0",
        "entry",
        "done",
        "acc0",
        "lane0_1",
        "μ",
        "loop_i",
    )
    source = f"def rule(p, g, {', '.join(names)}, *, lr):\n"
    source += f"    return {{'p': p - lr * norm(g), {', '.join(f'{n!r}: {n} + g' for n in names)}}}"
    space: dict[str, Any] = {"norm": norm}
    exec(source, space)
    kernel = compiled(program(space["rule"]))
    check_oracle(
        kernel, [random_columns(np.random.default_rng(0), kernel.program, 77)], [{"lr": 0.5}]
    )


def test_keywords_may_have_any_name() -> None:
    def rule(p, g, *, numel, step, arguments):
        return {"p": p - numel * g + step * mean(g) - arguments}

    keywords = tuple((name, ("float",)) for name in ("numel", "step", "arguments"))
    kernel = compiled(bind(finish(trace(rule, keywords)), (("p", "float32"), ("g", "float32"))))
    hypers = {"numel": 0.25, "step": 3.0, "arguments": 5.0}
    check_oracle(kernel, [random_columns(np.random.default_rng(0), kernel.program, 77)], [hypers])


over_rules = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
PASSES = {"lars": 2, "lamb": 2, "centred": 4, "only_reductions": 2, "host_values_stored": 2}
SIZES = (0, 1, 15, 16, 17, 1000, CHUNK - 1, CHUNK + LANES + 3)


@over_rules
@pytest.mark.parametrize("format", ["float32", "float64", "bfloat16", "float16"])
def test_kernel_is_the_oracle(rule: Rule, format: str, rng: np.random.Generator) -> None:
    """Bit for bit, with ordinary numbers and with special ones."""
    kernel = compiled(program(rule, format))
    assert len(kernel.program.passes) == PASSES.get(rule.__name__, 1)
    hypers = [{"lr": 0.25}, {"lr": 1e-3}]
    rows = [i % 2 for i in range(len(SIZES))]
    for special in (0.0, 0.01):
        check_oracle(
            kernel, [random_columns(rng, kernel.program, n, special) for n in SIZES], hypers, rows
        )


@over_rules
def test_kernel_is_the_oracle_with_wider_states(rule: Rule, rng: np.random.Generator) -> None:
    for state in ("float32", "float64"):
        kernel = compiled(program(rule, "bfloat16", state))
        check_oracle(
            kernel, [random_columns(rng, kernel.program, n, 0.0) for n in SIZES[:6]], [{"lr": 0.25}]
        )


@over_rules
def test_threads_and_company_do_not_matter(
    rule: Rule, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "UNITS_PER_THREAD", 1)
    kernel = compiled(program(rule))
    tensors = [random_columns(rng, kernel.program, n, 0.0) for n in (*SIZES, 9 * CHUNK + 1, 300)]
    alone = [launch(kernel, [t], [{"lr": 0.25}], threads=1)[0] for t in tensors]
    for threads in (1, 2, 7):
        for got, want in zip(
            launch(kernel, tensors, [{"lr": 0.25}], threads=threads), alone, strict=True
        ):
            for name in want:
                assert_same_bits(got[name], want[name], f"{name} with {threads} threads")


def in_float64(rule: Rule, columns: Mapping[str, np.ndarray], lr: float) -> dict[str, np.ndarray]:
    """What a rule with reductions means, by hand."""
    c = {name: a.astype(np.float64) for name, a in columns.items()}
    p, g = c["p"], c["g"]
    length = np.linalg.norm
    if rule is lars:
        ratio = 0.1 * length(p) / (length(g) + 1e-3) if length(g) > 0 else 1.0
        m = 0.9 * c["momentum"] + lr * ratio * g
        return {"p": p - m, "momentum": m}
    if rule is lamb:
        m, v = 0.9 * c["m"] + 0.1 * g, 0.99 * c["v"] + 0.01 * g**2
        update = m / (np.sqrt(v) + 1e-6) + 0.01 * p
        return {"p": p - lr * length(p) / (length(update) + 1e-12) * update, "m": m, "v": v}
    assert rule is centred
    scaled = (g - g.mean()) / (np.abs(g - g.mean()).max() + 1e-8)
    return {"p": p - lr * scaled * length(p) / (length(scaled) + len(p))}


@pytest.mark.parametrize("rule", [lars, lamb, centred], ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("format", ["float64", "float32"])
@pytest.mark.parametrize("eager", [False, True], ids=["kernel", "eager"])
def test_reductions_mean_what_they_say(
    rule: Rule, format: str, eager: bool, rng: np.random.Generator
) -> None:
    """Elements have a dozen roundings each; sums are in float64, where n of them weigh nothing
    beside float32's."""
    unit = UNIT[getattr(torch, format)]
    graph = finish(trace(rule, ONE_NUMBER))
    kernel = compiled(program(rule, format))
    for n in (1, 1000, 70000):
        columns = {c.name: rng.standard_normal(n).astype(format) for c in kernel.program.columns}
        if "v" in columns:
            columns["v"] = columns["v"] ** 2
        want = in_float64(rule, columns, 0.25)
        if eager:
            tensors = {name: torch.from_numpy(a) for name, a in columns.items()}
            got = {name: t.numpy() for name, t in evaluate(graph, tensors, {"lr": 0.25}).items()}
        else:
            got = launch(kernel, [columns], [{"lr": 0.25}])[0]
        for name, values in want.items():
            # A float64 sum of n numbers errs by n/2 units, far less in truth: only that part grows
            # with n.
            terms = 24 + (n if format == "float64" else 0)
            bound = terms * unit * np.abs(values).max() + 4 * unit * np.abs(columns[name]).max()
            assert np.abs(got[name] - values).max() <= bound


class Lamb(onepass.Optimizer):
    """As a user would write it."""

    def __init__(self, params: Any, lr: float = 1e-3, **modes: Any) -> None:
        super().__init__(params, {"lr": lr, "foreach": None, "fused": None, **modes})

    rule = staticmethod(lamb)


def test_a_rule_of_ones_own_gets_every_backend() -> None:
    """Through the optimizer: kernel and eager agree, tensors keep their own norms, and empty ones
    do no harm."""
    start = [torch.randn(shape) for shape in ((40, 30), (7,), (0,), ())]
    ends = []
    for modes in ({}, {"foreach": False, "fused": False}):
        params = [p.clone() for p in start]
        optimizer = Lamb(params, lr=0.1, **modes)
        for step in range(3):
            for p in params:
                p.grad = torch.sin(p * 3 + step)
            optimizer.step()
        ends.append(params)
    for a, b in zip(*ends, strict=True):
        # Three steps of two dozen roundings, and errors of p that enter the gradients threefold.
        torch.testing.assert_close(a, b, rtol=0, atol=3 * 3 * 24 * UNIT[torch.float32] * 3)
    columns = {"p": start[0].view(-1).numpy(), "g": torch.sin(start[0] * 3).view(-1).numpy()}
    columns |= {"m": np.zeros(1200, np.float32), "v": np.zeros(1200, np.float32)}
    once = start[0].clone()
    optimizer = Lamb([once], lr=0.1)
    once.grad = torch.sin(once * 3)
    optimizer.step()
    want = interpret(program(lamb), columns, {"lr": 0.1})
    assert_same_bits(once.view(-1).numpy(), want["p"], "p")


def reduce_by(kernel: Any, values: np.ndarray) -> float:
    columns = {"p": np.zeros_like(values), "g": values}
    return float(launch(kernel, [columns], [{"lr": 0.0}])[0]["p"][0])


@pytest.mark.parametrize("place", [0, 5, 16, 40, CHUNK - 1, CHUNK, CHUNK + 2])
def test_nothing_hides_from_a_reduction(place: int) -> None:
    """NaN, infinities and the largest number are found at any place: in lanes, in tails, in later
    chunks."""

    def largest(p, g, *, lr):
        return {"p": p + amax(g)}

    def added(p, g, *, lr):
        return {"p": p + total(g)}

    n = CHUNK + 3
    for value, biggest, sum_of_all in (
        (NAN, NAN, NAN),
        (-INF, INF, -INF),
        (-7.0, 7.0, n - 1 - 7.0),
    ):
        values = np.ones(n)
        values[place] = value
        np.testing.assert_equal(reduce_by(compiled(program(largest, "float64")), values), biggest)
        np.testing.assert_equal(reduce_by(compiled(program(added, "float64")), values), sum_of_all)


def test_sums_are_in_float64() -> None:
    """2^24 + 1 has no float32; a thousand small numbers beside a large one do not vanish."""

    def added(p, g, *, lr):
        return {"p": p + (total(g) - 2.0**24)}

    values = np.ones(1001, np.float32)
    values[0] = 2.0**24
    assert reduce_by(compiled(program(added)), values) == 1000.0


def test_empty_tensors_reduce_to_zero() -> None:
    """A norm of nothing is 0; as no element sees it, no NaN comes of a mean."""
    kernel = compiled(program(centred))
    empty = {"p": np.zeros(0, np.float32), "g": np.zeros(0, np.float32)}
    full = {"p": np.ones(3, np.float32), "g": np.arange(3, dtype=np.float32)}
    together = launch(kernel, [empty, full, empty], [{"lr": 0.5}])
    assert_same_bits(together[1]["p"], launch(kernel, [full], [{"lr": 0.5}])[0]["p"], "p")
    assert launch(kernel, [empty], [{"lr": 0.5}])[0]["p"].shape == (0,)
    assert launch(kernel, [], [{"lr": 0.5}]) == []


def test_eager_reduces_empty_tensors_too() -> None:
    graph = finish(trace(centred, ONE_NUMBER))
    assert evaluate(graph, {"p": torch.ones(0), "g": torch.ones(0)}, {"lr": 0.5})["p"].shape == (0,)


@over_rules
@pytest.mark.parametrize("format", ["float32", "float64"])
def test_eager_agrees(rule: Rule, format: str, rng: np.random.Generator) -> None:
    """One step from the same numbers: the same operations, rounded once each, in another order in
    the sums alone."""
    graph = finish(trace(rule, ONE_NUMBER))
    kernel = compiled(program(rule, format))
    for n in (1, 17, 1000):
        columns = random_columns(rng, kernel.program, n, special=0.0)
        columns = {name: np.abs(a) if name == "v" else a for name, a in columns.items()}
        want = launch(kernel, [columns], [{"lr": 0.25}])[0]
        tensors = {name: torch.from_numpy(a) for name, a in columns.items()}
        for name, got in evaluate(graph, tensors, {"lr": 0.25}).items():
            scale = max(np.abs(want[name]).max(), np.abs(columns[name]).max())
            assert (
                np.abs(got.numpy() - want[name]).max() <= 24 * UNIT[getattr(torch, format)] * scale
            )


def test_scalars_reduce_in_eager_as_anywhere() -> None:
    """A tensor of one element is not mistaken for the host's number."""
    graph = finish(trace(lars, ONE_NUMBER))
    values = {name: torch.tensor(float(i + 1)) for i, name in enumerate(("p", "g", "momentum"))}
    flat = {name: t.reshape(1) for name, t in values.items()}
    for name, got in evaluate(graph, values, {"lr": 0.25}).items():
        assert got.shape == ()
        assert abs(got - evaluate(graph, flat, {"lr": 0.25})[name][0]) <= 2.0**-22


# What every algorithm shares.


def plain(p, g, *, lr):
    return {"p": p - lr * g}


@pytest.mark.parametrize("maximize", [False, True])
def test_the_gradient_factor(maximize: bool, rng: np.random.Generator) -> None:
    """Unscaling multiplies each gradient once, by a host value."""
    graph = finish(trace(plain, ONE_NUMBER), scaled=True, maximize=maximize)
    kernel = compiled(bind(graph, (("p", "float32"), ("g", "float16"))))
    hypers = {"lr": 0.5, "gradient_factor": 1 / 1024}
    columns = random_columns(rng, kernel.program, 100, special=0.0)
    got = check_oracle(kernel, [columns], [hypers])[0]["p"]
    g = columns["g"].astype(np.float32) * np.float32(1 / 1024)
    assert_same_bits(got, columns["p"] - np.float32(0.5) * (-g if maximize else g), "p")


def test_exactness_may_be_left_out() -> None:
    """With autograd, p must not be chosen by a comparison with itself."""
    assert any(node.op == "where" for node in finish(trace(plain, ONE_NUMBER)).roots)
    assert not any(
        node.op == "where" for node in finish(trace(plain, ONE_NUMBER), exact=False).roots
    )


def test_programs_are_bound_and_compiled_once() -> None:
    assert program(lamb) is program(lamb)
    assert compiled(program(lamb)) is compiled(program(lamb))


def test_graphs_without_hyper_parameters_run() -> None:
    def fixed(p, g, *, lr):
        return {"p": p - const(0.5) * g}

    kernel = compiled(program(fixed))
    columns = {"p": np.ones(20, np.float32), "g": np.ones(20, np.float32)}
    assert (launch(kernel, [columns], [{"lr": 0.0}])[0]["p"] == 0.5).all()


def sequence(n: int) -> Rule:
    def rule(p, g, *, lr):
        for _ in range(n):
            p = p - lr * g
        return {"p": p}

    return rule


def test_long_rules_compile() -> None:
    """A rule may unroll a loop: no step from rule to kernel recurses as deep as the expression."""
    kernel = compiled(program(sequence(1500), "float64"))
    after = launch(kernel, [{"p": np.ones(3), "g": np.ones(3)}], [{"lr": 2.0**-10}])[0]
    # Every partial result has few digits: nothing is rounded.
    assert (after["p"] == 1 - 1500 / 1024).all()


def test_rows_of_many_groups(rng: np.random.Generator) -> None:
    """Four hundred settings in one launch, reductions and all, each tensor with its own."""
    kernel = compiled(program(lars))
    tensors: Sequence[dict[str, np.ndarray]] = [
        random_columns(rng, kernel.program, 5, 0.0) for _ in range(400)
    ]
    check_oracle(kernel, tensors, [{"lr": 0.001 * i} for i in range(400)], list(range(400)))


# What a program says of itself.


@pytest.mark.parametrize(("rule", "first"), [(lamb, 0), (in_a_row, 1), (turned, 7)])
def test_nothing_is_stored_before_the_last_call(rule: Rule, first: int) -> None:
    cut = program(rule)
    assert cut.first_to_store == first
    stored = {name for pass_ in cut.passes[:first] for name, _ in pass_.stores}
    assert stored.isdisjoint(column.name for column in cut.columns)


def test_sums_run_along_lines_or_down_the_columns() -> None:
    # Row sums and column sums of the elements in one walk; then a sum over the values of rows.
    elements, rows, *_ = program(factored).passes
    assert [sum_.node.rank for sum_ in elements.along] == [Rank.ROW]
    assert [sum_.node.rank for sum_ in elements.down] == [Rank.COLUMN]
    assert [sum_.node.rank for sum_ in rows.along] == [Rank.MATRIX]
    assert rows.down == ()


@pytest.mark.parametrize("rule", [factored, nested, turned])
def test_every_sum_runs_one_way(rule: Rule) -> None:
    for pass_ in program(rule).passes:
        assert len(pass_.along) + len(pass_.down) == len(pass_.sums)


def test_the_lines_of_a_walk() -> None:
    of_two_tensors = np.array([[2, 3, 5], [1, 4, 7]])
    expected = {
        Rank.ELEMENT: ([2, 1], [3, 4], [5, 7]),
        Rank.ROW: ([2, 1], [1, 1], [3, 4]),
        Rank.COLUMN: ([2, 1], [1, 1], [5, 7]),
        Rank.MATRIX: ([1, 1], [1, 1], [2, 1]),
    }
    for domain, lines in expected.items():
        arrays = lines_of(domain, *of_two_tensors.T, one=np.ones(2, int))
        assert tuple(array.tolist() for array in arrays) == lines
        assert lines_of(domain, 2, 3, 5, one=1) == tuple(numbers[0] for numbers in lines)
    assert lines_of(Rank.ROW, "m", "r", "c", one="1") == ("m", "1", "r")
    with pytest.raises(ValueError, match="no pass walks over values of rank TENSOR"):
        lines_of(Rank.TENSOR, 2, 3, 5, one=1)
