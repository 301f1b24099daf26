# What a call costs where there is nothing to compute: a float32 tensor of 1 KB on the CPU, against torch's own function
# and module. The rivals take turns in short batches; CPU time of this process, so other processes disturb little.
#   python bench/bench_overhead.py [--csv FILE] [--check]
from __future__ import annotations

import argparse
import sys
import time
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import normkern.functional
import normkern.nn
from normkern.bench.sheet import Row, Sheet, device_name

IMAGE, TOKENS = (2, 8, 4, 4), (4, 64)
CHANNELS, GROUPS, WIDTH = 8, 4, 64
LIMIT = 2.0  # times torch's
Call = Callable[[], Any]


def functions(of: Any, image: Tensor, tokens: Tensor, by_channel: list[Tensor], by_width: list[Tensor]) -> Any:
    mean, var = torch.zeros(CHANNELS), torch.ones(CHANNELS)
    weight, bias = by_channel
    wide_weight, wide_bias = by_width
    return {
        "layer_norm": lambda: of.layer_norm(tokens, (WIDTH,), wide_weight, wide_bias),
        "rms_norm": lambda: of.rms_norm(tokens, (WIDTH,), wide_weight),
        "group_norm": lambda: of.group_norm(image, GROUPS, weight, bias),
        "batch_norm train": lambda: of.batch_norm(image, mean, var, weight, bias, True),
        "batch_norm eval": lambda: of.batch_norm(image, mean, var, weight, bias, False),
        "instance_norm": lambda: of.instance_norm(image, None, None, weight, bias),
        "instance_norm tracked": lambda: of.instance_norm(image, mean, var, weight, bias),
    }


def modules(of: Any, image: Tensor, tokens: Tensor) -> Any:
    evaluated = of.BatchNorm2d(CHANNELS).eval()
    made = {
        "LayerNorm": (of.LayerNorm(WIDTH), tokens),
        "RMSNorm": (of.RMSNorm(WIDTH), tokens),
        "GroupNorm": (of.GroupNorm(GROUPS, CHANNELS), image),
        "BatchNorm2d train": (of.BatchNorm2d(CHANNELS), image),
        "BatchNorm2d eval": (evaluated, image),
        "InstanceNorm2d": (of.InstanceNorm2d(CHANNELS, affine=True), image),
    }
    return {name: (lambda m=module, x=x: m(x)) for name, (module, x) in made.items()}


def rivals(grad: bool) -> Iterator[tuple[str, Call, Call]]:
    """Name, torch's call, ours. Without `grad` they are made under no_grad."""
    g = torch.Generator().manual_seed(0)
    image, tokens = (torch.randn(shape, generator=g).requires_grad_(grad) for shape in (IMAGE, TOKENS))
    pairs = [[torch.randn(n, generator=g).requires_grad_(grad) for _ in range(2)] for n in (CHANNELS, WIDTH)]
    for make in (lambda of: functions(of[0], image, tokens, *pairs), lambda of: modules(of[1], image, tokens)):
        torchs, ours = make((F, torch.nn)), make((normkern.functional, normkern.nn))
        for name in torchs:
            yield name, torchs[name], ours[name]


def batches(calls: list[Call], rounds: int, size: int) -> list[list[float]]:
    """Microseconds of a call of each rival, round by round."""
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, times in zip(calls, taken, strict=True):
            times.append(timeit.timeit(call, number=size, timer=time.process_time) / size * 1e6)
    return [sorted(times) for times in taken]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--check", action="store_true", help=f"fail where a call takes over {LIMIT} times torch's")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sheet = Sheet(options.csv)
    device = device_name(torch.device("cpu"))
    over = []
    print(f"{'call on 1 KB':24}{'':10}{'torch us':>10}{'normkern us':>13}{'ratio':>8}")
    for grad in (False, True):
        for name, theirs, ours in rivals(grad):
            with torch.set_grad_enabled(grad):
                for call in (theirs, ours, ours):
                    call()
                taken = batches([theirs, ours], options.rounds, 200)
            ratio = taken[1][0] / taken[0][0]
            print(f"{name:24}{'grad' if grad else 'no grad':10}{taken[0][0]:10.2f}{taken[1][0]:13.2f}{ratio:8.2f}")
            if ratio > LIMIT:
                over.append(name)
            for provider, times in zip(("torch", "normkern"), taken, strict=True):
                at = [times[round(q * (len(times) - 1))] for q in (0.2, 0.5, 0.8)]
                mode = "forward with grad" if grad else "forward"
                x_name, to_torch = "least_us", taken[0][0] / times[0]
                row = Row(name, provider, mode, "overhead_us", x_name, f"{times[0]:.2f}", *at, ratio_to_torch=to_torch)
                row.dtype, row.layout, row.device = "float32", "contiguous", device
                sheet.add(row)
    if options.check and over:
        sys.exit(f"over {LIMIT} times torch's: {', '.join(over)}")


if __name__ == "__main__":
    main()
