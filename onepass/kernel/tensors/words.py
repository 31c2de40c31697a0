"""Where torch keeps what a step must know of a tensor: words of memory, found by looking.

torch's C functions answer ten questions about a tensor in 50 ns (`comparison`). The words of its
TensorImpl, compared with those of a tensor that was asked before, answer all ten in 5 ns. For a
contiguous float32 tensor of shape (3, 4) in torch 2.13:

    word   0   0x7f098c824b60   same   the class of the TensorImpl
           1   0x8000...00001          how many refer to it
           2   0x561e037152c0          its StorageImpl
           3   0x0                     what autograd knows of it, as its gradient
           4   0x0              same   what only rare tensors have: names, symbolic sizes
           5   0x561e036c4da0          its version counter
           6   0x7f098d017930          its Python object, if it has one
           7   2                same   how many dimensions it has
           8   3 4 . . .        same   their sizes; there is room for 5
          13   4 1 . . .        same   their strides
          18   0                       where it begins in its storage, in elements
          19   12               same   how many elements it has
          20   0x14101ff000006  same   dtype, device, flags
          21   0x9400010001     same   dispatch keys

torch promises none of this. So the places are found by comparing words with what Python says of
the same tensors. Then samples must prove that tensors of one kind have the same words, and those of
another kind others. Where a place is missing or a proof fails, torch is asked instead.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# How much is looked at: a version counter is as large, all others are larger on all platforms of 64
# bits.
WORDS = 22
STORAGE_WORDS = 8
META_WORDS = 8
COUNTER_WORDS = 3
ALL_BITS = (1 << 64) - 1
# The last bit of the flags is none of them: it is what the memory held before.
FLAG_BITS = ALL_BITS >> 1


# Whatever the user's default is.
_zeros = partial(torch.zeros, dtype=torch.float32)


class Words(NamedTuple):
    """The places of words, counted from the beginning of each object."""

    # In a TensorImpl. Those that are the same for all tensors of a kind, and then single ones.
    same: tuple[int, ...]
    flags: int
    sizes: int
    strides: int
    offset: int
    python_object: int
    storage: int
    version: int
    meta: int
    # In what autograd knows: the gradient's TensorImpl, and its address if there is no gradient.
    gradient: int
    no_gradient: int
    # The first word of plain StorageImpls: their class. And in one: its address, its bytes, and the
    # byte (not the word) that is 1 if torch must be asked before anything is written, because it
    # may have to copy the memory first.
    storage_class: int
    data: int
    bytes: int
    guard: int
    # In a version counter: the 32 bits (not the word) that count.
    counting: int


@cache
def find_words() -> Words | None:
    """Return the places, or None if one of them is not found or does not prove right."""
    # A new thread is in none of torch's modes, which make tensors of other kinds.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_find_and_prove).result()


def _find_and_prove() -> Words | None:
    try:
        words = _find()
        return words if _is_proved(words) else None
    except (LookupError, AttributeError):
        return None


def template(t: Tensor, words: Words) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the words that all tensors of this kind have, and which of their bits matter.

    Both are (WORDS,), uint64. None stands for a tensor of more dimensions than there is room for.
    """
    room = words.strides - words.sizes
    if t.dim() > room:
        return None
    matter = np.zeros(WORDS, np.uint64)
    matter[list(words.same)] = ALL_BITS
    matter[words.flags] = FLAG_BITS
    for begin in (words.sizes, words.strides):
        # What lies behind the last dimension is what the memory held before.
        matter[begin + t.dim() : begin + room] = 0
    return np.array(_read(t._cdata, WORDS), np.uint64) & matter, matter


def _read(address: int, count: int) -> list[int]:
    return list((ctypes.c_uint64 * count).from_address(address))


def _find() -> Words:
    """Find each place.

    Raises LookupError for a place that is not found, or found twice.
    """
    memory = _zeros(60)
    t, view = memory[5:29].view(2, 3, 4), memory[11:35].view(2, 3, 4)
    other = torch.nn.Parameter(_zeros(2, 3, 4))
    integers = torch.zeros(2, 3, 4, dtype=torch.int32)
    tensors = (t, view, other, integers)
    contents = [_read(sample._cdata, WORDS) for sample in tensors]
    of_t, of_view, of_other, of_integers = contents
    # Some versions of torch mark in the lowest bit to whom the object belongs.
    unmarked = [[word & ~1 for word in content] for content in contents]
    storage = _place(contents, [sample.untyped_storage()._cdata for sample in tensors])
    # A view has the version counter of its base.
    of_base = _places(lambda i: of_t[i] == of_view[i] != of_other[i])
    version = _only([i for i in of_base if i != storage])
    same = _places_of_one_kind()
    flags = _only([i for i in same if (of_integers[i] ^ of_other[i]) & FLAG_BITS])
    sizes = _only(_places(lambda i: of_t[i : i + 3] == [2, 3, 4]))
    strides = _only(_places(lambda i: of_t[i : i + 3] == [12, 4, 1]))
    return Words(
        same,
        flags,
        sizes,
        strides,
        _place(contents, [int(sample.storage_offset()) for sample in tensors]),
        _place(unmarked, [id(sample) for sample in tensors]),
        storage,
        version,
        *_find_gradient(of_other),
        *_find_in_storage(),
        _find_count(of_t[version], t),
    )


