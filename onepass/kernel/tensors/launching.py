"""What launches of all backends have in common: the sizes they are cut by, and their order."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from ..graph.ir import Node
from ..graph.passes import Program
from .temporaries import Temporaries

# Each type of a program's arithmetic, as NumPy says it.
NUMPY = {"f32": np.float32, "f64": np.float64}


class Work:
    """How a launch is cut: its tensors by their sizes. A backend adds its pieces, pass by pass.

    `sizes` (tensors, 3; int64) holds each tensor's matrices, rows and columns, and `numel`
    (tensors) its elements. Two tensors, a vector of 10 elements and a stack of 2 matrices of 3 x 4:

        sizes = [[1, 1, 10], [2, 3, 4]]
        numel = [10, 24]
    """

    def __init__(self, sizes: np.ndarray) -> None:
        """Take `sizes` (tensors, 3), or (tensors,) when only the numbers of elements matter.

        The launch leaves a tensor of size 0 as it is.
        """
        sizes = np.asarray(sizes, np.int64)
        if sizes.ndim == 1:
            ones = np.ones_like(sizes)
            sizes = np.stack([ones, ones, sizes], axis=1)
        self.sizes = sizes
        self.numel = sizes.prod(axis=1)


class LaunchInTwo:
    """A launch in two parts, so that an error changes nothing: `begin` may fail, `finish` stores.

    The order of a launch, whatever runs it:

    1. `begin` takes memory for temporaries, brings to the device what kernels read, and runs the
       passes before `first_to_store` with the functions of matrices between them. No column has
       been written when it returns. If it raises, it has cancelled itself.
    2. `finish` runs the passes from `first_to_store` on, which store, and gives the memory back. Or
       `cancel` gives it back, and the parameters stay as they were.

    Other launches may run between the two parts. `leaves` (leaf, setting; float64) holds the hyper
    values of each setting and may be written before each `begin`; `setting_index` (tensors; int64)
    says which setting each tensor has. Three tensors with two settings:

        leaves        = [[0.1, 0.2]]    a program that only has lr
        setting_index = [0, 1, 0]       the first and the last step with lr 0.1
    """

    def __init__(
        self,
        program: Program,
        work: Work,
        parts: Mapping[str, np.ndarray],
        device: torch.device,
        leaves: np.ndarray,
        setting_index: np.ndarray,
    ) -> None:
        """`parts` says how many pieces of work have a share of a temporary, for each tensor."""
        self.work = work
        self.leaves = leaves
        self.setting_index = np.ascontiguousarray(setting_index, np.int64)
        self._temporaries = Temporaries(program, work.sizes, parts, device)
        self._first_to_store = program.first_to_store

    def run(self, workers: int) -> None:
        """Run the program once, in place, with this many workers at most."""
        self.begin(workers)
        self.finish(workers)

    def begin(self, workers: int) -> None:
        """Do what may fail; to be finished, or cancelled."""
        raise NotImplementedError

    def finish(self, workers: int) -> None:
        """Do the rest, which stores."""
        raise NotImplementedError

    def cancel(self) -> None:
        """Give back the memory of what has begun and will not be finished."""
        self._temporaries.release()


def input_index(program: Program) -> list[dict[Node, int]]:
    """Return for each pass where each of its inputs stands among them."""
    return [{node: i for i, node in enumerate(pass_.inputs)} for pass_ in program.passes]
