"""Tables that a kernel reads on a device: sent when they have changed, and never overwritten.

A table that has changed is not written over the old one, which the device may still be reading. It
goes, from pinned memory of its own and without waiting, into device memory of its own; both come
from torch's allocators, whose rules make that safe:

* pinned memory that is let go is not given out again until the copy that reads it is done (torch
  records an event for each copy that does not block, and asks it);
* device memory that is let go is given out again in the order of the stream for which it was taken:
  what overwrites it is queued behind the kernels that read it. A kernel on another stream is
  announced by `record_stream`.

A step on another stream than the one before needs no copy of its own: both write the same
parameters, so whoever steps on two streams has put the second behind the first, and with that
behind the copy.

A CUDA graph repeats what was queued while it was captured, the reading of pinned memory too. So,
while a capture is under way, a changed table goes through one of a few pinned stretches that were
taken before (an allocation might end the capture), and everything that the graph will read is
handed to `captured`, where it must live as long as the graph.

The leaves of five steps, the last of which is captured:

    step  lr     sent  pinned memory      device memory
       1  0.1    yes   A, let go          X
       2  0.1    no                       X
       3  0.2    yes   B, let go          Y; X is let go, and is given out again behind step 2
       4  0.2    no                       Y
       5  0.3    yes   R, one of SPARE    Z; R and Z are kept in `captured`
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

# How often a table can be sent during captures, until a step outside of one takes new memory.
SPARE = 16


class Device:
    """What launches need of a device: its streams and its memory."""

    def __init__(self, device: torch.device) -> None:
        """`device` is of a type that has kernels, see `devices.DEVICE_TYPES`."""
        self.device = device
        self._module: Any = torch.get_device_module(device.type)
        # The stream's own number, as Triton asks for it, takes a tenth of the time that the object
        # takes.
        self._number: Any = None
        if device.type == "cuda":
            self._number = getattr(torch._C, "_cuda_getCurrentRawStream", None)

    def guard(self) -> AbstractContextManager[Any]:
        """Return a context in which this is the current device."""
        index = self.device.index
        if index is None or self._module.current_device() == index:
            return nullcontext()
        return self._module.device(self.device)

    def stream(self) -> Any:
        """Return the stream on which torch queues work now; streams compare."""
        if self._number is None:
            return self._module.current_stream(self.device)
        return self._number(self.device.index)

    def is_capturing(self) -> bool:
        """Whether work is recorded into a graph now."""
        is_capturing = getattr(self._module, "is_current_stream_capturing", None)
        if is_capturing is None:
            return False
        with self.guard():
            return is_capturing()

    def announce(self, memory: Tensor) -> None:
        """Let torch's allocator know that memory of another stream is used on the current one."""
        memory.record_stream(self._module.current_stream(self.device))

    def pin(self, count: int, dtype: torch.dtype) -> Tensor:
        """Return memory of the host from which the device copies without the processor."""
        return torch.empty(count, dtype=dtype, device="cpu", pin_memory=True)

    def send(self, pinned: Tensor) -> Tensor:
        """Return a copy on the device, queued on the current stream."""
        return pinned.to(self.device, non_blocking=True)

    def upload(self, array: np.ndarray) -> Tensor:
        """Return a flat copy of an array on the device, by way of pinned memory of its own."""
        pinned = self.pin(max(array.size, 1), dtype_of(array))
        return self.send(fill(pinned, array))

    def empty(self, count: int, dtype: torch.dtype) -> Tensor:
        """Return memory on the device for this many values."""
        return torch.empty(count, dtype=dtype, device=self.device)


class Table:
    """An array of the host and its copy on the device."""

    def __init__(self, device: Device, captured: list[Tensor], spare: int = 0) -> None:
        """Begin with nothing sent.

        `captured` receives what a captured graph reads; memory is held ready to be sent `spare`
        times in captures.
        """
        self.device = device
        self.captured = captured
        # How often it has been sent.
        self.uploads = 0
        self._known: object = None
        self._array: np.ndarray | None = None
        self._sent: Tensor | None = None
        self._stream: Any = None
        self._spare = spare
        self._ready: list[Tensor] = []

    def on_device(self, array: np.ndarray) -> Tensor:
        """Return the array's flat copy, sent now if it differs from what was sent last.

        Bits are compared; but an array that cannot be written never differs from itself. Raises
        RuntimeError in a capture that was not prepared for.
        """
        content = array.tobytes() if array.flags.writeable else id(array)
        capturing = self.device.is_capturing()
        if self._sent is None or content != self._known:
            if capturing:
                return self._send_in_capture(array)
            self._sent = self.device.upload(array)
            self.uploads += 1
            self._known = content
            # The array is kept, so that no other can be taken for it.
            self._array = array
            self._stream = self.device.stream()
        elif capturing:
            self.captured.append(self._sent)
        elif self._stream != self.device.stream():
            self.device.announce(self._sent)
        self._hold_ready(array)
        return self._sent

    def _send_in_capture(self, array: np.ndarray) -> Tensor:
        """Return the array's copy, sent from memory that was held ready, and keep both."""
        if not self._ready or self._ready[-1].numel() < array.size:
            raise RuntimeError(
                "a step cannot be captured in a graph before one like it has been taken: take a "
                "few steps outside of captures, with gradients of the same parameters, and then "
                f"at most {SPARE} within them"
            )
        pinned = self._ready.pop()
        sent = self.device.send(fill(pinned, array))
        self.uploads += 1
        self.captured += [pinned, sent]
        # It will be there only when the graph runs.
        self._sent = None
        return sent

    def _hold_ready(self, array: np.ndarray) -> None:
        """Take pinned memory for captures to come, while it can be taken."""
        if self._spare and not self.device.is_capturing():
            if self._ready and self._ready[-1].numel() < array.size:
                self._ready.clear()
            while len(self._ready) < self._spare:
                pinned = self.device.pin(max(array.size, 1), dtype_of(array))
                self._ready.append(pinned)


def dtype_of(array: np.ndarray) -> torch.dtype:
    """Return torch's name for an array's type."""
    return torch.from_numpy(np.empty(0, array.dtype)).dtype


def fill(memory: Tensor, array: np.ndarray) -> Tensor:
    """Copy an array to the beginning of memory of the host, and return that memory."""
    memory.numpy()[: array.size] = array.reshape(-1)
    return memory
