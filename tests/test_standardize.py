# Weight standardization of a list of weights, and of a model's layers together: values and gradients against float64,
# against the single form, on the compiled CPU kernels and on the emulated CUDA ones.
from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import in_layout
from conftest import or_skip
from ranks import Ranks
from test_family import EPS, C, half_ulp, unit
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import normkern
import normkern.functional as F
from normkern.backends import BACKENDS, run_on
from normkern.standardize import Standardizer, weight_standardize_all

RELU_GAIN = math.sqrt(2 * math.pi / (math.pi - 1))
# 1x1 and 7x7 kernels, one output channel, fan-ins of 1 and 4608, a linear layer, a 1-D one; lines that fill no access.
SHAPES = (
    (8, 4, 1, 1),
    (1, 3, 7, 7),
    (5, 1, 1, 1),
    (3, 512, 3, 3),
    (33, 70),
    (6, 5, 3),
    (2, 3, 2, 2, 2),
    (40, 64, 1, 1),
)


def weights_of(
    dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...] = SHAPES, layout: str = "contiguous"
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor]]:
    """Weights that are leaves, a gain for all but every third one, and dys."""
    g = torch.Generator().manual_seed(7)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=g, dtype=torch.float64)

    weights = [in_layout((normal(*s) * 0.3 + normal(s[0], *[1] * (len(s) - 1)) * 2).to(dtype), layout) for s in shapes]
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    gains = [None if i % 3 == 2 else (normal(s[0]) / 2 + 1).to(wide).requires_grad_() for i, s in enumerate(shapes)]
    dys = [in_layout(normal(*s).to(dtype), layout) for s in shapes]
    return [w.requires_grad_() for w in weights], gains, dys


def formula(weight: Tensor, gain: Tensor | None, scaled: bool) -> Tensor:
    dims = tuple(range(1, weight.dim()))
    var, mean = torch.var_mean(weight, dims, correction=0, keepdim=True)
    y = (weight - mean) / (var + EPS).sqrt() * (RELU_GAIN / math.sqrt(weight[0].numel()) if scaled else 1.0)
    return y if gain is None else y * gain.view(-1, *[1] * len(dims))


def gradients(ys: list[Tensor], leaves: list[Tensor], dys: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(ys, leaves, dys))


def present(gains: list[Tensor | None]) -> list[Tensor]:
    return [g for g in gains if g is not None]


