# Benchmarks: pytest bench/bench_norms.py [--grid | --fused | --quick] [--table] [--device cuda]
#             [--dtypes float32,bfloat16] [--threads N] [--csv FILE]
from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "tests")]

from cases import SHAPES  # noqa: E402

from normkern.bench.layers import LAYOUTS, OPS, Layer, everything, fused, real  # noqa: E402
from normkern.bench.race import has_replays, keep_memory  # noqa: E402
from normkern.bench.sheet import Sheet  # noqa: E402


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


def identifier(name: str, layer: Layer) -> str:
    shape = "x".join(map(str, layer.shape))
    parts = [name.replace(" ", "_"), layer.op + ("" if layer.training else "_eval"), layer.layout, layer.dtype, shape]
    return "-".join(parts)


def table(dtypes: tuple[str, ...]) -> Iterator[tuple[str, Layer]]:
    """The shapes that the tests are made of: too small to time kernels, they show the cost of a call."""
    for norm, shapes in SHAPES.items():
        if f"{norm}_norm" not in OPS:
            continue
        for shape, option in shapes:
            layer = Layer(f"{norm}_norm", shape, **{"groups" if norm == "group" else "dims": option})
            for layout in LAYOUTS[layer.op]:
                if layout != "channels_last" or len(shape) > 2:
                    for dtype in dtypes:
                        yield "table", replace(layer, layout=layout, dtype=dtype)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "layer" in metafunc.fixturenames:
        option = metafunc.config.getoption
        on_gpu = option("--device").startswith("cuda")
        in_groups = option("--grid") or option("--fused")
        dtypes = tuple((option("--dtypes") or ("float32,bfloat16" if on_gpu or in_groups else "float32")).split(","))
        if in_groups:
            found = [*(everything(dtypes) if option("--grid") else ()), *(fused(dtypes) if option("--fused") else ())]
        else:
            found = [*real(option("--quick"), on_gpu, dtypes), *(table(dtypes) if option("--table") else ())]
        metafunc.parametrize("mode", ["forward", "step" if in_groups else "backward"])
        device = torch.device(option("--device"))
        rows = []
        for name, layer in found:
            rows.append(pytest.param(layer, False, id=identifier(name, layer)))
            if has_replays(layer, device):
                rows.append(pytest.param(layer, True, id=identifier(name, layer) + "-replay"))
        metafunc.parametrize(("layer", "replays"), rows)


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return torch.device(pytestconfig.getoption("--device"))


@pytest.fixture(scope="session")
def sheet(pytestconfig: pytest.Config) -> Sheet:
    """Rows that end up in the file of --csv."""
    path = pytestconfig.getoption("--csv")
    return Sheet(Path(path).absolute() if path else None)
