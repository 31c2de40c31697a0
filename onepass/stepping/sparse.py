"""Sparse gradients: a rule steps the slices for which they have values, and nothing else.

A sparse gradient of k sparse dimensions has values for some of the parameter's slices over its
first k dimensions. To a kernel each slice is a tensor of its own, given by its address in every
column. So the kernels that step dense gradients step slices, too, where they lie: nothing of the
parameter's size is walked, copied or allocated.

Example: an embedding of shape (5, 3) in float32 at address 1000, and a gradient with the indices
[[0, 3]] and values of shape (2, 3) at address 5000. A slice has 3 numbers of 4 bytes: 12 bytes.
A launch walks two tensors of 3 numbers:

    slice      address of g      address of p
        0              5000              1000    (1000 + 0 * 12)
        3              5012              1036    (1000 + 3 * 12)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import kernel
from ..contract.values import State
from .batches import Delayed, Step
from .checks import Member
from .columns import format_name, picker
from .eager_batch import EagerBatch
from .ledger import Ledger
from .parts import Stepping
from .reading import Reading
from .recipe import Recipe
from .scratch import Scratch
from .stored_numbers import count_steps

# A launch is laid out for somewhat more slices than there are, so that it serves steps with more or
# fewer of them. Slices of more elements than these take longer to step than a launch to lay out.
WIDE = 1024


def check_rule(owner: str, recipe: Recipe) -> None:
    """Raise `RuleError` unless what becomes of a slice does not depend on the others."""
    graph = recipe.graph
    if graph.scalars or graph.has_matrices or graph.has_tensor_values:
        raise kernel.RuleError(
            f"{owner}: a rule with reductions, matrices or a Scalar cannot step only the rows of a "
            "sparse gradient; let steps_rows return False"
        )


def coalesced(g: Tensor) -> Tensor:
    """Return a sparse gradient with each index once: the values of equal ones are added up.

    That it is coalesced is not believed: users can say it of any tensor.
    """
    if g.is_coalesced():
        g = torch.sparse_coo_tensor(g._indices(), g._values(), g.shape, check_invariants=False)
    return g.coalesce()


def read(g: Tensor, shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray, Tensor] | None:
    """Return a sparse gradient's indices (dimensions, slices), its slices' numbers, its values.

    Each slice is there once, in any order. None stands for a gradient that is not what it should
    be; `check_gradient` says in what.
    """
    indices, values = g._indices(), g._values()
    if not (g.is_cpu and kernel.has_storage(indices) and kernel.has_storage(values)):
        return None
    index = indices.numpy()
    dimensions, count = index.shape
    if index.dtype != np.int64 or values.shape != (count, *shape[dimensions:]):
        return None
    for entries, size in zip(index, shape, strict=False):
        if count and (entries.min() < 0 or entries.max() >= size):
            return None
    slices = _numbers_of(index, shape)
    ordered = slices if g.is_coalesced() else np.sort(slices)
    if not (ordered[1:] > ordered[:-1]).all():
        g = coalesced(g)
        index, values = g._indices().numpy(), g._values()
        slices = _numbers_of(index, shape)
    return index, slices, values.resolve_conj().resolve_neg().contiguous()


def _numbers_of(index: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return the numbers of slices, counted through the first dimensions.

    In a parameter of shape (4, 5, 3) the slice at (2, 1) has the number 2 * 5 + 1 = 11.
    """
    if len(index) == 1:
        return index[0]
    slices = np.zeros(index.shape[1], np.int64)
    for entries, size in zip(index, shape, strict=False):
        slices *= size
        slices += entries
    return slices


