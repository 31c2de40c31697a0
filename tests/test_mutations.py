"""Do the tests notice? Rules and kernels are made wrong in every small way, and each must fail the test that guards it."""

from __future__ import annotations

import ast
import copy
import inspect
import re
import textwrap
from collections.abc import Iterator

import numpy as np
import pytest
import torch

import onepass
from interpreter import interpret
from onepass.kernel import cpu, ir
from onepass.kernel.cpu import Kernel
from onepass.kernel.program import Program
from rig import NAN, compiled, graph_of, hypers_of, is_same, launch, program_of, random_columns
from table import TABLE, UNIT, Row, tolerance, walk
from test_program import centred, everything, program

# Rules.


CHOICES = ("where", "maximum", "minimum", "lerp")
FLAGS = ("amsgrad", "nesterov", "decoupled_weight_decay", "has_momentum", "first")
SWAPPED = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}
NEGATED = {ast.NotEq: ast.Eq, ast.Eq: ast.NotEq, ast.Lt: ast.Gt, ast.Gt: ast.Lt, ast.LtE: ast.GtE, ast.GtE: ast.LtE}


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


def mutants(rule) -> Iterator[tuple[str, object]]:
    """The rule with one mistake each, and what the mistake is."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(rule)))
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    function.decorator_list = []
    numbers = [a.arg for a in function.args.kwonlyargs]
    numbers = [n for n in numbers if n not in (*FLAGS, "betas")] + ["beta1", "beta2"] * ("betas" in numbers)
    values = [a.arg for a in function.args.args]
    places = [n for statement in function.body for n in ast.walk(statement)]
    for place, node in enumerate(places):
        for new in replacements(node, numbers, values):
            mutant = copy.deepcopy(tree)
            function = mutant.body[0]
            old = [n for statement in function.body for n in ast.walk(statement)][place]
            Replace(old, copy.deepcopy(new)).visit(mutant)
            ast.fix_missing_locations(mutant)
            yield build(rule, mutant, f"line {node.lineno}: {ast.unparse(node)} -> {ast.unparse(new)}")


class Replace(ast.NodeTransformer):
    """One node of a tree, by another."""

    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else super().visit(node)


def build(rule, tree: ast.Module, what: str) -> tuple[str, object]:
    space = dict(rule.__globals__) | {"maximum": ir.maximum, "minimum": ir.minimum}
    exec(compile(tree, "<mutant>", "exec"), space)
    return what, space[rule.__name__]


STEPS = 6


def is_right(row: Row, rule) -> bool:
    """Whether a rule passes what `test_numerics` asks: the float64 reference, and NaN and infinity as in torch."""
    rng = np.random.default_rng(1)
    start, *gradients = rng.standard_normal((STEPS + 1, 16))
    lrs = [0.01, 0.01, 0.03, 0.03, 0.001, 0.001]
    path = walk(row, start, gradients, lrs)
    plain = getattr(onepass, row.name)
    mutant = type(row.name, (plain,), {"rule": staticmethod(rule)})
    p = torch.from_numpy(start.copy())
    optimizer = mutant([p], **row.options, foreach=False, fused=False)
    for g, lr in zip(gradients, lrs, strict=True):
        p.grad = torch.from_numpy(g)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    error = np.abs(p.numpy() - path[-1]).max()
    return bool(error <= tolerance(path, UNIT[torch.float64])) and spreads_as_torch(row, mutant)


def spreads_as_torch(row: Row, mutant: type) -> bool:
    values = torch.tensor([1.0, float("inf"), NAN])
    ours, theirs = values.repeat(3), values.repeat(3)
    g = values.repeat_interleave(3)
    optimizers = (mutant([ours], **row.options, foreach=False, fused=False), row.make_torch([theirs], foreach=False))
    for p, optimizer in zip((ours, theirs), optimizers, strict=True):
        for _ in range(2):
            p.grad = g.clone()
            optimizer.step()
    return torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.isinf(), theirs.isinf())


def rules() -> dict[str, tuple[object, list[Row]]]:
    """Each rule once, with the rows that it serves."""
    found: dict[str, tuple[object, list[Row]]] = {}
    for row in TABLE:
        rule = getattr(onepass, row.name).rule
        found.setdefault(rule.__qualname__, (rule, []))[1].append(row)
    return found


# Mistakes that are none, by rule: mutants that compute the same for every value that can occur.
EQUIVALENT: dict[str, set[str]] = {}


@pytest.mark.parametrize("name", rules())
def test_a_wrong_rule_is_noticed(name: str) -> None:
    """Each mutant gives wrong numbers for one of its optimizer's rows; a few are no rules and raise."""
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
    "32704": ("32705",),
    ", 16\n": (", 15\n",),
    "%loop_more = icmp slt": ("%loop_more = icmp sle",),
    "%tail_more = icmp slt": ("%tail_more = icmp sle",),
}
# Of the upper half, what was shifted in from the left is cut off again: the sign may be drawn along.
SAME_CODE = {("lshr", "ashr")}


