"""What must hold before a parameter steps. Each failure is one sentence, raised before anything has
changed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import kernel
from ..contract.values import StepError, brief

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
    """What becomes of a parameter's sparse gradients, see `Member`; raises where a class refuses
    the layout of `g`.

    `gradients` and `steps_slices` are `gradients` and `steps_rows` of `Optimizer`.
    """
    if g is None or g.layout == torch.strided:
        if g is not None and gradients == "sparse":
            raise StepError(
                f"{owner} does not support dense gradients, please consider Adam instead, or make "
                f"the embedding with sparse=True (parameter {label})"
            )
        return "slices" if gradients == "sparse" else ""
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
    """Whether a parameter can step, with the gradient `g` and the state that it has.

    `required` are the state entries that a parameter which has stepped before must have, `numbers`
    those that are one number.
    """
    _check_parameter(owner, member, p)
    if g is not None:
        check_gradient(owner, member, p, g)
    present = [name for name in required if state.get(name) is not None]
    lost = [name for name in required if name not in present]
    if present and lost:
        raise StepError(
            f"{owner}: the state of parameter {member.label} has {present[0]!r} but no "
            f"{lost[0]!r}; delete the parameter's state to begin anew, or load a whole one"
        )
    for name, s in state.items():
        if name in (*numbers, "step") and s is not None:
            _check_number(owner, member, name, s)


def _check_parameter(owner: str, member: Member, p: Tensor) -> None:
    if kernel.is_plain(p):
        if p.layout != torch.strided:
            raise StepError(
                f"{owner}: parameter {member.label} has the layout {p.layout}; make it dense"
            )
        if not kernel.has_storage(p):
            raise StepError(
                f"{owner}: parameter {member.label} of shape {tuple(p.shape)} has no storage (it "
                "was freed, as by untyped_storage().resize_(0)); give it memory again before "
                "stepping"
            )
        if kernel.is_expanded(p):
            raise StepError(
                f"{owner}: parameter {member.label} is expanded, its elements share memory; clone "
                "it"
            )
    _check_writable(owner, f"parameter {member.label}", p)


def _check_writable(owner: str, what: str, t: Tensor) -> None:
    if t.is_inference() and not torch.is_inference_mode_enabled():
        raise StepError(
            f"{owner}: {what} was made in inference mode and cannot be written outside of it; "
            "clone it"
        )


def _check_number(owner: str, member: Member, name: str, value: object) -> None:
    if not isinstance(value, (int, float)) and not (
        isinstance(value, Tensor) and value.numel() == 1
    ):
        raise StepError(
            f"{owner}: state {name!r} of parameter {member.label} must be one number, got "
            f"{brief(value)}"
        )
    if isinstance(value, Tensor) and kernel.is_plain(value) and not kernel.has_storage(value):
        raise StepError(
            f"{owner}: state {name!r} of parameter {member.label} has lost its storage; load it "
            "again"
        )


def check_matrix(owner: str, member: Member, p: Tensor) -> None:
    """A parameter whose rows and columns matter."""
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
    """A gradient that no step can use."""
    if g.shape != p.shape:
        raise StepError(
            f"{owner}: the gradient of parameter {member.label} has shape {tuple(g.shape)}, "
            f"the parameter has {tuple(p.shape)}; set it by p.grad = ... or run backward() again"
        )
    if g.device != p.device:
        raise StepError(
            f"{owner}: parameter {member.label} is on {p.device} and its gradient on {g.device}; "
            "move them together"
        )
    if g.is_complex() != p.is_complex() or not all(
        t.is_floating_point() or t.is_complex() for t in (p, g)
    ):
        raise StepError(
            f"{owner}: parameter {member.label} is {p.dtype} and its gradient {g.dtype}"
        )
    sparse = g.layout == torch.sparse_coo
    parts = (g._indices(), g._values()) if sparse else (g,)
    if kernel.is_plain(g) and not all(map(kernel.has_storage, parts)):
        raise StepError(
            f"{owner}: the gradient of parameter {member.label} has lost its storage; run "
            "backward() again"
        )
    if sparse:
        _check_sparse(f"{owner}: the sparse gradient of parameter {member.label}", g.shape, *parts)


def _check_sparse(what: str, shape: tuple[int, ...], indices: Tensor, values: Tensor) -> None:
    """Indices and values as they should be, within a shape: torch takes them as they come."""
    k = len(indices)
    if (
        indices.dtype != torch.int64
        or indices.shape[1:] != values.shape[:1]
        or values.shape[1:] != shape[k:]
    ):
        raise StepError(
            f"{what} has {indices.dtype} indices of shape {tuple(indices.shape)} and values of "
            f"shape {tuple(values.shape)}, which do not fit together; run backward() again"
        )
    if not indices.numel() or indices.is_meta:
        return
    low, high = (bound.tolist() for bound in torch.aminmax(indices, dim=1))
    for d in range(k):
        if low[d] < 0 or high[d] >= shape[d]:
            raise StepError(
                f"{what} has the index {low[d] if low[d] < 0 else high[d]} in dimension {d}, "
                f"where the parameter's size is {shape[d]}; look where it comes from"
            )


def check_state(
    owner: str, member: Member, p: Tensor, name: str, s: object, shape: tuple[int, ...]
) -> None:
    """A state column that does not belong to its parameter."""
    what = f"state {name!r} of parameter {member.label}"
    if not isinstance(s, Tensor):
        raise StepError(f"{owner}: {what} must be a tensor, got {brief(s)}")
    if s.shape != shape:
        belongs = (
            "the parameter has"
            if shape == p.shape
            else f"for a parameter of {tuple(p.shape)} it must have"
        )
        raise StepError(
            f"{owner}: {what} has shape {tuple(s.shape)}, {belongs} {shape}; delete the "
            "parameter's state to begin anew, or load one that fits"
        )
    if s.device != p.device:
        raise StepError(
            f"{owner}: parameter {member.label} is on {p.device}, its state {name!r} on "
            f"{s.device}; move them together"
        )
    if (
        s.layout != torch.strided
        or s.is_complex() != p.is_complex()
        or not (s.is_floating_point() or s.is_complex())
    ):
        raise StepError(
            f"{owner}: {what} is {s.dtype} ({s.layout}), the parameter {p.dtype}; load one that "
            "fits"
        )
    if kernel.is_plain(s) and not kernel.has_storage(s):
        raise StepError(f"{owner}: {what} has lost its storage; load it again")
    _check_writable(owner, what, s)
