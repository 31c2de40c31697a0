"""One optimizer under random sequences of what a user may do, beside an oracle in float64.

`python tests/support/state_machine.py ALGORITHM SEED ACTIONS` runs one sequence again; the same
three words give the same run.

Each step is held against the papers' rules (`table.py`), computed in float64 from what parameters,
gradients, state and options were just before it; `error_bounds.py` says for each element how far
arithmetic of the kernels' precision may be off. A step that raises must have changed nothing at
all. What there is to do is in `user_actions.py`.
"""

from __future__ import annotations

import ctypes
import inspect
import math
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a program has no pytest that says where tests are
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import table
import torch
from test_adafactor import adafactor
from test_muon import polynomial, spread
from torch import Tensor, nn

import onepass
from onepass import linalg
from support.error_bounds import Rounded

# What a rewriting of the references' operations may add to their roundings.
REWRITTEN = 4.0
COUNTS_OF_STEPS = ("step",)
SHAPES = ((4, 3), (3, 4), (12,), (), (2, 3, 4, 2), (17,))
MATRICES = ((4, 3), (3, 4), (2, 6), (1, 7), (5, 2), (6, 6))
TABLES = ((4, 3), (3, 4), (12,), (6, 2, 2), (5, 2), (7,))


def muon(
    p,
    g,
    state,
    step,
    *,
    lr,
    weight_decay,
    momentum,
    nesterov,
    ns_coefficients,
    eps,
    ns_steps,
    adjust_lr_fn,
):
    """Jordan et al., 2024; what the iteration makes of errors is bounded by its first coefficient,
    see `spread`."""
    b = state["momentum_buffer"] = momentum * state.get("momentum_buffer", 0.0) + (1 - momentum) * g
    given = (1 - momentum) * g + momentum * b if nesterov else b
    n, m = p.shape
    ratio = (
        0.2 * np.sqrt(max(n, m)) if adjust_lr_fn == "match_rms_adamw" else np.sqrt(max(1.0, n / m))
    )
    u = polynomial(given.value, ns_coefficients, eps, ns_steps)
    quick = linalg.has_bfloat16_products() and p.unit > 2.0**-50
    dtype = torch.bfloat16 if quick else torch.float32 if p.unit > 2.0**-50 else torch.float64
    first, length = ns_coefficients[0], np.linalg.norm(given.value)
    share = 2 * spread(dtype, ns_steps, first)
    share += first**ns_steps * (np.linalg.norm(given.error) / length if length else 0.0)
    u = Rounded(u, share * np.linalg.norm(u), p.unit)
    return (1 - lr * weight_decay) * p - lr * ratio * u


def sparse_adam(
    p, g, state, step, *, lr, betas=(0.9, 0.999), eps=1e-8, maximize=False, rows=True
) -> Any:
    """Kingma and Ba, 2014, the form at the end of section 2, for the rows that the gradient has."""
    beta1, beta2 = betas
    g = -g if maximize else g
    former_m, former_v = (
        state.get("exp_avg", np.zeros_like(p)),
        state.get("exp_avg_sq", np.zeros_like(p)),
    )
    m = beta1 * former_m + (1 - beta1) * g
    v = beta2 * former_v + (1 - beta2) * g**2
    size = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step)
    state["exp_avg"], state["exp_avg_sq"] = (
        np.where(rows, m, 0 * p + former_m),
        np.where(rows, v, 0 * p + former_v),
    )
    return np.where(rows, p - size * m / (np.sqrt(v) + eps), p)


