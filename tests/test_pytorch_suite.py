"""The script that runs PyTorch's own tests: what it puts in the place of torch.optim, and what it
counts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import pytorch_suite

SCRIPT = Path(pytorch_suite.__file__)
HEAD = """
import sys
import unittest
import torch
from torch.optim import SGD, Optimizer, lr_scheduler
from torch.optim.adam import Adam
from torch.testing._internal.common_optimizers import optim_db


def is_ours():
    return "onepass" in torch.optim.AdamW.__module__
"""
TESTS = {
    "test_optim.py": """
class T(unittest.TestCase):
    def test_names(self):
        ours = {"onepass"} if is_ours() else {"torch"}
        names = [SGD, Optimizer, Adam, torch.optim.Muon, lr_scheduler.StepLR]
        names += [torch.optim.lr_scheduler.LambdaLR]
        names += [torch.optim.swa_utils.AveragedModel, torch.optim.swa_utils.SWALR]
        names += [i.optim_cls for i in optim_db]
        assert {cls.__module__.partition(".")[0] for cls in names} == ours

    def test_torch_passes(self):
        assert not is_ours(), "a sentence, that is\\nshown"

    def test_only_ours_passes(self):
        assert is_ours()

    def test_steps(self):
        p = torch.nn.Parameter(torch.ones(2))
        opt, p.grad = SGD([p], lr=0.5), torch.ones(2)
        opt.step()
        assert p.tolist() == [0.5, 0.5]
""",
    "optim/test_optim.py": "class T(unittest.TestCase):\n    def test_it(self):\n        pass\n",
    "optim/test_lrscheduler.py": """
from test_optim import T


class U(unittest.TestCase):
    def test_it(self):
        pass
""",
    "optim/test_swa_utils.py": """
class T(unittest.TestCase):
    def test_skipped(self):
        self.skipTest("not here")

    def test_it(self):
        pass
""",
}


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, env=variables)


@pytest.mark.slow
def test_counts_what_torch_passes_and_onepass_does_not(tmp_path: Path) -> None:
    for name, text in TESTS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(HEAD + text)
    done = run(tmp_path)
    lines = done.stdout.splitlines()
    assert lines[:4] == [
        "test_optim.py: 2 of 3",
        "optim/test_optim.py: 1 of 1",
        "optim/test_lrscheduler.py: 1 of 1",
        "optim/test_swa_utils.py: 1 of 1",
    ], done.stdout + done.stderr
    assert lines[4].startswith(
        "lost: test_optim.py::T::test_torch_passes failed AssertionError: a sentence, that is"
    )
    assert lines[5].startswith("score: 5 of 6 tests that torch")


@pytest.mark.parametrize("folder", ["", "nowhere"])
def test_another_folder(folder: str, tmp_path: Path) -> None:
    done = run(tmp_path / folder)
    assert done.returncode == 2
    assert "has no test_optim.py: give the folder `test` of PyTorch's source code" in done.stderr
