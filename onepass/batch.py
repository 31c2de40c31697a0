"""The parameters that step together: one launch of a kernel, or one loop of the eager backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import kernel

Group = dict[str, Any]
State = dict[str, Any]


class StepError(RuntimeError):
    """A step that cannot be taken; nothing has been changed."""


@dataclass
class Member:
    """One parameter: the group and the state that it steps with, and what to call it in a message."""

    p: Tensor
    group: int
    state: State
    label: str


@dataclass
class Recipe:
    """What a batch computes: a finished graph, where its hyper-parameters are found, and whether it counts steps."""

    graph: kernel.Graph
    sources: list[tuple[str, str, int | None]]
    counts_steps: bool

    @property
    def columns(self) -> tuple[str, ...]:
        return ("p", "g", *self.graph.state)


def number(value: object, name: str) -> float:
    """A hyper-parameter as a float; tensors of one element are read."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise StepError(f"param group option {name!r} must be a number, got {value!r}") from None


def check_gradient(member: Member, g: Tensor, owner: str) -> None:
    """A gradient that no step can use raises, before anything has changed."""
    p = member.p
    if g.layout != torch.strided:
        advice = ", please consider SparseAdam instead" if owner.startswith("Adam") else ": use torch.optim.SGD here"
        raise StepError(f"{owner} does not support sparse gradients{advice} (parameter {member.label})")
    if g.shape != p.shape:
        raise StepError(
            f"{owner}: the gradient of parameter {member.label} has shape {tuple(g.shape)}, "
            f"the parameter has {tuple(p.shape)}; set it by p.grad = ... or run backward() again"
        )
    if g.device != p.device:
        raise StepError(
            f"{owner}: parameter {member.label} is on {p.device} and its gradient on {g.device}; move them together"
        )
    if g.is_complex() != p.is_complex() or not (g.is_floating_point() or g.is_complex()):
        raise StepError(f"{owner}: parameter {member.label} is {p.dtype} and its gradient {g.dtype}")
    if type(g) in kernel.PLAIN and not kernel.has_storage(g):
        raise StepError(f"{owner}: the gradient of parameter {member.label} has lost its storage; run backward() again")


