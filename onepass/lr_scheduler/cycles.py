"""Schedulers that go up and down: warm restarts, and those that move momentum against the lr."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.optim import Optimizer
from torch.optim import lr_scheduler as torch_schedulers

from ..schedule.formulas import anneal, find_cycle, half_cosine
from .arguments import check_count, check_number, check_numbers, check_strategy
from .frame import LRScheduler
from .momenta import CycleLR
from .overrides import is_altered, is_same
from .values import assign, copied, per_group, saved_attributes, shared

__all__ = ["CosineAnnealingWarmRestarts", "CyclicLR", "OneCycleLR"]


class CosineAnnealingWarmRestarts(LRScheduler, torch_schedulers.CosineAnnealingWarmRestarts):
    r"""Cosines one after another, each down to `eta_min`.

    $$ \eta_t = l + (\eta_0 - l)\,(1 + \cos(\pi\, T_\text{cur} / T_i)) / 2 $$

    The first has `T_0` steps, each next one `T_mult` times as many; $l$ is `eta_min`. `step(epoch)`
    takes fractions of an epoch, too. Loshchilov and Hutter, "SGDR", 2017, arXiv:1608.03983.

    Example: `T_0=2, T_mult=2` from lr 1 gives 1, 0.5, then 1, 0.854, 0.5, 0.146, then 1 again.
    """

    options = ("T_0", "T_mult", "eta_min")

    def __init__(
        self,
        optimizer: Optimizer,
        T_0: int,
        T_mult: int = 1,
        eta_min: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        check_number(self, last_epoch=last_epoch)
        check_count("T_0", T_0)
        check_count("T_mult", T_mult)
        if not isinstance(eta_min, (float, int)):
            raise ValueError(
                f"Expected float or int eta_min, but got {eta_min} of type {type(eta_min)}."
            )
        self.T_0, self.T_i, self.T_mult, self.eta_min, self.T_cur = (
            T_0,
            T_0,
            T_mult,
            eta_min,
            float(last_epoch),
        )
        super().__init__(optimizer, last_epoch)

    def step(self, epoch: float | None = None) -> None:
        """Go on to the next step; with `epoch`, to that one, or to a fraction of one."""
        if torch.compiler.is_compiling():
            return _step_outside_graphs(self, epoch)
        return _step(self, epoch)

    def _rates(self) -> list[Any]:
        scale = half_cosine(self.T_cur, self.T_i)
        return [self.eta_min + (base - self.eta_min) * scale for base in self.base_lrs]

    def _rates_before(self) -> list[Any]:
        here = self.T_cur, self.T_i
        _, self.T_cur, self.T_i = find_cycle(self.last_epoch - 1, self.T_0, self.T_mult)
        values = self._rates()
        self.T_cur, self.T_i = here
        return values

    def _move(self, epoch: float | None) -> None:
        resumes = self._is_initial and self._resumed and epoch is None
        if epoch is None and not self._is_initial:
            # As torch, from the place in the cycle: somebody may have set it.
            step = self.last_epoch + 1
            self.T_cur += 1
            if self.T_cur >= self.T_i:
                self.T_cur, self.T_i = self.T_cur - self.T_i, self.T_i * self.T_mult
        else:
            step = self.last_epoch + self.T_cur % 1 + 1 if epoch is None else epoch
            _, self.T_cur, self.T_i = find_cycle(step, self.T_0, self.T_mult)
        super()._move(None if resumes else math.floor(step))


def _step(scheduler: CosineAnnealingWarmRestarts, epoch: float | None) -> None:
    if scheduler._step_count == 1:
        is_altered(scheduler)
    if not is_same(scheduler):
        return _step_as_torch(scheduler, epoch)
    if epoch is not None and epoch < 0:
        raise ValueError(f"Expected non-negative epoch, but got {epoch}.")
    scheduler._step_count += 1
    return scheduler._move(epoch)


def _step_as_torch(scheduler: CosineAnnealingWarmRestarts, epoch: float | None) -> None:
    """Take a step as torch's class does, and none where that fails."""
    scheduler._onepass.home._adopt(scheduler)
    before = {name: getattr(scheduler, name) for name in ("last_epoch", "T_cur", "T_i")}
    try:
        torch_schedulers.CosineAnnealingWarmRestarts.step(scheduler, epoch)  # pyright: ignore[reportArgumentType]
    except BaseException:
        vars(scheduler).update(before)
        raise


