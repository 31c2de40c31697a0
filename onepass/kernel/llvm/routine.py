"""Functions of LLVM IR, written statement by statement: loops, conditions, and ways out.

    count = Routine("count_zeros", "i64", "ptr values", "i64 length")
    found = count.variable("i64", 0)
    with count.each("%length") as i:
        value = count.load("i64", "%values", i)
        with count.when(count.is_equal(value, 0)):
            count.set(found, count.add(count.get(found), 1))
    count.leave(count.get(found))
    count.text()                    "define i64 @count_zeros(ptr %values, i64 %length) ..."

Operands are strings of LLVM (`%v3`) or integers of 64 bits. Variables are memory on the stack, and
LLVM turns them into registers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

Operand = str | int


class Routine:
    """The text of one function, as it grows."""

    def __init__(self, name: str, result: str, *arguments: str) -> None:
        """`arguments` are a type and a name each, as in "ptr values"."""
        named = []
        for argument in arguments:
            type, _, argument_name = argument.rpartition(" ")
            named.append(f"{type} %{argument_name}")
        self._head = f"define {result} @{name}({', '.join(named)}) nounwind {{"
        self._result = result
        # What must be on the stack before anything runs: a loop would take more at each turn.
        self._variables: list[str] = []
        self._lines: list[str] = []
        self._count = 0

    def text(self) -> str:
        """Return the whole function."""
        return "\n".join([self._head, *self._variables, *self._lines, "}"])

    def _new(self) -> str:
        self._count += 1
        return f"v{self._count}"

    def value(self, expression: str) -> str:
        """Compute an expression of LLVM, and return the name of its value."""
        name = f"%{self._new()}"
        self._lines.append(f"  {name} = {expression}")
        return name

    def do(self, statement: str) -> None:
        """Add a statement that has no value."""
        self._lines.append(f"  {statement}")

    # Memory.

    def at(self, type: str, pointer: str, index: Operand) -> str:
        """Return the address of an element of an array."""
        return self.value(f"getelementptr {type}, ptr {pointer}, i64 {index}")

    def load(self, type: str, pointer: str, index: Operand = 0) -> str:
        """Return an element of an array."""
        return self.value(f"load {type}, ptr {self.at(type, pointer, index)}, align 4")

    def store(self, type: str, value: Operand, pointer: str, index: Operand = 0) -> None:
        """Set an element of an array."""
        self.do(f"store {type} {value}, ptr {self.at(type, pointer, index)}, align 4")

    def variable(self, type: str, value: Operand | None = None) -> str:
        """Return the address of a new variable, which has this value here."""
        name = f"%{self._new()}"
        self._variables.append(f"  {name} = alloca {type}")
        if value is not None:
            self.do(f"store {type} {value}, ptr {name}")
        return name

    def get(self, variable: str, type: str = "i64") -> str:
        """Return the value of a variable."""
        return self.value(f"load {type}, ptr {variable}")

    def set(self, variable: str, value: Operand, type: str = "i64") -> None:
        """Give a variable another value."""
        self.do(f"store {type} {value}, ptr {variable}")

    # Numbers.

    def add(self, a: Operand, b: Operand) -> str:
        return self.value(f"add i64 {a}, {b}")

    def multiply(self, a: Operand, b: Operand) -> str:
        return self.value(f"mul i64 {a}, {b}")

    def is_equal(self, a: Operand, b: Operand, type: str = "i64") -> str:
        return self.value(f"icmp eq {type} {a}, {b}")

    def is_less(self, a: Operand, b: Operand) -> str:
        return self.value(f"icmp slt i64 {a}, {b}")

    def is_null(self, pointer: str) -> str:
        return self.value(f"icmp eq ptr {pointer}, null")

    def either(self, *conditions: str) -> str:
        """Return whether one of several conditions holds, all of which are computed."""
        return self.joined("or", conditions, "i1")

    def both(self, *conditions: str) -> str:
        """Return whether all of several conditions hold, all of which are computed."""
        return self.joined("and", conditions, "i1")

    def joined(self, operation: str, values: Sequence[str], type: str = "i64") -> str:
        """Return several values, joined by an operation such as "or"."""
        joined, *others = values
        for value in others:
            joined = self.value(f"{operation} {type} {joined}, {value}")
        return joined

    def call(self, result: str, function: Operand, *arguments: str) -> str:
        """Call a function, by its name in the same text or by its address; "" if it is void."""
        target = f"@{function}"
        if isinstance(function, int):
            target = self.value(f"inttoptr i64 {function} to ptr")
        elif function.startswith("%"):
            target = function
        call = f"call {result} {target}({', '.join(arguments)})"
        if result == "void":
            self.do(call)
            return ""
        return self.value(call)

    # The way that a function takes.

    def leave(self, value: Operand | None = None) -> None:
        """Return from the function; what follows, if anything, is not reached."""
        self.do("ret void" if value is None else f"ret {self._result} {value}")

    def leave_if(self, condition: str, value: Operand | None = None) -> None:
        """Return from the function if a condition holds."""
        with self.when(condition):
            self.leave(value)

    def leave_unless(self, condition: str, value: Operand | None = None) -> None:
        """Return from the function unless a condition holds."""
        inside, after = self._new(), self._new()
        self.do(f"br i1 {condition}, label %{after}, label %{inside}")
        self._begin(inside)
        self.leave(value)
        self._begin(after)

    @contextmanager
    def when(self, condition: str) -> Iterator[None]:
        """Do what follows if a condition holds."""
        inside, after = self._new(), self._new()
        self.do(f"br i1 {condition}, label %{inside}, label %{after}")
        self._begin(inside)
        yield
        self._end(after)
        self._begin(after)

    @contextmanager
    def each(self, count: Operand) -> Iterator[str]:
        """Do what follows for each index from 0 on, below `count`."""
        index = self.variable("i64", 0)
        head, inside, after = self._new(), self._new(), self._new()
        self.do(f"br label %{head}")
        self._begin(head)
        i = self.get(index)
        self.do(f"br i1 {self.is_less(i, count)}, label %{inside}, label %{after}")
        self._begin(inside)
        yield i
        if not self._is_over():
            self.set(index, self.add(i, 1))
        self._end(head)
        self._begin(after)

    def _begin(self, block: str) -> None:
        self._lines.append(f"{block}:")

    def _end(self, following: str) -> None:
        """Go on with another block, unless this one has returned."""
        if not self._is_over():
            self.do(f"br label %{following}")

    def _is_over(self) -> bool:
        return self._lines[-1].lstrip().startswith("ret ")
