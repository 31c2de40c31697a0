"""`benchmarks/gpu.py`: its whole course without a GPU, and what becomes of a stage that fails."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from support.fake_cuda import stand_in

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"
if not SCRIPT.exists():
    pytest.skip("benchmarks are no part of a package", allow_module_level=True)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses look for it.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load(SCRIPT)


@pytest.mark.parametrize(
    "name",
    ["machine", "checks", "whole", "many", "every", "uploads", "graphs", "matrices", "others"],
)
def test_every_stage_runs_dry(
    name: str, script: ModuleType, tmp_path: Path, one_thread: None
) -> None:
    context = script.Context(stand_in(), 60.0, tmp_path / "result.json", dry=True)
    result = script.STAGES[name][0](context)
    assert json.loads(json.dumps(result)) == result
    if name == "checks":
        assert result["passed"], result
    if name in script.ROWS:
        assert json.loads(context.path.read_text()) == result
        assert all(row["contenders"]["onepass"]["steps"] > 0 for row in result)


def test_no_stage_is_forgotten(script: ModuleType) -> None:
    """All are tried dry, here or in the test of the whole; and those that are rows are found."""
    assert set(script.STAGES) - {"first"} == {
        *("machine", "checks", "whole", "many", "every", "uploads", "graphs", "matrices", "others")
    }
    assert set(script.ROWS) < set(script.STAGES)
    assert list(script.STAGES)[1] == "checks"
    assert script.OTHERS.keys() == script.PUBLISHED.keys()


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words])
    return script.main()


def test_the_course_ends_in_one_file(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(SCRIPT.parent.parent))
    out = tmp_path / "out"
    assert run(script, monkeypatch, "--dry-run", "--stages", "machine,many", "--out", str(out)) == 0
    report = json.loads((out / "gpu.json").read_text())
    assert {name: stage["status"] for name, stage in report["stages"].items()} == {
        "machine": "done",
        "many": "done",
    }
    assert report["stages"]["machine"]["result"]["gpu"]["name"] == "a stand-in"
    assert {goal["what"] for goal in report["goals"]} >= {"host_of_goal", "times_fused"}
    said = capsys.readouterr().out
    assert "groups100" in said
    assert "many: done" in said


def test_without_a_gpu_it_says_so(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(script.torch.cuda, "is_available", lambda: False)
    assert run(script, monkeypatch, "--out", str(tmp_path / "out")) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert not (tmp_path / "out").exists()


def test_a_stage_has_no_more_than_what_is_left(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, float] = {}

    def start(name: str, seconds: float, *_: object) -> dict:
        given[name] = seconds
        return {"status": "done", "seconds": seconds, "result": None}

    monkeypatch.setattr(script, "start_stage", start)
    assert run(script, monkeypatch, "--dry-run", "--minutes", "1", "--out", str(tmp_path)) == 0
    assert given["machine"] <= script.STAGES["machine"][1]
    assert given["checks"] <= 60
    assert run(script, monkeypatch, "--dry-run", "--minutes", "0", "--out", str(tmp_path)) == 1
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert {stage["status"] for stage in report["stages"].values()} == {"left out: no time"}


@pytest.mark.parametrize(
    ("ends", "seconds", "status"),
    [
        ("raise SystemExit(3)", 60.0, "ended with code 3"),
        ("time.sleep(60)", 2.0, "stopped after 2 s"),
    ],
)
def test_a_stage_that_fails_costs_nothing_but_itself(
    ends: str,
    seconds: float,
    status: str,
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it had written and said is kept; so is what follows it."""
    stage = tmp_path / "stage.py"
    stage.write_text(
        "import sys, time\n"
        "open(sys.argv[sys.argv.index('--out') + 1], 'w').write('[1, 2]')\n"
        f"print('half way', flush=True)\n{ends}\n"
    )
    monkeypatch.setattr(script, "__file__", str(stage))
    found = script.start_stage("whole", seconds, True, "cuda", tmp_path / "log")
    assert found["status"] == status
    assert found["result"] == [1, 2]
    assert found["last"] == ["half way"]
    assert (tmp_path / "log").read_text() == "--- whole\nhalf way\n"


def test_what_pytest_says_is_read(script: ModuleType) -> None:
    """With xdist and without it; a name that comes again in the summary counts once."""
    found = script.read_log(
        [
            "[gw0] [  1%] PASSED tests/test_cuda.py::test_on_a_gpu[bits[Adam-betas=(0.8, 0.95)]] ",
            "tests/test_cuda.py::test_on_a_gpu[bits[SGD]] PASSED          [ 50%]",
            "tests/test_cuda.py::test_on_a_gpu[graph] FAILED              [ 75%]",
            "[gw1] [ 99%] SKIPPED tests/test_cuda.py::test_on_a_gpu[two] ",
            "FAILED tests/test_cuda.py::test_on_a_gpu[graph] - AssertionError: PASSED nothing",
            "1 failed, 2 passed, 1 skipped in 3.21s",
        ],
        1,
    )
    assert not found["passed"]
    assert found["failed"] == ["test_on_a_gpu[graph]"]
    assert found["said"].startswith("2 passed, 1 failed, 1 left out; 1 failed")


def test_first_steps_and_peaks_join_their_rows(script: ModuleType) -> None:
    contender = {"onepass": {"median_ms": 1.0}}
    row = {
        "model": "gpt2",
        "optimizer": "nadam",
        "class": "NAdam",
        "parameters": 10**6,
        "contenders": contender,
    }
    probe = {"first_ms": 2500.0, "warm_ms": 400.0, "peak_mb": 0.02}
    stages = {
        "every": {"result": [row | {"summary": {"times_foreach": 4.0}}]},
        "first": {
            "result": {"gpt2 nadam onepass": probe, "gpt2 adamw onepass": {"error": "no GPU"}}
        },
        "many": {"result": None},
    }
    (joined,) = script.summarize(stages)
    assert {goal["what"]: goal["met"] for goal in joined["goals"]} == {
        "times_foreach": True,
        "first_s": True,
        "warm_s": False,
        "peak_share": True,
    }


@pytest.mark.slow
def test_the_whole_course(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(SCRIPT.parent.parent))
    assert run(script, monkeypatch, "--dry-run", "--out", str(tmp_path)) == 0
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert set(report["stages"]) == set(script.STAGES)
    assert report["stages"]["first"]["result"]["tiny adamw onepass"]["warm_ms"] > 0
