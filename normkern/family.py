"""family.py: the norms of "Beyond BatchNorm" (Lubana, Dick and Tanaka 2021) that torch has no function for.

`input` is (N, C, ...) in any dense memory format; outputs and gradients keep its dtype and layout. Everything is
differentiable any number of times. With variant="torch" variances are biased, and running ones move by the unbiased
variance, as in torch.nn.BatchNorm2d; variant="paper" has what the paper's code does instead, said at each function.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from normkern import direct, evolved, problem, scaled
from normkern.autograd import same_buffer
from normkern.checks import (
    check_act,
    check_enough_values,
    check_eps,
    check_flag,
    check_float,
    check_groups,
    check_input,
    check_parameter,
    check_residual,
    spatial_count,
)
from normkern.functional import _empty, _fit, _normalize, group_norm

_VARIANTS = ("torch", "paper")


def _check_variant(name: str, variant: str) -> bool:
    """Whether it is the paper's."""
    if variant not in _VARIANTS:
        raise ValueError(f"{name}: variant must be one of {', '.join(_VARIANTS)}; got {variant!r}")
    return variant == "paper"


def _like(y: Tensor, x: Tensor, dense: Tensor) -> Tensor:
    """y in the layout of x, where `dense` may be a copy of x in another one."""
    return y if dense is x else same_buffer(y, torch.empty_like(x))


def filter_response_norm(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    tau: Tensor | None = None,
    eps: float | Tensor = 1e-5,
    *,
    residual: Tensor | None = None,
    act: str | None = None,
) -> Tensor:
    """x / sqrt(mean of x^2 over the positions + |eps|) * weight + bias, and the larger of that and tau.

    Singh and Krishnan, "Filter Response Normalization Layer" (2020), sections 3.1 and 3.2. Every channel of every
    sample is divided by its root mean square; the mean stays in. Without tau the thresholded linear unit is left out.

    Args:
        input: (N, C, ...) with at least one dimension of positions.
        weight, bias, tau: (C,).
        eps: a number, or a tensor of size 1 or C that may be learned.
        residual: of input's shape, added before the threshold or the activation.
        act: as of normkern.group_norm, in place of tau.

    Raises:
        RuntimeError: input has fewer than 3 dimensions, or a parameter is not of shape (C,).
        ValueError: both tau and act are given, or eps is negative.
    """
    name = "filter_response_norm"
    call = None
    if tau is None and not isinstance(eps, Tensor):
        call = "filter_response", input, weight, bias, residual, None, None, eps, act
        y = direct.run(call, None)
        if y is not None:
            return y
    check_input(name, input, 3)
    activation = check_act(name, act)
    if tau is not None and act is not None:
        raise ValueError(f"{name}: tau and act must not both be given; got act={act!r} and a tau")
    channels = input.shape[1]
    weight = check_parameter(name, "weight", weight, (channels,), input)
    bias = check_parameter(name, "bias", bias, (channels,), input)
    tau = check_parameter(name, "tau", tau, (channels,), input)
    check_residual(name, residual, input)
    learned = None
    if isinstance(eps, Tensor):
        learned = check_parameter(name, "eps", eps.reshape(-1), (1 if eps.numel() == 1 else channels,), input)
        eps = 0.0
    eps = check_eps(name, eps)
    if input.numel() == 0:
        return _empty(input, weight, bias, tau, learned, residual)
    dense, found = _fit(input, problem.instance, activation, eps, True)
    if tau is None and learned is None:
        return _normalize(input, dense, found, weight, bias, residual, call=call)[0]
    if tau is None and act is not None:
        raise ValueError(f"{name}: act needs an eps that is a number; got a tensor")
    residual = None if residual is None else same_buffer(residual, dense)
    norm = scaled.FilterResponse(found, evolved.instances(dense, found.stats))
    y = evolved.apply(norm, dense, weight, bias, tau, residual, learned)[0]
    return _like(y, input, dense)


