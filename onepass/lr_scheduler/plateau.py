"""The scheduler that waits for a metric to stop improving."""

from __future__ import annotations

from typing import Any, Literal, SupportsFloat

from torch.optim import Optimizer
from torch.optim import lr_scheduler as torch_schedulers

from .arguments import check_number, check_numbers, check_word, warn_of_epoch
from .frame import LRScheduler
from .values import assign, copied, rates

__all__ = ["ReduceLROnPlateau"]


class ReduceLROnPlateau(torch_schedulers.ReduceLROnPlateau, LRScheduler):
    """The lr times `factor` when a metric has not improved for more than `patience` steps.

    `step(metric)` is given the metric. Better than the best so far is, for `mode` "min", less than
    best * (1 - `threshold`), or less than best - `threshold` with `threshold_mode` "abs"; for "max"
    the other way. After a reduction, `cooldown` steps are not counted. No lr goes below `min_lr`; a
    change of at most `eps` is left out.

    Example: `factor=0.1, patience=1` with the metrics 5, 4, 4, 4 from lr 1 gives 1, 1, 1, 0.1: two
    steps in a row have not improved.
    """

    options = (
        "factor",
        "patience",
        "threshold",
        "threshold_mode",
        "mode",
        "cooldown",
        "best",
        "num_bad_epochs",
    )

    def __init__(
        self,
        optimizer: Optimizer,
        mode: Literal["min", "max"] = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: Literal["rel", "abs"] = "rel",
        cooldown: int = 0,
        min_lr: list[float] | float = 0,
        eps: float = 1e-8,
    ) -> None:
        check_word(self, mode=mode, threshold_mode=threshold_mode)
        check_number(
            self, factor=factor, patience=patience, threshold=threshold, cooldown=cooldown, eps=eps
        )
        check_numbers(self, min_lr=min_lr)
        super().__init__(
            optimizer, mode, factor, patience, threshold, threshold_mode, cooldown, min_lr, eps
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        LRScheduler.load_state_dict(self, state_dict)
        self._init_is_better(
            mode=self.mode, threshold=self.threshold, threshold_mode=self.threshold_mode
        )

    def step(self, metrics: SupportsFloat, epoch: int | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  as torch's
        current = float(metrics)
        if epoch is not None:
            warn_of_epoch(stacklevel=3)
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        if self._is_better(current, self.best):
            self.best, self.num_bad_epochs = current, 0
        else:
            self.num_bad_epochs += 1
        if self.in_cooldown:
            self.cooldown_counter -= 1
            self.num_bad_epochs = 0
        if self.num_bad_epochs > self.patience:
            self._reduce_lr(self.last_epoch)
            self.cooldown_counter, self.num_bad_epochs = self.cooldown, 0
        self._last_lr = rates(self.optimizer)

    def _reduce_lr(self, epoch: int) -> None:
        groups = self.optimizer.param_groups
        if self.default_min_lr is not None:
            self.min_lrs = [self.default_min_lr] * len(groups)
        if len(groups) != len(self.min_lrs):
            raise RuntimeError(
                f"The number of param groups in the optimizer ({len(groups)}) is not that of the "
                f"values in min_lrs ({len(self.min_lrs)}): set min_lrs again."
            )
        # All before the first changes: groups may share one.
        olds = [float(copied(group["lr"])) for group in groups]
        for group, old, lowest in zip(groups, olds, self.min_lrs, strict=True):
            new = max(old * self.factor, lowest)
            if old - new > self.eps:
                assign(group, "lr", new)
