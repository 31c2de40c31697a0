"""README.zh-CN.md is README.md in Chinese: heading by heading, the same code, tables, numbers,
names, links and lists.

Both are read as sequences of blocks. What a translation must not change is a block's shape: where
it stands, and the facts in it. The sequences of shapes must be equal; where they are not, the
report shows both files' lines.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

import pytest
from markdown_it import MarkdownIt  # comes with rich
from markdown_it.token import Token

import onepass

ROOT = Path(__file__).parent.parent
ENGLISH, CHINESE = "README.md", "README.zh-CN.md"
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in (ENGLISH, CHINESE)}
PARSER = MarkdownIt("commonmark").enable("table")
KINDS = {"p": "paragraph", "li": "list item", "tr": "table row"} | {
    f"h{n}": f"heading {n * '#'}" for n in range(1, 7)
}
OPTIMIZERS = [
    name
    for name in onepass.__all__
    if isinstance(value := getattr(onepass, name), type) and issubclass(value, onepass.Optimizer)
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


def differences(english: str, chinese: str) -> str:
    """Where the two texts part, with the lines of both files; empty where they do not."""
    ours, theirs = list(blocks(ENGLISH, english)), list(blocks(CHINESE, chinese))
    matcher = SequenceMatcher(
        None, [b.shape for b in ours], [b.shape for b in theirs], autojunk=False
    )
    report = []
    for change, a, b, c, d in matcher.get_opcodes():
        if change == "equal":
            continue
        up = (
            slide(ours, a, b)
            if change == "delete"
            else slide(theirs, c, d)
            if change == "insert"
            else 0
        )
        a, b, c, d = a - up, b - up, c - up, d - up
        here, there = ours[a:b], theirs[c:d]
        for file, side, other, above in (
            (ENGLISH, here, there, ours[:a]),
            (CHINESE, there, here, theirs[:c]),
        ):
            report += [
                f"  {block}"
                for block in side or [f"{file}: nothing after {above[-1] if above else 'its top'}"]
            ]
            report += [f"    only in {file}: {facts}"] if (facts := only_in(side, other)) else []
        report.append("")
    return "\n".join(report)


def test_the_translation_is_in_step() -> None:
    report = differences(TEXTS[ENGLISH], TEXTS[CHINESE])
    assert not report, (
        f"{CHINESE} must say what {ENGLISH} says, block by block; they part here:\n{report}"
    )


def test_no_sentence_is_left_in_english() -> None:
    for block in blocks(CHINESE, TEXTS[CHINESE]):
        if not block.kind.startswith(("code", "HTML")) and re.search(
            r"(?:[a-z]{2,}\W+){2}[a-z]{2,}", block.text
        ):
            assert HAN.search(block.text), str(block)


def test_the_two_link_to_each_other_under_the_title() -> None:
    assert TEXTS[ENGLISH].splitlines()[2] == f"[简体中文]({CHINESE})"
    assert TEXTS[CHINESE].splitlines()[2] == f"[English]({ENGLISH})"


def test_no_chinese_line_is_wrapped() -> None:
    """A line break between two Chinese characters is shown as a space."""
    broken = re.search(r".*[\u3000-\u9fff\uff00-\uffef]\n(?![-|#`\d\s]).+", TEXTS[CHINESE])
    assert not broken, f"{CHINESE}: a paragraph is one line, but {broken.group()!r} are two"


def test_every_line_and_every_digit_counts() -> None:
    """Dropping any line of the translation is reported, and so is changing any number: one in four
    is tried."""
    text = TEXTS[CHINESE]
    spans = [m.span() for m in re.finditer(r".*\S.*\n", text)] + [
        m.span() for m in re.finditer(r"\d", text)
    ]
    for start, end in random.Random(0).sample(spans, len(spans) // 4):
        other = str((int(text[start:end]) + 1) % 10) if end == start + 1 else ""
        assert differences(TEXTS[ENGLISH], text[:start] + other + text[end:]), text[start:end]


SAMPLE = """# Title

[To the other]({other})

{several} words on `lr`, 3 tensors and [more](docs/more.md).

![{a_figure}](docs/figure.png)

| {algorithm} | ms | state |
|---|---|---|
| Adam, 16 {tensors} | **73** | 0.1 MB |
| RAdam | 70 (1.2x) | `exp_avg` |

## {two} `commands`

    make train  # trains

```python
optimizer.step()  # one call
```

