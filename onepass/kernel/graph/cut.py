"""From what a rule stores to a program: a list of passes, each one walk over memory.

A pass ends where a value must be complete before another can begin: at a reduction, at a function
of whole matrices, and where a value that exists once for each row or column of a matrix meets the
matrix's elements. Such values are kept in temporaries, one value for each row, column or matrix.
Only a function of whole matrices needs a temporary of elements.

A value's level is the number of cuts on its longest way from the columns, and the passes of level k
compute it. In this rule with two norms the second one needs the first:

    def rule(p, g, *, lr):
        u = g / norm(g)
        return {"p": p - lr * u / norm(u * p)}

    value                     level   pass 0         pass 1          pass 2
    p, g                      0       loads g        loads p, g      loads p, g
    sum of g * g              1       reduces it
    u, u * p                  1                      computes u      computes u again
    sum of u * p * u * p      2                      reduces it
    the new p                 2                                      stores p

What an earlier pass has computed and a later one of the same domain needs is computed again from
the columns, which nothing has overwritten yet: a multiplication costs less than memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from .formats import Format
from .ir import LOADS, REDUCTIONS, Node, Rank, const, load, make, topological
from .passes import (
    Call,
    Column,
    Named,
    Pass,
    Program,
    Reduction,
    Temporary,
    element_order,
    roots_of,
)


def split(
    name: str,
    compute: str,
    stored: Mapping[str, Format],
    ranks: Mapping[str, Rank],
    stores: Named,
    scalars: Named,
) -> Program:
    """Return the program that stores these values: a bound graph, cut into passes.

    `compute` is the type of the arithmetic, `stored` each column's format, `ranks` the rank of
    columns that are not of elements. `stores` are the columns' new values, `scalars` the new
    numbers of a parameter's state.
    """
    cut = _Cut()
    for node in topological(node for _, node in (*stores, *scalars)):
        cut.add(node)
    cut.store(stores, ranks, scalars)
    new_scalars = tuple((scalar, cut.new[node]) for scalar, node in scalars)
    passes, calls = cut.finish([node for _, node in new_scalars])
    return Program(
        name,
        compute,
        _columns(stored, ranks, stores, passes),
        stores,
        new_scalars,
        passes,
        tuple(cut.temporaries),
        calls,
    )


def _columns(
    stored: Mapping[str, Format], ranks: Mapping[str, Rank], stores: Named, passes: Iterable[Pass]
) -> tuple[Column, ...]:
    """Return the program's columns, with whether any pass reads or writes them."""
    loaded = {str(node.attr) for pass_ in passes for node in pass_.loads}
    written = {column for column, _ in stores}
    return tuple(
        Column(
            column,
            format,
            read=column in loaded,
            written=column in written,
            rank=ranks.get(column, Rank.ELEMENT),
        )
        for column, format in stored.items()
    )


@dataclass
class _Job:
    """A pass in the making: all that is to be done at one level in one domain."""

    reductions: list[Node] = field(default_factory=list)
    sums: list[Reduction] = field(default_factory=list)
    stores: list[tuple[str, Node]] = field(default_factory=list)


@dataclass(frozen=True)
class _Request:
    """A call whose pass is not known yet.

    It may come after a pass of level `least` (its numbers are known) to `level` (all that it takes
    is known).
    """

    least: int
    level: int
    call: Call


