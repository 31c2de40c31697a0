"""RAdam."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..contract.options import check_betas, check_modes, check_number
from ..kernel.functions import lerp, sqrt, where
from ..optimizer import Optimizer, Params


class RAdam(Optimizer, torch.optim.RAdam):
    r"""Adam that does not trust its running square before it has seen enough: a warm-up that needs
    no tuning.

    $$ \rho_\infty = \frac{2}{1-\beta_2} - 1, \quad
       \rho_t = \rho_\infty - \frac{2t\beta_2^t}{1-\beta_2^t}, \quad
       r_t = \sqrt{\frac{(\rho_t-4)(\rho_t-2)\rho_\infty}{(\rho_\infty-4)(\rho_\infty-2)\rho_t}} $$

    $$ \theta_t = \theta_{t-1} - \gamma \frac{m_t}{1-\beta_1^t} \cdot
       \begin{cases}
           r_t \sqrt{1-\beta_2^t} / (\sqrt{v_t} + \epsilon) & \rho_t > 5 \\
           1 & \text{else} \end{cases} $$

    with $m_t, v_t$ as in `Adam`; `weight_decay` adds $\lambda \theta_{t-1}$ to the gradient, or
    first shrinks $\theta_{t-1}$ by $1 - \gamma\lambda$ where `decoupled_weight_decay`. For $\beta_2
    = 0.999$ the first five steps are those of momentum. Use it in the place of Adam with a warm-up.

    Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", 2019, arXiv:1908.03265.
    As in torch and in the authors' later code, the threshold is 5; in the paper it is 4.

    State per parameter: `step`, `exp_avg`, `exp_avg_sq`. Arguments are those of
    `torch.optim.RAdam`; `foreach` changes nothing.

    Raises ValueError for an option outside its range, TypeError for one that is no number.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "decoupled_weight_decay": decoupled_weight_decay,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults)

    def check_options(self, options: Mapping[str, Any]) -> None:
        for name in ("lr", "eps", "weight_decay"):
            check_number(type(self).__name__, name, options[name])
        check_betas(type(self).__name__, options["betas"])
        check_modes(type(self).__name__, options)

    @staticmethod
    def rule(
        p, g, exp_avg, exp_avg_sq, *, lr, betas, eps, weight_decay, step, decoupled_weight_decay
    ):
        beta1, beta2 = betas
        if decoupled_weight_decay:
            p = p * (1 - lr * weight_decay)
        else:
            g = where(weight_decay != 0, g + weight_decay * p, g)
        m = lerp(exp_avg, g, 1 - beta1)
        v = beta2 * exp_avg_sq + (1 - beta2) * g * g
        unbiased = 1 - beta2**step
        limit = 2 / (1 - beta2) - 1
        rho = limit - 2 * step * beta2**step / unbiased
        r = sqrt((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)) * sqrt(unbiased)
        u = lr / (1 - beta1**step) * m
        return {"p": p - where(rho > 5, r * u / (sqrt(v) + eps), u), "exp_avg": m, "exp_avg_sq": v}
