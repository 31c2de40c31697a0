"""What kernels would need on a GPU, from their instructions: compiled for a target, without a
device.

    python benchmarks/gpu_estimate.py [--target sm_90] [--dtype float32]      # ten seconds

Prints a Markdown table with a row for each walk over elements: the time that memory takes for one
element, and the least that instructions take, on the GPU that stands for the target.
"""

from __future__ import annotations

import argparse
import re

import torch
from torch import nn

from onepass.app.bench.suite import ELEMENTWISE
from onepass.app.catalog import find_variant
from onepass.app.explain.explanation import graph_of
from onepass.app.explain.sass import bound, fast_path
from onepass.app.explain.target import CHIPS, bytes_of, compile_for, disassemble, elements_of
from onepass.kernel import bind
from onepass.kernel.gpu.source import triton_source
from onepass.kernel.graph.ir import Rank


def main() -> None:
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
    for name in (*ELEMENTWISE, "adafactor", "muon"):
        variant = find_variant(name)
        p = nn.Parameter(torch.zeros(2, 2, dtype=getattr(torch, asked.dtype)))
        graph = graph_of(variant.cls([p], **variant.options))
        program = bind(graph, tuple((column, asked.dtype) for column in ("g", "p", *graph.state)))
        for one in compile_for(triton_source(program), asked.target):
            found = re.fullmatch(r"pass_(\d+)", one.function.name)
            if found is None or program.passes[int(found[1])].domain != Rank.ELEMENT:
                continue
            walk = program.passes[int(found[1])]
            way = fast_path(disassemble(one), one.function.name)
            elements, moved = elements_of(one.function, walk, way), bytes_of(walk)
            least = bound(way, elements, moved, chip)
            title = (
                name
                if len(program.passes) == 1
                else f"{name}, pass {int(found[1]) + 1} of {len(program.passes)}"
            )
            limit = "memory" if least.memory >= least.arithmetic else f"instructions ({least.by})"
            print(
                f"| {title} | {moved} | {one.registers} | {one.occupancy[0]} of "
                f"{one.occupancy[1]} | {len(way.instructions) / elements:.1f} | "
                f"{1e12 * least.memory:.2f} | {1e12 * least.arithmetic:.2f} | {limit} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
