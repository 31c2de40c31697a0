"""Packages that take an optimizer's insides for granted work with ours as with torch.optim's."""

from __future__ import annotations

import copy
import pickle
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from support.small_training import from_disk, loss_of, make_data, make_model, train, weights
from torch.optim.optimizer import register_optimizer_step_post_hook

import onepass

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.usefixtures("no_warning_of_ours", "one_thread"),
    pytest.mark.filterwarnings("ignore"),  # the packages' own
]
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
BITS = {"rtol": 0, "atol": 0}
# Options with which every branch of a step is taken.
OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "Adam": {"lr": 0.01, "amsgrad": True, "weight_decay": 0.01},
    "AdamW": {"lr": 0.01},
    "Adadelta": {"lr": 0.5},
    "Adagrad": {"lr": 0.1, "lr_decay": 0.1},
    "Adamax": {"lr": 0.01},
    "ASGD": {"lr": 0.1, "t0": 2.0},
    "NAdam": {"lr": 0.01},
    "RAdam": {"lr": 0.01},
    "RMSprop": {"lr": 0.01, "alpha": 0.9, "momentum": 0.9, "weight_decay": 0.01},
    "Rprop": {"lr": 0.01},
}
FEW = pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop"])
# Schedulers of each kind: in closed form, step by step, and with a momentum beside the lr.
SCHEDULERS: dict[str, dict[str, Any]] = {
    "StepLR": {"step_size": 3, "gamma": 0.5},
    "MultiStepLR": {"milestones": [2, 4]},
    "ExponentialLR": {"gamma": 0.9},
    "LinearLR": {"total_iters": 6},
    "ConstantLR": {"total_iters": 4},
    "PolynomialLR": {"total_iters": 12, "power": 2.0},
    "CosineAnnealingLR": {"T_max": 12},
    "CosineAnnealingWarmRestarts": {"T_0": 3, "T_mult": 2},
    "LambdaLR": {"lr_lambda": lambda step: 1 / (1 + step)},
    "MultiplicativeLR": {"lr_lambda": lambda step: 0.9},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 20},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3},
}
EVERY_SCHEDULER = pytest.mark.parametrize("policy", SCHEDULERS)
Same = Callable[..., Any]


@pytest.fixture
def same() -> Iterator[Same]:
    """Says that what `run(library)` returns is as with torch.optim, and that ours alone have
    stepped; returns ours."""
    stepped: set[str] = set()
    hook = register_optimizer_step_post_hook(
        lambda opt, *_: stepped.add(type(opt).__module__.split(".")[0])
    )

    def compare(run: Callable[[Any], Any]) -> Any:
        theirs = run(torch.optim)
        assert "torch" in stepped
        stepped.clear()
        ours = run(onepass)
        assert "onepass" in stepped
        assert "torch" not in stepped
        torch.testing.assert_close(ours, theirs, **CLOSE)
        return ours

    yield compare
    hook.remove()


def make(library: Any, name: str, params: Any, **options: Any) -> torch.optim.Optimizer:
    return getattr(library, name)(params, **(OPTIONS[name] | options))


def two_groups(model: Any) -> list[dict[str, Any]]:
    return [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.02}]


def lrs(opt: Any) -> list[float]:
    return [float(group["lr"]) for group in opt.param_groups]


# schedulefree: moves the weights behind the step's back, and keeps its own tensors in the
# optimizer's state


@pytest.mark.parametrize("wrapper", ["ScheduleFreeWrapper", "ScheduleFreeWrapperReference"])
@pytest.mark.parametrize("name", OPTIONS)
def test_schedulefree(name, wrapper, same):
    """Its state is there before a first step. Most of torch's classes then miss theirs, so there it
    lies elsewhere."""
    import schedulefree

    def run(library, resume=False):
        def wrapped():
            model = make_model()
            return model, cls(
                make(library, name, model.parameters()), momentum=0.9, weight_decay_at_y=0.1
            )

        cls = getattr(schedulefree, wrapper)
        if library is torch.optim and name not in ("SGD", "Adagrad"):
            cls = type(wrapper, (cls,), {"state": defaultdict(dict)})
        model, opt = wrapped()
        opt.train()
        losses = train(model, opt, 4)
        opt.eval()
        if resume:
            saved = from_disk([model.state_dict(), opt.state_dict()])
            model, opt = wrapped()
            model.load_state_dict(saved[0])
            opt.load_state_dict(saved[1])
        opt.train()
        losses += train(model, opt, 4)
        opt.eval()
        return losses, weights(model), [[g["k"], g["weight_sum"]] for g in opt.param_groups]

    whole = same(run)
    torch.testing.assert_close(run(onepass, resume=True), whole, **BITS)


