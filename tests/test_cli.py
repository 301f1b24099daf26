# `python -m normkern`: what each command says and writes, and the benchmarks and pictures behind `bench` and `report`.
from __future__ import annotations

import base64
import csv
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner

import normkern
from normkern.bench import layers, peers, plots, report
from normkern.bench.layers import FUSED, LAYOUTS, OPS, Layer, tensors
from normkern.bench.race import Race, bytes_moved, has_replays
from normkern.bench.sheet import COLUMNS, Row, Sheet
from normkern.cli import Layout, app, laid_out, parse_shape

CPU = torch.device("cpu")
RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results" / "cpu"
TINY = {
    "batch_norm": Layer("batch_norm", (4, 6, 5, 7)),
    "group_norm": Layer("group_norm", (2, 6, 5, 7), groups=3),
    "instance_norm": Layer("instance_norm", (2, 3, 5, 7)),
    "layer_norm": Layer("layer_norm", (3, 5, 16)),
    "rms_norm": Layer("rms_norm", (3, 5, 16)),
}


def run(*arguments: str) -> Any:
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, list(arguments))


def said(result: Any) -> str:
    """Everything that was printed, without the frames that rich draws around errors."""
    return re.sub(r"[\s│╭╮╰╯─]+", " ", result.output)


# ---- commands


def test_every_command_is_listed() -> None:
    text = said(run("--help"))
    for command in ("info", "demo", "explain", "bench", "report"):
        assert re.search(rf"\b{command}\b", text)


def test_unknown_command_points_to_help() -> None:
    done = subprocess.run([sys.executable, "-m", "normkern", "frobnicate"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "frobnicate" in done.stderr
    assert "--help" in done.stderr


@pytest.mark.parametrize(("absent", "command", "status"), [("typer", "bench", 1), ("rich", "info", 0)])
def test_without_typer_or_rich_only_info_works(absent: str, command: str, status: int) -> None:
    code = f"import sys; sys.modules[{absent!r}] = None; sys.argv[1:] = [{command!r}]\n"
    code += "import runpy; runpy.run_module('normkern', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stderr
    if status:
        assert f"needs {absent}" in done.stderr
        assert "pip install 'normkern[cli]'" in done.stderr
    else:
        assert torch.__version__ in done.stdout


def test_report_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run("report", str(RESULTS / "overhead.csv"))
    assert done.exit_code == 1
    assert "pip install 'normkern[report]'" in done.output + str(done.exception)


def test_explain_is_that_of_the_function() -> None:
    done = run("explain", "group_norm", "2x64x16x16", "--groups", "8", "--layout", "channels_last", "--act", "silu")
    x = torch.empty(2, 64, 16, 16).contiguous(memory_format=torch.channels_last)
    expected = normkern.explain("group_norm", x, 8, torch.ones(64), torch.ones(64), act="silu")
    assert done.output.strip() == str(expected)
    for op in OPS:
        assert run("explain", op, "4x32x8x8", "--residual", "--dtype", "bfloat16").exit_code == 0
    assert "given" in run("explain", "batch_norm", "4x32x8x8", "--eval").output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("explain", "pixel_norm", "2x3"), "must be one of batch_norm"),
        (("explain", "group_norm", "two"), "is no shape; write it like 2x320x64x64"),
        (("explain", "layer_norm", "2x3", "--layout", "channels_last"), "channels_last needs more dimensions than 2"),
        (("explain", "layer_norm", "2x3", "--gpu", "H900"), "gpu must be one of H200"),
        (("explain", "group_norm", "2x31x8"), "num_groups must divide the channels"),
        (("bench", "--op", "pixel_norm"), "'pixel_norm' is none of batch_norm"),
        (("bench", "--peers", "torch,nobody"), "'nobody' is none of torch"),
        (("bench", "--fused", "--op", "rms_norm"), "no layer of these norms is in this selection"),
        (("bench", "--device", "floppy"), "device"),
        (("report", "nowhere.csv"), "nowhere.csv is no file"),
    ],
)
def test_bad_arguments_are_told(arguments: tuple[str, ...], says: str) -> None:
    done = run(*arguments)
    assert done.exit_code != 0
    assert says in said(done) + str(done.exception)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    assert "torch sees no GPU" in said(run("bench", "--device", "cuda"))
    assert "triton cannot run on cpu" in said(run("bench", "--backend", "triton"))
    assert "cuDNN needs a GPU" in said(run("bench", "--peers", "list"))


