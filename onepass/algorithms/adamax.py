"""Adamax."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernel.functions import lerp, maximum, where
from ..optimizer import Optimizer, Params


class Adamax(Optimizer, torch.optim.Adamax):
    r"""Adam with a decaying maximum of the gradient in the place of its running square.

    $$ m_t = \beta_1 m_{t-1} + (1-\beta_1) g_t, \quad
       u_t = \max(\beta_2 u_{t-1}, |g_t| + \epsilon), \quad
       \theta_t = \theta_{t-1} - \frac{\gamma}{1-\beta_1^t} \frac{m_t}{u_t} $$

    - `lr` ($\gamma$), at least 0: about the largest step of a weight, in the weight's own unit.
    - `betas`, each in [0, 1): which part of $m$ and of $u$ stays in each step.
    - `eps`, at least 0: in the unit of the gradient.
    - `weight_decay` ($\lambda$), at least 0: it adds $\lambda \theta_{t-1}$ to $g_t$.

    One huge gradient is forgotten at the rate of $\beta_2$: steps stay calm where gradients are
    rare or noisy, as with embeddings.

    Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2014, arXiv:1412.6980, section 7.1.
    As in torch, $\epsilon$ is added to the gradient's size; the paper has none.

    State per parameter: `step`, `exp_avg`, `exp_inf`. Arguments are those of `torch.optim.Adamax`.
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
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    @staticmethod
    def rule(p, g, exp_avg, exp_inf, *, lr, betas, eps, weight_decay, step):
        beta1, beta2 = betas
        g = where(weight_decay != 0, g + weight_decay * p, g)
        m = lerp(exp_avg, g, 1 - beta1)
        u = maximum(beta2 * exp_inf, abs(g) + eps)
        return {"p": p - lr / (1 - beta1**step) * m / u, "exp_avg": m, "exp_inf": u}