# timm


@pytest.fixture(scope="module")
def timm() -> Iterator[SimpleNamespace]:
    """timm's optimizers and schedulers as they are, without its models, which import torchvision.

    That does not load with torch's build for the CPU. Of the models two functions are needed, taken
    from their files.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in ("timm", "timm.layers", "timm.models"):
            package = ModuleType(name)
            package.__path__ = find_spec(name).submodule_search_locations
            patch.setitem(sys.modules, name, package)
        sys.modules["timm.layers"].use_reentrant_ckpt = import_module(
            "timm.layers.config"
        ).use_reentrant_ckpt
        sys.modules["timm.models"].group_parameters = import_module(
            "timm.models._manipulate"
        ).group_parameters
        yield SimpleNamespace(
            optim=import_module("timm.optim"), scheduler=import_module("timm.scheduler")
        )


@pytest.mark.parametrize("name", OPTIONS)
def test_timm_lookahead(name, timm, same):
    """It is an optimizer without a constructor's call, and shares groups, defaults and state with
    its base."""

    def run(library, resume=False):
        def wrapped():
            model = make_model()
            return model, timm.optim.Lookahead(make(library, name, two_groups(model)), k=3)

        model, opt = wrapped()
        schedule = library.lr_scheduler.StepLR(opt, 2, 0.5)
        losses = train(model, opt, 5, schedule.step)
        if resume:
            saved = from_disk([each.state_dict() for each in (model, opt, schedule)])
            model, opt = wrapped()
            schedule = library.lr_scheduler.StepLR(opt, 2, 0.5)
            for each, state in zip((model, opt, schedule), saved, strict=True):
                each.load_state_dict(state)
        losses += train(model, opt, 5, schedule.step)
        opt.sync_lookahead()
        return losses, weights(model), opt.state_dict()

    whole = same(run)
    assert "lookahead_slow_buff" in whole[2]["state"][0]
    torch.testing.assert_close(run(onepass, resume=True), whole, **BITS)


def test_timm_lookahead_begins_from_its_bases_checkpoint(timm, same):
    def run(library):
        model = make_model()
        base = make(library, "AdamW", model.parameters())
        losses = train(model, base, 3)
        opt = timm.optim.Lookahead(make(library, "AdamW", model.parameters()), k=2)
        opt.load_state_dict(from_disk(base.state_dict()))
        return losses + train(model, opt, 4), weights(model), opt.state_dict()

    same(run)


@pytest.mark.parametrize("prefix", ["", "lookahead_"])
@pytest.mark.parametrize(
    "options", [{"weight_decay": 0.1}, {"weight_decay": 0.1, "layer_decay": 0.5}], ids=["wd", "ld"]
)
@FEW
def test_timm_factory(name, options, prefix, timm, same):
    """It makes groups, those of layers with an "lr_scale" which its schedulers read, and calls a
    class by its name."""
    factory = import_module("timm.optim._optim_factory")

    def run(library):
        called = f"{library.__name__}.{name}".lower()
        how = {
            "has_betas": name == "AdamW",
            "has_momentum": name == "SGD",
            "has_eps": name != "SGD",
        }
        path = f"{library.__name__}.{name}"
        factory.default_registry.register(timm.optim.OptimInfo(called, path, defaults={}, **how))
        model = make_model()
        opt = timm.optim.create_optimizer_v2(model, prefix + called, lr=0.02, **options)
        schedule, _ = timm.scheduler.create_scheduler_v2(
            opt, "cosine", num_epochs=6, warmup_epochs=2
        )
        epochs, rates = iter(range(1, 9)), []
        losses = train(model, opt, 8, lambda: (schedule.step(next(epochs)), rates.extend(lrs(opt))))
        return losses, rates, weights(model), opt.state_dict()

    same(run)


@pytest.mark.parametrize(
    "policy", ["cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "plateau"]
)
def test_timm_schedulers(policy, timm, same):
    def run(library):
        def made():
            model = make_model()
            opt = make(library, "SGD", two_groups(model))
            how = {
                "decay_epochs": 2,
                "decay_milestones": [3, 5],
                "patience_epochs": 0,
                "noise": [0.5, 0.9],
            }
            return (
                model,
                opt,
                timm.scheduler.create_scheduler_v2(
                    opt, policy, num_epochs=8, warmup_epochs=2, **how
                )[0],
            )

        model, opt, schedule = made()
        losses, rates = [], []
        for epoch in range(1, 10):
            losses += train(model, opt, 1)
            schedule.step(epoch, metric=1.0)
            rates += lrs(opt)
            if epoch == 4:
                saved = from_disk([each.state_dict() for each in (model, opt, schedule)])
                model, opt, schedule = made()
                for each, state in zip((model, opt, schedule), saved, strict=True):
                    each.load_state_dict(state)
        return losses, rates, weights(model)

    same(run)


# skorch: makes groups by names, sets options in them by name, and keeps an optimizer in files and
# pickles


@pytest.fixture
def skorch_net():
    import skorch

    x, y = make_data().tensors

    def make_net(library, name="SGD", callbacks=None, **options):
        groups = [("0.*", {"lr": 0.02, "weight_decay": 0.1})]
        named = {
            f"optimizer__{option}": value
            for option, value in (OPTIONS.get(name, {}) | options).items()
        }
        named |= {"optimizer__param_groups": groups} if name != "LBFGS" else {}
        return skorch.NeuralNetClassifier(
            make_model,
            criterion=torch.nn.CrossEntropyLoss,
            optimizer=getattr(library, name),
            train_split=None,
            batch_size=16,
            max_epochs=3,
            verbose=0,
            callbacks=callbacks,
            **named,
        )

    return make_net, x.numpy(), (y[:, 0] > 0).long().numpy()


def trained(net: Any) -> tuple[list[float], list[torch.Tensor]]:
    return net.history[:, "train_loss"], weights(net.module_)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop", "LBFGS"])
def test_skorch(name, skorch_net, same):
    make_net, x, y = skorch_net

    def run(library):
        net = make_net(library, name).fit(x, y)
        net.set_params(optimizer__lr=0.005, optimizer__param_groups__0__lr=0.01)
        return *trained(net.partial_fit(x, y)), lrs(net.optimizer_)

    same(run)


@pytest.mark.parametrize("how", ["files", "pickle", "deepcopy"])
@FEW
def test_skorch_resumes(name, how, skorch_net, same, tmp_path):
    make_net, x, y = skorch_net
    files = {
        "f_params": tmp_path / "params.pt",
        "f_optimizer": tmp_path / "opt.pt",
        "f_history": tmp_path / "history",
    }

    def run(library, resume=None):
        net = make_net(library, name).fit(x, y)
        if resume == "files":
            net.save_params(**files)
            net = make_net(library, name).initialize()
            net.load_params(**files)
        elif resume:
            net = pickle.loads(pickle.dumps(net)) if resume == "pickle" else copy.deepcopy(net)
        return trained(net.partial_fit(x, y))

    whole = same(run)
    torch.testing.assert_close(run(onepass, how), whole, **BITS)


def test_skorch_grid_search(skorch_net, same):
    from sklearn.model_selection import GridSearchCV

    make_net, x, y = skorch_net

    def run(library):
        grid = {"lr": [0.01, 0.1], "optimizer": [library.SGD], "optimizer__momentum": [0.5, 0.9]}
        search = GridSearchCV(make_net(library), grid, cv=2, error_score="raise").fit(x, y)
        return list(search.cv_results_["mean_test_score"]), weights(search.best_estimator_.module_)

    same(run)


@pytest.mark.parametrize("calls", [[3], [1, 3]], ids=["once", "twice"])
@pytest.mark.parametrize("every", ["epoch", "batch"])
@EVERY_SCHEDULER
def test_skorch_schedulers(policy, every, calls, skorch_net, same):
    """A second call makes a new scheduler on the same optimizer, with the number of epochs so far
    as its last."""
    from skorch.callbacks import LRScheduler

    if (policy, every, len(calls)) == ("ConstantLR", "batch", 2):
        pytest.skip(
            "from a rate that is back at its initial one, torch's goes on to twice the rate"
        )
    make_net, x, y = skorch_net

    def run(library):
        schedule = LRScheduler(
            getattr(library.lr_scheduler, policy), step_every=every, **SCHEDULERS[policy]
        )
        net = make_net(library, callbacks=[("schedule", schedule)]).initialize()
        for epochs in calls:
            net.partial_fit(x, y, epochs=epochs)
        rates = (
            net.history[:, "event_lr"]
            if every == "epoch"
            else net.history[:, "batches", :, "event_lr"]
        )
        return *trained(net), rates, lrs(net.optimizer_)

    same(run)


@EVERY_SCHEDULER
def test_skorch_simulates(policy):
    from skorch.callbacks import LRScheduler

    ours, theirs = (
        LRScheduler(getattr(library.lr_scheduler, policy), **SCHEDULERS[policy]).simulate(15, 0.1)
        for library in (onepass, torch.optim)
    )
    torch.testing.assert_close(ours, theirs, **CLOSE)


# higher: reads groups and state, and steps by its own formulas


@pytest.fixture
def higher(monkeypatch):
    import higher

    known = dict(higher.optim._opt_mapping)
    monkeypatch.setattr(higher.optim, "_opt_mapping", known)
    for cls in tuple(known):
        higher.register_optim(getattr(onepass, cls.__name__), known[cls])
    return higher


HIGHER = pytest.mark.parametrize("name", sorted(OPTIONS.keys() - {"AdamW", "NAdam", "RAdam"}))


@HIGHER
def test_higher(name, higher, same):
    """Gradients through steps that go on from an optimizer's own."""

    def run(library):
        model = make_model()
        opt = make(library, name, two_groups(model))
        train(model, opt, 3)
        with higher.innerloop_ctx(model, opt, copy_initial_weights=False) as (fast, steps):
            for _ in range(3):
                steps.step(loss_of(fast))
            loss = loss_of(fast)
        return loss, torch.autograd.grad(loss, list(model.parameters())), list(fast.parameters())

    same(run)


