"""The tables of a step that differs from the last one only in values, and the step itself.

Whoever makes a sheet fills `tables`, lists of integers under the names of `fields.FIELDS`, and
`values`. Then `close` lays them out in memory. An SGD of two parameters in one group, whose
gradients and parameters are the tensors 0 to 3:

    group_params     [2]
    gradient_tensor  [0, 1]        group_options  [3]
    param_tensor     [2, 3]        option_name    [address of "params", of "lr", of "momentum"]
    tensor_row       [0, 1, 0, 1]  option_kind    [PARAMS, RATE, SAME]
    written          [2, 3]        option_value   [0, 0, address of 0]
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from typing import Any

import numpy as np

from ..graph.caches import once
from ..llvm.native import Library, has_interpreter_lock
from ..tensors import torch_library
from ..tensors.facts import object_layout
from ..tensors.same_words import ROW_LENGTH
from ..tensors.words import find_words
from .fields import COUNTS, FIELDS
from .program import Places, program

HOLDING = ("aoti_torch_new_tensor_handle", "aoti_torch_delete_tensor_object")


class Sheet:
    """Tables, and the machine code that walks them.

    It keeps alive what its tables have the addresses of: names and values of options, which are not
    tensors, and arrays. A tensor is alive only while a step runs.
    """

    def __init__(self, code: Code) -> None:
        """Begin with empty tables."""
        self._code = code
        self.tables: dict[str, list[int]] = defaultdict(list)
        self.values: list[float] = []
        # What the tables have addresses of.
        self.kept: list[object] = []
        self._rows: list[np.ndarray] = []
        self._arrays: dict[str, np.ndarray] = {}

    def add_rows(self, rows: np.ndarray) -> int:
        """Add rows of words that tensors have, and return the index of the first."""
        begin = sum(map(len, self._rows))
        self._rows.append(rows)
        return begin

    def address(self, thing: object) -> int:
        """Return the address of a Python object or of an array's memory, and keep it alive."""
        self.kept.append(thing)
        return address_of(thing) if isinstance(thing, np.ndarray) else id(thing)

    def place(self, name: str, index: int) -> int:
        """Return the address of an entry of `values`, `current` or `next`, when it is laid out."""
        return address_of(self._arrays[name]) + 8 * index

    def lay_out(self, name: str, length: int) -> None:
        """Give a table of float64 its place in memory: others refer to it."""
        self._arrays[name] = np.zeros(length)

    def close(self) -> None:
        """Lay out all tables. Nothing is added afterwards."""
        tables = self.tables
        lengths = {
            "groups": len(tables["group_params"]),
            "params": len(tables["param_tensor"]),
            "states": len(tables["state_param"]),
            "entries": len(tables["entry_name"]),
            "tensors": len(tables["tensor_row"]),
            "written_count": len(tables["written"]),
            "common": len(tables["common_tensor"]),
            "number_count": len(tables["number_tensor"]),
            "copies": len(tables["copy_from"]),
            "launches": len(tables["launch_function"]),
        }
        found = {
            "param_object": "params",
            "param_impl": "params",
            "gradient_home": "params",
            "handle": "params",
            "state_dict": "states",
            "object": "tensors",
            "impl": "tensors",
            "storage": "tensors",
        }
        arrays = self._arrays
        arrays["rows"] = np.concatenate([*self._rows, np.zeros((0, ROW_LENGTH), np.uint64)])
        for name, of in found.items():
            arrays[name] = np.zeros(lengths[of], np.uint64)
        arrays["values"][:] = self.values
        fields = []
        for name in FIELDS:
            if name in COUNTS:
                fields.append(lengths[name])
                continue
            if name not in arrays:
                arrays[name] = np.array(tables[name], np.int64)
            fields.append(address_of(arrays[name]))
        self._fields = np.array(fields, np.int64)
        self._address = address_of(self._fields)

    def step(self, groups: list[Any], state: object, asked: bool) -> int:
        """Read everything, launch and store; return DONE, DIFFERS or ASK."""
        return self._code.step(self._address, id(groups), id(state), asked)

    def read(self, groups: list[Any], state: object, asked: bool) -> int:
        """Read everything; return DONE, DIFFERS or ASK.

        After DONE, what was read stays alive until `release`.
        """
        return self._code.read(self._address, id(groups), id(state), asked)

    def store(self) -> None:
        """Store numbers and count versions, after a launch."""
        self._code.store(self._address)

    def release(self) -> None:
        """Let go what `read` has kept alive."""
        self._code.release(self._address)


class Code:
    """The machine code that walks all sheets."""

    def __init__(self, places: Places) -> None:
        """Compile it: 50 ms, once in a process's life."""
        self.places = places
        self._library = Library(program(places))
        pointer = ctypes.c_void_p
        # PYFUNCTYPE keeps the interpreter lock: nothing is freed or replaced meanwhile.
        reads = ctypes.PYFUNCTYPE(ctypes.c_int64, pointer, pointer, pointer, ctypes.c_int64)
        stores = ctypes.PYFUNCTYPE(None, pointer)
        self.step = reads(self._library.address("step"))
        self.read = reads(self._library.address("read"))
        self.store = stores(self._library.address("store"))
        self.release = stores(self._library.address("release"))


@once
def code() -> Code | None:
    """Return the machine code, or None where Python or torch do not let it read."""
    words, layout = find_words(), object_layout()
    if not has_interpreter_lock() or words is None or layout is None:
        return None
    functions = {name: torch_library.address(name) for name in HOLDING}
    if not all(functions.values()):
        return None
    return Code(Places(words, layout, functions))


def address_of(array: np.ndarray) -> int:
    """Return where an array's memory begins."""
    return array.__array_interface__["data"][0]
