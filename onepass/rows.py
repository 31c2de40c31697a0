"""Sparse gradients: the rule steps the rows that they have values for, and no other memory is read or written.

A sparse gradient of k sparse dimensions has values for some of the parameter's slices over its first k dimensions: its
rows. To a kernel each row is a tensor of its own, given by its address in every column. So the kernels that step dense
gradients step rows, too, where they lie: nothing of the parameter's size is walked, copied or allocated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import kernel
from .batch import EagerBatch, Gathered, write_number
from .checks import Group, Member, State, StepError
from .columns import format_name
from .kernel.ir import Rank, RuleError, topological
from .recipes import Recipe
from .unscale import Unscale

# A launch is laid out for somewhat more rows than there are, so that it serves steps with more or fewer of them; rows
# of more elements than these take longer to step than a launch to lay out.
WIDE = 1024


def check_rule(owner: str, recipe: Recipe) -> None:
    """Raise `RuleError` unless a rule can step rows alone: what becomes of one must not depend on the others."""
    graph = recipe.graph
    if graph.scalars or graph.has_matrices or any(node.rank == Rank.TENSOR for node in topological(graph.roots)):
        raise RuleError(
            f"{owner}: a rule with reductions, matrices or a Scalar cannot step the rows of a sparse gradient alone; "
            "let steps_rows return False"
        )


def coalesced(g: Tensor) -> Tensor:
    """A sparse gradient with each index once, the values of equal ones added up: whatever it says of itself."""
    if g.is_coalesced():
        g = torch.sparse_coo_tensor(g._indices(), g._values(), g.shape, check_invariants=False)
    return g.coalesce()


def read(g: Tensor, shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray, Tensor] | None:
    """A sparse gradient's indices (dimensions, rows), each once but in any order, the rows' numbers, and its values.

    None where it is not what it should be; `check_gradient` says in what.
    """
    indices, values = g._indices(), g._values()
    if not (g.is_cpu and kernel.has_storage(indices) and kernel.has_storage(values)):
        return None
    at = indices.numpy()
    k, count = at.shape
    if at.dtype != np.int64 or values.shape != (count, *shape[k:]):
        return None
    if count and any(index.min() < 0 or index.max() >= n for index, n in zip(at, shape, strict=False)):
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
    """A parameter's rows in one step: its columns and where they begin, which rows they are, and their gradient.

    To a launch they are `count` tensors of `length` real numbers. Where the columns' memory is not row after row they
    are `copied`, and one tensor.
    """

    member: Member
    own: State
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
        """Enter the rows' addresses, those of the gradient first; returns the copies whose addresses they are.

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


def _are_unfit(columns: list[Tensor]) -> bool:
    """Whether tensors of the expected shapes and strides may not be read: lazy, or with holes and freed memory."""
    return any(t.is_conj() or t.is_neg() or not kernel.has_storage(t) for t in columns)


