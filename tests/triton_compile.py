# Compiles the kernels of the Triton backend ahead of time, for named GPUs and without one, exactly as a call would
# launch them: the launches of a call are recorded and each kernel is compiled with the arguments it got. Prints a row
# per kernel as CSV: registers, spills, shared memory, 16-byte accesses.
#   python tests/triton_compile.py [--few | --variants | --spectra] [80] [90] [100]
# --variants compiles what the shapes do not reach, and --spectra ConvNorm's kernels; both print how many that were.
# A process of its own, since TRITON_INTERPRET must be off when Triton is imported.
from __future__ import annotations

import contextlib
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from normkern import problem
from normkern.backends import triton_kernels, triton_spectral_kernels, triton_spectrum
from normkern.backends import triton_launch as backend
from normkern.backends.triton_plan import Chip
from normkern.problem import Act, Moments, Problem

CHIPS = {80: Chip(108), 90: Chip(132), 100: Chip(148)}  # A100, H100 and H200, B200
KERNELS = (
    "fused_forward",
    "fused_backward",
    "reduce_moments",
    "reduce_gradients",
    "finish_moments",
    "finish_gradients",
    "prepare",
    "map_forward",
    "map_backward",
)


@dataclass(frozen=True)
class Launch:
    kernel: str
    grid: int
    arguments: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        return f"{self.kernel} x{self.grid}"


@dataclass
class Row:
    """One kernel of one call on one chip."""

    chip: str
    case: str
    launch: str
    grid: int
    tile: str
    warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    wide_loads: int  # 16-byte loads and stores of device memory in the code, and the narrower ones
    wide_stores: int
    narrow_loads: int
    narrow_stores: int
    widest_load: int  # bytes
    widest_store: int
    triton: str = triton.__version__


class Recorder:
    """Stands in for a kernel: takes down what it would be launched with."""

    def __init__(self, name: str, launches: list[Launch]) -> None:
        self.name, self.launches = name, launches

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            names = getattr(triton_kernels, self.name).arg_names
            arguments = {**dict(zip(names, args, strict=False)), **kwargs}
            self.launches.append(Launch(self.name, grid[0], tuple(arguments.items())))

        return launch


@contextlib.contextmanager
def recorded(chip: Chip) -> Iterator[list[Launch]]:
    """Calls of the backend launch nothing; on meta tensors they cost nothing."""
    launches: list[Launch] = []
    kernels = type("Kernels", (), {name: Recorder(name, launches) for name in KERNELS})
    before = backend.kernels, backend.chip_of
    backend.kernels, backend.chip_of = lambda: kernels, lambda device: chip  # type: ignore[assignment]
    try:
        yield launches
    finally:
        backend.kernels, backend.chip_of = before  # type: ignore[assignment]


