# ConvNorm on the layers of ResNet-18 (CIFAR and ImageNet): the spectrum against an FFT of every padded kernel, time and
# memory, and a training step of the whole layer against torch's Conv2d + BatchNorm2d.
#   python bench/bench_conv_norm.py [--quick] [--threads 1] [--csv FILE]
#
# One thread and process CPU time by default, rivals in turn and the least of all rounds: a busy machine then changes
# little. ConvNorm2d has its defaults, so what is timed includes the depth-wise affine map and batch norm.
from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

sys.path[:0] = [str(Path(__file__).parent.parent / "tests")]

import paper_conv_norm as paper  # noqa: E402

import normkern  # noqa: E402
from normkern.bench.sheet import Row, Sheet, device_name  # noqa: E402
from normkern.nn import ConvNorm2d  # noqa: E402
from normkern.spectrum import lag_count  # noqa: E402


@dataclass(frozen=True)
class Layer:
    network: str
    name: str
    cin: int
    cout: int
    kernel: int
    stride: int
    size: int  # of the input map
    times: int  # how often the network has it

    @property
    def torus(self) -> tuple[int, int]:
        side = self.size + self.kernel - 1
        return side, side

    def __str__(self) -> str:
        return (
            f"{self.network} {self.name}: {self.cout}x{self.cin}x{self.kernel}x{self.kernel} on {self.size}x{self.size}"
        )


def resnet18(network: str, stem: Layer, size: int) -> list[Layer]:
    layers, cin = [stem], 64
    for stage, cout in enumerate((64, 128, 256, 512), 1):
        stride = 1 if stage == 1 else 2
        if stride == 2:
            layers.append(Layer(network, f"layer{stage} stride 2", cin, cout, 3, 2, size, 1))
            layers.append(Layer(network, f"layer{stage} shortcut", cin, cout, 1, 2, size, 1))
            size //= 2
        layers.append(Layer(network, f"layer{stage}", cout, cout, 3, 1, size, 4 if stride == 1 else 3))
        cin = cout
    return layers


LAYERS = resnet18("cifar", Layer("cifar", "conv1", 3, 64, 3, 1, 32, 1), 32)
LAYERS += resnet18("imagenet", Layer("imagenet", "conv1", 3, 64, 7, 2, 224, 1), 56)
BATCH = {"cifar": 16, "imagenet": 4}


def cpu_seconds(call: Callable[[], object], times: int) -> float:
    """Of one call, over so many."""
    start = time.process_time_ns()
    for _ in range(times):
        call()
    return (time.process_time_ns() - start) * 1e-9 / times


