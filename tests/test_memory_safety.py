"""No step touches memory that is gone, or steps with what does not belong together, whatever was
done in between.

Cases that could crash are functions `crash_*`, run in processes of their own; operations that
torch.optim defines are compared with it.
"""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import threading
import weakref
from collections import defaultdict

import pytest
import torch
from support.side_by_side import (
    ALGORITHMS,
    CLOSE,
    SHAPES,
    Side,
    assert_same,
    both,
    make_side,
    on_both,
    quietly,
    refuses,
    snapshot,
)
from support.slow_marks import slow_but
from support.subprocess_cases import fates
from torch import Tensor, nn

import onepass

# Operations that torch.optim defines: done on both sides between steps, then both go on and must
# agree.


def state_of(side, i: int) -> dict:
    return side.opt.state[side.params[i]]


def columns_of(entry: dict) -> list[str]:
    return [name for name in entry if name not in ("step", "mu_product", "eta", "mu")]


def swap_data(side):
    side.params[0].data = side.randn(4, 3)


def swap_data_for_a_view(side):
    side.kept.append(side.randn(40))
    side.params[0].data = side.kept[-1][7:19].view(4, 3)


def swap_data_of_all(side):
    for p in side.params:
        p.data = p.data.clone()


def transpose_data(side):
    side.params[0].data = side.randn(3, 4).t()


def make_holes(side):
    side.params[0].data = side.randn(4, 6)[:, ::2]


def make_holes_and_fill_them(side):
    make_holes(side)
    side.step()
    side.params[0].data = side.params[0].data.contiguous()


def move_storage(side):
    storage = side.params[0].untyped_storage()
    content = side.params[0].detach().clone()
    storage.resize_(1 << 16)
    with torch.no_grad():
        side.params[0].copy_(content)


def free_storage_and_restore(side):
    content = side.params[0].detach().clone()
    side.params[0].untyped_storage().resize_(0)
    side.params[0].untyped_storage().resize_(content.nbytes)
    with torch.no_grad():
        side.params[0].copy_(content)


def set_memory(side):
    with torch.no_grad():
        side.params[1].set_(side.randn(5))


def swap_tensors(side):
    side.opt.zero_grad()
    torch.utils.swap_tensors(side.params[1], nn.Parameter(side.randn(5)))


def swap_state_tensors(side):
    for entry in side.opt.state.values():
        for name in columns_of(entry):
            torch.utils.swap_tensors(entry[name], entry[name].clone() * 0.5)


def replace_state_entries(side):
    for entry in side.opt.state.values():
        for name in columns_of(entry):
            entry[name] = entry[name] * 0.5


def lay_state_otherwise(side):
    entry = state_of(side, 0)
    for name in columns_of(entry):
        entry[name] = entry[name].t().contiguous().t()


def expand_state(side):
    entry = state_of(side, 3)
    for name in columns_of(entry):
        entry[name] = entry[name].contiguous(memory_format=torch.channels_last)


def swap_state_data(side):
    for entry in side.opt.state.values():
        for name in columns_of(entry):
            entry[name].data = entry[name].data * 0.5


def clear_state(side):
    side.opt.state.clear()


def clear_one_state(side):
    state_of(side, 1).clear()


def delete_one_state(side):
    side.opt.state.pop(side.params[1], None)


def replace_state_dict_of_a_parameter(side):
    p = side.params[0]
    side.opt.state[p] = {name: value.clone() for name, value in side.opt.state[p].items()}


def replace_state_object(side):
    state = defaultdict(dict)
    for p, entry in side.opt.state.items():
        state[p] = {name: value.clone() for name, value in entry.items()}
    side.opt.state = state


def exchange_states(side):
    shapes = {}
    for p in side.params:
        shapes.setdefault(p.shape, []).append(p)
    a, b = next(ps for ps in shapes.values() if len(ps) > 1)
    side.opt.state[a], side.opt.state[b] = side.opt.state[b], side.opt.state[a]


def exchange_keys_of_states(side):
    """The same dicts in the same order, under other parameters."""
    a, b = [p for p in side.params if p.shape == (5,)]
    keys = [{a: b, b: a}.get(p, p) if isinstance(p, Tensor) else p for p in side.opt.state]
    values = list(side.opt.state.values())
    side.opt.state.clear()
    side.opt.state.update(zip(keys, values, strict=True))


def fill_step(side):
    for entry in side.opt.state.values():
        if "step" in entry:
            entry["step"].fill_(40)


def fill_one_step(side):
    if "step" in state_of(side, 0):
        state_of(side, 0)["step"].fill_(40)


def replace_step(side):
    for k, entry in enumerate(side.opt.state.values()):
        if "step" in entry:
            entry["step"] = torch.tensor(float(k))


def swap_data_of_step(side):
    for entry in side.opt.state.values():
        if "step" in entry:
            entry["step"].data = torch.tensor(7.0)


def set_memory_of_step(side):
    for entry in side.opt.state.values():
        if "step" in entry:
            entry["step"].set_(torch.tensor(9.0))


def swap_step(side):
    for entry in side.opt.state.values():
        if "step" in entry:
            torch.utils.swap_tensors(entry["step"], torch.tensor(11.0))


def replace_parameter_list(side):
    side.params[:] = [nn.Parameter(p.detach().clone()) for p in side.params]
    side.opt.state.clear()
    side.opt.param_groups[0]["params"] = list(side.params)


def replace_one_parameter_in_place(side):
    old = side.params[1]
    new = nn.Parameter(side.randn(5))
    side.params[1] = new
    side.opt.param_groups[0]["params"][1] = new
    if old in side.opt.state:
        side.opt.state[new] = side.opt.state.pop(old)


def reorder_parameters(side):
    side.opt.param_groups[0]["params"] = side.opt.param_groups[0]["params"][::-1]


def remove_a_parameter(side):
    del side.opt.param_groups[0]["params"][0]
    side.opt.state.pop(side.params[0], None)


def add_group(side):
    side.kept.append(nn.Parameter(side.randn(6)))
    side.params.append(side.kept[-1])
    side.opt.add_param_group({"params": [side.kept[-1]], "lr": 0.01})


def move_between_groups(side):
    add_group(side)
    side.step()
    side.opt.param_groups[1]["params"].append(side.opt.param_groups[0]["params"].pop())


