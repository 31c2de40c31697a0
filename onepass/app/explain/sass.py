"""What a GPU really runs: the instructions of a kernel's usual way, and the time that they need at
least.

A kernel's machine code has the usual way, over full aligned blocks, beside the ones for tails and
for division by tiny and huge numbers. Only the first is counted: the path through the control flow
that moves the most bytes in wide accesses, calls the fewest subroutines, and is the shortest of
those.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["Bound", "Chip", "Way", "bound", "fast_path"]

WIDE = 64
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
# Where work other than plain float32 arithmetic queues up; lanes a clock and multiprocessor of
# compute capability 9.0, by the table of arithmetic throughput in NVIDIA's CUDA C++ Programming
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
    """A GPU: multiprocessors, clock in Hz, and the bytes that it copies in a second, read and
    written."""

    name: str
    multiprocessors: int
    clock: float
    bandwidth: float
    schedulers: int = 4
    lanes: int = 32


@dataclass(frozen=True)
class Way:
    """The instructions of a way through a kernel, or of one round of its loop, for a thread, and
    its wide accesses."""

    instructions: tuple[str, ...]
    loads: Mapping[int, int]
    stores: Mapping[int, int]
    is_loop: bool

    @property
    def moved(self) -> int:
        """Bytes that one thread reads and writes on this way in wide accesses."""
        return sum(
            bits // 8 * count
            for which in (self.loads, self.stores)
            for bits, count in which.items()
        )


@dataclass(frozen=True)
class Bound:
    """The least seconds for an element: for its instructions, where `by` is what limits them, and
    for its bytes."""

    arithmetic: float
    by: str
    memory: float


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
        wide = sum(
            bits * count
            for accesses in (self.loads, self.stores)
            for bits, count in accesses.items()
        )
        return wide, -self.calls, -len(self.instructions)


def fast_path(listing: str, name: str) -> Way:
    """The usual way through kernel `name` in a listing of nvdisasm: of its innermost loop over wide
    accesses, if any.

    Raises ValueError where the listing has no such kernel.
    """
    blocks = _blocks(_lines_of(listing, name))
    if not blocks:
        raise ValueError(f"the listing has no kernel {name}.")
    order, back = _walk(blocks)
    loops = [(_body(blocks, latch, header), header, latch) for latch, header in back]
    loops = [
        (body, header, latch)
        for body, header, latch in loops
        if any(blocks[k].merit[0] for k in body)
    ]
    inner = [loop for loop in loops if not any(other[0] < loop[0] for other in loops)]
    if not inner:
        return _best(blocks, order, back, 0, None)
    ways = [
        _best(blocks, [k for k in order if k in body], back, header, latch)
        for body, header, latch in inner
    ]
    return max(ways, key=lambda way: (way.moved, -len(way.instructions)))


def _lines_of(listing: str, name: str) -> list[str]:
    """A kernel's lines: from its label to the subroutines that come with it, or to the end of its
    section."""
    lines = listing.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.rstrip() == f"{name}:"), len(lines))
    ends = (
        i
        for i in range(begin + 1, len(lines))
        if re.match(r"\s*\.type\s|//-----|\s*\.section\s", lines[i])
    )
    return lines[begin:][: next(ends, len(lines)) - begin]


def _blocks(lines: Sequence[str]) -> list[_Block]:
    """The basic blocks in the order of the listing."""
    blocks, labels, jumps = [_Block()], dict[str, int](), list[tuple[int, str, bool]]()
    closed = False
    for line in lines:
        if label := re.match(r"(\.L\w+):", line):
            if blocks[-1].instructions or closed:
                blocks.append(_Block())
            labels[label[1]], closed = len(blocks) - 1, False
        elif found := INSTRUCTION.match(line):
            if closed:
                blocks.append(_Block())
            closed = _add(blocks, jumps, found[1] or "", found[2], found[3])
    ends = {at for at, _, always in jumps if always}
    for k in range(len(blocks) - 1):
        if k not in ends:
            blocks[k].next.append(k + 1)
    for at, label, _ in jumps:
        if label in labels:
            blocks[at].next.append(labels[label])
    return blocks if any(block.instructions for block in blocks) else []


def _add(
    blocks: list[_Block], jumps: list[tuple[int, str, bool]], guard: str, op: str, operands: str
) -> bool:
    """Put an instruction into the last block; whether the block ends with it."""
    block = blocks[-1]
    block.instructions.append(op)
    kind, *modifiers = op.split(".")
    # A predicated access is a masked one, which a wide store of a full block never is.
    if kind in ("LDG", "STG") and not guard:
        bits = next((int(m) for m in modifiers if m in ("64", "128", "256")), 32)
        if bits >= WIDE:
            (block.loads if kind == "LDG" else block.stores)[bits] += 1
    block.calls += kind == "CALL"
    if kind == "BRA":
        target = re.search(r"`\((\S+?)\)", operands)
        always = not guard and not modifiers and operands.startswith("`")
        jumps.append((len(blocks) - 1, target[1] if target else "", always))
        return True
    if kind in ("EXIT", "RET", "BRX", "JMX"):
        jumps.append((len(blocks) - 1, "", not guard))
        return True
    return False


def _walk(blocks: Sequence[_Block]) -> tuple[list[int], set[tuple[int, int]]]:
    """The blocks that are reached, each before those that follow it, and the edges that go back."""
    order: list[int] = []
    back: set[tuple[int, int]] = set()
    state = {0: 1}
    stack = [(0, iter(blocks[0].next))]
    while stack:
        k, following = stack[-1]
        for n in following:
            if n not in state:
                state[n] = 1
                stack.append((n, iter(blocks[n].next)))
                break
            if state[n] == 1:
                back.add((k, n))
        else:
            state[k] = 2
            order.append(k)
            stack.pop()
    return order[::-1], back


def _body(blocks: Sequence[_Block], latch: int, header: int) -> set[int]:
    """The blocks of the loop that an edge back closes."""
    before: dict[int, list[int]] = {}
    for k, block in enumerate(blocks):
        for n in block.next:
            before.setdefault(n, []).append(k)
    body, waiting = {header}, [latch]
    while waiting:
        k = waiting.pop()
        if k not in body:
            body.add(k)
            waiting += before.get(k, [])
    return body


def _best(
    blocks: Sequence[_Block],
    order: Iterable[int],
    back: set[tuple[int, int]],
    first: int,
    last: int | None,
) -> Way:
    """The path of most merit from block `first` to block `last`, or to wherever the kernel ends."""
    merit: dict[int, tuple[int, int, int]] = {first: blocks[first].merit}
    came: dict[int, int] = {}
    ends: list[int] = []
    for k in order:
        if k not in merit:
            continue
        ahead = [n for n in blocks[k].next if (k, n) not in back]
        if k == last if last is not None else not ahead or blocks[k].instructions[-1] == "EXIT":
            ends.append(k)
        for n in ahead:
            wide, calls, length = (a + b for a, b in zip(merit[k], blocks[n].merit, strict=True))
            if n not in merit or (wide, calls, length) > merit[n]:
                merit[n], came[n] = (wide, calls, length), k
    at = max(ends, key=lambda k: merit[k])
    way = [at]
    while at != first:
        at = came[at]
        way.append(at)
    way.reverse()
    instructions = tuple(op for k in way for op in blocks[k].instructions)
    loads = sum((blocks[k].loads for k in way), Counter[int]())
    stores = sum((blocks[k].stores for k in way), Counter[int]())
    return Way(instructions, loads, stores, last is not None)


def bound(way: Way, elements: int, bytes_per_element: int, chip: Chip) -> Bound:
    """The least time for an element on a chip that is full, where one thread's path computes so
    many of them."""
    clocks = chip.multiprocessors * chip.clock * elements
    issue = len(way.instructions) / (clocks * chip.schedulers * chip.lanes)
    times = [(issue, "issue")]
    for name, lanes, ops in PIPES:
        times.append(
            (sum(ops.match(op) is not None for op in way.instructions) / (clocks * lanes), name)
        )
    slowest, by = max(times)
    return Bound(slowest, by, bytes_per_element / chip.bandwidth)
