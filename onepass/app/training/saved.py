"""What the checkpoint of a training run must hold: each entry is looked at before any of it is
used.

Nothing here trusts the file: it may be of another program, or written by hand. Each failure is one
sentence, and a `CheckpointError`; a name in the file is never imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoint import CheckpointError
from ...contract.values import as_number, brief
from .settings import SettingsError

__all__ = [
    "KIND",
    "check",
    "check_entries",
    "check_model",
    "check_optimizer",
    "check_progress",
    "refuse_import",
]

KIND = "onepass training run"
_ENTRIES = (
    "kind",
    "settings",
    "epoch",
    "step",
    "model",
    "optimizer",
    "rng",
    "history",
    "seconds",
    "data",
    "torch",
)
# The largest step count that a float holds as it is.
_MOST_STEPS = 2**53


def check(path: Path, tree: Mapping[Any, Any], kinds: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise `CheckpointError` unless a tree has all entries of a run, of the right types; `kinds`
    has examples."""
    if tree.get("kind") != KIND:
        raise CheckpointError(
            f"{path} is a checkpoint but not one of a training run; name a folder in which onepass "
            "train has run."
        )
    _check_keys(path, "the checkpoint", tree, _ENTRIES)
    for name, examples in kinds.items():
        _check_keys(path, name, tree[name], examples)
        for key, example in examples.items():
            _check_type(path, f"{name}.{key}", tree[name][key], example)
    for name, example in (("epoch", 0), ("step", 0), ("torch", "")):
        _check_type(path, name, tree[name], example)
    for key, value in tree["seconds"].items():
        if not (math.isfinite(value) and value >= 0):
            raise _misfit(
                path, f"seconds.{key} must be a finite number of at least 0, got {brief(value)}"
            )
    if "\0" in tree["data"]["folder"]:
        raise _misfit(
            path, f"data.folder must be the name of a folder, got {brief(tree['data']['folder'])}"
        )
    _check_keys(path, "rng", tree["rng"], ("torch", "shuffle"))
    for name, state in tree["rng"].items():
        _check_random_state(path, f"rng.{name}", state)
    for name in ("model", "optimizer"):
        if not isinstance(tree[name], dict):
            raise _misfit(path, f"{name} must be a mapping, got {brief(tree[name])}")


def refuse_import(path: Path, name: str, asked: object) -> None:
    """Raise `SettingsError` for a `module:Class` that a file names and the command line does
    not."""
    if ":" in name and name != asked:
        shown = brief(name)
        raise SettingsError(
            f"{path} was trained with the optimizer {shown}, and what a file names is not "
            f"imported: give --optimizer {shown} as well if you trust it, or start another run in "
            "a folder of its own."
        )


def check_progress(path: Path, tree: Mapping[str, Any], steps_per_epoch: int, epochs: int) -> None:
    """Raise `CheckpointError` unless the history is as long as the finished epochs, and these are
    not too many."""
    epoch, history = tree["epoch"], tree["history"]
    if not 0 <= epoch <= epochs:
        raise _misfit(
            path,
            f"epoch must lie in [0, {epochs}], as the run has {epochs} epochs, got {brief(epoch)}",
        )
    steps = epoch * steps_per_epoch
    if tree["step"] != steps:
        raise _misfit(path, f"step must be {steps} after {epoch} epochs, got {brief(tree['step'])}")
    for key, values in history.items():
        wanted = epoch if key.startswith("held_out") else steps
        if len(values) != wanted:
            raise _misfit(
                path,
                f"history.{key} must have {wanted} numbers after {epoch} epochs, got {len(values)}",
            )
        # Held-out examples may have a loss beyond all numbers; a run in which others have one ends.
        finite = key in ("lr", "train_loss")
        for i, value in enumerate(values):
            if not _is_number(value) or (finite and not math.isfinite(value)):
                kind = "a finite number" if finite else "a number"
                raise _misfit(path, f"history.{key}[{i}] must be {kind}, got {brief(value)}")


