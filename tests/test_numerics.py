"""What the optimizers compute: properties over the whole table."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from support.bare_kernels import (
    INF,
    NAN,
    SIZES,
    SPECIAL,
    assert_same_bits,
    bits,
    check_oracle,
    compiled,
    flat,
    graph_of,
    hypers_of,
    launch,
    program_of,
    random_columns,
)
from support.interpreter import interpret
from table import (
    AMSGRAD,
    DECOUPLED,
    NESTEROV,
    TABLE,
    WITH_TWIN,
    Row,
    results,
    tolerance,
    walk,
)
from torch import Tensor

from onepass import ASGD, SGD, Adadelta, Adam, AdamW, NAdam, RAdam, RMSprop
from onepass.kernel.cpu import launch as cpu
from onepass.kernel.llvm.native import Library

over_table = pytest.mark.parametrize("row", TABLE, ids=str)
over_twins = pytest.mark.parametrize("row", WITH_TWIN, ids=str)
STEPS = 20
ONE_FORMAT = ("float32", "float64", "bfloat16", "float16")
# p, g, states: what mixed precision training, frozen dtypes and loaded checkpoints lead to.
MIXED = (
    ("bfloat16", "bfloat16", "float32"),
    ("float32", "bfloat16", "float32"),
    ("float32", "float32", "bfloat16"),
    ("float16", "float32", "float16"),
    ("bfloat16", "float16", "float64"),
    ("float64", "float32", "float32"),
)


# The oracle, bit for bit.


def check_formats(
    row: Row, rng: np.random.Generator, p: str, g: str, state: str, sizes: Sequence[int]
) -> None:
    graph = graph_of(row)
    kernel = compiled(program_of(graph, p, g, state))
    tensors = [random_columns(rng, kernel.program, size) for size in sizes]
    hypers = [
        hypers_of(row, graph, 1, True),
        hypers_of(row, graph, 7),
        hypers_of(row, graph, 400, lr=3.0),
    ]
    rows = [i % 3 for i in range(len(sizes))]
    aligned = check_oracle(kernel, tensors, hypers, rows)
    for misaligned in (1, 2, 4):
        again = launch(kernel, tensors, hypers, rows, misaligned=misaligned)
        for i in range(len(sizes)):
            for name in again[i]:
                assert_same_bits(
                    again[i][name], aligned[i][name], f"{name}, {misaligned} bytes off"
                )


@over_table
@pytest.mark.parametrize("format", ONE_FORMAT)
def test_kernel_is_the_oracle(row: Row, format: str, rng: np.random.Generator) -> None:
    """Every element has the interpreter's bits, at awkward sizes and places, whatever the numbers;
    guards are whole."""
    check_formats(row, rng, format, format, format, SIZES[:8])


@pytest.mark.parametrize("row", [NESTEROV, AMSGRAD, DECOUPLED], ids=str)
@pytest.mark.parametrize("format", ONE_FORMAT)
def test_kernel_is_the_oracle_across_chunks(
    row: Row, format: str, rng: np.random.Generator
) -> None:
    check_formats(row, rng, format, format, format, SIZES)


@pytest.mark.parametrize("row", [NESTEROV, AMSGRAD, DECOUPLED], ids=str)
@pytest.mark.parametrize("formats", MIXED, ids="-".join)
def test_kernel_is_the_oracle_in_mixed_formats(
    row: Row, formats: tuple[str, str, str], rng: np.random.Generator
) -> None:
    check_formats(row, rng, *formats, sizes=SIZES[:8])


@pytest.mark.slow
@over_table
@pytest.mark.parametrize("formats", [*MIXED, *((f, f, f) for f in ONE_FORMAT)], ids="-".join)
def test_kernel_is_the_oracle_everywhere(
    row: Row, formats: tuple[str, str, str], rng: np.random.Generator
) -> None:
    check_formats(row, rng, *formats, sizes=SIZES)


@over_table
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float64,
        torch.bfloat16,
        torch.float16,
        torch.complex64,
        torch.complex128,
    ],
    ids=lambda d: str(d).removeprefix("torch."),
)
def test_step_is_the_oracle(row: Row, dtype: torch.dtype, rng: np.random.Generator) -> None:
    """Through the whole optimizer, states and scalars included, and a change of lr: tensors of all
    kinds at once."""
    shapes = [(), (0,), (1,), (3, 5), (17,), (1000,)]
    plain = [torch.randn(shape, dtype=dtype) for shape in shapes]
    # A view that begins at element 1 of its storage, a transposed one, and memory at an odd
    # address.
    odd = bytearray(b"-" + torch.randn(33, dtype=dtype).view(torch.uint8).numpy().tobytes())
    params = [*plain, torch.randn(40, dtype=dtype)[1:], torch.randn(7, 4, dtype=dtype).t()]
    params.append(torch.frombuffer(odd, dtype=dtype, offset=1))
    assert params[-1].data_ptr() % 2 == 1
    optimizer = row.make(params)
    graph, group = graph_of(row), optimizer.param_groups[0]
    real = str(dtype.to_real() if dtype.is_complex else dtype).removeprefix("torch.")
    program = program_of(graph, real, real, real)
    # Each parameter's columns and scalars.
    states = [
        {n: flat(optimizer.initial_state(n, p.contiguous(), group)) for n in graph.state}
        for p in params
    ]
    scalars: list[dict[str, float]] = [{} for _ in params]
    for step, lr in ((1, 0.01), (2, 0.01), (3, 0.5)):
        for p in params:
            p.grad = torch.randn_like(p)
        group["lr"] = lr
        wanted = []
        for p, state, numbers in zip(params, states, scalars, strict=True):
            columns = {"p": flat(p.contiguous()), "g": flat(p.grad.contiguous()), **state}
            hypers = hypers_of(row, graph, step, step == 1, lr=lr, **numbers)
            wanted.append(state | interpret(program, columns, hypers))
        optimizer.step()
        for i, (p, want) in enumerate(zip(params, wanted, strict=True)):
            assert_same_bits(
                flat(p.contiguous()), want.pop("p"), f"p of {tuple(p.shape)} in step {step}"
            )
            # Stored as torch stores them, in float32.
            numbers = {name: want.pop(name).astype(np.float32) for name, _ in graph.scalars}
            for name, values in (want | numbers).items():
                assert_same_bits(
                    flat(optimizer.state[p][name].contiguous()), values, f"{name} in step {step}"
                )
            states[i], scalars[i] = (
                want,
                {name: float(number[0]) for name, number in numbers.items()},
            )


# What must not matter.


@pytest.fixture
def eager_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take as many threads as allowed, however little there is to do."""
    monkeypatch.setattr(cpu, "UNITS_PER_THREAD", 1, raising=False)


