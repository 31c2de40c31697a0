"""LBFGS: no rule over elements, because it sees the whole problem as one vector.

The algorithm (`lbfgs`), parameters as one vector (`flat`), and the step length (`line_search`).
"""

from .lbfgs import LBFGS

__all__ = ["LBFGS"]
