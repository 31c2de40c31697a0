"""What a user may do to an optimizer between two steps, for `state_machine.py`: changes, damages,
and ways to step.

An action changes something and returns, or returns False where it does not fit. A damage makes the
next step impossible and returns what mends it, or None where it does not fit.
"""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import onepass
from support.state_machine import UNIT, Fault, Machine, Snapshot, is_used, numbers, plain

SKIP = int(os.environ.get("SKIP", 0))
Mend = Callable[[], Any]


@dataclass(frozen=True)
class Action:
    """Something to do with a machine, and how often it is chosen."""

    name: str
    run: Callable[[Machine], Any]
    weight: float
    descent: bool
    fits: Callable[[Machine], bool]


ACTIONS: list[Action] = []
DAMAGES: dict[str, Callable[[Machine], Mend | None]] = {}


def action(
    weight: float = 1.0,
    descent: bool = False,
    fits: Callable[[Machine], bool] = lambda machine: True,
) -> Callable[[Callable[[Machine], Any]], Callable[[Machine], Any]]:
    """Register an action; `descent` says that LBFGS, which needs a closure, can do with it too."""

    def register(function: Callable[[Machine], Any]) -> Callable[[Machine], Any]:
        def applies(machine: Machine) -> bool:
            return (descent or machine.kind.cls != "LBFGS") and fits(machine)

        ACTIONS.append(Action(function.__name__, function, weight, descent, applies))
        return function

    return register


def damage(
    descent: bool = False,
) -> Callable[[Callable[[Machine], Mend | None]], Callable[[Machine], Mend | None]]:
    """Register a damage: an action that tries to step in vain, mends, and steps."""

    def register(function: Callable[[Machine], Mend | None]) -> Callable[[Machine], Mend | None]:
        DAMAGES[function.__name__] = function

        def suffer(machine: Machine) -> Any:
            machine.set_gradients(missing=0.0)
            mend = function(machine)
            if mend is None:
                return False
            machine.fails()
            mend()
            return machine.step()

        suffer.__name__ = function.__name__
        action(weight=0.5, descent=descent)(suffer)
        return function

    return register


def has(option: str) -> Callable[[Machine], bool]:
    """Whether an algorithm has an option."""
    return lambda machine: option in machine.opt.param_groups[0]


def dense(machine: Machine) -> bool:
    return machine.kind.sparse != "only"


def has_state(machine: Machine) -> bool:
    return machine.kind.cls != "SGD" or "momentum" in machine.kind.options


# Ways to lay the same numbers.


def laid(values: Tensor, how: str) -> Tensor | None:
    """A copy of a tensor that lies in memory in another way."""
    if how == "transposed" and values.dim() > 1:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "holes":
        return torch.stack([values, values.flip(0) if values.dim() else values], -1)[..., 0]
    if how == "rows apart" and values.dim() > 1:
        return torch.cat([values, values], -1)[..., : values.shape[-1]]
    if how == "offset":
        return torch.cat([values.reshape(-1)[:1], values.reshape(-1)])[1:].view(values.shape)
    if how == "channels last" and values.dim() == 4:
        return values.contiguous(memory_format=torch.channels_last)
    return values.clone() if how == "dense" else None


LAYOUTS = ("transposed", "holes", "rows apart", "offset", "channels last", "dense")


def some_layout(machine: Machine, values: Tensor) -> Tensor:
    while True:
        found = laid(values, machine.choose.choice(LAYOUTS))
        if found is not None:
            return found


# Steps.


@action(weight=3.0, descent=True)
def step(machine: Machine) -> Any:
    machine.set_gradients()
    machine.step()


@action(descent=True)
def step_twice_with_the_same_gradients(machine: Machine) -> Any:
    machine.set_gradients()
    machine.step()
    machine.step()


@action()
def step_with_a_closure(machine: Machine) -> Any:
    def closure_of(look: Callable[[], None]) -> Callable[[], float]:
        def closure() -> float:
            assert torch.is_grad_enabled()
            machine.set_gradients()
            look()
            return 3.5

        return closure

    def how(look: Callable[[], None]) -> None:
        if machine.call(closure_of(look)) != 3.5:
            raise Fault("step has not returned what its closure has")

    machine.step_late(how)


@action()
def step_with_a_closure_that_raises(machine: Machine) -> Any:
    machine.set_gradients()
    kind = machine.choose.choice([ArithmeticError, KeyboardInterrupt, SystemExit])

    def closure() -> None:
        raise kind("no loss here")

    machine.fails(lambda: machine.call(closure), kind)
    machine.step()


@action()
def no_gradients_at_all(machine: Machine) -> Any:
    machine.set_gradients(missing=1.0)
    machine.step()


@action()
def gradients_of_few(machine: Machine) -> Any:
    machine.set_gradients(missing=0.7)
    machine.step()


@action(descent=True)
def drop_gradients(machine: Machine) -> Any:
    machine.opt.zero_grad()
    if any(p.grad is not None for p in machine.members()):
        raise Fault("zero_grad has left gradients")


@action(fits=dense)
def zero_gradients_in_place(machine: Machine) -> Any:
    machine.set_gradients()
    held = [p.grad for p in machine.members()]
    machine.opt.zero_grad(set_to_none=False)
    for p, g in zip(machine.members(), held, strict=True):
        if p.grad is not g or (g is not None and bool((g != 0).any())):
            raise Fault("zero_grad has not zeroed a gradient in place")
    machine.step()


@action(fits=dense)
def accumulate_gradients(machine: Machine) -> Any:
    machine.set_gradients()
    for p in machine.members():
        if p.grad is not None:
            p.grad += machine.values(p.shape, p.dtype)
    machine.step()


@action()
def under_enable_grad(machine: Machine) -> Any:
    machine.set_gradients()
    with torch.enable_grad():
        machine.step()
    if any(p.grad_fn is not None for p in machine.members()):
        raise Fault("a step under enable_grad was recorded")


@action(weight=0.5)
def under_inference_mode(machine: Machine) -> Any:
    machine.set_gradients()
    with torch.inference_mode():
        machine.step(may_raise=True)
    machine.set_gradients()
    machine.step(may_raise=True)
    clone_state(machine)


def clone_state(machine: Machine) -> None:
    """Put copies in the place of all state."""
    for p in machine.members():
        entry = machine.entry(p)
        for name in [name for name, t in entry.items() if isinstance(t, Tensor)]:
            entry[name] = entry[name].clone()


# Gradients as odd as they come.