@over_table
@pytest.mark.usefixtures("eager_threads")
def test_threads_do_not_matter(row: Row, rng: np.random.Generator) -> None:
    graph = graph_of(row)
    kernel = compiled(program_of(graph, "float32", "float32", "float32"))
    tensors = [random_columns(rng, kernel.program, size) for size in (*SIZES, 3 * 32768 + 5)]
    runs = [launch(kernel, tensors, [hypers_of(row, graph, 3)], threads=n) for n in (1, 2, 3, 7)]
    for run in runs[1:]:
        for got, want in zip(run, runs[0], strict=True):
            for name in want:
                assert_same_bits(got[name], want[name], name)


def three_steps(optimizer: torch.optim.Optimizer, params: Sequence[Tensor], seed: int = 1) -> None:
    for step in range(3):
        for i, p in enumerate(params):
            generator = torch.Generator().manual_seed(1000 * seed + 10 * i + step)
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()


@over_table
def test_company_does_not_matter(row: Row) -> None:
    """A tensor alone, among fifty, and in a param group of its own: the same bits."""
    start = [torch.randn(1 + 13 * i % 200) for i in range(50)]
    among = [p.clone() for p in start]
    three_steps(row.make(among), among)
    grouped = [p.clone() for p in start]
    groups = [{"params": grouped[i : i + 7], "lr": 0.01, "name": str(i)} for i in range(0, 50, 7)]
    three_steps(row.make(groups, lr=5.0), grouped)
    alone = [p.clone() for p in start]
    optimizers = [row.make([p]) for p in alone]
    for step in range(3):
        for i, (p, optimizer) in enumerate(zip(alone, optimizers, strict=True)):
            generator = torch.Generator().manual_seed(1000 + 10 * i + step)
            p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
    for a, b, c in zip(among, grouped, alone, strict=True):
        assert_same_bits(flat(b), flat(a), "in groups")
        assert_same_bits(flat(c), flat(a), "alone")


