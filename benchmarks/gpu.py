"""Everything that is promised on a GPU, in one call of under 8 minutes: is it right, is it fast.

    PYTHONPATH=. python benchmarks/gpu.py --out FOLDER # gpu.json and log
    PYTHONPATH=. python benchmarks/gpu.py --dry-run    # the same course on the CPU, very small

Each stage is a process of its own with a budget of time: one that crashes or hangs costs nothing
but itself. What is known is written after each, with what a stage that failed had found.
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

from onepass.app.bench import fresh, measure, suite
from onepass.app.bench.contenders import Workload, make_capturable, make_ours, make_torch, seat
from onepass.app.bench.goals import gpu_goals, judge
from onepass.app.bench.gpu import Gpu, condense, find_gpu
from onepass.app.bench.machine import describe_machine
from onepass.app.bench.report import WIDTH, list_goals, make_device_table, make_step_table
from onepass.app.bench.shapes import MODELS, Model
from onepass.app.bench.turns import take_turns
from onepass.app.catalog import find_variant

Result = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
# Their first steps are measured, and their steps on GPT-2.
FIRST = tuple(cell.variant.name for cell in suite.choose("gpt2", None, every_one=True, gpu=True))
# Processes at a time that take first steps: they wait for the disk and for compilers on one core
# each.
AT_ONCE = 4

# A stage is not begun with less.
LEAST_SECONDS = 5
# What others say of themselves, if they cannot be installed; benchmarks/README.md has the sources.
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
class Context:
    """Where a stage runs, how many seconds it may take, and the file that it leaves.

    In a `dry` run it has little to do.
    """

    gpu: Gpu
    seconds: float
    path: Path
    dry: bool = False

    def keep(self, result: Any) -> None:
        """Write what is known so far."""
        measure.save(result, self.path)

    def model(self, name: str) -> Model:
        """Return one of the benchmark's models; in a dry run, a few small tensors by its name."""
        if not self.dry:
            return MODELS[name]
        shapes = [(8, 4), (4, 8)] if name == "matrices" else [(8, 4), (3,), (4, 8)]
        return replace(MODELS[name], list_shapes=lambda: shapes, groups=1)

    def measure(self, models: str, optimizers: tuple[str, ...], seconds: float) -> list[Result]:
        """Return the report's rows of these optimizers on these models, each for `seconds`."""
        cells = [
            suite.Cell(self.model(model), find_variant(optimizer), fresh=False)
            for model in models.split(",")
            for optimizer in optimizers
        ]
        if self.dry:
            cells = cells[:2]
            seconds = 0.01
        rows: list[Result] = []
        for cell in cells:
            report = measure.run([cell], seconds=seconds, fresh=False, gpu=self.gpu)
            rows += report["results"]
            self.keep(rows)
        return rows


# Stages: functions of a context that return plain data.


def describe(context: Context) -> Result:
    """Describe the machine, the GPU, and the speed of its memory."""
    return {**describe_machine(), "gpu": context.gpu.describe(), "bandwidth": context.gpu.bandwidth}


def check_all(context: Context) -> Result:
    """Run the checks of tests/test_cuda.py: by pytest, or without it."""
    if importlib.util.find_spec("pytest") is None or context.dry:
        return _run_checks(context)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v"]
    command += ["--tb=short", "--durations=10", "-W", "default"]
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
        late = threading.Timer(context.seconds - 8, process.kill)
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
    """Return what pytest's lines say of each test, also if it was stopped before its summary."""
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
    """Return a module of the folder of tests."""
    if str(ROOT / "tests") not in sys.path:
        sys.path.append(str(ROOT / "tests"))
    return importlib.import_module(name)


def _run_checks(context: Context) -> Result:
    """Run the checks in this process, until the time is over."""
    checks = load_from_tests("support.gpu_cases")
    for name in ("gpu_checks", "gpu_graph_checks", "gpu_stream_checks"):
        load_from_tests(f"support.{name}")
    fates: dict[str, str] = {}
    end = time.monotonic() + context.seconds - 5
    for name in list(checks.CHECKS)[:: 12 if context.dry else 1]:
        if time.monotonic() > end:
            break
        try:
            checks.run(name, context.gpu.device)
            fates[name] = "passed"
        except checks.Skip as reason:
            fates[name] = f"left out: {reason}"
        except Exception:
            fates[name] = traceback.format_exc()[-2000:]
            print(f"{name}\n{fates[name]}", flush=True)
    failed = [name for name, fate in fates.items() if not fate.startswith(("passed", "left out"))]
    said = f"{len(fates)} of {len(checks.CHECKS)} checks, {len(failed)} failed"
    return {"passed": not failed, "said": said, "failed": failed}


