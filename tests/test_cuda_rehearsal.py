"""The checks for a GPU, rehearsed without one: a side of each steps by kernels that Triton
interprets."""

from __future__ import annotations

import math
from types import MethodType
from typing import Any

import pytest
import torch
from support import gpu_cases, gpu_checks, gpu_graph_checks
from support.gpu_cases import AWKWARD, Case, Side, same_bits
from support.interpreted_gpu import interpreted

# Another object than the one by which checks name the other side.
DEVICE = torch.device("cpu", 0)
NAMES = (
    *(
        f"elementwise_algorithms_have_the_cpus_bits[{name}]"
        for name in ("SGD-momentum=0.9", "AdamW")
    ),
    *(
        f"numbers_on_the_device_change_little[{name}]"
        for name in ("AdamW-fused", "ASGD-capturable", "RAdam-capturable")
    ),
    *(f"a_graph_repeats_the_eager_step[{name}]" for name in ("AdamW", "SGD-momentum=0.9")),
    "a_schedule_of_torch_drives_a_graph[NAdam]",
    *(
        f"a_scaler_unscales_in_the_step[{name}]"
        for name in ("AdamW-whole", "SGD-clipped", "NAdam-clipped")
    ),
    *(f"a_step_that_is_not_finite_changes_nothing[{name}]" for name in ("AdamW-inf", "ASGD-nan")),
    *(f"checkpoints_cross_devices[{name}]" for name in ("AdamW", "RMSprop")),
    *(f"checkpoints_go_to_torch_and_back[{name}]" for name in ("AdamW-fused", "SGD-foreach")),
    "states_wider_than_their_parameters",
    "memory_freed_and_taken_again_between_steps",
    "data_swapped_between_steps",
    "gradients_of_other_forms",
    "a_group_added_and_one_grown",
    "closures_and_version_counters",
)


@pytest.fixture
def stepped(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which classes have stepped as on a device; its sides do so, and the longest tensor is
    shorter."""
    make_side, classes = gpu_cases.make_side, []

    def make(case: Case, device: torch.device, *arguments: Any, **more: Any) -> Side:
        side = make_side(case, device, *arguments, **more)
        step = side.opt.step

        def step_on_device(_: Any, closure: Any = None) -> Any:
            with interpreted():
                classes.append(case.cls)
                return step(closure)

        if device is DEVICE:
            # Schedulers ask for a method.
            side.opt.step = MethodType(step_on_device, side.opt)
        return side

    for module in (gpu_checks, gpu_graph_checks):
        monkeypatch.setattr(module, "make_side", make)
    shorter = [(shape if math.prod(shape) < 10_000 else (2500,), how) for shape, how in AWKWARD]
    monkeypatch.setattr(gpu_cases, "AWKWARD", shorter)
    return classes


@pytest.mark.parametrize("name", NAMES)
def test_checks_pass_where_kernels_are_right(
    name: str, stepped: list[str], one_thread: None
) -> None:
    gpu_cases.run(name, DEVICE)
    assert stepped


def test_checks_fail_where_one_bit_is_wrong(
    stepped: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Side.step

    def wrong(side: Side, **how: Any) -> None:
        step(side, **how)
        if side.device is DEVICE:
            bits = side.params[3].data.view(torch.int32)
            bits[5, 7] += 1

    monkeypatch.setattr(Side, "step", wrong)
    with pytest.raises(AssertionError, match=r"parameter 3 .*: 1 of 4096 elements differ"):
        gpu_cases.run("elementwise_algorithms_have_the_cpus_bits[SGD]", DEVICE)


def test_bits_are_compared() -> None:
    nan = float("nan")
    same_bits(torch.tensor([nan, 1.0]), torch.tensor([nan, 1.0]), "NaNs")
    same_bits(torch.tensor([1 + 2j]), torch.tensor([1 + 2j]), "complex numbers")
    for a, b in ((0.0, -0.0), (1.0, 1.0 + 2**-23), (nan, 1.0)):
        with pytest.raises(AssertionError, match="1 of 1 elements differ"):
            same_bits(torch.tensor(a), torch.tensor(b), "a number")
    with pytest.raises(AssertionError, match=r"float32 and torch\.float64"):
        same_bits(torch.tensor(1.0), torch.tensor(1.0, dtype=torch.float64), "a type")
