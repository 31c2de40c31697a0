"""Launches on a GPU: a program compiled by Triton, one launch of each pass for all tensors.

The launch is given addresses and trusts them, like the CPU's. Work is queued on torch's current
stream, and nothing here waits for the device or asks it anything. For the memory that kernels read
and write the rules of any torch operation hold: what is freed on the stream on which it was taken
is given out again behind the kernels that use it. Whoever steps on another stream than that orders
the two, as for every other operation of torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..graph.caches import share
from ..graph.ir import Node, Rank, topological
from ..graph.passes import Call, Program
from ..llvm.uniforms import leaf_names
from ..tensors.launching import LaunchInTwo
from ..tensors.temporaries import TORCH
from .foretold import ForetoldUniforms
from .host import HostUniforms
from .jit import launch, load, prepare
from .partials import find_fold, lay_out_partials
from .source import triton_source
from .uniforms import TENSOR_FACTS, fact_names, input_offsets, stages
from .units import UnitRange, WorkInUnits
from .uploads import SPARE, Device, Table

# A hyper that lies on the device: its leaf, its setting (None for all), and where it is.
DeviceLeaf = tuple[int, int | None, Tensor]


class Start(NamedTuple):
    """A function of the module, how many programs of it run, and what they are given."""

    name: str
    grid: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


class Kernel:
    """A compiled program, callable on columns of any number of tensors of one device."""

    def __init__(
        self,
        program: Program,
        device: torch.device,
        numbers: tuple[str, ...] | None,
        number_type: str,
    ) -> None:
        """Make the program's module, which Triton compiles at its first launch.

        `numbers` are the state entries that are one number a parameter and lie on the device, see
        `source.triton_source`.
        """
        self.program = program
        self.device = Device(device)
        self.numbers = numbers or ()
        self.is_resident = numbers is not None
        self.source = triton_source(program, numbers, number_type)
        self.functions = {function.name: function for function in self.source.functions}
        self._module = load(self.source)
        self._loaded: set[tuple[object, ...]] = set()
        names = leaf_names(program)
        self.leaves = {name: leaf for leaf, name in enumerate(names)}
        self.stages = stages(program, self.is_resident)
        self.host = HostUniforms(program)

    def concurrency(self) -> int:
        """Return how many tensors may be worked on at once: the device decides."""
        return 1 << 31

    def is_capturing(self) -> bool:
        """Whether a step would be recorded into a graph now."""
        return self.device.is_capturing()

    def split(self, sizes: np.ndarray) -> WorkInUnits:
        """Return how to cut walks over tensors of these sizes; good for any number of launches."""
        return WorkInUnits(sizes, self.program)

    def prepare(
        self,
        pointers: np.ndarray,
        work: WorkInUnits,
        setting_index: np.ndarray,
        settings: int,
    ) -> Launch:
        """Return a launch, with everything that may stay the same from step to step.

        The arguments are those of `Launch`.
        """
        return Launch(self, pointers, work, setting_index, settings)

    def start(self, call: Start) -> None:
        """Queue a function of the module on the current stream."""
        function = self.functions[call.name]
        launch(self._module, function, call.grid, *call.arguments, **call.constants)

    def load(self, call: Start) -> None:
        """Compile what a start needs and bring it to the device, unless that has been done.

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


