"""`onepass bench`: real shapes, a limit that moves the same bytes, a whole report. No test looks at
a time."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch

from onepass.app import catalog, cli
from onepass.app.bench import (
    contenders,
    descent,
    goals,
    limit,
    measure,
    picture,
    probe,
    races,
    report,
    suite,
    turns,
)
from onepass.app.bench.models import find_model
from onepass.app.bench.shapes import MODELS, Model
from onepass.kernel.graph.ir import Rank

SIZES = {
    "one": (1, 1000),
    "mlp": (6, 109_386),
    "lenet": (10, 61_706),
    "resnet18": (62, 11_689_512),
    "big": (2, 33_554_432),
    "gpt2": (148, 124_439_808),
    "resnet50": (161, 25_557_032),
    "llama-1b": (201, 1_100_048_384),
    "llama3-1b": (146, 1_235_814_400),
    "small": (1000, 4_096_000),
    "tiny": (1000, 16_000),
    "groups": (1000, 4_096_000),
    "groups100": (1000, 4_096_000),
    "matrices": (8, 14_155_776),
    "million": (10, 1_000_000),
    "embedding-1m": (1, 64_000_000),
    "embedding-10k": (1, 640_000),
}
# Bytes that a step reads and writes for each float32 parameter.
BYTES = {
    "sgd": 12,
    "sgd-momentum": 20,
    "asgd": 20,
    "adagrad": 20,
    "rmsprop": 20,
    "rmsprop-centered-momentum": 36,
    "adadelta": 28,
    "adam": 28,
    "adam-amsgrad": 36,
    "adamw": 28,
    "adamax": 28,
    "nadam": 28,
    "radam": 28,
    "rprop": 28,
    "adafactor": 24,
}
FEW = Model("few", "a few matrices and a vector", lambda: [(8, 4), (3,), (4, 8)])
MATRICES = Model("matrices", "two matrices", lambda: [(8, 4), (4, 8)])
TABLE = Model("embedding-10k", "a short table", lambda: [(50, 4)], rows=7)
MODES = ["default", "foreach", "fused"]


@pytest.fixture(scope="module")
def tiny_report() -> dict:
    """A whole run of the smallest model, without the measurements in fresh processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result = measure.run(suite.choose("tiny", "AdamW,sgd"), seconds=0.01, fresh=False)
    torch.set_num_threads(threads)
    return result


def run_cell(model: Model, name: str) -> dict:
    cells = [suite.Cell(model, catalog.find_variant(name), fresh=False)]
    return measure.run(cells, seconds=0.01, fresh=False)["results"][0]


def missing(result: dict) -> dict[str, str]:
    return {name: c["missing"] for name, c in result["contenders"].items() if "missing" in c}


def test_every_model_is_listed() -> None:
    assert SIZES.keys() == MODELS.keys()


@pytest.mark.parametrize("name", SIZES)
def test_shapes_are_those_of_the_real_model(name: str) -> None:
    model = MODELS[name]
    assert (len(model.shapes), model.parameters) == SIZES[name]
    assert all(math.prod(shape) > 0 for shape in model.shapes)


@pytest.mark.parametrize(("name", "count"), [("groups", 400), ("groups100", 100)])
def test_groups_have_different_learning_rates(name: str, count: int) -> None:
    groups = contenders.Workload(MODELS[name]).groups()
    assert len(groups) == len({group["lr"] for group in groups}) == count
    assert sum(len(group["params"]) for group in groups) == 1000


@pytest.mark.parametrize("name", BYTES)
def test_limit_moves_the_same_bytes(name: str) -> None:
    program = limit.program_of(catalog.find_variant(name))
    copying = limit.Limit(program).program
    assert copying.bytes_per_parameter == program.bytes_per_parameter
    assert sum(copying.bytes_per_parameter) == BYTES[name]
    assert {(c.name, c.read, c.written) for c in copying.columns} == {
        (c.name, c.read, c.written) for c in program.columns if c.rank == Rank.ELEMENT
    }


