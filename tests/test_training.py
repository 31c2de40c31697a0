"""A run is a pure function of its settings, interrupted or not; its tasks are what they say."""

from __future__ import annotations

import copy
import dataclasses
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import onepass
from onepass import checkpoint
from onepass.app import tasks
from onepass.app.tasks import Data, Examples, TaskError, text
from onepass.app.training.comparison import compare_steps
from onepass.app.training.loop import Diverged, fit
from onepass.app.training.run import Run
from onepass.app.training.settings import (
    Settings,
    SettingsError,
    find_optimizer,
    make_schedule,
    make_settings,
)
from onepass.checkpoint import CheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def short_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Epochs of 100 images: three batches of 32 and one of 4."""
    monkeypatch.setitem(
        tasks.TASKS, "digits", dataclasses.replace(tasks.TASKS["digits"], examples_per_epoch=100)
    )


class Silent:
    def stepped(self, run: Run) -> None:
        pass

    def finished_epoch(self, run: Run) -> None:
        pass


class Keeper(Silent):
    """Keeps a copy of the checkpoint after every epoch."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def finished_epoch(self, run: Run) -> None:
        shutil.copy(self.path, self.path.with_name(f"epoch{run.epoch}"))


def short_settings(**changes: object) -> Settings:
    values: dict = {"optimizer": "AdamW", "epochs": 3, "batch_size": 32, "seed": 5, **changes}
    return make_settings("digits", **values)


def load_result(path: Path) -> dict:
    tree = checkpoint.load(path)
    del tree["seconds"]
    return tree


def assert_same(a: object, b: object) -> None:
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor)
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert isinstance(b, dict)
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    else:
        assert a == b


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "schedule"),
    [("AdamW", "cosine"), ("Adam", "step"), ("SGD", "none")],
    ids=lambda value: value,
)
def test_resuming_anywhere_gives_the_same_bits(
    optimizer: str, schedule: str, tmp_path: Path, short_digits: None
) -> None:
    path = tmp_path / "run"
    fit(Run(short_settings(optimizer=optimizer, schedule=schedule), tmp_path), path, Keeper(path))
    expected = load_result(path)
    for epoch in (1, 2):
        again = Run.load(tmp_path / f"epoch{epoch}", {"optimizer": optimizer.lower(), "epochs": 3})
        assert again.epoch == epoch
        assert not again.is_finished
        torch.randn(3)  # nothing may hang on the process's own random state
        fit(again, tmp_path / "again", Silent())
        assert_same(expected, load_result(tmp_path / "again"))


def test_the_seed_decides_and_the_callers_random_state_is_left_alone(
    tmp_path: Path, short_digits: None
) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        fit(Run(short_settings(epochs=1, seed=seed), tmp_path), tmp_path / name, Silent())
    assert torch.equal(before, torch.get_rng_state())
    a, b, c = (load_result(tmp_path / name) for name in "abc")
    assert_same(a, b)
    assert a["history"]["train_loss"] != c["history"]["train_loss"]


def test_what_is_measured(tmp_path: Path, short_digits: None) -> None:
    run = Run(short_settings(epochs=2), tmp_path)
    fit(run, tmp_path / "run", Silent())
    history = run.history
    assert run.steps_per_epoch == 4
    assert run.total_steps == 8
    assert len(history.lr) == len(history.train_loss) == len(history.train_metric) == 8
    assert len(history.held_out_loss) == len(history.held_out_metric) == 2
    assert history.lr == list(map(make_schedule("cosine", 3e-3, 8), range(8)))
    assert (
        min(
            run.seconds.forward, run.seconds.backward, run.seconds.optimizer, run.seconds.evaluation
        )
        > 0
    )
    run.model.eval()
    inputs, targets = run.data.held_out.batch(torch.arange(len(run.data.held_out)))
    with torch.no_grad():
        accuracy = (run.model(inputs).argmax(1) == targets).double().mean().item()
    assert history.held_out_metric[-1] == pytest.approx(accuracy, abs=1e-6)


