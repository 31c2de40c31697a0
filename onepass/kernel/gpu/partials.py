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
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from ..graph.passes import Pass, Program
from ..tensors.temporaries import Temporaries
from .units import Units, WorkInUnits
from .uploads import Device, Table
from .walk import BLOCK

# Partial results of a pass begin at a multiple of this many values, so that their address is a
# multiple of 16 bytes: Triton compiles a variant for pointers that are not.
MULTIPLE = 16


@dataclass
class PartialsLayout:
    """Where the partial results of passes and tensors are, in one array for all.

    `begin` says where each pass's begin, and `size` is the array's length. `facts` has, for each
    pass, two arrays (tensors): where the tensor's begin, and of how many units they are. These are
    the last lines of `uniforms.fact_names`. For the example above, [0, 6, 8] and [3, 1, 1].
    """

    begin: list[int] = field(default_factory=list)
    facts: list[np.ndarray] = field(default_factory=list)
    size: int = 0

    def add(self, reductions: int, units: Units) -> None:
        """Place a pass's partial results behind those of the passes before it."""
        self.begin.append(self.size)
        self.facts.append(self.size + units.first * reductions)
        self.facts.append(units.count)
        values = len(units.table) * reductions
        self.size += -(-values // MULTIPLE) * MULTIPLE


def lay_out_partials(program: Program, work: WorkInUnits) -> PartialsLayout:
    """Return where the partial results of all passes of a launch are."""
    layout = PartialsLayout()
    for pass_, units in zip(program.passes, work.units, strict=True):
        layout.add(len(pass_.reductions), units)
    return layout


class Fold:
    """The shares that are added up after a pass: the arguments of `fold`.

    `entries` (entries, 4) has an address, how many values, how many shares, and 1 for a maximum;
    `units` (units, 2) an entry and a block of its values, for each program.
    """

    def __init__(self, entries: np.ndarray, device: Device, captured: list[Tensor]) -> None:
        """Cut the values of all entries into blocks."""
        values = entries[:, 1]
        blocks = -(-values // BLOCK)
        first = np.cumsum(blocks) - blocks
        entry = np.repeat(np.arange(len(entries)), blocks)
        block = np.arange(len(entry)) - first[entry]
        units = np.stack([entry, block], axis=1)
        self.entries = entries
        self.units = units.astype(np.int32)
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
