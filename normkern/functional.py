"""functional.py: the norms as functions, with torch.nn.functional's arguments, order and errors.

Each function checks its arguments, names its two domains (problem.py) and hands over to autograd.py. `input` is
(N, C, ...) in any dense memory format; output and gradients keep its dtype and layout. `residual` is added after weight
and bias and before `act`, one of None, "relu", "silu", "gelu", "leaky_relu". Parameters may have any floating dtype.
Under torch.autocast("cuda") layer, group and RMS norm of tensors on the GPU compute and answer in float32, as torch's
do, unless autocast.keep_half says otherwise; batch and instance norm, and every norm on the CPU, take their inputs as
they come, as torch's do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from normkern import aten, autocast, autograd, direct, problem, running
from normkern.backends import forced_backend
from normkern.checks import (
    check_act,
    check_enough_values,
    check_flag,
    check_float,
    check_groups,
    check_input,
    check_normalized_shape,
    check_parameter,
    check_residual,
    check_running,
    shape_of,
    spatial_count,
)
from normkern.problem import Act, Problem

# A constructor of problem.py: from sizes, strides and what the norm adds to the problem, or None where they do not fit.
Geometry = Callable[..., Problem | None]


def _fit(x: Tensor, geometry: Geometry, *args: object) -> tuple[Tensor, Problem]:
    """x, or a copy of it that fits: in the same order of dimensions in memory if it can be."""
    found = geometry(x.shape, x.stride(), *args)
    if found is None and not problem.is_dense(x.shape, x.stride()):
        x = x.clone()
        found = geometry(x.shape, x.stride(), *args)
    if found is None:
        x = x.contiguous()
        found = geometry(x.shape, x.stride(), *args)
        assert found is not None, "a contiguous tensor fits every norm"
    return x, found


def _in_memory_order(problem: Problem, parameter: Tensor | None) -> Tensor | None:
    """A parameter as x lies in memory, in the order of whose dimensions its own are."""
    order = problem.weight_order
    return parameter if order is None or parameter is None else parameter.permute(order).contiguous()


def _normalize(
    x: Tensor,
    dense: Tensor,
    problem: Problem,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    save: bool = False,
    momentum: float | None = None,
    call: tuple[object, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y in the layout of x, and the moments that were computed, if `save`; `dense` and `problem` are from _fit.

    mean, var and momentum are as in autograd.normalize. `call` is what direct.py may recognize the call by next time.
    """
    if call is not None and dense is x:
        direct.remember(call, problem)
    weight, bias = _in_memory_order(problem, weight), _in_memory_order(problem, bias)
    if residual is not None:
        residual = autograd.same_buffer(residual, dense)
    y, mean, var = autograd.normalize(problem, dense, weight, bias, residual, mean, var, save, momentum)
    if dense is not x:
        y = autograd.same_buffer(y, torch.empty_like(x))
    return y, mean, var


def _empty(x: Tensor, *others: Tensor | None) -> Tensor:
    """The result for an input without elements: empty too, and every gradient that flows back from it is zero."""
    y = x.clone()
    for t in others:
        if t is not None:
            y = y + t.sum().to(x.dtype)
    return y


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    act: str | None = None,
    skip_nonfinite: bool = False,
) -> Tensor:
    """Normalize every channel over the batch and all positions.

    In training the batch's own moments are used and the running statistics, if given, move towards them by `momentum`
    (with the unbiased variance); otherwise the running statistics are the moments. With `skip_nonfinite` a batch with
    an infinite or NaN moment moves no running statistics, of any channel.
    """
    return batch_norm_moved(
        input, running_mean, running_var, weight, bias, training, momentum, eps, residual, act, skip_nonfinite
    )[0]