def odd_gradient(name: str, fits: Callable[[Machine], bool] = dense) -> Any:
    """Register an action that gives some parameters, each with its shape and dtype, a gradient by a
    function."""

    def register(function: Callable[[Machine, Any], Tensor | None]) -> Any:
        def give(machine: Machine) -> Any:
            machine.set_gradients()
            given = 0
            for p in machine.members():
                if machine.choose.random() < 0.5 and (g := function(machine, p)) is not None:
                    p.grad, given = g, given + 1
            return machine.step() if given else False

        give.__name__ = f"gradient_{name}"
        action(weight=0.6, fits=fits)(give)
        return function

    return register


@odd_gradient("of_zeros")
def _zeros(machine: Machine, p: Any) -> Tensor:
    return torch.zeros_like(p.detach())


@odd_gradient("expanded")
def _expanded(machine: Machine, p: Any) -> Tensor | None:
    return machine.values(p.shape, p.dtype)[:1].expand(p.shape) if p.dim() else None


@odd_gradient("of_one_number")
def _of_one_number(machine: Machine, p: Any) -> Tensor:
    return machine.values((), p.dtype).expand(p.shape)


@odd_gradient("laid_otherwise")
def _laid(machine: Machine, p: Any) -> Tensor:
    return some_layout(machine, machine.values(p.shape, p.dtype))


@odd_gradient("that_views_a_buffer")
def _viewing(machine: Machine, p: Any) -> Tensor | None:
    buffer = machine.values((2 * p.numel() + 1,), p.dtype)
    for q in machine.members():
        if q.numel() <= p.numel() and q.dtype == p.dtype:
            q.grad = buffer[: q.numel()].view(q.shape)
    return buffer[1 : p.numel() + 1].view(p.shape)


@odd_gradient("shared_by_two")
def _shared(machine: Machine, p: Any) -> Tensor | None:
    g = machine.values(p.shape, p.dtype)
    for q in machine.members():
        if q.shape == p.shape and q.dtype == p.dtype:
            q.grad = g
    return g


@odd_gradient("negated")
def _negated(machine: Machine, p: Any) -> Tensor | None:
    if p.dtype not in (torch.float32, torch.float64):
        return None
    parts = machine.values(p.shape, p.dtype), machine.values(p.shape, p.dtype)
    return torch.complex(*parts).conj().imag


@odd_gradient("negated_and_dense")
def _negated_and_dense(machine: Machine, p: Any) -> Tensor | None:
    g = _negated(machine, p)
    stride = torch.empty(p.shape, device="meta").stride()
    return None if g is None else g.as_strided(p.shape, stride, machine.choose.choice([0, 1]))


@odd_gradient("negated_view")
def _negated_view(machine: Machine, p: Any) -> Tensor:
    return torch._neg_view(some_layout(machine, machine.values(p.shape, p.dtype)))


@odd_gradient("conjugated")
def _conjugated(machine: Machine, p: Any) -> Tensor | None:
    return some_layout(machine, machine.values(p.shape, p.dtype)).conj() if p.is_complex() else None