def remove_group(side):
    add_group(side)
    side.step()
    side.params.pop()
    group = side.opt.param_groups.pop()
    side.opt.state.pop(group["params"][0], None)


def to_double(side):
    for p in side.params:
        p.data = p.data.double()
    for entry in side.opt.state.values():
        for name in columns_of(entry):
            entry[name] = entry[name].double()


def to_channels_last(side):
    side.params[3].data = side.params[3].data.contiguous(memory_format=torch.channels_last)


def reload_own_state(side):
    side.opt.load_state_dict(side.opt.state_dict())


def save_and_load(side):
    file = io.BytesIO()
    torch.save(side.opt.state_dict(), file)
    file.seek(0)
    side.opt.load_state_dict(torch.load(file, weights_only=True))


def deepcopy_both(side):
    side.params, side.opt = copy.deepcopy((side.params, side.opt))


def pickle_both(side):
    side.params, side.opt = pickle.loads(pickle.dumps((side.params, side.opt)))


def change_options(side):
    for group in side.opt.param_groups:
        group["lr"] *= 0.5
        group["maximize"] = not group["maximize"]


def switch_amsgrad(side):
    for group in side.opt.param_groups:
        if "amsgrad" in group:
            group["amsgrad"] = False


def switch_momentum(side):
    for group in side.opt.param_groups:
        # torch's RMSprop makes its buffer in the first step alone.
        if "nesterov" in group:
            group["momentum"] = 0.0 if group["momentum"] else 0.9
            group["nesterov"] = False
            group["dampening"] = 0.0


def tensor_lr(side):
    for group in side.opt.param_groups:
        group["lr"] = torch.tensor(group["lr"])
    side.step()
    for group in side.opt.param_groups:
        group["lr"].fill_(0.01)


def change_threads(side):
    threads = torch.get_num_threads()
    side.kept.append(threads)
    torch.set_num_threads(1 if threads > 1 else 2)
    side.step()
    torch.set_num_threads(threads)


def collect_garbage(side):
    gc.collect()
    side.kept = [torch.randn(4, 3) for _ in range(100)]


def drop_gradients_in_turn(side):
    for only in ((0, 2), (1,), (), (0, 1, 2, 3)):
        side.step(only)


def zero_gradients_in_place(side):
    side.set_gradients()
    side.opt.step()
    side.opt.zero_grad(set_to_none=False)
    side.opt.step()
    side.opt.zero_grad()


def step_by_closure(side):
    def closure():
        side.opt.zero_grad()
        loss = sum((p * p).sum() for p in side.params)
        loss.backward()
        return loss

    side.opt.step(closure)
    side.opt.zero_grad()


def no_longer_require_gradients(side):
    side.params[0].requires_grad_(False)


OPERATIONS = [
    swap_data,
    swap_data_for_a_view,
    swap_data_of_all,
    transpose_data,
    make_holes,
    make_holes_and_fill_them,
    move_storage,
    free_storage_and_restore,
    set_memory,
    swap_tensors,
    swap_state_tensors,
    replace_state_entries,
    lay_state_otherwise,
    expand_state,
    swap_state_data,
    clear_state,
    clear_one_state,
    delete_one_state,
    replace_state_dict_of_a_parameter,
    replace_state_object,
    exchange_states,
    exchange_keys_of_states,
    fill_step,
    fill_one_step,
    replace_step,
    swap_data_of_step,
    set_memory_of_step,
    swap_step,
    replace_parameter_list,
    replace_one_parameter_in_place,
    reorder_parameters,
    remove_a_parameter,
    add_group,
    move_between_groups,
    remove_group,
    to_double,
    to_channels_last,
    reload_own_state,
    save_and_load,
    deepcopy_both,
    pickle_both,
    change_options,
    switch_amsgrad,
    switch_momentum,
    tensor_lr,
    change_threads,
    collect_garbage,
    drop_gradients_in_turn,
    zero_gradients_in_place,
    step_by_closure,
    no_longer_require_gradients,
]


# All kinds of state are among them: none, columns, numbers.
@pytest.mark.parametrize(
    "algorithm", slow_but(["sgd", "momentum", "amsgrad", "nadam", "asgd"], ALGORITHMS)
)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda f: f.__name__)
def test_goes_on_like_torch_after(operation, algorithm):
    sides = both(algorithm, (*SHAPES, (5,)))
    on_both(sides, lambda side: (side.step(), side.step()))
    on_both(sides, operation)
    on_both(sides, lambda side: (side.step(), side.step()))
    assert_same(sides)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda f: f.__name__)
def test_before_the_first_step(operation):
    sides = both("amsgrad", (*SHAPES, (5,)))
    if operation in (
        fill_one_step,
        exchange_states,
        exchange_keys_of_states,
        replace_state_dict_of_a_parameter,
    ):
        pytest.skip("there is no state yet")
    on_both(sides, operation)
    on_both(sides, lambda side: (side.step(), side.step()))
    assert_same(sides)


# Gradients as odd as they come.


def gradient_expanded(side):
    return side.randn(4, 1).expand(4, 3)


def gradient_transposed(side):
    return side.randn(3, 4).t()


def gradient_strided(side):
    return side.randn(4, 6)[:, ::2]


def gradient_flipped_offset(side):
    return side.randn(50)[3:15].view(4, 3)


def gradient_imaginary_of_conjugate(side):
    return side.randn(4, 3, dtype=torch.complex64).conj().imag


def gradient_requires_gradients(side):
    return side.randn(4, 3).requires_grad_() * 2


def gradient_inference(side):
    with torch.inference_mode():
        return side.randn(4, 3)


def gradient_nan(side):
    g = side.randn(4, 3)
    g[0, 0], g[1, 1] = float("nan"), float("inf")
    return g


def gradient_is_parameter(side):
    return side.params[0].detach()


def gradient_of_other_parameter(side):
    side.params[1].grad = None
    return side.params[1].detach()[:1].expand(4, 3)


def gradient_lazy_clone(side):
    side.kept.append(side.randn(4, 3))
    return torch._lazy_clone(side.kept[-1])


