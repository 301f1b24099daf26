# Registers, spills and 16-byte accesses of the Triton kernels, compiled for A100, H100/H200 and B200 at the default
# plan of shapes that networks run; needs no GPU. Writes bench/results/triton/resources.csv, or the file that is named:
#   python bench/triton_resources.py [FILE]
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"


def main() -> int:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "bench" / "results" / "triton" / "resources.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    # A process of its own: kernels are compiled only where Triton was imported without its interpreter.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS)])}
    with path.open("w") as file:
        return subprocess.run(
            [sys.executable, str(TESTS / "triton_compile.py")], stdout=file, env=environment
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
