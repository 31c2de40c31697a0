"""RAdam."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernel.functions import lerp, sqrt, where
from ..optimizer import Optimizer, Params


class RAdam(Optimizer, torch.optim.RAdam):
    r"""Adam that trusts its running square only once it has seen enough: a warm-up without tuning.

    $$ \rho_\infty = \frac{2}{1-\beta_2} - 1, \quad
       \rho_t = \rho_\infty - \frac{2t\beta_2^t}{1-\beta_2^t}, \quad
       r_t = \sqrt{\frac{(\rho_t-4)(\rho_t-2)\rho_\infty}{(\rho_\infty-4)(\rho_\infty-2)\rho_t}} $$

    $$ \theta_t = \theta_{t-1} - \gamma \frac{m_t}{1-\beta_1^t} \cdot
       \begin{cases}
           r_t \sqrt{1-\beta_2^t} / (\sqrt{v_t} + \epsilon) & \rho_t > 5 \\
           1 & \text{else} \end{cases} $$

    with $m_t, v_t$ as in `Adam`. The first steps are those of momentum, five of them for
    $\beta_2 = 0.999$. Use it instead of Adam with a warm-up.

    - `lr`, `betas`, `eps`, `weight_decay` and `decoupled_weight_decay` are those of `Adam`.

    Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", 2019, arXiv:1908.03265.
    As in torch and in the authors' later code, the threshold is 5; in the paper it is 4.

    State per parameter: `step`, `exp_avg`, `exp_avg_sq`. Arguments are those of
    `torch.optim.RAdam`.
    """

    ranges = {
        "lr": "[0, inf]",
        "betas": ("[0, 1)", "[0, 1)"),
        "eps": "[0, inf]",
        "weight_decay": "[0, inf]",
    }

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
        p = p - where(rho > 5, r * u / (sqrt(v) + eps), u)
        return {"p": p, "exp_avg": m, "exp_avg_sq": v}
