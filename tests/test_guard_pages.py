"""No step reads or writes a byte beside its tensors: all of them lie at pages without access, see
`guard_pages.py`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from support.subprocess_cases import ROOT, run_script

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="pages are protected by Linux's calls"
)
RUN = "import sys; from support import guard_pages; guard_pages.main(sys.argv[1:])"


def test_steps_keep_to_their_memory() -> None:
    """Every algorithm and type, all awkward sizes, one to four threads; bits are those on ordinary
    memory."""
    assert "all within" in run_script(RUN)


@pytest.mark.slow
def test_every_type() -> None:
    assert "all within" in run_script(RUN, "all", timeout=900)


@pytest.mark.slow
def test_random_rounds() -> None:
    assert "all within" in run_script(RUN, "1", "400", timeout=900)


@pytest.mark.parametrize(
    "wrong", ["touch_what_is_beside(True)", "touch_what_is_beside(False)", "step_too_far()"]
)
def test_a_byte_beside_ends_the_process(wrong: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-c", f"from support import guard_pages; guard_pages.{wrong}"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=100, check=False
    )
    assert done.returncode in (-signal.SIGSEGV, -signal.SIGBUS), done.stderr[-2000:]
