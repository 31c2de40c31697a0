"""Parameters that no kernel serves: they step by torch's own operations.

A step computes all new values of all such parameters before it stores one. What may refuse to be
stored, a tensor of another class, is stored first and can be taken back. Plain tensors of
elementwise rules are computed together.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import kernel
from ..contract.values import State
from .batch import as_dense_gradient
from .batches import Delayed, Step
from .checks import Member
from .eager_members import EagerMembers
from .gradient_factor import GradientFactor
from .ledger import Ledger
from .parts import Stepping
from .reading import Reading
from .recipe import Recipe
from .scratch import Scratch
from .stored_numbers import count_steps, read_numbers, write_number


class EagerBatch(EagerMembers):
    """The parameters of one graph that no kernel serves: how a step computes and stores.

    `begin` computes, `store_refusing` and `finish` store, and `cancel` forgets what was computed.
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
        super().__init__(members, reading, recipe, owner, differentiable, capturable)
        self.cancel()

    @property
    def demand(self) -> int:
        """How much memory `begin` takes: it is bounded, and so counts as none."""
        return 0

    def is_as_read(self, gathered: list[Stepping], reading: Reading) -> bool:
        """Whether what was gathered is still what it was: torch's operations look by themselves."""
        return True

    def begin(self, gathered: list[Stepping], step: Step) -> list[Delayed]:
        """Compute new values, and store nothing.

        Parameters that share memory step in the order of the whole optimizer, across its batches.
        For each of them this returns its position and what computes it.
        """
        self.cancel()
        self._stepping = gathered
        scratch = step.scratch
        assert scratch is not None
        later: list[Delayed] = []
        for s in gathered:
            hypers = self._hypers(s, step.fresh, step.gradient_factor)
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
        """Return the rule's numbers: one for all, or a list with one for each parameter."""
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
        """Compute the new values of plain tensors, which lie one after the other meanwhile."""
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
        """Compute one parameter's new values, in a scratch copy if it shares memory with others."""
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
        """Store what may refuse to be stored, as tensors of other classes may.

        Returns whether there was any.
        """
        refusing = [pair for pair in self._targets_alone if not kernel.is_plain(pair[0])]
        for target, value in refusing:
            ledger.copy(target, value)
        self._targets_alone = [pair for pair in self._targets_alone if kernel.is_plain(pair[0])]
        return self._store_refusing_numbers(ledger) or bool(refusing)

    def _store_refusing_numbers(self, ledger: Ledger) -> bool:
        """Do the same for numbers; steps are counted here, too."""
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

    def finish(self, gathered: list[Stepping], step: Step) -> None:
        """Store the rest."""
        if self._targets:
            torch._foreach_copy_(self._targets, self._values)
        for target, value in self._targets_alone:
            target.copy_(value)
        for state, name, value in self._numbers:
            write_number(state, name, value)
        for stepping in gathered:
            step.fresh.difference_update(member.position for member in stepping.members)
        if self.recipe.counts_steps:
            count_steps(self._counted)
        self.cancel()
