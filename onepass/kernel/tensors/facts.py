"""What tensors are at this moment: their addresses, and whether they are as a plan expects them.

Nothing is remembered about addresses. At every launch the address, dtype, device, sizes, strides
and storage size of every tensor are read again. So no `.data` swap, `resize_`, `set_`,
`swap_tensors` or storage resize can leave a stale pointer behind. Asking Python for six facts of a
tensor takes half a microsecond. torch's stable C interface (the one that ahead-of-time compiled
models link against) answers in a few nanoseconds, from compiled code: see `comparison`.

That interface takes the address of an `at::Tensor`, which every Python tensor has inside, at an
offset that is found by looking (`object_layout`). If it is not found, `_cdata` supplies the same at
0.1 us a tensor. If torch exports no such interface, Python is asked after all. The three ways are
tested to agree.

Whether a tensor is lazily negated or conjugated, made in inference mode, or a wrapper of
functorch's, is said by its dispatch keys. They are one word of the TensorImpl, whose offset is
found by looking, too (`keys_offset`).

What is expected of two tensors (3, 4) and of one (4, 3) that is transposed, all float32:

    table     dtype  device  index  dim  layout  bytes  itemsize  keys
                  6       0     -1    2       0     48         4  635655225345
                  6       0     -1    2       0     48         4  635655225345
                  6       0     -1    2       4     48         4  635655225345
    layouts   3 4 4 1  3 4 1 3        sizes and strides, from 0 and from 4 on
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..graph.caches import once
from ..llvm.native import Library, has_interpreter_lock
from .comparison import FACTS, QUESTIONS, comparison
from .memory import PLAIN, extent, has_storage
from .same_words import DECLARATIONS, all_have_words, count_changes, make_row
from .torch_library import address as torch_function
from .words import find_words

Sizes = tuple[int, ...]
# dtype, device, sizes, strides, dispatch keys.
Facts = tuple[torch.dtype, torch.device, Sizes, Sizes, int]


class Expected:
    """The facts that tensors must have, and after each `compare` what they are.

    For each tensor there are `facts`, `bytes` (of memory from the first element to the end of the
    last), and what `compare` fills: `pointers` (0 for a tensor without elements) and `changed`.
    """

    def __init__(self, like: Sequence[Tensor]) -> None:
        """Expect tensors like these: one strided tensor for each."""
        self.count = len(like)
        # Most tensors have the facts of others: a kind is a distinct set of facts.
        kinds: dict[tuple[Facts, int], int] = {}
        # For each tensor, the number of its kind.
        self.kind_of: list[int] = []
        rows = []
        for t in like:
            kind = (facts_of(t), extent(t))
            if kind not in kinds:
                rows.append(_row(t))
            self.kind_of.append(kinds.setdefault(kind, len(kinds)))
        # The words of each kind (kinds, ROW_LENGTH), or None if they are not known of all.
        self.rows = None if any(row is None for row in rows) else np.array(rows, np.uint64)
        facts_of_kinds = [facts for facts, _ in kinds]
        table, layouts = _tables(kinds)
        self.facts = [facts_of_kinds[index] for index in self.kind_of]
        self._table = table[self.kind_of]
        self._layouts = layouts
        self.bytes = self._table[:, FACTS.index("bytes")]
        # Filled by `compare`: whoever calls it holds a lock until the launch is over.
        self.pointers = np.zeros(self.count, np.uint64)
        self.changed = np.zeros(self.count, np.uint8)
        self._addresses = _addresses(self._table, self._layouts, self.pointers, self.changed)
        self._kinds = np.array(self.kind_of, np.int64)
        self._scratch = np.zeros((2, self.count), np.uint64)
        if self.rows is not None:
            arrays = (self._kinds, self.rows, self._scratch, self.pointers)
            self._addresses_of_words = _addresses(*arrays)

    def compare(self, tensors: Sequence[Tensor]) -> int:
        """Read every tensor, and return how many differ from what is expected.

        Fills `pointers` and `changed`. What is not a plain tensor (None, a subclass) differs.

        Raises `ValueError` if there are more or fewer tensors than expected.
        """
        if len(tensors) != self.count:
            raise ValueError(f"expected {self.count} tensors, got {len(tensors)}")
        native = _native()
        if native is None:
            return self._compare_in_python(tensors)
        if not object_layout():
            cdata = [t._cdata if type(t) in PLAIN else 0 for t in tensors]
            slots = np.array(cdata, np.uint64)
            offsets = 8 * np.arange(self.count, dtype=np.uint64)
            objects = slots.__array_interface__["data"][0] + offsets
            return native.compare(self.count, *_addresses(objects), *self._addresses)
        has_words = native.all_have_words if self.rows is not None else None
        if type(tensors) is list and has_words is not None:
            differs = has_words(id(tensors), *self._addresses_of_words)
            if not differs:
                self.changed.fill(0)
                return 0
        objects = np.fromiter(tensors, object, self.count)
        return native.compare(self.count, *_addresses(objects), *self._addresses)

    def list_changed(self) -> list[int]:
        """Return the indices of the tensors that differed when they were compared last."""
        return np.flatnonzero(self.changed).tolist()

    def _compare_in_python(self, tensors: Sequence[Tensor]) -> int:
        """Do what `compare` does, where torch's C functions are missing."""
        for i, (t, facts) in enumerate(zip(tensors, self.facts, strict=True)):
            self.changed[i] = not is_as(t, facts)
            self.pointers[i] = 0 if self.changed[i] else t.data_ptr()
        return int(np.count_nonzero(self.changed))


