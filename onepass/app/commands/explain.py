"""`onepass explain`: show what becomes of an optimizer's rule."""

from __future__ import annotations

from typing import Annotated

import typer

from ..explain.explanation import explain
from ..explain.target import TARGETS
from .checks import UsageError

# For typer: options that are not this program's are the optimizer's.
FOREIGN_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}

OptimizerName = Annotated[str, typer.Argument(help="An optimizer's name, or module:Class.")]
Dtype = Annotated[str, typer.Option(help="The storage format of all columns.")]
Llvm = Annotated[bool, typer.Option("--llvm", help="Show the LLVM IR, as emitted and optimized.")]
Assembly = Annotated[
    bool, typer.Option("--asm", help="Show the machine code, its hot loop marked.")
]
Target = Annotated[
    str | None,
    typer.Option(
        help=f"Show Triton's code for a GPU, which need not be here: {', '.join(TARGETS)}."
    ),
]


def show_rule(
    context: typer.Context,
    optimizer: OptimizerName,
    dtype: Dtype = "float32",
    llvm: Llvm = False,
    assembly: Assembly = False,
    target: Target = None,
) -> None:
    """Show an optimizer's rule, the bytes that it moves, and the program that it becomes.

    Further options are the optimizer's own: onepass explain adamw --amsgrad --weight-decay 0.1
    """
    try:
        explanation = explain(optimizer, context.args, dtype)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    print(explanation.text(llvm, assembly, target), end="")
