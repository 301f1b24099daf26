"""cli.py: the commands of `python -m normkern`. Each imports what it needs when it runs, and says what is missing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from normkern.bench.layers import OPS

app = typer.Typer(
    help="Normalization for PyTorch: what is installed, what a call would do, how fast and how exact it is.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

# What the packages that a command may miss are called where they are installed from.
PACKAGES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}


class DType(str, Enum):
    float32 = "float32"
    float64 = "float64"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Layout(str, Enum):
    contiguous = "contiguous"
    channels_last = "channels_last"
    transposed = "transposed"


class Mode(str, Enum):
    forward = "forward"
    backward = "backward"
    step = "step"


class BackendName(str, Enum):
    native = "native"
    triton = "triton"
    eager = "eager"


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """A missing optional package ends the program with the command that installs it."""
    try:
        yield
    except ModuleNotFoundError as missing:
        package = PACKAGES.get((missing.name or "").partition(".")[0])
        if package is None:
            raise
        sys.exit(f"this command needs {package}, which is not installed: pip install 'normkern[{extra}]'")


def chosen_device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise typer.BadParameter(str(error).partition("\n")[0], param_hint="--device") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(f"{name}: torch sees no GPU", param_hint="--device")
    return device


DeviceOption = Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one")]


@app.command("info")
def show_info() -> None:
    """What is installed, what the kernels were built for, and which backend each norm takes and why."""
    from normkern.info import info

    print(info())


@app.command("demo")
def run_demo(
    epochs: Annotated[int | None, typer.Option(min=1, help="of each training; default 8, with --quick 2")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="everything smaller: a few seconds")] = False,
    device: DeviceOption = None,
    dtype: Annotated[DType, typer.Option(help="of the norms compared")] = DType.float32,
) -> None:
    """Train small networks with torch's norms and with these, then compare every norm: errors and times."""
    where = chosen_device(device)
    with needs("demo"):
        from normkern.demo import run
    run(epochs, quick, str(where), getattr(torch, dtype.value))


def parse_shape(text: str) -> tuple[int, ...]:
    """ "2x320x64x64" as sizes."""
    try:
        shape = tuple(int(size) for size in text.replace(",", "x").split("x"))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 0:
        raise typer.BadParameter(f"{text!r} is no shape; write it like 2x320x64x64", param_hint="SHAPE")
    return shape


