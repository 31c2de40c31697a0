"""The walk over all tensors as LLVM IR: threads take units of work and run a pass chunk by chunk.

Two threads walk the five chunks of two units (see `chunks`): the counter is 0, and

    thread A  takes unit 0, the counter is 1   body_0(tensor 0, elements     0 to 32768)
    thread B  takes unit 1, the counter is 2   body_0(tensor 0, elements 32768 to 65536)
                                               body_0(tensor 0, elements 65536 to 70000)
                                               body_0(tensor 1, elements     0 to 10)
                                               body_0(tensor 2, elements     0 to 5)
    thread A  takes unit 2, the counter is 3   there are only 2 units: it is done
    thread B  takes unit 3, the counter is 4   it is done, too

Which thread takes which unit differs from run to run; what a chunk computes does not.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..graph.passes import Pass, Program
from ..llvm.code import local

# Elements of one tensor that a thread takes at a time; a reduction has one partial result for each.
CHUNK = 32768
# What a worker is told: 64-bit fields of one array. `counter` is the next unit of work to take,
# shared by all. Arrays with a value for each unit, chunk or tensor follow, see `chunks.Chunks`.
# `pointers` (column, tensor) and `temporaries` (temporary, tensor) are addresses; `setting_index`
# (tensor) says which line of `table` (setting, input), the uniforms, a tensor has; `partials`
# (chunk, reduction) are results. `finish` is the function that ends a thread's part, with the words
# at `finished`, see `team`.
FIELDS = (
    "counter",
    "units",
    "unit_begin",
    "chunk_tensor",
    "chunk_start",
    "chunk_stop",
    "chunk_offset",
    "group_lines",
    "length",
    "tensors",
    "pointers",
    "temporaries",
    "setting_index",
    "table",
    "partials",
    "settings",
    "leaves",
    "finish",
    "finished",
)
# Fields that a worker reads once, when it begins.
WORKER_FIELDS = (*FIELDS[1:-4], "finish")
# Fields that are numbers, not addresses.
COUNTS = ("units", "tensors", "settings")

# With no threads allowed, only the uniforms are computed: the caller runs the workers itself.
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


def walk(program: Program, pass_: Pass, pass_index: int) -> str:
    """Return the LLVM text of `worker_k` and `launch_k`, where k is the pass's index.

    `worker_k(arguments)` is a thread's share of the pass. `launch_k(arguments, threads, parallel)`
    computes the uniforms and starts the workers; `arguments` are FIELDS.
    """
    fields = "\n".join(_fields("settings", "table", "leaves"))
    finished = FIELDS.index("finished")
    launch = LAUNCH.format(k=pass_index, fields=fields, finished=finished)
    return f"{_worker(program, pass_, pass_index)}\n{launch}"


def column_names(pass_: Pass) -> list[str]:
    """Return the columns and temporaries that a pass touches, loads first."""
    names = [str(node.attr) for node in pass_.loads]
    names += [reduction.into for reduction in pass_.sums]
    names += [name for name, _ in pass_.stores]
    return list(dict.fromkeys(names))


def body_head(pass_: Pass, pass_index: int, *, by_lines: bool) -> str:
    """Return the first line of `body_k`.

    It walks elements [begin, end), or lines of `length` elements, `group_lines` of them a matrix.
    """
    arguments = [f"ptr noalias {local(name)}" for name in column_names(pass_)]
    arguments += ["ptr noalias %uniforms", "i64 %begin", "i64 %end"]
    if by_lines:
        arguments += ["i64 %group_lines", "i64 %length", "i64 %offset"]
    if pass_.reductions:
        arguments.append("ptr noalias %partial")
    # No builtins: a loop that only fills or copies a column must not become a call of memset or
    # memcpy.
    attributes = 'noinline nounwind "no-builtins"'
    return f"define internal void @body_{pass_index}({', '.join(arguments)}) {attributes} {{"


def _worker(program: Program, pass_: Pass, pass_index: int) -> str:
    """Return `worker_k`: it takes units from the shared counter until none is left."""
    names = column_names(pass_)
    lines = [
        *_take_unit(pass_index),
        *_read_chunk(program, pass_),
        *_column_pointers(program, names),
    ]
    arguments = [f"ptr %pointer.{i}" for i in range(len(names))]
    arguments += ["ptr %uniforms", "i64 %start", "i64 %stop"]
    if program.by_lines:
        for name, index in (
            ("group_lines", "%tensor"),
            ("length", "%tensor"),
            ("chunk_offset", "%c"),
        ):
            lines += _load(f"this_{name}", "i64", name, index)
            arguments.append(f"i64 %this_{name}")
    if pass_.reductions:
        lines += _partial(len(pass_.reductions))
        arguments.append("ptr %partial")
    lines += [
        f"  call void @body_{pass_index}({', '.join(arguments)})",
        "  %c_next = add i64 %c, 1",
        "  %c_more = icmp slt i64 %c_next, %last",
        "  br i1 %c_more, label %chunk, label %take",
        *_worker_end(),
    ]
    return "\n".join(lines)


def _take_unit(pass_index: int) -> list[str]:
    """Return the worker's head: it takes a unit, whose chunks are [first, last)."""
    return [
        f"define void @worker_{pass_index}(ptr %arguments) nounwind {{",
        "entry:",
        *_fields(*WORKER_FIELDS),
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
    ]


