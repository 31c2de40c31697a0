"""What a task is: a model, its data, and how its outputs are judged."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

__all__ = ["ACCURACY", "Data", "Examples", "Metric", "Task", "TaskError"]


class TaskError(ValueError):
    """A task's data cannot be had; the message says what is missing and what to put where."""


@dataclass(frozen=True)
class Examples:
    """`n` examples: `inputs` (n, ...) and `targets` (n, ...), kept in a compact dtype and decoded
    batch by batch."""

    inputs: Tensor
    targets: Tensor
    decode: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The examples at `indices` (int64): inputs as the model takes them, targets as int64."""
        return self.decode(self.inputs[indices]), self.targets[indices].long()


@dataclass(frozen=True)
class Data:
    """What is trained on, and what is held out to judge it."""

    train: Examples
    held_out: Examples

    def fingerprint(self) -> str:
        """A checksum of all examples, equal only for equal data."""
        code = 0
        for tensor in (
            self.train.inputs,
            self.train.targets,
            self.held_out.inputs,
            self.held_out.targets,
        ):
            code = zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), code)
            code = zlib.crc32(tensor.contiguous().numpy().data, code)
        return f"{code:08x}"


@dataclass(frozen=True)
class Metric:
    """A number for people: `measure(outputs, targets)` is the mean over all targets, as a 0-dim
    tensor.

    People see it multiplied by `scale`, with that many decimals and the unit.
    """

    name: str
    measure: Callable[[Tensor, Tensor], Tensor]
    scale: float = 1.0
    decimals: int = 3
    unit: str = ""

    def show(self, value: float) -> str:
        return f"{self.scale * value:.{self.decimals}f}{self.unit and ' ' + self.unit}"


@dataclass(frozen=True)
class Task:
    """One thing to train.

    `load` takes the folder for data on disk; `loss(outputs, targets)` is a mean over all targets.
    `lr` names the learning rates that suit an optimizer of that name. `examples_per_epoch` cuts an
    epoch short of the whole training data (None: all of it); `warmup` is the share of all steps
    over which a schedule first rises.
    """

    name: str
    make_model: Callable[[], nn.Module]
    load: Callable[[Path], Data]
    loss: Callable[[Tensor, Tensor], Tensor]
    metric: Metric
    lr: Mapping[str, float]
    epochs: int
    batch_size: int
    optimizer: str = "AdamW"
    examples_per_epoch: int | None = None
    warmup: float = 0.0


def _measure_accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(1) == targets).to(torch.float32).mean()


ACCURACY = Metric("accuracy", _measure_accuracy, scale=100.0, decimals=2, unit="%")
