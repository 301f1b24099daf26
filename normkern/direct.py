"""direct.py: calls on the CPU, past the checks and past torch's dispatcher.

A call that went through functional.py's checks once is remembered there (`remember`), by everything the checks look at.
The next one like it is recognized in C++ (csrc/bind/direct.cpp) and runs at once (`run`), with the same kernels and so
the same bits. Wherever something watches or transforms calls (torch.compile, torch.func, modes, tracing, the profiler),
nothing is recognized.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normkern import autograd, backends
from normkern.backends import select
from normkern.backends.native import Native, thread_pool
from normkern.problem import Moments, Problem

MOST_ELEMENTS = 1 << 22  # of x; C++ holds it too

_is_compiling = torch.compiler.is_compiling
_watchers: tuple[Any, ...] = (
    torch._C._are_functorch_transforms_active,
    torch._C._len_torch_dispatch_stack,
    torch._C._get_tracing_state,
    torch._C._autograd._profiler_enabled,
)


def _allowed(x: Tensor) -> bool:
    # C++ asks only where a level is open or something is forced, or the first backend is another than it was.
    if forward_ad._current_level >= 0:
        return False
    if backends._forced_anywhere or backends._environment is not None:
        return type(select(x)) is Native
    # Nothing is asked for: as select, without the price of asking the first backend.
    for backend in backends.BACKENDS.values():
        if type(backend) is Native:
            return backend.cpu_why_not is None
        if backend.why_not(x) is None:
            return False
    return False


def _unwatched() -> bool:
    return not any(watcher() for watcher in _watchers)


def _gradients(
    known: Any,
    moments: Tensor | None,
    needs: int,
    dy: Tensor,
    x: Tensor,
    *saved: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """dx, dweight, dbias and dresidual of a remembered call where its kernel cannot make them: where they have to be
    differentiable again, or something watches. `saved` are weight, bias, residual, mean and var."""
    problem: Problem = known.problem
    weight, bias, residual, mean, var = saved
    if moments is not None:
        mean, var = (None, moments) if problem.moments == Moments.second else moments.view(2, -1).unbind()
    wanted = tuple(bool(needs >> i & 1) for i in range(4))
    backend = backends.BACKENDS["native"]
    return autograd.gradients(problem, backend, wanted, dy, known.strides, x, weight, bias, residual, mean, var)


def _host() -> Any:
    """The C++ side, or None where it is not built, or sees no tensors in this version of torch."""
    try:
        host: Any = importlib.import_module("normkern._host")
    except ImportError:
        return None
    if not hasattr(host, "lend"):  # of an older build
        return None
    native = next(iter(backends.BACKENDS.values()))
    sees = host.set_up(
        Tensor,
        torch.nn.Parameter,
        torch.empty_like,
        Tensor.is_neg,
        torch.is_grad_enabled,
        _watchers,
        _allowed,
        vars(forward_ad),
        vars(backends),
        native if isinstance(native, Native) and native.cpu_why_not is None else None,
        autograd.same_buffer,
        *thread_pool(),
    )
    return host if sees else None


def _take_node(host: Any) -> str | None:
    """Let recognized calls be differentiable, in C++; or why they are not, and take the general path."""
    if host is None:
        return "the kernels are not built"
    if host.build_info["torch"] != torch.__version__:
        return f"built for torch {host.build_info['torch']}"
    try:
        node: Any = importlib.import_module("normkern._node")
    except ImportError as error:
        return f"not built ({error})"
    host.lend(node.lend(host.passes, _gradients))
    return None


_HOST = _host()
node_why_not = _take_node(_HOST)
_run: Any = (lambda *_: None) if _HOST is None else _HOST.run
_increment_version: Any = torch.autograd.graph.increment_version


def run(call: tuple[Any, ...], momentum: float | None) -> Tensor | None:
    """y, if a call like this was remembered; None: it has to go through all checks.

    `call` is (name, x, weight, bias, residual, mean, var, *options), where options are what else the checks look at.
    mean and var are running statistics that move by `momentum`; or, if that is None, the moments as they are given.
    """
    if _is_compiling():
        return None
    y = _run(call, momentum)
    if y is not None and momentum is not None and call[5] is not None:
        _increment_version(call[5:7])
    return y  # type: ignore[no-any-return]


def remember(call: tuple[Any, ...], problem: Problem) -> None:
    """The call, as for `run`, has passed all checks and is this problem of x as it is."""
    if _is_compiling() or _HOST is None or problem.weight_order is not None:
        return
    if not call[1].is_cpu or call[1].numel() > MOST_ELEMENTS or not _unwatched():
        return
    sizes = problem.stats.sizes, problem.affine.sizes
    _HOST.remember(call, problem, *sizes, int(problem.moments), int(problem.act), problem.eps)
