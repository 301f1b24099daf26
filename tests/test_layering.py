# The walls between the layers, held by reading the sources: what each may include, name and contain.
from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = re.compile(r"\.(h|hpp|cuh|cpp|cu|py|pyi)$")
# What a layer may include, beside the C++ standard library and its own directory.
MAY_INCLUDE = {
    "core": r"",
    "cpu": r"\.\./core/.*|immintrin\.h|arm_neon\.h",
    "cuda": r"\.\./core/.*|dlfcn\.h|cufft\.h",
    "bind": r"\.\./(core|cpu|cuda)/.*\.h|build_info\.h|pybind11/.*|torch/csrc/stable/.*|torch/headeronly/.*|"
    r"cuda_runtime_api\.h|dlfcn\.h|Python\.h",
    "graph": r"\.\./bind/lent\.h|torch/csrc/.*|ATen/.*|c10/.*",
    "tests": r"\.\./(core|cpu)/.*",
}


def files(*directories: str) -> list[Path]:
    found = [p for d in directories for p in sorted((ROOT / d).rglob("*")) if SOURCE.search(p.name)]
    assert found, f"no sources in {directories}"
    return found


def code(path: Path) -> str:
    """The file without comments and string literals: prose may name what code must not. Line numbers stay."""
    text = path.read_text()
    if path.suffix.startswith(".py"):
        pattern = r'"""(?:.|\n)*?"""|\'\'\'(?:.|\n)*?\'\'\'|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|#[^\n]*'
    else:
        pattern = r'/\*(?:.|\n)*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"'
    return re.sub(pattern, lambda m: "\n" * m[0].count("\n"), text)


def offences(paths: list[Path], pattern: str) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(code(path).splitlines(), 1)
        if re.search(pattern, line)
    ]


def included(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^">]+)[">]', path.read_text(), re.MULTILINE)


def standard(header: str) -> bool:
    return re.fullmatch(r"[a-z_]+|(math|stdint|string|stdlib)\.h", header) is not None


@pytest.mark.parametrize("layer", MAY_INCLUDE)
def test_includes(layer: str) -> None:
    strangers = []
    for path in files(f"csrc/{layer}"):
        if path.name == "platform.cuh":  # the one door to CUDA
            continue
        for header in included(path):
            sibling = (path.parent / header).resolve().parent == path.parent and (path.parent / header).exists()
            if not (standard(header) or sibling or re.fullmatch(MAY_INCLUDE[layer], header)):
                strangers.append(f"{path.relative_to(ROOT)} includes {header}")
    assert not strangers


def test_platform_is_the_only_door_to_cuda() -> None:
    doors = {
        p.name for p in files("csrc/core", "csrc/cpu", "csrc/cuda") if any(h.startswith("cuda_") for h in included(p))
    }
    assert doors == {"platform.cuh"}


@pytest.mark.parametrize(
    "forbidden",
    [
        r"<<<",
        r"__shared__",
        r"\basm\b",
        r"cooperative_groups",
        r"__activemask",
        r"\bcuda[A-Z]\w+",
        r"\batomicAdd\(\s*&?\(?(float|double)",
    ],
)
def test_kernels_use_the_platform(forbidden: str) -> None:
    kernels = [p for p in files("csrc/cuda") if p.name != "platform.cuh"]
    assert not offences(kernels, forbidden)


def test_every_kernel_has_launch_bounds() -> None:
    bare = []
    for path in files("csrc/cuda"):
        for kernel in re.finditer(r"__global__[^;{]*", code(path)):
            if "__launch_bounds__" not in kernel[0]:
                bare.append(f"{path.relative_to(ROOT)}: {' '.join(kernel[0].split())[:80]}")
    assert not bare


def test_only_core_and_bind_know_the_plan_of_a_chip() -> None:
    assert not offences(files("csrc/cpu"), r"\b(Gpu|Plan|Request)\b")


def test_torch_stays_in_bind() -> None:
    assert not offences(files("csrc/core", "csrc/cpu", "csrc/cuda"), r"\b(torch|at|c10)::")


def test_python_names_no_launch_sizes() -> None:
    modules = [p for p in files("normkern") if not p.name.startswith("triton")]
    assert not offences(
        modules, r"(?<!axes\.)\b(blockDim|gridDim|threads_per\w*|num_warps|num_stages|grid|grid_size|block_size)\b"
    )


def test_norms_have_no_kernel_of_their_own() -> None:
    kernels = files("csrc/core", "csrc/cpu", "csrc/cuda", "csrc/bind")
    assert not offences(kernels, r"(?i)(batch|group|layer|instance|rms)_?norm(?!alization)")


def test_file_sizes_and_names() -> None:
    everything = [*files("csrc", "normkern", "tests", "bench"), ROOT / "setup.py"]
    long = {str(p.relative_to(ROOT)): n for p in everything if (n := len(p.read_text().splitlines())) > 600}
    assert not long
    vague = [str(p.relative_to(ROOT)) for p in everything if re.search(r"util|common|helper|impl\b|misc", p.stem)]
    assert not vague


def test_no_path_of_a_machine() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        pytest.skip("not a git checkout")
    places = re.compile(r"(?<![\w.*])/(?:root|home|tmp|work)/\w")
    named = []
    for name in listed.stdout.split():
        path = ROOT / name
        if path.name == "test_layering.py" or not path.exists():
            continue
        text = path.read_bytes().decode(errors="ignore")
        named += [f"{name}: {m[0]}" for m in places.finditer(text)]
    assert not named
