"""Adadelta."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernel.functions import sqrt, where
from ..optimizer import Optimizer, Params


class Adadelta(Optimizer, torch.optim.Adadelta):
    r"""Steps as large as recent ones, along the gradient over its running root: it finds its scale.

    $$ v_t = \rho v_{t-1} + (1-\rho) g_t^2, \quad
       \Delta_t = \sqrt{\frac{u_{t-1} + \epsilon}{v_t + \epsilon}}\, g_t, \quad
       u_t = \rho u_{t-1} + (1-\rho) \Delta_t^2, \quad \theta_t = \theta_{t-1} - \gamma \Delta_t $$

    - `lr` ($\gamma$), at least 0: a factor without a unit. The paper has none: leave it at 1.
    - `rho`, in [0, 1]: which part of $v$ and of $u$ stays in each step.
    - `eps`, at least 0: as $u_0 = 0$, the first steps are about $\sqrt\epsilon$ long. It begins
      slowly, and a larger `eps` shortens this.
    - `weight_decay` ($\lambda$), at least 0: it adds $\lambda \theta_{t-1}$ to $g_t$.

    Zeiler, "ADADELTA: An Adaptive Learning Rate Method", 2012, arXiv:1212.5701.

    State per parameter: `step`, `square_avg` ($v$), `acc_delta` ($u$). Arguments are those of
    `torch.optim.Adadelta`.
    """

    ranges = {
        "lr": "[0, inf]",
        "rho": "[0, 1]",
        "eps": "[0, inf]",
        "weight_decay": "[0, inf]",
    }

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "rho": rho,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "capturable": capturable,
            "foreach": foreach,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults)

    @staticmethod
    def rule(p, g, square_avg, acc_delta, *, lr, rho, eps, weight_decay, step):
        g = where(weight_decay != 0, g + weight_decay * p, g)
        v = rho * square_avg + (1 - rho) * g * g
        delta = sqrt(acc_delta + eps) / sqrt(v + eps) * g
        return {
            "p": p - lr * delta,
            "square_avg": v,
            "acc_delta": rho * acc_delta + (1 - rho) * delta * delta,
        }
