"""Numbers of states, such as step counts, as torch's operations read, count and write them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..contract.values import State


def is_number_tensor(value: object) -> bool:
    """Whether an option is a tensor with one real number, which need not be read."""
    return (
        isinstance(value, Tensor)
        and value.numel() == 1
        and not (value.is_complex() or value.is_meta)
    )


def read_numbers(
    values: Sequence[Tensor | float], capturable: bool, differentiable: bool
) -> list[Tensor | float]:
    """Return numbers of states, as tensors if a graph capture or autograd must see them."""
    if differentiable:
        return [value.clone() if isinstance(value, Tensor) else value for value in values]
    if capturable:
        return [value.detach().clone() if isinstance(value, Tensor) else value for value in values]
    return [value.item() if isinstance(value, Tensor) else value for value in values]


@torch.no_grad()
def count_steps(states: Sequence[State]) -> None:
    """Add a step to the counts of parameters, in place where they are kept in tensors."""
    together: dict[torch.dtype, list[Tensor]] = {}
    for state in states:
        kept = state["step"]
        if not isinstance(kept, Tensor) or (
            kept.is_inference() and not torch.is_inference_mode_enabled()
        ):
            state["step"] = kept + 1
        elif type(kept) is Tensor and kept.is_cpu:
            together.setdefault(kept.dtype, []).append(kept)
        else:
            kept.add_(1)
    for dtype, counts in together.items():
        # A list of tensors is added much quicker than a number.
        torch._foreach_add_(counts, [torch.ones((), dtype=dtype, device="cpu")] * len(counts))


def write_number(state: State, name: str, value: Tensor | float) -> None:
    """Set a number of a parameter's state in place, where it is kept in a tensor."""
    kept = state[name]
    if isinstance(kept, Tensor) and (not kept.is_inference() or torch.is_inference_mode_enabled()):
        kept.copy_(value) if isinstance(value, Tensor) else kept.fill_(value)
    else:
        state[name] = torch.tensor(float(value), device="cpu")
