# convert, revert and register_converter: what changes, what stays, and what is said about the rest.
from __future__ import annotations

import builtins
import copy
import io
import pickle
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import normkern
from normkern.backends import BACKENDS
from normkern.nn.convert import Report

STOCK: dict[str, tuple[Any, tuple[int, ...]]] = {
    "BatchNorm1d": (lambda **o: nn.BatchNorm1d(6, **o), (4, 6, 5)),
    "BatchNorm2d": (lambda **o: nn.BatchNorm2d(6, **o), (4, 6, 5, 3)),
    "BatchNorm3d": (lambda **o: nn.BatchNorm3d(6, **o), (4, 6, 2, 5, 3)),
    "GroupNorm": (lambda **o: nn.GroupNorm(3, 6, **o), (4, 6, 5)),
    "LayerNorm": (lambda **o: nn.LayerNorm((6, 5), **o), (4, 6, 5)),
    "RMSNorm": (lambda **o: nn.RMSNorm((6, 5), **o), (4, 6, 5)),
    "InstanceNorm1d": (lambda **o: nn.InstanceNorm1d(6, affine=True, **o), (4, 6, 5)),
    "InstanceNorm2d": (lambda **o: nn.InstanceNorm2d(6, affine=True, **o), (4, 6, 5, 3)),
    "InstanceNorm3d": (lambda **o: nn.InstanceNorm3d(6, affine=True, track_running_stats=True, **o), (4, 6, 2, 5, 3)),
}


