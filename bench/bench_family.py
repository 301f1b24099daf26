# The norms of "Beyond BatchNorm" on ResNet-50's maps, and the normalization of all its kernels: a training step
# (forward and backward) of normkern, of the formula in torch's operators, and of timm's modules where it is installed.
#   python bench/bench_family.py [--quick] [--threads 1] [--csv FILE]
#
# One thread and process CPU time by default, rivals in turn; a ratio is the median of the rounds' own ratios, so that a
# busy machine changes little.
from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import normkern
from normkern.bench.race import keep_memory
from normkern.bench.sheet import Row, Sheet, device_name

Step = Callable[[], object]
EPS = 1e-5
MAPS = ((8, 64, 56, 56), (8, 256, 28, 28), (8, 512, 14, 14), (8, 2048, 7, 7))


def timm_layers() -> Any:
    """timm's modules, or None. Its package imports torchvision, which may be built for another torch."""
    try:
        import timm.layers
    except ImportError:
        return None
    except RuntimeError:
        timm_layers.library = torch.library.Library("torchvision", "DEF")  # type: ignore[attr-defined]
        for name in ("nms(Tensor dets, Tensor scores, float iou_threshold)", "qnms(Tensor a, Tensor b, float c)"):
            timm_layers.library.define(f"{name} -> Tensor")  # type: ignore[attr-defined]
        import timm.layers
    return timm.layers


# ---- the formulas, as users write them


def over(p: Tensor) -> Tensor:
    return p.view(1, -1, 1, 1)


def frn(m: Any, x: Tensor) -> Tensor:
    z = x * (x.square().mean((2, 3), keepdim=True) + EPS).rsqrt() * over(m.weight) + over(m.bias)
    return torch.maximum(z, over(m.tau))


