"""`onepass bench --device cuda`, as far as it goes without a GPU: times by clocks of our own,
tables, goals, errors."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.fake_cuda import StandIn, stand_in

from onepass.app import catalog, cli
from onepass.app.bench import contenders, descent, fresh, goals, gpu, measure, probe, report, suite
from onepass.app.bench.shapes import Model

FEW = Model("gpt2", "a few matrices and a vector", lambda: [(8, 4), (3,), (4, 8)])


class Clocked(StandIn):
    """A host and a device with clocks of their own: what is queued runs after all before it, and
    after its call."""

    def __init__(self) -> None:
        self.host, self.device = 0.0, 0.0
        self.held: list[float] = []

    def clock(self) -> float:
        return max(self.device, self.host)

    def queue(self, call: float, work: float) -> None:
        """An operation whose call takes so many seconds on the host, and its work so many on the
        device."""
        self.host += call
        self.device = max(self.device, self.host) + work

    def _sleep(self, cycles: int) -> None:
        self.held.append(1e-9 * cycles)
        self.queue(0.0, 1e-9 * cycles)

    def synchronize(self, device: torch.device) -> None:
        self.host = self.clock()


def clocked(monkeypatch: pytest.MonkeyPatch) -> tuple[Clocked, gpu.Gpu]:
    cuda = Clocked()
    monkeypatch.setattr(gpu, "time", SimpleNamespace(perf_counter=lambda: cuda.host))
    return cuda, stand_in(cuda)


@pytest.mark.parametrize(("call", "work"), [(2e-5, 1e-3), (5e-3, 1e-3)])
def test_host_and_device_are_timed_apart(
    call: float, work: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of five operations, where the device waits for the host and where it does not."""
    cuda, one = clocked(monkeypatch)
    sample = one.timer(lambda: [cuda.queue(call, work) for _ in range(5)])()
    assert sample.host == pytest.approx(5 * call)
    assert sample.wall == pytest.approx(max(5 * call + work, call + 5 * work))
    # The queue was held back until all five were in it: no gap between them, and nothing of the
    # host's.
    assert sample.device == pytest.approx(5 * work)
    assert cuda.held[-1] == pytest.approx(gpu.ROOM * 5 * call)


def test_nothing_holds_the_queue_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, one = clocked(monkeypatch)
    one.timer(lambda: cuda.queue(30.0, 1e-3))()
    assert cuda.held[-1] == pytest.approx(gpu.LONGEST_HOLD)


def test_a_step_takes_the_longer_of_host_and_device() -> None:
    samples = [
        gpu.Sample(0.003, 0.001, 0.004),
        gpu.Sample(0.005, 0.002, 0.006),
        gpu.Sample(0.004, 0.009, 0.009),
    ]
    found = gpu.condense(samples)
    assert found == pytest.approx(
        {
            "median_ms": 4.0,
            "min_ms": 3.0,
            "steps": 3,
            "device_ms": 4.0,
            "host_ms": 2.0,
            "wall_ms": 6.0,
        }
    )
    assert gpu.condense([gpu.Sample(0.001, 0.007, 0.008)])["median_ms"] == pytest.approx(7.0)


def test_the_limit_is_that_of_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    one = stand_in()
    one.__dict__["bandwidth"] = {"copy_gigabytes_per_second": 4000.0}
    assert one.limit([28], 10**9)["median_ms"] == pytest.approx(7.0)
    assert one.limit([8, 16], 10**9)["median_ms"] == pytest.approx(6.0)
    monkeypatch.undo()
    assert stand_in().bandwidth["copy_gigabytes_per_second"] > 0


def test_what_is_overwritten_is_larger_than_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = StandIn()
    one = stand_in(cuda)
    assert one._flush.nbytes == cuda.memory // 16
    properties = SimpleNamespace(L2_cache_size=1 << 22)
    monkeypatch.setattr(cuda, "get_device_properties", lambda device: properties)
    assert stand_in(cuda)._flush.nbytes == gpu.CACHE_TIMES << 22


@pytest.mark.parametrize("name", ["adamw", "nadam", "adafactor"])
def test_a_whole_report(name: str) -> None:
    cells = [suite.Cell(FEW, catalog.find_variant(name), fresh=False)]
    found = measure.run(cells, seconds=0.01, fresh=False, gpu=stand_in())
    assert json.loads(json.dumps(found)) == found
    assert {"name", "memory_gib", "driver", "cuda", "triton"} <= found["machine"]["gpu"].keys()
    result = found["results"][0]
    assert list(result["contenders"]) == [
        "onepass",
        "onepass capturable",
        "default",
        "foreach",
        "fused",
        "capturable",
        "memory limit",
    ]
    ours = result["contenders"]["onepass"]
    assert 0 < ours["host_ms"] <= ours["wall_ms"]
    assert ours["median_ms"] == max(ours["host_ms"], ours["device_ms"])
    assert result["summary"]["host_of_goal"] == pytest.approx(
        1e3 * ours["host_ms"] / (30 + 0.1 * 3)
    )
    assert {goal["what"] for goal in result["goals"]} <= set(report.WORDS)
    assert len(result["goals"]) >= 1
    for table in (report.make_step_table, report.make_device_table):
        assert table(found["results"]).row_count == 1
    assert any("a stand-in" in line for line in report.list_facts(found))
    assert report.list_goals(found["results"])


