"""Expressions: hash-consed nodes of about thirty operations in six ranks. Standard library only.

A rule is an ordinary Python function; called with nodes, it returns nodes. Two nodes with the same
operation and arguments are the same object, so common subexpressions are computed once without a
pass that looks for them.

Ranks say how often a value exists, and so where it is computed:

* `UNIFORM`, once for all elements of a tensor (a learning rate, a bias correction): on the host, in
  float64;
* `TENSOR`, once a tensor, after a walk over its elements (a norm): on the host, in float64, between
  two passes;
* `MATRIX`, `ROW`, `COLUMN`, once a matrix, a row or a column of it (a tensor of more than two
  dimensions is a stack of matrices): in the kernel, in the compute type, float32 or float64;
* `ELEMENT`, once an element: in the kernel, in the compute type.

Host values are rounded once, to the compute type, where they meet one that is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from functools import reduce
from operator import or_
from threading import RLock
from weakref import WeakValueDictionary


class Rank(IntEnum):
    """How often a value exists. What is computed from two values exists as often as the union of
    their bits says."""

    UNIFORM = 0
    TENSOR = 1
    MATRIX = 3
    ROW = 7
    COLUMN = 11
    ELEMENT = 15

    @property
    def on_host(self) -> bool:
        """Whether such values are computed on the host, in float64, and not in a walk over
        memory."""
        return self <= Rank.TENSOR


# A value's type. `real` is the rule's only number: it becomes f32 or f64 when formats are bound.
FLOATS = ("real", "f32", "f64")
INTEGERS = ("i16", "i32")
TYPES = (*FLOATS, "f16", *INTEGERS, "bool")

# A column's element, and what a tensor has once for each row, column or matrix.
LOADS = {
    "load": Rank.ELEMENT,
    "load_row": Rank.ROW,
    "load_column": Rank.COLUMN,
    "load_matrix": Rank.MATRIX,
}
LOAD_OF = {rank: op for op, rank in LOADS.items()}
# Sizes of a tensor, and the machine epsilon of the parameter's own storage.
FACTS = {"numel": Rank.TENSOR, "rows": Rank.TENSOR, "columns": Rank.TENSOR, "epsilon": Rank.UNIFORM}
LEAVES = frozenset({"const", "hyper", *FACTS, *LOADS})
ARITHMETIC = frozenset({"add", "sub", "mul", "div"})
ROUNDING = frozenset({"neg", "abs", "sqrt", "floor", "rint"})
HOST_ONLY = frozenset({"pow", "exp", "log"})
COMPARISONS = frozenset({"lt", "le", "eq"})
BITWISE = frozenset({"and", "or", "xor", "shl", "shr"})
REDUCTIONS = frozenset({"sum", "amax"})
# Where a reduction leads from a rank: over all elements, along rows, or down columns.
OVER = {
    (Rank.ELEMENT, None): Rank.TENSOR,
    (Rank.ELEMENT, "rows"): Rank.ROW,
    (Rank.ELEMENT, "columns"): Rank.COLUMN,
    (Rank.ROW, "columns"): Rank.MATRIX,
    (Rank.COLUMN, "rows"): Rank.MATRIX,
}
OPERATIONS = (
    LEAVES
    | ARITHMETIC
    | ROUNDING
    | HOST_ONLY
    | COMPARISONS
    | BITWISE
    | REDUCTIONS
    | {"not", "where", "cast", "bitcast", "spread", "call"}
)


class RuleError(TypeError):
    """A rule does what no kernel can: the message says what, and what to write instead."""


class Node:
    """One value: an operation, its arguments, and what follows from them, a type and a rank. Made
    by `make` alone."""

    __slots__ = ("__weakref__", "args", "attr", "op", "rank", "type")
    op: str
    args: tuple[Node, ...]
    attr: object
    type: str
    rank: Rank

    def __bool__(self) -> bool:
        raise RuleError(
            "a rule cannot branch on a value that is known only while stepping: use "
            "where(condition, a, b) instead of `if`, and & or | instead of `and` or `or`"
        )

    def __float__(self) -> float:
        raise RuleError(
            "a rule's values are not numbers while it is traced: use onepass.sqrt, onepass.exp, "
            "onepass.log and onepass.where instead of functions that take floats, such as those "
            "of math"
        )

    def __repr__(self) -> str:
        return self._text(3)

    def _text(self, depth: int) -> str:
        # Not the whole expression: written out, shared parts would be repeated without bound.
        args = [a._text(depth - 1) for a in self.args] if depth or not self.args else ["..."]
        return f"{self.op}({', '.join([*args, *([] if self.attr is None else [repr(self.attr)])])})"

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> Node:  # type: ignore[override]
        return make("eq", self, other)

    def __ne__(self, other: object) -> Node:  # type: ignore[override]
        return make("not", make("eq", self, other))

    def __lt__(self, other: object) -> Node:
        return make("lt", self, other)

    def __le__(self, other: object) -> Node:
        return make("le", self, other)

    def __gt__(self, other: object) -> Node:
        return make("lt", other, self)

    def __ge__(self, other: object) -> Node:
        return make("le", other, self)

    def __add__(self, other: object) -> Node:
        return make("add", self, other)

    def __radd__(self, other: object) -> Node:
        return make("add", other, self)

    def __sub__(self, other: object) -> Node:
        return make("sub", self, other)

    def __rsub__(self, other: object) -> Node:
        return make("sub", other, self)

    def __mul__(self, other: object) -> Node:
        return make("mul", self, other)

    def __rmul__(self, other: object) -> Node:
        return make("mul", other, self)

    def __truediv__(self, other: object) -> Node:
        return divide(self, other)

    def __rtruediv__(self, other: object) -> Node:
        return divide(other, self)

    def __pow__(self, other: object) -> Node:
        return power(self, other)

    def __rpow__(self, other: object) -> Node:
        return power(other, self)

    def __neg__(self) -> Node:
        return make("neg", self)

    def __abs__(self) -> Node:
        return make("abs", self)

    def __and__(self, other: object) -> Node:
        return make("and", self, other)

    def __or__(self, other: object) -> Node:
        return make("or", self, other)

    def __xor__(self, other: object) -> Node:
        return make("xor", self, other)

    def __invert__(self) -> Node:
        return make("not", self)


_interned: WeakValueDictionary[tuple[object, ...], Node] = WeakValueDictionary()
# Not only one thread may look and, where nothing is found, put: there would be two nodes for one
# expression.
INTERNING = RLock()


def make(op: str, *args: object, attr: object = None, type: str | None = None) -> Node:
    """The one node for this operation and these arguments; numbers become constants of their
    neighbour's type.

    Raises `RuleError` where the operation is not defined for the arguments' types or ranks.
    """
    near = next((a.type for a in args if isinstance(a, Node) and a.type != "bool"), "real")
    nodes = tuple(a if isinstance(a, Node) else const(a, near) for a in args)
    type, rank = _infer(op, nodes, attr, type)
    # A float's bits, not its value: 0.0 and -0.0 are equal and differ, nan differs from itself.
    shape = attr.hex() if isinstance(attr, float) else attr
    key = (op, tuple(map(id, nodes)), type, shape)
    with INTERNING:
        node = _interned.get(key)
        if node is None:
            node = Node()
            node.op, node.args, node.attr, node.type, node.rank = op, nodes, attr, type, rank
            _interned[key] = node
    return node


OF_ELEMENTS = (
    "{} of an element is not offered: it would cost a library call for each element; use products, "
    "sqrt and where, or compute it from hyper-parameters alone"
)


def _infer(op: str, args: tuple[Node, ...], attr: object, type: str | None) -> tuple[str, Rank]:
    """The type and rank of a node, or the reason why there can be none. This is the operations'
    specification."""
    rank = Rank(reduce(or_, (a.rank for a in args), 0))
    types = [a.type for a in args]
    first = types[0] if types else "real"
    pair = len(args) == 2 and types[1] == first

    def require(condition: bool, what: str) -> None:
        if not condition:
            raise RuleError(f"{op} takes {what}, got ({', '.join(types)})")

    if op in LEAVES:
        require(not args, "no arguments")
        return type or "real", (FACTS | LOADS).get(op, Rank.UNIFORM)
    if op in ARITHMETIC:
        require(
            pair and first in (*FLOATS, "i32" if op in ("add", "sub") else ""),
            "two numbers of one type",
        )
        return first, rank
    if op in ROUNDING:
        require(len(args) == 1 and first in FLOATS, "one floating-point number")
        return first, rank
    if op in HOST_ONLY:
        require(all(t in FLOATS for t in types), "floating-point numbers")
        if not rank.on_host:
            raise RuleError(OF_ELEMENTS.format(op))
        return first, rank
    if op in COMPARISONS:
        require(pair and first != "bool", "two numbers of one type")
        return "bool", rank
    if op in BITWISE:
        logical = ("bool", *INTEGERS) if op in ("and", "or", "xor") else INTEGERS
        require(pair and first in logical, "two conditions, or two integers of one type")
        return first, rank
    if op == "not":
        require(types == ["bool"], "one condition")
        return "bool", rank
    if op == "where":
        require(
            len(args) == 3 and first == "bool" and types[1] == types[2],
            "a condition and two values of one type",
        )
        return types[1], rank
    if op in ("cast", "bitcast"):
        require(len(args) == 1 and type in TYPES, "one value and a type")
        return type or "real", rank
    if op in REDUCTIONS or op in ("spread", "call"):
        require(bool(args) and all(t in FLOATS for t in types), "floating-point numbers")
        return type or ("real" if op in REDUCTIONS else first), _infer_rank(op, args, rank, attr)
    raise RuleError(f"no operation is called {op!r}; there are {', '.join(sorted(OPERATIONS))}")


def _infer_rank(op: str, args: tuple[Node, ...], rank: Rank, attr: object) -> Rank:
    """The rank of what exists more often or more seldom than its arguments."""
    if op == "spread" and len(args) == 1 and isinstance(attr, Rank):
        return attr
    if op == "call":
        if args[0].rank != Rank.ELEMENT or any(not a.rank.on_host for a in args[1:]):
            raise RuleError(
                "a function of whole matrices takes one value with elements, and numbers beside it"
            )
        return Rank.ELEMENT
    if len(args) != 1:
        raise RuleError(f"{op} takes one floating-point number, got {len(args)}")
    if (rank, attr) not in OVER:
        over = "the elements of a tensor" if attr is None else f"a matrix's {attr}"
        once = (
            "is the same for all of them" if rank.on_host else f"exists once a {rank.name.lower()}"
        )
        further = {Rank.ROW: "; column_mean reduces it", Rank.COLUMN: "; row_mean reduces it"}.get(
            rank, ""
        )
        raise RuleError(f"{op} runs over {over}, and this value {once}{further}")
    return OVER[rank, attr]


def const(value: object, type: str = "real") -> Node:
    """A number known while tracing."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RuleError(
            f"a rule computes with numbers and columns, got {value!r} ({value.__class__.__name__})"
        )
    return make("const", attr=int(value) if type in INTEGERS else float(value), type=type)


