"""Steps that repeat give the bits of careful ones, whatever a user does in between."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading
import warnings
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from contextlib import suppress
from types import MethodType
from typing import Any

import numpy as np
import pytest
import test_memory_safety as operations
import torch
from support.repeats import careful_only, count_repeats, everything, learning_at_once
from support.side_by_side import ALGORITHMS, SHAPES, Side, make_side
from support.state_machine import KINDS, make_machine
from support.subprocess_cases import fates, run_script
from torch import Tensor, nn

import onepass
from onepass import kernel
from onepass.contract.values import StepError
from onepass.kernel.repeat import program, sheet
from onepass.kernel.tensors.same_words import Comparing

pytestmark = pytest.mark.filterwarnings("ignore")

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: ALGORITHMS[name] for name in ("momentum", "adamw", "rmsprop", "adagrad", "nadam")},
    "adafactor": ("Adafactor", {"lr": 0.05}),
}


def start(algorithm: str, shapes: Any = SHAPES, **changes: Any) -> Side:
    """An optimizer whose steps repeat: it has taken four."""
    if algorithm in ALGORITHMS:
        side = make_side(onepass, algorithm, (*shapes, (5,)), **changes)
    else:
        name, options = OPTIMIZERS[algorithm]
        random = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(s, generator=random)) for s in (*shapes, (5,))]
        cls = getattr(onepass, name)
        side = Side(onepass, cls(params, **options | changes), params, random)
    for _ in range(4):
        side.step()
    return side


def outcome(side: Side, action: Callable[[Side], Any], steps: int = 4) -> list[Any]:
    """What is there after an action and further steps, and what they have said."""
    seen: list[Any] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            action(side)
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            seen.append(f"{type(error).__name__}: {error}")
        for _ in range(steps):
            try:
                side.set_gradients()
                side.opt.step()
            except (RuntimeError, ValueError, TypeError, KeyError) as error:
                seen.append(f"{type(error).__name__}: {error}")
    seen.append([str(warning.message) for warning in caught])
    return seen + everything(side.opt)


def both_ways(algorithm: str, action: Callable[[Side], Any], **changes: Any) -> Side:
    """Do the same with steps that repeat and with careful ones only; they must agree."""
    with learning_at_once():
        repeating = start(algorithm, **changes)
        if kernel.new_sheet() is not None:
            assert count_repeats(repeating.opt) >= 2
        found = outcome(repeating, action)
    with careful_only():
        careful = start(algorithm, **changes)
        expected = outcome(careful, action)
        assert count_repeats(careful.opt) == 0
    assert found == expected
    return repeating


# What users do between steps.


@pytest.mark.parametrize("algorithm", ["momentum", "adamw", "adafactor"])
@pytest.mark.parametrize("operation", operations.OPERATIONS, ids=lambda f: f.__name__)
def test_operations(operation: Any, algorithm: str) -> None:
    both_ways(algorithm, operation)


@pytest.mark.parametrize("algorithm", ["momentum", "adamw"])
@pytest.mark.parametrize("gradient", operations.GRADIENTS, ids=lambda f: f.__name__)
def test_odd_gradients(gradient: Any, algorithm: str) -> None:
    def step(side: Side) -> None:
        side.set_gradients()
        side.params[0].grad = gradient(side)
        side.opt.step()

    both_ways(algorithm, step)


NOTE = object()


class Quiet(Tensor):
    """A subclass, whose tensors mean what a plain one would."""


class Loud(nn.Parameter):
    """A subclass whose gradient is another one than torch's."""

    @property
    def grad(self) -> Tensor:  # type: ignore[override]
        return torch.full_like(self.detach(), 0.5)

    @grad.setter
    def grad(self, value: Any) -> None:
        Tensor.grad.__set__(self, value)  # type: ignore[attr-defined]


class Float(float):
    """A float that says something else when it is asked."""

    def __float__(self) -> float:
        return 0.25


def option(key: str, value: Any) -> Callable[[Side], None]:
    def change(side: Side) -> None:
        side.opt.param_groups[0][key] = value

    return change


