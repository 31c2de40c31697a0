"""Backend 2: a program compiled for the host by LLVM; one call for all tensors of all groups.

The launch is given addresses and trusts them: `plan` is where they are taken from live tensors and checked.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .ir import Rank
from .lower import NUMEL, leaf_names, lower
from .native import Library, openmp, run_in_threads
from .program import Pass, Program
from .walk import CHUNK, FIELDS

COMPUTE = {"f32": np.float32, "f64": np.float64}
# A tensor's fixed cost in a walk, in elements: keeps the threads' shares even among very small tensors.
OVERHEAD = 128
# Units of work below which another thread costs more than it saves.
UNITS_PER_THREAD = 4


def address(array: np.ndarray) -> int:
    """Where an array's memory begins; `array.ctypes` says the same three times slower."""
    return array.__array_interface__["data"][0]


class Work:
    """How a walk over tensors is cut: chunks of at most CHUNK elements, gathered into units that threads take.

    Chunks begin at multiples of CHUNK of the tensor's own elements, so that what a chunk computes does not depend on
    the other tensors or on the number of threads.
    """

    def __init__(self, numel: np.ndarray) -> None:
        """`numel` holds each tensor's number of elements; 0 leaves a tensor untouched."""
        self.numel = np.ascontiguousarray(numel, dtype=np.int64)
        counts = -(-self.numel // CHUNK)
        self.walked = np.flatnonzero(counts)
        self.first = (np.cumsum(counts) - counts)[self.walked]
        self.tensor = np.repeat(np.arange(len(numel)), counts)
        self.start = (np.arange(len(self.tensor)) - np.repeat(self.first, counts[self.walked])) * CHUNK
        cost = np.cumsum(np.minimum(CHUNK, self.numel[self.tensor] - self.start) + OVERHEAD)
        unit = cost // (CHUNK + OVERHEAD)
        starts = np.flatnonzero(np.diff(unit, prepend=-1))
        self.unit_begin = np.append(starts, len(self.tensor)).astype(np.int64)
        self.units = len(starts)
        self.addresses = {
            "unit_begin": address(self.unit_begin),
            "chunk_tensor": address(self.tensor),
            "chunk_start": address(self.start),
            "numel": address(self.numel),
        }

    def combine(self, op: str, partials: np.ndarray) -> np.ndarray:
        """One value a tensor from one a chunk: sums chunk after chunk, from 0; 0 for a tensor without elements."""
        result = np.zeros(len(self.numel))
        if op == "sum":
            result += np.bincount(self.tensor, partials, len(result))
        elif len(self.walked):
            result[self.walked] = np.maximum.reduceat(partials, self.first)
        return result


class Kernel:
    """A compiled program, callable on columns of any number of tensors."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.source = lower(program)
        self.library = Library(self.source)
        signature = (None, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
        passes = range(len(program.passes))
        self.launch = [ctypes.CFUNCTYPE(*signature)(self.library.address(f"launch_{k}")) for k in passes]
        self.workers = [self.library.address(f"worker_{k}") for k in passes]
        self.leaves = {name: i for i, name in enumerate(leaf_names(program))}

    @staticmethod
    def split(numel: np.ndarray) -> Work:
        """How to cut a walk over tensors of these sizes; good for any number of launches."""
        return Work(numel)

    def prepare(self, pointers: np.ndarray, work: Work, rows: np.ndarray, settings: int) -> Launch:
        """Everything about a launch that may stay the same from step to step."""
        return Launch(self, pointers, work, rows, settings)


class Walk(NamedTuple):
    """One pass of a launch: whether each tensor has a row of its own, and the arrays that the arguments point into."""

    own: bool
    arrays: dict[str, np.ndarray]
    arguments: np.ndarray


class Launch:
    """A kernel with its arguments laid out; `run` may be called again and again while they stay where they are."""

    def __init__(self, kernel: Kernel, pointers: np.ndarray, work: Work, rows: np.ndarray, settings: int) -> None:
        """
        `pointers` (columns, tensors; uint64, C order) hold the addresses of dense memory, in the program's order of
        columns, and are read at each run; `rows` (tensors; int64) says which of the `settings` a tensor uses.
        """
        self.kernel, self.work, self.rows = kernel, work, np.ascontiguousarray(rows, np.int64)
        self.leaves = np.zeros((len(kernel.leaves), settings))
        self._walks = [self._lay_out(one, pointers) for one in kernel.program.passes]

    def _lay_out(self, one: Pass, pointers: np.ndarray) -> Walk:
        own = any(node.rank == Rank.TENSOR for node in one.inputs)
        settings = len(self.rows) if own else self.leaves.shape[1]
        arrays = {
            "pointers": pointers,
            "rows": np.arange(settings) if own else self.rows,
            "table": np.empty((settings, len(one.inputs)), COMPUTE[self.kernel.program.compute]),
            "partials": np.zeros((len(self.work.tensor), len(one.reductions))),
            "leaves": np.zeros((len(self.kernel.leaves), settings)) if own else self.leaves,
        }
        fields = {"counter": 0, "units": self.work.units, "tensors": len(self.work.numel), "settings": settings}
        fields |= self.work.addresses | {name: address(array) for name, array in arrays.items()}
        return Walk(own, arrays, np.array([fields[name] for name in FIELDS], np.uint64))

    def run(self, threads: int) -> None:
        """Run the program once, in place, with the hyper-parameters in `leaves` (leaf, setting; float64)."""
        threads = max(1, min(threads, self.work.units // UNITS_PER_THREAD))
        known: list[np.ndarray] = []
        for k, (walk, one) in enumerate(zip(self._walks, self.kernel.program.passes, strict=True)):
            if walk.own:
                self._spread(walk.arrays["leaves"], known)
            self._walk(k, address(walk.arguments), threads)
            for r, reduction in enumerate(one.reductions):
                known.append(self.work.combine(reduction.op, walk.arrays["partials"][:, r]))

    def _spread(self, leaves: np.ndarray, known: list[np.ndarray]) -> None:
        """A tensor's own row: its setting's hyper-parameters, its size, and what has been reduced so far."""
        hypers = self.kernel.leaves[NUMEL]
        leaves[:hypers] = self.leaves[:hypers, self.rows]
        leaves[hypers] = self.work.numel
        for i, values in enumerate(known, hypers + 1):
            leaves[i] = values

    def _walk(self, k: int, arguments: int, threads: int) -> None:
        parallel = openmp() if threads > 1 else 0
        if threads > 1 and not parallel:
            self.kernel.launch[k](arguments, 0, 0)
            run_in_threads(self.kernel.workers[k], arguments, threads)
        else:
            self.kernel.launch[k](arguments, threads, parallel)


@lru_cache(maxsize=256)
def compile(program: Program) -> Kernel:
    """The program's kernel; compiled once a process."""
    return Kernel(program)
