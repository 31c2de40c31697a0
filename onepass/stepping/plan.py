"""The plan of an optimizer: who steps together, what each step checks, when it is built again.

**It is built again** when something differs from what it was built for: a parameter list, an option
that is not a number, the set of parameters that have ever had a gradient, a state dict, any fact of
a parameter or state tensor, or which of them share memory. Building checks everything first and
creates missing state last, so that an error leaves all as it was.

**A step** goes down to the batches three times:

    ready   reads everything: parameter lists, options, gradients, states, facts of all tensors
    begin   does whatever may fail: functions of matrices, torch's operations, memory
    finish  stores, and nothing of this may fail

So an error changes nothing, at the price of three walks over the batches. No address outlives a
step, and a plan keeps no parameter, gradient or state alive. Threads take turns (`Private.turn`): a
plan's tables are in use by one step at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..contract.values import Group, StepError
from .batches import Batch, Delayed, Step
from .batching import Batching
from .checks import Member
from .columns import Clusters, find_clusters
from .device_batch import DeviceBatch
from .gradient_factor import GradientFactor
from .group_recipes import GroupRecipes
from .ledger import Ledger
from .members import Members
from .numbers import Numbers
from .reading import Reading
from .recipe import Algorithm
from .scratch import Scratch
from .sharing import find_shared


class Plan:
    """One optimizer's parameters, in batches, ready to step."""

    def __init__(
        self, algorithm: Algorithm, reading: Reading, scaled: bool, former: Plan | None = None
    ) -> None:
        """Check everything, then create the state that is missing, then compile.

        Raises `StepError`, and then nothing has changed. A `former` plan may know of parameters
        whose first step was skipped.
        """
        self.owner, self.scaled = algorithm.name, scaled
        self.inference = torch.is_inference_mode_enabled()
        self.sizes = [len(group["params"]) for group in reading.groups]
        self.options = GroupRecipes(algorithm, reading.groups, scaled)
        # What to take back if a step does not come of it.
        self._ledger = Ledger()
        members = Members(algorithm, reading, self.options, self._ledger)
        self.dormant, self.slice_answers = members.dormant, members.slice_answers
        # The positions of the parameters whose state is made now.
        self.fresh = members.fresh
        try:
            why = members.complete_states()
            self._make_batches(algorithm, members.awake, reading, why)
        except BaseException:
            self.undo()
            raise
        self.size = len(reading.state)
        for batch in self.residents:
            for other in () if former is None else former.residents:
                batch.take_over(other)

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        # It holds machine code and addresses of this process.
        return _nothing, ()

    def undo(self) -> None:
        """Take back the state that building this plan has made, if no step came of it."""
        self._ledger.undo()

    def _make_batches(
        self,
        algorithm: Algorithm,
        members: list[Member],
        reading: Reading,
        why: dict[int, str | None],
    ) -> None:
        """Group members by program and dtypes: each kernel batch is one launch.

        `why` says by position why no kernel can serve a member.
        """
        batching = Batching(self.owner, members, reading, self.options)
        kinds = batching.find_kinds(why)
        self._is_differentiable = any(mode.differentiable for mode in self.options.modes)
        self.clusters: Clusters = ()
        if not self._is_differentiable:
            self.clusters = find_shared(members, self.options.recipes, reading)
        for position, reason in batching.why_shared(self.clusters, kinds).items():
            why[position] = reason if why[position] is None else why[position]
            kinds.pop(position, None)
        for reason in dict.fromkeys(filter(None, why.values())):
            algorithm.warn_once(f"{self.owner} steps on the slower eager backend: {reason}")
        shared = set(chain.from_iterable(self.clusters))
        numbers = Numbers(self._ledger)
        self.kernels = batching.make_kernels(kinds, numbers, shared)
        self.eager = batching.make_eager(kinds, numbers, shared)
        self.slices = batching.make_slices(kinds)
        self.batches: list[Batch] = [*self.kernels, *self.eager, *self.slices]
        self._compared_starts: list[bytes] | None = None

    def ready(
        self,
        reading: Reading,
        scaled: bool,
        flags: Sequence[Mapping[str, bool]],
        steps_slices: Callable[[Group], bool] | None,
    ) -> list[Any] | None:
        """Look at all that a step depends on, and return what each batch has gathered.

        It returns None if the plan must be built again. Nothing changes here.
        """
        groups = reading.groups
        if scaled != self.scaled or self.sizes != [len(group["params"]) for group in groups]:
            return None
        if self.inference != torch.is_inference_mode_enabled():
            return None
        if not reading.has_state_of(self.size):
            return None
        if not self.options.are_as_before(groups, flags):
            return None
        if steps_slices is not None and not self._steps_slices_as_before(groups, steps_slices):
            return None
        if any(reading.grads[i] is not None for i in self.dormant):
            return None
        gathered = []
        for batch in self.batches:
            found = batch.gather(reading)
            if found is None:
                return None
            gathered.append(found)
        return gathered if self._is_shared_as_before() else None

    def _steps_slices_as_before(
        self, groups: Sequence[Group], steps_slices: Callable[[Group], bool]
    ) -> bool:
        """Whether the class says of its groups what it said when the plan was built."""
        try:
            return all(
                bool(steps_slices(groups[index])) == answer
                for index, answer in self.slice_answers.items()
            )
        except StepError:
            # A new plan raises it, if there still is a sparse gradient.
            return False

    def _is_shared_as_before(self) -> bool:
        """Whether the same parameters share memory with one another as when the plan was built."""
        starts = [batch.starts() for batch in self.batches]
        compared = [addresses.tobytes() for addresses in starts]
        if compared == self._compared_starts or not starts:
            return True
        sizes, positions = zip(*(batch.stretches() for batch in self.batches), strict=True)
        found = find_clusters(*map(np.concatenate, (starts, sizes, positions)))
        if found == self.clusters or self._is_differentiable:
            self._compared_starts = compared
            return True
        return False

    @property
    def others(self) -> list[Batch]:
        """The batches that are not launches over whole tensors."""
        return [*self.eager, *self.slices]

    @property
    def waits(self) -> bool:
        """Whether some of the parameters need numbers that the host computes with."""
        return bool(self.eager or self.slices) or not all(
            isinstance(batch, DeviceBatch) for batch in self.kernels
        )

    @property
    def refused_rate(self) -> tuple[int, float] | None:
        """A group with a learning rate that the constructor would refuse, and the rate, if any."""
        for batch in self.batches:
            if batch.refused_rate is not None:
                return batch.refused_rate
        return None

    @property
    def captured(self) -> list[Tensor]:
        """What graphs that hold a step of this plan will read, when the plan is gone."""
        return [t for batch in self.residents for t in batch.captured]

    @property
    def residents(self) -> list[DeviceBatch]:
        """The batches whose parameters' numbers lie on their device."""
        return [batch for batch in self.kernels if isinstance(batch, DeviceBatch)]

    def run(
        self, reading: Reading, gathered: Sequence[Any], gradient_factor: GradientFactor
    ) -> None:
        """Step with what `ready` returned."""
        step = Step(reading, self.fresh, gradient_factor)
        batches = list(zip(self.batches, gathered, strict=True))
        try:
            if self.waits and gradient_factor.read():
                self.undo()
                return
            self._begin(batches, step)
            if self.others:
                _check_again(self.owner, batches, reading)
                refusing = [batch.store_refusing(self._ledger) for batch in self.batches]
                if any(refusing):
                    _check_again(self.owner, batches, reading)
        except BaseException:
            for batch in self.batches:
                batch.cancel()
            self.undo()
            raise
        self._ledger.close()
        for batch, found in batches:
            batch.finish(found, step)

    def _begin(self, batches: Sequence[tuple[Batch, Any]], step: Step) -> None:
        """Do what may fail, which changes nothing.

        That is functions of matrices, a device's memory, compiling for it, torch's operations. The
        batch that takes the most memory is first, while there are no results of others.
        """
        if self.eager:
            apart = (batch.tensors_apart(step.reading) for batch in self.eager)
            step.scratch = Scratch(chain.from_iterable(apart))
        later: list[Delayed] = []
        for batch, found in sorted(batches, key=_demand, reverse=True):
            later += batch.begin(found, step)
        for _, compute in sorted(later, key=itemgetter(0)):
            compute()


def _check_again(owner: str, batches: Sequence[tuple[Batch, Any]], reading: Reading) -> None:
    """Raise `StepError` if memory is not what it was: torch's operations have run since.

    These may be operations of a user's class, which may do anything.
    """
    if not all(batch.is_as_read(found, reading) for batch, found in batches):
        raise StepError(
            f"{owner}: parameters or state changed while others stepped; keep their memory as it is"
        )


def _demand(pair: tuple[Batch, Any]) -> int:
    """Return how much memory a batch takes before it stores anything, in elements."""
    return pair[0].demand


def _nothing() -> None:
    """What a plan is in a copy."""
