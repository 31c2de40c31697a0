"""Sparse gradients: rows that have values step as dense ones do, bit for bit, and all others stay
as they are."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.side_by_side import CLOSE, quietly, refuses, snapshot
from support.subprocess_cases import fates
from torch import Tensor, nn

import onepass
from onepass import checkpoint
from onepass.kernel.cpu.launch import Kernel, Launch

SPARSE: dict[str, tuple[str, dict[str, Any]]] = {
    "sparse_adam": ("SparseAdam", {"lr": 0.05}),
    "sparse_adam-maximize": (
        "SparseAdam",
        {"lr": 0.05, "betas": (0.6, 0.9), "eps": 1e-3, "maximize": True},
    ),
    "sgd": ("SGD", {"lr": 0.1}),
    "sgd-maximize": ("SGD", {"lr": 0.1, "maximize": True}),
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adagrad": ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.1}),
    "adagrad-maximize": ("Adagrad", {"lr": 0.1, "maximize": True}),
}
BY_ROWS = ("sparse_adam", "sgd", "adagrad")
EAGER = {"foreach": False, "fused": False}
# (shape, sparse dimensions): a table, tables of two indices, rows of two dimensions, single
# elements.
SHAPES = [((30, 16), 1), ((6, 5, 12), 2), ((9, 3, 4), 1), ((7, 6), 2), ((40,), 1)]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """On small tensors torch's sparse operations take longer in two threads than in one."""
    torch.set_num_threads(1)


def make(
    algorithm: str, params: Any, library: Any = onepass, eager: bool = False, **changes: Any
) -> torch.optim.Optimizer:
    name, options = SPARSE[algorithm]
    opt = getattr(library, name)(params, **(options | changes))
    for group in opt.param_groups:
        group.update(EAGER if eager else {})
    return opt


def indices_in(
    shape: Sequence[int], k: int, n: int, random: torch.Generator | None = None
) -> Tensor:
    return torch.stack(
        [torch.randint(0, max(size, 1), (n,), generator=random) for size in shape[:k]]
    )


def coo(indices: Any, values: Tensor, shape: Sequence[int], claims: bool = False) -> Tensor:
    """A sparse tensor that nobody has looked at."""
    indices = torch.as_tensor(indices)
    return torch.sparse_coo_tensor(
        indices, values, tuple(shape), check_invariants=False, is_coalesced=claims
    )


def random_gradient(
    shape: Sequence[int], k: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """n values at random indices, with repetitions."""
    random = torch.Generator().manual_seed(seed)
    indices = indices_in(shape, k, n, random)
    return coo(indices, torch.randn(n, *shape[k:], generator=random, dtype=dtype), shape)


def raw(t: Tensor) -> Tensor:
    """A tensor's bytes, element after element."""
    return t.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def assert_bits(got: Tensor, want: Tensor, what: str) -> None:
    assert (got.shape, got.dtype) == (want.shape, want.dtype), what
    assert torch.equal(raw(got), raw(want)), f"{what}: {got} is not {want}"


# Against torch.


@pytest.mark.parametrize(("shape", "k"), SHAPES, ids=str)
@pytest.mark.parametrize("algorithm", SPARSE)
def test_twenty_steps_as_in_torch(algorithm, shape, k):
    ends = []
    for library in (onepass, torch.optim):
        torch.manual_seed(0)
        p, q = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape))
        opt = make(algorithm, [p, q], library)
        for step in range(20):
            # Now and then none, or no gradient at all.
            p.grad = random_gradient(shape, k, step % 5 * 6, step)
            q.grad = None if step % 3 == 1 else random_gradient(shape, k, 10, 100 + step)
            quietly(opt.step) if library is torch.optim else opt.step()
        ends.append((opt, [p.detach(), q.detach()]))
    (ours, mine), (theirs, yours) = ends
    torch.testing.assert_close(mine, yours, **CLOSE)
    states = (ours.state_dict()["state"], theirs.state_dict()["state"])
    assert_same_state(*states)


def assert_same_state(mine: dict, yours: dict) -> None:
    """Equal entries of equal kinds; torch's buffers may be sparse, where ours are dense."""
    assert set(mine) == set(yours)
    for key, entries in yours.items():
        assert set(mine[key]) == set(entries)
        for name, value in entries.items():
            assert type(mine[key][name]) is type(value), name
            if isinstance(value, Tensor):
                value = value.to_dense() if value.is_sparse else value
                torch.testing.assert_close(mine[key][name], value, **CLOSE)
            else:
                assert mine[key][name] == value


@pytest.mark.parametrize("algorithm", ["sgd", "momentum", "adagrad"])
def test_sparse_and_dense_steps_by_turns(algorithm):
    """What torch's momentum cannot do, a sparse gradient after a dense one, is the dense step that
    it stands for."""
    ends = []
    for library in (onepass, torch.optim):
        torch.manual_seed(0)
        p, q = nn.Parameter(torch.randn(10, 4)), nn.Parameter(torch.randn(3))
        opt = make(algorithm, [p, q], library)
        for step in range(12):
            g = random_gradient((10, 4), 1, 6, step)
            dense = step % 4 < 2 or (library is torch.optim and algorithm == "momentum")
            p.grad, q.grad = g.to_dense() if dense else g, torch.ones(3)
            quietly(opt.step) if library is torch.optim else opt.step()
        ends.append([p.detach(), q.detach()])
    torch.testing.assert_close(*ends, **CLOSE)


def test_embeddings_are_trained_as_in_torch():
    ends = []
    for library in (onepass, torch.optim):
        torch.manual_seed(0)
        model = nn.ModuleDict(
            {"a": nn.Embedding(50, 8, sparse=True), "b": nn.EmbeddingBag(20, 8, sparse=True)}
        )
        opt = library.SparseAdam(list(model.parameters()), lr=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(opt, 3)
        for _ in range(8):
            words, bags = torch.randint(0, 50, (4, 5)), torch.randint(0, 20, (4, 3))
            loss = (model["a"](words).sum(1) * model["b"](bags)).square().mean()
            opt.zero_grad()
            loss.backward()
            opt.step()
            schedule.step()
        ends.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*ends, **CLOSE)