def load(column: str, type: str = "real", rank: Rank = Rank.ELEMENT) -> Node:
    """A column's element (or, for a column that has one for each row, column or matrix, that), as
    it is stored."""
    return make(LOAD_OF[rank], attr=column, type=type)


def hyper(name: str) -> Node:
    """A hyper-parameter: a number of a row, known when the step begins."""
    return make("hyper", attr=name)


def divide(a: object, b: object) -> Node:
    """a / b. Elements are divided by a host value as a product with its reciprocal, taken in
    float64."""
    a, b = (x if isinstance(x, Node) else const(x) for x in (a, b))
    if not a.rank.on_host and b.rank.on_host and b.type in FLOATS:
        return make("mul", a, make("div", 1.0, b))
    return make("div", a, b)


def power(a: object, b: object) -> Node:
    """a ** b on the host; of an element, the square alone."""
    if isinstance(a, Node) and not a.rank.on_host and not isinstance(b, Node) and b == 2:
        return make("mul", a, a)
    return make("pow", a, b)


def where(condition: Node | bool, a: object, b: object) -> Node:
    """a where the condition holds, else b: a rule's `if`. Both are computed, unless the condition
    is a flag."""
    if isinstance(condition, bool):
        chosen = a if condition else b
        return chosen if isinstance(chosen, Node) else const(chosen)
    return make("where", condition, a, b)


