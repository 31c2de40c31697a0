"""Machine code: LLVM IR in, callable functions out, and the OpenMP runtime that torch itself runs
on.

Nothing but llvmlite is needed on the user's machine. Code is compiled for the host's own
instruction set, without fast-math: no reassociation, no contraction to fused multiply-add.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import llvmlite.binding as llvm
import torch

from ..graph.caches import hold_in_forks

# It is held in each of llvmlite's calls; what is freed calls llvmlite at any time.
hold_in_forks(llvm.ffi.lib._lock)


@cache
def _host() -> tuple[llvm.Target, str, str]:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    return target, llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()


def target_machine() -> llvm.TargetMachine:
    """The host, with all instructions that it has; a new one at each call, because an engine takes
    it and frees it."""
    target, cpu, features = _host()
    return target.create_target_machine(cpu=cpu, features=features, opt=2, jit=True)


def missing_instructions() -> str:
    """The name of an instruction set that kernels need and this host lacks, or an empty string.

    Without them LLVM would call functions of a compiler's runtime library, which nobody has loaded.
    """
    needed = ("sse4.1", "f16c") if platform.machine().lower() in ("x86_64", "amd64") else ()
    features = llvm.get_host_cpu_features()
    return next((name for name in needed if not features.get(name)), "")


def has_bfloat16_products() -> bool:
    """Whether this processor multiplies matrices of bfloat16 in hardware."""
    features = llvm.get_host_cpu_features()
    return any(features.get(name) for name in ("avx512bf16", "amx-bf16", "bf16"))


def optimize(source: str, machine: llvm.TargetMachine) -> llvm.ModuleRef:
    """LLVM IR, parsed, verified and optimized for a machine."""
    # Of its own: what a context has seen, types and constants, it never forgets.
    module = llvm.parse_assembly(source, llvm.create_context())
    try:
        module.verify()
        tuning = llvm.create_pipeline_tuning_options(speed_level=2)
        tuning.loop_vectorization = True
        tuning.slp_vectorization = False
        builder = llvm.create_pass_builder(machine, tuning)
        manager = builder.getModulePassManager()
        manager.run(module, builder)
        _free(manager)
    except BaseException:
        # Before its context, whatever holds the exception.
        module.close()
        raise
    return module


def _free(manager: llvm.ModulePassManager) -> None:
    """Free a pass manager and its passes, 90 kB.

    From llvmlite 0.45 on an empty method of its first base class hides the one that does it.
    """
    for base in type(manager).__mro__:
        if base is not llvm.ffi.ObjectRef and "_dispose" in vars(base):
            vars(base)["_dispose"](manager)
            break
    manager.detach()


def object_code(source: str) -> bytes:
    """An object file for this host: the machine code of LLVM IR."""
    machine = target_machine()
    module = optimize(source, machine)
    try:
        return machine.emit_object(module)
    finally:
        module.close()


class Library:
    """Compiled functions, alive as long as this object: whoever keeps an address keeps the library
    too."""

    def __init__(self, source: str) -> None:
        """Compile LLVM IR. Malformed IR raises RuntimeError with LLVM's words: a defect here, never
        of the user."""
        self.source = source
        # The engine is given object code, and not IR: what compiles keeps a megabyte of tables.
        code = llvm.ObjectFileRef.from_data(object_code(source))
        nothing = llvm.parse_assembly("")
        self._engine = llvm.create_mcjit_compiler(nothing, target_machine())
        self._engine.remove_module(nothing)
        self._engine.add_object_file(code)
        self._engine.finalize_object()

    def address(self, name: str) -> int:
        """The address of a function."""
        return self._engine.get_function_address(name)

    @property
    def optimized(self) -> str:
        """The library's IR as LLVM left it."""
        return str(optimize(self.source, target_machine()))

    def assembly(self) -> str:
        """The host's assembly of the whole library."""
        machine = target_machine()
        return machine.emit_assembly(optimize(self.source, machine))


def openmp() -> int:
    """The address of GOMP_parallel in the OpenMP runtime that torch has loaded, or 0 where there is
    none.

    Running on that runtime means sharing torch's threads instead of adding as many again.
    """
    functions = openmp_functions()
    return 0 if functions is None else functions[0]


@cache
def openmp_functions(*names: str) -> list[int] | None:
    """The addresses of functions of the OpenMP runtime that torch has loaded, or of GOMP_parallel
    if none is named."""
    for path in _openmp_candidates():
        try:
            library = ctypes.CDLL(path)
            # Where this one is, the others are those of the same runtime.
            found = [getattr(library, name) for name in ("GOMP_parallel", *names)]
        except (OSError, AttributeError):
            continue
        return [ctypes.cast(function, ctypes.c_void_p).value or 0 for function in found][
            bool(names) :
        ]
    return None


def _openmp_candidates() -> list[str]:
    names = ("libgomp", "libiomp5", "libomp")
    if sys.platform == "linux":
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            paths = dict.fromkeys(
                line.split(maxsplit=5)[-1].strip() for line in maps if "/" in line
            )
    else:
        paths = dict.fromkeys(str(p) for p in (Path(torch.__file__).parent / "lib").glob("*omp*"))
    return [p for p in paths if os.path.basename(p).startswith(names)]


@cache
def _pool(threads: int, pid: int) -> ThreadPoolExecutor:
    # Keyed by process: a forked child has none of its parent's threads.
    return ThreadPoolExecutor(threads, thread_name_prefix="onepass")


def run_in_threads(worker: int, argument: int, threads: int) -> None:
    """Call `void worker(void*)` once in each of so many threads; the fallback where no OpenMP
    runtime is loaded."""
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(worker)
    pool = _pool(threads, os.getpid())
    for future in [pool.submit(function, argument) for _ in range(threads)]:
        future.result()
