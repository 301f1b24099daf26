# How the error against float64 grows with mean/std of the input, for torch and for normkern.
#   python bench/offset_error.py [--device cuda] [--csv FILE]
# bfloat16 has 8 bits: beyond mean/std of about 100 nothing but its own rounding is left of the deviations.
from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import normkern.functional
from normkern.bench.sheet import Row, Sheet, device_name
from normkern.measure import relative_error

OFFSETS = {"float32": (0, 10, 100, 1000, 10000), "bfloat16": (0, 10, 100)}
IMAGE, TOKENS = (4, 64, 56, 56), (8, 197, 768)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def call(functions: Any, norm: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    result: Tensor
    if norm == "batch_norm":
        result = functions.batch_norm(x, None, None, weight, bias, training=True)
    elif norm == "group_norm":
        result = functions.group_norm(x, 32, weight, bias)
    elif norm == "instance_norm":
        result = functions.instance_norm(x, None, None, weight, bias)
    else:
        result = functions.layer_norm(x, x.shape[-1:], weight, bias)
    return result


def results(functions: Any, norm: str, tensors: list[Tensor], dy: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    y = call(functions, norm, *leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def measure(norm: str, layout: str, dtype: str, offset: float, device: torch.device) -> list[Row]:
    shape = TOKENS if norm == "layer_norm" else IMAGE
    size = shape[-1] if norm == "layer_norm" else shape[1]
    g = torch.Generator().manual_seed(0)
    of_x = {"dtype": getattr(torch, dtype), "device": device}
    x = (torch.randn(shape, generator=g, dtype=torch.float64) + offset).to(**of_x)
    dy = torch.randn(shape, generator=g).to(**of_x)
    weight, bias = (1 + torch.randn(size, generator=g) / 2).to(**of_x), torch.randn(size, generator=g).to(**of_x)
    # The reference sees the same rounded input, contiguous: torch's float64 cancels in channels_last as well.
    exact = results(F, norm, [t.double() for t in (x, weight, bias)], dy.double())
    x, dy = (t.contiguous(memory_format=LAYOUTS[layout]) for t in (x, dy)) if x.dim() == 4 else (x, dy)
    rows = []
    for name, functions in (("torch", F), ("normkern", normkern.functional)):
        got = results(functions, norm, [x, weight, bias], dy)
        for what, a, b in zip(("output", "dx", "dweight", "dbias"), got, exact, strict=True):
            error = relative_error(a, b)
            mode = "forward" if what == "output" else "backward"
            rows.append(Row(norm, name, mode, f"relative_error_{what}", "mean/std", f"{offset:g}", error, error, error))
            rows[-1].dtype, rows[-1].layout, rows[-1].device = dtype, layout, device_name(device)
    return rows


def show(rows: list[Row], metric: str) -> None:
    """Markdown tables of one metric."""
    for dtype, offsets in OFFSETS.items():
        found = {
            (row.kernel_name, row.layout, row.kernel_provider, row.x_value): row.y_50
            for row in rows
            if row.metric == metric and row.dtype == dtype
        }
        columns = " | ".join(f"mean/std {offset}" for offset in offsets)
        print(f"\n{metric}, {dtype}\n| norm, layout | library | {columns} |")
        print("|---|---" + "|---:" * len(offsets) + "|")
        for norm, layout, provider in dict.fromkeys(key[:3] for key in found):
            errors = [f"{found[norm, layout, provider, str(offset)]:.1e}" for offset in offsets]
            print(f"| {norm}, {layout} | {provider} | " + " | ".join(errors) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description="error against float64 by mean/std of the input")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    cases = [(norm, layout) for norm in ("batch_norm", "group_norm", "instance_norm") for layout in LAYOUTS]
    cases.append(("layer_norm", "contiguous"))
    device = torch.device(arguments.device)
    rows = [
        row
        for case in cases
        for dtype, offsets in OFFSETS.items()
        for offset in offsets
        for row in measure(*case, dtype, offset, device)
    ]
    for metric in ("relative_error_output", "relative_error_dx", "relative_error_dweight"):
        show(rows, metric)
    sheet = Sheet(arguments.csv)
    for row in rows:
        sheet.add(row)


if __name__ == "__main__":
    main()
