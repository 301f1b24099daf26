# The one long table of results: a row for every (case, provider, mode). bench/results/README.md explains the columns.
from __future__ import annotations

import csv
import datetime
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

import normkern


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()} threads"


@dataclass
class Row:
    kernel_name: str
    kernel_provider: str
    kernel_operation_mode: str
    metric: str
    x_name: str
    x_value: str
    y_20: float
    y_50: float
    y_80: float
    bytes: int | str = ""
    floor_us: float | str = ""
    fraction_of_copy: float | str = ""
    ratio_to_torch: float | str = ""
    dtype: str = ""
    layout: str = ""
    device: str = ""
    torch: str = torch.__version__
    normkern: str = normkern.__version__
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())


def text(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value


class Sheet:
    """Rows as they come, each on disk at once: a run that is cut short keeps what it has measured."""

    def __init__(self, path: Path | None) -> None:
        self.rows: list[Row] = []
        self.path = path
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow([column.name for column in fields(Row)])

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if self.path:
            with self.path.open("a", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow([text(value) for value in asdict(row).values()])
