"""The oracle: what a bound program means, element by element, in NumPy.

Written from the specification alone: float32 or float64 arithmetic with one rounding an operation,
host values in float64 and rounded once where they meet an element, reductions in float64 in a fixed
order. It knows nothing of passes, of code generation or of threads; from the package it takes the
node type and the constants of the reductions' order.

A tensor is a stack of b matrices with m rows and n columns. Values of elements are arrays (b, m,
n), of rows (b, m, 1), of columns (b, 1, n) and of matrices (b, 1, 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from onepass.kernel.cpu.chunks import FEWEST_LINES
from onepass.kernel.cpu.elements import LANES
from onepass.kernel.cpu.walk import CHUNK
from onepass.kernel.graph.ir import LOADS, Node, Rank, topological
from onepass.kernel.graph.trace import Program

# Integers are unsigned, for shifts that bring in zeros; comparisons and conversions take their
# signed view.
TYPES = {
    "f64": np.float64,
    "f32": np.float32,
    "f16": np.float16,
    "i32": np.uint32,
    "i16": np.uint16,
    "bool": np.bool_,
}
SIGNED = {"i32": np.int32, "i16": np.int16}
# Operations of the C library, by NumPy's names.
LIBRARY = {"pow": "power", "exp": "exp", "log": "log"}
Columns = Mapping[str, np.ndarray]


def interpret(
    program: Program,
    columns: Columns,
    hypers: Mapping[str, float],
    sizes: tuple[int, int, int] | None = None,
) -> dict[str, np.ndarray]:
    """The new values of the columns and scalars that the program writes, for one tensor.

    `columns` hold what is stored: bfloat16 as its bits, in uint16. All arrays are flat. `sizes` are
    the numbers of matrices, rows and columns; without them the tensor is one row. A scalar comes
    from `hypers` and becomes one number, rounded once to the compute type. A tensor without
    elements keeps all that it has.
    """
    nodes = topological(node for _, node in program.stores)
    by_lines = any(node.rank in (Rank.MATRIX, Rank.ROW, Rank.COLUMN) for node in nodes)
    with np.errstate(all="ignore"):
        one = _Tensor(columns, hypers, sizes or (1, 1, len(columns["p"])), by_lines)
        new = {
            name: one.stored(node) if one.numel else columns[name] for name, node in program.stores
        }
        numbers = {
            name: np.asarray(one.host(node)).astype(TYPES[program.compute])
            for name, node in program.scalars
        }
        return new | {name: number.reshape(1) for name, number in numbers.items()}


class _Tensor:
    """The values of nodes for one tensor: each a float64 of host rank, or an array or scalar of its
    type."""

    def __init__(
        self,
        columns: Columns,
        hypers: Mapping[str, float],
        sizes: tuple[int, int, int],
        by_lines: bool,
    ) -> None:
        self.columns, self.hypers, self.sizes, self.by_lines = columns, hypers, sizes, by_lines
        self.numel = math.prod(sizes)
        self.known: dict[Node, np.ndarray] = {}

    def shape(self, rank: Rank) -> tuple[int, int, int]:
        """The shape of values of this rank."""
        matrices, rows, columns = self.sizes
        has_rows, has_columns = (
            rank in (Rank.ROW, Rank.ELEMENT),
            rank in (Rank.COLUMN, Rank.ELEMENT),
        )
        return matrices, rows if has_rows else 1, columns if has_columns else 1

    def stored(self, node: Node) -> np.ndarray:
        """What is written into a column, flat."""
        return np.array(np.broadcast_to(self.value(node), self.shape(node.rank))).reshape(-1)

    def value(self, node: Node) -> np.ndarray:
        """A value as elements, rows and columns see it: rounded to its type where it comes from the
        host."""
        if node.rank.on_host:
            return np.asarray(self.host(node)).astype(TYPES[node.type])
        if node not in self.known:
            self.known[node] = self._value(node)
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
        if node.op in ("numel", "rows", "columns"):
            return np.float64(
                {"numel": self.numel, "rows": self.sizes[1], "columns": self.sizes[2]}[node.op]
            )
        if node.op in ("sum", "amax") and not self.numel:
            return np.float64(0.0)
        if node.op == "sum":
            values = self.value(node.args[0])
            return np.float64(
                sum_by_lines(values) if self.by_lines else ordered_sum(values.reshape(-1))
            )
        if node.op == "amax":
            return np.max(self.value(node.args[0]).astype(np.float64), initial=0.0)
        if node.op in LIBRARY:
            return library(node.op, *(self.host(a) for a in node.args))
        if node.op == "cast":
            return self.host(node.args[0])
        result = _apply(node.op, [self.host(a) for a in node.args])
        assert result.dtype in (np.float64, np.bool_)
        return result[()]

    def _value(self, node: Node) -> np.ndarray:
        if node.op in LOADS:
            loaded = self.columns[node.attr].reshape(self.shape(node.rank))
            assert loaded.dtype == TYPES[node.type]
            return loaded
        args = [self.value(a) for a in node.args]
        if node.op == "spread":
            return args[0]
        if node.op in ("sum", "amax"):
            # Of a value that exists once a row or a column, all that are in a matrix lie on one
            # line.
            along = node.attr == "rows" or node.args[0].rank == Rank.ROW
            axis = 2 if node.attr == "rows" else 1
            if node.op == "amax":
                return np.max(args[0].astype(np.float64), axis=axis, keepdims=True, initial=0.0)
            return sum_along(args[0], axis) if along else sum_down(args[0])
        if node.op == "call":
            return self._call(node, args)
        if node.op == "bitcast":
            return args[0].view(TYPES[node.type])
        source = node.args[0].type
        signed = (
            [a.view(SIGNED[source]) for a in args]
            if source in SIGNED and node.op in ("lt", "le", "cast")
            else args
        )
        if node.op == "cast":
            # Between integers, bits go in from the right or are cut off; into floats, integers have
            # a sign.
            return (args if node.type in SIGNED else signed)[0].astype(TYPES[node.type])
        result = _apply(node.op, signed)
        assert result.dtype == TYPES[node.type], f"{node!r}: {result.dtype}"
        return result

    def _call(self, node: Node, args: Sequence[np.ndarray]) -> np.ndarray:
        """What a function makes of a copy of the matrices, and of numbers in the compute type."""
        matrices, *numbers = args
        matrices = torch.from_numpy(np.array(np.broadcast_to(matrices, self.sizes)))
        return node.attr(matrices, *(float(n) for n in numbers)).contiguous().numpy()


def library(name: str, *args: np.float64) -> np.float64:
    """The C library's function, as Python has it; where Python raises, the result is exact and
    NumPy's is it."""
    try:
        return np.float64(getattr(math, name)(*args))
    except (ValueError, OverflowError):
        return getattr(np, LIBRARY[name])(*args)


