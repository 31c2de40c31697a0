"""Averaged stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..contract.options import filled
from ..contract.values import pick
from ..kernel.functions import Scalar, maximum, where
from ..optimizer import Optimizer, Params


class ASGD(Optimizer, torch.optim.ASGD):
    r"""Gradient descent with shrinking steps, and the mean of the parameters from step $t_0$ on.

    $$ \theta_t = (1 - \lambda \eta_t)\,\theta_{t-1} - \eta_t g_t, \quad
       \eta_{t+1} = \frac{\gamma}{(1 + \lambda\gamma t)^\alpha}, \quad
       \bar\theta_t = \bar\theta_{t-1} + \mu_t (\theta_t - \bar\theta_{t-1}), \quad
       \mu_{t+1} = \frac{1}{\max(1, t - t_0)} $$

    with $\eta_1 = \gamma$ and $\mu_1 = 1$.

    - `lr` ($\gamma$), at least 0: the length of the first step, as a multiple of the gradient. A
      change takes effect one step later, as in torch.
    - `lambd` ($\lambda$), any number: weight decay, and how soon steps shrink: $\eta_t$ begins to
      fall after about $1 / (\lambda\gamma)$ steps, a million by default.
    - `alpha`, any number: the power of that fall.
    - `t0`, in steps: the mean begins there. Before it, the mean is the parameter itself.
    - `weight_decay`, at least 0: it adds `weight_decay` times $\theta_{t-1}$ to $g_t$.

    The mean, `state[p]["ax"]`, is what the theory is about: copy it into the model before you
    evaluate. It is for convex problems. For networks prefer weights averaged with any optimizer, as
    in `torch.optim.swa_utils`.

    Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992; the
    schedule: Bottou, 2010.

    State per parameter: `step`, `ax` ($\bar\theta$), and the numbers `eta` and `mu`. Arguments are
    those of `torch.optim.ASGD`.
    """

    ranges = {
        "lr": "[0, inf]",
        "lambd": "[-inf, inf]",
        "alpha": "[-inf, inf]",
        "t0": "[-inf, inf]",
        "weight_decay": "[0, inf]",
    }

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "lambd": lambd,
            "alpha": alpha,
            "t0": t0,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    def initial_state(self, name: str, like: Tensor, group: Mapping[str, Any]) -> Tensor:
        if name == "eta":
            return filled(like, pick(group, "lr", None), "lr")
        return filled(like, 1.0 if name == "mu" else 0.0, name)

    @staticmethod
    def rule(p, g, ax, eta: Scalar, mu: Scalar, *, lr, lambd, alpha, t0, weight_decay, step):
        g = where(weight_decay != 0, g + weight_decay * p, g)
        p = p * (1 - lambd * eta) - eta * g
        ax = where(mu == 1, p, ax + mu * (p - ax))
        return {
            "p": p,
            "ax": ax,
            "eta": lr / (1 + lambd * lr * step) ** alpha,
            "mu": 1 / maximum(step - t0, 1.0),
        }
