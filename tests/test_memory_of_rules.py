"""What is kept of a rule: as much as somebody can still use, and never more than so much, whatever
threads do."""

from __future__ import annotations

import gc
import linecache
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor

import onepass
from onepass import kernel
from onepass.kernel.functions import sqrt
from onepass.kernel.gpu import jit
from onepass.kernel.graph.caches import remember, share
from onepass.kernel.graph.ir import Node, load, topological
from onepass.kernel.llvm.native import Library

# How many kernels stay a while when their rules have died.
LONGER = 8


def new_class(c: float, name: str = "Mine") -> type[onepass.Optimizer]:
    """A class with a rule of its own: p moves by -c in its first step with a gradient of ones."""

    def rule(p, g, m, *, lr):
        new = 0.5 * m + c * g
        return {"p": p - lr * new, "m": new}

    def init(self: Any, params: Any, lr: float = 1.0) -> None:
        onepass.Optimizer.__init__(self, params, {"lr": lr})

    return type(name, (onepass.Optimizer,), {"__init__": init, "rule": staticmethod(rule)})


def step(cls: type[onepass.Optimizer]) -> Tensor:
    """A tensor of zeros after the first step of a new optimizer."""
    p = torch.zeros(3, requires_grad=True)
    p.grad = torch.ones(3)
    cls([p]).step()  # type: ignore[call-arg, arg-type]
    return p.detach()


def let_classes_go() -> None:
    """Free what nobody has, after so many other classes that the base class has forgotten those
    before."""
    for _ in range(300):
        new_class(0.0)([torch.zeros(1)])  # type: ignore[call-arg, arg-type]
    gc.collect()


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources of all kernels that are compiled."""
    sources: list[str] = []
    original = Library.__init__

    def noted(self: Library, source: str) -> None:
        if "@host_0(" in source:
            sources.append(source)
        original(self, source)

    monkeypatch.setattr(Library, "__init__", noted)
    return sources


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, ref[Any]]]:
    """What is made of each rule that steps, none of it kept alive."""
    found: list[dict[str, ref[Any]]] = []
    original = kernel.compile

    def noted(graph: kernel.Graph, *arguments: Any) -> Any:
        compiled: Any = original(graph, *arguments)
        parts = {
            "graph": graph,
            "kernel": compiled,
            "program": compiled.program,
            "library": compiled.library,
        }
        found.append({name: ref(part) for name, part in parts.items()})
        return compiled

    monkeypatch.setattr(kernel, "compile", noted)
    return found


@pytest.fixture
def hurried() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(work: Callable[[int], object], threads: int = 4) -> list[Any]:
    """What a function returns in several threads that begin at once."""
    barrier, results = threading.Barrier(threads), [None] * threads

    def run(i: int) -> None:
        barrier.wait()
        results[i] = work(i)  # type: ignore[call-overload]

    workers = [threading.Thread(target=run, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return results


# Rules that come and go.


def test_what_nobody_can_use_is_given_back(
    made: list[dict[str, ref[Any]]], built: list[str]
) -> None:
    living = new_class(0.75, "Living")
    assert torch.equal(step(living), torch.full((3,), -0.75))
    first = made.pop()
    classes = [new_class(0.25 + i / 64) for i in range(20)]
    for i in range(20):
        step(classes[i])
        made[i] |= {"class": ref(classes[i]), "rule": ref(classes[i].rule)}
    assert len(built) == 21
    classes.clear()
    let_classes_go()
    for found in made:
        assert [name for name in ("class", "rule", "graph") if found[name]() is not None] == []
    for name in ("program", "kernel", "library"):
        assert sum(found[name]() is not None for found in made) <= LONGER
    gone = made[:]
    for i in range(LONGER):
        step(new_class(2.0 + i / 64))
    let_classes_go()
    assert [name for found in gone for name, it in found.items() if it() is not None] == []
    built.clear()
    assert torch.equal(step(living), torch.full((3,), -0.75))
    assert made[-1]["kernel"]() is first["kernel"]() is not None
    assert not built


def test_an_optimizer_outlives_what_is_known_of_its_class(made: list[dict[str, ref[Any]]]) -> None:
    p = torch.zeros(3, requires_grad=True)
    optimizer = new_class(4.0)([p])  # type: ignore[call-arg, arg-type]
    p.grad = torch.ones(3)
    optimizer.step()
    del type(optimizer).rule
    for i in range(LONGER + 1):
        step(new_class(3.0 + i / 64))
    gc.collect()
    optimizer.step()
    assert torch.equal(p.detach(), torch.full((3,), -4.0 - 6.0))
    assert made[0]["kernel"]() is not None


CELL = """
class Mine(onepass.Optimizer):
    def __init__(self, params, lr=1.0):
        super().__init__(params, {"lr": lr})

    @staticmethod
    def rule(p, g, *, lr):
        return {"p": p - lr * 0.8125 * g}

