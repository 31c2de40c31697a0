"""Adafactor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..contract.options import unless_off
from ..contract.ranges import Entries, Number
from ..contract.values import pick
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

# What `eps` must be in a step: its range is only checked before.
EPS = Entries(Number("[-inf, inf]", or_none=True), "[-inf, inf]")


class Adafactor(Optimizer, torch.optim.Adafactor):
    r"""Adam's scaling, from mean squares of rows and columns: little state for large matrices.

    $$ R_t = (1-b_t) R_{t-1} + b_t \operatorname{rowmean}(g_t^2), \quad
       C_t = (1-b_t) C_{t-1} + b_t \operatorname{colmean}(g_t^2), \quad
       V_t = \frac{R_t C_t}{\max(\operatorname{mean}(R_t), \epsilon_1)} $$

    $$ U_t = \frac{g_t}{\max(\sqrt{V_t}, \epsilon_1)}, \quad
       \theta_t = (1-\gamma\lambda)\,\theta_{t-1}
       - \alpha_t \frac{U_t}{\max(1, \operatorname{RMS}(U_t) / d)}, \quad
       \alpha_t = \max(\epsilon_2, \operatorname{RMS}(\theta_{t-1})) \min(\gamma, 1/\sqrt t) $$

    with $b_t = t^{\beta}$. Rows and columns are those of the last two dimensions; vectors and
    scalars keep a whole $V_t$ (`variance`).

    - `lr` ($\gamma$), at least 0: the upper limit of a step, as a part of the size of the weights.
      The default is good for fine-tuning; raise it for training from scratch.
    - `beta2_decay` ($\beta$), at most 0: with -0.8 the running means reach back over about
      $t^{0.8}$ steps.
    - `eps`, two numbers of at least 0: $\epsilon_1$, in the unit of the gradient, or None for the
      machine epsilon of the parameter's type; and $\epsilon_2$, in the weight's own unit, the size
      that weights of nearly zero count as.
    - `d`, at least 1: the root mean square of $U_t$ from which a step is clipped.
    - `weight_decay` ($\lambda$), at least 0: in a step a weight loses the part $\gamma\lambda$ of
      itself.

    For models whose optimizer state does not fit: n + m numbers of state for n x m weights, of
    which Adam keeps 2nm.

    Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", 2018,
    arXiv:1804.04235. As in torch, and unlike the paper, $\epsilon_1$ bounds $\sqrt{V}$ from below
    instead of being added to the squares, and weight decay is decoupled.

    A step walks over a matrix three times, and needs no temporary of its size. State per parameter:
    `step`, `row_var` and `col_var`, or `variance`. Arguments are those of `torch.optim.Adafactor`,
    and `capturable`. If parameters have several types and `eps[0]` is None, torch takes the epsilon
    of the first parameter of a list for all; here each has its own.

    The step raises `StepError` for complex parameters.
    """

    ranges = {
        "lr": Number("[0, inf]", words="Learning rate should be >= 0 but is"),
        "beta2_decay": Number("[-inf, 0]", words="beta2_decay should be <= 0 but is"),
        "eps": Entries(
            Number("[0, inf]", words="epsilon1 should be >= 0 but is", or_none=True),
            Number("[0, inf]", words="epsilon2 should be >= 0 but is"),
        ),
        "d": Number("[1, inf]", words="Clipping threshold d should be >= 1 but is"),
        "weight_decay": Number("[0, inf]", words="weight_decay should be >= 0 but is"),
    }

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
        super().__init__(params, defaults | unless_off(capturable=capturable))

    def flags(self, group: Mapping[str, Any]) -> dict[str, bool]:
        eps = pick(group, "eps", None)
        if type(eps) is not tuple or len(eps) != 2:
            EPS.check(type(self).__name__, "eps", eps)
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
        u = g / sqrt(maximum(v, eps1 * eps1))
        p = _move(p, u, lr, eps[1], d, weight_decay, step)
        return {"p": p, "row_var": row, "col_var": column}

    @staticmethod
    def rule_of_vectors(p, g, variance, *, lr, beta2_decay, eps, d, weight_decay, step, has_eps):
        eps1 = eps[0] if has_eps else epsilon()
        v = lerp(variance, square(g), step**beta2_decay)
        u = g / sqrt(maximum(v, eps1 * eps1))
        p = _move(p, u, lr, eps[1], d, weight_decay, step)
        return {"p": p, "variance": v}


def _move(p, u, lr, eps2, d, weight_decay, step):
    """Return p after a step along u, relative to the size of p and clipped by that of u."""
    size = sqrt(mean(square(p)))
    clip = sqrt(mean(square(u))) / d
    # Not maximum: as in torch, one NaN among many numbers does not make all of them NaN.
    alpha = where(size > eps2, size, eps2) * minimum(lr, 1 / sqrt(step))
    return p * (1 - lr * weight_decay) - alpha / where(clip > 1.0, clip, 1.0) * u
