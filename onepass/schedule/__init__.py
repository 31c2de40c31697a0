r"""Schedules: numbers that are pure functions of the step.

A schedule is called with a step, counted from 0, and returns a number. It has no state, so that a
run that resumes at step $t$ needs nothing but $t$:

```python
from onepass.schedule import cosine

lr = cosine(3e-4, steps=10_000).warmup(500)
lr(250), lr(10_000)  # half way up; the end
```

It drives any option of an optimizer (`onepass.Scheduler`), scales learning rates
(`LambdaLR(optimizer, cosine(1.0, steps=10_000))`), or is asked for its value in a loop of your own.
Each kind is one formula in the step $t$, which is any real number from 0 on; after the last of
`steps` the last value stays. `repr` gives the text that makes it.
"""

from .formulas import (
    Schedule,
    ScheduleError,
    constant,
    cosine,
    exponential,
    inverse_sqrt,
    linear,
    one_cycle,
    piecewise,
    polynomial,
    schedule,
    triangular,
    warm_restarts,
    warmup_stable_decay,
)
from .notation import MAKERS, parse

__all__ = [
    "MAKERS",
    "Schedule",
    "ScheduleError",
    "constant",
    "cosine",
    "exponential",
    "inverse_sqrt",
    "linear",
    "one_cycle",
    "parse",
    "piecewise",
    "polynomial",
    "schedule",
    "triangular",
    "warm_restarts",
    "warmup_stable_decay",
]