def test_gradients_that_are_zeroed_in_place():
    """As in torch: they stay sparse, without values, and such a step counts."""
    ends = []
    for library in (onepass, torch.optim):
        torch.manual_seed(0)
        embedding = nn.Embedding(10, 4, sparse=True)
        opt = library.SparseAdam(embedding.parameters(), lr=0.1)
        for step in range(6):
            opt.zero_grad(set_to_none=False)
            if step % 2 == 0:
                embedding(torch.tensor([1, 2, 1])).square().sum().backward()
            opt.step()
            assert embedding.weight.grad.is_sparse
        ends.append((embedding.weight.detach(), opt.state[embedding.weight]["step"]))
    torch.testing.assert_close(ends[0][0], ends[1][0], **CLOSE)
    assert ends[0][1] == ends[1][1] == 6


def test_complex_parameters_step_as_pairs_of_real_ones():
    for algorithm, options in (("sgd", {}), ("adagrad", {"initial_accumulator_value": 0.0})):
        g = random_gradient((6, 3), 1, 5, dtype=torch.complex64)
        start = torch.randn(6, 3, dtype=torch.complex64)
        p, pairs = nn.Parameter(start.clone()), nn.Parameter(torch.view_as_real(start.clone()))
        a, b = make(algorithm, [p], **options), make(algorithm, [pairs], **options)
        for _ in range(3):
            p.grad = g
            pairs.grad = coo(g._indices(), torch.view_as_real(g._values()), (6, 3, 2))
            a.step()
            b.step()
        assert_bits(torch.view_as_real(p.detach()), pairs, algorithm)


# Rows step as dense gradients do, bit for bit, and nothing else changes.

FORMATS = {
    "float32": (torch.float32, torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64, torch.float64),
    "float16": (torch.float16, torch.float16, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "bfloat16, moments in float32": (torch.bfloat16, torch.bfloat16, torch.float32),
    "bfloat16, gradients in float32": (torch.bfloat16, torch.float32, torch.bfloat16),
    "float32, gradients in float64": (torch.float32, torch.float64, torch.float32),
}
LAYOUTS = {
    "contiguous": lambda t: t.clone(),
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "reversed": lambda t: (
        t.permute(*range(t.dim())[::-1]).contiguous().permute(*range(t.dim())[::-1])
    ),
    "with holes": lambda t: torch.stack([t, t], -1)[..., 0],
    "in a wider table": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "offset": lambda t: torch.cat([t.new_zeros(3), t.reshape(-1)])[3:].view(t.shape),
}
# Values that arithmetic does not leave alone.
SPECIAL = torch.tensor([float("nan"), -0.0, float("inf"), 1e-42])


def dense_class(algorithm: str) -> type:
    """The same rule, for dense gradients."""
    return type("Dense", (getattr(onepass, SPARSE[algorithm][0]),), {"gradients": "dense"})


def fresh_state(
    algorithm: str, p: Tensor, dtype: torch.dtype, random: torch.Generator
) -> dict[str, Any]:
    """State as after seven steps, with special values."""
    names = {"sparse_adam": ("exp_avg", "exp_avg_sq"), "sgd": (), "adagrad": ("sum",)}[algorithm]
    state: dict[str, Any] = {}
    for name in names:
        state[name] = torch.rand(p.shape, generator=random).to(dtype)
        state[name].view(-1)[:4] = SPECIAL.to(dtype)
    if names:
        state["step"] = 7 if algorithm == "sparse_adam" else torch.tensor(7.0)
    return state


def check_against_dense(
    algorithm: str, layout: str, g: Tensor, dtypes: Sequence[torch.dtype]
) -> None:
    """One step on a sparse gradient, and the dense rule on the rows that it has; all bits
    compared."""
    random = torch.Generator().manual_seed(1)
    p_dtype, g_dtype, s_dtype = dtypes
    start = torch.randn(g.shape, generator=random)
    start.view(-1)[:4] = SPECIAL
    p = nn.Parameter(LAYOUTS[layout](start.to(p_dtype)))
    p.grad_dtype = g_dtype
    p.grad = g = g.to(g_dtype)
    opt = make(algorithm, [p])
    state = fresh_state(algorithm, p, s_dtype, random)
    opt.state[p] = {
        n: LAYOUTS[layout](s) if isinstance(s, Tensor) and s.dim() else s for n, s in state.items()
    }
    whole = g.coalesce()
    at = tuple(whole._indices())
    before = {"p": p.detach().clone(), **{n: s.clone() for n, s in state.items() if n != "step"}}

    q = nn.Parameter(before["p"][at].clone())
    q.grad_dtype = g_dtype
    q.grad = whole._values().clone()
    dense = dense_class(algorithm)([q], **SPARSE[algorithm][1])
    dense.state[q] = {
        n: s[at].clone() if n != "step" else torch.tensor(7.0) for n, s in state.items()
    }
    opt.step()
    dense.step()

    after = {"p": p.detach(), **{n: s for n, s in opt.state[p].items() if n != "step"}}
    stepped = {"p": q.detach(), **{n: s for n, s in dense.state[q].items() if n != "step"}}
    for name, want in before.items():
        want[at] = stepped[name]
        assert_bits(after[name], want, f"{algorithm}, {layout}: {name}")
    if state:
        assert float(opt.state[p]["step"]) == 8


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("algorithm", BY_ROWS)
def test_rows_step_as_dense_ones_and_nothing_else_changes(algorithm, formats):
    for shape, k in SHAPES:
        check_against_dense(
            algorithm, "contiguous", random_gradient(shape, k, 12), FORMATS[formats]
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("algorithm", BY_ROWS)
def test_parameters_in_any_order_of_memory(algorithm, layout):
    for shape, k in (((30, 16), 1), ((6, 5, 12), 2), ((6, 5, 12), 1), ((7, 6), 2), ((7, 6), 1)):
        check_against_dense(algorithm, layout, random_gradient(shape, k, 12), FORMATS["float32"])


@pytest.mark.parametrize("algorithm", BY_ROWS)
def test_one_wide_row_and_many_narrow_ones(algorithm):
    """A row longer than what a thread takes at a time; more rows than one unit of work has."""
    for shape, n in (((3, 70_000), 2), ((5_000, 7), 4_000), ((1, 2_000), 3), ((9, 1), 20)):
        check_against_dense(
            algorithm, "contiguous", random_gradient(shape, 1, n), FORMATS["float32"]
        )


def test_a_sum_over_repeated_indices_comes_first():
    """The rule is not linear: what belongs to one row is added up before it steps, once."""
    p = nn.Parameter(torch.zeros(4, 2))
    p.grad = coo([[3, 1, 3, 3]], torch.tensor([[1.0, 1], [2, 2], [3, 3], [-4, 5]]), (4, 2))
    onepass.Adagrad([p], lr=1.0).step()
    torch.testing.assert_close(p.detach(), torch.tensor([[0.0, 0], [-1, -1], [0, 0], [0, -1]]))


@pytest.mark.parametrize("algorithm", BY_ROWS)
@pytest.mark.parametrize("eager", [False, True], ids=["kernel", "eager"])
def test_gradients_that_wrongly_claim_to_be_coalesced(algorithm, eager):
    ends = []
    for claims in (False, True):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(5, 3, 9))
        p.grad = coo([[4, 1, 4, 0, 1], [2, 0, 2, 1, 0]], torch.randn(5, 9), (5, 3, 9), claims)
        make(algorithm, [p], eager=eager).step()
        ends.append(p)
    assert_bits(*ends, "claims")


@pytest.mark.parametrize("algorithm", BY_ROWS)
def test_threads_do_not_matter(algorithm):
    ends = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(3_000, 40)), nn.Parameter(torch.randn(40, 3_000))]
        opt = make(algorithm, params)
        for step in range(2):
            for p in params:
                p.grad = random_gradient(p.shape, 1, 2_000 if len(p) == 3_000 else 30, step)
            opt.step()
        ends.append(params)
    for params in ends[1:]:
        for p, q in zip(params, ends[0], strict=True):
            assert_bits(p, q, "threads")


