"""The text of machine code that compares a tensor's words with a row, and finds its memory.

A row is what all tensors of one kind have: their words, which bits of these matter, the bytes from
the first element to the end of the last, and the bytes of one element. See `words`.
"""

from __future__ import annotations

import ctypes

import numpy as np
from torch import Tensor

from ..llvm.routine import Operand, Routine
from .memory import PLAIN, extent
from .words import WORDS, Words, template

ROW_LENGTH = 2 * WORDS + 2
# Bytes of memory that are fetched at once.
LINE = 64
ALL_WORDS = f"<{WORDS} x i64>"
OR_OF_WORDS = f"llvm.vector.reduce.or.v{WORDS}i64"
DECLARATIONS = f"""\
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
declare i64 @{OR_OF_WORDS}({ALL_WORDS})
"""


def make_row(t: Tensor, words: Words) -> np.ndarray | None:
    """Return what all tensors of this kind have: (ROW_LENGTH,), uint64.

    None stands for a kind that has no template.
    """
    kind = template(t, words)
    if kind is None:
        return None
    return np.concatenate([*kind, np.array([extent(t), t.itemsize], np.uint64)])


class Comparing:
    """Adds comparisons to a routine, which returns `otherwise` where something differs."""

    def __init__(
        self, routine: Routine, words: Words, object_layout: tuple[int, int], otherwise: int
    ) -> None:
        """`object_layout` says where a Python object keeps its type and its TensorImpl."""
        self.routine, self.words, self.otherwise = routine, words, otherwise
        self._type_offset, self._tensor_offset = object_layout

    def must(self, condition: str) -> None:
        """Return unless a condition holds."""
        self.routine.leave_unless(condition, self.otherwise)

    def must_be_of(self, object: str, *types: object) -> None:
        """Return unless an object is of one of these types, and not of a subclass."""
        r = self.routine
        type = r.load("i64", r.at("i8", object, self._type_offset))
        self.must(r.either(*(r.is_equal(type, id(known)) for known in types)))

    def fetch(self, pointer: str, offset: int = 0) -> None:
        """Let memory be on its way when it is needed. Any address will do, also a device's."""
        at = self.routine.at("i8", pointer, offset) if offset else pointer
        self.routine.do(f"call void @llvm.prefetch.p0(ptr {at}, i32 0, i32 3, i32 1)")

    def fetch_impl(self, impl: str) -> None:
        """Let a whole TensorImpl be on its way."""
        for offset in range(0, 8 * WORDS, LINE):
            self.fetch(impl, offset)

    def impl_of(self, object: str) -> str:
        """Return the TensorImpl of a Python object, which must be a plain tensor."""
        r = self.routine
        self.must_be_of(object, *PLAIN)
        impl = r.load("ptr", r.at("i8", object, self._tensor_offset))
        self.must(r.value(f"icmp ne ptr {impl}, null"))
        return impl

    def row(self, rows: str, index: Operand) -> str:
        """Return the address of a row in a table of rows."""
        return self.routine.at("i64", rows, self.routine.multiply(index, ROW_LENGTH))

    def must_have_words(self, impl: str, row: str) -> str:
        """Return the StorageImpl of a TensorImpl, which must have a row's words."""
        r, words = self.routine, self.words
        found, expected = r.load(ALL_WORDS, impl), r.load(ALL_WORDS, row)
        matter = r.load(ALL_WORDS, r.at("i64", row, WORDS))
        different = r.value(f"xor {ALL_WORDS} {found}, {expected}")
        different = r.value(f"and {ALL_WORDS} {different}, {matter}")
        any_bit = r.value(f"call i64 @{OR_OF_WORDS}({ALL_WORDS} {different})")
        self.must(r.is_equal(any_bit, 0))
        # Without a version counter, nobody may count.
        self.must(r.value(f"icmp ne ptr {r.load('ptr', impl, words.version)}, null"))
        storage = r.load("ptr", impl, words.storage)
        self.must(r.value(f"icmp ne ptr {storage}, null"))
        return storage

    def must_have_plain_object(self, impl: str) -> None:
        """Return for a tensor of a subclass. One without a Python object would get a plain one."""
        r = self.routine
        marked = r.load("i64", impl, self.words.python_object)
        object = r.value(f"and i64 {marked}, -2")
        with r.when(r.value(f"icmp ne i64 {object}, 0")):
            self.must_be_of(r.value(f"inttoptr i64 {object} to ptr"), *PLAIN)

    def address(self, impl: str, storage: str, row: str) -> str:
        """Return where a tensor's first element is, 0 if it has none; there must be memory for
        all."""
        r, words = self.routine, self.words
        bytes, itemsize = r.load("i64", row, 2 * WORDS), r.load("i64", row, 2 * WORDS + 1)
        self.must(r.is_equal(r.load("i64", storage), words.storage_class))
        guard = r.load("i8", r.at("i8", storage, words.guard))
        self.must(r.is_equal(guard, 0, "i8"))
        skipped = r.multiply(r.load("i64", impl, words.offset), itemsize)
        data = r.load("i64", storage, words.data)
        address = r.variable("i64", 0)
        with r.when(r.is_less(0, bytes)):
            end = r.add(skipped, bytes)
            available = r.load("i64", storage, words.bytes)
            self.must(r.value(f"icmp sge i64 {available}, {end}"))
            self.must(r.value(f"icmp ne i64 {data}, 0"))
            r.set(address, r.add(data, skipped))
        found = r.get(address)
        self.fetch(r.value(f"inttoptr i64 {found} to ptr"))
        return found


