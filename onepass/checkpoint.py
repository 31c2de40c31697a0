"""Save and load a tree of tensors and plain values in one `.safetensors` file, without pickle.

A tree is what a training run consists of: mappings, lists and tuples, nested at will, whose leaves
are tensors or plain values (numbers, strings, booleans, None). Every tensor becomes a tensor of the
file under its path in the tree (`optimizer.state.0.exp_avg`), so any safetensors reader can list
it; all the rest is JSON in the file's metadata. Loading such a file runs no code from it, whoever
wrote it.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import stat
import zlib
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["CheckpointError", "load", "save"]

_VERSION = 1
_VERSION_KEY = "onepass_checkpoint"
_LARGEST_INDEX = 90_000_000  # bytes; safetensors itself refuses headers of 100 MB
_INTEGERS = ("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
# Complex numbers are stored as pairs of floats: not every safetensors reader knows complex64, none
# knows complex128.
_COMPLEX = {
    torch.complex32: torch.float16,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}
_DTYPES = frozenset(
    dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
    and (dtype.is_floating_point or str(dtype).split(".")[1] in _INTEGERS)
)
# An object whose only key is one of these stands for a value that JSON does not have.
_TENSOR, _TUPLE, _MAPPING, _FLOAT = "$tensor", "$tuple", "$dict", "$float"


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; the message says why, what is allowed and what to
    do."""


def save(path: str | os.PathLike[str], tree: Mapping[Any, Any]) -> None:
    """Write `tree` to `path`, whole or not at all: a reader sees the old file or the new one, never
    a part.

    Tensors may be of any dense dtype and shape, on any device, views or shared with others; each is
    stored by itself (tensors that shared memory come back equal but separate), without
    `requires_grad`. Mappings come back as dicts, named tuples as tuples; keys may be strings,
    numbers, booleans, None or tuples of those. Floats are kept exactly.

    Errors: `CheckpointError` for a value that has no place in such a file, with its path in the
    tree; `OSError` when the file cannot be written. In both cases what was at `path` is still
    there, untouched.
    """
    st = _import_safetensors()
    if not isinstance(tree, Mapping):
        raise CheckpointError(
            f"checkpoint.save: tree must be a mapping, got {type(tree).__name__}; pass a dict."
        )
    encoder = _Encoder()
    try:
        text = json.dumps(encoder.encode(tree, ()), allow_nan=False)
    except RecursionError:
        raise CheckpointError(
            "checkpoint.save: the tree contains itself or is nested too deeply; pass a tree of "
            "moderate depth."
        ) from None
    if len(json.dumps(text)) > _LARGEST_INDEX:
        raise CheckpointError(
            f"checkpoint.save: the values that are not tensors take {len(text)} bytes and at most "
            f"{_LARGEST_INDEX} fit; store long lists of numbers as tensors."
        )
    metadata = {
        "format": "pt",
        _VERSION_KEY: str(_VERSION),
        "tree": text,
        "crc32": str(zlib.crc32(text.encode())),
    }
    _write_whole(
        Path(os.path.realpath(path)), lambda name: st.save_file(encoder.tensors, name, metadata)
    )


def load(path: str | os.PathLike[str]) -> dict[Any, Any]:
    """Read the tree that `save` wrote to `path`; all tensors are on the CPU and own their memory.

    Errors: `CheckpointError` when the file is truncated, damaged, of another program or of a newer
    onepass; `FileNotFoundError` and other `OSError` when it cannot be opened.
    """
    _import_safetensors()
    from safetensors import SafetensorError, safe_open

    with open(path, "rb"):  # an OSError of Python's own, for a missing or unreadable file
        pass
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            text = _read_tree_text(path, file.metadata() or {})
            tree = _decode(json.loads(text), file, path)
    except SafetensorError as error:
        raise CheckpointError(
            f"checkpoint.load: {path} is truncated, damaged or not a safetensors file ({error}); "
            "use another checkpoint or start again."
        ) from error
    except CheckpointError:
        raise
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise _damaged(path, "its index is inconsistent") from error
    if not isinstance(tree, dict):
        raise _damaged(path, "its index is not a mapping")
    return tree


def _import_safetensors():
    try:
        import safetensors.torch
    except ImportError as error:
        raise CheckpointError(
            "checkpoint: the safetensors package is needed and not installed; run pip install "
            "'onepass[train]'."
        ) from error
    return safetensors.torch


def _damaged(path: str | os.PathLike[str], reason: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint.load: {path} is damaged: {reason}; use another checkpoint or start again."
    )


