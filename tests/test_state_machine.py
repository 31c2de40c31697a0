"""Random actions on every optimizer, each step against float64; see `state_machine.py` and
`user_actions.py`."""

from __future__ import annotations

from collections import Counter
from functools import wraps
from typing import Any

import pytest
import torch
from support.state_machine import KINDS, Fault, Machine, make_machine
from support.user_actions import ACTIONS

import onepass
from onepass import optimizer
from onepass.stepping import repeat
from onepass.stepping.batch import KernelBatch

over_algorithms = pytest.mark.parametrize("algorithm", KINDS)


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """More would wait for each other: the parameters are small."""


def different_actions(counts: Counter[str], least: int = 1) -> int:
    """How many of the actions were done at least so often."""
    return sum(count >= least for name, count in counts.items() if name.startswith("action "))


@over_algorithms
def test_sample(algorithm: str) -> None:
    """Sixty actions: nothing changes in a step that raises, and all others are where float64 is."""
    counts = make_machine(algorithm, 2).run(60)
    assert different_actions(counts) >= 20
    assert counts["steps"] >= 30
    assert counts["steps that raised"] >= 3
    assert counts["elements compared"] >= 20 * counts["steps"]
    assert counts["elements skipped"] <= 0.2 * counts["elements compared"]


@pytest.mark.slow
@over_algorithms
def test_ten_thousand_actions(algorithm: str) -> None:
    """In parts, so that numbers which have gone astray in one do not stand for all."""
    counts: Counter[str] = Counter()
    for seed in range(100, 120):
        counts += make_machine(algorithm, seed).run(500)
    assert counts["actions"] == 10_000
    assert different_actions(counts, 20) >= 40
    assert counts["steps"] >= 6_000
    assert counts["steps that raised"] >= 400
    assert counts["elements compared"] >= 20 * counts["steps"]
    assert counts["elements skipped"] <= 0.1 * counts["elements compared"]


@over_algorithms
def test_there_is_enough_to_do(algorithm: str) -> None:
    machine = make_machine(algorithm, 0)
    assert sum(action.fits(machine) for action in ACTIONS) >= 40


@over_algorithms
def test_a_seed_makes_one_run(algorithm: str) -> None:
    """The same actions, and the same bits at the end."""
    runs = [make_machine(algorithm, 7) for _ in range(2)]
    for machine in runs:
        machine.run(8)
    assert runs[0].log == runs[1].log
    for p, q in zip(runs[0].params, runs[1].params, strict=True):
        assert torch.equal(
            torch.nan_to_num(p.detach().resolve_neg()), torch.nan_to_num(q.detach().resolve_neg())
        )


# What the machine must notice.


def assert_noticed(words: str, algorithm: str = "adam", actions: int = 300) -> None:
    """A run ends, and says so."""
    with pytest.raises(Fault, match=words):
        make_machine(algorithm, 3).run(actions)


def spoiled_number(monkeypatch: pytest.MonkeyPatch, cls: Any, name: str, factor: float) -> None:
    """Let a rule take one of its numbers for another one."""
    right = cls.rule

    @wraps(right)
    def rule(*columns: Any, **options: Any) -> Any:
        return right(*columns, **options | {name: options[name] * factor})

    monkeypatch.setattr(cls, "rule", staticmethod(rule))


def test_notices_a_rate_that_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    spoiled_number(monkeypatch, onepass.Adam, "lr", 1.01)
    assert_noticed("elements are off")


def test_notices_a_moment_that_forgets_too_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    spoiled_number(monkeypatch, onepass.RMSprop, "alpha", 0.999)
    assert_noticed("elements are off", "rmsprop")


def spoiled_finish(monkeypatch: pytest.MonkeyPatch, spoil: Any) -> None:
    """Let something happen in each 20th launch."""
    monkeypatch.setattr(repeat, "ENABLED", False)
    right, calls = KernelBatch.finish, [0]

    def finish(self: Any, gathered: Any, step: Any) -> None:
        calls[0] += 1
        if calls[0] % 20:
            right(self, gathered, step)
        else:
            spoil(lambda: right(self, gathered, step), step.reading)

    monkeypatch.setattr(KernelBatch, "finish", finish)


def test_notices_an_update_that_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    spoiled_finish(monkeypatch, lambda right, reading: None)
    assert_noticed("off|count of steps|version")


def test_notices_a_count_that_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeat, "ENABLED", False)
    monkeypatch.setattr(KernelBatch, "keep_numbers", lambda self: None)
    assert_noticed("count of steps")


def test_notices_a_gradient_that_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(right: Any, reading: Any) -> None:
        right()
        next(g for g in reading.grads if g is not None).data.view(-1)[:1].add_(1)

    spoiled_finish(monkeypatch, spoil)
    assert_noticed("has changed gradients|view")


def test_notices_an_update_of_a_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    """One element of another parameter moves by a part in a thousand."""

    def spoil(right: Any, reading: Any) -> None:
        right()
        reading.params[-1].data.view(-1)[:1].mul_(1.001)

    spoiled_finish(monkeypatch, spoil)
    assert_noticed("elements are off|view")


@pytest.mark.parametrize("what", ["parameter", "state", "version", "option"])
def test_notices_a_failing_step_that_leaves_a_trace(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = optimizer.make_ready

    def make_ready(self: Any, *arguments: Any) -> Any:
        try:
            return right(self, *arguments)
        except BaseException:
            p = self.param_groups[-1]["params"][-1]
            if what == "parameter":
                p.data.view(-1)[:1].add_(1)
            elif what == "version":
                torch.autograd.graph.increment_version(p)
            elif what == "state":
                self.state[p]["trace"] = 1
            else:
                self.param_groups[0]["lr"] = float(self.param_groups[0]["lr"]) + 1e-3
            raise

    monkeypatch.setattr(optimizer, "make_ready", make_ready)
    assert_noticed("has changed")


def test_notices_a_half_applied_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """What raises in the middle is known to have stored before."""

    def spoil(right: Any, reading: Any) -> None:
        right()
        raise KeyboardInterrupt

    spoiled_finish(monkeypatch, spoil)

    def run(machine: Machine) -> None:
        for _ in range(40):
            machine.set_gradients(missing=0.0)
            machine.step(may_raise=True)

    with pytest.raises(Fault, match=r"KeyboardInterrupt.*has changed.*parameters"):
        run(make_machine("adam", 3))


def test_notices_updates_that_are_lost_in_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nobody looked who shares memory: copies of the same memory are written back one after
    the other."""
    monkeypatch.setattr("onepass.stepping.plan.find_shared", lambda *_: ())
    monkeypatch.setattr("onepass.stepping.plan.Plan._is_shared_as_before", lambda self: True)

    def run() -> None:
        for seed in range(6):
            make_machine("adafactor", seed).run(150)

    with pytest.raises(Fault, match="elements are off"):
        run()
