"""Kernels without optimizers: programs of the table's rows, columns in raw memory, and launches on
them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from table import Row

from onepass.app.explain import explanation as explain
from onepass.kernel import Graph, bind, shape_at
from onepass.kernel.cpu import launch as cpu
from onepass.kernel.cpu.launch import Kernel
from onepass.kernel.graph.trace import Program
from support.interpreter import interpret

# How NumPy sees what is stored: bfloat16 as its bits.
STORED = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
}
SIZES = (0, 1, 3, 15, 16, 17, 31, 1000, 32767, 32768, 32769, 100003)
NAN, INF = float("nan"), float("inf")
# Around each format's limits: subnormals, the smallest and largest numbers, what overflows, and
# what is none.
SPECIAL = (
    *(0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, 0.1, -3.0, 0.125, -0.375),
    *(
        1e-45,
        -1e-42,
        1.1754944e-38,
        -1.1754942e-38,
        3.4028235e38,
        -3.4e38,
        1e30,
        -1e-30,
        1e19,
        1e-20,
    ),
    *(5.960464e-08, -6.0e-05, 65504.0, -65519.0, 65520.0, 9.2e-41, 3.3895314e38, 3.3961775e38),
)

# States that are sums, means or maxima of squares or sizes.
NOT_NEGATIVE = (
    "exp_avg_sq",
    "max_exp_avg_sq",
    "sum",
    "square_avg",
    "acc_delta",
    "exp_inf",
    "step_size",
)
NOT_NEGATIVE += ("row_var", "col_var", "variance")
# A tensor's number of elements, or its numbers of matrices, rows and columns.
Size = int | tuple[int, int, int]


def graph_of(row: Row) -> Graph:
    """A row's rule as the optimizer has it traced and finished."""
    return explain.graph_of(row.make([torch.zeros(1)]))


def program_of(graph: Graph, p: str, g: str, state: str) -> Program:
    """The graph bound to storage formats: p's, g's, and that of all states."""
    formats = {"p": p, "g": g} | dict.fromkeys(graph.state, state)
    return bind(graph, tuple(formats.items()))


def hypers_of(
    row: Row, graph: Graph, step: float = 1, first: bool = False, **changed: Any
) -> dict[str, float]:
    """A row's options as the numbers that its graph asks for, and this step's; of scalars, what
    they begin with."""
    optimizer = row.make([torch.zeros(1)])
    group = optimizer.param_groups[0]
    begin = {
        name: optimizer.initial_state(name, torch.zeros(()), group) for name, _ in graph.scalars
    }
    group = group | begin | changed | {"step": step, "first": float(first)}
    values = {}
    for name in graph.hypers:
        key, _, index = name.partition(".")
        values[name] = float(group[key][int(index)] if index else group[key])
    return values


def encode(values: np.ndarray, format: str) -> np.ndarray:
    """Float64 numbers as they are stored, rounded by torch."""
    if format == "bfloat16":
        return torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    with np.errstate(all="ignore"):
        return values.astype(STORED[format])


def random_columns(
    rng: np.random.Generator, program: Program, size: Size, special: float = 0.5
) -> dict[str, np.ndarray]:
    """A tensor's columns: ordinary numbers, with special ones among them; squares and sizes are not
    negative."""
    columns = {}
    for column in program.columns:
        n = size if isinstance(size, int) else math.prod(shape_at(column.rank, size))
        values = rng.standard_normal(n) * 10.0 ** rng.integers(-3, 2, n)
        values = np.where(rng.random(n) < special, rng.choice(SPECIAL, n), values)
        columns[column.name] = encode(
            np.abs(values) if column.name in NOT_NEGATIVE else values, column.format.name
        )
    return columns


def flat(t: torch.Tensor) -> np.ndarray:
    """A tensor's elements as the kernels see them: complex numbers as pairs, bfloat16 as bits."""
    t = t.detach()
    t = (torch.view_as_real(t) if t.is_complex() else t).reshape(-1)
    return t.view(torch.int16).numpy().view(np.uint16) if t.dtype == torch.bfloat16 else t.numpy()


