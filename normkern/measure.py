"""measure.py: how long calls take and how far results are from float64. The demo and bench/ share it.

Rivals are timed in turn, one call each, round after round: whatever slows the machine for a while slows all of them,
and their ratio holds. On a GPU every call starts with a cold L2 cache, as it does inside a network.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

Call = Callable[[], object]
Around = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Times:
    """Seconds of every round of one rival."""

    seconds: tuple[float, ...]

    def quantile(self, q: float) -> float:
        ordered = sorted(self.seconds)
        position = q * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (position - low)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Stopwatch:
    """Times single calls on one device: CUDA events and a flushed cache on a GPU, the clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flush: Tensor | None = None
        if device.type == "cuda":
            # Also long enough a memset to hide the launch of what follows: the events then time the kernels alone.
            l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
            self.flush = torch.empty(max(512 << 20, 4 * l2_bytes), dtype=torch.int8, device=device)

    def time(self, call: Call) -> float:
        """Seconds of one call."""
        if self.flush is None:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self.flush.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3

    def round(
        self, calls: Mapping[str, Call], number: int, around: Mapping[str, Around] | None = None
    ) -> dict[str, float]:
        """One call of every rival, within its context in `around`, which is not timed. The order rotates, since the
        first one finds the inputs in no cache."""
        names = list(calls)
        shift = number % len(names)
        taken = {}
        for name in names[shift:] + names[:shift]:
            with (around or {}).get(name, nullcontext)():
                taken[name] = self.time(calls[name])
        return taken


def interleaved(calls: Mapping[str, Call], device: torch.device, rounds: int, limit: float = 60) -> dict[str, Times]:
    """Time the rivals in turn, `rounds` calls each, or fewer (but five) where that takes over `limit` seconds."""
    watch = Stopwatch(device)
    for number in range(2):  # first calls load, allocate and compile
        watch.round(calls, number)
    start = time.perf_counter()
    samples: list[dict[str, float]] = []
    while len(samples) < rounds and (len(samples) < 5 or time.perf_counter() - start < limit):
        samples.append(watch.round(calls, len(samples)))
    return {name: Times(tuple(sample[name] for sample in samples)) for name in calls}


def largest_error(got: Tensor, exact: Tensor) -> float:
    """The largest deviation of any element from `exact`, in units of the root mean square of `exact`."""
    return float((got.double() - exact).abs().max() / exact.square().mean().sqrt())


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Relative error in the L2 norm."""
    return float((got.double() - exact).norm() / exact.norm())
