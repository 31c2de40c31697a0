"""Values of rows, columns and matrices, passes that walk line by line, and functions of whole
matrices between them."""

from __future__ import annotations

import copy
import io
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support.bare_kernels import (
    assert_same_bits,
    check_oracle,
    compiled,
    flat,
    launch,
    random_columns,
)
from support.extra_rules import (
    MATRIX_RULES,
    ONE_NUMBER,
    Rule,
    backwards,
    edges,
    evaluate,
    factored,
    in_a_row,
    largest,
    nested,
    only_a_call,
    program,
    rolled,
    turned,
)
from support.interpreter import interpret
from support.side_by_side import refuses, snapshot
from table import UNIT
from torch import Tensor, nn

import onepass
from onepass import PerColumn, PerRow, StepError
from onepass.kernel import finish, shape_at, signature, trace
from onepass.kernel.cpu import launch as cpu
from onepass.kernel.cpu.chunks import FEWEST_LINES
from onepass.kernel.cpu.elements import LANES
from onepass.kernel.cpu.walk import CHUNK
from onepass.kernel.functions import amax, call, column_mean, exp, mean, norm, row_mean
from onepass.kernel.graph.ir import Rank, RuleError
from onepass.kernel.tensors.temporaries import Temporaries

over_rules = pytest.mark.parametrize("rule", MATRIX_RULES, ids=lambda rule: rule.__name__)
FORMATS = ("float32", "float64", "bfloat16", "float16")
Sizes = tuple[int, int, int]
# Matrices, rows, columns: lines about LANES, matrices about CHUNK, chunks of more lines than
# FEWEST_LINES and of those.
SMALL: tuple[Sizes, ...] = (
    *((1, 1, 1), (1, 1, 5), (1, 7, 1), (0, 3, 3), (1, 0, 4), (2, 3, 0), (1, 3, 3), (2, 3, 4)),
    *(
        (3, LANES + 1, LANES - 1),
        (1, LANES, LANES),
        (1, LANES - 1, LANES + 1),
        (1, 2 * LANES, 1),
        (2, 1, 33),
    ),
)
LARGE: tuple[Sizes, ...] = (
    *(
        (1, FEWEST_LINES, CHUNK // FEWEST_LINES),
        (1, FEWEST_LINES + 1, CHUNK // FEWEST_LINES),
        (2, FEWEST_LINES, 1100),
    ),
    *(
        (2, 2 * FEWEST_LINES + 1, 1100),
        (9, 61, 61),
        (4000, 3, 3),
        (1, 20000, 2),
        (1, 1, 100003),
        (1, 40003, 1),
    ),
)
LARGER: tuple[Sizes, ...] = (
    *LARGE,
    (1, 700, 300),
    (3, 181, 182),
    (2, 1, CHUNK),
    (40, 100, 100),
    (1, 100003, 2),
)
HYPERS = [{"lr": 0.25}, {"lr": 1e-3}]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """For functions of matrices, which are small; launches are told how many threads to take."""
    torch.set_num_threads(1)


def check(rule: Rule, sizes: Sequence[Sizes], rng: np.random.Generator, *formats: str) -> None:
    """The kernel has the interpreter's bits, with ordinary numbers and with special ones."""
    kernel = compiled(program(rule, *formats))
    rows = [i % 2 for i in range(len(sizes))]
    for special in (0.0, 0.01):
        tensors = [random_columns(rng, kernel.program, size, special) for size in sizes]
        check_oracle(kernel, tensors, HYPERS, rows, sizes=sizes)


@over_rules
@pytest.mark.parametrize("format", ["float32", "float64"])
def test_kernel_is_the_oracle(rule: Rule, format: str, rng: np.random.Generator) -> None:
    check(rule, SMALL, rng, format)


@over_rules
def test_kernel_is_the_oracle_across_chunks(rule: Rule, rng: np.random.Generator) -> None:
    # In float64, where the order of a sum shows.
    check(rule, LARGE, rng, "float64")


@pytest.mark.slow
@over_rules
@pytest.mark.parametrize("format", FORMATS)
def test_kernel_is_the_oracle_everywhere(rule: Rule, format: str, rng: np.random.Generator) -> None:
    check(rule, (*SMALL, *LARGER), rng, format)


@pytest.mark.parametrize("rule", [edges, turned], ids=lambda rule: rule.__name__)
@pytest.mark.parametrize(
    "formats",
    [("bfloat16",), ("float16",), ("bfloat16", "float32"), ("float32", "float64")],
    ids="-".join,
)
def test_kernel_is_the_oracle_in_other_formats(
    rule: Rule, formats: Sequence[str], rng: np.random.Generator
) -> None:
    check(rule, SMALL, rng, *formats)


def same(
    got: Sequence[dict[str, np.ndarray]], want: Sequence[dict[str, np.ndarray]], what: str
) -> None:
    for one, other in zip(got, want, strict=True):
        for name in other:
            assert_same_bits(one[name], other[name], f"{name} {what}")


SEVERAL = (*SMALL, (20, 50, 50), (1, 4 * FEWEST_LINES + 1, 1100), (1, 1, CHUNK + 5))


@over_rules
def test_places_threads_and_company_do_not_matter(
    rule: Rule, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "UNITS_PER_THREAD", 1)
    kernel = compiled(program(rule))
    tensors = [random_columns(rng, kernel.program, size, 0.0) for size in SEVERAL]
    alone = [
        launch(kernel, [t], HYPERS[:1], sizes=[size])[0]
        for t, size in zip(tensors, SEVERAL, strict=True)
    ]
    for threads in (1, 2, 3, 7):
        same(
            launch(kernel, tensors, HYPERS[:1], threads=threads, sizes=SEVERAL),
            alone,
            f"with {threads} threads",
        )
    for misaligned in (1, 2, 4):
        after = launch(kernel, tensors, HYPERS[:1], misaligned=misaligned, sizes=SEVERAL)
        same(after, alone, f"{misaligned} bytes off")
    # In another order, beside others of the same sizes with another setting.
    order = [*range(len(SEVERAL))[::-1], *range(len(SMALL))]
    rows = [i >= len(SEVERAL) for i in range(len(order))]
    after = launch(
        kernel, [tensors[i] for i in order], HYPERS, rows, sizes=[SEVERAL[i] for i in order]
    )
    same(after[: len(SEVERAL)], alone[::-1], "in another order")


class Surrounded:
    """Temporaries that begin as NaN, between guards that nobody may touch."""

    GUARD = 4096

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.arrays: list[Tensor] = []
        allocate = Temporaries._allocate

        def surrounded(own: Temporaries, count: int, one: Any) -> Tensor:
            self.arrays.append(allocate(own, count + 2 * self.GUARD, one).fill_(-7.0))
            return self.arrays[-1][self.GUARD : self.GUARD + count].fill_(np.nan)

        monkeypatch.setattr(Temporaries, "_allocate", surrounded)

    def are_whole(self) -> bool:
        guards = (torch.cat([a[: self.GUARD], a[len(a) - self.GUARD :]]) for a in self.arrays)
        return all(bool((guard == -7.0).all()) for guard in guards)


@over_rules
def test_temporaries_are_written_before_they_are_read(
    rule: Rule, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing beside them is touched; what the step before has left in them does not matter
    either."""
    surrounded = Surrounded(monkeypatch)
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *args, **how: empty(*args, **how).fill_(float("nan"))
    )
    check(rule, SEVERAL, rng)
    assert surrounded.arrays or rule in (in_a_row, only_a_call)
    assert surrounded.are_whole()


def test_launches_may_be_repeated(rng: np.random.Generator) -> None:
    """One launch again and again, each time on what the last one left: stacks in several chunks
    among the tensors."""
    sizes = np.array([(40, 60, 50), (1, 70, 1000), (3, 4, 5)])
    kernel = compiled(program(factored))
    tensors = [random_columns(rng, kernel.program, tuple(size), 0.0) for size in sizes.tolist()]
    columns = [c.name for c in kernel.program.columns]
    pointers = np.array([[t[c].ctypes.data for t in tensors] for c in columns], np.uint64)
    prepared = kernel.prepare(pointers, kernel.split(sizes), np.zeros(3, np.int64), 1)
    prepared.leaves[kernel.leaves["lr"]] = 0.25
    for step in range(3):
        wanted = [
            interpret(
                kernel.program, {c: a.copy() for c, a in t.items()}, {"lr": 0.25}, tuple(size)
            )
            for t, size in zip(tensors, sizes.tolist(), strict=True)
        ]
        prepared.run(2)
        same(
            [{name: t[name] for name in want} for t, want in zip(tensors, wanted, strict=True)],
            wanted,
            f"in {step}",
        )


# What the rules mean, by hand.


def in_float64(rule: Rule, c: dict[str, np.ndarray], lr: float) -> dict[str, np.ndarray]:
    """The rule on arrays (matrices, rows, columns)."""
    p, g = c["p"], c["g"]
    along, down = {"axis": 2, "keepdims": True}, {"axis": 1, "keepdims": True}
    if rule is factored:
        row = c["row"] + lr * ((g**2).mean(**along) - c["row"])
        column = c["column"] + lr * ((g**2).mean(**down) - c["column"])
        u = g / np.sqrt(np.maximum(row / np.maximum(row.mean(**down), 1e-3) * column, 1e-6))
        return {"p": p - lr / max(1.0, np.sqrt((u**2).mean())) * u, "row": row, "column": column}
    if rule is edges:
        row, column = c["row"], c["column"]
        u = p * row + g * row - np.where(row > 0, column * p, p - column) * lr
        u = np.where((column < row) & (column.mean(**along) > 0.1), u, -u) * (1 + row.mean(**down))
        means = column * 0.5 + row.mean(**down) * g.mean(**down)
        return {"p": p - lr * u, "row": g.mean(**along), "column": means}
    if rule is largest:
        tall, low = abs(g).max(**along), abs(g).max(**down)
        whole = (tall * c["row"]).max(**down, initial=0) + low.max(**along) * 0.25
        new = p - lr * (g / (tall + 1) + p / (low + 1))
        return {"p": new, "row": whole, "column": np.array(abs(p).max() + p.shape[1] / p.shape[2])}
    if rule is nested:
        x = g - g.mean(**along)
        x = x - x.mean(**down)
        length, whole = np.sqrt((x**2).sum()), np.sqrt((g**2).sum())
        y = x * length + (x**2).mean(**along).mean(**down) - (x * whole).mean(**along)
        return {"p": p - lr * y + (p * y).mean(**down).mean(**along)}

    def roll(x: np.ndarray, a: float, b: float) -> np.ndarray:
        return x * a + np.roll(x, 1, 2) * b

    if rule is turned:
        m = c["momentum"] + lr * (g - c["momentum"])
        u = roll(m / (abs(m).mean(**along) + 1), lr, 1 / p.shape[2])
        v = roll(m, np.sqrt(((u - u.mean()) ** 2).sum()), 0.5)
        row = c["row"] + 0.25 * (u.mean(**along) - c["row"])
        return {"p": p - u * v + c["row"], "row": row, "momentum": m}
    if rule is in_a_row:
        u = roll(g, lr, 3.0)[:, ::-1, ::-1]
        return {"p": p - lr * u[:, ::-1, ::-1] + roll(u, 0.5, lr) * u + roll(u, lr, 0.5)}
    assert rule is only_a_call
    return {"p": p - lr * (g + c["s"])[:, ::-1, ::-1] * np.sqrt((g**2).sum()), "s": g}


@over_rules
@pytest.mark.parametrize("eager", [False, True], ids=["kernel", "eager"])
def test_rules_mean_what_they_say(rule: Rule, eager: bool, rng: np.random.Generator) -> None:
    """In float64, where each value has at most a hundred roundings and each sum of n as many
    more."""
    kernel = compiled(program(rule, "float64"))
    for size in ((1, 1, 1), (2, 30, 17), (1, 40, 1000)):
        columns = {
            c.name: rng.standard_normal(shape_at(c.rank, size)) for c in kernel.program.columns
        }
        columns |= {name: abs(columns[name]) for name in ("row", "column") if rule is factored}
        wanted = in_float64(rule, columns, 0.25)
        if eager:
            tensors = {name: torch.from_numpy(a) for name, a in columns.items()}
            got = evaluate(finish(trace(rule, ONE_NUMBER)), tensors, {"lr": 0.25})
            after = {name: t.reshape(-1).numpy() for name, t in got.items()}
        else:
            after = launch(
                kernel, [{n: a.reshape(-1) for n, a in columns.items()}], HYPERS[:1], sizes=[size]
            )[0]
        for name, want in wanted.items():
            want = np.broadcast_to(want, columns[name].shape).reshape(-1)
            scale = np.abs(want).max() + np.abs(columns[name]).max()
            assert (
                np.abs(after[name] - want).max()
                <= (100 + np.prod(size)) * UNIT[torch.float64] * scale
            ), name


@over_rules
def test_eager_agrees(rule: Rule, rng: np.random.Generator) -> None:
    """In float32: the same operations rounded once each, sums in float64 on both sides."""
    graph, kernel = finish(trace(rule, ONE_NUMBER)), compiled(program(rule))
    for size in ((1, 7, 5), (3, 20, 33)):
        columns = random_columns(rng, kernel.program, size, 0.0)
        columns |= {name: abs(columns[name]) for name in ("row", "column") if rule is factored}
        want = launch(kernel, [columns], HYPERS[:1], sizes=[size])[0]
        shapes = {c.name: shape_at(c.rank, size) for c in kernel.program.columns}
        tensors = {name: torch.from_numpy(a).reshape(shapes[name]) for name, a in columns.items()}
        for name, got in evaluate(graph, tensors, {"lr": 0.25}).items():
            scale = np.abs(want[name]).max() + np.abs(columns[name]).max()
            assert (
                np.abs(got.reshape(-1).numpy() - want[name]).max()
                <= 24 * UNIT[torch.float32] * scale
            )


def test_tensors_without_elements_stay_as_they_are() -> None:
    """Their rows and columns have values; there is nothing to make new ones from, on either
    backend."""
    columns = {"p": np.zeros(0, np.float32), "g": np.zeros(0, np.float32)}
    columns |= {"row": np.arange(3, dtype=np.float32), "column": np.zeros(0, np.float32)}
    after = launch(compiled(program(factored)), [columns], HYPERS[:1], sizes=[(1, 3, 0)])[0]
    assert after["row"].tolist() == [0, 1, 2]
    tensors = {"p": torch.zeros(3, 0), "g": torch.zeros(3, 0), "row": torch.arange(3.0)[:, None]}
    after = evaluate(
        finish(trace(factored, ONE_NUMBER)), tensors | {"column": torch.zeros(1, 0)}, {"lr": 0.25}
    )
    assert after["row"].tolist() == [[0], [1], [2]]


# Programs.


def test_how_rules_are_cut() -> None:
    """Three walks over the elements, and no temporary of their number; functions of matrices have
    one, and a result."""
    one = program(factored)
    assert sum(p.domain == Rank.ELEMENT for p in one.passes) == 3
    assert Rank.ELEMENT not in {t.rank for t in one.temporaries}
    assert one.by_lines
    calls = program(only_a_call)
    assert [t.rank for t in calls.temporaries] == [Rank.ELEMENT] * 2
    assert not calls.by_lines


@over_rules
def test_nothing_is_stored_that_is_still_read(rule: Rule) -> None:
    """A column is read in walks of its own kind alone, none of which follows the one that writes
    it."""
    one = program(rule)
    ranks = {c.name: c.rank for c in one.columns}
    last = max((c.after for c in one.calls), default=-1)
    for k, each in enumerate(one.passes):
        for name in [name for name, _ in each.stores if name in ranks]:
            assert ranks[name] == each.domain
            assert k > last
            assert all(str(n.attr) != name for later in one.passes[k + 1 :] for n in later.loads)
        assert all(n.rank == each.domain for n in each.loads if n.attr in ranks)


def mean_of_rows(p, g, *, lr):
    return {"p": p - mean(row_mean(g))}


def rows_twice(p, g, *, lr):
    return {"p": p - row_mean(row_mean(g))}


def columns_twice(p, g, *, lr):
    return {"p": p - column_mean(column_mean(g))}


def norm_of_matrices(p, g, *, lr):
    return {"p": p - norm(row_mean(column_mean(g)))}


def mean_of_a_number(p, g, *, lr):
    return {"p": p - row_mean(lr)}


def elements_in_rows(p, g, row: PerRow, *, lr):
    return {"p": p, "row": g}


def rows_in_columns(p, g, column: PerColumn, *, lr):
    return {"p": p, "column": row_mean(g)}


def function_of_rows(p, g, *, lr):
    return {"p": p - call(backwards, row_mean(g))}


def elements_for_numbers(p, g, *, lr):
    return {"p": p - call(rolled, g, row_mean(g), 1.0)}


def function_of_conditions(p, g, *, lr):
    return {"p": p - call(backwards, g > 0)}


def no_function(p, g, *, lr):
    return {"p": p - call(3, g)}  # type: ignore[arg-type]


def power_of_rows(p, g, *, lr):
    return {"p": p - exp(row_mean(g))}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            mean_of_rows,
            (
                "sum runs over the elements of a tensor, and this value exists once a row; "
                "column_mean reduces"
            ),
        ),
        (
            rows_twice,
            (
                "sum runs over a matrix's rows, and this value exists once a row; column_mean "
                "reduces it"
            ),
        ),
        (
            columns_twice,
            (
                "sum runs over a matrix's columns, and this value exists once a column; row_mean "
                "reduces it"
            ),
        ),
        (
            norm_of_matrices,
            "sum runs over the elements of a tensor, and this value exists once a matrix",
        ),
        (
            mean_of_a_number,
            "sum runs over a matrix's rows, and this value is the same for all of them",
        ),
        (
            elements_in_rows,
            "returns for 'row' a value with rank ELEMENT, and 'row' is declared to have rank ROW",
        ),
        (
            rows_in_columns,
            (
                "returns for 'column' a value with rank ROW, and 'column' is declared to have rank "
                "COLUMN"
            ),
        ),
        (
            function_of_rows,
            "a function of whole matrices takes one value with elements, and numbers beside it",
        ),
        (
            elements_for_numbers,
            "a function of whole matrices takes one value with elements, and numbers beside it",
        ),
        (function_of_conditions, r"call takes floating-point numbers, got \(bool\)"),
        (no_function, "call takes a function of whole matrices first, got 3"),
        (power_of_rows, "exp of an element is not offered"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_rules_that_cannot_be_raise_a_sentence(rule: Rule, message: str) -> None:
    with pytest.raises(RuleError, match=message) as caught:
        trace(rule, ONE_NUMBER)
    assert "\n" not in str(caught.value)


def test_annotations_must_be_known_where_the_rule_is() -> None:
    """As text, which Python makes of them on request, they are names of the rule's module."""
    text = (
        "from __future__ import annotations\n{}\ndef rule(p, g, row: {}, *, lr):\n    return "
        "{{'p': p, 'row': 0.5}}"
    )
    for first, name in (
        ("import onepass", "onepass.PerRow"),
        ("from onepass import PerRow as R", "R"),
    ):
        space: dict[str, Any] = {}
        exec(text.format(first, name), space)
        assert signature(space["rule"]).ranks == {"row": Rank.ROW}
    for name in ("PerRow", "onepass.PerColumn"):
        space = {}
        exec(text.format("", name), space)
        with pytest.raises(
            RuleError,
            match=f"annotates a state with '{name}', which is no name of its module; import",
        ):
            signature(space["rule"])


# Functions of whole matrices.


class Recorded:
    """A function of matrices that notes what it is given, and fails for matrices of some widths."""

    def __init__(self) -> None:
        self.given: list[tuple[tuple[int, ...], tuple[float, ...]]] = []
        self.alive: list[weakref.ref[Any]] = []
        self.bad: set[int] = set()

    def __call__(self, matrices: Tensor, *numbers: float) -> Tensor:
        self.given.append((tuple(matrices.shape), numbers))
        if matrices.shape[-1] in self.bad:
            raise ArithmeticError("no such matrices")
        result = matrices * 2
        base = matrices if matrices._base is None else matrices._base
        self.alive += [weakref.ref(result), weakref.ref(base)]
        return result


recorded = Recorded()


@pytest.fixture
def record() -> Iterator[Recorded]:
    recorded.__init__()
    yield recorded
    recorded.__init__()


def halved(p, g, m, *, lr, third, step):
    m = 0.5 * m + g
    return {"p": p - lr * call(recorded, m, lr, third, 0.1) * step, "m": m}


def plainly(p, g, m, *, lr, third, step):
    m = 0.5 * m + g
    return {"p": p - lr * (m * 2.0) * step, "m": m}


class Halved(onepass.Optimizer):
    """Matrices by a function of them, all else without."""

    def __init__(self, params: Any, lr: float = 0.5, third: float = 1 / 3, **modes: Any) -> None:
        super().__init__(
            params, {"lr": lr, "third": third, "foreach": None, "fused": None, **modes}
        )

    rule = staticmethod(halved)

    def rule_of(self, p: Tensor, group: Any) -> Rule:
        return halved if p.dim() > 1 else plainly


EAGER = {"foreach": False, "fused": False}
SHAPES = ((3, 4), (6, 5), (3, 4), (7,), (2, 3, 4), (3, 4), (0, 4), (2, 0, 3))


def parameters(
    shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32
) -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=random, dtype=dtype)) for shape in shapes]


