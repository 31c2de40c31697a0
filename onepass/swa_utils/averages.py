"""Averages of tensors that change: one launch for all that a kernel can serve, and torch's
operations for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import kernel
from ..contract.values import StepError
from ..kernel.functions import lerp
from ..stepping.columns import Columns, compile_for, format_name, picker

Number = Tensor | float
Label = Callable[[int], str]
# Lists of several kinds may come in turn, one kind a dtype; the pairings of this many are kept.
MOST_PAIRINGS = 8


def average(p, g, *, weight):
    """The rule: an average p, moved towards the present value g."""
    return {"p": lerp(p, g, weight)}


class Average:
    r"""Moves averages towards present values, $a \leftarrow a + w\,(v - a)$, in place.

    An object is a `multi_avg_fn`, to be called with two lists and the number of values averaged so
    far, and its method `average_one` is an `avg_fn`. It may be copied, pickled, and called from
    several threads. Numbers are read at each call: changing one compiles nothing.

    Example: the values 4, 8 and 6 in turn. The first is copied. With equal weights ($w = 1/2$, then
    $1/3$) the average is 6 and 6; with a decay of 0.9 ($w = 0.1$) it is 4.4 and 4.56.
    """

    def __init__(self) -> None:
        self._pairings: dict[Any, Pairing] = {}

    def weight(self, number: Number) -> float:
        """Return the share of the present values after this many have been averaged."""
        raise NotImplementedError

    def average_one(self, average: Tensor, value: Tensor, number: Number) -> Tensor:
        """Return one average after it has moved, as a new tensor, by torch's operations."""
        raise NotImplementedError

    def __call__(
        self, averages: Sequence[Tensor], values: Sequence[Tensor], number: Number
    ) -> None:
        """Move each average towards the value at its place in the other list, both of one shape.

        Raises `StepError` (a RuntimeError) if lengths or shapes differ, or memory is gone. Nothing
        has changed then.
        """
        self.update(averages, values, number)

    def update(
        self,
        averages: Sequence[Tensor],
        values: Sequence[Tensor],
        number: Number,
        label: Label = "average {}".format,
    ) -> None:
        """As a call; `label` is what a message calls the pair at a place."""
        if torch.compiler.is_compiling():
            _update_outside_graphs(self, averages, values, number, label)
        else:
            self._update(averages, values, number, label)

    def _update(
        self, averages: Sequence[Tensor], values: Sequence[Tensor], number: Number, label: Label
    ) -> None:
        if len(averages) != len(values):
            raise StepError(
                f"{len(averages)} averages cannot follow {len(values)} tensors; give lists of one "
                "length"
            )
        if not averages:
            return
        weight = self.weight(number)
        key = len(averages), getattr(averages[0], "dtype", None), torch.is_inference_mode_enabled()
        # Out of the others' reach while it is in use: a thread that comes meanwhile makes its own.
        pairing = self._pairings.pop(key, None)
        ready = None if pairing is None else pairing.read(averages, values)
        if pairing is None or ready is None:
            check_pairs(averages, values, label)
            pairing = Pairing(averages, values)
            ready = pairing.read(averages, values)
            if ready is None:
                raise StepError(
                    "averages changed while their update was being prepared; update again"
                )
        if ready.places:
            pairing.checked(*ready.others, label, ready.places)
            # torch's operations may still refuse something; the kernels may not, and so come last.
            self._by_torch(*ready.others, weight, number)
        for batch, tensors in ready.batches:
            # Those may have run code of a tensor's class, which may do anything to memory.
            if ready.places and batch.expected.compare(tensors):
                raise StepError(
                    "averages changed while they were being updated; keep their memory as it is"
                )
            batch.run(tensors, weight)
        if len(self._pairings) >= MOST_PAIRINGS:
            self._pairings.clear()
        self._pairings[key] = pairing

    @torch.no_grad()
    def _by_torch(
        self, averages: Sequence[Tensor], values: Sequence[Tensor], weight: float, number: Number
    ) -> None:
        """The same by torch's operations, for what kernels do not serve.

        That is other devices and classes of tensors, integers, and tensors that share memory.
        """
        together: dict[tuple[object, ...], tuple[list[Tensor], list[Tensor]]] = {}
        for a, v in zip(averages, values, strict=True):
            device, dtype = a.device, a.dtype
            v = v if v.device == device else v.to(device)
            if dtype == v.dtype and (dtype.is_floating_point or dtype.is_complex):
                kind = device, dtype, kernel.is_plain(a)
                alike = together.setdefault(kind, ([], []))
                alike[0].append(a)
                alike[1].append(v)
            else:
                a.copy_(self.average_one(a, v, number))
        for alike_averages, alike_values in together.values():
            torch._foreach_lerp_(alike_averages, alike_values, weight)

    def __getstate__(self) -> dict[str, Any]:
        # Pairings hold machine code and addresses of this process.
        return self.__dict__ | {"_pairings": {}}


