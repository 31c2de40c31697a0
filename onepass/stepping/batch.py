"""The parameters that step together in one launch of a kernel."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from operator import is_, itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import kernel
from ..contract.values import Group, StepError
from .batches import Delayed, Step
from .checks import Member, check_gradient, check_matrix, check_member, check_state
from .columns import Columns, picker
from .gathered import Gathered
from .host_numbers import HostNumbers
from .hypers import Hypers
from .ledger import Ledger
from .reading import Reading
from .recipe import Recipe
from .settings import Settings
from .strided import Strided
from .works import Works

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
        self.settings = Settings(self.group_index)
        self.strided = Strided(params, recipe)
        self.works = Works(self.kernel, self.sizes, self.work, self.let_go)
        self.numbers = HostNumbers(recipe.numbers, self.number_pointers, numbers)
        self.hypers = Hypers(recipe, self.kernel, self.groups)
        # The launch of this step, and whether one worker walks the parameters in order, as torch
        # would: some share memory.
        self.launch: Any = None
        self.shares_memory = False
        self._workers = 1

    @property
    def refused_rate(self) -> tuple[int, float] | None:
        """A group with a learning rate that the constructor would refuse, and the rate, if any."""
        return self.hypers.refused_rate

    def let_go(self, launch: Any) -> None:
        """Forget a launch that has been laid out."""

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
        return int(self.works.work.numel.sum()) if self.recipe.graph.has_calls else 0

    def gather(self, reading: Reading) -> Gathered | None:
        """Look at options and tensors; return None if the plan no longer fits.

        Raises `StepError` if no plan could fit.
        """
        self.hypers.read(reading.groups, self.read)
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
        if self.strided and not self.strided.copy(gathered):
            return None
        inactive: list[int] = []
        if self.expected.compare(gathered.tensors):
            changed = self.expected.list_changed()
            inactive = [i for i in changed if i < self.count and gathered.gradient(i) is None]
            if len(inactive) < len(changed) and not self._replace_gradients(gathered, inactive):
                return None
        self.works.activate(inactive)
        return gathered

    def starts(self) -> np.ndarray:
        """Return where what this step writes begins in memory, as addresses."""
        return self.strided.correct(self.expected.pointers[self.count :], 0)

    def stretches(self) -> tuple[np.ndarray, np.ndarray]:
        """Return how many bytes begin at each of `starts`, and the position of their parameter."""
        sizes = self.strided.correct(self.expected.bytes[self.count :], 1)
        return sizes, np.tile(self.positions, len(sizes) // self.count)

    def check_capture(self) -> None:
        """Raise if a step would be captured in a graph.

        The graph would repeat the step count and the learning rate that the host knows now.
        """
        if self.kernel.is_capturing():
            raise StepError(CAPTURE.format(self.owner))

    def _replace_gradients(self, gathered: Gathered, inactive: list[int]) -> bool:
        """Replace unusual gradients by dense copies; False if something else differs."""
        changed = self.expected.list_changed()
        if changed[-1] >= self.count:
            # Nothing is read of a parameter that is not what it was: it may have no memory.
            return False
        for i in changed:
            g, p = gathered.gradient(i), gathered.param(i)
            if g is None:
                continue
            dtype = self.expected.facts[i][0]
            dense = dense_gradient(self.owner, self.members[i], p, g, dtype, self.recipe)
            if dense is None:
                return False
            gathered.replace_gradient(i, dense)
        count = self.expected.compare(gathered.tensors)
        return count == len(inactive) and self.expected.list_changed() == inactive

    def is_as_read(self, gathered: Gathered, reading: Reading) -> bool:
        """Whether what was gathered is still what it was. Addresses are read again."""
        if self.strided and not self.strided.are_as_read(self.pick(reading.params)):
            return False
        count = self.expected.compare(gathered.tensors)
        inactive = self.works.inactive
        return count == len(inactive) and self.expected.list_changed() == inactive

    def begin(self, gathered: Gathered, step: Step) -> Sequence[Delayed]:
        """Compute on what was gathered as far as it may fail, and store nothing."""
        self._choose_launch(step.fresh)
        self.hypers.write(self.launch.leaves, self.settings, step.gradient_factor.factor)
        self.launch_up_to_stores()
        return ()

    def _choose_launch(self, fresh: Collection[int]) -> None:
        """Find the distinct settings of this step, and the launch that has them."""
        numbers = self.numbers.read(self.works.active)
        first = find_first(fresh, self.positions)
        settings, works = self.settings, self.works
        if first is None and settings.are_as_before(numbers, works.active, works.work):
            return
        settings.find(numbers, first, works.work)
        self.launch = works.launch(self.addressed, settings.index, len(settings))

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
        written = gathered.columns(1, columns, set(self.works.inactive))
        if self.strided:
            self.strided.put_back(self.pick(step.reading.params), gathered, self.works.inactive)
        kernel.count_as_changed(written)
        self.keep_numbers()
        if step.fresh:
            active = zip(self.positions.tolist(), self.works.active, strict=True)
            step.fresh.difference_update(position for position, on in active if on)

    def keep_numbers(self) -> None:
        """Store each parameter's numbers after this step."""
        scalars = self.launch.scalars() if self.recipe.scalars else {}
        self.numbers.store(scalars, self.works.active)


def find_first(fresh: Collection[int], positions: np.ndarray) -> np.ndarray | None:
    """Return 1.0 for each position that makes its first step, else 0.0; None if none does."""
    if not fresh:
        return None
    return np.array([position in fresh for position in positions.tolist()], np.float64)


def dense_gradient(
    owner: str, member: Member, p: Tensor, g: Tensor, dtype: torch.dtype, recipe: Recipe
) -> Tensor | None:
    """Return a copy of an unusual gradient that lies as its parameter does.

    None stands for a gradient that a kernel for gradients of `dtype` cannot take. Raises
    `StepError` for one that nothing can take.
    """
    if not member.takes(g):
        return None
    check_gradient(owner, member, p, g)
    if not kernel.is_plain(g) or g.dtype != dtype:
        return None
    dense, like = as_dense_gradient(g.detach()), recipe.as_dense(p)
    is_a_fitting_copy = g.layout != torch.strided and dense.stride() == like.stride()
    if is_a_fitting_copy:
        return dense
    return torch.empty_like(like, dtype=g.dtype).copy_(dense)


def _as_gradient(like: Tensor, g: Tensor | None) -> Tensor:
    """A tensor as the gradient of a parameter that lies like this must be."""
    if g is None or g.dtype == like.dtype:
        return like
    return torch.empty_like(like, dtype=g.dtype)


def as_dense_gradient(g: Tensor) -> Tensor:
    """Return a gradient, converted to dense if it is sparse."""
    return g if g.layout == torch.strided else g.to_dense()
