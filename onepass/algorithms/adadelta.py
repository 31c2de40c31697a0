"""Adadelta."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..contract.options import check_modes, check_number
from ..kernel.functions import sqrt, where
from ..optimizer import Optimizer, Params


class Adadelta(Optimizer, torch.optim.Adadelta):
    r"""Steps as large as recent steps were, along the gradient over its running root: it finds its
    own scale.

    $$ v_t = \rho v_{t-1} + (1-\rho) g_t^2, \quad
       \Delta_t = \sqrt{\frac{u_{t-1} + \epsilon}{v_t + \epsilon}}\, g_t, \quad
       u_t = \rho u_{t-1} + (1-\rho) \Delta_t^2, \quad \theta_t = \theta_{t-1} - \gamma \Delta_t $$

    with $g_t$ increased by $\lambda \theta_{t-1}$ for `weight_decay`. The paper has no learning
    rate: leave `lr` at 1. It begins slowly, as $u_0 = 0$ makes the first steps about
    $\sqrt\epsilon$; a larger `eps` shortens this.

    Zeiler, "ADADELTA: An Adaptive Learning Rate Method", 2012, arXiv:1212.5701.

    State per parameter: `step`, `square_avg`, `acc_delta`. Arguments are those of
    `torch.optim.Adadelta`; `foreach` changes nothing.

    Raises ValueError for an option outside its range, TypeError for one that is no number.
    """

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

    def check_options(self, options: Mapping[str, Any]) -> None:
        for name in ("lr", "eps", "weight_decay"):
            check_number(type(self).__name__, name, options[name])
        check_number(type(self).__name__, "rho", options["rho"], up_to=1.0)
        check_modes(type(self).__name__, options)

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