def randomized(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for t in [*module.parameters(), *module.buffers()]:
            if t.is_floating_point():
                t.copy_(torch.rand(t.shape, generator=generator) + 0.5)
    return module


def tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", STOCK)
def test_stock_modules(name: str, training: bool) -> None:
    make, shape = STOCK[name]
    module = randomized(make()).train(training)
    stock, untouched = copy.deepcopy(module), copy.deepcopy(module)
    kept = [id(t) for t in tensors(module)]
    assert normkern.convert(module) is module
    assert type(module) is getattr(normkern.nn, name)
    assert isinstance(module, getattr(nn, name))
    assert [id(t) for t in tensors(module)] == kept
    assert module.training is training
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(module(x), stock(x))
    torch.testing.assert_close(module.state_dict(), stock.state_dict())
    assert list(module.state_dict()) == list(stock.state_dict())

    assert normkern.revert(module) is module
    assert type(module) is getattr(nn, name)
    assert module.__dict__.keys() == untouched.__dict__.keys()
    assert [id(t) for t in tensors(module)] == kept
    module.load_state_dict(untouched.state_dict())
    assert torch.equal(module(x), untouched(x))


def test_sync_batch_norm_of_torch() -> None:
    group = object()  # never asked for anything here
    module = nn.SyncBatchNorm(6, process_group=group)
    normkern.convert(module)
    assert type(module) is normkern.nn.SyncBatchNorm
    assert module.process_group is group
    assert type(normkern.revert(module)) is nn.SyncBatchNorm
    assert module.process_group is group


def test_the_model_keeps_everything() -> None:
    shared = nn.BatchNorm2d(4)
    shared.weight.requires_grad_(False)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), shared, nn.GroupNorm(2, 4, dtype=torch.float64), shared)
    model[2].weight = nn.Parameter(model[0].bias.detach().double())
    model.tied = nn.Module()
    model.tied.weight = model[2].weight
    seen: list[str] = []
    shared.register_forward_pre_hook(lambda module, args: seen.append("before"))
    shared.register_forward_hook(lambda module, args, y: seen.append("after"))
    shared.register_full_backward_hook(lambda module, dx, dy: seen.append("backward"))
    shared.eval()
    references = shared.weight, shared.running_mean, model[2].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    normkern.convert(model)
    assert model[1] is model[3] is shared
    assert type(shared) is normkern.nn.BatchNorm2d
    assert shared.weight is references[0]
    assert shared.running_mean is references[1]
    assert model[2].weight is references[2]
    assert model.tied.weight is model[2].weight
    assert not shared.training
    assert model[0].training
    assert not shared.weight.requires_grad
    assert model[2].weight.dtype is torch.float64
    shared(torch.randn(2, 4, 3, 3, requires_grad=True)).sum().backward()
    assert seen == ["before", "after", "backward"]
    weight = model[2].weight.detach().clone()
    model[2](torch.randn(2, 4, 3, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(weight, model[2].weight)


class Subclass(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


class WithoutAnything(nn.Module):
    """A norm that is no subclass of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((6,), 2.0))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


class PlainNorm(WithoutAnything):
    pass


class Block(nn.Module):
    """A name with norm in it, and norms inside: only those are reported."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)


class PreNormBlock(Block):
    pass


def one(report: Report, name: str) -> Any:
    (row,) = [row for row in report.rows if row.name == name]
    return row


def test_what_is_left_alone_and_why() -> None:
    patched = nn.LayerNorm(6)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    model = nn.ModuleDict(
        {
            "subclass": Subclass(6),
            "own": PlainNorm(),
            "patched": patched,
            "lazy": nn.LazyBatchNorm2d(),
            "local": nn.LocalResponseNorm(2),
            "scripted": torch.jit.script(nn.LayerNorm(6)),
            "parametrized": parametrizations.weight_norm(nn.LayerNorm(6)),
            "ours": normkern.nn.GroupNorm(2, 6),
            "block": PreNormBlock(),
            "linear": nn.Linear(6, 6),
        }
    )
    classes = {name: type(m) for name, m in model.named_modules()}
    report = normkern.convert(model, dry_run=True)
    assert {name: type(m) for name, m in model.named_modules()} == classes
    for name, why in {
        "subclass": "a subclass of BatchNorm2d",
        "own": "no converter knows it",
        "patched": "forward was replaced",
        "lazy": "size is not known",
        "local": "no converter",
        "scripted": "TorchScript",
        "parametrized": "a subclass of LayerNorm",
        "ours": "already normkern's",
    }.items():
        row = one(report, name)
        assert row.target is None
        assert why in row.remark
    assert [row.name for row in report.converted] == ["block.norm"]
    assert {row.name for row in report.skipped} == set(model) - {"block", "linear"}
    normkern.convert(model)
    assert {name for name, m in model.named_modules() if type(m) is not classes[name]} == {"block.norm"}
    assert normkern.convert(model, dry_run=True).converted == ()


def test_report_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.GroupNorm(2, 4), Subclass(4))
    report = normkern.convert(model, dry_run=True)
    genuine = builtins.__import__

    def without_rich(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("rich"):
            raise ImportError(name)
        return genuine(name, *args, **kwargs)

    texts = [str(report)]
    monkeypatch.setattr(builtins, "__import__", without_rich)
    texts.append(str(report))
    for text in texts:
        assert "nn.GroupNorm" in text
        assert "normkern.nn.GroupNorm" in text
        assert "a subclass of BatchNorm2d" in text
        assert text.endswith("1 converted, 1 skipped")
        assert not any(line != line.rstrip() for line in text.splitlines())
    assert "(the model)" in str(normkern.convert(nn.LayerNorm(3), dry_run=True))


class FastPlainNorm(PlainNorm):
    def forward(self, x: Tensor) -> Tensor:
        return normkern.rms_norm(x, self.weight.shape, self.weight, self.eps)


@pytest.fixture
def converters() -> Iterator[dict[Any, Any]]:
    """What users registered: nothing again after the test."""
    registered: dict[Any, Any] = sys.modules["normkern.nn.convert"]._converters  # the package has a function there
    yield registered
    registered.clear()


@pytest.mark.parametrize("by_name", [True, False])
def test_register_converter(by_name: bool, converters: dict[Any, Any]) -> None:
    key = f"{PlainNorm.__module__}.PlainNorm" if by_name else PlainNorm
    normkern.register_converter(key, lambda m: FastPlainNorm if m.eps > 0 else "its eps is 0")
    model = nn.Sequential(PlainNorm(), PlainNorm())
    model[1].eps = 0.0
    report = normkern.convert(model, dry_run=True)
    assert one(report, "0").target.endswith("FastPlainNorm")
    assert one(report, "1").remark == "its eps is 0"
    x = torch.randn(4, 6)
    expected = model(x)
    normkern.convert(model)
    assert [type(m) for m in model] == [FastPlainNorm, PlainNorm]
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(normkern.revert(model)(x), expected)
    normkern.register_converter(key, lambda m: "not today")
    assert normkern.convert(model, dry_run=True).converted == ()


class Mine(nn.GroupNorm):
    pass


def test_a_registered_converter_wins(converters: dict[Any, Any]) -> None:
    normkern.register_converter(nn.GroupNorm, lambda m: Mine)
    assert type(normkern.convert(nn.GroupNorm(2, 4))) is Mine


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"convert: model must be an nn.Module; got list"):
        normkern.convert([nn.LayerNorm(3)])  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"register_converter: kind must be"):
        normkern.register_converter(3, lambda m: "")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"register_converter: kind must be"):
        normkern.register_converter(int, lambda m: "")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"register_converter: fn must be callable"):
        normkern.register_converter(nn.LayerNorm, None)  # type: ignore[arg-type]