def signature(kernel: Any, arguments: dict[str, Any], aligned: bool) -> tuple[dict[str, str], dict[str, Any], Any]:
    """Types, constants and attributes of the arguments, as a launch finds them."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for place, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            types[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, Tensor):
            names = {torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16"}
            types[parameter.name] = "*" + names[value.dtype]
            if aligned:
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            types[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            assert parameter.do_not_specialize, f"{kernel.__name__}: {parameter.name} would compile again by its value"
    return types, constants, attributes


def compiled(launch: Launch, arch: int, aligned: bool = True) -> Any:
    kernel = getattr(triton_kernels, launch.kernel)
    arguments = dict(launch.arguments)
    options = {"num_warps": arguments.pop("num_warps", 4)}
    types, constants, attributes = signature(kernel, arguments, aligned)
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def row(case: str, launch: Launch, arch: int) -> Row:
    binary = compiled(launch, arch)
    arguments = dict(launch.arguments)
    ptx = binary.asm["ptx"]
    target = re.search(r"\.target (\w+)", ptx)
    assert target
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    if arch >= 100 and ptxas.with_name("ptxas-blackwell").exists():
        ptxas = ptxas.with_name("ptxas-blackwell")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        told = subprocess.run(
            [str(ptxas), "-v", f"--gpu-name={target[1]}", str(path), "-o", os.devnull], capture_output=True, text=True
        )
    assert told.returncode == 0, told.stderr
    registers = re.search(r"Used (\d+) registers", told.stderr)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", told.stderr)
    assert registers
    assert spills

    loads, stores = (access_bytes(kind, ptx) for kind in ("ld", "st"))
    return Row(
        f"sm_{arch}",
        case,
        launch.kernel,
        launch.grid,
        "x".join(str(arguments[k]) for k in ("R", "C", "J", "G") if k in arguments),
        arguments.get("num_warps", 4),
        int(registers[1]),
        int(spills[1]) + int(spills[2]),
        binary.metadata.shared,
        sum(size >= 16 for size in loads),
        sum(size >= 16 for size in stores),
        sum(size < 16 for size in loads),
        sum(size < 16 for size in stores),
        max(loads, default=0),
        max(stores, default=0),
    )


def access_bytes(kind: str, ptx: str) -> list[int]:
    """What each access of device memory in the code moves: 16 for ld.global.v4.b32."""
    found = re.findall(rf"\b{kind}\.global(?:\.\w+(?:::\w+)*)*?(?:\.v(\d))?\.[bfus](\d+)\b", ptx)
    return [int(count or 1) * int(bits) // 8 for count, bits in found]


@dataclass(frozen=True)
class Shape:
    """What networks run: LayerNorm and RMSNorm, GroupNorm with SiLU in 32 groups, BatchNorm with ReLU; bfloat16 with
    float32 parameters."""

    norm: str
    shape: tuple[int, ...]
    last: bool = False  # channels last

    def __str__(self) -> str:
        return f"{self.norm} {'x'.join(map(str, self.shape))}{' channels_last' if self.last else ''}"

    def problem(self) -> tuple[Problem, Tensor]:
        x = torch.empty(self.shape, dtype=torch.bfloat16, device="meta")
        x = x.to(memory_format=torch.channels_last) if self.last else x
        sizes, strides = tuple(x.shape), x.stride()
        found = {
            "layer": lambda: problem.layer(sizes, strides, 1),
            "rms": lambda: problem.layer(sizes, strides, 1, second=True),
            "group": lambda: problem.group(sizes, strides, 32, Act.silu),
            "batch": lambda: problem.batch(sizes, strides, Act.relu),
        }[self.norm]()
        assert found is not None
        return found, x


ROWS = (
    (16384, 768), (65536, 1024), (16384, 4096), (8192, 8192), (4096, 16384), (65536, 4096), (4096, 65536),
    (1024, 12288), (131072, 128),
)  # fmt: skip
GROUPS = (
    (2, 1280, 8, 8), (2, 1280, 16, 16), (2, 640, 32, 32), (2, 320, 64, 64), (2, 640, 64, 64), (2, 320, 128, 128),
    (16, 320, 64, 64), (16, 1280, 32, 32), (1, 512, 256, 256), (1, 128, 512, 512),
)  # fmt: skip
IMAGES = (
    (256, 64, 112, 112), (256, 64, 56, 56), (256, 256, 56, 56), (256, 128, 28, 28), (256, 512, 28, 28),
    (256, 256, 14, 14), (256, 1024, 14, 14), (256, 512, 7, 7), (256, 2048, 7, 7),
)  # fmt: skip
SHAPES = (
    [Shape(norm, shape) for norm in ("layer", "rms") for shape in ROWS]
    + [Shape("group", shape, last) for last in (False, True) for shape in GROUPS]
    + [Shape("batch", shape, last) for last in (False, True) for shape in IMAGES]
)
# One of each kind of plan.
FEW = [
    Shape("layer", (16384, 4096)),
    Shape("rms", (131072, 128)),
    Shape("layer", (4096, 16384)),
    Shape("group", (2, 1280, 8, 8)),
    Shape("group", (16, 320, 64, 64)),
    Shape("group", (16, 320, 64, 64), last=True),
    Shape("batch", (256, 64, 56, 56)),
    Shape("batch", (256, 256, 14, 14), last=True),
    Shape("layer", (4096, 65536)),
]


def calls(p: Problem, x: Tensor) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Forward and backward with weight and, but for RMSNorm, bias."""
    second = p.moments == Moments.second
    weight = torch.empty(p.affine.groups, device=x.device)
    bias = None if second else weight.clone()
    moments = torch.empty(p.stats.groups, dtype=torch.float64, device=x.device)
    mean = None if second else moments
    needs = 3 if second else 7
    yield "forward", lambda: backend.forward(p, x, weight, bias, None, None, None, True)
    yield "backward", lambda: backend.backward(p, x, x, weight, bias, None, mean, moments, needs)


