"""The last steps and gradient changes, which stand for the inverse Hessian."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .flat import FlatParameters, precision, scalar

# A pair of less curvature than this is left out: it would spoil the inverse Hessian's positive
# definiteness.
LEAST_CURVATURE = 1e-10


class History:
    """Pairs of a step s and of the gradient's change y along it, the oldest first.

    They lie in the optimizer's state: `old_stps` has the s, `old_dirs` the y, and `ro` has one over
    the product of both. What is here is not saved: the same `ro` as NumPy scalars, two vectors to
    use again, and the factors `alphas` of the last direction, newest pair first.

    With one pair s = 1, y = 4 of a problem of one number, whose second derivative is then 4, and
    the gradient 2, `find_direction` computes:

        rate = 1/4; first loop: alpha = 1/4 * 1 * -2 = -1/2, d = -2 + 1/2 * 4 = 0
        d *= H_diag = 4 / 16; second loop: d += (-1/2 - 1/4 * 4 * 0) * 1 = -1/2

    which is Newton's step -2 / 4.
    """

    def __init__(self, flat: FlatParameters, inverse_products: list[Any]) -> None:
        self._flat = flat
        self._rates = [scalar(torch.as_tensor(rate)) for rate in inverse_products]
        self._spare: tuple[Tensor, Tensor] | None = None
        self.alphas: list[np.floating] | None = None

    def enter(self, state: dict[str, Any], gradient: Tensor, d: Tensor, size: Any) -> None:
        """Enter the last step, `state["t"]` along d, and the gradient's change since then.

        At most `size` pairs stay: the oldest ones leave. A pair without curvature does not enter.
        """
        changes = state["old_dirs"]
        steps = state["old_stps"]
        inverse_products = state["ro"]
        if self._spare is None:
            self._spare = self._flat.new(), self._flat.new()
        y, s = self._spare
        torch.sub(gradient, state["prev_flat_grad"], out=y)
        torch.mul(d, float(state["t"]), out=s)
        curvature = y.dot(s)
        enters = bool(scalar(curvature) > LEAST_CURVATURE)
        if enters:
            self._spare = None
        # More than one may have to leave: `history_size` may have become smaller.
        while len(changes) + enters > size:
            oldest = changes.pop(0), steps.pop(0)
            if self._spare is None:
                self._spare = oldest
            del inverse_products[0]
            del self._rates[0]
        if not enters:
            return
        changes.append(y)
        steps.append(s)
        inverse_product = curvature.reciprocal()
        inverse_products.append(inverse_product)
        self._rates.append(scalar(inverse_product))
        state["H_diag"] = curvature / y.dot(y)

    def find_direction(self, state: dict[str, Any], gradient: Tensor, d: Tensor) -> None:
        """Set d to the inverse Hessian times the negative gradient, by two loops over the pairs."""
        # A step of length 0 until one is made: if something interrupts it, none enters later.
        state.update(t=0.0, d=d)
        rounded = precision(d.dtype)
        pairs = list(zip(state["old_dirs"], state["old_stps"], self._rates, strict=True))
        alphas: list[np.floating] = []
        torch.neg(gradient, out=d)
        for y, s, rate in reversed(pairs):
            alpha = rounded(s.dot(d).item()) * rate
            d.add_(y, alpha=-float(alpha))
            alphas.append(alpha)
        d.mul_(float(state["H_diag"]))
        for (y, s, rate), alpha in zip(pairs, reversed(alphas), strict=True):
            beta = rounded(y.dot(d).item()) * rate
            d.add_(s, alpha=float(alpha - beta))
        self.alphas = alphas
