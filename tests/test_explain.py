"""`onepass explain`: the real rule, the right bytes, and the code that runs."""

from __future__ import annotations

import inspect
import re
import textwrap
from pathlib import Path

import pytest

import onepass
from onepass.app import cli
from onepass.app.catalog import UnknownName, find_class, optimizers
from onepass.app.explain.explanation import explain, parse_options
from onepass.app.explain.host_assembly import function_lines, hot_loop, vector_bits

BYTES = [
    ("sgd", [], 12, 0),
    ("sgd", ["--momentum", "0.9"], 20, 4),
    ("SGD", ["--momentum=0.9", "--nesterov"], 20, 4),
    ("adam", [], 28, 8),
    ("AdamW", [], 28, 8),
    ("adamw", ["--amsgrad"], 36, 12),
    ("adamw", ["--amsgrad", "--no-amsgrad"], 28, 8),
    ("adagrad", [], 20, 4),
    ("rmsprop", [], 20, 4),
    ("rmsprop", ["--centered", "--momentum", "0.9"], 36, 12),
    ("adadelta", [], 28, 8),
    ("adamax", [], 28, 8),
    ("nadam", [], 28, 8),
    ("radam", [], 28, 8),
    ("asgd", [], 20, 4),
    ("rprop", [], 28, 8),
    ("sparseadam", [], 28, 8),
]

X86 = """
body_0:
	.cfi_startproc
	jle	.L9
.L3:
	vmulps	(%rdi,%rax,4), %ymm0, %ymm1
	vmovups	%ymm1, (%rdi,%rax,4)
	addq	$8, %rax
	jne	.L3
.L7:
	vmulss	(%rdi), %xmm0, %xmm1
	jne	.L7
.L9:
	retq
	.size	body_0, .-body_0
worker_0:
"""


@pytest.mark.parametrize(("name", "words", "moved", "state"), BYTES)
def test_bytes_in_float32(name: str, words: list[str], moved: int, state: int) -> None:
    text = explain(name, words).text()
    assert f"= {moved} bytes per parameter and step" in text
    assert f"{state} bytes of state per parameter, arithmetic in f32, 1 pass over memory" in text


@pytest.mark.parametrize(
    ("dtype", "moved", "compute"),
    [("bfloat16", 14, "f32"), ("float16", 14, "f32"), ("float64", 56, "f64")],
)
def test_bytes_in_other_formats(dtype: str, moved: int, compute: str) -> None:
    text = explain("adamw", dtype=dtype).text()
    assert f"= {moved} bytes per parameter and step" in text
    assert f"arithmetic in {compute}" in text


def test_several_passes_over_matrices() -> None:
    text = explain("adafactor").text(llvm=True, assembly=True)
    assert "4 bytes for each row, read and written" in text
    assert "0 bytes of state per parameter, arithmetic in f32, 3 passes over memory" in text
    assert re.search(r"def rule\(\s*p,\s*g,\s*row_var", text)
    assert "over matrices: reads" in text
    assert text.count("Assembly of pass") == text.count("\nPass ") > 3
    text = explain("muon", ["--no-nesterov"]).text()
    assert "Then ~1 = newton_schulz(~0, ns_coefficients.0" in text
    assert "4 bytes of state per parameter, arithmetic in f32, 2 passes over memory" in text


def test_numbers_of_a_parameter_and_rows_of_a_gradient() -> None:
    assert "mu_product <- mu_product * " in explain("nadam").text()
    text = explain("asgd").text()
    assert "eta <- lr / " in text
    assert "mu <- 1 / " in text
    assert (
        "bytes per parameter and step, in the rows that the gradient has"
        in explain("sparseadam").text()
    )


@pytest.mark.parametrize("name", sorted(optimizers()))
def test_every_optimizer_is_found(name: str) -> None:
    assert find_class(name.upper()) is optimizers()[name] is getattr(onepass, name)
    if name == "LBFGS":
        with pytest.raises(UnknownName, match=r"LBFGS has no rule to explain: .* choose another"):
            explain(name)
    else:
        assert explain(name).text().startswith(f"{name}(): ")


