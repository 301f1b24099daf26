"""prediction.py: what wide networks with group normalization and ReLU do at initialization, by theory.

Two maps from one layer to the next in the limit of infinite width, with He initialization, for groups of G channels
(Lubana et al. 2021, "Beyond BatchNorm", on how similarity and gradients depend on G; the maps are our derivation):

- similarity, the cosine of the activations of two samples, in layers without positions. Normalized, the G values of a
  group are a direction on a sphere of dimension G - 2, so relu of two samples correlates by the arc-cosine kernel
  k(r) = (sqrt(1 - r^2) + r (pi - arccos r)) / pi of their sample correlation r: rho' = E k(r), with r Pearson's
  correlation of G pairs from a normal distribution with correlation rho, whose density is Hotelling's.
- growth of the squared gradient through a layer, going backward, in convolutions over many positions. Of the second
  moment of a channel a share q is the same at all positions; the group's norm sees the rest, and of q what the G
  channel means spread: sigma^2 = 1 - q + s^2. The gradient grows by E 1 / sigma^2, and q' = 2 E (mean relu)^2.

All integrals are sums over a grid on which their integrands fall off exponentially at both ends, where the trapezoid
rule converges faster than any power of the step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normkern.probes.result import Result, axes


@dataclass(frozen=True)
class PredictedLayer:
    """A layer, counted from 1: the cosine of two samples' activations behind it, and the factor by which the squared
    norm of the gradient grows when it passes the layer's norm and activation backward."""

    layer: int
    similarity: float
    gradient_growth: float


@dataclass(frozen=True)
class Prediction(Result):
    """What `predict` finds, layer by layer."""

    group_size: float
    layers: tuple[PredictedLayer, ...]

    @property
    def similarity(self) -> float:
        """Behind the last layer."""
        return self.layers[-1].similarity

    @property
    def gradient_growth(self) -> float:
        """Through the last layer; through all of them it is the product."""
        return self.layers[-1].gradient_growth

    def table(self) -> tuple[PredictedLayer, ...]:
        return self.layers

    def plot(self, ax: Any = None) -> Any:
        """Two axes: similarity and gradient growth by layer."""
        left, right = axes(ax, 2)
        depth = [row.layer for row in self.layers]
        label = f"group size {self.group_size:g}"
        left.plot(depth, [row.similarity for row in self.layers], label=label)
        right.plot(depth, [row.gradient_growth for row in self.layers], label=label)
        for axis, title in ((left, "similarity"), (right, "growth of the squared gradient")):
            axis.set(xlabel="layer", ylabel=title)
            axis.legend()
        return [left, right]


def predict(group_size: float, depth: int, *, similarity: float = 0.0) -> Prediction:
    """Similarity of activations and growth of gradients in a deep, wide network of convolution, group norm and ReLU.

    Args:
        group_size: channels that share moments. 1 is instance norm (and batch norm of a large batch), where positions
            (or samples) make the moments; math.inf is layer norm. An integer from 1 on, or math.inf.
        depth: layers.
        similarity: the cosine of two samples before the first layer's norm, from -1 to 1. Samples are then drawn with
            it; gradients do not depend on it.

    The similarity is exact for infinite width and one position. The growth is exact for infinite width and infinitely
    many positions, from an input whose channels have mean zero on; at small maps the moments of a group are noisier.

    Raises ValueError for other arguments.
    """
    if not (group_size == math.inf or (group_size >= 1 and group_size == int(group_size))):
        raise ValueError(f"predict: group_size must be an integer from 1 on or math.inf; got {group_size}")
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise ValueError(f"predict: depth must be an integer from 1 on; got {depth!r}")
    if not -1 <= similarity <= 1:
        raise ValueError(f"predict: similarity must be from -1 to 1; got {similarity}")
    rows = zip(range(1, depth + 1), _similarities(group_size, similarity), _growths(group_size), strict=False)
    return Prediction(group_size, tuple(PredictedLayer(layer, *found) for layer, *found in rows))


def _kernel(r: float) -> float:
    """The arc-cosine kernel: the cosine of relu(u) and relu(v), u and v normal with correlation r."""
    r = max(-1.0, min(1.0, r))
    return (math.sqrt(1 - r * r) + r * (math.pi - math.acos(r))) / math.pi


def _similarities(group_size: float, rho: float) -> Iterator[float]:
    if group_size > 2 and group_size != math.inf:
        correlation = _SampleCorrelation(int(group_size))
    while True:
        if group_size == 1:
            rho = 1 / math.pi  # positions are normalized one by one: what two samples share is that relu is positive
        elif group_size == math.inf:
            rho = _kernel(rho)
        elif group_size == 2:
            rho = 1 - math.acos(max(-1.0, min(1.0, rho))) / math.pi  # a pair is (1, -1) or (-1, 1)
        else:
            rho = correlation.mean_kernel(rho)
        yield rho


