# The convolution between spectra: equal to the general way, its operators, and where it is chosen.
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import normkern
from normkern import spectral_product
from normkern.backends import BACKENDS
from normkern.spectral_product import Route
from normkern.spectrum import Torus

NATIVE = BACKENDS["native"].why_not(torch.empty(1)) is None
needs_native = pytest.mark.skipif(not NATIVE, reason="there are no compiled kernels")


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@needs_native
@pytest.mark.parametrize(
    ("batch", "channels", "kernel", "stride", "padding", "dilation", "size"),
    [
        (2, (3, 5), (3, 3), (1, 1), (1, 1), (1, 1), (6, 7)),
        (2, (3, 5), (3, 3), (2, 2), (1, 1), (1, 1), (6, 8)),
        (3, (9, 17), (3, 2), (2, 1), (0, 1), (2, 1), (6, 9)),
        (1, (4, 33), (5, 3), (3, 2), (2, 0), (1, 2), (11, 12)),  # folded by 3 and by 2
        (1, (4, 7), (3, 3), (3, 2), (1, 1), (1, 1), (11, 11)),  # 13 points: not folded
        (2, (150, 70), (3, 3), (2, 2), (1, 1), (1, 1), (8, 8)),  # more inputs than are taken at a time
        (1, (3, 8), (7, 7), (2, 2), (3, 3), (1, 1), (30, 104)),  # a side beyond precondition's
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_product_of_spectra(
    monkeypatch: pytest.MonkeyPatch, batch: int, channels: Any, kernel: Any, stride: Any, padding: Any, dilation: Any,
    size: Any, layout: torch.memory_format,
) -> None:  # fmt: skip
    """The result and the gradients are those of the general way, and a second gradient too."""
    x = normal(batch, channels[0], *size).to(memory_format=layout)
    weight, bias = normal(channels[1], channels[0], *kernel, seed=1), normal(channels[1], seed=2)
    found: dict[torch.dtype | None, list[Tensor]] = {}
    for dtype in (None, torch.float64, torch.float32):  # None: the general way
        monkeypatch.setattr(spectral_product, "pays", lambda *_, on=dtype is not None: on)
        leaves = [t.to(dtype or torch.float64).requires_grad_() for t in (x.clone(), weight.clone(), bias.clone())]
        y = normkern.conv_norm(leaves[0], leaves[1], leaves[2], stride, padding, dilation)
        spectral = type(y.grad_fn.next_functions[0][0]).__name__ if y.grad_fn else ""  # under the sum with the bias
        assert ("Product" in spectral) == (dtype is not None)
        dy = normal(*y.shape, seed=3).to(y.dtype)
        gradients = torch.autograd.grad(y, leaves, dy, create_graph=True)
        plain = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in gradients[:2]), leaves[:2])
        found[dtype] = [y, *plain, *gradients, *second]
    for dtype, bound in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        for got, expected in zip(found[dtype], found[None], strict=True):
            assert got.shape == expected.shape
            assert (got.double() - expected).abs().max() <= bound * expected.abs().max()


def test_product_of_spectra_where_it_pays() -> None:
    """ResNet-18's stem and its 3x3 layers of 16 samples, not a kernel that few samples share."""

    def pays(batch: int, cin: int, cout: int, kernel: int, stride: int, size: int) -> bool:
        side, out = size + kernel - 1, (size - 1) // stride + 1
        torus = Torus((kernel, kernel), (1, 1), (side, side), 1e-6)
        route = Route(torus, (kernel // 2, kernel // 2), (size, size), (stride, stride), (out, out))
        return spectral_product.pays(route, torch.empty(batch, 1, 1, 1), torch.empty(cout, cin, kernel, kernel))

    assert pays(4, 3, 64, 7, 2, 224)
    assert pays(16, 64, 128, 3, 2, 32)
    assert pays(16, 64, 64, 3, 1, 32)
    assert not pays(1, 512, 512, 3, 1, 7)


@needs_native
def test_no_thread_changes_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectral_product, "pays", lambda *_: True)
    leaves = [normal(*shape, dtype=torch.float32).requires_grad_() for shape in ((3, 40, 14, 14), (70, 40, 3, 3))]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            y = normkern.conv_norm(*leaves, None, 2, 1)
            found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@needs_native
def test_opcheck() -> None:
    ops = torch.ops.normkern
    weight, taps = normal(10, 3, 3, 2), [3, 2, 1, 2]
    lags = ops.lags(weight)
    checks: Any = ("test_schema", "test_faketensor")
    source, square = normal(2, 3, 5, 9), [12, 9]
    listed = ops.spectral_analyze(source, square, [1, 2, 0, 1])
    short = normal(ops.spectral_analyze(normal(2, 10, 4, 9), [6, 9], [0, 1, 0, 1]).shape[0], 2, 2, 10)
    torch.library.opcheck(ops.spectral_analyze.default, (source, square, [1, 2, 0, 1]), test_utils=checks)
    for last in (False, True):
        arguments = (listed, square, [0, 3, 4, 2, 2, 3], 0.5, last)
        torch.library.opcheck(ops.spectral_synthesize.default, arguments, test_utils=checks)
    for x, transposed in ((listed, False), (short, True)):
        arguments = (x, weight, lags, [1, 2], square, [2, 1], 1e-6, transposed)
        torch.library.opcheck(ops.spectral_contract.default, arguments, test_utils=checks)
    torch.library.opcheck(
        ops.spectral_correlate.default, (listed, short, lags, taps, square, [2, 1], 1e-6), test_utils=checks
    )


@needs_native
def test_operators_guard_memory() -> None:
    ops = torch.ops.normkern
    weight, x = normal(4, 2, 3, 3), normal(1, 4, 8, 8)
    lags = ops.lags(weight)
    taps, torus = [3, 3, 1, 1], [8, 8]
    listed = ops.spectral_analyze(normal(1, 2, 8, 8), torus, [0, 1, 0, 1])
    with pytest.raises(RuntimeError, match="points of source"):
        ops.spectral_analyze(x, torus, [1, 1, 0, 1])
    with pytest.raises(RuntimeError, match="points of target"):
        ops.spectral_synthesize(listed, torus, [0, 2, 8, 0, 1, 8], 1.0, False)
    for one in (listed[1:], torch.cat((listed, listed), 3)[:, :, :, ::2]):
        with pytest.raises(RuntimeError, match="x must be a contiguous spectrum of 34 frequencies"):
            ops.spectral_contract(one, weight, lags, [1, 1], torus, [2, 2], 0.0, False)
    with pytest.raises(RuntimeError, match="stride must divide"):
        ops.spectral_contract(listed, weight, lags, [1, 1], torus, [3, 2], 0.0, False)
    with pytest.raises(RuntimeError, match="x the channels of weight"):
        ops.spectral_contract(listed, weight[:, :1].contiguous(), lags, [1, 1], torus, [2, 2], 0.0, False)
    with pytest.raises(RuntimeError, match="dy must be a contiguous spectrum of 10"):
        ops.spectral_correlate(listed, listed, lags, taps, torus, [2, 2], 0.0)
    with pytest.raises(RuntimeError, match="a channel for each row of lags"):
        ops.spectral_correlate(listed, listed, lags, taps, torus, [1, 1], 0.0)
