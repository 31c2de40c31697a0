"""From what a rule stores to a program: a list of passes, each one walk over memory.

A pass ends where a value must be complete before another can begin: at a reduction, at a function
of whole matrices, and where a value that exists once a row or a column of a matrix meets the
matrix's elements. Such values are kept in temporaries, one value a row, a column or a matrix; only
a function of whole matrices needs a temporary of elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from .caches import computed
from .formats import Format
from .ir import LOADS, REDUCTIONS, Node, Rank, const, load, make, topological

T = TypeVar("T")

ITEMSIZE = {"f64": 8, "f32": 4, "f16": 2, "i16": 2}


@dataclass(frozen=True)
class Column:
    """One role across all parameters, as a kernel sees it."""

    name: str
    format: Format
    read: bool
    written: bool
    rank: Rank = Rank.ELEMENT


@dataclass(frozen=True)
class Temporary:
    """What one pass leaves to a later one: a column that lives for one step, one value for each of
    its rank."""

    name: str
    type: str
    rank: Rank


@dataclass(frozen=True)
class Reduction:
    """A reduction that ends in a temporary, not on the host: `value` summed up along the rows or
    columns."""

    into: str
    node: Node


@dataclass(frozen=True)
class Pass:
    """One walk over memory, over all elements or over one value for each row, column or matrix
    (`domain`).

    `inputs` are the host values that it needs; it ends in reductions to the host, in reductions to
    temporaries, or in stores, of columns and temporaries.
    """

    domain: Rank
    inputs: tuple[Node, ...]
    loads: tuple[Node, ...]
    reductions: tuple[Node, ...]
    sums: tuple[Reduction, ...]
    stores: tuple[tuple[str, Node], ...]

    @property
    def roots(self) -> list[Node]:
        return (
            [r.args[0] for r in self.reductions]
            + [s.node.args[0] for s in self.sums]
            + [n for _, n in self.stores]
        )

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
        return self.domain == Rank.ELEMENT and sum_.node.rank == Rank.COLUMN


@dataclass(frozen=True)
class Call:
    """A function of whole matrices, called after pass `after`: it makes temporary `target` of
    temporary `source`."""

    after: int
    function: Callable[..., object]
    source: str
    target: str
    numbers: tuple[Node, ...]


@dataclass(frozen=True)
class Program:
    """A rule with its formats bound, in passes. `compute` is the type of its arithmetic, f32 or
    f64.

    `stores` and `scalars` say what it means, whatever the passes: what each column, and each number
    of a parameter's state, becomes.
    """

    name: str
    compute: str
    columns: tuple[Column, ...]
    stores: tuple[tuple[str, Node], ...]
    scalars: tuple[tuple[str, Node], ...]
    passes: tuple[Pass, ...]
    temporaries: tuple[Temporary, ...]
    calls: tuple[Call, ...]

    @computed
    def hypers(self) -> tuple[str, ...]:
        """The hyper-parameters that it needs, in a fixed order."""
        return hyper_names(node for _, node in (*self.stores, *self.scalars))

    @computed
    def by_lines(self) -> bool:
        """Whether passes must walk row by row, because rows or columns have values of their own."""
        return any(one.domain != Rank.ELEMENT or one.sums for one in self.passes) or any(
            node.rank != Rank.ELEMENT for one in self.passes for node in one.loads
        )

    @computed
    def first_to_store(self) -> int:
        """The index of the first pass that may store columns: the one after the last call.

        A function of whole matrices may fail (memory), so nothing is stored before it. 0 if there
        are no calls.
        """
        return max((call.after + 1 for call in self.calls), default=0)

    @property
    def bytes_per_parameter(self) -> tuple[int, int]:
        """Bytes read and written for each element in a step, all passes together."""
        passes = [one for one in self.passes if one.domain == Rank.ELEMENT]
        read = sum(ITEMSIZE[n.type] for one in passes for n in one.loads if n.rank == Rank.ELEMENT)
        return read, sum(ITEMSIZE[node.type] for one in passes for _, node in one.stores)


def split(
    name: str,
    compute: str,
    stored: Mapping[str, Format],
    ranks: Mapping[str, Rank],
    stores: tuple[tuple[str, Node], ...],
    scalars: tuple[tuple[str, Node], ...],
) -> Program:
    """Cut into passes.

    A value's level is the number of cuts on its longest way from the columns: level k is computed
    in the passes of level k. What an earlier pass computed and a later one of the same domain needs
    is computed again from the columns, which nothing has overwritten yet.
    """
    cut = _Cut()
    for node in topological(node for _, node in (*stores, *scalars)):
        cut.add(node)
    last: dict[Rank, int] = dict(cut.last)
    for column, root in stores:
        rank = ranks.get(column, Rank.ELEMENT)
        last[rank] = max(last.get(rank, 0), cut.level[root])
    # A function of matrices may fail (memory): nothing is stored before the last one has returned.
    least = max((level + 1 for _, level, _ in cut.calls), default=0)
    # Scalars are read off the last pass's rows.
    last[Rank.ELEMENT] = max([last.get(Rank.ELEMENT, 0), *(cut.level[node] for _, node in scalars)])
    for column, root in stores:
        rank = ranks.get(column, Rank.ELEMENT)
        cut.job(max(last[rank], least), rank).stores.append((column, cut.new[root]))
    passes, calls = cut.finish([cut.new[node] for _, node in scalars])
    loaded = {str(n.attr) for one in passes for n in one.loads}
    written = {c for c, _ in stores}
    columns = tuple(
        Column(c, format, c in loaded, c in written, ranks.get(c, Rank.ELEMENT))
        for c, format in stored.items()
    )
    new_scalars = tuple((n, cut.new[node]) for n, node in scalars)
    return Program(
        name, compute, columns, stores, new_scalars, passes, tuple(cut.temporaries), calls
    )


@dataclass
class _Job:
    """A pass in the making."""

    reductions: list[Node] = field(default_factory=list)
    sums: list[Reduction] = field(default_factory=list)
    stores: list[tuple[str, Node]] = field(default_factory=list)


class _Cut:
    """Every value's level, its form in which other passes' values are loads of temporaries, and the
    passes so far."""

    def __init__(self) -> None:
        self.level: dict[Node, int] = {}
        self.new: dict[Node, Node] = {}
        self.temporaries: list[Temporary] = []
        self.last: dict[Rank, int] = {}
        # With the levels of their numbers, and of all that they take.
        self.calls: list[tuple[int, int, Call]] = []
        self._jobs: dict[tuple[int, Rank], _Job] = {}
        self._kept: dict[Node, tuple[int, Node]] = {}

    def job(self, level: int, rank: Rank) -> _Job:
        self.last[rank] = max(self.last.get(rank, 0), level)
        return self._jobs.setdefault((level, rank), _Job())

    def add(self, node: Node) -> None:
        """Place a node, whose arguments have been."""
        if node.op in REDUCTIONS:
            self._add_reduction(node)
        elif node.op == "call":
            self._add_call(node)
        else:
            seen = [self._seen(a, node.rank) for a in node.args]
            self.level[node] = max((level for level, _ in seen), default=0)
            args = [new for _, new in seen]
            self.new[node] = make(node.op, *args, attr=node.attr, type=node.type) if args else node

    def _add_reduction(self, node: Node) -> None:
        (source,) = node.args
        level = self.level[source]
        reduced = make(node.op, self.new[source], attr=node.attr, type=node.type)
        if node.rank.on_host:
            self.job(level, source.rank).reductions.append(reduced)
            self.new[node] = reduced
        else:
            into = self._temporary(node.type, node.rank)
            self.job(level, source.rank).sums.append(Reduction(str(into.attr), reduced))
            self.new[node] = into
            self._kept[node] = level + 1, into
        self.level[node] = level + 1

    def _add_call(self, node: Node) -> None:
        source, *numbers = node.args
        assert callable(node.attr)
        _, kept = self._keep(source)
        level = max([self.level[source], *(self.level[n] for n in numbers)])
        target = self._temporary(node.type, Rank.ELEMENT)
        given = tuple(self.new[n] for n in numbers)
        least = max((self.level[n] for n in numbers), default=0)
        self.calls.append(
            (least, level, Call(0, node.attr, str(kept.attr), str(target.attr), given))
        )
        self.new[node] = target
        self.level[node] = level + 1
        self._kept[node] = level + 1, target

    def _seen(self, a: Node, rank: Rank) -> tuple[int, Node]:
        """An argument's level and form for a value of this rank: a temporary's where it has another
        rank."""
        if a.rank.on_host or a.rank == rank:
            return self.level[a], self.new[a]
        return self._keep(a)

    def _keep(self, node: Node) -> tuple[int, Node]:
        """The temporary that holds a value for other passes, and the first level that can read
        it."""
        if node not in self._kept:
            value = self.new[node]
            if node.type == "bool":
                # A condition is kept as a number.
                value = make("where", value, const(1.0, "f32"), const(0.0, "f32"))
            kept = self._temporary(value.type, node.rank)
            self.job(self.level[node], node.rank).stores.append((str(kept.attr), value))
            self._kept[node] = self.level[node] + 1, kept != 0 if node.type == "bool" else kept
        return self._kept[node]

    def _temporary(self, type: str, rank: Rank) -> Node:
        one = Temporary(f"~{len(self.temporaries)}", type, rank)
        self.temporaries.append(one)
        return load(one.name, type, rank)

    def finish(self, scalars: list[Node]) -> tuple[tuple[Pass, ...], tuple[Call, ...]]:
        """All passes in order, and the calls between them; their numbers, and the scalars, are in
        passes' rows too."""
        passes: list[Pass] = []
        after: dict[int, int] = {}
        for least, level, _ in self.calls:
            if not any(least <= k <= level for k, _ in self._jobs):
                # A number that the last reductions make needs a pass in whose rows it is; this one
                # walks nothing.
                self._jobs[level, Rank.ELEMENT] = _Job()
        for level, rank in sorted(self._jobs):
            job = self._jobs[level, rank]
            if job.reductions and job.stores:
                passes.append(_pass(rank, tuple(job.reductions), tuple(job.sums), ()))
                job = _Job(stores=job.stores)
            passes.append(_pass(rank, tuple(job.reductions), tuple(job.sums), tuple(job.stores)))
            after[level] = len(passes) - 1
        calls = tuple(
            Call(
                max(after[k] for k in after if k <= level),
                c.function,
                c.source,
                c.target,
                c.numbers,
            )
            for _, level, c in self.calls
        )
        for k, nodes in ((len(passes) - 1, scalars), *((c.after, c.numbers) for c in calls)):
            inputs = dict.fromkeys(
                [*passes[k].inputs, *(node for node in nodes if node.op != "const")]
            )
            passes[k] = replace(passes[k], inputs=tuple(inputs))
        return tuple(passes), calls


