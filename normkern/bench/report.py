"""report.py: CSV files of results as plots (PNG) and one HTML page that needs nothing beside it."""

from __future__ import annotations

import base64
import csv
import html
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from normkern.bench import plots
from normkern.bench.plots import RowOf, geometric_mean
from normkern.bench.sheet import COLUMNS

NEEDED = set(COLUMNS) - {"provider_version"}  # files of older versions have all but that
MEANING = ("kernel_name", "kernel_provider", "kernel_operation_mode", "metric", "dtype", "layout", "device")
DPI = 120


@dataclass(frozen=True)
class Picture:
    name: str  # of the file, without .png
    caption: str
    figure: Figure


def read(files: Iterable[Path]) -> list[RowOf]:
    """Rows of all files; where two have the same meaning, the later one. Raises ValueError for a file that is no such
    table."""
    found: dict[tuple[str, ...], RowOf] = {}
    for path in files:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            missing = NEEDED - set(reader.fieldnames or ())
            if missing:
                raise ValueError(
                    f"report: {path} is no table of results: it has no column {', '.join(sorted(missing))}"
                )
            for row in reader:
                # The value of an overhead is a measurement; everywhere else x says what is varied.
                at = "" if row["metric"] == "overhead_us" else row["x_value"]
                key = (*(row[name] for name in MEANING), at)
                found[key] = row
    return list(found.values())


def _slug(device: str, dtype: str = "") -> str:
    return re.sub(r"[^a-z0-9]+", "_", f"{device} {dtype}".lower()).strip("_")


def _where(rows: Sequence[RowOf]) -> str:
    versions = " / ".join(dict.fromkeys(row["torch"] for row in rows))
    dates = sorted({row["date"] for row in rows})
    device = rows[0]["device"].replace(" 1 threads", " 1 thread")
    return f"{device}, torch {versions}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}"


def _by(rows: Iterable[RowOf], column: str) -> dict[str, list[RowOf]]:
    groups: dict[str, list[RowOf]] = {}
    for row in rows:
        groups.setdefault(row[column], []).append(row)
    return groups


def _speedups(rows: Sequence[RowOf], name: str, caption: str, title: str) -> Iterator[Picture]:
    """By device and dtype, who is how many times as fast as torch."""
    rated = [row for row in rows if row["ratio_to_torch"]]
    for device, of in _by(rated, "device").items():
        for dtype, rows_of in _by(of, "dtype").items():
            if any(row["kernel_provider"] not in ("torch", "copy") for row in rows_of):
                made = plots.speedup(rows_of, f"{title} against torch, {dtype}, {_where(rows_of)}")
                yield Picture(f"{name}_{_slug(device, dtype)}", f"{caption}; {dtype}.", made)


def pictures(rows: Sequence[RowOf]) -> Iterator[Picture]:
    """Every figure that the rows allow."""
    speeds = [row for row in rows if row["metric"] == "speed_ms"]
    offset_rows = [row for row in rows if row["metric"] == "relative_error_output" and row["dtype"] == "float32"]
    plain = _by((row for row in speeds if row["ratio_to_torch"]), "device")
    if offset_rows and plain:
        of = max(plain.values(), key=len)
        # Bare norms where there are some: what is fused with them has a plot of its own.
        bare = [row for row in of if row["kernel_name"].removesuffix("+eval").isidentifier()] or of
        caption = "Left: relative error of the output as the mean of the input grows. Right: speed against torch."
        yield Picture("overview", caption, plots.overview(offset_rows, bare, f"normkern on {_where(bare)}"))
    for device, of in _by(speeds, "device").items():
        caption = "Rate at which the least bytes of a layer move, against a plain copy of its input in the same rounds."
        yield Picture(f"roofline_{_slug(device)}", caption, plots.roofline(of, f"Memory rate, {_where(of)}"))
    yield from _speedups(speeds, "speedup", "Torch's median time over each rival's; the rivals took turns", "Speed")
    replays = [row for row in rows if row["metric"] == "replay_ms"]
    caption = "Torch's median time over each rival's, of replays of CUDA graphs: kernels without the cost of the call"
    yield from _speedups(replays, "replays", caption, "Speed from CUDA graphs")
    for device, of in _by(offset_rows, "device").items():
        caption = "Relative error (L2) against float64 on the same rounded input, as the mean of the input grows."
        yield Picture(f"offset_{_slug(device)}", caption, plots.offsets(of, f"Error and offset, {_where(of)}"))
    ulps = [row for row in rows if row["metric"] == "ulp_error"]
    for device, of in _by((row for row in ulps if row["dtype"] == "float32"), "device").items():
        caption = "How many elements are how far from float64, in units in the last place of each one's largest term."
        yield Picture(
            f"ulp_{_slug(device)}", caption, plots.ulp_histograms(of, f"Errors in ulp, float32, {_where(of)}")
        )
    for device, of in _by((row for row in ulps if row["dtype"] != "float32"), "device").items():
        caption = "Share of float16 and bfloat16 results that are not the float64 result, rounded once."
        made = plots.misrounded(of, f"Not correctly rounded, {_where(of)}")
        yield Picture(f"rounding_{_slug(device)}", caption, made)
    for device, of in _by((row for row in rows if row["metric"] == "overhead_us"), "device").items():
        caption = "What a call costs where there is nothing to compute."
        yield Picture(f"overhead_{_slug(device)}", caption, plots.overhead(of, f"Cost of a call, {_where(of)}"))
    timed = [row for row in rows if row["metric"] == "cpu_ms" and row["kernel_operation_mode"]]
    caption = "CPU time of the formula in torch's operators over each rival's, a training step"
    yield from _speedups(timed, "family", caption, "Speed by CPU time")
    convolved = [row for row in rows if row["kernel_name"] in ("spectrum", "conv_norm layer")]
    for device, of in _by(convolved, "device").items():
        caption = "ConvNorm: its spectrum against an FFT of every padded kernel, its layer against torch's pair."
        yield Picture(f"conv_norm_{_slug(device)}", caption, plots.conv_norm(of, f"ConvNorm, {_where(of)}"))


