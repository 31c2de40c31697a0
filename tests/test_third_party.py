"""Classes as public code writes them on torch's: on torch.optim and on onepass they must end up in
the same place.

Each is a function of the library, which returns what builds an optimizer of parameters, or a
scheduler of an optimizer. All go through the same drives: steps, checkpoints, copies, pickles, a
scheduler, a gradient scaler, bad arguments.
"""

from __future__ import annotations

import abc
import contextlib
import copy
import dataclasses
import functools
import io
import math
import pickle
from bisect import bisect_right
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import required
from torch.optim.sgd import sgd

import onepass

pytestmark = pytest.mark.filterwarnings("ignore:.*steps by torch.optim's slower code.*")

SHAPES = ((4, 3), (5,), (2, 3, 2))
NEW_SHAPE = (3,)
# What public code looks for in torch's messages.
PHRASES = (
    "should be an iterable of Tensors or dicts",
    "optimizer got an empty parameter list",
    "optimizer can only optimize Tensors",
    "can't optimize a non-leaf Tensor",
    "ordered collections",
    "appear in more than one parameter group",
    "different number of parameter groups",
    "match the size of optimizer's group",
    "didn't specify a value of required optimization parameter",
    "has no attribute",
)
T = TypeVar("T")


def make_params() -> list[nn.Parameter]:
    counts = [math.prod(shape) for shape in SHAPES]
    return [
        nn.Parameter(torch.linspace(-1, 1.5, count, dtype=torch.float64).view(shape).clone())
        for count, shape in zip(counts, SHAPES, strict=True)
    ]


def params_of(opt: Any) -> list[nn.Parameter]:
    """The parameters that are trained: those in the groups, unless the class says which."""
    if hasattr(type(opt), "trained"):
        return opt.trained()
    return [p for group in opt.param_groups for p in group["params"]]


def loss_of(opt: Any, t: int) -> Tensor:
    """Another function of the parameters in each step; in one of them, one parameter has no
    gradient."""
    total = torch.zeros((), dtype=torch.float64)
    for i, p in enumerate(params_of(opt)):
        if (t, i) != (1, 1):
            total = total + ((p - 0.3 * i) ** 2).sum() + (p * (0.7 + t % 3)).sin().sum()
    return total


# How a step is taken.

Drive = Callable[[Any, int], Any]


def backward(opt: Any, t: int) -> Any:
    opt.zero_grad()
    loss_of(opt, t).backward()
    return opt.step()


def closure_of(opt: Any, t: int) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_of(opt, t)
        loss.backward()
        return loss

    return closure


def with_closure(opt: Any, t: int) -> Any:
    return opt.step(closure_of(opt, t))


class Case(NamedTuple):
    make: Callable[[Any], Callable[..., Any]]
    drive: Drive
    resumes: bool  # whether what it saves is all that it needs
    fails: dict[str, type[BaseException]]  # the properties that torch does not have, and its error


OPTIMIZERS: dict[str, Case] = {}
# Torch's optimizers copy and pickle nothing but groups and state: what a class puts beside is lost.
FORGETS: dict[str, Any] = {"copied": AttributeError, "pickled": AttributeError}
# They are no optimizers to torch.
FOREIGN: dict[str, Any] = {"scheduled": TypeError}


def case(
    drive: Drive = backward, resumes: bool = True, **fails: type[BaseException]
) -> Callable[[Any], Any]:
    def register(make: Any) -> Any:
        OPTIMIZERS[make.__name__] = Case(make, drive, resumes, fails)
        return make

    return register


def two_groups(params: Any) -> list[dict[str, Any]]:
    return [{"params": params[:1], "lr": 0.05}, {"params": params[1:]}]


# Optimizers around optimizers.


@case(**FORGETS)
def lookahead(optim: Any) -> Any:
    """Slow and fast weights: takes over the groups of another optimizer, and never calls the base's
    constructor."""

    class Lookahead(optim.Optimizer):
        def __init__(self, base: Any, alpha: float = 0.5, k: int = 2) -> None:
            own = {"lookahead_alpha": alpha, "lookahead_k": k, "lookahead_count": 0}
            self._base = base
            self.param_groups = base.param_groups
            self.defaults = base.defaults
            self.defaults.update(own)
            self.state = defaultdict(dict)
            for group in self.param_groups:
                for key, value in own.items():
                    group.setdefault(key, value)

        def step(self, closure: Any = None) -> Any:
            loss = self._base.step(closure)
            for group in self.param_groups:
                group["lookahead_count"] += 1
                if group["lookahead_count"] % group["lookahead_k"]:
                    continue
                for p in group["params"]:
                    slow = self._base.state[p].setdefault("slow", p.detach().clone())
                    slow.add_(p.detach() - slow, alpha=group["lookahead_alpha"])
                    p.data.copy_(slow)
            return loss

        def zero_grad(self, set_to_none: bool = True) -> None:
            self._base.zero_grad(set_to_none)

        def add_param_group(self, param_group: dict[str, Any]) -> None:
            self._base.add_param_group(param_group)

        def state_dict(self) -> Any:
            return self._base.state_dict()

        def load_state_dict(self, state_dict: Any) -> None:
            self._base.load_state_dict(state_dict)
            self.param_groups = self._base.param_groups

    return lambda params: Lookahead(optim.Adam(two_groups(params), lr=0.02))


@case(**FORGETS)
def lookahead_with_two_states(optim: Any) -> Any:
    """Slow weights in the wrapper's own state, which its state dict puts beside the inner one's."""

    class Lookahead(optim.Optimizer):
        def __init__(self, base: Any, alpha: float = 0.5, k: int = 2) -> None:
            super().__init__(base.param_groups, {"alpha": alpha, "k": k, "count": 0})
            self.base = base

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            loss = self.base.step(closure)
            for group in self.param_groups:
                group["count"] += 1
                for p in group["params"]:
                    slow = self.state[p]
                    if "slow" not in slow:
                        slow["slow"] = torch.empty_like(p).copy_(p)
                    if group["count"] % group["k"] == 0:
                        slow["slow"].lerp_(p, group["alpha"])
                        p.copy_(slow["slow"])
            return loss

        def state_dict(self) -> Any:
            fast, slow = self.base.state_dict(), super().state_dict()
            return {
                "state": fast["state"],
                "slow_state": slow["state"],
                "param_groups": fast["param_groups"],
            }

        def load_state_dict(self, state_dict: Any) -> None:
            fast = {"state": state_dict["state"], "param_groups": state_dict["param_groups"]}
            self.base.load_state_dict(fast)
            super().load_state_dict(
                {"state": state_dict["slow_state"], "param_groups": state_dict["param_groups"]}
            )
            self.param_groups = self.base.param_groups

        def add_param_group(self, param_group: dict[str, Any]) -> None:
            super().add_param_group(param_group)
            if hasattr(self, "base"):
                self.base.add_param_group(param_group)

    return lambda params: Lookahead(optim.AdamW(two_groups(params), lr=0.02))


@case()
def hooks_by_hand(optim: Any) -> Any:
    """A wrapper that skips the constructor, and makes the attributes that its author once found
    missing."""

    class Wrapper(optim.Optimizer):
        def __init__(self, inner: Any) -> None:
            self.inner, self.defaults = inner, inner.defaults
            self.param_groups, self.state = inner.param_groups, inner.state
            self._optimizer_step_pre_hooks = OrderedDict()
            self._optimizer_step_post_hooks = OrderedDict()
            self._optimizer_state_dict_pre_hooks = OrderedDict()
            self._optimizer_state_dict_post_hooks = OrderedDict()
            self._optimizer_load_state_dict_pre_hooks = OrderedDict()
            self._optimizer_load_state_dict_post_hooks = OrderedDict()

        def step(self, closure: Any = None) -> Any:
            return self.inner.step(closure)

        def add_param_group(self, param_group: dict[str, Any]) -> None:
            self.inner.add_param_group(param_group)

        def __getstate__(self) -> Any:
            return self.__dict__

        def __setstate__(self, state: Any) -> None:
            self.__dict__.update(state)
            if "inner" in state:
                return
            self.inner.state, self.inner.param_groups = state["state"], state["param_groups"]

    return lambda params: Wrapper(optim.SGD(two_groups(params), lr=0.02, momentum=0.9))


@case(with_closure, resumes=False, **FORGETS)
def sharpness_aware(optim: Any) -> Any:
    """Climbs, asks the closure again, and puts the old memory back; the inner optimizer is made of
    its own groups."""

    class SAM(optim.Optimizer):
        def __init__(self, params: Any, base: Any, rho: float = 0.05, **options: Any) -> None:
            if rho < 0:
                raise ValueError(f"rho must not be negative: {rho}")
            super().__init__(params, {"rho": rho, "adaptive": False, **options})
            self.base_optimizer = base(self.param_groups, **options)
            self.param_groups = self.base_optimizer.param_groups
            self.defaults.update(self.base_optimizer.defaults)

        @torch.no_grad()
        def first_step(self, zero_grad: bool = False) -> None:
            grads = [
                p.grad.norm()
                for group in self.param_groups
                for p in group["params"]
                if p.grad is not None
            ]
            norm = torch.stack(grads).norm()
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        self.state[p]["old_p"] = p.data.clone()
                        p.add_(p.grad * (group["rho"] / (norm + 1e-12)))
            if zero_grad:
                self.zero_grad()

        @torch.no_grad()
        def second_step(self, zero_grad: bool = False) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.data = self.state[p]["old_p"]
            self.base_optimizer.step()
            if zero_grad:
                self.zero_grad()

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            closure = torch.enable_grad()(closure)
            loss = closure()
            self.first_step(zero_grad=True)
            closure()
            self.second_step()
            return loss

        def load_state_dict(self, state_dict: Any) -> None:
            super().load_state_dict(state_dict)
            self.base_optimizer.param_groups = self.param_groups

    return lambda params: SAM(two_groups(params), optim.SGD, lr=0.1, momentum=0.9)


def first_and_second(opt: Any, t: int) -> Any:
    loss = loss_of(opt, t)
    loss.backward()
    opt.first_step(zero_grad=True)
    loss_of(opt, t).backward()
    opt.second_step(zero_grad=True)
    return loss.detach()


@case(first_and_second, **FORGETS)
def sharpness_aware_by_hand(optim: Any) -> Any:
    """The two halves of a step called by the training loop; `step` itself is never called, and only
    refuses."""

    class SAM(optim.Optimizer):
        def __init__(self, params: Any, base: Any, rho: float = 0.1) -> None:
            self.base_optimizer = base
            super().__init__(params, {"rho": rho})
            self.param_groups, self.state = base.param_groups, base.state
            for group in self.param_groups:
                group["rho"] = rho

        def add_param_group(self, param_group: Any) -> None:
            taken = self.param_groups is self.base_optimizer.param_groups
            (self.base_optimizer if taken else super()).add_param_group(param_group | {"rho": 0.1})

        @torch.no_grad()
        def first_step(self, zero_grad: bool = False) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        self.state[p]["e_w"] = p.grad.sign() * group["rho"]
                        p.add_(self.state[p]["e_w"])
            if zero_grad:
                self.zero_grad()

        @torch.no_grad()
        def second_step(self, zero_grad: bool = False) -> None:
            for p in params_of(self):
                if p.grad is not None:
                    p.sub_(self.state[p].pop("e_w"))
            self.base_optimizer.step()
            self._opt_called = True
            if zero_grad:
                self.zero_grad()

        def step(self, closure: Any = None) -> Any:
            raise NotImplementedError("call first_step and second_step")

        def load_state_dict(self, state_dict: Any) -> None:
            self.base_optimizer.load_state_dict(state_dict)
            self.param_groups, self.state = (
                self.base_optimizer.param_groups,
                self.base_optimizer.state,
            )

    def build(params: Any) -> Any:
        return SAM(params, optim.RMSprop(params, lr=0.01))

    return build


@case()
def delegating_properties(optim: Any) -> Any:
    """Privacy engines: `state`, `param_groups` and `defaults` are properties that lead to the
    optimizer within."""

    class Private(optim.Optimizer):
        def __init__(self, original: Any, max_norm: float) -> None:
            self.original, self.max_norm = original, max_norm

        state = property(
            lambda self: self.original.state,
            lambda self, value: setattr(self.original, "state", value),
        )
        defaults = property(lambda self: self.original.defaults)

        @property
        def param_groups(self) -> Any:
            return self.original.param_groups

        @param_groups.setter
        def param_groups(self, groups: Any) -> None:
            self.original.param_groups = groups

        def step(self, closure: Any = None) -> Any:
            for p in params_of(self):
                if p.grad is not None:
                    p.grad = p.grad * min(1.0, self.max_norm / float(p.grad.norm() + 1e-6))
            return self.original.step(closure)

        def zero_grad(self, set_to_none: bool = False) -> None:
            self.original.zero_grad(set_to_none)

        def add_param_group(self, param_group: Any) -> None:
            self.original.add_param_group(param_group)

        def __getstate__(self) -> Any:
            return self.__dict__

        def __setstate__(self, state: Any) -> None:
            self.__dict__.update(state)

        def __repr__(self) -> str:
            return f"Private({self.original!r})"

        def state_dict(self) -> Any:
            return self.original.state_dict()

        def load_state_dict(self, state_dict: Any) -> None:
            self.original.load_state_dict(state_dict)

    return lambda params: Private(optim.Adam(two_groups(params), lr=0.02), 0.5)


