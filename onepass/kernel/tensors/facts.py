"""What tensors are at this moment: their addresses, and whether their facts still are what a plan
was built for.

Nothing is remembered about addresses. At every launch the address, dtype, device, sizes, strides
and storage size of every tensor are read again, so that no `.data` swap, `resize_`, `set_`,
`swap_tensors` or storage resize can leave a stale pointer behind. Asking Python for six facts of a
tensor takes half a microsecond; torch's stable C interface (the one that ahead-of-time compiled
models link against) answers in a few nanoseconds, from compiled code.

That interface takes the address of an `at::Tensor`, which every Python tensor has inside, at an
offset that is found by looking (`object_layout`). Where it is not found, `_cdata` supplies the same
at 0.1 us a tensor; where torch exports no such interface, Python is asked after all. The three ways
are tested to agree.

What kind of tensor it is (lazily negated or conjugated, made in inference mode, a wrapper of
functorch's) is said by its dispatch keys, one word of the TensorImpl, whose offset is found by
looking, too (`keys_offset`).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..graph.caches import once
from ..llvm.native import Library
from .memory import PLAIN, extent, has_storage

# One row of int64 for each tensor; `layout` is an offset into the sizes and strides of all tensors.
FACTS = ("dtype", "device_type", "device_index", "dim", "layout", "bytes", "itemsize", "keys")
QUESTIONS = {
    "layout": "i32",
    "dtype": "i32",
    "device_type": "i32",
    "device_index": "i32",
    "dim": "i64",
    "storage_size": "i64",
    "storage_offset": "i64",
    "sizes": "ptr",
    "strides": "ptr",
    "data_ptr": "ptr",
}


class Expected:
    """The facts that tensors must have: those of `like`, one strided tensor for each."""

    def __init__(self, like: Sequence[Tensor]) -> None:
        self.count = len(like)
        # Most tensors have the facts of others.
        kinds: dict[tuple[Facts, int], int] = {}
        kind = [kinds.setdefault((facts_of(t), extent(t)), len(kinds)) for t in like]
        layouts: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
        words: list[int] = []
        rows = []
        for (dtype, device, sizes, strides, keys), size in kinds:
            if (sizes, strides) not in layouts:
                layouts[sizes, strides] = len(words)
                words += [*sizes, *strides]
            codes = _codes(dtype, device) if answers() else (0, 0, 0)
            rows.append((*codes, len(sizes), layouts[sizes, strides], size, dtype.itemsize, keys))
        listed = [facts for facts, _ in kinds]
        self.facts = [listed[i] for i in kind]
        self.rows = np.array(rows, dtype=np.int64).reshape(-1, len(FACTS))[kind]
        self.bytes = self.rows[:, FACTS.index("bytes")]
        self.words = np.array(words or [0], dtype=np.int64)
        # Filled by `compare`: whoever calls it holds a lock until the launch is over.
        self.pointers = np.zeros(self.count, np.uint64)
        self.changed = np.zeros(self.count, np.uint8)
        kept = (self.rows, self.words, self.pointers, self.changed)
        self._addresses = [a.__array_interface__["data"][0] for a in kept]

    def compare(self, tensors: Sequence[Tensor]) -> int:
        """Read every tensor; returns how many differ from what is expected. Fills `pointers` and
        `changed`.

        What is no plain tensor (None, a subclass) differs.
        """
        if len(tensors) != self.count:
            raise ValueError(f"expected {self.count} tensors, got {len(tensors)}")
        native = _native()
        if native is None:
            for i, (t, facts) in enumerate(zip(tensors, self.facts, strict=True)):
                self.changed[i] = not is_as(t, facts)
                self.pointers[i] = 0 if self.changed[i] else t.data_ptr()
            return int(np.count_nonzero(self.changed))
        if object_layout():
            objects = np.fromiter(tensors, object, self.count)
        else:
            cdata = [t._cdata if type(t) in PLAIN else 0 for t in tensors]
            slots = np.array(cdata, np.uint64)
            objects = slots.__array_interface__["data"][0] + 8 * np.arange(
                self.count, dtype=np.uint64
            )
        return native[1](self.count, objects.__array_interface__["data"][0], *self._addresses)


Facts = tuple[torch.dtype, torch.device, tuple[int, ...], tuple[int, ...], int]


def facts_of(t: Tensor) -> Facts:
    """What may not change between the making of a plan and a step: dtype, device, sizes, strides
    and dispatch keys."""
    return t.dtype, t.device, tuple(t.shape), t.stride(), _keys(t)


def _keys(t: Tensor) -> int:
    keys = torch._C._dispatch_keys(t).raw_repr()
    # As a signed number of 64 bits.
    return keys - (1 << 64) if keys >= 1 << 63 else keys


def is_as(t: object, facts: Facts) -> bool:
    """Whether something is a plain tensor with these facts and with memory for all of its elements;
    Python's way."""
    if (
        not isinstance(t, Tensor)
        or type(t) not in PLAIN
        or t.layout != torch.strided
        or t.is_nested
    ):
        return False
    return facts_of(t) == facts and has_storage(t)


