"""Sparse gradients: the rule steps the rows that they have values for, and no other memory is read
or written.

A sparse gradient of k sparse dimensions has values for some of the parameter's slices over its
first k dimensions: its rows. To a kernel each row is a tensor of its own, given by its address in
every column. So the kernels that step dense gradients step rows, too, where they lie: nothing of
the parameter's size is walked, copied or allocated.
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
from ..kernel.graph.ir import Rank, RuleError, topological
from .batch import Gathered
from .checks import Member
from .columns import format_name, picker
from .eager_batch import EagerBatch
from .gradient_factor import GradientFactor
from .ledger import Ledger
from .parts import Stepping
from .reading import Reading
from .recipe import Recipe
from .scratch import Scratch
from .stored_numbers import count_steps

# A launch is laid out for somewhat more rows than there are, so that it serves steps with more or
# fewer of them; rows of more elements than these take longer to step than a launch to lay out.
WIDE = 1024


def check_rule(owner: str, recipe: Recipe) -> None:
    """Raise `RuleError` unless a rule can step rows alone: what becomes of one must not depend on
    the others."""
    graph = recipe.graph
    if (
        graph.scalars
        or graph.has_matrices
        or any(node.rank == Rank.TENSOR for node in topological(graph.roots))
    ):
        raise RuleError(
            f"{owner}: a rule with reductions, matrices or a Scalar cannot step the rows of a "
            "sparse gradient alone; let steps_rows return False"
        )


def coalesced(g: Tensor) -> Tensor:
    """A sparse gradient with each index once, the values of equal ones added up: whatever it says
    of itself."""
    if g.is_coalesced():
        g = torch.sparse_coo_tensor(g._indices(), g._values(), g.shape, check_invariants=False)
    return g.coalesce()


def read(g: Tensor, shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray, Tensor] | None:
    """A sparse gradient's indices (dimensions, rows), each once but in any order, the rows'
    numbers, and its values.

    None where it is not what it should be; `check_gradient` says in what.
    """
    indices, values = g._indices(), g._values()
    if not (g.is_cpu and kernel.has_storage(indices) and kernel.has_storage(values)):
        return None
    at = indices.numpy()
    k, count = at.shape
    if at.dtype != np.int64 or values.shape != (count, *shape[k:]):
        return None
    if count and any(
        index.min() < 0 or index.max() >= n for index, n in zip(at, shape, strict=False)
    ):
        return None
    rows = _numbers(at, shape)
    ordered = rows if g.is_coalesced() else np.sort(rows)
    if not (ordered[1:] > ordered[:-1]).all():
        g = coalesced(g)
        at, values = g._indices().numpy(), g._values()
        rows = _numbers(at, shape)
    return at, rows, values.resolve_conj().resolve_neg().contiguous()


def _numbers(at: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The numbers of rows, counted through the first dimensions."""
    if len(at) == 1:
        return at[0]
    rows = np.zeros(at.shape[1], np.int64)
    for index, n in zip(at, shape, strict=False):
        rows *= n
        rows += index
    return rows