def measure_whole(context: Context) -> list[Result]:
    """Measure AdamW on whole models: the share of the limit, and torch's modes."""
    return context.measure("gpt2,llama3-1b", ("adamw",), 4.0)


def measure_many(context: Context) -> list[Result]:
    """Measure many small tensors, in one group and in a hundred: what the host needs."""
    return context.measure(
        "groups100,small", ("adamw", "adam", "sgd-momentum", "sgd", "adagrad", "nadam"), 1.0
    )


def measure_every(context: Context) -> list[Result]:
    """Measure every algorithm beside torch's foreach."""
    return context.measure("gpt2", tuple(name for name in FIRST if name != "adamw"), 1.0)


def measure_matrices(context: Context) -> list[Result]:
    """Measure a step that products of matrices bound, and one on sparse gradients."""
    rows = context.measure("matrices", ("muon",), 1.0)
    if not context.dry:
        rows += context.measure("embedding-1m,embedding-10k", ("sparseadam",), 0.5)
    return rows


def measure_first(context: Context) -> Result:
    """Measure first steps in fresh processes, with an empty cache and a warm one, and memory."""
    if context.dry:
        asked = [("tiny", "adamw", "onepass")]
    else:
        asked = [("gpt2", name, "onepass") for name in FIRST]
        asked += [
            ("llama3-1b", "adamw", "onepass"),
            ("gpt2", "adamw", "default"),
            ("gpt2", "adamw", "fused"),
        ]
    found: Result = {}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures = {}
        for words in asked:
            probe = partial(fresh.probe_fresh, *words, context.gpu)
            futures[pool.submit(_try, probe)] = " ".join(words)
        for future in as_completed(futures):
            found[futures[future]] = future.result()
            context.keep(found)
    return found


def _try(function: Callable[[], Result]) -> Result:
    try:
        return function()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def count_uploads(context: Context) -> Result:
    """Count the tables sent to the device in ten steps in which nothing moves.

    There are none if step counts are on the device.
    """
    found = {}
    makers = {"default": make_ours, "capturable": make_capturable}
    for name in ("sgd-momentum", "adamw", "adafactor"):
        for mode, make in makers.items():
            workload = Workload(context.model("gpt2"), context.gpu.device)
            optimizer = make(find_variant(name), workload.groups())
            for _ in range(3):
                optimizer.step()
            before = _uploads_of(optimizer)
            for _ in range(10):
                optimizer.step()
            found[f"{name} {mode}"] = _uploads_of(optimizer) - before
    return found


def _uploads_of(optimizer: Any) -> int:
    plan = optimizer._onepass.plan
    batches = plan.kernels if plan else []
    return sum(getattr(batch.launch, "uploads", 0) for batch in batches)


def replay_graphs(context: Context) -> Result:
    """Measure a captured step of AdamW beside the same step without a graph."""
    found = {}
    variant = find_variant("adamw")
    for name in ("gpt2", "groups100"):
        workload = Workload(context.model(name), context.gpu.device)
        ours = seat(workload, partial(make_capturable, variant))
        steps: dict[str, Callable[[], Any]] = {"onepass": ours.step}
        if not context.dry:
            theirs = seat(workload, partial(make_torch, variant, mode="capturable"))
            steps["capturable"] = theirs.step
            for contender in list(steps):
                steps[f"{contender}, captured"] = _capture(steps[contender])
        timers = {contender: context.gpu.timer(step) for contender, step in steps.items()}
        found[name] = take_turns(timers, 0.01 if context.dry else 1.0, condense)
    return found


def _capture(step: Callable[[], Any]) -> Callable[[], Any]:
    """Return a function that replays a step that was captured in a graph."""
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


def measure_others(context: Context) -> Result:
    """Measure AdamW of other libraries on GPT-2's shapes beside ours.

    Of a library that is missing, the result is what it says of itself.
    """
    found: Result = {}
    workload = Workload(context.model("gpt2"), context.gpu.device)
    ours = seat(workload, partial(make_ours, find_variant("adamw")))
    timers = {"onepass": context.gpu.timer(ours.step)}
    for library, classes in OTHERS.items():
        for module, name, options in classes:
            try:
                cls = getattr(importlib.import_module(module), name)
                optimizer = cls(workload.groups(), lr=1e-3, weight_decay=0.01, **options)
                optimizer.step()
                timers[f"{library} {name}"] = context.gpu.timer(optimizer.step)
            except Exception as error:
                found[f"{library} {name}"] = {
                    "missing": f"{type(error).__name__}: {error}",
                    "says": PUBLISHED[library],
                }
    return found | take_turns(timers, 0.01 if context.dry else 4.0, condense)


