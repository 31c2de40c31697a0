"""Do the tests notice? Rules and kernels are made wrong in every small way, and each must fail its
test."""

from __future__ import annotations

import ast
import copy
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from support.bare_kernels import (
    NAN,
    compiled,
    graph_of,
    hypers_of,
    is_same,
    launch,
    program_of,
    random_columns,
)
from support.extra_rules import everything, program
from support.interpreter import interpret
from table import AMSGRAD, NESTEROV, TABLE, Row, on_eager_backend, results, tolerance, walk

from onepass.kernel import finish, functions, trace
from onepass.kernel.cpu import launch as cpu
from onepass.kernel.cpu.launch import Kernel
from onepass.kernel.functions import amax
from onepass.kernel.functions import sum as total
from onepass.kernel.graph.trace import Program

# Rules.


CHOICES = ("where", "maximum", "minimum", "lerp")
FLAGS = ("amsgrad", "centered", "nesterov", "decoupled_weight_decay", "has_momentum", "first")
SWAPPED = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}
NEGATED = {
    ast.NotEq: ast.Eq,
    ast.Eq: ast.NotEq,
    ast.Lt: ast.Gt,
    ast.Gt: ast.Lt,
    ast.LtE: ast.GtE,
    ast.GtE: ast.LtE,
}


def replacements(node: ast.AST, numbers: list[str], values: list[str]) -> Iterator[ast.AST]:
    """Every small mistake that could stand where this expression stands."""
    if isinstance(node, ast.BinOp):
        yield ast.BinOp(node.left, SWAPPED[type(node.op)](), node.right)
        yield node.left
        yield node.right
    if isinstance(node, ast.UnaryOp):
        yield node.operand
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        # The function forgotten, or one of its branches always taken.
        yield from node.args if node.func.id in CHOICES else node.args[:1]
        if node.func.id in ("where", "lerp"):
            *first, b, c = node.args
            swapped = [*first, c, b] if node.func.id == "where" else [b, *first, c]
            yield ast.Call(node.func, swapped, [])
        if node.func.id in ("maximum", "minimum"):
            other = {"maximum": "minimum", "minimum": "maximum"}[node.func.id]
            yield ast.Call(ast.Name(other, ast.Load()), node.args, [])
    if isinstance(node, ast.Compare):
        yield ast.Compare(node.left, [NEGATED[type(node.ops[0])]()], node.comparators)
    if isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield ast.Constant(node.value + 1)
        yield ast.Constant(node.value - 1)
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        for names in (numbers, values):
            if node.id in names:
                yield from (ast.Name(other, ast.Load()) for other in names if other != node.id)
                yield ast.BinOp(node, ast.Add(), ast.Constant(1))
        if node.id in FLAGS[:-1]:
            yield from (ast.Constant(True), ast.Constant(False))


def unpacks(statement: ast.stmt) -> bool:
    """Whether this names the entries of an option that is a tuple."""
    return (
        isinstance(statement, ast.Assign)
        and isinstance(statement.targets[0], ast.Tuple)
        and isinstance(statement.value, ast.Name)
    )


