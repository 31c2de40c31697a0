"""How a parameter steps: what its rule is given, the finished graph, and the state that belongs to
it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import kernel
from ..contract.options import MODES, has_numbers_on_device
from ..contract.steps import steps_by_rule
from ..contract.values import Group, State, StepError, flag, has_entries, number, pick

# Supplied for each parameter instead of by its group: the step's number, and whether its state was
# made just now.
SPECIAL = ("step", "first")


@dataclass
class Recipe:
    """What a batch computes: a finished graph, where its hyper-parameters are found, and which
    numbers it keeps.

    `numbers` are the state entries that are one number a parameter: the rule's scalars, and `step`
    where it counts. `required` are the entries that a parameter which has stepped before must have.
    """

    graph: kernel.Graph
    sources: list[tuple[str, str, int | None]]
    numbers: tuple[str, ...]
    required: tuple[str, ...]

    @property
    def counts_steps(self) -> bool:
        return "step" in self.numbers

    @property
    def scalars(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.graph.scalars)

    @property
    def columns(self) -> tuple[str, ...]:
        return ("g", "p", *self.graph.state)

    @property
    def entries(self) -> tuple[str, ...]:
        """The keys of a parameter's state."""
        return (*self.graph.state, *self.numbers)

    def read(self, group: Group) -> list[float]:
        """A group's numbers, in the order of `sources`."""
        return [number(pick(group, key, i), key) for _, key, i in self.sources]

    def look_at(self, group: Group) -> list[float | Tensor]:
        """As `read`, but a number that lies on a device stays there, unread."""
        return [_number_or_tensor(pick(group, key, i), key) for _, key, i in self.sources]

    def is_resident(self, p: Tensor, group: Mapping[str, Any]) -> bool:
        """Whether a parameter's numbers lie on its device, and not on the host."""
        measured = self.graph.has_measured_scalars and not kernel.on_host(p.device)
        return measured or has_numbers_on_device(group, p.device)

    def shape(self, name: str, p: Tensor) -> tuple[int, ...]:
        """The shape of a state entry."""
        return () if name in self.numbers else kernel.shape_at(self.graph.rank(name), p.shape)

    def fits(self, p: Tensor) -> bool:
        """Whether a parameter's memory can be walked as it is: dense, and row after row where there
        are matrices."""
        return p.is_contiguous() if self.graph.has_matrices else kernel.is_dense(p)

    def as_dense(self, p: Tensor) -> Tensor:
        """The parameter, detached, or a dense copy that stands for it."""
        return p.detach() if self.fits(p) else p.detach().contiguous()


def _number_or_tensor(value: object, key: str) -> float | Tensor:
    """An option that the host may read, as a number; else the tensor."""
    if type(value) is float:
        return value
    if isinstance(value, Tensor) and not kernel.on_host(value.device):
        if value.numel() != 1:
            raise StepError(
                f"param group option {key!r} must be a number, got a tensor of {tuple(value.shape)}"
            )
        return value
    return number(value, key)


class Algorithm(NamedTuple):
    """What a plan needs of an optimizer: its class's name and rule, and what its class may
    refine."""

    name: str
    rule_of: Callable[[Tensor, Group], kernel.Rule]
    flags: Callable[[Group], Mapping[str, bool]]
    initial_state: Callable[[str, Tensor, Group], Tensor]
    warn_once: Callable[[str], None]
    gradients: str
    steps_rows: Callable[[Group], bool]
    defaults: Mapping[str, Any]


def algorithm_of(optimizer: Any) -> Algorithm:
    """Return what an optimizer's class says of how its parameters step.

    Raises TypeError if it has no rule.
    """
    # Looked up on the class: on an optimizer itself people keep notes under common words.
    cls = type(optimizer)
    if not hasattr(cls, "rule"):
        raise TypeError(
            f"{cls.__name__} has no rule; write a static method `rule(p, g, *states, *, options)`"
        )
    return Algorithm(
        cls.__name__,
        partial(cls.rule_of, optimizer),
        partial(cls.flags, optimizer),
        partial(cls.initial_state, optimizer),
        optimizer._onepass.warn_once,
        cls.gradients,
        partial(cls.steps_rows, optimizer),
        optimizer.defaults,
    )


def expected_state(
    optimizer: Any, p: Tensor, group: Mapping[str, Any]
) -> tuple[Sequence[str], dict[str, tuple[int, ...] | None] | None]:
    """Return the state that a parameter must have once it has stepped, and all that it may have.

    All that it may have: the shape of each entry by its name, None for an entry that is one number.
    A class with a step of its own may keep anything: then this is None.

    Example: for AdamW and a parameter of shape (5, 4), `(["step", "exp_avg", "exp_avg_sq"],
    {"step": None, "exp_avg": (5, 4), "exp_avg_sq": (5, 4), "max_exp_avg_sq": (5, 4)})`.
    """
    if not steps_by_rule(type(optimizer)):
        return (), None
    algorithm = algorithm_of(optimizer)
    recipe = recipe_of(algorithm, p, dict(group))
    said = kernel.signature(algorithm.rule_of(p, dict(group)))
    shapes: dict[str, tuple[int, ...] | None] = dict.fromkeys(recipe.numbers)
    for name in said.columns[2:]:
        rank = said.ranks.get(name, kernel.Rank.ELEMENT)
        shapes[name] = kernel.shape_at(rank, p.shape)
    kept = (*recipe.entries, "step")
    required = [name for name in (*recipe.numbers, *recipe.required) if name in kept]
    return required, shapes


Arguments = tuple[tuple[str, kernel.Argument], ...]


