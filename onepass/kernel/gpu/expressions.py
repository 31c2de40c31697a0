"""How a value of a program becomes a line of Triton: blocks of elements in kernels, numbers in
float64 beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..graph.ir import LOADS, Node
from ..graph.passes import Pass, element_order

# Integers are unsigned, so that shifts bring in zeros; comparisons and conversions to floats take
# their signed view.
TYPES = {"real": "tl.float64", "f64": "tl.float64", "f32": "tl.float32", "f16": "tl.float16"}
TYPES |= {"i32": "tl.uint32", "i16": "tl.uint16", "bool": "tl.int1"}
SIGNED = {"i32": "tl.int32", "i16": "tl.int16"}
INFIX = {"add": "+", "sub": "-", "mul": "*", "lt": "<", "le": "<=", "eq": "=="}
INFIX |= {"and": "&", "or": "|", "xor": "^", "shl": "<<", "shr": ">>"}

# What Triton does not have: rounding to whole numbers (its floor may flush small numbers to zero),
# powers, and a maximum that lets no NaN vanish.
PRELUDE = """\
import triton
import triton.language as tl


@triton.jit
def round_to_even(x):
    # Beyond 2**23, or 2**52, there are whole numbers alone.
    limit = tl.full((), 8388608.0 if x.dtype == tl.float32 else 4503599627370496.0, x.dtype)
    size = tl.abs(x)
    whole = (size + limit) - limit
    return tl.where((size < limit) & (x != 0), tl.where(x < 0, -1.0 * whole, whole), x)


@triton.jit
def round_down(x):
    whole = round_to_even(x)
    return tl.where(whole > x, whole - 1, whole)


@triton.jit
def power(x, y):
    # As in C; the exponent's rounding shows: at most 1 + 1.5 |y log x| units in the last place.
    size = tl.exp(y * tl.log(tl.abs(x)))
    size = tl.where(tl.abs(x) == 1, 1.0, tl.where(y == 1, tl.abs(x), size))
    odd = y - 2 * tl.floor(y / 2) == 1
    real = (tl.floor(y) == y) | (x == 0) | (x == -float("inf"))
    signed = tl.where(odd, -1.0 * size, tl.where(real, size, float("nan")))
    # Of zeros, the reciprocal has the sign.
    return tl.where((y == 0) | (x == 1), 1.0, tl.where((x < 0) | (1 / x < 0), signed, size))


@triton.jit
def larger(a, b):
    return tl.where((b > a) | (b != b), b, a)


@triton.jit
def largest(x, axis: tl.constexpr):
    is_nan = tl.max((x != x).to(tl.int32), axis=axis)
    return tl.where(is_nan != 0, float("nan"), tl.max(tl.where(x != x, 0.0, x), axis=axis))
"""


def literal(value: object, type: str) -> str:
    """A constant of exactly this type."""
    if type == "bool":
        return f"({int(bool(value))} != 0)"
    text = repr(value)
    text = f'float("{text}")' if text in ("inf", "-inf", "nan") else text
    return f"tl.full((), {text}, {TYPES[type]})"


def spell(node: Node, args: list[str]) -> str:
    """One operation on named operands, correctly rounded and contracted with no other."""
    source = node.args[0].type
    single = source == "f32"
    if node.op == "div":
        return f"tl.div_rn({args[0]}, {args[1]})" if single else f"{args[0]} / {args[1]}"
    if node.op == "sqrt":
        return f"tl.sqrt_rn({args[0]})" if single else f"tl.sqrt({args[0]})"
    if node.op in INFIX:
        if source in SIGNED and node.op in ("lt", "le"):
            args = [f"{a}.to({SIGNED[source]}, bitcast=True)" for a in args]
        return f" {INFIX[node.op]} ".join(args)
    if node.op == "neg":
        # Triton's own minus subtracts from zero, which has no -0.0.
        return f"{args[0]} * -1.0"
    if node.op in ("abs", "exp", "log"):
        return f"tl.{node.op}({args[0]})"
    if node.op in ("floor", "rint"):
        return f"{'round_down' if node.op == 'floor' else 'round_to_even'}({args[0]})"
    if node.op == "pow":
        return f"power({args[0]}, {args[1]})"
    if node.op == "not":
        return f"{args[0]} == 0"
    if node.op == "where":
        return f"tl.where({', '.join(args)})"
    if node.op == "spread":
        return args[0]
    if node.op == "bitcast":
        return f"{args[0]}.to({TYPES[node.type]}, bitcast=True)"
    assert node.op == "cast", node
    # Between integers, bits go in from the right or are cut off; into floats, integers have a sign.
    signed = (
        f".to({SIGNED[source]}, bitcast=True)"
        if source in SIGNED and node.type not in SIGNED
        else ""
    )
    return f"{args[0]}{signed}.to({TYPES[node.type]})"


def assign(
    nodes: Iterable[Node],
    names: dict[Node, str],
    known: Callable[[Node], str | None],
    prefix: str = "t",
) -> list[str]:
    """A line for each node, in order; those that `known` names need none. Enters all into
    `names`."""
    lines = []
    for node in nodes:
        name = known(node)
        if name is None:
            for a in node.args:
                if a not in names:
                    names[a] = literal(a.attr, a.type)
            name = f"{prefix}{len(names)}"
            text = spell(node, [names[a] for a in node.args])
            lines.append(f"{name} = {text}")
        names[node] = name
    return lines


def values(one: Pass, k: int) -> str:
    """`values_k`: a pass's mathematics, from its inputs and what it loads to what it stores or
    reduces."""
    names: dict[Node, str] = {node: f"u{i}" for i, node in enumerate(one.inputs)}
    loads = {node: f"x{i}" for i, node in enumerate(one.loads)}
    arguments = [*names.values(), *loads.values()]
    lines = assign(
        element_order(one.roots), names, lambda node: loads[node] if node.op in LOADS else None
    )
    results = [names.get(root) or literal(root.attr, root.type) for root in one.roots]
    return "\n".join(
        [
            "@triton.jit",
            f"def values_{k}({', '.join(arguments)}):",
            *(f"    {line}" for line in lines),
            f"    return {', '.join(results)}",
        ]
    )
