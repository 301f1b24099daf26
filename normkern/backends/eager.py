"""eager.py: the formulas in plain PyTorch, in float64, on any device.

The reference the other backends are held against, the fallback of all, and the way to second derivatives:
`normalize` is differentiable any number of times and works under torch.func.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from normkern.problem import (
    NEED_DBIAS,
    NEED_DRESIDUAL,
    NEED_DWEIGHT,
    NEED_DX,
    Act,
    Domain,
    Moments,
    Problem,
    memory_order,
)


def _viewed(x: Tensor, domain: Domain) -> Tensor:
    """x in memory order as [batch, rows, keep, cols], in float64."""
    return x.permute(memory_order(x.shape, x.stride())).reshape(domain.sizes).double()


def _unviewed(v: Tensor, x: Tensor) -> Tensor:
    """The inverse of _viewed: v with the sizes, strides and dtype of x."""
    order = memory_order(x.shape, x.stride())
    inverse = [order.index(dim) for dim in range(len(order))]
    return v.to(x.dtype).reshape([x.shape[dim] for dim in order]).permute(inverse)


def _by_group(parameter: Tensor, domain: Domain) -> Tensor:
    return parameter.reshape(domain.batch, 1, domain.keep, 1).double()


def activate(act: Act, z: Tensor) -> Tensor:
    """The activation as torch's own operator."""
    if act == Act.relu:
        return F.relu(z)
    if act == Act.silu:
        return F.silu(z)
    if act == Act.gelu:
        return F.gelu(z)
    if act == Act.leaky_relu:
        return F.leaky_relu(z)
    return z


def _slope(act: Act, z: Tensor) -> Tensor:
    """The derivative of the activation at z."""
    if act == Act.relu:
        return torch.where(z <= 0, 0.0, 1.0)
    if act == Act.silu:
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s))
    if act == Act.gelu:
        return 0.5 * (1 + torch.erf(z * 0.5**0.5)) + z * torch.exp(-0.5 * z * z) * 0.39894228040143267794
    if act == Act.leaky_relu:
        return torch.where(z <= 0, torch.full_like(z, 0.01), 1.0)  # two scalars would make it float32
    return torch.ones_like(z)


def _mean(v: Tensor) -> Tensor:
    """The mean of each group of v."""
    mean = v.mean((1, 3), keepdim=True)
    return mean + (v - mean).mean((1, 3), keepdim=True)  # the sum rounds; what is left over is its error


def _moments(kind: Moments, v: Tensor) -> tuple[Tensor | None, Tensor]:
    """Mean (None for a second moment) and biased variance of each group of v, in exact passes."""
    if kind == Moments.second:
        return None, v.square().mean((1, 3), keepdim=True)
    mean = _mean(v)
    return mean, (v - mean).square().mean((1, 3), keepdim=True)


