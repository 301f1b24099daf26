"""spectral_product.py: the preconditioned convolution done in the spectrum, on the CPU.

At every frequency it is a small matrix product, y = V A x, with A made of the taps where it is used (ContractArgs in
csrc/core/spectrum.h). A stride that divides the torus folds the spectrum of y, so nothing is ever computed at points
that the stride leaves out. normkern/conv_norm.py has the general way, through the full convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normkern.spectrum import Points, Torus, _kernels, precondition

# Sides that a matrix of the transform is made for; longer ones go through the FFTs of the general way.
_MOST_POINTS = 256


@dataclass(frozen=True)
class Route:
    """A preconditioned convolution of x (N, depth, H, W), whose first point lies at `padding` on the torus."""

    torus: Torus
    padding: tuple[int, int]
    map: tuple[int, int]  # H and W
    stride: tuple[int, int]
    out: tuple[int, int]  # rows and columns of y

    @property
    def folds(self) -> list[int]:
        """The strides that divide the torus."""
        return [s if n % s == 0 else 1 for s, n in zip(self.stride, self.torus.size, strict=True)]

    @property
    def short(self) -> list[int]:
        return [n // s for n, s in zip(self.torus.size, self.folds, strict=True)]

    @property
    def scale(self) -> float:
        return 1 / (self.torus.size[0] * self.torus.size[1])

    def steps(self) -> list[int]:
        return [s // f for s, f in zip(self.stride, self.folds, strict=True)]


def takes(route: Route, x: Tensor, groups: int) -> bool:
    """Whether there are kernels for it."""
    return groups == 1 and not x.is_cuda and max(route.torus.size) <= _MOST_POINTS and _kernels(x) == "native"


def pays(route: Route, x: Tensor, weight: Tensor) -> bool:
    """Whether the spectral way takes fewer operations than the full convolution and V after it.

    Counted in multiply-adds. A complex product is 4 of them, and making a frequency's matrix costs as much as 20 for
    every column of taps: on the 3x3 layers of ResNet-18 (bench/bench_conv_norm.py) the two ways then meet at 4 samples,
    as they do when timed. A transform by matrices is half the sum of the sides for every point, by an FFT 48 at most.
    """
    (out, depth, rows, cols), batch = weight.shape, x.shape[0]
    size = route.torus.size
    points, side = size[0] * size[1], sum(size) // 2
    folded = sum(route.short) // 2
    spectral = out * depth * (points // 2 + 1) * (4 * batch + 20 * cols) + batch * points * (
        depth * side + out * folded // (route.folds[0] * route.folds[1])
    )
    general = batch * points * out * (depth * rows * cols + 2 * min(side, 48))
    return bool(spectral < general)


def _operators() -> Any:
    return torch.ops.normkern


def _analyze(route: Route, x: Tensor) -> Tensor:
    source = [route.padding[0], 1, route.padding[1], 1]
    return _operators().spectral_analyze(x, list(route.torus.size), source)  # type: ignore[no-any-return]


def _analyze_gradient(route: Route, dy: Tensor) -> Tensor:
    down, right = route.steps()
    return _operators().spectral_analyze(dy, route.short, [0, down, 0, right])  # type: ignore[no-any-return]


def _contract(route: Route, x: Tensor, weight: Tensor, lags: Tensor, transposed: bool) -> Tensor:
    torus = route.torus
    return _operators().spectral_contract(  # type: ignore[no-any-return]
        x, weight, lags, list(torus.dilation), list(torus.size), route.folds, torus.eps, transposed
    )


def _channels_last(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.shape[1] > 1


def _forward(route: Route, x: Tensor, weight: Tensor, lags: Tensor) -> Tensor:
    (down, right), (rows, cols) = route.steps(), route.out
    y = _contract(route, _analyze(route, x), weight, lags, False)
    target = [0, down, rows, 0, right, cols]
    return _operators().spectral_synthesize(y, route.short, target, route.scale, _channels_last(x))  # type: ignore[no-any-return]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, route: Route, x: Tensor, weight: Tensor, lags: Tensor) -> Tensor:
        ctx.route = route
        ctx.save_for_backward(x, weight, lags)
        return _forward(route, x, weight, lags)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor | None, Tensor | None, None]:
        x, weight, lags = ctx.saved_tensors
        route: Route = ctx.route
        if torch.is_grad_enabled():  # a gradient of the gradient is wanted: by operators that have one
            return None, *_general_gradients(route, x, weight, lags, dy, ctx.needs_input_grad[1:3]), None
        dx = dweight = None
        back = _analyze_gradient(route, dy)
        torus = route.torus
        if ctx.needs_input_grad[1]:
            (top, left), (rows, cols) = route.padding, route.map
            spectrum = _contract(route, back, weight, lags, True)
            dx = _operators().spectral_synthesize(
                spectrum, list(torus.size), [top, 1, rows, left, 1, cols], route.scale, _channels_last(x)
            )
        if ctx.needs_input_grad[2]:
            dweight = _operators().spectral_correlate(
                _analyze(route, x), back, lags, torus.taps, list(torus.size), route.folds, torus.eps
            )
        return None, dx, dweight, None


def _general_gradients(
    route: Route, x: Tensor, weight: Tensor, lags: Tensor, dy: Tensor, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Through the full convolution, whose point 0 is the one at which y starts."""
    torus = route.torus
    reach = [d * (k - 1) for d, k in zip(torus.dilation, torus.kernel, strict=True)]
    target = tuple(Points(reach[i] - route.padding[i], route.stride[i], route.out[i]) for i in (0, 1))
    dc = precondition(torus, dy, lags, target, torus.whole())  # type: ignore[arg-type]
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        dc, x, weight, None, [1, 1], reach, list(torus.dilation), False, [0, 0], 1, [*wanted, False]
    )
    return dx if wanted[0] else None, dweight if wanted[1] else None


