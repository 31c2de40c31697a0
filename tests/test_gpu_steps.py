"""Whole optimizers on a device that is the processor: as torch's, bit for bit as on the CPU, and
without waiting."""

from __future__ import annotations

import copy
import inspect
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.extra_rules import rolled
from support.interpreted_gpu import interpreted
from support.side_by_side import ALGORITHMS, CLOSE, Side, assert_same, make_side, refuses, snapshot
from torch import Tensor, nn
from torch.optim import lr_scheduler

import onepass
from onepass import Scalar, StepError
from onepass.kernel.functions import call, norm, sqrt, where
from onepass.kernel.gpu import launch as gpu
from onepass.stepping.batch import KernelBatch
from onepass.stepping.device_batch import DeviceBatch

MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "capturable": {"capturable": True},
    "fused": {"fused": True},
}
CASES = [
    pytest.param(algorithm, mode, id=f"{algorithm}-{mode}")
    for algorithm, (name, _) in ALGORITHMS.items()
    for mode, options in MODES.items()
    if set(options) <= set(inspect.signature(getattr(onepass, name)).parameters)
]
# Options of onepass's own that torch's optimizers of the processor do not take.
RESIDENT = [case for case in CASES if "default" not in case.id]


def batches(opt: Any) -> list[KernelBatch]:
    """The launches of an optimizer's last step, all of which are kernels."""
    assert not opt._onepass.plan.eager
    return opt._onepass.plan.kernels


def sent(opt: Any) -> dict[str, int]:
    """How often each table of the one launch has been sent so far."""
    (batch,) = batches(opt)
    return {name: table.uploads for name, table in batch.launch._sent.items()}


def tensors_of(opt: Any) -> list[Tensor]:
    """Parameters and states."""
    params = [p.detach() for group in opt.param_groups for p in group["params"]]
    return [
        *params,
        *(v for p in opt.state for v in opt.state[p].values() if isinstance(v, Tensor)),
    ]


def assert_same_bits(one: Any, other: Any) -> None:
    for i, (a, b) in enumerate(zip(tensors_of(one), tensors_of(other), strict=True)):
        assert a.dtype == b.dtype
        assert torch.equal(a.nan_to_num(nan=7), b.nan_to_num(nan=7)), f"tensor {i}: {a} and {b}"


def run(side: Side, steps: int = 5) -> Side:
    """Some steps, with gradients missing in between."""
    for k in range(steps):
        side.step(only={1: [1, 2], 2: [0]}.get(k))
    return side


# Every algorithm.


@pytest.mark.parametrize(("algorithm", "mode"), CASES)
def test_every_algorithm(algorithm: str, mode: str) -> None:
    """As torch's within its tolerance, and bit for bit as on the CPU, where powers are rounded to
    float32 alike."""
    host = run(make_side(onepass, algorithm))
    theirs = run(make_side(torch.optim, algorithm))
    with interpreted():
        ours = run(make_side(onepass, algorithm, **MODES[mode]))
        kind = KernelBatch if mode == "default" else DeviceBatch
        assert [type(batch) for batch in batches(ours.opt)] == [kind]
    assert_same((ours, theirs))
    assert_same_bits(ours.opt, host.opt)


@pytest.mark.parametrize("mode", ["default", "capturable"])
@pytest.mark.parametrize("name", ["Adafactor", "Muon"])
def test_algorithms_of_matrices(name: str, mode: str) -> None:
    """Sums of another order, and products of matrices by torch itself."""
    shapes = ((40, 30), (7, 5), (40, 30)) if name == "Muon" else ((40, 30), (7,), (2, 3, 4), ())

    def make(library: Any, **modes: Any) -> Side:
        random = torch.Generator().manual_seed(3)
        params = [nn.Parameter(torch.randn(shape, generator=random)) for shape in shapes]
        return Side(
            library,
            getattr(library, name)(params, lr=0.02, weight_decay=0.1, **modes),
            params,
            random,
        )

    host, theirs = run(make(onepass)), run(make(torch.optim))
    with interpreted():
        ours = run(make(onepass, **MODES[mode]))
        assert batches(ours.opt)
    # Five iterations in bfloat16 hide all else.
    wide = {"rtol": 0.05, "atol": 0.01} if name == "Muon" else {}
    assert_same((ours, theirs), **wide)
    assert_same((ours, host))


