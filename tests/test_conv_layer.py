# ConvNorm2d and convert_conv_norm: the layer is its parts, sizes may change, state dicts fit, models convert.
from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normkern
from normkern.nn import BatchNorm2d, ConvNorm2d


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(*args: Any, **options: Any) -> ConvNorm2d:
    torch.manual_seed(0)
    return ConvNorm2d(*args, dtype=torch.float64, **options)


@pytest.mark.parametrize("kernel", [3, 1, 2, (3, 5)], ids=str)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bn", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_is_its_parts(kernel: Any, affine: bool, bn: bool, bias: bool) -> None:
    padding = 0 if kernel in (1, 2) else 1
    m = layer(4, 6, kernel, 2, padding, groups=2, bias=bias, affine=affine, bn=bn)
    x = normal(3, 4, 9, 9)
    y = normkern.conv_norm(x, m.weight, m.bias, 2, padding, groups=2)
    if affine:
        assert m.r is not None
        assert m.r.weight.shape == (6, 1, *m.kernel_size)
        rows, cols = m.kernel_size
        y = nn.functional.pad(y, ((cols - 1) // 2, cols // 2, (rows - 1) // 2, rows // 2))
        y = nn.functional.conv2d(y, m.r.weight, m.r.bias, groups=6)
    if bn:
        weight, shift = (torch.ones(6).double(), torch.zeros(6).double()) if affine else (None, None)
        y = nn.functional.batch_norm(y, None, None, weight, shift, training=True)
    got = m(x)
    assert got.shape == y.shape
    assert (got - y).abs().max() <= 1e-12
    parts = {"weight", *(["bias"] if bias else []), *(["r.weight", "r.bias"] if affine else [])}
    parts |= {"norm.weight", "norm.bias"} if bn and affine else set()
    assert {name for name, _ in m.named_parameters()} == parts
    got.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())


def test_affine_init() -> None:
    """As torch initializes a depth-wise convolution, or the identity, also for even kernels."""
    paper, delta = layer(3, 8, 3, padding=1), layer(3, 8, (4, 3), padding=1, affine_init="delta")
    assert paper.r is not None
    assert 0.1 < float(paper.r.weight.detach().std()) < 0.4
    assert delta.r is not None
    y = normal(2, 8, 5, 6)
    for _ in range(2):
        assert torch.equal(delta.r(y)[:, :, 1:], y)
        delta.reset_parameters()


def test_sizes_may_change_and_state_dicts_fit() -> None:
    for mode in ("current", "ema"):
        m = layer(3, 5, 3, 2, 1, eval_mode=mode)
        m(normal(2, 3, 8, 8))
        shapes = {name: t.shape for name, t in m.state_dict().items()}
        m(normal(2, 3, 13, 6))
        assert {name: t.shape for name, t in m.state_dict().items()} == shapes
        assert ("running_lags" in shapes) == (mode == "ema")
        m.eval()
        for size in ((4, 4), (31, 17), (110, 9)):
            assert m(normal(1, 3, *size)).shape[2:] == tuple((s + 1) // 2 for s in size)
        other = ConvNorm2d(3, 5, 3, 2, 1, eval_mode=mode, dtype=torch.float64).eval()
        other.load_state_dict(m.state_dict())
        x = normal(1, 3, 9, 9)
        assert torch.equal(other(x), m(x))
        for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
            assert torch.equal(twin(x), m(x))


def test_average_of_lags() -> None:
    """The paper's annealed momentum, on the lags; eval uses the average, training the kernel."""
    m = layer(3, 5, 3, padding=1, bn=False, eval_mode="ema")
    x = normal(2, 3, 6, 6)
    average = torch.zeros(5, 13, dtype=torch.float64)
    for n in range(1, 4):
        lags = normkern.spectrum.lags(m.weight.detach())
        y = m(x)
        assert m.r is not None
        assert torch.allclose(y, m.r(normkern.conv_norm(x, m.weight, padding=1)), rtol=1e-12)
        share = max(0.5 * (math.cos(math.pi * n / 40000) + 1), 0.01)
        average = share * lags + (1 - share) * average
        with torch.no_grad():
            m.weight += 0.1 * normal(*m.weight.shape, seed=n)
    assert m.running_lags is not None
    assert torch.allclose(m.running_lags, average, rtol=1e-12)
    assert int(m.num_batches_tracked) == 3  # type: ignore[arg-type]
    m.eval()
    current = m.r(normkern.conv_norm(x, m.weight, padding=1))  # type: ignore[misc]
    assert (m(x) - current).abs().max() > 1e-3
    assert torch.equal(m.running_lags, m.running_lags)
    assert int(m.num_batches_tracked) == 3
    m.num_batches_tracked.fill_(50000)  # type: ignore[union-attr]
    before = m.running_lags.clone()
    m.train()(x)
    late = 0.01 * normkern.spectrum.lags(m.weight.detach()) + 0.99 * before
    assert torch.allclose(m.running_lags, late, rtol=1e-12)


def test_average_before_the_first_step_is_the_kernel() -> None:
    m, x = layer(3, 5, 3, bn=False, eval_mode="ema"), normal(2, 3, 6, 6)
    before = m.eval()(x)
    m.eval_mode = "current"
    assert m.r is not None
    assert torch.allclose(before, m.r(normkern.conv_norm(x, m.weight)), rtol=1e-10)


def test_gradient_through_the_preconditioner_is_an_option() -> None:
    x, gradients = normal(2, 3, 6, 6), []
    for through in (True, False):
        for mode in ("current", "ema"):
            m = layer(3, 5, 3, bn=False, affine=False, through_preconditioner=through, eval_mode=mode)
            (m(x) * normal(2, 5, 4, 4, seed=3)).sum().backward()
            assert m.weight.grad is not None
            gradients.append(m.weight.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[2], gradients[3])
    assert (gradients[0] * m.weight).sum((1, 2, 3)).abs().max() <= 1e-12  # no part along the kernel
    assert (gradients[2] * m.weight).sum((1, 2, 3)).abs().min() > 1e-6


def test_trains_in_half_and_compiles() -> None:
    torch._dynamo.reset()
    m = ConvNorm2d(3, 8, 3, 2, 1, eval_mode="ema", affine_init="delta", dtype=torch.bfloat16)
    x = torch.randn(4, 3, 8, 8, dtype=torch.bfloat16)
    y = m(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert m.weight.grad is not None
    m = ConvNorm2d(3, 8, 3, padding=1, eval_mode="ema")
    twin, x = copy.deepcopy(m), torch.randn(4, 3, 8, 8)
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), twin(x), atol=1e-5)
    assert torch.equal(m.running_lags, twin.running_lags)  # type: ignore[arg-type]


def test_meta_device() -> None:
    m = ConvNorm2d(3, 8, 3, eval_mode="ema", device="meta").to_empty(device="cpu")
    m.reset_parameters()
    assert m(torch.randn(2, 3, 8, 8)).isfinite().all()
    assert m.eval()(torch.randn(2, 3, 8, 8)).isfinite().all()


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("eval_mode must be one of current, ema; got 'mean'", {"eval_mode": "mean"}),
        ("affine_init must be one of paper, delta", {"affine_init": "zero"}),
        ("padding must be at most", {"padding": 3}),
        ("eps must be at least 0", {"eps": -1e-6}),
    ],
)
def test_errors(message: str, options: Any) -> None:
    with pytest.raises(ValueError, match=f"ConvNorm2d: {message}"):
        ConvNorm2d(3, 8, 3, **options)


