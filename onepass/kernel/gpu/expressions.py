"""How a value of a program becomes a line of Triton.

In a pass a value is a block of elements, in the uniforms a number in float64. The update

    where(lr == 0, p, p - lr * g)      of a pass with inputs (lr, lr == 0) and loads (p, g)

becomes

    @triton.jit
    def values_0(u0, u1, x0, x1):
        t4 = u0 * x1
        t5 = x0 - t4
        t6 = tl.where(u1, x0, t5)
        return t6
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..graph.ir import LOADS, Node
from ..graph.passes import Pass, element_order

# Triton's type of a value, by the type of its node. Integers are unsigned, so that shifts bring in
# zeros; comparisons and conversions to floats take their signed view.
TRITON_TYPES = {
    "real": "tl.float64",
    "f64": "tl.float64",
    "f32": "tl.float32",
    "f16": "tl.float16",
    "i32": "tl.uint32",
    "i16": "tl.uint16",
    "bool": "tl.int1",
}
SIGNED_TYPES = {"i32": "tl.int32", "i16": "tl.int16"}
# A pointer to values of a type, in the notation of Triton's signatures.
POINTER_TYPES = {"f64": "*fp64", "f32": "*fp32"}
INFIX = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "lt": "<",
    "le": "<=",
    "eq": "==",
    "and": "&",
    "or": "|",
    "xor": "^",
    "shl": "<<",
    "shr": ">>",
}

# What Triton does not have: rounding to whole numbers (its floor may flush small numbers to zero),
# powers, and a maximum that lets no NaN vanish.
PRELUDE = """\
import triton
import triton.language as tl


@triton.jit
def round_to_even(x):
    # Beyond 2**23, or 2**52, there are only whole numbers.
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
    """Return a constant of exactly this type."""
    if type == "bool":
        return f"({int(bool(value))} != 0)"
    text = repr(value)
    if text in ("inf", "-inf", "nan"):
        text = f'float("{text}")'
    return f"tl.full((), {text}, {TRITON_TYPES[type]})"


def spell(node: Node, args: list[str]) -> str:
    """Return one operation on named operands, correctly rounded and contracted with no other."""
    source = node.args[0].type
    if node.op in INFIX:
        if source in SIGNED_TYPES and node.op in ("lt", "le"):
            args = [_signed(arg, source) for arg in args]
        return f" {INFIX[node.op]} ".join(args)
    if node.op == "cast":
        # Between integers, bits go in from the right or are cut off; in a conversion to floats,
        # integers have a sign.
        is_to_float = source in SIGNED_TYPES and node.type not in SIGNED_TYPES
        value = _signed(args[0], source) if is_to_float else args[0]
        return f"{value}.to({TRITON_TYPES[node.type]})"
    if node.op == "bitcast":
        return f"{args[0]}.to({TRITON_TYPES[node.type]}, bitcast=True)"
    if node.op == "spread":
        return args[0]
    if node.op == "neg":
        # Triton's own minus subtracts from zero, which has no -0.0.
        return f"{args[0]} * -1.0"
    if node.op == "not":
        return f"{args[0]} == 0"
    return _call(node.op, args, is_single=source == "f32")


def _signed(value: str, type: str) -> str:
    """Return the signed view of an integer."""
    return f"{value}.to({SIGNED_TYPES[type]}, bitcast=True)"


def _call(op: str, args: list[str], *, is_single: bool) -> str:
    """Return the call of a function; divisions and roots in float32 have functions that round."""
    if op == "div" and not is_single:
        return f"{args[0]} / {args[1]}"
    functions = {
        "div": "tl.div_rn",
        "sqrt": "tl.sqrt_rn" if is_single else "tl.sqrt",
        "abs": "tl.abs",
        "exp": "tl.exp",
        "log": "tl.log",
        "where": "tl.where",
        "floor": "round_down",
        "rint": "round_to_even",
        "pow": "power",
    }
    return f"{functions[op]}({', '.join(args)})"


def assign(
    nodes: Iterable[Node],
    names: dict[Node, str],
    known: Callable[[Node], str | None],
    prefix: str = "t",
) -> list[str]:
    """Return a line for each node, in order, and enter what each is called into `names`.

    A node for which `known` returns a name needs no line; others are called by `prefix` and a
    number.
    """
    lines = []
    for node in nodes:
        name = known(node)
        if name is None:
            for arg in node.args:
                if arg not in names:
                    names[arg] = literal(arg.attr, arg.type)
            name = f"{prefix}{len(names)}"
            text = spell(node, [names[arg] for arg in node.args])
            lines.append(f"{name} = {text}")
        names[node] = name
    return lines


def values(pass_: Pass, pass_index: int) -> str:
    """Return `values_k`, a pass's mathematics.

    It takes the pass's inputs and what it loads, and returns what it stores or reduces.
    """
    names: dict[Node, str] = {node: f"u{i}" for i, node in enumerate(pass_.inputs)}
    loads = {node: f"x{i}" for i, node in enumerate(pass_.loads)}
    arguments = [*names.values(), *loads.values()]

    def known(node: Node) -> str | None:
        return loads[node] if node.op in LOADS else None

    lines = assign(element_order(pass_.roots), names, known)
    results = [names.get(root) or literal(root.attr, root.type) for root in pass_.roots]
    return "\n".join(
        [
            "@triton.jit",
            f"def values_{pass_index}({', '.join(arguments)}):",
            *(f"    {line}" for line in lines),
            f"    return {', '.join(results)}",
        ]
    )
