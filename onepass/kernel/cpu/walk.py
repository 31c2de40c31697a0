"""The walk over all tensors as LLVM IR: threads take units of work and call a pass's mathematics
chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence

from ..graph.passes import Pass, Program
from ..llvm.code import local

# Elements of one tensor that a thread takes at a time; a reduction has one partial result for each.
CHUNK = 32768
# What a worker is told: 64-bit fields of one array. The counter is the next unit of work to take,
# shared by all; `finish` is what ends a thread's part, with the words at `finished`, see `team.py`.
FIELDS = (
    "counter",
    "units",
    "unit_begin",
    "chunk_tensor",
    "chunk_start",
    "chunk_stop",
    "chunk_offset",
    "per",
    "length",
    "tensors",
    "pointers",
    "temporaries",
    "rows",
    "table",
    "partials",
    "settings",
    "leaves",
    "finish",
    "finished",
)
COUNTS = ("units", "tensors", "settings")

# With no threads allowed the rows are computed and nothing else: the caller runs the workers
# itself.
LAUNCH = """
define void @launch_{k}(ptr %arguments, i32 %threads, ptr %parallel) {{
  store i64 0, ptr %arguments
  %finished_at = getelementptr i64, ptr %arguments, i64 {finished}
  store i64 0, ptr %finished_at
{fields}
  call void @host_{k}(ptr %leaves, i64 %settings, ptr %table)
  switch i32 %threads, label %all [ i32 0, label %none
                                    i32 1, label %one ]
none:
  ret void
one:
  call void @worker_{k}(ptr %arguments)
  ret void
all:
  call void %parallel(ptr @worker_{k}, ptr %arguments, i32 %threads, i32 0)
  ret void
}}
"""


def walk(program: Program, one: Pass, k: int) -> str:
    """`worker_k`, a thread's share of pass k, and `launch_k`, which computes the rows and starts
    the workers."""
    fields = "\n".join(_fields("settings", "table", "leaves"))
    return (
        _worker(program, one, k)
        + "\n"
        + LAUNCH.format(k=k, fields=fields, finished=FIELDS.index("finished"))
    )


def column_names(one: Pass) -> list[str]:
    """The columns and temporaries that a pass touches, loads first."""
    loads = (str(node.attr) for node in one.loads)
    return list(
        dict.fromkeys([*loads, *(s.into for s in one.sums), *(name for name, _ in one.stores)])
    )


def body_head(one: Pass, k: int, *, by_lines: bool) -> str:
    """The first line of `body_k`, which walks elements, or lines of `length` elements, `per` of
    them a matrix."""
    columns = [f"ptr noalias {local(name)}" for name in column_names(one)]
    lines = ["i64 %per", "i64 %length", "i64 %offset"] if by_lines else []
    partial = ["ptr noalias %partial"] if one.reductions else []
    arguments = ", ".join(
        [*columns, "ptr noalias %row", "i64 %begin", "i64 %end", *lines, *partial]
    )
    # No builtins: a loop that only fills or copies a column must not become a call of memset or
    # memcpy.
    return f'define internal void @body_{k}({arguments}) noinline nounwind "no-builtins" {{'


def _worker(program: Program, one: Pass, k: int) -> str:
    """`worker_k`: take units of work from the shared counter until none is left; a unit is a run of
    chunks."""
    names = column_names(one)
    number = "float" if program.compute == "f32" else "double"
    lines = [
        f"define void @worker_{k}(ptr %arguments) nounwind {{",
        "entry:",
        *_fields(*FIELDS[1:-4], "finish"),
        "  br label %take",
        "take:",
        "  %unit = atomicrmw add ptr %arguments, i64 1 monotonic",
        "  %left = icmp slt i64 %unit, %units",
        "  br i1 %left, label %work, label %done",
        "work:",
        *_load("first", "i64", "unit_begin", "%unit"),
        "  %after = add i64 %unit, 1",
        *_load("last", "i64", "unit_begin", "%after"),
        "  br label %chunk",
        "chunk:",
        "  %c = phi i64 [ %first, %work ], [ %c_next, %chunk ]",
        *_load("tensor", "i64", "chunk_tensor", "%c"),
        *_load("start", "i64", "chunk_start", "%c"),
        *_load("stop", "i64", "chunk_stop", "%c"),
        *_load("r", "i64", "rows", "%tensor"),
        f"  %row_offset = mul i64 %r, {len(one.inputs)}",
        f"  %row = getelementptr {number}, ptr %table, i64 %row_offset",
        *_column_pointers(program, names),
    ]
    arguments = [
        *(f"ptr %pointer.{i}" for i in range(len(names))),
        "ptr %row",
        "i64 %start",
        "i64 %stop",
    ]
    if program.by_lines:
        for name, index in (("per", "%tensor"), ("length", "%tensor"), ("chunk_offset", "%c")):
            lines += _load(f"this_{name}", "i64", name, index)
            arguments.append(f"i64 %this_{name}")
    if one.reductions:
        lines += _partial(len(one.reductions))
        arguments.append("ptr %partial")
    lines += [
        f"  call void @body_{k}({', '.join(arguments)})",
        "  %c_next = add i64 %c, 1",
        "  %c_more = icmp slt i64 %c_next, %last",
        "  br i1 %c_more, label %chunk, label %take",
        *_worker_end(),
    ]
    return "\n".join(lines)


def _partial(reductions: int) -> list[str]:
    """`%partial`: where a chunk's partial sums are."""
    return [
        f"  %partial_offset = mul i64 %c, {reductions}",
        "  %partial = getelementptr double, ptr %partials, i64 %partial_offset",
    ]


def _worker_end() -> list[str]:
    """`done`: a worker that is one of a team tells it."""
    return [
        "done:",
        "  %team = icmp ne ptr %finish, null",
        "  br i1 %team, label %end_together, label %end",
        "end_together:",
        f"  %finished = getelementptr i64, ptr %arguments, i64 {FIELDS.index('finished')}",
        "  call void %finish(ptr %finished)",
        "  br label %end",
        "end:",
        "  ret void",
        "}",
    ]


def _column_pointers(program: Program, names: Sequence[str]) -> list[str]:
    """Where this tensor's columns and temporaries are, from two tables (column, tensor)."""
    tables = {
        "pointers": [c.name for c in program.columns],
        "temporaries": [t.name for t in program.temporaries],
    }
    lines = []
    for i, name in enumerate(names):
        table, known = next((table, known) for table, known in tables.items() if name in known)
        lines += [
            f"  %row.{i} = mul i64 %tensors, {known.index(name)}",
            f"  %index.{i} = add i64 %row.{i}, %tensor",
        ]
        lines += _load(f"pointer.{i}", "ptr", table, f"%index.{i}")
    return lines


def _fields(*names: str) -> list[str]:
    lines = []
    for name in names:
        type = "i64" if name in COUNTS else "ptr"
        lines += [f"  %{name}_at = getelementptr i64, ptr %arguments, i64 {FIELDS.index(name)}"]
        lines += [f"  %{name} = load {type}, ptr %{name}_at"]
    return lines


def _load(name: str, type: str, array: str, index: str) -> Sequence[str]:
    return (
        f"  %{name}_at2 = getelementptr {type}, ptr %{array}, i64 {index}",
        f"  %{name} = load {type}, ptr %{name}_at2",
    )
