"""conv_norm.py: convolution with preconditioned channels (Liu et al. 2021, "Convolutional Normalization", ConvNorm).

The kernels of an output channel k make a block-circulant row A_k on the torus of the full convolution, (H + kh - 1) x
(W + kw - 1) points. ConvNorm multiplies the channel by V_k = S_k^(-1/2), where S_k is its power spectrum, so that
Q_k = P_k A_k has Q_k Q_k^T = I for every k (and the norm of the whole is at most sqrt(Cout)). Here S comes from the
summed autocorrelation of the kernels, 13 numbers for 3x3, and is exact on every torus; see normkern/spectrum.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normkern import spectral_product, spectrum
from normkern.checks import FLOATS, check_eps, check_flag, shape_of
from normkern.spectral_product import Route
from normkern.spectrum import Points, Torus

Pair = tuple[int, int]


def _pair(name: str, what: str, value: Any, least: int) -> Pair:
    """An int or two of them, as torch.nn.functional.conv2d takes it."""
    found = value if isinstance(value, tuple | list) else (value, value)
    ints = all(isinstance(v, int | torch.SymInt) and not isinstance(v, bool) for v in found)
    if not ints or len(found) not in (1, 2):
        raise TypeError(f"{name}: {what} must be an int or a pair of ints; got {value!r}")
    pair = found[0], found[-1]
    if min(pair) < least:
        raise RuntimeError(f"{name}: {what} must be at least {least}; got {what}={value!r}")
    return pair


def _check_weight(name: str, weight: Tensor) -> Pair:
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name}: weight must be a Tensor; got {type(weight).__name__}")
    if weight.dtype not in FLOATS:
        raise NotImplementedError(f"{name}: weight must be float64, float32, float16 or bfloat16; got {weight.dtype}")
    if weight.dim() != 4 or weight.numel() == 0:
        raise RuntimeError(
            f"{name}: weight must have shape (out_channels, in_channels / groups, rows, cols), not empty; "
            f"got {shape_of(weight)}"
        )
    return weight.shape[2], weight.shape[3]


def preconditioner(
    weight: Tensor, size: tuple[int, int] | list[int], *, dilation: int | tuple[int, int] = 1, eps: float = 1e-6
) -> Tensor:
    """V = S^(-1/2), the inverse square root of the power spectrum of each output channel.

    Args:
        weight: (Cout, Cin / groups, kh, kw), any floating dtype.
        size: rows and columns of the torus; for a convolution of an (H, W) map (H + dilation (kh - 1), W + ...). It may
            be smaller than the kernel: taps wrap.
        dilation: of the kernel, an int or a pair.
        eps: S is kept at eps times its mean over the torus of the kernel, r[0] = sum of squares of the taps, or more.
            0 is the published layer: a null of the spectrum gives inf. A channel of zeros gives 0 (with eps=0: inf).

    Returns:
        (Cout, size[0], size[1] // 2 + 1), one-sided as of torch.fft.rfft2; float64 for a float64 weight, else float32.
        S is summed in float64. Differentiable any number of times.

    Raises:
        RuntimeError: weight is not 4-D or empty, or a size is below 1. NotImplementedError: weight is not floating.
        ValueError: eps < 0. TypeError: an argument is of another type.

    Source: Liu et al. 2021 (arXiv 2103.00673), section 3; S by the theorem of Wiener and Khinchin.
    """
    name = "preconditioner"
    kernel = _check_weight(name, weight)
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise TypeError(f"{name}: size must be a pair of ints; got {size!r}")
    torus = Torus(kernel, _pair(name, "dilation", dilation, 1), _pair(name, "size", size, 1), check_eps(name, eps))
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return spectrum.inverse_root(torus, spectrum.lags(weight), dtype)


def _check_call(
    name: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: input must be a Tensor; got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise NotImplementedError(f"{name}: input must be float64, float32, float16 or bfloat16; got {x.dtype}")
    kernel = _check_weight(name, weight)
    if x.dim() != 4:
        raise RuntimeError(f"{name}: input must have shape (N, C, H, W); got {shape_of(x)}")
    for what, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: {what} must be a Tensor or None; got {type(t).__name__}")
        if t.dtype != x.dtype:
            raise RuntimeError(f"{name}: {what} must have the dtype of input; got {t.dtype} and {x.dtype}")
        if t.device != x.device:
            raise RuntimeError(f"{name}: {what} must be on the device of input; got {t.device} and {x.device}")
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"{name}: groups must be an int; got {groups!r}")
    if groups < 1 or weight.shape[0] % groups != 0:
        raise RuntimeError(
            f"{name}: groups must divide the output channels; got groups={groups} and weight of shape "
            f"{shape_of(weight)}"
        )
    if x.shape[1] != weight.shape[1] * groups:
        raise RuntimeError(
            f"{name}: input must have {weight.shape[1] * groups} channels, as weight of shape {shape_of(weight)} with "
            f"groups={groups} asks for; got input of shape {shape_of(x)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise RuntimeError(f"{name}: bias must have shape ({weight.shape[0]},); got {shape_of(bias)}")
    for i, axis in enumerate(("rows", "columns")):
        span = dilation[i] * (kernel[i] - 1)
        if x.shape[2 + i] == 0:
            raise RuntimeError(f"{name}: input must have a map of at least one point; got shape {shape_of(x)}")
        if padding[i] > span:
            raise RuntimeError(
                f"{name}: padding must be at most dilation * (kernel size - 1), which is {span} for the {axis}: the "
                f"full convolution has no further points; got padding={padding[i]}"
            )
        if span + 1 > x.shape[2 + i] + 2 * padding[i]:
            raise RuntimeError(
                f"{name}: the kernel must fit the padded map; got {span + 1} {axis} of the kernel and "
                f"{x.shape[2 + i]} + 2 * {padding[i]} of the map"
            )


def conv_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    *,
    eps: float = 1e-6,
    through_preconditioner: bool = False,
) -> Tensor:
    """2-D convolution whose output channels are preconditioned to be isometries (ConvNorm).

    The full convolution, padded by dilation * (k - 1) on every side, is a circular one; its spectrum is multiplied by
    V = S^(-1/2) of each channel, and of the result those points are kept that `padding` and `stride` ask for. The bias
    is added before, as in the paper, and so is multiplied by V at frequency 0.

    Args:
        input: (N, Cin, H, W). Half and bfloat16 are computed in float32; torch.autocast casts nothing.
        weight: (Cout, Cin / groups, kh, kw). A 1x1 kernel is divided by the norm of its row; no transform is taken.
        bias: (Cout,) or None.
        stride, dilation: ints or pairs, at least 1. padding: int or pair, 0 to dilation * (k - 1).
        eps: see preconditioner.
        through_preconditioner: whether the gradient of weight includes that of V (in closed form). The published layer
            leaves it out, and that is the default.

    Returns:
        (N, Cout, H', W') with H' and W' of torch.nn.functional.conv2d, in the dtype of input.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit, padding is too large, or the kernel does not fit the padded
            map. NotImplementedError: input is not floating. ValueError: eps < 0. TypeError: an argument is of another
            type.

    Source: Liu et al. 2021 (arXiv 2103.00673), section 3.
    """
    name = "conv_norm"
    check_flag(name, "through_preconditioner", through_preconditioner)
    eps = check_eps(name, eps)
    shape = (
        _pair(name, "stride", stride, 1),
        _pair(name, "padding", padding, 0),
        _pair(name, "dilation", dilation, 1),
        groups,
    )
    _check_call(name, input, weight, bias, *shape)
    return convolve(input, weight, bias, *shape, eps, None, through_preconditioner)


def _mean_gain(torus: Torus, lags: Tensor, dtype: torch.dtype) -> Tensor:
    """V at frequency 0, (Cout,): that of the torus of one point."""
    return spectrum.inverse_root(replace(torus, size=(1, 1)), lags, dtype).reshape(-1)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    eps: float,
    lags: Tensor | None,
    through_preconditioner: bool,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """conv_norm after its checks. `lags`, (Cout, lags) float64, are what V is made of; None: those of weight. A 1x1
    kernel may have a gain and a shift, (Cout,) each, that follow: they go into the kernel and the bias."""
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return convolve(
                x, weight, bias, stride, padding, dilation, groups, eps, lags, through_preconditioner, gain, shift
            )
    dtype = x.dtype
    if dtype not in (torch.float32, torch.float64):
        x, weight, bias = x.float(), weight.float(), None if bias is None else bias.float()
    if lags is None:
        lags = spectrum.lags(weight if through_preconditioner else weight.detach())
    if weight.shape[2] == 1 and weight.shape[3] == 1:
        scale = _mean_gain(Torus((1, 1), (1, 1), (1, 1), eps), lags, x.dtype)
        scale = scale if gain is None else scale * gain
        weight = weight * scale.reshape(-1, 1, 1, 1)
        bias = None if bias is None else bias * scale
        if shift is not None:
            bias = shift.to(x.dtype) if bias is None else bias + shift
        return F.conv2d(x, weight, bias, stride, groups=groups).to(dtype)

    reach = dilation[0] * (weight.shape[2] - 1), dilation[1] * (weight.shape[3] - 1)
    size = x.shape[2] + reach[0], x.shape[3] + reach[1]
    torus = Torus((weight.shape[2], weight.shape[3]), dilation, size, eps)
    rows, cols = (
        Points(reach[i] - padding[i], stride[i], (size[i] - 2 * (reach[i] - padding[i]) - 1) // stride[i] + 1)
        for i in (0, 1)
    )
    route = Route(torus, padding, (x.shape[2], x.shape[3]), stride, (rows.count, cols.count))
    spectral = x.numel() > 0 and not lags.requires_grad and spectral_product.takes(route, x, groups)
    if spectral and spectral_product.pays(route, x, weight):
        y = spectral_product.convolve(route, x, weight, lags)
        if bias is not None:  # the general way adds it before V
            y = y + (bias * _mean_gain(torus, lags, x.dtype)).reshape(-1, 1, 1)
        return y.to(dtype)
    c = F.conv2d(x, weight, bias, 1, reach, dilation, groups)
    if c.numel() == 0:
        return c[:, :, rows.slice(), cols.slice()].to(dtype)
    return spectrum.precondition(torus, c, lags, torus.whole(), (rows, cols)).to(dtype)