GRADIENTS = [f for name, f in sorted(globals().items()) if name.startswith("gradient_")]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("gradient", GRADIENTS, ids=lambda f: f.__name__)
def test_odd_gradients(gradient, algorithm):
    if gradient is gradient_is_parameter and algorithm in ("adamw", "amsgrad", "nadam"):
        pytest.skip("torch decays the weights first, and with them this gradient")
    sides = both(algorithm)

    def steps(side):
        for odd in (False, True, True, False, True):
            side.set_gradients()
            if odd:
                side.params[0].grad = gradient(side)
                held, raw = side.params[0].grad, side.params[0].grad.detach().clone()
                version = None if held.is_inference() else held._version
            side.opt.step()
            if odd and gradient not in (gradient_is_parameter, gradient_of_other_parameter):
                assert side.params[0].grad is held
                torch.testing.assert_close(held.detach(), raw, rtol=0, atol=0, equal_nan=True)
                assert version is None or held._version == version
            side.opt.zero_grad()

    on_both(sides, steps)
    assert_same(sides, equal_nan=True)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradient_of_one_element_negated(algorithm):
    sides = both(algorithm, ((), (1,)))

    def steps(side):
        for _ in range(3):
            side.params[0].grad = torch.complex(side.randn(), side.randn()).conj().imag
            side.params[1].grad = torch.complex(side.randn(1), side.randn(1)).conj().imag
            side.opt.step()

    on_both(sides, steps)
    assert_same(sides)


@pytest.mark.filterwarnings("ignore:.*slower eager backend.*")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_parameter_negated_between_steps(algorithm):
    """A lazily negated or conjugated view has the same address and strides as its base."""
    sides = both(algorithm, ((), (1,)))

    def steps(side):
        side.step()
        side.params[0].data = torch.complex(side.randn(), side.randn()).conj().imag
        side.params[1].data = torch.complex(side.randn(1), side.randn(1)).conj().imag
        side.step()
        side.step()

    on_both(sides, steps)
    for p, q in zip(sides[0].params, sides[1].params, strict=True):
        torch.testing.assert_close(p.detach().resolve_neg(), q.detach().resolve_neg(), **CLOSE)


@pytest.mark.filterwarnings("ignore:.*slower eager backend.*")
@pytest.mark.parametrize("column", ["p", "exp_avg", "g"])
def test_complex_conjugated_between_steps(column):
    sides = both("adamw", ((4, 3),), torch.complex64)

    def steps(side):
        side.step()
        entry = side.opt.state[side.params[0]]
        if column == "p":
            side.params[0].data = side.randn(4, 3, dtype=torch.complex64).conj()
        elif column == "exp_avg":
            entry["exp_avg"] = entry["exp_avg"].conj()
        for _ in range(2):
            side.set_gradients()
            if column == "g":
                side.params[0].grad = side.params[0].grad.conj()
            side.opt.step()

    # torch refuses to view a conjugated tensor as real: the reference resolves it, which changes no
    # value.
    def reference(side):
        side.step()
        entry = side.opt.state[side.params[0]]
        if column == "p":
            side.params[0].data = side.randn(4, 3, dtype=torch.complex64).conj().resolve_conj()
        elif column == "exp_avg":
            entry["exp_avg"] = entry["exp_avg"].conj().resolve_conj()
        for _ in range(2):
            side.set_gradients()
            if column == "g":
                side.params[0].grad = side.params[0].grad.conj().resolve_conj()
            side.opt.step()

    steps(sides[0])
    reference(sides[1])
    torch.testing.assert_close(
        sides[0].params[0].detach().resolve_conj(), sides[1].params[0].detach(), **CLOSE
    )


def test_gradient_shared_between_parameters():
    sides = both("adamw", ((4, 3), (4, 3)))

    def steps(side):
        for _ in range(3):
            side.params[0].grad = side.params[1].grad = side.randn(4, 3)
            side.opt.step()

    on_both(sides, steps)
    assert_same(sides)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradient_of_another_dtype(algorithm):
    """p.grad_dtype lets a bfloat16 gradient meet a float32 parameter; the value is what counts."""
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch has one dtype for both")
    ours, wide = make_side(onepass, algorithm), make_side(onepass, algorithm)
    for k in range(4):
        for side in (ours, wide):
            side.set_gradients()
            for p in side.params:
                g = p.grad.bfloat16()
                p.grad = None
                p.grad_dtype = None
                p.grad = g if side is ours and k != 2 else g.float()
            side.opt.step()
            side.opt.zero_grad()
            for p in side.params:
                p.grad_dtype = torch.float32
    for p, q in zip(ours.params, wide.params, strict=True):
        assert torch.equal(p, q)


# Parameters as odd as they come.


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_views_of_one_buffer(algorithm):
    """Overlapping parameters step one after the other, as in torch."""
    name, options = ALGORITHMS[algorithm]
    ends = []
    for library in (onepass, torch.optim):
        random = torch.Generator().manual_seed(1)
        buffer = torch.randn(70_000, generator=random)
        cuts = ((0, 40_000), (20_000, 70_000), (10, 50), (30, 70_000))
        params = [nn.Parameter(buffer[a:b]) for a, b in cuts]
        side = Side(library, getattr(library, name)(params, **options), params, random)
        for _ in range(3):
            side.step()
        ends.append(buffer)
    torch.testing.assert_close(*ends, **CLOSE)


def test_gradient_is_another_parameter():
    ends = []
    for library in (onepass, torch.optim):
        random = torch.Generator().manual_seed(2)
        params = [nn.Parameter(torch.randn(90_000, generator=random)) for _ in range(3)]
        opt = library.SGD(params, lr=0.5)
        for _ in range(2):
            for p, q in zip(params, params[1:] + params[:1], strict=True):
                p.grad = q.detach()
            opt.step()
        ends.append(torch.stack([p.detach() for p in params]))
    torch.testing.assert_close(*ends, **CLOSE)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_odd_parameters(algorithm):
    """Holes, transposes, channels_last, no elements, ones in the shape, an offset."""
    makers = [
        lambda r: torch.randn(4, 6, generator=r)[:, ::2],
        lambda r: torch.randn(3, 4, generator=r).t(),
        lambda r: torch.randn(2, 3, 4, 5, generator=r).contiguous(
            memory_format=torch.channels_last
        ),
        lambda r: torch.randn(2, 3, 4, 5, generator=r)[:, 1:, ::2],
        lambda r: torch.randn(0, 3, generator=r),
        lambda r: torch.randn(4, 0, generator=r)[:, :0],
        lambda r: torch.randn(1, 5, 1, generator=r).as_strided((1, 5, 1), (7, 1, 3)),
        lambda r: torch.randn(10, generator=r)[3:],
        lambda r: torch.randn(5, 1, generator=r)[::2],
    ]
    name, options = ALGORITHMS[algorithm]
    sides = []
    for library in (onepass, torch.optim):
        random = torch.Generator().manual_seed(3)
        params = [nn.Parameter(make(random)) for make in makers]
        sides.append(Side(library, getattr(library, name)(params, **options), params, random))
    on_both(tuple(sides), lambda side: [side.step() for _ in range(3)])
    assert_same(tuple(sides))
    assert [p.stride() for p in sides[0].params] == [p.stride() for p in sides[1].params]