def set_gradients(params: Sequence[Tensor], step: int) -> None:
    for i, p in enumerate(params):
        random = torch.Generator().manual_seed(100 * step + i)
        p.grad = torch.randn(p.shape, generator=random).to(p.dtype)


def groups_of(params: Sequence[Tensor]) -> list[dict[str, Any]]:
    """The third, a matrix of the first one's shape, with an lr of its own."""
    return [{"params": [*params[:2], *params[3:]]}, {"params": [params[2]], "lr": 0.25}]


def test_a_function_takes_all_matrices_of_a_shape_at_once(record: Recorded) -> None:
    params = parameters()
    opt = Halved(groups_of(params))
    set_gradients(params, 1)
    opt.step()
    # Those of three dimensions come by themselves: a batch has one shape.
    shapes = ((2, (3, 4), 0.5), (1, (3, 4), 0.25), (1, (6, 5), 0.5), (2, (3, 4), 0.5))
    third, tenth = float(np.float32(1 / 3)), float(np.float32(0.1))
    given = [((k, *shape), (lr, third, tenth)) for k, shape, lr in shapes]
    assert sorted(record.given) == sorted(given)
    assert all(ref() is None for ref in record.alive)


@pytest.mark.parametrize("modes", [{}, EAGER], ids=["kernel", "eager"])
def test_functions_and_expressions_agree(modes: dict[str, Any], record: Recorded) -> None:
    """Doubling by a function is doubling, to the last bit."""
    ends = []
    for cls in (Halved, type("Plainly", (Halved,), {"rule_of": lambda *_: plainly})):
        params = parameters()
        opt = cls(groups_of(params), **modes)
        for step in range(3):
            set_gradients(params, step)
            opt.step()
        ends.append([flat(t) for p in params for t in (p, opt.state[p]["m"], opt.state[p]["step"])])
    for a, b in zip(*ends, strict=True):
        assert_same_bits(a, b, "by a function")