@case()
def adaptive_rate_control(optim: Any) -> Any:
    """Layer-wise rates around any optimizer: the weight decay is set to 0 during the inner step,
    and put back."""

    class LARC:
        def __init__(self, inner: Any, trust: float = 0.02) -> None:
            self.optim, self.trust = inner, trust

        def __getstate__(self) -> Any:
            return self.__dict__

        def __setstate__(self, state: Any) -> None:
            self.__dict__.update(state)

        @property
        def state(self) -> Any:
            return self.optim.state

        @property
        def param_groups(self) -> Any:
            return self.optim.param_groups

        def __repr__(self) -> str:
            return repr(self.optim)

        def __getattr__(self, name: str) -> Any:
            if name in ("state_dict", "load_state_dict", "zero_grad", "add_param_group"):
                return getattr(self.optim, name)
            raise AttributeError(name)

        @torch.no_grad()
        def step(self) -> None:
            decays = []
            for group in self.optim.param_groups:
                decay = group["weight_decay"]
                decays.append(decay)
                group["weight_decay"] = 0
                for p in group["params"]:
                    if p.grad is not None:
                        rate = self.trust * p.norm() / (p.grad.norm() + p.norm() * decay + 1e-8)
                        p.grad += decay * p
                        p.grad *= min(float(rate) / group["lr"], 1)
            self.optim.step()
            for group, decay in zip(self.optim.param_groups, decays, strict=True):
                group["weight_decay"] = decay

    return lambda params: LARC(
        optim.SGD(two_groups(params), lr=0.1, momentum=0.9, weight_decay=0.1)
    )


OPTIMIZERS["adaptive_rate_control"].fails.update(FOREIGN)


@case(**FOREIGN)
def delegating_attributes(optim: Any) -> Any:
    """A plain object that hands on all that it does not know."""

    class Wrapper:
        def __init__(self, optimizer: Any) -> None:
            self.__dict__.update(optimizer=optimizer, steps=0)

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__") or "optimizer" not in self.__dict__:
                raise AttributeError(name)
            return getattr(self.__dict__["optimizer"], name)

        def __setattr__(self, name: str, value: Any) -> None:
            target = self.__dict__ if name in self.__dict__ else self.optimizer.__dict__
            target[name] = value

        def step(self, *args: Any, **options: Any) -> Any:
            self.steps += 1
            return self.optimizer.step(*args, **options)

        def __repr__(self) -> str:
            return f"{self.optimizer!r} after {self.steps}"

    return lambda params: Wrapper(optim.Adamax(two_groups(params), lr=0.02))


def of_a_schedule(opt: Any, t: int) -> Any:
    opt.zero_grad()
    loss_of(opt, t).backward()
    return opt.step_and_update_lr()


@case(of_a_schedule, **FOREIGN)
def inverse_square_root(optim: Any) -> Any:
    """The optimizer and its schedule in one object, as in code for translation models."""

    class ScheduledOptim:
        def __init__(self, optimizer: Any, width: int, warmup: int) -> None:
            self._optimizer, self.width, self.warmup, self.steps = optimizer, width, warmup, 0

        def rate(self) -> float:
            return self.width**-0.5 * min(self.steps**-0.5, self.steps * self.warmup**-1.5)

        def step_and_update_lr(self) -> Any:
            self.steps += 1
            for group in self._optimizer.param_groups:
                group["lr"] = self.rate()
            return self._optimizer.step()

        step = step_and_update_lr

        def zero_grad(self) -> None:
            self._optimizer.zero_grad()

        @property
        def param_groups(self) -> Any:
            return self._optimizer.param_groups

        def add_param_group(self, group: Any) -> None:
            self._optimizer.add_param_group(group)

        def state_dict(self) -> Any:
            kept = {key: value for key, value in self.__dict__.items() if key != "_optimizer"}
            return {**kept, "optimizer": self._optimizer.state_dict()}

        def load_state_dict(self, state_dict: Any) -> None:
            state_dict = dict(state_dict)
            self._optimizer.load_state_dict(state_dict.pop("optimizer"))
            self.__dict__.update(state_dict)

        def __repr__(self) -> str:
            return repr(self._optimizer)

    return lambda params: ScheduledOptim(
        optim.Adam(params, lr=0, betas=(0.9, 0.98), eps=1e-9), 64, 3
    )


@case(**FOREIGN)
def several_in_one(optim: Any) -> Any:
    """A list of optimizers with the methods of one, each for some of the parameters."""

    class MultipleOptimizer:
        def __init__(self, *optimizers: Any) -> None:
            self.optimizers = optimizers

        @property
        def param_groups(self) -> Any:
            return [group for optimizer in self.optimizers for group in optimizer.param_groups]

        def zero_grad(self, set_to_none: bool = True) -> None:
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=set_to_none)

        def step(self) -> None:
            for optimizer in self.optimizers:
                optimizer.step()

        def add_param_group(self, group: Any) -> None:
            self.optimizers[-1].add_param_group(group)

        def state_dict(self) -> Any:
            return [optimizer.state_dict() for optimizer in self.optimizers]

        def load_state_dict(self, state_dicts: Any) -> None:
            for optimizer, state_dict in zip(self.optimizers, state_dicts, strict=True):
                optimizer.load_state_dict(state_dict)

        def __repr__(self) -> str:
            return "\n".join(map(repr, self.optimizers))

    return lambda params: MultipleOptimizer(
        optim.SGD(params[:1], lr=0.1, momentum=0.8, nesterov=True),
        optim.Adagrad(params[1:], lr=0.1),
    )


@case()
def several_as_a_subclass(optim: Any) -> Any:
    """Two optimizers behind one that was made by `__new__` and an empty group; its step is wrapped
    by hand."""

    class Dual(optim.Optimizer):
        def __init__(self, first: Any, second: Any) -> None:
            optim.Optimizer.__init__(self, [{"params": []}], {})
            self.optimizers = [first, second]
            self.refresh()

        def refresh(self) -> None:
            self.param_groups = [
                group for optimizer in self.optimizers for group in optimizer.param_groups
            ]

        def __iter__(self) -> Iterator[Any]:
            return iter(self.optimizers)

        def __len__(self) -> int:
            return len(self.optimizers)

        @optim.Optimizer.profile_hook_step
        def step(self, *args: Any, **options: Any) -> None:
            for optimizer in self.optimizers:
                optimizer.step(*args, **options)

        def state_dict(self) -> Any:
            return {str(i): optimizer.state_dict() for i, optimizer in enumerate(self)}

        def load_state_dict(self, state_dict: Any) -> None:
            for i, optimizer in enumerate(self):
                optimizer.load_state_dict(state_dict[str(i)])
            self.refresh()

        def add_param_group(self, param_group: Any) -> None:
            if "optimizers" not in vars(self):
                return super().add_param_group(param_group)
            self.optimizers[1].add_param_group(param_group)
            return self.refresh()

        def __getstate__(self) -> Any:
            return {**super().__getstate__(), "optimizers": self.optimizers}

        def __setstate__(self, state: Any) -> None:
            super().__setstate__(state)
            self.refresh()

    return lambda params: Dual(
        optim.AdamW(params[:1], lr=0.05), optim.RMSprop(params[1:], lr=0.01, momentum=0.5)
    )


@case(**FORGETS, scaled=AssertionError)
def master_weights(optim: Any) -> Any:
    """Mixed precision before autocast: steps copies in a wider type, and copies them back to the
    model's weights."""

    class Master(optim.AdamW):
        def __init__(self, params: Any, **options: Any) -> None:
            self.model_params = list(params)
            masters = [nn.Parameter(p.detach().double()) for p in self.model_params]
            super().__init__(masters, **options)

        def trained(self) -> Any:
            return self.model_params

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            masters = [p for group in self.param_groups for p in group["params"]]
            for p, master in zip(self.model_params, masters, strict=False):
                master.grad = None if p.grad is None else p.grad.double()
            loss = super().step(closure)
            for p, master in zip(self.model_params, masters, strict=False):
                p.copy_(master)
            return loss

        def zero_grad(self, set_to_none: bool = True) -> None:
            for p in self.model_params:
                p.grad = None

        def state_dict(self) -> Any:
            masters = [p.detach().clone() for group in self.param_groups for p in group["params"]]
            return {**super().state_dict(), "masters": masters}

        def load_state_dict(self, state_dict: Any) -> None:
            super().load_state_dict(
                {key: value for key, value in state_dict.items() if key != "masters"}
            )
            groups = (p for group in self.param_groups for p in group["params"])
            for p, master in zip(groups, state_dict["masters"], strict=True):
                p.data.copy_(master)

    return lambda params: Master([nn.Parameter(p.detach().float()) for p in params], lr=0.05)


@case(**FORGETS)
def average_of_weights(optim: Any) -> Any:
    """An early form of weight averaging: a wrapper with state of its own, whose state dict merges
    both."""

    class SWA(optim.Optimizer):
        def __init__(self, optimizer: Any, start: int, freq: int) -> None:
            self.optimizer, self.start, self.freq = optimizer, start, freq
            self.defaults, self.param_groups = optimizer.defaults, optimizer.param_groups
            self.state, self.opt_state = defaultdict(dict), optimizer.state
            self._optimizer_step_pre_hooks: Any = {}
            self._optimizer_step_post_hooks: Any = {}
            for group in self.param_groups:
                group["n_avg"], group["step_counter"] = 0, 0

        def step(self, closure: Any = None) -> Any:
            loss = self.optimizer.step(closure)
            for group in self.param_groups:
                group["step_counter"] += 1
                if group["step_counter"] >= self.start and group["step_counter"] % self.freq == 0:
                    for p in group["params"]:
                        buffer = self.state[p].setdefault("swa_buffer", torch.zeros_like(p.data))
                        buffer.add_((p.data - buffer) / float(group["n_avg"] + 1))
                    group["n_avg"] += 1
            return loss

        def zero_grad(self, set_to_none: bool = True) -> None:
            self.optimizer.zero_grad(set_to_none)

        def swap(self) -> None:
            for p, entry in self.state.items():
                kept = p.data.clone()
                p.data.copy_(entry["swa_buffer"])
                entry["swa_buffer"].copy_(kept)

        def add_param_group(self, param_group: Any) -> None:
            param_group["n_avg"], param_group["step_counter"] = 0, 0
            self.optimizer.add_param_group(param_group)

        def state_dict(self) -> Any:
            inner = self.optimizer.state_dict()
            params = params_of(self)
            buffers = {i: dict(self.state[p]) for i, p in enumerate(params) if p in self.state}
            return {
                "opt_state": inner["state"],
                "swa_state": buffers,
                "param_groups": inner["param_groups"],
            }

        def load_state_dict(self, state_dict: Any) -> None:
            self.optimizer.load_state_dict(
                {"state": state_dict["opt_state"], "param_groups": state_dict["param_groups"]}
            )
            self.param_groups, self.opt_state = self.optimizer.param_groups, self.optimizer.state
            self.state.update(
                {params_of(self)[i]: dict(entry) for i, entry in state_dict["swa_state"].items()}
            )

    return lambda params: SWA(optim.SGD(two_groups(params), lr=0.05, momentum=0.9), 2, 2)


@case(**FORGETS)
def grafted(optim: Any) -> Any:
    """Two optimizers on the same weights: the direction of one, the length of the other's step."""

    class Graft(optim.Optimizer):
        def __init__(self, params: Any, length: Any, direction: Any) -> None:
            super().__init__(params, {"lr": 1.0})
            self.length, self.direction = length(params_of(self)), direction(params_of(self))

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            params = params_of(self)
            before = [p.clone() for p in params]
            self.length.step()
            norms = [(p - old).norm() for p, old in zip(params, before, strict=True)]
            for p, old in zip(params, before, strict=True):
                p.copy_(old)
            self.direction.step()
            for p, old, norm in zip(params, before, norms, strict=True):
                moved = p - old
                p.copy_(old + moved * (norm / (moved.norm() + 1e-12)))

        def add_param_group(self, param_group: Any) -> None:
            super().add_param_group(param_group)
            for inner in (vars(self).get("length"), vars(self).get("direction")):
                if inner is not None:
                    inner.add_param_group({"params": param_group["params"]})

        def state_dict(self) -> Any:
            return [super().state_dict(), self.length.state_dict(), self.direction.state_dict()]

        def load_state_dict(self, state_dict: Any) -> None:
            super().load_state_dict(state_dict[0])
            self.length.load_state_dict(state_dict[1])
            self.direction.load_state_dict(state_dict[2])

    return lambda params: Graft(
        params, lambda p: optim.SGD(p, lr=0.1), lambda p: optim.Adam(p, lr=0.01)
    )


@case(**FORGETS)
def shared_state(optim: Any) -> Any:
    """Two optimizers with one dict of state, which take turns."""

    class Turns(optim.Adam):
        def __init__(self, params: Any, **options: Any) -> None:
            super().__init__(params, **options)
            self.other = optim.AdamW(
                [{"params": group["params"]} for group in self.param_groups], lr=0.01
            )
            self.other.state, self.turn = self.state, 0

        def step(self, closure: Any = None) -> Any:
            self.turn += 1
            return super().step(closure) if self.turn % 2 else self.other.step(closure)

        def load_state_dict(self, state_dict: Any) -> None:
            super().load_state_dict(state_dict)
            self.other.state, self.turn = self.state, 3

        def add_param_group(self, param_group: Any) -> None:
            super().add_param_group(param_group)
            if hasattr(self, "other"):
                self.other.add_param_group({"params": param_group["params"]})

    return lambda params: Turns(two_groups(params), lr=0.05)


# Optimizers from the base, with a step of their own.


@case()
def lamb(optim: Any) -> Any:
    """Adam with trust ratios, in the style of early large-batch code: `data`, and a count that is
    an int."""

    class Lamb(optim.Optimizer):
        def __init__(
            self,
            params: Any,
            lr: float = 1e-3,
            betas: Any = (0.9, 0.999),
            weight_decay: float = 0.01,
        ) -> None:
            if lr < 0.0:
                raise ValueError(f"Invalid learning rate: {lr}")
            super(Lamb, self).__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))  # noqa: C408, UP008

        def step(self, closure: Any = None) -> Any:
            loss = None if closure is None else closure()
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is None:
                        continue
                    grad, state = p.grad.data, self.state[p]
                    if len(state) == 0:
                        state["step"] = 0
                        state["exp_avg"], state["exp_avg_sq"] = (
                            torch.zeros_like(p.data),
                            torch.zeros_like(p.data),
                        )
                    state["step"] += 1
                    state["exp_avg"].mul_(group["betas"][0]).add_(grad, alpha=1 - group["betas"][0])
                    state["exp_avg_sq"].mul_(group["betas"][1]).addcmul_(
                        grad, grad, value=1 - group["betas"][1]
                    )
                    move = state["exp_avg"] / state["exp_avg_sq"].sqrt().add(1e-6)
                    move.add_(p.data, alpha=group["weight_decay"])
                    state["trust_ratio"] = float(p.data.norm().clamp(0, 10) / move.norm())
                    p.data.add_(move, alpha=-group["lr"] * state["trust_ratio"])
            return loss

    return lambda params: Lamb(two_groups(params), lr=0.02)


