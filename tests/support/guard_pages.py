"""Tensors that border on memory nobody may touch: a read or write beside them ends the process by
SIGSEGV.

`python tests/support/guard_pages.py SEED ROUNDS` runs this many random rounds. A round steps an
optimizer whose parameters, gradients and state all lie so, and once more on ordinary memory; both
must end with the same bits.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import math
import mmap
import random
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a program has no pytest that says where tests are
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

import onepass
from onepass.kernel.cpu import launch as cpu
from onepass.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn
from support.state_machine import KINDS, Kind

PAGE = mmap.PAGESIZE
NO_ACCESS, READ_AND_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_size_t]
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

VECTORS = ((1,), (3,), (7,), (16,), (17,), (100,), (), (4097,), (32769,))
MATRICES = ((3, 5), (33, 65), (1, 7), (7, 1), (1, 1), (16, 16), (17, 3))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
LAYOUTS = ("dense", "transposed", "holes")


class Region:
    """Memory for some bytes, which end where a page without access begins, or begin where one
    ends."""

    def __init__(self, size: int, at_end: bool, gap: int) -> None:
        """`gap` bytes lie between them and the page."""
        inner = -(-(size + gap) // PAGE) * PAGE or PAGE
        self.length = inner + 2 * PAGE
        self.base = LIBC.mmap(
            None, self.length, NO_ACCESS, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
        )
        assert self.base not in (None, ctypes.c_void_p(-1).value), "mmap failed"
        assert LIBC.mprotect(self.base + PAGE, inner, READ_AND_WRITE) == 0
        self.address = self.base + PAGE + (inner - size - gap if at_end else gap)

    def unmap(self) -> None:
        assert LIBC.munmap(self.base, self.length) == 0


@dataclass
class Guard:
    """Where tensors are put: at the end of their memory or at its beginning, so many bytes away; or
    nowhere special."""

    guarded: bool = True
    at_end: bool = True
    gap: int = 0
    regions: list[Region] = field(default_factory=list)

    def place(self, t: Tensor) -> Tensor:
        """A copy of a tensor, in guarded memory, with the same strides but without memory that it
        does not use."""
        t = t.detach()
        span = (
            1 + sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True))
            if t.numel()
            else 0
        )
        if not self.guarded or not span:
            return torch.empty(span, dtype=t.dtype).as_strided(t.shape, t.stride()).copy_(t)
        region = Region(span * t.itemsize, self.at_end, self.gap)
        self.regions.append(region)
        memory = (ctypes.c_char * (span * t.itemsize)).from_address(region.address)
        return torch.frombuffer(memory, dtype=t.dtype).as_strided(t.shape, t.stride()).copy_(t)

    def unmap(self) -> None:
        gc.collect()
        for region in self.regions:
            region.unmap()


@dataclass(frozen=True)
class Case:
    """An optimizer, its parameters' shapes and how they lie, and how many threads work."""

    algorithm: str
    dtype: torch.dtype
    shapes: Sequence[tuple[int, ...]]
    layout: str
    gradient_layout: str
    threads: int
    sparse: bool
    seed: int

    @property
    def kind(self) -> Kind:
        return KINDS[self.algorithm]


def laid(t: Tensor, layout: str) -> Tensor:
    if layout == "transposed" and t.dim() > 1:
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "holes" and t.dim():
        return torch.stack([t, t], -1)[..., 0]
    return t


def sparse(case: Case, shape: tuple[int, ...], guard: Guard, generator: torch.Generator) -> Tensor:
    """A gradient with values for some rows, the last one among them."""
    rows = torch.randint(0, shape[0], (1, min(shape[0], 40)), generator=generator)
    rows[0, -1] = shape[0] - 1
    rows = rows if case.seed % 2 else torch.unique(rows, dim=1)
    values = torch.randn((rows.shape[1], *shape[1:]), generator=generator).to(case.dtype)
    g = torch.sparse_coo_tensor(
        guard.place(rows), guard.place(values), shape, check_invariants=False
    )
    return g._coalesced_(not case.seed % 2)


def gradient(
    case: Case, shape: tuple[int, ...], guard: Guard, generator: torch.Generator
) -> Tensor:
    if case.sparse and shape:
        return sparse(case, shape, guard, generator)
    values = torch.randn(
        shape,
        generator=generator,
        dtype=torch.complex64 if case.dtype.is_complex else torch.float32,
    )
    return guard.place(laid(values.to(case.dtype), case.gradient_layout))


def run(case: Case, guard: Guard) -> list[bytes]:
    """The bits of parameters and state after some steps."""
    torch.set_num_threads(case.threads)
    generator = torch.Generator().manual_seed(case.seed)
    wide = torch.complex64 if case.dtype.is_complex else torch.float32
    starts = [
        torch.randn(shape, generator=generator, dtype=wide).to(case.dtype) for shape in case.shapes
    ]
    params = [guard.place(laid(t, case.layout)).requires_grad_() for t in starts]
    optimizer = getattr(onepass, case.kind.cls)(params, **case.kind.options)
    for _ in range(3):
        for p, shape in zip(params, case.shapes, strict=True):
            p.grad = gradient(case, shape, guard, generator)
        optimizer.step()
        for entry in optimizer.state.values():
            for name, value in entry.items():
                if isinstance(value, Tensor):
                    entry[name] = guard.place(value)
    tensors = [
        *params,
        *(v for entry in optimizer.state.values() for v in entry.values() if isinstance(v, Tensor)),
    ]
    return [_bits(t) for t in tensors]