class DeviceMemory(LaunchInTwo):
    """What a launch has on its device: tables that are sent to it, and memory for results.

    A caller sets, before each `begin`:

        leaves         (leaf, setting; float64) the hypers that the host knows
        device_leaves  those that lie on the device: (leaf, setting or None for all, tensor)
        active         (tensors) 0 for those that do not step
        guard          a float32 on the device; nothing changes unless it is 0. Or None
        fresh          (tensors; int32, on the device) 1 for each tensor whose state has not stepped
                       yet; its first step sets it to 0

    and reads `captured`: what a captured graph will read, see `uploads`.
    """

    def __init__(
        self,
        kernel: Kernel,
        pointers: np.ndarray,
        work: WorkInUnits,
        setting_index: np.ndarray,
        settings: int,
    ) -> None:
        """Lay out the arguments of every pass, and take what memory they need.

        `pointers` (columns and numbers, tensors; uint64), `work` and `setting_index` as those of
        the CPU's launch.
        """
        program = kernel.program
        device = kernel.device
        leaves = np.zeros((len(kernel.leaves), settings))
        super().__init__(program, work, work.parts, device.device, leaves, setting_index)
        self.kernel = kernel
        self.units = work.units
        self.pointers = pointers
        self.active = np.ones(len(setting_index), np.int64)
        self.device_leaves: list[DeviceLeaf] = []
        self.guard: Tensor | None = None
        self.fresh = device.empty(len(setting_index), torch.int32).zero_()
        self.captured: list[Tensor] = []
        # What this step's table of addresses holds, and the starts that have been made with it.
        self._placed: bytes | None = None
        # New scalars of each setting, by name, if somebody reads them by their addresses.
        self._results: dict[str, np.ndarray] = {}
        self._ready: dict[int, list[Start]] = {}
        self._make_tables()
        self._lay_out_partials(work)
        self._lay_out_uniforms()
        # What a kernel is given for a guard when there is none.
        self._nothing = device.empty(1, torch.float32)
        self._stream = device.stream()

    def _make_tables(self) -> None:
        """Make the tables that are sent to the device, by name; those of units never change."""
        device = self.kernel.device
        spare = SPARE if self.kernel.is_resident else 0
        self._sent: dict[str, Table] = {}
        for name in ("addresses", "leaves", "facts"):
            self._sent[name] = Table(device, self.captured, spare)
        for pass_index, units in enumerate(self.units):
            self._sent[f"units {pass_index}"] = Table(device, self.captured)
            units.table.setflags(write=False)

    def _lay_out_partials(self, work: WorkInUnits) -> None:
        """Take the memory of partial results, and find what is said of each tensor, and folds."""
        program = self.kernel.program
        device = self.kernel.device
        layout = lay_out_partials(program, work)
        self._begin = layout.begin
        self._partials = device.empty(max(layout.size, 1), torch.float64)
        # The table of uniforms has a line for each tensor if the device fills it.
        tensors = np.arange(len(self.setting_index))
        table_line = tensors if self.kernel.stages else self.setting_index
        facts = [table_line, self.setting_index, self.active]
        facts += [*work.sizes.T, work.numel]
        facts += layout.facts
        self._facts = np.stack(facts).astype(np.int64)
        assert len(self._facts) == len(fact_names(program))
        self._folds = [
            find_fold(pass_, work, self._temporaries, device, self.captured)
            for pass_ in program.passes
        ]

    def _lay_out_uniforms(self) -> None:
        """Take the memory of the table of uniforms, or prepare to send it."""
        kernel = self.kernel
        device = kernel.device
        if kernel.stages:
            values = len(self.setting_index) * input_offsets(kernel.program)[-1]
            self._table = device.empty(max(values, 1), TORCH[kernel.program.compute])
        else:
            step = kernel.leaves.get("step")
            self._uniforms = ForetoldUniforms(device, self.captured, kernel.host.fill_all, step)
            self._sent["uniforms"] = self._uniforms.table

    @property
    def uploads(self) -> int:
        """How many tables have been sent to the device so far."""
        return sum(table.uploads for table in self._sent.values())

    def _send(self) -> None:
        """Bring the tables on the device up to date; only what has changed is sent."""
        device = self.kernel.device
        self._facts[TENSOR_FACTS.index("active")] = self.active
        self._placed = None
        self._send_addresses()
        self._tensors = self._sent["facts"].on_device(self._facts)
        self._unit_tables = [
            self._sent[f"units {pass_index}"].on_device(units.table)
            for pass_index, units in enumerate(self.units)
        ]
        if self.kernel.stages:
            self._leaves = self._sent["leaves"].on_device(self.leaves)
            if self.device_leaves:
                leaves = self._leaves[: self.leaves.size].view(self.leaves.shape)
                _copy_leaves(self.device_leaves, leaves)
        else:
            self._table = self._uniforms.on_device(self.leaves)
        # As with tables, see `uploads`.
        kept = self._temporaries.kept.values()
        memory = (self._partials, self._nothing, self._table, self.fresh, *kept)
        if device.is_capturing():
            self.captured += memory
            self.captured += [value for _, _, value in self.device_leaves]
            if self.guard is not None:
                self.captured.append(self.guard)
        elif device.stream() != self._stream:
            for tensor in memory:
                device.announce(tensor)

    def _send_addresses(self) -> None:
        """Send the table of addresses, unless this step has sent it already."""
        placed = self.pointers.tobytes() + self._temporaries.pointers.tobytes()
        if placed != self._placed:
            table = np.concatenate([self.pointers, self._temporaries.pointers])
            self._placed = placed
            self._addresses = self._sent["addresses"].on_device(table.view(np.int64))
            self._ready.clear()


