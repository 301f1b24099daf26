# The examples run from the command line's door to the CSV and the figure, cut down to a few of their networks.
from __future__ import annotations

import csv
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
pytest.importorskip("sklearn")
pytest.importorskip("rich")


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module = importlib.import_module(name)
    monkeypatch.delitem(sys.modules, name)
    return module


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def check_figure(path: Path) -> None:
    if importlib.util.find_spec("matplotlib"):
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_beyond_batchnorm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("beyond_batchnorm", monkeypatch)
    methods = ("batch norm", "filter response", "none")
    monkeypatch.setattr(example, "METHODS", {name: example.METHODS[name] for name in methods})
    monkeypatch.setattr(example, "SIZES", (2, 32))
    monkeypatch.setattr(example, "BLOCKS", 4)
    example.main(["--quick", "--epochs", "1", "--out", str(tmp_path)])
    found = rows(tmp_path / "beyond_batchnorm.csv")
    for metric, count in (
        ("variance to that of block 1", 3 * 4),
        ("similarity", 2 * example.DEPTH),
        ("squared gradient to the last layer's", 2 * example.DEPTH),
        ("training accuracy", 3 + 2),
        ("test accuracy", 3),
    ):
        assert sum(row["metric"] == metric for row in found) == count
    assert all(float(row["value"]) > 0.05 for row in found if "accuracy" in row["metric"])
    check_figure(tmp_path / "beyond_batchnorm.png")


@pytest.mark.slow
def test_landscape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("landscape", monkeypatch)
    monkeypatch.setattr(example, "NORMS", {name: example.NORMS[name] for name in ("none", "batch norm", "L1 norm")})
    monkeypatch.setattr(example, "LINEAR_LAYERS", 3)
    example.main(["--quick", "--steps", "6", "--out", str(tmp_path)])
    found = rows(tmp_path / "landscape.csv")
    looked_at = [row for row in found if row["metric"] == "beta-smoothness"]
    assert len(looked_at) == 3 * 6 + 2 * 3  # every step of the digits, every second one of the linear network
    assert all(float(row["value"]) > 0 for row in looked_at)
    assert all(-1 <= float(row["value"]) <= 1 for row in found if row["metric"] == "shift, cosine")
    check_figure(tmp_path / "landscape.png")
