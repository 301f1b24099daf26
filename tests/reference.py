# The oracle: every norm in float64 on the inputs as rounded, straight from the formulas, and for each value how far a
# correct kernel may be from it. Knows what a norm means (cases.Case) and nothing of memory, backends or normkern.
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from cases import MOMENTUM, Case, Inputs, build
from torch import Tensor

# A result may be half a unit in its last place from the truth, plus C unit roundoffs u of the compute type (float32, or
# float64 for float64) times a scale S. S is the sum of the magnitudes that enter the value, so that cancellation is
# allowed for. C covers constants: the roundings of one element's chain (about 6) and those inside one thread's sums.
C = 16
BIT_EQUAL = 0.995  # share of half precision results that must be the correctly rounded ones
# Largest slope and curvature of each activation: what an error in z does to act(z) and act'(z). A kink has no
# curvature; `inputs_for` keeps dy zero where rounding could cross it.
SLOPE = {None: 1.0, "relu": 1.0, "leaky_relu": 1.0, "silu": 1.1, "gelu": 1.13}
CURVATURE = {None: 0.0, "relu": 0.0, "leaky_relu": 0.0, "silu": 0.5, "gelu": 0.8}
LEAK = 0.01


@dataclass
class Expected:
    value: Tensor  # float64
    scale: Tensor  # S, float64
    unit: float  # unit roundoff of the type that x is computed in
    dtype: torch.dtype  # of the result
    rounded: bool = False  # half precision: must mostly equal the rounded truth bit for bit


def act(name: str | None, z: Tensor) -> tuple[Tensor, Tensor]:
    """The activation and its derivative."""
    one = torch.ones_like(z)
    if name == "relu":
        return z.clamp(min=0), (z > 0).double()
    if name == "leaky_relu":
        return torch.where(z < 0, LEAK * z, z), torch.where(z > 0, one, LEAK * one)
    if name == "silu":
        s = torch.sigmoid(z)
        return z * s, s * (1 + z * (1 - s))
    if name == "gelu":
        cdf = 0.5 * torch.special.erfc(-z / math.sqrt(2))
        return z * cdf, cdf + z * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return z, one


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each row. The mean is corrected once, so that it is right to the last bit."""
    mean = x.mean(1, keepdim=True)
    mean = mean + (x - mean).mean(1, keepdim=True).where(mean.isfinite(), 0)  # inf - inf would be nan
    return mean, (x - mean).square().mean(1, keepdim=True)


def default_eps(case: Case) -> float:
    # rms_norm's eps=None is the epsilon of the type that torch computes in.
    half = case.dtype in ("float16", "bfloat16")
    return case.eps if case.eps is not None else torch.finfo(torch.float32 if half else case.torch_dtype).eps


@dataclass
class Forward:
    mean: Tensor  # [groups, 1]
    var: Tensor  # [groups, 1]
    rstd: Tensor
    rstd_scale: Tensor
    xhat: Tensor  # shape of x, like the rest
    weight: Tensor
    z: Tensor
    xhat_scale: Tensor
    z_scale: Tensor


def forward(case: Case, i: Inputs) -> Forward:
    x = case.grouped(i.x.double())
    if case.given:
        assert i.running_mean is not None
        assert i.running_var is not None
        mean, var = i.running_mean.double().unsqueeze(1), i.running_var.double().unsqueeze(1)
    elif case.second:
        mean, var = torch.zeros(x.shape[0], 1, dtype=torch.float64), x.square().mean(1, keepdim=True)
    else:
        mean, var = moments(x)
    rstd = (var + default_eps(case)).rsqrt()
    xhat = (x - mean) * rstd
    # Where the scale of xhat is more than |xhat|: the error of the mean. A one-float mean would give k = |mean| * rstd
    # here and the error would grow with the offset. The mean is two floats that were summed around a shift, so its
    # error is in proportion to the spread of the group: 1 standard deviation. No k, at any offset.
    xhat_scale = xhat.abs() + (0 if case.given or case.second else var.sqrt() * rstd)
    rstd_scale = torch.ones_like(var)
    if case.dtype == "float64" and x.shape[1]:
        # Nobody promises float64 at more than float64. The saved mean and those that are merged are one float64: their
        # last place counts (k). Sums are around one of the values: if that is an outlier, its xhat^2 magnifies them.
        k = mean.abs() * rstd
        outlier = 0 if case.given or case.second else xhat.abs().amax(1, keepdim=True)
        rstd_scale = rstd_scale + k + outlier**2
        xhat_scale = xhat_scale + k + outlier + xhat.abs() * rstd_scale
    xhat, xhat_scale = case.ungrouped(xhat), case.ungrouped(xhat_scale.expand_as(x))
    one = torch.ones(case.param_shape, dtype=torch.float64)
    weight = case.broadcast(one if i.weight is None else i.weight.double())
    bias = case.broadcast(0 * one if i.bias is None else i.bias.double())
    residual = torch.zeros((), dtype=torch.float64) if i.residual is None else i.residual.double()
    z = xhat * weight + bias + residual
    z_scale = weight.abs() * xhat_scale + bias.abs() + residual.abs()
    return Forward(mean, var, rstd, rstd_scale, xhat, weight, z, xhat_scale, z_scale)


def inputs_for(case: Case) -> Inputs:
    """The inputs of a case, with dy = 0 where rounding may put z on the other side of relu's kink."""
    i = build(case)
    if case.act in ("relu", "leaky_relu"):
        f = forward(case, i)
        i.dy.masked_fill_(f.z.abs() <= 2 * C * unit(case.torch_dtype) * f.z_scale, 0)
    return i


