"""Adagrad."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..contract.options import filled, unless_off
from ..contract.values import StepError, pick
from ..kernel.functions import sqrt, where
from ..optimizer import Optimizer, Params


class Adagrad(Optimizer, torch.optim.Adagrad):
    r"""The gradient over the root of the sum of its squares so far: large steps for rare features.

    $$ G_t = G_{t-1} + g_t^2, \quad
       \theta_t = \theta_{t-1} - \frac{\gamma}{1 + (t-1)\eta} \frac{g_t}{\sqrt{G_t} + \epsilon} $$

    - `lr` ($\gamma$), at least 0: how far a weight moves in the first step, in the weight's own
      unit. After $t$ gradients of one size it is $1 / \sqrt t$ of this.
    - `lr_decay` ($\eta$), at least 0: how fast `lr` falls; it is half after $1 / \eta$ steps.
    - `initial_accumulator_value` ($G_0$), at least 0: in the unit of the gradient's square.
    - `eps`, at least 0: in the unit of the gradient.
    - `weight_decay` ($\lambda$), at least 0: it adds $\lambda \theta_{t-1}$ to $g_t$.

    The sum only grows, so steps only shrink: it is for sparse features and convex problems, not for
    deep networks.

    Duchi, Hazan and Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic
    Optimization", JMLR 2011.

    State per parameter: `step` and `sum` ($G$). The constructor creates them, as in torch; for
    groups that are added later, for which torch has none, the first step does. Arguments are those
    of `torch.optim.Adagrad`, and `capturable`.

    A sparse gradient steps the rows that it has values for, which is what a dense one with zeros
    elsewhere does. The real and the imaginary part of a complex parameter step as two numbers, with
    sparse gradients, too, for which torch squares the complex numbers.

    The step raises `StepError` for a sparse gradient if `weight_decay` is not 0.
    """

    gradients = "any"

    ranges = {
        "lr": "[0, inf]",
        "lr_decay": "[0, inf]",
        "weight_decay": "[0, inf]",
        "initial_accumulator_value": "[0, inf]",
        "eps": "[0, inf]",
    }

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults | unless_off(capturable=capturable))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if self._onepass.taken is not None:
            # The constructor runs. Groups that are added later get state in their first step.
            type(self).make_state(self, self.param_groups[-1])

    def initial_state(self, name: str, like: Tensor, group: Mapping[str, Any]) -> Tensor:
        name = "initial_accumulator_value"
        return filled(like, pick(group, name, None), name)

    def steps_rows(self, group: Mapping[str, Any]) -> bool:
        if group["weight_decay"] != 0:
            raise StepError(
                f"{type(self).__name__}: the weight_decay option is not compatible with sparse "
                f"gradients, got {group['weight_decay']}; set it to 0, or make the gradients dense"
            )
        return True

    def share_memory(self) -> None:
        """Move the sums into shared memory, for processes that train together."""
        for state in self.state.values():
            state["sum"].share_memory_()

    @staticmethod
    def rule(p, g, sum, *, lr, lr_decay, eps, weight_decay, step):
        g = where(weight_decay != 0, g + weight_decay * p, g)
        sum = sum + g * g
        return {"p": p - lr / (1 + (step - 1) * lr_decay) * g / (sqrt(sum) + eps), "sum": sum}
