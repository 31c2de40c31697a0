"""What the site derives from the pages of algorithms: their places in the navigation and in tables.

mkdocs calls `on_config` and `on_page_markdown` (`hooks` in mkdocs.yml). They leave alone what is
written by hand, and add only algorithms that a page exists for and that nobody has placed yet:

- in mkdocs.yml, at the end of the section "Algorithms";
- in docs/algorithms/index.md, at the end of the table, with bytes from the algorithm's program;
- in docs/how-to-choose.md, in a sentence below the first table.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SECTION = "Algorithms"


def on_config(config: Any) -> Any:
    """Complete the navigation."""
    config["nav"] = complete_nav(config["nav"], Path(config["docs_dir"]))
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Complete the pages that name all algorithms."""
    folder = Path(config["docs_dir"])
    if page.file.src_uri == "algorithms/index.md":
        return complete_index(markdown, folder)
    if page.file.src_uri == "how-to-choose.md":
        return complete_choice(markdown, folder)
    return markdown


def find_pages(folder: Path) -> dict[str, str]:
    """Return the page of each algorithm by its class: `{"AdamW": "algorithms/adamw.md", ...}`."""
    found = {}
    for path in sorted(folder.glob("algorithms/*.md")):
        described = re.match(r"::: onepass\.(\w+)\n", path.read_text(encoding="utf-8"))
        if described:
            found[described[1]] = path.relative_to(folder).as_posix()
    return found


def complete_nav(nav: list[Any], folder: Path) -> list[Any]:
    """Return the navigation with every algorithm in the section of algorithms."""
    entries = next(entry[SECTION] for entry in nav if SECTION in entry)
    named = {page for entry in entries if isinstance(entry, dict) for page in entry.values()}
    missing = [{name: page} for name, page in find_pages(folder).items() if page not in named]
    return [{SECTION: entries + missing} if SECTION in entry else entry for entry in nav]


def complete_index(markdown: str, folder: Path) -> str:
    """Return the page with a row for every algorithm in its table."""
    rows = [
        row_of(name, Path(page).name)
        for name, page in find_pages(folder).items()
        if f"]({Path(page).name})" not in markdown
    ]
    return add_below_table(markdown, rows)


def complete_choice(markdown: str, folder: Path) -> str:
    """Return the page with a link to every algorithm."""
    links = [
        f"[{name}]({page})"
        for name, page in find_pages(folder).items()
        if f"]({page})" not in markdown
    ]
    return add_below_table(markdown, ["", f"See also {', '.join(links)}."] if links else [])


def add_below_table(markdown: str, lines: Iterable[str]) -> str:
    """Insert lines below the first table of a page."""
    table = re.search(r"(?m)^(?:\|.*\n)+", markdown)
    assert table is not None, "the page has lost its table"
    return "".join(
        [markdown[: table.end()], *(f"{line}\n" for line in lines), markdown[table.end() :]]
    )


def row_of(name: str, page: str) -> str:
    """Return an algorithm's row: its bytes of state, bytes moved, reference, and first sentence."""
    import onepass
    from onepass.app.explain.explanation import explain

    text = inspect.getdoc(getattr(onepass, name)) or ""
    state = moved = "see the page"
    if hasattr(getattr(onepass, name), "rule"):
        program = explain(name).program
        columns = [column for column in program.columns if column.name not in ("p", "g")]
        state = str(sum(column.format.itemsize for column in columns))
        moved = str(sum(program.bytes_per_parameter))
    number = re.search(r"arXiv:(\d{4}\.\d{4,5})", text)
    reference = f"[{number[0]}](https://arxiv.org/abs/{number[1]})" if number else "see the page"
    first_sentence = " ".join(text.split("\n\n")[0].split()).rstrip(".")
    return f"| [{name}]({page}) | {state} | {moved} | {reference} | {first_sentence} |"
