"""Adam, AMSGrad and AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..contract.options import as_tuple
from ..kernel.functions import lerp, maximum, sqrt, where
from ..optimizer import Optimizer, Params


class Adam(Optimizer, torch.optim.Adam):
    r"""Steps of about lr, along a running mean of the gradient over the root of its running square.

    $$ m_t = \beta_1 m_{t-1} + (1-\beta_1) g_t, \quad
       v_t = \beta_2 v_{t-1} + (1-\beta_2) g_t^2, \quad
       \theta_t = \theta_{t-1} -
           \gamma \frac{m_t / (1-\beta_1^t)}{\sqrt{v_t / (1-\beta_2^t)} + \epsilon} $$

    - `lr` ($\gamma$), at least 0: about how far a weight moves in a step, in the weight's own unit.
    - `betas`, each in [0, 1): which part of $m$ and of $v$ stays. An average with $\beta$ reaches
      back over about $1 / (1-\beta)$ steps: 10 and 1000 by default.
    - `eps`, at least 0: a size of the gradient, below which steps shrink with it.
    - `weight_decay` ($\lambda$), at least 0: it adds $\lambda \theta_{t-1}$ to $g_t$ (L2). With
      `decoupled_weight_decay` it shrinks $\theta_{t-1}$ by $1 - \gamma\lambda$ first, as `AdamW`.
    - `amsgrad` divides by the root of the largest $v$ so far.

    Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2014, arXiv:1412.6980; AMSGrad:
    Reddi, Kale and Kumar, "On the Convergence of Adam and Beyond", 2018, arXiv:1904.09237.

    State per parameter: `step`, `exp_avg`, `exp_avg_sq` (and `max_exp_avg_sq`), under torch's
    names. Arguments are those of `torch.optim.Adam`.
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
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": as_tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults)

    @staticmethod
    def rule(
        p,
        g,
        exp_avg,
        exp_avg_sq,
        max_exp_avg_sq,
        *,
        lr,
        betas,
        eps,
        weight_decay,
        step,
        amsgrad,
        decoupled_weight_decay,
    ):
        beta1, beta2 = betas
        if decoupled_weight_decay:
            p = p * (1 - lr * weight_decay)
        else:
            g = where(weight_decay != 0, g + weight_decay * p, g)
        m = lerp(exp_avg, g, 1 - beta1)
        v = beta2 * exp_avg_sq + (1 - beta2) * g * g
        new = {"exp_avg": m, "exp_avg_sq": v}
        if amsgrad:
            v = new["max_exp_avg_sq"] = maximum(max_exp_avg_sq, v)
        root = sqrt(v) / sqrt(1 - beta2**step) + eps
        return new | {"p": p - lr / (1 - beta1**step) * m / root}


class AdamW(Adam, torch.optim.AdamW):
    r"""Adam with decoupled weight decay: the default choice for transformers and most networks.

    $$ \theta_t = (1 - \gamma\lambda)\,\theta_{t-1}
           - \gamma \frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon} $$

    with $\hat m_t = m_t / (1-\beta_1^t)$ and $\hat v_t = v_t / (1-\beta_2^t)$ as in `Adam`. The
    decay does not enter the moments, so it acts on all weights alike. In one step a weight loses
    the part `lr * weight_decay` of itself: a hundred-thousandth with the defaults.

    Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2017, arXiv:1711.05101.

    State and further arguments are as for `Adam`.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A state dict of Adam, or one from before the option existed, becomes AdamW's when AdamW
        # loads it.
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True