def all_have_words(words: Words, object_layout: tuple[int, int]) -> str:
    """Return the text of `all_have_words(list, kinds, rows, scratch, pointers)`.

    It returns 0 if each object of a Python list is a plain tensor with the words of the row that
    `kinds` says, and fills `pointers`, the addresses of their elements; else it returns 1.
    `scratch` has two words for each tensor.
    """
    arguments = ("ptr list", "ptr kinds", "ptr rows", "ptr scratch", "ptr pointers")
    r = Routine("all_have_words", "i64", *arguments)
    compare = Comparing(r, words, object_layout, otherwise=1)
    count = r.call("i64", python_function("PyList_Size"), "ptr %list")
    with r.each(count) as i:
        impl = compare.impl_of(_item(r, i))
        r.store("ptr", impl, "%scratch", i)
        compare.fetch_impl(impl)
    with r.each(count) as i:
        row = compare.row("%rows", r.load("i64", "%kinds", i))
        storage = compare.must_have_words(r.load("ptr", "%scratch", i), row)
        r.store("ptr", storage, "%scratch", r.add(i, count))
        compare.fetch(storage)
    with r.each(count) as i:
        row = compare.row("%rows", r.load("i64", "%kinds", i))
        impl, storage = (r.load("ptr", "%scratch", at) for at in (i, r.add(i, count)))
        r.store("i64", compare.address(impl, storage, row), "%pointers", i)
    r.leave(0)
    return r.text() + "\n"


def count_changes(words: Words, object_layout: tuple[int, int]) -> str:
    """Return the text of `count_changes(list)`: each of these plain tensors has changed once more.

    Tensors that were made in inference mode have nothing that counts.
    """
    r = Routine("count_changes", "void", "ptr list")
    _, tensor_offset = object_layout
    count = r.call("i64", python_function("PyList_Size"), "ptr %list")
    with r.each(count) as i:
        count_change(r, words, r.load("ptr", r.at("i8", _item(r, i), tensor_offset)))
    r.leave()
    return r.text() + "\n"


def count_change(r: Routine, words: Words, impl: str) -> None:
    """Add one to a version counter, as other threads may do at the same time."""
    counter = r.load("ptr", impl, words.version)
    with r.when(r.value(f"icmp ne ptr {counter}, null")):
        r.value(f"atomicrmw add ptr {r.at('i32', counter, words.counting)}, i32 1 seq_cst")


def _item(r: Routine, index: str) -> str:
    """Return an object of the Python list `%list`."""
    return r.call("ptr", python_function("PyList_GetItem"), "ptr %list", f"i64 {index}")


def python_function(name: str) -> int:
    """Return the address of a function of Python's C interface."""
    return ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value or 0