def s0(m: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    var = x.view(n, m.groups, -1).var(2, unbiased=False) if x.is_contiguous() else None
    if var is None:
        var = x.reshape(n, m.groups, c // m.groups, h, w).var((2, 3, 4), unbiased=False)
    std = (var + EPS).sqrt().repeat_interleave(c // m.groups, 1).view(n, c, 1, 1)
    return x * torch.sigmoid(over(m.v) * x) / std * over(m.weight) + over(m.bias)


def b0(m: Any, x: Tensor) -> Tensor:
    var = x.var((0, 2, 3), unbiased=False, keepdim=True)
    with torch.no_grad():
        m.running_var.lerp_(var.flatten(), 0.1)
    right = over(m.v) * x + (x.var((2, 3), unbiased=False, keepdim=True) + EPS).sqrt()
    return x / torch.maximum((var + EPS).sqrt(), right) * over(m.weight) + over(m.bias)


def vn(m: Any, x: Tensor) -> Tensor:
    var = x.var((0, 2, 3), unbiased=False, keepdim=True)
    with torch.no_grad():
        m.running_var.lerp_(var.flatten(), 0.1)
    return x / (var + EPS).sqrt() * over(m.weight) + over(m.bias)


def standardize(weight: Tensor, gain: Tensor) -> Tensor:
    var, mean = torch.var_mean(weight, (1, 2, 3), unbiased=False, keepdim=True)
    return (weight - mean) / (var + EPS).sqrt() * gain


def resnet50() -> list[tuple[int, int, int]]:
    """(out, in, side) of its 53 kernels."""
    kernels, cin = [(64, 3, 7)], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            kernels += [(width, cin, 1), (width, width, 3), (4 * width, width, 1)]
            if block == 0:
                kernels.append((4 * width, cin, 1))
            cin = 4 * width
    return kernels


# ---- timing


def rounds(steps: dict[str, Step], budget: float) -> dict[str, list[float]]:
    """Milliseconds of every step in every round; all steps take their turn in each."""
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    start = time.perf_counter()
    while time.perf_counter() - start < budget or len(times["normkern"]) < 5:
        for name, step in steps.items():
            begin = time.process_time()
            step()
            times[name].append((time.process_time() - begin) * 1e3)
    return times


def report(sheet: Sheet, norm: str, x_name: str, x_value: str, dtype: str, layout: str, times: Any) -> None:
    print(f"{norm:22} {x_value:16} {layout:14} {dtype:9}", end="")
    for provider, taken in times.items():
        ratio = statistics.median(torch_s / own for torch_s, own in zip(times["torch"], taken, strict=True))
        least, middle, most = (sorted(taken)[int(q * (len(taken) - 1))] for q in (0.2, 0.5, 0.8))
        sheet.add(
            Row(norm, provider, "step", "cpu_ms", x_name, x_value, least, middle, most, dtype=dtype, layout=layout,
                ratio_to_torch=ratio, device=device_name(torch.device("cpu")))
        )  # fmt: skip
        print(f"  {provider} {middle:.2f} ms ({ratio:.2f})", end="")
    if "timm" in times:
        ratios = [theirs / own for theirs, own in zip(times["timm"], times["normkern"], strict=True)]
        print(f"  {statistics.median(ratios):.2f} times timm's speed", end="")
    print(flush=True)


def on_maps(sheet: Sheet, timm: Any, quick: bool, dtypes: tuple[torch.dtype, ...]) -> None:
    rivals: dict[str, tuple[Callable[[int], nn.Module], Any, str]] = {
        "filter_response_norm": (normkern.nn.FilterResponseNorm2d, frn, "FilterResponseNormTlu2d"),
        "evo_norm_s0": (normkern.nn.EvoNorm2dS0, s0, "EvoNorm2dS0"),
        "evo_norm_b0": (normkern.nn.EvoNorm2dB0, b0, "EvoNorm2dB0"),
        "variance_norm": (normkern.nn.VarianceNorm2d, vn, ""),
    }
    for name, (kind, formula, in_timm) in rivals.items():
        for shape in MAPS[1:3] if quick else MAPS:
            for dtype in dtypes:
                for layout in (torch.contiguous_format, torch.channels_last):
                    ours = kind(shape[1]).to(dtype)
                    x = torch.randn(shape).to(dtype).to(memory_format=layout).requires_grad_()
                    dy = torch.randn(shape).to(dtype).to(memory_format=layout)

                    def step(
                        f: Callable[[Tensor], Tensor], leaves: list[Tensor], x: Tensor = x, dy: Tensor = dy
                    ) -> object:
                        return torch.autograd.grad(f(x), [x, *leaves], dy)

                    leaves = list(ours.parameters())
                    steps: dict[str, Step] = {
                        "normkern": lambda f=ours, own=leaves: step(f, own),
                        "torch": lambda f=formula, m=ours, own=leaves: step(functools.partial(f, m), own),
                    }
                    if timm is not None and in_timm:
                        theirs = getattr(timm, in_timm)(shape[1], eps=EPS).to(dtype)
                        steps["timm"] = lambda f=theirs: step(f, list(f.parameters()))
                    text = "x".join(map(str, shape))
                    place = "channels_last" if layout is torch.channels_last else "contiguous"
                    times = rounds(steps, 0.5 if quick else 1.5)
                    report(sheet, name, "shape", text, str(dtype).removeprefix("torch."), place, times)


def on_kernels(sheet: Sheet, quick: bool) -> None:
    """All kernels of ResNet-50, standardized with a gain, as timm's ScaledStdConv2d does it: one by one, and ours in
    one call."""
    weights = [torch.randn(o, i, k, k).requires_grad_() for o, i, k in resnet50()]
    gains = [torch.ones(w.shape[0], 1, 1, 1).requires_grad_() for w in weights]
    dys = [torch.randn_like(w) for w in weights]

    def backward(ys: list[Tensor]) -> object:
        return torch.autograd.grad(ys, [*weights, *gains], dys)

    def step(f: Callable[[Tensor, Tensor], Tensor]) -> object:
        return backward([f(w, g) for w, g in zip(weights, gains, strict=True)])

    def as_timm(w: Tensor, g: Tensor) -> Tensor:
        scale = w[0].numel() ** -0.5
        flat = w.reshape(1, w.shape[0], -1)
        y = nn.functional.batch_norm(flat, None, None, (g * scale).view(-1), training=True, momentum=0.0, eps=EPS)
        return y.reshape_as(w)

    ours: dict[str, Step] = {
        "weight_standardize_all": lambda: backward(normkern.weight_standardize_all(weights, gains, EPS, scaled=True)),
        "weight_standardize": lambda: step(lambda w, g: normkern.weight_standardize(w, g, EPS, scaled=True)),
    }
    for name, own in ours.items():
        steps: dict[str, Step] = {"normkern": own, "torch": lambda: step(standardize), "timm": lambda: step(as_timm)}
        times = rounds(steps, 2 if quick else 15)
        report(sheet, name, "network", "resnet50", "float32", "contiguous", times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="two maps, float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csv", type=Path, help="file for the long table of results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_memory()
    torch.manual_seed(0)
    sheet, timm = Sheet(options.csv), timm_layers()
    on_kernels(sheet, options.quick)
    on_maps(sheet, timm, options.quick, (torch.float32,) if options.quick else (torch.float32, torch.bfloat16))


if __name__ == "__main__":
    main()