@odd_gradient("of_another_dtype")
def _of_another_dtype(machine: Machine, p: Any) -> Tensor | None:
    if p.is_complex() or not hasattr(p, "grad_dtype"):
        return None
    p.grad = None
    p.grad_dtype = None
    return machine.values(
        p.shape,
        machine.choose.choice([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    )


@odd_gradient("made_in_inference_mode")
def _inference(machine: Machine, p: Any) -> Tensor:
    with torch.inference_mode():
        return machine.values(p.shape, p.dtype).clone()


@odd_gradient("with_a_graph")
def _graph(machine: Machine, p: Any) -> Tensor:
    return machine.values(p.shape, p.dtype).requires_grad_() * 2


@odd_gradient("huge")
def _huge(machine: Machine, p: Any) -> Tensor:
    return machine.values(p.shape, p.dtype) * 1e30


@odd_gradient("tiny")
def _tiny(machine: Machine, p: Any) -> Tensor:
    return machine.values(p.shape, p.dtype) * 1e-30


@odd_gradient("without_numbers")
def _nan(machine: Machine, p: Any) -> Tensor:
    g = machine.values(p.shape, p.dtype)
    g.reshape(-1)[-1] = machine.choose.choice([math.nan, math.inf])
    return g


def takes_sparse(machine: Machine) -> bool:
    return machine.kind.sparse != ""


@odd_gradient("sparse", takes_sparse)
def _sparse(machine: Machine, p: Any) -> Tensor | None:
    return (
        machine.sparse_gradient(p)
        if p.dim() and not p.is_complex() and decays_not(machine)
        else None
    )


@odd_gradient("sparse_and_coalesced", takes_sparse)
def _coalesced(machine: Machine, p: Any) -> Tensor | None:
    g = _sparse(machine, p)
    return None if g is None else g.coalesce()


@odd_gradient("sparse_of_elements", takes_sparse)
def _elements(machine: Machine, p: Any) -> Tensor | None:
    if not p.dim() or p.is_complex() or not decays_not(machine):
        return None
    values = machine.values(p.shape, p.dtype)
    return (values * (values > 0)).to_sparse()


@odd_gradient("sparse_without_values", takes_sparse)
def _empty(machine: Machine, p: Any) -> Tensor | None:
    return (
        machine.sparse_gradient(p, 0)
        if p.dim() and not p.is_complex() and decays_not(machine)
        else None
    )


def decays_not(machine: Machine) -> bool:
    return all(float(group.get("weight_decay", 0)) == 0 for group in machine.opt.param_groups)


class Boom(Tensor):
    """A tensor whose operations raise, once, after so many of them."""

    left: int | None = None
    raises: Any = KeyboardInterrupt

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if Boom.left is not None:
            Boom.left -= 1
            if Boom.left < 0:
                Boom.left = None
                raise cls.raises
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def with_boom(machine: Machine, change: Callable[[Any], Any]) -> None:
    """Step with tensors of a class that interrupts at a random operation."""

    def how() -> None:
        Boom.left = machine.choose.randint(0, 40)
        try:
            machine.call()
        finally:
            Boom.left = None

    change(Boom)
    machine.step(how, may_raise=True)


@action(fits=dense)
def interrupted_by_a_gradient(machine: Machine) -> Any:
    machine.set_gradients()
    p = machine.any()
    with_boom(
        machine, lambda cls: setattr(p, "grad", machine.values(p.shape, p.dtype).as_subclass(cls))
    )
    p.grad = None


@action(fits=dense)
def interrupted_by_state(machine: Machine) -> Any:
    machine.set_gradients(missing=0.0)
    p = machine.any()
    names = machine.columns(p)
    if not names or (machine.shares(p) and SKIP):
        return False
    entry, name = machine.entry(p), machine.choose.choice(names)
    with_boom(machine, lambda cls: entry.update({name: entry[name].as_subclass(cls)}))
    entry[name] = plain(entry[name]).clone()
    return machine.step()


# Parameters: where they lie, and what they are.


@action(weight=2.0, descent=True)
def swap_data(machine: Machine) -> Any:
    p = machine.any()
    p.data = some_layout(machine, machine.values(p.shape, p.dtype))


@action(descent=True)
def lay_data_otherwise(machine: Machine) -> Any:
    for p in machine.params:
        p.data = some_layout(machine, p.detach())


@action(descent=True)
def set_memory(machine: Machine) -> Any:
    p = machine.any()
    with torch.no_grad():
        p.set_(machine.values(p.shape, p.dtype))


@action(descent=True)
def move_storage(machine: Machine) -> Any:
    p = machine.any()
    if not p.untyped_storage().resizable():
        return False
    saved = p.detach().clone()
    p.untyped_storage().resize_(p.untyped_storage().nbytes() + 4096)
    p.data.copy_(saved)
    return None


@action(descent=True)
def free_storage_and_restore(machine: Machine) -> Any:
    p = machine.any()
    storage, saved = p.untyped_storage(), p.detach().clone()
    size = storage.nbytes()
    if not storage.resizable():
        return False
    storage.resize_(0)
    storage.resize_(size)
    torch.empty(0, dtype=torch.uint8).set_(storage).zero_()
    p.data.copy_(saved)
    for q in machine.params:
        if not torch.isfinite(plain(q)).all():
            q.data.copy_(machine.values(q.shape, q.dtype))
    return None


@action(descent=True)
def resize_and_restore(machine: Machine) -> Any:
    p = machine.any()
    if not p.is_contiguous() or machine.shares(p) or not p.untyped_storage().resizable():
        return False
    p.grad, shape = None, p.shape
    p.data.resize_(100, 100)
    p.data.resize_(shape)
    p.data.copy_(machine.values(shape, p.dtype))
    return None


@action()
def swap_with_another_tensor(machine: Machine) -> Any:
    machine.opt.zero_grad()
    p = machine.any()
    torch.utils.swap_tensors(p, nn.Parameter(machine.values(p.shape, p.dtype)))


@action()
def cast_a_parameter(machine: Machine) -> Any:
    p = machine.any()
    if p.is_complex() or machine.shares(p):
        return False
    p.grad = None
    dtype = machine.choose.choice(
        [torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]
    )
    p.data = p.detach().to(dtype)
    return None


@action(descent=True)
def move_by_hand(machine: Machine) -> Any:
    for p in machine.params:
        p.data.add_(machine.values(p.shape, p.dtype), alpha=0.1)


@action()
def freeze_or_thaw(machine: Machine) -> Any:
    p = machine.any()
    p.requires_grad_(not p.requires_grad)


# What shares memory.


def pair(machine: Machine, fits: Callable[[Any, Any], bool]) -> tuple[Any, Any] | None:
    """Two parameters of one type, chosen by their shapes."""
    pairs = [
        (p, q) for p in machine.members() for q in machine.members() if p is not q and fits(p, q)
    ]
    return machine.choose.choice(pairs) if pairs else None


def put_together(
    machine: Machine, p: Any, q: Any, values: Tensor, first: Tensor, second: Tensor
) -> None:
    machine.opt.zero_grad()
    p.data, q.data = first, second
    for r in (p, q):
        if any(
            machine.entry(r)[name].is_complex() != values.is_complex()
            for name in machine.columns(r)
        ):
            machine.opt.state.pop(r)


@action()
def two_share_all_memory(machine: Machine) -> Any:
    found = pair(machine, lambda p, q: p.numel() == q.numel() > 1)
    if found is None or SKIP > 1:
        return False
    p, q = found
    values = machine.values((p.numel(),), p.dtype)
    put_together(machine, p, q, values, values.view(p.shape), values.view(q.shape))
    return None


@action()
def two_share_memory_transposed(machine: Machine) -> Any:
    found = pair(machine, lambda p, q: p.dim() == 2 and tuple(p.shape) == tuple(q.shape[::-1]))
    if found is None or SKIP > 1:
        return False
    p, q = found
    values = machine.values(p.shape, p.dtype)
    put_together(machine, p, q, values, values, values.t())
    return None


@action()
def two_overlap(machine: Machine) -> Any:
    found = pair(machine, lambda p, q: p.numel() > 3 and q.numel() > 3)
    if found is None or SKIP > 1:
        return False
    p, q = found
    n, m, gap = p.numel(), q.numel(), machine.choose.randint(0, 3)
    values = machine.values((n + m,), p.dtype)
    put_together(
        machine, p, q, values, values[:n].view(p.shape), values[gap : gap + m].view(q.shape)
    )
    return None


@action()
def two_interleave(machine: Machine) -> Any:
    """Their elements lie between one another's and touch nowhere."""
    found = pair(machine, lambda p, q: p.shape == q.shape or p.numel() == q.numel())
    if found is None:
        return False
    p, q = found
    values = machine.values((p.numel(), 2), p.dtype)
    first, second = (
        torch.as_strided(values, r.shape, [2 * s for s in torch.empty(r.shape).stride()], i)
        for i, r in ((0, p), (1, q))
    )
    put_together(machine, p, q, values, first, second)
    return None


@action(weight=2.0)
def share_nothing(machine: Machine) -> Any:
    for p in machine.params:
        p.data = p.detach().clone()


# State.


@action(fits=has_state)
def replace_state_tensors(machine: Machine) -> Any:
    for p in machine.members():
        for name in machine.columns(p):
            machine.entry(p)[name] = machine.entry(p)[name] * 0.5


@action(fits=has_state)
def swap_state_data(machine: Machine) -> Any:
    p = machine.any()
    for name in machine.columns(p):
        machine.entry(p)[name].data = machine.entry(p)[name].data.clone()


@action(fits=has_state)
def swap_state_tensors(machine: Machine) -> Any:
    p = machine.any()
    for name in machine.columns(p):
        torch.utils.swap_tensors(machine.entry(p)[name], machine.entry(p)[name].clone())


@action(fits=has_state)
def lay_state_otherwise(machine: Machine) -> Any:
    for p in machine.members():
        for name in machine.columns(p):
            if machine.choose.random() < 0.5:
                machine.entry(p)[name] = some_layout(machine, machine.entry(p)[name])


@action(fits=has_state)
def expand_state(machine: Machine) -> Any:
    machine.set_gradients(missing=0.0)
    p = machine.any()
    names = machine.columns(p)
    if not names or not p.dim() or SKIP:
        return False
    entry, name = machine.entry(p), machine.choose.choice(names)
    entry[name] = entry[name][:1].clone().expand(entry[name].shape)
    machine.step(may_raise=True)
    entry[name] = entry[name].clone()
    return machine.step()


@action(fits=has_state)
def cast_state(machine: Machine) -> Any:
    p = machine.any()
    dtype = machine.choose.choice([torch.float32, torch.float64, torch.bfloat16])
    for name in machine.columns(p):
        if not machine.entry(p)[name].is_complex():
            machine.entry(p)[name] = machine.entry(p)[name].to(dtype)


@action(fits=has_state)
def clear_state(machine: Machine) -> Any:
    machine.opt.state.clear()


@action(fits=has_state)
def clear_one_state(machine: Machine) -> Any:
    p = machine.any()
    if machine.choose.random() < 0.5:
        machine.opt.state.pop(p, None)
    else:
        machine.entry(p).clear()


@action(fits=has_state)
def delete_an_entry(machine: Machine) -> Any:
    """Where an entry is missing a step may raise, or begin that entry again."""
    machine.set_gradients(missing=0.0)
    p = machine.any()
    entry = machine.entry(p)
    if not entry:
        return False
    name = machine.choose.choice(list(entry))
    value = entry.pop(name)
    if not machine.step(may_raise=True):
        entry[name] = value
        machine.step()
    return None


@action(fits=has_state)
def exchange_states(machine: Machine) -> Any:
    found = pair(
        machine, lambda p, q: p.shape == q.shape and p.dtype == q.dtype and p in machine.opt.state
    )
    if found is None or found[1] not in machine.opt.state:
        return False
    p, q = found
    machine.opt.state[p], machine.opt.state[q] = machine.opt.state[q], machine.opt.state[p]
    return None


@action(weight=0.5, fits=has_state)
def share_state_with_processes(machine: Machine) -> Any:
    for p in machine.members():
        for value in machine.entry(p).values():
            if isinstance(value, Tensor) and value.is_contiguous() and value.storage_offset() == 0:
                value.share_memory_()


def counts_steps(machine: Machine) -> bool:
    return machine.kind.counts


@action(fits=counts_steps)
def replace_counts(machine: Machine) -> Any:
    for p in machine.members():
        entry = machine.entry(p)
        if "step" in entry and machine.choose.random() < 0.5:
            count = int(entry["step"]) + machine.choose.randint(0, 3)
            makers: list[Callable[[int], Any]] = [
                int,
                float,
                torch.tensor,
                lambda n: torch.tensor([float(n)]),
            ]
            makers += [
                lambda n: torch.tensor(float(n)),
                lambda n: torch.tensor(float(n), dtype=torch.float64),
            ]
            entry["step"] = machine.choose.choice(makers)(count)


@action(fits=counts_steps)
def fill_counts(machine: Machine) -> Any:
    for p in machine.members():
        if isinstance(machine.entry(p).get("step"), Tensor):
            machine.entry(p)["step"].fill_(17)


@action(fits=counts_steps)
def move_counts(machine: Machine) -> Any:
    for p in machine.members():
        count = machine.entry(p).get("step")
        if isinstance(count, Tensor):
            how = machine.choose.choice(["data", "set", "swap"])
            new = count.detach().clone()
            if how == "data":
                count.data = new
            elif how == "set":
                count.set_(new.untyped_storage(), 0, new.shape, new.stride())
            else:
                torch.utils.swap_tensors(count, new)


# Checkpoints and copies.


def values_of(value: Any) -> np.ndarray:
    """A state entry as an array: a tensor, a number, a list of these, or None."""
    if isinstance(value, list):
        return np.stack([values_of(v) for v in value]) if value else np.zeros(0)
    return (
        numbers(value)
        if isinstance(value, Tensor)
        else np.asarray(math.nan if value is None else value)
    )


def state_of(opt: Any) -> list[dict[str, np.ndarray]]:
    """The values of all state, by the parameters' places."""
    return [
        {name: values_of(v) for name, v in opt.state.get(p, {}).items()}
        for group in opt.param_groups
        for p in group["params"]
    ]


def check_same_state(
    before: list[dict[str, np.ndarray]], after: list[dict[str, np.ndarray]], unit: float = 0.0
) -> None:
    for i, (a, b) in enumerate(zip(before, after, strict=True)):
        if set(a) != set(b):
            raise Fault(f"state {i} has {sorted(b)} after {sorted(a)}")
        for name, values in a.items():
            if not np.allclose(
                values,
                b[name].reshape(values.shape),
                rtol=2 * unit,
                atol=unit * 1e-3,
                equal_nan=True,
            ):
                raise Fault(f"{name} of parameter {i} has changed")


def options_of(opt: Any) -> list[dict[str, Any]]:
    return [
        {
            key: repr(value)
            for key, value in group.items()
            if key not in ("params", "differentiable")
        }
        for group in opt.param_groups
    ]


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def reload(machine: Machine, saved: dict[str, Any], opt: Any, unit: float = 0.0) -> None:
    """Load a state dict, and compare what is there then with what was there when it was saved."""
    state, options = state_of(machine.opt), options_of(machine.opt)
    opt.load_state_dict(saved)
    check_same_state(state, state_of(opt), unit)
    for a, b in zip(options, options_of(opt), strict=True):
        different = {key: (a.get(key), b.get(key)) for key in {*a, *b} if a.get(key) != b.get(key)}
        if different:
            raise Fault(f"options have changed: {different}")
    machine.opt = opt


@action(descent=True)
def take_the_state_dict(machine: Machine) -> Any:
    with machine.unchanged():
        machine.opt.state_dict()


@action(descent=True)
def reload_own_state(machine: Machine) -> Any:
    reload(machine, machine.opt.state_dict(), machine.opt)


@action(descent=True)
def load_into_a_new_optimizer(machine: Machine) -> Any:
    groups = [{"params": list(group["params"])} for group in machine.opt.param_groups]
    saved = machine.opt.state_dict()
    reload(
        machine,
        through_a_file(saved) if machine.choose.random() < 0.5 else saved,
        machine.make(groups),
    )


@action(descent=True)
def save_and_load(machine: Machine) -> Any:
    reload(machine, through_a_file(machine.opt.state_dict()), machine.opt)


@action(descent=True)
def go_through_torch(machine: Machine) -> Any:
    """torch casts the state to the parameter's type; all else must come back as it was."""
    groups = [{"params": list(group["params"])} for group in machine.opt.param_groups]
    theirs = getattr(torch.optim, machine.kind.cls)(groups, lr=0.01)
    theirs.load_state_dict(machine.opt.state_dict())
    reload(machine, theirs.state_dict(), machine.opt, UNIT[torch.bfloat16])


@action(weight=0.5, descent=True)
def deepcopy_both(machine: Machine) -> Any:
    go_on_with_copies(machine, copy.deepcopy)


@action(weight=0.5, descent=True)
def pickle_both(machine: Machine) -> Any:
    go_on_with_copies(machine, lambda value: pickle.loads(pickle.dumps(value)))


def go_on_with_copies(machine: Machine, copied: Callable[[Any], Any]) -> None:
    """Copies step, and the originals stay as they are."""
    machine.opt.zero_grad()
    for p in machine.params:
        p.grad = None
    params, opt = machine.params, machine.opt
    state, options = state_of(opt), options_of(opt)
    before = Snapshot(params, opt)
    machine.params, machine.opt = copied((params, opt))
    check_same_state(state, state_of(machine.opt))
    if options_of(machine.opt) != options:
        raise Fault("options have changed")
    machine.go_on()
    different = before.differences(Snapshot(params, opt))
    if different:
        raise Fault(f"a step of a copy has changed the original's {different}")


@action(weight=0.5, descent=True)
def copy_shallow(machine: Machine) -> Any:
    machine.opt = copy.copy(machine.opt)


# Groups.


@action()
def add_a_group(machine: Machine) -> Any:
    if len(machine.members()) > 8:
        return False
    shape = machine.choose.choice(machine.kind.shapes)
    p = nn.Parameter(machine.values(shape, machine.dtype()))
    machine.params.append(p)
    machine.opt.add_param_group({"params": [p], "lr": 0.02})
    return None


@action()
def add_a_wrong_group(machine: Machine) -> Any:
    bad: list[Any] = [{"params": [machine.any()]}, {"lr": 0.1}, {"params": [1.0]}, 3]
    with machine.unchanged():
        try:
            machine.opt.add_param_group(machine.choose.choice(bad))
        except (ValueError, TypeError, KeyError):
            return
        raise Fault("a wrong group was added")


@action()
def replace_a_parameter(machine: Machine) -> Any:
    former = machine.any()
    new = nn.Parameter(machine.values(former.shape, former.dtype))
    machine.params = [new if p is former else p for p in machine.params]
    for group in machine.opt.param_groups:
        group["params"] = [new if p is former else p for p in group["params"]]
    entry = machine.opt.state.pop(former, None)
    if entry is not None and machine.choose.random() < 0.5:
        machine.opt.state[new] = entry


@action()
def replace_a_parameter_in_its_list(machine: Machine) -> Any:
    group = machine.choose.choice(machine.opt.param_groups)
    i = machine.choose.randrange(len(group["params"]))
    former = group["params"][i]
    new = nn.Parameter(machine.values(former.shape, former.dtype))
    machine.params = [new if p is former else p for p in machine.params]
    group["params"][i] = new
    machine.opt.state.pop(former, None)


@action()
def reorder_parameters(machine: Machine) -> Any:
    group = machine.choose.choice(machine.opt.param_groups)
    if machine.choose.random() < 0.5:
        machine.choose.shuffle(group["params"])
    else:
        group["params"] = group["params"][::-1]


@action()
def remove_a_parameter(machine: Machine) -> Any:
    group = machine.choose.choice(machine.opt.param_groups)
    if len(machine.members()) < 5:
        return False
    p = group["params"].pop(machine.choose.randrange(len(group["params"])))
    machine.params = [q for q in machine.params if q is not p]
    machine.opt.state.pop(p, None)
    if not group["params"]:
        machine.opt.param_groups.remove(group)
    return None


@action()
def move_between_groups(machine: Machine) -> Any:
    source, target = (machine.choose.choice(machine.opt.param_groups) for _ in range(2))
    if source is target or len(source["params"]) < 2:
        return False
    target["params"].append(source["params"].pop())
    return None


# Options.


@action(weight=2.0, descent=True)
def change_lr(machine: Machine) -> Any:
    for group in machine.opt.param_groups:
        group["lr"] = machine.choose.choice([0.0, 0.001, 0.01, 0.05, 0.1])


@action(descent=True)
def lr_becomes_a_tensor(machine: Machine) -> Any:
    for group in machine.opt.param_groups:
        group["lr"] = torch.tensor(machine.choose.choice([0.01, 0.05]), dtype=torch.float64)


@action(fits=has("betas"))
def change_betas(machine: Machine) -> Any:
    for group in machine.opt.param_groups:
        group["betas"] = machine.choose.choice([(0.9, 0.999), (0.8, 0.95), (0.5, 0.7), [0.9, 0.99]])


@action(fits=has("weight_decay"))
def change_decay(machine: Machine) -> Any:
    for group in machine.opt.param_groups:
        group["weight_decay"] = machine.choose.choice([0, 0.0, 0.1, 0.3])


def flag_action(name: str) -> None:
    """Register the switching of a flag, in some groups."""

    def switch(machine: Machine) -> Any:
        for group in machine.opt.param_groups:
            if machine.choose.random() < 0.7:
                group[name] = not group[name]

    switch.__name__ = f"switch_{name}"
    # AdamW is decoupled whatever its groups say.
    action(
        weight=0.7,
        fits=lambda machine: has(name)(machine) and (name[0] != "d" or machine.kind.cls != "AdamW"),
    )(switch)


for _name in ("amsgrad", "maximize", "centered", "decoupled_weight_decay"):
    flag_action(_name)


def is_nesterov(machine: Machine) -> bool:
    return "nesterov" in machine.opt.param_groups[0]


@action(weight=2.0, fits=has("momentum"))
def change_momentum(machine: Machine) -> Any:
    for group in machine.opt.param_groups:
        group["momentum"] = machine.choose.choice(
            [0.0, 0.5, 0.9] if machine.kind.cls != "Muon" else [0.5, 0.9]
        )
        if is_nesterov(machine):
            group["nesterov"] = bool(group["momentum"]) and machine.choose.random() < 0.5
        if "dampening" in group:
            group["dampening"] = 0.0 if group["nesterov"] else machine.choose.choice([0.0, 0.3])


@action(weight=2.0)
def switch_backend(machine: Machine) -> Any:
    eager = machine.choose.random() < 0.5
    for group in machine.opt.param_groups:
        group.update(
            {"foreach": False, "fused": False} if eager else {"foreach": None, "fused": None}
        )


@action(descent=True)
def change_threads(machine: Machine) -> Any:
    torch.set_num_threads(machine.choose.choice([1, 2]))


# Hooks.


@action()
def hook_that_changes_gradients(machine: Machine) -> Any:
    machine.set_gradients()

    def how(look: Callable[[], None]) -> None:
        def hook(*_: Any) -> None:
            machine.set_gradients()
            look()

        handle = machine.opt.register_step_pre_hook(hook)
        try:
            machine.call()
        finally:
            handle.remove()

    machine.step_late(how)


@action()
def hook_that_raises(machine: Machine) -> Any:
    machine.set_gradients()

    def hook(*_: Any) -> None:
        raise ArithmeticError("from a hook")

    handle = machine.opt.register_step_pre_hook(hook)
    machine.fails(kind=ArithmeticError)
    handle.remove()
    machine.step()


@action()
def hook_after_a_step_that_raises(machine: Machine) -> Any:
    """The step has been taken then, whole."""
    machine.set_gradients()

    def hook(*_: Any) -> None:
        raise ArithmeticError("from a hook")

    def how() -> None:
        handle = machine.opt.register_step_post_hook(hook)
        try:
            machine.call()
        except ArithmeticError:
            return
        finally:
            handle.remove()
        raise Fault("a hook was not called")

    machine.step(how)


@action()
def hook_after_a_step_that_saves(machine: Machine) -> Any:
    machine.set_gradients()
    handle = machine.opt.register_step_post_hook(
        lambda opt, *_: machine.kept.append(opt.state_dict())
    )
    machine.step()
    handle.remove()
    machine.kept.clear()


# Damages: no step can be taken, and nothing may have changed.


def put(target: Any, name: Any, value: Any) -> Mend:
    """Set an entry of a dict; what it returns puts back what was there."""
    missing = object()
    former = target.get(name, missing)
    target[name] = value
    return lambda: target.pop(name) if former is missing else target.update({name: former})


@damage()
def parameter_without_storage(machine: Machine) -> Mend | None:
    p = machine.any()
    storage = p.untyped_storage()
    if not storage.resizable():
        return None
    saved, size = content_of(storage), storage.nbytes()
    # Of what the parameter needs, the last byte is missing, or all.
    last = (
        p.storage_offset()
        + 1
        + sum((n - 1) * step for n, step in zip(p.shape, p.stride(), strict=True))
    )
    storage.resize_(machine.choose.choice([0, last * p.itemsize - 1]) if p.numel() else 0)

    def mend() -> None:
        storage.resize_(size)
        torch.empty(0, dtype=torch.uint8).set_(storage).copy_(saved)

    return mend


def content_of(storage: Any) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage).clone()


@damage()
def gradient_without_storage(machine: Machine) -> Mend | None:
    p = machine.any()
    g = p.grad
    part = g._values() if g.layout != torch.strided else g
    if not part.numel() or not part.untyped_storage().resizable():
        return None
    part.untyped_storage().resize_(0)
    return lambda: setattr(p, "grad", machine.gradient(p))


def some_column(machine: Machine) -> tuple[dict[str, Any], str] | None:
    """A state entry that is a column, of a parameter that has some."""
    found = [(p, name) for p in machine.members() for name in machine.columns(p)]
    if not found:
        return None
    p, name = machine.choose.choice(found)
    return (machine.entry(p), name) if is_used(group_of(machine, p), name) else None


@damage()
def state_without_storage(machine: Machine) -> Mend | None:
    found = some_column(machine)
    if found is None:
        return None
    entry, name = found
    storage = entry[name].untyped_storage()
    if not storage.resizable() or not storage.nbytes():
        return None
    former = entry[name].clone()
    entry[name].untyped_storage().resize_(0)
    return lambda: entry.update({name: former})


@damage()
def state_of_another_shape(machine: Machine) -> Mend | None:
    found = some_column(machine)
    if found is None:
        return None
    entry, name = found
    shape = (*entry[name].shape, 2) if machine.choose.random() < 0.5 else (5, 3, 1)
    return put(entry, name, machine.values(shape, entry[name].dtype))


@damage()
def state_of_another_kind(machine: Machine) -> Mend | None:
    found = some_column(machine)
    if found is None:
        return None
    entry, name = found
    shape = entry[name].shape
    kinds: list[Any] = [
        "text",
        3.5,
        [1, 2],
        torch.zeros(shape, dtype=torch.int32),
        torch.zeros(shape, device="meta"),
    ]
    kinds += [
        torch.zeros(shape, dtype=torch.bool),
        torch.zeros(shape).numpy(),
        torch.zeros(shape).to_sparse(),
        object(),
    ]
    return put(entry, name, machine.choose.choice(kinds))


@damage()
def state_that_lacks_an_entry(machine: Machine) -> Mend | None:
    p = machine.any()
    entry = machine.entry(p)
    required = [name for name in machine.kind.required if entry.get(name) is not None]
    if len(required) < 2:
        return None
    name = machine.choose.choice(required)
    former = entry.pop(name)
    return lambda: entry.update({name: former})


@damage()
def state_that_is_no_dict(machine: Machine) -> Mend | None:
    p = machine.any()
    if machine.kind.cls == "SGD" and not group_of(machine, p)["momentum"]:
        return None
    return put(machine.opt.state, p, machine.choose.choice([[], 3, torch.zeros(2), "text"]))


@damage()
def state_made_in_inference_mode(machine: Machine) -> Mend | None:
    found = some_column(machine)
    if found is None:
        return None
    entry, name = found
    with torch.inference_mode():
        return put(entry, name, torch.ones(entry[name].shape, dtype=entry[name].dtype))


@damage()
def count_of_no_use(machine: Machine) -> Mend | None:
    entries = [machine.entry(p) for p in machine.members() if "step" in machine.entry(p)]
    if not entries:
        return None
    bad: list[Any] = ["five", [5], torch.ones(2), torch.ones(0), {}]
    return put(machine.choose.choice(entries), "step", machine.choose.choice(bad))


@damage(descent=True)
def parameter_expanded(machine: Machine) -> Mend | None:
    p = machine.any()
    if p.numel() < 2:
        return None
    former, shape = p.data, p.shape
    p.data = machine.values((), p.dtype).expand(shape)
    return lambda: setattr(p, "data", former)


@damage()
def parameter_with_holes_then_expanded(machine: Machine) -> Mend | None:
    p = machine.any()
    if p.numel() < 2:
        return None
    p.data = laid(p.detach(), "holes")
    machine.step()
    former, shape = p.data, p.shape
    p.data = (
        machine.values(shape, p.dtype)[:1].expand(shape)
        if shape[0] > 1
        else machine.values((), p.dtype).expand(shape)
    )
    return lambda: setattr(p, "data", former)


@damage()
def parameter_of_another_shape(machine: Machine) -> Mend | None:
    p = machine.any()
    former = p.data
    p.data = machine.values((5, 3), p.dtype)
    return lambda: setattr(p, "data", former)


@damage()
def parameter_made_in_inference_mode(machine: Machine) -> Mend | None:
    with torch.inference_mode():
        p = machine.values(machine.kind.shapes[0])
        g = machine.sparse_gradient(p) if machine.kind.sparse == "only" else machine.values(p.shape)
        p.grad = g.clone()
    params = machine.opt.param_groups[0]["params"]
    params.append(p)
    return lambda: params.pop()


@damage()
def gradient_of_another_shape(machine: Machine) -> Mend | None:
    p = machine.any()
    if p.grad.layout != torch.strided:
        return None
    p.grad.data = machine.values((5, 3, 2), p.dtype)
    return lambda: setattr(p, "grad", machine.gradient(p))


@damage()
def gradient_of_another_kind(machine: Machine) -> Mend | None:
    p = machine.any()
    if p.grad.layout != torch.strided:
        return None
    wrong = torch.float32 if p.is_complex() else torch.complex64
    p.grad.data = torch.zeros(
        p.shape, dtype=machine.choose.choice([torch.int32, torch.bool, wrong])
    )
    return lambda: setattr(p, "grad", machine.gradient(p))


def group_of(machine: Machine, p: Any) -> dict[str, Any]:
    return next(group for group in machine.opt.param_groups if any(q is p for q in group["params"]))


@damage()
def gradient_of_a_layout_not_taken(machine: Machine) -> Mend | None:
    p = machine.any()
    if machine.kind.sparse == "only":
        p.grad = machine.values(p.shape, p.dtype)
    elif (
        not p.dim()
        or p.is_complex()
        or (takes_sparse(machine) and not group_of(machine, p).get("weight_decay"))
    ):
        return None
    else:
        p.grad = machine.sparse_gradient(p, 3)
    return lambda: setattr(p, "grad", machine.gradient(p))


@damage(descent=True)
def option_of_no_use(machine: Machine) -> Mend | None:
    group = machine.choose.choice(machine.opt.param_groups)
    bad: list[tuple[str, Any]] = [("lr", torch.ones(2)), ("lr", "0.1"), ("lr", None), ("lr", [0.1])]
    bad += [
        ("betas", (0.9,)),
        ("betas", 0.9),
        ("betas", (0.9, "x")),
        ("weight_decay", 1j),
        ("eps", "tiny"),
    ]
    bad += [
        ("amsgrad", "yes"),
        ("maximize", 3),
        ("centered", [True]),
        ("momentum", "0.9"),
        ("etas", (0.5,)),
    ]
    name, value = machine.choose.choice([(name, value) for name, value in bad if name in group])
    # The first is read once, the second by groups without matrices.
    if (machine.kind.cls, name) in (("Rprop", "lr"), ("Muon", "betas")):
        return None
    return put(group, name, value)


@damage(descent=True)
def option_that_is_gone(machine: Machine) -> Mend | None:
    group = machine.choose.choice(machine.opt.param_groups)
    if machine.kind.cls == "Rprop":
        return None
    former = group.pop("lr")
    return lambda: group.update(lr=former)


@damage()
def nested_step(machine: Machine) -> Mend | None:
    """A tensor's own operation steps the optimizer that reads it."""
    if not dense(machine):
        return None
    p = machine.any()

    class Nested(Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            with torch._C.DisableTorchFunctionSubclass():
                if func in (
                    Tensor.add,
                    Tensor.mul,
                    Tensor.to,
                    Tensor.sub,
                    Tensor.neg,
                    torch.lerp,
                    Tensor.__rmul__,
                ):
                    machine.call()
                return func(*args, **(kwargs or {}))

    p.grad = machine.values(p.shape, p.dtype).as_subclass(Nested)
    machine.step(may_raise=True)
    p.grad = None
    return None


@action(weight=2.0)
def several_damages(machine: Machine) -> Any:
    machine.set_gradients(missing=0.0)
    names = machine.choose.sample(
        sorted(set(DAMAGES) - {"nested_step", "parameter_with_holes_then_expanded"}), 3
    )
    mends = []
    for name in names:
        try:
            mend = DAMAGES[name](machine)
        except (RuntimeError, TypeError, AttributeError, KeyError, IndexError):
            # It cannot be done to what another one has damaged.
            continue
        if mend is not None:
            mends.append(mend)
    if not mends:
        return False
    machine.fails()
    for mend in reversed(mends):
        mend()
    for p in machine.members():
        p.grad = machine.gradient(p)
    return machine.step()


# Of an algorithm that needs a closure.


class DescentMachine(Machine):
    """LBFGS beside torch's, which does the same operations in the same order: bits agree."""

    def set_gradients(self, missing: float = 0.1) -> None:
        for p in self.params:
            p.grad = None

    def check_unchanged(self, before: Snapshot, error: BaseException) -> None:
        # Closures make gradients.
        after = Snapshot(self.params, self.opt)
        after.seen["gradients"] = before.seen["gradients"]
        if different := before.differences(after):
            raise Fault(
                f"a step that raised {type(error).__name__}: {error} -- has changed {different}"
            ) from error

    def call(self, closure: Any = None) -> Any:
        return super().call(self.closure() if closure is None else closure)

    def step(self, how: Callable[[], Any] | None = None, may_raise: bool = False) -> bool:
        how = self.call if how is None else how
        before = Snapshot(self.params, self.opt)
        twin = Machine.__new__(Machine)
        twin.params = [
            nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format))
            for p in self.members()
        ]
        twin.opt = torch.optim.LBFGS(twin.params, lr=0.1)
        twin.opt.load_state_dict(copy.deepcopy(self.opt.state_dict()))
        group, memory = self.opt.param_groups[0], twin.opt.state[twin.params[0]]
        # What torch writes before it reads; it does not make it longer where the history has become
        # so.
        memory.pop("al", None)
        # Nor does torch shorten a history of which less is wanted.
        for name in ("old_dirs", "old_stps", "ro"):
            memory.update({name: memory[name][-group["history_size"] :]} if name in memory else {})
        stays = bool(group["line_search_fn"]) and float(group["lr"]) == 0
        how()
        if stays:
            # torch divides by the distance of two trials that are one.
            if before.seen["parameters"] != Snapshot(self.params, self.opt).seen["parameters"]:
                raise Fault("a step with a rate of 0 has changed a parameter")
            self.counts["steps"] += 1
            return True
        twin.call(twin.closure())
        after = Snapshot(self.params, self.opt)
        if (
            before.seen["options"] != after.seen["options"]
            or before.seen["groups"] != after.seen["groups"]
        ):
            raise Fault("a step has changed options or groups")
        for p, q in zip(self.members(), twin.params, strict=True):
            same = np.array_equal(numbers(p), numbers(q), equal_nan=True)
            if not same:
                raise Fault(f"a parameter of {tuple(p.shape)} is not where torch's is")
            self.counts["elements compared"] += p.numel()
        mine, theirs = self.entry(self.members()[0]), twin.opt.state[twin.params[0]]
        for name in ("func_evals", "n_iter", "d", "prev_flat_grad"):
            a, b = values_of(mine.get(name)), values_of(theirs.get(name))
            if not np.array_equal(a, b, equal_nan=True):
                raise Fault(f"{name} is not torch's")
        self.counts["steps"] += 1
        return True

    def mend(self) -> None:
        odd = any(not torch.isfinite(p).all() or p.abs().max() > 50 for p in self.params)
        if odd:
            for p in self.params:
                p.data.copy_(self.values(p.shape))
            self.opt.state.clear()
            self.counts["mended"] += 1


