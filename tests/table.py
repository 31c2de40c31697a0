"""The one table of optimizers under test: class, options, and the update as the papers have it, in
float64 NumPy.

A further algorithm is a further function and its rows; every property in the tests then holds for
it too, or fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import onepass
from onepass.kernel import signature

State = dict[str, Any]
# (p, g, state, step, **options) -> the new p; `step` counts from 1, the state begins empty.
Reference = Callable[..., np.ndarray]


@dataclass(frozen=True)
class Row:
    """One optimizer with options: `reference` computes the same in float64."""

    cls: type[onepass.Optimizer]
    options: Mapping[str, Any]
    reference: Reference
    # What is compared: p, and the states that are results themselves, on which p does not depend.
    results: tuple[str, ...] = ("p",)

    def __str__(self) -> str:
        """The class and its options, as the id of a test: `SGD-momentum=0.9`."""
        options = [f"{key}={value}" for key, value in self.options.items() if key != "lr"]
        return "-".join([self.name, *options])

    @property
    def name(self) -> str:
        """The name of the class."""
        return self.cls.__name__

    @property
    def twin(self) -> type[torch.optim.Optimizer] | None:
        """The class of torch that has this name and takes these options, or None: comparisons with
        torch take only rows that have one."""
        return vars(torch.optim).get(self.name)

    def make(self, params: Any, eager: bool = False, **further: Any) -> onepass.Optimizer:
        """Return the optimizer of this package, on the eager backend if wanted."""
        optimizer = self.cls(params, **{**self.options, **further})
        return on_eager_backend(optimizer) if eager else optimizer

    def make_torch(self, params: Any, **further: Any) -> torch.optim.Optimizer:
        """Return the optimizer of torch; only for rows with a twin."""
        assert self.twin is not None, f"torch.optim has no {self.name}: ask for rows with a twin"
        return self.twin(params, **{**self.options, **further})

    @property
    def has_scalars(self) -> bool:
        """Whether the rule keeps scalars beside its columns. They have torch's default dtype,
        whatever p has."""
        return bool(signature(self.cls.rule).scalars)


def on_eager_backend(optimizer: onepass.Optimizer) -> onepass.Optimizer:
    """The optimizer, told so in its groups: not all classes of torch have an argument `fused`."""
    for group in optimizer.param_groups:
        group.update(foreach=False, fused=False)
    return optimizer


def sgd(
    p,
    g,
    state,
    step,
    *,
    lr,
    momentum=0.0,
    dampening=0.0,
    weight_decay=0.0,
    nesterov=False,
    maximize=False,
) -> np.ndarray:
    """Gradient descent with the momentum of Sutskever et al., 2013, where lr multiplies the whole
    sum."""
    g = (-g if maximize else g) + weight_decay * p
    if momentum == 0:
        return p - lr * g
    b = state["momentum_buffer"] = (
        g if step == 1 else momentum * state["momentum_buffer"] + (1 - dampening) * g
    )
    return p - lr * (g + momentum * b if nesterov else b)


def adam(
    p,
    g,
    state,
    step,
    *,
    lr,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    amsgrad=False,
    maximize=False,
    decoupled=False,
) -> np.ndarray:
    """Kingma and Ba, 2014, algorithm 1; the maximum of Reddi et al., 2018, is that of v before its
    correction."""
    beta1, beta2 = betas
    g = -g if maximize else g
    if decoupled:
        p = p - lr * weight_decay * p
    else:
        g = g + weight_decay * p
    m = state["exp_avg"] = beta1 * state.get("exp_avg", np.zeros_like(p)) + (1 - beta1) * g
    v = state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", np.zeros_like(p)) + (1 - beta2) * g**2
    if amsgrad:
        v = state["max_exp_avg_sq"] = np.maximum(state.get("max_exp_avg_sq", np.zeros_like(p)), v)
    corrected_m, corrected_v = m / (1 - beta1**step), v / (1 - beta2**step)
    return p - lr * corrected_m / (np.sqrt(corrected_v) + eps)


def adamw(p, g, state, step, *, weight_decay=0.01, **options) -> np.ndarray:
    """Loshchilov and Hutter, 2017: the decay beside the moments, not in them."""
    return adam(p, g, state, step, weight_decay=weight_decay, decoupled=True, **options)


def adagrad(
    p,
    g,
    state,
    step,
    *,
    lr,
    lr_decay=0.0,
    weight_decay=0.0,
    initial_accumulator_value=0.0,
    eps=1e-10,
    maximize=False,
) -> np.ndarray:
    """Duchi, Hazan and Singer, 2011, figure 1 with a diagonal H = delta I + diag(G)^(1/2), and no
    proximal term.

    The paper's lr is constant and its G begins at zero; `lr_decay` and the initial value are
    torch's.
    """
    g = (-g if maximize else g) + weight_decay * p
    total = state["sum"] = state.get("sum", initial_accumulator_value) + g**2
    return p - lr / (1 + (step - 1) * lr_decay) * g / (eps + np.sqrt(total))


def rmsprop(
    p,
    g,
    state,
    step,
    *,
    lr,
    alpha=0.99,
    eps=1e-8,
    weight_decay=0.0,
    momentum=0.0,
    centered=False,
    maximize=False,
) -> np.ndarray:
    """Hinton's lecture 6e, 2012; centered and with momentum: Graves, 2013, arXiv:1308.0850,
    equations 38 to 41.

    torch departs from Graves: eps stands outside the root, and lr multiplies the whole sum of
    momentum.
    """
    g = (-g if maximize else g) + weight_decay * p
    variance = state["square_avg"] = alpha * state.get("square_avg", 0.0) + (1 - alpha) * g**2
    if centered:
        mean = state["grad_avg"] = alpha * state.get("grad_avg", 0.0) + (1 - alpha) * g
        variance = variance - mean**2
    update = g / (np.sqrt(variance) + eps)
    if momentum > 0:
        update = state["momentum_buffer"] = momentum * state.get("momentum_buffer", 0.0) + update
    return p - lr * update


def adadelta(
    p, g, state, step, *, lr, rho=0.9, eps=1e-6, weight_decay=0.0, maximize=False
) -> np.ndarray:
    """Zeiler, 2012, arXiv:1212.5701, algorithm 1. torch multiplies the update by lr, beside what it
    accumulates."""
    g = (-g if maximize else g) + weight_decay * p
    square = state["square_avg"] = rho * state.get("square_avg", 0.0) + (1 - rho) * g**2
    before = state.get("acc_delta", 0.0)
    delta = np.sqrt(before + eps) / np.sqrt(square + eps) * g
    state["acc_delta"] = rho * before + (1 - rho) * delta**2
    return p - lr * delta


def adamax(
    p, g, state, step, *, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, maximize=False
) -> np.ndarray:
    """Kingma and Ba, 2014, section 7.1, algorithm 2. The eps, added to each |g|, is torch's."""
    beta1, beta2 = betas
    g = (-g if maximize else g) + weight_decay * p
    m = state["exp_avg"] = beta1 * state.get("exp_avg", 0.0) + (1 - beta1) * g
    u = state["exp_inf"] = np.maximum(beta2 * state.get("exp_inf", 0.0), np.abs(g) + eps)
    return p - lr / (1 - beta1**step) * m / u


