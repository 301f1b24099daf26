# What depth does to wide networks at initialization (Lubana et al. 2021, "Beyond BatchNorm"): variance through residual
# blocks, similarity of activations and growth of gradients by group size, measured with the probes and held against the
# closed forms. Seeds are fixed; tolerances are a few standard errors of these sizes, measured over other seeds.
from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import normkern
from normkern import nn as layers
from normkern import probes
from normkern.probes.activations import channel_variance, cosines, mean_similarity

BLOCKS = (1, 5, 10, 20)


def convolution(channels: int, kind: type[nn.Conv2d] = nn.Conv2d) -> nn.Conv2d:
    conv = kind(channels, channels, 3, padding=1, padding_mode="circular", bias=False)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return conv


def identity(_: int) -> nn.Module:
    return nn.Identity()


Norm = Callable[[int], nn.Module]
# The norm before, the activation, and the convolution behind it.
BRANCHES: dict[str, tuple[Norm, type[nn.Module], type[nn.Conv2d]]] = {
    "none": (identity, nn.ReLU, nn.Conv2d),
    "batch": (layers.BatchNorm2d, nn.ReLU, nn.Conv2d),
    "layer": (lambda c: layers.GroupNorm(1, c), nn.ReLU, nn.Conv2d),
    "instance": (layers.InstanceNorm2d, nn.ReLU, nn.Conv2d),
    "group": (lambda c: layers.GroupNorm(8, c), nn.ReLU, nn.Conv2d),
    "filter response": (layers.FilterResponseNorm2d, nn.Identity, nn.Conv2d),  # with its own threshold
    "variance": (layers.VarianceNorm2d, nn.ReLU, nn.Conv2d),
    "scaled weight standardization": (identity, nn.ReLU, layers.ScaledWSConv2d),
    "weight norm": (identity, layers.ScaledReLU, layers.WeightNormConv2d),
}


def residual_variances(name: str, seed: int, channels: int = 64) -> list[float]:
    """Behind blocks x + conv(act(norm(conv(act(norm(x)))))), of an input with variance 1."""
    norm, act, kind = BRANCHES[name]
    torch.manual_seed(seed)
    x, found = torch.randn(16, channels, 8, 8), []
    with torch.no_grad():
        for block in range(1, BLOCKS[-1] + 1):
            y = x
            for _ in range(2):
                y = convolution(channels, kind)(act()(norm(channels)(y)))
            x = x + y
            if block in BLOCKS:
                found.append(float(channel_variance(x)))
    return found


def mean_variances(name: str) -> Tensor:
    return torch.tensor([residual_variances(name, seed) for seed in range(2)]).log().mean(0).exp()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("batch", (1.7, 4.4, 7.8, 14.8)),
        ("instance", (1.7, 4.4, 7.8, 14.7)),
        ("layer", (1.5, 3.0, 4.4, 6.7)),
        ("group", (1.5, 3.2, 5.3, 8.9)),
        ("filter response", (1.5, 3.5, 6.0, 11.1)),
        ("variance", (1.8, 4.9, 9.4, 17.9)),
    ],
)
def test_norms_of_activations_keep_variance_linear(name: str, expected: tuple[float, ...]) -> None:
    got = mean_variances(name)
    assert got.tolist() == pytest.approx(expected, rel=0.12)
    if name in ("batch", "instance"):  # every block adds 1 - 1 / pi, the variance of relu times He's 2
        theory = [1 + n * (1 - 1 / math.pi) for n in BLOCKS]
        assert got.tolist() == pytest.approx(theory, rel=0.02)


def test_without_norms_of_activations_variance_doubles() -> None:
    standardized = mean_variances("scaled weight standardization").tolist()
    assert standardized[0] == pytest.approx(2.0, rel=0.05)
    assert (standardized[3] / standardized[0]) ** (1 / 19) == pytest.approx(1.99, rel=0.01)
    plain = mean_variances("none").tolist()
    assert plain[0] == pytest.approx(1.5, rel=0.1)
    # The second moment doubles; what is the same at all positions takes a growing part of it.
    assert 1.6 < (plain[3] / plain[0]) ** (1 / 19) < 1.95
    normed = mean_variances("weight norm").tolist()
    assert normed[0] == pytest.approx(2.0, rel=0.05)
    assert (normed[3] / normed[0]) ** (1 / 19) > 2


