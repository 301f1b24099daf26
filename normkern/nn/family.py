"""family.py: the norms of "Beyond BatchNorm" (Lubana et al. 2021) and "How Does Batch Normalization Help
Optimization?" (Santurkar et al. 2018) as layers.

Parameters are named as in timm where it has the layer, so state dicts go both ways.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from normkern import ablation, family
from normkern import functional as F
from normkern.checks import check_act, check_flag
from normkern.nn.norm import BatchNorm2d, GroupNorm, normalize_batch


class _Channels(torch.nn.Module):
    """A layer of `num_features` channels: weight 1, bias 0 and what a subclass adds."""

    dims: tuple[int, ...] = (4,)
    weight: torch.nn.Parameter | None
    bias: torch.nn.Parameter | None

    def __init__(self, num_features: int, affine: bool, **where: Any) -> None:
        super().__init__()
        if num_features <= 0:
            raise ValueError(f"{type(self).__name__}: num_features must be positive; got {num_features}")
        self.num_features = num_features
        self._parameter("weight", affine, **where)
        self._parameter("bias", affine, **where)

    def _parameter(self, name: str, wanted: bool, **where: Any) -> None:
        empty = torch.nn.Parameter(torch.empty(self.num_features, **where)) if wanted else None
        self.register_parameter(name, empty)

    def _fill(self, **values: float) -> None:
        with torch.no_grad():
            for name, value in values.items():
                parameter = getattr(self, name)
                if parameter is not None:
                    parameter.fill_(value)

    def _check(self, input: Tensor) -> None:
        if input.dim() not in self.dims or input.shape[1] != self.num_features:
            raise ValueError(
                f"{type(self).__name__}: input must have {' or '.join(map(str, self.dims))} dimensions and "
                f"num_features={self.num_features} channels; got shape {tuple(input.shape)}"
            )

    def extra_repr(self) -> str:
        return f"{self.num_features}"


class _FilterResponseNorm(_Channels):
    """Filter response norm with a thresholded linear unit (Singh and Krishnan 2020).

    Args:
        num_features: C.
        eps: where it starts, if it is learned.
        learn_eps: eps is a parameter, one number, whose magnitude counts.
        tlu: whether there is `tau`, the threshold; else `act` may be an activation, as of normkern.nn.GroupNorm.

    `forward` takes a residual, which is added before the threshold or the activation.
    """

    eps: float | torch.nn.Parameter
    tau: torch.nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        *,
        learn_eps: bool = False,
        tlu: bool = True,
        act: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_act(type(self).__name__, act)
        if tlu and act is not None:
            raise ValueError(f"{type(self).__name__}: act needs tlu=False; got act={act!r}")
        super().__init__(num_features, True, device=device, dtype=dtype)
        self._parameter("tau", tlu, device=device, dtype=dtype)
        self.act, self.first_eps = act, eps
        self.eps = torch.nn.Parameter(torch.empty(1, device=device, dtype=dtype)) if learn_eps else eps
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self._fill(weight=1, bias=0, tau=0)
        if isinstance(self.eps, torch.nn.Parameter):
            self._fill(eps=self.first_eps)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        self._check(input)
        return F.filter_response_norm(
            input, self.weight, self.bias, self.tau, self.eps, residual=residual, act=self.act
        )

    def extra_repr(self) -> str:
        eps = f"learned, from {self.first_eps}" if isinstance(self.eps, torch.nn.Parameter) else self.eps
        return f"{super().extra_repr()}, eps={eps}, tlu={self.tau is not None}, act={self.act!r}"


class FilterResponseNorm1d(_FilterResponseNorm):
    __doc__ = f"{_FilterResponseNorm.__doc__}\n    Input: (N, C, L).\n"
    dims = (3,)


class FilterResponseNorm2d(_FilterResponseNorm):
    __doc__ = f"{_FilterResponseNorm.__doc__}\n    Input: (N, C, H, W).\n"


class FilterResponseNorm3d(_FilterResponseNorm):
    __doc__ = f"{_FilterResponseNorm.__doc__}\n    Input: (N, C, D, H, W).\n"
    dims = (5,)


class _WithRunningVar(_Channels):
    statistics_frozen = 0  # blocks of running.frozen_running_stats that are open
    running_var: Tensor
    v: torch.nn.Parameter | None

    def __init__(self, num_features: int, momentum: float, affine: bool, variant: str, **where: Any) -> None:
        family._check_variant(type(self).__name__, variant)
        super().__init__(num_features, affine, **where)
        self.momentum, self.variant = momentum, variant
        self.register_buffer("running_var", torch.ones(num_features, **where))

    def _tracked(self) -> Tensor | None:
        return None if self.training and self.statistics_frozen else self.running_var


class _VarianceNorm(_WithRunningVar):
    """Batch norm that divides by the standard deviation and keeps the mean (Daneshmand et al. 2020).

    Args:
        num_features, eps, momentum, affine: as of torch.nn.BatchNorm2d.
        act: as of normkern.nn.BatchNorm2d.
        variant: "torch" or "paper", see normkern.variance_norm.

    `forward` takes a residual, which is added before the activation.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        *,
        act: str | None = None,
        variant: str = "torch",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_act(type(self).__name__, act)
        super().__init__(num_features, momentum, affine, variant, device=device, dtype=dtype)
        self.eps, self.act = eps, act
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self._fill(weight=1, bias=0, running_var=1)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        self._check(input)
        return F.variance_norm(
            input, self._tracked(), self.weight, self.bias, self.training, self.momentum, self.eps,
            residual=residual, act=self.act, variant=self.variant,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eps={self.eps}, momentum={self.momentum}, variant={self.variant!r}"


class VarianceNorm1d(_VarianceNorm):
    __doc__ = f"{_VarianceNorm.__doc__}\n    Input: (N, C) or (N, C, L).\n"
    dims = (2, 3)


class VarianceNorm2d(_VarianceNorm):
    __doc__ = f"{_VarianceNorm.__doc__}\n    Input: (N, C, H, W).\n"


class VarianceNorm3d(_VarianceNorm):
    __doc__ = f"{_VarianceNorm.__doc__}\n    Input: (N, C, D, H, W).\n"
    dims = (5,)


class EvoNorm2dS0(_Channels):
    """EvoNorm-S0 (Liu et al. 2020), a norm and activation in one; independent of the batch.

    Args:
        num_features: C; input: (N, C, H, W).
        groups: of group norm; or group_size, channels to a group, in its place.
        nonlinearity: without it there is no `v`, and the layer is weight and bias alone, as in the published code.
        variant: "torch" or "paper", see normkern.evo_norm_s0.
    """

    v: torch.nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        groups: int = 32,
        *,
        group_size: int | None = None,
        nonlinearity: bool = True,
        eps: float = 1e-5,
        variant: str = "torch",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        name = type(self).__name__
        family._check_variant(name, variant)
        if group_size is not None:
            groups = num_features // group_size if group_size > 0 else 0
        if groups <= 0 or num_features % groups or (group_size is not None and groups * group_size != num_features):
            raise ValueError(
                f"{name}: groups must divide num_features; got num_features={num_features}, groups={groups} and "
                f"group_size={group_size}"
            )
        super().__init__(num_features, True, device=device, dtype=dtype)
        self._parameter("v", nonlinearity, device=device, dtype=dtype)
        self.groups, self.eps, self.variant = groups, eps, variant
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self._fill(weight=1, bias=0, v=1)

    def forward(self, input: Tensor) -> Tensor:
        self._check(input)
        return F.evo_norm_s0(input, self.groups, self.weight, self.bias, self.v, self.eps, variant=self.variant)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}, eps={self.eps}, variant={self.variant!r}"