@HIGHER
def test_higher_learns_options(name, higher, same):
    def run(library):
        model = make_model()
        opt = make(library, name, two_groups(model))
        train(model, opt, 1)
        learnt = higher.optim.get_trainable_opt_params(opt)
        with higher.innerloop_ctx(model, opt, override={"lr": learnt["lr"]}) as (fast, steps):
            steps.step(loss_of(fast))
            grads = torch.autograd.grad(loss_of(fast), learnt["lr"], allow_unused=True)
        halved = {"lr": [lr.detach() / 2 for lr in learnt["lr"]]}
        higher.optim.apply_trainable_opt_params(opt, halved)
        return dict(learnt), grads, lrs(opt), train(model, opt, 2)

    same(run)


# hydra and omegaconf: options come as their own containers


CONFIG = """
optimizer:
  _target_: {library}.AdamW
  lr: 0.01
  betas: [0.8, 0.95]
  weight_decay: ${{decay}}
head: {{lr: "${{optimizer.lr}}", betas: [0.7, 0.9]}}
schedule:
  _target_: {library}.lr_scheduler.MultiStepLR
  milestones: [2, 4]
  gamma: 0.5
decay: 0.1
"""


def configured(library: Any, folder: Any, how: str) -> tuple[Any, Any, Any]:
    """A model, an optimizer and a scheduler as a file says, and what was changed of it on the
    command line."""
    import hydra
    from omegaconf import OmegaConf

    (folder / "config.yaml").write_text(CONFIG.format(library=library.__name__))
    with hydra.initialize_config_dir(str(folder), version_base=None):
        config = hydra.compose("config", overrides=["optimizer.lr=0.02", "decay=0.2"])
    model, instantiate = make_model(), hydra.utils.instantiate
    if how == "params":
        opt = instantiate(config.optimizer, params=model.parameters())
    elif how == "converted":
        opt = instantiate(config.optimizer, params=model.parameters(), _convert_="all")
    elif how == "partial":
        opt = instantiate(config.optimizer, _partial_=True)(model.parameters())
    elif how == "groups":
        groups = [
            {"params": model[0].parameters()},
            {"params": model[2].parameters(), **config.head},
        ]
        opt = instantiate(config.optimizer, _partial_=True)(groups)
    else:
        OmegaConf.set_readonly(config, True)
        opt = library.AdamW(
            model.parameters(), **OmegaConf.masked_copy(config.optimizer, ["lr", "betas"])
        )
    return model, opt, instantiate(config.schedule, optimizer=opt)


