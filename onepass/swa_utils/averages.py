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
# Lists of several kinds may come in turn, one kind a dtype; the plans of so many are kept.
MOST_PLANS = 8


def average(p, g, *, weight):
    """The rule: an average p, moved towards the present value g."""
    return {"p": lerp(p, g, weight)}


class Average:
    r"""Moves averages towards present values, $a \leftarrow a + w\,(v - a)$, in place.

    An object is a `multi_avg_fn`, to be called with two lists and the number of values averaged so
    far, and its method `one` an `avg_fn`. It may be copied, pickled, and called from several
    threads. Numbers are read at each call: changing one compiles nothing.
    """

    def __init__(self) -> None:
        self._plans: dict[Any, Plan] = {}

    def weight(self, number: Number) -> float:
        """The share of the present values, where so many have been averaged before."""
        raise NotImplementedError

    def one(self, average: Tensor, value: Tensor, number: Number) -> Tensor:
        """One average after it has moved, in a new tensor, by torch's operations."""
        raise NotImplementedError

    def __call__(
        self, averages: Sequence[Tensor], values: Sequence[Tensor], number: Number
    ) -> None:
        """Move each average towards the value at its place in the other list, both of one shape.

        Raises `StepError` (a RuntimeError) where lengths or shapes differ or memory is gone;
        nothing has changed then.
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
        plan = self._plans.pop(key, None)
        ready = None if plan is None else plan.read(averages, values)
        if plan is None or ready is None:
            check_pairs(averages, values, label)
            plan = Plan(averages, values)
            ready = plan.read(averages, values)
            if ready is None:
                raise StepError(
                    "averages changed while their update was being prepared; update again"
                )
        plan.checked(*ready.others, label, ready.places)
        # torch's operations may still refuse something; the kernels may not, and so come last.
        self._by_torch(*ready.others, weight, number)
        for batch, tensors in ready.batches:
            # Those may have run code of a tensor's class, which may do anything to memory.
            if ready.places and batch.expected.compare(tensors):
                raise StepError(
                    "averages changed while they were being updated; keep their memory as it is"
                )
            batch.run(tensors, weight)
        if len(self._plans) >= MOST_PLANS:
            self._plans.clear()
        self._plans[key] = plan

    @torch.no_grad()
    def _by_torch(
        self, averages: Sequence[Tensor], values: Sequence[Tensor], weight: float, number: Number
    ) -> None:
        """The same by torch's operations: other devices and classes of tensors, integers, tensors
        that share memory."""
        together: dict[tuple[object, ...], tuple[list[Tensor], list[Tensor]]] = {}
        for a, v in zip(averages, values, strict=True):
            device, dtype = a.device, a.dtype
            v = v if v.device == device else v.to(device)
            if dtype == v.dtype and (dtype.is_floating_point or dtype.is_complex):
                of, their = together.setdefault((device, dtype, type(a) in kernel.PLAIN), ([], []))
                of.append(a)
                their.append(v)
            else:
                a.copy_(self.one(a, v, number))
        for of, their in together.values():
            torch._foreach_lerp_(of, their, weight)

    def __getstate__(self) -> dict[str, Any]:
        # Plans hold machine code and addresses of this process.
        return self.__dict__ | {"_plans": {}}


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
    def one(self, average: Tensor, value: Tensor, number: Number) -> Tensor:
        return self.decay * average + (1 - self.decay) * value


class Equal(Average):
    """The average in which all values weigh the same."""

    def weight(self, number: Number) -> float:
        return 1 / (float(number) + 1)

    @torch.no_grad()
    def one(self, average: Tensor, value: Tensor, number: Number) -> Tensor:
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
        place = i if places is None else places[i]
        for t in pair:
            if not isinstance(t, Tensor):
                raise TypeError(
                    f"{label(place)}: averages and values must be tensors, got {torch.typename(t)}"
                )
            if (
                type(t) in kernel.PLAIN
                and t.is_cpu
                and t.layout == torch.strided
                and not kernel.has_storage(t)
            ):
                raise StepError(
                    f"{label(place)} or its present value, of shape {tuple(t.shape)}, has no "
                    "storage (it was freed, as by untyped_storage().resize_(0)); give it memory "
                    "again"
                )
        a, v = pair
        if a.shape != v.shape:
            raise StepError(
                f"{label(place)} has shape {tuple(a.shape)}, its present value {tuple(v.shape)}; "
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
                type(t) in kernel.PLAIN and t.is_cpu and t.layout == torch.strided for t in tensors
            )
            self._expected = kernel.expect(tensors) if plain else None

    def __reduce__(self) -> tuple[type[Checked], tuple[()]]:
        # What is expected holds addresses of its own.
        return Checked, ()


class Ready:
    """What has been read for one update; it lives no longer. `places` are those of the pairs that
    torch averages."""

    def __init__(self) -> None:
        self.batches: list[tuple[Batch, list[Tensor]]] = []
        self.places: list[int] = []
        self.others: tuple[list[Tensor], list[Tensor]] = [], []


class Plan:
    """Which of the pairs in two lists kernels serve; it keeps no tensor, and fits all lists of the
    same facts."""

    def __init__(self, averages: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        self.moved = [
            i for i, (a, v) in enumerate(zip(averages, values, strict=True)) if a.device != v.device
        ]
        values = self._move(averages, values)
        kinds: dict[tuple[torch.dtype, torch.dtype, torch.device], list[int]] = {}
        self.others: list[int] = []
        for i, (a, v) in enumerate(zip(averages, values, strict=True)):
            (
                kinds.setdefault((a.dtype, v.dtype, a.device), [])
                if _is_served(a, v)
                else self.others
            ).append(i)
        self.batches = [Batch(places, averages, values) for places in kinds.values()]
        self.checked = Checked()

    def _move(self, averages: Sequence[Tensor], values: Sequence[Tensor]) -> Sequence[Tensor]:
        """The values, with copies where they are on another device than their averages."""
        if self.moved:
            values = list(values)
            for i in self.moved:
                values[i] = values[i].detach().to(averages[i].device)
        return values

    def read(self, averages: Sequence[Tensor], values: Sequence[Tensor]) -> Ready | None:
        """Read all tensors' facts anew; None where the plan does not fit."""
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
        for of, tensors in zip(ready.others, (averages, values), strict=True):
            of += [tensors[i] for i in ready.places]
        return ready


