"""The commands of the `onepass` program, one file each: it reads its arguments, calls the library
and prints.

A new command is a function in a file of its own, a line in `COMMANDS`, and its errors in
`USER_ERRORS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import typer

from ...checkpoint import CheckpointError
from ...kernel.graph.ir import RuleError
from ...schedule import ScheduleError
from ..bench.suite import BenchError
from ..catalog import UnknownName
from ..explain.target import TargetError
from ..tasks import TaskError
from ..training.loop import Diverged
from ..training.settings import SettingsError
from .bench import time_steps
from .checks import UsageError
from .draw import draw_gallery, show_schedule
from .explain import show_rule
from .lr_find import find_lr
from .train import train_task

__all__ = ["USER_ERRORS", "app", "run"]

COMMANDS: dict[str, Callable[..., int | None]] = {
    "train": train_task,
    "bench": time_steps,
    "explain": show_rule,
    "schedule": show_schedule,
    "gallery": draw_gallery,
    "lr-find": find_lr,
}
# Their messages are complete sentences for the user; anything else is a defect and shows its
# traceback.
USER_ERRORS = (
    BenchError,
    CheckpointError,
    Diverged,
    RuleError,
    ScheduleError,
    SettingsError,
    TargetError,
    TaskError,
    UnknownName,
    UsageError,
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
for name, command in COMMANDS.items():
    # Options that are not this program's are those of the optimizer that is explained.
    foreign = (
        {"allow_extra_args": True, "ignore_unknown_options": True} if command is show_rule else {}
    )
    app.command(name, context_settings=foreign)(command)


@app.callback()
def introduce() -> None:
    """PyTorch optimizers that run in one pass over memory."""


def run(arguments: Sequence[str]) -> int:
    """Run the command that `arguments` name and return the exit code; what it foresees is raised as
    `USER_ERRORS`."""
    try:
        code = app(list(arguments) or ["--help"], prog_name="onepass", standalone_mode=False)
    except Exception as error:
        # typer's errors have had several base classes, of which this method is the common mark.
        format_message = getattr(error, "format_message", None)
        if format_message is None:
            raise
        raise UsageError(f"{format_message().rstrip('.')}; see onepass --help.") from error
    return code if isinstance(code, int) else 0
