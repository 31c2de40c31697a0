"""Adafactor: both of its rules against the oracle, the paper and torch.optim, and what it keeps."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support.bare_kernels import (
    INF,
    NAN,
    SPECIAL,
    assert_same_bits,
    bits,
    check_oracle,
    compiled,
    flat,
    launch,
    random_columns,
)
from support.interpreter import interpret
from support.side_by_side import refuses, snapshot
from support.subprocess_cases import run_script
from table import Row, on_eager_backend, tolerance, walk
from torch import Tensor, nn

import onepass
from onepass import StepError
from onepass.app.explain import explanation as explain
from onepass.kernel import Graph, bind
from onepass.kernel.graph.ir import Rank
from onepass.kernel.graph.trace import Program
from onepass.stepping.recipe import expected_state

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
UNIFORM = tuple((f, f, f) for f in ("float32", "float64", "bfloat16", "float16"))
MIXED = (
    ("bfloat16", "bfloat16", "float32"),
    ("float32", "bfloat16", "float32"),
    ("bfloat16", "float16", "float64"),
    ("float64", "float32", "float32"),
)


def adafactor(
    p,
    g,
    state,
    step,
    *,
    lr,
    beta2_decay=-0.8,
    eps=(None, 1e-3),
    d=1.0,
    weight_decay=0.0,
    maximize=False,
    machine=0.0,
) -> np.ndarray:
    """Shazeer and Stern, 2018, algorithms 4 to 6: factored second moments, update clipping,
    relative step sizes.

    torch departs in three places: epsilon_1 is no addend of the squares, but bounds the mean of R
    and the root of V from below; lr bounds rho_t in the place of 0.01; and weights decay,
    decoupled, which the paper has not.
    """
    g = -g if maximize else g
    eps1 = machine if eps[0] is None else eps[0]
    keep = 1 - step**beta2_decay
    if p.ndim < 2:
        v = state["variance"] = keep * state.get("variance", 0.0) + (1 - keep) * g**2
    else:
        r = state["row_var"] = keep * state.get("row_var", 0.0) + (1 - keep) * (g**2).mean(
            -1, keepdims=True
        )
        c = state["col_var"] = keep * state.get("col_var", 0.0) + (1 - keep) * (g**2).mean(
            -2, keepdims=True
        )
        v = r * c / np.maximum(r.mean(-2, keepdims=True), eps1)
    u = g / np.maximum(np.sqrt(v), eps1)
    clipped = u / max(1.0, np.sqrt((u**2).mean()) / d)
    alpha = max(eps[1], np.sqrt((p**2).mean())) * min(lr, 1 / np.sqrt(step))
    return p - lr * weight_decay * p - alpha * clipped


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """More would wait for each other: the parameters are small; launches are told how many to
    take."""
    torch.set_num_threads(1)


def row(**options: Any) -> Row:
    return Row(onepass.Adafactor, {"lr": 0.05} | options, adafactor)


# Each option far from where it has no effect.
ROWS = (
    row(),
    row(beta2_decay=-0.3, d=1.5),
    row(eps=(0.3, 0.5)),
    row(weight_decay=0.2, maximize=True),
    row(beta2_decay=-1.2, eps=(1e-2, 2.0), d=3.0, weight_decay=0.1),
)
over_rows = pytest.mark.parametrize("one", ROWS, ids=str)
SHAPES = ((6, 5), (7,), (), (2, 3, 4, 5), (1, 9), (9, 1), (1, 1), (33, 40), (2, 3, 3))


# The oracle, bit for bit.


def graph_of(one: Row, shape: tuple[int, ...]) -> Graph:
    return explain.graph_of(one.make([torch.zeros(shape)]))


def bound(graph: Graph, p: str, g: str, state: str) -> Program:
    return bind(graph, tuple(({"p": p, "g": g} | dict.fromkeys(graph.state, state)).items()))


def hypers_of(one: Row, graph: Graph, step: float, **changed: Any) -> dict[str, float]:
    group = one.make([torch.zeros(1)]).param_groups[0] | {"step": step} | changed
    parts = {name: name.partition(".") for name in graph.hypers}
    return {
        name: float(group[key][int(i)] if i else group[key]) for name, (key, _, i) in parts.items()
    }


MATRICES = ((1, 1, 1), (1, 1, 9), (1, 17, 1), (0, 3, 3), (3, 15, 17), (2, 3, 0), (500, 3, 3))
VECTORS = ((1, 1, 0), (1, 1, 1), (1, 1, 17), (1, 1, 1000), (1, 1, 32771))
LARGE = ((1, 65, 1001), (12, 60, 70), (4000, 3, 3), (2, 70, 900), (1, 1, 50001), (1, 50001, 1))


def check_formats(
    formats: tuple[str, str, str], sizes: Sequence[tuple[int, int, int]], rng: np.random.Generator
) -> None:
    """The kernel has the oracle's bits, at awkward sizes and places, with special numbers; guards
    are whole."""
    one = ROWS[4]
    graph = graph_of(one, (2,) if sizes is VECTORS else (2, 2))
    kernel = compiled(bound(graph, *formats))
    hypers = [
        hypers_of(one, graph, 1),
        hypers_of(one, graph, 7),
        hypers_of(one, graph, 400, lr=3.0),
    ]
    rows = [i % 3 for i in range(len(sizes))]
    for special in (0.0, 0.005):
        tensors = [random_columns(rng, kernel.program, size, special) for size in sizes]
        aligned = check_oracle(kernel, tensors, hypers, rows, sizes=sizes)
    for misaligned, threads in ((1, 2), (2, 1), (4, 3)):
        again = launch(kernel, tensors, hypers, rows, threads, misaligned, sizes)
        for now, want in zip(again, aligned, strict=True):
            for name in want:
                assert_same_bits(now[name], want[name], f"{name}, {misaligned} bytes off")


@pytest.mark.parametrize("sizes", [MATRICES, VECTORS], ids=["matrices", "vectors"])
@pytest.mark.parametrize("formats", [*UNIFORM, MIXED[0], MIXED[2]], ids="-".join)
def test_kernel_is_the_oracle(
    formats: tuple[str, str, str], sizes: Any, rng: np.random.Generator
) -> None:
    check_formats(formats, sizes, rng)


def test_kernel_is_the_oracle_across_chunks(rng: np.random.Generator) -> None:
    check_formats(UNIFORM[0], LARGE[:3], rng)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [MATRICES, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("formats", [*UNIFORM, *MIXED], ids="-".join)
def test_kernel_is_the_oracle_everywhere(
    formats: tuple[str, str, str], sizes: Any, rng: np.random.Generator
) -> None:
    check_formats(formats, sizes, rng)


def laid_out(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Parameters of these shapes; transposed ones, a slice, channels last, and one at an odd
    address."""
    random = torch.Generator().manual_seed(3)
    params = [torch.randn(shape, generator=random).to(dtype) for shape in shapes]
    params += [
        torch.randn(7, 4, generator=random).to(dtype).t(),
        torch.randn(6, 9, generator=random).to(dtype)[1:5, ::2],
    ]
    params.append(
        torch.randn(2, 3, 4, 5, generator=random).to(dtype).to(memory_format=torch.channels_last)
    )
    odd = bytearray(
        b"-" + torch.randn(6, 5, generator=random).to(dtype).view(torch.uint8).numpy().tobytes()
    )
    params.append(torch.frombuffer(odd, dtype=dtype, offset=1).view(6, 5))
    assert params[-1].data_ptr() % 2 == 1
    return params


