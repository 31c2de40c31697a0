"""`onepass train` from the outside: what it writes, what it says, and what it says when something
is wrong."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from rich.console import Console

from onepass import checkpoint
from onepass.app import cli, tasks
from onepass.app.commands import train
from onepass.app.training.comparison import compare_steps


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A folder of its own for each test; one thread, and little time for the comparison of
    optimizers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "compare_steps", partial(compare_steps, budget=0.05))
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def short_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        tasks.TASKS, "digits", dataclasses.replace(tasks.TASKS["digits"], examples_per_epoch=128)
    )


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "onepass", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        # What a shell starts in the background ignores Ctrl-C, and so would its children.
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        if os.name == "posix"
        else None,
    )


def wait_for_epoch(
    path: Path, epoch: int, child: subprocess.Popen[str], limit: float = 60.0
) -> None:
    end = time.monotonic() + limit
    while not (path.exists() and checkpoint.load(path)["epoch"] >= epoch):
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def read_result(path: Path) -> tuple[dict[str, bytes], dict]:
    """All tensors of a checkpoint as bytes, and the rest of it, but the timings."""
    tree = checkpoint.load(path)
    tensors = {
        name: t.reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, t in safetensors.torch.load_file(path).items()
    }
    return tensors, {key: tree[key] for key in ("settings", "epoch", "step", "history")}


# --- what it does ---------------------------------------------------------------------------------


def test_a_run_with_its_files_and_words(
    short_digits: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        cli.main(
            ["train", "--epochs", "3", "--batch-size", "32", "--optimizer", "sgd", "--seed", "3"]
        )
        == 0
    )
    out, err = capsys.readouterr()
    assert err == ""
    assert sorted(os.listdir("runs/digits")) == ["curves.png", "last.safetensors"]
    assert Path("runs/digits/curves.png").read_bytes().startswith(b"\x89PNG")
    lines = out.splitlines()
    assert [line[:9] for line in lines if line.startswith("epoch")] == [
        "epoch 1/3",
        "epoch 2/3",
        "epoch 3/3",
    ]
    assert "SGD, lr 0.1 (cosine), 3 epochs of 4 steps" in lines[0]
    for words in (
        "forward",
        "backward",
        "onepass SGD",
        "torch SGD",
        "torch SGD fused",
        "ms a step",
        "times ours",
    ):
        assert words in out
    assert lines[-2:] == [
        "checkpoint: runs/digits/last.safetensors",
        "curves: runs/digits/curves.png",
    ]
    assert "\x1b" not in out
    assert "\r" not in out
    assert len(lines) < 30


def test_again_in_the_same_folder(short_digits: None, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--epochs", "1", "--out", "here"]
    assert cli.main(arguments) == 0
    first = read_result(Path("here/last.safetensors"))
    assert "held a run already" not in capsys.readouterr().out
    assert cli.main(arguments) == 0
    assert (
        "here held a run already: its checkpoint is now here/previous.safetensors"
        in capsys.readouterr().out
    )
    assert (
        read_result(Path("here/last.safetensors"))
        == first
        == read_result(Path("here/previous.safetensors"))
    )


def test_a_finished_run_is_not_resumed(
    short_digits: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "--epochs", "1"]) == 0
    before = {
        name: (Path("runs/digits") / name).stat().st_mtime_ns for name in os.listdir("runs/digits")
    }
    capsys.readouterr()
    assert cli.main(["train", "--resume"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("runs/digits/last.safetensors is a finished run (epoch 1 of 1, accuracy")
    assert out.count("\n") == 1
    assert before == {
        name: (Path("runs/digits") / name).stat().st_mtime_ns for name in os.listdir("runs/digits")
    }


def test_in_a_terminal_there_is_a_bar(short_digits: None, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(
        train, "Console", lambda **_: Console(file=screen, force_terminal=True, width=120)
    )
    assert cli.main(["train", "--epochs", "2"]) == 0
    for words in ("epoch 1/2", "loss", "accuracy", "ms/step"):
        assert words in screen.getvalue()
    assert "\x1b[" in screen.getvalue()


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path: Path) -> None:
    settings = ["--epochs", "4", "--batch-size", "128", "--seed", "7"]
    child = start("train", *settings, "--out", "killed")
    wait_for_epoch(Path("killed/last.safetensors"), 1, child)
    child.kill()
    child.communicate()
    assert checkpoint.load("killed/last.safetensors")["epoch"] < 4
    assert cli.main(["train", "--resume", "--out", "killed"]) == 0
    assert cli.main(["train", *settings, "--out", "whole"]) == 0
    assert read_result(Path("killed/last.safetensors")) == read_result(
        Path("whole/last.safetensors")
    )


@pytest.mark.skipif(os.name != "posix", reason="SIGINT")
def test_ctrl_c_names_the_command_that_continues(tmp_path: Path) -> None:
    child = start("train", "--epochs", "500", "--batch-size", "128", "--out", "my run")
    path = Path("my run/last.safetensors")
    wait_for_epoch(path, 1, child)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=30)
    assert child.returncode == 130
    assert "Traceback" not in out + err
    assert err.startswith("onepass: stopped in epoch ")
    assert err.count("\n") == 1
    assert err.endswith("is saved, continue with: onepass train --resume --out 'my run'\n")
    assert checkpoint.load(path)["epoch"] >= 1
    assert os.listdir("my run") == ["last.safetensors"]


def test_ctrl_c_before_the_first_epoch_ends(
    short_digits: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("onepass.app.training.display.TrainDisplay.stepped", interrupt)
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == (
        "onepass: stopped in epoch 1 of 20; no epoch was finished, so nothing is saved.\n"
    )


def test_both_ways_to_start_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "train" in capsys.readouterr().out
    assert cli.main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    for option in (
        "--task",
        "--optimizer",
        "--lr",
        "--epochs",
        "--batch-size",
        "--schedule",
        "--out",
        "--resume",
        "--data",
    ):
        assert option in out


# --- what can be wrong ----------------------------------------------------------------------------


def make_file() -> None:
    Path("file").write_text("not a folder")


def make_truncated_run() -> None:
    Path("run").mkdir()
    checkpoint.save("run/last.safetensors", {"kind": "x", "data": torch.zeros(100)})
    whole = Path("run/last.safetensors").read_bytes()
    Path("run/last.safetensors").write_bytes(whole[:-50])


def make_foreign_run() -> None:
    Path("run").mkdir()
    safetensors.torch.save_file({"a": torch.ones(1)}, "run/last.safetensors")


def make_run() -> None:
    from onepass.app.training.run import Run
    from onepass.app.training.settings import make_settings

    Path("run").mkdir()
    Run(make_settings(), Path("data")).save(Path("run/last.safetensors"))


def make_nothing() -> None:
    pass


@pytest.mark.parametrize(
    ("prepare", "arguments", "sentence"),
    [
        (make_nothing, "--task digit", "did you mean digits?"),
        (make_nothing, "--task mnist", "choose one of digits, text, cifar10"),
        (make_nothing, "--optimizer adamx", "there is no optimizer 'adamx': did you mean adam"),
        (make_nothing, "--lr 0", "lr must be a positive finite number, got 0.0"),
        (make_nothing, "--lr=-1e-3", "lr must be a positive finite number, got -0.001"),
        (make_nothing, "--lr nan", "lr must be a positive finite number, got nan"),
        (make_nothing, "--lr much", "Invalid value for '--lr'"),
        (make_nothing, "--epochs 0", "epochs must be at least 1, got 0"),
        (make_nothing, "--epochs 1.5", "Invalid value for '--epochs'"),
        (make_nothing, "--batch-size 0", "batch_size must be at least 1, got 0"),
        (make_nothing, "--seed -1", "seed must lie in [0, 2**63), got -1"),
        (make_nothing, "--schedule linear", "choose one of cosine, step, none"),
        (make_nothing, "--learning-rate 1", "No such option: --learning-rate"),
        (make_nothing, "more", "unexpected extra argument"),
        (make_file, "--out file", "--out file is not a folder"),
        (make_file, "--out file/below", "--out file/below is not a folder"),
        (make_file, "--resume --out file", "--out file is not a folder"),
        (
            make_nothing,
            "--resume",
            "there is no run to resume: runs/digits/last.safetensors does not exist",
        ),
        (make_nothing, "--resume --out none", "none/last.safetensors does not exist"),
        (
            make_truncated_run,
            "--resume --out run",
            "run/last.safetensors is truncated, damaged or not a safetensors file",
        ),
        (make_foreign_run, "--resume --out run", "is a safetensors file but no onepass checkpoint"),
        (
            make_run,
            "--resume --out run --optimizer sgd",
            "was trained with optimizer AdamW and not SGD",
        ),
        (make_run, "--resume --out run --task text", "was trained with task digits and not text"),
        (make_run, "--resume --out run --seed 1", "was trained with seed 0 and not 1"),
    ],
    ids=lambda value: value.replace(" ", "_") if isinstance(value, str) else "",
)
def test_one_sentence_and_nothing_changed(
    prepare: Callable[[], None], arguments: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare()
    before = snapshot()
    assert cli.main(["train", *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert err.startswith("onepass: ")
    assert err.count("\n") == 1
    assert snapshot() == before


EVIL = [
    *(
        "evil:X",
        "evil.sub:X",
        "evil.sub:X.Y",
        "onepass.evil:X",
        ":X",
        "evil:",
        ":",
        "::",
        "evil::X",
        " evil:X",
        "EVIL:X",
    ),
    *(
        "os:system",
        "builtins:eval",
        "evil:X\n",
        "evil/sub:X",
        "./evil:X",
        "evil.py:X",
        "evil:X,sgd",
        "evil\uff1aX",
    ),
    *(
        "evil.X",
        "evil",
        "../evil",
        "file:evil",
        "__main__:X",
        "sgd:momentum",
        "onepass:SGD",
        "onepass.algorithms.sgd:SGD",
    ),
]
RESUME = """
import json, sys
from onepass.app import cli
for folder in sys.argv[1:]:
    code = cli.main(["train", "--resume", "--out", folder])
    print(json.dumps([code, [name for name in sys.modules if "evil" in name.lower()]]))
