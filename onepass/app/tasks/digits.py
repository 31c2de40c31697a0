"""Handwritten digits: scikit-learn's 1,797 images of 8x8 pixels, and a small convolutional net."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .task import ACCURACY, Data, Examples, Task, TaskError

__all__ = ["DIGITS"]

# Not the run's seed: every run is judged on the same images.
_SPLIT_SEED = 0
_HELD_OUT_SHARE = 1 / 5


def _load(folder: Path) -> Data:
    """Return the images, a fifth of each class held out.

    `folder` is not used: the images are part of scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise TaskError(
            "task digits: its images come with scikit-learn, which is not installed; run pip "
            "install 'onepass[train]'."
        ) from error
    pixels, classes = load_digits(return_X_y=True)
    images = torch.as_tensor(pixels).to(torch.uint8).reshape(-1, 1, 8, 8)
    labels = torch.as_tensor(classes).to(torch.uint8)
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    order = torch.randperm(len(labels), generator=generator)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        members = order[labels[order] == label]
        count = round(len(members) * _HELD_OUT_SHARE)
        held_out[members[:count]] = True
    return Data(
        Examples(images[~held_out], labels[~held_out], _decode),
        Examples(images[held_out], labels[held_out], _decode),
    )


def _decode(images: Tensor) -> Tensor:
    """Return pixels of 0 to 16 as numbers of about unit variance."""
    return (images.to(torch.float32) - 5.0) / 6.0


def _make_model() -> nn.Module:
    """Return three convolutions with batch norm and one layer, 58 thousand parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(256, 10),
    )


DIGITS = Task(
    name="digits",
    make_model=_make_model,
    load=_load,
    loss=F.cross_entropy,
    metric=ACCURACY,
    lr={
        "AdamW": 3e-3,
        "Adam": 3e-3,
        "SGD": 0.1,
        "sgd-momentum": 0.03,
        "Adafactor": 0.1,
        "Adagrad": 0.1,
        "ASGD": 0.3,
        "muon-adamw": 3e-3,
        "RAdam": 1e-2,
        "Rprop": 1e-3,
    },
    epochs=20,
    batch_size=64,
)
