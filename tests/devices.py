"""A device for kernels of Triton where there is no GPU: the processor, on which Triton's interpreter runs them.

Whoever imports this has Triton interpret all kernels of the process; it must be the first to import Triton.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from onepass import kernel
from onepass.kernel import gpu
from onepass.kernel.uploads import Device

os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")


class Interpreter(Device):
    """The processor as a device: its memory is the host's, and work is done as soon as it is queued."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def guard(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def stream(self) -> Any:
        return 0

    def is_capturing(self) -> bool:
        return False

    def pin(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=dtype)

    def send(self, pinned: Tensor) -> Tensor:
        return pinned.clone()


@contextmanager
def interpreted(device: type[Device] = Interpreter) -> Iterator[None]:
    """Within it, tensors of the host count as those of a GPU."""
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(gpu, "Device", device)
        patch.setattr(kernel, "on_host", lambda device: False)
        patch.setattr(kernel, "why_no_kernels", lambda device: "")
        kernel.compile.cache_clear()
        gpu.compile.cache_clear()
        yield
    kernel.compile.cache_clear()
    gpu.compile.cache_clear()