"""


def test_what_a_file_names_is_not_imported(tmp_path: Path) -> None:
    """However it is spelt: one sentence, and neither a module nor a file of another's making."""
    make_run()
    Path("evil").mkdir()
    for name in ("__init__.py", "sub.py"):
        (Path("evil") / name).write_text(f"open('marker', 'w').close()\n{LION}\nX = Lion")
    tree = checkpoint.load("run/last.safetensors")
    folders = [f"run{i}" for i in range(len(EVIL))]
    for folder, name in zip(folders, EVIL, strict=True):
        Path(folder).mkdir()
        settings = {**tree["settings"], "optimizer": name}
        checkpoint.save(f"{folder}/last.safetensors", {**tree, "settings": settings})
    before = snapshot()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", RESUME, *folders]
    child = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert [json.loads(line) for line in child.stdout.splitlines()] == [[2, []]] * len(EVIL)
    sentences = child.stderr.splitlines()
    assert len(sentences) == len(EVIL), child.stderr
    for sentence, name in zip(sentences, EVIL, strict=True):
        assert sentence.startswith("onepass: ")
        if ":" in name:
            assert "what a file names is not imported: give --optimizer" in sentence
            assert repr(name) in sentence
    assert snapshot() == before


LION = """
import onepass
class Lion(onepass.Optimizer):
    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})
    @staticmethod
    def rule(p, g, m, *, lr):
        return {"p": p - lr * (m + g), "m": 0.9 * m + g}
"""


