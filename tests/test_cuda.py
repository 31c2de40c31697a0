"""The checks on a GPU, where there is one: `make test-gpu`. Each is a function of `cuda_checks.py`
and its like."""

from __future__ import annotations

import os

import cuda_checks
import cuda_graphs
import cuda_rig
import cuda_streams
import pytest
import torch

pytestmark = pytest.mark.gpu


def test_all_checks_are_in_one_list() -> None:
    for module in (cuda_checks, cuda_graphs, cuda_streams):
        assert module.check is cuda_rig.check


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", cuda_rig.CHECKS)
def test_on_a_gpu(name: str) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip(
            "other tests of this process have Triton interpret all kernels: run make test-gpu"
        )
    try:
        cuda_rig.run(name, torch.device("cuda", 0))
    except cuda_rig.Skip as why:
        pytest.skip(str(why))