class Launch(DeviceMemory):
    """A kernel with its arguments laid out; see `LaunchInTwo` for its order.

    `run` may be called again and again while the arguments stay where they are.
    """

    def begin(self, workers: int) -> None:
        """Do what may fail: tables, compiling, functions of matrices and what they are given.

        With one worker, tensors are walked one after the other.
        """
        try:
            with self.kernel.device.guard():
                self._temporaries.allocate()
                self._send()
                for pass_index in range(len(self.kernel.program.passes)):
                    starts = list(self._starts(pass_index, workers))
                    self._ready[pass_index] = starts
                    for start in starts:
                        self.kernel.load(start)
                for pass_index in range(self._first_to_store):
                    self._run_pass(pass_index, workers)
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
            passes = len(self.kernel.program.passes)
            for pass_index in range(self._first_to_store, passes):
                self._run_pass(pass_index, workers)
        self._temporaries.release()
        for name, values in self._results.items():
            values[:] = self._scalar(name)

    def cancel(self) -> None:
        """Give back the memory of what has begun and will not be finished."""
        self._ready.clear()
        super().cancel()

    def _run_pass(self, pass_index: int, workers: int) -> None:
        """Run one walk, what must be known before, and what follows it."""
        starts = self._ready.pop(pass_index, None) or self._starts(pass_index, workers)
        for start in starts:
            self.kernel.start(start)
        calls = [call for call in self.kernel.program.calls if call.after == pass_index]
        for call in calls:
            self._temporaries.call(call, self._numbers(call))
        if calls:
            self._send_addresses()

    def _starts(self, pass_index: int, workers: int) -> Iterator[Start]:
        """Yield the functions of one walk, in order.

        These are uniforms, the pass itself, and sums of what its programs have left.
        """
        count = len(self.setting_index)
        guard = self._nothing if self.guard is None else self.guard
        guarded = {"GUARDED": self.guard is not None}
        for stage_index, (before, _) in enumerate(self.kernel.stages):
            if before == pass_index:
                given = (
                    self._addresses,
                    self._tensors,
                    self._leaves,
                    self._table,
                    self._partials,
                    self.fresh,
                    guard,
                )
                arguments = (*given, self.leaves.shape[1], count)
                yield Start(f"uniforms_{stage_index}", count, arguments, guarded)
        if self.kernel.program.passes[pass_index].roots:
            partials = self._partials[self._begin[pass_index] :]
            units = self._unit_tables[pass_index]
            given = (self._addresses, self._tensors, units, self._table, partials, guard)
            for begin, end, shape in self._ranges(pass_index, workers):
                arguments = (*given, begin, count)
                yield Start(f"pass_{pass_index}", end - begin, arguments, guarded | shape)
        fold = self._folds[pass_index]
        if fold is not None:
            entries = fold.entries_table.on_device(fold.entries)
            units = fold.units_table.on_device(fold.units)
            yield Start("fold", len(fold.units), (entries, units, guard, 0), guarded)

    def _ranges(self, pass_index: int, workers: int) -> Sequence[UnitRange]:
        """Return the launches of a pass: all tensors at once, or one after the other."""
        units = self.units[pass_index]
        if workers > 1:
            return units.launches
        walked = np.flatnonzero(units.count).tolist()
        return [range_ for tensor_index in walked for range_ in units.of_tensor(tensor_index)]

    def scalars(self) -> Mapping[str, np.ndarray]:
        """Return each tensor's new scalars in the compute type, if these are the host's.

        If they lie on the device, the kernel has stored them there, and this is empty.
        """
        if self.kernel.is_resident:
            return {}
        names = dict(self.kernel.program.scalars)
        return {name: self._scalar(name)[self.setting_index] for name in names}

    def _scalar(self, name: str) -> np.ndarray:
        """Return a new scalar of each setting, which the host computes."""
        last = len(self.kernel.program.passes) - 1
        node = dict(self.kernel.program.scalars)[name]
        return self.kernel.host.column(last, node, self.leaves)

    def calls(self) -> list[tuple[int, int]]:
        """Return nothing: machine code cannot make a launch, see `kernel.Launch`."""
        return []

    def results(self) -> Mapping[str, list[tuple[int, bool]]]:
        """Return where each setting's new scalars are after a run, and that they are in float64.

        If they lie on the device, this is empty.
        """
        if self.kernel.is_resident:
            return {}
        found = {}
        for name, _ in self.kernel.program.scalars:
            values = self._results.setdefault(name, np.zeros(self.leaves.shape[1]))
            first = values.__array_interface__["data"][0]
            found[name] = [(first + 8 * i, True) for i in range(len(values))]
        return found

    def _numbers(self, call: Call) -> list[list[float | Tensor]]:
        """Return the numbers that a function of matrices is called with, for each tensor.

        They are the host's if it knows them, else tensors on the device.
        """
        host = self.kernel.host
        count = len(self.setting_index)
        offsets = input_offsets(self.kernel.program)
        line_length = offsets[-1]
        numbers: list[list[float | Tensor]] = [[] for _ in range(count)]
        for node in call.numbers:
            values: Sequence[float | Tensor]
            if self._knows(node):
                of_settings = host.column(call.after, node, self.leaves)
                values = of_settings[self.setting_index].tolist()
            else:
                column = offsets[call.after] + host.inputs[call.after][node]
                table = self._table[: count * line_length]
                values = table.view(count, line_length)[:, column].unbind()
            for of_tensor, value in zip(numbers, values, strict=True):
                of_tensor.append(value)
        return numbers

    def _knows(self, node: Node) -> bool:
        """Whether a value follows from hypers that the host knows."""
        if node.rank != Rank.UNIFORM:
            return False
        hypers = [needed for needed in topological([node]) if needed.op == "hyper"]
        names = {str(hyper.attr) for hyper in hypers}
        on_device = {leaf for leaf, _, _ in self.device_leaves}
        if any(self.kernel.leaves[name] in on_device for name in names):
            return False
        return names.isdisjoint({*self.kernel.numbers, "first"})


def _copy_leaves(device_leaves: list[DeviceLeaf], leaves: Tensor) -> None:
    """Copy the hypers that lie on the device into the leaves there, without looking at them."""
    targets: list[Tensor] = []
    values: list[Tensor] = []
    for leaf, setting, value in device_leaves:
        target = leaves[leaf] if setting is None else leaves[leaf, setting]
        value = value.detach().reshape(())
        targets.append(target)
        values.append(value.expand_as(target))
    torch._foreach_copy_(targets, values)


@share
def make_kernel(
    program: Program, device: torch.device, numbers: tuple[str, ...] | None, number_type: str
) -> Kernel:
    """Return the program's kernel for a device, compiled once as long as somebody has it.

    Triton keeps what it has compiled, so that it does this once a machine.
    """
    return Kernel(program, device, numbers, number_type)