def sizes_of(p: Tensor) -> tuple[int, int, int]:
    return (p[..., 0, 0].numel(), p.shape[-2], p.shape[-1]) if p.dim() > 1 else (1, 1, p.numel())


@pytest.mark.parametrize(
    ("one", "dtype"),
    [(ROWS[3], torch.float32), (ROWS[4], torch.float64), (ROWS[4], torch.bfloat16)],
    ids=str,
)
def test_step_is_the_oracle(one: Row, dtype: torch.dtype) -> None:
    """Through the whole optimizer, states included, with a change of lr: parameters of all layouts
    at once."""
    params = laid_out(SHAPES, dtype)
    optimizer = one.make(params)
    states: list[dict[str, np.ndarray]] = [{} for _ in params]
    for step, lr in ((1, 0.05), (2, 0.05), (3, 0.5)):
        optimizer.param_groups[0]["lr"] = lr
        for i, (p, state) in enumerate(zip(params, states, strict=True)):
            p.grad = torch.randn_like(p)
            if i % 2:
                p.grad = p.grad.mT.contiguous().mT if p.dim() > 1 else p.grad
            graph = graph_of(one, tuple(p.shape))
            program = bound(graph, *[str(dtype).removeprefix("torch.")] * 3)
            columns = {c.name: np.zeros(0) for c in program.columns} | state
            columns |= {"p": flat(p.contiguous()), "g": flat(p.grad.contiguous())}
            for name in graph.state:
                if step == 1:
                    shape = expected_state(optimizer, p, optimizer.param_groups[0])[1][name]
                    columns[name] = np.zeros(int(np.prod(shape)), columns["p"].dtype)
            state |= interpret(program, columns, hypers_of(one, graph, step, lr=lr), sizes_of(p))
        optimizer.step()
        for p, state in zip(params, states, strict=True):
            for name, want in state.items():
                now = p if name == "p" else optimizer.state[p][name]
                assert_same_bits(
                    flat(now.contiguous()), want, f"{name} of {tuple(p.shape)} in step {step}"
                )


