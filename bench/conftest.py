# Benchmarks: pytest bench/bench_norms.py [--grid | --fused | --quick] [--table] [--device cuda]
#             [--dtypes float32,bfloat16] [--threads N] [--csv FILE]
from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "tests")]

from cases import Case  # noqa: E402
from sheet import Sheet  # noqa: E402
from sizes import fused, grid, layers  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("normkern")
    group.addoption("--quick", action="store_true", help="few layers")
    group.addoption("--grid", action="store_true", help="every norm in both layouts, small and large; forward and step")
    group.addoption("--fused", action="store_true", help="norm + residual + activation; forward and step")
    group.addoption("--threads", type=int, help="CPU threads; default torch's")
    group.addoption("--table", action="store_true", help="also the small odd shapes of tests/cases.py")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--dtypes", help="comma-separated; default float32, and bfloat16 on a GPU")
    group.addoption("--csv", help="file for the long table of results")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")  # here and nowhere else: `pytest` alone runs the tests
    if threads := config.getoption("--threads"):
        torch.set_num_threads(threads)
    keep_memory()


def keep_memory() -> None:
    """Freed tensors stay with the process, as with the allocator of a GPU: page faults are not what is measured."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        mmap_threshold, trim_threshold = -3, -1  # of mallopt(3)
        libc.mallopt(mmap_threshold, 2**31 - 1)
        libc.mallopt(trim_threshold, 2**31 - 1)


def identifier(layer: str, case: Case) -> str:
    shape = "x".join(map(str, case.shape))
    return f"{layer.replace(' ', '_')}-{case.norm}{'' if case.training else '_eval'}-{case.layout}-{case.dtype}-{shape}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        option = metafunc.config.getoption
        on_gpu = option("--device").startswith("cuda")
        in_groups = option("--grid") or option("--fused")
        dtypes = tuple((option("--dtypes") or ("float32,bfloat16" if on_gpu or in_groups else "float32")).split(","))
        if in_groups:
            found = [*(grid(dtypes) if option("--grid") else ()), *(fused(dtypes) if option("--fused") else ())]
        else:
            found = list(layers(option("--quick"), on_gpu, dtypes, option("--table")))
        metafunc.parametrize("mode", ["forward", "step" if in_groups else "backward"])
        metafunc.parametrize("case", [pytest.param(case, id=identifier(name, case)) for name, case in found])


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return torch.device(pytestconfig.getoption("--device"))


@pytest.fixture(scope="session")
def sheet(pytestconfig: pytest.Config) -> Sheet:
    """Rows that end up in the file of --csv."""
    path = pytestconfig.getoption("--csv")
    return Sheet(Path(path).absolute() if path else None)
