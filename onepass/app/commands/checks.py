"""What every command checks before it works: packages, folders and files."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path


class UsageError(ValueError):
    """The command line is not one of this program's."""


def require(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"this command needs {' and '.join(missing)}: run pip install 'onepass[train]'."
        )


def check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be written to, before the work and without making it."""
    existing = next(
        place for place in (folder.absolute(), *folder.absolute().parents) if place.exists()
    )
    if not existing.is_dir():
        raise UsageError(
            f"--out {folder} is no folder: {existing} is a file; choose another folder."
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(
            f"--out {folder} cannot be written to: choose another folder, or make it writable."
        )


def check_files(*paths: Path | None) -> None:
    """Refuse a file in a folder that does not exist, and a folder."""
    for path in paths:
        if path is not None and path.is_dir():
            raise UsageError(f"{path} is a folder: name a file in it, as {path / 'picture.png'}.")
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError(
                f"{path} cannot be written: there is no folder {path.absolute().parent}; make it "
                "first."
            )
