"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..contract.options import check_modes, check_number, is_off, is_zero
from ..kernel.functions import where
from ..optimizer import Optimizer, Params, StepError


class SGD(Optimizer, torch.optim.SGD):
    r"""The gradient times lr, or with momentum a decaying sum of the gradients so far.

    $$ b_t = \mu b_{t-1} + (1-\tau) g_t, \quad \theta_t = \theta_{t-1} - \gamma b_t $$

    with $b_1 = g_1$, and $g_t + \mu b_t$ in the place of $b_t$ for `nesterov`; `weight_decay` adds
    $\lambda \theta_{t-1}$ to the gradient.

    Robbins and Monro, "A Stochastic Approximation Method", 1951; Sutskever et al., "On the
    importance of initialization and momentum in deep learning", 2013. As in torch, lr multiplies
    the whole sum, not each gradient as it enters: after a change of lr the two differ.

    State per parameter: `momentum_buffer` where momentum is not 0, else none. Arguments are those
    of `torch.optim.SGD`; `foreach` and `fused` change nothing, except that both False select the
    eager backend and `fused=True` lets GradScaler leave the unscaling to the step. Ours is
    `capturable`, for steps in a CUDA graph.

    A sparse gradient steps the rows that it has values for. With momentum every row moves, whether
    it has a value now or had one before: the gradient is filled up with zeros, and a step costs
    what a dense one does. The results are torch's, whose buffers are sparse then; here they are
    dense, and sparse ones that are loaded become so.

    Raises ValueError for an option outside its range, TypeError for one that is no number; the step
    raises `StepError` for a sparse gradient where `weight_decay` is not 0.
    """

    gradients = "any"

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
        # Where it is off, param groups have torch's keys.
        defaults |= {} if is_off(capturable) else {"capturable": capturable}
        super().__init__(params, defaults)

    def check_options(self, options: Mapping[str, Any]) -> None:
        owner = type(self).__name__
        for name in ("lr", "momentum", "weight_decay"):
            check_number(owner, name, options[name])
        check_number(owner, "dampening", options["dampening"], low=float("-inf"))
        if options["nesterov"] and (options["momentum"] <= 0 or options["dampening"] != 0):
            raise ValueError(
                f"{owner}: Nesterov momentum requires a momentum and zero dampening, got momentum="
                f"{options['momentum']}, dampening={options['dampening']}"
            )
        check_modes(owner, options)

    def flags(self, group: Mapping[str, Any]) -> dict[str, bool]:
        numbers = {"has_momentum": "momentum", "has_decay": "weight_decay"}
        return super().flags(group) | {
            flag: not is_zero(group.get(name, 0)) for flag, name in numbers.items()
        }

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
