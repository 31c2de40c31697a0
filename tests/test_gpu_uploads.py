"""Tables on a device that lags behind: none is overwritten while something still reads it, and none
is sent twice."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.delayed_streams import Graph, HeldBack, World, block_of
from support.extra_rules import factored, lamb, program
from support.interpreted_gpu import Interpreter, compiled, interpreted
from support.side_by_side import make_side, refuses
from table import TABLE
from torch import Tensor

import onepass
from onepass.kernel.gpu import launch as gpu
from onepass.kernel.gpu.uploads import SPARE, Table, fill

# What a host may do, and how long it may wait between two steps: the number of pieces of work that
# streams get done.
CHANGE, STEP, SWITCH, CAPTURE, REPLAY = range(5)
ACTIONS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=40)


class Schedule:
    """Some tables, and a host that changes, sends, captures and replays them on several streams."""

    def __init__(self, table: type[Table], tables: int = 2) -> None:
        self.world = World()
        self.captured: list[Tensor] = []
        self.tables = [table(HeldBack(self.world), self.captured, SPARE) for _ in range(tables)]
        self.arrays = [np.full(5, i, np.int64) for i in range(tables)]
        self.changes = 0
        self.graphs: list[Graph] = []
        self.in_captures = 0

    def step(self) -> None:
        for table, array in zip(self.tables, self.arrays, strict=True):
            self.world.launch(table.on_device(array), array)

    def run(self, actions: Sequence[tuple[int, int]]) -> None:
        """One schedule, to its end; every read on the way and every one after it finds what it
        must."""
        self.step()
        for action, k in actions:
            if action == CHANGE:
                self.changes += 1
                # The host's own memory is used again and again.
                self.arrays[k % len(self.arrays)][:] = 100 + self.changes
            elif action == STEP:
                self.step()
            elif action == SWITCH:
                self.world.switch(k % 2)
            elif action == CAPTURE and self.in_captures < SPARE:
                with self.world.capture() as graph:
                    self.step()
                self.graphs.append(graph)
                self.in_captures += 1
                self.arrays[0][:] = -1
            elif action == REPLAY and self.graphs:
                self.world.replay(self.graphs[k % len(self.graphs)])
            for stream in self.world.streams:
                for _ in range(k):
                    stream.advance()
            self.world.collect()
        self.step()
        for graph in self.graphs:
            self.world.replay(graph)
        self.world.finish()


@given(ACTIONS)
def test_no_table_is_overwritten_while_it_is_read(actions: list[tuple[int, int]]) -> None:
    Schedule(Table).run(actions)


def test_what_is_let_go_is_overwritten() -> None:
    """The world is as unkind as it says: memory of tables that have changed becomes garbage in the
    end."""
    schedule = Schedule(Table, 1)
    schedule.run([(CHANGE, 0), (STEP, 0)] * 5)
    # Five tables and six stretches of memory of the host.
    assert schedule.world.overwritten == 11


class Reusing(Table):
    """Wrong: writes into the memory of the host that it has sent before."""

    def on_device(self, array: np.ndarray) -> Tensor:
        if self.device.is_capturing() or self._sent is None or array.tobytes() == self._known:
            return super().on_device(array)
        self._pinned = fill(
            getattr(self, "_pinned", self.device.pin(array.size, torch.int64)), array
        )
        self._sent, self._known = self.device.send(self._pinned), array.tobytes()
        return self._sent


class Overwriting(Table):
    """Wrong: writes into the memory of the device, by way of new memory of the host, whichever
    stream it was taken on and whether or not a graph reads it."""

    def on_device(self, array: np.ndarray) -> Tensor:
        before = self._sent
        sent = super().on_device(array)
        if before is None or sent is before or self.device.is_capturing():
            return sent
        self.device.world.copy(block_of(sent), block_of(before))
        self._sent = before
        return before


class Silent(Table):
    """Wrong: does not say that another stream reads."""

    def on_device(self, array: np.ndarray) -> Tensor:
        announce, self.device.announce = self.device.announce, lambda memory: None
        sent = super().on_device(array)
        self.device.announce = announce
        return sent


class Forgetful(Table):
    """Wrong: what a graph reads is let go."""

    def on_device(self, array: np.ndarray) -> Tensor:
        sent = super().on_device(array)
        self.captured.clear()
        return sent


class Trusting(Table):
    """Wrong: takes what a graph will send for what has been sent."""

    def _send_in_capture(self, array: np.ndarray) -> Tensor:
        sent = super()._send_in_capture(array)
        self._sent, self._known = sent, array.tobytes()
        return sent


class Careless(Table):
    """Wrong: takes memory of the host during a capture."""

    def _send_in_capture(self, array: np.ndarray) -> Tensor:
        self._ready.append(self.device.pin(array.size, torch.int64))
        return super()._send_in_capture(array)


class Late(Table):
    """Wrong: keeps no memory of the host until its copy is captured... and gives each stretch to
    two captures."""

    def _send_in_capture(self, array: np.ndarray) -> Tensor:
        self._ready.append(self._ready[-1])
        return super()._send_in_capture(array)


WRONG = [Reusing, Overwriting, Silent, Forgetful, Trusting, Careless, Late]


@pytest.mark.parametrize("table", WRONG, ids=lambda table: table.__name__)
def test_wrong_tables_are_noticed(table: type[Table]) -> None:
    """By some of three hundred random schedules."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        actions = [
            (int(a), int(k))
            for a, k in zip(rng.integers(0, 5, 30), rng.integers(0, 4, 30), strict=True)
        ]
        try:
            Schedule(table).run(actions)
        except AssertionError:
            return
    pytest.fail("nothing was noticed")


