# norm_parameters and register_norm: which layers are norms, and which of their parameters count.
from __future__ import annotations

import logging

import pytest
import torch
from test_sam import NORMS, net
from torch import nn

import normkern


def names_of(model: nn.Module) -> list[str]:
    named = {p: name for name, p in model.named_parameters()}
    return [named[p] for p in normkern.norm_parameters(model)]


def test_norms_are_known_by_their_class() -> None:
    assert names_of(net()) == NORMS
    assert names_of(normkern.convert(net())) == NORMS  # type: ignore[arg-type]
    model = nn.ModuleDict({
        "ln_1": nn.LayerNorm(3), "gn": nn.GroupNorm(1, 3), "plain": nn.BatchNorm1d(3, affine=False),
        "norm": nn.Linear(3, 3), "sync": nn.SyncBatchNorm(3), "instance": nn.InstanceNorm2d(3, affine=True),
        "conv": normkern.nn.ConvNorm2d(3, 3, 3),
    })  # fmt: skip
    expected = [f"{n}.{k}" for n in ("ln_1", "gn", "sync", "instance", "conv.norm") for k in ("weight", "bias")]
    assert names_of(model) == expected
    model["tied"] = model["ln_1"]
    assert names_of(model) == expected
    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        normkern.norm_parameters(list(model.parameters()))  # type: ignore[arg-type]


def test_norms_of_our_own() -> None:
    """Scale and shift, and nothing else that they learn."""
    model = nn.ModuleList([
        normkern.nn.FilterResponseNorm2d(4, learn_eps=True), normkern.nn.VarianceNorm2d(4),
        normkern.nn.EvoNorm2dS0(4, 2), normkern.nn.EvoNorm2dB0(4), normkern.nn.LpBatchNorm2d(4),
        normkern.nn.NoisyBatchNorm2d(4), normkern.nn.ScaledWSConv2d(4, 4, 3),
    ])  # fmt: skip
    held = {name for name, _ in model[:6].named_parameters()}
    assert names_of(model) == [f"{i}.{kind}" for i in range(6) for kind in ("weight", "bias")]
    assert {"0.tau", "0.eps", "2.v", "3.v"} <= held


def foreign_class(full: str, *parameters: str, base: type = nn.Module) -> type[nn.Module]:
    """A class as another library has it, as far as anyone can see."""

    def init(self: nn.Module) -> None:
        nn.Module.__init__(self)
        for name in parameters:
            self.register_parameter(name, nn.Parameter(torch.ones(2)))

    module, _, name = full.rpartition(".")
    return type(name, (base,), {"__init__": init, "__module__": module, "__qualname__": name})


@pytest.mark.parametrize(
    ("full", "held", "expected"),
    [
        ("timm.layers.evo_norm.EvoNorm2dS0", ("weight", "bias", "v"), ["weight", "bias"]),
        ("timm.layers.filter_response_norm.FilterResponseNormTlu2d", ("weight", "bias", "tau"), ["weight", "bias"]),
        ("transformers.models.llama.modeling_llama.LlamaRMSNorm", ("weight",), ["weight"]),
        ("transformers.models.mamba2.modeling_mamba2.MambaRMSNormGated", ("weight",), ["weight"]),
        ("diffusers.models.autoencoders.autoencoder_kl_wan.WanRMS_norm", ("gamma",), ["gamma"]),
        ("mine.layers.Normalizer", ("scale",), []),
    ],
)
def test_norms_of_other_libraries(
    full: str, held: tuple[str, ...], expected: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    kind = foreign_class(full, *held)
    with caplog.at_level(logging.WARNING, "normkern"):
        assert names_of(kind()) == expected
    assert names_of(type("Wrapped", (kind,), {})()) == expected  # as fully_shard makes them
    assert ("leaves out scale of mine.layers.Normalizer" in caplog.text) == (not expected)


def test_register_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normkern.nn.affine._registered", {})
    kind = foreign_class("mine.layers.Pixel", "scale", "threshold")
    assert names_of(kind()) == []
    normkern.register_norm(kind)
    assert names_of(kind()) == ["scale", "threshold"]
    normkern.register_norm("mine.layers.P*", "scale")
    assert names_of(kind()) == ["scale"]
    normkern.register_norm(nn.LayerNorm, "weight")  # goes before what is built in
    assert names_of(nn.LayerNorm(3)) == ["weight"]
    with pytest.raises(TypeError, match="must be a subclass"):
        normkern.register_norm(3)  # type: ignore[arg-type]
