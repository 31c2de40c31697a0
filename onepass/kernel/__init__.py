"""The compiler's one door: from a rule to something that can be launched. Backends are imported when first needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from .formats import FORMATS
from .ir import Rank, RuleError
from .memory import PLAIN, has_storage, is_dense, shape_at, sizes
from .program import GRADIENT_FACTOR, Argument, Graph, Rule, bind, finish, signature, trace

if TYPE_CHECKING:
    from torch import Tensor

    from .cpu import Kernel
    from .facts import Expected

__all__ = [
    "FORMATS",
    "GRADIENT_FACTOR",
    "PLAIN",
    "Argument",
    "Graph",
    "Rank",
    "Rule",
    "RuleError",
    "compile",
    "evaluate",
    "expect",
    "finish",
    "has_bfloat16_products",
    "has_storage",
    "is_dense",
    "shape_at",
    "signature",
    "sizes",
    "trace",
    "why_no_kernels",
]


@cache
def why_no_kernels(device_type: str) -> str:
    """Why programs cannot be compiled for a kind of device, where the eager backend runs; empty where they can."""
    if device_type != "cpu":
        return f"there are no kernels for {device_type} devices"
    from . import native

    missing = native.missing_instructions()
    return f"there are no kernels for processors without {missing}" if missing else ""


@cache
def has_bfloat16_products() -> bool:
    """Whether this processor multiplies matrices of bfloat16 in hardware."""
    from . import native

    return native.has_bfloat16_products()


@lru_cache(maxsize=1024)
def compile(graph: Graph, formats: tuple[tuple[str, str], ...]) -> Kernel:
    """The kernel of a finished graph for columns stored like this; compiled once a process."""
    from . import cpu

    return cpu.compile(bind(graph, formats))


def expect(tensors: Sequence[Tensor]) -> Expected:
    """The facts of these tensors, to compare others with before each launch."""
    from .facts import Expected

    return Expected(tensors)


def evaluate(graph: Graph, columns: Mapping[str, Tensor], hypers: Mapping[str, Tensor | float]) -> dict[str, Tensor]:
    """A finished graph's outputs for one tensor, by the eager backend."""
    from . import eager

    return eager.run(graph, columns, hypers)