def is_descent(machine: Machine) -> bool:
    return machine.kind.cls == "LBFGS"


def memory_of(machine: Machine) -> dict[str, Any] | None:
    entry = machine.entry(machine.members()[0])
    return entry if entry.get("d") is not None else None


@action(descent=True, fits=is_descent)
def descent_without_a_closure(machine: Machine) -> Any:
    machine.fails(lambda: machine.opt.step(), TypeError)


@action(descent=True, fits=is_descent)
def descent_by_a_closure_that_raises_at_once(machine: Machine) -> Any:
    def closure() -> None:
        raise KeyboardInterrupt

    machine.fails(lambda: machine.call(closure), KeyboardInterrupt)
    machine.step()


@action(descent=True, fits=is_descent)
def descent_by_a_closure_that_leaves_no_memory(machine: Machine) -> Any:
    """Parameters are looked at once a closure was called, as it may be what brings them."""
    p, good = machine.any(), machine.closure()
    former = p.data

    def closure() -> Any:
        loss = good()
        p.data = former.clone()
        p.untyped_storage().resize_(0)
        return loss

    def how() -> None:
        try:
            machine.call(closure)
        finally:
            p.data = former

    machine.fails(how, onepass.StepError)
    machine.step()


@action(weight=2.0, descent=True, fits=is_descent)
def descent_by_a_closure_that_raises_later(machine: Machine) -> Any:
    """It ends where the last whole iteration did: from there all goes on as torch's does."""
    good, left = machine.closure(), [machine.choose.randint(1, 4)]

    def closure() -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return good()

    try:
        machine.call(closure)
    except KeyboardInterrupt:
        machine.counts["steps that raised"] += 1
    machine.step()


