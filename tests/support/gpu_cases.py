"""What the checks on a GPU share: algorithms, parameters at awkward places, gradients, and a
comparison of bits.

A check is a function of a device, found by its name in `CHECKS`: pytest runs them (`test_cuda.py`),
and so does `benchmarks/gpu.py` where there is no pytest. On the CPU those that need no GPU run,
too, which shows that they can.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from table import TABLE
from torch import Tensor, nn

import onepass

CPU = torch.device("cpu")
CHECKS: dict[str, Callable[[torch.device], None]] = {}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Of float32 arithmetic with uniform values from another library: a few units in the last place,
# over a few steps.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}
# Reductions in another order, which several steps carry on.
LOOSE = {"rtol": 1e-3, "atol": 1e-5}
SPECIAL = (
    0.0,
    -0.0,
    1e-45,
    -1e-42,
    1.1754944e-38,
    3.4e38,
    -3.4e38,
    1e30,
    -1e-30,
    float("inf"),
    -float("inf"),
    float("nan"),
)


class Skip(Exception):
    """Why a check cannot run here."""


def check(function: Callable[[torch.device], None]) -> Callable[[torch.device], None]:
    """A check, by its name."""
    CHECKS[function.__name__] = function
    return function


def check_each(cases: Mapping[str, Any]) -> Callable[[Callable[[Any, torch.device], None]], Any]:
    """A check for each of these."""

    def register(function: Callable[[Any, torch.device], None]) -> Any:
        CHECKS.update(
            {
                f"{function.__name__}[{name}]": partial(function, case)
                for name, case in cases.items()
            }
        )
        return function

    return register


def run(name: str, device: torch.device) -> None:
    """Run a check; a step that no kernel serves is an error. Raises `Skip` where it cannot run."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        # Others' warnings are others' affair: the machine with the GPU has its own versions of
        # everything.
        warnings.simplefilter("default")
        warnings.filterwarnings("error", message=".*eager backend.*")
        try:
            CHECKS[name](device)
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
                torch.cuda.synchronize()


def need_gpu(device: torch.device) -> None:
    """Raise `Skip` where there is none."""
    if device.type != "cuda":
        raise Skip("needs a GPU")


@dataclass(frozen=True)
class Case:
    """An optimizer with options; `exact` where every bit is promised."""

    cls: str
    options: Mapping[str, Any] = field(default_factory=dict)
    exact: bool = True

    def make(self, params: Any, mode: str = "", **further: Any) -> onepass.Optimizer:
        """Of these params, in a mode ("fused", "capturable") that not all of torch's classes have
        as an argument."""
        optimizer = getattr(onepass, self.cls)(params, **{**self.options, **further})
        if mode:
            for group in optimizer.param_groups:
                group[mode] = True
        return optimizer


MUON = {"lr": 0.02, "use_muon": None, "adjust_lr_fn": "match_rms_adamw"}
CASES = {str(row): Case(row.name, row.options) for row in TABLE}
SUMMING = {
    "Adafactor": Case("Adafactor", {"lr": 0.05}, exact=False),
    "Adafactor-weight_decay=0.1": Case(
        "Adafactor", {"lr": 0.05, "weight_decay": 0.1, "d": 2.0}, exact=False
    ),
    "Muon": Case("Muon", MUON, exact=False),
    "Muon-nesterov=False": Case("Muon", MUON | {"nesterov": False}, exact=False),
}
EVERY = CASES | SUMMING
# One of each class.
CLASSES = {case.cls: case for case in reversed(EVERY.values())}

# Shapes, and how each lies in memory.
PLAIN = [((), ""), ((1,), ""), ((1023,), ""), ((64, 64), ""), ((3, 5, 7), "")]
AWKWARD = [
    *PLAIN,
    ((0,), ""),
    ((5, 0, 2), ""),
    ((1025,), "unaligned"),
    ((4096,), "unaligned"),
    ((100_003,), ""),
    ((33, 47), "transposed"),
    ((9, 14), "holes"),
]
MATRICES = [
    ((24, 40), ""),
    ((40, 24), ""),
    ((33, 47), ""),
    ((7,), "unaligned"),
    ((5,), ""),
    ((130, 260), ""),
]


