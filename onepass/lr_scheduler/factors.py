"""Schedulers that multiply the lr of a group by a factor: most of torch's.

Each gives its factor as a function of the step. `ClosedLR` makes learning rates of it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim import lr_scheduler as torch_schedulers
from torch.optim import swa_utils as torch_swa_utils

from ..schedule.formulas import anneal, half_cosine
from .arguments import (
    check_number,
    check_numbers,
    check_optimizer,
    check_strategy,
    increasing,
)
from .closed import ClosedLR
from .frame import LRScheduler
from .values import LR, per_group, saved_attributes

__all__ = ["ConstantLR", "LambdaLR", "LinearLR", "MultiStepLR", "MultiplicativeLR", "StepLR"]
__all__ += ["SWALR", "CosineAnnealingLR", "ExponentialLR", "PolynomialLR"]

Lambda = Callable[[int], float]


class _LambdaFrame(LRScheduler):
    """The frame of schedulers that ask a function of the step, one for all groups or one for each.

    Functions are not saved with the state. The attributes of callable objects are.
    """

    options = ("lr_lambdas",)
    lr_lambdas: list[Lambda]

    def __init__(
        self, optimizer: Optimizer, lr_lambda: Lambda | Sequence[Lambda], last_epoch: int = -1
    ) -> None:
        check_optimizer(self, optimizer)
        self._shared = not isinstance(lr_lambda, (list, tuple))
        self.lr_lambdas = per_group("lr_lambda", optimizer, lr_lambda)
        for function in self.lr_lambdas:
            if not callable(function):
                raise TypeError(
                    f"lr_lambda should be a function of the step, got {function!r:.80}."
                )
        super().__init__(optimizer, last_epoch)

    def _adopt(self, is_new: bool = False) -> None:
        super()._adopt(is_new)
        if self._shared:
            self.lr_lambdas += self.lr_lambdas[:1] * (len(self.base_lrs) - len(self.lr_lambdas))

    def _is_one(self) -> bool:
        """Whether all groups still have one function."""
        return self._shared and self.lr_lambdas.count(self.lr_lambdas[0]) == len(self.lr_lambdas)

    def state_dict(self) -> dict[str, Any]:
        state = {key: value for key, value in super().state_dict().items() if key != "_known"}
        return state | {"lr_lambdas": [saved_attributes(function) for function in self.lr_lambdas]}

    def _restore(self, state: dict[str, Any]) -> None:
        for function, saved in zip(self.lr_lambdas, state.pop("lr_lambdas"), strict=False):
            if saved:
                vars(function).update(saved)
        super()._restore(state)


class LambdaLR(_LambdaFrame, torch_schedulers.LambdaLR):
    r"""The initial lr times a function of the step: $\eta_t = \eta_0\, \lambda(t)$.

    `lr_lambda` is the function, or a list with one for each param group.

    Example: `lambda t: 0.5**t` from lr 1 gives 1, 0.5, 0.25, 0.125.
    """

    def _rates(self) -> list[Any]:
        if self._is_one():
            scale = self.lr_lambdas[0](self.last_epoch)
            return [base * scale for base in self.base_lrs]
        return [
            base * scale(self.last_epoch)
            for base, scale in zip(self.base_lrs, self.lr_lambdas, strict=True)
        ]


class MultiplicativeLR(_LambdaFrame, ClosedLR, torch_schedulers.MultiplicativeLR):
    r"""The last lr times a function of the step: $\eta_t = \eta_{t-1}\, \lambda(t)$.

    `lr_lambda` is the function, or a list with one for each param group. It is not asked for step
    0.

    Example: `lambda t: 0.5 if t % 2 else 1.0` from lr 1 gives 1, 0.5, 0.5, 0.25.
    """

    def __init__(
        self, optimizer: Optimizer, lr_lambda: Lambda | Sequence[Lambda], last_epoch: int = -1
    ) -> None:
        self._onepass_products: tuple[int, list[float]] = (0, [])
        super().__init__(optimizer, lr_lambda, last_epoch)

    def _closed(self, lrs: Iterable[Any], step: int) -> list[Any]:
        functions = self.lr_lambdas[:1] if self._is_one() else self.lr_lambdas
        done, products = self._onepass_products
        if step < done or len(products) != len(functions):
            done, products = 0, [1.0] * len(functions)
        for t in range(done + 1, step + 1):
            products = [
                product * function(t) for product, function in zip(products, functions, strict=True)
            ]
        self._onepass_products = step, products
        spread = (
            products * len(self.lr_lambdas) if len(products) < len(self.lr_lambdas) else products
        )
        return [lr * product for lr, product in zip(lrs, spread, strict=True)]

    def _inputs(self) -> Any:
        return list(self.lr_lambdas)

    def _carry(self, lrs: list[Any], step: int) -> list[Any]:
        return (
            [lr * f(step) for lr, f in zip(lrs, self.lr_lambdas, strict=True)] if step > 0 else lrs
        )

    def _move(self, epoch: int | None) -> None:
        if epoch is None:
            return super()._move(epoch)
        lrs = map(LR, self.optimizer.param_groups)
        values = [lr * function(epoch) for lr, function in zip(lrs, self.lr_lambdas, strict=True)]
        return self._settle(epoch, values, [False] * len(values))


class StepLR(ClosedLR, torch_schedulers.StepLR):
    r"""The lr times `gamma` every `step_size` steps: $\eta_t = \eta_0\, \gamma^{\lfloor t / n
    \rfloor}$.

    Example: `step_size=2, gamma=0.1` from lr 1 gives 1, 1, 0.1, 0.1, 0.01.
    """

    options = ("step_size", "gamma")

    def __init__(
        self, optimizer: Optimizer, step_size: int, gamma: float = 0.1, last_epoch: int = -1
    ) -> None:
        check_number(self, step_size=step_size, gamma=gamma)
        if step_size <= 0:
            raise ValueError(
                f"StepLR: step_size must be a positive number of steps, got {step_size}."
            )
        self.step_size, self.gamma = step_size, gamma
        super().__init__(optimizer, last_epoch)

    def scale(self, step: int) -> float:
        return self.gamma ** (step // self.step_size)

    def ratio(self, step: int) -> float:
        return self.gamma if step > 0 and step % self.step_size == 0 else 1.0


class MultiStepLR(ClosedLR, torch_schedulers.MultiStepLR):
    r"""The lr times `gamma` at each of `milestones`: $\eta_t = \eta_0\, \gamma^{|\{m \le t\}|}$.

    `milestones` are steps that increase; ValueError if they do not.

    Example: `milestones=[1, 3], gamma=0.1` from lr 1 gives 1, 0.1, 0.1, 0.01.
    """

    options = ("milestones", "gamma")

    def __init__(
        self,
        optimizer: Optimizer,
        milestones: Iterable[int],
        gamma: float = 0.1,
        last_epoch: int = -1,
    ) -> None:
        check_number(self, gamma=gamma)
        self.milestones = Counter(increasing("MultiStepLR", milestones))
        self.gamma = gamma
        super().__init__(optimizer, last_epoch)

    def _inputs(self) -> Any:
        return *self.milestones.items(), self.gamma

    def scale(self, step: int) -> float:
        return self.gamma ** bisect_right(sorted(self.milestones.elements()), step)

    def ratio(self, step: int) -> float:
        return self.gamma ** self.milestones[step]


def _fraction(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} expected to be between 0 and 1, got {value}.")
    return value


class ConstantLR(ClosedLR, torch_schedulers.ConstantLR):
    r"""The lr times `factor` for the first `total_iters` steps: $\eta_0\, c$ for $t < T$, then
    $\eta_0$.

    `factor` lies in [0, 1].

    Example: `factor=0.5, total_iters=2` from lr 1 gives 0.5, 0.5, 1, 1.
    """

    options = ("factor", "total_iters")

    def __init__(
        self,
        optimizer: Optimizer,
        factor: float = 1.0 / 3,
        total_iters: int = 5,
        last_epoch: int = -1,
    ) -> None:
        check_number(self, factor=factor, total_iters=total_iters)
        self.factor = _fraction("ConstantLR: factor", factor)
        self.total_iters = total_iters
        super().__init__(optimizer, last_epoch)

    def scale(self, step: int) -> float:
        return self.factor if step < self.total_iters else 1.0


class LinearLR(ClosedLR, torch_schedulers.LinearLR):
    r"""A line from one factor to another: $\eta_t = \eta_0\,(a + (b - a) \min(t, T) / T)$.

    $a$ is `start_factor`, in (0, 1], $b$ is `end_factor`, in [0, 1], and $T$ is `total_iters`, in
    steps.

    Example: `start_factor=0.25, total_iters=3` from lr 1 gives 0.25, 0.5, 0.75, 1.
    """

    options = ("start_factor", "end_factor", "total_iters")

    def __init__(
        self,
        optimizer: Optimizer,
        start_factor: float = 1.0 / 3,
        end_factor: float = 1.0,
        total_iters: int = 5,
        last_epoch: int = -1,
    ) -> None:
        check_number(
            self, start_factor=start_factor, end_factor=end_factor, total_iters=total_iters
        )
        if start_factor == 0:
            raise ValueError(
                "LinearLR: start_factor must be greater than 0, which no later factor could scale "
                "up again."
            )
        self.start_factor = _fraction("LinearLR: start_factor", start_factor)
        self.end_factor = _fraction("LinearLR: end_factor", end_factor)
        self.total_iters = total_iters
        super().__init__(optimizer, last_epoch)

    def scale(self, step: int) -> float:
        if step >= self.total_iters:
            return self.end_factor if self.total_iters > 0 else self.start_factor
        return anneal(self.start_factor, self.end_factor, step / self.total_iters, "linear")


class ExponentialLR(ClosedLR, torch_schedulers.ExponentialLR):
    r"""The lr times `gamma` at every step: $\eta_t = \eta_0\, \gamma^t$.

    Example: `gamma=0.5` from lr 1 gives 1, 0.5, 0.25, 0.125.
    """

    options = ("gamma",)

    def __init__(self, optimizer: Optimizer, gamma: float, last_epoch: int = -1) -> None:
        check_number(self, gamma=gamma)
        self.gamma = gamma
        super().__init__(optimizer, last_epoch)

    def scale(self, step: int) -> float:
        return self.gamma**step

    def ratio(self, step: int) -> float:
        return self.gamma if step > 0 else 1.0


class PolynomialLR(ClosedLR, torch_schedulers.PolynomialLR):
    r"""Down to 0 with a power of what is left: $\eta_t = \eta_0\,(1 - \min(t, T) / T)^k$.

    $T$ is `total_iters`, in steps, and $k$ is `power`.

    Example: `total_iters=4, power=2` from lr 1 gives 1, 0.5625, 0.25, 0.0625, 0.
    """

    options = ("total_iters", "power")

    def __init__(
        self, optimizer: Optimizer, total_iters: int = 5, power: float = 1.0, last_epoch: int = -1
    ) -> None:
        check_number(self, total_iters=total_iters, power=power)
        self.total_iters, self.power = total_iters, power
        super().__init__(optimizer, last_epoch)

    def scale(self, step: int) -> float:
        if self.total_iters <= 0:
            return 1.0
        return (1.0 - min(step, self.total_iters) / self.total_iters) ** self.power


class CosineAnnealingLR(ClosedLR, torch_schedulers.CosineAnnealingLR):
    r"""Half a cosine wave down to `eta_min` in `T_max` steps, and up again.

    $$ \eta_t = l + (\eta_0 - l)\,(1 + \cos(\pi t / T)) / 2 $$

    $l$ is `eta_min`, $T$ is `T_max`. Loshchilov and Hutter, "SGDR", 2017, arXiv:1608.03983.

    Example: `T_max=4` from lr 1 gives 1, 0.854, 0.5, 0.146, 0.
    """

    options = ("T_max", "eta_min")

    def __init__(
        self, optimizer: Optimizer, T_max: int, eta_min: float = 0.0, last_epoch: int = -1
    ) -> None:
        check_number(self, T_max=T_max, eta_min=eta_min)
        if T_max <= 0:
            raise ValueError(
                f"CosineAnnealingLR: T_max must be a positive number of steps, got {T_max}."
            )
        self.T_max, self.eta_min = T_max, eta_min
        super().__init__(optimizer, last_epoch)

    def floors(self) -> Sequence[Any]:
        return [self.eta_min] * len(self.base_lrs) if self.eta_min else ()

    def scale(self, step: int) -> float:
        return half_cosine(step, self.T_max)


class SWALR(ClosedLR, torch_swa_utils.SWALR):
    r"""From whatever the lr is to `swa_lr` in `anneal_epochs` steps; there it stays, for averages.

    $$ \eta_t = s + (\eta_0 - s)\,(1 - \alpha(t)) $$

    $s$ is `swa_lr`, one number or one for each param group. $\alpha$ goes from 0 to 1 on half a
    cosine wave (`anneal_strategy` "cos") or on a line ("linear"). Izmailov et al., "Averaging
    Weights Leads to Wider Optima and Better Generalization", 2018, arXiv:1803.05407.

    Example: `swa_lr=0.2, anneal_epochs=2, anneal_strategy="linear"` from lr 1 gives 1, 0.6, 0.2,
    0.2.
    """

    options, handed_on = ("anneal_epochs",), ("swa_lr",)

    def __init__(
        self,
        optimizer: Optimizer,
        swa_lr: float | list[float],
        anneal_epochs: int = 10,
        anneal_strategy: Literal["cos", "linear"] = "cos",
        last_epoch: int = -1,
    ) -> None:
        check_optimizer(self, optimizer)
        check_numbers(self, swa_lr=swa_lr)
        self._swa_lrs = per_group("swa_lr", optimizer, swa_lr)
        self._set_anneal_func(check_strategy(anneal_strategy))
        if not isinstance(anneal_epochs, int) or anneal_epochs < 0:
            raise ValueError(f"anneal_epochs must be equal or greater than 0, got {anneal_epochs}.")
        self.anneal_epochs, self._origin = anneal_epochs, 0
        super().__init__(optimizer, last_epoch)

    def _set_anneal_func(self, anneal_strategy: Literal["cos", "linear"]) -> None:
        self._anneal_strategy = anneal_strategy
        self.anneal_func = self._cosine_anneal if anneal_strategy == "cos" else self._linear_anneal

    def _adopt(self, is_new: bool = False) -> None:
        super()._adopt(is_new)
        for group, lr in zip(self.optimizer.param_groups, self._swa_lrs, strict=False):
            group["swa_lr"] = lr
        self._swa_lrs = []

    def _move(self, epoch: int | None) -> None:
        if self.anneal_func not in (
            torch_swa_utils.SWALR._cosine_anneal,
            torch_swa_utils.SWALR._linear_anneal,
        ):
            self._own = [False] * len(
                self._own
            )  # another function has been put in, which goes on from here
        super()._move(epoch) if epoch is None else self._enter(epoch)

    def _resume(self, step: int) -> None:
        super()._resume(step)
        if not all(self._own):
            self._origin = step  # from a lr that somebody has set it anneals as from the start

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().state_dict().items() if key != "anneal_func"}

    def _restore(self, state: dict[str, Any]) -> None:
        if "_origin" not in state:  # torch's counts its calls
            state["_origin"] = max(0, state.get("last_epoch", 0) - state.get("_step_count", 1) + 1)
        self._set_anneal_func(state.get("_anneal_strategy", self._anneal_strategy))
        super()._restore({key: value for key, value in state.items() if key != "anneal_func"})

    def floors(self) -> Sequence[Any]:
        return [group["swa_lr"] for group in self.optimizer.param_groups]

    def scale(self, step: int) -> float:
        fraction = min(1.0, max(step, not self.anneal_epochs) / max(1, self.anneal_epochs))
        if self.anneal_func is torch_swa_utils.SWALR._cosine_anneal:
            return half_cosine(fraction, 1)
        return 1.0 - self.anneal_func(fraction)

    def _inputs(self) -> Any:
        return super()._inputs(), getattr(self.anneal_func, "__name__", ""), *self.floors()

    def _carry(self, lrs: list[Any], step: int) -> list[Any]:
        step -= self._origin
        return list(self.floors()) if self.scale(step) == 0 else super()._carry(lrs, step)
