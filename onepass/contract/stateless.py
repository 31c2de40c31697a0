"""Steps on other tensors than an optimizer's own, under torch's name."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

__all__ = ["swap_in_optimizer_params_and_state"]


def _not_in_this_torch(*_: Any, **__: Any) -> NoReturn:
    """Stand in for torch's function if torch is too old to have it.

    Raises NotImplementedError, which says so.
    """
    raise NotImplementedError(
        f"swap_in_optimizer_params_and_state is torch's own, and torch {torch.__version__} does "
        "not have it; install a newer torch"
    )


# Torch's context manager works unchanged on these optimizers: the plan sees that groups and state
# have been exchanged.
swap_in_optimizer_params_and_state = getattr(
    torch.optim, "swap_in_optimizer_params_and_state", _not_in_this_torch
)