def nadam(
    p,
    g,
    state,
    step,
    *,
    lr,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    momentum_decay=4e-3,
    decoupled_weight_decay=False,
    maximize=False,
) -> np.ndarray:
    """Dozat, "Incorporating Nesterov Momentum into Adam", 2016, with the schedule of momentum of
    its section 3.2.

    As in the longer report, and in torch, m itself is a mean with the constant beta1; mu weighs it
    in the update only.
    """
    beta1, beta2 = betas
    g = -g if maximize else g
    if decoupled_weight_decay:
        p = p - lr * weight_decay * p
    else:
        g = g + weight_decay * p
    mu, mu_next = (beta1 * (1 - 0.5 * 0.96 ** (t * momentum_decay)) for t in (step, step + 1))
    product = state["mu_product"] = state.get("mu_product", 1.0) * mu
    m = state["exp_avg"] = beta1 * state.get("exp_avg", 0.0) + (1 - beta1) * g
    v = state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", 0.0) + (1 - beta2) * g**2
    direction = (1 - mu) * g / (1 - product) + mu_next * m / (1 - product * mu_next)
    return p - lr * direction / (np.sqrt(v / (1 - beta2**step)) + eps)


def radam(
    p,
    g,
    state,
    step,
    *,
    lr,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    decoupled_weight_decay=False,
    maximize=False,
) -> np.ndarray:
    """Liu et al., 2019, arXiv:1908.03265, algorithm 2.

    torch departs in two places: it rectifies from rho > 5 on, as the authors' code does, where the
    paper has 4; and it adds eps to the root of v before the root of the bias correction divides it.
    """
    beta1, beta2 = betas
    g = -g if maximize else g
    if decoupled_weight_decay:
        p = p - lr * weight_decay * p
    else:
        g = g + weight_decay * p
    m = state["exp_avg"] = beta1 * state.get("exp_avg", 0.0) + (1 - beta1) * g
    v = state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", 0.0) + (1 - beta2) * g**2
    corrected = m / (1 - beta1**step)
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * step * beta2**step / (1 - beta2**step)
    if rho <= 5:
        return p - lr * corrected
    rectification = np.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
    return p - lr * corrected * rectification * np.sqrt(1 - beta2**step) / (np.sqrt(v) + eps)