def unit(dtype: torch.dtype) -> float:
    return 2.0**-53 if dtype == torch.float64 else 2.0**-24


def expected(case: Case, i: Inputs) -> dict[str, Expected]:
    """Everything a call and its backward pass produce."""
    f = forward(case, i)
    u, dtype, param_dtype = unit(case.torch_dtype), case.torch_dtype, case.torch_param_dtype
    y, slope = act(case.act, f.z)
    out = {"y": Expected(y, SLOPE[case.act] * f.z_scale, u, dtype, rounded=True)}

    dy = i.dy.double()
    dz = dy * slope
    dz_scale = dz.abs()
    if CURVATURE[case.act]:
        dz_scale = dz_scale + dy.abs() * CURVATURE[case.act] * f.z_scale
    if i.residual is not None:
        out["dresidual"] = Expected(dz, dz_scale, u, dtype, rounded=True)
    # A sum's scale is the sum of the magnitudes, its own length not included: partial sums are float64.
    if i.weight is not None:
        scale = case.unbroadcast(dz_scale * f.xhat_scale)
        out["dweight"] = Expected(case.unbroadcast(dz * f.xhat), scale, u, param_dtype)
    if i.bias is not None:
        out["dbias"] = Expected(case.unbroadcast(dz), case.unbroadcast(dz_scale), u, param_dtype)

    g, xhat = case.grouped(dz * f.weight), case.grouped(f.xhat)
    g_scale, xhat_scale = case.grouped(dz_scale * f.weight.abs()), case.grouped(f.xhat_scale)
    dx, scale = g, g_scale
    if not case.given:
        c1, c1_scale = (g * xhat).mean(1, keepdim=True), (g_scale * xhat_scale).mean(1, keepdim=True)
        dx = dx - xhat * c1
        scale = scale + xhat.abs() * c1_scale + xhat_scale * c1.abs()
        if not case.second:
            dx = dx - g.mean(1, keepdim=True)
            scale = scale + g_scale.mean(1, keepdim=True)
        scale = scale + dx.abs() * f.rstd_scale
    out["dx"] = Expected(case.ungrouped(f.rstd * dx), case.ungrouped(f.rstd * scale), u, dtype, rounded=True)

    if i.running_mean is not None and i.running_var is not None and case.training and case.numel:
        out |= running(case, i, f)
    return out


