"""Whether Triton can serve a device: found out by running a kernel of one line there, before
anything depends on it."""

from __future__ import annotations

import os
import stat
from functools import cache
from pathlib import Path

import torch

from .jit import Function, Source, launch, load
from .uploads import Device

TYPES = ("cuda", "xpu")
# Older NVIDIA GPUs are not served by Triton.
LEAST_CAPABILITY = (8, 0)
# That of the oldest torch that is supported.
LEAST_TRITON = (3, 5)

PROBE = Source(
    """\
import triton
import triton.language as tl


@triton.jit
def probe(there):
    tl.store(there, tl.sqrt_rn(tl.load(there)))
""",
    (Function("probe", (("there", "*fp32"),), (), 1),),
)


def why_not(device: torch.device) -> str:
    """Why there are no kernels for a device that is no CPU; empty where there are.

    While a graph is captured nothing is tried out, which the capture would not survive, and nothing
    remembered.
    """
    if device.type not in TYPES:
        return f"there are no kernels for {device.type} devices"
    return find_out(device) or ("" if is_capturing(device) else try_out(device))


def is_capturing(device: torch.device) -> bool:
    """Whether work on a device is recorded into a graph now."""
    return device.type in TYPES and Device(device).is_capturing()


@cache
def find_out(device: torch.device) -> str:
    """What can be said without trying, once a process."""
    version = ".".join(map(str, LEAST_TRITON))
    try:
        import triton
        from triton import knobs
    except ImportError:
        return (
            f"kernels for {device.type} devices need Triton {version} or newer; run pip install -U "
            "triton"
        )
    if tuple(map(int, triton.__version__.split(".")[:2])) < LEAST_TRITON:
        return (
            f"kernels for {device.type} devices need Triton {version} or newer, and "
            f"{triton.__version__} is installed; install a newer torch, which brings one"
        )
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < LEAST_CAPABILITY:
            needed = ".".join(map(str, LEAST_CAPABILITY))
            return (
                f"there are no kernels for GPUs of a compute capability below {needed}, and "
                f"{torch.cuda.get_device_name(device)} has {'.'.join(map(str, capability))}"
            )
    return why_unsafe(Path(knobs.cache.dir))


def why_unsafe(folder: Path) -> str:
    """Why nothing may be run that Triton keeps in its cache, in this folder; empty where it may
    be."""
    existing = next(
        place for place in (folder.absolute(), *folder.absolute().parents) if place.exists()
    )
    advice = "set TRITON_CACHE_DIR to a folder of your own"
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return f"Triton's cache, {folder}, cannot be written; {advice}"
    if existing == folder.absolute() and os.name == "posix":
        now = existing.stat()
        if now.st_mode & stat.S_IWOTH:
            return (
                f"every user can write to Triton's cache, {folder}, and could put code there; "
                f"{advice}"
            )
        if now.st_uid not in (0, os.geteuid()):
            return (
                f"Triton's cache, {folder}, belongs to another user, who could put code there; "
                f"{advice}"
            )
    return ""


@cache
def try_out(device: torch.device) -> str:
    """What goes wrong when a kernel is compiled and launched: a missing C compiler, a driver that
    is too old."""
    try:
        there = torch.ones(1, dtype=torch.float32, device=device)
        with Device(device).guard():
            launch(load(PROBE), PROBE.functions[0], 1, there)
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "no message")
        return f"Triton cannot run kernels on {device} ({type(error).__name__}: {first:.200})"
    return ""