def test_limit_walks_as_often() -> None:
    program = limit.program_of(catalog.find_variant("adafactor"))
    assert len(limit.Limit(program).program.passes) == 3
    with pytest.raises(contenders.Missing, match="bound by products of matrices"):
        limit.Limit(limit.program_of(catalog.find_variant("muon")))


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_limit_changes_nothing(name: str) -> None:
    workload = contenders.Workload(FEW)
    variant = catalog.find_variant(name)
    contenders.seat(workload, lambda params: contenders.make_ours(variant, params)).step()
    tensors = [*workload.params, *(t for column in workload.columns.values() for t in column)]
    before = [t.detach().clone() for t in tensors]
    limit.Limit(limit.program_of(variant)).place(workload)()
    assert all(map(torch.equal, before, tensors))


@pytest.mark.parametrize("name", [*suite.list_elementwise(), "muon", "sparseadam"])
def test_contenders_share_their_state_and_step_alike(name: str) -> None:
    variant = catalog.find_variant(name)
    workload = contenders.Workload({"muon": MATRICES, "sparseadam": TABLE}.get(name, FEW))
    start = [p.detach().clone() for p in workload.params]
    makers = [lambda params: contenders.make_ours(variant, params)]
    makers += [
        lambda params, mode=mode: contenders.make_torch(variant, params, mode)
        for mode in contenders.TORCH
    ]
    ends = []
    for make in makers:
        try:
            optimizer = contenders.seat(workload, make)
        except contenders.Missing:
            continue
        optimizer.step()
        for column, tensors in workload.columns.items():
            held = [optimizer.state[p][column] for p in workload.params]
            assert all(a.data_ptr() == b.data_ptr() for a, b in zip(held, tensors, strict=True))
        ends.append(torch.cat([p.detach().flatten().clone() for p in workload.params]))
        with torch.no_grad():
            for p, value in zip(workload.params, start, strict=True):
                p.copy_(value)
            for tensor in (t for tensors in workload.columns.values() for t in tensors):
                tensor.zero_()
    assert len(ends) > 1 or variant.cls.__name__ not in vars(torch.optim)
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0])


def test_a_sparse_gradient_is_as_backward_leaves_it() -> None:
    p = contenders.Workload(TABLE).params[0]
    assert p.grad is not None
    assert p.grad.layout == torch.sparse_coo
    assert not p.grad.is_coalesced()
    assert p.grad.coalesce().values().shape == (7, 4)


def test_what_cannot_be_is_missing_with_a_reason() -> None:
    found = missing(run_cell(FEW, "adafactor"))
    assert found == {"fused": "torch's Adafactor has no fused"}
    found = missing(run_cell(MATRICES, "muon"))
    assert list(found) == ["foreach", "fused", "memory limit"]
    found = missing(run_cell(FEW, "muon-adamw"))
    assert found["default"] == "torch's Muon has no use_muon"
    found = missing(run_cell(TABLE, "sparseadam"))
    assert found["memory limit"] == "a step touches only a few rows"


@pytest.mark.parametrize("name", ["lbfgs", "lbfgs-wolfe"])
def test_descents_make_equal_steps_without_the_time_of_their_closure(name: str) -> None:
    result = run_cell(Model("tiny", "a few", lambda: [(4, 2), (3,), (30,)]), name)
    assert (
        result["contenders"]["onepass"]["evaluations"]
        == result["contenders"]["default"]["evaluations"]
        >= 20
    )
    assert list(missing(result)) == ["foreach", "fused", "memory limit"]
    assert [goal["what"] for goal in result["goals"]] == ["times_best"]


def test_a_descent_repeats_itself() -> None:
    model = Model("few", "a few", lambda: [(4, 2), (3,), (30,)])
    make = contenders.make_ours
    variant = catalog.find_variant("lbfgs-wolfe")
    one = descent.TimedDescent(model, lambda params: make(variant, params, **descent.LBFGS_OPTIONS))
    ends = []
    for _ in range(2):
        assert one.time_step() > 0
        ends.append(torch.cat([p.detach().flatten() for p in one.params]))
    assert torch.equal(*ends)
    assert len(one.optimizer.state[one.params[0]]["old_dirs"]) == 10
    assert not torch.allclose(ends[0], one.minimum, atol=1e-3)


