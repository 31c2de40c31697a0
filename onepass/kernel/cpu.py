"""Backend 2: a program compiled for the host by LLVM; one call for all tensors of all groups.

The launch is given addresses and trusts them: `plan` is where they are taken from live tensors and checked.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from .host import HostCode
from .ir import Rank
from .lower import CHUNK, FIELDS, lower
from .native import Library, openmp, run_in_threads
from .program import Pass, Program

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
        inner = np.flatnonzero(np.diff(unit, prepend=0)) if len(unit) else unit
        self.unit_begin = np.unique(np.concatenate([[0], inner, [len(self.tensor)]])).astype(np.int64)
        self.units = len(self.unit_begin) - 1
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
        launch = self.library.address("launch")
        signature = (None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
        self._launch = ctypes.CFUNCTYPE(*signature)(launch)
        self._workers = [self.library.address(f"worker_{k}") for k in range(len(program.passes))]
        reductions = [r for one in program.passes for r in one.reductions]
        self._hosts = [HostCode(one.inputs, reductions) for one in program.passes]
        self._per_tensor = [_per_tensor(one) for one in program.passes]

    @staticmethod
    def split(numel: np.ndarray) -> Work:
        """How to cut a walk over tensors of these sizes; good for any number of launches."""
        return Work(numel)

    def launch(
        self,
        pointers: np.ndarray,
        work: Work,
        rows: np.ndarray,
        hypers: Mapping[str, np.ndarray],
        threads: int,
    ) -> None:
        """Run the program once, in place.

        `pointers` (columns, tensors; uint64, C order) are the addresses of dense memory, in the program's order of
        columns; `rows` (tensors; int64) says which entry of the `hypers` arrays (float64) a tensor uses.
        """
        known: list[np.ndarray] = []
        missing = np.zeros(len(work.numel))
        total = sum(len(one.reductions) for one in self.program.passes)
        for k, one in enumerate(self.program.passes):
            values = [*known, *[missing] * (total - len(known))]
            table, index = self._table(k, work, rows, hypers, values)
            partials = np.zeros((len(work.tensor), len(one.reductions)))
            self._run(k, pointers, work, index, table, partials, threads)
            known += [work.combine(reduction.op, partials[:, r]) for r, reduction in enumerate(one.reductions)]

    def _table(
        self, k: int, work: Work, rows: np.ndarray, hypers: Mapping[str, np.ndarray], known: Sequence[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pass k's inputs, a row for each setting or, where they depend on a tensor's own values, for each tensor."""
        count = len(next(iter(hypers.values()), np.zeros(1)))
        leaves = dict(hypers)
        if self._per_tensor[k]:
            count, leaves = len(rows), {name: values[rows] for name, values in hypers.items()}
            leaves["numel"] = work.numel.astype(np.float64)
            rows = np.arange(len(rows))
        table = np.empty((count, len(self.program.passes[k].inputs)), COMPUTE[self.program.compute])
        self._hosts[k].run(leaves, known, table)
        return table, rows

    def _run(
        self,
        k: int,
        pointers: np.ndarray,
        work: Work,
        rows: np.ndarray,
        table: np.ndarray,
        partials: np.ndarray,
        threads: int,
    ) -> None:
        fields = {"counter": 0, "units": work.units, "tensors": len(work.numel), **work.addresses}
        fields |= {"pointers": address(pointers), "rows": address(rows), "table": address(table)}
        fields["partials"] = address(partials)
        arguments = np.array([fields[name] for name in FIELDS], dtype=np.uint64)
        threads = max(1, min(threads, work.units // UNITS_PER_THREAD))
        parallel = openmp() if threads > 1 else 0
        if threads > 1 and not parallel:
            run_in_threads(self._workers[k], address(arguments), threads)
        else:
            self._launch(self._workers[k], address(arguments), threads, parallel)


def _per_tensor(one: Pass) -> bool:
    return any(node.rank == Rank.TENSOR for node in one.inputs)


@lru_cache(maxsize=256)
def compile(program: Program) -> Kernel:
    """The program's kernel; compiled once a process."""
    return Kernel(program)
