"""`Optimizer`: param groups, state, step, hooks and checkpoints. All of torch's contract is here.

The mathematics is in `algorithms/`; how a step is made is in `stepping/`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer as TorchOptimizer

from .contract.hooks import note_hooked, with_hooks
from .contract.mistakes import arguments_of, refused_rate, watch_options
from .contract.options import MODES, check_modes, check_switches, switches_of
from .contract.param_groups import (
    UNORDERED,
    Taken,
    check_params,
    check_required,
    check_spelling,
    is_iterable,
    read_params,
)
from .contract.ranges import check_ranges
from .contract.saving import check_names, load, pickled, restore, save, shallow_copy
from .contract.state_dict import Match
from .contract.steps import (
    OVERRIDES,
    REPEATS,
    has_own_group_reader,
    has_torchs_step,
    is_asked_by_grad_scaler,
    step_as_torch,
    steps_by_rule,
    takes_scaled_gradients,
)
from .contract.values import flag
from .kernel import Rule
from .stepping.gradient_factor import GradientFactor
from .stepping.private import Lazy, Private
from .stepping.reading import drop_gradients, fill_gradients_with_zeros
from .stepping.ready import make_ready
from .stepping.recipe import expected_state, fill_states

Params = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


class Optimizer(TorchOptimizer):
    """The base of every optimizer here, and of yours: write `__init__` and a static `rule`.

    The rule's positional arguments name the columns (p, g and the states, under torch's state-dict
    names), its keyword-only arguments the param-group options; it returns the new value of each
    column that changes. Two keywords are supplied for each parameter: `step`, the number of this
    step from 1, and `first`, a condition that holds in the step that created the state. A state is
    shaped as its parameter, unless its annotation says otherwise: `Scalar` is one number a
    parameter, `PerRow` and `PerColumn` are one for each row or column of its last two dimensions.

    A class that sets `gradients = "any"` takes sparse gradients, too: its rule steps the rows,
    slices of p and of the states, for which they have values, and leaves all others as they are;
    `step` and `first` remain the parameter's. With "sparse" it refuses dense ones.

    What `ranges` says of an option is checked in the constructor and in each group that is added.
    ValueError is raised for an option outside its range, TypeError for one that is not a number, or
    not several numbers in an order.

    All algorithms of torch.optim are such classes (LBFGS has no rule), with the arguments of their
    namesakes in the same order. These arguments mean the same in every class that has them:

    - `lr` is a float, or a tensor of one element, and so is every other number.
    - `maximize=True` steps up the gradient.
    - `foreach` and `fused` change nothing, with two exceptions: if both are False, the step is made
      of torch's own operations; `fused=True` lets GradScaler leave the unscaling to the step.
    - `differentiable=True` lets autograd follow the step.
    - `capturable=True` keeps step counts on the parameter's device, for steps in a CUDA graph. Some
      classes have it here and not in torch. While it is off, their param groups have torch's keys.
    """

    rule: Rule
    _onepass = Lazy()
    _onepass_switches: tuple[str, ...] = ()
    # The class of torch that this one replaces; torch's base class for a class that torch lacks.
    _onepass_torch_class: Any = TorchOptimizer
    # Whether torch's class has torch's modes (foreach, fused, ...), some of which exclude others.
    _onepass_has_modes = False
    # The last class, in the order of bases, whose constructor is not called. After it come torch's
    # base class and what others have put before that.
    _onepass_last: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Note what a subclass has of torch's, and watch its options, see `watch_options`."""
        super().__init_subclass__(**kwargs)
        _note_class(cls)

    # The gradients that a class takes: "dense" ones, "sparse" ones, or "any".
    gradients = "dense"

    # What each option may be: an interval, as in `{"lr": "[0, inf]"}`, or a tuple of intervals for
    # several numbers.
    ranges: Mapping[str, Any] = {}

    def __init__(self, params: Params, defaults: dict[str, Any]) -> None:
        """Begin with param groups; `defaults` are the options that a group does not set itself.

        Raises TypeError for parameters that are not tensors, ValueError for an empty list, tensors
        that are not leaves, or that occur in two groups.
        """
        vars(self)["_onepass"] = Private()
        self.defaults = defaults
        _check(self, defaults)
        _check_params_argument(_name(self), params)
        self._onepass.taken = Taken(())
        try:
            super(self._onepass_last, self).__init__(params, defaults)
        finally:
            self._onepass.taken = None

    def _patch_step_function(self) -> None:
        super()._patch_step_function()
        note_hooked(type(self))

    def rule_of(self, p: Tensor, group: Mapping[str, Any]) -> Rule:
        """Return the rule by which a parameter steps, if the class has several.

        The choice may depend on p's shape and on flags.
        """
        return type(self).rule

    def flags(self, group: Mapping[str, Any]) -> dict[str, bool]:
        """Return the rule's flags in a group: the options whose defaults are True or False.

        Such an option may be given as 0 or 1, too. If a flag follows from a number, override this
        method and add the flag to what it returns.
        """
        return {name: flag(group[name], name) for name in self._onepass_switches if name in group}

    def initial_state(self, name: str, like: Tensor, group: Mapping[str, Any]) -> Tensor:
        """Return a state before a parameter's first step: zeros, shaped and placed as `like`."""
        return torch.zeros_like(like, memory_format=torch.preserve_format)

    def steps_rows(self, group: Mapping[str, Any]) -> bool:
        """Whether a sparse gradient steps only the rows for which it has values.

        If False, sparse gradients are converted to dense ones. Called only for sparse gradients, of
        classes whose `gradients` are "any" or "sparse". It may depend on every option of the group,
        and may raise `StepError`.
        """
        return True

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise ValueError or TypeError for an option that is not what `ranges` says.

        It is called with the defaults, and with the options of each group, which has `params` too.
        Override it for what an interval cannot say, such as a limit that depends on another option,
        and call `super().check_options(options)`.
        """
        owner = _name(self)
        check_ranges(owner, type(self).ranges, options)
        if self._onepass_has_modes:
            check_modes(owner, options)

    @with_hooks
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; return what `closure` returned, if given.

        Raises `StepError` (a RuntimeError) if a step cannot be taken: sparse gradients that the
        class does not take, state that does not fit, memory that is gone. The optimizer is
        unchanged when this is raised.
        """
        return _take_step(self, closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, or with `set_to_none=False` fill them with zeros."""
        zero = _zero_grad_outside_graphs if torch.compiler.is_compiling() else _zero_grad
        zero(self, set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Optimize further parameters, with options of their own: `{"params": [...], "lr": ...}`.

        Raises as the constructor does, and then the optimizer is as it was.
        """
        _add_param_group(self, param_group)

    def make_state(self, group: dict[str, Any]) -> None:
        """Create the state of a group's parameters now, and not in their first step."""
        fill_states(self, group)

    def state_dict(self) -> dict[str, Any]:
        """Return the state and the param groups, with positions instead of parameters.

        torch.optim can load it. Tensors are the optimizer's own, not copies, as in torch.
        """
        return save(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state dict of this class, or of torch's of the same name.

        Parameters are matched by name if both sides have the same names, else by position, with a
        warning if names differ; see `check_names`. State keeps its own dtype (fp32 moments of a
        bf16 parameter stay fp32) and moves to the parameter's device. State that does not belong to
        the rule is kept. Options, the learning rate included, are the saved ones.

        Raises ValueError, with the parameter's name and both shapes, if the dict does not fit.
        Nothing is changed then.
        """
        load(self, state_dict, Optimizer)

    def check_names(self, state_dict: Mapping[str, Any]) -> None:
        """Raise ValueError if a state dict's parameters have other names, or are in other groups.

        `load_state_dict` warns of it, and matches by position. What wrappers put into names, such
        as `module.` and `_orig_mod.`, does not count.
        """
        check_names(self, state_dict)

    def _onepass_load(self, matched: Match) -> tuple[dict[Any, Any], list[dict[str, Any]]]:
        """Return the state and groups of a state dict, after everything has been verified.

        A class overrides it if its state does not lie beside each parameter.
        """
        by_rule = steps_by_rule(type(self))
        return matched.load(partial(expected_state, self), self.defaults, checks_options=by_rule)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler leaves the unscaling, and the skipping, to the step.

        It does if a group is fused, as in torch, or capturable. Only GradScaler is told so, see
        `is_asked_by_grad_scaler`.
        """
        if self._onepass.supports_scaling is not None:
            return self._onepass.supports_scaling
        return is_asked_by_grad_scaler() and takes_scaled_gradients(self)

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, supports: bool) -> None:
        self._onepass.supports_scaling = supports

    def __getstate__(self) -> dict[str, Any]:
        return pickled(self)

    def __copy__(self) -> Any:
        return shallow_copy(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        restore(self, state)


Optimizer._onepass_last = Optimizer


def _note_class(cls: type[Optimizer]) -> None:
    """Note what a class has of torch's, and watch its options."""
    watch_options(cls)
    cls._onepass_switches = switches_of(cls)
    bases = [base for base in cls.__mro__ if issubclass(base, TorchOptimizer)]
    of_torch = [base for base in bases if base.__module__.partition(".")[0] == "torch"]
    cls._onepass_torch_class = of_torch[0]
    cls._onepass_has_modes = "foreach" in arguments_of(of_torch[0])
    skipped = [Optimizer, *(base for base in of_torch if base is not TorchOptimizer)]
    cls._onepass_last = skipped[-1]


def _check_params_argument(owner: str, params: object) -> None:
    """Raise TypeError for what no optimizer can take its parameters from."""
    if isinstance(params, Tensor) or not is_iterable(params):
        raise TypeError(
            f"{owner}: params argument given to the optimizer should be an iterable of Tensors or "
            f"dicts, but got {torch.typename(params)}; pass model.parameters()"
        )
    if isinstance(params, set):
        raise TypeError(UNORDERED.format(owner))


def _take_step(optimizer: Optimizer, closure: Callable[[], Any] | None) -> Any:
    """Take a step, as `Optimizer.step` says."""
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    # GradScaler sets these two on optimizers whose `_step_supports_amp_scaling` is True.
    scale = getattr(optimizer, "grad_scale", None)
    gradient_factor = GradientFactor(scale, getattr(optimizer, "found_inf", None))
    if not gradient_factor.waits and gradient_factor.read():
        return loss
    private = optimizer._onepass
    # Before its turn begins, other threads may step: a closure may wait for one that does.
    with private.turn as turn:
        turn.refuse_another(_name(optimizer))
        has_factor = scale is not None or gradient_factor.found_inf is not None
        if not has_factor and private.repeats.take(optimizer, private.plan):
            return loss
        with torch.set_grad_enabled(bool(optimizer.defaults.get("differentiable"))):
            _take_careful_step(optimizer, gradient_factor, has_closure=closure is not None)
    if private.plan is not None and private.plan.refused_rate is not None:
        index, rate = private.plan.refused_rate
        private.warn_once(refused_rate(_name(optimizer), index, rate), f"lr of {index}")
    return loss


def _take_careful_step(
    optimizer: Optimizer, gradient_factor: GradientFactor, *, has_closure: bool
) -> None:
    """Take a step that may differ from the last one in everything, and learn from it."""
    private = optimizer._onepass
    if has_own_group_reader(optimizer):
        step_as_torch(optimizer, OVERRIDES.format("_init_group"))
        return
    ready = make_ready(optimizer, gradient_factor.scale is not None)
    if ready is None:
        step_as_torch(optimizer, REPEATS)
        return
    plan, reading, gathered = ready
    if private.idle.waits:
        private.idle.look(optimizer, reading.params, reading.grads, has_closure, private.warn_once)
    # A first step has settings of its own, which no other step repeats.
    is_first = bool(plan.fresh)
    plan.run(reading, gathered, gradient_factor)
    if not is_first and not private.idle.waits:
        private.repeats.learn(optimizer, plan, reading)


def _add_param_group(optimizer: Optimizer, param_group: dict[str, Any]) -> None:
    """Check a group and add it, as `Optimizer.add_param_group` says."""
    owner = _name(optimizer)
    if not isinstance(param_group, dict):
        raise TypeError(
            f"{owner}: param_group must be a dict, but got {type(param_group).__name__}"
        )
    if "params" not in param_group:
        raise KeyError(f"{owner}: a param group needs 'params', got only {sorted(param_group)}")
    defaults = optimizer.defaults
    params, names = read_params(owner, param_group["params"])
    check_params(owner, params, bool(defaults.get("differentiable")), names)
    check_spelling(owner, param_group, defaults)
    check_required(owner, param_group, defaults)
    _check(optimizer, {**defaults, **param_group, "params": params})
    with optimizer._onepass.turn:
        taken = optimizer._onepass.taken or Taken(optimizer.param_groups)
        taken.add(owner, params, names, may_repeat=has_torchs_step(optimizer))
        param_group["params"] = params
        if names:
            param_group["param_names"] = names
        for key, default in defaults.items():
            param_group.setdefault(key, default)
        optimizer.param_groups.append(param_group)


def _zero_grad(optimizer: Optimizer, set_to_none: bool) -> None:
    """Drop all gradients or fill them with zeros, and say so to torch's profiler."""
    optimizer._onepass.idle.expects_gradients = True
    name = f"Optimizer.zero_grad#{_name(optimizer)}.zero_grad"
    with torch.autograd.profiler.record_function(name):
        params = list(chain.from_iterable(group["params"] for group in optimizer.param_groups))
        if set_to_none:
            drop_gradients(params)
        else:
            fill_gradients_with_zeros(params)


def _check(optimizer: Optimizer, options: Mapping[str, Any]) -> None:
    """Raise for an option that the class refuses, and for a flag that is neither True nor False."""
    if hasattr(type(optimizer), "rule"):
        check_switches(_name(optimizer), options, {*MODES, *optimizer._onepass_switches})
    type(optimizer).check_options(optimizer, options)


def _name(optimizer: TorchOptimizer) -> str:
    """Return what messages call an optimizer."""
    return type(optimizer).__name__


# This imports torch's compiler when it is first called: only in a compiled function, which has
# imported it already.
_zero_grad_outside_graphs = torch._disable_dynamo(_zero_grad)
