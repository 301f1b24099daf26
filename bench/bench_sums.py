# add_layer_norm and add_rms_norm against torch's two calls, x + residual and the norm of that: forward, and backward
# with a gradient for both results.
#   python bench/bench_sums.py [--quick] [--device cuda] [--threads 1] [--csv FILE]
#
# Rivals in turn, so that a busy machine slows both; a ratio is the median of the rounds' own ratios.
from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import normkern
from normkern.bench.race import keep_memory
from normkern.bench.sheet import Row, Sheet, device_name
from normkern.measure import interleaved

Results = tuple[Tensor, Tensor]
SHAPES = ((256, 768), (4096, 768), (16384, 1000))


def two_calls(x: Tensor, residual: Tensor, shape: tuple[int, ...], weight: Tensor, second: bool) -> Results:
    total = x + residual
    return (F.rms_norm(total, shape, weight) if second else F.layer_norm(total, shape, weight)), total


def one_call(x: Tensor, residual: Tensor, shape: tuple[int, ...], weight: Tensor, second: bool) -> Results:
    return (normkern.add_rms_norm if second else normkern.add_layer_norm)(x, residual, shape, weight)


Step = Callable[[], object]


def steps_of(
    norm: Callable[..., Results], second: bool, rows: int, width: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Step]:
    x, residual, dy, dtotal = (torch.randn(rows, width, dtype=dtype, device=device) for _ in range(4))
    leaves = [x.requires_grad_(), residual.requires_grad_(), torch.ones_like(x[0]).requires_grad_()]

    def forward() -> Results:
        return norm(x, residual, (width,), leaves[2], second)

    made = forward()
    return {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(made, leaves, (dy, dtotal), retain_graph=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="add_layer_norm and add_rms_norm against torch's two calls")
    parser.add_argument("--quick", action="store_true", help="two shapes, few rounds")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_memory()
    sheet, device = Sheet(options.csv), torch.device(options.device)
    shapes = SHAPES[:2] if options.quick else SHAPES
    for (rows, width), dtype, second in itertools.product(shapes, (torch.float32, torch.bfloat16), (False, True)):
        op, dtype_name = "add_rms_norm" if second else "add_layer_norm", str(dtype).removeprefix("torch.")
        steps = {
            name: steps_of(norm, second, rows, width, dtype, device)
            for name, norm in (("torch", two_calls), ("normkern", one_call))
        }
        for mode in ("forward", "backward"):
            calls = {name: modes[mode] for name, modes in steps.items()}
            times = interleaved(calls, device, 10 if options.quick else 100, limit=5)
            ratio = 1.0
            for provider, taken in times.items():
                ratio = statistics.median(a / b for a, b in zip(times["torch"].seconds, taken.seconds, strict=True))
                quantiles = (taken.quantile(q) * 1e3 for q in (0.2, 0.5, 0.8))
                sheet.add(
                    Row(op, provider, mode, "ms", "shape", f"{rows}x{width}", *quantiles, dtype=dtype_name,
                        ratio_to_torch=ratio, device=device_name(device))
                )  # fmt: skip
            print(f"{op:15} {rows}x{width:<6} {dtype_name:9} {mode:9} {ratio:.2f} times torch's speed", flush=True)


if __name__ == "__main__":
    main()
