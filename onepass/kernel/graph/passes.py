"""A program: passes over memory, and the functions of whole matrices that are called between them.

What the words mean, for a rule that divides the gradient by its norm:

    def rule(p, g, *, lr):
        return {"p": p - lr * g / norm(g)}

    pass 0   loads g      ends in a reduction, sum(g * g), to the host
    pass 1   loads p, g   takes lr / sqrt(sum) as an input, and stores p

`cut` makes passes of what a rule stores. The backends walk them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from .caches import computed
from .formats import Format
from .ir import REDUCTIONS, Node, Rank, topological

T = TypeVar("T")
# New values, by the columns or scalars that they are for.
Named = tuple[tuple[str, Node], ...]

# Bytes of a stored value.
ITEMSIZE = {"f64": 8, "f32": 4, "f16": 2, "i16": 2}


@dataclass(frozen=True)
class Column:
    """One role across all parameters, as a kernel sees it: p, g or a state."""

    name: str
    format: Format
    read: bool
    written: bool
    rank: Rank = Rank.ELEMENT


@dataclass(frozen=True)
class Temporary:
    """What one pass leaves to a later one: a column that lives for one step.

    It has one value for each row, column or matrix, or for each element, as its rank says.
    """

    name: str
    type: str
    rank: Rank


@dataclass(frozen=True)
class Reduction:
    """A reduction that ends in the temporary `into`, not on the host: along rows or down columns.

    `node` is the reduction; its argument is what is reduced.
    """

    into: str
    node: Node


@dataclass(frozen=True)
class Pass:
    """One walk over memory, over all elements or over one value for each row, column or matrix.

    `domain` says over which. `inputs` are the host values that the walk needs, `loads` the columns
    and temporaries that it reads. It ends in `reductions` to the host, in `sums` to temporaries, or
    in `stores` of columns and temporaries.
    """

    domain: Rank
    inputs: tuple[Node, ...]
    loads: tuple[Node, ...]
    reductions: tuple[Node, ...]
    sums: tuple[Reduction, ...]
    stores: Named

    @property
    def roots(self) -> list[Node]:
        """What the walk computes at each index: what is reduced to the host, summed, stored."""
        return roots_of(self.reductions, self.sums, self.stores)

    @computed
    def down(self) -> tuple[Reduction, ...]:
        """The sums down the columns: of elements, one value a column, from all lines of a matrix.

        Several chunks of one matrix each have a share in such a sum.
        """
        return tuple(sum_ for sum_ in self.sums if self._is_down(sum_))

    @computed
    def along(self) -> tuple[Reduction, ...]:
        """The sums along a line: all others, each complete when its line has been walked."""
        return tuple(sum_ for sum_ in self.sums if not self._is_down(sum_))

    def _is_down(self, sum_: Reduction) -> bool:
        """Whether a sum of this pass runs down the columns."""
        return self.domain == Rank.ELEMENT and sum_.node.rank == Rank.COLUMN


@dataclass(frozen=True)
class Call:
    """A function of whole matrices: it makes the temporary `target` of the temporary `source`.

    It is called after pass `after`, with `numbers`, which are host values of that pass.
    """

    after: int
    function: Callable[..., object]
    source: str
    target: str
    numbers: tuple[Node, ...]


@dataclass(frozen=True)
class Program:
    """A rule with its formats bound, cut into passes.

    `compute` is the type of its arithmetic, f32 or f64. `stores` and `scalars` say what it means,
    whatever the passes are: the new value of each column, and of each number of a parameter's
    state.
    """

    name: str
    compute: str
    columns: tuple[Column, ...]
    stores: Named
    scalars: Named
    passes: tuple[Pass, ...]
    temporaries: tuple[Temporary, ...]
    calls: tuple[Call, ...]

    @computed
    def hypers(self) -> tuple[str, ...]:
        """The names of the hyper-parameters that it needs, in alphabetical order."""
        return hyper_names(node for _, node in (*self.stores, *self.scalars))

    @computed
    def by_lines(self) -> bool:
        """Whether passes must walk row by row, because rows or columns have values of their own."""
        return any(_walks_lines(pass_) for pass_ in self.passes)

    @computed
    def first_to_store(self) -> int:
        """The index of the first pass that may store columns: the one after the last call.

        A function of whole matrices may fail (memory), so nothing is stored before it. It is 0
        without calls.
        """
        return max((call.after + 1 for call in self.calls), default=0)

    @property
    def bytes_per_parameter(self) -> tuple[int, int]:
        """The bytes read and written for each element in a step, all passes together.

        For SGD without momentum on float32 (p and g read, p written) this is (8, 4).
        """
        read = 0
        written = 0
        for pass_ in self.passes:
            if pass_.domain != Rank.ELEMENT:
                continue
            elements = [node for node in pass_.loads if node.rank == Rank.ELEMENT]
            read += sum(ITEMSIZE[node.type] for node in elements)
            written += sum(ITEMSIZE[node.type] for _, node in pass_.stores)
        return read, written


def _walks_lines(pass_: Pass) -> bool:
    """Whether a pass has values of rows, columns or matrices."""
    if pass_.domain != Rank.ELEMENT or pass_.sums:
        return True
    return any(node.rank != Rank.ELEMENT for node in pass_.loads)


def lines_of(domain: Rank, matrices: T, rows: T, columns: T, ones: T) -> tuple[T, T, T]:
    """Return the groups of lines, the lines of a group and the length of a line in a walk.

    `domain` is the rank of the values that the pass walks over, in a stack of matrices. The sizes
    may be numbers, arrays with a number for each tensor, or text that stands for them; `ones` is 1
    in the same kind. For a tensor of 2 matrices with 3 rows and 5 columns:

        ELEMENT   (2, 3, 5)   2 groups of 3 lines with 5 elements: the rows
        ROW       (2, 1, 3)   2 groups of 1 line with the 3 values that a matrix's rows have
        COLUMN    (2, 1, 5)   2 groups of 1 line with the 5 values that a matrix's columns have
        MATRIX    (1, 1, 2)   1 line with the 2 values that the matrices have

    The product of the three is the number of values.

    Raises `ValueError` for values on the host, which nothing walks over.
    """
    if domain == Rank.ELEMENT:
        return matrices, rows, columns
    if domain == Rank.ROW:
        return matrices, ones, rows
    if domain == Rank.COLUMN:
        return matrices, ones, columns
    if domain == Rank.MATRIX:
        return ones, ones, matrices
    raise ValueError(f"no pass walks over values of rank {domain.name}, which are on the host")


def roots_of(
    reductions: Iterable[Node],
    sums: Iterable[Reduction],
    stores: Iterable[tuple[str, Node]],
) -> list[Node]:
    """Return what a walk with these ends computes at each index, in this order."""
    reduced = [reduction.args[0] for reduction in reductions]
    summed = [sum_.node.args[0] for sum_ in sums]
    stored = [node for _, node in stores]
    return [*reduced, *summed, *stored]


def hyper_names(roots: Iterable[Node]) -> tuple[str, ...]:
    """Return the names of the hyper-parameters that reach a root, in alphabetical order."""
    hypers = [node for node in topological(roots) if node.op == "hyper"]
    return tuple(sorted(str(node.attr) for node in hypers))


def element_order(roots: Iterable[Node]) -> list[Node]:
    """Return the nodes that the roots need in a walk, arguments first, without host values."""
    order = topological(roots, inside=lambda node: not node.rank.on_host)
    return [node for node in order if not node.rank.on_host]


def host_order(inputs: Iterable[Node]) -> list[Node]:
    """Return the host nodes that a pass's inputs need, arguments first.

    Reductions are included, and what they reduce is not: that is an earlier walk's.
    """
    return topological(inputs, inside=lambda node: node.op not in REDUCTIONS)
