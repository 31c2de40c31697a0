"""A device whose streams are held back, and whose memory is given out again as soon as torch's
rules allow.

The host runs ahead of all streams. What has been let go is overwritten at once with garbage by
somebody else: memory of the host, when no copy that was queued will read it; memory of the device,
behind what its own stream has been given so far, and behind what streams have been given that were
announced.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onepass.kernel.gpu.uploads import Device

GARBAGE = 0xCB
# Work of a stream: whether it could be done now, and the doing.
Work = tuple[Callable[[], bool], Callable[[], None]]


class Lent(Tensor):
    """Memory that is given out, until nobody has the tensor any more."""

    block: Block


@dataclass(eq=False)
class Block:
    """A stretch of memory; of the device, with the stream that it was taken on, and those that were
    announced."""

    memory: np.ndarray
    stream: Stream | None = None
    announced: set[Stream] = field(default_factory=set)
    # Copies that have been queued and not done, and a graph that will read it again.
    readers: int = 0
    of_graph: bool = False


class Stream:
    """Work in order; `done` counts what has been done since the beginning."""

    def __init__(self) -> None:
        self.queue: list[Work] = []
        self.queued = self.done = 0

    def put(self, do: Callable[[], None], can: Callable[[], bool] = lambda: True) -> None:
        self.queue.append((can, do))
        self.queued += 1

    def advance(self) -> bool:
        """Do one piece of work, unless there is none, or it waits for another stream."""
        if not self.queue or not self.queue[0][0]():
            return False
        self.queue.pop(0)[1]()
        self.done += 1
        return True

    def reaches(self, place: int) -> Callable[[], bool]:
        return lambda: self.done >= place


class Graph:
    """Captured work, which lives as long as this does, and the memory that was taken meanwhile."""

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []
        self.blocks: list[Block] = []


class World:
    """All streams, all memory, and the host's view: which stream is current, and whether work is
    being captured."""

    def __init__(self, streams: int = 2) -> None:
        self.streams = [Stream() for _ in range(streams)]
        self.current = self.streams[0]
        self.graph: Graph | None = None
        self.pinned: list[Block] = []
        self.overwritten = 0

    # What the host does.

    def switch(self, i: int) -> None:
        """Go on with another stream, behind what the present one has been given: as whoever steps
        on both must."""
        before, self.current = self.current, self.streams[i]
        self.current.put(lambda: None, before.reaches(before.queued))

    def launch(self, table: Tensor, want: np.ndarray) -> None:
        """Queue a kernel that reads a table, in which it must then find this."""
        block, content = block_of(table), want.tobytes()

        def read() -> None:
            assert block.memory.tobytes()[: len(content)] == content, (
                "a kernel read what was not its table"
            )

        self._queue(read)

    def _queue(self, do: Callable[[], None]) -> None:
        if self.graph is None:
            self.current.put(do)
        else:
            self.graph.work.append(do)

    @contextmanager
    def capture(self) -> Iterator[Graph]:
        self.graph = graph = Graph()
        try:
            yield graph
        finally:
            self.graph = None

    def replay(self, graph: Graph) -> None:
        """Queue what was captured once more."""
        for do in graph.work:
            self.current.put(do)

    def finish(self) -> None:
        """Let all streams go until nothing is left."""
        while any(stream.advance() for stream in self.streams):
            self.collect()
        self.collect()
        assert not any(stream.queue for stream in self.streams)

    # Memory.

    def collect(self) -> None:
        """Give memory of the host that no copy will read to somebody else, who writes."""
        for block in [b for b in self.pinned if not b.readers]:
            self.pinned.remove(block)
            block.memory.view(np.uint8)[:] = GARBAGE
            self.overwritten += 1

    def lend(self, count: int, dtype: torch.dtype, stream: Stream | None) -> Lent:
        memory = torch.zeros(count, dtype=dtype)
        block = Block(
            memory.numpy(), stream, of_graph=stream is not None and self.graph is not None
        )
        if block.of_graph:
            self.graph.blocks.append(block)  # type: ignore[union-attr]
        lent = memory.as_subclass(Lent)
        lent.block = block
        weakref.finalize(lent, self._take_back, block)
        return lent

    def _take_back(self, block: Block) -> None:
        if block.stream is None:
            self.pinned.append(block)
        elif not block.of_graph:
            # The first to take it: on its own stream, when the announced ones have got as far as
            # they are now.
            waiting = [stream.reaches(stream.queued) for stream in block.announced]

            def overwrite() -> None:
                block.memory.view(np.uint8)[:] = GARBAGE
                self.overwritten += 1

            if waiting:
                # It is given out when that is known, somewhere behind in the stream.
                block.stream.put(overwrite, lambda: all(is_there() for is_there in waiting))
            else:
                block.stream.put(overwrite)

    def copy(self, source: Block, target: Block) -> None:
        """Queue a copy; until it is done, or for ever if it was captured, its source is not given
        out again."""

        def done() -> None:
            target.memory[:] = source.memory
            source.readers -= 1

        def again() -> None:
            target.memory[:] = source.memory

        if self.graph is None:
            source.readers += 1
            self._queue(done)
        else:
            # An event that is captured says nothing of replays: torch gives the memory out again
            # when it is let go.
            self._queue(again)


def block_of(table: Tensor) -> Block:
    assert isinstance(table, Lent)
    return table.block


class HeldBack(Device):
    """The world as a device."""

    def __init__(self, world: World) -> None:
        self.device, self.world = torch.device("cpu"), world

    def guard(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def stream(self) -> Any:
        return self.world.current

    def is_capturing(self) -> bool:
        return self.world.graph is not None

    def announce(self, memory: Tensor) -> None:
        block_of(memory).announced.add(self.world.current)

    def pin(self, count: int, dtype: torch.dtype) -> Tensor:
        assert self.world.graph is None, "taking memory of the host may end a capture"
        return self.world.lend(count, dtype, None)

    def send(self, pinned: Tensor) -> Tensor:
        sent = self.world.lend(pinned.numel(), pinned.dtype, self.world.current)
        self.world.copy(block_of(pinned), sent.block)
        return sent

    def empty(self, count: int, dtype: torch.dtype) -> Tensor:
        return self.world.lend(count, dtype, self.world.current)
