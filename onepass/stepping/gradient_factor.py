"""What `torch.amp.GradScaler` leaves to a step: a scale to divide gradients by, and whether to
change anything."""

from __future__ import annotations

import torch
from torch import Tensor


class Unscale:
    """The scale of this step's gradients, and what is not 0 where one of them is not finite; None
    means 1, and 0.

    To `read` them on the host is to wait for their device; a step that only asks for what is `on`
    its device does not.
    """

    def __init__(
        self, scale: Tensor | float | None = None, found_inf: Tensor | float | None = None
    ) -> None:
        self.scale, self.found_inf = scale, found_inf
        # What gradients are multiplied by, once it has been read.
        self.factor = 1.0
        self._on: dict[torch.device, tuple[Tensor | None, Tensor | None]] = {}

    @property
    def waits(self) -> bool:
        """Whether the host would wait for a device to read them."""
        return any(isinstance(x, Tensor) and not x.is_cpu for x in (self.scale, self.found_inf))

    def read(self) -> bool:
        """Read them on the host; returns whether nothing may change. Raises ZeroDivisionError for a
        scale of 0."""
        if self.found_inf is not None and bool(self.found_inf):
            return True
        self.factor = 1.0 if self.scale is None else 1.0 / float(self.scale)
        return False

    def on(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """The factor, in float64, and the guard, in float32 and not 0 where nothing may change, as
        tensors there."""
        if device not in self._on:
            factor, guard = (
                None
                if x is None
                else _as_tensor(x).detach().to(device, dtype, non_blocking=True).reshape(1)
                for x, dtype in ((self.scale, torch.float64), (self.found_inf, torch.float32))
            )
            self._on[device] = None if factor is None else factor.reciprocal(), guard
        return self._on[device]


def _as_tensor(x: Tensor | float) -> Tensor:
    # Whatever the default device is, a tensor stays where it is.
    return x if isinstance(x, Tensor) else torch.tensor(x, device="cpu")