@over_table
def test_uneven_steps_do_not_matter(row: Row) -> None:
    """Parameters at different step counts in one launch have the bits that they have alone, in
    float64 too."""
    gradients = [[torch.randn(5, dtype=torch.float64) for _ in range(12)] for _ in range(6)]
    together = [torch.ones(5, dtype=torch.float64) for _ in range(6)]
    optimizer = row.make(together)
    for step in range(12):
        for i, p in enumerate(together):
            p.grad = gradients[i][step] if step % (i + 1) == 0 else None
        optimizer.step()
    for i, want in enumerate(together):
        alone = torch.ones(5, dtype=torch.float64)
        optimizer = row.make([alone])
        for step in range(0, 12, i + 1):
            alone.grad = gradients[i][step]
            optimizer.step()
        assert_same_bits(flat(alone), flat(want), f"with a gradient in each {i + 1}th step")


# The mathematics.


def learning_rates() -> list[float]:
    return [0.01 if t < 8 else 0.03 if t < 15 else 0.001 for t in range(STEPS)]


def run(
    row: Row,
    optimizer: torch.optim.Optimizer,
    p: Tensor,
    gradients: Sequence[Any],
    lrs: Sequence[float],
) -> np.ndarray:
    """The row's results after all steps, in float64."""
    for g, lr in zip(gradients, lrs, strict=True):
        p.grad = None if g is None else torch.from_numpy(g).to(p.dtype)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    return results(row, optimizer, p)


def problem(
    rng: np.random.Generator, dtype: torch.dtype, frozen: bool
) -> tuple[np.ndarray, list[np.ndarray | None]]:
    """Weights and gradients that the dtype holds exactly; `frozen` ones have no gradient in some of
    the steps."""
    numbers = [
        torch.from_numpy(rng.standard_normal(500)).to(dtype).double().numpy()
        for _ in range(STEPS + 1)
    ]
    gradients: list[np.ndarray | None] = list(numbers[1:])
    if frozen:
        gradients[:2], gradients[9:12] = [None] * 2, [None] * 3
    return numbers[0], gradients


@over_table
@pytest.mark.parametrize("frozen", [False, True], ids=["always", "frozen"])
@pytest.mark.parametrize("eager", [False, True], ids=["kernel", "eager"])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_reference(
    row: Row, dtype: torch.dtype, frozen: bool, eager: bool, rng: np.random.Generator
) -> None:
    """Twenty steps end where the float64 reference does, within what rounding explains."""
    start, gradients = problem(rng, dtype, frozen)
    path = walk(row, start, gradients, learning_rates())
    p = torch.from_numpy(start).to(dtype)
    error = np.abs(run(row, row.make([p], eager), p, gradients, learning_rates()) - path[-1]).max()
    assert error <= tolerance(row, path, dtype)


