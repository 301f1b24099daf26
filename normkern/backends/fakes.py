"""fakes.py: what the operators of a backend return, without computing it: for torch.compile and opcheck. The arguments
are those of torch.ops.normkern (csrc/bind/ops_cpu.cpp), which torch.ops.normkern_triton shares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normkern.problem import MASKED, NEED_DBIAS, NEED_DRESIDUAL, NEED_DWEIGHT, NEED_DX, Moments


def like(x: Tensor, wanted: bool = True) -> Tensor:
    return x.new_empty_strided(x.shape, x.stride()) if wanted else x.new_empty(0)


def _group_vectors(x: Tensor, stats: list[int], moments: int, save: bool) -> tuple[Tensor, Tensor]:
    groups = stats[0] * stats[2]
    return (
        x.new_empty(groups if save and moments == Moments.mean_var else 0, dtype=torch.float64),
        x.new_empty(groups if save and moments != Moments.given else 0, dtype=torch.float64),
    )


def _gradients(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, affine: list[int], needs: int
) -> tuple[Tensor, Tensor, Tensor]:
    groups = affine[0] * affine[2]
    return (
        like(x, bool(needs & NEED_DX)),
        (x if weight is None else weight).new_empty(groups if needs & NEED_DWEIGHT else 0),
        (x if bias is None else bias).new_empty(groups if needs & NEED_DBIAS else 0),
    )


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    stats: list[int],
    affine: list[int],
    moments: int,
    act: int,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return like(x), *_group_vectors(x, stats, moments, save)


def batch_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    channels: list[int],
    act: int,
    eps: float,
    momentum: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return like(x), *_group_vectors(x, channels, Moments.mean_var, True)


def masked_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    stats: list[int],
    affine: list[int],
    moments: int,
    eps: float,
    momentum: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    together = MASKED // x.element_size()
    mask = x.new_empty((x.numel() + together - 1) // together, dtype=torch.uint8)
    return like(x), *_group_vectors(x, stats, moments, True), mask


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    stats: list[int],
    affine: list[int],
    moments: int,
    act: int,
    eps: float,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_gradients(x, weight, bias, affine, needs), like(x, bool(needs & NEED_DRESIDUAL))


def add_forward(
    x: Tensor,
    add: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: list[int],
    affine: list[int],
    moments: int,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return like(x), like(x), *_group_vectors(x, stats, moments, save)


def add_backward(
    dy: Tensor,
    dtotal: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    stats: list[int],
    affine: list[int],
    moments: int,
    eps: float,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(x, weight, bias, affine, needs)


def moments(x: Tensor, stats: list[int], moments: int) -> tuple[Tensor, Tensor]:
    return _group_vectors(x, stats, moments, True)