@case(with_closure)
def lion(optim: Any) -> Any:
    """Signs of a momentum, with the closure under `enable_grad` inside a step under `no_grad`."""

    class Lion(optim.Optimizer):
        def __init__(
            self, params: Any, lr: float = 1e-4, betas: Any = (0.9, 0.99), weight_decay: float = 0.0
        ) -> None:
            super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            for group in self.param_groups:
                for p in filter(lambda p: p.grad is not None, group["params"]):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                    p.add_(average.lerp(p.grad, 1 - group["betas"][0]).sign_(), alpha=-group["lr"])
                    average.lerp_(p.grad, 1 - group["betas"][1])
            return loss

    return lambda params: Lion(two_groups(params), lr=0.01, weight_decay=0.1)


@case()
def required_options(optim: Any) -> Any:
    """Old code marks the learning rate as `required`: each group must bring one, or the base
    refuses it."""

    class Old(optim.Optimizer):
        def __init__(self, params: Any, lr: Any = required, momentum: float = 0.9) -> None:
            if lr is not required and lr < 0.0:
                raise ValueError(f"Invalid learning rate: {lr}")
            super().__init__(params, {"lr": lr, "momentum": momentum})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                        p.sub_(buffer.mul_(group["momentum"]).add_(p.grad), alpha=group["lr"])

    return lambda params: Old([{"params": [p], "lr": 0.02 * (i + 1)} for i, p in enumerate(params)])


@case()
def orthogonal_and_adam(optim: Any) -> Any:
    """One class with two algorithms: matrices are made orthogonal, all else steps by Adam; a flag
    in the group says."""

    class MuonWithAdam(optim.Optimizer):
        def __init__(self, param_groups: Any) -> None:
            for group in param_groups:
                assert "use_muon" in group
                group.setdefault("momentum", 0.95) if group["use_muon"] else group.setdefault(
                    "betas", (0.9, 0.95)
                )
                group.setdefault("lr", 0.02)
            super().__init__(param_groups, {})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is None:
                        p.grad = torch.zeros_like(p)
                    state = self.state[p]
                    if group.get("use_muon"):
                        buffer = state.setdefault("momentum_buffer", torch.zeros_like(p))
                        buffer.lerp_(p.grad, 1 - group["momentum"])
                        u, _, v = torch.linalg.svd(buffer, full_matrices=False)
                        p.add_(u @ v, alpha=-group["lr"])
                        continue
                    if not state:
                        state.update(
                            exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p), step=0
                        )
                    state["step"] += 1
                    state["exp_avg"].lerp_(p.grad, 0.1)
                    state["exp_avg_sq"].lerp_(p.grad.square(), 0.05)
                    p.addcdiv_(
                        state["exp_avg"], state["exp_avg_sq"].sqrt() + 1e-8, value=-group["lr"]
                    )

    return lambda params: MuonWithAdam(
        [
            {"params": params[:1], "use_muon": True},
            {"params": params[1:], "use_muon": False, "lr": 0.01},
        ]
    )


@case()
def abstract_base(optim: Any) -> Any:
    """A house's own base, which is abstract, and one that fills it in."""

    class Base(optim.Optimizer, abc.ABC):
        def __init__(self, params: Any, lr: float, **more: Any) -> None:
            super().__init__(params, {"lr": lr, **more})

        @abc.abstractmethod
        def direction(self, p: Tensor, group: dict[str, Any]) -> Tensor: ...

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            loss = closure() if closure else None
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.add_(self.direction(p, group), alpha=-group["lr"])
            return loss

    class Normalized(Base):
        def direction(self, p: Tensor, group: dict[str, Any]) -> Tensor:
            return p.grad / (p.grad.norm() + group["eps"])  # type: ignore[operator, union-attr]

    with pytest.raises(TypeError, match="abstract"):
        Base(make_params(), 0.1)
    return lambda params: Normalized(two_groups(params), lr=0.1, eps=1e-6)


@case()
def generic(optim: Any) -> Any:
    """A generic class, made through its alias."""

    class Typed(optim.SGD, Generic[T]):
        tag: T

    return lambda params: Typed[int](two_groups(params), lr=0.1, momentum=0.9)


@case(copied=AttributeError, pickled=AttributeError, resumed=AttributeError)
def slots(optim: Any) -> Any:
    """A mixin with slots before the optimizer; loading begins in them, and finds them empty in a
    fresh one."""

    class Counts:
        __slots__ = ("count",)

    class Slotted(Counts, optim.Adam):  # type: ignore[misc]
        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=0.01)

        def step(self, closure: Any = None) -> Any:
            self.count = getattr(self, "count", 0) + 1
            return super().step(closure)

        def __setstate__(self, state: Any) -> None:
            super().__setstate__(state)
            self.count += 1

    return Slotted


@case()
def dataclass_from_the_base(optim: Any) -> Any:
    """A dataclass, which compares by value and cannot be hashed."""

    @dataclasses.dataclass(repr=False)
    class Descent(optim.Optimizer):
        params: Any
        rate: float = 0.1
        shrink: float = 0.01

        def __post_init__(self) -> None:
            super().__init__(self.params, {"lr": self.rate, "shrink": self.shrink})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.mul_(1 - group["shrink"]).sub_(p.grad, alpha=group["lr"])

    return lambda params: Descent(two_groups(params))


@case()
def dataclass_with_options(optim: Any) -> Any:
    """A dataclass whose fields are options of Adam's, without defaults, before fields of its
    own."""

    @dataclasses.dataclass(eq=False, repr=False)
    class Configured(optim.Adam):
        given: Any
        lr: float
        weight_decay: float
        scale: float

        def __post_init__(self) -> None:
            super().__init__(self.given, lr=self.lr * self.scale, weight_decay=self.weight_decay)

    return lambda params: Configured(params, 0.1, 0.01, 0.5)


@case()
def numpy_weights(optim: Any) -> Any:
    """Steps by NumPy in the memory of the weights, with sums that are plain numbers."""

    class Numpy(optim.Optimizer):
        def __init__(self, params: Any, lr: float) -> None:
            super().__init__(params, {"lr": lr})

        def step(self, closure: Any = None) -> float:
            total = 0.0
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is None:
                        continue
                    weights, grad = p.detach().numpy(), p.grad.numpy()
                    state = self.state[p]
                    state["sum"] = state.get("sum", 0.0) + float(np.square(grad).sum())
                    weights -= group["lr"] * grad / np.sqrt(state["sum"])
                    total += state["sum"]
            return total

    return lambda params: Numpy(two_groups(params), 0.1)


@case()
def state_of_all_kinds(optim: Any) -> Any:
    """Momentum with a queue, nested lists, tuples and a word for the whole optimizer in its
    state."""

    class History(optim.Optimizer):
        def __init__(self, params: Any, lr: float) -> None:
            super().__init__(params, {"lr": lr, "history": [1, 2], "name": "history"})
            self.state["shared"] = {"calls": 0, "norms": deque()}

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            shared = self.state["shared"]
            shared["calls"] += 1
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is None:
                        continue
                    state = self.state[p]
                    queue = state.setdefault("queue", deque())
                    queue.append(p.grad.clone())
                    if len(queue) > 2:
                        queue.popleft()
                    state["nested"] = [[len(queue), (p.mean(), None)], {"seen": [True, 0.5]}]
                    shared["norms"].append(float(p.norm()))
                    p.sub_(sum(queue), alpha=group["lr"] / shared["calls"])

    return lambda params: History(two_groups(params), 0.05)


@case()
def rate_by_hypergradient(optim: Any) -> Any:
    """Learns its learning rate: the group's lr is another number after each step."""

    class Hyper(optim.SGD):
        def __init__(self, params: Any, lr: float, hyper: float) -> None:
            super().__init__(params, lr=lr)
            for group in self.param_groups:
                group["hyper"] = hyper

        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        former = self.state[p].get("former")
                        if former is not None:
                            group["lr"] += group.get("hyper", 0.0) * float((former * p.grad).sum())
                        self.state[p]["former"] = p.grad.clone()
            return super().step(closure)

    return lambda params: Hyper(two_groups(params), 0.01, 1e-5)


# Classes of the library with more around the step.


@case()
def layer_wise_rates(optim: Any) -> Any:
    """LARS on top of SGD: gradients are scaled in place, the group's decay is 0 during the inner
    step."""

    class LARS(optim.SGD):
        def __init__(self, params: Any, lr: float, trust: float = 0.02, **options: Any) -> None:
            self.trust = trust
            super().__init__(params, lr, **options)

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            kept = [group["weight_decay"] for group in self.param_groups]
            for group in self.param_groups:
                decay, group["weight_decay"] = group["weight_decay"], 0
                for p in group["params"]:
                    if p.grad is not None and p.ndim > 1:
                        p.grad.add_(p, alpha=decay).mul_(self.trust * p.norm() / p.grad.norm())
            loss = super().step(closure)
            for group, decay in zip(self.param_groups, kept, strict=True):
                group["weight_decay"] = decay
            return loss

    return lambda params: LARS(two_groups(params), 0.5, momentum=0.9, weight_decay=0.1)


OPTIMIZERS["layer_wise_rates"].fails.update(FORGETS)


@case()
def centralized(optim: Any) -> Any:
    """AdamW on gradients without their mean."""

    class Centralized(optim.AdamW):
        @torch.no_grad
        def step(self, closure: Any = None) -> Any:
            for p in params_of(self):
                if p.grad is not None and p.ndim > 1:
                    p.grad.sub_(p.grad.mean(dim=tuple(range(1, p.ndim)), keepdim=True))
            return super().step(closure)

    return lambda params: Centralized(two_groups(params), lr=0.05, amsgrad=True)


@case()
def cautious(optim: Any) -> Any:
    """AdamW whose steps are taken back where they disagree with the gradient, and the rest made
    longer."""

    class Cautious(optim.AdamW):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.agreement = float("nan")

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            before = [
                (p, p.data.clone(), p.grad.clone()) for p in params_of(self) if p.grad is not None
            ]
            loss = super().step(closure)
            for p, old, grad in before:
                mask = ((p - old) * grad < 0).to(p.dtype)
                self.agreement = float(mask.mean())
                p.copy_(old + (p - old) * mask / mask.mean().clamp(min=1e-3))
            return loss

    return lambda params: Cautious(two_groups(params), lr=0.05)


@case(**FORGETS)
def rectified_with_slow_weights(optim: Any) -> Any:
    """Three ideas in one subclass of RAdam: gradients without their mean, slow weights in the
    state, a counter."""

    class Ranger(optim.RAdam):
        def __init__(self, params: Any, lr: float = 1e-3, k: int = 3, **options: Any) -> None:
            super().__init__(params, lr, **options)
            self.k, self.count = k, 0

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for p in params_of(self):
                if p.grad is not None and p.dim() > 1:
                    p.grad -= p.grad.mean(dim=tuple(range(1, p.dim())), keepdim=True)
            loss = super().step(closure)
            self.count += 1
            for p in params_of(self):
                state = self.state[p]
                state.setdefault("slow_buffer", p.clone())
                if self.count % self.k == 0:
                    p.copy_(state["slow_buffer"].lerp_(p, 0.5))
            return loss

        def load_state_dict(self, state_dict: Any) -> None:
            super().load_state_dict(state_dict)
            self.count = int(
                max((s["step"] for s in self.state.values() if "step" in s), default=0)
            )

    return lambda params: Ranger(params, 0.1, betas=(0.9, 0.95))


def averaged(opt: Any, t: int) -> Any:
    loss = backward(opt, t)
    opt.swap()
    seen = float(loss_of(opt, t).detach())
    opt.swap()
    return seen if loss is None else loss


@case(averaged)
def average_in_the_state(optim: Any) -> Any:
    """Adam which keeps an average of the weights in its state, and exchanges both for an
    evaluation."""

    class AdamWithEMA(optim.Adam):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            for p in params_of(self):
                ema = self.state[p].setdefault("ema", p.detach().clone())
                ema.mul_(0.9).add_(p.detach(), alpha=0.1)
            return loss

        def swap(self) -> None:
            for p in params_of(self):
                p.data, self.state[p]["ema"] = self.state[p]["ema"], p.data

    return lambda params: AdamWithEMA(two_groups(params), lr=0.05)


