"""Parameters whose numbers lie on their device: a step asks it nothing, and can be captured in a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from . import kernel
from .batch import KernelBatch
from .checks import Group, StepError
from .recipes import Recipe
from .unscale import Unscale


class DeviceBatch(KernelBatch):
    """As a `KernelBatch`; but step counts and other numbers are read and written by the kernel.

    Options may be tensors on the device, which the host never reads. Where `GradScaler` leaves unscaling to the step,
    the kernel does it, and changes nothing where a gradient is not finite.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        # For each parameter 1 until it has stepped, on the device.
        self.fresh: Tensor | None = None
        self._of_former_launches: list[Tensor] = []

    @property
    def captured(self) -> list[Tensor]:
        """What graphs that hold a step of this batch will read."""
        return [*self._of_former_launches, *([] if self.launch is None else self.launch.captured)]

    def resident(self, recipe: Recipe) -> tuple[str, ...]:
        return recipe.numbers

    def read(self, group: Group) -> Sequence[Any]:
        return self.recipe.look_at(group)

    def check_capture(self) -> None:
        """Raise where a step would be captured in a graph before one like it has made its launch and its tables."""
        if self.fresh is None and self.kernel.is_capturing():
            raise StepError(
                f"{self.owner}: a step cannot be captured in a graph before its kernels have run; take a few steps "
                "outside of captures first, as torch.cuda.graph's documentation shows"
            )

    def begin(self, numbers: Mapping[str, np.ndarray], first: np.ndarray | None, unscale: Unscale) -> None:
        before = self.launch
        self.choose_rows(np.zeros((0, self.count)), None)
        launch, device = self.launch, self.launch.kernel.device
        if before is not None and before is not launch:
            self._of_former_launches += before.captured
        if self.fresh is None:
            is_first = np.zeros(self.count) if first is None else first
            self.fresh = device.upload(is_first.astype(np.int32))
        launch.fresh = self.fresh
        launch.active[:] = self.active
        factor, launch.guard = unscale.on(device.device)
        launch.device_leaves = []
        for leaf, values in zip(self.leaves, zip(*self.values, strict=True), strict=True):
            away = [(leaf, setting, v) for setting, v in enumerate(values) if isinstance(v, Tensor)]
            launch.device_leaves += away
            launch.leaves[leaf] = [0.0 if isinstance(v, Tensor) else v for v in values] if away else values
        if factor is not None and kernel.GRADIENT_FACTOR in self.kernel.leaves:
            launch.device_leaves.append((self.kernel.leaves[kernel.GRADIENT_FACTOR], None, factor))
        self.launch_up_to_stores()
