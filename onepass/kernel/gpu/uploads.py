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
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

# How often a table can be sent during captures before a step outside of one takes new memory for
# it.
SPARE = 16


class Device:
    """What launches need of a device: its streams and its memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module: Any = torch.get_device_module(device.type)
        # The stream's own number, as Triton asks for it, takes a tenth of the time that the object
        # takes.
        self._number = (
            getattr(torch._C, "_cuda_getCurrentRawStream", None) if device.type == "cuda" else None
        )

    def guard(self) -> AbstractContextManager[Any]:
        """Make this the current device."""
        if self.device.index is None or self._module.current_device() == self.device.index:
            return nullcontext()
        return self._module.device(self.device)

    def stream(self) -> Any:
        """The stream on which torch queues work now; streams compare."""
        return (
            self._module.current_stream(self.device)
            if self._number is None
            else self._number(self.device.index)
        )

    def is_capturing(self) -> bool:
        """Whether work is recorded into a graph now."""
        asks = getattr(self._module, "is_current_stream_capturing", None)
        if asks is None:
            return False
        with self.guard():
            return asks()

    def announce(self, memory: Tensor) -> None:
        """Let torch's allocator know that memory of another stream is used on the current one."""
        memory.record_stream(self._module.current_stream(self.device))

    def pin(self, count: int, dtype: torch.dtype) -> Tensor:
        """Memory of the host from which the device copies without the processor."""
        return torch.empty(count, dtype=dtype, device="cpu", pin_memory=True)

    def send(self, pinned: Tensor) -> Tensor:
        """A copy on the device, queued on the current stream."""
        return pinned.to(self.device, non_blocking=True)

    def upload(self, array: np.ndarray) -> Tensor:
        """A copy of an array, by way of pinned memory of its own."""
        return self.send(fill(self.pin(max(array.size, 1), dtype_of(array)), array))

    def empty(self, count: int, dtype: torch.dtype) -> Tensor:
        """Memory on the device."""
        return torch.empty(count, dtype=dtype, device=self.device)


class Table:
    """An array of the host and its copy on the device."""

    def __init__(self, device: Device, captured: list[Tensor], spare: int = 0) -> None:
        """`spare` is for how many captures memory is held ready; `captured` receives what a
        captured graph reads."""
        self.device, self.captured = device, captured
        self.uploads = 0
        self._known: object = None
        self._array: np.ndarray | None = None
        self._sent: Tensor | None = None
        self._stream: Any = None
        self._spare = spare
        self._ready: list[Tensor] = []

    def on_device(self, array: np.ndarray) -> Tensor:
        """The array's copy, sent now if it differs from what was sent last; one that cannot be
        written never does."""
        content = array.tobytes() if array.flags.writeable else id(array)
        capturing = self.device.is_capturing()
        if self._sent is None or content != self._known:
            if capturing:
                return self._send_in_capture(array)
            self._sent = self.device.upload(array)
            self.uploads += 1
            # The array is kept, so that no other can be taken for it.
            self._known, self._array, self._stream = content, array, self.device.stream()
        elif capturing:
            self.captured.append(self._sent)
        elif self._stream != self.device.stream():
            self.device.announce(self._sent)
        self._hold_ready(array)
        return self._sent

    def _send_in_capture(self, array: np.ndarray) -> Tensor:
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
        # It will be there when the graph runs, and not before.
        self._sent = None
        return sent

    def _hold_ready(self, array: np.ndarray) -> None:
        """Take pinned memory for captures to come, while it can be taken."""
        if self._spare and not self.device.is_capturing():
            if self._ready and self._ready[-1].numel() < array.size:
                self._ready.clear()
            while len(self._ready) < self._spare:
                self._ready.append(self.device.pin(max(array.size, 1), dtype_of(array)))


def dtype_of(array: np.ndarray) -> torch.dtype:
    """torch's name for an array's type."""
    return torch.from_numpy(np.empty(0, array.dtype)).dtype


def fill(memory: Tensor, array: np.ndarray) -> Tensor:
    """Memory of the host, with an array at its beginning."""
    memory.numpy()[: array.size] = array.reshape(-1)
    return memory