def test_revert_refuses_a_class_it_did_not_make() -> None:
    model = nn.Sequential(nn.LayerNorm(3), nn.LayerNorm(3))
    normkern.convert(model)
    model[1].__class__ = type("FSDPLayerNorm", (type(model[1]),), {})
    with pytest.raises(RuntimeError, match=r"revert: 1 must be the normkern.nn.norm.LayerNorm .* got .*FSDPLayerNorm"):
        normkern.revert(model)
    assert type(model[0]) is normkern.nn.LayerNorm


def test_copies_and_pickles_can_be_reverted() -> None:
    model = normkern.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()), fuse_act=True)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    x = torch.randn(2, 3, 4, 4)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)):
        assert str(other) == str(model)
        torch.testing.assert_close(other(x), model(x))
        normkern.revert(other)
        assert [type(m) for m in other] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
        model(x)


def test_sync_and_back() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), normkern.nn.BatchNorm2d(4, act="silu"), nn.GroupNorm(2, 4))
    normkern.convert(model)
    normkern.convert(model, sync=True)
    assert [type(m).__name__ for m in model] == ["SyncBatchNorm", "SyncBatchNorm", "GroupNorm"]
    assert [m.act for m in model] == [None, "silu", None]
    normkern.revert(model)
    assert [type(m) for m in model] == [nn.BatchNorm1d, normkern.nn.BatchNorm2d, nn.GroupNorm]
    assert model[1].act == "silu"
    assert "act" not in model[0].__dict__


# ---- fusing activations


@pytest.mark.parametrize(
    ("act", "name"),
    [(nn.ReLU(inplace=True), "relu"), (nn.SiLU(), "silu"), (nn.GELU(), "gelu"), (nn.LeakyReLU(), "leaky_relu")],
)
def test_fuses_neighbours(act: nn.Module, name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), act, nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4))
    stock = copy.deepcopy(model)
    normkern.convert(model)
    assert model[1].act is None  # only when asked
    normkern.convert(model, fuse_act=True)
    assert model[1].act == name
    assert model[4].act is None
    assert list(model.state_dict()) == list(stock.state_dict())
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(model[:3](x), stock[:3](x))
    torch.testing.assert_close(model(x), stock(x))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        model[1:3](torch.randn(2, 4, 4, 4, requires_grad=True))
    assert len(set(kept)) < 6
    normkern.revert(model)
    assert [type(m) for m in model] == [type(m) for m in stock]
    assert model[1].__dict__.keys() == stock[1].__dict__.keys()


