# The spectral CUDA kernels, run on the CPU with every access checked, against the formulas in float64.
from __future__ import annotations

from typing import Any

import paper_conv_norm as paper
import pytest
import torch
from conftest import or_skip
from torch import Tensor

from normkern import spectrum
from normkern.spectrum import Points, Torus


@pytest.fixture(scope="module")
def spectra() -> Any:
    from emulator.spectral import EmulatedSpectra

    return or_skip(EmulatedSpectra)


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 3, 3), (2, 130, 1, 1), (2, 3, 2, 4), (1, 2, 9, 9), (2, 1, 7, 7)], ids=str)
def test_lags(spectra: Any, shape: Any, dtype: torch.dtype) -> None:
    """13 lags in slices of the depth, 1, 11, 145 (more than threads), 85."""
    weight = normal(*shape, dtype=dtype)
    got, exact = spectra.lags(weight), spectrum.eager_lags(weight)
    assert (got - exact).abs().max() <= 1e-14 * exact[:, 0].max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("kernel", "dilation", "size"),
    [((3, 3), (1, 1), (9, 10)), ((2, 5), (1, 3), (7, 7)), ((3, 3), (2, 1), (2, 1)), ((1, 4), (1, 1), (5, 40)),
     ((7, 7), (1, 1), (13, 12))],
    ids=str,
)  # fmt: skip
def test_inverse_root(spectra: Any, kernel: Any, dilation: Any, size: Any, dtype: torch.dtype) -> None:
    weight = normal(3, 4, *kernel)
    torus = Torus(kernel, dilation, size, 0.0)
    v = spectra.inverse_root(torus, spectrum.eager_lags(weight), dtype)
    power = torch.fft.rfft2(paper.wrapped(paper.dilated(weight, dilation), size)).abs().square().sum(1)
    assert (v.double() * power.sqrt() - 1).abs().max() <= (1e-11 if dtype == torch.float64 else 1e-5)


def test_bounds_of_the_spectrum(spectra: Any) -> None:
    weight = normal(3, 1, 3, 3)
    weight[0] -= weight[0].mean()
    weight[1] = 0
    lags = spectrum.eager_lags(weight)
    for eps in (1e-6, 0.5, 0.0):
        torus = Torus((3, 3), (1, 1), (6, 8), eps)
        v, expected = (
            spectra.inverse_root(torus, lags, torch.float64),
            spectrum.eager_inverse_root(torus, lags, torch.float64),
        )
        clear = slice(1, 3) if eps == 0 else slice(0, 3)  # what rounding leaves of a null is anything
        assert torch.allclose(v[clear], expected[clear], rtol=1e-10)
    assert torch.equal(
        spectra.inverse_root(Torus((3, 3), (1, 1), (6, 8), 1e-6), lags, torch.float32)[1].max(), torch.tensor(0.0)
    )
    assert spectra.inverse_root(Torus((3, 3), (1, 1), (6, 8), 0.0), lags, torch.float32)[1].isinf().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("size", "source", "target"),
    [
        ((8, 6), None, None),
        ((9, 8), None, (Points(1, 1, 7), Points(2, 1, 5))),
        ((8, 9), None, (Points(1, 2, 4), Points(1, 3, 3))),  # both folded
        ((8, 9), None, (Points(0, 4, 2), Points(1, 2, 4))),  # one folded, one not
        ((7, 8), (Points(1, 2, 3), Points(2, 1, 5)), None),
        ((6, 8), (Points(1, 2, 3), Points(0, 3, 3)), (Points(2, 3, 1), Points(1, 4, 2))),
    ],
    ids=str,
)
def test_precondition(spectra: Any, size: Any, source: Any, target: Any, layout: Any, dtype: torch.dtype) -> None:
    torus = Torus((3, 2), (1, 2), size, 1e-6)
    source, target = source or torus.whole(), target or torus.whole()
    lags = spectrum.eager_lags(normal(5, 3, 3, 2, seed=1))
    x = normal(2, 5, source[0].count, source[1].count, dtype=dtype).contiguous(memory_format=layout)
    like = torch.empty(2, 5, target[0].count, target[1].count, dtype=dtype).contiguous(memory_format=layout)
    y = spectra.precondition(torus, x, lags, source, target, like)
    exact = spectrum.eager_precondition(torus, x.double(), lags, source, target)
    assert y.stride() == like.stride()
    assert (y.double() - exact).abs().max() <= (1e-13 if dtype == torch.float64 else 4e-6)


def test_many_channels_and_schedules(spectra: Any) -> None:
    """More values than a block has threads, on several schedules: the same bits."""
    torus = Torus((3, 3), (1, 1), (6, 6), 1e-6)
    lags = spectrum.eager_lags(normal(40, 2, 3, 3))
    x = normal(2, 40, 6, 6, dtype=torch.float32)
    results = []
    for seed in range(3):
        spectra.seed = seed
        results.append(spectra.precondition(torus, x, lags, torus.whole(), torus.whole(), x))
    spectra.seed = 1
    assert all(torch.equal(results[0], other) for other in results[1:])
