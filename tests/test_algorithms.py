"""A further algorithm is a class, a name in `onepass/__init__.py`, a row in `table.py` and a page:
everything else follows, or a test says what to write and where."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import test_docs
from support.subprocess_cases import ROOT
from table import TABLE, WITH_TWIN

from onepass.app.catalog import optimizers

# What steps by whole matrices, on sparse gradients or by a closure has files of its own.
TESTED_ELSEWHERE = {
    "Adafactor": "test_adafactor.py",
    "LBFGS": "test_lbfgs.py",
    "Muon": "test_muon.py",
    "SparseAdam": "test_sparse.py",
}


@pytest.mark.parametrize("name", optimizers())
def test_every_algorithm_is_held_against_a_reference(name: str) -> None:
    if name in TESTED_ELSEWHERE:
        assert (ROOT / "tests" / TESTED_ELSEWHERE[name]).exists()
        return
    assert name in {row.name for row in TABLE}, (
        f"onepass.{name} has no row in tests/table.py: write its update there as a function in "
        f"float64, from the paper, and into TABLE a row _row({name.lower()}, onepass.{name}) for "
        "each set of options; what steps by whole matrices, on sparse gradients or by a closure "
        "needs a file of tests, named in TESTED_ELSEWHERE in tests/test_algorithms.py"
    )


def test_rows_of_torchs_algorithms_have_a_twin() -> None:
    """By its name; all rows of today have one."""
    assert [row for row in TABLE if row.twin is not None] == list(WITH_TWIN)
    for row in WITH_TWIN:
        assert row.twin is not None
        assert row.twin.__module__.startswith("torch.optim"), row
        assert issubclass(row.cls, row.twin), row


# An algorithm that torch lacks, in a copy of the repository.

CLASS = '''"""Nemo."""

from __future__ import annotations

from ..kernel.functions import lerp, sign
from ..optimizer import Optimizer, Params


class Nemo(Optimizer):
    r"""Steps of one length: the sign of a momentum.

    $$ u_t = \\mathrm{sign}(\\beta_1 m_{t-1} + (1 - \\beta_1) g_t), \\quad
       m_t = \\beta_2 m_{t-1} + (1 - \\beta_2) g_t $$

    Nobody, "An Algorithm That Torch Lacks", 2023, arXiv:2302.06675.
    """

    ranges = {"lr": "[0, inf]", "betas": ("[0, 1)", "[0, 1)"), "weight_decay": "[0, inf]"}

    def __init__(self, params: Params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @staticmethod
    def rule(p, g, exp_avg, *, lr, betas, weight_decay):
        beta1, beta2 = betas
        u = sign(lerp(exp_avg, g, 1 - beta1))
        return {"p": p * (1 - lr * weight_decay) - lr * u, "exp_avg": lerp(exp_avg, g, 1 - beta2)}
'''
REFERENCE = """def nemo(p, g, state, step, *, lr, betas=(0.9, 0.99), weight_decay=0.0):
    beta1, beta2 = betas
    m = state.get("exp_avg", np.zeros_like(p))
    state["exp_avg"] = beta2 * m + (1 - beta2) * g
    return p - lr * weight_decay * p - lr * np.sign(beta1 * m + (1 - beta1) * g)


"""
ROWS = """    _row(nemo, onepass.Nemo),
    _row(nemo, onepass.Nemo, betas=(0.5, 0.8), weight_decay=0.1),
"""
PAGE = """::: onepass.Nemo

## When to use it

In a test.

## Defaults that work

All of them.

## The rule

::: onepass.Nemo.rule
    options:
      show_root_heading: false
      show_source: true
"""
# What is asked of it: its mathematics, its options, its page, its row.
FILES = (
    *("test_algorithms", "test_bad_options", "test_docs"),
    *("test_large", "test_mutations", "test_numerics"),
)
# The program must know it by its name, in the bench, the gallery and the curves, too.
CHECK = """
import contextlib
import runpy
import sys

import pytest

import onepass
from onepass.app import cli
from onepass.app.bench import suite
from onepass.app.catalog import find_trainable, find_variant, optimizers
from onepass.app.gallery import paths