def test_holes_are_left_alone():
    base = torch.arange(24.0).view(4, 6)
    before = base.clone()
    p = nn.Parameter(base[:, ::2])
    opt = onepass.AdamW([p], lr=0.1)
    for _ in range(3):
        p.grad = torch.ones(4, 3)
        opt.step()
    assert torch.equal(base[:, 1::2], before[:, 1::2])
    assert not torch.equal(base[:, ::2], before[:, ::2])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_module_to_channels_last_and_back(algorithm):
    name, options = ALGORITHMS[algorithm]
    ends = []
    for library in (onepass, torch.optim):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
        opt = getattr(library, name)(model.parameters(), **options)
        for memory_format in (
            torch.contiguous_format,
            torch.channels_last,
            torch.contiguous_format,
        ):
            model.to(memory_format=memory_format)
            for _ in range(2):
                opt.zero_grad()
                model(
                    torch.randn(2, 3, 8, 8).to(memory_format=memory_format)
                ).square().mean().backward()
                opt.step()
        ends.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_tied_weights(algorithm):
    name, options = ALGORITHMS[algorithm]
    ends = []
    for library in (onepass, torch.optim):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
        model[1].weight = model[0].weight
        opt = getattr(library, name)(model.parameters(), **options)
        for _ in range(3):
            opt.zero_grad()
            model(torch.arange(7)).logsumexp(-1).sum().backward()
            opt.step()
        ends.append(model[0].weight.detach())
    torch.testing.assert_close(*ends, **CLOSE)


def test_model_changes_dtype_between_steps():
    """float32 -> bfloat16 -> float32: state stays float32, as precise as it was, and steps go
    on."""
    model = nn.Linear(3, 2)
    opt = onepass.AdamW(model.parameters(), lr=0.1)
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float32):
        model.to(dtype)
        before = [p.detach().clone() for p in model.parameters()]
        opt.zero_grad()
        model(torch.ones(1, 3, dtype=dtype)).sum().backward()
        opt.step()
        assert all(
            p.dtype == dtype and not torch.equal(p, q)
            for p, q in zip(model.parameters(), before, strict=True)
        )
        assert all(entry["exp_avg"].dtype == torch.float32 for entry in opt.state.values())
    assert {float(entry["step"]) for entry in opt.state.values()} == {4.0}


# What no step can be taken with: a RuntimeError of one sentence, nothing changed, and after repair
# all goes on.


def free(t: Tensor) -> None:
    t.untyped_storage().resize_(0)


def started(algorithm: str = "amsgrad", **changes):
    side = make_side(onepass, algorithm, **changes)
    side.step()
    side.step()
    side.set_gradients()
    return side


EAGER = {"foreach": False, "fused": False}


def crash_parameter_freed(**changes):
    for i in range(4):
        side = started(**changes)
        content = side.params[i].detach().clone()
        free(side.params[i])
        refuses(side.opt, "storage")
        refuses(side.opt, "storage")
        side.params[i].untyped_storage().resize_(content.nbytes)
        with torch.no_grad():
            side.params[i].copy_(content)
        side.opt.step()


def crash_parameter_freed_before_the_first_step():
    side = make_side(onepass, "amsgrad")
    side.set_gradients()
    free(side.params[0])
    refuses(side.opt, "storage")
    assert not side.opt.state


def crash_parameter_freed_with_offset(**changes):
    """A view with an offset into freed storage: its address is not null."""
    buffer = torch.randn(100)
    p, q = nn.Parameter(buffer[40:60]), nn.Parameter(torch.ones(3))
    opt = onepass.AdamW([q, p], **changes)
    for _ in range(2):
        p.grad, q.grad = torch.ones(20), torch.ones(3)
        opt.step()
    buffer.untyped_storage().resize_(0)
    assert p.data_ptr() != 0
    refuses(opt, "storage")


def crash_parameter_storage_shrunk(**changes):
    for size in (4, 40, 44):
        side = started(**changes)
        side.params[0].untyped_storage().resize_(size)
        refuses(side.opt, "storage")


def crash_parameter_with_holes_freed():
    base = torch.randn(4, 6)
    p, q = nn.Parameter(base[:, ::2]), nn.Parameter(torch.ones(3))
    opt = onepass.AdamW([q, p])
    for _ in range(2):
        p.grad, q.grad = torch.ones(4, 3), torch.ones(3)
        opt.step()
    for size in (0, 8, 91):
        base.untyped_storage().resize_(size)
        refuses(opt, "storage")


def crash_gradient_freed(**changes):
    for i in range(4):
        side = started(**changes)
        free(side.params[i].grad)
        refuses(side.opt, "storage")
        side.set_gradients()
        side.opt.step()


def crash_gradient_shrunk(**changes):
    side = started(**changes)
    side.params[0].grad.untyped_storage().resize_(44)
    refuses(side.opt, "storage")


def crash_gradient_freed_with_offset():
    side = started()
    buffer = torch.randn(100)
    side.params[0].grad = buffer[40:52].view(4, 3)
    side.opt.step()
    buffer.untyped_storage().resize_(0)
    refuses(side.opt, "storage")


def crash_odd_gradient_freed():
    for make in (
        gradient_expanded,
        gradient_transposed,
        gradient_strided,
        gradient_imaginary_of_conjugate,
        gradient_lazy_clone,
    ):
        side = started()
        side.params[0].grad = make(side)
        side.opt.step()
        free(side.params[0].grad)
        refuses(side.opt, "storage")


def crash_gradient_of_one_element_freed():
    side = make_side(onepass, "adamw", ((),))
    for _ in range(2):
        buffer = torch.complex(side.randn(9), side.randn(9))
        side.params[0].grad = buffer.conj().imag[5]
        side.opt.step()
    buffer.untyped_storage().resize_(0)
    refuses(side.opt, "storage")


