"""Would the tests notice? Generated kernels for GPUs are made wrong in every small way, and each
must show.

The test for alignment is left alone: without it only the speed would change, here as on a GPU that
takes any address.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support.bare_kernels import graph_of, hypers_of, is_same, launch, program_of, random_columns
from support.extra_rules import ONE_NUMBER, Rule, everything, factored, lamb, largest, program
from support.interpreted_gpu import (
    Resident,
    bounded,
    compiled,
    device_oracle,
    interpreted,
    sensible,
)
from support.interpreter import interpret
from table import TABLE

from onepass.kernel import finish, trace
from onepass.kernel.gpu import launch as gpu
from onepass.kernel.gpu.jit import Source
from onepass.kernel.gpu.launch import Kernel
from onepass.kernel.gpu.tiles import BAND, BLOCK, SPAN, WIDTHS
from onepass.kernel.graph.trace import Program

Mistakes = dict[str, tuple[str, ...]]
# What stands in the source, as a pattern -> what could stand there by mistake.
WALKS: Mistakes = {
    r"(?<=tl\.load\(c\d \+ at), mask": ("",),
    r"(tl\.store\(c\d+ \+ at, \w+), mask": (r"\1",),
    r"(?<=left = )(.*) - start$": (r"\1 - start + 1", r"\1 - start - 1", r"\1"),
    r"(?<=at < )tl\.minimum\(left": ("tl.minimum(left - 1", "tl.minimum(left + 1"),
    r"(?<=\)) \+ start$": ("", " - start"),
    r"(?<=start = block\.to\(tl\.int64\) \* )BLOCK": ("(BLOCK - 1)",),
    r"(?<=row = table \+ tl\.load\(tensors \+ )0": ("1", "6"),
    r"(?<=tl\.load\(row \+ )0": ("1",),
    r"(?<=addresses \+ )0 \*": ("1 *",),
    r"(?<=addresses \+ )2 \*": ("0 *",),
    r"(?<=range\(0, )SPAN": ("SPAN - 1",),
    r"(?<=at = )i \* BLOCK \+": ("",),
    r"(?<=tl\.cdiv\(left, BLOCK\)), SPAN": (" - 1, SPAN",),
    r"(?<=\* 2 \+ )1, tl\.sum": ("0, tl.sum",),
    r"(?<=partials \+ beginl\d \+ at \* )2": ("1",),
    r"(?<=one = tl\.load\(partials \+ begin)(.*), at < (unitsl\d)": (r"\1, at < \2 - 1",),
}
TILES: Mistakes = {
    r"(?<=unit = )first \+ tl": ("tl",),
    r"(?<=is_line = line )<": ("<=",),
    r"\(columns < length\)\[None": ("(columns <= length)[None", "(columns < length - 1)[None"),
    r"(?<=columns = )column \* COLUMNS": ("0 * COLUMNS",),
    r"(?<=group = line // )per": ("(per + 1)",),
    r"(?<=at = \(line \* )length": ("(length + 1)",),
    r"(?<=line = )start \+ lines": ("begin + lines",),
    r"\(group \* length\)\[:, None\]": ("(0 * group)[:, None]",),
    r"(?<=column \* \()groups \* per": ("groups", "0 * per"),
    r"\(part \* groups \+": ("(0 * part +", "(part +"),
    r"\+ begin // per\) \* length": (") * length",),
    r"(?<=range\()1, parts": ("2, parts",),
    r"(?<=values \+ )part \* count": ("0 * count",),
    r"(?<=parts = tl\.load\(entry \+ )2": ("1",),
    r"(?<=tl\.where\(mask, \()(\w+)(\)\.to\(tl\.float64\), )0\.0": (r"\1\g<2>1.0",),
}
FACTORED: Mistakes = {r"total \+ one": ("total", "one")}
LARGEST: Mistakes = {
    r"larger\(total, one\)": ("total", "one"),
    r"larger\((d\d), ": (r"(0 * \1 + ",),
}
NUMBERS: Mistakes = {
    r"(?<=tl\.store\(fresh \+ tensor, )0": ("1",),
    r"(?<=if tl\.load\(guard\) )!= 0": ("== 0", "> 5"),
    r"(?<=steps = steps )&": ("|",),
    r"(?<=& \(tl\.load\(guard\) )== 0": ("!= 0",),
    r"(?<=steps = tl\.load\(tensors \+ )2": ("6",),
    r"(?<=tl\.load\(leaves \+ )(\d+ \* settings) \+ setting": (r"\1", r"\1 + 1 - setting"),
}
COUNTED: Mistakes = {
    r"(?<=\)) \+ 1\)\.to\(tl\.float64\)": (").to(tl.float64)", " + 2).to(tl.float64)"),
}
FIRST: Mistakes = {
    r"tl\.load\(fresh \+ tensor\)": (
        "(tl.load(fresh + tensor) * 0 + 1)",
        "(tl.load(fresh + tensor) * 0)",
    ),
}
OPERATIONS: Mistakes = {
    r"(?<=t\d = )(\w+) \+ (\w+)$": (r"\1 - \2",),
    r"(?<=t\d = )(\w+) \* (\w+)$": (r"\1 + \2",),
    r"tl\.div_rn\((\w+), ": (r"tl.div_rn(-\1, ",),
    r"tl\.sqrt_rn": ("tl.abs",),
    r"tl\.abs\((\w+)\)(?=$)": (r"\1",),
    r"(?<=\d) < (?=\w+$)": (" <= ", " > "),
    r"(?<=\d) <= (?=\w+$)": (" < ",),
    r"(?<=\d) == (?=\w+$)": (" != ",),
    r"round_to_even\((\w+)\)(?=$)": (r"tl.floor(\1)",),
    r"tl\.floor\((\w+)\)(?=$)": (r"round_to_even(\1)",),
    r"tl\.where\((\w+), (\w+), (\w+)\)(?=$)": (r"tl.where(\1, \3, \2)",),
    r" \^ ": (" | ",),
    r" \| ": (" & ",),
    r"(?<=t\d = )(\w+) == 0$": (r"\1 != 0",),
}


def wrong_walks(source: Source, mistakes: Mistakes, inside: str) -> Iterator[tuple[str, Source]]:
    """The text as a generator with one mistake would write it: everywhere, in functions whose names
    begin like this."""
    parts = re.split(r"(?m)^(?=@triton)", source.text)
    chosen = [bool(re.search(rf"(?m)^def ({inside})", part)) for part in parts]
    for pattern, others in mistakes.items():
        for other in others:
            changed = [
                re.sub(pattern, other, part, flags=re.MULTILINE) if change else part
                for part, change in zip(parts, chosen, strict=True)
            ]
            assert changed != parts, f"{pattern} is nowhere"
            yield f"{pattern} -> {other}", Source("".join(changed), source.functions)


def wrong_values(source: Source, mistakes: Mistakes, inside: str) -> Iterator[tuple[str, Source]]:
    """The text with one operation exchanged."""
    parts = re.split(r"(?m)^(?=@triton)", source.text)
    for k, part in enumerate(parts):
        for pattern, others in mistakes.items() if re.search(rf"(?m)^def ({inside})", part) else ():
            for found in re.finditer(pattern, part, re.MULTILINE):
                for other in others:
                    changed = part[: found.start()] + found.expand(other) + part[found.end() :]
                    line = part.splitlines()[part[: found.start()].count("\n")].strip()
                    yield (
                        f"{line}: -> {other}",
                        Source("".join([*parts[:k], changed, *parts[k + 1 :]]), source.functions),
                    )


Agrees = Callable[[Kernel], bool]


def check_all(
    right: Kernel,
    agrees: Agrees,
    wrong: Iterator[tuple[str, Source]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each mistake is noticed."""
    with bounded():
        assert agrees(right)
    unnoticed, count = [], 0
    for what, source in wrong:
        monkeypatch.setattr(gpu, "lower", lambda *_, source=source: source)
        mutant = Kernel(
            right.program, torch.device("cpu"), right.numbers if right.is_resident else None, "f32"
        )
        count += 1
        with bounded():
            if agrees(mutant):
                unnoticed.append(what)
    monkeypatch.undo()
    assert unnoticed == [], "\n".join(unnoticed)
    assert count > 5


