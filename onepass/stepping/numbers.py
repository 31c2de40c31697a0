"""Where each parameter's numbers lie, as its step count: in a tensor of its own, as with torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract.values import State
from .columns import lies_in_memory
from .ledger import Ledger
from .recipe import Recipe, counter_dtype, new_counter


class Numbers:
    """Looks after the numbers of all parameters of a plan; changes are noted in its ledger.

    A tensor that several parameters have as their number must not become one number for all: each
    gets its own.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._known: set[int] = set()

    def place(self, state: State, recipe: Recipe, device: torch.device) -> None:
        """Let a parameter's numbers lie on a device, where a kernel can reach them; those that do
        stay."""
        for name in recipe.numbers:
            number = state[name]
            if _is_in_place(number, device) and self._is_new(number):
                continue
            entry = new_counter(device)
            if isinstance(number, Tensor):
                # Without reading it: it may be on a device.
                entry.copy_(number.detach().reshape(()), non_blocking=True)
            else:
                entry.fill_(number)
            self._ledger.set(state, name, entry)

    def part(self, state: State, recipe: Recipe) -> None:
        """Let no two parameters have one tensor as their number, where torch's operations count."""
        for name in recipe.numbers:
            number = state[name]
            if isinstance(number, Tensor) and not self._is_new(number):
                self._ledger.set(state, name, number.detach().clone())

    def _is_new(self, number: Tensor) -> bool:
        """Whether no parameter so far has this number, or its memory."""
        key = number.data_ptr() if lies_in_memory(number) else -id(number)
        known = key in self._known
        self._known.add(key)
        return not known


def _is_in_place(number: object, device: torch.device) -> bool:
    """Whether a kernel can read and write a number where it is."""
    if type(number) is not Tensor or number.numel() != 1 or number.layout != torch.strided:
        return False
    if (number.dtype, number.device) != (counter_dtype(), device):
        return False
    return not (number.is_inference() or number.is_neg() or number.requires_grad)
