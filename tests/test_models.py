# Real models of other libraries, with random weights: a converted model trains as the stock one does, has the same
# state dict, and comes back bit for bit. Each library is skipped where it is not installed (the extra `models`).
from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normkern

# torchvision's operators do not load where it was built for another torch, and whoever imports it then fails. Its
# Python code only needs these two to be declared; the library object must stay alive.
try:
    importlib.import_module("torchvision")
except ImportError:
    pass
except RuntimeError:
    _declared = torch.library.Library("torchvision", "DEF")
    _declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

Batch = dict[str, Tensor]
Build = Callable[[], tuple[nn.Module, Batch]]


def images(name: str = "pixel_values", size: int = 32) -> Batch:
    return {name: torch.randn(2, 3, size, size)}


def tokens() -> Batch:
    ids = torch.randint(0, 64, (2, 7))
    return {"input_ids": ids}


def from_transformers(model: str, batch: Callable[[], Batch], **config: Any) -> Build:
    def build() -> tuple[nn.Module, Batch]:
        transformers = pytest.importorskip("transformers")
        kind = getattr(transformers, model + "Model")
        return kind(getattr(transformers, model + "Config")(**config)), batch()

    return build


def from_timm(name: str, **options: Any) -> Build:
    def build() -> tuple[nn.Module, Batch]:
        timm = pytest.importorskip("timm")
        return timm.create_model(name, num_classes=4, **options), images("x")

    return build


def from_diffusers() -> tuple[nn.Module, Batch]:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    )
    return model, images("sample", 16)


TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
# The classes of their norms.
MODELS: dict[str, tuple[Build, set[str]]] = {
    "resnet": (
        from_transformers("ResNet", images, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic"),
        {"BatchNorm2d"},
    ),
    "bit": (
        from_transformers("Bit", images, embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], num_groups=4),
        {"BitGroupNormActivation"},
    ),
    "convnext": (
        from_transformers("ConvNext", images, num_stages=2, hidden_sizes=[8, 16], depths=[1, 1]),
        {"ConvNextLayerNorm", "LayerNorm"},
    ),
    "vit": (
        from_transformers(
            "ViT",
            images,
            image_size=32,
            patch_size=8,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
        ),
        {"LayerNorm"},
    ),
    "llama": (from_transformers("Llama", tokens, **TEXT), {"LlamaRMSNorm"}),
    "gemma": (from_transformers("Gemma", tokens, **TEXT), {"GemmaRMSNorm"}),
    "qwen3": (from_transformers("Qwen3", tokens, **TEXT), {"Qwen3RMSNorm"}),
    "timm-resnet": (from_timm("test_resnet"), {"BatchNorm2d"}),
    "timm-convnext": (from_timm("test_convnext"), {"LayerNorm", "LayerNorm2d"}),
    "timm-efficientnet": (from_timm("test_efficientnet"), {"BatchNormAct2d"}),
    "timm-resnetv2": (
        from_timm("resnetv2_50d_gn", layers=(1, 1, 1, 1), channels=(128,) * 4, stem_chs=64),
        {"GroupNormAct"},
    ),
    "diffusers-autoencoder": (from_diffusers, {"GroupNorm"}),
}


def main_output(result: Any) -> Tensor:
    if isinstance(result, Tensor):
        return result
    return result[0]  # type: ignore[no-any-return]


def train(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Outputs and gradients of three steps of SGD."""
    seen = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(3):
        torch.manual_seed(1)  # for dropout
        optimizer.zero_grad()
        y = main_output(model(**batch))
        y.square().mean().backward()
        seen.append(y.detach())
        optimizer.step()
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_trains_as_the_stock_model(name: str) -> None:
    build, kinds = MODELS[name]
    torch.manual_seed(0)
    model, batch = build()
    model.double().train()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    stock = copy.deepcopy(model)
    untouched = copy.deepcopy(model)
    keys = list(model.state_dict())
    tensors = {n: id(t) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    before = str(model)

    report = normkern.convert(model, dry_run=True)
    print(report)
    assert str(model) == before
    assert normkern.convert(model) is model
    assert list(model.state_dict()) == keys
    assert {n: id(t) for n, t in [*model.named_parameters(), *model.named_buffers()]} == tensors
    assert not report.skipped, str(report)
    assert kinds == {row.kind.rpartition(".")[2] for row in report.converted}
    assert sum(type(m).__name__ in kinds for m in stock.modules()) == len(report.converted)

    copied = copy.deepcopy(model)
    # Language models round to float32 in their norms, normkern does not.
    rounding = 2.0**-24 if "input_ids" in batch else 2.0**-53
    nudged = copy.deepcopy(stock)
    with torch.no_grad():
        for parameter in nudged.parameters():
            parameter.mul_(1 + rounding * torch.randn_like(parameter))
    results = [[*train(m, batch), *m.state_dict().values()] for m in (model, stock, nudged)]
    for mine, theirs, other in zip(*results, strict=True):
        # A model whose weights are off by a rounding shows how far these steps carry one.
        far = max((theirs - other).abs().max().item(), rounding * theirs.abs().max().item())
        torch.testing.assert_close(mine, theirs, rtol=0, atol=50 * far)

    normkern.revert(copied)
    assert str(copied) == before
    torch.manual_seed(1)
    mine = main_output(copied(**batch))
    torch.manual_seed(1)
    assert torch.equal(mine, main_output(untouched(**batch)))
