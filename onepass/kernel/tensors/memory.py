"""How a tensor lies in memory, and what functions of whole matrices make of one.

For a transposed view of a (3, 4) float32 tensor, which has shape (4, 3) and strides (1, 4):

    extent        48        bytes from the first element to the end of the last
    is_dense      True      12 elements in 12 places
    is_expanded   False     no two elements in one place
    sizes         (1, 4, 3)
"""

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
    """Return the bytes from a strided tensor's first element to the end of its last one.

    Holes are included: every second element of a float32 vector of 9 has an extent of 36.
    """
    if t.is_contiguous() or not t.numel():
        return t.numel() * t.itemsize
    steps = zip(t.shape, t.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    return (last + 1) * t.itemsize


def has_storage(t: Tensor) -> bool:
    """Whether a strided tensor's storage holds all of its elements.

    False after `untyped_storage().resize_(0)`; True for tensors that need no memory.
    """
    if t.numel() == 0 or t.device.type == "meta":
        return True
    end = t.storage_offset() * t.itemsize + extent(t)
    return t.untyped_storage().nbytes() >= end and t.data_ptr() != 0


def is_expanded(t: Tensor) -> bool:
    """Whether elements of a strided tensor share memory with one another, as after `expand`."""
    steps = zip(t.shape, t.stride(), strict=True)
    return any(stride == 0 and size > 1 for size, stride in steps)


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, each once, in any order of dimensions."""
    if t.is_contiguous():
        return True
    steps = zip(t.stride(), t.shape, strict=True)
    expected = 1
    for stride, size in sorted(step for step in steps if step[1] != 1):
        if stride != expected:
            return t.numel() == 0
        expected *= size
    return True


def shape_at(rank: Rank, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of a column of this rank, beside a parameter of this shape.

    Beside (2, 3, 5): ROW (2, 3, 1), COLUMN (2, 1, 5), MATRIX (2, 1, 1), ELEMENT (2, 3, 5), and ()
    for one number.
    """
    if rank.on_host:
        return ()
    rows = shape[-2:-1]
    columns = shape[-1:]
    if rank in (Rank.COLUMN, Rank.MATRIX):
        rows = (1,)
    if rank in (Rank.ROW, Rank.MATRIX):
        columns = (1,)
    return (*shape[:-2], *rows, *columns)


def sizes(shape: Sequence[int]) -> tuple[int, int, int]:
    """Return how many matrices a tensor has, their rows and their columns.

    (2, 4, 3, 5) has 8 matrices of 3 rows and 5 columns. The shape has at least two sizes.
    """
    matrices = 1
    for size in shape[:-2]:
        matrices *= size
    return matrices, shape[-2], shape[-1]


def call_function(
    function: Callable[..., object], matrices: Tensor, *numbers: float | Tensor
) -> Tensor:
    """Return what a function of whole matrices returns, in full precision also under autocast.

    `matrices` has shape (k, rows, columns).

    Raises `RuleError` unless the result has the shape, type, device and layout of `matrices`.
    """
    device = matrices.device.type
    has_autocast = torch.amp.is_autocast_available(device)
    context = torch.autocast(device, enabled=False) if has_autocast else nullcontext()
    with context:
        result = function(matrices, *numbers)
    facts = [getattr(result, name, None) for name in ("shape", "dtype", "device", "layout")]
    if facts != [matrices.shape, matrices.dtype, matrices.device, matrices.layout]:
        shown = f"{result!r:.60}"
        if isinstance(result, Tensor):
            shown = f"a tensor {tuple(result.shape)} of {result.dtype}"
        raise RuleError(
            f"{getattr(function, '__qualname__', function)} must return a strided tensor "
            f"{tuple(matrices.shape)} of {matrices.dtype} on {matrices.device}, as the matrices "
            f"that it was given, got {shown}"
        )
    return result  # type: ignore[return-value]