class EvoNorm2dB0(_WithRunningVar):
    """EvoNorm-B0 (Liu et al. 2020), a norm and activation in one, by the variances of the batch and of each instance.

    Args:
        num_features: C; input: (N, C, H, W).
        nonlinearity: without it there is no `v`, and the layer is weight and bias alone, as in the published code.
        momentum: of running_var, as in torch.nn.BatchNorm2d.
        variant: "torch" or "paper", see normkern.evo_norm_b0.
    """

    def __init__(
        self,
        num_features: int,
        *,
        nonlinearity: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
        variant: str = "torch",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, momentum, True, variant, device=device, dtype=dtype)
        self._parameter("v", nonlinearity, device=device, dtype=dtype)
        self.eps = eps
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self._fill(weight=1, bias=0, v=1, running_var=1)

    def forward(self, input: Tensor) -> Tensor:
        self._check(input)
        return F.evo_norm_b0(
            input, self._tracked(), self.weight, self.bias, self.v, self.training, self.momentum, self.eps,
            variant=self.variant,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eps={self.eps}, momentum={self.momentum}, variant={self.variant!r}"


class PaperBatchNorm2d(BatchNorm2d):
    """Batch norm as the code of "Beyond BatchNorm" has it: running_mean starts at 1, and running_var moves towards the
    biased variance of the batch. Otherwise normkern.nn.BatchNorm2d."""

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        if self.running_mean is not None:
            self.running_mean.fill_(1)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return normalize_batch(self, input, residual, self.act, self._normalize)

    @staticmethod
    def _normalize(
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        training: bool,
        momentum: float | Tensor,
        eps: float,
        residual: Tensor | None = None,
        act: str | None = None,
    ) -> Tensor:
        if not training or running_mean is None or running_var is None:
            mean, var = (None, None) if training else (running_mean, running_var)
            return F.batch_norm(x, mean, var, weight, bias, training, 0.0, eps, residual=residual, act=act)
        # Statistics that forget everything are those of the batch.
        mean, var = (torch.zeros_like(running_mean, dtype=torch.float64) for _ in range(2))
        y = F.batch_norm(x, mean, var, weight, bias, True, 1.0, eps, residual=residual, act=act)
        count = x.numel() // x.shape[1]
        if count:
            with torch.no_grad():
                running_mean.copy_(running_mean.double() * (1 - momentum) + mean * momentum)
                biased = var * ((count - 1) / count)
                running_var.copy_(running_var.double() * (1 - momentum) + biased * momentum)
        return y


class PaperGroupNorm(GroupNorm):
    """Group norm with the unbiased variance, as in the code of "Beyond BatchNorm"; otherwise normkern.nn.GroupNorm."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return F.paper_group_norm(
            input, self.num_groups, self.weight, self.bias, self.eps, residual=residual, act=self.act
        )


class LpBatchNorm2d(_Channels):
    """Batch norm that divides by the average p-norm (Santurkar et al. 2018, section 3.3), p = 1, 2 or inf.

    Args:
        num_features, eps, momentum, affine: as of torch.nn.BatchNorm2d; input: (N, C, H, W).
        p, centered, unit_gaussian: see normkern.lp_batch_norm.
    """

    statistics_frozen = 0
    running_mean: Tensor
    running_size: Tensor

    def __init__(
        self,
        num_features: int,
        p: float = 2,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        *,
        centered: bool = False,
        unit_gaussian: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        name = type(self).__name__
        ablation._check_order(name, p)
        check_flag(name, "centered", centered)
        check_flag(name, "unit_gaussian", unit_gaussian)
        super().__init__(num_features, affine, device=device, dtype=dtype)
        self.p, self.eps, self.momentum = p, eps, momentum
        self.centered, self.unit_gaussian = centered, unit_gaussian
        self.register_buffer("running_mean", torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer("running_size", torch.ones(num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self._fill(weight=1, bias=0, running_mean=0, running_size=1)

    def forward(self, input: Tensor) -> Tensor:
        self._check(input)
        kept = not (self.training and self.statistics_frozen)
        return F.lp_batch_norm(
            input,
            self.running_mean if kept else None,
            self.running_size if kept else None,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
            p=self.p,
            centered=self.centered,
            unit_gaussian=self.unit_gaussian,
        )

    def extra_repr(self) -> str:
        p = "inf" if self.p == math.inf else self.p
        return f"{super().extra_repr()}, p={p}, eps={self.eps}, centered={self.centered}"


class NoisyBatchNorm2d(BatchNorm2d):
    """Batch norm, and in training noise after it that unsettles distributions (Santurkar et al. 2018, section 2.1).

    Args:
        mean_range, scale_range, jitter: of normkern.batch_noise, which says what is drawn. The defaults are not
            confirmed by the paper's text.
        others: as of normkern.nn.BatchNorm2d. `act` comes before the noise.
    """

    def __init__(
        self, *args: Any, mean_range: float = 0.5, scale_range: float = 1.25, jitter: float = 0.1, **kwargs: Any
    ) -> None:
        self.noise = ablation._check_noise(type(self).__name__, mean_range, scale_range, jitter)
        super().__init__(*args, **kwargs)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        y = super().forward(input, residual)
        return F.batch_noise(y, *self.noise) if self.training else y

    def extra_repr(self) -> str:
        mean_range, scale_range, jitter = self.noise
        return f"{super().extra_repr()}, mean_range={mean_range}, scale_range={scale_range}, jitter={jitter}"
