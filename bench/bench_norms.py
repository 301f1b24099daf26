# Every layer of bench/sizes.py, forward and backward, normkern against its peers and against a plain copy.
#
# pytest-benchmark drives the rounds and keeps normkern's times (so --benchmark-compare works as usual); in each round
# the rivals run once each, in turn. Its clock is ours: it advances by what the device measured for normkern alone.
from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case, Inputs, build
from peers import Peer, peers
from sheet import Row, Sheet, device_name

from normkern.measure import Call, Stopwatch, Times

SECONDS = 0.4  # what the rounds of one test may take


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()


def inputs_of(case: Case, device: torch.device) -> Inputs:
    """Inputs in the case's layout, drawn on the device: drawing them in float64 as the tests do would take longer."""
    small = build(replace(case, shape=(min(2, case.shape[0]), *case.shape[1:])))
    order = sorted(range(small.x.dim()), key=lambda dim: -small.x.stride(dim))
    generator = torch.Generator(device).manual_seed(0)

    def normal() -> torch.Tensor:
        sizes = [case.shape[dim] for dim in order]
        values = torch.randn(sizes, generator=generator, device=device, dtype=torch.float32).to(case.torch_dtype)
        return values.permute([order.index(dim) for dim in range(len(order))])

    return replace(small.to(device), x=normal(), dy=normal(), residual=normal() if case.residual else None)


def copied(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.clone()


def rival(peer: Peer, case: Case, inputs: Inputs, mode: str) -> Call:
    """One call of one mode. Backward is timed alone, over a graph that is kept; a step is forward and backward."""
    # Statistics of their own: a graph that is kept must not find them changed by another.
    inputs = replace(inputs, running_mean=copied(inputs.running_mean), running_var=copied(inputs.running_var))
    parameters = [p for p in (inputs.weight, inputs.bias) if p is not None]
    # Every rival differentiates leaves of its own.
    inputs.x = inputs.x.detach()
    leaves = [inputs.x, *parameters]
    if inputs.residual is not None:
        inputs.residual = inputs.residual.detach()
        leaves.append(inputs.residual)
    for leaf in leaves:
        leaf.requires_grad_()

    def forward() -> torch.Tensor:
        with peer.around():
            return peer.forward(case, inputs)

    if mode == "forward":
        return forward
    if mode == "step":
        return lambda: torch.autograd.grad(forward(), leaves, inputs.dy)
    y = forward()

    def backward() -> Any:
        with peer.around():
            return torch.autograd.grad(y, leaves, inputs.dy, retain_graph=True)

    return backward


def copy_of(x: torch.Tensor) -> Call:
    source, target = x.detach(), torch.empty_like(x)
    return lambda: target.copy_(source)


def describe(case: Case) -> str:
    extras = ["" if case.training or case.norm != "batch" else "eval", "add" if case.residual else "", case.act or ""]
    return "+".join([f"{case.norm}_norm", *filter(None, extras)])


@pytest.mark.benchmark(timer=CLOCK)
def test_norm(case: Case, mode: str, benchmark: Any, device: torch.device, sheet: Sheet) -> None:
    inputs = inputs_of(case, device)
    calls: dict[str, Call] = {peer.name: rival(peer, case, inputs, mode) for peer in peers(case, device)}
    calls["copy"] = copy_of(inputs.x)
    watch = Stopwatch(device)
    watch.round(calls, 0)
    once = sum(watch.round(calls, 0).values())
    samples: list[dict[str, float]] = []

    def one_round() -> None:
        samples.append(watch.round(calls, len(samples)))
        CLOCK.now += samples[-1]["normkern"]

    rounds = int(min(100, max(7, SECONDS / once)))
    benchmark.group = f"{case.norm}_norm {mode}"
    benchmark.pedantic(one_round, rounds=rounds)

    tensor = inputs.x.numel() * inputs.x.element_size()
    # x to y; x and dy to dx: what one read of everything costs. A residual is read, read and written.
    forward, backward = (3, 5) if case.residual and case.act else (3, 3) if case.residual else (2, 3)
    moved = tensor * {"forward": forward, "backward": backward, "step": forward + backward}[mode]
    times = {name: Times(tuple(sample[name] for sample in samples)) for name in calls}
    copy_rate = 2 * tensor / times["copy"].median
    for name, taken in times.items():
        own = 2 * tensor if name == "copy" else moved
        sheet.add(
            Row(
                describe(case),
                name,
                mode,
                "speed_ms",
                "shape",
                "x".join(map(str, case.shape)) + (f"/{case.groups}" if case.norm == "group" else ""),
                *(taken.quantile(q) * 1e3 for q in (0.2, 0.5, 0.8)),
                bytes=own,
                floor_us=own / copy_rate * 1e6,
                fraction_of_copy=own / copy_rate / taken.median,
                ratio_to_torch=times["torch"].median / taken.median,
                dtype=case.dtype,
                layout=case.layout,
                device=device_name(device),
            )
        )
    ours = times["normkern"].median
    benchmark.extra_info.update(
        bytes=moved,
        gb_per_second=round(moved / ours / 1e9, 2),
        fraction_of_copy=round(moved / copy_rate / ours, 3),
        ratio_to_torch=round(times["torch"].median / ours, 3),
    )
