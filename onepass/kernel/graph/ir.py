"""Expressions: hash-consed nodes of about thirty operations in six ranks. Standard library only.

A rule is an ordinary Python function. Called with nodes, it returns nodes:

    def rule(p, g, *, lr):
        return {"p": p - lr * g}

    sub(load('p'), mul(hyper('lr'), load('g')))

Two nodes with the same operation and arguments are the same object. So common subexpressions are
computed once, and no pass looks for them.

Ranks say how often a value exists, and so where it is computed:

* `UNIFORM`, once for all elements of a tensor (a learning rate, a bias correction): on the host, in
  float64;
* `TENSOR`, once a tensor, after a walk over its elements (a norm): on the host, in float64, between
  two passes;
* `MATRIX`, `ROW`, `COLUMN`, once a matrix, a row or a column of it (a tensor of more than two
  dimensions is a stack of matrices): in the kernel, in the compute type, float32 or float64;
* `ELEMENT`, once an element: in the kernel, in the compute type.

Here `lr` is a uniform, `g` is an element, and so is their product. A host value is rounded once, to
the compute type, when it meets a value of the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from functools import reduce
from operator import or_
from threading import RLock
from weakref import WeakValueDictionary


class Rank(IntEnum):
    """How often a value exists.

    A value that is computed from two others has the union of their bits as its rank:

                  UNIFORM   TENSOR    MATRIX    ROW       COLUMN    ELEMENT
        UNIFORM   UNIFORM   TENSOR    MATRIX    ROW       COLUMN    ELEMENT
        TENSOR              TENSOR    MATRIX    ROW       COLUMN    ELEMENT
        MATRIX                        MATRIX    ROW       COLUMN    ELEMENT
        ROW                                     ROW       ELEMENT   ELEMENT
        COLUMN                                            COLUMN    ELEMENT
        ELEMENT                                                     ELEMENT

    A matrix of 3 rows and 5 columns has 3 values of rank ROW and 5 of rank COLUMN. The product of
    a row's and a column's value exists for each of the 15 elements: 7 | 11 == 15.
    """

    UNIFORM = 0
    TENSOR = 1
    MATRIX = 3
    ROW = 7
    COLUMN = 11
    ELEMENT = 15

    @property
    def on_host(self) -> bool:
        """Whether such values are computed on the host, in float64, and not in a walk."""
        return self <= Rank.TENSOR


# A value's type. `real` is the rule's only number: it becomes f32 or f64 when formats are bound.
FLOATS = ("real", "f32", "f64")
INTEGERS = ("i16", "i32")
TYPES = (*FLOATS, "f16", *INTEGERS, "bool")

# A column's value at an element, and what a tensor has once for each row, column or matrix.
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
# The rank that a reduction leads to: over all elements, along the rows, or down the columns.
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
    """A rule does what no kernel can do: the message says what, and what to write instead."""


class Node:
    """One value: an operation, its arguments, and what follows from them, a type and a rank.

    Nodes are made only by `make`. `attr` is what an operation has beside its arguments: a number, a
    column's or hyper-parameter's name, a reduction's direction, a function. Python's operators make
    further nodes, also `==`; whether two nodes are the same is asked with `is`.
    """

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
        """Return the expression as text, this many operations deep."""
        if self.args and not depth:
            # Not the whole expression: written out, shared parts would be repeated without bound.
            shown = ["..."]
        else:
            shown = [arg._text(depth - 1) for arg in self.args]
        if self.attr is not None:
            shown.append(repr(self.attr))
        return f"{self.op}({', '.join(shown)})"

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
# Held from the look-up to the entry: else two threads could make two nodes for one expression.
INTERNING = RLock()


def make(op: str, *args: object, attr: object = None, type: str | None = None) -> Node:
    """Return the only node for this operation and these arguments.

    Numbers among the arguments become constants of their neighbour's type. `type` is given for
    operations whose type does not follow from the arguments: leaves, casts, reductions.

    Raises `RuleError` if the operation is not defined for the arguments' types or ranks.
    """
    neighbours = (arg.type for arg in args if isinstance(arg, Node) and arg.type != "bool")
    neighbour = next(neighbours, "real")
    nodes = tuple(as_node(arg, neighbour) for arg in args)
    type, rank = _infer(op, nodes, attr, type)
    # A float's bits, not its value: 0.0 and -0.0 are equal and differ, nan differs from itself.
    identity = attr.hex() if isinstance(attr, float) else attr
    key = (op, tuple(map(id, nodes)), type, identity)
    with INTERNING:
        node = _interned.get(key)
        if node is None:
            node = Node()
            node.op = op
            node.args = nodes
            node.attr = attr
            node.type = type
            node.rank = rank
            _interned[key] = node
    return node


OF_ELEMENTS = (
    "{} of an element is not offered: it would cost a library call for each element; use products, "
    "sqrt and where, or compute it only from hyper-parameters"
)


def _infer(op: str, args: tuple[Node, ...], attr: object, type: str | None) -> tuple[str, Rank]:
    """Return a node's type and rank, or raise the reason why it cannot be.

    This is the operations' specification.
    """
    if op in LEAVES:
        _require(not args, op, args, "no arguments")
        return type or "real", (FACTS | LOADS).get(op, Rank.UNIFORM)
    rank = Rank(reduce(or_, (arg.rank for arg in args), 0))
    if op in REDUCTIONS or op in ("spread", "call"):
        _require(bool(args) and _are_floats(args), op, args, "floating-point numbers")
        derived = "real" if op in REDUCTIONS else args[0].type
        return type or derived, _infer_rank(op, args, rank, attr)
    if op in ("cast", "bitcast"):
        _require(len(args) == 1 and type in TYPES, op, args, "one value and a type")
        return type or "real", rank
    return _infer_type(op, args, rank), rank


def _infer_type(op: str, args: tuple[Node, ...], rank: Rank) -> str:
    """Return the type of an operation that exists as often as its arguments."""
    types = [arg.type for arg in args]
    first = types[0] if types else "real"
    is_pair = len(args) == 2 and types[1] == first
    if op in ARITHMETIC:
        allowed = (*FLOATS, "i32") if op in ("add", "sub") else FLOATS
        _require(is_pair and first in allowed, op, args, "two numbers of one type")
        return first
    if op in ROUNDING:
        _require(len(args) == 1 and first in FLOATS, op, args, "one floating-point number")
        return first
    if op in HOST_ONLY:
        _require(_are_floats(args), op, args, "floating-point numbers")
        if not rank.on_host:
            raise RuleError(OF_ELEMENTS.format(op))
        return first
    if op in COMPARISONS:
        _require(is_pair and first != "bool", op, args, "two numbers of one type")
        return "bool"
    if op in BITWISE:
        allowed = INTEGERS if op in ("shl", "shr") else ("bool", *INTEGERS)
        expected = "two conditions, or two integers of one type"
        _require(is_pair and first in allowed, op, args, expected)
        return first
    if op == "not":
        _require(types == ["bool"], op, args, "one condition")
        return "bool"
    if op == "where":
        is_choice = len(args) == 3 and first == "bool" and types[1] == types[2]
        _require(is_choice, op, args, "a condition and two values of one type")
        return types[1]
    raise RuleError(f"no operation is called {op!r}; there are {', '.join(sorted(OPERATIONS))}")


def _are_floats(args: tuple[Node, ...]) -> bool:
    return all(arg.type in FLOATS for arg in args)


def _require(condition: bool, op: str, args: tuple[Node, ...], expected: str) -> None:
    """Raise `RuleError` if the arguments are not what the operation takes."""
    if not condition:
        types = ", ".join(arg.type for arg in args)
        raise RuleError(f"{op} takes {expected}, got ({types})")


def _infer_rank(op: str, args: tuple[Node, ...], rank: Rank, attr: object) -> Rank:
    """Return the rank of a value that exists more often, or less often, than its arguments."""
    if op == "spread" and len(args) == 1 and isinstance(attr, Rank):
        return attr
    if op == "call":
        matrices, *numbers = args
        if matrices.rank != Rank.ELEMENT or any(not number.rank.on_host for number in numbers):
            raise RuleError(
                "a function of whole matrices takes one value with elements, and numbers beside it"
            )
        return Rank.ELEMENT
    if len(args) != 1:
        raise RuleError(f"{op} takes one floating-point number, got {len(args)}")
    if (rank, attr) not in OVER:
        over = "the elements of a tensor" if attr is None else f"a matrix's {attr}"
        once = "is the same for all of them"
        if not rank.on_host:
            once = f"exists once a {rank.name.lower()}"
        advice = {Rank.ROW: "; column_mean reduces it", Rank.COLUMN: "; row_mean reduces it"}
        raise RuleError(f"{op} runs over {over}, and this value {once}{advice.get(rank, '')}")
    return OVER[rank, attr]


def const(value: object, type: str = "real") -> Node:
    """Return a number that is known while tracing.

    Raises `RuleError` for anything else, also for True and False.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RuleError(
            f"a rule computes with numbers and columns, got {value!r} ({value.__class__.__name__})"
        )
    number = int(value) if type in INTEGERS else float(value)
    return make("const", attr=number, type=type)


