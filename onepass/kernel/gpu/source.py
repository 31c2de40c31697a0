"""A program as the text of one Triton module.

It holds, for each pass k that has something to do, `values_k` (the mathematics, see `expressions`)
and `pass_k` (the walk, see `blocks` and `tiles`); for each stage `uniforms_s`, which computes on
the device what the host does not know; and `fold`, if sums end in temporaries.
"""

from __future__ import annotations

from ..graph.passes import Program
from .blocks import BlockWalk
from .expressions import PRELUDE, values
from .jit import Function, Source
from .tiles import TileWalk
from .uniforms import stages, uniforms
from .walk import BLOCK

# Adds up what several programs have left of one sum, one share after the other. An entry says where
# the shares are, how many values each has, how many shares there are, and whether it is a sum (0)
# or a maximum (1).
FOLD = """
@triton.jit(do_not_specialize=["first"])
def fold(entries, units, guard, first, GUARDED: tl.constexpr, BLOCK: tl.constexpr):
    if GUARDED:
        if tl.load(guard) != 0:
            return
    unit = first + tl.program_id(0)
    entry = entries + 4 * tl.load(units + 2 * unit)
    start = tl.load(units + 2 * unit + 1).to(tl.int64) * BLOCK
    values = tl.load(entry).to(tl.pointer_type(tl.float64))
    count = tl.load(entry + 1)
    parts = tl.load(entry + 2)
    is_sum = tl.load(entry + 3) == 0
    offset = start + tl.arange(0, BLOCK)
    inside = offset < count
    total = tl.load(values + offset, inside, other=0.0)
    for part in range(1, parts):
        share = tl.load(values + part * count + offset, inside, other=0.0)
        total = tl.where(is_sum, total + share, larger(total, share))
    tl.store(values + offset, total, inside)
"""
FOLD_ARGUMENTS = (("entries", "*i64"), ("units", "*i32"), ("guard", "*fp32"), ("first", "i32"))
# With 4 warps sm_80 has too few registers.
FOLD_WARPS = 8


def triton_source(
    program: Program, numbers: tuple[str, ...] | None = None, number_type: str = "f32"
) -> Source:
    """Return the program as one Triton module.

    `numbers` are the entries of a parameter's state that are one number, if these lie on the device
    (None if the host keeps them). Hypers with these names are read there, and written back, a
    step's number one higher; and the device knows whose step is the first.
    """
    parts = [PRELUDE]
    functions: list[Function] = []
    for stage_index, stage in enumerate(stages(program, numbers is not None)):
        text, function = uniforms(program, stage_index, stage, numbers, number_type)
        parts.append(text)
        functions.append(function)

    address_names = [column.name for column in program.columns]
    address_names += numbers or ()
    address_names += [temporary.name for temporary in program.temporaries]
    walk = TileWalk if program.by_lines else BlockWalk
    for pass_index, pass_ in enumerate(program.passes):
        if pass_.roots:
            writer = walk(program, pass_, pass_index, address_names)
            parts += [values(pass_, pass_index), writer.text()]
            functions.append(writer.function())

    if any(pass_.sums for pass_ in program.passes):
        parts.append(FOLD.strip())
        constants = (("GUARDED", False), ("BLOCK", BLOCK))
        functions.append(Function("fold", FOLD_ARGUMENTS, constants, FOLD_WARPS))
    text = "\n\n\n".join(part.rstrip() for part in parts)
    return Source(text + "\n", tuple(functions))
