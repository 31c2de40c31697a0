"""The compiler's only door: from a rule to something that can be launched.

The steps for SGD, `def rule(p, g, *, lr): return {"p": p - lr * g}`, and what each of them makes:

    signature(rule)                columns p and g, keyword lr
    trace(rule, arguments)         Graph: p becomes sub(p, mul(lr, g)), over real numbers
    finish(graph, ...)             Graph: a loss scale, `maximize`, exact bits when lr is 0
    bind(graph, formats)           Program: columns in float32, arithmetic in f32; cut by `split`
    compile(graph, formats, ...)   Kernel: machine code of the bound program, on one device
    kernel.split(sizes)            Work: how launches over tensors of these sizes are cut
    kernel.prepare(...)            Launch: may be run again and again

`evaluate` computes a finished graph by torch's own operations instead. Backends are imported when
they are first needed. What steps, and when, is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .graph.caches import once, remember
from .graph.formats import FORMATS
from .graph.ir import Rank, RuleError
from .graph.passes import Program
from .graph.trace import GRADIENT_FACTOR, Argument, Graph, Rule, bind, finish, signature, trace
from .repeat.fields import Answer, OptionKind
from .tensors.memory import (
    extent,
    has_storage,
    is_dense,
    is_expanded,
    is_plain,
    shape_at,
    sizes,
)
from .tensors.torch_library import address as torch_function

if TYPE_CHECKING:
    from .repeat.sheet import Sheet
    from .tensors.facts import Expected
    from .tensors.numbers import Numbers

HOST = torch.device("cpu")

__all__ = [
    "FORMATS",
    "GRADIENT_FACTOR",
    "HOST",
    "Answer",
    "Argument",
    "Graph",
    "OptionKind",
    "Rank",
    "Rule",
    "RuleError",
    "compile",
    "count_as_changed",
    "evaluate",
    "evaluate_together",
    "expect",
    "extent",
    "facts_of",
    "finish",
    "has_bfloat16_products",
    "has_storage",
    "is_as",
    "is_capturing",
    "is_dense",
    "is_expanded",
    "is_plain",
    "new_sheet",
    "numbers_at",
    "on_host",
    "shape_at",
    "signature",
    "sizes",
    "torch_function",
    "trace",
    "why_no_kernels",
]


class Kernel(Protocol):
    """What both backends make of a program.

    It can be launched on columns of any number of tensors of one device.
    """

    program: Program
    # The index of each hyper-parameter among a launch's leaves.
    leaves: dict[str, int]

    def concurrency(self) -> int:
        """Return how many tensors may be worked on at once."""
        ...

    def is_capturing(self) -> bool:
        """Whether a step would now be recorded into a CUDA graph."""
        ...

    def split(self, sizes: np.ndarray) -> Any:
        """Return how walks over tensors of these sizes are cut, for any number of launches.

        `sizes` is (tensors, 3): matrices, rows, columns; or (tensors,): elements.
        """
        ...

    def prepare(
        self, pointers: np.ndarray, work: Any, setting_index: np.ndarray, settings: int
    ) -> Any:
        """Return a `Launch`, with everything that may stay the same from step to step."""
        ...


class Launch(Protocol):
    """One prepared run of a kernel, in two parts; see `tensors.launching` for their order.

    A backend's launch may have more, which only batches of its device know.
    """

    # The hyper values of each setting: (leaf, setting), float64.
    leaves: np.ndarray
    # Which setting each tensor has.
    setting_index: np.ndarray

    def run(self, workers: int) -> None:
        """Run the program once, in place, with this many workers at most."""
        ...

    def begin(self, workers: int) -> None:
        """Do what may fail, and store nothing; to be finished, or cancelled."""
        ...

    def finish(self, workers: int) -> None:
        """Do the rest, which stores."""
        ...

    def cancel(self) -> None:
        """Give back the memory of what has begun and will not be finished."""
        ...

    def calls(self) -> list[tuple[int, int]]:
        """Return functions and their arguments which are this launch, for machine code to call.

        Empty if it is more than that.
        """
        ...

    def results(self) -> Mapping[str, list[tuple[int, bool]]]:
        """Return where each setting's new scalars are after a run, and whether in float64.

        A scalar is missing if each tensor has its own.
        """
        ...

    def scalars(self) -> Mapping[str, np.ndarray]:
        """Return each tensor's new scalars, of the last run, if the host keeps them."""
        ...


