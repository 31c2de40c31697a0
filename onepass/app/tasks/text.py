"""Python source: the bytes of the standard library, and a small causal transformer over them."""

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

# Bytes that a prediction may look back.
_CONTEXT = 128
_TRAIN_BYTES = 6_000_000
_HELD_OUT_BYTES = 128_000
# Packages that are not the library's, and tests and generated tables, which are unlike other code.
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
    """Return windows of the library's files, whole files of which are held out.

    `folder` is not used: the library is where Python is installed.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    train, held_out = split_files(library)
    return Data(_cut(library, train, _TRAIN_BYTES), _cut(library, held_out, _HELD_OUT_BYTES))


def split_files(library: Path) -> tuple[list[str], list[str]]:
    """Return the .py files below `library` to train on and to hold out, as sorted relative paths.

    One file in ten is held out, by a hash of its path: the same files on every machine and in every
    run. Raises `TaskError` if there are too few files.
    """
    train: list[str] = []
    held_out: list[str] = []
    for folder, folders, files in os.walk(library):
        # Not walked: site-packages may be a thousand times as large.
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        for file in files:
            if not file.endswith(".py"):
                continue
            name = Path(folder, file).relative_to(library).as_posix()
            is_held_out = hashlib.sha256(name.encode()).digest()[0] % 10 == 0
            part = held_out if is_held_out else train
            part.append(name)
    if not train or not held_out:
        raise TaskError(
            f"task text: it reads Python's own standard library, and {library} has too few .py "
            "files; use a Python that is installed with its sources."
        )
    return sorted(train), sorted(held_out)


def _cut(library: Path, names: list[str], most: int) -> Examples:
    """Return about `most` bytes of the files, cut into windows.

    A model has to tell each byte from those before it in its window. If the files are longer, the
    same share is taken of each, so that no part of the alphabet is left out.
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
    """Attention and two layers, each added to its input; (batch, length, width) to the same."""

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
        joint = self.attention_in(self.attention_norm(x))
        joint = joint.view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = joint.permute(2, 0, 3, 1, 4)
        query = _rotate(query, cos, sin)
        key = _rotate(key, cos, sin)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of features by its angle, so that attention sees the distance of two bytes."""
    first, second = x.chunk(2, -1)
    turned_first = first * cos - second * sin
    turned_second = first * sin + second * cos
    return torch.cat((turned_first, turned_second), -1)


class SmallGPT(nn.Module):
    """A causal transformer over bytes.

    It takes bytes of shape (batch, length), int64 in 0..255, and returns logits of shape (batch,
    length, 256); `length` is at most 128. Positions are rotary (arXiv:2104.09864). The embedding
    and the last layer are one tensor.
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
        frequencies = 10_000.0 ** (-torch.arange(float(pairs)) / pairs)
        angles = torch.arange(float(_CONTEXT)).outer(frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self._initialize(layers)

    def _initialize(self, layers: int) -> None:
        """Draw weights as GPT-2 does: the sum of all blocks' outputs keeps its variance."""
        for name, p in self.named_parameters():
            if p.ndim == 2:
                std = 0.02 / math.sqrt(2 * layers) if name.endswith("_out.weight") else 0.02
                nn.init.normal_(p, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, text: Tensor) -> Tensor:
        length = text.shape[1]
        x = self.embedding(text)
        cos = self.cos[:length]
        sin = self.sin[:length]
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy over all bytes, in nats."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _measure_bits(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy over all bytes, in bits."""
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
