"""From a rule to a program: trace -> finish -> bind(formats) -> split at reductions.

    rule --trace--> Graph --finish--> Graph --bind--> Program

A `Graph` holds the rule's mathematics over real numbers; the eager backend runs it as it is. A `Program` knows how each
column is stored and is cut into passes, each one walk over memory; the other backends lower it. Neither has seen a
tensor.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

from .formats import FORMATS, Format, cast
from .ir import LEAVES, REDUCTIONS, Node, Rank, RuleError, const, hyper, load, make, topological, verify, where

Rule = Callable[..., Mapping[str, Node]]
# What a keyword of a rule is while tracing: ("float",), ("tuple", n) of floats, ("condition",), or ("flag", value).
Argument = tuple[object, ...]

GRADIENT_FACTOR = "gradient_factor"
# Holds in the step that created a parameter's state.
FIRST = hyper("first") > 0


@dataclass(frozen=True)
class Graph:
    """A rule as expressions: the new value of each column that it writes, over loads of the columns that it reads."""

    name: str
    columns: tuple[str, ...]
    outputs: tuple[tuple[str, Node], ...]

    @property
    def roots(self) -> list[Node]:
        return [node for _, node in self.outputs]

    @cached_property
    def state(self) -> tuple[str, ...]:
        """The columns beside p and g that this graph reads or writes, in the order of the rule's signature."""
        used = {node.attr for node in topological(self.roots) if node.op == "load"} | {name for name, _ in self.outputs}
        return tuple(name for name in self.columns if name in used and name not in ("p", "g"))

    @cached_property
    def hypers(self) -> tuple[str, ...]:
        """The hyper-parameters that reach an output, in a fixed order."""
        return _hypers(self.roots)


def _hypers(roots: Iterable[Node]) -> tuple[str, ...]:
    return tuple(sorted(str(node.attr) for node in topological(roots) if node.op == "hyper"))


@lru_cache(maxsize=256)
def signature(rule: Rule) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """A rule's columns (positional) and its hyper-parameters (keyword-only), by name."""
    parameters = inspect.signature(rule).parameters.values()
    columns = tuple(q.name for q in parameters if q.kind in (q.POSITIONAL_ONLY, q.POSITIONAL_OR_KEYWORD))
    keywords = tuple(q.name for q in parameters if q.kind == q.KEYWORD_ONLY)
    if columns[:2] != ("p", "g") or len(columns) + len(keywords) != len(parameters):
        raise RuleError(
            f"{rule.__qualname__} must be written `def rule(p, g, *states, *, hyper-parameters)`: columns by position, "
            "p and g first, hyper-parameters by keyword after `*`, and no *args or **kwargs"
        )
    return columns, keywords


@lru_cache(maxsize=1024)
def trace(rule: Rule, arguments: tuple[tuple[str, Argument], ...]) -> Graph:
    """Call the rule once with nodes. `arguments` says for each keyword whether it is a number, a tuple or a flag.

    Raises `RuleError` where the rule returns what is no column, forgets p, or writes g.
    """
    columns, _ = signature(rule)
    keywords = {name: _placeholder(name, argument) for name, argument in arguments}
    returned = rule(*(load(name) for name in columns), **keywords)
    name = rule.__qualname__.removesuffix(".rule")
    if not isinstance(returned, Mapping) or "p" not in returned:
        raise RuleError(f"{name}.rule must return a dict with the new value of 'p', got {returned!r}")
    for key in returned:
        if key == "g" or key not in columns:
            allowed = ", ".join(c for c in columns if c != "g")
            raise RuleError(f"{name}.rule returns {key!r}; it may write its columns other than g: {allowed}")
    outputs = tuple((c, _as_node(returned[c])) for c in columns if c in returned)
    for key, node in outputs:
        if node.type == "bool":
            raise RuleError(
                f"{name}.rule returns a condition for {key!r}; columns hold numbers: where({key}, 1.0, 0.0)"
            )
    graph = Graph(name, columns, outputs)
    verify(graph.roots, types=("real", "bool"), columns=columns)
    return graph


def _as_node(value: object) -> Node:
    return value if isinstance(value, Node) else const(value)


def _placeholder(name: str, argument: Argument) -> object:
    kind, *rest = argument
    if kind == "float":
        return hyper(name)
    if kind == "tuple":
        return tuple(hyper(f"{name}.{i}") for i in range(int(str(rest[0]))))
    return FIRST if kind == "condition" else rest[0]


@lru_cache(maxsize=1024)
def finish(graph: Graph, *, maximize: bool = False, scaled: bool = False, exact: bool = True) -> Graph:
    """What every algorithm shares, and no rule knows.

    `scaled` multiplies the gradient by the uniform `gradient_factor`, `maximize` negates it. `exact` keeps p's very
    bits where its value does not change, so that a step with lr = 0 does not turn -0.0 into 0.0; a rule without `lr`
    always does.
    """
    p, g = load("p"), load("g")
    gradient = g * hyper(GRADIENT_FACTOR) if scaled else g
    gradient = -gradient if maximize else gradient
    outputs = [(name, rebuild([root], {g: gradient})[0]) for name, root in graph.outputs]
    if exact:
        outputs = [(name, _exact(root, p, "lr" in graph.hypers) if name == "p" else root) for name, root in outputs]
    return Graph(graph.name, graph.columns, tuple(outputs))


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