def batch_norm_moved(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
    residual: Tensor | None,
    act: str | None,
    skip_nonfinite: bool,
) -> tuple[Tensor, Tensor | None]:
    """batch_norm, and with `skip_nonfinite` whether the running statistics moved, a bool that stays on its device.

    momentum may be a tensor of size 1, which no one waits for.
    """
    name = "batch_norm"
    call = None
    if type(momentum) is float and skip_nonfinite is False:
        call = name, x, weight, bias, residual, running_mean, running_var, training, eps, act
        y = direct.run(call, momentum if training else None)
        if y is not None:
            return y, None
    check_flag(name, "training", training)
    check_flag(name, "skip_nonfinite", skip_nonfinite)
    momentum = momentum if isinstance(momentum, Tensor) else check_float(name, "momentum", momentum)
    if isinstance(x, Tensor) and x.shape == (0,):
        return _empty(x, weight, bias, residual), None  # torch takes this for a batch without channels
    check_input(name, x, 2)
    eps = check_float(name, "eps", eps)
    activation = check_act(name, act)
    channels = x.shape[1]
    numel = x.numel()
    if training:
        check_enough_values(name, x.shape[0] * spatial_count(x), "value per channel", x)
    if eps < 0 or (training and eps == 0):
        raise ValueError(f"{name}: eps must be {'positive in training' if training else 'at least 0'}; got eps={eps}")
    mean, var = check_running(name, running_mean, running_var, channels, None if training else "training=False", x)
    weight = check_parameter(name, "weight", _flat(weight), (channels,), x)
    bias = check_parameter(name, "bias", _flat(bias), (channels,), x)
    check_residual(name, residual, x)
    if aten.exporting() and not skip_nonfinite and aten.takes_statistics(running_mean, x, training, momentum):
        share = 0.0 if isinstance(momentum, Tensor) else momentum
        y = aten.batch_norm(x, running_mean, running_var, weight, bias, training, share, eps, False)
        return aten.finish(y, activation, residual), None
    if numel == 0:
        return _empty(x, weight, bias, residual), None
    dense, found = _fit(x, problem.batch, activation, eps, not training)
    if not training:
        return _normalize(x, dense, found, weight, bias, residual, mean, var, call=call)[0], None
    if running_mean is None or running_var is None:
        return _normalize(x, dense, found, weight, bias, residual, call=call)[0], None
    may_move = not skip_nonfinite and running.move_in_forward(dense, running_mean, running_var)
    if may_move and not isinstance(momentum, Tensor):
        statistics = running_mean, running_var, False, momentum
        return _normalize(x, dense, found, weight, bias, residual, *statistics, call=call)[0], None
    y, batch_mean, batch_var = _normalize(x, dense, found, weight, bias, residual, save=True, call=call)
    only = _all_finite(batch_mean, batch_var) if skip_nonfinite else None
    running.update(running_mean, running_var, batch_mean, batch_var, numel // channels, momentum, only)
    return y, only


def _all_finite(mean: Tensor, var: Tensor) -> Tensor:
    return (torch.isfinite(mean) & torch.isfinite(var)).all()


def _flat(parameter: Tensor | None) -> Tensor | None:
    """torch's batch norm takes a weight of any shape with an element per channel."""
    if isinstance(parameter, Tensor) and parameter.dim() != 1:
        return parameter.reshape(-1)
    return parameter


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    act: str | None = None,
) -> Tensor:
    """Normalize each of `num_groups` bundles of neighbouring channels of every sample."""
    call = "group_norm", input, weight, bias, residual, None, None, num_groups, eps, act
    y = direct.run(call, None)
    if y is not None:
        return y
    check_input("group_norm", input, 2)
    if autocast.casts(input):
        input = autocast.to_float32(input)
        weight, bias, residual = autocast.to_float32(weight), autocast.to_float32(bias), autocast.to_float32(residual)
    check_groups("group_norm", num_groups, input)
    eps = check_float("group_norm", "eps", eps)
    activation = check_act("group_norm", act)
    shape = input.shape
    numel = input.numel()
    check_enough_values("group_norm", numel // num_groups, "value per channel", input)
    weight = check_parameter("group_norm", "weight", weight, (shape[1],), input)
    bias = check_parameter("group_norm", "bias", bias, (shape[1],), input)
    check_residual("group_norm", residual, input)
    if aten.exporting():
        return aten.finish(aten.group_norm(input, num_groups, weight, bias, eps), activation, residual)
    if numel == 0:
        return _empty(input, weight, bias, residual)
    dense, found = _fit(input, problem.group, num_groups, activation, eps)
    return _normalize(input, dense, found, weight, bias, residual, call=call)[0]


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    act: str | None = None,
) -> Tensor:
    """Normalize over the last dimensions, which have the sizes `normalized_shape`."""
    call = "layer_norm", input, weight, bias, residual, None, None, normalized_shape, eps, act
    y = direct.run(call, None)
    if y is not None:
        return y
    eps = check_float("layer_norm", "eps", eps)
    return _layer_norm("layer_norm", input, normalized_shape, weight, bias, eps, residual, act, False, call)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
    act: str | None = None,
) -> Tensor:
    """Divide by the root mean square over the last dimensions, which have the sizes `normalized_shape`.

    As in torch, eps=None is the machine epsilon of the type that computes: float32, or float64 for a float64 input.
    """
    call = "rms_norm", input, weight, None, residual, None, None, normalized_shape, eps, act
    y = direct.run(call, None)
    if y is not None:
        return y
    check_input("rms_norm", input, 0)
    eps = _rms_eps("rms_norm", input, eps)
    return _layer_norm("rms_norm", input, normalized_shape, weight, None, eps, residual, act, True, call)


