"""standardize.py: weight standardization of a whole list of weights: one autograd node, and one operator per dtype.

The operator takes weights whose output channels are lines of memory (the first dimension is the outermost one), which
are all but the unusual. Every other weight, and every backend without the operator, goes through weight_standardize
one by one; so does all that torch.compile, torch.func, DTensors and forward-mode differentiation ask for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from normkern import aten, autograd
from normkern.autograd import same_buffer
from normkern.backends import select
from normkern.checks import check_eps, check_flag
from normkern.family import _check_variant
from normkern.problem import NEED_DWEIGHT, NEED_DX, is_dense
from normkern.weights import _check_weight, _scale, weight_standardize

Gains = Sequence[Tensor | None]

MOST_LINE_BYTES = 40 * 1024  # kMostLineBytes of csrc/core/standardize.h


@runtime_checkable
class Standardizer(Protocol):
    """What a backend has beside the three programs where it can take many tensors at once. Every x is dense with its
    first dimension outermost; a weight has an element for each of its lines, or is of size 0 for none."""

    def standardizes(self, x: Tensor) -> bool:
        """Whether the operators are there for x's device."""

    def standardize(
        self, xs: list[Tensor], weights: list[Tensor], eps: float, save: bool
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """y of every x, and the mean and variance of all lines, of size 0 unless `save`."""

    def standardize_backward(
        self,
        dys: list[Tensor],
        xs: list[Tensor],
        weights: list[Tensor],
        mean: Tensor,
        var: Tensor,
        eps: float,
        needs: list[int],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """dx and dweight of every x, of size 0 where the bit in its `needs` is not set; dy has the strides of x."""


def weight_standardize_all(
    weights: Sequence[Tensor],
    gains: Gains | None = None,
    eps: float = 1e-5,
    *,
    scaled: bool = False,
    variant: str = "torch",
) -> list[Tensor]:
    """weight_standardize of every weight, together: one launch forward and one backward for all of a dtype and device.

    Args:
        weights: tensors (Cout, ...) with at least 2 dimensions each; shapes, dtypes and layouts may differ.
        gains: one of (Cout,) or None for each weight.
        eps, scaled, variant: as of weight_standardize.

    Returns:
        The standardized weights, in order. They are what weight_standardize gives, with the same gradients.

    Raises:
        ValueError: gains are not as many as weights; and what weight_standardize raises.
    """
    name = "weight_standardize_all"
    weights = list(weights)
    gains = [None] * len(weights) if gains is None else list(gains)
    if len(gains) != len(weights):
        raise ValueError(f"{name}: gains must be as many as weights; got {len(gains)} and {len(weights)}")
    eps, paper = check_eps(name, eps), _check_variant(name, variant)
    check_flag(name, "scaled", scaled)
    gains = [_check_weight(name, w, g) for w, g in zip(weights, gains, strict=True)]
    found: list[Tensor | None] = [None] * len(weights)
    for indices in [] if paper else _together(weights):
        scales = [_scale(weights[i]) if scaled else 1.0 for i in indices]
        got = _standardize([weights[i] for i in indices], [gains[i] for i in indices], scales, eps)
        for i, y in zip(indices, got, strict=True):
            found[i] = y
    return [
        weight_standardize(w, g, eps, scaled=scaled, variant=variant) if y is None else y
        for w, g, y in zip(weights, gains, found, strict=True)
    ]


def _together(weights: Sequence[Tensor]) -> list[list[int]]:
    """Which of them one call of the operator can take."""
    if autograd._transformed() or aten.exporting() or torch.compiler.is_compiling():
        return []
    sets: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, w in enumerate(weights):
        if _in_lines(w):
            sets.setdefault((w.device, w.dtype), []).append(i)
    return [indices for indices in sets.values() if _standardizer(weights[indices[0]]) is not None]


def _standardizer(x: Tensor) -> Standardizer | None:
    backend = select(x)
    return backend if isinstance(backend, Standardizer) and backend.standardizes(x) else None


def _in_lines(w: Tensor) -> bool:
    if type(w) not in (Tensor, torch.nn.Parameter) or w.numel() == 0:
        return False
    line = w.numel() // w.shape[0]
    if line * w.element_size() > MOST_LINE_BYTES:
        return False
    return w.is_contiguous() or (w.stride(0) == line and is_dense(w.shape, w.stride()))


class _Standardize(torch.autograd.Function):
    """(backend, eps, scales, *weights, *gains), a gain per weight that may be None, to the standardized weights."""

    @staticmethod
    def forward(
        ctx: Any, backend: Standardizer, eps: float, scales: list[float], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        weights, gains = _halves(tensors)
        ys, mean, var = backend.standardize(weights, _factors(weights, gains, scales), eps, True)
        ctx.save_for_backward(*tensors, mean, var)
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.eps, ctx.scales = backend, eps, scales
        ctx.strides = [w.stride() for w in weights]
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, mean, var = ctx.saved_tensors
        weights, gains = _halves(tensors)
        wanted = list(zip(*_halves(ctx.needs_input_grad[3:]), strict=True))
        given = [dy for dy in dys if dy is not None]
        if not given:
            return (None,) * len(ctx.needs_input_grad)
        if autograd._must_be_differentiable(given[0]):
            return None, None, None, *_differentiable(ctx.eps, ctx.scales, weights, gains, wanted, dys)
        for i, w in enumerate(weights):
            if w.stride() != ctx.strides[i]:  # a hook on saved tensors may have brought it back otherwise
                weights[i] = torch.empty_strided(w.shape, ctx.strides[i], dtype=w.dtype, device=w.device).copy_(w)
        none = weights[0].new_empty(0)
        needs = [
            0 if dy is None else NEED_DX * want_x | NEED_DWEIGHT * want_gain
            for dy, (want_x, want_gain) in zip(dys, wanted, strict=True)
        ]
        dense = [
            same_buffer(dy, w) if dy is not None and n else none for dy, w, n in zip(dys, weights, needs, strict=True)
        ]
        factors = _factors(weights, gains, ctx.scales)
        dxs, dfactors = ctx.backend.standardize_backward(dense, weights, factors, mean, var, ctx.eps, needs)
        dgains = [d if n & NEED_DWEIGHT else None for d, n in zip(dfactors, needs, strict=True)]
        asked = [(d, scale) for d, scale in zip(dgains, ctx.scales, strict=True) if d is not None and scale != 1.0]
        if asked:
            torch._foreach_mul_([d for d, _ in asked], [scale for _, scale in asked])
        return None, None, None, *(d if n & NEED_DX else None for d, n in zip(dxs, needs, strict=True)), *dgains


def _halves(both: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    middle = len(both) // 2
    return list(both[:middle]), list(both[middle:])


def _factors(weights: Sequence[Tensor], gains: Gains, scales: Sequence[float]) -> list[Tensor]:
    """What each standardized channel is multiplied by, (Cout,), or of size 0 for nothing."""
    factors = [
        w.new_empty(0) if g is None and scale == 1.0 else _ones(w) if g is None else g
        for w, g, scale in zip(weights, gains, scales, strict=True)
    ]
    return factors if all(scale == 1.0 for scale in scales) else list(torch._foreach_mul(factors, scales))


def _ones(w: Tensor) -> Tensor:
    return torch.ones(w.shape[0], device=w.device, dtype=torch.float64 if w.dtype is torch.float64 else torch.float32)


def _differentiable(
    eps: float,
    scales: Sequence[float],
    weights: Sequence[Tensor],
    gains: Gains,
    wanted: Sequence[tuple[bool, bool]],
    dys: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of the weights and of the gains, as functions that can be differentiated again."""
    create_graph = torch.is_grad_enabled()
    dws: list[Tensor | None] = []
    dgs: list[Tensor | None] = []
    for w, g, scale, (want_x, want_gain), dy in zip(weights, gains, scales, wanted, dys, strict=True):
        targets = [t for t, want in ((w, want_x), (g, want_gain)) if want and t is not None]
        got: Iterator[Tensor] = iter(())
        if dy is not None and targets:
            with torch.enable_grad():
                y = weight_standardize(w, _ones(w) * scale if g is None else g * scale, eps)
            got = iter(torch.autograd.grad(y, targets, dy, create_graph=create_graph))
        dws.append(next(got, None) if want_x else None)
        dgs.append(next(got, None) if want_gain else None)
    return [*dws, *dgs]


def _standardize(
    weights: list[Tensor], gains: list[Tensor | None], scales: list[float], eps: float
) -> Sequence[Tensor]:
    backend = cast(Standardizer, _standardizer(weights[0]))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*weights, *gains)):
        return _Standardize.apply(backend, eps, scales, *weights, *gains)  # type: ignore[no-any-return,no-untyped-call]
    return backend.standardize(weights, _factors(weights, gains, scales), eps, False)[0]
