"""What could go wrong between steps on a device: options that change their kind, failures in the
middle, captures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.interpreted_gpu import Interpreter, interpreted
from support.side_by_side import make_side, snapshot
from test_gpu_steps import scaled_step

import onepass
from onepass.kernel.gpu import devices
from onepass.kernel.gpu import launch as gpu
from onepass.stepping.gradient_factor import GradientFactor


class Capturing(Interpreter):
    """Says that a graph is being captured where it is told to."""

    now = False

    def is_capturing(self) -> bool:
        return Capturing.now


@pytest.fixture(autouse=True)
def _on_a_device() -> Iterator[None]:
    with interpreted(Capturing):
        yield
    Capturing.now = False


def test_a_number_takes_the_place_of_a_tensor() -> None:
    """Zero among them, which distributed checkpoints set for a step that must change nothing."""
    for number in (0.0, 0.25, 0.0):
        side = make_side(onepass, "adamw", capturable=True, lr=torch.tensor(0.5))
        side.step()
        side.opt.param_groups[0]["lr"] = number
        before = [p.detach().clone() for p in side.params]
        side.step()
        assert all(torch.equal(p, q) for p, q in zip(side.params, before, strict=True)) == (
            number == 0
        )


def test_a_first_step_that_was_skipped_survives_a_new_plan() -> None:
    """Another parameter wakes up after a step that was not finite, and the next one still is a
    first step."""
    ours = make_side(onepass, "momentum", fused=True)
    scaled_step(ours, 8.0, 1.0, [0, 1])
    scaled_step(ours, 8.0, 1.0, [0, 1, 2])
    scaled_step(ours, 8.0, 0.0, [0, 1, 2])
    theirs = make_side(torch.optim, "momentum")
    for only in ([0, 1], [0, 1, 2]):
        theirs.set_gradients(only)
        theirs.opt.zero_grad()
    theirs.step(only=[0, 1, 2])
    for p, q in zip(ours.params, theirs.params, strict=True):
        torch.testing.assert_close(p, q)


class Failing:
    """A function that works so many times, and then fails."""

    def __init__(self, real: Callable[..., Any], times: int) -> None:
        self.real, self.left = real, times

    def __call__(self, *arguments: Any, **how: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("no room")
        return self.real(*arguments, **how)


@pytest.mark.parametrize("options", [{}, {"capturable": True}], ids=["default", "capturable"])
@pytest.mark.parametrize(
    ("what", "times"), [("prepare", 0), ("prepare", 1), ("pin", 0), ("pin", 3), ("pin", 7)]
)
def test_a_launch_that_fails_has_changed_nothing(
    what: str, times: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first or the second of two: compiling for it, or memory for its tables."""
    side = make_side(onepass, "adamw", shapes=((8,), (5, 3)), **options)
    side.params[1].data = side.params[1].detach().double()
    side.set_gradients()
    before = snapshot(side.opt)
    owner: Any = gpu if what == "prepare" else Capturing
    failing = Failing(getattr(owner, what), times)
    with monkeypatch.context() as patch:
        patch.setattr(owner, what, lambda *arguments, **how: failing(*arguments, **how))
        with pytest.raises(RuntimeError, match="no room"):
            side.opt.step()
    assert snapshot(side.opt) == before
    side.opt.step()
    assert snapshot(side.opt) != before


def test_steps_after_a_capture_keep_nothing_more() -> None:
    side = make_side(onepass, "nadam", capturable=True, lr=(lr := torch.tensor(0.1)))
    for _ in range(3):
        side.step()
    side.set_gradients()
    Capturing.now = True
    side.opt.step()
    Capturing.now = False
    kept = len(side.opt._onepass.captured) + len(side.opt._onepass.plan.captured)
    # What a graph reads of the user's is kept, too.
    assert any(t is lr for t in side.opt._onepass.plan.captured)
    for _ in range(20):
        side.step()
    assert len(side.opt._onepass.captured) + len(side.opt._onepass.plan.captured) == kept