def laid_out(shape: tuple[int, ...], layout: Layout, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialized tensor; on the meta device it takes no memory."""
    if (layout is Layout.channels_last and len(shape) < 3) or (layout is Layout.transposed and len(shape) < 2):
        raise typer.BadParameter(f"{layout.value} needs more dimensions than {len(shape)}", param_hint="--layout")
    order = list(range(len(shape)))
    if layout is Layout.channels_last:
        order = [0, *order[2:], 1]
    elif layout is Layout.transposed:
        order[-2:] = order[:-3:-1]
    empty = torch.empty([shape[dim] for dim in order], dtype=dtype, device=device)
    return empty.permute([order.index(dim) for dim in range(len(order))])


EXPLAINED = ("batch_norm", "group_norm", "layer_norm", "instance_norm", "rms_norm")


@app.command("explain")
def show_explanation(
    op: Annotated[str, typer.Argument(metavar="OP", help=" | ".join(EXPLAINED))],
    shape: Annotated[str, typer.Argument(metavar="SHAPE", help="of the input, like 2x320x64x64")],
    groups: Annotated[int, typer.Option(help="of group_norm")] = 32,
    dims: Annotated[int, typer.Option(min=1, help="layer_norm, rms_norm: how many last dimensions")] = 1,
    dtype: Annotated[DType, typer.Option()] = DType.float32,
    layout: Annotated[Layout, typer.Option()] = Layout.contiguous,
    act: Annotated[str | None, typer.Option(help="relu, silu, gelu or leaky_relu")] = None,
    residual: Annotated[bool, typer.Option("--residual", help="with a residual")] = False,
    evaluation: Annotated[bool, typer.Option("--eval", help="batch_norm with running statistics")] = False,
    gpu: Annotated[str | None, typer.Option(help="plan for this chip: H200, H100, A100, L4, B200")] = None,
    device: DeviceOption = None,
) -> None:
    """Which backend a call takes, why not another, and which launches and bytes it is on a GPU. Nothing is computed."""
    import normkern

    if op not in EXPLAINED:
        raise typer.BadParameter(f"must be one of {', '.join(EXPLAINED)}; got {op!r}", param_hint="OP")
    x = laid_out(parse_shape(shape), layout, getattr(torch, dtype.value), chosen_device(device))
    by_channel = [torch.ones(x.shape[1:2], device=x.device) for _ in range(2)]
    by_width = [torch.ones(x.shape[max(0, x.dim() - dims) :], device=x.device) for _ in range(2)]
    width = by_width[0].shape
    arguments: dict[str, tuple[Any, ...]] = {
        "batch_norm": (*by_channel, *by_channel, not evaluation) if evaluation else (None, None, *by_channel, True),
        "group_norm": (groups, *by_channel),
        "instance_norm": (None, None, *by_channel),
        "layer_norm": (width, *by_width),
        "rms_norm": (width, by_width[0]),
    }
    extra = {"act": act, "residual": torch.empty_like(x) if residual else None}
    try:
        print(normkern.explain(op, x, *arguments[op], gpu=gpu, **extra))
    except (ValueError, RuntimeError, TypeError) as error:  # the norms' own words about bad arguments
        sys.exit(str(error))


@app.command("bench")
def run_bench(
    op: Annotated[list[str] | None, typer.Option(help=f"a norm, several times for several; {', '.join(OPS)}")] = None,
    backend: Annotated[BackendName | None, typer.Option(help="that normkern must use; default: its own choice")] = None,
    peers: Annotated[
        str | None, typer.Option(help="rivals beside torch: names with commas, all, none; list shows them")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="seven layers, shorter rounds: about a minute")] = False,
    sizes: Annotated[bool, typer.Option("--grid", help="every norm, small and large, instead of real layers")] = False,
    fused: Annotated[
        bool, typer.Option("--fused", help="with residual and activation, instead of real layers")
    ] = False,
    mode: Annotated[list[Mode] | None, typer.Option(help="several times for several; default forward, step")] = None,
    dtype: Annotated[list[DType] | None, typer.Option(help="several times for several; default float32")] = None,
    device: DeviceOption = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default torch's")] = None,
    seconds: Annotated[float | None, typer.Option(help="of every layer and mode; default 0.4, --quick 0.15")] = None,
    out: Annotated[Path | None, typer.Option(help="write the rows to this CSV file, as they come")] = None,
) -> None:
    """Time real layers against rivals and against a plain copy, in turn; see the table grow, keep the CSV."""
    from normkern.bench.layers import everything
    from normkern.bench.layers import fused as fused_layers
    from normkern.bench.layers import real as real_layers
    from normkern.bench.peers import DEFAULT, PEERS
    from normkern.bench.show import Contest, list_peers, run

    where = chosen_device(device)
    if peers == "list":
        list_peers(where, console)
        return
    names = {None: DEFAULT, "all": tuple(PEERS), "none": ()}.get(peers, tuple(str(peers).split(",")))
    names = tuple(dict.fromkeys(("torch", *names)))  # what every ratio is of
    for unknown in set(names) - set(PEERS):
        raise typer.BadParameter(f"{unknown!r} is none of {', '.join(PEERS)}", param_hint="--peers")
    for unknown in set(op or ()) - set(OPS):
        raise typer.BadParameter(f"{unknown!r} is none of {', '.join(OPS)}", param_hint="--op")
    if backend is not None:
        from normkern.backends import BACKENDS

        why = BACKENDS[backend.value].why_not(torch.empty(1, device=where))
        if why is None and backend.value == "triton" and where.type != "cuda":
            why = "its interpreter is no rival"  # TRITON_INTERPRET=1: a layer would take it hours
        if why is not None:
            raise typer.BadParameter(f"{backend.value} cannot run on {where}: {why}", param_hint="--backend")
    if threads is not None:
        torch.set_num_threads(threads)
    dtypes = tuple(one.value for one in dtype or [DType.float32])
    found = [*(everything(dtypes) if sizes else ()), *(fused_layers(dtypes) if fused else ())]
    if not (sizes or fused):
        found = list(real_layers(quick, where.type == "cuda", dtypes))
    layers = [layer for _, layer in found if not op or layer.op in op]
    if not layers:
        raise typer.BadParameter("no layer of these norms is in this selection", param_hint="--op")
    modes = [one.value for one in mode or [Mode.forward, Mode.step]]
    wanted = Contest(layers, modes, names, None if backend is None else backend.value, where)
    run(wanted, seconds or (0.15 if quick else 0.4), out, console)


@app.command("report")
def make_report(
    files: Annotated[list[Path], typer.Argument(metavar="CSV...", help="of `bench` and of the scripts in bench/")],
    out: Annotated[Path, typer.Option(help="directory for the PNG files and report.html")] = Path("report"),
) -> None:
    """Plots (PNG) and one self-contained HTML page from CSV files."""
    for path in files:
        if not path.is_file():
            raise typer.BadParameter(f"{path} is no file", param_hint="CSV...")
    with needs("report"):
        importlib.import_module("matplotlib")
        from normkern.bench.report import write
    try:
        for made in write(files, out):
            console.print(str(made), highlight=False)
    except ValueError as error:
        sys.exit(str(error))
