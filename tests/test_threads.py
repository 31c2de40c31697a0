"""Threads that use one optimizer, or one another's parameters and gradients: no crash, no lost
step, no deadlock.

Cases are functions `crash_*`, run in processes of their own with a time limit
(`subprocess_cases.py`).
"""

from __future__ import annotations

import copy
import io
import itertools
import os
import pickle
import random
import sys
import threading
import time
import traceback
import types
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import pytest
import torch
from support.subprocess_cases import fates, run_script
from torch import Tensor, nn

import onepass
from onepass.stepping.reading import drop_gradients

SIZE = 3000
# What a step may say where another thread changes things under it.
CHANGED = (RuntimeError, KeyError)


def together(*work: Callable[[], Any], limit: float = 50.0) -> None:
    """Run functions in threads that change places as often as they can; errors of any reach the
    caller."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(work))

    def begin(function: Callable[[], Any]) -> None:
        try:
            barrier.wait()
            function()
        except BaseException as error:  # must reach the main thread
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=begin, args=(function,), daemon=True) for function in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(limit)
    sys.setswitchinterval(interval)
    assert not any(thread.is_alive() for thread in threads), "threads wait for one another"
    if errors:
        raise errors[0]


def ones(params: Sequence[Tensor]) -> None:
    for p in params:
        p.grad = torch.ones_like(p)


def zeros(count: int = 4, size: int = SIZE) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(size)) for _ in range(count)]


def assert_whole(params: Sequence[Tensor], least: int) -> None:
    """Steps of SGD by 1 leave whole numbers, and not more of them than there were steps."""
    values = torch.cat([p.detach() for p in params])
    assert bool((values == values.round()).all()), values[values != values.round()][:5]
    assert bool((values <= 0).all()), values.max()
    assert bool((values >= least).all()), values.min()


# (a) One optimizer.


def step_one_optimizer(threads: int, steps: int, zero_grad: bool = False, **options: Any) -> None:
    params = zeros()
    opt = onepass.SGD(params, lr=1.0, **options)

    def work() -> None:
        for _ in range(steps):
            ones(params)
            opt.step()
            if zero_grad:
                opt.zero_grad()

    together(*[work] * threads)
    assert_whole(params, -threads * steps)
    if not zero_grad:
        # The gradients are always there: every step moves every weight.
        assert torch.equal(
            torch.cat([p.detach() for p in params]),
            torch.full((4 * SIZE,), -float(threads * steps)),
        )


def crash_two_threads() -> None:
    step_one_optimizer(2, 300)


def crash_four_threads() -> None:
    step_one_optimizer(4, 100)


def crash_two_threads_and_zero_grad() -> None:
    step_one_optimizer(2, 200, zero_grad=True)


def crash_four_threads_and_zero_grad() -> None:
    step_one_optimizer(4, 80, zero_grad=True)


def crash_two_threads_on_the_eager_backend() -> None:
    step_one_optimizer(2, 100, foreach=False, fused=False)


def crash_two_threads_on_one_thread_each() -> None:
    torch.set_num_threads(1)
    step_one_optimizer(2, 300)


def crash_steps_are_counted() -> None:
    """The number of steps in Adam's state is the number of calls."""
    params = zeros()
    opt = onepass.Adam(params, lr=0.01)

    def work() -> None:
        for _ in range(100):
            ones(params)
            opt.step()

    together(*[work] * 4)
    assert [float(opt.state[p]["step"]) for p in params] == [400.0] * 4


def crash_steps_of_all_algorithms() -> None:
    for name in (
        "Adam",
        "AdamW",
        "Adagrad",
        "RMSprop",
        "Adadelta",
        "Adamax",
        "NAdam",
        "RAdam",
        "ASGD",
        "Rprop",
        "Adafactor",
    ):
        params = [nn.Parameter(torch.ones(20, 30)), nn.Parameter(torch.ones(40))]
        opt = getattr(onepass, name)(params, lr=0.01)

        def work(params: list[Any] = params, opt: Any = opt) -> None:
            for _ in range(25):
                ones(params)
                opt.step()

        together(work, work)
        assert [float(opt.state[p]["step"]) for p in params] == [50.0] * 2, name
        assert all(torch.isfinite(p).all() for p in params), name


