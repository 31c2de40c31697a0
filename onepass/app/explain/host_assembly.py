"""What the assembly of a CPU says about a pass: its hot loop, and how wide its registers are."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["function_lines", "hot_loop", "vector_bits"]

# Registers of x86 whose name says their width.
WIDE_REGISTERS = {"zmm": 512, "ymm": 256}
# Instructions on packed numbers in registers of 128 bits, of x86 and of ARM.
PACKED = re.compile(
    r"\b(v?(mul|add|sub|div|sqrt|and|or|xor|max|min)p[sd]|movup[sd])\b|\bv\d+\.(4s|2d)\b"
)
# A jump to a label, of x86 and of ARM.
JUMP = re.compile(r"\s+(?:j\w+|b\.\w+|b|cbn?z\s+\w+,|tbn?z\s.*,)\s+(\S+)$")
FUNCTION_END = re.compile(r"\s*\.(size|cfi_endproc)|\.?Lfunc_end")


def function_lines(assembly: str, name: str) -> list[str]:
    """Return a function's lines in an assembly listing, without directives and comments."""
    label = re.compile(rf"_?{re.escape(name)}:")
    found = []
    for line in assembly.splitlines():
        if not found and not label.match(line):
            continue
        if FUNCTION_END.match(line):
            break
        found.append(line.split("# ")[0].rstrip())
    return [line for line in found if line and not re.match(r"\s+\.", line)]


def hot_loop(lines: Sequence[str]) -> tuple[int, int]:
    """Return the range of lines of the hot loop, (0, 0) if there is none.

    It reaches from a label to the jump back to it. Of all loops it has the widest registers, and is
    the shortest of those: the loop that a usual step takes has the fewest instructions, and an
    inner loop has fewer than the outer one.
    """
    best = (0, 0)
    best_merit = (0, 0)
    labels: dict[str, int] = {}
    for index, line in enumerate(lines):
        if label := re.match(r"(\S+):", line):
            labels[label[1]] = index
        jump = JUMP.match(line)
        if jump is None or jump[1] not in labels:
            continue
        begin = labels[jump[1]]
        bits = vector_bits(lines[begin : index + 1])
        merit = (bits, begin - index)
        if bits and (best == (0, 0) or merit > best_merit):
            best = (begin, index + 1)
            best_merit = merit
    return best


def vector_bits(lines: Sequence[str]) -> int:
    """Return the width in bits of the widest registers of packed instructions; 0 without any."""
    text = "\n".join(lines)
    for register, bits in WIDE_REGISTERS.items():
        if register in text:
            return bits
    return 128 if PACKED.search(text) else 0