@pytest.mark.filterwarnings("ignore:Halved steps on the slower eager backend")
@pytest.mark.parametrize("started", [False, True], ids=["first step", "later"])
@pytest.mark.parametrize("bad", [4, 5])
def test_a_failing_function_changes_nothing(record: Recorded, bad: int, started: bool) -> None:
    """Whichever matrices it fails for, none has moved: nor those of other shapes and groups, nor
    what takes no function, on either backend; and the step can be taken again."""

    class Wrapped(Tensor):
        pass

    def make() -> tuple[list[Tensor], Halved]:
        params: list[Tensor] = [*parameters(), torch.ones(2).as_subclass(Wrapped).requires_grad_()]
        return params, Halved(groups_of(params))

    (params, opt), (others, undisturbed) = make(), make()
    for step in range(3):
        set_gradients(params, step)
        set_gradients(others, step)
        undisturbed.step()
        if step == 2 * started:
            record.bad.add(bad)
            refuses(opt, "no such matrices", ArithmeticError)
            record.bad.clear()
        opt.step()
    assert all(ref() is None for ref in record.alive)
    for p, q in zip(params, others, strict=True):
        assert_same_bits(flat(p.as_subclass(Tensor)), flat(q.as_subclass(Tensor)), "p")
        for name in opt.state[p]:
            assert_same_bits(flat(opt.state[p][name]), flat(undisturbed.state[q][name]), name)