assert "Nemo" in optimizers()
assert find_variant("nemo").cls is find_trainable("NEMO").cls
assert "nemo" in suite.every() and "nemo" in suite.list_elementwise()
assert onepass.Nemo in [contender.cls for contender in paths.CONTENDERS]
curves = runpy.run_path("benchmarks/curves_contenders.py")
assert "nemo" in [contender.optimizer for contender in curves["CONTENDERS"]]
options = sys.argv[1:]
sys.argv = ["onepass", "explain", "nemo"]
with contextlib.suppress(SystemExit):
    cli.main()
sys.exit(pytest.main(options))
"""
# Without a page or a row.
NO_PAGE = (
    "onepass.Nemo is described on no page: write docs/algorithms/nemo.md, whose first line is "
    "'::: onepass.Nemo', with the headings of docs/algorithms/adam.md: ## When to use it, "
    "## Defaults that work, ## The rule"
)
NO_ROW = (
    "onepass.Nemo has no row in tests/table.py: write its update there as a function in float64, "
    "from the paper, and into TABLE a row _row(nemo, onepass.Nemo) for each set of options"
)


def insert(path: Path, mark: str, text: str, *, after: bool) -> None:
    """Write a text before or after the first place of a mark."""
    before = path.read_text(encoding="utf-8")
    assert mark in before, f"{path.name} has no {mark!r} any more"
    changed = before.replace(mark, mark + text if after else text + mark, 1)
    path.write_text(changed, encoding="utf-8")


def check(folder: Path, files: Iterable[str]) -> str:
    """Run what knows the algorithm in a copy of the repository, and return all that is said."""
    paths = os.pathsep.join([str(folder), str(folder / "tests")])
    environment = os.environ | {"PYTHONPATH": paths}
    options = ("-q", "-p", "no:cacheprovider", "-rA", "--tb=short", "-k", "Nemo")
    command = [sys.executable, "-c", CHECK, *options, *(f"tests/{file}.py" for file in files)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    return done.stdout + done.stderr


def list_passed(said: str) -> set[str]:
    """Return the tests that passed, in any file; none may have failed."""
    assert not re.search(r"^(FAILED|ERROR) |Error", said, re.MULTILINE), said[-5000:]
    return set(re.findall(r"^PASSED tests/\w+\.py::(\w+)\[", said, re.MULTILINE))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the repository that has the algorithm: class, name, rows and page."""
    for name in ("onepass", "tests", "docs", "examples"):
        # With what Python has compiled: it holds for the copy, too.
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.png"))
    (tmp_path / "benchmarks").mkdir()
    for name in ("pyproject.toml", "mkdocs.yml", "benchmarks/curves_contenders.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "onepass/algorithms/nemo.py").write_text(CLASS, encoding="utf-8")
    names = tmp_path / "onepass/__init__.py"
    insert(names, "from .algorithms.muon", "from .algorithms.nemo import Nemo\n", after=False)
    insert(names, "__all__ = [\n", '    "Nemo",\n', after=True)
    table = tmp_path / "tests/table.py"
    insert(table, "def _row(", REFERENCE, after=False)
    insert(table, "TABLE: tuple[Row, ...] = (\n", ROWS, after=True)
    (tmp_path / "docs/algorithms/nemo.md").write_text(PAGE, encoding="utf-8")
    return tmp_path


def test_a_further_algorithm_passes(copy: Path) -> None:
    """All properties hold, its mutants fail, and the program explains it. Comparisons with torch
    leave it out."""
    said = check(copy, FILES)
    passed = list_passed(said)
    assert passed >= {
        "test_a_wrong_rule_is_noticed",
        "test_all_indices_are_wide",
        "test_every_algorithm_is_held_against_a_reference",
        "test_every_optimizer_has_a_page",
        "test_kernel_is_the_oracle",
        "test_maximize_is_the_negated_gradient",
        "test_reference",
        "test_threads_do_not_matter",
    }
    assert not [name for name in passed if "torch" in name], passed
    assert "4 bytes of state per parameter" in said
    assert "sign(lerp(exp_avg, g, 1 - beta1))" in said


def test_sentences_say_what_it_lacks() -> None:
    """Here, where it has neither a row nor a page."""
    for lacks, sentence in (
        (test_every_algorithm_is_held_against_a_reference, NO_ROW),
        (test_docs.test_every_optimizer_has_a_page, NO_PAGE),
    ):
        with pytest.raises(AssertionError) as caught:
            lacks("Nemo")
        assert str(caught.value).startswith(sentence)