def topological(
    roots: Iterable[Node], inside: Callable[[Node], bool] = lambda _: True
) -> list[Node]:
    """Every node that the roots need, arguments before users, each once; no further than to nodes
    not `inside`."""
    order: list[Node] = []
    seen: set[int] = set()
    stack = [(root, False) for root in reversed(list(roots))]
    while stack:
        node, ready = stack.pop()
        if ready:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack.extend((arg, False) for arg in reversed(node.args if inside(node) else ()))
    return order


def verify(
    roots: Sequence[Node], types: Sequence[str] = TYPES, columns: Iterable[str] | None = None
) -> None:
    """Check a graph against the operations' specification, and against what a stage allows.

    `types` are the value types that may occur at element rank, `columns` the columns that may be
    loaded. A failure is a defect of the stage before, never of the user: it raises AssertionError
    and names the node.
    """
    known = None if columns is None else set(columns)
    for node in topological(roots):
        inferred = _infer(node.op, node.args, node.attr, node.type)
        if inferred != (node.type, node.rank):
            raise AssertionError(
                f"{node!r} says {(node.type, node.rank)}, its arguments say {inferred}"
            )
        if not node.rank.on_host and node.type not in types:
            raise AssertionError(
                f"{node!r} has type {node.type}; this stage allows {', '.join(types)}"
            )
        if node.op in LOADS and known is not None and node.attr not in known:
            raise AssertionError(
                f"{node!r} loads a column that is not there; there are {', '.join(sorted(known))}"
            )
