# A norm that is not shipped, added as CONTRIBUTING tells: one row of domains and one short function, no C++. Pixel norm
# divides each pixel by the root mean square of its channels. It must run on every backend from the first day.
from __future__ import annotations

import pytest
import torch
from cases import in_layout
from conftest import Setup
from reference import Expected, compare
from test_norms import strides
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from normkern import autograd
from normkern.problem import Axis, Domain, Moments, Problem, _pair


def pixel(shape: tuple[int, ...], strides: tuple[int, ...], eps: float) -> Problem | None:
    """Moments over the channels (dimension 1) of every pixel of every sample; a weight per channel."""
    axes = [Axis(n, s, dim != 1, dim == 1) for dim, (n, s) in enumerate(zip(shape, strides, strict=True))]
    pair = _pair(axes)
    return None if pair is None else Problem(pair[0], pair[1], Moments.second, eps=eps)


def pixel_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-8) -> Tensor:
    problem = pixel(x.shape, x.stride(), eps)
    if problem is None:
        return pixel_norm(x.contiguous(), weight, eps)
    return autograd.normalize(problem, x, weight, None, None, None, None, False)[0]


def plain_pixel_norm(x: Tensor, weight: Tensor, eps: float = 1e-8) -> Tensor:
    return x / (x.square().mean(1, keepdim=True) + eps).sqrt() * weight.view(1, -1, 1, 1)


def test_domains() -> None:
    contiguous = pixel((2, 3, 5, 7), (105, 35, 7, 1), 0.0)
    last = pixel((2, 3, 5, 7), (105, 1, 21, 3), 0.0)
    assert contiguous is not None
    assert last is not None
    assert (contiguous.stats, contiguous.affine) == (Domain(2, 3, 35, 1), Domain(1, 2, 3, 35))
    assert last.stats.count == 3
    assert last.stats.groups == 70


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients(backend: Setup, dtype: torch.dtype, layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 3, 5, 7), (1, 64, 4, 4), (3, 17, 1, 9)):
        values, dy = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        x = in_layout(values, layout).to(backend.device).requires_grad_()
        weight = torch.randn(shape[1], generator=generator).to(backend.device).requires_grad_()
        y = pixel_norm(x, weight)
        dx, dweight = torch.autograd.grad(y, (x, weight), dy.to(backend.device))
        assert strides(y) == strides(x)
        assert strides(dx) == strides(x)

        wide_x, wide_weight = (t.detach().cpu().double().requires_grad_() for t in (x, weight))
        wide_y = plain_pixel_norm(wide_x, wide_weight)
        wide = torch.autograd.grad(wide_y, (wide_x, wide_weight), dy.double())
        rstd = 1 / (wide_x.detach().square().mean(1, keepdim=True) + 1e-8).sqrt()
        w = wide_weight.detach().abs().view(1, -1, 1, 1)
        g, xhat = dy.double().abs() * w, wide_x.detach().abs() * rstd
        dx_scale = rstd * (g + 2 * xhat * (g * xhat).mean(1, keepdim=True))
        compare("y", y, Expected(wide_y.detach(), xhat * w, 2**-24, dtype, rounded=True))
        compare("dx", dx, Expected(wide[0], dx_scale, 2**-24, dtype, rounded=True))
        scale = (dy.double().abs() * xhat).transpose(0, 1).flatten(1).sum(1)
        compare("dweight", dweight, Expected(wide[1], scale, 2**-24, torch.float32))


def test_second_order(backend: Setup) -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight = (
        torch.randn(s, dtype=torch.float64, generator=generator).to(backend.device) for s in ((2, 3, 2, 2), (3,))
    )
    leaves = (x.requires_grad_(), weight.requires_grad_())
    assert gradcheck(pixel_norm, leaves, fast_mode=True)
    assert gradgradcheck(pixel_norm, leaves, fast_mode=True)