class Memory:
    """Arrays copied to places of our choosing in one stretch of bytes, each between guards that
    nobody may touch."""

    GUARD = 64
    # A large number in every format, and none when rounded: what is read from a guard shows.
    PATTERN = 0xCB

    def __init__(self, arrays: Sequence[np.ndarray], misaligned: int = 0) -> None:
        """`misaligned` bytes lie between a multiple of 64 and each array's beginning."""
        stride = [-(-(a.nbytes + misaligned + self.GUARD) // 64) * 64 for a in arrays]
        self.bytes = np.full(sum(stride) + 128, self.PATTERN, np.uint8)
        base = self.bytes.ctypes.data
        place = -base % 64 + misaligned
        self.guarded = np.ones(len(self.bytes), np.bool_)
        self.views, self.addresses = [], []
        for a, step in zip(arrays, stride, strict=True):
            view = self.bytes[place : place + a.nbytes]
            view[:] = np.ascontiguousarray(a).view(np.uint8)
            self.guarded[place : place + a.nbytes] = False
            self.views.append(view)
            self.addresses.append(base + place)
            place += step
        self.types = [a.dtype for a in arrays]

    def read(self) -> list[np.ndarray]:
        """Copies of the arrays as they are now; the guards must be whole."""
        assert (self.bytes[self.guarded] == self.PATTERN).all(), (
            "memory beside a tensor was written"
        )
        return [
            np.frombuffer(view.tobytes(), t) for view, t in zip(self.views, self.types, strict=True)
        ]


def launch(
    kernel: Kernel,
    tensors: Sequence[Mapping[str, np.ndarray]],
    hypers: Sequence[Mapping[str, float]],
    rows: Sequence[int] | None = None,
    threads: int = 2,
    misaligned: int = 0,
    sizes: Sequence[Size] | None = None,
) -> list[dict[str, np.ndarray]]:
    """All columns and scalars of all tensors after one launch; what only is read must not have
    changed."""
    columns = kernel.program.columns
    numel = np.array([len(t["p"]) for t in tensors] if sizes is None else sizes, np.int64)
    memory = Memory([t[c.name] for c in columns for t in tensors], misaligned)
    pointers = np.array(memory.addresses, np.uint64).reshape(len(columns), len(tensors))
    which = np.zeros(len(tensors), np.int64) if rows is None else np.array(rows, np.int64)
    prepared = kernel.prepare(pointers, kernel.split(numel), which, len(hypers))
    for name in kernel.program.hypers:
        prepared.leaves[kernel.leaves[name]] = [h[name] for h in hypers]
    prepared.run(threads)
    arrays = memory.read()
    n = len(tensors)
    after = [{c.name: arrays[k * n + i] for k, c in enumerate(columns)} for i in range(n)]
    for before, now in zip(tensors, after, strict=True):
        for c in columns:
            assert c.written or before[c.name].tobytes() == now[c.name].tobytes(), (
                f"{c.name} is read only"
            )
    for name, numbers in prepared.scalars().items():
        for i in range(n):
            after[i][name] = np.asarray(numbers[i : i + 1], cpu.COMPUTE[kernel.program.compute])
    return after


@lru_cache(maxsize=256)
def compiled(program: Program) -> Kernel:
    """The program's kernel, the same that optimizers use."""
    return cpu.make_kernel(program)


def check_oracle(
    kernel: Kernel,
    tensors: Sequence[Mapping[str, np.ndarray]],
    hypers: Sequence[Mapping[str, float]],
    rows: Sequence[int] | None = None,
    sizes: Sequence[tuple[int, int, int]] | None = None,
    **how: Any,
) -> list[dict[str, np.ndarray]]:
    """Launch, and compare every stored bit with the interpreter's."""
    after = launch(kernel, tensors, hypers, rows, sizes=sizes, **how)
    for i, (before, now) in enumerate(zip(tensors, after, strict=True)):
        size = sizes[i] if sizes else None
        wanted = interpret(kernel.program, before, hypers[0 if rows is None else rows[i]], size)
        for name, want in wanted.items():
            assert_same_bits(
                now[name], want, f"{kernel.program.name}: {name} of a tensor of {size or len(want)}"
            )
    return after


def bits(a: np.ndarray) -> np.ndarray:
    """An array's bits, with one pattern for all NaNs: which of two NaNs' payloads survives is not
    specified."""
    unsigned = a.view(f"u{a.itemsize}")
    if a.dtype == np.uint16:
        return np.where((a & 0x7FFF) > 0x7F80, np.uint16(0x7FC0), a)
    return np.where(np.isnan(a), np.array(NAN, a.dtype).view(unsigned.dtype), unsigned)


def assert_same_bits(got: np.ndarray, want: np.ndarray, what: str) -> None:
    """Fail with the first few places where two arrays differ."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    differ = np.flatnonzero(bits(got) != bits(want))
    if len(differ):
        few = [(int(i), got[i].item(), want[i].item()) for i in differ[:5]]
        raise AssertionError(f"{what}: {len(differ)} elements differ, (index, got, want): {few}")


def is_same(got: np.ndarray, want: np.ndarray) -> bool:
    """Whether two arrays have the same bits."""
    return bool((bits(got) == bits(want)).all())