@pytest.mark.parametrize("algorithm", BY_ROWS)
def test_the_eager_backend_agrees(algorithm):
    ends = []
    for eager in (False, True):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape)) for shape, _ in SHAPES]
        params.append(nn.Parameter(torch.randn(6, 9).t()))
        opt = make(algorithm, params, eager=eager)
        for step in range(4):
            for p, k in zip(params, [*(k for _, k in SHAPES), 1], strict=True):
                p.grad = random_gradient(p.shape, k, step * 3, step)
            opt.step()
        assert bool(opt._onepass.plan.eager) == eager
        ends.append(opt)
    ours, theirs = ends
    torch.testing.assert_close(
        ours.param_groups[0]["params"], theirs.param_groups[0]["params"], **CLOSE
    )
    assert_same_state(ours.state_dict()["state"], theirs.state_dict()["state"])


# Odd shapes.


@pytest.mark.parametrize("eager", [False, True], ids=["kernel", "eager"])
@pytest.mark.parametrize("algorithm", BY_ROWS)
def test_odd_shapes(algorithm, eager):
    """No rows, rows of no elements, no dimensions at all, no sparse ones, no dense ones, and no
    values."""
    for shape, k, n in (
        ((0, 4), 1, 0),
        ((3, 0), 1, 2),
        ((), 0, 1),
        ((4, 3), 0, 1),
        ((4, 3), 2, 9),
        ((4, 3), 1, 0),
    ):
        ends = []
        for library in (onepass, torch.optim):
            torch.manual_seed(0)
            p = nn.Parameter(torch.randn(shape))
            opt = make(algorithm, [p], library, eager=eager and library is onepass)
            for _ in range(2):
                indices = indices_in(shape, k, n) if k else torch.empty(0, n, dtype=torch.int64)
                g = coo(indices, torch.randn(n, *shape[k:]), shape)
                # torch's own steps do not know tensors without sparse dimensions.
                p.grad = g.to_dense().to_sparse() if library is torch.optim and not k else g
                quietly(opt.step)
            ends.append((p.detach(), float(opt.state[p].get("step", 2))))
        torch.testing.assert_close(ends[0][0], ends[1][0], **CLOSE)
        assert ends[0][1] == ends[1][1] == 2


# Costs: one launch for all, laid out again only where the number of rows changes much.


def test_all_parameters_of_all_groups_step_in_one_launch(monkeypatch):
    launches = []
    run = Launch.run
    monkeypatch.setattr(
        Launch, "run", lambda self, threads: (launches.append(self), run(self, threads))
    )
    tables = [nn.Parameter(torch.zeros(10, width)) for width in (4, 4, 8, 300)]
    groups = [
        {"params": tables[:2], "lr": 1.0},
        {"params": tables[2:3], "lr": 2.0},
        {"params": tables[3:], "lr": 3.0},
    ]
    opt = onepass.SGD(groups)
    for i, p in enumerate(tables):
        p.grad = coo([[i, 9]], torch.ones(2, p.shape[1]), p.shape)
    opt.step()
    assert len(launches) == 1
    for i, (p, lr) in enumerate(zip(tables, (1, 1, 2, 3), strict=True)):
        want = torch.zeros(10, 1)
        want[[i, 9]] = -lr
        assert torch.equal(p.detach(), want.expand(p.shape))


