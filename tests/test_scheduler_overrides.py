"""Schedulers that people derive from ours: each override is obeyed as with torch's class as the
base."""

from __future__ import annotations

import functools
import io
import math
import types
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.slow_marks import slow_but
from torch.optim import lr_scheduler as torch_schedulers
from torch.optim import swa_utils as torch_swa_utils

import onepass
from onepass import lr_scheduler, swa_utils

OURS = SimpleNamespace(
    **{name: getattr(lr_scheduler, name) for name in lr_scheduler.__all__}, SWALR=swa_utils.SWALR
)
TORCHS = SimpleNamespace(**{**vars(OURS), **vars(torch_schedulers), "SWALR": torch_swa_utils.SWALR})
LIBRARIES = pytest.mark.parametrize(
    "optimizers", slow_but([onepass], [torch.optim, onepass]), ids=["torch", "onepass"]
)
STEPS = 15


def waves(t: int) -> float:
    return 0.9 + 0.05 * (t % 3)


BASES: dict[str, dict[str, Any]] = {
    "StepLR": {"step_size": 3, "gamma": 0.5},
    "MultiStepLR": {"milestones": [2, 5, 5, 9], "gamma": 0.3},
    "ConstantLR": {"factor": 0.25, "total_iters": 4},
    "LinearLR": {"start_factor": 0.2, "end_factor": 0.7, "total_iters": 6},
    "ExponentialLR": {"gamma": 0.9},
    "PolynomialLR": {"total_iters": 9, "power": 2.0},
    "CosineAnnealingLR": {"T_max": 5, "eta_min": 0.01},
    "MultiplicativeLR": {"lr_lambda": waves},
    "LambdaLR": {"lr_lambda": [waves, waves]},
    "CosineAnnealingWarmRestarts": {"T_0": 3, "T_mult": 2, "eta_min": 0.003},
    "SWALR": {"swa_lr": [0.05, 0.2], "anneal_epochs": 6},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.2, "step_size_up": 3, "mode": "triangular2"},
    "OneCycleLR": {"max_lr": 0.3, "total_steps": 40},
}


def make_optimizer(
    optimizers: Any, tensor: torch.dtype | None = None, groups: int = 2
) -> torch.optim.Optimizer:
    lrs = [0.1 * (index + 1) for index in range(groups)]
    rates = [lr if tensor is None else torch.tensor(lr, dtype=tensor) for lr in lrs]
    params = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": lr} for lr in rates]
    for group in params:
        group["params"][0].grad = torch.zeros(2)
    return optimizers.SGD(params, lr=0.1, momentum=0.9)


def numbers(opt: torch.optim.Optimizer) -> list[float]:
    return [float(group[key]) for group in opt.param_groups for key in ("lr", "momentum")]


def lrs(opt: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in opt.param_groups]


def assert_same(ours: list[list[float]], theirs: list[list[float]], case: Any) -> None:
    assert len(ours) == len(theirs)
    for t, (mine, its) in enumerate(zip(ours, theirs, strict=True)):
        assert mine == pytest.approx(its, rel=1e-12, abs=1e-18), f"step {t} of {case}"


# Ways to override. Each makes a subclass of a base; some have more to do once it is made.


def warm_up(base: Any) -> Any:
    class Warm(base):
        def get_lr(self) -> Any:
            if self.last_epoch < 3:
                return [lr * (self.last_epoch + 1) / 4 for lr in self.base_lrs]
            return super().get_lr()

    return Warm


def floor(base: Any) -> Any:
    class Floor(base):
        def get_lr(self) -> Any:
            return [max(lr, 0.06) for lr in super().get_lr()]

    return Floor


def ceiling(base: Any) -> Any:
    class Ceiling(base):
        def __init__(self, *args: Any, top: float = 0.08, **kwargs: Any) -> None:
            self.top = top
            super().__init__(*args, **kwargs)

        def get_lr(self) -> Any:
            return [min(lr, self.top) for lr in super().get_lr()]

    return Ceiling


def scaled(base: Any) -> Any:
    class Scaled(base):
        def get_lr(self) -> Any:
            return [lr * 0.97 for lr in super().get_lr()]

    return Scaled


def inverse_root(base: Any) -> Any:
    class InverseRoot(base):
        def get_lr(self) -> Any:
            return [lr / math.sqrt(1 + self.last_epoch) for lr in self.base_lrs]

    return InverseRoot


def recursion(base: Any) -> Any:
    class Recursion(base):
        def get_lr(self) -> Any:
            if self.last_epoch == 0:
                return [group["lr"] for group in self.optimizer.param_groups]
            return [group["lr"] * 0.93 for group in self.optimizer.param_groups]

    return Recursion


def step_count(base: Any) -> Any:
    class Count(base):
        def get_lr(self) -> Any:
            return [lr * 0.9**self._step_count for lr in self.base_lrs]

    return Count


def initial(base: Any) -> Any:
    class Initial(base):
        def get_lr(self) -> Any:
            if self._is_initial:
                return [group["lr"] * 0.5 for group in self.optimizer.param_groups]
            return [group["lr"] + 0.001 for group in self.optimizer.param_groups]

    return Initial


def within_step(base: Any) -> Any:
    class Within(base):
        def get_lr(self) -> Any:
            assert self._get_lr_called_within_step
            return [lr / (2 + self.last_epoch) for lr in self.base_lrs]

    return Within


def first_time(base: Any) -> Any:
    class First(base):
        def get_lr(self) -> Any:
            if not hasattr(self, "_last_lr"):
                return [lr * 0.3 for lr in self.base_lrs]
            return [lr * 0.95 for lr in self._last_lr]

    return First


def mixin(base: Any) -> Any:
    class Floor:
        def get_lr(self) -> Any:
            return [max(lr, 0.07) for lr in super().get_lr()]  # type: ignore[misc]

    return type("Mixed", (Floor, base), {})


def late_mixin(base: Any) -> Any:
    class Other:
        def get_lr(self) -> Any:
            raise AssertionError("torch's class comes first")

    return type("Mixed", (base, Other), {})


