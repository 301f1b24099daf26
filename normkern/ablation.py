"""ablation.py: batch norms that take something away or put something in, to see what matters.

Santurkar et al., "How Does Batch Normalization Help Optimization?" (2018): norms by other moments than the second
(section 3.3), and noise that undoes what batch norm does to distributions (section 2.1). Made of torch's operators.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from normkern.checks import (
    check_enough_values,
    check_eps,
    check_flag,
    check_float,
    check_input,
    check_parameter,
    spatial_count,
)
from normkern.functional import _empty, moments

_ORDERS = (1, 2, math.inf)


def _check_order(name: str, p: float) -> None:
    if p not in _ORDERS:
        raise ValueError(f"{name}: p must be 1, 2 or inf; got p={p!r}")


def _size(x: Tensor, p: float, eps: float) -> Tensor:
    """The average p-norm of every channel; the largest magnitude for inf."""
    dims = [d for d in range(x.dim()) if d != 1]
    if p == 2:
        return (x.square().mean(dims) + eps).sqrt()
    return (x.abs().mean(dims) if p == 1 else x.abs().amax(dims)) + eps


def lp_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_size: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    p: float = 2,
    centered: bool = False,
    unit_gaussian: bool = False,
) -> Tensor:
    """(x - mean) / (average p-norm of the channel) * weight + bias.

    The average 1-norm is mean |x|, the 2-norm sqrt(mean x^2 + eps), the inf-norm max |x|; eps is added to the first and
    the last. As the paper has it the norm is that of x before the mean is taken off; with `centered` it is that of
    x - mean, and p=2 is batch norm. In training the running statistics, if given, move by `momentum`.

    Args:
        input: (N, C, ...); the parameters and running_mean, running_size: (C,).
        p: 1, 2 or inf.
        unit_gaussian: multiplies the 1-norm by sqrt(pi/2), so that it is 1 for a standard normal variable, as the
            2-norm is; the others stay.

    Raises:
        ValueError: another p, a negative eps, or one value per channel in training.
        RuntimeError: no running statistics outside training, or a parameter is not of shape (C,).
    """
    name = "lp_batch_norm"
    _check_order(name, p)
    check_flag(name, "training", training)
    check_flag(name, "centered", centered)
    check_flag(name, "unit_gaussian", unit_gaussian)
    check_input(name, input, 2)
    eps, momentum = check_eps(name, eps), check_float(name, "momentum", momentum)
    shape = input.shape[1:2]
    weight = check_parameter(name, "weight", weight, shape, input)
    bias = check_parameter(name, "bias", bias, shape, input)
    kept_mean = check_parameter(name, "running_mean", running_mean, shape, input)
    kept_size = check_parameter(name, "running_size", running_size, shape, input)
    if (kept_mean is None) != (kept_size is None):
        raise ValueError(f"{name}: running_mean and running_size must both be given or both be None")
    if not training and (kept_mean is None or kept_size is None):
        raise RuntimeError(f"{name}: running_mean and running_size must be given where training=False; got None")
    if training:
        check_enough_values(name, input.shape[0] * spatial_count(input), "value per channel", input)
    if input.numel() == 0:
        return _empty(input, weight, bias)

    wide = input if input.dtype is torch.float64 else input.float()
    over = [1, -1] + [1] * (input.dim() - 2)
    if training:
        mean = moments(input, [d for d in range(input.dim()) if d != 1])[0]
        centred = wide - mean.view(over)
        size = _size(centred if centered else wide, p, eps)
        if p == 1 and unit_gaussian:
            size = size * math.sqrt(math.pi / 2)
        with torch.no_grad():
            for running, value in ((running_mean, mean), (running_size, size)):
                if running is not None:
                    running.copy_(running.double() * (1 - momentum) + value.double() * momentum)
    else:
        assert kept_mean is not None
        assert kept_size is not None
        centred, size = wide - kept_mean.view(over).to(wide.dtype), kept_size.to(wide.dtype)
    y = centred * (1 / size if weight is None else weight / size).view(over)
    return (y if bias is None else y + bias.view(over)).to(input.dtype)


def batch_noise(
    input: Tensor,
    mean_range: float = 0.5,
    scale_range: float = 1.25,
    jitter: float = 0.1,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """s * x + m, where the distribution of s and m is drawn anew for every channel at every call.

    Noise after batch norm (Santurkar et al. 2018, section 2.1) with a non-zero mean and a non-unit variance: for each
    channel mu ~ U(-mean_range, mean_range) and sigma ~ U(1, scale_range), and then for each sample
    m ~ U(mu - jitter, mu + jitter) and s ~ N(sigma, jitter), the same at all positions. The paper's summaries at hand
    say that the noise is drawn per step and per unit; the shape of the distributions and the default constants are not
    confirmed by its text.

    Args:
        input: (N, C, ...).
        generator: of input's device; None: torch's own.

    Raises:
        ValueError: mean_range or jitter is negative, or scale_range below 1.
    """
    name = "batch_noise"
    check_input(name, input, 2)
    mean_range, scale_range, jitter = _check_noise(name, mean_range, scale_range, jitter)
    n, c = input.shape[:2]
    draw: dict[str, Any] = {"generator": generator, "device": input.device, "dtype": torch.float32}
    mu = (2 * torch.rand(c, **draw) - 1) * mean_range
    sigma = 1 + torch.rand(c, **draw) * (scale_range - 1)
    m = mu + (2 * torch.rand(n, c, **draw) - 1) * jitter
    s = sigma + torch.randn(n, c, **draw) * jitter
    over = [n, c] + [1] * (input.dim() - 2)
    return input * s.view(over).to(input.dtype) + m.view(over).to(input.dtype)


def _check_noise(name: str, mean_range: float, scale_range: float, jitter: float) -> tuple[float, float, float]:
    mean_range, jitter = check_float(name, "mean_range", mean_range), check_float(name, "jitter", jitter)
    scale_range = check_float(name, "scale_range", scale_range)
    for what, value, least in (("mean_range", mean_range, 0), ("scale_range", scale_range, 1), ("jitter", jitter, 0)):
        if not value >= least:
            raise ValueError(f"{name}: {what} must be at least {least}; got {what}={value}")
    return mean_range, scale_range, jitter
