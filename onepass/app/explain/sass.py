"""What a GPU really runs: the instructions of a kernel's usual way, and the least time they take.

A kernel's machine code has the usual way, over full aligned blocks. Beside it are ways for tails
and for division by tiny and huge numbers. Only the first is counted: the path through the control
flow that moves the most bytes in wide accesses. Of several such paths it is the one that calls the
fewest subroutines, and then the shortest.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["Bound", "Chip", "Way", "bound", "fast_path"]

# Accesses of at least this many bits are wide.
WIDE = 64
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
# A kernel ends with the subroutines that come with it, or with its section.
KERNEL_END = re.compile(r"\s*\.type\s|//-----|\s*\.section\s")
# Where work other than plain float32 arithmetic queues up; lanes for each clock and multiprocessor
# of compute capability 9.0, by the table of arithmetic throughput in NVIDIA's CUDA C++ Programming
# Guide.
PIPES = (
    ("special functions", 16, re.compile(r"MUFU")),
    ("float64", 64, re.compile(r"D(ADD|MUL|FMA|SETP|MNMX)\b")),
    (
        "integers",
        64,
        re.compile(r"(IADD3?|VIADD|LOP3?|SHF|SGXT|ISETP|V?IMNMX|LEA|PRMT|SEL|F2F|F2I|I2F)\b"),
    ),
)


@dataclass(frozen=True)
class Chip:
    """A GPU: `clock` in Hz, `bandwidth` in bytes a second that a copy reads and writes.

    Each of its multiprocessors has `schedulers`, which issue an instruction for `lanes` a clock.
    """

    name: str
    multiprocessors: int
    clock: float
    bandwidth: float
    schedulers: int = 4
    lanes: int = 32


@dataclass(frozen=True)
class Way:
    """The instructions of one thread on a way through a kernel, and its wide accesses.

    If `is_loop`, they are those of one round of its loop. `loads` and `stores` have the number of
    accesses by their bits.
    """

    instructions: tuple[str, ...]
    loads: Mapping[int, int]
    stores: Mapping[int, int]
    is_loop: bool

    @property
    def moved(self) -> int:
        """Bytes that the thread reads and writes in wide accesses."""
        return (_count_bits(self.loads) + _count_bits(self.stores)) // 8


@dataclass(frozen=True)
class Bound:
    """The least seconds for an element: for its instructions, and for its bytes.

    `by` says what limits the instructions: `issue`, or one of `PIPES`.
    """

    arithmetic: float
    by: str
    memory: float


def _count_bits(accesses: Mapping[int, int]) -> int:
    """Return the bits of all accesses, from their number by width."""
    return sum(bits * count for bits, count in accesses.items())


# --- blocks ---------------------------------------------------------------------------------------


@dataclass
class _Block:
    """A run of instructions without a jump in or out; `next` are the blocks that may follow."""

    instructions: list[str] = field(default_factory=list)
    loads: Counter[int] = field(default_factory=Counter)
    stores: Counter[int] = field(default_factory=Counter)
    calls: int = 0
    next: list[int] = field(default_factory=list)

    @property
    def merit(self) -> tuple[int, int, int]:
        """How much it speaks for a path: bits in wide accesses, few calls, few instructions."""
        wide = _count_bits(self.loads) + _count_bits(self.stores)
        return wide, -self.calls, -len(self.instructions)


@dataclass(frozen=True)
class _Jump:
    """A jump at the end of a block, to a label ("" if it leaves the kernel)."""

    block: int
    label: str
    is_always_taken: bool


def _lines_of(listing: str, name: str) -> list[str]:
    """Return a kernel's lines, from its label to its end; none if there is no such label."""
    found: list[str] = []
    for line in listing.splitlines():
        if found and KERNEL_END.match(line):
            break
        if found or line.rstrip() == f"{name}:":
            found.append(line)
    return found


def _blocks(lines: Sequence[str]) -> list[_Block]:
    """Return the basic blocks in the order of the listing."""
    blocks = [_Block()]
    labels: dict[str, int] = {}
    jumps: list[_Jump] = []
    is_closed = False
    for line in lines:
        if label := re.match(r"(\.L\w+):", line):
            if blocks[-1].instructions or is_closed:
                blocks.append(_Block())
            labels[label[1]] = len(blocks) - 1
            is_closed = False
        elif found := INSTRUCTION.match(line):
            if is_closed:
                blocks.append(_Block())
            guard, op, operands = found[1] or "", found[2], found[3]
            _add(blocks[-1], guard, op)
            jump = _jump_of(len(blocks) - 1, guard, op, operands)
            is_closed = jump is not None
            if jump is not None:
                jumps.append(jump)
    _connect(blocks, labels, jumps)
    return blocks if any(block.instructions for block in blocks) else []


def _add(block: _Block, guard: str, op: str) -> None:
    """Put an instruction into a block; `guard` is the predicate that masks it."""
    block.instructions.append(op)
    kind, *modifiers = op.split(".")
    block.calls += kind == "CALL"
    # A predicated access is a masked one, which a wide store of a full block never is.
    if kind not in ("LDG", "STG") or guard:
        return
    bits = next((int(modifier) for modifier in modifiers if modifier in ("64", "128", "256")), 32)
    if bits >= WIDE:
        accesses = block.loads if kind == "LDG" else block.stores
        accesses[bits] += 1