def transposed(matrices: Tensor) -> Tensor:
    return matrices.mT


def too_few(matrices: Tensor) -> Tensor:
    return matrices[:1, :1]


def doubled_type(matrices: Tensor) -> Tensor:
    return matrices.double()


def elsewhere(matrices: Tensor) -> Tensor:
    return matrices.to("meta")


def sparse(matrices: Tensor) -> Tensor:
    return matrices.to_sparse()


def none(matrices: Tensor) -> None:
    return None


def by_name(p, g, *, lr, function):
    return {"p": p - lr * call(globals()[function], g)}


class ByName(onepass.Optimizer):
    """A function of this module, by its name."""

    def __init__(self, params: Any, function: str, lr: float = 0.5, **modes: Any) -> None:
        super().__init__(
            params, {"lr": lr, "function": function, "foreach": None, "fused": None, **modes}
        )

    rule = staticmethod(by_name)


@pytest.mark.parametrize("modes", [{}, EAGER], ids=["kernel", "eager"])
@pytest.mark.parametrize(
    ("function", "got"),
    [
        ("transposed", r"a tensor \(1, 4, 3\) of torch.float32"),
        ("too_few", r"a tensor \(1, 1, 4\)"),
        ("doubled_type", "of torch.float64"),
        ("elsewhere", "on cpu, as the matrices that it was given"),
        ("sparse", "a tensor"),
        ("none", "got None"),
    ],
)
def test_what_functions_must_return(function: str, got: str, modes: dict[str, Any]) -> None:
    params = parameters([(3, 4)])
    set_gradients(params, 1)
    refuses(ByName(params, function, **modes), f"{function} must return.*{got}", RuleError)


