"""What becomes of a rule: its columns, the bytes that it moves, its program, and the machine
code."""

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
from ...optimizer import Optimizer, algorithm_of
from ...stepping.recipe import recipe_of
from ..catalog import UnknownName, find_class, nearest
from .host_assembly import function_lines, hot_loop, vector_bits
from .listing import Listing
from .target import compile_for, report

__all__ = ["Explanation", "explain", "graph_of", "parse_options"]


def graph_of(optimizer: Optimizer) -> kernel.Graph:
    """The finished graph of an optimizer's first parameter: what its steps compute, in real
    numbers."""
    group = optimizer.param_groups[0]
    return recipe_of(algorithm_of(optimizer), group["params"][0], group).graph


def parse_options(cls: type[Optimizer], words: Sequence[str]) -> dict[str, Any]:
    """`--amsgrad --weight-decay 0.1` as arguments of the class; a name alone means True,
    `--no-name` False.

    Raises `UnknownName` for an option that the class does not have, or a word that is none.
    """
    known = [q.name for q in list(inspect.signature(cls).parameters.values())[1:]]
    options: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise UnknownName(
                f"{word!r} is no option: write --name or --name VALUE; {cls.__name__} has "
                f"{', '.join(known)}."
            )
        name, has_value, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name.startswith("no_") and name[3:] in known:
            options[name[3:]] = False
            continue
        if name not in known:
            raise nearest(f"option of {cls.__name__}", name, known)
        if not has_value and rest and not rest[0].startswith("--"):
            has_value, value = "=", rest.pop(0)
        options[name] = _read(value) if has_value else True
    return options


def _read(value: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


@dataclass(frozen=True)
class Explanation:
    """All there is to say about one optimizer with these options and this storage format."""

    cls: type[Optimizer]
    options: dict[str, Any]
    dtype: str
    kernel: Kernel
    source: kernel.Rule

    @property
    def program(self) -> Program:
        return self.kernel.program

    def text(self, llvm: bool = False, assembly: bool = False, target: str | None = None) -> str:
        """Everything, in sections; the generated code where asked for, and for a GPU of kind
        `target`."""
        sections = [self.head(), self.rule(), self.columns(), self.listing()]
        if llvm:
            sections += [f"LLVM IR as emitted\n\n{self.kernel.source.strip()}"]
            sections += [f"LLVM IR after optimization\n\n{self.kernel.library.optimized.strip()}"]
        if assembly:
            sections.append(self.assembly())
        if target is not None:
            source = triton_source(self.program)
            compiled = compile_for(source, target)
            sections += [f"Triton source\n\n{source.text.strip()}", report(self.program, compiled)]
        return "\n\n".join(sections) + "\n"

    def head(self) -> str:
        """The class's first line, its options, and the paper."""
        lines = inspect.getdoc(self.cls) or "(no docstring)"
        reference = next(
            (
                " ".join(part.split())
                for part in lines.split("\n\n")
                if re.search(r"arXiv:|\b(19|20)\d\d\.", part)
            ),
            "",
        )
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        title = f"{self.cls.__name__}({options}): {lines.splitlines()[0]}"
        return f"{title}\n{reference}" if reference else title

    def rule(self) -> str:
        """The rule as it is written."""
        try:
            source = inspect.getsource(self.source)
        except (OSError, TypeError):
            source = "(its source is not in a file)"
        return f"Rule\n\n{textwrap.indent(textwrap.dedent(source).strip(), '    ')}"

    def columns(self) -> str:
        """The columns with their formats, and the bytes that a step moves."""
        lines = ["Columns", ""]
        width = max(len(c.name) for c in self.program.columns)
        for c in self.program.columns:
            access = " and ".join(
                word for word, on in (("read", c.read), ("written", c.written)) if on
            )
            often = "" if c.rank == Rank.ELEMENT else f" for each {c.rank.name.lower()}"
            lines.append(
                f"    {c.name:<{width}}  {c.format.name}, {c.format.itemsize} bytes{often}, "
                f"{access}"
            )
        read, written = self.program.bytes_per_parameter
        kept = [
            c for c in self.program.columns if c.name not in ("p", "g") and c.rank == Rank.ELEMENT
        ]
        state = sum(c.format.itemsize for c in kept)
        count = sum(one.domain == Rank.ELEMENT for one in self.program.passes)
        walks = f"{count} pass{'es' if count > 1 else ''} over memory"
        moved = (
            f"{read} bytes read + {written} bytes written = {read + written} bytes per parameter "
            "and step"
        )
        moved += ", in the rows that the gradient has" if self.cls.gradients == "sparse" else ""
        kept = (
            f"{state} bytes of state per parameter, arithmetic in {self.program.compute}, {walks}"
        )
        lines += ["", f"    {moved}", f"    {kept}"]
        return "\n".join(lines)

    def listing(self) -> str:
        """The program: what the host computes once a step, and what each pass computes for each
        element."""
        parts = []
        for k, one in enumerate(self.program.passes):
            listing = Listing(one, k, len(self.program.passes))
            parts.append(listing.text())
            for call in self.program.calls:
                if call.after == k:
                    given = ", ".join([call.source, *(listing.host(node) for node in call.numbers)])
                    parts.append(
                        f"Then {call.target} = "
                        f"{getattr(call.function, '__name__', call.function)}({given})"
                    )
        if self.program.scalars:
            listing = Listing(
                self.program.passes[-1], len(self.program.passes) - 1, len(self.program.passes)
            )
            numbers = [
                f"    {name} <- {listing.host(node, top=True)}"
                for name, node in self.program.scalars
            ]
            parts.append("\n".join(["Numbers, once a step for each parameter", "", *numbers]))
        return "\n\n".join(parts)

    def assembly(self) -> str:
        """The machine code of each pass, its hot loop marked."""
        whole = self.kernel.library.assembly()
        parts = []
        for k, one in enumerate(self.program.passes):
            lines = function_lines(whole, f"body_{k}")
            begin, end = hot_loop(lines)
            bits = vector_bits(lines[begin:end])
            size = 64 if self.program.compute == "f64" else 32
            note = (
                f"{bits}-bit registers, {bits // size} lanes of {self.program.compute}"
                if bits
                else "no vector registers"
            )
            title = (
                f"Assembly of pass {k + 1} ({len(one.roots)} results), the hot loop marked with |: "
                f"{note}"
            )
            body = [
                f"{'  | ' if begin <= i < end else '    '}{line.expandtabs(8)}"
                for i, line in enumerate(lines)
            ]
            parts.append("\n".join([title, "", *body]))
        return "\n\n".join(parts)


def explain(name: str, words: Sequence[str] = (), dtype: str = "float32") -> Explanation:
    """Explain an optimizer (a name or `module:Class`) with options as on the command line, columns
    stored as `dtype`.

    Raises `UnknownName` for names that mean nothing and for a class without a rule, and what the
    class raises for impossible options.
    """
    cls = find_class(name)
    if not hasattr(cls, "rule"):
        raise UnknownName(
            f"{cls.__name__} has no rule to explain: it sees all parameters as one vector, and "
            "its docstring has the mathematics; choose another, as AdamW or SGD."
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
    assert isinstance(compiled, Kernel)  # columns without a device are the host's
    return Explanation(cls, options, dtype, compiled, rule)
