"""The learning-rate range test: a short trial finds the rates from which an optimizer learns.

The trial is undone afterwards.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..contract.values import as_number, brief, number_for
from .snapshot import undone_afterwards

__all__ = ["RangeTest", "lr_find"]

# How far a change must exceed what noise explains, in standard errors: of the smoothed loss that
# falls, of a loss that leaps above the average before it.
_SIGNIFICANT, _LEAP = 3.0, 5.0
# Of normally distributed numbers, the standard deviation over the median distance of two.
_DEVIATION = 1.048
_ROUNDING = 2.0**-23
# Each step's rate is listed before the first.
_MOST_STEPS = 10**8


@dataclass(frozen=True)
class RangeTest:
    r"""What `lr_find` has measured, and the learning rate that follows from it.

    Step $i$ of $n$ takes the learning rate
    $\gamma_i = \gamma_0\,(\gamma_{n-1}/\gamma_0)^{i/(n-1)}$, from `lowest` to `highest`. The loss
    $\ell_i$ that it finds is averaged, without a bias towards zero:

    $$ s_i = \frac{1-\beta}{1-\beta^{i+1}} \sum_{j \le i} \beta^{i-j}\,\ell_j $$

    The test ends early when the loss is not a finite number, or has exploded by the factor `stop`
    $= c$: $s_i > s_\mathrm{min} + (c-1)\max(|s_\mathrm{min}|,\ s_0 - s_\mathrm{min})$.

    The suggestion is the middle of the decade of rates (or of a quarter of the range, if that is
    less) in which the best loss so far, $b_i = \min_{j \le i} s_j$, falls most. That is the
    steepest descent over $\log\gamma$; it is rounded to two digits. If a loss leaps above the
    average in that decade, the suggestion is half a decade below the leap. A fall that noise
    explains does not count. If there is no other, a tenth of the highest rate tried is suggested,
    and a warning says so.

    The smoothing and the steepest descent are fastai's; the best loss so far is ours. Adaptive
    methods leap at too high a rate, and the recovery can be steeper than any learning.

    `losses[i]` is the loss of the i-th batch, at the weights to which the steps with `lrs[:i]` have
    led; `smoothed` is its running average. All three have one entry for each step that was tried.
    `suggestion` is a learning rate, `note` says in a sentence how it was found. `exploded` tells
    that the test ended early. `ratios[k]` is what the learning rate of param group k is multiplied
    with: 1 for the largest.

    Example: losses 4, 2 and 2 with `smoothing=0.5` have the averages 4, 2.67 and 2.29.
    """

    suggestion: float
    note: str
    exploded: bool
    ratios: tuple[float, ...]
    lrs: tuple[float, ...] = field(repr=False)
    losses: tuple[float, ...] = field(repr=False)
    smoothed: tuple[float, ...] = field(repr=False)

    def plot(self, path: str | os.PathLike[str], title: str = "learning-rate range test") -> None:
        """Draw both losses against the learning rate, the suggestion marked, as a PNG file.

        Raises ImportError without matplotlib.
        """
        from .picture import draw  # matplotlib takes a second to import, and only this needs it

        draw(path, title, self.lrs, self.losses, self.smoothed, self.suggestion)


def lr_find(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    data: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    *,
    lowest: float = 1e-7,
    highest: float = 10.0,
    steps: int = 100,
    smoothing: float = 0.9,
    stop: float = 4.0,
    observe: Callable[[int, float, float], object] | None = None,
) -> RangeTest:
    """Find a learning rate by a trial with rates that grow from step to step, see `RangeTest`.

    `loss(model, batch)` returns a tensor of one number. `data` gives the batches, and is begun
    again when it ends. `optimizer` is any of torch's interface, LBFGS too. The rates are those of
    the param group with the largest lr, and the other groups keep their ratios to it; if all are 0,
    as before a warm-up, `initial_lr` counts. A model in evaluation mode is set to training; one in
    training keeps modules that are not. `observe(i, lr, loss)` is called after each step.

    Afterwards, and also when an exception ends the trial, all is as before, bit for bit: see
    `snapshot.undone_afterwards` for what is not.

    Raises TypeError or ValueError for arguments that make no sense, for a loss that is not finite
    before the first step, and for data that has not enough batches and cannot be begun again.

    Smith, "Cyclical Learning Rates for Training Neural Networks", 2017, arXiv:1506.01186.
    """
    _check(model, loss, data, optimizer)
    _check_numbers(lowest, highest, steps, smoothing, stop)
    rates = [lowest * (highest / lowest) ** (i / (steps - 1)) for i in range(steps)]
    ratios, history = _read_ratios(optimizer), _LossHistory(smoothing, stop)
    with undone_afterwards(model, optimizer, _generators_of(data)):
        _try(rates, ratios, model, loss, data, optimizer, history, observe)
    return _conclude(rates[: len(history.losses)], history, ratios)


def _try(
    rates: Sequence[float],
    ratios: Sequence[float],
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    data: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    history: _LossHistory,
    observe: Callable[[int, float, float], object] | None,
) -> None:
    """Take a step with each rate, until the losses end the test."""
    with closing(_repeat(data, len(rates))) as batches, torch.enable_grad():
        if not model.training:
            model.train()
        for i, (lr, batch) in enumerate(zip(rates, batches, strict=False)):
            _set_lr(optimizer, lr, ratios)
            if not _step(model, loss, batch, optimizer, history):
                break
            if observe is not None:
                observe(i, lr, history.losses[-1])


class _LossHistory:
    """Losses as they come, and their running average."""

    def __init__(self, smoothing: float, stop: float) -> None:
        self.smoothing, self.stop = smoothing, stop
        self.losses: list[float] = []
        self.smoothed: list[float] = []
        self.exploded = False
        self._average = 0.0

    def add(self, loss: float) -> bool:
        """Add a loss, and return whether the test may go on."""
        if not self.losses and not math.isfinite(loss):
            raise ValueError(
                f"lr_find: the loss is {loss} before the first step; look at the model and the "
                "data first"
            )
        self._average = self.smoothing * self._average + (1 - self.smoothing) * loss
        self.losses.append(loss)
        self.smoothed.append(self._average / (1 - self.smoothing ** len(self.losses)))
        first, best, last = self.smoothed[0], min(self.smoothed), self.smoothed[-1]
        # A comparison with NaN is false.
        self.exploded = not last <= best + (self.stop - 1) * max(abs(best), first - best)
        return not self.exploded


def _step(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    batch: Any,
    optimizer: torch.optim.Optimizer,
    history: _LossHistory,
) -> bool:
    """Take a step of any optimizer, unless the loss that it begins with ends the test.

    Returns whether a step was taken.
    """

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        value = loss(model, batch)
        _check_loss(value)
        return value

    value = evaluate()
    if not history.add(float(value.detach())):
        return False
    value.backward()
    ready = [value]

    def closure() -> Any:
        if ready:
            return ready.pop()
        value = evaluate()
        value.backward()
        return value

    # LBFGS must have a closure, and all others take one. Hooks before a step see its gradients, as
    # they do without.
    optimizer.step(closure)
    return True


def _conclude(rates: Sequence[float], history: _LossHistory, ratios: Sequence[float]) -> RangeTest:
    suggestion, note = _suggest(rates, history)
    if suggestion is None:
        suggestion = rates[-1] / 10
        end = "it exploded at" if history.exploded else "the highest rate tried was"
        note = f"{note}, so this is a tenth of the last rate: {end} {rates[-1]:.2g}"
        warnings.warn(
            f"lr_find: {note}; try other bounds, more steps or larger batches", stacklevel=3
        )
    return RangeTest(
        float(f"{suggestion:.1e}"),
        note,
        history.exploded,
        tuple(ratios),
        tuple(rates),
        tuple(history.losses),
        tuple(history.smoothed),
    )


def _suggest(rates: Sequence[float], history: _LossHistory) -> tuple[float | None, str]:
    """A rate amid those over which the best smoothed loss falls most, if it falls at all; and
    why."""
    none = None, "the loss did not fall by more than its noise"
    count = len(history.losses) - history.exploded  # the last, where it exploded, may be no number
    if count < 2:
        return none
    losses, smoothed, x = (
        np.array(history.losses[:count]),
        np.array(history.smoothed[:count]),
        np.log10(rates[:count]),
    )
    best = np.minimum.accumulate(smoothed)
    half = min(0.5, (x[-1] - x[0]) / 8)
    fall = np.interp(x - half, x, best) - np.interp(x + half, x, best)
    # Below the last digit of a float32 there is always noise.
    noise = _DEVIATION * float(np.median(np.abs(np.diff(losses)))) + _ROUNDING * float(
        np.abs(losses).max()
    )
    decay = history.smoothing ** np.arange(1, count + 1)
    # The variance of each average, in units of that of one loss.
    variance = (1 - history.smoothing) / (1 + history.smoothing) * (1 + decay) / (1 - decay)
    error = noise * np.sqrt(np.interp(x - half, x, variance) + np.interp(x + half, x, variance))
    fall[fall <= _SIGNIFICANT * error] = 0.0
    middle = int(np.argmax(fall))
    if fall[middle] <= 0:
        return none
    leaps = np.flatnonzero(losses[1:] - smoothed[:-1] > _LEAP * noise) + 1
    leaps = leaps[np.abs(x[leaps] - x[middle]) <= half]
    if len(leaps):
        return 10 ** float(
            x[leaps[0]] - half
        ), f"soon above it, at {rates[leaps[0]]:.2g}, the loss leaps"
    return rates[middle], "the smoothed loss falls fastest around it"


# --- batches and rates ----------------------------------------------------------------------------


def _repeat(data: Iterable[Any], steps: int) -> Generator[Any, None, None]:
    """The batches of `data`, again and again."""
    given = 0
    while True:
        before = given
        for batch in data:
            given += 1
            yield batch
        if given == before:
            if not given:
                raise ValueError(
                    "lr_find: data has no batches; pass a list of batches or a DataLoader with some"
                )
            raise ValueError(
                f"lr_find: data gave {given} batches for {steps} steps and cannot be begun again, "
                f"as an iterator; pass a list or a DataLoader, or steps={given}"
            )


def _generators_of(data: Any) -> list[torch.Generator]:
    """The random generators of a DataLoader and its samplers, other than torch's global one."""
    batch_sampler = getattr(data, "batch_sampler", None)
    owners = (
        data,
        getattr(data, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
    )
    found = (getattr(owner, "generator", None) for owner in owners)
    return [generator for generator in found if isinstance(generator, torch.Generator)]


def _read_ratios(optimizer: torch.optim.Optimizer) -> list[float]:
    """Each param group's learning rate as a part of the largest."""
    groups = optimizer.param_groups
    rates = [_read_rate(i, group.get("lr")) for i, group in enumerate(groups)]
    if not any(rates):
        rates = [_read_rate(i, group.get("initial_lr", 1.0)) for i, group in enumerate(groups)]
    largest = max(rates) or 1.0
    return [rate / largest for rate in rates]


def _read_rate(i: int, lr: Any) -> float:
    rate = as_number(lr)
    if rate is None or not (rate >= 0 and math.isfinite(rate)):
        raise ValueError(
            f"lr_find: lr of param group {i} must be a finite number of at least 0, got "
            f"{brief(lr)}; it says how the groups' rates relate"
        )
    return rate


def _set_lr(optimizer: torch.optim.Optimizer, lr: float, ratios: Sequence[float]) -> None:
    for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
        if isinstance(group["lr"], Tensor):
            with torch.no_grad():
                group["lr"].fill_(lr * ratio)
        else:
            group["lr"] = lr * ratio


# --- checks ---------------------------------------------------------------------------------------


def _check(model: object, loss: object, data: object, optimizer: object) -> None:
    for name, value, kind in (
        ("model", model, nn.Module),
        ("optimizer", optimizer, torch.optim.Optimizer),
    ):
        if not isinstance(value, kind):
            raise TypeError(
                f"lr_find: {name} must be a "
                f"torch.{kind.__module__.split('.')[1]}.{kind.__name__}, got a "
                f"{torch.typename(value)}"
            )
    if not callable(loss):
        raise TypeError(
            f"lr_find: loss must be a function of (model, batch), got a {torch.typename(loss)}"
        )
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise TypeError(
            f"lr_find: data must give batches when iterated, got a {torch.typename(data)}"
        )
    assert isinstance(model, nn.Module)
    for name, p in model.named_parameters():
        if nn.parameter.is_lazy(p):
            raise ValueError(
                f"lr_find: parameter {name!r} has no shape yet; run one batch through the model "
                "first"
            )


def _check_numbers(
    lowest: float, highest: float, steps: int, smoothing: float, stop: float
) -> None:
    for name, value in (
        ("lowest", lowest),
        ("highest", highest),
        ("smoothing", smoothing),
        ("stop", stop),
    ):
        if isinstance(value, bool) or as_number(value) is None:
            raise TypeError(f"lr_find: {name} must be {number_for(value)}, got {brief(value)}")
    if not 0 < lowest < highest < math.inf:
        raise ValueError(
            f"lr_find: lowest and highest must be 0 < lowest < highest, got {lowest} and {highest}"
        )
    if not isinstance(steps, int) or steps < 2:
        raise ValueError(
            f"lr_find: steps must be a whole number of at least 2, got {brief(steps)}; 100 do for "
            "eight decades"
        )
    if steps > _MOST_STEPS:
        raise ValueError(
            f"lr_find: steps must be at most {_MOST_STEPS}, got {brief(steps)}; 100 do for eight "
            "decades"
        )
    if not 0 <= smoothing < 1:
        raise ValueError(
            f"lr_find: smoothing must lie in [0, 1), got {smoothing}; 0 leaves the loss as it is"
        )
    if not stop > 1:
        raise ValueError(
            f"lr_find: stop must be more than 1, got {stop}; math.inf never stops at a finite loss"
        )


def _check_loss(value: object) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex():
        got = (
            f"one of shape {tuple(value.shape)}, {value.dtype}"
            if isinstance(value, Tensor)
            else f"{value!r:.60}"
        )
        raise TypeError(
            f"lr_find: loss(model, batch) must return a tensor of one real number, got {got}"
        )
    if not value.requires_grad:
        raise ValueError(
            "lr_find: the loss does not depend on any parameter that requires a gradient; compute "
            "it from the model's outputs, without detach() or torch.no_grad()"
        )
