# The layers that are benchmarked: real ones, as cases of tests/cases.py. The table there is made of sizes that break
# kernels, which are too small to time; `--table` benches those as well, and shows the cost of a call.
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cases import NORMS, SHAPES, Case

# (where the layer comes from, case); batch sizes are those of one step on 2 CPU cores, `many` times that on a GPU.
REAL = (
    ("resnet50 stem", Case("batch", (4, 64, 112, 112))),
    ("resnet50 stage 1", Case("batch", (8, 64, 56, 56))),
    ("resnet50 stage 1 out", Case("batch", (2, 256, 56, 56))),
    ("resnet50 stage 3", Case("batch", (16, 256, 14, 14))),
    ("resnet50 stage 4 out", Case("batch", (16, 2048, 7, 7))),
    ("sd unet 64x64", Case("group", (2, 320, 64, 64), groups=32)),
    ("sd unet 32x32", Case("group", (2, 640, 32, 32), groups=32)),
    ("sd unet 8x8", Case("group", (2, 1280, 8, 8), groups=32)),
    ("sd vae 128x128", Case("group", (1, 128, 128, 128), groups=32)),
    ("vit-b/16", Case("layer", (16, 197, 768))),
    ("gpt2", Case("layer", (4, 1024, 768))),
    ("swin stage 1", Case("layer", (2, 3136, 96))),
    ("odd width", Case("layer", (1024, 2049))),
    ("llama 7b", Case("rms", (1, 512, 4096))),
    ("qk norm", Case("rms", (1, 512, 32, 128))),
    ("style transfer", Case("instance", (2, 64, 128, 128))),
    ("nnu-net", Case("instance", (1, 32, 32, 64, 64))),
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
LAYOUTS = {"layer": ("contiguous", "transposed"), "rms": ("contiguous", "transposed")}
MANY = 16

# Every norm, small and large, in both layouts (layer and rms: narrow and wide rows): 24 cases for each dtype.
IMAGES = {
    "small": {"batch": (8, 256, 14, 14), "group": (2, 1280, 8, 8), "instance": (2, 128, 32, 32)},
    "large": {"batch": (16, 64, 112, 112), "group": (4, 320, 64, 64), "instance": (2, 64, 256, 256)},
}
ROWS = {"small": ((512, 256), (32, 4096)), "large": ((65536, 256), (4096, 4096))}
# What torch computes in two or three calls.
FUSED = (
    ("resnet50 stage 1", Case("batch", (8, 64, 56, 56), act="relu")),
    ("resnet50 stage 1 out", Case("batch", (4, 256, 56, 56), act="relu", residual="like")),
    ("resnet50 eval", Case("batch", (8, 64, 56, 56), act="relu", residual="like", training=False)),
    ("sd unet 64x64", Case("group", (2, 320, 64, 64), groups=32, act="silu")),
    ("style transfer", Case("instance", (2, 64, 128, 128), act="leaky_relu")),
    ("vit-b/16", Case("layer", (16, 197, 768), residual="like", act="gelu")),
)


def grid(dtypes: tuple[str, ...]) -> Iterator[tuple[str, Case]]:
    for dtype in dtypes:
        for size, shapes in IMAGES.items():
            cases = [Case("batch", shapes["batch"], training=training) for training in (True, False)]
            cases += [Case("group", shapes["group"], groups=32), Case("instance", shapes["instance"])]
            for case in cases:
                for layout in ("contiguous", "channels_last"):
                    yield size, replace(case, layout=layout, dtype=dtype)
            for shape in ROWS[size]:
                yield size, Case("layer", shape, dtype=dtype)
                yield size, Case("rms", shape, dtype=dtype, params="w")


def fused(dtypes: tuple[str, ...]) -> Iterator[tuple[str, Case]]:
    for dtype in dtypes:
        for name, case in FUSED:
            for layout in ("contiguous", "channels_last") if len(case.shape) == 4 else ("contiguous",):
                yield name, replace(case, layout=layout, dtype=dtype)


def layers(quick: bool, on_gpu: bool, dtypes: tuple[str, ...], table: bool) -> Iterator[tuple[str, Case]]:
    chosen = [(name, case) for name, case in REAL if not quick or name in QUICK]
    if table:
        for norm, shapes in ((norm, SHAPES[norm]) for norm in NORMS):
            option = "groups" if norm == "group" else "dims"
            chosen += [("table", replace(Case(norm, shape), **{option: value})) for shape, value in shapes]
    for name, case in chosen:
        shape = case.shape
        if on_gpu and name != "table":
            shape = (shape[0] * MANY, *shape[1:])
        for layout in LAYOUTS.get(case.norm, ("contiguous", "channels_last")):
            if layout == "channels_last" and len(shape) < 3:
                continue
            params = "w" if case.norm == "rms" else "wb"
            for dtype in dtypes:
                yield name, replace(case, shape=shape, layout=layout, dtype=dtype, params=params)
