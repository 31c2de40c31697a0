"""Who takes part in a benchmark: ours, every mode of torch's, and the memory limit, all on the same
memory.

All contenders update the same parameters from the same gradients, and keep their state in the same
tensors: each touches the same pages, and a model needs its memory once, not once a contender.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ... import kernel
from ...kernel.functions import mean
from ...kernel.graph.ir import Node, Rank, hyper, load
from ...kernel.graph.trace import Program, bind
from ...optimizer import Optimizer
from ..catalog import Variant
from ..explain.explanation import graph_of
from .shapes import Model

__all__ = [
    "LIMIT",
    "MODES",
    "OURS",
    "OURS_CAPTURABLE",
    "TORCH",
    "Limit",
    "Missing",
    "Workload",
    "make_capturable",
    "make_ours",
    "make_torch",
    "program_of",
    "seat",
]

OURS, LIMIT = "onepass", "memory limit"
# On CPU torch's default is a loop over the parameters, on a GPU it is foreach.
TORCH: dict[str, dict[str, bool]] = {
    "default": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
# On a GPU step counts may live there, so that a step can be captured in a graph: a mode of torch's,
# and of ours.
MODES = {**TORCH, "capturable": {"capturable": True}}
OURS_CAPTURABLE = "onepass capturable"


class Missing(Exception):
    """Why a contender cannot take part."""


class Workload:
    """A model's parameters with gradients on one device; `columns` holds the state that all
    contenders share."""

    def __init__(self, model: Model, device: torch.device | str = "cpu") -> None:
        self.model, self.device = model, torch.device(device)
        self.params = [
            nn.Parameter(torch.full(shape, 0.5, device=device)) for shape in model.shapes
        ]
        self._add_gradients(self.params)
        self.columns: dict[str, list[Tensor]] = {}

    def _add_gradients(self, params: list[nn.Parameter]) -> None:
        generator = torch.Generator(self.device).manual_seed(0)
        for p in params:
            # A sparse gradient as backward leaves it: rows in any order, and not yet coalesced.
            rows = torch.randperm(len(p), generator=generator, device=self.device)[
                : self.model.rows
            ]
            shape = (len(rows), *p.shape[1:]) if self.model.rows else p.shape
            g = torch.empty(shape, device=self.device).normal_(std=1e-2, generator=generator)
            p.grad = (
                torch.sparse_coo_tensor(rows[None], g, p.shape, check_invariants=True)
                if self.model.rows
                else g
            )

    def sample(self) -> nn.Parameter:
        """A small parameter with a gradient such as all have here."""
        p = nn.Parameter(torch.ones(2, 3, device=self.device))
        self._add_gradients([p])
        return p

    def groups(self) -> list[Any]:
        """Fresh param groups, or the parameters themselves where one group is all."""
        count = self.model.groups
        if count == 1:
            return list(self.params)
        cuts = [len(self.params) * i // count for i in range(count + 1)]
        lrs = [1e-3 * (1 + i / count) for i in range(count)]
        return [
            {"params": self.params[a:b], "lr": lr}
            for a, b, lr in zip(cuts, cuts[1:], lrs, strict=False)
        ]

    def share_state(
        self, optimizer: torch.optim.Optimizer, template: dict[str, Any], like: Tensor
    ) -> None:
        """Give `optimizer` the state that `template` is for the parameter `like`, its columns being
        the shared ones.

        State of other shapes (factored, blocked) cannot be shared: then nothing is given, and the
        step makes its own.
        """
        columns = {
            name
            for name, value in template.items()
            if isinstance(value, Tensor) and value.shape == like.shape
        }
        rest = {name: value for name, value in template.items() if name not in columns}
        if any(isinstance(value, Tensor) and value.numel() != 1 for value in rest.values()):
            return
        for name in columns - self.columns.keys():
            self.columns[name] = [
                torch.zeros_like(p, memory_format=torch.preserve_format) for p in self.params
            ]
        if template:
            for i, p in enumerate(self.params):
                own = {
                    name: self.columns[name][i] if name in columns else copy.deepcopy(rest[name])
                    for name in template
                }
                optimizer.state[p] = own


def make_ours(variant: Variant, params: list[Any], **options: Any) -> Optimizer:
    """Our optimizer of this variant, with further options."""
    return variant.cls(params, **variant.options, **options)  # type: ignore[call-arg]


def make_capturable(variant: Variant, params: list[Any]) -> Optimizer:
    """Our optimizer with its step counts on the device."""
    optimizer = make_ours(variant, params)
    # As torch's, not all classes have it as an argument; every group may have it.
    for group in optimizer.param_groups:
        group["capturable"] = True
    return optimizer


def make_torch(
    variant: Variant, params: list[Any], mode: str, **options: Any
) -> torch.optim.Optimizer:
    """torch's optimizer of the same name in one of its modes; raises `Missing` where there is
    none."""
    name = variant.cls.__name__
    theirs = getattr(torch.optim, name, None)
    if theirs is None:
        raise Missing(f"torch has no {name}")
    known = inspect.signature(theirs).parameters
    for key in (*MODES[mode], *variant.options):
        if key not in known:
            raise Missing(f"torch's {name} has no {key}")
    try:
        return theirs(params, **variant.options, **options, **MODES[mode])
    except (RuntimeError, ValueError) as error:
        raise Missing(f"torch's {name}: {error}") from error


def seat(
    workload: Workload, make: Callable[[list[Any]], torch.optim.Optimizer]
) -> torch.optim.Optimizer:
    """An optimizer of the workload's parameters that keeps its state in the shared tensors.

    Raises `Missing` where it does not take such gradients.
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