class Residual(nn.Module):
    """What only a trace can tell: names in another order than calls, one ReLU used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.act1, self.act2 = nn.ReLU(), nn.SiLU()
        self.last, self.twice, self.first = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.function = nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act2(self.first(x))
        z = self.last(y)
        y = self.act1(z + x)
        t = self.twice(y)
        return F.relu(self.function(self.act1(t) + t + z))


def test_fuses_what_a_trace_proves() -> None:
    model = Residual()
    model.last.eval()
    stock = copy.deepcopy(model)
    report = normkern.convert(model, dry_run=True, fuse_act=True)
    assert "silu" in one(report, "first").remark
    for name in ("last", "twice", "function"):
        assert one(report, name).target is not None
        assert "no activation module follows it" in one(report, name).remark
    normkern.convert(model, fuse_act=True)
    assert model.first.act == "silu"
    assert isinstance(model.act2, nn.Identity)
    assert type(model.act1) is nn.ReLU
    assert [m.training for m in model.modules()] == [m.training for m in stock.modules()]
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(model(x), stock(x))


class OnlyInTraining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.act(y) if self.training else y


class DataDependent(OnlyInTraining):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(x)) if x.sum() > 0 else x


def hooked(which: int) -> nn.Module:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
    model[which].register_forward_hook(lambda *args: None)
    return model


def reused() -> nn.Module:
    act = nn.ReLU()
    return nn.Sequential(nn.BatchNorm2d(4), act, nn.BatchNorm2d(4), act)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (OnlyInTraining(), "no activation module follows it"),
        (DataDependent(), "torch.fx cannot trace the model"),
        (hooked(0), "the norm has hooks"),
        (hooked(1), "has hooks"),
        (reused(), "used in several places"),
        (nn.Sequential(nn.BatchNorm2d(4), nn.GELU(approximate="tanh")), "GELU is no activation that normkern has"),
        (nn.Sequential(nn.BatchNorm2d(4), nn.LeakyReLU(0.2)), "LeakyReLU is no activation that normkern has"),
        (nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU()), "Dropout is no activation"),
    ],
)
def test_does_not_fuse(model: nn.Module, why: str) -> None:
    report = normkern.convert(model, dry_run=True, fuse_act=True)
    assert report.converted
    for row in report.converted:
        assert why in row.remark
    acts = [type(m) for m in model.modules() if not isinstance(m, nn.BatchNorm2d)]
    normkern.convert(model, fuse_act=True)
    assert [type(m) for m in model.modules() if not isinstance(m, nn.BatchNorm2d)] == acts


def test_fuses_in_a_model_that_is_normkerns_already() -> None:
    model = nn.Sequential(normkern.nn.GroupNorm(2, 4), nn.SiLU(), normkern.nn.GroupNorm(2, 4, act="relu"), nn.SiLU())
    stock = copy.deepcopy(model)
    normkern.convert(model, fuse_act=True)
    assert [getattr(m, "act", "-") for m in model] == ["silu", "-", "relu", "-"]
    x = torch.randn(2, 4, 3)
    torch.testing.assert_close(model(x), stock(x))
    normkern.revert(model)
    assert str(model) == str(stock)


# ---- with the rest of torch


@pytest.mark.skipif(BACKENDS["native"].why_not(torch.empty(0)) is not None, reason="the compiled library is not there")
def test_compiled_code_notices() -> None:
    called: list[str] = []

    def record(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        called.append(" ".join(str(node.target) for node in graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))
    run = torch.compile(model, backend=record, fullgraph=True)
    x = torch.randn(3, 6)
    with torch.no_grad(), normkern.use_backend("native"):
        y = run(x)
        normkern.convert(model)
        torch.testing.assert_close(run(x), y)
        normkern.revert(model)
        assert torch.equal(run(x), y)
    assert ["normkern" in text for text in called[:2]] == [False, True]
    torch._dynamo.reset()


def test_weight_averaging_and_sync_conversion_see_batch_norms() -> None:
    model = normkern.convert(nn.Sequential(nn.BatchNorm2d(4)))
    torch.optim.swa_utils.update_bn([torch.randn(8, 4, 2, 2) + 3], model)
    torch.testing.assert_close(model[0].running_mean, torch.full((4,), 3.0), rtol=0, atol=1)
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(model)[0]) is nn.SyncBatchNorm
