"""The oracle: what a bound program means, element by element, in NumPy.

Written from the specification alone: float32 or float64 arithmetic with one rounding an operation, host values in
float64 and rounded once where they meet an element, reductions in float64 in a fixed order. It knows nothing of passes,
of code generation or of threads; from the package it takes the node type and the two constants of the reduction's
order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from onepass.kernel.ir import Node, Rank
from onepass.kernel.lower import LANES
from onepass.kernel.program import Program
from onepass.kernel.walk import CHUNK

# Integers are unsigned, for shifts that bring in zeros; comparisons and conversions take their signed view.
TYPES = {"f64": np.float64, "f32": np.float32, "f16": np.float16, "i32": np.uint32, "i16": np.uint16, "bool": np.bool_}
SIGNED = {"i32": np.int32, "i16": np.int16}
# Operations of the C library, by NumPy's names.
LIBRARY = {"pow": "power", "exp": "exp", "log": "log"}
Columns = Mapping[str, np.ndarray]


def interpret(program: Program, columns: Columns, hypers: Mapping[str, float]) -> dict[str, np.ndarray]:
    """The new values of the columns and scalars that the program writes, for one tensor.

    `columns` hold what is stored: bfloat16 as its bits, in uint16. All arrays are flat and have one length. A scalar
    comes from `hypers` and becomes one number, rounded once to the compute type.
    """
    with np.errstate(all="ignore"):
        one = _Tensor(columns, hypers)
        new = {name: np.array(np.broadcast_to(one.element(node), one.numel)) for name, node in program.stores}
        numbers = {name: np.asarray(one.host(node)).astype(TYPES[program.compute]) for name, node in program.scalars}
        return new | {name: number.reshape(1) for name, number in numbers.items()}


class _Tensor:
    """The values of nodes for one tensor: each a float64 of host rank, or an array or scalar of its type."""

    def __init__(self, columns: Columns, hypers: Mapping[str, float]) -> None:
        self.columns, self.hypers = columns, hypers
        self.numel = len(next(iter(columns.values())))
        self.known: dict[Node, np.ndarray] = {}

    def element(self, node: Node) -> np.ndarray:
        """A value as elements see it: rounded to its type where it comes from the host."""
        if node.rank < Rank.ELEMENT:
            return np.asarray(self.host(node)).astype(TYPES[node.type])
        if node not in self.known:
            self.known[node] = self._element(node)
        return self.known[node]

    def host(self, node: Node) -> np.ndarray:
        """A host value, in float64 (conditions as such)."""
        if node not in self.known:
            self.known[node] = self._host(node)
        return self.known[node]

    def _host(self, node: Node) -> np.ndarray:
        if node.op == "const":
            return np.float64(node.attr)
        if node.op == "hyper":
            return np.float64(self.hypers[node.attr])
        if node.op == "numel":
            return np.float64(self.numel)
        if node.op == "sum":
            return np.float64(ordered_sum(self.element(node.args[0])))
        if node.op == "amax":
            return np.max(self.element(node.args[0]).astype(np.float64), initial=0.0)
        if node.op in LIBRARY:
            return library(node.op, *(self.host(a) for a in node.args))
        if node.op == "cast":
            return self.host(node.args[0])
        result = _apply(node.op, [self.host(a) for a in node.args])
        assert result.dtype in (np.float64, np.bool_)
        return result[()]

    def _element(self, node: Node) -> np.ndarray:
        if node.op == "load":
            loaded = self.columns[node.attr]
            assert loaded.dtype == TYPES[node.type]
            return loaded
        args = [self.element(a) for a in node.args]
        if node.op == "spread":
            return args[0]
        if node.op == "bitcast":
            return args[0].view(TYPES[node.type])
        source = node.args[0].type
        signed = (
            [a.view(SIGNED[source]) for a in args] if source in SIGNED and node.op in ("lt", "le", "cast") else args
        )
        if node.op == "cast":
            # Between integers, bits go in from the right or are cut off; into floats, integers have a sign.
            return (args if node.type in SIGNED else signed)[0].astype(TYPES[node.type])
        result = _apply(node.op, signed)
        assert result.dtype == TYPES[node.type], f"{node!r}: {result.dtype}"
        return result


def library(name: str, *args: np.float64) -> np.float64:
    """The C library's function, as Python has it; where Python raises, the result is exact and NumPy's is it."""
    try:
        return np.float64(getattr(math, name)(*args))
    except (ValueError, OverflowError):
        return getattr(np, LIBRARY[name])(*args)


def ordered_sum(elements: np.ndarray) -> float:
    """A tensor's sum: each chunk over LANES running values, which are added in order, and chunk after chunk."""
    total = 0.0
    for begin in range(0, len(elements), CHUNK):
        chunk = elements[begin : begin + CHUNK].astype(np.float64)
        lanes = np.zeros((-(-len(chunk) // LANES) + 1, LANES))
        # -0.0 is what changes no sum: for the lanes that the last, shorter row does not have.
        lanes[1:] = -0.0
        lanes.reshape(-1)[LANES : LANES + len(chunk)] = chunk
        partial = np.add.accumulate(np.concatenate([[0.0], np.add.accumulate(lanes, axis=0)[-1]]))[-1]
        total = total + partial
    return float(total)


def _apply(op: str, args: Sequence[np.ndarray]) -> np.ndarray:
    a = args[0]
    match op, args:
        case "add", (a, b):
            return a + b
        case "sub", (a, b):
            return a - b
        case "mul", (a, b):
            return a * b
        case "div", (a, b):
            return a / b
        case "neg", (a,):
            return -a
        case "abs", (a,):
            return np.abs(a)
        case "sqrt", (a,):
            return np.sqrt(a)
        case "floor", (a,):
            return np.floor(a)
        case "rint", (a,):
            return np.rint(a)
        case "lt", (a, b):
            return a < b
        case "le", (a, b):
            return a <= b
        case "eq", (a, b):
            return a == b
        case "and", (a, b):
            return a & b
        case "or", (a, b):
            return a | b
        case "xor", (a, b):
            return a ^ b
        case "not", (a,):
            return ~a
        case "shl", (a, b):
            return a << b
        case "shr", (a, b):
            return a >> b
        case "where", (a, b, c):
            return np.where(a, b, c)
    raise NotImplementedError(op)