- {first} **{bold}** {item}
- {second}, 1 or [2](https://example.org)
"""
WORDS = {
    "several": "几个词",
    "a_figure": "图",
    "algorithm": "算法",
    "tensors": "张量",
    "two": "两条",
    "first": "第一",
    "bold": "粗体",
    "item": "项",
    "second": "第二",
}
SAMPLES = (
    SAMPLE.format(other=CHINESE, **{name: name for name in WORDS}),
    SAMPLE.format(other=ENGLISH, **WORDS),
)
# What is done to the sample's translation: a pattern, what takes its place, and a part of what is
# then reported.
MUTATIONS = {
    "no heading": (
        r"## .*\n",
        "",
        f"{ENGLISH}:14: heading ##, in 'two `commands`': two `commands`",
    ),
    "heading of another level": (r"## ", "### ", f"{CHINESE}:14: heading ###, "),
    "heading with other code": (r"`commands`", "`command`", f"only in {CHINESE}: 'code command'"),
    "no code block": (r"```(.|\n)*```\n", "", f"{CHINESE}: nothing after {CHINESE}:16: code block"),
    "no commands": (r"    make.*\n", "", f"{ENGLISH}:16: code block"),
    "code changed": (r"step\(\)", "step(0)", f"only in {CHINESE}: 'optimizer.step(0)  # one call'"),
    "comment translated": (r"# trains", "# 训练", f"only in {ENGLISH}: 'make train  # trains'"),
    "no language": (r"```python", "```", f"{CHINESE}:18: code block, "),
    "number in a table": (r"70 \(1.2x", "70 (1.3x", f"only in {ENGLISH}: 'column 2: 70 (1.2x)'"),
    "number in a table's words": (r"16", "61", f"only in {CHINESE}: 'column 1: number 61'"),
    "unit in a table": (r"MB", "GB", f"only in {CHINESE}: 'column 3: 0.1 GB'"),
    "code in a table": (r"exp_avg", "exp_avg_sq", f"only in {CHINESE}: 'column 3: `exp_avg_sq`'"),
    "emphasis in a table": (r"\*\*73\*\*", "73", f"only in {ENGLISH}: 'column 2: **73**'"),
    "optimizer in a table": (r"\| Adam", "| AdamW", f"only in {CHINESE}: 'column 1: AdamW'"),
    "no row": (
        r"\| RAdam.*\n",
        "",
        f"{ENGLISH}:12: table row, in 'Title': RAdam | 70 (1.2x) | `exp_avg`",
    ),
    "no column": (r"(?m)^(\|.*)\|.*\|$", r"\1|", f"only in {ENGLISH}: 'column 3: words'"),
    "no paragraph": (r".*lr.*\n", "", f"{ENGLISH}:5: paragraph, in 'Title': several words on `lr`"),
    "no item": (r"- .*\n", "", f"{ENGLISH}:22: list item"),
    "items joined": (r"项\n- ", "项", f"{ENGLISH}:23: list item"),
    "item below another": (r"(- .*\n)- ", r"\1  - ", f"{CHINESE}:23: list item"),
    "other link": (r"docs/more", "docs/less", f"only in {CHINESE}: 'a -> docs/less.md'"),
    "links exchanged": (
        r"(docs/more.md)((?:.|\n)*?)(docs/figure.png)",
        r"\3\2\1",
        "img -> docs/more.md",
    ),
    "no image": (r"!.*\n", "", f"only in {ENGLISH}: 'img -> docs/figure.png'"),
    "number in a line": (r"3 ", "4 ", f"only in {CHINESE}: 'number 4'"),
    "code in a line": (r"`lr`", "lr", f"only in {ENGLISH}: 'code lr'"),
    "emphasis that does not close": (r"粗体\*\* ", "粗体\u3002**", f"only in {ENGLISH}: '**'"),
}


def test_the_sample_is_in_step() -> None:
    assert not differences(*SAMPLES)


@pytest.mark.parametrize("name", MUTATIONS)
def test_what_parts_is_reported_where_it_does(name: str) -> None:
    english, chinese = SAMPLES
    pattern, replacement, expected = MUTATIONS[name]
    mutated = re.sub(pattern, replacement, chinese, count="(?m)" not in pattern)
    assert mutated != chinese
    report = differences(english, mutated)
    assert expected in report, report


def test_a_new_section_is_reported_where_it_is_missing() -> None:
    english, chinese = SAMPLES
    new, last, end = "\n## Schedules\n\nA `schedule`.\n", "\n## Last\n\nEnd.\n", "\n## 最后\n\n完\n"
    for ours, theirs in ((new, ""), (new + last, end), (last + new, end)):
        report = differences(english + ours, chinese + theirs).splitlines()
        assert [line.split(":")[2:] for line in report if f"  {ENGLISH}:" in line] == [
            [" heading ##, in 'Schedules'", " Schedules"],
            [" paragraph, in 'Schedules'", " A `schedule`."],
        ]
        assert any(f"{CHINESE}: nothing after {CHINESE}:" in line for line in report)