@dataclass(frozen=True)
class Kind:
    """An algorithm under test: its class and options, its reference, and the state that a parameter
    must have."""

    cls: str
    options: Mapping[str, Any]
    reference: Any
    required: tuple[str, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = SHAPES
    sparse: str = ""
    is_complex: bool = True

    @property
    def counts(self) -> bool:
        """Whether parameters count their steps."""
        return self.cls not in ("SGD", "Muon", "LBFGS")


M, V = "exp_avg", "exp_avg_sq"
KINDS: dict[str, Kind] = {
    "sgd": Kind("SGD", {"lr": 0.1}, table.sgd, sparse="any"),
    "momentum": Kind(
        "SGD",
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05},
        table.sgd,
        ("momentum_buffer",),
        sparse="any",
    ),
    "nesterov": Kind(
        "SGD",
        {"lr": 0.1, "momentum": 0.8, "nesterov": True},
        table.sgd,
        ("momentum_buffer",),
        sparse="any",
    ),
    "adam": Kind("Adam", {"lr": 0.05, "weight_decay": 0.1, "eps": 1e-3}, table.adam, (M, V)),
    "amsgrad": Kind(
        "Adam",
        {"lr": 0.05, "amsgrad": True, "betas": (0.8, 0.7), "maximize": True},
        table.adam,
        (M, V),
    ),
    "adamw": Kind(
        "AdamW", {"lr": 0.05, "weight_decay": 0.3, "betas": (0.8, 0.95)}, table.adam, (M, V)
    ),
    "adagrad": Kind(
        "Adagrad",
        {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.1},
        table.adagrad,
        ("sum",),
        sparse="any",
    ),
    "rmsprop": Kind(
        "RMSprop",
        {
            "lr": 0.01,
            "alpha": 0.9,
            "momentum": 0.8,
            "centered": True,
            "weight_decay": 0.05,
            "eps": 1e-3,
        },
        table.rmsprop,
        ("square_avg",),
    ),
    "adadelta": Kind(
        "Adadelta",
        {"lr": 1.0, "eps": 1e-3, "weight_decay": 0.05},
        table.adadelta,
        ("square_avg", "acc_delta"),
    ),
    "adamax": Kind("Adamax", {"lr": 0.05, "weight_decay": 0.1}, table.adamax, (M, "exp_inf")),
    "nadam": Kind(
        "NAdam",
        {"lr": 0.05, "weight_decay": 0.1, "decoupled_weight_decay": True, "momentum_decay": 0.5},
        table.nadam,
        (M, V),
    ),
    "radam": Kind(
        "RAdam", {"lr": 0.05, "weight_decay": 0.1, "betas": (0.8, 0.95)}, table.radam, (M, V)
    ),
    "asgd": Kind(
        "ASGD",
        {"lr": 0.1, "lambd": 0.5, "t0": 1, "weight_decay": 0.05},
        table.asgd,
        ("ax", "eta", "mu"),
    ),
    "rprop": Kind("Rprop", {"lr": 0.05, "maximize": True}, table.rprop, ("prev", "step_size")),
    "adafactor": Kind(
        "Adafactor",
        {"lr": 0.05, "eps": (1e-3, 1e-3), "weight_decay": 0.1},
        adafactor,
        (),
        is_complex=False,
    ),
    "muon": Kind("Muon", {"lr": 0.05}, muon, ("momentum_buffer",), MATRICES, is_complex=False),
    "sparse_adam": Kind("SparseAdam", {"lr": 0.05}, sparse_adam, (M, V), TABLES, "only", False),
    "lbfgs": Kind(
        "LBFGS", {"lr": 0.5, "max_iter": 3, "history_size": 4}, None, (), is_complex=False
    ),
}
UNIT = table.UNIT
# Beyond these a float32 kernel loses what float64 still has: squares that overflow, products that
# vanish.
LARGEST, SMALLEST = 1e4, 1e-10


class Fault(AssertionError):
    """A promise that was not kept."""


def real(t: Tensor) -> Tensor:
    """A tensor's elements as real numbers."""
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def plain(t: Tensor) -> Tensor:
    """A tensor as torch's own class, with no code of a subclass called."""
    with torch._C.DisableTorchFunctionSubclass():
        t = t.detach()
        return t if type(t) is Tensor else t.as_subclass(Tensor)


def numbers(t: Tensor) -> np.ndarray:
    """A tensor's elements in float64, complex ones as pairs; what is sparse is filled up."""
    t = plain(t)
    t = t.to_dense() if t.layout != torch.strided else t
    return real(t.resolve_neg()).to(torch.float64, copy=True).numpy()


def content(t: Tensor) -> bytes:
    """The bytes of a tensor's storage."""
    storage = t.untyped_storage()
    # Not by NumPy: a storage that it has seen cannot be resized any more.
    return ctypes.string_at(storage.data_ptr(), storage.nbytes()) if storage.nbytes() else b""


def facts(t: Any, kept: list[Any], versions: bool = True) -> Any:
    """All that can be seen of a value, comparable by ==; objects are compared by identity and kept
    alive."""
    kept.append(t)
    if not isinstance(t, Tensor):
        return id(t), repr(t) if isinstance(t, (int, float, str, tuple, list)) else ""
    with torch._C.DisableTorchFunctionSubclass():
        version = _version_of(t) if versions else None
        seen = (id(t), type(t), tuple(t.shape), t.dtype, t.layout, t.requires_grad, version)
        if t.layout == torch.sparse_coo:
            return seen, [facts(part, kept)[2:] for part in (t._indices(), t._values())]
        if t.layout != torch.strided or t.is_meta:
            return seen
        return (
            seen,
            t.data_ptr(),
            t.stride(),
            t.storage_offset(),
            t.is_neg(),
            t.is_conj(),
            content(t),
        )


