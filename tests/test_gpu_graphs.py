"""Steps that are captured in a graph: replayed among eager ones, they do what an eager step
would."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support.interpreted_gpu import Interpreter, interpreted
from support.side_by_side import ALGORITHMS, make_side
from torch import Tensor

import onepass
from onepass.kernel.gpu import launch as gpu


class Recording(Interpreter):
    """While a graph is captured, copies and kernels are noted, and done when it is replayed."""

    work: list[Callable[[], Any]] | None = None

    def is_capturing(self) -> bool:
        return Recording.work is not None

    def pin(self, count: int, dtype: torch.dtype) -> Tensor:
        assert Recording.work is None
        return super().pin(count, dtype)

    def send(self, pinned: Tensor) -> Tensor:
        if Recording.work is None:
            return super().send(pinned)
        # What an eager step would read of it, before a replay: nothing of use.
        sent = torch.full_like(pinned, 7)
        Recording.work.append(lambda: sent.copy_(pinned))
        return sent


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> type[Recording]:
    monkeypatch.setattr(Recording, "work", None)
    start, copy = gpu.Kernel.start, torch._foreach_copy_

    def queue(do: Callable[[], Any]) -> None:
        do() if Recording.work is None else Recording.work.append(do)

    monkeypatch.setattr(
        gpu.Kernel, "start", lambda *given, **constants: queue(lambda: start(*given, **constants))
    )
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *given: queue(lambda: copy(*given)))
    return Recording


def captured_step(recording: Any, opt: Any) -> list[Callable[[], Any]]:
    recording.work = []
    try:
        opt.step()
        return recording.work
    finally:
        recording.work = None


CAPTURABLE = [
    name
    for name, (cls, _) in ALGORITHMS.items()
    if "capturable" in inspect.signature(getattr(onepass, cls)).parameters
]


def scheduled(opt: Any, k: int) -> None:
    """A rate that changes in place, where it lies on the device, or as a number."""
    lr = opt.param_groups[0]["lr"]
    if isinstance(lr, Tensor):
        lr.fill_(0.1 / (k + 1))
    else:
        opt.param_groups[0]["lr"] = float(torch.tensor(0.1 / (k + 1)))


@pytest.mark.parametrize("algorithm", CAPTURABLE)
def test_a_replayed_graph_is_an_eager_step(algorithm: str, recording: Any) -> None:
    """Captured once, replayed among eager steps with gradients of other places, while the rate
    changes: as eagerly."""
    host = make_side(onepass, algorithm)
    ours = make_side(onepass, algorithm, lr=torch.tensor(0.1), capturable=True)
    ends = []
    for side in (host, ours):
        fixed = [side.randn(*p.shape) for p in side.params]
        graph: list[Callable[[], Any]] = []
        with interpreted(Recording) if side is ours else nullcontext():
            for k in range(9):
                scheduled(side.opt, k)
                values = [side.randn(*p.shape) for p in side.params]
                eager = side is host or k in (0, 1, 5, 7)
                if k == 3 and side is ours:
                    before = [p.detach().clone() for p in side.params]
                    for p, g in zip(side.params, fixed, strict=True):
                        p.grad = g
                    graph = captured_step(recording, side.opt)
                    assert all(torch.equal(p, q) for p, q in zip(side.params, before, strict=True))
                if eager or not graph:
                    for p, g in zip(side.params, values, strict=True):
                        p.grad = g
                    side.opt.step()
                else:
                    for g, value in zip(fixed, values, strict=True):
                        g.copy_(value)
                    for do in graph:
                        do()
        ends.append(side.opt)
    for p, q in zip(*(opt.param_groups[0]["params"] for opt in ends), strict=True):
        assert torch.equal(p, q)
    for a, b in zip(*(list(opt.state.values()) for opt in ends), strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