# The mathematics.

STEPS = 20


def learning_rates() -> list[float]:
    return [0.05 if t < 8 else 0.15 if t < 15 else 0.01 for t in range(STEPS)]


def problem(
    rng: np.random.Generator, dtype: torch.dtype, shape: tuple[int, ...], frozen: bool
) -> tuple[np.ndarray, list[np.ndarray | None]]:
    """Weights and gradients that the dtype holds exactly; rows and columns of all sizes."""
    numbers = []
    for _ in range(STEPS + 1):
        values = rng.standard_normal(shape)
        if len(shape) > 1:
            values *= np.exp(rng.standard_normal((shape[-2], 1))) * np.exp(
                rng.standard_normal(shape[-1])
            )
        numbers.append(torch.from_numpy(np.asarray(values)).to(dtype).double().numpy())
    gradients: list[np.ndarray | None] = list(numbers[1:])
    if frozen:
        gradients[:2], gradients[9:12] = [None] * 2, [None] * 3
    return numbers[0], gradients


def run(
    optimizer: torch.optim.Optimizer, p: Tensor, gradients: Sequence[Any], lrs: Sequence[float]
) -> np.ndarray:
    for g, lr in zip(gradients, lrs, strict=True):
        p.grad = None if g is None else torch.from_numpy(g).to(p.dtype)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    return p.detach().double().numpy()


def path_of(
    one: Row, dtype: torch.dtype, start: np.ndarray, gradients: Sequence[Any]
) -> np.ndarray:
    machine = Row(one.cls, one.options | {"machine": torch.finfo(dtype).eps}, one.reference)
    return walk(machine, start, gradients, learning_rates())[:, 0]


@pytest.mark.parametrize("eager", [False, True], ids=["kernel", "eager"])
@pytest.mark.parametrize(
    ("one", "dtype"),
    [(one, dtype) for dtype in DTYPES[:2] for one in ROWS]
    + [(ROWS[4], dtype) for dtype in DTYPES[2:]],
    ids=str,
)
def test_reference(one: Row, dtype: torch.dtype, eager: bool, rng: np.random.Generator) -> None:
    """Twenty steps end where the paper's do, in float64, within what rounding explains."""
    for i, shape in enumerate(SHAPES if dtype == torch.float64 and not eager else SHAPES[:4]):
        start, gradients = problem(rng, dtype, shape, frozen=bool(i % 2))
        path = path_of(one, dtype, start, gradients)
        p = torch.from_numpy(start.copy()).to(dtype)
        optimizer = one.make([p])
        end = run(
            on_eager_backend(optimizer) if eager else optimizer, p, gradients, learning_rates()
        )
        assert np.abs(end - path[-1]).max() <= tolerance(one, path, dtype), shape