def crash_muon_and_sparse_adam() -> None:
    matrix, rows = nn.Parameter(torch.ones(20, 30)), nn.Parameter(torch.ones(20, 30))
    muon, adam = onepass.Muon([matrix]), onepass.SparseAdam([rows])

    def work() -> None:
        for _ in range(40):
            matrix.grad = torch.ones(20, 30)
            rows.grad = torch.ones(20, 30).to_sparse(1)
            muon.step()
            adam.step()

    together(work, work)
    assert adam.state[rows]["step"] == 80
    assert torch.isfinite(matrix).all()


def beside_steps(
    other: Callable[[Any, list[Any]], Any], rounds: int = 60, opt: Any = None, params: Any = None
) -> Any:
    """Two threads step; a third does something else with the optimizer meanwhile."""
    params = zeros() if params is None else params
    opt = onepass.Adam(params, lr=0.01) if opt is None else opt
    stepped = []

    def work() -> None:
        for _ in range(rounds):
            ones(params)
            opt.step()
            stepped.append(1)

    def meddle() -> None:
        for _ in range(rounds // 2):
            other(opt, params)

    together(work, work, meddle)
    assert all(torch.isfinite(p).all() for p in params)
    return opt, len(stepped)


def crash_beside_add_param_group() -> None:
    added: list[nn.Parameter] = []

    def add(opt: Any, params: list[Any]) -> None:
        added.append(nn.Parameter(torch.zeros(5)))
        added[-1].grad = torch.ones(5)
        opt.add_param_group({"params": [added[-1]]})

    opt, steps = beside_steps(add)
    assert len(opt.param_groups) == 1 + len(added)
    assert float(opt.state[opt.param_groups[0]["params"][0]]["step"]) == steps


def crash_beside_state_dict() -> None:
    def save(opt: Any, params: list[Any]) -> None:
        state = opt.state_dict()["state"]
        assert all(set(entry) == {"step", "exp_avg", "exp_avg_sq"} for entry in state.values())

    opt, steps = beside_steps(save)
    assert {float(entry["step"]) for entry in opt.state.values()} == {float(steps)}


def crash_beside_load_state_dict() -> None:
    saved: list[Any] = []

    def load(opt: Any, params: list[Any]) -> None:
        if not saved:
            while len(opt.state) < 4:
                time.sleep(0)
            saved.append(copy.deepcopy(opt.state_dict()))
        opt.load_state_dict(saved[0])

    beside_steps(load)


def crash_beside_deepcopy() -> None:
    beside_steps(lambda opt, params: copy.deepcopy(opt).step())


def crash_beside_pickle() -> None:
    beside_steps(lambda opt, params: pickle.loads(pickle.dumps(opt)).step())


def crash_beside_options_that_change() -> None:
    def change(opt: Any, params: list[Any]) -> None:
        opt.param_groups[0].update(lr=random.random() / 100, amsgrad=random.random() < 0.5)

    opt, steps = beside_steps(change)
    assert {float(entry["step"]) for entry in opt.state.values()} == {float(steps)}


# (b) Shared parameters, (c) shared gradients and state.


def crash_optimizers_share_parameters() -> None:
    """As in Hogwild training, updates may be lost; nothing else may happen."""
    params = zeros()

    def work() -> None:
        opt = onepass.SGD(params, lr=1.0)
        for _ in range(150):
            ones(params)
            opt.step()

    together(*[work] * 4)
    assert_whole(params, -600)


def crash_optimizers_of_all_kinds_share_parameters() -> None:
    params = [nn.Parameter(torch.ones(20, 30)) for _ in range(3)]

    def work(name: str) -> Callable[[], None]:
        def steps() -> None:
            opt = getattr(onepass, name)(params, lr=1e-4)
            for _ in range(60):
                ones(params)
                opt.step()

        return steps

    together(*map(work, ("Adam", "Adafactor", "Muon", "RMSprop")))
    assert all(torch.isfinite(p).all() for p in params)


def beside_gradients(change: Callable[[Tensor], Any], size: int = 100_000) -> None:
    """A thread changes the gradients that others step with."""
    params = zeros(3, size)
    opt = onepass.SGD(params, lr=1.0)
    # There have been gradients: that some are missing now is not a mistake to be told.
    ones(params)
    opt.step()
    over = threading.Event()

    def work() -> None:
        try:
            for _ in range(60):
                ones(params)
                opt.step()
        finally:
            over.set()

    def meddle() -> None:
        while not over.is_set():
            for p in params:
                change(p)

    together(work, meddle)
    assert_whole(params, -61)


def crash_gradients_are_replaced() -> None:
    beside_gradients(lambda p: setattr(p, "grad", torch.ones_like(p)))


def crash_gradients_are_dropped() -> None:
    """As `zero_grad` drops them. `p.grad = None` of a last reference, beside a thread that reads
    it, crashes torch."""
    beside_gradients(lambda p: drop_gradients([p]))


def crash_gradients_are_zeroed() -> None:
    def zero(p: Tensor) -> None:
        g = p.grad
        if g is not None:
            g.zero_()

    beside_gradients(zero)


def crash_gradients_are_laid_otherwise() -> None:
    """A gradient that is expanded, or has holes, in turn."""
    beside_gradients(
        lambda p: setattr(
            p, "grad", random.choice([torch.ones(1).expand(p.shape), torch.ones(2 * len(p))[::2]])
        )
    )


def crash_gradients_are_exchanged() -> None:
    held: list[Tensor | None] = []

    def exchange(p: Tensor) -> None:
        held.append(p.grad)
        p.grad = held.pop(0) if len(held) > 1 else None

    beside_gradients(exchange)


def beside_state(change: Callable[[Any, list[nn.Parameter]], Any]) -> None:
    """A thread changes the state that another steps with."""
    params = zeros()
    opt = onepass.Adam(params, lr=0.01)
    ones(params)
    opt.step()
    over = threading.Event()

    def work() -> None:
        try:
            for _ in range(150):
                ones(params)
                with suppress(*CHANGED):
                    opt.step()
        finally:
            over.set()

    def meddle() -> None:
        while not over.is_set():
            change(opt, params)

    together(work, meddle)
    assert all(torch.isfinite(p).all() for p in params)


def crash_state_is_cleared() -> None:
    beside_state(lambda opt, params: opt.state.clear())


def crash_state_entries_are_replaced() -> None:
    def replace(opt: Any, params: list[nn.Parameter]) -> None:
        for p in params:
            opt.state[p]["exp_avg"] = torch.zeros(SIZE)

    beside_state(replace)


# (d) Steps within steps.


def crash_closure_steps_again() -> None:
    (p,) = zeros(1)
    opt = onepass.SGD([p], lr=1.0)

    def closure() -> float:
        ones([p])
        opt.step()
        return 1.0

    assert opt.step(closure) == 1.0
    assert torch.equal(p, torch.full((SIZE,), -2.0))


def crash_closure_waits_for_another_thread() -> None:
    (p,) = zeros(1)
    opt = onepass.SGD([p], lr=1.0)

    def closure() -> float:
        ones([p])
        thread = threading.Thread(target=opt.step)
        thread.start()
        thread.join(20)
        assert not thread.is_alive()
        return 1.0

    opt.step(closure)
    assert torch.equal(p, torch.full((SIZE,), -2.0))


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_hooks_that_step_again(kind: str) -> None:
    (p,) = zeros(1)
    opt = onepass.SGD([p], lr=1.0)
    left = [3]

    def hook(*_: Any) -> None:
        if left[0]:
            left[0] -= 1
            opt.step()

    getattr(opt, f"register_step_{kind}_hook")(hook)
    ones([p])
    opt.step()
    assert torch.equal(p, torch.full((SIZE,), -4.0))


def crash_hook_saves() -> None:
    (p,) = zeros(1)
    opt = onepass.Adam([p], lr=1.0)
    counts = []
    opt.register_step_post_hook(
        lambda o, *_: counts.append(float(o.state_dict()["state"][0]["step"]))
    )
    for _ in range(3):
        ones([p])
        opt.step()
    assert counts == [1.0, 2.0, 3.0]


def crash_hook_waits_for_another_thread() -> None:
    """A hook stands outside of the step: another thread may step while it waits."""
    (p,) = zeros(1)
    opt = onepass.SGD([p], lr=1.0)
    depth = [0]

    def hook(*_: Any) -> None:
        if depth[0]:
            return
        depth[0] = 1
        thread = threading.Thread(target=opt.step)
        thread.start()
        thread.join(20)
        assert not thread.is_alive()

    opt.register_step_post_hook(hook)
    opt.register_step_pre_hook(hook)
    ones([p])
    opt.step()
    assert torch.equal(p, torch.full((SIZE,), -2.0))


def crash_hook_of_the_state_dict_steps() -> None:
    (p,) = zeros(1)
    opt = onepass.SGD([p], lr=1.0)
    opt.register_state_dict_post_hook(lambda o, d: o.step())
    opt.register_state_dict_pre_hook(lambda o: o.step())
    ones([p])
    opt.state_dict()
    assert torch.equal(p, torch.full((SIZE,), -2.0))


# (e) Forks.


def wait_for(child: int, seconds: float = 30.0) -> int:
    """A child's exit status; a child that never ends is a failure."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise AssertionError("the child never ended")


def in_child(opt: Any, params: list[nn.Parameter]) -> None:
    """Step in the child of a fork, and end."""
    try:
        torch.set_num_threads(1)
        ones(params)
        opt.step()
        opt.state_dict()
        opt.zero_grad()
    except BaseException:  # nobody else would tell
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def crash_fork_while_a_thread_steps() -> None:
    torch.set_num_threads(1)
    params = zeros(4, 20_000)
    opt = onepass.Adam(params, lr=0.01)
    ones(params)
    opt.step()
    fork_beside(opt, params, opt.step, 25)


def fork_while_kernels_are_made(known: bool) -> None:
    torch.set_num_threads(1)
    params = zeros(2, 100)
    names = itertools.cycle(
        ["RMSprop", "NAdam", "Adadelta", "Adamax", "Adagrad", "RAdam", "ASGD", "Rprop", "Adafactor"]
    )

    def first_step() -> None:
        # A rule of its own, which nobody has compiled yet.
        base = getattr(onepass, next(names))
        rule = types.FunctionType(
            base.rule.__code__, base.rule.__globals__, None, None, base.rule.__closure__
        )
        rule.__kwdefaults__, rule.__annotations__ = (
            base.rule.__kwdefaults__,
            base.rule.__annotations__,
        )
        type("Own", (base,), {"rule": staticmethod(rule)})(params, lr=0.01).step()

    ones(params)
    opt = onepass.Adam(params, lr=0.01)
    if known:
        opt.step()
        # Its plan must be made again, of kernels that are there.
        opt.add_param_group({"params": [nn.Parameter(torch.ones(7))]})
    fork_beside(opt, params, first_step, 30)


def crash_fork_while_a_thread_makes_kernels() -> None:
    """What is locked while rules are traced and compiled is free in the child, too."""
    fork_while_kernels_are_made(known=True)


def crash_fork_while_a_thread_makes_kernels_and_make_some() -> None:
    """The child needs a kernel that nobody has made yet."""
    fork_while_kernels_are_made(known=False)


def fork_beside(opt: Any, params: list[nn.Parameter], step: Callable[[], Any], forks: int) -> None:
    """Fork again and again while a thread steps; each child steps, too."""
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            ones(params)
            step()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(forks):
            time.sleep(random.random() / 50)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                child = os.fork()
            if child == 0:
                in_child(opt, params)
            assert wait_for(child, 20) == 0, child
    finally:
        over.set()
        thread.join()


# (f) What copies take along.


class Wrapper:
    """What wraps an optimizer's class, and shares its attributes."""

    def step(self, *arguments: Any) -> Any:
        return super().step(*arguments)  # type: ignore[misc]


def stepped() -> tuple[nn.Parameter, onepass.Optimizer]:
    (p,) = zeros(1, 3)
    opt = onepass.Adam([p], lr=0.1)
    ones([p])
    opt.step()
    return p, opt


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda opt: pickle.loads(pickle.dumps(opt)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "file": through_a_file,
}


@pytest.mark.parametrize("held", [False, True], ids=["free", "in a step"])
@pytest.mark.parametrize("way", WAYS)
def test_copies_step_on(way: str, held: bool) -> None:
    """Made between two steps, or in a hook of one."""
    _, opt = stepped()
    copies = []
    if held:
        handle = opt.register_step_pre_hook(lambda o, *_: copies.append(WAYS[way](o)))
        opt.step()
        handle.remove()
    else:
        copies.append(WAYS[way](opt))
    (made,) = copies
    (p,) = made.param_groups[0]["params"]
    ones([p])
    count = float(made.state[p]["step"])
    made.step()
    assert float(made.state[p]["step"]) == count + 1
    assert "_onepass" not in pickle.loads(pickle.dumps(made)).__getstate__()


def test_attributes_go_round() -> None:
    """`vars` may be copied into another object, as wrappers do."""
    p, opt = stepped()
    made = type("AdamWrapped", (Wrapper, onepass.Adam), {})([p], lr=0.1)
    made.__dict__ = dict(vars(opt))
    made.step()
    opt.step()
    assert float(opt.state[p]["step"]) == 3.0
    hollow = object.__new__(type("Hollow", (Wrapper, onepass.Adam), {}))
    hollow.__dict__ = {k: v for k, v in vars(opt).items() if k not in ("step", "_onepass")}
    hollow.__setstate__({})
    hollow.step()
    assert float(opt.state[p]["step"]) == 4.0


def crash_attributes_are_copied_deeply() -> None:
    p, opt = stepped()
    other = object.__new__(onepass.Adam)
    other.__dict__.update(copy.deepcopy(vars(opt)))
    (q,) = other.param_groups[0]["params"]
    ones([q])
    other.step()
    assert float(other.state[q]["step"]) == 2.0
    assert float(opt.state[p]["step"]) == 1.0


def test_wrapped_as_by_fabric() -> None:
    """Lightning Fabric copies an optimizer's attributes, without `step`, into an object of a class
    of its own."""
    p, opt = stepped()
    made = object.__new__(type("FabricAdam", (Wrapper, onepass.Adam), {}))
    made.__dict__ = {
        k: v for k, v in vars(opt).items() if k not in ("state_dict", "step", "zero_grad")
    }
    made.step()
    made.state_dict()
    opt.step()
    assert float(opt.state[p]["step"]) == 3.0


def crash_wrapper_and_wrapped_step_in_threads() -> None:
    """They share state, and so must share the turn."""
    params = zeros()
    opt = onepass.SGD(params, lr=1.0)
    made = object.__new__(type("Wrapped", (Wrapper, onepass.SGD), {}))
    made.__dict__ = dict(vars(opt))

    def work(which: Any) -> Callable[[], None]:
        def steps() -> None:
            for _ in range(150):
                ones(params)
                which.step()

        return steps

    together(work(opt), work(made))
    assert_whole(params, -300)


CASES = [name for name in dict(globals()) if name.startswith("crash_")]


@pytest.fixture(scope="module")
def known_fates() -> dict[str, str]:
    return fates(__file__, CASES)


@pytest.mark.parametrize("case", CASES)
def test_survives(case: str, known_fates: dict[str, str]) -> None:
    assert known_fates[case] == "ok", f"{case}: {known_fates[case]}"


MANY = """
import sys, test_threads
for i in range(int(sys.argv[1])):
    steps = 300 if i % 2 == 0 else 150
    test_threads.step_one_optimizer(2 + 2 * (i % 2), steps, zero_grad=i % 3 == 2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_two_hundred_runs(part: int) -> None:
    run_script(MANY, "50", timeout=900)
