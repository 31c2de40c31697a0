"""`onepass schedule`: what it says of a schedule, what it draws, and what it says when the text
makes none."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from onepass.app import cli
from onepass.app.gallery.summary import BLOCKS, SIGNS, choose_steps, draw_line, summarize
from onepass.schedule import parse

TEXT = "cosine(3e-4, steps=10000).warmup(500)"


def ask(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str]:
    """The lines of a successful call, by their names."""
    assert cli.main(["schedule", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return dict(line.split(maxsplit=1) for line in out.splitlines())


def test_a_schedule_in_lines(capsys: pytest.CaptureFixture[str]) -> None:
    lines = ask(capsys, TEXT)
    assert list(lines) == ["schedule", "length", "first", "highest", "lowest", "last", "shape"]
    assert lines["schedule"] == repr(parse(TEXT))
    assert lines["length"] == "10,000 steps"
    assert lines["first"] == "0 at step 0"
    assert lines["highest"] == "0.000298153 at step 500"
    assert lines["last"] == "0 at step 10,000"
    assert len(lines["shape"]) == 60
    assert lines["shape"][0] == lines["shape"][-1] == BLOCKS[0]


@pytest.mark.parametrize(
    ("text", "words", "length", "last"),
    [
        ("constant(2)", [], "no end", "2 at step 1,000"),
        ("exponential(1.0, gamma=0.5)", ["--steps", "3"], "no end", "0.125 at step 3"),
        ("linear(0, 1, steps=8)", ["--steps", "2"], "8 steps", "0.25 at step 2"),
        ("linear(1, 3, steps=2.5)", [], "2.5 steps", "3 at step 3"),
        ("linear(1, 3, steps=8)", ["--steps", "50"], "8 steps", "3 at step 50"),
        ("piecewise(1.0, {40: 0.25})", [], "no end", "0.25 at step 1,000"),
        ("cosine(1, steps=1e300)", [], "1e+300 steps", "0 at step 1e+300"),
    ],
)
def test_lengths_and_ends(
    text: str, words: list[str], length: str, last: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ask(capsys, text, *words)
    assert (lines["length"], lines["last"]) == (length, last)


def test_every_whole_step_is_looked_at() -> None:
    """A peak of one step among a hundred thousand is found."""
    spike = parse("piecewise(1.0, {54321: 9.0, 54322: 1.0})")
    lines = dict(summarize(spike, 100_000))
    assert lines["highest"] == "9 at step 54,321"
    assert (
        dict(summarize(parse("linear(5, -5, steps=1000000)"), 1_000_000))["lowest"]
        == "-5 at step 1,000,000"
    )


def test_how_many_steps_are_shown() -> None:
    assert choose_steps(parse("linear(1, 0, steps=7.5)")) == 8
    assert choose_steps(parse("constant(1)")) == 1000
    assert choose_steps(parse("constant(1)"), 3) == choose_steps(parse(TEXT), 3) == 3


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], BLOCKS),
        ([7, 0], "█▁"),
        ([3, 3, 3], "▁▁▁"),
        ([-1.0, 0.0, 1.0], "▁▅█"),
        ([5.0], "▁"),
    ],
)
def test_the_shape_of_values(values: list[float], line: str) -> None:
    assert draw_line(values) == line
    assert draw_line(values, SIGNS) == line.translate(str.maketrans(BLOCKS, SIGNS))


def test_a_long_shape_has_both_ends() -> None:
    line = draw_line([*range(500), 1000])
    assert len(line) == 60
    assert (line[0], line[-1]) == ("▁", "█")


def test_plain_signs_where_blocks_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert cli.main(["schedule", TEXT]) == 0
    sys.stdout.flush()
    shape = raw.getvalue().decode("ascii").splitlines()[-1].split()[1]
    assert set(shape) <= set(SIGNS)
    assert len(shape) == 60


def test_a_picture_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lr.png"
    lines = ask(
        capsys, "cosine(1.0, steps=100).warmup(10).then(constant(0.1), at=100)", "--plot", str(path)
    )
    assert lines["picture"] == str(path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert 2_000 < len(data) < 80_000
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cosinus(1.0)"], "'cosinus(1.0)' is no part of a schedule"),
        (["cosine(1.0"], "'cosine(1.0' is no schedule"),
        (["3e-4"], "'3e-4' is no schedule: begin with one of constant"),
        (["cosine(1.0)"], "steps"),
        (["cosine(1.0, steps=0)"], "steps must be"),
        (["__import__('os').getcwd()"], "is no part of a schedule"),
        (
            ["exponential(1.0, gamma=10)"],
            "has a value that is too large for a number within 1,000 steps: show fewer with",
        ),
        ([TEXT, "--steps", "0"], "--steps"),
        ([TEXT, "--steps", "many"], "--steps"),
        (
            [TEXT, "--plot", "nowhere/lr.png"],
            "nowhere/lr.png cannot be written: there is no folder",
        ),
        ([TEXT, "--plot", "."], ". is a folder: name a file in it"),
        ([], "see onepass --help."),
    ],
    ids=str,
)
def test_errors_are_one_sentence(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["schedule", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("onepass: ")
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