def gradient(make: Callable[[Tensor], Any]) -> Callable[[Side], None]:
    """Step with the first gradient made otherwise."""

    def step(side: Side) -> None:
        side.set_gradients()
        side.params[0].grad = make(side.params[0].grad)  # type: ignore[arg-type]
        side.opt.step()

    return step


def first_state(change: Callable[[dict[str, Any]], Any]) -> Callable[[Side], None]:
    return lambda side: change(side.opt.state[side.params[0]])


def reorder_options(side: Side) -> None:
    group = side.opt.param_groups[0]
    group["lr"] = group.pop("lr")


def replace_groups(side: Side) -> None:
    side.opt.param_groups = [dict(group) for group in side.opt.param_groups]


def with_a_dict_of_another_class(side: Side) -> None:
    side.opt.param_groups[0] = OrderedDict(side.opt.param_groups[0])


def replace_state(side: Side) -> None:
    side.opt.state = defaultdict(dict, {p: dict(s) for p, s in side.opt.state.items()})


def state_of_another_class(side: Side) -> None:
    for p, entry in side.opt.state.items():
        side.opt.state[p] = OrderedDict(entry)


def lazy_clone(side: Side) -> None:
    """Memory that two tensors share until one of them is written."""
    side.kept.append(torch._lazy_clone(side.params[0].detach()))


def grow_a_list(side: Side) -> None:
    side.params.append(nn.Parameter(side.randn(3)))
    side.opt.param_groups[0]["params"].append(side.params[-1])


def shrink_a_list(side: Side) -> None:
    side.opt.param_groups[0]["params"].pop()


def a_list_becomes_a_tuple(side: Side) -> None:
    side.opt.param_groups[0]["params"] = tuple(side.opt.param_groups[0]["params"])


def become_another_class(side: Side) -> None:
    class Other(type(side.opt)):  # type: ignore[misc]
        pass

    side.opt.__class__ = Other


def under(mode: Callable[[], Any]) -> Callable[[Side], None]:
    def step(side: Side) -> None:
        side.set_gradients()
        with mode():
            side.opt.step()

    return step


def with_scaler(side: Side) -> None:
    side.set_gradients()
    side.opt.grad_scale, side.opt.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    side.opt.step()
    side.opt.found_inf = torch.tensor(1.0)
    side.opt.step()
    del side.opt.grad_scale, side.opt.found_inf


def with_a_hook(side: Side) -> None:
    def halve(optimizer: Any, args: Any, kwargs: Any) -> None:
        for p in side.params:
            p.grad = p.grad * 0.5  # type: ignore[operator]

    handle = side.opt.register_step_pre_hook(halve)
    side.step()
    handle.remove()


def with_a_hook_on_the_gradient(side: Side) -> None:
    """Gradients that are dropped, as a step inside the backward pass does it."""
    p = side.params[0]
    handle = p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", p.grad * 2))
    (p * 3).sum().backward()
    side.opt.step()
    handle.remove()


def in_another_thread(side: Side) -> None:
    side.set_gradients()
    thread = threading.Thread(target=side.opt.step)
    thread.start()
    thread.join()


def with_a_schedule(side: Side) -> None:
    schedule = onepass.lr_scheduler.OneCycleLR(
        side.opt, 0.1, 20, cycle_momentum="betas" in side.opt.defaults
    )
    for _ in range(6):
        side.step()
        schedule.step()


def with_closure(side: Side) -> None:
    def closure() -> Tensor:
        side.set_gradients()
        return torch.tensor(1.0)

    assert side.opt.step(closure) == 1.0


def patched_step(side: Side) -> None:
    inner = side.opt.step

    def step(self: Any, *args: Any) -> Any:
        return inner(*args)

    side.opt.step = MethodType(step, side.opt)
    side.step()


