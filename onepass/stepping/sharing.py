"""Parameters that share memory.

Who they are, and whether a kernel can step them one after the other, as torch does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .. import kernel
from .checks import Member
from .columns import Clusters, find_clusters, lies_in_memory
from .reading import Reading
from .recipe import Recipe


def find_shared(members: Sequence[Member], recipes: Sequence[Recipe], reading: Reading) -> Clusters:
    """Return the positions of parameters that share memory with others, or whose states do.

    `recipes` has each kind's.
    """
    found: list[int] = []
    for member in members:
        p = reading.params[member.position]
        state = reading.state_of(p)
        tensors = [p, *(state[name] for name in recipes[member.kind].graph.state)]
        for t in filter(lies_in_memory, tensors):
            found += t.data_ptr(), kernel.extent(t), member.position
    starts, sizes, positions = np.array(found, np.uint64).reshape(-1, 3).T
    return find_clusters(starts, sizes, positions.astype(np.int64))


def out_of_order(
    clusters: Clusters,
    members: Sequence[Member],
    kinds: Mapping[int, object],
    recipes: Sequence[Recipe],
    reading: Reading,
) -> list[int]:
    """Return the positions of parameters in clusters that no single launch steps in order.

    `kinds` says of those that kernels serve, by position, in which launch.
    """
    found: list[int] = []
    member_at = {member.position: member for member in members} if clusters else {}
    for cluster in clusters:
        together = [member_at[position] for position in cluster]
        one_launch = len({kinds.get(position) for position in cluster}) == 1 and cluster[0] in kinds
        if not (one_launch and _is_in_order(together, recipes[together[0].kind], reading)):
            found += cluster
    return found


def _is_in_order(together: Sequence[Member], recipe: Recipe, reading: Reading) -> bool:
    """Whether one launch steps parameters that share memory in order.

    It does in one walk over each, where they lie. It does not where a walk over all of them reads
    before another one stores, or where copies stand for them.
    """
    params = [reading.params[member.position] for member in together]
    if together[0].sparse == "slices":
        return all(map(kernel.is_dense, params))
    return recipe.graph.is_elementwise and all(map(recipe.fits, params))