class RowsBatch:
    """Parameters of one set of dtypes whose gradients are sparse: all their rows are stepped by one launch.

    At every step everything is read anew, as by `KernelBatch`; what is kept is what it is compared with, and how a
    launch is laid out. Rows that a launch has room for beyond a step's own lie in memory that means nothing.
    """

    def __init__(
        self, members: list[Member], params: Sequence[Tensor], state: Mapping[Any, State], recipe: Recipe, owner: str
    ) -> None:
        check_rule(owner, recipe)
        self.members, self.recipe, self.owner = members, recipe, owner
        own = [params[m.position] for m in members]
        columns = [own, *([state[p][name] for p in own] for name in recipe.graph.state)]
        self.expected = kernel.expect([*chain.from_iterable(columns)])
        each = list(zip(*columns, strict=True))
        self.copied = [not all(t.is_contiguous() for t in of) for of in each]
        # Those that may be lazy, see `KernelBatch`, or have holes.
        self.odd = [on or of[0].is_complex() or of[0].numel() == 1 for on, of in zip(self.copied, each, strict=True)]
        g = own[0] if own[0].grad is None else own[0].grad
        self.dtypes = [g.dtype, *(column[0].dtype for column in columns)]
        self.sizes = [column[0].element_size() // (2 if own[0].is_complex() else 1) for column in columns]
        formats = zip(recipe.columns, map(format_name, self.dtypes), strict=True)
        self.kernel = kernel.compile(recipe.graph, tuple(formats))
        self.written = [column.written for column in self.kernel.program.columns[1:]]
        self.launch: Any = None
        # How many rows of a parameter the launch can hold, and of how many numbers.
        self._room: list[tuple[int, int]] = []

    def gather(self, params: Sequence[Tensor], groups: Sequence[Group], state: Mapping[Any, State]) -> Gathered | None:
        """Who steps now, and options; None where the plan no longer fits, or a new one will say what is wrong."""
        options = {g: self.recipe.read(groups[g]) for g in {m.group for m in self.members}}
        own = [params[m.position] for m in self.members]
        states = [state.get(p, {}) for p in own]
        try:
            columns = [own, *([one.get(name) for one in states] for name in self.recipe.graph.state)]
            steps = [float(one["step"]) for one in states] if self.recipe.counts_steps else [0.0] * len(own)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError):
            return None
        self.expected.compare([*chain.from_iterable(columns)])
        changed = self.expected.changed.reshape(len(columns), -1).max(axis=0).tolist()
        starts = self.expected.pointers.reshape(len(columns), -1).T.tolist()
        stepping: list[Rows] = []
        for i, (member, p) in enumerate(zip(self.members, own, strict=True)):
            if p.grad is not None:
                of = [column[i] for column in columns]
                found = None if changed[i] or (self.odd[i] and _are_unfit(of)) else self._read(member, p, p.grad)
                if found is None:
                    return None
                stepping.append(Rows(member, states[i], steps[i], of, starts[i], *found, self.copied[i]))
        return [stepping, options]

    def _read(self, member: Member, p: Tensor, g: Tensor) -> tuple[np.ndarray, np.ndarray, Tensor] | None:
        """A parameter's gradient, see `read`, where it is of the kind that the kernel was compiled for."""
        if type(g) not in kernel.PLAIN or not member.takes(g) or g.dtype != self.dtypes[0] or g.shape != p.shape:
            return None
        return read(g, p.shape)

    def run(self, gathered: Gathered, fresh: set[int], unscale: Unscale) -> None:
        """Step what was gathered; `fresh`, the positions of those whose state is new, loses them."""
        stepping, options = gathered
        self._read_again(stepping)
        factor = unscale.factor
        if _overlap(stepping):
            # One after the other and in one thread, as torch would.
            for one in stepping:
                one.values = one.values.clone()
                self._launch([one], options, fresh, factor, 1)
        else:
            self._launch(stepping, options, fresh, factor, self.kernel.concurrency())
        for one in stepping:
            if self.recipe.counts_steps:
                write_number(one.own, "step", one.step + 1)
            fresh.discard(one.member.position)

    def _read_again(self, stepping: list[Rows]) -> None:
        """Others have stepped since, by torch's operations, which may be anybody's: addresses are those of now."""
        for one in stepping:
            if any(t.data_ptr() != start for t, start in zip(one.columns, one.starts, strict=True)):
                raise StepError(
                    f"{self.owner}: parameters or state changed while others stepped; keep their memory as it is"
                )

    def _launch(
        self, stepping: list[Rows], options: Mapping[int, list[float]], fresh: set[int], factor: float, threads: int
    ) -> None:
        stepping = [one for one in stepping if one.count]
        if not stepping:
            return
        self._make_room(stepping)
        begin = 0
        copies = []
        for i, (one, (room, _)) in enumerate(zip(stepping, self._room, strict=True)):
            copies.append(one.find(self._table[:, begin : begin + one.count], self.sizes))
            self._table[:, begin + one.count : begin + room] = self._nowhere
            begin += room
            self._set_leaves(i, one, options[one.member.group], one.member.position in fresh, factor)
        self.launch.run(threads)
        for one, copied in zip(stepping, copies, strict=True):
            for t, copy, written in zip(one.columns, copied, self.written, strict=False):
                if written:
                    t.detach()[one.where] = copy
        columns = (t for one in stepping for t, on in zip(one.columns, self.written, strict=True) if on)
        torch.autograd.graph.increment_version(list(columns))

    def _set_leaves(self, i: int, one: Rows, options: list[float], first: bool, factor: float) -> None:
        """The hyper-parameters of a parameter, in column i."""
        hypers = dict(zip((name for name, _, _ in self.recipe.sources), options, strict=True))
        hypers |= {"first": float(first), "step": one.step + 1, kernel.GRADIENT_FACTOR: factor}
        for name, value in hypers.items():
            if name in self.kernel.leaves:
                self.launch.leaves[self.kernel.leaves[name], i] = value

    def _make_room(self, stepping: list[Rows]) -> None:
        """Lay out a launch, unless there is one with enough room for these rows, and not far too much."""
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
        self._nowhere = self._scratch.__array_interface__["data"][0] + np.arange(len(self.dtypes)) * 8 * longest
        self._nowhere = self._nowhere[:, np.newaxis]
        self._table = np.zeros((len(self.dtypes), len(rows)), np.int64)
        work = self.kernel.split(lengths[rows])
        self.launch = self.kernel.prepare(self._table.view(np.uint64), work, rows, len(stepping))


def _overlap(stepping: list[Rows]) -> bool:
    """Whether memory that is written occurs twice; parameters with holes in a shared memory have no kernels."""
    ranges = []
    for one in stepping:
        for start, t in zip((*one.starts, one.values.data_ptr()), (*one.columns, one.values), strict=True):
            ranges.append((start, start + t.nbytes))
    ranges.sort()
    return any(after[0] < before[1] for before, after in pairwise(ranges))


@dataclass
class EagerRows(EagerBatch):
    """The same by torch's own operations, one parameter at a time: rows are copied out, stepped and put back."""

    def __post_init__(self) -> None:
        check_rule(self.owner, self.recipe)

    def _update(self, p: Tensor, own: State, hypers: dict[str, Any]) -> None:
        assert p.grad is not None
        if p.grad._nnz():
            super()._update(p, own, hypers)
            self._at = None
        elif self.recipe.counts_steps:
            write_number(own, "step", hypers["step"])

    def _columns(self, p: Tensor, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert p.grad is not None
        g = coalesced(p.grad)
        # Without sparse dimensions the parameter is one row.
        self._at: Any = tuple(g._indices()) or (None,)
        return {name: t[self._at] for name, t in {"p": p, **states}.items()} | {"g": g._values()}

    def _store(self, target: Tensor, value: Tensor) -> None:
        target[self._at] = value.to(target.dtype)
