"""running.py: running statistics: how they move, and how to keep them from moving."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad

from normkern import aten
from normkern.backends import select
from normkern.backends.native import Native


def update(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    count: int,
    momentum: float | Tensor,
    only: Tensor | None = None,
) -> None:
    """running = (1 - momentum) * running + momentum * moment, in float64, rounded to the running tensor's dtype.

    mean and var, float64 [batches * channels], are the biased moments of `count` elements each; of several batches the
    average counts, and the variance is made unbiased. With `only`, a bool tensor of size 1, nothing moves where it is
    False: no one waits for its value. None of these tensors requires gradients.
    """
    if torch._C._are_functorch_transforms_active() and not _wrapped(running_mean):
        # The function under torch.func captured the statistics, and writes to them as torch's does.
        if _batched(mean):
            raise RuntimeError(
                "batch_norm: Batch norm got a batched tensor as input while the running_mean or running_var, which are "
                "updated in place, are not batched; give each sample statistics of its own, or none "
                "(track_running_stats=False)"
            )
        mean, var = _unwrapped(mean), _unwrapped(var)
        momentum = _unwrapped(momentum) if isinstance(momentum, Tensor) else momentum
        only = None if only is None else _unwrapped(only)
        with temporarily_clear_interpreter_stack():
            update(running_mean, running_var, mean, var, count, momentum, only)
        return
    if only is None and not isinstance(momentum, Tensor) and _fit_for_kernels(running_mean, running_var):
        backend = select(running_mean)
        if isinstance(backend, Native):
            backend.update_running(running_mean, running_var, mean, var, count, momentum)
            return
    channels = running_mean.shape[0]
    if mean.shape[0] != channels:
        mean, var = mean.view(-1, channels).mean(0), var.view(-1, channels).mean(0)
    # Both or neither: what can fail comes before the first write.
    next_mean = _moved(running_mean, mean, momentum, only)
    next_var = _moved(running_var, var * (count / (count - 1)), momentum, only)
    running_mean.copy_(next_mean)
    running_var.copy_(next_var)


def move_in_forward(x: Tensor, running_mean: Tensor, running_var: Tensor) -> bool:
    """Whether the backend of x moves them itself in the forward pass of a batch norm, as `update` would."""
    return (
        _fit_for_kernels(running_mean, running_var)
        and forward_ad._current_level < 0
        and hasattr(select(x), "batch_forward")
    )


def _fit_for_kernels(running_mean: Tensor, running_var: Tensor) -> bool:
    return (
        running_mean.is_contiguous()
        and running_var.is_contiguous()
        and not torch._C._are_functorch_transforms_active()
        and not aten.exporting()
    )


def _wrapped(t: Tensor) -> bool:
    return functorch.is_functorch_wrapped_tensor(t)


def _batched(t: Tensor) -> bool:
    while _wrapped(t):
        if functorch.is_batchedtensor(t):
            return True
        t = functorch.get_unwrapped(t)
    return False


def _unwrapped(t: Tensor) -> Tensor:
    while _wrapped(t):
        t = functorch.get_unwrapped(t)
    return t.detach()


def _moved(running: Tensor, value: Tensor, momentum: float | Tensor, only: Tensor | None) -> Tensor:
    wide = running.to(value.dtype)
    moved = value * momentum + wide * (1 - momentum)
    return moved if only is None else torch.where(only, moved, wide)


@contextmanager
def frozen_running_stats(model: torch.nn.Module) -> Iterator[None]:
    """Inside the block, training forward passes of `model` leave running statistics and counts of batches alone.

    Batches are normalized as ever. Made for forward passes that repeat one: the second pass of a sharpness-aware step,
    or the recomputation of a checkpoint (`context_fn=lambda: (nullcontext(), frozen_running_stats(model))`). Layers of
    normkern.nn skip the update; every other module with a running_mean gets its statistics back when the block ends,
    also by an exception. Not to be entered by two threads with one model.
    """
    own: list[Any] = []
    others = []
    for module in model.modules():
        if hasattr(module, "statistics_frozen"):
            own.append(module)
        elif isinstance(module._buffers.get("running_mean"), Tensor):
            names = ("running_mean", "running_var", "num_batches_tracked")
            others.append([(b, b.clone()) for name in names if isinstance(b := module._buffers.get(name), Tensor)])
    for module in own:
        module.statistics_frozen += 1
    try:
        yield
    finally:
        for module in own:
            module.statistics_frozen -= 1
        with torch.no_grad():
            for buffers in others:
                for buffer, before in buffers:
                    buffer.copy_(before)