def ordered_sum(elements: np.ndarray) -> float:
    """A tensor's sum: each chunk over LANES running values, which are added in order, and chunk
    after chunk."""
    total = 0.0
    for begin in range(0, len(elements), CHUNK):
        chunk = elements[begin : begin + CHUNK].astype(np.float64)
        lanes = np.zeros((-(-len(chunk) // LANES) + 1, LANES))
        # -0.0 is what changes no sum: for the lanes that the last, shorter row does not have.
        lanes[1:] = -0.0
        lanes.reshape(-1)[LANES : LANES + len(chunk)] = chunk
        partial = np.add.accumulate(np.concatenate([[0.0], np.add.accumulate(lanes, axis=0)[-1]]))[
            -1
        ]
        total = total + partial
    return float(total)


def sum_along(values: np.ndarray, axis: int) -> np.ndarray:
    """Sums along lines: element j of a line belongs to lane j modulo LANES, and lanes are added in
    order, from 0."""
    lines = np.moveaxis(values, axis, -1).astype(np.float64)
    lanes = np.zeros((*lines.shape[:-1], -(-lines.shape[-1] // LANES) + 1, LANES))
    lanes[..., 1:, :] = -0.0
    flat = lanes.reshape(*lines.shape[:-1], -1)
    flat[..., LANES : LANES + lines.shape[-1]] = lines
    total = np.add.accumulate(lanes, axis=-2)[..., -1, :]
    total = np.concatenate([np.zeros((*total.shape[:-1], 1)), total], axis=-1)
    return np.moveaxis(np.add.accumulate(total, axis=-1)[..., -1:], -1, axis)


def lines_of_a_chunk(rows: int, columns: int) -> int:
    """How many lines of a matrix are walked at a time: the whole matrix where it has no more
    elements than CHUNK."""
    return rows if rows * columns <= CHUNK else max(FEWEST_LINES, CHUNK // columns)


def sum_down(values: np.ndarray) -> np.ndarray:
    """Sums down the columns: line after line from 0 in each chunk of lines, and chunk after
    chunk."""
    matrices, rows, columns = values.shape
    total = np.zeros((matrices, 1, columns))
    step = max(1, lines_of_a_chunk(rows, columns))
    for begin in range(0, rows, step):
        chunk = values[:, begin : begin + step].astype(np.float64)
        chunk = np.concatenate([np.zeros((matrices, 1, columns)), chunk], axis=1)
        total = total + np.add.accumulate(chunk, axis=1)[:, -1:]
    return total


def sum_by_lines(values: np.ndarray) -> float:
    """A tensor's sum where there are lines: in each chunk over LANES running values, which begin
    anew with each line.

    A chunk is some lines of a matrix that has more than CHUNK elements, or as many whole matrices
    as have no more.
    """
    _, rows, columns = values.shape
    lines = values.reshape(-1, columns).astype(np.float64)
    span, step = rows, lines_of_a_chunk(rows, columns)
    if rows * columns <= CHUNK:
        span, step = len(lines), CHUNK // (rows * columns) * rows
    total = 0.0
    for matrix in range(0, len(lines), span):
        for begin in range(matrix, matrix + span, step):
            chunk = lines[begin : min(begin + step, matrix + span)]
            padded = np.full((len(chunk), -(-columns // LANES) * LANES), -0.0)
            padded[:, :columns] = chunk
            lanes = np.concatenate([np.zeros((1, LANES)), padded.reshape(-1, LANES)])
            partial = np.add.accumulate(
                np.concatenate([[0.0], np.add.accumulate(lanes, axis=0)[-1]])
            )[-1]
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