def _read_tree_text(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> str:
    version = metadata.get(_VERSION_KEY)
    if version is None:
        raise CheckpointError(
            f"checkpoint.load: {path} is a safetensors file but no onepass checkpoint; "
            "pass a file that onepass.checkpoint.save wrote."
        )
    if version != str(_VERSION):
        raise CheckpointError(
            f"checkpoint.load: {path} has checkpoint format {version!r} and this onepass reads "
            f"format {_VERSION}; load it with the onepass that wrote it, or upgrade onepass."
        )
    text = metadata.get("tree")
    if text is None or metadata.get("crc32") != str(
        zlib.crc32(text.encode("utf-8", "surrogatepass"))
    ):
        raise _damaged(path, "its index does not match its checksum")
    return text


# --- the tree as JSON -----------------------------------------------------------------------------


class _Encoder:
    """Turns a tree into its JSON form and gathers its tensors on the way, under unique names made
    from their paths."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._storages: set[int] = set()

    def encode(self, value: Any, where: tuple[str, ...]) -> Any:
        if value is None or isinstance(value, (bool, str)):
            return value
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {_FLOAT: repr(float(value))}
        if isinstance(value, Tensor):
            return self._encode_tensor(value, where)
        if isinstance(value, Mapping):
            return self._encode_mapping(value, where)
        if isinstance(value, (list, tuple)):
            items = [self.encode(item, (*where, str(index))) for index, item in enumerate(value)]
            return items if isinstance(value, list) else {_TUPLE: items}
        raise CheckpointError(
            f"checkpoint.save: {'.'.join(where)} is a {type(value).__name__}, which has no place "
            "in a checkpoint; use tensors, numbers, strings, booleans, None, and dicts, lists or "
            "tuples of them."
        )

    def _encode_mapping(self, value: Mapping[Any, Any], where: tuple[str, ...]) -> Any:
        pairs = [(key, self.encode(item, (*where, str(key)))) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in pairs):
            return dict(pairs)
        return {_MAPPING: [[self._encode_key(key, where), item] for key, item in pairs]}

    def _encode_key(self, key: Any, where: tuple[str, ...]) -> Any:
        if isinstance(key, tuple):
            return {_TUPLE: [self._encode_key(part, where) for part in key]}
        if key is None or isinstance(key, (bool, str, int, float)):
            return self.encode(key, where)
        raise CheckpointError(
            f"checkpoint.save: {'.'.join(where) or 'the tree'} has a key of type "
            f"{type(key).__name__}; use strings, numbers, booleans, None or tuples of them."
        )

    def _encode_tensor(self, tensor: Tensor, where: tuple[str, ...]) -> Any:
        # Only these two are known to be nothing but their elements; a DTensor, say, would lose all
        # but its own shard.
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
        dtype = _COMPLEX.get(tensor.dtype, tensor.dtype)
        if not plain or tensor.is_meta or dtype not in _DTYPES:
            raise CheckpointError(
                f"checkpoint.save: {'.'.join(where)} is a {type(tensor).__name__} of "
                f"{tensor.dtype} and layout {tensor.layout} on device {tensor.device}; convert it "
                "to a plain dense tensor whose data is here."
            )
        stored = tensor.detach()
        if stored.is_complex():
            stored = torch.view_as_real(stored.resolve_conj())
        stored = stored.resolve_neg().cpu().contiguous()
        storage = stored.untyped_storage()
        # safetensors refuses tensors that share memory, as tied weights do and the optimizers'
        # `step` tensors may.
        if storage.nbytes() != stored.nbytes or storage.data_ptr() in self._storages:
            stored = stored.clone()
        self._storages.add(stored.untyped_storage().data_ptr())
        name = self._unique_name(where)
        self.tensors[name] = stored
        leaf: dict[str, Any] = {"name": name, "crc32": _tensor_checksum(stored)}
        if tensor.is_complex():
            leaf["complex"] = True
        return {_TENSOR: leaf}

    def _unique_name(self, where: tuple[str, ...]) -> str:
        stem = ".".join(where).encode("utf-8", "backslashreplace").decode()
        name, count = stem, 1
        while name in self.tensors or name == "__metadata__":
            count += 1
            name = f"{stem}#{count}"
        return name


def _decode(value: Any, file: Any, path: str | os.PathLike[str]) -> Any:
    if isinstance(value, list):
        return [_decode(item, file, path) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((tag, content),) = value.items()
        if tag == _TENSOR:
            return _decode_tensor(content, file, path)
        if tag == _TUPLE:
            return tuple(_decode(item, file, path) for item in content)
        if tag == _FLOAT:
            return float(content)
        if tag == _MAPPING:
            return {
                _decode_key(key, file, path): _decode(item, file, path) for key, item in content
            }
    return {key: _decode(item, file, path) for key, item in value.items()}


def _decode_key(key: Any, file: Any, path: str | os.PathLike[str]) -> Hashable:
    decoded = _decode(key, file, path)
    if isinstance(decoded, Tensor):
        raise _damaged(path, "a tensor is used as a key")
    return decoded


def _decode_tensor(leaf: Mapping[str, Any], file: Any, path: str | os.PathLike[str]) -> Tensor:
    # A copy, because what safetensors hands out may be a map of the file, which a later save will
    # replace.
    stored = file.get_tensor(leaf["name"]).clone()
    if _tensor_checksum(stored) != leaf["crc32"]:
        raise _damaged(path, f"the tensor {leaf['name']} does not match its checksum")
    return torch.view_as_complex(stored) if leaf.get("complex") else stored


def _tensor_checksum(tensor: Tensor) -> int:
    """The CRC-32 of dtype, shape and elements: a bit that flipped in any of them shows."""
    label = zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    return (
        zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, label)
        if tensor.numel()
        else label
    )


# --- the file -------------------------------------------------------------------------------------


def _write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a new name beside `path`, and move that file to `path` once it is on the
    disk."""
    from safetensors import SafetensorError

    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    # Created here first for the permissions of an ordinary new file; the writer may make its own
    # with narrower ones.
    with open(temporary, "xb") as file:
        mode = os.fstat(file.fileno()).st_mode
    try:
        write(temporary)
        os.chmod(temporary, stat.S_IMODE(mode))
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except KeyError as error:
        raise CheckpointError(
            f"checkpoint.save: the installed safetensors does not know {error}; upgrade it or "
            "convert the tensor."
        ) from error
    except SafetensorError as error:
        raise OSError(
            f"checkpoint.save: {path} could not be written ({error}); free space or choose another "
            "folder"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    if (
        os.name == "posix"
    ):  # the rename itself survives a power cut only once the folder is on the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