def check_model(path: Path, saved: Mapping[Any, Any], own: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` unless the saved tensors are those of the task's model."""
    _check_keys(path, "model", saved, own)
    for name, like in own.items():
        t = saved[name]
        if not isinstance(t, Tensor) or t.shape != like.shape or t.dtype != like.dtype:
            raise _misfit(path, f"model.{name} must be {brief(like)}, got {brief(t)}")


def check_optimizer(
    path: Path, saved: Mapping[Any, Any], own: Mapping[str, Any], strict: bool
) -> None:
    """Raise `CheckpointError` unless the saved options are those of the run's optimizer, and step
    counts are such.

    All options but `lr` follow from the settings, if `strict`: a class of the user's own may change
    them as it steps.
    """
    _check_keys(path, "optimizer", saved, ("state", "param_groups"))
    groups, state = saved["param_groups"], saved["state"]
    if not isinstance(groups, list) or len(groups) != len(own["param_groups"]):
        raise _misfit(
            path,
            f"optimizer.param_groups must have {len(own['param_groups'])} groups, got "
            f"{brief(groups)}",
        )
    for i, (group, like) in enumerate(zip(groups, own["param_groups"], strict=True)):
        _check_group(path, f"optimizer.param_groups.{i}", group, like, strict)
    if not isinstance(state, dict):
        raise _misfit(path, f"optimizer.state must be a mapping, got {brief(state)}")
    for key, entries in state.items():
        if key not in range(sum(len(group["params"]) for group in own["param_groups"])):
            raise _misfit(
                path, f"optimizer.state has {brief(key)}, which is not the number of a parameter"
            )
        count = as_number(entries.get("step", 0)) if isinstance(entries, dict) else None
        if count is None or not (0 <= count <= _MOST_STEPS and count % 1 == 0):
            got = brief(entries["step"]) if isinstance(entries, dict) else brief(entries)
            raise _misfit(
                path, f"optimizer.state.{brief(key)} must have a whole number of steps, got {got}"
            )


def check_entries(
    path: Path, saved: Mapping[Any, Mapping[str, Any]], entries: Mapping[Any, Sequence[str]]
) -> None:
    """Raise `CheckpointError` unless each parameter has the state entries that a step makes."""
    for key, names in entries.items():
        found = saved.get(key, {})
        lost = [name for name in names if name not in found] + [
            name for name in found if name not in names
        ]
        if lost:
            raise _misfit(
                path,
                f"optimizer.state.{key} must have {', '.join(names)}, and differs in "
                f"{brief(lost[0])}",
            )


def _check_group(path: Path, where: str, group: Any, own: Mapping[str, Any], strict: bool) -> None:
    if not isinstance(group, dict) or not {"params", "lr"} <= group.keys():
        raise _misfit(path, f"{where} must be a mapping with params and lr, got {brief(group)}")
    rate = group["lr"]
    if not (_is_number(rate) and math.isfinite(rate) and rate >= 0):
        raise _misfit(path, f"{where}.lr must be a finite number of at least 0, got {brief(rate)}")
    _check_keys(path, where, group, own if strict else group)
    for key in own.keys() & group.keys() - {"lr"}:
        if not _equals(group[key], own[key]) and (strict or key == "params"):
            raise _misfit(path, f"{where}.{key} must be {brief(own[key])}, got {brief(group[key])}")


def _misfit(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} does not fit this version of the task or of the optimizer: {reason}; start anew."
    )


def _check_keys(path: Path, name: str, value: Any, keys: Sequence[str] | Mapping[str, Any]) -> None:
    if not isinstance(value, dict):
        raise _misfit(path, f"{name} must be a mapping, got {brief(value)}")
    lost = [key for key in keys if key not in value]
    if lost:
        raise _misfit(path, f"{name} has no {lost[0]!r}")
    unknown = [key for key in value if key not in keys]
    if unknown:
        raise _misfit(path, f"{name} has {brief(unknown[0])}, which is not known")


def _check_type(path: Path, name: str, value: Any, example: object) -> None:
    """A number, a whole number, a list or a text, as the example is."""
    words = {float: "a number", int: "a whole number", list: "a list", str: "a text"}
    good = _is_number(value) if isinstance(example, float) else type(value) is type(example)
    if not good:
        raise _misfit(path, f"{name} must be {words[type(example)]}, got {brief(value)}")


def _is_number(value: object) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and as_number(value) is not None
    )


def _check_random_state(path: Path, name: str, state: Any) -> None:
    """Try it on a generator of our own: it knows best."""
    try:
        torch.Generator().set_state(state)
    except (RuntimeError, TypeError) as error:
        raise _misfit(
            path, f"{name} must be the state of a random generator, got {brief(state)}"
        ) from error


def _equals(a: object, b: object) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return (
            isinstance(a, Tensor)
            and isinstance(b, Tensor)
            and a.dtype == b.dtype
            and torch.equal(a, b)
        )
    return type(a) is type(b) and a == b