class KernelBatch:
    """Dense tensors of one device and one set of dtypes, stepped by one launch.

    What is read anew at every step, by `gather`: each `.grad`, each state entry, and of every tensor its address,
    dtype, device, sizes, strides and the size of its storage. What is kept is only what these are compared with; an
    address is never kept. Where p, or a state, differs, `gather` returns False and the plan is built again, which
    checks everything and raises a sentence if something is wrong. Where a gradient differs (expanded, transposed,
    lazily conjugated), a dense copy of it takes its place for this step. A parameter without a gradient has no
    elements in this step. Since the launch follows with the tensors in hand, no address can go stale in between.
    """

    def __init__(self, members: list[Member], recipe: Recipe, owner: str) -> None:
        self.members, self.recipe, self.owner = members, recipe, owner
        self.count = len(members)
        self.params = [m.p for m in members]
        self.states = [m.state for m in members]
        self.group = np.array([m.group for m in members], dtype=np.int64)
        self.groups, self.row_of_group = np.unique(self.group, return_inverse=True)
        # A parameter whose memory has holes is stepped as a dense copy.
        self.strided = [i for i, m in enumerate(members) if not kernel.is_dense(m.p)]
        # Gradients of one element may be lazy negations that have the expected strides.
        self.tiny = [i for i, m in enumerate(members) if m.p.numel() == 1 or m.p.is_complex()]
        like = [self._like(i) for i in range(self.count)]
        gradients = [torch.empty_like(p, dtype=_gradient_dtype(m.p)) for p, m in zip(like, members, strict=True)]
        states = [[m.state[name] for m in members] for name in recipe.graph.state]
        self.expected = kernel.expect([*like, *gradients, *chain.from_iterable(states)])
        scale = 2 if members[0].p.is_complex() else 1
        self.numel = np.array([scale * m.p.numel() for m in members], dtype=np.int64)
        self.kernel = kernel.compile(recipe.graph, _formats(recipe, members[0], gradients[0]))
        self.work = self.kernel.split(self.numel)
        self.inactive: list[int] = []
        self._placed = np.zeros(0, np.uint64)
        self._overlapping = False

    def _like(self, i: int) -> Tensor:
        p = self.members[i].p.detach()
        return p.contiguous() if i in self.strided else p

    def gather(self) -> bool:
        """Read all tensors; False where the plan no longer fits them. Raises `StepError` where no plan could."""
        n = self.count
        tensors: list[Any] = [*self.params, *[p.grad for p in self.params]]
        try:
            for name in self.recipe.graph.state:
                tensors += map(itemgetter(name), self.states)
        except KeyError:
            return False
        self._fill_in(tensors)
        inactive: list[int] = []
        if self.expected.compare(tensors):
            inactive = [k - n for k in self._changed() if n <= k < 2 * n and tensors[k] is None]
            if len(inactive) < len(self._changed()) and not self._replace_gradients(tensors, inactive):
                return False
        if inactive != self.inactive:
            self.inactive = inactive
            numel = self.numel.copy()
            numel[inactive] = 0
            self.work = self.kernel.split(numel)
        self.tensors = tensors
        return True

    def _changed(self) -> list[int]:
        return np.flatnonzero(self.expected.changed).tolist()

    def _fill_in(self, tensors: list[Any]) -> None:
        """Dense copies of parameters with holes, and of gradients whose lazy negation no other fact shows."""
        n = self.count
        for i in self.strided:
            if not kernel.has_storage(tensors[i]):
                raise StepError(f"{self.owner}: parameter {self.members[i].label} has no storage; give it memory again")
            tensors[i] = tensors[i].detach().contiguous()
        for i in self.tiny:
            g = tensors[n + i]
            if g is not None and (g.is_neg() or g.is_conj()):
                tensors[n + i] = g.resolve_conj().resolve_neg()

    def _replace_gradients(self, tensors: list[Any], inactive: list[int]) -> bool:
        """Put dense copies in the place of unusual gradients; False where something else than a gradient differs."""
        n = self.count
        missing = [n + i for i in inactive]
        for k in self._changed():
            column, i = divmod(k, n)
            g = tensors[k]
            if column != 1:
                return False
            if g is None:
                continue
            check_gradient(self.members[i], g, self.owner)
            if type(g) not in kernel.PLAIN or g.dtype != self.expected.facts[k][0]:
                return False
            tensors[k] = torch.empty_like(self._like(i), dtype=g.dtype).copy_(g.detach())
        return self.expected.compare(tensors) == len(missing) and self._changed() == missing

    def active(self) -> np.ndarray:
        """1.0 for each parameter that has a gradient in this step, else 0.0."""
        mask = np.ones(self.count)
        mask[self.inactive] = 0.0
        return mask

    def run(self, groups: Sequence[Group], steps: np.ndarray | None, first: np.ndarray | None, factor: float) -> None:
        """Launch. `steps` and `first` are this step's number and whether it is the first, for each parameter."""
        hypers, rows = self._rows(groups, steps, first)
        hypers[kernel.GRADIENT_FACTOR] = np.full(len(hypers["step"]), factor)
        pointers = self.expected.pointers.reshape(-1, self.count)
        threads = 1 if self._overlap(pointers) else torch.get_num_threads()
        used = [self.recipe.columns.index(c.name) for c in self.kernel.program.columns]
        self.kernel.launch(np.ascontiguousarray(pointers[used]), self.work, rows, hypers, threads)
        for i in self.strided:
            self.members[i].p.detach().copy_(self.tensors[i])
        written = self.params + self.tensors[2 * self.count :]
        if self.inactive:
            missing = set(self.inactive)
            written = [t for k, t in enumerate(written) if k % self.count not in missing]
        torch.autograd.graph.increment_version(written)

    def _rows(
        self, groups: Sequence[Group], steps: np.ndarray | None, first: np.ndarray | None
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Hyper-parameters as arrays with an entry for each distinct (group, step, first), and each tensor's entry."""
        row = self.row_of_group.astype(np.int64)
        table = {
            name: np.array([number(_pick(groups[g], key, i), key) for g in self.groups.tolist()])
            for name, key, i in self.recipe.sources
        }
        steps = np.zeros(self.count) if steps is None else steps
        first = np.zeros(self.count) if first is None else first
        if (steps == steps[0]).all() and (first == first[0]).all():
            count = len(self.groups)
            extra = {"step": np.full(count, steps[0]), "first": np.full(count, first[0])}
            return table | extra, row
        keys = np.stack([row, steps, first], axis=1)
        settings, rows = np.unique(keys, axis=0, return_inverse=True)
        of_group = settings[:, 0].astype(np.int64)
        table = {name: values[of_group] for name, values in table.items()}
        return table | {"step": settings[:, 1], "first": settings[:, 2]}, rows.reshape(-1).astype(np.int64)

    def _overlap(self, pointers: np.ndarray) -> bool:
        """Whether two written tensors share memory: then one thread walks them in order, as torch would."""
        written = [k for k in range(len(pointers)) if k != 1]
        placed = pointers[written].reshape(-1)
        if not np.array_equal(placed, self._placed):
            size = self.expected.bytes.reshape(-1, self.count)[written].reshape(-1)
            order = np.argsort(placed, kind="stable")
            order = order[size[order] > 0]
            ends = (placed + size.astype(np.uint64))[order]
            self._overlapping = bool((ends[:-1] > placed[order][1:]).any())
            self._placed = placed
        return self._overlapping


def _pick(group: Group, key: str, i: int | None) -> object:
    try:
        return group[key] if i is None else group[key][i]
    except (KeyError, IndexError):
        raise StepError(f"param group has no option {key!r}; set it, or give it in the constructor") from None


def _gradient_dtype(p: Tensor) -> torch.dtype:
    return p.dtype if p.grad is None else p.grad.dtype


def _formats(recipe: Recipe, member: Member, gradient: Tensor) -> tuple[tuple[str, str], ...]:
    states = [member.state[name] for name in recipe.graph.state]
    tensors = [member.p, gradient, *states]
    return tuple((c, format_name(t.dtype)) for c, t in zip(recipe.columns, tensors, strict=True))


def format_name(dtype: torch.dtype) -> str:
    """The storage format of a dtype; complex numbers are pairs of real ones."""
    real = dtype.to_real() if dtype.is_complex else dtype
    return str(real).removeprefix("torch.")


@dataclass
class EagerBatch:
    """Parameters that no kernel serves: one at a time, by torch's own operations."""

    members: list[Member]
    recipe: Recipe
    owner: str
    stepping: list[int] = field(default_factory=list)

    def gather(self) -> bool:
        """Which parameters step now; raises `StepError` where one cannot."""
        self.stepping = [i for i, m in enumerate(self.members) if m.p.grad is not None]
        for i in self.stepping:
            member = self.members[i]
            check_gradient(member, member.p.grad, self.owner)  # type: ignore[arg-type]
            if any(not isinstance(member.state.get(name), Tensor) for name in self.recipe.graph.state):
                return False
            if self.recipe.counts_steps and "step" not in member.state:
                return False
        return True

    def run(self, groups: Sequence[Group], first: Sequence[bool], factor: float) -> list[int]:
        """Step each parameter that has a gradient, and say which; `first` as in `KernelBatch.run`, by position."""
        for i in self.stepping:
            member = self.members[i]
            group = groups[member.group]
            differentiable, capturable = bool(group.get("differentiable")), bool(group.get("capturable"))
            hypers: dict[str, Any] = {name: _pick(group, key, j) for name, key, j in self.recipe.sources}
            if not (differentiable or capturable):
                hypers = {name: number(value, name) for name, value in hypers.items()}
            hypers |= {"first": float(first[i]), kernel.GRADIENT_FACTOR: factor}
            if self.recipe.counts_steps:
                hypers["step"] = _count(member.state, capturable)
            self._update(member, hypers, differentiable)
        return self.stepping

    def _update(self, member: Member, hypers: dict[str, Any], differentiable: bool) -> None:
        columns = {"p": member.p, "g": member.p.grad, **{name: member.state[name] for name in self.recipe.graph.state}}
        real = {name: torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for name, t in columns.items()}
        # Autograd keeps what it has read; what is written in place must be another tensor.
        read = {name: t.clone() for name, t in real.items()} if differentiable else real
        for name, value in kernel.evaluate(self.recipe.graph, read, hypers).items():
            real[name].copy_(value)


def _count(state: State, capturable: bool) -> Tensor | float:
    """Advance a parameter's own step count; a tensor where a graph capture must see it."""
    if not isinstance(state["step"], Tensor):
        state["step"] = torch.tensor(float(state["step"]))
    with torch.no_grad():
        state["step"] += 1
    return state["step"].clone() if capturable else state["step"].item()