SPEED_OF = "times torch's speed, geometric mean"
SUMMARY_HEAD = (
    "norm",
    "rows",
    "times torch's speed, geometric mean",
    "from – to",
    "rows below 1",
    "fraction of a copy",
)


def summary(rows: Iterable[RowOf]) -> list[list[str]]:
    """normkern against torch, norm by norm: a line for each norm and dtype, and one for all."""
    ours = [row for row in rows if row["metric"] == "speed_ms" and row["kernel_provider"] == "normkern"]
    ours = [row for row in ours if row["ratio_to_torch"]]
    groups: dict[str, list[RowOf]] = {}
    for row in ours:
        groups.setdefault(f"{row['kernel_name']}, {row['dtype']}", []).append(row)
    lines = []
    for name, of in {**groups, "all": ours}.items():
        if of:
            ratios = [float(row["ratio_to_torch"]) for row in of]
            copies = [float(row["fraction_of_copy"]) for row in of]
            spread = f"{min(ratios):.2f} – {max(ratios):.2f}"
            below = str(sum(ratio < 1 for ratio in ratios))
            share = f"{min(copies):.2f} – {max(copies):.2f}"
            lines.append([name, str(len(of)), f"{geometric_mean(ratios):.2f}", spread, below, share])
    return lines


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; font-size: 13px; margin: 1rem 0; } th, td { padding: .15rem .6rem; text-align: right;
border-bottom: 1px solid #ddd; } th:first-child, td:first-child { text-align: left; } th { background: #f4f4f4; }
figure { margin: 2rem 0; } img { max-width: 100%; } figcaption { color: #555; } details { margin: 1rem 0; }
"""


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    def cells(tag: str, line: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line) + "</tr>"

    return f"<table>{cells('th', head)}{''.join(cells('td', line) for line in lines)}</table>"


def page(rows: Sequence[RowOf], shown: Sequence[tuple[Picture, bytes]]) -> str:
    """The HTML page, pictures inside."""
    parts = ["<!doctype html><html lang=en><meta charset=utf-8><title>normkern: results</title>"]
    parts.append(f"<style>{STYLE}</style><h1>normkern: results</h1><ul>")
    for of in _by(rows, "device").values():
        parts.append(f"<li>{html.escape(_where(of))}; normkern {html.escape(of[0]['normkern'])}; {len(of)} rows</li>")
    parts.append("</ul>")
    for device, of in _by((row for row in rows if row["metric"] == "speed_ms"), "device").items():
        if lines := summary(of):
            parts.append(f"<h2>Against torch, {html.escape(device)}</h2>{_table(SUMMARY_HEAD, lines)}")
    for picture, png in shown:
        source = base64.b64encode(png).decode()
        parts.append(f'<figure><img alt="{html.escape(picture.caption)}" src="data:image/png;base64,{source}">')
        parts.append(f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>")
    parts.append("<h2>All rows</h2>")
    for metric, of in _by(rows, "metric").items():
        head = [column for column in COLUMNS if any(row.get(column) for row in of)]
        cells = ([row.get(column) or "" for column in head] for row in of)
        parts.append(
            f"<details><summary>{html.escape(metric)}: {len(of)} rows</summary>{_table(head, cells)}</details>"
        )
    return "\n".join(parts)


def write(files: Sequence[Path], out: Path) -> list[Path]:
    """PNG files and report.html in the directory `out`; their paths. Raises ValueError where a file is no table of
    results, or there is nothing in them to draw."""
    rows = read(files)
    shown: list[tuple[Picture, bytes]] = []
    for picture in pictures(rows):
        buffer = io.BytesIO()
        picture.figure.savefig(buffer, format="png", dpi=DPI)
        shown.append((picture, buffer.getvalue()))
    if not shown:
        raise ValueError(f"report: there is nothing to draw in {', '.join(map(str, files))}")
    out.mkdir(parents=True, exist_ok=True)
    made = []
    for picture, png in shown:
        made.append(out / f"{picture.name}.png")
        made[-1].write_bytes(png)
    made.append(out / "report.html")
    made[-1].write_text(page(rows, shown), encoding="utf-8")
    return made
