"""Checkpoints come back bit for bit, are written whole or not at all, and damaged ones are refused
in a sentence."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onepass import checkpoint
from onepass.checkpoint import CheckpointError

NAN, INF = float("nan"), float("inf")


def is_same(a: object, b: object) -> bool:
    """Equal in structure, types and bits; NaN is the same as NaN, and 0.0 not as -0.0."""
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor)
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        return a.numel() == 0 or bool((bits(a) == bits(b)).all())
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        assert isinstance(b, float)
        return struct.pack("d", a) == struct.pack("d", b) or (a != a and b != b)
    if isinstance(a, dict):
        assert isinstance(b, dict)
        keys = len(a) == len(b) and all(is_same(x, y) for x, y in zip(a, b, strict=True))
        return keys and all(is_same(x, y) for x, y in zip(a.values(), b.values(), strict=True))
    if isinstance(a, (list, tuple)):
        assert isinstance(b, (list, tuple))
        return len(a) == len(b) and all(is_same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def make_tree() -> dict:
    return {
        "model": {"weight": torch.arange(12.0).reshape(3, 4), "steps": torch.tensor(7)},
        "optimizer": {
            "state": {
                0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(4, dtype=torch.bfloat16)},
                1: {},
            },
            "param_groups": [
                {
                    "lr": 1e-3,
                    "betas": (0.9, 0.999),
                    "foreach": None,
                    "amsgrad": False,
                    "params": [0, 1],
                }
            ],
        },
        "values": [NAN, INF, -INF, -0.0, 0.1, 2**70, "sentence", True, None, [], {}, ()],
    }


# --- round trips ----------------------------------------------------------------------------------

scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
keys = st.one_of(
    st.text(max_size=6),
    st.sampled_from(["$tensor", "$dict", "$tuple", "$float", "a.b"]),
    st.integers(-3, 3),
    st.none(),
)
DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.uint8,
    torch.bool,
]
shapes = st.lists(st.integers(0, 3), max_size=3)
tensors = st.builds(
    lambda shape, dtype: (torch.randn(shape) * 3).to(dtype), shapes, st.sampled_from(DTYPES)
)
trees = st.recursive(
    scalars | tensors,
    lambda node: (
        st.lists(node, max_size=3) | st.dictionaries(keys, node, max_size=3) | st.tuples(node, node)
    ),
    max_leaves=12,
)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(tree=st.dictionaries(keys, trees, max_size=4))
def test_any_tree_comes_back(tree: dict, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "tree.safetensors", tree)
    assert is_same(tree, checkpoint.load(tmp_path / "tree.safetensors"))


@pytest.mark.parametrize(
    "dtype",
    [
        *DTYPES,
        *(torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64),
        *(torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 0, 3), (2, 3, 4)], ids=str)
def test_every_dtype_and_shape(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    size = torch.empty(shape, dtype=dtype).nbytes
    raw = torch.randint(2 if dtype == torch.bool else 100, (size,), dtype=torch.uint8)
    tree = {"tensor": raw.view(dtype).reshape(shape)}
    checkpoint.save(tmp_path / "t", tree)
    assert is_same(tree, checkpoint.load(tmp_path / "t"))


def test_shared_and_viewed_memory(tmp_path: Path) -> None:
    steps, base = torch.arange(4.0), torch.randn(4, 6)
    tied = torch.nn.Parameter(torch.randn(3))
    tree = {
        "steps": [steps[i] for i in range(4)],
        "whole": steps,
        "transposed": base.T,
        "strided": base[::2, 1::2],
        "expanded": torch.tensor(2.0).expand(3),
        "conjugate": torch.randn(2, dtype=torch.complex64).conj(),
        "negative": torch.randn(2, dtype=torch.complex64).conj().imag,
        "tied": [tied, tied],
        "a.b": torch.tensor(1),
        "a": {"b": torch.tensor(2)},
        "__metadata__": torch.tensor(3),
    }
    checkpoint.save(tmp_path / "t", tree)
    loaded = checkpoint.load(tmp_path / "t")
    assert is_same({**tree, "tied": [tied.detach()] * 2}, loaded)
    loaded["steps"][0].fill_(9)
    assert loaded["steps"][1] == 1
    assert loaded["whole"][0] == 0
    assert not loaded["tied"][0].requires_grad


def test_a_loaded_tensor_does_not_depend_on_the_file(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "t", {"a": torch.zeros(100_000)})
    loaded = checkpoint.load(tmp_path / "t")["a"]
    with open(tmp_path / "t", "rb+") as file:
        file.truncate(10)
    loaded += 1
    assert bool((loaded == 1).all())


def test_the_file_is_readable_by_any_safetensors_reader(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "t", make_tree())
    assert sorted(safetensors.torch.load_file(tmp_path / "t")) == [
        "model.steps",
        "model.weight",
        "optimizer.state.0.exp_avg",
        "optimizer.state.0.step",
    ]


def test_an_optimizer_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, amsgrad=True)

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
        optimizer.zero_grad()
        model(
            torch.randn(5, 3, generator=torch.Generator().manual_seed(number))
        ).square().sum().backward()
        optimizer.step()

    model, optimizer = make()
    for number in range(3):
        step(model, optimizer, number)
    checkpoint.save(
        tmp_path / "t", {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    )
    again, again_optimizer = make()
    tree = checkpoint.load(tmp_path / "t")
    again.load_state_dict(tree["model"])
    again_optimizer.load_state_dict(tree["optimizer"])
    for number in range(3, 6):
        step(model, optimizer, number)
        step(again, again_optimizer, number)
    assert is_same(dict(model.state_dict()), dict(again.state_dict()))
    assert is_same(optimizer.state_dict(), again_optimizer.state_dict())


# --- what cannot be saved -------------------------------------------------------------------------


def make_cycle() -> dict:
    tree: dict = {}
    tree["itself"] = tree
    return tree


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({"a": {"b": {1, 2}}}, "a.b is a set"),
        ({"a": [0, object()]}, "a.1 is a object"),
        ({"a": {b"x": 1}}, "a has a key of type bytes"),
        ({"a": torch.eye(2).to_sparse()}, "layout torch.sparse_coo"),
        ({"a": torch.empty(2, device="meta")}, "device meta"),
        ([1], "tree must be a mapping, got list"),
        (make_cycle(), "contains itself"),
    ],
)
def test_what_cannot_be_saved_leaves_the_old_file(
    tree: dict, sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "t"
    checkpoint.save(path, {"old": 1})
    with pytest.raises(CheckpointError, match=sentence):
        checkpoint.save(path, tree)
    assert checkpoint.load(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["t"]


# --- whole or not at all --------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["onepass.checkpoint.os.fsync", "onepass.checkpoint.os.replace"])
def test_a_failing_write_leaves_the_old_file(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path / "t", {"old": 1})

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(where, fail)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(tmp_path / "t", make_tree())
    assert checkpoint.load(tmp_path / "t") == {"old": 1}
    assert os.listdir(tmp_path) == ["t"]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        checkpoint.save(tmp_path / "none" / "t", {})
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "none")


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_killed_in_the_middle_of_a_write(tmp_path: Path) -> None:
    """Whichever moment the process dies at, the file is the old one or the new one."""
    path = tmp_path / "t"
    checkpoint.save(path, {"version": 0, "data": torch.zeros(100_000)})
    script = """