def as_node(value: object, type: str = "real") -> Node:
    """Return a node as it is, and a number as a constant of this type."""
    return value if isinstance(value, Node) else const(value, type)


def load(column: str, type: str = "real", rank: Rank = Rank.ELEMENT) -> Node:
    """Return a column's value as it is stored: at an element, or for a row, column or matrix."""
    return make(LOAD_OF[rank], attr=column, type=type)


def hyper(name: str) -> Node:
    """Return a hyper-parameter: a number of the param group, known when the step begins."""
    return make("hyper", attr=name)


def divide(a: object, b: object) -> Node:
    """Return a / b.

    Elements are divided by a host value as a product with its reciprocal, taken in float64.
    """
    a = as_node(a)
    b = as_node(b)
    if not a.rank.on_host and b.rank.on_host and b.type in FLOATS:
        return make("mul", a, make("div", 1.0, b))
    return make("div", a, b)


def power(a: object, b: object) -> Node:
    """Return a ** b on the host; of an element only the square."""
    if isinstance(a, Node) and not a.rank.on_host and not isinstance(b, Node) and b == 2:
        return make("mul", a, a)
    return make("pow", a, b)


def where(condition: Node | bool, a: object, b: object) -> Node:
    """Return a if the condition holds, else b: a rule's `if`.

    Both are computed, unless the condition is a flag (a plain True or False).
    """
    if isinstance(condition, bool):
        return as_node(a if condition else b)
    return make("where", condition, a, b)


def topological(
    roots: Iterable[Node], inside: Callable[[Node], bool] = lambda _: True
) -> list[Node]:
    """Return every node that the roots need, each once, arguments before users.

    The arguments of nodes that are not `inside` are left out, unless another node needs them.
    """
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
            if inside(node):
                stack.extend((arg, False) for arg in reversed(node.args))
    return order


def verify(
    roots: Sequence[Node], types: Sequence[str] = TYPES, columns: Iterable[str] | None = None
) -> None:
    """Check a graph against the operations' specification, and against what a stage allows.

    `types` are the types that values may have in a walk, `columns` the columns that may be loaded.

    Raises `AssertionError` and names the node: that is a defect of the stage before, never of the
    user.
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