def test_launches_serve_steps_with_more_or_fewer_rows(monkeypatch):
    prepared = []
    prepare = Kernel.prepare
    monkeypatch.setattr(
        Kernel, "prepare", lambda self, *a: (prepared.append(a), prepare(self, *a))[1]
    )
    p, q = (nn.Parameter(torch.zeros(1_000, 8)) for _ in range(2))
    opts = onepass.SGD([p], lr=1.0), torch.optim.SGD([q], lr=1.0)
    for step in range(20):
        p.grad = q.grad = random_gradient((1_000, 8), 1, 200, step)
        for opt in opts:
            opt.step()
        torch.testing.assert_close(p, q, **CLOSE)
    assert len(prepared) == 1
    p.grad = random_gradient((1_000, 8), 1, 900)
    opts[0].step()
    assert len(prepared) == 2


def test_nothing_of_the_tables_size_is_allocated():
    p = nn.Parameter(torch.zeros(20_000, 64))
    opt = onepass.SparseAdam([p])
    p.grad = random_gradient(p.shape, 1, 10)
    opt.step()
    with torch.profiler.profile(profile_memory=True) as profile:
        opt.step()
    assert sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages()) < 1 << 20


# What autograd and the user see.


@pytest.mark.parametrize("eager", [False, True], ids=["kernel", "eager"])
@pytest.mark.parametrize("algorithm", [*BY_ROWS, "momentum"])
def test_gradients_stay_and_versions_count(algorithm, eager):
    p = nn.Parameter(torch.randn(6, 9))
    indices, values = torch.tensor([[4, 1, 4]]), torch.randn(3, 9)
    kept = values.clone()
    p.grad = g = coo(indices, values, (6, 9))
    opt = make(algorithm, [p], eager=eager)
    opt.step()
    columns = [p, *(s for s in opt.state[p].values() if isinstance(s, Tensor))]
    versions = [t._version for t in columns]
    opt.step()
    assert all(t._version > version for t, version in zip(columns, versions, strict=True))
    assert p.grad is g
    assert not g.is_coalesced()
    assert torch.equal(values, kept)
    assert g._values().data_ptr() == values.data_ptr()


def test_autograd_notices_a_step_between_forward_and_backward():
    p = nn.Parameter(torch.randn(6, 9))
    opt = onepass.SparseAdam([p])
    p.grad = random_gradient((6, 9), 1, 3)
    opt.step()
    loss = p.square().sum()
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_scaling_is_left_to_the_step():
    ends = []
    for scale in (None, 8.0):
        p = nn.Parameter(torch.ones(5, 9))
        opt = onepass.SGD([p], lr=0.5, fused=True)
        p.grad = coo([[1, 3]], torch.full((2, 9), 2.0 * (scale or 1)), (5, 9))
        if scale:
            opt.grad_scale, opt.found_inf = torch.tensor(scale), torch.tensor(0.0)
        opt.step()
        if scale:
            opt.found_inf = torch.tensor(1.0)
            opt.step()
        ends.append(p)
    assert_bits(*ends, "scaled")


def test_grad_scaler_unscales_sparse_gradients():
    p = nn.Parameter(torch.ones(5, 9))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    opt = onepass.SparseAdam([p], lr=0.5)
    scaler.scale(torch.nn.functional.embedding(torch.tensor([2]), p, sparse=True).sum()).backward()
    scaler.step(opt)
    torch.testing.assert_close(p[2].detach(), torch.full((9,), 0.5))
    torch.testing.assert_close(opt.state[p]["exp_avg"][2], torch.full((9,), 0.1))


@pytest.mark.parametrize("algorithm", ["sgd", "adagrad"])
def test_differentiating_through_a_sparse_step(algorithm):
    start = torch.randn(5, 3, requires_grad=True)
    opt = make(algorithm, [p := start.clone()], differentiable=True)
    p.retain_grad()
    p.grad = coo([[1, 3, 1]], torch.ones(3, 3), (5, 3))
    opt.step()
    p.grad = None
    p.sum().backward(inputs=[start])
    torch.testing.assert_close(start.grad, torch.ones(5, 3))


# State dicts, copies.


@pytest.mark.parametrize("algorithm", ["sparse_adam", "adagrad", "momentum"])
@pytest.mark.parametrize(
    "order", [(onepass, torch.optim), (torch.optim, onepass)], ids=["to torch", "from torch"]
)
def test_checkpoints_cross_over_in_the_middle_of_a_run(algorithm, order):
    def steps(opt: Any, p: Tensor, seeds: range) -> None:
        for seed in seeds:
            g = random_gradient((10, 4), 1, 6, seed)
            # torch adds no dense buffer to a sparse gradient, but a dense gradient to either.
            p.grad = g
            quietly(opt.step)

    first, second = order
    p, straight = nn.Parameter(torch.ones(10, 4)), nn.Parameter(torch.ones(10, 4))
    opt = make(algorithm, [p], first)
    steps(opt, p, range(5))
    then = make(algorithm, [p], second)
    then.load_state_dict(opt.state_dict())
    steps(then, p, range(5, 10))
    steps(make(algorithm, [straight], torch.optim), straight, range(10))
    torch.testing.assert_close(p.detach(), straight.detach(), **CLOSE)
    if algorithm == "sparse_adam":
        assert type(then.state[p]["step"]) is int
        assert then.state[p]["step"] == 10


@pytest.mark.parametrize("algorithm", [*BY_ROWS, "momentum"])
def test_copies_and_pickles_go_on_as_the_original_does(algorithm):
    p = nn.Parameter(torch.ones(10, 4))
    opt = make(algorithm, [p])
    p.grad = random_gradient((10, 4), 1, 6)
    opt.step()
    buffer = io.BytesIO()
    torch.save(opt, buffer)
    buffer.seek(0)
    ends = []
    for other in (copy.deepcopy(opt), torch.load(buffer, weights_only=False), opt):
        (q,) = other.param_groups[0]["params"]
        q.grad = random_gradient((10, 4), 1, 6, 1)
        other.step()
        ends.append(q)
    assert_bits(ends[0], ends[2], "a copy")
    assert_bits(ends[1], ends[2], "a pickle")