HOW = pytest.mark.parametrize("how", ["params", "converted", "partial", "groups", "read only"])


@HOW
def test_hydra(how, same, tmp_path):
    def run(library):
        model, opt, schedule = configured(library, tmp_path, how)
        losses = train(model, opt, 6, schedule.step)
        options = [
            [group["lr"], *group["betas"], group["weight_decay"]] for group in opt.param_groups
        ]
        copies = pickle.loads(pickle.dumps(opt)), copy.deepcopy(opt)
        return losses, weights(model), options, [each.state_dict()["state"] for each in copies]

    same(run)


@HOW
def test_hydra_keeps_nothing_of_its_own_in_files(how, tmp_path):
    """Where torch.optim does not: a file with a container of omegaconf's in it is not read by
    default."""

    def run(library):
        opt = configured(library, tmp_path, how)[1]
        return [type(group["betas"]).__name__ for group in (*opt.param_groups, opt.defaults)]

    assert run(onepass) == run(torch.optim)


def test_hydra_reports_the_same_mistakes():
    import hydra

    def message(library, **options):
        config = {"_target_": f"{library.__name__}.AdamW", **options}
        with pytest.raises(hydra.errors.InstantiationException) as caught:
            hydra.utils.instantiate(config, params=make_model().parameters())
        return type(caught.value.__cause__)

    for options in ({"lr": -1.0}, {"betas": [0.9, 1.5]}, {"lrs": 0.1}):
        assert message(onepass, **options) is message(torch.optim, **options)


