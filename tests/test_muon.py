"""Muon: momentum made orthogonal against the polynomial in float64 and torch.optim, and AdamW for
what is not a matrix."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support.bare_kernels import assert_same_bits, flat
from support.side_by_side import refuses, snapshot
from table import UNIT, on_eager_backend
from torch import Tensor, nn

import onepass
from onepass import StepError, linalg
from onepass.kernel import has_bfloat16_products
from onepass.kernel.functions import call
from onepass.stepping import batching

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SHAPES = ((4, 3), (24, 40), (40, 24), (17, 17), (1, 7), (7, 1), (1, 1))
STEPS = 12
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"nesterov": False, "adjust_lr_fn": "original"},
    {"adjust_lr_fn": "match_rms_adamw", "momentum": 0.7, "weight_decay": 0.0},
    {"ns_steps": 3, "ns_coefficients": (3.0, -3.2, 1.2), "nesterov": False},
    {"eps": 3.0, "momentum": 0.0, "ns_steps": 1},
)
over_options = pytest.mark.parametrize("options", OPTIONS, ids=str)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """More would wait for each other: the matrices are small."""
    torch.set_num_threads(1)


@pytest.fixture
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in float32, as on processors without bfloat16."""
    monkeypatch.setattr(linalg, "has_bfloat16_products", lambda: False)


# The function.


def polynomial(
    x: np.ndarray, coefficients=COEFFICIENTS, eps: float = 1e-7, steps: int = 5
) -> np.ndarray:
    """Jordan's iteration in float64: each step maps the singular values by s -> a s + b s^3 + c
    s^5."""
    a, b, c = coefficients
    y = torch.from_numpy(x / max(np.linalg.norm(x), eps))
    for _ in range(steps):
        y = a * y + b * y @ y.T @ y + c * y @ y.T @ y @ y.T @ y
    return y.numpy()


def spread(dtype: torch.dtype, steps: int = 5, first: float = COEFFICIENTS[0]) -> float:
    """How far a result may lie from the polynomial's, relative to it, by Frobenius norms.

    A step multiplies small singular values, and the errors beside them, by its first coefficient.
    In bfloat16 that bound is more than all of the result, and 16 of its units are two and a half
    times what errors are seen to be.
    """
    return 16 * UNIT[dtype] if dtype == torch.bfloat16 else first**steps * UNIT[dtype]


def lies_within(got: Tensor, want: np.ndarray, share: float) -> bool:
    return bool(np.linalg.norm(got.double().numpy() - want) <= share * np.linalg.norm(want))