def test_shapes_and_layouts() -> None:
    assert parse_shape("2x3x4") == (2, 3, 4)
    assert parse_shape("2,3") == (2, 3)
    strides = {layout: laid_out((2, 3, 4, 5), layout, torch.float16, CPU).stride() for layout in Layout}
    assert strides[Layout.contiguous] == (60, 20, 5, 1)
    assert strides[Layout.channels_last] == (60, 1, 15, 3)
    assert strides[Layout.transposed] == (60, 20, 1, 4)
    for layout in Layout:  # what is benchmarked has the strides that are explained
        layer = Layer("group_norm", (2, 3, 4, 5), groups=3, layout=layout.value)
        assert tensors(layer, CPU).x.stride() == strides[layout]


def test_bench_writes_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "REAL", tuple(TINY.items()))
    out = tmp_path / "rows.csv"
    done = run("bench", "--seconds", "0.001", "--dtype", "bfloat16", "--out", str(out))
    assert done.exit_code == 0, done.output
    with out.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert f"{len(rows)} rows in" in said(done)
    assert tuple(reader.fieldnames or ()) == COLUMNS
    keys = [(r["kernel_name"], r["layout"], r["dtype"], r["kernel_operation_mode"], r["kernel_provider"]) for r in rows]
    assert sorted(keys) == sorted(
        (op, layout, dtype, mode, provider)
        for op in OPS
        for layout in LAYOUTS[op]
        for dtype in ("bfloat16",)
        for mode in ("forward", "step")
        for provider in ("torch", "normkern", "copy")
    )
    for row in rows:
        low, middle, high = (float(row[f"y_{q}"]) for q in (20, 50, 80))
        assert 0 < low <= middle <= high
        # Every number is rounded to four digits.
        assert float(row["fraction_of_copy"]) == pytest.approx(float(row["floor_us"]) * 1e-3 / middle, rel=2e-3)
        assert row["provider_version"]
        if row["kernel_provider"] in ("torch", "copy"):
            column = "ratio_to_torch" if row["kernel_provider"] == "torch" else "fraction_of_copy"
            assert float(row[column]) == 1


def test_bench_on_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "REAL", tuple(TINY.items()))
    seen = []
    forward = normkern.backends.BACKENDS["eager"].forward
    monkeypatch.setattr(
        normkern.backends.BACKENDS["eager"], "forward", lambda *args: (seen.append(args), forward(*args))[1]
    )
    arguments = ("bench", "--op", "rms_norm", "--mode", "forward", "--seconds", "0.001", "--peers", "none")
    assert run(*arguments, "--backend", "eager").exit_code == 0
    assert seen


# ---- rivals


@pytest.mark.parametrize("layer", [*TINY.values(), *(layer for _, layer in FUSED)], ids=str)
def test_rivals_compute_the_same(layer: Layer) -> None:
    layer = replace(layer, shape=(2, *layer.shape[1:2], *(min(size, 6) for size in layer.shape[2:])))
    for layout in LAYOUTS[layer.op]:
        for peer in peers.peers(replace(layer, layout=layout), CPU):
            one = replace(layer, layout=layout)
            got = peer.make(one, tensors(one, CPU))()
            want = peers.PEERS["torch"].make(one, tensors(one, CPU))()
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def modules(**functions: Any) -> ModuleType:
    module = ModuleType("absent")
    vars(module).update(functions)
    return module


def test_arguments_reach_libraries_that_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    # Their signatures, computed by torch: what is held here is who gets which argument at which place.
    def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)

    def liger_group(x: Any, weight: Any, bias: Any, num_channels: int, num_groups: int, eps: float) -> torch.Tensor:
        assert x.dim() == 3
        assert x.shape[1] == num_channels
        return F.group_norm(x, num_groups, weight, bias, eps)

    def liger_rms(x: Any, weight: Any, eps: float, offset: float, casting_mode: str, in_place: bool) -> torch.Tensor:
        assert (offset, casting_mode, in_place) == (0.0, "llama", False)
        return rms(x, weight, eps)

    liger = modules(
        liger_layer_norm=lambda X, W, B, eps: F.layer_norm(X, W.shape, W, B, eps),
        liger_rms_norm=liger_rms,
        liger_group_norm=liger_group,
    )

    def quack_rmsnorm(x: Any, weight: Any, bias: Any = None, residual: Any = None, eps: float = 1e-6) -> torch.Tensor:
        assert bias is None
        assert residual is None
        return rms(x, weight, eps)

    apex = modules(
        fused_layer_norm_affine=lambda x, w, b, normalized_shape, eps: F.layer_norm(x, normalized_shape, w, b, eps),
        fused_rms_norm_affine=lambda x, w, normalized_shape, eps: F.rms_norm(x, normalized_shape, w, eps),
    )
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", liger)
    monkeypatch.setitem(sys.modules, "quack", modules(rmsnorm=quack_rmsnorm))
    monkeypatch.setitem(sys.modules, "apex.normalization.fused_layer_norm", apex)
    for name, ops in (
        ("liger", ("layer_norm", "rms_norm", "group_norm")),
        ("quack", ("rms_norm",)),
        ("apex", ("layer_norm", "rms_norm")),
    ):
        for op in ops:
            for layer in (TINY[op], replace(TINY[op], residual=True, act="gelu")):
                want = peers.PEERS["torch"].make(layer, tensors(layer, CPU))()
                torch.testing.assert_close(peers.PEERS[name].make(layer, tensors(layer, CPU))(), want)


