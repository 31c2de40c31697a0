"""Steps that repeat: a step that differs from the last one only in values.

Most steps do. The options are as they were, or floats that a scheduler has set; the same parameters
have gradients; states lie where they lay. Such a step needs no plan to be looked at: machine code
reads everything, and either takes the whole step, or changes nothing and says that something
differs. Then the careful way is taken, by `Plan`, and from it the next step is learned.

    careful   careful, learns   repeat   repeat   repeat   differs: careful   repeat ...

Machine code compares all that the careful way compares: see `kernel.repeat`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from .. import kernel
from ..contract.values import Group
from .batch import KernelBatch
from .plan import Plan
from .reading import Reading
from .sheet_maker import FlagsReader, SheetMaker, is_ours

# Tests compare steps with those of the careful way.
ENABLED = True
# How many careful steps there are, at most, between two attempts to learn.
LONGEST_WAIT = 64
# A sheet that has served so often was worth making.
WORTHWHILE = 8


class Repeats:
    """What is known of an optimizer's steps that repeat."""

    def __init__(self) -> None:
        self._repeat: Repeat | None = None
        # Steps that machine code has taken.
        self.count = 0
        # Careful steps until the next attempt to learn, and between the last two.
        self._wait, self._last_wait = 0, 0
        # Careful steps since the last repeated one.
        self._missed = 0

    def take(self, optimizer: Any, plan: Plan | None) -> bool:
        """Take a step that repeats the last one; else change nothing, and return False."""
        repeat = self._repeat
        if repeat is None or not ENABLED:
            return False
        if repeat.plan is plan and repeat.take(optimizer):
            self.count += 1
            self._missed = 0
            return True
        self._missed += 1
        return False

    def learn(self, optimizer: Any, plan: Plan, reading: Reading) -> None:
        """Learn from a step that a plan has taken, unless what is known may still serve."""
        repeat = self._repeat
        if repeat is not None and repeat.plan is plan and repeat.is_laid_out() and self._missed < 2:
            return
        self.forget()
        if self._wait > 0:
            self._wait -= 1
            return
        # The step has been taken: nothing here may make it fail, whatever another thread changes,
        # or a class of the user's makes of a group.
        with suppress(Exception):
            self._repeat = make_repeat(optimizer, plan, reading)
        if self._repeat is None:
            self._wait = LONGEST_WAIT
        self._missed = 0

    def forget(self) -> None:
        """Let go what is known. What has served seldom is learned again later, and later still."""
        if self._repeat is None:
            return
        is_worthwhile = self._repeat.count >= WORTHWHILE
        self._last_wait = 0 if is_worthwhile else min(2 * self._last_wait + 1, LONGEST_WAIT)
        self._wait = self._last_wait
        self._repeat = None


class Repeat:
    """One step, laid out for machine code."""

    def __init__(
        self, optimizer: Any, plan: Plan, sheet: kernel.Sheet, flags: list[Mapping[str, bool]]
    ) -> None:
        """`flags` are those of the groups."""
        self.plan, self._sheet = plan, sheet
        self._cls = type(optimizer)
        self._flags = flags
        # What a class of the user's makes of a group may depend on anything.
        self._asks_always = not is_ours(self._cls, "flags")
        self._batches = [(batch, batch.launch) for batch in plan.kernels]
        self._is_little = bool(sheet.tables["launch_function"])
        # Whether a launch calls torch: for its device, or for functions of matrices.
        self._calls_torch = any(map(_calls_torch, plan.kernels))
        # How often it has been taken.
        self.count = 0

    def is_laid_out(self) -> bool:
        """Whether the batches would still be launched as they were."""
        return all(batch.launch is launch for batch, launch in self._batches)

    def take(self, optimizer: Any) -> bool:
        """Take the step, if it differs only in values; else change nothing."""
        if type(optimizer) is not self._cls or torch.is_inference_mode_enabled():
            return False
        groups, state = optimizer.param_groups, optimizer.state
        asked = self._asks_always
        if asked and not self._has_same_flags(optimizer):
            return False
        run = self._sheet.step if self._is_little else self._run
        answer = run(groups, state, asked)
        if answer == kernel.Answer.ASK:
            if not self._has_same_flags(optimizer):
                return False
            answer = run(groups, state, True)
        is_done = answer == kernel.Answer.DONE
        self.count += is_done
        return is_done

    def _has_same_flags(self, optimizer: Any) -> bool:
        found = [self._cls.flags(optimizer, group) for group in optimizer.param_groups]
        try:
            return bool(found == self._flags)
        except Exception:
            # Values that cannot be compared, as arrays: the careful way says what is wrong.
            return False

    def _run(self, groups: list[Group], state: object, asked: bool) -> int:
        """Read, launch and store, so that other threads of Python run during the launch."""
        if self._calls_torch and any(batch.kernel.is_capturing() for batch, _ in self._batches):
            return kernel.Answer.DIFFERS
        answer = self._sheet.read(groups, state, asked)
        if answer != kernel.Answer.DONE:
            return answer
        try:
            if self._calls_torch:
                with torch.no_grad():
                    _launch(self._batches)
            else:
                _launch(self._batches)
            self._sheet.store()
        finally:
            self._sheet.release()
        return answer


def _calls_torch(batch: KernelBatch) -> bool:
    device = batch.expected.facts[0][1]
    return batch.recipe.graph.has_calls or not kernel.on_host(device)


def _launch(batches: Sequence[tuple[KernelBatch, Any]]) -> None:
    """Launch all batches; if one cannot begin, nothing is stored."""
    begun = []
    try:
        for batch, launch in batches:
            workers = 1 if batch.shares_memory else batch.kernel.concurrency()
            batch.prepare_to_repeat(launch)
            launch.begin(workers)
            begun.append((launch, workers))
    except BaseException:
        for launch, _ in begun:
            launch.cancel()
        raise
    for launch, workers in begun:
        launch.finish(workers)


def make_repeat(optimizer: Any, plan: Plan, reading: Reading) -> Repeat | None:
    """Return the step that a plan has just taken, laid out for machine code.

    None stands for a step that machine code cannot take.
    """
    sheet = kernel.new_sheet()
    if sheet is None or not _is_plain(optimizer, plan):
        return None
    flags = [FlagsReader(optimizer, group) for group in optimizer.param_groups]
    maker = SheetMaker(sheet, plan, reading)
    if not (maker.add_groups(flags) and maker.add_batches() and maker.add_launches()):
        return None
    maker.add_states()
    sheet.close()
    return Repeat(optimizer, plan, sheet, [reader.flags for reader in flags])


def _is_plain(optimizer: Any, plan: Plan) -> bool:
    """Whether machine code may read an optimizer's objects, and all is stepped by kernels here."""
    if type(optimizer.state) not in (dict, defaultdict) or type(optimizer.param_groups) is not list:
        return False
    if plan.scaled or plan.inference or plan.eager or plan.slices:
        return False
    for group in optimizer.param_groups:
        if type(group) is not dict or type(group["params"]) is not list:
            return False
    return not any(batch.strided for batch in plan.kernels)
