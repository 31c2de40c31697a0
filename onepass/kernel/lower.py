"""A program's passes as LLVM IR: plain loops, which LLVM vectorises for the host.

One library holds, for each pass k, `host_k` (the values that are the same for many elements, in float64, a row for each
setting), `body_k` (the mathematics over a range of one tensor) and the walk over all tensors that calls them. No loop
over elements calls anything.
"""

from __future__ import annotations

import struct
from functools import partial

from .ir import HOST_ONLY, Node
from .program import FIRST, Pass, Program, element_order, host_order
from .walk import column_names, walk

# A reduction keeps this many running values side by side: part of its definition, as it decides the order of addition.
LANES = 16

# Among the leaves, beside hyper-parameters: no name that a keyword can have.
NUMEL = "numel()"

TYPES = {"real": "double", "f32": "float", "f64": "double", "f16": "half", "i16": "i16", "i32": "i32", "bool": "i1"}
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
BINARY_ON_INTEGERS = {"add": "add", "sub": "sub", "lt": "icmp slt", "le": "icmp sle", "eq": "icmp eq"}
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


def lower(program: Program) -> str:
    """The program as the text of one LLVM module."""
    parts: list[str] = []
    declared: set[str] = set()
    for k, one in enumerate(program.passes):
        for code in (_Host(program, one, k), _Body(program, one, k)):
            parts.append(code.text())
            declared |= code.declared
        parts.append(walk(program, one, k))
    return "\n".join([*parts, *sorted(declared)])


def leaf_names(program: Program) -> list[str]:
    """The rows of the leaves array: hyper-parameters, the number of elements, and each reduction's result."""
    reductions = [r for one in program.passes for r in one.reductions]
    return [*program.hypers, NUMEL, *(f"reduction {i}" for i in range(len(reductions)))]


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


class _Code:
    """A function under construction: its lines, and how a node becomes one of them."""

    def __init__(self, program: Program, one: Pass, k: int) -> None:
        self.program, self.one, self.k = program, one, k
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
        type, source = _wide(node.type, width), _wide(node.args[0].type, width)
        if node.op in BINARY:
            integers = node.args[0].type in ("i16", "i32")
            operation = BINARY_ON_INTEGERS.get(node.op, BINARY[node.op]) if integers else BINARY[node.op]
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


class _Host(_Code):
    """`host_k`: fill table[setting, input] from leaves[leaf, setting], in float64, rounding once at the end."""

    def text(self) -> str:
        self.lines = [
            f"define internal void @host_{self.k}(ptr noalias %leaves, i64 %settings, ptr noalias %table) nounwind {{",
            "entry:",
            "  %any = icmp sgt i64 %settings, 0",
            "  br i1 %any, label %setting, label %done",
            "setting:",
            "  %i = phi i64 [ 0, %entry ], [ %next, %setting ]",
        ]
        names = self._emit()
        compute = TYPES[self.program.compute]
        self._line(f"%row = mul i64 %i, {len(self.one.inputs)}")
        for column, node in enumerate(self.one.inputs):
            value = names[node]
            if node.type == "bool":
                value = self._value(f"uitofp i1 {value} to {compute}")
            place = self._value(f"add i64 %row, {column}")
            place = self._value(f"getelementptr {compute}, ptr %table, i64 {place}")
            self._line(f"store {compute} {value}, ptr {place}")
        self.lines += ["  %next = add i64 %i, 1", "  %more = icmp slt i64 %next, %settings"]
        return "\n".join([*self.lines, "  br i1 %more, label %setting, label %done", "done:", "  ret void", "}"])

    def _emit(self) -> dict[Node, str]:
        leaves = {name: i for i, name in enumerate(leaf_names(self.program))}
        reductions = [r for one in self.program.passes for r in one.reductions]
        leaf_of = {r: leaves[f"reduction {i}"] for i, r in enumerate(reductions)}
        names: dict[Node, str] = {}
        for node in host_order(self.one.inputs):
            if node.op == "const":
                names[node] = literal(node.attr, "f64")
            elif node.args and node not in leaf_of:
                names[node] = self._operation(node, [names[a] for a in node.args], 0)
            else:
                leaf = leaf_of[node] if node in leaf_of else leaves[NUMEL if node.op == "numel" else str(node.attr)]
                place = self._value(f"mul i64 %settings, {leaf}")
                place = self._value(f"add i64 {place}, %i")
                place = self._value(f"getelementptr double, ptr %leaves, i64 {place}")
                names[node] = self._value(f"load double, ptr {place}")
        return names


