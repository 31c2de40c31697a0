"""Which optimizers are measured on which models: those that are named, a suite, or all of them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

from ...kernel.graph.ir import Rank
from ..catalog import CLOSURE, Variant, find_variant, optimizers
from .limit import program_of
from .models import find_model
from .shapes import MODELS, Model

__all__ = [
    "SUITE",
    "BenchError",
    "Cell",
    "choose",
    "every",
    "list_elementwise",
    "list_elementwise_classes",
]

# What is measured if nothing is named.
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
# Variants that move other bytes than their classes do by default. With `--all` they are measured
# beside every class of the catalog.
VARIANTS = ("sgd-momentum", "rmsprop-centered-momentum", "adam-amsgrad", "lbfgs-wolfe")

# Unless models are named, an optimizer is measured on these, or on those made for its class.
USUAL_MODELS = ("one", "mlp", "lenet", "resnet18", "big", "gpt2", "small", "tiny", "groups")
USUAL_ON_GPU = ("gpt2", "llama3-1b", "small", "groups100")
MODELS_OF = {
    "LBFGS": ("tiny", "million"),
    "Muon": ("matrices",),
    "SparseAdam": ("embedding-1m", "embedding-10k"),
}
# A process for each contender takes long. A suite starts them where the first step and the peak of
# memory say most.
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


# --- what there is --------------------------------------------------------------------------------


def every() -> list[str]:
    """Return the names of all classes of the catalog, each followed by its measured variants."""
    names = []
    for class_name in optimizers():
        plain = class_name.lower()
        names.append(plain)
        names += [variant for variant in VARIANTS if variant.startswith(f"{plain}-")]
    return names


@cache
def list_elementwise() -> tuple[str, ...]:
    """Return the names of those in `every` whose step is one pass, with no value above an element.

    Memory bounds their steps, so that goals for them are shares of the memory limit.
    """
    return tuple(name for name in every() if _is_elementwise(find_variant(name)))


def _is_elementwise(variant: Variant) -> bool:
    """Whether the step is one pass that reduces nothing and calls no function of matrices."""
    if variant.demand:
        return False
    program = program_of(variant)
    if program.calls or len(program.passes) != 1:
        return False
    (pass_,) = program.passes
    return pass_.domain == Rank.ELEMENT and not (pass_.reductions or pass_.sums)


@cache
def list_elementwise_classes() -> tuple[str, ...]:
    """Return the class names of `list_elementwise`, each once."""
    names = (find_variant(name).cls.__name__ for name in list_elementwise())
    return tuple(dict.fromkeys(names))


# --- what is asked for ----------------------------------------------------------------------------


def choose(
    models: str | None, optimizers: str | None, every_one: bool = False, gpu: bool = False
) -> list[Cell]:
    """Return what to measure, from names with commas between them.

    None stands for the suite's models or optimizers; with `every_one`, for all optimizers. On a GPU
    the suite has other models.

    Raises `UnknownName` for a name that means nothing, and `BenchError` for one that fits none of
    the others.
    """
    chosen = list(MODELS.values())
    if models is not None:
        chosen = [find_model(name.strip()) for name in models.split(",")]
    if optimizers is not None:
        variant_names = [name.strip() for name in optimizers.split(",")]
    else:
        variant_names = every() if every_one else list(SUITE)
    variants = [find_variant(name) for name in variant_names]

    usual: Collection[str] = USUAL_ON_GPU if gpu else USUAL_MODELS
    if models is not None:
        usual = [model.name for model in chosen]
    both_named = models is not None and optimizers is not None
    cells = []
    for model in chosen:
        for variant in variants:
            if misfit(model, variant) or not (both_named or _is_usual(model, variant, usual)):
                continue
            is_fresh = both_named or (model.name, variant.name) in FRESH
            cells.append(Cell(model, variant, is_fresh and variant.demand != CLOSURE))

    if models is not None:
        _check_models(chosen, variants, cells)
    if optimizers is not None:
        _check_variants(chosen, variants, cells)
    return cells


def _check_models(models: list[Model], variants: list[Variant], cells: list[Cell]) -> None:
    """Raise `BenchError` for the first named model on which nothing is measured."""
    measured = {cell.model.name for cell in cells}
    for model in models:
        if model.name not in measured:
            reason = misfit(model, variants[0])
            raise BenchError(f"{reason}: choose another --model or --optimizer.")


def _check_variants(models: list[Model], variants: list[Variant], cells: list[Cell]) -> None:
    """Raise `BenchError` for the first named optimizer that is measured on no model."""
    measured = [cell.variant for cell in cells]
    for variant in variants:
        if variant not in measured:
            reason = misfit(models[0], variant)
            raise BenchError(f"{reason}: choose another --model or --optimizer.")


def _is_usual(model: Model, variant: Variant, usual: Collection[str]) -> bool:
    """Whether an optimizer is measured on a model unless both are named.

    `usual` are the models for most optimizers.
    """
    if variant.cls.__name__ in MODELS_OF:
        return model.name in MODELS_OF[variant.cls.__name__]
    return not model.rows and model.name in usual


def misfit(model: Model, variant: Variant) -> str:
    """Return why an optimizer cannot step a model; empty if it can."""
    if model.rows and variant.cls.gradients == "dense":
        return f"{model.name} has sparse gradients, and {variant.name} takes dense ones"
    if not model.rows and variant.cls.gradients == "sparse":
        return f"{variant.name} takes sparse gradients, and those of {model.name} are dense"
    only_matrices = variant.cls.__name__ == "Muon" and variant.options.get("use_muon", True)
    if only_matrices and any(len(shape) != 2 for shape in model.shapes):
        return f"{variant.name} takes only matrices, and {model.name} has other parameters"
    return ""