# It imports torch's compiler when first called, which inside a compiled function has happened
# already.
_update_outside_graphs = torch._disable_dynamo(Average._update)


class Exponential(Average):
    """The average in which each value weighs `decay` times as much as the one after it."""

    def __init__(self, decay: float | Tensor) -> None:
        super().__init__()
        self.decay = decay

    def weight(self, number: Number) -> float:
        return 1 - float(self.decay)

    @torch.no_grad()
    def average_one(self, average: Tensor, value: Tensor, number: Number) -> Tensor:
        return self.decay * average + (1 - self.decay) * value


class Equal(Average):
    """The average in which all values weigh the same."""

    def weight(self, number: Number) -> float:
        return 1 / (float(number) + 1)

    @torch.no_grad()
    def average_one(self, average: Tensor, value: Tensor, number: Number) -> Tensor:
        return average + (value - average) / (number + 1)


def check_pairs(
    averages: Sequence[Tensor],
    values: Sequence[Tensor],
    label: Label,
    places: Sequence[int] | None = None,
) -> None:
    """Raise `StepError` where a pair's shapes differ or its memory is gone; `places` are those that
    `label` knows."""
    for i, pair in enumerate(zip(averages, values, strict=True)):
        index = i if places is None else places[i]
        for t in pair:
            if not isinstance(t, Tensor):
                raise TypeError(
                    f"{label(index)}: averages and values must be tensors, got {torch.typename(t)}"
                )
            if (
                kernel.is_plain(t)
                and t.is_cpu
                and t.layout == torch.strided
                and not kernel.has_storage(t)
            ):
                raise StepError(
                    f"{label(index)} or its present value, of shape {tuple(t.shape)}, has no "
                    "storage (it was freed, as by untyped_storage().resize_(0)); give it memory "
                    "again"
                )
        a, v = pair
        if a.shape != v.shape:
            raise StepError(
                f"{label(index)} has shape {tuple(a.shape)}, its present value {tuple(v.shape)}; "
                "average tensors of one shape"
            )


class Checked:
    """`check_pairs` at every call, quick where facts are those of the last: the kernels' way to
    read them is used."""

    def __init__(self) -> None:
        self._expected: Any = None

    def __call__(
        self,
        averages: Sequence[Tensor],
        values: Sequence[Tensor],
        label: Label,
        places: Sequence[int] | None = None,
    ) -> None:
        tensors = [*averages, *values]
        if tensors and not (
            self._expected is not None
            and self._expected.count == len(tensors)
            and self._expected.compare(tensors) == 0
        ):
            check_pairs(averages, values, label, places)
            plain = all(
                kernel.is_plain(t) and t.is_cpu and t.layout == torch.strided for t in tensors
            )
            self._expected = kernel.expect(tensors) if plain else None

    def __reduce__(self) -> tuple[type[Checked], tuple[()]]:
        # What is expected holds addresses of its own.
        return Checked, ()


