"""scaled.py: norms that divide without centring, where the three programs of a backend need a word more.

Filter response norm with a threshold or a learned eps, and variance norm, as Norms of evolved.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from normkern.autograd import same_buffer
from normkern.backends import Backend, eager
from normkern.evolved import Instances, over
from normkern.problem import NEED_DBIAS, NEED_DRESIDUAL, NEED_DWEIGHT, NEED_DX, Act, Moments, Problem


def _channel_sums(backend: Backend, problem: Problem, dy: Tensor) -> Tensor:
    """The sum of dy over every weight's elements, float64."""
    return backend.moments(Problem(problem.affine, problem.affine), dy)[0] * problem.affine.count


@dataclass(frozen=True)
class FilterResponse:
    """max(x / sqrt(mean x^2 of the instance + |eps|) * weight + bias + residual, tau).

    The parameters are weight, bias, tau and residual, and eps where it is a tensor (of size 1 or C), else problem.eps.
    """

    problem: Problem  # instance domains, second moments
    at: Instances

    def formula(self, x: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        weight, bias, tau, eps = (None if p is None else over(p.double(), x) for p in (*parameters[:3], parameters[4]))
        residual = parameters[3]
        wide = x.double()
        second = wide.square().flatten(2).mean(2)
        z = wide * (over(second, x) + (self.problem.eps if eps is None else eps.abs())).rsqrt()
        z = z if weight is None else z * weight
        z = z if bias is None else z + bias
        z = z if residual is None else z + residual.double()
        return z if tau is None else torch.where(z <= tau, tau, z), self.at.in_order(second)

    def _var(self, second: Tensor, eps: Tensor | None) -> Tensor:
        """What is under the root, by group in memory, but for problem.eps."""
        if eps is None:
            return second
        added = eps.detach().double().abs().reshape(-1).expand(self.at.samples, self.at.channels)
        return second + self.at.in_order(added)

    def forward(self, backend: Backend, x: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        weight, bias, tau, residual, eps = parameters
        if eps is None:
            y, _, second = backend.forward(self.problem, x, weight, bias, residual, None, None, True)
        else:
            second = backend.moments(self.problem, x)[1]
            given = replace(self.problem, moments=Moments.given, eps=0.0)
            var = self._var(second, eps)
            y = backend.forward(given, x, weight, bias, residual, torch.zeros_like(var), var, False)[0]
        if tau is not None:
            # Rounding keeps order: the larger of two rounded numbers is the rounded larger one.
            y = torch.maximum(y, over(tau, x).to(y.dtype), out=y)
        return y, second

    def backward(
        self,
        backend: Backend,
        wanted: Sequence[bool],
        dy: Tensor,
        x: Tensor,
        parameters: Sequence[Tensor | None],
        moments: Sequence[Tensor],
    ) -> Sequence[Tensor | None]:
        weight, bias, tau, residual, eps = parameters
        need_x, need_weight, need_bias, need_tau, need_residual, need_eps = wanted
        problem = self.problem
        # max(z, tau) is relu(z - tau) + tau.
        if tau is not None:
            problem = replace(problem, act=Act.relu)
            bias = -tau.double() if bias is None else bias.double() - tau.double()
            need_bias = need_bias or need_tau
        if eps is not None:
            problem = replace(problem, eps=0.0)
        if need_eps:  # by instance, whose sums eps needs
            problem = replace(problem, affine=problem.stats)
            weight = self._by_instance(weight if weight is not None else x.new_ones(1, dtype=torch.float64))
            bias = None if bias is None else self._by_instance(bias)
            need_weight = True
        passes_on = need_residual and problem.act == Act.none
        needs = need_x * NEED_DX | need_weight * NEED_DWEIGHT | need_bias * NEED_DBIAS
        needs |= (need_residual and not passes_on) * NEED_DRESIDUAL
        var = self._var(moments[0], eps)
        used = None if problem.act == Act.none or residual is None else same_buffer(residual, x)
        dx, dweight, dbias, dresidual = backend.backward(problem, dy, x, weight, bias, used, None, var, needs)
        dtau = deps = None
        if need_eps and eps is not None and weight is not None:
            by_instance = -0.5 * dweight * weight / var  # of |eps|
            both = self.at.out_of_order(by_instance) * eps.detach().double().sign().reshape(-1)
            deps = both.sum() if eps.numel() == 1 else both.sum(0)
            dweight, dbias = (self.at.out_of_order(t).sum(0) if t.numel() else t for t in (dweight, dbias))
        if need_tau:
            dtau = _channel_sums(backend, self.problem, dy) - dbias
        return (
            dx if need_x else None,
            dweight if wanted[1] else None,
            dbias if wanted[2] else None,
            dtau,
            dy if passes_on else dresidual if need_residual else None,
            deps,
        )

    def _by_instance(self, parameter: Tensor) -> Tensor:
        return self.at.in_order(parameter.double().expand(self.at.samples, self.at.channels)).contiguous()


@dataclass(frozen=True)
class Variance:
    """act(x / sqrt(var of the channel + eps) * weight + bias + residual), the variance that of the batch.

    The parameters are weight, bias and residual.
    """

    problem: Problem  # batch domains; what follows the affine step

    def formula(self, x: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        weight, bias, residual = parameters
        mean, var = eager.differentiable_moments(self.problem.stats, x)
        y = x.double() * over((var + self.problem.eps).rsqrt(), x)
        y = y if weight is None else y * over(weight.double(), x)
        y = y if bias is None else y + over(bias.double(), x)
        y = y if residual is None else y + residual.double()
        return eager.activate(self.problem.act, y), mean, var

    def _given(self) -> Problem:
        return replace(self.problem, moments=Moments.given)

    def forward(self, backend: Backend, x: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        weight, bias, residual = parameters
        mean, var = backend.moments(self.problem, x)
        y = backend.forward(self._given(), x, weight, bias, residual, torch.zeros_like(var), var, False)[0]
        return y, mean, var

    def backward(
        self,
        backend: Backend,
        wanted: Sequence[bool],
        dy: Tensor,
        x: Tensor,
        parameters: Sequence[Tensor | None],
        moments: Sequence[Tensor],
    ) -> Sequence[Tensor | None]:
        weight, bias, residual = parameters
        mean, var = moments
        if x.dtype in (torch.float16, torch.bfloat16):  # dx is made in two steps, and rounded once
            x, dy, residual = x.float(), dy.float(), None if residual is None else residual.float()
        need_x, need_weight, need_bias, need_residual = wanted
        passes_on = need_residual and self.problem.act == Act.none
        scale = torch.ones_like(var) if weight is None else weight.double()
        used = None if self.problem.act == Act.none or residual is None else same_buffer(residual, x)
        needs = need_x * NEED_DX | (need_x or need_weight) * NEED_DWEIGHT | need_bias * NEED_DBIAS
        needs |= (need_residual and not passes_on) * NEED_DRESIDUAL
        dx, dweight, dbias, dresidual = backend.backward(
            self._given(), dy, x, scale, bias, used, torch.zeros_like(var), var, needs
        )
        if need_x:
            # What x did to the variance, (x - mean) * slope, is a map of x with dx as its residual.
            slope = -scale * dweight / (var + self.problem.eps) / self.problem.stats.count
            centred = replace(self._given(), act=Act.none, eps=0.0)
            dx = backend.forward(centred, x, slope, None, dx, mean, torch.ones_like(var), False)[0]
        return (
            dx if need_x else None,
            dweight if need_weight else None,
            dbias if need_bias else None,
            dy if passes_on else dresidual if need_residual else None,
        )