@case()
def decay_as_a_mixin(optim: Any) -> Any:
    """Decoupled decay as a mixin before any optimizer, with an option that the base does not
    know."""

    class Decay:
        def __init__(self, decay: float, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            for group in self.param_groups:  # type: ignore[attr-defined]
                group.setdefault("decoupled", decay)

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:  # type: ignore[attr-defined]
                for p in group["params"]:
                    p.mul_(1 - group.get("decoupled", 0) * group["lr"])
            return super().step(closure)  # type: ignore[misc]

    class RMSpropW(Decay, optim.RMSprop):
        pass

    return lambda params: RMSpropW(0.2, two_groups(params), lr=0.01, centered=True)


def extragradient(opt: Any, t: int) -> Any:
    closure_of(opt, t)()
    opt.extrapolation()
    closure_of(opt, t)()
    return opt.step()


@case(extragradient, **FORGETS)
def extra_gradient(optim: Any) -> Any:
    """A second method that steps: looks ahead first, then steps from where it was."""

    class Extra(optim.Adam):
        def __init__(self, *args: Any, **options: Any) -> None:
            self.kept: list[Tensor] = []
            super().__init__(*args, **options)

        @torch.no_grad()
        def extrapolation(self) -> None:
            if self.kept:
                raise RuntimeError("step comes first")
            self.kept = [p.clone() for p in params_of(self)]
            super().step()

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            if not self.kept:
                raise RuntimeError("extrapolation comes first")
            for p, old in zip(params_of(self), self.kept, strict=True):
                p.copy_(old)
            self.kept.clear()
            return super().step(closure)

    return lambda params: Extra(two_groups(params), lr=0.05)


@case()
def state_made_at_once(optim: Any) -> Any:
    """Adam for several processes: all of its state is made by the constructor, in memory that they
    share."""

    class SharedAdam(optim.Adam):
        def __init__(self, params: Any, lr: float = 1e-3, **options: Any) -> None:
            super().__init__(params, lr=lr, **options)
            for p in params_of(self):
                state = self.state[p]
                state["step"] = torch.zeros(1)
                state["exp_avg"], state["exp_avg_sq"] = (
                    torch.zeros_like(p.data),
                    torch.zeros_like(p.data),
                )
                for value in state.values():
                    value.share_memory_()

    return lambda params: SharedAdam(params, lr=0.05)


@case(**FORGETS)
def langevin(optim: Any) -> Any:
    """Noise after each step, from a generator that belongs to the optimizer and travels in its
    state dict."""

    class Langevin(optim.SGD):
        def __init__(self, params: Any, lr: float, heat: float) -> None:
            super().__init__(params, lr=lr)
            self.heat, self.random = heat, torch.Generator().manual_seed(3)

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    noise = torch.randn(p.shape, generator=self.random, dtype=p.dtype)
                    p.add_(noise, alpha=math.sqrt(2 * self.heat * group["lr"]))
            return loss

        def state_dict(self) -> Any:
            return super().state_dict() | {"random": self.random.get_state()}

        def load_state_dict(self, state_dict: Any) -> None:
            self.random.set_state(state_dict["random"])
            super().load_state_dict(state_dict)

    return lambda params: Langevin(two_groups(params), 0.05, 1e-3)


@case()
def counters_of_the_class(optim: Any) -> Any:
    """Doubles in tests of trainers: count calls on the object, and hand all arguments on."""

    class Counting(optim.AdamW):
        steps = 0
        zeroed = 0

        def step(self, *args: Any, **options: Any) -> Any:
            self.steps += 1
            return super().step(*args, **options)

        def zero_grad(self, *args: Any, **options: Any) -> Any:
            self.zeroed += 1
            return super().zero_grad(*args, **options)

        def state_dict(self) -> Any:
            return {**super().state_dict(), "calls": (self.steps, self.zeroed)}

        def load_state_dict(self, state_dict: Any) -> None:
            super().load_state_dict(state_dict)
            self.steps, self.zeroed = state_dict["calls"]

    return lambda params: Counting(two_groups(params), lr=0.05, maximize=True)


@case()
def some_groups_at_a_time(optim: Any) -> Any:
    """Steps only some groups, by having the others out of the way for the inner step."""

    class Alternating(optim.Adam):
        def step(self, closure: Any = None) -> Any:
            whole = self.param_groups
            calls = self.state["calls"].setdefault("n", 0)
            self.state["calls"]["n"] += 1
            self.param_groups = whole[calls % 2 :: 2]
            try:
                return super().step(closure)
            finally:
                self.param_groups = whole

    return lambda params: Alternating(two_groups(params), lr=0.05)


@case(**FORGETS)
def accumulating(optim: Any) -> Any:
    """Averages the gradients of two calls in buffers of its own, and steps on them in every second
    call."""

    class Accumulating(optim.SGD):
        def __init__(self, params: Any, every: int, **options: Any) -> None:
            super().__init__(params, **options)
            self.every, self.calls = every, 0

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            self.calls += 1
            for p in params_of(self):
                if p.grad is not None:
                    buffer = self.state[p].setdefault("sum", torch.zeros_like(p))
                    buffer.add_(p.grad, alpha=1 / self.every)
            if self.calls % self.every:
                return None
            own = [p.grad for p in params_of(self)]
            for p in params_of(self):
                p.grad = self.state[p].get("sum")
            loss = super().step(closure)
            for p, grad in zip(params_of(self), own, strict=True):
                if "sum" in self.state[p]:
                    self.state[p]["sum"].zero_()
                p.grad = grad
            return loss

        def load_state_dict(self, state_dict: Any) -> None:
            self.calls = 3
            super().load_state_dict(state_dict)

    return lambda params: Accumulating(two_groups(params), every=2, lr=0.1, momentum=0.9)


@case()
def gradients_for_a_moment(optim: Any) -> Any:
    """Puts other gradients in their place for the inner step, and the old ones back."""

    class Normalized(optim.Adagrad):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            kept = {p: p.grad for p in params_of(self) if p.grad is not None}
            norm = torch.stack([g.norm() for g in kept.values()]).norm()
            for p, g in kept.items():
                p.grad = g / norm
            loss = super().step(closure)
            for p, g in kept.items():
                p.grad = g
            return float(norm) if loss is None else loss

    return lambda params: Normalized(two_groups(params), lr=0.1)


@case()
def projected(optim: Any) -> Any:
    """Keeps weights within bounds after each step, some by `data` and some in place."""

    class Projected(optim.Adadelta):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            for group in self.param_groups:
                low, high = group.get("bounds", (-0.9, 0.9))
                for p in group["params"]:
                    p.data = p.data.clamp(low, high) if p.ndim == 1 else p.data.clamp_(low, high)
            return loss

    return lambda params: Projected(
        [{"params": params[:1], "bounds": (-1, 0.5)}, {"params": params[1:]}], lr=1.0
    )


def visible(opt: Any, t: int) -> Any:
    opt.zero_grad()
    loss_of(opt, t).backward()
    return opt.step(torch.tensor([True, False, True, True]), count=4)


@case(visible)
def step_with_arguments(optim: Any) -> Any:
    """Steps only what was seen: a mask and a count are arguments of the step, in place of the
    closure."""

    class Selective(optim.Adam):
        def step(self, visibility: Any = None, count: int = 0, closure: Any = None) -> Any:
            for p in params_of(self):
                if visibility is not None and p.grad is not None and p.shape[0] == count:
                    p.grad[~visibility] = 0
            return super().step(closure)

    return lambda params: Selective(two_groups(params), lr=0.05, eps=1e-15)


@case()
def step_that_tells(optim: Any) -> Any:
    """Returns a pair: whether the gradients were finite, and the loss."""

    class Telling(optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            finite = all(
                bool(p.grad.isfinite().all()) for p in params_of(self) if p.grad is not None
            )
            return finite, super().step(closure) if finite else None

    return lambda params: Telling(two_groups(params), lr=0.05, momentum=0.9)


def grown_and_cut(opt: Any, t: int) -> Any:
    if t == 2:
        opt.replace(0, lambda old: torch.cat([old, old[:1] * 0.5]))
    if t == 4:
        opt.replace(0, lambda old: old[1:])
    return backward(opt, t)


@case(grown_and_cut)
def parameters_replaced(optim: Any) -> Any:
    """Scenes of points that grow: a parameter in a group gives way to a longer or shorter one, with
    its state."""

    class Growing(optim.Adam):
        def replace(self, index: int, change: Any) -> None:
            group = self.param_groups[index]
            old = group["params"][0]
            state = self.state.pop(old, None)
            new = nn.Parameter(change(old.detach()))
            group["params"][0] = new
            if state is not None:
                for key in ("exp_avg", "exp_avg_sq"):
                    state[key] = change(state[key])
                self.state[new] = state

    return lambda params: Growing(two_groups(params), lr=0.05, eps=1e-15)


@case(with_closure)
def backtracking(optim: Any) -> Any:
    """Takes a step back by loading what it saved before, and tries again with half of it."""

    class Backtracking(optim.SGD):
        def step(self, closure: Any = None) -> Any:
            saved = copy.deepcopy(self.state_dict())
            weights = [p.detach().clone() for p in params_of(self)]
            first = closure()
            for halvings in range(6):
                for group in self.param_groups:
                    group["lr"] = 0.4 / 2**halvings
                super().step()
                if loss_of(self, 0) < first - 0.5:
                    break
                with torch.no_grad():
                    for p, old in zip(params_of(self), weights, strict=True):
                        p.copy_(old)
                self.load_state_dict(copy.deepcopy(saved))
            return first

    return lambda params: Backtracking(two_groups(params), lr=0.4, momentum=0.5)


@case(with_closure)
def quasi_newton(optim: Any) -> Any:
    """LBFGS that looks into its own state after the step, and forgets what it has learned now and
    then."""

    class Watched(optim.LBFGS):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            state = self.state[self._params[0]]
            if state["n_iter"] > 8:
                state["old_dirs"], state["old_stps"], state["ro"] = [], [], []
                state["n_iter"] = 0
            return loss

        def __setstate__(self, state: Any) -> None:
            super().__setstate__(state)
            self._params, self._numel_cache = self.param_groups[0]["params"], None

    return lambda params: Watched(params, lr=0.1, max_iter=3)


# Subclasses of the library's that have a step, and a state, of their own.


@case()
def written_before_lists(optim: Any) -> Any:
    """A subclass of Adam with the step of long ago: counts are ints, the numbers as in the
    groups."""

    class OldAdam(optim.Adam):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            for group in self.param_groups:
                low, high = group["betas"]
                for p in group["params"]:
                    if p.grad is None:
                        continue
                    state = self.state[p]
                    if len(state) == 0:
                        state["step"] = 0
                        state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                        state["exp_avg_sq"] = torch.zeros_like(
                            p, memory_format=torch.preserve_format
                        )
                    state["step"] += 1
                    state["exp_avg"].mul_(low).add_(p.grad, alpha=1 - low)
                    state["exp_avg_sq"].mul_(high).addcmul_(p.grad, p.grad, value=1 - high)
                    root = (state["exp_avg_sq"].sqrt() / math.sqrt(1 - high ** state["step"])).add_(
                        group["eps"]
                    )
                    p.addcdiv_(
                        state["exp_avg"], root, value=-group["lr"] / (1 - low ** state["step"])
                    )
            return loss

        def __setstate__(self, state: Any) -> None:
            optim.Optimizer.__setstate__(self, state)
            for group in self.param_groups:
                group.setdefault("amsgrad", False)

    return lambda params: OldAdam(two_groups(params), lr=0.05)


@case()
def low_rank(optim: Any) -> Any:
    """AdamW for large matrices: moments of a projected gradient, smaller than the weights, and a
    projector."""

    class LowRank(optim.AdamW):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is None:
                        continue
                    state, grad = self.state[p], p.grad
                    if p.ndim == 2:
                        if "projector" not in state:
                            state["projector"] = torch.linalg.svd(grad, full_matrices=False)[2][:1]
                        grad = grad @ state["projector"].T
                    if "step" not in state:
                        state.update(
                            step=0,
                            exp_avg=torch.zeros_like(grad),
                            exp_avg_sq=torch.zeros_like(grad),
                        )
                    state["step"] += 1
                    state["exp_avg"].lerp_(grad, 0.1)
                    state["exp_avg_sq"].lerp_(grad * grad, 0.01)
                    move = state["exp_avg"] / (state["exp_avg_sq"].sqrt() + group["eps"])
                    p.sub_(move @ state["projector"] if p.ndim == 2 else move, alpha=group["lr"])

    return lambda params: LowRank(two_groups(params), lr=0.02)


@case()
def one_number_a_block(optim: Any) -> Any:
    """Adam with one second moment for each row, under the name of the full one."""

    class Mini(optim.Adam):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is None:
                        continue
                    state, square = self.state[p], p.grad.square()
                    if not state:
                        state["step"] = torch.zeros(())
                        state["exp_avg"] = torch.zeros_like(p)
                        state["exp_avg_sq"] = torch.zeros(p.shape[0], dtype=p.dtype)
                    state["step"] += 1
                    state["exp_avg"].lerp_(p.grad, 1 - group["betas"][0])
                    state["exp_avg_sq"].lerp_(
                        square.flatten(1).mean(1) if p.ndim > 1 else square, 0.01
                    )
                    root = state["exp_avg_sq"].sqrt().view(-1, *[1] * (p.ndim - 1)) + group["eps"]
                    p.sub_(state["exp_avg"] / root, alpha=group["lr"])

    return lambda params: Mini(two_groups(params), lr=0.02)


@case()
def other_state_names(optim: Any) -> Any:
    """A subclass of Adam that keeps none of its states, only some of its options."""

    class Signed(optim.Adam):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        self.state[p]["step"] = self.state[p].get("step", torch.zeros(())) + 1
                        m = self.state[p].setdefault("m", torch.zeros_like(p))
                        p.sub_(m.lerp_(p.grad, 1 - group["betas"][0]).sign(), alpha=group["lr"])

    return lambda params: Signed(two_groups(params), lr=0.01)


@case()
def eight_bits(optim: Any) -> Any:
    """Adam with a first moment of 8 bits and a scale, kept under the name of the full one."""

    class Adam8bit(optim.Adam):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is None:
                        continue
                    state = self.state[p]
                    if not state:
                        state["step"], state["absmax"] = (
                            torch.zeros(()),
                            torch.zeros((), dtype=p.dtype),
                        )
                        state["exp_avg"] = torch.zeros_like(p, dtype=torch.int8)
                    state["step"] += 1
                    full = state["exp_avg"].to(p.dtype) * state["absmax"] / 127
                    full.lerp_(p.grad, 1 - group["betas"][0])
                    state["absmax"] = full.abs().max()
                    state["exp_avg"] = (full / state["absmax"] * 127).round().to(torch.int8)
                    p.sub_(full, alpha=group["lr"])

    return lambda params: Adam8bit(two_groups(params), lr=0.02)


@case()
def functional_form(optim: Any) -> Any:
    """Fills torch's lists by `_init_group`, changes them, and calls the function of the
    algorithm."""

    class Functional(optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                lists: tuple[list[Any], ...] = ([], [], [])
                self._init_group(group, *lists)
                params, grads, buffers = lists
                sgd(
                    params,
                    [g * 0.5 for g in grads],
                    buffers,
                    weight_decay=group["weight_decay"],
                    momentum=group["momentum"],
                    lr=group["lr"],
                    dampening=group["dampening"],
                    nesterov=group["nesterov"],
                    maximize=group["maximize"],
                )
                for p, buffer in zip(params, buffers, strict=True):
                    self.state[p]["momentum_buffer"] = buffer

    return lambda params: Functional(two_groups(params), lr=0.1, momentum=0.9)


# Classes that meddle with the contract.


@case(resumes=False)
def hooks_of_its_own(optim: Any) -> Any:
    """Registers hooks on itself: clips before each step, counts after it, and signs what it
    saves."""

    class Hooked(optim.Adam):
        def __init__(self, params: Any, **options: Any) -> None:
            super().__init__(params, **options)
            self.register_step_pre_hook(lambda opt, args, kwargs: opt.clip())
            self.register_step_post_hook(lambda opt, args, kwargs: opt.count())
            self.register_state_dict_post_hook(lambda opt, state: {**state, "signed": opt.counted})
            self.register_load_state_dict_pre_hook(
                lambda opt, state: {k: v for k, v in state.items() if k != "signed"}
            )
            self.register_load_state_dict_post_hook(lambda opt: setattr(opt, "counted", 100))

        counted = 0

        def clip(self) -> None:
            for p in params_of(self):
                if p.grad is not None:
                    p.grad.clamp_(-0.5, 0.5)

        def count(self) -> None:
            self.counted += 1

    return lambda params: Hooked(two_groups(params), lr=0.05)


@case()
def other_defaults(optim: Any) -> Any:
    """Other defaults, more options in the groups, and old pickles that lack them."""

    class Tuned(optim.AdamW):
        def __init__(self, params: Any, lr: float = 0.03, warm: int = 3, **options: Any) -> None:
            options = {"betas": (0.95, 0.98), "weight_decay": 0.1, **options}
            super().__init__(params, lr=lr, **options)
            self.defaults["warm"] = warm
            for group in self.param_groups:
                group.setdefault("warm", warm)
                group.setdefault("clock", 0)

        def __setstate__(self, state: Any) -> None:
            super().__setstate__(state)
            for group in self.param_groups:
                group.setdefault("clock", 0)

        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["clock"] = group.get("clock", 0) + 1
                group["kept"], group["lr"] = (
                    group["lr"],
                    group["lr"] * min(1, group["clock"] / group["warm"]),
                )
            loss = super().step(closure)
            for group in self.param_groups:
                group["lr"] = group.pop("kept")
            return loss

    return lambda params: Tuned(two_groups(params))


@case()
def groups_that_split(optim: Any) -> Any:
    """Splits each group that is added: matrices are decayed, vectors are not."""

    class Splitting(optim.SGD):
        def add_param_group(self, param_group: Any) -> None:
            options = {key: value for key, value in param_group.items() if key != "params"}
            params = list(param_group["params"])
            for keep, decay in ((lambda p: p.ndim > 1, 0.1), (lambda p: p.ndim <= 1, 0.0)):
                chosen = [p for p in params if keep(p)]
                if chosen:
                    super().add_param_group({**options, "params": chosen, "weight_decay": decay})

    return lambda params: Splitting(params, lr=0.05, momentum=0.9)


@case()
def made_by_new(optim: Any) -> Any:
    """`__new__` reads the arguments, notes them on the object and chooses the class."""

    class Chosen(optim.Adam):
        def __new__(cls, params: Any = None, *args: Any, **options: Any) -> Any:
            self = super().__new__(Fast if options.pop("fast", False) else cls)
            self.noted = sorted(options)
            return self

        def __init__(self, params: Any, fast: bool = False, **options: Any) -> None:
            super().__init__(params, **options)
            self.param_groups[0]["fast"] = fast

    class Fast(Chosen):
        pass

    return lambda params: Chosen(two_groups(params), lr=0.05, fast=True)


@case()
def made_without_a_constructor(optim: Any) -> Any:
    """An object that comes out of `__setstate__` alone, as some trainers move optimizers between
    processes."""

    class Moved(optim.Adam):
        pass

    def build(params: Any) -> Any:
        first = optim.Adam(two_groups(params), lr=0.05)
        opt = Moved.__new__(Moved)
        opt.__setstate__(first.__getstate__())
        return opt

    return build


@case()
def changed_class(optim: Any) -> Any:
    """Clipping put into an optimizer that exists already, by giving it another class."""

    base = optim.RAdam

    class Clipping(base):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                nn.utils.clip_grad_norm_(group["params"], 0.5)
            return super().step(closure=closure)

    def build(params: Any) -> Any:
        opt = base(two_groups(params), lr=0.05)
        opt.__class__ = Clipping
        return opt

    return build


@case()
def patched_step(optim: Any) -> Any:
    """A decorator that wraps the step of a class, and keeps its name."""

    def logged(cls: Any) -> Any:
        step = cls.step

        @functools.wraps(step)
        def wrapper(self: Any, *args: Any, **options: Any) -> Any:
            self.state["log"]["entries"] = self.state["log"].get("entries", 0) + 1
            return step(self, *args, **options)

        cls.step = wrapper
        return cls

    @logged
    class Logged(optim.Adadelta):
        pass

    return lambda params: Logged(two_groups(params), lr=1.0)


def in_a_context(opt: Any, t: int) -> Any:
    with opt as entered:
        loss_of(entered, t).backward()
    return opt.last


@case(in_a_context)
def context_manager(optim: Any) -> Any:
    """`with optimizer:` around the backward pass: gradients are dropped on entry, the step is taken
    on exit."""

    class Managed(optim.Adamax):
        last: Any = None

        def __enter__(self) -> Any:
            self.zero_grad()
            return self

        def __exit__(self, kind: Any, *_: Any) -> None:
            if kind is None:
                self.last = self.step()

    return lambda params: Managed(two_groups(params), lr=0.05)


@case()
def registered_subclasses(optim: Any) -> Any:
    """A base that takes keywords in the class statement, and keeps a register of what derives from
    it."""

    class Registered(optim.SGD):
        known: dict[str, Any] = {}

        def __init_subclass__(cls, key: str = "", **options: Any) -> None:
            super().__init_subclass__(**options)
            Registered.known[key] = cls

    class Heavy(Registered, key="heavy"):
        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=0.05, momentum=0.99, dampening=0.1)

    assert Registered.known == {"heavy": Heavy}
    return lambda params: Registered.known["heavy"](two_groups(params))


@case()
def rate_as_a_property(optim: Any) -> Any:
    """`optimizer.lr` reads and writes the groups, also within the step."""

    class Handy(optim.Adam):
        @property
        def lr(self) -> Any:
            return self.param_groups[0]["lr"]

        @lr.setter
        def lr(self, value: float) -> None:
            for group in self.param_groups:
                group["lr"] = value

        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            self.lr *= 0.9
            return loss

    return lambda params: Handy(two_groups(params), lr=0.05)


@case()
def named_parameters(optim: Any) -> Any:
    """Takes names with the parameters, and decides by them which are decayed."""

    class Named(optim.AdamW):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for name, p in zip(group["param_names"], group["params"], strict=True):
                    if name.endswith("bias") and p.grad is not None:
                        p.grad.mul_(2)
            return super().step(closure)

        def add_param_group(self, param_group: Any) -> None:
            params = list(param_group["params"])
            if not isinstance(params[0], tuple):
                params = [
                    (f"{len(getattr(self, 'param_groups', []))}.{i}", p)
                    for i, p in enumerate(params)
                ]
            super().add_param_group(param_group | {"params": params})

    return lambda params: Named(
        [
            {"params": [("weight", params[0])]},
            {"params": [("bias", params[1]), ("deep.bias", params[2])], "lr": 0.1},
        ],
        lr=0.02,
    )


@case()
def checks_of_capture(optim: Any) -> Any:
    """Own code around parts of the base: the check of graph capture, the profiler's mark, `hooked`
    steps unwrapped."""

    class Parts(optim.Adam):
        def step(self, closure: Any = None) -> Any:
            self._accelerator_graph_capture_health_check()
            self._optimizer_step_code()
            step = super().step
            inner = getattr(step, "__wrapped__", None)
            return (
                inner(self, closure) if getattr(step, "hooked", False) and inner else step(closure)
            )

    return lambda params: Parts(two_groups(params), lr=0.05)


@case()
def gradients_kept_as_zeros(optim: Any) -> Any:
    """Another default of `zero_grad`, and gradients that live in one flat buffer."""

    class Flat(optim.SGD):
        def zero_grad(self, set_to_none: bool = False) -> None:
            params = params_of(self)
            if "flat" not in vars(self):
                self.flat = torch.zeros(sum(p.numel() for p in params), dtype=params[0].dtype)
                start = 0
                for p in params:
                    p.grad = self.flat[start : start + p.numel()].view_as(p)
                    start += p.numel()
            super().zero_grad(set_to_none)

    return lambda params: Flat(two_groups(params), lr=0.05, momentum=0.9)


@case()
def a_sequence_of_parameters(optim: Any) -> Any:
    """Parameters in an object of a model's own that can be indexed, and has no `__iter__`."""

    class Bank:
        def __init__(self, params: Any) -> None:
            self.params = params

        def __len__(self) -> int:
            return len(self.params)

        def __getitem__(self, index: int) -> Any:
            return self.params[index]

    return lambda params: optim.Adam(
        [{"params": Bank(params[:1])}, {"params": Bank(params[1:])}], lr=0.05
    )


@case()
def a_sequence_of_groups(optim: Any) -> Any:
    """The same of all parameters together, given to a subclass."""

    class Bank:
        def __init__(self, params: Any) -> None:
            self.params = params

        def __getitem__(self, index: int) -> Any:
            return self.params[index]

    class Small(optim.SGD):
        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=0.05)

    return lambda params: Small(Bank(params))


@case()
def fused_by_name(optim: Any) -> Any:
    """A name for the fast form, with its flags set, and a longer printed form."""

    class FusedAdam(optim.Adam):
        def __init__(
            self, params: Any, lr: float = 1e-3, adam_w_mode: bool = True, **options: Any
        ) -> None:
            super().__init__(params, lr=lr, foreach=True, **options)
            self.adam_w_mode = 1 if adam_w_mode else 0
            self.set_grad_none = True

        def zero_grad(self, set_to_none: bool = True) -> None:
            if self.set_grad_none:
                for p in params_of(self):
                    p.grad = None
            else:
                super().zero_grad(set_to_none)

        def __repr__(self) -> str:
            return "Fused" + super().__repr__()

    return lambda params: FusedAdam(two_groups(params), lr=0.05)


OPTIMIZERS["fused_by_name"].fails.update(FORGETS)


@case()
def diamond(optim: Any) -> Any:
    """Two parents that both derive from the library's class, each with a part of the step."""

    class Clipped(optim.Adam):
        def step(self, closure: Any = None) -> Any:
            for p in params_of(self):
                if p.grad is not None:
                    p.grad.clamp_(-0.3, 0.3)
            return super().step(closure)

    class Shrunk(optim.Adam):
        def step(self, closure: Any = None) -> Any:
            loss = super().step(closure)
            with torch.no_grad():
                for p in params_of(self):
                    p.mul_(0.99)
            return loss

    class Both(Clipped, Shrunk):
        pass

    return lambda params: Both(two_groups(params), lr=0.05)


# What each goes through.

STEPS = 6


@functools.cache
def builder(name: str, optim: Any) -> Callable[..., Any]:
    return OPTIMIZERS[name].make(optim)


def publish(thing: Any, optim: Any) -> None:
    """Let pickle find the classes of an object, and of what it holds, at this module's level."""
    for value in (thing, *vars(thing).values()):
        cls = type(value)
        if cls.__module__ == __name__ and "<locals>" in cls.__qualname__:
            cls.__qualname__ = f"{cls.__qualname__}_{optim.__name__}".replace(
                "<locals>", ""
            ).replace(".", "_")
            globals()[cls.__qualname__] = cls


def build(name: str, optim: Any, params: Any = None) -> Any:
    return builder(name, optim)(make_params() if params is None else params)


def plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return type(value)(plain(entry) for entry in value)
    return value


def look(opt: Any) -> Any:
    return [
        plain(params_of(opt)),
        [(sorted(group), plain(group["lr"])) for group in opt.param_groups],
    ]


def run(name: str, opt: Any, start: int, end: int) -> list[Any]:
    return [[plain(OPTIMIZERS[name].drive(opt, t)), look(opt)] for t in range(start, end)]


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def steps(name: str, optim: Any) -> Any:
    opt = build(name, optim)
    rows = run(name, opt, 0, STEPS)
    return rows, plain(opt.state_dict()), repr(opt)


def reopened(name: str, optim: Any, other: Any) -> Any:
    """A checkpoint of one library's, in a fresh optimizer of the other's."""
    opt = build(name, optim)
    run(name, opt, 0, 3)
    saved, weights = through_a_file(opt.state_dict()), [p.detach().clone() for p in params_of(opt)]
    if len(weights) != len(SHAPES) or any(
        w.shape != s for w, s in zip(weights, SHAPES, strict=True)
    ):
        fresh = build(name, other, [nn.Parameter(w.clone()) for w in weights])
    else:
        fresh = build(name, other)
    with torch.no_grad():
        for p, w in zip(params_of(fresh), weights, strict=True):
            p.copy_(w)
    fresh.load_state_dict(saved)
    return run(name, fresh, 3, STEPS), plain(fresh.state_dict())


def resumed(name: str, optim: Any) -> Any:
    found = reopened(name, optim, optim)
    if OPTIMIZERS[name].resumes:
        assert_alike(found[0], steps(name, optim)[0][3:], rtol=1e-12)
    return found


def duplicated(name: str, optim: Any, duplicate: Callable[[Any], Any]) -> Any:
    opt = build(name, optim)
    rows = run(name, opt, 0, 3)
    publish(opt, optim)
    other, before = duplicate(opt), plain(look(opt))
    rows += run(name, other, 3, STEPS)
    assert_alike(look(opt), before, rtol=0)
    return rows, plain(other.state_dict()), run(name, opt, 3, STEPS)


def copied(name: str, optim: Any) -> Any:
    return duplicated(name, optim, copy.deepcopy)


def pickled(name: str, optim: Any) -> Any:
    return duplicated(name, optim, lambda opt: pickle.loads(pickle.dumps(opt)))


def scheduled(name: str, optim: Any) -> Any:
    opt = build(name, optim)
    scheduler = optim.lr_scheduler.StepLR(opt, 2, 0.5)
    rows = []
    for t in range(STEPS):
        rows += run(name, opt, t, t + 1)
        scheduler.step()
        rows.append([scheduler.get_last_lr(), look(opt)])
    return rows


def grown(name: str, optim: Any) -> Any:
    opt = build(name, optim)
    rows = run(name, opt, 0, 2)
    opt.add_param_group(
        {"params": [nn.Parameter(torch.ones(NEW_SHAPE, dtype=torch.float64))], "lr": 0.03}
    )
    return rows + run(name, opt, 2, STEPS)


def scaled(name: str, optim: Any) -> Any:
    """With a gradient scaler, one of whose steps meets infinity and is skipped."""
    opt, rows = build(name, optim), []
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for t in range(4):
        opt.zero_grad()
        loss = scaler.scale(loss_of(opt, t))
        loss.backward()
        if t == 2:
            params_of(opt)[0].grad.flatten()[0] = math.inf
        returned = scaler.step(opt)
        scaler.update()
        rows.append([plain(returned), scaler.get_scale(), look(opt)])
    return rows


def error_of(action: Callable[[], Any]) -> Any:
    try:
        action()
    except Exception as error:
        return type(error), [phrase for phrase in PHRASES if phrase in str(error)]
    return None


def refused(name: str, optim: Any) -> Any:
    """Bad parameters, groups and checkpoints: how each error begins."""
    given = [
        [],
        nn.Parameter(torch.ones(3, 2)),
        ["a", "b", "c"],
        [p * 2 for p in make_params()],
        [p.detach().numpy() for p in make_params()],
    ]
    found = [error_of(lambda params=params: build(name, optim, params)) for params in given]
    opt = build(name, optim)
    first = params_of(opt)[0]
    groups: list[Any] = [
        [first],
        {"params": {first}},
        {"lr": 1.0},
        {"params": ["a"]},
        {"params": [first * 2]},
    ]
    found += [error_of(lambda group=group: opt.add_param_group(group)) for group in groups]
    found.append(
        error_of(lambda: opt.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]}))
    )
    held = opt.param_groups[0]["params"][0]
    found.append(error_of(lambda: opt.add_param_group({"params": [held], "lr": 0.1})))
    saved = copy.deepcopy(opt.state_dict())
    if isinstance(saved, dict) and "param_groups" in saved:
        shorter = saved | {"param_groups": saved["param_groups"][1:]}
        found.append(error_of(lambda: opt.load_state_dict(shorter)))
        fewer = copy.deepcopy(saved)
        fewer["param_groups"][-1]["params"].pop()
        found.append(error_of(lambda: opt.load_state_dict(fewer)))
    return found


