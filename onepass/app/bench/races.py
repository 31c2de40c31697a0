"""Races of all contenders on one model: on its gradients, or down a loss of their own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ...kernel.graph.trace import Program
from ..catalog import CLOSURE, Variant
from .contenders import (
    LIMIT,
    MODES,
    OURS,
    OURS_CAPTURABLE,
    TORCH,
    Missing,
    Workload,
    make_capturable,
    make_ours,
    make_torch,
    seat,
)
from .descent import LBFGS_OPTIONS, TimedDescent
from .gpu import Gpu, condense
from .limit import Limit, program_of
from .machine import time_of
from .shapes import Model
from .turns import take_turns

__all__ = ["list_contenders", "race"]

Result = dict[str, Any]


def list_contenders(gpu: Gpu | None = None) -> tuple[str, ...]:
    """Return who takes part, in the report's order."""
    return (OURS, *TORCH, LIMIT) if gpu is None else (OURS, OURS_CAPTURABLE, *MODES, LIMIT)


def race(workload: Workload, variant: Variant, seconds: float, gpu: Gpu | None = None) -> Result:
    """Return the times of all contenders (`contenders`), and the bytes that a step moves.

    Bytes are read and written for each parameter, by ours (`bytes_per_parameter`) and by the
    memory limit (`limit_bytes_per_parameter`); None if memory is not what bounds the step.
    """
    if variant.demand == CLOSURE:
        found = _race_descents(workload.model, variant, seconds, gpu)
    else:
        found = _race_steps(workload, variant, seconds, gpu)
    contenders = found["contenders"]
    return found | {"contenders": {name: contenders[name] for name in list_contenders(gpu)}}


# --- steps on the workload's own gradients --------------------------------------------------------


def _race_steps(workload: Workload, variant: Variant, seconds: float, gpu: Gpu | None) -> Result:
    """Time those that step on the gradients of the workload, and the memory limit."""
    ours = seat(workload, partial(make_ours, variant))
    steps, missing = _seat_others(workload, variant, gpu)
    timers = {name: _make_timer(step, gpu) for name, step in {OURS: ours.step, **steps}.items()}
    ours.step()

    moved = None
    contenders: dict[str, Result] = {name: {"missing": reason} for name, reason in missing.items()}
    try:
        program = _program_of(workload.model, variant)
        if gpu is None:
            limit = Limit(program)
            _complete_columns(workload, ours, limit)
            timers[LIMIT] = partial(time_of, limit.place(workload))
        else:
            contenders[LIMIT] = gpu.limit(program.bytes_per_parameter, workload.model.parameters)
        moved = list(program.bytes_per_parameter)
    except Missing as reason:
        contenders[LIMIT] = {"missing": str(reason)}

    times = take_turns(timers, seconds) if gpu is None else take_turns(timers, seconds, condense)
    return {
        "bytes_per_parameter": moved,
        "limit_bytes_per_parameter": moved,
        "contenders": contenders | times,
    }


def _make_timer(step: Callable[[], Any], gpu: Gpu | None) -> Callable[[], Any]:
    """Return a function that takes a step and returns its time, on the CPU or on a GPU."""
    return partial(time_of, step) if gpu is None else gpu.timer(step)


def _seat_others(
    workload: Workload, variant: Variant, gpu: Gpu | None
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Return the steps of those beside ours, and why others are missing, both by name."""
    steps: dict[str, Callable[[], Any]] = {}
    missing: dict[str, str] = {}
    for name in list_contenders(gpu):
        if name in (OURS, LIMIT):
            continue
        if name == OURS_CAPTURABLE:
            make = partial(make_capturable, variant)
        else:
            make = partial(make_torch, variant, mode=name)
        try:
            steps[name] = seat(workload, make).step
        except Missing as reason:
            missing[name] = str(reason)
    return steps, missing


def _program_of(model: Model, variant: Variant) -> Program:
    """Return the program whose memory bounds a step; raises `Missing` if something else does."""
    if model.rows:
        raise Missing("a step touches only a few rows")
    program = program_of(variant, max(map(len, model.shapes)))
    if program.calls:
        raise Missing("a step is bound by products of matrices, not by memory")
    return program


def _complete_columns(workload: Workload, ours: torch.optim.Optimizer, limit: Limit) -> None:
    """Add the state that could not be shared, and that only ours has."""
    shared = {"p", "g", *workload.columns}
    for column in limit.program.columns:
        if column.name not in shared:
            workload.columns[column.name] = [ours.state[p][column.name] for p in workload.params]


# --- steps with a closure -------------------------------------------------------------------------


def _race_descents(model: Model, variant: Variant, seconds: float, gpu: Gpu | None) -> Result:
    """Time those that step with a closure, without the time of the closure.

    Only those that have called it as often as ours are compared.
    """
    ours = TimedDescent(model, partial(make_ours, variant, **LBFGS_OPTIONS), gpu)
    descents = {OURS: ours}
    contenders: dict[str, Result] = {
        LIMIT: {"missing": "a step is many operations on vectors, not one pass"}
    }
    if gpu is not None:
        contenders[OURS_CAPTURABLE] = {"missing": "a step with a closure cannot be captured"}
    for mode in TORCH if gpu is None else MODES:
        try:
            make = partial(make_torch, variant, mode=mode, **LBFGS_OPTIONS)
            descents[mode] = TimedDescent(model, make, gpu)
        except Missing as reason:
            contenders[mode] = {"missing": str(reason)}

    timers = {name: descent.time_step for name, descent in descents.items()}
    contenders |= take_turns(timers, seconds)
    for name, descent in descents.items():
        contenders[name]["evaluations"] = descent.evaluations
        if descent.evaluations != ours.evaluations:
            contenders[name] = {
                "missing": f"it evaluated the closure {descent.evaluations} times, "
                f"onepass {ours.evaluations} times"
            }
    return {
        "bytes_per_parameter": None,
        "limit_bytes_per_parameter": None,
        "contenders": contenders,
    }
