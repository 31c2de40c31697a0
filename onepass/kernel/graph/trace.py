"""From a rule to a program: trace -> finish -> bind(formats) -> split at reductions.

    rule --trace--> Graph --finish--> Graph --bind--> Program

A `Graph` holds the rule's mathematics over real numbers; the eager backend runs it as it is. A
`Program` knows how each column is stored and is cut into passes, each one walk over memory; the
other backends lower it. Neither has seen a tensor.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .caches import computed, hold_in_forks, remember
from .formats import FORMATS, Format, cast
from .ir import (
    INTERNING,
    LEAVES,
    LOADS,
    REDUCTIONS,
    Node,
    Rank,
    RuleError,
    const,
    hyper,
    load,
    make,
    topological,
    verify,
    where,
)
from .passes import Program, hyper_names, split

Rule = Callable[..., Mapping[str, Node]]
# What a keyword of a rule is while tracing: ("float",), ("tuple", n) of floats, ("condition",), or
# ("flag", value).
Argument = tuple[object, ...]

GRADIENT_FACTOR = "gradient_factor"
# Holds in the step that created a parameter's state.
FIRST = hyper("first") > 0


hold_in_forks(INTERNING)


@dataclass(frozen=True)
class Graph:
    """A rule as expressions: the new value of each column that it writes, over loads of the columns
    that it reads.

    `scalars` are the new values of state that is one number a parameter; `ranks` says which columns
    have one value a row or a column of a matrix, all others are shaped as the parameter.
    """

    name: str
    columns: tuple[str, ...]
    outputs: tuple[tuple[str, Node], ...]
    scalars: tuple[tuple[str, Node], ...] = ()
    ranks: tuple[tuple[str, Rank], ...] = ()

    @property
    def roots(self) -> list[Node]:
        return [node for _, node in (*self.outputs, *self.scalars)]

    @computed
    def state(self) -> tuple[str, ...]:
        """The columns beside p and g that this graph reads or writes, in the order of the rule's
        signature."""
        used = {node.attr for node in topological(self.roots) if node.op in LOADS} | {
            name for name, _ in self.outputs
        }
        return tuple(name for name in self.columns if name in used and name not in ("p", "g"))

    @computed
    def hypers(self) -> tuple[str, ...]:
        """The hyper-parameters that reach an output, in a fixed order."""
        return hyper_names(self.roots)

    @computed
    def has_matrices(self) -> bool:
        """Whether it matters what the tensor's last two sizes are."""
        matrices = (Rank.MATRIX, Rank.ROW, Rank.COLUMN)
        return any(
            n.rank in matrices or n.op in ("rows", "columns", "call")
            for n in topological(self.roots)
        ) or bool(self.ranks)

    @computed
    def is_elementwise(self) -> bool:
        """Whether one walk over a tensor does all: nothing depends on more than an element of
        it."""
        reduces = any(node.op in REDUCTIONS for node in topological(self.roots))
        return not (reduces or self.has_matrices)

    @computed
    def has_calls(self) -> bool:
        """Whether functions of whole matrices are called."""
        return any(node.op == "call" for node in topological(self.roots))

    @computed
    def has_measured_scalars(self) -> bool:
        """Whether a number of a parameter's state follows from its elements, by a sum, or from its
        sizes."""
        return any(node.rank == Rank.TENSOR for _, node in self.scalars)

    def rank(self, column: str) -> Rank:
        """How often a column has a value."""
        return self._ranks.get(column, Rank.ELEMENT)

    @computed
    def _ranks(self) -> Mapping[str, Rank]:
        return dict(self.ranks)


class Signature(NamedTuple):
    """What a rule says of itself: its columns and scalars in order, keywords, and the ranks of
    unusual states."""

    positional: tuple[str, ...]
    keywords: tuple[str, ...]
    ranks: Mapping[str, Rank]

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(name for name in self.positional if name not in self.scalars)

    @property
    def scalars(self) -> tuple[str, ...]:
        return tuple(name for name, rank in self.ranks.items() if rank == Rank.UNIFORM)