# Every kind of tensor.


def parameters(random: torch.Generator) -> list[Tensor]:
    """One of each kind; those of one dtype are one launch."""

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    return [
        normal(5, 3),
        normal(1500, dtype=torch.bfloat16),
        normal(7, dtype=torch.float16),
        normal(2, 5, dtype=torch.float64),
        torch.complex(normal(3, 2), normal(3, 2)),
        normal(6, 4).t(),
        # With holes: stepped as a dense copy.
        normal(8, 4)[::2, ::2],
        normal(0, 3),
        normal(),
        normal(40)[1:],
        normal(2, 3, 4, 4).to(memory_format=torch.channels_last),
    ]


def kinds(library: Any, algorithm: str, **modes: Any) -> Side:
    name, options = ALGORITHMS[algorithm]
    random = torch.Generator().manual_seed(1)
    params = [p.requires_grad_() for p in parameters(random)]
    return Side(library, getattr(library, name)(params, **options, **modes), params, random)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("algorithm", ["adamw", "momentum", "amsgrad"])
def test_every_kind_of_tensor(algorithm: str, mode: str) -> None:
    host = run(kinds(onepass, algorithm), 4)
    with interpreted():
        ours = run(kinds(onepass, algorithm, **MODES[mode]), 4)
        # float32, bfloat16, float16, float64 and complex: the dtype of p.
        assert len(batches(ours.opt)) == 5
    for p, q in zip(ours.params, host.params, strict=True):
        if mode == "default" or p.dtype != torch.float64:
            assert torch.equal(p, q), p.dtype
    assert_same((ours, host))


@pytest.mark.parametrize("mode", ["default", "fused"])
def test_wider_states_and_gradients(mode: str) -> None:
    """float32 moments of bfloat16 weights, and float64 gradients, are one launch of their own."""
    sides = []
    for device in (False, True):
        random = torch.Generator().manual_seed(0)
        p = nn.Parameter(torch.randn(1100, generator=random).bfloat16())
        opt = onepass.AdamW([p], **(MODES[mode] if device else {}))
        opt.load_state_dict(
            {
                "state": {
                    0: {
                        "step": torch.tensor(3.0),
                        "exp_avg": torch.zeros(1100),
                        "exp_avg_sq": torch.ones(1100),
                    }
                },
                "param_groups": [opt.param_groups[0] | {"params": [0]}],
            }
        )
        with interpreted() if device else torch.enable_grad():
            for _ in range(2):
                p.grad = torch.randn(1100, generator=random).bfloat16()
                opt.step()
        assert opt.state[p]["exp_avg"].dtype == torch.float32
        sides.append(opt)
    assert_same_bits(*sides)


# Options.


@pytest.mark.parametrize("mode", ["default", "fused"])
def test_a_hundred_groups(mode: str) -> None:
    """One launch, each group with its own options, which change from step to step."""

    def walk(library: Any, **modes: Any) -> Side:
        random = torch.Generator().manual_seed(0)
        params = [torch.randn(3 + i % 5, generator=random).requires_grad_() for i in range(100)]
        groups = [
            {"params": [p], "lr": 0.001 * i, "weight_decay": 0.01 * (i % 7)}
            for i, p in enumerate(params)
        ]
        side = Side(library, library.AdamW(groups, **modes), params, random)
        for k in range(3):
            side.step(only=range(k, 100))
            for group in side.opt.param_groups[::3]:
                group["lr"] *= 0.5
                group["betas"] = (0.8, 0.95 + 0.001 * k)
        return side

    host, theirs = walk(onepass), walk(torch.optim)
    with interpreted():
        ours = walk(onepass, **MODES[mode])
        assert len(batches(ours.opt)) == 1
    assert_same((ours, theirs))
    assert_same_bits(ours.opt, host.opt)


