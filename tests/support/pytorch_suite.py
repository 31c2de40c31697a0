"""PyTorch's own tests of optimizers, schedulers and averages, run with onepass in the place of
torch.optim.

    python tests/support/pytorch_suite.py FOLDER

FOLDER is the folder `test` of PyTorch's source code, as of https://github.com/pytorch/pytorch at
v2.6.0; its files are run as they are. They run twice: with torch.optim, which says which of them
the installed torch passes, and with every public name of torch.optim pointed at that of onepass.
The last line is the score. `-k WORDS` is handed on to pytest.

This file is also the plugin of pytest that does the pointing and writes down how each test went.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

FILES = (
    "test_optim.py",
    "optim/test_optim.py",
    "optim/test_lrscheduler.py",
    "optim/test_swa_utils.py",
)
PARTS = ("", ".lr_scheduler", ".swa_utils")
# Where the plugin writes how each test went, and whether it is to put onepass in the place of
# torch.optim.
OUT, PLACE = "PYTORCH_SUITE_OUT", "PYTORCH_SUITE_PLACE"


def counterparts() -> Iterator[tuple[Any, Any]]:
    """Every class and function of torch.optim, and that of onepass which has its name."""
    import importlib

    for part in PARTS:
        theirs, ours = (importlib.import_module(name + part) for name in ("torch.optim", "onepass"))
        for name, value in vars(theirs).items():
            defined_here = getattr(value, "__module__", "").startswith("torch.optim")
            if defined_here and not name.startswith("__") and callable(getattr(ours, name, None)):
                yield value, getattr(ours, name)


def put_in_place() -> None:
    """Let those who import torch.optim from now on, and torch's helpers for tests, find onepass.

    onepass itself keeps torch's modules; the others get copies.
    """
    import torch
    from torch.testing._internal import common_optimizers

    ours = {id(theirs): mine for theirs, mine in counterparts()}

    def point(names: dict[str, Any]) -> None:
        names.update({name: ours[id(value)] for name, value in names.items() if id(value) in ours})

    copies: dict[str, ModuleType] = {}
    for name, module in list(sys.modules.items()):
        if name == "torch.optim" or name.startswith("torch.optim."):
            copies[name] = ModuleType(name, module.__doc__)
            vars(copies[name]).update(vars(module))
            point(vars(copies[name]))
        elif name.startswith("torch.testing._internal"):
            point(vars(module))
    for module in copies.values():
        inner = {
            n: copies[f"torch.optim.{n}"] for n in vars(module) if f"torch.optim.{n}" in copies
        }
        vars(module).update(inner)
    sys.modules.update(copies)
    torch.optim = copies["torch.optim"]
    for info in common_optimizers.optim_db:
        info.optim_cls = ours[id(info.optim_cls)]


# What pytest calls.


def pytest_configure(config: Any) -> None:
    if os.environ.get(PLACE):
        put_in_place()


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leave out classes of tests that one file imports from another."""
    items[:] = [
        item for item in items if item.cls is None or item.cls.__module__ == item.module.__name__
    ]


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        crash = getattr(report.longrepr, "reprcrash", None)
        line = crash.message.partition("\n")[0] if report.failed and crash else ""
        with open(os.environ[OUT], "a") as file:
            file.write(json.dumps([report.nodeid, report.outcome, line]) + "\n")


# The command.


def run(folder: Path, place: bool, words: str) -> dict[str, tuple[str, str]]:
    """How each test went, and its error."""
    found: dict[str, tuple[str, str]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in FILES:
            out = Path(scratch, name.replace("/", "-"))
            plugin = Path(__file__)
            paths = os.pathsep.join(
                filter(None, (str(plugin.parent), os.environ.get("PYTHONPATH", "")))
            )
            variables = os.environ | {
                "PYTHONPATH": paths,
                OUT: str(out),
                PLACE: "1" if place else "",
            }
            options = [
                "-q",
                "--disable-warnings",
                "--tb=short",
                "-p",
                "no:cacheprovider",
                "-p",
                "no:randomly",
            ]
            command = [
                sys.executable,
                "-m",
                "pytest",
                *options,
                "-p",
                plugin.stem,
                name,
                *(["-k", words] if words else []),
            ]
            done = subprocess.run(
                command, cwd=folder, env=variables, capture_output=True, text=True
            )
            lines = out.read_text().splitlines() if out.exists() else []
            if not lines and not words:
                sys.exit(f"{name} did not run:\n{(done.stdout + done.stderr)[-2000:]}")
            found |= {
                f"{name}::{test.partition('::')[2]}": (went, line)
                for test, went, line in map(json.loads, lines)
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Run PyTorch's own optimizer tests with onepass.")
    parser.add_argument("folder", type=Path, help="the folder `test` of PyTorch's source code")
    parser.add_argument(
        "-k", dest="words", default="", help="only tests whose names have these words"
    )
    args = parser.parse_args()
    missing = [name for name in FILES if not (args.folder / name).exists()]
    if missing:
        parser.error(
            f"{args.folder} has no {missing[0]}: give the folder `test` of PyTorch's source code"
        )
    theirs, ours = (run(args.folder.resolve(), place, args.words) for place in (False, True))
    due = [test for test, (went, _) in theirs.items() if went == "passed"]
    lost = [test for test in due if ours.get(test, ("not run", ""))[0] != "passed"]
    for name in FILES:
        here = [test for test in due if test.startswith(f"{name}::")]
        print(f"{name}: {len(here) - len([t for t in lost if t in here])} of {len(here)}")
    for test in lost:
        print("lost:", test, *ours.get(test, ("not run", "")))
    print(f"score: {len(due) - len(lost)} of {len(due)} tests that torch {version()} passes")


def version() -> str:
    import torch

    return torch.__version__


if __name__ == "__main__":
    main()
