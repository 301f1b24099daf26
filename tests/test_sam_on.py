# examples/sam_on.py: it runs, writes what it says, and reads CIFAR-100's binary format.
from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("rich")
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import sam_on


def test_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    full = sam_on.digits()
    small = sam_on.Images("digits", full.x[:160], full.y[:160], full.test_x[:50], full.test_y[:50], 10)
    monkeypatch.setattr(sam_on, "digits", lambda: small)
    threads = torch.get_num_threads()
    try:
        sam_on.main(["--quick", "--epochs", "1", "--seeds", "2", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    assert "SAM-no-norm" in capsys.readouterr().out
    with (tmp_path / "sam_on.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 4 * 3
    assert {row["method"] for row in rows} == {"SGD", "SAM-all", "SAM-ON", "SAM-no-norm"}
    for row in rows:
        low, high = {"accuracy": (0, 1), "sharpness": (-0.1, 10), "CPU ms per step": (0, 1e6)}[row["metric"]]
        assert low <= float(row["value"]) <= high, row


def cifar_file(path: Path, pixels: torch.Tensor, labels: list[int]) -> None:
    """In the published format: coarse label, fine label, then red, green and blue by rows."""
    with path.open("wb") as file:
        for image, label in zip(pixels, labels, strict=True):
            file.write(bytes([label // 5, label]) + bytes(image.flatten().tolist()))


def test_cifar100_format(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (7, 3, 32, 32), generator=generator, dtype=torch.uint8)
    cifar_file(tmp_path / "train.bin", pixels[:5], [3, 99, 0, 3, 42])
    cifar_file(tmp_path / "test.bin", pixels[5:], [7, 3])
    data = sam_on.cifar100(tmp_path)
    assert data.y.tolist() == [3, 99, 0, 3, 42]
    assert data.test_y.tolist() == [7, 3]
    assert data.x.shape == (5, 3, 32, 32)
    assert float(data.x.mean()) == pytest.approx(0, abs=1e-5)
    # The test images by the mean and deviation of the training images.
    train = pixels[:5].double() / 255
    mean, std = train.mean((0, 2, 3), keepdim=True), train.std((0, 2, 3), keepdim=True)
    torch.testing.assert_close(data.test_x.double(), (pixels[5:].double() / 255 - mean) / std, rtol=1e-4, atol=1e-5)
    moved = sam_on.augmented(data.x, generator)
    assert moved.shape == data.x.shape
    (tmp_path / "test.bin").write_bytes(bytes(3073))
    with pytest.raises(ValueError, match=r"test.bin must hold images of 3074 bytes; got 3073 bytes"):
        sam_on.cifar100(tmp_path)