def _rms_eps(name: str, x: Tensor, eps: float | None) -> float:
    if eps is None:
        eps = 2.0**-52 if x.dtype is torch.float64 else 2.0**-23
    return check_float(name, "eps", eps)


def _layer_norm(
    name: str,
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    act: str | None,
    second: bool,
    call: tuple[object, ...] | None = None,
) -> Tensor:
    check_input(name, x, 0)
    if autocast.casts(x):
        x = autocast.to_float32(x)
        weight, bias, residual = autocast.to_float32(weight), autocast.to_float32(bias), autocast.to_float32(residual)
    shape = check_normalized_shape(name, normalized_shape, x)
    activation = check_act(name, act)
    weight = check_parameter(name, "weight", weight, shape, x)
    bias = check_parameter(name, "bias", bias, shape, x)
    check_residual(name, residual, x)
    if aten.exporting():
        return aten.finish(aten.layer_norm(x, shape, weight, bias, eps, second), activation, residual)
    if x.numel() == 0:
        return _empty(x, weight, bias, residual)
    dense, found = _fit(x, problem.layer, len(shape), activation, eps, second)
    return _normalize(x, dense, found, weight, bias, residual, call=call)[0]


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    act: str | None = None,
    skip_nonfinite: bool = False,
) -> Tensor:
    """Normalize every channel of every sample over its positions.

    With `use_input_stats` the running statistics, if given, move by `momentum` towards the moments averaged over the
    batch; without, they are the moments, as in batch_norm's evaluation. With `skip_nonfinite` an infinite or NaN moment
    moves no running statistics, of any channel.
    """
    name = "instance_norm"
    call = None
    if type(momentum) is float and skip_nonfinite is False:
        call = name, input, weight, bias, residual, running_mean, running_var, use_input_stats, eps, act
        known = direct.run(call, momentum if use_input_stats else None)
        if known is not None:
            return known
    check_flag(name, "skip_nonfinite", skip_nonfinite)
    check_flag(name, "use_input_stats", use_input_stats)
    momentum = check_float(name, "momentum", momentum)
    check_input(name, input, 0)
    if use_input_stats:
        check_enough_values(name, spatial_count(input), "spatial element", input)
    if input.dim() < 2:
        raise IndexError(f"{name}: input must have at least 2 dimensions; got shape {shape_of(input)}")
    eps = check_float(name, "eps", eps)
    activation = check_act(name, act)
    batch, channels = input.shape[:2]
    when = None if use_input_stats else "use_input_stats=False"
    mean, var = check_running(name, running_mean, running_var, channels, when, input)
    weight = check_parameter(name, "weight", weight, (channels,), input)
    bias = check_parameter(name, "bias", bias, (channels,), input)
    check_residual(name, residual, input)
    if (
        aten.exporting()
        and not skip_nonfinite
        and aten.takes_statistics(running_mean, input, use_input_stats, momentum)
    ):
        y = aten.batch_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps, True)
        return aten.finish(y, activation, residual)
    numel = input.numel()
    if numel == 0:
        return _empty(input, weight, bias, residual)
    if not use_input_stats:
        dense, found = _fit(input, problem.batch, activation, eps, True)
        return _normalize(input, dense, found, weight, bias, residual, mean, var, call=call)[0]
    dense, found = _fit(input, problem.instance, activation, eps)
    tracked = running_mean is not None
    # The moments lie in memory as samples and channels do.
    order = problem.memory_order(dense.shape, dense.stride())
    swapped = order.index(1) < order.index(0)
    if tracked and swapped:
        call = None
    y, instance_mean, instance_var = _normalize(input, dense, found, weight, bias, residual, save=tracked, call=call)
    if running_mean is not None and running_var is not None:
        if swapped:
            instance_mean, instance_var = (
                m.view(channels, batch).t().reshape(-1) for m in (instance_mean, instance_var)
            )
        only = _all_finite(instance_mean, instance_var) if skip_nonfinite else None
        count = numel // (batch * channels)
        running.update(running_mean, running_var, instance_mean, instance_var, count, momentum, only)
    return y


FEW = 1 << 20  # elements whose sum is formed by a call of its own on the CPU


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """layer_norm of input + residual, and that sum: (output, input + residual), both of input's shape and dtype.

    The sum is rounded to that dtype before it is normalized, so output is layer_norm of what is returned beside it.
    Where input is dense, of 2^20 elements or more on the CPU, and residual, of the same shape and dtype, has its
    strides, one pass over both does it all, and so does one backward pass.
    """
    _check_sum("add_layer_norm", input, residual)
    eps = check_float("add_layer_norm", "eps", eps)
    return _add_norm("add_layer_norm", input, residual, normalized_shape, weight, bias, eps, False)


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """rms_norm of input + residual, and that sum, as in add_layer_norm."""
    _check_sum("add_rms_norm", input, residual)
    eps = _rms_eps("add_rms_norm", input, eps)
    return _add_norm("add_rms_norm", input, residual, normalized_shape, weight, None, eps, True)


