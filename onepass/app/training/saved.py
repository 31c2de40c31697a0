"""What the checkpoint of a training run must hold: each entry is checked before any is used.

Nothing here trusts the file: another program or a hand may have written it. Each failure is one
sentence, and a `CheckpointError`; a name in the file is never imported.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
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
    "misfit",
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
    """Raise `CheckpointError` unless a tree has all entries of a run, of the right types.

    `kinds` has the parts with known keys, each with an example of its values.
    """
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
    _check_seconds(path, tree["seconds"])
    folder = tree["data"]["folder"]
    if "\0" in folder:
        raise misfit(path, f"data.folder must be the name of a folder, got {brief(folder)}")
    _check_keys(path, "rng", tree["rng"], ("torch", "shuffle"))
    for name, state in tree["rng"].items():
        _check_random_state(path, f"rng.{name}", state)
    for name in ("model", "optimizer"):
        if not isinstance(tree[name], dict):
            raise misfit(path, f"{name} must be a mapping, got {brief(tree[name])}")


def _check_seconds(path: Path, seconds: Mapping[str, float]) -> None:
    """Raise `CheckpointError` unless all times are finite and not negative."""
    for key, value in seconds.items():
        if not (math.isfinite(value) and value >= 0):
            raise misfit(
                path, f"seconds.{key} must be a finite number of at least 0, got {brief(value)}"
            )


def refuse_import(path: Path, name: str, asked: object) -> None:
    """Raise `SettingsError` for a `module:Class` that only a file names, not the command line."""
    if ":" in name and name != asked:
        shown = brief(name)
        raise SettingsError(
            f"{path} was trained with the optimizer {shown}, and what a file names is not "
            f"imported: give --optimizer {shown} as well if you trust it, or start another run in "
            "a folder of its own."
        )


def check_progress(path: Path, tree: Mapping[str, Any], steps_per_epoch: int, epochs: int) -> None:
    """Raise `CheckpointError` unless the history is as long as the finished epochs say."""
    epoch = tree["epoch"]
    if not 0 <= epoch <= epochs:
        raise misfit(
            path,
            f"epoch must lie in [0, {epochs}], as the run has {epochs} epochs, got {brief(epoch)}",
        )
    steps = epoch * steps_per_epoch
    if tree["step"] != steps:
        raise misfit(path, f"step must be {steps} after {epoch} epochs, got {brief(tree['step'])}")
    for key, values in tree["history"].items():
        wanted = epoch if key.startswith("held_out") else steps
        if len(values) != wanted:
            raise misfit(
                path,
                f"history.{key} must have {wanted} numbers after {epoch} epochs, got {len(values)}",
            )
        _check_numbers(path, key, values)


def _check_numbers(path: Path, key: str, values: Sequence[Any]) -> None:
    """Raise `CheckpointError` unless a part of the history consists of numbers."""
    # A training run ends at an infinite loss; held-out examples may have one.
    must_be_finite = key in ("lr", "train_loss")
    for index, value in enumerate(values):
        if not _is_number(value) or (must_be_finite and not math.isfinite(value)):
            kind = "a finite number" if must_be_finite else "a number"
            raise misfit(path, f"history.{key}[{index}] must be {kind}, got {brief(value)}")


def check_model(path: Path, saved: Mapping[Any, Any], expected: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` unless the saved tensors have the names, shapes, dtypes expected."""
    _check_keys(path, "model", saved, expected)
    for name, like in expected.items():
        tensor = saved[name]
        is_tensor = isinstance(tensor, Tensor)
        if not is_tensor or tensor.shape != like.shape or tensor.dtype != like.dtype:
            raise misfit(path, f"model.{name} must be {brief(like)}, got {brief(tensor)}")


def check_optimizer(
    path: Path, saved: Mapping[Any, Any], expected: Mapping[str, Any], strict: bool
) -> None:
    """Raise `CheckpointError` unless a saved state dict fits that of the run's optimizer.

    Its groups must have the expected options, and its state step counts. If `strict`, all options
    except `lr` follow from the settings; a class of the user's own may change them as it steps.
    """
    _check_keys(path, "optimizer", saved, ("state", "param_groups"))
    groups = saved["param_groups"]
    expected_groups = expected["param_groups"]
    if not isinstance(groups, list) or len(groups) != len(expected_groups):
        raise misfit(
            path,
            f"optimizer.param_groups must have {len(expected_groups)} groups, got {brief(groups)}",
        )
    for index, (group, like) in enumerate(zip(groups, expected_groups, strict=True)):
        _check_group(path, f"optimizer.param_groups.{index}", group, like, strict)

    states = saved["state"]
    if not isinstance(states, dict):
        raise misfit(path, f"optimizer.state must be a mapping, got {brief(states)}")
    parameters = sum(len(group["params"]) for group in expected_groups)
    for key, state in states.items():
        if key not in range(parameters):
            raise misfit(
                path, f"optimizer.state has {brief(key)}, which is not the number of a parameter"
            )
        _check_step(path, key, state)