ACTIONS: dict[str, Callable[[Side], Any]] = {
    "lr": option("lr", 0.01),
    "lr int": option("lr", 1),
    "lr numpy": option("lr", np.float64(0.02)),
    "lr float32": option("lr", np.float32(0.02)),
    "lr tensor": option("lr", torch.tensor(0.02)),
    "lr subclass": option("lr", Float(0.5)),
    "lr negative": option("lr", -0.01),
    "lr nan": option("lr", float("nan")),
    "lr inf": option("lr", float("inf")),
    "lr text": option("lr", "0.1"),
    "weight decay": option("weight_decay", 0.3),
    "momentum": option("momentum", 0.5),
    "no momentum": option("momentum", 0.0),
    "betas": option("betas", (0.7, 0.8)),
    "betas list": option("betas", [0.7, 0.8]),
    "betas of tensors": option("betas", (0.7, torch.tensor(0.8))),
    "maximize": option("maximize", True),
    "maximize 1": option("maximize", 1),
    "capturable": option("capturable", True),
    "foreach": option("foreach", True),
    "eager": lambda side: side.opt.param_groups[0].update(foreach=False, fused=False),
    "unknown option": option("unknown", NOTE),
    "option of the user's": option("initial_lr", 0.5),
    "no lr": lambda side: side.opt.param_groups[0].pop("lr"),
    "options in another order": reorder_options,
    "other groups": replace_groups,
    "another kind of group": with_a_dict_of_another_class,
    "a longer list": grow_a_list,
    "a shorter list": shrink_a_list,
    "a tuple": a_list_becomes_a_tuple,
    "frozen": lambda side: side.params[0].requires_grad_(False),
    "no gradient": gradient(lambda g: None),
    "gradient of a subclass": gradient(lambda g: g.as_subclass(Quiet)),
    "gradient whose object is gone": gradient(lambda g: g * 2),
    "sparse gradient": gradient(lambda g: g.to_sparse()),
    "expanded gradient": gradient(lambda g: g[:1].expand(g.shape)),
    "lazily cloned gradient": gradient(torch._lazy_clone),
    "negated gradient": gradient(torch._neg_view),
    "freed gradient": gradient(lambda g: (g.untyped_storage().resize_(0) and None) or g),
    "gradient of a parameter": gradient(lambda g: nn.Parameter(g)),
    "lazy clone": lazy_clone,
    "shared": lambda side: side.params[0].share_memory_(),
    "freed": lambda side: side.params[0].untyped_storage().resize_(0),
    "other state": replace_state,
    "another kind of state": state_of_another_class,
    "state cleared": lambda side: side.opt.state.clear(),
    "state of one cleared": first_state(dict.clear),
    "state with a note": first_state(lambda entry: entry.update(note=1)),
    "step in Python's numbers": first_state(lambda entry: entry.update(step=7.0)),
    "step filled": first_state(lambda entry: entry["step"].fill_(40)),
    "step in float64": first_state(lambda entry: entry.update(step=torch.tensor(7.0).double())),
    "another class": become_another_class,
    "inference mode": under(torch.inference_mode),
    "no_grad": under(torch.no_grad),
    "enable_grad": under(torch.enable_grad),
    "default device": under(lambda: torch.device("meta")),
    "profiler": under(torch.profiler.profile),
    "GradScaler": with_scaler,
    "hook": with_a_hook,
    "hook of a gradient": with_a_hook_on_the_gradient,
    "thread": in_another_thread,
    "schedule": with_a_schedule,
    "closure": with_closure,
    "patched step": patched_step,
}


@pytest.mark.parametrize("algorithm", OPTIMIZERS)
@pytest.mark.parametrize("action", ACTIONS)
def test_actions(action: str, algorithm: str) -> None:
    both_ways(algorithm, ACTIONS[action])


@pytest.mark.parametrize("algorithm", OPTIMIZERS)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64], ids=str
)
def test_dtypes(dtype: torch.dtype, algorithm: str) -> None:
    if algorithm == "adafactor":
        pytest.skip("it is not one of the table of algorithms")
    both_ways(algorithm, lambda side: None, dtype=dtype)


@pytest.mark.parametrize("algorithm", OPTIMIZERS)
def test_shapes(algorithm: str) -> None:
    """No element; one; more dimensions than a TensorImpl has room for; more work than a thread."""
    shapes = ((0,), (1,), (2, 0, 3), (1, 1, 1, 1, 2), (600, 700))
    both_ways(algorithm, lambda side: None, shapes=shapes)
    deep = (*shapes, (1, 2, 1, 2, 1, 2))
    with careful_only():
        expected = outcome(start(algorithm, deep), lambda side: None)
    side = start(algorithm, deep)
    assert outcome(side, lambda side: None) == expected
    assert count_repeats(side.opt) == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_step_by_themselves(copied: Any) -> None:
    side = start("adamw")
    params, optimizer = copied((side.params, side.opt))
    other = Side(onepass, optimizer, params, copy.deepcopy(side.random))
    other.random.set_state(side.random.get_state())
    assert count_repeats(optimizer) == 0
    for _ in range(4):
        side.step()
        other.step()
    assert everything(side.opt)[1:] == everything(optimizer)[1:] or all(
        torch.equal(a, b) for a, b in zip(side.params, params, strict=True)
    )
    assert count_repeats(optimizer) > 0


