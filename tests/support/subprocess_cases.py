"""Run cases that might crash, each in a process of its own: `python subprocess_cases.py MODULE
CASE...` prints their fates.

One interpreter loads torch and the module once and forks for every case, so that a case costs
milliseconds and a crash takes nobody along. A case is a function of the module without arguments;
it passes by returning.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIME_LIMIT = 60


def fates(module: str, cases: Sequence[str]) -> dict[str, str]:
    """What became of each case: "ok", a traceback, or the signal that ended it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-X", "faulthandler", __file__, module, *cases]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FATE ")]
    known = dict(json.loads(line.removeprefix("FATE ")) for line in lines)
    return {
        case: known.get(case, f"never ended: rc {done.returncode}\n{done.stderr[-2000:]}")
        for case in cases
    }


def run_script(text: str, *arguments: str, timeout: float = 120) -> str:
    """Run a script in a new interpreter; what it printed. Fails where it does, or where a signal
    ends it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-W", "error", "-c", text, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=timeout, check=False
    )
    assert done.returncode == 0, (
        f"rc {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    )
    return done.stdout


def _load(module: str) -> object:
    spec = importlib.util.spec_from_file_location(Path(module).stem, module)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def _run(function) -> str:
    """The fate of one case, run in a forked child."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        signal.alarm(TIME_LIMIT)
        warnings.simplefilter("error")
        fate = "ok"
        try:
            function()
        except BaseException:  # a case may fail in any way: its traceback is the report
            fate = traceback.format_exc()
        os.write(writing, fate.encode()[-60000:])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        fate = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return fate


def main() -> None:
    module, *cases = sys.argv[1:]
    sys.path.append(str(ROOT / "tests"))
    loaded = _load(module)
    gc.freeze()
    for case in cases:
        print("FATE " + json.dumps([case, _run(getattr(loaded, case))]), flush=True)


if __name__ == "__main__":
    main()
