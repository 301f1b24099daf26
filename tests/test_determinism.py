# The same call gives the same bits: on two runs, on any schedule of blocks and threads, with the same thread count.
from __future__ import annotations

import pytest
import torch
from cases import NORMS, Case, smoke
from conftest import SETUPS, Setup, emulated_backend
from reference import inputs_for
from test_norms import run
from torch import Tensor

import normkern
from normkern.backends import BACKENDS

EMULATED = [s for s in SETUPS if s.emulated]
# Groups that a block cannot hold, many groups a block, long columns: whatever merges partial results.
MERGES = [
    Case("batch", (4, 5, 9, 31), act="silu", residual="like"),
    Case("batch", (4, 40, 9, 15), layout="channels_last", dtype="bfloat16", act="relu"),
    Case("group", (2, 12, 33, 17), groups=3, layout="channels_last"),
    Case("layer", (130, 77)),
    Case("layer", (3, 2100), dtype="float16"),
    Case("instance", (3, 5, 40, 21)),
    Case("rms", (70, 193), params="w", dtype="float64"),
]


def bits(case: Case, device: str = "cpu") -> dict[str, Tensor]:
    inputs = inputs_for(case).to(device)
    return {name: t.detach().cpu() for name, t in run(case, inputs).items()}


def assert_same(case: Case, a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name in a:
        different = int((a[name].contiguous().view(torch.uint8) != b[name].contiguous().view(torch.uint8)).sum())
        assert not different, f"{case}: {name} differs in {different} bytes"


@pytest.mark.parametrize("case", smoke() + MERGES, ids=str)
def test_two_runs(backend: Setup, case: Case) -> None:
    assert_same(case, bits(case, backend.device), bits(case, backend.device))


@pytest.mark.parametrize("case", MERGES, ids=str)
@pytest.mark.parametrize("setup", EMULATED, ids=str)
def test_any_schedule(setup: Setup, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks, warps and threads in five orders, forwards, backwards and at random."""
    if setup.missing:
        pytest.skip(setup.missing)
    found = []
    for seed in range(5):
        monkeypatch.setitem(BACKENDS, setup.name, emulated_backend(setup.name.removeprefix("emulated-"), seed=seed))
        with normkern.use_backend(setup.name):
            found.append(bits(case))
    for other in found[1:]:
        assert_same(case, found[0], other)


@pytest.mark.parametrize("norm", NORMS)
def test_thread_counts(norm: str) -> None:
    """The compiled CPU kernels: each thread count repeats itself, and all agree to rounding."""
    if "native" not in {s.name for s in SETUPS if not s.missing}:
        pytest.skip("the native library is not built")
    case = Case(norm, (3, 24, 33, 65), groups=4, dims=2, params="w", act="silu")
    before = torch.get_num_threads()
    try:
        with normkern.use_backend("native"):
            found = {}
            for count in (1, 2, 3, 4):
                torch.set_num_threads(count)
                found[count] = bits(case)
                for _ in range(3):
                    assert_same(case, found[count], bits(case))
    finally:
        torch.set_num_threads(before)
    for count in (2, 3, 4):
        for name, value in found[count].items():
            torch.testing.assert_close(value, found[1][name], rtol=1e-5, atol=1e-5)