def _pass(
    rank: Rank,
    reductions: tuple[Node, ...],
    sums: tuple[Reduction, ...],
    stores: tuple[tuple[str, Node], ...],
) -> Pass:
    roots = (
        [r.args[0] for r in reductions]
        + [s.node.args[0] for s in sums]
        + [node for _, node in stores]
    )
    elements = element_order(roots)
    # A dict keeps the order and drops repetitions; constants are immediates, no inputs.
    inputs = dict.fromkeys(
        a for n in elements for a in n.args if a.rank.on_host and a.op != "const"
    )
    inputs |= dict.fromkeys(r for r in roots if r.rank.on_host and r.op != "const")
    loads = dict.fromkeys(n for n in elements if n.op in LOADS)
    return Pass(rank, tuple(inputs), tuple(loads), reductions, sums, stores)


def lines_of(domain: Rank, matrices: T, rows: T, columns: T, one: T) -> tuple[T, T, T]:
    """Return the groups of lines, the lines of a group and the length of a line in a walk.

    `domain` is the rank of the values that the pass walks over, in a stack of matrices.
    The sizes may be numbers, arrays with a number for each tensor, or text that stands for them;
    `one` is 1 in the same kind. For a tensor of 2 matrices with 3 rows and 5 columns:

        ELEMENT   (2, 3, 5)   2 groups of 3 lines with 5 elements: the rows
        ROW       (2, 1, 3)   2 groups of 1 line with the 3 values that a matrix's rows have
        COLUMN    (2, 1, 5)   2 groups of 1 line with the 5 values that a matrix's columns have
        MATRIX    (1, 1, 2)   1 line with the 2 values that the matrices have

    The product of the three is the number of values.
    """
    if domain == Rank.ELEMENT:
        return matrices, rows, columns
    if domain == Rank.ROW:
        return matrices, one, rows
    if domain == Rank.COLUMN:
        return matrices, one, columns
    if domain == Rank.MATRIX:
        return one, one, matrices
    raise ValueError(f"no pass walks over values of rank {domain.name}, which are on the host")


def hyper_names(roots: Iterable[Node]) -> tuple[str, ...]:
    """The hyper-parameters that reach a root, in a fixed order."""
    return tuple(sorted(str(node.attr) for node in topological(roots) if node.op == "hyper"))


def element_order(roots: Iterable[Node]) -> list[Node]:
    """The nodes that the roots need in a walk, arguments first; host values are where it ends."""
    order = topological(roots, inside=lambda node: not node.rank.on_host)
    return [node for node in order if not node.rank.on_host]


def host_order(inputs: Iterable[Node]) -> list[Node]:
    """The host nodes that a pass's inputs need, arguments first; reductions are where the walk
    ends."""
    return topological(inputs, inside=lambda node: node.op not in REDUCTIONS)
