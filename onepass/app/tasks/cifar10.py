"""CIFAR-10: 60,000 photographs of 32x32 pixels in ten classes, and a network of 3 convolutions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...contract.values import first_line
from .task import ACCURACY, Data, Examples, Task, TaskError

__all__ = ["CIFAR10"]

_ADVICE = (
    "put the folder cifar-10-batches-py from "
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz into the folder that --data names"
)


def _load(folder: Path) -> Data:
    """Return the 50,000 training and 10,000 test images, from `folder` or downloaded to it."""
    datasets = _import_datasets()
    train = _make_examples(_open(datasets, folder, train=True))
    held_out = _make_examples(_open(datasets, folder, train=False))
    return Data(train, held_out)


def _import_datasets() -> Any:
    """Return torchvision's module; raises `TaskError` if it cannot be imported."""
    try:
        from torchvision import datasets  # pyright: ignore[reportMissingImports]
    # RuntimeError: a torchvision built for another torch.
    except (ImportError, RuntimeError) as error:
        raise TaskError(
            "task cifar10: its images are read by torchvision, which cannot be imported "
            f"({first_line(error)}); install the torchvision that fits your torch, and {_ADVICE}."
        ) from error
    return datasets


def _open(datasets: Any, folder: Path, *, train: bool) -> Any:
    """Return torchvision's dataset, downloaded if it is not in `folder`."""
    try:
        return datasets.CIFAR10(root=str(folder), train=train, download=False)
    # RuntimeError is torchvision's answer to missing or damaged files.
    except (OSError, RuntimeError):
        pass
    try:
        return datasets.CIFAR10(root=str(folder), train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise TaskError(
            f"task cifar10: there is no CIFAR-10 in {folder} and it cannot be downloaded "
            f"({first_line(error)}); {_ADVICE}."
        ) from error


def _make_examples(dataset: Any) -> Examples:
    """Return torchvision's dataset as examples, in bytes."""
    # Stored as (n, height, width, channels).
    images = torch.as_tensor(dataset.data).permute(0, 3, 1, 2).contiguous()
    return Examples(images, torch.tensor(dataset.targets, dtype=torch.uint8), _decode)


def _decode(images: Tensor) -> Tensor:
    """Return bytes as numbers of about zero mean and unit variance."""
    return (images.to(torch.float32) - 121.0) / 64.0


def _make_model() -> nn.Module:
    """Return three convolutions and two layers, 146 thousand parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1024, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


CIFAR10 = Task(
    name="cifar10",
    make_model=_make_model,
    load=_load,
    loss=F.cross_entropy,
    metric=ACCURACY,
    lr={"AdamW": 1e-3, "Adam": 1e-3, "SGD": 0.05},
    epochs=10,
    batch_size=128,
)
