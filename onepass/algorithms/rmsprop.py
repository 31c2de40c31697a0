"""RMSprop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..contract.options import check_modes, check_number, is_positive, pick
from ..kernel.functions import lerp, sqrt, where
from ..optimizer import Optimizer, Params


class RMSprop(Optimizer, torch.optim.RMSprop):
    r"""The gradient over the root of its running square: steps of about lr, whatever the gradient's
    scale.

    $$ v_t = \alpha v_{t-1} + (1-\alpha) g_t^2, \quad
       b_t = \mu b_{t-1} + \frac{g_t}{\sqrt{v_t} + \epsilon}, \quad \theta_t = \theta_{t-1} - \gamma
    b_t $$

    where `centered` subtracts the square of the gradient's running mean from $v_t$, an estimate of
    its variance, and `weight_decay` adds $\lambda \theta_{t-1}$ to the gradient. Long the choice
    for recurrent networks and for reinforcement learning; `Adam` is this with a running mean of the
    gradient and without its slow start.

    Hinton, "Neural Networks for Machine Learning", lecture 6e, 2012; centered: Graves, "Generating
    Sequences With Recurrent Neural Networks", 2013, arXiv:1308.0850. As in torch, $\epsilon$ is
    added after the root.

    State per parameter: `step`, `square_avg` (with momentum `momentum_buffer`, centered
    `grad_avg`). Arguments are those of `torch.optim.RMSprop`; `foreach` changes nothing.

    Raises ValueError for an option outside its range, TypeError for one that is no number.
    """

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

    def check_options(self, options: Mapping[str, Any]) -> None:
        for name in ("lr", "alpha", "eps", "weight_decay", "momentum"):
            check_number(type(self).__name__, name, options[name])
        check_modes(type(self).__name__, options)

    def flags(self, group: Mapping[str, Any]) -> dict[str, bool]:
        return super().flags(group) | {
            "has_momentum": is_positive(pick(group, "momentum", None), "momentum")
        }

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
