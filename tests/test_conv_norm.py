# conv_norm and preconditioner: the isometry they are for, the paper's own steps, gradients, and bad input.
from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paper_conv_norm as paper
import pytest
import torch
from torch import Tensor

import normkern
from normkern import spectral_product, spectrum
from normkern.backends import BACKENDS
from normkern.spectrum import Points, Torus

NATIVE = BACKENDS["native"].why_not(torch.empty(1)) is None
TRITON = importlib.util.find_spec("triton") is not None
WAYS = [*(["native", "fft", "product"] if NATIVE else []), "eager"]
WITH_TRITON = [*WAYS, *(["triton"] if TRITON else [])]  # the interpreter takes seconds where kernels take milliseconds
needs_native = pytest.mark.skipif(not NATIVE, reason="there are no compiled kernels")

# Kernel, torus, dilation, input channels of a group, output channels, stride.
ISOMETRIES = [
    *(((k, k), (k + 6, k + 5), (1, 1), 3, 4, (1, 1)) for k in range(1, 8)),
    *(((k, k), (2 * k - 2, k), (1, 1), 2, 3, (1, 1)) for k in range(2, 8)),  # lags wrap
    *(((k, k), (12, 8), (1, 1), 4, 2, (2, 2)) for k in range(2, 7)),
    *(((1, k), (9, 8), (1, 1), 2, 9, (1, 1)) for k in range(2, 5)),
    *(((k, 1), (8, 9), (1, 1), 2, 3, (1, 2)) for k in range(2, 5)),
    *(((k, 3), (10, 7), (1, 1), 5, 3, (3, 1)) for k in (2, 4, 5)),
    *(((3, 3), (11, 8), (d, 1), 3, 3, (1, 1)) for d in range(1, 4)),
    *(((2, 3), (9, 10), (2, d), 3, 3, (2, 3)) for d in range(1, 4)),
    ((3, 3), (5, 1), (1, 1), 3, 2, (1, 1)),  # a torus smaller than the kernel
    ((3, 3), (1, 1), (1, 1), 3, 2, (1, 1)),
    ((3, 3), (8, 8), (3, 3), 1, 6, (1, 1)),  # depth-wise
    ((3, 3), (8, 9), (1, 1), 1, 17, (2, 2)),  # more channels than lanes
]  # fmt: skip


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture
def one_thread() -> Any:
    """Tensors of a few elements: a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Any:
    """Who computes: the compiled kernels after the convolution, the compiled product between torch.fft's transforms,
    the convolution between spectra, Triton's kernels in its interpreter, plain PyTorch."""
    if request.param == "fft":
        monkeypatch.setattr(spectrum, "_MOST_POINTS_CPU", 0)
    monkeypatch.setattr(spectral_product, "pays", lambda *_: request.param == "product")
    with normkern.use_backend("native" if request.param in ("fft", "product") else request.param):
        yield request.param


every_way = pytest.mark.parametrize("way", WAYS, indirect=True)
with_triton = pytest.mark.parametrize("way", WITH_TRITON, indirect=True)


def in_every_way(rows: list[Any], for_triton: Callable[[int, Any], bool]) -> Any:
    """Ways times rows, some of them for Triton's interpreter too."""
    pairs = [(way, row) for way in WITH_TRITON for i, row in enumerate(rows) if way != "triton" or for_triton(i, row)]
    return pytest.mark.parametrize(("way", "row"), pairs, ids=str, indirect=["way"])


def test_table_of_isometries() -> None:
    assert len(ISOMETRIES) >= 30
    assert len(set(ISOMETRIES)) == len(ISOMETRIES)


