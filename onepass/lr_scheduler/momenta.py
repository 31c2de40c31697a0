"""The frame of schedules that move momentum against the lr."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch.optim import Optimizer

from .arguments import check_numbers, check_optimizer
from .frame import LRScheduler
from .overrides import is_altered
from .values import Group, per_group

__all__ = ["CycleLR"]

MOMENTA = ("base_momentums", "max_momentums", "use_beta1")


class CycleLR(LRScheduler):
    """Schedules that move momentum, or the first of the betas, against the lr.

    A subclass says which momentum each group has at a step: as a rule the lower, the higher the lr.

    Example: `OneCycleLR` with the defaults goes from momentum 0.95 to 0.85 while the lr goes up,
    and back to 0.95 while it goes down.
    """

    cycle_momentum: bool
    use_beta1: bool
    base_momentums: list[Any]
    max_momentums: list[Any]

    def momenta(self) -> list[float]:
        """Return the momentum of each group at `last_epoch`."""
        raise NotImplementedError

    def _check(self, state_dict: Mapping[str, Any]) -> None:
        # Earlier state dicts have them all.
        super()._check({key: value for key, value in state_dict.items() if key not in MOMENTA})

    def _check_momenta(self, optimizer: Optimizer, cycle: bool, base: Any, top: Any) -> None:
        check_optimizer(self, optimizer)
        if cycle and not {"momentum", "betas"} & optimizer.defaults.keys():
            raise ValueError(
                "optimizer must support momentum or beta1 with `cycle_momentum` option enabled: "
                f"{type(optimizer).__name__} has neither momentum nor betas, pass "
                "cycle_momentum=False."
            )
        self.cycle_momentum = cycle
        if cycle:
            self.use_beta1 = "betas" in optimizer.defaults
            check_numbers(self, base_momentum=base, max_momentum=top)
            self.base_momentums = per_group("base_momentum", optimizer, base)
            self.max_momentums = per_group("max_momentum", optimizer, top)

    def _prepare(self) -> None:
        if not self.cycle_momentum:
            return
        for group, low, high in zip(
            self.optimizer.param_groups, self.base_momentums, self.max_momentums, strict=True
        ):
            group["base_momentum"], group["max_momentum"] = low, high
        self._onepass.home._put_momenta(self, self.optimizer.param_groups, self.max_momentums)

    def _write(self, values: list[Any], plain: bool) -> None:
        momenta = self.momenta() if self.cycle_momentum else []
        super()._write(values, plain)
        self._put_momenta(self.optimizer.param_groups, momenta)
        self._last_momenta = momenta

    def _put_momenta(self, groups: Iterable[Group], momenta: list[float]) -> None:
        for group, momentum in zip(groups, momenta, strict=False):
            if not self.use_beta1:
                group["momentum"] = momentum
            else:
                group["betas"] = (momentum, *group["betas"][1:])

    def _found_momenta(self) -> list[float]:
        groups = self.optimizer.param_groups if self.cycle_momentum else ()
        return [group["betas"][0] if self.use_beta1 else group["momentum"] for group in groups]

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"_group_momenta": self._onepass.home._found_momenta(self)}

    def _restore(self, state: dict[str, Any]) -> None:
        left = vars(self).get("_last_momenta", [])
        found = self._onepass.home._found_momenta(self)
        saved = state.pop("_group_momenta", [])
        super()._restore(state)
        if not self.cycle_momentum or self.last_epoch < 0 or is_altered(self):
            return
        if self._last_momenta != self.momenta():
            # torch's scheduler has moved on without it.
            saved = self.momenta()
        momenta: list[float] = []
        for present, mine, new in zip(found, left, saved, strict=False):
            # What somebody has set since stays.
            momenta.append(new if present == mine else present)
        self._put_momenta(self.optimizer.param_groups, momenta)
