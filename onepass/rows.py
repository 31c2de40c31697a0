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
from .batch import EagerBatch, Gathered, format_name, write_number
from .checks import Group, Member, State, check_gradient
from .kernel.ir import Rank, RuleError, topological
from .recipes import Recipe

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


def in_order(g: Tensor) -> Tensor:
    """A sparse gradient with each index once and in order, which it may claim without its being so."""
    if g.is_coalesced() and g._nnz() > 1:
        indices = g._indices()
        flat = torch.zeros_like(indices[0]) if len(indices) else torch.zeros(g._nnz())
        for index, n in zip(indices, g.shape, strict=False):
            flat = flat * n + index
        if not bool((flat[1:] > flat[:-1]).all()):
            g = torch.sparse_coo_tensor(indices, g._values(), g.shape, check_invariants=False)
    return g.coalesce()


@dataclass
class Rows:
    """A parameter's rows in one step: its columns, where in them the rows are, and their gradient.

    To a launch they are `count` tensors of `length` real numbers. Where the columns' memory does not consist of such
    rows, `indices` are left out and the rows are one tensor, of copies.
    """

    member: Member
    own: State
    step: float
    columns: list[Tensor]
    at: tuple[Tensor, ...]
    values: Tensor
    count: int
    length: int
    indices: np.ndarray | None

    @classmethod
    def of(cls, member: Member, own: State, step: float, columns: list[Tensor]) -> Rows:
        """Those that the gradient of a parameter, the first of its columns, has values for."""
        p = columns[0]
        assert p.grad is not None
        g = in_order(p.grad)
        indices, values = g._indices(), g._values().resolve_conj().resolve_neg().contiguous()
        k, count = indices.shape
        length = prod(p.shape[k:]) * (2 if p.is_complex() else 1)
        rows = cls(member, own, step, columns, tuple(indices), values, count if length else 0, length, indices.numpy())
        if rows.count and not all(_has_rows(t, k) for t in columns):
            rows.count, rows.length, rows.indices = 1, count * length, None
        return rows

    @property
    def spare(self) -> int:
        """For how many further rows a launch leaves room."""
        return 0 if self.indices is None or self.length > WIDE else self.count // 8 + 8

    def find(self, table: np.ndarray) -> list[Tensor]:
        """Enter the rows' addresses, those of the gradient first; returns the copies whose addresses they are."""
        if self.indices is None:
            copies = [t.detach()[self.at or ...].contiguous() for t in self.columns]
            table[:, 0] = [t.data_ptr() for t in (self.values, *copies)]
            return copies
        first, size = self.values.data_ptr(), self.values.nbytes
        table[0] = np.arange(first, first + size, size // self.count)
        known: dict[tuple[int, ...], np.ndarray] = {}
        for row, t in zip(table[1:], self.columns, strict=True):
            strides = tuple(stride * t.itemsize for stride in t.stride()[: len(self.at)])
            if strides not in known:
                offsets = known[strides] = np.zeros(self.count, np.int64)
                for index, stride in zip(self.indices, strides, strict=True):
                    offsets += index * stride
            np.add(known[strides], t.data_ptr(), out=row)
        return []

    def ranges(self) -> list[tuple[int, int]]:
        """Where the memory of the columns and of the gradient begins and ends."""
        found = []
        for t in (*self.columns, self.values):
            last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
            found.append((t.data_ptr(), t.data_ptr() + (last + 1) * t.itemsize))
        return found


def _are_unfit(columns: list[Tensor]) -> bool:
    """Whether tensors of the expected shapes and strides may not be read: lazy, or with holes and freed memory."""
    return any(t.is_conj() or t.is_neg() for t in columns) or not all(
        t.is_contiguous() or kernel.has_storage(t) for t in columns
    )


def _has_rows(t: Tensor, k: int) -> bool:
    """Whether memory consists of the slices over the first k dimensions, each in one piece and in order."""
    return t.is_contiguous() or (kernel.is_dense(t) and t.detach()[(0,) * k].is_contiguous())


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
        g = own[0] if own[0].grad is None else own[0].grad
        self.dtypes = [g.dtype, *(column[0].dtype for column in columns)]
        formats = zip(recipe.columns, map(format_name, self.dtypes), strict=True)
        self.kernel = kernel.compile(recipe.graph, tuple(formats))
        self.written = [column.written for column in self.kernel.program.columns[1:]]
        self.launch: Any = None
        # How many rows of a parameter the launch can hold, and of how many numbers.
        self._room: list[tuple[int, int]] = []

    def gather(self, params: Sequence[Tensor], groups: Sequence[Group], state: Mapping[Any, State]) -> Gathered | None:
        """Who steps now, and options; None where the plan no longer fits. Raises `StepError` where no plan could."""
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
        stepping: list[Rows] = []
        for i, (member, p) in enumerate(zip(self.members, own, strict=True)):
            if p.grad is None:
                continue
            tensors = [column[i] for column in columns]
            if changed[i] or _are_unfit(tensors):
                return None
            if type(p.grad) not in kernel.PLAIN or not member.takes(p.grad) or p.grad.dtype != self.dtypes[0]:
                return None
            check_gradient(self.owner, member, p, p.grad)
            stepping.append(Rows.of(member, states[i], steps[i], tensors))
        return [stepping, options]

    def run(self, gathered: Gathered, fresh: set[int], factor: float) -> None:
        """Step what was gathered; `fresh`, the positions of those whose state is new, loses them."""
        stepping, options = gathered
        if _overlap(stepping):
            # One after the other and in one thread, as torch would.
            for one in stepping:
                one.values = one.values.clone()
                self._launch([one], options, fresh, factor, 1)
        else:
            self._launch(stepping, options, fresh, factor, torch.get_num_threads())
        for one in stepping:
            if self.recipe.counts_steps:
                write_number(one.own, "step", one.step + 1)
            fresh.discard(one.member.position)

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
            copies.append(one.find(self._table[:, begin : begin + one.count]))
            self._table[:, begin + one.count : begin + room] = self._nowhere
            begin += room
            self._set_leaves(i, one, options[one.member.group], one.member.position in fresh, factor)
        self.launch.run(threads)
        for one, copied in zip(stepping, copies, strict=True):
            for t, copy, written in zip(one.columns, copied, self.written, strict=False):
                if written:
                    t.detach()[one.at or ...] = copy
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
    """Whether memory that is written occurs twice."""
    ranges = sorted(pair for one in stepping if one.count for pair in one.ranges())
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
        g = in_order(p.grad)
        # Without sparse dimensions the parameter is one row.
        self._at: Any = tuple(g._indices()) or (None,)
        return {name: t[self._at] for name, t in {"p": p, **states}.items()} | {"g": g._values()}

    def _store(self, target: Tensor, value: Tensor) -> None:
        target[self._at] = value.to(target.dtype)