@remember(most=512)
def signature(rule: Rule) -> Signature:
    """A rule's columns (positional) and its hyper-parameters (keyword-only), by name."""
    parameters = inspect.signature(rule).parameters.values()
    positional = tuple(
        q.name for q in parameters if q.kind in (q.POSITIONAL_ONLY, q.POSITIONAL_OR_KEYWORD)
    )
    keywords = tuple(q.name for q in parameters if q.kind == q.KEYWORD_ONLY)
    if positional[:2] != ("p", "g") or len(positional) + len(keywords) != len(parameters):
        raise RuleError(
            f"{rule.__qualname__} must be written `def rule(p, g, *states, *, hyper-parameters)`: "
            "columns by position, p and g first, hyper-parameters by keyword after `*`, and no "
            "*args or **kwargs"
        )
    ranks = {
        q.name: _annotated_rank(q.annotation, rule) for q in parameters if q.name in positional[2:]
    }
    return Signature(
        positional, keywords, {name: rank for name, rank in ranks.items() if rank is not None}
    )


def _annotated_rank(annotation: Any, rule: Rule) -> Rank | None:
    """The rank that `Scalar`, `PerRow` or `PerColumn` stands for; other annotations mean nothing
    here."""
    if isinstance(annotation, str):
        for part in annotation.split("."):
            annotation = getattr(rule, "__globals__", {}).get(part, annotation)
            annotation = getattr(annotation, part, annotation)
        if isinstance(annotation, str) and annotation.rpartition(".")[2] in (
            "Scalar",
            "PerRow",
            "PerColumn",
        ):
            raise RuleError(
                f"{rule.__qualname__} annotates a state with {annotation!r}, which is no name of "
                "its module; import it at the top of the module"
            )
    return next((m for m in getattr(annotation, "__metadata__", ()) if isinstance(m, Rank)), None)


@remember(most=512)
def trace(rule: Rule, arguments: tuple[tuple[str, Argument], ...]) -> Graph:
    """Call the rule once with nodes. `arguments` says for each keyword whether it is a number, a
    tuple or a flag.

    Raises `RuleError` where the rule returns what is no column, forgets p, or writes g.
    """
    said = signature(rule)
    keywords = {name: _placeholder(name, argument) for name, argument in arguments}
    given = [
        hyper(n) if n in said.scalars else load(n, rank=said.ranks.get(n, Rank.ELEMENT))
        for n in said.positional
    ]
    returned = rule(*given, **keywords)
    name = rule.__qualname__.removesuffix(".rule")
    if not isinstance(returned, Mapping) or "p" not in returned:
        raise RuleError(
            f"{name}.rule must return a dict with the new value of 'p', got {returned!r}"
        )
    for key, value in returned.items():
        _check_output(name, said, key, _as_node(value))
    written = {n: _as_node(returned[n]) for n in said.positional if n in returned}
    outputs = tuple((n, node) for n, node in written.items() if n not in said.scalars)
    scalars = tuple((n, node) for n, node in written.items() if n in said.scalars)
    ranks = tuple((n, rank) for n, rank in said.ranks.items() if n not in said.scalars)
    unwritten = set(hyper_names([n for _, n in (*outputs, *scalars)])) & set(said.scalars) - set(
        written
    )
    if unwritten:
        raise RuleError(
            f"{name}.rule reads the Scalar {min(unwritten)!r} and must return its new value too"
        )
    graph = Graph(name, said.columns, outputs, scalars, ranks)
    verify(graph.roots, types=("real", "bool"), columns=said.columns)
    return Graph(
        name,
        said.columns,
        outputs,
        scalars,
        tuple((n, rank) for n, rank in ranks if n in graph.state),
    )


def _check_output(name: str, said: Signature, key: str, node: Node) -> None:
    """Whether a rule may return this value under this name."""
    if key == "g" or key not in said.positional:
        allowed = ", ".join(c for c in said.positional if c != "g")
        raise RuleError(
            f"{name}.rule returns {key!r}; it may write its columns other than g: {allowed}"
        )
    if node.type == "bool":
        raise RuleError(
            f"{name}.rule returns a condition for {key!r}; columns hold numbers: where({key}, 1.0, "
            "0.0)"
        )
    rank = said.ranks.get(key, Rank.ELEMENT)
    if key in said.scalars and not node.rank.on_host:
        raise RuleError(
            f"{name}.rule returns many values for {key!r}, which is a Scalar; reduce them with sum "
            "or mean"
        )
    if key not in said.scalars and node.rank | rank != rank:
        raise RuleError(
            f"{name}.rule returns for {key!r} a value with rank {node.rank.name}, and {key!r} is "
            f"declared to have rank {rank.name}; reduce it with row_mean or column_mean"
        )


def _as_node(value: object) -> Node:
    return value if isinstance(value, Node) else const(value)


