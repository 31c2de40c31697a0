"""Storage formats: every number of every format comes back as torch has it, and is rounded as torch
rounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.bare_kernels import assert_same_bits, compiled, encode, flat, is_same, launch

from onepass.kernel import bind, finish, trace


def store(p, g, *, lr):
    return {"p": g}


def stored_as(format: str, values: np.ndarray, source: str = "float32") -> np.ndarray:
    """Numbers of one format, put by a kernel into a column of another."""
    graph = finish(trace(store, (("lr", ("float",)),)), exact=False)
    kernel = compiled(bind(graph, (("p", format), ("g", source))))
    columns = {"p": encode(np.zeros(len(values)), format), "g": values}
    return launch(kernel, [columns], [{"lr": 0.0}])[0]["p"]


LOW_HALVES = (
    0x0000,
    0x0001,
    0x0FFF,
    0x1000,
    0x1001,
    0x2000,
    0x7FFF,
    0x8000,
    0x8001,
    0xC000,
    0xFFFF,
)


@pytest.mark.parametrize("format", ["bfloat16", "float16"])
def test_narrow_formats_round_as_torch(format: str) -> None:
    """All 65536 upper halves of a float32, with lower halves below, at and above each tie."""
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    for low in LOW_HALVES:
        values = (high | np.uint32(low)).view(np.float32)
        want = flat(torch.from_numpy(values).to(getattr(torch, format)))
        assert_same_bits(stored_as(format, values), want, f"low half {low:#x}")


@pytest.mark.slow
def test_all_float32_round_as_torch() -> None:
    """Every float32 there is, four million at a time."""
    for high in range(0, 1 << 16, 64):
        values = (
            (np.arange(high << 16, (high + 64) << 16, dtype=np.uint64))
            .astype(np.uint32)
            .view(np.float32)
        )
        assert_same_bits(
            stored_as("float16", values), flat(torch.from_numpy(values).half()), f"{high:#x}"
        )
        assert_same_bits(
            stored_as("bfloat16", values), flat(torch.from_numpy(values).bfloat16()), f"{high:#x}"
        )


@pytest.mark.parametrize("format", ["bfloat16", "float16"])
def test_narrow_formats_come_back(format: str) -> None:
    """All 65536 numbers of a format are decoded to what torch says they are, and stored as they
    were."""
    stored = np.arange(1 << 16, dtype=np.uint16)
    stored = stored if format == "bfloat16" else stored.view(np.float16)
    tensor = torch.from_numpy(np.arange(1 << 16, dtype=np.uint16).view(np.int16)).view(
        getattr(torch, format)
    )
    assert_same_bits(stored_as("float32", stored, source=format), flat(tensor.float()), "decoded")
    assert is_same(stored_as(format, stored, source=format), stored)
