"""What must hold before a parameter steps.

Each failure is one sentence, a `StepError`, raised before anything has changed. `owner`, the name
of the optimizer's class, begins it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import kernel
from ..contract.state_entries import why_no_number, why_no_state, why_not_whole
from ..contract.values import StepError

SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


@dataclass(frozen=True, slots=True)
class Member:
    """A parameter that takes part in steps.

    `position` is its place in the list of all parameters, `group` the index of its group, `kind`
    the index of its recipe, `label` its name in a message. `sparse` says what becomes of a sparse
    gradient: "slices" if the rule steps only the slices that have values, "filled" if it is
    converted to dense, empty if the gradient has not been sparse.
    """

    position: int
    group: int
    kind: int
    label: str
    sparse: str = ""

    def takes(self, g: Tensor) -> bool:
        """Whether a gradient has the layout that the parameter's batch was made for."""
        return self.sparse != "slices" if g.layout == torch.strided else self.sparse != ""


def sparse_kind(
    owner: str, label: str, g: Tensor | None, gradients: str, steps_slices: Callable[[], bool]
) -> str:
    """Return what becomes of a parameter's sparse gradients, see `Member`.

    `gradients` and `steps_slices` are `gradients` and `steps_rows` of `Optimizer`. Raises
    `StepError` if the class refuses the layout of `g`.
    """
    if g is None:
        return "slices" if gradients == "sparse" else ""
    if g.layout == torch.strided:
        if gradients == "sparse":
            raise StepError(
                f"{owner} does not support dense gradients, please consider Adam instead, or make "
                f"the embedding with sparse=True (parameter {label})"
            )
        return ""
    if g.layout in SPARSE and gradients == "dense":
        raise StepError(
            f"{owner} does not support sparse gradients, please consider SparseAdam instead, or "
            f"SGD or Adagrad (parameter {label})"
        )
    if g.layout != torch.sparse_coo:
        remedy = "to_sparse_coo" if g.layout in SPARSE else "to_dense"
        raise StepError(
            f"{owner}: the gradient of parameter {label} has the layout {g.layout}; convert it "
            f"with .{remedy}()"
        )
    return "slices" if steps_slices() else "filled"


def check_member(
    owner: str,
    member: Member,
    p: Tensor,
    g: Tensor | None,
    state: Mapping[str, Any],
    required: Collection[str],
    numbers: Collection[str],
) -> None:
    """Raise unless a parameter can step, with the gradient `g` and the state that it has.

    `required` are the state entries that a parameter must have once it has stepped, `numbers` those
    that are one number. Whether the others are tensors that fit is asked by `check_state`.

    Example: AdamW requires "exp_avg" and "exp_avg_sq", and "step" is a number. Parameter 3 with the
    state `{"step": 7, "exp_avg": t}` raises "AdamW: the state of parameter 3 has 'exp_avg' but no
    'exp_avg_sq'; delete the parameter's state to begin again, or load a whole one".
    """
    _check_parameter(owner, member, p)
    if g is not None:
        check_gradient(owner, member, p, g)
    fault = why_not_whole(state, required)
    if fault:
        raise StepError(
            f"{owner}: the state of parameter {member.label} {fault}; delete the parameter's state "
            "to begin again, or load a whole one"
        )
    for name, entry in state.items():
        if entry is not None and (name == "step" or name in numbers):
            _check_number(f"{owner}: state {name!r} of parameter {member.label}", entry)


def _check_parameter(owner: str, member: Member, p: Tensor) -> None:
    """Raise unless a parameter's memory can be read and written."""
    subject = f"{owner}: parameter {member.label}"
    if kernel.is_plain(p):
        if p.layout != torch.strided:
            raise StepError(f"{subject} has the layout {p.layout}; make it dense")
        if not kernel.has_storage(p):
            raise StepError(
                f"{subject} of shape {tuple(p.shape)} has no storage (it was freed, as by "
                "untyped_storage().resize_(0)); give it memory again before stepping"
            )
        if kernel.is_expanded(p):
            raise StepError(f"{subject} is expanded, so its elements share memory; clone it")
    _check_writable(subject, p)


def _check_writable(subject: str, t: Tensor) -> None:
    """Raise if autograd forbids to write a tensor here."""
    if t.is_inference() and not torch.is_inference_mode_enabled():
        raise StepError(
            f"{subject} was made in inference mode and cannot be written outside of it; clone it"
        )


def _check_number(subject: str, entry: object) -> None:
    """Raise unless an entry of the state is one number."""
    fault = why_no_number(entry)
    if fault:
        raise StepError(f"{subject} {fault}")
    if isinstance(entry, Tensor):
        _check_stored(subject, entry)


