"""What one pass leaves to a later one of the same step: memory for it, and functions of whole
matrices between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ..graph.ir import Rank
from ..graph.passes import Call, Program, Temporary
from .memory import call_function

TORCH = {"f64": torch.float64, "f32": torch.float32}


class Temporaries:
    """A program's temporaries for the tensors of a launch, and the table of their addresses
    (temporary, tensor).

    Those with one value a row, a column or a matrix are small and stay; those of elements exist
    during a run alone.
    """

    def __init__(
        self,
        program: Program,
        sizes: np.ndarray,
        parts: Mapping[str, np.ndarray],
        device: torch.device,
    ) -> None:
        """`sizes` (tensors, 3); `parts` says of temporaries that several have a share in how many,
        for each tensor."""
        self.program, self.sizes, self.parts, self.device = program, sizes, parts, device
        self.numel = sizes.prod(axis=1)
        self.place = {one.name: i for i, one in enumerate(program.temporaries)}
        self.pointers = np.zeros((len(program.temporaries), len(sizes)), np.uint64)
        # Memory that stays, and each tensor's share of it.
        self.kept: dict[str, Tensor] = {}
        self.stops: dict[str, np.ndarray] = {}
        for i, one in enumerate(program.temporaries):
            if one.rank != Rank.ELEMENT:
                counts = self._counts(one)
                memory = self._allocate(int(counts.sum()), one)
                self.kept[one.name], self.stops[one.name] = memory, np.cumsum(counts)
                starts = (self.stops[one.name] - counts) * memory.itemsize
                self.pointers[i] = memory.data_ptr() + starts.astype(np.uint64)
        # Matrices of one shape lie side by side, so that a function takes all of them at once.
        self._order = np.lexsort(sizes[:, 1:].T)
        self._memory: dict[str, Tensor] = {}
        self._results: list[Tensor] = []

    def _allocate(self, count: int, one: Temporary) -> Tensor:
        return torch.empty(count, dtype=TORCH[one.type], device=self.device)

    def _counts(self, one: Temporary) -> np.ndarray:
        """How many values each tensor has."""
        matrices, rows, columns = self.sizes.T
        counts = {Rank.MATRIX: matrices, Rank.ROW: matrices * rows, Rank.COLUMN: matrices * columns}
        return counts[one.rank] * self.parts.get(one.name, 1)

    def shares(self, name: str, t: int) -> Tensor:
        """A tensor's values of a temporary, a row for each share."""
        stops = self.stops[name]
        return self.kept[name][int(stops[t - 1]) if t else 0 : int(stops[t])].view(
            int(self.parts[name][t]), -1
        )

    def allocate(self) -> None:
        """Memory for temporaries of elements that passes write, until the step is over."""
        sources = {call.source for call in self.program.calls}
        for one in self.program.temporaries:
            if one.name in sources:
                numel = self.numel[self._order]
                memory = torch.empty(int(numel.sum()), dtype=TORCH[one.type], device=self.device)
                self._memory[one.name] = memory
                starts = (np.cumsum(numel) - numel) * memory.itemsize
                self.pointers[self.place[one.name], self._order] = (
                    memory.data_ptr() + starts.astype(np.uint64)
                )

    def release_sources(self) -> None:
        """Give back what only functions have read."""
        targets = {call.target for call in self.program.calls}
        for name in self._memory.keys() - targets:
            del self._memory[name]

    def release(self) -> None:
        """Give back what `allocate` and the functions have taken."""
        self._memory.clear()
        self._results.clear()

    def call(self, call: Call, numbers: Sequence[Sequence[float | Tensor]]) -> None:
        """Let a function of whole matrices make one temporary of another: once for each shape and
        set of numbers."""
        source, target = (self.pointers[self.place[name]] for name in (call.source, call.target))
        memory, kept = self._memory[call.source], self._memory.get(call.target)
        for group in self._groups(numbers):
            numel = self.numel[group]
            begin = int(source[group[0]] - np.uint64(memory.data_ptr())) // memory.itemsize
            place = slice(begin, begin + int(numel.sum()))
            stack = memory[place].view(-1, *self.sizes[group[0], 1:].tolist())
            result = call_function(call.function, stack, *numbers[group[0]]).contiguous()
            if kept is not None:
                # Another function takes it, with its own groups of matrices.
                kept[place] = result.view(-1)
            else:
                self._results.append(result)
                starts = (np.cumsum(numel) - numel) * result.itemsize
                target[group] = result.data_ptr() + starts.astype(np.uint64)

    def _groups(self, numbers: Sequence[Sequence[float | Tensor]]) -> Iterator[np.ndarray]:
        """Tensors that follow one another in memory and have one shape and one set of numbers."""
        walked = [i for i in self._order if self.numel[i]]
        begin = 0
        for end in range(1, len(walked) + 1):
            a, b = walked[end - 1], walked[end] if end < len(walked) else None
            same = (
                b is not None
                and (self.sizes[a, 1:] == self.sizes[b, 1:]).all()
                and _equal(numbers[a], numbers[b])
            )
            if not same:
                yield np.array(walked[begin:end])
                begin = end


def _equal(a: Sequence[float | Tensor], b: Sequence[float | Tensor]) -> bool:
    """Whether numbers are known to be the same; of those that lie on a device that is not known."""
    return all(x is y if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True))