p = torch.zeros(3, requires_grad=True)
p.grad = torch.ones(3)
optimizer = Mine([p])
gc.collect()
optimizer.step()
"""


def test_a_cell_run_again_compiles_nothing(built: list[str]) -> None:
    space: dict[str, Any] = {"onepass": onepass, "torch": torch, "gc": gc}
    for _ in range(3):
        exec(CELL, space)
        assert torch.equal(space["p"].detach(), torch.full((3,), -0.8125))
    assert len(built) == 1


def test_a_class_defined_in_a_function_is_compiled_once(built: list[str]) -> None:
    """Between two calls nothing of it lives."""
    for _ in range(3):
        assert torch.equal(step(new_class(0.78125, "Again")), torch.full((3,), -0.78125))
        gc.collect()
    assert len(built) == 1


def test_methods_are_rules_too(built: list[str]) -> None:
    """A method is another object at each access, and so is one of each optimizer."""

    class Bound(onepass.Optimizer):
        def __init__(self, params: Any, lr: float = 1.0) -> None:
            self.factor = 0.84375
            super().__init__(params, {"lr": lr})

        def move(self, p, g, *, lr):
            return {"p": p - lr * self.factor * g}

        @classmethod
        def rule(cls, p, g, *, lr):
            return {"p": p - lr * 0.84375 * g}

    class Own(Bound):
        def rule_of(self, p: Tensor, group: Any) -> Any:
            return self.move

    for cls, name in ((Bound, "rule"), (Own, "move")):
        built.clear()
        for _ in range(3):
            assert torch.equal(step(cls), torch.full((3,), -0.84375))
            gc.collect()
        assert len(built) == 1, name


def test_rules_that_differ_are_told_apart() -> None:
    """Where a rule has died, another may come to lie in its place."""
    for i in range(6):
        assert torch.equal(step(new_class(1 + i / 64)), torch.full((3,), -1 - i / 64))
        gc.collect()


def test_the_text_of_a_module_goes_with_it() -> None:
    def lines() -> list[str]:
        return [name for name in linecache.cache if name.startswith("<onepass ")]

    before = lines()
    module = jit.load(jit.Source("def answer():\n    return 42\n", ()))
    assert jit.load(jit.Source("def answer():\n    return 42\n", ())) is module
    assert module["answer"]() == 42
    assert len(lines()) == len(before) + 1
    del module
    gc.collect()
    assert lines() == before


# What is kept, and how long.


class Owner:
    """Equal to all of its kind."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Owner)

    def __hash__(self) -> int:
        return 1

    def method(self) -> None:
        pass


class Result:
    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments


def remembering(most: int = 4, longer: int = 0) -> Any:
    return remember(most, longer)(lambda owner, *rest, **named: Result(*rest, named))


def test_results_live_as_long_as_their_owner() -> None:
    function, owner, other = remembering(), Owner(), Owner()
    result = ref(function(owner, 1, word="a"))
    assert function(owner, 1, word="a") is result() is not None
    assert function(owner, 1, word="b") is not result()
    assert function(other, 1, word="a") is not result()
    assert function.cache_info() == (3, 3)
    del owner
    assert result() is None
    assert function.cache_info() == (3, 1)


def test_methods_live_as_long_as_what_they_are_of() -> None:
    function, owner = remembering(), Owner()
    result = ref(function(owner.method))
    assert function(owner.method) is result() is not None
    assert function(Owner().method) is not result()
    del owner
    assert result() is None


