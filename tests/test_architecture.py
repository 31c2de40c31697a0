"""The house has rooms: imports run one way between them, files stay short, and importing it costs
what torch costs."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import onepass

ROOT = Path(onepass.__file__).parent
# Each room, and the rooms and files outside it that it may import. All that is not named here is
# the program's.
ROOMS: dict[str, str] = {
    "kernel.graph": "",
    "kernel.functions": "kernel.graph",
    "kernel.llvm": "kernel.graph",
    "kernel.tensors": "kernel.graph kernel.llvm",
    "kernel.repeat": "kernel.graph kernel.llvm kernel.tensors",
    "kernel.cpu": "kernel.graph kernel.llvm kernel.tensors",
    "kernel.gpu": "kernel.graph kernel.llvm kernel.tensors",
    "kernel.eager": "kernel.graph kernel.tensors",
    "kernel": "kernel.graph kernel.llvm kernel.tensors kernel.repeat kernel.cpu kernel.gpu "
    "kernel.eager",
    "contract": "kernel",
    "stepping": "kernel contract",
    "schedule": "",
    "lr_scheduler": "schedule",
    "linalg": "kernel kernel.graph kernel.functions",
    "optimizer": "kernel contract stepping",
    "algorithms": "kernel.functions linalg contract optimizer",
    "algorithms.lbfgs": "kernel contract stepping optimizer",
    "swa_utils": "kernel kernel.functions contract stepping lr_scheduler",
    "pictures": "",
    "checkpoint": "",
    "range_test": "contract pictures",
    "": "kernel.graph kernel.functions contract schedule lr_scheduler optimizer algorithms "
    "algorithms.lbfgs swa_utils range_test",
}
# Where an import may wait until it is used: what is optional, or takes long and is needed by one
# command.
LAZY: dict[str, set[str]] = {
    "kernel": {
        f"onepass.kernel.{name}" for name in ("cpu", "eager", "gpu", "llvm", "repeat", "tensors")
    },
    "kernel.gpu.devices": {"triton"},
    "app.explain.target": {"triton"},
    "app.cli": {"onepass.app.commands"},
    "app.commands.gallery": {"onepass.app.gallery.album"},
    "app.commands.schedule": {"onepass.app.gallery.draw_schedules"},
    "app.commands.train": {"onepass.app.training.curves"},
    "app.commands.bench": {"onepass.app.bench.picture"},
    "checkpoint": {"safetensors"},
    "range_test.search": {"onepass.range_test.picture"},
    "app.tasks.cifar10": {"torchvision"},
    "app.tasks.digits": {"sklearn"},
}
PUBLIC = (
    "checkpoint",
    "kernel.functions",
    "linalg",
    "lr_scheduler",
    "schedule",
    "swa_utils",
    "optimizer",
    "__main__",
)


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
    inside = {
        id(n)
        for f in ast.walk(tree)
        if isinstance(f, (ast.FunctionDef, ast.Lambda))
        for n in ast.walk(f)
    }
    guards = [
        n
        for n in ast.walk(tree)
        if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)
    ]
    typing = {id(n) for guard in guards for n in ast.walk(guard)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = ["onepass", *[part for part in package if part]]
                base = ".".join([*up[: len(up) - node.level + 1], *([base] if base else [])])
            targets = [
                full if within(full := f"{base}.{a.name}") in MODULES else base for a in node.names
            ]
        else:
            continue
        for target in targets:
            yield Import(target, id(node) in inside, id(node) in typing)


def within(module: str) -> str:
    """A full name without the package's; `-` for what is none of it."""
    return (
        module.removeprefix("onepass").removeprefix(".")
        if module.split(".")[0] == "onepass"
        else "-"
    )


def room_of(name: str) -> str:
    """The innermost room of a module; `app` for the program's."""
    parts = name.split(".") if name else []
    if parts[:1] == ["app"] or name == "__main__":
        return "app"
    inward = [".".join(parts[:length]) for length in range(len(parts), -1, -1)]
    return next(room for room in inward if room in ROOMS)


def own(name: str) -> set[str]:
    """The package's modules that a module imports, at once or later."""
    return {within(i.module) for i in imports(name) if within(i.module) != "-"}


@pytest.mark.parametrize("name", [name for name in MODULES if room_of(name) != "app"])
def test_a_room_imports_only_what_it_may(name: str) -> None:
    room = room_of(name)
    allowed = {room, *ROOMS[room].split()}
    for target in own(name):
        assert room_of(target) in allowed, f"{name} is in {room!r}, which may not import {target}"


def test_every_room_is_there_and_says_what_it_knows() -> None:
    assert set(ROOMS) <= set(MODULES)
    for name, path in MODULES.items():
        if path.name == "__init__.py":
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), name