@cache
def answers() -> dict[str, int]:
    """The addresses of torch's C functions that answer `QUESTIONS`; nothing where this torch does
    not export them."""
    name = {"darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}.get(
        sys.platform, "libtorch_cpu.so"
    )
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
        functions = {q: getattr(library, f"aoti_torch_get_{q}") for q in QUESTIONS}
    except (OSError, AttributeError):
        return {}
    return {q: ctypes.cast(f, ctypes.c_void_p).value or 0 for q, f in functions.items()}


@cache
def object_layout() -> tuple[int, int] | None:
    """Where a Python object keeps its type and a Python tensor its at::Tensor, in bytes; None if it
    cannot be told.

    Both are found by comparing the words of several living objects with what Python says of them.
    """
    if sys.implementation.name != "cpython":
        return None
    tensors = [
        torch.empty(1),
        torch.empty(2, 3),
        torch.nn.Parameter(torch.empty(1)),
        torch.empty(0, dtype=torch.int8),
    ]
    size = torch.Tensor.__basicsize__ // 8
    words = [list((ctypes.c_uint64 * size).from_address(id(t))) for t in tensors]
    types = [
        i
        for i in range(size)
        if all(w[i] == id(type(t)) for w, t in zip(words, tensors, strict=True))
    ]
    places = [
        i for i in range(size) if all(w[i] == t._cdata for w, t in zip(words, tensors, strict=True))
    ]
    return (8 * types[0], 8 * places[0]) if len(types) == len(places) == 1 else None


@cache
def keys_offset() -> int | None:
    """Where a TensorImpl keeps its dispatch keys, in bytes; None if it cannot be told.

    Found by comparing the words of TensorImpls of several kinds with what Python says of them.
    """
    # A TensorImpl is larger than this on every platform of 64 bits.
    words = 24
    with torch.inference_mode():
        odd = [torch.empty(1)]
    odd += [torch._neg_view(torch.empty(1)), torch.empty(1, dtype=torch.complex64).conj()]
    odd += [torch.empty(1, device="meta")]
    tensors = [torch.empty(2), torch.empty(2, 3, dtype=torch.int8), *odd]
    contents = [list((ctypes.c_int64 * words).from_address(t._cdata)) for t in tensors]
    places = [
        i
        for i in range(words)
        if all(c[i] == _keys(t) for c, t in zip(contents, tensors, strict=True))
    ]
    return 8 * places[0] if len(places) == 1 else None


@lru_cache(maxsize=256)
def _codes(dtype: torch.dtype, device: torch.device) -> tuple[int, int, int]:
    """torch's numbers for a dtype and a device, asked of a tensor that has them."""
    sample = torch.empty(0, dtype=dtype, device=device)
    # A handle is the address of an at::Tensor, which is one pointer to what Python calls `_cdata`.
    slot = ctypes.c_uint64(sample._cdata)

    def ask(question: str) -> int:
        answer = ctypes.c_int32()
        function = ctypes.PYFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p)(
            answers()[question]
        )
        if function(ctypes.addressof(slot), ctypes.addressof(answer)):
            raise RuntimeError(f"torch could not tell the {question} of a tensor on {device}")
        return answer.value

    return ask("dtype"), ask("device_type"), ask("device_index")


@once
def _native():
    """The compiled comparison and its library, or None where torch does not let it ask."""
    addresses, keys = answers(), keys_offset()
    if not addresses or keys is None:
        return None
    library = Library(_source(addresses, object_layout(), keys))
    # PYFUNCTYPE keeps the interpreter lock: no other thread may swap or free a tensor while it is
    # being read.
    signature = (ctypes.c_int64, ctypes.c_int64, *[ctypes.c_void_p] * 5)
    return library, ctypes.PYFUNCTYPE(*signature)(library.address("compare"))


