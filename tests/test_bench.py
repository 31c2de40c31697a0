"""`onepass bench`: real shapes, a limit that moves the same bytes, a whole report. No test looks at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from onepass import catalog, cli
from onepass.bench import contenders, measure, probe, report
from onepass.bench.shapes import MODELS

SIZES = {
    "big": (2, 33_554_432),
    "gpt2": (148, 124_439_808),
    "resnet50": (161, 25_557_032),
    "llama-1b": (201, 1_100_048_384),
    "small": (1000, 4_096_000),
    "tiny": (1000, 16_000),
    "groups": (1000, 4_096_000),
}
VARIANTS = ("sgd", "sgd-momentum", "adam", "adam-amsgrad", "adamw")


@pytest.fixture(scope="module")
def tiny_report() -> dict:
    """A whole run of the smallest model, without the measurements in fresh processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    models, variants = measure.choose("tiny", "AdamW,sgd")
    result = measure.run(models, variants, seconds=0.01, fresh=False)
    torch.set_num_threads(threads)
    return result


def test_every_model_is_listed() -> None:
    assert SIZES.keys() == MODELS.keys()


@pytest.mark.parametrize("name", SIZES)
def test_shapes_are_those_of_the_real_model(name: str) -> None:
    model = MODELS[name]
    assert (len(model.shapes), model.parameters) == SIZES[name]
    assert all(math.prod(shape) > 0 for shape in model.shapes)


def test_groups_have_different_learning_rates() -> None:
    groups = contenders.Workload(MODELS["groups"]).groups()
    assert len(groups) == len({group["lr"] for group in groups}) == 400
    assert sum(len(group["params"]) for group in groups) == 1000


@pytest.mark.parametrize("name", VARIANTS)
def test_limit_moves_the_same_bytes(name: str) -> None:
    program = contenders.program_of(catalog.find_variant(name))
    limit = contenders.Limit(program).program
    assert limit.bytes_per_parameter == program.bytes_per_parameter
    assert {(c.name, c.read, c.written) for c in limit.columns} == {
        (c.name, c.read, c.written) for c in program.columns
    }


def test_limit_changes_nothing() -> None:
    workload = contenders.Workload(MODELS["tiny"])
    variant = catalog.find_variant("adamw")
    contenders.seat(workload, lambda params: contenders.make_ours(variant, params)).step()
    tensors = [*workload.params, *workload.columns["exp_avg"], *workload.columns["exp_avg_sq"]]
    before = [t.detach().clone() for t in tensors]
    contenders.Limit(contenders.program_of(variant)).place(workload)()
    assert all(map(torch.equal, before, tensors))


@pytest.mark.parametrize("name", VARIANTS)
def test_contenders_share_their_state_and_step_alike(name: str) -> None:
    variant = catalog.find_variant(name)
    workload = contenders.Workload(MODELS["tiny"])
    start = [p.detach().clone() for p in workload.params]
    makers = [lambda params: contenders.make_ours(variant, params)]
    makers += [lambda params, mode=mode: contenders.make_torch(variant, params, mode) for mode in contenders.TORCH]
    ends = []
    for make in makers:
        optimizer = contenders.seat(workload, make)
        optimizer.step()
        for column, tensors in workload.columns.items():
            held = [optimizer.state[p][column] for p in workload.params]
            assert all(a.data_ptr() == b.data_ptr() for a, b in zip(held, tensors, strict=True))
        ends.append(torch.cat([p.detach().clone() for p in workload.params]))
        with torch.no_grad():
            for p, value in zip(workload.params, start, strict=True):
                p.copy_(value)
            for tensor in (t for tensors in workload.columns.values() for t in tensors):
                tensor.zero_()
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0])


def test_report_is_whole(tiny_report: dict) -> None:
    assert json.loads(json.dumps(tiny_report)) == tiny_report
    assert tiny_report.keys() == {"schema", "machine", "bandwidth", "import_ms", "results"}
    assert {"cpu", "cores", "threads", "torch", "numpy", "llvmlite", "date", "command"} <= tiny_report["machine"].keys()
    assert [result["optimizer"] for result in tiny_report["results"]] == ["adamw", "sgd"]
    for result in tiny_report["results"]:
        assert result["bytes_per_parameter"] == result["limit_bytes_per_parameter"]
        assert list(result["contenders"]) == ["onepass", "for-loop", "default", "foreach", "fused", "memory limit"]
        for contender in result["contenders"].values():
            assert 0 < contender["min_ms"] <= contender["median_ms"]
            assert contender["steps"] > 0
        assert result["summary"]["best_mode"] in contenders.TORCH
        assert None not in result["summary"].values()
    assert [sum(result["bytes_per_parameter"]) for result in tiny_report["results"]] == [28, 12]


def test_report_is_saved_and_drawn(tiny_report: dict, tmp_path: Path) -> None:
    measure.save(tiny_report, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == tiny_report
    report.plot(tiny_report, tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 2
    assert report.make_step_table(tiny_report["results"]).row_count == 2
    assert report.make_fresh_table(tiny_report["results"]).row_count == 0
    assert report.list_facts(tiny_report)


def test_what_torch_lacks_is_said() -> None:
    class Ours(catalog.find_class("sgd")):
        pass

    with pytest.raises(contenders.Missing, match="torch has no Ours"):
        contenders.make_torch(catalog.Variant("ours", Ours), [], "default")


@pytest.mark.parametrize(
    ("models", "optimizers", "sentence"),
    [
        ("gpt3", None, "there is no model 'gpt3': did you mean gpt2?"),
        ("tiny", "adamv", "there is no optimizer 'adamv': did you mean adam"),
        ("tiny", "sgd-momentun", "there is no optimizer 'sgd-momentun': did you mean sgd-momentum"),
        ("tiny", "nowhere:Rule", "'nowhere:Rule' cannot be imported"),
    ],
)
def test_unknown_names_are_one_sentence(models: str, optimizers: str | None, sentence: str) -> None:
    with pytest.raises(catalog.UnknownName) as caught:
        measure.choose(models, optimizers)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


def test_a_model_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "available_memory", lambda: 2**30)
    models, variants = measure.choose("llama-1b", "adamw")
    with pytest.raises(measure.BenchError, match=r"needs 24\.6 GiB of memory and 1\.0 GiB are free"):
        measure.run(models, variants)


def test_peak_counts_what_is_freed_within_the_step() -> None:
    megabytes = probe.peak_megabytes(lambda: torch.ones(4 * 2**20).sum())
    if megabytes is None:
        pytest.skip("this system has no high-water mark of memory that can be set back")
    assert 16 <= megabytes < 20


def test_probe_tells_first_step_and_peak() -> None:
    found = probe.probe("tiny", "adamw", "onepass")
    assert found.keys() == {"first_ms", "state_ms", "state_bytes", "peak_mb"}
    assert found["state_bytes"] == 1000 * (2 * 16 * 4 + 4)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
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
