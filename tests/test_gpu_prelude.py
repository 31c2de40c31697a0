"""The functions that Triton does not have, as the generated kernels have them: against NumPy's and
C's."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from support.bare_kernels import NAN, assert_same_bits
from support.interpreted_gpu import interpreted

from onepass.kernel.gpu.expressions import PRELUDE
from onepass.kernel.gpu.jit import Function, Source, load
from onepass.kernel.gpu.jit import launch as start


@pytest.fixture(autouse=True, scope="module")
def _on_the_device() -> Iterator[None]:
    with interpreted():
        yield


EACH = """

@triton.jit
def each(x, y, z, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + at, at < count)
    b = tl.load(y + at, at < count)
    tl.store(z + at, {}, at < count)
"""


def prelude(expression: str, a: np.ndarray, b: np.ndarray | None = None) -> np.ndarray:
    """A function of the prelude for each pair of numbers."""
    kind = {np.dtype(np.float64): "*fp64", np.dtype(np.float32): "*fp32"}[a.dtype]
    arguments = (*((name, kind) for name in "xyz"), ("count", "i32"))
    function = Function("each", arguments, (("BLOCK", 1024),), 1)
    module = load(Source(PRELUDE + EACH.format(expression), (function,)))
    z = torch.empty(len(a), dtype=torch.from_numpy(a).dtype)
    x, y = (torch.from_numpy(np.ascontiguousarray(values)) for values in (a, a if b is None else b))
    start(module, function, -(-len(a) // 1024), x, y, z, len(a))
    return z.numpy()


def test_halves_go_to_even(rng: np.random.Generator) -> None:
    for dtype, large in ((np.float32, 2.0**23), (np.float64, 2.0**52)):
        near = np.array(
            [
                0.0,
                0.5,
                1.5,
                2.5,
                1e-40,
                0.49999997,
                large / 2 + 0.5,
                large - 0.5,
                large,
                large * 3,
                1e30,
            ]
        )
        bits = rng.integers(0, 1 << 32, 20000, np.uint64).astype(np.uint32).view(np.float32)
        values = np.concatenate(
            [
                near,
                near + 1,
                rng.standard_normal(2000) * 100,
                np.arange(200) / 2,
                bits,
                [np.inf, NAN],
            ]
        )
        values = values.astype(dtype)
        values = np.concatenate([values, -values])
        assert_same_bits(prelude("round_to_even(a)", values), np.rint(values), "round_to_even")


def test_the_larger_one_is_no_number_if_one_is_none() -> None:
    values = np.array([0.0, 1.0, 2.0, 5e-324, math.inf, NAN])
    a, b = np.repeat(values, len(values)), np.tile(values, len(values))
    assert_same_bits(prelude("larger(a, b)", a, b), np.maximum(a, b), "larger")


def c_power(x: float, y: float) -> float:
    try:
        return math.pow(x, y)
    except (ValueError, OverflowError):
        with np.errstate(all="ignore"):
            return float(np.power(np.float64(x), np.float64(y)))


def test_powers_of_special_numbers_are_as_in_c() -> None:
    """Zeros, infinities, NaN and signs, bit for bit."""
    limits = [0.0, 1.0, math.inf, NAN]
    values = np.array([*limits, 2.0, 3.0, 0.5, 1.5, 5e-324, 1e308, 2.0**60])
    values = np.concatenate([values, -values])
    a, b = np.repeat(values, len(values)), np.tile(values, len(values))
    want = np.array([c_power(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)])
    exact = ~np.isfinite(want) | (want == 0) | (abs(want) == 1) | (b == 1)
    got = prelude("power(a, b)", a, b)
    assert_same_bits(got[exact], want[exact], "power")
    assert (np.signbit(got) == np.signbit(want))[~np.isnan(want)].all()


def test_powers_err_by_what_the_exponent_is_rounded(rng: np.random.Generator) -> None:
    """log errs by 1 unit, its product with y by half a unit, and exp by 1 unit beside: at most 1 +
    1.5 |y log x|."""
    x = np.concatenate(
        [
            rng.uniform(0, 1, 4000),
            1 - 10.0 ** rng.uniform(-8, 0, 4000),
            10.0 ** rng.uniform(-9, 9, 4000),
        ]
    )
    y = np.concatenate([rng.integers(0, 10000, 6000), rng.uniform(-2, 2, 6000)]).astype(np.float64)
    want = np.array([c_power(a, b) for a, b in zip(x.tolist(), y.tolist(), strict=True)])
    normal = (want > 1e-290) & (want < 1e290)
    got = prelude("power(a, b)", x, y)
    # And half a unit of C's own.
    bound = (1.5 + 1.5 * abs(y * np.log(x))) * 2.0**-52 * want
    assert (abs(got - want) <= bound)[normal].all()
    assert normal.sum() > 8000
