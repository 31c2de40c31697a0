"""Everything that is promised on a GPU, in one call of under 8 minutes: first whether it is right,
then how fast it is.

    PYTHONPATH=. python benchmarks/gpu.py --out FOLDER # gpu.json and log
    PYTHONPATH=. python benchmarks/gpu.py --dry-run    # the same course on the CPU, very small

Each stage is a process of its own with a budget of time: one that crashes or hangs costs nothing
but itself, and what is known is written after each, what such a one had found included.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from onepass.app.bench import measure, suite
from onepass.app.bench.contenders import Workload, make_capturable, make_ours, make_torch, seat
from onepass.app.bench.goals import GPU_GOALS, judge
from onepass.app.bench.gpu import Gpu, condense, find_gpu
from onepass.app.bench.machine import describe_machine
from onepass.app.bench.report import WIDTH, list_goals, make_device_table, make_step_table
from onepass.app.bench.shapes import MODELS, Model
from onepass.app.catalog import find_variant

Result = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
FIRST = (*suite.ELEMENTWISE, "adafactor")
# Processes at a time that take first steps: they wait for the disk and for compilers on one core
# each.
AT_ONCE = 4

# A stage is not begun with less.
LEAST_SECONDS = 5
# What others say of themselves, for where they cannot be installed; benchmarks/README.md names the
# sources.
PUBLISHED = {
    "bitsandbytes": "training of ViT-H takes 0.85 of the time with Adam8bit, "
    "on an RTX 4070 Ti SUPER (pytorch/ao#478)",
    "apex": "training of T5-base is 1.12 times as fast with FusedAdam, "
    "on an RTX 3090 (huggingface/transformers#14744)",
    "optimi": "its Triton kernels are faster than torch's fused ones; "
    "a picture, no ratio (optimi, docs/triton.md)",
}
OTHERS = {
    "bitsandbytes": [
        ("bitsandbytes.optim", "AdamW32bit", {}),
        ("bitsandbytes.optim", "AdamW8bit", {}),
    ],
    "apex": [("apex.optimizers", "FusedAdam", {"adam_w_mode": True})],
    "optimi": [("optimi", "AdamW", {})],
}


@dataclass(frozen=True)
class Place:
    """Where a stage runs, how long it may take, where it leaves what it finds, and with how much
    work."""

    gpu: Gpu
    seconds: float
    path: Path
    dry: bool = False

    def keep(self, result: Any) -> None:
        """Write what is known so far."""
        measure.save(result, self.path)

    def model(self, name: str) -> Model:
        """One of the benchmark's models; in a dry run, a few small tensors by its name."""
        shapes = [(8, 4), (4, 8)] if name == "matrices" else [(8, 4), (3,), (4, 8)]
        return (
            replace(MODELS[name], list_shapes=lambda: shapes, groups=1)
            if self.dry
            else MODELS[name]
        )

    def measure(self, models: str, optimizers: tuple[str, ...], seconds: float) -> list[Result]:
        """The report's rows of these optimizers on these models, so many seconds each."""
        cells = [
            suite.Cell(self.model(m), find_variant(o), fresh=False)
            for m in models.split(",")
            for o in optimizers
        ]
        rows: list[Result] = []
        for cell in cells[: 2 if self.dry else None]:
            rows += measure.run(
                [cell], seconds=0.01 if self.dry else seconds, fresh=False, gpu=self.gpu
            )["results"]
            self.keep(rows)
        return rows


# Stages: functions of a place that return plain data.


def describe(place: Place) -> Result:
    return {**describe_machine(), "gpu": place.gpu.describe(), "bandwidth": place.gpu.bandwidth}


