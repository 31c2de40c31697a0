"""The one table of optimizers under test: class, options, and the update as the papers have it, in float64 NumPy.

A further algorithm is a further function and its rows; every property in the tests then holds for it too, or fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import onepass

State = dict[str, np.ndarray]
# (p, g, state, step, **options) -> the new p; `step` counts from 1, the state begins empty.
Reference = Callable[..., np.ndarray]


@dataclass(frozen=True)
class Row:
    """One optimizer with options, all of which are constructor arguments of torch's class too."""

    name: str
    options: Mapping[str, Any]
    reference: Reference

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.options.items() if key != "lr")])

    def make(self, params: Any, **further: Any) -> onepass.Optimizer:
        """The optimizer of this package."""
        return getattr(onepass, self.name)(params, **{**self.options, **further})

    def make_torch(self, params: Any, **further: Any) -> torch.optim.Optimizer:
        """The optimizer of torch."""
        return getattr(torch.optim, self.name)(params, **{**self.options, **further})


def sgd(
    p, g, state, step, *, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False
) -> np.ndarray:
    """Gradient descent with the momentum of Sutskever et al., 2013, where lr multiplies the whole sum."""
    g = (-g if maximize else g) + weight_decay * p
    if momentum == 0:
        return p - lr * g
    b = state["momentum_buffer"] = g if step == 1 else momentum * state["momentum_buffer"] + (1 - dampening) * g
    return p - lr * (g + momentum * b if nesterov else b)


def adam(
    p,
    g,
    state,
    step,
    *,
    lr,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    amsgrad=False,
    maximize=False,
    decoupled=False,
) -> np.ndarray:
    """Kingma and Ba, 2014, algorithm 1; the maximum of Reddi et al., 2018, is that of v before its correction."""
    beta1, beta2 = betas
    g = -g if maximize else g
    if decoupled:
        p = p - lr * weight_decay * p
    else:
        g = g + weight_decay * p
    m = state["exp_avg"] = beta1 * state.get("exp_avg", np.zeros_like(p)) + (1 - beta1) * g
    v = state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", np.zeros_like(p)) + (1 - beta2) * g**2
    if amsgrad:
        v = state["max_exp_avg_sq"] = np.maximum(state.get("max_exp_avg_sq", np.zeros_like(p)), v)
    corrected_m, corrected_v = m / (1 - beta1**step), v / (1 - beta2**step)
    return p - lr * corrected_m / (np.sqrt(corrected_v) + eps)


def adamw(p, g, state, step, *, weight_decay=0.01, **options) -> np.ndarray:
    """Loshchilov and Hutter, 2017: the decay beside the moments, not in them."""
    return adam(p, g, state, step, weight_decay=weight_decay, decoupled=True, **options)


def _row(reference: Reference, name: str, **options: Any) -> Row:
    return Row(name, {"lr": 0.01} | options, reference)


# Options are such that each has an effect far above rounding: an eps of 1e-8 could be forgotten unnoticed.
TABLE: tuple[Row, ...] = (
    _row(sgd, "SGD"),
    _row(sgd, "SGD", momentum=0.9),
    _row(sgd, "SGD", momentum=0.9, dampening=0.3),
    _row(sgd, "SGD", momentum=0.8, nesterov=True),
    _row(sgd, "SGD", weight_decay=0.1),
    _row(sgd, "SGD", maximize=True),
    _row(sgd, "SGD", momentum=0.8, nesterov=True, weight_decay=0.1, maximize=True),
    _row(adam, "Adam"),
    _row(adam, "Adam", betas=(0.8, 0.95)),
    _row(adam, "Adam", betas=(0.3, 0.7)),
    _row(adam, "Adam", betas=(0.0, 0.99), eps=0.1),
    _row(adam, "Adam", weight_decay=0.1),
    _row(adam, "Adam", amsgrad=True, betas=(0.9, 0.7)),
    _row(adam, "Adam", maximize=True),
    _row(adam, "Adam", amsgrad=True, betas=(0.8, 0.7), eps=0.01, weight_decay=0.1, maximize=True),
    _row(adamw, "AdamW"),
    _row(adamw, "AdamW", weight_decay=0.3, betas=(0.8, 0.95), eps=0.1),
    _row(adamw, "AdamW", weight_decay=0.0),
    _row(adamw, "AdamW", amsgrad=True, betas=(0.9, 0.7), weight_decay=0.1),
    _row(adamw, "AdamW", maximize=True, weight_decay=0.1),
)


def walk(row: Row, p: np.ndarray, gradients: Sequence[np.ndarray | None], lrs: Sequence[float]) -> np.ndarray:
    """The reference's parameters after each step, the first ones included; no step where there is no gradient."""
    path = [np.asarray(p, np.float64)]
    state: State = {}
    step = 0
    for g, lr in zip(gradients, lrs, strict=True):
        if g is None:
            path.append(path[-1])
            continue
        step += 1
        path.append(row.reference(path[-1], np.asarray(g, np.float64), state, step, **{**row.options, "lr": lr}))
    return np.stack(path)


# Roundings on the way from the columns to p in one step of the longest rule here, a small factor for how errors of
# the running means enter the step (v under a root: halved; m by at most max|g|/root(v): a few) included.
ROUNDINGS = 24


def tolerance(path: np.ndarray, unit: float) -> float:
    """How far a right result may lie from the reference's path, where every operation errs by `unit`, relatively.

    In step t, p is rounded: an error of unit * |p|. The states have then been rounded t times, and running means
    forget, they do not amplify: the step errs by ROUNDINGS * t * unit * |step|. Over T steps that is at most
    unit * (T * |p| + ROUNDINGS * T^2 / 2 * |step|). The largest step of any element stands for |step|, because an
    element whose m happens to cancel has a small step and the error of a large one.
    """
    steps = len(path) - 1
    largest_step = float(np.abs(np.diff(path, axis=0)).max(initial=0.0))
    return unit * (2 * steps * float(np.abs(path).max(initial=0.0)) + ROUNDINGS * steps**2 / 2 * largest_step)


# Half of the distance between neighbours around 1.
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