# ignite: asks schedulers for rates and counts their steps itself


def ignite_trainer(model: Any, opt: Any, **handlers: Any) -> tuple[Any, list[float], list[float]]:
    """An engine, and the losses and rates of its iterations."""
    from ignite.engine import Events, create_supervised_trainer

    losses, rates = [], []
    engine = create_supervised_trainer(model, opt, torch.nn.functional.mse_loss)
    for name, handler in handlers.items():
        engine.add_event_handler(Events[name], handler)

    @engine.on(Events.ITERATION_COMPLETED)
    def note(engine):
        losses.append(engine.state.output)
        rates.extend(lrs(opt))

    return engine, losses, rates


BATCHES = [tuple(batch) for batch in zip(*(t.split(16) for t in make_data().tensors), strict=True)]


@pytest.mark.parametrize("how", ["alone", "legacy", "warmup", "simulated"])
@EVERY_SCHEDULER
def test_ignite_schedulers(policy, how, same):
    from ignite.handlers import param_scheduler as handlers

    def run(library):
        model = make_model()
        opt = make(library, "SGD", model.parameters())
        inner = getattr(library.lr_scheduler, policy)(opt, **SCHEDULERS[policy])
        if how == "warmup":
            # A class of ignite's stands before one of these, and cannot be read from the file that
            # a simulation makes.
            simulated = None if policy == "CosineAnnealingWarmRestarts" else [None] * 12
            schedule = handlers.create_lr_scheduler_with_warmup(
                inner, 0.0, 4, output_simulated_values=simulated
            )
        else:
            simulated = (
                handlers.LRScheduler.simulate_values(10, inner) if how == "simulated" else None
            )
            schedule = handlers.LRScheduler(inner, use_legacy=how == "legacy")
        event = "ITERATION_COMPLETED" if how == "legacy" else "ITERATION_STARTED"
        engine, losses, rates = ignite_trainer(model, opt, **{event: schedule})
        engine.run(BATCHES, max_epochs=3)
        return losses, rates, weights(model), simulated

    same(run)


@EVERY_SCHEDULER
def test_ignite_checkpoint(policy, same, tmp_path):
    from ignite.handlers import Checkpoint, DiskSaver
    from ignite.handlers.param_scheduler import LRScheduler

    def run(library, resume=False):
        def made():
            model = make_model()
            opt = make(library, "AdamW", two_groups(model))
            schedule = getattr(library.lr_scheduler, policy)(opt, **SCHEDULERS[policy])
            engine, losses, rates = ignite_trainer(
                model, opt, ITERATION_STARTED=LRScheduler(schedule)
            )
            return (
                {"model": model, "opt": opt, "schedule": schedule, "engine": engine},
                losses,
                rates,
            )

        things, losses, rates = made()
        things["engine"].run(BATCHES, max_epochs=1 if resume else 2)
        if resume:
            saver = Checkpoint(things, DiskSaver(str(tmp_path), require_empty=False))
            saver(things["engine"])
            things, more, more_rates = made()
            Checkpoint.load_objects(things, torch.load(tmp_path / saver.last_checkpoint))
            things["engine"].run(BATCHES, max_epochs=2)
            losses, rates = losses + more, rates + more_rates
        return losses, rates, weights(things["model"])

    whole = same(run)
    torch.testing.assert_close(run(onepass, resume=True), whole, **BITS)


