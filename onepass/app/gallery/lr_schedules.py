"""What the schedulers of `onepass.lr_scheduler` set, step by step, as examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import onepass

from ... import lr_scheduler as lrs
from ... import swa_utils
from ...optimizer import Optimizer

__all__ = ["EXAMPLES", "LR", "TEXTS", "Example", "SchedulerCurve", "trace", "trace_plateau"]

LR = 0.1
MOMENTUM = 0.9


@dataclass(frozen=True)
class SchedulerCurve:
    """A function that makes a scheduler, and the arguments that it passes, as text."""

    text: str
    make: Callable[[Optimizer], Any]


@dataclass(frozen=True)
class Example:
    """Schedulers of one class, for how many steps, and which options of a group they set."""

    curves: tuple[SchedulerCurve, ...]
    steps: int = 100
    options: tuple[str, ...] = ("lr",)


def _curve(cls: type, **arguments: Any) -> SchedulerCurve:
    """Return the curve of a scheduler class with these arguments."""
    text = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return SchedulerCurve(text, lambda optimizer: cls(optimizer, **arguments))


def _warm_up(optimizer: Optimizer) -> Any:
    return lrs.LinearLR(optimizer, start_factor=0.1, total_iters=20)


def _halve(step: int) -> float:
    return 0.5 if step % 25 == 0 else 1.0


def _decline(step: int) -> float:
    return 1 / (1 + step / 20)


def _make_sequence(optimizer: Optimizer) -> Any:
    cosine = lrs.CosineAnnealingLR(optimizer, T_max=80)
    return lrs.SequentialLR(optimizer, [_warm_up(optimizer), cosine], [20])


def _make_chain(optimizer: Optimizer) -> Any:
    return lrs.ChainedScheduler([_warm_up(optimizer), lrs.ExponentialLR(optimizer, 0.97)])


EXAMPLES: dict[str, Example] = {
    "StepLR": Example((_curve(lrs.StepLR, step_size=30, gamma=0.3),)),
    "MultiStepLR": Example((_curve(lrs.MultiStepLR, milestones=[30, 80], gamma=0.3),)),
    "ConstantLR": Example((_curve(lrs.ConstantLR, factor=0.5, total_iters=40),)),
    "LinearLR": Example((_curve(lrs.LinearLR, start_factor=0.1, total_iters=40),)),
    "ExponentialLR": Example((_curve(lrs.ExponentialLR, gamma=0.97),)),
    "PolynomialLR": Example(
        tuple(_curve(lrs.PolynomialLR, total_iters=80, power=power) for power in (1.0, 2.0))
    ),
    "CosineAnnealingLR": Example((_curve(lrs.CosineAnnealingLR, T_max=100, eta_min=0.01),)),
    "CosineAnnealingWarmRestarts": Example(
        tuple(_curve(lrs.CosineAnnealingWarmRestarts, T_0=20, T_mult=factor) for factor in (1, 2)),
        steps=140,
    ),
    "CyclicLR": Example(
        tuple(
            _curve(lrs.CyclicLR, base_lr=0.01, max_lr=LR, step_size_up=15, gamma=0.985, mode=mode)
            for mode in ("triangular", "triangular2", "exp_range")
        ),
        steps=120,
    ),
    "OneCycleLR": Example(
        (_curve(lrs.OneCycleLR, max_lr=LR, total_steps=100),), options=("lr", "momentum")
    ),
    "SequentialLR": Example(
        (SchedulerCurve("[LinearLR, CosineAnnealingLR], milestones=[20]", _make_sequence),)
    ),
    "ChainedScheduler": Example((SchedulerCurve("[LinearLR, ExponentialLR]", _make_chain),)),
    "LambdaLR": Example(
        (
            SchedulerCurve(
                "lambda step: 1 / (1 + step / 20)",
                lambda optimizer: lrs.LambdaLR(optimizer, _decline),
            ),
        )
    ),
    "MultiplicativeLR": Example(
        (
            SchedulerCurve(
                "lambda step: 0.5 if step % 25 == 0 else 1.0",
                lambda optimizer: lrs.MultiplicativeLR(optimizer, _halve),
            ),
        )
    ),
    "SWALR": Example(
        tuple(
            _curve(swa_utils.SWALR, swa_lr=0.02, anneal_epochs=40, anneal_strategy=way)
            for way in ("cos", "linear")
        ),
        steps=80,
    ),
}

# Texts of schedules, one for each panel of their picture; all move within 100 steps.
TEXTS = (
    "constant(1.0)",
    "linear(1.0, 0.1, steps=100)",
    "polynomial(1.0, steps=100, power=2.0)",
    "exponential(1.0, gamma=0.5, every=20)",
    "cosine(1.0, steps=100)",
    "warm_restarts(1.0, period=15, mult=2)",
    "one_cycle(1.0, steps=100)",
    "triangular(0.1, 1.0, up=15, down=25, decay=0.7)",
    "piecewise(1.0, {40: 0.3, 70: 0.1})",
    "inverse_sqrt(1.0, timescale=20).warmup(20)",
    "warmup_stable_decay(1.0, steps=100, warmup_steps=10, decay_steps=40, shape='sqrt')",
    "cosine(1.0, steps=100).warmup(20)",
    "cosine(1.0, steps=100).warmup(20, start=0.3)",
    "linear(0.2, 1.0, steps=30).then(cosine(1.0, steps=70))",
    "cosine(1.0, steps=100).times(triangular(0.5, 1.0, up=5))",
)


def trace(curve: SchedulerCurve, steps: int, option: str = "lr") -> list[float]:
    """Return what a scheduler sets `option` to, at each of `steps` steps.

    It drives SGD with `lr` 0.1 and `momentum` 0.9.
    """
    optimizer = onepass.SGD([torch.zeros(1)], lr=LR, momentum=MOMENTUM)
    scheduler = curve.make(optimizer)
    values = []
    for _ in range(steps):
        values.append(float(optimizer.param_groups[0][option]))
        optimizer.step()
        scheduler.step()
    return values


def trace_plateau(steps: int) -> tuple[list[float], list[float]]:
    """Return learning rates of ReduceLROnPlateau, and the losses of a real descent that it sees.

    256 weights under noisy gradients stop at a height that follows from the rate, and fall again
    when it is lowered.
    """
    generator = torch.Generator().manual_seed(0)
    weights = torch.full((256,), 3.0, dtype=torch.float64)
    optimizer = onepass.SGD([weights], lr=0.5)
    scheduler = lrs.ReduceLROnPlateau(optimizer, factor=0.4, patience=15)
    rates = []
    losses = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        loss = float(weights.square().mean()) / 2
        losses.append(loss)
        noise = torch.randn(256, generator=generator, dtype=torch.float64)
        weights.grad = weights + noise
        optimizer.step()
        scheduler.step(loss)
    return rates, losses
