# The emulator that runs the CUDA sources on the CPU: its own tests in every build, and that a fault planted between
# Python and the kernels is found.
from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from emulator.backend import H200, MEDIUM, MODES, SMALL, STRATEGIES, TINY, EmulatedBackend, Gpu, asan_environment, built

from normkern.problem import Act, Domain, Problem


@pytest.mark.parametrize("mode", MODES)
def test_self_test(mode: str) -> None:
    done = subprocess.run([built(f"emulator_self_test_{mode}")], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 failures" in done.stdout


def layer_problem(rows: int, cols: int) -> Problem:
    return Problem(stats=Domain(rows, 1, 1, cols), affine=Domain(1, rows, cols, 1))


def batch_problem(n: int, channels: int, positions: int) -> Problem:
    domain = Domain(1, n, channels, positions)
    return Problem(stats=domain, affine=domain)


def normalized(x: torch.Tensor, dim: int | tuple[int, ...]) -> torch.Tensor:
    wide = x.double()
    var, mean = torch.var_mean(wide, dim, correction=0, keepdim=True)
    return (wide - mean) / torch.sqrt(var + 1e-5)


@pytest.mark.parametrize("mode", ["plain", "checked"])
@pytest.mark.parametrize("gpu", [H200, TINY], ids=["h200", "tiny"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_forward(mode: str, gpu: object, strategy: str) -> None:
    backend = EmulatedBackend(mode, gpu=gpu, strategy=strategy)  # type: ignore[arg-type]
    x = torch.randn(19, 203, generator=torch.Generator().manual_seed(1)) + 100
    y, mean, var = backend.forward(layer_problem(19, 203), x, None, None, None, None, None, True)
    torch.testing.assert_close(y.double(), normalized(x, 1), rtol=0, atol=1e-5)
    torch.testing.assert_close(mean, x.double().mean(1), rtol=1e-7, atol=0)
    torch.testing.assert_close(var, x.double().var(1, correction=0), rtol=1e-6, atol=0)
    if strategy != "automatic":
        assert backend.plan.strategy_name == strategy


def group_problem(n: int, channels: int, positions: int, groups: int, last: bool) -> Problem:
    each = channels // groups
    if last:
        return Problem(Domain(n, positions, groups, each), Domain(1, n * positions, channels, 1))
    return Problem(Domain(n * groups, 1, 1, each * positions), Domain(1, n, channels, positions))


# Every way of adding up the sums for the weights: a layer (by column of rows), a batch (by group), a group in both
# layouts (by line and by column of a slab); more units than teams, lines that fill no access. The tall ones leave so
# many rows of sums that they are merged in two rounds.
SCHEDULED = {
    "tall layer": (layer_problem(700, 24), 700 * 24),
    "tall group": (group_problem(90, 2, 40, 1, False), 90 * 2 * 40),
    "tall group last": (group_problem(90, 4, 17, 1, True), 90 * 4 * 17),
    "layer": (layer_problem(23, 131), 23 * 131),
    "batch": (batch_problem(8, 5, 300), 8 * 5 * 300),
    "group": (group_problem(3, 12, 75, 4, False), 3 * 12 * 75),
    "group last": (group_problem(3, 20, 53, 4, True), 3 * 20 * 53),
}


def every_result(backend: EmulatedBackend, name: str) -> tuple[torch.Tensor, ...]:
    problem, numel = SCHEDULED[name]
    x, dy = (torch.randn(numel, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3))
    weight = torch.linspace(0.5, 2, problem.affine.groups)
    y, mean, var = backend.forward(problem, x, weight, weight, None, None, None, True)
    results = (y, mean, var, *backend.backward(problem, dy, x, weight, weight, None, mean, var, 7)[:3])
    if name == "batch":
        running = torch.zeros(5), torch.ones(5)
        results += (*backend.batch_forward(problem, x, weight, weight, None, *running, 0.3), *running)
        relu = replace(problem, act=Act.relu)
        y, mean, var, mask = backend.masked_forward(relu, x, weight, weight, dy, None, None, None)
        results += (y, mask, *backend.backward(relu, dy, x, weight, weight, mask, mean, var, 15))
    if name in ("layer", "group last"):
        y, total, mean, var = backend.add_forward(problem, x, dy, weight, weight, True)
        results += (y, total, *backend.add_backward(problem, dy, x, total, weight, weight, mean, var, 7))
    return results


def same_on_schedules(strategy: str, name: str, gpu: Gpu, seeds: range) -> None:
    first: tuple[torch.Tensor, ...] = ()
    for seed in seeds:
        backend = EmulatedBackend("checked", gpu=gpu, strategy=strategy, seed=seed, preempt_ppm=1000 * (seed % 7))
        results = every_result(backend, name)
        first = first or results
        for one, two in zip(first, results, strict=True):
            assert torch.equal(one, two), f"schedule {seed}"


@pytest.mark.parametrize("name", SCHEDULED)
@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_schedules_give_the_same_bits(strategy: str, name: str) -> None:
    same_on_schedules(strategy, name, MEDIUM if "tall" in name else SMALL, range(4))


@pytest.mark.schedules
@pytest.mark.parametrize("gpu", [MEDIUM, TINY], ids=["medium", "tiny"])
@pytest.mark.parametrize("name", SCHEDULED)
@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_every_schedule_gives_the_same_bits(strategy: str, name: str, gpu: Gpu) -> None:
    same_on_schedules(strategy, name, gpu, range(34))


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("each", [1, 3, 5, 8, 10, 20, 30, 64, 128])
@pytest.mark.parametrize("strategy", ["block", "cluster", "subgrid"])
def test_channels_per_group(strategy: str, each: int, last: bool) -> None:
    """Slabs of whole groups, whatever they come to in accesses; weights in the same launch."""
    n, groups, positions = 2, 3, 37
    problem, channels = group_problem(n, 3 * each, positions, groups, last), 3 * each
    backend = EmulatedBackend("checked", gpu=SMALL, strategy=strategy)
    x = torch.randn(n, channels, positions, generator=torch.Generator().manual_seed(each)) + 10
    dy = torch.randn(n, channels, positions, generator=torch.Generator().manual_seed(1))
    weight = torch.linspace(0.5, 2, channels)

    def stored(t: torch.Tensor) -> torch.Tensor:
        return t.transpose(1, 2).contiguous() if last else t.contiguous()

    def read(t: torch.Tensor) -> torch.Tensor:
        return t.transpose(1, 2) if last else t

    y, mean, var = backend.forward(problem, stored(x), weight, weight, None, None, None, True)
    assert backend.plan.strategy_name == strategy
    dx, dweight, dbias, _ = backend.backward(problem, stored(dy), stored(x), weight, weight, None, mean, var, 7)
    assert backend.plan.strategy_name == strategy
    assert backend.plan.affine.launch.blocks == 0
    leaves = [t.double().requires_grad_() for t in (x, weight, weight)]
    want = torch.nn.functional.group_norm(leaves[0], groups, leaves[1], leaves[2], 1e-5)
    torch.testing.assert_close(read(y).double(), want, rtol=0, atol=2e-5)
    gradients = torch.autograd.grad(want, leaves, dy.double())
    for got, expected in zip((read(dx), dweight, dbias), gradients, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("strategy", ["cluster", "subgrid"])
def test_splits_where_the_chip_is_taken(strategy: str) -> None:
    """What else runs there is not known to the planner; the launcher asks, and reads twice instead."""
    gpu = Gpu(16, 232448, 233472, 0, 16)
    backend = EmulatedBackend("checked", gpu=gpu, strategy=strategy)
    # Wants 16 blocks to a cluster, or most of the chip.
    problem, x = layer_problem(1, 600_001), torch.randn(1, 600_001)
    backend.forward(problem, x, None, None, None, None, None, True)
    assert backend.plan.strategy_name == strategy
    backend.library.nk_occupy(8, 8)
    try:
        y, _, _ = backend.forward(problem, x, None, None, None, None, None, True)
    finally:
        backend.library.nk_occupy(0, 16)
    assert backend.plan.strategy_name == "split"
    torch.testing.assert_close(y.double(), normalized(x, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batches", [1, 3])
def test_update_running(dtype: torch.dtype, batches: int) -> None:
    channels, count, momentum = 261, 7, 0.3
    generator = torch.Generator().manual_seed(5)
    mean, var = (torch.randn(batches * channels, dtype=torch.float64, generator=generator) for _ in range(2))
    running = [torch.randn(channels, generator=generator).to(dtype) for _ in range(2)]
    want = [
        ((1 - momentum) * old.double() + momentum * new.view(batches, channels).mean(0) * factor).to(dtype)
        for old, new, factor in zip(running, (mean, var), (1, count / (count - 1)), strict=True)
    ]
    EmulatedBackend("checked").update_running(*running, mean, var, count, momentum)
    for got, expected in zip(running, want, strict=True):
        # One rounding from float64, whose own sums may differ in their last place.
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-14 if dtype == torch.float64 else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_running_statistics_move_in_the_launch(strategy: str, last: bool, dtype: torch.dtype) -> None:
    """Of groups in one part and in several, with the bits of a launch that only moves them; not finite ones alone."""
    for n, channels, positions, gpu in ((3, 5, 41, TINY), (4, 10, 600, MEDIUM)):
        problem = batch_problem(n * positions, channels, 1) if last else batch_problem(n, channels, positions)
        x = torch.randn(problem.stats.numel, generator=torch.Generator().manual_seed(3)).to(dtype) + 2
        x[0] = float("inf")
        residual, weight = torch.cos(x.double()).nan_to_num().to(dtype), torch.linspace(0.5, 2, channels)
        running = torch.linspace(-1, 1, channels).bfloat16(), torch.linspace(0.5, 2, channels)
        want_running = [t.clone() for t in running]
        backend = EmulatedBackend("checked", gpu=gpu, strategy=strategy)
        want = backend.forward(problem, x, weight, None, residual, None, None, True)
        backend.update_running(*want_running, *want[1:], problem.stats.count, 0.3)
        got = backend.batch_forward(problem, x, weight, None, residual, *running, 0.3)
        for one, two in zip((*got, *running), (*want, *want_running), strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)
        assert not running[1][0].isfinite()
        assert running[1][1:].isfinite().all()


def test_finds_name_kernel_and_line() -> None:
    backend = EmulatedBackend("checked", strategy="split")
    x, weight = torch.randn(4, 64), torch.ones(64)
    find = r"out of bounds: \d-byte read at .*\.cuh:\d+.*; in kernel normkern::cuda::.*, block \(\d,0,0\) thread \(\d"
    with pytest.raises(RuntimeError, match=find):  # backward without the moments of forward
        backend.backward(layer_problem(4, 64), x, x, weight, weight, None, None, None, 7)


def test_sizes_are_checked() -> None:
    backend = EmulatedBackend("checked")
    with pytest.raises(RuntimeError, match="sizes of the domains and the buffers differ"):
        backend.forward(layer_problem(4, 65), torch.randn(4, 64), None, None, None, None, None, True)


def test_why_not() -> None:
    backend = EmulatedBackend("checked")
    assert backend.why_not(torch.empty(1)) is None
    assert "meta" in str(backend.why_not(torch.empty(1, device="meta")))
    assert "int32" in str(backend.why_not(torch.empty(1, dtype=torch.int32)))


@pytest.mark.slow
def test_kernels_under_asan(monkeypatch: pytest.MonkeyPatch) -> None:
    """AddressSanitizer must be in the process from the start, so this runs in one of its own."""
    monkeypatch.delenv("NORMKERN_EMULATOR_DIR", raising=False)  # a build of its own: not every run needs it
    built("normkern_emulated_asan")
    script = """
import torch
from test_emulator import *
for strategy in STRATEGIES:
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        shapes = (7, 203), (3, 5, 41), (2, 12, 33), (2, 33, 12)
        both = [group_problem(2, 12, 33, 4, last) for last in (False, True)]
        problems = layer_problem(7, 203), batch_problem(3, 5, 41), *both
        for problem, shape in zip(problems, shapes, strict=True):
            backend = EmulatedBackend("asan", gpu=SMALL, strategy=strategy)
            x = torch.randn(shape).to(dtype)
            weight = torch.ones(problem.affine.groups, dtype=dtype)
            y, mean, var = backend.forward(problem, x, weight, weight, None, None, None, True)
            backend.backward(problem, x, x, weight, weight, None, mean, var, 7)
            y, total, mean, var = backend.add_forward(problem, x, x, weight, weight, True)
            backend.add_backward(problem, x, x, total, weight, weight, mean, var, 7)
            relu = replace(problem, act=Act.relu)
            y, mean, var, mask = backend.masked_forward(relu, x, weight, weight, x, None, None, None)
            backend.backward(relu, x, x, weight, weight, mask, mean, var, 15)
print("done")
"""
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=here, env=asan_environment(), capture_output=True, text=True, timeout=900
    )
    assert done.stdout.strip() == "done", done.stderr[-4000:]