def _check_step(path: Path, key: int, state: Any) -> None:
    """Raise `CheckpointError` unless a parameter's state is a mapping, and its step a count."""
    count = as_number(state.get("step", 0)) if isinstance(state, dict) else None
    if count is None or not (0 <= count <= _MOST_STEPS and count % 1 == 0):
        got = brief(state["step"]) if isinstance(state, dict) else brief(state)
        raise misfit(
            path, f"optimizer.state.{brief(key)} must have a whole number of steps, got {got}"
        )


def check_entries(
    path: Path, saved: Mapping[Any, Mapping[str, Any]], entries: Mapping[Any, Sequence[str]]
) -> None:
    """Raise `CheckpointError` unless each parameter has the state entries that a step makes."""
    for key, names in entries.items():
        found = saved.get(key, {})
        absent = [name for name in names if name not in found]
        unknown = [name for name in found if name not in names]
        different = absent + unknown
        if different:
            raise misfit(
                path,
                f"optimizer.state.{key} must have {', '.join(names)}, and differs in "
                f"{brief(different[0])}",
            )


def _check_group(
    path: Path, where: str, group: Any, expected: Mapping[str, Any], strict: bool
) -> None:
    """Raise `CheckpointError` unless a group has an lr, and the expected options if `strict`."""
    if not isinstance(group, dict) or not {"params", "lr"} <= group.keys():
        raise misfit(path, f"{where} must be a mapping with params and lr, got {brief(group)}")
    rate = group["lr"]
    if not (_is_number(rate) and math.isfinite(rate) and rate >= 0):
        raise misfit(path, f"{where}.lr must be a finite number of at least 0, got {brief(rate)}")
    _check_keys(path, where, group, expected if strict else group)
    for key in expected.keys() & group.keys() - {"lr"}:
        must_agree = strict or key == "params"
        if must_agree and not _equals(group[key], expected[key]):
            wanted = brief(expected[key])
            raise misfit(path, f"{where}.{key} must be {wanted}, got {brief(group[key])}")


def misfit(path: Path, reason: str) -> CheckpointError:
    """Return the error for a file that is a training run, and not one of this version."""
    return CheckpointError(
        f"{path} does not fit this version of the task or of the optimizer: {reason}; start a new "
        "run."
    )


def _check_keys(path: Path, name: str, value: Any, keys: Collection[str]) -> None:
    """Raise `CheckpointError` unless a value is a mapping with exactly these keys."""
    if not isinstance(value, dict):
        raise misfit(path, f"{name} must be a mapping, got {brief(value)}")
    absent = [key for key in keys if key not in value]
    if absent:
        raise misfit(path, f"{name} has no {absent[0]!r}")
    unknown = [key for key in value if key not in keys]
    if unknown:
        raise misfit(path, f"{name} has {brief(unknown[0])}, which is not known")


def _check_type(path: Path, name: str, value: Any, example: object) -> None:
    """Raise `CheckpointError` unless a value is a number, a list or a text, as its example is."""
    words = {float: "a number", int: "a whole number", list: "a list", str: "a text"}
    if isinstance(example, float):
        is_alike = _is_number(value)
    else:
        is_alike = type(value) is type(example)
    if not is_alike:
        raise misfit(path, f"{name} must be {words[type(example)]}, got {brief(value)}")


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return as_number(value) is not None


def _check_random_state(path: Path, name: str, state: Any) -> None:
    """Raise `CheckpointError` unless a generator accepts a state."""
    try:
        torch.Generator().set_state(state)
    except (RuntimeError, TypeError) as error:
        raise misfit(
            path, f"{name} must be the state of a random generator, got {brief(state)}"
        ) from error


def _equals(left: object, right: object) -> bool:
    """Whether two options are of one type (or dtype) and equal."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return False
    return type(left) is type(right) and left == right
