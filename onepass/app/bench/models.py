"""Models by name: the benchmark's, and a user's own as `file.py:function`."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..catalog import UnknownName, nearest
from .shapes import MODELS, Model

__all__ = ["find_model"]

HOW = "write file.py:function, as in net.py:make_model; the function returns a module"


def find_model(name: str) -> Model:
    """Return the model of this name, in any case, or the one that `file.py:function` makes.

    Raises `UnknownName` if there is none, or if the function does not return a module with
    parameters to train.
    """
    if ":" in name:
        return _own_model(name)
    if name.lower() not in MODELS:
        raise nearest("model", name, MODELS)
    return MODELS[name.lower()]


def _own_model(name: str) -> Model:
    """Return the shapes of what a user's function makes, without memory for its numbers."""
    file, _, function_name = name.rpartition(":")
    function = getattr(_load(name, file), function_name, None)
    if not callable(function):
        raise UnknownName(f"{file} has no function {function_name!r}: {HOW}.")
    try:
        with torch.device("meta"):
            module: Any = function()
    except Exception as error:
        raise UnknownName(
            f"{name!r} raised {type(error).__name__} ({error}): it is called without arguments, "
            "with the meta device as torch's default."
        ) from error
    if not isinstance(module, nn.Module):
        kind = torch.typename(module)
        raise UnknownName(f"{name!r} returned an object of class {kind}, not a module: {HOW}.")
    shapes = [tuple(p.shape) for p in module.parameters() if p.requires_grad]
    if not shapes:
        raise UnknownName(f"{name!r} returned a module without parameters that need gradients.")
    return Model(name, f"{function_name} of {Path(file).name}", lambda: shapes)


def _load(name: str, file: str) -> ModuleType:
    """Return a user's file as a module; what lies beside it can be imported there."""
    path = Path(file).resolve()
    specification = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or specification is None or specification.loader is None:
        raise UnknownName(f"there is no Python file {file!r} for the model {name!r}: {HOW}.")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, os.fspath(path.parent))
    module = importlib.util.module_from_spec(specification)
    sys.modules.setdefault(path.stem, module)
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        raise UnknownName(
            f"{file} cannot be run ({type(error).__name__}: {error}): mend it, then measure again."
        ) from error
    return module