def _bits(t: Tensor) -> bytes:
    t = t.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    # Of one element, whatever its stride says.
    return t.as_strided(t.shape, (1,)).view(torch.uint8).numpy().tobytes()


def average(dtype: torch.dtype, shapes: Sequence[tuple[int, ...]], guard: Guard) -> list[bytes]:
    """The bits of averages after some updates."""
    generator = torch.Generator().manual_seed(len(shapes))
    functions: list[Callable[..., Any]] = [get_ema_multi_avg_fn(0.9), get_swa_multi_avg_fn()]
    bits = []
    for function in functions:
        averages = [
            guard.place(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes
        ]
        for number in range(3):
            values = [
                guard.place(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes
            ]
            function(averages, values, torch.tensor(number))
        bits += map(_bits, averages)
    return bits


def check(function: Callable[..., list[bytes]], *arguments: Any, at_end: bool, gap: int) -> None:
    """Run something on guarded and on ordinary memory, and compare."""
    guard = Guard(at_end=at_end, gap=gap)
    got = function(*arguments, guard)
    want = function(*arguments, Guard(guarded=False))
    assert got == want, f"{arguments}: bits differ, at_end={at_end}, gap={gap}"
    guard.unmap()


def allowed(algorithm: str, dtype: torch.dtype) -> bool:
    # LBFGS has no kernels here, and torch's products of vectors depend on where these lie.
    return algorithm != "lbfgs" and (KINDS[algorithm].is_complex or not dtype.is_complex)


def shapes_for(algorithm: str) -> list[tuple[int, ...]]:
    """The shapes that an algorithm takes."""
    if algorithm == "muon":
        return list(MATRICES)
    return [shape for shape in (*VECTORS, *MATRICES) if shape or algorithm != "sparse_adam"]


def quick() -> None:
    """Every algorithm in float32 and in one more type, all sizes in one launch; all else in
    turn."""
    turns = itertools.cycle(itertools.product((True, False), (1, 2, 4), LAYOUTS, (0, 1)))
    for i, algorithm in enumerate(name for name in KINDS if name != "lbfgs"):
        for dtype in (torch.float32, [t for t in DTYPES[1:] if allowed(algorithm, t)][i % 3]):
            every(algorithm, dtype, *next(turns))
    for dtype in DTYPES[:4]:
        for at_end in (True, False):
            check(average, dtype, VECTORS, at_end=at_end, gap=0)


def every(
    algorithm: str, dtype: torch.dtype, at_end: bool, threads: int, layout: str, gap: int
) -> None:
    """All sizes of an algorithm in one launch."""
    is_sparse = algorithm == "sparse_adam"
    case = Case(
        algorithm, dtype, shapes_for(algorithm), layout, LAYOUTS[threads % 3], threads, is_sparse, 1
    )
    check(run, case, at_end=at_end, gap=gap)


def all_types() -> None:
    """Every algorithm in every type, at both ends, with one and with more threads."""
    for algorithm, dtype in itertools.product(KINDS, DTYPES):
        for at_end, threads in (
            itertools.product((True, False), (1, 4)) if allowed(algorithm, dtype) else ()
        ):
            every(algorithm, dtype, at_end, threads, "dense", 0)


def rounds(seed: int, count: int) -> None:
    """Random rounds."""
    choose = random.Random(seed)
    for i in range(count):
        algorithm = choose.choice([name for name in KINDS if name != "lbfgs"])
        dtype = choose.choice([dtype for dtype in DTYPES if allowed(algorithm, dtype)])
        shapes = choose.choices(shapes_for(algorithm), k=choose.randint(1, 12))
        shapes += [(choose.randint(1, 70000),)] * (algorithm != "muon") + [
            (choose.randint(1, 90), choose.randint(1, 90))
        ]
        kind = KINDS[algorithm]
        may_be_sparse = (
            kind.sparse == "any" and not kind.options.get("weight_decay") and not dtype.is_complex
        )
        is_sparse = kind.sparse == "only" or (may_be_sparse and choose.random() < 0.5)
        layout, gradient_layout = choose.choice(LAYOUTS), choose.choice(LAYOUTS)
        case = Case(
            algorithm,
            dtype,
            shapes,
            layout,
            gradient_layout,
            choose.choice([1, 2, 4]),
            is_sparse,
            i,
        )
        at_end, gap = choose.random() < 0.6, choose.choice([0, 0, 1, 4, 16])
        print(i, case, at_end, gap, flush=True)
        check(run, case, at_end=at_end, gap=gap)


def main(arguments: Sequence[str]) -> None:
    warnings.simplefilter("ignore")
    # As many threads as allowed, however little there is to do.
    cpu.UNITS_PER_THREAD = 1
    if arguments[:1] == ["all"]:
        all_types()
    elif arguments:
        rounds(*map(int, arguments))
    else:
        quick()
    print("all within their memory")


def touch_what_is_beside(at_end: bool) -> None:
    """Read a byte that nobody may read: the process ends."""
    t = Guard(at_end=at_end).place(torch.zeros(5))
    ctypes.string_at(t.data_ptr() + (20 if at_end else -1), 1)


def step_too_far() -> None:
    """Step with a kernel that takes tensors for longer than they are: the process ends."""
    split = cpu.Kernel.split
    cpu.Kernel.split = lambda self, sizes: split(self, sizes + np.array([0, 0, 1]))
    run(Case("adam", torch.float32, [(17,)], "dense", "dense", 1, False, 0), Guard())


assert math.log2(PAGE).is_integer()

if __name__ == "__main__":
    main(sys.argv[1:])
