"""What `torch.amp.GradScaler` leaves to a step: a scale to divide gradients by, and whether to change anything."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


class Unscale:
    """The scale of this step's gradients, and what is not 0 where one of them is not finite; None means 1, and 0.

    Read on the host, as `factor` and `skips`, they make it wait for the device; a step that only reads `on` does not.
    """

    def __init__(self, scale: Tensor | float | None = None, found_inf: Tensor | float | None = None) -> None:
        self.scale, self.found_inf = scale, found_inf
        self._on: dict[torch.device, tuple[Tensor | None, Tensor | None]] = {}

    @cached_property
    def factor(self) -> float:
        """What gradients are multiplied by."""
        return 1.0 if self.scale is None else 1.0 / float(self.scale)

    @cached_property
    def skips(self) -> bool:
        """Whether nothing may change."""
        return self.found_inf is not None and bool(self.found_inf)

    @property
    def waits(self) -> bool:
        """Whether the host would wait for a device to know what is to be skipped."""
        return isinstance(self.found_inf, Tensor) and not self.found_inf.is_cpu

    def on(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """The factor, in float64, and the guard, in float32 and not 0 where nothing may change, as tensors there."""
        if device not in self._on:
            factor, guard = (
                None if x is None else torch.as_tensor(x).detach().to(device, dtype, non_blocking=True).reshape(1)
                for x, dtype in ((self.scale, torch.float64), (self.found_inf, torch.float32))
            )
            self._on[device] = None if factor is None else factor.reciprocal(), guard
        return self._on[device]