def crash_conjugated_gradient_freed():
    side = make_side(onepass, "adamw", ((4, 3),), torch.complex64)
    for _ in range(2):
        side.params[0].grad = side.randn(4, 3, dtype=torch.complex64).conj()
        side.opt.step()
    free(side.params[0].grad)
    refuses(side.opt, "storage")


def crash_state_freed(**changes):
    for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        for size in (0, 4, 44):
            side = started(**changes)
            entry = side.opt.state[side.params[0]]
            entry[name].untyped_storage().resize_(size)
            refuses(side.opt, "storage")
            entry[name] = torch.zeros(4, 3)
            side.opt.step()


def crash_parameter_freed_eager():
    crash_parameter_freed(**EAGER)
    crash_parameter_freed_with_offset(**EAGER)
    crash_parameter_storage_shrunk(**EAGER)


def crash_gradient_freed_eager():
    crash_gradient_freed(**EAGER)
    crash_gradient_shrunk(**EAGER)


def crash_state_freed_eager():
    crash_state_freed(**EAGER)


def crash_shape_changed(**changes):
    for shape in ((3, 4), (12,), (4, 2), (40, 30), (), (0,), (4, 3, 1)):
        side = started(**changes)
        old = side.params[0].data
        side.params[0].data = torch.randn(shape)
        refuses(side.opt, "shape")
        side.params[0].grad = None
        side.params[0].grad = torch.ones(shape)
        refuses(side.opt, "state .* shape")
        side.params[0].grad = None
        side.params[0].data = old
        side.set_gradients()
        side.opt.step()


def crash_shape_changed_eager():
    crash_shape_changed(**EAGER)


def crash_gradient_of_another_shape(**changes):
    """Only a swap of .data brings one about."""
    for shape in ((3, 4), (12,), (4, 2), (1,), (), (4, 3, 1)):
        side = started(**changes)
        side.params[0].grad.data = torch.randn(shape)
        refuses(side.opt, "gradient .* shape")


def crash_gradient_of_another_shape_eager():
    crash_gradient_of_another_shape(**EAGER)


def crash_dtype_changed():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        side = started()
        side.params[0].data = side.params[0].data.to(dtype)
        side.params[0].grad.data = side.params[0].grad.data.to(dtype)
        side.opt.step()
        assert side.opt.state[side.params[0]]["exp_avg"].dtype == torch.float32
        side.opt.zero_grad()
        side.set_gradients()
        side.opt.step()


def crash_gradient_dtype_changed():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        side = started()
        side.params[0].grad.data = side.params[0].grad.data.to(dtype)
        side.opt.step()
    for dtype in (torch.int32, torch.complex64, torch.bool):
        side = started()
        side.params[0].grad.data = side.params[0].grad.data.to(dtype)
        refuses(side.opt, "gradient")


def crash_parameter_becomes_integer(**changes):
    """It can have no gradient any more, so it is left alone, and the others step."""
    for dtype in (torch.int8, torch.int64, torch.bool):
        side = started(**changes)
        p, q = side.params[:2]
        p.requires_grad_(False)
        p.grad = None
        p.data = torch.ones(4, 3, dtype=dtype)
        before = q.detach().clone()
        quietly(side.opt.step)
        assert torch.equal(p, torch.ones(4, 3, dtype=dtype))
        assert not torch.equal(q, before)


def crash_parameter_grown_or_shrunk(**changes):
    for size in ((2, 2), (100, 100)):
        side = started(**changes)
        with torch.no_grad():
            side.params[0].set_(side.params[0].untyped_storage(), 0, (1, 1), (1, 1))
            side.params[0].data = torch.empty(size)
        refuses(side.opt, "shape")


def crash_storage_resized_through_data():
    side = started()
    side.params[0].data.resize_(1000, 1000)
    side.opt.step()
    side.set_gradients()
    side.params[0].data.resize_(4, 3)
    side.opt.step()
    side.params[0].grad.resize_(2, 2)
    refuses(side.opt, "gradient .* shape")


def crash_meta_parameter(**changes):
    for which in ("exp_avg", "p"):
        side = started(**changes)
        if which == "exp_avg":
            side.opt.state[side.params[0]]["exp_avg"] = torch.zeros(4, 3, device="meta")
        else:
            side.params[0].grad = None
            torch.utils.swap_tensors(side.params[0], nn.Parameter(torch.zeros(4, 3, device="meta")))
            side.params[0].grad = torch.zeros(4, 3, device="meta")
        refuses(side.opt, "parameter 0 is on .*meta|'exp_avg' on meta")


def crash_meta_parameter_eager():
    crash_meta_parameter(**EAGER)


def crash_state_of_another_shape(**changes):
    for shape in ((3, 4), (12,), (4, 2), (1, 3), (4, 1), (1,), (), (0,), (40, 30)):
        side = started(**changes)
        side.opt.state[side.params[0]]["exp_avg_sq"] = torch.zeros(shape)
        refuses(side.opt, "'exp_avg_sq' of parameter 0 .*shape")
        side.opt.state[side.params[0]]["exp_avg_sq"] = torch.zeros(4, 3)
        side.opt.step()


def crash_state_of_another_shape_eager():
    crash_state_of_another_shape(**EAGER)


def crash_state_of_another_kind(**changes):
    kinds = [
        torch.zeros(4, 3, dtype=torch.int32),
        torch.zeros(4, 3, dtype=torch.complex64),
        torch.zeros(4, 3, dtype=torch.bool),
        3.5,
        "text",
        [1, 2],
        torch.zeros(4, 3).untyped_storage(),
        torch.zeros(4, 3).to_sparse(),
        torch.Generator(),
        torch.Size((4, 3)),
        object(),
        nn.Linear(4, 3),
        torch.zeros(4, 3).numpy(),
    ]
    for kind in kinds:
        side = started(**changes)
        side.opt.state[side.params[0]]["exp_avg"] = kind
        refuses(side.opt, "'exp_avg' of parameter 0")


def crash_state_of_another_kind_eager():
    crash_state_of_another_kind(**EAGER)


