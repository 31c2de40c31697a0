"""`onepass gallery`: draw what optimizers and schedules do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..training.display import say
from .checks import check_folder, require

OutFolder = Annotated[Path, typer.Option(help="Folder for the pictures.")]


def draw_gallery(out: OutFolder = Path("gallery")) -> None:
    """Draw what optimizers and schedules do: rates, momentum, all algorithms' paths, schedulers."""
    require("matplotlib")
    check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    # Only pictures need matplotlib, which takes a second to import.
    from ..gallery.album import make

    console = Console()
    for picture, path in make(out):
        say(console, f"{path}: {picture.meaning}")