def variance_norm(
    input: Tensor,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    act: str | None = None,
    variant: str = "torch",
) -> Tensor:
    """x / sqrt(variance of the channel + eps) * weight + bias: batch norm that keeps the mean.

    Daneshmand et al. 2020; "Variance Norm" of Lubana et al. 2021. In training the variance is that of the batch, and
    running_var, if given, moves towards it by `momentum`; otherwise running_var is the variance.

    Args:
        input: (N, C, ...); running_var, weight, bias: (C,).
        residual, act: as of normkern.batch_norm.
        variant: "paper" moves running_var towards the biased variance.

    Raises:
        ValueError: one value per channel in training, or a negative eps.
        RuntimeError: no running_var outside training, or a parameter is not of shape (C,).
    """
    name = "variance_norm"
    check_flag(name, "training", training)
    check_input(name, input, 2)
    activation = check_act(name, act)
    eps, momentum = check_eps(name, eps), check_float(name, "momentum", momentum)
    paper = _check_variant(name, variant)
    channels = input.shape[1]
    weight = check_parameter(name, "weight", weight, (channels,), input)
    bias = check_parameter(name, "bias", bias, (channels,), input)
    given = _check_running_var(name, running_var, training, input)
    check_residual(name, residual, input)
    if training:
        check_enough_values(name, input.shape[0] * spatial_count(input), "value per channel", input)
    if input.numel() == 0:
        return _empty(input, weight, bias, residual)
    dense, found = _fit(input, problem.batch, activation, eps, not training)
    if given is not None and not training:
        return _normalize(input, dense, found, weight, bias, residual, torch.zeros_like(given), given)[0]
    residual = None if residual is None else same_buffer(residual, dense)
    y, _, var = evolved.apply(scaled.Variance(found), dense, weight, bias, residual)
    _move(running_var, var, found.stats.count, momentum, paper)
    return _like(y, input, dense)


def _check_running_var(name: str, running_var: Tensor | None, training: bool, x: Tensor) -> Tensor | None:
    if running_var is None and not training:
        raise RuntimeError(f"{name}: running_var must be given where training=False; got None")
    given = check_parameter(name, "running_var", running_var, (x.shape[1],), x)
    if given is not None and running_var is not None and running_var.requires_grad:
        raise RuntimeError(f"{name}: running_var must not require gradients; got requires_grad=True")
    return given


def _move(running_var: Tensor | None, var: Tensor, count: int, momentum: float, biased: bool) -> None:
    """A running variance towards that of a batch."""
    if running_var is None:
        return
    with torch.no_grad():
        target = var if biased else var * (count / (count - 1))
        running_var.copy_(running_var.double() * (1 - momentum) + target * momentum)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """x * weight + bias by channel, as a norm whose moments are 0 and 1."""
    dense, found = _fit(x, problem.batch, problem.Act.none, 0.0, True)
    one = torch.ones(x.shape[1], dtype=torch.float64, device=x.device)
    return _normalize(x, dense, found, weight, bias, None, torch.zeros_like(one), one)[0]


def _full(parameter: Tensor | None, value: float, x: Tensor) -> Tensor:
    if parameter is not None:
        return parameter
    return torch.full((x.shape[1],), value, dtype=torch.float32, device=x.device)


def evo_norm_s0(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    v: Tensor | None = None,
    eps: float = 1e-5,
    *,
    variant: str = "torch",
) -> Tensor:
    """x * sigmoid(v * x) / sqrt(variance of the group + eps) * weight + bias: a norm and activation in one.

    EvoNorm-S0 of Liu et al., "Evolving Normalization-Activation Layers" (2020), table 2. The groups are those of group
    norm. As in the published code, without v there is no norm either: x * weight + bias.

    Args:
        input: (N, C, ...) with at least one dimension of positions; weight, bias, v: (C,).
        variant: "paper" takes the unbiased variance (that of one element is 0).

    Raises:
        RuntimeError: input has fewer than 3 dimensions, num_groups does not divide the channels, or a parameter is not
            of shape (C,).
        ValueError: eps is negative.
    """
    name = "evo_norm_s0"
    check_input(name, input, 3)
    check_groups(name, num_groups, input)
    eps, paper = check_eps(name, eps), _check_variant(name, variant)
    weight = check_parameter(name, "weight", weight, input.shape[1:2], input)
    bias = check_parameter(name, "bias", bias, input.shape[1:2], input)
    v = check_parameter(name, "v", v, input.shape[1:2], input)
    if input.numel() == 0:
        return _empty(input, weight, bias, v)
    if v is None:
        return _affine(input, weight, bias)
    dense, found = _fit(input, problem.instance)
    norm = evolved.S0(evolved.instances(dense, found.stats), num_groups, eps, paper)
    y = evolved.apply(norm, dense, _full(weight, 1.0, input), _full(bias, 0.0, input), v)[0]
    return _like(y, input, dense)