def test_unequal_descents_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    make = contenders.make_torch
    shorter = descent.LBFGS_OPTIONS | {"max_iter": 3}
    monkeypatch.setattr(races, "make_torch", lambda v, p, mode, **_: make(v, p, mode, **shorter))
    result = run_cell(FEW, "lbfgs")
    assert (
        result["contenders"]["default"]["missing"]
        == "it evaluated the closure 3 times, onepass 20 times"
    )


def test_slow_contenders_take_fewer_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "time_of", lambda timer: timer())
    taken: list[str] = []

    def timer(name: str, seconds: float) -> float:
        taken.append(name)
        return seconds

    costs = {"slow": 0.5, "quick": 0.02, "short": 1e-4}
    times = turns.take_turns(
        {name: partial(timer, name, cost) for name, cost in costs.items()}, 1.23
    )
    assert times["slow"] == {"median_ms": 500.0, "min_ms": 500.0, "steps": 5}
    assert times["quick"]["steps"] == 20
    assert times["short"]["steps"] == 200 * (turns.TURN_STEPS - 1)
    # The slow one's turns are spread evenly.
    places = [i for i, name in enumerate(taken[6:]) if name == "slow"]
    gaps = [places[i + 1] - places[i] for i in range(4)]
    assert len(set(gaps)) == 1


def test_report_is_whole(tiny_report: dict) -> None:
    assert json.loads(json.dumps(tiny_report)) == tiny_report
    assert tiny_report.keys() == {"schema", "machine", "bandwidth", "import_ms", "results"}
    assert {
        "cpu",
        "cores",
        "threads",
        "torch",
        "numpy",
        "llvmlite",
        "date",
        "command",
    } <= tiny_report["machine"].keys()
    assert [result["optimizer"] for result in tiny_report["results"]] == ["adamw", "sgd"]
    for result in tiny_report["results"]:
        assert result["bytes_per_parameter"] == result["limit_bytes_per_parameter"]
        assert list(result["contenders"]) == ["onepass", *MODES, "memory limit"]
        for contender in result["contenders"].values():
            assert 0 < contender["min_ms"] <= contender["median_ms"]
            assert contender["steps"] > 0
        assert result["summary"]["best_mode"] in contenders.TORCH
        assert None not in result["summary"].values()
    assert [sum(result["bytes_per_parameter"]) for result in tiny_report["results"]] == [28, 12]


