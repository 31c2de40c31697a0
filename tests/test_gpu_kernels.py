"""Kernels for GPUs, run by Triton's interpreter: every bit as the oracle has it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from support.bare_kernels import (
    NAN,
    Size,
    assert_same_bits,
    check_oracle,
    graph_of,
    hypers_of,
    launch,
    program_of,
    random_columns,
)
from support.extra_rules import (
    MATRIX_RULES,
    RULES,
    Rule,
    edges,
    everything,
    factored,
    lamb,
    program,
    turned,
)
from support.interpreted_gpu import (
    CPU,
    Resident,
    bounded,
    check_resident,
    compiled,
    device_oracle,
    interpreted,
    sensible,
)
from support.interpreter import interpret
from support.slow_marks import slow_but
from table import TABLE, UNIT, Row

import onepass
from onepass import PerColumn, PerRow
from onepass.app.explain import explanation as explain
from onepass.kernel import Graph, bind, finish, trace
from onepass.kernel.functions import amax, column_mean, row_mean
from onepass.kernel.functions import sum as total
from onepass.kernel.gpu.launch import Kernel
from onepass.kernel.gpu.tiles import BAND, BLOCK, SPAN, WIDTHS
from onepass.kernel.graph.trace import Program

FORMATS = ("float32", "float64", "bfloat16", "float16")
SIZES = (0, 1, 15, 16, 17, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 3)
LONG = (0, 1, 17, BLOCK + 1, BLOCK * SPAN - 1, BLOCK * SPAN, 2 * BLOCK * SPAN + 5)
HYPERS = [{"lr": 0.25}, {"lr": 1e-3}]
# Matrices, rows, columns: about tiles' lines and widths, bands of lines, and none at all.
NARROW, *_, MIDDLE, WIDE = (WIDTHS[0], *WIDTHS)
MATRICES: tuple[tuple[int, int, int], ...] = (
    *(
        (1, 1, 1),
        (1, 1, 5),
        (1, 7, 1),
        (0, 3, 3),
        (1, 0, 4),
        (2, 3, 0),
        (2, 3, 4),
        (5, BLOCK // NARROW, NARROW),
    ),
    *(
        (3, NARROW + 1, NARROW - 1),
        (1, BAND, MIDDLE),
        (2, BAND + 1, MIDDLE + 1),
        (1, 2 * BAND + 5, 3),
    ),
    *((1, BLOCK // WIDE + 1, WIDE), (2, 3, WIDE + 1), (1, 4, 2 * WIDE), (1, 1, 1500), (40, 2, 2)),
)
FEW = (*MATRICES[1:8], *MATRICES[9:11], MATRICES[13])


@pytest.fixture(autouse=True, scope="module")
def _on_the_device() -> Iterator[None]:
    with interpreted():
        yield


def on_device(kernel: Kernel) -> Any:
    """What the oracle knows of a kernel's numbers: those of programs with stages are the
    device's."""
    return (
        device_oracle() if kernel.stages or kernel.program.passes[0].reductions else nullcontext()
    )


def check(
    one: Program,
    sizes: Sequence[Size],
    rng: np.random.Generator,
    shares: Sequence[float] = (0.0, 0.05),
    **how: Any,
) -> None:
    """The kernel has the oracle's bits, of ordinary numbers and of special ones."""
    kernel = compiled(one)
    rows = [i % 2 for i in range(len(sizes))]
    given: Any = sizes if isinstance(sizes[0], tuple) else None
    for special in shares:
        tensors = [sensible(random_columns(rng, one, size, special)) for size in sizes]
        with on_device(kernel):
            check_oracle(kernel, tensors, HYPERS, rows, sizes=given, **how)