def _placeholder(name: str, argument: Argument) -> object:
    kind, *rest = argument
    if kind == "float":
        return hyper(name)
    if kind == "tuple":
        return tuple(hyper(f"{name}.{i}") for i in range(int(str(rest[0]))))
    return FIRST if kind == "condition" else rest[0]


@remember(most=512)
def finish(
    graph: Graph, *, maximize: bool = False, scaled: bool = False, exact: bool = True
) -> Graph:
    """What every algorithm shares, and no rule knows.

    `scaled` multiplies the gradient by the uniform `gradient_factor`, `maximize` negates it.
    `exact` keeps p's very bits where its value does not change, so that a step with lr = 0 does not
    turn -0.0 into 0.0; a rule without `lr` always does.
    """
    p, g = load("p"), load("g")
    gradient = g * hyper(GRADIENT_FACTOR) if scaled else g
    gradient = -gradient if maximize else gradient
    outputs, scalars = (
        [(name, rebuild([root], {g: gradient})[0]) for name, root in roots]
        for roots in (graph.outputs, graph.scalars)
    )
    if exact:
        outputs = [
            (name, _exact(root, p, "lr" in graph.hypers) if name == "p" else root)
            for name, root in outputs
        ]
    return replace(graph, outputs=tuple(outputs), scalars=tuple(scalars))


def _exact(root: Node, p: Node, has_lr: bool) -> Node:
    kept = where(root == p, p, root)
    return where(hyper("lr") == 0, kept, root) if has_lr else kept


def rebuild(roots: Iterable[Node], replaced: Mapping[Node, Node]) -> list[Node]:
    """The same expressions with some nodes replaced."""
    roots = list(roots)
    new: dict[Node, Node] = dict(replaced)
    for node in topological(roots):
        if node not in new:
            args = tuple(new[a] for a in node.args)
            new[node] = node if args == () else make(node.op, *args, attr=node.attr, type=node.type)
    return [new[root] for root in roots]


@remember(most=512)
def bind(graph: Graph, formats: tuple[tuple[str, str], ...]) -> Program:
    """Put each column's decoding before the rule's nodes and its encoding after them, then split
    into passes.

    `formats` maps column names to names in `FORMATS`. Arithmetic is in float64 where a column is,
    else in float32.
    """
    stored = {name: FORMATS[format] for name, format in formats}
    compute = "f64" if any(f.name == "float64" for f in stored.values()) else "f32"
    new: dict[Node, Node] = {}
    for node in topological(graph.roots):
        new[node] = _bind(node, [new[a] for a in node.args], stored, compute)
    stores = tuple(
        (name, stored[name].encode(_spread(new[root], compute, graph.rank(name))))
        for name, root in graph.outputs
    )
    scalars = tuple((name, _enter(new[root], compute)) for name, root in graph.scalars)
    roots = [node for _, node in (*stores, *scalars)]
    verify(roots, types=("f64", "f32", "f16", "i32", "i16", "bool"), columns=stored)
    return split(graph.name, compute, stored, dict(graph.ranks), stores, scalars)


def _bind(node: Node, args: list[Node], stored: Mapping[str, Format], compute: str) -> Node:
    if node.op in LOADS:
        format = stored[str(node.attr)]
        return cast(format.decode(load(str(node.attr), format.stored, node.rank)), compute)
    if node.op == "epsilon":
        return const(stored["p"].epsilon)
    if node.op in LEAVES:
        return node
    if node.op in REDUCTIONS:
        # Accumulated in float64, and rounded to the compute type where it is no host value.
        if node.rank.on_host:
            return make(node.op, args[0], attr=node.attr)
        return cast(make(node.op, args[0], attr=node.attr, type="f64"), compute)
    if node.op == "call":
        return make(node.op, *(_enter(a, compute) for a in args), attr=node.attr, type=compute)
    if not node.rank.on_host:
        args = [_enter(a, compute) for a in args]
    return make(node.op, *args, attr=node.attr)


def _enter(node: Node, compute: str) -> Node:
    """A host value as an element sees it: rounded once to the compute type; a constant becomes an
    immediate."""
    if not node.rank.on_host or node.type == "bool":
        return node
    return const(node.attr, compute) if node.op == "const" else cast(node, compute)


def _spread(node: Node, compute: str, rank: Rank) -> Node:
    """What is stored must exist as often as its column: a host value is written to all elements."""
    node = _enter(node, compute)
    return node if node.rank == rank else make("spread", node, attr=rank)