def test_report_is_saved_and_drawn(tiny_report: dict, tmp_path: Path) -> None:
    measure.save(tiny_report, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == tiny_report
    picture.plot(tiny_report, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 2
    assert report.make_step_table(tiny_report["results"]).row_count == 2
    assert report.make_fresh_table(tiny_report["results"]).row_count == 0
    assert report.list_goals(tiny_report["results"])[0].startswith("goals: ")
    assert report.list_facts(tiny_report)


def test_what_torch_lacks_is_said() -> None:
    class Ours(catalog.find_class("sgd")):
        pass

    with pytest.raises(contenders.Missing, match="torch has no Ours"):
        contenders.make_torch(catalog.Variant("ours", Ours), [], "default")


def names(cells: list[suite.Cell]) -> list[tuple[str, str]]:
    return [(cell.model.name, cell.variant.name) for cell in cells]


def test_what_is_elementwise_follows_from_the_rules() -> None:
    """Those of the table are known; a further algorithm follows by itself."""
    assert {*suite.list_elementwise(), "adafactor"} >= set(BYTES)
    assert not {"adafactor", "muon", "sparseadam", "lbfgs"} & {*suite.list_elementwise()}
    assert suite.list_elementwise_classes().count("SGD") == 1


def test_all_is_every_optimizer_where_it_makes_sense() -> None:
    every = names(suite.choose(None, None, every_one=True))
    assert len(every) == len(set(every))
    covered = {catalog.find_variant(name).cls for _, name in every}
    assert covered == set(catalog.optimizers().values())
    for name in suite.list_elementwise():
        assert [model for model, one in every if one == name] == [
            "one",
            "mlp",
            "lenet",
            "resnet18",
            "big",
            "gpt2",
            "small",
            "tiny",
            "groups",
        ]
    assert set(names(suite.choose(None, None))) < set(every)
    measured = {*suite.list_elementwise(), "adafactor"}
    assert set(names(suite.choose("gpt2", None, every_one=True))) == {
        ("gpt2", name) for name in measured
    }
    assert names(suite.choose("embedding-1m", None, every_one=True)) == [
        ("embedding-1m", "sparseadam")
    ]
    assert ("matrices", "adamw") in names(suite.choose("matrices", None))


OWN_MODEL = """
import torch
from torch import nn

def make():
    layers = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))
    layers[0].bias.requires_grad_(False)
    return layers

def fails():
    raise ValueError("no data here")

def number():
    return 3

def frozen():
    return nn.Linear(2, 2).requires_grad_(False)

constant = 1
"""


def test_a_model_of_the_users_own(tmp_path: Path) -> None:
    """Its shapes are those of the parameters that are trained."""
    file = tmp_path / "net.py"
    file.write_text(OWN_MODEL)
    (cell,) = suite.choose(f"{file}:make", "adamw")
    assert cell.model.shapes == [(3, 5), (2, 3), (2,)]
    assert cell.model.title == "make of net.py"
    assert find_model(f"{file}:make").parameters == 23


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("net.py:nothing", "has no function 'nothing'"),
        ("net.py:constant", "has no function 'constant'"),
        ("net.py:fails", r"raised ValueError \(no data here\)"),
        ("net.py:number", "an object of class int, not a module"),
        ("net.py:frozen", "without parameters that need gradients"),
        ("other.py:make", "there is no Python file"),
        ("wrong.py:make", "cannot be run"),
    ],
)
def test_a_model_that_cannot_be_made(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "net.py").write_text(OWN_MODEL)
    (tmp_path / "wrong.py").write_text("import what_nobody_has")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(catalog.UnknownName, match=words):
        suite.choose(name, "adamw")


def test_named_optimizers_are_measured_where_they_make_sense() -> None:
    assert names(suite.choose(None, "muon,sparseadam,lbfgs")) == [
        ("tiny", "lbfgs"),
        ("matrices", "muon"),
        ("million", "lbfgs"),
        ("embedding-1m", "sparseadam"),
        ("embedding-10k", "sparseadam"),
    ]
    assert names(suite.choose("matrices,gpt2", " Muon , AdamW")) == [
        ("matrices", "muon"),
        ("matrices", "adamw"),
        ("gpt2", "adamw"),
    ]
    assert names(suite.choose("resnet50", "muon-adamw")) == [("resnet50", "muon-adamw")]


def test_processes_are_started_where_they_say_most() -> None:
    fresh = [cell for cell in suite.choose(None, None, every_one=True) if cell.fresh]
    assert set(names(fresh)) == suite.FRESH
    assert all(cell.fresh for cell in suite.choose("small", "sgd,asgd"))
    assert not any(cell.fresh for cell in suite.choose("tiny", "lbfgs"))


@pytest.mark.parametrize(
    ("models", "optimizers", "sentence"),
    [
        ("gpt3", None, "there is no model 'gpt3': did you mean gpt2?"),
        ("tiny", "adamv", "there is no optimizer 'adamv': did you mean adam"),
        ("tiny", "sgd-momentun", "there is no optimizer 'sgd-momentun': did you mean sgd-momentum"),
        ("tiny", "nowhere:Rule", "'nowhere:Rule' cannot be imported"),
        (
            "tiny",
            "muon",
            "muon takes only matrices, and tiny has other parameters: choose another --model",
        ),
        (
            "matrices,gpt2",
            "muon",
            "muon takes only matrices, and gpt2 has other parameters: choose another --model",
        ),
        (
            "big",
            "sgd,sparseadam",
            "sparseadam takes sparse gradients, and those of big are dense: choose another",
        ),
        (
            "embedding-1m",
            "adamw",
            "embedding-1m has sparse gradients, and adamw takes dense ones: choose another",
        ),
    ],
)
def test_impossible_names_are_one_sentence(
    models: str, optimizers: str | None, sentence: str
) -> None:
    with pytest.raises((catalog.UnknownName, suite.BenchError)) as caught:
        suite.choose(models, optimizers)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["lbfgs", "lbfgs-wolfe", "sparseadam"])
