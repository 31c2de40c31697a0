"""Triton source, as data, and as functions that Triton compiles when they are launched.

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
    """A kernel of a module, and how it is compiled.

    Its arguments have their types in Triton's notation (`*fp32`, `i32`); `constants` are known when
    it is compiled; `warps` run one program of it.
    """

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
    """The functions of a module, by their names.

    Their text is there for Triton to read as long as this lives.
    """


@share
def load(source: Source) -> Module:
    """Return the module's functions, ready to be launched or compiled."""
    digest = hashlib.sha256(source.text.encode()).hexdigest()
    name = f"<onepass {digest[:16]}>"
    text = source.text.splitlines(keepends=True)
    # An entry without a time is never looked for on disk.
    lines = (len(source.text), None, text, name)
    linecache.cache[name] = lines
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
    """Return Triton's name for what compiles for a tensor's device."""
    return "hip" if torch.version.hip else there.device.type


def options(function: Function, backend: str = "cuda") -> dict[str, Any]:
    """Return Triton's options for a function.

    There is no contraction to fused multiply-add, so that it computes bit for bit what the other
    backends do.
    """
    chosen: dict[str, Any] = {"num_warps": function.warps, "enable_fp_fusion": False}
    if backend == "cuda":
        # Without a limit, ptxas would rather spill a number or two than run fewer warps at once.
        chosen["maxnreg"] = 128
    return chosen


def launch(
    module: Mapping[str, Any], function: Function, grid: int, *arguments: Any, **constants: Any
) -> None:
    """Queue `grid` programs of a function on the current device and stream; nothing for 0.

    `arguments` are those of the function, tensors or numbers; `constants` replace its own.
    """
    if grid > 0:
        given = dict(function.constants) | constants
        module[function.name][(grid,)](
            *arguments, **given, **options(function, backend_of(arguments[0]))
        )


def prepare(
    module: Mapping[str, Any], function: Function, *arguments: Any, **constants: Any
) -> None:
    """Compile a function for a launch with these arguments, and bring it to the current device.

    Nothing is queued.
    """
    given = dict(function.constants) | constants
    given |= options(function, backend_of(arguments[0]))
    compiled = module[function.name].warmup(*arguments, **given, grid=(1,))
    if compiled is not None:
        # Looking for how to run it loads it; an interpreter has nothing to load.
        _ = compiled.run