def on_host(device: torch.device) -> bool:
    """Whether the processor itself computes on tensors of a device."""
    return device.type == "cpu"


def why_no_kernels(device: torch.device) -> str:
    """Return why programs cannot be compiled for a device, or "" if they can.

    The eager backend runs where they cannot.
    """
    if on_host(device):
        return _why_not_here()
    from .gpu import devices

    return devices.why_not(device)


@once
def _import() -> None:
    """Import all that a first step needs, while forks wait.

    Otherwise a child could find another thread's import unfinished.
    """
    from .cpu import launch  # noqa: F401
    from .eager import foreach, single  # noqa: F401
    from .llvm import native  # noqa: F401
    from .repeat import sheet  # noqa: F401
    from .tensors import facts, numbers  # noqa: F401


@cache
def _why_not_here() -> str:
    """Return why programs cannot be compiled for this processor, or ""."""
    _import()
    from .llvm import native

    missing = native.missing_instructions()
    return f"there are no kernels for processors without {missing}" if missing else ""


def is_capturing(device: torch.device) -> bool:
    """Whether work on a device is now recorded into a CUDA graph."""
    if on_host(device) or device.type == "meta":
        return False
    from .gpu import devices

    return devices.is_capturing(device)


@cache
def has_bfloat16_products() -> bool:
    """Whether this processor multiplies matrices of bfloat16 in hardware."""
    from .llvm import native

    return native.has_bfloat16_products()


@remember(most=256, longer=8)
def compile(
    graph: Graph,
    formats: tuple[tuple[str, str], ...],
    device: torch.device = HOST,
    numbers: tuple[str, ...] | None = None,
    number_format: str = "float32",
) -> Kernel:
    """Return the kernel of a finished graph, for columns that are stored like this.

    It is compiled once in the graph's life. `formats` are those of the columns, as `bind` takes
    them. `numbers` are the entries of a parameter's state that are one number, if these lie on the
    device; their addresses follow those of the columns in this order. It is None if the host keeps
    them. `number_format` is how they are stored.
    """
    program = bind(graph, formats)
    if on_host(device):
        from .cpu.launch import make_kernel

        return make_kernel(program)
    from .gpu.launch import make_kernel

    return make_kernel(program, device, numbers, FORMATS[number_format].stored)


def expect(tensors: Sequence[Tensor]) -> Expected:
    """Return the facts of these tensors, to compare others with before each launch."""
    from .tensors.facts import Expected

    return Expected(tensors)


def count_as_changed(changed: list[Tensor]) -> None:
    """Let autograd know that plain tensors have changed: count in their version counters."""
    from .tensors import facts as read_facts

    read_facts.count_as_changed(changed)


def is_as(t: object, facts: Any) -> bool:
    """Whether something is a plain tensor that has memory and these facts: see `facts_of`."""
    from .tensors import facts as read_facts

    return read_facts.is_as(t, facts)


def facts_of(t: Tensor) -> Any:
    """Return what `expect` compares of a tensor, beside its memory."""
    from .tensors import facts as read_facts

    return read_facts.facts_of(t)


def numbers_at(addresses: np.ndarray, dtype: np.dtype) -> Numbers:
    """Return numbers of the host that are read and stored by their addresses.

    `addresses` (names, tensors; uint64) are looked at in each step.
    """
    from .tensors.numbers import Numbers

    return Numbers(addresses, dtype)


def new_sheet() -> Sheet | None:
    """Return an empty sheet: a step that differs from the last one only in values, see `repeat`.

    None where machine code may not read Python's objects and torch's tensors.
    """
    from .repeat.sheet import Sheet, code

    found = code()
    return None if found is None else Sheet(found)


def evaluate(
    graph: Graph, columns: Mapping[str, Tensor], hypers: Mapping[str, Tensor | float]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a finished graph's outputs and scalars for one tensor, by torch's own operations."""
    from .eager import single

    return single.run(graph, columns, hypers)


def evaluate_together(
    graph: Graph,
    columns: Mapping[str, Sequence[Tensor]],
    hypers: Mapping[str, Sequence[float] | float],
) -> tuple[dict[str, Sequence[Tensor]], dict[str, Sequence[float]]]:
    """Return the outputs and scalars for lists of plain tensors, each in one go.

    The graph must be elementwise, and each column's tensors of one dtype and device.
    """
    from .eager import foreach

    return foreach.run(graph, columns, hypers)