@dataclass(frozen=True)
class Column:
    """One role across all parameters, as a kernel sees it."""

    name: str
    format: Format
    read: bool
    written: bool


@dataclass(frozen=True)
class Pass:
    """One walk over memory: `inputs` are the host values that it needs; it ends in reductions, or in the stores."""

    inputs: tuple[Node, ...]
    loads: tuple[str, ...]
    reductions: tuple[Node, ...]
    stores: tuple[tuple[str, Node], ...]

    @property
    def roots(self) -> list[Node]:
        return [r.args[0] for r in self.reductions] + [node for _, node in self.stores]


@dataclass(frozen=True)
class Program:
    """A rule with its formats bound, in passes. `compute` is the type of its arithmetic, f32 or f64."""

    name: str
    compute: str
    columns: tuple[Column, ...]
    hypers: tuple[str, ...]
    passes: tuple[Pass, ...]

    @property
    def bytes_per_parameter(self) -> tuple[int, int]:
        """Bytes read and written for each element in a step, all passes together."""
        sizes = {c.name: c.format.itemsize for c in self.columns}
        read = sum(sizes[name] for one in self.passes for name in one.loads)
        return read, sum(c.format.itemsize for c in self.columns if c.written)


@lru_cache(maxsize=1024)
def bind(graph: Graph, formats: tuple[tuple[str, str], ...]) -> Program:
    """Put each column's decoding before the rule's nodes and its encoding after them, then split into passes.

    `formats` maps column names to names in `FORMATS`. Arithmetic is in float64 where a column is, else in float32.
    """
    stored = {name: FORMATS[format] for name, format in formats}
    compute = "f64" if any(f.name == "float64" for f in stored.values()) else "f32"
    replaced: dict[Node, Node] = {}
    for node in topological(graph.roots):
        if node.op == "load":
            format = stored[str(node.attr)]
            replaced[node] = cast(format.decode(load(str(node.attr), format.stored)), compute)
        elif node.rank == Rank.ELEMENT:
            args = [_enter(replaced[a], compute) for a in node.args]
            replaced[node] = make(node.op, *args, attr=node.attr)
        elif node.op in REDUCTIONS:
            replaced[node] = make(node.op, replaced[node.args[0]])
        else:
            replaced[node] = node if node.op in LEAVES else make(node.op, *(replaced[a] for a in node.args))
    stores = tuple((name, stored[name].encode(_element(replaced[root], compute))) for name, root in graph.outputs)
    verify([node for _, node in stores], types=(compute, "f32", "f16", "i32", "i16", "bool"), columns=stored)
    return split(graph.name, compute, stored, stores)


def _enter(node: Node, compute: str) -> Node:
    """A host value as an element sees it: rounded once to the compute type; a constant becomes an immediate."""
    if node.rank == Rank.ELEMENT or node.type == "bool":
        return node
    return const(node.attr, compute) if node.op == "const" else cast(node, compute)


def _element(node: Node, compute: str) -> Node:
    """What is stored must exist for each element: a host value is written to all of them."""
    node = _enter(node, compute)
    return node if node.rank == Rank.ELEMENT else make("spread", node)


def split(name: str, compute: str, stored: Mapping[str, Format], stores: tuple[tuple[str, Node], ...]) -> Program:
    """Cut at reductions. A value's level is the number of reductions on its longest way from the columns.

    Reductions of level k end pass k; the last pass stores. Values of an earlier pass that a later one needs are
    computed again from the columns, which nothing has overwritten yet.
    """
    level: dict[Node, int] = {}
    order = topological(node for _, node in stores)
    for node in order:
        level[node] = max((level[a] for a in node.args), default=0) + (node.op in REDUCTIONS)
    last = max(level.values())
    passes = []
    for k in range(last + 1):
        reductions = tuple(n for n in order if n.op in REDUCTIONS and level[n] == k + 1)
        passes.append(_pass(reductions, stores if k == last else ()))
    loaded = {c for one in passes for c in one.loads}
    written = {c for c, _ in stores}
    columns = tuple(Column(c, format, c in loaded, c in written) for c, format in stored.items())
    return Program(name, compute, columns, _hypers(node for _, node in stores), tuple(passes))


def _pass(reductions: tuple[Node, ...], stores: tuple[tuple[str, Node], ...]) -> Pass:
    roots = [r.args[0] for r in reductions] + [node for _, node in stores]
    elements = element_order(roots)
    # A dict keeps the order and drops repetitions; constants are immediates, no inputs.
    inputs = dict.fromkeys(a for n in elements for a in n.args if a.rank < Rank.ELEMENT and a.op != "const")
    inputs |= dict.fromkeys(r for r in roots if r.rank < Rank.ELEMENT and r.op != "const")
    loads = dict.fromkeys(str(n.attr) for n in elements if n.op == "load")
    return Pass(tuple(inputs), tuple(loads), reductions, stores)


def element_order(roots: Iterable[Node]) -> list[Node]:
    """The nodes of element rank that the roots need, arguments first; host values are where the walk ends."""
    order = topological(roots, inside=lambda node: node.rank == Rank.ELEMENT)
    return [node for node in order if node.rank == Rank.ELEMENT]


def host_order(inputs: Iterable[Node]) -> list[Node]:
    """The host nodes that a pass's inputs need, arguments first; reductions are where the walk ends."""
    return topological(inputs, inside=lambda node: node.op not in REDUCTIONS)
