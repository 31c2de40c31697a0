"""What kernels become on GPUs, compiled without one: wide accesses, exact arithmetic, nothing
spilled, long offsets.

The compiler runs in processes of its own, where no variable tells Triton to interpret kernels.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.subprocess_cases import ROOT
from table import TABLE

import onepass
from onepass.app import cli
from onepass.app.explain.explanation import explain, graph_of
from onepass.app.explain.target import TARGETS, CompiledKernel, TargetError, compile_for
from onepass.kernel.gpu.jit import Source
from onepass.kernel.gpu.source import triton_source
from onepass.kernel.graph.ir import Rank
from onepass.kernel.graph.passes import ITEMSIZE, Program
from onepass.kernel.graph.trace import bind

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)
# The rules of other shapes than one pass over elements; of Adafactor, two programs: a matrix's and
# a vector's.
FURTHER = [
    ("Adafactor", {}, (4, 4)),
    ("Adafactor", {}, (4,)),
    ("Muon", {}, (4, 4)),
    ("SparseAdam", {}, (4,)),
]
STATE = {"bfloat16": "float32", "float16": "float32", "float32": "float32", "float64": "float64"}

COMPILE = """
import pickle, sys
from onepass.app.explain.target import compile_for
with open(sys.argv[1], "rb") as file:
    sources, target = pickle.load(file)
with open(sys.argv[1], "wb") as file:
    pickle.dump([compile_for(source, target) for source in sources], file)
"""


def run(text: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a new interpreter, where Triton compiles unless the environment given says
    otherwise."""
    known = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    known |= {"PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-W", "error", "-c", text, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=known, timeout=300, check=False
    )


def compiled(sources: Sequence[Source], target: str, folder: Path) -> list[list[CompiledKernel]]:
    """The kernels of each source."""
    file = folder / "sources.pickle"
    file.write_bytes(pickle.dumps((sources, target)))
    done = run(COMPILE, str(file))
    assert done.returncode == 0, done.stderr[-5000:]
    return pickle.loads(file.read_bytes())


def program_of(
    name: str, options: Mapping[str, object], shape: tuple[int, ...], p: str, state: str
) -> Program:
    """The program that steps a parameter of this shape, stored as `p` with its gradient, its state
    as `state`."""
    graph = graph_of(getattr(onepass, name)([torch.zeros(shape, requires_grad=True)], **options))
    return bind(graph, (("g", p), ("p", p), *((column, state) for column in graph.state)))


def programs(p: str, state: str, names: Iterable[str] = ()) -> dict[str, Program]:
    """All different programs of the table, or of the optimizers named, and an example of each."""
    rows = [(str(row), row.name, row.options, (4,)) for row in TABLE]
    rows += [(f"{name} {len(shape)}d", name, options, shape) for name, options, shape in FURTHER]
    found: dict[Source, tuple[str, Program]] = {}
    for title, name, options, shape in rows:
        if not names or name in names:
            program = program_of(name, options, shape, p, state)
            found.setdefault(triton_source(program), (title, program))
    return dict(found.values())


def complaints(program: Program, kernels: Iterable[CompiledKernel], source: Source) -> list[str]:
    """What is wrong with a program's kernels."""
    found = []
    for one in kernels:
        walk = re.fullmatch(r"pass_(\d+)", one.function.name)
        code, name = one.counts, one.function.name
        if one.spill_stores or one.spill_loads or one.stack or code.local:
            found.append(f"{name} spills")
        # A power in float64 is made of fused operations in every library; it is a uniform value,
        # computed once a step.
        if not (name.startswith("uniforms") and "power(" in body_of(source, name)):
            counts = {
                "fuses": code.fused,
                "approximates": code.approximate,
                "flushes": code.flushing,
            }
            found += [f"{name} {what}" for what, count in counts.items() if count]
        if one.target.startswith("sm_") and walk:
            found += [f"{name}: {line}" for line in narrow_accesses(program, int(walk[1]), one)]
        if walk or name == "fold":
            found += [f"{name}: short offset {line}" for line in short_offsets(one.ttir)]
    return found