class _Cut:
    """Values with their levels, and the passes so far.

    `new` is a value as later passes see it: what other passes have left is a load of a temporary.
    `last` is the highest level at which something is done in a domain.
    """

    def __init__(self) -> None:
        self.level: dict[Node, int] = {}
        self.new: dict[Node, Node] = {}
        self.temporaries: list[Temporary] = []
        self.last: dict[Rank, int] = {}
        self._requests: list[_Request] = []
        self._jobs: dict[tuple[int, Rank], _Job] = {}
        # The temporary that holds a value, and the first level that can read it.
        self._kept: dict[Node, tuple[int, Node]] = {}

    def _job(self, level: int, domain: Rank) -> _Job:
        """Return what is to be done at this level in this domain."""
        self.last[domain] = max(self.last.get(domain, 0), level)
        return self._jobs.setdefault((level, domain), _Job())

    def add(self, node: Node) -> None:
        """Place a node. Its arguments have been placed before."""
        if node.op in REDUCTIONS:
            self._add_reduction(node)
        elif node.op == "call":
            self._add_call(node)
        else:
            self._add_operation(node)

    def _add_operation(self, node: Node) -> None:
        """A value of the highest level among its arguments'."""
        seen = [self._seen(argument, node.rank) for argument in node.args]
        levels = [level for level, _ in seen]
        self.level[node] = max(levels, default=0)
        self.new[node] = node
        if node.args:
            args = [new for _, new in seen]
            self.new[node] = make(node.op, *args, attr=node.attr, type=node.type)

    def _add_reduction(self, node: Node) -> None:
        """A reduction ends a pass of its argument's level; its result is one level higher."""
        (source,) = node.args
        level = self.level[source]
        job = self._job(level, source.rank)
        reduced = make(node.op, self.new[source], attr=node.attr, type=node.type)
        if node.rank.on_host:
            job.reductions.append(reduced)
            self.new[node] = reduced
        else:
            into = self._temporary(node.type, node.rank)
            job.sums.append(Reduction(str(into.attr), reduced))
            self.new[node] = into
            self._kept[node] = (level + 1, into)
        self.level[node] = level + 1

    def _add_call(self, node: Node) -> None:
        """A function's source is kept in a temporary, and its result is another one."""
        source, *numbers = node.args
        assert callable(node.attr)
        _, kept = self._keep(source)
        levels = [self.level[number] for number in numbers]
        least = max(levels, default=0)
        level = max(self.level[source], least)
        target = self._temporary(node.type, Rank.ELEMENT)
        given = tuple(self.new[number] for number in numbers)
        # After which pass it is called is said by `finish`.
        call = Call(0, node.attr, str(kept.attr), str(target.attr), given)
        self._requests.append(_Request(least, level, call))
        self.new[node] = target
        self.level[node] = level + 1
        self._kept[node] = (level + 1, target)

    def _seen(self, argument: Node, rank: Rank) -> tuple[int, Node]:
        """Return an argument's level and form as a value of this rank sees it.

        An argument of another rank is another pass's: it is read from a temporary.
        """
        if argument.rank.on_host or argument.rank == rank:
            return self.level[argument], self.new[argument]
        return self._keep(argument)

    def _keep(self, node: Node) -> tuple[int, Node]:
        """Return the first level that can read a value from a temporary, and how it is read."""
        if node not in self._kept:
            value = self.new[node]
            is_condition = node.type == "bool"
            if is_condition:
                # A condition is kept as a number.
                value = make("where", value, const(1.0, "f32"), const(0.0, "f32"))
            kept = self._temporary(value.type, node.rank)
            job = self._job(self.level[node], node.rank)
            job.stores.append((str(kept.attr), value))
            self._kept[node] = (self.level[node] + 1, (kept != 0) if is_condition else kept)
        return self._kept[node]

    def _temporary(self, type: str, rank: Rank) -> Node:
        """Return the load of a new temporary; "~" cannot occur in a column's name."""
        temporary = Temporary(f"~{len(self.temporaries)}", type, rank)
        self.temporaries.append(temporary)
        return load(temporary.name, type, rank)

    def store(self, stores: Named, ranks: Mapping[str, Rank], scalars: Named) -> None:
        """Store all columns of one domain in one pass: the last one that is needed there.

        So nothing is overwritten that a later pass reads.
        """
        last = dict(self.last)
        for column, root in stores:
            rank = ranks.get(column, Rank.ELEMENT)
            last[rank] = max(last.get(rank, 0), self.level[root])
        # Scalars are among the last pass's uniforms.
        levels = [self.level[node] for _, node in scalars]
        last[Rank.ELEMENT] = max([last.get(Rank.ELEMENT, 0), *levels])
        # A function of matrices may fail (memory): nothing is stored before the last has returned.
        least = max((request.level + 1 for request in self._requests), default=0)
        for column, root in stores:
            rank = ranks.get(column, Rank.ELEMENT)
            job = self._job(max(last[rank], least), rank)
            job.stores.append((column, self.new[root]))

    def finish(self, scalars: list[Node]) -> tuple[tuple[Pass, ...], tuple[Call, ...]]:
        """Return all passes in order, and the calls between them.

        A call's numbers, and the scalars, are among the inputs of passes, as that is where host
        values are computed.
        """
        self._add_empty_passes()
        passes: list[Pass] = []
        # The last pass of each level.
        after: dict[int, int] = {}
        for level, domain in sorted(self._jobs):
            passes += _passes(domain, self._jobs[level, domain])
            after[level] = len(passes) - 1
        calls = []
        for request in self._requests:
            pass_index = max(after[level] for level in after if level <= request.level)
            calls.append(replace(request.call, after=pass_index))
        _add_inputs(passes, len(passes) - 1, scalars)
        for call in calls:
            _add_inputs(passes, call.after, call.numbers)
        return tuple(passes), tuple(calls)

    def _add_empty_passes(self) -> None:
        """Add passes that walk nothing, where a call's numbers would have no pass to be inputs of.

        That is a number which the last reductions make.
        """
        for request in self._requests:
            levels = range(request.least, request.level + 1)
            if not any(level in levels for level, _ in self._jobs):
                self._jobs[request.level, Rank.ELEMENT] = _Job()


def _passes(domain: Rank, job: _Job) -> list[Pass]:
    """Return the job's passes: two if it both reduces to the host and stores."""
    if job.reductions and job.stores:
        reducing = _Job(job.reductions, job.sums)
        storing = _Job(stores=job.stores)
        return [_pass(domain, reducing), _pass(domain, storing)]
    return [_pass(domain, job)]


def _pass(domain: Rank, job: _Job) -> Pass:
    """Return the pass with these ends, and all that it loads and takes from the host."""
    roots = roots_of(job.reductions, job.sums, job.stores)
    elements = element_order(roots)
    arguments = [argument for node in elements for argument in node.args]
    used = [node for node in (*arguments, *roots) if node.rank.on_host]
    # A dict keeps the order and drops repetitions; constants are immediates, not inputs.
    inputs = dict.fromkeys(node for node in used if node.op != "const")
    loads = dict.fromkeys(node for node in elements if node.op in LOADS)
    return Pass(
        domain,
        tuple(inputs),
        tuple(loads),
        tuple(job.reductions),
        tuple(job.sums),
        tuple(job.stores),
    )


def _add_inputs(passes: list[Pass], pass_index: int, nodes: Iterable[Node]) -> None:
    """Let a pass have these host values among its inputs."""
    more = [node for node in nodes if node.op != "const"]
    pass_ = passes[pass_index]
    inputs = dict.fromkeys([*pass_.inputs, *more])
    passes[pass_index] = replace(pass_, inputs=tuple(inputs))