# When steps repeat.


def test_plain_steps_repeat() -> None:
    side = start("adamw")
    before = count_repeats(side.opt)
    for _ in range(20):
        side.step()
    assert count_repeats(side.opt) == before + 20


def test_steps_repeat_again_after_each_change() -> None:
    side = start("adamw")
    for name, action in ACTIONS.items():
        if name in ("lr", "maximize", "other groups", "other state", "state with a note", "hook"):
            action(side)
            before = count_repeats(side.opt)
            for _ in range(70):
                side.step()
            assert count_repeats(side.opt) > before, name


def test_a_schedule_repeats() -> None:
    """Rates and betas that change in each step are only values."""
    side = start("adamw")
    schedule = onepass.lr_scheduler.OneCycleLR(side.opt, 0.1, 60)
    side.step()
    schedule.step()
    side.step()
    before = count_repeats(side.opt)
    for _ in range(20):
        schedule.step()
        side.step()
    # After two careful steps the third is learned.
    assert count_repeats(side.opt) >= before + 17


def test_flags_of_a_users_class_are_asked_at_each_step() -> None:
    asked = []

    class Mine(onepass.SGD):
        def flags(self, group: Any) -> dict[str, bool]:
            asked.append(1)
            return {**super().flags(group), "nesterov": len(asked) > 40}

    p = nn.Parameter(torch.ones(3))
    optimizer = Mine([p], lr=0.1, momentum=0.9)
    twin = nn.Parameter(torch.ones(3))
    plain = onepass.SGD([twin], lr=0.1, momentum=0.9)
    while len(asked) <= 40:
        p.grad, twin.grad = torch.ones(3), torch.ones(3)
        optimizer.step()
        if len(asked) <= 40:
            plain.step()
            assert torch.equal(p, twin)
    assert count_repeats(optimizer) > 0
    plain.param_groups[0]["nesterov"] = True
    plain.step()
    assert torch.equal(p, twin)


def test_a_getter_of_the_gradient_is_called() -> None:
    """A subclass may say what its gradient is."""
    p = Loud(torch.ones(3))
    optimizer = onepass.SGD([p], lr=1.0)
    for _ in range(5):
        optimizer.step()
    assert torch.equal(p.detach(), torch.full((3,), -1.5))
    assert count_repeats(optimizer) == 0


def test_nothing_is_kept_alive() -> None:
    """Neither the parameters nor the state nor what options held."""
    import weakref

    side = start("adamw")
    kept = [weakref.ref(t) for t in (*side.params, *side.opt.state[side.params[0]].values())]
    group = side.opt.param_groups[0]
    group["params"] = [nn.Parameter(torch.ones(2))]
    side.params.clear()
    side.opt.state.clear()
    gc.collect()
    assert not any(reference() is not None for reference in kept)


def test_without_words_every_step_is_careful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where machine code may not read, as in Python without the interpreter lock."""
    monkeypatch.setattr("onepass.kernel.new_sheet", lambda: None)
    side = start("adamw")
    side.step()
    assert count_repeats(side.opt) == 0


WITHOUT_LOCK = """
import sys
sys._is_gil_enabled = lambda: False
import torch, onepass
p = torch.nn.Parameter(torch.ones(3))
optimizer = onepass.AdamW([p], lr=0.1)
for _ in range(5):
    p.grad = torch.ones(3)
    optimizer.step()
