"""What code is made of: how a value of a program becomes a line of LLVM IR, as a scalar or as a
vector."""

from __future__ import annotations

import struct

from ..graph.ir import HOST_ONLY, LOADS, Node
from ..graph.passes import Pass, Program, element_order

# A reduction keeps this many running values side by side: part of its definition, as it decides the
# order of addition.
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
    """A constant in LLVM's notation: floats by their bits, so that nothing is rounded twice."""
    if type == "bool":
        return "true" if value else "false"
    if type in ("i16", "i32"):
        return str(value)
    number = float(value)  # type: ignore[arg-type]
    if type == "f32":
        number = struct.unpack("f", struct.pack("f", number))[0]
    return f"0x{struct.unpack('>Q', struct.pack('>d', number))[0]:016X}"


class Code:
    """A function under construction: its lines, and how a node becomes one of them."""

    def __init__(self, program: Program, pass_: Pass, pass_index: int) -> None:
        self.program = program
        self.pass_ = pass_
        self.pass_index = pass_index
        self.lines: list[str] = []
        self.declared: set[str] = set()
        self.count = 0

    def _line(self, text: str) -> None:
        self.lines.append("  " + text)

    def _value(self, expression: str) -> str:
        name = f"%v{self.count}"
        self.count += 1
        self._line(f"{name} = {expression}")
        return name

    def _operation(self, node: Node, args: list[str], width: int) -> str:
        """One node whose arguments have been emitted, as a scalar (width 0) or a vector."""
        type, source = wide(node.type, width), wide(node.args[0].type, width)
        if node.op in BINARY:
            integers = node.args[0].type in ("i16", "i32")
            operation = (
                BINARY_ON_INTEGERS.get(node.op, BINARY[node.op]) if integers else BINARY[node.op]
            )
            return self._value(f"{operation} {source} {args[0]}, {args[1]}")
        if node.op == "neg":
            return self._value(f"fneg {type} {args[0]}")
        if node.op == "not":
            true = "true" if width == 0 else f"<{', '.join(['i1 true'] * width)}>"
            return self._value(f"xor {type} {args[0]}, {true}")
        if node.op == "where":
            return self._value(f"select {source} {args[0]}, {type} {args[1]}, {type} {args[2]}")
        if node.op in INTRINSICS:
            kind = "f64" if node.type == "real" else node.type
            name = f"@llvm.{INTRINSICS[node.op]}.{'v' + str(width) if width else ''}{kind}"
            self.declared.add(f"declare {type} {name}({type})")
            return self._value(f"call {type} {name}({type} {args[0]})")
        if node.op in HOST_ONLY:
            # The C library's function, as it is: LLVM must not replace it by another one.
            signature = ", ".join(["double"] * len(args))
            self.declared.add(f"declare double @{node.op}({signature})")
            given = ", ".join(f"double {a}" for a in args)
            return self._value(f"call double @{node.op}({given}) nobuiltin")
        if (node.args[0].type, node.type) == ("real", "f64"):
            return args[0]
        cast = "bitcast" if node.op == "bitcast" else CASTS[node.args[0].type, node.type]
        return self._value(f"{cast} {source} {args[0]} to {type}")


