"""layers.py: what is benchmarked: layers of real networks, each a norm, a shape and a layout, and their tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "leaky_relu": F.leaky_relu,
}
LAYOUTS = {
    "batch_norm": ("contiguous", "channels_last"),
    "group_norm": ("contiguous", "channels_last"),
    "instance_norm": ("contiguous", "channels_last"),
    "layer_norm": ("contiguous", "transposed"),
    "rms_norm": ("contiguous", "transposed"),
}
OPS = tuple(LAYOUTS)
MOMENTUM, EPS = 0.1, 1e-5


@dataclass(frozen=True)
class Layer:
    """One norm on one kind of tensor. `layout` names the order in memory: contiguous, channels_last, or transposed (the
    last two dimensions swapped). Layer and RMS norm normalize the last `dims` dimensions."""

    op: str
    shape: tuple[int, ...]
    groups: int = 1
    dims: int = 1
    layout: str = "contiguous"
    dtype: str = "float32"
    act: str | None = None
    residual: bool = False
    training: bool = True

    @property
    def name(self) -> str:
        extras = ["" if self.training else "eval", "add" if self.residual else "", self.act or ""]
        return "+".join([self.op, *filter(None, extras)])

    @property
    def size(self) -> str:
        groups = f"/{self.groups}" if self.op == "group_norm" else ""
        return "x".join(map(str, self.shape)) + groups

    def __str__(self) -> str:
        return f"{self.name} {self.size} {self.layout} {self.dtype}"

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        return self.shape[-self.dims :] if self.op in ("layer_norm", "rms_norm") else self.shape[1:2]

    @property
    def memory_order(self) -> list[int]:
        """Dimensions from the outermost in memory to the innermost."""
        order = list(range(len(self.shape)))
        if self.layout == "channels_last":
            return [0, *order[2:], 1]
        return order[:-2] + order[:-3:-1] if self.layout == "transposed" else order


@dataclass
class Tensors:
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    dy: Tensor

    def leaves(self) -> list[Tensor]:
        return [t for t in (self.x, self.weight, self.bias, self.residual) if t is not None]


def tensors(layer: Layer, device: torch.device) -> Tensors:
    """Standard normal tensors in the layer's layout, drawn on the device; the same ones every time."""
    generator = torch.Generator(device).manual_seed(0)
    order = layer.memory_order
    dtype = getattr(torch, layer.dtype)

    def normal() -> Tensor:
        sizes = [layer.shape[dim] for dim in order]
        values = torch.randn(sizes, generator=generator, device=device, dtype=torch.float32).to(dtype)
        return values.permute([order.index(dim) for dim in range(len(order))])

    def parameter(start: float) -> Tensor:
        values = torch.randn(layer.parameter_shape, generator=generator, device=device) / 2 + start
        return values.to(dtype)

    tracked = layer.op == "batch_norm"
    return Tensors(
        normal(),
        parameter(1),
        None if layer.op == "rms_norm" else parameter(0),
        normal() if layer.residual else None,
        parameter(0) if tracked else None,
        parameter(1).square() if tracked else None,
        normal(),
    )


def call(functions: Any, layer: Layer, t: Tensors, fused: bool) -> Tensor:
    """The layer through torch's functions or those of the same names; `fused`: they take residual= and act=."""
    extra = {"residual": t.residual, "act": layer.act} if fused else {}
    width = layer.parameter_shape
    y: Tensor
    if layer.op == "batch_norm":
        mean, var = t.running_mean, t.running_var
        y = functions.batch_norm(t.x, mean, var, t.weight, t.bias, layer.training, MOMENTUM, EPS, **extra)
    elif layer.op == "instance_norm":
        y = functions.instance_norm(t.x, None, None, t.weight, t.bias, eps=EPS, **extra)
    elif layer.op == "group_norm":
        y = functions.group_norm(t.x, layer.groups, t.weight, t.bias, EPS, **extra)
    elif layer.op == "layer_norm":
        y = functions.layer_norm(t.x, width, t.weight, t.bias, EPS, **extra)
    else:
        y = functions.rms_norm(t.x, width, t.weight, EPS, **extra)
    return y if fused else finish(layer, t, y)


def finish(layer: Layer, t: Tensors, y: Tensor) -> Tensor:
    """Residual and activation by torch, for who does not take them along."""
    if t.residual is not None:
        y = y + t.residual
    return y if layer.act is None else ACTIVATIONS[layer.act](y)


