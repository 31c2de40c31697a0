"""Adagrad."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..contract.options import check_modes, check_number, filled, is_off, is_zero, pick
from ..kernel.functions import sqrt, where
from ..optimizer import Optimizer, Params, StepError


class Adagrad(Optimizer, torch.optim.Adagrad):
    r"""The gradient over the root of the sum of all its squares so far: large steps for what is
    seldom seen.

    $$ G_t = G_{t-1} + g_t^2, \quad
       \theta_t = \theta_{t-1} - \frac{\gamma}{1 + (t-1)\eta} \frac{g_t}{\sqrt{G_t} + \epsilon} $$

    with $G_0$ = `initial_accumulator_value`, $\eta$ = `lr_decay`, and $g_t$ increased by $\lambda
    \theta_{t-1}$ for `weight_decay`. The sum only grows, so steps only shrink: for sparse features
    and convex problems, not deep nets.

    Duchi, Hazan and Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic
    Optimization", JMLR 2011.

    State per parameter: `step`, `sum`, from construction on, as in torch; in later groups too,
    where torch has none. Arguments are those of `torch.optim.Adagrad`; `foreach` and `fused` change
    nothing, but both False: eager backend. Ours is `capturable`, for steps in a CUDA graph.

    A sparse gradient steps the rows that it has values for, which is what a dense one with zeros
    elsewhere does; of complex parameters, too, the real and imaginary parts step as two numbers,
    where torch's sparse form squares the complex ones.

    Raises ValueError for an option outside its range, TypeError for one that is no number; the step
    raises `StepError` for a sparse gradient where `weight_decay` is not 0.
    """

    gradients = "any"

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
        # Where it is off, param groups have torch's keys.
        defaults |= {} if is_off(capturable) else {"capturable": capturable}
        super().__init__(params, defaults)

    def check_options(self, options: Mapping[str, Any]) -> None:
        for name in ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps"):
            check_number(type(self).__name__, name, options[name])
        check_modes(type(self).__name__, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if self._onepass.taken is not None:
            # Those that are added later get theirs in their first step, as with torch.
            type(self).make_state(self, self.param_groups[-1])

    def initial_state(self, name: str, like: Tensor, group: Mapping[str, Any]) -> Tensor:
        name = "initial_accumulator_value"
        return filled(like, pick(group, name, None), name)

    def flags(self, group: Mapping[str, Any]) -> dict[str, bool]:
        return super().flags(group) | {"has_decay": not is_zero(group.get("weight_decay", 0))}

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
