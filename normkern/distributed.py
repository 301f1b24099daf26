"""distributed.py: statistics over the processes of a group.

Every process computes the moments of its part, all parts are gathered in one message of (count, mean, sum of squared
deviations) for each statistics group, and merged on the device in the order of ranks, so that all processes get the
same bits and none waits for the host. Backward sums two numbers for each group over the processes. Collectives are
torch's functional ones, so torch.compile sees one graph.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives

from normkern import autograd, functional
from normkern import problem as problems
from normkern.backends import Backend, eager, select
from normkern.checks import (
    check_act,
    check_flag,
    check_float,
    check_input,
    check_parameter,
    check_residual,
    check_running,
)
from normkern.problem import NEED_DBIAS, NEED_DRESIDUAL, NEED_DWEIGHT, NEED_DX, Act, Domain, Moments, Problem


@dataclass(frozen=True)
class Part:
    """What one process holds of a normalization: the problem of its own elements, of which there may be none, and the
    names of the process groups whose parts make up each statistics group."""

    problem: Problem
    groups: tuple[str, ...]

    @property
    def given(self) -> Problem:
        """The same with moments that come from outside."""
        return dataclasses.replace(self.problem, moments=Moments.given)

    @property
    def plain(self) -> Problem:
        """The same with a weight and a bias for each statistics group, and no activation."""
        return dataclasses.replace(self.given, affine=self.problem.stats, act=Act.none)


# ---- collectives

# torch 2.13 has a new name for it.
_all_gather: Any = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
_all_reduce: Any = collectives.all_reduce
_wait: Any = collectives.wait_tensor


def _gathered(message: Tensor, group: str) -> Tensor:
    """[processes, message]: everybody's, in the order of ranks."""
    every = _completed(lambda: _all_gather(message.contiguous(), 0, group))
    return every.view(-1, message.numel())


def _summed(t: Tensor, groups: tuple[str, ...]) -> Tensor:
    """t added up over the processes."""
    for group in groups:
        t = _completed(functools.partial(_all_reduce, t, "sum", group))
    return t


def _completed(start: Callable[[], Tensor]) -> Tensor:
    if torch.compiler.is_compiling():
        return _wait(start())  # type: ignore[no-any-return]
    try:
        return _wait(start())  # type: ignore[no-any-return]
    except RuntimeError as error:
        raise RuntimeError(
            "normkern: processes could not exchange statistics; every process of the group must call the layer, also "
            f"one without samples, and its backward pass: {error}"
        ) from error


class _SumOverProcesses(torch.autograd.Function):
    """Differentiable any number of times: every process's loss depends on every summand."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, groups: tuple[str, ...]) -> Tensor:
        ctx.groups = groups
        return _summed(t.contiguous(), groups)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _SumOverProcesses.apply(dy, ctx.groups), None  # type: ignore[no-untyped-call]


# ---- moments, forward and backward of a part


def merge(count: Tensor, mean: Tensor, var: Tensor, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """Count [1], mean and biased variance [statistics groups], float64, of all processes together.

    The merge is that of Chan, Golub and LeVeque (Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances, 1979), for any number of parts. Where mean is empty, var is a second moment.
    """
    every = _gathered(torch.cat([count, mean, var * count]), group)
    counts, means, squares = torch.split(every, [1, mean.numel(), var.numel()], 1)
    total = counts.sum(0)
    least = total.clamp(min=1)  # without any samples, everything is 0
    squares = squares.sum(0)
    mean = (counts / least * means).sum(0)
    if mean.numel():
        squares = squares + (counts * (means - mean).square()).sum(0)
    return total, mean, squares / least


def part_moments(part: Part, backend: Backend, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean (empty for a second moment) and variance over all processes."""
    stats = part.problem.stats
    count = torch.full((1,), stats.count, dtype=torch.float64, device=x.device)
    if x.numel() == 0:
        var = count.new_zeros(stats.groups)
        mean = var if part.problem.moments == Moments.mean_var else var[:0]
    else:
        mean, var = backend.moments(dataclasses.replace(part.problem, act=Act.none), x)
    for group in part.groups:
        count, mean, var = merge(count, mean, var, group)
    return count, mean, var


