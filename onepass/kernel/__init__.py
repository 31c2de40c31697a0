"""The compiler's one door: from a rule to something that can be launched. Backends are imported
when first needed."""

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
from .tensors.memory import (
    PLAIN,
    extent,
    has_storage,
    is_dense,
    is_expanded,
    is_plain,
    shape_at,
    sizes,
)

if TYPE_CHECKING:
    from .tensors.facts import Expected
    from .tensors.numbers import Numbers

HOST = torch.device("cpu")

__all__ = [
    "FORMATS",
    "GRADIENT_FACTOR",
    "HOST",
    "PLAIN",
    "Argument",
    "Graph",
    "Rank",
    "Rule",
    "RuleError",
    "compile",
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
    "numbers_at",
    "on_host",
    "shape_at",
    "signature",
    "sizes",
    "trace",
    "why_no_kernels",
]


class Kernel(Protocol):
    """What both backends make of a program: callable on columns of any number of tensors of one
    device."""

    program: Program
    # The hyper-parameters, by their places among a launch's leaves.
    leaves: dict[str, int]

    def concurrency(self) -> int:
        """How many tensors may be worked on at once."""
        ...

    def is_capturing(self) -> bool:
        """Whether a step would be recorded into a graph now."""
        ...

    def split(self, sizes: np.ndarray) -> Any:
        """How to cut walks over tensors of these sizes; good for any number of launches."""
        ...

    def prepare(self, pointers: np.ndarray, work: Any, rows: np.ndarray, settings: int) -> Any:
        """A launch, with everything that may stay the same from step to step."""
        ...


def on_host(device: torch.device) -> bool:
    """Whether the processor itself computes on tensors of a device."""
    return device.type == "cpu"


def why_no_kernels(device: torch.device) -> str:
    """Why programs cannot be compiled for a device, where the eager backend runs; empty where they
    can."""
    if on_host(device):
        return _why_not_here()
    from .gpu import devices

    return devices.why_not(device)


@once
def _import() -> None:
    """Import all that a first step needs, while forks wait: a child would find another thread's
    import unfinished."""
    from .cpu import launch  # noqa: F401
    from .eager import foreach, single  # noqa: F401
    from .llvm import native  # noqa: F401
    from .tensors import facts, numbers  # noqa: F401


@cache
def _why_not_here() -> str:
    _import()
    from .llvm import native

    missing = native.missing_instructions()
    return f"there are no kernels for processors without {missing}" if missing else ""


def is_capturing(device: torch.device) -> bool:
    """Whether work on a device is recorded into a graph now."""
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
    """The kernel of a finished graph for columns stored like this; compiled once in the graph's
    life.

    `numbers` are the entries of a parameter's state that are one number, where these lie on the
    device, in the order in which their addresses follow those of the columns; None where the host
    keeps them.
    """
    program = bind(graph, formats)
    if on_host(device):
        from .cpu.launch import make_kernel

        return make_kernel(program)
    from .gpu.launch import make_kernel

    return make_kernel(program, device, numbers, FORMATS[number_format].stored)


def expect(tensors: Sequence[Tensor]) -> Expected:
    """The facts of these tensors, to compare others with before each launch."""
    from .tensors.facts import Expected

    return Expected(tensors)


def is_as(t: object, facts: Any) -> bool:
    """Whether something is a plain tensor that has memory and these facts, see `facts_of`."""
    from .tensors import facts as read_facts

    return read_facts.is_as(t, facts)


def facts_of(t: Tensor) -> Any:
    """What `expect` compares of a tensor, beside its memory."""
    from .tensors import facts as read_facts

    return read_facts.facts_of(t)


def numbers_at(addresses: np.ndarray, dtype: np.dtype) -> Numbers:
    """Numbers of the host, to be read and stored at addresses (names, tensors) that are read in
    each step."""
    from .tensors.numbers import Numbers

    return Numbers(addresses, dtype)


def evaluate(
    graph: Graph, columns: Mapping[str, Tensor], hypers: Mapping[str, Tensor | float]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A finished graph's outputs and scalars for one tensor, by the eager backend."""
    from .eager import single

    return single.run(graph, columns, hypers)


def evaluate_together(
    graph: Graph,
    columns: Mapping[str, Sequence[Tensor]],
    hypers: Mapping[str, Sequence[float] | float],
) -> tuple[dict[str, Sequence[Tensor]], dict[str, Sequence[float]]]:
    """The same for lists of plain tensors, each column's of one dtype and device; for elementwise
    graphs only."""
    from .eager import foreach

    return foreach.run(graph, columns, hypers)
