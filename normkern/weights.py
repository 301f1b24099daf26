"""weights.py: normalizations of a layer's weight instead of its input, and the activation that goes with them.

`weight` is (Cout, ...) as convolutions and linear layers have it; every output channel is a group, with or without a
gain. Results and gradients keep its dtype and layout, and everything is differentiable any number of times.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from normkern import aten, autograd, direct, problem
from normkern.autograd import same_buffer
from normkern.backends import Backend, select
from normkern.checks import check_eps, check_flag, check_input, check_parameter
from normkern.family import _check_variant
from normkern.functional import _fit, _normalize, moments
from normkern.problem import Moments, Problem

# relu of a standard normal variable has the mean 1/sqrt(2 pi) and the variance (pi - 1)/(2 pi).
RELU_MEAN = 1 / math.sqrt(2 * math.pi)
RELU_GAIN = math.sqrt(2 * math.pi / (math.pi - 1))


def _check_weight(name: str, weight: Tensor, gain: Tensor | None) -> Tensor | None:
    """The gain as (Cout,)."""
    check_input(name, weight, 2)
    if gain is not None and isinstance(gain, Tensor) and gain.numel() == weight.shape[0]:
        gain = gain.reshape(-1)
    return check_parameter(name, "gain", gain, weight.shape[:1], weight)


def _by_channel(t: Tensor, weight: Tensor) -> Tensor:
    return t.reshape(-1, *[1] * (weight.dim() - 1))


def _wide(weight: Tensor) -> Tensor:
    """What the formulas compute in, so that gradients that meet in the weight are rounded once."""
    return weight if weight.dtype is torch.float64 else weight.float()


def _root(square: Tensor) -> Tensor:
    """The square root, with the derivative 0 at 0, as torch's vector norms have it."""
    zero = square == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt())


def weight_standardize(
    weight: Tensor, gain: Tensor | None = None, eps: float = 1e-5, *, scaled: bool = False, variant: str = "torch"
) -> Tensor:
    """(weight - mean) / sqrt(var + eps) * gain, mean and biased variance those of each output channel.

    Weight standardization (Qiao et al. 2019). With `scaled` also times sqrt(2 pi/(pi - 1)) / sqrt(fan-in), so that a
    layer keeps the variance of what comes out of a relu: scaled weight standardization (Brock et al. 2021) with the
    gain of relu folded in, as in Lubana et al. 2021.

    Args:
        weight: (Cout, ...) with at least 2 dimensions.
        gain: (Cout,), or Cout numbers in any shape.
        variant: "paper" (Lubana et al.) divides by sqrt(var) + eps.

    Raises:
        RuntimeError: weight has fewer than 2 dimensions, or gain is not of size Cout.
        ValueError: a negative eps, or an unknown variant.
    """
    name = "weight_standardize"
    call = factors = None
    if variant == "torch" and isinstance(weight, Tensor) and weight.dim() > 1 and weight.shape[0] > 0:
        factors = _factors(weight, gain, scaled)
        call = "standardize", weight, factors, None, None, None, None, eps, scaled
        y = direct.run(call, None)
        if y is not None:
            return y
    gain = _check_weight(name, weight, gain)
    eps, paper = check_eps(name, eps), _check_variant(name, variant)
    check_flag(name, "scaled", scaled)
    if weight.numel() == 0:
        return weight.clone()
    if paper:
        wide = _wide(weight)
        mean, var = (_by_channel(m, weight) for m in moments(wide, tuple(range(1, weight.dim()))))
        factor = 1 / (_root(var) + eps)
        if (factors := _factors(weight, gain, scaled)) is not None:
            factor = factor * _by_channel(factors, weight)
        return ((wide - mean) * factor).to(weight.dtype)
    dense, found = _fit(weight, problem.kernel, eps)
    return _normalize(weight, dense, found, factors, None, None, call=call)[0]


def _scale(weight: Tensor) -> float:
    """What scaled weight standardization multiplies a standardized weight by."""
    return RELU_GAIN / math.sqrt(max(math.prod(weight.shape[1:]), 1))


def _factors(weight: Tensor, gain: Tensor | None, scaled: bool) -> Tensor | None:
    """What each standardized channel is multiplied by, (Cout,)."""
    scale = _scale(weight) if scaled else 1.0
    if isinstance(gain, Tensor):
        gain = gain.reshape(-1)
        return gain * scale if scaled else gain
    return torch.full((weight.shape[0],), scale, device=weight.device) if scaled else None


def weight_norm(v: Tensor, g: Tensor | None = None, eps: float = 0.0) -> Tensor:
    """g * v / (|v| + eps), |v| the length of each output channel's part of v.

    Weight normalization (Salimans and Kingma 2016), over all dimensions but the first. With eps=0 a channel of zeros is
    NaN, as in torch.nn.utils.parametrizations.weight_norm; Lubana et al. 2021 have an eps.

    Args:
        v: (Cout, ...) with at least 2 dimensions; g: (Cout,), or Cout numbers in any shape.

    Raises:
        RuntimeError: v has fewer than 2 dimensions, or g is not of size Cout.
        ValueError: a negative eps.
    """
    name = "weight_norm"
    g = _check_weight(name, v, g)
    eps = check_eps(name, eps)
    if v.numel() == 0:
        return v.clone()
    size = v[0].numel()
    if eps:
        wide = _wide(v)
        mean, var = moments(wide, tuple(range(1, v.dim())))
        factor = 1 / (_root((var + mean.square()) * size) + eps)
        factor = factor if g is None else factor * g
        return (wide * _by_channel(factor, v)).to(v.dtype)
    share = 1 / math.sqrt(size)
    gain = torch.full((v.shape[0],), share, device=v.device, dtype=torch.float64) if g is None else g.double() * share
    dense, found = _fit(v, problem.kernel, 0.0, True)
    return _normalize(v, dense, found, gain, None, None)[0]


class _Center(torch.autograd.Function):
    """x - mean of its group: its own adjoint."""

    @staticmethod
    def forward(ctx: Any, found: Problem, backend: Backend, x: Tensor) -> Tensor:
        mean, _ = backend.moments(found, x)
        given = Problem(found.stats, found.affine, Moments.given, eps=0.0)
        return backend.forward(given, x, None, None, None, mean, torch.ones_like(mean), False)[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None, Tensor]:
        return None, None, weight_center(dy)


def weight_center(weight: Tensor) -> Tensor:
    """weight - mean of each output channel; Lubana et al. 2021.

    Args:
        weight: (Cout, ...) with at least 2 dimensions.

    Raises:
        RuntimeError: weight has fewer than 2 dimensions.
    """
    check_input("weight_center", weight, 2)
    if weight.numel() == 0:
        return weight.clone()
    if autograd._transformed() or aten.exporting():
        return weight - weight.mean(tuple(range(1, weight.dim())), keepdim=True)
    dense, found = _fit(weight, problem.kernel)
    y: Tensor = _Center.apply(found, select(dense), dense)  # type: ignore[no-untyped-call]
    return y if dense is weight else same_buffer(y, torch.empty_like(weight))


def scaled_relu(input: Tensor) -> Tensor:
    """sqrt(2 pi/(pi - 1)) * (relu(x) - 1/sqrt(2 pi)): mean 0 and variance 1 where x is a standard normal variable.

    The activation of normalization propagation (Arpit et al. 2016), which Lubana et al. 2021 put after weight norm.
    """
    check_input("scaled_relu", input, 0)
    return (torch.relu(input) - RELU_MEAN) * RELU_GAIN