def convolve(route: Route, x: Tensor, weight: Tensor, lags: Tensor) -> Tensor:
    """V A x at the points of y, where takes() is true; lags without a gradient."""
    weight = weight.contiguous()
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Product.apply(route, x, weight, lags)  # type: ignore[no-any-return,no-untyped-call]
    return _forward(route, x, weight, lags)


def _count(torus: list[int]) -> int:
    """Frequencies of a real map, one of every conjugate pair."""
    rows, cols = torus
    return (rows // 2 + 1) * (cols // 2 + 1) + ((rows - 1) // 2) * ((cols - 1) // 2)


def _register_fakes() -> None:
    fake: Callable[[str], Callable[[Callable[..., object]], object]] = torch.library.register_fake

    @fake("normkern::spectral_analyze")
    def spectral_analyze(x: Tensor, torus: list[int], source: list[int]) -> Tensor:
        return x.new_empty((_count(torus), 2, x.shape[0], x.shape[1]))

    @fake("normkern::spectral_synthesize")
    def spectral_synthesize(
        x: Tensor, torus: list[int], target: list[int], scale: float, channels_last: bool
    ) -> Tensor:
        _, _, batch, channels = x.shape
        if channels_last:
            return x.new_empty((batch, target[2], target[5], channels)).permute(0, 3, 1, 2)
        return x.new_empty((batch, channels, target[2], target[5]))

    @fake("normkern::spectral_contract")
    def spectral_contract(
        x: Tensor,
        weight: Tensor,
        lags: Tensor,
        dilation: list[int],
        torus: list[int],
        stride: list[int],
        eps: float,
        transposed: bool,
    ) -> Tensor:
        size = torus if transposed else [n // s for n, s in zip(torus, stride, strict=True)]
        return x.new_empty((_count(size), 2, x.shape[2], weight.shape[1 if transposed else 0]))

    @fake("normkern::spectral_correlate")
    def spectral_correlate(
        x: Tensor, dy: Tensor, lags: Tensor, taps: list[int], torus: list[int], stride: list[int], eps: float
    ) -> Tensor:
        return x.new_empty((dy.shape[3], x.shape[3], taps[0], taps[1]))


if hasattr(torch.ops.normkern, "spectral_contract"):
    _register_fakes()