def check_all(place: Place) -> Result:
    """The checks of tests/test_cuda.py: by pytest, or without it."""
    if importlib.util.find_spec("pytest") is None or place.dry:
        return _run_checks(place)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-v",
        "--tb=short",
        "--durations=10",
        "-W",
        "default",
    ]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(8, max(1, (os.cpu_count() or 1) // 2)))]
    log: list[str] = []
    with subprocess.Popen(
        [*command, "tests/test_cuda.py"],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        late = threading.Timer(place.seconds - 8, process.kill)
        late.start()
        for line in process.stdout or ():
            log.append(line.rstrip())
            print(line, end="", flush=True)
        late.cancel()
    return read_log(log, process.returncode)


# A test's fate and name in pytest's lines, in the course and in the summary; with xdist the fate
# comes first.
FATES = "PASSED|SKIPPED|FAILED|ERROR"
LINE = re.compile(rf"(?:({FATES}) )?\S+::(\w+(?:\[.*?\])?)(?:\s*$| - | ({FATES})\b)")


def read_log(log: list[str], code: int) -> Result:
    """What pytest's lines say of each test, also where it was stopped before its summary."""
    seen: dict[str | None, set[str]] = {fate: set() for fate in FATES.split("|")}
    for found in filter(None, map(LINE.search, log)):
        seen.setdefault(found[1] or found[3], set()).add(found[2])
    failed = sorted(seen["FAILED"] | seen["ERROR"])
    said = (
        f"{len(seen['PASSED'])} passed, {len(failed)} failed, {len(seen['SKIPPED'])} left out; "
        f"{(log or [''])[-1]}"
    )
    return {"passed": code == 0, "said": said, "failed": failed, "last": log[-40:] if code else []}


def load_from_tests(name: str) -> Any:
    """A module of the folder of tests."""
    if str(ROOT / "tests") not in sys.path:
        sys.path.append(str(ROOT / "tests"))
    return importlib.import_module(name)


def _run_checks(place: Place) -> Result:
    checks = load_from_tests("support.gpu_cases")
    for name in ("gpu_checks", "gpu_graph_checks", "gpu_stream_checks"):
        load_from_tests(f"support.{name}")
    fates: dict[str, str] = {}
    end = time.monotonic() + place.seconds - 5
    for name in list(checks.CHECKS)[:: 12 if place.dry else 1]:
        if time.monotonic() > end:
            break
        try:
            checks.run(name, place.gpu.device)
            fates[name] = "passed"
        except checks.Skip as why:
            fates[name] = f"left out: {why}"
        except Exception:
            fates[name] = traceback.format_exc()[-2000:]
            print(f"{name}\n{fates[name]}", flush=True)
    failed = [name for name, fate in fates.items() if not fate.startswith(("passed", "left out"))]
    said = f"{len(fates)} of {len(checks.CHECKS)} checks, {len(failed)} failed"
    return {"passed": not failed, "said": said, "failed": failed}


def measure_whole(place: Place) -> list[Result]:
    """AdamW on whole models: the share of the limit, and torch's modes."""
    return place.measure("gpt2,llama3-1b", ("adamw",), 4.0)


def measure_many(place: Place) -> list[Result]:
    """Many small tensors, in one group and in a hundred: what the host needs."""
    return place.measure(
        "groups100,small", ("adamw", "adam", "sgd-momentum", "sgd", "adagrad", "nadam"), 1.0
    )


def measure_every(place: Place) -> list[Result]:
    """Every algorithm beside torch's foreach."""
    return place.measure("gpt2", tuple(name for name in FIRST if name != "adamw"), 1.0)


def measure_matrices(place: Place) -> list[Result]:
    """What is bound by products of matrices, and sparse gradients."""
    rows = place.measure("matrices", ("muon",), 1.0)
    return (
        rows
        if place.dry
        else rows + place.measure("embedding-1m,embedding-10k", ("sparseadam",), 0.5)
    )


def measure_first(place: Place) -> Result:
    """First steps in fresh processes, with an empty cache and with a warm one, and the memory
    beside the state."""
    asked = (
        [("tiny", "adamw", "onepass")]
        if place.dry
        else [("gpt2", name, "onepass") for name in FIRST]
    )
    if not place.dry:
        asked += [
            ("llama3-1b", "adamw", "onepass"),
            ("gpt2", "adamw", "default"),
            ("gpt2", "adamw", "fused"),
        ]
    found: Result = {}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures = {
            pool.submit(_try, partial(measure.probe_fresh, *one, place.gpu)): " ".join(one)
            for one in asked
        }
        for future in as_completed(futures):
            found[futures[future]] = future.result()
            place.keep(found)
    return found


def _try(function: Callable[[], Result]) -> Result:
    try:
        return function()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def count_uploads(place: Place) -> Result:
    """Tables sent to the device in ten steps in which nothing moves: none, where step counts are
    there."""
    found = {}
    for name in ("sgd-momentum", "adamw", "adafactor"):
        for mode in ("default", "capturable"):
            workload, variant = Workload(place.model("gpt2"), place.gpu.device), find_variant(name)
            make = make_capturable if mode == "capturable" else make_ours
            optimizer = make(variant, workload.groups())
            for _ in range(3):
                optimizer.step()
            launches = (
                [batch.launch for batch in optimizer._onepass.plan.kernels]
                if optimizer._onepass.plan
                else []
            )
            before = sum(getattr(launch, "uploads", 0) for launch in launches)
            for _ in range(10):
                optimizer.step()
            found[f"{name} {mode}"] = (
                sum(getattr(launch, "uploads", 0) for launch in launches) - before
            )
    return found


def replay_graphs(place: Place) -> Result:
    """A captured step of AdamW beside the same step without a graph."""
    found = {}
    for name in ("gpt2", "groups100"):
        workload, variant = Workload(place.model(name), place.gpu.device), find_variant("adamw")
        steps: dict[str, Callable[[], Any]] = {
            "onepass": seat(workload, partial(make_capturable, variant)).step
        }
        if not place.dry:
            steps["capturable"] = seat(
                workload, partial(make_torch, variant, mode="capturable")
            ).step
            for who in list(steps):
                steps[f"{who}, captured"] = _capture(steps[who])
        timers = {who: place.gpu.timer(step) for who, step in steps.items()}
        found[name] = measure.take_turns(timers, 0.01 if place.dry else 1.0, condense)
    return found


def _capture(step: Callable[[], Any]) -> Callable[[], Any]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def measure_others(place: Place) -> Result:
    """AdamW of other libraries on GPT-2's shapes beside ours; where one is missing, what it says of
    itself."""
    found: Result = {}
    workload, variant = Workload(place.model("gpt2"), place.gpu.device), find_variant("adamw")
    timers = {"onepass": place.gpu.timer(seat(workload, partial(make_ours, variant)).step)}
    for library, classes in OTHERS.items():
        for module, name, options in classes:
            try:
                cls = getattr(importlib.import_module(module), name)
                optimizer = cls(workload.groups(), lr=1e-3, weight_decay=0.01, **options)
                optimizer.step()
                timers[f"{library} {name}"] = place.gpu.timer(optimizer.step)
            except Exception as error:
                found[f"{library} {name}"] = {
                    "missing": f"{type(error).__name__}: {error}",
                    "says": PUBLISHED[library],
                }
    return found | measure.take_turns(timers, 0.01 if place.dry else 4.0, condense)


# In this order, each with the seconds that it may take.
STAGES: dict[str, tuple[Callable[[Place], Any], float]] = {
    "machine": (describe, 30),
    "checks": (check_all, 150),
    "whole": (measure_whole, 50),
    "many": (measure_many, 45),
    "every": (measure_every, 80),
    "first": (measure_first, 110),
    "uploads": (count_uploads, 20),
    "graphs": (replay_graphs, 25),
    "matrices": (measure_matrices, 25),
    "others": (measure_others, 25),
}
ROWS = ("whole", "many", "every", "matrices")


def run_stage(name: str, path: Path, seconds: float, dry: bool, device: str) -> None:
    """Run one stage in this process, and leave what it returns in a file."""
    gpu = load_from_tests("support.fake_cuda").stand_in() if dry else find_gpu(device)
    assert gpu is not None, "the CPU is measured by onepass bench"
    place = Place(gpu, seconds, path, dry)
    place.keep(STAGES[name][0](place))


def start_stage(name: str, seconds: float, dry: bool, device: str, log: Path) -> Result:
    """Run one stage in a process of its own: what it returned, or what became of it."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, log.open("a", encoding="utf-8") as said:
        said.write(f"--- {name}\n")
        said.flush()
        at = said.tell()
        path = Path(folder, "result.json")
        command = [
            sys.executable,
            __file__,
            "--stage",
            name,
            "--out",
            str(path),
            "--seconds",
            str(seconds),
        ]
        command += ["--device", device, *(["--dry-run"] if dry else [])]
        process = subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
            status = "done" if code == 0 else f"ended with code {code}"
        except subprocess.TimeoutExpired:
            # Its own processes too.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = f"stopped after {seconds:.0f} s"
        result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    found = {"status": status, "seconds": round(time.monotonic() - begin, 1), "result": result}
    if status != "done":
        found["last"] = log.read_text(encoding="utf-8", errors="replace")[at:].splitlines()[-12:]
    return found


def summarize(stages: dict[str, Result]) -> list[Result]:
    """The rows of all stages, with first steps and peaks where they belong, judged."""
    rows = [row for name in ROWS for row in stages.get(name, {}).get("result") or []]
    first = stages.get("first", {}).get("result") or {}
    for row in rows:
        probe = first.get(f"{row['model']} {row['optimizer']} onepass", {})
        if "warm_ms" in probe:
            row["summary"] |= {"first_s": probe["first_ms"] / 1e3, "warm_s": probe["warm_ms"] / 1e3}
            row["summary"]["peak_share"] = probe["peak_mb"] * 1e6 / (4 * row["parameters"])
    judge(rows, GPU_GOALS)
    return rows


def list_judged(rows: list[Result]) -> list[Result]:
    return [
        {"model": row["model"], "optimizer": row["optimizer"], **goal}
        for row in rows
        for goal in row["goals"]
    ]


def show(stages: dict[str, Result], rows: list[Result], console: Console) -> None:
    """Tables, and last what matters most."""
    say = partial(console.print, soft_wrap=True, highlight=False, markup=False)
    if rows:
        console.print(make_step_table(rows))
        console.print(make_device_table(rows))
    for name in ("first", "uploads", "graphs", "others"):
        for key, value in (stages.get(name, {}).get("result") or {}).items():
            say(f"{name}: {key}: {_shorten(value)}")
    say("\n".join(list_goals(rows)))
    for name, stage in stages.items():
        say(f"{name}: {stage['status']}, {stage['seconds']} s")
        for line in stage.get("last", ())[-3:]:
            say(f"    {line}")
    if checks := (stages.get("checks") or {}).get("result"):
        say("\n    ".join([f"correctness: {checks['said']}", *checks["failed"][:30]]))


def _shorten(value: Any) -> Any:
    """Numbers with as many digits as anybody reads."""
    if isinstance(value, dict):
        return {key: _shorten(one) for key, one in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder for gpu.json and log")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument(
        "--stages", default=",".join(STAGES), help="those to run, with commas between them"
    )
    parser.add_argument("--dry-run", action="store_true", help="the same course on the CPU")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.stage:
        run_stage(chosen.stage, chosen.out, chosen.seconds, chosen.dry_run, chosen.device)
        return 0
    if not chosen.dry_run and not torch.cuda.is_available():
        print(
            "gpu.py needs a GPU, and torch sees none: its course can be tried with --dry-run.",
            file=sys.stderr,
        )
        return 2
    if unknown := set(chosen.stages.split(",")) - set(STAGES):
        parser.error(f"there is no stage {min(unknown)!r}: choose among {', '.join(STAGES)}")
    chosen.out.mkdir(parents=True, exist_ok=True)
    Path(chosen.out, "log").unlink(missing_ok=True)
    end = time.monotonic() + 60 * chosen.minutes
    stages: dict[str, Result] = {}
    rows: list[Result] = []
    for name in chosen.stages.split(","):
        left = min(STAGES[name][1], end - time.monotonic())
        if left < LEAST_SECONDS:
            stages[name] = {"status": "left out: no time", "seconds": 0.0, "result": None}
        else:
            stages[name] = start_stage(
                name, left, chosen.dry_run, chosen.device, Path(chosen.out, "log")
            )
        rows = summarize(stages)
        report = {"schema": measure.SCHEMA, "stages": stages, "goals": list_judged(rows)}
        measure.save(report, Path(chosen.out, "gpu.json"))
        print(f"{name}: {stages[name]['status']}, {stages[name]['seconds']} s", flush=True)
    show(stages, rows, Console(width=WIDTH + 20))
    wrong = not ((stages.get("checks") or {}).get("result") or {"passed": True})["passed"]
    return int(wrong or any(stage["status"] != "done" for stage in stages.values()))


if __name__ == "__main__":
    sys.exit(main())
