"""What the assembly of a GPU says about a kernel: how wide it reads and writes, and whether its
arithmetic is exact."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Listing", "read_amdgcn", "read_ptx"]

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
AMD_WORDS = {"": 32, "x2": 64, "x3": 96, "x4": 128, "32": 32, "64": 64, "96": 96, "128": 128}
# Of LLVM's IR, because divisions that round correctly are made of fused operations.
LLVM_FUSED = re.compile(r"@llvm\.(?:fma|fmuladd)\b|= f(?:add|sub|mul)(?: \w+)* (?:contract|fast)\b")
LLVM_APPROXIMATE = re.compile(
    r"@llvm\.amdgcn\.(?:rcp|rsq|sqrt|exp2|log)\b|= \w+(?: \w+)* (?:afn|arcp|fast)\b|!fpmath"
)


@dataclass(frozen=True)
class Listing:
    """Loads and stores by their width in bits, and how often the code does what an exact kernel
    does not.

    An access under a mask must not be wider than one element: where the mask ends, it would reach
    beyond.
    """

    loads: Mapping[int, int]
    stores: Mapping[int, int]
    masked_loads: Mapping[int, int]
    masked_stores: Mapping[int, int]
    fused: int
    approximate: int
    flushing: int
    local: int


def read_ptx(text: str) -> Listing:
    """The PTX of one kernel."""
    accesses = {(kind, masked): Counter[int]() for masked in (False, True) for kind in ("ld", "st")}
    code = "\n".join(line.split("//")[0] for line in text.splitlines())
    for guard, kind, lanes, bits in PTX_ACCESS.findall(code):
        accesses[kind, bool(guard)][int(lanes or 1) * int(bits)] += 1
    loads, stores, masked_loads, masked_stores = map(dict, accesses.values())
    counts = (len(one.findall(code)) for one in (PTX_FUSED, PTX_APPROXIMATE, PTX_FLUSH, PTX_LOCAL))
    return Listing(loads, stores, masked_loads, masked_stores, *counts)


def read_amdgcn(text: str, llvm: str) -> Listing:
    """The assembly of one kernel for AMD's GPUs, whose masks it does not show, and the LLVM IR that
    it was made of."""
    accesses = {"load": Counter[int](), "store": Counter[int]()}
    code = "\n".join(line.split(";")[0] for line in text.splitlines())
    for kind, _, narrow, wide in AMD_ACCESS.findall(code):
        bits = (
            (8 if narrow in ("byte", "i8", "u8", "b8") else 16)
            if narrow
            else AMD_WORDS.get(wide, 32)
        )
        accesses[kind][bits] += 1
    fused, approximate = len(LLVM_FUSED.findall(llvm)), len(LLVM_APPROXIMATE.findall(llvm))
    # Mode 3 keeps subnormal numbers, as operands and as results.
    flushing = len(re.findall(r"\.amdhsa_float_denorm_mode_\w+ [012]\b", code))
    local = len(re.findall(r"\bscratch_(?:load|store)_", code))
    return Listing(
        dict(accesses["load"]), dict(accesses["store"]), {}, {}, fused, approximate, flushing, local
    )
