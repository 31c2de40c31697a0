"""Optimizers by name: those of the package, their common variants, and a user's own as
`module:Class`."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import onepass

from ..optimizer import Optimizer

__all__ = [
    "CLOSURE",
    "SPARSE",
    "UnknownName",
    "Variant",
    "find_class",
    "find_trainable",
    "find_variant",
    "nearest",
    "optimizers",
]

CLOSURE, SPARSE = "a closure", "sparse gradients"


class UnknownName(ValueError):
    """A name that means nothing here; the message says which ones come near."""


@dataclass(frozen=True)
class Variant:
    """An optimizer class with options, under a name that the command line accepts."""

    name: str
    cls: type[Optimizer]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def demand(self) -> str:
        """What a step needs that is no dense gradient; empty for most."""
        if not hasattr(self.cls, "rule"):
            return CLOSURE
        return SPARSE if self.cls.gradients == "sparse" else ""


# Options that change what a step computes, so that each is a measurement of its own. A class has
# such a variant where each of the options is one of its arguments, and off by default where it is
# on here, or on where it is off.
OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {
        "use_muon": None,
        "adjust_lr_fn": "match_rms_adamw",
    },  # what is no matrix takes AdamW, at the same lr
    "amsgrad": {"amsgrad": True},
    "centered": {"centered": True},
    "centered-momentum": {"centered": True, "momentum": 0.9},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "wolfe": {"line_search_fn": "strong_wolfe"},
}


def optimizers() -> dict[str, type[Optimizer]]:
    """The package's optimizers, by their public names."""
    public = {name: getattr(onepass, name) for name in onepass.__all__}
    classes = {name: cls for name, cls in public.items() if isinstance(cls, type)}
    return {
        name: cls
        for name, cls in classes.items()
        if issubclass(cls, Optimizer) and cls is not Optimizer
    }


def nearest(kind: str, name: str, known: Iterable[str]) -> UnknownName:
    """The error for an unknown name: up to three near ones, or all where none comes near."""
    known = list(known)
    spelled = {one.lower(): one for one in known}
    near = [
        spelled[key] for key in difflib.get_close_matches(name.lower(), spelled, n=3, cutoff=0.5)
    ]
    advice = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(known)}."
    return UnknownName(f"there is no {kind} {name!r}: {advice}")


def find_class(name: str) -> type[Optimizer]:
    """The optimizer class of that name, in any case, or the class that `module:Class` names.

    Raises `UnknownName` where there is none, and for a `module:Class` that is no
    `onepass.Optimizer` with a rule.
    """
    if ":" in name:
        return _import_class(name)
    known = {public.lower(): cls for public, cls in optimizers().items()}
    if name.lower() not in known:
        raise nearest("optimizer", name, optimizers())
    return known[name.lower()]


def _import_class(name: str) -> type[Optimizer]:
    module, _, qualified = name.partition(":")
    # A program that is installed as a script does not look into the folder that it is called from;
    # `python -m` does.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
    except (ImportError, ValueError) as error:
        raise UnknownName(
            f"{name!r} cannot be imported ({error}): write module:Class, as in my_rules:Lion."
        ) from error
    for part in qualified.split("."):
        if not hasattr(found, part):
            rules = [
                n
                for n, value in vars(found).items()
                if isinstance(value, type) and issubclass(value, Optimizer)
            ]
            raise nearest(
                f"optimizer in {module},", part, rules or ["none, as it defines no Optimizer"]
            )
        found = getattr(found, part)
    if not (isinstance(found, type) and issubclass(found, Optimizer) and hasattr(found, "rule")):
        raise UnknownName(
            f"{name!r} is {found!r}: it must be a subclass of onepass.Optimizer with a static "
            "`rule`."
        )
    return found


def find_variant(name: str) -> Variant:
    """`adamw`, `sgd-momentum`, `adam-amsgrad`, ... or `module:Class`: a class with the options that
    its name adds."""
    if ":" in name:
        return Variant(name, find_class(name))
    variants = _variants()
    if name.lower() not in variants:
        raise nearest("optimizer", name, variants)
    return variants[name.lower()]


def find_trainable(name: str) -> Variant:
    """As `find_variant`, but raises `UnknownName` also for an optimizer that needs more than dense
    gradients."""
    found = find_variant(name)
    if found.demand:
        raise UnknownName(
            f"{found.cls.__name__} needs {found.demand}, which no task has: choose another, as "
            "AdamW or SGD."
        )
    return found


def _variants() -> dict[str, Variant]:
    found = {}
    for public, cls in optimizers().items():
        found[public.lower()] = Variant(public.lower(), cls)
        defaults = {q.name: q.default for q in inspect.signature(cls).parameters.values()}
        for suffix, options in OPTIONS.items():
            if all(
                name in defaults and bool(defaults[name]) != bool(value)
                for name, value in options.items()
            ):
                name = f"{public.lower()}-{suffix}"
                found[name] = Variant(name, cls, options)
    return found
