"""Who takes part in steps, and the state that each parameter needs for it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .. import kernel
from ..contract.values import State, StepError
from .batch import check
from .checks import Member, sparse_kind
from .columns import format_name
from .group_recipes import GroupRecipes
from .ledger import Ledger
from .reading import Reading
from .recipe import Algorithm, Recipe, fill_state


class Members:
    """The parameters that take part, in order, and what is known of each.

    A parameter without a gradient and without state is dormant: it takes no part until it has a
    gradient.

    Example: of four parameters the third is frozen. `awake` has members at the positions 0, 1 and
    3, `dormant` is [2].
    """

    def __init__(
        self, algorithm: Algorithm, reading: Reading, options: GroupRecipes, ledger: Ledger
    ) -> None:
        """Check all parameters and gradients. Raises `StepError`; nothing changes here.

        What `complete_states` changes later is noted in the ledger.
        """
        self._algorithm, self._reading, self._options = algorithm, reading, options
        self._ledger = ledger
        self.awake: list[Member] = []
        self.dormant: list[int] = []
        # The positions of the parameters whose state is made now.
        self.fresh: set[int] = set()
        # What `steps_rows` said of the groups that have met sparse gradients.
        self.slice_answers: dict[int, bool] = {}
        self._find()

    def _find(self) -> None:
        owner, gradients = self._algorithm.name, self._algorithm.gradients
        position = 0
        for group_index, group in enumerate(self._reading.groups):
            names = group.get("param_names")
            steps_slices = partial(self._algorithm.steps_rows, group)
            for i in range(len(group["params"])):
                label = repr(names[i]) if names and i < len(names) else str(position)
                grad = self._reading.grads[position]
                sparse = sparse_kind(owner, label, grad, gradients, steps_slices)
                if sparse:
                    self.slice_answers[group_index] = sparse == "slices"
                kind = self._options.kind_of[position]
                member = Member(position, group_index, kind, label, sparse)
                if self._is_awake(member):
                    self.awake.append(member)
                else:
                    self.dormant.append(position)
                position += 1

    def _is_awake(self, member: Member) -> bool:
        """Whether a parameter takes part; raises `StepError` if it should and cannot.

        A parameter without a gradient may be in any condition: frozen, freed.
        """
        owner = self._algorithm.name
        p, grad = self._reading.params[member.position], self._reading.grads[member.position]
        recipe = self._options.recipes[member.kind]
        # What no rule reads may be anything, whether a plan is built in this step or not.
        state = self._reading.state_of(p) if recipe.entries else {}
        if grad is None and not _is_whole(state, recipe):
            return False
        if not isinstance(state, dict):
            raise StepError(
                f"{owner}: the state of parameter {member.label} must be a dict, got a "
                f"{type(state).__name__}"
            )
        if grad is not None and p.is_meta and self._options.modes[member.kind].fused:
            raise StepError(
                f"{owner}: `fused=True` requires all the params to be floating point Tensors of a "
                f"device with memory, and parameter {member.label} is on meta; move it by "
                "to_empty(device=...)"
            )
        try:
            check(owner, member, p, grad, state, recipe)
        except StepError:
            if grad is not None:
                raise
            return False
        return grad is not None or bool(recipe.entries)

    def complete_states(self) -> dict[int, str | None]:
        """Create what is missing; return why no kernel can serve a parameter, by its position.

        None stands for a parameter that kernels serve, an empty string for a reason that is not
        news to the user.
        """
        why = {member.position: self._complete_state(member) for member in self.awake}
        self._reading.read_state()
        return why

    def _complete_state(self, member: Member) -> str | None:
        """Create missing entries, and say why no kernel can serve the parameter, if so."""
        recipe = self._options.recipes[member.kind]
        if not recipe.entries:
            return self._why_eager(member)
        reading, p = self._reading, self._reading.params[member.position]
        if p not in reading.state:
            self._ledger.set(reading.state, p, {})
        state = reading.state[p]
        if all(state.get(name) is None for name in recipe.graph.state):
            self.fresh.add(member.position)
        group, put = reading.groups[member.group], partial(self._ledger.set, state)
        fill_state(self._algorithm, recipe, p, group, put, state)
        why = self._why_eager(member)
        for name in recipe.graph.state:
            self._lay_well(state, name, p, recipe, is_for_kernel=why is None)
        return why

    def _lay_well(
        self, state: State, name: str, p: Tensor, recipe: Recipe, is_for_kernel: bool
    ) -> None:
        """Replace an entry by a dense copy if it does not lie as a step needs it.

        For a kernel it must lie as its parameter does. Torch's operations can write every tensor
        but an expanded one.
        """
        entry = state[name]
        is_like_p = is_for_kernel and entry.shape == p.shape
        if not is_for_kernel:
            lies_well = not kernel.is_plain(entry) or not kernel.is_expanded(entry)
        elif is_like_p and recipe.fits(p):
            lies_well = entry.stride() == p.stride()
        else:
            lies_well = entry.is_contiguous()
        if lies_well:
            return
        like = recipe.as_dense(p) if is_like_p else entry
        form = torch.preserve_format if is_like_p else torch.contiguous_format
        dense = torch.empty_like(like, dtype=entry.dtype, memory_format=form)
        self._ledger.set(state, name, dense.copy_(entry))

    def _why_eager(self, member: Member) -> str | None:
        """Why no kernel can serve this parameter, see `complete_states`."""
        mode, p = self._options.modes[member.kind], self._reading.params[member.position]
        grad, state = self._reading.grads[member.position], self._reading.state_of(p)
        if mode.eager or mode.differentiable or p.device.type == "meta":
            return ""
        if kernel.why_no_kernels(p.device):
            return kernel.why_no_kernels(p.device)
        if member.sparse == "slices" and not kernel.on_host(p.device):
            return f"there are no kernels for sparse gradients on {p.device.type} devices"
        written = [p, *(state[name] for name in self._options.recipes[member.kind].graph.state)]
        for t in written if grad is None else [*written, grad]:
            if not kernel.is_plain(t):
                return f"there are no kernels for tensors of class {type(t).__name__}"
            if format_name(t.dtype) not in kernel.FORMATS:
                return f"there are no kernels for {t.dtype}"
        if any(t.is_conj() or t.is_neg() for t in written):
            return "a parameter or its state is a lazily conjugated or negated view"
        return None


def _is_whole(state: object, recipe: Recipe) -> bool:
    """Whether a parameter's state has every entry that its recipe needs."""
    if not isinstance(state, dict):
        return False
    return all(state.get(name) is not None for name in recipe.entries)
