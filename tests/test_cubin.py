# What nvcc makes of the kernels for sm_90, with no GPU: no spills (nvcc itself refuses those), registers and occupancy
# within limits, and 16-byte accesses in every kernel that is instantiated for full vectors.
from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DTYPES = ("f32", "f16", "bf16", "f64")
# Per multiprocessor of sm_90. A block takes 1 KiB of shared memory beside its own, which res-usage counts already.
REGISTERS, WARPS, BLOCKS, REGISTER_UNIT = 65536, 64, 32, 256
# The share of a multiprocessor's warps that registers must leave room for. Kernels bound by memory want half; those
# that keep a group's sums in registers can do with a quarter.
OCCUPANCY_FLOOR = 0.25
# By columns a thread keeps numbers for each of its V columns, and asynchronous copies, not warps, hide the latency.
SLAB_FLOOR = 0.125
# Backward keeps twice as much to a thread; blocks of 384 leave it the registers it needs without spilling.
BACKWARD_FLOOR = 0.1875
ASCENT_FLOOR = 0.125  # one block of 256 threads: with two B200's code would spill


@dataclass
class Kernel:
    name: str
    registers: int = 0
    stack: int = 0
    shared: int = 0
    opcodes: Counter[str] = field(default_factory=Counter)

    def count(self, pattern: str) -> int:
        return sum(n for opcode, n in self.opcodes.items() if re.match(pattern, opcode))

    def occupancy(self, threads: int) -> float:
        """Registers are handed out to warps, from a quarter of the file each."""
        warps = -(-threads // 32)
        per_warp = -(-self.registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
        blocks = min(BLOCKS, WARPS // warps, REGISTERS // 4 // per_warp * 4 // warps)
        return blocks * warps / WARPS


def output(*command: str) -> str:
    packaged = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "bin"
    path = os.pathsep.join([str(packaged), os.environ.get("PATH", "")])
    for tool in (command[0], "nvdisasm"):
        found = shutil.which(tool, path=path)
        assert found, f"{tool} was not found: pip install nvidia-cuda-cuobjdump==13.2.51 nvidia-cuda-nvdisasm==13.2.51"
    program = shutil.which(command[0], path=path) or ""
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout}{done.stderr}"
    return done.stdout


def binaries(folder: Path) -> list[Path]:
    """What has kernels for sm_90: the library that was built, or else a compilation of our own."""
    library = ROOT / "normkern" / "_C_cuda.so"
    if library.exists() and "sm_90" in output("cuobjdump", "--list-elf", str(library)):
        return [library]
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc was not found")
    cubins = []
    for source in (*(f"launch_{dtype}" for dtype in DTYPES), "running", "perturb"):
        cubins.append(folder / f"{source}.cubin")
        output(
            "nvcc", "-std=c++17", "-arch=sm_90", "-cubin", "--expt-relaxed-constexpr", "-Xptxas",
            "-warn-spills,-warn-lmem-usage", "-Werror", "all-warnings", "-o", str(cubins[-1]),
            str(ROOT / "csrc" / "cuda" / f"{source}.cu"),
        )  # fmt: skip
    return cubins


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kernel]:
    """Every kernel by its name, `normkern::cuda::map_forward<__half, 8>`."""
    found: dict[str, Kernel] = {}
    for binary in binaries(tmp_path_factory.mktemp("cubin")):
        usage = output("cuobjdump", "-arch", "sm_90", "-res-usage", str(binary))
        for symbol, line in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", usage):
            values = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", line)}
            found[symbol] = Kernel(symbol, values["REG"], values["STACK"], values["SHARED"])
        kernel: Kernel | None = None
        for line in output("cuobjdump", "-arch", "sm_90", "-sass", str(binary)).splitlines():
            if match := re.search(r"Function : (\S+)", line):
                kernel = found[match.group(1)]
            elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line):
                assert kernel is not None
                kernel.opcodes[match.group(1)] += 1
    for kernel in found.values():
        kernel.name = demangled(kernel.name)
    return {kernel.name: kernel for kernel in found.values()}