# What is sent.


def test_only_what_has_changed_is_sent() -> None:
    world = World()
    table = Table(HeldBack(world), [])
    array = np.arange(4.0)
    assert [table.on_device(array) is table.on_device(array.copy()) for _ in range(3)] == [True] * 3
    assert table.uploads == 1
    array[2] = -0.0
    table.on_device(array)
    array[2] = 0.0
    # Bits count, not values.
    table.on_device(array)
    assert table.uploads == 3
    world.switch(1)
    table.on_device(array)
    assert table.uploads == 3


def test_fixed_arrays_are_known_by_what_they_are() -> None:
    """They are kept: another one may not come to lie in the place of one that is gone, and be taken
    for it."""
    table = Table(HeldBack(World()), [])
    for i in range(3):
        array = np.full(3, i)
        array.setflags(write=False)
        before = weakref.ref(array)
        table.on_device(array)
        table.on_device(array)
        assert table.uploads == i + 1
        del array
        assert before() is not None


def test_tables_may_be_empty_and_grow() -> None:
    world = World()
    captured: list[Tensor] = []
    table = Table(HeldBack(world), captured, SPARE)
    for n in (0, 3, 1, 9):
        array = np.arange(n)
        world.launch(table.on_device(array), array)
    with world.capture() as graph:
        world.launch(table.on_device(np.arange(9)[::-1].copy()), np.arange(9)[::-1])
    world.replay(graph)
    world.finish()


def test_a_capture_needs_steps_before_it() -> None:
    world = World()
    table = Table(HeldBack(world), [], SPARE)
    with (
        world.capture(),
        pytest.raises(RuntimeError, match="take a few steps outside of captures") as caught,
    ):
        table.on_device(np.arange(3))
    assert "\n" not in str(caught.value)
    table.on_device(np.arange(3))
    with world.capture():
        for i in range(SPARE):
            table.on_device(np.arange(3) + i + 1)
        with pytest.raises(RuntimeError, match=f"at most {SPARE} within them"):
            table.on_device(np.arange(3))
    # A step outside takes new memory.
    table.on_device(np.arange(3) + 7)
    with world.capture():
        table.on_device(np.arange(3))


# Launches.


class Counting(Interpreter):
    """Streams and captures, where work is done as soon as it is queued."""

    now: Any = "first"
    capturing = False
    announced: list[tuple[Any, int]]

    def stream(self) -> Any:
        return Counting.now

    def is_capturing(self) -> bool:
        return Counting.capturing

    def announce(self, memory: Tensor) -> None:
        Counting.announced.append((Counting.now, memory.untyped_storage().data_ptr()))

    def pin(self, count: int, dtype: torch.dtype) -> Tensor:
        assert not Counting.capturing
        return super().pin(count, dtype)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Counting, "now", "first")
    monkeypatch.setattr(Counting, "capturing", False)
    monkeypatch.setattr(Counting, "announced", [], raising=False)
    with interpreted(Counting):
        yield Counting


