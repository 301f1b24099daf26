# Errors in units in the last place against float64: how many elements are how far off, for torch and for normkern.
#   python bench/ulp_error.py [--csv FILE]
# float32: in ulps of the largest term of each element, |xhat*weight| or |bias|. Halves: whether the result is the
# correctly rounded one.
from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parent.parent / "tests")]

from cases import Case, Inputs, build, call  # noqa: E402
from reference import half_ulp  # noqa: E402

import normkern.functional  # noqa: E402
from normkern.bench.sheet import Row, Sheet, device_name  # noqa: E402

SHAPES = {
    "batch": (16, 64, 28, 28),
    "group": (8, 64, 28, 28),
    "instance": (8, 64, 28, 28),
    "layer": (2048, 768),
    "rms": (2048, 768),
}
EDGES = (0.5, 1, 1.5, 2, 3, 4)
DTYPES = ("float32", "bfloat16", "float16")


def exactly(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """y in float64, and the size of the largest term of every element."""
    wide = replace(case, dtype="float64", layout="contiguous", act=None)
    doubles = replace(
        inputs,
        **{name: None if (t := getattr(inputs, name)) is None else t.double() for name in ("x", "weight", "bias")},
        running_mean=None,
        running_var=None,
    )
    doubles.x = doubles.x.contiguous()
    y = call(wide, doubles)
    assert doubles.weight is not None
    bias = torch.zeros(()) if doubles.bias is None else case.broadcast(doubles.bias)
    return y, torch.maximum((y - bias).abs(), bias.abs())


def rows_of(case: Case) -> list[Row]:
    inputs = build(case)
    inputs.running_mean = inputs.running_var = None
    exact, size = exactly(case, inputs)
    rows = []
    for name, functions in (("torch", F), ("normkern", normkern.functional)):
        y = call(case, inputs, functions)
        if case.dtype == "float32":
            off = ((y.double() - exact).abs() / (2 * half_ulp(size.clamp_min(1e-30), torch.float32))).flatten()
            counts = [float((off <= edge).double().mean()) for edge in EDGES]
            found = [
                *zip((f"at most {edge:g} ulp" for edge in EDGES), counts, strict=True),
                ("largest", float(off.max())),
            ]
        else:
            found = [("correctly rounded", float((y == exact.to(y.dtype)).double().mean()))]
        for what, value in found:
            rows.append(Row(f"{case.norm}_norm", name, "forward", "ulp_error", "elements", what, value, value, value))
            rows[-1].dtype, rows[-1].layout, rows[-1].device = case.dtype, case.layout, device_name(torch.device("cpu"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="errors in units in the last place")
    parser.add_argument("--csv", type=Path)
    sheet = Sheet(parser.parse_args().csv)
    for norm, shape in SHAPES.items():
        for layout in ("contiguous",) if norm in ("layer", "rms") else ("contiguous", "channels_last"):
            for dtype in DTYPES:
                params = "w" if norm == "rms" else "wb"
                case = Case(norm, shape, groups=8, layout=layout, dtype=dtype, params=params, data="scaled")
                for row in rows_of(case):
                    sheet.add(row)
                    what = f"{row.kernel_name:14} {row.layout:14} {row.dtype:9} {row.kernel_provider:9}"
                    print(f"{what} {row.x_value:18} {row.y_50:.6g}")


if __name__ == "__main__":
    main()
