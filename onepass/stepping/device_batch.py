"""Parameters whose numbers lie on their device: a step asks it nothing, and can be captured in a
graph."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor

from .. import kernel
from ..contract.values import Group, StepError
from .batch import KernelBatch
from .checks import Member
from .gradient_factor import GradientFactor
from .reading import Reading
from .recipe import Recipe


class DeviceBatch(KernelBatch):
    """As a `KernelBatch`; but step counts and other numbers are read and written by the kernel.

    Options may be tensors on the device, which the host never reads. Where `GradScaler` leaves
    unscaling to the step, the kernel does it, and changes nothing where a gradient is not finite.
    """

    def __init__(self, members: list[Member], reading: Reading, recipe: Recipe, owner: str) -> None:
        super().__init__(members, reading, recipe, owner)
        # For each parameter 1 until it has stepped, on the device; taken on this stream.
        self.fresh: Tensor | None = None
        self._stream: Any = None
        # Whether a step may have been skipped, and what is known of such steps from former batches.
        self.skipped = False
        self._former: list[tuple[list[int], list[int], Tensor]] = []
        self._refs = [ref(p) for p in self.pick(reading.params)]
        self._of_former_launches: list[Tensor] = []

    @property
    def captured(self) -> list[Tensor]:
        """What graphs that hold a step of this batch will read."""
        return [
            *self._of_former_launches,
            *(t for launch in self._launches.values() for t in launch.captured),
        ]

    def resident(self, recipe: Recipe) -> tuple[str, ...]:
        return recipe.numbers

    def read(self, group: Group) -> Sequence[Any]:
        return self.recipe.look_at(group)

    def check_capture(self) -> None:
        """Raise where a step would be captured in a graph before one like it has made its launch
        and its tables."""
        if self.fresh is None and self.kernel.is_capturing():
            raise StepError(
                f"{self.owner}: a step cannot be captured in a graph before its kernels have run; "
                "take a few steps outside of captures first, as torch.cuda.graph's documentation "
                "shows"
            )

    def take_over(self, former: DeviceBatch) -> None:
        """Learn from a former batch which parameters have not stepped, though their state is
        there."""
        if not former.skipped or former._device != self._device:
            return
        everyone = list(range(former.count))
        # A batch that has not begun knows what it has taken over.
        known = former._former if former.fresh is None else [(everyone, everyone, former.fresh)]
        mine = {id(p): i for i, p in enumerate(one() for one in self._refs) if p is not None}
        for places, at, fresh in known:
            theirs = (id(former._refs[i]()) for i in places)
            pairs = [(mine[key], j) for key, j in zip(theirs, at, strict=True) if key in mine]
            if pairs:
                self._former.append(([i for i, _ in pairs], [j for _, j in pairs], fresh))
                self.skipped = True

    @property
    def _device(self) -> torch.device:
        return self.kernel.device.device  # type: ignore[attr-defined]

    def forget(self, inactive: tuple[int, ...]) -> None:
        if inactive in self._launches:
            self._of_former_launches += self._launches[inactive].captured
        super().forget(inactive)

    def choose_launch(self) -> None:
        """The launch for the parameters that have gradients in this step: the settings are the
        groups."""
        key = tuple(self.inactive)
        if key not in self._launches:
            self._launches[key] = self.kernel.prepare(
                self.addressed, self.work, self.row_of_group, len(self.groups)
            )
        self.launch = self._launches[key]

    def begin(self, fresh: Collection[int], gradient_factor: GradientFactor) -> None:
        self.choose_launch()
        launch = self.launch
        first = self.find_first(fresh)
        self._make_fresh(np.zeros(self.count) if first is None else first)
        launch.fresh = self.fresh
        launch.active[:] = self.active
        factor, launch.guard = gradient_factor.on(self._device)
        self.skipped |= launch.guard is not None
        launch.device_leaves = []
        for leaf, values in zip(self.leaves, zip(*self.values, strict=True), strict=True):
            away = [(leaf, setting, v) for setting, v in enumerate(values) if isinstance(v, Tensor)]
            launch.device_leaves += away
            # What no number equals: one that takes the tensor's place later must be sent.
            launch.leaves[leaf] = (
                [math.nan if isinstance(v, Tensor) else v for v in values] if away else values
            )
        if factor is not None and kernel.GRADIENT_FACTOR in self.kernel.leaves:
            launch.device_leaves.append((self.kernel.leaves[kernel.GRADIENT_FACTOR], None, factor))
        self.launch_up_to_stores()

    def keep_numbers(self) -> None:
        """The kernel has stored them."""

    def _make_fresh(self, first: np.ndarray) -> None:
        """Bring to the device what the host knows of first steps; afterwards only the device
        knows."""
        device = self.launch.kernel.device
        if self.fresh is None:
            fresh: Tensor = device.upload(first.astype(np.int32))
            for mine, theirs, known in self._former:
                at, of = (device.upload(np.array(places, np.int64)) for places in (mine, theirs))
                # Whose state has been made anew has not stepped, whatever was known before.
                fresh.index_copy_(
                    0, at, torch.maximum(fresh.index_select(0, at), known.index_select(0, of))
                )
            self._former.clear()
            self.fresh, self._stream = fresh, device.stream()
        elif device.stream() != self._stream and not device.is_capturing():
            device.announce(self.fresh)