def test_fresh_processes_begin_with_an_empty_cache_and_find_it_warm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def python(*arguments: str, **variables: str) -> str:
        asked.append((arguments[4], arguments[-1], variables["TRITON_CACHE_DIR"]))
        return json.dumps(
            {"first_ms": 2000.0 / len(asked), "state_ms": 1.0, "state_bytes": 8, "peak_mb": 1e-3}
        )

    monkeypatch.setattr(fresh, "_python", python)
    cells = [suite.Cell(FEW, catalog.find_variant("adamw"), fresh=True)]
    monkeypatch.setattr(measure, "measure_import", lambda: 1.0)
    result = measure.run(cells, seconds=0.01, gpu=stand_in())["results"][0]
    assert [(who, device) for who, device, _ in asked] == [
        ("onepass", "cpu"),
        ("onepass", "cpu"),
        ("default", "cpu"),
        ("fused", "cpu"),
    ]
    caches = [cache for _, _, cache in asked]
    assert caches[0] == caches[1]
    assert len(set(caches)) == 3
    assert result["summary"]["first_s"] == pytest.approx(2.0)
    assert result["summary"]["warm_s"] == pytest.approx(1.0)
    assert result["summary"]["peak_share"] == pytest.approx(1e3 / (4 * 67))
    assert {"first_s", "warm_s", "peak_share"} <= {goal["what"] for goal in result["goals"]}


def test_a_peak_is_what_lies_above_parameters_and_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allocated: 1000 bytes before; state, 5000 of tables and temporaries at the peak."""
    cuda = StandIn()
    state = 1000 * (2 * 16 * 4 + 4)
    monkeypatch.setattr(cuda, "memory_allocated", lambda device: 1000)
    monkeypatch.setattr(cuda, "max_memory_allocated", lambda device: 1000 + state + 5000)
    found = probe.probe("tiny", "adamw", "onepass", stand_in(cuda))
    assert found["peak_mb"] == pytest.approx(5e-3)
    assert found["state_bytes"] == state


def test_a_step_with_a_closure_is_timed_without_it() -> None:
    variant = catalog.find_variant("lbfgs")
    model = Model("few", "a few", lambda: [(4, 2), (3,)])
    one = descent.TimedDescent(
        model, lambda p: contenders.make_ours(variant, p, **descent.LBFGS_OPTIONS), stand_in()
    )
    assert one.time_step() > 0
    result = measure.run(
        [suite.Cell(model, variant, fresh=False)], seconds=0.01, fresh=False, gpu=stand_in()
    )
    assert result["results"][0]["contenders"]["onepass capturable"] == {
        "missing": "a step with a closure cannot be captured"
    }
    assert report.make_device_table(result["results"]).row_count == 0


def test_a_gpu_has_its_own_suite_and_goals() -> None:
    cells = suite.choose(None, None, every_one=True, gpu=True)
    present = {(cell.model.name, cell.variant.cls.__name__) for cell in cells}
    for name in suite.USUAL_ON_GPU:
        assert {cell.variant.name for cell in cells if cell.model.name == name} == {
            *suite.list_elementwise(),
            "adafactor",
        }
    for goal in goals.gpu_goals():
        on = {
            (model, name)
            for model in goal.models
            for name in goal.classes
            if model in suite.USUAL_ON_GPU
        }
        assert on <= present
    for model, name in present:
        whats = [goal.what for goal in goals.find_goals(model, name, goals.gpu_goals())]
        assert len(whats) == len(set(whats))


def test_memory_is_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = StandIn()
    monkeypatch.setattr(cuda, "memory", 2**30)
    with pytest.raises(suite.BenchError, match=r"needs 27\.6 GiB of memory and 1\.0 GiB are free"):
        measure.run(suite.choose("llama3-1b", "adamw", gpu=True), gpu=stand_in(cuda))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("gpu", "there is no device 'gpu': choose cpu, cuda, or one of several GPUs as cuda:1."),
        ("meta", "steps are measured on cpu and cuda devices, not on meta: choose one of them."),
    ],
)
def test_impossible_devices_are_one_sentence(
    name: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "--device", name]) == 2
    assert capsys.readouterr() == ("", f"onepass: {sentence}\n")


def test_an_absent_device_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        suite.BenchError, match=r"^--device cuda needs a GPU, and torch .* sees none: leave it out"
    ):
        gpu.find_gpu("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(
        suite.BenchError,
        match=r"^there is no cuda:2: this machine has 2 GPUs, counted from cuda:0\.$",
    ):
        gpu.find_gpu("cuda:2")
    monkeypatch.setattr(gpu.kernel, "why_no_kernels", lambda device: "there is no triton")
    with pytest.raises(
        suite.BenchError, match=r"^onepass cannot be measured on cuda: there is no triton\.$"
    ):
        gpu.find_gpu("cuda")
    assert gpu.find_gpu("cpu") is None


def test_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def find(name: str) -> gpu.Gpu:
        asked.append(name)
        return stand_in()

    monkeypatch.setattr("onepass.app.commands.bench.find_gpu", find)
    words = [
        "--model",
        "tiny",
        "--optimizer",
        "sgd,adamw",
        "--seconds",
        "0.01",
        "--no-fresh",
        "--device",
        "cuda:1",
    ]
    out = tmp_path / "out.json"
    assert cli.main(["bench", *words, "--json", str(out), "--plot", str(tmp_path / "out.png")]) == 0
    said, err = capsys.readouterr()
    assert (asked, err) == (["cuda:1"], "")
    assert "capturable" in said
    assert "a stand-in" in said
    assert "a step takes the longer of its time on the device and its time on the host" in said
    found = json.loads(out.read_text())
    assert [result["optimizer"] for result in found["results"]] == ["sgd", "adamw"]
    assert (tmp_path / "out.png").exists()
