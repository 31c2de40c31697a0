"""Adafactor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..contract.options import AT_LEAST_0, check_modes, check_number, check_row, is_off, pick
from ..kernel.functions import (
    PerColumn,
    PerRow,
    column_mean,
    epsilon,
    lerp,
    maximum,
    mean,
    minimum,
    row_mean,
    sqrt,
    square,
    where,
)
from ..optimizer import Optimizer, Params, Rule


class Adafactor(Optimizer, torch.optim.Adafactor):
    r"""Adam's scaling from the mean squares of rows and columns alone: a matrix needs state for its
    edges only.

    $$ R_t = (1-b_t) R_{t-1} + b_t \operatorname{rowmean}(g_t^2), \quad
       C_t = (1-b_t) C_{t-1} + b_t \operatorname{colmean}(g_t^2), \quad
       V_t = \frac{R_t C_t}{\max(\operatorname{mean}(R_t), \epsilon_1)} $$

    $$ U_t = \frac{g_t}{\max(\sqrt{V_t}, \epsilon_1)}, \quad
       \theta_t = (1-\gamma\lambda)\,\theta_{t-1}
       - \alpha_t \frac{U_t}{\max(1, \operatorname{RMS}(U_t) / d)}, \quad
       \alpha_t = \max(\epsilon_2, \operatorname{RMS}(\theta_{t-1})) \min(\gamma, 1/\sqrt t) $$

    with $b_t = t^{\beta}$, $\beta$ = `beta2_decay`. Rows and columns are those of the last two
    dimensions; vectors and scalars keep a whole $V_t$ (`variance`). Steps are relative to the size
    of the weights: `lr` is an upper limit, and the default is good for fine-tuning; raise it for
    training from scratch. For models whose optimizer state does not fit: n + m numbers of state for
    n x m weights, where Adam keeps 2nm.

    Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", 2018,
    arXiv:1804.04235. As in torch, and unlike the paper, $\epsilon_1$ (default: the machine epsilon
    of the parameter's type) bounds $\sqrt{V}$ from below instead of being added to the squares, and
    weight decay is decoupled.

    Three walks over a matrix, no temporary of its size. State per parameter: `step`, `row_var` and
    `col_var`, or `variance`. Arguments are those of `torch.optim.Adafactor`; `foreach` changes
    nothing, and ours is `capturable`, for steps in a CUDA graph. With several parameter types and
    `eps[0]` of None, torch takes the epsilon of the first parameter of a list for all; here each
    has its own.

    Raises ValueError for an option outside its range, TypeError for one that is no number,
    StepError for complex parameters.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta2_decay": beta2_decay,
            "eps": eps,
            "d": d,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "maximize": maximize,
        }
        # Where it is off, param groups have torch's keys.
        defaults |= {} if is_off(capturable) else {"capturable": capturable}
        super().__init__(params, defaults)

    def check_options(self, options: Mapping[str, Any]) -> None:
        owner = type(self).__name__
        check_number(owner, "lr", options["lr"], words=AT_LEAST_0.format("Learning rate"))
        check_number(
            owner, "weight_decay", options["weight_decay"], words=AT_LEAST_0.format("weight_decay")
        )
        check_number(
            owner, "d", options["d"], low=1.0, words="Clipping threshold d should be >= 1 but is"
        )
        words = "beta2_decay should be <= 0 but is"
        check_number(
            owner, "beta2_decay", options["beta2_decay"], low=float("-inf"), up_to=0.0, words=words
        )
        words = [AT_LEAST_0.format(name) for name in ("epsilon1", "epsilon2")]
        check_row(owner, "eps", options["eps"], 2, low=0.0, first=None, words=words)
        check_modes(owner, options)

    def flags(self, group: Mapping[str, Any]) -> dict[str, bool]:
        eps = pick(group, "eps", None)
        if type(eps) is not tuple or len(eps) != 2:
            check_row(type(self).__name__, "eps", eps, 2, first=None)
        return super().flags(group) | {"has_eps": eps[0] is not None}

    def rule_of(self, p: Tensor, group: Mapping[str, Any]) -> Rule:
        # Complex numbers have no rows: the rule of matrices refuses them, whatever their shape.
        return Adafactor.rule if p.dim() > 1 or p.is_complex() else Adafactor.rule_of_vectors

    @staticmethod
    def rule(
        p,
        g,
        row_var: PerRow,
        col_var: PerColumn,
        *,
        lr,
        beta2_decay,
        eps,
        d,
        weight_decay,
        step,
        has_eps,
    ):
        eps1 = eps[0] if has_eps else epsilon()
        row = lerp(row_var, row_mean(square(g)), step**beta2_decay)
        column = lerp(col_var, column_mean(square(g)), step**beta2_decay)
        v = row / maximum(column_mean(row), eps1) * column
        p = _move(p, g / sqrt(maximum(v, eps1 * eps1)), lr, eps[1], d, weight_decay, step)
        return {"p": p, "row_var": row, "col_var": column}

    @staticmethod
    def rule_of_vectors(p, g, variance, *, lr, beta2_decay, eps, d, weight_decay, step, has_eps):
        eps1 = eps[0] if has_eps else epsilon()
        v = lerp(variance, square(g), step**beta2_decay)
        return {
            "p": _move(p, g / sqrt(maximum(v, eps1 * eps1)), lr, eps[1], d, weight_decay, step),
            "variance": v,
        }


def _move(p, u, lr, eps2, d, weight_decay, step):
    """A step along u, relative to the size of p and clipped by that of u."""
    size, clip = sqrt(mean(square(p))), sqrt(mean(square(u))) / d
    # Not maximum: as in torch, one NaN among many numbers does not make all of them NaN.
    alpha = where(size > eps2, size, eps2) * minimum(lr, 1 / sqrt(step))
    return p * (1 - lr * weight_decay) - alpha / where(clip > 1.0, clip, 1.0) * u
