"""triton.py: the three programs in Triton: no compiler on the user's machine, other makers' GPUs.

Launches are those of triton_launch.py. Under torch.compile the passes are the operators torch.ops.normkern_triton.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from normkern.backends import fakes, triton_launch
from normkern.problem import Act, Domain, Moments, Problem

# ---- the operators that torch.compile sees: the arguments of torch.ops.normkern


def _problem(stats: list[int], affine: list[int], moments: int, act: int, eps: float) -> Problem:
    return Problem(Domain(*stats), Domain(*affine), Moments(moments), Act(act), eps)


def _sizes(problem: Problem) -> tuple[list[int], list[int], int, int, float]:
    return [*problem.stats.sizes], [*problem.affine.sizes], int(problem.moments), int(problem.act), problem.eps


@torch.library.custom_op("normkern_triton::forward", mutates_args=())
def _forward_op(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    stats: list[int],
    affine: list[int],
    moments: int,
    act: int,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return triton_launch.forward(_problem(stats, affine, moments, act, eps), x, weight, bias, residual, mean, var, save)


_forward_op.register_fake(fakes.forward)


@torch.library.custom_op("normkern_triton::backward", mutates_args=())
def _backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    stats: list[int],
    affine: list[int],
    moments: int,
    act: int,
    eps: float,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return triton_launch.backward(
        _problem(stats, affine, moments, act, eps), dy, x, weight, bias, residual, mean, var, needs
    )


_backward_op.register_fake(fakes.backward)


@torch.library.custom_op("normkern_triton::add_forward", mutates_args=())
def _add_forward_op(
    x: Tensor,
    add: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: list[int],
    affine: list[int],
    moments: int,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return triton_launch.add_forward(_problem(stats, affine, moments, 0, eps), x, add, weight, bias, save)


_add_forward_op.register_fake(fakes.add_forward)


@torch.library.custom_op("normkern_triton::add_backward", mutates_args=())
def _add_backward_op(
    dy: Tensor,
    dtotal: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    stats: list[int],
    affine: list[int],
    moments: int,
    eps: float,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = _problem(stats, affine, moments, 0, eps)
    dx, dweight, dbias, _ = triton_launch.backward(problem, dy, x, weight, bias, None, mean, var, needs, dtotal=dtotal)
    return dx, dweight, dbias


_add_backward_op.register_fake(fakes.add_backward)


@torch.library.custom_op("normkern_triton::moments", mutates_args=())
def _moments_op(x: Tensor, stats: list[int], moments: int) -> tuple[Tensor, Tensor]:
    return triton_launch.moments(_problem(stats, stats, moments, 0, 0.0), x)


_moments_op.register_fake(fakes.moments)


class Triton:
    """The Triton kernels as a backend. `split`: never fused, which tests ask for."""

    name = "triton"

    def __init__(self, split: bool = False) -> None:
        self.split = split
        self.installed = importlib.util.find_spec("triton") is not None

    def why_not(self, x: Tensor) -> str | None:
        if not x.is_cuda and not (x.is_cpu and triton_launch.interpreted()):
            return f"Triton kernels need a GPU that torch calls cuda; the tensor is on {x.device.type}"
        if not self.installed:
            return "Triton is not installed; `pip install triton`"
        # torch.compile cannot look into an import; there the operator says what is wrong, when it runs.
        return None if torch.compiler.is_compiling() else triton_launch.broken()

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
        if torch.compiler.is_compiling():
            y, mean, var = _forward_op(x, weight, bias, residual, mean, var, *_sizes(problem), save)
            return y, mean, var
        return triton_launch.forward(problem, x, weight, bias, residual, mean, var, save, self.split)

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
        if torch.compiler.is_compiling():
            dx, dweight, dbias, dresidual = _backward_op(
                dy, x, weight, bias, residual, mean, var, *_sizes(problem), needs
            )
            return dx, dweight, dbias, dresidual
        return triton_launch.backward(problem, dy, x, weight, bias, residual, mean, var, needs, self.split)

    def add_forward(
        self, problem: Problem, x: Tensor, add: Tensor, weight: Tensor | None, bias: Tensor | None, save: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if torch.compiler.is_compiling():
            stats, affine, moments, _, eps = _sizes(problem)
            y, total, mean, var = _add_forward_op(x, add, weight, bias, stats, affine, moments, eps, save)
            return y, total, mean, var
        return triton_launch.add_forward(problem, x, add, weight, bias, save, self.split)

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
        if torch.compiler.is_compiling():
            stats, affine, moments, _, eps = _sizes(problem)
            dx, dweight, dbias = _add_backward_op(
                dy, dtotal, x, weight, bias, mean, var, stats, affine, moments, eps, needs
            )
            return dx, dweight, dbias
        return triton_launch.backward(problem, dy, x, weight, bias, None, mean, var, needs, self.split, dtotal)[:3]

    def moments(self, problem: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():
            mean, var = _moments_op(x, [*problem.stats.sizes], int(problem.moments))
            return mean, var
        return triton_launch.moments(problem, x, self.split)
