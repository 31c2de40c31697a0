"""Numbers of the parameters' states, as step counts: read and written by their addresses.

Each of them lies in a tensor of its own, on the host. The addresses are those that `facts.Expected`
has read in the same step:

    addresses   [[0x55d0, 0x55e0, 0x55f0]]      one name, `step`, of three parameters
    read()      [[ 7.,     7.,     2.    ]]     from float32 to float64
    write()     stores `values`, as float32
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
    """Numbers by their addresses: `values` (float64) is filled by `read`, stored by `write`.

    `values` has the shape of the addresses and may be changed between the two.
    """

    def __init__(self, addresses: np.ndarray, dtype: np.dtype) -> None:
        """`addresses` (names, tensors; uint64) are looked at in each call.

        All numbers are of one dtype, float32 or float64.

        Raises `ValueError` if the addresses are not contiguous.
        """
        self.values = np.zeros(addresses.shape)
        self._addresses = np.ascontiguousarray(addresses)
        if self._addresses is not addresses and addresses.size:
            raise ValueError("addresses must be contiguous, since they are read where they are")
        arrays = (self._addresses, self.values)
        starts = [array.__array_interface__["data"][0] for array in arrays]
        self._arguments = (addresses.size, *starts)
        self._library, functions = _compiled()
        self._read = functions["read", dtype]
        self._write = functions["write", dtype]

    def read(self) -> np.ndarray:
        """Fill `values` with what is stored at the addresses, and return it: (names, tensors)."""
        self._read(*self._arguments)
        return self.values

    def write(self) -> None:
        """Store `values` at the addresses."""
        self._write(*self._arguments)


@once
def _compiled():
    """Return the library, which must outlive its functions, and these by name and dtype."""
    source = ""
    names = {}
    for dtype, (type, widen, narrow) in STORED.items():
        for operation, template in (("read", READ), ("write", WRITE)):
            name = f"{operation}_{type}"
            body = template.format(type=type, widen=widen, narrow=narrow)
            source += FUNCTIONS.format(name=name, body=body)
            names[operation, dtype] = name
    library = Library(source)
    # PYFUNCTYPE keeps the interpreter lock: no other thread may free a tensor meanwhile.
    signature = ctypes.PYFUNCTYPE(None, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)
    return library, {key: signature(library.address(name)) for key, name in names.items()}
