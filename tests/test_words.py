"""Where torch keeps what a step must know of a tensor: found by looking, and proved."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from onepass import kernel
from onepass.kernel.llvm.native import Library
from onepass.kernel.llvm.routine import Routine
from onepass.kernel.tensors import words
from onepass.kernel.tensors.same_words import make_row

SAME: dict[str, Any] = {
    "another": lambda: torch.ones(3, 4),
    "view": lambda: torch.ones(5, 4)[1:4],
    "parameter": lambda: nn.Parameter(torch.ones(3, 4)),
    "result": lambda: nn.Parameter(torch.ones(3, 4)) * 2,
    "part of a vector": lambda: torch.ones(40)[7:19].view(3, 4),
    "shared": lambda: torch.ones(3, 4).share_memory_(),
}


def test_places_are_found() -> None:
    found = words.find_words()
    assert found is not None
    assert words._is_proved(found)


def test_places_do_not_depend_on_modes() -> None:
    """Samples are made in a thread of their own."""
    known = words.find_words()
    words.find_words.cache_clear()
    with torch.inference_mode(), torch.device("meta"):
        assert words.find_words() == known


@pytest.mark.parametrize("missing", ["_lazy_clone", "_neg_view"])
def test_without_a_proof_there_are_none(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, missing)
    assert words._find_and_prove() is None


@pytest.mark.parametrize("place", ["storage", "python_object"])
def test_a_template_that_compares_too_much_is_not_proved(place: str) -> None:
    right = words.find_words()
    assert right is not None
    assert not words._is_proved(right._replace(same=(*right.same, getattr(right, place))))


def test_a_template_without_the_dtype_is_not_proved() -> None:
    right = words.find_words()
    assert right is not None
    fewer = tuple(word for word in right.same if word != right.flags)
    assert not words._is_proved(right._replace(same=fewer, flags=right.same[0]))


@pytest.mark.parametrize("name", SAME)
def test_tensors_of_one_kind_are_as_expected(name: str) -> None:
    expected = kernel.expect([torch.zeros(3, 4)])
    assert expected.rows is not None
    t = SAME[name]()
    assert expected.compare([t]) == 0
    assert expected.pointers[0] == t.data_ptr()


def test_no_template_for_many_dimensions() -> None:
    found = words.find_words()
    assert found is not None
    assert make_row(torch.zeros(1, 1, 1, 1, 1), found) is not None
    assert make_row(torch.zeros(1, 1, 1, 1, 1, 1), found) is None
    assert kernel.expect([torch.zeros(1, 1, 1, 1, 1, 1)]).rows is None


def test_changes_are_counted() -> None:
    tensors: list[Tensor] = [torch.zeros(2), nn.Parameter(torch.zeros(3)), torch.zeros(4)[1:]]
    before = [t._version for t in tensors]
    kernel.count_as_changed(tensors)
    assert [t._version for t in tensors] == [version + 1 for version in before]
    with torch.inference_mode():
        uncounted = torch.zeros(2)
    kernel.count_as_changed([uncounted])


def test_a_routine() -> None:
    """The example of its docstring: how many of some numbers are zero."""
    count = Routine("count_zeros", "i64", "ptr values", "i64 length")
    found = count.variable("i64", 0)
    with count.each("%length") as i:
        value = count.load("i64", "%values", i)
        with count.when(count.is_equal(value, 0)):
            count.set(found, count.add(count.get(found), 1))
    count.leave(count.get(found))
    library = Library(count.text())
    signature = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)
    function = signature(library.address("count_zeros"))
    values = np.array([3, 0, 5, 0, 0], np.int64)
    assert function(values.ctypes.data, 5) == 3
    assert function(values.ctypes.data, 0) == 0
