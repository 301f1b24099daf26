# The emulator that runs the CUDA sources on the CPU: its own tests in every build, and that a fault planted between
# Python and the kernels is found.
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emulator.backend import H200, MODES, STRATEGIES, TINY, EmulatedBackend, asan_environment, built

from normkern.problem import Domain, Problem


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


@pytest.mark.parametrize("strategy", ["block", "split"])
def test_every_schedule_gives_the_same_bits(strategy: str) -> None:
    x = torch.randn(8, 5, 300, generator=torch.Generator().manual_seed(2))
    dy = torch.randn(8, 5, 300, generator=torch.Generator().manual_seed(3))
    weight = torch.linspace(0.5, 2, 5)
    problem, results = batch_problem(8, 5, 300), []
    for seed in range(6):
        backend = EmulatedBackend("checked", gpu=TINY, strategy=strategy, seed=seed, preempt_ppm=1000 * seed)
        y, mean, var = backend.forward(problem, x, weight, weight, None, None, None, True)
        results.append((y, mean, var, *backend.backward(problem, dy, x, weight, weight, None, mean, var, 7)[:3]))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


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
        for problem, shape in ((layer_problem(7, 203), (7, 203)), (batch_problem(3, 5, 41), (3, 5, 41))):
            backend = EmulatedBackend("asan", gpu=TINY, strategy=strategy)
            x = torch.randn(shape).to(dtype)
            weight = torch.ones(problem.affine.groups, dtype=dtype)
            y, mean, var = backend.forward(problem, x, weight, weight, None, None, None, True)
            backend.backward(problem, x, x, weight, weight, None, mean, var, 7)
print("done")
"""
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=here, env=asan_environment(), capture_output=True, text=True, timeout=900
    )
    assert done.stdout.strip() == "done", done.stderr[-4000:]
