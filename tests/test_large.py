"""Tensors of more than 2^31 elements: index arithmetic, proved on the program and on the cutting,
and one real run."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from support.bare_kernels import compiled, graph_of, program_of
from table import TABLE

import onepass
from onepass.algorithms.adafactor import Adafactor
from onepass.app.bench.measure import available_memory
from onepass.app.explain.explanation import graph_of as graph_of_optimizer
from onepass.kernel.cpu.chunks import Work
from onepass.kernel.graph.ir import Rank

HUGE = 2**31 + 7


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_all_indices_are_wide(row) -> None:
    check_indices(compiled(program_of(graph_of(row), "float32", "float32", "float32")).source)


def test_all_indices_of_lines_are_wide() -> None:
    graph = graph_of_optimizer(Adafactor([torch.zeros(2, 2)]))
    check_indices(compiled(program_of(graph, "bfloat16", "bfloat16", "float32")).source)


def check_indices(source: str) -> None:
    """Every address is computed from a 64-bit index, and no 64-bit value is ever cut to fewer
    bits."""
    addresses = [line for line in source.splitlines() if "getelementptr" in line]
    assert addresses
    for line in addresses:
        assert re.search(r"getelementptr [\w ]+, ptr %\S+, i64 [%\w.-]+$", line), line
    assert not re.search(
        r"trunc i64|= (add|sub|mul|udiv|urem)( nsw)? i(8|16|32) %\S*"
        r"(_i|_next|base|line|index|offset)",
        source,
    )


@pytest.mark.parametrize(
    "sizes",
    [(1, 1, HUGE), (1, HUGE, 1), (HUGE, 1, 1), (3, 2**16, 2**15 + 3), (2**30, 3, 1)],
    ids=str,
)
@pytest.mark.parametrize("by_lines", [False, True], ids=["flat", "lines"])
def test_chunks_cover_every_line_once(sizes: tuple[int, int, int], by_lines: bool) -> None:
    """Chunks follow one another without a gap from the first line to the last, past 2^31."""
    domain = Rank.ELEMENT
    cut = Work(np.array([sizes]), {domain}, by_lines).chunks[domain]
    lines = sizes[0] * sizes[1] if by_lines else int(np.prod(sizes))
    assert (cut.start.dtype, cut.stop.dtype, cut.length.dtype) == (np.int64,) * 3
    assert cut.start[0] == 0
    assert cut.stop[-1] == lines
    assert (cut.start[1:] == cut.stop[:-1]).all()
    assert (cut.stop > cut.start).all()
    assert cut.unit_begin[-1] == len(cut.start)


@pytest.mark.slow
def test_a_real_tensor_of_more_than_2_to_the_31_elements() -> None:
    """bfloat16 weights and gradients, 9 GB: the first, the last and those around 2^31 all move."""
    free = available_memory()
    if free is not None and free < 11e9:
        pytest.skip(f"needs 11 GB of memory, {free / 1e9:.0f} are free")
    places = [0, 1, 2**31 - 2, 2**31 - 1, 2**31, 2**31 + 1, HUGE - 1]
    p = torch.zeros(HUGE, dtype=torch.bfloat16)
    p.grad = torch.zeros(HUGE, dtype=torch.bfloat16)
    p.grad[places] = torch.arange(1.0, 8.0, dtype=torch.bfloat16)
    onepass.SGD([p], lr=1.0).step()
    assert p[places].tolist() == [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0]
    assert int(torch.count_nonzero(p)) == len(places)
