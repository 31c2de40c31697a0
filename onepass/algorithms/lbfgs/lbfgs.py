"""Limited-memory BFGS."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...contract.param_groups import occur_twice
from ...contract.ranges import Choice, Whole
from ...contract.state_dict import Match
from ...contract.steps import OVERRIDES, REPEATS, step_as_torch
from ...contract.values import StepError, as_number, brief, pick
from ...optimizer import Optimizer, Params
from .flat import Flat, largest, precision, scalar, why_no_vector
from .line_search import Point, strong_wolfe

# What one iteration leaves to the next, beside the counts: vectors as long as all parameters
# together, and numbers.
VECTORS, HISTORY = ("d", "prev_flat_grad"), ("old_dirs", "old_stps")
NUMBERS = ("t", "H_diag", "prev_loss")
MEMORY = (*VECTORS, *HISTORY, "ro", *NUMBERS)
COUNTS = ("func_evals", "n_iter")
ONE_GROUP = (
    "{} doesn't support per-parameter options (parameter groups); pass all parameters in one group"
)
REMEDY = "load a state that fits, or clear the optimizer's state to begin again"
AT_LEAST_1 = Whole("[1, inf]")
# Pairs of less curvature than this are left out: they would spoil the inverse Hessian's positive
# definiteness.
LEAST_CURVATURE = 1e-10
# Methods of torch's class that its step calls, and ours does not.
HELPERS = (
    "_numel",
    "_gather_flat_grad",
    "_add_grad",
    "_clone_param",
    "_set_param",
    "_directional_evaluate",
)


class LBFGS(Optimizer, torch.optim.LBFGS):
    r"""A quasi-Newton method: the gradient times the inverse Hessian that the last `history_size`
    steps have shown.

    With the steps $s_i = \theta_{i+1} - \theta_i$, the gradient's changes $y_i = g_{i+1} - g_i$ and
    $\rho_i = 1 / y_i^\top s_i$, the inverse Hessian of BFGS is, over the pairs from the oldest to
    the newest,

    $$ H \leftarrow (I - \rho_i s_i y_i^\top)\, H\, (I - \rho_i y_i s_i^\top)
           + \rho_i s_i s_i^\top, \quad
       H_0 = \frac{s_k^\top y_k}{y_k^\top y_k} I. $$

    It is never formed: the direction $d = -H g$ comes from two loops over the pairs,

    $$ q = -g; \quad
       \alpha_i = \rho_i s_i^\top q, \;
       q \leftarrow q - \alpha_i y_i \;\text{ (newest first)}; \quad
       d = H_0 q; \quad d \leftarrow d + (\alpha_i - \rho_i y_i^\top d)\, s_i \;\text{ (oldest
    first)}. $$

    H stays positive definite, as a pair enters only with the curvature $y_i^\top s_i > 10^{-10}$.
    Then $\theta \leftarrow \theta + t d$, where t is $\gamma$, in the very first iteration $\gamma
    \min(1, 1/\|g\|_1)$; or, with `line_search_fn="strong_wolfe"`, what a search from there on finds
    to satisfy the strong Wolfe conditions.

    Liu and Nocedal, "On the limited memory BFGS method for large scale optimization", 1989; Nocedal
    and Wright, "Numerical Optimization", 2nd edition, 2006, algorithms 7.4 and 7.5.

    For small problems whose loss is computed over all data at once, without noise (fits, inverse
    problems, physics): there it needs far fewer evaluations than first-order methods. Take
    `line_search_fn="strong_wolfe"` with `lr=1`; without a line search, steps may diverge. Once as
    many steps were made, the history takes `2 * history_size` times the memory of the parameters.

    One `step(closure)` makes up to `max_iter` iterations with up to `max_eval` evaluations (1.25
    `max_iter` by default). It ends sooner where the gradient's largest entry is at most
    `tolerance_grad`, or where the parameters or the loss change by no more than `tolerance_change`.
    State, all of it beside the first parameter, under torch's names: `func_evals`, `n_iter`, `d`,
    `t`, `old_dirs` (the y), `old_stps` (the s), `ro`, `H_diag`, `prev_flat_grad`, `prev_loss`,
    `al`. Arguments are those of `torch.optim.LBFGS`, and so are the values, to the last bit on CPU:
    the same operations in the same order.

    Deviations: the line search turns back from where the loss is no number or infinite, on which
    torch goes astray. Where `closure` raises, the parameters are left where the last whole
    iteration ended, with the state that belongs to them. Loading matches parameters by name where
    both sides have names, and the history follows them.

    Raises ValueError for an option outside its range and for more than one param group, TypeError
    for an option that is no number, RuntimeError for an unknown `line_search_fn`.
    """

    ranges = {
        "lr": "[0, inf]",
        "max_iter": AT_LEAST_1,
        "max_eval": AT_LEAST_1,
        "history_size": AT_LEAST_1,
        "tolerance_grad": "[-inf, inf]",
        "tolerance_change": "[-inf, inf]",
        "line_search_fn": Choice("strong_wolfe", error=RuntimeError),
    }

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
        # `max_eval` follows from it.
        AT_LEAST_1.check(type(self).__name__, "max_iter", max_iter)
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
        if len(self.param_groups) != 1:
            raise ValueError(ONE_GROUP.format(type(self).__name__))
        _know_params(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _know_params(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only for the constructor: there is one group, as all parameters share one history. Raises
        ValueError."""
        if self.param_groups and self._onepass.taken is None:
            raise ValueError(ONE_GROUP.format(type(self).__name__))
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make up to `max_iter` iterations, and return what `closure` returned first: the loss
        before them.

        `closure` sets the gradients to zero, computes the loss, calls `backward()` and returns the
        loss; it is called several times, at other parameters each time. Raises TypeError without
        one, and where it returns no number; `StepError` for parameters, gradients or state that do
        not fit.
        """
        if torch.compiler.is_compiling():
            return _step_outside_graphs(self, closure)
        return _take_step(self, closure)

    def _onepass_load(self, matched: Match) -> tuple[dict[Any, Any], list[dict[str, Any]]]:
        owner, groups = matched.owner, matched.load_groups(self.defaults)
        params, keys = groups[0]["params"], matched.saved_groups[0]["params"]
        saved = Flat(owner, [matched.parameters[key] for key in keys])
        state: dict[Any, Any] = defaultdict(dict)
        for key, value in matched.saved_state.items():
            if key not in matched.parameters:
                state[key] = deepcopy(value)
            elif value != {}:
                what = f"{owner}: the saved state of parameter {matched.labels[key]}"
                if not isinstance(value, Mapping) or (
                    not {*MEMORY, *COUNTS} & value.keys() and matched.states & value.keys()
                ):
                    got = (
                        ", ".join(map(str, value))
                        if isinstance(value, Mapping)
                        else f"a {type(value).__name__}"
                    )
                    raise ValueError(
                        f"{what} belongs to another optimizer: it must have 'd', 'n_iter' and "
                        f"others, got {got:.60}"
                    )
                value = {
                    name: list(entry) if isinstance(entry, tuple) else entry
                    for name, entry in value.items()
                }
                check_memory(what, value, saved.size)
                if key != keys[0]:
                    raise ValueError(
                        f"{owner} keeps all state beside the first parameter, not beside {key!r}"
                    )
                vectors = {
                    name: saved.place(value[name], params)
                    for name in (*VECTORS, *HISTORY)
                    if name in value
                }
                state[params[0]] = {
                    name: vectors.get(name, deepcopy(entry)) for name, entry in value.items()
                }
        matched.tell_difference()
        return state, groups


def _know_params(optimizer: LBFGS) -> None:
    """Set what torch's own methods of this class read."""
    optimizer._params, optimizer._numel_cache = optimizer.param_groups[0]["params"], None


