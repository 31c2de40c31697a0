"""What becomes of a rule: its columns, the bytes that it moves, its program, and machine code."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ... import kernel
from ...kernel.cpu.launch import Kernel
from ...kernel.gpu.source import triton_source
from ...kernel.graph.ir import Rank
from ...kernel.graph.passes import Program
from ...optimizer import Optimizer
from ...stepping.recipe import algorithm_of, recipe_of
from ..catalog import UnknownName, find_class, nearest
from .host_assembly import function_lines, hot_loop, vector_bits
from .listing import Listing
from .target import compile_for, report

__all__ = ["Explanation", "explain", "graph_of", "parse_options"]


# What a paragraph of a docstring has that names a paper.
REFERENCE = re.compile(r"arXiv:|\b(19|20)\d\d\.")


def graph_of(optimizer: Optimizer) -> kernel.Graph:
    """Return the finished graph of an optimizer's first parameter.

    It is what a step of this parameter computes, in real numbers.
    """
    group = optimizer.param_groups[0]
    return recipe_of(algorithm_of(optimizer), group["params"][0], group).graph


def parse_options(cls: type[Optimizer], words: Sequence[str]) -> dict[str, Any]:
    """Return the words of a command line as arguments of a class.

    `--amsgrad --weight-decay 0.1` becomes `{"amsgrad": True, "weight_decay": 0.1}`: a name without
    a value means True, `--no-name` means False. Raises `UnknownName` for an option that the class
    does not have, or a word that is not an option.
    """
    known = list(inspect.signature(cls).parameters)[1:]
    options: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise UnknownName(
                f"{word!r} is not an option: write --name or --name VALUE; {cls.__name__} has "
                f"{', '.join(known)}."
            )
        name, has_value, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name.startswith("no_") and name[3:] in known:
            options[name[3:]] = False
            continue
        if name not in known:
            raise nearest(f"option of {cls.__name__}", name, known)
        if has_value:
            options[name] = _read(value)
        elif rest and not rest[0].startswith("--"):
            options[name] = _read(rest.pop(0))
        else:
            options[name] = True
    return options


def _read(value: str) -> Any:
    """Return a number, a tuple or the like from its text; any other text as it is."""
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


@dataclass(frozen=True)
class Explanation:
    """All there is to say about one optimizer with these options and this storage format.

    `source` is the rule as a function, `kernel` the kernel that it became.
    """

    cls: type[Optimizer]
    options: dict[str, Any]
    dtype: str
    kernel: Kernel
    source: kernel.Rule

    @property
    def program(self) -> Program:
        """The passes and calls that a step runs."""
        return self.kernel.program

    def text(self, llvm: bool = False, assembly: bool = False, target: str | None = None) -> str:
        """Return everything in sections.

        With `llvm` and `assembly` they have the generated code for this CPU, with a `target` that
        for a GPU of this kind.
        """
        sections = [self.head(), self.rule(), self.columns(), self.listing()]
        if llvm:
            optimized = self.kernel.library.optimized
            sections.append(f"LLVM IR as emitted\n\n{self.kernel.source.strip()}")
            sections.append(f"LLVM IR after optimization\n\n{optimized.strip()}")
        if assembly:
            sections.append(self.assembly())
        if target is not None:
            source = triton_source(self.program)
            compiled = compile_for(source, target)
            sections.append(f"Triton source\n\n{source.text.strip()}")
            sections.append(report(self.program, compiled))
        return "\n\n".join(sections) + "\n"

    def head(self) -> str:
        """Return the class and its options, the first paragraph of its docstring, and the paper."""
        docstring = inspect.getdoc(self.cls) or "(no docstring)"
        paragraphs = [" ".join(paragraph.split()) for paragraph in docstring.split("\n\n")]
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        title = f"{self.cls.__name__}({options}): {paragraphs[0]}"
        for paragraph in paragraphs:
            if REFERENCE.search(paragraph):
                return f"{title}\n{paragraph}"
        return title

    def rule(self) -> str:
        """Return the rule as it is written."""
        try:
            source = inspect.getsource(self.source)
        except (OSError, TypeError):
            source = "(its source is not in a file)"
        return f"Rule\n\n{textwrap.indent(textwrap.dedent(source).strip(), '    ')}"

    def columns(self) -> str:
        """Return the columns with their formats, and the bytes that a step moves."""
        columns = self.program.columns
        width = max(len(column.name) for column in columns)
        lines = ["Columns", ""]
        for column in columns:
            accesses = []
            if column.read:
                accesses.append("read")
            if column.written:
                accesses.append("written")
            each = "" if column.rank == Rank.ELEMENT else f" for each {column.rank.name.lower()}"
            lines.append(
                f"    {column.name:<{width}}  {column.format.name}, {column.format.itemsize} "
                f"bytes{each}, {' and '.join(accesses)}"
            )
        return "\n".join(
            [*lines, "", f"    {self._describe_bytes()}", f"    {self._describe_work()}"]
        )

    def _describe_bytes(self) -> str:
        """Return how many bytes a step reads and writes for each parameter."""
        read, written = self.program.bytes_per_parameter
        moved = (
            f"{read} bytes read + {written} bytes written = {read + written} bytes per parameter "
            "and step"
        )
        if self.cls.gradients == "sparse":
            moved += ", in the rows that the gradient has"
        return moved

    def _describe_work(self) -> str:
        """Return the bytes of state, the type of the arithmetic, and the number of passes."""
        state = sum(
            column.format.itemsize
            for column in self.program.columns
            if column.name not in ("p", "g") and column.rank == Rank.ELEMENT
        )
        count = sum(pass_.domain == Rank.ELEMENT for pass_ in self.program.passes)
        passes = "1 pass" if count == 1 else f"{count} passes"
        arithmetic = f"arithmetic in {self.program.compute}"
        return f"{state} bytes of state per parameter, {arithmetic}, {passes} over memory"

    def listing(self) -> str:
        """Return the program: what the host computes once a step, and what each pass computes."""
        program = self.program
        parts = []
        for index in range(len(program.passes)):
            listing = self._list_pass(index)
            parts.append(listing.text())
            for call in program.calls:
                if call.after == index:
                    numbers = [listing.host(node) for node in call.numbers]
                    name = getattr(call.function, "__name__", call.function)
                    parts.append(
                        f"Then {call.target} = {name}({', '.join([call.source, *numbers])})"
                    )
        if program.scalars:
            listing = self._list_pass(len(program.passes) - 1)
            lines = ["Numbers, once a step for each parameter", ""]
            for name, node in program.scalars:
                lines.append(f"    {name} <- {listing.host(node, top=True)}")
            parts.append("\n".join(lines))
        return "\n\n".join(parts)

    def _list_pass(self, index: int) -> Listing:
        """Return the listing of the pass of this index."""
        passes = self.program.passes
        return Listing(passes[index], index, len(passes))

    def assembly(self) -> str:
        """Return the machine code of each pass, its hot loop marked with a bar."""
        whole = self.kernel.library.assembly()
        parts = []
        for index, pass_ in enumerate(self.program.passes):
            lines = function_lines(whole, f"body_{index}")
            begin, end = hot_loop(lines)
            registers = self._describe_registers(lines[begin:end])
            title = (
                f"Assembly of pass {index + 1} ({len(pass_.roots)} results), the hot loop marked "
                f"with |: {registers}"
            )
            marked = []
            for position, line in enumerate(lines):
                margin = "  | " if begin <= position < end else "    "
                marked.append(f"{margin}{line.expandtabs(8)}")
            parts.append("\n".join([title, "", *marked]))
        return "\n\n".join(parts)

    def _describe_registers(self, lines: Sequence[str]) -> str:
        """Return how wide the registers of these lines are, and how many numbers they hold."""
        bits = vector_bits(lines)
        if not bits:
            return "no vector registers"
        compute = self.program.compute
        lanes = bits // (64 if compute == "f64" else 32)
        return f"{bits}-bit registers, {lanes} lanes of {compute}"


def explain(name: str, words: Sequence[str] = (), dtype: str = "float32") -> Explanation:
    """Return the explanation of an optimizer: a name, or `module:Class`.

    `words` are its options as on the command line, `dtype` is the storage format of all columns.
    Raises `UnknownName` for names that mean nothing and for a class without a rule, and what the
    class raises for impossible options.
    """
    cls = find_class(name)
    if not hasattr(cls, "rule"):
        raise UnknownName(
            f"{cls.__name__} has no rule to explain: it sees all parameters as one vector, and "
            "its docstring has the mathematics; choose another, such as AdamW or SGD."
        )
    if dtype not in kernel.FORMATS:
        raise nearest("storage format", dtype, kernel.FORMATS)
    options = parse_options(cls, words)
    p = nn.Parameter(torch.zeros(2, 2))
    optimizer: Any = cls([p], **options)  # type: ignore[call-arg]
    graph = graph_of(optimizer)
    formats = tuple((column, dtype) for column in ("g", "p", *graph.state))
    rule = optimizer.rule_of(p, optimizer.param_groups[0])
    compiled = kernel.compile(graph, formats)
    # Columns without a device are the host's.
    assert isinstance(compiled, Kernel)
    return Explanation(cls, options, dtype, compiled, rule)
