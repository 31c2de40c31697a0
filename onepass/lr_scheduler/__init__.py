r"""Learning-rate schedulers under torch's names: thin classes over formulas in the step.

Each is a subclass of torch's class of its name, with torch's arguments, attributes, warnings and
checkpoints, and works on any optimizer of torch.optim. $\eta_0$ is a group's initial lr, $\eta_t$
its lr after $t$ scheduler steps. What is in closed form is computed from $t$, so that nothing
drifts and a run can resume anywhere; a change of the lr from outside, by another scheduler or by
hand, stays and is carried on (`closed.ClosedLR`). Errors are ValueError, TypeError and KeyError as
in torch.
"""

from .composites import ChainedScheduler, SequentialLR
from .cycles import CosineAnnealingWarmRestarts, CyclicLR, OneCycleLR
from .factors import (
    ConstantLR,
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiplicativeLR,
    MultiStepLR,
    PolynomialLR,
    StepLR,
)
from .frame import LRScheduler
from .plateau import ReduceLROnPlateau

# The name that torch had for it until 1.13.
_LRScheduler = LRScheduler

__all__ = [
    "ChainedScheduler",
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "CyclicLR",
    "ExponentialLR",
    "LRScheduler",
    "LambdaLR",
    "LinearLR",
    "MultiStepLR",
    "MultiplicativeLR",
    "OneCycleLR",
    "PolynomialLR",
    "ReduceLROnPlateau",
    "SequentialLR",
    "StepLR",
]