def itself(matrices: Tensor) -> Tensor:
    return matrices


def one_for_all(matrices: Tensor) -> Tensor:
    return torch.ones(1, 1, 1).expand(matrices.shape)


def two_sides(matrices: Tensor) -> Tensor:
    return matrices @ matrices.mT @ matrices


@pytest.mark.parametrize("function", ["itself", "one_for_all", "backwards", "two_sides"])
def test_results_may_lie_anyhow(function: str) -> None:
    """The function's own argument, an expanded tensor, a view; also under autocast, and with
    another default device."""
    ends = []
    for place in ("plain", "autocast", "meta", "inference", "eager"):
        params = parameters([(3, 4), (2, 4, 3), (3, 4)])
        set_gradients(params, 1)
        opt = ByName(params, function, **(EAGER if place == "eager" else {}))
        if place == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                opt.step()
        elif place == "meta" and function != "one_for_all":
            with torch.device("meta"):
                opt.step()
        else:
            opt.step()
        ends.append(torch.cat([p.detach().view(-1) for p in params]))
        for p, before in zip(params, parameters([(3, 4), (2, 4, 3), (3, 4)]), strict=True):
            result = globals()[function](p.grad.view(-1, *p.shape[-2:])).reshape(p.shape)
            assert torch.allclose(p, before - 0.5 * result, rtol=0, atol=1e-6)
    assert all(torch.equal(end, ends[0]) for end in ends[1:-1])


