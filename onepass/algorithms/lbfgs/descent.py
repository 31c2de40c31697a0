"""One call of LBFGS's step: its iterations from the first evaluation of the closure to the last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...contract.values import StepError, brief
from .flat import FlatParameters, largest, scalar
from .history import History
from .line_search import Point, strong_wolfe
from .memory import HISTORY, MEMORY, VECTORS, check_memory


class Descent:
    """One call of `step`: its iterations, and the vectors that they need beside the state.

    `states` is the optimizer's state of all parameters. An iteration goes from a `Point` to the
    next one: with a line search that takes three trials, the closure is called

        once     at the start, which is also what `step` returns
        3 times  in the first iteration; the second one begins at the trial that it accepts
        3 times  in the second iteration, and so on

    Raises `StepError` for state and parameters that do not fit.
    """

    def __init__(
        self, owner: str, group: dict[str, Any], states: Any, closure: Callable[[], Any]
    ) -> None:
        self.owner = owner
        self.group = group
        self.states = states
        self.closure = closure
        self.tolerance_grad = float(group["tolerance_grad"])
        self.tolerance_change = float(group["tolerance_change"])
        names = group.get("param_names", ())
        self.flat = FlatParameters(owner, group["params"], names)
        self.state: dict[str, Any] = states.get(group["params"][0], {})
        # Vectors for gradients: an evaluation takes one that no point needs any more.
        self.gradients: list[Tensor] = []
        self.is_first = not self._has_memory(repr(names[0]) if names else "0")
        if not self.is_first:
            self._fit_state()
        self.d = self.flat.new() if self.is_first else self.state["d"].contiguous()
        self.direction = self.flat.split(self.d)
        self.history = History(self.flat, [] if self.is_first else self.state["ro"])
        # Where a line search begins: a vector, and its parts.
        self.origin: tuple[Tensor, list[Tensor]] | None = None
        self.evaluations = 0
        self.numpy_errors = np.geterr()

    def _has_memory(self, label: str) -> bool:
        """Whether the state is one to go on from; `label` is the first parameter's in messages."""
        what = f"{self.owner}: the state of parameter {label}"
        if not isinstance(self.state, dict):
            raise StepError(
                f"{what} must be a dict, got {brief(self.state)}; delete it to begin again"
            )
        if not check_memory(what, self.state, self.flat.size, StepError):
            return False
        # Who sets the count to 0 begins again, as with torch.
        return self.state.get("n_iter") != 0

    def _fit_state(self) -> None:
        """Bring the state to the parameters' device and the widest dtype."""
        state = self.state
        flat = self.flat
        vectors = [state[name] for name in VECTORS]
        for name in HISTORY:
            vectors += state[name]
        for vector in vectors:
            flat.dtype = torch.promote_types(flat.dtype, vector.dtype)
        if any(v.dtype != flat.dtype or v.device != flat.device for v in vectors):
            state.update({name: flat.adopt(state[name]) for name in (*VECTORS, *HISTORY)})
        # A sum over memory with holes adds in another order than torch's, whose vectors are new.
        if state["prev_flat_grad"].is_contiguous():
            self.gradients.append(state["prev_flat_grad"])

    def run(self) -> Any:
        """Iterate until the descent ends, and return what the closure returned first."""
        returned, loss = self._evaluate_loss()
        self.flat.check()
        gradient = self._read_gradient(self.state.get("prev_flat_grad"))
        # The closure may have replaced it.
        state = self.states[self.group["params"][0]]
        self.state = state
        state["func_evals"] = state.get("func_evals", 0) + 1
        state.setdefault("n_iter", 0)
        if largest(gradient) <= self.tolerance_grad:
            return returned
        here: Point | None = Point(0, loss, None, gradient)
        iterations = 0
        while here is not None:
            iterations += 1
            here = self._iterate(here, last=iterations >= self.group["max_iter"])
        self._store_alphas()
        return returned

    def _store_alphas(self) -> None:
        """Store the factors of the last direction, oldest pair first, in `history_size` places."""
        if self.history.alphas is None:
            return
        alphas = torch.tensor(
            [float(alpha) for alpha in reversed(self.history.alphas)],
            dtype=self.d.dtype,
            device=self.d.device,
        )
        # What earlier iterations have left behind stays, as with torch.
        rest = list(self.state.get("al") or ())[len(alphas) :]
        missing = int(self.group["history_size"]) - len(alphas) - len(rest)
        self.state["al"] = [*alphas.unbind(), *rest, *[None] * missing]

    def _iterate(self, here: Point, last: bool) -> Point | None:
        """Make one step from here. Return where it led, or None if the descent ends."""
        state = self.state
        t = self._first_length(here)
        if self.is_first:
            torch.neg(here.gradient, out=self.d)
            state.update(d=self.d, t=0.0, old_dirs=[], old_stps=[], ro=[], H_diag=1)
        else:
            self.history.enter(state, here.gradient, self.d, self.group["history_size"])
            self.history.find_direction(state, here.gradient, self.d)
        here = here._replace(t=0, slope=scalar(here.gradient.dot(self.d)))
        state["prev_flat_grad"] = here.gradient
        state["prev_loss"] = here.loss
        state["n_iter"] = state["n_iter"] + 1
        if here.slope > -self.tolerance_change:
            state["t"] = float(t)
            return None
        reach = largest(self.d)
        if self.group["line_search_fn"]:
            there = self._search(here, t, reach)
        else:
            there = self._move(here, t, last)
        self.is_first = False
        ends = last or self._has_arrived(here, there, reach)
        return None if ends else there

    def _first_length(self, here: Point) -> Any:
        """Return the length of a step before any line search, as a part of the direction."""
        lr = self.group["lr"]
        t = scalar(lr.detach()) if isinstance(lr, Tensor) else float(lr)
        if self.is_first:
            t = min(1.0, 1.0 / scalar(here.gradient.abs().sum())) * t
        return t

    def _has_arrived(self, here: Point, there: Point, reach: Any) -> bool:
        """Whether a step from here to there is the last; `reach` is the direction's largest
        entry."""
        return bool(
            self.evaluations >= self.group["max_eval"]
            or largest(there.gradient) <= self.tolerance_grad
            or reach * abs(there.t) <= self.tolerance_change
            or abs(there.loss - here.loss) < self.tolerance_change
        )

    def _move(self, here: Point, t: Any, last: bool) -> Point:
        """Make a step of length t.

        After the last one the closure is not called: with noisy gradients that would be of no use.
        """
        self.flat.move(None, float(t), self.direction)
        self.state["t"] = float(t)
        return here if last else self._evaluate(t, here)

    def _search(self, here: Point, t: Any, reach: Any) -> Point:
        """Make a step whose length the line search finds.

        If lr is 0 or the closure raises, the parameters stay where they are.
        """
        if self.group["lr"] == 0:
            return here
        if self.origin is None:
            vector = self.flat.new()
            self.origin = vector, self.flat.split(vector)
        origin, origin_parts = self.origin
        self.flat.read(origin)

        def evaluate(t: Any, kept: Point) -> Point:
            self.flat.move(origin_parts, float(t), self.direction)
            return self._evaluate(t, here, kept)

        limit = int(self.group["max_eval"]) - self.evaluations
        try:
            there = strong_wolfe(evaluate, here, t, reach=reach, limit=limit)
        except BaseException:
            self.flat.write(origin)
            if self.is_first:
                self._forget()
            raise
        self.flat.move(origin_parts, float(there.t), self.direction)
        self.state["t"] = float(there.t)
        return there

    def _forget(self) -> None:
        """Undo what a first iteration has stored: its step was not made."""
        self.state["n_iter"] -= 1
        for name in MEMORY:
            del self.state[name]

    def _evaluate(self, t: Any, *kept: Point) -> Point:
        """Return the loss and its slope where the parameters are now, at distance t.

        The gradients of `kept` are not overwritten.
        """
        _, loss = self._evaluate_loss()
        self.state["func_evals"] += 1
        gradient = self._read_gradient(*(point.gradient for point in kept))
        return Point(t, loss, scalar(gradient.dot(self.d)), gradient)

    def _evaluate_loss(self) -> tuple[Any, float]:
        """Call the closure. Return what it returned, and that as a number."""
        with torch.enable_grad(), np.errstate(**self.numpy_errors):
            returned = self.closure()
        loss = _as_loss(self.owner, returned)
        self.evaluations += 1
        return returned, loss

    def _read_gradient(self, *used: Tensor | None) -> Tensor:
        """Return the gradient, in a vector other than these."""
        for vector in self.gradients:
            if all(vector is not other for other in used):
                break
        else:
            vector = self.flat.new()
            self.gradients.append(vector)
        self.flat.read_gradient(vector)
        return vector


def _as_loss(owner: str, returned: Any) -> float:
    """Return a closure's result as a number; raise TypeError, or StepError for a tensor."""
    is_tensor = isinstance(returned, Tensor)
    try:
        return float(returned.detach() if is_tensor else returned)
    except (TypeError, ValueError, RuntimeError):
        error = StepError if is_tensor else TypeError
        got = f"a tensor of shape {tuple(returned.shape)}" if is_tensor else f"{returned!r:.60}"
        raise error(
            f"{owner}: the closure must return the loss, one real number, got {got}"
        ) from None