def test_an_absent_rival_says_why() -> None:
    for layer in TINY.values():
        there = {peer.name for peer in peers.peers(layer, CPU, tuple(peers.PEERS))}
        missing = peers.absent(layer, CPU, tuple(peers.PEERS))
        assert there | set(missing) == set(peers.PEERS)
        assert not there & set(missing)
        assert {"torch", "torch_compile", "normkern"} <= there
        assert all(missing.values())


def test_a_rival_that_fails_is_left_out() -> None:
    def broken(layer: Layer, t: Any) -> Any:
        raise RuntimeError("no kernel image\nis available")

    layer = TINY["layer_norm"]
    race = Race(layer, "step", [*peers.peers(layer, CPU), peers.Peer("liger", broken)], CPU)
    race.round()
    assert race.failed == {"liger": "RuntimeError: no kernel image"}
    assert {row.kernel_provider for row in race.rows()} == {"torch", "normkern", "copy"}
    with pytest.raises(RuntimeError, match="no kernel image"):
        Race(layer, "step", [peers.Peer("normkern", broken)], CPU)


def test_the_context_of_a_rival_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    @contextmanager
    def around() -> Iterator[None]:
        events.append("enter")
        yield
        events.append("exit")

    def make(layer: Layer, t: Any) -> Any:
        return lambda: (events.append("call"), t.x * 2)[1]

    def clock() -> float:
        events.append("clock")
        return 0.0

    layer = TINY["layer_norm"]
    race = Race(layer, "forward", [peers.Peer("torch", make), peers.Peer("normkern", make, around=around)], CPU)
    events.clear()
    monkeypatch.setattr(time, "perf_counter", clock)
    race.round()
    timed, copied = ["clock", "call", "clock"], ["clock", "clock"]
    assert events == [*timed, "enter", *timed, "exit", *copied]