def _xhat(
    problem: Problem, x: Tensor, mean: Tensor | None, var: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """xhat over the statistics domain, then rstd, mean and var by group; moments that are passed are not recomputed."""
    v = _viewed(x, problem.stats)
    if var is None:
        group_mean, group_var = _moments(problem.moments, v)
    else:
        group_var = _by_group(var, problem.stats)
        group_mean = None if problem.moments == Moments.second or mean is None else _by_group(mean, problem.stats)
    rstd = (group_var + problem.eps).rsqrt()
    centred = v if group_mean is None else v - group_mean
    return centred * rstd, rstd, group_mean, group_var


def _affine(
    problem: Problem, xhat: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """What enters the activation, over the affine domain."""
    z = xhat.reshape(problem.affine.sizes)
    if weight is not None:
        z = z * _by_group(weight, problem.affine)
    if bias is not None:
        z = z + _by_group(bias, problem.affine)
    if residual is not None:
        z = z + _viewed(residual, problem.affine)
    return z


def apply(
    problem: Problem,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y and, unless they are given, the moments of every group (float64); differentiable torch throughout."""
    given = problem.moments == Moments.given
    xhat, _, group_mean, group_var = _xhat(problem, x, mean if given else None, var if given else None)
    y = _unviewed(activate(problem.act, _affine(problem, xhat, weight, bias, residual)), x)
    return (
        y,
        _nothing(x) if given or group_mean is None else group_mean.reshape(-1),
        _nothing(x) if given else group_var.reshape(-1),
    )


def _nothing(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.float64)


def normalize(
    problem: Problem,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
) -> Tensor:
    """y alone; mean and var are read only where the moments are given."""
    return apply(problem, x, weight, bias, residual, mean, var)[0]


def differentiable_moments(domain: Domain, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every group."""
    v = _viewed(x, domain)
    mean = _mean(v)
    return mean.reshape(-1), (v - mean).square().mean((1, 3)).reshape(-1)


def moments_gradient(domain: Domain, x: Tensor, dmean: Tensor, dvar: Tensor) -> Tensor:
    """The gradient of a loss in x, given those in mean and biased variance; differentiable itself."""
    v = _viewed(x, domain)
    centred = v - _mean(v)
    return _unviewed((_by_group(dmean, domain) + 2 * _by_group(dvar, domain) * centred) / domain.count, x)


class Eager:
    """The formulas as a backend."""

    name = "eager"

    def why_not(self, x: Tensor) -> str | None:
        return None

    def forward(
        self,
        problem: Problem,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        save: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            y, group_mean, group_var = apply(problem, x, weight, bias, residual, mean, var)
        return (y, group_mean, group_var) if save else (y, _nothing(x), _nothing(x))

    def backward(
        self,
        problem: Problem,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        needs: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch.no_grad():
            return _gradients(problem, dy, None, x, weight, bias, residual, mean, var, needs)

    def add_forward(
        self, problem: Problem, x: Tensor, add: Tensor, weight: Tensor | None, bias: Tensor | None, save: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with torch.no_grad():
            total = x + add
        y, mean, var = self.forward(problem, total, weight, bias, None, None, None, save)
        return y, total, mean, var

    def add_backward(
        self,
        problem: Problem,
        dy: Tensor,
        dtotal: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        needs: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            return _gradients(problem, dy, dtotal, x, weight, bias, None, mean, var, needs)[:3]

    def moments(self, problem: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            mean, var = _moments(problem.moments, _viewed(x, problem.stats))
        return _nothing(x) if mean is None else mean.reshape(-1), var.reshape(-1)


def _gradients(
    problem: Problem,
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    xhat, rstd, _, _ = _xhat(problem, x, mean, var)
    dz = _viewed(dy, problem.affine)
    if problem.act != Act.none:
        dz = dz * _slope(problem.act, _affine(problem, xhat, weight, bias, residual))

    dx, dweight, dbias, dresidual = x.new_empty(0), x.new_empty(0), x.new_empty(0), x.new_empty(0)
    if needs & NEED_DX:
        g = dz if weight is None else dz * _by_group(weight, problem.affine)
        g = g.reshape(problem.stats.sizes)
        if problem.moments == Moments.mean_var:
            g = g - g.mean((1, 3), keepdim=True) - xhat * (g * xhat).mean((1, 3), keepdim=True)
        elif problem.moments == Moments.second:
            g = g - xhat * (g * xhat).mean((1, 3), keepdim=True)
        g = rstd * g
        dx = _unviewed(g if dtotal is None else g + _viewed(dtotal, problem.stats), x)
    if needs & NEED_DWEIGHT and weight is not None:
        dweight = (dz * xhat.reshape(problem.affine.sizes)).sum((1, 3)).reshape(-1).to(weight.dtype)
    if needs & NEED_DBIAS and bias is not None:
        dbias = dz.sum((1, 3)).reshape(-1).to(bias.dtype)
    if needs & NEED_DRESIDUAL:
        dresidual = _unviewed(dz, x)
    return dx, dweight, dbias, dresidual
