"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..contract.options import is_zero, unless_off
from ..contract.values import StepError
from ..kernel.functions import where
from ..optimizer import Optimizer, Params


class SGD(Optimizer, torch.optim.SGD):
    r"""The gradient times lr, or with momentum a decaying sum of the gradients so far.

    $$ b_t = \mu b_{t-1} + (1-\tau) g_t, \quad \theta_t = \theta_{t-1} - \gamma b_t $$

    with $b_1 = g_1$.

    - `lr` ($\gamma$), at least 0: the length of a step, as a multiple of the gradient.
    - `momentum` ($\mu$), at least 0 and below 1 for a sum that decays: in the long run steps are
      $1 / (1-\mu)$ times as long as without it, ten times for 0.9.
    - `dampening` ($\tau$), any number: 0 for the sum, $\mu$ for an average.
    - `nesterov` steps along $g_t + \mu b_t$ instead of $b_t$. It needs a momentum, and a dampening
      of 0.
    - `weight_decay` ($\lambda$), at least 0: it adds $\lambda \theta_{t-1}$ to $g_t$.

    Robbins and Monro, "A Stochastic Approximation Method", 1951; Sutskever et al., "On the
    importance of initialization and momentum in deep learning", 2013. As in torch, lr multiplies
    the whole sum. In the paper it multiplies each gradient when it enters: the two differ after a
    change of lr.

    State per parameter: `momentum_buffer` ($b$) if momentum is not 0, else none. Arguments are
    those of `torch.optim.SGD`, and `capturable`.

    A sparse gradient steps the rows that it has values for. With momentum every row moves, also one
    that has no value in this step: the gradient is converted to a dense one, and a step costs what
    a dense one does. The results are torch's. Buffers are dense here and sparse in torch; sparse
    ones are converted when they are loaded.

    The step raises `StepError` for a sparse gradient if `weight_decay` is not 0.
    """

    gradients = "any"

    ranges = {
        "lr": "[0, inf]",
        "momentum": "[0, inf]",
        "dampening": "[-inf, inf]",
        "weight_decay": "[0, inf]",
    }

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults | unless_off(capturable=capturable))

    def check_options(self, options: Mapping[str, Any]) -> None:
        super().check_options(options)
        momentum = options["momentum"]
        dampening = options["dampening"]
        if options["nesterov"] and (momentum <= 0 or dampening != 0):
            raise ValueError(
                f"{type(self).__name__}: Nesterov momentum requires a momentum and zero dampening, "
                f"got momentum={momentum}, dampening={dampening}"
            )

    def flags(self, group: Mapping[str, Any]) -> dict[str, bool]:
        return super().flags(group) | {"has_momentum": not is_zero(group.get("momentum", 0))}

    def steps_rows(self, group: Mapping[str, Any]) -> bool:
        if group["weight_decay"] != 0:
            raise StepError(
                f"{type(self).__name__}: the weight_decay option is not compatible with sparse "
                f"gradients, got {group['weight_decay']}; set it to 0, or make the gradients dense"
            )
        return group["momentum"] == 0

    @staticmethod
    def rule(
        p,
        g,
        momentum_buffer,
        *,
        lr,
        momentum,
        dampening,
        weight_decay,
        nesterov,
        first,
        has_momentum,
    ):
        g = where(weight_decay != 0, g + weight_decay * p, g)
        if not has_momentum:
            return {"p": p - lr * g}
        b = where(first, g, momentum * momentum_buffer + (1 - dampening) * g)
        return {"p": p - lr * (g + momentum * b if nesterov else b), "momentum_buffer": b}