@pytest.mark.parametrize("shape", [(), (1,)], ids=["number", "vector"])
@pytest.mark.parametrize("mode", MODES)
def test_rates_that_are_tensors(mode: str, shape: tuple[int, ...]) -> None:
    """Changed in place, and replaced."""

    def walk(library: Any, **modes: Any) -> Side:
        side = make_side(library, "adamw", lr=torch.full(shape, 0.05), **modes)
        for k in range(4):
            side.step()
            group = side.opt.param_groups[0]
            if k == 1:
                group["lr"].fill_(0.01)
            if k == 2:
                group["lr"] = torch.full(shape, 0.2, dtype=torch.float64)
        return side

    host = walk(onepass)
    with interpreted():
        ours = walk(onepass, **MODES[mode])
        assert batches(ours.opt)
    assert_same_bits(ours.opt, host.opt)


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "schedulers", [onepass.lr_scheduler, lr_scheduler], ids=["onepass", "torch"]
)
def test_schedules(schedulers: Any, mode: str, tensor_lr: bool) -> None:
    def walk(library: Any, schedules: Any, **modes: Any) -> Side:
        side = make_side(library, "adam", lr=torch.tensor(0.1) if tensor_lr else 0.1, **modes)
        schedule = schedules.CosineAnnealingLR(side.opt, 5)
        for _ in range(5):
            side.step()
            schedule.step()
        return side

    theirs = walk(torch.optim, lr_scheduler)
    with interpreted():
        ours = walk(onepass, schedulers, **MODES[mode])
        assert batches(ours.opt)
    assert_same((ours, theirs))


# Checkpoints.


CHANGES = [
    pytest.param(algorithm, before, after, id=f"{algorithm}-{before}-{after}")
    for algorithm, modes in {
        "adamw": MODES,
        "nadam": tuple(MODES)[:2],
        "momentum": MODES,
        "asgd": tuple(MODES)[:2],
    }.items()
    for before in modes
    for after in modes
]


@pytest.mark.parametrize(("algorithm", "before", "after"), CHANGES)
def test_modes_continue_each_other(algorithm: str, before: str, after: str) -> None:
    host = run(make_side(onepass, algorithm), 5)
    with interpreted():
        ours = make_side(onepass, algorithm, **MODES[before])
        run(ours, 2)
        saved = copy.deepcopy(ours.opt.state_dict())
        for group in saved["param_groups"]:
            group.update(
                {
                    key: value
                    for key, value in (("capturable", False), ("fused", None))
                    if key in group
                }
            )
            group.update(MODES[after])
        name, options = ALGORITHMS[algorithm]
        ours.opt = getattr(onepass, name)(ours.params, **options, **MODES[after])
        ours.opt.load_state_dict(saved)
        for k in range(2, 5):
            ours.step(only={1: [1, 2], 2: [0]}.get(k))
        assert [type(b) for b in batches(ours.opt)] == [
            KernelBatch if after == "default" else DeviceBatch
        ]
    assert_same_bits(ours.opt, host.opt)


def test_a_mode_may_change_between_two_steps() -> None:
    """As schedulers and users write into groups."""
    host = run(make_side(onepass, "adamw"), 6)
    with interpreted():
        ours = make_side(onepass, "adamw")
        for k in range(6):
            ours.opt.param_groups[0].update(capturable=k in (1, 2), fused=True if k == 4 else None)
            ours.step(only={1: [1, 2], 2: [0]}.get(k))
    assert_same_bits(ours.opt, host.opt)


# Gradient scaling.


