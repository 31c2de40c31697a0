"""Whether Triton can serve a device.

It is found out by running a kernel of one line there, before anything depends on it.
"""

from __future__ import annotations

import os
import stat
from functools import cache
from pathlib import Path

import torch

from .jit import Function, Source, launch, load
from .uploads import Device

# The types of devices that have kernels, as torch calls them.
DEVICE_TYPES = ("cuda", "xpu")
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
    """Return why there are no kernels for a device that is not a CPU; empty if there are.

    While a graph is captured nothing is tried out, which the capture would not survive, and nothing
    is remembered.
    """
    if device.type not in DEVICE_TYPES:
        return f"there are no kernels for {device.type} devices"
    reason = find_out(device)
    if reason or is_capturing(device):
        return reason
    return try_out(device)


def is_capturing(device: torch.device) -> bool:
    """Whether work on a device is recorded into a graph now."""
    return device.type in DEVICE_TYPES and Device(device).is_capturing()


@cache
def find_out(device: torch.device) -> str:
    """Return what speaks against a device without trying it; asked once a process."""
    needed = f"kernels for {device.type} devices need Triton {_dotted(LEAST_TRITON)} or newer"
    try:
        import triton
        from triton import knobs
    except ImportError:
        return f"{needed}; run pip install -U triton"
    version = triton.__version__
    numbers = tuple(map(int, version.split(".")[:2]))
    if numbers < LEAST_TRITON:
        return f"{needed}, and {version} is installed; install a newer torch, which brings one"
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < LEAST_CAPABILITY:
            least = _dotted(LEAST_CAPABILITY)
            name = torch.cuda.get_device_name(device)
            return (
                f"there are no kernels for GPUs of a compute capability below {least}, and "
                f"{name} has {_dotted(capability)}"
            )
    return why_unsafe(Path(knobs.cache.dir))


def _dotted(version: tuple[int, ...]) -> str:
    """Return a version as text: 3.5 for (3, 5)."""
    return ".".join(map(str, version))


def why_unsafe(folder: Path) -> str:
    """Return why nothing may be run that Triton keeps in its cache; empty if it may be.

    `folder` is the cache, which need not exist yet.
    """
    folders = (folder.absolute(), *folder.absolute().parents)
    existing = next(parent for parent in folders if parent.exists())
    its_cache = f"Triton's cache, {folder},"
    advice = "set TRITON_CACHE_DIR to a folder of your own"
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return f"{its_cache} cannot be written; {advice}"
    if existing == folder.absolute() and os.name == "posix":
        status = existing.stat()
        if status.st_mode & stat.S_IWOTH:
            return f"every user can write to {its_cache} and could put code there; {advice}"
        if status.st_uid not in (0, os.geteuid()):
            return f"{its_cache} belongs to another user, who could put code there; {advice}"
    return ""


@cache
def try_out(device: torch.device) -> str:
    """Return what goes wrong when a kernel is compiled and launched; empty if nothing does.

    It may be a missing C compiler, or a driver that is too old.
    """
    try:
        there = torch.ones(1, dtype=torch.float32, device=device)
        with Device(device).guard():
            launch(load(PROBE), PROBE.functions[0], 1, there)
    except Exception as error:
        lines = str(error).strip().splitlines()
        first = lines[0] if lines else "no message"
        return f"Triton cannot run kernels on {device} ({type(error).__name__}: {first:.200})"
    return ""