def test_differentiable_through_rows_and_functions() -> None:
    """Autograd follows means of rows and functions of matrices."""

    class Followed(onepass.Optimizer):
        def __init__(self, params: Any, lr: Any) -> None:
            super().__init__(params, {"lr": lr, "differentiable": True})

        @staticmethod
        def rule(p, g, *, lr):
            return {"p": p - lr * call(two_sides, g) * row_mean(g)}

    lr = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    p = torch.ones(3, 4, dtype=torch.float64, requires_grad=True).clone()
    g = torch.randn(3, 4, dtype=torch.float64)
    p.retain_grad()
    p.grad = g
    Followed([p], lr).step()
    p.sum().backward()
    assert torch.allclose(lr.grad, -(g @ g.mT @ g * g.mean(1, keepdim=True)).sum())


# Rules of one's own, through the optimizer.


class Factored(onepass.Optimizer):
    """Row and column states, outside the package."""

    def __init__(self, params: Any, lr: float = 0.25, **modes: Any) -> None:
        super().__init__(params, {"lr": lr, "foreach": None, "fused": None, **modes})

    rule = staticmethod(factored)


class Turned(Factored):
    """A row state and a function of matrices, too."""

    rule = staticmethod(turned)


LAYOUTS = ((5, 4), (2, 3, 4, 5), (1, 7), (7, 1), (1, 1), (40, 33))