_step_outside_graphs = torch._disable_dynamo(lambda scheduler, epoch: _step(scheduler, epoch))


class _Triangles(CycleLR):
    """The frame of `CyclicLR`: where in a triangle a step is."""

    mode: str
    gamma: float
    scale_mode: str
    total_size: float
    step_ratio: float
    max_lrs: list[Any]
    _lowest: list[Any]
    _scale_fn_custom: Any
    scale_fn: Callable[[float], float]

    def _set_triangle(
        self, up: int, down: int, mode: str, gamma: float, scale_fn: Any, scale_mode: str
    ) -> None:
        check_number(self, step_size_up=up, step_size_down=down, gamma=gamma)
        if scale_fn is not None and not callable(scale_fn):
            raise TypeError(
                f"{type(self).__name__}: scale_fn must be a function or None, got {scale_fn!r:.80}."
            )
        if up <= 0 or down < 0:
            raise ValueError(
                f"step_size_up must be positive and step_size_down not negative, got {up} and "
                f"{down}."
            )
        if mode not in ("triangular", "triangular2", "exp_range") and scale_fn is None:
            raise ValueError(
                "mode is invalid and scale_fn is None: choose triangular, triangular2 or "
                f"exp_range, got {mode!r}."
            )
        self.total_size, self.step_ratio = float(up + down), float(up) / (up + down)
        self.mode, self.gamma, self._scale_fn_custom, self.scale_mode = (
            mode,
            gamma,
            scale_fn,
            scale_mode,
        )

    def height(self) -> float:
        """How far up, from 0 to 1, the step is."""
        cycle = math.floor(1 + self.last_epoch / self.total_size)
        x = 1.0 + self.last_epoch / self.total_size - cycle
        height = x / self.step_ratio if x <= self.step_ratio else (x - 1) / (self.step_ratio - 1)
        return height * self.scale_fn(cycle if self.scale_mode == "cycle" else self.last_epoch)

    @staticmethod
    def _triangular2_scale_fn(x: float) -> float:
        return 2.0 ** (1 - x)  # torch's 1 / 2 ** (x - 1) ends with an overflow

    def _prepare(self) -> None:
        super()._prepare()
        for group, low in zip(self.optimizer.param_groups, self._lowest, strict=True):
            assign(group, "lr", low)

    def _move(self, epoch: int | None) -> None:
        if self._resumed and self._lowest:
            self.base_lrs = list(map(copied, self._lowest))
        super()._move(epoch)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict() | {"_scale_fn_custom": saved_attributes(self._scale_fn_custom)}
        return {
            key: value for key, value in state.items() if key not in ("_lowest", "_scale_fn_ref")
        }

    def _restore(self, state: dict[str, Any]) -> None:
        attributes = state.pop("_scale_fn_custom", None)
        if attributes and self._scale_fn_custom is not None:
            vars(self._scale_fn_custom).update(attributes)
        super()._restore(state)

    def _adopt(self, is_new: bool = False) -> None:
        super()._adopt(is_new)
        for name in (
            ("max_lrs", "base_momentums", "max_momentums") if self.cycle_momentum else ("max_lrs",)
        ):
            values = getattr(self, name)
            values += [shared(name, values) for _ in self.base_lrs[len(values) :]]


