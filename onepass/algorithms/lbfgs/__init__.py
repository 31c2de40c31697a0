"""LBFGS: an algorithm without a rule, because it sees the whole problem as one vector.

- `lbfgs`: the optimizer, its options and its step.
- `descent`: one call of step, from the first evaluation to the last.
- `history`: the pairs of vectors that stand for the inverse Hessian, and the direction they give.
- `line_search`: the length of a step.
- `flat`: parameters and gradients as one vector.
- `memory`: what the state must hold, and how it is loaded.

A step is made of torch's operations on whole vectors: no file here knows rules, programs or plans.
"""

from .lbfgs import LBFGS

__all__ = ["LBFGS"]
