"""What optimizers keep between steps: running means of gradients, and weights that decay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import onepass

__all__ = ["average", "average_weights", "decay", "noisy_series"]


def average(series: Tensor, beta: float) -> Tensor:
    """Return Adam's running mean of `series`, one number a step, uncorrected.

    It is m = beta m + (1 - beta) g, and begins at zero.
    """
    p = torch.zeros(1, dtype=torch.float64)
    adam = onepass.Adam([p], betas=(beta, 0.999))
    means = []
    for value in series.to(torch.float64):
        p.grad = value.reshape(1)
        adam.step()
        means.append(adam.state[p]["exp_avg"].clone())
    return torch.cat(means)


def average_weights(beta: float, steps: int) -> Tensor:
    """Return the weight of a gradient in the mean k steps later, for k from 0 to `steps` - 1.

    It is (1 - beta) beta^k: the running mean of a single 1 followed by zeros.
    """
    return average(torch.eye(1, steps)[0], beta)


def noisy_series(steps: int) -> Tensor:
    """Return a slow wave above zero under much noise, the same at every call."""
    times = torch.arange(steps, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(steps, generator=generator, dtype=torch.float64)
    return 1 + 0.3 * torch.sin(times / 18) + 0.35 * noise


def decay(
    optimizer: type[onepass.Adam],
    scales: Sequence[float],
    steps: int,
    *,
    lr: float,
    weight_decay: float,
) -> Tensor:
    """Return mean weights of shape (scales, steps + 1) under gradients that are only noise.

    Each of `scales` is a size of the noise, for 256 weights that begin at 1. Nothing but the decay
    moves their mean.
    """
    generator = torch.Generator().manual_seed(0)
    weights = torch.ones(len(scales), 256, dtype=torch.float64)
    sizes = torch.tensor(scales, dtype=torch.float64)[:, None]
    decaying = optimizer([weights], lr=lr, weight_decay=weight_decay)
    means = [weights.mean(1)]
    for _ in range(steps):
        noise = torch.randn(weights.shape, generator=generator, dtype=torch.float64)
        weights.grad = sizes * noise
        decaying.step()
        means.append(weights.mean(1))
    return torch.stack(means, 1)