assert optimizer._onepass.repeats.count == 0
print(p.tolist())
"""


def test_python_without_the_interpreter_lock() -> None:
    """Nothing is read by machine code, and the values are the same."""
    without = run_script(WITHOUT_LOCK)
    with_lock = run_script(WITHOUT_LOCK.replace("False", "True").replace("== 0", "> 0"))
    assert without == with_lock


def test_what_cannot_be_learned_does_no_harm() -> None:
    """A class may read its groups as it likes, as long as its steps work."""

    class Picky(onepass.SGD):
        def flags(self, group: Any) -> dict[str, bool]:
            assert type(group) is dict
            return super().flags(group)

    p = nn.Parameter(torch.ones(3))
    optimizer = Picky([p], lr=0.1, momentum=0.9)
    for _ in range(5):
        p.grad = torch.ones(3)
        optimizer.step()
    assert count_repeats(optimizer) == 0


# What these tests would notice.


def exchange_counts(side: Side) -> None:
    """One parameter has stepped more often than the others."""
    side.opt.state[side.params[1]]["step"].add_(5)


# A check of the machine code: the function that writes it, and which of its checks it is. And an
# algorithm and an action with which its absence shows.
CHECKS: dict[tuple[str, int], tuple[str, Callable[[Side], Any]]] = {
    ("_read_groups", 1): ("momentum", operations.add_group),
    ("_read_option", 0): ("momentum", ACTIONS["maximize"]),
    ("_read_option", 1): ("momentum", ACTIONS["lr subclass"]),
    ("_read_option", 2): ("momentum", ACTIONS["lr negative"]),
    ("_read_option", 3): ("momentum", ACTIONS["lr inf"]),
    ("_read_list", 1): ("momentum", ACTIONS["a longer list"]),
    ("_read_states", 2): ("adamw", operations.exchange_keys_of_states),
    ("must_have_words", 0): ("momentum", ACTIONS["expanded gradient"]),
    ("must_have_plain_object", 0): ("momentum", ACTIONS["gradient of a subclass"]),
    ("_read_numbers", 0): ("adamw", exchange_counts),
}


@pytest.fixture
def wrong_code(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let what has been patched be compiled, and steps be taken by it."""
    # Before anything is patched: it is compiled once.
    right = sheet.code()
    assert right is not None

    def compile_again() -> None:
        wrong = sheet.Code(right.places)
        monkeypatch.setattr(sheet, "code", lambda: wrong)

    return compile_again


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_each_check_is_needed(
    check: tuple[str, int], monkeypatch: pytest.MonkeyPatch, wrong_code: Any
) -> None:
    function, index = check
    algorithm, action = CHECKS[check]
    calls = 0

    def dropped(right: Any) -> Any:
        def must(self: Any, *arguments: Any) -> None:
            nonlocal calls
            if sys._getframe(1).f_code.co_name == function:
                calls += 1
                if calls == index + 1:
                    return
            right(self, *arguments)

        return must

    for name in ("must", "must_be_of"):
        monkeypatch.setattr(Comparing, name, dropped(getattr(Comparing, name)))
    wrong_code()
    assert calls > index
    with pytest.raises(AssertionError):
        both_ways(algorithm, action)


@pytest.mark.parametrize("part", ["_copy", "_store_number", "count_change"])
def test_each_part_is_needed(part: str, monkeypatch: pytest.MonkeyPatch, wrong_code: Any) -> None:
    owner: Any = {"_copy": program._Reading, "_store_number": program._Storing}.get(part, program)
    monkeypatch.setattr(owner, part, lambda *_: None)
    wrong_code()
    with pytest.raises(AssertionError):
        both_ways("adamw", ACTIONS["lr"])


# Random sequences, each step against float64.


def run_sequence(algorithm: str, seed: int) -> tuple[Any, int]:
    """Eight actions, each with several ordinary steps: what is there then, and repeated steps."""
    machine = make_machine(algorithm, seed)
    go_on, set_gradients = machine.go_on, machine.set_gradients
    repeated = 0

    def go_on_often() -> None:
        nonlocal repeated
        before = count_repeats(machine.opt)
        for _ in range(4):
            go_on()
        repeated += count_repeats(machine.opt) - before

    machine.go_on = go_on_often
    machine.set_gradients = lambda missing=0.02: set_gradients(missing)
    counts: Counter[str] = machine.run(8)
    return (machine.log, counts, everything(machine.opt)), repeated