def test_files_keep_counts_and_moments(tmp_path):
    p = nn.Parameter(torch.ones(10, 4))
    opt = make("sparse_adam", [p])
    p.grad = random_gradient((10, 4), 1, 6)
    opt.step()
    checkpoint.save(tmp_path / "x", {"optimizer": opt.state_dict()})
    q = nn.Parameter(p.detach().clone())
    other = make("sparse_adam", [q])
    other.load_state_dict(checkpoint.load(tmp_path / "x")["optimizer"])
    for one, param in ((opt, p), (other, q)):
        param.grad = random_gradient((10, 4), 1, 6, 1)
        one.step()
    assert_bits(q, p, "loaded")
    assert opt.state[p]["step"] == other.state[q]["step"] == 2


def test_a_group_that_is_added_later():
    p, q = nn.Parameter(torch.ones(4, 8)), nn.Parameter(torch.ones(4, 8))
    opt = onepass.SparseAdam([p], lr=0.5)
    p.grad = coo([[1]], torch.ones(1, 8), (4, 8))
    opt.step()
    opt.add_param_group({"params": [q], "lr": 0.25})
    q.grad = coo([[2]], torch.ones(1, 8), (4, 8))
    opt.step()
    assert (opt.state[p]["step"], opt.state[q]["step"]) == (2, 1)
    torch.testing.assert_close(q[:, 0].detach(), torch.tensor([1.0, 1.0, 0.75, 1.0]))


def test_make_state_makes_the_state_of_torch():
    p = nn.Parameter(torch.ones(4, 8))
    opt = onepass.SparseAdam([p])
    opt.make_state(opt.param_groups[0])
    assert opt.state[p]["step"] == 0
    assert type(opt.state[p]["step"]) is int
    assert set(opt.state[p]) == {"step", "exp_avg", "exp_avg_sq"}


# Who takes sparse gradients, and what the others say.

REFUSING = [
    name
    for name in torch.optim.__all__
    if hasattr(getattr(onepass, name, None), "rule") and getattr(onepass, name).gradients == "dense"
]


@pytest.mark.parametrize("eager", [False, True], ids=["kernel", "eager"])
@pytest.mark.parametrize("name", REFUSING)
def test_other_classes_say_what_to_use(name, eager):
    p, q = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3))
    opt = getattr(onepass, name)([p, q])
    for group in opt.param_groups:
        group.update(EAGER if eager else {})
    p.grad, q.grad = torch.ones(4, 3), random_gradient((4, 3), 1, 2)
    refuses(
        opt,
        rf"{name} does not support sparse gradients, .*SparseAdam.* SGD or Adagrad \(parameter 1\)",
    )
    assert not opt.state
    q.grad = torch.ones(4, 3)
    opt.step()
    q.grad = random_gradient((4, 3), 1, 2)
    refuses(opt, "does not support sparse gradients")


@pytest.mark.parametrize("eager", [False, True], ids=["kernel", "eager"])
def test_sparse_adam_refuses_dense_gradients(eager):
    p = nn.Parameter(torch.ones(4, 3))
    opt = make("sparse_adam", [p], eager=eager)
    p.grad = torch.ones(4, 3)
    words = (
        "SparseAdam does not support dense gradients, please consider Adam "
        "instead.*sparse=True.*parameter 0"
    )
    refuses(opt, words)
    p.grad = random_gradient((4, 3), 1, 2)
    opt.step()
    p.grad = torch.ones(4, 3)
    refuses(opt, words)


@pytest.mark.parametrize("algorithm", ["sgd", "momentum", "adagrad"])
@pytest.mark.parametrize("eager", [False, True], ids=["kernel", "eager"])
def test_weight_decay_and_sparse_gradients_exclude_each_other(algorithm, eager):
    p = nn.Parameter(torch.ones(4, 3))
    opt = make(algorithm, [p], eager=eager)
    p.grad = random_gradient((4, 3), 1, 2)
    opt.step()
    opt.param_groups[0]["weight_decay"] = 0.1
    refuses(
        opt, "weight_decay option is not compatible with sparse gradients, got 0.1; set it to 0"
    )
    p.grad = torch.ones(4, 3)
    opt.step()
    opt.param_groups[0]["weight_decay"] = torch.tensor(0.0)
    p.grad = random_gradient((4, 3), 1, 2)
    opt.step()


def test_constructors_refuse_what_torchs_do():
    dense = nn.Parameter(torch.ones(4, 3))
    for library in (onepass, torch.optim):
        for p, word in (
            (torch.eye(3).to_sparse().requires_grad_(), "parse"),
            (dense.cfloat().detach(), "omplex"),
        ):
            with pytest.raises(ValueError, match=word):
                library.SparseAdam([dense, p.requires_grad_()])
    opt = onepass.SparseAdam([dense])
    with pytest.raises(
        ValueError,
        match=r"SparseAdam requires dense parameter tensors, and one of shape \(3, 3\) is sparse",
    ):
        opt.add_param_group({"params": [torch.eye(3).to_sparse().requires_grad_()]})
    assert len(opt.param_groups) == 1
    for bad in ({"lr": 0.0}, {"eps": 0.0}):
        with pytest.raises(ValueError, match=r"Invalid .*: 0\.0; .* must lie in \(0, inf\]"):
            onepass.SparseAdam([dense], **bad)


