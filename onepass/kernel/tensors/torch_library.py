"""The functions that torch's library of C and C++ exports, by their names."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path

import torch


def address(name: str) -> int:
    """Return the address of a function, or 0 if this torch does not export it."""
    library = _library()
    try:
        return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
    except AttributeError:
        return 0


@cache
def _library() -> ctypes.CDLL | None:
    names = {"darwin": "libtorch_cpu.dylib", "win32": "torch_cpu.dll"}
    name = names.get(sys.platform, "libtorch_cpu.so")
    try:
        return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
    except OSError:
        return None