def check(dtype: torch.dtype, scaled: bool, layout: str, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> None:
    weights, gains, dys = weights_of(dtype, shapes, layout)
    ys = weight_standardize_all(weights, gains, EPS, scaled=scaled)
    got = [*ys, *gradients(ys, [*weights, *present(gains)], dys)]
    wide = [w.detach().double().requires_grad_() for w in weights]
    wide_gains = [None if g is None else g.detach().double().requires_grad_() for g in gains]
    want_ys = [formula(w, g, scaled) for w, g in zip(wide, wide_gains, strict=True)]
    want = [*want_ys, *gradients(want_ys, [*wide, *present(wide_gains)], [dy.double() for dy in dys])]
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        like = (*weights, *weights, *present(gains))[i]
        assert g.dtype == like.dtype
        assert g.stride() == like.stride()
        # As in test_family: sums that cancel are as exact as their largest terms, those of a gain over a line.
        fan_in = math.prod(like.shape[1:]) if like.dim() > 1 else max(math.prod(s[1:]) for s in shapes)
        growth = 1.0 if like.dim() > 1 else math.sqrt(fan_in)
        if dtype is torch.float64:
            growth *= 8  # the reference rounds means of up to 8 standard deviations just so
        w, g = w.detach(), g.detach().double()
        allowed = C * unit(dtype) * growth * (w.abs() + w.abs().amax()) + half_ulp(w, like.dtype) * 1.001
        if math.prod(like.shape[1:]) == 1 and like.dim() > 1:  # one element is its own mean
            assert i >= len(ys) or (g == 0).all()
            allowed = torch.full_like(w, C * unit(dtype) / math.sqrt(EPS) * 6)  # of dy * gain / std, up to 6 / std
        assert ((g - w).abs() <= allowed).all(), f"result {i}: off by {(g - w).abs().max()}"


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_against_float64(scaled: bool, layout: str) -> None:
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        check(dtype, scaled, layout)


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """The calls of the native operators: which, and of how many tensors."""
    native: Any = BACKENDS["native"]
    calls: list[tuple[str, int]] = []
    for name in ("standardize", "standardize_backward"):
        run: Callable[..., Any] = getattr(native, name)

        def counted(*args: Any, run: Callable[..., Any] = run, name: str = name) -> Any:
            calls.append((name, len(args[0])))
            return run(*args)

        monkeypatch.setattr(native, name, counted)
    return calls


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_same_bits_as_one_by_one(threads: int, operators: list[tuple[str, int]]) -> None:
    """In one call of each operator, however lines fall to threads; results too large for the caches, too."""
    shapes = (*SHAPES, (300, 128, 3, 3), (512, 2048, 1, 1), (2048, 512, 1, 1), (512, 512, 3, 3))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for dtype, some in ((torch.float32, shapes), (torch.bfloat16, SHAPES)):
            weights, gains, dys = weights_of(dtype, some)
            leaves = [*weights, *present(gains)]
            ys = weight_standardize_all(weights, gains, EPS, scaled=True)
            found = gradients(ys, leaves, dys)
            assert operators == [("standardize", len(some)), ("standardize_backward", len(some))]
            operators.clear()
            alone = [F.weight_standardize(w, g, EPS, scaled=True) for w, g in zip(weights, gains, strict=True)]
            assert operators == []
            assert all(torch.equal(a, b) for a, b in zip(ys, alone, strict=True))
            again = gradients(alone, leaves, dys)
            if threads == 1:  # alone, a gain's gradient is added up from the threads' shares
                assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
            for a, b in zip(found, again, strict=True):
                torch.testing.assert_close(a, b)
    finally:
        torch.set_num_threads(before)


def test_one_call_for_a_dtype(operators: list[tuple[str, int]]) -> None:
    """Several dtypes, layouts that are no lines, lines too long, nothing in it: each goes where it can."""
    weights = [
        torch.randn(4, 3, 2, 2), torch.randn(3, 4, 2, 2).transpose(0, 1), torch.randn(2, 5).double(),
        torch.randn(2, 5).half(), torch.randn(2, 11000), torch.randn(0, 3, 1, 1), torch.randn(3, 0),
        torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last), torch.randn(2, 3, 4)[:, :, 1:3],
    ]  # fmt: skip
    ys = weight_standardize_all(weights)
    assert sorted(operators) == [("standardize", 1), ("standardize", 1), ("standardize", 2)]
    for y, w in zip(ys, weights, strict=True):
        assert torch.equal(y, F.weight_standardize(w))
        assert y.dtype == w.dtype
    assert weight_standardize_all([]) == []


