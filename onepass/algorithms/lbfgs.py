"""Limited-memory BFGS."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import StepError
from ..flat import Flat, largest, scalar
from ..line_search import Point, strong_wolfe
from ..loading import Match
from ..optimizer import Optimizer, Params
from ..options import check_number

# What one iteration leaves to the next, beside the counts: vectors as long as all parameters together, and numbers.
VECTORS, HISTORY = ("d", "prev_flat_grad"), ("old_dirs", "old_stps")
NUMBERS = ("t", "H_diag", "prev_loss")
MEMORY = (*VECTORS, *HISTORY, "ro", *NUMBERS)
# Pairs of less curvature than this are left out: they would spoil the inverse Hessian's positive definiteness.
LEAST_CURVATURE = 1e-10


class LBFGS(Optimizer):
    r"""A quasi-Newton method: the inverse Hessian, as the last `history_size` steps have shown it, times the gradient.

    With the steps $s_i = \theta_{i+1} - \theta_i$, the changes of the gradient $y_i = g_{i+1} - g_i$, and
    $\rho_i = 1 / y_i^\top s_i$, the direction is $d = -H g$, where BFGS's inverse Hessian

    $$ H \leftarrow (I - \rho_i s_i y_i^\top)\, H\, (I - \rho_i y_i s_i^\top) + \rho_i s_i s_i^\top, \quad
       H_0 = \frac{s_k^\top y_k}{y_k^\top y_k} I $$

    is never formed, but applied in two loops over the pairs: with $q = -g$, backwards
    $\alpha_i = \rho_i s_i^\top q,\; q \leftarrow q - \alpha_i y_i$; then with $d = H_0 q$, forwards
    $d \leftarrow d + (\alpha_i - \rho_i y_i^\top d)\, s_i$. A pair enters only if $y_i^\top s_i > 10^{-10}$. Then
    $\theta \leftarrow \theta + t d$ with $t = \gamma$ (in the very first iteration $\gamma \min(1, 1/\|g\|_1)$), or with
    `line_search_fn="strong_wolfe"` a t that satisfies the strong Wolfe conditions, searched from there.

    Liu and Nocedal, "On the limited memory BFGS method for large scale optimization", 1989; Nocedal and Wright,
    "Numerical Optimization", 2nd edition, 2006, algorithms 7.4 and 7.5.

    For small problems whose loss is computed over all data at once, without noise (fits, inverse problems, physics):
    there it needs far fewer evaluations than first-order methods. Take `line_search_fn="strong_wolfe"` and leave
    `lr=1`: without it steps may diverge. The history takes `2 * history_size` times the memory of the parameters, once
    that many steps were made.

    `step(closure)` makes up to `max_iter` iterations, of up to `max_eval` evaluations (1.25 `max_iter` by default); it
    ends before where the gradient's largest entry is at most `tolerance_grad`, or the step's or the loss's change at
    most `tolerance_change`. State, all of it beside the first parameter, under torch's names: `func_evals`, `n_iter`,
    `d`, `t`, `old_dirs` (the y), `old_stps` (the s), `ro`, `H_diag`, `prev_flat_grad`, `prev_loss`, `al`. The values
    are torch's: vector operations and their order are the same, numbers round in the vectors' precision.

    Differences: a step on which `closure` raises leaves the parameters where the last whole iteration ended, with the
    state that belongs to them. A state dict whose named parameters are in another order is brought into this one.
    Gradients may lie in memory in any order.

    Raises ValueError for an option outside its range and for more than one param group, TypeError for an option that
    is no number, RuntimeError for an unknown `line_search_fn`.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        history_size: int = 100,
        line_search_fn: str | None = None,
    ) -> None:
        check_count(type(self).__name__, "max_iter", max_iter)
        defaults = {
            "lr": lr,
            "max_iter": max_iter,
            "max_eval": max_iter * 5 // 4 if max_eval is None else max_eval,
            "tolerance_grad": tolerance_grad,
            "tolerance_change": tolerance_change,
            "history_size": history_size,
            "line_search_fn": line_search_fn,
        }
        super().__init__(params, defaults)

    def check_options(self, options: Mapping[str, Any]) -> None:
        owner = type(self).__name__
        check_number(owner, "lr", options["lr"])
        for name in ("max_iter", "max_eval", "history_size"):
            check_count(owner, name, options[name])
        for name in ("tolerance_grad", "tolerance_change"):
            check_number(owner, name, options[name], low=float("-inf"))
        if options["line_search_fn"] not in (None, "strong_wolfe"):
            raise RuntimeError(
                f"{owner}: line_search_fn must be None or 'strong_wolfe', got {options['line_search_fn']!r:.60}"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only for the constructor: there is one group, as all parameters share one history. Raises ValueError."""
        if self.param_groups:
            raise ValueError(
                f"{type(self).__name__} doesn't support per-parameter options (parameter groups); pass all parameters "
                "in one group"
            )
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make up to `max_iter` iterations, and return what `closure` returned first: the loss before them.

        `closure` sets the gradients to zero, computes the loss, calls `backward()` and returns the loss; it is called
        several times, at other parameters each time. Raises TypeError without one, and where it returns no number;
        `StepError` for parameters, gradients or state that do not fit.
        """
        if torch.compiler.is_compiling():
            return _step_outside_graphs(self, closure)
        return self._step(closure)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        owner, group = type(self).__name__, self.param_groups[0]
        if not callable(closure):
            raise TypeError(
                f"{owner}: step needs a closure that computes the loss, calls backward() and returns the loss, got "
                f"{closure!r:.60}; it is evaluated several times"
            )
        type(self).check_options(self, group)
        if not group["params"]:
            raise StepError(f"{owner}: there are no parameters to optimize; put some into the param group")
        with torch.no_grad(), np.errstate(all="ignore"):
            return _Descent(owner, group, self.state, closure).run()

    def _load(self, matched: Match) -> tuple[dict[Any, Any], list[dict[str, Any]]]:
        groups = matched.load_groups(self.defaults)
        params, keys = groups[0]["params"], list(matched.saved_groups[0]["params"])
        saved = Flat(matched.owner, [matched.parameters[key] for key in keys])
        order = [keys.index(key) for p in params for key in keys if matched.parameters[key] is p]
        state: dict[Any, Any] = defaultdict(dict)
        for key, value in matched.saved_state.items():
            if key not in matched.parameters:
                state[key] = deepcopy(value)
            elif value:
                check_memory(matched.owner, matched.labels[key], value, saved.size)
                state[params[0]] = {
                    name: _reorder(saved, order, saved.place(entry))
                    if name in (*VECTORS, *HISTORY)
                    else saved.place(entry)
                    for name, entry in value.items()
                }
        return state, groups


class _Descent:
    """One call of `step`: the iterations, and the vectors they need beside the state."""

    def __init__(self, owner: str, group: dict[str, Any], states: Any, closure: Callable[[], Any]) -> None:
        self.owner, self.group, self.states, self.closure = owner, group, states, closure
        self.tolerance_grad, self.tolerance_change = float(group["tolerance_grad"]), float(group["tolerance_change"])
        self.flat = Flat(owner, group["params"], group.get("param_names", ()))
        self.state: dict[str, Any] = states.get(group["params"][0], {})
        self.vectors: list[Tensor] = []
        self.origin: Tensor | None = None
        self.spare_pair: tuple[Tensor, Tensor] | None = None
        self.alphas: list[np.floating] = []
        self.parts: dict[int, list[Tensor]] = {}
        self.evaluations = 0
        self.numpy_errors = np.geterr()
        if self.state.get("d") is not None:
            self._fit_state()
        self.rates = [scalar(rate) for rate in self.state.get("ro") or ()]

    def _fit_state(self) -> None:
        """See that the state belongs to these parameters, and bring it to their device and the widest dtype."""
        state, flat = self.state, self.flat
        vectors = [*(state[name] for name in VECTORS), *(v for name in HISTORY for v in state[name])]
        for v in vectors:
            if v.numel() != flat.size:
                raise StepError(
                    f"{self.owner}: the state has vectors of {v.numel()} numbers and the parameters have {flat.size}; "
                    "load a state that fits, or clear the optimizer's state to begin anew"
                )
            flat.dtype = torch.promote_types(flat.dtype, v.dtype)
        if any(v.dtype != flat.dtype or v.device != flat.device for v in vectors):
            state.update({name: flat.place(state[name]) for name in MEMORY})
        self.vectors.append(state["prev_flat_grad"])

    def run(self) -> Any:
        returned, loss = self._evaluate_loss()
        self.flat.check()
        gradient = self._gradient()
        self.state = state = self.states[self.group["params"][0]]
        state["func_evals"] = state.get("func_evals", 0) + self.evaluations
        state.setdefault("n_iter", 0)
        if largest(gradient) <= self.tolerance_grad:
            return returned
        here: Point | None = Point(0, loss, None, gradient)
        iterations = 0
        while here is not None:
            iterations += 1
            here = self._iterate(here, last=iterations >= self.group["max_iter"])
        if self.alphas:
            alphas = torch.tensor(self.alphas[::-1], dtype=state["d"].dtype, device=state["d"].device).unbind()
            state["al"] = [*alphas, *[None] * (int(self.group["history_size"]) - len(alphas))]
        return returned

    def _iterate(self, here: Point, last: bool) -> Point | None:
        """One step from here: where it led, or None where the descent ends."""
        state, group = self.state, self.group
        first = state.get("d") is None
        if first:
            state.update(d=here.gradient.neg(), old_dirs=[], old_stps=[], ro=[], H_diag=1)
        else:
            self._remember(here.gradient)
            self._aim(here.gradient)
        state["n_iter"] += 1
        t = scalar(group["lr"].detach()) if isinstance(group["lr"], Tensor) else float(group["lr"])
        if first:
            t = min(1.0, 1.0 / scalar(here.gradient.abs().sum())) * t
        d: Tensor = state["d"]
        state.update(t=float(t), prev_flat_grad=here.gradient, prev_loss=here.loss)
        here = here._replace(slope=scalar(here.gradient.dot(d)))
        if here.slope > -self.tolerance_change:
            return None
        reach = largest(d)
        if group["line_search_fn"] is None:
            self.flat.move(None, float(t), self._parts(d))
            # Where gradients are noisy, one more evaluation would be of no use.
            if last:
                return None
            there = self._evaluate(t, d, here)
        else:
            there = self._search(here, t, d, reach, first)
        arrived = (
            last
            or self.evaluations >= group["max_eval"]
            or largest(there.gradient) <= self.tolerance_grad
            or reach * abs(there.t) <= self.tolerance_change
            or abs(there.loss - here.loss) < self.tolerance_change
        )
        return None if arrived else there._replace(t=0)

    def _remember(self, gradient: Tensor) -> None:
        """Enter the last step and the change of the gradient into the history, in the place of the oldest if full."""
        state = self.state
        dirs, steps, rates, ro = state["old_dirs"], state["old_stps"], self.rates, state["ro"]
        y, s = self.spare_pair or (torch.empty_like(gradient), torch.empty_like(gradient))
        self.spare_pair = y, s
        torch.sub(gradient, state["prev_flat_grad"], out=y)
        torch.mul(state["d"], state["t"], out=s)
        curvature = y.dot(s)
        if not scalar(curvature) > LEAST_CURVATURE:
            return
        self.spare_pair = None
        while len(dirs) >= self.group["history_size"]:
            self.spare_pair = dirs.pop(0), steps.pop(0)
            del ro[0], rates[0]
        dirs.append(y)
        steps.append(s)
        ro.append(curvature.reciprocal())
        rates.append(scalar(ro[-1]))
        state["H_diag"] = curvature / y.dot(y)

    def _aim(self, gradient: Tensor) -> None:
        """The inverse Hessian times the negative gradient, by two loops over the pairs, into `d`."""
        state, d = self.state, torch.neg(gradient, out=self.state["d"])
        dirs, steps, rates, alphas = state["old_dirs"], state["old_stps"], self.rates, []
        for y, s, rate in zip(reversed(dirs), reversed(steps), reversed(rates), strict=True):
            alpha = scalar(s.dot(d)) * rate
            d.add_(y, alpha=-float(alpha))
            alphas.append(alpha)
        d.mul_(float(state["H_diag"]))
        for y, s, rate, alpha in zip(dirs, steps, rates, reversed(alphas), strict=True):
            d.add_(s, alpha=float(alpha - scalar(y.dot(d)) * rate))
        self.alphas = alphas

    def _search(self, here: Point, t: Any, d: Tensor, reach: Any, first: bool) -> Point:
        """Move along d by the line search. Where the closure raises, the step is one of length 0."""
        flat, state = self.flat, self.state
        self.origin = flat.new() if self.origin is None else self.origin
        flat.read(self.origin)
        origin, direction = self._parts(self.origin), self._parts(d)

        def evaluate(t: Any, kept: Point) -> Point:
            flat.move(origin, float(t), direction)
            return self._evaluate(t, d, here, kept)

        limit = int(self.group["max_eval"]) - self.evaluations
        try:
            there = strong_wolfe(evaluate, here, t, reach=reach, limit=limit)
        except BaseException:
            flat.write(self.origin)
            state["t"] = 0.0
            if first:
                state["n_iter"] -= 1
                for name in MEMORY:
                    del state[name]
            raise
        flat.move(origin, float(there.t), direction)
        state["t"] = float(there.t)
        return there

    def _evaluate(self, t: Any, d: Tensor, *kept: Point) -> Point:
        _, loss = self._evaluate_loss()
        self.state["func_evals"] += 1
        gradient = self._gradient(*kept)
        return Point(t, loss, scalar(gradient.dot(d)), gradient)

    def _parts(self, vector: Tensor) -> list[Tensor]:
        """The views of a vector that this descent holds on to: made once."""
        if id(vector) not in self.parts:
            self.parts[id(vector)] = self.flat.split(vector)
        return self.parts[id(vector)]

    def _evaluate_loss(self) -> tuple[Any, float]:
        with torch.enable_grad(), np.errstate(**self.numpy_errors):
            returned = self.closure()
        try:
            loss = float(returned.detach() if isinstance(returned, Tensor) else returned)
        except (TypeError, ValueError, RuntimeError):
            error = StepError if isinstance(returned, Tensor) else TypeError
            got = f"a tensor of shape {tuple(returned.shape)}" if error is StepError else f"{returned!r:.60}"
            raise error(f"{self.owner}: the closure must return the loss, one real number, got {got}") from None
        self.evaluations += 1
        return returned, loss

    def _gradient(self, *kept: Point) -> Tensor:
        """The gradient, in a vector that neither these points nor the state need."""
        used = [point.gradient for point in kept] or [self.state.get("prev_flat_grad")]
        free = next((v for v in self.vectors if all(v is not u for u in used)), None)
        if free is None:
            free = self.flat.new()
            self.vectors.append(free)
        self.flat.read_gradient(free)
        return free


def check_count(owner: str, name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a whole number, at least 1."""
    check_number(owner, name, value, low=1)
    if float(value) != int(value):
        raise ValueError(f"{owner}: {name} must be a whole number, got {value}")


def check_memory(owner: str, label: str, value: Any, size: int) -> None:
    """Raise ValueError for a saved state that is none of LBFGS, not whole, or of other parameters."""
    what = f"{owner}: the saved state of parameter {label}"
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} must be a dict, got {type(value).__name__}")
    present = [name for name in MEMORY if value.get(name) is not None]
    if not present and not {"func_evals", "n_iter"} & set(value):
        raise ValueError(
            f"{what} belongs to another optimizer: it has {', '.join(map(str, value))}, not 'd' and 'n_iter'"
        )
    if not present:
        return
    if lost := [name for name in MEMORY if name not in present]:
        raise ValueError(f"{what} has no {lost[0]!r}; a whole state has {', '.join(MEMORY)}")
    lists = [value[name] for name in (*HISTORY, "ro")]
    if not all(isinstance(entry, (list, tuple)) for entry in lists) or len({len(entry) for entry in lists}) != 1:
        raise ValueError(f"{what} must have {', '.join(HISTORY)} and ro as lists of one length")
    for vector in (*(value[name] for name in VECTORS), *lists[0], *lists[1]):
        if not isinstance(vector, Tensor) or not vector.is_floating_point() or vector.shape != (size,):
            got = f"shape {tuple(vector.shape)}" if isinstance(vector, Tensor) else f"a {type(vector).__name__}"
            raise ValueError(
                f"{what} must consist of vectors of {size} numbers, as many as the parameters have, got {got}; load a "
                "checkpoint of this model"
            )


def _reorder(flat: Flat, order: list[int], value: Any) -> Any:
    """A vector, or each of a list, with its parts in another order."""
    if order == sorted(order):
        return value
    if isinstance(value, list):
        return [_reorder(flat, order, vector) for vector in value]
    parts = flat.split(value)
    return torch.cat([parts[i].reshape(-1) for i in order])


# Imports torch's compiler when first called, which inside a compiled function has happened already.
_step_outside_graphs = torch._disable_dynamo(LBFGS._step)
