# Singular values of convolutions, against the matrix of the operator.
from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normkern
from normkern import probes


def circular(weight: Tensor, size: tuple[int, ...], stride: Any, dilation: Any, groups: int, channels: int) -> Tensor:
    """The matrix of the convolution, column by column, from torch's own convolution of a wrapped map."""
    count = channels * math.prod(size)
    basis = torch.eye(count, dtype=torch.float64).view(count, channels, *size)
    pads = [(k - 1) * d for k, d in zip(weight.shape[2:], dilation, strict=True)]
    for axis, pad in enumerate(pads, start=2):
        index = torch.arange(basis.shape[axis] + pad) % basis.shape[axis]
        basis = basis.index_select(axis, index)
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(size)]
    return convolve(basis, weight, stride=stride, dilation=dilation, groups=groups).flatten(1).T


@pytest.mark.parametrize(
    ("shape", "size", "stride", "dilation", "groups"),
    [
        ((5, 3, 3, 3), (6, 5), (1, 1), (1, 1), 1),
        ((4, 3, 3, 3), (6, 4), (2, 2), (1, 1), 1),
        ((4, 2, 3, 2), (6, 6), (3, 1), (1, 2), 2),
        ((6, 1, 5, 5), (4, 4), (1, 1), (1, 1), 6),  # the kernel is larger than the map, and wraps
        ((4, 4, 1, 1), (4, 4), (2, 2), (1, 1), 1),
        ((3, 2, 3), (8,), (2,), (3,), 1),
        ((2, 2, 2, 3, 2), (4, 3, 2), (2, 1, 1), (1, 1, 1), 1),
    ],
)
def test_conv_singular_values(
    shape: tuple[int, ...], size: tuple[int, ...], stride: Any, dilation: Any, groups: int
) -> None:
    weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    matrix = circular(weight, size, stride, dilation, groups, shape[1] * groups)
    want = torch.linalg.svdvals(matrix)
    got = probes.conv_singular_values(weight, size, stride=stride, dilation=dilation, groups=groups)
    count = min(len(got), len(want))
    torch.testing.assert_close(got[:count], want[:count], rtol=1e-9, atol=1e-9)
    assert (got[count:] < 1e-9).all()
    assert (want[count:] < 1e-9).all()
    norm = probes.conv_spectral_norm(weight, size, stride=stride, dilation=dilation, groups=groups)
    assert norm == pytest.approx(float(want[0]), rel=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
def test_spectral_norms_of_a_model(stride: int) -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3, stride, 1, padding_mode="circular"),
        nn.ReLU(),
        nn.Conv2d(5, 4, 3, stride, 1),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        normkern.nn.ConvNorm2d(4, 4, 3, padding=1),
        nn.Flatten(),
        nn.LazyLinear(3),
    ).double()
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    model(x)
    found = {row.layer: row for row in probes.spectral_norms(model, x).layers}
    assert set(found) == {"0", "2", "4.r", "6"}  # r is a convolution of its own
    first = circular(model[0].weight, (8, 8), (stride, stride), (1, 1), 1, 2)  # type: ignore[arg-type]
    assert found["0"].exact
    assert found["0"].spectral_norm == pytest.approx(float(torch.linalg.matrix_norm(first, 2)), rel=1e-9)
    side = 8 // stride
    basis = torch.eye(5 * side * side, dtype=torch.float64).view(-1, 5, side, side)
    second = F.conv2d(basis, model[2].weight, None, stride, 1).flatten(1)  # type: ignore[arg-type]
    true = float(torch.linalg.matrix_norm(second, 2))
    assert not found["2"].exact
    assert true <= found["2"].spectral_norm < 1.25 * true
    assert found["6"].spectral_norm == pytest.approx(float(torch.linalg.matrix_norm(model[6].weight, 2)))


def test_spectral_norms_of_maps_that_no_stride_divides_and_of_normalized_weights() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3, 2, 1), normkern.nn.ScaledWSConv2d(3, 4, 3)).double()
    odd, standardized = probes.spectral_norms(model, torch.randn(1, 1, 8, 7, dtype=torch.float64)).layers
    assert odd.size == (10, 10)
    basis = torch.eye(56, dtype=torch.float64).view(-1, 1, 8, 7)
    true = float(torch.linalg.matrix_norm(F.conv2d(basis, model[0].weight, None, 2, 1).flatten(1), 2))  # type: ignore[arg-type]
    assert true <= odd.spectral_norm < 1.25 * true
    kernel = model[1].normalized_weight().detach().flatten(1)  # type: ignore[operator]
    assert standardized.reshaped == pytest.approx(float(torch.linalg.matrix_norm(kernel, 2)), rel=1e-12)