def place(values: Tensor, device: torch.device, how: str = "") -> Tensor:
    """A copy of a tensor on a device: at an odd address, in columns, or with holes between its
    elements."""
    values = values.to(device)
    if how == "unaligned":
        return values.new_empty(values.numel() + 1)[1:].view(values.shape).copy_(values)
    if how == "transposed":
        return values.t().contiguous().t()
    if how == "holes":
        return values.new_empty(*values.shape[:-1], 2 * values.shape[-1])[..., ::2].copy_(values)
    return values.clone()


class Side:
    """An optimizer's parameters on a device, and random numbers that are the same on every
    device."""

    def __init__(
        self, device: torch.device, places: Sequence[tuple], dtypes: Iterable[torch.dtype]
    ) -> None:
        self.device = device
        self.random = torch.Generator().manual_seed(0)
        self.params: list[Any] = []
        for dtype in dtypes:
            for shape, how in places:
                self.params.append(nn.Parameter(place(self.randn(shape, dtype), device, how)))
        self.opt: Any = None

    def randn(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.randn(
            shape, generator=self.random, dtype=torch.complex64 if dtype.is_complex else None
        ).to(dtype)

    def groups(self, count: int = 3) -> list[dict[str, Any]]:
        """Param groups with different learning rates."""
        return [{"params": self.params[i::count], "lr": 0.01 * (i + 1)} for i in range(count)]

    def set_gradients(self, without: Iterable[int] = (), special: bool = False) -> None:
        """New gradients in new memory; with `special`, some elements are no ordinary numbers."""
        for i, p in enumerate(self.params):
            g = self.randn(p.shape, p.dtype)
            if special and g.numel() > 100 and not g.is_complex():
                g.view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL).to(g.dtype)
            p.grad = None if i in without else g.to(self.device)

    def step(self, **how: Any) -> None:
        self.set_gradients(**how)
        self.opt.step()


def make_side(
    case: Case,
    device: torch.device,
    places=None,
    dtypes=(torch.float32,),
    mode: str = "",
    groups: int = 3,
    **more: Any,
) -> Side:
    """Parameters with their optimizer."""
    side = Side(device, (AWKWARD if case.exact else MATRICES) if places is None else places, dtypes)
    side.opt = case.make(side.groups(groups), mode, **more)
    return side


def same_bits(got: Tensor, want: Tensor, what: str) -> None:
    """Fail where two tensors differ in a bit; one NaN is as good as another."""
    a, b = (t.detach().cpu() for t in (got, want))
    assert a.dtype == b.dtype, f"{what}: {a.dtype} and {b.dtype}"
    assert a.shape == b.shape, f"{what}: {a.shape} and {b.shape}"
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    a, b = a.reshape(-1), b.reshape(-1)
    number = INTEGERS[a.element_size()]
    differ = (a.view(number) != b.view(number)) & ~(a.isnan() & b.isnan())
    few = [(int(i), a[i].item(), b[i].item()) for i in differ.nonzero()[:5]]
    assert not few, (
        f"{what}: {int(differ.sum())} of {a.numel()} elements differ, (index, got, want): {few}"
    )


def compare(got: Side, want: Side, **tolerance: float) -> None:
    """Equal parameters and states: bit for bit, or within a tolerance."""

    def one(a: Tensor, b: Tensor, what: str) -> None:
        if tolerance and a.numel():
            torch.testing.assert_close(
                a.detach().cpu().double(),
                b.detach().cpu().double(),
                equal_nan=True,
                **tolerance,
                msg=f"{what}: {{}}".format,
            )
        elif not tolerance:
            same_bits(a, b, what)

    for i, (p, q) in enumerate(zip(got.params, want.params, strict=True)):
        one(p, q, f"parameter {i} {tuple(p.shape)} {p.dtype}")
        mine, yours = got.opt.state.get(p, {}), want.opt.state.get(q, {})
        assert mine.keys() == yours.keys(), (
            f"parameter {i}: state {sorted(mine)} and {sorted(yours)}"
        )
        for name, value in yours.items():
            if isinstance(value, Tensor):
                one(
                    mine[name].to(value.dtype),
                    value,
                    f"{name} of parameter {i} {tuple(p.shape)} {p.dtype}",
                )


def uploads(optimizer: Any) -> int:
    """How many tables an optimizer's launches have sent to the device."""
    return sum(
        batch.launch.uploads
        for batch in optimizer._onepass.plan.kernels
        if hasattr(batch.launch, "uploads")
    )
