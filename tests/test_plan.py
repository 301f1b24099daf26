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
    Walk,
    make_plan,
)

from normkern.explain import CHIPS as KNOWN_CHIPS

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


def problem(pair: Pair, dtype: DType, moments: Moments = Moments.mean_var) -> Problem:
    return Problem(Domain(*pair[0]), Domain(*pair[1]), moments, Act.none, dtype, 1e-5)


def launch_text(launch: Launch) -> str:
    return f"{launch.blocks}x{launch.threads}" + (f"+{launch.shared}" if launch.shared else "")


def reduce_text(reduce: Reduce) -> str:
    return f"{reduce.walk.name}/{reduce.parts} {launch_text(reduce.launch)}"


def text(plan: Plan) -> str:
    """Strategy, width and launches, as blocks x threads + shared memory; a reduction as walk/parts."""
    parts = [f"{plan.strategy.name} v{plan.vec}"]
    if plan.fused.blocks:
        parts.append(f"{plan.lanes} lanes {launch_text(plan.fused)}")
    if plan.reduce.launch.blocks:
        parts.append(f"reduce {reduce_text(plan.reduce)}")
    if plan.map.blocks:
        parts.append(f"map {launch_text(plan.map)}")
    if plan.affine.launch.blocks:
        parts.append(f"affine {reduce_text(plan.affine)}")
    return ", ".join(parts)


# The last two columns: bytes read and written, in tensors.
GOLDEN = [
    ("H200", layer(16384, 4096), "bf16", "forward", "block v8, 128 lanes 2112x128+8192", 1.0, 1.0),
    (
        "H200",
        layer(16384, 4096),
        "bf16",
        "backward",
        "block v8, 128 lanes 1584x128+16384, affine columns/33 528x256+20480",
        4.02,
        1.02,
    ),
    ("H200", layer(131072, 128), "bf16", "forward", "warp v8, 8 lanes 2112x128+4096", 1.0, 1.06),
    (
        "H200",
        layer(65536, 1024),
        "f16",
        "backward",
        "warp v8, 32 lanes 1584x128+16384, affine columns/132 528x256+20480",
        4.03,
        1.02,
    ),
    ("H200", layer(1_000_000, 8), "f32", "forward", "warp v4, 2 lanes 2112x128+2048", 1.0, 1.5),
    ("H200", layer(8, 100_000), "f32", "forward", "split v4, reduce rows/13 104x512, map 782x256", 2.25, 1.0),
    ("H200", layer(1, 100_000_000), "f32", "forward", "split v4, reduce rows/1056 1056x512, map 1056x256", 4.0, 1.0),
    (
        "H200",
        layer(64, 1_000_003),
        "f32",
        "backward",
        "split v4, reduce rows/17 1088x512, map 1056x256, affine columns/1 3969x256+12288",
        6.03,
        1.03,
    ),
    ("H100", layer(4096, 65536), "bf16", "forward", "block v8, 512 lanes 132x512+131072", 1.0, 1.0),
    (
        "H100",
        layer(4096, 65536),
        "bf16",
        "backward",
        "split v8, reduce rows/1 4096x512, map 1056x256, affine columns/3 768x256+20480",
        6.01,
        1.01,
    ),
    (
        "H100",
        layer(1024, 2049),
        "bf16",
        "backward",
        "block v8, 96 lanes 1024x96+9216, affine columns/16 144x256+19456",
        4.13,
        1.13,
    ),
    ("A100", layer(4096, 65536), "bf16", "forward", "block v8, 512 lanes 108x512+131072", 1.0, 1.0),
    ("A100", layer(4096, 131072), "f16", "forward", "split v8, reduce rows/1 4096x512, map 864x256", 2.0, 1.0),
    ("B200", layer(4096, 8192), "f64", "forward", "block v2, 512 lanes 444x512+65536", 1.0, 1.0),
    ("A100", group(2, 320, 4096, 32), "f16", "forward", "block v8, 512 lanes 64x512+81920", 1.0, 1.0),
    ("L4", group(2, 320, 4096, 32), "f16", "forward", "block v8, 512 lanes 58x512+81920", 1.0, 1.0),
    (
        "L4",
        group(2, 320, 4096, 32),
        "f16",
        "backward",
        "split v8, reduce rows/3 192x512, map 464x256, affine rows/1 320x256",
        6.0,
        1.0,
    ),
    (
        "H200",
        group(1, 128, 1024 * 1024, 32),
        "bf16",
        "forward",
        "split v8, reduce rows/33 1056x512, map 1056x256",
        2.0,
        1.0,
    ),
    (
        "H200",
        group(2, 320, 4096, 320),
        "f32",
        "backward",
        "block v4, 256 lanes 640x256+32768, affine rows/1 320x512",
        4.0,
        1.0,
    ),
    (
        "H200",
        group_last(2, 320, 4096, 32),
        "bf16",
        "forward",
        "split v8, reduce columns/43 172x256+36864, map 1056x256",
        2.13,
        1.13,
    ),
    (
        "B200",
        group_last(2, 320, 4096, 32),
        "bf16",
        "backward",
        "split v8, reduce columns/43 172x256+19456, map 1184x256, affine columns/86 172x256+19456",
        6.17,
        1.17,
    ),
    ("H100", group_last(16, 1280, 64, 32), "bf16", "forward", "block v8, 96 lanes 512x96+6144", 1.0, 1.0),
    ("H200", batch(256, 64, 3136), "bf16", "forward", "split v8, reduce rows/17 1088x512, map 1056x256", 2.0, 1.0),
    ("H200", batch(256, 2048, 49), "bf16", "backward", "block v8, 448 lanes 396x448+57344", 2.0, 1.0),
    (
        "B200",
        batch_last(256, 64, 3136),
        "bf16",
        "forward",
        "split v8, reduce columns/592 592x256+38912, map 1184x256",
        2.01,
        1.01,
    ),
    (
        "A100",
        batch_last(256, 64, 3136),
        "bf16",
        "backward",
        "split v8, reduce columns/432 432x256+20480, map 864x256",
        4.0,
        1.0,
    ),
    (
        "L4",
        batch_last(32, 3, 50176),
        "f32",
        "backward",
        "split v4, reduce columns/232 232x256+12288, map 464x256",
        4.0,
        1.0,
    ),
]