def test_compressed_gradients_are_to_be_converted():
    """torch assigns none to a dense parameter; on the way through a sparse one it does."""
    for cls in (onepass.SGD, onepass.Adagrad, onepass.SparseAdam):
        p = nn.Parameter(torch.ones(4, 3))
        opt = cls([p], lr=0.1)
        csr = nn.Parameter(quietly(torch.eye(4, 3).to_sparse_csr))
        csr.grad = csr.detach().clone()
        opt.param_groups[0]["params"][0] = csr
        with pytest.raises(
            RuntimeError, match=r"layout torch.sparse_csr; convert it with .to_sparse_coo\(\)"
        ):
            opt.step()
    opt = onepass.AdamW([p])
    opt.param_groups[0]["params"][0] = csr
    with pytest.raises(RuntimeError, match="AdamW does not support sparse gradients"):
        opt.step()


def test_sparse_parameters_are_refused():
    p = torch.eye(3).to_sparse().requires_grad_()
    opt = onepass.SGD([p], lr=0.1)
    p.grad = torch.eye(3).to_sparse()
    refuses(opt, "parameter 0 has the layout torch.sparse_coo; make it dense")


class Signs(onepass.Optimizer):
    """A user's rule, which takes sparse gradients by one line."""

    gradients = "any"

    def __init__(self, params, lr=1.0):
        super().__init__(params, {"lr": lr})

    @staticmethod
    def rule(p, g, seen, *, lr):
        return {"p": p - lr * onepass.sign(g), "seen": seen + 1}


def test_a_users_rule_opts_in_by_one_line():
    p = nn.Parameter(torch.zeros(4, 8))
    opt = Signs([p])
    p.grad = coo([[1, 2, 1]], torch.ones(3, 8), (4, 8))
    opt.step()
    opt.step()
    assert p[:, 0].tolist() == [0, -2, -2, 0]
    assert opt.state[p]["seen"][:, 0].tolist() == [0, 2, 2, 0]
    p.grad = p.grad.to_dense()
    opt.step()
    assert opt.state[p]["seen"][:, 0].tolist() == [1, 3, 3, 1]


class Normed(Signs):
    """One that sees the whole tensor."""

    @staticmethod
    def rule(p, g, *, lr):
        return {"p": p - lr * g / onepass.norm(g)}


class Filled(Normed):
    """And asks for it."""

    def steps_rows(self, group):
        return False


@pytest.mark.parametrize("eager", [False, True], ids=["kernel", "eager"])
def test_a_rule_that_sees_the_whole_tensor_steps_on_filled_gradients(eager):
    for cls in (Normed, Filled):
        p = nn.Parameter(torch.zeros(4, 2))
        opt = cls([p])
        for group in opt.param_groups:
            group.update(EAGER if eager else {})
        p.grad = coo([[1, 2]], torch.tensor([[3.0, 0.0], [0.0, 4.0]]), (4, 2))
        if cls is Normed:
            with pytest.raises(
                onepass.RuleError, match="cannot step only the rows of a sparse gradient"
            ):
                opt.step()
            assert not p.any()
        else:
            opt.step()
            torch.testing.assert_close(
                p.detach(), torch.tensor([[0, 0], [-0.6, 0], [0, -0.8], [0, 0]])
            )


# Memory that is shared, gone, or not what it seems.


@pytest.mark.parametrize("algorithm", BY_ROWS)
def test_values_in_the_parameters_own_memory(algorithm):
    """Rows that are read as gradients are written as others' parameters."""
    ends = []
    for shares in (True, False):
        memory = torch.linspace(-1, 1, 12 * 9).view(12, 9)
        p = nn.Parameter(memory[:8])
        values = memory[2:6] if shares else memory[2:6].clone()
        p.grad = coo([[3, 4, 5, 6]], values, (8, 9))
        make(algorithm, [p]).step()
        ends.append(p)
    assert_bits(*ends, "shared")


def test_parameters_that_share_rows_step_one_after_the_other():
    memory = torch.zeros(10, 9)
    params = [nn.Parameter(memory[:6]), nn.Parameter(memory[4:])]
    opt = onepass.SGD(params, lr=1.0)
    for p in params:
        p.grad = coo([list(range(6))], torch.ones(6, 9), (6, 9))
    opt.step()
    assert memory[:, 3].tolist() == [-1] * 4 + [-2] * 2 + [-1] * 4
    turned = [nn.Parameter(memory.t()), nn.Parameter(memory.t())]
    opt = onepass.SGD(turned, lr=1.0)
    for p in turned:
        p.grad = coo([[0, 3]], torch.ones(2, 10), (9, 10))
    memory.zero_()
    opt.step()
    assert memory.sum(0).tolist() == [-20, 0, 0, -20, 0, 0, 0, 0, 0]


@pytest.mark.filterwarnings("ignore:.*parameters share memory", "ignore:Sparse invariant checks")
@pytest.mark.parametrize("first", ["rows", "whole"])
@pytest.mark.parametrize("algorithm", ["SGD", "Adagrad"])
def test_rows_of_memory_that_another_parameter_steps_whole(algorithm, first):
    """Neither takes back what the other has done, in whatever order they and a third one are
    computed."""
    ends = []
    for library in (onepass, torch.optim):
        memory = torch.linspace(-1, 1, 90, dtype=torch.float64).view(10, 9)
        by_rows, whole = nn.Parameter(memory[:6]), nn.Parameter(memory[4:])
        params = [
            nn.Parameter(torch.ones(3)),
            *([by_rows, whole] if first == "rows" else [whole, by_rows]),
        ]
        opt = getattr(library, algorithm)(params, lr=0.1)
        opt.param_groups[0].update(foreach=False, fused=False)
        for t in range(3):
            params[0].grad = torch.ones(3)
            by_rows.grad = random_gradient((6, 9), 1, 4, seed=t).double()
            whole.grad = torch.linspace(2, t, 54, dtype=torch.float64).view(6, 9)
            opt.step()
        ends.append(memory)
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-13)


