"""race.py: one layer, its rivals and a plain copy of its input, timed in turn, round after round.

Whatever slows the machine for a while slows all of them, so that ratios hold; the copy is what memory gives at that
size at that time, and every time is held against it.
"""

from __future__ import annotations

import ctypes
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from normkern.bench.layers import Layer, Tensors, tensors
from normkern.bench.peers import OURS, Peer
from normkern.bench.sheet import Row, device_name
from normkern.measure import Call, Stopwatch, Times

MODES = ("forward", "backward", "step")
SMALL = 8 << 20  # bytes of x up to which a call on a GPU is mostly the host's work


def keep_memory() -> None:
    """Freed tensors stay with the process, as with the allocator of a GPU: page faults are not what is measured."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        mmap_threshold, trim_threshold = -3, -1  # of mallopt(3)
        libc.mallopt(mmap_threshold, 2**31 - 1)
        libc.mallopt(trim_threshold, 2**31 - 1)


def _own(shared: Tensors) -> Tensors:
    """The same values, but leaves and running statistics that no other rival differentiates or changes."""

    def leaf(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().requires_grad_()

    def copy(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.clone()

    x, weight = (t.detach().requires_grad_() for t in (shared.x, shared.weight))
    return replace(
        shared,
        x=x,
        weight=weight,
        bias=leaf(shared.bias),
        residual=leaf(shared.residual),
        running_mean=copy(shared.running_mean),
        running_var=copy(shared.running_var),
    )


def _rival(peer: Peer, layer: Layer, shared: Tensors, mode: str) -> Call:
    """One call of one mode. Backward is timed alone, over a graph that is kept; a step is forward and backward."""
    own = _own(shared)
    forward = peer.make(layer, own)
    if mode == "forward":
        return forward
    if mode == "step":
        return lambda: torch.autograd.grad(forward(), own.leaves(), own.dy)
    y = forward()
    return lambda: torch.autograd.grad(y, own.leaves(), own.dy, retain_graph=True)


def _replayed(make: Callable[[], Call], device: torch.device) -> Call:
    """What a call launches, from a CUDA graph: the time of the kernels without what the host does for them."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        call = make()  # here, since backward runs on the stream of its forward
        for _ in range(3):  # what allocates, compiles or chooses at first must not be captured
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()

    def replay(keep: Call = call) -> None:  # the graph reads tensors of the call, which must stay
        graph.replay()

    return replay


def has_replays(layer: Layer, device: torch.device) -> bool:
    """Whether the layer is raced from CUDA graphs, too: it is small and runs on a GPU."""
    size = math.prod(layer.shape) * getattr(torch, layer.dtype).itemsize
    return device.type == "cuda" and size <= SMALL


def bytes_moved(layer: Layer, mode: str, x: Tensor) -> int:
    """What one read of everything costs: x to y forward, x and dy to dx backward; a residual is read, read, written."""
    forward, backward = (3, 5) if layer.residual and layer.act else (3, 3) if layer.residual else (2, 3)
    many = {"forward": forward, "backward": backward, "step": forward + backward}[mode]
    return many * x.numel() * x.element_size()


class Race:
    """One layer in one mode: `round()` until there are enough, then `rows()`. A library that fails on the layer is left
    out and named in `failed`; torch and normkern must not fail. `replays`: the calls are captured as CUDA graphs, and
    their replays timed."""

    def __init__(
        self, layer: Layer, mode: str, peers: Sequence[Peer], device: torch.device, replays: bool = False
    ) -> None:
        shared = tensors(layer, device)
        self.layer, self.mode, self.device = layer, mode, device
        self.metric = "replay_ms" if replays else "speed_ms"

        def ready(make: Callable[[], Call]) -> Call:
            return _replayed(make, device) if replays else make()

        self.versions: dict[str, str] = {}
        self.calls: dict[str, Call] = {}
        self.failed: dict[str, str] = {}
        self.around = {peer.name: peer.around for peer in peers}
        for peer in peers:
            try:
                with peer.around():
                    call = ready(partial(_rival, peer, layer, shared, mode))
                    call()
                self.versions[peer.name] = peer.version()
            except Exception as error:
                if peer.name in ("torch", *OURS):
                    raise
                self.failed[peer.name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            else:
                self.calls[peer.name] = call
        target = torch.empty_like(shared.x)
        self.calls["copy"] = ready(lambda: lambda: target.copy_(shared.x))
        self.tensor_bytes = shared.x.numel() * shared.x.element_size()
        self.moved = bytes_moved(layer, mode, shared.x)
        self.samples: list[dict[str, float]] = []
        self.watch = Stopwatch(device)
        self.watch.round(self.calls, 0, self.around)
        self.once = sum(self.watch.round(self.calls, 0, self.around).values())

    def rounds(self, seconds: float) -> int:
        """How many rounds take about so long: 7 at least, 100 at most."""
        return int(min(100, max(7, seconds / self.once)))

    def round(self) -> dict[str, float]:
        """Seconds of one call of every rival."""
        self.samples.append(self.watch.round(self.calls, len(self.samples), self.around))
        return self.samples[-1]

    def times(self) -> dict[str, Times]:
        return {name: Times(tuple(sample[name] for sample in self.samples)) for name in self.calls}

    def rows(self) -> list[Row]:
        times = self.times()
        rate = 2 * self.tensor_bytes / times["copy"].median
        rows = []
        for name, taken in times.items():
            own = 2 * self.tensor_bytes if name == "copy" else self.moved
            low, middle, high = (taken.quantile(q) * 1e3 for q in (0.2, 0.5, 0.8))
            row = Row(self.layer.name, name, self.mode, self.metric, "shape", self.layer.size, low, middle, high)
            row.bytes = own
            row.floor_us = own / rate * 1e6
            row.fraction_of_copy = own / rate / taken.median
            if "torch" in times:
                row.ratio_to_torch = times["torch"].median / taken.median
            row.dtype, row.layout, row.device = self.layer.dtype, self.layer.layout, device_name(self.device)
            row.provider_version = self.versions.get(name, torch.__version__)
            rows.append(row)
        return rows


def run(race: Race, seconds: float, on_round: Callable[[], None] = lambda: None) -> list[Row]:
    """Rounds for about so many seconds, at least seven."""
    start = time.perf_counter()
    wanted = race.rounds(seconds)
    while len(race.samples) < wanted and (len(race.samples) < 7 or time.perf_counter() - start < 4 * seconds):
        race.round()
        on_round()
    return race.rows()