def _take_step(optimizer: LBFGS, closure: Callable[[], Any] | None) -> Any:
    owner, group = type(optimizer).__name__, optimizer.param_groups[0]
    if not callable(closure):
        raise TypeError(
            f"{owner}: step needs a closure that computes the loss, calls backward() and returns "
            f"the loss, got {closure!r:.60}; it is evaluated several times"
        )
    overrides = [
        name for name in HELPERS if getattr(LBFGS, name) is not getattr(type(optimizer), name)
    ]
    if overrides:
        return step_as_torch(optimizer, OVERRIDES.format(overrides[0]), closure)
    if occur_twice(group["params"]):
        return step_as_torch(optimizer, REPEATS, closure)
    for name in optimizer.defaults:
        pick(group, name, None)
    type(optimizer).check_options(optimizer, group)
    if not group["params"]:
        raise StepError(
            f"{owner}: there are no parameters to optimize; put some into the param group"
        )
    descent = _Descent(owner, group, optimizer.state, closure)
    with torch.no_grad(), np.errstate(all="ignore"):
        return descent.run()


class _Descent:
    """One call of `step`: its iterations, and the vectors that they need beside the state."""

    def __init__(
        self, owner: str, group: dict[str, Any], states: Any, closure: Callable[[], Any]
    ) -> None:
        self.owner, self.group, self.states, self.closure = owner, group, states, closure
        self.tolerance_grad, self.tolerance_change = (
            float(group["tolerance_grad"]),
            float(group["tolerance_change"]),
        )
        self.flat = Flat(owner, group["params"], group.get("param_names", ()))
        self.state: dict[str, Any] = states.get(group["params"][0], {})
        self.gradients: list[Tensor] = []
        what = (
            f"{owner}: the state of parameter {(*map(repr, group.get('param_names', ())), '0')[0]}"
        )
        if not isinstance(self.state, dict):
            raise StepError(
                f"{what} must be a dict, got {brief(self.state)}; delete it to begin again"
            )
        # Who sets the count to 0 begins again, as with torch.
        self.first = (
            not check_memory(what, self.state, self.flat.size, StepError)
            or self.state.get("n_iter") == 0
        )
        if not self.first:
            self._fit_state()
        self.d = self.flat.new() if self.first else self.state["d"].contiguous()
        self.direction = self.flat.split(self.d)
        self.origin: tuple[Tensor, list[Tensor]] | None = None
        self.spare_pair: tuple[Tensor, Tensor] | None = None
        known = () if self.first else self.state["ro"]
        self.rates = [scalar(torch.as_tensor(rate)) for rate in known]
        self.alphas: list[Any] | None = None
        self.evaluations = 0
        self.numpy_errors = np.geterr()

    def _fit_state(self) -> None:
        """Bring the state to the parameters' device and the widest dtype."""
        state, flat = self.state, self.flat
        vectors = [
            *(state[name] for name in VECTORS),
            *(v for name in HISTORY for v in state[name]),
        ]
        for v in vectors:
            flat.dtype = torch.promote_types(flat.dtype, v.dtype)
        if any(v.dtype != flat.dtype or v.device != flat.device for v in vectors):
            state.update({name: flat.place(state[name]) for name in (*VECTORS, *HISTORY)})
        # A sum over memory with holes adds in another order than torch's, whose vectors are new.
        if state["prev_flat_grad"].is_contiguous():
            self.gradients.append(state["prev_flat_grad"])

    def run(self) -> Any:
        returned, loss = self._evaluate_loss()
        self.flat.check()
        gradient = self._read_gradient(self.state.get("prev_flat_grad"))
        self.state = state = self.states[self.group["params"][0]]
        state["func_evals"] = state.get("func_evals", 0) + 1
        state.setdefault("n_iter", 0)
        if largest(gradient) <= self.tolerance_grad:
            return returned
        here: Point | None = Point(0, loss, None, gradient)
        iterations = 0
        while here is not None:
            iterations += 1
            here = self._iterate(here, last=iterations >= self.group["max_iter"])
        if self.alphas is not None:
            alphas = torch.tensor(
                [float(a) for a in reversed(self.alphas)], dtype=self.d.dtype, device=self.d.device
            )
            # What earlier iterations have left behind stays, as with torch.
            rest = list(state.get("al") or ())[len(alphas) :]
            missing = int(self.group["history_size"]) - len(alphas) - len(rest)
            state["al"] = [*alphas.unbind(), *rest, *[None] * missing]
        return returned

    def _iterate(self, here: Point, last: bool) -> Point | None:
        """One step from here: where it led, or None where the descent ends."""
        state, lr = self.state, self.group["lr"]
        t = scalar(lr.detach()) if isinstance(lr, Tensor) else float(lr)
        if self.first:
            torch.neg(here.gradient, out=self.d)
            state.update(d=self.d, t=0.0, old_dirs=[], old_stps=[], ro=[], H_diag=1)
            t = min(1.0, 1.0 / scalar(here.gradient.abs().sum())) * t
        else:
            self._remember(here.gradient)
            self._aim(here.gradient)
        here = here._replace(t=0, slope=scalar(here.gradient.dot(self.d)))
        state.update(prev_flat_grad=here.gradient, prev_loss=here.loss, n_iter=state["n_iter"] + 1)
        if here.slope > -self.tolerance_change:
            state["t"] = float(t)
            return None
        reach = largest(self.d)
        there = (
            self._search(here, t, reach)
            if self.group["line_search_fn"]
            else self._move(here, t, last)
        )
        self.first = False
        arrived = (
            last
            or self.evaluations >= self.group["max_eval"]
            or largest(there.gradient) <= self.tolerance_grad
            or reach * abs(there.t) <= self.tolerance_change
            or abs(there.loss - here.loss) < self.tolerance_change
        )
        return None if arrived else there

    def _remember(self, gradient: Tensor) -> None:
        """Enter the last step and the change of the gradient into the history, in the place of the
        oldest if full."""
        state, rates = self.state, self.rates
        dirs, steps, ro = (state[name] for name in (*HISTORY, "ro"))
        y, s = self.spare_pair = self.spare_pair or (self.flat.new(), self.flat.new())
        torch.sub(gradient, state["prev_flat_grad"], out=y)
        torch.mul(self.d, float(state["t"]), out=s)
        curvature = y.dot(s)
        enters = bool(scalar(curvature) > LEAST_CURVATURE)
        self.spare_pair = None if enters else self.spare_pair
        # There may be more than one too many: history_size may have become smaller.
        while len(dirs) + enters > self.group["history_size"]:
            oldest = dirs.pop(0), steps.pop(0)
            self.spare_pair = self.spare_pair or oldest
            del ro[0], rates[0]
        if not enters:
            return
        dirs.append(y)
        steps.append(s)
        ro.append(curvature.reciprocal())
        rates.append(scalar(ro[-1]))
        state["H_diag"] = curvature / y.dot(y)

    def _aim(self, gradient: Tensor) -> None:
        """The inverse Hessian times the negative gradient, by two loops over the pairs."""
        state, rates, d, alphas = self.state, self.rates, self.d, []
        # A step of length 0 until one is made: whatever interrupts it, none enters the history.
        state.update(t=0.0, d=d)
        dirs, steps, rounded = state["old_dirs"], state["old_stps"], precision(d.dtype)
        torch.neg(gradient, out=d)
        for y, s, rate in zip(reversed(dirs), reversed(steps), reversed(rates), strict=True):
            alpha = rounded(s.dot(d).item()) * rate
            d.add_(y, alpha=-float(alpha))
            alphas.append(alpha)
        d.mul_(float(state["H_diag"]))
        for y, s, rate, alpha in zip(dirs, steps, rates, reversed(alphas), strict=True):
            d.add_(s, alpha=float(alpha - rounded(y.dot(d).item()) * rate))
        self.alphas = alphas

    def _move(self, here: Point, t: Any, last: bool) -> Point:
        """Make a step of length t. The last is not evaluated: where gradients are noisy that would
        be of no use."""
        self.flat.move(None, float(t), self.direction)
        self.state["t"] = float(t)
        return here if last else self._evaluate(t, here)

    def _search(self, here: Point, t: Any, reach: Any) -> Point:
        """Make a step whose length the line search finds. None is made where the closure raises, or
        lr is 0."""
        flat, state = self.flat, self.state
        if self.group["lr"] == 0:
            return here
        if self.origin is None:
            origin = flat.new()
            self.origin = origin, flat.split(origin)
        origin, parts = self.origin
        flat.read(origin)

        def evaluate(t: Any, kept: Point) -> Point:
            flat.move(parts, float(t), self.direction)
            return self._evaluate(t, here, kept)

        try:
            limit = int(self.group["max_eval"]) - self.evaluations
            there = strong_wolfe(evaluate, here, t, reach=reach, limit=limit)
        except BaseException:
            flat.write(origin)
            if self.first:
                state["n_iter"] -= 1
                for name in MEMORY:
                    del state[name]
            raise
        flat.move(parts, float(there.t), self.direction)
        state["t"] = float(there.t)
        return there

    def _evaluate(self, t: Any, *kept: Point) -> Point:
        """The loss and its slope where the parameters are now; the gradients of `kept` are not
        overwritten."""
        _, loss = self._evaluate_loss()
        self.state["func_evals"] += 1
        gradient = self._read_gradient(*(point.gradient for point in kept))
        return Point(t, loss, scalar(gradient.dot(self.d)), gradient)

    def _evaluate_loss(self) -> tuple[Any, float]:
        with torch.enable_grad(), np.errstate(**self.numpy_errors):
            returned = self.closure()
        try:
            loss = float(returned.detach() if isinstance(returned, Tensor) else returned)
        except (TypeError, ValueError, RuntimeError):
            error = StepError if isinstance(returned, Tensor) else TypeError
            got = (
                f"a tensor of shape {tuple(returned.shape)}"
                if error is StepError
                else f"{returned!r:.60}"
            )
            raise error(
                f"{self.owner}: the closure must return the loss, one real number, got {got}"
            ) from None
        self.evaluations += 1
        return returned, loss

    def _read_gradient(self, *used: Tensor | None) -> Tensor:
        """The gradient, in a vector other than these."""
        free = next((v for v in self.gradients if all(v is not u for u in used)), None)
        if free is None:
            free = self.flat.new()
            self.gradients.append(free)
        self.flat.read_gradient(free)
        return free