def body_of(source: Source, name: str) -> str:
    return source.text.split(f"def {name}(")[1].split("@triton.jit")[0]


def narrow_accesses(program: Program, k: int, one: CompiledKernel) -> list[str]:
    """Which accesses of whole blocks are narrower than a thread's elements allow, and which masked
    ones are wider."""
    walk = program.passes[k]
    columns = {
        "loads": [n for n in walk.loads if n.rank == walk.domain],
        "stores": [n for _, n in walk.stores],
    }
    largest = max(ITEMSIZE.get(n.type, 4) for n in (*walk.loads, *columns["stores"], *walk.roots))
    reduces = bool(walk.reductions or walk.sums)
    found = []
    for which, masked in (
        ("loads", one.counts.masked_loads),
        ("stores", one.counts.masked_stores),
    ):
        # Sums are float64, whatever is summed up.
        if any(bits > (64 if reduces else 8 * largest) for bits in masked):
            found.append(f"masked {which} of {masked}")
    if walk.domain != Rank.ELEMENT:
        return found
    constants = dict(one.function.constants)
    tile = constants.get("BLOCK") or constants["LINES"] * constants["COLUMNS"]
    elements = tile // (32 * one.function.warps)
    for which, accesses in (("loads", one.counts.loads), ("stores", one.counts.stores)):
        wanted: dict[int, int] = {}
        for node in columns[which]:
            bits = min(128, 8 * elements * ITEMSIZE[node.type])
            wanted[bits] = wanted.get(bits, 0) + 8 * elements * ITEMSIZE[node.type] // bits
        assert all(bits >= 64 for bits in wanted)
        for bits, count in wanted.items():
            # 64 bits are also an address's or a size's.
            if accesses.get(bits, 0) < count or (
                bits == 128 and accesses[bits] != count and not reduces
            ):
                found.append(f"{which} of {accesses}, not {wanted}")
    return found


def short_offsets(ttir: str) -> list[str]:
    """Operations in 32 bits that could wrap, on the way to a column's addresses or to a comparison
    for a mask.

    What only depends on constants is bounded, a loop over a bounded range too, and a minimum with a
    constant. What columns hold is data: a format may compute with it in 32 bits.
    """
    bounded, short, columns, data, found = set(), set(), set(), set(), []
    for line in ttir.splitlines():
        line = re.sub(r" loc\(.*", "", line).strip()
        match = re.match(r"(%\w+) = (\w+\.\w+)\s*(.*)", line)
        if loop := re.match(r".*scf\.for (%\w+) = (%\w+) to (%\w+) ", line):
            bounded |= {loop[1]} if {loop[2], loop[3]} <= bounded else set()
        if not match:
            continue
        name, op, rest = match.groups()
        operands = re.findall(r"%\w+", rest)
        for known in (bounded, short, columns, data):
            known.discard(name)
        is_constant = set(operands) <= bounded and op != "tt.get_program_id"
        if (op == "tt.load" and operands[0] in columns) or (
            op != "tt.addptr" and set(operands) & data
        ):
            data.add(name)
        elif is_constant or (op == "arith.minsi" and set(operands) & bounded):
            bounded.add(name)
        elif op == "tt.int_to_ptr":
            columns.add(name)
        elif op == "tt.addptr":
            if operands[0] in columns:
                columns.add(name)
                found += [line] if operands[1] in short else []
        elif op in ("tt.splat", "tt.broadcast", "tt.expand_dims") and operands[0] in columns:
            columns.add(name)
        elif op == "arith.trunci" or (
            op in ("arith.muli", "arith.addi", "arith.subi", "arith.shli")
            and re.search(r"i32>?$", rest)
        ):
            short.add(name)
        elif op == "arith.cmpi":
            found += [line] if set(operands) & short else []
        elif op != "tt.load" and set(operands) & short:
            short.add(name)
    return found


