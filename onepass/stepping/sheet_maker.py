"""How a plan's step is laid out for machine code: the tables of a sheet, see `kernel.repeat`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from .. import kernel
from ..contract.mistakes import PACKAGE
from ..contract.values import Group, number, pick
from .batch import KernelBatch
from .plan import Plan
from .reading import Reading

# Objects of these classes never change: the same object is the same value.
CONSTANT = (int, bool, str, float, type(None))
FLOATS = (float, np.float64)

# Options of one number, which is read in each step.
NUMBERS = (kernel.OptionKind.NUMBER, kernel.OptionKind.RATE, kernel.OptionKind.ASKED)


class FlagsReader(dict[str, Any]):
    """A param group that notes which options a class reads for its flags."""

    def __init__(self, optimizer: Any, group: Group) -> None:
        super().__init__(group)
        self.read: set[str] = set()
        self.flags: Mapping[str, bool] = type(optimizer).flags(optimizer, self)

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)


def is_ours(cls: type, method: str) -> bool:
    """Whether a class has a method of this package's, and not of a class of the user's."""
    owner = next(base for base in cls.__mro__ if method in vars(base))
    return owner.__module__.partition(".")[0] == PACKAGE


class SheetMaker:
    """Fills the tables of a sheet with what a plan has just done."""

    def __init__(self, sheet: kernel.Sheet, plan: Plan, reading: Reading) -> None:
        self._sheet, self._tables = sheet, sheet.tables
        self._plan, self._reading = plan, reading
        # Where each number of an option will be among the sheet's values: by group, option, entry.
        self._value_of: dict[tuple[int, str, int | None], int] = {}
        # The first tensor of each batch; see `_tensor`.
        self._begins: list[int] = []
        # Where the number of each batch, name and setting is among the common ones.
        self._commons: list[np.ndarray] = []

    # Options.

    def add_groups(self, flags: Sequence[FlagsReader]) -> bool:
        """Add all options; return whether machine code can read them."""
        sources: dict[int, set[tuple[str, int | None]]] = {}
        for batch in self._plan.kernels:
            for group_index in batch.groups:
                entries = {(key, entry) for _, key, entry in batch.recipe.sources}
                sources.setdefault(group_index, set()).update(entries)
        for index, group in enumerate(self._reading.groups):
            self._tables["group_params"].append(len(group["params"]))
            self._tables["group_options"].append(len(group))
            keys, _ = self._plan.options.switches[index]
            for key, value in group.items():
                entries = [entry for name, entry in sources.get(index, ()) if name == key]
                is_read = key in flags[index].read
                is_used = is_read or bool(entries) or key in keys
                kind = _kind_of(key, value, entries, is_read=is_read, is_used=is_used)
                if kind is None:
                    return False
                self._add_option(index, key, value, kind, entries)
        return True

    def _add_option(
        self, group_index: int, key: str, value: Any, kind: int, entries: Sequence[int | None]
    ) -> None:
        values = self._sheet.values
        first, length = len(values), 0
        if kind == kernel.OptionKind.ROW:
            length = len(value)
            values += value
            entries = range(length)
        elif kind in NUMBERS:
            values.append(value)
            entries = [None]
        else:
            # They stay as they are.
            group = self._reading.groups[group_index]
            values += [number(pick(group, key, entry), key) for entry in entries]
        for index, entry in enumerate(entries, first):
            self._value_of[group_index, key, entry] = index
        tables = self._tables
        tables["option_name"].append(self._sheet.address(key))
        tables["option_kind"].append(kind)
        is_same = kind == kernel.OptionKind.SAME
        tables["option_value"].append(self._sheet.address(value) if is_same else first)
        tables["option_length"].append(length)

    # Batches.

    def add_batches(self) -> bool:
        """Add parameters, gradients and states; return whether machine code can read them."""
        count = len(self._reading.params)
        self._tables["param_tensor"] = [-1] * count
        self._tables["gradient_tensor"] = [-1] * count
        for batch in self._plan.kernels:
            if not self._add_tensors(batch):
                return False
            self._add_numbers(batch)
        return True

    def _add_tensors(self, batch: KernelBatch) -> bool:
        """Add a batch's tensors in the order of its list; False if one's words are not known."""
        tables, expected, count = self._tables, batch.expected, batch.count
        begin = len(tables["tensor_row"])
        self._begins.append(begin)
        if expected.rows is None:
            return False
        first_row = self._sheet.add_rows(expected.rows)
        inactive = set(batch.works.inactive)
        goals = expected.pointers
        goal = self._sheet.address(goals)
        for t, kind in enumerate(expected.kind_of):
            tables["tensor_row"].append(-1 if t in inactive else first_row + kind)
            tables["tensor_goal"].append(goal + goals.itemsize * t)
            tables["tensor_moves"].append(int(t < count))
        for i, position in enumerate(batch.positions.tolist()):
            tables["param_tensor"][position] = begin + count + i
            if i not in inactive:
                tables["gradient_tensor"][position] = begin + i
        columns = len(batch.recipe.columns) + len(batch.resident(batch.recipe) or ())
        for t in range(count, columns * count):
            if t % count not in inactive:
                tables["written"].append(begin + t)
        return True

    def _add_numbers(self, batch: KernelBatch) -> None:
        """Add the numbers of a batch: one for each name and setting, which parameters share."""
        tables, begin = self._tables, self._begins[-1]
        names, columns = _numbers_on_host(batch), len(batch.recipe.columns)
        settings = batch.launch.setting_index.tolist()
        examples: dict[int, int] = {}
        for i, setting in enumerate(settings):
            if setting not in examples or not batch.works.active[examples[setting]]:
                examples[setting] = i
        is_double = int(batch.numbers.dtype == np.float64)
        commons = np.zeros((len(names), len(examples)), np.int64)
        for n in range(len(names)):
            first = begin + (columns + n) * batch.count
            for setting in range(len(examples)):
                commons[n, setting] = len(tables["common_tensor"])
                tables["common_tensor"].append(first + examples[setting])
                tables["common_is_double"].append(is_double)
            for i, setting in enumerate(settings):
                if batch.works.active[i]:
                    tables["number_tensor"].append(first + i)
                    tables["number_common"].append(int(commons[n, setting]))
        self._commons.append(commons)

    # States.

    def add_states(self) -> None:
        """Add the entries of all states, in their order."""
        tables, reading = self._tables, self._reading
        tensor_of: dict[int, dict[str, int]] = {}
        for batch, begin in zip(self._plan.kernels, self._begins, strict=True):
            for i, position in enumerate(batch.positions.tolist()):
                of_param = tensor_of.setdefault(id(reading.params[position]), {})
                of_param[""] = position
                for e, name in enumerate(batch.recipe.entries, 2):
                    of_param[name] = begin + e * batch.count + i
        if not any(batch.recipe.entries for batch in self._plan.kernels):
            return
        for key, entries in zip(reading.keys, reading.entries, strict=True):
            of_param = tensor_of.get(id(key), {})
            has_entries = len(of_param) > 1
            tables["state_param"].append(of_param[""] if has_entries else -1)
            tables["state_entries"].append(len(entries) if has_entries else 0)
            if has_entries:
                for name in entries:
                    tables["entry_name"].append(self._sheet.address(name))
                    tables["entry_tensor"].append(of_param.get(name, -1))

    # Launches.

    def add_launches(self) -> bool:
        """Add what each launch is told, and where it leaves its results.

        Return False if machine code cannot say so.
        """
        tables, sheet = self._tables, self._sheet
        sheet.lay_out("values", len(sheet.values))
        for name in ("current", "next"):
            sheet.lay_out(name, len(tables["common_tensor"]))
        for batch, commons in zip(self._plan.kernels, self._commons, strict=True):
            launch = batch.launch
            leaves = sheet.address(launch.leaves)
            sheet.address(launch)
            settings = launch.leaves.shape[1]
            for (_, key, entry), leaf in zip(
                batch.recipe.sources, batch.hypers.leaves, strict=True
            ):
                for setting, group in enumerate(batch.settings.groups.tolist()):
                    index = self._value_of[batch.groups[group], key, entry]
                    tables["copy_from"].append(sheet.place("values", index))
                    tables["copy_to"].append(leaves + 8 * (leaf * settings + setting))
            results = launch.results()
            for name, of_settings in zip(_numbers_on_host(batch), commons.tolist(), strict=True):
                is_count = name == "step"
                if not is_count and name not in results:
                    return False
                for setting, common in enumerate(of_settings):
                    address, is_double = (0, 0) if is_count else results[name][setting]
                    tables["result"].append(address)
                    tables["result_is_double"].append(is_double)
                    if name in batch.kernel.leaves:
                        leaf = batch.kernel.leaves[name]
                        place = sheet.place("next" if is_count else "current", common)
                        tables["copy_from"].append(place)
                        tables["copy_to"].append(leaves + 8 * (leaf * settings + setting))
        calls = [batch.launch.calls() for batch in self._plan.kernels]
        if all(calls):
            for function, arguments in chain.from_iterable(calls):
                tables["launch_function"].append(function)
                tables["launch_arguments"].append(arguments)
        return True


def _numbers_on_host(batch: KernelBatch) -> Sequence[str]:
    """Return the names of the numbers that the host counts."""
    return () if batch.resident(batch.recipe) else batch.recipe.numbers


def _kind_of(
    key: str, value: Any, entries: Iterable[int | None], *, is_read: bool, is_used: bool
) -> int | None:
    """Return what machine code does with an option, or None if it cannot do what is needed.

    `entries` are those of the option that a rule reads; `is_read` says whether flags depend on it.
    """
    if key == "params":
        return kernel.OptionKind.PARAMS
    if not is_used:
        return kernel.OptionKind.IGNORED
    is_number = None in entries
    if type(value) in FLOATS and (is_number or is_read):
        if not is_read:
            return kernel.OptionKind.RATE if key == "lr" else kernel.OptionKind.NUMBER
        return None if key == "lr" else kernel.OptionKind.ASKED
    if _is_constant(value):
        return kernel.OptionKind.SAME
    if type(value) is not tuple:
        return None
    if entries and not is_read and all(type(entry) in FLOATS for entry in value):
        return kernel.OptionKind.ROW
    return kernel.OptionKind.SAME if all(map(_is_constant, value)) else None


def _is_constant(value: object) -> bool:
    return type(value) in CONSTANT or isinstance(value, np.generic)
