"""The same sequence of operations on onepass and on torch.optim, and whether they end up in the
same place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import onepass

SHAPES = ((4, 3), (5,), (), (2, 3, 4, 4))
# float32 arithmetic in another order: a few units in the last place, over a few steps.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}

ALGORITHMS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"lr": 0.1}),
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05}),
    "nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adam": ("Adam", {"lr": 0.05, "weight_decay": 0.1}),
    "adamw": ("AdamW", {"lr": 0.05}),
    "amsgrad": ("AdamW", {"lr": 0.05, "amsgrad": True, "maximize": True}),
    "adagrad": (
        "Adagrad",
        {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.05, "initial_accumulator_value": 0.1},
    ),
    "rmsprop": ("RMSprop", {"lr": 0.01, "alpha": 0.9, "weight_decay": 0.05}),
    "centered": ("RMSprop", {"lr": 0.01, "alpha": 0.9, "momentum": 0.8, "centered": True}),
    "adadelta": ("Adadelta", {"lr": 1.0, "eps": 1e-3, "weight_decay": 0.05}),
    "adamax": ("Adamax", {"lr": 0.05, "weight_decay": 0.1}),
    "nadam": ("NAdam", {"lr": 0.05, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "radam": ("RAdam", {"lr": 0.05, "weight_decay": 0.1}),
    "asgd": ("ASGD", {"lr": 0.1, "lambd": 0.5, "t0": 1, "weight_decay": 0.05}),
    "rprop": ("Rprop", {"lr": 0.05, "maximize": True}),
}


@dataclass
class Side:
    """One optimizer with the parameters that it was given, and a source of random numbers equal on
    both sides."""

    library: Any
    opt: Any
    params: list[Tensor]
    random: torch.Generator
    kept: list[Any] = field(default_factory=list)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.random, dtype=dtype)

    def set_gradients(self, only: Iterable[int] | None = None) -> None:
        for i, p in enumerate(self.params):
            if only is None or i in only:
                p.grad = (
                    self.randn(*p.shape).to(p.dtype)
                    if not p.is_complex()
                    else self.randn(*p.shape, dtype=p.dtype)
                )

    def step(self, only: Iterable[int] | None = None) -> None:
        self.set_gradients(only)
        self.opt.step()
        self.opt.zero_grad()


def make_side(
    library: Any,
    algorithm: str,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    dtype=torch.float32,
    seed: int = 0,
    **changes,
) -> Side:
    name, options = ALGORITHMS[algorithm]
    random = torch.Generator().manual_seed(seed)
    params = [
        torch.nn.Parameter(torch.randn(shape, generator=random, dtype=dtype)) for shape in shapes
    ]
    return Side(library, getattr(library, name)(params, **(options | changes)), params, random)


def both(algorithm: str, *arguments: Any, **changes: Any) -> tuple[Side, Side]:
    """onepass's side and torch.optim's."""
    ours = make_side(onepass, algorithm, *arguments, **changes)
    return ours, make_side(torch.optim, algorithm, *arguments, **changes)


def on_both(sides: tuple[Side, Side], operation: Callable[[Side], Any]) -> None:
    for side in sides:
        operation(side)


def assert_same(sides: tuple[Side, Side], **tolerance: float) -> None:
    """Equal parameters and states, under the same names; state that torch does not have is an
    error."""
    ours, theirs = sides
    close = CLOSE | tolerance
    for i, (p, q) in enumerate(zip(ours.params, theirs.params, strict=True)):
        torch.testing.assert_close(
            p.detach(), q.detach(), msg=lambda m, i=i: f"parameter {i}: {m}", **close
        )
    mine, yours = ours.opt.state_dict()["state"], theirs.opt.state_dict()["state"]
    assert set(mine) == set(yours)
    for key, entries in yours.items():
        assert {k for k, v in mine[key].items() if v is not None} == {
            k for k, v in entries.items() if v is not None
        }
        for name, value in entries.items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(
                    mine[key][name],
                    value,
                    msg=lambda m, k=key, n=name: f"state {k}.{n}: {m}",
                    **close,
                )


def bits(t: Any) -> Any:
    """Everything that can be seen of a tensor, comparable by ==; other things as they are."""
    if not isinstance(t, Tensor):
        return t if isinstance(t, (int, float, str, type(None))) else id(t)
    facts = (tuple(t.shape), t.dtype, t.device.type, t.layout)
    if t.layout != torch.strided or t.device.type == "meta":
        return facts
    storage = t.untyped_storage()
    raw = bytes(storage.tolist()) if 0 < storage.nbytes() < 1 << 20 else b""
    return (*facts, t.stride(), t.storage_offset(), raw)


def snapshot(opt: Any) -> Any:
    """The bits of parameters, gradients and state, and the options: equal snapshots mean that
    nothing has changed."""
    params = [p for group in opt.param_groups for p in group["params"]]
    state = [
        (
            id(p),
            [(k, bits(v)) for k, v in entry.items()] if isinstance(entry, dict) else repr(entry),
        )
        for p, entry in opt.state.items()
    ]
    # Entries that are empty are as good as none: reading a defaultdict makes them.
    state = [pair for pair in state if pair[1]]
    options = [
        {k: bits(v) if isinstance(v, Tensor) else v for k, v in g.items() if k != "params"}
        for g in opt.param_groups
    ]
    return [bits(p) for p in params], [bits(p.grad) for p in params], state, repr(options)


def refuses(opt: Any, words: str, error: type[BaseException] = RuntimeError) -> None:
    """The step raises a sentence with these words, and nothing has changed."""
    before = snapshot(opt)
    with pytest.raises(error, match=words) as caught:
        opt.step()
    sentence = str(caught.value)
    assert "\n" not in sentence, sentence
    assert len(sentence) < 400, sentence
    assert snapshot(opt) == before, "a failed step has changed something"


def quietly(function: Callable[[], Any]) -> Any:
    """The function's result, with its warnings dropped: for torch's own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function()
