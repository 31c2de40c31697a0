"""Columns to plan: which parameters step together, what is checked each step, when the plan is built again.

**Built again** when a parameter list, an option that is no number, the set of parameters that have ever had a
gradient, a state dict, or any fact of a parameter or state tensor differs from what the plan was built for. Building
checks everything first and creates missing state last, so that an error leaves all as it was.

**Each step** `ready` reads parameter lists, options, gradients, states and all tensors' facts anew (see `KernelBatch`);
only if every batch is ready does anything change: step counts, then the launches. No address outlives a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from operator import is_, itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import kernel
from .batch import EagerBatch, Group, KernelBatch, Member, Recipe, State, StepError, check_gradient, format_name

# Supplied for each parameter instead of by its group: the step's number, and whether its state was made just now.
SPECIAL = ("step", "first")


class Algorithm(NamedTuple):
    """What a plan needs of an optimizer: its class's name and rule, and what its class may refine."""

    name: str
    rule: kernel.Rule
    flags: Callable[[Group], Mapping[str, bool]]
    initial_state: Callable[[str, Tensor, Group], Tensor]
    warn_once: Callable[[str], None]


def describe(algorithm: Algorithm, group: Group) -> tuple[tuple[str, kernel.Argument], ...]:
    """What the rule's keywords are in a group: numbers, which may change freely, and flags, which select a program."""
    flags = algorithm.flags(group)
    _, keywords = kernel.signature(algorithm.rule)
    return tuple((name, _argument(algorithm, name, group, flags)) for name in keywords)


def _argument(algorithm: Algorithm, name: str, group: Group, flags: Mapping[str, bool]) -> kernel.Argument:
    if name in SPECIAL:
        return ("float",) if name == "step" else ("condition",)
    if name in flags:
        return ("flag", bool(flags[name]))
    if name not in group:
        raise StepError(f"{algorithm.name}: param group has no option {name!r}, which its rule needs")
    value = group[name]
    if isinstance(value, (tuple, list)):
        return ("tuple", len(value))
    return ("flag", value) if value is None or isinstance(value, (bool, str)) else ("float",)


MODES = ("maximize", "foreach", "fused", "differentiable", "capturable")


class Mode(NamedTuple):
    """The options that choose a program or a backend, whatever the algorithm."""

    maximize: bool
    eager: bool
    differentiable: bool
    capturable: bool

    @classmethod
    def of(cls, group: Group) -> Mode:
        eager = group.get("foreach") is False and group.get("fused") is False
        flags = (bool(group.get(name)) for name in ("maximize", "differentiable", "capturable"))
        maximize, differentiable, capturable = flags
        return cls(maximize, eager, differentiable, capturable)


def state_columns(algorithm: Algorithm, group: Group) -> tuple[str, ...]:
    """The state tensors that a parameter of this group has, beside its step count."""
    return kernel.trace(algorithm.rule, describe(algorithm, group)).state


def switches(arguments: tuple[tuple[str, kernel.Argument], ...]) -> list[str]:
    """The names of the group options that are no numbers."""
    return [*MODES, *(name for name, argument in arguments if argument[0] == "flag")]


def new_counter(device: torch.device | str = "cpu") -> Tensor:
    """A parameter's step count before its first step, of the dtype that torch gives it."""
    wide = torch.get_default_dtype() == torch.float64
    return torch.zeros((), dtype=torch.float64 if wide else torch.float32, device=device)


