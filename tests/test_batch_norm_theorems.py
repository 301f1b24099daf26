# Theorems of Santurkar et al. 2018 ("How Does Batch Normalization Help Optimization?") about batch norm's gradients,
# held against normkern's forward and backward in float64, on random losses that are not convex. Per unit, y are the
# inputs over a batch of m, yhat = (y - mean) / s, s^2 = var + eps, z = gamma yhat + beta, and g = dL/dz.
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from conftest import Setup
from torch import Tensor

import normkern

LOSSES = 50
SIMULATED_LOSSES = 4  # the emulator and Triton's interpreter take a thousand times longer
ZERO = 1e-300  # batch norm refuses eps = 0, as torch's does; added to a variance in float64, this is nothing
EPS = (ZERO, 1e-5, 0.3)
M, UNITS = 24, 3


@dataclass
class Example:
    y: Tensor  # (M, UNITS)
    gamma: Tensor
    beta: Tensor
    loss: Callable[[Tensor], Tensor]  # of z

    @property
    def leaf(self) -> Tensor:
        return self.y.clone().requires_grad_()

    def normalized(self, y: Tensor, eps: float) -> Tensor:
        return normkern.batch_norm(y, None, None, self.gamma, self.beta, True, 0.1, eps)

    def parts(self, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """s, yhat, z, g from the formulas."""
        s = (self.y.var(0, correction=0) + eps).sqrt()
        yhat = (self.y - self.y.mean(0)) / s
        z = (self.gamma * yhat + self.beta).requires_grad_()
        (g,) = torch.autograd.grad(self.loss(z), z)
        return s, yhat, z.detach(), g


def examples(count: int) -> Iterator[Example]:
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        y = normal(M, UNITS) * normal(UNITS).exp() + 3 * normal(UNITS)
        mixed, target, phase = normal(UNITS, 5), normal(M, 5), normal(M, 5)

        def loss(
            z: Tensor, mixed: Tensor = mixed, target: Tensor = target, phase: Tensor = phase
        ) -> Tensor:  # units and samples depend on each other
            h = torch.sin(z @ mixed + phase)
            return (h - target).square().sum() + (h.prod(1) * z.square().sum(1)).sum() + z.sum().square() / M

        yield Example(y, normal(UNITS) + 0.2, normal(UNITS), loss)


def losses(backend: Setup) -> Iterator[Example]:
    return examples(SIMULATED_LOSSES if backend.simulated else LOSSES)


def relative(got: Tensor, want: Tensor, scale: Tensor) -> float:
    """The largest error in units of `scale`: the sum of the magnitudes of the terms, which may cancel."""
    return float(((got - want).abs() / scale).max())


def unit_gradient(example: Example, eps: float) -> Tensor:
    y = example.leaf
    (dy,) = torch.autograd.grad(example.loss(example.normalized(y, eps)), y)
    return dy


@pytest.mark.parametrize("eps", EPS)
def test_fact_c1(backend: Setup, eps: float) -> None:
    """dL/dy = gamma / (m s) (m g - sum g - yhat sum(g yhat)), also with eps."""
    for example in losses(backend):
        s, yhat, _z, g = example.parts(eps)
        want = example.gamma / (M * s) * (M * g - g.sum(0) - yhat * (g * yhat).sum(0))
        scale = want.norm(dim=0).expand_as(want)
        assert relative(unit_gradient(example, eps), want, scale) < 1e-12


@pytest.mark.parametrize("eps", EPS)
def test_theorem_4_1(backend: Setup, eps: float) -> None:
    """||dL/dy||^2 = gamma^2 / s^2 (||g||^2 - <1, g>^2 / m - (2 - t) <g, yhat>^2 / m), t = var / (var + eps), is 1 for
    eps = 0: batch norm takes from the gradient what it has along 1 and along yhat."""
    for example in losses(backend):
        s, yhat, _z, g = example.parts(eps)
        t = yhat.square().mean(0)
        terms = g.square().sum(0), g.sum(0).square() / M, (2 - t) * (g * yhat).sum(0).square() / M
        want = (example.gamma / s).square() * (terms[0] - terms[1] - terms[2])
        got = unit_gradient(example, eps).square().sum(0)
        assert relative(got, want, want) < 1e-12
        if eps == ZERO:  # the bound's other form, 1 / sqrt(m) in the last term, is no equality
            other = (example.gamma / s).square() * (terms[0] - terms[1] - terms[2] * M**0.5)
            assert relative(got, other, want) > 1e-6


@pytest.mark.parametrize("eps", EPS)
def test_theorem_4_2(backend: Setup, eps: float) -> None:
    """With v = dL/dy of a unit, H the Hessian of the loss in z and P = I - 11^T / m - yhat yhat^T / m:
    v^T (d2L / dy2) v = gamma^2 / s^2 (Pv)^T H (Pv) - gamma / (m s^2) <g, yhat> ||v||^2
                        + gamma / s^2 (3 a^2 <g, yhat> - 2 a <g, v>), a = <yhat, v> / m, which is 0 for eps = 0."""
    for example in losses(backend):
        s, yhat, z, g = example.parts(eps)
        y = example.leaf
        (dy,) = torch.autograd.grad(example.loss(example.normalized(y, eps)), y, create_graph=True)
        z.requires_grad_()
        (dz,) = torch.autograd.grad(example.loss(z), z, create_graph=True)
        for unit in range(UNITS):
            v = torch.zeros_like(dy)
            v[:, unit] = dy[:, unit].detach()
            (curved,) = torch.autograd.grad(dy, y, v, retain_graph=True)
            a = (yhat * v).sum(0) / M
            seen = v - v.sum(0) / M - yhat * a
            (bent,) = torch.autograd.grad(dz, z, seen, retain_graph=True)
            slope = example.gamma / s.square()
            along = (g * yhat).sum(0)
            terms = (
                (example.gamma / s).square() * (seen * bent).sum(0),
                -slope / M * along * v.square().sum(0),
                slope * 3 * a.square() * along,
                -slope * 2 * a * (g * v).sum(0),
            )
            want = sum(terms)[unit]  # type: ignore[index]
            scale = torch.stack(terms)[:, unit].abs().sum()
            assert relative((v * curved).sum(), want, scale) < 1e-12


@pytest.mark.parametrize("eps", EPS)
def test_observation_4_3(backend: Setup, eps: float) -> None:
    """gamma = s and beta = mean give the activations of the network without batch norm."""
    for example in losses(backend):
        example.gamma = (example.y.var(0, correction=0) + eps).sqrt()
        example.beta = example.y.mean(0)
        scale = example.y.abs().amax(0).expand_as(example.y)
        assert relative(example.normalized(example.y, eps), example.y, scale) < 1e-12


def test_theorem_4_4(backend: Setup) -> None:
    """Over inputs ||X||_2 <= lam, max ||dL/dW||^2 is lam^2 ||dL/dy||^2 of a unit, so batch norm's worst case is that of
    theorem 4.1: never above gamma^2 / s^2 times (its own - lam^2 m mean(g)^2 - lam^2 <g, yhat>^2 / m)."""
    lam = 1.7
    for example in losses(backend):
        s, yhat, _z, g = example.parts(ZERO)
        dy = unit_gradient(example, ZERO)
        for unit in range(UNITS):
            v = dy[:, unit]
            # The X that attains it has v's direction for one of its singular vectors.
            x = lam * torch.outer(v / v.norm(), torch.eye(7, dtype=torch.float64)[0])
            worst = (x.T @ v).square().sum()
            ratio = (example.gamma / s)[unit].square()
            bound = ratio * lam**2 * (
                g[:, unit].square().sum() - M * g[:, unit].mean().square() - (g * yhat).sum(0)[unit].square() / M
            )  # fmt: skip
            assert relative(worst, bound, bound) < 1e-12
            other = torch.randn(M, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(unit))
            other = lam * other / torch.linalg.matrix_norm(other, 2)
            assert (other.T @ v).square().sum() <= bound


def test_equalities_can_fail() -> None:
    """A backward pass that is off by 1e-9 does not satisfy them."""
    example = next(examples(1))
    s, yhat, _z, g = example.parts(ZERO)
    want = example.gamma / (M * s) * (M * g - g.sum(0) - yhat * (g * yhat).sum(0) * (1 + 1e-9))
    assert relative(unit_gradient(example, ZERO), want, want.norm(dim=0).expand_as(want)) > 1e-12