def test_no_more_is_kept_than_so_much() -> None:
    function, owners = remembering(most=4), [Owner() for _ in range(9)]
    results = [ref(function(owner)) for owner in owners]
    assert [result() is not None for result in results] == [False] * 5 + [True] * 4
    # The one that was not used for longest goes first.
    assert function(owners[5]) is results[5]()
    function(owners[0])
    assert results[5]() is not None
    assert results[6]() is None
    # What cannot say when it dies is kept as long.
    tuples = [(i,) for i in range(9)]
    kept = [ref(function(owner)) for owner in tuples]
    assert [result() is not None for result in kept] == [False] * 5 + [True] * 4


def test_the_last_results_stay_longer() -> None:
    function, owners = remembering(most=4, longer=2), [Owner() for _ in range(4)]
    results = [ref(function(owner)) for owner in owners]
    while owners:
        owners.pop(0)
    assert [result() is not None for result in results] == [False, False, True, True]
    function.cache_clear()
    assert all(result() is None for result in results)


def test_what_is_shared_lives_as_long_as_somebody_has_it() -> None:
    function: Any = share(lambda *arguments: Result(*arguments))
    result = function(1, "a")
    assert function(1, "a") is result
    assert function(1, "b") is not result
    assert function.cache_info() == (2, 1)
    function.cache_clear()
    assert function(1, "a") is not result
    kept = ref(result)
    del result
    assert kept() is None


@pytest.mark.parametrize("decorator", [remember(4), share])
def test_a_call_that_fails_is_forgotten(decorator: Any) -> None:
    answers = iter([ValueError("no"), Result()])

    @decorator
    def function(owner: object) -> Result:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    owner = Owner()
    with pytest.raises(ValueError, match="no"):
        function(owner)
    result = function(owner)
    assert function(owner) is result


# Threads.


@pytest.mark.usefixtures("hurried")
def test_threads_find_one_node_for_one_expression() -> None:
    def expression(i: int) -> Node:
        x = load("p")
        for n in range(200):
            x = sqrt(x * (n + 0.5 + i)) - load("g")
        return x

    for i in range(20):
        first, *others = together(lambda _, i=i: topological([expression(i)]))
        for other in others:
            assert all(a is b for a, b in zip(first, other, strict=True))


@pytest.mark.usefixtures("hurried")
def test_threads_that_share_a_rule_compile_it_once(built: list[str]) -> None:
    for i in range(5):
        cls = new_class(5 + i / 64)
        built.clear()
        for p in together(lambda _, cls=cls: step(cls)):
            assert torch.equal(p, torch.full((3,), -5 - i / 64))
        assert len(built) == 1


@pytest.mark.usefixtures("hurried")
def test_threads_get_one_result_while_owners_die() -> None:
    function: Any = remember(8, 4)(lambda owner, number: Result(id(owner), number))

    def work(i: int) -> bool:
        right = True
        for n in range(2000):
            owner = Owner()
            result = function(owner, n % 3)
            right &= result.arguments == (id(owner), n % 3) and function(owner, n % 3) is result
            right &= function(lasting, n % 3) is not None
        return right

    lasting = Owner()
    assert all(together(work))
    assert function.cache_info().currsize <= 8


# The memory of the process.

GROWTH = """
import gc, os, sys, types
sys.path.insert(0, {tests!r})
import torch
from test_memory_of_rules import new_class, step
from onepass.kernel.llvm.native import Library

def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def rules(begin, end):
    for i in range(begin, end):
        step(new_class(0.5 + i / 8192, f"Mine{{i}}"))

ADD = "define double @add(double %x) {{{{\\n %y = fadd double %x, {{}}\\n ret double %y\\n}}}}"

def libraries(begin, end):
    kept.extend(Library(ADD.format(float(i))) for i in range(begin, end))

kept = []
work, begin, end = {work}
work(0, begin)
before = resident()
work(begin, end)
print((resident() - before) / (end - begin))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not os.path.exists("/proc/self/statm"), reason="says how much memory a process has"
)
@pytest.mark.parametrize(
    ("work", "most"),
    # A class for each rule; and code that is in use, of which the compiler's tables would be 800
    # kB.
    [("rules, 300, 1300", 50e3), ("libraries, 20, 220", 200e3)],
)
def test_memory_does_not_grow_with_rules(work: str, most: float) -> None:
    code = GROWTH.format(tests=str(Path(__file__).parent), work=work)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(run.stdout) < most, "bytes for each"