class _SampleCorrelation:
    """Pearson's r of n >= 3 pairs from a bivariate normal distribution with correlation rho.

    With r = tanh z and rho = tanh c, Hotelling's density is, up to a constant,
    sqrt(cosh z) cosh(z - c)^(3/2 - n) 2F1(1/2, 1/2; n - 1/2; (1 + rho r) / 2) dz.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        reach = 40 / (n - 2) + 12 / math.sqrt(n)
        step = 0.2 / math.sqrt(n)
        self.points = torch.arange(-reach, reach + step, step, dtype=torch.float64)  # around c

    def mean_kernel(self, rho: float) -> float:
        if rho >= 1:
            return 1.0
        rho = max(rho, -1 + 1e-12)
        z = math.atanh(rho) + self.points
        r = torch.tanh(z)
        weight = 0.5 * torch.log(torch.cosh(z)) - (self.n - 1.5) * torch.log(torch.cosh(self.points))
        density = torch.exp(weight - weight.max()) * self._hypergeometric((1 + rho * r) / 2)
        # 1 - r^2 and arccos r from z: r rounds to 1 long before they are 0.
        kernel = (1 / torch.cosh(z) + r * (math.pi - 2 * torch.atan(torch.exp(-z)))) / math.pi
        return float((density * kernel).sum() / density.sum())

    def _hypergeometric(self, x: Tensor) -> Tensor:
        """2F1(1/2, 1/2; n - 1/2; x), x from 0 to 1; the terms fall at least as fast as k^(1/2 - n)."""
        total = term = torch.ones_like(x)
        for k in range(400 if self.n < 6 else 60):
            term = term * x * ((k + 0.5) ** 2 / ((self.n - 0.5 + k) * (k + 1)))
            total = total + term
        return total


def _growths(group_size: float) -> Iterator[float]:
    q = 0.0
    if group_size == math.inf:
        while True:
            yield 1.0  # the moments of infinitely many channels are those of the whole
    means = _GroupMeans(int(group_size)) if group_size > 1 else None
    while True:
        if means is None:
            yield 1 / (1 - q)
            q = 1 / math.pi
        else:
            growth, q = means.layer(q)
            yield growth


class _GroupMeans:
    """The means of n >= 2 channels of a group, normal: how much they spread, and how far one is from their mean.

    The spread n s^2 / q is chi-squared with d = n - 1 degrees of freedom; one channel lies sqrt(d) s t from the mean,
    where t is a coordinate of a random direction in d dimensions, with density (1 - t^2)^((d - 3) / 2).
    """

    def __init__(self, n: int) -> None:
        self.n, d = n, n - 1
        # y = log chi-squared, with density exp(d y / 2 - exp(y) / 2): down from the mode slowly, up fast.
        wide = math.sqrt(2 / d)
        low, high = -max(9 * wide, 72 / d), min(9 * wide, 1.4) + 3.2 * wide
        y = math.log(d) + torch.linspace(low, high, 160, dtype=torch.float64)
        self.spread, self.spread_weight = y.exp(), torch.softmax(d * y / 2 - y.exp() / 2, 0)
        if d == 1:
            self.t, self.t_weight = torch.tensor([[-1.0, 1.0], [0.5, 0.5]], dtype=torch.float64)
        else:  # t = tanh z
            reach = 9 / math.sqrt(d) + 40 / (d - 1 + 1e-9) if d < 8 else 9.5 / math.sqrt(d)
            z = torch.linspace(-reach, reach, 200, dtype=torch.float64)
            self.t, self.t_weight = torch.tanh(z), torch.softmax(-(d - 1) * torch.log(torch.cosh(z)), 0)

    def layer(self, q: float) -> tuple[float, float]:
        """The growth of the squared gradient, and q behind the layer."""
        variance = q * self.spread / self.n
        sigma = (1 - q + variance).sqrt()
        # Over positions a normalized channel is normal with this mean and standard deviation.
        mean = (variance * (self.n - 1)).sqrt()[:, None] * self.t / sigma[:, None]
        deviation = math.sqrt(1 - q) / sigma[:, None]
        ratio = mean / deviation
        relu = deviation * torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi) + mean * torch.special.ndtr(ratio)
        weight = self.spread_weight[:, None] * self.t_weight
        return float((self.spread_weight / sigma.square()).sum()), 2 * float((weight * relu.square()).sum())
