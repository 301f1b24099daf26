"""triton_spectrum.py: ConvNorm's operators in Triton, torch.ops.normkern_triton, for normkern/spectrum.py.

Their arguments are those of torch.ops.normkern's. Transforms are torch.fft's; strides are not folded into them.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normkern.backends.triton_launch import running_on

LAG_TILE = 128  # input channels that a program sums at a time, at most
FREQUENCIES = 256  # of a program
INTERPRETED_FREQUENCIES = 8192  # the interpreter's time goes by programs


@functools.cache
def _kernels() -> Any:
    return importlib.import_module("normkern.backends.triton_spectral_kernels")


def lag_count(kernel: Sequence[int]) -> int:
    """Half of the (2 kh - 1) x (2 kw - 1) plane, with the origin."""
    return ((2 * kernel[0] - 1) * (2 * kernel[1] - 1) + 1) // 2


@torch.library.custom_op("normkern_triton::lags", mutates_args=())
def lags(weight: Tensor) -> Tensor:
    out, depth, rows, cols = weight.shape
    count = lag_count((rows, cols))
    found = weight.new_empty((out, count), dtype=torch.float64)
    if found.numel():
        tile = min(LAG_TILE, 1 << max(depth - 1, 0).bit_length())
        with running_on(weight.device):
            _kernels().sum_lags[(out * count,)](weight, found, depth, rows, cols, J=tile)
    return found


@functools.lru_cache(maxsize=64)
def _waves(rows: int, cols: int, device: torch.device) -> Tensor:
    """cos and sin of 2 pi i / rows, then of 2 pi i / cols."""
    turns = [torch.arange(n, dtype=torch.float64) * (2 * torch.pi / n) for n in (rows, cols)]
    return torch.cat([wave(turn) for turn in turns for wave in (torch.cos, torch.sin)]).to(device)


def _multiply(
    x: Tensor | None, y: Tensor, lags: Tensor, taps: list[int], torus: list[int], batch: int, eps: float
) -> Tensor:
    channels, (rows, cols) = lags.shape[0], torus
    each = FREQUENCIES if lags.is_cuda else INTERPRETED_FREQUENCIES
    tiles = -(-rows * (cols // 2 + 1) // each)
    if y.numel():
        kh, kw, down, right = taps
        with running_on(lags.device):
            _kernels().multiply[(channels * tiles,)](
                x, y, lags, _waves(rows, cols, lags.device), batch, channels, rows, cols, kh, kw,
                down % rows, right % cols, EPS=eps, F=each,
            )  # fmt: skip
    return y


@torch.library.custom_op("normkern_triton::inverse_root", mutates_args=())
def inverse_root(lags: Tensor, taps: list[int], torus: list[int], eps: float, wide: bool) -> Tensor:
    dtype = torch.float64 if wide else torch.float32
    v = lags.new_empty((lags.shape[0], torus[0], torus[1] // 2 + 1), dtype=dtype)
    return _multiply(None, v, lags, taps, torus, 1, eps)


@torch.library.custom_op("normkern_triton::spectral_multiply", mutates_args=())
def spectral_multiply(
    x: Tensor, lags: Tensor, taps: list[int], torus: list[int], fold: list[int], eps: float
) -> Tensor:
    if fold != [0, 1, 0, 1]:
        raise RuntimeError(f"spectral_multiply: Triton folds no spectra; got fold={fold}")
    return _multiply(x, torch.empty_like(x), lags, taps, torus, x.shape[0], eps)
