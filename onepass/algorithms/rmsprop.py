"""RMSprop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..contract.options import is_positive
from ..contract.values import pick
from ..kernel.functions import lerp, sqrt, where
from ..optimizer import Optimizer, Params


class RMSprop(Optimizer, torch.optim.RMSprop):
    r"""The gradient over the root of its running square: steps of about lr at any scale of it.

    $$ v_t = \alpha v_{t-1} + (1-\alpha) g_t^2, \quad
       b_t = \mu b_{t-1} + \frac{g_t}{\sqrt{v_t} + \epsilon}, \quad
       \theta_t = \theta_{t-1} - \gamma b_t $$

    - `lr` ($\gamma$), at least 0: about how far a weight moves in a step without momentum, in the
      weight's own unit.
    - `alpha`, at least 0 and below 1 for an average: which part of $v$ stays in each step.
    - `eps`, at least 0: a size of the gradient, below which steps shrink with it.
    - `momentum` ($\mu$), at least 0: in the long run steps are $1 / (1-\mu)$ times as long.
    - `centered` subtracts the square of the gradient's running mean from $v_t$, which makes it an
      estimate of the variance.
    - `weight_decay` ($\lambda$), at least 0: it adds $\lambda \theta_{t-1}$ to $g_t$.

    It was long the choice for recurrent networks and for reinforcement learning. `Adam` is this
    with a running mean of the gradient, and without the large first steps.

    Hinton, "Neural Networks for Machine Learning", lecture 6e, 2012; centered: Graves, "Generating
    Sequences With Recurrent Neural Networks", 2013, arXiv:1308.0850. As in torch, $\epsilon$ is
    added after the root.

    State per parameter: `step`, `square_avg` (with momentum `momentum_buffer`, centered
    `grad_avg`). Arguments are those of `torch.optim.RMSprop`.
    """

    ranges = {
        "lr": "[0, inf]",
        "alpha": "[0, inf]",
        "eps": "[0, inf]",
        "weight_decay": "[0, inf]",
        "momentum": "[0, inf]",
    }

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "alpha": alpha,
            "eps": eps,
            "centered": centered,
            "weight_decay": weight_decay,
            "capturable": capturable,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults)

    def flags(self, group: Mapping[str, Any]) -> dict[str, bool]:
        momentum = pick(group, "momentum", None)
        return super().flags(group) | {"has_momentum": is_positive(momentum, "momentum")}

    @staticmethod
    def rule(
        p,
        g,
        square_avg,
        momentum_buffer,
        grad_avg,
        *,
        lr,
        alpha,
        eps,
        weight_decay,
        momentum,
        step,
        centered,
        has_momentum,
    ):
        g = where(weight_decay != 0, g + weight_decay * p, g)
        new = {"square_avg": alpha * square_avg + (1 - alpha) * g * g}
        v = new["square_avg"]
        if centered:
            mean = new["grad_avg"] = lerp(grad_avg, g, 1 - alpha)
            v = v - mean * mean
        u = g / (sqrt(v) + eps)
        if has_momentum:
            u = new["momentum_buffer"] = momentum * momentum_buffer + u
        return new | {"p": p - lr * u}