def test_a_failing_step_leaves_no_trace():
    good, bad = nn.Parameter(torch.ones(5, 9)), nn.Parameter(torch.ones(5, 9))
    for opt in (
        onepass.SparseAdam([good, bad]),
        onepass.SGD([good, bad], lr=0.1),
        onepass.Adagrad([good, bad]),
    ):
        good.grad = random_gradient((5, 9), 1, 3)
        bad.grad = coo([[1, 5]], torch.ones(2, 9), (5, 9))
        had = bool(opt.state)
        refuses(
            opt,
            "gradient of parameter 1 has the index 5 in dimension 0, where the parameter's size is "
            "5",
        )
        assert bool(opt.state) == had
        bad.grad = random_gradient((5, 9), 1, 3)
        opt.step()
        bad.grad = coo([[1, -1]], torch.ones(2, 9), (5, 9))
        refuses(opt, "has the index -1 in dimension 0")
        bad.grad = None
        opt.step()


def test_frozen_parameters_may_be_in_any_condition():
    a, b = nn.Parameter(torch.ones(5, 9)), nn.Parameter(torch.ones(5, 9))
    opt = onepass.SparseAdam([a, b])
    a.grad, b.grad = random_gradient((5, 9), 1, 3), random_gradient((5, 9), 1, 3)
    opt.step()
    b.grad = None
    b.untyped_storage().resize_(0)
    opt.step()
    opt.step()
    assert (opt.state[a]["step"], opt.state[b]["step"]) == (3, 1)
    b.grad = random_gradient((5, 9), 1, 3)
    refuses(opt, "parameter 1 .*has no storage")


def test_inference_tensors_are_refused():
    with torch.inference_mode():
        p = torch.ones(5, 9)
    q = nn.Parameter(torch.ones(5, 9))
    opt = onepass.SGD([q, p], lr=0.1)
    p.requires_grad = False
    q.grad = random_gradient((5, 9), 1, 3)
    opt.step()
    with torch.inference_mode():
        opt.step()


