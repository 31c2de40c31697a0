"""How a tensor lies in memory, and what functions of whole matrices make of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from ..graph.ir import Rank, RuleError

# The classes whose memory means what it says. Any other class may keep its elements elsewhere.
PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


def is_plain(t: object) -> bool:
    """Whether this is a tensor of torch's own classes, whose memory means what it says.

    A subclass may mean something else by its memory: a `DTensor` is a shard of a whole. Such
    tensors step by torch's operations. Kernels for a class of them begin here.
    """
    return type(t) in PLAIN


def extent(t: Tensor) -> int:
    """How many bytes lie between a strided tensor's first element and the end of its last one,
    holes included."""
    if t.is_contiguous() or not t.numel():
        return t.numel() * t.itemsize
    return (
        1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    ) * t.itemsize


def has_storage(t: Tensor) -> bool:
    """Whether a strided tensor's storage holds all of its elements; false after
    `untyped_storage().resize_(0)`."""
    if t.numel() == 0 or t.device.type == "meta":
        return True
    end = t.storage_offset() * t.itemsize + extent(t)
    return t.untyped_storage().nbytes() >= end and t.data_ptr() != 0


def is_expanded(t: Tensor) -> bool:
    """Whether elements of a strided tensor share memory with one another, as after `expand`."""
    return any(stride == 0 and n > 1 for n, stride in zip(t.shape, t.stride(), strict=True))


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, each once, in any order of dimensions."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, n in sorted(
        (stride, n) for n, stride in zip(t.shape, t.stride(), strict=True) if n != 1
    ):
        if stride != expected:
            return t.numel() == 0
        expected *= n
    return True


def shape_at(rank: Rank, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a column with one value for each element, row or column of a tensor, or for the
    tensor."""
    if rank.on_host:
        return ()
    rows = (1,) if rank in (Rank.COLUMN, Rank.MATRIX) else tuple(shape[-2:-1])
    columns = (1,) if rank in (Rank.ROW, Rank.MATRIX) else tuple(shape[-1:])
    return (*shape[:-2], *rows, *columns)


def sizes(shape: Sequence[int]) -> tuple[int, int, int]:
    """A tensor as a stack of matrices: how many, their rows and their columns."""
    matrices = 1
    for n in shape[:-2]:
        matrices *= n
    return matrices, shape[-2], shape[-1]


def call_function(
    function: Callable[..., object], matrices: Tensor, *numbers: float | Tensor
) -> Tensor:
    """What a function of whole matrices returns, in full precision also under autocast.

    Raises `RuleError` where that is no tensor of the shape, type and place of `matrices`.
    """
    device = matrices.device.type
    with (
        torch.autocast(device, enabled=False)
        if torch.amp.is_autocast_available(device)
        else nullcontext()
    ):
        result = function(matrices, *numbers)
    facts = [getattr(result, name, None) for name in ("shape", "dtype", "device", "layout")]
    if facts != [matrices.shape, matrices.dtype, matrices.device, matrices.layout]:
        shown = (
            f"a tensor {tuple(result.shape)} of {result.dtype}"
            if isinstance(result, Tensor)
            else f"{result!r:.60}"
        )
        raise RuleError(
            f"{getattr(function, '__qualname__', function)} must return a strided tensor "
            f"{tuple(matrices.shape)} of {matrices.dtype} on {matrices.device}, as the matrices "
            f"that it was given, got {shown}"
        )
    return result  # type: ignore[return-value]
