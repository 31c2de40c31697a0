"""A step that fails leaves no trace, and one that does not concern a parameter does not look at
it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import onepass

DAMPENED: dict[str, Any] = {"lr": 1.0, "momentum": 0.9, "dampening": 0.5}


def parameter(value: float, n: int = 1) -> nn.Parameter:
    p = nn.Parameter(torch.full((n,), value))
    p.grad = torch.ones(n)
    return p


@pytest.mark.parametrize(
    "backend", [{}, {"foreach": False, "fused": False}], ids=["kernel", "eager"]
)
@pytest.mark.parametrize("freed", ["replaced", "resized"])
def test_a_frozen_parameter_may_be_in_any_condition(backend, freed):
    """As in torch: without a gradient it is not looked at; with one again, it is refused until it
    has memory."""
    a, b = parameter(1.0, 3), parameter(1.0, 3)
    opt = onepass.AdamW([a, b], **backend)
    opt.step()
    b.grad = None
    if freed == "replaced":
        b.data = torch.empty(0)
    else:
        b.untyped_storage().resize_(0)
    before = a.detach().clone()
    opt.step()
    opt.step()
    assert not torch.equal(a, before)
    assert opt.state[b]["step"].item() == 1
    b.data = torch.ones(3)
    b.grad = torch.ones(3)
    opt.step()
    assert opt.state[b]["step"].item() == 2


def test_a_first_step_that_fails_stays_the_first():
    p = parameter(0.0)
    opt = onepass.SGD([p], **DAMPENED, fused=True)
    opt.grad_scale = torch.tensor(0.0)
    with pytest.raises(ZeroDivisionError):
        opt.step()
    assert not opt.state
    del opt.grad_scale
    opt.step()
    assert p.item() == -1


def test_state_that_cannot_be_made_is_taken_back():
    class Short(onepass.SGD):
        calls = 0

        def initial_state(self, name, p, group):
            Short.calls += 1
            if Short.calls == 2:
                raise MemoryError
            return super().initial_state(name, p, group)

    a, b = parameter(0.0), parameter(0.0)
    opt = Short([a, b], **DAMPENED)
    with pytest.raises(MemoryError):
        opt.step()
    assert not opt.state
    opt.step()
    assert (a.item(), b.item()) == (-1, -1)


def test_a_buffer_that_is_none_has_not_begun():
    """As in old checkpoints of torch; another parameter's step does not begin it."""
    a, b = parameter(0.0), parameter(0.0)
    opt = onepass.SGD([a, b], **DAMPENED)
    opt.state[b] = {"momentum_buffer": None}
    b.grad = None
    opt.step()
    assert opt.state[b] == {"momentum_buffer": None}
    b.grad = torch.ones(1)
    opt.step()
    assert b.item() == -1


@pytest.mark.filterwarnings("ignore:.*slower eager backend.*")
def test_overlapping_parameters_with_holes():
    for views, want in (((slice(0, 8, 2),) * 2, 0.8), ((slice(0, 8), slice(0, 8, 2)), 0.8)):
        buffer = torch.ones(8)
        params = [nn.Parameter(buffer[view]) for view in views]
        for p in params:
            p.grad = torch.ones_like(p)
        onepass.SGD(params, lr=0.1).step()
        torch.testing.assert_close(buffer[0].item(), want)


def test_what_others_keep_in_a_state_is_loaded_too():
    p = parameter(1.0)
    opt = onepass.AdamW([p])
    opt.step()
    opt.state[p]["ema"] = p.detach().clone()
    opt.load_state_dict(opt.state_dict())
    assert torch.equal(opt.state[p]["ema"], p)


def test_a_hook_may_unpack_what_is_loaded():
    opt = onepass.AdamW([parameter(1.0)])
    opt.step()
    opt.register_load_state_dict_pre_hook(lambda _, given: given["optimizer"])
    opt.load_state_dict({"optimizer": opt.state_dict(), "epoch": 3})


def test_a_tuple_that_grows_is_noticed():
    class Weighted(onepass.Optimizer):
        def __init__(self, params, weights=(1.0, 2.0)):
            super().__init__(params, {"weights": weights})

        @staticmethod
        def rule(p, g, *, weights):
            for weight in weights:
                p = p - weight * g
            return {"p": p}

    p = parameter(0.0)
    opt = Weighted([p])
    opt.step()
    opt.param_groups[0]["weights"] = (1.0, 2.0, 100.0)
    opt.step()
    assert p.item() == -106
