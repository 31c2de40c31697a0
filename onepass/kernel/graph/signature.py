"""What a rule says of itself by its signature: its columns, its scalars and its options.

    def rule(p, g, momentum_buffer, *, lr, momentum): ...

    columns    p, g, momentum_buffer      by position, under torch's state-dict names
    keywords   lr, momentum               options of the param group

A state may be annotated as `Scalar` (one number), `PerRow` or `PerColumn`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .caches import remember
from .ir import Node, Rank, RuleError

Rule = Callable[..., Mapping[str, Node]]


class Signature(NamedTuple):
    """A rule's columns and scalars in order, its keywords, and the ranks of unusual states."""

    positional: tuple[str, ...]
    keywords: tuple[str, ...]
    ranks: Mapping[str, Rank]

    @property
    def columns(self) -> tuple[str, ...]:
        """What lies in tensors: p, g and the states that are not one number."""
        return tuple(name for name in self.positional if name not in self.scalars)

    @property
    def scalars(self) -> tuple[str, ...]:
        """States that are one number for each parameter."""
        return tuple(name for name, rank in self.ranks.items() if rank == Rank.UNIFORM)

    def rank(self, name: str) -> Rank:
        """Return how often a column or scalar has a value."""
        return self.ranks.get(name, Rank.ELEMENT)


@remember(most=512)
def signature(rule: Rule) -> Signature:
    """Return a rule's columns (positional) and its hyper-parameters (keyword-only), by name.

    Raises `RuleError` unless the rule is written `def rule(p, g, *states, *, hyper-parameters)`.
    """
    parameters = inspect.signature(rule).parameters.values()
    positional = [q for q in parameters if q.kind in (q.POSITIONAL_ONLY, q.POSITIONAL_OR_KEYWORD)]
    keywords = [q for q in parameters if q.kind == q.KEYWORD_ONLY]
    names = tuple(q.name for q in positional)
    if names[:2] != ("p", "g") or len(positional) + len(keywords) != len(parameters):
        raise RuleError(
            f"{rule.__qualname__} must be written `def rule(p, g, *states, *, hyper-parameters)`: "
            "columns by position, p and g first, hyper-parameters by keyword after `*`, and no "
            "*args or **kwargs"
        )
    ranks = {}
    for state in positional[2:]:
        rank = _annotated_rank(state.annotation, rule)
        if rank is not None:
            ranks[state.name] = rank
    return Signature(names, tuple(q.name for q in keywords), ranks)


def _annotated_rank(annotation: Any, rule: Rule) -> Rank | None:
    """Return the rank that `Scalar`, `PerRow` or `PerColumn` stands for; None for any other."""
    if isinstance(annotation, str):
        annotation = _evaluated(annotation, rule)
    for mark in getattr(annotation, "__metadata__", ()):
        if isinstance(mark, Rank):
            return mark
    return None


def _evaluated(annotation: str, rule: Rule) -> Any:
    """Return what an annotation names in its module; under a `__future__` import it is text.

    Raises `RuleError` if it looks like one of ours and its module does not have it.
    """
    found: Any = annotation
    for part in annotation.split("."):
        found = getattr(rule, "__globals__", {}).get(part, found)
        found = getattr(found, part, found)
    unknown = isinstance(found, str)
    if unknown and found.rpartition(".")[2] in ("Scalar", "PerRow", "PerColumn"):
        raise RuleError(
            f"{rule.__qualname__} annotates a state with {found!r}, which is not a name of its "
            "module; import it at the top of the module"
        )
    return found
