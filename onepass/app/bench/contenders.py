"""The optimizers in a benchmark: ours and every mode of torch's, all on the same memory.

All contenders update the same parameters from the same gradients, and keep their state in the same
tensors. So each touches the same pages, and a model needs its memory once, not once a contender.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...optimizer import Optimizer
from ..catalog import Variant
from .shapes import Model

__all__ = [
    "LIMIT",
    "MODES",
    "OURS",
    "OURS_CAPTURABLE",
    "TORCH",
    "Missing",
    "Workload",
    "make_capturable",
    "make_ours",
    "make_torch",
    "seat",
]

OURS = "onepass"
LIMIT = "memory limit"
# On CPU torch's default is a loop over the parameters, on a GPU it is foreach.
TORCH: dict[str, dict[str, bool]] = {
    "default": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
# On a GPU, step counts may live there too, so that a step can be captured in a graph: one more mode
# of torch's, and one of ours.
MODES = {**TORCH, "capturable": {"capturable": True}}
OURS_CAPTURABLE = "onepass capturable"


class Missing(Exception):
    """A contender cannot take part; the message says why."""


class Workload:
    """A model's parameters with gradients on one device, and the state that contenders share.

    `columns` has a list of tensors, one for each parameter, by the name of the state.
    """

    def __init__(self, model: Model, device: torch.device | str = "cpu") -> None:
        self.model = model
        self.device = torch.device(device)
        self.params = [
            nn.Parameter(torch.full(shape, 0.5, device=device)) for shape in model.shapes
        ]
        self._add_gradients(self.params)
        self.columns: dict[str, list[Tensor]] = {}

    def _add_gradients(self, params: list[nn.Parameter]) -> None:
        """Give parameters gradients, dense or sparse as the model says; always the same."""
        generator = torch.Generator(self.device).manual_seed(0)
        for p in params:
            p.grad = (
                self._draw_sparse(p, generator)
                if self.model.rows
                else self._draw(p.shape, generator)
            )

    def _draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return small random numbers of this shape."""
        return torch.empty(shape, device=self.device).normal_(std=1e-2, generator=generator)

    def _draw_sparse(self, p: nn.Parameter, generator: torch.Generator) -> Tensor:
        """Return a gradient as backward leaves it: slices in any order, and not yet coalesced."""
        order = torch.randperm(len(p), generator=generator, device=self.device)
        indices = order[: self.model.rows]
        values = self._draw((len(indices), *p.shape[1:]), generator)
        return torch.sparse_coo_tensor(indices[None], values, p.shape, check_invariants=True)

    def sample(self) -> nn.Parameter:
        """Return a small parameter with a gradient of the same kind as all have here."""
        p = nn.Parameter(torch.ones(2, 3, device=self.device))
        self._add_gradients([p])
        return p

    def groups(self) -> list[Any]:
        """Return new param groups of different lr, or the parameters if there is only one group.

        Example: 1000 tensors in 400 groups are cut at 0, 2, 5, 7, 10, ...
        """
        count = self.model.groups
        if count == 1:
            return list(self.params)
        groups = []
        for index in range(count):
            begin = len(self.params) * index // count
            end = len(self.params) * (index + 1) // count
            groups.append({"params": self.params[begin:end], "lr": 1e-3 * (1 + index / count)})
        return groups

    def share_state(
        self, optimizer: torch.optim.Optimizer, template: dict[str, Any], like: Tensor
    ) -> None:
        """Give `optimizer` state in the shared tensors.

        `template` is the state that it makes for a parameter like `like`. State of another shape
        than its parameter's (factored, blocked) cannot be shared: then nothing is given, and the
        first step makes it.
        """
        names = {
            name
            for name, value in template.items()
            if isinstance(value, Tensor) and value.shape == like.shape
        }
        rest = {name: value for name, value in template.items() if name not in names}
        if any(isinstance(value, Tensor) and value.numel() != 1 for value in rest.values()):
            return
        for name in names - self.columns.keys():
            self.columns[name] = [
                torch.zeros_like(p, memory_format=torch.preserve_format) for p in self.params
            ]
        if not template:
            return
        for index, p in enumerate(self.params):
            state = {}
            # In the template's order, which state dicts keep.
            for name in template:
                shared = name in names
                state[name] = self.columns[name][index] if shared else copy.deepcopy(rest[name])
            optimizer.state[p] = state


def make_ours(variant: Variant, params: list[Any], **options: Any) -> Optimizer:
    """Return our optimizer of this variant, with further options."""
    return variant.cls(params, **variant.options, **options)  # type: ignore[call-arg]


def make_capturable(variant: Variant, params: list[Any]) -> Optimizer:
    """Return our optimizer with its step counts on the device."""
    optimizer = make_ours(variant, params)
    # Not all classes take it as an argument, torch's neither; every group may have it.
    for group in optimizer.param_groups:
        group["capturable"] = True
    return optimizer


def make_torch(
    variant: Variant, params: list[Any], mode: str, **options: Any
) -> torch.optim.Optimizer:
    """Return torch's optimizer of the same name in one of its `MODES`.

    Raises `Missing` if torch has no such class, mode or option, or refuses it.
    """
    name = variant.cls.__name__
    cls = getattr(torch.optim, name, None)
    if cls is None:
        raise Missing(f"torch has no {name}")
    known = inspect.signature(cls).parameters
    for key in (*MODES[mode], *variant.options):
        if key not in known:
            raise Missing(f"torch's {name} has no {key}")
    try:
        return cls(params, **variant.options, **options, **MODES[mode])
    except (RuntimeError, ValueError) as error:
        raise Missing(f"torch's {name}: {error}") from error


def seat(
    workload: Workload, make: Callable[[list[Any]], torch.optim.Optimizer]
) -> torch.optim.Optimizer:
    """Return an optimizer of the workload's parameters that keeps its state in the shared tensors.

    Raises `Missing` if it does not take such gradients.
    """
    like = workload.sample()
    sample = make([like])
    try:
        sample.step()
    except (RuntimeError, AssertionError) as error:
        raise Missing(f"{type(sample).__name__}: {error}") from error
    optimizer = make(workload.groups())
    workload.share_state(optimizer, dict(sample.state.get(like, {})), like)
    return optimizer
