"""Launches on the CPU: a program compiled by LLVM, one call of each pass for all tensors.

The launch is given addresses and trusts them: whoever prepares it takes them from live tensors and
checks these.
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
from ..tensors.launching import NUMPY, LaunchInTwo, input_index
from . import team
from .chunks import Chunks, WorkInChunks, address
from .elements import llvm_text
from .walk import FIELDS

# Units of work below which another thread costs more than it saves.
UNITS_PER_THREAD = 4


class Kernel:
    """A compiled program, callable on columns of any number of tensors."""

    def __init__(self, program: Program) -> None:
        """Compile `program` for this processor."""
        self.program = program
        self.source = llvm_text(program)
        self.library = Library(self.source)
        pointer = ctypes.c_void_p
        signature = ctypes.CFUNCTYPE(None, pointer, ctypes.c_int, pointer)
        # For each pass, `launch_k` as a function, and the address of `worker_k`.
        self.launch = []
        self.workers: list[int] = []
        for pass_index in range(len(program.passes)):
            address = self.library.address(f"launch_{pass_index}")
            self.launch.append(signature(address))
            worker = self.library.address(f"worker_{pass_index}")
            self.workers.append(worker)
        names = leaf_names(program)
        self.leaves = {name: leaf for leaf, name in enumerate(names)}
        self.inputs = input_index(program)

    def concurrency(self) -> int:
        """Return how many tensors may be worked on at once: as many as torch has threads."""
        return torch.get_num_threads()

    def is_capturing(self) -> bool:
        """Whether a step would be recorded into a graph: never here."""
        return False

    def split(self, sizes: np.ndarray) -> WorkInChunks:
        """Return how to cut walks over tensors of these sizes; good for any number of launches."""
        domains = {pass_.domain for pass_ in self.program.passes}
        return WorkInChunks(sizes, domains, self.program.by_lines)

    def prepare(
        self,
        pointers: np.ndarray,
        work: WorkInChunks,
        setting_index: np.ndarray,
        settings: int,
    ) -> Launch:
        """Return a launch, with everything that may stay the same from step to step.

        The arguments are those of `Launch`.
        """
        return Launch(self, pointers, work, setting_index, settings)


@dataclass
class Walk:
    """One pass of a launch: what its machine code is told.

    `is_per_tensor` says whether each tensor has uniforms of its own, as these need its sums or its
    sizes; else there is one line of them for each setting. `arguments` are the values of
    `walk.FIELDS`, at `address`, and point into `arrays`, which live as long.
    """

    is_per_tensor: bool
    arrays: dict[str, np.ndarray]
    arguments: np.ndarray
    address: int


class Launch(LaunchInTwo):
    """A kernel with its arguments laid out; see `LaunchInTwo` for its order.

    `run` may be called again and again while the arguments stay where they are.
    """

    def __init__(
        self,
        kernel: Kernel,
        pointers: np.ndarray,
        work: WorkInChunks,
        setting_index: np.ndarray,
        settings: int,
    ) -> None:
        """Lay out the arguments of every pass.

        `pointers` (columns, tensors; uint64, C order) holds the addresses of dense memory, in the
        program's order of columns, and is read at each run; `setting_index` (tensors; int64) says
        which of the `settings` a tensor uses.
        """
        program = kernel.program
        leaves = np.zeros((len(kernel.leaves), settings))
        parts = _parts(program, work)
        host = torch.device("cpu")
        super().__init__(program, work, parts, host, leaves, setting_index)
        self.kernel = kernel
        self.chunks = work.chunks
        self._walks = [self._lay_out(pass_, pointers) for pass_ in program.passes]
        # The results of the reductions so far, in the order of the leaves: each (tensors).
        self._known: list[np.ndarray] = []

    def _lay_out(self, pass_: Pass, pointers: np.ndarray) -> Walk:
        """Return a pass's arguments.

        If a pass of two tensors needs their sums, each tensor is a setting of its own: `leaves` and
        `table` have two settings, and `setting_index` is [0, 1].
        """
        leaves = self.leaves
        setting_index = self.setting_index
        is_per_tensor = any(node.rank == Rank.TENSOR for node in pass_.inputs)
        if is_per_tensor:
            tensors = len(setting_index)
            leaves = np.zeros((len(leaves), tensors))
            setting_index = np.arange(tensors)
        settings = leaves.shape[1]
        dtype = NUMPY[self.kernel.program.compute]
        chunks = self.chunks[pass_.domain]
        partials = (len(chunks.tensor), len(pass_.reductions))
        arrays = {
            "pointers": pointers,
            "temporaries": self._temporaries.pointers,
            "setting_index": setting_index,
            "table": np.empty((settings, len(pass_.inputs)), dtype),
            "partials": np.zeros(partials),
            "leaves": leaves,
        }
        fields = {
            "counter": 0,
            "units": chunks.units,
            "tensors": len(self.work.numel),
            "settings": settings,
            "finish": team.finish(),
            "finished": 0,
        }
        fields |= chunks.addresses
        fields |= {name: address(array) for name, array in arrays.items()}
        arguments = np.array([fields[name] for name in FIELDS], np.uint64)
        return Walk(is_per_tensor, arrays, arguments, address(arguments))

    def begin(self, workers: int) -> None:
        """Do what may fail: the functions of matrices, and the passes that they need."""
        self._known.clear()
        if not self._first_to_store:
            return
        try:
            self._temporaries.allocate()
            for pass_index in range(self._first_to_store):
                self._run_pass(pass_index, workers)
        except BaseException:
            self.cancel()
            raise
        self._temporaries.release_sources()

    def finish(self, workers: int) -> None:
        """Do the rest, which stores."""
        for pass_index in range(self._first_to_store, len(self._walks)):
            self._run_pass(pass_index, workers)
        self._temporaries.release()

    def _run_pass(self, pass_index: int, threads: int) -> None:
        """Run one walk and what follows it."""
        walk = self._walks[pass_index]
        pass_ = self.kernel.program.passes[pass_index]
        if walk.is_per_tensor:
            self._fill_leaves(walk.arrays["leaves"], self._known)
        chunks = self.chunks[pass_.domain]
        useful = min(threads, chunks.units // UNITS_PER_THREAD)
        self._walk(pass_index, walk.address, max(1, useful))
        for r, reduction in enumerate(pass_.reductions):
            partials = walk.arrays["partials"][:, r]
            result = chunks.combine(reduction.op, partials, len(self.setting_index))
            self._known.append(result)
        if pass_.sums:
            self._complete(pass_, chunks)
        for call in self.kernel.program.calls:
            if call.after == pass_index:
                self._temporaries.call(call, self._numbers(call))

    def _complete(self, pass_: Pass, chunks: Chunks) -> None:
        """Add up sums down the columns of matrices that several chunks walked, chunk by chunk."""
        for reduction in pass_.down:
            add = np.add if reduction.node.op == "sum" else np.maximum
            several = np.flatnonzero(chunks.parts > 1)
            for tensor_index in several.tolist():
                shares = self._temporaries.shares(reduction.into, tensor_index)
                total, *others = shares.numpy()
                # inf - inf is expected here: silence NumPy's warning.
                with np.errstate(all="ignore"):
                    for share in others:
                        add(total, share, out=total)

    def calls(self) -> list[tuple[int, int]]:
        """Return functions and their arguments which are this launch, for machine code to call.

        Empty if it is more than that: if threads share the work, or Python has a part in it.
        """
        program = self.kernel.program
        walk, *more = self._walks
        units = self.chunks[program.passes[0].domain].units
        if more or program.calls or walk.is_per_tensor or units >= 2 * UNITS_PER_THREAD:
            return []
        return [(self.kernel.library.address("launch_0"), walk.address)]

    def results(self) -> dict[str, list[tuple[int, bool]]]:
        """Return where each setting's new scalars are after a run, and whether in float64.

        A scalar is missing if each tensor has its own.
        """
        walk = self._walks[-1]
        if walk.is_per_tensor:
            return {}
        table = walk.arrays["table"]
        settings, columns = table.shape
        found: dict[str, list[tuple[int, bool]]] = {}
        for name, node in self.kernel.program.scalars:
            if node.op == "const":
                continue
            first = self.kernel.inputs[-1][node]
            places = [
                address(table) + table.itemsize * (i * columns + first) for i in range(settings)
            ]
            found[name] = [(place, table.dtype == np.float64) for place in places]
        return found

    def scalars(self) -> dict[str, np.ndarray]:
        """Return each tensor's new scalars, as the last run computed them, in the compute type."""
        last = len(self._walks) - 1
        scalars = self.kernel.program.scalars
        return {name: self._of_tensors(last, node) for name, node in scalars}

    def _numbers(self, call: Call) -> list[list[float]]:
        """Return the numbers that a function of matrices is called with, for each tensor."""
        values = [self._of_tensors(call.after, node) for node in call.numbers]
        if not values:
            return [[]] * len(self.setting_index)
        return np.stack(values, axis=1).tolist()

    def _of_tensors(self, pass_index: int, node: Node) -> np.ndarray:
        """Return a host value of a pass, for each tensor."""
        if node.op == "const":
            dtype = NUMPY[self.kernel.program.compute]
            return np.full(len(self.setting_index), node.attr, dtype)
        arrays = self._walks[pass_index].arrays
        column = self.kernel.inputs[pass_index][node]
        return arrays["table"][arrays["setting_index"], column]

    def _fill_leaves(self, leaves: np.ndarray, known: list[np.ndarray]) -> None:
        """Write each tensor's `leaves`: its setting's hypers, its sizes, and `known` results.

        For tensors of 3 x 4 and 10 x 1, with settings 1 and 0 of lr = 0.1 and 0.2, and one sum:

            lr        [0.2, 0.1]
            numel()   [12, 10]
            rows()    [3, 10]
            columns() [4, 1]
            the sum   [as reduced, as reduced]
        """
        hypers = len(self.kernel.program.hypers)
        leaves[:hypers] = self.leaves[:hypers, self.setting_index]
        sizes = {
            "numel": self.work.numel,
            "rows": self.work.sizes[:, 1],
            "columns": self.work.sizes[:, 2],
        }
        for name, leaf in SIZES.items():
            leaves[self.kernel.leaves[leaf]] = sizes[name]
        for i, values in enumerate(known, hypers + len(SIZES)):
            leaves[i] = values

    def _walk(self, pass_index: int, arguments: int, threads: int) -> None:
        """Run a pass's machine code in threads: OpenMP's, or Python's if there is no OpenMP."""
        parallel = openmp() if threads > 1 else 0
        if threads > 1 and not parallel:
            self.kernel.launch[pass_index](arguments, 0, 0)
            run_in_threads(self.kernel.workers[pass_index], arguments, threads)
        else:
            self.kernel.launch[pass_index](arguments, threads, parallel)


def _parts(program: Program, work: WorkInChunks) -> dict[str, np.ndarray]:
    """Return how many chunks keep sums of their own, for each temporary of columns and tensor."""
    if Rank.ELEMENT not in work.chunks:
        return {}
    parts = work.chunks[Rank.ELEMENT].parts
    columns = (t.name for t in program.temporaries if t.rank == Rank.COLUMN)
    return dict.fromkeys(columns, parts)


@share
def make_kernel(program: Program) -> Kernel:
    """Return the program's kernel; compiled once, as long as somebody has it."""
    return Kernel(program)
