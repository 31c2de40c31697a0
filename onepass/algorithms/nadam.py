"""NAdam."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..kernel.functions import Scalar, lerp, sqrt, where
from ..optimizer import Optimizer, Params


class NAdam(Optimizer, torch.optim.NAdam):
    r"""Adam with Nesterov momentum: a step looks along the momentum that the next one will have.

    $$ \mu_t = \beta_1 \left(1 - \tfrac12 \cdot 0.96^{t\psi}\right), \quad
       \hat m_t = \frac{\mu_{t+1} m_t}{1 - \prod_{i=1}^{t+1}\mu_i}
                + \frac{(1-\mu_t) g_t}{1 - \prod_{i=1}^{t}\mu_i}, \quad
       \theta_t = \theta_{t-1} - \gamma \frac{\hat m_t}{\sqrt{v_t / (1-\beta_2^t)} + \epsilon} $$

    with $m_t, v_t$ as in `Adam`. Use it as you would use Adam or AdamW.

    - `lr`, `betas`, `eps`, `weight_decay` and `decoupled_weight_decay` are those of `Adam`.
    - `momentum_decay` ($\psi$), at least 0: how soon the momentum $\mu_t$ grows from half of
      $\beta_1$ to all of it. With 0.004 half of the way is done after about 4200 steps.

    Dozat, "Incorporating Nesterov Momentum into Adam", ICLR 2016 workshop; there $m_t$ decays by
    $\mu_t$, in torch by $\beta_1$, and so here.

    State per parameter: `step`, `exp_avg`, `exp_avg_sq`, `mu_product` (one number). Arguments are
    those of `torch.optim.NAdam`.
    """

    ranges = {
        "lr": "[0, inf]",
        "betas": ("[0, 1)", "[0, 1)"),
        "eps": "[0, inf]",
        "weight_decay": "[0, inf]",
        "momentum_decay": "[0, inf]",
    }

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
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
            "momentum_decay": momentum_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults)

    def initial_state(self, name: str, like: Tensor, group: Mapping[str, Any]) -> Tensor:
        if name == "mu_product":
            return torch.ones_like(like)
        return super().initial_state(name, like, group)

    @staticmethod
    def rule(
        p,
        g,
        exp_avg,
        exp_avg_sq,
        mu_product: Scalar,
        *,
        lr,
        betas,
        eps,
        weight_decay,
        momentum_decay,
        step,
        decoupled_weight_decay,
    ):
        beta1, beta2 = betas
        mu, mu_next = (beta1 * (1 - 0.5 * 0.96 ** (t * momentum_decay)) for t in (step, step + 1))
        mu_product = mu_product * mu
        if decoupled_weight_decay:
            p = p * (1 - lr * weight_decay)
        else:
            g = where(weight_decay != 0, g + weight_decay * p, g)
        m = lerp(exp_avg, g, 1 - beta1)
        v = beta2 * exp_avg_sq + (1 - beta2) * g * g
        root = sqrt(v) / sqrt(1 - beta2**step) + eps
        u = lr * mu_next / (1 - mu_product * mu_next) * m + lr * (1 - mu) / (1 - mu_product) * g
        return {"p": p - u / root, "exp_avg": m, "exp_avg_sq": v, "mu_product": mu_product}
