"""Muon."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..contract.options import unless_off
from ..contract.ranges import Choice, Entries, Number, Whole
from ..contract.values import StepError, flag, pick
from ..kernel.functions import columns, lerp, maximum, rows, sqrt
from ..linalg import orthogonalize
from ..optimizer import Optimizer, Params, Rule
from .adam import Adam

ADJUSTMENTS = ("original", "match_rms_adamw")
COEFFICIENTS = ("[-inf, inf]", "[-inf, inf]", "[-inf, inf]")
STEPS = Whole("[0, 100)")
# In a step these raise other errors than in the constructor, whose errors are torch's.
COEFFICIENTS_IN_STEP = Entries(*COEFFICIENTS)
ADJUSTMENT_IN_STEP = Choice(*ADJUSTMENTS, error=StepError)


class Muon(Optimizer, torch.optim.Muon):
    r"""Momentum made orthogonal: a step moves all directions of a matrix by about the same length.

    $$ B_t = \mu B_{t-1} + (1-\mu) g_t, \quad
       O_t = \operatorname{NewtonSchulz}\left((1-\mu) g_t + \mu B_t\right), \quad
       \theta_t = (1-\gamma\lambda)\,\theta_{t-1} - \gamma r\, O_t $$

    Without `nesterov`, $O_t$ is made of $B_t$ itself. See `onepass.linalg.newton_schulz` for the
    iteration.

    - `lr` ($\gamma$), at least 0: about the length of a step along each direction, before it is
      multiplied by $r$.
    - `weight_decay` ($\lambda$), at least 0: in a step a weight loses the part $\gamma\lambda$ of
      itself.
    - `momentum` ($\mu$), at least 0 and below 1 for an average: which part of $B$ stays.
    - `ns_coefficients` (any three numbers), `eps` (at least 0, the smallest norm that a matrix is
      divided by) and `ns_steps` (a whole number below 100) are those of the iteration.
    - `adjust_lr_fn` chooses $r$ for an n x m matrix: $\sqrt{\max(1, n/m)}$ for "original" (or
      None), $0.2\sqrt{\max(n, m)}$ for "match_rms_adamw", with which lr and weight decay that are
      good for AdamW are good here.
    - `use_muon` says what steps by this rule. True is torch's: all of a group, and only matrices
      are allowed. False: nothing, the whole group takes AdamW. None: the matrices, and everything
      else takes AdamW.
    - `betas` (each in [0, 1)) and `adam_eps` (at least 0) are AdamW's. It has the group's `lr` and
      `weight_decay`, too.

    It is for the hidden layers of a network. Use AdamW for everything that is not a matrix, and for
    embeddings and the last layer: put them into a group with `use_muon=False`. If both share a
    group, choose "match_rms_adamw".

    Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024,
    https://kellerjordan.github.io/posts/muon; the second adjustment: Liu et al., "Muon is Scalable
    for LLM Training", 2025, arXiv:2502.16982.

    All updates are computed before the first one is applied: if a product fails, nothing has
    changed. A step takes memory for them, 4 bytes for each weight of a matrix. Matrices are stacked
    for a product, which may change its rounding: in this class only, bits may depend on which
    parameters step together.

    State per parameter: `momentum_buffer`; with AdamW `step`, `exp_avg`, `exp_avg_sq`. Arguments
    are those of `torch.optim.Muon`, and ours by keyword. In torch 2.13 a bf16 parameter with
    `nesterov=False` has its own momentum normalised in place; not here.

    Raises ValueError for a parameter that is not a matrix if `use_muon` is True.
    """

    ranges = {
        "lr": Number("[0, inf]", words="Learning rate should be >= 0 but is"),
        "weight_decay": Number("[0, inf]", words="weight decay should be >= 0 but is"),
        "momentum": Number("[0, inf]", words="momentum should be >= 0 but is"),
        "ns_coefficients": Entries(*COEFFICIENTS, error=ValueError),
        "eps": "[0, inf]",
        "ns_steps": STEPS,
        "adjust_lr_fn": Choice(
            *ADJUSTMENTS, words="Adjust learning rate function {} is not supported"
        ),
        "betas": ("[0, 1)", "[0, 1)"),
        "adam_eps": "[0, inf]",
    }

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
        super().__init__(params, defaults | unless_off(capturable=capturable))

    def check_options(self, options: Mapping[str, Any]) -> None:
        super().check_options(options)
        for p in options.get("params", ()):
            type(self).rule_of(self, p, options)

    def flags(self, group: Mapping[str, Any]) -> dict[str, bool]:
        # With a senseless value of these a step would compute something else, without an error.
        owner = type(self).__name__
        coefficients = pick(group, "ns_coefficients", None)
        if type(coefficients) is not tuple or len(coefficients) != 3:
            COEFFICIENTS_IN_STEP.check(owner, "ns_coefficients", coefficients)
        ADJUSTMENT_IN_STEP.check(owner, "adjust_lr_fn", pick(group, "adjust_lr_fn", None))
        STEPS.check(owner, "ns_steps", pick(group, "ns_steps", None))
        return super().flags(group) | {"is_mixed": pick(group, "use_muon", None) is None}

    def rule_of(self, p: Tensor, group: Mapping[str, Any]) -> Rule:
        is_matrix = p.dim() == 2
        takes_muon = pick(group, "use_muon", None)
        if takes_muon is None:
            return Muon.rule if is_matrix else Muon.adamw
        if not flag(takes_muon, "use_muon"):
            return Muon.adamw
        if not is_matrix:
            raise ValueError(
                f"{type(self).__name__} only supports 2D parameters, and one has shape "
                f"{tuple(p.shape)}; pass use_muon=None to let what is not a matrix take AdamW, or "
                "put it into a group with use_muon=False"
            )
        return Muon.rule

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
        u = lerp(g, b, momentum) if nesterov else b
        u = orthogonalize(u, ns_coefficients, eps, ns_steps)
        if adjust_lr_fn == "match_rms_adamw":
            ratio = 0.2 * sqrt(maximum(rows(), columns()))
        else:
            ratio = sqrt(maximum(1.0, rows() / columns()))
        return {"p": p * (1 - lr * weight_decay) - lr * ratio * u, "momentum_buffer": b}

    @staticmethod
    def adamw(p, g, exp_avg, exp_avg_sq, *, lr, weight_decay, betas, adam_eps, step):
        return Adam.rule(
            p,
            g,
            exp_avg,
            exp_avg_sq,
            None,
            lr=lr,
            betas=betas,
            eps=adam_eps,
            weight_decay=weight_decay,
            step=step,
            amsgrad=False,
            decoupled_weight_decay=True,
        )