@pytest.mark.parametrize(("chip", "pair", "dtype", "pass_", "expected", "read", "written"), GOLDEN)
def test_plan_of(chip: str, pair: Pair, dtype: str, pass_: str, expected: str, read: float, written: float) -> None:
    request = Request(pass_=Pass[pass_], affine_grads=pass_ == "backward")
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
                max_cluster=st.just(1),
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
    )


def slots_in_run(cols: int, vec: int) -> int:
    """Aligned chunks of `vec` that a run of `cols` can touch, wherever in the buffer a run of that length begins."""
    return max((begin + cols - 1) // vec - begin // vec + 1 for begin in (k * cols % vec for k in range(vec)))


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
        streams = 2 if request.pass_ == Pass.backward else 1
        slots = stats.rows * slots_in_run(stats.cols, plan.vec)
        per_block = plan.fused.threads // plan.lanes
        assert plan.fused.threads % plan.lanes == 0
        assert plan.lanes == plan.fused.threads or plan.lanes in (1, 2, 4, 8, 16, 32)
        assert per_block * plan.fused.blocks < groups + per_block  # no block without a group
        staged = slots * plan.vec * SIZES[dtype] * streams * per_block
        assert plan.fused.shared >= staged, "every slot of every group of a block has its place"

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
        arrays = 5 if backward else 3
        assert plan.workspace_bytes >= arrays * groups * (8 if dtype == DType.f64 else 4)
    # Partials stay small beside what the chip must read anyway, or beside one result for every element of a line.
    assert plan.reduce.workspace_bytes <= 2**20 + gpu.sms * 2**17

    needs = {Pass.forward: (1, 1), Pass.moments: (1, 0), Pass.backward: (1 if moments == Moments.given else 2, 1)}
    read, written = needs[request.pass_]
    assert plan.bytes_read >= read * tensor
    assert plan.bytes_written >= written * tensor
    if not split and plan.affine.launch.blocks == 0:
        side = 2 * p.affine.groups() * 8 * 2 + 2 * groups * 8
        assert plan.bytes_read <= read * tensor + side, "one read"


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