def _places_of_one_kind() -> tuple[int, ...]:
    """Return the words that are the same in tensors of one kind, whatever else differs."""
    leaf = _zeros(3, 4, requires_grad=True)
    # A view refers to its base, and so does the name of the base.
    base = _zeros(3, 4)
    view = base.view(3, 4)
    base.add_(1)
    samples = [
        leaf,
        torch.nn.Parameter(_zeros(3, 4)),
        leaf * 2,
        leaf.detach(),
        _zeros(20)[3:15].view(3, 4),
        base,
        view,
    ]
    contents = [_read(t._cdata, WORDS) for t in samples]
    # What the samples refer to is at different addresses, and so are these.
    return tuple(_places(lambda i: len({content[i] & FLAG_BITS for content in contents}) == 1))


def _find_gradient(of_parameter: Sequence[int]) -> tuple[int, int, int]:
    """Return where autograd's knowledge is, where a gradient is in it, and what stands for none.

    The words are those of a parameter without a gradient.
    """
    parameters = [torch.nn.Parameter(_zeros(2)) for _ in range(3)]
    for p in parameters[:2]:
        p.grad = _zeros(2)
    sample = _zeros(2)
    plain = _read(sample._cdata, WORDS)
    with_gradients = [_read(p._cdata, WORDS) for p in parameters]
    # Only a tensor that autograd knows has a word there, and each has its own.
    found = _places(
        lambda i: plain[i] == 0 and len({0, of_parameter[i], *(w[i] for w in with_gradients)}) == 5
    )
    meta = _only(found)
    contents = [_read(words[meta], META_WORDS) for words in with_gradients]
    gradients = [p.grad._cdata for p in parameters[:2] if p.grad is not None]
    gradient = _place(contents[:2], gradients)
    without = {contents[2][gradient], _read(of_parameter[meta], META_WORDS)[gradient]}
    return meta, gradient, _only(list(without))


def _find_in_storage() -> tuple[int, int, int, int]:
    """Return the class, and the places of the address and of the bytes, as words, and of the guard,
    as a byte."""
    array = np.zeros(7, np.float32)
    # What owns a tensor's memory has another address only if torch has not allocated it.
    tensors = [_zeros(5), _zeros(300), torch.from_numpy(array)]
    storages = [t.untyped_storage() for t in tensors]
    contents = [_read(s._cdata, STORAGE_WORDS) for s in storages]
    data = _place(contents, [s.data_ptr() for s in storages])
    size = _place(contents, [s.nbytes() for s in storages])
    lazy = torch._lazy_clone(tensors[0])
    guarded = [_read(t.untyped_storage()._cdata, STORAGE_WORDS) for t in (tensors[0], lazy)]
    free = [np.array(content, np.uint64).view(np.uint8) for content in contents]
    bound = [np.array(content, np.uint64).view(np.uint8) for content in guarded]
    found = [
        byte
        for byte in range(8 * size, 8 * STORAGE_WORDS)
        if {int(b[byte]) for b in free} == {0} and {int(b[byte]) for b in bound} == {1}
    ]
    return _only(list({content[0] for content in contents})), data, size, _only(found)


def _find_count(counter: int, t: Tensor) -> int:
    """Return which 32 bits of a tensor's version counter count its changes."""
    seen = []
    for _ in range(3):
        t.add_(1)
        seen.append(np.array(_read(counter, COUNTER_WORDS), np.uint64).view(np.uint32).tolist())
    before, between, after = seen
    counts = range(len(before))
    found = [i for i in counts if (before[i], between[i], after[i]) == _three_up_to(t._version)]
    return _only(found)


def _three_up_to(last: int) -> tuple[int, int, int]:
    return last - 2, last - 1, last


def _place(contents: Sequence[Sequence[int]], expected: Sequence[int]) -> int:
    """Return the only place at which each content has what is expected of it."""
    return _only(
        [i for i, words in enumerate(zip(*contents, strict=True)) if list(words) == list(expected)]
    )


def _places(condition: Callable[[int], bool]) -> list[int]:
    return [i for i in range(WORDS) if condition(i)]


def _only(found: Sequence[int]) -> int:
    if len(found) != 1:
        raise LookupError
    return found[0]


def _is_proved(words: Words) -> bool:
    """Whether tensors of one kind, and only these, have the words of a template."""
    base = _zeros(3, 4)
    kind = template(_zeros(3, 4), words)
    if kind is None:
        return False
    view = base.view(3, 4)
    same = [base, view, _zeros(2, 3, 4)[1], torch.nn.Parameter(base), base.detach().exp()]
    return all(_is_of(t, kind) for t in same) and not any(_is_of(t, kind) for t in _others())


def _others() -> list[Tensor]:
    """Return tensors that differ from `_zeros(3, 4)`, each in one thing."""
    with torch.inference_mode():
        inference = _zeros(3, 4)
    return [
        torch.zeros(3, 4, dtype=torch.int32),
        torch.zeros(3, 4, dtype=torch.float64),
        torch.zeros(3, 4, dtype=torch.complex64),
        _zeros(3, 4, device="meta"),
        _zeros(3, 5),
        _zeros(4, 4),
        _zeros(3, 4, 1),
        _zeros(12),
        _zeros(4, 3).t(),
        _zeros(1, 4).expand(3, 4),
        _zeros(3, 4).to_sparse(),
        torch._neg_view(_zeros(3, 4)),
        inference,
    ]


def _is_of(t: Tensor, kind: tuple[np.ndarray, np.ndarray]) -> bool:
    """Whether a tensor has the words of a template."""
    expected, matter = kind
    # A sparse tensor is larger, not smaller.
    return bool((np.array(_read(t._cdata, WORDS), np.uint64) & matter == expected).all())
