"""Muon."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..contract.options import (
    AT_LEAST_0,
    check_betas,
    check_choice,
    check_count,
    check_number,
    check_row,
    flag,
    is_off,
    pick,
)
from ..kernel.functions import columns, lerp, maximum, rows, sqrt
from ..linalg import orthogonalize
from ..optimizer import Optimizer, Params, Rule, StepError
from .adam import Adam

ADJUSTMENTS = ("original", "match_rms_adamw")


class Muon(Optimizer, torch.optim.Muon):
    r"""Momentum made orthogonal: a step moves all directions of a weight matrix by about the same
    length.

    $$ B_t = \mu B_{t-1} + (1-\mu) g_t, \quad
       O_t = \operatorname{NewtonSchulz}\left((1-\mu) g_t + \mu B_t\right), \quad
       \theta_t = (1-\gamma\lambda)\,\theta_{t-1} - \gamma r\, O_t $$

    where $O_t$ is of $B_t$ itself without `nesterov`, and $r$ follows from the n x m matrix by
    `adjust_lr_fn`: $\sqrt{\max(1, n/m)}$ for "original" (or None), $0.2\sqrt{\max(n, m)}$ for
    "match_rms_adamw", with which lr and weight decay that are good for AdamW are good here. See
    `onepass.linalg.newton_schulz` for the iteration.

    For the hidden layers of a network. What is no matrix, and also embeddings and the last layer,
    should take AdamW: give them in a group with `use_muon=False`; with `use_muon=None` every
    parameter of a group that is no matrix takes AdamW and the others take Muon. AdamW has the
    group's `lr` and `weight_decay`, `betas` and `adam_eps`; where both share a group, choose
    "match_rms_adamw". `use_muon=True`, the default, is torch's: only matrices are allowed.

    Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024,
    https://kellerjordan.github.io/posts/muon; the second adjustment: Liu et al., "Muon is Scalable
    for LLM Training", 2025, arXiv:2502.16982.

    All updates are computed before the first is applied: where a product fails, nothing has
    changed, and a step takes memory for them, 4 bytes for each weight of a matrix. How matrices are
    stacked for a product may change its rounding, so here alone bits may depend on which parameters
    step together.

    State per parameter: `momentum_buffer`; with AdamW `step`, `exp_avg`, `exp_avg_sq`. Arguments
    are those of `torch.optim.Muon`, and ours by keyword, of which `capturable` is for steps in a
    CUDA graph. In torch 2.13 a bf16 parameter with `nesterov=False` has its own momentum normalised
    in place; not here.

    Raises ValueError for an option outside its range or a parameter that is no matrix under
    `use_muon=True`, TypeError for an option that is no number.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        use_muon: bool | None = True,
        betas: tuple[float, float] = (0.9, 0.95),
        adam_eps: float = 1e-8,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "use_muon": use_muon,
            "betas": betas,
            "adam_eps": adam_eps,
        }
        # Where it is off, param groups have torch's keys.
        defaults |= {} if is_off(capturable) else {"capturable": capturable}
        super().__init__(params, defaults)

    def check_options(self, options: Mapping[str, Any]) -> None:
        owner = type(self).__name__
        check_number(owner, "lr", options["lr"], words=AT_LEAST_0.format("Learning rate"))
        check_number(
            owner, "weight_decay", options["weight_decay"], words=AT_LEAST_0.format("weight decay")
        )
        check_number(owner, "momentum", options["momentum"], words=AT_LEAST_0.format("momentum"))
        for name in ("eps", "adam_eps"):
            check_number(owner, name, options[name])
        check_count(owner, "ns_steps", options["ns_steps"], low=0, below=100)
        check_betas(owner, options["betas"])
        check_row(owner, "ns_coefficients", options["ns_coefficients"], 3, error=ValueError)
        words = "Adjust learning rate function {} is not supported"
        check_choice(owner, "adjust_lr_fn", options["adjust_lr_fn"], ADJUSTMENTS, words=words)
        for p in options.get("params", ()):
            type(self).rule_of(self, p, options)

    def flags(self, group: Mapping[str, Any]) -> dict[str, bool]:
        # These change what is computed without a sign of it, where a value makes no sense.
        owner, coefficients = type(self).__name__, pick(group, "ns_coefficients", None)
        if type(coefficients) is not tuple or len(coefficients) != 3:
            check_row(owner, "ns_coefficients", coefficients, 3)
        check_choice(
            owner, "adjust_lr_fn", pick(group, "adjust_lr_fn", None), ADJUSTMENTS, StepError
        )
        check_count(owner, "ns_steps", pick(group, "ns_steps", None), low=0, below=100)
        return super().flags(group) | {"is_mixed": pick(group, "use_muon", None) is None}

    def rule_of(self, p: Tensor, group: Mapping[str, Any]) -> Rule:
        wanted = (
            None if pick(group, "use_muon", None) is None else flag(group["use_muon"], "use_muon")
        )
        if wanted and p.dim() != 2:
            raise ValueError(
                f"{type(self).__name__} only supports 2D parameters, and one has shape "
                f"{tuple(p.shape)}; pass use_muon=None to let what is no matrix take AdamW, or "
                "put it into a group with use_muon=False"
            )
        return Muon.rule if wanted or (wanted is None and p.dim() == 2) else Muon.adamw

    @staticmethod
    def rule(
        p,
        g,
        momentum_buffer,
        *,
        lr,
        weight_decay,
        momentum,
        nesterov,
        ns_coefficients,
        eps,
        ns_steps,
        adjust_lr_fn,
    ):
        b = lerp(momentum_buffer, g, 1 - momentum)
        u = orthogonalize(lerp(g, b, momentum) if nesterov else b, ns_coefficients, eps, ns_steps)
        ratio = (
            0.2 * sqrt(maximum(rows(), columns())) if adjust_lr_fn == "match_rms_adamw" else None
        )
        ratio = sqrt(maximum(1.0, rows() / columns())) if ratio is None else ratio
        return {"p": p * (1 - lr * weight_decay) - lr * ratio * u, "momentum_buffer": b}

    @staticmethod
    def adamw(p, g, exp_avg, exp_avg_sq, *, lr, weight_decay, betas, adam_eps, step):
        common = {"amsgrad": False, "decoupled_weight_decay": True, "eps": adam_eps}
        return Adam.rule(
            p,
            g,
            exp_avg,
            exp_avg_sq,
            None,
            lr=lr,
            betas=betas,
            weight_decay=weight_decay,
            step=step,
            **common,
        )