@pytest.mark.parametrize("cls", [Factored, Turned])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_steps_are_the_oracle(cls: type, dtype: torch.dtype) -> None:
    """Parameters of all layouts, among them transposed ones, slices and channels last: each step
    has the oracle's bits, whatever the gradient's layout."""
    params = [p.data for p in parameters(LAYOUTS, dtype)]
    params += [params[0].clone().t(), torch.randn(6, 9).to(dtype)[1:5, ::2]]
    params += [
        params[1].clone().to(memory_format=torch.channels_last),
        torch.randn(8, 4, dtype=dtype)[2:],
    ]
    opt = cls(params)
    one = program(cls.rule, str(dtype).removeprefix("torch."))
    states: list[dict[str, np.ndarray]] = [
        {
            c.name: random_columns(np.random.default_rng(0), one, (1, 1, 1))[c.name]
            for c in one.columns
        }
        for _ in params
    ]
    for p, state in zip(params, states, strict=True):
        for c in one.columns:
            n = int(np.prod(shape_at(c.rank, p.shape)))
            state[c.name] = np.zeros(n, state[c.name].dtype)
    for step, lr in ((1, 0.25), (2, 0.25), (3, 0.001)):
        opt.param_groups[0]["lr"] = lr
        set_gradients(params, step)
        params[0].grad = params[0].grad.t().contiguous().t()
        params[4].grad = params[4].grad.expand(1, 1)
        for p, state in zip(params, states, strict=True):
            sizes = (p[..., 0, 0].numel(), *p.shape[-2:])
            columns = state | {"p": flat(p.contiguous()), "g": flat(p.grad.contiguous())}
            state |= interpret(one, columns, {"lr": lr}, sizes)
        opt.step()
        for p, state in zip(params, states, strict=True):
            for name in ("p", *opt.state[p]):
                now = p if name == "p" else opt.state[p][name]
                assert_same_bits(
                    flat(now.contiguous()),
                    state[name],
                    f"{name} of {tuple(p.shape)} in step {step}",
                )


def test_states_have_their_own_shapes() -> None:
    params = parameters(LAYOUTS)
    opt = Turned(params)
    set_gradients(params, 1)
    opt.step()
    for p in params:
        assert opt.state[p]["row"].shape == (*p.shape[:-1], 1)
        assert opt.state[p]["momentum"].shape == p.shape
        assert set(opt.state[p]) == {"row", "momentum"}


