"""Backend 2: a program compiled for the host by LLVM; one call for all tensors of all groups.

The launch is given addresses and trusts them: `plan` is where they are taken from live tensors and
checked.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import torch

from ..graph.caches import share
from ..graph.ir import Node, Rank
from ..graph.passes import Call, Pass, Program
from ..llvm.native import Library, openmp, run_in_threads
from ..llvm.uniforms import SIZES, leaf_names
from ..tensors.temporaries import Temporaries
from . import team
from .chunks import Chunks, Work, address
from .elements import lower
from .walk import FIELDS

COMPUTE = {"f32": np.float32, "f64": np.float64}
# Units of work below which another thread costs more than it saves.
UNITS_PER_THREAD = 4


class Kernel:
    """A compiled program, callable on columns of any number of tensors."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.source = lower(program)
        self.library = Library(self.source)
        signature = (None, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
        passes = range(len(program.passes))
        self.launch = [
            ctypes.CFUNCTYPE(*signature)(self.library.address(f"launch_{k}")) for k in passes
        ]
        self.workers = [self.library.address(f"worker_{k}") for k in passes]
        self.leaves = {name: i for i, name in enumerate(leaf_names(program))}
        self.inputs = [{node: i for i, node in enumerate(one.inputs)} for one in program.passes]

    def concurrency(self) -> int:
        """How many tensors may be worked on at once: as many as torch has threads."""
        return torch.get_num_threads()

    def is_capturing(self) -> bool:
        """Whether a step would be recorded into a graph: never here."""
        return False

    def split(self, sizes: np.ndarray) -> Work:
        """How to cut walks over tensors of these sizes; good for any number of launches."""
        return Work(sizes, {one.domain for one in self.program.passes}, self.program.by_lines)

    def prepare(self, pointers: np.ndarray, work: Work, rows: np.ndarray, settings: int) -> Launch:
        """Everything about a launch that may stay the same from step to step."""
        return Launch(self, pointers, work, rows, settings)


@dataclass
class Walk:
    """One pass of a launch: whether each tensor has a row of its own, and the arrays that the
    arguments point into."""

    own: bool
    arrays: dict[str, np.ndarray]
    arguments: np.ndarray
    address: int


class Launch:
    """A kernel with its arguments laid out; `run` may be called again and again while they stay
    where they are."""

    def __init__(
        self, kernel: Kernel, pointers: np.ndarray, work: Work, rows: np.ndarray, settings: int
    ) -> None:
        """
        `pointers` (columns, tensors; uint64, C order) hold the addresses of dense memory, in the
        program's order of columns, and are read at each run; `rows` (tensors; int64) says which of
        the `settings` a tensor uses.
        """
        self.kernel, self.work, self.rows = kernel, work, np.ascontiguousarray(rows, np.int64)
        self.leaves = np.zeros((len(kernel.leaves), settings))
        parts = _parts(kernel.program, work)
        self._temporaries = Temporaries(kernel.program, work.sizes, parts, torch.device("cpu"))
        self._walks = [self._lay_out(one, pointers) for one in kernel.program.passes]
        # Up to the last function of matrices nothing is stored.
        self._first_to_store = max((call.after + 1 for call in kernel.program.calls), default=0)
        self._known: list[np.ndarray] = []

    def _lay_out(self, one: Pass, pointers: np.ndarray) -> Walk:
        own = any(node.rank == Rank.TENSOR for node in one.inputs)
        settings = len(self.rows) if own else self.leaves.shape[1]
        chunks = self.work.chunks[one.domain]
        arrays = {
            "pointers": pointers,
            "temporaries": self._temporaries.pointers,
            "rows": np.arange(settings) if own else self.rows,
            "table": np.empty((settings, len(one.inputs)), COMPUTE[self.kernel.program.compute]),
            "partials": np.zeros((len(chunks.tensor), len(one.reductions))),
            "leaves": np.zeros((len(self.kernel.leaves), settings)) if own else self.leaves,
        }
        fields = {
            "counter": 0,
            "units": chunks.units,
            "tensors": len(self.work.numel),
            "settings": settings,
        }
        fields |= {"finish": team.finish(), "finished": 0}
        fields |= chunks.addresses | {name: address(array) for name, array in arrays.items()}
        arguments = np.array([fields[name] for name in FIELDS], np.uint64)
        return Walk(own, arrays, arguments, address(arguments))

    def run(self, threads: int) -> None:
        """Run the program once, in place, with the hyper-parameters in `leaves` (leaf, setting;
        float64)."""
        self.begin(threads)
        self.finish(threads)

    def begin(self, threads: int) -> None:
        """Do what may fail, the functions of matrices and what they are given; to be finished, or
        cancelled."""
        self._known.clear()
        if not self._first_to_store:
            return
        try:
            self._temporaries.allocate()
            for k in range(self._first_to_store):
                self._run_pass(k, threads)
        except BaseException:
            self.cancel()
            raise
        self._temporaries.release_sources()

    def finish(self, threads: int) -> None:
        """Do the rest, which stores."""
        for k in range(self._first_to_store, len(self._walks)):
            self._run_pass(k, threads)
        self._temporaries.release()

    def cancel(self) -> None:
        """Give back the memory of what has begun and will not be finished."""
        self._temporaries.release()

    def _run_pass(self, k: int, threads: int) -> None:
        """One walk and what follows it."""
        walk, one = self._walks[k], self.kernel.program.passes[k]
        if walk.own:
            self._spread(walk.arrays["leaves"], self._known)
        chunks = self.work.chunks[one.domain]
        self._walk(k, walk.address, max(1, min(threads, chunks.units // UNITS_PER_THREAD)))
        for r, reduction in enumerate(one.reductions):
            self._known.append(
                chunks.combine(reduction.op, walk.arrays["partials"][:, r], len(self.rows))
            )
        if one.sums:
            self._complete(one, chunks)
        for call in self.kernel.program.calls:
            if call.after == k:
                self._temporaries.call(call, self._numbers(call))

    def _complete(self, one: Pass, chunks: Chunks) -> None:
        """Add up the sums down the columns of matrices that several chunks have walked, chunk after
        chunk."""
        for reduction in one.sums:
            if one.domain == Rank.ELEMENT and reduction.node.rank == Rank.COLUMN:
                for t in np.flatnonzero(chunks.parts > 1).tolist():
                    shares = self._temporaries.shares(reduction.into, t).numpy()
                    of = np.add if reduction.node.op == "sum" else np.maximum
                    # Infinities of both signs are no news.
                    with np.errstate(all="ignore"):
                        for share in shares[1:]:
                            of(shares[0], share, out=shares[0])

    def scalars(self) -> dict[str, np.ndarray]:
        """Each tensor's new scalars, as the last run computed them, in the compute type."""
        last = len(self._walks) - 1
        return {name: self._of_tensors(last, node) for name, node in self.kernel.program.scalars}

    def _numbers(self, call: Call) -> list[list[float]]:
        """The numbers that a function of matrices is called with, for each tensor."""
        values = [self._of_tensors(call.after, node) for node in call.numbers]
        return np.stack(values, axis=1).tolist() if values else [[]] * len(self.rows)

    def _of_tensors(self, k: int, node: Node) -> np.ndarray:
        """A host value of pass k, for each tensor."""
        if node.op == "const":
            return np.full(len(self.rows), node.attr, COMPUTE[self.kernel.program.compute])
        arrays = self._walks[k].arrays
        return arrays["table"][arrays["rows"], self.kernel.inputs[k][node]]

    def _spread(self, leaves: np.ndarray, known: list[np.ndarray]) -> None:
        """A tensor's own row: its setting's hyper-parameters, its sizes, and what has been reduced
        so far."""
        hypers = len(self.kernel.program.hypers)
        leaves[:hypers] = self.leaves[:hypers, self.rows]
        sizes = {
            "numel": self.work.numel,
            "rows": self.work.sizes[:, 1],
            "columns": self.work.sizes[:, 2],
        }
        for name, leaf in SIZES.items():
            leaves[self.kernel.leaves[leaf]] = sizes[name]
        for i, values in enumerate(known, hypers + len(SIZES)):
            leaves[i] = values

    def _walk(self, k: int, arguments: int, threads: int) -> None:
        parallel = openmp() if threads > 1 else 0
        if threads > 1 and not parallel:
            self.kernel.launch[k](arguments, 0, 0)
            run_in_threads(self.kernel.workers[k], arguments, threads)
        else:
            self.kernel.launch[k](arguments, threads, parallel)


def _parts(program: Program, work: Work) -> dict[str, np.ndarray]:
    """Of what has one value a column: how many chunks keep sums of their own, for each tensor."""
    columns = (one.name for one in program.temporaries if one.rank == Rank.COLUMN)
    return (
        dict.fromkeys(columns, work.chunks[Rank.ELEMENT].parts)
        if Rank.ELEMENT in work.chunks
        else {}
    )


@share
def make_kernel(program: Program) -> Kernel:
    """The program's kernel; compiled once, as long as somebody has it."""
    return Kernel(program)