@pytest.mark.parametrize("ours", [False, True], ids=["torch's", "ours"])
@pytest.mark.parametrize(
    "options", [{}, {"min_lr": 0.015, "param_group_index": 1}], ids=["all", "one"]
)
def test_ignite_plateau(options, ours, same, monkeypatch):
    """It replaces a method of ReduceLROnPlateau in the object."""
    from ignite.handlers import param_scheduler as handlers

    def run(library):
        if ours:
            monkeypatch.setattr(
                handlers, "ReduceLROnPlateau", library.lr_scheduler.ReduceLROnPlateau
            )
        model = make_model()
        opt = make(library, "SGD", two_groups(model))
        schedule = handlers.ReduceLROnPlateauScheduler(
            opt, "metric", patience=1, factor=0.5, **options
        )
        engine, losses, rates = ignite_trainer(model, opt)
        metrics = iter([5.0, 4.0, 4.0, 4.0, 4.0, 3.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0])

        @engine.on(handlers.Events.ITERATION_COMPLETED)
        def measure(engine):
            engine.state.metrics["metric"] = next(metrics)
            schedule(engine)

        engine.run(BATCHES, max_epochs=3)
        return losses, rates, weights(model)

    same(run)


def test_ignite_piecewise_linear(same):
    """It writes any option of any group, by name."""
    from ignite.handlers.param_scheduler import ParamGroupScheduler, PiecewiseLinear

    def run(library):
        model = make_model()
        opt = make(library, "AdamW", two_groups(model))
        parts = [
            PiecewiseLinear(opt, name, milestones_values=values, param_group_index=group)
            for group, name, values in [
                (0, "lr", [(0, 0.0), (4, 0.02), (8, 0.0)]),
                (1, "lr", [(0, 0.01), (8, 0.0)]),
                (1, "weight_decay", [(0, 0.0), (8, 0.5)]),
            ]
        ]
        engine, losses, rates = ignite_trainer(
            model, opt, ITERATION_STARTED=ParamGroupScheduler(parts)
        )
        engine.run(BATCHES, max_epochs=2)
        return losses, rates, weights(model)

    same(run)


def test_ignite_lr_finder(same):
    """It runs the optimizer to where it diverges, and puts model and optimizer back by their state
    dicts."""
    from ignite.handlers import FastaiLRFinder

    def run(library):
        model = make_model()
        opt = make(library, "AdamW", model.parameters())
        engine, losses, _ = ignite_trainer(model, opt)
        finder = FastaiLRFinder()
        with finder.attach(
            engine, {"model": model, "optimizer": opt}, num_iter=12, end_lr=1.0
        ) as finding:
            finding.run(BATCHES, max_epochs=3)
        engine.run(BATCHES, max_epochs=2)
        return losses, weights(model), finder.get_results()["lr"]

    same(run)


# stable-baselines3: writes the lr before every update, and keeps the class itself in its files


@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop"])
@pytest.mark.parametrize("algorithm", ["PPO", "A2C", "DQN"])
def test_stable_baselines3(algorithm, name, same, tmp_path):
    import stable_baselines3

    cls = getattr(stable_baselines3, algorithm)
    steps = {
        "PPO": {"n_steps": 32, "batch_size": 16, "n_epochs": 2},
        "A2C": {"n_steps": 8},
        "DQN": {
            "learning_starts": 16,
            "train_freq": 4,
            "target_update_interval": 16,
            "batch_size": 16,
        },
    }[algorithm]
    options = {key: value for key, value in OPTIONS[name].items() if key != "lr"}

    def run(library):
        policy = {
            "optimizer_class": getattr(library, name),
            "optimizer_kwargs": options,
            "net_arch": [16],
        }
        how = {
            "learning_rate": lambda left: 0.01 * left,
            "policy_kwargs": policy,
            "seed": 0,
            "device": "cpu",
        }
        model = cls("MlpPolicy", "CartPole-v1", **how, **steps).learn(96)
        path = tmp_path / f"{library.__name__}.zip"
        model.save(path)
        loaded = cls.load(path, env=model.get_env(), device="cpu")
        assert type(loaded.policy.optimizer) is getattr(library, name)
        torch.testing.assert_close(
            loaded.policy.optimizer.state_dict(), model.policy.optimizer.state_dict(), **BITS
        )
        loaded.set_random_seed(1)
        loaded.learn(64, reset_num_timesteps=False)
        return weights(model.policy), weights(loaded.policy)

    same(run)