class CyclicLR(_Triangles, torch_schedulers.CyclicLR):
    r"""Up from `base_lr` to `max_lr` in `step_size_up` steps, down in `step_size_down`, and again.

    The height is multiplied by 1 (`mode` "triangular"), in cycle $c$ by $2^{1-c}$ ("triangular2"),
    at step $t$ by $\gamma^t$ ("exp_range"), or by `scale_fn` of $c$ or $t$ (`scale_mode` "cycle" or
    "iterations"). Momentum goes the other way. Smith, "Cyclical Learning Rates for Training Neural
    Networks", 2017, arXiv:1506.01186.

    Example: `base_lr=0.1, max_lr=1, step_size_up=3` gives 0.1, 0.4, 0.7, 1, 0.7, 0.4, 0.1.
    """

    options = (
        "max_lrs",
        "total_size",
        "step_ratio",
        "mode",
        "gamma",
        "scale_mode",
        "cycle_momentum",
    )

    def __init__(
        self,
        optimizer: Optimizer,
        base_lr: float | list[float],
        max_lr: float | list[float],
        step_size_up: int = 2000,
        step_size_down: int | None = None,
        mode: Literal["triangular", "triangular2", "exp_range"] = "triangular",
        gamma: float = 1.0,
        scale_fn: Callable[[float], float] | None = None,
        scale_mode: Literal["cycle", "iterations"] = "cycle",
        cycle_momentum: bool = True,
        base_momentum: float = 0.8,
        max_momentum: float = 0.9,
        last_epoch: int = -1,
    ) -> None:
        self._onepass.home._check_momenta(
            self, optimizer, cycle_momentum, base_momentum, max_momentum
        )
        check_numbers(self, base_lr=base_lr, max_lr=max_lr)
        self._lowest, self.max_lrs = (
            per_group("base_lr", optimizer, base_lr),
            per_group("max_lr", optimizer, max_lr),
        )
        down = step_size_up if step_size_down is None else step_size_down
        self._onepass.home._set_triangle(
            self, step_size_up, down, mode, gamma, scale_fn, scale_mode
        )
        self._init_scale_fn()
        lowest = list(map(copied, self._lowest))
        super().__init__(optimizer, last_epoch)
        self._lowest, self.base_lrs = (
            [],
            lowest,
        )  # the first step has been from the group's initial_lr, as with torch

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        self._init_scale_fn()

    def _rates(self) -> list[Any]:
        height = self.height()
        return [
            low + (high - low) * height
            for low, high in zip(self.base_lrs, self.max_lrs, strict=True)
        ]

    def momenta(self) -> list[float]:
        height = self.height()
        return [
            top - (top - low) * height
            for low, top in zip(self.base_momentums, self.max_momentums, strict=True)
        ]


class _Phases(CycleLR):
    """The frame of `OneCycleLR`: phases, each from one of a group's numbers to another."""

    handed_on = ("initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum")
    total_steps: int
    _anneal_func_type: str

    def _set_phases(self, rise: float, three: bool) -> None:
        total, names = self.total_steps, ("start_lr", "end_lr", "start_momentum", "end_momentum")
        up = ("initial_lr", "max_lr", "max_momentum", "base_momentum")
        down = ("max_lr", "initial_lr" if three else "min_lr", "base_momentum", "max_momentum")
        ends: list[tuple[float, tuple[str, ...]]] = [(rise * total - 1, up), (total - 1, down)]
        if three:
            last = ("initial_lr", "min_lr", "max_momentum", "max_momentum")
            ends = [ends[0], (2 * rise * total - 2, down), (total - 1, last)]
        self._schedule_phases: list[Any] = [
            {"end_step": float(end), **dict(zip(names, row, strict=True))} for end, row in ends
        ]

    def _rates(self) -> list[Any]:
        return self._values("lr")

    def momenta(self) -> list[float]:
        return self._values("momentum")

    def _values(self, what: str) -> list[Any]:
        if self.last_epoch > self.total_steps:
            raise ValueError(
                f"Tried to step {self.last_epoch} times. The number of total steps is "
                f"{self.total_steps}."
            )
        phases = self._schedule_phases
        step, earlier = self.last_epoch, enumerate(phases[:-1])
        index = next((i for i, phase in earlier if step <= phase["end_step"]), len(phases) - 1)
        start = phases[index - 1]["end_step"] if index else 0.0
        end = phases[index]["end_step"]
        fraction = (self.last_epoch - start) / (end - start) if end != start else 1.0
        left = _share_left(self, fraction)
        first, last = phases[index][f"start_{what}"], phases[index][f"end_{what}"]
        return [
            group[last] + (group[first] - group[last]) * left
            for group in self.optimizer.param_groups
        ]


