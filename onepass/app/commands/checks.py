"""What commands check before they work: packages, folders and files."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

__all__ = ["UsageError", "check_files", "check_folder", "require"]


class UsageError(ValueError):
    """The command line is not one of this program's; the message is a sentence for the user."""


def require(*modules: str) -> None:
    """Raise `UsageError` unless these modules are installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"this command needs {' and '.join(missing)}: run pip install 'onepass[train]'."
        )


def check_folder(folder: Path) -> None:
    """Raise `UsageError` for a folder that cannot be made or written to; it is not made."""
    absolute = folder.absolute()
    existing = next(path for path in (absolute, *absolute.parents) if path.exists())
    if not existing.is_dir():
        raise UsageError(
            f"--out {folder} is not a folder: {existing} is a file; choose another folder."
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(
            f"--out {folder} cannot be written to: choose another folder, or make it writable."
        )


def check_files(*paths: Path | None) -> None:
    """Raise `UsageError` for a file that is a folder, or in a folder that does not exist."""
    for path in paths:
        if path is None:
            continue
        if path.is_dir():
            example = path / "picture.png"
            raise UsageError(f"{path} is a folder: name a file in it, such as {example}.")
        parent = path.absolute().parent
        if not parent.is_dir():
            raise UsageError(
                f"{path} cannot be written: there is no folder {parent}; make it first."
            )
