# What a file of bench_norms.py says in a few lines: normkern against torch, norm by norm, as a Markdown table.
#   python bench/summary.py bench/results/xeon/grid_2_threads.csv
from __future__ import annotations

import sys
from pathlib import Path

from normkern.bench.report import SUMMARY_HEAD, read, summary


def main() -> None:
    print(f"| {' | '.join(SUMMARY_HEAD)} |\n|---|{'---:|' * (len(SUMMARY_HEAD) - 1)}")
    for line in summary(read([Path(sys.argv[1])])):
        print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    main()