@action(descent=True, fits=is_descent)
def descent_searches(machine: Machine) -> Any:
    group = machine.opt.param_groups[0]
    group["line_search_fn"] = None if group["line_search_fn"] else "strong_wolfe"


@action(descent=True, fits=is_descent)
def descent_remembers_more_or_less(machine: Machine) -> Any:
    machine.opt.param_groups[0].update(
        history_size=machine.choose.choice([1, 3, 7]), max_iter=machine.choose.choice([1, 4])
    )


@action(descent=True, fits=is_descent)
def descent_begins_again(machine: Machine) -> Any:
    machine.opt.state.clear()


@action(descent=True, fits=is_descent)
def descent_state_is_copied(machine: Machine) -> Any:
    entry = memory_of(machine)
    if entry is None:
        return False
    entry.update(d=entry["d"].clone(), prev_flat_grad=laid(entry["prev_flat_grad"], "holes"))
    entry["old_dirs"] = [v.clone() for v in entry["old_dirs"]]
    return None


@action(descent=True, fits=is_descent)
def descent_state_is_shared(machine: Machine) -> Any:
    entry = memory_of(machine)
    if entry is None:
        return False
    for name in ("d", "prev_flat_grad"):
        entry[name] = entry[name].clone().share_memory_()
    return None


