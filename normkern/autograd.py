"""autograd.py: gradients for every norm.

One autograd.Function around a backend's forward and backward. Nothing but x, the moments and the parameters is saved,
and with an activation after a residual that residual, or relu's mask where the backend leaves one; a backward that has
to be differentiable itself goes through the eager formula.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normkern import aten
from normkern.backends import Backend, MaskingBackend, MovingBackend, eager, select
from normkern.problem import MASKED, NEED_DBIAS, NEED_DRESIDUAL, NEED_DWEIGHT, NEED_DX, Act, Domain, Moments, Problem

_Grads = tuple[Tensor | None, ...]


def same_buffer(t: Tensor, x: Tensor) -> Tensor:
    """t with the strides of x, which is dense; t itself where it has them."""
    if t.stride() == x.stride():
        return t
    return torch.empty_like(x).copy_(t)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        problem: Problem,
        backend: Backend,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        momentum: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The backward pass sees z again only where an activation follows.
        used = residual if problem.act != Act.none else None
        if residual is not None and _leaves_mask(backend, problem, x):
            masking = cast(MaskingBackend, backend)
            y, group_mean, group_var, used = masking.masked_forward(
                problem, x, weight, bias, residual, mean, var, momentum
            )
        else:
            y, group_mean, group_var = _forward(backend, problem, x, weight, bias, residual, mean, var, True, momentum)
        if problem.moments == Moments.mean_var:
            mean, var = group_mean, group_var
        elif problem.moments == Moments.second:
            mean, var = None, group_var
        ctx.save_for_backward(x, weight, bias, used, mean, var)
        ctx.mark_non_differentiable(group_mean, group_var)
        ctx.set_materialize_grads(False)
        ctx.problem = problem
        ctx.backend = backend
        ctx.strides = x.stride()
        return y, group_mean, group_var

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> _Grads:
        if dy is None:
            return (None,) * 9
        got = gradients(ctx.problem, ctx.backend, ctx.needs_input_grad[2:6], dy, ctx.strides, *ctx.saved_tensors)
        return None, None, *got, None, None, None


def _leaves_mask(backend: Backend, problem: Problem, x: Tensor) -> bool:
    return hasattr(backend, "masks") and backend.masks(x) and problem.can_mask(x.element_size())


def _is_mask(residual: Tensor) -> bool:
    return residual.dtype is torch.uint8


def _passed(mask: Tensor, x: Tensor) -> Tensor:
    """The bits of a mask as a bool tensor like x."""
    together = MASKED // x.element_size()
    bits = mask.unsqueeze(1) >> torch.arange(together, dtype=torch.uint8, device=mask.device) & 1
    return bits.flatten().to(torch.bool).as_strided(x.shape, x.stride())


def _forward(
    backend: Backend,
    problem: Problem,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    save: bool,
    momentum: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if momentum is None or mean is None or var is None:
        return backend.forward(problem, x, weight, bias, residual, mean, var, save)
    moving = cast(MovingBackend, backend)
    return moving.batch_forward(problem, x, weight, bias, residual, mean, var, momentum)


def gradients(
    problem: Problem,
    backend: Backend,
    wanted: tuple[bool, ...],
    dy: Tensor,
    strides: tuple[int, ...],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    dtotal: Tensor | None = None,
) -> _Grads:
    """dx, dweight, dbias, dresidual where `wanted`; `strides` are those that x had in the forward pass. `dtotal` is
    added to dx. A mask, uint8, takes the place of the residual."""
    if x.stride() != strides:  # a hook on saved tensors may have brought it back otherwise
        x = torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)
        if residual is not None and not _is_mask(residual):
            residual = same_buffer(residual, x)
    if _must_be_differentiable(dy):
        dx, *others = _differentiable_backward(problem, wanted, dy, x, weight, bias, residual, mean, var)
        return dx if dx is None or dtotal is None else dx + dtotal, *others
    need_x, need_weight, need_bias, need_residual = wanted
    dresidual = None
    needs = need_x * NEED_DX | need_weight * NEED_DWEIGHT | need_bias * NEED_DBIAS
    if need_residual:
        if problem.act == Act.none:
            dresidual = dy
        else:
            needs |= NEED_DRESIDUAL
    if not needs:
        return None, None, None, dresidual
    dy = same_buffer(dy, x)
    if dtotal is None or not need_x:
        got = backend.backward(problem, dy, x, weight, bias, residual, mean, var, needs)
    else:
        dtotal = same_buffer(dtotal, x)
        got = (*backend.add_backward(problem, dy, dtotal, x, weight, bias, mean, var, needs), x)
    return (
        got[0] if need_x else None,
        got[1].view(weight.shape) if need_weight and weight is not None else None,
        got[2].view(bias.shape) if need_bias and bias is not None else None,
        got[3] if needs & NEED_DRESIDUAL else dresidual,
    )


# Function.apply without what it does for torch.func, which never comes here (see _transformed): 4 of 12 us a call.
_run: Any = super(torch.autograd.Function, _Normalize).apply


def _must_be_differentiable(dy: Tensor) -> bool:
    """Under create_graph, or where dy is a batch of gradients that torch.func hands over at once."""
    if torch.compiler.is_compiling():
        return False  # compiled graphs have no second derivatives, and are traced with gradients enabled
    return torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()


def _differentiable_backward(
    problem: Problem,
    wanted: tuple[bool, ...],
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
) -> _Grads:
    """dx, dweight, dbias, dresidual as functions that can be differentiated again."""
    create_graph = torch.is_grad_enabled()
    if residual is not None and _is_mask(residual):  # relu's own derivative is constant
        dy, residual = torch.where(_passed(residual, x), dy, 0), None
        problem = replace(problem, act=Act.none)
    inputs = [x, weight, bias, residual]
    targets = [t for t, want in zip(inputs, wanted, strict=True) if want and t is not None]
    gradients: Iterator[Tensor] = iter(())
    if targets:
        with torch.enable_grad():
            y = eager.normalize(problem, x, weight, bias, residual, mean, var)
        gradients = iter(torch.autograd.grad(y, targets, dy, create_graph=create_graph))
    found: list[Tensor | None] = [
        next(gradients) if want and t is not None else None for t, want in zip(inputs, wanted, strict=True)
    ]
    if wanted[3] and residual is None:  # not saved, because without an activation it only passes dy on
        found[3] = dy
    return tuple(found)


def _transformed() -> bool:
    """Inside torch.func's grad, vmap or jvp, or forward-mode differentiation: compiled kernels cannot follow there."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def normalize(
    problem: Problem,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    save: bool,
    momentum: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the moments of every group if `save`; mean and var are read only where the moments are given. With
    `momentum` they are running statistics, of which running.move_in_forward has said that the backend moves them."""
    if _transformed() or aten.exporting():
        y, group_mean, group_var = eager.apply(problem, x, weight, bias, residual, mean, var)
        return y, group_mean.detach(), group_var.detach()
    backend = select(x)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        run = _run
        if torch.compiler.is_compiling():
            run = _Normalize.apply
            if residual is x:  # which torch.compile does not accept
                residual = x.view_as(x)
        return run(problem, backend, x, weight, bias, residual, mean, var, momentum)  # type: ignore[no-any-return]
    return _forward(backend, problem, x, weight, bias, residual, mean, var, save, momentum)


class _NormalizeSum(torch.autograd.Function):
    """Of what it makes only the sum and the moments are saved."""

    @staticmethod
    def forward(
        ctx: Any,
        problem: Problem,
        backend: Backend,
        x: Tensor,
        add: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        y, total, mean, var = backend.add_forward(problem, x, add, weight, bias, True)
        ctx.save_for_backward(total, weight, bias, None if problem.moments == Moments.second else mean, var)
        ctx.set_materialize_grads(False)
        ctx.problem = problem
        ctx.backend = backend
        ctx.strides = x.stride()
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None) -> _Grads:
        need_x, need_add, *need_params = ctx.needs_input_grad[2:]
        if dy is None:
            return None, None, dtotal if need_x else None, dtotal if need_add else None, None, None
        wanted = (need_x or need_add, *need_params, False)
        total, weight, bias, mean, var = ctx.saved_tensors
        dx, dweight, dbias, _ = gradients(
            ctx.problem, ctx.backend, wanted, dy, ctx.strides, total, weight, bias, None, mean, var, dtotal
        )
        return None, None, dx if need_x else None, dx if need_add else None, dweight, dbias


_run_sum: Any = super(torch.autograd.Function, _NormalizeSum).apply


def normalize_sum(
    problem: Problem, x: Tensor, add: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y of x + add, and that sum; `add` has the strides of x, and the problem no activation."""
    if _transformed():
        total = x + add
        return normalize(problem, total, weight, bias, None, None, None, False)[0], total
    backend = select(x)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or add.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        run = _run_sum
        if torch.compiler.is_compiling():
            run = _NormalizeSum.apply
            if add is x:  # which torch.compile does not accept
                add = x.view_as(x)
        y, total = run(problem, backend, x, add, weight, bias)
        return y, total if x.requires_grad or add.requires_grad else total.detach()
    return backend.add_forward(problem, x, add, weight, bias, False)[:2]


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, problem: Problem, backend: Backend, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        ctx.domain = problem.stats
        return backend.moments(problem, x)

    @staticmethod
    def backward(ctx: Any, dmean: Tensor, dvar: Tensor) -> _Grads:
        (x,) = ctx.saved_tensors
        return None, None, eager.moments_gradient(ctx.domain, x, dmean, dvar)


def moments(domain: Domain, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every group, float64; differentiable any number of times."""
    problem = Problem(domain, domain)
    if _transformed() or aten.exporting():
        return eager.differentiable_moments(domain, x)
    backend = select(x)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Moments.apply(problem, backend, x)  # type: ignore[no-any-return,no-untyped-call]
    return backend.moments(problem, x)
