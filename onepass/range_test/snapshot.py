"""Everything that training steps change, put back as it was: for steps that are only a trial."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["undone_afterwards"]


@contextmanager
def undone_afterwards(
    model: nn.Module, optimizer: torch.optim.Optimizer, generators: Iterable[torch.Generator] = ()
) -> Iterator[None]:
    """Undo at the end, bit for bit, what is done inside, also if it ends by an exception.

    That is: the model's parameters and buffers, each module's training mode, all gradients; the
    optimizer's state, its options and attributes; the random state of torch (CPU and CUDA), NumPy,
    Python and of `generators`. Every tensor, list and dict stays the object that it is and is
    filled in place, so that views and references hold.

    Until the end a copy of all these tensors lies beside them. What is not undone: what hooks of
    yours do, plain attributes of modules, and batches taken from an iterator that cannot begin
    again.
    """
    snapshot = _Snapshot()
    try:
        snapshot.take(model, optimizer, generators)
        yield
    finally:
        snapshot.restore()


class _Snapshot:
    """What is to be put back. Half taken, it puts back that half."""

    def __init__(self) -> None:
        # By the identity of what is kept: itself, its memory, a copy of what is there; itself, a
        # copy of its entries.
        self.tensors: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.containers: dict[int, tuple[Any, Any]] = {}
        self.gradients: list[tuple[Tensor, Tensor | None]] = []
        self.modes: list[tuple[nn.Module, bool]] = []
        self.python, self.torch = random.getstate(), torch.get_rng_state()
        self.numpy = np.random.get_state()  # noqa: NPY002 (data pipelines use it, whatever we would)
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self.generators: list[tuple[torch.Generator, Tensor]] = []

    def take(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        generators: Iterable[torch.Generator],
    ) -> None:
        self.generators += [(generator, generator.get_state()) for generator in generators]
        for module in model.modules():
            self.modes.append((module, module.training))
            self._keep(module._parameters)
            self._keep(module._buffers)
        self._keep(optimizer.param_groups)
        self._keep(optimizer.state)
        self._keep_entries(vars(optimizer))
        params = chain(model.parameters(), *(group["params"] for group in optimizer.param_groups))
        for p in {id(p): p for p in params}.values():
            self.gradients.append((p, p.grad))
            self._keep(p.grad)

    def _keep(self, value: Any) -> None:
        """Keep a tensor, or a container with all tensors and containers in it; anything else never
        changes."""
        if isinstance(value, Tensor):
            if id(value) not in self.tensors:
                memory = value.data
                self.tensors[id(value)] = value, memory, _distinct(memory).clone()
        elif isinstance(value, (dict, list, tuple)) and id(value) not in self.containers:
            if not isinstance(value, tuple):
                self._keep_entries(value)
            for entry in value.values() if isinstance(value, dict) else value:
                self._keep(entry)

    def _keep_entries(self, container: Any) -> None:
        self.containers[id(container)] = container, container.copy()

    def restore(self) -> None:
        for container, entries in self.containers.values():
            _refill(container, entries)
        with torch.no_grad():
            for tensor, memory, copy in self.tensors.values():
                if _address(tensor) != _address(memory):
                    tensor.data = memory
                _distinct(tensor).copy_(copy)
        for p, grad in self.gradients:
            p.grad = grad
        for module, mode in self.modes:
            module.training = mode
        for generator, state in self.generators:
            generator.set_state(state)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        torch.set_rng_state(self.torch)
        np.random.set_state(self.numpy)  # noqa: NPY002
        random.setstate(self.python)


def _address(tensor: Tensor) -> int:
    """Where a tensor lies; 0 for one of a subclass or a sparse one, which need not lie in one
    place."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return tensor.data_ptr() if plain else 0


def _distinct(tensor: Tensor) -> Tensor:
    """A view of an expanded tensor in which no two elements share memory, so that it can be
    written."""
    if tensor.layout == torch.strided:
        for dim, stride in enumerate(tensor.stride()):
            if stride == 0:
                tensor = tensor.narrow(dim, 0, min(1, tensor.shape[dim]))
    return tensor


def _refill(container: Any, entries: Any) -> None:
    """Give a dict or list its entries back; one that has them still is not written, as its watchers
    would notice."""
    if isinstance(container, dict):
        same = [*container] == [*entries] and all(container[key] is entries[key] for key in entries)
        if not same:
            container.clear()
            container.update(entries)
    elif len(container) != len(entries) or any(
        a is not b for a, b in zip(container, entries, strict=True)
    ):
        container[:] = entries