@pytest.fixture(autouse=True, scope="module")
def _on_the_device() -> Iterator[None]:
    with interpreted():
        yield


def launched(
    one: Program, sizes: Sequence[Any], hypers: Sequence[dict[str, float]], share: float = 0.1
) -> Agrees:
    """Whether a kernel has the oracle's bits for these tensors, the last of which bears what others
    write beyond."""
    rng = np.random.default_rng(0)
    tensors = [sensible(random_columns(rng, one, size, share)) for size in sizes]
    given = list(sizes) if isinstance(sizes[0], tuple) else None
    rows = [i % len(hypers) for i in range(len(sizes))]
    with device_oracle():
        wanted = [
            interpret(one, t, hypers[row], given and given[i])
            for i, (t, row) in enumerate(zip(tensors, rows, strict=True))
        ]

    def agrees(kernel: Kernel) -> bool:
        try:
            after = launch(kernel, tensors, hypers, rows, sizes=given)
        except Exception:
            # It wrote where nobody may, or is no program.
            return False
        pairs = (
            (now[name], want[name])
            for now, want in zip(after, wanted, strict=True)
            for name in want
        )
        return all(is_same(got, want) for got, want in pairs)

    return agrees


def test_wrong_walks_over_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    one = program(lamb)
    hypers = [{"lr": 0.25}, {"lr": 0.5}]
    agrees = launched(one, (BLOCK + 3, 40, BLOCK * (SPAN + 1), 17, 4 * BLOCK), hypers, 0.0)
    right = compiled(one)
    check_all(right, agrees, wrong_walks(right.source, WALKS, "pass_|uniforms_"), monkeypatch)