PROPERTIES: dict[str, Callable[[str, Any], Any]] = {
    f.__name__: f for f in (steps, resumed, copied, pickled, scheduled, grown, scaled, refused)
}


def assert_alike(ours: Any, theirs: Any, path: str = "", rtol: float = 1e-10) -> None:
    """The same structure, types and names; numbers but for rounding."""
    if path.endswith(".step") and not isinstance(ours, Tensor):
        # A count that a class keeps as an int: torch makes a tensor of it in a copy.
        assert ours == float(theirs), path
    elif isinstance(theirs, Tensor):
        assert isinstance(ours, Tensor), path
        assert ours.dtype == theirs.dtype, path
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol, msg=lambda m: f"{path}: {m}")
    elif isinstance(theirs, Mapping):
        assert set(ours) == set(theirs), path
        for key in theirs:
            assert_alike(ours[key], theirs[key], f"{path}.{key}", rtol)
    elif isinstance(theirs, (list, tuple, deque)):
        assert type(ours) is type(theirs), path
        assert len(ours) == len(theirs), path
        for i, (mine, its) in enumerate(zip(ours, theirs, strict=True)):
            assert_alike(mine, its, f"{path}.{i}", rtol)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=rtol, abs=rtol, nan_ok=True), path
    else:
        assert ours == theirs, path


