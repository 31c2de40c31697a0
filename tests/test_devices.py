"""Which devices have kernels: every reason why one has none is a sentence, and torch's operations
take over."""

from __future__ import annotations

import builtins
import os
import stat
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.side_by_side import assert_same, both, refuses

import onepass
from onepass import kernel
from onepass.kernel.gpu import devices, jit

CUDA = torch.device("cuda", 0)
ANSWERS = (devices.find_out, devices.try_out, kernel._why_not_here)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Any:
    """No answer is remembered; and a GPU that Triton could serve, whose probe does nothing."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(devices, "try_out", lambda device: "")
    monkeypatch.setattr(devices.Device, "is_capturing", lambda self: False)
    for answer in ANSWERS:
        answer.cache_clear()
    yield
    for answer in ANSWERS:
        answer.cache_clear()


def is_sentence(text: str) -> bool:
    return "\n" not in text and 20 < len(text) < 300


def test_devices_that_triton_does_not_know() -> None:
    for name in ("mps", "hpu"):
        assert (
            kernel.why_no_kernels(torch.device(name)) == f"there are no kernels for {name} devices"
        )


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., Any] = builtins.__import__

    def missing(name: str, *arguments: Any) -> Any:
        if name.split(".")[0] == "triton":
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", missing)
    why = kernel.why_no_kernels(CUDA)
    assert "pip install" in why
    assert is_sentence(why)


def test_a_triton_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", "3.4.0")
    why = kernel.why_no_kernels(CUDA)
    assert "3.5" in why
    assert "3.4.0" in why
    assert is_sentence(why)


def test_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    why = kernel.why_no_kernels(CUDA)
    assert "7.5" in why
    assert "8.0" in why
    assert is_sentence(why)


def test_a_gpu_that_will_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    assert kernel.why_no_kernels(CUDA) == ""


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for folder in (file, file / "below"):
        why = devices.why_unsafe(folder)
        assert "cannot be written" in why
        assert str(folder) in why
        assert is_sentence(why.replace(str(folder), "folder"))
    assert devices.why_unsafe(tmp_path / "not" / "yet") == ""
    if hasattr(os, "geteuid") and os.geteuid():
        tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
        assert "cannot be written" in devices.why_unsafe(tmp_path / "below")


@pytest.mark.skipif(sys.platform == "win32", reason="folders have no such modes there")
def test_a_cache_that_everybody_can_write(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    assert "every user can write" in devices.why_unsafe(tmp_path)
    # In a folder like /tmp nobody can replace what others have put there, but be there before them.
    tmp_path.chmod(0o1777)
    assert "every user can write" in devices.why_unsafe(tmp_path)
    assert devices.why_unsafe(tmp_path / "below") == ""
    tmp_path.chmod(0o700)
    assert devices.why_unsafe(tmp_path) == ""


def test_whatever_goes_wrong_in_a_first_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no C compiler\nand more")

    monkeypatch.setattr(devices, "load", fail)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: None)
    why = devices.try_out.__wrapped__(torch.device("cpu"))
    assert why == "Triton cannot run kernels on cpu (RuntimeError: no C compiler)"


def test_torchs_operations_take_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one warning, and the same results; step counts lie where torch has them."""
    monkeypatch.setattr(kernel, "on_host", lambda device: False)
    monkeypatch.setattr(kernel, "why_no_kernels", lambda device: "Triton is missing")
    sides = both("adamw")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for side in sides * 3:
            side.step()
    assert [str(w.message) for w in caught] == [
        "AdamW steps on the slower eager backend: Triton is missing"
    ]
    assert_same(sides)
    assert not sides[0].opt._onepass.plan.kernels


def test_generated_code_never_lies_in_a_file() -> None:
    """What is run is what was generated, whatever is on disk; a traceback still shows its lines."""
    module = jit.load(jit.Source("def f():\n    raise ValueError('here')\n", ()))
    path = module["f"].__code__.co_filename
    assert not Path(path).exists()
    with pytest.raises(ValueError, match="here") as caught:
        module["f"]()
    assert "raise ValueError('here')" in str(caught.traceback[-1].statement)


def test_the_door_says_why_for_real_devices() -> None:
    assert kernel.why_no_kernels(torch.device("cpu")) == ""
    assert onepass.AdamW([torch.ones(1, requires_grad=True)]).param_groups


def test_a_step_of_the_eager_backend_is_not_captured_unless_it_may_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A graph would hold its step count for ever; torch raises, too."""
    monkeypatch.setattr(kernel, "is_capturing", lambda device: True)
    how = {"foreach": False, "fused": False}
    for options, may_be in (({}, False), ({"capturable": True}, True)):
        side = both("adamw", **how, **options)[0]
        if may_be:
            side.step()
        else:
            side.set_gradients()
            refuses(side.opt, "needs capturable=True")
