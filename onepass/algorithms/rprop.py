"""Rprop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..contract.options import filled
from ..contract.values import pick
from ..kernel.functions import maximum, minimum, where
from ..optimizer import Optimizer, Params


class Rprop(Optimizer, torch.optim.Rprop):
    r"""Steps by the gradient's sign: they grow while the sign stays and shrink when it turns.

    $$ s_t = \operatorname{clip}\left(s_{t-1} \cdot
       \begin{cases}
           \eta^+ & g_t g_{t-1} > 0 \\ \eta^- & g_t g_{t-1} < 0 \\ 1 & \text{else} \end{cases},
       \ s_{\min},\ s_{\max}\right), \quad
       \theta_t = \theta_{t-1} - s_t \operatorname{sign}(g_t) $$

    If a gradient's sign has turned, the gradient counts as 0: in this step, and as $g_{t-1}$ in the
    next.

    - `lr` ($s_0$), at least 0: the length of the first step, in the weight's own unit. A later
      change has no effect.
    - `etas`: the factors $\eta^-$, between 0 and 1, and $\eta^+$, above 1.
    - `step_sizes`: the shortest and the longest step, in the weight's own unit.

    It is for gradients of the whole data set: with mini-batches the sign turns for other reasons,
    and steps collapse.

    Riedmiller and Braun, "A Direct Adaptive Method for Faster Backpropagation Learning: The RPROP
    Algorithm", 1993; in the variant without weight backtracking, iRprop-, of Igel and Hüsken, 2000.
    As in torch, a gradient that is NaN counts as 0.

    State per parameter: `step`, `prev` ($g_{t-1}$), `step_size` ($s$). Arguments are those of
    `torch.optim.Rprop`.
    """

    ranges = {
        "lr": "[0, inf]",
        "etas": ("[-inf, inf]", "[-inf, inf]"),
        "step_sizes": ("[-inf, inf]", "[-inf, inf]"),
    }

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "etas": etas,
            "step_sizes": step_sizes,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    def check_options(self, options: Mapping[str, Any]) -> None:
        super().check_options(options)
        shrink, grow = (float(options["etas"][i]) for i in range(2))
        if not 0 < shrink < 1 < grow:
            raise ValueError(
                f"{type(self).__name__}: Invalid eta values: {shrink}, {grow}; etas must be "
                "0 < shrink < 1 < grow"
            )

    def initial_state(self, name: str, like: Tensor, group: Mapping[str, Any]) -> Tensor:
        if name != "step_size":
            return super().initial_state(name, like, group)
        return filled(like, pick(group, "lr", None), "lr")

    @staticmethod
    def rule(p, g, prev, step_size, *, etas, step_sizes, step):
        shrink, grow = etas
        smallest, largest = step_sizes
        turn = g * prev
        size = step_size * where(turn > 0, grow, where(turn < 0, shrink, 1.0))
        size = minimum(maximum(size, smallest), largest)
        g = where(turn < 0, 0.0, g)
        move = where(g > 0, size, where(g < 0, -size, 0.0))
        return {"p": p - move, "prev": g, "step_size": size}