def test_contributing_draws_the_house_as_it_is() -> None:
    """The tree there names every room and every loose file, and nothing else."""
    text = (ROOT.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = text[text.index("    onepass/\n") : text.index("Imports run one way")]
    drawn = {line.split()[0] for line in tree.splitlines() if line.strip()}
    rooms = {f"{path.parent.name}/" for path in ROOT.rglob("__init__.py")}
    files = {path.name for path in ROOT.glob("[!_]*.py")}
    assert drawn == rooms | files | {"functions.py"}


def test_the_top_level_is_small() -> None:
    """Rooms, and the few files that are the contract with users."""
    rooms = [path for path in ROOT.iterdir() if (path / "__init__.py").exists()]
    files = list(ROOT.glob("*.py"))
    assert len(files) <= 8
    assert len(rooms) + len(files) <= 18


@pytest.mark.parametrize("name", PUBLIC)
def test_public_paths_stay(name: str) -> None:
    importlib.import_module(f"onepass.{name}")


def test_python_runs_the_package_as_a_program() -> None:
    command = [sys.executable, "-m", "onepass", "--help"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert "train" in run.stdout


def test_nothing_imports_in_a_circle() -> None:
    """The applications too, lazy imports included."""
    done: set[str] = set()
    graph = {name: own(name) - {name} for name in MODULES}
    while ready := {name for name in graph if name not in done and graph[name] <= done}:
        done |= ready
    assert done == set(MODULES)


STANDARD = sys.stdlib_module_names


@pytest.mark.parametrize(
    "name", [name for name in MODULES if room_of(name) in ("kernel.graph", "kernel.functions")]
)
def test_the_language_of_rules_needs_only_the_standard_library(name: str) -> None:
    outside = {i.module.split(".")[0] for i in imports(name)} - STANDARD
    assert outside <= {"onepass"}
    if name == "kernel.graph.ir":
        assert not outside


@pytest.mark.parametrize(
    "name", ["kernel.llvm.code", *(f"kernel.cpu.{file}" for file in ("elements", "lines", "walk"))]
)
def test_code_is_made_without_a_tensor(name: str) -> None:
    assert {i.module.split(".")[0] for i in imports(name)} - STANDARD <= {"onepass"}


@pytest.mark.parametrize("name", [n for n in MODULES if room_of(n) == "algorithms"])
def test_algorithms_know_mathematics_and_the_contract(name: str) -> None:
    # Muon calls a function of whole matrices, and gives what is not a matrix to AdamW.
    more = {"linalg", "algorithms.adam"} if name == "algorithms.muon" else set()
    contract = {f"contract.{file}" for file in ("options", "ranges", "values")}
    assert own(name) <= {"kernel.functions", "optimizer"} | contract | more


@pytest.mark.parametrize("name", MODULES)
def test_imports_are_at_the_top(name: str) -> None:
    allowed = tuple(LAZY.get(name, ()))
    for found in imports(name):
        if found.lazy:
            assert found.module.startswith(allowed or "-"), f"{name} imports {found.module} late"
        if found.typing:
            assert name == "kernel", (
                f"{name} hides an import of {found.module} from the interpreter"
            )


@pytest.mark.parametrize("name", MODULES)
def test_files_are_short(name: str) -> None:
    assert len(MODULES[name].read_text(encoding="utf-8").splitlines()) <= 500


def test_environment_variables_are_no_interface() -> None:
    for name in (name for name in MODULES if room_of(name) != "app"):
        tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
        names = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        assert not names & {"environ", "getenv", "environb"}, name


def loaded_after(code: str) -> set[str]:
    """The modules of a fresh interpreter that has run this."""
    command = [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT.parent)
    return set(run.stdout.split())


HEAVY = {
    "rich",
    "typer",
    "matplotlib",
    "safetensors",
    "sklearn",
    "torch._dynamo",
    "torch._inductor",
}


def test_importing_is_cheap() -> None:
    """No compiler, no command line; torch and numpy, which the user has imported anyway."""
    before, after = loaded_after("import torch"), loaded_after("import onepass")
    new = {module for module in after - before if module.split(".")[0] != "onepass"}
    assert "onepass.optimizer" in after
    assert not after & (HEAVY | {"llvmlite"}), new & HEAVY


def test_the_first_step_loads_the_compiler_of_kernels_alone() -> None:
    step = (
        "p = torch.ones(3, requires_grad=True); p.grad = torch.ones(3); onepass.AdamW([p]).step()"
    )
    after = loaded_after(f"import torch, onepass\n{step}")
    assert "llvmlite" in after
    assert not after & HEAVY
