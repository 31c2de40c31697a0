"""Averages of a model's weights over steps, under torch's names: SWA, EMA, and batch norm's
statistics for them.

`models` has torch's classes and functions, `averages` the lists of tensors that are averaged.
Nothing here knows an algorithm.
"""

from .models import (
    SWALR,
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
    update_bn,
)

__all__ = [
    "SWALR",
    "AveragedModel",
    "get_ema_avg_fn",
    "get_ema_multi_avg_fn",
    "get_swa_avg_fn",
    "get_swa_multi_avg_fn",
    "update_bn",
]
