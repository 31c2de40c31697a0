"""What one pass leaves to a later one of the same step: memory for it, and functions of whole matrices between them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .chunks import Chunks, Work, address
from .ir import Rank
from .memory import call_function
from .passes import Call, Pass, Program, Temporary

NUMPY = {"f64": np.float64, "f32": np.float32}
TORCH = {"f64": torch.float64, "f32": torch.float32}


class Temporaries:
    """A program's temporaries for the tensors of a launch, and the table of their addresses (temporary, tensor).

    Those with one value a row, a column or a matrix are small and stay; those of elements exist during a run alone.
    """

    def __init__(self, program: Program, work: Work) -> None:
        self.program, self.work = program, work
        self.place = {one.name: i for i, one in enumerate(program.temporaries)}
        self.pointers = np.zeros((len(program.temporaries), len(work.numel)), np.uint64)
        self._parts = work.chunks[Rank.ELEMENT].parts if Rank.ELEMENT in work.chunks else np.ones_like(work.numel)
        self._kept: dict[str, list[np.ndarray]] = {}
        for i, one in enumerate(program.temporaries):
            if one.rank != Rank.ELEMENT:
                arrays = self._kept[one.name] = np.split(self._allocate(one), np.cumsum(self._counts(one))[:-1])
                self.pointers[i] = [address(array) for array in arrays]
        # Matrices of one shape lie side by side, so that a function takes all of them at once.
        self._order = np.lexsort(work.sizes[:, 1:].T)
        self._memory: dict[str, Tensor] = {}
        self._results: list[Tensor] = []

    def _counts(self, one: Temporary) -> np.ndarray:
        """How many values each tensor has; sums down the columns have them once for each part of a matrix."""
        matrices, rows, columns = self.work.sizes.T
        counts = {Rank.MATRIX: matrices, Rank.ROW: matrices * rows, Rank.COLUMN: matrices * columns * self._parts}
        return counts[one.rank]

    def _allocate(self, one: Temporary) -> np.ndarray:
        return np.empty(int(self._counts(one).sum()), NUMPY[one.type])

    def allocate(self) -> None:
        """Memory for temporaries of elements that passes write, until the step is over."""
        sources = {call.source for call in self.program.calls}
        for one in self.program.temporaries:
            if one.name in sources:
                numel = self.work.numel[self._order]
                memory = torch.empty(int(numel.sum()), dtype=TORCH[one.type], device="cpu")
                self._memory[one.name] = memory
                starts = (np.cumsum(numel) - numel) * memory.itemsize
                self.pointers[self.place[one.name], self._order] = memory.data_ptr() + starts.astype(np.uint64)

    def release_sources(self) -> None:
        """Give back what only functions have read."""
        targets = {call.target for call in self.program.calls}
        for name in self._memory.keys() - targets:
            del self._memory[name]

    def release(self) -> None:
        """Give back what `allocate` and the functions have taken."""
        self._memory.clear()
        self._results.clear()

    def complete(self, one: Pass, chunks: Chunks) -> None:
        """Add up the sums down the columns of matrices that several chunks have walked, chunk after chunk."""
        for reduction in one.sums:
            if one.domain == Rank.ELEMENT and reduction.node.rank == Rank.COLUMN:
                for t in np.flatnonzero(chunks.parts > 1):
                    parts = self._kept[reduction.into][t].reshape(chunks.parts[t], -1)
                    of = np.add if reduction.node.op == "sum" else np.maximum
                    # Infinities of both signs are no news.
                    with np.errstate(all="ignore"):
                        for part in parts[1:]:
                            of(parts[0], part, out=parts[0])

    def call(self, call: Call, numbers: np.ndarray) -> None:
        """Let a function of whole matrices make one temporary of another: once for each shape and set of numbers."""
        source, target = (self.pointers[self.place[name]] for name in (call.source, call.target))
        memory, kept = self._memory[call.source], self._memory.get(call.target)
        for group in self._groups(numbers):
            numel = self.work.numel[group]
            begin = int(source[group[0]] - np.uint64(memory.data_ptr())) // memory.itemsize
            place = slice(begin, begin + int(numel.sum()))
            stack = memory[place].view(-1, *self.work.sizes[group[0], 1:].tolist())
            result = call_function(call.function, stack, *numbers[group[0]].tolist()).contiguous()
            if kept is not None:
                # Another function takes it, with its own groups of matrices.
                kept[place] = result.view(-1)
            else:
                self._results.append(result)
                starts = (np.cumsum(numel) - numel) * result.itemsize
                target[group] = result.data_ptr() + starts.astype(np.uint64)

    def _groups(self, numbers: np.ndarray) -> Iterator[np.ndarray]:
        """Tensors that follow one another in memory and have one shape and one set of numbers."""
        walked = [i for i in self._order if self.work.numel[i]]
        begin = 0
        for end in range(1, len(walked) + 1):
            a, b = walked[end - 1], walked[end] if end < len(walked) else None
            same = b is not None and (self.work.sizes[a, 1:] == self.work.sizes[b, 1:]).all()
            if not (same and (numbers[a] == numbers[b]).all()):
                yield np.array(walked[begin:end])
                begin = end
