"""Averages of a model's weights over steps, under torch's names: SWA, EMA, and batch norm's
statistics for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
import torch.optim.swa_utils as theirs
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm

from .. import kernel
from ..contract.ranges import check_ranges
from ..lr_scheduler.factors import SWALR
from .averages import Average, Checked, Equal, Exponential, Number, check_pairs

__all__ = [
    "SWALR",
    "AveragedModel",
    "get_ema_avg_fn",
    "get_ema_multi_avg_fn",
    "get_swa_avg_fn",
    "get_swa_multi_avg_fn",
    "update_bn",
]

AvgFn = Callable[[Tensor, Tensor, Number], Tensor]
MultiAvgFn = Callable[[Sequence[Tensor], Sequence[Tensor], Number], None]


class AveragedModel(theirs.AveragedModel):
    r"""A copy of a model whose weights are the average of those that the model has had.

    $$ \bar\theta_{n+1} = \bar\theta_n + \frac{1}{n+1} (\theta - \bar\theta_n)
       \qquad\text{or}\qquad
       \bar\theta_{n+1} = \bar\theta_n + (1 - \text{decay}) (\theta - \bar\theta_n) $$

    The first, in which all weigh the same (SWA), is what `update_parameters` does unless it is
    given another function; the second (EMA) is `multi_avg_fn=get_ema_multi_avg_fn(decay)`. The
    first update copies the weights. Both take one launch for all tensors of a dtype; a function of
    yours is called as torch calls it.

    Arguments are those of `torch.optim.swa_utils.AveragedModel`, of which this is a subclass, and
    state dicts go from one to the other. `device` is where the averages lie. `avg_fn(average,
    value, n)` returns a tensor, `multi_avg_fn(averages, values, n)` writes into its first list; `n`
    counts the updates so far. With `use_buffers` buffers are averaged, too; else each update copies
    them.

    Averages may have another dtype than the model: `AveragedModel(model).float()` keeps those of
    bfloat16 weights in float32, where small updates are not lost.

    Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", 2018,
    arXiv:1803.05407; Polyak and Juditsky, "Acceleration of stochastic approximation by averaging",
    1992.
    """

    def __init__(
        self,
        model: Module,
        device: int | torch.device | None = None,
        avg_fn: AvgFn | None = None,
        multi_avg_fn: MultiAvgFn | None = None,
        use_buffers: bool = False,
    ) -> None:
        """Copy the model. Raises AssertionError where both functions are given."""
        super().__init__(model, device, avg_fn, multi_avg_fn, use_buffers)  # type: ignore[arg-type]
        self._equal, self._checked = Equal(), Checked()

    def update_parameters(self, model: Module) -> None:
        """Let the averages follow the model's weights, as they are now.

        Raises ValueError where the model has another number of parameters or buffers than the
        averages, RuntimeError where shapes differ; nothing has changed then. torch pairs such
        tensors up as far as it goes.
        """
        averages, copies = _tensors(self.module)
        values, sources = _tensors(model)
        _check_numbers("parameters", averages, values)
        _check_numbers("buffers", copies, sources)
        if self.use_buffers:
            averages, values, copies, sources = averages + copies, values + sources, [], []
        self._checked(
            copies, sources, self._label, range(len(averages), len(averages) + len(copies))
        )
        average, number = self._average(), int(self.n_averaged)
        if number == 0 or average is None:
            check_pairs(averages, values, self._label)
        if average is None or torch.compiler.is_compiling():
            super().update_parameters(model)
            return
        if number == 0:
            _copy(averages, values)
        else:
            average.update(averages, values, number, self._label)
        _copy(copies, sources)
        self.n_averaged += 1

    def _average(self) -> Average | None:
        """How to average; None where that is a function of the user's."""
        function = self.multi_avg_fn or self.avg_fn or self._equal
        owner = getattr(function, "__self__", function)
        return owner if isinstance(owner, Average) else None

    def _label(self, i: int) -> str:
        names = [f"parameter {name!r}" for name, _ in self.module.named_parameters()]
        names += [f"buffer {name!r}" for name, _ in self.module.named_buffers()]
        return f"AveragedModel: {names[i]}"