def test_an_interruption_leaves_the_last_epoch(tmp_path: Path, short_digits: None) -> None:
    class Impatient(Silent):
        def stepped(self, run: Run) -> None:
            if len(run.history.train_loss) == 6:
                raise KeyboardInterrupt

    fit(Run(short_settings(), tmp_path), tmp_path / "whole", Silent())
    with pytest.raises(KeyboardInterrupt):
        fit(Run(short_settings(), tmp_path), tmp_path / "run", Impatient())
    again = Run.load(tmp_path / "run", {})
    assert again.epoch == 1
    fit(again, tmp_path / "run", Silent())
    assert_same(load_result(tmp_path / "whole"), load_result(tmp_path / "run"))


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path, short_digits: None) -> None:
    run = Run(short_settings(optimizer="SGD", lr=1e30, schedule="none"), tmp_path)
    with pytest.raises(
        Diverged, match=r"the loss became (nan|inf) in epoch 1, step \d of 12: try a smaller lr"
    ):
        fit(run, tmp_path / "run", Silent())
    assert not (tmp_path / "run").exists()


def test_a_batch_larger_than_the_data(tmp_path: Path, short_digits: None) -> None:
    assert Run(short_settings(batch_size=10**6), tmp_path).steps_per_epoch == 1


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"optimizer": "sgd"}, "was trained with optimizer AdamW and not SGD: leave optimizer out"),
        ({"epochs": 9}, "with epochs 3 and not 9"),
        ({"task": "text"}, "with task digits and not text"),
        ({"lr": 0.5}, "with lr 0.003 and not 0.5"),
    ],
)
def test_conflicting_settings(
    asked: dict, sentence: str, tmp_path: Path, short_digits: None
) -> None:
    Run(short_settings(), tmp_path).save(tmp_path / "run")
    with pytest.raises(SettingsError, match=sentence):
        Run.load(tmp_path / "run", asked)