def test_replays_are_captured_where_they_warmed_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With stand-ins for CUDA: every rival is called three times on the stream that it is then captured on, and what is
    timed are replays."""
    now: list[object] = []
    captured: list[object] = []

    class Stream:
        def __init__(self, device: torch.device) -> None:
            pass

        def wait_stream(self, other: object) -> None:
            pass

    class Graph:
        def __init__(self) -> None:
            self.call: Any = None
            self.replays = 0
            captured.append(self)

        def replay(self) -> None:
            self.replays += 1

    @contextmanager
    def on(stream: object) -> Iterator[None]:
        now.append(stream)
        yield
        now.pop()

    @contextmanager
    def capture(graph: Graph, stream: object) -> Iterator[None]:
        with on((graph, stream)):
            yield

    calls: dict[str, list[object]] = {"torch": [], "normkern": []}

    def rival(name: str) -> peers.Peer:
        def make(layer: Layer, t: Any) -> Any:
            def forward() -> torch.Tensor:
                calls[name].append(now[-1] if now else None)
                return t.x * 2

            return forward

        return peers.Peer(name, make)

    for name, stand_in in (("Stream", Stream), ("CUDAGraph", Graph), ("stream", on), ("graph", capture)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(device))
    race = Race(TINY["layer_norm"], "forward", [rival("torch"), rival("normkern")], CPU, replays=True)
    for of in calls.values():
        assert isinstance(of[0], Stream)
        assert of[1:3] == [of[0]] * 2
        assert [stream for _, stream in of[3:]] == [of[0]]  # type: ignore[misc]
    before = [graph.replays for graph in captured]  # type: ignore[attr-defined]
    race.round()
    assert [graph.replays for graph in captured] == [count + 1 for count in before]  # type: ignore[attr-defined]
    assert [len(of) for of in calls.values()] == [4, 4]
    sheet = Sheet(tmp_path / "rows.csv")
    for row in race.rows():
        assert row.metric == "replay_ms"
        sheet.add(row)
    assert next(report.pictures(report.read([tmp_path / "rows.csv"]))).name.startswith("replays_")


def test_small_layers_alone_have_replays() -> None:
    gpu = torch.device("cuda")
    small, large = Layer("layer_norm", (1024, 2048)), Layer("layer_norm", (1025, 2048))
    asked = [(small, gpu), (large, gpu), (replace(large, dtype="bfloat16"), gpu), (small, CPU)]
    assert [has_replays(*one) for one in asked] == [True, False, True, False]


def test_bytes() -> None:
    x = torch.empty(4, 6)
    plain, fused = Layer("layer_norm", (4, 6)), Layer("layer_norm", (4, 6), residual=True, act="relu")
    assert [bytes_moved(plain, mode, x) // x.nbytes for mode in ("forward", "backward", "step")] == [2, 3, 5]
    assert [bytes_moved(fused, mode, x) // x.nbytes for mode in ("forward", "backward", "step")] == [3, 5, 8]


# ---- report


def speed_rows(path: Path) -> None:
    """layer_norm twice and four times as fast as torch, at half and a quarter of a copy's rate."""
    sheet = Sheet(path)
    for shape, ratio, share in (("2x3", 2.0, 0.5), ("4x3", 4.0, 0.25)):
        for provider, times in (("torch", 1.0), ("normkern", ratio), ("copy", 8.0)):
            row = Row(
                "layer_norm", provider, "forward", "speed_ms", "shape", shape, 0.9 / times, 1 / times, 1.1 / times
            )
            row.bytes, row.ratio_to_torch, row.fraction_of_copy = 1000, times, share
            row.dtype, row.layout, row.device = "float32", "contiguous", "cpu"
            sheet.add(row)


def test_summary(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    speed_rows(path)
    rows = report.read([path, path])
    assert len(rows) == 6  # the second file says the same again
    assert report.summary(rows) == [
        ["layer_norm, float32", "2", "2.83", "2.00 – 4.00", "0", "0.25 – 0.50"],
        ["all", "2", "2.83", "2.00 – 4.00", "0", "0.25 – 0.50"],
    ]
    bars = plots.speedup(rows, "").axes[0].patches
    assert sorted(bar.get_width() + 1 for bar in bars) == pytest.approx([2, 4])


@pytest.mark.skipif(not RESULTS.is_dir(), reason="not in a source tree")
def test_report_draws_the_committed_results(tmp_path: Path) -> None:
    files = [RESULTS / f"{name}.csv" for name in ("fused", "offset_error", "ulp_error", "overhead", "conv_norm")]
    done = run("report", *map(str, files), "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    pictures = sorted(tmp_path.glob("*.png"))
    kinds = {path.name.partition("_cpu")[0] for path in pictures}
    assert kinds == {"overview.png", "roofline", "speedup", "offset", "ulp", "rounding", "overhead", "conv_norm"}
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    inside = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert sorted(map(base64.b64decode, inside)) == sorted(path.read_bytes() for path in pictures)
    assert not re.search(r"(src|href)=\"(?!data:)", page)  # it needs nothing beside it
    for picture in report.pictures(report.read(files)):
        assert picture.figure.get_suptitle()
        shown = [axes for axes in picture.figure.axes if axes.get_visible()]
        legends = [axes.get_legend() for axes in shown] + list(picture.figure.legends)
        assert any(legends) or picture.name.startswith("conv_norm")  # one kind of bar, named in the titles
        for axes in shown:
            assert axes.lines or axes.patches or axes.collections, picture.name
            assert axes.get_title() or axes.get_xlabel(), picture.name


def test_report_refuses_other_tables(tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    other.write_text("chip,registers\nsm_90,128\n")
    done = run("report", str(other), "--out", str(tmp_path / "out"))
    assert done.exit_code == 1
    assert "is no table of results" in done.output + str(done.exception)
    Sheet(other)
    assert "nothing to draw" in str(run("report", str(other), "--out", str(tmp_path / "out")).exception)
    assert not (tmp_path / "out").exists()
