# The oracle of ConvNorm: the steps of the paper (Liu et al. 2021), one after another and nothing shared with normkern.
# Also the rival of bench/bench_conv_norm.py: V by an FFT of every padded kernel.
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dilated(weight: Tensor, dilation: tuple[int, int]) -> Tensor:
    """The kernel with its holes filled with zeros."""
    out, depth, rows, cols = weight.shape
    whole = weight.new_zeros(out, depth, dilation[0] * (rows - 1) + 1, dilation[1] * (cols - 1) + 1)
    whole[:, :, :: dilation[0], :: dilation[1]] = weight
    return whole


def wrapped(weight: Tensor, size: tuple[int, int]) -> Tensor:
    """The kernel on a torus that may be smaller than it: taps that fall on one point add up."""
    torus = weight.new_zeros(*weight.shape[:2], *size)
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            torus[:, :, i % size[0], j % size[1]] += weight[:, :, i, j]
    return torus


def preconditioner(weight: Tensor, size: tuple[int, int]) -> Tensor:
    """V, coded as in the paper: exp(-log(S) / 2), S summed over the input channels."""
    power = torch.fft.rfft2(weight, s=size).abs().square().sum(1)
    return torch.exp(-0.5 * torch.log(power))


def conv_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """Full convolution, spectrum times V, crop to the padding, every stride-th point."""
    kernel = dilated(weight, dilation)
    reach = kernel.shape[2] - 1, kernel.shape[3] - 1
    c = F.conv2d(x, kernel, bias, stride=1, padding=reach, groups=groups)
    size = c.shape[2], c.shape[3]
    p = torch.fft.irfft2(preconditioner(kernel, size) * torch.fft.rfft2(c), s=size)
    top, left = reach[0] - padding[0], reach[1] - padding[1]
    return p[:, :, top : size[0] - top : stride[0], left : size[1] - left : stride[1]]
