"""What a kernel becomes on a GPU, without one: compiled by Triton for a target, and read.

Triton brings NVIDIA's assembler and disassembler and AMD's compiler; nothing else is needed, and
nothing is launched.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...kernel.gpu.jit import Function, Source, load, options
from ...kernel.graph.ir import Rank
from ...kernel.graph.passes import ITEMSIZE, Pass, Program
from .gpu_assembly import Listing, read_amdgcn, read_ptx
from .sass import Chip, Way, bound, fast_path

__all__ = ["TARGETS", "Compiled", "TargetError", "compile_for", "disassemble", "report"]

# What runs at once on a multiprocessor, by NVIDIA's table of compute capabilities: warps and
# blocks.
RESIDENT = {
    "sm_80": (64, 32),
    "sm_86": (48, 16),
    "sm_89": (48, 24),
    "sm_90": (64, 32),
    "sm_100": (64, 32),
    "sm_103": (64, 32),
    "sm_120": (48, 24),
}
TARGETS = (*RESIDENT, "gfx90a", "gfx942", "gfx950", "gfx1100", "gfx1200", "gfx1201")
# The GPU that a target's times are estimated for: its clock under load, and its bandwidth as a copy
# measures it.
CHIPS = {"sm_90": Chip("H200", multiprocessors=132, clock=1.75e9, bandwidth=4.3e12)}


class TargetError(ValueError):
    """Kernels cannot be compiled for this target, or not here."""


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target: what it was made of and became, and what its compiler says about
    it."""

    function: Function
    target: str
    ttir: str
    assembly: str
    binary: bytes
    listing: Listing
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int

    @property
    def occupancy(self) -> tuple[int, int]:
        """Warps that a multiprocessor runs at once with so many registers, and those that it could;
        NVIDIA's alone."""
        most, blocks = RESIDENT[self.target]
        # Each of four schedulers has 16,384 registers, of which a warp takes multiples of 256.
        a_warp = -(-max(self.registers, 1) * 32 // 256) * 256
        warps = min(most, 4 * (16384 // a_warp))
        return min(warps // self.function.warps, blocks) * self.function.warps, most


def compile_for(source: Source, target: str) -> list[Compiled]:
    """Compile every kernel of a module for a target, as `sm_90` or `gfx942`, past all caches.

    Raises `TargetError` for a target that is unknown, and where Triton is missing, interpreting, or
    fails.
    """
    if target not in TARGETS:
        raise TargetError(f"there is no target {target!r}: choose one of {', '.join(TARGETS)}.")
    _triton()
    module = load(source)
    return [_compile(module[function.name], function, target) for function in source.functions]


def _triton() -> Any:
    try:
        import triton
    except ImportError as error:
        raise TargetError(
            "kernels for GPUs are compiled by Triton, which is not installed: run pip install "
            "triton."
        ) from error
    return triton


def _compile(kernel: Any, function: Function, target: str) -> Compiled:
    triton = _triton()
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(kernel, triton.JITFunction):
        raise TargetError(
            "Triton is interpreting kernels in this process, not compiling: unset TRITON_INTERPRET."
        )
    types = dict(function.arguments) | dict.fromkeys(
        (name for name, _ in function.constants), "constexpr"
    )
    # As at a launch: torch's memory begins at multiples of 16 bytes, and Triton knows.
    aligned: dict[Any, Any] = {
        (i,): [["tt.divisibility", 16]]
        for i, (_, type) in enumerate(function.arguments)
        if type.startswith("*")
    }
    code = ASTSource(kernel, signature=types, constexprs=dict(function.constants), attrs=aligned)
    backend = "cuda" if target.startswith("sm_") else "hip"
    lanes = 64 if target.startswith("gfx9") else 32
    place = GPUTarget(backend, int(target[3:]) if backend == "cuda" else target, lanes)
    log = io.StringIO()
    # What ptxas says is not cached: the kernel is compiled anew, and leaves nothing behind.
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope(), knobs.nvidia.scope():
        knobs.cache.dir = folder
        knobs.nvidia.dump_ptxas_log = True
        try:
            with contextlib.redirect_stdout(log):
                made = triton.compile(code, target=place, options=options(function, backend))
        except (RuntimeError, triton.TritonError) as error:
            said = next((line for line in str(error).splitlines() if line), type(error).__name__)
            raise TargetError(
                f"Triton {triton.__version__} cannot compile {function.name} for {target} "
                f"({said}): choose another target, or another version of Triton."
            ) from error
        asm = {
            name: made.asm[name]
            for name in ("ttir", "llir", "ptx", "cubin", "amdgcn", "hsaco")
            if name in made.asm
        }
    return _read(function, target, asm, log.getvalue(), made.metadata.shared)


def _read(function: Function, target: str, asm: dict[str, Any], log: str, shared: int) -> Compiled:
    """What Triton has made, and what its assembler has said about it."""
    if "amdgcn" in asm:
        text = asm["amdgcn"]
        found = {k: int(n) for k, n in re.findall(r"^\s+\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
        spilled = found["vgpr_spill_count"] + found["sgpr_spill_count"]
        numbers = (
            found["vgpr_count"],
            found["private_segment_fixed_size"],
            4 * spilled,
            4 * spilled,
        )
        listing, binary = read_amdgcn(text, asm["llir"]), asm["hsaco"]
        return Compiled(function, target, asm["ttir"], text, binary, listing, *numbers, shared)
    frames = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
    )
    used = re.search(r"Used (\d+) registers", log)
    if not frames or used is None:
        raise TargetError(
            "this version of Triton does not show what ptxas says: install triton 3.5 or newer."
        )
    stack, stores, loads = (sum(int(frame[i]) for frame in frames) for i in range(3))
    static = sum(int(n) for n in re.findall(r"(\d+) bytes smem", log))
    numbers = (int(used[1]), stack, stores, loads, shared + static)
    return Compiled(
        function, target, asm["ttir"], asm["ptx"], asm["cubin"], read_ptx(asm["ptx"]), *numbers
    )


def disassemble(compiled: Compiled) -> str:
    """The machine code as nvdisasm lists it.

    Raises `TargetError` where Triton has no nvdisasm, or one that does not know this code.
    """
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(compiled.binary)
        try:
            command = [knobs.nvidia.nvdisasm.path, "-c", str(file)]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            raise TargetError(
                "this installation of Triton has no nvdisasm that reads the code."
            ) from error


def report(program: Program, kernels: Sequence[Compiled]) -> str:
    """All kernels in a table, then what limits each walk over elements."""
    target = kernels[0].target
    lines = [f"Compiled for {target} by Triton {_triton().__version__}, without a device", ""]
    head = (
        "",
        "loads",
        "masked",
        "stores",
        "masked",
        "registers",
        "stack",
        "spills",
        "local",
        "shared",
    )
    rows = [(*head, "fused", "approximate", "ftz"), *map(_row, kernels)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = (
            cell.ljust(w) if i < 5 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append(f"    {'  '.join(cells)}".rstrip())
    lines += [
        "",
        (
            "    loads, stores: how many x of how many bits; stack, spills, shared: bytes; the "
            "rest are counts"
        ),
    ]
    for one in kernels:
        found = re.fullmatch(r"pass_(\d+)", one.function.name)
        if (
            found
            and program.passes[int(found[1])].domain == Rank.ELEMENT
            and one.target in RESIDENT
        ):
            lines += ["", *(f"    {line}" for line in _limits(one, program.passes[int(found[1])]))]
    return "\n".join(lines)


def _row(one: Compiled) -> tuple[str, ...]:
    code = one.listing
    accesses = (
        _widths(which) for which in (code.loads, code.masked_loads, code.stores, code.masked_stores)
    )
    counts = (one.registers, one.stack, one.spill_stores + one.spill_loads, code.local, one.shared)
    return (
        one.function.name,
        *accesses,
        *map(str, (*counts, code.fused, code.approximate, code.flushing)),
    )


def _widths(accesses: Mapping[int, int]) -> str:
    return " ".join(f"{accesses[bits]}x{bits}" for bits in sorted(accesses, reverse=True)) or "-"


def _limits(one: Compiled, walk: Pass) -> list[str]:
    """What a pass does for each element, and whether memory or arithmetic is its limit."""
    warps, most = one.occupancy
    lines = [
        f"{one.function.name}: with {one.registers} registers {warps} of {most} warps run at once"
    ]
    try:
        way = fast_path(disassemble(one), one.function.name)
    except TargetError as error:
        return [*lines, f"    instructions are not counted: {error}"]
    elements, moved = elements_of(one.function, walk, way), bytes_of(walk)
    wide = f"loads {_widths(way.loads)}, stores {_widths(way.stores)}"
    count = f"{len(way.instructions) / elements:.1f} instructions an element"
    lines.append(f"    whole aligned blocks: {count}, {elements} elements a thread, {wide}")
    if chip := CHIPS.get(one.target):
        least = bound(way, elements, moved, chip)
        memory, arithmetic = (f"{time * 1e12:.2f} ps" for time in (least.memory, least.arithmetic))
        lines.append(
            f"    {chip.name}, an element: {memory} for {moved} bytes at "
            f"{chip.bandwidth / 1e12:g} TB/s, at least {arithmetic} for instructions ({least.by})"
        )
        ratio = least.memory / least.arithmetic
        limit = f"memory, {ratio:.1f} times" if ratio >= 1 else f"arithmetic, {1 / ratio:.1f} times"
        lines.append(f"    the limit is {limit} the other")
    return lines


def bytes_of(walk: Pass) -> int:
    """Bytes that a pass over elements reads and writes for each."""
    read = sum(ITEMSIZE[node.type] for node in walk.loads if node.rank == Rank.ELEMENT)
    return read + sum(ITEMSIZE[node.type] for _, node in walk.stores)


def elements_of(function: Function, walk: Pass, way: Way) -> int:
    """How many elements one thread computes on a way through a kernel; of a loop, in one round as
    it was unrolled."""
    constants = dict(function.constants)
    tile = constants["BLOCK"] if "BLOCK" in constants else constants["LINES"] * constants["COLUMNS"]
    one = max(1, tile // (32 * function.warps))
    return one * max(1, round(way.moved / (one * bytes_of(walk)))) if way.is_loop else one