@in_every_way(ISOMETRIES, lambda i, row: row[3] * row[1][0] * row[1][1] <= 24)
def test_rows_are_isometries(way: str, row: Any) -> None:
    """Q_k Q_k^T = I, with Q_k from the images of all unit vectors on the torus."""
    kernel, size, dilation, depth, out, stride = row
    weight = normal(out, depth, *kernel)
    taps = paper.wrapped(paper.dilated(weight, dilation), size)
    points = size[0] * size[1]
    shifts = [torch.roll(taps, (i, j), (2, 3)) for i in range(size[0]) for j in range(size[1])]
    c = torch.stack(shifts).permute(2, 0, 1, 3, 4).reshape(depth * points, out, *size)
    torus = Torus(kernel, dilation, size, 0.0)
    target = tuple(Points(0, stride[i], (size[i] - 1) // stride[i] + 1) for i in (0, 1))
    y = spectrum.precondition(torus, c, spectrum.lags(weight), torus.whole(), target)  # type: ignore[arg-type]
    q = y.flatten(2).permute(1, 2, 0)
    gram = q @ q.transpose(1, 2)
    assert (gram - torch.eye(gram.shape[1], dtype=torch.float64)).abs().max() <= 1e-12


@in_every_way(ISOMETRIES[::3], lambda i, row: i == 0)
def test_norm_is_bounded(way: str, row: Any) -> None:
    kernel, size, dilation, depth, out, _ = row
    weight = normal(out, depth, *kernel)
    v = normkern.preconditioner(weight, size, dilation=dilation, eps=0.0)
    spectra = torch.fft.rfft2(paper.wrapped(paper.dilated(weight, dilation), size)) * v[:, None]
    assert torch.linalg.matrix_norm(spectra.permute(2, 3, 0, 1), 2).max() <= out**0.5 * (1 + 1e-12)


FFT_ROWS = [
    (*row, dtype)
    for row in (
        ((5, 16, 3, 3), (34, 34), 1), ((9, 3, 7, 7), (230, 230), 1), ((64, 64, 3, 3), (6, 6), 1),
        ((3, 4, 2, 5), (20, 31), 3), ((3, 70, 4, 4), (7, 5), 1), ((2, 5, 1, 1), (4, 4), 1),
        ((2, 2, 3, 3), (1, 700), (1, 2)), ((2, 2, 3, 3), (700, 1200), 1),
    )
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
]  # fmt: skip


@in_every_way(FFT_ROWS, lambda i, row: row[0][0] < 9 and row[1][0] * row[1][1] <= 1200 and row[3].itemsize >= 4)
def test_preconditioner_is_that_of_the_fft(way: str, row: Any) -> None:
    shape, size, dilation, dtype = row
    weight = normal(*shape, dtype=dtype)
    got = normkern.preconditioner(weight, size, dilation=dilation, eps=0.0)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    spread = dilation if isinstance(dilation, tuple) else (dilation, dilation)
    power = torch.fft.rfft2(paper.wrapped(paper.dilated(weight.double(), spread), size)).abs().square().sum(1)
    relative = (got.double() * power.sqrt() - 1).abs()
    # S is a difference of lags: near a null its error is that of r[0], 1e-16 of it.
    clear = power > 1e-3 * weight.double().square().sum((1, 2, 3))[:, None, None]
    assert clear.double().mean() > 0.7
    assert relative[clear].max() <= (1e-11 if dtype == torch.float64 else 4e-7)
    assert relative.max() <= 1e-5


GRID = [
    (kernel, stride, padding, groups)
    for kernel in ((1, 1), (3, 3), (5, 2), (4, 4))
    for stride in ((1, 1), (2, 2), (3, 2))
    for padding in (0, 1, 2, 3)
    for groups in (1, 2)
    if padding < min(kernel) and padding < 3
]


@in_every_way(GRID, lambda i, row: i == 7)
def test_is_what_the_paper_computes(way: str, row: Any) -> None:
    kernel, stride, padding, groups = row
    for dtype, layout, dilation in (
        (torch.float64, torch.contiguous_format, (1, 1)),
        (torch.float64, torch.channels_last, (2, 1)),
        (torch.float32, torch.channels_last, (1, 1)),
        (torch.float32, torch.contiguous_format, (1, 2)),
    ):
        x, weight, bias = normal(3, 6, 11, 10), normal(10, 6 // groups, *kernel, seed=1), normal(10, seed=2)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
        arguments = stride, (padding, padding), dilation, groups
        expected = paper.conv_norm(x.double(), weight.double(), bias.double(), *arguments)
        y = normkern.conv_norm(x.to(memory_format=layout), weight, bias, *arguments, eps=0.0)
        assert y.dtype == dtype
        assert y.shape == expected.shape
        assert y.shape == torch.nn.functional.conv2d(x, weight, bias, *arguments).shape
        # Sums of the taps, then of the points of the torus, each with the square root of their number.
        bound = 1e-12 if dtype == torch.float64 else 2e-5
        assert (y.double() - expected).abs().max() <= bound * expected.square().mean().sqrt()


@every_way
def test_large_map_and_folding(way: str) -> None:
    """A torus of 103 x 100 points goes through torch.fft; 100 is folded by strides 2 and 4, 103 is not."""
    x, weight = normal(2, 3, 100, 98), normal(8, 3, 4, 3, seed=1)
    for stride in ((1, 1), (2, 4), (1, 2), (3, 5)):
        expected = paper.conv_norm(x, weight, None, stride, (1, 1), (1, 1), 1)
        y = normkern.conv_norm(x, weight, None, stride, 1, eps=0.0)
        assert (y - expected).abs().max() <= 1e-12
    expected = paper.conv_norm(x[:, :, :97], weight, None, (5, 10), (2, 0), (1, 1), 1)  # a torus of 100 x 100
    y = normkern.conv_norm(x[:, :, :97], weight, None, (5, 10), (2, 0), eps=0.0)
    assert (y - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    x, weight, bias = normal(2, 4, 9, 9, dtype=dtype), normal(6, 4, 3, 3, dtype=dtype, seed=1), normal(6, dtype=dtype)
    y = normkern.conv_norm(x, weight, bias, 2, 1)
    assert y.dtype == dtype
    assert torch.equal(y, normkern.conv_norm(x.float(), weight.float(), bias.float(), 2, 1).to(dtype))


def test_autocast_casts_nothing() -> None:
    x, weight = normal(2, 4, 9, 9, dtype=torch.float32), normal(6, 4, 3, 3, dtype=torch.float32, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        y = normkern.conv_norm(x, weight)
    assert y.dtype == torch.float32
    assert torch.equal(y, normkern.conv_norm(x, weight))


@with_triton
def test_layout_of_the_convolution_is_kept(way: str) -> None:
    weight = normal(6, 4, 3, 3)
    y = normkern.conv_norm(normal(2, 4, 9, 9), weight)
    assert y.is_contiguous()
    if way != "eager":
        y = normkern.conv_norm(normal(2, 4, 9, 9).to(memory_format=torch.channels_last), weight, padding=1)
        assert way in ("fft", "triton") or y.is_contiguous(memory_format=torch.channels_last)


# ---- bounds of the spectrum


@with_triton
def test_null_of_the_spectrum(way: str) -> None:
    """A kernel of mean 0: S(0) = 0."""
    weight = normal(2, 1, 3, 3)
    weight -= weight.mean((2, 3), keepdim=True)
    v = normkern.preconditioner(weight, (8, 8), eps=1e-6)
    r0 = weight.square().sum((1, 2, 3))
    assert torch.allclose(v[:, 0, 0], (1e-6 * r0).rsqrt(), rtol=1e-12)
    assert v.max() <= 1e3 * r0.min().rsqrt() * (1 + 1e-12)
    weight = torch.tensor([1.0, -1.0], dtype=torch.float64).reshape(1, 1, 1, 2)  # S(0) is 0 without rounding
    assert normkern.preconditioner(weight, (1, 8), eps=0.0)[0, 0, 0] == float("inf")
    x = normal(1, 1, 4, 5)
    assert normkern.conv_norm(x, weight).isfinite().all()
    assert not normkern.conv_norm(x, weight, eps=0.0).isfinite().any()  # as documented


@with_triton
def test_channel_of_zeros(way: str) -> None:
    x, weight = normal(2, 3, 6, 6), normal(4, 3, 3, 3)
    weight[1] = 0
    y = normkern.conv_norm(x, weight)
    assert y.isfinite().all()
    assert (y[:, 1] == 0).all()
    assert (y[:, [0, 2, 3]] != 0).all()
    assert (normkern.preconditioner(weight, (6, 6))[1] == 0).all()
    assert normkern.preconditioner(weight, (6, 6), eps=0.0)[1].isinf().all()


@every_way
@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_spectra_beyond_the_range_of_float(way: str, scale: float) -> None:
    """Only V must fit: S is 1e-36 or 1e36 times a sum here."""
    weight = normal(3, 300, 3, 3, dtype=torch.float32) * scale
    v = normkern.preconditioner(weight, (9, 9))
    exact = paper.preconditioner(weight.double(), (9, 9))
    assert (v.double() / exact - 1).abs().max() <= 1e-5


@with_triton
def test_nan_stays_in_its_channel(way: str) -> None:
    weight = normal(9, 3, 3, 3)
    weight[2, 1, 1, 1] = float("nan")
    y = normkern.conv_norm(normal(2, 3, 6, 6), weight)
    assert y[:, 2].isnan().all()
    assert y[:, [0, 1, *range(3, 9)]].isfinite().all()


# ---- gradients

GEOMETRIES: list[dict[str, Any]] = [
    {"stride": 1, "padding": 1},
    {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
    {"stride": 2, "padding": 0, "groups": 2},
]


@every_way
@pytest.mark.parametrize("kernel", [(3, 3), (2, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_gradients(way: str, geometry: dict[str, Any], kernel: Any) -> None:
    if kernel == (1, 1):
        geometry = {**geometry, "padding": 0}
    x = normal(2, 4, 4, 5).requires_grad_()
    weight = normal(4, 4 // geometry.get("groups", 1), *kernel, seed=1).requires_grad_()
    bias = normal(4, seed=2).requires_grad_()

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return normkern.conv_norm(x, weight, bias, **geometry, through_preconditioner=True)

    assert torch.autograd.gradcheck(call, (x, weight, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, weight, bias), fast_mode=True)


@in_every_way([0.0, 1e-6, 0.9], lambda i, row: i == 1)
def test_gradients_of_the_preconditioner(way: str, row: float) -> None:
    """With eps = 0.9 much of S is kept at 0.9 r[0]."""
    eps, weight = row, normal(3, 2, 3, 2).requires_grad_()

    def call(weight: Tensor) -> Tensor:
        return normkern.preconditioner(weight, (5, 6), dilation=(1, 2), eps=eps)

    assert torch.autograd.gradcheck(call, (weight,), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (weight,), fast_mode=True)
    x = normal(2, 2, 4, 4)
    assert torch.autograd.gradcheck(
        lambda w: normkern.conv_norm(x, w, eps=eps, through_preconditioner=True), (weight,), fast_mode=True
    )


@every_way
@pytest.mark.parametrize("kernel", [3, 1])
def test_gradient_stops_at_the_preconditioner(way: str, kernel: int) -> None:
    """By default V is a constant; with its gradient the layer knows that it does not depend on the kernel's scale."""
    x, weight, dy = (
        normal(2, 3, 6, 5),
        normal(4, 3, kernel, kernel, seed=1).requires_grad_(),
        normal(2, 4, 6, 5, seed=2),
    )
    padding = kernel // 2
    size = (6 + 2 * padding, 5 + 2 * padding)
    v = paper.preconditioner(weight.detach(), size)
    c = torch.nn.functional.conv2d(x, weight, padding=2 * padding)
    p = torch.fft.irfft2(torch.fft.rfft2(c) * v, s=size)[:, :, padding : 6 + padding, padding : 5 + padding]
    (expected,) = torch.autograd.grad(p, weight, dy)
    (got,) = torch.autograd.grad(normkern.conv_norm(x, weight, padding=padding), weight, dy)
    assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()
    y = normkern.conv_norm(x, weight, padding=padding, through_preconditioner=True)
    (whole,) = torch.autograd.grad(y, weight, dy)
    radial = (whole * weight.detach()).sum((1, 2, 3))
    assert radial.abs().max() <= 1e-12
    assert (got * weight.detach()).sum((1, 2, 3)).abs().min() > 1e-3


def test_gradients_in_float32_and_channels_last() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = normal(2, 20, 9, 8, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
        weight, dy = (
            normal(12, 20, 3, 3, dtype=dtype, seed=1).requires_grad_(),
            normal(2, 12, 5, 4, dtype=dtype, seed=2),
        )
        got = torch.autograd.grad(normkern.conv_norm(x, weight, None, 2, 1), (x, weight), dy)
        wide = [t.detach().double().requires_grad_() for t in (x, weight)]
        exact = torch.autograd.grad(normkern.conv_norm(*wide, None, 2, 1), wide, dy.double())
        for a, b in zip(got, exact, strict=True):
            assert a.dtype == dtype
            assert (a.double() - b).abs().max() <= (1e-5 if dtype == torch.float32 else 1e-2) * b.abs().max()


def test_functional_transforms() -> None:
    x, weight = normal(3, 2, 6, 6), normal(4, 2, 3, 3, seed=1)

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        return normkern.conv_norm(x[None], weight, through_preconditioner=True).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, x)
    leaf = weight.clone().requires_grad_()
    for i in range(3):
        (expected,) = torch.autograd.grad(loss(leaf, x[i]), leaf)
        assert (per_sample[i] - expected).abs().max() <= 1e-10
    _, tangent = torch.func.jvp(lambda w: normkern.conv_norm(x, w), (weight,), (weight,))
    assert tangent.shape == (3, 4, 4, 4)


# ---- operators and torch.compile


@needs_native
def test_opcheck() -> None:
    weight = normal(10, 3, 3, 2)
    ops = torch.ops.normkern
    lags = ops.lags(weight)
    taps, torus = [3, 2, 1, 2], [12, 9]
    x = normal(2, 10, 12, 5, 2)
    part = normal(2, 10, 5, 9)
    checks: Any = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.lags.default, (weight,), test_utils=checks)
    for wide in (False, True):
        torch.library.opcheck(ops.inverse_root.default, (lags, taps, torus, 1e-6, wide), test_utils=checks)
    for fold in ([0, 1, 0, 1], [1, 3, 2, 3], [2, 4, 0, 1]):
        torch.library.opcheck(ops.spectral_multiply.default, (x, lags, taps, torus, fold, 1e-6), test_utils=checks)
    for t in (part, part.to(memory_format=torch.channels_last)):
        arguments = (t, lags, taps, torus, [1, 2, 0, 1], [0, 3, 4, 2, 2, 3], 1e-6)
        torch.library.opcheck(ops.precondition.default, arguments, test_utils=checks)


@needs_native
def test_operators_guard_memory() -> None:
    ops = torch.ops.normkern
    weight = normal(4, 2, 3, 3)
    lags, x = ops.lags(weight), normal(1, 4, 8, 8)
    taps, torus, all_of = [3, 3, 1, 1], [8, 8], [0, 1, 8, 0, 1, 8]
    with pytest.raises(RuntimeError, match="lags must be"):
        ops.precondition(x, lags[:, :5], taps, torus, [0, 1, 0, 1], all_of, 0.0)
    with pytest.raises(RuntimeError, match="points of source"):
        ops.precondition(x, lags, taps, torus, [1, 1, 0, 1], all_of, 0.0)
    with pytest.raises(RuntimeError, match="points of target"):
        ops.precondition(x, lags, taps, torus, [0, 1, 0, 1], [0, 2, 8, 0, 1, 8], 0.0)
    with pytest.raises(RuntimeError, match="a channel for each row"):
        ops.precondition(x[:, :3], lags, taps, torus, [0, 1, 0, 1], all_of, 0.0)
    with pytest.raises(RuntimeError, match="up to 96 points"):
        ops.precondition(x, lags, taps, [97, 8], [0, 1, 0, 1], all_of, 0.0)
    with pytest.raises(RuntimeError, match="one-sided"):
        ops.spectral_multiply(normal(1, 4, 8, 4, 2), lags, taps, torus, [0, 1, 0, 1], 0.0)
    with pytest.raises(RuntimeError, match="divide the torus"):
        ops.spectral_multiply(normal(1, 4, 8, 5, 2), lags, taps, torus, [0, 3, 0, 1], 0.0)
    with pytest.raises(RuntimeError, match="contiguous"):
        ops.lags(weight.transpose(2, 3))


@needs_native
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic: bool) -> None:
    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return normkern.conv_norm(x, weight, bias, 2, 1, through_preconditioner=True)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in (8, 9, 11) if dynamic else (8,):
        leaves = normal(2, 3, size, size + 1), normal(6, 3, 3, 3, seed=1), normal(6, seed=2)
        one, two = ([t.clone().requires_grad_() for t in leaves] for _ in range(2))
        got, expected = compiled(*one), call(*two)
        assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)
        for a, b in zip(
            torch.autograd.grad(got.square().sum(), one), torch.autograd.grad(expected.square().sum(), two), strict=True
        ):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


@needs_native
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set(isa: str) -> None:
    """The sets differ in rounding only; the widest that this machine has is the one of all other tests."""
    script = """
import torch, normkern, paper_conv_norm as paper
g = torch.Generator().manual_seed(0)
for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
    x, w = torch.randn(2, 5, 12, 9, generator=g).to(dtype), torch.randn(19, 5, 3, 3, generator=g).to(dtype)
    y = normkern.conv_norm(x, w, None, 2, 1, eps=0.0)
    exact = paper.conv_norm(x.double(), w.double(), None, (2, 2), (1, 1), (1, 1), 1)
    assert (y.double() - exact).abs().max() <= bound, dtype
print(normkern._host.cpu_instruction_set())
"""
    environment = {**os.environ, "NORMKERN_CPU": isa}
    done = subprocess.run(
        [sys.executable, "-c", "import normkern._host\n" + script], cwd=Path(__file__).parent, env=environment,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in (isa, "baseline", "neon")


def test_no_thread_changes_the_bits() -> None:
    x, weight = normal(5, 4, 30, 30, dtype=torch.float32), normal(40, 4, 3, 3, dtype=torch.float32, seed=1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        c = torch.nn.functional.conv2d(x, weight, padding=2)
        torus = Torus((3, 3), (1, 1), (32, 32), 1e-6)
        one = spectrum.precondition(torus, c, spectrum.lags(weight), torus.whole(), torus.whole())
        torch.set_num_threads(3)
        three = spectrum.precondition(torus, c, spectrum.lags(weight), torus.whole(), torus.whole())
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, three)


# ---- what may be handed in


def test_empty_batch() -> None:
    x, weight = normal(0, 3, 6, 6).requires_grad_(), normal(4, 3, 3, 3).requires_grad_()
    for kernel in (weight, weight[:, :, :1, :1]):
        y = normkern.conv_norm(x, kernel, None, 2)
        assert y.shape == torch.nn.functional.conv2d(x, kernel, None, 2).shape
        y.sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert (weight.grad == 0).all()


def test_strides_of_any_kind() -> None:
    """Slices and expanded tensors as input, kernel and gradient."""
    x, weight = normal(2, 6, 12, 7)[:, ::2, ::2], normal(3, 3, 5, 3, seed=1).transpose(2, 3)[:, :, :, ::2]
    assert torch.equal(normkern.conv_norm(x, weight), normkern.conv_norm(x.contiguous(), weight.contiguous()))
    leaf = weight.clone().requires_grad_()
    normkern.conv_norm(x, leaf).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


X, W = normal(2, 4, 6, 6, dtype=torch.float32), normal(8, 4, 3, 3, dtype=torch.float32)


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (RuntimeError, r"kernel must fit the padded map; got 3 rows.*2 \+ 2 \* 0", (X[:, :, :2], W), {}),
        (RuntimeError, r"kernel must fit.*9 columns", (X, W), {"dilation": (1, 4), "padding": (0, 1)}),
        (RuntimeError, "padding must be at most.*which is 2 for the rows.*padding=3", (X, W), {"padding": 3}),
        (RuntimeError, "padding must be at most.*columns", (X, W), {"padding": (1, 3)}),
        (RuntimeError, "padding must be at most", (X, W[:, :, :1, :1]), {"padding": 1}),
        (RuntimeError, r"input must have shape \(N, C, H, W\); got \(4, 6, 6\)", (X[0], W), {}),
        (RuntimeError, r"a map of at least one point; got shape \(2, 4, 0, 6\)", (X[:, :, :0], W), {"padding": 2}),
        (NotImplementedError, "input must be float.*got torch.int64", (X.long(), W), {}),
        (NotImplementedError, "weight must be float.*got torch.int64", (X, W.long()), {}),
        (RuntimeError, "weight must have the dtype of input; got torch.float64", (X, W.double()), {}),
        (RuntimeError, "bias must have the dtype", (X, W, torch.zeros(8).double()), {}),
        (RuntimeError, r"bias must have shape \(8,\); got \(4,\)", (X, W, torch.zeros(4)), {}),
        (RuntimeError, "weight must be on the device of input", (X, W.to("meta")), {}),
        (RuntimeError, "input must have 8 channels", (X, W), {"groups": 2}),
        (RuntimeError, "groups must divide the output channels; got groups=3", (X, W), {"groups": 3}),
        (TypeError, "groups must be an int", (X, W), {"groups": 1.0}),
        (ValueError, "eps must be at least 0; got eps=-1", (X, W), {"eps": -1}),
        (ValueError, "eps must be at least 0; got eps=nan", (X, W), {"eps": float("nan")}),
        (TypeError, "eps must be a float", (X, W), {"eps": "1"}),
        (RuntimeError, "stride must be at least 1; got stride=0", (X, W), {"stride": 0}),
        (RuntimeError, "dilation must be at least 1", (X, W), {"dilation": (1, 0)}),
        (RuntimeError, "padding must be at least 0", (X, W), {"padding": -1}),
        (TypeError, "stride must be an int or a pair", (X, W), {"stride": (1, 2, 3)}),
        (TypeError, "padding must be an int or a pair", (X, W), {"padding": "same"}),
        (TypeError, "through_preconditioner must be a bool", (X, W), {"through_preconditioner": 1}),
        (TypeError, "input must be a Tensor", ([1.0], W), {}),
        (TypeError, "weight must be a Tensor", (X, None), {}),
        (RuntimeError, "weight must have shape.*not empty", (X, W[:0]), {}),
        (RuntimeError, r"weight must have shape.*got \(8, 4, 9\)", (X, W.flatten(2)), {}),
    ],
)  # fmt: skip
def test_errors(error: type[Exception], message: str, arguments: Any, options: Any) -> None:
    with pytest.raises(error, match=f"conv_norm: .*{message}|conv_norm: {message}"):
        normkern.conv_norm(*arguments, **options)


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (RuntimeError, "weight must have shape", (W[0], (6, 6)), {}),
        (NotImplementedError, "got torch.int32", (W.int(), (6, 6)), {}),
        (TypeError, "size must be a pair of ints; got 6", (W, 6), {}),
        (TypeError, "size must be an int or a pair", (W, (6, 6.0)), {}),
        (RuntimeError, "size must be at least 1", (W, (6, 0)), {}),
        (ValueError, "eps must be at least 0", (W, (6, 6)), {"eps": -1e-9}),
        (RuntimeError, "dilation must be at least 1", (W, (6, 6)), {"dilation": 0}),
    ],
)
def test_errors_of_the_preconditioner(error: type[Exception], message: str, arguments: Any, options: Any) -> None:
    with pytest.raises(error, match=f"preconditioner: {message}|preconditioner: .*{message}"):
        normkern.preconditioner(*arguments, **options)
