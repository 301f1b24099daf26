"""sync.py: batch norm with the statistics of all processes of a group."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from normkern.nn import norm


def normalize_batch(module: Any, input: Tensor, residual: Tensor | None = None, act: str | None = None) -> Tensor:
    """norm.normalize_batch; in training over the processes of module.process_group (absent or None: all of them)."""
    if not module.training:
        return norm.normalize_batch(module, input, residual, act)
    from normkern.distributed import sync_batch_norm  # not before someone wants it: most programs never do

    function = functools.partial(
        sync_batch_norm,
        process_group=getattr(module, "process_group", None),
        skip_nonfinite=getattr(module, "skip_nonfinite", False),
    )
    return norm.normalize_batch(module, input, residual, act, function)


class SyncBatchNorm(norm._BatchNorm):
    """torch.nn.SyncBatchNorm, on any device and in one graph of torch.compile: (N, C, ...), where N may differ between
    processes and be 0.

    Without torch.distributed, or with one process, it is batch norm. It is no subclass of torch.nn.SyncBatchNorm,
    because DistributedDataParallel refuses modules that contain one on the CPU.
    """

    process_group: Any = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        act: str | None = None,
        **more: Any,  # what the stock layer of this torch and normkern's batch norms know besides
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype, act=act, **more
        )
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"SyncBatchNorm: input must have at least 2 dimensions; got shape {tuple(input.shape)}")

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return normalize_batch(self, input, residual, self.act)
