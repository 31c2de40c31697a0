"""Functions of whole matrices, which a rule calls between two passes over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernel import has_bfloat16_products
from .kernel.functions import call
from .kernel.graph.ir import Node


def orthogonalize(x: Node, coefficients: tuple[Node, Node, Node], eps: Node, steps: Node) -> Node:
    """Return roughly the nearest orthogonal matrices of x's, in a rule: see `newton_schulz`."""
    return call(newton_schulz, x, *coefficients, eps, steps)


def newton_schulz(
    matrices: Tensor, a: float, b: float, c: float, eps: float, steps: float
) -> Tensor:
    r"""Return about $U V^\top$ for each matrix $X = U S V^\top$, by a Newton-Schulz iteration.

    $$ X_0 = X / \max(\|X\|_F, \epsilon), \quad X_{k+1} = a X_k + (b A_k + c A_k^2) X_k, \quad
       A_k = X_k X_k^\top $$

    It makes `steps` iterations of degree five. With the coefficients and the 5 steps of Muon,
    singular values do not become 1: those above about a 500th of the norm end between 0.68 and 1.2.
    Smaller ones have then grown by $a$ in each step.

    `matrices` has the shape (n, rows, columns) and stays as it is; the result has its shape and
    type. Products are in bfloat16, as in torch. There are two exceptions, float64 matrices and
    processors that are slower in bfloat16: for these, products are in the type of `matrices`.
    """
    is_fast_in_bfloat16 = matrices.device.type != "cpu" or has_bfloat16_products()
    if is_fast_in_bfloat16 and matrices.dtype != torch.float64:
        x = matrices.bfloat16()
    else:
        x = matrices
    # The Gram matrix is made of the shorter side.
    is_wide = x.shape[-2] <= x.shape[-1]
    if not is_wide:
        x = x.mT
    norms = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x = x / norms.clamp(min=eps)
    for _ in range(int(steps)):
        gram = x @ x.mT
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, factor, x, beta=a)
    result = x if is_wide else x.mT
    return result.to(matrices.dtype)