def applies(prop: str, name: str) -> bool:
    """A scaler takes no closures; LBFGS has one group only, and says so where a second one is
    added."""
    if name == "quasi_newton":
        return prop not in ("scaled", "grown", "refused")
    return prop != "scaled" or OPTIMIZERS[name].drive is backward


def find(prop: Callable[..., Any], name: str, *libraries: Any) -> Any:
    """What comes of it with classes that are new, as torch changes a class when the first object is
    made."""
    builder.cache_clear()
    return prop(name, *libraries)


OPTIMIZER_TABLE = [
    (prop, name) for name in OPTIMIZERS for prop in PROPERTIES if applies(prop, name)
]


@pytest.mark.parametrize(("prop", "name"), OPTIMIZER_TABLE)
def test_optimizers(prop: str, name: str) -> None:
    error = OPTIMIZERS[name].fails.get(prop)
    if error is not None:
        for optim in (torch.optim, onepass):
            with pytest.raises(error) as caught:
                find(PROPERTIES[prop], name, optim)
            assert caught.type is error
        return
    theirs = find(PROPERTIES[prop], name, torch.optim)
    assert_alike(find(PROPERTIES[prop], name, onepass), theirs)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_checkpoints_of_optimizers_cross(name: str) -> None:
    error = OPTIMIZERS[name].fails.get("resumed")
    for first, second in ((torch.optim, onepass), (onepass, torch.optim)):
        if error is not None:
            with pytest.raises(error):
                find(reopened, name, first, second)
        else:
            assert_alike(
                find(reopened, name, first, second), find(reopened, name, torch.optim, torch.optim)
            )


# Schedulers. Each makes what builds a scheduler of an optimizer with two groups.


class Timed(NamedTuple):
    make: Callable[[Any], Callable[[Any], Any]]
    drive: Callable[[Any, Any, int], Any]
    kind: str  # the optimizer
    fails: dict[str, type[BaseException]]


SCHEDULERS: dict[str, Timed] = {}


def after_a_step(scheduler: Any, opt: Any, t: int) -> Any:
    opt.step()
    return scheduler.step()


def of_a_metric(scheduler: Any, opt: Any, t: int) -> Any:
    opt.step()
    return scheduler.step(metrics=(1.0, 0.8, 0.9, 0.85, 0.81, 0.82, 0.9, 0.7)[t % 8])


def timed(
    drive: Any = after_a_step, kind: str = "SGD", **fails: type[BaseException]
) -> Callable[[Any], Any]:
    def register(make: Any) -> Any:
        SCHEDULERS[make.__name__] = Timed(make, drive, kind, fails)
        return make

    return register


@timed()
def delayed(optim: Any) -> Any:
    """Waits some epochs, then drives an inner scheduler, whose state lies within its own."""

    class Delayed(optim.lr_scheduler.LRScheduler):
        def __init__(self, optimizer: Any, delay: int, after: Any) -> None:
            self.delay, self.after, self.finished = delay, after, False
            super().__init__(optimizer)

        def get_lr(self) -> Any:
            if self.last_epoch >= self.delay:
                if not self.finished:
                    self.after.base_lrs, self.finished = self.base_lrs, True
                return self.after.get_last_lr()
            return self.base_lrs

        def step(self, epoch: Any = None) -> Any:
            if not self.finished:
                return super().step(epoch)
            self.after.step(epoch)
            self._last_lr = self.after.get_last_lr()
            return None

        def state_dict(self) -> Any:
            kept = {
                key: value
                for key, value in self.__dict__.items()
                if key not in ("optimizer", "after")
            }
            return {**kept, "after": self.after.state_dict()}

        def load_state_dict(self, state_dict: Any) -> None:
            state_dict = dict(state_dict)
            self.after.load_state_dict(state_dict.pop("after"))
            self.__dict__.update(state_dict)

    return lambda opt: Delayed(opt, 2, optim.lr_scheduler.CosineAnnealingLR(opt, 6, eta_min=0.001))


@timed(of_a_metric)
def gradual_with_plateau(optim: Any) -> Any:
    """Warms up, and then hands metrics on to a plateau scheduler: `step(epoch, metrics)`."""

    class Gradual(optim.lr_scheduler._LRScheduler):
        def __init__(
            self, optimizer: Any, multiplier: float, total: int, after: Any = None
        ) -> None:
            self.multiplier, self.total, self.after, self.finished = multiplier, total, after, False
            super().__init__(optimizer)

        def get_lr(self) -> Any:
            if self.last_epoch > self.total:
                return [lr * self.multiplier for lr in self.base_lrs]
            return [
                lr * ((self.multiplier - 1) * self.last_epoch / self.total + 1)
                for lr in self.base_lrs
            ]

        def step(self, epoch: Any = None, metrics: Any = None) -> Any:
            if metrics is None:
                return super().step(epoch)
            self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
            if self.last_epoch <= self.total:
                for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
                    group["lr"] = lr
                return "warm"
            return self.after.step(metrics)

        def state_dict(self) -> Any:
            return {"last_epoch": self.last_epoch, "after": self.after.state_dict()}

        def load_state_dict(self, state_dict: Any) -> None:
            self.last_epoch = state_dict["last_epoch"]
            self.after.load_state_dict(state_dict["after"])

    def build(opt: Any) -> Any:
        return Gradual(
            opt, 2.0, 2, optim.lr_scheduler.ReduceLROnPlateau(opt, patience=0, factor=0.5)
        )

    return build


@timed()
def restarts_with_warm_up(optim: Any) -> Any:
    """Cosine cycles with a warm up in each: sets all learning rates to a minimum once its base is
    made."""

    class Restarts(optim.lr_scheduler.LRScheduler):
        def __init__(
            self, optimizer: Any, first: int, low: float, high: float, warm: int, gamma: float
        ) -> None:
            assert warm < first
            self.first, self.low, self.high, self.warm, self.gamma = first, low, high, warm, gamma
            self.cycle, self.size, self.place = 0, first, -1
            super().__init__(optimizer)
            self.init_lr()

        def init_lr(self) -> None:
            self.base_lrs = []
            for group in self.optimizer.param_groups:
                group["lr"] = self.low
                self.base_lrs.append(self.low)

        def get_lr(self) -> Any:
            if self.place == -1:
                return self.base_lrs
            high = self.high * self.gamma**self.cycle
            if self.place < self.warm:
                return [(high - low) * self.place / self.warm + low for low in self.base_lrs]
            part = (self.place - self.warm) / (self.size - self.warm)
            return [
                low + (high - low) * (1 + math.cos(math.pi * part)) / 2 for low in self.base_lrs
            ]

        def step(self, epoch: Any = None) -> None:
            if epoch is None:
                epoch = self.last_epoch + 1
                self.place += 1
                if self.place >= self.size:
                    self.cycle, self.place, self.size = (
                        self.cycle + 1,
                        self.place - self.size,
                        self.size + 1,
                    )
            self.last_epoch = math.floor(epoch)
            for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
                group["lr"] = lr

        def get_last_lr(self) -> Any:
            return [group["lr"] for group in self.optimizer.param_groups]

    return lambda opt: Restarts(opt, 4, 0.001, 0.1, 1, 0.5)


@timed()
def recursion_with_closed_form(optim: Any) -> Any:
    """Warms up and anneals by steps from the lr that is there, with a closed form beside it, and a
    guard."""

    class WarmCosine(optim.lr_scheduler.LRScheduler):
        def __init__(
            self, optimizer: Any, warm: int, total: int, start: float = 0.0, last_epoch: int = -1
        ) -> None:
            self.warm, self.total, self.start = warm, total, start
            super().__init__(optimizer, last_epoch)

        def get_lr(self) -> Any:
            if not self._get_lr_called_within_step:
                raise RuntimeError("ask get_last_lr")
            groups = self.optimizer.param_groups
            if self.last_epoch == 0:
                return [self.start] * len(self.base_lrs)
            if self.last_epoch < self.warm:
                pairs = zip(self.base_lrs, groups, strict=True)
                return [group["lr"] + (lr - self.start) / (self.warm - 1) for lr, group in pairs]
            if self.last_epoch == self.warm:
                return self.base_lrs
            now, before = (self.part(self.last_epoch - i) for i in (0, 1))
            return [group["lr"] * now / before for group in groups]

        def part(self, t: int) -> float:
            return 1 + math.cos(math.pi * (t - self.warm) / (self.total - self.warm))

        def _get_closed_form_lr(self) -> Any:
            return [lr * self.part(self.last_epoch) / 2 for lr in self.base_lrs]

    return lambda opt: WarmCosine(opt, 3, 20)


@timed()
def warm_multi_step(optim: Any) -> Any:
    """The schedule of detection code: `bisect` over milestones, times a warm up."""

    class WarmMultiStep(optim.lr_scheduler.LRScheduler):
        def __init__(
            self, optimizer: Any, milestones: Any, gamma: float, warm: int, last_epoch: int = -1
        ) -> None:
            if list(milestones) != sorted(milestones):
                raise ValueError("milestones must increase")
            self.milestones, self.gamma, self.warm = milestones, gamma, warm
            super().__init__(optimizer, last_epoch)

        def get_lr(self) -> Any:
            alpha = min(1.0, 0.1 + 0.9 * self.last_epoch / self.warm)
            return [
                lr * alpha * self.gamma ** bisect_right(self.milestones, self.last_epoch)
                for lr in self.base_lrs
            ]

        def _compute_values(self) -> Any:
            return self.get_lr()

    return lambda opt: WarmMultiStep(opt, (3, 5), 0.1, 2)


