"""ascent.py: the first half of a sharpness-aware step: from gradients to perturbed weights.

One step up in the norm ||T^-1 e||_p < rho (Foret et al. 2021; Kwon et al. 2021; Mueller et al. 2023, section 2):
    p = 2:    e = rho T^2 g / (||T g||_2 + 1e-16)
    p = inf:  e = rho T sign(g)
with T diagonal: 1, |w| + eta, ||w of the tensor||_2 (1 + eta), or (1 + eta g^2)^(-1/2). The norm in the denominator is
one for all perturbed parameters, and runs over no other.

On the CPU and on CUDA this is one kernel for all tensors (csrc/core/perturb.h). Tensors it does not take, and other
devices, are handled in runs of what they have in common, laid side by side in one flat buffer: a norm layer has few
numbers and a model many norm layers, so the arithmetic takes a handful of calls, not some for every tensor. Nothing
waits for the device either way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from normkern.backends import BACKENDS, forced_backend
from normkern.checks import FLOATS

Transform = Literal["none", "element", "layer", "fisher"]
_RUN = 1 << 24  # elements in flight at a time: bounds the extra memory where a whole model is perturbed


@dataclass(frozen=True)
class Rule:
    p: Literal[2, "inf"]
    transform: Transform
    eta: float


@dataclass(frozen=True)
class Member:
    """A perturbed tensor (the part on this process) with its gradient; processes that hold other parts of it."""

    weight: Tensor
    grad: Tensor
    rho: float
    transformed: bool  # T is 1 otherwise
    numel: int  # of the whole tensor: all its holders cut the same runs
    holders: tuple[dist.ProcessGroup, ...] = ()

    def kind(self) -> tuple[Any, ...]:
        """What the members of a run share."""
        wide = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        return self.weight.device, wide, self.rho, self.transformed, self.holders


def runs(members: list[Member]) -> Iterator[list[Member]]:
    kinds: dict[tuple[Any, ...], list[Member]] = {}
    for member in members:
        kinds.setdefault(member.kind(), []).append(member)
    for alike in kinds.values():
        start = size = 0
        for end, member in enumerate(alike):
            if size and size + member.numel > _RUN:
                yield alike[start:end]
                start, size = end, 0
            size += member.numel
        yield alike[start:]


def flat(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors]).to(dtype)


def parts(values: Tensor, like: list[Tensor]) -> list[Tensor]:
    return [v.view(t.shape) for v, t in zip(torch.split(values, [t.numel() for t in like]), like, strict=True)]


def _summed(values: Tensor, holders: tuple[dist.ProcessGroup, ...]) -> Tensor:
    for group in holders:
        dist.all_reduce(values, group=group)
    return values


def _gradient_and_transform(run: list[Member], rule: Rule, grad_scale: float) -> tuple[Tensor, Tensor | None]:
    """Of a run: g and the diagonal of T, None for ones. Both flat, float32 or float64."""
    wide = run[0].kind()[1]
    g = flat([m.grad for m in run], wide)
    if grad_scale != 1:
        g = g / grad_scale
    if rule.transform == "none" or not run[0].transformed:
        return g, None
    weights = [m.weight for m in run]
    if rule.transform == "element":
        return g, flat(weights, wide).abs_().add_(rule.eta)
    if rule.transform == "fisher":
        return g, g.square().mul_(rule.eta).add_(1).rsqrt_()
    norms = torch.stack([torch.linalg.vector_norm(w, dtype=wide) for w in weights])
    if run[0].holders:
        norms = _summed(norms.square(), run[0].holders).sqrt()
    norms = norms * (1 + rule.eta)
    return g, torch.cat([n.expand(w.numel()) for n, w in zip(norms.unbind(), weights, strict=True)])


def _climb(members: list[Member], rule: Rule, grad_scale: float) -> None:
    """Add e to the weights in plain PyTorch, wherever they are and whoever holds parts of them."""
    cut = list(runs(members))
    flats: Callable[[list[Member]], tuple[Tensor, Tensor | None]]
    flats = functools.partial(_gradient_and_transform, rule=rule, grad_scale=grad_scale)
    # What is small enough stays; else memory is saved and it is all computed again.
    kept = [flats(run) for run in cut] if sum(m.numel for m in members) <= _RUN else None
    squares: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
    device = members[0].weight.device
    for run, (g, t) in zip(cut, kept or map(flats, cut), strict=True):
        # In float64, whose squares neither overflow nor vanish: loss scales and late training go far both ways.
        size = torch.linalg.vector_norm(g if t is None else g * t, dtype=torch.float64)
        squares.setdefault(run[0].holders, []).append(size.square().to(device))
    norm = torch.stack([_summed(torch.stack(each).sum(), holders) for holders, each in squares.items()]).sum().sqrt()
    for run, (g, t) in zip(cut, kept or map(flats, cut), strict=True):
        finite, length = norm.isfinite().to(g.device), norm.to(g.device, g.dtype)
        if rule.p == 2:
            e = g if t is None else g * t * t
            e = e * (run[0].rho / (length + 1e-16))
        else:
            e = g.sign() if t is None else g.sign() * t
            e = e * run[0].rho
        e = torch.where(finite, e, 0)
        weights = [m.weight for m in run]
        torch._foreach_add_(weights, parts(e, weights))


# ---- the kernel


def _native(members: list[Member], copies: list[Tensor], rule: Rule, grad_scale: float) -> None:
    weights = [m.weight for m in members]
    torch.ops.normkern.perturb_(
        weights,
        copies,
        [m.grad for m in members],
        [m.rho for m in members],
        [int(m.transformed) for m in members],
        get_args(Transform).index(rule.transform),
        rule.p == "inf",
        rule.eta,
        grad_scale,
    )
    # An operator of the stable ABI has no kernel that would do this for autograd.
    torch.autograd.graph.increment_version(weights)


# By the name of a backend.
KERNELS: dict[str, Callable[[list[Member], list[Tensor], Rule, float], None]] = {"native": _native}


@functools.cache
def _registered(key: str) -> bool:
    has_kernel: Callable[[str, str], bool] = torch._C._dispatch_has_kernel_for_dispatch_key
    return hasattr(torch.ops.normkern, "perturb_") and has_kernel("normkern::perturb_", key)


def _alike(one: Tensor, other: Tensor) -> bool:
    """Dense, with elements in the same order of memory."""
    if one.is_contiguous() and other.is_contiguous():
        return one.shape == other.shape
    dense: Callable[[Tensor], bool] = torch.ops.aten.is_non_overlapping_and_dense
    return one.shape == other.shape and one.stride() == other.stride() and dense(one)


def kernel_of(members: list[Member]) -> Callable[[list[Member], list[Tensor], Rule, float], None] | None:
    """The kernel that takes all of the members, which it must to find one norm; None where there is none."""
    backend, first = forced_backend() or BACKENDS["native"], members[0].weight
    run = KERNELS.get(backend.name)
    if run is None or backend.why_not(first) is not None or not (first.is_cpu or first.is_cuda):
        return None
    if run is _native and not _registered("CUDA" if first.is_cuda else "CPU"):
        return None
    if torch.compiler.is_compiling():
        return None
    device = first.device
    for m in members:
        plain = type(m.weight) in (Tensor, Parameter) and type(m.grad) is Tensor and not m.holders
        if not plain or m.weight.device != device or m.grad.device != device:
            return None
        if m.weight.dtype not in FLOATS or m.grad.dtype not in FLOATS or not _alike(m.weight, m.grad):
            return None
    return run


def perturb(members: list[Member], rule: Rule, grad_scale: float = 1.0) -> tuple[list[Tensor], list[Tensor]]:
    """Add e to the weights, in place; nothing is added where any gradient is not finite. Returns the weights and copies
    of what they were. An error leaves them as they were.

    grad_scale: by what the gradients are too large. Only the transform "fisher" depends on it.
    """
    weights = [m.weight for m in members]
    copies = [torch.empty_like(w) for w in weights]
    kernel = kernel_of(members)
    if kernel is not None:
        kernel(members, copies, rule, grad_scale)
        return weights, copies
    torch._foreach_copy_(copies, weights)
    try:
        _climb(members, rule, grad_scale)
    except BaseException:
        torch._foreach_copy_(weights, copies)
        raise
    return weights, copies


def average(grads: list[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """The means of the gradients over the processes, in one message for every dtype and device."""
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, grad in enumerate(grads):
        alike.setdefault((grad.device, grad.dtype), []).append(i)
    means = list(grads)
    for indices in alike.values():
        own = [grads[i] for i in indices]
        wide = torch.float64 if own[0].dtype == torch.float64 else torch.float32
        values = flat(own, wide).div_(dist.get_world_size(group))
        dist.all_reduce(values, group=group)
        for i, mean in zip(indices, parts(values, own), strict=True):
            means[i] = mean
    return means
