"""Whether README.zh-CN.md is README.md in Chinese: heading by heading, the same code, tables,
numbers, names, links and lists.

`python tests/support/translation.py` prints a line that says where the Chinese text is behind, or
nothing.

Both texts are read as sequences of blocks. A translation must not change a block's shape: its
place, and the facts in it. The sequences of shapes must be equal. Where they are not, the report
shows the lines of both files.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

from markdown_it import MarkdownIt  # comes with rich
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
ENGLISH, CHINESE = "README.md", "README.zh-CN.md"
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in (ENGLISH, CHINESE)}
PARSER = MarkdownIt("commonmark").enable("table")
KINDS = {"p": "paragraph", "li": "list item", "tr": "table row"} | {
    f"h{n}": f"heading {n * '#'}" for n in range(1, 7)
}
# Read from the text of the package: importing it takes seconds.
PACKAGE = (ROOT / "onepass" / "__init__.py").read_text(encoding="utf-8")
OPTIMIZERS = [
    "Optimizer",
    *re.findall(r"\w+", " ".join(re.findall(r"^from \.algorithms\S* import (.+)$", PACKAGE, re.M))),
]
NUMBER = r"\d+(?:[.,]\d+)*"
NAME = rf"(?<![A-Za-z])(?:{'|'.join(OPTIMIZERS)})(?![A-Za-z])"
UNIT = r"\b(?:ms|[kMGT]B)\b"
HAN = re.compile(r"[\u4e00-\u9fff]")
WORD = re.compile(r"[A-Za-z]{2,}|" + HAN.pattern)


@dataclass(frozen=True)
class Block:
    """A heading, paragraph, list item, table row or piece of code: what it is, what it states, and
    where."""

    kind: str
    level: int
    facts: tuple[str, ...]
    text: str
    file: str
    line: int
    section: str

    @property
    def shape(self) -> tuple[str, int, tuple[str, ...]]:
        """All of it that a translation keeps."""
        return self.kind, self.level, self.facts

    def __str__(self) -> str:
        first = self.text.strip().splitlines()[0] if self.text.strip() else ""
        return f"{self.file}:{self.line}: {self.kind}, in {self.section!r}: {first[:60]}"


def facts_of(inline: Token) -> list[str]:
    """What a line of text states in any language: code, links, images, emphasis, tags, numbers,
    optimizers."""
    facts = []
    for token in inline.children or ():
        if token.type == "code_inline":
            facts.append(f"code {token.content}")
        elif token.type in ("link_open", "image"):
            target = str(token.attrs.get("href", token.attrs.get("src")))
            facts.append(f"{token.tag} -> {'the other language' if target in TEXTS else target}")
        elif token.type in ("strong_open", "em_open", "html_inline"):
            facts.append(token.markup or token.content)
        if token.type in ("text", "image"):
            facts += [f"number {number}" for number in re.findall(NUMBER, token.content)]
            facts += re.findall(NAME, token.content)
    return sorted(facts)


def cell_of(column: int, inline: Token) -> list[str]:
    """A table's cell: itself where it has no words but code, units and optimizers, otherwise what
    it states."""
    words = WORD.search(re.sub(rf"`[^`]*`|{NAME}|{UNIT}", "", inline.content))
    return [
        f"column {column}: {fact}"
        for fact in (["words", *facts_of(inline)] if words else [inline.content])
    ]


def blocks(file: str, text: str) -> Iterator[Block]:
    """Reads Markdown as a sequence of blocks."""
    section, row = "the top", []
    tokens = PARSER.parse(text)
    for i, token in enumerate(tokens):
        before = tokens[i - 1]
        kind, facts, content = "", [], token.content
        if token.type == "tr_open":
            row = []
        elif before.type in ("th_open", "td_open"):
            row.append(token)
        elif token.type == "tr_close":
            kind = KINDS["tr"]
            facts = [fact for column, cell in enumerate(row, 1) for fact in cell_of(column, cell)]
            content = " | ".join(cell.content for cell in row)
        elif token.type == "inline":
            kind, facts = (
                KINDS["li" if tokens[i - 2].type == "list_item_open" else before.tag],
                facts_of(token),
            )
            section = token.content if before.type == "heading_open" else section
        elif token.type in ("fence", "code_block"):
            kind, facts = f"code block {token.info}".strip(), content.splitlines()
        elif token.type == "html_block":
            kind, facts = "HTML", re.findall(r"<[^>]*>", content)
        if kind:
            line = next(t.map[0] for t in (token, *(row[:1])) if t.map) + 1
            yield Block(kind, token.level, tuple(facts), content, file, line, section)


def only_in(these: Sequence[Block], those: Sequence[Block]) -> str:
    """The facts in some blocks that others lack."""
    lacking = Counter(fact for block in these for fact in block.facts)
    lacking -= Counter(fact for block in those for fact in block.facts)
    return ", ".join(repr(fact) for fact in lacking.elements())


def slide(text: Sequence[Block], start: int, end: int) -> int:
    """By how many blocks a stretch that the other text lacks can move up, so that it begins as
    sections do."""
    for up in range(start):
        if text[start - up].kind.startswith("heading"):
            return up
        if text[start - up - 1].shape != text[end - up - 1].shape:
            break
    return 0


@dataclass(frozen=True)
class Difference:
    """A stretch of blocks that the two texts do not share.

    `ours` are the blocks of the English text, `theirs` those of the Chinese. One of them may be
    empty; then the last block before the gap says where it is.
    """

    ours: Sequence[Block]
    theirs: Sequence[Block]
    before_ours: Block | None
    before_theirs: Block | None

    def __str__(self) -> str:
        """The lines of both files, and the facts that only one of them states."""
        lines = []
        for file, blocks, others, before in (
            (ENGLISH, self.ours, self.theirs, self.before_ours),
            (CHINESE, self.theirs, self.ours, self.before_theirs),
        ):
            lines += [f"  {block}" for block in blocks]
            if not blocks:
                lines.append(f"  {file}: nothing after {before or 'its top'}")
            if facts := only_in(blocks, others):
                lines.append(f"    only in {file}: {facts}")
        return "\n".join([*lines, ""])

    @property
    def title(self) -> str:
        """The line of the English text, and what stands there: `README.md:14 (paragraph)`."""
        if self.ours:
            return f"{ENGLISH}:{self.ours[0].line} ({self.ours[0].kind})"
        return f"{CHINESE}:{self.theirs[0].line} ({self.theirs[0].kind}, not in {ENGLISH})"


def find_differences(english: str, chinese: str) -> list[Difference]:
    """Return where the two texts part, in their order."""
    ours = list(blocks(ENGLISH, english))
    theirs = list(blocks(CHINESE, chinese))
    shapes = [block.shape for block in ours], [block.shape for block in theirs]
    found = []
    for change, a, b, c, d in SequenceMatcher(None, *shapes, autojunk=False).get_opcodes():
        if change == "equal":
            continue
        up = 0
        if change == "delete":
            up = slide(ours, a, b)
        elif change == "insert":
            up = slide(theirs, c, d)
        before_ours = ours[a - up - 1] if a > up else None
        before_theirs = theirs[c - up - 1] if c > up else None
        found.append(
            Difference(ours[a - up : b - up], theirs[c - up : d - up], before_ours, before_theirs)
        )
    return found


def differences(english: str, chinese: str) -> str:
    """Return a report of where the two texts part, with the lines of both files; empty if they do
    not."""
    return "\n".join(map(str, find_differences(english, chinese)))


def warning(english: str, chinese: str) -> str:
    """Return one line that names every block where the Chinese text is behind; empty if it is
    not."""
    places = [difference.title for difference in find_differences(english, chinese)]
    if not places:
        return ""
    return (
        f"warning: {CHINESE} is behind {ENGLISH}, which is no error: {', '.join(places)}; "
        "make test-translation shows both texts"
    )


def main() -> None:
    if line := warning(TEXTS[ENGLISH], TEXTS[CHINESE]):
        print(line)


if __name__ == "__main__":
    main()