def _jump_of(block: int, guard: str, op: str, operands: str) -> _Jump | None:
    """Return the jump that an instruction is, with which its block ends."""
    kind, *modifiers = op.split(".")
    if kind == "BRA":
        target = re.search(r"`\((\S+?)\)", operands)
        is_always_taken = not guard and not modifiers and operands.startswith("`")
        return _Jump(block, target[1] if target else "", is_always_taken)
    if kind in ("EXIT", "RET", "BRX", "JMX"):
        return _Jump(block, "", not guard)
    return None


def _connect(blocks: Sequence[_Block], labels: Mapping[str, int], jumps: Sequence[_Jump]) -> None:
    """Tell each block which may follow it: the next one, and those that it jumps to."""
    ends = {jump.block for jump in jumps if jump.is_always_taken}
    for index in range(len(blocks) - 1):
        if index not in ends:
            blocks[index].next.append(index + 1)
    for jump in jumps:
        if jump.label in labels:
            blocks[jump.block].next.append(labels[jump.label])


# --- paths ----------------------------------------------------------------------------------------


def fast_path(listing: str, name: str) -> Way:
    """Return the usual way through kernel `name` in a listing of nvdisasm.

    If there are loops with wide accesses, it is a round of an innermost one. Raises ValueError if
    the listing has no such kernel.
    """
    blocks = _blocks(_lines_of(listing, name))
    if not blocks:
        raise ValueError(f"the listing has no kernel {name}.")
    order, edges_back = _walk(blocks)
    loops = []
    for latch, header in edges_back:
        body = _body(blocks, latch, header)
        if any(blocks[index].merit[0] for index in body):
            loops.append((body, header, latch))
    inner = [loop for loop in loops if not any(other[0] < loop[0] for other in loops)]
    if not inner:
        return _best(blocks, order, edges_back, 0, None)
    ways = []
    for body, header, latch in inner:
        order_in_body = [index for index in order if index in body]
        ways.append(_best(blocks, order_in_body, edges_back, header, latch))
    return max(ways, key=lambda way: (way.moved, -len(way.instructions)))


def _walk(blocks: Sequence[_Block]) -> tuple[list[int], set[tuple[int, int]]]:
    """Return the blocks that are reached, each before those that follow, and the edges back.

    Edges back close loops: they lead to a block that is still open in this walk, depth first.
    """
    order: list[int] = []
    edges_back: set[tuple[int, int]] = set()
    is_open = {0: True}
    stack = [(0, iter(blocks[0].next))]
    while stack:
        block, followers = stack[-1]
        for follower in followers:
            if follower not in is_open:
                is_open[follower] = True
                stack.append((follower, iter(blocks[follower].next)))
                break
            if is_open[follower]:
                edges_back.add((block, follower))
        else:
            is_open[block] = False
            order.append(block)
            stack.pop()
    return order[::-1], edges_back


def _body(blocks: Sequence[_Block], latch: int, header: int) -> set[int]:
    """Return the blocks of the loop that the edge from `latch` back to `header` closes."""
    before: dict[int, list[int]] = {}
    for index, block in enumerate(blocks):
        for follower in block.next:
            before.setdefault(follower, []).append(index)
    body = {header}
    waiting = [latch]
    while waiting:
        index = waiting.pop()
        if index not in body:
            body.add(index)
            waiting += before.get(index, [])
    return body


def _best(
    blocks: Sequence[_Block],
    order: Iterable[int],
    edges_back: set[tuple[int, int]],
    first: int,
    last: int | None,
) -> Way:
    """Return the path of most merit from block `first` to block `last`.

    If `last` is None, the path may end wherever the kernel does.
    """
    merits = {first: blocks[first].merit}
    previous: dict[int, int] = {}
    ends: list[int] = []
    for block in order:
        if block not in merits:
            continue
        ahead = [follower for follower in blocks[block].next if (block, follower) not in edges_back]
        if last is None:
            is_end = not ahead or blocks[block].instructions[-1] == "EXIT"
        else:
            is_end = block == last
        if is_end:
            ends.append(block)
        for follower in ahead:
            wide, calls, length = merits[block]
            more_wide, more_calls, more_length = blocks[follower].merit
            merit = (wide + more_wide, calls + more_calls, length + more_length)
            if follower not in merits or merit > merits[follower]:
                merits[follower] = merit
                previous[follower] = block
    path = [max(ends, key=lambda block: merits[block])]
    while path[0] != first:
        path.insert(0, previous[path[0]])
    return _make_way([blocks[index] for index in path], is_loop=last is not None)


def _make_way(path: Sequence[_Block], is_loop: bool) -> Way:
    """Return what one thread executes on a path of blocks."""
    instructions: list[str] = []
    loads = Counter[int]()
    stores = Counter[int]()
    for block in path:
        instructions += block.instructions
        loads += block.loads
        stores += block.stores
    return Way(tuple(instructions), loads, stores, is_loop)


def bound(way: Way, elements: int, bytes_per_element: int, chip: Chip) -> Bound:
    """Return the least time for an element on a chip that is full.

    One thread computes this many `elements` on its way.
    """
    clocks = chip.multiprocessors * chip.clock * elements
    issue = len(way.instructions) / (clocks * chip.schedulers * chip.lanes)
    times = [(issue, "issue")]
    for name, lanes, pattern in PIPES:
        count = sum(pattern.match(op) is not None for op in way.instructions)
        times.append((count / (clocks * lanes), name))
    slowest, by = max(times)
    return Bound(slowest, by, bytes_per_element / chip.bandwidth)