def asgd(
    p, g, state, step, *, lr, lambd=1e-4, alpha=0.75, t0=1e6, weight_decay=0.0, maximize=False
) -> np.ndarray:
    """Polyak and Juditsky, 1992, with the schedule of Bottou's SGD: eta_t = lr / (1 + lambd lr
    t)^alpha.

    torch begins to count at 0, and computes the eta and the mu of a step at the end of the one
    before, with the lr that it had then.
    """
    g = (-g if maximize else g) + weight_decay * p
    eta, mu = state.get("eta", lr), state.get("mu", 1.0)
    p = p - eta * (lambd * p + g)
    # The first average is the first p itself.
    average = state.get("ax", p)
    state["ax"] = average + mu * (p - average)
    state["eta"] = lr / (1 + lambd * lr * step) ** alpha
    state["mu"] = 1 / max(1, step - t0)
    return p


def rprop(
    p, g, state, step, *, lr, etas=(0.5, 1.2), step_sizes=(1e-6, 50), maximize=False
) -> np.ndarray:
    """Riedmiller and Braun, 1993, without weight backtracking: Igel and Huesken, 2000, iRprop-.

    lr is the first step size, and has no meaning later. torch brings the first one between the
    bounds, too.
    """
    g = -g if maximize else g
    sign = np.sign(g * state.get("prev", 0.0))
    factor = np.where(sign > 0, etas[1], np.where(sign < 0, etas[0], 1.0))
    size = state["step_size"] = np.clip(state.get("step_size", lr) * factor, *step_sizes)
    g = state["prev"] = np.where(sign < 0, 0.0, g)
    return p - np.sign(g) * size


def _row(
    reference: Reference,
    cls: type[onepass.Optimizer],
    results: tuple[str, ...] = ("p",),
    **options: Any,
) -> Row:
    """A row whose learning rate is 0.01 unless the options have another."""
    return Row(cls, {"lr": 0.01} | options, reference, results)


