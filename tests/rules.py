"""Rules beyond the table, as users may write them: all operations, columns that are only copied, norms within norms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from onepass.kernel import bind, finish, trace
from onepass.kernel.functions import amax, exp, floor, log, mean, norm, numel, rint, sqrt, where
from onepass.kernel.functions import sum as total
from onepass.kernel.program import Program

Rule = Callable[..., Mapping[str, Any]]
ONE_NUMBER = (("lr", ("float",)),)


def program(rule: Rule, format: str = "float32", state: str | None = None) -> Program:
    """A rule whose keyword is lr, as it would be stepped."""
    graph = finish(trace(rule, ONE_NUMBER))
    formats = {"p": format, "g": format} | dict.fromkeys(graph.state, state or format)
    return bind(graph, tuple(formats.items()))


def host_values_stored(p, g, a, b, c, d, *, lr):
    return {"p": p - lr * g, "a": lr, "b": 0.1, "c": norm(g), "d": numel() + 0.0}


def everything(p, g, s, t, *, lr):
    turned = where((g < 0) ^ (p >= s), rint(p * 4), floor(s * 3))
    kept = where(~(p == g) & (lr > 0.3) | (s != s), abs(turned), -p)
    told = where(g < 0, 8.0, 0.0) + where(p >= s, 4.0, 0.0) + where(p == g, 2.0, 0.0) + where(s != s, 1.0, 0.0)
    root = sqrt(abs(s)) * exp(-lr) + log(1 + lr) ** 2
    return {"p": kept / (1 + lr) + 2 / s - g / (1 + abs(p)), "s": root, "t": told + where(lr > 0.3, 16.0, t * 0 + 32)}


def copies(p, g, prev, zero, *, lr):
    return {"p": p - lr * g, "prev": g, "zero": 0.0}


def lars(p, g, momentum, *, lr):
    """You, Gitman and Ginsburg, 2017: two passes."""
    ratio = where(norm(g) > 0, 0.1 * norm(p) / (norm(g) + 1e-3), 1.0)
    m = 0.9 * momentum + lr * ratio * g
    return {"p": p - m, "momentum": m}


def lamb(p, g, m, v, *, lr):
    """You et al., 2019, without bias correction: the norm of an update that is not stored is computed twice."""
    m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
    update = m / (sqrt(v) + 1e-6) + 0.01 * p
    return {"p": p - lr * norm(p) / (norm(update) + 1e-12) * update, "m": m, "v": v}


def centred(p, g, *, lr):
    """Three passes: the largest deviation from a mean, then the norm of what that scales."""
    around = g - mean(g)
    scaled = around / (amax(around) + 1e-8)
    return {"p": p - lr * scaled * norm(p) / (norm(scaled) + numel())}


def only_reductions(p, g, s, *, lr):
    return {"p": p * 0 + total(g) - amax(p), "s": mean(s * s)}


RULES = (host_values_stored, everything, copies, lars, lamb, centred, only_reductions)
