"""Numbers that lie each in a tensor of its own on the host, as step counts do: read and written by
their addresses.

The addresses are those that `facts.Expected` has read in the same step.
"""

from __future__ import annotations

import ctypes

import numpy as np

from ..graph.caches import once
from ..llvm.native import Library

# In LLVM: what a number is stored as, and how it becomes a double and is made of one.
STORED = {
    np.dtype(np.float32): (
        "float",
        "fpext float %stored to double",
        "fptrunc double %value to float",
    ),
    np.dtype(np.float64): ("double", "fadd double %stored, -0.0", "fadd double %value, -0.0"),
}

FUNCTIONS = """
define void @{name}(i64 %count, ptr %addresses, ptr %values) nounwind {{
entry:
  %any = icmp sgt i64 %count, 0
  br i1 %any, label %number, label %done
number:
  %i = phi i64 [ 0, %entry ], [ %next, %number ]
  %address_at = getelementptr ptr, ptr %addresses, i64 %i
  %address = load ptr, ptr %address_at
  %value_at = getelementptr double, ptr %values, i64 %i
{body}
  %next = add i64 %i, 1
  %more = icmp slt i64 %next, %count
  br i1 %more, label %number, label %done
done:
  ret void
}}
"""
READ = """\
  %stored = load {type}, ptr %address
  %value = {widen}
  store double %value, ptr %value_at"""
WRITE = """\
  %value = load double, ptr %value_at
  %narrow = {narrow}
  store {type} %narrow, ptr %address"""


class Numbers:
    """Numbers by their addresses: `values` (float64) is filled by `read`, and stored by `write`."""

    def __init__(self, addresses: np.ndarray, dtype: np.dtype) -> None:
        """`addresses` (names, tensors; uint64) are looked at in each call; the numbers are of one
        dtype."""
        self.values = np.zeros(addresses.shape)
        self._addresses = np.ascontiguousarray(addresses)
        if self._addresses is not addresses and addresses.size:
            raise ValueError("addresses must be contiguous, since they are read where they are")
        places = (a.__array_interface__["data"][0] for a in (self._addresses, self.values))
        self._arguments = addresses.size, *places
        self._library, functions = _compiled()
        self._read, self._write = functions["read", dtype], functions["write", dtype]

    def read(self) -> np.ndarray:
        """Fill and return `values`."""
        self._read(*self._arguments)
        return self.values

    def write(self) -> None:
        """Store `values`."""
        self._write(*self._arguments)


@once
def _compiled():
    """The library, which must live as long as its functions, and these by name and dtype."""
    source, names = "", {}
    for dtype, (type, widen, narrow) in STORED.items():
        for name, body in (("read", READ), ("write", WRITE)):
            names[name, dtype] = f"{name}_{type}"
            source += FUNCTIONS.format(
                name=names[name, dtype], body=body.format(type=type, widen=widen, narrow=narrow)
            )
    library = Library(source)
    # PYFUNCTYPE keeps the interpreter lock: no other thread may free a tensor meanwhile.
    signature = ctypes.PYFUNCTYPE(None, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)
    return library, {key: signature(library.address(name)) for key, name in names.items()}