def _version_of(t: Tensor) -> int | None:
    """How often a tensor was written; of tensors made in inference mode, and of what shares their
    memory, nothing."""
    try:
        return t._version
    except RuntimeError:
        return None


class Snapshot:
    """Everything of an optimizer that a user can see: two are equal where nothing has changed."""

    def __init__(self, params: list[Any], opt: Any) -> None:
        kept: list[Any] = []
        self.kept = kept
        members = [p for group in opt.param_groups for p in group["params"]]
        self.seen: dict[str, Any] = {
            "parameters": [facts(p, kept) for p in (*params, *members)],
            "gradients": [facts(p.grad, kept) for p in (*params, *members)],
            "groups": [[id(p) for p in group["params"]] for group in opt.param_groups],
            "options": [
                {key: self._option(v) for key, v in g.items() if key != "params"}
                for g in opt.param_groups
            ],
            "state": {
                id(p): self._entry(entry) for p, entry in opt.state.items() if not _is_empty(entry)
            },
        }
        kept += [*opt.state, *opt.state.values()]

    def _option(self, value: Any) -> Any:
        return facts(value, self.kept) if isinstance(value, Tensor) else repr(value)

    def _entry(self, entry: Any) -> Any:
        if not isinstance(entry, dict):
            return facts(entry, self.kept)
        # State that has been stored and taken back has another version.
        return {
            name: [
                facts(v, self.kept, False) for v in (value if isinstance(value, list) else [value])
            ]
            for name, value in entry.items()
        }

    def differences(self, other: Snapshot) -> list[str]:
        """In what two differ."""
        return [name for name, seen in self.seen.items() if seen != other.seen[name]]


def _coarser(x: Any, lost: float) -> Any:
    """A number that plain ones meet with so many more units of error."""
    return Rounded(x.value, x.error, x.unit, x.inexact + lost) if isinstance(x, Rounded) else x


def _is_empty(entry: Any) -> bool:
    return isinstance(entry, dict) and not entry


