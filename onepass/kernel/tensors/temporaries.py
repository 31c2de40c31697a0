"""What one pass leaves to a later one of the same step, and the functions of matrices between them.

A rule subtracts each row's mean from a gradient, and there are two tensors, (2, 3, 5) and (4, 5):

    pass 0 sums along the rows into ~0, one float64 number for each row
    memory     6 numbers of the first tensor, then 4 of the second
    pointers   [[memory, memory + 48]]           one line for each temporary
    pass 1 reads ~0 at these addresses
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..graph.ir import Rank
from ..graph.passes import Call, Program, Temporary, lines_of
from .memory import call_function

TORCH = {"f64": torch.float64, "f32": torch.float32}
# What a function of matrices is called with beside them.
Numbers = Sequence[float | Tensor]


class Temporaries:
    """A program's temporaries for the tensors of a launch, and the table of their addresses.

    `pointers` (temporary, tensor; uint64) is the table. Temporaries with one value for each row,
    column or matrix are small and stay (`kept`); those of elements exist only during a run.
    """

    def __init__(
        self,
        program: Program,
        sizes: np.ndarray,
        parts: Mapping[str, np.ndarray],
        device: torch.device,
    ) -> None:
        """`sizes` (tensors, 3) are each tensor's matrices, rows and columns.

        `parts` has temporaries in which several chunks have a share of each value: how many for
        each tensor. Such a temporary has a line of values for each share.
        """
        self.program = program
        self.sizes = sizes
        self.parts = parts
        self.device = device
        self.numel = sizes.prod(axis=1)
        self.index = {temporary.name: i for i, temporary in enumerate(program.temporaries)}
        self.pointers = np.zeros((len(program.temporaries), len(sizes)), np.uint64)
        # Memory that stays, and where each tensor's share of it ends, in values.
        self.kept: dict[str, Tensor] = {}
        self.stops: dict[str, np.ndarray] = {}
        for temporary in program.temporaries:
            if temporary.rank != Rank.ELEMENT:
                self._keep(temporary)
        # Matrices of one shape lie side by side, so that a function takes all of them at once.
        self._order = np.lexsort(sizes[:, 1:].T)
        self._memory: dict[str, Tensor] = {}
        self._results: list[Tensor] = []

    def _keep(self, temporary: Temporary) -> None:
        """Take the memory of a temporary that stays, and enter its addresses."""
        counts = self._counts(temporary)
        memory = self._allocate(int(counts.sum()), temporary)
        stops = np.cumsum(counts)
        starts = (stops - counts) * memory.itemsize
        addresses = memory.data_ptr() + starts.astype(np.uint64)
        self.kept[temporary.name] = memory
        self.stops[temporary.name] = stops
        self.pointers[self.index[temporary.name]] = addresses

    def _allocate(self, count: int, temporary: Temporary) -> Tensor:
        """Return memory for this many values."""
        return torch.empty(count, dtype=TORCH[temporary.type], device=self.device)

    def _counts(self, temporary: Temporary) -> np.ndarray:
        """Return how many values each tensor has, all shares together."""
        ones = np.ones_like(self.numel)
        groups, per_group, length = lines_of(temporary.rank, *self.sizes.T, ones=ones)
        counts = groups * per_group * length
        return counts * self.parts.get(temporary.name, 1)

    def shares(self, name: str, tensor_index: int) -> Tensor:
        """Return a tensor's values of a temporary: (shares, values)."""
        stops = self.stops[name]
        begin = int(stops[tensor_index - 1]) if tensor_index else 0
        end = int(stops[tensor_index])
        count = int(self.parts[name][tensor_index])
        return self.kept[name][begin:end].view(count, -1)

    def allocate(self) -> None:
        """Take memory for the temporaries of elements that passes write, until the step is over."""
        sources = {call.source for call in self.program.calls}
        for temporary in self.program.temporaries:
            if temporary.name not in sources:
                continue
            numel = self.numel[self._order]
            count = int(numel.sum())
            memory = torch.empty(count, dtype=TORCH[temporary.type], device=self.device)
            self._memory[temporary.name] = memory
            starts = (np.cumsum(numel) - numel) * memory.itemsize
            addresses = memory.data_ptr() + starts.astype(np.uint64)
            self.pointers[self.index[temporary.name], self._order] = addresses

    def release_sources(self) -> None:
        """Give back what only functions have read."""
        targets = {call.target for call in self.program.calls}
        for name in self._memory.keys() - targets:
            del self._memory[name]

    def release(self) -> None:
        """Give back what `allocate` and the functions have taken."""
        self._memory.clear()
        self._results.clear()

    def call(self, call: Call, numbers: Sequence[Numbers]) -> None:
        """Let a function of whole matrices make one temporary of another.

        `numbers` are those of each tensor. The function is called once for each shape and set of
        numbers: with matrices (4, 3, 5) for two tensors (3, 5) and one (2, 3, 5) that have the same
        numbers.

        Raises what the function raises, and `RuleError` if it returns something else than matrices
        like those that it was given.
        """
        source = self.pointers[self.index[call.source]]
        target = self.pointers[self.index[call.target]]
        memory = self._memory[call.source]
        kept = self._memory.get(call.target)
        for group in self._groups(numbers):
            numel = self.numel[group]
            offset = int(source[group[0]] - np.uint64(memory.data_ptr()))
            begin = offset // memory.itemsize
            values = slice(begin, begin + int(numel.sum()))
            matrices = memory[values].view(-1, *self.sizes[group[0], 1:].tolist())
            result = call_function(call.function, matrices, *numbers[group[0]]).contiguous()
            if kept is not None:
                # Another function takes it, with its own groups of matrices.
                kept[values] = result.view(-1)
            else:
                self._results.append(result)
                starts = (np.cumsum(numel) - numel) * result.itemsize
                target[group] = result.data_ptr() + starts.astype(np.uint64)

    def _groups(self, numbers: Sequence[Numbers]) -> Iterator[np.ndarray]:
        """Yield tensors that follow one another in memory, with one shape and set of numbers."""
        walked = [tensor_index for tensor_index in self._order if self.numel[tensor_index]]
        begin = 0
        for end in range(1, len(walked) + 1):
            if end < len(walked):
                a = walked[end - 1]
                b = walked[end]
                same_shape = (self.sizes[a, 1:] == self.sizes[b, 1:]).all()
                if same_shape and _equal(numbers[a], numbers[b]):
                    continue
            yield np.array(walked[begin:end])
            begin = end


def _equal(a: Numbers, b: Numbers) -> bool:
    """Whether numbers are known to be the same; of numbers on a device this is not known."""
    return all(x is y if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True))
