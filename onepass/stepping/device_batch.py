"""Parameters whose numbers lie on their device.

A step asks the device nothing, so that it never waits, and can be captured in a graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor

from .. import kernel
from ..contract.values import Group, StepError
from .batch import KernelBatch, find_first
from .batches import Delayed, Step
from .checks import Member
from .gathered import Gathered
from .reading import Reading
from .recipe import Recipe


class DeviceBatch(KernelBatch):
    """As a `KernelBatch`; but step counts and other numbers are read and written by the kernel.

    Options may be tensors on the device, which the host never reads. If `GradScaler` leaves the
    unscaling to the step, the kernel does it, and changes nothing if a gradient is not finite.
    """

    def __init__(
        self,
        compiled: kernel.Kernel,
        columns: list[list[Tensor]],
        members: list[Member],
        reading: Reading,
        recipe: Recipe,
        owner: str,
    ) -> None:
        super().__init__(compiled, columns, members, reading, recipe, owner)
        # For each parameter 1 until it has stepped, on the device; taken on this stream.
        self.fresh: Tensor | None = None
        self._stream: Any = None
        # Whether a step may have been skipped, and what is known of such steps from former batches.
        self.skipped = False
        self._former: list[tuple[list[int], list[int], Tensor]] = []
        self._refs = [ref(p) for p in self.pick(reading.params)]
        self._captured_by_former_launches: list[Tensor] = []

    @property
    def captured(self) -> list[Tensor]:
        """What graphs that hold a step of this batch will read."""
        captured = [*self._captured_by_former_launches]
        for launch in self.works.launches.values():
            captured += launch.captured
        return captured

    @staticmethod
    def resident(recipe: Recipe) -> tuple[str, ...]:
        """Return the names of the numbers that lie on the device: all."""
        return recipe.numbers

    def read(self, group: Group) -> Sequence[Any]:
        return self.recipe.look_at(group)

    def check_capture(self) -> None:
        """Raise if a step would be captured before one like it has made its launch and tables."""
        if self.fresh is None and self.kernel.is_capturing():
            raise StepError(
                f"{self.owner}: a step cannot be captured in a graph before its kernels have run; "
                "take a few steps outside of captures first, as torch.cuda.graph's documentation "
                "shows"
            )

    def take_over(self, former: DeviceBatch) -> None:
        """Learn from a former batch which parameters have not stepped, though they have state.

        A step that `GradScaler` skips makes state and takes no step. Only the device knows of it.
        """
        if not former.skipped or former._device != self._device:
            return
        everyone = list(range(former.count))
        # A batch that has not begun knows what it has taken over.
        known = former._former if former.fresh is None else [(everyone, everyone, former.fresh)]
        params = [reference() for reference in self._refs]
        mine = {id(p): i for i, p in enumerate(params) if p is not None}
        for members, indices, fresh in known:
            my_indices: list[int] = []
            their_indices: list[int] = []
            for member, index in zip(members, indices, strict=True):
                key = id(former._refs[member]())
                if key in mine:
                    my_indices.append(mine[key])
                    their_indices.append(index)
            if my_indices:
                self._former.append((my_indices, their_indices, fresh))
                self.skipped = True

    @property
    def _device(self) -> torch.device:
        return self.kernel.device.device  # type: ignore[attr-defined]

    def let_go(self, launch: Any) -> None:
        self._captured_by_former_launches += launch.captured

    def choose_launch(self) -> None:
        """Take the launch for the parameters that have gradients now: settings are the groups."""
        self.launch = self.works.launch(self.addressed, self.group_index, len(self.groups))

    def begin(self, gathered: Gathered, step: Step) -> Sequence[Delayed]:
        self.choose_launch()
        launch = self.launch
        first = find_first(step.fresh, self.positions)
        self._make_fresh(np.zeros(self.count) if first is None else first)
        launch.fresh = self.fresh
        launch.active[:] = self.works.active
        factor, launch.guard = step.gradient_factor.on(self._device)
        self.skipped |= launch.guard is not None
        launch.device_leaves = []
        for leaf, values in self.hypers.columns():
            on_device = [(i, value) for i, value in enumerate(values) if isinstance(value, Tensor)]
            launch.leaves[leaf] = [
                # What no number equals: one that takes the tensor's place later must be sent.
                math.nan if isinstance(value, Tensor) else value
                for value in values
            ]
            launch.device_leaves += [(leaf, setting, tensor) for setting, tensor in on_device]
        if factor is not None and kernel.GRADIENT_FACTOR in self.kernel.leaves:
            launch.device_leaves.append((self.kernel.leaves[kernel.GRADIENT_FACTOR], None, factor))
        self.launch_up_to_stores()
        return ()

    def prepare_to_repeat(self, launch: Any) -> None:
        launch.guard, launch.device_leaves = None, []
        self._make_fresh(np.zeros(self.count))

    def keep_numbers(self) -> None:
        """The kernel has stored them."""

    def _make_fresh(self, first: np.ndarray) -> None:
        """Bring to the device what the host knows of first steps; then only the device knows."""
        device = self.launch.kernel.device
        if self.fresh is None:
            fresh: Tensor = device.upload(first.astype(np.int32))
            for my_indices, their_indices, known in self._former:
                mine = device.upload(np.array(my_indices, np.int64))
                theirs = device.upload(np.array(their_indices, np.int64))
                # Whose state has just been made has not stepped, whatever was known before.
                both = fresh.index_select(0, mine), known.index_select(0, theirs)
                fresh.index_copy_(0, mine, torch.maximum(*both))
            self._former.clear()
            self.fresh, self._stream = fresh, device.stream()
        elif device.stream() != self._stream and not device.is_capturing():
            device.announce(self.fresh)
