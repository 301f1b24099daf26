"""show.py: a run of benchmarks as it looks in a terminal: a progress bar, a growing table, who was absent and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from normkern.bench.layers import OPS, REAL, Layer
from normkern.bench.peers import OURS, PEERS, absent, on_backend, peers
from normkern.bench.race import Race, has_replays, keep_memory
from normkern.bench.race import run as run_race
from normkern.bench.sheet import Row, Sheet, device_name

LIVE_ROWS = 12  # of the growing table; the whole of it is printed at the end


@dataclass(frozen=True)
class Contest:
    """What is run: every layer in every mode, with the named rivals, on one device."""

    layers: Sequence[Layer]
    modes: Sequence[str]
    names: tuple[str, ...]
    backend: str | None
    device: torch.device


COLUMNS = ("norm", "shape", "layout", "dtype", "mode")


def _table(title: str, lines: Sequence[Sequence[str]]) -> Table:
    """Columns that say the same in every line are named in the title instead."""
    same = [len({line[number] for line in lines}) == 1 and len(lines) > 1 for number in range(len(COLUMNS))]
    words = [lines[0][number] for number, one in enumerate(same) if one]
    table = Table(box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", padding=(0, 1, 0, 0))
    table.title = ", ".join([title, *words])
    for column, one in zip(COLUMNS, same, strict=True):
        if not one:
            table.add_column(column, no_wrap=True)
    for column in ("ms", "20–80 %", "of a copy", "times as fast as"):
        table.add_column(column, justify="right", no_wrap=column != "of a copy")
    for line in lines:
        table.add_row(*(cell for number, cell in enumerate(line) if number >= len(COLUMNS) or not same[number]))
    return table


def _line(layer: Layer, rows: Sequence[Row], suffix: str) -> list[str]:
    """One line of the table: normkern's median, the range of its middle 60 % of rounds, and who is how much slower.
    `suffix` follows the name of the mode."""
    by_name = {row.kernel_provider: row for row in rows}
    ours = by_name["normkern"]
    ratios = []
    for name, row in by_name.items():
        if name not in ("normkern", "copy"):
            ratio = row.y_50 / ours.y_50
            style = "green" if ratio >= 1.05 else "red" if ratio < 0.95 else "default"
            ratios.append(f"{name} [{style}]{ratio:.2f}[/]")
    spread = f"{ours.y_20:.3g}–{ours.y_80:.3g}"
    cells = [layer.name, layer.size, layer.layout, layer.dtype, ours.kernel_operation_mode + suffix]
    return [*cells, f"{ours.y_50:.3g}", spread, f"{float(ours.fraction_of_copy):.2f}", "\n".join(ratios)]


def list_peers(device: torch.device, console: Console) -> None:
    """Every rival, and for which norms it runs on this device or why it does not."""
    table = Table(title=f"Rivals on {device}", box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for column in ("rival", "runs", "why not"):
        table.add_column(column)
    examples = {op: next(layer for _, layer in REAL if layer.op == op) for op in OPS}
    for name, peer in PEERS.items():
        reasons = {op: peer.why_not(layer, device) for op, layer in examples.items()}
        runs = [op for op, reason in reasons.items() if reason is None]
        why = dict.fromkeys(reason for reason in reasons.values() if reason is not None)
        table.add_row(name, "all" if len(runs) == len(OPS) else ", ".join(runs) or "no norm", "; ".join(why))
    console.print(table)


def run(contest: Contest, seconds: float, out: Path | None, console: Console) -> list[Row]:
    """Race every layer, show the table as it grows, write rows to `out` as they come; the rows."""
    keep_memory()
    sheet = Sheet(out)
    lines: list[list[str]] = []
    missing: dict[str, dict[str, None]] = {}
    columns = (TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, TimeRemainingColumn(), console=console)
    task = progress.add_task("", total=len(contest.layers) * len(contest.modes))
    title = f"normkern on {device_name(contest.device)}"
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        for layer in contest.layers:
            rivals = [peer for peer in peers(layer, contest.device, contest.names) if peer.name not in OURS]
            for name, why in absent(layer, contest.device, contest.names).items():
                missing.setdefault(name, {})[why] = None
            if contest.backend is not None:
                rivals.append(on_backend(contest.backend))
            else:
                rivals += peers(layer, contest.device, ("normkern",))
                rivals += [one for one in peers(layer, contest.device, contest.names) if one.name == "normkern_triton"]
            for mode in contest.modes:
                progress.update(task, description=f"{layer.name} {layer.size} {mode}")
                live.update(Group(_table(title, lines[-LIVE_ROWS:]), progress))
                for replays in (False, True) if has_replays(layer, contest.device) else (False,):
                    race = Race(layer, mode, rivals, contest.device, replays)
                    rows = run_race(race, seconds)
                    for row in rows:
                        sheet.add(row)
                    suffix = " replay" if replays else ""
                    for name, why in race.failed.items():
                        missing.setdefault(f"{name} ({layer.op} {mode}{suffix})", {})[why] = None
                    lines.append(_line(layer, rows, suffix))
                progress.advance(task)
    console.print(_table(title, lines))
    for name, reasons in missing.items():
        console.print(f"not here: {name}: {'; '.join(reasons)}", style="dim", markup=False, highlight=False)
    if out is not None:
        console.print(f"{len(sheet.rows)} rows in {out}; plots and a page: python -m normkern report {out}")
    return sheet.rows