# Options are such that each has an effect far above rounding: an eps of 1e-8 could be forgotten
# unnoticed.
TABLE: tuple[Row, ...] = (
    _row(sgd, onepass.SGD),
    _row(sgd, onepass.SGD, momentum=0.9),
    _row(sgd, onepass.SGD, momentum=0.9, dampening=0.3),
    _row(sgd, onepass.SGD, momentum=0.8, nesterov=True),
    _row(sgd, onepass.SGD, weight_decay=0.1),
    _row(sgd, onepass.SGD, maximize=True),
    _row(sgd, onepass.SGD, momentum=0.8, nesterov=True, weight_decay=0.1, maximize=True),
    _row(adam, onepass.Adam),
    _row(adam, onepass.Adam, betas=(0.8, 0.95)),
    _row(adam, onepass.Adam, betas=(0.3, 0.7)),
    _row(adam, onepass.Adam, betas=(0.0, 0.99), eps=0.1),
    _row(adam, onepass.Adam, weight_decay=0.1),
    _row(adam, onepass.Adam, amsgrad=True, betas=(0.9, 0.7)),
    _row(adam, onepass.Adam, maximize=True),
    _row(
        adam,
        onepass.Adam,
        amsgrad=True,
        betas=(0.8, 0.7),
        eps=0.01,
        weight_decay=0.1,
        maximize=True,
    ),
    _row(adamw, onepass.AdamW),
    _row(adamw, onepass.AdamW, weight_decay=0.3, betas=(0.8, 0.95), eps=0.1),
    _row(adamw, onepass.AdamW, weight_decay=0.0),
    _row(adamw, onepass.AdamW, amsgrad=True, betas=(0.9, 0.7), weight_decay=0.1),
    _row(adamw, onepass.AdamW, maximize=True, weight_decay=0.1),
    _row(adagrad, onepass.Adagrad),
    _row(adagrad, onepass.Adagrad, lr_decay=0.3, initial_accumulator_value=0.5),
    _row(
        adagrad,
        onepass.Adagrad,
        lr_decay=0.3,
        weight_decay=0.1,
        initial_accumulator_value=0.5,
        eps=0.2,
        maximize=True,
    ),
    _row(rmsprop, onepass.RMSprop),
    _row(rmsprop, onepass.RMSprop, alpha=0.9, centered=True),
    _row(rmsprop, onepass.RMSprop, alpha=0.8, momentum=0.9, eps=0.1),
    _row(rmsprop, onepass.RMSprop, weight_decay=0.1, maximize=True),
    _row(
        rmsprop,
        onepass.RMSprop,
        alpha=0.9,
        eps=0.1,
        weight_decay=0.1,
        momentum=0.8,
        centered=True,
        maximize=True,
    ),
    _row(adadelta, onepass.Adadelta),
    _row(adadelta, onepass.Adadelta, rho=0.7, eps=0.1),
    _row(adadelta, onepass.Adadelta, rho=0.8, eps=0.01, weight_decay=0.1, maximize=True),
    _row(adamax, onepass.Adamax),
    _row(adamax, onepass.Adamax, betas=(0.8, 0.7), eps=0.1),
    _row(adamax, onepass.Adamax, betas=(0.8, 0.7), weight_decay=0.1, maximize=True),
    _row(nadam, onepass.NAdam),
    _row(nadam, onepass.NAdam, betas=(0.8, 0.95), eps=0.1, momentum_decay=0.5),
    _row(nadam, onepass.NAdam, weight_decay=0.1, maximize=True),
    _row(nadam, onepass.NAdam, weight_decay=0.1, decoupled_weight_decay=True),
    # With betas[1] = 0.999 the first five steps are not rectified, with 0.5 none is.
    _row(radam, onepass.RAdam),
    _row(radam, onepass.RAdam, betas=(0.8, 0.95), eps=0.1),
    _row(radam, onepass.RAdam, betas=(0.9, 0.5)),
    _row(radam, onepass.RAdam, weight_decay=0.1, maximize=True),
    _row(radam, onepass.RAdam, weight_decay=0.1, decoupled_weight_decay=True),
    _row(asgd, onepass.ASGD, results=("p", "ax")),
    _row(asgd, onepass.ASGD, lambd=3.0, t0=2, results=("p", "ax")),
    _row(
        asgd,
        onepass.ASGD,
        lambd=3.0,
        alpha=0.5,
        t0=0,
        weight_decay=0.1,
        maximize=True,
        results=("p", "ax"),
    ),
    _row(rprop, onepass.Rprop),
    _row(rprop, onepass.Rprop, etas=(0.3, 1.5), step_sizes=(0.006, 0.012)),
    _row(rprop, onepass.Rprop, etas=(0.7, 1.4), maximize=True),
)