@over_rows
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_torch(one: Row, dtype: torch.dtype, rng: np.random.Generator) -> None:
    """Where torch.optim ends, with parameters that freeze and thaw: both round."""
    for i, shape in enumerate(SHAPES if dtype == torch.float32 else SHAPES[:4]):
        start, gradients = problem(rng, dtype, shape, frozen=not i % 2)
        path = path_of(one, dtype, start, gradients)
        ours, theirs = (torch.from_numpy(start.copy()).to(dtype) for _ in range(2))
        got = run(one.make([ours]), ours, gradients, learning_rates())
        want = run(one.make_torch([theirs], foreach=False), theirs, gradients, learning_rates())
        assert np.abs(got - want).max() <= 2 * tolerance(one, path, dtype), shape


def test_torch_with_all_layouts(rng: np.random.Generator) -> None:
    """All at once, in two groups; what is stepped keeps its layout, and slices their neighbours."""
    both = []
    for library in (onepass, torch.optim):
        params = laid_out(SHAPES)
        whole = params[-3]._base
        groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 0.3, "weight_decay": 0.1}]
        optimizer = library.Adafactor(groups, lr=0.05)
        random = torch.Generator().manual_seed(1)
        strides = [p.stride() for p in params]
        for _ in range(5):
            for p in params:
                p.grad = torch.randn(p.shape, generator=random)
            optimizer.step()
        assert [p.stride() for p in params] == strides
        both.append(
            [
                *params,
                whole,
                *(optimizer.state[p][n] for p in params for n in sorted(optimizer.state[p])),
            ]
        )
    for ours, theirs in zip(*both, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_numbers_that_are_none_spread_as_in_torch() -> None:
    for place, value in (((0, 0), NAN), ((1, 2), INF), ((2, 1), -INF)):
        for where in ("p", "g"):
            ends = []
            for library in (onepass, torch.optim):
                random = torch.Generator().manual_seed(0)
                params = [torch.randn(3, 4, generator=random), torch.randn(12, generator=random)]
                optimizer = library.Adafactor(params)
                for step in range(2):
                    for p in params:
                        p.grad = torch.randn(p.shape, generator=random)
                        if step == 0:
                            (p if where == "p" else p.grad).view(3, 4)[place] = value
                    optimizer.step()
                ends.append(
                    [*params, *(t for p in params for _, t in sorted(optimizer.state[p].items()))]
                )
            for ours, theirs in zip(*ends, strict=True):
                assert torch.equal(ours.isnan(), theirs.isnan())
                assert torch.equal(ours.isposinf(), theirs.isposinf())
                assert torch.equal(ours.isneginf(), theirs.isneginf())


def test_epsilon_is_that_of_the_parameters_type() -> None:
    """None means the machine's epsilon: of each parameter, whatever the others are. It may be given
    later."""
    for order in (DTYPES, DTYPES[::-1]):
        params = [torch.ones(3, 2, dtype=dtype) for dtype in order]
        given = [torch.ones(3, 2, dtype=dtype) for dtype in order]
        opt = onepass.Adafactor(params)
        # Gradients whose roots of V lie around the epsilons.
        others = [onepass.Adafactor([p], eps=(torch.finfo(p.dtype).eps, 1e-3)) for p in given]
        for p, q, other in zip(params, given, others, strict=True):
            p.grad = torch.full_like(p, torch.finfo(p.dtype).eps / 3)
            q.grad = p.grad.clone()
            other.step()
        opt.step()
        for p, q in zip(params, given, strict=True):
            assert torch.equal(p, q)
            assert not torch.equal(p, torch.ones_like(p))
    opt.param_groups[0]["eps"] = (1e3, 1e-3)
    before = params[1].clone()
    opt.step()
    assert (params[1] - before).abs().max() < 1e-3


@pytest.mark.parametrize("one", [ROWS[3], ROWS[4]], ids=str)
@pytest.mark.parametrize("eager", [False, True], ids=["kernel", "eager"])
def test_no_step_keeps_every_bit(one: Row, eager: bool) -> None:
    """lr = 0 and gradients of zero, of either sign."""
    for dtype in DTYPES[1:3]:
        finite = torch.tensor([x for x in SPECIAL if abs(x) < 1e15], dtype=torch.float64).to(dtype)
        # Their root mean square must be a number.
        finite = finite[finite.isfinite()]
        for sign in (0.0, -0.0):
            params = [finite.clone(), finite[:12].clone().view(3, 4)]
            optimizer = one.make(params, lr=0.0)
            optimizer = on_eager_backend(optimizer) if eager else optimizer
            for _ in range(3):
                for p in params:
                    p.grad = torch.full_like(p, sign)
                optimizer.step()
            assert (bits(flat(params[0])) == bits(flat(finite))).all()
            assert (bits(flat(params[1])) == bits(flat(finite[:12]))).all()


def test_company_does_not_matter() -> None:
    """A parameter alone, among others, and in a group of its own: the same bits."""
    start = [
        p.contiguous() for p in laid_out([(1 + 13 * i % 40, 1 + 7 * i % 50) for i in range(12)])
    ]
    start += [p.reshape(-1) for p in start[:5]]

    def run(groups: Sequence[list[Tensor]]) -> list[Tensor]:
        optimizers = [
            onepass.Adafactor([{"params": of, "name": i} for i, of in enumerate(groups)], lr=0.05)
        ]
        params = [p for of in groups for p in of]
        if len(groups) == 1 and len(params) == len(start):
            optimizers = [onepass.Adafactor([p], lr=0.05) for p in params]
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = torch.randn(
                    p.shape, generator=torch.Generator().manual_seed(100 * step + i)
                )
            for optimizer in optimizers:
                optimizer.step()
        return params

    alone, among, grouped = ([p.clone() for p in start] for _ in range(3))
    run([alone])
    run([among[:1], among[1:]])
    run([grouped[i : i + 3] for i in range(0, len(grouped), 3)])
    for a, b, c in zip(alone, among, grouped, strict=True):
        assert_same_bits(flat(b), flat(a), "among others")
        assert_same_bits(flat(c), flat(a), "in groups")


# What it keeps.


def test_the_state_is_factored() -> None:
    params = [torch.ones(shape) for shape in ((300, 200), (5,), (2, 3, 4, 5), ())]
    opt = onepass.Adafactor(params)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    shapes = [{name: tuple(t.shape) for name, t in opt.state[p].items()} for p in params]
    assert shapes == [
        {"step": (), "row_var": (300, 1), "col_var": (1, 200)},
        {"step": (), "variance": (5,)},
        {"step": (), "row_var": (2, 3, 4, 1), "col_var": (2, 3, 1, 5)},
        {"step": (), "variance": ()},
    ]
    assert sum(t.nbytes for t in opt.state[params[0]].values()) == 4 * (300 + 200 + 1)
    assert all(next(iter(opt.state[p])) == "step" for p in params)


def test_no_temporary_has_the_parameters_size() -> None:
    one = bound(graph_of(ROWS[0], (2, 2)), *["float32"] * 3)
    assert Rank.ELEMENT not in {t.rank for t in one.temporaries}
    assert sum(p.domain == Rank.ELEMENT for p in one.passes) == 3


MEASURE = """
import torch, onepass

def peak(name):
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

torch.set_num_threads(2)
p, small = torch.ones(4096, 2048), torch.ones(8, 8)
opt = onepass.Adafactor([{"params": [small]}, {"params": [p]}])
small.grad = torch.ones_like(small)
opt.step()  # compiles
p.grad = torch.ones_like(p)
open("/proc/self/clear_refs", "w").write("5")
before = peak("VmHWM")
for _ in range(2):
    opt.step()
print(peak("VmHWM") - before, p.nbytes)
"""


def test_a_step_takes_little_memory() -> None:
    """State, the rows' and columns' values and their partial sums together: a small part of the
    parameter's size."""
    taken, size = map(int, run_script(MEASURE).split())
    assert taken < size / 8


# Checkpoints.


def tensors_of(optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> list[Tensor]:
    return [*params, *(t for p in params for _, t in sorted(optimizer.state[p].items()))]


@pytest.mark.parametrize("crossing", [7, 13])
@pytest.mark.parametrize("begin", [onepass, torch.optim], ids=["onepass first", "torch first"])
def test_checkpoints_cross_to_torch_and_back(begin: Any, crossing: int) -> None:
    """After some steps the other library goes on, and ends where torch alone ends."""
    ends = []
    for crosses in (True, False):
        library = begin if crosses else torch.optim
        params = [nn.Parameter(p) for p in laid_out(SHAPES)]
        optimizer = library.Adafactor(params, lr=0.05, weight_decay=0.1)
        random = torch.Generator().manual_seed(5)
        for step in range(STEPS):
            if crosses and step == crossing:
                other = torch.optim if begin is onepass else onepass
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = other.Adafactor(params, lr=3.0)
                optimizer.load_state_dict(state)
            optimizer.param_groups[0]["lr"] = learning_rates()[step]
            for i, p in enumerate(params):
                g = torch.randn(p.shape, generator=random)
                p.grad = None if (i + step) % 5 == 0 else g
            optimizer.step()
        assert optimizer.param_groups[0]["weight_decay"] == 0.1
        ends.append([t.detach() for t in tensors_of(optimizer, params)])
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "file"])
def test_copies_go_on_alike(way: str) -> None:
    params = [nn.Parameter(p) for p in laid_out(SHAPES)]
    opt = onepass.Adafactor(params)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    if way == "file":
        others = [nn.Parameter(p.detach().clone()) for p in params]
        other = onepass.Adafactor(others)
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
    else:
        others, other = (
            copy.deepcopy((params, opt))
            if way == "deepcopy"
            else pickle.loads(pickle.dumps((params, opt)))
        )
    for each, of in ((opt, params), (other, others)):
        for p in of:
            p.grad = torch.full_like(p, 0.5)
        each.step()
    for a, b in zip(tensors_of(opt, params), tensors_of(other, others), strict=True):
        assert_same_bits(flat(a.contiguous()), flat(b.contiguous()), way)


