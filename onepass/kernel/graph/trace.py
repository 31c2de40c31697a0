"""From a rule to a program, step by step: trace, finish, bind, split.

    rule --trace--> Graph --finish--> Graph --bind--> nodes --split--> Program

SGD without momentum, followed through the steps:

    rule     p - lr * g                                                  with Python's operators
    trace    sub(p, mul(lr, g))                                          nodes over real numbers
    finish   where(lr == 0, where(new == p, p, new), new)                exact bits at lr = 0
    bind     p becomes bitcast(shl(cast(p, i32), 16), f32), and so on    for bfloat16 columns
    split    one pass: loads p and g, takes lr and lr == 0, stores p

A `Graph` holds the rule's mathematics over real numbers, and the eager backend runs it as it is. A
`Program` knows how each column is stored and is cut into passes, each one walk over memory; the
other backends compile it. Neither has seen a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from .caches import computed, hold_in_forks, remember
from .cut import split
from .formats import FORMATS, Format, cast
from .ir import (
    INTERNING,
    LEAVES,
    LOADS,
    REDUCTIONS,
    Node,
    Rank,
    RuleError,
    as_node,
    const,
    hyper,
    load,
    make,
    topological,
    verify,
    where,
)
from .passes import Named, Program, hyper_names
from .signature import Rule, Signature, signature

# What a keyword of a rule is while tracing: ("float",), ("tuple", n) of floats, ("condition",), or
# ("flag", value).
Argument = tuple[object, ...]

GRADIENT_FACTOR = "gradient_factor"
# Holds in the step that created a parameter's state.
FIRST = hyper("first") > 0


hold_in_forks(INTERNING)


@dataclass(frozen=True)
class Graph:
    """A rule as expressions: each written column's new value, over loads of the columns it reads.

    `outputs` are these values. `scalars` are the new values of states that are one number for each
    parameter. `ranks` says which columns have one value for each row or column of a matrix; all
    others are shaped as the parameter.
    """

    name: str
    columns: tuple[str, ...]
    outputs: Named
    scalars: Named = ()
    ranks: tuple[tuple[str, Rank], ...] = ()

    @property
    def roots(self) -> list[Node]:
        """All new values, of columns and of scalars."""
        return [node for _, node in (*self.outputs, *self.scalars)]

    @computed
    def state(self) -> tuple[str, ...]:
        """The columns that are read or written beside p and g, in the order of the signature."""
        read = {node.attr for node in topological(self.roots) if node.op in LOADS}
        written = {name for name, _ in self.outputs}
        used = (read | written) - {"p", "g"}
        return tuple(name for name in self.columns if name in used)

    @computed
    def hypers(self) -> tuple[str, ...]:
        """The names of the hyper-parameters that reach an output, in alphabetical order."""
        return hyper_names(self.roots)

    @computed
    def has_matrices(self) -> bool:
        """Whether it matters what the tensor's last two sizes are."""
        if self.ranks:
            return True
        return any(map(_sees_matrices, topological(self.roots)))

    @computed
    def is_elementwise(self) -> bool:
        """Whether one walk does all: nothing depends on more than one element of a tensor."""
        reduces = any(node.op in REDUCTIONS for node in topological(self.roots))
        return not (reduces or self.has_matrices)

    @computed
    def has_tensor_values(self) -> bool:
        """Whether a value exists once for a tensor: its norm, or its number of elements."""
        return any(node.rank == Rank.TENSOR for node in topological(self.roots))

    @computed
    def has_calls(self) -> bool:
        """Whether functions of whole matrices are called."""
        return any(node.op == "call" for node in topological(self.roots))

    @computed
    def has_measured_scalars(self) -> bool:
        """Whether a number of a parameter's state follows from its elements or from its sizes."""
        return any(node.rank == Rank.TENSOR for _, node in self.scalars)

    def rank(self, column: str) -> Rank:
        """Return how often a column has a value."""
        return self._ranks.get(column, Rank.ELEMENT)

    @computed
    def _ranks(self) -> Mapping[str, Rank]:
        return dict(self.ranks)


def _sees_matrices(node: Node) -> bool:
    """Whether a value depends on where a tensor's rows and columns begin."""
    matrices = (Rank.MATRIX, Rank.ROW, Rank.COLUMN)
    return node.rank in matrices or node.op in ("rows", "columns", "call")


