# What a file of bench_norms.py says in a few lines: normkern against torch, norm by norm, as a Markdown table.
#   python bench/summary.py bench/results/cpu/grid_2_threads.csv
from __future__ import annotations

import csv
import math
import sys
from collections import defaultdict
from pathlib import Path


def line(name: str, rows: list[dict[str, str]]) -> str:
    ratios = [float(row["ratio_to_torch"]) for row in rows]
    copies = [float(row["fraction_of_copy"]) for row in rows]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    slower = sum(ratio < 1 for ratio in ratios)
    return (
        f"| {name} | {len(rows)} | {mean:.2f} | {min(ratios):.2f} – {max(ratios):.2f} | {slower} "
        f"| {min(copies):.2f} – {max(copies):.2f} |"
    )


def main() -> None:
    with Path(sys.argv[1]).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kernel_provider"] == "normkern"]
    groups: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        groups[f"{row['kernel_name']}, {row['dtype']}"].append(row)
    print("| norm | rows | times torch's speed, geometric mean | from – to | rows below 1 | fraction of a copy |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, of in groups.items():
        print(line(name, of))
    print(line("all", rows))


if __name__ == "__main__":
    main()
