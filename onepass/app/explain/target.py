"""What a kernel becomes on a GPU, without one: Triton compiles it for a target, and it is read.

Triton brings NVIDIA's assembler and disassembler and AMD's compiler. Nothing else is needed, and
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
from .gpu_assembly import AssemblyCounts, read_amdgcn, read_ptx
from .sass import Bound, Chip, Way, bound, fast_path

__all__ = ["TARGETS", "CompiledKernel", "TargetError", "compile_for", "disassemble", "report"]

# How many warps and how many blocks run at once on a multiprocessor, by NVIDIA's table of compute
# capabilities.
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
# The GPU for which a target's times are estimated: its clock under load, and the bandwidth that a
# copy measures.
CHIPS = {"sm_90": Chip("H200", multiprocessors=132, clock=1.75e9, bandwidth=4.3e12)}


class TargetError(ValueError):
    """Kernels cannot be compiled for this target, or not here."""


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel for one target: what it was made of, what it became, what its compiler reports.

    `registers` is the number that a thread has. `stack`, `spill_stores`, `spill_loads` and `shared`
    are bytes.
    """

    function: Function
    target: str
    ttir: str
    assembly: str
    binary: bytes
    counts: AssemblyCounts
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int

    @property
    def occupancy(self) -> tuple[int, int]:
        """Warps that a multiprocessor runs at once with these registers, and those that it could.

        Only for NVIDIA's targets. Example: 40 registers a thread are 1,280 a warp, so that 12 warps
        fit each scheduler. Of at most 64, 48 run.
        """
        most_warps, most_blocks = RESIDENT[self.target]
        # Each of four schedulers has 16,384 registers, of which a warp takes multiples of 256.
        registers_of_warp = -(-max(self.registers, 1) * 32 // 256) * 256
        warps = min(most_warps, 4 * (16384 // registers_of_warp))
        blocks = min(warps // self.function.warps, most_blocks)
        return blocks * self.function.warps, most_warps


def compile_for(source: Source, target: str) -> list[CompiledKernel]:
    """Compile every kernel of a module for a target such as `sm_90` or `gfx942`, past all caches.

    Raises `TargetError` for an unknown target, and if Triton is missing, interpreting, or fails.
    """
    if target not in TARGETS:
        raise TargetError(f"there is no target {target!r}: choose one of {', '.join(TARGETS)}.")
    _triton()
    module = load(source)
    return [_compile(module[function.name], function, target) for function in source.functions]


def _triton() -> Any:
    """Return the module; raises `TargetError` if it is not installed."""
    try:
        import triton
    except ImportError as error:
        raise TargetError(
            "kernels for GPUs are compiled by Triton, which is not installed: run pip install "
            "triton."
        ) from error
    return triton


def _compile(kernel: Any, function: Function, target: str) -> CompiledKernel:
    """Compile one kernel, and read what came of it; raises `TargetError` if Triton fails."""
    triton = _triton()
    from triton import knobs

    if not isinstance(kernel, triton.JITFunction):
        raise TargetError(
            "Triton is interpreting kernels in this process, not compiling: unset TRITON_INTERPRET."
        )
    backend = "cuda" if target.startswith("sm_") else "hip"
    log = io.StringIO()
    # What ptxas reports is not cached: the kernel is compiled again, and leaves nothing behind.
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope(), knobs.nvidia.scope():
        knobs.cache.dir = folder
        knobs.nvidia.dump_ptxas_log = True
        try:
            with contextlib.redirect_stdout(log):
                made = triton.compile(
                    _source_of(kernel, function),
                    target=_triton_target(backend, target),
                    options=options(function, backend),
                )
        except (RuntimeError, triton.TritonError) as error:
            lines = str(error).splitlines()
            first_line = next((line for line in lines if line), type(error).__name__)
            raise TargetError(
                f"Triton {triton.__version__} cannot compile {function.name} for {target} "
                f"({first_line}): choose another target, or another version of Triton."
            ) from error
        if backend == "hip":
            return _read_amd(function, target, made)
        return _read_nvidia(function, target, made, log.getvalue())


def _source_of(kernel: Any, function: Function) -> Any:
    """Return a kernel with the types of its arguments, as Triton compiles it."""
    from triton.compiler import ASTSource

    types = dict(function.arguments)
    types |= dict.fromkeys((name for name, _ in function.constants), "constexpr")
    # As at a launch: torch's memory begins at multiples of 16 bytes, and Triton knows.
    aligned: dict[Any, Any] = {
        (index,): [["tt.divisibility", 16]]
        for index, (_, type_) in enumerate(function.arguments)
        if type_.startswith("*")
    }
    constants = dict(function.constants)
    return ASTSource(kernel, signature=types, constexprs=constants, attrs=aligned)


def _triton_target(backend: str, target: str) -> Any:
    """Return the target as Triton names it, with the width of its warps."""
    from triton.backends.compiler import GPUTarget

    lanes = 64 if target.startswith("gfx9") else 32
    return GPUTarget(backend, int(target[3:]) if backend == "cuda" else target, lanes)


def _read_amd(function: Function, target: str, made: Any) -> CompiledKernel:
    """Return what Triton has made for AMD; the assembly itself has the numbers."""
    text = made.asm["amdgcn"]
    fields = re.findall(r"^\s+\.(\w+):\s+(\d+)$", text, re.MULTILINE)
    numbers = {name: int(number) for name, number in fields}
    spilled = 4 * (numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"])
    return CompiledKernel(
        function=function,
        target=target,
        ttir=made.asm["ttir"],
        assembly=text,
        binary=made.asm["hsaco"],
        counts=read_amdgcn(text, made.asm["llir"]),
        registers=numbers["vgpr_count"],
        stack=numbers["private_segment_fixed_size"],
        spill_stores=spilled,
        spill_loads=spilled,
        shared=made.metadata.shared,
    )


def _read_nvidia(function: Function, target: str, made: Any, log: str) -> CompiledKernel:
    """Return what Triton has made for NVIDIA, with the numbers that ptxas has logged."""
    frames = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
    )
    registers = re.search(r"Used (\d+) registers", log)
    if not frames or registers is None:
        raise TargetError(
            "this version of Triton does not show what ptxas says: install triton 3.5 or newer."
        )
    stack, stores, loads = (sum(map(int, numbers)) for numbers in zip(*frames, strict=True))
    static = sum(map(int, re.findall(r"(\d+) bytes smem", log)))
    return CompiledKernel(
        function=function,
        target=target,
        ttir=made.asm["ttir"],
        assembly=made.asm["ptx"],
        binary=made.asm["cubin"],
        counts=read_ptx(made.asm["ptx"]),
        registers=int(registers[1]),
        stack=stack,
        spill_stores=stores,
        spill_loads=loads,
        shared=made.metadata.shared + static,
    )


def disassemble(compiled: CompiledKernel) -> str:
    """Return the machine code as nvdisasm lists it.

    Raises `TargetError` if Triton has no nvdisasm, or one that does not know this code.
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


# --- the report -----------------------------------------------------------------------------------

HEADINGS = (
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
    "fused",
    "approximate",
    "ftz",
)
# The name and the accesses stand on the left of their columns, numbers on the right.
LEFT_COLUMNS = 5
LEGEND = (
    "loads, stores: how many x of how many bits; stack, spills, shared: bytes; the rest are counts"
)


def report(program: Program, kernels: Sequence[CompiledKernel]) -> str:
    """Return a table of all kernels, then what limits each pass over elements."""
    target = kernels[0].target
    lines = [f"Compiled for {target} by Triton {_triton().__version__}, without a device", ""]
    rows = [HEADINGS, *map(_row, kernels)]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    for row in rows:
        cells = []
        for index, (cell, width) in enumerate(zip(row, widths, strict=True)):
            cells.append(cell.ljust(width) if index < LEFT_COLUMNS else cell.rjust(width))
        lines.append(f"    {'  '.join(cells)}".rstrip())
    lines += ["", f"    {LEGEND}"]
    for kernel in kernels:
        index = pass_index_of(program, kernel.function)
        if index is not None and kernel.target in RESIDENT:
            limits = _limits(kernel, program.passes[index])
            lines += ["", *(f"    {line}" for line in limits)]
    return "\n".join(lines)


def pass_index_of(program: Program, function: Function) -> int | None:
    """Return the index of the pass over elements that a function is; None for other functions."""
    found = re.fullmatch(r"pass_(\d+)", function.name)
    if found is None:
        return None
    index = int(found[1])
    return index if program.passes[index].domain == Rank.ELEMENT else None


def _row(kernel: CompiledKernel) -> tuple[str, ...]:
    """Return a kernel's cells in the table."""
    counts = kernel.counts
    accesses = (counts.loads, counts.masked_loads, counts.stores, counts.masked_stores)
    numbers = (
        kernel.registers,
        kernel.stack,
        kernel.spill_stores + kernel.spill_loads,
        counts.local,
        kernel.shared,
        counts.fused,
        counts.approximate,
        counts.flushing,
    )
    return (kernel.function.name, *map(_widths, accesses), *map(str, numbers))


def _widths(accesses: Mapping[int, int]) -> str:
    """Return accesses such as `4x128 1x32`: four of 128 bits, and one of 32."""
    return " ".join(f"{accesses[bits]}x{bits}" for bits in sorted(accesses, reverse=True)) or "-"


def _limits(kernel: CompiledKernel, pass_: Pass) -> list[str]:
    """Return what a pass does for each element, and whether memory or arithmetic is its limit."""
    name = kernel.function.name
    warps, most = kernel.occupancy
    first = f"{name}: with {kernel.registers} registers {warps} of {most} warps run at once"
    try:
        way = fast_path(disassemble(kernel), name)
    except TargetError as error:
        return [first, f"    instructions are not counted: {error}"]
    elements = elements_of(kernel.function, pass_, way)
    instructions = f"{len(way.instructions) / elements:.1f} instructions an element"
    accesses = f"loads {_widths(way.loads)}, stores {_widths(way.stores)}"
    lines = [
        first,
        f"    whole aligned blocks: {instructions}, {elements} elements a thread, {accesses}",
    ]
    chip = CHIPS.get(kernel.target)
    if chip is not None:
        lines += _compare_limits(bound(way, elements, bytes_of(pass_), chip), bytes_of(pass_), chip)
    return lines


def _compare_limits(least: Bound, moved: int, chip: Chip) -> list[str]:
    """Return the least times of an element for memory and for arithmetic, and which is longer."""
    memory = f"{least.memory * 1e12:.2f} ps"
    arithmetic = f"{least.arithmetic * 1e12:.2f} ps"
    times = (
        f"    {chip.name}, an element: {memory} for {moved} bytes at {chip.bandwidth / 1e12:g} "
        f"TB/s, at least {arithmetic} for instructions ({least.by})"
    )
    ratio = least.memory / least.arithmetic
    limit = f"memory, {ratio:.1f} times" if ratio >= 1 else f"arithmetic, {1 / ratio:.1f} times"
    return [times, f"    the limit is {limit} the other"]


def bytes_of(pass_: Pass) -> int:
    """Return the bytes that a pass over elements reads and writes for each."""
    read = sum(ITEMSIZE[node.type] for node in pass_.loads if node.rank == Rank.ELEMENT)
    written = sum(ITEMSIZE[node.type] for _, node in pass_.stores)
    return read + written


def elements_of(function: Function, pass_: Pass, way: Way) -> int:
    """Return how many elements one thread computes on a way through a kernel.

    If the way is a loop, these are the elements of one round, which may be unrolled.

    Example: a block of 1,024 elements and 4 warps of 32 threads are 8 elements a thread. If a round
    moves twice the bytes of 8 elements, it was unrolled twice, and computes 16.
    """
    constants = dict(function.constants)
    if "BLOCK" in constants:
        tile = constants["BLOCK"]
    else:
        tile = constants["LINES"] * constants["COLUMNS"]
    elements = max(1, tile // (32 * function.warps))
    if not way.is_loop:
        return elements
    unrolled = round(way.moved / (elements * bytes_of(pass_)))
    return elements * max(1, unrolled)
