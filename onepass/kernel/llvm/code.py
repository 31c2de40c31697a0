"""What code is made of: how a value of a program becomes a line of LLVM IR, scalar or vector.

p - lr * g at index %i, in float32; `lr` is the first input:

    %input0 = load float, ptr %input0_at                    once, before the loop
    %v1 = getelementptr float, ptr %"column.p", i64 %i
    %v2 = load float, ptr %v1, align 1
    %v3 = freeze float %v2
    %v4 = getelementptr float, ptr %"column.g", i64 %i
    %v5 = load float, ptr %v4, align 1
    %v6 = freeze float %v5
    %v7 = fmul float %input0, %v6
    %v8 = fsub float %v3, %v7

For 16 elements at once, `<16 x float>` stands where a value is computed, and %input0 is put in all
16 places of a vector first.
A width of 0 means a scalar, everywhere in this file.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from ..graph.ir import HOST_ONLY, LOADS, Node
from ..graph.passes import Pass, Program, element_order

# A reduction keeps this many running values side by side. This is part of its definition, as it
# decides the order of addition.
LANES = 16

TYPES = {
    "real": "double",
    "f32": "float",
    "f64": "double",
    "f16": "half",
    "i16": "i16",
    "i32": "i32",
    "bool": "i1",
}
BINARY = {
    "add": "fadd",
    "sub": "fsub",
    "mul": "fmul",
    "div": "fdiv",
    "lt": "fcmp olt",
    "le": "fcmp ole",
    "eq": "fcmp oeq",
    "and": "and",
    "or": "or",
    "xor": "xor",
    "shl": "shl",
    "shr": "lshr",
}
BINARY_ON_INTEGERS = {
    "add": "add",
    "sub": "sub",
    "lt": "icmp slt",
    "le": "icmp sle",
    "eq": "icmp eq",
}
INTRINSICS = {"abs": "fabs", "sqrt": "sqrt", "floor": "floor", "rint": "roundeven"}
CASTS = {
    ("real", "f32"): "fptrunc",
    ("f32", "f64"): "fpext",
    ("f64", "f32"): "fptrunc",
    ("f32", "f16"): "fptrunc",
    ("f16", "f32"): "fpext",
    ("i16", "i32"): "zext",
    ("i32", "i16"): "trunc",
    ("i32", "f32"): "sitofp",
}


def literal(value: object, type: str) -> str:
    """Return a constant in LLVM's notation: floats by their bits, so nothing is rounded twice.

    0.1 as f64 is 0x3FB999999999999A. As f32 it is 0x3FB99999A0000000: the bits of the double that
    has the float's value.
    """
    if type == "bool":
        return "true" if value else "false"
    if type in ("i16", "i32"):
        return str(value)
    number = float(value)  # type: ignore[arg-type]
    if type == "f32":
        number = struct.unpack("f", struct.pack("f", number))[0]
    return f"0x{struct.unpack('>Q', struct.pack('>d', number))[0]:016X}"


class Code:
    """A function under construction: its lines, and how a node becomes one of them.

    `declared` are declarations of other functions that it calls.
    """

    def __init__(self, program: Program, pass_: Pass, pass_index: int) -> None:
        """Begin a function for a pass of a program; `pass_index` becomes part of its name."""
        self.program = program
        self.pass_ = pass_
        self.pass_index = pass_index
        self.lines: list[str] = []
        self.declared: set[str] = set()
        self.count = 0

    def _line(self, text: str) -> None:
        """Add a line."""
        self.lines.append("  " + text)

    def _value(self, expression: str) -> str:
        """Add a line that computes a value, and return the value's name."""
        name = f"%v{self.count}"
        self.count += 1
        self._line(f"{name} = {expression}")
        return name

    def _operation(self, node: Node, args: list[str], width: int) -> str:
        """Add a node's operation on arguments that have been added, and return its value's name."""
        type = wide(node.type, width)
        source = wide(node.args[0].type, width)
        if node.op in BINARY:
            return self._value(f"{_binary(node)} {source} {args[0]}, {args[1]}")
        if node.op == "neg":
            return self._value(f"fneg {type} {args[0]}")
        if node.op == "not":
            true = _repeated("true", "bool", width)
            return self._value(f"xor {type} {args[0]}, {true}")
        if node.op == "where":
            return self._value(f"select {source} {args[0]}, {type} {args[1]}, {type} {args[2]}")
        if node.op in INTRINSICS:
            kind = "f64" if node.type == "real" else node.type
            vector = f"v{width}" if width else ""
            name = f"@llvm.{INTRINSICS[node.op]}.{vector}{kind}"
            self.declared.add(f"declare {type} {name}({type})")
            return self._value(f"call {type} {name}({type} {args[0]})")
        if node.op in HOST_ONLY:
            return self._call_library(node.op, args)
        return self._cast(node, args[0], width)

    def _call_library(self, op: str, args: list[str]) -> str:
        """Call the C library's function as it is: LLVM must not replace it by another one."""
        types = ", ".join(["double"] * len(args))
        given = ", ".join(f"double {argument}" for argument in args)
        self.declared.add(f"declare double @{op}({types})")
        return self._value(f"call double @{op}({given}) nobuiltin")

    def _cast(self, node: Node, argument: str, width: int) -> str:
        """Add a number's way to another type; a rule's `real` is a double already."""
        source = node.args[0].type
        if (source, node.type) == ("real", "f64"):
            return argument
        cast = "bitcast" if node.op == "bitcast" else CASTS[source, node.type]
        return self._value(f"{cast} {wide(source, width)} {argument} to {wide(node.type, width)}")