@pytest.mark.parametrize("fast", [False, True], ids=["full", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_newton_schulz_is_the_polynomial(
    dtype: torch.dtype, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wide, tall and square matrices, in stacks; the argument stays as it is, the result has its
    shape and type."""
    monkeypatch.setattr(linalg, "has_bfloat16_products", lambda: fast)
    works_in = torch.bfloat16 if fast and dtype == torch.float32 else dtype
    for shape in (*SHAPES, (128, 200)):
        x = torch.randn(3, *shape, dtype=dtype)
        before = x.clone()
        got = linalg.newton_schulz(x, *COEFFICIENTS, 1e-7, 5)
        assert torch.equal(x, before)
        assert (got.shape, got.dtype) == (x.shape, x.dtype)
        for one, matrix in zip(got, x, strict=True):
            assert lies_within(one, polynomial(matrix.double().numpy()), spread(works_in)), shape


def test_singular_values_end_around_one() -> None:
    """From a five-hundredth of the norm on; what is smaller grows by the first coefficient in each
    step."""
    for shape in ((64, 32), (20, 20)):
        u, _, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
        before = torch.logspace(0, -2.4, min(shape), dtype=torch.float64)
        after = linalg.newton_schulz(((u * before) @ v)[None], *COEFFICIENTS, 1e-7, 5)[0]
        found = torch.linalg.svdvals(after)
        assert float(found.min()) > 0.67
        assert float(found.max()) < 1.21
    tiny = torch.diag(torch.tensor([1.0, 1e-6], dtype=torch.float64))
    after = linalg.newton_schulz(tiny[None], *COEFFICIENTS, 1e-7, 5)[0]
    assert abs(float(after[1, 1]) / (1e-6 * COEFFICIENTS[0] ** 5) - 1) < 1e-3


def test_one_bad_matrix_spoils_no_other() -> None:
    x = torch.randn(4, 6, 5)
    x[1, 2, 3] = float("nan")
    x[2] = 0
    got = linalg.newton_schulz(x, *COEFFICIENTS, 1e-7, 5)
    assert got[1].isnan().all()
    assert (got[2] == 0).all()
    assert torch.equal(got[[0, 3]], linalg.newton_schulz(x[[0, 3]], *COEFFICIENTS, 1e-7, 5))


# The optimizer, against the paper and torch.


def reference(
    start: np.ndarray,
    gradients: Sequence[np.ndarray],
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_coefficients=COEFFICIENTS,
    eps: float = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: str | None = None,
) -> tuple[np.ndarray, np.ndarray, float]:
    """The weights and momentum after these gradients, and the length of all updates together."""
    p, b, length = start, np.zeros_like(start), 0.0
    n, m = p.shape
    ratio = (
        0.2 * np.sqrt(max(n, m)) if adjust_lr_fn == "match_rms_adamw" else np.sqrt(max(1.0, n / m))
    )
    for g in gradients:
        b = momentum * b + (1 - momentum) * g
        u = polynomial(
            (1 - momentum) * g + momentum * b if nesterov else b, ns_coefficients, eps, ns_steps
        )
        p = (1 - lr * weight_decay) * p - lr * ratio * u
        length += lr * ratio * np.linalg.norm(u)
    return p, b, length


def problem(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    random = torch.Generator().manual_seed(sum(shape))
    start, *gradients = (torch.randn(shape, generator=random).to(dtype) for _ in range(STEPS + 1))
    return start, gradients


def run(
    make: Callable[..., Any], start: Tensor, gradients: Sequence[Tensor], **options: Any
) -> tuple[Tensor, Tensor]:
    p = start.clone()
    optimizer = make([p], **options)
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    return p, optimizer.state[p]["momentum_buffer"]


def make_eager(params: Any, **options: Any) -> torch.optim.Optimizer:
    return on_eager_backend(onepass.Muon(params, **options))


def error(got: Tensor, want: np.ndarray) -> float:
    return float(np.linalg.norm(got.double().numpy() - want))


def check_reference(
    make: Callable[..., Any], dtype: torch.dtype, works_in: torch.dtype, options: dict[str, Any]
) -> None:
    """Updates err as their function does, and by where their argument's roundings lead; weights by
    their own."""
    steps, first = options.get("ns_steps", 5), options.get("ns_coefficients", COEFFICIENTS)[0]
    for shape in SHAPES:
        start, gradients = problem(shape, dtype)
        p, b = run(make, start, gradients, lr=0.05, **options)
        doubles = [g.double().numpy() for g in gradients]
        want_p, want_b, length = reference(start.double().numpy(), doubles, lr=0.05, **options)
        # What is stored is rounded in each step: weights and momentum of at most these lengths.
        unit, scale = UNIT[dtype], STEPS * (np.linalg.norm(start.double().numpy()) + length)
        share = spread(works_in, steps, first) + (0 if dtype == works_in else first**steps * unit)
        assert error(p, want_p) <= 2 * share * length + 4 * unit * scale, shape
        assert error(b, want_b) <= 8 * STEPS * unit * max(np.linalg.norm(g) for g in doubles), shape
        assert length > 0.01


@over_options
@pytest.mark.parametrize("make", [onepass.Muon, make_eager], ids=["kernel", "eager"])
def test_reference_in_float64(make: Callable[..., Any], options: dict[str, Any]) -> None:
    check_reference(make, torch.float64, torch.float64, options)
    start, gradients = problem((24, 40), torch.float64)
    got, _ = run(make, start, gradients, lr=0.05, **options)
    want, _, length = reference(start.numpy(), [g.numpy() for g in gradients], lr=0.05, **options)
    assert error(got, want) <= 1e-12 * length


@over_options
@pytest.mark.parametrize("make", [onepass.Muon, make_eager], ids=["kernel", "eager"])
@pytest.mark.usefixtures("full_precision")
def test_reference_in_float32(make: Callable[..., Any], options: dict[str, Any]) -> None:
    check_reference(make, torch.float32, torch.float32, options)


@over_options
@pytest.mark.parametrize("make", [onepass.Muon, make_eager], ids=["kernel", "eager"])
def test_reference_with_products_in_bfloat16(
    make: Callable[..., Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linalg, "has_bfloat16_products", lambda: True)
    check_reference(make, torch.float32, torch.bfloat16, options)


@over_options
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_torch(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Where torch.optim ends, whose products are in bfloat16 always: twice what such products may
    be off."""
    for shape in SHAPES:
        start, gradients = problem(shape, dtype)
        ours, momentum = run(onepass.Muon, start, gradients, lr=0.05, **options)
        theirs, their_momentum = run(torch.optim.Muon, start, gradients, lr=0.05, **options)
        _, _, length = reference(start.numpy(), [g.numpy() for g in gradients], lr=0.05, **options)
        assert error(ours, theirs.double().numpy()) <= 2 * spread(torch.bfloat16) * length
        torch.testing.assert_close(momentum, their_momentum, rtol=1e-5, atol=1e-6)


def test_torch_with_all_layouts() -> None:
    """Transposed parameters, slices, one at an odd address, frozen ones, and gradients that lie
    otherwise."""
    ends = []
    for library in (onepass, torch.optim):
        random = torch.Generator().manual_seed(0)
        whole = torch.randn(9, 12, generator=random)
        odd = bytearray(
            b"-" + torch.randn(30, generator=random).view(torch.uint8).numpy().tobytes()
        )
        params = [torch.randn(5, 8, generator=random).t(), whole[1:7:2, 3:8]]
        params += [
            torch.frombuffer(odd, dtype=torch.float32, offset=1).view(6, 5),
            torch.randn(6, 5, generator=random),
        ]
        optimizer = library.Muon(
            [{"params": params[:3]}, {"params": params[3:], "lr": 0.3}], lr=0.05
        )
        for step in range(5):
            for i, p in enumerate(params):
                g = torch.randn(p.mT.shape, generator=random).mT
                p.grad = None if (i + step) % 4 == 0 else g
            optimizer.step()
        ends.append([*params, whole])
    for ours, theirs in zip(*ends, strict=True):
        assert ours.stride() == theirs.stride()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=5 * 0.3 * 2 * spread(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_momentum_of_low_precision_is_a_running_mean(dtype: torch.dtype) -> None:
    """Each step rounds it once. torch, with bfloat16 and without nesterov, divides its own by its
    norm as it goes."""
    start, gradients = problem((24, 40), dtype)
    options = {"nesterov": False, "momentum": 0.9, "lr": 0.05}
    doubles = [g.double().numpy() for g in gradients]
    want_p, want, length = reference(start.double().numpy(), doubles, **options)
    p, momentum = run(onepass.Muon, start, gradients, **options)
    # A mean of errors, each of at most half a unit of a number no larger than the largest
    # gradients.
    assert np.abs(momentum.double().numpy() - want).max() <= 10 * UNIT[dtype] * np.abs(want).max()
    assert error(p, want_p) <= 4 * spread(torch.bfloat16) * length + STEPS * UNIT[
        dtype
    ] * np.linalg.norm(want_p)
    _, theirs = run(torch.optim.Muon, start, gradients, **options)
    if dtype == torch.bfloat16:
        assert abs(float(theirs.double().norm()) - 1) < 0.02
        assert np.linalg.norm(want) > 5


@pytest.mark.parametrize("options", [{}, {"lr": 0.0}])
@pytest.mark.parametrize("make", [onepass.Muon, make_eager], ids=["kernel", "eager"])
def test_no_gradient_and_no_rate_change_nothing(
    make: Callable[..., Any], options: dict[str, Any]
) -> None:
    """A gradient of zeros makes no update; without weight decay, or with lr = 0, every bit
    stays."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        start = torch.tensor([[0.0, -0.0, 1.0], [1e-42, -3.0, 65504.0]], dtype=torch.float64).to(
            dtype
        )
        for sign in (0.0, -0.0):
            p = start.clone()
            optimizer = make([p], **({"weight_decay": 0.0} | options))
            for _ in range(3):
                p.grad = torch.full_like(p, sign)
                optimizer.step()
            assert torch.equal(p, start)
            assert options == {} or flat(p).tobytes() == flat(start).tobytes()


# In company.


def steps(
    optimizer: torch.optim.Optimizer, params: Sequence[Tensor], count: int = 3, seed: int = 0
) -> None:
    for step in range(count):
        for i, p in enumerate(params):
            random = torch.Generator().manual_seed(1000 * seed + 100 * step + i)
            p.grad = torch.randn(p.shape, generator=random, dtype=p.dtype)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("fast", [False, True], ids=["full", "bfloat16"])
def test_company(dtype: torch.dtype, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many matrices of one shape in one call, in groups with rates of their own, or each alone.

    The kernels' part has the same bits; how a library multiplies a stack of matrices it may choose
    by their number, so products agree within their own rounding.
    """
    monkeypatch.setattr(linalg, "has_bfloat16_products", lambda: fast)
    works_in = torch.bfloat16 if fast and dtype == torch.float32 else dtype
    start = [
        torch.randn(shape, dtype=dtype) for shape in [(24, 40), (40, 24), (24, 40), (5, 5)] * 4
    ]
    together = [p.clone() for p in start]
    optimizer = onepass.Muon(
        [{"params": together[:5], "lr": 0.05}, {"params": together[5:]}, {"params": []}], lr=0.01
    )
    steps(optimizer, together)
    alone = [p.clone() for p in start]
    for i, p in enumerate(alone):
        mine = onepass.Muon([p], lr=0.05 if i < 5 else 0.01)
        for step in range(3):
            p.grad = torch.randn(
                p.shape, generator=torch.Generator().manual_seed(100 * step + i), dtype=dtype
            )
            mine.step()
        assert_same_bits(
            flat(mine.state[p]["momentum_buffer"]),
            flat(optimizer.state[together[i]]["momentum_buffer"]),
            "momentum",
        )
        length = 3 * (0.05 if i < 5 else 0.01) * np.sqrt(p.numel())
        assert (
            error(together[i], p.double().numpy())
            <= 2 * spread(works_in) * length + 8 * UNIT[dtype] * p.norm()
        )


def test_calls_take_a_bounded_number_of_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of one shape go in several calls where they are many; what becomes of them is the
    same."""
    ends = []
    for most in (batching.MOST_ELEMENTS, 130):
        monkeypatch.setattr(batching, "MOST_ELEMENTS", most)
        random = torch.Generator().manual_seed(0)
        params = [torch.randn(6, 10, generator=random, dtype=torch.float64) for _ in range(5)]
        params.append(torch.randn(20, 10, generator=random, dtype=torch.float64))
        optimizer = onepass.Muon(params, lr=0.05)
        steps(optimizer, params)
        assert len(optimizer._onepass.plan.kernels) == (2 if most > 130 else 4)
        ends.append(params)
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_options_of_groups() -> None:
    """Steps and coefficients differ between groups, and matrices of one shape do as their groups
    say."""
    options = [
        {"ns_steps": 3},
        {"ns_coefficients": (3.0, -3.2, 1.2)},
        {"momentum": 0.5},
        {"nesterov": False},
        {},
    ]
    start = [torch.randn(6, 10, dtype=torch.float64) for _ in options]
    together = [p.clone() for p in start]
    optimizer = onepass.Muon(
        [{"params": [p], **o} for p, o in zip(together, options, strict=True)], lr=0.05
    )
    steps(optimizer, together)
    for i, (p, o) in enumerate(zip(start, options, strict=True)):
        mine = onepass.Muon([p], lr=0.05, **o)
        for step in range(3):
            p.grad = torch.randn(
                p.shape, generator=torch.Generator().manual_seed(100 * step + i), dtype=p.dtype
            )
            mine.step()
        torch.testing.assert_close(together[i], p, rtol=1e-12, atol=1e-12)


# AdamW for what is not a matrix.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("eager", [False, True], ids=["kernel", "eager"])
def test_adamw_has_the_bits_of_adamw(dtype: torch.dtype, eager: bool) -> None:
    shapes = [(5,), (), (4, 3), (2, 3, 4), (2, 3, 4, 5)]
    ends = []
    for make in (
        lambda params: onepass.Muon(
            params, lr=0.02, weight_decay=0.2, use_muon=False, betas=(0.8, 0.7), adam_eps=0.1
        ),
        lambda params: onepass.AdamW(params, lr=0.02, weight_decay=0.2, betas=(0.8, 0.7), eps=0.1),
    ):
        random = torch.Generator().manual_seed(0)
        params = [torch.randn(shape, generator=random, dtype=dtype) for shape in shapes]
        optimizer = on_eager_backend(make(params)) if eager else make(params)
        steps(optimizer, params)
        ends.append(
            [
                flat(t)
                for p in params
                for t in (p, *(t for _, t in sorted(optimizer.state[p].items())))
            ]
        )
    for muon, adamw in zip(*ends, strict=True):
        assert_same_bits(muon, adamw, "AdamW")


def test_who_takes_what() -> None:
    """None: matrices take Muon, all else AdamW; True and False decide for a group."""
    shapes = [(5,), (4, 3), (2, 3, 4, 5), (), (6, 6)]
    params = [torch.ones(shape) for shape in shapes]
    decided = [torch.ones(3, 4), torch.ones(3, 4)]
    optimizer = onepass.Muon(
        [
            {"params": params},
            {"params": decided[:1], "use_muon": False},
            {"params": decided[1:], "use_muon": True},
        ],
        use_muon=None,
    )
    steps(optimizer, [*params, *decided])
    adamw, muon = {"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"}
    found = [set(optimizer.state[p]) for p in (*params, *decided)]
    assert found == [adamw, muon, adamw, adamw, muon, adamw, muon]


def test_switching_between_steps() -> None:
    """A group that goes over to AdamW begins it anew, and comes back to the momentum that it
    left."""
    start = torch.randn(4, 3)
    p = start.clone()
    optimizer = onepass.Muon([p], lr=0.05)
    group = optimizer.param_groups[0]
    steps(optimizer, [p], 2, seed=1)
    momentum = optimizer.state[p]["momentum_buffer"].clone()
    q = p.clone()
    group["use_muon"] = False
    steps(optimizer, [p], 2, seed=2)
    steps(onepass.AdamW([q], lr=0.05, weight_decay=0.1, betas=(0.9, 0.95)), [q], 2, seed=2)
    assert torch.equal(p, q)
    assert torch.equal(optimizer.state[p]["momentum_buffer"], momentum)
    saved = copy.deepcopy(optimizer.state_dict())
    group["use_muon"] = None
    steps(optimizer, [p], 1, seed=3)
    other = onepass.Muon([q])
    other.load_state_dict(saved)
    assert other.param_groups[0]["use_muon"] is False
    other.param_groups[0]["use_muon"] = True
    steps(other, [q], 1, seed=3)
    assert torch.equal(p, q)
    assert not torch.equal(optimizer.state[p]["momentum_buffer"], momentum)
    assert optimizer.state[p]["step"] == 2


# What fails, and what is refused.

fails = [False]


def fragile(matrices: Tensor) -> Tensor:
    if fails[0] and matrices.shape[-1] == 6:
        raise MemoryError("no memory for matrices")
    return matrices


class Fragile(onepass.Muon):
    """Muon with another function of matrices, which may fail."""

    @staticmethod
    def rule(p, g, momentum_buffer, *, lr, momentum):
        b = momentum * momentum_buffer + g
        return {"p": p - lr * call(fragile, b), "momentum_buffer": b}

    def rule_of(self, p: Tensor, group: Any) -> Any:
        return Fragile.rule if p.dim() == 2 else onepass.Muon.adamw


def test_a_failing_function_leaves_matrices_and_vectors_as_they_were() -> None:
    """Weights, momentum, moments and step counts: in the first step, which made them, and in later
    ones."""
    ends = []
    for disturbed in (True, False):
        random = torch.Generator().manual_seed(0)
        params = [
            torch.randn(shape, generator=random)
            for shape in ((4, 3), (5,), (6, 6), (2, 3, 4), (3, 4))
        ]
        optimizer = Fragile(params, use_muon=None)
        for step in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=random)
            if disturbed and step in (0, 2):
                fails[0] = True
                refuses(optimizer, "no memory for matrices", MemoryError)
                fails[0] = False
            optimizer.step()
        ends.append(
            [
                flat(t)
                for p in params
                for t in (p, *(t for _, t in sorted(optimizer.state[p].items())))
            ]
        )
    for a, b in zip(*ends, strict=True):
        assert_same_bits(a, b, "after a failure")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr must lie in"),
        ({"lr": torch.ones(2)}, "Tensor lr must be 1-element"),
        ({"weight_decay": -0.1}, "weight_decay must lie in"),
        ({"momentum": -0.1}, "momentum must lie in"),
        (
            {"adjust_lr_fn": "other"},
            "adjust_lr_fn must be 'original', 'match_rms_adamw' or None, got 'other'",
        ),
    ],
)
def test_options_are_refused_as_by_torch(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        onepass.Muon([torch.ones(2, 2)], **options)
    with pytest.raises(ValueError):  # noqa: PT011
        torch.optim.Muon([torch.ones(2, 2)], **options)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        (
            {"ns_steps": 100},
            ValueError,
            r"Invalid ns_steps value: 100; ns_steps must lie in \[0, 100\)",
        ),
        (
            {"ns_steps": -1},
            ValueError,
            r"Invalid ns_steps value: -1; ns_steps must lie in \[0, 100\)",
        ),
        ({"ns_steps": 2.5}, ValueError, "ns_steps must be a whole number, got 2.5"),
        ({"ns_steps": "5"}, TypeError, "ns_steps must be a number, got '5'"),
        (
            {"ns_coefficients": (1.0, 2.0)},
            ValueError,
            r"ns_coefficients must be three numbers, got \(1.0, 2.0\)",
        ),
        ({"ns_coefficients": 3.0}, ValueError, "ns_coefficients must be three numbers, got 3.0"),
        (
            {"ns_coefficients": (1.0, 2.0, "x")},
            TypeError,
            r"ns_coefficients\[2\] must be a number, got 'x'",
        ),
        ({"eps": -1e-7}, ValueError, "eps must lie in"),
        ({"adam_eps": -1e-7}, ValueError, "adam_eps must lie in"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must lie in \[0, 1\)"),
        ({"nesterov": "yes"}, TypeError, "nesterov must be True or False"),
        ({"use_muon": "yes"}, TypeError, "use_muon must be True or False"),
    ],
)
def test_options_that_make_no_sense(
    options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        onepass.Muon([torch.ones(2, 2)], **options)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3,), (), (2, 3, 4)])
def test_muon_alone_takes_matrices_alone(shape: tuple[int, ...]) -> None:
    """As in torch, with the advice what to do; a later group as the first one, and a group that
    changes its mind."""
    advice = (
        "only supports 2D parameters, and one has shape .*; pass use_muon=None to let what is "
        "not a matrix take AdamW"
    )
    for library in (onepass, torch.optim):
        with pytest.raises(ValueError, match="only supports 2D parameters"):
            library.Muon([torch.ones(2, 2), torch.ones(shape)])
    with pytest.raises(ValueError, match=advice):
        onepass.Muon([torch.ones(shape)])
    optimizer = onepass.Muon([torch.ones(2, 2)])
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=advice):
        optimizer.add_param_group({"params": [torch.ones(shape)]})
    assert snapshot(optimizer) == before
    p = torch.ones(shape)
    optimizer.add_param_group({"params": [p], "use_muon": None})
    steps(optimizer, [optimizer.param_groups[0]["params"][0], p])
    optimizer.param_groups[1]["use_muon"] = True
    refuses(optimizer, advice, ValueError)


def test_complex_and_sparse_are_refused() -> None:
    p = torch.ones(2, 2, dtype=torch.complex64)
    p.grad = torch.ones_like(p)
    refuses(
        onepass.Muon([p]), "Muon does not support complex parameters, and parameter 0 is", StepError
    )
    p = torch.ones(2, 2)
    p.grad = torch.ones(2, 2).to_sparse()
    refuses(onepass.Muon([p]), "sparse", StepError)


# Checkpoints.


@pytest.mark.parametrize("crossing", [3, 7])
@pytest.mark.parametrize("begin", [onepass, torch.optim], ids=["onepass first", "torch first"])
def test_checkpoints_cross_to_torch_and_back(begin: Any, crossing: int) -> None:
    """Options, rates and momentum cross; the weights end where torch alone ends, as close as
    products allow."""
    ends = []
    for crosses in (True, False):
        random = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(shape, generator=random)) for shape in SHAPES]
        library = begin if crosses else torch.optim
        optimizer = library.Muon(params, lr=0.05, weight_decay=0.2, nesterov=False)
        for step in range(STEPS):
            if crosses and step == crossing:
                other = torch.optim if begin is onepass else onepass
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = other.Muon(params, lr=3.0)
                optimizer.load_state_dict(state)
            for p in params:
                p.grad = torch.randn(p.shape, generator=random)
            optimizer.step()
        ends.append([(p.detach(), optimizer.state[p]["momentum_buffer"]) for p in params])
    for (p, b), (q, c) in zip(*ends, strict=True):
        length = 0.05 * STEPS * max(1.0, p.shape[0] / p.shape[1]) ** 0.5 * 1.2 * min(p.shape) ** 0.5
        assert error(p, q.double().numpy()) <= 2 * spread(torch.bfloat16) * length
        torch.testing.assert_close(b, c, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "file"])
def test_copies_go_on_alike(way: str) -> None:
    random = torch.Generator().manual_seed(0)
    params = [
        nn.Parameter(torch.randn(shape, generator=random)) for shape in ((4, 3), (5,), (4, 3), ())
    ]
    optimizer = onepass.Muon(params, use_muon=None)
    steps(optimizer, params)
    if way == "file":
        others = [nn.Parameter(p.detach().clone()) for p in params]
        other = onepass.Muon(others, use_muon=None)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
    else:
        both = (params, optimizer)
        others, other = (
            copy.deepcopy(both) if way == "deepcopy" else pickle.loads(pickle.dumps(both))
        )
    steps(optimizer, params, 2, seed=5)
    steps(other, others, 2, seed=5)
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        for name in optimizer.state[p]:
            assert torch.equal(optimizer.state[p][name], other.state[q][name])


def test_wrong_checkpoints_are_refused() -> None:
    p = torch.ones(4, 3)
    optimizer = onepass.Muon([p])
    steps(optimizer, [p])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["momentum_buffer"] = torch.zeros(3, 4)
    before = snapshot(optimizer)
    with pytest.raises(
        ValueError, match=r"'momentum_buffer' of parameter 0 has shape \(3, 4\), the parameter has"
    ):
        optimizer.load_state_dict(saved)
    assert snapshot(optimizer) == before


def test_the_processor_decides_about_products() -> None:
    """Float64 matrices are multiplied in float64 everywhere."""
    assert isinstance(has_bfloat16_products(), bool)
    p, q = torch.randn(8, 8, dtype=torch.float64), torch.randn(8, 8)
    for x in (p, q):
        exact = polynomial(x.double().numpy())
        share = error(
            linalg.newton_schulz(x[None], *COEFFICIENTS, 1e-7, 5)[0], exact
        ) / np.linalg.norm(exact)
        works_in = (
            torch.bfloat16 if x.dtype == torch.float32 and has_bfloat16_products() else x.dtype
        )
        assert share <= spread(works_in)
        assert works_in != torch.bfloat16 or share > spread(torch.float32)