def program_of(variant: Variant, dimensions: int = 2) -> Program:
    """The program that our optimizer runs on float32 tensors of so many dimensions."""
    graph = graph_of(make_ours(variant, [nn.Parameter(torch.zeros([1] * dimensions))]))
    return bind(graph, tuple((name, "float32") for name in ("g", "p", *graph.state)))


class Limit:
    """The same walks over the same memory with almost no arithmetic.

    A pass that writes makes each written column itself plus zero times the others; one that only
    reads adds up what it reads. They go through the same compiler and the same launch as the
    optimizer's own program. What they do not do is the work of a step outside of the kernel, checks
    and hyper-parameters, and what has one value a row or a column.
    """

    def __init__(self, program: Program) -> None:
        """Raises `Missing` where functions of whole matrices take most of the time."""
        if program.calls:
            raise Missing("a step is bound by products of matrices, not by memory")
        graph = _streams(program)
        formats = {c.name: c.format.name for c in program.columns}
        self.kernel = kernel.compile(graph, tuple((name, formats[name]) for name in graph.columns))
        self.program = self.kernel.program

    def place(self, workload: Workload) -> Callable[[], None]:
        """The launch over a workload's tensors."""
        columns: dict[str, list[Any]] = {
            "p": workload.params,
            "g": [p.grad for p in workload.params],
        }
        columns |= workload.columns
        tensors = [columns[c.name] for c in self.program.columns]
        pointers = np.array([[t.data_ptr() for t in column] for column in tensors], dtype=np.uint64)
        work = self.kernel.split(np.array([p.numel() for p in workload.params]))
        launch = self.kernel.prepare(pointers, work, np.zeros(len(workload.params), np.int64), 1)
        launch.leaves[:] = 0.0
        return lambda: launch.run(torch.get_num_threads())


def _streams(program: Program) -> kernel.Graph:
    """What only reads and writes the elements that a program's passes read and write, pass after
    pass."""
    before: Node | None = None
    outputs: list[tuple[str, Node]] = []
    for one in program.passes:
        if one.domain != Rank.ELEMENT:
            continue
        written = [name for name, _ in one.stores]
        read = [
            load(str(n.attr)) for n in one.loads if n.rank == Rank.ELEMENT and n.attr not in written
        ]
        # Each pass needs what the one before it has summed up, so that they remain as many.
        values = [*([] if before is None else [before]), *read]
        if written:
            nothing = reduce(add, (value * hyper("zero") for value in values))
            outputs += [(name, load(name) + nothing) for name in written]
        else:
            before = mean(reduce(add, values))
    names = tuple(c.name for c in program.columns if c.rank == Rank.ELEMENT)
    return kernel.Graph("limit", names, tuple(outputs))
