"""The factor on all gradients of a step, and the guard that may skip the step.

`torch.amp.GradScaler` leaves both to an optimizer that asks for it. A scale of 1024 becomes the
factor 1 / 1024. If one gradient is infinite, `found_inf` is 1, and the step changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


class GradientFactor:
    """The scale of this step's gradients, and `found_inf`, which is not 0 if one is not finite.

    None stands for a scale of 1, and for 0. To `read` them on the host is to wait for their device.
    A step on the same device asks only for what is `on` it, and does not wait.
    """

    def __init__(
        self, scale: Tensor | float | None = None, found_inf: Tensor | float | None = None
    ) -> None:
        self.scale, self.found_inf = scale, found_inf
        # Gradients are multiplied by it; known after `read`.
        self.factor = 1.0
        self._on: dict[torch.device, tuple[Tensor | None, Tensor | None]] = {}

    @property
    def waits(self) -> bool:
        """Whether the host would wait for a device to read them."""
        return any(isinstance(x, Tensor) and not x.is_cpu for x in (self.scale, self.found_inf))

    def read(self) -> bool:
        """Read both on the host, and return whether nothing may change.

        Raises ZeroDivisionError for a scale of 0.
        """
        if self.found_inf is not None and bool(self.found_inf):
            return True
        self.factor = 1.0 if self.scale is None else 1.0 / float(self.scale)
        return False

    def on(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Return the factor and the guard as tensors of shape (1,) on a device, or None for each.

        The factor is in float64, the guard in float32; a guard other than 0 forbids all changes.
        """
        if device not in self._on:
            scale = _tensor_on(device, self.scale, torch.float64)
            guard = _tensor_on(device, self.found_inf, torch.float32)
            factor = None if scale is None else scale.reciprocal()
            self._on[device] = factor, guard
        return self._on[device]


def _tensor_on(
    device: torch.device, value: Tensor | float | None, dtype: torch.dtype
) -> Tensor | None:
    if value is None:
        return None
    # Without a device named, a number would become a tensor of the user's default device.
    tensor = value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")
    return tensor.detach().to(device, dtype, non_blocking=True).reshape(1)
