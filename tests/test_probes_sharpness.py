# Sharpness: against what is known of linear and convex models, and what it is measured on.
from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from test_probes import Net, batch, net
from torch import Tensor, nn

from normkern import probes

__all__ = ["net"]  # a fixture


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[1.0, -2.0, 0.0], [0.5, 3.0, -1.0]], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w.T


@pytest.mark.parametrize("adaptive", [False, True])
def test_sharpness_of_what_is_linear(adaptive: bool) -> None:
    """The largest value of a linear function over a box is at a corner: rho sum |g_i| c_i above."""
    model, x = Linear(), torch.tensor([[1.0, 2.0, -1.0], [0.0, 1.0, 3.0]], dtype=torch.float64)
    target = torch.zeros(2)

    def mean(logits: Tensor, _: Tensor) -> Tensor:
        return (logits * torch.tensor([1.0, -2.0])).mean()

    found = probes.sharpness(model, [(x, target)], 0.1, adaptive=adaptive, normalize_logits=False, loss=mean)
    slope = torch.outer(torch.tensor([1.0, -2.0]).double(), x.sum(0)) / 4
    box = model.w.detach().abs() if adaptive else torch.ones_like(model.w)
    assert found.value == pytest.approx(0.1 * float((slope.abs() * box).sum()), rel=1e-12)
    assert found.batches[0].samples == 2


def test_sharpness_finds_the_worst_corner() -> None:
    """Cross-entropy is convex in w, so its largest value over the box is at one of 64 corners. APGD finds a point of
    the box: never more, and here nearly all of it."""
    torch.manual_seed(0)
    model, x, y = Linear(), torch.randn(16, 3).double(), torch.randint(2, (16,))
    w, rho = model.w.detach().clone(), 0.3
    worst = max(
        float(F.cross_entropy(x @ (w + rho * torch.tensor(signs).double().view(2, 3)).T, y))
        for signs in itertools.product((-1.0, 1.0), repeat=6)
    )
    found = probes.sharpness(model, [(x, y)], rho, normalize_logits=False)
    assert found.batches[0].loss == pytest.approx(float(F.cross_entropy(x @ w.T, y)), rel=1e-12)
    assert 0.99 * worst < found.batches[0].worst <= worst * (1 + 1e-12)


def test_sharpness_inside_the_box() -> None:
    """A hill narrower than the box: sign ascent must shorten its steps to get near the top."""

    peak = torch.tensor([0.7, 0.1, -0.45, 0.02, -0.9], dtype=torch.float64)

    class Hill(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(5, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return -(self.w - peak).square().sum().expand(1, 1)

    hill = Hill()
    some = (torch.zeros(1), torch.zeros(1))
    found = [
        probes.sharpness(hill, [some], 1.0, normalize_logits=False, steps=n, loss=lambda z, _: z.sum()).value
        for n in (1, 10, 100)
    ]
    top = float(peak.square().sum())
    assert found[0] == 0  # the first step is a corner, far below
    assert found[0] <= found[1] <= found[2] <= top
    assert found[1] > 0.98 * top  # the search goes on from the best point with the gradient that is there
    assert found[2] > 0.999 * top


def test_sharpness_with_normalized_logits_ignores_scale(net: Net) -> None:
    plain = Linear()
    scaled = copy.deepcopy(plain)
    x, y = torch.randn(8, 3).double(), torch.randint(2, (8,))
    with torch.no_grad():
        scaled.w.mul_(7)
    a, b = (probes.sharpness(m, [(x, y)], 0.02, adaptive=True) for m in (plain, scaled))
    assert a.value == pytest.approx(b.value, rel=1e-9)
    small, large = (probes.sharpness(net, [batch()], rho, steps=5).value for rho in (0.002, 0.02))
    assert 0 < small < large
    only = probes.sharpness(net, [batch()], 0.02, steps=5, parameters=net.norm.parameters()).value
    assert 0 < only < large


def test_sharpness_is_of_the_model_in_eval_mode(net: Net) -> None:
    """Of normalized logits where asked for; the mean over batches."""
    some = [batch(0), batch(1, 5)]
    found = probes.sharpness(net, some, 0.01, normalize_logits=False, steps=2)
    each = [probes.sharpness(net, [one], 0.01, normalize_logits=False, steps=2).value for one in some]
    assert found.value == pytest.approx(sum(each) / 2, rel=1e-12)
    x, y = some[0]
    assert found.batches[0].loss == pytest.approx(float(F.cross_entropy(copy.deepcopy(net).eval()(x), y)), rel=1e-6)
    seen = []

    def loss(logits: Tensor, _: Tensor) -> Tensor:
        seen.append(logits.detach())
        return logits[:, 0].mean()

    probes.sharpness(net, some, 0.01, steps=1, loss=loss)
    for logits in seen:
        assert logits.mean(1).abs().max() < 1e-6
        assert torch.allclose(logits.norm(dim=1), torch.ones(len(logits)))


def test_sharpness_has_the_same_noise_at_every_point() -> None:
    model, x, y = Linear(), torch.randn(8, 3).double(), torch.randint(2, (8,))
    model.register_forward_pre_hook(lambda _, given: F.dropout(given[0], 0.5))
    assert probes.sharpness(model, [(x, y)], 1e-9, normalize_logits=False, steps=5).value < 1e-6