def evo_norm_b0(
    input: Tensor,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    v: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    variant: str = "torch",
) -> Tensor:
    """x / max(sqrt(batch variance + eps), v * x + sqrt(instance variance + eps)) * weight + bias.

    EvoNorm-B0 of Liu et al., "Evolving Normalization-Activation Layers" (2020), table 2: a norm and activation in one.
    The batch variance is that of the channel over the batch, in training; running_var, if given, moves towards it by
    `momentum`, and is it otherwise. As in the published code, without v there is no norm either: x * weight + bias.

    Args:
        input: (N, C, ...) with at least one dimension of positions; running_var, weight, bias, v: (C,).
        variant: "paper" takes the unbiased variance of an instance (that of one element is 0), and moves running_var
            towards the biased one of the batch.

    Raises:
        RuntimeError: input has fewer than 3 dimensions, a parameter is not of shape (C,), or there is no running_var
            outside training.
        ValueError: one value per channel in training, or a negative eps.
    """
    name = "evo_norm_b0"
    check_flag(name, "training", training)
    check_input(name, input, 3)
    eps, momentum = check_eps(name, eps), check_float(name, "momentum", momentum)
    paper = _check_variant(name, variant)
    weight = check_parameter(name, "weight", weight, input.shape[1:2], input)
    bias = check_parameter(name, "bias", bias, input.shape[1:2], input)
    v = check_parameter(name, "v", v, input.shape[1:2], input)
    if v is None:
        return _empty(input, weight, bias) if input.numel() == 0 else _affine(input, weight, bias)
    given = _check_running_var(name, running_var, training, input)
    count = input.shape[0] * spatial_count(input)
    if training:
        check_enough_values(name, count, "value per channel", input)
    if input.numel() == 0:
        return _empty(input, weight, bias, v)
    dense, found = _fit(input, problem.instance)
    norm = evolved.B0(evolved.instances(dense, found.stats), eps, paper, training)
    parameters = _full(weight, 1.0, input), _full(bias, 0.0, input), v, None if training else given
    y, mean, var = evolved.apply(norm, dense, *parameters)
    if training and running_var is not None:
        _move(running_var, evolved.merged(mean, var, 0)[1], count, momentum, paper)
    return _like(y, input, dense)


def paper_group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    act: str | None = None,
) -> Tensor:
    """Group norm with the unbiased variance, as in the code of "Beyond BatchNorm".

    With n elements in a group, sqrt(var * n/(n - 1) + eps) is sqrt(n/(n - 1)) * sqrt(var + eps * (n - 1)/n): group norm
    with another weight and eps.

    Raises:
        ValueError: one element in a group, and what normkern.group_norm raises.
    """
    name = "paper_group_norm"
    check_input(name, input, 2)
    check_groups(name, num_groups, input)
    eps = check_eps(name, eps)
    count = input.shape[1] // num_groups * math.prod(input.shape[2:])
    check_enough_values(name, count, "value per group", input)
    share = (count - 1) / count if count else 1.0
    weight = check_parameter(name, "weight", weight, input.shape[1:2], input)
    wide = (_full(weight, 1.0, input).double()) * share**0.5
    return group_norm(input, num_groups, wide, bias, eps * share, residual=residual, act=act)