def launches_of(shape: Shape, arch: int) -> Iterator[tuple[str, Launch]]:
    for direction, call in calls(*shape.problem()):
        with recorded(CHIPS[arch]) as launches:
            call()
        for launch in launches:
            yield f"{shape} {direction}", launch


def rows_of(shapes: list[Shape], archs: list[int]) -> Iterator[Row]:
    """What differs only in run-time arguments is compiled once."""
    known: dict[Any, Row] = {}
    for arch in archs:
        for shape in shapes:
            for case, launch in launches_of(shape, arch):
                key = (arch, launch.kernel, compile_key(launch))
                if key not in known:
                    known[key] = row(case, launch, arch)
                yield replace(known[key], case=case, grid=launch.grid)


def compile_key(launch: Launch) -> Any:
    """All that a launch is compiled for."""
    arguments = dict(launch.arguments)
    kernel = getattr(triton_kernels, launch.kernel)
    types, constants, attributes = signature(kernel, arguments, True)
    return str(sorted(types.items())), str(sorted(constants.items())), str(attributes), arguments.get("num_warps")


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def variants() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every dtype, activation and kind of moments at least once, with and without residual and parameters, fused and
    split, with offsets of 64 bits: what the interpreter runs must be what the compiler takes."""

    kinds = (
        (torch.float32, "gelu", torch.float64, True),
        (torch.float64, "silu", torch.bfloat16, True),
        (torch.float16, "leaky_relu", torch.float16, False),
        (torch.bfloat16, "relu", torch.float32, True),
        (torch.float64, "gelu", torch.float64, False),
        (torch.float32, "none", torch.float32, True),
    )
    for number, (dtype, act, param_dtype, residual) in enumerate(kinds):
        for split in (False, True):
            x = meta(4, 12, 6, 10, dtype=dtype)
            if number % 2:
                x = x.to(memory_format=torch.channels_last)
            channel, sizes, strides = meta(12, dtype=param_dtype), tuple(x.shape), x.stride()
            found = (
                problem.group(sizes, strides, 3, Act[act]),
                problem.batch(sizes, strides, Act[act]),
                problem.batch(sizes, strides, Act[act], given=True),
            )
            for p in found:
                assert p is not None
                given = p.moments == Moments.given
                moments = meta(p.stats.groups, dtype=param_dtype if given else torch.float64)
                own = (moments, moments) if given else (None, None)
                extra = x if residual else None
                params = (channel, channel, extra) if number != 4 else (None, None, extra)
                needs = 15 if residual else 7
                yield (
                    f"{dtype} {act} {p.moments.name}",
                    lambda p=p, x=x, params=params, own=own, split=split: (
                        backend.forward(p, x, *params, *own, True, split)
                    ),
                )
                yield (
                    f"{dtype} {act} {p.moments.name}",
                    lambda p=p, x=x, params=params, m=moments, n=needs, split=split: (
                        backend.backward(p, x, x, *params, m, m, n if params[0] is not None else n & 9, split)
                    ),
                )
    for dtype, second, split in (
        (torch.bfloat16, False, False),
        (torch.float16, True, False),
        (torch.float32, True, True),
        (torch.float64, False, True),
    ):
        x = meta(64, 1000, dtype=dtype)
        sums = problem.layer((64, 1000), x.stride(), 1, second=second)
        moments = meta(64, dtype=torch.float64)
        yield f"{dtype} sum", lambda p=sums, x=x, split=split: backend.add_forward(p, x, x, None, None, True, split)
        yield (
            f"{dtype} sum",
            lambda p=sums, x=x, m=moments, split=split: (
                backend.backward(p, x, x, None, None, None, m, m, 1, split, x)
            ),
        )
    wide = meta(1 << 20, 4096, dtype=torch.bfloat16)
    images = meta(64, 320, 512, 512, dtype=torch.bfloat16)
    for x, found_wide in (
        (wide, problem.layer((1 << 20, 4096), wide.stride(), 1)),
        (wide, problem.layer((1 << 20, 4096), wide.stride(), 1, second=True)),
        (images, problem.group(tuple(images.shape), images.stride(), 32, Act.silu)),
        (images, problem.batch(tuple(images.shape), images.stride())),
    ):
        assert found_wide is not None
        for direction, call in calls(found_wide, x):
            yield f"64 bits {direction}", call


def compile_variants(arch: int) -> int:
    """Compiles each kernel of `variants` once; returns how many there are."""
    known = set()
    for name, call in variants():
        with recorded(CHIPS[arch]) as launches:
            call()
        for launch in launches:
            key = (launch.kernel, compile_key(launch))
            if key not in known:
                known.add(key)
                try:
                    compiled(launch, arch)
                except Exception as error:
                    raise RuntimeError(f"{name}: {launch} does not compile for sm_{arch}") from error
    return len(known)


def compile_spectra(arch: int) -> int:
    """Compiles ConvNorm's kernels for either dtype, with and without maps; returns how many there are."""
    count = 0
    for dtype in (torch.float32, torch.float64):
        weight, lags = meta(4, 5, 3, 3, dtype=dtype), meta(4, 13, dtype=torch.float64)
        spectra, v = meta(2, 4, 8, 5, 2, dtype=dtype), meta(4, 8, 5, dtype=dtype)
        waves = meta(32, dtype=torch.float64)
        sizes = {"batch": 2, "channels": 4, "rows": 8, "cols": 8, "kh": 3, "kw": 3, "down": 1, "right": 1}
        common = {"lags": lags, "waves": waves, **sizes, "EPS": 1e-6, "F": triton_spectrum.FREQUENCIES}
        launches: list[tuple[Any, dict[str, Any]]] = [
            (
                triton_spectral_kernels.sum_lags,
                {"weight": weight, "lags": lags, "depth": 5, "rows": 3, "cols": 3, "J": 8},
            ),
            (triton_spectral_kernels.multiply, {"x": spectra, "y": spectra, **common}),
            (triton_spectral_kernels.multiply, {"x": None, "y": v, **common}),
        ]
        for kernel, arguments in launches:
            types, constants, attributes = signature(kernel, arguments, True)
            source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
            triton.compile(source, target=GPUTarget("cuda", arch, 32), options={})
            count += 1
    return count


def write(rows: Iterator[Row], file: Any) -> None:
    names = [f.name for f in fields(Row)]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(names)
    for found in rows:
        writer.writerow([getattr(found, name) for name in names])
        file.flush()


if __name__ == "__main__":
    archs = [int(a) for a in sys.argv[1:] if a.isdigit()] or list(CHIPS)
    if "--variants" in sys.argv:
        print([compile_variants(arch) for arch in archs])
    elif "--spectra" in sys.argv:
        print([compile_spectra(arch) for arch in archs])
    else:
        write(rows_of(FEW if "--few" in sys.argv else SHAPES, archs), sys.stdout)
