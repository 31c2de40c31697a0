"""Optimizers by name: the package's, their common variants, and a user's own as `module:Class`."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import onepass

from ..contract.spelling import advise
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

CLOSURE = "a closure"
SPARSE = "sparse gradients"


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
        """What a step needs besides dense gradients: `CLOSURE`, `SPARSE`, or nothing ("")."""
        if not hasattr(self.cls, "rule"):
            return CLOSURE
        return SPARSE if self.cls.gradients == "sparse" else ""


# Options that change what a step computes, so that each makes a measurement of its own. They are
# keyed by what a variant's name ends with. A class has such a variant if it takes all of these
# options, and if they are off by default and on here, or the other way round.
SUFFIXES: dict[str, dict[str, Any]] = {
    # AdamW steps what is not a matrix, at the same lr.
    "adamw": {"use_muon": None, "adjust_lr_fn": "match_rms_adamw"},
    "amsgrad": {"amsgrad": True},
    "centered": {"centered": True},
    "centered-momentum": {"centered": True, "momentum": 0.9},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "wolfe": {"line_search_fn": "strong_wolfe"},
}


def optimizers() -> dict[str, type[Optimizer]]:
    """Return the package's optimizer classes, by their public names."""
    found = {}
    for name in onepass.__all__:
        value = getattr(onepass, name)
        if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer:
            found[name] = value
    return found


def nearest(kind: str, name: str, known: Iterable[str]) -> UnknownName:
    """Return the error for an unknown name: up to three near ones, or all if none comes near."""
    return UnknownName(f"there is no {kind} {name!r}: {advise(name, known)}")


def find_class(name: str) -> type[Optimizer]:
    """Return the optimizer class of this name, in any case, or the one that `module:Class` names.

    Raises `UnknownName` if there is none, or if `module:Class` is not a subclass of
    `onepass.Optimizer` with a rule.
    """
    if ":" in name:
        return _import_class(name)
    known = {public.lower(): cls for public, cls in optimizers().items()}
    if name.lower() not in known:
        raise nearest("optimizer", name, optimizers())
    return known[name.lower()]


def _import_class(name: str) -> type[Optimizer]:
    """Return the class that `module:Class` names, from the current folder too."""
    module_name, _, path = name.partition(":")
    # A program that is installed as a script does not look into the folder in which it is called;
    # `python -m` does.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise UnknownName(
            f"{name!r} cannot be imported ({error}): write module:Class, as in my_rules:Lion."
        ) from error
    for part in path.split("."):
        if not hasattr(found, part):
            known = _list_optimizers(found) or ["none, as it defines no Optimizer"]
            raise nearest(f"optimizer in {module_name},", part, known)
        found = getattr(found, part)
    if not (isinstance(found, type) and issubclass(found, Optimizer) and hasattr(found, "rule")):
        raise UnknownName(
            f"{name!r} is {found!r}: it must be a subclass of onepass.Optimizer with a static "
            "`rule`."
        )
    return found


def _list_optimizers(namespace: Any) -> list[str]:
    """Return the names of the optimizer classes in a module or a class."""
    return [
        name
        for name, value in vars(namespace).items()
        if isinstance(value, type) and issubclass(value, Optimizer)
    ]


def find_variant(name: str) -> Variant:
    """Return a class with the options that a name adds: `adamw`, `sgd-momentum`, `module:Class`.

    Raises `UnknownName` if there is none.
    """
    if ":" in name:
        return Variant(name, find_class(name))
    variants = _variants()
    if name.lower() not in variants:
        raise nearest("optimizer", name, variants)
    return variants[name.lower()]


def find_trainable(name: str) -> Variant:
    """Return the variant of this name, as `find_variant` does, if dense gradients are enough.

    Raises `UnknownName` also for an optimizer that needs a closure or sparse gradients.
    """
    found = find_variant(name)
    if found.demand:
        raise UnknownName(
            f"{found.cls.__name__} needs {found.demand}, which no task has: choose another, such "
            "as AdamW or SGD."
        )
    return found


def _variants() -> dict[str, Variant]:
    """Return every class and all its variants, by the names that the command line accepts."""
    found = {}
    for public, cls in optimizers().items():
        plain = public.lower()
        found[plain] = Variant(plain, cls)
        defaults = {
            parameter.name: parameter.default
            for parameter in inspect.signature(cls).parameters.values()
        }
        for suffix, options in SUFFIXES.items():
            if _changes(defaults, options):
                name = f"{plain}-{suffix}"
                found[name] = Variant(name, cls, options)
    return found


def _changes(defaults: Mapping[str, Any], options: Mapping[str, Any]) -> bool:
    """Whether a class with these defaults takes all of the options, and each switches something."""
    return all(
        name in defaults and bool(defaults[name]) != bool(value) for name, value in options.items()
    )
