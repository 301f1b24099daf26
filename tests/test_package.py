# The distribution: sdist and wheel build by the standard front end, and the wheel runs in an environment that knows
# nothing of this tree. Slow; needs a compiler and a package index for torch.
from __future__ import annotations

import email
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

in_sources = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not in a source tree")

PROGRAM = """
import sys, torch, normkern
assert not normkern.__file__.startswith(sys.argv[1]), normkern.__file__
x = torch.randn(2, 32, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
assert normkern.explain("group_norm", x, 8).backend == "native", normkern.explain("group_norm", x, 8)
y = normkern.group_norm(x, 8, act="silu")
torch.testing.assert_close(y, torch.nn.functional.silu(torch.nn.functional.group_norm(x, 8)))
y.sum().backward()
"""


def run(*command: object, cwd: Path, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not re.match(r"PYTHON|NORMKERN|VIRTUAL_ENV", name)}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**kept, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@in_sources
@pytest.mark.slow
def test_sdist_and_wheel_build_and_install(tmp_path: Path) -> None:
    pytest.importorskip("build")
    options = {"NORMKERN_CUDA": "0", "NORMKERN_TORCH_DIR": str(Path(torch.__file__).parent)}
    # A wheel out of an sdist: what the sdist lacks, the wheel misses.
    run(sys.executable, "-m", "build", "--outdir", tmp_path, ROOT, cwd=tmp_path, **options)
    (sdist,), (wheel,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    assert sdist.stat().st_size < 5e6
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = email.message_from_bytes(archive.read(next(n for n in names if n.endswith("METADATA"))))
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"normkern"}
    assert {"normkern/py.typed", "normkern/bench/peers.py", "normkern/nn/norm.py"} <= set(names)
    assert any(name.startswith("normkern/_host.") for name in names)
    assert "normkern/_C_cpu.so" in names
    assert metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("LICENSE") for name in names)
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    assert {"cli", "demo", "report", "bench", "docs", "test"} <= set(metadata.get_all("Provides-Extra", []))

    clean = tmp_path / "environment"
    run(sys.executable, "-m", "venv", clean, cwd=tmp_path)
    python = clean / "bin" / "python"
    version = torch.__version__.partition("+")[0]
    run(python, "-m", "pip", "install", "-q", f"torch=={version}", f"{wheel}[cli]", cwd=tmp_path)
    run(python, "-c", PROGRAM, ROOT, cwd=tmp_path)
    assert "native" in run(python, "-m", "normkern", "info", cwd=tmp_path)
    assert "group_norm" in run(python, "-m", "normkern", "explain", "group_norm", "2x32x8x8", cwd=tmp_path)


# mypy in a program that uses the package: py.typed makes its annotations count.
@pytest.mark.slow
def test_types_are_seen_by_users(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    program = tmp_path / "program.py"
    program.write_text(
        "import torch, normkern\n"
        "y: torch.Tensor = normkern.group_norm(torch.ones(2, 4, 3), 2)\n"
        "z: int = normkern.group_norm(torch.ones(2, 4, 3), 2)\n"
    )
    options = ["--follow-imports", "silent", "--cache-dir", str(tmp_path / "cache")]
    command = [sys.executable, "-m", "mypy", *options, str(program)]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "program.py:3: error: Incompatible types in assignment" in said.stdout, said.stdout + said.stderr
    assert "Found 1 error" in said.stdout