def test_what_needs_more_than_dense_gradients_does_not_train(name: str) -> None:
    with pytest.raises(catalog.UnknownName, match="which no task has"):
        catalog.find_trainable(name)


@pytest.mark.parametrize(
    ("models", "optimizers", "gigabytes"),
    [("llama-1b", "adamw", r"24\.6"), ("llama-1b", "lbfgs", r"213\.1")],
)
def test_a_model_that_does_not_fit_is_refused(
    models: str, optimizers: str, gigabytes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "available_memory", lambda: 2**30)
    with pytest.raises(
        suite.BenchError, match=rf"needs {gigabytes} GiB of memory and 1\.0 GiB are free"
    ):
        measure.run(suite.choose(models, optimizers))


def test_goals_are_of_what_there_is() -> None:
    """Each names models, classes and ratios that a full run has, and no result has two goals for
    one ratio."""
    every = suite.choose(None, None, every_one=True)
    present = {(cell.model.name, cell.variant.cls.__name__) for cell in every}
    summary = {
        "times_default",
        "times_best",
        "share_of_limit",
        "times_shorter_table",
        "us_per_tensor",
    }
    for goal in goals.cpu_goals():
        assert {(model, name) for model in goal.models for name in goal.classes} <= present
        assert goal.what in summary
    for model, name in present:
        whats = [goal.what for goal in goals.find_goals(model, name, goals.cpu_goals())]
        assert len(whats) == len(set(whats))
        assert whats or model in ("groups", "resnet18")


def test_goals_are_judged() -> None:
    def result(model: str, class_name: str, ours: float, **summary: float) -> dict:
        contender = {"onepass": {"median_ms": ours}}
        return {
            "model": model,
            "optimizer": "x",
            "class": class_name,
            "contenders": contender,
            "summary": summary,
        }

    results = [
        result("big", "AdamW", 1.0, share_of_limit=0.94, times_best=1.0, times_default=7.0),
        result("gpt2", "Rprop", 1.0, share_of_limit=0.96, times_best=None, times_default=7.0),
        result("embedding-10k", "SparseAdam", 2.0, times_best=2.5),
        result("embedding-1m", "SparseAdam", 3.0, times_best=2.5),
    ]
    goals.judge(results, goals.cpu_goals())
    judged = [[(goal["what"], goal["met"]) for goal in one["goals"]] for one in results]
    assert judged[0] == [("share_of_limit", False), ("times_best", True)]
    assert judged[1] == [("share_of_limit", True)]
    assert judged[3] == [("times_best", True), ("times_shorter_table", False)]
    lines = report.list_goals(results)
    assert lines[0] == "goals: 4 of 6 are met, but not"
    assert lines[1].strip() == "big, x: 94.0 % of the memory limit (< 95 %)"
    assert (
        lines[2].strip()
        == "embedding-1m, x: 1.50 times as long as in the table of 10,000 rows (> 1.25)"
    )


def test_peak_counts_what_is_freed_within_the_step() -> None:
    megabytes = probe.peak_megabytes(lambda: torch.ones(4 * 2**20).sum())
    if megabytes is None:
        pytest.skip("this system has no high-water mark of memory that can be set back")
    assert 16 <= megabytes < 20


def test_probe_tells_first_step_and_peak() -> None:
    found = probe.probe("tiny", "adamw", "onepass")
    assert found.keys() == {"first_ms", "state_ms", "state_bytes", "peak_mb"}
    assert found["state_bytes"] == 1000 * (2 * 16 * 4 + 4)


def test_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--model", "tiny", "--optimizer", "SGD", "--seconds", "0.01", "--no-fresh"]
    assert cli.main(["bench", *words, "--json", "out.json", "--plot", "out.png"]) == 0
    assert capsys.readouterr().err == ""
    assert json.loads(Path("out.json").read_text())["results"][0]["optimizer"] == "sgd"
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")
    for bad in (["--model", "gpt3"], ["--optimizer", "adamv"], ["--json", "no/folder.json"]):
        assert cli.main(["bench", *bad]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
