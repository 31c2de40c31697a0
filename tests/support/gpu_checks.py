"""What a GPU must compute: the CPU's bits, whatever tensors look like and whatever happens to their
memory."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import onepass
from onepass import swa_utils
from support.gpu_cases import (
    AWKWARD,
    CASES,
    CLASSES,
    CLOSE,
    CPU,
    EVERY,
    FLOATS,
    LOOSE,
    MATRICES,
    PLAIN,
    SUMMING,
    Case,
    Side,
    Skip,
    check,
    check_each,
    compare,
    make_side,
    need_gpu,
    same_bits,
)

ADAMW = Case("AdamW", {"lr": 0.01, "weight_decay": 0.1})
MODES = {"fused": "fused", "capturable": "capturable"}


def both(case: Case, device: torch.device, **how: Any) -> tuple[Side, Side]:
    """On a device, and on the CPU."""
    mode = how.pop("mode", "")
    return make_side(case, device, mode=mode, **how), make_side(case, CPU, **how)


def step_both(sides: tuple[Side, Side], **how: Any) -> None:
    for side in sides:
        side.step(**how)


@check_each(CASES)
def elementwise_algorithms_have_the_cpus_bits(case: Case, device: torch.device) -> None:
    """All types in one list, three groups, sizes and places that no vector fits, a parameter
    without a gradient."""
    sides = both(case, device, dtypes=(*FLOATS, torch.complex64))
    for step in range(4):
        step_both(sides, without=(3, 17) if step == 2 else (), special=step == 3)
        compare(*sides)


@check_each(SUMMING)
def algorithms_with_sums_come_close(case: Case, device: torch.device) -> None:
    sides = both(case, device)
    before = [p.detach().clone() for p in sides[1].params]
    for _ in range(4):
        step_both(sides)
    if case.cls == "Muon":
        # Its products are of bfloat16, where the device has them, and a polynomial carries their
        # errors on.
        for p, q, start in zip(sides[0].params, sides[1].params, before, strict=True):
            moved, wanted = p.detach().cpu() - start, q.detach() - start
            assert (moved - wanted).norm() <= 0.05 * wanted.norm()
    else:
        compare(*sides, **LOOSE)


@check_each({name: case for name, case in SUMMING.items() if case.cls != "Muon"})
def sums_are_the_same_every_time(case: Case, device: torch.device) -> None:
    """Bit for bit: nothing depends on which program of a launch ends first."""
    one, other = (make_side(case, device, places=[*MATRICES, ((513, 700), "")]) for _ in range(2))
    for _ in range(3):
        one.step()
        other.step()
    compare(one, other)


@check_each({f"{cls}-{mode}": (case, mode) for cls, case in CLASSES.items() for mode in MODES})
def numbers_on_the_device_change_little(one: tuple[Case, str], device: torch.device) -> None:
    """Step counts, and what follows from them, computed there: powers of another library."""
    case, mode = one
    if case.cls == "Muon":
        raise Skip("its products are compared elsewhere")
    sides = both(case, device, places=PLAIN if case.exact else MATRICES, mode=mode)
    for _ in range(4):
        step_both(sides)
    compare(*sides, **(CLOSE if case.exact else LOOSE))
    for p in sides[0].params:
        count = sides[0].opt.state[p].get("step")
        assert count is None or count.device == p.device


@check
def states_wider_than_their_parameters(device: torch.device) -> None:
    """bfloat16 parameters with moments in float32, as a checkpoint may bring them."""
    sides = both(ADAMW, device, dtypes=(torch.bfloat16,))
    step_both(sides)
    for side in sides:
        saved = copy.deepcopy(side.opt.state_dict())
        for entries in saved["state"].values():
            entries |= {name: entries[name].float() for name in ("exp_avg", "exp_avg_sq")}
        side.opt.load_state_dict(saved)
    for _ in range(3):
        step_both(sides)
    assert sides[0].opt.state[sides[0].params[3]]["exp_avg"].dtype == torch.float32
    compare(*sides)


@check
def many_groups_are_one_launch(device: torch.device) -> None:
    sides = both(ADAMW, device, places=[((16, 16), "")] * 500, groups=100)
    for _ in range(3):
        step_both(sides)
    compare(*sides)
    assert len(sides[0].opt._onepass.plan.kernels) == 1


@check
def offsets_have_64_bits(device: torch.device) -> None:
    need_gpu(device)
    size = 2**31 + 1025
    if torch.cuda.mem_get_info(device)[0] < 40 << 30:
        raise Skip("needs 40 GiB of memory")
    p = nn.Parameter(torch.ones(size, dtype=torch.bfloat16, device=device))
    p.grad = torch.full_like(p, 0.5)
    onepass.SGD([p], lr=0.5, momentum=0.9).step()
    for part in (p[:4096], p[2**31 - 512 : 2**31 + 512], p[-1025:]):
        same_bits(part, torch.full(part.shape, 0.75, dtype=torch.bfloat16), "p")
    assert p.float().sum(dtype=torch.float64).item() == 0.75 * size


# Memory.


@check
def memory_freed_and_taken_again_between_steps(device: torch.device) -> None:
    """Gradients are dropped, others take their memory, and the cache is emptied: no old address is
    used."""
    sides = both(ADAMW, device)
    for step in range(6):
        step_both(sides)
        for side in sides:
            for p in side.params:
                p.grad = None
        taken = [torch.full((100_003,), float("nan"), device=device) for _ in range(8)]
        if step == 3 and device.type == "cuda":
            torch.cuda.empty_cache()
        del taken
    compare(*sides)


@check
def data_swapped_between_steps(device: torch.device) -> None:
    sides = both(ADAMW, device, places=PLAIN)
    for step in range(5):
        step_both(sides)
        for side in sides:
            for i, p in enumerate(side.params):
                if i % 2 == step % 2:
                    old = p.data
                    p.data = p.data.clone()
                    old.fill_(float("nan"))
    compare(*sides)


@check
def gradients_of_other_forms(device: torch.device) -> None:
    """Expanded, transposed, and of a lazily negated view."""
    sides = both(ADAMW, device, places=[((64, 48), ""), ((48, 64), ""), ((40,), "")])
    for _ in range(3):
        for side in sides:
            side.set_gradients()
            a, b, c = side.params
            a.grad = a.grad[:1].expand(64, 48)
            b.grad = a.grad.clone().t()
            c.grad = torch._neg_view(c.grad)
            side.opt.step()
    compare(*sides)


@check
def a_group_added_and_one_grown(device: torch.device) -> None:
    sides = both(ADAMW, device, places=PLAIN)
    step_both(sides)
    for side in sides:
        more = [
            nn.Parameter(side.randn((300,), torch.float32).to(device=side.device)) for _ in range(2)
        ]
        side.opt.add_param_group({"params": more, "lr": 0.5})
        side.params += more
    for _ in range(2):
        step_both(sides)
    compare(*sides)


# What surrounds a step.


@check_each({cls: CLASSES[cls] for cls in ("AdamW", "SGD", "NAdam", "Adafactor", "RMSprop")})
def checkpoints_cross_devices(case: Case, device: torch.device) -> None:
    """From the CPU to the device and back, through a file that holds tensors alone."""
    places = PLAIN if case.exact else MATRICES
    here = make_side(case, CPU, places=places)
    for _ in range(2):
        here.step()
    there = make_side(case, device, places=places)
    _copy(here, there)
    for _ in range(2):
        here.step()
        there.step()
    compare(there, here, **({} if case.exact else LOOSE))
    _copy(there, here)
    here.step()
    there.step()
    compare(there, here, **({} if case.exact else LOOSE))


def _copy(source: Side, target: Side) -> None:
    """Bring a side to where another is, through a file."""
    file = io.BytesIO()
    torch.save(
        {"opt": source.opt.state_dict(), "params": [p.detach() for p in source.params]}, file
    )
    file.seek(0)
    saved = torch.load(file, weights_only=True, map_location="cpu")
    target.opt.load_state_dict(saved["opt"])
    with torch.no_grad():
        for p, value in zip(target.params, saved["params"], strict=True):
            p.copy_(value)
    target.random.set_state(source.random.get_state())


@check_each(
    {
        f"{cls}-{mode}": (cls, mode)
        for cls in ("AdamW", "Adam", "SGD", "Adagrad")
        for mode in ("fused", "foreach")
    }
)
def checkpoints_go_to_torch_and_back(one: tuple[str, str], device: torch.device) -> None:
    cls, mode = one
    if (cls, mode) == ("Adagrad", "fused") and device.type == "cuda":
        raise Skip("torch's Adagrad is fused on the CPU alone")
    case = Case(
        cls, {"lr": 0.01, "weight_decay": 0.1} | ({"momentum": 0.9} if cls == "SGD" else {})
    )
    ours, theirs = make_side(case, device, places=PLAIN), make_side(case, device, places=PLAIN)
    theirs.opt = getattr(torch.optim, cls)(theirs.groups(), **case.options, **{mode: True})
    for _ in range(2):
        ours.step()
        theirs.step()
    compare(ours, theirs, **CLOSE)
    saved = copy.deepcopy(ours.opt.state_dict()), copy.deepcopy(theirs.opt.state_dict())
    ours.opt.load_state_dict(saved[1])
    # What torch's mode needs is no part of ours.
    for group in saved[0]["param_groups"]:
        group[mode] = True
    theirs.opt.load_state_dict(saved[0])
    for _ in range(2):
        ours.step()
        theirs.step()
    compare(ours, theirs, **CLOSE)


@check_each(
    {
        "SparseAdam": Case("SparseAdam"),
        "SGD": Case("SGD", {"lr": 0.1}),
        "Adagrad": Case("Adagrad", {"lr": 0.1}),
    }
)
def sparse_gradients_step_their_rows(case: Case, device: torch.device) -> None:
    sides = []
    for where in (device, CPU):
        side = Side(where, [((50, 8), "")], (torch.float32,))
        side.opt = case.make(side.params)
        sides.append(side)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*slower eager backend.*")
        for _ in range(3):
            rows = torch.randperm(50)[:7]
            for side in sides:
                values = side.randn((7, 8), torch.float32)
                g = torch.sparse_coo_tensor(rows[None], values, (50, 8), check_invariants=True)
                side.params[0].grad = g.to(side.device)
                side.opt.step()
    compare(*sides, **CLOSE)


@check_each({"EMA": "get_ema_multi_avg_fn", "SWA": "get_swa_multi_avg_fn"})
def averages_have_the_cpus_bits(name: str, device: torch.device) -> None:
    found = []
    for where in (device, CPU):
        random = torch.Generator().manual_seed(0)
        model = nn.Sequential(nn.Linear(33, 65), nn.Linear(65, 7)).to(where)
        for p in model.parameters():
            p.data = torch.randn(p.shape, generator=random).to(where)
        average = swa_utils.AveragedModel(model, multi_avg_fn=getattr(swa_utils, name)())
        for _ in range(4):
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(torch.randn(p.shape, generator=random).to(where))
            average.update_parameters(model)
        found.append(list(average.module.parameters()))
    for a, b in zip(*found, strict=True):
        same_bits(a, b, "average")


@check
def parameters_of_two_devices_in_one_list(device: torch.device) -> None:
    sides = both(ADAMW, device, places=PLAIN)
    for i in (0, 3):
        p = sides[0].params[i]
        p.data = p.data.cpu()
    for _ in range(3):
        for side in sides:
            side.set_gradients()
            for p in side.params:
                p.grad = p.grad.to(p.device)
            side.opt.step()
    compare(*sides)


@check
def a_state_on_another_device_is_one_sentence(device: torch.device) -> None:
    need_gpu(device)
    side = make_side(ADAMW, device, places=PLAIN)
    side.step()
    own = side.opt.state[side.params[3]]
    own["exp_avg"] = own["exp_avg"].cpu()
    before = [p.detach().clone() for p in side.params]
    side.set_gradients()
    said = refused(side.opt.step)
    assert "\n" not in said
    assert len(said) < 400
    assert "exp_avg" in said, said
    for p, q in zip(side.params, before, strict=True):
        same_bits(p, q, "a parameter after a step that was refused")


def refused(function: Callable[[], Any]) -> str:
    """What a call says that raises `StepError`."""
    try:
        function()
    except onepass.StepError as error:
        return str(error)
    raise AssertionError("nothing was refused")


@check
def closures_and_version_counters(device: torch.device) -> None:
    """The closure's loss comes back, gradients stay as they are, and autograd sees that weights
    have changed."""
    side = make_side(ADAMW, device, places=PLAIN)
    side.step()
    before = [(p._version, p.grad.clone()) for p in side.params]
    assert side.opt.step(lambda: torch.tensor(3.0)) == 3.0
    for p, (version, g) in zip(side.params, before, strict=True):
        assert p._version > version
        same_bits(p.grad, g, "a gradient")


@check
def a_rate_of_zero_moves_nothing(device: torch.device) -> None:
    for cls, case in CLASSES.items():
        side = make_side(case, device, places=PLAIN if case.exact else MATRICES)
        before = [p.detach().clone() for p in side.params]
        for group in side.opt.param_groups:
            group["lr"] = 0.0
        for p in side.params:
            p.grad = torch.zeros_like(p)
        side.opt.step()
        for p, q in zip(side.params, before, strict=True):
            same_bits(p, q, f"{cls}: a parameter")


@check
def all_places_are_tried(device: torch.device) -> None:
    """The list is what its words say: an odd address, columns, holes."""
    side = Side(device, AWKWARD, (torch.float32,))
    of: dict[str, Tensor] = {how: p for p, (_, how) in zip(side.params, AWKWARD, strict=True)}
    assert of["unaligned"].data_ptr() % 16 == 4
    assert not of["transposed"].is_contiguous()
    assert not of["holes"].is_contiguous()
    assert {case.cls for case in EVERY.values()} >= {"SGD", "Adam", "AdamW", "Muon", "Adafactor"}