@pytest.mark.parametrize("group_size", [2, 4, 8, 16, 32, 64, 256])
def test_similarity_at_depth(group_size: int) -> None:
    """Of samples that start orthogonal, behind 10 and 50 layers of width 512; four networks."""
    width, found = 512, []
    for seed in range(4):
        torch.manual_seed(seed)
        x = torch.linalg.qr(torch.randn(width, 12))[0].T * math.sqrt(width)
        row = []
        for layer in range(1, 51):
            mixed = x @ (torch.randn(width, width) * math.sqrt(2 / width))
            x = normkern.group_norm(mixed, width // group_size, eps=1e-12, act="relu")
            if layer in (10, 50):
                row.append(mean_similarity(cosines(x)))
        found.append(row)
    early, late = torch.tensor(found).mean(0).tolist()
    predicted = probes.predict(group_size, 50).layers
    assert early == pytest.approx(predicted[9].similarity, abs=0.03)
    # One network's similarity wanders by 0.015 in small groups and 0.004 in large ones.
    assert late == pytest.approx(predicted[49].similarity, abs=0.03 if group_size <= 16 else 0.012)


def test_similarity_without_norm_and_with_batch_norm() -> None:
    width, samples = 512, 128
    for norm, expected, error in ((identity, probes.predict(math.inf, 50).similarity, 0.02), (None, 1 / math.pi, 0.01)):
        torch.manual_seed(0)
        x = torch.randn(samples, width)
        for _ in range(50):
            x = x @ (torch.randn(width, width) * math.sqrt(2 / width))
            x = normkern.batch_norm(x, None, None, training=True, act="relu") if norm is None else x.relu()
        assert mean_similarity(cosines(x)) == pytest.approx(expected, abs=error)


@pytest.mark.parametrize("group_size", [1, 2, 4, 8, 32])
def test_gradient_growth(group_size: int) -> None:
    """The squared gradient through 11 of 12 convolutions with 128 channels by He, on 8 x 8 positions."""
    depth, channels, found = 12, 128, []
    for seed in range(3):
        torch.manual_seed(seed)
        net = nn.Sequential()
        for _ in range(depth):
            net.append(convolution(channels)).append(layers.GroupNorm(channels // group_size, channels, act="relu"))
        x = torch.randn(2, channels, 8, 8) / math.sqrt(2)  # so that the first convolution's output has variance 1
        with probes.record_activations(net) as recorder:
            y = net(x)
            y.backward(torch.randn_like(y))
        squares = [row.gradient_norm**2 for row in recorder.result.layers if row.gradient_norm is not None]
        assert len(squares) == depth
        found.append(torch.tensor(squares[:-1]).log() - torch.tensor(squares[1:]).log())
    growth = torch.stack(found).mean(0)
    predicted = torch.tensor([row.gradient_growth for row in probes.predict(group_size, depth - 1).layers]).log()
    assert float(growth.mean().exp()) == pytest.approx(float(predicted.mean().exp()), rel=0.03)
    # One layer's is known to 6 %.
    assert float((growth - predicted).square().mean().sqrt()) < 0.09


@pytest.mark.parametrize(("group_size", "limit"), [(1, 1.467), (2, 1.392), (4, 1.313), (8, 1.231), (16, 1.157)])
def test_gradient_growth_far_from_the_input(group_size: int, limit: float) -> None:
    """Where it settles, by sampling the mean-field map at its fixed point."""
    assert probes.predict(group_size, 60).gradient_growth == pytest.approx(limit, abs=0.003)


def test_prediction_has_its_closed_forms() -> None:
    for rho in (-1.0, -0.3, 0.0, 0.4, 0.99, 1.0):
        arc = (math.sqrt(1 - rho**2) + rho * (math.pi - math.acos(rho))) / math.pi
        assert probes.predict(2, 1, similarity=rho).similarity == pytest.approx(1 - math.acos(rho) / math.pi, abs=1e-12)
        assert probes.predict(math.inf, 1, similarity=rho).similarity == pytest.approx(arc, abs=1e-12)
        assert probes.predict(1, 1, similarity=rho).similarity == pytest.approx(1 / math.pi)
        # The correlation of many pairs is that of the distribution.
        assert probes.predict(4096, 1, similarity=rho).similarity == pytest.approx(arc, abs=1e-3)
    assert probes.predict(1, 30).gradient_growth == pytest.approx(math.pi / (math.pi - 1), rel=1e-12)
    assert probes.predict(math.inf, 30).gradient_growth == 1


@pytest.mark.parametrize("group_size", [3, 4, 16])
def test_prediction_against_sampling(group_size: int) -> None:
    """One layer of each map from its definition, by Monte Carlo."""
    generator, count, rho = torch.Generator().manual_seed(5), 100_000, 0.6

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def normalized(x: Tensor) -> Tensor:
        return (x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True)

    u = normal(count, group_size)
    v = rho * u + math.sqrt(1 - rho**2) * normal(count, group_size)
    product = (normalized(u).relu() * normalized(v).relu()).mean(1) * 2  # E relu^2 = 1/2
    error = float(product.std()) / math.sqrt(count)
    assert probes.predict(group_size, 1, similarity=rho).similarity == pytest.approx(
        float(product.mean()), abs=4 * error
    )
    # Channel means with variance q = 1 / pi, what one layer makes of a white input.
    q = 1 / math.pi
    spread = normal(count, group_size).mul(math.sqrt(q)).var(1, correction=0)
    growth = 1 / (1 - q + spread)
    error = float(growth.std()) / math.sqrt(count)
    assert probes.predict(group_size, 2).gradient_growth == pytest.approx(float(growth.mean()), abs=4 * error)
