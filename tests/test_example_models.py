# The networks of examples/models.py: as large as their papers say, and one step of SAM-ON each.
from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import normkern
from normkern.optim import SAM

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import models

# Name, shape of an image, classes, parameters, of which in norm layers. The papers say 36.5 million (WRN-28-10) and
# 0.85 million (ResNet-56 with 10 classes: 853,018, and 65 for each of 90 more).
MODELS = [
    ("wrn_28_10", (3, 32, 32), 100, 36_536_884, 17_952),
    ("resnet56", (3, 32, 32), 100, 858_868, 4_064),
    ("vit_s_32", (3, 224, 224), 1000, 22_878_952, 19_200),
]


@pytest.mark.parametrize(("name", "shape", "classes", "parameters", "norms"), MODELS)
def test_size(name: str, shape: tuple[int, ...], classes: int, parameters: int, norms: int) -> None:
    with torch.device("meta"):
        model = getattr(models, name)()
        assert model(torch.empty(2, *shape)).shape == (2, classes)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in normkern.norm_parameters(model)) == norms


@pytest.mark.parametrize(
    ("name", "shape"), [("wrn_28_10", (3, 8, 8)), ("resnet56", (3, 16, 16)), ("vit_s_32", (3, 224, 224))]
)
def test_one_step(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = getattr(models, name)(10)
    optimizer = SAM(model, torch.optim.SGD(model.parameters(), lr=1e-3), rho=0.1)
    x, y = torch.randn(2, *shape), torch.tensor([1, 7])
    first: dict[str, Any] = {n: p.detach().flatten()[:3].clone() for n, p in model.named_parameters()}

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    before = optimizer.step(closure)
    with torch.no_grad():
        assert F.cross_entropy(model(x), y) < before
    assert any(not torch.equal(p.detach().flatten()[:3], first[n]) for n, p in model.named_parameters() if p.dim() > 1)


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="depth=27"):
        models.WideResNet(27, 10, 10)
    with pytest.raises(ValueError, match="patch=5 and size=32"):
        models.ViT(32, 5, 8, 1, 1, 10)
