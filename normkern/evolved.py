"""evolved.py: the norms whose map or whose moments are not those of the other ones, with their gradients.

EvoNorm-S0 and -B0 have a map of their own (csrc/core/evolved.h): compiled on the CPU, and on every other backend made
of torch's operators around the backend's moments. Filter response norm with a threshold or a learned eps, and variance
norm, run through the three programs of every backend. What is saved is x, the parameters and the moments; a backward
that must be differentiable goes through `formula`, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from normkern import aten
from normkern.autograd import _must_be_differentiable, _transformed, same_buffer
from normkern.backends import Backend, select
from normkern.backends.native import Native
from normkern.problem import Domain, Problem, memory_order

Tensors = tuple[Tensor | None, ...]


class Norm(Protocol):
    """A norm of x with parameters, any of which may be None. Moments and sums are float64."""

    def formula(self, x: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        """y in float64, and what `forward` saves; differentiable any number of times."""

    def forward(self, backend: Backend, x: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        """y, and the moments that are saved."""

    def backward(
        self,
        backend: Backend,
        wanted: Sequence[bool],
        dy: Tensor,
        x: Tensor,
        parameters: Sequence[Tensor | None],
        moments: Sequence[Tensor],
    ) -> Sequence[Tensor | None]:
        """Gradients of x and of the parameters where they are wanted; dy has the strides of x."""


class _Evolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, norm: Norm, backend: Backend, x: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        y, *moments = norm.forward(backend, x, *parameters)
        ctx.save_for_backward(x, *parameters, *moments)
        ctx.mark_non_differentiable(*moments)
        ctx.set_materialize_grads(False)
        ctx.norm, ctx.backend, ctx.count, ctx.strides = norm, backend, len(parameters), x.stride()
        return y, *moments

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Tensors:
        wanted = ctx.needs_input_grad[2:]
        if dy is None:
            return (None,) * (2 + len(wanted))
        x, *rest = ctx.saved_tensors
        parameters, moments = rest[: ctx.count], rest[ctx.count :]
        if x.stride() != ctx.strides:  # a hook on saved tensors may have brought it back otherwise
            x = torch.empty_strided(x.shape, ctx.strides, dtype=x.dtype, device=x.device).copy_(x)
        if _must_be_differentiable(dy):
            return None, None, *_differentiable_backward(ctx.norm, wanted, dy, x, parameters)
        got = ctx.norm.backward(ctx.backend, wanted, same_buffer(dy, x), x, parameters, moments)
        return (
            None,
            None,
            *(
                grad.to(of.dtype).view_as(of) if want and grad is not None and of is not None else None
                for grad, of, want in zip(got, (x, *parameters), wanted, strict=True)
            ),
        )


def _differentiable_backward(
    norm: Norm, wanted: Sequence[bool], dy: Tensor, x: Tensor, parameters: Sequence[Tensor | None]
) -> Tensors:
    inputs = (x, *parameters)
    targets = [t for t, want in zip(inputs, wanted, strict=True) if want and t is not None]
    with torch.enable_grad():
        y = norm.formula(x, *parameters)[0].to(x.dtype)
    found = iter(torch.autograd.grad(y, targets, dy, create_graph=torch.is_grad_enabled()))
    return tuple(next(found) if want and t is not None else None for t, want in zip(inputs, wanted, strict=True))


def apply(norm: Norm, x: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
    """y in x's dtype and layout, and the moments, which carry no gradients."""
    if _transformed() or aten.exporting():
        y, *moments = norm.formula(x, *parameters)
        return y.to(x.dtype), *(m.detach() for m in moments)
    if type(x) is not Tensor and hasattr(x, "device_mesh"):
        raise NotImplementedError(f"{type(norm).__name__}: input must be a plain tensor; got a DTensor")
    backend = select(x)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *parameters)):
        return _Evolve.apply(norm, backend, x, *parameters)  # type: ignore[no-any-return,no-untyped-call]
    return norm.forward(backend, x, *parameters)


# ---- tables of [N, C] numbers