def _check_sum(name: str, x: Tensor, residual: Tensor) -> None:
    check_input(name, x, 0)
    if residual is None:
        raise TypeError(f"{name}: residual must be a Tensor; got None")
    check_residual(name, residual, x)


def _add_norm(
    name: str,
    x: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    second: bool,
) -> tuple[Tensor, Tensor]:
    found = None
    # Few elements on the CPU: two calls, one of them past the dispatcher (direct.py), cost less than this one.
    few = x.is_cpu and x.numel() < FEW and forced_backend() is None
    if not few and residual.stride() == x.stride() and not autocast.casts(x) and not aten.exporting():
        shape = check_normalized_shape(name, normalized_shape, x)
        weight = check_parameter(name, "weight", weight, shape, x)
        bias = check_parameter(name, "bias", bias, shape, x)
        if x.numel() != 0:
            found = problem.layer(x.shape, x.stride(), len(shape), Act.none, eps, second)
    if found is None:  # a sum of its own is dense, whatever its terms are
        total = x + residual
        call = name, total, weight, bias, None, None, None, normalized_shape, eps, None
        y = direct.run(call, None)
        if y is None:
            y = _layer_norm(name, total, normalized_shape, weight, bias, eps, None, None, second, call)
        return y, total
    weight, bias = _in_memory_order(found, weight), _in_memory_order(found, bias)
    return autograd.normalize_sum(found, x, residual, weight, bias)


def moments(input: Tensor, dim: int | Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over `dim`, in float32 (float64 for float64): exact for any offset, differentiable."""
    check_input("moments", input, 0)
    dims = _checked_dims(input, dim)
    wide = torch.float64 if input.dtype is torch.float64 else torch.float32
    kept = [d for d in range(input.dim()) if d not in dims]
    if input.numel() == 0:
        x = input.to(wide)
        return x.mean(dims), x.var(dims, correction=0)
    domain = problem.reduced(input.shape, input.stride(), dims)
    x = input
    if domain is None:
        # Kept dimensions outermost always fit.
        x = input.permute(*kept, *dims).contiguous()
        dims = tuple(range(len(kept), input.dim()))
        kept = list(range(len(kept)))
        domain = problem.reduced(x.shape, x.stride(), dims)
        assert domain is not None, "a contiguous tensor with leading groups fits"
    mean, var = autograd.moments(domain, x)
    in_memory = [d for d in problem.memory_order(x.shape, x.stride()) if d in kept]
    sizes = [x.shape[d] for d in in_memory]
    back = [in_memory.index(d) for d in kept]
    return mean.reshape(sizes).permute(back).to(wide), var.reshape(sizes).permute(back).to(wide)


def _checked_dims(x: Tensor, dim: int | Sequence[int]) -> tuple[int, ...]:
    """The dimensions to reduce, not negative, ascending; none means all, as in torch.var_mean."""
    asked = tuple(dim) if isinstance(dim, tuple | list) else (dim,)
    rank = max(x.dim(), 1)
    for d in asked:
        if not isinstance(d, int):
            raise TypeError(f"moments: dim must be an int or a sequence of ints; got {dim!r}")
        if not -rank <= d < rank:
            raise IndexError(
                f"moments: dim must be in {-rank} to {rank - 1}; got dim={d} and input of shape {shape_of(x)}"
            )
    found = sorted({d % rank for d in asked})
    if len(found) != len(asked):
        raise RuntimeError(f"moments: dim must not name a dimension twice; got dim={dim!r}")
    if x.dim() == 0:
        return ()
    return tuple(found) if found else tuple(range(x.dim()))


# The rest of the functions, which build on those above.
from normkern.ablation import batch_noise, lp_batch_norm  # noqa: E402
from normkern.family import (  # noqa: E402
    evo_norm_b0,
    evo_norm_s0,
    filter_response_norm,
    paper_group_norm,
    variance_norm,
)
from normkern.standardize import weight_standardize_all  # noqa: E402
from normkern.weights import scaled_relu, weight_center, weight_norm, weight_standardize  # noqa: E402

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "batch_noise",
    "batch_norm",
    "evo_norm_b0",
    "evo_norm_s0",
    "filter_response_norm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "lp_batch_norm",
    "moments",
    "paper_group_norm",
    "rms_norm",
    "scaled_relu",
    "variance_norm",
    "weight_center",
    "weight_norm",
    "weight_standardize",
    "weight_standardize_all",
]