def _source(addresses: dict[str, int], places: tuple[int, int] | None, keys: int) -> str:
    """compare(count, objects, rows, words, pointers, changed), asking in the order that makes each
    question safe.

    `objects` are Python objects where `places` says how to find a tensor inside one, else addresses
    of `_cdata`; `keys` is the dispatch keys' place in a TensorImpl.
    """
    lines = [
        "declare void @llvm.prefetch.p0(ptr, i32, i32, i32)",
        (
            "define i64 @compare(i64 %count, ptr %objects, ptr %rows, ptr %words, ptr %pointers, "
            "ptr %changed) nounwind {"
        ),
        "entry:",
        *(f"  %{q} = alloca {type}" for q, type in QUESTIONS.items()),
        *(f"  %ask_{q} = inttoptr i64 {address} to ptr" for q, address in addresses.items()),
        "  %any = icmp sgt i64 %count, 0",
        "  br i1 %any, label %tensor, label %done",
        *_next_tensor(places),
        *_compare_keys(keys),
        *_compare_codes(),
        *_compare_layout(),
        *_read_address(),
        "differs:",
        "  br label %end",
        "end:",
        "  %wrong = phi i8 [ 0, %nothing ], [ 0, %answer_data_ptr_ ], [ 1, %differs ]",
        "  %changed_to = getelementptr i8, ptr %changed, i64 %i",
        "  store i8 %wrong, ptr %changed_to",
        "  %one = zext i8 %wrong to i64",
        "  %total = add i64 %sum, %one",
        "  %next = add i64 %i, 1",
        "  %more = icmp slt i64 %next, %count",
        "  br i1 %more, label %tensor, label %done",
        "done:",
        "  %result = phi i64 [ 0, %entry ], [ %total, %end ]",
        "  ret i64 %result",
        "}",
    ]
    return "\n".join(lines)


def _next_tensor(places: tuple[int, int] | None) -> list[str]:
    """The loop's head: where the tensor is, what is expected of it, and whether it is a plain
    tensor at all."""
    type_at, tensor_at = places or (0, 0)
    lines = [
        "tensor:",
        "  %i = phi i64 [ 0, %entry ], [ %next, %end ]",
        "  %sum = phi i64 [ 0, %entry ], [ %total, %end ]",
        "  %object_at = getelementptr ptr, ptr %objects, i64 %i",
        "  %object = load ptr, ptr %object_at",
        f"  %handle = getelementptr i8, ptr %object, i64 {tensor_at}",
        "  %pointer_to = getelementptr i64, ptr %pointers, i64 %i",
        f"  %row_index = mul i64 %i, {len(FACTS)}",
        "  %row = getelementptr i64, ptr %rows, i64 %row_index",
    ]
    for f, fact in enumerate(FACTS):
        lines += [
            f"  %want_{fact}_at = getelementptr i64, ptr %row, i64 {f}",
            f"  %want_{fact} = load i64, ptr %want_{fact}_at",
        ]
    if places:
        lines += [
            f"  %type_at = getelementptr i8, ptr %object, i64 {type_at}",
            "  %type = load i64, ptr %type_at",
        ]
        lines += [f"  %known{i} = icmp eq i64 %type, {id(t)}" for i, t in enumerate(PLAIN)]
        lines += ["  %known01 = or i1 %known0, %known1", "  %plain = or i1 %known01, %known2"]
    else:
        lines += ["  %impl = load i64, ptr %handle", "  %plain = icmp ne i64 %impl, 0"]
    return [*lines, "  br i1 %plain, label %keys, label %differs"]


def _compare_keys(offset: int) -> list[str]:
    """What kind of tensor it is; an undefined one, which only C++ can make, has no TensorImpl."""
    return [
        "keys:",
        "  %tensor_impl = load ptr, ptr %handle",
        "  %defined = icmp ne ptr %tensor_impl, null",
        "  br i1 %defined, label %read_keys, label %differs",
        "read_keys:",
        f"  %keys_at = getelementptr i8, ptr %tensor_impl, i64 {offset}",
        "  %is_keys = load i64, ptr %keys_at",
        "  %same_keys = icmp eq i64 %is_keys, %want_keys",
        "  br i1 %same_keys, label %ask_layout_, label %differs",
    ]


