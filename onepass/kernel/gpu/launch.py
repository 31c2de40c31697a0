"""Backend 3: a program compiled by Triton; one launch of each pass for all tensors of all groups on
a device.

The launch is given addresses and trusts them, as that of `cpu`. Work is queued on torch's current
stream, and nothing here waits for the device or asks it anything. For the memory that kernels read
and write the rules of any torch operation hold: what is freed on the stream on which it was taken
is given out again behind the kernels that use it; whoever steps on another stream than that orders
the two, as for every other operation of torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..graph.caches import share
from ..graph.ir import Node, Rank, topological
from ..graph.passes import Call, Program
from ..llvm.native import Library
from ..llvm.uniforms import Host, leaf_names
from ..tensors.temporaries import TORCH, Temporaries
from .foretold import Rows
from .jit import launch, load, prepare
from .tiles import BLOCK, lower
from .uniforms import FACTS, fact_names, input_offsets, stages
from .units import Work
from .uploads import SPARE, Device, Table

COMPUTE = {"f32": np.float32, "f64": np.float64}
Range = tuple[int, int, dict[str, int]]


class Kernel:
    """A compiled program, callable on columns of any number of tensors of one device."""

    def __init__(
        self,
        program: Program,
        device: torch.device,
        numbers: tuple[str, ...] | None,
        number_type: str,
    ) -> None:
        """`numbers` are the state entries that are one number a parameter and lie on the device,
        see `tiles.lower`."""
        self.program, self.device = program, Device(device)
        self.numbers, self.is_resident = numbers or (), numbers is not None
        self.source = lower(program, numbers, number_type)
        self.functions = {one.name: one for one in self.source.functions}
        self._module = load(self.source)
        self._loaded: set[tuple[object, ...]] = set()
        self.leaves = {name: i for i, name in enumerate(leaf_names(program))}
        self.stages = stages(program, self.is_resident)
        self.host = HostRows(program)

    def concurrency(self) -> int:
        """How many tensors may be worked on at once: the device decides."""
        return 1 << 31

    def split(self, sizes: np.ndarray) -> Work:
        """How to cut walks over tensors of these sizes; good for any number of launches."""
        return Work(sizes, self.program)

    def prepare(self, pointers: np.ndarray, work: Work, rows: np.ndarray, settings: int) -> Launch:
        """Everything about a launch that may stay the same from step to step."""
        return Launch(self, pointers, work, rows, settings)

    def is_capturing(self) -> bool:
        """Whether a step would be recorded into a graph now."""
        return self.device.is_capturing()

    def start(self, call: Start) -> None:
        """Queue a function of the module on the current stream."""
        launch(
            self._module, self.functions[call.name], call.grid, *call.arguments, **call.constants
        )

    def load(self, call: Start) -> None:
        """Compile what a start needs, and bring it to the device, where that has not been done.

        Raises RuntimeError within a capture, which would not survive it, and what Triton raises.
        """
        variant = (call.name, *sorted(call.constants.items()))
        if call.grid > 0 and variant not in self._loaded:
            if self.is_capturing():
                raise RuntimeError(
                    "a step cannot be captured in a graph before one like it has been taken: take "
                    "a few steps outside of captures, with GradScaler too if it has one"
                )
            prepare(self._module, self.functions[call.name], *call.arguments, **call.constants)
            self._loaded.add(variant)


class Start(NamedTuple):
    """A function of the module, how many programs of it, and what they are given."""

    name: str
    grid: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


class HostRows:
    """The uniform values that follow from hyper-parameters alone, computed here: by the same code
    as for the CPU."""

    def __init__(self, program: Program) -> None:
        self.program = program
        parts = [Host(program, one, k) for k, one in enumerate(program.passes)]
        text = "\n".join(part.text() for part in parts)
        self._library = Library(
            "\n".join([text, *sorted({line for part in parts for line in part.declared})])
        )
        signature = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
        self._functions = [signature(self._library.address(f"host_{k}")) for k in range(len(parts))]
        self.at = [{node: i for i, node in enumerate(one.inputs)} for one in program.passes]

    def fill(self, k: int, leaves: np.ndarray) -> np.ndarray:
        """The inputs of pass k: (settings, inputs)."""
        table = np.empty(
            (leaves.shape[1], len(self.program.passes[k].inputs)), COMPUTE[self.program.compute]
        )
        self._functions[k](leaves.ctypes.data, leaves.shape[1], table.ctypes.data)
        return table

    def fill_all(self, leaves: np.ndarray) -> np.ndarray:
        """The inputs of all passes, side by side."""
        return np.concatenate([self.fill(k, leaves) for k in range(len(self._functions))], axis=1)

    def column(self, k: int, node: Node, leaves: np.ndarray) -> np.ndarray:
        """One value of pass k, for each setting."""
        if node.op == "const":
            return np.full(leaves.shape[1], node.attr, COMPUTE[self.program.compute])
        return self.fill(k, leaves)[:, self.at[k][node]]


class Launch:
    """A kernel with its arguments laid out; `run` may be called again and again while they stay
    where they are.

    `leaves` (leaf, setting; float64) hold the hyper-parameters; where one lies on the device it
    stands in `device_leaves` instead, as (leaf, setting or None for all, tensor). Where a `guard`,
    a float32 on the device, is not 0, nothing changes. `fresh` (tensors; int32, on the device) is 1
    for each tensor whose state has not stepped yet, and is set to 0 by its first step. What a
    captured graph reads is put into `captured`, see `uploads`.
    """

    def __init__(
        self, kernel: Kernel, pointers: np.ndarray, work: Work, rows: np.ndarray, settings: int
    ) -> None:
        """`pointers` (columns and numbers, tensors; uint64), `work` and `rows` as those of the
        CPU's launch."""
        self.kernel, self.pointers, self.work = kernel, pointers, work
        program, device = kernel.program, kernel.device
        self.leaves = np.zeros((len(kernel.leaves), settings))
        self.rows = np.ascontiguousarray(rows, np.int64)
        self.active = np.ones(len(rows), np.int64)
        self.device_leaves: list[tuple[int, int | None, Tensor]] = []
        self.guard: Tensor | None = None
        self.fresh = device.empty(len(rows), torch.int32).zero_()
        self.captured: list[Tensor] = []
        # What this step's table of addresses holds, and the starts that have been made with it.
        self._placed: bytes | None = None
        self._ready: dict[int, list[Start]] = {}
        self._temporaries = Temporaries(program, work.sizes, work.parts, device.device)
        self._first_to_store = max((call.after + 1 for call in program.calls), default=0)
        spare = SPARE if kernel.is_resident else 0
        self._sent = {
            name: Table(device, self.captured, spare) for name in ("addresses", "leaves", "facts")
        }
        self._sent |= {
            f"units {k}": Table(device, self.captured) for k in range(len(program.passes))
        }
        for units in work.units:
            units.table.setflags(write=False)
        self._find_partials()
        self._folds = [self._find_folds(k) for k in range(len(program.passes))]
        if kernel.stages:
            width = input_offsets(program)[-1]
            self._table = device.empty(max(len(rows) * width, 1), TORCH[program.compute])
        else:
            self._rows = Rows(
                device, self.captured, kernel.host.fill_all, kernel.leaves.get("step")
            )
            self._sent["rows"] = self._rows.table
        self._nothing = device.empty(1, torch.float32)
        self._stream = device.stream()

    @property
    def uploads(self) -> int:
        """How many tables have been sent to the device so far."""
        return sum(table.uploads for table in self._sent.values())

    def _find_partials(self) -> None:
        """The memory of partial results, and the facts that say where each tensor's are."""
        program, work = self.kernel.program, self.work
        matrices, rows, columns = work.sizes.T
        own = np.arange(len(self.rows)) if self.kernel.stages else self.rows
        facts = [own, self.rows, self.active, matrices, rows, columns, work.numel]
        self._begin: list[int] = []
        size = 0
        for one, units in zip(program.passes, work.units, strict=True):
            # Multiples of 16 bytes: Triton compiles a variant for pointers that are none.
            self._begin.append(size)
            facts += [size + units.first * len(one.reductions), units.count]
            size += -(-len(units.table) * len(one.reductions) // 16) * 16
        self._facts = np.stack(facts).astype(np.int64)
        assert len(self._facts) == len(fact_names(program))
        self._partials = self.kernel.device.empty(max(size, 1), torch.float64)

    def _find_folds(self, k: int) -> tuple[Table, np.ndarray, Table, np.ndarray] | None:
        """What is to be added up after pass k, of sums that several programs have a share in."""
        entries = []
        for one in self.kernel.program.passes[k].sums:
            for t in np.flatnonzero(
                (self.work.parts[one.into] > 1) & (self.work.numel > 0)
            ).tolist():
                shares = self._temporaries.shares(one.into, t)
                entries.append(
                    (
                        shares.data_ptr(),
                        shares.shape[1],
                        shares.shape[0],
                        int(one.node.op == "amax"),
                    )
                )
        if not entries:
            return None
        table = np.array(entries, np.int64)
        blocks = -(-table[:, 1] // BLOCK)
        entry = np.repeat(np.arange(len(table)), blocks)
        block = np.arange(len(entry)) - np.repeat(np.cumsum(blocks) - blocks, blocks)
        units = np.stack([entry, block], axis=1).astype(np.int32)
        table.setflags(write=False)
        units.setflags(write=False)
        return (
            Table(self.kernel.device, self.captured),
            table,
            Table(self.kernel.device, self.captured),
            units,
        )

    def run(self, workers: int) -> None:
        """Run the program once, in place. With one worker, tensors are walked one after the
        other."""
        self.begin(workers)
        self.finish(workers)

    def begin(self, workers: int) -> None:
        """Do what may fail: tables, compiling, functions of matrices and what they are given.

        To be finished, or cancelled.
        """
        try:
            with self.kernel.device.guard():
                self._temporaries.allocate()
                self._send()
                for k in range(len(self.kernel.program.passes)):
                    self._ready[k] = list(self._starts(k, workers))
                    for call in self._ready[k]:
                        self.kernel.load(call)
                for k in range(self._first_to_store):
                    self._run_pass(k, workers)
        except BaseException:
            self.cancel()
            raise
        self._temporaries.release_sources()

    def finish(self, workers: int) -> None:
        """Do the rest, which stores."""
        with self.kernel.device.guard():
            # Other parameters have stepped meanwhile, by torch's operations, which may have moved
            # memory.
            self._send_addresses()
            for k in range(self._first_to_store, len(self.kernel.program.passes)):
                self._run_pass(k, workers)
        self._temporaries.release()

    def cancel(self) -> None:
        """Give back the memory of what has begun and will not be finished."""
        self._ready.clear()
        self._temporaries.release()

    def _send(self) -> None:
        """Bring the tables on the device up to date; only what has changed is sent."""
        device = self.kernel.device
        self._facts[FACTS.index("active")] = self.active
        self._placed = None
        self._send_addresses()
        self._tensors = self._sent["facts"].on_device(self._facts)
        self._units = [
            self._sent[f"units {k}"].on_device(units.table)
            for k, units in enumerate(self.work.units)
        ]
        if self.kernel.stages:
            self._leaves = self._sent["leaves"].on_device(self.leaves)
            self._set_device_leaves()
        else:
            self._table = self._rows.on_device(self.leaves)
        # As with tables, see `uploads`.
        own = (
            self._partials,
            self._nothing,
            self._table,
            self.fresh,
            *self._temporaries.kept.values(),
        )
        if device.is_capturing():
            self.captured += [*own, *(value for *_, value in self.device_leaves)]
            self.captured += [] if self.guard is None else [self.guard]
        elif device.stream() != self._stream:
            for memory in own:
                device.announce(memory)

    def _send_addresses(self) -> None:
        """Send the table of addresses, unless this step has sent it already."""
        placed = self.pointers.tobytes() + self._temporaries.pointers.tobytes()
        if placed != self._placed:
            table = np.concatenate([self.pointers, self._temporaries.pointers]).view(np.int64)
            self._placed, self._addresses = placed, self._sent["addresses"].on_device(table)
            self._ready.clear()

    def _set_device_leaves(self) -> None:
        """Copy the hyper-parameters that lie on the device to their places, without looking at
        them."""
        if self.device_leaves:
            places = self._leaves[: self.leaves.size].view(self.leaves.shape)
            leaves = [
                (places[leaf] if s is None else places[leaf, s], value)
                for leaf, s, value in self.device_leaves
            ]
            values = [value.detach().reshape(()).expand_as(place) for place, value in leaves]
            torch._foreach_copy_([place for place, _ in leaves], values)

    def _run_pass(self, k: int, workers: int) -> None:
        """One walk, what must be known before, and what follows it."""
        for start in self._ready.pop(k, None) or self._starts(k, workers):
            self.kernel.start(start)
        calls = [call for call in self.kernel.program.calls if call.after == k]
        for call in calls:
            self._temporaries.call(call, self._numbers(call))
        if calls:
            self._send_addresses()

    def _starts(self, k: int, workers: int) -> Iterator[Start]:
        """The functions of one walk, in order: uniform values, the pass itself, sums of what its
        programs have left."""
        count, folds = len(self.rows), self._folds[k]
        guard = self._nothing if self.guard is None else self.guard
        guarded = {"GUARDED": self.guard is not None}
        for s, (before, _) in enumerate(self.kernel.stages):
            if before == k:
                given = (
                    self._addresses,
                    self._tensors,
                    self._leaves,
                    self._table,
                    self._partials,
                    self.fresh,
                    guard,
                )
                yield Start(f"uniforms_{s}", count, (*given, self.leaves.shape[1], count), guarded)
        if self.kernel.program.passes[k].roots:
            partials = self._partials[self._begin[k] :]
            given = (self._addresses, self._tensors, self._units[k], self._table, partials, guard)
            for begin, end, shape in self._ranges(k, workers):
                yield Start(f"pass_{k}", end - begin, (*given, begin, count), guarded | shape)
        if folds is not None:
            sent, entries, units_sent, units = folds
            given = (sent.on_device(entries), units_sent.on_device(units), guard, 0)
            yield Start("fold", len(units), given, guarded)

    def _ranges(self, k: int, workers: int) -> Sequence[Range]:
        """The launches of a pass: all tensors at once, or one after the other."""
        units = self.work.units[k]
        if workers > 1:
            return units.launches
        return [one for t in range(len(self.rows)) for one in units.of_tensor(t) if units.count[t]]

    def scalars(self) -> Mapping[str, np.ndarray]:
        """Each tensor's new scalars in the compute type, where these are the host's; on the device
        they are written."""
        if self.kernel.is_resident:
            return {}
        last = len(self.kernel.program.passes) - 1
        host = self.kernel.host
        return {
            n: host.column(last, node, self.leaves)[self.rows]
            for n, node in self.kernel.program.scalars
        }

    def _numbers(self, call: Call) -> list[list[float | Tensor]]:
        """The numbers that a function of matrices is called with, for each tensor: the host's where
        it knows them."""
        count, width = len(self.rows), input_offsets(self.kernel.program)[-1]
        given: list[list[float | Tensor]] = [[] for _ in range(count)]
        for node in call.numbers:
            values: Sequence[float | Tensor]
            if self._knows(node):
                values = self.kernel.host.column(call.after, node, self.leaves)[self.rows].tolist()
            else:
                place = input_offsets(self.kernel.program)[call.after]
                place += self.kernel.host.at[call.after][node]
                values = self._table[: count * width].view(count, width)[:, place].unbind()
            for own, value in zip(given, values, strict=True):
                own.append(value)
        return given

    def _knows(self, node: Node) -> bool:
        """Whether a value follows from hyper-parameters that the host knows."""
        needed = {str(n.attr) for n in topological([node]) if n.op == "hyper"}
        away = {leaf for leaf, _, _ in self.device_leaves}
        unknown = {name for name in needed if self.kernel.leaves[name] in away}
        return node.rank == Rank.UNIFORM and not (
            unknown or needed & {*self.kernel.numbers, "first"}
        )


@share
def make_kernel(
    program: Program, device: torch.device, numbers: tuple[str, ...] | None, number_type: str
) -> Kernel:
    """The program's kernel for a device; compiled once as long as somebody has it, by Triton once a
    machine."""
    return Kernel(program, device, numbers, number_type)
