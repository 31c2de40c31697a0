"""What is known of parameters that no kernel serves, and which of them are computed together.

`EagerBatch` computes and stores what is gathered here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import kernel
from ..contract.mistakes import are_learning_rates
from ..contract.values import Group, StepError, number, pick
from .batch import CAPTURE, check
from .checks import Member
from .columns import lies_in_memory, picker
from .parts import MOST_ELEMENTS, STATES, Part, Stepping
from .reading import Reading
from .recipe import Recipe
from .stored_numbers import is_number_tensor

# This many sets of parameters that alternate are known.
MOST_SETS = 8


class EagerMembers:
    """The parameters of one graph that no kernel serves: what is known of them, and who steps.

    Plain tensors are compared with what was checked when the plan was made, as by `KernelBatch`.
    All others are checked at every step.
    """

    def __init__(
        self,
        members: list[Member],
        reading: Reading,
        recipe: Recipe,
        owner: str,
        differentiable: bool,
        capturable: bool,
    ) -> None:
        self.members, self.recipe, self.owner = members, recipe, owner
        self.differentiable, self.capturable = differentiable, capturable
        self.positions = np.array([m.position for m in members])
        self.pick, self.pick_state = picker(self.positions.tolist()), picker([])
        self.groups = sorted({m.group for m in members})
        # The positions of those that share memory; they step one after the other, in copies.
        self.apart: set[int] = set()
        self._know(reading)
        # The plain tensors of members that also have others: where they begin, their bytes, their
        # positions.
        self._found: np.ndarray = np.zeros((0, 3), np.uint64)
        self._sets: dict[tuple[int, ...], tuple[list[Part], list[int]]] = {}
        # As in `KernelBatch`.
        self.refused_rate: tuple[int, float] | None = None

    def _know(self, reading: Reading) -> None:
        """Find the members that have only plain tensors in memory, and note facts of these.

        The gradients' facts are the first.
        """
        self.known: list[int] = []
        like: list[list[Tensor]] = []
        numbers: list[list[Any]] = []
        for i, p in enumerate(self.pick(reading.params)):
            state = reading.state_of(p)
            tensors = [p, *(state[name] for name in self.recipe.graph.state)]
            if all(map(lies_in_memory, tensors)):
                self.known.append(i)
                like.append([_as_gradient(p, reading.grads[self.members[i].position]), *tensors])
                numbers.append([state[name] for name in self.recipe.numbers])
        # Numbers of Python, or of other classes, are looked at one by one.
        self._compared = list(self.recipe.graph.state)
        if all(lies_in_memory(value) for values in numbers for value in values):
            self._compared += self.recipe.numbers
            like = [[*tensors, *values] for tensors, values in zip(like, numbers, strict=True)]
        self._pick_known = picker(self.known)
        self._unknown = sorted({*range(len(self.members))}.difference(self.known))
        # Those of whose states not all entries are compared.
        self._unread: Sequence[int] = range(len(self.members))
        if len(self._compared) == len(self.recipe.entries):
            self._unread = self._unknown
        self._kinds = [self._kind(tensors) for tensors in like]
        self._sizes = [tensors[0].numel() for tensors in like]
        self.expected = kernel.expect([*chain.from_iterable(zip(*like, strict=True))])

    def _kind(self, tensors: Sequence[Tensor]) -> object:
        """Return what plain tensors share that are computed together: their device and dtypes.

        It returns None for tensors that are computed alone.
        """
        columns = tensors[: len(self.recipe.columns)]
        alone = self.differentiable or self.capturable or not self.recipe.graph.is_elementwise
        alone |= len(self._compared) < len(self.recipe.entries)
        if alone or any(t.is_conj() or t.is_neg() for t in columns):
            return None
        return tensors[0].device, *(t.dtype for t in columns)

    def find_entries(self, places: Mapping[int, int], reading: Reading) -> None:
        """Note where in the optimizer's state the parameters' entries are.

        `places` are those of `Reading`.
        """
        params = self.pick(reading.params)
        self.pick_state = picker([places[id(p)] for p in params] if self.recipe.entries else [])

    def gather(self, reading: Reading) -> list[Stepping] | None:
        """Return who steps now, with which state and options; None if the plan no longer fits."""
        options = {g: self._read(g, reading.groups[g]) for g in self.groups}
        params, grads = self.pick(reading.params), self.pick(reading.grads)
        states: Sequence[Any] = [{}] * len(params)
        if self.recipe.entries:
            states = self.pick_state(reading.entries)
            if not all(map(is_, self.pick_state(reading.keys), params)):
                return None
        columns = self._read_known(params, grads, states)
        if columns is None or not all(self._has_entries(states[i]) for i in self._unread):
            return None
        if self._unknown:
            self._find_unknown(params, states)
        changed = tuple(np.flatnonzero(self.expected.changed).tolist())
        if changed and changed[-1] >= len(self.known):
            return None
        parts, alone = self._cut(changed)
        stepping = [part.stepping(columns, options) for part in parts]
        for i in alone:
            member, p, g, state = self.members[i], params[i], grads[i], states[i]
            if g is None:
                continue
            if not member.takes(g):
                return None
            check(self.owner, member, p, g, state, self.recipe)
            kept = [state.get(name) for name in self.recipe.graph.state]
            if any(lies_in_memory(entry) and kernel.is_expanded(entry) for entry in kept):
                # A new plan makes it dense; it could not be written.
                return None
            tensors: dict[str, Sequence[Any]] = {"p": [p], "g": [g]}
            tensors |= {name: [state[name]] for name in self.recipe.entries}
            stepping.append(
                Stepping([member], tensors, [state], dict(options[member.group]), together=False)
            )
        self._check_modes(stepping)
        return stepping

    def _read_known(
        self, params: Sequence[Tensor], grads: Sequence[Any], states: Sequence[Any]
    ) -> dict[str, Sequence[Any]] | None:
        """Compare tensors with what is expected; return these by column, and their states.

        It returns None if an entry is missing.
        """
        known = self._pick_known(states)
        columns: dict[str, Sequence[Any]] = {
            "g": self._pick_known(grads),
            "p": self._pick_known(params),
        }
        try:
            columns |= {name: list(map(itemgetter(name), known)) for name in self._compared}
        except (KeyError, TypeError, IndexError):
            return None
        self.expected.compare([*chain.from_iterable(columns.values())])
        return columns | {STATES: known}

    def _find_unknown(self, params: Sequence[Tensor], states: Sequence[Any]) -> None:
        found: list[int] = []
        for i in self._unknown:
            for t in filter(
                lies_in_memory, (params[i], *(states[i][name] for name in self.recipe.graph.state))
            ):
                found += t.data_ptr(), kernel.extent(t), self.members[i].position
        self._found = np.array(found, np.uint64).reshape(-1, 3)

    def _cut(self, changed: tuple[int, ...]) -> tuple[list[Part], list[int]]:
        """Return what is computed together, and who is computed alone.

        `changed` are the places of those whose gradients are unusual or missing.
        """
        if changed not in self._sets:
            if len(self._sets) >= MOST_SETS:
                self._sets.clear()
            parts = self._cut_into_parts(changed)
            together = {i for part in parts for i in part.indices}
            alone = [i for i in range(len(self.members)) if i not in together]
            self._sets[changed] = parts, alone
        return self._sets[changed]

    def _cut_into_parts(self, changed: tuple[int, ...]) -> list[Part]:
        """Cut the known members of equal kinds into parts that are computed together.

        Left out are members whose gradients are unusual or missing, and those that share memory.

        Example, as if `MOST_ELEMENTS` were 100: members of one kind with 60, 30, 20 and 200
        elements. The first two are one part, with room for 10 more. The third does not fit and
        begins a part with room for 80. The fourth does not fit either: it is a part of its own,
        since a part's first member always fits. The parts are [[0, 1], [2], [3]].
        """
        parts: list[list[int]] = []
        # Of each kind the part that is not full: how many elements it has room for, and its places.
        open_parts: dict[object, tuple[int, list[int]]] = {}
        for i, kind in enumerate(self._kinds):
            member = self.members[self.known[i]]
            if kind is None or i in changed or member.position in self.apart:
                continue
            room, places = open_parts.get(kind, (0, []))
            if room < self._sizes[i] or not places:
                room, places = MOST_ELEMENTS, []
                parts.append(places)
            places.append(i)
            open_parts[kind] = room - self._sizes[i], places
        return [Part(places, self.known, self.members) for places in parts]

    def _has_entries(self, state: Any) -> bool:
        return isinstance(state, dict) and all(
            state.get(name) is not None for name in self.recipe.entries
        )

    def _check_modes(self, stepping: list[Stepping]) -> None:
        """Raise `StepError` if a graph or autograd would record operations that cannot work."""
        if self.differentiable:
            for s in stepping if torch.is_grad_enabled() else ():
                self._refuse_leaves(s)
        elif not self.capturable:
            # Those who are computed together are on one device.
            for device in {s.columns["p"][0].device for s in stepping}:
                if kernel.is_capturing(device):
                    raise StepError(CAPTURE.format(self.owner))

    def _refuse_leaves(self, stepping: Stepping) -> None:
        """Raise `StepError` if autograd would refuse to let the step write a tensor."""
        for name in ("p", *self.recipe.entries):
            for member, t in zip(stepping.members, stepping.columns.get(name, ()), strict=False):
                if isinstance(t, Tensor) and t.requires_grad and t.is_leaf:
                    what = f"parameter {member.label}"
                    if name != "p":
                        what = f"state {name!r} of {what}"
                    raise StepError(
                        f"{self.owner}: a leaf Variable that requires grad is being used in an "
                        "in-place operation; under differentiable=True give a clone() in the "
                        f"place of {what}"
                    )

    def _read(self, index: int, group: Group) -> dict[str, Any]:
        """Return a group's options, as numbers.

        Under autograd and in captured graphs tensors stay tensors.
        """
        kept = self.differentiable or self.capturable
        options: dict[str, Any] = {}
        for name, key, i in self.recipe.sources:
            value = pick(group, key, i)
            options[name] = value if kept and is_number_tensor(value) else number(value, key)
        rate = options.get("lr", 0.0)
        if isinstance(rate, float) and not are_learning_rates(rate):
            self.refused_rate = index, rate
        return options

    def starts(self) -> np.ndarray:
        """Return where plain tensors that this step writes begin in memory, as addresses."""
        return np.concatenate([self.expected.pointers[len(self.known) :], self._found[:, 0]])

    def stretches(self) -> tuple[np.ndarray, np.ndarray]:
        """Return how many bytes begin at each of `starts`, and the position of their parameter."""
        sizes = self.expected.bytes[len(self.known) :]
        positions = np.tile(self.positions[self.known], len(sizes) // max(len(self.known), 1))
        found = self._found.astype(np.int64)
        return np.concatenate([sizes, found[:, 1]]), np.concatenate([positions, found[:, 2]])

    def tensors_apart(self, reading: Reading) -> list[Tensor]:
        """Return the plain tensors of those that share memory and step now."""
        tensors: list[Tensor] = []
        for position in sorted(self.apart):
            p = reading.params[position]
            if reading.grads[position] is not None:
                tensors += [p, *(reading.state_of(p)[name] for name in self.recipe.graph.state)]
        return [t for t in tensors if lies_in_memory(t)]


def _as_gradient(p: Tensor, g: Tensor | None) -> Tensor:
    """Return g if it is what a gradient mostly is, else p in its place: such a g is checked."""
    usual = g is not None and lies_in_memory(g) and g.shape == p.shape and g.device == p.device
    return g if g is not None and usual and g.is_complex() == p.is_complex() else p