def running(case: Case, i: Inputs, f: Forward) -> dict[str, Expected]:
    """Running statistics after one step: the unbiased variance, instance norm's averaged over the batch."""
    assert i.running_mean is not None
    assert i.running_var is not None
    count = case.numel // f.mean.shape[0]
    means, variances = f.mean.view(-1, case.shape[1]), f.var.view(-1, case.shape[1])
    unbiased = variances.mean(0) * count / (count - 1)
    old_mean, old_var = i.running_mean.double(), i.running_var.double()
    keep, u, dtype = 1 - MOMENTUM, unit(case.torch_dtype), i.running_mean.dtype
    # The mean is known to a fraction of the spread, and means of several instances may cancel.
    mean_scale = means.abs().mean(0) + variances.sqrt().mean(0)
    var_scale = unbiased
    if case.dtype == "float64":  # differences of float64 means enter the variance: see `forward`
        var_scale = unbiased * (1 + (means.abs() / variances.sqrt().clamp(min=1e-300)).amax(0))
    return {
        "running_mean": Expected(
            keep * old_mean + MOMENTUM * means.mean(0), keep * old_mean.abs() + MOMENTUM * mean_scale, u, dtype
        ),
        "running_var": Expected(keep * old_var + MOMENTUM * unbiased, keep * old_var + MOMENTUM * var_scale, u, dtype),
    }


def half_ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance between neighbours of `value` in dtype, as float64; denormals included."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(value.abs().clamp(min=info.smallest_normal))[1] - 1
    return torch.ldexp(torch.full_like(value, info.eps / 2), exponent)


def compare(name: str, got: Tensor, want: Expected, case: object = "") -> float:
    """Assert that `got` is within the bound of `want`; returns the largest share of C that was used."""
    assert got.dtype == want.dtype, f"{case}: {name} is {got.dtype}, not {want.dtype}"
    assert got.shape == want.value.shape, f"{case}: {name} has shape {tuple(got.shape)}, not {tuple(want.value.shape)}"
    if got.numel() == 0:
        return 0.0
    got = got.detach().cpu()
    largest = torch.finfo(want.dtype).max * (1 + torch.finfo(want.dtype).eps / 4)  # from here on it rounds to inf
    value = torch.where(want.value.abs() < largest, want.value, want.value * torch.inf)
    finite = value.isfinite()
    if not finite.all():
        same = torch.where(value.isnan(), got.isnan(), got.double() == value) | finite
        assert same.all(), f"{case}: {name} is not nan or inf where the truth is, e.g. at {first(~same)}"
    error = torch.where(finite, (got.double() - value).abs(), 0)
    # Float32 values near the smallest normal lose digits in kernels too, hence the floor.
    floor = torch.finfo(torch.float64 if want.unit < 2**-50 else torch.float32).tiny
    allowed = C * want.unit * want.scale + floor
    rounding = half_ulp(value, want.dtype)
    used = torch.where(finite, (error - rounding).clamp(min=0) / allowed, 0)
    worst = used.max().item()
    assert not used.isnan().any(), f"{case}: {name} is nan at {first(used.isnan())} where the truth is finite"
    if worst > 1:
        at = first(used == worst)
        raise AssertionError(
            f"{case}: {name}{at} = {got[at].item()!r}, truth {value[at].item()!r}: error {error[at].item():.3g} is "
            f"{C * worst:.3g} u*S beyond half an ulp (allowed {C}); so are {int((used > 1).sum())} of {used.numel()}"
        )
    if want.rounded and want.dtype in (torch.float16, torch.bfloat16):
        # Where terms cancel, their rounding in float32 outweighs the last place of the result: no say there.
        settled = finite & (allowed <= rounding / 4)
        differ = int((settled & (got != value.to(want.dtype))).sum())
        allowed_to_differ = max(2, round((1 - BIT_EQUAL) * int(settled.sum())))
        assert differ <= allowed_to_differ, (
            f"{case}: {name}: {differ} of {int(settled.sum())} are not the correctly rounded value"
        )
    return C * worst


def first(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero()[0].tolist())


def relative_error(got: Tensor, value: Tensor) -> float:
    """Relative L2 error."""
    return ((got.double() - value).norm() / value.norm()).item()