@over_twins
@pytest.mark.parametrize("frozen", [False, True], ids=["always", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_torch(row: Row, dtype: torch.dtype, frozen: bool, rng: np.random.Generator) -> None:
    """Where torch.optim ends: both round, so twice what one may be off."""
    start, gradients = problem(rng, dtype, frozen)
    path = walk(row, start, gradients, learning_rates())
    # float64 tensors of an array share its memory.
    ours, theirs = (torch.from_numpy(start.copy()).to(dtype) for _ in range(2))
    got = run(row, row.make([ours]), ours, gradients, learning_rates())
    want = run(row, row.make_torch([theirs], foreach=False), theirs, gradients, learning_rates())
    assert np.abs(got - want).max() <= 2 * tolerance(row, path, dtype)


@over_twins
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_torch_complex(row: Row, dtype: torch.dtype) -> None:
    start, gradients = (
        torch.randn(50, dtype=dtype),
        [torch.randn(50, dtype=dtype) for _ in range(STEPS)],
    )
    ends = []
    for make in (row.make, partial(row.make_torch, foreach=False)):
        p = start.clone()
        optimizer = make([p])
        for g in gradients:
            p.grad = g.clone()
            optimizer.step()
        ends.append(results(row, optimizer, p))
    path = walk(row, flat(start), [flat(g) for g in gradients], [row.options["lr"]] * STEPS)
    assert np.abs(ends[0] - path[-1]).max() <= tolerance(row, path, dtype.to_real())
    assert np.abs(ends[0] - ends[1]).max() <= 2 * tolerance(row, path, dtype.to_real())


@over_table
def test_eager_agrees(row: Row, rng: np.random.Generator) -> None:
    """From the same state, both backends round the same expression, step after step."""
    start, gradients = problem(rng, torch.float32, frozen=False)
    ends = []
    for eager in (False, True):
        p = torch.from_numpy(start).float()
        ends.append(run(row, row.make([p], eager), p, gradients[:2], [0.01, 0.01]))
    path = walk(row, start, gradients[:2], [0.01, 0.01])
    assert np.abs(ends[0] - ends[1]).max() <= 2 * tolerance(row, path, torch.float32)


# Limits between algorithms.


LIMITS = [
    (lambda p: Adam(p, amsgrad=False), lambda p: Adam(p)),
    (lambda p: AdamW(p, weight_decay=0.0), lambda p: Adam(p, weight_decay=0.0)),
    (
        lambda p: Adam(p, weight_decay=0.1, decoupled_weight_decay=True),
        lambda p: AdamW(p, weight_decay=0.1),
    ),
    (lambda p: SGD(p, momentum=0.0), lambda p: SGD(p)),
    (lambda p: SGD(p, momentum=1e-300, nesterov=True), lambda p: SGD(p)),
    (lambda p: SGD(p, momentum=0.9, dampening=0.0), lambda p: SGD(p, momentum=0.9)),
    (lambda p: SGD(p, weight_decay=0.0, momentum=0.9), lambda p: SGD(p, momentum=0.9)),
    (lambda p: RMSprop(p, momentum=1e-300), lambda p: RMSprop(p)),
    (lambda p: NAdam(p, decoupled_weight_decay=True), lambda p: NAdam(p)),
    (lambda p: RAdam(p, decoupled_weight_decay=True), lambda p: RAdam(p)),
    # No rectification, no momentum; a scale that begins as one and stays; no decay, and an lr that
    # float32 holds.
    (lambda p: RAdam(p, betas=(0.0, 0.5)), lambda p: SGD(p)),
    (lambda p: Adadelta(p, lr=1e-3, rho=1.0), lambda p: SGD(p)),
    (lambda p: ASGD(p, lr=2**-7, lambd=0.0), lambda p: SGD(p, lr=2**-7)),
    # The largest v so far is v itself where nothing is forgotten.
    (
        lambda p: Adam(p, amsgrad=True, betas=(0.9, 0.999999)),
        lambda p: Adam(p, betas=(0.9, 0.999999)),
    ),
]


@pytest.mark.parametrize("limit", range(len(LIMITS)))
def test_limits(limit: int) -> None:
    """Options that take a term out give the simpler algorithm, to the last bit."""
    start = torch.randn(300)
    ends = []
    for make in LIMITS[limit]:
        p = start.clone()
        three_steps(make([p]), [p])
        ends.append(flat(p))
    assert_same_bits(ends[0], ends[1], "the limit")


@over_table
def test_maximize_is_the_negated_gradient(row: Row) -> None:
    start = torch.randn(300)
    p, q = start.clone(), start.clone()
    flipped = row.make([q])
    flipped.param_groups[0]["maximize"] = not row.options.get("maximize", False)
    optimizer = row.make([p])
    for _ in range(3):
        p.grad = torch.randn(300)
        q.grad = -p.grad
        optimizer.step()
        flipped.step()
    assert_same_bits(flat(q), flat(p), "maximize")


# Nothing to do, and what is no number.


@over_table
@pytest.mark.parametrize("eager", [False, True], ids=["kernel", "eager"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_no_step_keeps_every_bit(row: Row, dtype: torch.dtype, eager: bool) -> None:
    """lr = 0 and gradients of zero, of either sign: -0.0, subnormals and the largest numbers stay
    what they are."""
    finite = torch.tensor([x for x in SPECIAL if abs(x) < INF], dtype=torch.float64).to(dtype)
    # What overflows to infinity with the decay's or the root's arithmetic is no weight anybody has.
    finite = torch.cat(
        [
            finite[finite.isfinite()],
            torch.finfo(dtype).smallest_normal * torch.tensor([0.5, -0.25], dtype=dtype),
        ]
    )
    if row.options.get("centered"):
        # A variance is the difference of two squares, which are no number when both are infinite.
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        finite = finite[finite.to(compute).square().isfinite()]
    for sign in (0.0, -0.0):
        p = finite.clone()
        optimizer = row.make([p], eager, lr=0.0)
        for _ in range(3):
            p.grad = torch.full_like(p, sign)
            optimizer.step()
        same = bits(flat(p)) == bits(flat(finite))
        assert same.all(), finite[~torch.from_numpy(same)]


@over_twins
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_non_finite_numbers_spread_as_in_torch(row: Row, dtype: torch.dtype) -> None:
    """NaN and infinities of p and g lead to NaN and infinities where torch has them, in p and in
    every state."""
    values = torch.tensor([0.0, 1.0, -2.0, INF, -INF, NAN, 1e-3], dtype=dtype)
    p = torch.cartesian_prod(values, values)[:, 0].contiguous()
    g = torch.cartesian_prod(values, values)[:, 1].contiguous()
    theirs = p.clone()
    pair = [(p, row.make([p])), (theirs, row.make_torch([theirs], foreach=False))]
    for gradient in (g, torch.ones_like(g), g.flip(0)):
        for q, optimizer in pair:
            q.grad = gradient.clone()
            optimizer.step()
        assert torch.equal(p.isnan(), theirs.isnan())
        assert torch.equal(p.isposinf(), theirs.isposinf())
        assert torch.equal(p.isneginf(), theirs.isneginf())
        for name, want in pair[1][1].state[theirs].items():
            if name != "step" and want is not None:
                got = pair[0][1].state[p][name]
                assert torch.equal(got.isnan(), want.isnan()), name
                assert torch.equal(got.isinf(), want.isinf()), name


# Compiling.

CHANGES = {
    "lr": 0.5,
    "betas": (0.5, 0.6),
    "eps": 1e-3,
    "weight_decay": 0.7,
    "momentum": 0.2,
    "dampening": 0.0,
    "lr_decay": 0.5,
    "alpha": 0.6,
    "rho": 0.5,
    "momentum_decay": 0.1,
    "lambd": 0.3,
    "t0": 2.0,
    "etas": (0.4, 1.3),
    "step_sizes": (1e-4, 2.0),
}


@over_table
def test_second_step_compiles_nothing(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a further step, nor new numbers, nor another optimizer of the kind, nor other
    shapes."""
    built = []
    monkeypatch.setattr(
        Library,
        "__init__",
        lambda *args, original=Library.__init__: built.append(1) or original(*args),
    )
    cpu.make_kernel.cache_clear()
    p = torch.randn(100)
    optimizer = row.make([p])
    three_steps(optimizer, [p])
    built.clear()
    before = cpu.make_kernel.cache_info().misses
    for name, value in CHANGES.items():
        if name in optimizer.param_groups[0] and bool(optimizer.param_groups[0][name]) | (
            name != "momentum"
        ):
            optimizer.param_groups[0][name] = value
            three_steps(optimizer, [p])
    others = [torch.randn(7, 3), torch.randn(40000), torch.randn(())]
    three_steps(row.make(others), others)
    assert not built
    assert cpu.make_kernel.cache_info().misses == before