@pytest.mark.parametrize("name", ["row_var", "col_var"])
@pytest.mark.parametrize("eager", [False, True], ids=["kernel", "eager"])
def test_state_that_lies_in_another_order(eager: bool, name: str) -> None:
    """Transposed it is as dense as before, but a kernel reads its numbers one after the other."""
    ends = []
    for moved in (False, True):
        random = torch.Generator().manual_seed(0)
        p = nn.Parameter(torch.randn(2, 3, 4, 5, generator=random))
        opt = ROWS[0].make([p], eager)
        for _ in range(3):
            p.grad = torch.randn(2, 3, 4, 5, generator=random)
            opt.step()
            if moved:
                entry = opt.state[p][name]
                opt.state[p][name] = entry.transpose(0, 1).contiguous().transpose(0, 1)
        ends.append(flat(p))
    assert_same_bits(*ends, "p")


def test_low_precision_states_keep_their_type() -> None:
    """float32 means of a bfloat16 parameter, as a checkpoint may hold them, stay float32."""
    p = torch.ones(4, 3, dtype=torch.bfloat16)
    opt = onepass.Adafactor([p])
    p.grad = torch.ones_like(p)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["row_var"] = torch.full((4, 1), 1.001)
    opt.load_state_dict(saved)
    assert opt.state[p]["row_var"].dtype == torch.float32
    opt.step()
    assert opt.state[p]["row_var"].dtype == torch.float32
    assert 1.0 < float(opt.state[p]["row_var"][0]) < 1.001


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "row_var",
            torch.zeros(4),
            r"'row_var' of parameter 0 has shape \(4,\).* it must have \(4, 1\)",
        ),
        (
            "col_var",
            torch.zeros(4, 3),
            r"'col_var' of parameter 0 has shape \(4, 3\).* it must have \(1, 3\)",
        ),
        (
            "col_var",
            torch.zeros(1, 3, dtype=torch.complex64),
            "is torch.complex64, the parameter torch.float32",
        ),
        ("row_var", None, "has 'step' but no 'row_var'; a whole state has step, row_var, col_var"),
    ],
)
def test_wrong_checkpoints_are_refused(name: str, value: Any, message: str) -> None:
    params = [torch.ones(4, 3), torch.ones(3)]
    opt = onepass.Adafactor(params)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0][name] = value
    before = snapshot(opt)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(saved)
    assert snapshot(opt) == before


