"""What kernels would need on a GPU, by their instructions: compiled for it, without a device.

    python benchmarks/gpu_estimate.py [--target sm_90] [--dtype float32]      # ten seconds

Prints a Markdown table with a line for each pass over elements: the time that memory takes for one
element, and the least that instructions take, on the GPU that stands for the target.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from onepass.app.bench.suite import every
from onepass.app.catalog import Variant, find_variant
from onepass.app.explain.explanation import graph_of
from onepass.app.explain.sass import Chip, bound, fast_path
from onepass.app.explain.target import (
    CHIPS,
    CompiledKernel,
    bytes_of,
    compile_for,
    disassemble,
    elements_of,
    pass_index_of,
)
from onepass.kernel import bind
from onepass.kernel.gpu.source import triton_source
from onepass.kernel.graph.passes import Pass, Program


def program_of(variant: Variant, dtype: str) -> Program:
    """Return the program of an optimizer whose columns are all stored as `dtype`."""
    p = nn.Parameter(torch.zeros(2, 2, dtype=getattr(torch, dtype)))
    graph = graph_of(variant.cls([p], **variant.options))
    return bind(graph, tuple((column, dtype) for column in ("g", "p", *graph.state)))


def estimate(title: str, kernel: CompiledKernel, pass_: Pass, chip: Chip) -> str:
    """Return the line of one pass."""
    way = fast_path(disassemble(kernel), kernel.function.name)
    elements = elements_of(kernel.function, pass_, way)
    moved = bytes_of(pass_)
    least = bound(way, elements, moved, chip)
    limit = "memory" if least.memory >= least.arithmetic else f"instructions ({least.by})"
    warps, most_warps = kernel.occupancy
    cells = (
        title,
        moved,
        kernel.registers,
        f"{warps} of {most_warps}",
        f"{len(way.instructions) / elements:.1f}",
        f"{1e12 * least.memory:.2f}",
        f"{1e12 * least.arithmetic:.2f}",
        limit,
    )
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """Print the table of every algorithm that steps on dense gradients."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="sm_90", choices=CHIPS)
    parser.add_argument("--dtype", default="float32")
    asked = parser.parse_args()
    chip = CHIPS[asked.target]
    print(
        f"| {chip.name}, {asked.dtype} | bytes | registers | warps | instructions | memory, ps | "
        "instructions, ps | |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for variant in map(find_variant, every()):
        if variant.demand:
            continue
        program = program_of(variant, asked.dtype)
        for kernel in compile_for(triton_source(program), asked.target):
            index = pass_index_of(program, kernel.function)
            if index is None:
                continue
            title = variant.name
            if len(program.passes) > 1:
                title = f"{title}, pass {index + 1} of {len(program.passes)}"
            print(estimate(title, kernel, program.passes[index], chip), flush=True)


if __name__ == "__main__":
    main()
