"""The planner through `normkern._host`: properties over random problems, and a table of what real shapes get."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from normkern._host import (
    Act,
    Domain,
    DType,
    Gpu,
    Launch,
    Moments,
    Pass,
    Plan,
    Problem,
    Reduce,
    Request,
    Strategy,
    Team,
    Walk,
    make_plan,
)

from normkern.explain import CHIPS as KNOWN_CHIPS
from normkern.problem import Act as PythonAct
from normkern.problem import Domain as PythonDomain
from normkern.problem import Moments as PythonMoments
from normkern.problem import Problem as PythonProblem

CHIPS = {name: chip.described() for name, chip in KNOWN_CHIPS.items()}
L4, A100, H200 = CHIPS["L4"], CHIPS["A100"], CHIPS["H200"]
SIZES = {DType.f32: 4, DType.f64: 8, DType.f16: 2, DType.bf16: 2}

Pair = tuple[tuple[int, int, int, int], tuple[int, int, int, int]]


def layer(rows: int, cols: int) -> Pair:
    return (rows, 1, 1, cols), (1, rows, cols, 1)


def group(n: int, c: int, s: int, groups: int) -> Pair:
    return (n * groups, 1, 1, c // groups * s), (1, n, c, s)


def group_last(n: int, c: int, s: int, groups: int) -> Pair:
    return (n, s, groups, c // groups), (1, n * s, c, 1)


def batch(n: int, c: int, s: int) -> Pair:
    return (1, n, c, s), (1, n, c, s)


def batch_last(n: int, c: int, s: int) -> Pair:
    return (1, n * s, c, 1), (1, n * s, c, 1)


def problem(pair: Pair, dtype: DType, moments: Moments = Moments.mean_var, act: Act = Act.none) -> Problem:
    return Problem(Domain(*pair[0]), Domain(*pair[1]), moments, act, dtype, 1e-5)


def launch_text(launch: Launch) -> str:
    return f"{launch.blocks}x{launch.threads}" + (f"+{launch.shared}" if launch.shared else "")


def reduce_text(reduce: Reduce) -> str:
    return f"{reduce.walk.name}/{reduce.parts} {launch_text(reduce.launch)}"


def text(plan: Plan) -> str:
    """Strategy, width and launches, as blocks x threads + shared memory; a reduction as walk/parts. Of a team: its
    blocks, threads along and down the lines, seats; walk by columns, sums of weights on the way, two stages."""
    parts = [f"{plan.strategy.name} v{plan.vec}"]
    if plan.fused.blocks:
        team = plan.team
        marks = [mark for mark, on in (
            ("columns", team.walk == Walk.columns), (f"sums by {team.weights.name}", team.weight_sums),
            ("two stages", team.stages == 2),
        ) if on]  # fmt: skip
        shape = f"{team.blocks} x {team.width}x{team.lanes}" + (f" x {team.seats} seats" if team.seats > 1 else "")
        parts += [" ".join([shape, *marks]), launch_text(plan.fused)]
    if plan.reduce.launch.blocks:
        parts.append(f"reduce {reduce_text(plan.reduce)}")
    if plan.map.blocks:
        parts.append(f"map {launch_text(plan.map)}")
    if plan.affine.launch.blocks:
        parts.append(f"affine {reduce_text(plan.affine)}")
    return ", ".join(parts)


# The last two columns: bytes read and written, in tensors. "masked": of relu after a residual, with a mask.
GOLDEN = [
    ("H200", layer(16384, 4096), "bf16", "forward",
     "block v8, 1 x 128x1, 2112x128+8192", 1.0, 1.0),
    ("H200", layer(16384, 4096), "bf16", "backward",
     "block v8, 1 x 128x1 sums by column two stages, 264x128+65536", 2.07, 1.06),
    ("H200", layer(131072, 128), "bf16", "forward",
     "warp v8, 1 x 8x1 x 16 seats, 2112x128+4096", 1.0, 1.06),
    ("H200", layer(65536, 1024), "f16", "backward",
     "warp v8, 1 x 32x1 x 6 seats sums by column two stages, 264x192+98304", 2.02, 1.02),
    ("H200", layer(1_000_000, 8), "f32", "forward",
     "warp v4, 1 x 2x1 x 64 seats, 2112x128+2048", 1.0, 1.5),
    ("H200", layer(8, 100_000), "f32", "forward",
     "cluster v4, 8 x 512x1, 64x512+57376", 1.25, 1.0),
    ("H200", layer(1, 100_000_000), "f32", "forward",
     "split v4, reduce rows/1056 1056x512, map 1056x256", 4.0, 1.0),
    ("H200", layer(64, 1_000_003), "f32", "backward",
     "subgrid v4, 132 x 384x1 sums by column, 132x384+122048", 2.06, 1.06),
    ("H100", layer(4096, 65536), "bf16", "forward",
     "cluster v8, 4 x 512x1, 528x512+32800", 1.0, 1.0),
    ("H100", layer(4096, 65536), "bf16", "backward",
     "cluster v8, 8 x 256x1 sums by column, 264x256+98336", 2.03, 1.03),
    ("H100", layer(1024, 2049), "bf16", "backward",
     "cluster v8, 2 x 64x1 sums by column, 192x64+14432", 2.38, 1.38),
    ("A100", layer(4096, 65536), "bf16", "forward",
     "block v8, 1 x 512x1, 108x512+131072", 1.0, 1.0),
    ("A100", layer(4096, 131072), "f16", "forward",
     "subgrid v8, 2 x 512x1, 108x512+131072", 1.0, 1.0),
    ("B200", layer(4096, 8192), "f64", "forward",
     "cluster v2, 2 x 512x1, 592x512+32800", 1.0, 1.0),
    ("A100", group(2, 320, 4096, 32), "f16", "forward",
     "block v8, 1 x 512x1, 64x512+81920", 1.0, 1.0),
    ("L4", group(2, 320, 4096, 32), "f16", "forward",
     "block v8, 1 x 512x1, 58x512+81920", 1.0, 1.0),
    ("L4", group(2, 320, 4096, 32), "f16", "backward",
     "subgrid v8, 2 x 64x5 sums by line, 58x320+82400", 2.0, 1.0),
    ("H200", group(1, 128, 1024 * 1024, 32), "bf16", "forward",
     "subgrid v8, 44 x 512x1, 132x512+196608", 1.0, 1.0),
    ("H200", group(2, 320, 4096, 320), "f32", "backward",
     "block v4, 1 x 256x1 sums by line, 640x256+32912", 2.0, 1.0),
    ("H200", group_last(2, 320, 4096, 32), "bf16", "forward",
     "cluster v8, 8 x 5x51 columns, 128x256+69696", 1.0, 1.0),
    ("B200", group_last(2, 320, 4096, 32), "bf16", "backward",
     "cluster v8, 8 x 5x51 columns sums by column, 128x256+115392", 2.01, 1.01),
    ("H100", group_last(16, 1280, 64, 32), "bf16", "forward",
     "block v8, 1 x 5x51 columns, 512x256+32704", 1.0, 1.0),
    ("H200", batch(256, 64, 3136), "bf16", "forward",
     "cluster v8, 8 x 32x16, 128x512+213024", 1.0, 1.0),
    ("H200", batch(256, 2048, 49), "bf16", "backward",
     "block v8, 1 x 7x36 columns sums by group, 264x256+89856", 2.0, 1.0),
    ("B200", batch_last(256, 64, 3136), "bf16", "forward",
     "split v8, reduce columns/592 592x256+38912, map 1184x256", 2.01, 1.01),
    ("A100", batch_last(256, 64, 3136), "bf16", "backward",
     "split v8, reduce columns/432 432x256+20480, map 864x256", 4.0, 1.0),
    ("L4", batch_last(32, 3, 50176), "f32", "backward",
     "split v4, reduce columns/232 232x256+12288, map 464x256", 4.0, 1.0),
    ("H200", layer(1_000_000, 64), "bf16", "forward",
     "warp v8, 1 x 8x1 x 16 seats, 2112x128+2048", 1.0, 1.12),
    ("H200", layer(1_000_000, 64), "bf16", "backward",
     "warp v8, 1 x 8x1 x 48 seats sums by column two stages, 264x384+49152", 2.13, 1.0),
    ("H200", layer(64, 1_000_000), "bf16", "forward",
     "subgrid v8, 9 x 512x1, 126x512+229376", 1.03, 1.0),
    ("H200", layer(64, 1_000_000), "bf16", "backward",
     "subgrid v8, 66 x 384x1 sums by column, 132x384+182656", 2.16, 1.16),
    ("H200", layer(1024, 12288), "bf16", "forward",
     "block v8, 1 x 384x1, 660x384+24576", 1.0, 1.0),
    ("H200", layer(1024, 12288), "bf16", "backward",
     "cluster v8, 2 x 192x1 sums by column, 192x192+73760", 2.38, 1.38),
    ("H200", layer(8192, 8192), "bf16", "forward",
     "block v8, 1 x 256x1, 1056x256+16384", 1.0, 1.0),
    ("H200", layer(8192, 8192), "bf16", "backward",
     "block v8, 1 x 256x1 sums by column two stages, 132x256+131072", 2.07, 1.06),
    ("H200", layer(4096, 131072), "bf16", "forward",
     "cluster v8, 8 x 512x1, 528x512+32800", 1.0, 1.0),
    ("H200", layer(4096, 131072), "bf16", "backward",
     "cluster v8, 8 x 384x1 sums by column, 128x384+204832", 2.02, 1.02),
    ("H200", layer(16384, 1000), "bf16", "forward",
     "warp v8, 1 x 32x1 x 4 seats, 2112x128+8192", 1.0, 1.01),
    ("H200", layer(16384, 1000), "bf16", "backward",
     "warp v8, 1 x 32x1 x 6 seats sums by column two stages, 264x192+97152", 2.07, 1.06),
    ("H200", group(2, 1280, 64, 32), "bf16", "forward",
     "block v8, 1 x 8x12, 64x96+6144", 1.02, 1.0),
    ("H200", group(2, 1280, 64, 32), "bf16", "backward",
     "block v8, 1 x 8x12 sums by line, 64x96+13568", 2.08, 1.08),
    ("H200", group(2, 320, 16384, 32), "bf16", "forward",
     "cluster v8, 4 x 512x1, 256x512+81952", 1.0, 1.0),
    ("H200", group(2, 320, 16384, 32), "bf16", "backward",
     "cluster v8, 8 x 64x5 sums by line, 264x320+82432", 2.0, 1.0),
    ("H200", group(16, 320, 4096, 32), "bf16", "forward",
     "block v8, 1 x 512x1, 264x512+81920", 1.0, 1.0),
    ("H200", group(16, 320, 4096, 32), "bf16", "backward",
     "cluster v8, 2 x 64x5 sums by line, 264x320+82432", 2.0, 1.0),
    ("H200", group(1, 512, 65536, 32), "bf16", "forward",
     "subgrid v8, 10 x 64x8, 130x512+212992", 1.0, 1.0),
    ("H200", group(1, 512, 65536, 32), "bf16", "backward",
     "subgrid v8, 22 x 384x1 sums by line, 132x384+199936", 2.0, 1.0),
    ("H200", group(1, 128, 20 * 65536, 32), "bf16", "forward",
     "subgrid v8, 66 x 512x1, 132x512+163840", 1.0, 1.0),
    ("H200", group(1, 128, 20 * 65536, 32), "bf16", "backward",
     "subgrid v8, 132 x 96x4 sums by line, 132x384+160000", 2.0, 1.0),
    ("H200", group(32, 64, 49, 64), "bf16", "forward",
     "warp v8, 1 x 8x1 x 16 seats, 128x128+2048", 1.0, 1.16),
    ("H200", group(32, 64, 49, 64), "bf16", "backward",
     "warp v8, 1 x 8x1 x 16 seats, 128x128+4096, affine columns/1 13x256+20480", 4.29, 1.12),
    ("H200", group_last(2, 320, 4096, 32), "bf16", "backward",
     "cluster v8, 8 x 5x51 columns sums by column, 128x256+115392", 2.01, 1.01),
    ("H200", group_last(16, 640, 1024, 32), "bf16", "forward",
     "block v8, 1 x 5x51 columns, 256x256+110528", 1.0, 1.0),
    ("H200", group_last(16, 640, 1024, 32), "bf16", "backward",
     "cluster v8, 2 x 5x51 columns sums by column, 132x256+115328", 2.0, 1.0),
    ("H200", group_last(1, 512, 65536, 32), "bf16", "forward",
     "subgrid v8, 22 x 4x64 columns, 132x256+217088", 1.0, 1.0),
    ("H200", group_last(1, 512, 65536, 32), "bf16", "backward",
     "subgrid v8, 44 x 4x64 columns sums by column, 132x256+221696", 2.0, 1.0),
    ("H200", group_last(2, 96, 4096, 32), "bf16", "forward",
     "cluster v8, 8 x 6x42 columns, 32x256+78080", 1.0, 1.0),
    ("H200", group_last(2, 96, 4096, 32), "bf16", "backward",
     "cluster v8, 8 x 6x42 columns sums by column, 32x256+132096", 2.01, 1.01),
    ("H200", group_last(2, 128, 4096, 1), "bf16", "forward",
     "cluster v8, 8 x 512x1, 16x512+131104", 1.0, 1.0),
    ("H200", group_last(2, 128, 4096, 1), "bf16", "backward",
     "cluster v8, 16 x 384x1, 32x384+135200, affine columns/64 64x256+20480", 4.06, 1.06),
    ("H200", group_last(2, 63, 400, 3), "bf16", "forward",
     "cluster v8, 4 x 7x32 columns, 16x224+35904", 1.0, 1.0),
    ("H200", group_last(2, 63, 400, 3), "bf16", "backward",
     "cluster v8, 8 x 7x32 columns sums by column, 32x224+36576", 2.09, 1.09),
    ("H200", batch(256, 64, 12544), "bf16", "forward",
     "subgrid v8, 33 x 64x8, 132x512+204800", 1.0, 1.0),
    ("H200", batch(256, 64, 12544), "bf16", "backward",
     "subgrid v8, 66 x 96x4 sums by group, 132x384+208896", 2.0, 1.0),
    ("H200", batch(256, 256, 3136), "bf16", "forward",
     "cluster v8, 8 x 32x16, 128x512+213024", 1.0, 1.0),
    ("H200", batch(256, 256, 3136), "bf16", "backward",
     "subgrid v8, 22 x 32x12 sums by group, 132x384+159744", 2.0, 1.0),
    ("H200", batch(256, 512, 784), "bf16", "forward",
     "cluster v8, 4 x 128x4, 132x512+131104", 1.0, 1.0),
    ("H200", batch(256, 512, 784), "bf16", "backward",
     "cluster v8, 8 x 128x3 sums by group, 128x384+135200", 2.0, 1.0),
    ("H200", batch(256, 1024, 196), "bf16", "forward",
     "block v8, 1 x 32x16, 132x512+131072", 1.0, 1.0),
    ("H200", batch(256, 1024, 196), "bf16", "backward",
     "cluster v8, 2 x 32x12 sums by group, 132x384+135200", 2.0, 1.0),
    ("H200", batch_last(256, 128, 784), "bf16", "forward",
     "subgrid v8, 66 x 4x64 columns, 132x256+221184", 1.0, 1.0),
    ("H200", batch_last(256, 128, 784), "bf16", "backward",
     "subgrid v8, 132 x 4x64 columns sums by group, 132x256+221184", 2.0, 1.0),
    ("H200", batch_last(256, 1024, 196), "bf16", "forward",
     "subgrid v8, 16 x 4x64 columns, 128x256+225280", 1.0, 1.0),
    ("H200", batch_last(256, 1024, 196), "bf16", "backward",
     "subgrid v8, 33 x 4x64 columns sums by group, 132x256+221184", 2.0, 1.0),
    ("H200", batch_last(256, 2048, 49), "bf16", "forward",
     "cluster v8, 8 x 8x32 columns, 128x256+227328", 1.0, 1.0),
    ("H200", batch_last(256, 2048, 49), "bf16", "backward",
     "subgrid v8, 8 x 4x64 columns sums by group, 128x256+229376", 2.0, 1.0),
    ("A100", group(1, 512, 65536, 32), "f16", "forward",
     "subgrid v8, 13 x 128x4, 104x512+163840", 1.0, 1.0),
    ("A100", group(1, 512, 65536, 32), "f16", "backward",
     "subgrid v8, 36 x 128x3 sums by line, 108x384+148736", 2.0, 1.0),
    ("A100", batch(256, 128, 784), "f16", "forward",
     "subgrid v8, 4 x 128x4, 108x512+131072", 1.0, 1.0),
    ("A100", batch(256, 128, 784), "f16", "backward",
     "subgrid v8, 7 x 128x3 sums by group, 105x384+159744", 2.0, 1.0),
    ("B200", batch(256, 128, 784), "f64", "forward",
     "cluster v2, 8 x 32x16, 144x512+213024", 1.0, 1.0),
    ("L4", layer(1_000_000, 64), "f32", "backward",
     "warp v4, 1 x 8x1 x 48 seats sums by column two stages, 58x384+73728", 2.06, 1.0),
    ("B200", layer(1024, 12288), "f32", "backward",
     "cluster v4, 4 x 192x1 sums by column, 296x192+49184", 2.15, 1.15),
    ("H200", batch(256, 64, 3136), "bf16", "forward masked",
     "cluster v8, 8 x 32x16, 128x512+213024", 1.0, 1.06),
    ("H200", batch(256, 64, 3136), "bf16", "backward masked",
     "subgrid v8, 22 x 32x12 sums by group, 132x384+159744", 2.06, 1.0),
    ("H100", batch_last(256, 64, 3136), "bf16", "forward masked",
     "split v8, reduce columns/528 528x256+38912, map 1056x256", 2.01, 1.07),
    ("H100", batch_last(256, 64, 3136), "bf16", "backward masked",
     "split v8, reduce columns/528 528x256+20480, map 1056x256", 4.13, 1.01),
    ("H200", batch_last(256, 1024, 196), "f16", "forward masked",
     "subgrid v8, 16 x 4x64 columns, 128x256+225280", 1.0, 1.06),
    ("H200", batch_last(256, 1024, 196), "f16", "backward masked",
     "subgrid v8, 33 x 4x64 columns sums by group, 132x256+221184", 2.06, 1.0),
    ("H200", batch(256, 1024, 196), "bf16", "forward masked",
     "split v8, reduce rows/2 2048x512, map 1056x256", 2.0, 1.06),
    ("A100", group(2, 320, 4096, 32), "f32", "forward masked",
     "block v4, 1 x 512x1, 64x512+163840", 1.0, 1.06),
    ("L4", layer(4096, 1024), "f64", "backward masked",
     "block v2, 1 x 128x1 sums by column two stages, 116x128+49152", 2.12, 1.06),
]  # fmt: skip


@pytest.mark.parametrize(("chip", "pair", "dtype", "pass_", "expected", "read", "written"), GOLDEN)
def test_plan_of(chip: str, pair: Pair, dtype: str, pass_: str, expected: str, read: float, written: float) -> None:
    name, _, masked = pass_.partition(" ")
    request = Request(pass_=Pass[name], affine_grads=name == "backward", mask=bool(masked))
    plan = make_plan(problem(pair, DType[dtype]), request, CHIPS[chip])
    assert text(plan) == expected
    tensor = math.prod(pair[0]) * SIZES[DType[dtype]]
    assert round(plan.bytes_read / tensor, 2) == read
    assert round(plan.bytes_written / tensor, 2) == written


def extents(largest: int) -> st.SearchStrategy[int]:
    return st.one_of(st.integers(1, 9), st.sampled_from([10, 16, 20, 30, 32, 49, 63, 64, 100]), st.integers(1, largest))


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    n, c, s = draw(extents(300)), draw(extents(5000)), draw(extents(100_000))
    divisors = [g for g in (1, 2, 3, 4, 7, 8, 32) if c % g == 0] + [c]
    groups = draw(st.sampled_from(divisors))
    kinds = [layer(n * c, s), group(n, c, s, groups), group_last(n, c, s, groups), batch(n, c, s), batch_last(n, c, s)]
    return draw(st.sampled_from(kinds))


@st.composite
def gpus(draw: st.DrawFn) -> Gpu:
    shared = draw(st.integers(48, 227)) * 1024
    return draw(
        st.one_of(
            st.sampled_from(list(CHIPS.values())),
            st.builds(
                Gpu,
                sms=st.integers(1, 200),
                smem_per_block=st.just(shared),
                smem_per_sm=st.just(shared + 1024),
                l2_bytes=st.just(1 << 20),
                max_cluster=st.sampled_from([1, 4, 8, 16]),
            ),
        )
    )


def requests() -> st.SearchStrategy[Request]:
    return st.builds(
        Request,
        pass_=st.sampled_from(list(Pass)),
        aligned=st.booleans(),
        affine_grads=st.booleans(),
        strategy=st.sampled_from(list(Strategy)),
        add=st.booleans(),
        mask=st.booleans(),
    )


def check_team(p: Problem, plan: Plan, request: Request, gpu: Gpu) -> None:
    """Limits of the chip, and room for every access of a block; csrc/tests/test_plan.cpp follows each element."""
    team, d, threads = plan.team, p.stats.simplify(), plan.team.width * plan.team.lanes
    assert team.blocks == 1 or plan.strategy in (Strategy.cluster, Strategy.subgrid)
    assert team.cluster == (plan.strategy == Strategy.cluster)
    assert team.blocks <= gpu.max_cluster or not team.cluster
    assert plan.fused.blocks == team.teams * team.blocks
    assert plan.fused.threads == -(-threads * team.seats // 32) * 32
    assert threads in (1, 2, 4, 8, 16, 32) or team.seats == 1, "lanes that merge are a power of two"
    assert team.teams * team.seats < d.groups() + team.seats, "no team without a group"
    if plan.strategy == Strategy.subgrid:
        per_sm = min(gpu.smem_per_sm // (plan.fused.shared + 2048), 2048 // plan.fused.threads, 32)
        assert plan.fused.blocks <= max(per_sm, 1) * gpu.sms, "all at once"
    size, streams = SIZES[p.dtype], 2 if request.pass_ == Pass.backward else 1
    if team.walk == Walk.columns:
        assert team.columns % d.cols == 0, "whole groups"
        assert d.rows >= 2, "what lies behind a unit's first line is its second"
        unit = d.rows * team.columns
    else:
        unit = d.rows * d.cols
    assert plan.fused.shared * team.blocks >= unit * size * streams * team.seats * team.stages, "all of it on the chip"


@settings(max_examples=400, deadline=None)
@given(pairs(), st.sampled_from(list(DType)), st.sampled_from(list(Moments)), requests(), gpus())
def test_every_plan(pair: Pair, dtype: DType, moments: Moments, request: Request, gpu: Gpu) -> None:
    if request.pass_ == Pass.moments and moments == Moments.given:
        moments = Moments.mean_var
    p = problem(pair, dtype, moments)
    plan = make_plan(p, request, gpu)
    assert plan == make_plan(p, request, gpu)
    assert plan.vec == (16 // SIZES[dtype] if request.aligned else 1)

    for launch in (plan.fused, plan.map, plan.reduce.launch, plan.affine.launch):
        assert 0 <= launch.blocks < 2**31
        assert launch.threads <= 1024
        assert launch.threads % 32 == 0
        assert launch.shared <= gpu.smem_per_block
        assert (launch.blocks == 0) == (launch.threads == 0)

    stats = p.stats.simplify()
    groups, tensor = stats.groups(), stats.numel() * SIZES[dtype]
    split = plan.strategy == Strategy.split
    if request.strategy != Strategy.automatic:
        assert plan.strategy in (request.strategy, Strategy.split)
    assert plan.strategy != Strategy.automatic
    assert (plan.fused.blocks == 0) == split
    assert (plan.reduce.launch.blocks > 0) == (split and moments != Moments.given)
    assert (plan.map.blocks > 0) == (split and request.pass_ != Pass.moments)
    if not split:
        check_team(p, plan, request, gpu)

    backward = request.pass_ == Pass.backward
    result = 16 if backward else 24
    for domain, reduce in ((p.stats, plan.reduce), (p.affine, plan.affine)):
        d = domain.simplify()
        if reduce.parts > 1:
            partials = d.groups() if reduce.walk == Walk.rows else d.batch * d.keep * d.cols
            assert reduce.workspace_bytes >= reduce.parts * partials * result + 4
        else:
            assert reduce.workspace_bytes == 0
    assert plan.workspace_bytes >= plan.reduce.workspace_bytes + plan.affine.workspace_bytes
    if split and request.pass_ != Pass.moments:
        assert plan.team == Team()
        arrays = 5 if backward else 3
        assert plan.workspace_bytes >= arrays * groups * (8 if dtype == DType.f64 else 4)
    # Partials stay small beside what the chip must read anyway, or beside one result for every element of a line.
    assert plan.reduce.workspace_bytes <= 2**20 + gpu.sms * 2**17

    needs = {Pass.forward: (1, 1), Pass.moments: (1, 0), Pass.backward: (1 if moments == Moments.given else 2, 1)}
    read, written = needs[request.pass_]
    if request.add and request.pass_ != Pass.moments:
        read, written = read + 1, written + (not backward)
    assert plan.bytes_read >= read * tensor
    assert plan.bytes_written >= written * tensor
    if not split and plan.affine.launch.blocks == 0:
        side = 2 * p.affine.groups() * 8 * 2 + 2 * groups * 8 + plan.workspace_bytes + request.mask * (tensor // 16 + 1)
        assert plan.bytes_read <= read * tensor + side, "one read"
        assert plan.bytes_written <= written * tensor + side


BIG_AND_SMALL = (
    layer(16384, 4096), layer(1_000_000, 64), layer(64, 1_000_000), layer(1024, 12288), layer(16384, 1000),
    group(2, 320, 4096, 32), group(16, 320, 16384, 32), group(1, 512, 65536, 32), group(1, 128, 20 * 65536, 32),
    group_last(2, 320, 4096, 32), group_last(16, 640, 1024, 32), group_last(8, 96, 4096, 32),
    batch(256, 64, 12544), batch(256, 256, 3136), batch(256, 512, 784), batch(256, 1024, 196), batch(256, 2048, 49),
    batch_last(256, 256, 196), batch_last(256, 1024, 196), batch_last(256, 2048, 49),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(pairs(), st.sampled_from(list(DType)), st.sampled_from(list(Moments)), requests(), gpus())
def test_a_mask_costs_no_plan(pair: Pair, dtype: DType, moments: Moments, request: Request, gpu: Gpu) -> None:
    """Where normkern.problem says that it can be left, every strategy but warp on lines of many groups can leave it;
    the plan differs in a byte of the mask for 16 bytes of x, read as often as x is in the backward pass."""
    asked = PythonProblem(*(PythonDomain(*d) for d in pair), PythonMoments(int(moments)), PythonAct.relu)
    p = problem(pair, dtype, moments, Act.relu)
    warp = request.strategy == Strategy.warp and p.stats.simplify().rows > 1
    if request.pass_ == Pass.moments or not asked.can_mask(SIZES[dtype]) or warp:
        return
    backward = request.pass_ == Pass.backward
    plain, masked = (
        make_plan(p, Request(request.pass_, True, request.affine_grads, request.strategy, mask=mask), gpu)
        for mask in (False, True)
    )
    assert text(masked) == text(plain)
    tensor = math.prod(pair[0]) * SIZES[dtype]
    mask, sweeps = -(-tensor // 16), 1 + sum(r.launch.blocks > 0 for r in (masked.reduce, masked.affine))
    spared = tensor if moments == Moments.given else 0
    assert masked.bytes_read - plain.bytes_read == (sweeps * mask - spared if backward else 0)
    assert masked.bytes_written - plain.bytes_written == (0 if backward else mask)


def test_a_mask_is_left_by_whole_accesses_alone() -> None:
    """Else `split`, whose map writes the buffer in whole accesses whatever the groups are; normkern.problem does not
    ask for that, and asks for all else that networks run: not for 7 x 7 or 14 x 14 images in half precision."""
    for pair in BIG_AND_SMALL:
        p = problem(pair, DType.bf16, act=Act.relu)
        asked = PythonProblem(*(PythonDomain(*d) for d in pair), act=PythonAct.relu).can_mask(2)
        assert (make_plan(p, Request(mask=True), H200).strategy != Strategy.split) == asked, pair
        assert asked == (pair not in (batch(256, 1024, 196), batch(256, 2048, 49))), pair
        assert make_plan(p, Request(Pass.backward, mask=True), H200).strategy != Strategy.split, "reading is no matter"


@pytest.mark.parametrize("pass_", [Pass.forward, Pass.backward])
def test_one_read(pass_: Pass) -> None:
    """What networks run in bfloat16 is read once on an H200, dweight and dbias included: the floor of bytes, and a few
    per cent for what teams leave behind."""
    for pair in BIG_AND_SMALL:
        plan = make_plan(problem(pair, DType.bf16), Request(pass_=pass_, affine_grads=pass_ == Pass.backward), H200)
        tensor, reads = math.prod(pair[0]) * 2, 2 if pass_ == Pass.backward else 1
        groups = problem(pair, DType.bf16).stats.groups()
        assert plan.strategy != Strategy.split, pair
        assert plan.affine.launch.blocks == 0, pair
        assert plan.bytes_read - 16 * groups <= (reads + 0.4) * tensor, pair


@pytest.mark.parametrize(("pair", "chip"), [(layer(512, 4096), H200), (layer(64, 1_000_000), L4)])
@pytest.mark.parametrize("moments", [Moments.mean_var, Moments.second])
def test_bytes_of_a_sum(pair: Pair, chip: Gpu, moments: Moments) -> None:
    """The norm of a sum reads and writes one tensor more than the norm, and its backward pass reads one more: nothing
    else of the plan changes."""
    p, tensor = problem(pair, DType.bf16, moments), math.prod(pair[0]) * 2
    for pass_, written in ((Pass.forward, tensor), (Pass.backward, 0)):
        alone, of_sum = (make_plan(p, Request(pass_=pass_, affine_grads=True, add=add), chip) for add in (False, True))
        assert text(alone) == text(of_sum)
        assert of_sum.bytes_read - alone.bytes_read == tensor
        assert of_sum.bytes_written - alone.bytes_written == written


# ---- what a strategy of slabs could save where `split` reads twice (CONTRIBUTING.md has this table)

# Shape and pass; tensors that split reads and writes, of which slabs would save the second read of x, or of x and dy;
# MB that must then stay in the L2 cache, which has 62.9: the narrowest slab of whole groups whose lines are 64 bytes.
TWICE = {
    "batch norm 256x64x112x112": (batch_last(256, 64, 12544), "forward", 3, 205.5),
    "batch norm 256x64x112x112, backward": (batch_last(256, 64, 12544), "backward", 5, 411.0),
    "batch norm 256x64x56x56": (batch_last(256, 64, 3136), "forward", 3, 51.4),
    "batch norm 256x64x56x56, backward": (batch_last(256, 64, 3136), "backward", 5, 102.8),
    "batch norm 256x256x56x56": (batch_last(256, 256, 3136), "forward", 3, 51.4),
    "batch norm 256x256x56x56, backward": (batch_last(256, 256, 3136), "backward", 5, 102.8),
    "group norm 1x128x512x512, backward": (group_last(1, 128, 512 * 512, 32), "backward", 7, 33.6),
    "group norm 1x256x512x512, backward": (group_last(1, 256, 512 * 512, 32), "backward", 7, 33.6),
    "group norm 1x128x1024x1024": (group_last(1, 128, 1 << 20, 32), "forward", 3, 67.1),
    "group norm 1x128x1024x1024, backward": (group_last(1, 128, 1 << 20, 32), "backward", 7, 134.2),
}


@pytest.mark.parametrize("name", TWICE)
def test_what_slabs_could_save(name: str) -> None:
    pair, pass_, moved, live = TWICE[name]
    p, tensor = problem(pair, DType.bf16), math.prod(pair[0]) * 2
    streams = 2 if pass_ == "backward" else 1
    plan = make_plan(p, Request(pass_=Pass[pass_], affine_grads=streams == 2), H200)
    assert plan.strategy == Strategy.split
    assert round((plan.bytes_read + plan.bytes_written) / tensor) == moved
    d = p.stats.simplify()
    columns = math.lcm(64 // SIZES[p.dtype], d.cols)
    assert round(d.rows * columns * SIZES[p.dtype] * streams / 1e6, 1) == live


def test_networks_read_twice_only_where_slabs_are_in_question() -> None:
    """Of the shapes that kernels are made for, the table above is all that `split` takes."""
    layers = [layer(rows, cols) for rows, cols in ROWS]
    images = [make(256, c, s) for c, s in RESNET for make in (batch, batch_last)]
    groups = [make(n, c, s, 32) for n, c, s in DIFFUSION for make in (group, group_last)]
    found = {
        (pair, pass_)
        for pair in layers + images + groups
        for pass_ in ("forward", "backward")
        if make_plan(problem(pair, DType.bf16), Request(pass_=Pass[pass_], affine_grads=pass_ == "backward"), H200)
        .strategy == Strategy.split
    }  # fmt: skip
    assert found == {row[:2] for row in TWICE.values()}


ROWS = (
    (16384, 768), (65536, 1024), (16384, 4096), (8192, 8192), (4096, 16384), (65536, 4096), (4096, 65536),
    (4096, 131072), (1024, 12288), (131072, 128),
)  # fmt: skip
RESNET = (
    (64, 12544), (64, 3136), (256, 3136), (128, 784), (512, 784), (256, 196), (1024, 196), (512, 49), (2048, 49),
)  # fmt: skip
DIFFUSION = (
    (2, 1280, 64), (2, 640, 1024), (2, 640, 4096), (2, 320, 16384), (16, 320, 4096), (16, 320, 16384),
    (1, 512, 65536), (1, 128, 262144), (1, 256, 262144), (1, 128, 1 << 20),
)  # fmt: skip


@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize("pass_", [Pass.forward, Pass.backward])
def test_a_larger_chip_keeps_larger_groups(dtype: DType, pass_: Pass) -> None:
    """What fits on a small chip is not split on a large one."""
    for exponent in range(3, 22):
        plans = [make_plan(problem(layer(512, 2**exponent), dtype), Request(pass_=pass_), g) for g in (L4, A100, H200)]
        fused = [plan.strategy != Strategy.split for plan in plans]
        assert fused == sorted(fused)


def test_batch_norm_needs_no_reduction_of_its_own_for_the_weights() -> None:
    for pair in (batch(32, 64, 49), batch(256, 64, 12544), batch_last(32, 64, 3136)):
        plan = make_plan(problem(pair, DType.bf16), Request(pass_=Pass.backward, affine_grads=True), H200)
        assert plan.affine.launch.blocks == 0
    given_moments = problem(batch(32, 64, 49), DType.bf16, Moments.given)
    plan = make_plan(given_moments, Request(pass_=Pass.backward, affine_grads=True), H200)
    assert plan.reduce.launch.blocks == 0
    assert plan.affine.launch.blocks > 0