def check_sequences(algorithm: str, seeds: range) -> None:
    """Steps that repeat are where float64 is, and careful ones have the same bits."""
    repeated = 0
    for seed in seeds:
        with learning_at_once():
            found, count = run_sequence(algorithm, seed)
        with careful_only():
            expected, none = run_sequence(algorithm, seed)
        assert found == expected, f"{algorithm} {seed}"
        assert none == 0
        repeated += count
    if algorithm not in ("sparse_adam", "lbfgs"):
        assert repeated >= len(seeds)


@pytest.mark.parametrize("algorithm", KINDS)
def test_random_sequences(algorithm: str, one_thread: None) -> None:
    check_sequences(algorithm, range(2))


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", KINDS)
def test_three_thousand_random_sequences(algorithm: str, one_thread: None) -> None:
    check_sequences(algorithm, range(1000, 1000 + 3000 // len(KINDS) + 1))


# What another thread does while a launch runs, in processes of their own.


def busy(shapes: Any, disturb: Callable[[Any, list[Any]], None], steps: int = 20) -> None:
    """Steps in this thread, while another one disturbs; memory that is let go is used again."""
    params = [nn.Parameter(torch.randn(s)) for s in shapes]
    optimizer = onepass.AdamW(params, lr=1e-3)
    for p in params:
        p.grad = torch.randn_like(p)
    for _ in range(4):
        optimizer.step()
    over = threading.Event()
    sys.setswitchinterval(1e-5)

    def other() -> None:
        junk: list[Any] = []
        while not over.is_set():
            disturb(optimizer, params)
            junk.append([torch.full(s, float("nan")) for s in shapes])
            if len(junk) > 3:
                junk.clear()
                gc.collect()

    thread = threading.Thread(target=other)
    thread.start()
    try:
        for _ in range(steps):
            for p in params:
                p.grad = torch.randn_like(p)
            # The other thread may leave no moment in which a step could begin.
            with suppress(StepError):
                optimizer.step()
    finally:
        over.set()
        thread.join()
    assert all(bool(torch.isfinite(p).all()) for p in params)


SMALL, LARGE = [(7,)] * 20, [(400, 400)] * 2


def crash_gradients_dropped() -> None:
    def drop(optimizer: Any, params: list[Any]) -> None:
        # Held until they are dropped: torch itself crashes where another thread reads one that is
        # just being freed.
        held = [p.grad for p in params]
        for p in params:
            p.grad = None
        held.clear()

    for shapes in (SMALL, LARGE):
        busy(shapes, drop)


def crash_zero_grad() -> None:
    for shapes in (SMALL, LARGE):
        busy(shapes, lambda optimizer, params: optimizer.zero_grad())


def crash_state_cleared() -> None:
    for shapes in (SMALL, LARGE):
        busy(shapes, lambda optimizer, params: optimizer.state.clear(), steps=8)


def crash_list_replaced() -> None:
    def shuffle(optimizer: Any, params: list[Any]) -> None:
        group = optimizer.param_groups[0]
        group["params"] = group["params"][1:] + group["params"][:1]

    for shapes in (SMALL, LARGE):
        busy(shapes, shuffle)


def crash_options_replaced() -> None:
    def replace(optimizer: Any, params: list[Any]) -> None:
        optimizer.param_groups[0] = dict(optimizer.param_groups[0])
        optimizer.param_groups[0]["betas"] = (0.9, 0.99)

    for shapes in (SMALL, LARGE):
        busy(shapes, replace)


def crash_state_copied() -> None:
    def replace(optimizer: Any, params: list[Any]) -> None:
        for p in params:
            entry = optimizer.state.get(p)
            if entry and "exp_avg" in entry:
                entry["exp_avg"] = entry["exp_avg"].clone()

    for shapes in (SMALL, LARGE):
        busy(shapes, replace)


CASES = [name for name in sorted(globals()) if name.startswith("crash_")]


@pytest.fixture(scope="module")
def known_fates() -> dict[str, str]:
    return fates(__file__, CASES)


@pytest.mark.parametrize("case", CASES)
def test_survives(case: str, known_fates: dict[str, str]) -> None:
    assert known_fates[case] == "ok", f"{case}: {known_fates[case]}"
