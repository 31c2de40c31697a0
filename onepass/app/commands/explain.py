"""`onepass explain`: show what becomes of an optimizer's rule."""

from __future__ import annotations

from typing import Annotated

import typer

from ..explain.explanation import explain
from ..explain.target import TARGETS
from .checks import UsageError


def show_rule(
    context: typer.Context,
    optimizer: Annotated[str, typer.Argument(help="An optimizer's name, or module:Class.")],
    dtype: Annotated[str, typer.Option(help="How all columns are stored.")] = "float32",
    llvm: Annotated[
        bool, typer.Option("--llvm", help="Show the LLVM IR, as emitted and optimized.")
    ] = False,
    assembly: Annotated[
        bool, typer.Option("--asm", help="Show the machine code, its hot loop marked.")
    ] = False,
    target: Annotated[
        str | None,
        typer.Option(
            help=f"Show Triton's code for a GPU, which is not needed: {', '.join(TARGETS)}."
        ),
    ] = None,
) -> None:
    """Show an optimizer's rule, the bytes that it moves, and the program that it becomes.

    Further options are the optimizer's own: onepass explain adamw --amsgrad --weight-decay 0.1
    """
    try:
        explanation = explain(optimizer, context.args, dtype)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    print(explanation.text(llvm, assembly, target), end="")