@damage(descent=True)
def descent_state_of_another_shape(machine: Machine) -> Mend | None:
    entry = memory_of(machine) if is_descent(machine) else None
    if entry is None:
        return None
    return put(entry, machine.choose.choice(["d", "prev_flat_grad"]), torch.zeros(3))


@damage(descent=True)
def descent_state_that_lacks_an_entry(machine: Machine) -> Mend | None:
    entry = memory_of(machine) if is_descent(machine) else None
    if entry is None:
        return None
    name = machine.choose.choice(
        ["d", "t", "old_dirs", "old_stps", "ro", "H_diag", "prev_flat_grad", "prev_loss"]
    )
    former = entry.pop(name)
    return lambda: entry.update({name: former})


@damage(descent=True)
def descent_state_of_another_kind(machine: Machine) -> Mend | None:
    entry = memory_of(machine) if is_descent(machine) else None
    if entry is None:
        return None
    name = machine.choose.choice(["d", "t", "ro", "H_diag", "n_iter"])
    return put(entry, name, machine.choose.choice(["text", object(), {}]))


@action(weight=2.0, descent=True, fits=is_descent)
def descent_order_changes(machine: Machine) -> Any:
    """The history belongs to the order: it is dropped."""
    params = machine.opt.param_groups[0]["params"]
    machine.choose.shuffle(params)
    machine.opt.state.clear()