# (where the layer comes from, layer); batch sizes are those of one step on 2 CPU cores, MANY times that on a GPU.
REAL = (
    ("resnet50 stem", Layer("batch_norm", (4, 64, 112, 112))),
    ("resnet50 stage 1", Layer("batch_norm", (8, 64, 56, 56))),
    ("resnet50 stage 1 out", Layer("batch_norm", (2, 256, 56, 56))),
    ("resnet50 stage 3", Layer("batch_norm", (16, 256, 14, 14))),
    ("resnet50 stage 4 out", Layer("batch_norm", (16, 2048, 7, 7))),
    ("sd unet 64x64", Layer("group_norm", (2, 320, 64, 64), groups=32)),
    ("sd unet 32x32", Layer("group_norm", (2, 640, 32, 32), groups=32)),
    ("sd unet 8x8", Layer("group_norm", (2, 1280, 8, 8), groups=32)),
    ("sd vae 128x128", Layer("group_norm", (1, 128, 128, 128), groups=32)),
    ("vit-b/16", Layer("layer_norm", (16, 197, 768))),
    ("gpt2", Layer("layer_norm", (4, 1024, 768))),
    ("swin stage 1", Layer("layer_norm", (2, 3136, 96))),
    ("odd width", Layer("layer_norm", (1024, 2049))),
    ("llama 7b", Layer("rms_norm", (1, 512, 4096))),
    ("qk norm", Layer("rms_norm", (1, 512, 32, 128))),
    ("style transfer", Layer("instance_norm", (2, 64, 128, 128))),
    ("nnu-net", Layer("instance_norm", (1, 32, 32, 64, 64))),
)
QUICK = (
    "resnet50 stage 1",
    "resnet50 stage 3",
    "sd unet 64x64",
    "sd unet 8x8",
    "vit-b/16",
    "llama 7b",
    "style transfer",
)
MANY = 16

# Every norm, small and large, in both layouts (layer and rms: narrow and wide rows): 24 layers for each dtype.
IMAGES = {
    "small": {"batch_norm": (8, 256, 14, 14), "group_norm": (2, 1280, 8, 8), "instance_norm": (2, 128, 32, 32)},
    "large": {"batch_norm": (16, 64, 112, 112), "group_norm": (4, 320, 64, 64), "instance_norm": (2, 64, 256, 256)},
}
ROWS = {"small": ((512, 256), (32, 4096)), "large": ((65536, 256), (4096, 4096))}
# What torch computes in two or three calls.
FUSED = (
    ("resnet50 stage 1", Layer("batch_norm", (8, 64, 56, 56), act="relu")),
    ("resnet50 stage 1 out", Layer("batch_norm", (4, 256, 56, 56), act="relu", residual=True)),
    ("resnet50 eval", Layer("batch_norm", (8, 64, 56, 56), act="relu", residual=True, training=False)),
    ("sd unet 64x64", Layer("group_norm", (2, 320, 64, 64), groups=32, act="silu")),
    ("style transfer", Layer("instance_norm", (2, 64, 128, 128), act="leaky_relu")),
    ("vit-b/16", Layer("layer_norm", (16, 197, 768), residual=True, act="gelu")),
)


def everything(dtypes: tuple[str, ...]) -> Iterator[tuple[str, Layer]]:
    for dtype in dtypes:
        for size, shapes in IMAGES.items():
            images = [Layer("batch_norm", shapes["batch_norm"], training=training) for training in (True, False)]
            images.append(Layer("group_norm", shapes["group_norm"], groups=32))
            images.append(Layer("instance_norm", shapes["instance_norm"]))
            for layer in images:
                for layout in LAYOUTS[layer.op]:
                    yield size, replace(layer, layout=layout, dtype=dtype)
            for shape in ROWS[size]:
                yield size, Layer("layer_norm", shape, dtype=dtype)
                yield size, Layer("rms_norm", shape, dtype=dtype)


def fused(dtypes: tuple[str, ...]) -> Iterator[tuple[str, Layer]]:
    for dtype in dtypes:
        for name, layer in FUSED:
            for layout in ("contiguous", "channels_last") if len(layer.shape) == 4 else ("contiguous",):
                yield name, replace(layer, layout=layout, dtype=dtype)


def real(quick: bool, on_gpu: bool, dtypes: tuple[str, ...]) -> Iterator[tuple[str, Layer]]:
    """Layers of networks, each in two layouts; `quick`: seven of them."""
    for name, layer in REAL:
        if quick and name not in QUICK:
            continue
        many = MANY if on_gpu else 1
        shape = (layer.shape[0] * many, *layer.shape[1:])
        for layout in LAYOUTS[layer.op]:
            for dtype in dtypes:
                yield name, replace(layer, shape=shape, layout=layout, dtype=dtype)