@needs_triton
@pytest.mark.parametrize(
    ("target", "p", "names"),
    [
        ("sm_90", "float32", ()),
        ("sm_80", "float32", ()),
        ("sm_90", "bfloat16", ("AdamW", "Muon")),
        ("sm_90", "float16", ("RMSprop",)),
        ("sm_90", "float64", ("NAdam", "Adafactor")),
        pytest.param("sm_80", "bfloat16", (), marks=pytest.mark.slow),
        pytest.param("sm_90", "bfloat16", (), marks=pytest.mark.slow),
        pytest.param("sm_90", "float16", (), marks=pytest.mark.slow),
        pytest.param("sm_90", "float64", (), marks=pytest.mark.slow),
        pytest.param("sm_100", "float32", (), marks=pytest.mark.slow),
        pytest.param("sm_120", "float32", (), marks=pytest.mark.slow),
    ],
    ids=lambda value: (
        "all" if value == () else "-".join(value) if isinstance(value, tuple) else value
    ),
)
def test_every_program_is_as_it_should_be(
    target: str, p: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    """With state as wide as arithmetic, and stored as the parameters are."""
    found = {
        f"{title}, {state}": one
        for state in {STATE[p], p}
        for title, one in programs(p, state, names).items()
    }
    sources = {title: triton_source(one) for title, one in found.items()}
    kernels = dict(zip(found, compiled(list(sources.values()), target, tmp_path), strict=True))
    wrong = {title: complaints(found[title], kernels[title], sources[title]) for title in found}
    assert not {title: lines for title, lines in wrong.items() if lines}
    assert len(found) >= (1 if names else 20)


@needs_triton
def test_numbers_that_lie_on_the_device(tmp_path: Path) -> None:
    """Steps and products of momenta are read and written there, the rates that follow from them
    computed, and a guard is asked first whether there is a step at all."""
    cases = [
        ("AdamW", ("step",)),
        ("NAdam", ("step", "mu_product")),
        ("ASGD", ("step", "eta", "mu")),
    ]
    found = [program_of(name, {}, (4,), "float32", "float32") for name, _ in cases]
    sources = [
        guarded(triton_source(program, numbers))
        for program, (_, numbers) in zip(found, cases, strict=True)
    ]
    for program, source, kernels in zip(
        found, sources, compiled(sources, "sm_90", tmp_path), strict=True
    ):
        assert [one.function.name for one in kernels] == ["uniforms_0", "pass_0"]
        assert complaints(program, kernels, source) == []


def guarded(source: Source) -> Source:
    on = tuple(
        replace(f, constants=(("GUARDED", True), *f.constants[1:])) for f in source.functions
    )
    return Source(source.text, on)


PRODUCT_AND_SUM = r"(t\d+) = (u\d+) \* (t\d+)\n    (t\d+) = (t\d+) \+ \1\n"
FLUSHING = (
    r'tl.inline_asm_elementwise("sqrt.rn.ftz.f32 $0, $1;", "=f,f", [\1], '
    "dtype=tl.float32, is_pure=True, pack=1)"
)


def mutants() -> Iterator[tuple[str, Program, Source, str]]:
    """Sources with one thing wrong each, and what must be found."""
    program = program_of("AdamW", {}, (4,), "float32", "float32")
    source = triton_source(program)
    rows = [
        (
            "all masked",
            [(r"tl\.load\((c\d+ \+ offset)\)", r"tl.load(\1, offset < left)")],
            "loads of",
        ),
        (
            "masked stores",
            [(r"(c\d+ \+ offset), (y\d+)\)", r"\1, \2, offset < left)")],
            "stores of",
        ),
        ("not aligned", [(r"tl\.multiple_of\((c\d+), 16\)", r"\1")], "loads of"),
        ("fused", [(PRODUCT_AND_SUM, r"\4 = tl.fma(\2 + 0 * \3, \3, \5)\n")], "fuses"),
        ("approximate division", [(r"tl\.div_rn\((\w+), (\w+)\)", r"\1 / \2")], "approximates"),
        ("approximate root", [(r"tl\.sqrt_rn\(", "tl.sqrt(")], "approximates"),
        ("flushing root", [(r"tl\.sqrt_rn\((\w+)\)", FLUSHING)], "flushes"),
        (
            "short",
            [(r"block\.to\(tl\.int64\) \* BLOCK", "(block * BLOCK).to(tl.int64)")],
            "short offset",
        ),
    ]
    for title, changes, complaint in rows:
        text = source.text
        for pattern, new in changes:
            text, count = re.subn(pattern, new, text)
            assert count, (title, pattern)
        yield title, program, Source(text, source.functions), complaint
    large = tuple(
        replace(f, constants=(("GUARDED", False), ("BLOCK", 16384))) for f in source.functions
    )
    yield "large blocks", program, Source(source.text, large), "spills"
    program = program_of("Adafactor", {}, (4, 4), "float32", "float32")
    source = triton_source(program)
    text = source.text.replace("length = length // 16 * 16", "length = tl.multiple_of(length, 16)")
    yield "a hint for all lengths", program, Source(text, source.functions), "masked"


@needs_triton
def test_a_mutant_of_each_kind_is_found(tmp_path: Path) -> None:
    rows = list(mutants())
    found = compiled([source for _, _, source, _ in rows], "sm_90", tmp_path)
    for (title, program, source, complaint), kernels in zip(rows, found, strict=True):
        lines = complaints(program, kernels, source)
        assert any(complaint in line for line in lines), (title, lines)


SHOW = """
import sys
from onepass.app import cli
sys.exit(cli.main(sys.argv[1:]))
"""


@needs_triton
def test_command_line() -> None:
    done = run(SHOW, "explain", "adamw", "--target", "sm_90", "--amsgrad")
    assert (done.returncode, done.stderr) == (0, "")
    assert "= 36 bytes per parameter and step" in done.stdout
    assert "def pass_0(addresses, " in done.stdout
    assert re.search(r"Compiled for sm_90 by Triton \d+\.\d+\.\d+, without a device\n", done.stdout)
    assert re.search(r"\n    pass_0: with \d+ registers \d+ of 64 warps run at once\n", done.stdout)
    assert re.search(
        r"blocks: \d+\.\d instructions an element, 4 elements a thread, loads 5x128 ", done.stdout
    )
    assert "ps for 36 bytes at 4.3 TB/s, at least " in done.stdout
    assert re.search(r"\n        the limit is memory, \d+\.\d times the other\n$", done.stdout)


@needs_triton
def test_targets_without_an_estimate() -> None:
    done = run(SHOW, "explain", "rmsprop", "--target", "gfx942", "--dtype", "bfloat16")
    assert (done.returncode, done.stderr) == (0, "")
    row = next(line.split() for line in done.stdout.splitlines() if line.startswith("    pass_0  "))
    assert any(word.endswith("x64") for word in row)
    assert row[-7:] == ["0"] * 7
    done = run(SHOW, "explain", "muon", "--target", "sm_80")
    assert (done.returncode, done.stderr) == (0, "")
    assert "H200" not in done.stdout
    assert "instructions an element" in done.stdout


@needs_triton
def test_without_a_disassembler_one_line_says_so() -> None:
    done = run(
        "from triton import knobs\nvars(type(knobs.nvidia))['nvdisasm'].default_path = "
        f"'/nowhere'\n{SHOW}",
        "explain",
        "sgd",
        "--target",
        "sm_90",
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert "registers" in lines[-2]
    assert (
        lines[-1]
        .strip()
        .startswith("instructions are not counted: this installation of Triton has no nvdisasm")
    )


@needs_triton
def test_an_interpreting_triton_compiles_nothing() -> None:
    done = run(SHOW, "explain", "sgd", "--target", "sm_90", TRITON_INTERPRET="1")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "unset TRITON_INTERPRET" in done.stderr


def test_unknown_targets_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for bad in ("sm_91", "90", "h200", ""):
        assert cli.main(["explain", "adamw", "--target", bad]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert f"there is no target {bad!r}: choose one of {', '.join(TARGETS)}." in err


def test_without_triton_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "Pass 1 of 1" in explain("sgd").text()
    with pytest.raises(
        TargetError, match=r"Triton, which is not installed: run pip install triton\.$"
    ):
        compile_for(Source("", ()), "sm_90")
