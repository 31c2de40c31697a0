"""Storage formats: how a column's bytes become a number, and a number becomes bytes.

Both are expressions like a rule's. A format never meets a rule: `trace.bind` puts `decode` before
the rule's nodes and `encode` after them, and every backend computes both like any other node.
Rounding happens once, at the store, to nearest with ties to even.

A bfloat16 is the upper half of a float32. 1.0 is 0x3F80, and

    decode(x)   bitcast(shl(cast(x, i32), 16), f32)        0x3F80 -> 0x3F800000, which is 1.0

To encode a float32 x, half of the last place that stays is added to its bits, so that the shift
rounds. A little less is added if the last place is even, so that ties go to the even number:

    bits        bitcast(x, i32)
    odd         and(shr(bits, 16), 1)                      whether the last place that stays is odd
    encode(x)   cast(shr(bits + 0x7FFF + odd, 16), i16)    or 0x7FC0 for NaN

    1.00390625 (0x3F808000, a tie)   0x3F808000 + 0x7FFF + 0 = 0x3F80FFFF -> 0x3F80, the even one
    1.01171875 (0x3F818000, a tie)   0x3F818000 + 0x7FFF + 1 = 0x3F820000 -> 0x3F82, the even one
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .ir import Node, const, make, where


@dataclass(frozen=True)
class Format:
    """One way to store a number.

    `itemsize` is the bytes of an element, `stored` the type that is loaded and stored, `epsilon`
    the distance from 1 to the next number. `decode` takes what is loaded and returns a number,
    `encode` takes a number and returns what is stored.
    """

    name: str
    itemsize: int
    stored: str
    epsilon: float
    decode: Callable[[Node], Node]
    encode: Callable[[Node], Node]


def cast(x: Node, type: str) -> Node:
    """Return the number in another type; itself if it has that type already."""
    return x if x.type == type else make("cast", x, type=type)


def _as_f32(x: Node) -> Node:
    return cast(x, "f32")


def _as_f64(x: Node) -> Node:
    return cast(x, "f64")


def _as_f16(x: Node) -> Node:
    return cast(_as_f32(x), "f16")


def _as_stored(x: Node) -> Node:
    return x


def _decode_bfloat16(x: Node) -> Node:
    """Return the float32 of which these 16 bits are the upper half."""
    bits = make("shl", cast(x, "i32"), const(16, "i32"))
    return make("bitcast", bits, type="f32")


def _encode_bfloat16(x: Node) -> Node:
    """Return the upper half of a number's 32 bits, rounded to nearest, ties to even."""
    # Integer arithmetic, because a conversion instruction exists only on hosts with AVX512-BF16.
    x = _as_f32(x)
    bits = make("bitcast", x, type="i32")
    odd = make("and", make("shr", bits, const(16, "i32")), const(1, "i32"))
    rounded = make("shr", bits + const(0x7FFF, "i32") + odd, const(16, "i32"))
    nan = const(0x7FC0, "i32")
    return cast(where(x != x, nan, rounded), "i16")


FORMATS: dict[str, Format] = {
    "float64": Format("float64", 8, "f64", 2.0**-52, _as_stored, _as_f64),
    "float32": Format("float32", 4, "f32", 2.0**-23, _as_stored, _as_f32),
    "float16": Format("float16", 2, "f16", 2.0**-10, _as_f32, _as_f16),
    "bfloat16": Format("bfloat16", 2, "i16", 2.0**-7, _decode_bfloat16, _encode_bfloat16),
}
