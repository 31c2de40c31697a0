"""The house has floors: imports go strictly down, files stay short, and importing it costs what torch costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import onepass

ROOT = Path(onepass.__file__).parent
# From the ground up. A module imports from the floors below its own, and nothing beside it.
FLOORS: tuple[tuple[str, ...], ...] = (
    (
        "kernel.assembly",
        "kernel.caches",
        "kernel.ir",
        "ledger",
        "mistakes",
        "kernel.sass",
        "schedule.formulas",
        "stateless",
    ),
    ("lr_scheduler.arguments", "lr_scheduler.values", "schedule.notation"),
    ("lr_scheduler.overrides",),
    ("lr_scheduler.frame", "schedule"),
    ("lr_scheduler.*",),
    ("lr_scheduler",),
    ("kernel.formats", "kernel.functions", "kernel.jit", "kernel.memory", "kernel.native", "kernel.uploads"),
    ("kernel.passes",),
    ("kernel.program",),
    ("kernel.ahead", "kernel.code", "kernel.expressions"),
    ("kernel.host", "kernel.target", "kernel.walk"),
    ("kernel.chunks", "kernel.lines", "kernel.team", "kernel.uniforms"),
    ("kernel.lower", "kernel.temporaries", "kernel.tiles"),
    ("kernel.eager", "kernel.cpu", "kernel.devices", "kernel.facts", "kernel.numbers", "kernel.units"),
    ("kernel.elementwise", "kernel.gpu"),
    ("kernel",),
    ("checks", "line_search", "linalg"),
    ("options",),
    ("columns", "loading", "param_groups", "reading", "recipes", "turn", "unscale"),
    ("averages", "batch", "flat", "numbers", "scratch", "sharing"),
    ("device_batch", "eager_batch", "group_recipes"),
    ("rows",),
    ("plan",),
    ("private", "steps"),
    ("optimizer",),
    ("algorithms", "algorithms.adam"),
    ("algorithms.*", "range_picture", "snapshot"),
    ("range_test", "swa_utils"),
    ("",),
)
# Where an import may wait until it is used: what is optional, or takes long and is needed by one command.
LAZY: dict[str, set[str]] = {
    "kernel": {
        f"onepass.kernel.{name}"
        for name in ("cpu", "devices", "eager", "elementwise", "facts", "gpu", "native", "numbers")
    },
    "kernel.devices": {"triton"},
    "kernel.target": {"triton"},
    "cli": {"onepass.commands"},
    "commands": {"onepass.gallery.album", "onepass.gallery.draw_schedules", "onepass.training.curves"},
    "bench.report": {"matplotlib"},
    "checkpoint": {"safetensors"},
    "range_test": {"onepass.range_picture"},
    "tasks.cifar10": {"torchvision"},
    "tasks.digits": {"sklearn"},
}


@dataclass(frozen=True)
class Import:
    """One imported module, by its full name, and whether a function, not the module, imports it."""

    module: str
    lazy: bool
    typing: bool


def modules() -> dict[str, Path]:
    """All modules of the package, by their names within it."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str) -> Iterator[Import]:
    """What a module imports; of packages, the module that is meant."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.Lambda)) for n in ast.walk(f)}
    guards = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    typing = {id(n) for guard in guards for n in ast.walk(guard)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = ["onepass", *[part for part in package if part]]
                base = ".".join([*up[: len(up) - node.level + 1], *([base] if base else [])])
            targets = [full if within(full := f"{base}.{a.name}") in MODULES else base for a in node.names]
        else:
            continue
        for target in targets:
            yield Import(target, id(node) in inside, id(node) in typing)


def within(module: str) -> str:
    """A full name without the package's; `-` for what is none of it."""
    return module.removeprefix("onepass").removeprefix(".") if module.split(".")[0] == "onepass" else "-"


def floor(name: str) -> int | None:
    family = name.split(".")[0] + ".*" if "." in name else name
    return next((i for i, names in enumerate(FLOORS) if name in names or family in names), None)


def own(name: str) -> set[str]:
    """The package's modules that a module imports, at once or later."""
    return {within(i.module) for i in imports(name) if within(i.module) != "-"}


@pytest.mark.parametrize("name", [name for name in MODULES if floor(name) is not None])
def test_imports_go_strictly_down(name: str) -> None:
    for target in own(name):
        assert floor(target) is not None, f"{name} imports {target}, which has no floor"
        assert floor(target) < floor(name), f"{name} imports {target}"


