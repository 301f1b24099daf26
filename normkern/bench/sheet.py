"""sheet.py: the one long table of results, a row for every (layer, provider, mode). bench/results/README.md in the
repository and the documentation explain the columns.
"""

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
    provider_version: str = ""


COLUMNS = tuple(column.name for column in fields(Row))


def text(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value


class Sheet:
    """Rows as they come, each on disk at once: a run that is cut short keeps what it has measured. Without a path they
    are kept in memory alone."""

    def __init__(self, path: Path | None) -> None:
        self.rows: list[Row] = []
        self.path = path
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow(COLUMNS)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if self.path:
            with self.path.open("a", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow([text(value) for value in asdict(row).values()])
