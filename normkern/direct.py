"""direct.py: small calls on the CPU, past the checks and past torch's dispatcher.

A call that went through functional.py's checks once is remembered there (`remember`), by everything the checks look at.
The next one like it is recognized in C++ and runs at once (`run`), with the same kernels and so the same bits. Wherever
something watches or transforms calls (torch.compile, torch.func, modes, tracing, the profiler), nothing is recognized.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normkern import autograd
from normkern.backends import BACKENDS, select
from normkern.backends.native import Native
from normkern.problem import NEED_DRESIDUAL, Act, Moments, Problem

MOST_ELEMENTS = 1 << 14  # of x; C++ holds it too


def _host() -> Any:
    """The C++ side, or None where it is not built, or sees no tensors in this version of torch."""
    try:
        host: Any = importlib.import_module("normkern._host")
    except ImportError:
        return None
    known = host.set_up(Tensor, torch.nn.Parameter, torch.empty_like, Tensor.is_neg)
    return host if known else None


_HOST = _host()
_recall: Any = (lambda *_: None) if _HOST is None else _HOST.recall

_is_compiling = torch.compiler.is_compiling
_functorch = torch._C._are_functorch_transforms_active
_modes = torch._C._len_torch_dispatch_stack
_tracing: Any = torch._C._get_tracing_state
_profiling: Any = torch._C._autograd._profiler_enabled
_increment_version: Any = torch.autograd.graph.increment_version
_CPU = torch.device("cpu")


def _unwatched() -> bool:
    return not (_functorch() or forward_ad._current_level >= 0 or _modes() or _profiling()) and _tracing() is None


def run(call: tuple[Any, ...], momentum: float | None) -> Tensor | None:
    """y, if a call like this was remembered; None: it has to go through all checks.

    `call` is (name, x, weight, bias, residual, mean, var, *options), where options are what else the checks look at.
    mean and var are running statistics that move by `momentum`; or, if that is None, the moments as they are given.
    """
    if _is_compiling():
        return None
    known = _recall(*call)
    if known is None or not _unwatched() or type(select(call[1])) is not Native:
        return None
    _, x, weight, bias, residual, mean, var, *_ = call
    if mean is not None and var is not None:
        if mean.requires_grad or var.requires_grad:
            return None
        if momentum is not None:
            _increment_version((mean, var))
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        return _apply(known, x, weight, bias, residual, (mean, var, momentum))  # type: ignore[no-any-return]
    return known.forward(x, weight, bias, residual, mean, var, None, momentum)  # type: ignore[no-any-return]


def remember(call: tuple[Any, ...], problem: Problem) -> None:
    """The call, as for `run`, has passed all checks and is this problem of x as it is."""
    if _is_compiling() or _HOST is None or problem.weight_order is not None:
        return
    if not call[1].is_cpu or call[1].numel() > MOST_ELEMENTS or not _unwatched():
        return
    sizes = problem.stats.sizes, problem.affine.sizes
    _HOST.remember(call, problem, *sizes, int(problem.moments), int(problem.act), problem.eps)


class _Direct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        known: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        statistics: tuple[Tensor | None, Tensor | None, float | None],
    ) -> Tensor:
        mean, var, momentum = statistics
        size = known.moments_size
        moments = torch.empty(size, dtype=torch.float64, device=_CPU) if size else None
        y = known.forward(x, weight, bias, residual, mean, var, moments, momentum)
        # The backward pass sees z again only where an activation follows.
        used = residual if known.problem.act != Act.none else None
        if moments is not None:
            ctx.save_for_backward(x, weight, bias, used, moments)
        else:
            ctx.save_for_backward(x, weight, bias, used, mean, var)
        ctx.known = known
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        known = ctx.known
        problem: Problem = known.problem
        wanted = ctx.needs_input_grad[1:5]
        x, weight, bias, residual, *rest = ctx.saved_tensors
        moments = mean = var = None
        if problem.moments == Moments.given:
            mean, var = rest
        else:
            moments = rest[0]
        if not _is_compiling() and not torch.is_grad_enabled() and _unwatched():
            needs = wanted[0] | wanted[1] << 1 | wanted[2] << 2 | wanted[3] << 3
            passes_on = wanted[3] and problem.act == Act.none
            if passes_on:
                needs &= ~NEED_DRESIDUAL
            for laid_out in (lambda: dy, lambda: autograd.same_buffer(dy, x)):
                got = known.backward(laid_out(), x, weight, bias, residual, mean, var, moments, needs)
                if got is not None:
                    return None, *got[:3], dy if passes_on else got[3], None
        if moments is not None:
            groups = problem.stats.groups
            mean, var = (None, moments) if problem.moments == Moments.second else moments.split(groups)
        backend = BACKENDS["native"]
        found = autograd.gradients(problem, backend, wanted, dy, known.strides, x, weight, bias, residual, mean, var)
        return None, *found, None


# As autograd._run: Function.apply without what it does for torch.func, which never comes here.
_apply: Any = super(torch.autograd.Function, _Direct).apply
