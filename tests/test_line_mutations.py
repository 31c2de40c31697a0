"""What the oracle's tests are worth for passes over lines: each small mistake in them must show.

Mistaken code may touch any memory, so each mistake is tried in a process of its own; one that
crashes it shows, too.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest
import torch
from support import interpreter
from support.bare_kernels import Memory, is_same, launch, random_columns
from support.extra_rules import in_a_row, program, turned
from support.subprocess_cases import fates

from onepass.kernel.cpu import chunks, walk
from onepass.kernel.cpu import launch as cpu
from onepass.kernel.cpu.elements import lower
from onepass.kernel.cpu.launch import Kernel
from onepass.kernel.functions import PerColumn, PerRow, amax, column_mean, mean, row_mean, where
from onepass.kernel.graph import passes
from onepass.kernel.graph.ir import make
from onepass.kernel.graph.trace import Program
from onepass.kernel.llvm import native
from onepass.kernel.tensors import temporaries

# Walks are cut into small chunks here, so that small matrices have several.
CHUNK, FEWEST_LINES = 512, 4
# Matrices of two and of three chunks, a stack in several chunks, and lines about LANES.
SIZES = ((1, 5, 150), (2, 9, 150), (40, 9, 10), (3, 17, 33), (2, 3, 5), (1, 3, 16), (2, 1, 16))
HYPERS = [{"lr": 0.25}, {"lr": 0.5}]
# What a mistaken walk may overrun a tensor by: some chunks in the widest type.
GUARD = 1 << 14


def lined(p, g, row: PerRow, column: PerColumn, *, lr):
    """Sums and maxima along rows, down columns, and over what they leave; loads and stores of all
    kinds."""
    tall = make("amax", abs(g), attr="rows")
    low = make("amax", abs(p), attr="columns")
    u = where(row > 0, g * row, p - g) * row_mean(g) + column * row + column_mean(row * tall)
    means = column_mean(p) + low + row_mean(column)
    return {"p": p - lr * u + mean(g * tall) + amax(g), "row": row_mean(p), "column": means}


class Judge:
    """Whether a program's kernel agrees with the interpreter, and keeps within its memory."""

    def __init__(self, one: Program) -> None:
        self.program = one
        rng = np.random.default_rng(0)
        self.sizes = SIZES * 2
        self.rows = [i // len(SIZES) for i in range(len(self.sizes))]
        self.tensors = [
            random_columns(rng, one, size, share) for share in (0.0, 0.01) for size in SIZES
        ]
        of_each = zip(self.tensors, self.rows, self.sizes, strict=True)
        self.wanted = [interpreter.interpret(one, t, HYPERS[row], size) for t, row, size in of_each]
        self.guarded: list[np.ndarray] = []
        Memory.GUARD = GUARD

    def surround(self, cls: Any) -> None:
        """Put guards around the temporaries, too, which begin as no numbers."""
        allocate = cls._allocate

        def surrounded(own: Any, count: int, one: Any) -> torch.Tensor:
            whole = allocate(own, count + GUARD // 2, one).fill_(-7.0)
            self.guarded.append(whole.numpy())
            return whole[GUARD // 4 : GUARD // 4 + count].fill_(np.nan)

        cls._allocate = surrounded
        empty = torch.empty
        torch.empty = lambda *args, **how: empty(*args, **how).fill_(float("nan"))

    def agrees(self, kernel: Kernel) -> bool:
        torch.set_num_threads(1)
        try:
            after = launch(kernel, self.tensors, HYPERS, self.rows, threads=1, sizes=self.sizes)
        except Exception:  # memory beside a tensor was written, or the mistake makes no sense.
            return False
        guards = (np.concatenate([a[: GUARD // 4], a[len(a) - GUARD // 4 :]]) for a in self.guarded)
        if not all((guard == -7.0).all() for guard in guards):
            return False
        pairs = (
            (now[name], want[name])
            for now, want in zip(after, self.wanted, strict=True)
            for name in want
        )
        return all(is_same(got, want) for got, want in pairs)


@cache
def judge(rule: Any) -> Judge:
    interpreter.CHUNK = walk.CHUNK = chunks.CHUNK = CHUNK
    interpreter.FEWEST_LINES = chunks.FEWEST_LINES = FEWEST_LINES
    # What LLVM makes of the code is not in question here, and takes far longer than the code's own
    # mistakes to show.
    native.optimize, native.target_machine = parse, plain_machine
    # In float64, where the order of a sum shows.
    return Judge(program(rule, "float64"))


def parse(source: str, machine: llvm.TargetMachine) -> llvm.ModuleRef:
    module = llvm.parse_assembly(source)
    module.verify()
    return module


def plain_machine() -> llvm.TargetMachine:
    target, cpu_name, features = native._host()
    return target.create_target_machine(cpu=cpu_name, features=features, opt=0, jit=True)


# The code of passes: what stands in a body, and what could stand there by mistake.

IN_CODE = {
    r"urem i64 %length, 16": "urem i64 %length, 8",
    r"%first_group = udiv": "%first_group = urem",
    r"%skipped = mul": "%skipped = add",
    r"%first_place = sub": "%first_place = add",
    r"%base = mul i64 %line": "%base = mul i64 %place",
    r"%group_base = mul i64 %group": "%group_base = mul i64 %line",
    r"%sums_base = add i64 %group_base, %offset": "%sums_base = add i64 %group_base, 0",
    r"%clear_begin = add i64 %clear_first, %offset": "%clear_begin = add i64 %clear_first, 0",
    r"%clear_end = add i64 %clear_last, %offset": "%clear_end = add i64 %clear_last, 0",
    r"%after_group = add i64 %last_group, 1": "%after_group = add i64 %last_group, 0",
    r"%last_line = sub i64 %end, 1": "%last_line = sub i64 %end, 0",
    r"store <16 x double> zeroinitializer, ptr %line_acc0": "",
    r"%wraps = icmp eq i64 %place_up": "%wraps = icmp eq i64 %place",
    r"select i1 %wraps, i64 0": "select i1 %wraps, i64 1",
    r"select i1 %wraps, i64 %group_up, i64 %group": "select i1 %wraps, i64 %group, i64 %group",
    r"%group_up = add i64 %group, 1": "%group_up = add i64 %group, 2",
    r"%line_next = add i64 %line, 1": "%line_next = add i64 %line, 2",
    r"%line_more = icmp slt": "%line_more = icmp sle",
    r"%few = icmp slt": "%few = icmp sgt",
    r"i64 %length, i64 16\n": "i64 %length, i64 15\n",
    r"%lane_i = phi i64 \[ 0": "%lane_i = phi i64 [ 1",
    r"%wide_any = icmp slt": "%wide_any = icmp sle",
    r"%wide_more = icmp slt": "%wide_more = icmp sle",
    r"%tail_any = icmp slt": "%tail_any = icmp sle",
    r"%tail_more = icmp slt": "%tail_more = icmp sle",
    r"%tail_i = phi i64 \[ %middle": "%tail_i = phi i64 [ 0",
    r"%clear_more = icmp slt": "%clear_more = icmp sle",
    r"sub i64 %tail_i, %middle(?=\n.*\n.*\n.*fadd)": "sub i64 %length, %tail_i",
    r"fadd <16 x double>": "fsub <16 x double>",
    r"fcmp ogt <16 x double>": "fcmp olt <16 x double>",
    r"fcmp uno <16 x double>": "fcmp ord <16 x double>",
    r"fcmp ogt double (%v\d+), %so_far": r"fcmp olt double \1, %so_far",
    r"fadd double %so_far": "fsub double %so_far",
    # Where a row's sum goes to, and where values of rows and of matrices come from.
    r"i64 %line\n  store": "i64 %group\n  store",
    r"i64 %line\n(?=.* load)": "i64 %group\n",
    r"i64 %group\n(?=.* load)": "i64 %line\n",
}


def bodies(one: Program, source: str) -> list[tuple[str, str, str]]:
    """Each pass's function, and what stands before and after it: walks over elements first, where
    more can show."""
    found = list(re.finditer(r"(?ms)^define internal void @body_(\d+)\(.*?^}\n", source))
    found.sort(key=lambda body: -one.passes[int(body[1])].domain)
    return [(body[0], source[: body.start()], source[body.end() :]) for body in found]


def with_mistake(one: Program, pattern: str) -> str:
    """The program's code with one mistake, in the first body that has such an instruction and uses
    what it makes."""
    source = lower(one)
    for body, before, after in bodies(one, source):
        for found in re.finditer(pattern, body):
            made = re.match(r"%\w+", found[0])
            if made is None or len(re.findall(re.escape(made[0]) + r"\b", body)) > 1:
                return (
                    before
                    + body[: found.start()]
                    + found.expand(IN_CODE[pattern])
                    + body[found.end() :]
                    + after
                )
    raise LookupError(f"no pass has {pattern}")


def try_code(pattern: str) -> None:
    one = judge(lined)
    one.surround(temporaries.Temporaries)
    source = with_mistake(one.program, pattern)
    cpu.lower = lambda _: source
    assert not one.agrees(Kernel(one.program))


# How walks are cut into chunks, what becomes of temporaries, and how a program is cut into passes.

IN_CHUNKS = {
    "CHUNK // area * per,": "(CHUNK // area * per + 1),",
    "FEWEST_LINES, CHUNK": "FEWEST_LINES + 1, CHUNK",
    "np.where(whole, 1, parts)": "parts",
    "np.where(whole, lines, per)": "lines",
    "-(-span //": "(span //",
    "lines // span * parts": "lines // span",
    "np.where(whole, 0, ": "np.where(whole, 1, ",
    "sizes[:, 0] * sizes[:, 2]": "sizes[:, 2]",
    "[self.tensor] * part": "[self.tensor] * 0",
    "own // parts[self.tensor]": "own % parts[self.tensor]",
    "own % parts[self.tensor]": "own // parts[self.tensor]",
    "begin + part * block": "begin + part * span",
    "np.minimum(self.start + block[self.tensor], begin + span[self.tensor])": (
        "self.start + block[self.tensor]"
    ),
    "np.maximum.reduceat": "np.minimum.reduceat",
    "result += np.bincount": "result -= np.bincount",
    "Rank.ELEMENT: (matrices, rows, columns)": "Rank.ELEMENT: (matrices, columns, rows)",
    "Rank.ROW: (matrices, one, rows)": "Rank.ROW: (one, matrices, rows)",
    "Rank.COLUMN: (matrices, one, columns)": "Rank.COLUMN: (matrices, one, rows)",
    "Rank.MATRIX: (one, one, matrices)": "Rank.MATRIX: (one, one, one)",
}
IN_TEMPORARIES = {
    "self.parts.get(one.name, 1)": "1",
    "Rank.ROW: matrices * rows": "Rank.ROW: rows",
    "Rank.MATRIX: matrices": "Rank.MATRIX: matrices * 0",
    "stops[t - 1]": "stops[t]",
}
IN_LAUNCHES = {
    "for share in shares[1:]": "for share in shares[2:]",
    "chunks.parts > 1": "chunks.parts > 2",
    'np.add if reduction.node.op == "sum" else np.maximum': "np.add",
    "reduction.node.rank == Rank.COLUMN": "reduction.node.rank == Rank.ROW",
    "chunks[Rank.ELEMENT].parts)": "chunks[Rank.ELEMENT].parts * 0 + 1)",
}
IN_PASSES = {
    "if a.rank.on_host or a.rank == rank:": (
        "if a.rank.on_host or a.rank == rank or a in self._kept:"
    ),
    "const(1.0, ": "const(0.0, ",
    "kept != 0": "kept == 0",
    "self._kept[node] = level + 1, into": "self._kept[node] = level, into",
    "max((level for level, _ in seen), default=0)": "0",
    "max(last.get(rank, 0), cut.level[root])": "0",
    "sorted(self._jobs)": "sorted(self._jobs, reverse=True)",
    "self.job(self.level[node], node.rank)": "self.job(0, node.rank)",
}
# With functions of matrices: their numbers, and what other functions return.
IN_CALLS = {
    "not any(least <= k <= level": "False and any(least <= k <= level",
    "max((self.level[n] for n in numbers), default=0)": "0",
    "max([self.level[source], *(self.level[n] for n in numbers)])": "self.level[source]",
    "if k <= level)": "if k < level)",
}
IN_GROUPS = {
    "self.sizes[a, 1:] == self.sizes[b, 1:]": "self.sizes[a, 2:] == self.sizes[b, 2:]",
    "_equal(numbers[a], numbers[b])": "True",
    "(np.cumsum(numel) - numel) * result": "np.cumsum(numel) * result",
    "self._memory.get(call.target)": "None",
    "kept[place] = result": "kept[place] += result",
}


def altered(module: types.ModuleType, old: str, new: str) -> types.ModuleType:
    """The module with one mistake, beside the right one."""
    source = inspect.getsource(module)
    assert old in source
    copy = types.ModuleType(module.__name__)
    copy.__package__ = module.__package__
    exec(compile(source.replace(old, new), module.__name__, "exec"), copy.__dict__)
    return copy


def try_chunks(old: str) -> None:
    one = judge(lined)
    one.surround(temporaries.Temporaries)
    cpu.Work = recut(old, IN_CHUNKS[old])
    with np.errstate(all="ignore"):
        assert not one.agrees(cpu.make_kernel(one.program))


def try_temporaries(rule: Any, mistakes: dict[str, str], old: str) -> None:
    one = judge(rule)
    cls = altered(temporaries, old, mistakes[old]).Temporaries
    one.surround(cls)
    cpu.Temporaries = cls
    assert not one.agrees(cpu.make_kernel(one.program))


def try_launches(old: str) -> None:
    one = judge(lined)
    one.surround(temporaries.Temporaries)
    assert not one.agrees(altered(cpu, old, IN_LAUNCHES[old]).Kernel(one.program))


def try_passes(rule: Any, mistakes: dict[str, str], old: str) -> None:
    one = judge(rule)
    one.surround(temporaries.Temporaries)
    assert not agrees_cut(one, altered(passes, old, mistakes[old]).split)


def recut(old: str, new: str) -> Any:
    """Work with a mistake in how walks are cut."""
    module = altered(chunks, old, new)
    module.FEWEST_LINES = FEWEST_LINES
    return module.Work


def agrees_cut(one: Judge, split: Callable[..., Program]) -> bool:
    """Whether the program agrees, cut into passes by this function."""
    was = one.program
    stored, ranks = {c.name: c.format for c in was.columns}, {c.name: c.rank for c in was.columns}
    try:
        kernel = Kernel(split(was.name, was.compute, stored, ranks, was.stores, was.scalars))
    except Exception:  # There is no such program.
        return False
    return one.agrees(kernel)


def try_nothing(rule: Any) -> None:
    """What is right is found right, by all judges."""
    one = judge(rule)
    one.surround(temporaries.Temporaries)
    cpu.Work = recut("CHUNK // area", "CHUNK // area")
    assert one.agrees(cpu.make_kernel(one.program))
    assert agrees_cut(one, passes.split)
    cpu.lower = lambda program: lower(program)
    assert one.agrees(Kernel(one.program))


def tries() -> Iterator[tuple[str, Callable[[], None]]]:
    for rule in (lined, turned, in_a_row):
        yield f"nothing {rule.__name__}", partial(try_nothing, rule)
    for kind, function, mistakes in (
        ("code", try_code, IN_CODE),
        ("chunks", try_chunks, IN_CHUNKS),
        ("temporaries", partial(try_temporaries, lined, IN_TEMPORARIES), IN_TEMPORARIES),
        ("launches", try_launches, IN_LAUNCHES),
        ("passes", partial(try_passes, lined, IN_PASSES), IN_PASSES),
        ("calls", partial(try_passes, turned, IN_CALLS), IN_CALLS),
        ("groups", partial(try_temporaries, in_a_row, IN_GROUPS), IN_GROUPS),
    ):
        for old in mistakes:
            yield f"{kind}: {old}", partial(function, old)


TRIES = dict(tries())


def __getattr__(name: str) -> Callable[[], None]:
    """A case for `processes`, which asks for it before it forks: what all cases need is computed
    once."""
    if name not in TRIES:
        raise AttributeError(name)
    for rule in (lined, turned, in_a_row):
        judge(rule)
    return TRIES[name]


@pytest.fixture(scope="module")
def known_fates() -> dict[str, str]:
    return fates(__file__, list(TRIES))


@pytest.mark.parametrize("case", TRIES)
def test_a_mistake_is_noticed(case: str, known_fates: dict[str, str]) -> None:
    assert known_fates[case] in ("ok", "ended by SIGSEGV", "ended by SIGABRT", "ended by SIGBUS"), (
        known_fates[case]
    )


def test_enough_is_tried() -> None:
    assert len(TRIES) > 70