class Plan:
    """One optimizer's parameters, in batches, ready to step."""

    def __init__(self, algorithm: Algorithm, groups: list[Group], state: dict[Any, State], scaled: bool) -> None:
        """Check everything, then create the state that is missing. Raises `StepError`, and nothing has changed."""
        self.algorithm, self.scaled = algorithm, scaled
        self.sizes = [len(group["params"]) for group in groups]
        self.params = list(chain.from_iterable(group["params"] for group in groups))
        self.described = [self._describe(group) for group in groups]
        self.recipes = [self._recipe(*described) for described in self.described]
        self.switches = [switches(arguments) for arguments, _ in self.described]
        self.switched = self._switched(groups)
        self.members = self._find_members(groups, state)
        for member in self.members:
            self._check(member, groups[member.group])
        self.fresh: set[int] = set()
        for i, member in enumerate(self.members):
            self._complete_state(i, member, groups[member.group], state)
        self._make_batches()
        self.state, self.entries = state, list(state.values())

    def _describe(self, group: Group) -> tuple[tuple[tuple[str, kernel.Argument], ...], Mode]:
        return describe(self.algorithm, group), Mode.of(group)

    def _switched(self, groups: list[Group]) -> list[object]:
        """The values of all options that select a program or a backend; numbers are not among them."""
        flags = self.algorithm.flags
        return [([*map(group.get, keys)], flags(group)) for group, keys in zip(groups, self.switches, strict=True)]

    def _recipe(self, arguments: tuple[tuple[str, kernel.Argument], ...], mode: Mode) -> Recipe:
        traced = kernel.trace(self.algorithm.rule, arguments)
        graph = kernel.finish(traced, maximize=mode.maximize, scaled=self.scaled, exact=not mode.differentiable)
        sources = []
        for name in graph.hypers:
            key, _, index = name.partition(".")
            if key not in (*SPECIAL, kernel.GRADIENT_FACTOR):
                sources.append((name, key, int(index) if index else None))
        return Recipe(graph, sources, any(name == "step" for name, _ in arguments))

    def _find_members(self, groups: list[Group], state: Mapping[Any, State]) -> list[Member]:
        """The parameters that have, or have had, a gradient; the others are dormant."""
        members: list[Member] = []
        self.dormant: list[Tensor] = []
        position = 0
        for g, group in enumerate(groups):
            names = group.get("param_names")
            for i, p in enumerate(group["params"]):
                label = repr(names[i]) if names and i < len(names) else str(position)
                position += 1
                known = state.get(p)
                if p.grad is None and not known:
                    self.dormant.append(p)
                else:
                    members.append(Member(p, g, {} if known is None else known, label))
        return members

    def _check(self, member: Member, group: Group) -> None:
        """Whether this parameter can step, with the state that it has."""
        owner, p = self.algorithm.name, member.p
        if type(p) in kernel.PLAIN and p.layout == torch.strided:
            if not kernel.has_storage(p):
                raise StepError(
                    f"{owner}: parameter {member.label} of shape {tuple(p.shape)} has no storage (it was freed, as by "
                    "untyped_storage().resize_(0)); give it memory again before stepping"
                )
            if any(stride == 0 and n > 1 for n, stride in zip(p.shape, p.stride(), strict=True)):
                raise StepError(f"{owner}: parameter {member.label} is expanded, its elements share memory; clone it")
        if p.grad is not None:
            check_gradient(member, p.grad, owner)
        recipe = self.recipes[member.group]
        present = [name for name in recipe.graph.state if member.state.get(name) is not None]
        lost = [name for name in recipe.graph.state if name not in present]
        if present and set(lost) - self._optional(group, recipe):
            raise StepError(
                f"{owner}: the state of parameter {member.label} has {present[0]!r} but no {lost[0]!r}; "
                "delete the parameter's state to begin anew, or load a whole one"
            )
        for name in present:
            check_state(owner, member, name)
        step = member.state.get("step") if recipe.counts_steps else None
        if step is not None and not (
            isinstance(step, (int, float)) or (isinstance(step, Tensor) and step.numel() == 1)
        ):
            raise StepError(f"{owner}: state 'step' of parameter {member.label} must be one number, got {step!r:.60}")

    def _optional(self, group: Group, recipe: Recipe) -> set[str]:
        """State that a flag adds, and that may begin in the middle of a run when the flag is switched on."""
        off = group | {key: False for key, value in group.items() if value is True}
        fewer = kernel.trace(self.algorithm.rule, describe(self.algorithm, off)).state
        return set(recipe.graph.state) - set(fewer)

    def _complete_state(self, i: int, member: Member, group: Group, state: dict[Any, State]) -> None:
        """Create missing entries; lay dense ones that lie otherwise than their parameter as it lies."""
        recipe, p, own = self.recipes[member.group], member.p, member.state
        if (recipe.graph.state or recipe.counts_steps) and state.get(p) is not own:
            state[p] = own
        if recipe.counts_steps and own.get("step") is None:
            own["step"] = new_counter(p.device if group.get("capturable") else "cpu")
        if all(own.get(name) is None for name in recipe.graph.state):
            self.fresh.add(i)
        for name in recipe.graph.state:
            if own.get(name) is None:
                own[name] = self.algorithm.initial_state(name, p, group)
            if self._why_eager(member) is None:
                like = p.detach() if kernel.is_dense(p) else p.detach().contiguous()
                if own[name].stride() != like.stride():
                    own[name] = torch.empty_like(like, dtype=own[name].dtype).copy_(own[name])

    def _why_eager(self, member: Member) -> str | None:
        """Why no kernel can serve this parameter; an empty string where the user asked for the eager backend."""
        mode = self.described[member.group][1]
        state = (member.state.get(name) for name in self.recipes[member.group].graph.state)
        tensors = [t for t in (member.p, member.p.grad, *state) if isinstance(t, Tensor)]
        if mode.eager or mode.differentiable:
            return ""
        if not kernel.has_kernels(member.p.device.type):
            return f"there are no kernels for {member.p.device.type} devices"
        for t in tensors:
            if type(t) not in kernel.PLAIN:
                return f"there are no kernels for tensors of class {type(t).__name__}"
            if format_name(t.dtype) not in kernel.FORMATS:
                return f"there are no kernels for {t.dtype}"
            if t is not member.p.grad and (t.is_conj() or t.is_neg()):
                return "a parameter or its state is a lazily conjugated or negated view"
        return None

    def _make_batches(self) -> None:
        """Group members by program and dtypes: each kernel batch is one launch."""
        kernels: dict[object, list[int]] = {}
        eager: dict[tuple[kernel.Graph, Mode], list[int]] = {}
        for i, member in enumerate(self.members):
            graph, mode = self.recipes[member.group].graph, self.described[member.group][1]
            why = self._why_eager(member)
            if why is None:
                of_state = [member.state[name].dtype for name in graph.state]
                gradient = member.p if member.p.grad is None else member.p.grad
                kernels.setdefault((graph, member.p.dtype, gradient.dtype, *of_state), []).append(i)
            else:
                eager.setdefault((graph, mode), []).append(i)
                if why:
                    self.algorithm.warn_once(f"{self.algorithm.name} steps on the slower eager backend: {why}")
        slots = self._share_steps([i for of in kernels.values() for i in of])
        # Batches follow one another in the vector of steps.
        starts = [slots.get(of[0], 0) for of in kernels.values()]
        self.slots = [slice(start, start + len(of)) for start, of in zip(starts, kernels.values(), strict=True)]
        self.kernels = [(KernelBatch(*self._batch(of)), of) for of in kernels.values()]
        self.eager = [
            (EagerBatch(*self._batch(of), mode.differentiable, mode.capturable), of) for (_, mode), of in eager.items()
        ]

    def _batch(self, of: list[int]) -> tuple[list[Member], Recipe, str]:
        members = [self.members[i] for i in of]
        return members, self.recipes[members[0].group], self.algorithm.name

    def _share_steps(self, members: list[int]) -> dict[int, int]:
        """Let the kernels' parameters count in one vector: each `step` is a view of it, and all advance in one add."""
        counting = [i for i in members if self.recipes[self.members[i].group].counts_steps]
        self.counting = [self.members[i].state for i in counting]
        self.counter = new_counter().new_tensor([float(state["step"]) for state in self.counting])
        self.steps = list(self.counter.unbind()) if counting else []
        for state, step in zip(self.counting, self.steps, strict=True):
            state["step"] = step
        # The array shares the vector's memory, and keeps torch from resizing it.
        self.counts = self.counter.numpy()
        return {i: slot for slot, i in enumerate(counting)}

    def ready(self, groups: list[Group], state: dict[Any, State], scaled: bool) -> bool:
        """Read everything that a step depends on; False where the plan must be built again. Changes nothing."""
        if scaled != self.scaled or state is not self.state or self.sizes != [len(group["params"]) for group in groups]:
            return False
        params = chain.from_iterable(group["params"] for group in groups)
        if not all(map(is_, params, self.params)) or self.switched != self._switched(groups):
            return False
        if len(state) != len(self.entries) or not all(map(is_, state.values(), self.entries)):
            return False
        try:
            if not all(map(is_, map(itemgetter("step"), self.counting), self.steps)):
                return False
        except KeyError:
            return False
        if any(p.grad is not None for p in self.dormant):
            return False
        return all(batch.gather(groups) for batch, _ in (*self.kernels, *self.eager))

    def run(self, factor: float) -> None:
        """Step: `factor` multiplies every gradient where the plan was built `scaled`."""
        for (batch, _), slots in zip(self.kernels, self.slots, strict=True):
            if batch.recipe.counts_steps:
                self.counts[slots] += batch.active
        if self.steps:
            torch.autograd.graph.increment_version(self.counter)
        for (batch, of), slots in zip(self.kernels, self.slots, strict=True):
            steps = self.counts[slots].astype(np.float64) if batch.recipe.counts_steps else None
            first = np.array([i in self.fresh for i in of], dtype=np.float64) if self.fresh else None
            batch.run(steps, first, factor)
            if self.fresh:
                self.fresh.difference_update(i for i, on in zip(of, batch.active, strict=True) if on)
        for batch, of in self.eager:
            stepped = batch.run([i in self.fresh for i in of], factor)
            self.fresh.difference_update(of[k] for k in stepped)


def check_state(owner: str, member: Member, name: str) -> None:
    """A state tensor that does not belong to its parameter raises, before anything has changed."""
    p, s = member.p, member.state[name]
    if not isinstance(s, Tensor):
        raise StepError(f"{owner}: state {name!r} of parameter {member.label} must be a tensor, got {s!r:.50}")
    if s.shape != p.shape:
        raise StepError(
            f"{owner}: state {name!r} of parameter {member.label} has shape {tuple(s.shape)}, the parameter has "
            f"{tuple(p.shape)}; delete the parameter's state to begin anew, or load one that fits"
        )
    if s.device != p.device:
        raise StepError(
            f"{owner}: parameter {member.label} is on {p.device}, its state {name!r} on {s.device}; move them together"
        )
    if s.is_complex() != p.is_complex() or not (s.is_floating_point() or s.is_complex()):
        raise StepError(f"{owner}: state {name!r} of parameter {member.label} is {s.dtype}, the parameter {p.dtype}")
    if type(s) in kernel.PLAIN and s.layout == torch.strided and not kernel.has_storage(s):
        raise StepError(f"{owner}: state {name!r} of parameter {member.label} has lost its storage; load it again")