def wrong_sources(source: str) -> Iterator[tuple[str, str]]:
    """The mathematics of a kernel with one instruction exchanged: body and host code, not the walk around them."""
    parts = re.split(r"(?m)^(?=define |declare )", source)
    for k, part in enumerate(parts):
        if not re.match(r"define internal void @(body|host)_", part):
            continue
        for token, others in TOKENS.items():
            for found in re.finditer(re.escape(token), part):
                for other in others:
                    changed = part[: found.start()] + other + part[found.end() :]
                    declared = [d.replace(token, other) for d in parts if d.startswith("declare") and token in d]
                    declared = [d for d in declared if d.strip() not in map(str.strip, parts)]
                    line = part[: found.start()].count("\n")
                    what = f"{part.splitlines()[line].strip()}: {token!r} -> {other!r}"
                    if (token, other) not in SAME_CODE:
                        yield what, "".join([*parts[:k], changed, *parts[k + 1 :], "\n", *declared])


def agrees(kernel: Kernel, tensors: list[dict[str, np.ndarray]], hypers: list[dict[str, float]]) -> bool:
    """What `check_oracle` asks, guards included."""
    try:
        after = launch(kernel, tensors, hypers, [i % len(hypers) for i in range(len(tensors))], threads=1)
    except AssertionError:
        return False
    for i, (before, now) in enumerate(zip(tensors, after, strict=True)):
        wanted = interpret(kernel.program, before, hypers[i % len(hypers)])
        if not all(is_same(now[name], want) for name, want in wanted.items()):
            return False
    return True


AMSGRAD, MOMENTUM = TABLE[14], TABLE[6]
CODE = {
    "Adam float32": (lambda: program_of(graph_of(AMSGRAD), *["float32"] * 3), AMSGRAD),
    "Adam bfloat16": (lambda: program_of(graph_of(AMSGRAD), "bfloat16", "bfloat16", "float32"), AMSGRAD),
    "SGD float64": (lambda: program_of(graph_of(MOMENTUM), *["float64"] * 3), MOMENTUM),
    "everything float32": (lambda: program(everything), None),
    "centred float32": (lambda: program(centred), None),
}


@pytest.mark.parametrize("name", CODE)
def test_wrong_code_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each exchanged instruction changes a bit somewhere, with the numbers that the oracle's tests use."""
    make, row = CODE[name]
    one: Program = make()
    rng = np.random.default_rng(0)
    # Signed zeros in all columns, where comparisons that differ for equal numbers alone differ.
    shares = (0.0, 0.0, 0.3, 1.0) if len(one.passes) == 1 else (0.0, 0.0, 0.0, 0.0)
    tensors = [random_columns(rng, one, n, share) for n, share in zip((0, 17, 3000, 700), shares, strict=True)]
    for columns in tensors:
        for a in columns.values():
            a[5::50] = -0.0 if a.dtype != np.uint16 else 0x8000
            a[6::50] = 0
    hypers = [{"lr": 0.25}, {"lr": 0.5}]
    if row is not None:
        hypers = [hypers_of(row, graph_of(row), 3), hypers_of(row, graph_of(row), 1, True, weight_decay=0.0)]
    assert agrees(compiled(one), tensors, hypers)
    unnoticed = []
    count = 0
    for what, source in wrong_sources(compiled(one).source):
        monkeypatch.setattr(cpu, "lower", lambda _, source=source: source)
        count += 1
        if agrees(Kernel(one), tensors, hypers):
            unnoticed.append(what)
    assert unnoticed == []
    assert count > 20
