"""The way from an optimizer to a plan that fits what is there now."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

from ..contract.param_groups import occur_twice
from ..contract.steps import refuse_repeats
from ..contract.values import StepError
from .plan import Plan
from .reading import Reading
from .recipe import algorithm_of

# How often a plan is made again when what it is made for changes meanwhile, as another thread may
# change it.
MOST_PLANS = 8


def make_ready(optimizer: Any, scaled: bool) -> tuple[Plan, Reading, Any] | None:
    """Return the plan that fits what is there now, and what it has read for this step.

    `scaled` says whether gradients are multiplied by a factor. The former plan is asked first. If
    it no longer fits, it is let go and a new one is made. None stands for a parameter that is there
    twice: torch's code steps it twice.
    """
    private = optimizer._onepass
    cls = type(optimizer)
    private.follow(cls)
    former = private.plan
    for known in (former, *[None] * MOST_PLANS):
        private.plan = None
        plan = known
        reading = Reading(optimizer.param_groups, optimizer.state)
        try:
            if plan is None and occur_twice(reading.params):
                private.let_go(former)
                return refuse_repeats(optimizer)
            if plan is None:
                plan = Plan(algorithm_of(optimizer), reading, scaled, former)
            flags = [cls.flags(optimizer, group) for group in optimizer.param_groups]
            steps_slices = partial(cls.steps_rows, optimizer) if plan.slice_answers else None
            gathered = plan.ready(reading, scaled, flags, steps_slices)
        except BaseException as error:
            private.let_go(plan)
            # It may know of first steps that were skipped.
            private.plan = former
            if isinstance(error, KeyError) and threading.active_count() > 1:
                continue  # another thread may have cleared the state
            raise
        if gathered is not None:
            private.plan = plan
            return plan, reading, gathered
        private.let_go(plan)
    raise StepError(
        f"{cls.__name__}: parameters or state changed while a step was being prepared; step again"
    )
