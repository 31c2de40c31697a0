"""Lists of parameter shapes: of real models, of many small tensors, and of a few large ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["MODELS", "Model"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """What an optimizer sees of a model: shapes, in `groups` param groups of different lr.

    If `rows` is not 0, each gradient is sparse and has this many rows of its parameter.
    """

    name: str
    title: str
    list_shapes: Callable[[], list[Shape]]
    groups: int = 1
    rows: int = 0

    @property
    def shapes(self) -> list[Shape]:
        """The shapes of all parameters, in order."""
        return self.list_shapes()

    @property
    def parameters(self) -> int:
        """How many numbers all tensors hold together."""
        return sum(map(math.prod, self.shapes))


def _mlp() -> list[Shape]:
    return [(128, 784), (128,), (64, 128), (64,), (10, 64), (10,)]


def _lenet() -> list[Shape]:
    convolutions = [(6, 1, 5, 5), (6,), (16, 6, 5, 5), (16,)]
    return [*convolutions, (120, 400), (120,), (84, 120), (84,), (10, 84), (10,)]


def _gpt2_matrices(layers: int) -> list[Shape]:
    """Return the matrices of this many of GPT-2's blocks."""
    width, hidden = 768, 3072
    return [(width, 3 * width), (width, width), (width, hidden), (hidden, width)] * layers


def _gpt2() -> list[Shape]:
    width, hidden = 768, 3072
    norm = [(width,), (width,)]
    attention = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    mlp = [(width, hidden), (hidden,), (hidden, width), (width,)]
    block = [*norm, *attention, *norm, *mlp]
    return [(50257, width), (1024, width), *block * 12, *norm]


def _convolution(outputs: int, inputs: int, size: int) -> list[Shape]:
    """Return the weight, and the weight and bias of the batch norm that follows."""
    weight = (outputs, inputs, size, size)
    norm = [(outputs,), (outputs,)]
    return [weight, *norm]


def _resnet18() -> list[Shape]:
    shapes = _convolution(64, 3, 7)
    inputs = 64
    for width in (64, 128, 256, 512):
        for _ in range(2):
            shapes += _convolution(width, inputs, 3)
            shapes += _convolution(width, width, 3)
            if inputs != width:
                shapes += _convolution(width, inputs, 1)
            inputs = width
    return [*shapes, (1000, inputs), (1000,)]


def _resnet50() -> list[Shape]:
    shapes = _convolution(64, 3, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += _convolution(width, inputs, 1)
            shapes += _convolution(width, width, 3)
            shapes += _convolution(4 * width, width, 1)
            if block == 0:
                shapes += _convolution(4 * width, inputs, 1)
            inputs = 4 * width
    return [*shapes, (1000, inputs), (1000,)]


def _llama_block(width: int, hidden: int, keys: int) -> list[Shape]:
    """Return the shapes of one block; `keys` is the width of all its keys together."""
    attention = [(width, width), (keys, width), (keys, width), (width, width)]
    mlp = [(hidden, width), (hidden, width), (width, hidden)]
    norms = [(width,), (width,)]
    return [*attention, *mlp, *norms]


def _llama_1b() -> list[Shape]:
    embedding = (32000, 2048)
    block = _llama_block(width=2048, hidden=5632, keys=256)
    return [embedding, *block * 22, (2048,), embedding]


def _llama3_1b() -> list[Shape]:
    # The embedding is also the matrix of the output.
    embedding = (128256, 2048)
    block = _llama_block(width=2048, hidden=8192, keys=512)
    return [embedding, *block * 16, (2048,)]


MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        Model("one", "1 tensor of 1000", lambda: [(1000,)]),
        Model("mlp", "an MLP of 6 tensors (0.1 M)", _mlp),
        Model("lenet", "LeNet, 10 tensors (0.06 M)", _lenet),
        Model("resnet18", "ResNet-18 (12 M)", _resnet18),
        Model("big", "2 tensors of 4096x4096", lambda: [(4096, 4096)] * 2),
        Model("gpt2", "GPT-2 (124 M)", _gpt2),
        Model("resnet50", "ResNet-50 (26 M)", _resnet50),
        Model("llama-1b", "TinyLlama (1.1 B)", _llama_1b),
        Model("llama3-1b", "Llama 3.2 (1.2 B)", _llama3_1b),
        Model("small", "1000 tensors of 64x64", lambda: [(64, 64)] * 1000),
        Model("tiny", "1000 tensors of 16", lambda: [(16,)] * 1000),
        Model(
            "groups",
            "1000 tensors of 64x64 in 400 param groups",
            lambda: [(64, 64)] * 1000,
            groups=400,
        ),
        Model(
            "groups100",
            "1000 tensors of 64x64 in 100 param groups",
            lambda: [(64, 64)] * 1000,
            groups=100,
        ),
        Model("matrices", "the matrices of 2 of GPT-2's layers", lambda: _gpt2_matrices(2)),
        Model("million", "10 tensors of 100,000", lambda: [(100_000,)] * 10),
        Model(
            "embedding-1m",
            "an embedding of 1,000,000 x 64, 1000 rows a step",
            lambda: [(10**6, 64)],
            rows=1000,
        ),
        Model(
            "embedding-10k",
            "an embedding of 10,000 x 64, 1000 rows a step",
            lambda: [(10**4, 64)],
            rows=1000,
        ),
    )
}
