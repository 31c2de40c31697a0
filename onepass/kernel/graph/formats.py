"""Storage formats: how a column's bytes become a number and a number becomes bytes, as expressions
of the same IR.

A format never meets a rule: `program.bind` puts `decode` before the rule's nodes and `encode` after
them, and every backend computes both like any other node. Rounding happens once, at the store, to
nearest with ties to even.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .ir import Node, const, make, where


@dataclass(frozen=True)
class Format:
    """One way to store a number: bytes an element, the type that is loaded and stored, the distance
    from 1 to the next number, and the way there and back."""

    name: str
    itemsize: int
    stored: str
    epsilon: float
    decode: Callable[[Node], Node]
    encode: Callable[[Node], Node]


def cast(x: Node, type: str) -> Node:
    """The number in another type; nothing where it has the type already."""
    return x if x.type == type else make("cast", x, type=type)


def _as_f32(x: Node) -> Node:
    return cast(x, "f32")


def _decode_bfloat16(x: Node) -> Node:
    return make("bitcast", make("shl", cast(x, "i32"), const(16, "i32")), type="f32")


def _encode_bfloat16(x: Node) -> Node:
    # Integer arithmetic, because a conversion instruction exists only where the host has
    # AVX512-BF16.
    x = _as_f32(x)
    bits = make("bitcast", x, type="i32")
    ties_to_even = make("and", make("shr", bits, const(16, "i32")), const(1, "i32"))
    rounded = make("shr", bits + const(0x7FFF, "i32") + ties_to_even, const(16, "i32"))
    return cast(where(x != x, const(0x7FC0, "i32"), rounded), "i16")


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("float64", 8, "f64", 2.0**-52, lambda x: x, lambda x: cast(x, "f64")),
        Format("float32", 4, "f32", 2.0**-23, lambda x: x, _as_f32),
        Format("float16", 2, "f16", 2.0**-10, _as_f32, lambda x: cast(_as_f32(x), "f16")),
        Format("bfloat16", 2, "i16", 2.0**-7, _decode_bfloat16, _encode_bfloat16),
    )
}