def _wide(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.double()


def over(t: Tensor, x: Tensor) -> Tensor:
    """One number, [C] or [N, C], shaped to multiply x."""
    if t.numel() == 1:
        return t.reshape([1] * x.dim())
    t = t.reshape(-1, x.shape[1])
    return t.view(*t.shape, *[1] * (x.dim() - 2))


def _unbiased(count: int) -> float:
    """What a biased variance of `count` elements is multiplied by; that of one element stays 0."""
    return count / max(count - 1, 1)


@dataclass(frozen=True)
class Instances:
    """The channels of the samples of x: the groups of `domain`, which lie in memory with channels outermost if
    `swapped`."""

    domain: Domain
    samples: int
    channels: int
    swapped: bool

    @property
    def count(self) -> int:
        return self.domain.count

    def in_order(self, t: Tensor) -> Tensor:
        """[..., N, C] as [..., groups]."""
        return (t.transpose(-1, -2) if self.swapped else t).reshape(*t.shape[:-2], -1)

    def out_of_order(self, t: Tensor) -> Tensor:
        """[..., groups] as [..., N, C]."""
        if self.swapped:
            return t.reshape(*t.shape[:-1], self.channels, self.samples).transpose(-1, -2)
        return t.reshape(*t.shape[:-1], self.samples, self.channels)

    def moments(self, backend: Backend, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance, [N, C] each."""
        mean, var = backend.moments(Problem(self.domain, self.domain), x)
        return self.out_of_order(mean), self.out_of_order(var)


def instances(x: Tensor, domain: Domain) -> Instances:
    order = memory_order(x.shape, x.stride())
    return Instances(domain, x.shape[0], x.shape[1], order.index(1) < order.index(0))


def merged(mean: Tensor, var: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Moments of the union of sets of equal size."""
    total = mean.mean(dim, keepdim=True)
    return total.squeeze(dim), (var + (mean - total).square()).mean(dim)


# ---- the map of an evolved norm and its gradient, by the backend's kernel or by torch's operators

_S0, _B0 = 0, 1


def _native(backend: Backend, x: Tensor) -> Native | None:
    return backend if isinstance(backend, Native) and backend.evolves(x) else None


def _table(at: Instances, x: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """The kernels' table of coefficients, from numbers of every channel or of every instance."""
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    full = torch.stack([row.expand(at.samples, at.channels) for row in rows])
    return at.in_order(full).to(dtype).contiguous()


def _columns(backend: Backend, x: Tensor, rows: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """x and the coefficients in what torch's operators compute in: the eager backend is the float64 reference."""
    exact = backend.name == "eager" or x.dtype is torch.float64
    dtype = torch.float64 if exact else torch.float32
    return x.to(dtype), [over(row, x).to(dtype) for row in rows]


def _map(kind: int, backend: Backend, at: Instances, x: Tensor, rows: Sequence[Tensor]) -> Tensor:
    native = _native(backend, x)
    if native is not None:
        return native.evolve(kind, at.domain, x, _table(at, x, rows))
    v, c = _columns(backend, x, rows)
    if kind == _S0:
        y = v * torch.sigmoid(c[0] * v) * c[1] + c[2]
    else:
        y = v / torch.maximum(c[0], c[1] * v + c[2]) * c[3] + c[4]
    return same_buffer(y.to(x.dtype), x)


def _sums(kind: int, backend: Backend, at: Instances, dy: Tensor, x: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """[sums, N, C]"""
    native = _native(backend, x)
    if native is not None:
        return at.out_of_order(native.evolve_sums(kind, at.domain, dy, x, _table(at, x, rows)))
    v, c = _columns(backend, x, rows)
    g = dy.to(v.dtype)
    if kind == _S0:
        s = torch.sigmoid(c[0] * v)
        gated = g * v * s
        terms = [g, gated, gated * v * (1 - s)]
    else:
        right = c[1] * v + c[2]
        inverse = 1 / torch.maximum(c[0], right)
        ratio = g * v * inverse
        at_right = torch.where(right > c[0], ratio * inverse, 0)
        terms = [g, ratio, ratio * inverse - at_right, at_right, at_right * v]
    return torch.stack([t.flatten(2).sum(2, dtype=torch.float64) for t in terms])


def _slope(kind: int, backend: Backend, at: Instances, dy: Tensor, x: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """dx"""
    native = _native(backend, x)
    if native is not None:
        return native.evolve_backward(kind, at.domain, dy, x, _table(at, x, rows))
    v, c = _columns(backend, x, rows)
    g = dy.to(v.dtype)
    if kind == _S0:
        z = c[0] * v
        s = torch.sigmoid(z)
        dx = g * c[1] * s * (1 + z * (1 - s)) + (v - c[3]) * c[2] + c[4]
    else:
        right = c[1] * v + c[2]
        inverse = 1 / torch.maximum(c[0], right)
        rate = torch.where(right > c[0], c[1], 0)
        dx = g * c[3] * inverse * (1 - rate * v * inverse) + (v - c[5]) * c[4] + c[6]
    return same_buffer(dx.to(x.dtype), x)


def _rounded(mean: Tensor, x: Tensor) -> Tensor:
    """What of a mean the kernels can hold in one number; the rest goes into an offset."""
    return mean if x.dtype is torch.float64 else mean.float().double()


# ---- EvoNorm


@dataclass(frozen=True)
class S0:
    """x * sigmoid(v*x) / sqrt(var of the group + eps) * weight + bias, all parameters [C]."""

    at: Instances
    groups: int
    eps: float
    unbiased: bool

    @property
    def _correction(self) -> float:
        return _unbiased(self.at.count * (self.at.channels // self.groups)) if self.unbiased else 1.0

    def formula(self, x: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        weight, bias, v = (over(p.double(), x) for p in parameters if p is not None)
        wide = x.double()
        group = wide.reshape(x.shape[0], self.groups, -1)
        mean = group.mean(2, keepdim=True)
        var = (group - mean).square().mean(2)
        root = (var * self._correction + self.eps).sqrt().repeat_interleave(self.at.channels // self.groups, 1)
        return wide * torch.sigmoid(v * wide) / over(root, x) * weight + bias, mean.squeeze(2), var

    def _scale(self, var: Tensor) -> tuple[Tensor, Tensor]:
        """1/std of every group, [N, G], and of every instance."""
        rstd = (var * self._correction + self.eps).rsqrt()
        return rstd, rstd.repeat_interleave(self.at.channels // self.groups, 1)

    def forward(self, backend: Backend, x: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        weight, bias, v = (p.double() for p in parameters if p is not None)
        mean, var = self.at.moments(backend, x)
        bundles = self.at.samples, self.groups, -1
        mean, var = merged(mean.reshape(bundles), var.reshape(bundles), 2)
        return _map(_S0, backend, self.at, x, [v, weight * self._scale(var)[1], bias]), mean, var

    def backward(
        self,
        backend: Backend,
        wanted: Sequence[bool],
        dy: Tensor,
        x: Tensor,
        parameters: Sequence[Tensor | None],
        moments: Sequence[Tensor],
    ) -> Sequence[Tensor | None]:
        weight, _, v = (p.double() for p in parameters if p is not None)
        mean, var = moments
        rstd, scale = self._scale(var)
        sums = _sums(_S0, backend, self.at, dy, x, [v])
        gated = sums[1] * weight  # what reaches rstd
        dx = None
        if wanted[0]:
            bundle = self.at.channels // self.groups
            drstd = gated.view(self.at.samples, self.groups, bundle).sum(2)
            dvar = -0.5 * rstd**3 * drstd * self._correction
            slope, mean = (t.repeat_interleave(bundle, 1) for t in (dvar * (2 / (self.at.count * bundle)), mean))
            held = _rounded(mean, x)
            dx = _slope(_S0, backend, self.at, dy, x, [v, weight * scale, slope, held, (held - mean) * slope])
        return dx, (sums[1] * scale).sum(0), sums[0].sum(0), (sums[2] * weight * scale).sum(0)


@dataclass(frozen=True)
class B0:
    """x / max(sqrt(var of the channel + eps), v*x + sqrt(var of the instance + eps)) * weight + bias.

    The parameters are weight, bias, v and, outside training, the variance of the channel.
    """

    at: Instances
    eps: float
    unbiased: bool  # of the instance
    training: bool

    @property
    def _correction(self) -> float:
        return _unbiased(self.at.count) if self.unbiased else 1.0

    def formula(self, x: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        weight, bias, v, given = (None if p is None else over(p.double(), x) for p in parameters)
        assert weight is not None
        assert bias is not None
        assert v is not None
        wide = x.double()
        flat = wide.flatten(2)
        mean = flat.mean(2)
        var = (flat - mean.unsqueeze(2)).square().mean(2)
        channel = given if given is not None else over(merged(mean, var, 0)[1], x)
        right = v * wide + over((var * self._correction + self.eps).sqrt(), x)
        left = (channel + self.eps).sqrt()
        return wide / torch.where(right > left, right, left) * weight + bias, mean, var

    def _roots(self, mean: Tensor, var: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor]:
        channel = given.double() if given is not None else merged(mean, var, 0)[1]
        return (channel + self.eps).sqrt(), (var * self._correction + self.eps).sqrt()

    def forward(self, backend: Backend, x: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        weight, bias, v, given = map(_wide, parameters)
        assert weight is not None
        assert bias is not None
        assert v is not None
        mean, var = self.at.moments(backend, x)
        left, right = self._roots(mean, var, given)
        return _map(_B0, backend, self.at, x, [left, v, right, weight, bias]), mean, var

    def backward(
        self,
        backend: Backend,
        wanted: Sequence[bool],
        dy: Tensor,
        x: Tensor,
        parameters: Sequence[Tensor | None],
        moments: Sequence[Tensor],
    ) -> Sequence[Tensor | None]:
        weight, _, v, given = map(_wide, parameters)
        assert weight is not None
        assert v is not None
        mean, var = moments
        left, right = self._roots(mean, var, given)
        sums = _sums(_B0, backend, self.at, dy, x, [left, v, right])
        dx = None
        if wanted[0]:
            slope = -weight * sums[3] / right * (self._correction / self.at.count)
            held = _rounded(mean, x)
            constant = torch.zeros_like(slope)
            if given is None:
                by_channel = -weight * sums[2].sum(0) / left / (self.at.count * self.at.samples)
                slope = slope + by_channel
                constant = by_channel * (mean - mean.mean(0))
            offset = (held - mean) * slope + constant
            dx = _slope(_B0, backend, self.at, dy, x, [left, v, right, weight, slope, held, offset])
        return dx, sums[1].sum(0), sums[0].sum(0), -weight * sums[4].sum(0), None
