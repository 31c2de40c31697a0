"""The parameters that step together in one launch of a kernel."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from operator import is_, itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import kernel
from ..contract.mistakes import are_learning_rates, find_refused
from ..contract.values import Group, StepError
from .batches import Delayed, Step
from .checks import Member, check_gradient, check_matrix, check_member, check_state
from .columns import Columns, picker
from .gathered import Gathered
from .ledger import Ledger
from .reading import Reading
from .recipe import Recipe

# How many sets of parameters with gradients are known: some alternate, as experts do.
MOST_WORKS = 8
CAPTURE = (
    "{}: a step that is captured in a graph needs capturable=True in every param group; set it, "
    "and take a few steps before the capture"
)


def check(
    owner: str,
    member: Member,
    p: Tensor,
    g: Tensor | None,
    state: Mapping[str, Any],
    recipe: Recipe,
) -> None:
    """Raise `StepError` unless a parameter can step by this recipe."""
    check_member(owner, member, p, g, state, recipe.required, recipe.numbers)
    if recipe.graph.has_matrices:
        check_matrix(owner, member, p)
    for name in recipe.graph.state:
        if state.get(name) is not None:
            check_state(owner, member, p, name, state[name], recipe.shape(name, p))


def dense_columns(
    members: Sequence[Member], reading: Reading, recipe: Recipe
) -> list[list[Tensor]]:
    """Return the columns that a batch of these members walks: gradients, parameters, each state.

    A dense copy stands for a parameter whose memory has holes, and for a gradient that is missing
    or lies in another way than its parameter.
    """
    params = [recipe.as_dense(reading.params[member.position]) for member in members]
    grads = [reading.grads[member.position] for member in members]
    states = [reading.state_of(reading.params[member.position]) for member in members]
    gradients = [_as_gradient(p, g) for p, g in zip(params, grads, strict=True)]
    kept = [[state[name] for state in states] for name in recipe.graph.state]
    return [gradients, params, *kept]


class KernelBatch(Columns):
    """Dense tensors of one device and one set of dtypes, stepped by one launch.

    At every step `gather` reads again: options, each `.grad`, each state entry, whose key must be
    its parameter, and of every tensor its address, dtype, device, sizes, strides and the size of
    its storage. What is kept is only what these are compared with: neither a tensor nor an address.

    - A parameter or a state differs: `gather` returns None, and the plan is built again. That
      checks everything, and raises a sentence if something is wrong.
    - A gradient differs (expanded, transposed, lazily conjugated): a dense copy of it takes its
      place for this step.
    - A gradient is missing: the parameter has no elements in this step.

    The launch follows with the tensors in hand.
    """

    def __init__(
        self,
        compiled: kernel.Kernel,
        columns: list[list[Tensor]],
        members: list[Member],
        reading: Reading,
        recipe: Recipe,
        owner: str,
    ) -> None:
        """Lay out the step of `members` by a kernel that was compiled for `columns`."""
        self.members, self.recipe, self.owner = members, recipe, owner
        self.positions = np.array([m.position for m in members])
        self.pick = picker(self.positions.tolist())
        params = self.pick(reading.params)
        states = [reading.state_of(p) for p in params]
        numbers = [state[name] for name in recipe.numbers for state in states]
        super().__init__(
            compiled, recipe.graph, recipe.columns, columns, numbers, self.resident(recipe)
        )
        # The groups that take part, and each parameter's among them.
        groups, self.group_index = np.unique([m.group for m in members], return_inverse=True)
        self.groups = groups.tolist()
        # A parameter whose memory has holes is stepped as a dense copy: its facts, and where it
        # lies in this step.
        self.strided = {i: kernel.facts_of(p) for i, p in enumerate(params) if not recipe.fits(p)}
        self._origins: dict[int, tuple[int, int]] = {}
        self._prepare_numbers(numbers)
        self._prepare_launches()

    def _prepare_numbers(self, numbers: list[Tensor]) -> None:
        """Note where the recipe's numbers are read, and where they go in a launch."""
        wide = bool(numbers) and numbers[0].dtype == torch.float64
        self.number_dtype = np.dtype(np.float64 if wide else np.float32)
        self._numbers = kernel.numbers_at(self.number_pointers, self.number_dtype)
        names = self.recipe.numbers
        self._step = names.index("step") if "step" in names else None
        self.leaves = [self.kernel.leaves[name] for name, _, _ in self.recipe.sources]
        self._rate = self.kernel.leaves.get("lr")
        # The group that has a learning rate that the constructor would refuse, and the rate.
        self.refused_rate: tuple[int, float] | None = None

    def _prepare_launches(self) -> None:
        """Begin with all parameters active, and no launch laid out."""
        self.launch: Any = None
        self.inactive: list[int] = []
        # 1.0 for each parameter that has a gradient in this step, else 0.0.
        self.active = np.ones(self.count)
        # Whether some share memory: one worker then walks them in order, as torch would.
        self.shares_memory = False
        # How the work is cut and the launch laid out, by the parameters without a gradient.
        self._works: dict[tuple[int, ...], Any] = {(): self.work}
        self._launches: dict[tuple[int, ...], Any] = {}
        # For which of these works the settings are known.
        self._settings_work: Any = None
        self._workers = 1

    @staticmethod
    def resident(recipe: Recipe) -> tuple[str, ...] | None:
        """Return the names of the numbers that lie on the device: None, the host keeps them."""
        return None

    def read(self, group: Group) -> Sequence[Any]:
        """Return a group's numbers, in the order of the recipe's sources."""
        return self.recipe.read(group)

    def find_entries(self, places: Mapping[int, int], reading: Reading) -> None:
        """Note where in the optimizer's state the entries are; `places` are those of `Reading`."""
        params = self.pick(reading.params)
        self.pick_state = picker([places[id(p)] for p in params] if self.recipe.entries else [])

    @property
    def demand(self) -> int:
        """How many elements of memory `begin` takes: functions of matrices take as many as these
        have."""
        return int(self.work.numel.sum()) if self.recipe.graph.has_calls else 0

    def gather(self, reading: Reading) -> Gathered | None:
        """Look at options and tensors; return None if the plan no longer fits.

        Raises `StepError` if no plan could fit.
        """
        self.values = [self.read(reading.groups[g]) for g in self.groups]
        self.check_capture()
        params = self.pick(reading.params)
        gathered = Gathered(self.pick(reading.grads), params)
        if self.recipe.entries:
            states = self.pick_state(reading.entries)
            if not all(map(is_, self.pick_state(reading.keys), params)):
                return None
            try:
                for name in self.recipe.entries:
                    gathered.add(map(itemgetter(name), states))
            except (KeyError, TypeError, IndexError):
                return None
        if self.strided and not self._copy_strided(gathered):
            return None
        inactive: list[int] = []
        if self.expected.compare(gathered.tensors):
            changed = self._changed()
            inactive = [i for i in changed if i < self.count and gathered.gradient(i) is None]
            if len(inactive) < len(changed) and not self._replace_gradients(gathered, inactive):
                return None
        self._activate(inactive)
        return gathered

    def starts(self) -> np.ndarray:
        """Return where what this step writes begins in memory, as addresses."""
        starts = self.expected.pointers[self.count :]
        if self.strided:
            starts = starts.copy()
            starts[list(self.strided)] = [self._origins[i][0] for i in self.strided]
        return starts

    def stretches(self) -> tuple[np.ndarray, np.ndarray]:
        """Return how many bytes begin at each of `starts`, and the position of their parameter."""
        sizes = self.expected.bytes[self.count :].copy()
        for i in self.strided:
            sizes[i] = self._origins[i][1]
        return sizes, np.tile(self.positions, len(sizes) // self.count)

    def check_capture(self) -> None:
        """Raise if a step would be captured in a graph.

        The graph would repeat the step count and the learning rate that the host knows now.
        """
        if self.kernel.is_capturing():
            raise StepError(CAPTURE.format(self.owner))

    def _changed(self) -> list[int]:
        return np.flatnonzero(self.expected.changed).tolist()

    def _activate(self, inactive: list[int]) -> None:
        if inactive != self.inactive:
            key = tuple(inactive)
            if key not in self._works:
                sizes = self.sizes.copy()
                sizes[inactive] = 0
                if len(self._works) >= MOST_WORKS:
                    self.forget(next(iter(self._works)))
                self._works[key] = self.kernel.split(sizes)
            self.inactive, self.work = inactive, self._works[key]
            self.active = np.ones(self.count)
            self.active[inactive] = 0.0

    def forget(self, inactive: tuple[int, ...]) -> None:
        """Let go what is known of steps in which these parameters have no gradient."""
        del self._works[inactive]
        self._launches.pop(inactive, None)

    def _copy_strided(self, gathered: Gathered) -> bool:
        """Replace parameters with holes by dense copies; False if one is not what it was."""
        for i, facts in self.strided.items():
            p = gathered.param(i)
            if not kernel.is_as(p, facts):
                return False
            self._origins[i] = p.data_ptr(), kernel.extent(p)
            gathered.replace_param(i, p.detach().contiguous())
        return True

    def _replace_gradients(self, gathered: Gathered, inactive: list[int]) -> bool:
        """Replace unusual gradients by dense copies; False if something else differs."""
        changed = self._changed()
        if changed[-1] >= self.count:
            # Nothing is read of a parameter that is not what it was: it may have no memory.
            return False
        for i in changed:
            g, p = gathered.gradient(i), gathered.param(i)
            if g is None:
                continue
            if not self.members[i].takes(g):
                return False
            check_gradient(self.owner, self.members[i], p, g)
            if not kernel.is_plain(g) or g.dtype != self.expected.facts[i][0]:
                return False
            dense, like = as_dense_gradient(g.detach()), self.recipe.as_dense(p)
            is_a_fitting_copy = g.layout != torch.strided and dense.stride() == like.stride()
            if not is_a_fitting_copy:
                dense = torch.empty_like(like, dtype=g.dtype).copy_(dense)
            gathered.replace_gradient(i, dense)
        return (
            self.expected.compare(gathered.tensors) == len(inactive) and self._changed() == inactive
        )

    def is_as_read(self, gathered: Gathered, reading: Reading) -> bool:
        """Whether what was gathered is still what it was. Addresses are read again."""
        params = self.pick(reading.params) if self.strided else ()
        for i, facts in self.strided.items():
            if not kernel.is_as(params[i], facts) or params[i].data_ptr() != self._origins[i][0]:
                return False
        return (
            self.expected.compare(gathered.tensors) == len(self.inactive)
            and self._changed() == self.inactive
        )

    def begin(self, gathered: Gathered, step: Step) -> Sequence[Delayed]:
        """Compute on what was gathered as far as it may fail, and store nothing."""
        numbers = self._numbers.read()
        if self._step is not None:
            # Counted in the precision that the counts have.
            numbers[self._step] = (numbers[self._step] + self.active).astype(self.number_dtype)
        self.choose_settings(numbers, self.find_first(step.fresh))
        leaves = self.launch.leaves
        for leaf, values in zip(self.leaves, zip(*self.values, strict=True), strict=True):
            each = values[0] if len(values) == 1 else np.array(values)
            leaves[leaf] = each if len(values) == 1 else each[self.group_of_setting]
            if leaf == self._rate and not are_learning_rates(each):
                self.refused_rate = find_refused(self.groups, values)
        supplied = dict(zip(self.recipe.numbers, self.numbers_of_setting, strict=False))
        supplied["first"] = self.first_of_setting
        supplied[kernel.GRADIENT_FACTOR] = step.gradient_factor.factor
        for name, values in supplied.items():
            if name in self.kernel.leaves:
                leaves[self.kernel.leaves[name]] = values
        self.launch_up_to_stores()
        return ()

    def find_first(self, fresh: Collection[int]) -> np.ndarray | None:
        """Return 1.0 for each parameter that makes its first step, else 0.0; None if none does."""
        if not fresh:
            return None
        return np.array([member.position in fresh for member in self.members], np.float64)

    def launch_up_to_stores(self) -> None:
        """Begin the launch that has been laid out."""
        self._workers = 1 if self.shares_memory else self.kernel.concurrency()
        self.launch.begin(self._workers)

    def prepare_to_repeat(self, launch: Any) -> None:
        """Undo what a careful step may have set that a repeated one does not set."""

    def cancel(self) -> None:
        """Give back the memory of what has begun and will not be finished."""
        if self.launch is not None:
            self.launch.cancel()

    def store_refusing(self, ledger: Ledger) -> bool:
        """Store nothing yet: a launch refuses nothing."""
        return False

    def finish(self, gathered: Gathered, step: Step) -> None:
        """Store what was begun, with the gathered tensors in hand. Nothing here may fail."""
        self.launch.finish(self._workers)
        columns = len(self.recipe.columns) + len(self.resident(self.recipe) or ())
        written = gathered.columns(1, columns, set(self.inactive))
        if self.strided:
            params = self.pick(step.reading.params)
            for i in set(self.strided).difference(self.inactive):
                params[i].detach().copy_(gathered.param(i))
        kernel.count_as_changed(written)
        self.keep_numbers()
        if step.fresh:
            active = zip(self.positions.tolist(), self.active, strict=True)
            step.fresh.difference_update(position for position, on in active if on)

    def keep_numbers(self) -> None:
        """Store each parameter's numbers after this step."""
        numbers = self._numbers.values
        for name, new in self.launch.scalars().items() if self.recipe.scalars else ():
            index = self.recipe.numbers.index(name)
            numbers[index] = np.where(self.active, new, numbers[index])
        self._numbers.write()

    def choose_settings(self, numbers: np.ndarray, first: np.ndarray | None) -> None:
        """Find the distinct settings (group, first, numbers), and the launch that has them.

        Tensors that have stepped together so far do so in most steps. Then only the numbers of one
        example of each setting are read again.

        Example: four parameters, of groups 0, 0, 1 and 1, have stepped 5, 5, 5 and 2 times. That is
        three settings: (0, 0.0, 5), (1, 0.0, 2) and (1, 0.0, 5). `_setting_index` is [0, 0, 2, 1],
        `_examples` are [0, 3, 2].
        """
        if first is None and self._settings_work is self.work:
            settings = numbers[:, self._examples]
            same = settings[:, self._setting_index] == numbers
            if (same | (self.active == 0)).all():
                self.numbers_of_setting = settings
                return
        flags = np.zeros(self.count) if first is None else first
        keys = np.stack([self.group_index, flags, *numbers], axis=1)
        settings, examples, index = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        self._setting_index, self._examples = index.reshape(-1), examples
        self.group_of_setting = settings[:, 0].astype(np.int64)
        self.first_of_setting = settings[:, 1].copy()
        self.numbers_of_setting = settings[:, 2:].T
        # In its first step a parameter has settings of its own.
        self._settings_work = self.work if first is None else None
        self.launch = self._launch_with(len(settings))

    def _launch_with(self, settings: int) -> Any:
        """A launch for the parameters that are active now, with this many settings."""
        key = tuple(self.inactive)
        launch = self._launches.get(key)
        if launch is None or not self._has_settings(launch, settings):
            launch = self.kernel.prepare(self.addressed, self.work, self._setting_index, settings)
            self._launches[key] = launch
        return launch

    def _has_settings(self, launch: Any, settings: int) -> bool:
        """Whether a launch has room for this many settings, and knows which tensor has which."""
        if launch.leaves.shape[1] != settings:
            return False
        return np.array_equal(launch.setting_index, self._setting_index)


def _as_gradient(like: Tensor, g: Tensor | None) -> Tensor:
    """A tensor as the gradient of a parameter that lies like this must be."""
    if g is None or g.dtype == like.dtype:
        return like
    return torch.empty_like(like, dtype=g.dtype)


def as_dense_gradient(g: Tensor) -> Tensor:
    """Return a gradient, converted to dense if it is sparse."""
    return g if g.layout == torch.strided else g.to_dense()
