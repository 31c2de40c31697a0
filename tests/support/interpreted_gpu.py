"""A device for kernels of Triton where there is no GPU: the processor, on which Triton's
interpreter runs them.

Whoever imports this has Triton interpret all kernels of the process; it must be the first to import
Triton.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from onepass import kernel
from onepass.kernel.gpu import launch as gpu
from onepass.kernel.gpu.blocks import SPAN
from onepass.kernel.gpu.launch import Kernel
from onepass.kernel.gpu.uploads import Device
from onepass.kernel.gpu.walk import BLOCK
from onepass.kernel.graph.trace import Program
from onepass.stepping.gradient_factor import GradientFactor
from support import interpreter
from support.bare_kernels import Memory, Size, assert_same_bits

os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

CPU = torch.device("cpu")


class Interpreter(Device):
    """The processor as a device: its memory is the host's, and work is done as soon as it is
    queued."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def guard(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def stream(self) -> Any:
        return 0

    def is_capturing(self) -> bool:
        return False

    def pin(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=dtype)

    def send(self, pinned: Tensor) -> Tensor:
        return torch.empty(pinned.numel(), dtype=pinned.dtype).copy_(pinned)


@contextmanager
def interpreted(device: type[Device] = Interpreter) -> Iterator[None]:
    """Within it, tensors of the host count as those of a GPU."""
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(gpu, "Device", device)
        patch.setattr(kernel, "on_host", lambda device: False)
        patch.setattr(kernel, "why_no_kernels", lambda device: "")
        patch.setattr(
            GradientFactor, "waits", property(lambda self: isinstance(self.found_inf, Tensor))
        )
        kernel.compile.cache_clear()
        gpu.make_kernel.cache_clear()
        yield
    kernel.compile.cache_clear()
    gpu.make_kernel.cache_clear()


class OutOfBounds(Exception):
    """A kernel has read or written memory that nobody gave it."""


class Bounds:
    """The memory that kernels were given: what they do elsewhere raises, instead of taking the
    process with it."""

    def __init__(self) -> None:
        self.places: list[tuple[int, int]] = []

    def add(self, address: int, size: int) -> None:
        self.places.append((address, address + size))

    def check(self, addresses: np.ndarray, mask: np.ndarray, itemsize: int) -> None:
        wanted = addresses.astype(np.uint64)[np.broadcast_to(mask, addresses.shape)]
        inside = np.zeros(len(wanted), np.bool_)
        for begin, end in reversed(self.places):
            inside |= (wanted >= np.uint64(begin)) & (
                wanted + np.uint64(itemsize) <= np.uint64(end)
            )
            if inside.all():
                return
        raise OutOfBounds(f"{int((~inside).sum())} elements of {len(wanted)}")