def scaled_step(
    side: Side, scale: float, found_inf: float, only: Sequence[int] | None = None
) -> None:
    """A step as `GradScaler` leaves it to an optimizer."""
    side.set_gradients(only)
    for p in side.params:
        if p.grad is not None:
            p.grad.mul_(scale)
    side.opt.grad_scale, side.opt.found_inf = torch.tensor(scale), torch.tensor(found_inf)
    side.opt.step()
    del side.opt.grad_scale, side.opt.found_inf
    side.opt.zero_grad()


@pytest.mark.parametrize(
    ("algorithm", "mode"), [*RESIDENT, pytest.param("adamw", "default", id="adamw-default")]
)
def test_gradient_scaling(algorithm: str, mode: str) -> None:
    """Unscaled in the pass; where a gradient is not finite nothing has happened, and a first step
    is still to come."""
    host = make_side(onepass, algorithm)
    with interpreted():
        ours = make_side(onepass, algorithm, **MODES[mode])
        start = [p.detach().clone() for p in ours.params]
        scaled_step(ours, 1024.0, 1.0)
        assert all(torch.equal(p, q) for p, q in zip(ours.params, start, strict=True))
        assert not any(float(s["step"]) for s in ours.opt.state.values() if "step" in s)
        host.set_gradients()
        scaled_step(ours, 1024.0, 0.0)
        host.step()
        before = [t.clone() for t in tensors_of(ours.opt)]
        scaled_step(ours, 2.0, 2.0, [0, 1])
        assert all(torch.equal(a, b) for a, b in zip(tensors_of(ours.opt), before, strict=True))
        host.set_gradients([0, 1])
        host.opt.zero_grad()
        for k in range(3):
            scaled_step(ours, 2.0**k, 0.0, [0, k])
        ours.step()
    for k in range(3):
        host.step(only=[0, k])
    host.step()
    assert_same_bits(ours.opt, host.opt)


# The host does not wait.


READS = (
    "item",
    "tolist",
    "numpy",
    "cpu",
    "__float__",
    "__int__",
    "__bool__",
    "__index__",
    "__array__",
)
PACKAGE = str(Path(onepass.__file__).parent)


@contextmanager
def watched() -> Iterator[list[str]]:
    """Notes where the package reads what a tensor holds; pinned memory, which is the host's own, it
    may fill."""
    found: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in READS:
            original = getattr(Tensor, name)

            def noted(
                self: Tensor, *args: Any, name: str = name, original: Any = original, **how: Any
            ) -> Any:
                caller = sys._getframe(1)
                file = caller.f_code.co_filename
                if file.startswith(PACKAGE) and not (
                    file.endswith("uploads.py") and name == "numpy"
                ):
                    found.append(f"{Path(file).name}:{caller.f_lineno} {name}")
                return original(self, *args, **how)

            patch.setattr(Tensor, name, noted)
        yield found


@pytest.mark.parametrize(("algorithm", "mode"), RESIDENT)
def test_a_step_reads_nothing_from_the_device(algorithm: str, mode: str) -> None:
    """Neither the first nor a later one, nor one of other parameters, with rates and scales that
    lie there."""
    with interpreted():
        ours = make_side(onepass, algorithm, lr=torch.tensor(0.05), **MODES[mode])
        with watched() as found:
            for k in range(4):
                scaled_step(ours, 4.0, float(k == 2), [0, 1, 2] if k < 3 else None)
        assert found == []


def test_what_watches_sees_a_read() -> None:
    with interpreted():
        ours = make_side(onepass, "adamw", lr=torch.tensor(0.05))
        with watched() as found:
            ours.step()
    assert found


# What is sent.