# Every bit, of every algorithm.


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_algorithms_are_the_oracle(row: Row, rng: np.random.Generator) -> None:
    """At sizes about a block, aligned and not; in a first step and in a later one; nothing beside
    is touched."""
    graph = graph_of(row)
    kernel = compiled(program_of(graph, *["float32"] * 3))
    hypers = [hypers_of(row, graph, step=1, first=True), hypers_of(row, graph, step=7, lr=0.0)]
    hypers.append(hypers_of(row, graph, step=3))
    tensors = [random_columns(rng, kernel.program, size) for size in SIZES]
    rows = [(0, 2, 2, 1)[i % 4] for i in range(len(SIZES))]
    check_oracle(kernel, tensors, hypers, rows)
    check_oracle(kernel, tensors[1:-1], hypers, rows[::-1][1:-1], misaligned=4)


MIXES = (
    *(("float64",) * 3, ("bfloat16",) * 3, ("float16",) * 3, ("bfloat16", "bfloat16", "float32")),
    *(
        ("bfloat16", "float32", "float32"),
        ("float32", "bfloat16", "float32"),
        ("float16", "float16", "float32"),
    ),
    *(
        ("float32", "float32", "float64"),
        ("float32", "float32", "bfloat16"),
        ("float32", "float16", "float16"),
    ),
)
SOME = {"SGD-momentum=0.9": 1, "Adam-amsgrad=True-betas=(0.9, 0.7)": 12, "ASGD": 43, "Rprop": 46}


@pytest.mark.parametrize("formats", MIXES, ids="-".join)
@pytest.mark.parametrize("row", [row for row in TABLE if str(row) in SOME], ids=str)
def test_formats_may_be_mixed(
    row: Row, formats: tuple[str, str, str], rng: np.random.Generator
) -> None:
    graph = graph_of(row)
    kernel = compiled(program_of(graph, *formats))
    hypers = [hypers_of(row, graph, step=3)]
    tensors = [random_columns(rng, kernel.program, size) for size in (0, 1, 17, BLOCK, BLOCK + 1)]
    check_oracle(kernel, tensors, hypers)
    # As far as torch's memory may be off: by elements.
    check_oracle(kernel, tensors[-2:], hypers, misaligned=8)


@pytest.mark.slow
@pytest.mark.parametrize("formats", MIXES, ids="-".join)
@pytest.mark.parametrize("row", TABLE, ids=str)
def test_formats_may_be_mixed_everywhere(
    row: Row, formats: tuple[str, str, str], rng: np.random.Generator
) -> None:
    test_formats_may_be_mixed(row, formats, rng)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rules_are_the_oracle(rule: Rule, format: str, rng: np.random.Generator) -> None:
    """Norms and means too: in float64 the order of a sum shows, which is that of the tensor's own
    blocks."""
    check(
        program(rule, format),
        LONG if rule in RULES[3:] and format in FORMATS[:2] else SIZES[1:7],
        rng,
    )


@pytest.mark.parametrize("rule", MATRIX_RULES, ids=lambda rule: rule.__name__)
def test_rules_of_matrices_are_the_oracle(rule: Rule, rng: np.random.Generator) -> None:
    """Sums are in float64, so that their order has no part in what is rounded to float32."""
    check(program(rule), FEW, rng, (0.05,))