class Batch(Columns):
    """The pairs of two lists that one launch averages."""

    def __init__(
        self, places: list[int], averages: Sequence[Tensor], values: Sequence[Tensor]
    ) -> None:
        self.places = places
        self.pick = picker(places) if len(places) < len(averages) else lambda tensors: tensors
        own = self.pick(averages)
        graph = kernel.finish(kernel.trace(average, (("weight", ("float",)),)))
        names, columns = ("g", "p"), [self.pick(values), own]
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
        torch.autograd.graph.increment_version(tensors[self.count :])


def _is_served(a: Tensor, v: Tensor) -> bool:
    """Whether a kernel can walk a pair: plain dense memory with the elements in the same order."""
    for t in (a, v):
        if (
            type(t) not in kernel.PLAIN
            or t.layout != torch.strided
            or kernel.why_no_kernels(t.device)
        ):
            return False
        if (
            format_name(t.dtype) not in kernel.FORMATS
            or not kernel.is_dense(t)
            or t.is_conj()
            or t.is_neg()
        ):
            return False
    if a.is_complex() != v.is_complex() or (
        a.is_inference() and not torch.is_inference_mode_enabled()
    ):
        return False
    strides = [[s for n, s in zip(t.shape, t.stride(), strict=True) if n != 1] for t in (a, v)]
    return strides[0] == strides[1] or not a.numel()