@pytest.mark.parametrize(("algorithm", "mode"), CASES)
def test_a_second_step_compiles_nothing_and_sends_only_what_changed(
    algorithm: str, mode: str, monkeypatch
) -> None:
    # Step counts of the host are part of the uniform values, if the algorithm counts at all; on a
    # device they are not.
    rows = "rows" if mode == "default" else "leaves"
    with interpreted():
        ours = make_side(onepass, algorithm, **MODES[mode])
        gradients = [ours.randn(*p.shape) for p in ours.params]

        def step() -> set[str]:
            for p, g in zip(ours.params, gradients, strict=True):
                p.grad = g
            before = {} if ours.opt._onepass.plan is None else sent(ours.opt)
            ours.opt.step()
            return {name for name, count in sent(ours.opt).items() if count != before.get(name, 0)}

        assert step() >= {"addresses", "facts", "units 0", rows}
        monkeypatch.setattr(gpu, "lower", None)
        for _ in range(5):
            assert step() <= ({"rows"} if mode == "default" else set())
        # More and more steps ahead, unless each product of momenta is news.
        assert sent(ours.opt)["addresses"] == 1
        assert mode != "default" or sent(ours.opt)["rows"] <= (
            6 if algorithm in ("nadam", "asgd") else 3
        )
        ours.opt.param_groups[0]["lr"] = 0.03
        # Rprop's rate is the size of its first step alone.
        assert step() >= ({rows} if algorithm != "rprop" else set())
        # Another gradient, at another address.
        gradients[0] = gradients[0].clone()
        assert step() - {"rows"} == {"addresses"}


# Others than dense gradients, and others than plain steps.