class Ready:
    """What has been read for one update; it lives no longer.

    `places` are those of the pairs that torch averages.
    """

    def __init__(self) -> None:
        self.batches: list[tuple[PairBatch, list[Tensor]]] = []
        self.places: list[int] = []
        self.others: tuple[list[Tensor], list[Tensor]] = [], []


class Pairing:
    """Which of the pairs in two lists kernels serve.

    It keeps no tensor, and fits all lists of the same facts.
    """

    def __init__(self, averages: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        self.moved = [
            i for i, (a, v) in enumerate(zip(averages, values, strict=True)) if a.device != v.device
        ]
        values = self._move(averages, values)
        kinds: dict[tuple[torch.dtype, torch.dtype, torch.device], list[int]] = {}
        self.others: list[int] = []
        for i, (a, v) in enumerate(zip(averages, values, strict=True)):
            if _is_served(a, v):
                kinds.setdefault((a.dtype, v.dtype, a.device), []).append(i)
            else:
                self.others.append(i)
        self.batches = [PairBatch(places, averages, values) for places in kinds.values()]
        self.checked = Checked()

    def _move(self, averages: Sequence[Tensor], values: Sequence[Tensor]) -> Sequence[Tensor]:
        """The values, with copies where they are on another device than their averages."""
        if self.moved:
            values = list(values)
            for i in self.moved:
                values[i] = values[i].detach().to(averages[i].device)
        return values

    def read(self, averages: Sequence[Tensor], values: Sequence[Tensor]) -> Ready | None:
        """Read all tensors' facts again; return None if the pairing does not fit."""
        values = self._move(averages, values)
        ready = Ready()
        ready.places += self.others
        for batch in self.batches:
            tensors = batch.read(averages, values)
            if tensors is None:
                return None
            if batch.overlap() or batch.kernel.is_capturing():
                ready.places += batch.places
            else:
                ready.batches.append((batch, tensors))
        if ready.places:
            for others, tensors in zip(ready.others, (averages, values), strict=True):
                others += [tensors[i] for i in ready.places]
        return ready


class PairBatch(Columns):
    """The pairs of two lists that one launch averages."""

    def __init__(
        self, places: list[int], averages: Sequence[Tensor], values: Sequence[Tensor]
    ) -> None:
        self.places = places
        self.pick = picker(places) if len(places) < len(averages) else lambda tensors: tensors
        graph = kernel.finish(kernel.trace(average, (("weight", ("float",)),)))
        names, columns = ("g", "p"), [self.pick(values), self.pick(averages)]
        compiled = compile_for(graph, names, columns)
        super().__init__(compiled, graph, names, columns)
        self.launch = self.kernel.prepare(
            self.pointers, self.work, np.zeros(self.count, np.int64), 1
        )

    def read(self, averages: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor] | None:
        """The batch's tensors, whose facts are as they were; else None."""
        tensors = [*self.pick(values), *self.pick(averages)]
        return None if self.expected.compare(tensors) else tensors

    def run(self, tensors: list[Tensor], weight: float) -> None:
        """Average what has been read."""
        self.launch.leaves[self.kernel.leaves["weight"]] = weight
        self.launch.run(self.kernel.concurrency())
        kernel.count_as_changed(tensors[self.count :])


def _is_served(a: Tensor, v: Tensor) -> bool:
    """Whether a kernel can walk a pair: plain dense memory with the elements in the same order."""
    for t in (a, v):
        if not kernel.is_plain(t) or t.layout != torch.strided:
            return False
        if kernel.why_no_kernels(t.device) or format_name(t.dtype) not in kernel.FORMATS:
            return False
        if not kernel.is_dense(t) or t.is_conj() or t.is_neg():
            return False
    if a.is_complex() != v.is_complex():
        return False
    if a.is_inference() and not torch.is_inference_mode_enabled():
        return False
    strides = [[s for n, s in zip(t.shape, t.stride(), strict=True) if n != 1] for t in (a, v)]
    return strides[0] == strides[1] or not a.numel()