@remember(most=512)
def trace(rule: Rule, arguments: tuple[tuple[str, Argument], ...]) -> Graph:
    """Call the rule once with nodes in the place of numbers, and return what it computes.

    `arguments` says for each keyword whether it is a number, a tuple or a flag: SGD is traced with
    `(("lr", ("float",)), ("nesterov", ("flag", False)), ...)`. A flag is given to the rule as it
    is, so that a Python `if` is resolved here.

    Raises `RuleError` if the rule returns something that is not a column, forgets p, or writes g.
    """
    declared = signature(rule)
    name = rule.__qualname__.removesuffix(".rule")
    returned = rule(
        *(_leaf(column, declared) for column in declared.positional),
        **{keyword: _placeholder(keyword, argument) for keyword, argument in arguments},
    )
    if not isinstance(returned, Mapping) or "p" not in returned:
        raise RuleError(
            f"{name}.rule must return a dict with the new value of 'p', got {returned!r}"
        )
    new = {}
    for column, value in returned.items():
        new[column] = as_node(value)
        _check_output(name, declared, column, new[column])
    # In the signature's order, whatever the rule's.
    written = [(column, new[column]) for column in declared.positional if column in new]
    scalars = declared.scalars
    graph = Graph(
        name,
        declared.columns,
        outputs=tuple(output for output in written if output[0] not in scalars),
        scalars=tuple(output for output in written if output[0] in scalars),
    )
    _check_scalars(graph, scalars)
    verify(graph.roots, types=("real", "bool"), columns=declared.columns)
    ranks = declared.ranks.items()
    return replace(graph, ranks=tuple(entry for entry in ranks if entry[0] in graph.state))


def _leaf(column: str, declared: Signature) -> Node:
    """Return what stands for a column, or for a scalar, while tracing."""
    if column in declared.scalars:
        return hyper(column)
    return load(column, rank=declared.rank(column))


def _placeholder(keyword: str, argument: Argument) -> object:
    """Return what stands for an option while tracing; a tuple's entries are lr.0, lr.1, ..."""
    kind, *rest = argument
    if kind == "float":
        return hyper(keyword)
    if kind == "tuple":
        length = int(str(rest[0]))
        return tuple(hyper(f"{keyword}.{i}") for i in range(length))
    return FIRST if kind == "condition" else rest[0]


def _check_output(name: str, declared: Signature, column: str, node: Node) -> None:
    """Raise `RuleError` unless a rule may return this value for this column."""
    if column == "g" or column not in declared.positional:
        allowed = ", ".join(c for c in declared.positional if c != "g")
        raise RuleError(
            f"{name}.rule returns {column!r}; it may write its columns other than g: {allowed}"
        )
    if node.type == "bool":
        raise RuleError(
            f"{name}.rule returns a condition for {column!r}; columns hold numbers: "
            f"where({column}, 1.0, 0.0)"
        )
    if column in declared.scalars:
        if not node.rank.on_host:
            raise RuleError(
                f"{name}.rule returns many values for {column!r}, which is a Scalar; reduce them "
                "with sum or mean"
            )
        return
    rank = declared.rank(column)
    if node.rank | rank != rank:
        raise RuleError(
            f"{name}.rule returns for {column!r} a value with rank {node.rank.name}, and "
            f"{column!r} is declared to have rank {rank.name}; reduce it with row_mean or "
            "column_mean"
        )


def _check_scalars(graph: Graph, scalars: Iterable[str]) -> None:
    """Raise `RuleError` if a scalar is read and not written: it would never change."""
    written = [name for name, _ in graph.scalars]
    unwritten = [name for name in scalars if name in graph.hypers and name not in written]
    if unwritten:
        raise RuleError(
            f"{graph.name}.rule reads the Scalar {min(unwritten)!r} and must return its new value "
            "too"
        )


