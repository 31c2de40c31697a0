"""What is queued around a step on a GPU, or into one graph with it: schedulers, scalers, torch's
compiler."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import onepass
from support.gpu_cases import (
    CLASSES,
    CLOSE,
    CPU,
    EVERY,
    LOOSE,
    PLAIN,
    Case,
    Side,
    check,
    check_each,
    compare,
    make_side,
    need_gpu,
    same_bits,
)
from support.gpu_stream_checks import ADAMW, MODES, nobody_waits, places_of

# With an eps that makes steps proportional to gradients: what differs in their last bits stays as
# small.
GENTLE = Case("AdamW", {"lr": 0.05, "eps": 1.0})

# Graphs.


def graph_of(function: Any, device: torch.device, warm: int = 3) -> Any:
    """A graph of what a function queues, after it has run as torch's documentation asks; on the
    CPU, a call of it."""
    if device.type != "cuda":
        for _ in range(warm):
            function()
        return SimpleNamespace(replay=function)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def with_tensor_rates(side: Side) -> list[Tensor]:
    """Learning rates on the device, one for each group."""
    rates = []
    for group in side.opt.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), device=side.device)
        rates.append(group["lr"])
    return rates


@check_each(EVERY)
def a_graph_repeats_the_eager_step(case: Case, device: torch.device) -> None:
    """Captured once, replayed with other gradients and other learning rates: bit for bit what steps
    without it give."""
    eager, captured = (
        make_side(case, device, places=places_of(case), mode="capturable") for _ in range(2)
    )
    rates = [with_tensor_rates(side) for side in (eager, captured)]
    for side in (eager, captured):
        side.set_gradients()
    for _ in range(3):
        eager.opt.step()
    graph = graph_of(captured.opt.step, device)
    for step in range(4):
        for side, own in zip((eager, captured), rates, strict=True):
            for p in side.params:
                p.grad.copy_(side.randn(p.shape, p.dtype))
            for i, rate in enumerate(own):
                rate.fill_(0.02 / (1 + step + i))
        eager.opt.step()
        graph.replay()
    if case.cls == "Muon":
        compare(captured, eager, **LOOSE)
    else:
        compare(captured, eager)


@check_each({cls: CLASSES[cls] for cls in ("AdamW", "SGD", "NAdam")})
def a_schedule_of_torch_drives_a_graph(case: Case, device: torch.device) -> None:
    """A scheduler writes into the tensor that the graph reads."""
    there, here = (
        make_side(case, device, mode="capturable", places=PLAIN),
        make_side(case, CPU, places=PLAIN),
    )
    with_tensor_rates(there)
    for side in (there, here):
        side.set_gradients()
    graph = graph_of(there.opt.step, device)
    for _ in range(3):
        here.opt.step()
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(side.opt, 0.5) for side in (there, here)]
    for _ in range(4):
        graph.replay()
        with warnings.catch_warnings():
            # torch counts calls of `step`, and a replay is none.
            warnings.simplefilter("ignore")
            here.opt.step()
            for scheduler in schedulers:
                scheduler.step()
    compare(there, here, **CLOSE)


@check
def a_graph_with_gradients_of_its_own(device: torch.device) -> None:
    """Forward, backward and step in one graph, in whose own memory the gradients are."""
    models = [
        nn.Sequential(nn.Linear(33, 65), nn.Tanh(), nn.Linear(65, 3)).to(device) for _ in range(2)
    ]
    models[1].load_state_dict(models[0].state_dict())
    x, y = torch.randn(16, 33, device=device), torch.randn(16, 3, device=device)
    optimizers = [GENTLE.make(list(model.parameters()), "capturable") for model in models]

    def train(model: Any, opt: Any) -> None:
        for p in model.parameters():
            p.grad = None
        (model(x) - y).square().mean().backward()
        opt.step()

    for _ in range(3):
        train(models[0], optimizers[0])
    graph = graph_of(lambda: train(models[1], optimizers[1]), device)
    for step in range(4):
        x.copy_(torch.randn(16, 33, generator=torch.Generator().manual_seed(step)))
        train(models[0], optimizers[0])
        graph.replay()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q)


# Gradient scaling.


class Scaled:
    """A side whose gradients come through a scaler, beside one that gets them unscaled."""

    def __init__(self, case: Case, device: torch.device, clip: bool = False) -> None:
        self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=1000)
        self.scaler.scale(torch.ones((), device=device))
        self.side = make_side(case, device, places=PLAIN, mode="fused")
        self.plain = make_side(case, device, places=PLAIN, mode="fused")
        self.clip, self.is_warm = clip, False

    def step(self, bad: float | None = None) -> None:
        """Both step; with `bad`, one element of the scaled gradients is that, and the other side
        does not step."""
        for one in (self.side, self.plain):
            one.set_gradients()
        for p in self.side.params:
            p.grad.mul_(self.scaler.get_scale())
        if bad is not None:
            self.side.params[3].grad.view(-1)[5] = bad
        with nobody_waits(self.side.device) if self.is_warm else nullcontext():
            if self.clip:
                self.scaler.unscale_(self.side.opt)
                nn.utils.clip_grad_norm_(self.side.params, 0.5)
            self.scaler.step(self.side.opt)
            self.scaler.update()
        self.is_warm = True
        if bad is None:
            if self.clip:
                nn.utils.clip_grad_norm_(self.plain.params, 0.5)
            self.plain.opt.step()


@check_each(
    {
        f"{cls}-{how}": (CLASSES[cls], how == "clipped")
        for cls in ("AdamW", "SGD", "NAdam", "Adafactor")
        for how in ("whole", "clipped")
    }
)
def a_scaler_unscales_in_the_step(one: tuple[Case, bool], device: torch.device) -> None:
    """A power of two leaves every bit as it was."""
    case, clip = one
    scaled = Scaled(case, device, clip)
    for _ in range(4):
        scaled.step()
    compare(scaled.side, scaled.plain)


@check_each(
    {
        f"{cls}-{bad}": (CLASSES[cls], bad)
        for cls in ("AdamW", "SGD", "RAdam", "ASGD")
        for bad in (float("inf"), float("nan"))
    }
)
def a_step_that_is_not_finite_changes_nothing(
    one: tuple[Case, float], device: torch.device
) -> None:
    """Weights, state and counts; and the scale is halved. The first step too, whose state is
    new."""
    case, bad = one
    scaled = Scaled(case, device)
    for first in (True, False):
        if not first:
            scaled.step()
        scale = scaled.scaler.get_scale()
        scaled.step(bad)
        assert scaled.scaler.get_scale() == scale / 2
        for p, q in zip(scaled.side.params, scaled.plain.params, strict=True):
            same_bits(p, q, "a parameter after a step that was skipped")
    scaled.step()
    compare(scaled.side, scaled.plain)


# Compiled around it.


@check
def a_compiled_training_step_is_compiled_once(device: torch.device) -> None:
    model = nn.Linear(33, 65).to(device)
    opt = ADAMW.make(list(model.parameters()))
    seen: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(graph)
        return graph

    @torch.compile(backend=backend)
    def train(x: Tensor) -> Tensor:
        opt.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        opt.step()
        return loss

    counts = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's compiler
        for step in range(6):
            for group in opt.param_groups:
                group["lr"] = 0.01 / (1 + step)
            train(torch.ones(4, 33, device=device))
            counts.append(len(seen))
    assert counts[-1] == counts[2], f"graphs compiled up to each step: {counts}"


@check
def a_model_that_torch_runs_as_graphs(device: torch.device) -> None:
    """Gradients come from a graph's own memory, at addresses that it gives out again."""
    need_gpu(device)
    models = [
        nn.Sequential(nn.Linear(33, 65), nn.Tanh(), nn.Linear(65, 3)).to(device) for _ in range(2)
    ]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [GENTLE.make(list(model.parameters())) for model in models]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's compiler
        compiled = torch.compile(models[1], mode="reduce-overhead")
        for step in range(6):
            x = torch.randn(16, 33, device=device)
            for model, opt in zip((models[0], compiled), optimizers, strict=True):
                torch.compiler.cudagraph_mark_step_begin()
                opt.zero_grad()
                (model(x) * (step + 1)).square().mean().backward()
                opt.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@check
def every_class_can_be_made_on_a_device(device: torch.device) -> None:
    """With the arguments that torch's class takes there, too."""
    for cls, case in CLASSES.items():
        p = nn.Parameter(torch.ones(4, 4, device=device))
        p.grad = torch.ones_like(p)
        theirs = getattr(torch.optim, cls).__init__.__annotations__
        for mode in MODES[1:]:
            if mode in theirs:
                optimizer = getattr(onepass, cls)([p], **case.options, **{mode: True})
                optimizer.step()
                count = optimizer.state[p].get("step")
                assert count is None or count.device.type == device.type
