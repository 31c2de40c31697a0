"""Where the programs of a pass leave their shares of a result, and how shares become one.

A reduction over a whole tensor has a partial result for each unit, in one array of float64 for all
passes. A pass with 2 reductions over tensors of 70,000, 10 and 5 elements has 3, 1 and 1 units (of
32 blocks): its partial results begin at 0, 6 and 8, and take 10 values. They are rounded up to 16,
and those of the next pass begin there. `uniforms_s` adds them up.

A sum that ends in a temporary has several shares of each value if several programs walk one line or
one column: `fold` adds these up.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..graph.passes import Pass, Program
from ..tensors.temporaries import Temporaries
from .units import WorkInUnits
from .uploads import Device, Table
from .walk import BLOCK

# Partial results of a pass begin at a multiple of this many values, so that their address is a
# multiple of 16 bytes: Triton compiles a variant for pointers that are not.
MULTIPLE = 16


def place_partials(program: Program, work: WorkInUnits) -> tuple[list[int], list[np.ndarray], int]:
    """Return where the partial results of passes and tensors are, in one array for all.

    First where each pass's begin; then, for each pass, two arrays (tensors): where the tensor's
    begin, and of how many units they are, see `uniforms.fact_names`; and last the array's length.
    """
    begin: list[int] = []
    facts: list[np.ndarray] = []
    size = 0
    for pass_, units in zip(program.passes, work.units, strict=True):
        reductions = len(pass_.reductions)
        begin.append(size)
        facts += [size + units.first * reductions, units.count]
        size += -(-len(units.table) * reductions // MULTIPLE) * MULTIPLE
    return begin, facts, size


class Fold:
    """The shares that are added up after a pass: the arguments of `fold`.

    `entries` (entries, 4) has an address, how many values, how many shares, and 1 for a maximum;
    `units` (units, 2) an entry and a block of its values, for each program.
    """

    def __init__(self, entries: np.ndarray, device: Device, captured: list[Tensor]) -> None:
        """Cut the values of all entries into blocks."""
        blocks = -(-entries[:, 1] // BLOCK)
        entry = np.repeat(np.arange(len(entries)), blocks)
        block = np.arange(len(entry)) - np.repeat(np.cumsum(blocks) - blocks, blocks)
        self.entries = entries
        self.units = np.stack([entry, block], axis=1).astype(np.int32)
        self.entries.setflags(write=False)
        self.units.setflags(write=False)
        self.entries_table = Table(device, captured)
        self.units_table = Table(device, captured)


def find_fold(
    pass_: Pass,
    work: WorkInUnits,
    temporaries: Temporaries,
    device: Device,
    captured: list[Tensor],
) -> Fold | None:
    """Return what is to be added up after a pass; None if no sum has several shares.

    `captured` is that of `Table`.
    """
    entries: list[Sequence[int]] = []
    for reduction in pass_.sums:
        has_shares = (work.parts[reduction.into] > 1) & (work.numel > 0)
        is_maximum = int(reduction.node.op == "amax")
        for tensor_index in np.flatnonzero(has_shares).tolist():
            shares = temporaries.shares(reduction.into, tensor_index)
            parts, values = shares.shape
            entries.append((shares.data_ptr(), values, parts, is_maximum))
    if not entries:
        return None
    return Fold(np.array(entries, np.int64), device, captured)