@pytest.mark.parametrize("cls", [Factored, Turned])
@pytest.mark.parametrize("way", ["state dict", "file", "deepcopy"])
def test_runs_continue_from_checkpoints(cls: type, way: str) -> None:
    """Saved after three steps and continued elsewhere: the bits of a run that was not
    interrupted."""
    params = parameters(LAYOUTS)
    opt = cls(params)
    for step in range(3):
        set_gradients(params, step)
        opt.step()
    if way == "deepcopy":
        others, other = copy.deepcopy((params, opt))
    else:
        others = [nn.Parameter(p.detach().clone()) for p in params]
        other = cls(others)
        saved = opt.state_dict()
        if way == "file":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        other.load_state_dict(saved)
    for step in range(3, 6):
        for each, of in ((opt, params), (other, others)):
            set_gradients(of, step)
            each.step()
    assert [t.tolist() for t in others] == [t.tolist() for t in params]
    assert [[t.tolist() for t in other.state[p].values()] for p in others] == [
        [t.tolist() for t in opt.state[p].values()] for p in params
    ]


def test_checkpoints_of_wrong_shapes_are_refused() -> None:
    params = parameters([(5, 4)])
    opt = Factored(params)
    set_gradients(params, 1)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["row"] = torch.zeros(4, 1)
    before = snapshot(opt)
    with pytest.raises(
        ValueError, match=r"saved state 'row' of parameter 0 has shape \(4, 1\), for a parameter of"
    ):
        opt.load_state_dict(saved)
    assert snapshot(opt) == before
    opt.state[params[0]]["row"] = torch.zeros(5)
    refuses(
        opt,
        r"state 'row' of parameter 0 has shape \(5,\), for a parameter of "
        r"\(5, 4\) it must have \(5, 1\)",
    )


@pytest.mark.parametrize("modes", [{}, EAGER], ids=["kernel", "eager"])
@pytest.mark.parametrize("cls", [Factored, Turned])
def test_rules_with_matrices_refuse_vectors(cls: type, modes: dict[str, Any]) -> None:
    for shape, dtype, message in (
        (
            (3,),
            torch.float32,
            r"needs matrices, and parameter 1 has shape \(3,\); give it to another optimizer",
        ),
        ((), torch.float32, r"needs matrices, and parameter 1 has shape \(\)"),
        (
            (2, 2),
            torch.complex64,
            "does not support complex parameters, and parameter 1 is torch.complex64",
        ),
    ):
        params = [*parameters([(2, 3)]), nn.Parameter(torch.ones(shape, dtype=dtype))]
        for p in params:
            p.grad = torch.ones_like(p)
        refuses(cls(params, **modes), message, StepError)
        params[1].grad = None
        cls(params, **modes).step()


def test_sums_of_rows_are_in_float64() -> None:
    """2^24 + 1 has no float32; a thousand small numbers beside a large one do not vanish, along
    rows or columns."""

    def both_ways(p, g, *, lr):
        return {"p": p + (row_mean(g) - 2.0**24 / 1024) + (column_mean(g) - 2.0**24 / 1024)}

    g = np.ones((1024, 1024), np.float32)
    g[3, 5], g[3, 6], g[4, 5] = 2.0**24, 0.0, 0.0
    columns = {"p": np.zeros(1 << 20, np.float32), "g": g.reshape(-1)}
    after = launch(compiled(program(both_ways)), [columns], HYPERS[:1], sizes=[(1, 1024, 1024)])[0][
        "p"
    ]
    assert after.reshape(1024, 1024)[3, 5] == 2 * 1022 / 1024


@pytest.mark.parametrize(
    "place", [0, 15, 16, 17, 999, 1000 * 32 - 1, 1000 * 32, 1000 * 33 + 5, 1000 * 65 - 1]
)
def test_nothing_hides_from_a_reduction(place: int) -> None:
    """NaN, infinities and the largest number are found at any place of a row, a column, or a later
    chunk."""
    kernel = compiled(program(extremes, "float64"))
    for value in (np.nan, -np.inf, -7.0):
        g = np.ones(65000)
        g[place] = value
        columns = {"p": np.zeros(65000), "g": g, "row": np.zeros(65), "column": np.zeros(1000)}
        after = launch(kernel, [columns], HYPERS[:1], sizes=[(1, 65, 1000)])[0]
        row, column = np.ones(65), np.ones(1000)
        row[place // 1000] = column[place % 1000] = abs(value)
        np.testing.assert_equal(after["row"], row)
        np.testing.assert_equal(after["column"], column)
        np.testing.assert_equal(after["p"], np.full(65000, abs(value)))


def extremes(p, g, row: PerRow, column: PerColumn, *, lr):
    from onepass.kernel.graph.ir import make

    tall, low = (make("amax", abs(g), attr=over) for over in ("rows", "columns"))
    return {"p": p + amax(g), "row": tall, "column": low}