def test_a_module_of_the_users_own_is_named_again(
    short_digits: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run with an own class goes on where the command line says which, and only there."""
    Path("my_lion_rules.py").write_text(LION)
    name = "my_lion_rules:Lion"
    try:
        assert cli.main(["train", "--epochs", "1", "--optimizer", name, "--out", "own"]) == 0
        capsys.readouterr()
        assert cli.main(["train", "--resume", "--out", "own", "--optimizer", name]) == 0
        assert "is a finished run" in capsys.readouterr().out
        for arguments, words in (
            ([], f"what a file names is not imported: give --optimizer '{name}'"),
            (
                ["--optimizer", "sgd"],
                f"what a file names is not imported: give --optimizer '{name}'",
            ),
        ):
            assert cli.main(["train", "--resume", "--out", "own", *arguments]) == 2
            err = capsys.readouterr().err
            assert words in err
            assert err.count("\n") == 1
    finally:
        sys.modules.pop("my_lion_rules", None)
        sys.path[:] = [place for place in sys.path if place != os.getcwd()]


def test_ctrl_c_names_the_users_own_class_too(
    short_digits: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    Path("my_lion_rules.py").write_text(LION)
    monkeypatch.setattr("onepass.app.training.display.TrainDisplay.finished_epoch", interrupt)
    try:
        assert cli.main(["train", "--optimizer", "my_lion_rules:Lion", "--out", "own"]) == 130
        assert "--resume --out own --optimizer my_lion_rules:Lion\n" in capsys.readouterr().err
    finally:
        sys.modules.pop("my_lion_rules", None)
        sys.path[:] = [place for place in sys.path if place != os.getcwd()]


def test_an_absurd_checkpoint_ends_the_program_with_a_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A few of the many that the tests of training try."""
    make_run()
    whole = checkpoint.load("run/last.safetensors")
    for key, value in (
        ("epoch", -5),
        ("epoch", 10**9),
        ("epoch", "1"),
        ("history", {"lr": 1}),
        ("rng", 3),
        ("new", 1),
    ):
        checkpoint.save("run/last.safetensors", {**whole, key: value})
        before = snapshot()
        assert cli.main(["train", "--resume", "--out", "run"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert (
            "run/last.safetensors does not fit this version of the task or of the optimizer: "
            in err
        )
        assert key in err
        assert snapshot() == before


def snapshot() -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert "No such command 'trian'" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder in which nobody may write")
def test_a_folder_that_cannot_be_written_to(
    capsys: pytest.CaptureFixture[str], short_digits: None
) -> None:
    assert cli.main(["train", "--out", "/proc/onepass"]) == 2
    err = capsys.readouterr().err
    assert "choose another" in err
    assert err.count("\n") == 1


def test_a_full_disk(
    short_digits: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onepass.checkpoint.os.fsync", fail)
    assert cli.main(["train", "--epochs", "1"]) == 2
    assert "runs/digits cannot be used (No space left on device)" in capsys.readouterr().err
    assert os.listdir("runs/digits") == []


def test_a_diverging_run(short_digits: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--optimizer", "sgd", "--lr", "1e30"]) == 2
    assert "try a smaller lr than 1e+30" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["typer", "rich", "matplotlib", "safetensors"])
def test_a_missing_package(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = cli.importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == module else found(name)
    )
    assert cli.main(["train"]) == 2
    err = capsys.readouterr().err
    assert module in err
    assert "pip install 'onepass[train]'" in err
    assert err.count("\n") == 1
    assert os.listdir() == []


def test_the_entry_needs_nothing_but_the_library() -> None:
    """With the packages of the command line blocked, the entry still imports and says what to
    install."""
    script = """
import sys
for name in ("typer", "rich", "matplotlib", "safetensors", "sklearn"):
    sys.modules[name] = None
import importlib.util
importlib.util.find_spec = lambda name: None
from onepass.app.cli import main
sys.exit(main(["train"]))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False
    )
    assert child.returncode == 2
    assert child.stderr.count("\n") == 1
    assert "typer and rich: run pip install 'onepass[train]'" in child.stderr
