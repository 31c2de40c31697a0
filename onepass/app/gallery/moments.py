"""What optimizers keep between steps: running means of gradients, and weights that decay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import onepass

__all__ = ["average", "average_weights", "decay", "noisy_series"]


def average(series: Tensor, beta: float) -> Tensor:
    """Adam's running mean of `series`, one number a step: m = beta m + (1 - beta) g, begun at zero,
    uncorrected."""
    p = torch.zeros(1, dtype=torch.float64)
    adam = onepass.Adam([p], betas=(beta, 0.999))
    means = []
    for value in series.to(torch.float64):
        p.grad = value.reshape(1)
        adam.step()
        means.append(adam.state[p]["exp_avg"].clone())
    return torch.cat(means)


def average_weights(beta: float, steps: int) -> Tensor:
    """The share (1 - beta) beta^k that a gradient has in the mean k steps later, k from 0 to
    `steps` - 1.

    It is the running mean of a single 1 among zeros.
    """
    return average(torch.eye(1, steps)[0], beta)


def noisy_series(steps: int) -> Tensor:
    """A slow wave above zero under much noise, the same at every call."""
    at = torch.arange(steps, dtype=torch.float64)
    noise = torch.randn(steps, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return 1 + 0.3 * torch.sin(at / 18) + 0.35 * noise


def decay(
    optimizer: type[onepass.Adam],
    scales: Sequence[float],
    steps: int,
    *,
    lr: float,
    weight_decay: float,
) -> Tensor:
    """Mean weights of shape (scales, steps + 1) under gradients that are noise of each of `scales`,
    without aim.

    256 weights for each scale begin at 1, and nothing but the decay moves their mean.
    """
    generator = torch.Generator().manual_seed(0)
    weights = torch.ones(len(scales), 256, dtype=torch.float64)
    sizes = torch.tensor(scales, dtype=torch.float64)[:, None]
    decayed = optimizer([weights], lr=lr, weight_decay=weight_decay)
    means = [weights.mean(1)]
    for _ in range(steps):
        weights.grad = sizes * torch.randn(weights.shape, generator=generator, dtype=torch.float64)
        decayed.step()
        means.append(weights.mean(1))
    return torch.stack(means, 1)