def get_ema_multi_avg_fn(decay: float = 0.999) -> Exponential:
    """A function that moves lists of averages to `decay * average + (1 - decay) * value`, in one
    launch.

    Its attribute `decay` may be changed between calls. Raises ValueError unless decay lies in [0,
    1].
    """
    check_ranges("get_ema_multi_avg_fn", {"decay": "[0, 1]"}, {"decay": decay})
    return Exponential(decay)


def get_swa_multi_avg_fn() -> Equal:
    """A function that moves lists of averages to `average + (value - average) / (n + 1)`, in one
    launch."""
    return Equal()


def get_ema_avg_fn(decay: float = 0.999) -> AvgFn:
    """As `get_ema_multi_avg_fn`, for one tensor: it returns the average's new value."""
    check_ranges("get_ema_avg_fn", {"decay": "[0, 1]"}, {"decay": decay})
    return Exponential(decay).average_one


def get_swa_avg_fn() -> AvgFn:
    """As `get_swa_multi_avg_fn`, for one tensor: it returns the average's new value."""
    return Equal().average_one


@torch.no_grad()
def update_bn(
    loader: Iterable[Any], model: Module, device: int | torch.device | None = None
) -> None:
    """Measure the statistics of all batch norms again, over the batches of `loader`.

    A batch is a tensor, or a list or tuple that begins with one; it is moved to `device` if that is
    given. Momenta and modes (train, eval) are afterwards, also after an error, what they were;
    torch leaves all modules in the mode of the outermost one.
    """
    momenta = {m: m.momentum for m in model.modules() if isinstance(m, _BatchNorm)}
    if not momenta:
        return
    modes = {m: m.training for m in model.modules()}
    try:
        model.train()
        for m in momenta:
            m.reset_running_stats()
            m.momentum = None
        for batch in loader:
            inputs = batch[0] if isinstance(batch, (list, tuple)) else batch
            model(inputs if device is None else inputs.to(device))
    finally:
        model.train(modes[model])
        for m, mode in modes.items():
            m.training = mode
        for m, momentum in momenta.items():
            m.momentum = momentum


def _check_numbers(what: str, averages: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    if len(averages) != len(values):
        raise ValueError(
            f"AveragedModel: the model has {len(values)} {what}, its average {len(averages)}; "
            "make a new AveragedModel of a model whose structure has changed"
        )


@torch.no_grad()
def _copy(into: list[Tensor], sources: list[Tensor]) -> None:
    if not all(kernel.is_plain(t) for t in chain(into, sources)):
        for t, source in zip(into, sources, strict=True):
            t.copy_(source)
    elif into:
        torch._foreach_copy_(into, sources)


# Where a class has these from torch, they yield what its modules hold in `_parameters` and
# `_buffers`.
WALKS = (
    "parameters",
    "named_parameters",
    "buffers",
    "named_buffers",
    "_named_members",
    "modules",
    "named_modules",
)


def _tensors(module: Module) -> tuple[list[Tensor], list[Tensor]]:
    """Return what `module.parameters()` and `module.buffers()` yield.

    If these methods are torch's own, this is several times as fast.
    """
    modules: dict[Module, None] = {}
    _collect(module, modules)
    is_torchs = all(
        getattr(type(module), walk) is getattr(Module, walk) and walk not in vars(module)
        for walk in WALKS
    )
    classes = set(map(type, modules))
    if not is_torchs or any(cls.named_modules is not Module.named_modules for cls in classes):
        return list(module.parameters()), list(module.buffers())
    parameters = [p for m in modules for p in m._parameters.values() if p is not None]
    buffers = [b for m in modules if m._buffers for b in m._buffers.values() if b is not None]
    return _once(parameters), _once(buffers)


def _once(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor at its first place alone."""
    return list(
        tensors
        if len(set(map(id, tensors))) == len(tensors)
        else {id(t): t for t in tensors}.values()
    )


def _collect(module: Module, found: dict[Module, None]) -> None:
    """All modules of a module, each once, in torch's order."""
    found[module] = None
    for child in module._modules.values():
        if child is not None and child not in found:
            if child._modules:
                _collect(child, found)
            else:
                found[child] = None
