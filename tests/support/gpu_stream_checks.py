"""What a step on a GPU must not do: make the host wait, send what is there, read what was
overwritten."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

from support.gpu_cases import (
    AWKWARD,
    CLASSES,
    CLOSE,
    CPU,
    MATRICES,
    PLAIN,
    Case,
    Skip,
    check,
    check_each,
    compare,
    make_side,
    need_gpu,
    uploads,
)

ADAMW = Case("AdamW", {"lr": 0.01, "weight_decay": 0.1})
MODES = ("", "fused", "capturable")
# How long the spinning kernel holds a stream back: far longer than the host needs for what it
# queues behind it.
CYCLES = 400_000_000


@contextlib.contextmanager
def nobody_waits(device: torch.device) -> Iterator[None]:
    """Whatever makes the host wait for a GPU is an error."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def places_of(case: Case) -> list[Any]:
    return PLAIN if case.exact else MATRICES


# Host and device.


@check_each(
    {f"{cls}-{mode or 'default'}": (case, mode) for cls, case in CLASSES.items() for mode in MODES}
)
def no_step_waits_for_the_device(one: tuple[Case, str], device: torch.device) -> None:
    """Gradients are new at each step, and so are learning rates."""
    need_gpu(device)
    case, mode = one
    side = make_side(case, device, places=places_of(case), mode=mode)
    for _ in range(2):
        side.step()
    values = [[torch.randn_like(p) for p in side.params] for _ in range(3)]
    with nobody_waits(device):
        for step, gradients in enumerate(values):
            for p, g in zip(side.params, gradients, strict=True):
                p.grad = g
            for group in side.opt.param_groups:
                group["lr"] = 0.01 / (1 + step)
            side.opt.step()
            side.opt.zero_grad()
    torch.cuda.synchronize()


@check
def what_is_there_is_not_sent_again(device: torch.device) -> None:
    """Nothing while nothing moves and counts are on the device; else only the values that follow
    from a count."""
    need_gpu(device)
    for case, mode, most in (
        (Case("SGD", {"lr": 0.1, "momentum": 0.9}), "", 0),
        (ADAMW, "", 1),
        (ADAMW, "fused", 0),
        (ADAMW, "capturable", 0),
        (Case("Adafactor"), "capturable", 0),
    ):
        side = make_side(case, device, places=MATRICES, mode=mode)
        for _ in range(2):
            side.step()
        side.opt.step()
        before = uploads(side.opt)
        assert before > 0
        for _ in range(5):
            side.opt.step()
        sent = uploads(side.opt) - before
        assert sent <= 5 * most, f"{case.cls} {mode}: {sent} tables were sent in 5 steps"
        side.params[0].grad = side.params[0].grad.clone()
        side.opt.step()
        assert uploads(side.opt) > before + sent, "an address has changed, and nothing was sent"


@check
def a_stream_held_back_sees_the_tables_of_its_time(device: torch.device) -> None:
    """While the device spins, twenty steps are queued, each with other addresses and another
    learning rate."""
    need_gpu(device)
    for mode in MODES:
        there, here = make_side(ADAMW, device, mode=mode), make_side(ADAMW, CPU)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Until all variants of the kernels are compiled, for which the host takes long.
            for _ in range(3):
                there.step()
                here.step()
            # Copies of gradients from pageable memory would wait: they are all on the device
            # before.
            gradients = [[there.randn(p.shape, p.dtype) for p in there.params] for _ in range(20)]
            sent = [[g.to(device) for g in gs] for gs in gradients]
            stream.synchronize()
            torch.cuda._sleep(CYCLES)
            for step, gs in enumerate(sent):
                for p, g in zip(there.params, gs, strict=True):
                    p.grad = g.clone()
                for group in there.opt.param_groups:
                    group["lr"] = 0.001 * (step + 1)
                there.opt.step()
                for p in there.params:
                    p.grad = None
            was_held = not stream.query()
        stream.synchronize()
        for step, gs in enumerate(gradients):
            for p, g in zip(here.params, gs, strict=True):
                p.grad = g
            for group in here.opt.param_groups:
                group["lr"] = 0.001 * (step + 1)
            here.opt.step()
        compare(there, here, **(CLOSE if mode else {}))
        assert was_held, (
            f"{mode or 'default'}: the device had done all before the last step was queued"
        )


@check
def two_streams_in_turns(device: torch.device) -> None:
    """One optimizer steps on two streams, each behind the other; beside them another one on a
    third."""
    need_gpu(device)
    there, here, beside = make_side(ADAMW, device), make_side(ADAMW, CPU), make_side(ADAMW, device)
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    third = torch.cuda.Stream(device)
    torch.cuda.synchronize()
    last = torch.cuda.current_stream()
    for step in range(8):
        now = streams[step % 2]
        now.wait_stream(last)
        with torch.cuda.stream(now):
            there.step()
        with torch.cuda.stream(third):
            beside.step()
        here.step()
        last = now
    torch.cuda.synchronize()
    compare(there, here)
    compare(beside, here)


@check
def two_devices_step_by_themselves(device: torch.device) -> None:
    need_gpu(device)
    if torch.cuda.device_count() < 2:
        raise Skip("needs two GPUs")
    there, here = make_side(ADAMW, device, places=PLAIN), make_side(ADAMW, CPU, places=PLAIN)
    for p in there.params[::2]:
        p.data = p.data.to("cuda:1")
    for _ in range(4):
        there.set_gradients()
        for p in there.params:
            p.grad = p.grad.to(p.device)
        there.opt.step()
        here.step()
    for i in range(2):
        torch.cuda.synchronize(i)
    compare(there, here)


@check
def the_host_runs_ahead(device: torch.device) -> None:
    """A step returns while the device is still held back, in every mode."""
    need_gpu(device)
    for mode in MODES:
        side = make_side(ADAMW, device, places=AWKWARD, mode=mode)
        for _ in range(3):
            side.step()
        torch.cuda.synchronize()
        start = time.perf_counter()
        torch.cuda._sleep(CYCLES)
        side.opt.step()
        host = time.perf_counter() - start
        torch.cuda.synchronize()
        assert host < (time.perf_counter() - start) / 2, (
            f"{mode or 'default'}: the step took {host:.3f} s"
        )
