"""Columns to plan: which parameters step together, what is checked each step, when the plan is
built again.

**Built again** when a parameter list, an option that is no number, the set of parameters that have
ever had a gradient, a state dict, any fact of a parameter or state tensor, or which of them share
memory differs from what the plan was built for. Building checks everything first and creates
missing state last, so that an error leaves all as it was.

**A step** descends three times. `ready` looks at everything: parameter lists, options, gradients,
states and all tensors' facts. `run` then begins whatever may fail: functions of matrices, torch's
operations, memory. Only when all has begun does anything change, and nothing of that may fail. So
an error changes nothing, at the price of three walks over the batches. No address outlives a step,
and a plan keeps no parameter, gradient or state alive. Threads take turns (`Private.turn`): a
plan's tables are in use by one step at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import kernel
from ..contract.values import Group, StepError
from .batch import Gathered, KernelBatch, check, dense_columns
from .checks import Member, sparse_kind
from .columns import compile_for, find_clusters, format_name
from .device_batch import DeviceBatch
from .eager_batch import EagerBatch
from .gradient_factor import GradientFactor
from .group_recipes import GroupRecipes
from .ledger import Ledger
from .numbers import Numbers
from .reading import Reading
from .recipe import Algorithm, Mode, fill_state
from .scratch import Scratch
from .sharing import SHARING, find_shared, out_of_order
from .sparse import EagerRows, RowsBatch

# Functions of whole matrices take so many elements at a time (or one parameter), to bound what they
# need of memory.
MOST_ELEMENTS = 1 << 24


class Plan:
    """One optimizer's parameters, in batches, ready to step."""

    def __init__(
        self, algorithm: Algorithm, reading: Reading, scaled: bool, former: Plan | None = None
    ) -> None:
        """Check everything, then create the state that is missing. Raises `StepError`, and nothing
        has changed.

        A `former` plan may know of parameters whose first step was skipped.
        """
        groups = reading.groups
        self.owner, self.scaled, self.inference = (
            algorithm.name,
            scaled,
            torch.is_inference_mode_enabled(),
        )
        self.sizes = [len(group["params"]) for group in groups]
        found = GroupRecipes(algorithm, groups, scaled)
        self._options, self.recipes, self.modes = found, found.recipes, found.modes
        self.kind_of, self.graph_of = found.kind_of, found.graph_of
        self.dormant: list[int] = []
        # What `steps_rows` said of the groups that have met sparse gradients.
        self.slice_answers: dict[int, bool] = {}
        self.members = self._find_members(algorithm, reading)
        # Positions of the parameters whose state is made now, and what to take back if a step does
        # not come of it.
        self.fresh: set[int] = set()
        self._ledger = Ledger()
        try:
            why = [self._complete_state(algorithm, member, reading) for member in self.members]
            reading.read_state()
            self._make_batches(
                algorithm, reading, dict(zip((m.position for m in self.members), why, strict=True))
            )
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
        """Take back the state that building this plan has made, where no step came of it."""
        self._ledger.undo()

    def _find_members(self, algorithm: Algorithm, reading: Reading) -> list[Member]:
        """The parameters that step now, checked, and those that have stepped and still could;
        others are dormant."""
        members: list[Member] = []
        owner, position = algorithm.name, 0
        for g, group in enumerate(reading.groups):
            names, steps_rows = group.get("param_names"), partial(algorithm.steps_rows, group)
            for i in range(self.sizes[g]):
                label = repr(names[i]) if names and i < len(names) else str(position)
                grad = reading.grads[position]
                sparse = sparse_kind(owner, label, grad, algorithm.gradients, steps_rows)
                if sparse:
                    self.slice_answers[g] = sparse == "rows"
                member = Member(position, g, self.kind_of[position], label, sparse)
                if self._is_awake(owner, member, reading):
                    members.append(member)
                else:
                    self.dormant.append(position)
                position += 1
        return members

    def _is_awake(self, owner: str, member: Member, reading: Reading) -> bool:
        """Whether a parameter belongs into the plan. One without a gradient may be in any
        condition: frozen, freed."""
        p, grad = reading.params[member.position], reading.grads[member.position]
        recipe = self.recipes[member.kind]
        # What no rule reads may be anything, whether a plan is built in this step or not.
        state = reading.state_of(p) if recipe.entries else {}
        if grad is None and (
            not isinstance(state, dict) or any(state.get(n) is None for n in recipe.entries)
        ):
            return False
        if not isinstance(state, dict):
            raise StepError(
                f"{owner}: the state of parameter {member.label} must be a dict, got a "
                f"{type(state).__name__}"
            )
        if grad is not None and p.is_meta and self.modes[member.kind].fused:
            raise StepError(
                f"{owner}: `fused=True` requires all the params to be floating point Tensors of a "
                f"device with memory, and parameter {member.label} is on meta; move it by "
                "to_empty(device=...)"
            )
        try:
            check(owner, member, p, grad, state, recipe)
        except StepError:
            if grad is not None:
                raise
            return False
        return grad is not None or bool(recipe.entries)

    def _complete_state(self, algorithm: Algorithm, member: Member, reading: Reading) -> str | None:
        """Create missing entries, and say why no kernel can serve the parameter, if so.

        For a kernel, dense entries come to lie as their parameter does; for torch, expanded ones
        cannot be written.
        """
        recipe, p = self.recipes[member.kind], reading.params[member.position]
        if not recipe.entries:
            return self._why_eager(member, reading)
        if p not in reading.state:
            self._ledger.set(reading.state, p, {})
        state = reading.state[p]
        if all(state.get(name) is None for name in recipe.graph.state):
            self.fresh.add(member.position)
        fill_state(
            algorithm,
            recipe,
            p,
            reading.groups[member.group],
            partial(self._ledger.set, state),
            state,
        )
        why = self._why_eager(member, reading)
        for name in recipe.graph.state:
            entry = state[name]
            if why is not None:
                lies_well = not kernel.is_plain(entry) or not kernel.is_expanded(entry)
            elif entry.shape == p.shape and recipe.fits(p):
                lies_well = entry.stride() == p.stride()
            else:
                lies_well = entry.is_contiguous()
            if not lies_well:
                like, form = entry, torch.contiguous_format
                if entry.shape == p.shape and why is None:
                    like, form = recipe.as_dense(p), torch.preserve_format
                dense = torch.empty_like(like, dtype=entry.dtype, memory_format=form)
                self._ledger.set(state, name, dense.copy_(entry))
        return why

    def _why_eager(self, member: Member, reading: Reading) -> str | None:
        """Why no kernel can serve this parameter; an empty string where that is no news to the
        user."""
        mode, p = self.modes[member.kind], reading.params[member.position]
        grad, state = reading.grads[member.position], reading.state_of(p)
        columns = [p, *(state[name] for name in self.recipes[member.kind].graph.state)]
        if mode.eager or mode.differentiable or p.device.type == "meta":
            return ""
        if kernel.why_no_kernels(p.device):
            return kernel.why_no_kernels(p.device)
        if member.sparse == "rows" and not kernel.on_host(p.device):
            return f"there are no kernels for sparse gradients on {p.device.type} devices"
        for t in (*columns, *(() if grad is None else (grad,))):
            if not kernel.is_plain(t):
                return f"there are no kernels for tensors of class {type(t).__name__}"
            if format_name(t.dtype) not in kernel.FORMATS:
                return f"there are no kernels for {t.dtype}"
        if any(t.is_conj() or t.is_neg() for t in columns):
            return "a parameter or its state is a lazily conjugated or negated view"
        return None

    def _make_batches(
        self, algorithm: Algorithm, reading: Reading, why: dict[int, str | None]
    ) -> None:
        """Group members by program and dtypes: each kernel batch is one launch.

        `why` says of members by position why no kernel can serve them.
        """
        known: dict[object, object] = {}
        kinds: dict[int, object] = {}
        for member in self.members:
            if why[member.position] is None:
                kind = self._kind(member, reading)
                kinds[member.position] = known.setdefault(kind, kind)
        differentiable = any(mode.differentiable for mode in self.modes)
        self.clusters = () if differentiable else find_shared(self.members, self.recipes, reading)
        for position in out_of_order(self.clusters, self.members, kinds, self.recipes, reading):
            why[position] = SHARING if why[position] is None else why[position]
        for reason in dict.fromkeys(filter(None, why.values())):
            algorithm.warn_once(f"{algorithm.name} steps on the slower eager backend: {reason}")
        dense: dict[object, list[Member]] = {}
        by_rows: dict[object, list[Member]] = {}
        eager: dict[tuple[int, Mode, bool], list[Member]] = {}
        for member in self.members:
            rows = member.sparse == "rows"
            if why[member.position] is None:
                (by_rows if rows else dense).setdefault(kinds[member.position], []).append(member)
            else:
                eager.setdefault(
                    (self.graph_of[member.kind], self.modes[member.kind], rows), []
                ).append(member)
        numbers = Numbers(self._ledger)
        self._make_kernels(list(dense.values()), reading, numbers)
        self._make_eager(list(eager.items()), reading, numbers)
        self.rows = [
            RowsBatch(members, reading, self.recipes[members[0].kind], algorithm.name)
            for members in by_rows.values()
        ]
        shared = {position for cluster in self.clusters for position in cluster}
        for batch in self.kernels:
            batch.shares_memory = not shared.isdisjoint(batch.positions.tolist())
        self._placed: list[bytes] | None = None

    def _kind(self, member: Member, reading: Reading) -> object:
        """What members have in common that one launch serves."""
        p, grad = reading.params[member.position], reading.grads[member.position]
        state = reading.state_of(p)
        columns = (
            p,
            p if grad is None else grad,
            *(state[name] for name in self.recipes[member.kind].graph.state),
        )
        dtypes = tuple(t.dtype for t in columns)
        return (
            self.graph_of[member.kind],
            dtypes,
            p.device,
            self._is_resident(member, p),
            member.sparse == "rows",
        )

    def _make_eager(
        self,
        lists: Sequence[tuple[tuple[int, Mode, bool], list[Member]]],
        reading: Reading,
        numbers: Numbers,
    ) -> None:
        """The batches of members that no kernel serves."""
        self.eager: list[EagerBatch] = []
        shared = {position for cluster in self.clusters for position in cluster}
        for (_, mode, rows), members in lists:
            recipe = self.recipes[members[0].kind]
            for member in members:
                numbers.part(reading.state_of(reading.params[member.position]), recipe)
            capturable = mode.capturable or self._is_resident(
                members[0], reading.params[members[0].position]
            )
            kind = EagerRows if rows else EagerBatch
            batch = kind(members, reading, recipe, self.owner, mode.differentiable, capturable)
            batch.find_entries(reading.places(), reading)
            batch.apart = shared.intersection(batch.positions.tolist())
            self.eager.append(batch)

    def _make_kernels(self, kinds: list[list[Member]], reading: Reading, numbers: Numbers) -> None:
        """The batches of members that kernels serve, those of each kind together."""
        places = reading.places()
        self.kernels: list[KernelBatch] = []
        for members in (
            batch for together in kinds for batch in self._batches(together, reading.params)
        ):
            recipe, first = self.recipes[members[0].kind], reading.params[members[0].position]
            resident = self._is_resident(members[0], first)
            device = first.device if resident else kernel.HOST
            for member in members:
                numbers.place(reading.state_of(reading.params[member.position]), recipe, device)
            batch = self._compile(members, reading, DeviceBatch if resident else KernelBatch)
            batch.find_entries(places, reading)
            self.kernels.append(batch)

    def _compile(
        self, members: list[Member], reading: Reading, kind: type[KernelBatch]
    ) -> KernelBatch:
        """Compile for the memory of these members, and lay out their batch."""
        recipe = self.recipes[members[0].kind]
        resident = kind.resident(recipe)
        number = None
        if resident:
            number = reading.state_of(reading.params[members[0].position])[resident[0]]
        columns = dense_columns(members, reading, recipe)
        compiled = compile_for(recipe.graph, recipe.columns, columns, resident, number)
        return kind(compiled, columns, members, reading, recipe, self.owner)

    def _is_resident(self, member: Member, p: Tensor) -> bool:
        """Whether a parameter's numbers lie on its device, where the kernel keeps them."""
        mode, recipe = self.modes[member.kind], self.recipes[member.kind]
        return not kernel.on_host(p.device) and recipe.is_resident(p, mode._asdict())

    def _batches(self, together: list[Member], params: list[Tensor]) -> list[list[Member]]:
        """What of these is one launch: all, but for functions of whole matrices, which take memory
        of their size."""
        if not self.recipes[together[0].kind].graph.has_calls:
            return [together]
        batches: list[list[Member]] = []
        taken, shape = 0, None
        for member in sorted(together, key=lambda m: tuple(params[m.position].shape)):
            p = params[member.position]
            if p.shape != shape or taken + p.numel() > MOST_ELEMENTS:
                batches.append([])
                taken, shape = 0, p.shape
            batches[-1].append(member)
            taken += p.numel()
        return batches

    def ready(
        self,
        reading: Reading,
        scaled: bool,
        flags: Sequence[Mapping[str, bool]],
        steps_slices: Callable[[Group], bool] | None,
    ) -> tuple[list[Gathered], list[Any]] | None:
        """Look at all that a step depends on; None where the plan must be built again. Nothing
        changes."""
        groups = reading.groups
        if scaled != self.scaled or self.sizes != [len(group["params"]) for group in groups]:
            return None
        if self.inference != torch.is_inference_mode_enabled() or not reading.has_state_of(
            self.size
        ):
            return None
        if not self._options.are_as_before(groups, flags):
            return None
        if steps_slices is not None and not self._steps_slices_as_before(groups, steps_slices):
            return None
        if any(reading.grads[i] is not None for i in self.dormant):
            return None
        gathered: list[list[Any]] = []
        for batches in (self.kernels, self.others):
            gathered.append([batch.gather(reading) for batch in batches])
            if any(found is None for found in gathered[-1]):
                return None
        return (gathered[0], gathered[1]) if self._is_shared_as_before() else None

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
        batches = (*self.kernels, *self.others)
        starts = [batch.starts() for batch in batches]
        placed = [each.tobytes() for each in starts]
        if placed == self._placed or not batches:
            return True
        sizes, positions = zip(*(batch.stretches() for batch in batches), strict=True)
        found = find_clusters(*map(np.concatenate, (starts, sizes, positions)))
        if found == self.clusters or any(mode.differentiable for mode in self.modes):
            self._placed = placed
            return True
        return False

    @property
    def others(self) -> list[EagerBatch | RowsBatch]:
        """The batches that are not launches over whole tensors."""
        return [*self.eager, *self.rows]

    @property
    def waits(self) -> bool:
        """Whether some of the parameters need numbers that the host computes with."""
        return bool(self.eager or self.rows) or not all(
            isinstance(batch, DeviceBatch) for batch in self.kernels
        )

    @property
    def refused_rate(self) -> tuple[int, float] | None:
        """A group with a learning rate that the constructor would refuse, and the rate, if there
        has been one."""
        return next(
            (b.refused_rate for b in (*self.kernels, *self.eager) if b.refused_rate is not None),
            None,
        )

    @property
    def captured(self) -> list[Tensor]:
        """What graphs that hold a step of this plan will read, when there is another plan or
        none."""
        return [t for batch in self.residents for t in batch.captured]

    @property
    def residents(self) -> list[DeviceBatch]:
        """The batches whose parameters' numbers lie on their device."""
        return [batch for batch in self.kernels if isinstance(batch, DeviceBatch)]

    def run(
        self,
        reading: Reading,
        gathered: tuple[list[Gathered], list[Any]],
        gradient_factor: GradientFactor,
    ) -> None:
        """Step with what `ready` returned."""
        of_kernels, of_others = gathered
        try:
            if self.waits and gradient_factor.read():
                self.undo()
                return
            self._begin(reading, of_others, gradient_factor)
            if of_others:
                self._check_again(reading, of_kernels, of_others)
                refusing = [batch.store_refusing(self._ledger) for batch in self.eager]
                if any(refusing):
                    self._check_again(reading, of_kernels, of_others)
        except BaseException:
            for batch in (*self.kernels, *self.others):
                batch.cancel()
            self.undo()
            raise
        self._ledger.close()
        for batch, tensors in zip(self.kernels, of_kernels, strict=True):
            batch.finish(tensors, reading)
        for batch in self.eager:
            batch.finish(self.fresh)
        for batch in self.rows:
            batch.finish()
        if self.fresh:
            for batch in self.kernels:
                active = zip(batch.positions.tolist(), batch.active, strict=True)
                self.fresh.difference_update(position for position, on in active if on)

    def _begin(
        self, reading: Reading, of_others: list[Any], gradient_factor: GradientFactor
    ) -> None:
        """Do what may fail, which changes nothing: functions of matrices, those that take the most
        memory first, while there are no others' results; a device's memory; compiling for it;
        torch's operations."""
        for batch in sorted(self.kernels, key=_demand, reverse=True):
            batch.begin(self.fresh, gradient_factor)
        if not of_others:
            return
        scratch = Scratch(chain.from_iterable(batch.tensors_apart(reading) for batch in self.eager))
        later = [
            delayed
            for batch, stepping in zip(self.eager, of_others, strict=False)
            for delayed in batch.begin(stepping, self.fresh, gradient_factor, scratch)
        ]
        for _, compute in sorted(later, key=itemgetter(0)):
            compute()
        for batch, stepping in zip(self.rows, of_others[len(self.eager) :], strict=True):
            batch.begin(stepping, self.fresh, gradient_factor)

    def _check_again(
        self, reading: Reading, of_kernels: list[Gathered], of_others: list[Any]
    ) -> None:
        """Where torch's operations have run, which may be those of anybody's class: memory must be
        what it was."""
        of_rows = of_others[len(self.eager) :]
        pairs = [*zip(self.kernels, of_kernels, strict=True), *zip(self.rows, of_rows, strict=True)]
        if not all(batch.is_as_read(tensors, reading) for batch, tensors in pairs):
            raise StepError(
                f"{self.owner}: parameters or state changed while others stepped; keep their "
                "memory as it is"
            )


def _nothing() -> None:
    """What a plan is in a copy."""


def _demand(batch: KernelBatch) -> int:
    """How much memory a batch takes before it stores anything, in elements."""
    return int(batch.work.numel.sum()) if batch.recipe.graph.has_calls else 0