def _tables(kinds: Iterable[tuple[Facts, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return a table with a line of int64 for each kind, in the order of `FACTS`, and the layouts.

    A layout is written down once: its sizes and then its strides.
    """
    begins: dict[tuple[Sizes, Sizes], int] = {}
    layouts: list[int] = []
    table = []
    for (dtype, device, sizes, strides, keys), size in kinds:
        if (sizes, strides) not in begins:
            begins[sizes, strides] = len(layouts)
            layouts += [*sizes, *strides]
        codes = _codes(dtype, device) if answers() else (0, 0, 0)
        layout = begins[sizes, strides]
        table.append((*codes, len(sizes), layout, size, dtype.itemsize, keys))
    lines = np.array(table, dtype=np.int64).reshape(-1, len(FACTS))
    return lines, np.array(layouts or [0], dtype=np.int64)


def facts_of(t: Tensor) -> Facts:
    """Return what may not change between the making of a plan and a step.

    That is dtype, device, sizes, strides and dispatch keys.
    """
    return t.dtype, t.device, tuple(t.shape), t.stride(), _keys(t)


def _keys(t: Tensor) -> int:
    """Return a tensor's dispatch keys: one word of its TensorImpl."""
    keys = torch._C._dispatch_keys(t).raw_repr()
    # As a signed number of 64 bits.
    return keys - (1 << 64) if keys >= 1 << 63 else keys


def is_as(t: object, facts: Facts) -> bool:
    """Whether something is a plain tensor with these facts, and has memory for all its elements.

    This asks Python, unlike `Expected.compare`.
    """
    if not isinstance(t, Tensor) or type(t) not in PLAIN:
        return False
    if t.layout != torch.strided or t.is_nested:
        return False
    return facts_of(t) == facts and has_storage(t)


@cache
def answers() -> dict[str, int]:
    """Return the addresses of torch's C functions that answer `QUESTIONS`.

    Empty if this torch does not export them.
    """
    addresses = {question: torch_function(f"aoti_torch_get_{question}") for question in QUESTIONS}
    return addresses if all(addresses.values()) else {}


@cache
def object_layout() -> tuple[int, int] | None:
    """Return where a Python tensor keeps its type and its at::Tensor, in bytes; None if unknown.

    Both are found by comparing the words of several living objects with what Python says of them:
    (8, 16) in CPython 3.11.
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
    contents = [list((ctypes.c_uint64 * size).from_address(id(t))) for t in tensors]
    types = _offsets(contents, [id(type(t)) for t in tensors])
    handles = _offsets(contents, [t._cdata for t in tensors])
    if len(types) != 1 or len(handles) != 1:
        return None
    return types[0], handles[0]


def _offsets(contents: Sequence[Sequence[int]], expected: Sequence[int]) -> list[int]:
    """Return at which offsets, in bytes, all objects have the words that are expected of them."""
    found = []
    for index in range(len(contents[0])):
        words = [content[index] for content in contents]
        if words == list(expected):
            found.append(8 * index)
    return found


@cache
def keys_offset() -> int | None:
    """Return where a TensorImpl keeps its dispatch keys, in bytes; None if it cannot be told.

    It is found by comparing the words of TensorImpls with what Python says of the tensors.
    """
    # A TensorImpl is larger than this on every platform of 64 bits.
    words = 24
    with torch.inference_mode():
        inference = torch.empty(1)
    tensors = [
        torch.empty(2),
        torch.empty(2, 3, dtype=torch.int8),
        inference,
        torch._neg_view(torch.empty(1)),
        torch.empty(1, dtype=torch.complex64).conj(),
        torch.empty(1, device="meta"),
    ]
    contents = [list((ctypes.c_int64 * words).from_address(t._cdata)) for t in tensors]
    offsets = _offsets(contents, [_keys(t) for t in tensors])
    return offsets[0] if len(offsets) == 1 else None


@lru_cache(maxsize=256)
def _codes(dtype: torch.dtype, device: torch.device) -> tuple[int, int, int]:
    """Return torch's numbers for a dtype and a device, asked of a tensor that has them."""
    sample = torch.empty(0, dtype=dtype, device=device)
    # A handle is the address of an at::Tensor, which is one pointer to what Python calls `_cdata`.
    slot = ctypes.c_uint64(sample._cdata)

    def ask(question: str) -> int:
        answer = ctypes.c_int32()
        signature = ctypes.PYFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p)
        function = signature(answers()[question])
        if function(ctypes.addressof(slot), ctypes.addressof(answer)):
            raise RuntimeError(f"torch could not tell the {question} of a tensor on {device}")
        return answer.value

    return ask("dtype"), ask("device_type"), ask("device_index")


class Native(NamedTuple):
    """The compiled functions: `compare` asks torch, the others look at words.

    Those are None where the places of words are not known.
    """

    library: Library
    compare: Callable[..., int]
    all_have_words: Callable[..., int] | None = None
    count_changes: Callable[[int], None] | None = None


@once
def _native() -> Native | None:
    """Return the compiled functions, or None if torch cannot be asked by machine code."""
    addresses, keys = answers(), keys_offset()
    words, layout = find_words(), object_layout()
    if not addresses or keys is None or not has_interpreter_lock():
        return None
    text = DECLARATIONS + comparison(addresses, layout, keys)
    # PYFUNCTYPE keeps the interpreter lock: no other thread may swap or free a tensor while it is
    # being read.
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    signature = ctypes.PYFUNCTYPE(integer, integer, *[pointer] * 5)
    if words is None or layout is None:
        library = Library(text)
        return Native(library, signature(library.address("compare")))
    text += all_have_words(words, layout) + count_changes(words, layout)
    library = Library(text)
    return Native(
        library,
        signature(library.address("compare")),
        ctypes.PYFUNCTYPE(integer, *[pointer] * 5)(library.address("all_have_words")),
        ctypes.PYFUNCTYPE(None, pointer)(library.address("count_changes")),
    )


def count_as_changed(tensors: list[Tensor]) -> None:
    """Let autograd know that plain tensors have changed: count in their version counters."""
    native = _native()
    if native is None or native.count_changes is None:
        torch.autograd.graph.increment_version(tensors)
    else:
        native.count_changes(id(tensors))


def _addresses(*arrays: np.ndarray) -> list[int]:
    return [array.__array_interface__["data"][0] for array in arrays]


def _row(t: Tensor) -> np.ndarray | None:
    """Return the words of a tensor's kind, or None if they are not known."""
    words = find_words()
    return None if words is None or object_layout() is None else make_row(t, words)
