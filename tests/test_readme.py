"""What the README shows is what runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

import onepass

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def lion() -> type[onepass.Optimizer]:
    names: dict[str, type[onepass.Optimizer]] = {}
    exec(next(block for block in BLOCKS if "class Lion" in block), names)
    return names["Lion"]


def test_the_one_line():
    names: dict[str, object] = {}
    exec(BLOCKS[0], names)
    assert names["optim"] is onepass


def test_ones_own_rule_takes_twelve_lines():
    block = next(block for block in BLOCKS if "class Lion" in block)
    assert len([line for line in block.splitlines() if line.strip()]) <= 12
    example = (ROOT / "examples" / "lion.py").read_text(encoding="utf-8")
    rule = block[block.index("class Lion") :].strip()
    assert rule in example


def test_ones_own_rule_gets_the_kernel():
    """And computes what the paper says: one state, and updates of constant size."""
    torch.manual_seed(0)
    p = torch.randn(100, requires_grad=True)
    optimizer = lion()([p], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    expected, m = p.detach().double(), torch.zeros(100, dtype=torch.float64)
    for _ in range(5):
        p.grad = torch.randn(100)
        g = p.grad.double()
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * torch.sign(0.9 * m + 0.1 * g)
        m = 0.99 * m + 0.01 * g
        optimizer.step()
    plan = optimizer._onepass.plan
    assert plan is not None
    assert len(plan.kernels) == 1
    assert not plan.eager
    torch.testing.assert_close(p.detach().double(), expected, atol=1e-6, rtol=0)


def test_the_example_runs():
    # Its model is small: two threads would only wait for each other, for long where others test at
    # the same time.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "examples" / "lion.py"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert ran.stdout.startswith("y = 3.0"), ran.stdout


def test_what_it_links_to_is_there():
    for page in (
        ROOT / "README.md",
        ROOT / "README.zh-CN.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
        ROOT / "benchmarks/README.md",
    ):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
