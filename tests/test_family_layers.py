# Layers of the norm family: statistics, state, kept weights, the ablations of batch norm, and those of timm, converted.
from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_family import EPS, b0, over, response, s0
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import normkern
import normkern.functional as F

# ---- layers


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "response1d": (lambda: normkern.nn.FilterResponseNorm1d(4, learn_eps=True), (2, 4, 9)),
    "response2d": (lambda: normkern.nn.FilterResponseNorm2d(4), (2, 4, 5, 5)),
    "response3d": (lambda: normkern.nn.FilterResponseNorm3d(4, tlu=False, act="silu"), (2, 4, 3, 3, 3)),
    "variance1d": (lambda: normkern.nn.VarianceNorm1d(4), (6, 4)),
    "variance2d": (lambda: normkern.nn.VarianceNorm2d(4, act="relu"), (2, 4, 5, 5)),
    "variance3d": (lambda: normkern.nn.VarianceNorm3d(4, affine=False), (2, 4, 3, 3, 3)),
    "s0": (lambda: normkern.nn.EvoNorm2dS0(4, group_size=2), (2, 4, 5, 5)),
    "s0_affine": (lambda: normkern.nn.EvoNorm2dS0(4, 2, nonlinearity=False), (2, 4, 5, 5)),
    "b0": (lambda: normkern.nn.EvoNorm2dB0(4), (2, 4, 5, 5)),
    "lp1": (lambda: normkern.nn.LpBatchNorm2d(4, 1, unit_gaussian=True), (2, 4, 5, 5)),
    "lpinf": (lambda: normkern.nn.LpBatchNorm2d(4, math.inf), (2, 4, 5, 5)),
    "noisy": (lambda: normkern.nn.NoisyBatchNorm2d(4), (2, 4, 5, 5)),
    "batch_paper": (lambda: normkern.nn.PaperBatchNorm2d(4), (2, 4, 5, 5)),
    "group_paper": (lambda: normkern.nn.PaperGroupNorm(2, 4), (2, 4, 5, 5)),
    "ws": (lambda: normkern.nn.WSConv2d(4, 6, 3, gain=True), (2, 4, 5, 5)),
    "sws": (lambda: normkern.nn.ScaledWSConv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "wn": (lambda: normkern.nn.WeightNormConv2d(4, 6, 3, bias=True), (2, 4, 5, 5)),
    "wc": (lambda: normkern.nn.CenteredConv2d(4, 6, 3), (2, 4, 5, 5)),
    "scaled_relu": (lambda: normkern.nn.ScaledReLU(), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_layer(layer: str) -> None:
    """Trains, evaluates, moves its statistics in training alone and not while they are frozen, copies and loads."""
    make, shape = LAYERS[layer]
    module, x = make(), torch.randn(shape, requires_grad=True)
    before = copy.deepcopy(module.state_dict())
    with normkern.frozen_running_stats(module):
        module(x)
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    module(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    moved = {name for name, t in module.state_dict().items() if not torch.equal(t, before[name])}
    assert moved == {name for name, _ in module.named_buffers()}
    module.eval()
    kept = copy.deepcopy(module.state_dict())
    y = module(x)
    assert all(torch.equal(t, kept[name]) for name, t in module.state_dict().items())
    twin = make().eval()
    twin.load_state_dict(kept)
    assert torch.equal(twin(x), y)
    assert torch.equal(copy.deepcopy(module)(x), y)
    assert type(module).__name__ in repr(module)


def test_lp_batch_norm() -> None:
    x = torch.randn(6, 3, 4, 5, dtype=torch.float64) * 2 + 1
    x = x.to(memory_format=torch.channels_last)
    w, b = torch.rand(2, 3, dtype=torch.float64)
    y = x - x.mean((0, 2, 3), keepdim=True)
    for centered, z in ((False, x), (True, y)):
        for p, size in (
            (1, z.abs().mean((0, 2, 3))),
            (2, z.square().mean((0, 2, 3)).sqrt()),
            (math.inf, z.abs().amax((0, 2, 3))),
        ):
            got = F.lp_batch_norm(x, None, None, w, b, True, eps=0.0, p=p, centered=centered)
            assert torch.allclose(got, y / over(size, x) * over(w, x) + over(b, x), rtol=1e-12)
            assert got.is_contiguous(memory_format=torch.channels_last)
    plain = F.batch_norm(x, None, None, w, b, True)
    assert torch.allclose(F.lp_batch_norm(x, None, None, w, b, True, centered=True), plain, rtol=1e-12)
    gaussian = torch.randn(64, 1, 64, 64)
    one = F.lp_batch_norm(gaussian, None, None, training=True, p=1, centered=True, unit_gaussian=True)
    assert abs(one.std().item() - 1) < 0.01  # 4 standard errors of std are 0.006
    layer = normkern.nn.LpBatchNorm2d(3, math.inf, momentum=1.0, eps=0.0).double()
    layer(x)
    assert torch.allclose(layer.eval()(x), y / over(x.abs().amax((0, 2, 3)), x), rtol=1e-6)


@pytest.mark.parametrize("p", [1, 2, math.inf])
@pytest.mark.parametrize("channels_last", [False, True])
def test_lp_derivatives(p: float, channels_last: bool) -> None:
    """Away from the kinks: no value near 0 (p=1), one that is largest by far (p=inf), in x and around the mean."""
    g = torch.Generator().manual_seed(3)
    far = torch.rand(3, 2, 3, 2, generator=g, dtype=torch.float64) + 1
    x = far * torch.tensor([1.0, -1.0]).repeat(18).view(3, 2, 3, 2).double().flip(0).cumprod(2)
    x[1, :, 1, 1] *= 4
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    w, b = torch.rand(2, 2, generator=g, dtype=torch.float64) + 0.5
    leaves = [t.requires_grad_() for t in (x, w, b)]
    centred = x.detach() - x.detach().mean((0, 2, 3), keepdim=True)
    for z in (x.detach(), centred):
        two = z.abs().amax((0, 2, 3)), z.abs().permute(1, 0, 2, 3).reshape(2, -1).kthvalue(17).values
        assert z.abs().min() > 0.01
        assert (two[0] - two[1] > 0.01).all()
    for centered in (False, True):

        def run(x: Tensor, w: Tensor, b: Tensor, centered: bool = centered) -> Tensor:
            return F.lp_batch_norm(x, None, None, w, b, True, p=p, centered=centered, unit_gaussian=True)

        assert run(*leaves).stride() == x.stride()
        assert gradcheck(run, leaves)
        assert gradgradcheck(run, leaves)
    running = torch.rand(2, 2, generator=g, dtype=torch.float64) + 1
    assert gradcheck(lambda *t: F.lp_batch_norm(t[0], *running, *t[1:], p=p), leaves)


def test_noise_derivatives() -> None:
    """With the noise of one seed it is a line: gradients are what multiplies x, in both layouts."""
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(3, 2, 4, 3, dtype=torch.float64).to(memory_format=layout).requires_grad_()

        def run(x: Tensor) -> Tensor:
            return F.batch_noise(x, generator=torch.Generator().manual_seed(5))

        assert run(x).stride() == x.stride()
        assert gradcheck(run, [x])
        assert gradgradcheck(run, [x])
        scale = (run(torch.ones_like(x)) - run(torch.zeros_like(x))).detach()
        assert scale.std() > 0.01
        assert torch.allclose(torch.autograd.grad(run(x).sum(), x)[0], scale, rtol=1e-12)


def test_noise() -> None:
    """Drawn anew at every call, the same at all positions, with the moments that are documented; none in eval."""
    x = torch.ones(20000, 2, 1, 1, dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    zero = F.batch_noise(torch.zeros_like(x), 0.5, 1.25, 0.1, generator=g)
    assert 0 < zero.mean((0, 2, 3)).abs().max() < 0.5
    assert torch.allclose(zero.std((0, 2, 3)), torch.full((2,), 0.1 / math.sqrt(3), dtype=x.dtype), rtol=0.02)
    one = F.batch_noise(x, 0.0, 1.25, 0.1, generator=g)
    assert ((one.mean((0, 2, 3)) > 1 - 0.08) & (one.mean((0, 2, 3)) < 1.25 + 0.08)).all()
    assert torch.allclose(one.std((0, 2, 3)), torch.full((2,), math.sqrt(0.01 + 0.01 / 3), dtype=x.dtype), rtol=0.03)
    wide = F.batch_noise(torch.ones(3, 2, 4, 4))
    assert torch.equal(wide, wide[:, :, :1, :1].expand_as(wide))
    assert not torch.equal(wide, F.batch_noise(torch.ones(3, 2, 4, 4)))
    assert torch.equal(F.batch_noise(wide, 0.0, 1.0, 0.0), wide)
    layer = normkern.nn.NoisyBatchNorm2d(2)
    layer(wide)
    stock = normkern.nn.BatchNorm2d(2)
    stock.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(wide), stock.eval()(wide))


def test_weights_keep_the_variance() -> None:
    """Scaled weight standardization, and weight norm with the scaled relu, keep unit variance over 8 random layers."""
    torch.manual_seed(0)
    x = torch.randn(256, 512, 1, 1)
    for kind, act in (
        (normkern.nn.ScaledWSConv2d, nn.ReLU()),
        (normkern.nn.WeightNormConv2d, normkern.nn.ScaledReLU()),
    ):
        y = x
        for _ in range(8):
            y = kind(512, 512, 1, bias=False)(act(y))
        assert 0.8 < y.var().item() < 1.25


def test_kept_weight() -> None:
    """Made once in evaluation, and again whenever the weight, the gain or the mode has changed."""
    layer = normkern.nn.ScaledWSConv2d(3, 4, 3)
    x = torch.randn(1, 3, 5, 5)
    layer.eval()
    with torch.no_grad():
        kept = layer.normalized_weight()
        assert layer.normalized_weight() is kept
        layer(x)
        layer.weight.mul_(-1)
        assert torch.equal(layer.normalized_weight(), -kept)
        layer.gain.mul_(2)
        assert torch.equal(layer.normalized_weight(), -2 * kept)
        layer.load_state_dict({name: torch.ones_like(t) for name, t in layer.state_dict().items()})
        assert not layer.normalized_weight().any()
        layer.weight = nn.Parameter(torch.randn_like(layer.weight))
        fresh = layer.normalized_weight()
        layer.weight.data.mul_(-1)  # which no version counts
        layer.train().eval()
        assert torch.equal(layer.normalized_weight(), -fresh)
    assert layer.normalized_weight().requires_grad
    assert torch.allclose(layer.double().normalized_weight().float(), -fresh)


def test_exported() -> None:
    """Everything is there under the names of the documentation."""
    names = (
        "batch_noise evo_norm_b0 evo_norm_s0 filter_response_norm lp_batch_norm paper_group_norm scaled_relu "
        "variance_norm weight_center weight_norm weight_standardize"
    )
    for name in names.split():
        assert getattr(F, name) is getattr(normkern, name)
        doc: Any = getattr(normkern, name).__doc__
        assert doc


# ---- layers of timm


def plain_std(w: Tensor, eps: float) -> Tensor:
    flat = w.flatten(1)
    return ((flat - flat.mean(1, keepdim=True)) / (flat.var(1, correction=0, keepdim=True) + eps).sqrt()).view_as(w)


class _Stand(nn.Module):
    """The attributes of timm's layers."""

    def __init__(self, channels: int, threshold: str | None) -> None:
        super().__init__()
        for name in ("weight", "bias", *([threshold] if threshold else ())):
            setattr(self, name, nn.Parameter(torch.rand(channels) + 0.5))
        self.eps, self.groups, self.momentum, self.act = EPS, 2, 0.3, nn.SiLU()
        self.register_buffer("running_var", torch.rand(channels) + 0.5)


class FilterResponseNormTlu2d(_Stand):
    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(response(x, self.weight, self.bias), over(self.tau, x))


class FilterResponseNormAct2d(_Stand):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(response(x, self.weight, self.bias))


class EvoNorm2dS0(_Stand):
    def forward(self, x: Tensor) -> Tensor:
        return s0(x, self.weight, self.bias, self.v)


class EvoNorm2dB0(_Stand):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return b0(x, self.weight, self.bias, self.v, self.running_var)
        with torch.no_grad():
            self.running_var.lerp_(x.var((0, 2, 3)), self.momentum)
        return b0(x, self.weight, self.bias, self.v)


class StdConv2d(nn.Conv2d):
    eps = EPS

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, plain_std(self.weight, self.eps), self.bias)


class ScaledStdConv2d(nn.Conv2d):
    eps, scale = EPS, 0.25

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, plain_std(self.weight, self.eps) * self.gain * self.scale, self.bias)


FilterResponseNormTlu2d.__module__ = FilterResponseNormAct2d.__module__ = "timm.layers.filter_response_norm"
EvoNorm2dS0.__module__ = EvoNorm2dB0.__module__ = "timm.layers.evo_norm"
StdConv2d.__module__ = ScaledStdConv2d.__module__ = "timm.layers.std_conv"


def of_timm() -> list[nn.Module]:
    """The layers themselves where timm is installed, and what stands for them where it is not."""
    stand_ins: list[nn.Module] = [
        FilterResponseNormTlu2d(4, "tau"),
        FilterResponseNormAct2d(4, None),
        EvoNorm2dS0(4, "v"),
        EvoNorm2dB0(4, "v"),
        StdConv2d(4, 6, (3, 2), padding=1, groups=2),
        ScaledStdConv2d(4, 6, 3, stride=2, dilation=2),
    ]
    try:
        layers: Any = importlib.import_module("timm.layers")
    except (ImportError, RuntimeError):  # it imports torchvision, which may be built for another torch
        return stand_ins
    real: list[nn.Module] = [
        layers.FilterResponseNormTlu2d(4),
        layers.FilterResponseNormTlu2d(4, apply_act=False),
        layers.FilterResponseNormAct2d(4, act_layer=nn.SiLU),
        layers.EvoNorm2dS0(4, 2),
        layers.EvoNorm2dS0(4, 2, apply_act=False),
        layers.EvoNorm2dS0a(4, 2),
        layers.EvoNorm2dB0(4),
        layers.EvoNorm2dB0(4, apply_act=False),
        layers.StdConv2d(4, 6, (3, 2), padding=1, groups=2),
        layers.ScaledStdConv2d(4, 6, 3, stride=2, dilation=2),
    ]
    return stand_ins + real


@pytest.mark.parametrize("index", range(len(of_timm())))
def test_layers_of_timm(index: int) -> None:
    """Converted, they train as before, to the same statistics, and come back."""
    torch.manual_seed(index)
    stock = of_timm()[index].double()
    with torch.no_grad():
        for p in stock.parameters():
            p.add_(torch.rand_like(p) / 2)
    mine = copy.deepcopy(stock)
    report = normkern.convert(mine, dry_run=True)
    normkern.convert(mine)
    assert len(report.converted) == 1, str(report)
    x = torch.randn(3, 4, 9, 8, dtype=torch.float64)
    for training in (True, False):
        for module in (stock, mine):
            module.train(training)
        y, want = mine(x), stock(x)
        # In timm variances are float32.
        assert torch.allclose(y, want, rtol=1e-5, atol=1e-6)
        dy = torch.randn_like(y)
        got = torch.autograd.grad(y, list(mine.parameters()), dy, allow_unused=True)
        for a, b in zip(got, torch.autograd.grad(want, list(stock.parameters()), dy, allow_unused=True), strict=True):
            assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    for name, t in stock.state_dict().items():
        assert torch.allclose(mine.state_dict()[name], t, rtol=1e-6)
    normkern.revert(mine)
    assert type(mine) is type(stock)


def test_own_layers_are_left_alone() -> None:
    model = nn.Sequential(normkern.nn.EvoNorm2dS0(4, 2), normkern.nn.VarianceNorm2d(4), normkern.nn.WSConv2d(4, 4, 1))
    report = normkern.convert(model, dry_run=True)
    assert not report.converted
    assert not [row for row in report.skipped if "no converter" in str(row)]
