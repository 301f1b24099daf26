# Which strategy is fastest, by size and number of groups: the thresholds that csrc/core/plan.h should have on this GPU.
#   python bench/sweep_strategies.py [--device cuda] [--csv FILE] [--quick]
from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import torch

import normkern
from normkern.bench.sheet import Row, Sheet, device_name
from normkern.measure import interleaved

STRATEGIES = ("warp", "block", "cluster", "subgrid", "split", "")  # "": the plan's own choice
KILOBYTES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)  # of a group, in bfloat16


def shapes(quick: bool) -> list[tuple[str, tuple[int, ...], int]]:
    """(layout, shape, groups): groups of every size, few and many of them, up to 128 MB in all."""
    found = []
    for kilobytes in KILOBYTES[::4] if quick else KILOBYTES:
        for groups in (32, 512, 8192):
            positions = kilobytes * 1024 // 2 // 8  # 8 channels to a group
            if 2**20 <= kilobytes * 1024 * groups <= (2**22 if quick else 2**27):
                shape = (groups // 32, 256, positions)
                found += [("contiguous", shape, 32), ("channels_last", shape, 32)]
    return found


def calls(
    layout: str, shape: tuple[int, ...], groups: int, device: torch.device, backward: bool
) -> dict[str, Callable[[], object]]:
    n, c, s = shape
    x = torch.randn(n, s, c, device=device).bfloat16().transpose(1, 2)
    if layout == "contiguous":
        x = x.contiguous()
    x.requires_grad_(backward)
    weight = torch.ones(c, device=device, requires_grad=backward)
    y = normkern.group_norm(x, groups, weight, weight)
    dy = torch.randn_like(y)

    def with_strategy(name: str) -> Callable[[], object]:
        def call() -> object:
            os.environ["NORMKERN_STRATEGY"] = name
            if backward:
                return torch.autograd.grad(y, (x, weight), dy, retain_graph=True)
            return normkern.group_norm(x, groups, weight, weight)

        return call

    return {name or "automatic": with_strategy(name) for name in STRATEGIES}


def main() -> None:
    parser = argparse.ArgumentParser(description="the fastest strategy by size and number of groups")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    sheet = Sheet(arguments.csv)
    for backward in (False, True):
        mode = "backward" if backward else "forward"
        print(f"{mode}: kB of a group, groups, layout: fastest strategy (times slower: the others)")
        for layout, shape, groups in shapes(arguments.quick):
            times = interleaved(calls(layout, shape, groups, device, backward), device, rounds=9, limit=3)
            size = shape[1] // groups * shape[2] * 2
            for name, rounds in times.items():
                rate = [rounds.quantile(q) * 1e3 for q in (0.2, 0.5, 0.8)]
                moved = (3 if backward else 2) * 2 * shape[0] * shape[1] * shape[2]
                row = Row(f"group {name}", "normkern", mode, "speed_ms", "shape", str(shape), *rate, bytes=moved)
                row.dtype, row.layout, row.device = "bfloat16", layout, device_name(device)
                sheet.add(row)
            ranked = sorted(times, key=lambda name: times[name].median)
            best = times[ranked[0]].median
            rest = ", ".join(f"{name} {times[name].median / best:.2f}" for name in ranked[1:])
            print(f"{size // 1024:6} {shape[0] * groups:6} {layout:13}: {ranked[0]} ({rest})", flush=True)
    os.environ.pop("NORMKERN_STRATEGY", None)


if __name__ == "__main__":
    main()
