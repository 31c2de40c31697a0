"""Rows that are sent for several steps at once: a step uses its own, bit for bit, whatever was
foretold."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.interpreted_gpu import Interpreter
from torch import Tensor

from onepass.kernel.gpu.foretold import ALIGNMENT, MOST, Rows

DECAY, STEP = 0, 1


def corrections(leaves: np.ndarray) -> np.ndarray:
    """Three uniform values a setting, in float32, as a kernel's."""
    decay, step = leaves
    return np.stack([1 - decay**step, np.sqrt(1 - decay**step), decay], axis=1).astype(np.float32)


def make(step: int | None = STEP) -> Rows:
    return Rows(Interpreter(torch.device("cpu")), [], corrections, step)


def of(rows: Tensor, leaves: np.ndarray) -> np.ndarray:
    """What a kernel reads."""
    count = 3 * leaves.shape[1]
    return rows[:count].numpy().reshape(-1, 3)


def leaves_at(step: int, settings: int = 2) -> np.ndarray:
    return np.stack([np.linspace(0.9, 0.999, settings), np.full(settings, float(step))])


def steps(rows: Rows, count: int, first: int = 1) -> Iterator[int]:
    """Take steps, checking each; yields how often something was sent in it."""
    for step in range(first, first + count):
        before = rows.table.uploads
        leaves = leaves_at(step)
        assert of(rows.on_device(leaves), leaves).tobytes() == corrections(leaves).tobytes()
        yield rows.table.uploads - before


def test_while_options_stay_few_steps_send_anything() -> None:
    sent = list(steps(make(), 1000))
    assert sent[:16] == [1, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1]
    assert sum(sent[500:]) <= 500 // MOST + 1


def test_the_same_step_again_sends_nothing() -> None:
    rows = make()
    for _ in range(5):
        rows.on_device(leaves_at(7))
    assert rows.table.uploads == 1


def test_what_does_not_count_steps_is_sent_alone() -> None:
    rows = make(step=None)
    assert list(steps(rows, 10)) == [1] * 10


def test_a_change_sends_one_row_at_first() -> None:
    """A schedule changes an option at every step: then hardly anything is foretold in vain."""
    rows = make()
    list(steps(rows, 100))
    computed = 0

    def counted(leaves: np.ndarray) -> np.ndarray:
        nonlocal computed
        computed += leaves.shape[1] // 2
        return corrections(leaves)

    rows.compute = counted
    for step in range(101, 201):
        leaves = leaves_at(step) * np.array([[1 - step * 1e-4], [1.0]])
        assert of(rows.on_device(leaves), leaves).tobytes() == corrections(leaves).tobytes()
    assert computed <= 300


@given(
    st.lists(st.tuples(st.sampled_from([0, 1, 1, 1, 5]), st.booleans()), max_size=60),
    st.integers(1, 5),
)
def test_every_step_reads_its_own_rows(moves: list[tuple[int, bool]], settings: int) -> None:
    rows = make()
    step, scale = 1, 1.0
    for forward, changes in moves:
        step += forward
        scale *= 0.99 if changes else 1.0
        leaves = leaves_at(step, settings) * np.array([[scale], [1.0]])
        told = rows.on_device(leaves)
        assert of(told, leaves).tobytes() == corrections(leaves).tobytes()
        assert told.storage_offset() * told.itemsize % ALIGNMENT == 0


def test_a_row_that_was_foretold_wrongly_is_not_used() -> None:
    """A step that is not one more than the last, and one whose number is the same with another
    decay."""
    rows = make()
    list(steps(rows, 8))
    for leaves in (leaves_at(10), leaves_at(10) * 0.5, leaves_at(11)):
        assert of(rows.on_device(leaves), leaves).tobytes() == corrections(leaves).tobytes()


@pytest.mark.parametrize("settings", [1, 3, 400])
def test_any_number_of_settings(settings: int) -> None:
    rows = make()
    for step in range(1, 10):
        leaves = leaves_at(step, settings)
        assert of(rows.on_device(leaves), leaves).tobytes() == corrections(leaves).tobytes()
