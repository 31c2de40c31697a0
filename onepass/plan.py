"""Columns to plan: which parameters step together, what is checked each step, when the plan is built again.

**Built again** when a parameter list, an option that is no number, the set of parameters that have ever had a
gradient, a state dict, or any fact of a parameter or state tensor differs from what the plan was built for. Building
checks everything first and creates missing state last, so that an error leaves all as it was.

**Each step** `ready` reads parameter lists, options, gradients, states and all tensors' facts anew (see `KernelBatch`);
only if every batch is ready does anything change: step counts, then the launches. No address outlives a step, and a
plan keeps no parameter, gradient or state alive.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import kernel
from .batch import EagerBatch, Gathered, KernelBatch, check
from .checks import Group, Member, State, StepError, sparse_kind
from .columns import format_name
from .device_batch import DeviceBatch
from .ledger import Ledger
from .recipes import Algorithm, Mode, Recipe, describe, fill_state, make_recipe, new_counter, switches
from .rows import EagerRows, RowsBatch
from .unscale import Unscale

# Functions of whole matrices take so many elements at a time (or one parameter), to bound what they need of memory.
MOST_ELEMENTS = 1 << 24


def _kind(value: object) -> int:
    return len(value) if type(value) in (tuple, list) else -1 if value is None else -2  # type: ignore[arg-type]


class Plan:
    """One optimizer's parameters, in batches, ready to step."""

    def __init__(
        self,
        algorithm: Algorithm,
        groups: list[Group],
        state: dict[Any, State],
        scaled: bool,
        former: Plan | None = None,
    ) -> None:
        """Check everything, then create the state that is missing. Raises `StepError`, and nothing has changed.

        A `former` plan may know of parameters whose first step was skipped.
        """
        self.scaled = scaled
        self.sizes = [len(group["params"]) for group in groups]
        self._find_recipes(algorithm, groups)
        params = list(chain.from_iterable(group["params"] for group in groups))
        self.dormant: list[int] = []
        self.members = self._find_members(algorithm, groups, state)
        # Positions of the parameters whose state is made now, and what to take back if a step does not come of it.
        self.fresh: set[int] = set()
        self._ledger = Ledger()
        plain = [p for p in params if type(p) in kernel.PLAIN and p.layout == torch.strided]
        storages = Counter(p.untyped_storage().data_ptr() for p in plain)
        self.shared = {address for address, count in storages.items() if count > 1}
        try:
            for member in self.members:
                self._complete_state(algorithm, member, params[member.position], groups[member.group], state)
            self._make_batches(algorithm, params, state)
        except BaseException:
            self.undo()
            raise
        self.size = len(state)
        for batch in self.residents:
            for other in () if former is None else former.residents:
                batch.take_over(other)

    def undo(self) -> None:
        """Take back the state that building this plan has made, where no step came of it."""
        self._ledger.undo()

    def _find_recipes(self, algorithm: Algorithm, groups: list[Group]) -> None:
        """How each parameter steps: one recipe for each group and each rule in it, numbered by `kind_of`."""
        self.recipes: list[Recipe] = []
        self.modes: list[Mode] = []
        self.kind_of: list[int] = []
        self.switches: list[tuple[list[str], list[str]]] = []
        flags = [algorithm.flags(group) for group in groups]
        for group, own in zip(groups, flags, strict=True):
            mode = Mode.of(group)
            known: dict[kernel.Rule, int] = {}
            keywords: dict[str, kernel.Argument] = {}
            for p in group["params"]:
                rule = algorithm.rule_of(p, group)
                if rule not in known:
                    arguments = describe(algorithm.name, rule, group, own)
                    keywords |= dict(arguments)
                    how = {"maximize": mode.maximize, "scaled": self.scaled, "exact": not mode.differentiable}
                    known[rule] = len(self.recipes)
                    self.recipes.append(make_recipe(algorithm.name, rule, arguments, **how))
                    self.recipes[-1].look_at(group)
                    self.modes.append(mode)
                self.kind_of.append(known[rule])
            self.switches.append(switches(keywords.items()))
        self.switched = self._switched(groups, flags)

    def _find_members(self, algorithm: Algorithm, groups: list[Group], state: Mapping[Any, State]) -> list[Member]:
        """The parameters that step now, checked, and those that have stepped and still could; others are dormant."""
        members: list[Member] = []
        owner, position = algorithm.name, 0
        for g, group in enumerate(groups):
            names = group.get("param_names")
            for i, p in enumerate(group["params"]):
                label = repr(names[i]) if names and i < len(names) else str(position)
                sparse = sparse_kind(owner, label, p.grad, algorithm.gradients, partial(algorithm.steps_rows, group))
                member = Member(position, g, self.kind_of[position], label, sparse)
                position += 1
                if self._is_awake(owner, member, p, state.get(p, {})):
                    members.append(member)
                else:
                    self.dormant.append(member.position)
        return members

    def _is_awake(self, owner: str, member: Member, p: Tensor, known: Any) -> bool:
        """Whether a parameter belongs into the plan. One without a gradient may be in any condition: frozen, freed."""
        recipe = self.recipes[member.kind]
        if p.grad is None and (not isinstance(known, dict) or any(known.get(n) is None for n in recipe.entries)):
            return False
        if not isinstance(known, dict):
            raise StepError(
                f"{owner}: the state of parameter {member.label} must be a dict, got a {type(known).__name__}"
            )
        try:
            check(owner, member, p, known, recipe)
        except StepError:
            if p.grad is not None:
                raise
            return False
        return p.grad is not None or bool(recipe.entries)

    def _complete_state(
        self, algorithm: Algorithm, member: Member, p: Tensor, group: Group, state: dict[Any, State]
    ) -> None:
        """Create missing entries; lay dense ones that lie otherwise than their parameter as it lies."""
        recipe = self.recipes[member.kind]
        if not recipe.entries:
            return
        if p not in state:
            self._ledger.set(state, p, {})
        own = state[p]
        if all(own.get(name) is None for name in recipe.graph.state):
            self.fresh.add(member.position)
        fill_state(algorithm, recipe, p, group, partial(self._ledger.set, own), own)
        if self._why_eager(member, p, own) is None:
            for name in recipe.graph.state:
                like = recipe.as_dense(p) if own[name].shape == p.shape else own[name].contiguous()
                if own[name].stride() != like.stride():
                    self._ledger.set(own, name, torch.empty_like(like, dtype=own[name].dtype).copy_(own[name]))

    def _why_eager(self, member: Member, p: Tensor, own: Mapping[str, Any]) -> str | None:
        """Why no kernel can serve this parameter; an empty string where that is no news to the user."""
        mode = self.modes[member.kind]
        columns = [p, *(own[name] for name in self.recipes[member.kind].graph.state)]
        if mode.eager or mode.differentiable or p.device.type == "meta":
            return ""
        if kernel.why_no_kernels(p.device):
            return kernel.why_no_kernels(p.device)
        if member.sparse == "rows" and not kernel.on_host(p.device):
            return f"there are no kernels for sparse gradients on {p.device.type} devices"
        for t in (*columns, *(() if p.grad is None else (p.grad,))):
            if type(t) not in kernel.PLAIN:
                return f"there are no kernels for tensors of class {type(t).__name__}"
            if format_name(t.dtype) not in kernel.FORMATS:
                return f"there are no kernels for {t.dtype}"
        if not kernel.is_dense(p) and p.untyped_storage().data_ptr() in self.shared:
            return "a parameter with holes shares its memory with another"
        numbers = [own[name] for name in self.recipes[member.kind].numbers if isinstance(own.get(name), Tensor)]
        if any(number.is_cpu and number.is_shared() for number in numbers):
            return "a step count is in shared memory"
        if any(t.is_conj() or t.is_neg() for t in columns):
            return "a parameter or its state is a lazily conjugated or negated view"
        return None

    def _make_batches(self, algorithm: Algorithm, params: list[Tensor], state: dict[Any, State]) -> None:
        """Group members by program and dtypes: each kernel batch is one launch."""
        kernels: dict[object, list[Member]] = {}
        by_rows: dict[object, list[Member]] = {}
        eager: dict[tuple[kernel.Graph, Mode, bool], list[Member]] = {}
        for member in self.members:
            p, graph = params[member.position], self.recipes[member.kind].graph
            own = state.get(p, {})
            why = self._why_eager(member, p, own)
            if why is None:
                dtypes = (p.dtype, (p if p.grad is None else p.grad).dtype, *(own[name].dtype for name in graph.state))
                kind = (graph, dtypes, p.device, self._is_resident(member, p))
                (by_rows if member.sparse == "rows" else kernels).setdefault(kind, []).append(member)
            else:
                eager.setdefault((graph, self.modes[member.kind], member.sparse == "rows"), []).append(member)
                if why:
                    algorithm.warn_once(f"{algorithm.name} steps on the slower eager backend: {why}")
        self._make_kernels(algorithm, list(kernels.values()), params, state)
        self.eager = [
            (EagerRows if rows else EagerBatch)(
                of,
                self.recipes[of[0].kind],
                algorithm.name,
                mode.differentiable,
                mode.capturable or self._is_resident(of[0], params[of[0].position]),
            )
            for (_, mode, rows), of in eager.items()
        ]
        self.rows = [RowsBatch(of, params, state, self.recipes[of[0].kind], algorithm.name) for of in by_rows.values()]

    def _make_kernels(
        self, algorithm: Algorithm, kinds: list[list[Member]], params: list[Tensor], state: dict[Any, State]
    ) -> None:
        """The batches of members that kernels serve, those of each kind together."""
        lists = [of for together in kinds for of in self._batches(together, params)]
        own_of = {member: state.get(params[member.position], {}) for of in lists for member in of}
        resident = [self._is_resident(of[0], params[of[0].position]) for of in lists]
        self._shared_numbers: set[int] = set()
        self._share_numbers({m: own_of[m] for of, on in zip(lists, resident, strict=True) if not on for m in of})
        place = {id(p): i for i, p in enumerate(state)}
        self.kernels: list[KernelBatch] = []
        self.slots: list[dict[str, slice]] = []
        counted = dict.fromkeys(self.vectors, 0)
        for of, on in zip(lists, resident, strict=True):
            recipe = self.recipes[of[0].kind]
            own = [own_of[m] for m in of]
            if on:
                self._place_numbers(of, params, own_of)
            kind = DeviceBatch if on else KernelBatch
            batch = kind(of, [params[m.position] for m in of], own, recipe, algorithm.name)
            batch.find_entries(place, params)
            self.kernels.append(batch)
            # Batches follow one another in the vectors.
            self.slots.append({n: slice(counted[n], counted[n] + len(of)) for n in recipe.numbers if not on})
            counted |= {n: slots.stop for n, slots in self.slots[-1].items()}

    def _is_resident(self, member: Member, p: Tensor) -> bool:
        """Whether a parameter's numbers lie on its device, where the kernel keeps them."""
        mode, recipe = self.modes[member.kind], self.recipes[member.kind]
        return not kernel.on_host(p.device) and recipe.is_resident(p, mode._asdict())

    def _place_numbers(self, members: list[Member], params: list[Tensor], own_of: Mapping[Member, State]) -> None:
        """Let each parameter's numbers lie on its device, each in a tensor of its own."""
        for member in members:
            own, device = own_of[member], params[member.position].device
            for name in self.recipes[member.kind].numbers:
                entry, now = new_counter(device), own[name]
                fits = type(now) is Tensor and now.shape == () and (now.dtype, now.device) == (entry.dtype, device)
                if fits and not now.is_inference() and id(now) not in self._shared_numbers:
                    self._shared_numbers.add(id(now))
                    continue
                # Without reading a number that is there already.
                entry.copy_(now, non_blocking=True) if isinstance(now, Tensor) else entry.fill_(now)
                self._ledger.set(own, name, entry)

    def _batches(self, together: list[Member], params: list[Tensor]) -> list[list[Member]]:
        """What of these is one launch: all, but for functions of whole matrices, which take memory of their size."""
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

    def _share_numbers(self, own_of: Mapping[Member, State]) -> None:
        """Let the kernels' parameters keep their numbers in one vector for each name, of which each entry is a view.

        All steps then advance in one addition.
        """
        having: dict[str, list[Member]] = {}
        for member in own_of:
            for name in self.recipes[member.kind].numbers:
                having.setdefault(name, []).append(member)
        # The array shares the vector's memory, and keeps torch from resizing it.
        self.vectors: dict[str, tuple[Tensor, np.ndarray]] = {}
        for name, members in having.items():
            vector = new_counter().new_tensor([float(own_of[member][name]) for member in members])
            for member, entry in zip(members, vector.unbind(), strict=True):
                self._share_number(own_of[member], name, entry)
            self.vectors[name] = vector, vector.numpy()

    def _share_number(self, own: State, name: str, entry: Tensor) -> None:
        """Let a parameter's number lie in the vector: the same tensor as before, where others may hold it."""
        now = own[name]
        fits = type(now) is Tensor and now.dtype == entry.dtype and now.shape == () and now.device == entry.device
        # A tensor that several parameters have as theirs must not become one number for all.
        if fits and not now.is_inference() and id(now) not in self._shared_numbers:
            self._shared_numbers.add(id(now))
            self._ledger.give(now, entry)
        else:
            self._ledger.set(own, name, entry)

    def _switched(self, groups: Sequence[Group], flags: Sequence[Mapping[str, bool]]) -> list[object]:
        """The values of all options that select a program or a backend; of numbers only whether they still are such."""
        return [
            [*map(group.get, keys), own, [_kind(group.get(name)) for name in numbers]]
            for group, (keys, numbers), own in zip(groups, self.switches, flags, strict=True)
        ]

    def ready(
        self, groups: list[Group], state: dict[Any, State], scaled: bool, flags: Sequence[Mapping[str, bool]]
    ) -> list[Gathered] | None:
        """Read all that a step depends on; None where the plan must be built again. Nothing of the user's changes."""
        if scaled != self.scaled or self.sizes != [len(group["params"]) for group in groups]:
            return None
        if self.switched != self._switched(groups, flags) or len(state) != self.size:
            return None
        params = list(chain.from_iterable(group["params"] for group in groups))
        if any(params[i].grad is not None for i in self.dormant):
            return None
        keys, entries = list(state), list(state.values())
        gathered: list[Gathered] = [params]
        gathered += (batch.gather(params, groups, keys, entries) for batch in self.kernels)  # type: ignore[arg-type]
        gathered += (batch.gather(params, groups, state) for batch in (*self.eager, *self.rows))  # type: ignore[arg-type]
        return None if any(one is None for one in gathered) else gathered

    @property
    def waits(self) -> bool:
        """Whether some of the parameters need numbers that the host computes with."""
        return bool(self.eager or self.rows) or not all(isinstance(batch, DeviceBatch) for batch in self.kernels)

    @property
    def captured(self) -> list[Tensor]:
        """What graphs that hold a step of this plan will read, when there is another plan or none."""
        return [t for batch in self.residents for t in batch.captured]

    @property
    def residents(self) -> list[DeviceBatch]:
        """The batches whose parameters' numbers lie on their device."""
        return [batch for batch in self.kernels if isinstance(batch, DeviceBatch)]

    def run(self, gathered: list[Gathered], unscale: Unscale) -> None:
        """Step with what `ready` returned."""
        params, *of_batches = gathered
        of_kernels, of_others = of_batches[: len(self.kernels)], of_batches[len(self.kernels) :]
        try:
            if self.waits and unscale.read():
                self.undo()
                return
            # What may fail comes before anything changes: functions of matrices, those that take the most memory first,
            # while there are no others' results; a device's memory; compiling for it.
            for i in sorted(range(len(self.kernels)), key=self._demand, reverse=True):
                self._begin(i, unscale)
            self._ledger.close()
            # torch's operations may still refuse something; the kernels may not, and so come last.
            for batch, stepping in zip((*self.eager, *self.rows), of_others, strict=True):
                batch.run(stepping, self.fresh, unscale)
            self._check_again(of_kernels, of_others)
        except BaseException:
            for batch in self.kernels:
                batch.cancel()
            self.undo()
            raise
        for batch, slots in zip(self.kernels, self.slots, strict=True):
            if "step" in slots:
                self.vectors["step"][1][slots["step"]] += batch.active
        torch.autograd.graph.increment_version([vector for vector, _ in self.vectors.values()])
        for batch, slots, tensors in zip(self.kernels, self.slots, of_kernels, strict=True):
            for name, new in batch.finish(tensors, params).items():
                kept = self.vectors[name][1][slots[name]]
                kept[:] = np.where(batch.active, new, kept)
            if self.fresh:
                active = zip(batch.members, batch.active, strict=True)
                self.fresh.difference_update(m.position for m, on in active if on)

    def _demand(self, i: int) -> int:
        """How much memory a batch takes before it stores anything, in elements."""
        batch = self.kernels[i]
        return int(batch.work.numel.sum()) if batch.recipe.graph.has_calls else 0

    def _check_again(self, of_kernels: Sequence[Gathered], of_others: Sequence[Gathered]) -> None:
        """Where torch's operations have run, which may be those of anybody's class: memory must be what it was."""
        if any(of_others):
            for batch, tensors in zip(self.kernels, of_kernels, strict=True):
                if not batch.is_as_read(tensors):
                    raise StepError(
                        f"{batch.owner}: parameters or state changed while others stepped; keep their memory as it is"
                    )

    def _begin(self, i: int, unscale: Unscale) -> None:
        """Begin a batch's step, with the numbers that its parameters have in it."""
        batch = self.kernels[i]
        kept = {name: self.vectors[name][1][slot] for name, slot in self.slots[i].items()}
        numbers = {name: values.astype(np.float64) for name, values in kept.items()}
        if "step" in kept:
            numbers["step"] = (kept["step"] + batch.active).astype(kept["step"].dtype).astype(np.float64)
        first = np.array([m.position in self.fresh for m in batch.members], np.float64) if self.fresh else None
        batch.begin(numbers, first, unscale)