def check_memory(
    what: str, value: Mapping[str, Any], size: int, error: type[Exception] = ValueError
) -> bool:
    """Whether a state holds the memory of an iteration; raises for one that is not whole, or of
    other parameters."""
    for name in COUNTS:
        count = as_number(value.get(name, 0))
        if count is None or count < 0 or count % 1 != 0:
            raise error(
                f"{what} must have a whole number for {name!r}, got {brief(value[name])}; {REMEDY}"
            )
    lost = [name for name in MEMORY if value.get(name) is None]
    if lost:
        if len(lost) < len(MEMORY):
            raise error(
                f"{what} has no {lost[0]!r}; a whole state has {', '.join(MEMORY)}; {REMEDY}"
            )
        return False
    lists = [value[name] for name in (*HISTORY, "ro")]
    if not all(isinstance(entry, list) for entry in lists) or len(set(map(len, lists))) != 1:
        raise error(f"{what} must have old_dirs, old_stps and ro as lists of one length; {REMEDY}")
    dirs, steps, ro = lists
    for entry in (*(value[name] for name in NUMBERS), *ro):
        if isinstance(entry, bool) or as_number(entry) is None:
            raise error(
                f"{what} must have numbers for {', '.join(NUMBERS)} and in ro, got {brief(entry)}; "
                f"{REMEDY}"
            )
    vectors = [*((name, value[name]) for name in VECTORS), *(("old_dirs", y) for y in dirs)]
    for name, entry in (*vectors, *(("old_stps", s) for s in steps)):
        why = why_no_vector(entry, size)
        if why:
            raise error(
                f"{what} must consist of vectors of {size} numbers, but {name!r} {why}; {REMEDY}"
            )
    return True


# Imports torch's compiler when first called, which inside a compiled function has happened already.
_step_outside_graphs = torch._disable_dynamo(_take_step)