WITH_TWIN: tuple[Row, ...] = tuple(row for row in TABLE if row.twin is not None)


def find_row(title: str) -> Row:
    """Return the row whose title is this, as `"SGD-momentum=0.9"`."""
    return next(row for row in TABLE if str(row) == title)


# The widest rules of the table: every optional term is there.
NESTEROV = find_row("SGD-momentum=0.8-nesterov=True-weight_decay=0.1-maximize=True")
AMSGRAD = find_row("Adam-amsgrad=True-betas=(0.8, 0.7)-eps=0.01-weight_decay=0.1-maximize=True")
DECOUPLED = find_row("AdamW-amsgrad=True-betas=(0.9, 0.7)-weight_decay=0.1")


def walk(
    row: Row, p: np.ndarray, gradients: Sequence[np.ndarray | None], lrs: Sequence[float]
) -> np.ndarray:
    """The reference's results (step, result, element) after each step, and before the first.

    There is no step without a gradient. A state that is a result begins at p, as an average of one
    weight does.
    """
    p = np.asarray(p, np.float64)
    path = [np.stack([p] * len(row.results))]
    state: State = {}
    step = 0
    for g, lr in zip(gradients, lrs, strict=True):
        if g is None:
            path.append(path[-1])
            continue
        step += 1
        p = row.reference(p, np.asarray(g, np.float64), state, step, **{**row.options, "lr": lr})
        path.append(np.stack([p, *(state[name] for name in row.results[1:])]))
    return np.stack(path)


def results(row: Row, optimizer: torch.optim.Optimizer, p: torch.Tensor) -> np.ndarray:
    """What an optimizer has made of p, as in the path of `walk`; complex numbers as pairs."""
    found = [p.detach(), *(optimizer.state[p][name] for name in row.results[1:])]
    return np.stack(
        [
            (torch.view_as_real(t).reshape(-1) if t.is_complex() else t).double().numpy()
            for t in found
        ]
    )


# Roundings on the way from the columns to p in one step of the longest rule here, a small factor
# for how errors of the running means enter the step (v under a root: halved; m by at most
# max|g|/root(v): a few) included. Two rules feed errors back into the means: Adadelta's acc_delta
# takes the errors of its own updates, each halved by a root and at the weight that it has in the
# mean, about 1/t in the first steps, which is one more term in proportion to t; the average of ASGD
# is a mean of weights and errs at most as they do. The variance of a centered RMSprop is at least
# the share alpha^t of the mean square, by the inequality of Cauchy and Schwarz: rows have an alpha
# that keeps it large.
ROUNDINGS = 24


def tolerance(row: Row, path: np.ndarray, dtype: torch.dtype) -> float:
    """How far a right result may lie from the reference's path, where every operation errs by the
    dtype's unit.

    In step t, p is rounded: an error of unit * |p|. The states have then been rounded t times, and
    running means forget, they do not amplify: the step errs by ROUNDINGS * t * unit * |step|. Over
    T steps that is at most unit * (T * |p| + ROUNDINGS * T^2 / 2 * |step|). The largest step of any
    element stands for |step|, because an element whose m happens to cancel has a small step and the
    error of a large one. A rule's scalars are factors of the step and are rounded in each: rates,
    and products P of momenta, of which 1 - P errs less than P, as P is below 1/2.
    """
    steps = len(path) - 1
    unit = UNIT[dtype]
    in_step = max(unit, UNIT[torch.get_default_dtype()]) if row.has_scalars else unit
    largest_step = float(np.abs(np.diff(path, axis=0)).max(initial=0.0))
    largest = float(np.abs(path).max(initial=0.0))
    return 2 * steps * unit * largest + ROUNDINGS * steps**2 / 2 * in_step * largest_step


# Half of the distance between neighbours around 1.
UNIT = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