def _share_left(scheduler: Any, fraction: float) -> float:
    """How much is left of the way from a phase's first value to its last; state dicts of old torchs
    hold a function."""
    kind = getattr(scheduler, "_anneal_func_type", None)
    if kind is None:
        return scheduler.anneal_func(1.0, 0.0, fraction)
    return anneal(1.0, 0.0, fraction, "cosine" if kind == "cos" else "linear")


class OneCycleLR(_Phases, torch_schedulers.OneCycleLR):
    """Up to `max_lr` in the fraction `pct_start` of the steps, then down to far below the start.

    It begins at `max_lr` / `div_factor`, and ends at 1 / `final_div_factor` of that; with
    `three_phase`, it goes down to the start first. Momentum goes the other way. Smith and Topin,
    "Super-Convergence", 2018, arXiv:1708.07120.

    Example: `max_lr=1, total_steps=7, pct_start=0.5` gives 0.04, 0.372, 0.908, 0.951, 0.611, 0.188,
    4e-6.
    """

    options = ("total_steps", "cycle_momentum")

    def __init__(
        self,
        optimizer: Optimizer,
        max_lr: float | list[float],
        total_steps: int | None = None,
        epochs: int | None = None,
        steps_per_epoch: int | None = None,
        pct_start: float = 0.3,
        anneal_strategy: Literal["cos", "linear"] = "cos",
        cycle_momentum: bool = True,
        base_momentum: float | list[float] = 0.85,
        max_momentum: float | list[float] = 0.95,
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
        three_phase: bool = False,
        last_epoch: int = -1,
    ) -> None:
        self._onepass.home._check_momenta(
            self, optimizer, cycle_momentum, base_momentum, max_momentum
        )
        check_numbers(self, max_lr=max_lr)
        check_number(self, div_factor=div_factor, final_div_factor=final_div_factor)
        self.total_steps = _count_steps(total_steps, epochs, steps_per_epoch)
        if not isinstance(pct_start, (float, int)):
            check_number(self, pct_start=pct_start)
        if not isinstance(pct_start, float) or not 0 <= pct_start <= 1:
            raise ValueError(f"Expected float between 0 and 1 pct_start, but got {pct_start}.")
        self._anneal_func_type = check_strategy(anneal_strategy)
        self._onepass.home._set_phases(self, pct_start, three_phase)
        self._max_lrs, self._divisors = (
            per_group("max_lr", optimizer, max_lr),
            (div_factor, final_div_factor),
        )
        super().__init__(optimizer, last_epoch)
        # They are in the groups from now on.
        for name in ("base_momentums", "max_momentums"):
            vars(self).pop(name, None)

    def _prepare(self) -> None:
        super()._prepare()
        for group, top in zip(self.optimizer.param_groups, self._max_lrs, strict=True):
            first = top / self._divisors[0]
            group["initial_lr"], group["max_lr"], group["min_lr"] = (
                first,
                top,
                first / self._divisors[1],
            )


def _count_steps(total: int | None, epochs: int | None, per_epoch: int | None) -> int:
    if total is None and (epochs is None or per_epoch is None):
        raise ValueError("You must define either total_steps OR (epochs AND steps_per_epoch).")
    for name, value in (("total_steps", total), ("epochs", epochs), ("steps_per_epoch", per_epoch)):
        if value is not None and (total is None or name == "total_steps"):
            check_count(name, value, TypeError if name == "total_steps" else ValueError)
    return total if total is not None else (epochs or 0) * (per_epoch or 0)
