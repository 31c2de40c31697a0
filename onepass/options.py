"""What the options of an optimizer may be. Each failure is one sentence, raised before anything has changed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, SupportsFloat

import torch
from torch import Tensor

from . import kernel


def check_number(
    owner: str, name: str, value: Any, low: float = 0.0, below: float = math.inf, up_to: float = math.inf
) -> None:
    """Raise ValueError unless `value`, a number or a tensor of one element, lies in [low, below) and [low, up_to]."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{owner}: Tensor {name} must be 1-element, got shape {tuple(value.shape)}")
    if isinstance(value, (bool, str)) or not isinstance(value, (Tensor, SupportsFloat)):
        raise TypeError(f"{owner}: {name} must be a number, got {value!r}")
    number = float(value.detach() if isinstance(value, Tensor) else value)
    if not low <= number < below or number > up_to:
        allowed = f"[{low:g}, {below:g})" if up_to == math.inf else f"[{low:g}, {up_to:g}]"
        raise ValueError(f"{owner}: {name} must lie in {allowed}, got {value}")


def check_pair(owner: str, name: str, value: Any, low: float = -math.inf, below: float = math.inf) -> None:
    """Raise TypeError unless `value` is a tuple or a list, ValueError unless it holds two numbers in [low, below)."""
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{owner}: {name} must be two numbers, got {value!r}")
    if len(value) != 2:
        raise ValueError(f"{owner}: {name} must be two numbers, got {value!r}")
    for i, one in enumerate(value):
        check_number(owner, f"{name}[{i}]", one, low, below)


def check_betas(owner: str, betas: Any) -> None:
    """Raise ValueError unless `betas` are two numbers in [0, 1)."""
    check_pair(owner, "betas", betas, 0.0, 1.0)


def check_switches(owner: str, options: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise TypeError for an option that should be True or False (or None, for torch's modes) and is neither."""
    for name in names:
        value = options.get(name)
        if value is not None and not (isinstance(value, (bool, int)) and value in (0, 1)):
            raise TypeError(f"{owner}: {name} must be True or False, got {value!r:.60}")


def filled(like: Tensor, value: float | Tensor) -> Tensor:
    """A tensor like another with one value everywhere, of complex numbers in both parts.

    A value that lies on the tensor's device is not read by the host.
    """
    if isinstance(value, Tensor):
        stays = type(like) in kernel.PLAIN and value.device == like.device and not kernel.on_host(value.device)
        value = value.detach().reshape(()) if stays else float(value)
    new = torch.empty_like(like)
    (torch.view_as_real(new) if new.is_complex() else new).fill_(value)
    return new


def has_numbers_on_device(options: Mapping[str, Any], device: torch.device) -> bool:
    """Whether a parameter's numbers, as its step count, lie on its device: as in torch, where a step may be captured in
    a graph, or is fused."""
    return bool(options.get("capturable")) or (bool(options.get("fused")) and not kernel.on_host(device))


def is_zero(value: Any) -> bool:
    """Whether an option is 0; not, where it lies on a device, which then need not be asked."""
    return not (isinstance(value, Tensor) and not kernel.on_host(value.device)) and bool(value == 0)


def check_modes(owner: str, options: Mapping[str, Any]) -> None:
    """Raise RuntimeError for torch's modes where they exclude each other."""
    if options.get("fused") and options.get("differentiable"):
        raise RuntimeError(f"{owner}: `fused` does not support `differentiable`; leave one of them out")
    if options.get("fused") and options["foreach"]:
        raise RuntimeError(f"{owner}: `fused` and `foreach` cannot be `True` together; neither is needed here")