def test_rule_is_the_real_source() -> None:
    text = explain("adamw").text()
    source = textwrap.dedent(inspect.getsource(onepass.Adam.rule)).strip()
    assert source in textwrap.dedent(
        "".join(f"{line}\n" for line in text.splitlines() if line.startswith("    ") or not line)
    )
    assert text.startswith("AdamW(): Adam with decoupled weight decay")
    assert "arXiv:1711.05101" in text.splitlines()[1]


def test_host_values_and_operations_are_readable() -> None:
    text = explain("sgd").text()
    assert "= weight_decay" in text
    assert "= g + " in text
    assert "p <- t" in text


def test_generated_code_is_shown_on_request() -> None:
    plain, full = explain("adamw").text(), explain("adamw").text(llvm=True, assembly=True)
    assert "define" not in plain
    assert "LLVM IR as emitted" in full
    assert "LLVM IR after optimization" in full
    assert "Assembly of pass 1" in full


def test_the_hot_loop_of_x86_code_is_found() -> None:
    lines = function_lines(X86, "body_0")
    assert "worker_0:" not in lines
    begin, end = hot_loop(lines)
    assert lines[begin] == ".L3:"
    assert lines[end - 1].split() == ["jne", ".L3"]
    assert vector_bits(lines[begin:end]) == 256


def test_a_rule_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_rules.py").write_text(
        textwrap.dedent(
            '''
            from onepass import Optimizer, norm, sign

            class Signs(Optimizer):
                """Signs of the gradient, scaled by its norm."""

                def __init__(self, params, lr=1e-3):
                    super().__init__(params, {"lr": lr})

                @staticmethod
                def rule(p, g, *, lr):
                    return {"p": p - lr * norm(g) * sign(g)}
            '''
        )
    )
    text = explain("own_rules:Signs", ["--lr", "0.5"], "float32").text()
    assert text.startswith("Signs(lr=0.5): Signs of the gradient, scaled by its norm.")
    assert "norm(g) * sign(g)" in text
    assert "Pass 2 of 2" in text
    assert "= 16 bytes per parameter and step" in text
    with pytest.raises(UnknownName, match="did you mean Signs"):
        find_class("own_rules:Sign")


@pytest.mark.parametrize(
    ("name", "words", "dtype", "sentence"),
    [
        ("admaw", [], "float32", "there is no optimizer 'admaw': did you mean Adam"),
        (
            "adamw",
            ["--amsgard"],
            "float32",
            "there is no option of AdamW 'amsgard': did you mean amsgrad",
        ),
        ("adamw", ["amsgrad"], "float32", "'amsgrad' is not an option"),
        ("adamw", [], "bfloat61", "there is no storage format 'bfloat61': did you mean bfloat16"),
        ("onepass:lerp", [], "float32", "'onepass:lerp' is"),
    ],
)
def test_unknown_names_are_one_sentence(
    name: str, words: list[str], dtype: str, sentence: str
) -> None:
    with pytest.raises(UnknownName) as caught:
        explain(name, words, dtype)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


def test_options_are_read_as_python_values() -> None:
    words = ["--betas", "(0.8, 0.9)", "--eps=1e-6", "--weight-decay", "0", "--maximize"]
    assert parse_options(onepass.AdamW, words) == {
        "betas": (0.8, 0.9),
        "eps": 1e-6,
        "weight_decay": 0,
        "maximize": True,
    }


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(["explain", "adamw", "--amsgrad", "--llvm", "--asm", "--dtype", "bfloat16"]) == 0
    )
    out = capsys.readouterr().out
    assert "= 18 bytes per parameter and step" in out
    assert "Assembly of pass 1" in out
    for bad in (
        ["adamv"],
        ["adamw", "--amsgard"],
        ["adamw", "--lr", "-1"],
        ["adamw", "--dtype", "int3"],
    ):
        assert cli.main(["explain", *bad]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
