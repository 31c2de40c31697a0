"""What the tests with other packages train: a small network, its data, and how close two runs must
come."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def make_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))


def make_data() -> TensorDataset:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(64, 4, generator=random)
    return TensorDataset(x, torch.stack([x.sum(1), x.prod(1)], 1))


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def loss_of(model: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    x, y = make_data().tensors
    return (model(x) - y).square().mean()


def train(
    model: nn.Module, opt: Any, steps: int, after: Callable[[], Any] = lambda: None
) -> list[float]:
    """The losses of some steps; after each of them, `after` is called."""
    losses = []
    for _ in range(steps):
        opt.zero_grad()
        loss = loss_of(model)
        loss.backward()
        opt.step()
        after()
        losses.append(loss.item())
    return losses


def from_disk(state: Any) -> Any:
    """A state dict as it comes back from a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)
