# What this machine's memory gives a plain copy, by size: the ceiling that every norm is held against.
#   python bench/copy_ceiling.py [--device cuda] [--csv FILE]
from __future__ import annotations

import argparse
from pathlib import Path

import torch

from normkern.bench.sheet import Row, Sheet, device_name
from normkern.measure import interleaved


def measure(device: torch.device, megabytes: int) -> list[Row]:
    numel = megabytes * 2**20 // 4
    source = torch.randn(numel, device=device)
    target = torch.empty_like(source)
    calls = {"copy": lambda: target.copy_(source), "fill": lambda: target.fill_(1.0), "sum": source.sum}
    moved = {"copy": 8 * numel, "fill": 4 * numel, "sum": 4 * numel}
    rows = []
    for name, times in interleaved(calls, device, rounds=15).items():
        rate = [moved[name] / times.quantile(q) / 1e9 for q in (0.8, 0.5, 0.2)]
        rows.append(
            Row(name, "torch", "forward", "gb_per_second", "megabytes", str(megabytes), *rate, bytes=moved[name])
        )
        rows[-1].dtype, rows[-1].layout, rows[-1].device = "float32", "contiguous", device_name(device)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="memory rates of plain copies, by size")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    sizes = (1, 4, 16, 64, 256, 1024) if device.type == "cuda" else (1, 4, 16, 64, 256)
    rows = [row for megabytes in sizes for row in measure(device, megabytes)]
    for row in rows:
        print(f"{row.kernel_name:>5} {row.x_value:>5} MB {row.y_50:8.1f} GB/s")
    sheet = Sheet(arguments.csv)
    for row in rows:
        sheet.add(row)


if __name__ == "__main__":
    main()
