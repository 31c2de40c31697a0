"""Which optimizers are measured on which models: those that are named, a suite, or all of them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ..catalog import CLOSURE, Variant, find_variant, nearest
from .shapes import MODELS, Model

__all__ = ["EVERY", "SUITE", "BenchError", "Cell", "choose"]

ELEMENTWISE = (
    "sgd",
    "sgd-momentum",
    "asgd",
    "adagrad",
    "rmsprop",
    "rmsprop-centered-momentum",
    "adadelta",
    "adam",
    "adam-amsgrad",
    "adamw",
    "adamax",
    "nadam",
    "radam",
    "rprop",
)
EVERY = (*ELEMENTWISE, "adafactor", "muon", "sparseadam", "lbfgs", "lbfgs-wolfe")
SUITE = (
    "sgd-momentum",
    "adamw",
    "nadam",
    "rmsprop",
    "adafactor",
    "muon",
    "sparseadam",
    "lbfgs-wolfe",
)
# Where an optimizer is measured unless models are named: these, or by its class those for which it
# is made.
USUAL_MODELS = ("big", "gpt2", "small", "tiny", "groups")
USUAL_ON_GPU = ("gpt2", "llama3-1b", "small", "groups100")
MODELS_OF = {
    "LBFGS": ("tiny", "million"),
    "Muon": ("matrices",),
    "SparseAdam": ("embedding-1m", "embedding-10k"),
}
# A process for each contender takes long: a suite starts them where the first step and the peak say
# most.
FRESH = {
    (model, name)
    for model in ("gpt2", "tiny")
    for name in ("adamw", "nadam", "rmsprop", "adafactor")
}


class BenchError(ValueError):
    """A benchmark that cannot be run; the message is a sentence for the user."""


@dataclass(frozen=True)
class Cell:
    """One row of the report; `fresh` adds what is measured in fresh processes."""

    model: Model
    variant: Variant
    fresh: bool


def choose(
    models: str | None, optimizers: str | None, every: bool = False, gpu: bool = False
) -> list[Cell]:
    """What to measure, from names with commas between them; where None is given the suite's, or
    with `every` all.

    On a GPU the suite has other models.

    Raises `UnknownName` for a name that means nothing, `BenchError` for one that goes with none of
    the others.
    """
    named = models is not None, optimizers is not None
    known = (
        list(MODELS)
        if models is None
        else [_find_model(name.strip()).name for name in models.split(",")]
    )
    names = (
        (EVERY if every else SUITE)
        if optimizers is None
        else [name.strip() for name in optimizers.split(",")]
    )
    variants = [find_variant(name) for name in names]
    usual = known if named[0] else USUAL_ON_GPU if gpu else USUAL_MODELS
    cells = []
    for model in map(MODELS.__getitem__, known):
        for variant in variants:
            if not misfit(model, variant) and (all(named) or _is_usual(model, variant, usual)):
                fresh = variant.demand != CLOSURE and (
                    all(named) or (model.name, variant.name) in FRESH
                )
                cells.append(Cell(model, variant, fresh))
    for name in known if named[0] else ():
        if name not in {cell.model.name for cell in cells}:
            raise BenchError(
                f"{misfit(MODELS[name], variants[0])}: choose another --model or --optimizer."
            )
    for variant in variants if named[1] else ():
        if variant not in [cell.variant for cell in cells]:
            raise BenchError(
                f"{misfit(MODELS[known[0]], variant)}: choose another --model or --optimizer."
            )
    return cells


def _find_model(name: str) -> Model:
    if name.lower() not in MODELS:
        raise nearest("model", name, MODELS)
    return MODELS[name.lower()]


def _is_usual(model: Model, variant: Variant, models: Collection[str]) -> bool:
    """Whether an optimizer is measured on a model without being asked for both; `models` are for
    most of them."""
    if variant.cls.__name__ in MODELS_OF:
        return model.name in MODELS_OF[variant.cls.__name__]
    return not model.rows and model.name in models


def misfit(model: Model, variant: Variant) -> str:
    """Why an optimizer cannot step a model; empty where it can."""
    if model.rows and variant.cls.gradients == "dense":
        return f"{model.name} has sparse gradients, and {variant.name} takes dense ones"
    if not model.rows and variant.cls.gradients == "sparse":
        return f"{variant.name} takes sparse gradients, and those of {model.name} are dense"
    only_matrices = variant.cls.__name__ == "Muon" and variant.options.get("use_muon", True)
    if only_matrices and any(len(shape) != 2 for shape in model.shapes):
        return f"{variant.name} takes matrices alone, and {model.name} has other parameters"
    return ""
