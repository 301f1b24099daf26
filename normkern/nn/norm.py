"""norm.py: torch.nn's norm layers with another forward.

They are subclasses: state dicts, isinstance tests, weight-decay groups and SyncBatchNorm's conversion go on working.
`act` is applied after the norm, and forward takes a `residual` that is added before it; both are optional. Layers with
running statistics take `skip_nonfinite`: a batch with an infinite or NaN moment leaves the statistics alone, and is not
counted.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normkern import functional as F
from normkern.checks import check_act, check_flag


class _WithAct(torch.nn.Module):
    """What all layers here add to the stock ones: a keyword `act`."""

    act: str | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """The signature that people and tools see: that of the stock layer, and what is added here."""
        super().__init_subclass__(**kwargs)
        found: dict[str, inspect.Parameter] = {}
        for kind in reversed(cls.__mro__):
            if "__init__" in kind.__dict__ and kind not in (object, torch.nn.Module):
                own = inspect.signature(kind.__dict__["__init__"]).parameters
                if not any(p.kind is p.VAR_POSITIONAL for p in own.values()):
                    found = {}  # it names all its arguments; the others add to those of the next class
                named = (
                    p for p in own.values() if p.name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
                )
                found |= {p.name: p for p in named}
        cls.__signature__ = inspect.Signature(sorted(found.values(), key=lambda p: p.kind))  # type: ignore[attr-defined]

    def __init__(self, *args: Any, act: str | None = None, **kwargs: Any) -> None:
        check_act(type(self).__name__, act)
        super().__init__(*args, **kwargs)
        self.act = act

    def extra_repr(self) -> str:
        stock = super().extra_repr()
        return stock if self.act is None else f"{stock}, act={self.act!r}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.__dict__.setdefault("act", None)


class _WithStatistics(_WithAct):
    """What layers with running statistics add: a keyword `skip_nonfinite`."""

    # Of layers that were pickled or converted without them.
    skip_nonfinite = False
    statistics_frozen = 0  # blocks of running.frozen_running_stats that are open

    def __init__(self, *args: Any, skip_nonfinite: bool = False, **kwargs: Any) -> None:
        check_flag(type(self).__name__, "skip_nonfinite", skip_nonfinite)
        super().__init__(*args, **kwargs)
        self.skip_nonfinite = skip_nonfinite

    def extra_repr(self) -> str:
        rest = super().extra_repr()
        return f"{rest}, skip_nonfinite=True" if self.skip_nonfinite else rest


def normalize_batch(
    module: Any,
    input: Tensor,
    residual: Tensor | None = None,
    act: str | None = None,
    function: Callable[..., Tensor] | None = None,
) -> Tensor:
    """The forward of a module with the attributes of torch's batch norms; counts the batch. `function` is called in
    place of functional.batch_norm."""
    module._check_input_dim(input)
    training = module.training
    mean, var = module.running_mean, module.running_var
    tracking = training and module.track_running_stats and not getattr(module, "statistics_frozen", 0)
    batches = module.num_batches_tracked if tracking else None
    momentum: float | Tensor = 0.0 if module.momentum is None else module.momentum
    if module.momentum is None and batches is not None:
        # A tensor, so that the count stays on its device: the cumulative average of batches so far.
        momentum = 1.0 / (batches + 1).double()
    keep = tracking or not training
    arguments = (
        input,
        mean if keep else None,
        var if keep else None,
        module.weight,
        module.bias,
        training or (mean is None and var is None),
        momentum,
        module.eps,
    )
    moved = None
    if function is not None:
        y = function(*arguments, residual=residual, act=act)
    else:
        skip = getattr(module, "skip_nonfinite", False)
        y, moved = F.batch_norm_moved(*arguments, residual, act, skip)
    if batches is not None:  # counted last: a call that fails is no batch
        batches.add_(1 if moved is None else moved)
    return y


class _BatchNorm(_WithStatistics, torch.nn.modules.batchnorm._BatchNorm):
    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return normalize_batch(self, input, residual, self.act)


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """torch.nn.BatchNorm1d: (N, C) or (N, C, L)."""


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    """torch.nn.BatchNorm2d: (N, C, H, W)."""


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """torch.nn.BatchNorm3d: (N, C, D, H, W)."""


class GroupNorm(_WithAct, torch.nn.GroupNorm):
    """torch.nn.GroupNorm: (N, C, ...)."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps, residual=residual, act=self.act)


class LayerNorm(_WithAct, torch.nn.LayerNorm):
    """torch.nn.LayerNorm: `(..., *normalized_shape)`."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return F.layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps, residual=residual, act=self.act
        )


class RMSNorm(_WithAct, torch.nn.RMSNorm):
    """torch.nn.RMSNorm: `(..., *normalized_shape)`."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps, residual=residual, act=self.act)


class _InstanceNorm(_WithStatistics, torch.nn.modules.instancenorm._InstanceNorm):
    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        unbatched = input.dim() == self._get_no_batch_dim()  # type: ignore[no-untyped-call]
        self._check_features(input, 0 if unbatched else 1)
        if unbatched:
            input = input.unsqueeze(0)
            residual = None if residual is None else residual.unsqueeze(0)
        keep = not (self.training and self.statistics_frozen)
        y = F.instance_norm(
            input,
            self.running_mean if keep else None,
            self.running_var if keep else None,
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            0.0 if self.momentum is None else self.momentum,
            self.eps,
            residual=residual,
            act=self.act,
            skip_nonfinite=self.skip_nonfinite,
        )
        return y.squeeze(0) if unbatched else y

    def _check_features(self, input: Tensor, dim: int) -> None:
        channels = input.size(dim)
        if channels == self.num_features:
            return
        name = type(self).__name__
        if self.affine:
            raise ValueError(
                f"{name}: input must have num_features={self.num_features} channels in dimension {dim}; got {channels}"
            )
        warnings.warn(
            f"{name}: input has {channels} channels in dimension {dim} where num_features={self.num_features}; without "
            "weights the number is not used",
            stacklevel=3,
        )


class InstanceNorm1d(_InstanceNorm, torch.nn.InstanceNorm1d):
    """torch.nn.InstanceNorm1d: (N, C, L) or (C, L)."""


class InstanceNorm2d(_InstanceNorm, torch.nn.InstanceNorm2d):
    """torch.nn.InstanceNorm2d: (N, C, H, W) or (C, H, W)."""


class InstanceNorm3d(_InstanceNorm, torch.nn.InstanceNorm3d):
    """torch.nn.InstanceNorm3d: (N, C, D, H, W) or (C, D, H, W)."""