@timed()
def cosine_with_longer_cycles(optim: Any) -> Any:
    """A subclass of the cosine that turns its own clock back, and makes the cycle longer."""

    class WarmRestart(optim.lr_scheduler.CosineAnnealingLR):
        def __init__(self, optimizer: Any, T_max: int, T_mult: int = 2, eta_min: float = 0) -> None:
            self.T_mult = T_mult
            super().__init__(optimizer, T_max, eta_min)

        def get_lr(self) -> Any:
            if self.last_epoch == self.T_max:
                self.last_epoch, self.T_max = 0, self.T_max * self.T_mult
            part = (1 + math.cos(math.pi * self.last_epoch / self.T_max)) / 2
            return [self.eta_min + (lr - self.eta_min) * part for lr in self.base_lrs]

    return lambda opt: WarmRestart(opt, 2, eta_min=0.001)


@timed(kind="Adam")
def betas_too(optim: Any) -> Any:
    """Moves the betas against the learning rate, and the weight decay with it."""

    class WithBetas(optim.lr_scheduler.LRScheduler):
        def __init__(self, optimizer: Any, total: int) -> None:
            self.total = total
            self.decays = [group["weight_decay"] for group in optimizer.param_groups]
            super().__init__(optimizer)

        def get_lr(self) -> Any:
            part = abs(1 - 2 * self.last_epoch / self.total)
            for group, decay in zip(self.optimizer.param_groups, self.decays, strict=True):
                group["betas"] = (0.85 + 0.1 * part, *group["betas"][1:])
                group["weight_decay"] = decay * part
            return [lr / (1 + part) for lr in self.base_lrs]

    return lambda opt: WithBetas(opt, 6)


@timed()
def momentum_by_a_step_of_its_own(optim: Any) -> Any:
    """Calls the base's step, and then sets the momentum; another learning rate than the base's is
    reported."""

    class OneCycle(optim.lr_scheduler.LRScheduler):
        def __init__(self, optimizer: Any, total: int) -> None:
            self.total = total
            super().__init__(optimizer)

        def get_lr(self) -> Any:
            return [
                lr * (1 - abs(self.last_epoch - self.total) / self.total) for lr in self.base_lrs
            ]

        def step(self, epoch: Any = None) -> float:
            super().step(epoch)
            momentum = 0.95 - 0.1 * self.last_epoch / self.total
            for group in self.optimizer.param_groups:
                group["momentum"] = momentum
            return momentum

    return lambda opt: OneCycle(opt, 5)


@timed()
def delegating_scheduler(optim: Any) -> Any:
    """Derives from the base without calling its constructor, and hands on what it does not know."""

    class Wrapped(optim.lr_scheduler.LRScheduler):
        def __init__(self, inner: Any, every: int) -> None:
            self.__dict__.update(inner=inner, every=every, calls=0)

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__") or "inner" not in self.__dict__:
                raise AttributeError(name)
            return getattr(self.__dict__["inner"], name)

        def step(self, epoch: Any = None) -> Any:
            self.calls += 1
            return self.inner.step() if self.calls % self.every == 0 else None

        def get_last_lr(self) -> Any:
            return self.inner.get_last_lr()

        def state_dict(self) -> Any:
            return {"calls": self.calls, "inner": self.inner.state_dict()}

        def load_state_dict(self, state_dict: Any) -> None:
            self.calls = state_dict["calls"]
            self.inner.load_state_dict(state_dict["inner"])

    return lambda opt: Wrapped(optim.lr_scheduler.ExponentialLR(opt, 0.8), 2)


@timed()
def without_the_constructor(optim: Any) -> Any:
    """Sets what it needs itself, and begins with the base's `step`: it has no `base_lrs`."""

    class Bare(optim.lr_scheduler.LRScheduler):
        def __init__(self, optimizer: Any, factor: float) -> None:
            self.optimizer, self.factor, self.last_epoch, self._step_count = (
                optimizer,
                factor,
                -1,
                2,
            )
            self.step()

        def get_lr(self) -> Any:
            return [group["lr"] * self.factor for group in self.optimizer.param_groups]

    return lambda opt: Bare(opt, 0.9)


@timed()
def with_a_step_alone(optim: Any) -> Any:
    """Neither the constructor nor the step of the base: numbers from the optimizer's defaults."""

    class Alone(optim.lr_scheduler.LRScheduler):
        def __init__(self, optimizer: Any, warm: int) -> None:
            self.optimizer, self.warm, self.last_epoch = optimizer, warm, 0

        def step(self, epoch: Any = None) -> Any:
            self.last_epoch += 1
            rate = self.optimizer.defaults["lr"] * min(1.0, self.last_epoch / self.warm)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            return rate

        def get_last_lr(self) -> Any:
            return [group["lr"] for group in self.optimizer.param_groups]

    return lambda opt: Alone(opt, 4)


@timed()
def attributes_afterwards(optim: Any) -> Any:
    """The base's constructor comes first, and `get_lr` finds defaults until the attributes are
    there."""

    class Late(optim.lr_scheduler.LRScheduler):
        def __init__(self, optimizer: Any, power: float) -> None:
            super(Late, self).__init__(optimizer)  # noqa: UP008
            self.power = power
            self.defaults = dict(optimizer.defaults)

        def get_lr(self) -> Any:
            power = getattr(self, "power", 0.0)
            lr = getattr(self, "defaults", {}).get("lr", 1.0)
            return [min(lr, base) * (1 - self.last_epoch / 20) ** power for base in self.base_lrs]

    return lambda opt: Late(opt, 2.0)


def with_new_rates(scheduler: Any, opt: Any, t: int) -> Any:
    if t == 3:
        scheduler.rebase([0.2, 0.3])
    return after_a_step(scheduler, opt, t)


@timed(with_new_rates)
def new_base_rates(optim: Any) -> Any:
    """Begins again in mid-run from other base rates, which it puts in the groups as well."""

    class Rebased(optim.lr_scheduler.LambdaLR):
        def rebase(self, lrs: Any) -> None:
            self.base_lrs = list(lrs)
            for group, lr in zip(self.optimizer.param_groups, lrs, strict=True):
                group["initial_lr"] = lr

        def state_dict(self) -> Any:
            return {k: v for k, v in self.__dict__.items() if k not in ("optimizer", "lr_lambdas")}

        def load_state_dict(self, state_dict: Any) -> None:
            self.__dict__.update(state_dict)

    return lambda opt: Rebased(opt, decay_of_lambda)


def decay_of_lambda(t: int) -> float:
    return 0.9**t


@timed(with_new_rates)
def new_base_rates_of_steps(optim: Any) -> Any:
    """The same on a schedule that torch makes by factors, and whose base rates are read only at the
    start."""

    class Rebased(optim.lr_scheduler.StepLR):
        def rebase(self, lrs: Any) -> None:
            self.base_lrs = list(lrs)

    return lambda opt: Rebased(opt, 2, 0.5)


def softened(scheduler: Any, opt: Any, t: int) -> Any:
    if t == 3:
        scheduler.soften()
    return after_a_step(scheduler, opt, t)


@timed(softened)
def factor_that_changes(optim: Any) -> Any:
    """An option of the base that is changed in mid-run, by a method that is no part of the
    schedule."""

    class Softened(optim.lr_scheduler.ExponentialLR):
        def soften(self) -> None:
            self.gamma = 0.99

    return lambda opt: Softened(opt, 0.8)


@timed(softened)
def milestones_that_change(optim: Any) -> Any:
    """Decays at once where the training asks for it, by one more milestone in torch's counter."""

    class OnDemand(optim.lr_scheduler.MultiStepLR):
        def soften(self) -> None:
            self.milestones[self.last_epoch + 1] += 1

    return lambda opt: OnDemand(opt, [2], 0.5)


@timed(softened)
def cosine_that_is_extended(optim: Any) -> Any:
    """A training that goes on for longer than was said: the cosine's length is changed in
    mid-run."""

    class Extended(optim.lr_scheduler.CosineAnnealingLR):
        def soften(self) -> None:
            self.T_max *= 2

    return lambda opt: Extended(opt, 6)


@timed(softened)
def lambdas_that_change(optim: Any) -> Any:
    """Another function for one group in mid-run."""

    class Switched(optim.lr_scheduler.LambdaLR):
        def soften(self) -> None:
            self.lr_lambdas[1] = decay_of_lambda

    return lambda opt: Switched(opt, constant_of_lambda)


def constant_of_lambda(t: int) -> float:
    return 1.0 / (1 + t % 2)


@timed(of_a_metric)
def arguments_of_two_kinds(optim: Any) -> Any:
    """`step(metrics=None, epoch=None)`: one signature for both kinds of schedulers."""

    class Either(optim.lr_scheduler.LRScheduler):
        best = math.inf

        def get_lr(self) -> Any:
            return [lr * 0.5 ** getattr(self, "bad", 0) for lr in self.base_lrs]

        def step(self, metrics: Any = None, epoch: Any = None) -> Any:
            if metrics is not None:
                self.bad = getattr(self, "bad", 0) + (metrics >= self.best)
                self.best = min(self.best, metrics)
            super().step(epoch)
            return self.best

    return Either


@timed()
def state_that_sets_the_rates(optim: Any) -> Any:
    """Saves the learning rates, too, and puts them into the optimizer when it is loaded."""

    class Restoring(optim.lr_scheduler.ExponentialLR):
        def state_dict(self) -> Any:
            rates = [group["lr"] for group in self.optimizer.param_groups]
            return {"epoch": self.last_epoch, "rates": rates, "count": self._step_count}

        def load_state_dict(self, state_dict: Any) -> None:
            self.last_epoch, self._step_count = state_dict["epoch"], state_dict["count"]
            self._last_lr = list(state_dict["rates"])
            for group, lr in zip(self.optimizer.param_groups, state_dict["rates"], strict=True):
                group["lr"] = lr

    return lambda opt: Restoring(opt, 0.8)


@timed()
def clock_as_a_property(optim: Any) -> Any:
    """`last_epoch` is computed from a count of updates."""

    class Clocked(optim.lr_scheduler.LRScheduler):
        updates = -2

        @property
        def last_epoch(self) -> int:
            return self.updates // 2

        @last_epoch.setter
        def last_epoch(self, value: int) -> None:
            self.updates += 1

        def get_lr(self) -> Any:
            return [lr / (1 + self.last_epoch) for lr in self.base_lrs]

    return Clocked


@timed()
def rates_as_a_property(optim: Any) -> Any:
    """`base_lrs` is read from the groups, so that whoever changes those changes the schedule."""

    class Reading(optim.lr_scheduler.LRScheduler):
        @property
        def base_lrs(self) -> Any:
            return [group["initial_lr"] for group in self.optimizer.param_groups]

        @base_lrs.setter
        def base_lrs(self, value: Any) -> None:
            pass

        def get_lr(self) -> Any:
            return [lr * 0.9**self.last_epoch for lr in self.base_lrs]

    return Reading


@timed()
def compares_by_value(optim: Any) -> Any:
    """A dataclass: its objects are equal where their numbers are, and cannot be hashed."""

    @dataclasses.dataclass(repr=False)
    class Poly(optim.lr_scheduler.LRScheduler):
        given: Any
        total: int = 10
        power: float = 0.9

        def __post_init__(self) -> None:
            super().__init__(self.given)

        def get_lr(self) -> Any:
            return [lr * (1 - self.last_epoch / self.total) ** self.power for lr in self.base_lrs]

        def state_dict(self) -> Any:
            return {key: value for key, value in super().state_dict().items() if key != "given"}

    return Poly


@timed()
def abstract_schedule(optim: Any) -> Any:
    """A base of its own with an abstract factor, and a generic mixin."""

    class Base(optim.lr_scheduler.LRScheduler, abc.ABC, Generic[T]):
        @abc.abstractmethod
        def factor(self, t: int) -> T: ...

        def get_lr(self) -> Any:
            return [lr * self.factor(self.last_epoch) for lr in self.base_lrs]

    class InverseTime(Base[float]):
        def factor(self, t: int) -> float:
            return 1 / (1 + 0.5 * t)

    return InverseTime


@timed()
def sequence_of_its_own(optim: Any) -> Any:
    """Builds its members itself, and steps through them by the library's sequence."""

    schedulers = optim.lr_scheduler

    class WarmThenCosine(schedulers.SequentialLR):
        def __init__(self, optimizer: Any, warm: int, total: int) -> None:
            first = schedulers.LinearLR(optimizer, 0.1, total_iters=warm)
            then = schedulers.CosineAnnealingLR(optimizer, total - warm, 0.001)
            super().__init__(optimizer, [first, then], milestones=[warm])

        @property
        def phase(self) -> int:
            return bisect_right(self._milestones, self.last_epoch)

        def step(self) -> Any:
            super().step()
            return self.phase

    return lambda opt: WarmThenCosine(opt, 3, 10)


@timed()
def chain_of_its_own(optim: Any) -> Any:
    """A product of schedules, with a floor under it."""

    schedulers = optim.lr_scheduler

    class Floored(schedulers.ChainedScheduler):
        floor = 0.02

        def step(self) -> None:
            super().step()
            for group in self.optimizer.param_groups:
                group["lr"] = max(group["lr"], self.floor)
            self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    return lambda opt: Floored(
        [schedulers.ConstantLR(opt, 0.5, 2), schedulers.ExponentialLR(opt, 0.6)]
    )


