# What the build leaves behind, and what it says where a tool is missing.
from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import normkern

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = sorted(Path(normkern.__file__).parent.glob("*.so"))
OPERATORS = [library for library in LIBRARIES if library.name.startswith("_C_")]
VERSION = re.search(r'(?m)^version = "(.+)"', (ROOT / "pyproject.toml").read_text())[1]  # type: ignore[index]

built = pytest.mark.skipif(not LIBRARIES, reason="no compiled kernels here")
in_sources = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not in a source tree")


def output_of(*command: object) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout


# ---- the libraries


@built
def test_build_info() -> None:
    from normkern import _host

    info = _host.build_info
    assert info["version"] == VERSION
    assert info["torch_target"] == "2.11"
    assert "baseline" in info["instruction_sets"]
    assert (info["cuda"] is not None) == any(library.name == "_C_cuda.so" for library in LIBRARIES)
    assert bool(info["cuda_architectures"]) == (info["cuda"] is not None)
    assert _host.cpu_instruction_set() in [*info["instruction_sets"], "neon"]


@built
def test_operators_are_registered_on_every_device_that_was_built() -> None:
    assert normkern.backends.BACKENDS["native"].why_not(torch.empty(1)) is None
    for key in ["CPU"] + ["CUDA"] * (len(OPERATORS) - 1):
        for name in ("forward", "backward", "moments"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"normkern::{name}", key)


# The operator libraries must load under any torch from 2.11 on, CPU or CUDA build, and under any Python.
@built
@pytest.mark.skipif(not shutil.which("readelf"), reason="needs readelf")
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name.split(".")[0])
def test_libraries_need_little(library: Path) -> None:
    dynamic = output_of("readelf", "-dW", library)
    needed = set(re.findall(r"NEEDED.*\[(.+?)\.so", dynamic))
    system = {
        "libstdc++",
        "libgcc_s",
        "libc",
        "libm",
        "libdl",
        "libpthread",
        "librt",
        "ld-linux-x86-64",
        "ld-linux-aarch64",
    }
    torchs = {"libtorch_cpu"} if library in OPERATORS else set()
    if library.name.startswith("_node."):  # loads under one torch alone
        torchs = {"libtorch_python", "libtorch_cpu", "libc10"}
    assert needed - system == torchs
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic)
    if library in OPERATORS:
        undefined = [line for line in output_of("readelf", "-sW", library).splitlines() if " UND " in line]
        assert not [line for line in undefined if re.search(r"_ZNK?(2at|3c10|5torch)|\bPy[A-Z_]", line)]


@built
@pytest.mark.skipif(not OPERATORS, reason="no operator libraries")
def test_instruction_set_can_be_chosen() -> None:
    environment = {**os.environ, "NORMKERN_CPU": "baseline"}
    program = "import _host, sys; print(_host.cpu_instruction_set(), 'torch' in sys.modules)"
    command, package = [sys.executable, "-c", program], LIBRARIES[0].parent
    said = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=package)
    assert said.stdout.split() == ["baseline", "False"], said.stderr


# An operator called directly, past Python's checks, must refuse what would read or write out of bounds.
@built
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"stats": [8, 1, 1, 17]}, "the extents of stats must multiply to 128"),
        ({"affine": [1, 8, -16, -1]}, "the extents of affine must multiply to 128"),
        ({"stats": [8, 1, 16]}, "must hold batch, rows, keep and cols"),
        ({"weight": torch.ones(15)}, "weight must be contiguous with 16 elements"),
        ({"bias": torch.ones(32)[::2]}, "bias must be contiguous"),
        ({"weight": torch.ones(16, dtype=torch.int32)}, "weight must be float64"),
        ({"residual": torch.ones(16, 8).t()}, "residual must have x's sizes, strides and dtype"),
        ({"residual": torch.ones(8, 16, dtype=torch.float64)}, "residual must have x's sizes"),
        ({"x": torch.ones(8, 32)[:, ::2]}, "x must be dense"),
        ({"x": torch.ones(8, 16, dtype=torch.int64)}, "x must be float64"),
        ({"moments": 2}, "given moments need mean and var"),
        ({"moments": 3}, "moments must be 0 to 2"),
        ({"act": -1}, "act must be 0 to 4"),
    ],
)
def test_operators_guard_memory(change: dict[str, object], says: str) -> None:
    call: dict[str, object] = {
        "x": torch.ones(8, 16), "weight": None, "bias": None, "residual": None, "mean": None, "var": None,
        "stats": [8, 1, 1, 16], "affine": [1, 8, 16, 1], "moments": 0, "act": 0, "eps": 1e-5, "save": True,
    }  # fmt: skip
    torch.ops.normkern.forward(**call)
    with pytest.raises(RuntimeError, match=says):
        torch.ops.normkern.forward(**{**call, **change})


# ---- the source distribution


