"""Triton's own path from a step to a launch, with a driver that only takes notes: what is compiled,
and when."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

# Not imported here: where tests interpret kernels, it must be told so before.
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def reports() -> dict[str, Any]:
    """Of a process in which Triton compiles: where tests interpret, it cannot."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(HERE), str(HERE.parent), environment.get("PYTHONPATH", "")]
    )
    command = [sys.executable, "-W", "error", str(HERE / "support" / "triton_launches.py")]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout)


@pytest.mark.parametrize("case", ["sgd", "adamw"])
def test_a_step_is_one_launch(case: str, reports: dict[str, Any]) -> None:
    """For all tensors of all groups."""
    assert reports[case]["launches"] == {"pass_0": 1}


@pytest.mark.parametrize("case", ["adamw fused", "adamw capturable", "nadam capturable"])
def test_numbers_on_the_device_take_one_more(case: str, reports: dict[str, Any]) -> None:
    assert reports[case]["launches"] == {"uniforms_0": 1, "pass_0": 1}


def test_passes_over_matrices_take_one_for_each_width_of_tiles(reports: dict[str, Any]) -> None:
    launches = reports["adafactor"]["launches"]
    assert launches["pass_0"] == 2
    assert launches["uniforms_0"] == launches["uniforms_1"] == 1


CASES = ("sgd", "adamw", "adamw fused", "adamw capturable", "nadam capturable", "adafactor", "muon")


@pytest.mark.parametrize("case", CASES)
def test_a_second_step_launches_what_the_first_did(case: str, reports: dict[str, Any]) -> None:
    assert reports[case]["second"] == reports[case]["launches"]


@pytest.mark.parametrize("case", CASES)
def test_only_the_first_step_compiles(case: str, reports: dict[str, Any]) -> None:
    """Whatever changes: learning rates, who has a gradient, how many tensors there are, and with
    them all tables."""
    assert reports[case]["compiled"] > 0
    assert reports[case]["later"] == reports[case]["compiled"]
