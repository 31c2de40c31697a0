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
        return ("g", "p", *self.graph.state)


def number(value: object, name: str) -> float:
    """A hyper-parameter as a float; tensors of one element are read."""
    if type(value) is float:
        return value
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
        groups, self.row_of_group = np.unique(self.group, return_inverse=True)
        self.groups = groups.tolist()
        # A parameter whose memory has holes is stepped as a dense copy.
        self.strided = [i for i, m in enumerate(members) if not kernel.is_dense(m.p)]
        # Gradients of one element may be lazy negations that have the expected strides.
        self.tiny = [i for i, m in enumerate(members) if m.p.numel() == 1 or m.p.is_complex()]
        like = [self._like(i) for i in range(self.count)]
        gradients = [torch.empty_like(p, dtype=_gradient_dtype(m.p)) for p, m in zip(like, members, strict=True)]
        states = [[m.state[name] for m in members] for name in recipe.graph.state]
        self.expected = kernel.expect([*gradients, *like, *chain.from_iterable(states)])
        scale = 2 if members[0].p.is_complex() else 1
        self.numel = np.array([scale * m.p.numel() for m in members], dtype=np.int64)
        self.kernel = kernel.compile(recipe.graph, _formats(recipe, members[0], gradients[0]))
        self.work = self.kernel.split(self.numel)
        self.leaves = [self.kernel.leaves[name] for name, _, _ in recipe.sources]
        self.launch: Any = None
        self.inactive: list[int] = []
        # 1.0 for each parameter that has a gradient in this step, else 0.0.
        self.active = np.ones(self.count)
        self._work: Any = None
        self._next_steps = self._placed = b""
        self._overlapping = False

    def _like(self, i: int) -> Tensor:
        p = self.members[i].p.detach()
        return p.contiguous() if i in self.strided else p

    def gather(self, groups: Sequence[Group]) -> bool:
        """Read options and tensors; False where the plan no longer fits. Raises `StepError` where no plan could."""
        n = self.count
        self.values = [
            [number(_pick(groups[g], key, i), key) for g in self.groups] for _, key, i in self.recipe.sources
        ]
        tensors: list[Any] = [p.grad for p in self.params]
        tensors += self.params
        try:
            for name in self.recipe.graph.state:
                tensors += map(itemgetter(name), self.states)
        except KeyError:
            return False
        self._fill_in(tensors)
        inactive: list[int] = []
        if self.expected.compare(tensors):
            inactive = [k for k in self._changed() if k < n and tensors[k] is None]
            if len(inactive) < len(self._changed()) and not self._replace_gradients(tensors, inactive):
                return False
        if inactive != self.inactive:
            self.inactive = inactive
            numel = self.numel.copy()
            numel[inactive] = 0
            self.work = self.kernel.split(numel)
            self.active = np.ones(self.count)
            self.active[inactive] = 0.0
        self.tensors = tensors
        return True

    def _changed(self) -> list[int]:
        return np.flatnonzero(self.expected.changed).tolist()

    def _fill_in(self, tensors: list[Any]) -> None:
        """Dense copies of parameters with holes, and of gradients whose lazy negation no other fact shows."""
        for i in self.strided:
            if not kernel.has_storage(self.params[i]):
                raise StepError(f"{self.owner}: parameter {self.members[i].label} has no storage; give it memory again")
            tensors[self.count + i] = self.params[i].detach().contiguous()
        for i in self.tiny:
            g = tensors[i]
            if g is not None and (g.is_neg() or g.is_conj()):
                tensors[i] = g.resolve_conj().resolve_neg()

    def _replace_gradients(self, tensors: list[Any], inactive: list[int]) -> bool:
        """Put dense copies in the place of unusual gradients; False where something else than a gradient differs."""
        for i in self._changed():
            if i >= self.count:
                return False
            g = tensors[i]
            if g is None:
                continue
            check_gradient(self.members[i], g, self.owner)
            if type(g) not in kernel.PLAIN or g.dtype != self.expected.facts[i][0]:
                return False
            tensors[i] = torch.empty_like(self._like(i), dtype=g.dtype).copy_(g.detach())
        return self.expected.compare(tensors) == len(inactive) and self._changed() == inactive

    def run(self, steps: np.ndarray | None, first: np.ndarray | None, factor: float) -> None:
        """Launch on what was gathered. `steps` and `first`: each parameter's step number, and whether it is its first."""
        self._choose_rows(steps, first)
        leaves = self.launch.leaves
        for leaf, values in zip(self.leaves, self.values, strict=True):
            leaves[leaf] = values[0] if len(values) == 1 else np.array(values)[self.setting_group]
        for name, settings in (("step", self.setting_step), ("first", self.setting_first)):
            if name in self.kernel.leaves:
                leaves[self.kernel.leaves[name]] = settings
        if kernel.GRADIENT_FACTOR in self.kernel.leaves:
            leaves[self.kernel.leaves[kernel.GRADIENT_FACTOR]] = factor
        self.launch.run(1 if self._overlap() else torch.get_num_threads())
        for i in self.strided:
            self.params[i].detach().copy_(self.tensors[self.count + i])
        written = self.tensors[self.count :]
        for i in self.strided:
            written[i] = self.params[i]
        if self.inactive:
            missing = set(self.inactive)
            written = [t for k, t in enumerate(written) if k % self.count not in missing]
        torch.autograd.graph.increment_version(written)

    def _choose_rows(self, steps: np.ndarray | None, first: np.ndarray | None) -> None:
        """Find the distinct settings (group, step, first) and each tensor's; most steps only count the last on."""
        steps = np.zeros(self.count) if steps is None else steps
        if first is None and self._work is self.work and steps.tobytes() == self._next_steps:
            self.setting_step += 1.0
            self._next_steps = (steps + 1.0).tobytes()
            return
        flags = np.zeros(self.count) if first is None else first
        keys = np.stack([self.row_of_group, steps, flags], axis=1)
        settings, rows = np.unique(keys, axis=0, return_inverse=True)
        self.setting_group = settings[:, 0].astype(np.int64)
        self.setting_step, self.setting_first = settings[:, 1].copy(), settings[:, 2].copy()
        self._work, self._next_steps = self.work, b"" if first is not None else (steps + 1.0).tobytes()
        pointers = self.expected.pointers.reshape(-1, self.count)
        self.launch = self.kernel.prepare(pointers, self.work, rows.reshape(-1), len(settings))

    def _overlap(self) -> bool:
        """Whether two written tensors share memory: then one thread walks them in order, as torch would."""
        placed = self.expected.pointers[self.count :]
        if placed.tobytes() != self._placed:
            size = self.expected.bytes[self.count :]
            order = np.argsort(placed, kind="stable")
            order = order[size[order] > 0]
            ends = (placed + size.astype(np.uint64))[order]
            self._overlapping = bool((ends[:-1] > placed[order][1:]).any())
            self._placed = placed.tobytes()
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
    tensors = [gradient, member.p, *states]
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
    differentiable: bool
    capturable: bool
    stepping: list[int] = field(default_factory=list)

    def gather(self, groups: Sequence[Group]) -> bool:
        """Read options, and which parameters step now; raises `StepError` where one cannot."""
        self.stepping = [i for i, m in enumerate(self.members) if m.p.grad is not None]
        self.hypers = {g: self._read(groups[g]) for g in {self.members[i].group for i in self.stepping}}
        for i in self.stepping:
            member = self.members[i]
            check_gradient(member, member.p.grad, self.owner)  # type: ignore[arg-type]
            if any(not isinstance(member.state.get(name), Tensor) for name in self.recipe.graph.state):
                return False
            if self.recipe.counts_steps and "step" not in member.state:
                return False
        return True

    def _read(self, group: Group) -> dict[str, Any]:
        hypers = {name: _pick(group, key, j) for name, key, j in self.recipe.sources}
        if self.differentiable or self.capturable:
            return hypers
        return {name: number(value, name) for name, value in hypers.items()}

    def run(self, first: Sequence[bool], factor: float) -> list[int]:
        """Step each parameter that has a gradient, and say which; `first` as in `KernelBatch.run`, by position."""
        for i in self.stepping:
            member = self.members[i]
            hypers = self.hypers[member.group] | {"first": float(first[i]), kernel.GRADIENT_FACTOR: factor}
            if self.recipe.counts_steps:
                hypers["step"] = _count(member.state, self.capturable)
            self._update(member, hypers)
        return self.stepping

    def _update(self, member: Member, hypers: dict[str, Any]) -> None:
        columns = {"p": member.p, "g": member.p.grad, **{name: member.state[name] for name in self.recipe.graph.state}}
        real = {name: torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for name, t in columns.items()}
        # Autograd keeps what it has read; what is written in place must be another tensor.
        read = {name: t.clone() for name, t in real.items()} if self.differentiable else real
        for name, value in kernel.evaluate(self.recipe.graph, read, hypers).items():
            real[name].copy_(value)


def _count(state: State, capturable: bool) -> Tensor | float:
    """Advance a parameter's own step count; a tensor where a graph capture must see it."""
    if not isinstance(state["step"], Tensor):
        state["step"] = torch.tensor(float(state["step"]))
    with torch.no_grad():
        state["step"] += 1
    return state["step"].clone() if capturable else state["step"].item()
