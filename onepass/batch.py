"""The parameters that step together: one launch of a kernel, or one loop of the eager backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import is_, itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import kernel
from .checks import Group, Member, State, StepError, check_gradient, check_matrix, check_member, check_state, pick
from .columns import Columns, find_lazy, picker
from .recipes import Recipe
from .unscale import Unscale

# Sets of parameters that alternate, as experts do, of which so many are known.
MOST_WORKS = 8
CAPTURE = (
    "{}: a step that is captured in a graph needs capturable=True in every param group; set it, and take a few steps "
    "before the capture"
)
# What a batch has read for one step. It lives no longer than the step: nothing here keeps a tensor alive.
Gathered = list[Any]


def check(owner: str, member: Member, p: Tensor, state: Mapping[str, Any], recipe: Recipe) -> None:
    """Whether a parameter can step by this recipe; raises `StepError`."""
    check_member(owner, member, p, state, recipe.required, recipe.numbers)
    if recipe.graph.has_matrices:
        check_matrix(owner, member, p)
    for name in recipe.graph.state:
        if state.get(name) is not None:
            check_state(owner, member, p, name, state[name], recipe.shape(name, p))


class KernelBatch(Columns):
    """Dense tensors of one device and one set of dtypes, stepped by one launch.

    What is read anew at every step, by `gather`: options, each `.grad`, each state entry, whose key must be its
    parameter, and of every tensor its address, dtype, device, sizes, strides and the size of its storage. What is kept
    is only what these are compared with: neither a tensor nor an address. Where a parameter or a state differs,
    `gather` returns None and the plan is built again, which checks everything and raises a sentence if something is
    wrong. Where a gradient differs (expanded, transposed, lazily conjugated), a dense copy of it takes its place for
    this step. A parameter without a gradient has no elements in this step. The launch follows with the tensors in hand.
    """

    def __init__(self, members: list[Member], params: list[Tensor], states: list[State], recipe: Recipe, owner: str):
        self.members, self.recipe, self.owner = members, recipe, owner
        self.pick = picker([m.position for m in members])
        groups, self.row_of_group = np.unique([m.group for m in members], return_inverse=True)
        self.groups = groups.tolist()
        # A parameter whose memory has holes is stepped as a dense copy.
        self.strided = [i for i, p in enumerate(params) if not recipe.fits(p)]
        self.lazy = find_lazy(params)
        like = [recipe.as_dense(p) for p in params]
        gradients = [
            t if t.dtype == _gradient_dtype(p) else torch.empty_like(t, dtype=_gradient_dtype(p))
            for t, p in zip(like, params, strict=True)
        ]
        columns = [[state[name] for state in states] for name in recipe.graph.state]
        numbers = [state[name] for name in recipe.numbers for state in states]
        super().__init__(recipe.graph, recipe.columns, [gradients, like, *columns], numbers, self.resident(recipe))
        self.numbers_at = np.array([number.data_ptr() for number in numbers], np.uint64)
        self.leaves = [self.kernel.leaves[name] for name, _, _ in recipe.sources]
        self.launch: Any = None
        self.inactive: list[int] = []
        # 1.0 for each parameter that has a gradient in this step, else 0.0.
        self.active = np.ones(self.count)
        # How the work is cut and the launch laid out, for some sets of parameters without a gradient.
        self._works: dict[tuple[int, ...], Any] = {(): self.work}
        self._launches: dict[tuple[int, ...], Any] = {}
        self._work: Any = None
        self._workers = 1

    def resident(self, recipe: Recipe) -> tuple[str, ...] | None:
        """The parameters' numbers that lie on the device: none, the host keeps them."""
        return None

    def read(self, group: Group) -> Sequence[Any]:
        """A group's numbers, in the order of the recipe's sources."""
        return self.recipe.read(group)

    def find_entries(self, order: Mapping[int, int], params: Sequence[Tensor]) -> None:
        """Note where in the optimizer's state the parameters' entries are; `order` maps an id to its place."""
        self.pick_state = picker([order[id(p)] for p in self.pick(params)] if self.recipe.entries else [])

    def gather(
        self, params: Sequence[Tensor], groups: Sequence[Group], keys: Sequence[Any], entries: Sequence[State]
    ) -> Gathered | None:
        """Read options and tensors; None where the plan no longer fits. Raises `StepError` where no plan could.

        `params` are all parameters in order, `keys` and `entries` the optimizer's state.
        """
        self.values = [self.read(groups[g]) for g in self.groups]
        self.check_capture()
        own = self.pick(params)
        tensors: Gathered = [p.grad for p in own]
        tensors += own
        if self.recipe.entries:
            states = self.pick_state(entries)
            if not all(map(is_, self.pick_state(keys), own)):
                return None
            try:
                for name in self.recipe.entries:
                    tensors += map(itemgetter(name), states)
            except (KeyError, TypeError, IndexError):
                return None
        if not self._fill_in(tensors):
            return None
        inactive: list[int] = []
        if self.expected.compare(tensors):
            changed = self._changed()
            inactive = [i for i in changed if i < self.count and tensors[i] is None]
            if len(inactive) < len(changed) and not self._replace_gradients(tensors, inactive):
                return None
        tail = self.expected.pointers[len(self.expected.pointers) - len(self.numbers_at) :]
        if tail.tobytes() != self.numbers_at.tobytes():
            return None
        self._activate(inactive)
        return tensors

    def check_capture(self) -> None:
        """Raise where a step would be captured in a graph that holds what is known now of the host's numbers."""
        if self.kernel.is_capturing():
            raise StepError(CAPTURE.format(self.owner))

    def _changed(self) -> list[int]:
        return np.flatnonzero(self.expected.changed).tolist()

    def _activate(self, inactive: list[int]) -> None:
        if inactive != self.inactive:
            key = tuple(inactive)
            if key not in self._works:
                sizes = self.sizes.copy()
                sizes[inactive] = 0
                if len(self._works) >= MOST_WORKS:
                    self.forget(next(iter(self._works)))
                self._works[key] = self.kernel.split(sizes)
            self.inactive, self.work = inactive, self._works[key]
            self.active = np.ones(self.count)
            self.active[inactive] = 0.0

    def forget(self, inactive: tuple[int, ...]) -> None:
        """Let go what is known of steps in which these parameters have no gradient."""
        del self._works[inactive]
        self._launches.pop(inactive, None)

    def _fill_in(self, tensors: Gathered) -> bool:
        """Dense copies of parameters with holes and of lazy gradients; False where a parameter or state is lazy."""
        n = self.count
        for i in self.lazy:
            for k in range(n + i, len(tensors), n):
                if isinstance(tensors[k], Tensor) and (tensors[k].is_neg() or tensors[k].is_conj()):
                    return False
            g = tensors[i]
            if g is not None and (g.is_neg() or g.is_conj()):
                check_gradient(self.owner, self.members[i], tensors[n + i], g)
                tensors[i] = g.resolve_conj().resolve_neg()
        for i in self.strided:
            p = tensors[n + i]
            if not kernel.has_storage(p):
                return False
            tensors[n + i] = p.detach().contiguous()
        return True

    def _replace_gradients(self, tensors: Gathered, inactive: list[int]) -> bool:
        """Put dense copies in the place of unusual gradients; False where something else than a gradient differs."""
        for i in self._changed():
            if i >= self.count:
                return False
            g, p = tensors[i], tensors[self.count + i]
            if g is None:
                continue
            if not self.members[i].takes(g):
                return False
            check_gradient(self.owner, self.members[i], p, g)
            if type(g) not in kernel.PLAIN or g.dtype != self.expected.facts[i][0]:
                return False
            filled, like = as_filled(g.detach()), self.recipe.as_dense(p)
            fits = g.layout != torch.strided and filled.stride() == like.stride()
            tensors[i] = filled if fits else torch.empty_like(like, dtype=g.dtype).copy_(filled)
        return self.expected.compare(tensors) == len(inactive) and self._changed() == inactive

    def is_as_read(self, tensors: Gathered) -> bool:
        """Whether what was gathered still is what it was; addresses are read anew."""
        return self.expected.compare(tensors) == len(self.inactive) and self._changed() == self.inactive

    def begin(self, numbers: Mapping[str, np.ndarray], first: np.ndarray | None, unscale: Unscale) -> None:
        """Compute on what was gathered as far as it may fail, and store nothing; to be finished, or cancelled.

        `numbers` hold each parameter's scalars and step number; `first` says whose step is the first.
        """
        self.choose_rows(np.stack([numbers[n] for n in self.recipe.numbers] or [np.zeros(self.count)]), first)
        leaves = self.launch.leaves
        for leaf, values in zip(self.leaves, zip(*self.values, strict=True), strict=True):
            leaves[leaf] = values[0] if len(values) == 1 else np.array(values)[self.setting_group]
        settings = {**dict(zip(self.recipe.numbers, self.setting_numbers, strict=False)), "first": self.setting_first}
        for name, values in (*settings.items(), (kernel.GRADIENT_FACTOR, unscale.factor)):
            if name in self.kernel.leaves:
                leaves[self.kernel.leaves[name]] = values
        self.launch_up_to_stores()

    def launch_up_to_stores(self) -> None:
        """Begin the launch that has been laid out."""
        # One worker walks written tensors that share memory in order, as torch would.
        self._workers = 1 if self.overlap(first=1) else self.kernel.concurrency()
        self.launch.begin(self._workers)

    def cancel(self) -> None:
        """Give back the memory of what has begun and will not be finished."""
        if self.launch is not None:
            self.launch.cancel()

    def finish(self, tensors: Gathered, params: Sequence[Tensor]) -> dict[str, np.ndarray]:
        """Store what was begun, with the gathered tensors in hand, and return each parameter's new scalars."""
        self.launch.finish(self._workers)
        columns = len(self.recipe.columns)
        written = tensors[self.count : columns * self.count]
        if self.strided:
            own = self.pick(params)
            for i in self.strided:
                own[i].detach().copy_(written[i])
        written += tensors[columns * self.count :][: self.count * len(self.resident(self.recipe) or ())]
        if self.inactive:
            missing = set(self.inactive)
            written = [t for k, t in enumerate(written) if k % self.count not in missing]
        torch.autograd.graph.increment_version(written)
        return self.launch.scalars()

    def choose_rows(self, numbers: np.ndarray, first: np.ndarray | None) -> None:
        """Find the distinct settings (group, first, numbers) and each tensor's.

        Tensors that have stepped together so far do so in most steps; then their settings alone are read anew.
        """
        if first is None and self._work is self.work:
            settings = numbers[:, self._examples]
            same = settings[:, self._rows] == numbers
            if (same | (self.active == 0)).all():
                self.setting_numbers = settings
                return
        flags = np.zeros(self.count) if first is None else first
        keys = np.stack([self.row_of_group, flags, *numbers], axis=1)
        settings, examples, rows = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        self._rows, self._examples = rows.reshape(-1), examples
        self.setting_group, self.setting_first = settings[:, 0].astype(np.int64), settings[:, 1].copy()
        self.setting_numbers = settings[:, 2:].T
        # In its first step a parameter has settings of its own.
        self._work = self.work if first is None else None
        key = tuple(self.inactive)
        launch = self._launches.get(key)
        if launch is None or launch.leaves.shape[1] != len(settings) or not np.array_equal(launch.rows, self._rows):
            launch = self._launches[key] = self.kernel.prepare(self.addressed, self.work, self._rows, len(settings))
        self.launch = launch