def _compare_codes() -> list[str]:
    """Strided layout first, which makes the other questions safe; then dtype, device and number of
    dimensions."""
    lines = ["ask_layout_:", *_ask("layout"), "  %strided = icmp eq i32 %is_layout, 0"]
    lines += ["  br i1 %strided, label %ask_dtype_, label %differs"]
    order = ["dtype", "device_type", "device_index", "dim"]
    for question, after in zip(order, [*order[1:], "sizes"], strict=True):
        lines += [f"ask_{question}_:", *_ask(question)]
        if QUESTIONS[question] == "i32":
            lines += [f"  %wide_{question} = sext i32 %is_{question} to i64"]
        value = f"%wide_{question}" if QUESTIONS[question] == "i32" else f"%is_{question}"
        lines += [f"  %same_{question} = icmp eq i64 {value}, %want_{question}"]
        lines += [f"  br i1 %same_{question}, label %ask_{after}_, label %differs"]
    return lines


def _compare_layout() -> list[str]:
    """Sizes and strides, dimension by dimension."""
    return [
        "ask_sizes_:",
        *_ask("sizes"),
        *_ask("strides"),
        "  %want_sizes = getelementptr i64, ptr %words, i64 %want_layout",
        "  %want_strides = getelementptr i64, ptr %want_sizes, i64 %want_dim",
        "  %scalar = icmp eq i64 %want_dim, 0",
        "  br i1 %scalar, label %storage, label %dimension",
        "dimension:",
        "  %d = phi i64 [ 0, %answer_strides_ ], [ %d_next, %dimension_good ]",
        *(
            line
            for what in ("sizes", "strides")
            for line in (
                f"  %{what}_d_at = getelementptr i64, ptr %is_{what}, i64 %d",
                f"  %{what}_d = load i64, ptr %{what}_d_at",
                f"  %want_{what}_d_at = getelementptr i64, ptr %want_{what}, i64 %d",
                f"  %want_{what}_d = load i64, ptr %want_{what}_d_at",
                f"  %same_{what}_d = icmp eq i64 %{what}_d, %want_{what}_d",
            )
        ),
        "  %same_d = and i1 %same_sizes_d, %same_strides_d",
        "  br i1 %same_d, label %dimension_good, label %differs",
        "dimension_good:",
        "  %d_next = add i64 %d, 1",
        "  %d_more = icmp slt i64 %d_next, %want_dim",
        "  br i1 %d_more, label %dimension, label %storage",
    ]


def _read_address() -> list[str]:
    """The address, where the storage holds all elements; 0 where there are none."""
    return [
        "storage:",
        "  %empty = icmp eq i64 %want_bytes, 0",
        "  br i1 %empty, label %nothing, label %ask_storage_",
        "nothing:",
        "  store i64 0, ptr %pointer_to",
        "  br label %end",
        "ask_storage_:",
        *_ask("storage_size"),
        *_ask("storage_offset"),
        "  %skipped = mul i64 %is_storage_offset, %want_itemsize",
        "  %needed = add i64 %skipped, %want_bytes",
        "  %enough = icmp sge i64 %is_storage_size, %needed",
        "  br i1 %enough, label %ask_data_, label %differs",
        "ask_data_:",
        *_ask("data_ptr"),
        "  store ptr %is_data_ptr, ptr %pointer_to",
        # Small tensors are then there when they are needed; an address is all that it takes, also a
        # device's.
        "  call void @llvm.prefetch.p0(ptr %is_data_ptr, i32 0, i32 3, i32 1)",
        "  %null = icmp eq ptr %is_data_ptr, null",
        "  br i1 %null, label %differs, label %end",
    ]


def _ask(question: str) -> list[str]:
    """Ask, and treat an error code as a difference."""
    return [
        f"  %code_{question} = call i32 %ask_{question}(ptr %handle, ptr %{question})",
        f"  %answered_{question} = icmp eq i32 %code_{question}, 0",
        f"  br i1 %answered_{question}, label %answer_{question}_, label %differs",
        f"answer_{question}_:",
        f"  %is_{question} = load {QUESTIONS[question]}, ptr %{question}",
    ]
