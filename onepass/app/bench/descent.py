"""Steps with a closure, on a loss that costs almost nothing: only the optimizer is timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .gpu import Gpu
from .shapes import Model

__all__ = ["LBFGS_OPTIONS", "TimedDescent"]

# Each step has its 20 iterations: nothing ends it before, and it does not reach the minimum, which
# a few hundred more would not either.
LBFGS_OPTIONS: dict[str, Any] = {
    "history_size": 10,
    "max_iter": 20,
    "tolerance_grad": 0.0,
    "tolerance_change": 0.0,
}
# The largest curvature of the loss; the smallest is 1.
CURVATURE = 1e3


class TimedDescent:
    r"""An optimizer that minimizes $\frac12 \sum_i a_i (\theta_i - c_i)^2$ over a model's tensors.

    Parameters and gradients are views of two vectors, so that loss and gradient are four
    operations, however many tensors there are; their time is left out. All descents begin at one
    point and compute alike, so that the n-th steps of two of them are the same work.

    Attributes: `params`, `optimizer`, and `minimum`, the point c; `evaluations` says how often the
    last step called its closure, and `seconds` how long that took.
    """

    def __init__(
        self,
        model: Model,
        make: Callable[[list[Any]], torch.optim.Optimizer],
        gpu: Gpu | None = None,
    ) -> None:
        device = torch.device("cpu") if gpu is None else gpu.device
        generator = torch.Generator(device).manual_seed(0)
        count = model.parameters
        self.minimum = torch.randn(count, generator=generator, device=device)
        self.curvature = torch.logspace(0, math.log10(CURVATURE), count, device=device)
        self._point = torch.zeros(count, device=device)
        self._gradient = torch.zeros(count, device=device)
        self._distance = torch.zeros(count, device=device)
        self.params = self._view(model)
        self.optimizer: Any = make(self.params)
        self.evaluations = 0
        self.seconds = 0.0
        # On a GPU a time means something only if the device has nothing to do.
        self._wait = (lambda: None) if gpu is None else gpu.synchronize

    def _view(self, model: Model) -> list[nn.Parameter]:
        """Return parameters in the shapes of the model: views of the point, with gradients."""
        sizes = [math.prod(shape) for shape in model.shapes]
        points = self._point.split(sizes)
        gradients = self._gradient.split(sizes)
        params = []
        for point, gradient, shape in zip(points, gradients, model.shapes, strict=True):
            p = nn.Parameter(point.view(shape))
            p.grad = gradient.view(shape)
            params.append(p)
        return params

    def time_step(self) -> float:
        """Return the seconds of a step that finds a full history, without those of its closure."""
        self.optimizer.state.clear()
        with torch.no_grad():
            self._point.zero_()
        # The first step fills the history.
        self.optimizer.step(self._evaluate)
        self.evaluations = 0
        self.seconds = 0.0
        self._wait()
        start = time.perf_counter()
        self.optimizer.step(self._evaluate)
        self._wait()
        return time.perf_counter() - start - self.seconds

    @torch.no_grad()
    def _evaluate(self) -> Tensor:
        """Return the loss at the current point, and leave its gradient in the parameters'."""
        self._wait()
        start = time.perf_counter()
        torch.sub(self._point, self.minimum, out=self._distance)
        torch.mul(self._distance, self.curvature, out=self._gradient)
        loss = 0.5 * self._gradient.dot(self._distance)
        self._wait()
        self.evaluations += 1
        self.seconds += time.perf_counter() - start
        return loss