def _read_chunk(program: Program, pass_: Pass) -> list[str]:
    """Return the lines that read chunk c: its tensor, its lines, and its tensor's uniforms."""
    number = "float" if program.compute == "f32" else "double"
    return [
        "chunk:",
        "  %c = phi i64 [ %first, %work ], [ %c_next, %chunk ]",
        *_load("tensor", "i64", "chunk_tensor", "%c"),
        *_load("start", "i64", "chunk_start", "%c"),
        *_load("stop", "i64", "chunk_stop", "%c"),
        *_load("setting", "i64", "setting_index", "%tensor"),
        f"  %table_offset = mul i64 %setting, {len(pass_.inputs)}",
        f"  %uniforms = getelementptr {number}, ptr %table, i64 %table_offset",
    ]


def _partial(reductions: int) -> list[str]:
    """Return the lines that make `%partial`: where a chunk's partial sums are."""
    return [
        f"  %partial_offset = mul i64 %c, {reductions}",
        "  %partial = getelementptr double, ptr %partials, i64 %partial_offset",
    ]


def _worker_end() -> list[str]:
    """Return `done`: if there is a team, the worker tells it that it has finished."""
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
    """Return the lines that read where this tensor's columns and temporaries are."""
    columns = [column.name for column in program.columns]
    temporaries = [temporary.name for temporary in program.temporaries]
    lines = []
    for i, name in enumerate(names):
        is_column = name in columns
        table = "pointers" if is_column else "temporaries"
        table_line = (columns if is_column else temporaries).index(name)
        lines += [
            f"  %table_line.{i} = mul i64 %tensors, {table_line}",
            f"  %index.{i} = add i64 %table_line.{i}, %tensor",
        ]
        lines += _load(f"pointer.{i}", "ptr", table, f"%index.{i}")
    return lines


def _fields(*names: str) -> list[str]:
    """Return the lines that load these fields of `%arguments`."""
    lines = []
    for name in names:
        type = "i64" if name in COUNTS else "ptr"
        lines += [f"  %{name}_at = getelementptr i64, ptr %arguments, i64 {FIELDS.index(name)}"]
        lines += [f"  %{name} = load {type}, ptr %{name}_at"]
    return lines


def _load(name: str, type: str, array: str, index: str) -> Sequence[str]:
    """Return the lines that load one value of an array."""
    return (
        f"  %{name}_at2 = getelementptr {type}, ptr %{array}, i64 {index}",
        f"  %{name} = load {type}, ptr %{name}_at2",
    )
