"""How the parameters of a plan are put together in batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from .. import kernel
from .batch import KernelBatch, dense_columns
from .checks import Member
from .columns import Clusters, compile_for
from .device_batch import DeviceBatch
from .eager_batch import EagerBatch
from .group_recipes import GroupRecipes
from .numbers import Numbers
from .reading import Reading
from .recipe import Mode, Recipe
from .sharing import out_of_order
from .sparse import EagerSlices, SlicesBatch

# Functions of whole matrices take this many elements at a time (or one parameter), to bound the
# memory that they need.
MOST_ELEMENTS = 1 << 24
SHARING = "parameters share memory, and their rule needs several walks over them or copies"


class Batching:
    """Makes the batches of a plan. What it changes in states is noted in a ledger.

    Example: a model of 5 float32 parameters and 2 of bfloat16, and an embedding whose gradient is
    sparse, under AdamW for the dense ones: two kernel batches (5 and 2 parameters), one launch
    each. With `foreach=False, fused=False` there is one eager batch instead.
    """

    def __init__(
        self, owner: str, members: Sequence[Member], reading: Reading, options: GroupRecipes
    ) -> None:
        self.owner, self.members, self.reading = owner, members, reading
        self._recipes, self._modes = options.recipes, options.modes
        self._graph_of = options.graph_of

    def recipe_of(self, member: Member) -> Recipe:
        """Return what a member's step computes."""
        return self._recipes[member.kind]

    def find_kinds(self, why: Mapping[int, str | None]) -> dict[int, object]:
        """Return what members that kernels serve must have in common, by position.

        Equal kinds are one object: it is quicker to compare.
        """
        known: dict[object, object] = {}
        kinds: dict[int, object] = {}
        for member in self.members:
            if why[member.position] is None:
                kind = self._kind(member)
                kinds[member.position] = known.setdefault(kind, kind)
        return kinds

    def _kind(self, member: Member) -> object:
        """What members have in common that one launch serves."""
        p, grad = self._param(member), self.reading.grads[member.position]
        state = self.reading.state_of(p)
        kept = [state[name] for name in self.recipe_of(member).graph.state]
        dtypes = tuple(t.dtype for t in (p, p if grad is None else grad, *kept))
        is_sparse = member.sparse == "slices"
        return self._graph_of[member.kind], dtypes, p.device, self._is_resident(member), is_sparse

    def why_shared(self, clusters: Clusters, kinds: Mapping[int, object]) -> dict[int, str]:
        """Return why kernels cannot serve parameters that share memory, by position."""
        positions = out_of_order(clusters, self.members, kinds, self._recipes, self.reading)
        return dict.fromkeys(positions, SHARING)

    def make_kernels(
        self, kinds: Mapping[int, object], numbers: Numbers, shared: set[int]
    ) -> list[KernelBatch]:
        """Make the batches of members that kernels serve, those of each kind together."""
        by_kind: dict[object, list[Member]] = defaultdict(list)
        for member in self.members:
            if member.position in kinds and member.sparse != "slices":
                by_kind[kinds[member.position]].append(member)
        places = self.reading.places()
        batches: list[KernelBatch] = []
        for together in by_kind.values():
            for members in self._cut(together):
                batch = self._compile(members, numbers)
                batch.find_entries(places, self.reading)
                batch.shares_memory = not shared.isdisjoint(batch.positions.tolist())
                batches.append(batch)
        return batches

    def _compile(self, members: list[Member], numbers: Numbers) -> KernelBatch:
        """Compile for the memory of these members, and lay out their batch."""
        recipe, p = self.recipe_of(members[0]), self._param(members[0])
        is_resident = self._is_resident(members[0])
        for member in members:
            state = self.reading.state_of(self._param(member))
            numbers.place(state, recipe, p.device if is_resident else kernel.HOST)
        kind = DeviceBatch if is_resident else KernelBatch
        resident = kind.resident(recipe)
        number = self.reading.state_of(p)[resident[0]] if resident else None
        columns = dense_columns(members, self.reading, recipe)
        compiled = compile_for(recipe.graph, recipe.columns, columns, resident, number)
        return kind(compiled, columns, members, self.reading, recipe, self.owner)

    def _cut(self, together: list[Member]) -> Iterable[list[Member]]:
        """What of these members is one launch: all, unless the rule calls functions of matrices.

        These take memory of the matrices' size, and matrices of one shape at once.
        """
        if not self.recipe_of(together[0]).graph.has_calls:
            return [together]
        batches: list[list[Member]] = []
        taken, shape = 0, None
        for member in sorted(together, key=lambda member: tuple(self._param(member).shape)):
            p = self._param(member)
            if p.shape != shape or taken + p.numel() > MOST_ELEMENTS:
                batches.append([])
                taken, shape = 0, p.shape
            batches[-1].append(member)
            taken += p.numel()
        return batches

    def make_slices(self, kinds: Mapping[int, object]) -> list[SlicesBatch]:
        """Make the batches of members whose sparse gradients kernels step slice by slice."""
        by_kind: dict[object, list[Member]] = defaultdict(list)
        for member in self.members:
            if member.position in kinds and member.sparse == "slices":
                by_kind[kinds[member.position]].append(member)
        return [
            SlicesBatch(members, self.reading, self.recipe_of(members[0]), self.owner)
            for members in by_kind.values()
        ]

    def make_eager(
        self, kinds: Mapping[int, object], numbers: Numbers, shared: set[int]
    ) -> list[EagerBatch]:
        """Make the batches of members that no kernel serves."""
        alike: dict[tuple[int, Mode, bool], list[Member]] = defaultdict(list)
        for member in self.members:
            if member.position not in kinds:
                mode, is_sparse = self._modes[member.kind], member.sparse == "slices"
                alike[self._graph_of[member.kind], mode, is_sparse].append(member)
        batches: list[EagerBatch] = []
        for (_, mode, is_sparse), members in alike.items():
            recipe = self.recipe_of(members[0])
            for member in members:
                numbers.part(self.reading.state_of(self._param(member)), recipe)
            capturable = mode.capturable or self._is_resident(members[0])
            kind = EagerSlices if is_sparse else EagerBatch
            modes = mode.differentiable, capturable
            batch = kind(members, self.reading, recipe, self.owner, *modes)
            batch.find_entries(self.reading.places(), self.reading)
            batch.apart = shared.intersection(batch.positions.tolist())
            batches.append(batch)
        return batches

    def _param(self, member: Member) -> Tensor:
        return self.reading.params[member.position]

    def _is_resident(self, member: Member) -> bool:
        """Whether a parameter's numbers lie on its device, where the kernel keeps them."""
        p, mode = self._param(member), self._modes[member.kind]
        if kernel.on_host(p.device):
            return False
        return self.recipe_of(member).is_resident(p, mode._asdict())
