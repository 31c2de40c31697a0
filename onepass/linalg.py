"""What is not elementwise: functions of whole matrices, which a rule calls between two passes over
memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernel import has_bfloat16_products
from .kernel.functions import call
from .kernel.graph.ir import Node


def orthogonalize(x: Node, coefficients: tuple[Node, Node, Node], eps: Node, steps: Node) -> Node:
    """The nearest orthogonal matrices of x's, roughly: see `newton_schulz`."""
    return call(newton_schulz, x, *coefficients, eps, steps)


def newton_schulz(
    matrices: Tensor, a: float, b: float, c: float, eps: float, steps: float
) -> Tensor:
    r"""For each matrix $X = U S V^\top$ about $U V^\top$, by `steps` of a Newton-Schulz iteration
    of degree five.

    $$ X_0 = X / \max(\|X\|_F, \epsilon), \quad X_{k+1} = a X_k + (b A_k + c A_k^2) X_k, \quad
       A_k = X_k X_k^\top $$

    With the coefficients and steps of Muon, singular values from about a 500th of the norm on end
    between 0.68 and 1.2, not at 1; smaller ones have then grown by $a$ in each step.

    `matrices` has shape (k, rows, columns) and stays as it is; the result has its shape and type.
    Products are in bfloat16, as in torch, but for float64 matrices and for processors that would be
    slower at it: there in the type of `matrices`.
    """
    fast = matrices.device.type != "cpu" or has_bfloat16_products()
    x = matrices.bfloat16() if fast and matrices.dtype != torch.float64 else matrices
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(int(steps)):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)