def test_errors_of_forward_name_the_layer_and_update_nothing() -> None:
    m = ConvNorm2d(3, 8, 3, eval_mode="ema")
    with pytest.raises(RuntimeError, match="ConvNorm2d: input must have 3 channels"):
        m(torch.randn(2, 4, 8, 8))
    with pytest.raises(RuntimeError, match="ConvNorm2d: the kernel must fit"):
        m(torch.randn(2, 3, 2, 8))
    assert int(m.num_batches_tracked) == 0  # type: ignore[arg-type]


class Block(nn.Module):
    """As torchvision writes a block, with layers that cannot convert."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 8, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=True)
        self.bn2 = nn.BatchNorm2d(8)
        self.downsample = nn.Sequential(nn.Conv2d(4, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
        self.alone = nn.Conv2d(8, 8, 3, padding="valid")
        self.other = nn.BatchNorm2d(9)
        self.circular = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
        self.wide = nn.Conv2d(8, 8, 1, padding=1)
        self.same = nn.Conv2d(8, 8, 3, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y = self.relu(y + self.downsample(x))
        y = self.alone(y)
        return self.same(self.wide(self.circular(y)))  # type: ignore[no-any-return]


def test_convert() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), nn.Flatten())
    block: Any = model[0]
    kept = {name: (p, p.data_ptr()) for name, p in model.named_parameters()}
    norms = block.bn1, block.bn2, block.downsample[1]
    assert normkern.convert_conv_norm(model, affine_init="delta", eval_mode="ema") is model
    for conv, norm in zip((block.conv1, block.conv2, block.downsample[0]), norms, strict=True):
        assert type(conv) is ConvNorm2d
        assert conv.norm is norm
    assert all(type(m) is nn.Identity for m in (block.bn1, block.bn2, block.downsample[1]))
    assert type(block.alone) is ConvNorm2d
    assert block.alone.norm is None
    assert type(block.other) is nn.BatchNorm2d
    assert all(type(m) is nn.Conv2d for m in (block.circular, block.wide, block.same))
    now = {p.data_ptr(): p for p in model.parameters()}
    assert all(now[pointer] is p for p, pointer in kept.values())
    assert (block.conv1.stride, block.conv1.padding, block.conv2.bias is None) == ((2, 2), (1, 1), False)
    x = torch.randn(2, 4, 12, 12)
    model(x).sum().backward()
    expected = nn.functional.batch_norm(
        normkern.conv_norm(x, block.conv1.weight, None, 2, 1), None, None, training=True
    )
    assert (block.conv1(x) - expected).abs().max() <= 1e-5
    normkern.convert_conv_norm(model)  # a second time changes nothing
    assert type(block.conv1.r) is nn.Conv2d


def test_convert_options() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
    first: Any = model[0]
    normkern.convert_conv_norm(model, affine=False, bn=False, skip=lambda name, conv: name == "2", eps=1e-3)
    got: Any = model[0]
    assert type(got) is ConvNorm2d
    assert got.weight is first.weight
    assert got.r is None
    assert got.norm is None
    assert got.eps == 1e-3
    assert not got.training
    assert type(model[1]) is nn.BatchNorm2d
    assert type(model[2]) is nn.Conv2d
    alone = nn.Conv2d(3, 4, 3)
    assert type(normkern.convert_conv_norm(alone)) is ConvNorm2d
    shared = nn.Conv2d(4, 4, 3, padding=1)
    twice = normkern.convert_conv_norm(nn.Sequential(shared, nn.ReLU(), shared))
    assert twice[0] is twice[2]  # type: ignore[index]


def test_norm_is_ours() -> None:
    assert type(ConvNorm2d(3, 4, 3).norm) is BatchNorm2d