def _check_stored(subject: str, entry: Tensor) -> None:
    """Raise if the memory of a state has been freed."""
    if kernel.is_plain(entry) and not kernel.has_storage(entry):
        raise StepError(f"{subject} has lost its storage; load it again")


def check_matrix(owner: str, member: Member, p: Tensor) -> None:
    """Raise unless a parameter has rows and columns, of real numbers."""
    if p.is_complex():
        raise StepError(
            f"{owner} does not support complex parameters, and parameter {member.label} is "
            f"{p.dtype}"
        )
    if p.dim() < 2:
        raise StepError(
            f"{owner} needs matrices, and parameter {member.label} has shape {tuple(p.shape)}; "
            "give it to another optimizer"
        )


def check_gradient(owner: str, member: Member, p: Tensor, g: Tensor) -> None:
    """Raise for a gradient that no step can use.

    It must have the parameter's shape, device and kind of numbers (real or complex), and memory.
    Its format may be another one.
    """
    if g.shape != p.shape:
        raise StepError(
            f"{owner}: the gradient of parameter {member.label} has shape {tuple(g.shape)}, the "
            f"parameter has {tuple(p.shape)}; set it by p.grad = ... or run backward() again"
        )
    if g.device != p.device:
        raise StepError(
            f"{owner}: parameter {member.label} is on {p.device} and its gradient on {g.device}; "
            "move them together"
        )
    are_complex = p.is_complex() and g.is_complex()
    are_real = p.is_floating_point() and g.is_floating_point()
    if not (are_complex or are_real):
        raise StepError(
            f"{owner}: parameter {member.label} is {p.dtype} and its gradient {g.dtype}"
        )

    is_sparse = g.layout == torch.sparse_coo
    parts = (g._indices(), g._values()) if is_sparse else (g,)
    if kernel.is_plain(g) and not all(map(kernel.has_storage, parts)):
        raise StepError(
            f"{owner}: the gradient of parameter {member.label} has lost its storage; run "
            "backward() again"
        )
    if is_sparse:
        _check_sparse(f"{owner}: the sparse gradient of parameter {member.label}", g.shape, *parts)


def _check_sparse(subject: str, shape: tuple[int, ...], indices: Tensor, values: Tensor) -> None:
    """Raise unless indices and values fit together, and into a shape.

    torch does not check this. For the shape (10, 4), indices of shape (1, 3) and values of shape
    (3, 4) fit together: three slices of four numbers.
    """
    sparse_dims = len(indices)
    is_fitting = (
        indices.dtype == torch.int64
        and indices.shape[1:] == values.shape[:1]
        and values.shape[1:] == shape[sparse_dims:]
    )
    if not is_fitting:
        raise StepError(
            f"{subject} has {indices.dtype} indices of shape {tuple(indices.shape)} and values of "
            f"shape {tuple(values.shape)}, which do not fit together; run backward() again"
        )
    if not indices.numel() or indices.is_meta:
        return
    lowest, highest = torch.aminmax(indices, dim=1)
    bounds = zip(lowest.tolist(), highest.tolist(), strict=True)
    for dim, (low, high) in enumerate(bounds):
        size = shape[dim]
        if low < 0 or high >= size:
            wrong = low if low < 0 else high
            raise StepError(
                f"{subject} has the index {wrong} in dimension {dim}, where the parameter's size "
                f"is {size}; find out where it comes from"
            )


def check_state(
    owner: str, member: Member, p: Tensor, name: str, entry: object, shape: tuple[int, ...]
) -> None:
    """Raise unless an entry can be a state of its parameter, in the shape `shape`.

    Beyond what `why_no_state` asks, it must be dense, on the parameter's device, and have memory
    that can be written.
    """
    subject = f"{owner}: state {name!r} of parameter {member.label}"
    fault = why_no_state(entry, p, shape)
    if not isinstance(entry, Tensor):
        raise StepError(f"{subject} {fault}")
    if fault:
        raise StepError(
            f"{subject} {fault}; delete the parameter's state to begin again, or load one that fits"
        )
    if entry.device != p.device:
        raise StepError(
            f"{owner}: parameter {member.label} is on {p.device}, its state {name!r} on "
            f"{entry.device}; move them together"
        )
    if entry.layout != torch.strided:
        raise StepError(f"{subject} has the layout {entry.layout}; load one that is dense")
    _check_stored(subject, entry)
    _check_writable(subject, entry)