@pytest.mark.slow
@pytest.mark.parametrize("format", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("rule", MATRIX_RULES, ids=lambda rule: rule.__name__)
def test_rules_of_matrices_are_the_oracle_everywhere(
    rule: Rule, format: str, rng: np.random.Generator
) -> None:
    check(program(rule, format), (*MATRICES, (300, 2, 2)), rng)


@pytest.mark.parametrize(
    "rule", slow_but(MATRIX_RULES[:2], MATRIX_RULES), ids=lambda rule: rule.__name__
)
def test_rules_of_matrices_in_float64(rule: Rule, rng: np.random.Generator) -> None:
    """Only sums are taken in another order: of n numbers either errs by n units of the sum of their
    sizes."""
    kernel = compiled(program(rule, "float64"))
    sizes = [size for size in FEW[4:] if math.prod(size)]
    tensors = [sensible(random_columns(rng, kernel.program, size, 0.0)) for size in sizes]
    after = launch(kernel, tensors, HYPERS[:1], sizes=sizes)
    for size, before, now in zip(sizes, tensors, after, strict=True):
        for name, want in interpret(kernel.program, before, HYPERS[0], size).items():
            scale = np.abs(want).max() + np.abs(before[name]).max()
            assert (
                np.abs(now[name] - want).max() <= 2 * math.prod(size) * UNIT[torch.float64] * scale
            ), (size, name)


def of_optimizer(graph: Graph, *formats: str) -> Program:
    """A graph with its own formats, of p, g and the states."""
    p, g, state = formats
    return bind(graph, tuple(({"p": p, "g": g} | dict.fromkeys(graph.state, state)).items()))


ROUTES: dict[str, Callable[[], onepass.Optimizer]] = {
    "adafactor": lambda: onepass.Adafactor([torch.zeros(2, 2)], weight_decay=0.1),
    "adafactor-vectors": lambda: onepass.Adafactor([torch.zeros(2)], eps=(1e-3, 1e-3)),
    "muon": lambda: onepass.Muon([torch.zeros(2, 2)], ns_steps=2),
    "muon-nesterov-off": lambda: onepass.Muon(
        [torch.zeros(2, 2)], nesterov=False, adjust_lr_fn="match_rms_adamw"
    ),
}


def options_of(optimizer: onepass.Optimizer, graph: Graph, **further: float) -> dict[str, float]:
    group = optimizer.param_groups[0] | further
    values = {}
    for name in graph.hypers:
        key, _, index = name.partition(".")
        values[name] = float(group[key][int(index)] if index else group[key])
    return values


@pytest.mark.parametrize(
    "formats", [("float32",) * 3, ("bfloat16", "bfloat16", "float32")], ids="-".join
)
@pytest.mark.parametrize("name", ROUTES)
def test_factored_and_orthogonal_are_the_oracle(
    name: str, formats: Sequence[str], rng: np.random.Generator
) -> None:
    torch.set_num_threads(1)
    optimizer = ROUTES[name]()
    graph = explain.graph_of(optimizer)
    kernel = compiled(of_optimizer(graph, *formats))
    hypers = [options_of(optimizer, graph, step=step) for step in (1, 5)]
    sizes: list[Any] = list(LONG[:-2] if name.endswith("vectors") else FEW)
    if name.startswith("muon"):
        sizes = [(1, m, n) for _, m, n in FEW]
    tensors = [sensible(random_columns(rng, kernel.program, size, 0.0)) for size in sizes]
    given = None if name.endswith("vectors") else sizes
    with device_oracle():
        check_oracle(kernel, tensors, hypers, [i % 2 for i in range(len(sizes))], sizes=given)


# Sums.


def sums(p, g, row: PerRow, column: PerColumn, *, lr):
    return {"p": p * 0 + total(g) + amax(p), "row": row_mean(g) * lr, "column": column_mean(g) * lr}


def test_every_element_is_counted_once(rng: np.random.Generator) -> None:
    """Whole numbers have the same sum in any order: in float64 too every bit is right, whatever the
    shape."""
    kernel = compiled(program(sums, "float64"))
    random = [tuple(int(n) for n in rng.integers(1, [4, 200, 300])) for _ in range(3)]
    sizes: list[Any] = [*MATRICES, *random]
    tensors = [random_columns(rng, kernel.program, size, 0.0) for size in sizes]
    tensors = [{n: np.rint(a * 100) for n, a in t.items()} for t in tensors]
    check_oracle(kernel, tensors, [{"lr": 1.0}], sizes=sizes)


def test_a_sum_errs_as_one_of_its_depth_does(rng: np.random.Generator) -> None:
    """Each number goes through SPAN additions in its program, then those of 1024 and 256 running
    values."""

    def added(p, g, *, lr):
        return {"p": p * 0 + total(g)}

    kernel = compiled(program(added, "float64"))
    for n in (1000, BLOCK * SPAN, 3 * BLOCK * SPAN + 7):
        g = rng.standard_normal(n)
        after = launch(kernel, [{"p": np.zeros(n), "g": g}], [{"lr": 0.0}])[0]["p"]
        depth = SPAN + BLOCK + 256 + n // (BLOCK * SPAN * 256)
        assert abs(after[0] - math.fsum(g)) <= depth * UNIT[torch.float64] * math.fsum(abs(g))


@pytest.mark.parametrize(
    "place", [0, 5, 255, BLOCK - 1, BLOCK, BLOCK * SPAN - 1, BLOCK * SPAN, BLOCK * SPAN + 2]
)
def test_nothing_hides_from_a_reduction(place: int) -> None:
    def both(p, g, s, *, lr):
        return {"p": p * 0 + amax(g), "s": total(g)}

    kernel = compiled(program(both, "float64"))
    n = BLOCK * SPAN + 3
    for value, biggest, whole in (
        (NAN, NAN, NAN),
        (-math.inf, math.inf, -math.inf),
        (-7.0, 7.0, n - 8.0),
    ):
        g = np.ones(n)
        g[place] = value
        after = launch(kernel, [{"p": np.zeros(n), "g": g, "s": g}], [{"lr": 0.0}])[0]
        np.testing.assert_equal((after["p"][0], after["s"][0]), (biggest, whole))


@pytest.mark.parametrize("rule", [lamb, factored, turned], ids=lambda rule: rule.__name__)
def test_places_and_company_do_not_matter(rule: Rule, rng: np.random.Generator) -> None:
    """Alone, one after the other, in another order, at other places: the same bits, in float64."""
    kernel = compiled(program(rule, "float64"))
    sizes: list[Any] = list(FEW[4:] if rule in MATRIX_RULES else LONG[:-2])
    tensors = [sensible(random_columns(rng, kernel.program, size, 0.0)) for size in sizes]
    given = sizes if rule in MATRIX_RULES else None
    together = launch(kernel, tensors, HYPERS[:1], sizes=given)
    backwards = launch(
        kernel, tensors[::-1], HYPERS, [0] * len(sizes), sizes=given and given[::-1]
    )[::-1]
    in_turn = launch(kernel, tensors, HYPERS[:1], threads=1, sizes=given, misaligned=8)
    for i, (one, size) in enumerate(zip(tensors, sizes, strict=True)):
        alone = launch(kernel, [one], HYPERS[:1], sizes=[size] if given else None)[0]
        for name, want in alone.items():
            for other in (together, backwards, in_turn):
                assert_same_bits(other[i][name], want, f"{name} of {size}")


@pytest.mark.parametrize(
    "rule", [everything, lamb, factored, edges], ids=lambda rule: rule.__name__
)
def test_nothing_is_read_beyond(rule: Rule, rng: np.random.Generator) -> None:
    """Neither of tensors nor of tables and temporaries; and what a mask leaves out does not
    count."""
    sizes: list[Any] = list(FEW if rule in MATRIX_RULES else (0, 1, BLOCK + 1, BLOCK * SPAN + 5))
    one = program(rule)
    tensors = [sensible(random_columns(rng, one, size, 0.0)) for size in sizes]
    given = sizes if rule in MATRIX_RULES else None
    want = launch(compiled(one), tensors, HYPERS[:1], sizes=given)
    with bounded():
        after = launch(compiled(one), tensors, HYPERS[:1], sizes=given)
    for got, columns in zip(after, want, strict=True):
        for name in columns:
            assert_same_bits(got[name], columns[name], name)


# The guard, and numbers on the device.


def nadam() -> tuple[Row, Graph, tuple[str, ...]]:
    row = next(row for row in TABLE if row.name == "NAdam" and row.options.get("weight_decay"))
    return row, graph_of(row), ("mu_product", "step")


def begin(
    row: Row,
    formats: Sequence[str],
    names: Sequence[str],
    rng: np.random.Generator,
    number_type: str = "f32",
) -> tuple[Kernel, list[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """A kernel whose tensors' numbers lie on the device, five tensors, and their numbers."""
    p, g, state = formats
    kernel = compiled(program_of(graph_of(row), p, g, state), tuple(names), number_type)
    tensors = [
        random_columns(rng, kernel.program, size, 0.1) for size in (5, 0, BLOCK + 1, 17, BLOCK)
    ]
    dtype = np.float64 if number_type == "f64" else np.float32
    numbers = {name: np.array([0.9, 0.5, 0.7, 0.99, 0.3], dtype) for name in names}
    numbers["step"] = np.array([0, 3, 999, 5, 16777216], dtype)
    return kernel, tensors, numbers


@pytest.mark.parametrize(
    "formats",
    [("float32",) * 3, ("bfloat16", "bfloat16", "float32"), ("float64",) * 3],
    ids="-".join,
)
@pytest.mark.parametrize("number_type", ["f32", "f64"])
def test_numbers_lie_on_the_device(
    formats: Sequence[str], number_type: str, rng: np.random.Generator
) -> None:
    """Steps are counted there, scalars computed there; a float32 count stops at 2^24, as
    torch's."""
    row, graph, names = nadam()
    kernel, tensors, numbers = begin(row, formats, names, rng, number_type)
    settings = [hypers_of(row, graph), hypers_of(row, graph, lr=0.5)]
    rows = [0, 1, 1, 0, 1]
    launched = Resident(kernel, tensors, numbers, settings, rows)
    launched.launch.run(2)
    check_resident(launched, tensors, numbers, [settings[i] for i in rows], [False] * 5)


@pytest.mark.parametrize("rule", ["SGD-momentum=0.9-dampening=0.3", "RAdam", "ASGD", "Adagrad"])
def test_the_device_knows_whose_step_is_the_first(rule: str, rng: np.random.Generator) -> None:
    row = next(row for row in TABLE if str(row).startswith(rule))
    graph = graph_of(row)
    names = (*(name for name, _ in graph.scalars), *(("step",) if "step" in graph.hypers else ()))
    kernel, tensors, numbers = begin(row, ("float32",) * 3, names, rng)
    numbers = {name: numbers[name] for name in names}
    first = [True, False, False, True, True]
    launched = Resident(kernel, tensors, numbers, [hypers_of(row, graph)], first=first)
    launched.launch.run(2)
    check_resident(launched, tensors, numbers, [hypers_of(row, graph)] * 5, first)


def test_tensors_that_do_not_step_keep_their_numbers(rng: np.random.Generator) -> None:
    row, graph, names = nadam()
    kernel, tensors, numbers = begin(row, ("float32",) * 3, names, rng)
    sizes = [5, 0, 0, 17, BLOCK]
    launched = Resident(
        kernel, tensors, numbers, [hypers_of(row, graph)], sizes=sizes, first=[True] * 5
    )
    launched.launch.active[:] = [1, 1, 0, 0, 1]
    launched.launch.run(2)
    after, new = launched.read()
    assert new["step"].tolist() == [1, 4, 999, 5, 16777216]
    assert new["mu_product"][[2, 3]].tolist() == numbers["mu_product"][[2, 3]].tolist()
    assert (new["mu_product"][[0, 1, 4]] != numbers["mu_product"][[0, 1, 4]]).all()
    assert launched.launch.fresh.tolist() == [0, 0, 1, 1, 0]
    assert all(after[2][name].tobytes() == tensors[2][name].tobytes() for name in after[2])


def test_options_may_lie_on_the_device(rng: np.random.Generator) -> None:
    """As tensors of any dtype, for one setting or for all; the host's numbers beside them are not
    touched."""
    row, graph, names = nadam()
    kernel, tensors, numbers = begin(row, ("float32",) * 3, names, rng)
    plain = [hypers_of(row, graph, lr=0.125), hypers_of(row, graph, lr=0.5, weight_decay=0.25)]
    away = [
        plain[0] | {"lr": torch.tensor(0.125)},
        plain[1] | {"weight_decay": torch.tensor([0.25]).double()},
    ]
    rows = [0, 1, 0, 0, 1]
    launched = Resident(kernel, tensors, numbers, away, rows)
    launched.launch.run(2)
    check_resident(launched, tensors, numbers, [plain[i] for i in rows], [False] * 5)


GUARDED: dict[str, tuple[Callable[[], Program], Sequence[Any], tuple[str, ...] | None]] = {
    "nadam": (
        lambda: program_of(nadam()[1], *["float32"] * 3),
        (5, 0, BLOCK + 1),
        ("mu_product", "step"),
    ),
    "lamb": (lambda: program(lamb), (5, 0, BLOCK * SPAN + 1), None),
    "factored": (lambda: program(factored), [(1, 2, 3), (2, BAND + 1, WIDE + 1)], None),
    "turned": (lambda: program(turned), [(1, 2, 3), (2, BAND + 1, 20)], None),
}


@pytest.mark.parametrize(
    ("name", "guard"),
    [
        *((name, guard) for name in GUARDED for guard in (0.0, 1.0)),
        ("nadam", math.inf),
        ("nadam", NAN),
    ],
)
def test_a_guard_keeps_everything(name: str, guard: float, rng: np.random.Generator) -> None:
    """Where it is not 0, as a NaN is not, no byte changes; where it is 0, all is as without it."""
    make, sizes, names = GUARDED[name]
    kernel = compiled(make(), names)
    tensors = [random_columns(rng, kernel.program, size, 0.0) for size in sizes]
    numbers = {n: np.full(len(sizes), 0.5, np.float32) for n in names or ()}
    setting: dict[str, Any] = hypers_of(nadam()[0], nadam()[1]) if name == "nadam" else {"lr": 0.25}
    first = [True] * len(sizes)
    ends = []
    for of in (None, torch.tensor([guard])):
        launched = Resident(kernel, tensors, numbers, [setting], sizes=sizes, first=first)
        before = launched.bytes()
        launched.launch.guard = of
        launched.launch.run(2)
        ends.append(launched.bytes())
        assert (ends[-1] == before) == (of is not None and guard != 0)
    assert guard != 0 or ends[0] == ends[1]


def test_launches_may_be_repeated(rng: np.random.Generator) -> None:
    """Each on what the last one left, with the same tables."""
    row, graph, names = nadam()
    kernel, tensors, numbers = begin(row, ("float32",) * 3, names, rng)
    setting = hypers_of(row, graph)
    launched = Resident(kernel, tensors, numbers, [setting])
    for _ in range(3):
        before, counted = launched.read()
        launched.launch.run(2)
        check_resident(launched, before, counted, [setting] * 5, [False] * 5)
    # Addresses, leaves, facts and the work list.
    assert launched.launch.uploads == 4


# Names, and nothing at all.


def test_without_hyper_parameters_and_with_any_names(rng: np.random.Generator) -> None:
    """Names of columns and options that the generated code uses itself."""
    names = (
        "tensor",
        "at",
        "mask",
        "start",
        "left",
        "row",
        "unit",
        "c0",
        "u0",
        "x0",
        "tl",
        "partials",
        "μ",
        "count",
    )
    source = f"def rule(p, g, {', '.join(names)}, *, lr):\n"
    source += f"    return {{'p': p - 0.5 * g, {', '.join(f'{n!r}: {n} + g * lr' for n in names)}}}"
    space: dict[str, Any] = {}
    exec(source, space)
    check(program(space["rule"]), (0, 3, BLOCK + 1), rng)

    def keywords(p, g, *, numel, settings, guard):
        return {"p": p - numel * g - settings * guard}

    given = tuple((name, ("float",)) for name in ("numel", "settings", "guard"))
    one = bind(finish(trace(keywords, given)), (("p", "float32"), ("g", "float32")))
    hypers = {"numel": 0.25, "settings": 3.0, "guard": 5.0}
    check_oracle(compiled(one), [random_columns(rng, one, 77)], [hypers])


def test_nothing_and_empty_tensors_launch_nothing() -> None:
    empty = {name: np.zeros(0, np.float32) for name in ("p", "g", "m", "v")}
    kernel = compiled(program(lamb))
    assert launch(kernel, [], HYPERS[:1]) == []
    assert launch(kernel, [empty, empty], HYPERS[:1])[1]["p"].shape == (0,)
    assert kernel.device.device == CPU
