"""The checks on a GPU, where there is one: `make test-gpu`. Each is a function of `gpu_checks.py`
and its like."""

from __future__ import annotations

import os

import pytest
import torch
from support import gpu_cases, gpu_checks, gpu_graph_checks, gpu_stream_checks

pytestmark = pytest.mark.gpu


def test_all_checks_are_in_one_list() -> None:
    for module in (gpu_checks, gpu_graph_checks, gpu_stream_checks):
        assert module.check is gpu_cases.check


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", gpu_cases.CHECKS)
def test_on_a_gpu(name: str) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip(
            "other tests of this process have Triton interpret all kernels: run make test-gpu"
        )
    try:
        gpu_cases.run(name, torch.device("cuda", 0))
    except gpu_cases.Skip as why:
        pytest.skip(str(why))