def turns(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """CPU seconds of a call in every round: the rivals take turns, of 2 ms or one call."""
    for call in calls.values():
        call()
    often = {name: max(1, int(2e-3 / max(cpu_seconds(call, 1), 1e-6))) for name, call in calls.items()}
    found: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while len(found[next(iter(calls))]) < 5 or time.perf_counter() < end:
        for name, call in calls.items():
            found[name].append(cpu_seconds(call, often[name]))
    return found


def peak_bytes(call: Callable[[], Tensor]) -> int:
    """The most that torch's allocator has handed out at a time during the call, without the result."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        result = call()
    now = peak = 0
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak - result.numel() * result.element_size()


def own_scratch(layer: Layer) -> int:
    """What the compiled kernels take beside torch's allocator on one thread: waves of both axes and of the lags, taps
    of a block of channels (kLagBlock), sums of a block of frequencies (kVBlock)."""
    side, taps = layer.torus[0], layer.kernel
    half = side // 2 + 1
    root = 4 * side + 4 * taps * half + 2 * taps * half + 3 * max(half, 512)
    lags = taps * taps * 64 + lag_count((taps, taps)) * 8
    return 8 * max(root, lags)


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


class Bench:
    def __init__(self, csv: Path | None, seconds: float) -> None:
        self.sheet, self.seconds = Sheet(csv), seconds

    def add(self, what: str, provider: str, layer: Layer, metric: str, values: list[float], ratio: float | str) -> None:
        least, middle, most = min(values), quantile(values, 0.5), quantile(values, 0.8)
        row = Row(what, provider, "", metric, "layer", str(layer), least, middle, most, ratio_to_torch=ratio)
        row.dtype, row.device = "float32", device_name(torch.device("cpu"))
        self.sheet.add(row)

    def spectrum(self, layer: Layer) -> tuple[float, float, float]:
        """How much faster and smaller than the FFT way: time, memory without and with V itself."""
        weight = torch.randn(layer.cout, layer.cin, layer.kernel, layer.kernel)
        calls: dict[str, Callable[[], Tensor]] = {
            "normkern": lambda: normkern.preconditioner(weight, layer.torus),
            "fft": lambda: paper.preconditioner(weight, layer.torus),
        }
        with torch.no_grad():
            times = turns(dict(calls), self.seconds)
            memory = {name: peak_bytes(call) for name, call in calls.items()}
        memory["normkern"] += own_scratch(layer)
        result = layer.cout * layer.torus[0] * (layer.torus[1] // 2 + 1) * 4
        faster = min(times["fft"]) / min(times["normkern"])
        smaller = memory["fft"] / memory["normkern"]
        for name in calls:
            ms = [t * 1e3 for t in times[name]]
            self.add("spectrum", name, layer, "cpu_ms", ms, min(times["fft"]) / min(times[name]))
            self.add("spectrum", name, layer, "peak_bytes", [float(memory[name])], memory["fft"] / memory[name])
        return faster, smaller, (memory["fft"] + result) / (memory["normkern"] + result)

    def layer(self, layer: Layer) -> float:
        """CPU time of forward and backward over that of torch's pair."""
        torch.manual_seed(0)
        pad = layer.kernel // 2
        pair = nn.Sequential(
            nn.Conv2d(layer.cin, layer.cout, layer.kernel, layer.stride, pad, bias=False), nn.BatchNorm2d(layer.cout)
        )
        ours = ConvNorm2d(layer.cin, layer.cout, layer.kernel, layer.stride, pad)
        # The first layer of a network has no gradient to hand on.
        x = torch.randn(BATCH[layer.network], layer.cin, layer.size, layer.size, requires_grad=layer.cin > 3)
        dy = torch.randn_like(pair(x))

        def step(module: nn.Module) -> Callable[[], None]:
            return lambda: module(x).backward(dy)

        times = turns({"torch": step(pair), "normkern": step(ours)}, self.seconds)
        ratio = min(times["normkern"]) / min(times["torch"])
        for name, values in times.items():
            self.add(
                "conv_norm layer", name, layer, "cpu_ms", [t * 1e3 for t in values], min(times["torch"]) / min(values)
            )
        return ratio


def mean(pairs: list[tuple[float, int]]) -> float:
    """Geometric, weighted."""
    return math.exp(sum(n * math.log(v) for v, n in pairs) / sum(n for _, n in pairs))


def main() -> None:
    parser = argparse.ArgumentParser(description="ConvNorm's spectrum and layer on ResNet-18, CPU")
    parser.add_argument("--quick", action="store_true", help="a short look at every layer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bench = Bench(arguments.csv, 0.3 if arguments.quick else 2.0)
    print("| layer | spectrum: faster than FFT | less memory beside V | with V | layer: CPU time over torch's |")
    print("|---|---:|---:|---:|---:|")
    ratios: dict[str, list[tuple[float, int]]] = {"cifar": [], "imagenet": []}
    for layer in LAYERS:
        shown = ["", "", ""]
        if layer.kernel > 1:
            shown = [f"{value:.0f}x" for value in bench.spectrum(layer)]
        ratio = bench.layer(layer)
        ratios[layer.network].append((ratio, layer.times))
        print(f"| {layer} | {' | '.join(shown)} | {ratio:.2f} |", flush=True)
    for network, found in ratios.items():
        by_layer, by_kind = mean(found), mean([(ratio, 1) for ratio, _ in found])
        print(f"\n{network}: geometric mean {by_layer:.2f} over the {sum(n for _, n in found)} layers of the network, "
              f"{by_kind:.2f} over its {len(found)} kinds of layers")  # fmt: skip


if __name__ == "__main__":
    main()