@pytest.mark.parametrize("name", ["native", "eager"])
def test_derivatives(name: str) -> None:
    weights, gains, dys = weights_of(torch.float64, ((2, 3, 2, 1), (3, 4), (2, 2, 2)))
    leaves = [*weights, *present(gains)]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        it = iter(tensors[3:])
        return tuple(
            weight_standardize_all(tensors[:3], [None if g is None else next(it) for g in gains], EPS, scaled=True)
        )

    with normkern.use_backend(name):
        assert gradcheck(run, leaves)
        assert gradgradcheck(run, leaves, fast_mode=True)
        once, again = (torch.autograd.grad(run(*leaves), leaves, dys, create_graph=more) for more in (False, True))
    for a, b in zip(once, again, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_frozen_shared_and_unused(operators: list[tuple[str, int]]) -> None:
    weights, gains, dys = weights_of(torch.float32)
    weights[1].requires_grad_(False)
    assert gains[3] is not None
    weights[3].requires_grad_(False)
    gains[4].requires_grad_(False)  # type: ignore[union-attr]
    weights.append(weights[0])
    gains.append(None)
    dys.append(dys[0])
    ys = weight_standardize_all(weights, gains)
    used = [i for i in range(len(ys)) if i != 6 and ys[i].requires_grad]
    leaves = [t for t in (*weights[:-1], *present(gains)) if t.requires_grad]
    found = torch.autograd.grad([ys[i] for i in used], leaves, [dys[i] for i in used], allow_unused=True)
    alone = [F.weight_standardize(w, g) for w, g in zip(weights, gains, strict=True)]
    again = torch.autograd.grad([alone[i] for i in used], leaves, [dys[i] for i in used], allow_unused=True)
    for a, b in zip(found, again, strict=True):
        assert (a is None or not a.any()) if b is None else torch.equal(a, b)
    assert sum(name == "standardize_backward" for name, _ in operators) == 1


def test_saved_for_backward() -> None:
    """Nothing of a weight's size but the weights."""
    weights, gains, _ = weights_of(torch.float32, ((8, 64, 3, 3), (16, 32, 3, 3)))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        weight_standardize_all(weights, gains, scaled=True)
    assert {t.data_ptr() for t in saved if t.numel() > 100} == {w.data_ptr() for w in weights}


def test_transforms_and_compile() -> None:
    weights, gains, dys = weights_of(torch.float64, ((2, 3, 2, 1), (3, 4)))

    def total(*weights: Tensor) -> Tensor:
        ys = weight_standardize_all(weights, gains, EPS)
        return sum((y * dy).sum() for y, dy in zip(ys, dys, strict=True))  # type: ignore[return-value]

    plain = torch.autograd.grad(total(*weights), weights)
    for found in (
        torch.func.grad(total, (0, 1))(*weights),
        torch.autograd.grad(torch.compile(total, fullgraph=True, backend="aot_eager")(*weights), weights),
    ):
        for a, b in zip(found, plain, strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_errors() -> None:
    w = torch.randn(2, 3)
    for call, error, text in (
        (
            lambda: weight_standardize_all([w], [None, None]),
            ValueError,
            "gains must be as many as weights; got 2 and 1",
        ),
        (lambda: weight_standardize_all([w, w[0]]), RuntimeError, "weight_standardize_all: input must have at least 2"),
        (
            lambda: weight_standardize_all([w], [torch.ones(3)]),
            RuntimeError,
            r"gain must have shape \(2,\); got \(3,\)",
        ),
        (lambda: weight_standardize_all([w], eps=-1.0), ValueError, "eps must be at least 0"),
        (lambda: weight_standardize_all([w], variant="x"), ValueError, "variant must be one of"),
    ):
        with pytest.raises(error, match=text):
            call()
    # What would step out of a buffer is refused by the operators themselves.
    operator, none = torch.ops.normkern.standardize, torch.empty(0)
    for xs, gains in (([w.t()], [none]), ([w], [torch.ones(1)]), ([w, w.double()], [none, none]), ([w], [])):
        with pytest.raises(RuntimeError, match="normkern: "):
            operator(xs, gains, 1e-5, False)
    back, moments = torch.ops.normkern.standardize_backward, torch.zeros(2, dtype=torch.float64)
    for dy, mean, needs in ((w.t(), moments, 1), (w, moments[:1], 1), (w, moments, 2), (w, moments.float(), 1)):
        with pytest.raises(RuntimeError, match="normkern: "):
            back([dy], [w], [none], mean, moments, 1e-5, [needs])


# ---- layers


def network() -> nn.Module:
    shared = normkern.nn.ScaledWSConv2d(6, 6, 3, padding=1)
    return nn.Sequential(
        normkern.nn.ScaledWSConv2d(3, 6, 3), nn.ReLU(), shared, nn.ReLU(), shared, normkern.nn.WSConv2d(6, 6, 1),
        nn.ReLU(), normkern.nn.ScaledWSConv2d(6, 4, 1, variant="paper"), normkern.nn.WeightNormConv2d(4, 4, 1),
    )  # fmt: skip


def test_together(operators: list[tuple[str, int]]) -> None:
    """A model's layers give the same with one call for each setting of eps and scale; and as before, once removed."""
    model = network().double()
    model[5].gain = nn.Parameter(torch.rand(6, dtype=torch.float64))
    twin, x = copy.deepcopy(model), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    handle = normkern.nn.standardize_together(model)
    for mode in (True, False):
        y, want = model.train(mode)(x), twin.train(mode)(x)
        assert torch.equal(y, want)
        y.square().sum().backward()
        want.square().sum().backward()
    assert (
        operators
        == [("standardize", 2), ("standardize", 1), ("standardize_backward", 1), ("standardize_backward", 2)] * 2
    )
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert all(m._lent is None for m in model if isinstance(m, normkern.nn.WSConv2d))
    operators.clear()
    with pytest.raises(RuntimeError):
        model(x[:, :2])
    assert all(m._lent is None for m in model if isinstance(m, normkern.nn.WSConv2d))
    assert torch.equal(copy.deepcopy(model)(x), y)
    operators.clear()
    handle.remove()
    assert torch.equal(model(x), y)
    assert operators == []


def test_together_keeps_until_a_weight_changes(operators: list[tuple[str, int]]) -> None:
    model, x = network().eval(), torch.randn(2, 3, 9, 9)
    normkern.nn.standardize_together(model)
    with torch.no_grad():
        y = model(x)
        calls = len(operators)
        assert calls == 2
        assert torch.equal(model(x), y)
        assert len(operators) == calls
        model[0].weight.mul_(2).add_(torch.randn_like(model[0].weight))
        changed = model(x)
        assert operators[calls:] == [("standardize", 1)]
        assert not torch.equal(changed, y)
        assert torch.equal(changed, copy.deepcopy(model)(x))


# ---- the CUDA kernels


def emulated(**options: Any) -> Any:
    from emulator.standardize import EmulatedStandardizer

    return or_skip(EmulatedStandardizer, **options)


EMULATED_SHAPES = (
    (8, 4, 1, 1), (1, 3, 7, 7), (5, 1, 1, 1), (2, 512, 3, 3), (9, 70), (6, 5, 3), (6, 64, 1, 1), (3, 513), (2, 523),
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_emulated(dtype: torch.dtype) -> None:
    """Every access checked; lines of warps and of blocks, with 16-byte accesses and where a buffer is not aligned."""
    backend = emulated()
    assert isinstance(backend, Standardizer)
    with run_on(backend):
        for layout in ("contiguous", "channels_last") if dtype is torch.float32 else ("contiguous",):
            check(dtype, layout == "contiguous", layout, EMULATED_SHAPES)
        check(dtype, False, "offset", EMULATED_SHAPES[:3])


def test_emulated_schedules() -> None:
    """The same bits whatever the schedule; more tensors than one launch takes."""
    found = []
    for seed in range(4):
        backend = emulated(seed=seed, preempt_ppm=2000)
        shapes = (*EMULATED_SHAPES, *[(i % 3 + 1, i % 5 + 2) for i in range(backend.most - 4)])
        assert len(shapes) > backend.most
        weights, gains, dys = weights_of(torch.float32, shapes)
        with run_on(backend):
            ys = weight_standardize_all(weights, gains, EPS)
            found.append([*ys, *gradients(ys, [*weights, *present(gains)], dys)])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


# ---- weights in pieces, over two processes


def in_pieces(rank: int, shape: tuple[int, ...], dim: int | None, scaled: bool) -> list[tuple[Tensor, Tensor]]:
    """Pairs of what is made of DTensors, put together, and of plain tensors: y, dweight and dgain."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    (weight,), (gain,), (dy,) = weights_of(torch.float64, (shape,))
    assert gain is not None
    plain = [weight, gain]
    parts = [
        distribute_tensor(t.detach(), mesh, [Replicate() if d is None else Shard(d)]).requires_grad_()
        for t, d in zip(plain, (dim, 0 if dim == 0 else None), strict=True)
    ]
    want, found = (weight_standardize_all([w], [g], EPS, scaled=scaled)[0] for w, g in (plain, parts))
    wants = [want, *torch.autograd.grad(want, plain, dy)]
    founds = [found, *torch.autograd.grad(found, parts, distribute_tensor(dy, mesh, [Replicate()]))]
    return [(a.full_tensor().detach(), b.detach()) for a, b in zip(founds, wants, strict=True)]


@pytest.mark.parametrize("dim", [None, 0, 1, 2])
def test_weights_in_pieces(dim: int | None, ranks: Ranks) -> None:
    for shape, scaled in (((4, 6, 4, 3), False), ((3, 5, 4), True)):
        for pairs in ranks.run(in_pieces, shape, dim, scaled):
            for found, want in pairs:
                torch.testing.assert_close(found, want, rtol=1e-11, atol=1e-12)


def trained(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model.state_dict()


def convolutions() -> nn.Module:
    torch.manual_seed(4)
    block = nn.Sequential(normkern.nn.ScaledWSConv2d(4, 5, 3), nn.ReLU())
    return nn.Sequential(normkern.nn.WSConv2d(2, 4, 3, gain=True), nn.ReLU(), block, nn.Flatten()).double()


def under_fsdp(rank: int, together: bool) -> dict[str, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = convolutions(), init_device_mesh("cpu", (2,))
    fully_shard(model[2], mesh=mesh)
    fully_shard(model, mesh=mesh)
    if together:
        normkern.nn.standardize_together(model)
    return {name: t.full_tensor() for name, t in trained(model, images().chunk(2)[rank]).items()}


def images() -> Tensor:
    return torch.randn(4, 2, 7, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("together", [False, True])
def test_fully_sharded(together: bool, ranks: Ranks) -> None:
    want = trained(convolutions(), images())
    for found in ranks.run(under_fsdp, together):
        assert found.keys() == want.keys()
        for name, t in want.items():
            torch.testing.assert_close(found[name], t, rtol=1e-10, atol=1e-12)