@dataclass
class Rows:
    """A parameter's rows in one step: its columns and where they begin, which rows they are, and
    their gradient.

    To a launch they are `count` tensors of `length` real numbers. Where the columns' memory is not
    row after row they are `copied`, and one tensor.
    """

    member: Member
    state: State
    step: float
    columns: list[Tensor]
    starts: list[int]
    at: np.ndarray
    rows: np.ndarray
    values: Tensor
    copied: bool

    def __post_init__(self) -> None:
        p = self.columns[0]
        length = prod(p.shape[len(self.at) :]) * (2 if p.is_complex() else 1)
        count = len(self.rows) if length else 0
        self.copied = self.copied and count > 0
        self.count, self.length = (1, count * length) if self.copied else (count, length)
        # For how many further rows a launch leaves room.
        self.spare = 0 if self.copied or length > WIDE else count // 8 + 8

    @property
    def where(self) -> Any:
        """What picks the rows out of a tensor."""
        return tuple(map(torch.from_numpy, self.at)) or ...

    def find(self, table: np.ndarray, sizes: Sequence[int]) -> list[Tensor]:
        """Enter the rows' addresses, those of the gradient first; returns the copies whose
        addresses they are.

        `sizes` are those of the columns' numbers, in bytes.
        """
        first, size = self.values.data_ptr(), self.values.nbytes
        if self.copied:
            copies = [t.detach()[self.where].contiguous() for t in self.columns]
            table[:, 0] = [first, *(t.data_ptr() for t in copies)]
            return copies
        table[0] = np.arange(first, first + size, size // self.count)
        offsets = {size: self.rows * (size * self.length) for size in set(sizes)}
        for row, start, size in zip(table[1:], self.starts, sizes, strict=True):
            np.add(offsets[size], start, out=row)
        return []


class RowsBatch:
    """Parameters of one set of dtypes whose gradients are sparse: all their rows are stepped by one
    launch.

    At every step everything is read anew, as by `KernelBatch`; what is kept is what it is compared
    with, and how a launch is laid out. Rows that a launch has room for beyond a step's own lie in
    memory that means nothing.
    """

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
        self._rounds: list[list[Rows]] = []
        g = params[0] if grads[0] is None else grads[0]
        self.dtypes = [g.dtype, *(column[0].dtype for column in columns)]
        self.sizes = [
            column[0].element_size() // (2 if params[0].is_complex() else 1) for column in columns
        ]
        formats = zip(recipe.columns, map(format_name, self.dtypes), strict=True)
        self.kernel = kernel.compile(recipe.graph, tuple(formats))
        self.written = [column.written for column in self.kernel.program.columns[1:]]
        self.launch: Any = None
        # How many rows of a parameter the launch can hold, and of how many numbers.
        self._room: list[tuple[int, int]] = []

    def gather(self, reading: Reading) -> Gathered | None:
        """Who steps now, and options; None where the plan no longer fits, or a new one will say
        what is wrong."""
        options = {g: self.recipe.read(reading.groups[g]) for g in self.groups}
        params, grads = self.pick(reading.params), self.pick(reading.grads)
        states = [reading.state_of(p) for p in params]
        try:
            columns = [
                params,
                *([state.get(name) for state in states] for name in self.recipe.graph.state),
            ]
            steps = (
                [float(state["step"]) for state in states]
                if self.recipe.counts_steps
                else [0.0] * len(params)
            )
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
            return None
        self.expected.compare([*chain.from_iterable(columns)])
        changed = self.expected.changed.reshape(len(columns), -1).max(axis=0).tolist()
        starts = self.expected.pointers.reshape(len(columns), -1).T.tolist()
        stepping: list[Rows] = []
        for i, (member, p, g) in enumerate(zip(self.members, params, grads, strict=True)):
            if g is not None:
                found = None if changed[i] else self._read(member, p, g)
                if found is None:
                    return None
                tensors = [column[i] for column in columns]
                stepping.append(
                    Rows(member, states[i], steps[i], tensors, starts[i], *found, self.copied[i])
                )
        return [stepping, options]

    def starts(self) -> np.ndarray:
        """Where what this step writes begins in memory."""
        return self.expected.pointers

    def stretches(self) -> tuple[np.ndarray, np.ndarray]:
        """How many bytes begin at each of `starts`, and the position of the parameter that they
        belong to."""
        sizes = self.expected.bytes
        return sizes, np.tile(self.positions, len(sizes) // len(self.members))

    def _read(
        self, member: Member, p: Tensor, g: Tensor
    ) -> tuple[np.ndarray, np.ndarray, Tensor] | None:
        """A parameter's gradient, see `read`, where it is of the kind that the kernel was compiled
        for."""
        if (
            not kernel.is_plain(g)
            or not member.takes(g)
            or g.dtype != self.dtypes[0]
            or g.shape != p.shape
        ):
            return None
        return read(g, p.shape)

    def begin(self, gathered: Gathered, fresh: set[int], gradient_factor: GradientFactor) -> None:
        """Do what may fail, and store nothing; `fresh` are the positions of those whose state is
        new."""
        stepping, self._options = gathered
        self._fresh, self._factor = fresh, gradient_factor.factor
        self._rounds = [stepping]
        if _overlap(stepping):
            # One after the other and in one thread, as torch would.
            self._rounds = [[rows] for rows in stepping]
            for rows in stepping:
                rows.values = rows.values.clone()
        self._lay_out(self._rounds[0] if self._rounds else [])

    def cancel(self) -> None:
        """Let go what has begun."""
        self._rounds = []

    def finish(self) -> None:
        """Store what was begun; those whose state is new are so no longer."""
        threads = self.kernel.concurrency() if len(self._rounds) == 1 else 1
        for i, stepping in enumerate(self._rounds):
            if i:
                self._lay_out(stepping)
            self._launch(stepping, threads)
            if self.recipe.counts_steps:
                count_steps([rows.state for rows in stepping])
            self._fresh.difference_update(rows.member.position for rows in stepping)
        self.cancel()

    def is_as_read(self, gathered: Gathered, reading: Reading) -> bool:
        """Whether what was gathered still is what it was; addresses are read again."""
        return all(
            kernel.has_storage(t) and t.data_ptr() == start
            for rows in gathered[0]
            for t, start in zip(rows.columns, rows.starts, strict=True)
        )

    def _lay_out(self, stepping: list[Rows]) -> None:
        """Enter addresses and numbers into a launch with room for these rows."""
        stepping = [rows for rows in stepping if rows.count]
        self._copies: list[list[Tensor]] = []
        if not stepping:
            return
        self._make_room(stepping)
        begin = 0
        for i, (rows, (room, _)) in enumerate(zip(stepping, self._room, strict=True)):
            self._copies.append(rows.find(self._table[:, begin : begin + rows.count], self.sizes))
            self._table[:, begin + rows.count : begin + room] = self._nowhere
            begin += room
            options = self._options[rows.member.group]
            self._set_leaves(i, rows, options, rows.member.position in self._fresh, self._factor)

    def _launch(self, stepping: list[Rows], threads: int) -> None:
        stepping = [rows for rows in stepping if rows.count]
        if not stepping:
            return
        self.launch.run(threads)
        for rows, copied in zip(stepping, self._copies, strict=True):
            for t, copy, written in zip(rows.columns, copied, self.written, strict=False):
                if written:
                    t.detach()[rows.where] = copy
        self._copies = []
        columns = (
            t for rows in stepping for t, on in zip(rows.columns, self.written, strict=True) if on
        )
        torch.autograd.graph.increment_version(list(columns))

    def _set_leaves(
        self, i: int, one: Rows, options: list[float], first: bool, factor: float
    ) -> None:
        """The hyper-parameters of a parameter, in column i."""
        hypers = dict(zip((name for name, _, _ in self.recipe.sources), options, strict=True))
        hypers |= {"first": float(first), "step": one.step + 1, kernel.GRADIENT_FACTOR: factor}
        for name, value in hypers.items():
            if name in self.kernel.leaves:
                self.launch.leaves[self.kernel.leaves[name], i] = value

    def _make_room(self, stepping: list[Rows]) -> None:
        """Lay out a launch, unless there is one with enough room for these rows, and not far too
        much."""
        known = len(stepping) == len(self._room)
        if known and all(
            one.length == length and 0 <= room - one.count <= 2 * one.spare
            for one, (room, length) in zip(stepping, self._room, strict=True)
        ):
            return
        self._room = [(one.count + one.spare, one.length) for one in stepping]
        rooms, lengths = np.array(self._room, np.int64).T
        rows = np.repeat(np.arange(len(stepping)), rooms)
        longest = max((one.length for one in stepping if one.spare), default=0)
        self._scratch = np.zeros((len(self.dtypes), longest))
        self._nowhere = (
            self._scratch.__array_interface__["data"][0] + np.arange(len(self.dtypes)) * 8 * longest
        )
        self._nowhere = self._nowhere[:, np.newaxis]
        self._table = np.zeros((len(self.dtypes), len(rows)), np.int64)
        work = self.kernel.split(lengths[rows])
        self.launch = self.kernel.prepare(self._table.view(np.uint64), work, rows, len(stepping))


def _overlap(stepping: list[Rows]) -> bool:
    """Whether memory that is written occurs twice; parameters with holes in a shared memory have no
    kernels."""
    ranges = []
    for one in stepping:
        for start, t in zip(
            (*one.starts, one.values.data_ptr()), (*one.columns, one.values), strict=True
        ):
            ranges.append((start, start + t.nbytes))
    ranges.sort()
    return any(after[0] < before[1] for before, after in pairwise(ranges))


class EagerRows(EagerBatch):
    """The same by torch's own operations: rows are copied out, stepped and put back."""

    def __init__(
        self, members: list[Member], reading: Reading, recipe: Recipe, owner: str, *modes: bool
    ) -> None:
        check_rule(owner, recipe)
        super().__init__(members, reading, recipe, owner, *modes)

    def _kind(self, tensors: Sequence[Tensor]) -> object:
        return None

    def cancel(self) -> None:
        super().cancel()
        # Which rows of a tensor get which values.
        self._rows: list[tuple[Tensor, Any, Tensor]] = []
        # The same of memory that is shared, with the tensors' places in the copy.
        self._rows_apart: list[tuple[Tensor, Any, Tensor]] = []

    def _compute(self, stepping: Stepping, hypers: dict[str, Any], scratch: Scratch) -> None:
        g = coalesced(stepping.columns["g"][0])
        if not g._nnz():
            return
        # Without sparse dimensions all is one row.
        rows = tuple(g._indices()) or (None,)
        targets = {name: stepping.columns[name][0] for name in ("p", *self.recipe.graph.state)}
        parts = {name: scratch.view(t)[rows] for name, t in targets.items()} | {"g": g._values()}
        whole = Stepping(
            stepping.members,
            {name: [t] for name, t in parts.items()},
            stepping.states,
            {},
            together=False,
        )
        super()._compute(whole, hypers, Scratch())
        for name, value in zip(dict(self.recipe.graph.outputs), self._take_computed(), strict=True):
            target, value = targets[name], value.to(targets[name].dtype)
            if scratch.holds(target):
                # Those who step next see it, and may change it again.
                place = scratch.view(target)
                place[rows] = value
                self._rows_apart.append((target, rows, place))
            else:
                self._rows.append((target, rows, value))

    def _take_computed(self) -> list[Tensor]:
        values = [value for _, value in self._targets_alone]
        self._targets_alone = []
        return values

    def store_refusing(self, ledger: Ledger) -> bool:
        kept, refusing = [], False
        for target, rows, value in self._rows:
            if kernel.is_plain(target):
                kept.append((target, rows, value))
                continue
            refusing = True
            new = target.detach().clone()
            new[rows] = value
            ledger.copy(target, new)
        self._rows = kept
        return super().store_refusing(ledger) or refusing

    def finish(self, fresh: set[int]) -> None:
        for target, rows, value in self._rows:
            target[rows] = value
        for target, rows, place in self._rows_apart:
            target[rows] = place[rows]
        super().finish(fresh)
