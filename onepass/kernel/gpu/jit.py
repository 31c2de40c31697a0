"""Triton source: as data, which the compiler makes, and as functions, which Triton compiles when
they are launched.

Triton reads a function's text where Python finds it. Here that is Python's own cache of lines, into
which the text is put under a name of its own: no file is written, so nothing that runs has ever
lain where another user could write. What Triton makes of it lies in Triton's cache, and another
process with the same rule finds it there.
"""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import finalize

import torch

from ..graph.caches import share


@dataclass(frozen=True)
class Function:
    """A kernel: its name, its arguments with their types in Triton's notation (`*fp32`, `i32`), its
    compile-time constants, and how many warps run one program of it."""

    name: str
    arguments: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, int], ...] = ()
    warps: int = 4


@dataclass(frozen=True)
class Source:
    """A module of Triton functions: its text, and the kernels among them."""

    text: str
    functions: tuple[Function, ...] = field(compare=False)


class Module(dict[str, Any]):
    """The functions of a module, by their names; their text is there for Triton to read as long as
    this lives."""


@share
def load(source: Source) -> Module:
    """The module's functions, ready to be launched or compiled."""
    name = f"<onepass {hashlib.sha256(source.text.encode()).hexdigest()[:16]}>"
    # An entry without a time is never looked for on disk.
    linecache.cache[name] = lines = (
        len(source.text),
        None,
        source.text.splitlines(keepends=True),
        name,
    )
    names: dict[str, Any] = {"__name__": "onepass.kernel.generated"}
    exec(compile(source.text, name, "exec"), names)
    module = Module(names)
    finalize(module, _forget, name, lines).atexit = False
    return module


def _forget(name: str, lines: object) -> None:
    """Forget a module's text, unless another module has come with the same."""
    if linecache.cache.get(name) is lines:
        linecache.cache.pop(name, None)


def backend_of(there: Any) -> str:
    """Triton's name for what compiles for a tensor's device."""
    return "hip" if torch.version.hip else there.device.type


def options(function: Function, backend: str = "cuda") -> dict[str, Any]:
    """How a function is compiled: without contraction to fused multiply-add, so that it computes
    bit for bit what the other backends do."""
    how: dict[str, Any] = {"num_warps": function.warps, "enable_fp_fusion": False}
    if backend == "cuda":
        # Without a limit, ptxas would rather spill a number or two than run fewer warps at once.
        how["maxnreg"] = 128
    return how


def launch(
    module: Mapping[str, Any], function: Function, grid: int, *arguments: Any, **constants: Any
) -> None:
    """Queue so many programs of a function on the current device and stream; of none, nothing."""
    if grid > 0:
        given = dict(function.constants) | constants
        module[function.name][(grid,)](
            *arguments, **given, **options(function, backend_of(arguments[0]))
        )


def prepare(
    module: Mapping[str, Any], function: Function, *arguments: Any, **constants: Any
) -> None:
    """Compile a function for a launch with these arguments, and bring it to the current device;
    nothing is queued."""
    given = dict(function.constants) | constants | options(function, backend_of(arguments[0]))
    compiled = module[function.name].warmup(*arguments, **given, grid=(1,))
    if compiled is not None:
        # Looking for how to run it loads it; an interpreter has nothing to load.
        _ = compiled.run