@timed()
def no_scheduler_of_torchs(optim: Any) -> Any:
    """A scheduler that derives from nothing, with fields of its own in the groups and a scale for
    each layer."""

    class Scheduler:
        def __init__(self, optimizer: Any, field: str) -> None:
            self.optimizer, self.field, self.t = optimizer, field, 0
            for i, group in enumerate(optimizer.param_groups):
                group.setdefault(f"initial_{field}", group[field])
                group.setdefault("lr_scale", 0.5**i)

        def step(self) -> Any:
            self.t += 1
            for group in self.optimizer.param_groups:
                group[self.field] = group[f"initial_{self.field}"] * group["lr_scale"] / self.t
            return self.t

        def get_last_lr(self) -> Any:
            return [group["lr"] for group in self.optimizer.param_groups]

        last_epoch = property(lambda self: self.t)

        def state_dict(self) -> Any:
            return {key: value for key, value in self.__dict__.items() if key != "optimizer"}

        def load_state_dict(self, state_dict: Any) -> None:
            self.__dict__.update(state_dict)

    return lambda opt: Scheduler(opt, "lr")


@timed()
def function_in_the_constructor(optim: Any) -> Any:
    """A subclass of LambdaLR that gives it a local function."""

    class PolyLR(optim.lr_scheduler.LambdaLR):
        def __init__(
            self, optimizer: Any, total: int, power: float = 0.9, last_epoch: int = -1
        ) -> None:
            super().__init__(optimizer, lambda t: (1 - t / (total + 1)) ** power, last_epoch)

    return lambda opt: PolyLR(opt, 12)


SCHEDULERS["function_in_the_constructor"].fails["pickled"] = AttributeError


@timed()
def from_the_last_rates(optim: Any) -> Any:
    """Goes on from `get_last_lr`, and reads the base's own counters."""

    class Going(optim.lr_scheduler.LRScheduler):
        def get_lr(self) -> Any:
            if self._is_initial or self._step_count <= 1:
                return [group["lr"] for group in self.optimizer.param_groups]
            return [lr * (0.9 if self._step_count % 2 else 1.05) for lr in self.get_last_lr()]

    return Going


@timed()
def looks_ahead(optim: Any) -> Any:
    """Says what the next rates will be: by a copy of itself and of the optimizer, which it
    steps."""

    class Previewed(optim.lr_scheduler.CosineAnnealingLR):
        def preview(self, n: int) -> Any:
            other = copy.deepcopy(self)
            rates = []
            for _ in range(n):
                optim.lr_scheduler.CosineAnnealingLR.step(other)
                rates.append(other.get_last_lr())
            return rates

        def step(self, epoch: Any = None) -> Any:
            super().step(epoch)
            return self.preview(2) if self._step_count > 2 else None

    return lambda opt: Previewed(opt, 5)


@timed()
def logged_step(optim: Any) -> Any:
    """A decorator that wraps the step of the scheduler's class, and notes what it sees before and
    after."""

    def logged(step: Any) -> Any:
        @functools.wraps(step)
        def wrapper(self: Any, *args: Any, **options: Any) -> Any:
            before = [group["lr"] for group in self.optimizer.param_groups]
            step(self, *args, **options)
            return before, [group["lr"] for group in self.optimizer.param_groups]

        return wrapper

    class Logged(optim.lr_scheduler.LinearLR):
        step = logged(optim.lr_scheduler.LinearLR.step)

    return lambda opt: Logged(opt, 0.2, 0.8, 5)


@timed(of_a_metric)
def plateau_after_warm_up(optim: Any) -> Any:
    """Warms up by hand, and only then looks at metrics."""

    class WarmPlateau(optim.lr_scheduler.ReduceLROnPlateau):
        def __init__(self, optimizer: Any, warm: int, **options: Any) -> None:
            self.targets = [group["lr"] for group in optimizer.param_groups]
            super().__init__(optimizer, **options)
            self.warm, self.warmed = warm, 0

        def step(self, metrics: Any = None) -> None:
            if self.warmed >= self.warm:
                return super().step(metrics)
            self.warmed += 1
            for group, lr in zip(self.optimizer.param_groups, self.targets, strict=True):
                group["lr"] = lr * self.warmed / self.warm
            self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
            return None

    return lambda opt: WarmPlateau(opt, 3, patience=0, factor=0.5, min_lr=[0.001, 0.04])


@timed()
def plateau_that_asks(optim: Any) -> Any:
    """Finds its metric itself, tells when it has reduced the rate, and ends the training."""

    class Asking(optim.lr_scheduler.ReduceLROnPlateau):
        def __init__(self, optimizer: Any, ask: Any, **options: Any) -> None:
            super().__init__(optimizer, **options)
            self.ask = ask

        def step(self) -> Any:
            before = self.num_bad_epochs, self.best
            super().step(self.ask(self.last_epoch))
            ended = all(
                group["lr"] <= low
                for group, low in zip(self.optimizer.param_groups, self.min_lrs, strict=True)
            )
            return before, self.in_cooldown, ended

        def state_dict(self) -> Any:
            return {key: value for key, value in super().state_dict().items() if key != "ask"}

    return lambda opt: Asking(
        opt, wave, patience=1, factor=0.1, cooldown=1, threshold_mode="abs", mode="max"
    )


def wave(t: int) -> float:
    return math.sin(t * t)


@timed()
def several_schedules(optim: Any) -> Any:
    """A list of schedulers with the methods of one."""

    class Combined:
        def __init__(self, *schedulers: Any) -> None:
            self.schedulers = schedulers

        def step(self) -> Any:
            return [scheduler.step() for scheduler in self.schedulers]

        def get_last_lr(self) -> Any:
            return [rate for scheduler in self.schedulers for rate in scheduler.get_last_lr()]

        last_epoch = property(lambda self: self.schedulers[0].last_epoch)

        def state_dict(self) -> Any:
            return [scheduler.state_dict() for scheduler in self.schedulers]

        def load_state_dict(self, state_dict: Any) -> None:
            for scheduler, state in zip(self.schedulers, state_dict, strict=True):
                scheduler.load_state_dict(state)

    def build(opt: Any) -> Any:
        return Combined(
            optim.lr_scheduler.StepLR(opt, 2, 0.5), optim.lr_scheduler.PolynomialLR(opt, 9)
        )

    return build


@timed()
def cyclic_of_ones_own(optim: Any) -> Any:
    """A subclass of the library's cycle with smaller and smaller ones, and a report of the
    cycle."""

    class Fading(optim.lr_scheduler.CyclicLR):
        def __init__(self, optimizer: Any, low: float, high: float, half: int) -> None:
            super().__init__(
                optimizer, low, high, half, mode="exp_range", gamma=0.9, cycle_momentum=False
            )

        def get_lr(self) -> Any:
            return [lr / (1 + 0.1 * self.cycle) for lr in super().get_lr()]

        @property
        def cycle(self) -> int:
            return self.last_epoch // self.total_size

    return lambda opt: Fading(opt, 0.01, 0.1, 2)


@timed()
def a_context_around_the_epoch(optim: Any) -> Any:
    """Dampens the schedule's rates within a `with` block, and puts them back after it."""

    class Dampened(optim.lr_scheduler.StepLR):
        @contextlib.contextmanager
        def dampening(self, factor: float) -> Iterator[None]:
            kept = [group["lr"] for group in self.optimizer.param_groups]
            for group in self.optimizer.param_groups:
                group["lr"] *= factor
            yield
            for group, lr in zip(self.optimizer.param_groups, kept, strict=True):
                group["lr"] = lr

        def step(self, epoch: Any = None) -> None:
            with self.dampening(0.1):
                self.optimizer.step() if self._step_count else None
            super().step(epoch)

    return lambda opt: Dampened(opt, 2, 0.5)


@timed()
def groups_that_come_later(optim: Any) -> Any:
    """Adds a group in mid-run and tells the schedule of it, by its lists."""

    class Thawing(optim.lr_scheduler.LRScheduler):
        def thaw(self, params: Any, lr: float) -> None:
            self.optimizer.add_param_group({"params": params, "lr": lr, "initial_lr": lr})
            self.base_lrs.append(lr)
            self._last_lr.append(lr)

        def get_lr(self) -> Any:
            return [lr * 0.9**self.last_epoch for lr in self.base_lrs]

        def step(self, epoch: Any = None) -> None:
            if self.last_epoch == 4 and len(self.base_lrs) == 2:
                self.thaw([nn.Parameter(torch.ones(2, dtype=torch.float64))], 0.3)
            super().step(epoch)

    return Thawing


def scheduled_optimizer(name: str, optim: Any) -> Any:
    params = make_params()
    for p in params:
        p.grad = torch.ones_like(p)
    groups = [{"params": params[:1], "lr": 0.1, "weight_decay": 0.1}, {"params": params[1:]}]
    options = {"momentum": 0.9} if SCHEDULERS[name].kind == "SGD" else {"betas": (0.9, 0.99)}
    return getattr(optim, SCHEDULERS[name].kind)(groups, lr=0.05, **options)


@functools.cache
def schedule_builder(name: str, optim: Any) -> Callable[[Any], Any]:
    return SCHEDULERS[name].make(optim)


def begin(name: str, optim: Any) -> tuple[Any, Any]:
    opt = scheduled_optimizer(name, optim)
    return opt, schedule_builder(name, optim)(opt)


OPTIONS = ("lr", "initial_lr", "momentum", "betas", "weight_decay")


def rates(opt: Any, scheduler: Any) -> Any:
    options = [
        {key: plain(group[key]) for key in OPTIONS if key in group} for group in opt.param_groups
    ]
    return (
        options,
        list(scheduler.get_last_lr()),
        getattr(scheduler, "last_epoch", None),
        plain(params_of(opt)),
    )


def go(name: str, opt: Any, scheduler: Any, start: int, end: int) -> list[Any]:
    if not hasattr(scheduler, "_last_lr") and isinstance(
        scheduler, torch.optim.lr_scheduler.LRScheduler
    ):
        scheduler._last_lr = [group["lr"] for group in opt.param_groups]
    return [
        [SCHEDULERS[name].drive(scheduler, opt, t), rates(opt, scheduler)]
        for t in range(start, end)
    ]


def public(state: Any) -> Any:
    """The names in a state dict that are no private ones, which ours has some more of."""
    if isinstance(state, Mapping):
        shared = ("_step_count", "_last_lr", "_schedulers", "_milestones")
        return {
            key: public(value)
            for key, value in state.items()
            if not str(key).startswith("_") or key in shared
        }
    return [public(entry) for entry in state] if isinstance(state, (list, tuple)) else state


ROUNDS = 8


def schedule(name: str, optim: Any) -> Any:
    opt, scheduler = begin(name, optim)
    rows = [rates(opt, scheduler)] if hasattr(scheduler, "_last_lr") else []
    return (
        rows,
        go(name, opt, scheduler, 0, ROUNDS),
        public(getattr(scheduler, "state_dict", dict)()),
    )


def schedule_reopened(name: str, optim: Any, other: Any) -> Any:
    opt, scheduler = begin(name, optim)
    go(name, opt, scheduler, 0, 5)
    saved = through_a_file(
        [opt.state_dict(), scheduler.state_dict(), [p.detach() for p in params_of(opt)]]
    )
    opt, scheduler = begin(name, other)
    if len(saved[0]["param_groups"]) > 2:
        scheduler.thaw([nn.Parameter(torch.ones(2, dtype=torch.float64))], 0.3)
    with torch.no_grad():
        for p, weights in zip(params_of(opt), saved[2], strict=True):
            p.copy_(weights)
            p.grad = torch.ones_like(p)
    opt.load_state_dict(saved[0])
    scheduler.load_state_dict(saved[1])
    return go(name, opt, scheduler, 5, ROUNDS), public(scheduler.state_dict())


def schedule_resumed(name: str, optim: Any) -> Any:
    return schedule_reopened(name, optim, optim)


def schedule_duplicated(name: str, optim: Any, duplicate: Callable[[Any], Any]) -> Any:
    opt, scheduler = begin(name, optim)
    rows = go(name, opt, scheduler, 0, 5)
    publish(scheduler, optim)
    other, copied_scheduler = duplicate((opt, scheduler))
    assert getattr(copied_scheduler, "optimizer", other) is other
    for p, original in zip(params_of(other), params_of(opt), strict=True):
        p.grad = None if original.grad is None else original.grad.clone()
    before = rates(opt, scheduler)
    rows += go(name, other, copied_scheduler, 5, ROUNDS)
    assert_alike(rates(opt, scheduler), before, rtol=0)
    return rows, go(name, opt, scheduler, 5, ROUNDS)


def schedule_copied(name: str, optim: Any) -> Any:
    return schedule_duplicated(name, optim, copy.deepcopy)


def schedule_pickled(name: str, optim: Any) -> Any:
    return schedule_duplicated(name, optim, lambda both: pickle.loads(pickle.dumps(both)))


def schedule_refused(name: str, optim: Any) -> Any:
    """What is no optimizer; where torch looks at the groups first, their absence is its error, and
    ours is the same."""
    found = [
        error_of(lambda opt=opt: schedule_builder(name, optim)(opt))
        for opt in (None, nn.Linear(1, 1))
    ]
    return [None if error is None else error[0] in (TypeError, AttributeError) for error in found]


SCHEDULES = {
    f.__name__.removeprefix("schedule_"): f
    for f in (schedule, schedule_resumed, schedule_copied, schedule_pickled, schedule_refused)
}


def find_rates(prop: Callable[..., Any], name: str, *libraries: Any) -> Any:
    schedule_builder.cache_clear()
    return prop(name, *libraries)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("prop", SCHEDULES)
def test_schedulers(prop: str, name: str) -> None:
    error = SCHEDULERS[name].fails.get(prop)
    if error is not None:
        for optim in (torch.optim, onepass):
            with pytest.raises(error):
                find_rates(SCHEDULES[prop], name, optim)
        return
    theirs = find_rates(SCHEDULES[prop], name, torch.optim)
    assert_alike(find_rates(SCHEDULES[prop], name, onepass), theirs)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_checkpoints_of_schedulers_cross(name: str) -> None:
    wanted = find_rates(schedule_reopened, name, torch.optim, torch.optim)
    for first, second in ((torch.optim, onepass), (onepass, torch.optim)):
        assert_alike(find_rates(schedule_reopened, name, first, second)[0], wanted[0])