@action(weight=2.0, descent=True, fits=is_descent)
def descent_by_gradients_laid_otherwise(machine: Machine) -> Any:
    """A closure puts other layouts of its gradients, or lazily negated ones, in their place."""

    def closure() -> Any:
        loss = good()
        for p in machine.params:
            lying = some_layout(machine, p.grad.detach())
            p.grad = torch._neg_view(-lying) if machine.choose.random() < 0.3 else lying
        return loss

    good = machine.closure()
    machine.step(lambda: machine.call(closure))


@action(descent=True, fits=is_descent)
def descent_with_hooks(machine: Machine) -> Any:
    seen = []
    handles = [machine.opt.register_step_pre_hook(lambda *_: seen.append("before"))]
    handles.append(
        machine.opt.register_step_post_hook(lambda opt, *_: seen.append(opt.state_dict()))
    )
    machine.step()
    for handle in handles:
        handle.remove()
    if len(seen) != 2:
        raise Fault("hooks were not called")


@action(descent=True, fits=is_descent)
def descent_under_modes_of_autograd(machine: Machine) -> Any:
    with machine.choose.choice([torch.enable_grad, torch.no_grad])():
        machine.step()
    if any(p.grad_fn is not None for p in machine.members()):
        raise Fault("a step was recorded")


@action(descent=True, fits=is_descent)
def descent_tolerates_more_or_less(machine: Machine) -> Any:
    machine.opt.param_groups[0].update(
        tolerance_change=machine.choose.choice([1e-9, 1e-3]),
        tolerance_grad=machine.choose.choice([1e-7, 1e-2]),
    )


@damage(descent=True)
def descent_option_of_no_use(machine: Machine) -> Mend | None:
    if not is_descent(machine):
        return None
    bad: list[tuple[str, Any]] = [
        ("max_iter", "many"),
        ("history_size", 0),
        ("line_search_fn", "armijo"),
    ]
    return put(machine.opt.param_groups[0], *machine.choose.choice(bad))
