"""PyTorch optimizers, each written once and run in one pass over memory: `import onepass as
optim`."""

from . import lr_scheduler, schedule, swa_utils
from .algorithms.adadelta import Adadelta
from .algorithms.adafactor import Adafactor
from .algorithms.adagrad import Adagrad
from .algorithms.adam import Adam, AdamW
from .algorithms.adamax import Adamax
from .algorithms.asgd import ASGD
from .algorithms.lbfgs import LBFGS
from .algorithms.muon import Muon
from .algorithms.nadam import NAdam
from .algorithms.radam import RAdam
from .algorithms.rmsprop import RMSprop
from .algorithms.rprop import Rprop
from .algorithms.sgd import SGD
from .algorithms.sparse_adam import SparseAdam
from .contract.stateless import swap_in_optimizer_params_and_state
from .contract.values import StepError
from .kernel.functions import (
    PerColumn,
    PerRow,
    Scalar,
    amax,
    call,
    column_mean,
    exp,
    floor,
    lerp,
    log,
    maximum,
    mean,
    minimum,
    norm,
    numel,
    rint,
    row_mean,
    sign,
    sqrt,
    square,
    sum,
    where,
)
from .kernel.graph.ir import RuleError
from .lr_scheduler.driver import Scheduler
from .optimizer import Optimizer
from .range_test.search import RangeTest, lr_find

__all__ = [
    "ASGD",
    "LBFGS",
    "SGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Muon",
    "NAdam",
    "Optimizer",
    "PerColumn",
    "PerRow",
    "RAdam",
    "RMSprop",
    "RangeTest",
    "Rprop",
    "RuleError",
    "Scalar",
    "Scheduler",
    "SparseAdam",
    "StepError",
    "amax",
    "call",
    "column_mean",
    "exp",
    "floor",
    "lerp",
    "log",
    "lr_find",
    "lr_scheduler",
    "maximum",
    "mean",
    "minimum",
    "norm",
    "numel",
    "rint",
    "row_mean",
    "schedule",
    "sign",
    "sqrt",
    "square",
    "sum",
    "swa_utils",
    "swap_in_optimizer_params_and_state",
    "where",
]

__version__ = "0.1.0"