def test_a_vectors_checkpoint_is_none_of_a_matrix() -> None:
    vector, matrix = torch.ones(12), torch.ones(3, 4)
    vector.grad = torch.ones(12)
    opt = onepass.Adafactor([vector])
    opt.step()
    with pytest.raises(
        ValueError, match="holds 'variance', which belongs to another optimizer; Adafactor keeps"
    ):
        onepass.Adafactor([matrix]).load_state_dict(opt.state_dict())


# What it refuses.


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"lr": -0.1}, ValueError),
        ({"lr": torch.ones(2)}, ValueError),
        ({"beta2_decay": 0.1}, ValueError),
        ({"eps": (-1e-3, 1e-3)}, ValueError),
        ({"eps": (None, -1e-3)}, ValueError),
        ({"d": 0.5}, ValueError),
        ({"weight_decay": -0.1}, ValueError),
    ],
)
def test_options_are_refused_as_by_torch(options: dict[str, Any], error: type[Exception]) -> None:
    for library in (onepass, torch.optim):
        with pytest.raises(error):
            library.Adafactor([torch.ones(2, 2)], **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eps": (None,)}, ValueError, "eps must be two numbers"),
        ({"eps": ()}, ValueError, "eps must be two numbers"),
        ({"eps": 1e-3}, TypeError, "eps must be two numbers"),
        ({"eps": (None, None)}, TypeError, r"eps\[1\] must be a number, got None"),
        ({"eps": (NAN, 1e-3)}, ValueError, r"eps\[0\] must lie in"),
        ({"d": "2"}, TypeError, "d must be a number, got '2'"),
        ({"lr": NAN}, ValueError, "lr must lie in"),
        ({"maximize": "yes"}, TypeError, "maximize must be True or False"),
    ],
)
def test_options_that_make_no_sense(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        onepass.Adafactor([torch.ones(2, 2)], **options)


@pytest.mark.parametrize("shape", [(2, 2), (4,), ()])
@pytest.mark.parametrize("eager", [False, True], ids=["kernel", "eager"])
def test_complex_parameters_are_refused(shape: tuple[int, ...], eager: bool) -> None:
    params = [torch.ones(2, 2), torch.ones(shape, dtype=torch.complex64)]
    for library in (onepass, torch.optim):
        opt = library.Adafactor(params)
        if library is onepass and eager:
            on_eager_backend(opt)
        for p in params:
            p.grad = torch.ones_like(p)
        if library is onepass:
            refuses(
                opt,
                "Adafactor does not support complex parameters, and parameter 1 is torch.complex64",
                StepError,
            )
        else:
            with pytest.raises(RuntimeError):
                opt.step()


def test_sparse_gradients_are_refused() -> None:
    p = torch.ones(2, 2)
    p.grad = torch.ones(2, 2).to_sparse()
    refuses(onepass.Adafactor([p]), "sparse", StepError)


def test_a_changed_number_of_dimensions_is_noticed() -> None:
    """A matrix that has become a vector has the wrong state, and a vector that has become a
    matrix."""
    for before, after in (((12,), (3, 4)), ((3, 4), (12,))):
        p = nn.Parameter(torch.ones(before))
        p.grad = torch.ones(before)
        opt = onepass.Adafactor([p])
        opt.step()
        p.grad = None
        p.data = torch.ones(after)
        p.grad = torch.ones(after)
        opt.step()
        assert {"variance", "row_var", "col_var", "step"} == set(opt.state[p])


def test_tensors_as_learning_rates() -> None:
    ends = []
    for lr in (0.05, torch.tensor(0.05)):
        p = torch.ones(3, 4)
        opt = onepass.Adafactor([p], lr=lr)
        p.grad = torch.arange(12.0).view(3, 4)
        opt.step()
        ends.append(p)
    torch.testing.assert_close(*ends, rtol=1e-6, atol=0)