def demangled(symbol: str) -> str:
    return output("c++filt", symbol).strip().removeprefix("void ").split("(normkern", 1)[0]


def by_columns(name: str) -> bool:
    """`fused_forward<__half, 8, true>`."""
    return "fused" in name and bool(re.search(r", (?:\(bool\)1|true)>", name))


def launch_bound(name: str) -> int:
    """The most threads of a block, as the planner has them: kFusedThreads and so on in csrc/core/walk.h."""
    # These have no plan.
    for word, file, kind in (
        ("sum_lags", "spectral.cu", "Lag"),
        ("spectral::", "spectral.cu", "Spectral"),
        ("standardize", "standardize.cuh", "Standardize"),
        ("ascent::", "perturb.cu", "Perturb"),
    ):
        if word in name:
            return int(re.findall(rf"k{kind}Threads = (\d+)", (ROOT / "csrc" / "cuda" / file).read_text())[0])
    text = (ROOT / "csrc" / "core" / "walk.h").read_text()
    bounds = {key.lower(): int(value) for key, value in re.findall(r"k(\w+)Threads = (\d+)", text)}
    kinds = {
        "fused_forward": "fused",
        "fused_backward": "backward",
        "reduce_rows": "reduce",
        "reduce_columns": "column",
    }
    kinds |= {"map": "map", "prepare": "map", "move_running": "map"}
    kernel = name.split("<")[0].rsplit("::", 1)[-1]
    if by_columns(name):
        return bounds["slab"]
    return next(bounds[bound] for kind, bound in kinds.items() if kernel.startswith(kind))


def test_kernels_are_there(kernels: dict[str, Kernel]) -> None:
    names = " ".join(kernels)
    fused = "fused_forward", "fused_backward", "standardize_forward", "standardize_backward"
    for program in (*fused, "reduce_rows", "reduce_columns", "map_forward", "move_running", "perturb_tensors"):
        assert program in names, names


def test_nothing_spills(kernels: dict[str, Kernel]) -> None:
    for kernel in kernels.values():
        assert kernel.stack == 0, f"{kernel.name}: {kernel.stack} bytes of stack"
        assert kernel.count(r"(LDL|STL)\b") == 0, f"{kernel.name}: local memory"


def test_occupancy(kernels: dict[str, Kernel]) -> None:
    for kernel in kernels.values():
        threads = launch_bound(kernel.name)
        occupancy = kernel.occupancy(threads)
        floor = SLAB_FLOOR if by_columns(kernel.name) else OCCUPANCY_FLOOR
        if "fused_backward" in kernel.name:
            floor = min(floor, BACKWARD_FLOOR)
        if "ascent::" in kernel.name:
            floor = ASCENT_FLOOR
        assert occupancy >= floor, (
            f"{kernel.name}: {kernel.registers} registers leave {occupancy:.0%} of the warps at {threads} threads"
        )


def width_of(name: str) -> int:
    """Elements an access moves: the integer among the template arguments, `map_forward<__half, 8>`."""
    match = re.search(r"<[\w ]+, (?:\(int\))?(\d+)", name)
    return int(match.group(1)) if match else 1


def test_vectors_are_moved_whole(kernels: dict[str, Kernel]) -> None:
    norms = {name: kernel for name, kernel in kernels.items() if not re.search("spectral::|ascent::", name)}
    full = [kernel for kernel in norms.values() if width_of(kernel.name) > 1]
    assert len(full) * 2 >= len(norms) - 3, list(kernels)  # half of the instances; the rest are for unaligned buffers
    for kernel in full:
        staged = "STS" if "standardize" in kernel.name else ""  # it reads nothing whole but what it stages
        assert kernel.count(rf"LDG{staged}\.E(\.\w+)*\.128") >= 1, f"{kernel.name}: no 16-byte loads"
        if "reduce" not in kernel.name:
            assert kernel.count(r"STG\.E(\.\w+)*\.128") >= 1, f"{kernel.name}: no 16-byte stores"
