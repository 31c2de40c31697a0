"""Threads on one optimizer: they take turns, nobody reads freed memory, and nothing waits for ever."""

from __future__ import annotations

import copy
import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
import torch
from processes import fates
from torch import nn

import onepass

COUNT, SIZE = 4, 3000


@contextmanager
def switching() -> Iterator[None]:
    """Threads that are changed as often as they can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def in_threads(*works: Callable[[], None]) -> None:
    """Run functions side by side; the first error of any of them is raised."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # must reach the main thread
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def step_in_threads(name: str, steps: int, threads: int, *, drops: bool) -> None:
    """Every step subtracts whole numbers, or counts; values that come from freed memory do neither."""
    params = [nn.Parameter(torch.zeros(SIZE)) for _ in range(COUNT)]
    optimizer = getattr(onepass, name)(params, lr=1.0)

    def work() -> None:
        for _ in range(steps):
            for p in params:
                p.grad = torch.ones(SIZE)
            optimizer.step()
            if drops:
                optimizer.zero_grad()

    with switching():
        in_threads(*[work] * threads)
    values = torch.cat([p.detach() for p in params])
    assert torch.isfinite(values).all()
    if name == "SGD":
        assert torch.equal(values, values.round())
        assert -steps * threads <= values.min() <= values.max() <= 0
    if not drops:
        assert name != "SGD" or torch.equal(values, torch.full_like(values, -steps * threads))
        assert all(state["step"] == steps * threads for state in optimizer.state.values())


def steps_of_one_optimizer() -> None:
    for threads in (2, 4):
        for drops in (False, True):
            step_in_threads("SGD", 100, threads, drops=drops)
            step_in_threads("Adam", 60, threads, drops=drops)


def twenty_runs() -> None:
    for run in range(20):
        step_in_threads("SGD", 300, 2, drops=run % 2 == 1)


def shared_parameters() -> None:
    """Each thread has an optimizer of its own on the same parameters, as in Hogwild."""
    params = [nn.Parameter(torch.zeros(SIZE)) for _ in range(COUNT)]

    def work() -> None:
        optimizer = onepass.SGD(params, lr=1.0)
        for _ in range(100):
            for p in params:
                p.grad = torch.ones(SIZE)
            optimizer.step()

    with switching():
        in_threads(work, work, work)
    for p in params:
        assert torch.equal(p.detach(), p.detach().round())
        assert -300 <= p.min() <= p.max() <= -1


def others_change_everything() -> None:
    """Beside a thread that steps, others drop gradients and state, save, load, copy and add groups."""
    params = [nn.Parameter(torch.zeros(SIZE)) for _ in range(COUNT)]
    optimizer = onepass.AdamW(params, lr=0.01)
    for p in params:
        p.grad = torch.ones(SIZE)
    optimizer.step()
    over = threading.Event()

    def step() -> None:
        try:
            for _ in range(200):
                for p in params:
                    p.grad = torch.ones(SIZE)
                optimizer.step()
        finally:
            over.set()

    def repeatedly(action: Callable[[], object]) -> Callable[[], None]:
        def work() -> None:
            while not over.is_set():
                action()
                time.sleep(1e-3)

        return work

    added: list[nn.Parameter] = []

    def add() -> None:
        if len(added) < 20:
            added.append(nn.Parameter(torch.zeros(7)))
            optimizer.add_param_group({"params": [added[-1]]})

    def reload() -> None:
        # A group may have been added between saving and loading.
        with suppress(ValueError):
            optimizer.load_state_dict(optimizer.state_dict())

    actions = (optimizer.zero_grad, reload, lambda: optimizer.state.clear(), add)
    with switching():
        in_threads(step, *map(repeatedly, actions))
    assert all(torch.isfinite(p).all() and p.abs().max() <= 2.1 for p in params)


def recursion_and_waiting() -> None:
    """Closures and hooks may step the same optimizer, also in another thread that they wait for."""
    p = nn.Parameter(torch.zeros(3))
    optimizer = onepass.SGD([p], lr=1.0)
    p.grad = torch.ones(3)

    def steps_itself() -> float:
        optimizer.step()
        return 1.0

    def waits_for_another() -> float:
        thread = threading.Thread(target=optimizer.step)
        thread.start()
        thread.join(20)
        assert not thread.is_alive()
        return 2.0

    assert optimizer.step(steps_itself) == 1.0
    assert optimizer.step(waits_for_another) == 2.0
    assert p.tolist() == [-4.0] * 3
    depth = [0]

    def steps_again(*_: object) -> None:
        depth[0] += 1
        if depth[0] < 3:
            optimizer.step()
        optimizer.state_dict()

    handle = optimizer.register_step_post_hook(steps_again)
    optimizer.step()
    handle.remove()
    assert p.tolist() == [-7.0] * 3


def a_forked_child_steps() -> None:
    """A thread holds the turn when the process forks; the child has no such thread, and steps."""
    torch.set_num_threads(1)
    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    optimizer = onepass.SGD([p], lr=1.0)
    optimizer.step()
    held, free = threading.Event(), threading.Event()

    def hold() -> None:
        with optimizer._turn:
            held.set()
            free.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(20)
    child = os.fork()
    if child == 0:
        optimizer.step()
        os._exit(0 if p.tolist() == [-2.0] * 3 else 1)
    _, status = os.waitpid(child, 0)
    free.set()
    thread.join()
    assert status == 0


QUICK = (
    steps_of_one_optimizer,
    shared_parameters,
    others_change_everything,
    recursion_and_waiting,
    a_forked_child_steps,
)


@pytest.fixture(scope="module")
def known_fates() -> dict[str, str]:
    """What has become of each: in processes of their own, as each may crash or wait for ever."""
    return fates(__file__, [case.__name__ for case in QUICK])


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.__name__)
def test_survives(case: Callable[[], None], known_fates: dict[str, str]) -> None:
    assert known_fates[case.__name__] == "ok", f"{case.__name__}: {known_fates[case.__name__]}"


@pytest.mark.slow
@pytest.mark.parametrize("tenth", range(10))
def test_two_hundred_runs(tenth: int) -> None:
    assert fates(__file__, ["twenty_runs"])["twenty_runs"] == "ok"


def test_copies_do_not_see_the_turn() -> None:
    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    optimizer = onepass.Adam([p])
    optimizer.step()
    with optimizer._turn:
        copies = [copy.deepcopy(optimizer), copy.copy(optimizer), pickle.loads(pickle.dumps(optimizer))]
        copies.append(copy.deepcopy(vars(optimizer)["_turn"]))
    for made in copies[:-1]:
        done = threading.Event()
        thread = threading.Thread(target=lambda made=made, done=done: (made.step(), done.set()))
        thread.start()
        assert done.wait(20)
        thread.join()