# pytorch_warmup: multiplies the lr after each step of a scheduler, and takes it back before the
# next


def warmed(library: Any, name: str, warmup: str, policy: str, resume: bool = False) -> Any:
    import pytorch_warmup

    def made():
        model = make_model()
        groups = two_groups(model)
        groups[1]["betas"] = (0.8, 0.9)
        opt = getattr(library, name)(groups, lr=0.01)
        schedule = getattr(library.lr_scheduler, policy)(opt, **(SCHEDULERS[policy] | cycle))
        more = {"warmup_period": [3, 5]} if warmup in ("LinearWarmup", "ExponentialWarmup") else {}
        return model, opt, schedule, getattr(pytorch_warmup, warmup)(opt, **more)

    def after():
        with warm.dampening():
            schedule.step()
        rates.extend(lrs(opt))

    cycle = {"cycle_momentum": False} if policy == "CyclicLR" else {}
    rates: list[float] = []
    model, opt, schedule, warm = made()
    losses = train(model, opt, 5, after)
    if resume:
        saved = from_disk([each.state_dict() for each in (model, opt, schedule, warm)])
        model, opt, schedule, warm = made()
        for each, state in zip((model, opt, schedule, warm), saved, strict=True):
            each.load_state_dict(state)
    return losses + train(model, opt, 6, after), rates, weights(model)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "NAdam"])
@pytest.mark.parametrize(
    "warmup",
    [
        "LinearWarmup",
        "ExponentialWarmup",
        "UntunedLinearWarmup",
        "UntunedExponentialWarmup",
        "RAdamWarmup",
    ],
)
def test_pytorch_warmup(warmup, name, same):
    same(lambda library: warmed(library, name, warmup, "CosineAnnealingLR"))


@EVERY_SCHEDULER
def test_pytorch_warmup_schedulers(policy, same):
    whole = same(lambda library: warmed(library, "AdamW", "LinearWarmup", policy))
    torch.testing.assert_close(
        warmed(onepass, "AdamW", "LinearWarmup", policy, resume=True), whole, **BITS
    )


def test_pytorch_warmup_of_a_schedule_of_ours():
    import pytorch_warmup

    model, rates = make_model(), []
    opt = onepass.SGD(model.parameters(), lr=0.08)
    schedule = onepass.Scheduler(opt, {"lr": onepass.schedule.linear(0.08, 0.0, steps=8)})
    warm = pytorch_warmup.LinearWarmup(opt, 4)
    for _ in range(8):
        rates += lrs(opt)
        train(model, opt, 1)
        with warm.dampening():
            schedule.step()
    assert rates == pytest.approx([0.08 * (1 - t / 8) * min(1, (t + 1) / 4) for t in range(8)])


# What asks for torch's classes themselves, not for subclasses: what to do instead.


def test_higher_is_told_of_ours():
    import higher

    model = make_model()
    opt = onepass.Adam(model.parameters())
    with (
        pytest.raises(ValueError, match="not supported by higher yet"),
        higher.innerloop_ctx(model, opt),
    ):
        pass


@pytest.mark.parametrize("every", ["epoch", "batch"])
def test_skorch_takes_torchs_plateau(every, skorch_net, same):
    from skorch.callbacks import LRScheduler

    make_net, x, y = skorch_net

    def run(library):
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
        schedule = LRScheduler(plateau, step_every=every, patience=0, threshold=0.5)
        net = make_net(library, callbacks=[("schedule", schedule)]).fit(x, y)
        return *trained(net), lrs(net.optimizer_)

    same(run)


def test_stable_baselines3_is_told_eps(same):
    """For torch's Adam it sets another eps than torch does; a subclass of Adam has its own."""
    import stable_baselines3

    def run(library):
        policy = {"optimizer_class": library.Adam}
        if library is onepass:
            policy["optimizer_kwargs"] = {"eps": 1e-5}
        model = stable_baselines3.A2C(
            "MlpPolicy", "CartPole-v1", policy_kwargs=policy, seed=0, device="cpu"
        ).learn(10)
        return model.policy.optimizer.param_groups[0]["eps"], weights(model.policy)

    same(run)