@dataclass
class Slices:
    """A parameter's slices in one step.

    `columns` are its tensors, which begin at the addresses `starts`. `index` and `numbers` say
    which slices they are, and `values` are their gradient.

    To a launch they are `count` tensors of `length` real numbers. If the columns' memory is not
    slice after slice, they are `copied`, and one tensor.
    """

    member: Member
    state: State
    step: float
    columns: list[Tensor]
    starts: list[int]
    index: np.ndarray
    numbers: np.ndarray
    values: Tensor
    copied: bool

    def __post_init__(self) -> None:
        p = self.columns[0]
        length = prod(p.shape[len(self.index) :]) * (2 if p.is_complex() else 1)
        count = len(self.numbers) if length else 0
        self.copied = self.copied and count > 0
        self.count, self.length = (1, count * length) if self.copied else (count, length)
        # For how many further slices a launch leaves room.
        self.spare = 0 if self.copied or length > WIDE else count // 8 + 8

    @property
    def where(self) -> Any:
        """What picks the slices out of a tensor."""
        return tuple(map(torch.from_numpy, self.index)) or ...

    def find(self, table: np.ndarray, sizes: Sequence[int]) -> list[Tensor]:
        """Enter the slices' addresses, those of the gradient first.

        `sizes` are those of the columns' numbers, in bytes. Returns the copies, if the addresses
        are those of copies.
        """
        first, size = self.values.data_ptr(), self.values.nbytes
        if self.copied:
            copies = [t.detach()[self.where].contiguous() for t in self.columns]
            table[:, 0] = [first, *(t.data_ptr() for t in copies)]
            return copies
        table[0] = np.arange(first, first + size, size // self.count)
        offsets = {size: self.numbers * (size * self.length) for size in set(sizes)}
        for addresses, start, size in zip(table[1:], self.starts, sizes, strict=True):
            np.add(offsets[size], start, out=addresses)
        return []


# Who steps in a step, and the numbers of each group.
GatheredSlices = tuple[list[Slices], dict[int, list[float]]]


class SlicesBatch:
    """Parameters of one set of dtypes whose gradients are sparse: one launch steps all slices.

    At every step everything is read again, as by `KernelBatch`. What is kept is what it is compared
    with, and how a launch is laid out. A launch has room for more slices than a step has: these lie
    in memory that means nothing.
    """

    refused_rate: tuple[int, float] | None = None

    def __init__(self, members: list[Member], reading: Reading, recipe: Recipe, owner: str) -> None:
        check_rule(owner, recipe)
        self.members, self.recipe, self.owner = members, recipe, owner
        self.positions = np.array([m.position for m in members])
        self.pick = picker(self.positions.tolist())
        params, grads = self.pick(reading.params), self.pick(reading.grads)
        states = [reading.state_of(p) for p in params]
        columns = [params, *([state[name] for state in states] for name in recipe.graph.state)]
        self.expected = kernel.expect([*chain.from_iterable(columns)])
        each = list(zip(*columns, strict=True))
        self.copied = [not all(t.is_contiguous() for t in tensors) for tensors in each]
        self.groups = sorted({m.group for m in members})
        self._rounds: list[list[Slices]] = []
        g = params[0] if grads[0] is None else grads[0]
        self.dtypes = [g.dtype, *(column[0].dtype for column in columns)]
        self.sizes = [
            column[0].element_size() // (2 if params[0].is_complex() else 1) for column in columns
        ]
        formats = zip(recipe.columns, map(format_name, self.dtypes), strict=True)
        self.kernel = kernel.compile(recipe.graph, tuple(formats))
        self.written = [column.written for column in self.kernel.program.columns[1:]]
        self.launch: Any = None
        # How many slices of a parameter the launch can hold, and of how many numbers.
        self._room: list[tuple[int, int]] = []

    def gather(self, reading: Reading) -> GatheredSlices | None:
        """Return who steps now, and the options of each group.

        It returns None if the plan no longer fits; a new one says what is wrong, if anything is.
        """
        options = {group: self.recipe.read(reading.groups[group]) for group in self.groups}
        params, grads = self.pick(reading.params), self.pick(reading.grads)
        states = [reading.state_of(p) for p in params]
        try:
            columns, steps = self._read_states(params, states)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
            return None
        self.expected.compare([*chain.from_iterable(columns)])
        changed = self.expected.changed.reshape(len(columns), -1).max(axis=0).tolist()
        starts = self.expected.pointers.reshape(len(columns), -1).T.tolist()
        stepping: list[Slices] = []
        for i, (member, p, g) in enumerate(zip(self.members, params, grads, strict=True)):
            if g is None:
                continue
            found = None if changed[i] else self._read(member, p, g)
            if found is None:
                return None
            tensors = [column[i] for column in columns]
            slices = Slices(member, states[i], steps[i], tensors, starts[i], *found, self.copied[i])
            stepping.append(slices)
        return stepping, options

    def _read_states(
        self, params: Sequence[Tensor], states: Sequence[Any]
    ) -> tuple[list[Sequence[Any]], list[float]]:
        """Return the columns that a launch writes, and how many steps each parameter has taken."""
        kept = [[state.get(name) for state in states] for name in self.recipe.graph.state]
        steps = [0.0] * len(params)
        if self.recipe.counts_steps:
            steps = [float(state["step"]) for state in states]
        return [params, *kept], steps

    def starts(self) -> np.ndarray:
        """Return where what this step writes begins in memory, as addresses."""
        return self.expected.pointers

    def stretches(self) -> tuple[np.ndarray, np.ndarray]:
        """Return how many bytes begin at each of `starts`, and the position of their parameter."""
        sizes = self.expected.bytes
        return sizes, np.tile(self.positions, len(sizes) // len(self.members))

    def _read(
        self, member: Member, p: Tensor, g: Tensor
    ) -> tuple[np.ndarray, np.ndarray, Tensor] | None:
        """Return a gradient as `read` does; None if the kernel was not compiled for its kind."""
        fits = kernel.is_plain(g) and member.takes(g)
        if not fits or g.dtype != self.dtypes[0] or g.shape != p.shape:
            return None
        return read(g, p.shape)

    @property
    def demand(self) -> int:
        """How much memory `begin` takes: only what the gradients have, which counts as none."""
        return 0

    def begin(self, gathered: GatheredSlices, step: Step) -> Sequence[Delayed]:
        """Do what may fail, and store nothing."""
        stepping, self._options = gathered
        self._fresh, self._factor = step.fresh, step.gradient_factor.factor
        self._rounds = [stepping]
        if _overlap(stepping):
            # One after the other and in one thread, as torch would.
            self._rounds = [[slices] for slices in stepping]
            for slices in stepping:
                slices.values = slices.values.clone()
        self._lay_out(self._rounds[0] if self._rounds else [])
        return ()

    def store_refusing(self, ledger: Ledger) -> bool:
        """Store nothing yet: a launch refuses nothing."""
        return False

    def cancel(self) -> None:
        """Let go what has begun."""
        self._rounds = []

    def finish(self, gathered: GatheredSlices, step: Step) -> None:
        """Store what was begun. Parameters that were fresh are not fresh any more."""
        threads = self.kernel.concurrency() if len(self._rounds) == 1 else 1
        for i, stepping in enumerate(self._rounds):
            if i:
                self._lay_out(stepping)
            self._launch(stepping, threads)
            if self.recipe.counts_steps:
                count_steps([slices.state for slices in stepping])
            self._fresh.difference_update(slices.member.position for slices in stepping)
        self.cancel()

    def is_as_read(self, gathered: GatheredSlices, reading: Reading) -> bool:
        """Whether what was gathered is still what it was. Addresses are read again."""
        for slices in gathered[0]:
            for t, start in zip(slices.columns, slices.starts, strict=True):
                if not kernel.has_storage(t) or t.data_ptr() != start:
                    return False
        return True

    def _lay_out(self, stepping: list[Slices]) -> None:
        """Enter addresses and numbers into a launch with room for these slices."""
        stepping = [slices for slices in stepping if slices.count]
        self._copies: list[list[Tensor]] = []
        if not stepping:
            return
        self._make_room(stepping)
        begin = 0
        for i, (slices, (room, _)) in enumerate(zip(stepping, self._room, strict=True)):
            end = begin + slices.count
            self._copies.append(slices.find(self._table[:, begin:end], self.sizes))
            self._table[:, end : begin + room] = self._nowhere
            begin += room
            self._set_leaves(i, slices)

    def _launch(self, stepping: list[Slices], threads: int) -> None:
        """Run the launch, put copies back, and tell autograd what has changed."""
        stepping = [slices for slices in stepping if slices.count]
        if not stepping:
            return
        self.launch.run(threads)
        changed: list[Tensor] = []
        for slices, copies in zip(stepping, self._copies, strict=True):
            for t, copy, is_written in zip(slices.columns, copies, self.written, strict=False):
                if is_written:
                    t.detach()[slices.where] = copy
            changed += [t for t, on in zip(slices.columns, self.written, strict=True) if on]
        self._copies = []
        kernel.count_as_changed(changed)

    def _set_leaves(self, setting: int, slices: Slices) -> None:
        """Enter the hypers of a parameter, whose slices have a setting of their own."""
        names = (name for name, _, _ in self.recipe.sources)
        hypers = dict(zip(names, self._options[slices.member.group], strict=True))
        hypers["first"] = float(slices.member.position in self._fresh)
        hypers["step"] = slices.step + 1
        hypers[kernel.GRADIENT_FACTOR] = self._factor
        for name, value in hypers.items():
            if name in self.kernel.leaves:
                self.launch.leaves[self.kernel.leaves[name], setting] = value

    def _make_room(self, stepping: list[Slices]) -> None:
        """Lay out a launch, unless there is one with room for these slices, and not far too much.

        Example: 100 slices of 3 numbers get room for 100 + 100 // 8 + 8 = 120. The launch serves
        the next steps as long as these have at most 120 slices, and leave room for at most twice as
        many as a new launch would.
        """
        if len(stepping) == len(self._room) and all(map(_has_room, stepping, self._room)):
            return
        self._room = [(slices.count + slices.spare, slices.length) for slices in stepping]
        rooms, lengths = np.array(self._room, np.int64).T
        setting_index = np.repeat(np.arange(len(stepping)), rooms)
        columns = len(self.dtypes)
        # Where the slices lie that a launch has room for, and a step does not have.
        longest = max((slices.length for slices in stepping if slices.spare), default=0)
        self._scratch = np.zeros((columns, longest))
        scratch_address = self._scratch.__array_interface__["data"][0]
        self._nowhere = (scratch_address + np.arange(columns) * 8 * longest)[:, np.newaxis]
        self._table = np.zeros((columns, len(setting_index)), np.int64)
        work = self.kernel.split(lengths[setting_index])
        addresses = self._table.view(np.uint64)
        self.launch = self.kernel.prepare(addresses, work, setting_index, len(stepping))


def _has_room(slices: Slices, known: tuple[int, int]) -> bool:
    """Whether a launch has room for a parameter's slices, and not far too much."""
    room, length = known
    return slices.length == length and 0 <= room - slices.count <= 2 * slices.spare


def _overlap(stepping: list[Slices]) -> bool:
    """Whether memory that is written occurs twice.

    Parameters with holes in a shared memory have no kernels.
    """
    ranges: list[tuple[int, int]] = []
    for slices in stepping:
        starts = (*slices.starts, slices.values.data_ptr())
        for start, t in zip(starts, (*slices.columns, slices.values), strict=True):
            ranges.append((start, start + t.nbytes))
    ranges.sort()
    return any(after[0] < before[1] for before, after in pairwise(ranges))


class EagerSlices(EagerBatch):
    """The same by torch's own operations: slices are copied out, stepped and put back.

    Of a parameter of shape (5, 3) and indices [[0, 3]], p[[0, 3]] of shape (2, 3) is stepped with
    the values of the gradient, and then copied back to p[[0, 3]].
    """

    def __init__(
        self, members: list[Member], reading: Reading, recipe: Recipe, owner: str, *modes: bool
    ) -> None:
        check_rule(owner, recipe)
        super().__init__(members, reading, recipe, owner, *modes)

    def _kind(self, tensors: Sequence[Tensor]) -> object:
        """Return None: each parameter is computed alone."""
        return None

    def cancel(self) -> None:
        super().cancel()
        # Which slices of a tensor get which values.
        self._slices: list[tuple[Tensor, Any, Tensor]] = []
        # The same for memory that is shared: the values lie in a copy of that memory.
        self._slices_apart: list[tuple[Tensor, Any, Tensor]] = []

    def _compute(self, stepping: Stepping, hypers: dict[str, Any], scratch: Scratch) -> None:
        g = coalesced(stepping.columns["g"][0])
        if not g._nnz():
            return
        # Without sparse dimensions all is one slice.
        where = tuple(g._indices()) or (None,)
        targets = {name: stepping.columns[name][0] for name in ("p", *self.recipe.graph.state)}
        columns: dict[str, Sequence[Any]] = {"g": [g._values()]}
        columns |= {name: [scratch.view(t)[where]] for name, t in targets.items()}
        copied = Stepping(stepping.members, columns, stepping.states, {}, together=False)
        super()._compute(copied, hypers, Scratch())
        for name, value in zip(dict(self.recipe.graph.outputs), self._take_computed(), strict=True):
            target, value = targets[name], value.to(targets[name].dtype)
            if scratch.holds(target):
                # Those who step next see it, and may change it again.
                copy = scratch.view(target)
                copy[where] = value
                self._slices_apart.append((target, where, copy))
            else:
                self._slices.append((target, where, value))

    def _take_computed(self) -> list[Tensor]:
        """Return the values that were computed last; the batch does not store them."""
        values = [value for _, value in self._targets_alone]
        self._targets_alone = []
        return values

    def store_refusing(self, ledger: Ledger) -> bool:
        kept, refusing = [], False
        for target, where, value in self._slices:
            if kernel.is_plain(target):
                kept.append((target, where, value))
                continue
            refusing = True
            new = target.detach().clone()
            new[where] = value
            ledger.copy(target, new)
        self._slices = kept
        return super().store_refusing(ledger) or refusing

    def finish(self, gathered: list[Stepping], step: Step) -> None:
        for target, where, value in self._slices:
            target[where] = value
        for target, where, copy in self._slices_apart:
            target[where] = copy[where]
        super().finish(gathered, step)
