"""Machine code: the same bits on any pool of threads, no contraction, no calls, and facts as Python
reads them."""

from __future__ import annotations

import ctypes
import gc
import platform
import re
import threading
from collections.abc import Iterator

import llvmlite.binding as llvm
import numpy as np
import pytest
import torch
from support.bare_kernels import (
    assert_same_bits,
    compiled,
    graph_of,
    hypers_of,
    launch,
    program_of,
    random_columns,
)
from support.extra_rules import RULES, program
from table import AMSGRAD, DECOUPLED, NESTEROV
from torch import Tensor

import onepass
from onepass import kernel as door
from onepass.kernel.cpu import launch as cpu
from onepass.kernel.llvm import native
from onepass.kernel.llvm.native import Library
from onepass.kernel.tensors import facts
from onepass.kernel.tensors.facts import Expected

FORMATS = ("float32", "float64", "bfloat16", "float16")
X86 = platform.machine() in ("x86_64", "AMD64")


# Threads.


@pytest.fixture
def all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "UNITS_PER_THREAD", 1)


@pytest.mark.usefixtures("all_threads")
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_python_threads_do_as_openmp(
    threads: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch has no OpenMP runtime to share, a pool of Python threads runs the same
    workers."""
    kernel = compiled(program_of(graph_of(AMSGRAD), *["float32"] * 3))
    reducing = compiled(program(RULES[4]))
    ran = []
    for one, hypers in (
        (kernel, hypers_of(AMSGRAD, graph_of(AMSGRAD), 3)),
        (reducing, {"lr": 0.25}),
    ):
        tensors = [random_columns(rng, one.program, n, 0.0) for n in (200000, 5, 70000, 0, 100003)]
        shared = launch(one, tensors, [hypers], threads=threads)
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "openmp", lambda: 0)
            patch.setattr(
                cpu,
                "run_in_threads",
                lambda *args: ran.append(args[2]) or native.run_in_threads(*args),
            )
            own = launch(one, tensors, [hypers], threads=threads)
        for got, want in zip(own, shared, strict=True):
            for name in want:
                assert_same_bits(got[name], want[name], name)
    assert ran == [threads] * (1 + len(reducing.program.passes))


@pytest.mark.usefixtures("all_threads")
def test_steps_may_run_in_many_python_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Optimizers in threads of their own share kernels and the pool, and nothing else."""
    for parallel in (native.openmp(), 0):
        monkeypatch.setattr(cpu, "openmp", lambda parallel=parallel: parallel)
        params = [torch.full((100000,), float(i)) for i in range(6)]

        def work(p: Tensor) -> None:
            optimizer = onepass.SGD([p], lr=0.5)
            for _ in range(20):
                p.grad = torch.ones_like(p)
                optimizer.step()

        workers = [threading.Thread(target=work, args=(p,)) for p in params]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        for i, p in enumerate(params):
            assert (p == i - 10.0).all()


@pytest.mark.skipif(platform.system() != "Linux", reason="torch brings libgomp on Linux")
def test_openmp_is_found() -> None:
    assert native.openmp()


# Code.


def functions(assembly: str) -> dict[str, list[str]]:
    """A listing's instructions, by function."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in assembly.splitlines():
        label = re.match(r"_?((?:host|body|worker|launch)_\d+):", line)
        if label:
            current = found.setdefault(label[1], [])
        elif re.match(r"\s+[a-z]", line):
            current.append(line.split("#")[0].strip())
    return found


def kernels() -> Iterator[cpu.Kernel]:
    """What is compiled for the table's widest rules and for those with every operation, in all
    formats."""
    for format in FORMATS:
        for row in (NESTEROV, AMSGRAD):
            yield compiled(program_of(graph_of(row), format, format, format))
        for rule in RULES[1:5]:
            yield compiled(program(rule, format))


CALL = re.compile(r"^(call|bl|blr|jalr)[a-z]*\s")
FUSED = re.compile(r"^(vf?n?madd|vf?n?msub|vfmadd|vfmsub|vfnm|fmadd|fmsub|fnmadd|fnmsub|fmla|fmls)")


def test_no_loop_calls_and_nothing_is_contracted() -> None:
    """A call in a loop would cost more than memory does; a fused multiply-add rounds once, where
    twice is right."""
    for kernel in kernels():
        listing = functions(kernel.library.assembly())
        bodies = [name for name in listing if name.startswith("body")]
        assert len(bodies) == len(kernel.program.passes)
        for name, lines in listing.items():
            assert not [line for line in lines if FUSED.match(line)], (kernel.program.name, name)
            if name in bodies:
                assert not [line for line in lines if CALL.match(line)], (kernel.program.name, name)


TARGETS = {
    "x86-64-v3": ("x86_64-unknown-linux-gnu", "x86-64-v3"),
    "x86-64-v4": ("x86_64-unknown-linux-gnu", "x86-64-v4"),
    "graviton": ("aarch64-unknown-linux-gnu", "neoverse-n1"),
    "apple": ("arm64-apple-darwin", "apple-m1"),
}


@pytest.mark.parametrize("target", TARGETS)
def test_other_hosts_need_no_calls_either(target: str) -> None:
    """Whatever machine they are compiled for, a conversion that it lacks must not become a
    library's function."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    triple, name = TARGETS[target]
    try:
        backend = llvm.Target.from_triple(triple)
    except RuntimeError:
        pytest.skip("this llvmlite has no such target")
    for row, format in (
        (AMSGRAD, "float32"),
        (AMSGRAD, "bfloat16"),
        (NESTEROV, "float16"),
        (DECOUPLED, "float64"),
    ):
        machine = backend.create_target_machine(cpu=name, opt=2)
        module = llvm.parse_assembly(
            compiled(program_of(graph_of(row), format, format, format)).source
        )
        module.triple, module.data_layout = triple, str(machine.target_data)
        tuning = llvm.create_pipeline_tuning_options(speed_level=2)
        tuning.loop_vectorization = True
        builder = llvm.create_pass_builder(machine, tuning)
        builder.getModulePassManager().run(module, builder)
        listing = functions(machine.emit_assembly(module))
        assert listing["body_0"]
        assert not [line for line in listing["body_0"] if CALL.match(line) or FUSED.match(line)], (
            row.name,
            format,
        )


@pytest.mark.skipif(not X86, reason="reads x86 assembly")
@pytest.mark.parametrize("format", FORMATS)
def test_loops_are_vectorised(format: str) -> None:
    """Arithmetic on at least 128 bits at a time; on 256 where the host has AVX."""
    kernel = compiled(program_of(graph_of(AMSGRAD), format, format, format))
    packed = "pd" if format == "float64" else "ps"
    lines = functions(kernel.library.assembly())["body_0"]
    register = r"%[yz]mm" if llvm.get_host_cpu_features().get("avx2") else r"%[xyz]mm"
    for operation in ("add", "mul", "div", "sqrt"):
        assert [
            line for line in lines if re.match(rf"v?{operation}{packed}\s.*{register}", line)
        ], operation


def test_reductions_are_vectorised() -> None:
    if not X86:
        pytest.skip("reads x86 assembly")
    lines = functions(compiled(program(RULES[3])).library.assembly())["body_0"]
    assert [line for line in lines if re.match(r"v?addpd\s", line)]


def test_code_lives_as_long_as_its_library() -> None:
    """Libraries come and go; freeing one leaves the others whole."""
    source = "define i64 @answer() {{ ret i64 {} }}"
    libraries = [Library(source.format(i)) for i in range(12)]
    addresses = [library.address("answer") for library in libraries]
    del libraries[::2]
    gc.collect()
    libraries += [Library(source.format(100 + i)) for i in range(6)]
    for i, library in enumerate(libraries[:6]):
        assert library.address("answer") == addresses[2 * i + 1]
        assert ctypes.CFUNCTYPE(ctypes.c_int64)(library.address("answer"))() == 2 * i + 1


def test_an_optimizer_keeps_its_kernel() -> None:
    """Emptied caches, which also happen when very many programs are compiled, take no code from
    under a step."""
    p = torch.ones(100)
    optimizer = onepass.AdamW([p], lr=0.1)
    other = torch.ones(100)
    for _ in range(3):
        p.grad = torch.ones(100)
        optimizer.step()
        cpu.make_kernel.cache_clear()
        door.compile.cache_clear()
        gc.collect()
    optimizer = onepass.AdamW([other], lr=0.1)
    for _ in range(3):
        other.grad = torch.ones(100)
        optimizer.step()
    assert torch.equal(p, other)


def test_malformed_code_is_refused() -> None:
    with pytest.raises(RuntimeError, match="parsing error"):
        Library("define i64 @answer() { ret float 1 }")


# Facts.


class Subclass(Tensor):
    pass


def strange_tensors() -> dict[str, object]:
    """What may stand where a dense (3, 4) float32 tensor is expected."""
    freed, shrunk, moved = torch.ones(3, 4), torch.ones(3, 4), torch.ones(3, 4)
    freed.untyped_storage().resize_(0)
    shrunk.untyped_storage().resize_(40)
    moved.data = torch.zeros(3, 4)
    complex_ = torch.ones(3, 4, dtype=torch.complex64)
    sparse = torch.eye(3, 4).to_sparse()
    return {
        "plain": torch.ones(3, 4),
        "parameter": torch.nn.Parameter(torch.ones(3, 4)),
        "buffer": torch.nn.Buffer(torch.ones(3, 4)),
        "no leaf": torch.ones(3, 4, requires_grad=True) * 2,
        "swapped data": moved,
        "none": None,
        "number": 1.0,
        "list": [1.0],
        "array": np.ones((3, 4), np.float32),
        "transposed": torch.ones(4, 3).t(),
        "expanded": torch.ones(4).expand(3, 4),
        "expanded scalar": torch.ones(()).expand(3, 4),
        "strided": torch.ones(3, 8)[:, ::2],
        "view at an offset": torch.ones(40)[7:19].view(3, 4),
        "view at the end": torch.ones(40)[28:].view(3, 4),
        "channels": torch.ones(3, 4, 1, 1),
        "flat": torch.ones(12),
        "other shape": torch.ones(4, 3),
        "larger": torch.ones(3, 5),
        "scalar": torch.ones(()),
        "empty": torch.ones(0, 4),
        "float64": torch.ones(3, 4, dtype=torch.float64),
        "int32": torch.ones(3, 4, dtype=torch.int32),
        "bfloat16": torch.ones(3, 4, dtype=torch.bfloat16),
        "complex": complex_,
        "conjugated": complex_.conj(),
        "imaginary part": complex_.conj().imag,
        "meta": torch.ones(3, 4, device="meta"),
        "sparse": sparse,
        "compressed": torch.eye(3, 4).to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(torch.ones(3, 4), 0.1, 0, torch.quint8),
        "nested": torch.nested.nested_tensor([torch.ones(4), torch.ones(3)]),
        "freed storage": freed,
        "shrunk storage": shrunk,
        "subclass": torch.ones(3, 4).as_subclass(Subclass),
    }


# All but these differ from what is expected.
SAME = {
    "plain",
    "parameter",
    "buffer",
    "no leaf",
    "swapped data",
    "view at an offset",
    "view at the end",
}


@pytest.fixture(params=["objects", "cdata", "python"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The three ways to ask, the slower ones where a faster one is not to be had."""
    if not facts.answers():
        pytest.skip("this torch exports no C functions to ask")
    if request.param == "objects" and not facts.object_layout():
        pytest.skip("this Python does not show where tensors are")
    if request.param == "cdata":
        monkeypatch.setattr(facts, "object_layout", lambda: None)
        library = facts._native.__wrapped__()
        monkeypatch.setattr(facts, "_native", lambda: library)
    if request.param == "python":
        monkeypatch.setattr(facts, "_native", lambda: None)
    return request.param


@pytest.mark.filterwarnings("ignore:.*(nested tensors|[Ss]parse|quantize).*")
def test_facts_are_the_same_however_they_are_asked(way: str) -> None:
    strange = strange_tensors()
    expected = Expected([torch.empty(3, 4) for _ in strange])
    assert expected.compare(list(strange.values())) == len(strange) - len(SAME)
    for name, t, changed, pointer in zip(
        strange, strange.values(), expected.changed, expected.pointers, strict=True
    ):
        assert bool(changed) == (name not in SAME), name
        if not changed:
            assert pointer == t.data_ptr(), name


def test_facts_of_other_shapes(way: str) -> None:
    """Scalars, empty tensors and transposed ones match themselves and nothing else."""
    like = [
        torch.ones(()),
        torch.ones(0, 3),
        torch.ones(2, 3).t(),
        torch.ones(4, 1, 5),
        torch.ones(2, dtype=torch.half),
    ]
    expected = Expected(like)
    assert expected.compare(like) == 0
    assert [bool(p) for p in expected.pointers] == [True, False, True, True, True]
    assert expected.compare([t.clone() for t in like]) == 0
    for shift in range(1, len(like)):
        assert expected.compare(like[shift:] + like[:shift]) == len(like)
    with pytest.raises(ValueError, match="expected 5 tensors, got 4"):
        expected.compare(like[1:])


def test_facts_of_nothing(way: str) -> None:
    assert Expected([]).compare([]) == 0


def test_facts_follow_a_tensor_that_changes(way: str) -> None:
    """The same object, changed between two looks."""
    t = torch.ones(3, 4)
    expected = Expected([t])
    for change, differs in (
        (lambda: t.mul_(2), 0),
        (lambda: setattr(t, "data", torch.zeros(3, 4)), 0),
        (lambda: t.set_(torch.zeros(100), 5, (3, 4), (4, 1)), 0),
        (lambda: t.resize_(3, 5), 1),
        (lambda: t.resize_(3, 4), 0),
        (lambda: t.t_(), 1),
        (lambda: t.t_(), 0),
        (lambda: setattr(t, "data", torch.zeros(3, 4, dtype=torch.float64)), 1),
        (lambda: setattr(t, "data", torch.zeros(3, 4)), 0),
        (lambda: t.untyped_storage().resize_(0), 1),
        (lambda: t.untyped_storage().resize_(48), 0),
    ):
        change()
        assert expected.compare([t]) == differs
        if not differs:
            assert expected.pointers[0] == t.data_ptr()