class Body(Code):
    """A walk's inner part: host values enter it, and its nodes are emitted at an index, one or
    several at a time."""

    def _enter_inputs(self) -> None:
        """Host values, loaded before the loop; conditions are numbers in the table."""
        compute = TYPES[self.program.compute]
        self.inputs: dict[Node, str] = {}
        for i, node in enumerate(self.pass_.inputs):
            self._line(f"%input{i}_at = getelementptr {compute}, ptr %row, i64 {i}")
            self._line(f"%input{i} = load {compute}, ptr %input{i}_at")
            if node.type == "bool":
                self._line(
                    f"%input{i}_true = fcmp une {compute} %input{i}, "
                    f"{literal(0.0, self.program.compute)}"
                )
            self.inputs[node] = f"%input{i}_true" if node.type == "bool" else f"%input{i}"

    def _elements(self, index: str, width: int):
        """Emit every element node at this index; returns the function that names a node's value."""
        names: dict[Node, str] = {}

        def value(node: Node) -> str:
            if node in names:
                return names[node]
            if node.op == "const":
                one = literal(node.attr, node.type)
                if width == 0:
                    return one
                return f"<{', '.join([f'{TYPES[node.type]} {one}'] * width)}>"
            names[node] = self._splat(self.inputs[node], node.type, width)
            return names[node]

        for node in element_order(self.pass_.roots):
            names[node] = self._node(node, index, width, value)
        return value

    def _splat(self, value: str, type: str, width: int) -> str:
        if width == 0:
            return value
        vector = wide(type, width)
        first = self._value(f"insertelement {vector} poison, {TYPES[type]} {value}, i32 0")
        return self._value(
            f"shufflevector {vector} {first}, {vector} poison, <{width} x i32> zeroinitializer"
        )

    def _node(self, node: Node, index: str, width: int, value) -> str:
        if node.op in LOADS:
            return self._load(node, index, width)
        if node.op == "spread":
            return value(node.args[0])
        return self._operation(node, [value(a) for a in node.args], width)

    def _load(self, node: Node, index: str, width: int) -> str:
        at = self._value(
            f"getelementptr {TYPES[node.type]}, ptr {local(str(node.attr))}, i64 {index}"
        )
        loaded = self._value(f"load {wide(node.type, width)}, ptr {at}, align 1")
        # Or LLVM sees that a store keeps what was there, and masks it: half as fast on some
        # processors.
        return self._value(f"freeze {wide(node.type, width)} {loaded}")

    def _store(self, column: str, type: str, index: str, value: str, width: int) -> None:
        at = self._value(f"getelementptr {TYPES[type]}, ptr {local(column)}, i64 {index}")
        self._line(f"store {wide(type, width)} {value}, ptr {at}, align 1")

    def _accumulate(self, place: str, reduction: Node, value: str, width: int) -> None:
        """Take a value, or several, into a running result in memory, which is float64."""
        source = reduction.args[0].type
        if source == "f32":
            value = self._value(f"fpext {wide('f32', width)} {value} to {wide('f64', width)}")
        old = self._value(f"load {wide('f64', width)}, ptr {place}, align 8")
        result = self._combine(reduction, old, value, wide("f64", width))
        self._line(f"store {wide('f64', width)} {result}, ptr {place}, align 8")

    def _begin_reductions(self) -> None:
        """LANES running values in float64 for each reduction to the host."""
        for r in range(len(self.pass_.reductions)):
            self._line(f"%acc{r} = alloca <{LANES} x double>, align 128")
            self._line(f"store <{LANES} x double> zeroinitializer, ptr %acc{r}")

    def _finish_reductions(self) -> None:
        """What this range adds to each reduction: its lanes, one after another."""
        for r, reduction in enumerate(self.pass_.reductions):
            self._line(f"%sums{r} = load <{LANES} x double>, ptr %acc{r}")
            total = literal(0.0, "f64")
            for lane in range(LANES):
                self._line(
                    f"%lane{r}_{lane} = extractelement <{LANES} x double> %sums{r}, i32 {lane}"
                )
                total = self._combine(reduction, total, f"%lane{r}_{lane}", "double")
            self._line(f"%partial{r} = getelementptr double, ptr %partial, i64 {r}")
            self._line(f"store double {total}, ptr %partial{r}")

    def _combine(self, reduction: Node, old: str, new: str, type: str) -> str:
        if reduction.op == "sum":
            return self._value(f"fadd {type} {old}, {new}")
        condition = type.replace("double", "i1")
        larger = self._value(f"fcmp ogt {type} {new}, {old}")
        nan = self._value(f"fcmp uno {type} {new}, {new}")
        either = self._value(f"or {condition} {larger}, {nan}")
        return self._value(f"select {condition} {either}, {type} {new}, {type} {old}")

    def _loop(self, name: str, begin: str, end: str, step: int, body, after: str) -> None:
        """for (i = begin; i < end; i += step) body; the block before it has just branched to its
        head."""
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
    return f"<{width} x {TYPES[type]}>" if width else TYPES[type]


def is_zero_test(node: Node) -> bool:
    return node.op == "eq" and any(a.op == "const" and a.attr == 0 for a in node.args)


def local(column: str) -> str:
    """A column's pointer in `body_k`: quoted and with a dot, so that any Python identifier may name
    a column."""
    return f'%"column.{column}"'
