"""The documentation says what is there: a page for every optimizer, links that lead somewhere,
numbers that hold."""

from __future__ import annotations

import inspect
import json
import re
import runpy
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
# What the site adds to the navigation and to tables: algorithms that these do not name yet.
HOOKS = runpy.run_path(str(DOCS / "templates" / "algorithms.py"))
PLACED_BY_HAND = re.findall(
    r"^ +- (?:[^:\n]+: )?(\S+\.md)$",
    (ROOT / "mkdocs.yml").read_text(encoding="utf-8"),
    re.MULTILINE,
)
NAV = [*PLACED_BY_HAND]
NAV += [page for page in HOOKS["find_pages"](DOCS).values() if page not in PLACED_BY_HAND]
HEADINGS = ("## When to use it", "## Defaults that work", "## The rule")
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
    """Those of algorithms are placed by the site where mkdocs.yml does not name them."""
    for page in PAGES:
        assert page in NAV, f"docs/{page} is on no menu: write it into `nav` in mkdocs.yml"
    assert sorted(NAV) == sorted(PAGES)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_has_a_page(name: str) -> None:
    """A page is all that an algorithm needs; its places on the site follow from it."""
    pages = [page for page in NAV if f"::: onepass.{name}\n" in PAGES[page]]
    assert len(pages) == 1, (
        f"onepass.{name} is described on {pages or 'no page'}: write "
        f"docs/algorithms/{name.lower()}.md, whose first line is '::: onepass.{name}', with the "
        f"headings of docs/algorithms/adam.md: {', '.join(HEADINGS)}"
    )
    (page,) = pages
    needed = HEADINGS if hasattr(getattr(onepass, name), "rule") else HEADINGS[:2]
    for heading in needed:
        assert f"{heading}\n" in PAGES[page], (
            f"docs/{page} has no {heading!r}: write this section as docs/algorithms/adam.md has it"
        )
    index = HOOKS["complete_index"](PAGES["algorithms/index.md"], DOCS)
    assert f"]({Path(page).name})" in index
    assert f"]({page})" in HOOKS["complete_choice"](PAGES["how-to-choose.md"], DOCS)


def test_what_is_placed_by_hand_is_left_alone() -> None:
    """And what is missing is added: here everything, to pages that name nothing."""
    known = HOOKS["find_pages"](DOCS)
    assert set(known) == set(OPTIMIZERS)
    for page, complete in (
        ("algorithms/index.md", "complete_index"),
        ("how-to-choose.md", "complete_choice"),
    ):
        named = [name for name, path in known.items() if f"{Path(path).name})" in PAGES[page]]
        assert (HOOKS[complete](PAGES[page], DOCS) == PAGES[page]) == (len(named) == len(known))
        table = "above\n\n| a | b |\n|---|---|\n\nbelow\n"
        completed = HOOKS[complete](table, DOCS)
        assert completed.startswith(table.removesuffix("\nbelow\n"))
        assert completed.endswith("\nbelow\n")
        assert all(f"[{name}](" in completed for name in known)
    nav = [{"Home": "index.md"}, {"Algorithms": ["algorithms/index.md", {"SGD": known["SGD"]}]}]
    (home, section) = HOOKS["complete_nav"](nav, DOCS)
    assert home == nav[0]
    assert section["Algorithms"][:2] == nav[1]["Algorithms"]
    added = {name for entry in section["Algorithms"][2:] for name in entry}
    assert added == set(known) - {"SGD"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_docstring_has_its_mathematics_and_its_source(name: str) -> None:
    text = inspect.getdoc(PUBLIC[name]) or ""
    where = f"the docstring of onepass.{name}"
    assert text.count("$$") >= 2, f"{where} has no formula: write its mathematics between $$ and $$"
    assert text.count("$$") % 2 == 0, f"{where} has a formula that does not end: add $$"
    assert text.replace("$$", "").count("$") % 2 == 0, (
        f"{where} has a formula within a line that does not end: add $"
    )
    assert re.search(r"arXiv:\d{4}\.\d{4,5}\b|\b(19|20)\d\d\b", text), (
        f"{where} has no reference: name its authors and year, or arXiv:NUMBER"
    )


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
