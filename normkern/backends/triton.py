"""triton.py: the three programs in Triton: no compiler on the user's machine, other makers' GPUs.

Launches are those of triton_launch.py. Under torch.compile the passes are the operators torch.ops.normkern_triton.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from normkern.backends import triton_launch
from normkern.problem import NEED_DBIAS, NEED_DRESIDUAL, NEED_DWEIGHT, NEED_DX, Act, Domain, Moments, Problem

# ---- the operators that torch.compile sees: the arguments of torch.ops.normkern


def _problem(stats: list[int], affine: list[int], kind: int, act: int, eps: float) -> Problem:
    return Problem(Domain(*stats), Domain(*affine), Moments(kind), Act(act), eps)


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
    kind: int,
    act: int,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return triton_launch.forward(_problem(stats, affine, kind, act, eps), x, weight, bias, residual, mean, var, save)


@_forward_op.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    stats: list[int],
    affine: list[int],
    kind: int,
    act: int,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty_strided(x.shape, x.stride()), *_fake_moments(x, stats, kind, save)


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
    kind: int,
    act: int,
    eps: float,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return triton_launch.backward(
        _problem(stats, affine, kind, act, eps), dy, x, weight, bias, residual, mean, var, needs
    )


@_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    stats: list[int],
    affine: list[int],
    kind: int,
    act: int,
    eps: float,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dresidual = x.new_empty_strided(x.shape, x.stride()) if needs & NEED_DRESIDUAL else x.new_empty(0)
    return *_fake_gradients(x, weight, bias, affine, needs), dresidual


@torch.library.custom_op("normkern_triton::add_forward", mutates_args=())
def _add_forward_op(
    x: Tensor,
    add: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: list[int],
    affine: list[int],
    kind: int,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return triton_launch.add_forward(_problem(stats, affine, kind, 0, eps), x, add, weight, bias, save)


@_add_forward_op.register_fake
def _(
    x: Tensor,
    add: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: list[int],
    affine: list[int],
    kind: int,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, total = (x.new_empty_strided(x.shape, x.stride()) for _ in range(2))
    return y, total, *_fake_moments(x, stats, kind, save)


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
    kind: int,
    eps: float,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = _problem(stats, affine, kind, 0, eps)
    dx, dweight, dbias, _ = triton_launch.backward(problem, dy, x, weight, bias, None, mean, var, needs, dtotal=dtotal)
    return dx, dweight, dbias


@_add_backward_op.register_fake
def _(
    dy: Tensor,
    dtotal: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    stats: list[int],
    affine: list[int],
    kind: int,
    eps: float,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_gradients(x, weight, bias, affine, needs)


@torch.library.custom_op("normkern_triton::moments", mutates_args=())
def _moments_op(x: Tensor, stats: list[int], kind: int) -> tuple[Tensor, Tensor]:
    return triton_launch.moments(_problem(stats, stats, kind, 0, 0.0), x)


@_moments_op.register_fake
def _(x: Tensor, stats: list[int], kind: int) -> tuple[Tensor, Tensor]:
    return _fake_moments(x, stats, kind, True)


def _fake_gradients(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, affine: list[int], needs: int
) -> tuple[Tensor, Tensor, Tensor]:
    groups = affine[0] * affine[2]
    return (
        x.new_empty_strided(x.shape, x.stride()) if needs & NEED_DX else x.new_empty(0),
        (x if weight is None else weight).new_empty(groups if needs & NEED_DWEIGHT else 0),
        (x if bias is None else bias).new_empty(groups if needs & NEED_DBIAS else 0),
    )


def _fake_moments(x: Tensor, stats: list[int], kind: int, save: bool) -> tuple[Tensor, Tensor]:
    groups = stats[0] * stats[2]
    return (
        x.new_empty(groups if save and kind == Moments.mean_var else 0, dtype=torch.float64),
        x.new_empty(groups if save and kind != Moments.given else 0, dtype=torch.float64),
    )


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
            stats, affine, kind, _, eps = _sizes(problem)
            y, total, mean, var = _add_forward_op(x, add, weight, bias, stats, affine, kind, eps, save)
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
            stats, affine, kind, _, eps = _sizes(problem)
            dx, dweight, dbias = _add_backward_op(
                dy, dtotal, x, weight, bias, mean, var, stats, affine, kind, eps, needs
            )
            return dx, dweight, dbias
        return triton_launch.backward(problem, dy, x, weight, bias, None, mean, var, needs, self.split, dtotal)[:3]

    def moments(self, problem: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():
            mean, var = _moments_op(x, [*problem.stats.sizes], int(problem.moments))
            return mean, var
        return triton_launch.moments(problem, x, self.split)