# In this order, each with the seconds that it may take.
STAGES: dict[str, tuple[Callable[[Context], Any], float]] = {
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
    context = Context(gpu, seconds, path, dry)
    context.keep(STAGES[name][0](context))


def start_stage(name: str, seconds: float, dry: bool, device: str, log: Path) -> Result:
    """Run one stage in a process of its own; return what it returned, or what became of it."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, log.open("a", encoding="utf-8") as said:
        said.write(f"--- {name}\n")
        said.flush()
        log_begin = said.tell()
        path = Path(folder, "result.json")
        command = [sys.executable, __file__, "--stage", name, "--out", str(path)]
        command += ["--seconds", str(seconds), "--device", device]
        if dry:
            command.append("--dry-run")
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
    found = {"status": status, "seconds": round(time.monotonic() - start, 1), "result": result}
    if status != "done":
        text = log.read_text(encoding="utf-8", errors="replace")
        found["last"] = text[log_begin:].splitlines()[-12:]
    return found


def summarize(stages: dict[str, Result]) -> list[Result]:
    """Return the rows of all stages, with first steps and peaks where they belong, judged."""
    rows = [row for name in ROWS for row in stages.get(name, {}).get("result") or []]
    first = stages.get("first", {}).get("result") or {}
    for row in rows:
        probe = first.get(f"{row['model']} {row['optimizer']} onepass", {})
        if "warm_ms" in probe:
            row["summary"] |= fresh.summarize_fresh(probe, row["parameters"])
    judge(rows, gpu_goals())
    return rows


def list_judged(rows: list[Result]) -> list[Result]:
    """Return all goals of all rows, with the model and the optimizer of each."""
    return [
        {"model": row["model"], "optimizer": row["optimizer"], **goal}
        for row in rows
        for goal in row["goals"]
    ]


def show(stages: dict[str, Result], rows: list[Result], console: Console) -> None:
    """Print the tables, and last what matters most."""
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
    """Return numbers with as many digits as anybody reads."""
    if isinstance(value, dict):
        return {key: _shorten(entry) for key, entry in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def run_stages(
    names: list[str], asked: argparse.Namespace
) -> tuple[dict[str, Result], list[Result]]:
    """Run stages one after the other, and write gpu.json after each.

    Returns what each of them found, by name, and the rows of all of them.
    """
    end = time.monotonic() + 60 * asked.minutes
    log = Path(asked.out, "log")
    log.unlink(missing_ok=True)
    stages: dict[str, Result] = {}
    rows: list[Result] = []
    for name in names:
        seconds = min(STAGES[name][1], end - time.monotonic())
        if seconds < LEAST_SECONDS:
            stages[name] = {"status": "left out: no time", "seconds": 0.0, "result": None}
        else:
            stages[name] = start_stage(name, seconds, asked.dry_run, asked.device, log)
        rows = summarize(stages)
        report = {"schema": measure.SCHEMA, "stages": stages, "goals": list_judged(rows)}
        measure.save(report, Path(asked.out, "gpu.json"))
        print(f"{name}: {stages[name]['status']}, {stages[name]['seconds']} s", flush=True)
    return stages, rows


def main() -> int:
    """Run the stages that are asked for; return 0 if all were done and all checks passed."""
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
    asked = parser.parse_args()
    if asked.stage:
        run_stage(asked.stage, asked.out, asked.seconds, asked.dry_run, asked.device)
        return 0
    if not asked.dry_run and not torch.cuda.is_available():
        print(
            "gpu.py needs a GPU, and torch sees none: its course can be tried with --dry-run.",
            file=sys.stderr,
        )
        return 2
    names = asked.stages.split(",")
    if unknown := set(names) - set(STAGES):
        parser.error(f"there is no stage {min(unknown)!r}: choose among {', '.join(STAGES)}")
    asked.out.mkdir(parents=True, exist_ok=True)
    stages, rows = run_stages(names, asked)
    show(stages, rows, Console(width=WIDTH + 20))
    checks = (stages.get("checks") or {}).get("result") or {"passed": True}
    all_done = all(stage["status"] == "done" for stage in stages.values())
    return 0 if all_done and checks["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
