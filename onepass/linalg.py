"""Functions of whole matrices, which a rule calls between two passes over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernel import has_bfloat16_products
from .kernel.functions import call
from .kernel.graph.ir import Node


def orthogonalize(x: Node, coefficients: tuple[Node, Node, Node], eps: Node, steps: Node) -> Node:
    """Return roughly the nearest orthogonal matrix to each of x's matrices: see `newton_schulz`."""
    return call(newton_schulz, x, *coefficients, eps, steps)


def newton_schulz(
    matrices: Tensor, a: float, b: float, c: float, eps: float, steps: float
) -> Tensor:
    r"""Return about $U V^\top$ for each matrix $X = U S V^\top$, by a Newton-Schulz iteration.

    It is of degree five and runs for `steps` steps:

    $$ X_0 = X / \max(\|X\|_F, \epsilon), \quad X_{k+1} = a X_k + (b A_k + c A_k^2) X_k, \quad
       A_k = X_k X_k^\top $$

    With the coefficients and steps of Muon, singular values above about a 500th of the norm end
    between 0.68 and 1.2, not at 1. Smaller ones have grown by $a$ in each step.

    `matrices` has shape (k, rows, columns) and stays as it is; the result has its shape and type.
    Products are in bfloat16, as in torch. They are in the type of `matrices` if that is float64, or
    if the processor would be slower with bfloat16.
    """
    is_fast = matrices.device.type != "cpu" or has_bfloat16_products()
    x = matrices.bfloat16() if is_fast and matrices.dtype != torch.float64 else matrices
    is_wide = x.shape[-2] <= x.shape[-1]
    if not is_wide:
        x = x.mT
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x = x / norm.clamp(min=eps)
    for _ in range(int(steps)):
        gram = x @ x.mT
        # Not named: it is freed before the next one is made.
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    if not is_wide:
        x = x.mT
    return x.to(matrices.dtype)
