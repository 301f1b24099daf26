# Every layer of normkern/bench/layers.py, forward and backward, normkern against its peers and against a plain copy.
#
# pytest-benchmark drives the rounds and keeps normkern's times (so --benchmark-compare works as usual); in each round
# the rivals run once each, in turn. Its clock is ours: it advances by what the device measured for normkern alone.
from __future__ import annotations

from typing import Any

import pytest
import torch

from normkern.bench.layers import Layer
from normkern.bench.peers import peers
from normkern.bench.race import Race
from normkern.bench.sheet import Sheet

SECONDS = 0.4  # what the rounds of one test may take


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()


@pytest.mark.benchmark(timer=CLOCK)
def test_norm(layer: Layer, mode: str, replays: bool, benchmark: Any, device: torch.device, sheet: Sheet) -> None:
    race = Race(layer, mode, peers(layer, device), device, replays)

    def one_round() -> None:
        CLOCK.now += race.round()["normkern"]

    benchmark.group = f"{layer.op} {mode}{' from a CUDA graph' if replays else ''}"
    benchmark.pedantic(one_round, rounds=race.rounds(SECONDS))
    rows = {row.kernel_provider: row for row in race.rows()}
    for row in rows.values():
        sheet.add(row)
    ours = rows["normkern"]
    benchmark.extra_info.update(
        bytes=race.moved,
        gb_per_second=round(race.moved / ours.y_50 / 1e6, 2),
        fraction_of_copy=round(float(ours.fraction_of_copy), 3),
        ratio_to_torch=round(float(ours.ratio_to_torch), 3),
    )