def crash_state_with_a_false_handle():
    """What only looks like a tensor must not be read like one."""

    class Impostor:
        _cdata = 4711

    side = started()
    side.opt.state[side.params[0]]["exp_avg"] = Impostor()
    refuses(side.opt, "'exp_avg' of parameter 0")
    side = started()
    storage = torch.zeros(4, 3).untyped_storage()
    side.opt.state[side.params[0]]["exp_avg_sq"] = storage
    refuses(side.opt, "'exp_avg_sq' of parameter 0")


def crash_state_halved(**changes):
    for missing in ("exp_avg", "exp_avg_sq"):
        side = started(**changes)
        del side.opt.state[side.params[0]][missing]
        refuses(side.opt, missing)
        side = started(**changes)
        side.opt.state[side.params[0]][missing] = None
        refuses(side.opt, missing)


def crash_state_halved_eager():
    crash_state_halved(**EAGER)


def crash_state_is_no_dict():
    for value in (None, 3, [], torch.zeros(4, 3)):
        side = started()
        side.opt.state[side.params[0]] = value
        refuses(side.opt, "state of parameter 0")


def crash_state_in_float64_or_half():
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        side = started()
        for entry in side.opt.state.values():
            entry["exp_avg"] = entry["exp_avg"].to(dtype)
        side.opt.step()
        assert all(entry["exp_avg"].dtype == dtype for entry in side.opt.state.values())


def crash_step_replaced(**changes):
    for value, number in (
        (5, 5),
        (5.0, 5),
        (torch.tensor(5), 5),
        (torch.tensor([5.0]), 5),
        (torch.tensor(5.0).double(), 5),
    ):
        side = started(**changes)
        side.opt.state[side.params[0]]["step"] = value
        side.opt.step()
        assert float(side.opt.state[side.params[0]]["step"]) == number + 1
        assert float(side.opt.state[side.params[1]]["step"]) == 3
        side.opt.step()
        assert float(side.opt.state[side.params[0]]["step"]) == number + 2
    for value in ("five", [5], torch.ones(2), torch.ones(0), {}):
        side = started(**changes)
        side.opt.state[side.params[0]]["step"] = value
        refuses(side.opt, "'step'")


def crash_step_replaced_eager():
    crash_step_replaced(**EAGER)


def crash_step_freed(**changes):
    side = started(**changes)
    step = side.opt.state[side.params[0]]["step"]
    try:
        step.untyped_storage().resize_(0)
    except RuntimeError:
        return  # the storage cannot be resized
    refuses(side.opt, "step")


def crash_step_lost(**changes):
    side = started(**changes)
    del side.opt.state[side.params[0]]["step"]
    before = snapshot(side.opt)
    try:
        side.opt.step()
    except RuntimeError:
        assert snapshot(side.opt) == before


def crash_options_of_no_use(**changes):
    """The step count must not advance in a step that fails for an option."""
    bad = [
        ("lr", torch.ones(2)),
        ("lr", "0.1"),
        ("lr", None),
        ("lr", object()),
        ("lr", [0.1]),
        ("betas", (0.9,)),
        ("betas", 0.9),
        ("betas", (0.9, "x")),
        ("betas", (0.9, torch.ones(3))),
        ("eps", "tiny"),
        ("eps", torch.ones(2)),
        ("weight_decay", 1j),
    ]
    for key, value in bad:
        side = started(**changes)
        good = side.opt.param_groups[0][key]
        side.opt.param_groups[0][key] = value
        refuses(side.opt, key, (RuntimeError, TypeError, ValueError))
        side.opt.param_groups[0][key] = good
        side.opt.step()
        assert {float(entry["step"]) for entry in side.opt.state.values()} == {3.0}
    for key in ("lr", "betas", "eps"):
        side = started(**changes)
        good = side.opt.param_groups[0].pop(key)
        refuses(side.opt, key, (RuntimeError, KeyError))
        side.opt.param_groups[0][key] = good
        side.opt.step()


def crash_options_of_no_use_eager():
    crash_options_of_no_use(**EAGER)


def crash_options_of_no_use_in_the_second_group():
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.float64))
    opt = onepass.AdamW([{"params": [a]}, {"params": [b]}])
    for _ in range(2):
        a.grad, b.grad = torch.ones(3), torch.ones(3, dtype=torch.float64)
        opt.step()
    opt.param_groups[1]["lr"] = torch.ones(2)
    refuses(opt, "lr")


def crash_options_of_no_use_before_the_first_step():
    """State that was not there before is not there after, and the first step is still the first."""
    ends = []
    for bad in (True, False):
        p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        opt = onepass.SGD([p, q], lr=0.1, momentum=0.9, dampening=0.5)
        p.grad = torch.ones(3)
        if bad:
            opt.param_groups[0]["lr"] = torch.ones(2)
            refuses(opt, "lr")
            opt.param_groups[0]["lr"] = 0.1
            q.grad = torch.ones(3)  # builds the plan again
        q.grad = torch.ones(3)
        opt.step()
        ends.append(p.detach())
    assert torch.equal(*ends)


def crash_second_of_two_is_bad():
    """One bad tensor among many, of other dtypes and on the eager backend: none of the others may
    step."""
    for bad in range(6):
        dtypes = (
            torch.float32,
            torch.float64,
            torch.bfloat16,
            torch.complex64,
            torch.float32,
            torch.float32,
        )
        params = [nn.Parameter(torch.ones(3, dtype=d)) for d in dtypes]
        groups = [{"params": params[:4]}, {"params": params[4:], **EAGER}]
        opt = onepass.AdamW(groups, foreach=None)
        for _ in range(2):
            for p in params:
                p.grad = torch.ones_like(p)
            opt.step()
        for spoil in ("grad", "exp_avg", "p", "shape"):
            if spoil == "grad":
                free(params[bad].grad)
                refuses(opt, "storage")
                params[bad].grad = torch.ones_like(params[bad])
            elif spoil == "exp_avg":
                entry = opt.state[params[bad]]
                old = entry["exp_avg"]
                entry["exp_avg"] = torch.zeros(2, dtype=old.dtype)
                refuses(opt, "shape")
                entry["exp_avg"] = old
            elif spoil == "p":
                content = params[bad].detach().clone()
                free(params[bad])
                refuses(opt, "storage")
                params[bad].untyped_storage().resize_(content.nbytes)
                params[bad].data.copy_(content)
            else:
                old, g = params[bad].data, params[bad].grad
                params[bad].grad = None
                params[bad].data = torch.ones(2, dtype=old.dtype)
                params[bad].grad = torch.ones(2, dtype=old.dtype)
                refuses(opt, "shape")
                params[bad].grad = None
                params[bad].data, params[bad].grad = old, g
        opt.step()