def test_sets_of_gradients_that_alternate_send_nothing_again() -> None:
    """Experts that take turns: each set's launch is laid out once."""
    side = make_side(onepass, "adamw", capturable=True)
    sets = ([0, 1], [2, 3], [0, 3])
    gradients = {i: torch.ones_like(p) for i, p in enumerate(side.params)}
    sent = []
    for _ in range(4):
        for only in sets:
            for i, p in enumerate(side.params):
                p.grad = gradients[i] if i in only else None
            side.opt.step()
        (batch,) = side.opt._onepass.plan.kernels
        sent.append(sum(launch.uploads for launch in batch.works.launches.values()))
    assert sent[1:] == [sent[0]] * 3 or sent[2:] == [sent[1]] * 2, sent


def test_the_probe_does_not_depend_on_default_types() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        assert devices.try_out.__wrapped__(torch.device("cpu")) == ""


def test_what_is_sent_does_not_depend_on_the_default_device() -> None:
    with torch.device("meta"):
        factor, guard = GradientFactor(4.0, torch.tensor(1.0, device="cpu")).on(torch.device("cpu"))
    assert factor is not None
    assert guard is not None
    assert (factor.item(), guard.item()) == (0.25, 1.0)


def momentum_after(*steps: str) -> torch.Tensor:
    """The buffer of fused SGD with dampening, whose first step takes the gradient whole; ones are
    the gradients."""
    p = torch.ones(4, requires_grad=True)
    opt = onepass.SGD([p], lr=0.1, momentum=0.9, dampening=0.5, fused=True)
    for step in steps:
        if step == "forget":
            opt.state.clear()
            continue
        p.grad = torch.ones(4)
        opt.grad_scale, opt.found_inf = torch.tensor(1.0), torch.tensor(float(step == "skip"))
        opt.param_groups[0]["lr"] = "x" if step == "error" else 0.1
        if step == "error":
            with pytest.raises((onepass.StepError, TypeError)):
                opt.step()
        else:
            opt.step()
    return opt.state[p]["momentum_buffer"]


@pytest.mark.parametrize(
    "steps",
    [
        ("take", "forget"),
        ("skip",),
        ("skip", "error"),
        ("error",),
        ("skip", "forget"),
        ("skip", "error", "skip"),
    ],
)
def test_whose_step_is_the_first(steps: tuple[str, ...]) -> None:
    assert momentum_after(*steps, "take").tolist() == [1.0] * 4
    torch.testing.assert_close(momentum_after(*steps, "take", "take"), torch.full((4,), 1.4))


def test_a_captured_step_sends_its_addresses_once() -> None:
    side = make_side(onepass, "adamw", capturable=True)
    for _ in range(2):
        side.step()
    for _ in range(3):
        side.set_gradients()
        launch = side.opt._onepass.plan.kernels[0].launch
        before = launch.uploads
        Capturing.now = True
        side.opt.step()
        Capturing.now = False
        assert launch.uploads - before <= 1


def test_sets_that_alternate_send_rows_alone_by_default() -> None:
    side = make_side(onepass, "sgd")
    gradients = {i: torch.ones_like(p) for i, p in enumerate(side.params)}
    for k in range(12):
        for i, p in enumerate(side.params):
            p.grad = gradients[i] if i % 2 == k % 2 else None
        before = sum(
            launch.uploads for batch in _kernels(side) for launch in batch.works.launches.values()
        )
        side.opt.step()
        after = sum(
            launch.uploads for batch in _kernels(side) for launch in batch.works.launches.values()
        )
        assert k < 4 or after - before <= 1


def _kernels(side: Any) -> list[Any]:
    return side.opt._onepass.plan.kernels if side.opt._onepass.plan else []


def test_a_matrix_without_rows_may_be_wide() -> None:
    """Wider than a tile, beside one that has rows: there are shares of nothing to add up."""
    stepped = []
    for shapes in (((3, 300),), ((3, 300), (0, 1000))):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        opt = onepass.Adafactor(params)
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
        stepped.append(params[0].detach())
    assert torch.equal(*stepped)
