"""sync.py: batch norm with the statistics of all processes of a group."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from normkern.nn import norm


def normalize_batch(module: Any, input: Tensor, residual: Tensor | None = None, act: str | None = None) -> Tensor:
    """norm.normalize_batch, over the group of the module where there is more than one process."""
    return norm.normalize_batch(module, input, residual, act)


class SyncBatchNorm(norm._BatchNorm):
    process_group: Any = None

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return normalize_batch(self, input, residual, self.act)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"SyncBatchNorm: input must have at least 2 dimensions; got shape {tuple(input.shape)}")