@contextmanager
def bounded() -> Iterator[Bounds]:
    """Within it, kernels stay in what the device and `Memory` have given out; what a mask leaves
    out is garbage."""
    from triton.runtime.interpreter import InterpreterBuilder

    bounds = Bounds()
    empty, load, store = (
        torch.empty,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )
    made = Memory.__init__

    def noted_empty(*size: Any, **how: Any) -> Tensor:
        found = empty(*size, **how)
        bounds.add(found.data_ptr(), found.nbytes)
        return found

    def noted_memory(self: Memory, *arguments: Any, **how: Any) -> None:
        made(self, *arguments, **how)
        for address, view in zip(self.addresses, self.views, strict=True):
            bounds.add(address, view.nbytes)

    def checked_load(self: Any, ptrs: Any, mask: Any, other: Any, *how: Any) -> Any:
        kind = np.dtype(f"V{ptrs.get_element_ty().primitive_bitwidth // 8}")
        bounds.check(ptrs.data, mask.data, kind.itemsize)
        loaded = load(self, ptrs, mask, other, *how)
        if other is None and not mask.data.all():
            garbage = np.full(8, Memory.PATTERN, np.uint8).view(loaded.data.dtype)[0]
            loaded.data = np.where(mask.data, loaded.data, garbage)
        return loaded

    def checked_store(self: Any, ptrs: Any, value: Any, mask: Any, *how: Any) -> Any:
        bounds.check(ptrs.data, mask.data, value.data.itemsize)
        return store(self, ptrs, value, mask, *how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", noted_empty)
        patch.setattr(Memory, "__init__", noted_memory)
        patch.setattr(InterpreterBuilder, "create_masked_load", checked_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", checked_store)
        yield bounds


# Launches of a kernel whose tensors' numbers lie on the device, and what the oracle says of them.


def device_power(x: float, y: float) -> float:
    """The power that kernels compute, of ordinary positive numbers."""
    with np.errstate(all="ignore"):
        return (
            1.0
            if x == 1 or y == 0
            else x
            if y == 1
            else float(np.exp(np.float64(y) * np.log(np.float64(x))))
        )


def device_library(name: str, *args: np.float64) -> np.float64:
    """The functions of float64 numbers as the device has them."""
    if name == "pow":
        return np.float64(device_power(*map(float, args)))
    with np.errstate(all="ignore"):
        return getattr(np, name)(*args)


def device_sum(elements: np.ndarray) -> float:
    """A tensor's sum: each program over BLOCK running values, of which the programs' are summed up
    over 256."""
    size = BLOCK * SPAN
    programs = (elements[i : i + size].astype(np.float64) for i in range(0, len(elements), size))
    partials = np.array([np.sum(_running(values, BLOCK)) for values in programs])
    return float(np.sum(_running(partials, 256)))


def _running(values: np.ndarray, lanes: int) -> np.ndarray:
    """Running sums, from 0, of which each takes every so manieth value."""
    rows = np.zeros((-(-len(values) // lanes) + 1, lanes))
    rows.reshape(-1)[lanes : lanes + len(values)] = values
    return np.add.accumulate(rows, axis=0)[-1]


@contextmanager
def device_oracle() -> Iterator[None]:
    """Within it, the oracle has the device's functions of numbers, and its order of sums over whole
    tensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "library", device_library)
        patch.setattr(interpreter, "ordered_sum", device_sum)
        yield


Columns = Mapping[str, np.ndarray]
# States of rules without a table that are means of squares.
SQUARES = ("v", "row", "column", "row_var", "col_var", "variance")


def sensible(columns: Columns) -> dict[str, np.ndarray]:
    """Columns whose means of squares are not negative: roots of negative numbers would hide what
    else is wrong."""
    positive = {
        n: a & 0x7FFF if a.dtype == np.uint16 else abs(a)
        for n, a in columns.items()
        if n in SQUARES
    }
    return {**columns, **positive}


def compiled(
    program: Program, numbers: tuple[str, ...] | None = None, number_type: str = "f32"
) -> Kernel:
    """The program's kernel, for the processor as a device."""
    return Kernel(program, CPU, numbers, number_type)


class Resident:
    """Tensors whose numbers lie on the device, and a launch on them."""

    def __init__(
        self,
        kernel: Kernel,
        tensors: Sequence[Columns],
        numbers: Mapping[str, np.ndarray],
        settings: Sequence[Mapping[str, Any]],
        rows: Sequence[int] | None = None,
        sizes: Sequence[Size] | None = None,
        first: Sequence[bool] | None = None,
    ) -> None:
        """`numbers` are each tensor's, by name; a setting's values that are tensors are read on the
        device."""
        self.kernel, self.count, self.names = (
            kernel,
            len(tensors),
            [c.name for c in kernel.program.columns],
        )
        arrays = [t[name] for name in self.names for t in tensors]
        arrays += [numbers[name][i : i + 1] for name in kernel.numbers for i in range(self.count)]
        self.memory = Memory(arrays)
        pointers = np.array(self.memory.addresses, np.uint64).reshape(-1, self.count)
        work = kernel.split(
            np.array([len(t["p"]) for t in tensors] if sizes is None else sizes, np.int64)
        )
        which = np.zeros(self.count, np.int64) if rows is None else np.array(rows, np.int64)
        self.launch = kernel.prepare(pointers, work, which, len(settings))
        fresh = [False] * self.count if first is None else list(first)
        self.launch.fresh = torch.empty(self.count, dtype=torch.int32).copy_(torch.tensor(fresh))
        for s, setting in enumerate(settings):
            for name in set(kernel.program.hypers) - {*kernel.numbers, "first"}:
                leaf, value = kernel.leaves[name], setting[name]
                if isinstance(value, Tensor):
                    self.launch.device_leaves.append((leaf, s, value))
                else:
                    self.launch.leaves[leaf, s] = value

    def read(self) -> tuple[list[dict[str, np.ndarray]], dict[str, np.ndarray]]:
        """All columns of all tensors, and their numbers."""
        arrays, n = self.memory.read(), self.count
        columns = [
            {name: arrays[index * n + i] for index, name in enumerate(self.names)} for i in range(n)
        ]
        begin = len(self.names) * n
        numbers = {
            name: np.concatenate(arrays[begin + index * n : begin + (index + 1) * n])
            for index, name in enumerate(self.kernel.numbers)
        }
        return columns, numbers

    def bytes(self) -> bytes:
        """Everything that a step may change."""
        return b"".join(a.tobytes() for a in (*self.memory.read(), self.launch.fresh.numpy()))


def check_resident(
    launched: Resident,
    before: Sequence[Columns],
    numbers: Mapping[str, np.ndarray],
    hypers: Sequence[Mapping[str, float]],
    first: Sequence[bool],
    sizes: Sequence[Size] | None = None,
) -> None:
    """What a launch has left, against the oracle; `hypers` are each tensor's, `numbers` and `first`
    those before it."""
    after, new = launched.read()
    for i, (columns, given) in enumerate(zip(before, hypers, strict=True)):
        tensor_numbers = {name: float(values[i]) for name, values in numbers.items()}
        tensor_numbers |= {"step": tensor_numbers["step"] + 1} if "step" in tensor_numbers else {}
        size = sizes[i] if sizes else None
        with device_oracle():
            wanted = interpreter.interpret(
                launched.kernel.program,
                columns,
                {**given, **tensor_numbers, "first": float(first[i])},
                size if isinstance(size, tuple) else None,
            )
        scalars = {name for name, _ in launched.kernel.program.scalars}
        for name, want in wanted.items():
            what = f"{launched.kernel.program.name}: {name} of tensor {i}"
            if name in scalars:
                assert_same_bits(new[name][i : i + 1], want.astype(new[name].dtype), what)
            else:
                assert_same_bits(after[i][name], want, what)
        if "step" in tensor_numbers:
            assert new["step"][i] == tensor_numbers["step"]
    assert not launched.launch.fresh.any()
    assert all(math.isfinite(n) for n in new.get("step", []))