def test_other_data_is_refused(
    tmp_path: Path, short_digits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    Run(short_settings(), tmp_path).save(tmp_path / "run")
    task = tasks.TASKS["digits"]

    def load_fewer(folder: Path) -> Data:
        data = task.load(folder)
        return Data(
            Examples(data.train.inputs[1:], data.train.targets[1:], data.train.decode),
            data.held_out,
        )

    monkeypatch.setitem(tasks.TASKS, "digits", dataclasses.replace(task, load=load_fewer))
    with pytest.raises(SettingsError, match="the data of task digits is not that with which"):
        Run.load(tmp_path / "run", {})


@pytest.mark.parametrize(
    "missing", ["model", "optimizer", "settings", "epoch", "rng", "history", "data"]
)
def test_a_checkpoint_of_something_else(missing: str, tmp_path: Path, short_digits: None) -> None:
    Run(short_settings(), tmp_path).save(tmp_path / "run")
    tree = checkpoint.load(tmp_path / "run")
    del tree[missing]
    checkpoint.save(tmp_path / "run", tree)
    with pytest.raises(CheckpointError, match="does not fit this version of the task"):
        Run.load(tmp_path / "run", {})
    del tree["kind"]
    checkpoint.save(tmp_path / "run", tree)
    with pytest.raises(CheckpointError, match="not one of a training run"):
        Run.load(tmp_path / "run", {})


Change = Callable[[dict], object]


def put(*where: str | int, value: object) -> Change:
    """A change that sets an entry of a tree."""

    def change(tree: dict) -> None:
        found: Any = tree
        for key in where[:-1]:
            found = found[key]
        found[where[-1]] = value

    return change


def drop(*where: str | int) -> Change:
    """A change that deletes an entry of a tree."""

    def change(tree: dict) -> None:
        found: Any = tree
        for key in where[:-1]:
            found = found[key]
        del found[where[-1]]

    return change


def nested(depth: int) -> list:
    return [nested(depth - 1)] if depth else []


NAN, INF = float("nan"), float("inf")
JUNK = [None, True, "x", "", [], [1], {}, {"lr": 1}, (1, 2), NAN, 1.5, torch.ones(3), nested(100)]


def junk_but(*fine: object) -> list[Any]:
    return [v for v in JUNK if not any(type(v) is type(f) and v == f for f in fine)]


SETTINGS = ("task", "optimizer", "lr", "epochs", "batch_size", "schedule", "seed")
TREE = (
    "kind",
    "settings",
    "epoch",
    "step",
    "model",
    "optimizer",
    "rng",
    "history",
    "seconds",
    "data",
    "torch",
)
HISTORY = ("lr", "train_loss", "train_metric", "held_out_loss", "held_out_metric")
SECONDS = ("forward", "backward", "optimizer", "evaluation")
TEXTS = ("kind", "torch")
# What makes no sense in a run that has finished one epoch of four steps: where in the tree, and the
# values.
ABSURD: dict[tuple[str | int, ...], list[Any]] = {
    **{(key,): [v for v in JUNK if not (key in TEXTS and isinstance(v, str))] for key in TREE},
    ("epoch",): [
        *JUNK,
        -5,
        -1,
        0,
        2,
        4,
        10**9,
        10**400,
        -(10**400),
        INF,
        1.0,
        "1",
        torch.tensor(1),
    ],
    ("step",): [*JUNK, -1, 0, 3, 5, 10**400],
    **{
        ("settings", key): [*JUNK, INF, -1, 10**400]
        for key in ("lr", "epochs", "batch_size", "seed")
    },
    ("settings", "lr"): [*junk_but(1.5), 0, -0.0, -1.0, INF, -INF, 10**400, "0.1"],
    ("settings", "epochs"): [*JUNK, 0, -1, 10**10, 10**400, 3.0, "3"],
    ("settings", "batch_size"): [*JUNK, 0, -1, 1, 16, 10**9, 10**10, 10**12, 10**30, 10**400, 32.0],
    ("settings", "seed"): [*JUNK, -1, 2**63, 10**400, 0.0],
    ("settings", "task"): [*JUNK, "digit", "os:system", "../digits"],
    ("settings", "optimizer"): [*JUNK, "adamx", "LBFGS", "SparseAdam", "onepass"],
    ("settings", "schedule"): [*JUNK, "linear", "cosine(1)", "__import__('os')"],
    ("settings", "extra"): [1],
    ("extra",): [1],
    (3,): [1],
    **{
        ("history", key): [
            *junk_but([1]),
            [NAN] * 3,
            ["x"] * 4,
            [1.0] * 5,
            [True] * 4,
            [10**400] * 4,
            5,
        ]
        for key in HISTORY
    },
    **{("history", key, 0): [*junk_but(1.5), INF, 10**400] for key in ("lr", "train_loss")},
    **{("history", key, 0): [v for v in JUNK if not isinstance(v, float)] for key in HISTORY[2:]},
    ("history", "extra"): [[]],
    **{("seconds", key): [*junk_but(1.5), -1.0, -1e-9, INF, 10**400] for key in SECONDS},
    ("seconds", "extra"): [1.0],
    ("data", "folder"): [v for v in JUNK if not isinstance(v, str)] + ["\0", 3],
    ("data", "fingerprint"): JUNK,
    ("data", "extra"): [1],
    **{
        ("rng", key): [*JUNK, torch.zeros(16), torch.zeros(16, dtype=torch.uint8)]
        for key in ("torch", "shuffle")
    },
    ("rng", "extra"): [1],
    ("model", "0.weight"): [
        *JUNK,
        torch.zeros(32, 1, 3, 3, dtype=torch.float64),
        torch.zeros(32, 1, 3, 2),
    ],
    ("model", "extra"): [torch.ones(1)],
    ("model", 3): [torch.ones(1)],
    ("optimizer", "state"): JUNK,
    ("optimizer", "state", 0): JUNK,
    ("optimizer", "state", 99): [{}],
    ("optimizer", "state", 0, "step"): [*junk_but(True, 1.5), -1, NAN, INF, -INF, 1e30, 2**62, "3"],
    ("optimizer", "state", 0, "exp_avg"): [torch.zeros(3), "x", 1.0],
    ("optimizer", "param_groups"): JUNK,
    ("optimizer", "param_groups", 0): JUNK,
    ("optimizer", "param_groups", 0, "lr"): [*junk_but(1.5), -1.0, INF, "0.1"],
    ("optimizer", "param_groups", 0, "betas"): [*JUNK, (0.9,), [0.9, 0.999], (5.0, 5.0)],
    ("optimizer", "param_groups", 0, "eps"): [*JUNK, -1.0, INF],
    ("optimizer", "param_groups", 0, "amsgrad"): JUNK,
    ("optimizer", "param_groups", 0, "params"): [*JUNK, [0], [[]], [0, 0, 1, 2]],
    ("optimizer", "param_groups", 0, "extra"): [1],
    ("optimizer", "extra"): [1],
}
LOST = [
    *((key,) for key in TREE),
    *(("settings", key) for key in SETTINGS),
    *(("history", key) for key in HISTORY),
    *(("seconds", key) for key in SECONDS),
    *(("rng", key) for key in ("torch", "shuffle")),
    *(("data", key) for key in ("folder", "fingerprint")),
    ("model", "0.weight"),
    ("optimizer", "state"),
    ("optimizer", "param_groups"),
    ("optimizer", "param_groups", 0),
    ("optimizer", "param_groups", 0, "lr"),
    ("optimizer", "param_groups", 0, "eps"),
    ("optimizer", "param_groups", 0, "params"),
    ("optimizer", "state", 0, "exp_avg"),
]


@pytest.fixture(scope="module")
def finished_epoch(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The checkpoint of a run after the first of its three epochs, each of four steps."""
    folder = tmp_path_factory.mktemp("run")
    task = dataclasses.replace(tasks.TASKS["digits"], examples_per_epoch=100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tasks.TASKS, "digits", task)
        fit(Run(short_settings(), folder), folder / "run", Keeper(folder / "run"))
    return (folder / "epoch1").read_bytes()


@pytest.mark.parametrize(
    "where",
    [
        pytest.param(where, id=".".join(map(str, where)))
        for where in {**ABSURD, **dict.fromkeys(LOST)}
    ],
)
def test_a_checkpoint_that_makes_no_sense(
    where: tuple[str | int, ...], finished_epoch: bytes, tmp_path: Path, short_digits: None
) -> None:
    """Each entry in turn: one sentence, and the file is as it was; random numbers too."""
    path, random = tmp_path / "run", torch.get_rng_state()
    path.write_bytes(finished_epoch)
    whole = checkpoint.load(path)
    changes = [put(*where, value=value) for value in ABSURD.get(where, [])]
    faults = []
    for i, change in enumerate([*changes, *([drop(*where)] if where in LOST else [])]):
        tree = copy.deepcopy(whole)
        change(tree)
        checkpoint.save(path, tree)
        before = path.read_bytes()
        try:
            Run.load(path, {})
            faults.append(f"{i}: accepted {ABSURD.get(where, [])[i:][:1]!r:.60}")
        except (CheckpointError, SettingsError, TaskError) as error:
            text = str(error)
            if "\n" in text or len(text) > 450 or "Error" in text:
                faults.append(f"{i}: {text!r:.200}")
        assert path.read_bytes() == before
    assert not faults, "\n".join(faults)
    assert torch.equal(random, torch.get_rng_state())


def test_the_checkpoint_itself_makes_sense(
    finished_epoch: bytes, tmp_path: Path, short_digits: None
) -> None:
    (tmp_path / "run").write_bytes(finished_epoch)
    run = Run.load(tmp_path / "run", {})
    assert (run.epoch, len(run.history.train_loss)) == (1, 4)


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"lr": 0.0}, "lr must be a positive finite number, got 0.0"),
        ({"lr": -1.0}, "got -1.0"),
        ({"lr": float("nan")}, "got nan"),
        ({"lr": float("inf")}, "got inf"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": -3}, "batch_size must be at least 1, got -3"),
        ({"seed": -1}, "seed must lie in"),
        ({"schedule": "cosin"}, "there is no schedule 'cosin': choose one of cosine, step, none"),
        ({"optimizer": "adamv"}, "there is no optimizer 'adamv': did you mean adam"),
        ({"optimizer": "zzz"}, "there is no optimizer 'zzz': choose one of .*sgd-momentum"),
        ({"task": "digit"}, "there is no task 'digit': did you mean digits?"),
        ({"task": "zzz"}, "there is no task 'zzz': choose one of digits, text, cifar10"),
    ],
    ids=str,
)
def test_impossible_settings(changes: dict, sentence: str) -> None:
    with pytest.raises((SettingsError, TaskError), match=sentence):
        make_settings(**changes)


def test_optimizers_are_found_in_any_case() -> None:
    for name in ("SGD", "Adam", "AdamW"):
        for spelling in (name, name.lower(), name.upper()):
            assert find_optimizer(spelling) is getattr(onepass, name)
    assert make_settings(optimizer="adamw") == make_settings(optimizer="AdamW")
    momentum = make_settings(optimizer="SGD-Momentum", lr=0.1)
    assert momentum == make_settings(optimizer="sgd-momentum", lr=0.1)
    assert Run(momentum, Path()).optimizer.defaults["momentum"] == 0.9


def test_an_optimizer_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Picky(onepass.SGD):
        def __init__(self, params: object, lr: float = 0.1) -> None:
            raise ValueError(f"Picky: lr must be below 1, got {lr}")

    class NeedsClosure(onepass.SGD):
        def step(self, closure: object) -> None:
            super().step()

    for cls in (Picky, NeedsClosure):
        monkeypatch.setattr(onepass, cls.__name__, cls, raising=False)
    monkeypatch.setattr(onepass, "__all__", [*onepass.__all__, "Picky", "NeedsClosure"])
    with pytest.raises(
        SettingsError, match=r"Picky cannot train .* lr must be below 1, got 2.0; choose another"
    ):
        Run(make_settings(optimizer="picky", lr=2.0), tmp_path)
    with pytest.raises(SettingsError, match=r"NeedsClosure cannot train .* 'closure'"):
        Run(make_settings(optimizer="needsclosure", lr=2.0), tmp_path)


@pytest.mark.parametrize("total", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_schedules(total: int, warmup: int) -> None:
    rates = {
        name: list(map(make_schedule(name, 0.5, total, warmup), range(total)))
        for name in ("step", "cosine", "none")
    }
    assert rates.pop("none") == [0.5] * total
    for values in rates.values():
        assert all(0 < value <= 0.5 for value in values)
        rise, fall = values[:warmup], values[warmup:]
        assert rise == sorted(rise)
        assert fall == sorted(fall, reverse=True)
        if fall:
            assert fall[0] == (0.5 if warmup < total / 2 else values[warmup])
    if total == 100:
        assert rates["step"][49:51] == [0.5, 0.05]
        assert rates["step"][74:76] == [0.05, 0.005]
        assert rates["cosine"][-1] < 0.001


# --- timing ---------------------------------------------------------------------------------------


def test_the_comparison_leaves_the_run_alone() -> None:
    parameters = [
        torch.nn.Parameter(torch.randn(5, 5)),
        torch.nn.Parameter(torch.randn(3)),
        torch.nn.Parameter(torch.ones(1)),
    ]
    for p in parameters[:2]:
        p.grad = torch.randn_like(p)
    before = [(p.detach().clone(), None if p.grad is None else p.grad.clone()) for p in parameters]
    optimizer = find_optimizer("adamw")(parameters, lr=0.01)
    times = compare_steps(optimizer, parameters, budget=0.02)
    assert [entry.name for entry in times] == ["onepass AdamW", "torch AdamW", "torch AdamW fused"]
    assert all(entry.milliseconds > 0 for entry in times)
    for p, (value, grad) in zip(parameters, before, strict=True):
        assert torch.equal(p, value)
        assert (p.grad is None) == (grad is None)
        assert grad is None or torch.equal(p.grad, grad)
    assert not optimizer.state


def test_an_optimizer_that_torch_does_not_have() -> None:
    class OnlyOurs(torch.optim.SGD):
        pass

    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    assert [entry.name for entry in compare_steps(OnlyOurs([p], lr=0.1), [p], budget=0.01)] == [
        "onepass OnlyOurs"
    ]


# --- tasks ----------------------------------------------------------------------------------------


def test_digits_are_split_by_class_always_alike() -> None:
    task = tasks.find_task("digits")
    data = task.load(Path())
    assert data.fingerprint() == task.load(Path()).fingerprint()
    assert len(data.train) + len(data.held_out) == 1797
    for label in range(10):
        held, rest = ((part.targets == label).sum().item() for part in (data.held_out, data.train))
        assert held / (held + rest) == pytest.approx(0.2, abs=0.003)
    seen = {image.numpy().tobytes() for image in data.train.inputs}
    assert not any(image.numpy().tobytes() in seen for image in data.held_out.inputs)
    inputs, targets = data.train.batch(torch.arange(4))
    assert inputs.dtype == torch.float32
    assert targets.dtype == torch.int64
    assert task.make_model()(inputs).shape == (4, 10)


@pytest.mark.parametrize(
    ("module", "task"), [("sklearn.datasets", "digits"), ("torchvision", "cifar10")]
)
def test_a_missing_package(
    module: str, task: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(TaskError, match=f"task {task}: .* install") as caught:
        tasks.find_task(task).load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of 40 short files, and some that are not to be read."""
    folder = tmp_path / "lib"
    for name in [f"module{number}.py" for number in range(40)] + [
        "test/big.py",
        "site-packages/other.py",
        "notes.txt",
    ]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"def {Path(name).stem}(value):\n    return value + 1\n" * 8)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(folder)})
    return folder