def _gradient_dtype(p: Tensor) -> torch.dtype:
    return p.dtype if p.grad is None else p.grad.dtype


def as_filled(g: Tensor) -> Tensor:
    """A gradient, with zeros where a sparse one has no values."""
    return g if g.layout == torch.strided else g.to_dense()


@dataclass
class EagerBatch:
    """Parameters that no kernel serves: one at a time, by torch's own operations. Everything is checked every time."""

    members: list[Member]
    recipe: Recipe
    owner: str
    differentiable: bool
    capturable: bool

    def gather(
        self, params: Sequence[Tensor], groups: Sequence[Group], state: Mapping[Any, State]
    ) -> list[tuple[Member, Tensor, State, dict[str, Any]]] | None:
        """Who steps now, with which state and options; None where state is missing that a plan would create."""
        stepping = []
        for member in self.members:
            p = params[member.position]
            if p.grad is None:
                continue
            own = state.get(p, {})
            if not isinstance(own, dict) or any(own.get(name) is None for name in self.recipe.entries):
                return None
            if not member.takes(p.grad):
                return None
            check(self.owner, member, p, own, self.recipe)
            if not (self.capturable or self.differentiable) and kernel.is_capturing(p.device):
                raise StepError(CAPTURE.format(self.owner))
            stepping.append((member, p, own, self._read(groups[member.group])))
        return stepping

    def _read(self, group: Group) -> dict[str, Any]:
        if self.differentiable or self.capturable:
            return {name: pick(group, key, j) for name, key, j in self.recipe.sources}
        names = (name for name, _, _ in self.recipe.sources)
        return dict(zip(names, self.recipe.read(group), strict=True))

    def run(self, stepping: Gathered, fresh: set[int], unscale: Unscale) -> None:
        """Step each parameter that was gathered; `fresh`, the positions of those whose state is new, loses them."""
        for member, p, own, hypers in stepping:
            hypers |= {"first": float(member.position in fresh), kernel.GRADIENT_FACTOR: unscale.factor}
            hypers |= {name: _read(own[name], self.capturable) for name in self.recipe.numbers}
            if self.recipe.counts_steps:
                hypers["step"] = hypers["step"] + 1
            self._update(p, own, hypers)
            fresh.discard(member.position)

    def _update(self, p: Tensor, own: State, hypers: dict[str, Any]) -> None:
        """Compute everything, then write."""
        columns: dict[str, Any] = self._columns(p, {name: own[name] for name in self.recipe.graph.state})
        if p.is_complex():
            columns = {name: torch.view_as_real(t.resolve_conj()) for name, t in columns.items()}
        # Autograd keeps what it has read; what is written in place must be another tensor.
        read = {name: t.clone() for name, t in columns.items()} if self.differentiable else columns
        new = kernel.evaluate(self.recipe.graph, read, hypers)
        if self.recipe.counts_steps:
            write_number(own, "step", hypers["step"])
        for name in self.recipe.scalars:
            write_number(own, name, new.pop(name))
        for name, value in new.items():
            target = p if name == "p" else own[name]
            self._store(target, torch.view_as_complex(value.contiguous()) if p.is_complex() else value)

    def _columns(self, p: Tensor, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the rule is given."""
        assert p.grad is not None
        return {"p": p, "g": as_filled(p.grad), **states}

    def _store(self, target: Tensor, value: Tensor) -> None:
        """Put a column's new value in its place."""
        target.copy_(value)


def _read(value: Tensor | float, capturable: bool) -> Tensor | float:
    """A number of a parameter's state; a tensor where a graph capture must see it."""
    if isinstance(value, Tensor):
        return value.detach().clone() if capturable else value.item()
    return value


def write_number(own: State, name: str, value: Tensor | float) -> None:
    """Set a number of a parameter's state in place, where it is kept in a tensor."""
    kept = own[name]
    if isinstance(kept, Tensor) and not kept.is_inference():
        with torch.no_grad():
            kept.copy_(value) if isinstance(value, Tensor) else kept.fill_(value)
    elif name == "step" and type(kept) is int:
        own[name] = int(value)
    else:
        own[name] = torch.tensor(float(value), device="cpu")
