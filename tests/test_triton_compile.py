# The Triton kernels compiled ahead of time for A100, H100/H200 and B200, without a GPU or its driver: registers, spills
# and 16-byte accesses at the default plan of shapes that networks run. In a process of its own: see triton_compile.py.
from __future__ import annotations

import csv
import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
REGISTERS = 65536  # of a multiprocessor
# Kernels that touch whole tensors, and which of them write one. The others move a few numbers per group.
READS = {"fused_forward", "fused_backward", "reduce_moments", "reduce_gradients", "map_forward", "map_backward"}
WRITES = {"fused_forward", "fused_backward", "map_forward", "map_backward"}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run(folder: Path, *arguments: str) -> str:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(folder),
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "triton_compile.py"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_resources(arch: int, tmp_path: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(run(tmp_path, "--few", str(arch)))))
    assert {row["launch"] for row in rows} >= READS, "the shapes do not reach every kernel"
    for row in rows:
        name = f"{row['chip']} {row['case']}: {row['launch']} {row['tile']}"
        numbers = {key: int(row[key]) for key in ("registers", "spill_bytes", "warps", "wide_loads", "wide_stores")}
        assert numbers["spill_bytes"] == 0, f"{name} spills {row['spill_bytes']} bytes"
        assert numbers["registers"] * 32 * numbers["warps"] <= REGISTERS, f"{name} does not fit"
        if row["launch"] in READS:
            assert numbers["wide_loads"] >= 1, f"{name}: no 16-byte loads"
        if row["launch"] in WRITES:
            assert numbers["wide_stores"] >= 1, f"{name}: no 16-byte stores"


def test_spectra_compile(tmp_path: Path) -> None:
    assert run(tmp_path, "--spectra", "80", "90", "100").strip() == "[6, 6, 6]"


@pytest.mark.slow
def test_every_variant_compiles(tmp_path: Path) -> None:
    """Dtypes, activations, residuals, given moments and 64-bit offsets: the interpreter takes more than a compiler."""
    assert int(run(tmp_path, "--variants", "90").strip("[]\n")) >= 60
