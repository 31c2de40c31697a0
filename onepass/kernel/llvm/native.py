"""Machine code: LLVM IR in, callable functions out; and the OpenMP runtime of torch itself.

    library = Library("define i32 @answer() { ret i32 42 }")
    ctypes.CFUNCTYPE(ctypes.c_int32)(library.address("answer"))()    # 42

Only llvmlite is needed on the user's machine. Code is compiled for the host's own instruction set,
without fast-math: no reassociation, no contraction to fused multiply-add.
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
    """Return this machine's target, and the names of its processor and instruction sets."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    return target, llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()


def target_machine() -> llvm.TargetMachine:
    """Return the host with all instructions that it has.

    It is a new one at each call, because an engine takes it and frees it.
    """
    target, cpu, features = _host()
    return target.create_target_machine(cpu=cpu, features=features, opt=2, jit=True)


def missing_instructions() -> str:
    """Return the name of an instruction set that kernels need and this host lacks, or "".

    Without it LLVM would call functions of a compiler's runtime library, which nobody has loaded.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ""
    features = llvm.get_host_cpu_features()
    missing = [name for name in ("sse4.1", "f16c") if not features.get(name)]
    return missing[0] if missing else ""


def has_bfloat16_products() -> bool:
    """Whether this processor multiplies matrices of bfloat16 in hardware."""
    features = llvm.get_host_cpu_features()
    return any(features.get(name) for name in ("avx512bf16", "amx-bf16", "bf16"))


def optimize(source: str, machine: llvm.TargetMachine) -> llvm.ModuleRef:
    """Return LLVM IR parsed, verified and optimized for a machine.

    Raises `RuntimeError` with LLVM's words if the IR is malformed.
    """
    # In a context of its own: a context never forgets the types and constants that it has seen.
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

    From llvmlite 0.45 on, an empty method of its first base class hides the one that frees it.
    """
    for base in type(manager).__mro__:
        if base is not llvm.ffi.ObjectRef and "_dispose" in vars(base):
            vars(base)["_dispose"](manager)
            break
    manager.detach()


def object_code(source: str) -> bytes:
    """Return an object file for this host: the machine code of LLVM IR."""
    machine = target_machine()
    module = optimize(source, machine)
    try:
        return machine.emit_object(module)
    finally:
        module.close()


class Library:
    """Compiled functions, alive as long as this object.

    Whoever keeps a function's address must keep the library, too.
    """

    def __init__(self, source: str) -> None:
        """Compile LLVM IR.

        Raises `RuntimeError` with LLVM's words if the IR is malformed: a defect here, never of the
        user.
        """
        self.source = source
        # The engine gets object code, not IR: an engine that compiles keeps a megabyte of tables.
        code = llvm.ObjectFileRef.from_data(object_code(source))
        nothing = llvm.parse_assembly("")
        self._engine = llvm.create_mcjit_compiler(nothing, target_machine())
        self._engine.remove_module(nothing)
        self._engine.add_object_file(code)
        self._engine.finalize_object()

    def address(self, name: str) -> int:
        """Return the address of a function."""
        return self._engine.get_function_address(name)

    @property
    def optimized(self) -> str:
        """The library's IR as LLVM left it."""
        return str(optimize(self.source, target_machine()))

    def assembly(self) -> str:
        """Return the host's assembly of the whole library."""
        machine = target_machine()
        return machine.emit_assembly(optimize(self.source, machine))


def has_interpreter_lock() -> bool:
    """Whether only one thread of Python runs at a time.

    Machine code that reads Python's objects relies on it: nobody frees them meanwhile.
    """
    return getattr(sys, "_is_gil_enabled", lambda: True)()


def openmp() -> int:
    """Return the address of GOMP_parallel in the OpenMP runtime of torch, or 0 if there is none.

    Running on that runtime means sharing torch's threads instead of adding as many again.
    """
    functions = openmp_functions()
    return 0 if functions is None else functions[0]


@cache
def openmp_functions(*names: str) -> list[int] | None:
    """Return the addresses of functions of the OpenMP runtime that torch has loaded.

    If no function is named, that is the address of GOMP_parallel. None if there is no runtime.
    """
    for path in _openmp_candidates():
        try:
            library = ctypes.CDLL(path)
            parallel = library.GOMP_parallel
            # A library that has this function has the others of the same runtime.
            functions = [getattr(library, name) for name in names]
        except (OSError, AttributeError):
            continue
        return [
            ctypes.cast(function, ctypes.c_void_p).value or 0
            for function in functions or [parallel]
        ]
    return None


def _openmp_candidates() -> list[str]:
    """Return the paths of libraries that may be the runtime; on Linux only loaded ones."""
    if sys.platform == "linux":
        paths = _loaded_files()
    else:
        paths = [str(path) for path in (Path(torch.__file__).parent / "lib").glob("*omp*")]
    names = ("libgomp", "libiomp5", "libomp")
    return [path for path in paths if os.path.basename(path).startswith(names)]


def _loaded_files() -> list[str]:
    """Return the files that are mapped into this process, each once."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        paths = [line.split(maxsplit=5)[-1].strip() for line in maps if "/" in line]
    return list(dict.fromkeys(paths))


@cache
def _pool(threads: int, pid: int) -> ThreadPoolExecutor:
    """Return this process's pool of threads."""
    # Keyed by process: a forked child has none of its parent's threads.
    return ThreadPoolExecutor(threads, thread_name_prefix="onepass")


def run_in_threads(worker: int, argument: int, threads: int) -> None:
    """Call `void worker(void*)` once in each of this many threads.

    This is for processes in which no OpenMP runtime is loaded.
    """
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(worker)
    pool = _pool(threads, os.getpid())
    futures = [pool.submit(function, argument) for _ in range(threads)]
    for future in futures:
        future.result()
