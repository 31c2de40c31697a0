"""How launches on a GPU are cut: every element is in one program, and every share of a sum has a
place of its own."""

from __future__ import annotations

import numpy as np
import pytest
from support.extra_rules import MATRIX_RULES, RULES, Rule, program

from onepass.kernel.gpu.tiles import BAND, BLOCK, SPAN, TILES, WIDTHS
from onepass.kernel.gpu.units import Blocks, Tiles, Work
from onepass.kernel.graph.ir import Rank
from onepass.kernel.graph.passes import Pass, Program

EDGES = [
    1,
    2,
    WIDTHS[0] - 1,
    WIDTHS[0],
    WIDTHS[0] + 1,
    WIDTHS[-1],
    WIDTHS[-1] + 1,
    BAND,
    BAND + 1,
    3 * BAND,
    700,
]


def shapes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Stacks of matrices of all sizes, some of which have no elements."""
    matrices = rng.choice([1, 1, 2, 3, 40], count)
    rows, columns = rng.choice(EDGES, count), rng.choice(EDGES, count)
    sizes = np.stack([matrices, rows, columns], axis=1)
    sizes[rng.random(count) < 0.1, rng.integers(0, 3)] = 0
    return sizes


def lines_of(one: Pass, size: np.ndarray) -> tuple[int, int, int]:
    """Groups of lines, lines of a group, and how long a line is, in the pass's own domain."""
    matrices, rows, columns = (int(n) for n in size)
    return {
        Rank.ELEMENT: (matrices, rows, columns),
        Rank.ROW: (matrices, 1, rows),
        Rank.COLUMN: (matrices, 1, columns),
        Rank.MATRIX: (1, 1, matrices),
    }[one.domain]


def check_tiles(one: Pass, size: np.ndarray, units: Tiles, t: int) -> None:
    """One tensor's programs, as the kernel walks them."""
    groups, per, length = lines_of(one, size)
    seen = np.zeros((groups * per, length), np.int64)
    shares: set[tuple[int, int, int]] = set()
    sums_down = one.domain == Rank.ELEMENT and any(s.node.rank == Rank.COLUMN for s in one.sums)
    rows = units.table[units.first[t] : units.first[t] + units.count[t]]
    width = next(s["COLUMNS"] for a, b, s in units.launches if a <= units.first[t] < b)
    for tensor, begin, end, column, part in rows.tolist():
        assert tensor == t
        assert 0 <= begin < end <= groups * per
        assert 0 <= column < units.along[t]
        seen[begin:end, column * width : (column + 1) * width] += 1
        if sums_down:
            assert begin // per == (end - 1) // per, "sums down the columns of two matrices at once"
            assert 0 <= part < units.down[t]
            shares.add((begin // per, part, column))
        if one.sums or one.reductions:
            assert end - begin <= BAND
        else:
            assert end - begin <= TILES * (BLOCK // width)
    assert (seen == 1).all()
    if sums_down:
        assert len(shares) == len(rows) == groups * units.down[t] * units.along[t]


def work_of(one: Program, sizes: np.ndarray) -> Work:
    return Work(sizes, one)


@pytest.mark.parametrize("rule", MATRIX_RULES[:5], ids=lambda rule: rule.__name__)
def test_every_element_of_a_matrix_is_in_one_program(rule: Rule, rng: np.random.Generator) -> None:
    one = program(rule)
    sizes = shapes(rng, 25)
    work = work_of(one, sizes)
    for each, units in zip(one.passes, work.units, strict=True):
        assert isinstance(units, Tiles)
        assert units.count.sum() == len(units.table)
        for t, size in enumerate(sizes):
            assert (units.count[t] == 0) == (size.prod() == 0)
            if units.count[t]:
                check_tiles(each, size, units, t)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_element_is_in_one_program(rule: Rule, rng: np.random.Generator) -> None:
    one = program(rule)
    numel = np.concatenate(
        [
            [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, BLOCK * SPAN, BLOCK * SPAN + 1],
            rng.integers(0, 99999, 9),
        ]
    )
    for each, units in zip(one.passes, work_of(one, numel).units, strict=True):
        assert isinstance(units, Blocks)
        size = BLOCK * SPAN if each.reductions else BLOCK
        for t, n in enumerate(numel.tolist()):
            own = units.table[units.first[t] : units.first[t] + units.count[t]]
            assert (own[:, 0] == t).all()
            assert own[:, 1].tolist() == list(range(-(-n // size)))


@pytest.mark.parametrize("rule", [*RULES[3:5], *MATRIX_RULES[:5]], ids=lambda rule: rule.__name__)
def test_launches_hold_each_program_once(rule: Rule, rng: np.random.Generator) -> None:
    """All at once, or tensor after tensor; a kernel's constants hold for the whole of a launch."""
    sizes = shapes(rng, 30)
    for units in work_of(program(rule), sizes).units:
        spans = sorted((a, b) for a, b, _ in units.launches)
        assert [i for a, b in spans for i in range(a, b)] == list(range(len(units.table)))
        for t in range(len(sizes)):
            own = [i for a, b, _ in units.of_tensor(t) if units.count[t] for i in range(a, b)]
            assert own == list(range(units.first[t], units.first[t] + units.count[t]))
            shapes_of = [shape for a, b, shape in units.of_tensor(t) if units.count[t]]
            assert len(shapes_of) <= 1


@pytest.mark.parametrize("rule", [*RULES[3:5], *MATRIX_RULES[:5]], ids=lambda rule: rule.__name__)
def test_how_a_tensor_is_cut_is_its_own_affair(rule: Rule, rng: np.random.Generator) -> None:
    """The same programs alone, together, and in another order."""
    one, sizes = program(rule), shapes(rng, 12)
    together, turned = work_of(one, sizes), work_of(one, sizes[::-1])
    for t, size in enumerate(sizes):
        alone = work_of(one, size[None])
        for k, units in enumerate(alone.units):
            for work, place in ((together, t), (turned, len(sizes) - 1 - t)):
                other = work.units[k]
                begin = other.first[place]
                assert (
                    other.table[begin : begin + other.count[place], 1:] == units.table[:, 1:]
                ).all()
        for name, parts in alone.parts.items():
            assert together.parts[name][t] == parts[0]


def test_blocks_of_large_tensors_are_counted_in_32_bits_and_placed_in_64() -> None:
    """2^31 elements and more: their number of blocks is far below what an int32 holds."""
    units = work_of(program(RULES[2]), np.array([2**31 + 5])).units[0]
    assert units.table.dtype == np.int32
    assert units.table[-1].tolist() == [0, (2**31 + 4) // BLOCK]
    tiles = work_of(program(MATRIX_RULES[0]), np.array([(1, 2**20, 2**11 + 1)])).units[0]
    assert tiles.table.dtype == np.int64
    assert tiles.table[:, 2].max() == 2**20