@remember(most=512)
def finish(
    graph: Graph, *, maximize: bool = False, scaled: bool = False, exact: bool = True
) -> Graph:
    """Return the graph with what every algorithm shares, and no rule knows.

    `scaled` multiplies the gradient by the uniform `gradient_factor`, `maximize` negates it.
    `exact` keeps p's very bits when its value does not change, so that a step with lr = 0 does not
    turn -0.0 into 0.0; for a rule without `lr` this holds in every step.
    """
    p = load("p")
    g = load("g")
    gradient = g * hyper(GRADIENT_FACTOR) if scaled else g
    if maximize:
        gradient = -gradient
    outputs = _replaced(graph.outputs, {g: gradient})
    if exact:
        has_lr = "lr" in graph.hypers
        outputs = [
            (name, _exact(root, p, has_lr) if name == "p" else root) for name, root in outputs
        ]
    scalars = _replaced(graph.scalars, {g: gradient})
    return replace(graph, outputs=tuple(outputs), scalars=tuple(scalars))


def _replaced(named: Named, replacements: Mapping[Node, Node]) -> list[tuple[str, Node]]:
    """Return new values with some nodes replaced."""
    return [(name, rebuild([root], replacements)[0]) for name, root in named]


def _exact(root: Node, p: Node, has_lr: bool) -> Node:
    """Return p's new value, or p itself if the two are equal."""
    kept = where(root == p, p, root)
    return where(hyper("lr") == 0, kept, root) if has_lr else kept


def rebuild(roots: Iterable[Node], replacements: Mapping[Node, Node]) -> list[Node]:
    """Return the same expressions with some nodes replaced."""
    roots = list(roots)
    new: dict[Node, Node] = dict(replacements)
    for node in topological(roots):
        if node in new:
            continue
        new[node] = node
        if node.args:
            args = [new[argument] for argument in node.args]
            new[node] = make(node.op, *args, attr=node.attr, type=node.type)
    return [new[root] for root in roots]


@remember(most=512)
def bind(graph: Graph, formats: tuple[tuple[str, str], ...]) -> Program:
    """Return the program for columns that are stored like this.

    Each column's decoding is put before the rule's nodes and its encoding after them; then the
    nodes are split into passes. `formats` has pairs of a column's name and a name in `FORMATS`:
    `(("g", "bfloat16"), ("p", "bfloat16"))`. Arithmetic is in float64 if a column is, else in
    float32.
    """
    stored = {name: FORMATS[format] for name, format in formats}
    is_wide = any(format.name == "float64" for format in stored.values())
    compute = "f64" if is_wide else "f32"
    new: dict[Node, Node] = {}
    for node in topological(graph.roots):
        args = [new[argument] for argument in node.args]
        new[node] = _bind(node, args, stored, compute)
    stores = []
    for name, root in graph.outputs:
        value = _spread(new[root], compute, graph.rank(name))
        stores.append((name, stored[name].encode(value)))
    scalars = [(name, _enter(new[root], compute)) for name, root in graph.scalars]
    roots = [node for _, node in (*stores, *scalars)]
    verify(roots, types=("f64", "f32", "f16", "i32", "i16", "bool"), columns=stored)
    ranks = dict(graph.ranks)
    return split(graph.name, compute, stored, ranks, tuple(stores), tuple(scalars))


def _bind(node: Node, args: list[Node], stored: Mapping[str, Format], compute: str) -> Node:
    """Return a rule's node as a program has it, over arguments that have been bound."""
    if node.op in LOADS:
        column = str(node.attr)
        format = stored[column]
        number = format.decode(load(column, format.stored, node.rank))
        return cast(number, compute)
    if node.op == "epsilon":
        return const(stored["p"].epsilon)
    if node.op in LEAVES:
        return node
    if node.op in REDUCTIONS:
        if node.rank.on_host:
            return make(node.op, args[0], attr=node.attr)
        # Accumulated in float64, and then rounded, as it is not a host value.
        accumulated = make(node.op, args[0], attr=node.attr, type="f64")
        return cast(accumulated, compute)
    if not node.rank.on_host:
        args = [_enter(argument, compute) for argument in args]
    type = compute if node.op == "call" else None
    return make(node.op, *args, attr=node.attr, type=type)


def _enter(node: Node, compute: str) -> Node:
    """Return a host value as an element sees it: rounded once to the compute type.

    A constant becomes an immediate.
    """
    if not node.rank.on_host or node.type == "bool":
        return node
    if node.op == "const":
        return const(node.attr, compute)
    return cast(node, compute)


def _spread(node: Node, compute: str, rank: Rank) -> Node:
    """Return a value that exists as often as its column: a host value is for all elements."""
    node = _enter(node, compute)
    return node if node.rank == rank else make("spread", node, attr=rank)