def test_the_kernel_has_floors_and_knows_nothing_above() -> None:
    """Every file of the compiler is placed, and none imports what lies outside it."""
    for name in MODULES:
        if name.split(".")[0] == "kernel":
            assert floor(name) is not None, f"{name} has no floor"
            assert all(target.split(".")[0] == "kernel" for target in own(name)), name


def test_nothing_imports_in_a_circle() -> None:
    """The applications too, lazy imports included."""
    done: set[str] = set()
    graph = {name: own(name) - {name} for name in MODULES}
    while ready := {name for name in graph if name not in done and graph[name] <= done}:
        done |= ready
    assert done == set(MODULES)


STANDARD = sys.stdlib_module_names
COMPILER = [
    f"kernel.{name}" for name in ("ir", "functions", "formats", "passes", "program", "code", "walk", "lines", "lower")
]


@pytest.mark.parametrize("name", COMPILER)
def test_the_compiler_never_sees_a_tensor(name: str) -> None:
    """Graphs, programs and code are made with the standard library alone; the intermediate form with nothing else."""
    outside = {i.module.split(".")[0] for i in imports(name)} - STANDARD
    assert outside <= {"onepass"}
    if name == "kernel.ir":
        assert not outside


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("algorithms.")])
def test_algorithms_know_mathematics_and_the_contract(name: str) -> None:
    # No rule over elements: the whole problem is one vector, and loss and gradient are asked for at several places.
    whole = (
        {"checks", "flat", "line_search", "loading", "param_groups", "steps"} if name == "algorithms.lbfgs" else set()
    )
    # Muon calls a function of whole matrices, and gives what is no matrix to AdamW.
    more = {"linalg", "algorithms.adam"} if name == "algorithms.muon" else set()
    assert own(name) <= {"kernel.functions", "optimizer", "options"} | whole | more


BESIDE = ("checkpoint", "lr_scheduler", "schedule", "swa_utils")


@pytest.mark.parametrize("name", [n for n in MODULES if n.split(".")[0] in BESIDE])
def test_what_sits_beside_optimizers_imports_no_algorithm(name: str) -> None:
    """Nor each other, except that schedulers are made of schedules, and that torch's swa_utils has a scheduler."""
    room = name.split(".")[0]
    known = {room} | {"lr_scheduler": {"schedule"}, "swa_utils": {"lr_scheduler"}}.get(room, set())
    assert not {target.split(".")[0] for target in own(name)} & ({"algorithms", "", *BESIDE} - known)


@pytest.mark.parametrize("name", MODULES)
def test_imports_are_at_the_top(name: str) -> None:
    allowed = LAZY.get(name, set())
    for one in imports(name):
        if one.lazy:
            assert one.module in allowed or one.module.split(".")[0] in allowed, f"{name} imports {one.module} late"
        if one.typing:
            assert name == "kernel", f"{name} hides an import of {one.module} from the interpreter"


@pytest.mark.parametrize("name", MODULES)
def test_files_are_short(name: str) -> None:
    assert len(MODULES[name].read_text(encoding="utf-8").splitlines()) <= 500


def test_environment_variables_are_no_interface() -> None:
    for name in filter(floor, MODULES):
        tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
        names = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        assert not names & {"environ", "getenv", "environb"}, name


def loaded_after(code: str) -> set[str]:
    """The modules of a fresh interpreter that has run this."""
    command = [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT.parent)
    return set(run.stdout.split())


HEAVY = {"rich", "typer", "matplotlib", "safetensors", "sklearn", "torch._dynamo", "torch._inductor"}


def test_importing_is_cheap() -> None:
    """No compiler, no command line; torch and numpy, which the user has imported anyway."""
    before, after = loaded_after("import torch"), loaded_after("import onepass")
    new = {module for module in after - before if module.split(".")[0] != "onepass"}
    assert "onepass.optimizer" in after
    assert not after & (HEAVY | {"llvmlite"}), new & HEAVY


def test_the_first_step_loads_the_compiler_of_kernels_alone() -> None:
    step = "p = torch.ones(3, requires_grad=True); p.grad = torch.ones(3); onepass.AdamW([p]).step()"
    after = loaded_after(f"import torch, onepass\n{step}")
    assert "llvmlite" in after
    assert not after & HEAVY
