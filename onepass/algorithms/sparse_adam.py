"""SparseAdam."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..kernel.functions import lerp, sqrt
from ..optimizer import Optimizer, Params


class SparseAdam(Optimizer, torch.optim.SparseAdam):
    r"""Adam for sparse gradients: a step moves only the rows that the gradient has values for.

    $$ m_t = \beta_1 m_{t-1} + (1-\beta_1) g_t, \quad
       v_t = \beta_2 v_{t-1} + (1-\beta_2) g_t^2, \quad
       \theta_t = \theta_{t-1} -
           \gamma \frac{\sqrt{1-\beta_2^t}}{1-\beta_1^t} \frac{m_t}{\sqrt{v_t} + \epsilon} $$

    for the rows of $\theta$, $m$ and $v$ that $g_t$ has; all others stay as they are, moments
    included. $t$ counts the parameter's steps, not a row's, so the first step of a row is larger if
    it comes late.

    - `lr` ($\gamma$), above 0: about how far a weight moves in a step, in the weight's own unit.
    - `betas`, each in [0, 1): which part of a row's $m$ and $v$ stays when the row steps.
    - `eps`, above 0: in the unit of the gradient.

    It is for embeddings with `sparse=True`: a step costs what its rows cost, however many the table
    has. If most rows occur in every batch, take `Adam` and dense gradients, whose moments decay for
    all rows alike.

    Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2014, arXiv:1412.6980: the form at
    the end of its section 2, in which $\epsilon$ is added before the bias is corrected; `Adam` adds
    it after.

    State per parameter: `step`, `exp_avg`, `exp_avg_sq`, under torch's names; `step` is an int, as
    there. Arguments are those of `torch.optim.SparseAdam`. Parameters may lie in memory in any
    order.

    Raises ValueError for a parameter that is sparse or complex; the step raises `StepError` for a
    dense gradient.
    """

    gradients = "sparse"

    ranges = {
        "lr": "(0, inf]",
        "betas": ("[0, 1)", "[0, 1)"),
        "eps": "(0, inf]",
    }

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "maximize": maximize})

    def check_options(self, options: Mapping[str, Any]) -> None:
        super().check_options(options)
        owner = type(self).__name__
        for p in options.get("params", ()):
            if p.is_sparse:
                raise ValueError(
                    f"{owner} requires dense parameter tensors, and one of shape {tuple(p.shape)} "
                    "is sparse"
                )
            if p.is_complex():
                raise ValueError(
                    f"{owner} does not support complex parameters, and one of them is {p.dtype}"
                )

    @staticmethod
    def rule(p, g, exp_avg, exp_avg_sq, *, lr, betas, eps, step):
        beta1, beta2 = betas
        m = lerp(exp_avg, g, 1 - beta1)
        v = lerp(exp_avg_sq, g * g, 1 - beta2)
        size = lr * sqrt(1 - beta2**step) / (1 - beta1**step)
        return {"p": p - size * (m / (sqrt(v) + eps)), "exp_avg": m, "exp_avg_sq": v}