class Body(Code):
    """A walk's inner part: host values enter it, and its nodes are added at an index.

    The walk around it, `text`, is the CPU's: see `cpu.elements` and `cpu.lines`. `%uniforms` is the
    line of the table of uniforms that belongs to the tensor at hand.
    """

    def _enter_inputs(self) -> None:
        """Load the host values before the loop. A condition is a number in the table, 0 or 1."""
        compute = TYPES[self.program.compute]
        zero = literal(0.0, self.program.compute)
        self.inputs: dict[Node, str] = {}
        for i, node in enumerate(self.pass_.inputs):
            self._line(f"%input{i}_at = getelementptr {compute}, ptr %uniforms, i64 {i}")
            self._line(f"%input{i} = load {compute}, ptr %input{i}_at")
            self.inputs[node] = f"%input{i}"
            if node.type == "bool":
                self._line(f"%input{i}_true = fcmp une {compute} %input{i}, {zero}")
                self.inputs[node] = f"%input{i}_true"

    def _elements(self, index: str, width: int) -> Callable[[Node], str]:
        """Add every node of the walk at this index; return what names a node's value."""
        names: dict[Node, str] = {}

        def value(node: Node) -> str:
            if node in names:
                return names[node]
            if node.op == "const":
                return _repeated(literal(node.attr, node.type), node.type, width)
            names[node] = self._splat(self.inputs[node], node.type, width)
            return names[node]

        for node in element_order(self.pass_.roots):
            names[node] = self._node(node, index, width, value)
        return value

    def _splat(self, value: str, type: str, width: int) -> str:
        """Return a scalar in all places of a vector."""
        if width == 0:
            return value
        vector = wide(type, width)
        first = self._value(f"insertelement {vector} poison, {TYPES[type]} {value}, i32 0")
        return self._value(
            f"shufflevector {vector} {first}, {vector} poison, <{width} x i32> zeroinitializer"
        )

    def _node(self, node: Node, index: str, width: int, value: Callable[[Node], str]) -> str:
        """Add a node of the walk, and return its value's name."""
        if node.op in LOADS:
            return self._load(node, index, width)
        if node.op == "spread":
            return value(node.args[0])
        return self._operation(node, [value(argument) for argument in node.args], width)

    def _load(self, node: Node, index: str, width: int) -> str:
        """Load a column's value at an index."""
        column = local(str(node.attr))
        address = self._value(f"getelementptr {TYPES[node.type]}, ptr {column}, i64 {index}")
        loaded = self._value(f"load {wide(node.type, width)}, ptr {address}, align 1")
        # Otherwise LLVM sees that a store keeps what was there, and masks it: half as fast on some
        # processors.
        return self._value(f"freeze {wide(node.type, width)} {loaded}")

    def _store(self, column: str, type: str, index: str, value: str, width: int) -> None:
        """Store a value of a column at an index."""
        address = self._value(f"getelementptr {TYPES[type]}, ptr {local(column)}, i64 {index}")
        self._line(f"store {wide(type, width)} {value}, ptr {address}, align 1")

    def _accumulate(self, address: str, reduction: Node, value: str, width: int) -> None:
        """Take a value, or several, into a running result in memory, which is float64."""
        double = wide("f64", width)
        source = reduction.args[0].type
        if source == "f32":
            value = self._value(f"fpext {wide(source, width)} {value} to {double}")
        old = self._value(f"load {double}, ptr {address}, align 8")
        result = self._combine(reduction, old, value, double)
        self._line(f"store {double} {result}, ptr {address}, align 8")

    def _begin_reductions(self) -> None:
        """Begin LANES running values in float64 for each reduction to the host."""
        for r in range(len(self.pass_.reductions)):
            self._line(f"%acc{r} = alloca <{LANES} x double>, align 128")
            self._line(f"store <{LANES} x double> zeroinitializer, ptr %acc{r}")

    def _finish_reductions(self) -> None:
        """Store what this range adds to each reduction: its lanes, one after another."""
        for r, reduction in enumerate(self.pass_.reductions):
            self._line(f"%sums{r} = load <{LANES} x double>, ptr %acc{r}")
            total = literal(0.0, "f64")
            for lane in range(LANES):
                value = f"%lane{r}_{lane}"
                self._line(f"{value} = extractelement <{LANES} x double> %sums{r}, i32 {lane}")
                total = self._combine(reduction, total, value, "double")
            self._line(f"%partial{r} = getelementptr double, ptr %partial, i64 {r}")
            self._line(f"store double {total}, ptr %partial{r}")

    def _combine(self, reduction: Node, old: str, new: str, type: str) -> str:
        """Return a running result with a further value: the sum, or the larger; NaN stays NaN."""
        if reduction.op == "sum":
            return self._value(f"fadd {type} {old}, {new}")
        condition = type.replace("double", "i1")
        larger = self._value(f"fcmp ogt {type} {new}, {old}")
        nan = self._value(f"fcmp uno {type} {new}, {new}")
        either = self._value(f"or {condition} {larger}, {nan}")
        return self._value(f"select {condition} {either}, {type} {new}, {type} {old}")

    def _loop(
        self,
        name: str,
        begin: str,
        end: str,
        step: int,
        body: Callable[[], None],
        after: str,
    ) -> None:
        """Add `for (i = begin; i < end; i += step) body`; then control goes to block `after`.

        The block before it has just branched to its head.
        """
        self.lines += [
            f"{name}_head:",
            f"  %{name}_any = icmp slt i64 {begin}, {end}",
            f"  br i1 %{name}_any, label %{name}_body, label %{after}",
            f"{name}_body:",
            f"  %{name}_i = phi i64 [ {begin}, %{name}_head ], [ %{name}_next, %{name}_body ]",
        ]
        body()
        self.lines += [
            f"  %{name}_next = add nsw i64 %{name}_i, {step}",
            f"  %{name}_more = icmp slt i64 %{name}_next, {end}",
            f"  br i1 %{name}_more, label %{name}_body, label %{after}",
        ]


def wide(type: str, width: int) -> str:
    """Return LLVM's name for a type: `float`, or `<16 x float>` for a width of 16."""
    return f"<{width} x {TYPES[type]}>" if width else TYPES[type]


def _repeated(value: str, type: str, width: int) -> str:
    """Return a constant, or a vector of it."""
    if width == 0:
        return value
    entries = ", ".join([f"{TYPES[type]} {value}"] * width)
    return f"<{entries}>"


def _binary(node: Node) -> str:
    """Return LLVM's instruction for an operation of two values."""
    operation = BINARY[node.op]
    if node.args[0].type in ("i16", "i32"):
        return BINARY_ON_INTEGERS.get(node.op, operation)
    return operation


def is_zero_test(node: Node) -> bool:
    """Whether a condition is that a value is 0."""
    return node.op == "eq" and any(a.op == "const" and a.attr == 0 for a in node.args)


def local(column: str) -> str:
    """Return the name of a column's pointer in `body_k`: `%"column.p"`.

    It is quoted and has a dot, so that any Python identifier may name a column.
    """
    return f'%"column.{column}"'