def crash_layouts():
    """Parameters and gradients that are not strided."""
    side = started()
    side.params[0].grad = None
    torch.utils.swap_tensors(
        side.params[0], nn.Parameter(side.randn(4, 3).to_mkldnn(), requires_grad=False)
    )
    before = snapshot(side.opt)
    try:
        side.opt.step()
    except RuntimeError:
        assert snapshot(side.opt) == before
    for sparse in (torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr):
        side = started()
        g = sparse(torch.ones(4, 3)) if sparse is torch.Tensor.to_sparse else None
        if g is None:
            continue
        side.params[0].grad = g
        refuses(side.opt, "sparse")
        side.params[0].grad = None
        side.opt.step()


def crash_inference_parameter():
    """torch refuses to write these outside of inference mode: so must a step, before it has
    written."""
    with torch.inference_mode():
        p = torch.ones(3)
    q = nn.Parameter(torch.ones(3))
    opt = onepass.AdamW([q, p], lr=0.1)
    q.grad = torch.ones(3)
    opt.step()
    with torch.inference_mode():
        p.grad = torch.ones(3)
    refuses(opt, "nference")


def crash_inference_state():
    """State made in a step under inference mode."""
    for library in (torch.optim, onepass):
        p = nn.Parameter(torch.ones(3))
        opt = library.AdamW([p], lr=0.1)
        p.grad = torch.ones(3)
        with torch.inference_mode():
            opt.step()
            opt.step()
        before = p.detach().clone()
        try:
            opt.step()
        except RuntimeError:
            assert torch.equal(p, before)


def crash_swapped_for_a_subclass():
    class Wrapper(Tensor):
        pass

    side = started()
    side.params[0].grad = None
    torch.utils.swap_tensors(
        side.params[0], torch.randn(4, 3).as_subclass(Wrapper).requires_grad_()
    )
    side.params[0].grad = torch.ones(4, 3).as_subclass(Wrapper)
    with pytest.warns(UserWarning, match="eager"):
        side.opt.step()


def crash_fork_after_steps():
    """The child of a fork steps on, with one thread; the parent too."""
    side = make_side(onepass, "adamw", ((300_000,), (4, 3)))
    torch.set_num_threads(1)
    side.step()
    child = os.fork()
    if child == 0:
        side.step()
        side.step()
        os._exit(0)
    side.step()
    assert os.waitpid(child, 0)[1] == 0
    side.step()


def crash_fork_before_threads():
    side = make_side(onepass, "adamw", ((300_000,), (4, 3)))
    child = os.fork()
    if child == 0:
        torch.set_num_threads(2)
        side.step()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    torch.set_num_threads(2)
    side.step()


def crash_addresses_reused():
    """Between steps the allocator hands the same addresses to other tensors: nobody else's memory
    is written."""
    side = make_side(onepass, "adamw", ((64, 64),) * 20)
    random = torch.Generator().manual_seed(5)
    for _ in range(60):
        side.step()
        for i in torch.randint(0, 20, (5,), generator=random).tolist():
            side.params[i].data = torch.randn(64, 64)
            entry = side.opt.state[side.params[i]]
            entry["exp_avg"] = torch.zeros(64, 64)
        others = [torch.full((64, 64), float(k)) for k in range(60)]
        side.set_gradients()
        side.opt.step()
        assert all((t == k).all() for k, t in enumerate(others))


def crash_many_small_allocations():
    p = nn.Parameter(torch.zeros(8))
    opt = onepass.SGD([p], lr=1.0)
    for k in range(2000):
        p.grad = torch.ones(8)
        opt.step()
        for _ in range(50):
            torch.empty(8)
        if k % 3 == 0:
            p.data = p.data.clone()
        p.grad = None
    assert torch.equal(p, torch.full((8,), -2000.0))


def crash_code_disposed_of():
    """Machine code that is no longer needed goes, and takes nothing along that other code needs."""
    from onepass.kernel.llvm.native import Library

    def make(i: int) -> Library:
        return Library(f"define i64 @f(i64 %x) {{\n  %y = add i64 %x, {i}\n  ret i64 %y\n}}\n")

    side = make_side(onepass, "adamw")
    side.step()
    libraries = [make(i) for i in range(3)]
    del libraries[0]
    gc.collect()
    libraries += [make(i) for i in range(20)]
    other = make_side(onepass, "momentum")
    other.step()
    side.step()


def crash_four_threads():
    ends: list = [None] * 4
    errors = []

    def work(k: int) -> None:
        try:
            side = make_side(onepass, "adamw", ((100_000,), (4, 3)), seed=k % 2)
            for _ in range(30):
                side.step()
            ends[k] = [p.detach() for p in side.params]
        except BaseException as error:  # must reach the main thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    for k in range(4):
        assert all(torch.equal(a, b) for a, b in zip(ends[k], ends[k % 2], strict=True))


def crash_step_while_another_thread_replaces_gradients():
    """Another thread drops the gradient that a step is reading: it stays until the step is over, as
    with torch."""
    p = nn.Parameter(torch.zeros(200_000))
    p.grad = torch.ones(200_000)
    opt = onepass.SGD([p], lr=0.1)
    opt.step()
    over = threading.Event()

    def swap() -> None:
        while not over.is_set():
            p.grad = torch.ones(200_000)

    thread = threading.Thread(target=swap)
    thread.start()
    for _ in range(300):
        opt.step()
    over.set()
    thread.join()


CASES = [name for name in dict(globals()) if name.startswith("crash_")]


@pytest.fixture(scope="module")
def known_fates():
    return fates(__file__, CASES)


@pytest.mark.parametrize("case", CASES)
def test_survives(case, known_fates):
    assert known_fates[case] == "ok", f"{case}: {known_fates[case]}"


# What is kept alive, and what autograd is told.