def mutants(rule) -> Iterator[tuple[str, object]]:
    """The rule with one mistake each, and what the mistake is."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(rule)))
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    function.decorator_list = []
    unpacked = {s.value.id: s.targets[0].elts for s in function.body if unpacks(s)}
    numbers = [a.arg for a in function.args.kwonlyargs if a.arg not in (*FLAGS, *unpacked)]
    numbers += [element.id for elements in unpacked.values() for element in elements]
    values = [a.arg for a in function.args.args]
    places = [n for statement in function.body for n in ast.walk(statement)]
    for place, node in enumerate(places):
        for new in replacements(node, numbers, values):
            mutant = copy.deepcopy(tree)
            function = mutant.body[0]
            old = [n for statement in function.body for n in ast.walk(statement)][place]
            Replace(old, copy.deepcopy(new)).visit(mutant)
            ast.fix_missing_locations(mutant)
            yield build(
                rule, mutant, f"line {node.lineno}: {ast.unparse(node)} -> {ast.unparse(new)}"
            )


class Replace(ast.NodeTransformer):
    """One node of a tree, by another."""

    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else super().visit(node)


def build(rule, tree: ast.Module, what: str) -> tuple[str, object]:
    space = dict(rule.__globals__) | {"maximum": functions.maximum, "minimum": functions.minimum}
    exec(compile(tree, "<mutant>", "exec"), space)
    return what, space[rule.__name__]


STEPS = 6


def is_right(row: Row, rule) -> bool:
    """Whether a rule passes what `test_numerics` asks: the float64 reference, and NaN and infinity
    as in torch, if torch has the algorithm."""
    rng = np.random.default_rng(1)
    start, *gradients = rng.standard_normal((STEPS + 1, 16))
    lrs = [0.01, 0.01, 0.03, 0.03, 0.001, 0.001]
    path = walk(row, start, gradients, lrs)
    mutant = type(row.name, (row.cls,), {"rule": staticmethod(rule)})
    p = torch.from_numpy(start.copy())
    optimizer = on_eager_backend(mutant([p], **row.options))
    for g, lr in zip(gradients, lrs, strict=True):
        p.grad = torch.from_numpy(g)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    error = np.abs(results(row, optimizer, p) - path[-1]).max()
    follows = bool(error <= tolerance(row, path, torch.float64))
    return follows and (row.twin is None or spreads_as_torch(row, mutant))


def spreads_as_torch(row: Row, mutant: type) -> bool:
    """Whether NaN and infinity get to where they get in torch, and the state has the same names."""
    values = torch.tensor([1.0, float("inf"), NAN])
    g = values.repeat_interleave(3)
    ends, names = [], []
    for make in (
        lambda p: on_eager_backend(mutant([p], **row.options)),
        lambda p: row.make_torch([p], foreach=False),
    ):
        p = values.repeat(3)
        optimizer = make(p)
        for _ in range(2):
            p.grad = g.clone()
            optimizer.step()
        ends.append(results(row, optimizer, p))
        names.append({name for name, value in optimizer.state[p].items() if value is not None})
    same = (f(ends[0]) == f(ends[1]) for f in (np.isnan, np.isposinf, np.isneginf))
    return all(one.all() for one in same) and names[0] == names[1]


def rules() -> dict[str, tuple[object, list[Row]]]:
    """Each rule once, with the rows that it serves."""
    found: dict[str, tuple[object, list[Row]]] = {}
    for row in TABLE:
        rule = row.cls.rule
        found.setdefault(rule.__qualname__, (rule, []))[1].append(row)
    return found


# Mistakes that are none, by rule: mutants that compute the same for every value that can occur.
EQUIVALENT: dict[str, set[str]] = {}


@pytest.mark.parametrize("name", rules())
def test_a_wrong_rule_is_noticed(name: str) -> None:
    """Each mutant gives wrong numbers for one of its optimizer's rows; a few are no rules and
    raise."""
    rule, rows = rules()[name]
    assert all(is_right(row, rule) for row in rows)
    unnoticed, wrong, no_rules = set(), 0, 0
    for what, mutant in mutants(rule):
        try:
            if all(is_right(row, mutant) for row in rows):
                unnoticed.add(what.partition(": ")[2])
            else:
                wrong += 1
        except TypeError:
            no_rules += 1
    assert unnoticed == EQUIVALENT.get(name, set())
    assert wrong > 50
    assert wrong > 10 * no_rules


# Kernels.


TOKENS = {
    "fadd": ("fsub", "fmul"),
    "fsub": ("fadd",),
    "fmul": ("fdiv", "fadd"),
    "fdiv": ("fmul",),
    "fcmp olt": ("fcmp ole", "fcmp ult", "fcmp ogt"),
    "fcmp oeq": ("fcmp ueq", "fcmp one"),
    "fcmp ogt": ("fcmp olt", "fcmp ugt"),
    "fcmp uno": ("fcmp ord",),
    "fcmp une": ("fcmp oeq",),
    "@llvm.sqrt": ("@llvm.fabs",),
    "@llvm.floor": ("@llvm.roundeven", "@llvm.trunc"),
    "@llvm.roundeven": ("@llvm.round", "@llvm.floor"),
    "@pow": ("@fmod",),
    "lshr": ("ashr", "shl"),
    "= add i32": ("= sub i32",),
    "= and i32": ("= or i32",),
    "32767": ("32768", "32766"),
    ", 16\n": (", 15\n",),
    **{f"%loop{k}_more = icmp slt": (f"%loop{k}_more = icmp sle",) for k in range(3)},
    "%tail_more = icmp slt": ("%tail_more = icmp sle",),
}
# What cannot show.
SAME_CODE = (
    # Of the upper half, what was shifted in from the left is cut off again.
    "'lshr' -> 'ashr'",
    # A weight of lerp that is no number gives none from either end.
    "fcmp olt double %v[0-9]+, 0x3FE0000000000000 .*: 'fcmp olt' -> 'fcmp ult'",
    # A learning rate that is no number leaves no old value to keep. (What is negated next is
    # another number's test.)
    r"fcmp oeq double %v[0-9]+, 0x0000000000000000 \| (?!.* xor ).*: 'fcmp oeq' -> 'fcmp ueq'",
    # Beside a test for NaN, and against a number.
    "fcmp ogt double %lane[0-9]+_0, 0x0000000000000000 .*: 'fcmp ogt' -> 'fcmp ugt'",
)


LAST_LOOP = re.compile(r"(?s)loop[12]_body:(?!.*loop[0-9]_body:)")


def wrong_sources(source: str) -> Iterator[tuple[str, str]]:
    """The mathematics of a kernel with one instruction exchanged: body and host code, not the walk
    around them."""
    parts = re.split(r"(?m)^(?=define |declare )", source)
    for k, part in enumerate(parts):
        if not re.match(r"define internal void @(body|host)_", part):
            continue
        for token, others in TOKENS.items():
            for found in re.finditer(re.escape(token), part):
                if LAST_LOOP.search(part, 0, found.start()) and "_more" not in token:
                    # Taken where the learning rate is 0, which hides what the update would have
                    # been; made by the same code as the others.
                    continue
                for other in others:
                    changed = part[: found.start()] + other + part[found.end() :]
                    declared = [
                        d.replace(token, other)
                        for d in parts
                        if d.startswith("declare") and token in d
                    ]
                    declared = [d for d in declared if d.strip() not in map(str.strip, parts)]
                    line = part[: found.start()].count("\n")
                    here, after = (part + "\n\n").splitlines()[line : line + 2]
                    what = f"{here.strip()} | {after.strip()}: {token!r} -> {other!r}"
                    if not any(re.search(same, what) for same in SAME_CODE):
                        yield what, "".join([*parts[:k], changed, *parts[k + 1 :], "\n", *declared])


Case = tuple[Program, list[dict[str, np.ndarray]], list[dict[str, float]]]


def numbers(
    one: Program, shares: tuple[float, ...] = (0.0, 0.3, 1.0)
) -> list[dict[str, np.ndarray]]:
    """Tensors with shares of special numbers, and with zeros of both signs in all columns."""
    rng = np.random.default_rng(0)
    tensors = [
        random_columns(rng, one, n, share) for n, share in zip((17, 3000, 700), shares, strict=True)
    ]
    for columns in tensors:
        for a in columns.values():
            a[5::50] = -0.0
            a[6::50] = 0.0
    # Each tensor meets each setting in turn.
    return tensors * 14


def adam() -> Case:
    row = AMSGRAD
    graph = graph_of(row)
    # A number that is 0 chooses another loop.
    settings = [
        {"betas": (beta, 0.7), "weight_decay": decay, "lr": lr}
        for beta in (0.8, 0.3, 0.5)
        for decay in (0.1, 0.0)
        for lr in (0.01, 0.0)
    ]
    undecided = {"betas": (NAN, 0.7), "weight_decay": NAN}
    hypers = [hypers_of(row, graph, 3, **setting) for setting in (*settings, undecided)]
    one = program_of(graph, *["float32"] * 3)
    return one, numbers(one), hypers


def sgd() -> Case:
    row = NESTEROV
    graph = graph_of(row)
    settings = [
        {"first": first, "dampening": 0.3, "weight_decay": decay, "lr": lr}
        for first in (True, False, NAN)
        for decay in (0.1, 0.0)
        for lr in (0.01, 0.0)
    ]
    one = program_of(graph, *["float64"] * 3)
    undecided = {"dampening": 0.3, "weight_decay": NAN}
    return (
        one,
        numbers(one),
        [hypers_of(row, graph, 1, **setting) for setting in (*settings, undecided)],
    )


def all_operations() -> Case:
    # Its p moves where lr is 0, so that there is nothing to keep.
    one = program_of(
        finish(trace(everything, (("lr", ("float",)),)), exact=False), *["float32"] * 3
    )
    return one, numbers(one), [{"lr": lr} for lr in (0.25, 0.3, 0.5, 0.0, NAN)]


def store(p, g, *, lr):
    return {"p": g}


def bfloat16() -> Case:
    """All upper halves of a float32 with lower ones at, below and above ties."""
    one = program_of(
        finish(trace(store, (("lr", ("float",)),)), exact=False), "bfloat16", "float32", "float32"
    )
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    values = [(high | np.uint32(low)).view(np.float32) for low in (0, 1, 0x7FFF, 0x8000, 0x8001)]
    return one, [{"p": np.zeros(1 << 16, np.uint16), "g": v} for v in values], [{"lr": 0.0}]


def reduced(p, g, s, *, lr):
    return {"p": total(g), "s": amax(g)}


def reductions() -> Case:
    """Tensors whose largest element, or one that is none, is in each lane and in the tail."""
    rng = np.random.default_rng(0)
    tensors = []
    for n in (1, 16, 40, 75):
        for i in range(n):
            for value in (-100.0, NAN):
                g = rng.standard_normal(n)
                g[i] = value
                tensors.append({"p": np.zeros(n), "g": g, "s": np.zeros(n)})
    return program(reduced, "float64"), tensors, [{"lr": 0.0}]


@pytest.mark.parametrize(
    "case", [adam, sgd, all_operations, bfloat16, reductions], ids=lambda case: case.__name__
)
def test_wrong_code_is_noticed(case: Callable[[], Case], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each exchanged instruction changes a bit somewhere, with numbers such as the oracle's tests
    use."""
    one, tensors, hypers = case()
    # The interpreter's view does not change with the code.
    rows = [i % len(hypers) for i in range(len(tensors))]
    wanted = [
        interpret(one, columns, hypers[row]) for columns, row in zip(tensors, rows, strict=True)
    ]

    def agrees(kernel: Kernel) -> bool:
        try:
            after = launch(kernel, tensors, hypers, rows, threads=1)
        except AssertionError:
            # It wrote where nobody may.
            return False
        pairs = (
            (now[name], want[name])
            for now, want in zip(after, wanted, strict=True)
            for name in want
        )
        return all(is_same(got, want) for got, want in pairs)

    right = compiled(one)
    assert agrees(right)
    unnoticed = []
    count = 0
    for what, source in wrong_sources(compiled(one).source):
        monkeypatch.setattr(cpu, "lower", lambda _, source=source: source)
        count += 1
        mutant = Kernel(one)
        # In a loop that takes a condition as false, LLVM removes what only it needs.
        if agrees(mutant) and mutant.library.optimized != right.library.optimized:
            unnoticed.append(what)
    assert unnoticed == []
    assert count > 9
