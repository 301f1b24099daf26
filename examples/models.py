# The networks of the examples, as their papers have them: ResNets for small images (He et al. 2016: ResNet-56), Wide
# ResNets (Zagoruyko and Komodakis 2016: WRN-28-10) and vision transformers (Dosovitskiy et al. 2021: ViT-S/32).
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv3x3(cin: int, cout: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, 3, stride, 1, bias=False)


def initialized(model: nn.Module) -> nn.Module:
    """He's initialization of convolutions, by what goes out."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


# ---- residual networks


class Block(nn.Module):
    """Norm after each convolution; a shortcut without parameters: every other pixel, zeros for new channels."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(cin, cout, stride), nn.BatchNorm2d(cout)
        self.conv2, self.bn2 = conv3x3(cout, cout), nn.BatchNorm2d(cout)
        self.stride, self.more = stride, cout - cin

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        x = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(x, (0, 0, 0, 0, self.more // 2, self.more - self.more // 2)))


class ResNet(nn.Module):
    def __init__(self, blocks: int, widths: tuple[int, ...], classes: int, channels: int = 3) -> None:
        super().__init__()
        self.stem, self.bn = conv3x3(channels, widths[0]), nn.BatchNorm2d(widths[0])
        stages: list[nn.Module] = []
        cin = widths[0]
        for number, width in enumerate(widths):
            for block in range(blocks):
                stages.append(Block(cin, width, 2 if number and not block else 1))
                cin = width
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(cin, classes)
        initialized(self)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(F.relu(self.bn(self.stem(x))))
        return self.head(y.mean((2, 3)))  # type: ignore[no-any-return]


def resnet56(classes: int = 100) -> nn.Module:
    """For 3 x 32 x 32 images: 0.86 million parameters, of which 4,064 in norm layers."""
    return ResNet(9, (16, 32, 64), classes)


# ---- wide residual networks


class WideBlock(nn.Module):
    """Norm before each convolution. Where the width changes, the shortcut is a convolution of the normed input."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(cin), conv3x3(cin, cout, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(cout), conv3x3(cout, cout)
        self.short = None if cin == cout else nn.Conv2d(cin, cout, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        short = x if self.short is None else self.short(y)
        return short + self.conv2(F.relu(self.bn2(self.conv1(y))))  # type: ignore[no-any-return]


class WideResNet(nn.Module):
    def __init__(self, depth: int, widen: int, classes: int) -> None:
        super().__init__()
        if (depth - 4) % 6:
            raise ValueError(f"WideResNet: depth must be 4 more than a multiple of 6; got depth={depth}")
        self.stem = conv3x3(3, 16)
        stages: list[nn.Module] = []
        cin = 16
        for number, width in enumerate((16 * widen, 32 * widen, 64 * widen)):
            for block in range((depth - 4) // 6):
                stages.append(WideBlock(cin, width, 2 if number and not block else 1))
                cin = width
        self.blocks, self.bn = nn.Sequential(*stages), nn.BatchNorm2d(cin)
        self.head = nn.Linear(cin, classes)
        initialized(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.bn(self.blocks(self.stem(x)))).mean((2, 3)))  # type: ignore[no-any-return]


def wrn_28_10(classes: int = 100) -> nn.Module:
    """For 3 x 32 x 32 images: 36.5 million parameters, of which 17,952 in norm layers."""
    return WideResNet(28, 10, classes)


# ---- vision transformers


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))  # type: ignore[no-any-return]


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.attention = nn.LayerNorm(width, eps=1e-6), Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class ViT(nn.Module):
    def __init__(
        self, size: int, patch: int, width: int, depth: int, heads: int, classes: int, channels: int = 3
    ) -> None:
        super().__init__()
        if size % patch:
            raise ValueError(f"ViT: patch must divide size; got patch={patch} and size={size}")
        self.embed = nn.Conv2d(channels, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2 + 1, width))
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(depth)))
        self.ln, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x).flatten(2).transpose(1, 2)
        y = torch.cat((self.token.expand(len(y), -1, -1), y), 1) + self.position
        return self.head(self.ln(self.layers(y))[:, 0])  # type: ignore[no-any-return]


def vit_s_32(classes: int = 1000) -> nn.Module:
    """For 3 x 224 x 224 images: 22.9 million parameters, of which 19,200 in norm layers."""
    return ViT(224, 32, 384, 12, 6, classes)
