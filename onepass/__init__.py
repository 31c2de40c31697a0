"""PyTorch optimizers, each written once and run in one pass over memory: `import onepass as optim`."""

from .algorithms.adam import Adam, AdamW
from .algorithms.sgd import SGD
from .checks import StepError
from .kernel.ir import RuleError, lerp, maximum, mean, minimum, norm, sign, sqrt, square, where
from .optimizer import Optimizer

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Optimizer",
    "RuleError",
    "StepError",
    "lerp",
    "maximum",
    "mean",
    "minimum",
    "norm",
    "sign",
    "sqrt",
    "square",
    "where",
]

__version__ = "0.1.0"
