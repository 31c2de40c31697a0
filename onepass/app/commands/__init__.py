"""The commands of the `onepass` program, one file each.

A command is a function that reads its arguments, calls the library and prints. A new one is a file
here, its import and a line in `COMMANDS`. If it has errors of its own for the user, they stand in
`USER_ERRORS` too. What only one command needs and takes long to import is imported in its function,
and named in `LAZY` in tests/test_architecture.py.
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
from . import bench, explain, gallery, lr_find, schedule, train
from .checks import UsageError

__all__ = ["USER_ERRORS", "app", "run"]

COMMANDS: dict[str, Callable[..., int | None]] = {
    "train": train.train_task,
    "bench": bench.time_steps,
    "explain": explain.show_rule,
    "schedule": schedule.show_schedule,
    "gallery": gallery.draw_gallery,
    "lr-find": lr_find.find_lr,
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
    settings = explain.FOREIGN_OPTIONS if name == "explain" else {}
    app.command(name, context_settings=settings)(command)


@app.callback()
def introduce() -> None:
    """PyTorch optimizers that run in one pass over memory."""


def run(arguments: Sequence[str]) -> int:
    """Run the command that `arguments` name, and return the exit code.

    Raises one of `USER_ERRORS` for a mistake of the user.
    """
    try:
        code = app(list(arguments) or ["--help"], prog_name="onepass", standalone_mode=False)
    except Exception as error:
        # typer's errors have had several base classes; all have this method.
        format_message = getattr(error, "format_message", None)
        if format_message is None:
            raise
        raise UsageError(f"{format_message().rstrip('.')}; see onepass --help.") from error
    return code if isinstance(code, int) else 0
