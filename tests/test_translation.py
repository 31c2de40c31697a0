"""The Chinese README says what the English one says (`make test-translation`), and the comparison
of the two notices what parts."""

from __future__ import annotations

import random
import re
import subprocess
import sys

import pytest
from support import translation
from support.translation import (
    CHINESE,
    ENGLISH,
    HAN,
    OPTIMIZERS,
    TEXTS,
    blocks,
    differences,
    warning,
)

from onepass.app.catalog import optimizers

# Whoever does not write Chinese may leave README.zh-CN.md behind: `make test` only says so.
in_chinese = pytest.mark.translation


@in_chinese
def test_the_translation_is_in_step() -> None:
    report = differences(TEXTS[ENGLISH], TEXTS[CHINESE])
    assert not report, (
        f"{CHINESE} must say what {ENGLISH} says, block by block; they part here:\n{report}"
    )


@in_chinese
def test_no_sentence_is_left_in_english() -> None:
    for block in blocks(CHINESE, TEXTS[CHINESE]):
        if not block.kind.startswith(("code", "HTML")) and re.search(
            r"(?:[a-z]{2,}\W+){2}[a-z]{2,}", block.text
        ):
            assert HAN.search(block.text), str(block)


def test_the_two_link_to_each_other_under_the_title() -> None:
    assert TEXTS[ENGLISH].splitlines()[2] == f"[简体中文]({CHINESE})"
    assert TEXTS[CHINESE].splitlines()[2] == f"[English]({ENGLISH})"


@in_chinese
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


def test_a_warning_is_one_line_that_names_all_blocks() -> None:
    english, chinese = SAMPLES
    assert warning(english, chinese) == ""
    longer = english.replace("## ", "New.\n\n## ") + "\n- third\n"
    assert warning(longer, chinese) == (
        f"warning: {CHINESE} is behind {ENGLISH}, which is no error: {ENGLISH}:14 (paragraph), "
        f"{ENGLISH}:27 (list item); make test-translation shows both texts"
    )
    shorter = re.sub(r"- second.*\n", "", english)
    assert f"{CHINESE}:23 (list item, not in {ENGLISH})" in warning(shorter, chinese)


def test_a_text_that_is_behind_is_no_error() -> None:
    done = subprocess.run([sys.executable, translation.__file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == warning(TEXTS[ENGLISH], TEXTS[CHINESE])


def test_names_are_those_of_the_package() -> None:
    assert set(OPTIMIZERS) == {"Optimizer", *optimizers()}
