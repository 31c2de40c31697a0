"""What must hold before a parameter steps. Each failure is one sentence, raised before anything has changed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import kernel

Group = dict[str, Any]
State = dict[str, Any]


class StepError(RuntimeError):
    """A step that cannot be taken; nothing has been changed."""


@dataclass(frozen=True)
class Member:
    """A parameter's place in the list of all parameters and in a group, how it steps, and its name in a message."""

    position: int
    group: int
    kind: int
    label: str


def number(value: object, name: str) -> float:
    """A hyper-parameter as a float; tensors of one element are read."""
    if type(value) is float:
        return value
    try:
        if not isinstance(value, str):
            return float(value.detach() if isinstance(value, Tensor) else value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        pass
    raise StepError(f"param group option {name!r} must be a number, got {_brief(value)}")


def pick(group: Group, key: str, i: int | None) -> Any:
    """A group's option, or its entry i where it is a tuple."""
    if key not in group:
        raise StepError(f"param group has no option {key!r}, which the rule needs; set it")
    try:
        return group[key] if i is None else group[key][i]
    except (IndexError, TypeError):
        raise StepError(f"param group option {key!r} must have an entry {i}, got {_brief(group[key])}") from None


def check_member(
    owner: str,
    member: Member,
    p: Tensor,
    state: Mapping[str, Any],
    required: Collection[str],
    numbers: Collection[str],
) -> None:
    """Whether a parameter can step, with the gradient and the state that it has.

    `required` are the state entries that a parameter which has stepped before must have, `numbers` those that are one
    number.
    """
    _check_parameter(owner, member, p)
    if p.grad is not None:
        check_gradient(owner, member, p, p.grad)
    present = [name for name in required if state.get(name) is not None]
    lost = [name for name in required if name not in present]
    if present and lost:
        raise StepError(
            f"{owner}: the state of parameter {member.label} has {present[0]!r} but no {lost[0]!r}; "
            "delete the parameter's state to begin anew, or load a whole one"
        )
    for name, s in state.items():
        if name in (*numbers, "step") and s is not None:
            _check_number(owner, member, name, s)


def _check_parameter(owner: str, member: Member, p: Tensor) -> None:
    if type(p) in kernel.PLAIN and p.layout == torch.strided:
        if not kernel.has_storage(p):
            raise StepError(
                f"{owner}: parameter {member.label} of shape {tuple(p.shape)} has no storage (it was freed, as by "
                "untyped_storage().resize_(0)); give it memory again before stepping"
            )
        if any(stride == 0 and n > 1 for n, stride in zip(p.shape, p.stride(), strict=True)):
            raise StepError(f"{owner}: parameter {member.label} is expanded, its elements share memory; clone it")
    _check_writable(owner, f"parameter {member.label}", p)


def _check_writable(owner: str, what: str, t: Tensor) -> None:
    if t.is_inference() and not torch.is_inference_mode_enabled():
        raise StepError(f"{owner}: {what} was made in inference mode and cannot be written outside of it; clone it")


def _check_number(owner: str, member: Member, name: str, value: object) -> None:
    if not isinstance(value, (int, float)) and not (isinstance(value, Tensor) and value.numel() == 1):
        raise StepError(f"{owner}: state {name!r} of parameter {member.label} must be one number, got {_brief(value)}")


def check_matrix(owner: str, member: Member, p: Tensor) -> None:
    """A parameter whose rows and columns matter."""
    if p.is_complex():
        raise StepError(f"{owner} does not support complex parameters, and parameter {member.label} is {p.dtype}")
    if p.dim() < 2:
        raise StepError(
            f"{owner} needs matrices, and parameter {member.label} has shape {tuple(p.shape)}; give it to another "
            "optimizer"
        )


def check_gradient(owner: str, member: Member, p: Tensor, g: Tensor) -> None:
    """A gradient that no step can use."""
    if g.layout != torch.strided:
        advice = ", please consider SparseAdam instead" if owner.startswith("Adam") else ": use torch.optim.SGD here"
        raise StepError(f"{owner} does not support sparse gradients{advice} (parameter {member.label})")
    if g.shape != p.shape:
        raise StepError(
            f"{owner}: the gradient of parameter {member.label} has shape {tuple(g.shape)}, "
            f"the parameter has {tuple(p.shape)}; set it by p.grad = ... or run backward() again"
        )
    if g.device != p.device:
        raise StepError(
            f"{owner}: parameter {member.label} is on {p.device} and its gradient on {g.device}; move them together"
        )
    if g.is_complex() != p.is_complex() or not (g.is_floating_point() or g.is_complex()):
        raise StepError(f"{owner}: parameter {member.label} is {p.dtype} and its gradient {g.dtype}")
    if type(g) in kernel.PLAIN and not kernel.has_storage(g):
        raise StepError(f"{owner}: the gradient of parameter {member.label} has lost its storage; run backward() again")


def check_state(owner: str, member: Member, p: Tensor, name: str, s: object, shape: tuple[int, ...]) -> None:
    """A state column that does not belong to its parameter."""
    what = f"state {name!r} of parameter {member.label}"
    if not isinstance(s, Tensor):
        raise StepError(f"{owner}: {what} must be a tensor, got {_brief(s)}")
    if s.shape != shape:
        belongs = "the parameter has" if shape == p.shape else f"for a parameter of {tuple(p.shape)} it must have"
        raise StepError(
            f"{owner}: {what} has shape {tuple(s.shape)}, {belongs} {shape}; delete the parameter's "
            "state to begin anew, or load one that fits"
        )
    if s.device != p.device:
        raise StepError(
            f"{owner}: parameter {member.label} is on {p.device}, its state {name!r} on {s.device}; move them together"
        )
    if s.layout != torch.strided or s.is_complex() != p.is_complex() or not (s.is_floating_point() or s.is_complex()):
        raise StepError(f"{owner}: {what} is {s.dtype} ({s.layout}), the parameter {p.dtype}; load one that fits")
    if type(s) in kernel.PLAIN and not kernel.has_storage(s):
        raise StepError(f"{owner}: {what} has lost its storage; load it again")
    _check_writable(owner, what, s)


def _brief(value: object) -> str:
    """A value in a few words and one line."""
    if isinstance(value, (str, bytes, int, float, complex, tuple, list, type(None))):
        return f"{value!r:.60}".replace("\n", " ")
    return f"a {torch.typename(value)}"
