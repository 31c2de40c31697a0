"""The `onepass` program, and what it says if something is wrong.

Its commands are in `onepass.app.commands`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program with `arguments` (default: those of the process) and return its exit code.

    The code is 0 when all went well, 2 with one sentence on standard error when it did not, and 130
    after Ctrl-C.
    """
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        return _complain(
            f"the command line needs {' and '.join(missing)}: run pip install 'onepass[train]'."
        )
    # Only now, because it needs the packages that were just looked for.
    from . import commands

    try:
        return commands.run(sys.argv[1:] if arguments is None else arguments)
    except commands.USER_ERRORS as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        print("onepass: stopped.", file=sys.stderr)
        return 130


def _complain(sentence: str) -> int:
    """Print a sentence as the program's, and return the exit code for a mistake of the user."""
    print(f"onepass: {sentence}", file=sys.stderr)
    return 2
