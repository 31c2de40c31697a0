"""Parameters that no kernel serves: they step by torch's own operations.

A step computes all new values of all such parameters before it stores one. What may refuse to be
stored, a tensor of another class, is stored first and can be taken back. Plain tensors of
elementwise rules are computed together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import chain
from operator import is_, itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import kernel
from ..contract.mistakes import are_learning_rates
from ..contract.values import Group, State, StepError, number, pick
from .batch import CAPTURE, as_dense_gradient, check
from .checks import Member
from .columns import lies_in_memory, picker
from .gradient_factor import GradientFactor
from .ledger import Ledger
from .parts import MOST_ELEMENTS, STATES, Part, Stepping
from .reading import Reading
from .recipe import Recipe
from .scratch import Scratch
from .stored_numbers import count_steps, is_number_tensor, read_numbers, write_number

# Sets of parameters that alternate, of which so many are known.
MOST_SETS = 8


class EagerBatch:
    """The parameters of one graph that no kernel serves.

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
        self.cancel()

    def _know(self, reading: Reading) -> None:
        """Find the members all of whose tensors are plain, in memory; their tensors' facts, the
        gradients' first."""
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
        """What plain tensors have in common that are computed together; None for those that are
        not."""
        columns = tensors[: len(self.recipe.columns)]
        alone = self.differentiable or self.capturable or not self.recipe.graph.is_elementwise
        alone |= len(self._compared) < len(self.recipe.entries)
        if alone or any(t.is_conj() or t.is_neg() for t in columns):
            return None
        return tensors[0].device, *(t.dtype for t in columns)

    def find_entries(self, places: Mapping[int, int], reading: Reading) -> None:
        """Note where in the optimizer's state the parameters' entries are; `places` are those of
        `Reading`."""
        params = self.pick(reading.params)
        self.pick_state = picker([places[id(p)] for p in params] if self.recipe.entries else [])

    def gather(self, reading: Reading) -> list[Stepping] | None:
        """Who steps now, with which state and options; None where the plan no longer fits."""
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
            if any(
                lies_in_memory(t) and kernel.is_expanded(t)
                for t in map(state.get, self.recipe.graph.state)
            ):
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
        """The tensors that are compared with what is expected, and their states; None where an
        entry is missing."""
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
        """Raise where operations would be recorded, by a graph or by autograd, in a way that cannot
        work."""
        if self.differentiable:
            for s in stepping if torch.is_grad_enabled() else ():
                self._refuse_leaves(s)
        elif not self.capturable:
            # Those who are computed together are on one device.
            for device in {s.columns["p"][0].device for s in stepping}:
                if kernel.is_capturing(device):
                    raise StepError(CAPTURE.format(self.owner))

    def _refuse_leaves(self, stepping: Stepping) -> None:
        """Raise where autograd would refuse to have a tensor written that the step writes."""
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
        """A group's options, as numbers; under autograd and in captured graphs tensors stay
        tensors."""
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
        """Where plain tensors begin in memory that this step writes."""
        return np.concatenate([self.expected.pointers[len(self.known) :], self._found[:, 0]])

    def stretches(self) -> tuple[np.ndarray, np.ndarray]:
        """How many bytes begin at each of `starts`, and the position of the parameter that they
        belong to."""
        sizes = self.expected.bytes[len(self.known) :]
        positions = np.tile(self.positions[self.known], len(sizes) // max(len(self.known), 1))
        found = self._found.astype(np.int64)
        return np.concatenate([sizes, found[:, 1]]), np.concatenate([positions, found[:, 2]])

    def tensors_apart(self, reading: Reading) -> list[Tensor]:
        """The plain tensors of those that share memory and step now."""
        tensors: list[Tensor] = []
        for position in sorted(self.apart):
            p = reading.params[position]
            if reading.grads[position] is not None:
                tensors += [p, *(reading.state_of(p)[name] for name in self.recipe.graph.state)]
        return [t for t in tensors if lies_in_memory(t)]

    def begin(
        self,
        stepping: list[Stepping],
        fresh: Collection[int],
        gradient_factor: GradientFactor,
        scratch: Scratch,
    ) -> list[tuple[int, Callable[[], None]]]:
        """Compute new values, and store nothing.

        Parameters that share memory step in the order of the whole optimizer, across its batches.
        For each of them this returns its position and what computes it.
        """
        self.cancel()
        self._stepping = stepping
        later: list[tuple[int, Callable[[], None]]] = []
        for s in stepping:
            hypers = self._hypers(s, fresh, gradient_factor)
            if s.together:
                self._compute_together(s, hypers)
            elif s.members[0].position in self.apart:
                later.append((s.members[0].position, partial(self._compute, s, hypers, scratch)))
            else:
                self._compute(s, hypers, scratch)
        return later

    def _hypers(
        self, stepping: Stepping, fresh: Collection[int], gradient_factor: GradientFactor
    ) -> dict[str, Any]:
        """The rule's numbers: one for all, or a list with one for each parameter."""
        hypers = dict(stepping.options)
        # A count that no rule reads is not read here either: its value may not exist, as that of a
        # fake tensor.
        for name in self.recipe.numbers:
            if name in self.recipe.graph.hypers:
                values = read_numbers(
                    stepping.columns[name], self.capturable, self.differentiable and name != "step"
                )
                hypers[name] = [value + 1 for value in values] if name == "step" else values
        hypers["first"] = [float(m.position in fresh) for m in stepping.members] if fresh else 0.0
        hypers[kernel.GRADIENT_FACTOR] = gradient_factor.factor
        return hypers

    def _compute_together(self, stepping: Stepping, hypers: dict[str, Any]) -> None:
        """The new values of plain tensors, which stand in a row meanwhile."""
        given = {name: stepping.columns[name] for name in self.recipe.columns}
        is_complex = given["p"][0].is_complex()
        if is_complex:
            given = {name: list(map(torch.view_as_real, column)) for name, column in given.items()}
        new, scalars = kernel.evaluate_together(self.recipe.graph, given, hypers)
        for name, values in new.items():
            self._targets += stepping.columns[name]
            self._values += map(torch.view_as_complex, values) if is_complex else values
        for name, values in scalars.items():
            self._numbers += [
                (state, name, value) for state, value in zip(stepping.states, values, strict=True)
            ]

    def _compute(self, stepping: Stepping, hypers: dict[str, Any], scratch: Scratch) -> None:
        """The new values of one parameter, in a scratch copy where it shares memory with others."""
        (state,) = stepping.states
        targets = {name: stepping.columns[name][0] for name in self.recipe.columns}
        given = {
            name: scratch.view(as_dense_gradient(t) if name == "g" else t)
            for name, t in targets.items()
        }
        is_complex = targets["p"].is_complex()
        if is_complex:
            given = {name: torch.view_as_real(t.resolve_conj()) for name, t in given.items()}
        if self.differentiable:
            # Autograd keeps what it has read; what is written in place must be another tensor.
            given = {name: t.clone() for name, t in given.items()}
        numbers = {
            name: value[0] if isinstance(value, list) else value for name, value in hypers.items()
        }
        new, scalars = kernel.evaluate(self.recipe.graph, given, numbers)
        self._numbers += [(state, name, value) for name, value in scalars.items()]
        for name, value in new.items():
            value = torch.view_as_complex(value.contiguous()) if is_complex else value
            if scratch.holds(targets[name]):
                # Those who step next see it.
                value = scratch.view(targets[name]).copy_(value)
            self._targets_alone.append((targets[name], value))

    def cancel(self) -> None:
        """Let go what has been computed."""
        self._stepping: list[Stepping] = []
        self._targets: list[Tensor] = []
        self._values: list[Tensor] = []
        self._targets_alone: list[tuple[Tensor, Tensor]] = []
        self._numbers: list[tuple[State, str, Any]] = []
        # Whose steps are still to be counted.
        self._counted: list[State] = []

    def store_refusing(self, ledger: Ledger) -> bool:
        """Store what may refuse to be stored, as tensors of other classes may; returns whether
        there was any."""
        refusing = [pair for pair in self._targets_alone if not kernel.is_plain(pair[0])]
        for target, value in refusing:
            ledger.copy(target, value)
        self._targets_alone = [pair for pair in self._targets_alone if kernel.is_plain(pair[0])]
        return self._store_refusing_numbers(ledger) or bool(refusing)

    def _store_refusing_numbers(self, ledger: Ledger) -> bool:
        """The same for numbers; steps are counted here, too."""
        kept: list[tuple[State, str, Any]] = []
        for state, name, value in self._numbers:
            if not isinstance(state[name], Tensor) or kernel.is_plain(state[name]):
                kept.append((state, name, value))
                continue
            ledger.copy(
                state[name],
                torch.as_tensor(value, dtype=state[name].dtype, device=state[name].device),
            )
        stored = len(kept) < len(self._numbers)
        self._numbers = kept
        self._counted = []
        for stepping in self._stepping if self.recipe.counts_steps else ():
            for state in stepping.states:
                step = state["step"]
                if isinstance(step, Tensor) and not kernel.is_plain(step):
                    ledger.copy(step, step.detach() + 1)
                    stored = True
                else:
                    self._counted.append(state)
        return stored

    def finish(self, fresh: set[int]) -> None:
        """Store the rest; `fresh`, the positions of those whose state is new, loses the parameters
        that stepped."""
        if self._targets:
            torch._foreach_copy_(self._targets, self._values)
        for target, value in self._targets_alone:
            target.copy_(value)
        for state, name, value in self._numbers:
            write_number(state, name, value)
        for stepping in self._stepping:
            if fresh:
                fresh.difference_update(member.position for member in stepping.members)
        if self.recipe.counts_steps:
            count_steps(self._counted)
        self.cancel()


def _as_gradient(p: Tensor, g: Tensor | None) -> Tensor:
    """A tensor as the gradient of a parameter mostly is; another one is checked."""
    usual = g is not None and lies_in_memory(g) and g.shape == p.shape and g.device == p.device
    return g if g is not None and usual and g.is_complex() == p.is_complex() else p