@pytest.mark.parametrize(
    "rule", [factored, pytest.param(largest, marks=pytest.mark.slow)], ids=lambda r: r.__name__
)
def test_wrong_walks_over_matrices(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    one = program(rule)
    wide = WIDTHS[-1]
    sizes = (
        (2, BAND + 5, 7),
        (2, 3, wide + 9),
        (2, 2 * BLOCK // WIDTHS[0], WIDTHS[0]),
        (2, 8, 2 * wide),
    )
    agrees = launched(one, sizes, [{"lr": 0.25}, {"lr": 0.5}], 0.0)
    right = compiled(one)
    mistakes = TILES | (FACTORED if rule is factored else LARGEST)
    check_all(right, agrees, wrong_walks(right.source, mistakes, "pass_|fold"), monkeypatch)


def test_wrong_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its p moves where lr is 0, so that there is nothing to keep.
    graph = finish(trace(everything, ONE_NUMBER), exact=False)
    one = program_of(graph, *["float32"] * 3)
    hypers = [{"lr": 0.25}, {"lr": 0.3}, {"lr": 0.5}, {"lr": 0.0}]
    agrees = launched(one, (3000, 700, 3000, 700, 4 * BLOCK), hypers, 0.3)
    right = compiled(one)
    check_all(right, agrees, wrong_values(right.source, OPERATIONS, "values_"), monkeypatch)


def test_wrong_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step counts, whose step is the first, who steps, and the guard."""
    row = next(row for row in TABLE if str(row) == "SGD-momentum=0.9-dampening=0.3")
    nadam = next(row for row in TABLE if row.name == "NAdam")
    for of, names in ((row, ()), (nadam, ("mu_product", "step"))):
        graph = graph_of(of)
        one = program_of(graph, *["float32"] * 3)
        rng = np.random.default_rng(0)
        tensors = [random_columns(rng, one, n, 0.0) for n in (5, 30, 17, BLOCK)]
        numbers = {name: np.array([0.5, 0.25, 0.75, 0.5], np.float32) for name in names}
        if "step" in names:
            numbers["step"] = np.array([0, 3, 7, 2], np.float32)
        settings = [hypers_of(of, graph)]
        settings.append({name: 0.5 * value + 0.125 for name, value in settings[0].items()})

        def ends(
            kernel: Kernel, tensors=tensors, numbers=numbers, settings=settings
        ) -> list[bytes]:
            found = []
            for guard in (None, 0.0, -1.0):
                given = Resident(
                    kernel,
                    tensors,
                    numbers,
                    settings,
                    [0, 1, 1, 0],
                    first=[True, False, True, False],
                )
                given.launch.active[:] = [1, 1, 0, 1]
                given.launch.guard = None if guard is None else torch.empty(1).fill_(guard)
                given.launch.run(2)
                found.append(given.bytes())
            return found

        right = compiled(one, names)
        wanted = ends(right)

        def agrees(kernel: Kernel, wanted=wanted, ends=ends) -> bool:
            try:
                return ends(kernel) == wanted
            except Exception:
                return False

        mistakes = NUMBERS | (COUNTED if names else FIRST)
        check_all(
            right, agrees, wrong_walks(right.source, mistakes, "pass_|uniforms_"), monkeypatch
        )
