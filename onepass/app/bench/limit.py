"""The memory limit: the same walks over the same memory as a step, with almost no arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import torch
from torch import nn

from ... import kernel
from ...kernel.functions import mean
from ...kernel.graph.ir import Node, Rank, hyper, load
from ...kernel.graph.trace import Program, bind
from ..catalog import Variant
from ..explain.explanation import graph_of
from .contenders import Missing, Workload, make_ours

__all__ = ["Limit", "program_of"]


def program_of(variant: Variant, dimensions: int = 2) -> Program:
    """Return the program that our optimizer runs on float32 tensors of this many dimensions."""
    graph = graph_of(make_ours(variant, [nn.Parameter(torch.zeros([1] * dimensions))]))
    return bind(graph, tuple((name, "float32") for name in ("g", "p", *graph.state)))


class Limit:
    """A program that reads and writes what an optimizer's program does.

    A pass that writes sets each written column to itself plus zero times the others. A pass that
    only reads adds up what it reads. Both go through the same compiler and the same launch as the
    optimizer's own program. Left out are the work of a step outside of the kernel (checks and
    hyper-parameters), and what has one value for each row or column of a matrix.
    """

    def __init__(self, program: Program) -> None:
        """Compile the limit of `program`; raises `Missing` if products of matrices bound it."""
        if program.calls:
            raise Missing("a step is bound by products of matrices, not by memory")
        graph = _copying_graph(program)
        formats = {column.name: column.format.name for column in program.columns}
        self.kernel = kernel.compile(graph, tuple((name, formats[name]) for name in graph.columns))
        self.program = self.kernel.program

    def place(self, workload: Workload) -> Callable[[], None]:
        """Return a function that runs the limit over a workload's tensors, on all threads."""
        tensors: dict[str, list[Any]] = {
            "p": workload.params,
            "g": [p.grad for p in workload.params],
            **workload.columns,
        }
        addresses = [
            [tensor.data_ptr() for tensor in tensors[column.name]]
            for column in self.program.columns
        ]
        work = self.kernel.split(np.array([p.numel() for p in workload.params]))
        setting_index = np.zeros(len(workload.params), np.int64)
        pointers = np.array(addresses, dtype=np.uint64)
        launch = self.kernel.prepare(pointers, work, setting_index, 1)
        launch.leaves[:] = 0.0
        return lambda: launch.run(torch.get_num_threads())


def _copying_graph(program: Program) -> kernel.Graph:
    """Return a graph that reads and writes the elements that a program does, pass after pass.

    Example: AdamW reads p, g, m and v and writes p, m and v in one pass. The graph stores
    p + (g * 0), m + (g * 0) and v + (g * 0).
    """
    previous: Node | None = None
    outputs: list[tuple[str, Node]] = []
    for pass_ in program.passes:
        if pass_.domain != Rank.ELEMENT:
            continue
        written = [name for name, _ in pass_.stores]
        values = [
            load(str(node.attr))
            for node in pass_.loads
            if node.rank == Rank.ELEMENT and node.attr not in written
        ]
        # Each pass needs what the one before it has summed up, so that there remain as many.
        if previous is not None:
            values.insert(0, previous)
        if written:
            nothing = reduce(add, (value * hyper("zero") for value in values))
            outputs += [(name, load(name) + nothing) for name in written]
        else:
            previous = mean(reduce(add, values))
    names = tuple(column.name for column in program.columns if column.rank == Rank.ELEMENT)
    return kernel.Graph("limit", names, tuple(outputs))
