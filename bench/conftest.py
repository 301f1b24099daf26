# Benchmarks: pytest bench/bench_norms.py [--quick] [--table] [--device cuda] [--dtypes float32,bfloat16] [--csv FILE]
from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "tests")]

from cases import Case  # noqa: E402
from sheet import Sheet  # noqa: E402
from sizes import layers  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("normkern")
    group.addoption("--quick", action="store_true", help="few layers")
    group.addoption("--table", action="store_true", help="also the small odd shapes of tests/cases.py")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--dtypes", help="comma-separated; default float32, and bfloat16 on a GPU")
    group.addoption("--csv", help="file for the long table of results")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")  # here and nowhere else: `pytest` alone runs the tests


def identifier(layer: str, case: Case) -> str:
    return f"{layer.replace(' ', '_')}-{case.layout}-{case.dtype}-{'x'.join(map(str, case.shape))}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        option = metafunc.config.getoption
        on_gpu = option("--device").startswith("cuda")
        dtypes = option("--dtypes") or ("bfloat16,float32" if on_gpu else "float32")
        found = list(layers(option("--quick"), on_gpu, tuple(dtypes.split(",")), option("--table")))
        metafunc.parametrize("case", [pytest.param(case, id=identifier(name, case)) for name, case in found])


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return torch.device(pytestconfig.getoption("--device"))


@pytest.fixture(scope="session")
def sheet(pytestconfig: pytest.Config) -> Sheet:
    """Rows that end up in the file of --csv."""
    path = pytestconfig.getoption("--csv")
    return Sheet(Path(path).absolute() if path else None)