def test_text_holds_out_whole_files(library: Path) -> None:
    train, held_out = text.split_files(library)
    assert sorted(train + held_out) == sorted(f"module{number}.py" for number in range(40))
    assert 1 <= len(held_out) <= 10
    assert train == sorted(train)
    (library / "module_new.py").write_text("pass")
    again = text.split_files(library)
    assert set(held_out) <= set(again[1])
    assert set(train) <= set(again[0])


def test_text_windows_tell_the_next_byte(library: Path) -> None:
    data = tasks.find_task("text").load(Path())
    inputs, targets = data.train.batch(torch.arange(2))
    assert inputs.shape == targets.shape == (2, 128)
    assert torch.equal(inputs[0, 1:], targets[0, :-1])
    assert targets[0, -1] == inputs[1, 0]
    assert bytes(inputs[0].tolist()).startswith(b"def module")


def test_text_without_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(
        TaskError, match=r"too few \.py files; use a Python that is installed with its sources"
    ):
        tasks.find_task("text").load(tmp_path)


def test_text_learns_and_resumes(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = dataclasses.replace(tasks.TASKS["text"], examples_per_epoch=40)
    monkeypatch.setitem(tasks.TASKS, "text", short)
    path = tmp_path / "run"
    run = Run(make_settings("text", epochs=2, batch_size=4), tmp_path)
    fit(run, path, Keeper(path))
    assert run.history.held_out_metric[-1] < 5 < run.history.train_metric[0]
    assert run.history.held_out_metric[-1] == pytest.approx(
        run.history.held_out_loss[-1] / np.log(2), rel=1e-5
    )
    assert (
        run.history.lr[0] == pytest.approx(run.settings.lr) or run.history.lr[0] < run.history.lr[1]
    )
    fit(Run.load(tmp_path / "epoch1", {}), tmp_path / "again", Silent())
    assert_same(load_result(path), load_result(tmp_path / "again"))


def test_the_transformer_looks_back_only() -> None:
    torch.manual_seed(0)
    model = text.SmallGPT(width=16, layers=2, heads=2).eval()
    given = torch.randint(256, (1, 20))
    changed = given.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 256
    with torch.no_grad():
        a, b = model(given), model(changed)
    assert torch.equal(a[0, :12], b[0, :12])
    assert not torch.allclose(a[0, 12:], b[0, 12:])


def make_torchvision(*, present: bool, error: Exception | None = None) -> types.ModuleType:
    """A stand-in for torchvision whose CIFAR10 has six images, or none and a download that
    fails."""

    class CIFAR10:
        def __init__(self, root: str, train: bool, download: bool) -> None:
            if not present and not download:
                raise RuntimeError(
                    "Dataset not found or corrupted. You can use download=True to download it"
                )
            if not present:
                raise error or OSError("unreachable")
            generator = np.random.default_rng(int(train))
            self.data = generator.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
            self.targets = list(range(6))

    module = types.ModuleType("torchvision")
    module.datasets = types.SimpleNamespace(CIFAR10=CIFAR10)  # type: ignore[attr-defined]
    return module


def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", make_torchvision(present=True))
    run = Run(make_settings("cifar10", epochs=2, batch_size=4), tmp_path)
    assert sum(p.numel() for p in run.model.parameters()) == 2432 + 25632 + 51264 + 65600 + 650
    expected = np.random.default_rng(1).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    assert np.array_equal(run.data.train.inputs.permute(0, 2, 3, 1).numpy(), expected)
    fit(run, tmp_path / "run", Silent())
    assert run.is_finished


@pytest.mark.parametrize("error", [OSError("no route\nto host"), RuntimeError("File not found")])
def test_cifar10_is_not_there(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", make_torchvision(present=False, error=error))
    with pytest.raises(
        TaskError, match=r"there is no CIFAR-10 in .*; put the folder cifar-10-batches-py"
    ) as caught:
        tasks.find_task("cifar10").load(tmp_path)
    assert "\n" not in str(caught.value)
