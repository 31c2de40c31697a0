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
    """Inputs and targets of shape (n, ...), in a compact dtype; `decode` makes a batch's inputs."""

    inputs: Tensor
    targets: Tensor
    decode: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the examples at `indices` (int64): inputs for the model, and targets as int64."""
        return self.decode(self.inputs[indices]), self.targets[indices].long()


@dataclass(frozen=True)
class Data:
    """What is trained on, and what is held out to judge it."""

    train: Examples
    held_out: Examples

    def fingerprint(self) -> str:
        """Return a checksum of all examples as eight hexadecimal digits."""
        code = 0
        for examples in (self.train, self.held_out):
            for tensor in (examples.inputs, examples.targets):
                code = zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), code)
                code = zlib.crc32(tensor.contiguous().numpy().data, code)
        return f"{code:08x}"


@dataclass(frozen=True)
class Metric:
    """A number for people.

    `measure(outputs, targets)` returns its mean over all targets, as a 0-dim tensor. People see it
    multiplied by `scale`, with this many `decimals`, and the `unit`.
    """

    name: str
    measure: Callable[[Tensor, Tensor], Tensor]
    scale: float = 1.0
    decimals: int = 3
    unit: str = ""

    def show(self, value: float) -> str:
        """Return a measured value as people see it, such as `98.89 %`."""
        number = f"{self.scale * value:.{self.decimals}f}"
        return f"{number} {self.unit}" if self.unit else number


@dataclass(frozen=True)
class Task:
    """One thing to train.

    `load` takes the folder for data on disk. `loss(outputs, targets)` is a mean over all targets.
    `lr` has the learning rate that suits an optimizer, by its name. An epoch takes
    `examples_per_epoch` of the training examples, or all of them (None). A schedule first rises
    over `warmup`, a share of all steps.
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