def grandchild(base: Any) -> Any:
    class Half(base):
        def get_lr(self) -> Any:
            return [lr * 0.5 if self.last_epoch == 4 else lr for lr in super().get_lr()]

    class Child(Half):
        pass

    class Grandchild(Child):
        def get_lr(self) -> Any:
            return [max(lr, 0.02) for lr in super().get_lr()]

    return Grandchild


def grandchild_that_only_inherits(base: Any) -> Any:
    return type("Child", (floor(base),), {"__doc__": "nothing"})


def sometimes(base: Any) -> Any:
    class Sometimes(base):
        def get_lr(self) -> Any:
            if self.last_epoch % 3 == 1:
                return list(self._last_lr)
            return super().get_lr()

    return Sometimes


def of_another_epoch(base: Any) -> Any:
    class Shifted(base):
        def get_lr(self) -> Any:
            if self.last_epoch <= 2:
                return [lr * 0.1 * (1 + self.last_epoch) for lr in self.base_lrs]
            self.last_epoch -= 2
            try:
                return super().get_lr()
            finally:
                self.last_epoch += 2

    return Shifted


def frozen_group(base: Any) -> Any:
    class Frozen(base):
        def get_lr(self) -> Any:
            return [*super().get_lr()[:1], *self.base_lrs[1:]]

    return Frozen


def a_tuple(base: Any) -> Any:
    class Tuple(base):
        def get_lr(self) -> Any:
            return tuple(lr * 0.9**self.last_epoch for lr in self.base_lrs)

    return Tuple


def a_generator(base: Any) -> Any:
    class Generator(base):
        def get_lr(self) -> Iterator[Any]:
            yield from (max(lr, 0.04) for lr in super().get_lr())

    return Generator


def numpys(base: Any) -> Any:
    class Numpy(base):
        def get_lr(self) -> Any:
            return np.linspace(0.1, 0.2, 2) * 0.9**self.last_epoch

    return Numpy


def closed_form(base: Any) -> Any:
    class Closed(base):
        def _get_closed_form_lr(self) -> Any:
            return [lr * 0.8**self.last_epoch for lr in self.base_lrs]

        def get_lr(self) -> Any:
            return self._get_closed_form_lr()

    return Closed


def closed_form_only(base: Any) -> Any:
    class Closed(base):
        def _get_closed_form_lr(self) -> Any:
            return [lr * 0.8**self.last_epoch for lr in self.base_lrs]

    return Closed


def logging_step(base: Any) -> Any:
    class Logging(base):
        def step(self, *args: Any) -> None:
            self.calls = getattr(self, "calls", 0) + 1
            super().step(*args)

    return Logging


def warm_step(base: Any) -> Any:
    class WarmStep(base):
        def step(self, epoch: Any = None) -> None:
            if self.last_epoch >= 2:
                return super().step(epoch)
            self.last_epoch += 1
            self._step_count = getattr(self, "_step_count", 0) + 1
            for group, lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
                group["lr"] = lr * (self.last_epoch + 1) / 5
            self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
            return None

    return WarmStep


def whole_step(base: Any) -> Any:
    class Whole(base):
        def step(self, epoch: Any = None) -> None:
            self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
            self._step_count += 1
            self._get_lr_called_within_step = True
            for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
                group["lr"] = lr
            self._get_lr_called_within_step = False
            self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    return Whole


def twice(base: Any) -> Any:
    class Twice(base):
        def step(self, *args: Any) -> None:
            super().step(*args)
            if not self._is_initial and self.last_epoch % 4 == 1:
                super().step(*args)

    return Twice


def own_update(base: Any) -> Any:
    class Update(base):
        def _update_lr(self, epoch: Any = None) -> None:
            super()._update_lr(epoch)
            for group in self.optimizer.param_groups:
                group["lr"] = group["lr"] * 0.99
            self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    return Update


def own_initial_step(base: Any) -> Any:
    class Begin(base):
        def _initial_step(self) -> None:
            self._step_count = 1
            self.last_epoch += 1
            for group in self.optimizer.param_groups:
                group["lr"] = group["lr"] * 0.5
            self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    return Begin


def initial_step_with_more(base: Any) -> Any:
    class Begin(base):
        def _initial_step(self) -> None:
            super()._initial_step()
            self.begun = True

    return Begin


def restarts(base: Any) -> Any:
    class Restarts(base):
        def get_lr(self) -> Any:
            if self.last_epoch == 6:
                self.last_epoch = 0
                return list(self.base_lrs)
            return super().get_lr()

    return Restarts


def our_words(base: Any) -> Any:
    """What our own methods are called, as attributes before and after construction."""

    class Words(base):
        options = "abc"
        handed_on = None

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.scale, self._step, self._left_over, self.height = 0.5, 0, 3, 1.0
            super().__init__(*args, **kwargs)
            self.floors, self._own, self._closed, self._rates, self._move = (
                [0.0],
                None,
                True,
                7,
                "on",
            )

        def get_lr(self) -> Any:
            return [max(lr, 0.03) * (1 + self.scale * 0.01) for lr in super().get_lr()]

    return Words


