"""Averaged stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..contract.options import check_modes, check_number, filled, pick
from ..kernel.functions import Scalar, maximum, where
from ..optimizer import Optimizer, Params


class ASGD(Optimizer, torch.optim.ASGD):
    r"""Gradient descent with shrinking steps, beside which the mean of the parameters from step
    $t_0$ on is kept.

    $$ \theta_t = (1 - \lambda \eta_t)\,\theta_{t-1} - \eta_t g_t, \quad
       \eta_{t+1} = \frac{\gamma}{(1 + \lambda\gamma t)^\alpha}, \quad
       \bar\theta_t = \bar\theta_{t-1} + \mu_t (\theta_t - \bar\theta_{t-1}), \quad
       \mu_{t+1} = \frac{1}{\max(1, t - t_0)} $$

    with $\lambda$ = `lambd`, $\eta_1 = \gamma$, $\mu_1 = 1$, and $g_t$ increased by `weight_decay`
    times $\theta_{t-1}$. The mean, `state[p]["ax"]`, is what the theory is about: copy it into the
    model before evaluating. For convex problems; for networks prefer weights averaged with any
    optimizer, as in `torch.optim.swa_utils`.

    Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992; the
    schedule: Bottou, 2010.

    State per parameter: `step`, `ax`, and the numbers `eta` and `mu`. A change of lr takes effect
    one step later, as in torch. Arguments are those of `torch.optim.ASGD`; `foreach` changes
    nothing.

    Raises ValueError for an option outside its range, TypeError for one that is no number.
    """

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

    def check_options(self, options: Mapping[str, Any]) -> None:
        for name in ("lr", "weight_decay"):
            check_number(type(self).__name__, name, options[name])
        for name in ("lambd", "alpha", "t0"):
            check_number(type(self).__name__, name, options[name], low=float("-inf"))
        check_modes(type(self).__name__, options)

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
