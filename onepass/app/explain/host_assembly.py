"""What the assembly of a CPU says about a pass: its hot loop, and how wide its registers are."""

from __future__ import annotations

import re
from collections.abc import Sequence

REGISTERS = (("zmm", 512), ("ymm", 256), ("xmm", 128))


def function_lines(assembly: str, name: str) -> list[str]:
    """A function's lines in an assembly listing, without directives."""
    lines = assembly.splitlines()
    labels = [i for i, line in enumerate(lines) if re.match(rf"_?{re.escape(name)}:", line)]
    if not labels:
        return []
    end = next(
        (
            i
            for i in range(labels[0], len(lines))
            if re.match(r"\s*\.(size|cfi_endproc)|\.?Lfunc_end", lines[i])
        ),
        len(lines),
    )
    kept = [line.split("# ")[0].rstrip() for line in lines[labels[0] : end]]
    return [line for line in kept if line and not re.match(r"\s+\.", line)]


def hot_loop(lines: Sequence[str]) -> tuple[int, int]:
    """The range of lines of the shortest loop with the widest registers: from a label to the jump
    back to it."""
    best, most = (0, 0), (0, 0)
    label: dict[str, int] = {}
    for i, line in enumerate(lines):
        if match := re.match(r"(\S+):", line):
            label[match[1]] = i
        target = re.match(r"\s+(?:j\w+|b\.\w+|b|cbn?z\s+\w+,|tbn?z\s.*,)\s+(\S+)$", line)
        if target and target[1] in label:
            begin = label[target[1]]
            # The loop that a usual step takes has the fewest instructions, and an inner loop fewer
            # than the outer one.
            work = vector_bits(lines[begin : i + 1]), begin - i
            if work[0] > 0 and (work > most or best == (0, 0)):
                best, most = (begin, i + 1), work
    return best


def vector_bits(lines: Sequence[str]) -> int:
    """The widest registers that packed instructions use, in bits; 0 where there are none."""
    text = "\n".join(lines)
    for register, bits in REGISTERS[:2]:
        if register in text:
            return bits
    packed = r"\b(v?(mul|add|sub|div|sqrt|and|or|xor|max|min)p[sd]|movup[sd])\b|\bv\d+\.(4s|2d)\b"
    return 128 if re.search(packed, text) else 0