@in_sources
def test_sdist_holds_what_a_build_needs(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    directories = ("csrc", "cmake", "normkern", "tests", "bench", "docs")
    sources = [p for d in directories for p in (ROOT / d).rglob("*.*") if p.is_file() and p.name != "report.html"]
    wanted = {
        str(p.relative_to(ROOT)) for p in sources if p.suffix not in (".so", ".pyc") and "build" not in p.parts[:-1]
    } | {"CMakeLists.txt", "pyproject.toml", "setup.py", "README.md", "LICENSE", "Makefile"}
    assert not wanted - held
    assert not [name for name in held if name.endswith((".so", ".o"))]


# ---- messages


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs setup.py in a copy of the tree, with only the named tools on PATH."""
    tree = tmp_path / "tree"
    for name in ("csrc", "cmake", "normkern"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)

    def run(tools: str, **variables: str) -> subprocess.CompletedProcess[str]:
        path = tmp_path / "bin"
        path.mkdir()
        for tool in tools.split():
            real = shutil.which(tool)
            if not real:
                pytest.skip(f"needs {tool}")
            (path / tool).symlink_to(real)
        kept = {k: v for k, v in os.environ.items() if not re.match(r"NORMKERN|CUDA|CXX|TORCH|CMAKE", k)}
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        environment = {**kept, "PATH": str(path), **variables}
        return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)

    return run


def last_sentence(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode != 0
    return done.stderr.strip().splitlines()[-1]


def fake_torch(directory: Path, version: str, cuda: str | None) -> str:
    (directory / "include").mkdir(parents=True)
    (directory / "version.py").write_text(f"__version__ = '{version}'\ncuda: Optional[str] = {cuda!r}\n")
    return str(directory)


def fake_nvcc(path: Path, release: str) -> str:
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    path.chmod(0o755)
    return str(path)


TOOLS = "cmake c++ cc ld as ar ranlib nm ninja sh uname"


@in_sources
def test_without_a_compiler_the_package_is_pure_python(build: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = build("cmake")
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler was found, so the package is installed without its kernels" in done.stdout + done.stderr


@in_sources
def test_without_a_compiler_kernels_that_were_asked_for_fail(
    build: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    sentence = last_sentence(build("cmake", NORMKERN_CUDA="1"))
    assert sentence == "normkern: NORMKERN_CUDA=1 needs a C++ compiler and none was found; install g++ or set CXX"


@in_sources
def test_without_cmake(build: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    sentence = last_sentence(build("c++"))
    assert (
        sentence
        == "normkern: CMake 3.22 or later was not found; `pip install cmake`, or leave out --no-build-isolation"
    )


@in_sources
def test_without_torch(build: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    sentence = last_sentence(build(TOOLS, NORMKERN_TORCH_DIR=str(tmp_path / "nowhere")))
    assert sentence.startswith("normkern: PyTorch was not found for the build; first `pip install torch`")


@in_sources
def test_with_an_old_torch(build: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    sentence = last_sentence(build(TOOLS, NORMKERN_TORCH_DIR=fake_torch(tmp_path / "torch", "2.9.1+cpu", None)))
    assert sentence == "normkern: PyTorch 2.9.1+cpu is too old; install torch>=2.11"


@in_sources
def test_without_nvcc(build: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    torch_directory = fake_torch(tmp_path / "torch", "2.13.0", None)
    sentence = last_sentence(
        build(TOOLS, NORMKERN_CUDA="1", NORMKERN_TORCH_DIR=torch_directory, CUDACXX=str(tmp_path / "no-nvcc"))
    )
    assert sentence.startswith("normkern: NORMKERN_CUDA asks for the CUDA kernels but nvcc was not found; install")


@in_sources
def test_with_another_cuda_than_torch(build: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    torch_directory = fake_torch(tmp_path / "torch", "2.13.0+cu130", "13.0")
    nvcc = fake_nvcc(tmp_path / "nvcc", "12.4")
    sentence = last_sentence(build(TOOLS, NORMKERN_TORCH_DIR=torch_directory, CUDACXX=nvcc))
    assert sentence == (
        "normkern: nvcc is of CUDA 12.4 but PyTorch is built for CUDA 13.0; set CUDACXX to the nvcc of a CUDA 13 "
        "toolkit, or NORMKERN_CUDA=0 for the CPU kernels alone"
    )


@in_sources
def test_with_a_mistyped_architecture(build: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    torch_directory = fake_torch(tmp_path / "torch", "2.13.0+cu130", "13.0")
    nvcc = fake_nvcc(tmp_path / "nvcc", "13.0")
    sentence = last_sentence(
        build(TOOLS, NORMKERN_TORCH_DIR=torch_directory, CUDACXX=nvcc, TORCH_CUDA_ARCH_LIST="9.0 hopper")
    )
    assert sentence.startswith("normkern: TORCH_CUDA_ARCH_LIST holds 'hopper', which is not like 9.0")


@in_sources
def test_torch_is_found_without_importing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NORMKERN_TORCH_DIR", raising=False)
    setup = runpy.run_path(str(ROOT / "setup.py"))
    assert setup["find_torch"]() == Path(torch.__file__).parent