import os, signal, sys, torch
from onepass import checkpoint
last = 2 * int(sys.argv[2]) + 1
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save(sys.argv[1], {"version": last, "data": torch.full((100_000,), float(last))})
setattr(os, sys.argv[3], die)
checkpoint.save(sys.argv[1], {"version": last + 1, "data": torch.full((100_000,), float(last + 1))})
"""
    for number, call in enumerate(["fsync", "replace"]):
        child = subprocess.run(
            [sys.executable, "-c", script, str(path), str(number), call], check=False
        )
        assert child.returncode == -9
        tree = checkpoint.load(path)
        assert tree["version"] == 2 * number + 1
        assert bool((tree["data"] == tree["version"]).all())


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
def test_permissions_are_those_of_an_ordinary_file(tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    checkpoint.save(tmp_path / "t", {})
    assert (tmp_path / "t").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    checkpoint.save(tmp_path / "link", {"a": 1})
    assert (tmp_path / "link").is_symlink()
    assert checkpoint.load(tmp_path / "real") == {"a": 1}


# --- damaged and foreign files --------------------------------------------------------------------


def test_truncated_anywhere(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "whole", make_tree())
    whole = (tmp_path / "whole").read_bytes()
    for length in range(0, len(whole), 7):
        (tmp_path / "part").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="truncated, damaged or not a safetensors file"):
            checkpoint.load(tmp_path / "part")


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    """Every byte but those of the format's own label matters to the tree, and a change of it is
    refused."""
    checkpoint.save(tmp_path / "whole", make_tree())
    whole = (tmp_path / "whole").read_bytes()
    expected = make_tree()
    refused = 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        (tmp_path / "damaged").write_bytes(damaged)
        try:
            assert is_same(expected, checkpoint.load(tmp_path / "damaged"))
        except CheckpointError:
            refused += 1
    assert refused > 0.97 * len(whole)


def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "t"
    safetensors.torch.save_file({"a": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="no onepass checkpoint"):
        checkpoint.load(path)
    torch.save({"a": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        checkpoint.load(path)
    safetensors.torch.save_file({}, path, {"onepass_checkpoint": "2", "tree": "{}", "crc32": "0"})
    with pytest.raises(CheckpointError, match="format '2' and this onepass reads format 1"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    "index",
    [
        [],
        {"a": {"$tensor": {"name": "none", "crc32": 0}}},
        {"a": {"$tensor": {"name": "t", "crc32": 0}}},
        {"a": {"$tensor": 3}},
        {"a": {"$float": "pi"}},
        {"a": {"$dict": [[1]]}},
        {"a": {"$dict": [[[1], 2]]}},
        {"a": {"$tuple": None}},
    ],
    ids=str,
)
def test_an_index_that_makes_no_sense(index: object, tmp_path: Path) -> None:
    text = json.dumps(index)
    metadata = {
        "onepass_checkpoint": "1",
        "tree": text,
        "crc32": str(checkpoint.zlib.crc32(text.encode())),
    }
    safetensors.torch.save_file({"t": torch.ones(2)}, tmp_path / "t", metadata)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(tmp_path / "t")


def test_an_index_nested_without_end(tmp_path: Path) -> None:
    text = "[" * 100_000 + "]" * 100_000
    metadata = {
        "onepass_checkpoint": "1",
        "tree": text,
        "crc32": str(checkpoint.zlib.crc32(text.encode())),
    }
    safetensors.torch.save_file({}, tmp_path / "t", metadata)
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.load(tmp_path / "t")


def test_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (
        lambda: checkpoint.save(tmp_path / "t", {}),
        lambda: checkpoint.load(tmp_path / "t"),
    ):
        with pytest.raises(CheckpointError, match=r"pip install 'onepass\[train\]'"):
            call()