@pytest.mark.parametrize("options", [{}, EAGER], ids=["kernel", "eager"])
@pytest.mark.parametrize("library", [torch.optim, onepass], ids=["torch", "onepass"])
class TestNothingIsKeptAlive:
    """Memory that its owner has let go is free at once, without the garbage collector, as with
    torch.optim."""

    @pytest.fixture(autouse=True)
    def no_collector(self):
        gc.collect()
        gc.disable()
        yield
        gc.enable()

    def make(self, library, options):
        side = make_side(library, "adamw", ((4, 3), (5,)), **options)
        side.step()
        side.set_gradients()
        side.opt.step()
        return side

    def test_gradients(self, library, options):
        side = self.make(library, options)
        old = [weakref.ref(p.grad) for p in side.params]
        side.opt.zero_grad()
        assert [ref() for ref in old] == [None, None]

    def test_gradients_transposed(self, library, options):
        side = self.make(library, options)
        side.params[0].grad = side.randn(3, 4).t()
        side.opt.step()
        old = weakref.ref(side.params[0].grad)
        side.opt.zero_grad()
        assert old() is None

    def test_data(self, library, options):
        side = self.make(library, options)
        old = side.params[0].untyped_storage()._weak_ref()
        side.params[0].data = side.randn(4, 3)
        assert torch.UntypedStorage._expired(old)
        torch.UntypedStorage._free_weak_ref(old)

    def test_state_entries(self, library, options):
        side = self.make(library, options)
        old = weakref.ref(side.opt.state[side.params[0]]["exp_avg"])
        side.opt.state[side.params[0]]["exp_avg"] = torch.zeros(4, 3)
        assert old() is None

    def test_cleared_state(self, library, options):
        side = self.make(library, options)
        old = weakref.ref(side.opt.state[side.params[0]]["exp_avg"])
        side.opt.state.clear()
        assert old() is None

    def test_loaded_state(self, library, options):
        side = self.make(library, options)
        old = weakref.ref(side.opt.state[side.params[0]]["exp_avg"])
        side.opt.load_state_dict(make_side(library, "adamw", ((4, 3), (5,))).opt.state_dict())
        assert old() is None

    def test_the_optimizer(self, library, options):
        side = self.make(library, options)
        old = weakref.ref(side.opt.state[side.params[0]]["exp_avg"])
        side.opt = None
        assert old() is None

    def test_parameters(self, library, options):
        side = self.make(library, options)
        old = weakref.ref(side.params[0])
        side.opt, side.params = None, []
        assert old() is None

    def test_removed_parameters(self, library, options):
        side = self.make(library, options)
        old = weakref.ref(side.params[1])
        side.opt.state.pop(side.params[1])
        del side.opt.param_groups[0]["params"][1], side.params[1]
        assert old() is None


@pytest.mark.parametrize("options", [{}, EAGER], ids=["kernel", "eager"])
@pytest.mark.parametrize("algorithm", ["sgd", "momentum", "amsgrad"])
def test_version_counters(algorithm, options):
    """What a step writes has a new version; what it only reads has not."""
    side = make_side(onepass, algorithm, **options)
    side.step()
    side.set_gradients((0, 1))
    tensors = {
        "written": [t for i in (0, 1) for t in (side.params[i], *column_tensors(side, i))],
        "read": [
            *[side.params[i].grad for i in (0, 1)],
            *[t for i in (2, 3) for t in (side.params[i], *column_tensors(side, i))],
        ],
    }
    before = {k: [t._version for t in ts] for k, ts in tensors.items()}
    bits_before = [g.clone() for g in tensors["read"]]
    side.opt.step()
    assert all(t._version > v for t, v in zip(tensors["written"], before["written"], strict=True))
    assert [t._version for t in tensors["read"]] == before["read"]
    assert all(torch.equal(t, u) for t, u in zip(tensors["read"], bits_before, strict=True))


def column_tensors(side, i):
    entry = side.opt.state.get(side.params[i], {})
    return [entry[name] for name in columns_of(entry)]


@pytest.mark.parametrize("library", [torch.optim, onepass], ids=["torch", "onepass"])
def test_backward_after_step_raises(library):
    p = nn.Parameter(torch.ones(3))
    opt = library.AdamW([p])
    loss = (p * p).sum()
    loss.backward(retain_graph=True)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_copies_do_not_touch_the_original():
    for copied in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        side = make_side(onepass, "amsgrad")
        side.step()
        params, opt = copied((side.params, side.opt))
        before = snapshot(side.opt)
        for p in params:
            p.grad = torch.ones_like(p)
        opt.step()
        assert snapshot(side.opt) == before
        theirs = snapshot(opt)
        side.step()
        assert snapshot(opt) == theirs
        assert {float(e["step"]) for e in opt.state.values()} == {2.0}
        assert {float(e["step"]) for e in side.opt.state.values()} == {2.0}


def test_shallow_copy_shares_state():
    side = make_side(onepass, "adamw")
    reference = make_side(onepass, "adamw")
    side.step()
    other = copy.copy(side.opt)
    reference.step()
    for k in range(4):
        side.set_gradients()
        reference.set_gradients()
        (other if k % 2 else side.opt).step()
        reference.opt.step()
    for p, q in zip(side.params, reference.params, strict=True):
        assert torch.equal(p, q)


def test_two_optimizers_over_the_same_parameters():
    ends = []
    for library in (onepass, torch.optim):
        side = make_side(library, "adamw")
        other = library.SGD(side.params, lr=0.01, momentum=0.9)
        for _ in range(3):
            side.set_gradients()
            side.opt.step()
            other.step()
        ends.append([p.detach() for p in side.params])
    torch.testing.assert_close(*ends, **CLOSE)


def test_step_in_backward():
    """One optimizer a parameter, stepping in its hook, as the gradient arrives."""
    ends = []
    for library in (onepass, torch.optim):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        optimizers = {p: library.AdamW([p], lr=0.1) for p in model.parameters()}

        def hook(p, optimizers=optimizers):
            optimizers[p].step()
            optimizers[p].zero_grad()

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(hook)
        for _ in range(3):
            model(torch.ones(2, 4)).square().sum().backward()
        ends.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*ends, **CLOSE)


def test_meta_parameters_step_like_torch():
    """A model on the meta device has an optimizer state of the right shapes after a step, and no
    memory."""
    for library in (torch.optim, onepass):
        p = nn.Parameter(torch.zeros(4, 3, device="meta"))
        opt = library.AdamW([p])
        p.grad = torch.zeros(4, 3, device="meta")
        opt.step()
        assert opt.state[p]["exp_avg"].is_meta
        assert opt.state[p]["exp_avg"].shape == (4, 3)