class _Body(_Code):
    """`body_k`: one pass over the elements [begin, end) of one tensor."""

    def text(self) -> str:
        columns = ", ".join(f"ptr noalias {_local(name)}" for name in column_names(self.one))
        partial = ", ptr noalias %partial" if self.one.reductions else ""
        arguments = f"{columns}, ptr noalias %row, i64 %begin, i64 %end{partial}"
        # No builtins: a loop that only fills or copies a column must not become a call of memset or memcpy.
        head = f'define internal void @body_{self.k}({arguments}) noinline nounwind "no-builtins" {{'
        self.lines = [head, "entry:"]
        self._enter_inputs()
        if self.one.reductions:
            self._reduce()
        else:
            self._walk()
        return "\n".join([*self.lines, "  ret void", "}"])

    def _walk(self) -> None:
        """Stores alone: scalar loops, which LLVM vectorises; the first whose conditions are all false is taken."""
        cases = self._cases()
        for k, absent in enumerate(cases):
            holds = "false"
            for node in absent:
                holds = self._value(f"or i1 {holds}, {self.inputs[node]}")
            self._line(f"br i1 {holds}, label %case{k + 1}, label %loop{k}_head")
            self._loop(f"loop{k}", "%begin", "%end", 1, partial(self._stores, k, absent), "done")
            self.lines.append(f"case{k + 1}:")
        self.lines += ["  unreachable", "done:"]

    def _cases(self) -> list[list[Node]]:
        """Which conditions each loop may take as false, the fastest loop first.

        A select in a loop costs as much as the arithmetic of a small optimizer. So there is a loop without what
        happens seldom (a number is 0; a state is new) and without optional terms (a number is not 0), one without
        what happens seldom, and one for everything.
        """
        conditions = [node for node in self.one.inputs if node.type == "bool"]
        seldom = [node for node in conditions if _is_zero_test(node) or node is FIRST]
        optional = [node for node in conditions if node.op == "not" and _is_zero_test(node.args[0])]
        return [*([[*seldom, *optional]] if optional else []), *([seldom] if seldom else []), []]

    def _stores(self, k: int, absent: list[Node]) -> None:
        known = self.inputs
        self.inputs = {**known, **dict.fromkeys(absent, "false")}
        values = self._elements(f"%loop{k}_i", width=0)
        for name, root in self.one.stores:
            type = TYPES[root.type]
            place = self._value(f"getelementptr {type}, ptr {_local(name)}, i64 %loop{k}_i")
            self._line(f"store {type} {values(root)}, ptr {place}, align 1")
        self.inputs = known

    def _reduce(self) -> None:
        """Reductions: LANES running values in float64; element j of the range belongs to lane j modulo LANES."""
        lanes = f"<{LANES} x double>"
        for r in range(len(self.one.reductions)):
            self._line(f"%acc{r} = alloca {lanes}, align 128")
            self._line(f"store {lanes} zeroinitializer, ptr %acc{r}")
        self._line("%length = sub i64 %end, %begin")
        self._line(f"%rest = urem i64 %length, {LANES}")
        self._line("%middle = sub i64 %end, %rest")
        self._line("br label %wide_head")
        self._loop("wide", "%begin", "%middle", LANES, lambda: self._accumulate("%wide_i", LANES), "between")
        self.lines.append("between:")
        self._line("br label %tail_head")
        self._loop("tail", "%middle", "%end", 1, lambda: self._accumulate("%tail_i", 0), "done")
        self.lines.append("done:")
        for r, reduction in enumerate(self.one.reductions):
            self._line(f"%sums{r} = load {lanes}, ptr %acc{r}")
            total = f"{literal(0.0, 'f64')}"
            for lane in range(LANES):
                self._line(f"%lane{r}_{lane} = extractelement {lanes} %sums{r}, i32 {lane}")
                total = self._combine(reduction, total, f"%lane{r}_{lane}", "double")
            self._line(f"%partial{r} = getelementptr double, ptr %partial, i64 {r}")
            self._line(f"store double {total}, ptr %partial{r}")

    def _accumulate(self, index: str, width: int) -> None:
        values = self._elements(index, width)
        wide = f"<{width} x double>" if width else "double"
        for r, reduction in enumerate(self.one.reductions):
            source = reduction.args[0]
            value = values(source)
            if source.type == "f32":
                value = self._value(f"fpext {_wide('f32', width)} {value} to {wide}")
            place = f"%acc{r}"
            if not width:
                lane = self._value(f"sub i64 {index}, %middle")
                place = self._value(f"getelementptr double, ptr %acc{r}, i64 {lane}")
            old = self._value(f"load {wide}, ptr {place}")
            self._line(f"store {wide} {self._combine(reduction, old, value, wide)}, ptr {place}")

    def _combine(self, reduction: Node, old: str, new: str, type: str) -> str:
        if reduction.op == "sum":
            return self._value(f"fadd {type} {old}, {new}")
        condition = type.replace("double", "i1")
        larger = self._value(f"fcmp ogt {type} {new}, {old}")
        nan = self._value(f"fcmp uno {type} {new}, {new}")
        either = self._value(f"or {condition} {larger}, {nan}")
        return self._value(f"select {condition} {either}, {type} {new}, {type} {old}")

    def _loop(self, name: str, begin: str, end: str, step: int, body, after: str) -> None:
        """for (i = begin; i < end; i += step) body; the block before it has just branched to its head."""
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

    def _enter_inputs(self) -> None:
        """Host values, loaded before the loop; conditions are numbers in the table."""
        compute = TYPES[self.program.compute]
        self.inputs: dict[Node, str] = {}
        for i, node in enumerate(self.one.inputs):
            self._line(f"%input{i}_at = getelementptr {compute}, ptr %row, i64 {i}")
            self._line(f"%input{i} = load {compute}, ptr %input{i}_at")
            if node.type == "bool":
                self._line(f"%input{i}_true = fcmp une {compute} %input{i}, {literal(0.0, self.program.compute)}")
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

        for node in element_order(self.one.roots):
            names[node] = self._node(node, index, width, value)
        return value

    def _splat(self, value: str, type: str, width: int) -> str:
        if width == 0:
            return value
        wide = _wide(type, width)
        first = self._value(f"insertelement {wide} poison, {TYPES[type]} {value}, i32 0")
        return self._value(f"shufflevector {wide} {first}, {wide} poison, <{width} x i32> zeroinitializer")

    def _node(self, node: Node, index: str, width: int, value) -> str:
        type = _wide(node.type, width)
        if node.op == "load":
            at = self._value(f"getelementptr {TYPES[node.type]}, ptr {_local(str(node.attr))}, i64 {index}")
            loaded = self._value(f"load {type}, ptr {at}, align 1")
            # Or LLVM sees that a store keeps what was there, and masks it: half as fast on some processors.
            return self._value(f"freeze {type} {loaded}")
        if node.op == "spread":
            return value(node.args[0])
        return self._operation(node, [value(a) for a in node.args], width)


def _wide(type: str, width: int) -> str:
    return f"<{width} x {TYPES[type]}>" if width else TYPES[type]


def _is_zero_test(node: Node) -> bool:
    return node.op == "eq" and any(a.op == "const" and a.attr == 0 for a in node.args)


def _local(column: str) -> str:
    """A column's pointer in `body_k`: quoted and with a dot, so that any Python identifier may name a column."""
    return f'%"column.{column}"'