def given_to(kernel: gpu.Kernel, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Everything that kernels are given from now on."""
    seen: list[Tensor] = []
    start = gpu.Kernel.start

    def noted(self: gpu.Kernel, call: gpu.Start) -> None:
        seen.extend(a for a in call.arguments if isinstance(a, Tensor))
        start(self, call)

    monkeypatch.setattr(gpu.Kernel, "start", noted)
    return seen


PROGRAMS = {"lamb": lambda: program(lamb), "factored": lambda: program(factored)}


@pytest.mark.parametrize("name", PROGRAMS)
def test_memory_of_another_stream_is_announced(
    name: str, counting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that kernels are given, and what they reach through tables."""
    kernel = compiled(PROGRAMS[name]())
    # Two matrices: wide ones have sums in several shares.
    sizes = np.array([(1, 300, 40), (1, 2, 3)])
    columns = [np.ones(np.prod(size)) for size in sizes]
    memory = [[np.ones_like(c) for c in columns] for _ in kernel.program.columns]
    memory = [[c.astype(np.float32) for c in column] for column in memory]
    pointers = np.array([[c.ctypes.data for c in column] for column in memory], np.uint64)
    launch = kernel.prepare(pointers, kernel.split(sizes), np.zeros(2, np.int64), 1)
    launch.run(2)
    assert counting.announced == []
    seen = given_to(kernel, monkeypatch)
    counting.now = "second"
    launch.run(2)
    announced = {place for stream, place in counting.announced if stream == "second"}
    assert {t.untyped_storage().data_ptr() for t in seen} <= announced
    assert {t.untyped_storage().data_ptr() for t in launch._temporaries.kept.values()} <= announced


def capture(counting: Any, side: Any) -> None:
    counting.capturing = True
    try:
        side.opt.step()
    finally:
        counting.capturing = False


def test_what_a_graph_reads_outlives_plans(counting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches that follow, other parameters, other options, a state dict: what was captured is
    still there."""
    side = make_side(onepass, "nadam", capturable=True)
    for _ in range(2):
        side.step()
    side.set_gradients()
    seen = given_to(side.opt._onepass.plan.kernels[0].kernel, monkeypatch)
    capture(counting, side)
    graph = [(t.data_ptr(), t.numpy().tobytes()) for t in seen if t.numel()]
    seen.clear()

    def is_there() -> bool:
        gc.collect()
        private = side.opt._onepass
        captured = [*private.captured, *(() if private.plan is None else private.plan.captured)]
        held = {t.untyped_storage().data_ptr(): t for t in captured}
        # What the step itself writes has changed since; its tables have not.
        tables = [(place, content) for place, content in graph if place in held]
        return len(tables) == len(graph)

    changes: list[Callable[[], Any]] = [
        lambda: side.step(),
        lambda: side.step(only=[0, 2]),
        lambda: side.step(),
        lambda: side.opt.param_groups[0].update(decoupled_weight_decay=False),
        lambda: side.step(),
        lambda: side.opt.load_state_dict(side.opt.state_dict()),
        lambda: side.opt.add_param_group({"params": [torch.ones(3, requires_grad=True)]}),
        lambda: side.step(),
    ]
    assert graph
    assert is_there()
    for change in changes:
        change()
        assert is_there()


def test_captures_need_capturable_and_steps_before(counting: Any) -> None:
    """One sentence each, and nothing has changed."""
    plain = make_side(onepass, "adamw")
    plain.step()
    plain.set_gradients()
    counting.capturing = True
    refuses(plain.opt, "needs capturable=True in every param group")
    ready = make_side(onepass, "adamw", capturable=True)
    ready.set_gradients()
    refuses(ready.opt, "take a few steps outside of captures first")
    counting.capturing = False
    ready.opt.step()
    # Another set of parameters has tables of its own.
    ready.opt.zero_grad()
    ready.set_gradients([1])
    counting.capturing = True
    with pytest.raises(RuntimeError, match="take a few steps outside of captures"):
        ready.opt.step()


@pytest.mark.parametrize(
    "row", [row for row in TABLE if str(row) in ("AdamW", "SGD", "RAdam", "Adagrad")], ids=str
)
def test_rows_are_sent_ahead(row: Any, counting: Any) -> None:
    """Step counts change the uniform values of every step: what was foretold is used, and only if
    it is right."""
    p = torch.ones(40, requires_grad=True)
    theirs = torch.ones(40, requires_grad=True)
    opt, other = row.make([p]), row.make_torch([theirs])
    gradient = torch.linspace(-1, 1, 40)
    count = []
    for k in range(40):
        for one, tensor in ((opt, p), (other, theirs)):
            one.param_groups[0]["lr"] = 0.1 if k < 20 else 0.05
            tensor.grad = gradient
            one.step()
        count.append(opt._onepass.plan.kernels[0].launch.uploads)
    # Four tables, then more and more rows at a time; a rate that changes makes it begin anew.
    assert count[-1] - count[2] <= 12
    torch.testing.assert_close(p, theirs, rtol=1e-4, atol=1e-5)