def our_words_and_no_override(base: Any) -> Any:
    class Words(base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.scale, self._step, self.floors, self._closed, self.momenta, self._adopt = (
                0.5,
                0,
                [0.0],
                1,
                2,
                3,
            )
            self._write = self._carry = self._check = self._restore = self.options = None

    return Words


def our_methods(base: Any) -> Any:
    class Methods(base):
        def scale(self, *args: Any) -> None:
            raise AssertionError

        floors = _prepare = _adopt = _reset = _write = _closed = _carry = _settle = _restore = (
            _check
        ) = _rates = scale
        _move = _enter = _resume = momenta = height = _note = _values = _put_momenta = scale

        def get_lr(self) -> Any:
            return [lr + 0.001 for lr in super().get_lr()]

    return Methods


def our_methods_and_no_override(base: Any) -> Any:
    class Methods(base):
        scale = floors = momenta = height = 0.5

        def _prepare(self, batch: Any, more: Any) -> None:
            raise AssertionError

        _adopt = _write = _check = _closed = _prepare

    return Methods


def own_last_lr(base: Any) -> Any:
    class Last(base):
        def get_last_lr(self) -> Any:
            return [float(lr) * 2 for lr in super().get_last_lr()]

    return Last


def small_state(base: Any) -> Any:
    class Small(base):
        def get_lr(self) -> Any:
            return [lr * 0.9**self.last_epoch for lr in self.base_lrs]

        def state_dict(self) -> Any:
            return {"last_epoch": self.last_epoch, "_step_count": self._step_count}

        def load_state_dict(self, state_dict: Any) -> None:
            self.__dict__.update(state_dict)

    return Small


def state_with_more(base: Any) -> Any:
    class More(base):
        def get_lr(self) -> Any:
            self.seen = getattr(self, "seen", 0) + 1
            return [lr / (1 + self.seen) for lr in self.base_lrs]

        def state_dict(self) -> Any:
            return super().state_dict() | {"note": "hello"}

        def load_state_dict(self, state_dict: Any) -> None:
            state = dict(state_dict)
            assert state.pop("note") == "hello"
            super().load_state_dict(state)

    return More


def plain(base: Any) -> Any:
    return type("Plain", (base,), {})


def partial_method(base: Any) -> Any:
    def formula(self: Any, factor: float) -> Any:
        return [lr * factor**self.last_epoch for lr in self.base_lrs]

    return type("Partial", (base,), {"get_lr": functools.partialmethod(formula, 0.9)})


def assigned_later(base: Any) -> Any:
    class Later(base):
        pass

    Later.get_lr = lambda self: [max(lr, 0.05) for lr in base.get_lr(self)]  # type: ignore[attr-defined]
    return Later


STYLES: dict[str, Callable[[Any], Any]] = {
    make.__name__: make
    for make in (
        *(
            warm_up,
            floor,
            ceiling,
            scaled,
            inverse_root,
            recursion,
            step_count,
            initial,
            within_step,
            first_time,
        ),
        *(
            mixin,
            late_mixin,
            grandchild,
            grandchild_that_only_inherits,
            sometimes,
            of_another_epoch,
            frozen_group,
        ),
        *(
            a_tuple,
            a_generator,
            numpys,
            closed_form,
            closed_form_only,
            logging_step,
            warm_step,
            whole_step,
            twice,
        ),
        *(
            own_update,
            own_initial_step,
            initial_step_with_more,
            restarts,
            our_words,
            our_words_and_no_override,
        ),
        *(
            our_methods,
            our_methods_and_no_override,
            own_last_lr,
            small_state,
            state_with_more,
            plain,
            partial_method,
        ),
        *(assigned_later,),
    )
}
NOT_OF_TENSORS = {
    "warm_step",
    "whole_step",
    "own_update",
    "own_initial_step",
}  # they write the lr themselves
# In plain classes the closed form and torch's recursion are apart by roundings.
PLAIN = {"plain", "late_mixin", "closed_form_only"}


class Side:
    """A training with a scheduler of one class on an optimizer of one library."""

    def __init__(
        self, cls: Any, name: str, optimizers: Any = torch.optim, tensor: Any = None
    ) -> None:
        self.opt = make_optimizer(optimizers, tensor)
        self.scheduler = cls(self.opt, **BASES[name])

    def run(self, steps: int, *epochs: Any) -> list[list[float]]:
        rows = [self.row()]
        for t in range(steps):
            self.opt.step()
            self.scheduler.step(*epochs[t : t + 1])
            rows.append(self.row())
        return rows

    def row(self) -> list[float]:
        last = [float(lr) for lr in self.scheduler.get_last_lr()]
        return [*numbers(self.opt), *last, float(self.scheduler.last_epoch)]

    def load(self, other: Side) -> Side:
        file = io.BytesIO()
        torch.save([other.opt.state_dict(), other.scheduler.state_dict()], file)
        file.seek(0)
        state = torch.load(file, weights_only=False)
        self.opt.load_state_dict(state[0])
        self.scheduler.load_state_dict(state[1])
        return self


def ours_and_torchs(style: str, name: str) -> tuple[Any, Any]:
    return STYLES[style](getattr(OURS, name)), STYLES[style](getattr(TORCHS, name))


ALL = pytest.mark.parametrize("name", BASES)
EVERY = pytest.mark.parametrize("style", STYLES)


@ALL
@EVERY
@pytest.mark.parametrize("tensor", [None, torch.float64], ids=["float", "tensor"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_is_obeyed_as_on_torchs_class(style: str, name: str, tensor: Any) -> None:
    if tensor is not None and style in NOT_OF_TENSORS:
        return
    mine, its = ours_and_torchs(style, name)
    theirs = Side(its, name, tensor=tensor).run(STEPS)
    optimizers = onepass if tensor is None else torch.optim
    assert_same(Side(mine, name, optimizers, tensor).run(STEPS), theirs, (style, name))


@ALL
@EVERY
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_checkpoints_cross(style: str, name: str) -> None:
    """From torch's base to ours, back, and to ours again."""
    mine, its = ours_and_torchs(style, name)
    for classes in ((its, mine, its), (mine, its, mine), (mine, mine, mine)):
        first, right = Side(classes[0], name), Side(its, name)
        rows, wanted = first.run(4), right.run(4)
        for cls in classes[1:]:
            first, right = Side(cls, name).load(first), Side(its, name).load(right)
            rows += first.run(4)
            wanted += right.run(4)
        assert_same(rows, wanted, (style, name, classes))


@ALL
@EVERY
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_steps_by_number(style: str, name: str) -> None:
    mine, its = ours_and_torchs(style, name)
    if name == "SWALR" and style in PLAIN | {"own_last_lr"}:
        return  # torch's takes no notice of the number
    epochs = (3, 4, None, 9, 0, 2, None)
    assert_same(Side(mine, name).run(7, *epochs), Side(its, name).run(7, *epochs), (style, name))


@pytest.mark.parametrize(
    "style", sorted({*STYLES} - PLAIN - {"own_last_lr", "our_words_and_no_override"})
)
@ALL
@LIBRARIES
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_made_again_at_a_step_as_on_torchs_class(style: str, name: str, optimizers: Any) -> None:
    mine, its = ours_and_torchs(style, name)
    rows = []
    for cls in (mine, its):
        opt = make_optimizer(optimizers)
        for group in opt.param_groups:
            group.update(
                initial_lr=group["lr"] * 2,
                max_lr=0.3,
                min_lr=1e-5,
                base_momentum=0.8,
                max_momentum=0.9,
            )
        scheduler = cls(opt, **BASES[name], last_epoch=4)
        rows.append([numbers(opt)])
        for _ in range(5):
            opt.step()
            scheduler.step()
            rows[-1].append(numbers(opt))
    assert_same(rows[0], rows[1], (style, name))


# Methods that only one of torch's classes has.


def slow_cosine(start: Any, end: Any, pct: float) -> Any:
    return end + (start - end) * (1 - pct) ** 2


def set_a_square(self: Any, strategy: str) -> None:
    self._anneal_strategy, self.anneal_func = strategy, lambda t: t * t


PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "scale_fn": ("CyclicLR", {"scale_fn": lambda self, x: 0.9**x}),
    "triangles": ("CyclicLR", {"_triangular2_scale_fn": staticmethod(lambda x: 1 / x)}),
    "no momentum": (
        "CyclicLR",
        {"get_lr": lambda self: [lr * (1 + self.last_epoch) for lr in self.base_lrs]},
    ),
    "anneal": (
        "OneCycleLR",
        {"_anneal_func": lambda self, start, end, pct: slow_cosine(start, end, pct)},
    ),
    "cosine": ("OneCycleLR", {"_annealing_cos": staticmethod(slow_cosine)}),
    "no momentum in one cycle": (
        "OneCycleLR",
        {"get_lr": lambda self: [0.1 + self.last_epoch] * 2},
    ),
    "swa": ("SWALR", {"_cosine_anneal": staticmethod(lambda t: t * t)}),
    "swa's start": ("SWALR", {"_get_initial_lr": staticmethod(lambda lr, swa_lr, alpha: lr)}),
    "swa's function": ("SWALR", {"_set_anneal_func": set_a_square}),
}


@pytest.mark.parametrize("part", PARTS)
def test_parts_of_one_class(part: str) -> None:
    name, methods = PARTS[part]
    rows = [
        Side(type("Part", (getattr(library, name),), methods), name).run(STEPS)
        for library in (OURS, TORCHS)
    ]
    assert_same(rows[0], rows[1], part)
    assert rows[0] != Side(getattr(TORCHS, name), name).run(STEPS)


@pytest.mark.parametrize("library", [OURS, TORCHS], ids=["ours", "torch"])
def test_a_function_of_annealing_that_is_put_in(library: Any) -> None:
    side = Side(library.SWALR, "SWALR")
    side.run(2)
    side.scheduler.anneal_func = lambda t: t * t
    want = Side(TORCHS.SWALR, "SWALR")
    want.run(2)
    want.scheduler.anneal_func = lambda t: t * t
    assert_same(side.run(8), want.run(8), library)


PLATEAUS: dict[str, dict[str, Any]] = {
    "better": {"_is_better": lambda self, a, best: a < best - 0.3},
    "cooldown": {"in_cooldown": property(lambda self: self.last_epoch % 3 == 0)},
    "reduce": {
        "_reduce_lr": lambda self, epoch: self.optimizer.param_groups[0].update(lr=0.7**epoch)
    },
    "reset": {
        "_reset": lambda self: vars(self).update(best=-2.0, cooldown_counter=2, num_bad_epochs=1)
    },
    "get_lr": {"get_lr": lambda self: [99.0, 99.0]},
    "step": {
        "step": lambda self, metrics, epoch=None: (
            type(self).__mro__[1].step(self, metrics * 2 - 0.1)
        )
    },
}


@pytest.mark.parametrize("part", PLATEAUS)
def test_parts_of_the_plateau(part: str) -> None:
    rows: list[list[list[float]]] = []
    for library in (OURS, TORCHS):
        opt = make_optimizer(torch.optim)
        cls = type("Part", (library.ReduceLROnPlateau,), PLATEAUS[part])
        scheduler = cls(opt, patience=1, factor=0.5, cooldown=1)
        rows.append([lrs(opt)])
        for t in range(STEPS):
            if t == 7:
                again = cls(opt, patience=1, factor=0.5, cooldown=1)
                again.load_state_dict(scheduler.state_dict())
                scheduler = again
            opt.step()
            scheduler.step(math.sin(t * t))
            rows[-1].append(
                [*lrs(opt), scheduler.last_epoch, scheduler.num_bad_epochs, scheduler.best]
            )
    assert_same(rows[0], rows[1], part)


# Patches in mid-run.


def patch_object(scheduler: Any, function: Any) -> Callable[[], None]:
    scheduler.get_lr = types.MethodType(function, scheduler)
    return lambda: delattr(scheduler, "get_lr")


def patch_object_with_a_function(scheduler: Any, function: Any) -> Callable[[], None]:
    scheduler.get_lr = lambda: function(scheduler)
    return lambda: delattr(scheduler, "get_lr")


def patch_class(scheduler: Any, function: Any) -> Callable[[], None]:
    cls = type(scheduler)
    cls.get_lr = function
    return lambda: delattr(cls, "get_lr")


@ALL
@pytest.mark.parametrize("patch", [patch_object, patch_object_with_a_function, patch_class])
@pytest.mark.parametrize("made", ["library", "subclass"])
def test_patches_in_mid_run(name: str, patch: Any, made: str) -> None:
    def halved(self: Any) -> Any:
        return [max(group["lr"] * 0.8, 0.01) for group in self.optimizer.param_groups]

    rows: list[list[list[float]]] = []
    for library in (OURS, TORCHS):
        base = getattr(library, name)
        if made == "library" and patch is patch_class:
            original = vars(base).get("get_lr")
            side = Side(base, name)
            rows.append(side.run(4))
            base.get_lr = halved
            rows[-1] += side.run(4)
            if original is None:
                del base.get_lr
            else:
                base.get_lr = original
        else:
            side = Side(base if made == "library" else type("Child", (base,), {}), name)
            rows.append(side.run(4))
            undo = patch(side.scheduler, halved)
            rows[-1] += side.run(4)
            undo()
        rows[-1] += side.run(4)
    for ours, theirs in zip(*rows, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-10, abs=1e-15), name


@ALL
def test_a_step_that_is_wrapped(name: str) -> None:
    calls: list[int] = []
    side = Side(getattr(OURS, name), name)
    step = side.scheduler.step
    side.scheduler.step = lambda *args: (calls.append(1), step(*args))
    rows = side.run(STEPS)
    wanted = Side(getattr(TORCHS, name), name).run(STEPS)
    for mine, its in zip(rows, wanted, strict=True):
        assert mine == pytest.approx(its, rel=1e-9, abs=1e-12)
    assert len(calls) == STEPS


# Schedulers of schedulers, and those that are written from the base.


def from_the_base(library: Any) -> Any:
    class Own(library.LRScheduler):
        def __init__(self, optimizer: Any, warm: int, last_epoch: int = -1) -> None:
            self.warm, self.scale = warm, 0.9
            super().__init__(optimizer, last_epoch)

        def get_lr(self) -> Any:
            if self.last_epoch < self.warm:
                return [lr * (self.last_epoch + 1) / self.warm for lr in self.base_lrs]
            return [group["lr"] * self.scale for group in self.optimizer.param_groups]

        def _get_closed_form_lr(self) -> Any:
            return [
                lr * self.scale ** max(0, self.last_epoch - self.warm + 1) for lr in self.base_lrs
            ]

    return Own


def gradual(library: Any) -> Any:
    """Warms up, and then lets another scheduler go on, whose initial values it changes."""

    class Gradual(library.LRScheduler):
        def __init__(self, optimizer: Any, multiplier: float, total: int, after: Any) -> None:
            self.multiplier, self.total, self.after, self.finished = multiplier, total, after, False
            super().__init__(optimizer)

        def get_lr(self) -> Any:
            if self.last_epoch <= self.total:
                return [
                    lr * ((self.multiplier - 1) * self.last_epoch / self.total + 1)
                    for lr in self.base_lrs
                ]
            if not self.finished:
                self.after.base_lrs = [lr * self.multiplier for lr in self.base_lrs]
                self.finished = True
            return [lr * self.multiplier for lr in self.base_lrs]

        def step(self, epoch: Any = None) -> None:
            if self.finished:
                self.after.step(None)
                self._last_lr = self.after.get_last_lr()
            else:
                super().step(epoch)

    return Gradual


def counted(cls: Any) -> Any:
    class Counted(cls):
        def step(self) -> None:
            self.count = getattr(self, "count", 0) + 1
            super().step()

        def get_last_lr(self) -> Any:
            return [lr * 2 for lr in super().get_last_lr()]

    return Counted


def old_sequence(library: Any) -> Any:
    class Old(library.SequentialLR):
        def step(self) -> None:
            self.last_epoch += 1
            index = sum(milestone <= self.last_epoch for milestone in self._milestones)
            if index and self._milestones[index - 1] == self.last_epoch:
                self._schedulers[index].step(0)
            else:
                self._schedulers[index].step()
            self._last_lr = self._schedulers[index].get_last_lr()

    return Old


def no_undo(library: Any) -> Any:
    class Kept(library.SequentialLR):
        def recursive_undo(self, sched: Any = None) -> None:
            pass

    return Kept


def member(library: Any, opt: Any, style: str, name: str) -> Any:
    return STYLES[style](getattr(library, name))(opt, **BASES[name])


def sequence_of(library: Any, opt: Any, style: str, *names: str) -> Any:
    members = [member(library, opt, style, name) for name in names]
    return library.SequentialLR(opt, members, [3, 8][: len(names) - 1])


IN_SEQUENCES = (
    "warm_up",
    "floor",
    "scaled",
    "recursion",
    "step_count",
    "initial",
    "our_words",
    "twice",
    "closed_form",
)
MADE: dict[str, Callable[[Any, Any], Any]] = {
    "base": lambda library, opt: from_the_base(library)(opt, 4),
    "floor of the base": lambda library, opt: floor(from_the_base(library))(opt, 4),
    "gradual": lambda library, opt: gradual(library)(
        opt, 2.0, 3, library.CosineAnnealingLR(opt, 7)
    ),
    "gradual and steps": lambda library, opt: gradual(library)(
        opt, 1.0, 3, library.StepLR(opt, 2, 0.5)
    ),
    "chain": lambda library, opt: library.ChainedScheduler(
        [floor(library.LinearLR)(opt, 0.2, total_iters=4), scaled(library.ExponentialLR)(opt, 0.9)]
    ),
    "chain with the base": lambda library, opt: library.ChainedScheduler(
        [library.StepLR(opt, 3, 0.5), from_the_base(library)(opt, 3)]
    ),
    "counted chain": lambda library, opt: counted(library.ChainedScheduler)(
        [library.StepLR(opt, 3, 0.5)]
    ),
    "counted sequence": lambda library, opt: counted(library.SequentialLR)(
        opt, [library.LinearLR(opt, 0.2), own_last_lr(library.ExponentialLR)(opt, 0.9)], [4]
    ),
    "old sequence": lambda library, opt: old_sequence(library)(
        opt, [library.LinearLR(opt, 0.2), warm_up(library.StepLR)(opt, 3, 0.5)], [4]
    ),
    "sequence without undoing": lambda library, opt: no_undo(library)(
        opt, [library.LambdaLR(opt, waves), library.StepLR(opt, 3, 0.5)], [4]
    ),
    **{
        f"{style} {' '.join(names)}": lambda library, opt, style=style, names=names: sequence_of(
            library, opt, style, *names
        )
        for style in IN_SEQUENCES
        for names in (
            ("LinearLR", "StepLR", "CosineAnnealingLR"),
            ("ExponentialLR", "LambdaLR"),
            ("ConstantLR", "CosineAnnealingWarmRestarts", "PolynomialLR"),
            ("MultiStepLR", "SWALR"),
            ("StepLR", "MultiplicativeLR"),
        )
    },
}


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("optimizers", [torch.optim, onepass], ids=["torch", "onepass"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_schedulers_of_schedulers(name: str, optimizers: Any) -> None:
    rows: list[list[list[float]]] = []
    for library in (OURS, TORCHS):
        opt = make_optimizer(optimizers)
        scheduler = MADE[name](library, opt)
        rows.append([[*numbers(opt), *map(float, scheduler.get_last_lr())]])
        for t in range(STEPS):
            if t == 6 and "gradual" not in name:
                fresh = make_optimizer(optimizers)
                again = MADE[name](library, fresh)
                fresh.load_state_dict(opt.state_dict())
                again.load_state_dict(scheduler.state_dict())
                opt, scheduler = fresh, again
            opt.step()
            scheduler.step()
            rows[-1].append(
                [
                    *numbers(opt),
                    *map(float, scheduler.get_last_lr()),
                    getattr(scheduler, "count", 0),
                ]
            )
    assert_same(rows[0], rows[1], name)


def test_get_lr_outside_of_a_step_warns_as_torchs() -> None:
    for library in (OURS, TORCHS):
        side = Side(library.ExponentialLR, "ExponentialLR")
        with pytest.warns(UserWarning, match="please use `get_last_lr"):
            assert side.scheduler.get_lr() == pytest.approx([0.09, 0.18])


def test_an_override_that_fails_has_changed_nothing() -> None:
    class Failing(OURS.StepLR):
        def get_lr(self) -> Any:
            if self.last_epoch == 2:
                raise ZeroDivisionError
            return [0.5] * (1 if self.last_epoch == 3 else 2)

    side = Side(Failing, "StepLR")
    side.run(1)
    before = numbers(side.opt)
    with pytest.raises(ZeroDivisionError):
        side.scheduler.step()
    assert (numbers(side.opt), side.scheduler.last_epoch) == (before, 1)
    side.scheduler.last_epoch = 2
    with pytest.raises(ValueError, match="Failing has 1 learning rates for 2 param groups"):
        side.scheduler.step()
    assert numbers(side.opt) == before


def test_metaclasses_and_attributes_of_others() -> None:
    import abc

    class Abstract(abc.ABC):
        @abc.abstractmethod
        def more(self) -> int: ...

    class Both(OURS.StepLR, Abstract):
        def more(self) -> int:
            return 1

    side = Side(Both, "StepLR")
    assert lrs_of(side.run(3)) == lrs_of(Side(OURS.StepLR, "StepLR").run(3))


def lrs_of(rows: list[list[float]]) -> list[float]:
    return [row[0] for row in rows]


# Made again with last_epoch: a lr that somebody has set stays.

RECURSIVE = (
    "StepLR",
    "MultiStepLR",
    "ConstantLR",
    "LinearLR",
    "ExponentialLR",
    "PolynomialLR",
    "CosineAnnealingLR",
)
RECURSIVE += ("MultiplicativeLR", "SWALR")
TENSORS = pytest.mark.parametrize(
    "tensor", [None, torch.float64, torch.float32], ids=["float", "tensor", "float32"]
)


def set_lrs(opt: torch.optim.Optimizer, lrs: list[float]) -> None:
    for group, lr in zip(opt.param_groups, lrs, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def close(one: list[float], other: list[float], tensor: Any) -> bool:
    return one == pytest.approx(other, rel=1e-5 if tensor == torch.float32 else 1e-12)


@ALL
@TENSORS
@LIBRARIES
@pytest.mark.parametrize("last", [0, 1, 2, 3, 4, 5, 7, 8])
def test_a_lr_that_was_set_stays(name: str, tensor: Any, optimizers: Any, last: int) -> None:
    """The whole run has it changed after its last step; what is made again goes on as that does."""
    whole = Side(getattr(OURS, name), name, optimizers, tensor)
    whole.run(last + 1)
    set_lrs(whole.opt, [0.017, 0.0231])
    opt = make_optimizer(optimizers, tensor)
    opt.load_state_dict(whole.opt.state_dict())
    again = getattr(OURS, name)(opt, **BASES[name], last_epoch=last)
    assert close(lrs(opt), [0.017, 0.0231], tensor)
    assert again.last_epoch == last + 1
    if name == "SWALR":
        return  # which begins to anneal from there
    for _ in range(6):
        for o, s in ((whole.opt, whole.scheduler), (opt, again)):
            o.step()
            s.step()
        assert close(lrs(opt), lrs(whole.opt), tensor)


@pytest.mark.parametrize("name", RECURSIVE)
@LIBRARIES
@pytest.mark.parametrize("last", [0, 1, 2, 3, 4, 5, 7, 8])
def test_from_a_lr_that_was_set_torchs_recursion_goes_on(
    name: str, optimizers: Any, last: int
) -> None:
    rows: list[list[list[float]]] = []
    for library in (OURS, TORCHS):
        opt = make_optimizer(optimizers)
        for group in opt.param_groups:
            group["initial_lr"] = group["lr"] * 3
        scheduler = getattr(library, name)(opt, **BASES[name], last_epoch=last)
        set_lrs(opt, [0.1, 0.2])  # where torch's goes down twice
        rows.append([lrs(opt)])
        for _ in range(8):
            opt.step()
            scheduler.step()
            rows[-1].append(lrs(opt))
    for ours, theirs in zip(*rows, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12), (name, last)


@ALL
@TENSORS
@LIBRARIES
@pytest.mark.parametrize("found", ["fresh", "this step", "last step", "torch's"])
@pytest.mark.parametrize("last", slow_but([0, 2, 5], [0, 1, 2, 4, 5, 8]))
def test_the_formula_goes_on(
    name: str, tensor: Any, optimizers: Any, found: str, last: int
) -> None:
    library = TORCHS if found == "torch's" else OURS
    whole = Side(getattr(library, name), name, optimizers, tensor)
    whole.run(last + 1 if found != "last step" else last)
    opt = make_optimizer(optimizers, tensor)
    opt.load_state_dict(whole.opt.state_dict())
    if found == "last step":
        whole.opt.step()
        whole.scheduler.step()
    if found == "fresh":
        set_lrs(opt, [float(group["initial_lr"]) for group in opt.param_groups])
    again = getattr(OURS, name)(opt, **BASES[name], last_epoch=last)
    for _ in range(6):
        assert close(lrs(opt), lrs(whole.opt), tensor), (name, last)
        for o, s in ((whole.opt, whole.scheduler), (opt, again)):
            o.step()
            s.step()


def test_the_checkpoint_of_a_run_that_was_slowed_by_hand() -> None:
    opt = make_optimizer(onepass, groups=1)
    scheduler = OURS.ExponentialLR(opt, 0.5)
    for _ in range(2):
        opt.step()
        scheduler.step()
    opt.param_groups[0]["lr"] *= 0.1
    other = make_optimizer(onepass, groups=1)
    other.load_state_dict(opt.state_dict())
    again = OURS.ExponentialLR(other, 0.5, last_epoch=scheduler.last_epoch - 1)
    assert lrs(other) == pytest.approx([0.0025])
    other.step()
    again.step()
    assert lrs(other) == pytest.approx([0.00125])


def test_one_group_set_and_another_not() -> None:
    whole = Side(OURS.CosineAnnealingLR, "CosineAnnealingLR")
    whole.run(3)
    set_lrs(whole.opt, [0.05, lrs(whole.opt)[1]])
    opt = make_optimizer(torch.optim)
    opt.load_state_dict(whole.opt.state_dict())
    again = OURS.CosineAnnealingLR(opt, **BASES["CosineAnnealingLR"], last_epoch=2)
    for _ in range(9):
        assert lrs(opt) == pytest.approx(lrs(whole.opt), rel=1e-12)
        for o, s in ((whole.opt, whole.scheduler), (opt, again)):
            o.step()
            s.step()


@pytest.mark.parametrize("epochs", [3, 20])
@pytest.mark.parametrize("strategy", ["cos", "linear"])
def test_averaging_that_begins_in_mid_run(epochs: int, strategy: str) -> None:
    """A callback puts the last lr as initial_lr, and the number of epochs as last_epoch."""
    rows: list[list[list[float]]] = []
    for library in (OURS, TORCHS):
        opt = make_optimizer(torch.optim)
        first = library.StepLR(opt, 2, 0.5)
        for _ in range(3):
            opt.step()
            first.step()
        for group in opt.param_groups:
            group["initial_lr"] = 0.01
        swa = library.SWALR(
            opt, [0.01, 0.01], anneal_epochs=5, anneal_strategy=strategy, last_epoch=epochs
        )
        rows.append([lrs(opt)])
        for t in range(8):
            if t == 3:
                again = library.SWALR(make_optimizer(torch.optim), [0.01, 0.01], 5, strategy)
                again.load_state_dict(swa.state_dict())
                again.optimizer = opt
                swa = again
            opt.step()
            swa.step()
            rows[-1].append(lrs(opt))
    assert_same(rows[0], rows[1], (epochs, strategy))
    assert rows[0][0] == [0.05, 0.1]


@pytest.mark.parametrize("last", [0, 1, 3, 5, 8])
@pytest.mark.parametrize(
    "names",
    [("LinearLR", "CosineAnnealingLR"), ("StepLR", "ExponentialLR"), ("ConstantLR", "LambdaLR")],
)
def test_sequences_keep_what_was_set(names: tuple[str, str], last: int) -> None:
    def make(opt: Any, last: int = -1) -> Any:
        return OURS.SequentialLR(
            opt, [getattr(OURS, name)(opt, **BASES[name]) for name in names], [4], last_epoch=last
        )

    for values in (None, [0.017, 0.0231]):
        opt = make_optimizer(torch.optim)
        whole = make(opt)
        for _ in range(last + 1):
            opt.step()
            whole.step()
        set_lrs(opt, values or lrs(opt))
        other = make_optimizer(torch.optim)
        other.load_state_dict(opt.state_dict())
        again = make(other, last)
        for _ in range(8):
            assert lrs(other) == pytest.approx(lrs(opt), rel=1e-12), (names, last, values)
            for o, s in ((opt, whole), (other, again)):
                o.step()
                s.step()


# At the start: the lr that stands there, and the initial_lr that somebody has put there.


@ALL
@TENSORS
@LIBRARIES
def test_a_start_from_another_lr_than_the_initial_one(
    name: str, tensor: Any, optimizers: Any
) -> None:
    rows: list[list[list[float]]] = []
    for library in (OURS, TORCHS):
        opt = make_optimizer(optimizers, tensor)
        for group in opt.param_groups:
            group["initial_lr"] = group["lr"] * 3
        scheduler = getattr(library, name)(opt, **BASES[name])
        rows.append([numbers(opt)])
        for _ in range(7):
            opt.step()
            scheduler.step()
            rows[-1].append(numbers(opt))
    for ours, theirs in zip(*rows, strict=True):
        assert ours == pytest.approx(
            theirs, rel=1e-5 if tensor == torch.float32 else 1e-9, abs=1e-12
        ), name


@ALL
@pytest.mark.parametrize("first", ["StepLR", "LinearLR", "CyclicLR"])
def test_a_second_scheduler_in_mid_run(name: str, first: str) -> None:
    rows: list[list[list[float]]] = []
    for library in (OURS, TORCHS):
        opt = make_optimizer(torch.optim)
        for kind in (first, name):
            scheduler = getattr(library, kind)(opt, **BASES[kind])
            rows.append([numbers(opt)])
            for _ in range(5):
                opt.step()
                scheduler.step()
                rows[-1].append(numbers(opt))
    for ours, theirs in zip(rows[0] + rows[1], rows[2] + rows[3], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12), name


# Numbers that are none.

BAD: list[Any] = ["0.1", None, [0.1, "x"], {"a": 1}, b"1", object(), 1j, torch.ones(3)]
NUMBERS: dict[str, tuple[str, ...]] = {
    "StepLR": ("step_size", "gamma"),
    "MultiStepLR": ("gamma",),
    "ConstantLR": ("factor", "total_iters"),
    "LinearLR": ("start_factor", "end_factor", "total_iters"),
    "ExponentialLR": ("gamma",),
    "PolynomialLR": ("total_iters", "power"),
    "CosineAnnealingLR": ("T_max", "eta_min"),
    "CosineAnnealingWarmRestarts": ("T_0", "T_mult", "eta_min"),
    "SWALR": ("swa_lr", "anneal_epochs"),
    "CyclicLR": ("base_lr", "max_lr", "step_size_up", "gamma", "base_momentum", "max_momentum"),
    "OneCycleLR": (
        "max_lr",
        "pct_start",
        "base_momentum",
        "max_momentum",
        "div_factor",
        "final_div_factor",
    ),
    "MultiplicativeLR": (),
    "LambdaLR": (),
}
TABLE = [(name, argument) for name in NUMBERS for argument in (*NUMBERS[name], "last_epoch")]
TABLE += [(name, "lr_lambda") for name in ("LambdaLR", "MultiplicativeLR")]
TABLE += [
    ("MultiStepLR", "milestones"),
    ("CyclicLR", "step_size_down"),
    ("CyclicLR", "scale_fn"),
    ("CyclicLR", "mode"),
]
TABLE += [("OneCycleLR", argument) for argument in ("total_steps", "anneal_strategy")]
TABLE += [("SWALR", "anneal_strategy")]
TABLE += [
    ("ReduceLROnPlateau", argument)
    for argument in (
        "mode",
        "factor",
        "patience",
        "threshold",
        "threshold_mode",
        "cooldown",
        "min_lr",
        "eps",
    )
]
NONE_IS_VALID = {"step_size_down", "scale_fn", "total_steps"}


def call(library: Any, name: str, options: dict[str, Any]) -> torch.optim.Optimizer:
    opt = make_optimizer(torch.optim)
    before = repr([{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups])
    try:
        getattr(library, name)(opt, **BASES.get(name, {}) | options)
    except Exception:
        if library is OURS:
            assert (
                repr(
                    [
                        {k: v for k, v in group.items() if k != "params"}
                        for group in opt.param_groups
                    ]
                )
                == before
            )
        raise
    return opt


@pytest.mark.parametrize("value", BAD, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(("name", "argument"), TABLE)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_not_a_number(name: str, argument: str, value: Any) -> None:
    if (value is None and argument in NONE_IS_VALID) or (
        argument == "milestones" and isinstance(value, torch.Tensor)
    ):
        return
    try:
        call(TORCHS, name, {argument: value})
        error: type[Exception] = TypeError
    except (TypeError, ValueError) as caught:
        error = type(caught)
    except Exception:
        error = TypeError
    with pytest.raises((error, TypeError, ValueError)) as caught:
        call(OURS, name, {argument: value})
    message = str(caught.value)
    assert "\n" not in message
    assert argument in message or argument in ("mode", "threshold_mode", "lr_lambda"), message
    assert "unsupported operand" not in message
    assert "not supported between" not in message
    if not isinstance(value, (torch.Tensor, list)) and argument != "pct_start":
        assert caught.type is error, message


GOOD: list[Any] = [
    np.float64(0.5),
    np.float32(0.5),
    np.int64(1),
    1,
    True,
    torch.tensor(0.5),
    np.array(0.5),
]


@pytest.mark.parametrize("value", GOOD, ids=lambda value: f"{type(value).__name__} {value}")
@pytest.mark.parametrize(("name", "argument"), TABLE)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_torch_takes_is_taken(name: str, argument: str, value: Any) -> None:
    try:
        theirs = call(TORCHS, name, {argument: value})
    except Exception:
        return
    if (name, argument) == ("MultiStepLR", "milestones"):
        return  # a number is none
    assert numbers(call(OURS, name, {argument: value})) == pytest.approx(numbers(theirs), rel=1e-6)


@pytest.mark.parametrize(
    "milestones", [(2, 4), np.array([2, 4]), iter([2, 4]), {2: 1, 4: 1}.keys(), [2.0, 4.0]]
)
def test_milestones_of_all_kinds(milestones: Any) -> None:
    opt = make_optimizer(torch.optim, groups=1)
    scheduler = OURS.MultiStepLR(opt, milestones, 0.5)
    for _ in range(5):
        opt.step()
        scheduler.step()
    assert lrs(opt) == [0.025]


def test_momentum_is_not_asked_for_where_it_is_not_moved() -> None:
    for library in (OURS, TORCHS):
        for options in ({"base_momentum": None}, {"base_momentum": [0.8]}, {"max_momentum": "x"}):
            opt = call(library, "CyclicLR", {"cycle_momentum": False, **options})
            assert "max_momentum" not in opt.param_groups[0]


SEQUENCES: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "milestones": (
        lambda m, o: m.SequentialLR(o, [m.StepLR(o, 2)] * 2, ["3"]),
        "milestones must be a list of steps",
    ),
    "no milestones": (
        lambda m, o: m.SequentialLR(o, [m.StepLR(o, 2)], None),
        "milestones must be a list of steps",
    ),
    "number": (
        lambda m, o: m.SequentialLR(o, [m.StepLR(o, 2)] * 2, 3),
        "milestones must be a list of steps",
    ),
    "schedulers": (
        lambda m, o: m.SequentialLR(o, None, [3]),
        "schedulers must be a list of schedulers",
    ),
    "scheduler": (
        lambda m, o: m.SequentialLR(o, m.StepLR(o, 2), []),
        "schedulers must be a list of schedulers",
    ),
    "chain": (
        lambda m, o: m.ChainedScheduler(m.StepLR(o, 2)),
        "schedulers must be a list of schedulers",
    ),
    "no chain": (lambda m, o: m.ChainedScheduler(None), "schedulers must be a list of schedulers"),
    "member": (lambda m, o: m.ChainedScheduler(["a"]), "at index 0 is not a scheduler"),
    "last_epoch": (
        lambda m, o: m.SequentialLR(o, [m.StepLR(o, 2)], [], "3"),
        "last_epoch must be a number",
    ),
    "schedules": (lambda m, o: onepass.Scheduler(o, BAD[2]), "schedules must be a dict"),
    "step": (
        lambda m, o: onepass.Scheduler(o, {"lr": waves}, BAD[1]),
        "last_epoch must be a number",
    ),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_what_is_no_list(name: str) -> None:
    make, message = SEQUENCES[name]
    with pytest.raises(TypeError, match=message) as caught:
        make(OURS, make_optimizer(torch.optim))
    assert "\n" not in str(caught.value)


def test_a_sequence_of_no_optimizer() -> None:
    for library in (OURS, TORCHS):
        opt = make_optimizer(torch.optim)
        with pytest.raises(ValueError, match="optimizer"):
            library.SequentialLR(None, [library.StepLR(opt, 2)], [])