class Memory:
    """What storages hold, in float64 with errors: parameters that share one see what others have
    written."""

    def __init__(self) -> None:
        self._storages: dict[tuple[int, torch.dtype], tuple[np.ndarray, np.ndarray]] = {}

    def view(self, t: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The values and errors of a tensor's elements, to be read and written."""
        t = plain(t)
        storage = t.untyped_storage()
        key = storage.data_ptr(), t.dtype
        if key not in self._storages:
            values = torch.empty(0, dtype=t.dtype).set_(storage)
            values = real(values).to(torch.float64, copy=True).numpy()
            self._storages[key] = values, np.zeros_like(values)
        return tuple(self._part(array, t) for array in self._storages[key])  # type: ignore[return-value]

    @staticmethod
    def _part(array: np.ndarray, t: Tensor) -> np.ndarray:
        part = torch.from_numpy(array)
        if t.is_complex():
            shape, stride = (*t.shape, 2), (*(2 * s for s in t.stride()), 1)
            return part.as_strided(shape, stride, 2 * t.storage_offset()).numpy()
        return part.as_strided(t.shape, t.stride(), t.storage_offset()).numpy()


def number(value: Any) -> float:
    return float(value)


@dataclass
class Expected:
    """What a parameter's state must be after a step: values and tolerances of columns, and
    numbers."""

    p: Tensor
    keys: set[str]
    columns: dict[str, tuple[np.ndarray, np.ndarray]]
    step: float | None
    lr: float
    stepped: bool = True


class Oracle:
    """A step in float64, computed from what an optimizer has just before its own."""

    def __init__(self, kind: Kind, opt: Any) -> None:
        self.kind, self.memory, self.expected = kind, Memory(), []
        self.compared, self.skipped, self.ordinary = 0, 0, True
        accepted = inspect.signature(kind.reference).parameters
        for group in opt.param_groups:
            options = {key: self._option(value) for key, value in group.items() if key in accepted}
            if "decoupled" in accepted:
                options["decoupled"] = bool(group["decoupled_weight_decay"])
            for p in group["params"]:
                self.expected.append(self._step(p, opt.state.get(p, {}), group, options))

    @staticmethod
    def _option(value: Any) -> Any:
        return value.item() if isinstance(value, Tensor) else value

    def _step(
        self, p: Tensor, entry: Mapping[str, Any], group: Mapping[str, Any], options: dict[str, Any]
    ) -> Expected:
        values, errors = self.memory.view(p)
        lr = float(group["lr"])
        g = p.grad
        if g is None:
            kept = {
                name: numbers(t)
                for name, t in entry.items()
                if isinstance(t, Tensor) and name != "step"
            }
            count = number(entry["step"]) if "step" in entry else None
            return Expected(
                p,
                set(entry),
                {name: (t, np.zeros_like(t)) for name, t in kept.items()},
                count,
                lr,
                False,
            )
        states = self._states(p, entry, group)
        # A column that no rule reads now, as that of a momentum of 0, has no say in the precision.
        used = [t for name, t in states.items() if is_used(group, name)]
        dtypes = [plain(t).dtype for t in (p, g, *used)]
        wide = any(dtype in (torch.float64, torch.complex128) for dtype in dtypes)
        unit = UNIT[torch.float64 if wide else torch.float32]
        given = {
            name: Rounded(numbers(t), 0.0, unit, table.ROUNDINGS) for name, t in states.items()
        }
        state: dict[str, Any] = given | self._scalars(entry, lr)
        before = None if entry.get("step") is None else number(entry["step"])
        step = int(before or 0) + 1
        if self.kind.cls == "SGD":
            step = 1 if entry.get("momentum_buffer") is None else 2
        if self.kind.cls == "Adafactor":
            options = options | {"machine": torch.finfo(p.dtype).eps}
        gradient, rows = self._gradient(g, unit)
        if self.kind.cls == "SparseAdam":
            options = options | {"rows": rows}
        new = self._refer(
            Rounded(values.copy(), errors.copy(), unit, table.ROUNDINGS),
            gradient,
            state,
            step,
            options,
        )
        good = self._is_ordinary(values, numbers(g), given)
        # No rate is so small that it makes a number of what is none.
        self.ordinary = self.ordinary and good and bool(np.isfinite(new.value).all())
        self._write(p, values, errors, new, good)
        stored = states | {
            name: t for name, t in entry.items() if name in SCALARS and isinstance(t, Tensor)
        }
        changed = {
            name: self._tolerated(p, name, value, stored, good, wide)
            for name, value in state.items()
        }
        keys = set(entry) | set(state) | ({"step"} if self.kind.counts else set())
        return Expected(p, keys, changed, float(step) if self.kind.counts else None, lr)

    def _refer(
        self, p: Rounded, g: Rounded, state: dict[str, Any], step: int, options: Mapping[str, Any]
    ) -> Any:
        """The parameter's new value by the reference, which puts the new state into `state`."""
        lost, former = self._lost_in_corrections(options, step), dict(state)
        with np.errstate(all="ignore"):
            new = self.kind.reference(p, g, state, step, **options)
            if not lost:
                return new
            # What corrects moments has no part in them: their own bounds stay.
            former = {name: _coarser(value, lost) for name, value in former.items()}
            return self.kind.reference(
                _coarser(p, lost), _coarser(g, lost), former, step, **options
            )

    def _states(
        self, p: Tensor, entry: Mapping[str, Any], group: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """The columns that there are, and those that begin at something else than zero."""
        columns = {
            name: t for name, t in entry.items() if isinstance(t, Tensor) and name not in SCALARS
        }
        like = real(plain(p))
        if self.kind.cls == "Rprop" and "step_size" not in columns:
            columns["step_size"] = torch.full_like(like, number(group["lr"]))
            columns["step_size"] = (
                torch.view_as_complex(columns["step_size"])
                if p.is_complex()
                else columns["step_size"]
            )
        if self.kind.cls == "Adagrad" and "sum" not in columns:
            columns["sum"] = torch.full_like(like, number(group["initial_accumulator_value"]))
        return columns

    def _scalars(self, entry: Mapping[str, Any], lr: float) -> dict[str, Any]:
        """The numbers that there are; of ASGD also the first rate, as it is stored."""
        first = {"eta": float(np.float32(lr)), "mu": 1.0} if self.kind.cls == "ASGD" else {}
        found = {
            name: number(entry[name])
            for name in SCALARS
            if name != "step" and entry.get(name) is not None
        }
        # They are read in torch's default type, whatever was put there.
        error = {
            name: 0.0 if value == float(np.float32(value)) else UNIT[torch.float32]
            for name, value in found.items()
        }
        lifted = {
            name: Rounded(value, error[name] * abs(value), UNIT[torch.float64])
            for name, value in found.items()
        }
        return first | {
            name: lifted[name] if error[name] else value for name, value in found.items()
        }

    def _lost_in_corrections(self, options: Mapping[str, Any], step: int) -> float:
        """How many units more the factors that correct moments may err, as differences that cancel.

        The powers of two libraries differ by a unit. Of x = beta^t, 1 - x errs by x / (1 - x) units
        of its own size. RAdam's rho is the small difference of its limit, about 2 / (1 - beta2),
        and of 2 t x / (1 - x), which errs by 2 t x / (1 - x)^2 units, twice that between two
        libraries; the rectification errs by 2/3 of it, since rho > 5.
        """
        powers = [beta**step for beta in options.get("betas", ())]
        lost = max((x / (1 - x) for x in powers), default=0.0)
        if self.kind.cls == "RAdam":
            lost += 4 / (1 - options["betas"][1]) + 4 * step * powers[1] / (1 - powers[1]) ** 2
        return lost

    @staticmethod
    def _gradient(g: Tensor, unit: float) -> tuple[Rounded, np.ndarray]:
        """A gradient, and which of its elements are in rows for which a sparse one has values."""
        g = plain(g)
        if g.layout == torch.strided:
            return Rounded(numbers(g), 0.0, unit, table.ROUNDINGS), np.array(True)
        indices, values = g._indices(), g._values()
        size, exact = (
            torch.sparse_coo_tensor(indices, v, g.shape, check_invariants=False).to_dense().numpy()
            for v in (values.double().abs(), values.double())
        )
        rows = torch.zeros(g.shape, dtype=torch.bool)
        rows[tuple(indices)] = True
        repeated = indices.shape[1] > torch.unique(indices, dim=1).shape[1]
        error = UNIT[values.dtype] * indices.shape[1] * size if repeated else 0.0
        return Rounded(exact, error, unit, table.ROUNDINGS), rows.numpy()

    @staticmethod
    def _is_ordinary(p: np.ndarray, g: np.ndarray, given: Mapping[str, Rounded]) -> bool:
        """Whether no number is of a size at which float32 behaves unlike float64."""
        if (
            not np.isfinite(g).all()
            or not np.isfinite(p).all()
            or np.abs(p).max(initial=0.0) > LARGEST
        ):
            return False
        size = np.abs(g)
        if size.max(initial=0.0) > LARGEST or ((size > 0) & (size < SMALLEST)).any():
            return False
        return all(
            np.isfinite(s.value).all() and np.abs(s.value).max(initial=0.0) < LARGEST**2
            for s in given.values()
        )

    @staticmethod
    def _write(p: Tensor, values: np.ndarray, errors: np.ndarray, new: Any, good: bool) -> None:
        stored = UNIT[p.dtype.to_real() if p.dtype.is_complex else p.dtype]
        values[...] = new.value
        least = torch.finfo(p.dtype).smallest_normal * stored
        errors[...] = (
            REWRITTEN * (2 if new.unit < 2.0**-50 else 1) * new.error
            + 2 * stored * np.abs(new.value)
            + least
            if good
            else np.inf
        )

    @staticmethod
    def _tolerated(
        p: Tensor, name: str, value: Any, states: Mapping[str, Tensor], good: bool, wide: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """A state's new value, and how far it may be off once it is stored."""
        dtype = (
            states[name].dtype if name in states else torch.float32 if name in SCALARS else p.dtype
        )
        stored = UNIT[dtype.to_real() if dtype.is_complex else dtype]
        # Numbers are kept in torch's default type, whatever was put there.
        stored = max(stored, UNIT[torch.float32]) if name in SCALARS else stored
        value = value if isinstance(value, Rounded) else Rounded(value, 0.0, UNIT[torch.float64])
        least = torch.finfo(dtype).smallest_normal * stored
        # The numbers of the references that are no arrays are computed in float64, and rounded once
        # more on the way.
        extra = 2 * UNIT[torch.float64 if wide else torch.float32] * np.abs(value.value)
        # In float64 the oracle errs as the kernels do.
        error = (
            REWRITTEN * (2 if wide else 1) * value.error
            + 2 * stored * np.abs(value.value)
            + extra
            + least
        )
        return value.value, error if good else np.full_like(value.value, np.inf)

    def check(self, opt: Any) -> None:
        """Raise `Fault` where the optimizer is not where the oracle is."""
        position = 0
        for group in opt.param_groups:
            for p in group["params"]:
                want = self.expected[position]
                what = f"parameter {position} of {tuple(p.shape)}, {p.dtype}"
                self._compare(what, numbers(p), *self.memory.view(want.p))
                self._check_state(what, opt.state.get(p, {}), want)
                position += 1

    def _check_state(self, what: str, entry: Mapping[str, Any], want: Expected) -> None:
        if set(entry) != want.keys:
            raise Fault(f"{what}: the state has {sorted(entry)}, not {sorted(want.keys)}")
        if want.step is not None and number(entry["step"]) != want.step:
            raise Fault(f"{what}: the count of steps is {number(entry['step'])}, not {want.step}")
        for name, (value, error) in want.columns.items():
            got = entry[name]
            got = numbers(got) if isinstance(got, Tensor) else np.asarray(float(got))
            self._compare(f"{what}: {name}", got.reshape(np.shape(value)), value, error)

    def _compare(self, what: str, got: np.ndarray, want: np.ndarray, error: np.ndarray) -> None:
        known = np.isfinite(error) & np.isfinite(want)
        self.compared += int(known.sum())
        self.skipped += int((~known).sum())
        with np.errstate(all="ignore"):
            off = known & ~(np.abs(got - want) <= error)
        if off.any():
            i = np.unravel_index(int(np.argmax(off)), off.shape)
            raise Fault(
                f"{what}: {int(off.sum())} elements are off; at {i}: {got[i]!r}, not {want[i]!r} "
                f"+- {error[i]!r}"
            )


SCALARS = ("step", "mu_product", "eta", "mu")
# Columns that a step neither reads nor writes where an option is off.
OPTION_OF = {"max_exp_avg_sq": "amsgrad", "grad_avg": "centered", "momentum_buffer": "momentum"}


def is_used(group: Mapping[str, Any], column: str) -> bool:
    """Whether a step of this group has to do with a column of state."""
    return bool(group.get(OPTION_OF.get(column, ""), True))


class Machine:
    """An optimizer, its parameters, and the sequence of actions that a seed chooses."""

    def __init__(self, algorithm: str, seed: int) -> None:
        self.kind, self.algorithm, self.seed = KINDS[algorithm], algorithm, seed
        self.choose = random.Random(f"{algorithm} {seed}")
        self.random = torch.Generator().manual_seed(seed)
        self.counts: Counter[str] = Counter()
        self.log: list[str] = []
        self.kept: list[Any] = []
        self.params: list[Any] = [
            nn.Parameter(self.values(shape, self.dtype())) for shape in self.kind.shapes
        ]
        self.opt = self.make(self.params)

    # Making things.

    def make(self, params: Any) -> Any:
        return getattr(onepass, self.kind.cls)(params, **self.kind.options)

    def dtype(self) -> torch.dtype:
        """A parameter's type: float32 mostly."""
        if self.kind.cls == "LBFGS":
            return torch.float32
        others = [
            torch.float64,
            torch.bfloat16,
            torch.float16,
            *([torch.complex64] if self.kind.is_complex else []),
        ]
        return torch.float32 if self.choose.random() < 0.6 else self.choose.choice(others)

    def values(self, shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        wide = dtype if dtype.is_complex else torch.float32
        return torch.randn(tuple(shape), generator=self.random, dtype=wide).to(dtype)

    def any(self) -> Any:
        """One of the parameters."""
        return self.choose.choice(self.members())

    def members(self) -> list[Any]:
        return [p for group in self.opt.param_groups for p in group["params"]]

    def entry(self, p: Any) -> dict[str, Any]:
        return self.opt.state.get(p, {})

    def columns(self, p: Any) -> list[str]:
        return [
            name
            for name, t in self.entry(p).items()
            if isinstance(t, Tensor) and name not in SCALARS
        ]

    # Stepping.

    def set_gradients(self, missing: float = 0.1) -> None:
        """Give each parameter an ordinary gradient, or now and then none."""
        for p in self.params:
            p.grad = None
            if self.choose.random() >= missing:
                p.grad = self.gradient(p)

    def gradient(self, p: Any) -> Tensor:
        g = self.values(p.shape, p.dtype)
        return self.sparse_gradient(p) if self.kind.sparse == "only" else g

    def sparse_gradient(self, p: Any, count: int | None = None) -> Tensor:
        """Values for some rows, some of them twice."""
        count = self.choose.randint(0, 5) if count is None else count
        indices = torch.randint(0, p.shape[0], (1, count), generator=self.random)
        values = self.values((count, *p.shape[1:]), p.dtype)
        return torch.sparse_coo_tensor(indices, values, p.shape, check_invariants=False)

    def closure(self) -> Callable[[], Tensor]:
        """A closure with gradients that come from a loss."""

        def loss() -> Tensor:
            for p in self.params:
                p.grad = None
            # A sum over memory that lies otherwise adds in another order, and a search compares
            # losses.
            wide = [real(p).double().contiguous() for p in self.params]
            value = sum(((x - 0.5) ** 2).sum() + (x**4).sum() / 50 for x in wide)
            assert isinstance(value, Tensor)
            value.backward()
            return value.float()

        return loss

    def call(self, closure: Any = None) -> Any:
        """The step itself, for which warnings are no matter."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.opt.step() if closure is None else self.opt.step(closure)

    def step(self, how: Callable[[], Any] | None = None, may_raise: bool = False) -> bool:
        """Step with the gradients that there are, and compare; where it may raise, nothing may have
        changed then."""
        how = self.call if how is None else how
        before, oracle, versions = (
            Snapshot(self.params, self.opt),
            Oracle(self.kind, self.opt),
            self.versions(),
        )
        try:
            how()
        except BaseException as error:
            if not may_raise:
                raise Fault(f"a step raised {type(error).__name__}: {error}") from error
            self.check_unchanged(before, error)
            self.counts["steps that raised"] += 1
            return False
        self.check_step(before, oracle, versions)
        return True

    def step_late(self, how: Callable[[Callable[[], None]], Any], may_raise: bool = False) -> bool:
        """Step by a function that says when all that the step depends on is there, as a hook or a
        closure knows."""
        seen: list[Any] = []

        def look() -> None:
            seen[:] = Snapshot(self.params, self.opt), Oracle(self.kind, self.opt), self.versions()

        look()
        try:
            how(look)
        except BaseException as error:
            if not may_raise or isinstance(error, Fault):
                raise Fault(f"a step raised {type(error).__name__}: {error}") from error
            self.check_unchanged(seen[0], error)
            self.counts["steps that raised"] += 1
            return False
        self.check_step(*seen)
        return True

    def versions(self) -> list[int | None]:
        return [_version_of(p) for p in self.members()]

    def check_step(self, before: Snapshot, oracle: Oracle, versions: list[int | None]) -> None:
        """What holds after a step that did not raise."""
        oracle.check(self.opt)
        after = Snapshot(self.params, self.opt)
        for name in ("gradients", "groups", "options"):
            if before.seen[name] != after.seen[name]:
                raise Fault(f"a step has changed {name}")
        self.counts["elements compared"] += oracle.compared
        self.counts["elements skipped"] += oracle.skipped
        self.counts["steps"] += 1
        for p, want, version in zip(self.members(), oracle.expected, versions, strict=True):
            moved = None if version is None else p._version > version
            dense = p.grad is not None and p.grad.layout == torch.strided
            if want.stepped and dense and p.numel() and moved is False:
                raise Fault(f"a parameter of {tuple(p.shape)} has stepped, and its version has not")
            if not want.stepped and moved and not self.shares(p):
                raise Fault(
                    f"a parameter of {tuple(p.shape)} has not stepped, and its version has changed"
                )
        self.check_places(before, after, oracle)

    def check_places(self, before: Snapshot, after: Snapshot, oracle: Oracle) -> None:
        """Parameters lie where they lay, memory between their elements is as it was, and a rate of
        0 moves nothing."""
        still = (
            oracle.ordinary
            and self.kind.cls not in ("Rprop", "ASGD", "Muon")
            and all(float(g["lr"]) == 0 for g in self.opt.param_groups)
        )
        for a, b in zip(before.seen["parameters"], after.seen["parameters"], strict=True):
            if a[0][:6] != b[0][:6] or a[1:-1] != b[1:-1]:
                raise Fault("a step has moved a parameter, or changed its facts")
            if still and a[-1] != b[-1]:
                raise Fault("a step with a rate of 0 has changed a parameter")
        masks: dict[int, np.ndarray] = {}
        for p in self.params:
            storage = p.untyped_storage()
            mask = masks.setdefault(
                storage.data_ptr(), np.zeros(storage.nbytes() // p.itemsize, np.bool_)
            )
            if mask.size * p.itemsize == storage.nbytes():
                torch.from_numpy(mask).as_strided(p.shape, p.stride(), p.storage_offset()).fill_(
                    True
                )
        for p, a, b in zip(
            self.params, before.seen["parameters"], after.seen["parameters"], strict=False
        ):
            between = np.repeat(~masks[p.untyped_storage().data_ptr()], p.itemsize)
            if a[-1] != b[-1] and between.any():
                was, is_ = np.frombuffer(a[-1], np.uint8), np.frombuffer(b[-1], np.uint8)
                if len(between) == len(was) and (was[between] != is_[between]).any():
                    raise Fault("memory between a parameter's elements has changed")

    def shares(self, p: Any) -> bool:
        """Whether a parameter's storage is that of others, too."""
        return (
            sum(
                q.untyped_storage().data_ptr() == p.untyped_storage().data_ptr()
                for q in self.members()
            )
            > 1
        )

    def check_unchanged(self, before: Snapshot, error: BaseException) -> None:
        different = before.differences(Snapshot(self.params, self.opt))
        if different:
            raise Fault(
                f"a step that raised {type(error).__name__}: {error} -- has changed {different}"
            ) from error

    def fails(
        self, how: Callable[[], Any] | None = None, kind: type[BaseException] = BaseException
    ) -> None:
        """The step must raise, twice and alike, and change nothing."""
        how = self.call if how is None else how
        said: list[tuple[type, str]] = []
        for _ in range(2):
            before = Snapshot(self.params, self.opt)
            try:
                how()
            except kind as error:
                self.check_unchanged(before, error)
                said.append((type(error), str(error)))
            else:
                raise Fault("a step that cannot be taken did not raise")
        if said[0] != said[1]:
            raise Fault(f"a step failed in one way and then in another: {said}")
        self.counts["steps that raised"] += 1

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """What is done within changes nothing of the optimizer."""
        before = Snapshot(self.params, self.opt)
        yield
        different = before.differences(Snapshot(self.params, self.opt))
        if different:
            raise Fault(f"{self.log[-1]} has changed {different}")

    # Running.

    def mend(self) -> None:
        """Give a parameter with numbers out of the ordinary, or with such state, new ones."""
        for p in self.members():
            tensors = [p, *(self.entry(p)[name] for name in self.columns(p))]
            odd = any(
                not np.isfinite(n := numbers(t)).all() or np.abs(n).max(initial=0.0) > 50
                for t in tensors
            )
            if odd:
                with torch.no_grad():
                    plain(p).copy_(self.values(p.shape, p.dtype))
                self.opt.state.pop(p, None)
                self.counts["mended"] += 1

    def run(self, actions: int) -> Counter[str]:
        """Do so many actions, most of them followed by a step; raises `Fault` with the seed and the
        last actions."""
        from support.user_actions import ACTIONS

        usable = [action for action in ACTIONS if action.fits(self)]
        weights = [action.weight for action in usable]
        quick = self.seed % 2 == 1 and linalg.has_bfloat16_products()
        with _products(quick):
            while self.counts["actions"] < actions:
                (action,) = self.choose.choices(usable, weights)
                self.log.append(action.name)
                try:
                    if action.run(self) is False:
                        self.log.pop()
                        continue
                    self.counts["actions"] += 1
                    self.counts[f"action {action.name}"] += 1
                    if self.choose.random() < 0.6:
                        self.log.append("step")
                        self.go_on()
                    self.mend()
                except Exception as error:
                    words = f"{self.algorithm} {self.seed} {self.counts['actions'] + 1}"
                    tail = ", ".join(self.log[-12:])
                    raise Fault(
                        f"{type(error).__name__}: {error}\nagain: python "
                        f"tests/support/state_machine.py {words}\nlast: {tail}"
                    ) from error
        return self.counts

    def go_on(self) -> None:
        """An ordinary step."""
        self.set_gradients()
        self.step()


def _products(quick: bool) -> Any:
    """Products of matrices in bfloat16 where the processor has them, or in float32."""
    if quick:
        return nullcontext()
    from unittest.mock import patch

    return patch.object(linalg, "has_bfloat16_products", lambda: False)


def make_machine(algorithm: str, seed: int) -> Machine:
    """The machine of an algorithm."""
    from support.user_actions import DescentMachine

    return DescentMachine(algorithm, seed) if algorithm == "lbfgs" else Machine(algorithm, seed)


def main() -> None:
    algorithm, seed, actions = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    counts = make_machine(algorithm, seed).run(actions)
    for name, count in sorted(counts.items()):
        print(f"{count:8} {name}")


if __name__ == "__main__":
    # Under its own name, so that the actions meet the same module.
    sys.modules["support.state_machine"] = sys.modules[__name__]
    main()
