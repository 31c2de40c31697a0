"""The documentation says what is there: a page for every optimizer, links that lead somewhere,
numbers that hold."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import onepass
from onepass.app.catalog import find_variant
from onepass.app.explain.explanation import explain

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {
    path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8")
    for path in DOCS.rglob("*.md")
}
NAV = re.findall(
    r"^ +- (?:[^:\n]+: )?(\S+\.md)$",
    (ROOT / "mkdocs.yml").read_text(encoding="utf-8"),
    re.MULTILINE,
)
PUBLIC = {name: getattr(onepass, name) for name in onepass.__all__}
OPTIMIZERS = [
    name
    for name, value in PUBLIC.items()
    if isinstance(value, type)
    and issubclass(value, onepass.Optimizer)
    and value is not onepass.Optimizer
]
# Algorithm, page, variant, state, bytes moved a step.
TABLE = re.findall(
    r"^\| \[(\w+)\]\((\w+\.md)\)(?:, (\w+))? \| (.*?) \| (\d+)", PAGES["algorithms/index.md"], re.M
)


def test_every_page_is_in_the_navigation_once() -> None:
    assert sorted(NAV) == sorted(PAGES)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_has_a_page(name: str) -> None:
    pages = [page for page in NAV if f"::: onepass.{name}\n" in PAGES[page]]
    assert len(pages) == 1, f"{name} is described on {pages or 'no page'}"
    assert f"- {name}: {pages[0]}\n" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    text = PAGES[pages[0]]
    assert "## When to use it" in text
    assert "## Defaults that work" in text
    if hasattr(getattr(onepass, name), "rule"):
        assert "## The rule" in text
    assert f"]({Path(pages[0]).name})" in PAGES["algorithms/index.md"]
    assert f"]({pages[0]})" in PAGES["how-to-choose.md"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_docstring_has_its_mathematics_and_its_source(name: str) -> None:
    text = inspect.getdoc(PUBLIC[name]) or ""
    assert text.count("$$") >= 2, f"{name}: no formula"
    assert text.count("$$") % 2 == 0, f"{name}: a formula does not end"
    assert text.replace("$$", "").count("$") % 2 == 0, f"{name}: a formula in a line does not end"
    assert re.search(r"arXiv:\d{4}\.\d{4,5}\b|\b(19|20)\d\d\b", text), f"{name}: no reference"


@pytest.mark.parametrize("name", [name for name in PUBLIC if name not in OPTIMIZERS])
def test_everything_public_is_explained(name: str) -> None:
    pages = PAGES["reference.md"] + PAGES["own-rule.md"]
    assert f"::: onepass.{name}\n" in pages or f"`{name}`" in pages


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\(([^)\s#]+)[^)]*\)", PAGES[page])
    for target in targets:
        if "://" not in target:
            found = (DOCS / page).parent / target
            assert found.exists(), f"{page} links to {target}"
            assert found.resolve().is_relative_to(DOCS), (
                f"{page} links to {target}, which is not in the site"
            )


def test_the_rule_that_is_shown_is_the_example() -> None:
    path, first, last = re.findall(r'--8<-- "(.+):(\d+):(\d+)"', PAGES["own-rule.md"])[0]
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    assert lines[int(first) - 1].startswith("class Lion")
    assert lines[int(last) - 1].lstrip().startswith("return")


def test_the_rule_with_states_of_other_shapes_runs() -> None:
    names: dict[str, Any] = {}
    block = next(
        b
        for b in re.findall(r"```python\n(.*?)```", PAGES["own-rule.md"], re.S)
        if "class Factored" in b
    )
    exec(block, names)
    p = torch.ones(4, 3, requires_grad=True)
    optimizer = names["Factored"]([p], lr=0.5)
    p.grad = torch.full((4, 3), 2.0)
    optimizer.step()
    # The first step is a step of lr against the sign, as for Adam.
    torch.testing.assert_close(p.detach(), torch.full((4, 3), 0.5))
    assert {
        name: tuple(value.shape) for name, value in optimizer.state[p].items() if name != "step"
    } == {
        "row": (4, 1),
        "column": (1, 3),
    }


@pytest.mark.parametrize(("name", "page", "option", "state", "moved"), TABLE, ids=str)
def test_the_table_of_algorithms_says_what_the_program_does(
    name: str, page: str, option: str, state: str, moved: str
) -> None:
    variant = find_variant("-".join(part.lower() for part in (name, option) if part))
    program = explain(name, [f"--{key}={value}" for key, value in variant.options.items()]).program
    assert sum(program.bytes_per_parameter) == int(moved)
    if state.isdecimal():
        assert sum(c.format.itemsize for c in program.columns if c.name not in ("p", "g")) == int(
            state
        )


@pytest.mark.parametrize("task", ["digits", "text"])
def test_the_measured_table_is_that_of_the_numbers(task: str) -> None:
    """Rates and losses on the page are those in benchmarks/curves.json."""
    runs = json.loads((ROOT / "benchmarks" / "curves.json").read_text(encoding="utf-8"))["runs"]
    known: dict[str, list[float]] = {}
    for run in runs:
        if run["task"] == task and not run["diverged"]:
            known.setdefault(f"{run['name']} {run['lr']:g}", []).append(run["held_out_loss"][-1])
    expected = {f"{sum(losses) / len(losses):.4f}" for losses in known.values()}
    section = re.split(r"\n##+ ", PAGES["how-to-choose.md"].split(f"curves-{task}.png")[1])[0]
    shown = re.findall(r"^\| [^|]+ \| [^|]+ \| [^|]+ \| (\d\.\d{4}) \|", section, re.MULTILINE)
    assert shown
    assert set(shown) <= expected
