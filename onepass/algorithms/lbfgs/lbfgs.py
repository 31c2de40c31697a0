"""Limited-memory BFGS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...contract.hooks import with_hooks
from ...contract.param_groups import occur_twice
from ...contract.ranges import Choice, Whole
from ...contract.state_dict import Match
from ...contract.steps import OVERRIDES, REPEATS, step_as_torch
from ...contract.values import StepError, pick
from ...optimizer import Optimizer, Params
from .descent import Descent
from .memory import load_state

ONE_GROUP = (
    "{} doesn't support per-parameter options (parameter groups); pass all parameters in one group"
)
AT_LEAST_1 = Whole("[1, inf]")
# Methods of torch's class that its step calls, and ours does not.
HELPERS = (
    "_numel",
    "_gather_flat_grad",
    "_add_grad",
    "_clone_param",
    "_set_param",
    "_directional_evaluate",
)


class LBFGS(Optimizer, torch.optim.LBFGS):
    r"""A quasi-Newton method: the last steps show the inverse Hessian that multiplies the gradient.

    With the steps $s_i = \theta_{i+1} - \theta_i$, the gradient's changes $y_i = g_{i+1} - g_i$ and
    $\rho_i = 1 / y_i^\top s_i$, the inverse Hessian of BFGS is, over the pairs from the oldest to
    the newest,

    $$ H \leftarrow (I - \rho_i s_i y_i^\top)\, H\, (I - \rho_i y_i s_i^\top)
           + \rho_i s_i s_i^\top, \quad
       H_0 = \frac{s_k^\top y_k}{y_k^\top y_k} I. $$

    It is never formed: the direction $d = -H g$ comes from two loops over the pairs,

    $$ q = -g; \quad
       \alpha_i = \rho_i s_i^\top q, \;
       q \leftarrow q - \alpha_i y_i \;\text{ (newest first)}; \quad
       d = H_0 q; \quad
       d \leftarrow d + (\alpha_i - \rho_i y_i^\top d)\, s_i \;\text{ (oldest first)}. $$

    H stays positive definite, because a pair enters only if its curvature $y_i^\top s_i$ is above
    $10^{-10}$. Then $\theta \leftarrow \theta + t d$. The length t is $\gamma$; in the very first
    iteration it is $\gamma \min(1, 1/\|g\|_1)$.

    - `lr` ($\gamma$), at least 0: the length of a step, as a part of the quasi-Newton step d.
    - `line_search_fn="strong_wolfe"` searches t from there on, until it satisfies the strong Wolfe
      conditions. None makes the step as it is.
    - `max_iter` and `max_eval`, whole numbers of at least 1: the most iterations, and evaluations
      of the closure, in one `step`. By default `max_eval` is 1.25 times `max_iter`.
    - `tolerance_grad`: a step ends when the gradient's largest entry is at most this.
    - `tolerance_change`: a step ends when the largest change of a parameter, or the change of the
      loss, is at most this.
    - `history_size`, a whole number of at least 1: how many pairs are kept. They take up to
      `2 * history_size` times the memory of the parameters.

    It is for small problems whose loss is computed over all data at once, without noise (fits,
    inverse problems, physics): there it needs far fewer evaluations than first-order methods. Take
    `line_search_fn="strong_wolfe"` with `lr=1`; without a line search, steps may diverge.

    Liu and Nocedal, "On the limited memory BFGS method for large scale optimization", 1989; Nocedal
    and Wright, "Numerical Optimization", 2nd edition, 2006, algorithms 7.4 and 7.5.

    State, all of it beside the first parameter, under torch's names: `func_evals`, `n_iter`, `d`,
    `t`, `old_dirs` (the y), `old_stps` (the s), `ro`, `H_diag`, `prev_flat_grad`, `prev_loss`,
    `al`. Arguments are those of `torch.optim.LBFGS`, and so are the values, to the last bit on CPU:
    the same operations in the same order.

    Deviations: the line search turns back from a loss that is NaN or infinite, on which torch goes
    astray. If `closure` raises, the parameters are left where the last whole iteration ended, with
    the state that belongs to them. Loading matches parameters by name if both sides have names, and
    the history follows them.

    Raises ValueError for more than one param group, RuntimeError for an unknown `line_search_fn`.
    """

    ranges = {
        "lr": "[0, inf]",
        "max_iter": AT_LEAST_1,
        "max_eval": AT_LEAST_1,
        "history_size": AT_LEAST_1,
        "tolerance_grad": "[-inf, inf]",
        "tolerance_change": "[-inf, inf]",
        "line_search_fn": Choice("strong_wolfe", error=RuntimeError),
    }

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        history_size: int = 100,
        line_search_fn: str | None = None,
    ) -> None:
        # Checked before the others, because `max_eval` is computed from it.
        AT_LEAST_1.check(type(self).__name__, "max_iter", max_iter)
        defaults = {
            "lr": lr,
            "max_iter": max_iter,
            "max_eval": max_iter * 5 // 4 if max_eval is None else max_eval,
            "tolerance_grad": tolerance_grad,
            "tolerance_change": tolerance_change,
            "history_size": history_size,
            "line_search_fn": line_search_fn,
        }
        super().__init__(params, defaults)
        if len(self.param_groups) != 1:
            raise ValueError(ONE_GROUP.format(type(self).__name__))
        _know_params(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _know_params(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise ValueError, except in the constructor: all parameters share one history."""
        if self.param_groups and self._onepass.taken is None:
            raise ValueError(ONE_GROUP.format(type(self).__name__))
        super().add_param_group(param_group)

    @with_hooks
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make up to `max_iter` iterations, and return the loss before them.

        `closure` sets the gradients to zero, computes the loss, calls `backward()` and returns the
        loss. It is called several times, at other parameters each time. Raises TypeError without a
        closure, and for one that does not return a number; `StepError` for parameters, gradients or
        state that do not fit.
        """
        return _take_step(self, closure)

    def _onepass_load(self, matched: Match) -> tuple[dict[Any, Any], list[dict[str, Any]]]:
        groups = matched.load_groups(self.defaults)
        state = load_state(matched, groups[0]["params"])
        matched.tell_difference()
        return state, groups


def _know_params(optimizer: LBFGS) -> None:
    """Set what torch's own methods of this class read."""
    optimizer._params = optimizer.param_groups[0]["params"]
    optimizer._numel_cache = None


def _take_step(optimizer: LBFGS, closure: Callable[[], Any] | None) -> Any:
    owner = type(optimizer).__name__
    group = optimizer.param_groups[0]
    if not callable(closure):
        raise TypeError(
            f"{owner}: step needs a closure that computes the loss, calls backward() and returns "
            f"the loss, got {closure!r:.60}; it is evaluated several times"
        )
    for name in HELPERS:
        if getattr(LBFGS, name) is not getattr(type(optimizer), name):
            return step_as_torch(optimizer, OVERRIDES.format(name), closure)
    if occur_twice(group["params"]):
        return step_as_torch(optimizer, REPEATS, closure)
    for name in optimizer.defaults:
        pick(group, name, None)
    type(optimizer).check_options(optimizer, group)
    if not group["params"]:
        raise StepError(
            f"{owner}: there are no parameters to optimize; put some into the param group"
        )
    descent = Descent(owner, group, optimizer.state, closure)
    with torch.no_grad(), np.errstate(all="ignore"):
        return descent.run()
