"""What a GPU's assembly says about a kernel: how wide it reads and writes, and how exact it is."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["AssemblyCounts", "read_amdgcn", "read_ptx"]

# `ld.global.v4.b32`, `st.global.L1::evict_last.b64`; in Triton's PTX each access to memory is one
# of these.
PTX_ACCESS = re.compile(
    r"(@!?%p\d+\s+)?\b(ld|st)\.(?:volatile\.)?global(?:\.[\w:]+)*?(?:\.v([248]))?\.[busf](\d+)\b"
)
# Where no rounding is written, ptxas may make one operation of a product and a sum.
PTX_FUSED = re.compile(
    r"\bfma\.|\bmad(?:\.r\w)?(?:\.ftz)?\.f\d|\b(?:add|sub|mul)(?:\.ftz)?(?:\.sat)?\.f\d\d\b"
)
PTX_APPROXIMATE = re.compile(r"\b\w+\.approx\b|\bdiv\.full\b")
PTX_FLUSH = re.compile(r"\b\w[\w.]*\.ftz\b")
PTX_LOCAL = re.compile(r"\b(?:ld|st)\.local\b|\.local\s+\.align")

AMD_ACCESS = re.compile(
    r"\b(?:global|buffer|flat)_(load|store)_(?:([su]?)(byte|short|i8|u8|b16|b8|u16|i16)|(?:dword|b)(\w*))"
)
AMD_BYTES = ("byte", "i8", "u8", "b8")
# Mode 3 keeps subnormal numbers, as operands and as results.
AMD_FLUSH = re.compile(r"\.amdhsa_float_denorm_mode_\w+ [012]\b")
AMD_LOCAL = re.compile(r"\bscratch_(?:load|store)_")
AMD_WORDS = {"": 32, "x2": 64, "x3": 96, "x4": 128, "32": 32, "64": 64, "96": 96, "128": 128}
# Of LLVM's IR, because divisions that round correctly are made of fused operations.
LLVM_FUSED = re.compile(r"@llvm\.(?:fma|fmuladd)\b|= f(?:add|sub|mul)(?: \w+)* (?:contract|fast)\b")
LLVM_APPROXIMATE = re.compile(
    r"@llvm\.amdgcn\.(?:rcp|rsq|sqrt|exp2|log)\b|= \w+(?: \w+)* (?:afn|arcp|fast)\b|!fpmath"
)


@dataclass(frozen=True)
class AssemblyCounts:
    """Loads and stores by their width in bits, and how often the code does what is not exact.

    An access under a mask must not be wider than one element, because it would reach beyond the end
    of the mask. `fused` counts products and sums in one operation, `approximate` operations of less
    precision, `flushing` those that set subnormal numbers to zero, `local` accesses to the stack.
    """

    loads: Mapping[int, int]
    stores: Mapping[int, int]
    masked_loads: Mapping[int, int]
    masked_stores: Mapping[int, int]
    fused: int
    approximate: int
    flushing: int
    local: int


def read_ptx(text: str) -> AssemblyCounts:
    """Return the counts of the PTX of one kernel."""
    code = "\n".join(line.split("//")[0] for line in text.splitlines())
    plain = {"ld": Counter[int](), "st": Counter[int]()}
    masked = {"ld": Counter[int](), "st": Counter[int]()}
    for guard, kind, lanes, bits in PTX_ACCESS.findall(code):
        accesses = masked if guard else plain
        accesses[kind][int(lanes or 1) * int(bits)] += 1
    return AssemblyCounts(
        loads=dict(plain["ld"]),
        stores=dict(plain["st"]),
        masked_loads=dict(masked["ld"]),
        masked_stores=dict(masked["st"]),
        fused=len(PTX_FUSED.findall(code)),
        approximate=len(PTX_APPROXIMATE.findall(code)),
        flushing=len(PTX_FLUSH.findall(code)),
        local=len(PTX_LOCAL.findall(code)),
    )


def read_amdgcn(text: str, llvm: str) -> AssemblyCounts:
    """Return the counts of one kernel for AMD's GPUs, from its assembly and its LLVM IR.

    The assembly does not show masks, so that all accesses count as unmasked ones.
    """
    accesses = {"load": Counter[int](), "store": Counter[int]()}
    code = "\n".join(line.split(";")[0] for line in text.splitlines())
    for kind, _, narrow, wide in AMD_ACCESS.findall(code):
        if narrow:
            bits = 8 if narrow in AMD_BYTES else 16
        else:
            bits = AMD_WORDS.get(wide, 32)
        accesses[kind][bits] += 1
    return AssemblyCounts(
        loads=dict(accesses["load"]),
        stores=dict(accesses["store"]),
        masked_loads={},
        masked_stores={},
        fused=len(LLVM_FUSED.findall(llvm)),
        approximate=len(LLVM_APPROXIMATE.findall(llvm)),
        flushing=len(AMD_FLUSH.findall(code)),
        local=len(AMD_LOCAL.findall(code)),
    )
