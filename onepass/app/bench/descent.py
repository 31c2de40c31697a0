"""Steps with a closure, on a loss that costs next to nothing: what is timed is the optimizer
alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .gpu import Gpu
from .shapes import Model

__all__ = ["OPTIONS", "Descent"]

# Each step has its 20 iterations: nothing ends it before, and a few hundred more would not reach
# the minimum.
OPTIONS: dict[str, Any] = {
    "history_size": 10,
    "max_iter": 20,
    "tolerance_grad": 0.0,
    "tolerance_change": 0.0,
}
# The largest curvature of the loss; the smallest is 1.
CURVATURE = 1e3


class Descent:
    r"""An optimizer that minimizes $\frac12 \sum_i a_i (\theta_i - c_i)^2$ over a model's
    parameters.

    Parameters and gradients are views of two vectors, so that loss and gradient are four
    operations, however many tensors there are; the time that they take is left out. All begin at
    one place and compute alike, so that the n-th step of one is the same work as that of another;
    `evaluations` says how often the last step called its closure.
    """

    def __init__(
        self,
        model: Model,
        make: Callable[[list[Any]], torch.optim.Optimizer],
        gpu: Gpu | None = None,
    ) -> None:
        sizes = [math.prod(shape) for shape in model.shapes]
        device = torch.device("cpu") if gpu is None else gpu.device
        generator = torch.Generator(device).manual_seed(0)
        self.minimum = torch.randn(sum(sizes), generator=generator, device=device)
        self.curvature = torch.logspace(0, math.log10(CURVATURE), sum(sizes), device=device)
        self.place, self.gradient, self.distance = (
            torch.zeros(sum(sizes), device=device) for _ in range(3)
        )
        parts = zip(self.place.split(sizes), self.gradient.split(sizes), model.shapes, strict=True)
        self.params = []
        for values, gradient, shape in parts:
            p = nn.Parameter(values.view(shape))
            p.grad = gradient.view(shape)
            self.params.append(p)
        self.optimizer: Any = make(self.params)
        # On a GPU a time means something only where the device has nothing to do.
        self._wait = (lambda: None) if gpu is None else gpu.synchronize
        self.evaluations, self.seconds = 0, 0.0

    def time_step(self) -> float:
        """Seconds of a step that finds a full history, without those in which loss and gradient are
        computed."""
        self.optimizer.state.clear()
        with torch.no_grad():
            self.place.zero_()
        self.optimizer.step(self._evaluate)
        self.evaluations, self.seconds = 0, 0.0
        self._wait()
        start = time.perf_counter()
        self.optimizer.step(self._evaluate)
        self._wait()
        return time.perf_counter() - start - self.seconds

    @torch.no_grad()
    def _evaluate(self) -> Tensor:
        self._wait()
        start = time.perf_counter()
        torch.sub(self.place, self.minimum, out=self.distance)
        torch.mul(self.distance, self.curvature, out=self.gradient)
        loss = 0.5 * self.gradient.dot(self.distance)
        self._wait()
        self.evaluations += 1
        self.seconds += time.perf_counter() - start
        return loss