def started(algorithm: str, eager: bool = False) -> tuple[Any, Tensor]:
    """An optimizer that has stepped, and its parameter with a sparse gradient."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(20, 9))
    opt = make(algorithm, [p], eager=eager)
    for step in range(2):
        p.grad = random_gradient((20, 9), 1, 8, step)
        opt.step()
    return opt, p


def each_start() -> list[tuple[Any, Tensor]]:
    return [
        started(algorithm, eager) for algorithm in (*BY_ROWS, "momentum") for eager in (False, True)
    ]


def crash_indices_out_of_range():
    far = 1 << 40
    cases = [
        ([[20]], 0),
        ([[far]], 0),
        ([[-1]], 0),
        ([[-far]], 0),
        ([[3, 1 << 62]], 0),
        ([[3, 4, 3, -20]], 0),
    ]
    for opt, p in each_start():
        for claims in (False, True):
            for indices, d in cases:
                p.grad = coo(indices, torch.ones(len(indices[0]), 9), (20, 9), claims)
                refuses(opt, f"index -?[0-9]+ in dimension {d}, where the parameter's size is 20")
        p.grad = coo([[3, 4], [8, 9]], torch.ones(2), (20, 9))
        refuses(opt, "index 9 in dimension 1, where the parameter's size is 9")
        # In one dimension too far, and by as much too near in the other: together they point into
        # the table.
        p.grad = coo([[3, 4], [-9, 8]], torch.ones(2), (20, 9))
        refuses(opt, "index -9 in dimension 1")
        p.grad = random_gradient((20, 9), 1, 8)
        opt.step()


def crash_indices_changed_in_place():
    """What was checked by torch when the gradient was made may have changed since."""
    for opt, p in each_start():
        indices = torch.tensor([[1, 2, 3]])
        p.grad = torch.sparse_coo_tensor(indices, torch.ones(3, 9), (20, 9), check_invariants=True)
        opt.step()
        indices[0, 1] = 1 << 50
        refuses(opt, "index")
        indices[0, 1] = 0
        opt.step()


def crash_gradient_parts_freed():
    for opt, p in each_start():
        for part in (Tensor._values, Tensor._indices):
            for size in (0, 8):
                p.grad = random_gradient((20, 9), 1, 8)
                part(p.grad).untyped_storage().resize_(size)
                refuses(opt, "gradient of parameter 0 has lost its storage")
        p.grad = random_gradient((20, 9), 1, 8)
        opt.step()


def crash_parameter_changed():
    """Resized, replaced, freed: with a gradient of the old shape, and of the new one."""
    for algorithm in (*BY_ROWS, "momentum"):
        for eager in (False, True):
            opt, p = started(algorithm, eager)
            p.data = torch.ones(4, 9)
            refuses(opt, "shape")
            p.grad = None
            p.grad = coo([[3]], torch.ones(1, 9), (4, 9))
            if algorithm == "sgd":
                opt.step()
            else:
                refuses(opt, "shape")
            opt, p = started(algorithm, eager)
            p.untyped_storage().resize_(40)
            refuses(opt, "storage")
            opt, p = started(algorithm, eager)
            p.data = torch.ones(20, 9)[:, 0:1].expand(20, 9)
            refuses(opt, "expanded")
            opt, p = started(algorithm, eager)
            p.grad = None
            p.data = torch.ones(9, 20).t()
            p.grad = random_gradient((20, 9), 1, 8)
            opt.step()
            p.data.untyped_storage().resize_(40)
            refuses(opt, "storage")


def crash_state_changed():
    """Swapped for what is smaller, of another type, freed, lazy, laid out otherwise, or gone."""
    for algorithm, name in (
        ("sparse_adam", "exp_avg"),
        ("adagrad", "sum"),
        ("momentum", "momentum_buffer"),
    ):
        for eager in (False, True):
            for wrong in (
                torch.ones(4, 9),
                torch.ones(20, 9, dtype=torch.int64),
                torch.eye(20, 9).to_sparse(),
                "text",
            ):
                opt, p = started(algorithm, eager)
                opt.state[p][name] = wrong
                refuses(opt, name)
            opt, p = started(algorithm, eager)
            opt.state[p][name].untyped_storage().resize_(0)
            refuses(opt, f"{name}.* has lost its storage")
            for other in (
                torch.ones(20, 9).double(),
                torch.ones(9, 20).t(),
                torch.ones(20, 18)[:, ::2],
            ):
                opt, p = started(algorithm, eager)
                opt.state[p][name] = other
                opt.step()
            opt, p = started(algorithm, eager)
            opt.state[p][name].data = torch.ones(2, 9)
            refuses(opt, name)
            opt, p = started(algorithm, eager)
            opt.state[p].clear()
            opt.step()
            opt, p = started(algorithm, eager)
            opt.state.clear()
            opt.step()
    for wrong in ("text", [1], torch.ones(2)):
        opt, p = started("sparse_adam")
        opt.state[p]["step"] = wrong
        refuses(opt, "'step' of parameter 0 must be one number")


def crash_gradient_of_another_kind():
    """From step to step: another type, another device, other sparse dimensions, dense, none."""
    for opt, p in each_start():
        p.grad = None
        opt.step()
        p.grad = coo([[3, 4], [8, 0]], torch.ones(2), (20, 9))
        opt.step()
        p.grad = coo(torch.empty(0, 2, dtype=torch.int64), torch.ones(2, 20, 9), (20, 9))
        opt.step()
        p.grad = None
        p.grad_dtype = None
        for other in (torch.float64, torch.bfloat16):
            p.grad = random_gradient((20, 9), 1, 8).to(other)
            opt.step()
        p.grad = random_gradient((20, 9), 1, 8).to(torch.complex64)
        refuses(opt, "parameter 0 is torch.float32 and its gradient torch.complex64")
        p.grad = coo([[3]], torch.ones(1, 1).expand(1, 9), (20, 9), True)
        opt.step()
        p.grad = coo([[3, 4, 5]], torch.ones(9, 3).t(), (20, 9), True)
        opt.step()


def crash_lazy_columns():
    """Conjugates and negations of the expected strides."""
    for algorithm in ("sgd", "adagrad"):
        p = nn.Parameter(torch.ones(5, 9, dtype=torch.complex64))
        opt = make(algorithm, [p])
        p.grad = random_gradient((5, 9), 1, 3, dtype=torch.complex64)
        opt.step()
        expected = p.detach().conj().clone()
        p.data = p.data.conj()
        with pytest.warns(UserWarning, match="lazily conjugated"):
            opt.step()
        assert not torch.equal(p.detach(), expected)


def crash_many_gradients_of_changing_size():
    """Launches are laid out for more rows than there are: what is beyond must not be anybody's
    memory."""
    tables = [nn.Parameter(torch.zeros(500, width)) for width in (1, 7, 64, 1500)]
    guards = [p.detach().clone() for p in tables]
    opt = onepass.SGD(tables, lr=1.0)
    random = torch.Generator().manual_seed(0)
    for _ in range(60):
        for p, guard in zip(tables, guards, strict=True):
            n = int(torch.randint(0, 40, (), generator=random))
            indices = torch.randperm(500, generator=random)[None, :n]
            p.grad = coo(indices, torch.ones(n, p.shape[1]), p.shape)
            guard[indices[0]] -= 1
        opt.step()
    for p, guard in zip(tables, guards, strict=True):
        assert torch.equal(p.detach(), guard)


def crash_lbfgs_with_indices_out_of_range():
    """It fills gradients up with zeros, which torch does without looking."""
    p = nn.Parameter(torch.ones(20, 9))
    opt = onepass.LBFGS([p])

    def closure():
        p.grad = coo([[1 << 40]], torch.ones(1, 9), (20, 9))
        return p.sum()

    with pytest.raises(RuntimeError, match="gradient of parameter 0 has the index"):
        opt.step(closure)
    assert bool((p == 1).all())


CASES = [name for name in globals() if name.startswith("crash_")]


@pytest.fixture(scope="module")
def known_fates():
    return fates(__file__, CASES)


@pytest.mark.parametrize("case", CASES)
def test_survives(case, known_fates):
    assert known_fates[case] == "ok", f"{case}: {known_fates[case]}"


def test_nothing_is_kept_alive():
    """Neither parameters nor gradients, by the plan or by a step that has failed."""
    opt, p = started("sparse_adam")
    kept = snapshot(opt)
    storage = p.grad._values().untyped_storage()._weak_ref()
    p.grad = None
    assert torch.UntypedStorage._expired(storage)
    torch.UntypedStorage._free_weak_ref(storage)
    assert kept[0] == snapshot(opt)[0]


class Moving(torch.Tensor):
    """A class whose own update gives another parameter other memory."""

    other: Any = None

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ == "copy_" and Moving.other is not None:
            moved, Moving.other = Moving.other, None
            moved.data = moved.data.clone()
        return super().__torch_function__(func, types, args, kwargs or {})


def test_memory_that_moves_while_others_step_is_noticed():
    """Rows are stepped after what torch's operations serve, which may be anybody's code."""
    table = torch.nn.Parameter(torch.ones(8, 4))
    strange = torch.ones(3).as_subclass(Moving).requires_grad_()
    opt = onepass.SGD([strange, table], lr=0.5)

    def set_gradients():
        strange.grad = torch.ones(3).as_subclass(Moving)
        table.grad = coo([[1, 3]], torch.ones(2, 4), (8, 4))

    set_gradients()
    with pytest.warns(UserWarning, match="Moving"):
        opt.step()
    old = table.data
    before = old.clone()
    set_gradients()
    Moving.other = table
    with pytest.raises(onepass.StepError, match="changed while others stepped"):
        opt.step()
    assert torch.equal(old, before)
