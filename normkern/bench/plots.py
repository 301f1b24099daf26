"""plots.py: tables of results as pictures. Every function draws one figure from rows of sheet.py, read from CSV."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

RowOf = dict[str, str]

COLORS = {
    "normkern": "tab:blue",
    "torch": "tab:red",
    "copy": "0.45",
    "cudnn": "tab:green",
    "normkern_triton": "tab:cyan",
    "torch_compile": "tab:orange",
    "cudnn_frontend": "tab:olive",
    "liger": "tab:purple",
    "quack": "tab:brown",
    "apex": "tab:pink",
    "timm": "tab:orange",
}
MARKERS = "osD^vP*X"
LINES = {"contiguous": "-", "channels_last": "--"}


def _color(provider: str) -> str:
    return COLORS.get(provider, "0.2")


def _values(rows: Iterable[RowOf], column: str) -> list[str]:
    """Different values in the order in which they come."""
    return list(dict.fromkeys(row[column] for row in rows))


def _base(row: RowOf) -> str:
    return row["kernel_name"].partition("+")[0]


def _times(value: float, _: object = None) -> str:
    return f"{value:g}×" if value >= 1 else f"{value:.2g}×"


def _ratio_axis(axes: Axes, least: float, most: float) -> None:
    """A logarithmic axis of ratios, ticks at powers of two, a line at 1."""
    axes.set_xscale("log", base=2)
    low, high = math.floor(math.log2(min(least, 1)) - 0.1), math.ceil(math.log2(max(most, 1)) + 0.1)
    axes.set_xlim(2.0**low, 2.0**high)
    every = math.ceil((high - low) / 6)  # more labels than that run into each other
    axes.xaxis.set_major_locator(FixedLocator([2.0**power for power in range(low, high + 1) if power % every == 0]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(_times))
    axes.axvline(1, color=COLORS["torch"], linewidth=1)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def figure(width: float, height: float, title: str) -> Figure:
    made = Figure(figsize=(width, height), layout="constrained")
    made.suptitle("\n".join(textwrap.wrap(title, int(11 * width))), fontsize=11)  # 11 characters to an inch
    return made


# ---- speed


def roofline(rows: Sequence[RowOf], title: str) -> Figure:
    """Rate of memory against bytes moved, one panel for each mode and dtype; the line is the copy."""
    kinds = [(mode, dtype) for dtype in _values(rows, "dtype") for mode in _values(rows, "kernel_operation_mode")]
    norms = list(dict.fromkeys(_base(row) for row in rows if row["kernel_provider"] != "copy"))
    columns = min(2, len(kinds))
    lines = math.ceil(len(kinds) / columns)
    made = figure(5.2 * columns, 3.6 * lines + 0.5, title)
    panels = made.subplots(lines, columns, squeeze=False, sharey=True)
    for (mode, dtype), axes in zip(kinds, panels.flat, strict=False):
        here = [row for row in rows if (row["kernel_operation_mode"], row["dtype"]) == (mode, dtype)]
        copies: dict[float, list[float]] = {}
        for row in here:
            size, rate = float(row["bytes"]) / 1e6, float(row["bytes"]) / float(row["y_50"]) / 1e6
            provider = row["kernel_provider"]
            if provider == "copy":
                copies.setdefault(size, []).append(rate)
            else:
                marker = MARKERS[norms.index(_base(row)) % len(MARKERS)]
                axes.plot(size, rate, marker, color=_color(provider), markersize=4.5, alpha=0.75, markeredgewidth=0)
        line = sorted((size, median(rates)) for size, rates in copies.items())
        axes.plot([at for at, _ in line], [rate for _, rate in line], color=COLORS["copy"], linewidth=1.5, zorder=1)
        axes.set(xscale="log", yscale="log", title=f"{mode}, {dtype}", xlabel="bytes that must move [MB]")
        axes.grid(alpha=0.3)
    for axes in panels[:, 0]:
        axes.set_ylabel("rate [GB/s]")
    for axes in list(panels.flat)[len(kinds) :]:
        axes.set_visible(False)
    providers = [name for name in _values(rows, "kernel_provider") if name != "copy"]
    handles = [Line2D([], [], marker="o", linestyle="", color=_color(name), label=name) for name in providers]
    handles.append(Line2D([], [], color=COLORS["copy"], label="plain copy"))
    handles += [
        Line2D([], [], marker=MARKERS[number % len(MARKERS)], linestyle="", color="0.3", label=norm)
        for number, norm in enumerate(norms)
    ]
    made.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)), fontsize=8)
    return made


def speedup(rows: Sequence[RowOf], title: str) -> Figure:
    """Bars: torch's time over each rival's, a line for each layer, a panel for each mode."""
    modes = _values(rows, "kernel_operation_mode")
    providers = [name for name in _values(rows, "kernel_provider") if name not in ("torch", "copy")]
    layers = list(dict.fromkeys((row["kernel_name"], row["x_value"], row["layout"]) for row in rows))
    found = {
        (row["kernel_operation_mode"], row["kernel_provider"], row["kernel_name"], row["x_value"], row["layout"]): row
        for row in rows
    }
    ratios = [float(row["ratio_to_torch"]) for row in rows if row["kernel_provider"] in providers]
    made = figure(4.2 + 2.8 * len(modes), 1.4 + len(layers) * max(0.21, 0.12 * len(providers)), title)
    panels = made.subplots(1, len(modes), squeeze=False, sharey=True)[0]
    thick = 0.8 / len(providers)
    for mode, axes in zip(modes, panels, strict=True):
        for number, provider in enumerate(providers):
            for at, layer in enumerate(layers):
                row = found.get((mode, provider, *layer))
                if row is None:
                    continue
                ratio = float(row["ratio_to_torch"])
                where = at + (number - (len(providers) - 1) / 2) * thick
                label = provider if at == 0 else None
                axes.barh(where, ratio - 1, thick, left=1, color=_color(provider), label=label)
                if len(providers) == 1:
                    right = ratio >= 1
                    gap, side = (1.03, "left") if right else (0.97, "right")
                    axes.text(ratio * gap, at, f"{ratio:.2f}", va="center", ha=side, fontsize=6)
        axes.set(title=mode, xlabel="times torch's speed")
        _ratio_axis(axes, min(ratios), max(ratios) * 1.25)
    panels[0].set_yticks(range(len(layers)), [f"{name} {size} {layout}" for name, size, layout in layers], fontsize=7)
    panels[0].set_ylim(len(layers) - 0.4, -0.6)
    handles = [Line2D([], [], color=_color(name), linewidth=5, label=name) for name in providers]
    handles.append(Line2D([], [], color=COLORS["torch"], linewidth=1, label="torch"))
    made.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
    return made


def geometric_mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def _mean_speedups(axes: Axes, rows: Sequence[RowOf]) -> None:
    """By norm and dtype: the geometric mean of all shapes, layouts and modes, and the range."""
    ours = [row for row in rows if row["kernel_provider"] == "normkern"]
    names, dtypes = _values(ours, "kernel_name"), _values(ours, "dtype")
    thick = 0.8 / len(dtypes)
    every: list[float] = []
    for number, dtype in enumerate(dtypes):
        for at, name in enumerate(names):
            ratios = [
                float(row["ratio_to_torch"]) for row in ours if (row["kernel_name"], row["dtype"]) == (name, dtype)
            ]
            if not ratios:
                continue
            every += ratios
            mean, where = geometric_mean(ratios), at + (number - (len(dtypes) - 1) / 2) * thick
            color = ("tab:blue", "tab:cyan", "tab:olive", "tab:gray")[number % 4]
            axes.barh(where, mean - 1, thick, left=1, color=color, label=dtype if at == 0 else None)
            axes.plot([min(ratios), max(ratios)], [where, where], color="0.15", linewidth=1)
    axes.set_yticks(range(len(names)), [name.replace("+eval", ", eval") for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set(xlabel="times torch's speed: mean (bar), all layers (line)")
    _ratio_axis(axes, min(every), max(every))
    axes.legend(fontsize=8, loc="upper right")


# ---- errors


def _offset_curves(axes: Axes, rows: Sequence[RowOf], norm: str) -> None:
    curves: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        if row["kernel_name"] == norm:
            at = max(float(row["x_value"]), 1)  # 0 has no place on a logarithmic axis
            curves.setdefault((row["kernel_provider"], row["layout"]), []).append((at, float(row["y_50"])))
    for (provider, layout), points in curves.items():
        points.sort()
        label = f"{provider}, {layout.replace('_', ' ')}"
        axes.plot(
            [at for at, _ in points],
            [error for _, error in points],
            color=_color(provider),
            linestyle=LINES.get(layout, ":"),
            marker="o",
            markersize=3,
            label=label,
        )
    axes.set(title=norm, xscale="log", yscale="log", xlabel="mean/std of the input (0 shown at 1)")
    axes.grid(alpha=0.3)


OFFSET_LABEL = "relative error of the output (L2), float32"


def offsets(rows: Sequence[RowOf], title: str) -> Figure:
    """One panel for each norm: error of the output in float32 against mean/std, libraries and layouts."""
    norms = _values(rows, "kernel_name")
    made = figure(3.1 * len(norms), 3.6, title)
    panels = made.subplots(1, len(norms), sharey=True, squeeze=False)[0]
    for norm, axes in zip(norms, panels, strict=True):
        _offset_curves(axes, rows, norm)
    panels[0].set_ylabel(OFFSET_LABEL, fontsize=8)
    panels[0].legend(fontsize=7, handlelength=3)
    return made


def ulp_histograms(rows: Sequence[RowOf], title: str) -> Figure:
    """float32: how many elements are how many ulps off, a panel for each norm and layout."""
    kinds = list(dict.fromkeys((row["kernel_name"], row["layout"]) for row in rows))
    edges = [row["x_value"].split()[2] for row in rows if row["x_value"].startswith("at most")]
    edges = sorted(dict.fromkeys(edges), key=float)
    bins = [f"≤ {edges[0]}", *(f"{low}–{high}" for low, high in pairwise(edges)), f"> {edges[-1]}"]
    columns = min(4, len(kinds))
    lines = math.ceil(len(kinds) / columns)
    made = figure(3 * columns, 2.7 * lines + 0.6, title)
    panels = made.subplots(lines, columns, squeeze=False, sharey=True, sharex=True)
    for (norm, layout), axes in zip(kinds, panels.flat, strict=False):
        here = [row for row in rows if (row["kernel_name"], row["layout"]) == (norm, layout)]
        providers = _values(here, "kernel_provider")
        for number, provider in enumerate(providers):
            share = {row["x_value"]: float(row["y_50"]) for row in here if row["kernel_provider"] == provider}
            upto = [share[f"at most {edge} ulp"] for edge in edges] + [1.0]
            heights = [high - low for low, high in zip([0.0, *upto], upto, strict=False)]
            where = [at + (number - (len(providers) - 1) / 2) * 0.4 for at in range(len(bins))]
            axes.bar(where, heights, 0.4, color=_color(provider), label=provider)
        axes.set(title=f"{norm}, {layout.replace('_', ' ')}", yscale="log", ylim=(1e-6, 1.5))
        axes.set_xticks(range(len(bins)), bins, rotation=60, fontsize=7)
        axes.title.set_fontsize(9)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    for axes in panels[:, 0]:
        axes.set_ylabel("share of the elements", fontsize=8)
    for axes in panels[-1, :]:
        axes.set_xlabel("error [ulp of the largest term]", fontsize=8)
    for axes in list(panels.flat)[len(kinds) :]:
        axes.set_visible(False)
    panels[0, 0].legend(fontsize=8)
    return made


def misrounded(rows: Sequence[RowOf], title: str) -> Figure:
    """float16 and bfloat16: the share of elements that are not the correctly rounded result."""
    dtypes = _values(rows, "dtype")
    made = figure(4.6 * len(dtypes) + 0.4, 3.6, title)
    panels = made.subplots(1, len(dtypes), squeeze=False, sharey=True)[0]
    for dtype, axes in zip(dtypes, panels, strict=True):
        here = [row for row in rows if row["dtype"] == dtype]
        names = list(dict.fromkeys((row["kernel_name"], row["layout"]) for row in here))
        providers = _values(here, "kernel_provider")
        for number, provider in enumerate(providers):
            of = {
                (r["kernel_name"], r["layout"]): 1 - float(r["y_50"]) for r in here if r["kernel_provider"] == provider
            }
            where = [at + (number - (len(providers) - 1) / 2) * 0.4 for at in range(len(names))]
            axes.bar(where, [of[name] for name in names], 0.4, color=_color(provider), label=provider)
        labels = [f"{name}\n{layout.replace('_', ' ')}" for name, layout in names]
        axes.set_xticks(range(len(names)), labels, rotation=60, fontsize=7)
        axes.set(title=dtype, yscale="log")
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    panels[0].set_ylabel("share of elements that are\nnot correctly rounded", fontsize=8)
    panels[0].legend(fontsize=8)
    return made


# ---- calls, ConvNorm, and everything in one picture


def overhead(rows: Sequence[RowOf], title: str) -> Figure:
    """Microseconds of a call on 1 KB, torch's and normkern's."""
    modes = _values(rows, "kernel_operation_mode")
    made = figure(5.2 * len(modes), 4.2, title)
    panels = made.subplots(1, len(modes), squeeze=False, sharey=True)[0]
    for mode, axes in zip(modes, panels, strict=True):
        here = [row for row in rows if row["kernel_operation_mode"] == mode]
        names, providers = _values(here, "kernel_name"), _values(here, "kernel_provider")
        for number, provider in enumerate(providers):
            of = {row["kernel_name"]: float(row["x_value"]) for row in here if row["kernel_provider"] == provider}
            where = [at + (number - (len(providers) - 1) / 2) * 0.4 for at in range(len(names))]
            axes.barh(where, [of[name] for name in names], 0.4, color=_color(provider), label=provider)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set(title=mode, xlabel="CPU time of a call on 1 KB, least of all rounds [µs]")
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    panels[0].invert_yaxis()
    panels[0].legend(fontsize=8)
    return made


def conv_norm(rows: Sequence[RowOf], title: str) -> Figure:
    """ConvNorm's spectrum against an FFT of every padded kernel (time, memory), and the layer against torch's."""
    ours = [row for row in rows if row["kernel_provider"] == "normkern"]
    kinds = (
        ("spectrum", "cpu_ms", "spectrum: time\ntimes faster than FFTs"),
        ("spectrum", "peak_bytes", "spectrum: memory\ntimes less than FFTs"),
        ("conv_norm layer", "cpu_ms", "layer, forward + backward\ntimes Conv2d + BatchNorm2d's speed"),
    )
    layers = _values(ours, "x_value")
    made = figure(11, 1.3 + 0.24 * len(layers), title)
    panels = made.subplots(1, len(kinds), sharey=True)
    for (name, metric, label), axes in zip(kinds, panels, strict=True):
        own = [row for row in ours if (row["kernel_name"], row["metric"]) == (name, metric)]
        of = {row["x_value"]: float(row["ratio_to_torch"]) for row in own}
        for at, layer in enumerate(layers):
            if layer in of:
                axes.barh(at, of[layer] - 1, 0.7, left=1, color=COLORS["normkern"])
        if of:
            _ratio_axis(axes, min(of.values()), max(of.values()))
        axes.set_title(label, fontsize=9)
        axes.tick_params(axis="x", labelsize=7)
    panels[0].set_yticks(range(len(layers)), layers, fontsize=7)
    panels[0].invert_yaxis()
    return made


def overview(offset_rows: Sequence[RowOf], speed_rows: Sequence[RowOf], title: str) -> Figure:
    """Why this package, in one picture: error against mean/std, and speed against torch."""
    made = figure(10, 3.9, title)
    left, right = made.subplots(1, 2, width_ratios=(1, 1.15))
    norm = "group_norm" if any(row["kernel_name"] == "group_norm" for row in offset_rows) else None
    _offset_curves(left, offset_rows, norm or offset_rows[0]["kernel_name"])
    left.set_title("error of group_norm against float64" if norm else left.get_title(), fontsize=10)
    left.set_ylabel(OFFSET_LABEL, fontsize=8)
    left.legend(fontsize=7, handlelength=3)
    _mean_speedups(right, speed_rows)
    right.set_title("speed, forward and forward + backward", fontsize=10)
    return made