def test_sparse_gradients_take_the_eager_backend() -> None:
    """With one warning, and right."""
    random = torch.Generator().manual_seed(0)
    start, values = torch.randn(6, 3, generator=random), torch.randn(2, 3, generator=random)
    ends = []
    for library in (torch.optim, onepass):
        p = start.clone().requires_grad_()
        opt = library.SGD([p], lr=0.1)
        with interpreted(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                p.grad = torch.sparse_coo_tensor(torch.tensor([[4, 1]]), values, (6, 3))
                opt.step()
        own = [w for w in caught if "eager backend" in str(w.message)]
        assert len(own) == (library is onepass)
        ends.append(p.detach())
    torch.testing.assert_close(*ends, **CLOSE)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averages(use_buffers: bool) -> None:
    ends = []
    for device in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        average = onepass.swa_utils.AveragedModel(
            model, multi_avg_fn=onepass.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=use_buffers
        )
        with interpreted() if device else torch.enable_grad():
            for _ in range(3):
                with torch.no_grad():
                    for p in model.parameters():
                        p.add_(torch.randn_like(p))
                average.update_parameters(model)
        ends.append([t.clone() for t in average.state_dict().values()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


class Scaled(onepass.Optimizer):
    """As a user would write it: norms, a number that is kept, and a function of matrices."""

    def __init__(self, params: Any, lr: float = 0.1, **modes: Any) -> None:
        super().__init__(
            params, {"lr": lr, "foreach": None, "fused": None, "capturable": False, **modes}
        )

    @staticmethod
    def rule(p, g, momentum, trust: Scalar, *, lr, step, first):
        trust = trust * 0.9 + norm(g) / (norm(p) + 1)
        momentum = call(rolled, where(first, g, momentum * 0.9 + g), trust, 0.5)
        return {"p": p - lr / sqrt(step + trust) * momentum, "momentum": momentum, "trust": trust}


@pytest.mark.parametrize("mode", MODES)
def test_a_rule_of_ones_own(mode: str) -> None:
    def walk(**modes: Any) -> Any:
        random = torch.Generator().manual_seed(0)
        params = [
            torch.randn(shape, generator=random).requires_grad_()
            for shape in ((3, 4), (40, 50), (3, 4), (2, 0))
        ]
        side = Side(onepass, Scaled(params, **modes), params, random)
        return run(side, 4)

    host = walk()
    with interpreted():
        ours = walk(**MODES[mode])
        assert batches(ours.opt)
    for a, b in zip(tensors_of(ours.opt), tensors_of(host.opt), strict=True):
        torch.testing.assert_close(a, b, check_device=False, **CLOSE)


# What shares memory.


@pytest.mark.parametrize("mode", ["default", "fused"])
def test_parameters_that_overlap_are_stepped_in_turn(mode: str) -> None:
    ends = []
    for library in (torch.optim, onepass):
        memory = torch.arange(40.0)
        params = [memory[:30].requires_grad_(), memory.detach()[10:].requires_grad_()]
        opt = library.SGD(
            params,
            lr=0.1,
            momentum=0.9,
            weight_decay=0.5,
            **(MODES[mode] if library is onepass else {}),
        )
        with interpreted():
            for _ in range(3):
                for i, p in enumerate(params):
                    p.grad = torch.full_like(p, 1.0 + i)
                opt.step()
        ends.append(memory.detach().clone())
    torch.testing.assert_close(*ends, **CLOSE)


@pytest.mark.parametrize("mode", ["capturable", "fused"])
def test_a_step_count_that_two_parameters_share(mode: str) -> None:
    """Each counts for itself from then on."""
    host = run(make_side(onepass, "adamw"), 5)
    with interpreted():
        ours = make_side(onepass, "adamw", **MODES[mode])
        ours.step()
        one = ours.opt.state[ours.params[0]]["step"]
        for p in ours.params:
            ours.opt.state[p]["step"] = one
        for k in range(1, 5):
            ours.step(only={1: [1, 2], 2: [0]}.get(k))
        assert len({ours.opt.state[p]["step"].data_ptr() for p in ours.params}) == len(ours.params)
    assert_same_bits(ours.opt, host.opt)


@pytest.mark.parametrize("mode", MODES)
def test_memory_may_move_between_two_steps(mode: str) -> None:
    """Parameters, states and step counts in other places: read anew."""

    def walk(**modes: Any) -> Side:
        side = make_side(onepass, "adamw", **modes)
        for k in range(5):
            side.step(only={1: [1, 2]}.get(k))
            for p in side.params[k % 2 :: 2]:
                p.data = p.data.clone()
                own = side.opt.state[p]
                own["exp_avg"] = own["exp_avg"].clone()
                own["step"] = own["step"].clone()
        return side

    host = walk()
    with interpreted():
        ours = walk(**MODES[mode])
    assert_same_bits(ours.opt, host.opt)


# Errors.


def test_errors_leave_everything_as_it_was() -> None:
    """Before the first step and after some, in every mode."""
    for mode in MODES.values():
        with interpreted():
            ours = make_side(onepass, "adamw", **mode)
            for _ in range(2):
                ours.set_gradients()
                ours.opt.param_groups[0]["lr"] = torch.ones(2)
                refuses(
                    ours.opt,
                    "param group option 'lr' must be a number, got a tensor|must be a number",
                    StepError,
                )
                ours.opt.param_groups[0]["lr"] = 0.1
                ours.opt.step()
                exp_avg = ours.opt.state[ours.params[0]]["exp_avg"]
                ours.set_gradients()
                ours.opt.state[ours.params[0]]["exp_avg"] = torch.zeros(7)
                refuses(ours.opt, "exp_avg", StepError)
                ours.opt.state[ours.params[0]]["exp_avg"] = exp_avg
                ours.opt.step()


def broken(matrices: Tensor, *numbers: Any) -> Tensor:
    raise RuntimeError("no memory")


def test_functions_that_fail_leave_everything_as_it_was() -> None:
    class Failing(Scaled):
        @staticmethod
        def rule(p, g, momentum, *, lr, step):
            return {"p": p - lr * call(broken, g + momentum), "momentum": g * step}

    for mode in MODES.values():
        with interpreted():
            p = torch.ones(3, 3, requires_grad=True)
            p.grad = torch.ones(3, 3)
            opt = Failing([p], **mode)
            before = snapshot(opt)
            with pytest.raises(RuntimeError, match="no memory"):
                opt.step()
            assert snapshot(opt) == before
