"""Python source: the bytes of this interpreter's own standard library, and a small causal
transformer over them."""

from __future__ import annotations

import hashlib
import math
import os
import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .task import Data, Examples, Metric, Task, TaskError

__all__ = ["TEXT"]

_CONTEXT = 128  # bytes that a prediction may look back
_TRAIN_BYTES, _HELD_OUT_BYTES = 6_000_000, 128_000
# Packages that are not the library's, and folders of tests and generated tables, which read unlike
# other source.
_LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
}


def _load(folder: Path) -> Data:
    """Whole files are held out; `folder` is not used, the library is where Python is installed."""
    library = Path(sysconfig.get_paths()["stdlib"])
    train, held_out = split_files(library)
    return Data(_cut(library, train, _TRAIN_BYTES), _cut(library, held_out, _HELD_OUT_BYTES))


def split_files(library: Path) -> tuple[list[str], list[str]]:
    """The .py files below `library` to train on and to hold out, as sorted relative paths.

    One file in ten is held out, by a hash of its path: the same files on every machine and in every
    run.
    """
    train: list[str] = []
    held_out: list[str] = []
    for folder, folders, files in os.walk(library):
        folders[:] = [
            name for name in folders if name not in _LEFT_OUT
        ]  # site-packages may be a thousand times as large
        for file in files:
            if file.endswith(".py"):
                name = Path(folder, file).relative_to(library).as_posix()
                (held_out if hashlib.sha256(name.encode()).digest()[0] % 10 == 0 else train).append(
                    name
                )
    if not train or not held_out:
        raise TaskError(
            f"task text: it reads Python's own standard library, and {library} has too few .py "
            "files; use a Python that is installed with its sources."
        )
    return sorted(train), sorted(held_out)


def _cut(library: Path, names: list[str], most: int) -> Examples:
    """The first `most` bytes of the files in a row, cut into windows: each byte is to be told from
    those before it.

    Where the cap cuts, it takes the same share of every file, so that no part of the alphabet is
    left out.
    """
    contents = [(library / name).read_bytes() for name in names]
    share = min(1.0, most / sum(map(len, contents)))
    text = b"".join(content[: math.ceil(len(content) * share)] for content in contents)
    if len(text) <= _CONTEXT:
        raise TaskError(
            f"task text: the .py files of {library} hold only {len(text)} bytes; use a Python "
            "that is installed with its sources."
        )
    windows = torch.frombuffer(bytearray(text), dtype=torch.uint8).unfold(0, _CONTEXT + 1, _CONTEXT)
    return Examples(windows[:, :-1], windows[:, 1:], Tensor.long)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.attention_in = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape
        joint = self.attention_in(self.attention_norm(x)).view(
            batch, length, 3, self.heads, width // self.heads
        )
        query, key, value = joint.permute(2, 0, 3, 1, 4)
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of features by its angle, so that attention sees the distance of two bytes,
    not their places."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


class SmallGPT(nn.Module):
    """A causal transformer over bytes: (batch, length) int64 in 0..255 to logits (batch, length,
    256).

    `length` is at most 128. Positions are rotary (arXiv:2104.09864); the embedding and the last
    layer are one tensor.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int = 128, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        self.head.weight = self.embedding.weight
        pairs = width // heads // 2
        angles = torch.arange(float(_CONTEXT)).outer(
            10_000.0 ** (-torch.arange(float(pairs)) / pairs)
        )
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                # The sum of all blocks' outputs keeps its variance at the start, as in GPT-2.
                nn.init.normal_(
                    p, std=0.02 / math.sqrt(2 * layers) if name.endswith("_out.weight") else 0.02
                )
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, text: Tensor) -> Tensor:
        x = self.embedding(text)
        cos, sin = self.cos[: text.shape[1]], self.sin[: text.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _measure_bits(logits: Tensor, targets: Tensor) -> Tensor:
    return _loss(logits, targets) / math.log(2)


TEXT = Task(
    name="text",
    make_model=SmallGPT,
    load=_load,
    loss=_loss,
    metric=Metric("bits per byte", _measure_bits),
    lr={
        "AdamW": 3e-3,
        "Adam": 3e-3,
        "SGD": 0.3,
        "sgd-momentum": 0.03,
        "Adafactor": 0.1,
        "Adagrad": 0.03,
        "ASGD": 0.1,
        "muon-adamw": 1e-2,
        "RMSprop": 3e-4,
    },
    epochs=6,
    batch_size=8,
    examples_per_epoch=2048,
    warmup=0.05,
)