def part_forward(
    part: Part,
    backend: Backend,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y of this process, then count, mean and variance of all."""
    count, mean, var = part_moments(part, backend, x)
    if x.numel() == 0:
        return _after(x, var), count, mean, var
    y = backend.forward(part.given, x, weight, bias, residual, _or_zero(mean, var), var, False)[0]
    return y, count, mean, var


def _after(x: Tensor, exchanged: Tensor) -> Tensor:
    """Something empty like x that needs what was exchanged: a compiler drops collectives that nobody reads, and then
    the other processes wait for ever."""
    return x.detach() + exchanged.sum().to(x.dtype)


def _or_zero(mean: Tensor, var: Tensor) -> Tensor:
    """A second moment is a variance about 0."""
    return mean if mean.numel() else torch.zeros_like(var)


def part_backward(
    part: Part,
    backend: Backend,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    count: Tensor,
    mean: Tensor,
    var: Tensor,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias, dresidual. dx is that of the sum of all processes' losses; the others are this process's
    share of it, which whoever averages gradients adds up."""
    groups, stats = var.numel(), part.problem.stats
    nothing = x.new_empty(0)
    dx = dweight = dbias = dresidual = nothing
    sums = var.new_zeros(2 * groups)
    second_moment = mean.numel() == 0
    mean = _or_zero(mean, var)
    if x.numel() == 0:
        dweight = torch.zeros_like(weight) if weight is not None else nothing
        dbias = torch.zeros_like(bias) if bias is not None else nothing
        dx = dresidual = torch.zeros_like(x)
        sums = sums + dy.sum().double()  # 0; without it a compiler sees a constant, and exchanges that in forward
    elif part.problem.affine == stats:
        # The gradients of weight and bias are the sums that dx needs, but for a factor: one sweep gives all.
        wide = var.new_ones(groups) if weight is None else weight.double()
        wide_bias = var.new_zeros(groups) if bias is None else bias.double()
        asked = needs | (NEED_DWEIGHT | NEED_DBIAS if needs & NEED_DX else 0)
        dx, dweight, dbias, dresidual = backend.backward(part.given, dy, x, wide, wide_bias, residual, mean, var, asked)
        if needs & NEED_DX:
            scale = wide.view(-1) * (var + part.problem.eps).rsqrt()
            sums = torch.cat([scale * dbias, scale * dweight])
        dweight = dweight if weight is None else dweight.to(weight.dtype)
        dbias = dbias if bias is None else dbias.to(bias.dtype)
    else:
        dx, dweight, dbias, dresidual = backend.backward(part.given, dy, x, weight, bias, residual, mean, var, needs)
        if needs & NEED_DX:
            one, zero = var.new_ones(groups), var.new_zeros(groups)
            needs_sums = NEED_DWEIGHT | NEED_DBIAS
            _, by_xhat, plain, _ = backend.backward(part.plain, dx, x, one, zero, None, mean, var, needs_sums)
            sums = torch.cat([plain, by_xhat])
    if needs & NEED_DX:
        # So far dx took the moments for constants. What they add is linear in xhat, for which forward is the kernel.
        sums = _summed(sums, part.groups)
        if x.numel() == 0:
            dx = _after(x, sums)
        else:
            bias_of, weight_of = torch.split(sums / -count.clamp(min=1), groups)
            if second_moment:
                bias_of = torch.zeros_like(bias_of)
            dx = backend.forward(part.plain, x, weight_of.contiguous(), bias_of.contiguous(), dx, mean, var, False)[0]
    return dx, dweight, dbias, dresidual


# ---- batch norm over the processes of a group


class _SyncNormalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        part: Part,
        backend: Backend,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, count, mean, var = part_forward(part, backend, x, weight, bias, residual)
        used = residual if part.problem.act != Act.none else None
        ctx.save_for_backward(x, weight, bias, used, count, mean, var)
        ctx.mark_non_differentiable(count, mean, var)
        ctx.set_materialize_grads(False)
        ctx.part, ctx.backend, ctx.strides = part, backend, x.stride()
        return y, count, mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 6
        part: Part = ctx.part
        x, weight, bias, residual, count, mean, var = ctx.saved_tensors
        if x.stride() != ctx.strides:  # a hook on saved tensors may have brought it back otherwise
            x = torch.empty_strided(x.shape, ctx.strides, dtype=x.dtype, device=x.device).copy_(x)
            residual = None if residual is None else autograd.same_buffer(residual, x)
        wanted = ctx.needs_input_grad[2:]
        if autograd._must_be_differentiable(dy):
            return None, None, *_differentiable_backward(part, wanted, dy, x, weight, bias, residual, count)
        needs = wanted[0] * NEED_DX | wanted[1] * NEED_DWEIGHT | wanted[2] * NEED_DBIAS
        if wanted[3] and part.problem.act != Act.none:
            needs |= NEED_DRESIDUAL
        dense = autograd.same_buffer(dy, x)
        got = part_backward(part, ctx.backend, dense, x, weight, bias, residual, count, mean, var, needs)
        dresidual = got[3] if part.problem.act != Act.none else dy
        gradients = (got[0], got[1], got[2], dresidual)
        return None, None, *(g if want else None for g, want in zip(gradients, wanted, strict=True))


def _differentiable_backward(
    part: Part,
    wanted: tuple[bool, ...],
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    count: Tensor,
) -> list[Tensor | None]:
    """dx, dweight, dbias, dresidual as functions that can be differentiated again: the formula, and autograd."""
    inputs = (x, weight, bias, residual)
    targets = [t for t, want in zip(inputs, wanted, strict=True) if want and t is not None]
    with torch.enable_grad():
        values = eager._viewed(x, part.problem.stats)
        least = count.clamp(min=1)
        mean = _SumOverProcesses.apply(values.sum((1, 3)).view(-1), part.groups) / least  # type: ignore[no-untyped-call]
        centred = values - eager._by_group(mean, part.problem.stats)
        var = _SumOverProcesses.apply(centred.square().sum((1, 3)).view(-1), part.groups) / least  # type: ignore[no-untyped-call]
        y = eager.normalize(part.given, x, weight, bias, residual, mean, var)
    found = iter(torch.autograd.grad(y, targets, dy, create_graph=torch.is_grad_enabled(), materialize_grads=True))
    gradients = [next(found) if want and t is not None else None for t, want in zip(inputs, wanted, strict=True)]
    if wanted[3] and residual is None:  # not saved, because without an activation it only passes dy on
        gradients[3] = dy
    return gradients


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    process_group: Any = None,
    residual: Tensor | None = None,
    act: str | None = None,
    skip_nonfinite: bool = False,
) -> Tensor:
    """batch_norm, in training with the moments of the batches of all processes of the group (None: all processes).

    input is (N, C, ...), with an N of its own in each process, which may be 0; the rest is as in batch_norm, and every
    process of the group has to make the call. Gradients of weight and bias are those of this process's output, so that
    DistributedDataParallel averages them as it does for other layers; that of the input is the one of the sum of all
    processes' losses. Any device whose backend of torch.distributed gathers float64; running statistics are those of
    one process with all batches. With `skip_nonfinite` an infinite or NaN moment moves no running statistics.

    Raises what batch_norm raises, and RuntimeError where a process of the group does not take part in time.
    """
    name = "sync_batch_norm"
    check_flag(name, "training", training)
    group = _group_name(process_group) if training else None
    if group is None:
        return functional.batch_norm(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,  # type: ignore[arg-type]
            eps,
            residual=residual,
            act=act,
        )
    check_input(name, input, 2)
    eps, activation = check_float(name, "eps", eps), check_act(name, act)
    if eps <= 0:
        raise ValueError(f"{name}: eps must be positive in training; got eps={eps}")
    momentum = momentum if isinstance(momentum, Tensor) else check_float(name, "momentum", momentum)
    channels = input.shape[1]
    check_running(name, running_mean, running_var, channels, None, input)
    weight = check_parameter(name, "weight", weight, (channels,), input)
    bias = check_parameter(name, "bias", bias, (channels,), input)
    check_residual(name, residual, input)
    if autograd._transformed():
        raise RuntimeError(f"{name}: torch.func and forward-mode differentiation do not reach over processes")
    x = input
    if x.numel() == 0:
        empty = Domain(1, 0, channels, 1)
        found = Problem(empty, empty, Moments.mean_var, activation, eps)
    else:
        x, found = functional._fit(x, problems.batch, activation, eps, False)
        residual = None if residual is None else autograd.same_buffer(residual, x)
    part, backend = Part(found, (group,)), select(x)
    needs_grad = any(t is not None and t.requires_grad for t in (x, weight, bias, residual))
    run = _SyncNormalize.apply if torch.is_grad_enabled() and needs_grad else part_forward
    y, count, mean, var = run(part, backend, x, weight, bias, residual)
    if running_mean is not None and running_var is not None:
        moved = count > 0  # no samples at all change nothing
        if skip_nonfinite:
            moved = moved & (torch.isfinite(mean) & torch.isfinite(var)).all()
        _update_running(running_mean, running_var, count, mean, var, momentum, moved)
    return y if x is input else autograd.same_buffer(y, torch.empty_like(input))


def _update_running(
    running_mean: Tensor,
    running_var: Tensor,
    count: Tensor,
    mean: Tensor,
    var: Tensor,
    momentum: float | Tensor,
    moved: Tensor,
) -> None:
    """As batch_norm does, with a count, and a decision whether to move, that only the device knows."""
    unbiased = var * (count / (count - 1).clamp(min=1))
    following = [
        torch.where(moved, value * momentum + running.double() * (1 - momentum), running.double())
        for running, value in ((running_mean, mean), (running_var, unbiased))
    ]
    running_mean.copy_(following[0])
    running_var.copy_(following[1])


def _group_name(process_group: Any) -> str | None:
    """The name of the group, or None where there is nobody to exchange statistics with."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group: Any = dist.group.WORLD if process_group is None else process_group
    if dist.get_world_size(group) == 1:
        return None
    name: str = group.group_name
    return name
