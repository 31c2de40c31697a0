"""What all tests share: reproducible random numbers, and torch's global settings as each test found
them."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import numpy as np
import pytest
import torch

hypothesis.settings.register_profile("onepass", deadline=None, derandomize=True)
hypothesis.settings.load_profile("onepass")


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Every test begins with the same seed, and leaves no changed thread count or default dtype
    behind."""
    torch.manual_seed(0)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    if torch.get_default_dtype() != dtype:
        torch.set_default_dtype(dtype)


@pytest.fixture
def rng() -> np.random.Generator:
    """NumPy's random numbers, the same for every test."""
    return np.random.default_rng(0)


@pytest.fixture
def one_thread() -> None:
    """For models that are too small for more, which on a busy machine only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def no_warning_of_ours(recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    """For tests that ignore the warnings of other packages: there must be none of ours, nor one of
    a wrong order."""
    yield
    ours = [w for w in recwarn if "onepass" in str(w.filename) or "eager backend" in str(w.message)]
    ours += [w for w in recwarn if "lr_scheduler.step()" in str(w.message)]
    assert not ours, [str(w.message) for w in ours]