def describe(owner: str, rule: kernel.Rule, group: Group, flags: Mapping[str, bool]) -> Arguments:
    """What a rule's keywords are in a group: numbers, which may change freely, and flags, which
    select a program."""
    return tuple(
        (name, _argument(owner, name, group, flags)) for name in kernel.signature(rule).keywords
    )


def _argument(owner: str, name: str, group: Group, flags: Mapping[str, bool]) -> kernel.Argument:
    if name in SPECIAL:
        return ("float",) if name == "step" else ("condition",)
    if name in flags:
        return ("flag", bool(flags[name]))
    if name not in group:
        raise StepError(f"{owner}: param group has no option {name!r}, which its rule needs")
    value = group[name]
    if has_entries(value):
        return ("tuple", len(value))
    return ("flag", value) if value is None or isinstance(value, (bool, str)) else ("float",)


class Mode(NamedTuple):
    """The options that choose a program or a backend, whatever the algorithm."""

    maximize: bool
    eager: bool
    differentiable: bool
    capturable: bool
    fused: bool

    @classmethod
    def of(cls, group: Group) -> Mode:
        flags = (
            flag(group.get(name), name)
            for name in ("maximize", "differentiable", "capturable", "fused", "foreach")
        )
        maximize, differentiable, capturable, fused, foreach = flags
        eager = (
            not (foreach or fused)
            and group.get("foreach") is not None
            and group.get("fused") is not None
        )
        return cls(maximize, eager, differentiable, capturable, fused)


def make_recipe(
    owner: str, rule: kernel.Rule, arguments: Arguments, *, maximize=False, scaled=False, exact=True
) -> Recipe:
    """What parameters that step by a rule compute, from its keywords in their group."""
    try:
        traced = kernel.trace(rule, arguments)
    except (TypeError, ValueError) as error:
        words = {"float": "a number", "condition": "a condition"}
        given = (f"{n} {words.get(str(a[0]), a[1:])}" for n, a in arguments if n not in SPECIAL)
        raise kernel.RuleError(f"{owner}: {error} (given {', '.join(given)})") from None
    graph = kernel.finish(traced, maximize=maximize, scaled=scaled, exact=exact)
    scalars = tuple(name for name, _ in graph.scalars)
    sources = []
    for name in graph.hypers:
        key, _, index = name.partition(".")
        if key not in (*SPECIAL, *scalars, kernel.GRADIENT_FACTOR):
            sources.append((name, key, int(index) if index else None))
    counts = ("step",) if any(name == "step" for name, _ in arguments) else ()
    required = _state_without_flags(rule, arguments, traced)
    return Recipe(graph, sources, (*scalars, *counts), required)


def _state_without_flags(
    rule: kernel.Rule, arguments: Arguments, traced: kernel.Graph
) -> tuple[str, ...]:
    """Return the state that a rule has with all its flags off.

    State that a flag adds may begin in the middle of a run, when the flag is switched on: Adam's
    `max_exp_avg_sq` may be missing beside `exp_avg`. A rule with a flag that is on is traced again.
    """
    off: list[tuple[str, kernel.Argument]] = []
    for name, argument in arguments:
        off.append((name, ("flag", False) if argument == ("flag", True) else argument))
    graph = traced if tuple(off) == arguments else kernel.trace(rule, tuple(off))
    return (*graph.state, *(name for name, _ in graph.scalars))


def recipe_of(algorithm: Algorithm, p: Tensor, group: Group) -> Recipe:
    """How one parameter steps."""
    rule = algorithm.rule_of(p, group)
    arguments = describe(algorithm.name, rule, group, algorithm.flags(group))
    return make_recipe(algorithm.name, rule, arguments, maximize=Mode.of(group).maximize)


def switches(arguments: Iterable[tuple[str, kernel.Argument]]) -> tuple[list[str], list[str]]:
    """The names of the group options that are no numbers, and of those that are."""
    flags = [name for name, argument in arguments if argument[0] == "flag"]
    numbers = [
        name
        for name, argument in arguments
        if argument[0] in ("float", "tuple") and name not in SPECIAL
    ]
    return [*MODES, *flags], numbers


def counter_dtype() -> torch.dtype:
    """The dtype that torch gives step counts."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def new_counter(device: torch.device = kernel.HOST) -> Tensor:
    """A parameter's step count before its first step, as torch makes it: the value of a fake one is
    then known."""
    return torch.tensor(0.0, dtype=counter_dtype(), device=device)


def fill_state(
    algorithm: Algorithm,
    recipe: Recipe,
    p: Tensor,
    group: Group,
    put: Callable[[str, Any], None],
    state: State,
) -> None:
    """Create the entries that a parameter's state lacks, and `put` each in its place."""
    for name in (*recipe.numbers[::-1], *recipe.graph.state):
        if state.get(name) is None:
            shape = recipe.shape(name, p)
            if name in recipe.numbers:
                like = new_counter(p.device if recipe.is_resident(p, group) else kernel.HOST)
            else:
                like = p if shape == p.shape else p.detach().new_empty(shape)
            # Of torch's optimizers, only SparseAdam counts in Python's numbers.
            counter = 0 if algorithm.gradients == "sparse" else like
            put(name, counter if name == "step" else algorithm.initial_state(name, like, group))


def fill_states(optimizer: Any, group: Group) -> None:
    """Create the state that a group's parameters lack."""
    algorithm = algorithm_of(optimizer)
    for p in group["params"]:
        state = optimizer.state[p]
        recipe = recipe_of(algorithm, p, group)
        fill_state(algorithm, recipe, p, group, state.__setitem__, state)
